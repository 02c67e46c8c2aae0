//! Half-precision numbers to single precision and back.
//!
//! Integer arithmetic on vectors, one code for every instruction set (WebAssembly has no instructions for them); rounding
//! is to nearest, ties to even, as IEEE has it. NaN stays NaN, though its payload may not. Other casts need no kernel:
//! [`map`](crate::elementwise::map) with `as`, which truncates and saturates.

use crate::error::{Error, Result};
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements that make a task.
const TASK: usize = 16 * 1024;

/// `y = x`, exactly.
///
/// # Errors
/// If the lengths differ.
pub fn f16_to_f32(cx: &Cx<'_>, x: &[f16], y: &mut [f32]) -> Result<()> {
    widen::<Half>(cx, x.reinterpret_cast(), y)
}

/// `y = x`, rounded; beyond 65504 to infinity.
///
/// # Errors
/// If the lengths differ.
pub fn f32_to_f16(cx: &Cx<'_>, x: &[f32], y: &mut [f16]) -> Result<()> {
    narrow::<Half>(cx, x, y.reinterpret_cast_mut())
}

/// `y = x`, exactly.
///
/// # Errors
/// If the lengths differ.
pub fn bf16_to_f32(cx: &Cx<'_>, x: &[bf16], y: &mut [f32]) -> Result<()> {
    widen::<Brain>(cx, x.reinterpret_cast(), y)
}

/// `y = x`, rounded.
///
/// # Errors
/// If the lengths differ.
pub fn f32_to_bf16(cx: &Cx<'_>, x: &[f32], y: &mut [bf16]) -> Result<()> {
    narrow::<Brain>(cx, x, y.reinterpret_cast_mut())
}

/// A 16-bit format: its bits are the low halves of `i32` lanes.
trait Format {
    fn widen<S: Simd>(s: S, h: S::I32) -> S::F32;
    fn narrow<S: Simd>(s: S, x: S::F32) -> S::I32;
}

/// `a` where the mask is true, `b` elsewhere.
#[inline(always)]
fn select<S: Simd>(s: S, m: S::Mask, a: S::I32, b: S::I32) -> S::I32 {
    s.bits(s.select(m, s.from_bits(a), s.from_bits(b)))
}

/// IEEE binary16: 5 bits of exponent, 10 of mantissa.
struct Half;

impl Format for Half {
    /// The magnitude's bits move to where f32 has them and the exponent is rebiased by 127 - 15 (twice that for infinity
    /// and NaN, whose exponent is all ones in both). Denormals are whole multiples of 2^-24.
    #[inline(always)]
    fn widen<S: Simd>(s: S, h: S::I32) -> S::F32 {
        let rebias = s.splat_i32(112 << 23);
        let magnitude = s.and_i32(h, s.splat_i32(0x7fff));
        let sign = s.shl_i32::<16>(s.and_i32(h, s.splat_i32(0x8000)));
        let normal = s.add_i32(s.shl_i32::<13>(magnitude), rebias);
        let special = s.lt_i32(s.splat_i32(0x7bff), magnitude);
        let bits = select(s, special, s.add_i32(normal, rebias), normal);
        let denormal = s.mul(s.to_f32(magnitude), s.splat(1.0 / 16_777_216.0));
        let bits = select(s, s.lt_i32(magnitude, s.splat_i32(0x400)), s.bits(denormal), bits);
        s.from_bits(s.or_i32(bits, sign))
    }

    /// Rounding is left to one addition: to |x| is added a power of two chosen by x's exponent, such that the last bit of
    /// the sum is the last bit that fits into the result. M. Dukhan, FP16, `fp16_ieee_from_fp32_value`.
    #[inline(always)]
    fn narrow<S: Simd>(s: S, x: S::F32) -> S::I32 {
        let magnitude = s.abs(x);
        let bits = s.bits(magnitude);
        let sign = s.and_i32(s.shr_i32::<16>(s.bits(x)), s.splat_i32(0x8000));
        // 2^112 takes what is too large to infinity; together the factors are 4.
        let large = f32::from_bits((127 + 112) << 23);
        let small = f32::from_bits((127 - 110) << 23);
        let base = s.mul(s.mul(magnitude, s.splat(large)), s.splat(small));
        let exponent = s.and_i32(bits, s.splat_i32(0x7f80_0000));
        // The smallest normal exponent of f16: below it the spacing of results no longer shrinks.
        let least = s.splat_i32((127 - 14) << 23);
        let exponent = select(s, s.lt_i32(exponent, least), least, exponent);
        // 2^15 times the power of two that x begins with.
        let rounder = s.from_bits(s.add_i32(exponent, s.splat_i32(15 << 23)));
        let sum = s.bits(s.add(rounder, base));
        let rounded = s.add_i32(
            s.and_i32(s.shr_i32::<13>(sum), s.splat_i32(0x7c00)),
            // The sum carries the implicit bit and the carry of rounding into the exponent.
            s.and_i32(sum, s.splat_i32(0xfff)),
        );
        let nan = s.lt_i32(s.splat_i32(0x7f80_0000), bits);
        s.or_i32(select(s, nan, s.splat_i32(0x7e00), rounded), sign)
    }
}

/// bfloat16: the upper half of an f32.
struct Brain;

impl Format for Brain {
    #[inline(always)]
    fn widen<S: Simd>(s: S, h: S::I32) -> S::F32 {
        s.from_bits(s.shl_i32::<16>(h))
    }

    /// Adds just below half of the last place that stays, and one more if that place is odd.
    #[inline(always)]
    fn narrow<S: Simd>(s: S, x: S::F32) -> S::I32 {
        let bits = s.bits(x);
        let odd = s.and_i32(s.shr_i32::<16>(bits), s.splat_i32(1));
        let rounded = s.add_i32(bits, s.add_i32(odd, s.splat_i32(0x7fff)));
        // Rounding could turn NaN into infinity or zero: it gets the quiet bit instead.
        let nan = s.or_i32(bits, s.splat_i32(0x0040_0000));
        let bits = select(s, s.eq(x, x), rounded, nan);
        s.and_i32(s.shr_i32::<16>(bits), s.splat_i32(0xffff))
    }
}

fn widen<F: Format>(cx: &Cx<'_>, x: &[u16], y: &mut [f32]) -> Result<()> {
    struct Task<'a, F>(&'a [u16], &'a mut [f32], core::marker::PhantomData<F>);
    impl<F: Format> Kernel for Task<'_, F> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let mut padded = [0; 16];
            for (y, x) in self.1.chunks_mut(S::LANES).zip(self.0.chunks(S::LANES)) {
                let whole = x.len() == S::LANES;
                let h = if whole {
                    s.load_u16(x)
                } else {
                    padded[..x.len()].copy_from_slice(x);
                    s.load_u16(&padded)
                };
                let value = F::widen(s, h);
                if whole { s.store(y, value) } else { s.store_partial(y, value) }
            }
        }
    }
    in_tasks(cx, x, y, |x, y| dispatch(cx.isa(), Task::<F>(x, y, core::marker::PhantomData)))
}

fn narrow<F: Format>(cx: &Cx<'_>, x: &[f32], y: &mut [u16]) -> Result<()> {
    struct Task<'a, F>(&'a [f32], &'a mut [u16], core::marker::PhantomData<F>);
    impl<F: Format> Kernel for Task<'_, F> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let mut padded = [0; 16];
            for (y, x) in self.1.chunks_mut(S::LANES).zip(self.0.chunks(S::LANES)) {
                let whole = x.len() == S::LANES;
                let h = F::narrow(s, if whole { s.load(x) } else { s.load_partial(x) });
                if whole {
                    s.store_u16(y, h);
                } else {
                    s.store_u16(&mut padded, h);
                    y.copy_from_slice(&padded[..y.len()]);
                }
            }
        }
    }
    in_tasks(cx, x, y, |x, y| dispatch(cx.isa(), Task::<F>(x, y, core::marker::PhantomData)))
}

fn in_tasks<A: Sync, B: Send>(cx: &Cx<'_>, x: &[A], y: &mut [B], f: impl Fn(&[A], &mut [B]) + Sync) -> Result<()> {
    if x.len() != y.len() {
        return Err(Error::new(format!("a conversion of {} elements into {}", x.len(), y.len())));
    }
    let len = y.len();
    let out = DisjointMut::new(y);
    cx.for_each(len.div_ceil(TASK), 2 * len as u64, &|task| {
        let start = task * TASK;
        let n = TASK.min(len - start);
        // SAFETY: every task has its own elements.
        f(&x[start..start + n], unsafe { out.range(start, n) });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use crate::simd::Isa;
    use half::slice::HalfBitsSliceExt;

    fn contexts(mut f: impl FnMut(&Cx<'_>)) {
        for lanes in [1, 2] {
            let pool = Pool::new(lanes);
            for isa in Isa::available() {
                pool.run(isa, &mut f);
            }
        }
    }

    #[test]
    fn all_half_numbers_widen_and_come_back() {
        let x: Vec<u16> = (0..=u16::MAX).collect();
        contexts(|cx| {
            let (mut y, mut back) = (vec![0.0; x.len()], vec![f16::ZERO; x.len()]);
            f16_to_f32(cx, x.reinterpret_cast(), &mut y).unwrap();
            f32_to_f16(cx, &y, &mut back).unwrap();
            for ((&h, &y), &back) in x.iter().zip(&y).zip(&back) {
                let want = f16::from_bits(h).to_f32();
                assert!(y.to_bits() == want.to_bits() || y.is_nan() && want.is_nan(), "{} {h:04x}", cx.isa());
                assert!(back.to_bits() == h || back.is_nan() && want.is_nan(), "{} {h:04x} back", cx.isa());
            }
            let (mut y, mut back) = (vec![0.0; x.len()], vec![bf16::ZERO; x.len()]);
            bf16_to_f32(cx, x.reinterpret_cast(), &mut y).unwrap();
            f32_to_bf16(cx, &y, &mut back).unwrap();
            for ((&h, &y), &back) in x.iter().zip(&y).zip(&back) {
                let want = bf16::from_bits(h).to_f32();
                assert!(y.to_bits() == want.to_bits() || y.is_nan() && want.is_nan(), "{} {h:04x}", cx.isa());
                assert!(back.to_bits() == h || back.is_nan() && want.is_nan(), "{} {h:04x} back", cx.isa());
            }
        });
    }

    #[test]
    fn narrowing_rounds_as_the_half_crate_does() {
        // Every neighbourhood of a half number (its neighbours, the ties between them), and a walk over all of f32.
        let mut x: Vec<f32> = (0..=u32::MAX).step_by(8191).map(f32::from_bits).collect();
        for h in (0..0x7c00).step_by(7) {
            let (low, high) = (f16::from_bits(h).to_f32(), f16::from_bits(h + 1).to_f32());
            let tie = if high.is_finite() { (low + high) / 2.0 } else { 65520.0 };
            x.extend([low, tie.next_down(), tie, tie.next_up(), -tie, -tie.next_up()]);
        }
        x.extend([f32::NAN, -f32::NAN, f32::INFINITY, f32::MAX, f32::from_bits(0x7f80_0001), f32::from_bits(1)]);
        contexts(|cx| {
            let (mut half, mut brain) = (vec![f16::ZERO; x.len()], vec![bf16::ZERO; x.len()]);
            f32_to_f16(cx, &x, &mut half).unwrap();
            f32_to_bf16(cx, &x, &mut brain).unwrap();
            for ((&x, &half), &brain) in x.iter().zip(&half).zip(&brain) {
                let want = f16::from_f32(x);
                assert!(
                    half.to_bits() == want.to_bits() || half.is_nan() && x.is_nan(),
                    "{} {x:e}: {half:e}",
                    cx.isa()
                );
                let want = bf16::from_f32(x);
                assert!(brain.to_bits() == want.to_bits() || brain.is_nan() && x.is_nan(), "{} {x:e}", cx.isa());
            }
        });
    }

    #[test]
    fn every_length() {
        contexts(|cx| {
            for len in (0..40).chain([TASK + 1, 5 * TASK + 3]) {
                let x: Vec<f32> = (0..len).map(|i| (i % 2000) as f32 - 1000.0).collect();
                let (mut half, mut back) = (vec![f16::ZERO; len], vec![0.0; len]);
                f32_to_f16(cx, &x, &mut half).unwrap();
                f16_to_f32(cx, &half, &mut back).unwrap();
                assert_eq!(x, back);
            }
            assert!(f32_to_f16(cx, &[1.0], &mut []).is_err());
        });
    }
}
