//! One vector trait, one implementation per instruction set.
//!
//! A value of a type that implements [`Simd`] proves that the instructions are there: natively it can only be made by
//! [`dispatch()`], which looked at the processor, and on wasm the module would not have loaded without them.
//!
//! A kernel is a struct with its operands that implements [`Kernel`]:
//!
//! ```
//! use weblane_kernels::simd::{Isa, Kernel, Simd, dispatch};
//!
//! struct Double<'a>(&'a mut [f32]);
//! impl Kernel for Double<'_> {
//!     type Output = ();
//!     #[inline(always)]
//!     fn run<S: Simd>(self, s: S) {
//!         let mut rest = self.0;
//!         while rest.len() >= S::LANES {
//!             let (head, tail) = rest.split_at_mut(S::LANES);
//!             s.store(head, s.add(s.load(head), s.load(head)));
//!             rest = tail;
//!         }
//!         if !rest.is_empty() {
//!             let x = s.load_partial(rest);
//!             s.store_partial(rest, s.add(x, x));
//!         }
//!     }
//! }
//! let mut x = [1.0; 19];
//! dispatch(Isa::best(), Double(&mut x));
//! assert_eq!(x, [2.0; 19]);
//! ```
//!
//! Everything that a kernel calls with an `S: Simd` value must be `#[inline(always)]`, because only the outermost
//! function of a dispatch carries the target features. For the same reason a parallel kernel dispatches inside each
//! task (a task is called through a pointer), not around the parallel loop.

/// Methods that are one expression of intrinsics each.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", all(target_arch = "wasm32", target_feature = "simd128")))]
macro_rules! wrap {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {$(
        // On targets whose baseline has the instructions the intrinsics are safe to call.
        #[allow(unused_unsafe)]
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $ret {
            // SAFETY: `self` exists only where the processor has the features of its type (see its `new`).
            unsafe { $body }
        }
    )*};
}

/// What is the same for every instruction set, given the pointer methods: slices, whole and in part.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", all(target_arch = "wasm32", target_feature = "simd128")))]
macro_rules! slice_methods {
    () => {
        #[inline(always)]
        fn load(self, x: &[f32]) -> Self::F32 {
            assert!(x.len() >= Self::LANES);
            // SAFETY: checked above.
            unsafe { self.load_ptr(x.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, x: &mut [f32], v: Self::F32) {
            assert!(x.len() >= Self::LANES);
            // SAFETY: checked above.
            unsafe { self.store_ptr(x.as_mut_ptr(), v) }
        }
    };
}

/// A value of which the compiler knows nothing, each time anew.
#[inline(always)]
pub(crate) fn opaque<T: Copy>(value: &T) -> T {
    // SAFETY: a reference.
    unsafe { core::ptr::read_volatile(value) }
}

/// [`Simd::load_partial`] and [`Simd::store_partial`] through a buffer.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", all(target_arch = "wasm32", target_feature = "simd128")))]
macro_rules! partial_methods {
    () => {
        #[inline(always)]
        fn load_partial(self, x: &[f32]) -> Self::F32 {
            // Most are whole, and a copy of unknown length is a call.
            if x.len() >= Self::LANES {
                return self.load(x);
            }
            let mut buffer = [0.0; Self::LANES];
            let n = x.len().min(Self::LANES);
            buffer[..n].copy_from_slice(&x[..n]);
            self.load(&buffer)
        }
        #[inline(always)]
        fn store_partial(self, x: &mut [f32], v: Self::F32) {
            if x.len() >= Self::LANES {
                return self.store(x, v);
            }
            let mut buffer = [0.0; Self::LANES];
            self.store(&mut buffer, v);
            let n = x.len().min(Self::LANES);
            x[..n].copy_from_slice(&buffer[..n]);
        }
    };
}

mod dispatch;
pub use dispatch::{Isa, IsaError, dispatch};
mod dot;
pub(crate) use dot::{Dot, DotKernel, available as dot_available, dispatch_dot};

pub(crate) mod interleave;
#[cfg(target_arch = "aarch64")]
mod neon;
// A wasm module with vectors has no use for it.
#[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
mod scalar;
#[cfg(test)]
mod tests;
/// Numbers in memory, as a reference to an array of them.
///
/// LLVM gives code for WebAssembly a vector constant wherever one is used, and V8 makes it anew there: three instructions on
/// x86, through a general register. A number in memory is one load. For that the compiler must not know what is there: the
/// address is read from a place that it has to take for changeable.
macro_rules! constants {
    ($($x:expr),+ $(,)?) => {{
        const DATA: &[f32; [$($x),+].len()] = &[$($x),+];
        #[cfg(not(target_arch = "wasm32"))]
        {
            DATA
        }
        #[cfg(target_arch = "wasm32")]
        {
            use core::sync::atomic::AtomicPtr;
            #[used]
            static ADDRESS: AtomicPtr<[f32; [$($x),+].len()]> = AtomicPtr::new(core::ptr::from_ref(DATA).cast_mut());
            // SAFETY: nobody writes the address.
            unsafe { &*ADDRESS.as_ptr().read() }
        }
    }};
}
pub(crate) use constants;

#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod wasm;
#[cfg(target_arch = "x86_64")]
mod x86;

/// A computation that is compiled once per instruction set.
pub trait Kernel {
    /// What the computation returns.
    type Output;
    /// Runs with the vectors of `S`. Mark it and all it calls `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Vectors of `f32` and `i32` with [`LANES`](Simd::LANES) lanes each.
///
/// Names carry the numerics. Where an operation has a cheap form with unspecified corner cases and an exact one, the
/// names say which is which: [`mul_add`](Simd::mul_add) may fuse and [`mul_add_exact`](Simd::mul_add_exact) always
/// rounds twice; [`min_fast`](Simd::min_fast) leaves NaN open and [`min`](Simd::min) propagates it.
pub trait Simd: Copy + Send + Sync + 'static {
    /// The instruction set this value stands for.
    const ISA: Isa;
    /// Number of 32-bit lanes: 1, 4, 8 or 16.
    const LANES: usize;
    /// A vector of `f32`.
    type F32: Copy + core::fmt::Debug;
    /// A vector of `i32`.
    type I32: Copy + core::fmt::Debug;
    /// A truth value per lane.
    type Mask: Copy + core::fmt::Debug;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F32;
    /// The first `LANES` elements of `x`. Panics if there are fewer.
    fn load(self, x: &[f32]) -> Self::F32;
    /// Writes `LANES` elements. Panics if `x` is shorter.
    fn store(self, x: &mut [f32], v: Self::F32);
    /// Up to `LANES` elements; missing lanes are zero.
    fn load_partial(self, x: &[f32]) -> Self::F32;
    /// Writes the first `min(x.len(), LANES)` lanes.
    fn store_partial(self, x: &mut [f32], v: Self::F32);
    /// Reads `LANES` elements at `p`.
    ///
    /// # Safety
    /// `p..p+LANES` must be readable. No alignment is needed.
    unsafe fn load_ptr(self, p: *const f32) -> Self::F32;
    /// Reads one element and copies it to all lanes.
    ///
    /// # Safety
    /// `p` must be readable.
    unsafe fn splat_ptr(self, p: *const f32) -> Self::F32;
    /// Writes `LANES` elements at `p`.
    ///
    /// # Safety
    /// `p..p+LANES` must be writable. No alignment is needed.
    unsafe fn store_ptr(self, p: *mut f32, v: Self::F32);

    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the instruction set can fuse, twice elsewhere.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a * b + c`, always rounded twice: the same bits on every instruction set.
    #[inline(always)]
    fn mul_add_exact(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        self.add(self.mul(a, b), c)
    }
    /// Square root, correctly rounded.
    fn sqrt(self, a: Self::F32) -> Self::F32;
    /// `-a`.
    fn neg(self, a: Self::F32) -> Self::F32;
    /// `|a|`.
    fn abs(self, a: Self::F32) -> Self::F32;
    /// Smaller of both; NaN if either is NaN; -0 is smaller than +0.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Larger of both; NaN if either is NaN; +0 is larger than -0.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Smaller of both; unspecified if either is NaN or for zeros of both signs.
    fn min_fast(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Larger of both; unspecified if either is NaN or for zeros of both signs.
    fn max_fast(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `lo` where `x < lo`, else `x`: a lower bound that lets NaN pass, at the cost of one instruction.
    #[inline(always)]
    fn at_least(self, x: Self::F32, lo: Self::F32) -> Self::F32 {
        self.select(self.lt(x, lo), lo, x)
    }
    /// `hi` where `hi < x`, else `x`: an upper bound that lets NaN pass, at the cost of one instruction.
    #[inline(always)]
    fn at_most(self, x: Self::F32, hi: Self::F32) -> Self::F32 {
        self.select(self.lt(hi, x), hi, x)
    }
    /// Nearest integer, ties to even.
    fn round(self, a: Self::F32) -> Self::F32;
    /// Largest integer not above.
    fn floor(self, a: Self::F32) -> Self::F32;
    /// Smallest integer not below.
    fn ceil(self, a: Self::F32) -> Self::F32;
    /// Integer part.
    fn trunc(self, a: Self::F32) -> Self::F32;

    /// `a < b`, false for NaN.
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a <= b`, false for NaN.
    fn le(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a == b`, false for NaN.
    fn eq(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// Lane of `a` where the mask is true, of `b` elsewhere.
    fn select(self, m: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Both.
    fn mask_and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Either.
    fn mask_or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Whether the mask is true in any lane.
    fn mask_any(self, m: Self::Mask) -> bool;

    /// All lanes `x`.
    fn splat_i32(self, x: i32) -> Self::I32;
    /// The first `LANES` elements of `x`. Panics if there are fewer.
    fn load_i32(self, x: &[i32]) -> Self::I32;
    /// Writes `LANES` elements. Panics if `x` is shorter.
    fn store_i32(self, x: &mut [i32], v: Self::I32);
    /// The first `LANES` elements of `x`, zero-extended. Panics if there are fewer.
    fn load_u16(self, x: &[u16]) -> Self::I32;
    /// Writes `LANES` elements, each of which must be in `0..=65535`. Panics if `x` is shorter.
    fn store_u16(self, x: &mut [u16], v: Self::I32);
    /// `a + b`, wrapping.
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a - b`, wrapping.
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a * b`, wrapping.
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise and.
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise or.
    fn or_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise exclusive or.
    fn xor_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Shift left by a constant number of bits.
    fn shl_i32<const BITS: u32>(self, a: Self::I32) -> Self::I32;
    /// Arithmetic shift right by a constant number of bits.
    fn shr_i32<const BITS: u32>(self, a: Self::I32) -> Self::I32;
    /// `a < b`, signed.
    fn lt_i32(self, a: Self::I32, b: Self::I32) -> Self::Mask;
    /// `a == b`.
    fn eq_i32(self, a: Self::I32, b: Self::I32) -> Self::Mask;
    /// Truncates toward zero. Lanes outside the range of `i32` (NaN too) are unspecified.
    fn to_i32_fast(self, a: Self::F32) -> Self::I32;
    /// Nearest `f32`.
    fn to_f32(self, a: Self::I32) -> Self::F32;
    /// The same bits as `i32`.
    fn bits(self, a: Self::F32) -> Self::I32;
    /// The same bits as `f32`.
    #[allow(clippy::wrong_self_convention)] // `self` proves the instructions, `a` is converted
    fn from_bits(self, a: Self::I32) -> Self::F32;

    /// Reads `LANES` elements at `p`.
    ///
    /// # Safety
    /// `p..p+LANES` must be readable. No alignment is needed.
    unsafe fn load_i32_ptr(self, p: *const i32) -> Self::I32;
    /// Reads one element and copies it to all lanes.
    ///
    /// # Safety
    /// `p` must be readable.
    unsafe fn splat_i32_ptr(self, p: *const i32) -> Self::I32;
    /// Writes `LANES` elements at `p`.
    ///
    /// # Safety
    /// `p..p+LANES` must be writable. No alignment is needed.
    unsafe fn store_i32_ptr(self, p: *mut i32, v: Self::I32);
    /// Two `i16` in each lane, all `x`.
    fn splat_i16(self, x: i16) -> Self::I32;
    /// `a + b` of two `i16` in each lane, wrapping.
    fn add_i16(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a - b` of two `i16` in each lane, wrapping.
    fn sub_i16(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// `a0 b0 + a1 b1` of the two `i16` in each lane, wrapping.
    fn dot_i16(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Two `i16` in each lane, `a0 b0 + a1 b1` and `a2 b2 + a3 b3` of its four bytes, saturating; those of `a` are
    /// unsigned, those of `b` signed.
    fn dot_pairs_u8_i8(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// The bytes of `a` at the places that `places` says, 0 to 15 each: in each sixteen of their own, or, with vectors of
    /// fewer, in all.
    fn permute_bytes(self, a: Self::I32, places: Self::I32) -> Self::I32;
    /// `2 LANES` bytes as `i16`, two in each lane.
    ///
    /// # Safety
    /// `p..p+2*LANES` must be readable.
    unsafe fn widen_bytes<const SIGNED: bool>(self, p: *const u8) -> Self::I32;
    /// `LANES` bytes as `i32`.
    ///
    /// # Safety
    /// `p..p+LANES` must be readable.
    unsafe fn load_bytes<const SIGNED: bool>(self, p: *const u8) -> Self::I32;
    /// What [`load_reals`](Self::load_reals) wants to have in a register.
    #[inline(always)]
    fn reals(self) -> Self::I32 {
        self.splat_i32(0)
    }
    /// `2 LANES` bytes, after an exclusive or with `flip` unsigned, less `zero`, an integer of at most `2^22`. With 128 and a
    /// zero that is 128 larger these are signed bytes. `constants` are [`reals`](Self::reals).
    ///
    /// # Safety
    /// `p..p+2*LANES` must be readable.
    #[inline(always)]
    unsafe fn load_reals(self, p: *const u8, flip: u8, zero: Self::F32, constants: Self::I32) -> [Self::F32; 2] {
        let _ = constants;
        // SAFETY: the caller's contract.
        let x = unsafe { [self.load_bytes::<false>(p), self.load_bytes::<false>(p.add(Self::LANES))] };
        let flip = self.splat_i32(flip.into());
        // Not `map`: a closure would not be compiled for the instruction set.
        [self.sub(self.to_f32(self.xor_i32(x[0], flip)), zero), self.sub(self.to_f32(self.xor_i32(x[1], flip)), zero)]
    }
    /// Writes `2 LANES` numbers as bytes, clamped to `-128..=127` if signed, else to `0..=255`.
    ///
    /// # Safety
    /// `p..p+2*LANES` must be writable.
    unsafe fn store_bytes<const SIGNED: bool>(self, p: *mut u8, v: [Self::I32; 2]);
    /// `store_bytes::<false>`, and then an exclusive or of each byte with `flip`. With 128 and elements that are 128 too large
    /// these are signed bytes: for a sign that is known late, which LLVM would make ten instructions of.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn store_flipped(self, p: *mut u8, v: [Self::I32; 2], flip: u8) {
        // SAFETY: the caller's contract.
        unsafe {
            self.store_bytes::<false>(p, v);
            if flip != 0 {
                core::slice::from_raw_parts_mut(p, 2 * Self::LANES).iter_mut().for_each(|byte| *byte ^= flip);
            }
        }
    }
    /// `2 LANES` bytes from each of two places as pairs of `i16`: a lane holds a byte of `a` below one of `b`.
    ///
    /// # Safety
    /// `2 * LANES` bytes at both must be readable.
    unsafe fn pair_bytes<const SIGNED: bool>(self, a: *const u8, b: *const u8) -> [Self::I32; 2];
    /// `4 LANES` bytes from each of four places: a lane holds a byte of each, that of the first one lowest.
    ///
    /// # Safety
    /// `4 * LANES` bytes at all of them must be readable.
    #[inline(always)]
    unsafe fn quad_bytes(self, [a, b, c, d]: [*const u8; 4]) -> [Self::I32; 4] {
        let mut quads = [self.splat_i32(0); 4];
        for (part, quad) in quads.iter_mut().enumerate() {
            let i = part * Self::LANES;
            // SAFETY: the caller's contract.
            unsafe {
                let low = self
                    .or_i32(self.load_bytes::<false>(a.add(i)), self.shl_i32::<8>(self.load_bytes::<false>(b.add(i))));
                let high = self.or_i32(
                    self.shl_i32::<16>(self.load_bytes::<false>(c.add(i))),
                    self.shl_i32::<24>(self.load_bytes::<false>(d.add(i))),
                );
                *quad = self.or_i32(low, high);
            }
        }
        quads
    }

    /// Sum of all lanes, in a tree whose shape depends on `LANES` only.
    fn reduce_add(self, a: Self::F32) -> f32;
    /// Largest lane; NaN if any lane is NaN.
    fn reduce_max(self, a: Self::F32) -> f32;
    /// Smallest lane; NaN if any lane is NaN.
    fn reduce_min(self, a: Self::F32) -> f32;
}
