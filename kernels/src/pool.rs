//! Pooling: maximum, average and p-norm over sliding windows.
//!
//! ```text
//! channels last:  for each row (n, od, oh), in parallel
//!                     windows that overlap:
//!                         column[w, channels] = combine x[d, h, w, channels] over d and h, for each w that windows have
//!                         y[ow, channels]     = combine column[w, channels] over w
//!                     others:
//!                         y[ow, channels]     = combine x[d, h, w, channels] over d, h and w
//! channels first: for each plane (n, c), in parallel
//!                     the same with one channel, taps of a row read as they lie
//! ```
//!
//! Combining columns first does the work of a window's rows once for all windows that share a column: 13 x 13 windows at
//! each pixel take 24 steps instead of 168. A maximum that propagates NaN is many instructions on WebAssembly, so that
//! a row is first computed with one that does not, while a sum of `0 * x` tells whether there was a NaN or an infinity;
//! only then it is done again.

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
/// If the slices do not have the sizes of the shape, and for p-norms of channels last.
pub fn pool(cx: &Cx, op: PoolOp, shape: &PoolShape, layout: Layout, x: &[f32], out: &mut [f32]) -> Result<()> {
    shape.check(x.len(), out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let cost = (out.len() as u64).saturating_mul(shape.kernel.iter().product::<usize>() as u64);
    match layout {
        Layout::Nhwc => {
            let end = match op {
                PoolOp::Max => End::Max,
                PoolOp::Average { include_pad } => End::Mean { include_pad },
                PoolOp::Lp { .. } => return Err(Error::new("p-norms over windows are computed channels first only")),
            };
            let row = shape.output[2] * shape.channels;
            let out = DisjointMut::new(out);
            let chunk = shape.shared_columns();
            let scratch = chunk.map_or(0, |chunk| shape.reach(chunk) * shape.channels);
            cx.for_each_scratch(shape.batch * shape.output[0] * shape.output[1], cost, scratch, &|task, columns| {
                // SAFETY: each task has its own row.
                let out = unsafe { out.range(task * row, row) };
                dispatch(cx.isa(), Row { end, shape, x, task, out, columns, chunk });
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

/// Vectors that are combined at once.
const BLOCK: usize = 4;
/// Elements of columns that are kept at once; 64 KiB.
const COLUMNS: usize = 1 << 14;

impl PoolShape {
    /// Columns of the input from the first tap of a window to the last one of that `windows - 1` after it.
    fn reach(&self, windows: usize) -> usize {
        let taps = (self.kernel[2] - 1).saturating_mul(self.dilations[2].max(1)).saturating_add(1);
        (windows - 1).saturating_mul(self.strides[2]).saturating_add(taps).min(self.input[2])
    }

    /// Of how many windows columns are combined before rows, if that saves work.
    fn shared_columns(&self) -> Option<usize> {
        let overlap = self.strides[2] < self.kernel[2] && self.kernel[0].saturating_mul(self.kernel[1]) > 1;
        if !overlap {
            return None;
        }
        let columns = (COLUMNS / self.channels).max(self.reach(1));
        Some(((columns - self.reach(1)) / self.strides[2] + 1).min(self.output[2]))
    }
}

/// What is made of a window, channels last.
#[derive(Clone, Copy)]
enum End {
    Max,
    Mean { include_pad: bool },
}

/// One row of windows, channels last.
struct Row<'a> {
    end: End,
    shape: &'a PoolShape,
    x: &'a [f32],
    task: usize,
    out: &'a mut [f32],
    /// Room for the columns of `chunk` windows.
    columns: &'a mut [f32],
    chunk: Option<usize>,
}

impl Kernel for Row<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        match self.end {
            End::Max => {
                let zero = s.splat(0.0);
                let watched =
                    self.rows(s, f32::NEG_INFINITY, |acc, x| s.at_least(x, acc), |seen, x| s.mul_add(x, zero, seen));
                if watched.into_iter().any(|sum| s.reduce_add(sum) != 0.0) {
                    max_row(self.shape, self.x, self.task, self.out, f32::NEG_INFINITY, larger);
                }
            }
            End::Mean { include_pad } => {
                self.rows(s, 0.0, |acc, x| s.add(acc, x), |seen, _| seen);
                self.divide(s, include_pad);
            }
        }
    }
}

impl Row<'_> {
    /// Elements of the windows of this row combined, and what `watch` made of all elements of the input.
    #[inline(always)]
    fn rows<S: Simd>(
        &mut self,
        s: S,
        start: f32,
        combine: impl Fn(S::F32, S::F32) -> S::F32,
        watch: impl Fn(S::F32, S::F32) -> S::F32,
    ) -> [S::F32; BLOCK] {
        let p = self.shape;
        let [id, ih, iw] = p.input;
        let (c, windows) = (p.channels, p.output[2]);
        let dilations = p.dilations.map(|d| d.max(1));
        let (oh, rest) = (self.task % p.output[1], self.task / p.output[1]);
        let (od, n) = (rest % p.output[0], rest / p.output[0]);
        let (d0, dn, ..) = p.taps(0, od);
        let (h0, hn, ..) = p.taps(1, oh);
        let depth = (dn, dilations[0] * ih * iw * c);
        let height = (hn, dilations[1] * iw * c);
        let x = self.x.as_ptr().wrapping_add(((n * id + d0) * ih + h0) * iw * c);
        let mut seen = [s.splat(0.0); BLOCK];
        for first in (0..windows).step_by(self.chunk.unwrap_or(windows)) {
            let chunk = first..(first + self.chunk.unwrap_or(windows)).min(windows);
            let taps = |ow: usize| p.taps(2, ow);
            // Where windows find their taps, how far it is from column to column, and what is left to combine.
            let (mut from, mut before, mut rest) = (x, 0, [depth, height]);
            if self.chunk.is_some() {
                let inside = || chunk.clone().map(taps).filter(|&(_, wn, ..)| wn > 0);
                before = inside().map(|(w0, ..)| w0).min().unwrap_or(0);
                let end = inside().map(|(w0, wn, ..)| w0 + (wn - 1) * dilations[2] + 1).max().unwrap_or(0);
                let columns = &mut self.columns[..(end - before.min(end)) * c];
                // SAFETY: taps lie inside the input, whose size was checked.
                seen = unsafe {
                    fold(
                        s,
                        x.wrapping_add(before * c),
                        [depth, height, (1, 0)],
                        columns,
                        start,
                        &combine,
                        (&watch, seen),
                    )
                };
                (from, rest) = (columns.as_ptr(), [(1, 0); 2]);
            }
            for ow in chunk.clone() {
                let (w0, wn, ..) = taps(ow);
                let x = from.wrapping_add((w0 - before.min(w0)) * c);
                let taps = [rest[0], rest[1], (wn, dilations[2] * c)];
                let out = &mut self.out[ow * c..][..c];
                // SAFETY: as above, or inside the columns.
                seen = unsafe { fold(s, x, taps, out, start, &combine, (&watch, seen)) };
            }
        }
        seen
    }

    /// Makes means of sums: by how many elements of a window lie inside of the input, or of the padded one.
    #[inline(always)]
    fn divide<S: Simd>(&mut self, s: S, include_pad: bool) {
        let p = self.shape;
        let (oh, od) = (self.task % p.output[1], self.task / p.output[1] % p.output[0]);
        let count = |(_, inside, padded, _): (usize, usize, usize, usize)| if include_pad { padded } else { inside };
        let lines = count(p.taps(0, od)) * count(p.taps(1, oh));
        for (ow, out) in self.out.chunks_exact_mut(p.channels).enumerate() {
            let factor = 1.0 / (lines * count(p.taps(2, ow))) as f32;
            for part in out.chunks_mut(S::LANES) {
                let whole = part.len() == S::LANES;
                let sum = if whole { s.load(part) } else { s.load_partial(part) };
                let mean = s.mul(sum, s.splat(factor));
                if whole { s.store(part, mean) } else { s.store_partial(part, mean) }
            }
        }
    }
}

/// The larger number, NaN if either is.
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// One row of largest elements, channels last, of any type; a window without elements gives `least`.
pub(crate) fn max_row<T: Copy>(
    p: &PoolShape,
    x: &[T],
    row: usize,
    out: &mut [T],
    least: T,
    larger: impl Fn(T, T) -> T,
) {
    let (c, [id, ih, iw]) = (p.channels, p.input);
    let (y, rest) = (row % p.output[1], row / p.output[1]);
    let (z, b) = (rest % p.output[0], rest / p.output[0]);
    let dilations = p.dilations.map(|d| d.max(1));
    let [(d0, dn, ..), (h0, hn, ..)] = [p.taps(0, z), p.taps(1, y)];
    for (column, out) in out.chunks_exact_mut(c).enumerate() {
        let (w0, wn, ..) = p.taps(2, column);
        out.fill(least);
        for d in 0..dn {
            for h in 0..hn {
                let line = ((b * id + d0 + d * dilations[0]) * ih + h0 + h * dilations[1]) * iw;
                for w in 0..wn {
                    let x = &x[(line + w0 + w * dilations[2]) * c..][..c];
                    // A plain loop over channels: the compiler has vectors for it.
                    out.iter_mut().zip(x).for_each(|(y, &x)| *y = larger(*y, x));
                }
            }
        }
    }
}

/// `out[j]` combines `start` and the elements `x[j + tap]` for all taps: how many there are along each axis, and how far
/// apart. Gives what `watch` makes of its start and all these elements.
///
/// # Safety
/// `out.len()` elements from each tap on must be readable.
// Not inlined on wasm: it is large, and called in two places.
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
unsafe fn fold<S: Simd>(
    s: S,
    x: *const f32,
    [depth, height, width]: [(usize, usize); 3],
    out: &mut [f32],
    start: f32,
    combine: &impl Fn(S::F32, S::F32) -> S::F32,
    (watch, mut seen): (&impl Fn(S::F32, S::F32) -> S::F32, [S::F32; BLOCK]),
) -> [S::F32; BLOCK] {
    let mut j = 0;
    while j < out.len() {
        let left = out.len() - j;
        let block = left >= BLOCK * S::LANES;
        let lanes = left.min(S::LANES);
        let mut acc = [s.splat(start); BLOCK];
        for d in 0..depth.0 {
            for h in 0..height.0 {
                let mut at = x.wrapping_add(j + d * depth.1 + h * height.1);
                for _ in 0..width.0 {
                    // SAFETY: promised by the caller.
                    unsafe {
                        if block {
                            for (i, (acc, seen)) in acc.iter_mut().zip(&mut seen).enumerate() {
                                let x = s.load_ptr(at.add(i * S::LANES));
                                *acc = combine(*acc, x);
                                *seen = watch(*seen, x);
                            }
                        } else {
                            let x = if lanes == S::LANES {
                                s.load_ptr(at)
                            } else {
                                s.load_partial(core::slice::from_raw_parts(at, lanes))
                            };
                            acc[0] = combine(acc[0], x);
                            seen[0] = watch(seen[0], x);
                        }
                    }
                    at = at.wrapping_add(width.1);
                }
            }
        }
        if block {
            for (out, acc) in out[j..].chunks_exact_mut(S::LANES).zip(acc) {
                s.store(out, acc);
            }
            j += BLOCK * S::LANES;
        } else {
            s.store_partial(&mut out[j..j + lanes], acc[0]);
            j += lanes;
        }
    }
    seen
}

/// One plane, channels first.
fn pool_plane(op: PoolOp, p: &PoolShape, x: &[f32], out: &mut [f32]) {
    let power = |v: f32, e: f32| match e {
        1.0 => v.abs(),
        2.0 => v * v,
        e => v.abs().powf(e),
    };
    match op {
        PoolOp::Max => windows(p, x, out, f32::NEG_INFINITY, larger, |a, _, _| a),
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
    let (from, to) = (shape.input.iter().product::<usize>(), shape.output.iter().product::<usize>());
    for plane in 0..shape.batch * shape.channels {
        let x = &x[plane * from..][..from];
        // Places are looked for among doubles, so that the loop is compiled once; the maxima are taken from x.
        let doubles: Vec<f64> = x.iter().map(|v| v.to_f64()).collect();
        for (i, y) in out[plane * to..][..to].iter_mut().enumerate() {
            let [id, ih, iw] = shape.input;
            // A window of nothing but padding has no place.
            let place = place_of_maximum(shape, &doubles, i);
            *y = place.map_or(T::LEAST, |[d, h, w]| x[(d * ih + h) * iw + w]);
            let [d, h, w] = place.unwrap_or_default();
            if let Some(indices) = indices.as_deref_mut() {
                let index = if column_major { (w * ih + h) * id + d } else { (d * ih + h) * iw + w };
                indices[plane * to + i] = (plane * from + index) as i64;
            }
        }
    }
    Ok(())
}

/// The place `[d, h, w]` of the largest element, the first of equal ones, of the window of an output element of a plane.
fn place_of_maximum(p: &PoolShape, x: &[f64], output: usize) -> Option<[usize; 3]> {
    let [_, ih, iw] = p.input;
    let [_, oh, ow] = p.output;
    let (d0, dn, ..) = p.taps(0, output / ow / oh);
    let (h0, hn, ..) = p.taps(1, output / ow % oh);
    let (w0, wn, ..) = p.taps(2, output % ow);
    let mut best: Option<(f64, [usize; 3])> = None;
    for d in (0..dn).map(|i| d0 + i * p.dilations[0]) {
        for h in (0..hn).map(|i| h0 + i * p.dilations[1]) {
            for w in (0..wn).map(|i| w0 + i * p.dilations[2]) {
                let value = x[(d * ih + h) * iw + w];
                // NaN is the largest, and the first one stays.
                if best.is_none_or(|(best, _)| value > best || (value.is_nan() && !best.is_nan())) {
                    best = Some((value, [d, h, w]));
                }
            }
        }
    }
    best.map(|(_, place)| place)
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

    /// Windows of one pixel over one.
    const ONE: PoolShape = PoolShape {
        batch: 1,
        channels: 1,
        input: [1; 3],
        output: [1; 3],
        kernel: [1; 3],
        strides: [1; 3],
        dilations: [1; 3],
        begin: [0; 3],
        end: [0; 3],
    };

    fn shapes() -> Vec<PoolShape> {
        let (input, output) = ([1, 6, 7], [1, 6, 7]);
        let base = PoolShape { batch: 2, input, output, kernel: [1, 3, 3], begin: [0, 1, 1], end: [0, 1, 1], ..ONE };
        let strided = PoolShape { strides: [1, 2, 2], output: [1, 3, 4], ..base };
        let dilated = PoolShape { dilations: [1, 2, 2], begin: [0; 3], end: [0; 3], output: [1, 2, 3], ..base };
        // The last window reaches beyond the padding, as ceil mode has it.
        let ceil = PoolShape { strides: [1, 2, 2], begin: [0; 3], end: [0; 3], output: [1, 3, 3], ..base };
        let cube =
            PoolShape { input: [3, 4, 5], kernel: [2, 2, 2], begin: [0; 3], end: [0; 3], output: [2, 3, 4], ..base };
        let wide = PoolShape { kernel: [1, 5, 5], begin: [0, 2, 2], end: [0, 2, 2], ..base };
        // More columns than are kept at once.
        let long = PoolShape { channels: 19, batch: 1, input: [1, 2, 900], output: [1, 2, 900], ..base };
        [base, strided, dilated, ceil, cube, wide]
            .into_iter()
            .flat_map(|s| [1, 3, 4, 5, 8, 16, 19].map(|channels| PoolShape { channels, ..s }))
            .chain([long])
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
                    if matches!(op, PoolOp::Lp { .. }) {
                        assert!(pool(cx, op, &shape, Layout::Nhwc, &last, &mut got).is_err());
                        continue;
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
        let shape = PoolShape { input: [1, 1, 4], output: [1, 1, 3], kernel: [1, 1, 2], ..ONE };
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
    fn shared_columns_keep_what_is_not_finite() {
        let (input, output) = ([1, 8, 7], [1, 8, 7]);
        let shape =
            PoolShape { channels: 9, input, output, kernel: [1, 3, 3], begin: [0, 1, 1], end: [0, 1, 1], ..ONE };
        each_context(|cx| {
            for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for (h, w, c) in [(0, 0, 0), (3, 4, 8), (7, 6, 3)] {
                    let mut x = vec![-1.0; 8 * 7 * 9];
                    x[(h * 7 + w) * 9 + c] = special;
                    let mut y = vec![0.0; x.len()];
                    pool(cx, PoolOp::Max, &shape, Layout::Nhwc, &x, &mut y).unwrap();
                    for (i, y) in y.into_iter().enumerate() {
                        let (oh, ow) = (i / 9 / 7, i / 9 % 7);
                        let near = i % 9 == c && oh.abs_diff(h) <= 1 && ow.abs_diff(w) <= 1;
                        let want = if near && special != f32::NEG_INFINITY { special } else { -1.0 };
                        let equal = y == want || y.is_nan() && want.is_nan();
                        assert!(equal, "{special} at {h} {w} {c}: {y} at {oh} {ow}");
                    }
                }
            }
        });
    }

    #[test]
    fn indices_in_both_orders() {
        let shape = PoolShape { input: [1, 2, 3], kernel: [1, 2, 3], ..ONE };
        let x = [0i8, 0, 0, 0, 0, 9];
        let (mut y, mut i) = ([0], [0]);
        max_pool_indices(&shape, &x, &mut y, Some(&mut i), false).unwrap();
        assert_eq!((y, i), ([9], [5]));
        max_pool_indices(&shape, &[0i8, 9, 0, 0, 0, 0], &mut y, Some(&mut i), true).unwrap();
        assert_eq!((y, i), ([9], [2]));
        assert!(max_pool_indices(&shape, &x[1..], &mut y, None, false).is_err());
    }
}
