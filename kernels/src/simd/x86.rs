//! x86-64: SSE4.1, the same with FMA, AVX2 and AVX-512.

use super::{Isa, Simd};
use core::arch::x86_64::*;

/// A type whose values prove features of the processor.
macro_rules! token {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $name(());

        impl $name {
            /// # Safety
            /// The processor must have the features named at the type.
            #[inline(always)]
            pub(super) unsafe fn new() -> Self {
                Self(())
            }
        }
    };
}

token! {
    /// SSE4.1.
    Sse41
}
token! {
    /// AVX and FMA, used with 128-bit vectors.
    Fma128
}
token! {
    /// AVX2, FMA and F16C.
    Avx2
}
token! {
    /// AVX-512 F, VL, BW and DQ, and the features of [`Avx2`].
    Avx512
}

// `minps` and `maxps` return the second operand for NaN and for zeros of both signs. Both orders together tell the
// whole story: NaN bits survive an or, and so does the sign of -0; for the maximum the subtraction of the bits in
// which both orders differ turns -0 into +0 and leaves everything else (x - 0 = x, NaN - y = NaN).
macro_rules! exact_min {
    ($min:ident, $or:ident, $a:expr, $b:expr) => {
        $or($min($a, $b), $min($b, $a))
    };
}
macro_rules! exact_max {
    ($max:ident, $or:ident, $xor:ident, $sub:ident, $a:expr, $b:expr) => {{
        let (m, n) = ($max($a, $b), $max($b, $a));
        $sub($or(m, n), $xor(m, n))
    }};
}

/// What SSE4.1 and 128-bit FMA share: all but `mul_add`. Under AVX the compiler encodes the same intrinsics as VEX.
macro_rules! impl_128 {
    ($name:ident, $isa:expr, |$a:ident, $b:ident, $c:ident| $mul_add:expr) => {
        impl Simd for $name {
            const ISA: Isa = $isa;
            const LANES: usize = 4;
            type F32 = __m128;
            type I32 = __m128i;
            type Mask = __m128;

            slice_methods!();
            partial_methods!();
            #[inline(always)]
            unsafe fn load_ptr(self, p: *const f32) -> __m128 {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe { _mm_loadu_ps(p) }
            }
            #[inline(always)]
            unsafe fn splat_ptr(self, p: *const f32) -> __m128 {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe { _mm_set1_ps(p.read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn store_ptr(self, p: *mut f32, v: __m128) {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe { _mm_storeu_ps(p, v) }
            }
            #[inline(always)]
            fn load_i32(self, x: &[i32]) -> __m128i {
                assert!(x.len() >= 4);
                // SAFETY: checked above; `self` proves the features.
                unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
            }
            #[inline(always)]
            fn store_i32(self, x: &mut [i32], v: __m128i) {
                assert!(x.len() >= 4);
                // SAFETY: checked above; `self` proves the features.
                unsafe { _mm_storeu_si128(x.as_mut_ptr().cast(), v) }
            }
            #[inline(always)]
            fn load_u16(self, x: &[u16]) -> Self::I32 {
                assert!(x.len() >= 4);
                // SAFETY: checked above; `self` proves the features.
                unsafe { _mm_cvtepu16_epi32(_mm_loadl_epi64(x.as_ptr().cast())) }
            }
            #[inline(always)]
            fn store_u16(self, x: &mut [u16], v: Self::I32) {
                assert!(x.len() >= 4);
                // SAFETY: checked above; `self` proves the features.
                unsafe { _mm_storel_epi64(x.as_mut_ptr().cast(), _mm_packus_epi32(v, v)) }
            }
            #[inline(always)]
            fn shl_i32<const BITS: u32>(self, a: __m128i) -> __m128i {
                // SAFETY: `self` proves the features.
                unsafe { _mm_sll_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
            }
            #[inline(always)]
            fn shr_i32<const BITS: u32>(self, a: __m128i) -> __m128i {
                // SAFETY: `self` proves the features.
                unsafe { _mm_sra_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
            }
            #[inline(always)]
            unsafe fn load_i32_ptr(self, p: *const i32) -> __m128i {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe { _mm_loadu_si128(p.cast()) }
            }
            #[inline(always)]
            unsafe fn splat_i32_ptr(self, p: *const i32) -> __m128i {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe { _mm_set1_epi32(p.read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn store_i32_ptr(self, p: *mut i32, v: __m128i) {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe { _mm_storeu_si128(p.cast(), v) }
            }
            #[inline(always)]
            unsafe fn widen_bytes<const SIGNED: bool>(self, p: *const u8) -> __m128i {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe {
                    let x = _mm_loadl_epi64(p.cast());
                    if SIGNED { _mm_cvtepi8_epi16(x) } else { _mm_cvtepu8_epi16(x) }
                }
            }
            #[inline(always)]
            unsafe fn load_bytes<const SIGNED: bool>(self, p: *const u8) -> __m128i {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe {
                    let x = _mm_cvtsi32_si128(p.cast::<i32>().read_unaligned());
                    if SIGNED { _mm_cvtepi8_epi32(x) } else { _mm_cvtepu8_epi32(x) }
                }
            }
            #[inline(always)]
            unsafe fn store_bytes<const SIGNED: bool>(self, p: *mut u8, v: [__m128i; 2]) {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe {
                    let x = _mm_packs_epi32(v[0], v[1]);
                    let x = if SIGNED { _mm_packs_epi16(x, x) } else { _mm_packus_epi16(x, x) };
                    _mm_storel_epi64(p.cast(), x);
                }
            }
            #[inline(always)]
            unsafe fn pair_bytes<const SIGNED: bool>(self, a: *const u8, b: *const u8) -> [__m128i; 2] {
                // SAFETY: the caller's contract; `self` proves the features.
                unsafe {
                    let x = _mm_unpacklo_epi8(_mm_loadl_epi64(a.cast()), _mm_loadl_epi64(b.cast()));
                    if SIGNED {
                        [_mm_cvtepi8_epi16(x), _mm_srai_epi16::<8>(_mm_unpackhi_epi8(x, x))]
                    } else {
                        [_mm_cvtepu8_epi16(x), _mm_unpackhi_epi8(x, _mm_setzero_si128())]
                    }
                }
            }
            wrap! {
                splat(x: f32) -> __m128 = _mm_set1_ps(x);
                add(a: __m128, b: __m128) -> __m128 = _mm_add_ps(a, b);
                sub(a: __m128, b: __m128) -> __m128 = _mm_sub_ps(a, b);
                mul(a: __m128, b: __m128) -> __m128 = _mm_mul_ps(a, b);
                div(a: __m128, b: __m128) -> __m128 = _mm_div_ps(a, b);
                mul_add($a: __m128, $b: __m128, $c: __m128) -> __m128 = $mul_add;
                sqrt(a: __m128) -> __m128 = _mm_sqrt_ps(a);
                neg(a: __m128) -> __m128 = _mm_xor_ps(a, _mm_set1_ps(-0.0));
                abs(a: __m128) -> __m128 = _mm_andnot_ps(_mm_set1_ps(-0.0), a);
                min(a: __m128, b: __m128) -> __m128 = exact_min!(_mm_min_ps, _mm_or_ps, a, b);
                max(a: __m128, b: __m128) -> __m128 =
                    exact_max!(_mm_max_ps, _mm_or_ps, _mm_xor_ps, _mm_sub_ps, a, b);
                min_fast(a: __m128, b: __m128) -> __m128 = _mm_min_ps(a, b);
                max_fast(a: __m128, b: __m128) -> __m128 = _mm_max_ps(a, b);
                // MAXPS and MINPS return the second operand if either is NaN.
                at_least(x: __m128, lo: __m128) -> __m128 = _mm_max_ps(lo, x);
                at_most(x: __m128, hi: __m128) -> __m128 = _mm_min_ps(hi, x);
                round(a: __m128) -> __m128 = _mm_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
                floor(a: __m128) -> __m128 = _mm_floor_ps(a);
                ceil(a: __m128) -> __m128 = _mm_ceil_ps(a);
                trunc(a: __m128) -> __m128 = _mm_round_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(a);
                lt(a: __m128, b: __m128) -> __m128 = _mm_cmplt_ps(a, b);
                le(a: __m128, b: __m128) -> __m128 = _mm_cmple_ps(a, b);
                eq(a: __m128, b: __m128) -> __m128 = _mm_cmpeq_ps(a, b);
                select(m: __m128, a: __m128, b: __m128) -> __m128 = _mm_blendv_ps(b, a, m);
                mask_and(a: __m128, b: __m128) -> __m128 = _mm_and_ps(a, b);
                mask_or(a: __m128, b: __m128) -> __m128 = _mm_or_ps(a, b);
                mask_any(m: __m128) -> bool = _mm_movemask_ps(m) != 0;
                splat_i16(x: i16) -> __m128i = _mm_set1_epi16(x);
                add_i16(a: __m128i, b: __m128i) -> __m128i = _mm_add_epi16(a, b);
                sub_i16(a: __m128i, b: __m128i) -> __m128i = _mm_sub_epi16(a, b);
                dot_i16(a: __m128i, b: __m128i) -> __m128i = _mm_madd_epi16(a, b);
                dot_pairs_u8_i8(a: __m128i, b: __m128i) -> __m128i = _mm_maddubs_epi16(a, b);
                permute_bytes(a: __m128i, places: __m128i) -> __m128i = _mm_shuffle_epi8(a, places);
                splat_i32(x: i32) -> __m128i = _mm_set1_epi32(x);
                add_i32(a: __m128i, b: __m128i) -> __m128i = _mm_add_epi32(a, b);
                sub_i32(a: __m128i, b: __m128i) -> __m128i = _mm_sub_epi32(a, b);
                mul_i32(a: __m128i, b: __m128i) -> __m128i = _mm_mullo_epi32(a, b);
                and_i32(a: __m128i, b: __m128i) -> __m128i = _mm_and_si128(a, b);
                or_i32(a: __m128i, b: __m128i) -> __m128i = _mm_or_si128(a, b);
                xor_i32(a: __m128i, b: __m128i) -> __m128i = _mm_xor_si128(a, b);
                lt_i32(a: __m128i, b: __m128i) -> __m128 = _mm_castsi128_ps(_mm_cmplt_epi32(a, b));
                eq_i32(a: __m128i, b: __m128i) -> __m128 = _mm_castsi128_ps(_mm_cmpeq_epi32(a, b));
                to_i32_fast(a: __m128) -> __m128i = _mm_cvttps_epi32(a);
                to_f32(a: __m128i) -> __m128 = _mm_cvtepi32_ps(a);
                bits(a: __m128) -> __m128i = _mm_castps_si128(a);
                from_bits(a: __m128i) -> __m128 = _mm_castsi128_ps(a);
                reduce_add(a: __m128) -> f32 = {
                    let pair = _mm_add_ps(a, _mm_movehl_ps(a, a));
                    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
                };
                reduce_max(a: __m128) -> f32 = {
                    let pair = Self(()).max(a, _mm_movehl_ps(a, a));
                    _mm_cvtss_f32(Self(()).max(pair, _mm_movehdup_ps(pair)))
                };
                reduce_min(a: __m128) -> f32 = {
                    let pair = Self(()).min(a, _mm_movehl_ps(a, a));
                    _mm_cvtss_f32(Self(()).min(pair, _mm_movehdup_ps(pair)))
                };
            }
        }
    };
}

impl_128!(Sse41, Isa::Sse41, |a, b, c| _mm_add_ps(_mm_mul_ps(a, b), c));
impl_128!(Fma128, Isa::Fma128, |a, b, c| _mm_fmadd_ps(a, b, c));

impl Avx2 {
    /// The first `n` lanes all ones, the rest zero; `n <= 8`.
    #[inline(always)]
    fn first(self, n: usize) -> __m256i {
        const WINDOW: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        let window = &WINDOW[8 - n..16 - n];
        // SAFETY: eight elements; `self` proves the features.
        unsafe { _mm256_loadu_si256(window.as_ptr().cast()) }
    }

    /// Both halves.
    #[inline(always)]
    fn halves(self, a: __m256) -> (__m128, __m128) {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a)) }
    }
}

impl Simd for Avx2 {
    const ISA: Isa = Isa::Avx2;
    const LANES: usize = 8;
    type F32 = __m256;
    type I32 = __m256i;
    type Mask = __m256;

    slice_methods!();
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> __m256 {
        let mask = self.first(x.len().min(8));
        // SAFETY: masked lanes are not read; `self` proves the features.
        unsafe { _mm256_maskload_ps(x.as_ptr(), mask) }
    }
    #[inline(always)]
    fn store_partial(self, x: &mut [f32], v: __m256) {
        let mask = self.first(x.len().min(8));
        // SAFETY: masked lanes are not written; `self` proves the features.
        unsafe { _mm256_maskstore_ps(x.as_mut_ptr(), mask, v) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn splat_ptr(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm256_set1_ps(p.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32]) -> __m256i {
        assert!(x.len() >= 8);
        // SAFETY: checked above; `self` proves the features.
        unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_i32(self, x: &mut [i32], v: __m256i) {
        assert!(x.len() >= 8);
        // SAFETY: checked above; `self` proves the features.
        unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), v) }
    }
    #[inline(always)]
    fn load_u16(self, x: &[u16]) -> Self::I32 {
        assert!(x.len() >= 8);
        // SAFETY: checked above; `self` proves the features.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_u16(self, x: &mut [u16], v: Self::I32) {
        assert!(x.len() >= 8);
        // SAFETY: checked above; `self` proves the features.
        unsafe {
            let (low, high) = (_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            _mm_storeu_si128(x.as_mut_ptr().cast(), _mm_packus_epi32(low, high))
        }
    }
    #[inline(always)]
    fn shl_i32<const BITS: u32>(self, a: __m256i) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
    #[inline(always)]
    fn shr_i32<const BITS: u32>(self, a: __m256i) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_sra_epi32(a, _mm_cvtsi32_si128(BITS as i32)) }
    }
    #[inline(always)]
    unsafe fn load_i32_ptr(self, p: *const i32) -> __m256i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_i32_ptr(self, p: *const i32) -> __m256i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm256_set1_epi32(p.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store_i32_ptr(self, p: *mut i32, v: __m256i) {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn widen_bytes<const SIGNED: bool>(self, p: *const u8) -> __m256i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            let x = _mm_loadu_si128(p.cast());
            if SIGNED { _mm256_cvtepi8_epi16(x) } else { _mm256_cvtepu8_epi16(x) }
        }
    }
    #[inline(always)]
    unsafe fn load_bytes<const SIGNED: bool>(self, p: *const u8) -> __m256i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            let x = _mm_loadl_epi64(p.cast());
            if SIGNED { _mm256_cvtepi8_epi32(x) } else { _mm256_cvtepu8_epi32(x) }
        }
    }
    #[inline(always)]
    unsafe fn store_bytes<const SIGNED: bool>(self, p: *mut u8, v: [__m256i; 2]) {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            // The packing works in halves of registers; bring the quarters back into order.
            let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
            let (low, high) = (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let x = if SIGNED { _mm_packs_epi16(low, high) } else { _mm_packus_epi16(low, high) };
            _mm_storeu_si128(p.cast(), x);
        }
    }
    #[inline(always)]
    unsafe fn pair_bytes<const SIGNED: bool>(self, a: *const u8, b: *const u8) -> [__m256i; 2] {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            let (a, b) = (_mm_loadu_si128(a.cast()), _mm_loadu_si128(b.cast()));
            let [low, high] = [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)];
            if SIGNED {
                [_mm256_cvtepi8_epi16(low), _mm256_cvtepi8_epi16(high)]
            } else {
                [_mm256_cvtepu8_epi16(low), _mm256_cvtepu8_epi16(high)]
            }
        }
    }
    wrap! {
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        sqrt(a: __m256) -> __m256 = _mm256_sqrt_ps(a);
        neg(a: __m256) -> __m256 = _mm256_xor_ps(a, _mm256_set1_ps(-0.0));
        abs(a: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
        min(a: __m256, b: __m256) -> __m256 = exact_min!(_mm256_min_ps, _mm256_or_ps, a, b);
        max(a: __m256, b: __m256) -> __m256 =
            exact_max!(_mm256_max_ps, _mm256_or_ps, _mm256_xor_ps, _mm256_sub_ps, a, b);
        min_fast(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        max_fast(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        // MAXPS and MINPS return the second operand if either is NaN.
        at_least(x: __m256, lo: __m256) -> __m256 = _mm256_max_ps(lo, x);
        at_most(x: __m256, hi: __m256) -> __m256 = _mm256_min_ps(hi, x);
        round(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        floor(a: __m256) -> __m256 = _mm256_floor_ps(a);
        ceil(a: __m256) -> __m256 = _mm256_ceil_ps(a);
        trunc(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(a);
        lt(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_LT_OQ>(a, b);
        le(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_LE_OQ>(a, b);
        eq(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b);
        select(m: __m256, a: __m256, b: __m256) -> __m256 = _mm256_blendv_ps(b, a, m);
        mask_and(a: __m256, b: __m256) -> __m256 = _mm256_and_ps(a, b);
        mask_or(a: __m256, b: __m256) -> __m256 = _mm256_or_ps(a, b);
        mask_any(m: __m256) -> bool = _mm256_movemask_ps(m) != 0;
        splat_i16(x: i16) -> __m256i = _mm256_set1_epi16(x);
        add_i16(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi16(a, b);
        sub_i16(a: __m256i, b: __m256i) -> __m256i = _mm256_sub_epi16(a, b);
        dot_i16(a: __m256i, b: __m256i) -> __m256i = _mm256_madd_epi16(a, b);
        dot_pairs_u8_i8(a: __m256i, b: __m256i) -> __m256i = _mm256_maddubs_epi16(a, b);
        permute_bytes(a: __m256i, places: __m256i) -> __m256i = _mm256_shuffle_epi8(a, places);
        splat_i32(x: i32) -> __m256i = _mm256_set1_epi32(x);
        add_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        sub_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_sub_epi32(a, b);
        mul_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_mullo_epi32(a, b);
        and_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
        or_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        xor_i32(a: __m256i, b: __m256i) -> __m256i = _mm256_xor_si256(a, b);
        lt_i32(a: __m256i, b: __m256i) -> __m256 = _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a));
        eq_i32(a: __m256i, b: __m256i) -> __m256 = _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b));
        to_i32_fast(a: __m256) -> __m256i = _mm256_cvttps_epi32(a);
        to_f32(a: __m256i) -> __m256 = _mm256_cvtepi32_ps(a);
        bits(a: __m256) -> __m256i = _mm256_castps_si256(a);
        from_bits(a: __m256i) -> __m256 = _mm256_castsi256_ps(a);
        reduce_add(a: __m256) -> f32 = {
            let (low, high) = Self(()).halves(a);
            Fma128(()).reduce_add(_mm_add_ps(low, high))
        };
        reduce_max(a: __m256) -> f32 = {
            let (low, high) = Self(()).halves(a);
            Fma128(()).reduce_max(Fma128(()).max(low, high))
        };
        reduce_min(a: __m256) -> f32 = {
            let (low, high) = Self(()).halves(a);
            Fma128(()).reduce_min(Fma128(()).min(low, high))
        };
    }
}

impl Avx512 {
    /// Both halves.
    #[inline(always)]
    fn halves(self, a: __m512) -> (__m256, __m256) {
        // SAFETY: `self` proves the features.
        unsafe { (_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a)) }
    }
}

/// The first `n` of 16 lanes.
#[inline(always)]
fn first16(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

impl Simd for Avx512 {
    const ISA: Isa = Isa::Avx512;
    const LANES: usize = 16;
    type F32 = __m512;
    type I32 = __m512i;
    type Mask = __mmask16;

    slice_methods!();
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> __m512 {
        // SAFETY: masked lanes are not read; `self` proves the features.
        unsafe { _mm512_maskz_loadu_ps(first16(x.len()), x.as_ptr()) }
    }
    #[inline(always)]
    fn store_partial(self, x: &mut [f32], v: __m512) {
        // SAFETY: masked lanes are not written; `self` proves the features.
        unsafe { _mm512_mask_storeu_ps(x.as_mut_ptr(), first16(x.len()), v) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn splat_ptr(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm512_set1_ps(p.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32]) -> __m512i {
        assert!(x.len() >= 16);
        // SAFETY: checked above; `self` proves the features.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_i32(self, x: &mut [i32], v: __m512i) {
        assert!(x.len() >= 16);
        // SAFETY: checked above; `self` proves the features.
        unsafe { _mm512_storeu_si512(x.as_mut_ptr().cast(), v) }
    }
    #[inline(always)]
    fn load_u16(self, x: &[u16]) -> Self::I32 {
        assert!(x.len() >= 16);
        // SAFETY: checked above; `self` proves the features.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_u16(self, x: &mut [u16], v: Self::I32) {
        assert!(x.len() >= 16);
        // SAFETY: checked above; `self` proves the features.
        unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(v)) }
    }
    #[inline(always)]
    fn shl_i32<const BITS: u32>(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_slli_epi32::<BITS>(a) }
    }
    #[inline(always)]
    fn shr_i32<const BITS: u32>(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_srai_epi32::<BITS>(a) }
    }
    #[inline(always)]
    unsafe fn load_i32_ptr(self, p: *const i32) -> __m512i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_i32_ptr(self, p: *const i32) -> __m512i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm512_set1_epi32(p.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store_i32_ptr(self, p: *mut i32, v: __m512i) {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn widen_bytes<const SIGNED: bool>(self, p: *const u8) -> __m512i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            let x = _mm256_loadu_si256(p.cast());
            if SIGNED { _mm512_cvtepi8_epi16(x) } else { _mm512_cvtepu8_epi16(x) }
        }
    }
    #[inline(always)]
    unsafe fn load_bytes<const SIGNED: bool>(self, p: *const u8) -> __m512i {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            let x = _mm_loadu_si128(p.cast());
            if SIGNED { _mm512_cvtepi8_epi32(x) } else { _mm512_cvtepu8_epi32(x) }
        }
    }
    #[inline(always)]
    unsafe fn store_bytes<const SIGNED: bool>(self, p: *mut u8, v: [__m512i; 2]) {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            for (i, v) in v.into_iter().enumerate() {
                let x = if SIGNED {
                    _mm512_cvtsepi32_epi8(v)
                } else {
                    // It takes what it narrows for unsigned.
                    _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, _mm512_setzero_si512()))
                };
                _mm_storeu_si128(p.add(16 * i).cast(), x);
            }
        }
    }
    #[inline(always)]
    unsafe fn pair_bytes<const SIGNED: bool>(self, a: *const u8, b: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's contract; `self` proves the features.
        unsafe {
            let mut pairs = [_mm512_setzero_si512(); 2];
            for (i, pairs) in pairs.iter_mut().enumerate() {
                let (a, b) = (_mm_loadu_si128(a.add(16 * i).cast()), _mm_loadu_si128(b.add(16 * i).cast()));
                let x = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
                *pairs = if SIGNED { _mm512_cvtepi8_epi16(x) } else { _mm512_cvtepu8_epi16(x) };
            }
            pairs
        }
    }
    wrap! {
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        sqrt(a: __m512) -> __m512 = _mm512_sqrt_ps(a);
        neg(a: __m512) -> __m512 = _mm512_xor_ps(a, _mm512_set1_ps(-0.0));
        abs(a: __m512) -> __m512 = _mm512_andnot_ps(_mm512_set1_ps(-0.0), a);
        min(a: __m512, b: __m512) -> __m512 = exact_min!(_mm512_min_ps, _mm512_or_ps, a, b);
        max(a: __m512, b: __m512) -> __m512 =
            exact_max!(_mm512_max_ps, _mm512_or_ps, _mm512_xor_ps, _mm512_sub_ps, a, b);
        min_fast(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        max_fast(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        // MAXPS and MINPS return the second operand if either is NaN.
        at_least(x: __m512, lo: __m512) -> __m512 = _mm512_max_ps(lo, x);
        at_most(x: __m512, hi: __m512) -> __m512 = _mm512_min_ps(hi, x);
        round(a: __m512) -> __m512 = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        floor(a: __m512) -> __m512 = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a);
        ceil(a: __m512) -> __m512 = _mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(a);
        trunc(a: __m512) -> __m512 = _mm512_roundscale_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(a);
        lt(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b);
        le(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b);
        eq(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b);
        select(m: __mmask16, a: __m512, b: __m512) -> __m512 = _mm512_mask_blend_ps(m, b, a);
        mask_and(a: __mmask16, b: __mmask16) -> __mmask16 = a & b;
        mask_or(a: __mmask16, b: __mmask16) -> __mmask16 = a | b;
        mask_any(m: __mmask16) -> bool = m != 0;
        splat_i16(x: i16) -> __m512i = _mm512_set1_epi16(x);
        add_i16(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi16(a, b);
        sub_i16(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi16(a, b);
        dot_i16(a: __m512i, b: __m512i) -> __m512i = _mm512_madd_epi16(a, b);
        dot_pairs_u8_i8(a: __m512i, b: __m512i) -> __m512i = _mm512_maddubs_epi16(a, b);
        permute_bytes(a: __m512i, places: __m512i) -> __m512i = _mm512_shuffle_epi8(a, places);
        splat_i32(x: i32) -> __m512i = _mm512_set1_epi32(x);
        add_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        sub_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi32(a, b);
        mul_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_mullo_epi32(a, b);
        and_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        or_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        xor_i32(a: __m512i, b: __m512i) -> __m512i = _mm512_xor_si512(a, b);
        lt_i32(a: __m512i, b: __m512i) -> __mmask16 = _mm512_cmplt_epi32_mask(a, b);
        eq_i32(a: __m512i, b: __m512i) -> __mmask16 = _mm512_cmpeq_epi32_mask(a, b);
        to_i32_fast(a: __m512) -> __m512i = _mm512_cvttps_epi32(a);
        to_f32(a: __m512i) -> __m512 = _mm512_cvtepi32_ps(a);
        bits(a: __m512) -> __m512i = _mm512_castps_si512(a);
        from_bits(a: __m512i) -> __m512 = _mm512_castsi512_ps(a);
        reduce_add(a: __m512) -> f32 = {
            let (low, high) = Self(()).halves(a);
            Avx2(()).reduce_add(_mm256_add_ps(low, high))
        };
        reduce_max(a: __m512) -> f32 = {
            let (low, high) = Self(()).halves(a);
            Avx2(()).reduce_max(Avx2(()).max(low, high))
        };
        reduce_min(a: __m512) -> f32 = {
            let (low, high) = Self(()).halves(a);
            Avx2(()).reduce_min(Avx2(()).min(low, high))
        };
    }
}
