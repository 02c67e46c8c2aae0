//! Transcendental functions on vectors.
//!
//! Each is one generic function: the formula, where it comes from, the error as measured. "ULP" is the distance to the
//! true value in units of the last place of the nearest `f32`, the largest over every 251st `f32` (17 million values) and
//! all instruction sets; the tests assert these bounds, with a stride that takes less time. NaN gives NaN everywhere, and
//! infinities and zeros give the limits that the formula has there.

use crate::simd::{Simd, constants};

/// `c[0] * x^(n-1) + ... + c[n-1]` by Horner's rule.
#[inline(always)]
fn poly<S: Simd, const N: usize>(s: S, x: S::F32, c: &[f32; N]) -> S::F32 {
    let mut sum = s.splat(c[0]);
    // Not an iterator with a closure: nothing may escape inlining.
    let mut i = 1;
    while i < N {
        sum = s.mul_add(sum, x, s.splat(c[i]));
        i += 1;
    }
    sum
}

/// `c[i] + c[i + 1] x`: two terms of Estrin's scheme.
#[inline(always)]
fn pair<S: Simd, const N: usize>(s: S, x: S::F32, c: &[f32; N], i: usize) -> S::F32 {
    s.mul_add(x, s.splat(c[i + 1]), s.splat(c[i]))
}

/// `x` where it is NaN, `y` elsewhere: the fast minimum and maximum that clamp arguments may lose NaN.
#[inline(always)]
fn keep_nan<S: Simd>(s: S, x: S::F32, y: S::F32) -> S::F32 {
    s.select(s.eq(x, x), y, x)
}

/// `|x|` with the sign of `sign`.
#[inline(always)]
fn with_sign<S: Simd>(s: S, x: S::F32, sign: S::F32) -> S::F32 {
    let minus = s.splat_i32(i32::MIN);
    s.from_bits(s.or_i32(s.bits(s.abs(x)), s.and_i32(s.bits(sign), minus)))
}

/// Adding it leaves the nearest whole number in the low bits of the sum, for numbers up to 2^22 and of either sign.
const ROUND: f32 = 12_582_912.0;

/// `2^n` for whole `-126 <= n <= 127`, given the bits of `n + ROUND`; 0 for -127 and infinity for 128. `one` is 1, from
/// memory.
#[inline(always)]
fn exp2i<S: Simd>(s: S, bits: S::I32, one: f32) -> S::F32 {
    // The bits of ROUND itself are shifted out.
    s.from_bits(s.add_i32(s.shl_i32::<23>(bits), s.bits(s.splat(one))))
}

/// `e^x`, within 1.0 ULP, denormal results included.
///
/// `x = n ln 2 + r` with `|r| <= ln(2)/2` (Cody and Waite: ln 2 in two parts, the first short enough that its product with
/// n is exact), `e^r` by a polynomial of degree 7, and `2^n` by the exponent bits, in two factors since n may be as low
/// as -151 and as high as 128. Polynomial: S. L. Moshier, Cephes, `expf.c`.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // Beyond these the result is 0 or infinity.
    let c = constants![-104.5, 89.0, core::f32::consts::LOG2_E, ROUND, -0.693_359_4, 2.121_944_4e-4, 1.0];
    let clamped = s.at_most(s.at_least(x, s.splat(c[0])), s.splat(c[1]));
    let shifted = s.mul_add(clamped, s.splat(c[2]), s.splat(c[3]));
    let n = s.sub(shifted, s.splat(c[3]));
    let r = s.mul_add(n, s.splat(c[4]), clamped);
    let r = s.mul_add(n, s.splat(c[5]), r);
    let p = poly(s, r, constants![1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1]);
    let p = s.add(s.mul_add(p, s.mul(r, r), r), s.splat(c[6]));
    let bits = s.bits(shifted);
    let half = s.shr_i32::<1>(bits);
    s.mul(s.mul(p, exp2i(s, half, c[6])), exp2i(s, s.sub_i32(bits, half), c[6]))
}

/// `e^-x` for `-89 <= x <= 88` as a number near 1 and a power of two, which is 0 from 87.7 and infinity below -88.4.
///
/// As [`exp`] with less to do: one power of two, and a polynomial of degree 6 (minimax of the relative error, 2e-9).
#[inline(always)]
fn exp_minus_parts<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32) {
    let c = constants![-core::f32::consts::LOG2_E, ROUND, 0.693_359_4, -2.121_944_4e-4, 1.0];
    let shifted = s.mul_add(x, s.splat(c[0]), s.splat(c[1]));
    let n = s.sub(shifted, s.splat(c[1]));
    let r = s.mul_add(n, s.splat(c[2]), x);
    let r = s.mul_add(n, s.splat(c[3]), r);
    let p = poly(s, r, constants![1.383_679_2e-3, -8.374_858e-3, 4.166_823e-2, -1.666_642e-1, 4.999_999e-1, -1.0, 1.0]);
    (p, exp2i(s, s.bits(shifted), c[4]))
}

/// `e^-x` for `x >= 0`, within 1.3 ULP; 0 for results below 1e-38.
///
/// For softmax, where every argument is a distance from the maximum: half the work of [`exp`].
#[inline(always)]
pub fn exp_minus<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (p, scale) = exp_minus_parts(s, s.at_most(x, s.splat(88.0)));
    s.mul(p, scale)
}

/// `y / (1 + e^-x)`; 0 for x below -88.4 and finite y.
#[inline(always)]
fn gate<S: Simd>(s: S, x: S::F32, y: S::F32) -> S::F32 {
    let [lo, hi, one] = *constants![-89.0, 87.0, 1.0];
    let (p, scale) = exp_minus_parts(s, s.at_most(s.at_least(x, s.splat(lo)), s.splat(hi)));
    s.div(y, s.mul_add(p, scale, s.splat(one)))
}

/// Natural logarithm, within 0.8 ULP; -infinity at 0, NaN below.
///
/// `x = 2^e (1 + f)` with `sqrt(1/2) <= 1 + f < sqrt(2)`; `log(1 + f) = f - f^2/2 + f^3 p(f)`.
/// Polynomial: S. L. Moshier, Cephes, `logf.c`.
#[inline(always)]
pub fn log<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let one = s.splat(1.0);
    // Denormals are scaled to normal numbers first.
    let tiny = s.lt(x, s.splat(f32::MIN_POSITIVE));
    let scaled = s.select(tiny, s.mul(x, s.splat(8_388_608.0)), x);
    let bits = s.bits(scaled);
    // Subtracting the bits of sqrt(1/2) makes the exponent field count from there.
    let offset = s.splat_i32(0x3f35_04f3);
    let from_root = s.sub_i32(bits, offset);
    let e = s.shr_i32::<23>(from_root);
    let m = s.from_bits(s.add_i32(s.and_i32(from_root, s.splat_i32(0x007f_ffff)), offset));
    let e = s.sub(s.to_f32(e), s.select(tiny, s.splat(23.0), s.splat(0.0)));
    let f = s.sub(m, one);
    let p = poly(
        s,
        f,
        constants![
            7.037_683_6e-2,
            -1.151_461e-1,
            1.167_699_9e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ],
    );
    let ff = s.mul(f, f);
    let y = s.mul(s.mul(p, f), ff);
    let y = s.mul_add(e, s.splat(-2.121_944_4e-4), y);
    let y = s.mul_add(ff, s.splat(-0.5), y);
    let y = s.mul_add(e, s.splat(0.693_359_4), s.add(f, y));
    // What the bits cannot say: 0, negative numbers, infinity and NaN.
    let y = s.select(s.lt(x, s.splat(f32::INFINITY)), y, x);
    let y = s.select(s.lt(x, s.splat(0.0)), s.splat(f32::NAN), y);
    s.select(s.eq(x, s.splat(0.0)), s.splat(f32::NEG_INFINITY), y)
}

/// `log(1 + x)` for `x >= 0`, within 1.2 ULP.
///
/// The rounding error of `u = 1 + x` is put back to first order: `log(u) + (x - (u - 1)) / u`.
#[inline(always)]
pub fn log1p_positive<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let u = s.add(s.splat(1.0), x);
    let lost = s.sub(x, s.sub(u, s.splat(1.0)));
    let y = s.add(log(s, u), s.div(lost, u));
    // inf - inf above.
    s.select(s.lt(x, s.splat(f32::INFINITY)), y, x)
}

/// Hyperbolic tangent, within 6 ULP (4.6 with fused multiply-add).
///
/// A quotient of polynomials, odd of degree 13 over even of degree 6, in the range where the result is not +-1. The
/// coefficients are those of Eigen, `generic_fast_tanh_float`.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    const LIMIT: f32 = 7.905_311;
    let c = s.min_fast(s.max_fast(x, s.splat(-LIMIT)), s.splat(LIMIT));
    let cc = s.mul(c, c);
    let p = poly(
        s,
        cc,
        constants![
            -2.760_768_6e-16,
            2.000_188e-13,
            -8.604_672e-11,
            5.122_297e-8,
            1.485_722_4e-5,
            6.372_619e-4,
            4.893_524_6e-3
        ],
    );
    let q = poly(s, cc, constants![1.198_258_4e-6, 1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3]);
    let y = s.div(s.mul(c, p), q);
    // Next to zero tanh(x) = x to the last bit (and -0 stays -0).
    let y = s.select(s.lt(s.abs(x), s.splat(4e-4)), x, y);
    keep_nan(s, x, y)
}

/// `1 / (1 + e^-x)`, within 2.3 ULP; 0 for results below 1.2e-38, the smallest normal number.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F32) -> S::F32 {
    gate(s, x, s.splat(1.0))
}

/// Error function, within 1.2 ULP.
///
/// Near zero `x + x p(x^2)`, farther out `1 - e^q(|x|)`. Coefficients: N. Juffa, "my_erff", in answer to "Efficient
/// faithfully rounded implementation of error function erff()" on Stack Overflow.
#[inline(always)]
pub fn erf<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let xx = s.mul(x, x);
    let near = poly(
        s,
        xx,
        constants![-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1],
    );
    let near = s.mul_add(near, x, x);
    // From 3.92 on the result is 1; the limit also keeps the polynomial where it was fitted.
    let t = s.min_fast(s.abs(x), s.splat(4.0));
    let far = poly(
        s,
        t,
        constants![
            -1.728_534_7e-5,
            3.831_971_3e-4,
            -3.883_964_4e-3,
            2.425_462_2e-2,
            -1.067_778_8e-1,
            -6.348_467e-1,
            -1.287_175_1e-1,
        ],
    );
    let far = s.sub(s.splat(1.0), exp(s, s.sub(s.mul(far, t), t)));
    let y = s.select(s.lt(s.abs(x), s.splat(0.921_875)), near, with_sign(s, far, x));
    keep_nan(s, x, y)
}

/// `e^x - 1` for `x <= 0`, within 6 ULP.
///
/// `2t / (1 - t)` with `t = tanh(x/2)`, which keeps small x accurate.
#[inline(always)]
pub fn expm1_negative<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let t = tanh(s, s.mul(x, s.splat(0.5)));
    s.div(s.add(t, t), s.sub(s.splat(1.0), t))
}

/// `x * sigmoid(x)`, within 3.2 ULP where the result is above 1e-35, and within 1e-36 elsewhere; 0 at -infinity.
///
/// As `x / (1 + e^-x)`: where the power overflows the quotient is 0, which it is to 4e-37.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let [lo, hi, one] = *constants![-89.0, 87.0, 1.0];
    // From there down the power is infinite. The limit keeps -inf / inf out.
    let x = s.at_least(x, s.splat(lo));
    let (p, scale) = exp_minus_parts(s, s.at_most(x, s.splat(hi)));
    s.div(x, s.mul_add(p, scale, s.splat(one)))
}

/// `x/2 * (1 + erf(x / sqrt 2))`, within 2e-7 of it relative to `max(|x|, 1)`; less than 1e-14 from 0 below -8.
///
/// As `max(x, 0) - |x| 2^q(|x|)`, where `q(t)` is the logarithm of the normal distribution's tail, `erfc(t / sqrt 2) / 2`:
/// one power of two for both signs, no branch near zero, and no cancellation in the left tail. `q` has degree 9 (minimax
/// of the result's error up to 8, with `q(0) = -1`, which keeps small x accurate), `2^r` has degree 5 (minimax of the
/// relative error, 8e-8).
///
/// Both polynomials by Estrin's scheme: with Horner's rule a result takes 22 operations that wait for each other, more than
/// a processor finds other vectors to fill.
#[inline(always)]
pub fn gelu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let t = s.at_most(s.abs(x), s.splat(8.0));
    // In ascending order.
    let c = constants![
        -1.0,
        -1.151_106_7,
        -4.591_977_3e-1,
        -5.251_783_5e-2,
        7.074_508e-3,
        -1.222_142_9e-4,
        -2.083_640_3e-4,
        5.085_306e-5,
        -5.503_968e-6,
        2.338_645e-7,
    ];
    let tt = s.mul(t, t);
    let tttt = s.mul(tt, tt);
    let low = s.mul_add(tt, pair(s, t, c, 2), pair(s, t, c, 0));
    let high = s.mul_add(tt, pair(s, t, c, 6), pair(s, t, c, 4));
    let q = s.mul_add(s.mul(tttt, tttt), pair(s, t, c, 8), s.mul_add(tttt, high, low));
    let [round, one] = *constants![ROUND, 1.0];
    let round = s.splat(round);
    let shifted = s.add(q, round);
    let r = s.sub(q, s.sub(shifted, round));
    let c = constants![1.000_000_1, 6.931_469_4e-1, 2.402_211_9e-1, 5.550_714e-2, 9.675_599e-3, 1.327_641_3e-3];
    let rr = s.mul(r, r);
    let high = s.mul_add(rr, pair(s, r, c, 4), pair(s, r, c, 2));
    let p = s.mul_add(rr, high, pair(s, r, c, 0));
    let tail = s.mul(s.mul(t, p), exp2i(s, s.bits(shifted), one));
    s.sub(s.at_least(x, s.splat(0.0)), tail)
}

/// `x/2 * (1 + tanh(u))` with `u = sqrt(2/pi) (x + 0.044715 x^3)`, within 2e-7 of it relative to `max(|x|, 1)`; 0 at
/// -infinity.
///
/// Computed as `x / (1 + e^-2u)`, the same by algebra and without cancellation.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // 2 sqrt(2/pi), and times 0.044715; the limit keeps -inf / inf out.
    let [a, b, lo] = *constants![1.595_769_2, 0.071_354_82, -100.0];
    let limited = s.at_least(x, s.splat(lo));
    let u = s.mul(limited, s.mul_add(s.mul(limited, limited), s.splat(b), s.splat(a)));
    gate(s, u, limited)
}

/// `log(1 + e^x)`, within 2.0 ULP.
///
/// As `max(x, 0) + log(1 + e^-|x|)`, which neither overflows nor loses the tail.
#[inline(always)]
pub fn softplus<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let tail = log1p_positive(s, exp(s, s.neg(s.abs(x))));
    keep_nan(s, x, s.add(s.max_fast(x, s.splat(0.0)), tail))
}

/// `x * tanh(softplus(x))`, within 4.2 ULP where the result is above 1e-35; 0 at -infinity.
///
/// With `w = e^x` the hyperbolic tangent of the logarithm is `w (w + 2) / (w (w + 2) + 2)`.
#[inline(always)]
pub fn mish<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // Above 20 the quotient is 1; below -200 there is nothing but zero.
    let w = exp(s, s.min_fast(x, s.splat(20.0)));
    let n = s.mul(w, s.add(w, s.splat(2.0)));
    let y = s.mul(s.max_fast(x, s.splat(-200.0)), s.div(n, s.add(n, s.splat(2.0))));
    keep_nan(s, x, y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, Kernel, dispatch};

    /// Every how many bit patterns; a prime, so that all mantissa endings come up. The documented bounds were measured
    /// with 251.
    const STRIDE: usize = 4093;

    fn inputs(keep: impl Fn(f32) -> bool) -> Vec<f32> {
        let special =
            [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1.0];
        let edges = [88.722_84f32, 88.722_8, -87.336_54, -103.278_93, -103.972_08, -104.0, 7.905_311, 4e-4, 0.921_875];
        special
            .into_iter()
            .chain(edges.into_iter().flat_map(|x| [x, -x, x.next_up(), x.next_down()]))
            .chain((0..=u32::MAX).step_by(STRIDE).map(f32::from_bits))
            .filter(|&x| keep(x))
            .collect()
    }

    /// Distance to the true value in units of its last place.
    fn ulp(got: f32, want: f64) -> f64 {
        let nearest = want as f32;
        if got.to_bits() == nearest.to_bits() || (got.is_nan() && nearest.is_nan()) {
            return 0.0;
        }
        let finite = nearest.abs().min(f32::MAX);
        let unit = f64::from(finite) - f64::from(finite.next_down());
        // Beyond the largest number the scale goes on as if there were one more exponent.
        let got = if got.is_infinite() { f64::from(got.signum()) * 2f64.powi(128) } else { f64::from(got) };
        let want = want.clamp(-(2f64.powi(128)), 2f64.powi(128));
        (got - want).abs() / unit.max(2f64.powi(-149))
    }

    macro_rules! check {
        ($name:ident, $reference:expr, $keep:expr, ulp $bound:expr) => {
            check!($name, $reference, $keep, |got, _x, want| ulp(got, want), $bound);
        };
        ($name:ident, $reference:expr, $keep:expr, $error:expr, $bound:expr) => {
            #[test]
            fn $name() {
                struct Run<'a>(&'a mut [f32]);
                impl Kernel for Run<'_> {
                    type Output = ();
                    #[inline(always)]
                    fn run<S: Simd>(self, s: S) {
                        for part in self.0.chunks_mut(S::LANES) {
                            s.store_partial(part, super::$name(s, s.load_partial(part)));
                        }
                    }
                }
                let reference: fn(f64) -> f64 = $reference;
                let error: fn(f32, f32, f64) -> f64 = $error;
                let x = inputs($keep);
                let want: Vec<f64> = x.iter().map(|&x| reference(f64::from(x))).collect();
                for isa in Isa::available() {
                    let mut got = x.clone();
                    dispatch(isa, Run(&mut got));
                    let (mut worst, mut at) = (0.0, 0.0);
                    for ((&x, &got), &want) in x.iter().zip(&got).zip(&want) {
                        let e = error(got, x, want);
                        if e > worst || e.is_nan() {
                            (worst, at) = (e, x);
                        }
                        assert!(e <= $bound, "{isa} {}({x:e}) = {got:e}, want {want:e}: {e}", stringify!($name));
                    }
                    eprintln!("{isa} {}: at most {worst:.3e} at {at:e}", stringify!($name));
                }
            }
        };
    }

    /// Error relative to `max(|x|, 1)`, for functions with a cancelling tail.
    fn scaled(got: f32, x: f32, want: f64) -> f64 {
        if got.is_nan() && want.is_nan() || got == want as f32 {
            return 0.0;
        }
        (f64::from(got) - want).abs() / f64::from(x.abs().max(1.0))
    }

    /// ULP, except where the product has a denormal factor.
    fn ulp_or_tiny(got: f32, _: f32, want: f64) -> f64 {
        if want.abs() < 1e-35 && (f64::from(got) - want).abs() < 1e-42 { 0.0 } else { ulp(got, want) }
    }

    /// ULP; results smaller than a limit may be anything between 0 and themselves.
    fn ulp_above(limit: f64, got: f32, want: f64) -> f64 {
        let (got64, tiny) = (f64::from(got), want.abs() < limit);
        if tiny && got64 * want >= 0.0 && got64.abs() <= want.abs() * 1.000_001 { 0.0 } else { ulp(got, want) }
    }

    fn sigmoid64(x: f64) -> f64 {
        let e = (-x.abs()).exp();
        (if x < 0.0 { e } else { 1.0 }) / (1.0 + e)
    }
    fn softplus64(x: f64) -> f64 {
        x.max(0.0) + (-x.abs()).exp().ln_1p() + if x.is_nan() { x } else { 0.0 }
    }
    /// `x * f(x)` with the limit 0 at -infinity.
    fn gated(x: f64, gate: f64) -> f64 {
        if x == f64::NEG_INFINITY { 0.0 } else { x * gate }
    }

    check!(exp, f64::exp, |_| true, ulp 1.0);
    check!(log, f64::ln, |_| true, ulp 0.8);
    check!(log1p_positive, f64::ln_1p, |x| x >= 0.0 || x.is_nan(), ulp 1.2);
    check!(tanh, f64::tanh, |_| true, ulp 6.0);
    check!(exp_minus, |x| (-x).exp(), |x| x >= 0.0 || x.is_nan(), |got, _, want| ulp_above(1e-38, got, want), 1.3);
    check!(sigmoid, sigmoid64, |_| true, |got, _, want| ulp_above(f64::from(f32::MIN_POSITIVE), got, want), 2.3);
    check!(erf, libm::erf, |_| true, ulp 1.2);
    check!(expm1_negative, f64::exp_m1, |x| x <= 0.0 || x.is_nan(), ulp 6.0);
    check!(silu, |x| gated(x, sigmoid64(x)), |_| true, |got, _, want| ulp_above(1e-36, got, want), 3.2);
    check!(softplus, softplus64, |_| true, ulp 2.0);
    check!(mish, |x| gated(x, softplus64(x).tanh()), |_| true, ulp_or_tiny, 4.2);
    check!(gelu, |x| gated(x, 0.5 * libm::erfc(-x / 2f64.sqrt())), |_| true, scaled, 2e-7);
    check!(
        gelu_tanh,
        |x| {
            let x = if x < -1e30 { -1e30 } else { x };
            gated(x, sigmoid64(2.0 * (2.0 / core::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)))
        },
        |_| true,
        scaled,
        2e-7
    );
}
