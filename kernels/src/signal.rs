//! Discrete Fourier transforms and mel filters, in `f64`.
//!
//! Stockham's form of the mixed-radix transform (Van Loan, Computational Frameworks for the FFT, 1992, 1.7): a stage of
//! radix r goes over all values once and leaves them sorted, so that none is ever reversed in place.
//!
//! ```text
//! l = n, s = 1
//! for r in factors of n: fours, a two, odd primes
//!     for p < l / r, q < s
//!         for k < r
//!             y[q + s (r p + k)] = root(l)^(p k) * sum over j < r: root(r)^(j k) x[q + s (p + l / r j)]
//!     swap x and y; l /= r, s *= r
//! ```
//!
//! Each value stands for the same one of [`WIDE`] lines: every step is one of vectors, whatever the length. Real lines of
//! even length are transformed as complex ones of half the length. A large prime factor r costs r operations per value.

use crate::naive::Number;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};
use core::array::from_fn;
use core::f64::consts::PI;

/// Lines that are transformed side by side.
const WIDE: usize = 4;

type Wide = [f64; WIDE];
type Complex = [Wide; 2];

#[inline(always)]
fn add(a: Complex, b: Complex) -> Complex {
    from_fn(|part| from_fn(|i| a[part][i] + b[part][i]))
}

#[inline(always)]
fn sub(a: Complex, b: Complex) -> Complex {
    from_fn(|part| from_fn(|i| a[part][i] - b[part][i]))
}

/// `a + i b`.
#[inline(always)]
fn add_i(a: Complex, b: Complex) -> Complex {
    [from_fn(|i| a[0][i] - b[1][i]), from_fn(|i| a[1][i] + b[0][i])]
}

/// `a - i b`.
#[inline(always)]
fn sub_i(a: Complex, b: Complex) -> Complex {
    [from_fn(|i| a[0][i] + b[1][i]), from_fn(|i| a[1][i] - b[0][i])]
}

#[inline(always)]
fn scale(a: Complex, w: f64) -> Complex {
    a.map(|part| part.map(|v| v * w))
}

#[inline(always)]
fn times(a: Complex, w: [f64; 2]) -> Complex {
    [from_fn(|i| a[0][i] * w[0] - a[1][i] * w[1]), from_fn(|i| a[0][i] * w[1] + a[1][i] * w[0])]
}

/// Where the lines of a tensor lie. Line `i` begins at `i / per_outer * outer + i % per_outer * inner`.
#[derive(Clone, Copy, Debug)]
pub struct Lines {
    /// Lines within a step of `outer`.
    pub per_outer: usize,
    /// Step between groups of lines.
    pub outer: usize,
    /// Step between lines.
    pub inner: usize,
    /// Step between the values of a line.
    pub step: usize,
    /// Values of a line: of the operand, what follows counts as zero; of the result, the first ones are written.
    pub len: usize,
    /// 1 for real values, 2 for real parts with imaginary ones behind.
    pub parts: usize,
}

impl Lines {
    fn start(&self, line: usize) -> usize {
        line / self.per_outer * self.outer + line % self.per_outer * self.inner
    }
}

/// An element type of signals.
pub trait Real: Number {
    /// Transforms `lines` lines of `x`, each weighted by `window`, into those of `y`.
    ///
    /// # Panics
    /// If lines lie outside of the slices, or the window is shorter than the transform.
    fn transform(
        cx: &Cx<'_>,
        t: &Transform,
        lines: usize,
        x: (&[Self], Lines),
        window: Option<&[Self]>,
        y: (&mut [Self], Lines),
    );
}

// Not the generic function itself, so that it is compiled here, for speed.
macro_rules! reals {
    ($($t:ty)*) => { $(impl Real for $t {
        fn transform(
            cx: &Cx<'_>,
            t: &Transform,
            lines: usize,
            x: (&[Self], Lines),
            window: Option<&[Self]>,
            y: (&mut [Self], Lines),
        ) {
            transform(cx, t, lines, x, window, y);
        }
    })* };
}
reals! { f32 f64 }

/// How lines of one length are transformed.
#[derive(Debug)]
pub struct Transform {
    n: usize,
    /// Back from frequencies, with a factor of 1/n.
    inverse: bool,
    /// The operand is the first half of a spectrum whose second half are its conjugates.
    mirrored: bool,
    /// Even values are taken for real parts and odd ones for imaginary parts of a line of half the length.
    halved: bool,
    /// `exp(-2 pi i k / n)`.
    roots: Vec<[f64; 2]>,
    radices: Vec<usize>,
}

impl Transform {
    /// Of lines of length `n` whose values have `parts`. With `onesided` an inverse transform reads half a spectrum.
    pub fn new(n: usize, parts: usize, inverse: bool, onesided: bool) -> Self {
        let halved = parts == 1 && !inverse && n > 0 && n.is_multiple_of(2);
        let mut radices = Vec::new();
        let mut rest = if halved { n / 2 } else { n };
        let mut radix = 4;
        while rest > 1 {
            if rest.is_multiple_of(radix) {
                radices.push(radix);
                rest /= radix;
            } else {
                // What has no divisor up to its root is prime.
                radix = match radix {
                    4 => 2,
                    2 => 3,
                    r if r * r > rest => rest,
                    r => r + 2,
                };
            }
        }
        let root = |k: usize| {
            let (sin, cos) = (-2.0 * PI * k as f64 / n as f64).sin_cos();
            [cos, sin]
        };
        Self { n, inverse, mirrored: inverse && onesided, halved, roots: (0..n).map(root).collect(), radices }
    }

    fn core_len(&self) -> usize {
        if self.halved { self.n / 2 } else { self.n }
    }
}

fn transform<T: Number>(
    cx: &Cx<'_>,
    t: &Transform,
    lines: usize,
    x: (&[T], Lines),
    window: Option<&[T]>,
    y: (&mut [T], Lines),
) {
    let window = window.map(|w| &w[..t.n]);
    let stride = t.core_len() + 1;
    let to = DisjointMut::new(y.0);
    let floats = 2 * stride * size_of::<Complex>() / size_of::<f32>();
    let cost = lines * t.n * (8 + t.radices.iter().sum::<usize>());
    cx.for_each_scratch(lines.div_ceil(WIDE), cost as u64, floats, &|task, scratch| {
        let (a, b) = bytemuck::cast_slice_mut(scratch).split_at_mut(stride);
        let first = task * WIDE;
        gather(t, x.0, &x.1, from_fn(|i| x.1.start((first + i).min(lines - 1))), window, a);
        let spectrum = dispatch(cx.isa(), Stages { t, x: a, y: b });
        for lane in 0..WIDE.min(lines - first) {
            let start = y.1.start(first + lane);
            for k in 0..y.1.len {
                // SAFETY: each line has its own values.
                let y = unsafe { to.range(start + k * y.1.step, y.1.parts) };
                // The spectrum of a real line is the conjugate of itself reversed.
                let conjugate = t.halved && 2 * k > t.n;
                let v = spectrum[if conjugate { t.n - k } else { k }].map(|part| part[lane]);
                let v = match (t.inverse, conjugate) {
                    // Operand and result with parts swapped: the transform back.
                    (true, _) => [v[1] / t.n as f64, v[0] / t.n as f64],
                    (false, true) => [v[0], -v[1]],
                    (false, false) => v,
                };
                y.iter_mut().zip(v).for_each(|(y, v)| *y = T::from_f64(v));
            }
        }
    });
}

/// The values of the lines that begin at `starts`.
fn gather<T: Number>(
    t: &Transform,
    x: &[T],
    from: &Lines,
    starts: [usize; WIDE],
    window: Option<&[T]>,
    to: &mut [Complex],
) {
    let rows = starts.map(|start| &x[start..]);
    for k in 0..t.n {
        let mirrored = t.mirrored && 2 * k > t.n;
        let at = if mirrored { t.n - k } else { k };
        let weight = window.map_or(1.0, |w| w[k].to_f64());
        let part = |part: usize| {
            let at = at * from.step + part;
            rows.map(|row| row[at].to_f64() * weight)
        };
        let mut v = [[0.0; WIDE]; 2];
        if at < from.len {
            v[0] = part(0);
            if from.parts == 2 {
                v[1] = part(1);
            }
        }
        if t.halved {
            to[k / 2][k % 2] = v[0];
        } else {
            if mirrored {
                v[1] = v[1].map(|v| -v);
            }
            to[k] = if t.inverse { [v[1], v[0]] } else { v };
        }
    }
}

/// All stages of a transform of `x`; the result is there or in `y`.
struct Stages<'a> {
    t: &'a Transform,
    x: &'a mut [Complex],
    y: &'a mut [Complex],
}

impl<'a> Kernel for Stages<'a> {
    type Output = &'a [Complex];

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, _: S) -> &'a [Complex] {
        let Self { t, mut x, mut y } = self;
        let n = t.core_len();
        let (mut l, mut s) = (n, 1);
        for &r in &t.radices {
            let m = l / r;
            // The roots of l are every so many of those of the table.
            let step = t.n / l;
            match r {
                4 => {
                    for p in 0..m {
                        let w = [1, 2, 3].map(|k| t.roots[p * k * step]);
                        let row = |j: usize| s * (p + m * j)..s * (p + m * j) + s;
                        let x = [0, 1, 2, 3].map(|j| &x[row(j)]);
                        let (y0, rest) = y[4 * p * s..][..4 * s].split_at_mut(s);
                        let (y1, rest) = rest.split_at_mut(s);
                        let (y2, y3) = rest.split_at_mut(s);
                        for q in 0..s {
                            let (a, b, c, d) = (x[0][q], x[1][q], x[2][q], x[3][q]);
                            let (even, odd) = (add(a, c), add(b, d));
                            let (across, turned) = (sub(a, c), sub(b, d));
                            y0[q] = add(even, odd);
                            y1[q] = times(sub_i(across, turned), w[0]);
                            y2[q] = times(sub(even, odd), w[1]);
                            y3[q] = times(add_i(across, turned), w[2]);
                        }
                    }
                }
                2 => {
                    for p in 0..m {
                        let w = t.roots[p * step];
                        for q in 0..s {
                            let (a, b) = (x[q + s * p], x[q + s * (p + m)]);
                            y[q + s * 2 * p] = add(a, b);
                            y[q + s * (2 * p + 1)] = times(sub(a, b), w);
                        }
                    }
                }
                _ => {
                    for p in 0..m {
                        for q in 0..s {
                            odd_radix(t, r, &mut x[q + s * p..], s * m, &mut y[q + s * r * p..], s, p * step);
                        }
                    }
                }
            }
            core::mem::swap(&mut x, &mut y);
            (l, s) = (m, s * r);
        }
        if !t.halved {
            return x;
        }
        // With the spectra E and O of the even and the odd values, the line of half the length has E + i O, and the
        // conjugate of its reverse is E - i O. The result is E + root O.
        for k in 0..=n {
            let (a, [re, im]) = (x[k % n], x[(n - k) % n]);
            let b = [re, im.map(|v| -v)];
            let odd = times(sub(a, b), t.roots[k]);
            y[k] = scale(sub_i(add(a, b), odd), 0.5);
        }
        y
    }
}

/// The values `y[k * to]` for `k < r`, of `x[j * from]` for `j < r`, which are lost. Those `j` and `r - j` have conjugate
/// roots, so that sums and differences of the two are multiplied by real numbers.
#[inline(always)]
fn odd_radix(t: &Transform, r: usize, x: &mut [Complex], from: usize, y: &mut [Complex], to: usize, twiddle: usize) {
    let first = x[0];
    let mut total = first;
    for j in 1..=r / 2 {
        let (a, b) = (x[j * from], x[(r - j) * from]);
        x[j * from] = add(a, b);
        x[(r - j) * from] = sub(a, b);
        total = add(total, x[j * from]);
    }
    y[0] = total;
    let step = t.n / r;
    for k in 1..=r / 2 {
        let (mut even, mut odd) = (first, [[0.0; WIDE]; 2]);
        let mut index = 0;
        for j in 1..=r / 2 {
            index = if index + k < r { index + k } else { index + k - r };
            let w = t.roots[index * step];
            even = add(even, scale(x[j * from], w[0]));
            odd = add(odd, scale(x[(r - j) * from], w[1]));
        }
        y[k * to] = times(add_i(even, odd), t.roots[k * twiddle]);
        y[(r - k) * to] = times(sub_i(even, odd), t.roots[(r - k) * twiddle]);
    }
}

/// Triangular filters on the mel scale: `[length / 2 + 1, bins]`, as ONNX's MelWeightMatrix defines them; `None` if an
/// edge lies outside of the spectrum.
pub fn mel_weights(bins: usize, length: usize, rate: f64, low: f64, high: f64) -> Option<Vec<f64>> {
    let rows = length / 2 + 1;
    let mel = |hertz: f64| 2595.0 * (hertz / 700.0).ln_1p() / 10f64.ln();
    let step = (mel(high) - mel(low)) / (bins + 2) as f64;
    let edge = |i: usize| {
        let hertz = 700.0 * ((i as f64 * step + mel(low)) / 2595.0 * 10f64.ln()).exp_m1();
        let at = ((length + 1) as f64 * hertz / rate).floor();
        (at >= 0.0 && at < rows as f64).then_some(at as usize)
    };
    let mut out = vec![0.0; rows * bins];
    for i in 0..bins {
        let (left, centre, right) = (edge(i)?, edge(i + 1)?, edge(i + 2)?);
        if left == centre {
            out[centre * bins + i] = 1.0;
        }
        for j in left..=centre {
            if centre > left {
                out[j * bins + i] = (j - left) as f64 / (centre - left) as f64;
            }
        }
        for j in centre..right {
            out[j * bins + i] = (right - j) as f64 / (right - centre) as f64;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{each_context, integers};

    /// The defining sum.
    fn sum(x: &[[f64; 2]], sign: f64) -> Vec<[f64; 2]> {
        let n = x.len();
        let term = |k: usize, j: usize| {
            let (sin, cos) = (sign * 2.0 * PI * (j * k % n) as f64 / n as f64).sin_cos();
            [x[j][0] * cos - x[j][1] * sin, x[j][0] * sin + x[j][1] * cos]
        };
        (0..n).map(|k| (0..n).map(|j| term(k, j)).fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]])).collect()
    }

    /// Lines one behind the other.
    fn dense(len: usize, parts: usize) -> Lines {
        Lines { per_outer: 1, outer: len * parts, inner: 0, step: parts, len, parts }
    }

    fn near(got: &[f64], want: &[f64], what: &str) {
        assert_eq!(got.len(), want.len());
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() < 1e-9, "{what} {i}: {g} for {w}");
        }
    }

    #[test]
    fn every_length_matches_the_sum_and_comes_back() {
        for n in (1..=50).chain([64, 98, 121, 128, 400, 480, 512]) {
            let lines = 5;
            let x: Vec<f64> = integers(lines * n * 2, n as u32).into_iter().map(f64::from).collect();
            let pairs: &[[f64; 2]] = bytemuck::cast_slice(&x);
            let want: Vec<f64> = pairs.chunks(n).flat_map(|x| sum(x, -1.0)).flatten().collect();
            each_context(|cx| {
                let what = format!("{} {n}", cx.isa());
                let (mut y, mut back) = (vec![f64::NAN; x.len()], vec![f64::NAN; x.len()]);
                let l = dense(n, 2);
                f64::transform(cx, &Transform::new(n, 2, false, false), lines, (&x, l), None, (&mut y, l));
                near(&y, &want, &what);
                f64::transform(cx, &Transform::new(n, 2, true, false), lines, (&y, l), None, (&mut back, l));
                near(&back, &x, &what);
            });
        }
    }

    #[test]
    fn real_lines_and_half_spectra() {
        for n in 1..=20 {
            let x: Vec<f64> = integers(6 * n, n as u32).into_iter().map(f64::from).collect();
            let window: Vec<f64> = (0..n).map(|k| 1.0 + k as f64 / 8.0).collect();
            // Two groups of three lines whose values lie three apart.
            let lines =
                |len, parts| Lines { per_outer: 3, outer: 3 * len * parts, inner: parts, step: 3 * parts, len, parts };
            let line = |i: usize| (0..n).map(move |k| (i / 3 * n + k) * 3 + i % 3);
            each_context(|cx| {
                let half = n / 2 + 1;
                let (mut whole, mut y) = (vec![f64::NAN; 12 * n], vec![f64::NAN; 12 * half]);
                let t = Transform::new(n, 1, false, true);
                f64::transform(cx, &t, 6, (&x, lines(n, 1)), Some(&window), (&mut whole, lines(n, 2)));
                f64::transform(cx, &t, 6, (&x, lines(n, 1)), Some(&window), (&mut y, lines(half, 2)));
                for i in 0..6 {
                    let weighted: Vec<_> = line(i).zip(&window).map(|(at, w)| [x[at] * w, 0.0]).collect();
                    let want = sum(&weighted, -1.0);
                    let got: Vec<_> = line(i).map(|at| [whole[2 * at], whole[2 * at + 1]]).collect();
                    near(got.as_flattened(), want.as_flattened(), &format!("{} {n} {i}", cx.isa()));
                }
                let mut back = vec![f64::NAN; 6 * n];
                let t = Transform::new(n, 2, true, true);
                f64::transform(cx, &t, 6, (&y, lines(half, 2)), None, (&mut back, lines(n, 1)));
                for i in 0..6 {
                    let (got, want): (Vec<_>, Vec<_>) =
                        line(i).zip(&window).map(|(at, w)| (back[at], x[at] * w)).unzip();
                    near(&got, &want, &format!("back {} {n} {i}", cx.isa()));
                }
            });
        }
    }

    #[test]
    fn short_operands_are_followed_by_zeros() {
        let x = integers(6, 1);
        let padded: Vec<f32> = [&x[..3], &[0.0; 3], &x[3..], &[0.0; 3]].concat();
        each_context(|cx| {
            let (mut y, mut want) = ([f32::NAN; 24], [f32::NAN; 24]);
            let t = Transform::new(6, 1, false, false);
            f32::transform(cx, &t, 2, (&x, dense(3, 1)), None, (&mut y, dense(6, 2)));
            f32::transform(cx, &t, 2, (&padded, dense(6, 1)), None, (&mut want, dense(6, 2)));
            assert_eq!(y, want);
        });
    }

    #[test]
    fn filters_rise_and_fall() {
        let w = mel_weights(4, 64, 8192.0, 0.0, 4096.0).unwrap();
        assert_eq!(w.len(), 33 * 4);
        assert!(w.iter().all(|v| (0.0..=1.0).contains(v)) && w.contains(&1.0));
        assert!(mel_weights(4, 64, 8192.0, 0.0, 40960.0).is_none());
    }
}
