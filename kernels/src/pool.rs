//! Pooling: maximum, average and p-norm over sliding windows.
//!
//! ```text
//! channels last:  for each (n, od, oh), in parallel
//!                     for each ow, for each block of channels
//!                         acc = start; for each tap inside the input: acc = combine(acc, x[tap, channels])
//! channels first: for each plane (n, c), in parallel
//!                     the same with one channel, taps of a row read as they lie
//! ```

use crate::conv::Layout;
use crate::error::{Error, Result};
use crate::naive::Number;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};

/// Sizes of a pooling; spatial arrays are `[d, h, w]`, missing leading axes have size, kernel and stride 1.
#[derive(Clone, Copy, Debug)]
pub struct PoolShape {
    /// Number of images.
    pub batch: usize,
    /// Number of channels.
    pub channels: usize,
    /// Size of the input.
    pub input: [usize; 3],
    /// Size of the output. Windows may reach beyond the input on both sides.
    pub output: [usize; 3],
    /// Size of the window.
    pub kernel: [usize; 3],
    /// Steps between windows.
    pub strides: [usize; 3],
    /// Steps between elements of a window.
    pub dilations: [usize; 3],
    /// Padding before.
    pub begin: [usize; 3],
    /// Padding after.
    pub end: [usize; 3],
}

/// What is computed over a window. Padding takes no part, except that it may count for the average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PoolOp {
    /// Largest element; NaN if any is.
    Max,
    /// Mean.
    Average {
        /// Whether padding counts as zeros.
        include_pad: bool,
    },
    /// `(sum |x|^p)^(1/p)`.
    Lp {
        /// The exponent.
        p: f32,
    },
}

impl PoolShape {
    pub(crate) fn check(&self, x: usize, out: usize) -> Result<()> {
        let product = |spatial: [usize; 3]| {
            let start = self.batch.checked_mul(self.channels)?;
            spatial.iter().try_fold(start, |n, &d| n.checked_mul(d))
        };
        if product(self.input) != Some(x) || product(self.output) != Some(out) {
            return Err(Error::new(format!("{x} and {out} elements were given for the pooling {self:?}")));
        }
        if self.strides.contains(&0) || self.kernel.contains(&0) {
            return Err(Error::new("strides and window sizes must be at least 1"));
        }
        Ok(())
    }

    /// Taps of window `o` along `axis` that lie inside the input: first index into the input, number, and how many
    /// elements of the window lie inside the padded input.
    #[inline(always)]
    pub(crate) fn taps(&self, axis: usize, o: usize) -> (usize, usize, usize, usize) {
        let (d, begin, k) = (self.dilations[axis].max(1), self.begin[axis], self.kernel[axis]);
        let start = o * self.strides[axis];
        let skipped = begin.saturating_sub(start).div_ceil(d).min(k);
        let room = |limit: usize| limit.saturating_sub(start).div_ceil(d).min(k);
        let inside = room(begin + self.input[axis]).saturating_sub(skipped);
        let padded = room(begin + self.input[axis] + self.end[axis]);
        let first = (start + skipped * d).saturating_sub(begin);
        (first, inside, padded, skipped)
    }
}

/// Pools `x` into `out`, both in `layout`.
///
/// # Errors
/// If the slices do not have the sizes of the shape.
pub fn pool(cx: &Cx, op: PoolOp, shape: &PoolShape, layout: Layout, x: &[f32], out: &mut [f32]) -> Result<()> {
    shape.check(x.len(), out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let cost = (out.len() * shape.kernel.iter().product::<usize>()) as u64;
    match layout {
        Layout::Nhwc => {
            let row = shape.output[2] * shape.channels;
            let out = DisjointMut::new(out);
            cx.for_each(shape.batch * shape.output[0] * shape.output[1], cost, &|task| {
                // SAFETY: each task has its own row.
                let out = unsafe { out.range(task * row, row) };
                dispatch(cx.isa(), Row { op, shape, x, task, out });
            });
        }
        Layout::Nchw => {
            let (from, to) = (shape.input.iter().product(), shape.output.iter().product());
            let out = DisjointMut::new(out);
            cx.for_each(shape.batch * shape.channels, cost, &|plane| {
                // SAFETY: each task has its own plane.
                let out = unsafe { out.range(plane * to, to) };
                pool_plane(op, shape, &x[plane * from..][..from], out);
            });
        }
    }
    Ok(())
}

/// One row of windows, channels last.
struct Row<'a> {
    op: PoolOp,
    shape: &'a PoolShape,
    x: &'a [f32],
    task: usize,
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.op {
            PoolOp::Max => self.rows(s, f32::NEG_INFINITY, |acc, x| s.max(acc, x), |acc, _, _| acc),
            PoolOp::Average { include_pad } => self.rows(
                s,
                0.0,
                |acc, x| s.add(acc, x),
                |acc, inside, padded| s.mul(acc, s.splat(1.0 / if include_pad { padded } else { inside } as f32)),
            ),
            PoolOp::Lp { p: 2.0 } => self.rows(s, 0.0, |acc, x| s.mul_add(x, x, acc), |acc, _, _| s.sqrt(acc)),
            PoolOp::Lp { p: 1.0 } => self.rows(s, 0.0, |acc, x| s.add(acc, s.abs(x)), |acc, _, _| acc),
            PoolOp::Lp { p } => {
                let each = |v: S::F32, f: &dyn Fn(f32) -> f32| {
                    let mut lanes = [0.0; 16];
                    s.store(&mut lanes, v);
                    lanes.iter_mut().for_each(|x| *x = f(*x));
                    s.load(&lanes)
                };
                self.rows(
                    s,
                    0.0,
                    |acc, x| s.add(acc, each(x, &|x| x.abs().powf(p))),
                    |acc, _, _| each(acc, &|x| x.powf(1.0 / p)),
                );
            }
        }
    }
}

impl Row<'_> {
    #[inline(always)]
    fn rows<S: Simd>(
        self,
        s: S,
        start: f32,
        combine: impl Fn(S::F32, S::F32) -> S::F32,
        last: impl Fn(S::F32, usize, usize) -> S::F32,
    ) {
        let p = self.shape;
        let [_, ih, iw] = p.input;
        let c = p.channels;
        let (oh, rest) = (self.task % p.output[1], self.task / p.output[1]);
        let (od, n) = (rest % p.output[0], rest / p.output[0]);
        let (d0, dn, dp, _) = p.taps(0, od);
        let (h0, hn, hp, _) = p.taps(1, oh);
        for (ow, out) in self.out.chunks_exact_mut(c).enumerate() {
            let (w0, wn, wp, _) = p.taps(2, ow);
            let (inside, padded) = (dn * hn * wn, dp * hp * wp);
            let mut j = 0;
            while j < c {
                let width = (c - j).min(S::LANES);
                let mut acc = s.splat(start);
                for d in 0..dn {
                    let plane = (n * p.input[0] + d0 + d * p.dilations[0]) * ih;
                    for h in 0..hn {
                        let row = (plane + h0 + h * p.dilations[1]) * iw;
                        for w in 0..wn {
                            let x = &self.x[(row + w0 + w * p.dilations[2]) * c + j..];
                            acc = combine(acc, if width == S::LANES { s.load(x) } else { s.load_partial(&x[..width]) });
                        }
                    }
                }
                let y = last(acc, inside, padded);
                let to = &mut out[j..j + width];
                if width == S::LANES {
                    s.store(to, y)
                } else {
                    s.store_partial(to, y)
                }
                j += S::LANES;
            }
        }
    }
}

/// One plane, channels first.
fn pool_plane(op: PoolOp, p: &PoolShape, x: &[f32], out: &mut [f32]) {
    let power = |v: f32, e: f32| match e {
        1.0 => v.abs(),
        2.0 => v * v,
        e => v.abs().powf(e),
    };
    match op {
        PoolOp::Max => {
            windows(p, x, out, f32::NEG_INFINITY, |a, v| if v > a || v.is_nan() { v } else { a }, |a, _, _| a)
        }
        PoolOp::Average { include_pad } => {
            let mean = |a, inside: usize, padded: usize| a / if include_pad { padded } else { inside } as f32;
            windows(p, x, out, 0.0, |a, v| a + v, mean);
        }
        PoolOp::Lp { p: 2.0 } => windows(p, x, out, 0.0, |a, v| a + v * v, |a: f32, _, _| a.sqrt()),
        PoolOp::Lp { p: e } => windows(p, x, out, 0.0, |a, v| a + power(v, e), |a: f32, _, _| a.powf(1.0 / e)),
    }
}

/// The windows of one plane of any element type.
#[inline(always)]
fn windows<T: Copy>(
    p: &PoolShape,
    x: &[T],
    out: &mut [T],
    start: T,
    combine: impl Fn(T, T) -> T,
    last: impl Fn(T, usize, usize) -> T,
) {
    let [_, ih, iw] = p.input;
    let [_, oh, ow] = p.output;
    for (row, out) in out.chunks_exact_mut(ow.max(1)).enumerate() {
        let (d0, dn, dp, _) = p.taps(0, row / oh);
        let (h0, hn, hp, _) = p.taps(1, row % oh);
        for (o, y) in out.iter_mut().enumerate() {
            let (w0, wn, wp, _) = p.taps(2, o);
            let mut acc = start;
            for d in 0..dn {
                for h in 0..hn {
                    let row = ((d0 + d * p.dilations[0]) * ih + h0 + h * p.dilations[1]) * iw + w0;
                    for w in 0..wn {
                        acc = combine(acc, x[row + w * p.dilations[2]]);
                    }
                }
            }
            *y = last(acc, dn * hn * wn, dp * hp * wp);
        }
    }
}

/// Maximum over windows, channels first, of any element type; `indices` gets the position of each maximum in the whole
/// of x, counting columns first if `column_major` (of the plane's axes `d, h, w`).
///
/// # Errors
/// If the slices do not have the sizes of the shape.
pub fn max_pool_indices<T: Number>(
    shape: &PoolShape,
    x: &[T],
    out: &mut [T],
    mut indices: Option<&mut [i64]>,
    column_major: bool,
) -> Result<()> {
    shape.check(x.len(), out.len())?;
    if indices.as_ref().is_some_and(|i| i.len() != out.len()) {
        return Err(Error::new(format!("{} maxima want as many indices", out.len())));
    }
    let p = shape;
    let [id, ih, iw] = p.input;
    let plane_in: usize = p.input.iter().product();
    let [od, oh, ow] = p.output;
    let mut at = 0;
    for plane in 0..p.batch * p.channels {
        let x = &x[plane * plane_in..][..plane_in];
        for z in 0..od {
            let (d0, dn, ..) = p.taps(0, z);
            for y in 0..oh {
                let (h0, hn, ..) = p.taps(1, y);
                for v in 0..ow {
                    let (w0, wn, ..) = p.taps(2, v);
                    let mut best = (T::LEAST, 0);
                    let mut first = true;
                    for d in (0..dn).map(|i| d0 + i * p.dilations[0]) {
                        for h in (0..hn).map(|i| h0 + i * p.dilations[1]) {
                            for w in (0..wn).map(|i| w0 + i * p.dilations[2]) {
                                let value = x[(d * ih + h) * iw + w];
                                // A value that differs from itself is NaN; the first one stays.
                                #[allow(clippy::eq_op)]
                                if first || value > best.0 || (value != value && best.0 == best.0) {
                                    let index =
                                        if column_major { (w * ih + h) * id + d } else { (d * ih + h) * iw + w };
                                    best = (value, plane * plane_in + index);
                                    first = false;
                                }
                            }
                        }
                    }
                    out[at] = best.0;
                    if let Some(i) = indices.as_deref_mut() {
                        i[at] = best.1 as i64;
                    }
                    at += 1;
                }
            }
        }
    }
    Ok(())
}

/// Pools any element type, channels first; sums and means in `f64`.
///
/// # Errors
/// If the slices do not have the sizes of the shape.
pub fn pool_any<T: Number>(op: PoolOp, shape: &PoolShape, x: &[T], out: &mut [T]) -> Result<()> {
    if op == PoolOp::Max {
        return max_pool_indices(shape, x, out, None, false);
    }
    shape.check(x.len(), out.len())?;
    let (from, to) = (shape.input.iter().product::<usize>(), shape.output.iter().product::<usize>());
    let mut sums = vec![0.0f64; to];
    for plane in 0..shape.batch * shape.channels {
        let x: Vec<f64> = x[plane * from..][..from].iter().map(|v| v.to_f64()).collect();
        match op {
            PoolOp::Lp { p } => {
                let p = f64::from(p);
                windows(shape, &x, &mut sums, 0.0, |a, v| a + v.abs().powf(p), |a: f64, _, _| a.powf(1.0 / p));
            }
            PoolOp::Average { include_pad } => {
                let mean = |a, inside: usize, padded: usize| a / if include_pad { padded } else { inside } as f64;
                windows(shape, &x, &mut sums, 0.0, |a, v| a + v, mean);
            }
            PoolOp::Max => {}
        }
        for (y, v) in out[plane * to..][..to].iter_mut().zip(&sums) {
            *y = T::from_f64(*v);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::{each_context, integers};

    fn shapes() -> Vec<PoolShape> {
        let base = PoolShape {
            batch: 2,
            channels: 1,
            input: [1, 6, 7],
            output: [1, 6, 7],
            kernel: [1, 3, 3],
            strides: [1; 3],
            dilations: [1; 3],
            begin: [0, 1, 1],
            end: [0, 1, 1],
        };
        let strided = PoolShape { strides: [1, 2, 2], output: [1, 3, 4], ..base };
        let dilated = PoolShape { dilations: [1, 2, 2], begin: [0; 3], end: [0; 3], output: [1, 2, 3], ..base };
        // The last window reaches beyond the padding, as ceil mode has it.
        let ceil = PoolShape { strides: [1, 2, 2], begin: [0; 3], end: [0; 3], output: [1, 3, 3], ..base };
        let cube =
            PoolShape { input: [3, 4, 5], kernel: [2, 2, 2], begin: [0; 3], end: [0; 3], output: [2, 3, 4], ..base };
        [base, strided, dilated, ceil, cube]
            .into_iter()
            .flat_map(|s| [1, 3, 4, 5, 8, 16, 19].map(|channels| PoolShape { channels, ..s }))
            .collect()
    }

    #[test]
    fn both_layouts_match_the_reference() {
        let ops = [
            PoolOp::Max,
            PoolOp::Average { include_pad: false },
            PoolOp::Average { include_pad: true },
            PoolOp::Lp { p: 1.0 },
            PoolOp::Lp { p: 2.0 },
            PoolOp::Lp { p: 3.0 },
        ];
        each_context(|cx| {
            for shape in shapes() {
                let (from, to): (usize, usize) = (shape.input.iter().product(), shape.output.iter().product());
                let x = integers(shape.batch * shape.channels * from, 3);
                let last: Vec<f32> = (0..x.len())
                    .map(|i| {
                        let (c, rest) = (i % shape.channels, i / shape.channels);
                        x[(rest / from * shape.channels + c) * from + rest % from]
                    })
                    .collect();
                for op in ops {
                    let want = reference::pool(op, &shape, &x);
                    let mut got = vec![0.0; want.len()];
                    pool(cx, op, &shape, Layout::Nchw, &x, &mut got).unwrap();
                    let close = |a: f32, b: f64| (f64::from(a) - b).abs() <= 1e-5 * (1.0 + b.abs());
                    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                        assert!(close(*g, *w), "{op:?} {shape:?} at {i}: {g} for {w}");
                    }
                    pool(cx, op, &shape, Layout::Nhwc, &last, &mut got).unwrap();
                    for (i, g) in got.iter().enumerate() {
                        let (c, rest) = (i % shape.channels, i / shape.channels);
                        let w = want[(rest / to * shape.channels + c) * to + rest % to];
                        assert!(close(*g, w), "channels last {op:?} {shape:?} at {i}: {g} for {w}");
                    }
                }
            }
        });
    }

    #[test]
    fn not_a_number_is_the_maximum() {
        let shape = PoolShape {
            batch: 1,
            channels: 1,
            input: [1, 1, 4],
            output: [1, 1, 3],
            kernel: [1, 1, 2],
            strides: [1; 3],
            dilations: [1; 3],
            begin: [0; 3],
            end: [0; 3],
        };
        each_context(|cx| {
            for layout in [Layout::Nchw, Layout::Nhwc] {
                let mut y = [0.0; 3];
                pool(cx, PoolOp::Max, &shape, layout, &[f32::NAN, 1.0, 2.0, 3.0], &mut y).unwrap();
                assert!(y[0].is_nan());
                assert_eq!(y[1..], [2.0, 3.0]);
            }
        });
    }

    #[test]
    fn indices_in_both_orders() {
        let shape = PoolShape {
            batch: 1,
            channels: 1,
            input: [1, 2, 3],
            output: [1, 1, 1],
            kernel: [1, 2, 3],
            strides: [1; 3],
            dilations: [1; 3],
            begin: [0; 3],
            end: [0; 3],
        };
        let x = [0i8, 0, 0, 0, 0, 9];
        let (mut y, mut i) = ([0], [0]);
        max_pool_indices(&shape, &x, &mut y, Some(&mut i), false).unwrap();
        assert_eq!((y, i), ([9], [5]));
        max_pool_indices(&shape, &[0i8, 9, 0, 0, 0, 0], &mut y, Some(&mut i), true).unwrap();
        assert_eq!((y, i), ([9], [2]));
        assert!(max_pool_indices(&shape, &x[1..], &mut y, None, false).is_err());
    }
}
