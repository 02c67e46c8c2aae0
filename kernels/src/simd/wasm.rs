//! WebAssembly SIMD128, plain and relaxed. A module holds one of them: an engine rejects opcodes it does not know.

use super::{Isa, Simd};
use core::arch::wasm32::*;

macro_rules! implement {
    (
        $(#[$doc:meta])* $name:ident, $isa:expr,
        mul_add |$a:ident, $b:ident, $c:ident| $mul_add:expr,
        min_fast $min_fast:ident, max_fast $max_fast:ident, to_i32_fast $to_i32_fast:ident
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $name(());

        impl $name {
            /// # Safety
            /// The module must be compiled with the target feature.
            #[inline(always)]
            pub(super) unsafe fn new() -> Self {
                Self(())
            }
        }

        impl Simd for $name {
            const ISA: Isa = $isa;
            const LANES: usize = 4;
            type F32 = v128;
            type I32 = v128;
            type Mask = v128;

            slice_methods!();
            partial_methods!();
            #[inline(always)]
            unsafe fn load_ptr(self, p: *const f32) -> v128 {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                unsafe { v128_load(p.cast()) }
            }
            #[inline(always)]
            unsafe fn splat_ptr(self, p: *const f32) -> v128 {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                unsafe { v128_load32_splat(p.cast()) }
            }
            #[inline(always)]
            unsafe fn store_ptr(self, p: *mut f32, v: v128) {
                // SAFETY: the caller's contract; wasm stores need no alignment.
                unsafe { v128_store(p.cast(), v) }
            }
            #[inline(always)]
            fn load_i32(self, x: &[i32]) -> v128 {
                assert!(x.len() >= 4);
                // SAFETY: checked above.
                unsafe { v128_load(x.as_ptr().cast()) }
            }
            #[inline(always)]
            fn store_i32(self, x: &mut [i32], v: v128) {
                assert!(x.len() >= 4);
                // SAFETY: checked above.
                unsafe { v128_store(x.as_mut_ptr().cast(), v) }
            }
            #[inline(always)]
            fn load_u16(self, x: &[u16]) -> Self::I32 {
                assert!(x.len() >= 4);
                // SAFETY: checked above.
                unsafe { i32x4_load_extend_u16x4(x.as_ptr()) }
            }
            #[inline(always)]
            fn store_u16(self, x: &mut [u16], v: Self::I32) {
                assert!(x.len() >= 4);
                // SAFETY: checked above.
                unsafe { v128_store64_lane::<0>(u16x8_narrow_i32x4(v, v), x.as_mut_ptr().cast()) }
            }
            #[inline(always)]
            fn shl_i32<const BITS: u32>(self, a: v128) -> v128 {
                i32x4_shl(a, BITS)
            }
            #[inline(always)]
            fn shr_i32<const BITS: u32>(self, a: v128) -> v128 {
                i32x4_shr(a, BITS)
            }
            wrap! {
                splat(x: f32) -> v128 = f32x4_splat(x);
                add(a: v128, b: v128) -> v128 = f32x4_add(a, b);
                sub(a: v128, b: v128) -> v128 = f32x4_sub(a, b);
                mul(a: v128, b: v128) -> v128 = f32x4_mul(a, b);
                div(a: v128, b: v128) -> v128 = f32x4_div(a, b);
                mul_add($a: v128, $b: v128, $c: v128) -> v128 = $mul_add;
                sqrt(a: v128) -> v128 = f32x4_sqrt(a);
                neg(a: v128) -> v128 = f32x4_neg(a);
                abs(a: v128) -> v128 = f32x4_abs(a);
                min(a: v128, b: v128) -> v128 = f32x4_min(a, b);
                max(a: v128, b: v128) -> v128 = f32x4_max(a, b);
                min_fast(a: v128, b: v128) -> v128 = $min_fast(a, b);
                max_fast(a: v128, b: v128) -> v128 = $max_fast(a, b);
                at_least(x: v128, lo: v128) -> v128 = f32x4_pmax(x, lo);
                at_most(x: v128, hi: v128) -> v128 = f32x4_pmin(x, hi);
                round(a: v128) -> v128 = f32x4_nearest(a);
                floor(a: v128) -> v128 = f32x4_floor(a);
                ceil(a: v128) -> v128 = f32x4_ceil(a);
                trunc(a: v128) -> v128 = f32x4_trunc(a);
                lt(a: v128, b: v128) -> v128 = f32x4_lt(a, b);
                le(a: v128, b: v128) -> v128 = f32x4_le(a, b);
                eq(a: v128, b: v128) -> v128 = f32x4_eq(a, b);
                select(m: v128, a: v128, b: v128) -> v128 = v128_bitselect(a, b, m);
                mask_and(a: v128, b: v128) -> v128 = v128_and(a, b);
                mask_or(a: v128, b: v128) -> v128 = v128_or(a, b);
                mask_any(m: v128) -> bool = v128_any_true(m);
                splat_i32(x: i32) -> v128 = i32x4_splat(x);
                add_i32(a: v128, b: v128) -> v128 = i32x4_add(a, b);
                sub_i32(a: v128, b: v128) -> v128 = i32x4_sub(a, b);
                and_i32(a: v128, b: v128) -> v128 = v128_and(a, b);
                or_i32(a: v128, b: v128) -> v128 = v128_or(a, b);
                xor_i32(a: v128, b: v128) -> v128 = v128_xor(a, b);
                lt_i32(a: v128, b: v128) -> v128 = i32x4_lt(a, b);
                eq_i32(a: v128, b: v128) -> v128 = i32x4_eq(a, b);
                to_i32_fast(a: v128) -> v128 = $to_i32_fast(a);
                to_f32(a: v128) -> v128 = f32x4_convert_i32x4(a);
                bits(a: v128) -> v128 = a;
                from_bits(a: v128) -> v128 = a;
                reduce_add(a: v128) -> f32 = {
                    let pair = f32x4_add(a, i32x4_shuffle::<2, 3, 2, 3>(a, a));
                    f32x4_extract_lane::<0>(pair) + f32x4_extract_lane::<1>(pair)
                };
                reduce_max(a: v128) -> f32 = {
                    let pair = f32x4_max(a, i32x4_shuffle::<2, 3, 2, 3>(a, a));
                    f32x4_extract_lane::<0>(f32x4_max(pair, i32x4_shuffle::<1, 1, 1, 1>(pair, pair)))
                };
                reduce_min(a: v128) -> f32 = {
                    let pair = f32x4_min(a, i32x4_shuffle::<2, 3, 2, 3>(a, a));
                    f32x4_extract_lane::<0>(f32x4_min(pair, i32x4_shuffle::<1, 1, 1, 1>(pair, pair)))
                };
            }
        }
    };
}

#[cfg(not(target_feature = "relaxed-simd"))]
implement! {
    /// SIMD128.
    Simd128, Isa::WasmSimd128,
    // `pmin` and `pmax` are one instruction on x86, where `min` and `max` are up to ten.
    mul_add |a, b, c| f32x4_add(f32x4_mul(a, b), c),
    min_fast f32x4_pmin, max_fast f32x4_pmax, to_i32_fast i32x4_trunc_sat_f32x4
}

#[cfg(target_feature = "relaxed-simd")]
implement! {
    /// SIMD128 and relaxed SIMD. The multiply-add must be asked for: LLVM does not fuse by itself.
    RelaxedSimd, Isa::WasmRelaxedSimd,
    mul_add |a, b, c| f32x4_relaxed_madd(a, b, c),
    min_fast f32x4_relaxed_min, max_fast f32x4_relaxed_max, to_i32_fast i32x4_relaxed_trunc_f32x4
}
