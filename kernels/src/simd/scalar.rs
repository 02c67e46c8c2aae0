//! No vector instructions: one lane. The baseline of benches and the fallback of processors without any.

use super::{Isa, Simd};

/// One lane of plain Rust; there is nothing to prove.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    const ISA: Isa = Isa::Scalar;
    const LANES: usize = 1;
    type F32 = f32;
    type I32 = i32;
    type Mask = bool;

    #[inline(always)]
    fn splat(self, x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> f32 {
        x[0]
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: f32) {
        x[0] = v;
    }
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> f32 {
        x.first().copied().unwrap_or(0.0)
    }
    #[inline(always)]
    fn store_partial(self, x: &mut [f32], v: f32) {
        if let Some(x) = x.first_mut() {
            *x = v;
        }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> f32 {
        // SAFETY: the caller's contract.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_ptr(self, p: *const f32) -> f32 {
        // SAFETY: the caller's contract.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: f32) {
        // SAFETY: the caller's contract.
        unsafe { p.write_unaligned(v) }
    }

    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        a / b
    }
    // Not `f32::mul_add`: without the instruction that is a library call per element.
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    fn sqrt(self, a: f32) -> f32 {
        a.sqrt()
    }
    #[inline(always)]
    fn neg(self, a: f32) -> f32 {
        -a
    }
    #[inline(always)]
    fn abs(self, a: f32) -> f32 {
        a.abs()
    }
    #[inline(always)]
    fn min(self, a: f32, b: f32) -> f32 {
        match () {
            () if a < b => a,
            () if b < a => b,
            // Zeros of both signs: a set sign bit wins.
            () if a == b => f32::from_bits(a.to_bits() | b.to_bits()),
            () => a + b,
        }
    }
    #[inline(always)]
    fn max(self, a: f32, b: f32) -> f32 {
        match () {
            () if a > b => a,
            () if b > a => b,
            // Zeros of both signs: a clear sign bit wins.
            () if a == b => f32::from_bits(a.to_bits() & b.to_bits()),
            () => a + b,
        }
    }
    #[inline(always)]
    fn min_fast(self, a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }
    #[inline(always)]
    fn max_fast(self, a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    fn round(self, a: f32) -> f32 {
        a.round_ties_even()
    }
    #[inline(always)]
    fn floor(self, a: f32) -> f32 {
        a.floor()
    }
    #[inline(always)]
    fn ceil(self, a: f32) -> f32 {
        a.ceil()
    }
    #[inline(always)]
    fn trunc(self, a: f32) -> f32 {
        a.trunc()
    }

    #[inline(always)]
    fn lt(self, a: f32, b: f32) -> bool {
        a < b
    }
    #[inline(always)]
    fn le(self, a: f32, b: f32) -> bool {
        a <= b
    }
    #[inline(always)]
    fn eq(self, a: f32, b: f32) -> bool {
        a == b
    }
    #[inline(always)]
    fn select(self, m: bool, a: f32, b: f32) -> f32 {
        if m { a } else { b }
    }
    #[inline(always)]
    fn mask_and(self, a: bool, b: bool) -> bool {
        a & b
    }
    #[inline(always)]
    fn mask_or(self, a: bool, b: bool) -> bool {
        a | b
    }
    #[inline(always)]
    fn mask_any(self, m: bool) -> bool {
        m
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> i32 {
        x
    }
    #[inline(always)]
    fn load_i32(self, x: &[i32]) -> i32 {
        x[0]
    }
    #[inline(always)]
    fn store_i32(self, x: &mut [i32], v: i32) {
        x[0] = v;
    }
    #[inline(always)]
    fn load_u16(self, x: &[u16]) -> i32 {
        i32::from(x[0])
    }
    #[inline(always)]
    fn store_u16(self, x: &mut [u16], v: i32) {
        x[0] = v as u16;
    }
    #[inline(always)]
    fn add_i32(self, a: i32, b: i32) -> i32 {
        a.wrapping_add(b)
    }
    #[inline(always)]
    fn sub_i32(self, a: i32, b: i32) -> i32 {
        a.wrapping_sub(b)
    }
    #[inline(always)]
    fn mul_i32(self, a: i32, b: i32) -> i32 {
        a.wrapping_mul(b)
    }
    #[inline(always)]
    fn and_i32(self, a: i32, b: i32) -> i32 {
        a & b
    }
    #[inline(always)]
    fn or_i32(self, a: i32, b: i32) -> i32 {
        a | b
    }
    #[inline(always)]
    fn xor_i32(self, a: i32, b: i32) -> i32 {
        a ^ b
    }
    #[inline(always)]
    fn shl_i32<const BITS: u32>(self, a: i32) -> i32 {
        a << BITS
    }
    #[inline(always)]
    fn shr_i32<const BITS: u32>(self, a: i32) -> i32 {
        a >> BITS
    }
    #[inline(always)]
    fn lt_i32(self, a: i32, b: i32) -> bool {
        a < b
    }
    #[inline(always)]
    fn eq_i32(self, a: i32, b: i32) -> bool {
        a == b
    }
    #[inline(always)]
    fn to_i32_fast(self, a: f32) -> i32 {
        a as i32
    }
    #[inline(always)]
    fn to_f32(self, a: i32) -> f32 {
        a as f32
    }
    #[inline(always)]
    fn bits(self, a: f32) -> i32 {
        a.to_bits() as i32
    }
    #[inline(always)]
    fn from_bits(self, a: i32) -> f32 {
        f32::from_bits(a as u32)
    }

    #[inline(always)]
    unsafe fn load_i32_ptr(self, p: *const i32) -> i32 {
        // SAFETY: the caller's contract.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_i32_ptr(self, p: *const i32) -> i32 {
        // SAFETY: the caller's contract.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i32_ptr(self, p: *mut i32, v: i32) {
        // SAFETY: the caller's contract.
        unsafe { p.write_unaligned(v) }
    }
    #[inline(always)]
    fn splat_i16(self, x: i16) -> i32 {
        pair(x, x)
    }
    #[inline(always)]
    fn add_i16(self, a: i32, b: i32) -> i32 {
        pair((a as i16).wrapping_add(b as i16), ((a >> 16) as i16).wrapping_add((b >> 16) as i16))
    }
    #[inline(always)]
    fn sub_i16(self, a: i32, b: i32) -> i32 {
        pair((a as i16).wrapping_sub(b as i16), ((a >> 16) as i16).wrapping_sub((b >> 16) as i16))
    }
    #[inline(always)]
    fn dot_i16(self, a: i32, b: i32) -> i32 {
        (i32::from(a as i16) * i32::from(b as i16)).wrapping_add((a >> 16) * (b >> 16))
    }
    #[inline(always)]
    fn permute_bytes(self, a: i32, places: i32) -> i32 {
        let a = a.to_le_bytes();
        i32::from_le_bytes(places.to_le_bytes().map(|place| a[usize::from(place) % 4]))
    }
    #[inline(always)]
    fn dot_pairs_u8_i8(self, a: i32, b: i32) -> i32 {
        let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
        let product = |i: usize| i32::from(a[i]) * i32::from(b[i] as i8);
        let sum = |i: usize| (product(i) + product(i + 1)).clamp(i16::MIN.into(), i16::MAX.into()) as i16;
        pair(sum(0), sum(2))
    }
    #[inline(always)]
    unsafe fn widen_bytes<const SIGNED: bool>(self, p: *const u8) -> i32 {
        // SAFETY: the caller's contract.
        unsafe { pair(widen::<SIGNED>(*p), widen::<SIGNED>(*p.add(1))) }
    }
    #[inline(always)]
    unsafe fn load_bytes<const SIGNED: bool>(self, p: *const u8) -> i32 {
        // SAFETY: the caller's contract.
        unsafe { widen::<SIGNED>(*p).into() }
    }
    #[inline(always)]
    unsafe fn store_bytes<const SIGNED: bool>(self, p: *mut u8, v: [i32; 2]) {
        // SAFETY: the caller's contract.
        unsafe {
            for (i, v) in v.into_iter().enumerate() {
                *p.add(i) = if SIGNED { v.clamp(-128, 127) as u8 } else { v.clamp(0, 255) as u8 };
            }
        }
    }
    #[inline(always)]
    unsafe fn pair_bytes<const SIGNED: bool>(self, a: *const u8, b: *const u8) -> [i32; 2] {
        // SAFETY: the caller's contract.
        [0, 1].map(|i| unsafe { pair(widen::<SIGNED>(*a.add(i)), widen::<SIGNED>(*b.add(i))) })
    }

    #[inline(always)]
    fn reduce_add(self, a: f32) -> f32 {
        a
    }
    #[inline(always)]
    fn reduce_max(self, a: f32) -> f32 {
        a
    }
    #[inline(always)]
    fn reduce_min(self, a: f32) -> f32 {
        a
    }
}

/// Two `i16` in one lane, the first in the low half.
#[inline(always)]
fn pair(low: i16, high: i16) -> i32 {
    i32::from(low as u16) | i32::from(high) << 16
}

#[inline(always)]
fn widen<const SIGNED: bool>(x: u8) -> i16 {
    if SIGNED { (x as i8).into() } else { x.into() }
}
