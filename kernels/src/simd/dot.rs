//! Dot products of short integers, the heart of [`crate::int8`]: one more choice beside the instruction set.
//!
//! A lane of 32 bits holds a group of neighbours along k: two `i16` or four bytes. An implementation of [`Dot`] adds to
//! each lane of an accumulator the products of the lanes of two operands, exactly. The kernels are generic over it, and
//! only they: the instructions that not every processor of an [`Isa`] has (VNNI, say) get functions of their own here.

use super::{Isa, Kernel, Simd, dispatch, opaque};
use crate::int8::Form;
#[cfg(target_arch = "aarch64")]
use core::arch::aarch64::int32x4_t;
#[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
use core::arch::wasm32::*;
#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::{__m256i, __m512i, _mm256_dpbusd_avx_epi32, _mm512_dpbusd_epi32};

/// A form of the dot product with the vectors of `S`.
pub(crate) trait Dot: Copy {
    /// The vectors.
    type S: Simd;
    /// How the numbers of a lane are read.
    const FORM: Form;
    /// The other operations on vectors.
    fn simd(self) -> Self::S;
    /// `acc` plus the products of the numbers in each lane of `a` and `b`, wrapping.
    fn dot(
        self,
        acc: <Self::S as Simd>::I32,
        a: <Self::S as Simd>::I32,
        b: <Self::S as Simd>::I32,
    ) -> <Self::S as Simd>::I32;
    /// The products of two vectors each at once. Of [`Form::Split`] the sums of neighbours of both together must fit 16 bits.
    #[inline(always)]
    fn dot_two(
        self,
        acc: <Self::S as Simd>::I32,
        a: [<Self::S as Simd>::I32; 2],
        b: [<Self::S as Simd>::I32; 2],
    ) -> <Self::S as Simd>::I32 {
        self.dot(self.dot(acc, a[0], b[0]), a[1], b[1])
    }
}

/// A computation that is compiled once per instruction set and form.
pub(crate) trait DotKernel {
    /// What the computation returns.
    type Output;
    /// As [`Kernel::run`].
    fn run<D: Dot>(self, d: D) -> Self::Output;
}

/// [`Form::Wide`] on any instruction set.
#[derive(Clone, Copy)]
struct Wide<S>(S);

impl<S: Simd> Dot for Wide<S> {
    type S = S;
    const FORM: Form = Form::Wide;
    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: S::I32, a: S::I32, b: S::I32) -> S::I32 {
        self.0.add_i32(acc, self.0.dot_i16(a, b))
    }
}

struct OnWide<K>(K);

impl<K: DotKernel> Kernel for OnWide<K> {
    type Output = K::Output;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> K::Output {
        self.0.run(Wide(s))
    }
}

/// [`Form::Split`] on any instruction set.
#[derive(Clone, Copy)]
struct Split<S: Simd> {
    s: S,
    /// Pairs of ones.
    ones: S::I32,
}

impl<S: Simd> Dot for Split<S> {
    type S = S;
    const FORM: Form = Form::Split;
    #[inline(always)]
    fn simd(self) -> S {
        self.s
    }
    #[inline(always)]
    fn dot(self, acc: S::I32, a: S::I32, b: S::I32) -> S::I32 {
        self.s.add_i32(acc, self.s.dot_i16(self.s.dot_pairs_u8_i8(a, b), self.ones))
    }
    #[inline(always)]
    fn dot_two(self, acc: S::I32, a: [S::I32; 2], b: [S::I32; 2]) -> S::I32 {
        let s = self.s;
        let sums = s.add_i16(s.dot_pairs_u8_i8(a[0], b[0]), s.dot_pairs_u8_i8(a[1], b[1]));
        s.add_i32(acc, s.dot_i16(sums, self.ones))
    }
}

struct OnSplit<K>(K);

impl<K: DotKernel> Kernel for OnSplit<K> {
    type Output = K::Output;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> K::Output {
        // A compiler that knows the ones makes additions of neighbours of it, whose ones an engine then loads each time.
        self.0.run(Split { s, ones: s.splat_i16(opaque(&1)) })
    }
}

/// [`Form::U8S8`] of AVX-512 VNNI.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Vnni(super::x86::Avx512);

#[cfg(target_arch = "x86_64")]
impl Dot for Vnni {
    type S = super::x86::Avx512;
    const FORM: Form = Form::U8S8;
    #[inline(always)]
    fn simd(self) -> Self::S {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: a value exists only where `vnni` below has the feature.
        unsafe { _mm512_dpbusd_epi32(acc, a, b) }
    }
}

/// [`Form::U8S8`] of AVX-VNNI: 256-bit vectors on processors without AVX-512.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct AvxVnni(super::x86::Avx2);

#[cfg(target_arch = "x86_64")]
impl Dot for AvxVnni {
    type S = super::x86::Avx2;
    const FORM: Form = Form::U8S8;
    #[inline(always)]
    fn simd(self) -> Self::S {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: a value exists only where `avx_vnni` below has the feature.
        unsafe { _mm256_dpbusd_avx_epi32(acc, a, b) }
    }
}

/// [`Form::S8S8`] of Arm's dot product extension.
#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy)]
struct Sdot(super::neon::Neon);

#[cfg(target_arch = "aarch64")]
impl Dot for Sdot {
    type S = super::neon::Neon;
    const FORM: Form = Form::S8S8;
    #[inline(always)]
    fn simd(self) -> Self::S {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // The intrinsic is not stable yet.
        let mut sum = acc;
        // SAFETY: a value exists only where `sdot` below has the feature; registers alone are touched.
        unsafe {
            core::arch::asm!(
                "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
                sum = inout(vreg) sum,
                a = in(vreg) a,
                b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }
}

/// The relaxed dot product of bytes, whose second operand may count as signed, as unsigned, or saturate: which forms it
/// computes exactly is found out by [`available`].
#[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
#[derive(Clone, Copy)]
struct Relaxed(super::wasm::RelaxedSimd);

#[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
impl Dot for Relaxed {
    type S = super::wasm::RelaxedSimd;
    /// Both forms of bytes: the tiles are the same.
    const FORM: Form = Form::U8S8;
    #[inline(always)]
    fn simd(self) -> Self::S {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: v128, a: v128, b: v128) -> v128 {
        i32x4_relaxed_dot_i8x16_i7x16_add(b, a, acc)
    }
}

/// Functions with the features of the forms above, as in `dispatch.rs`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod trampolines {
    use super::DotKernel;

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512vnni")]
    pub(super) fn vnni<K: DotKernel>(kernel: K) -> K::Output {
        // SAFETY: this function has the features.
        kernel.run(super::Vnni(unsafe { super::super::x86::Avx512::new() }))
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    pub(super) fn avx_vnni<K: DotKernel>(kernel: K) -> K::Output {
        // SAFETY: this function has the features.
        kernel.run(super::AvxVnni(unsafe { super::super::x86::Avx2::new() }))
    }

    #[cfg(target_arch = "aarch64")]
    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn sdot<K: DotKernel>(kernel: K) -> K::Output {
        // SAFETY: this function has the features.
        kernel.run(super::Sdot(unsafe { super::super::neon::Neon::new() }))
    }
}

/// Whether products of bytes of this form are exact with `isa` here.
pub(crate) fn available(isa: Isa, form: Form) -> bool {
    if !isa.is_available() {
        return false;
    }
    match (isa, form) {
        (_, Form::Wide) => true,
        #[cfg(target_arch = "x86_64")]
        (isa, Form::Split) => isa != Isa::Scalar,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, Form::U8S8) => is_x86_feature_detected!("avx512vnni"),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Form::U8S8) => is_x86_feature_detected!("avxvnni"),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon, Form::S8S8) => std::arch::is_aarch64_feature_detected!("dotprod"),
        #[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
        (Isa::WasmRelaxedSimd, form) => probe(form),
        _ => false,
    }
}

/// Computes relaxed products whose second operands exceed 127 and compares them with the exact ones, once per process:
/// an engine on x86 takes them as unsigned, and saturates without VNNI, one on Arm takes them as signed.
#[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
fn probe(form: Form) -> bool {
    use core::hint::black_box;
    static EXACT: std::sync::OnceLock<[bool; 3]> = std::sync::OnceLock::new();
    let exact = EXACT.get_or_init(|| {
        let mut exact = [true; 3];
        for x in [0u8, 1, 127, 128, 129, 200, 255] {
            for weight in [-128i8, -127, -1, 1, 64, 127] {
                // The compiler must not compute it: its idea of the instruction is not the engine's.
                let (w, a, acc) = black_box((i8x16_splat(weight), u8x16_splat(x), i32x4_splat(-7)));
                let got = i32x4_extract_lane::<2>(black_box(i32x4_relaxed_dot_i8x16_i7x16_add(w, a, acc)));
                exact[0] &= got == 4 * i32::from(weight) * i32::from(x) - 7;
                exact[1] &= got == 4 * i32::from(weight) * i32::from(x as i8) - 7;
            }
            // Neighbours that `Form::Split` allows.
            for [first, second] in [[-128i8, 0], [0, -128], [-64, -64], [64, 64], [1, 127], [127, 1], [-128, 127]] {
                let pair = i16::from_le_bytes([first as u8, second as u8]);
                let (w, a) = black_box((i16x8_splat(pair), u8x16_splat(x)));
                let got = i16x8_extract_lane::<5>(black_box(i16x8_relaxed_dot_i8x16_i7x16(w, a)));
                exact[2] &= i32::from(got) == (i32::from(first) + i32::from(second)) * i32::from(x);
            }
        }
        exact
    });
    match form {
        Form::Wide => true,
        Form::U8S8 => exact[0],
        Form::S8S8 => exact[1],
        Form::Split => exact[2],
    }
}

/// Runs `kernel` with the vectors of `isa` and products of `form`.
///
/// # Panics
/// If one of them is not available; see [`dispatch`](super::dispatch()) and [`Form::available`].
#[inline]
pub(crate) fn dispatch_dot<K: DotKernel>(isa: Isa, form: Form, kernel: K) -> K::Output {
    match (isa, form) {
        (_, Form::Wide) => dispatch(isa, OnWide(kernel)),
        #[cfg(any(test, target_arch = "x86_64", all(target_arch = "wasm32", target_feature = "relaxed-simd")))]
        (_, Form::Split) => dispatch(isa, OnSplit(kernel)),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were looked for.
        (Isa::Avx512, Form::U8S8) if available(isa, form) => unsafe { trampolines::vnni(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were looked for.
        (Isa::Avx2, Form::U8S8) if available(isa, form) => unsafe { trampolines::avx_vnni(kernel) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the features were looked for.
        (Isa::Neon, Form::S8S8) if available(isa, form) => unsafe { trampolines::sdot(kernel) },
        #[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
        // SAFETY: this module is compiled for relaxed-simd.
        (Isa::WasmRelaxedSimd, _) => kernel.run(Relaxed(unsafe { super::wasm::RelaxedSimd::new() })),
        #[cfg(test)]
        (_, Form::U8S8) => dispatch(isa, emulation::On::<K, false>(kernel)),
        #[cfg(test)]
        (_, Form::S8S8) => dispatch(isa, emulation::On::<K, true>(kernel)),
        #[allow(unreachable_patterns)]
        _ => unreachable!("no dot product {form} with {isa}"),
    }
}

/// The forms of bytes from other instructions: slow, but exact on every machine.
#[cfg(test)]
mod emulation {
    use super::*;

    #[derive(Clone, Copy)]
    struct Bytes<S, const SIGNED: bool>(S);

    impl<S: Simd, const SIGNED: bool> Bytes<S, SIGNED> {
        /// Every other byte, from the first or the second on, as `i16`.
        #[inline(always)]
        fn half(self, x: S::I32, second: bool, signed: bool) -> S::I32 {
            let s = self.0;
            let x = s.and_i32(if second { s.shr_i32::<8>(x) } else { x }, s.splat_i16(0xff));
            if signed { s.sub_i16(s.xor_i32(x, s.splat_i16(0x80)), s.splat_i16(0x80)) } else { x }
        }
    }

    impl<S: Simd, const SIGNED: bool> Dot for Bytes<S, SIGNED> {
        type S = S;
        const FORM: Form = if SIGNED { Form::S8S8 } else { Form::U8S8 };
        #[inline(always)]
        fn simd(self) -> S {
            self.0
        }
        #[inline(always)]
        fn dot(self, acc: S::I32, a: S::I32, b: S::I32) -> S::I32 {
            let s = self.0;
            let even = s.dot_i16(self.half(a, false, SIGNED), self.half(b, false, true));
            let odd = s.dot_i16(self.half(a, true, SIGNED), self.half(b, true, true));
            s.add_i32(acc, s.add_i32(even, odd))
        }
    }

    pub(super) struct On<K, const SIGNED: bool>(pub(super) K);

    impl<K: DotKernel, const SIGNED: bool> Kernel for On<K, SIGNED> {
        type Output = K::Output;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> K::Output {
            self.0.run(Bytes::<S, SIGNED>(s))
        }
    }
}
