//! The kernels' own bench for a page: matrix products and convolutions beside the peak of multiply-add, and what a
//! parallel region costs. `benches/kernels/run.mjs` drives it; the work is that of the native `gemm_bench`.

#[path = "../../../kernels/examples/gemm_bench/shapes.rs"]
mod shapes;

use shapes::works;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use wasm_bindgen::prelude::*;
use weblane_kernels::int8::Form;
use weblane_kernels::par::{Cx, Pool};
use weblane_kernels::simd::{Isa, Kernel, Simd, dispatch};

#[cfg(feature = "threads")]
pub use wasm_bindgen_rayon::init_thread_pool;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = performance)]
    fn now() -> f64;
}

/// Multiply-adds per step of [`Peak`]: enough independent chains to hide the latency, few enough for 16 registers.
const CHAINS: usize = 12;

/// Independent multiply-adds in registers: what no kernel can exceed.
struct Peak(usize);
impl Kernel for Peak {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (x, y) = (s.splat(black_box(0.999)), s.splat(black_box(1e-3)));
        // Different chains, or the compiler would run one for all.
        let mut acc: [S::F32; CHAINS] = core::array::from_fn(|i| s.splat(i as f32));
        for _ in 0..self.0 {
            for acc in &mut acc {
                *acc = s.mul_add(*acc, x, y);
            }
        }
        acc.iter().fold(0.0, |sum, acc| sum + s.reduce_add(*acc))
    }
}

/// The same for the dot product of pairs of 16 bits, or of bytes whose pairs are added in 16 bits, two operations for
/// each product.
struct DotPeak {
    steps: usize,
    split: bool,
}
impl Kernel for DotPeak {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let [x, y] = [0x0003_0005, 0x0007_000b].map(|x| s.splat_i32(black_box(x)));
        let ones = s.splat_i32(black_box(0x0001_0001));
        let mut acc: [S::I32; CHAINS] = core::array::from_fn(|i| s.splat_i32(i as i32));
        for _ in 0..self.steps {
            for acc in &mut acc {
                let product = if self.split {
                    // As of two groups in a pair.
                    let sums = s.add_i16(s.dot_pairs_u8_i8(*acc, x), s.dot_pairs_u8_i8(*acc, y));
                    s.dot_i16(sums, ones)
                } else {
                    s.dot_i16(*acc, x)
                };
                *acc = s.add_i32(*acc, product);
            }
        }
        acc.iter().any(|acc| s.mask_any(s.lt_i32(s.splat_i32(0), *acc)))
    }
}

/// Computes the peak of a form for some steps; its operations. A function of its own: an engine goes over to what its
/// optimising compiler made when one is called anew.
#[inline(never)]
fn dot_peak(isa: Isa, form: Form, steps: usize) -> f64 {
    let products = match form {
        Form::Wide | Form::Split => {
            let split = form == Form::Split;
            let _ = black_box(dispatch(isa, DotPeak { steps: black_box(steps), split }));
            if split { 8 } else { 2 }
        }
        Form::U8S8 | Form::S8S8 => {
            relaxed_dot(black_box(steps));
            4
        }
    };
    (2 * products * CHAINS * isa.lanes() * steps) as f64
}

/// Chains of the relaxed dot product, whatever it computes here.
#[cfg(target_feature = "relaxed-simd")]
fn relaxed_dot(steps: usize) {
    use core::arch::wasm32::*;
    let x = i32x4_splat(black_box(0x0103_0205));
    let mut acc: [v128; CHAINS] = core::array::from_fn(|i| i32x4_splat(i as i32));
    for _ in 0..steps {
        for acc in &mut acc {
            *acc = i32x4_relaxed_dot_i8x16_i7x16_add(x, x, *acc);
        }
    }
    let _ = black_box(acc);
}

#[cfg(not(target_feature = "relaxed-simd"))]
fn relaxed_dot(_: usize) {}

/// GOP/s of the chains of a form of the dot product, 0 if the module has none: first of pairs of 16 bits, then of bytes by
/// the relaxed dot product, then of bytes whose pairs are added in 16 bits.
#[wasm_bindgen(js_name = dotPeaks)]
pub fn dot_peaks(rounds: usize, ms: f64) -> Vec<f64> {
    let isa = Isa::best();
    let mut rates = Vec::new();
    for form in [Form::Wide, Form::U8S8, Form::Split] {
        let ops = dot_peak(isa, form, STEPS);
        let peak = || {
            let _ = black_box(dot_peak(isa, form, STEPS));
        };
        rate(10.0 * ms, 1, peak);
        let best = (0..rounds).map(|_| rate(ms, 1, peak) * ops / 1e6).fold(0.0, f64::max);
        rates.push(if form == Form::Wide || cfg!(target_feature = "relaxed-simd") { best } else { 0.0 });
    }
    rates
}

/// The form that 8-bit products take here, and all that are exact.
#[wasm_bindgen]
pub fn forms() -> Vec<String> {
    let isa = Isa::best();
    core::iter::once(Form::best(isa)).chain(Form::available(isa)).map(|form| form.name().to_owned()).collect()
}

/// Steps of a peak between two looks at the clock.
const STEPS: usize = 1 << 14;

/// Calls of `f` per millisecond over at least `ms`, the clock read once per `batch` calls.
fn rate(ms: f64, batch: usize, mut f: impl FnMut()) -> f64 {
    let start = now();
    let mut calls = 0;
    loop {
        for _ in 0..batch {
            f();
        }
        calls += batch;
        let elapsed = now() - start;
        if elapsed >= ms {
            return calls as f64 / elapsed;
        }
    }
}

/// Names of what [`measure`] measures, in order.
#[wasm_bindgen]
pub fn names() -> Vec<String> {
    works().into_iter().map(|work| work.name).collect()
}

/// Name of the instruction set of this module.
#[wasm_bindgen]
pub fn isa() -> String {
    Isa::best().name().to_owned()
}

/// `rounds` pairs of GFLOP/s on one lane: the peak of multiply-add (or of the dot product that 8-bit products use), and
/// then work `index`, each for at least `ms`
/// milliseconds. `None` when there is no such work.
#[wasm_bindgen]
pub fn measure(index: usize, rounds: usize, ms: f64) -> Option<Vec<f64>> {
    let isa = Isa::best();
    let work = works().into_iter().nth(index)?;
    let mut run = (work.prepare)(isa);
    let form = Form::best(isa);
    let peak_flops = if work.int8 { dot_peak(isa, form, STEPS) } else { (2 * CHAINS * isa.lanes() * STEPS) as f64 };
    let peak = || {
        if work.int8 {
            let _ = black_box(dot_peak(isa, form, STEPS));
        } else {
            assert!(dispatch(isa, Peak(black_box(STEPS))) > 0.0);
        }
    };
    let rates = Pool::new(1).run(isa, |cx| {
        // Warm, and compiled by the optimising compiler.
        rate(20.0 * ms, 1, || run(cx));
        rate(10.0 * ms, 1, peak);
        // About a tenth of the time between two looks at the clock, which is coarse in a browser.
        let batch = (rate(ms, 1, || run(cx)) * ms / 10.0).max(1.0) as usize;
        let mut rates = Vec::with_capacity(2 * rounds);
        for _ in 0..rounds {
            rates.push(rate(ms, 1, peak) * peak_flops / 1e6);
            rates.push(rate(ms, batch, || run(cx)) * work.flops / 1e6);
        }
        rates
    });
    Some(rates)
}

/// `rounds` ratios of the peak of multiply-add on `lanes` lanes to that on one, each for at least `ms` milliseconds: how
/// much the machine itself gains by more lanes, where nothing is shared and nothing waits.
#[wasm_bindgen(js_name = lanesOverOne)]
pub fn lanes_over_one(lanes: usize, rounds: usize, ms: f64) -> Vec<f64> {
    let isa = Isa::best();
    let on = |lanes: usize| {
        let pool = Pool::new(lanes);
        move |ms: f64| {
            let tasks = |cx: &Cx<'_>| {
                cx.for_each(lanes, u64::MAX, &|_| assert!(dispatch(isa, Peak(black_box(16 * STEPS))) > 0.0));
            };
            pool.run(isa, |cx| lanes as f64 * rate(ms, 1, || tasks(cx)))
        }
    };
    let (one, all) = (on(1), on(lanes));
    (0..rounds).map(|_| 1.0 / one(ms) * all(ms)).collect()
}

/// Microseconds of a parallel region on `lanes` lanes, back to back as inside a run, `rounds` means of a thousand each:
/// first of one task per lane that does nothing, then of one in which every lane must come, since each task waits until
/// all have begun.
#[wasm_bindgen(js_name = regionCost)]
pub fn region_cost(lanes: usize, rounds: usize) -> Vec<f64> {
    const REGIONS: usize = 1000;
    let empty = |cx: &Cx<'_>| cx.for_each(lanes, u64::MAX, &|_| {});
    let meet = |cx: &Cx<'_>| {
        let begun = AtomicUsize::new(0);
        cx.for_each(lanes, u64::MAX, &|_| {
            begun.fetch_add(1, Ordering::Relaxed);
            while begun.load(Ordering::Relaxed) < lanes {
                core::hint::spin_loop();
            }
        });
    };
    let time = |cx: &Cx<'_>, region: &dyn Fn(&Cx<'_>)| {
        let start = now();
        for _ in 0..REGIONS {
            region(cx);
        }
        (now() - start) * 1e3 / REGIONS as f64
    };
    Pool::new(lanes).run(Isa::best(), |cx| {
        for _ in 0..20 {
            time(cx, &empty);
            time(cx, &meet);
        }
        let empties: Vec<f64> = (0..rounds).map(|_| time(cx, &empty)).collect();
        let meetings = (0..rounds).map(|_| time(cx, &meet));
        empties.into_iter().chain(meetings).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use weblane_kernels::gemm::table::tile;

    /// Candidates that are closer to the best one change places with it from run to run.
    const NEAR: f64 = 0.99;

    #[test]
    fn the_tile_of_products_is_the_one_that_was_measured_best() {
        let record: serde_json::Value =
            serde_json::from_str(include_str!("../../records/tiles-chromium.json")).expect("a record of bench tune");
        let t = tile(Isa::WasmRelaxedSimd);
        let held = serde_json::json!({
            "mr": t.mr, "narrow_mr": t.narrow_mr, "nrv": t.nrv, "kc": t.kc, "mc": t.mc, "unroll": t.unroll,
            "interleaves": u8::from(t.interleaves),
        });
        let results = record["results"].as_array().expect("results");
        let score = |result: &serde_json::Value| result["score"].as_f64().expect("a score");
        let own = results.iter().find(|result| result["tile"] == held).expect("the table's tile among the candidates");
        assert!(score(own) >= NEAR * score(&results[0]), "{held} has {}, the best {}", score(own), results[0]);
    }
}
