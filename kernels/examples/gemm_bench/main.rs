//! Speed of the matrix product and the convolutions on every instruction set, to choose the rows of the tile table.
//!
//! `cargo run --release -p weblane-kernels --example gemm_bench [-- <instruction set or all> [<filter> [<lanes>]]]`

mod shapes;

use shapes::{Work, works};
use std::hint::black_box;
use std::time::Instant;
use weblane_kernels::par::Pool;
use weblane_kernels::simd::{Isa, Kernel, Simd, dispatch};

/// Independent multiply-adds in registers: what no kernel can exceed.
struct Peak(usize);
impl Kernel for Peak {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (x, y) = (s.splat(black_box(0.999)), s.splat(black_box(1e-3)));
        // Different chains, or the compiler would run one for all.
        let mut acc: [S::F32; 12] = core::array::from_fn(|i| s.splat(i as f32));
        for _ in 0..self.0 {
            for acc in &mut acc {
                *acc = s.mul_add(*acc, x, y);
            }
        }
        acc.iter().fold(0.0, |sum, acc| sum + s.reduce_add(*acc))
    }
}

/// The same for pairs of 16-bit products, two operations each product: the form of 8-bit products that all have.
struct DotPeak(usize);
impl Kernel for DotPeak {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let x = s.splat_i32(black_box(0x0003_0005));
        let mut acc: [S::I32; 12] = core::array::from_fn(|i| s.splat_i32(i as i32));
        for _ in 0..self.0 {
            for acc in &mut acc {
                *acc = s.add_i32(*acc, s.dot_i16(*acc, x));
            }
        }
        acc.iter().any(|acc| s.mask_any(s.lt_i32(s.splat_i32(0), *acc)))
    }
}

/// Shortest time of one call of `f` in seconds.
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut rounds = 0;
    while rounds < 5 || (start.elapsed().as_secs_f64() < 0.15 && rounds < 1000) {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
        rounds += 1;
    }
    best
}

fn main() {
    let mut args = std::env::args().skip(1);
    let only = args.next().filter(|name| name != "all");
    let filter = args.next().unwrap_or_default();
    let pool = Pool::new(args.next().map_or(1, |lanes| lanes.parse().expect("a number of lanes")));
    let isas: Vec<Isa> =
        Isa::available().into_iter().filter(|isa| only.as_ref().is_none_or(|name| isa.name() == name)).collect();
    let peaks: Vec<f64> = isas
        .iter()
        .map(|&isa| {
            let steps = 1 << 16;
            let flops = (2 * 12 * isa.lanes() * steps) as f64;
            flops / time(|| assert!(dispatch(isa, Peak(black_box(steps))) > 0.0)) / 1e9
        })
        .collect();
    let dot_peaks: Vec<f64> = isas
        .iter()
        .map(|&isa| {
            let steps = 1 << 16;
            let ops = (4 * 12 * isa.lanes() * steps) as f64;
            ops / time(|| {
                let _ = black_box(dispatch(isa, DotPeak(black_box(steps))));
            }) / 1e9
        })
        .collect();
    print!("{:42}", "GFLOP/s or GOP/s (% of peak)");
    isas.iter().for_each(|isa| print!("{:>16}", isa.name()));
    print!("\n{:42}", "peak of multiply-add");
    peaks.iter().for_each(|peak| print!("{peak:>16.1}"));
    print!("\n{:42}", "peak of pairs of 16-bit products");
    dot_peaks.iter().for_each(|peak| print!("{peak:>16.1}"));
    println!();
    for Work { name, flops, int8, prepare } in works() {
        if !name.contains(&filter) {
            continue;
        }
        print!("{name:42}");
        for (&isa, peak) in isas.iter().zip(if int8 { &dot_peaks } else { &peaks }) {
            let mut run = prepare(isa);
            let rate = flops / pool.run(isa, |cx| time(|| run(cx))) / 1e9;
            print!("{rate:>9.1} ({:>3.0}%)", 100.0 * rate / peak);
        }
        println!();
    }
}
