//! Dot products of short integers, the heart of [`crate::int8`]: one more choice beside the instruction set.
//!
//! A lane of 32 bits holds a group of neighbours along k: two `i16` or four bytes. An implementation of [`Dot`] adds to
//! each lane of an accumulator the products of the lanes of two operands, exactly. The kernels are generic over it, and
//! only they: the instructions that not every processor of an [`Isa`] has (VNNI, say) get functions of their own here.

use super::{Isa, Kernel, Simd, dispatch};
use crate::int8::Form;

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

/// Runs `kernel` with the vectors of `isa` and products of `form`.
///
/// # Panics
/// If one of them is not available; see [`dispatch`] and [`Form::available`].
#[inline]
pub(crate) fn dispatch_dot<K: DotKernel>(isa: Isa, form: Form, kernel: K) -> K::Output {
    match form {
        Form::Wide => dispatch(isa, OnWide(kernel)),
        #[cfg(test)]
        Form::U8S8 => dispatch(isa, emulation::On::<K, false>(kernel)),
        #[cfg(test)]
        Form::S8S8 => dispatch(isa, emulation::On::<K, true>(kernel)),
        #[cfg(not(test))]
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
