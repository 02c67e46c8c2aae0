//! Plain loops over any element type, for the types and operators whose speed nobody waits for.
//!
//! Each is also the textbook form that its vectorised counterpart is compared with.

use crate::conv::{ConvInput, ConvParams};
use crate::error::{Error, Result};

/// An element type with arithmetic. Integers wrap, as NumPy's do.
pub trait Number: Copy + PartialOrd + Send + Sync + 'static {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// `self + other`.
    fn plus(self, other: Self) -> Self;
    /// `self * other`.
    fn times(self, other: Self) -> Self;
    /// `|self|`.
    fn magnitude(self) -> Self;
    /// The nearest `f64`.
    fn to_f64(self) -> f64;
    /// From an `f64`: nearest for floats, truncated and saturated for integers.
    fn from_f64(v: f64) -> Self;
    /// Whether it is a byte, and then whether it is signed.
    const BYTE: Option<bool> = None;
    /// Smallest value (minus infinity for floats): the neutral element of `max`.
    const LEAST: Self;
    /// Largest value (infinity for floats): the neutral element of `min`.
    const GREATEST: Self;
}

macro_rules! integers {
    ($($t:ty, |$x:ident| $abs:expr;)*) => { $(impl Number for $t {
        const ZERO: Self = 0;
        const ONE: Self = 1;
        const LEAST: Self = <$t>::MIN;
        const GREATEST: Self = <$t>::MAX;
        const BYTE: Option<bool> = if size_of::<$t>() == 1 { Some(<$t>::MIN != 0) } else { None };
        fn plus(self, other: Self) -> Self { self.wrapping_add(other) }
        fn times(self, other: Self) -> Self { self.wrapping_mul(other) }
        fn magnitude(self) -> Self { let $x = self; $abs }
        fn to_f64(self) -> f64 { self as f64 }
        fn from_f64(v: f64) -> Self { v as $t }
    })* };
}
integers! {
    i8, |x| x.wrapping_abs();
    i16, |x| x.wrapping_abs();
    i32, |x| x.wrapping_abs();
    i64, |x| x.wrapping_abs();
    u8, |x| x;
    u16, |x| x;
    u32, |x| x;
    u64, |x| x;
}

macro_rules! floats {
    ($($t:ty)*) => { $(impl Number for $t {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const LEAST: Self = <$t>::NEG_INFINITY;
        const GREATEST: Self = <$t>::INFINITY;
        fn plus(self, other: Self) -> Self { self + other }
        fn times(self, other: Self) -> Self { self * other }
        fn magnitude(self) -> Self { self.abs() }
        fn to_f64(self) -> f64 { f64::from(self) }
        fn from_f64(v: f64) -> Self { v as $t }
    })* };
}
floats! { f32 f64 }

/// `c = a b` with `[m, n, k]` sizes; operands are reached by `[row, column]` strides, c is dense.
///
/// # Panics
/// If a slice is shorter than the sizes want.
pub fn matmul<T: Number>(
    a: &[T],
    a_strides: [usize; 2],
    b: &[T],
    b_strides: [usize; 2],
    c: &mut [T],
    [m, n, k]: [usize; 3],
) {
    for i in 0..m {
        let row = &mut c[i * n..][..n];
        row.fill(T::ZERO);
        for p in 0..k {
            let x = a[i * a_strides[0] + p * a_strides[1]];
            for (j, y) in row.iter_mut().enumerate() {
                *y = y.plus(x.times(b[p * b_strides[0] + j * b_strides[1]]));
            }
        }
    }
}

/// `y = alpha y + beta c` with c of at most two axes broadcast to `[m, n]`. Factors are applied in `f64`.
///
/// # Panics
/// If c does not broadcast.
pub fn scale_add<T: Number>(y: &mut [T], [m, n]: [usize; 2], alpha: f64, beta: f64, c: Option<(&[T], &[usize])>) {
    if alpha != 1.0 {
        y.iter_mut().for_each(|v| *v = T::from_f64(v.to_f64() * alpha));
    }
    let Some((c, dims)) = c else { return };
    let at = |i: usize| dims.len().checked_sub(i).map_or(1, |j| dims[j]);
    let (col, row) = (usize::from(at(1) != 1), if at(2) == 1 { 0 } else { at(1) });
    for i in 0..m {
        for j in 0..n {
            let v = c[i * row + j * col];
            let v = if beta == 1.0 { v } else { T::from_f64(v.to_f64() * beta) };
            y[i * n + j] = y[i * n + j].plus(v);
        }
    }
}

/// Convolution, channels first; see [`crate::conv`].
///
/// # Errors
/// If a window does not fit into the padded input.
///
/// # Panics
/// If a slice is shorter than the sizes want.
pub fn conv<T: Number>(
    p: &ConvParams,
    input: &ConvInput,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    let mut o = [0; 3];
    for (i, o) in o.iter_mut().enumerate() {
        let padded = input.spatial[i] + input.pads_begin[i] + input.pads_end[i];
        let extent = (p.kernel[i] - 1) * p.dilations[i] + 1;
        let room = padded.checked_sub(extent).ok_or_else(|| Error::new("the window does not fit into the input"))?;
        *o = room / p.strides[i] + 1;
    }
    let [id, ih, iw] = input.spatial;
    let (per_group_in, per_group_out) = (p.in_channels / p.groups, p.out_channels / p.groups);
    let [kd, kh, kw] = p.kernel;
    let inside = |o: usize, k: usize, axis: usize| {
        let at = o * p.strides[axis] + k * p.dilations[axis];
        at.checked_sub(input.pads_begin[axis]).filter(|&i| i < input.spatial[axis])
    };
    let mut at = 0;
    for n in 0..input.batch {
        for oc in 0..p.out_channels {
            for od in 0..o[0] {
                for oh in 0..o[1] {
                    for ow in 0..o[2] {
                        let mut sum = bias.map_or(T::ZERO, |b| b[oc]);
                        for ic in 0..per_group_in {
                            let plane = (n * p.in_channels + oc / per_group_out * per_group_in + ic) * id;
                            for z in 0..kd {
                                let Some(d) = inside(od, z, 0) else { continue };
                                for y in 0..kh {
                                    let Some(h) = inside(oh, y, 1) else { continue };
                                    for v in 0..kw {
                                        let Some(c) = inside(ow, v, 2) else { continue };
                                        let weight = w[(((oc * per_group_in + ic) * kd + z) * kh + y) * kw + v];
                                        sum = sum.plus(weight.times(x[((plane + d) * ih + h) * iw + c]));
                                    }
                                }
                            }
                        }
                        out[at] = sum;
                        at += 1;
                    }
                }
            }
        }
    }
    Ok(())
}
