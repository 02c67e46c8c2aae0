//! What else happens to quantised tensors: tables, sums and products element by element, pooling.
//!
//! ```text
//! lookup   y = table[x]
//! binary   y = clamp(round(f(a - a_zero, b - b_zero)) + zero, lo, hi)
//! mean     y = clamp(round(f32(sum of (x - x_zero)) * (multiplier / count)) + zero, lo, hi)
//! ```
//!
//! Real numbers are `f32`, every operation rounded, halves to even: the same bits everywhere.

use super::output::{ROUND, load_bytes, round, store_bytes};
use super::{Bytes, BytesMut};
use crate::conv::check_len;
use crate::error::{Error, Result};
use crate::par::{Cx, DisjointMut};
use crate::pool::{PoolShape, max_row};
use crate::simd::{Kernel, Simd, dispatch};

/// Elements that make a task.
const TASK: usize = 16 * 1024;

/// `y[i] = table[x[i]]`, where both count as unsigned bytes.
///
/// # Errors
/// If the lengths differ.
pub fn lookup(cx: &Cx<'_>, x: &[u8], table: &[u8; 256], y: &mut [u8]) -> Result<()> {
    check_len("the output", y.len(), x.len())?;
    let out = DisjointMut::new(y);
    cx.for_each(x.len().div_ceil(TASK), x.len() as u64, &|task| {
        let from = task * TASK;
        let x = &x[from..(from + TASK).min(x.len())];
        // SAFETY: tasks write different parts.
        let y = unsafe { out.range(from, x.len()) };
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = table[usize::from(x)]);
    });
    Ok(())
}

/// [`lookup`] in place.
pub fn lookup_in_place(cx: &Cx<'_>, table: &[u8; 256], y: &mut [u8]) {
    let (len, out) = (y.len(), DisjointMut::new(y));
    cx.for_each(len.div_ceil(TASK), len as u64, &|task| {
        let from = task * TASK;
        // SAFETY: tasks write different parts.
        let y = unsafe { out.range(from, TASK.min(len - from)) };
        y.iter_mut().for_each(|y| *y = table[usize::from(*y)]);
    });
}

/// What [`binary`] computes of `a` and `b`, the operands minus their zero points.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Function {
    /// `a first + b second`: each scale over that of the result.
    Add {
        /// Factor of a.
        first: f32,
        /// Factor of b.
        second: f32,
    },
    /// `a b scale`: the product of both scales over that of the result.
    Mul {
        /// Factor of the product.
        scale: f32,
    },
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Binary {
    /// The function.
    pub function: Function,
    /// Zero points of the operands.
    pub zeros: [i32; 2],
    /// Added to the sum before it is rounded: onnxruntime's own operators add the zero point there, which decides where
    /// halves go.
    pub offset: f32,
    /// Zero point of the result.
    pub zero: i32,
    /// Least result.
    pub lo: i32,
    /// Largest result.
    pub hi: i32,
}

/// Combines two tensors, each of which is repeated until it has the length of `y`.
///
/// # Errors
/// If a length does not divide that of `y`, bounds do not lie in the range of its type, zero points not in that of
/// theirs, or factors are not finite.
pub fn binary(cx: &Cx<'_>, f: &Binary, a: Bytes<'_>, b: Bytes<'_>, mut y: BytesMut<'_>) -> Result<()> {
    for (name, x, zero) in [("the first operand", &a, f.zeros[0]), ("the second operand", &b, f.zeros[1])] {
        x.check_zero(name, zero)?;
        if !y.is_empty() && (x.is_empty() || !y.len().is_multiple_of(x.len())) {
            return Err(Error::new(format!("{name} has {} elements, the output {}", x.len(), y.len())));
        }
    }
    let factors = match f.function {
        Function::Add { first, second } => [first, second],
        Function::Mul { scale } => [scale, 0.0],
    };
    factors.iter().chain(&[f.offset]).try_for_each(|&factor| super::check_factor(factor))?;
    y.check_bounds(f.lo, f.hi, f.zero)?;
    let len = y.len();
    // Where both run on: up to the ends of the shorter operands, but a single element has none.
    let period = |x: &Bytes<'_>| if x.len() == 1 { len } else { x.len() };
    let (pa, pb) = (period(&a), period(&b));
    let (signed, to) = y.raw();
    let out = Out(to);
    cx.for_each(len.div_ceil(TASK), 8 * len as u64, &|task| {
        let (mut at, end) = (task * TASK, len.min((task + 1) * TASK));
        while at < end {
            let count = (end - at).min(pa - at % pa).min(pb - at % pb);
            let place = |x: &Bytes<'_>| if x.len() == 1 { None } else { Some(at % x.len()) };
            // SAFETY: tasks write different parts, all inside `y`.
            let y = unsafe { out.at(at) };
            dispatch(cx.isa(), Pairs { f, a: &a, b: &b, at: [place(&a), place(&b)], count, y, signed });
            at += count;
        }
    });
    Ok(())
}

/// An output that tasks write in part.
pub(super) struct Out(pub(super) *mut u8);
// SAFETY: tasks write disjoint parts.
unsafe impl Sync for Out {}
impl Out {
    /// # Safety
    /// The output must have more elements.
    pub(super) unsafe fn at(&self, i: usize) -> *mut u8 {
        self.0.wrapping_add(i)
    }
}

/// Whoever makes one promises that operands have `count` elements where they begin (one if that is nowhere), and that
/// `count` bytes at `y` may be written.
struct Pairs<'a> {
    f: &'a Binary,
    a: &'a Bytes<'a>,
    b: &'a Bytes<'a>,
    at: [Option<usize>; 2],
    count: usize,
    y: *mut u8,
    signed: bool,
}

impl Kernel for Pairs<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { f, a, b, at, count, y, signed } = self;
        let end = End::new(s, f.lo, f.hi, f.zero);
        let zeros = f.zeros;
        let mut i = 0;
        while i < count {
            let cols = (2 * S::LANES).min(count - i);
            // SAFETY: the contract of the type.
            unsafe {
                let a = match at[0] {
                    Some(at) => load_bytes(s, a, at + i, cols),
                    None => [s.splat_i32(a.get(0)); 2],
                };
                let b = match at[1] {
                    Some(at) => load_bytes(s, b, at + i, cols),
                    None => [s.splat_i32(b.get(0)); 2],
                };
                let mut v = a;
                for (v, b) in v.iter_mut().zip(b) {
                    let x = s.sub_i32(*v, s.splat_i32(zeros[0]));
                    let z = s.sub_i32(b, s.splat_i32(zeros[1]));
                    let real = match f.function {
                        Function::Add { first, second } => {
                            let first = s.mul(s.to_f32(x), s.splat(first));
                            s.add(first, s.mul(s.to_f32(z), s.splat(second)))
                        }
                        Function::Mul { scale } => s.mul(s.to_f32(s.mul_i32(x, z)), s.splat(scale)),
                    };
                    *v = end.apply(s, s.add(real, s.splat(f.offset)));
                }
                store_bytes(s, y.add(i), v, cols, signed);
            }
            i += cols;
        }
    }
}

/// `clamp(round(x) + zero, lo, hi)` for an x that is not NaN.
#[derive(Clone, Copy)]
pub(super) struct End<S: Simd> {
    lo: S::F32,
    hi: S::F32,
    round: S::F32,
    back: S::I32,
}

impl<S: Simd> End<S> {
    /// Bounds and zero are small.
    #[inline(always)]
    pub(super) fn new(s: S, lo: i32, hi: i32, zero: i32) -> Self {
        Self {
            lo: s.splat((lo - zero) as f32),
            hi: s.splat((hi - zero) as f32),
            round: round(s),
            back: s.splat_i32(ROUND.to_bits() as i32 - zero),
        }
    }

    #[inline(always)]
    pub(super) fn apply(self, s: S, x: S::F32) -> S::I32 {
        s.sub_i32(s.bits(s.add(s.at_most(s.at_least(x, self.lo), self.hi), self.round)), self.back)
    }
}

/// How [`mean`] quantises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mean {
    /// Zero point of the operand.
    pub x_zero: i32,
    /// Scale of the operand over that of the result.
    pub multiplier: f32,
    /// Zero point of the result.
    pub zero: i32,
    /// Least result.
    pub lo: i32,
    /// Largest result.
    pub hi: i32,
    /// Whether padding counts, as zeros.
    pub include_pad: bool,
}

/// Means over windows, channels last.
///
/// # Errors
/// If slices do not have the sizes of the shape, bounds do not lie in the range of `y`'s type, the zero point not in that
/// of `x`'s, or the multiplier is not finite.
pub fn mean(cx: &Cx<'_>, f: &Mean, shape: &PoolShape, x: Bytes<'_>, mut y: BytesMut<'_>) -> Result<()> {
    shape.check(x.len(), y.len())?;
    x.check_zero("the operand", f.x_zero)?;
    super::check_factor(f.multiplier)?;
    y.check_bounds(f.lo, f.hi, f.zero)?;
    if y.is_empty() {
        return Ok(());
    }
    let cost = (y.len() as u64).saturating_mul(shape.kernel.iter().product::<usize>() as u64);
    let row = shape.output[2] * shape.channels;
    let (signed, to) = y.raw();
    let out = Out(to);
    cx.for_each(shape.batch * shape.output[0] * shape.output[1], cost, &|task| {
        // SAFETY: each task has its own row.
        let y = unsafe { out.at(task * row) };
        dispatch(cx.isa(), MeanRow { f, shape, x: &x, task, y, signed });
    });
    Ok(())
}

/// A row of windows; `y` has all their channels.
struct MeanRow<'a> {
    f: &'a Mean,
    shape: &'a PoolShape,
    x: &'a Bytes<'a>,
    task: usize,
    y: *mut u8,
    signed: bool,
}

impl Kernel for MeanRow<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { f, shape, x, task, y, signed } = self;
        let [id, ih, iw] = shape.input;
        let (z, row) = (task / shape.output[1], task % shape.output[1]);
        let (b, z) = (z / shape.output[0], z % shape.output[0]);
        let [(dz, nz, pz, _), (dy, ny, py, _)] = [shape.taps(0, z), shape.taps(1, row)];
        let dilations = shape.dilations.map(|d| d.max(1));
        let end = End::new(s, f.lo, f.hi, f.zero);
        for column in 0..shape.output[2] {
            let (dx, nx, px, _) = shape.taps(2, column);
            let inside = nz * ny * nx;
            let count = if f.include_pad { pz * py * px } else { inside };
            let factor = s.splat(f.multiplier / count as f32);
            let zeros = s.splat_i32((inside as i32).wrapping_mul(f.x_zero));
            let mut c = 0;
            while c < shape.channels {
                let cols = (2 * S::LANES).min(shape.channels - c);
                let mut acc = [s.splat_i32(0); 2];
                for kz in 0..nz {
                    for ky in 0..ny {
                        let line = ((b * id + dz + kz * dilations[0]) * ih + dy + ky * dilations[1]) * iw;
                        for kx in 0..nx {
                            let pixel = line + dx + kx * dilations[2];
                            // SAFETY: `taps` counts those inside the input, whose size was checked.
                            let v = unsafe { load_bytes(s, x, pixel * shape.channels + c, cols) };
                            acc = [s.add_i32(acc[0], v[0]), s.add_i32(acc[1], v[1])];
                        }
                    }
                }
                let mut v = acc;
                for (v, acc) in v.iter_mut().zip(acc) {
                    // A window without elements has no mean; its sum is 0, and so is what is stored of it.
                    let real = s.mul(s.to_f32(s.sub_i32(acc, zeros)), if count == 0 { s.splat(0.0) } else { factor });
                    *v = end.apply(s, real);
                }
                // SAFETY: the contract of the type.
                unsafe { store_bytes(s, y.add(column * shape.channels + c), v, cols, signed) };
                c += cols;
            }
        }
    }
}

/// Largest elements of windows, channels last; a window without elements gives the least of the type.
///
/// # Errors
/// If slices do not have the sizes of the shape or are not of one type.
pub fn max_pool(cx: &Cx<'_>, shape: &PoolShape, x: Bytes<'_>, y: BytesMut<'_>) -> Result<()> {
    match (x, y) {
        (Bytes::U8(x), BytesMut::U8(y)) => max_pool_of(cx, shape, x, u8::MIN, y),
        (Bytes::I8(x), BytesMut::I8(y)) => max_pool_of(cx, shape, x, i8::MIN, y),
        _ => Err(Error::new("the largest of signed bytes is signed, that of unsigned ones is not")),
    }
}

fn max_pool_of<T: Copy + Ord + Send + Sync>(
    cx: &Cx<'_>,
    shape: &PoolShape,
    x: &[T],
    least: T,
    y: &mut [T],
) -> Result<()> {
    shape.check(x.len(), y.len())?;
    if y.is_empty() {
        return Ok(());
    }
    let cost = (y.len() as u64 / 4).saturating_mul(shape.kernel.iter().product::<usize>() as u64);
    let row = shape.output[2] * shape.channels;
    let out = DisjointMut::new(y);
    cx.for_each(shape.batch * shape.output[0] * shape.output[1], cost, &|task| {
        // SAFETY: each task has its own row.
        let y = unsafe { out.range(task * row, row) };
        max_row(shape, x, task, y, least, T::max);
    });
    Ok(())
}
