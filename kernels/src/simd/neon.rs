//! Arm NEON (aarch64).

use super::{Isa, Simd};
use core::arch::aarch64::*;

/// NEON, which every aarch64 target with a standard library has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// # Safety
    /// The processor must have NEON.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Neon {
    const ISA: Isa = Isa::Neon;
    const LANES: usize = 4;
    type F32 = float32x4_t;
    type I32 = int32x4_t;
    type Mask = uint32x4_t;

    slice_methods!();
    partial_methods!();
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> float32x4_t {
        // SAFETY: the caller's contract.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn splat_ptr(self, p: *const f32) -> float32x4_t {
        // SAFETY: the caller's contract.
        unsafe { vld1q_dup_f32(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: float32x4_t) {
        // SAFETY: the caller's contract.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32]) -> int32x4_t {
        assert!(x.len() >= 4);
        // SAFETY: checked above.
        unsafe { vld1q_s32(x.as_ptr()) }
    }
    #[inline(always)]
    fn store_i32(self, x: &mut [i32], v: int32x4_t) {
        assert!(x.len() >= 4);
        // SAFETY: checked above.
        unsafe { vst1q_s32(x.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn load_u16(self, x: &[u16]) -> Self::I32 {
        assert!(x.len() >= 4);
        // SAFETY: checked above.
        unsafe { vreinterpretq_s32_u32(vmovl_u16(vld1_u16(x.as_ptr()))) }
    }
    #[inline(always)]
    fn store_u16(self, x: &mut [u16], v: Self::I32) {
        assert!(x.len() >= 4);
        // SAFETY: checked above.
        unsafe { vst1_u16(x.as_mut_ptr(), vmovn_u32(vreinterpretq_u32_s32(v))) }
    }
    // Shifts by a vector (negative counts shift right): immediates cannot depend on a constant parameter, and the
    // compiler turns the constant vector into one.
    #[inline(always)]
    #[allow(unused_unsafe)]
    fn shl_i32<const BITS: u32>(self, a: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vshlq_s32(a, vdupq_n_s32(BITS as i32)) }
    }
    #[inline(always)]
    #[allow(unused_unsafe)]
    fn shr_i32<const BITS: u32>(self, a: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves the features.
        unsafe { vshlq_s32(a, vdupq_n_s32(-(BITS as i32))) }
    }
    #[inline(always)]
    unsafe fn load_i32_ptr(self, p: *const i32) -> int32x4_t {
        // SAFETY: the caller's contract.
        unsafe { vld1q_s32(p) }
    }
    #[inline(always)]
    unsafe fn splat_i32_ptr(self, p: *const i32) -> int32x4_t {
        // SAFETY: the caller's contract.
        unsafe { vld1q_dup_s32(p) }
    }
    #[inline(always)]
    unsafe fn store_i32_ptr(self, p: *mut i32, v: int32x4_t) {
        // SAFETY: the caller's contract.
        unsafe { vst1q_s32(p, v) }
    }
    #[inline(always)]
    unsafe fn widen_bytes<const SIGNED: bool>(self, p: *const u8) -> int32x4_t {
        // SAFETY: the caller's contract.
        unsafe {
            if SIGNED {
                vreinterpretq_s32_s16(vmovl_s8(vld1_s8(p.cast())))
            } else {
                vreinterpretq_s32_u16(vmovl_u8(vld1_u8(p)))
            }
        }
    }
    #[inline(always)]
    unsafe fn load_bytes<const SIGNED: bool>(self, p: *const u8) -> int32x4_t {
        // SAFETY: the caller's contract.
        unsafe {
            let x = vdup_n_u32(p.cast::<u32>().read_unaligned());
            if SIGNED {
                vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(x))))
            } else {
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(x)))))
            }
        }
    }
    #[inline(always)]
    unsafe fn store_bytes<const SIGNED: bool>(self, p: *mut u8, v: [int32x4_t; 2]) {
        // SAFETY: the caller's contract.
        unsafe {
            let x = vcombine_s16(vqmovn_s32(v[0]), vqmovn_s32(v[1]));
            if SIGNED {
                vst1_s8(p.cast(), vqmovn_s16(x));
            } else {
                vst1_u8(p, vqmovun_s16(x));
            }
        }
    }
    #[inline(always)]
    unsafe fn quad_bytes(self, places: [*const u8; 4]) -> [int32x4_t; 4] {
        // SAFETY: the caller's contract.
        unsafe {
            let [a, b, c, d] = places.map(|p| vld1q_u8(p));
            let ab = [vzip1q_u8(a, b), vzip2q_u8(a, b)].map(|x| vreinterpretq_u16_u8(x));
            let cd = [vzip1q_u8(c, d), vzip2q_u8(c, d)].map(|x| vreinterpretq_u16_u8(x));
            [
                vreinterpretq_s32_u16(vzip1q_u16(ab[0], cd[0])),
                vreinterpretq_s32_u16(vzip2q_u16(ab[0], cd[0])),
                vreinterpretq_s32_u16(vzip1q_u16(ab[1], cd[1])),
                vreinterpretq_s32_u16(vzip2q_u16(ab[1], cd[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn pair_bytes<const SIGNED: bool>(self, a: *const u8, b: *const u8) -> [int32x4_t; 2] {
        // SAFETY: the caller's contract.
        unsafe {
            let (a, b) = (vld1_u8(a), vld1_u8(b));
            let [low, high] = [vzip1_u8(a, b), vzip2_u8(a, b)];
            if SIGNED {
                [low, high].map(|x| vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(x))))
            } else {
                [low, high].map(|x| vreinterpretq_s32_u16(vmovl_u8(x)))
            }
        }
    }
    wrap! {
        splat(x: f32) -> float32x4_t = vdupq_n_f32(x);
        add(a: float32x4_t, b: float32x4_t) -> float32x4_t = vaddq_f32(a, b);
        sub(a: float32x4_t, b: float32x4_t) -> float32x4_t = vsubq_f32(a, b);
        mul(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
        div(a: float32x4_t, b: float32x4_t) -> float32x4_t = vdivq_f32(a, b);
        mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t = vfmaq_f32(c, a, b);
        sqrt(a: float32x4_t) -> float32x4_t = vsqrtq_f32(a);
        neg(a: float32x4_t) -> float32x4_t = vnegq_f32(a);
        abs(a: float32x4_t) -> float32x4_t = vabsq_f32(a);
        min(a: float32x4_t, b: float32x4_t) -> float32x4_t = vminq_f32(a, b);
        max(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmaxq_f32(a, b);
        min_fast(a: float32x4_t, b: float32x4_t) -> float32x4_t = vminq_f32(a, b);
        max_fast(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmaxq_f32(a, b);
        round(a: float32x4_t) -> float32x4_t = vrndnq_f32(a);
        floor(a: float32x4_t) -> float32x4_t = vrndmq_f32(a);
        ceil(a: float32x4_t) -> float32x4_t = vrndpq_f32(a);
        trunc(a: float32x4_t) -> float32x4_t = vrndq_f32(a);
        lt(a: float32x4_t, b: float32x4_t) -> uint32x4_t = vcltq_f32(a, b);
        le(a: float32x4_t, b: float32x4_t) -> uint32x4_t = vcleq_f32(a, b);
        eq(a: float32x4_t, b: float32x4_t) -> uint32x4_t = vceqq_f32(a, b);
        select(m: uint32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t = vbslq_f32(m, a, b);
        mask_and(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t = vandq_u32(a, b);
        mask_or(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t = vorrq_u32(a, b);
        mask_any(m: uint32x4_t) -> bool = vmaxvq_u32(m) != 0;
        splat_i16(x: i16) -> int32x4_t = vreinterpretq_s32_s16(vdupq_n_s16(x));
        add_i16(a: int32x4_t, b: int32x4_t) -> int32x4_t =
            vreinterpretq_s32_s16(vaddq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
        sub_i16(a: int32x4_t, b: int32x4_t) -> int32x4_t =
            vreinterpretq_s32_s16(vsubq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
        dot_i16(a: int32x4_t, b: int32x4_t) -> int32x4_t = {
            let (a, b) = (vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
            vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b))
        };
        permute_bytes(a: int32x4_t, places: int32x4_t) -> int32x4_t =
            vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(places)));
        dot_pairs_u8_i8(a: int32x4_t, b: int32x4_t) -> int32x4_t = {
            let (a, b) = (vreinterpretq_u8_s32(a), vreinterpretq_s8_s32(b));
            let (low, high) = (vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(a))), vreinterpretq_s16_u16(vmovl_high_u8(a)));
            let products = |a: int16x8_t, b: int16x8_t| {
                vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b))
            };
            let (low, high) = (products(low, vmovl_s8(vget_low_s8(b))), products(high, vmovl_high_s8(b)));
            vreinterpretq_s32_s16(vqmovn_high_s32(vqmovn_s32(low), high))
        };
        splat_i32(x: i32) -> int32x4_t = vdupq_n_s32(x);
        add_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t = vaddq_s32(a, b);
        sub_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t = vsubq_s32(a, b);
        mul_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t = vmulq_s32(a, b);
        and_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t = vandq_s32(a, b);
        or_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t = vorrq_s32(a, b);
        xor_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t = veorq_s32(a, b);
        lt_i32(a: int32x4_t, b: int32x4_t) -> uint32x4_t = vcltq_s32(a, b);
        eq_i32(a: int32x4_t, b: int32x4_t) -> uint32x4_t = vceqq_s32(a, b);
        to_i32_fast(a: float32x4_t) -> int32x4_t = vcvtq_s32_f32(a);
        to_f32(a: int32x4_t) -> float32x4_t = vcvtq_f32_s32(a);
        bits(a: float32x4_t) -> int32x4_t = vreinterpretq_s32_f32(a);
        from_bits(a: int32x4_t) -> float32x4_t = vreinterpretq_f32_s32(a);
        reduce_add(a: float32x4_t) -> f32 = {
            let pair = vadd_f32(vget_low_f32(a), vget_high_f32(a));
            vget_lane_f32::<0>(pair) + vget_lane_f32::<1>(pair)
        };
        reduce_max(a: float32x4_t) -> f32 = vmaxvq_f32(a);
        reduce_min(a: float32x4_t) -> f32 = vminvq_f32(a);
    }
}
