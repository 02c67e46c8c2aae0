//! WebAssembly SIMD128, plain and relaxed. A module holds one of them: an engine rejects opcodes it does not know.

use super::{Isa, Simd, opaque};
use core::arch::wasm32::*;

macro_rules! implement {
    (
        $(#[$doc:meta])* $name:ident, $isa:expr,
        mul_add |$a:ident, $b:ident, $c:ident| $mul_add:expr,
        min_fast $min_fast:ident, max_fast $max_fast:ident, to_i32_fast $to_i32_fast:ident,
        bound |$x:ident, $bound:ident| at_least $at_least:expr, at_most $at_most:expr,
        dot_pairs |$bytes:ident, $weights:ident| $dot_pairs:expr,
        swizzle $swizzle:ident
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
            #[inline(always)]
            unsafe fn load_i32_ptr(self, p: *const i32) -> v128 {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                unsafe { v128_load(p.cast()) }
            }
            #[inline(always)]
            unsafe fn splat_i32_ptr(self, p: *const i32) -> v128 {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                unsafe { v128_load32_splat(p.cast()) }
            }
            #[inline(always)]
            unsafe fn store_i32_ptr(self, p: *mut i32, v: v128) {
                // SAFETY: the caller's contract; wasm stores need no alignment.
                unsafe { v128_store(p.cast(), v) }
            }
            #[inline(always)]
            unsafe fn widen_bytes<const SIGNED: bool>(self, p: *const u8) -> v128 {
                // SAFETY: the caller's contract.
                unsafe { if SIGNED { i16x8_load_extend_i8x8(p.cast()) } else { i16x8_load_extend_u8x8(p) } }
            }
            #[inline(always)]
            unsafe fn load_bytes<const SIGNED: bool>(self, p: *const u8) -> v128 {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                let x = unsafe { v128_load32_zero(p.cast()) };
                if SIGNED {
                    i32x4_extend_low_i16x8(i16x8_extend_low_i8x16(x))
                } else {
                    i32x4_extend_low_u16x8(i16x8_extend_low_u8x16(x))
                }
            }
            #[inline(always)]
            unsafe fn store_bytes<const SIGNED: bool>(self, p: *mut u8, v: [v128; 2]) {
                let x = i16x8_narrow_i32x4(v[0], v[1]);
                let x = if SIGNED { i8x16_narrow_i16x8(x, x) } else { u8x16_narrow_i16x8(x, x) };
                // SAFETY: the caller's contract; wasm stores need no alignment.
                unsafe { v128_store64_lane::<0>(x, p.cast()) }
            }
            #[inline(always)]
            fn reals(self) -> v128 {
                // The highest 16 bits of the numbers from 2^23 on, of which the lowest 16 bits are an integer that is added. Not
                // as a constant: V8 would make it anew for each vector; and LLVM, which saw that its lanes are the same, would
                // interleave with one of them, for which V8 has no instruction.
                opaque(&u16x8_splat(0x4b00))
            }
            #[inline(always)]
            unsafe fn load_reals(self, p: *const u8, flip: u8, zero: v128, high: v128) -> [v128; 2] {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                let x = v128_xor(unsafe { i16x8_load_extend_u8x8(p) }, u16x8_splat(flip.into()));
                // Numbers from 2^23 on: nothing to widen or to convert.
                let zero = f32x4_add(zero, f32x4_splat(8_388_608.0));
                [
                    f32x4_sub(i16x8_shuffle::<0, 8, 1, 9, 2, 10, 3, 11>(x, high), zero),
                    f32x4_sub(i16x8_shuffle::<4, 12, 5, 13, 6, 14, 7, 15>(x, high), zero),
                ]
            }
            #[inline(always)]
            unsafe fn store_flipped(self, p: *mut u8, v: [v128; 2], flip: u8) {
                let x = i16x8_narrow_i32x4(v[0], v[1]);
                let x = v128_xor(u8x16_narrow_i16x8(x, x), u8x16_splat(flip));
                // SAFETY: the caller's contract; wasm stores need no alignment.
                unsafe { v128_store64_lane::<0>(x, p.cast()) }
            }
            #[inline(always)]
            unsafe fn pair_bytes<const SIGNED: bool>(self, a: *const u8, b: *const u8) -> [v128; 2] {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                let (a, b) = unsafe { (v128_load64_zero(a.cast()), v128_load64_zero(b.cast())) };
                let x = i8x16_shuffle::<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(a, b);
                if SIGNED {
                    [i16x8_extend_low_i8x16(x), i16x8_extend_high_i8x16(x)]
                } else {
                    [i16x8_extend_low_u8x16(x), i16x8_extend_high_u8x16(x)]
                }
            }
            #[inline(always)]
            unsafe fn quad_bytes(self, places: [*const u8; 4]) -> [v128; 4] {
                // SAFETY: the caller's contract; wasm loads need no alignment.
                let [a, b, c, d] = places.map(|p| unsafe { v128_load(p.cast()) });
                let low = |a, b| i8x16_shuffle::<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(a, b);
                let high = |a, b| i8x16_shuffle::<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(a, b);
                let low_pairs = |a, b| i16x8_shuffle::<0, 8, 1, 9, 2, 10, 3, 11>(a, b);
                let high_pairs = |a, b| i16x8_shuffle::<4, 12, 5, 13, 6, 14, 7, 15>(a, b);
                let (ab, cd) = ([low(a, b), high(a, b)], [low(c, d), high(c, d)]);
                [low_pairs(ab[0], cd[0]), high_pairs(ab[0], cd[0]), low_pairs(ab[1], cd[1]), high_pairs(ab[1], cd[1])]
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
                at_least($x: v128, $bound: v128) -> v128 = $at_least;
                at_most($x: v128, $bound: v128) -> v128 = $at_most;
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
                splat_i16(x: i16) -> v128 = i16x8_splat(x);
                add_i16(a: v128, b: v128) -> v128 = i16x8_add(a, b);
                sub_i16(a: v128, b: v128) -> v128 = i16x8_sub(a, b);
                dot_i16(a: v128, b: v128) -> v128 = i32x4_dot_i16x8(a, b);
                dot_pairs_u8_i8($bytes: v128, $weights: v128) -> v128 = $dot_pairs;
                permute_bytes(a: v128, places: v128) -> v128 = $swizzle(a, places);
                splat_i32(x: i32) -> v128 = i32x4_splat(x);
                add_i32(a: v128, b: v128) -> v128 = i32x4_add(a, b);
                sub_i32(a: v128, b: v128) -> v128 = i32x4_sub(a, b);
                mul_i32(a: v128, b: v128) -> v128 = i32x4_mul(a, b);
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
    min_fast f32x4_pmin, max_fast f32x4_pmax, to_i32_fast i32x4_trunc_sat_f32x4,
    bound |x, bound| at_least f32x4_pmax(x, bound), at_most f32x4_pmin(x, bound),
    dot_pairs |bytes, weights| i16x8_narrow_i32x4(
        i32x4_dot_i16x8(i16x8_extend_low_u8x16(bytes), i16x8_extend_low_i8x16(weights)),
        i32x4_dot_i16x8(i16x8_extend_high_u8x16(bytes), i16x8_extend_high_i8x16(weights))
    ),
    swizzle i8x16_swizzle
}

#[cfg(target_feature = "relaxed-simd")]
implement! {
    /// SIMD128 and relaxed SIMD. The multiply-add must be asked for: LLVM does not fuse by itself.
    RelaxedSimd, Isa::WasmRelaxedSimd,
    mul_add |a, b, c| f32x4_relaxed_madd(a, b, c),
    min_fast f32x4_relaxed_min, max_fast f32x4_relaxed_max, to_i32_fast i32x4_relaxed_trunc_f32x4,
    // With relaxed SIMD LLVM makes `pmax(x, lo)` a `relaxed_max(x, lo)`, which on x86 is `lo` where x is NaN; the other way
    // round it is x there, and on Arm too.
    bound |x, bound| at_least f32x4_relaxed_max(bound, x), at_most f32x4_relaxed_min(bound, x),
    // Unsigned and saturating on x86; what it is here, the forms of the dot product find out.
    dot_pairs |bytes, weights| i16x8_relaxed_dot_i8x16_i7x16(weights, bytes),
    swizzle i8x16_relaxed_swizzle
}
