//! What else happens to quantised tensors: tables, sums and products element by element, pooling.
//!
//! ```text
//! lookup   y = table[x]
//! binary   y = clamp(round(f(a - a_zero, b - b_zero)) + zero, lo, hi)
//! mean     y = clamp(round(f32(sum of (x - x_zero)) * (multiplier / count)) + zero, lo, hi)
//! ```
//!
//! Real numbers are `f32`, every operation rounded, halves to even: the same bits everywhere.

use super::{Bytes, BytesMut};
use crate::conv::check_len;
use crate::error::{Error, Result};
use crate::par::Cx;
use crate::pool::PoolShape;

/// `y[i] = table[x[i]]`, where both count as unsigned bytes.
///
/// # Errors
/// If the lengths differ.
pub fn lookup(_: &Cx<'_>, x: &[u8], table: &[u8; 256], y: &mut [u8]) -> Result<()> {
    check_len("the output", y.len(), x.len())?;
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = table[usize::from(x)]);
    Ok(())
}

/// [`lookup`] in place.
pub fn lookup_in_place(_: &Cx<'_>, table: &[u8; 256], y: &mut [u8]) {
    y.iter_mut().for_each(|y| *y = table[usize::from(*y)]);
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
#[derive(Clone, Copy, Debug)]
pub struct Binary {
    /// The function.
    pub function: Function,
    /// Zero points of the operands.
    pub zeros: [i32; 2],
    /// Zero point of the result.
    pub zero: i32,
    /// Least result.
    pub lo: i32,
    /// Largest result.
    pub hi: i32,
}

fn store(y: &mut BytesMut<'_>, i: usize, v: i32) {
    match y {
        BytesMut::U8(y) => y[i] = v as u8,
        BytesMut::I8(y) => y[i] = v as i8,
    }
}

fn end(real: f32, zero: i32, lo: i32, hi: i32) -> i32 {
    (real.round_ties_even() as i32).saturating_add(zero).clamp(lo, hi)
}

/// Combines two tensors, each of which is repeated until it has the length of `y`.
///
/// # Errors
/// If a length does not divide that of `y`.
pub fn binary(_: &Cx<'_>, f: &Binary, a: Bytes<'_>, b: Bytes<'_>, mut y: BytesMut<'_>) -> Result<()> {
    for (name, x) in [("the first operand", &a), ("the second operand", &b)] {
        if !y.is_empty() && (x.is_empty() || !y.len().is_multiple_of(x.len())) {
            return Err(Error::new(format!("{name} has {} elements, the output {}", x.len(), y.len())));
        }
    }
    for i in 0..y.len() {
        let (x, z) = (a.get(i % a.len()) - f.zeros[0], b.get(i % b.len()) - f.zeros[1]);
        let real = match f.function {
            Function::Add { first, second } => x as f32 * first + z as f32 * second,
            Function::Mul { scale } => (x * z) as f32 * scale,
        };
        store(&mut y, i, end(real, f.zero, f.lo, f.hi));
    }
    Ok(())
}

/// How [`mean`] quantises.
#[derive(Clone, Copy, Debug)]
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

/// Calls `f` for each result of a pooling: where it is, how many elements of its window count, with padding and without,
/// and where those inside are.
fn windows(shape: &PoolShape, mut f: impl FnMut(usize, [usize; 2], &mut dyn Iterator<Item = usize>)) {
    let s = shape;
    let taps = |axis: usize, o: usize| (0..s.kernel[axis]).map(move |k| o * s.strides[axis] + k * s.dilations[axis]);
    let inside = |axis: usize, o: usize| {
        taps(axis, o).filter_map(move |p| p.checked_sub(s.begin[axis]).filter(|&p| p < s.input[axis]))
    };
    let padded =
        |axis: usize, o: usize| taps(axis, o).filter(|&p| p < s.begin[axis] + s.input[axis] + s.end[axis]).count();
    let mut at = 0;
    for image in 0..s.batch {
        for z in 0..s.output[0] {
            for y in 0..s.output[1] {
                for x in 0..s.output[2] {
                    let counts = [
                        padded(0, z) * padded(1, y) * padded(2, x),
                        inside(0, z).count() * inside(1, y).count() * inside(2, x).count(),
                    ];
                    for channel in 0..s.channels {
                        let lines = inside(0, z).flat_map(|d| inside(1, y).map(move |h| d * s.input[1] + h));
                        let pixels = lines.flat_map(|line| inside(2, x).map(move |w| line * s.input[2] + w));
                        let size = s.input.iter().product::<usize>();
                        let mut places = pixels.map(|p| (image * size + p) * s.channels + channel);
                        f(at, counts, &mut places);
                        at += 1;
                    }
                }
            }
        }
    }
}

fn check(shape: &PoolShape, x: usize, y: usize) -> Result<()> {
    let volume = |s: [usize; 3]| crate::conv::volume(&[shape.batch, s[0], s[1], s[2], shape.channels]);
    check_len("the input", x, volume(shape.input)?)?;
    check_len("the output", y, volume(shape.output)?)
}

/// Means over windows, channels last.
///
/// # Errors
/// If slices do not have the sizes of the shape.
pub fn mean(_: &Cx<'_>, f: &Mean, shape: &PoolShape, x: Bytes<'_>, mut y: BytesMut<'_>) -> Result<()> {
    check(shape, x.len(), y.len())?;
    windows(shape, |at, [padded, inside], places| {
        let count = if f.include_pad { padded } else { inside };
        let sum: i32 = places.map(|i| x.get(i) - f.x_zero).sum();
        let real = if count == 0 { 0.0 } else { sum as f32 * (f.multiplier / count as f32) };
        store(&mut y, at, end(real, f.zero, f.lo, f.hi));
    });
    Ok(())
}

/// Largest elements of windows, channels last; a window without elements gives the least of the type.
///
/// # Errors
/// If slices do not have the sizes of the shape or are not of one type.
pub fn max_pool(_: &Cx<'_>, shape: &PoolShape, x: Bytes<'_>, mut y: BytesMut<'_>) -> Result<()> {
    check(shape, x.len(), y.len())?;
    let least = match (&x, &y) {
        (Bytes::U8(_), BytesMut::U8(_)) => 0,
        (Bytes::I8(_), BytesMut::I8(_)) => -128,
        _ => return Err(Error::new("the largest of signed bytes is signed, that of unsigned ones is not")),
    };
    windows(shape, |at, _, places| store(&mut y, at, places.map(|i| x.get(i)).max().unwrap_or(least)));
    Ok(())
}
