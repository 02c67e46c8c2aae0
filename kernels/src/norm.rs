//! Normalisations: of rows (LayerNorm, RMSNorm), of channels or groups of them (InstanceNorm, GroupNorm), by stored
//! statistics (BatchNorm), by neighbours (LRN) and to unit length.
//!
//! ```text
//! for each row, in parallel
//!     mean = sum x / n;  var = sum (x - mean)^2 / n       two passes: E[x^2] - E[x]^2 cancels
//!     y = (x - mean) / sqrt(var + epsilon) * scale + bias
//! ```

use crate::error::{Error, Result};
use crate::naive::Number;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};

/// Elements that make a task.
const TASK: usize = 8 * 1024;

/// How scale and bias belong to the elements of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affine {
    /// One number per element of a row.
    PerElement,
    /// One number per run of `run` elements; rows take them in turn, beginning again after `channels`.
    PerChannel {
        /// Numbers in all.
        channels: usize,
        /// Elements that share one.
        run: usize,
    },
}

/// A normalisation of rows.
#[derive(Clone, Copy, Debug)]
pub struct Normalize<'a> {
    /// Length of a row.
    pub n: usize,
    /// Added to the variance.
    pub epsilon: f32,
    /// Whether the mean is subtracted; RMSNorm leaves it.
    pub center: bool,
    /// Factors; 1 if absent.
    pub scale: Option<&'a [f32]>,
    /// Addends; 0 if absent.
    pub bias: Option<&'a [f32]>,
    /// Which of them an element takes.
    pub affine: Affine,
}

/// Where the statistics go that some callers want: one number per row.
#[derive(Debug, Default)]
pub struct Statistics<'a> {
    /// Means.
    pub mean: Option<&'a mut [f32]>,
    /// `1 / sqrt(var + epsilon)`.
    pub inverse: Option<&'a mut [f32]>,
}

/// Normalises the rows of `x` into `y`. With `x` absent, y holds it already.
///
/// # Errors
/// If slices and sizes do not fit.
pub fn normalize(cx: &Cx, p: &Normalize, x: Option<&[f32]>, y: &mut [f32], stats: Statistics) -> Result<()> {
    match x {
        Some(x) if x.len() != y.len() => Err(Error::new(format!("{} elements into {}", x.len(), y.len()))),
        Some(x) => rows(cx, p, Source::Copy(x), y, stats),
        None => rows(cx, p, Source::Held, y, stats),
    }
}

/// A sum that is normalised: `x + skip + bias`.
#[derive(Debug)]
pub struct Sum<'a> {
    /// As long as the result.
    pub x: &'a [f32],
    /// As long, or as long as some of its last rows: it begins again then.
    pub skip: &'a [f32],
    /// One number per element of a row.
    pub bias: Option<&'a [f32]>,
    /// Where the sum goes too, if it is wanted.
    pub kept: Option<&'a mut [f32]>,
}

/// Normalises the rows of a sum into `y`, in one pass over memory.
///
/// # Errors
/// If slices and sizes do not fit.
pub fn normalize_sum(cx: &Cx, p: &Normalize, sum: Sum, y: &mut [f32], stats: Statistics) -> Result<()> {
    let Sum { x, skip, bias, kept } = sum;
    let n = p.n;
    let whole = skip.len().is_multiple_of(n.max(1)) && y.len().is_multiple_of(skip.len());
    let lengths = [x.len(), kept.as_ref().map_or(y.len(), |k| k.len())];
    if !whole || lengths != [y.len(); 2] || bias.is_some_and(|b| b.len() != n) {
        return Err(Error::new(format!("sums of {} and {} elements for {}", x.len(), skip.len(), y.len())));
    }
    let kept = kept.map(DisjointMut::new);
    rows(cx, p, Source::Sum { x, skip, bias, kept }, y, stats)
}

/// Where the rows come from.
enum Source<'a> {
    /// They are where the result goes.
    Held,
    Copy(&'a [f32]),
    Sum {
        x: &'a [f32],
        skip: &'a [f32],
        bias: Option<&'a [f32]>,
        kept: Option<DisjointMut<'a, f32>>,
    },
}

fn rows(cx: &Cx, p: &Normalize, source: Source, y: &mut [f32], stats: Statistics) -> Result<()> {
    if y.is_empty() {
        return Ok(());
    }
    let n = p.n;
    if n == 0 || !y.len().is_multiple_of(n) {
        return Err(Error::new(format!("{} elements cannot be normalised in rows of {n}", y.len())));
    }
    let wanted = match p.affine {
        Affine::PerElement => n,
        Affine::PerChannel { channels, run } => {
            if run == 0 || !n.is_multiple_of(run) || channels == 0 || !channels.is_multiple_of(n / run) {
                return Err(Error::new(format!(
                    "rows of {n} in runs of {run} do not take {channels} channels in turn"
                )));
            }
            channels
        }
    };
    if [p.scale, p.bias].iter().flatten().any(|v| v.len() != wanted) {
        return Err(Error::new(format!("scale and bias must have {wanted} elements")));
    }
    let rows = y.len() / n;
    let Statistics { mean, inverse } = stats;
    if [&mean, &inverse].into_iter().flatten().any(|s| s.len() != rows) {
        return Err(Error::new(format!("{rows} rows have as many statistics")));
    }
    let per_task = (TASK / n).max(1);
    let cost = 6 * y.len() as u64;
    let out = DisjointMut::new(y);
    let mean = mean.map(DisjointMut::new);
    let inverse = inverse.map(DisjointMut::new);
    cx.for_each(rows.div_ceil(per_task), cost, &|task| {
        let first = task * per_task;
        let count = per_task.min(rows - first);
        // SAFETY: each task has its own rows, and their statistics.
        let y = unsafe { out.range(first * n, count * n) };
        match &source {
            Source::Held => {}
            Source::Copy(x) => y.copy_from_slice(&x[first * n..][..count * n]),
            Source::Sum { x, skip, bias, kept } => {
                for (i, y) in y.chunks_exact_mut(n).enumerate() {
                    let at = (first + i) * n;
                    let skip = &skip[at % skip.len()..][..n];
                    dispatch(cx.isa(), AddRows { x: &x[at..][..n], skip, bias: *bias, y });
                }
                if let Some(kept) = kept {
                    // SAFETY: as above.
                    unsafe { kept.range(first * n, count * n) }.copy_from_slice(y);
                }
            }
        }
        // SAFETY: as above.
        let mean = mean.map(|m| unsafe { m.range(first, count) });
        // SAFETY: as above.
        let inverse = inverse.map(|m| unsafe { m.range(first, count) });
        dispatch(cx.isa(), Rows { p, first, y, mean, inverse });
    });
    Ok(())
}

/// `y = x + skip + bias`, all of one length.
struct AddRows<'a> {
    x: &'a [f32],
    skip: &'a [f32],
    bias: Option<&'a [f32]>,
    y: &'a mut [f32],
}

impl Kernel for AddRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, skip, bias, y } = self;
        let mut j = 0;
        while j < y.len() {
            let end = (j + S::LANES).min(y.len());
            let whole = end - j == S::LANES;
            let mut v = if whole {
                s.add(s.load(&x[j..]), s.load(&skip[j..]))
            } else {
                s.add(s.load_partial(&x[j..end]), s.load_partial(&skip[j..end]))
            };
            if let Some(b) = bias {
                v = s.add(v, if whole { s.load(&b[j..]) } else { s.load_partial(&b[j..end]) });
            }
            if whole {
                s.store(&mut y[j..], v);
            } else {
                s.store_partial(&mut y[j..end], v);
            }
            j = end;
        }
    }
}

struct Rows<'a> {
    p: &'a Normalize<'a>,
    first: usize,
    y: &'a mut [f32],
    mean: Option<&'a mut [f32]>,
    inverse: Option<&'a mut [f32]>,
}

impl Kernel for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let p = self.p;
        let inv_n = 1.0 / p.n as f32;
        for (i, row) in self.y.chunks_exact_mut(p.n).enumerate() {
            let mean = if p.center { sum(s, row, |v| v) * inv_n } else { 0.0 };
            let m = s.splat(mean);
            let var = sum(s, row, |v| {
                let d = s.sub(v, m);
                s.mul(d, d)
            }) * inv_n;
            let inverse = 1.0 / (var + p.epsilon).sqrt();
            if let Some(stats) = self.mean.as_deref_mut() {
                stats[i] = mean;
            }
            if let Some(stats) = self.inverse.as_deref_mut() {
                stats[i] = inverse;
            }
            let inv = s.splat(inverse);
            match p.affine {
                Affine::PerElement => {
                    let mut j = 0;
                    while j < row.len() {
                        let end = (j + S::LANES).min(row.len());
                        let part = &mut row[j..end];
                        let whole = part.len() == S::LANES;
                        let load = |x: &[f32]| if whole { s.load(x) } else { s.load_partial(x) };
                        let mut v = s.mul(s.sub(load(part), m), inv);
                        match (p.scale, p.bias) {
                            (Some(a), Some(b)) => v = s.mul_add(v, load(&a[j..end]), load(&b[j..end])),
                            (Some(a), None) => v = s.mul(v, load(&a[j..end])),
                            (None, Some(b)) => v = s.add(v, load(&b[j..end])),
                            (None, None) => {}
                        }
                        if whole {
                            s.store(part, v)
                        } else {
                            s.store_partial(part, v)
                        }
                        j = end;
                    }
                }
                Affine::PerChannel { channels, run } => {
                    let per_row = p.n / run;
                    for (c, part) in row.chunks_exact_mut(run).enumerate() {
                        let channel = ((self.first + i) * per_row + c) % channels;
                        let scale = p.scale.map_or(1.0, |v| v[channel]) * inverse;
                        let shift = p.bias.map_or(0.0, |v| v[channel]);
                        let (scale, shift) = (s.splat(scale), s.splat(shift));
                        crate::softmax::map_row(s, part, |v| s.mul_add(s.sub(v, m), scale, shift));
                    }
                }
            }
        }
    }
}

/// `sum f(x)`. `f` of the zeros that fill the last vector is left out.
#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32], f: impl Fn(S::F32) -> S::F32) -> f32 {
    let mut acc = [s.splat(0.0); 4];
    let mut chunks = x.chunks_exact(4 * S::LANES);
    for chunk in &mut chunks {
        for (i, a) in acc.iter_mut().enumerate() {
            *a = s.add(*a, f(s.load(&chunk[i * S::LANES..])));
        }
    }
    let mut rest = chunks.remainder().chunks_exact(S::LANES);
    for chunk in &mut rest {
        acc[0] = s.add(acc[0], f(s.load(chunk)));
    }
    let mut total = s.reduce_add(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
    let rest = rest.remainder();
    if !rest.is_empty() {
        let mut terms = [0.0; 16];
        s.store(&mut terms, f(s.load_partial(rest)));
        total += terms[..rest.len()].iter().sum::<f32>();
    }
    total
}

/// `y[o, c, i] = x[o, c, i] * scale[c] + shift[c]` for `[outer, channels, inner]`. With `x` absent, y holds it already.
///
/// # Errors
/// If slices and sizes do not fit.
pub fn scale_channels(
    cx: &Cx,
    x: Option<&[f32]>,
    y: &mut [f32],
    inner: usize,
    scale: &[f32],
    shift: &[f32],
) -> Result<()> {
    if y.is_empty() {
        return Ok(());
    }
    let channels = scale.len();
    let block = channels.checked_mul(inner).filter(|&b| b > 0 && y.len().is_multiple_of(b) && shift.len() == channels);
    let Some(block) = block.filter(|_| x.is_none_or(|x| x.len() == y.len())) else {
        return Err(Error::new(format!("{} elements do not have {channels} channels of {inner}", y.len())));
    };
    // Channels last: whole rows of channels make a task; else runs of one channel do.
    let unit = if inner == 1 { block } else { inner };
    let units = y.len() / unit;
    let per_task = (TASK / unit).max(1);
    let cost = 2 * y.len() as u64;
    let out = DisjointMut::new(y);
    cx.for_each(units.div_ceil(per_task), cost, &|task| {
        let first = task * per_task;
        let count = per_task.min(units - first);
        // SAFETY: each task has its own part.
        let y = unsafe { out.range(first * unit, count * unit) };
        if let Some(x) = x {
            y.copy_from_slice(&x[first * unit..][..count * unit]);
        }
        dispatch(cx.isa(), Channels { y, first, unit, scale, shift, last: inner == 1 });
    });
    Ok(())
}

struct Channels<'a> {
    y: &'a mut [f32],
    first: usize,
    unit: usize,
    scale: &'a [f32],
    shift: &'a [f32],
    last: bool,
}

impl Kernel for Channels<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, part) in self.y.chunks_exact_mut(self.unit).enumerate() {
            if self.last {
                let mut j = 0;
                while j < part.len() {
                    let end = (j + S::LANES).min(part.len());
                    let v = s.load_partial(&part[j..end]);
                    let v = s.mul_add(v, s.load_partial(&self.scale[j..end]), s.load_partial(&self.shift[j..end]));
                    s.store_partial(&mut part[j..end], v);
                    j = end;
                }
            } else {
                let c = (self.first + i) % self.scale.len();
                let (scale, shift) = (s.splat(self.scale[c]), s.splat(self.shift[c]));
                crate::softmax::map_row(s, part, |v| s.mul_add(v, scale, shift));
            }
        }
    }
}

/// Local response normalisation over channels of `[batch, channels, inner]`:
/// `y = x / (bias + alpha / size * sum x^2)^beta`, where the sum goes over `size` channels around the element's own.
///
/// # Panics
/// If the slices do not have these sizes.
pub fn local_response<T: Number>(
    x: &[T],
    [batch, channels, inner]: [usize; 3],
    size: usize,
    [alpha, beta, bias]: [f64; 3],
    y: &mut [T],
) {
    let (before, after) = (size.saturating_sub(1) / 2, size / 2);
    for n in 0..batch {
        for c in 0..channels {
            let (from, to) = (c.saturating_sub(before), (c + after + 1).min(channels));
            for i in 0..inner {
                let at = |c: usize| (n * channels + c) * inner + i;
                let squares: f64 = (from..to).map(|c| x[at(c)].to_f64().powi(2)).sum();
                let scale = (bias + alpha / size as f64 * squares).powf(beta);
                y[at(c)] = T::from_f64(x[at(c)].to_f64() / scale);
            }
        }
    }
}

/// Divides along the middle axis of `[outer, n, inner]` by the 1-norm or 2-norm; zeros stay zeros.
///
/// # Panics
/// If the slices do not have these sizes.
pub fn unit_length<T: Number>(x: &[T], [outer, n, inner]: [usize; 3], p: u32, y: &mut [T]) {
    for o in 0..outer {
        for j in 0..inner {
            let at = |i: usize| (o * n + i) * inner + j;
            let values = (0..n).map(|i| x[at(i)].to_f64());
            let norm =
                if p == 1 { values.map(f64::abs).sum::<f64>() } else { values.map(|v| v * v).sum::<f64>().sqrt() };
            for i in 0..n {
                y[at(i)] = T::from_f64(if norm == 0.0 { 0.0 } else { x[at(i)].to_f64() / norm });
            }
        }
    }
}

/// [`normalize`] for any element type, in `f64`; scale and bias by the index that `channel(row, element)` gives.
///
/// # Panics
/// If the slices do not have these sizes.
pub fn normalize_any<T: Number>(
    x: &[T],
    n: usize,
    epsilon: f64,
    center: bool,
    scale: Option<&[T]>,
    bias: Option<&[T]>,
    channel: impl Fn(usize, usize) -> usize,
    y: &mut [T],
) {
    for (r, (x, y)) in x.chunks_exact(n.max(1)).zip(y.chunks_exact_mut(n.max(1))).enumerate() {
        let mean = if center { x.iter().map(|v| v.to_f64()).sum::<f64>() / n as f64 } else { 0.0 };
        let var = x.iter().map(|v| (v.to_f64() - mean).powi(2)).sum::<f64>() / n as f64;
        for (i, (x, y)) in x.iter().zip(y).enumerate() {
            let c = channel(r, i);
            let v = (x.to_f64() - mean) / (var + epsilon).sqrt() * scale.map_or(1.0, |s| s[c].to_f64());
            *y = T::from_f64(v + bias.map_or(0.0, |b| b[c].to_f64()));
        }
    }
}

/// Groups of channels of an image, channels last: InstanceNorm (one channel each) and GroupNorm.
#[derive(Clone, Copy, Debug)]
pub struct ChannelGroups<'a> {
    /// Images.
    pub batch: usize,
    /// Pixels of an image.
    pub pixels: usize,
    /// Channels of a pixel.
    pub channels: usize,
    /// Groups that the channels form.
    pub groups: usize,
    /// Added to the variance.
    pub epsilon: f32,
    /// Factors, one per channel.
    pub scale: &'a [f32],
    /// Addends, one per channel.
    pub bias: &'a [f32],
}

/// Normalises each group of channels of each image of `x`, `[batch, pixels, channels]`, into `y`; with `x` absent, y holds it
/// already.
///
/// ```text
/// for each image
///     sums of channels -> means of groups;  sums of (x - mean)^2 -> variances        parts of pixels in parallel, in f64
///     y = x * a[channel] + b[channel]                                                 a, b from both and scale, bias
/// ```
///
/// Which pixels form a part depends on the sizes alone, and parts are added in order.
///
/// # Errors
/// If slices and sizes do not fit.
pub fn normalize_channel_groups(cx: &Cx, p: &ChannelGroups, x: Option<&[f32]>, y: &mut [f32]) -> Result<()> {
    let &ChannelGroups { batch, pixels, channels, groups, epsilon, scale, bias } = p;
    let count = batch.checked_mul(pixels).and_then(|n| n.checked_mul(channels));
    let fits = groups > 0 && channels.is_multiple_of(groups) && [scale.len(), bias.len()] == [channels; 2];
    if !fits || count != Some(y.len()) || x.is_some_and(|x| x.len() != y.len()) {
        return Err(Error::new(format!(
            "{} elements, {} scales, {} biases for {p:?}",
            y.len(),
            scale.len(),
            bias.len()
        )));
    }
    if y.is_empty() {
        return Ok(());
    }
    let (image, group) = (pixels * channels, channels / groups);
    let rows = (TASK / channels).max(1);
    let parts = pixels.div_ceil(rows);
    cx.with_workspace(2 * parts * channels + 2 * channels, |workspace| {
        let (sums, rest) = workspace.split_at_mut(2 * parts * channels);
        let sums: &mut [f64] = bytemuck::cast_slice_mut(sums);
        let (mean, factor) = rest.split_at_mut(channels);
        for b in 0..batch {
            let span = b * image..(b + 1) * image;
            for squares in [false, true] {
                let from = x.map_or(&*y, |x| x).get(span.clone()).unwrap_or_default();
                let (all, means) = (DisjointMut::new(sums), &*mean);
                cx.for_each(parts, 2 * image as u64, &|part| {
                    // SAFETY: each part has its own sums.
                    let sums = unsafe { all.range(part * channels, channels) };
                    let x = &from[part * rows * channels..image.min((part + 1) * rows * channels)];
                    dispatch(cx.isa(), ChannelSums { x, mean: means, squares, sums });
                });
                let (first, rest) = sums.split_at_mut(channels);
                for part in rest.chunks_exact(channels) {
                    first.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
                for (g, of) in first.chunks_exact(group).enumerate() {
                    let average = of.iter().sum::<f64>() / (group * pixels) as f64;
                    let (to, value) = match squares {
                        false => (&mut *mean, average as f32),
                        true => (&mut *factor, (1.0 / (average + f64::from(epsilon)).sqrt()) as f32),
                    };
                    to[g * group..][..group].fill(value);
                }
            }
            factor.iter_mut().zip(scale).for_each(|(f, s)| *f *= s);
            let (out, a, means) = (DisjointMut::new(&mut y[span.clone()]), &*factor, &*mean);
            let from = x.map(|x| &x[span]);
            cx.for_each(parts, 2 * image as u64, &|part| {
                let (at, end) = (part * rows * channels, image.min((part + 1) * rows * channels));
                // SAFETY: each part has its own pixels.
                let y = unsafe { out.range(at, end - at) };
                if let Some(x) = from {
                    y.copy_from_slice(&x[at..end]);
                }
                dispatch(cx.isa(), ChannelAffine { y, mean: means, a, b: bias });
            });
        }
    });
    Ok(())
}

/// Sums over pixels, or of the squares of what is left without the means. A few pixels at a time are summed in `f32`.
struct ChannelSums<'a> {
    x: &'a [f32],
    mean: &'a [f32],
    squares: bool,
    sums: &'a mut [f64],
}

impl Kernel for ChannelSums<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { x, mean, squares, sums } = self;
        let channels = sums.len();
        sums.fill(0.0);
        // Plain loops over channels, which the compiler makes vectors of: no sum is within a vector.
        let mut few = [0f32; 64];
        for (at, sums) in sums.chunks_mut(few.len()).enumerate().map(|(i, s)| (i * 64, s)) {
            let few = &mut few[..sums.len()];
            for pixels in x.chunks(16 * channels) {
                few.fill(0.0);
                for pixel in pixels.chunks_exact(channels) {
                    let pixel = &pixel[at..][..few.len()];
                    if squares {
                        for ((sum, x), m) in few.iter_mut().zip(pixel).zip(&mean[at..]) {
                            *sum += (x - m) * (x - m);
                        }
                    } else {
                        few.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += x);
                    }
                }
                sums.iter_mut().zip(&*few).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
    }
}

/// `y = (y - mean) a + b` for each pixel.
struct ChannelAffine<'a> {
    y: &'a mut [f32],
    mean: &'a [f32],
    a: &'a [f32],
    b: &'a [f32],
}

impl Kernel for ChannelAffine<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for pixel in self.y.chunks_exact_mut(self.mean.len()) {
            for (((y, m), a), b) in pixel.iter_mut().zip(self.mean).zip(self.a).zip(self.b) {
                *y = (*y - m) * a + b;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::{each_context, integers};

    fn close(got: &[f32], want: &[f64], what: &str) {
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(*g) - w).abs() <= 1e-5 * (1.0 + w.abs()), "{what} at {i}: {g} for {w}");
        }
    }

    #[test]
    fn a_sum_is_normalised_in_one_pass() {
        each_context(|cx| {
            for (rows, n, repeated) in [(1, 1, 1), (3, 7, 1), (6, 33, 3), (40, 300, 2)] {
                let (x, skip) = (integers(rows * n, 1), integers(rows * n / repeated, 2));
                let (bias, scale) = (integers(n, 3), integers(n, 4));
                for bias in [None, Some(&bias[..])] {
                    let total = |i: usize| x[i] + skip[i % skip.len()] + bias.map_or(0.0, |b| b[i % n]);
                    let sum: Vec<f32> = (0..rows * n).map(total).collect();
                    let affine = Affine::PerElement;
                    let p = Normalize { n, epsilon: 1e-3, center: true, scale: Some(&scale), bias: None, affine };
                    let mut want = sum.clone();
                    let (mut means, mut found) = (vec![0.0; rows], vec![0.0; rows]);
                    let stats = Statistics { mean: Some(&mut means), inverse: None };
                    normalize(cx, &p, None, &mut want, stats).unwrap();
                    let (mut y, mut kept) = (vec![0.0; rows * n], vec![0.0; rows * n]);
                    let kept_too = Sum { x: &x, skip: &skip, bias, kept: Some(&mut kept) };
                    let stats = Statistics { mean: Some(&mut found), inverse: None };
                    normalize_sum(cx, &p, kept_too, &mut y, stats).unwrap();
                    assert!(y == want && kept == sum && found == means, "{rows} rows of {n}");
                    y.fill(0.0);
                    let none = Statistics::default;
                    normalize_sum(cx, &p, Sum { x: &x, skip: &skip, bias, kept: None }, &mut y, none()).unwrap();
                    assert_eq!(y, want);
                    let short = Sum { x: &x, skip: &skip[1..], bias, kept: None };
                    assert!(normalize_sum(cx, &p, short, &mut y, none()).is_err());
                }
            }
        });
    }

    #[test]
    fn rows_match_the_reference() {
        each_context(|cx| {
            for n in [1, 3, 4, 16, 17, 64, 65, 384] {
                let x = integers(6 * n, 11);
                let (scale, bias) = (integers(n, 12), integers(n, 13));
                for center in [true, false] {
                    let (s, b) = (Some(&scale[..]), Some(&bias[..]));
                    let p = Normalize { n, epsilon: 1e-2, center, scale: s, bias: b, affine: Affine::PerElement };
                    let mut y = vec![0.0; x.len()];
                    let (mut mean, mut inverse) = ([0.0; 6], [0.0; 6]);
                    let stats = Statistics { mean: Some(&mut mean), inverse: Some(&mut inverse) };
                    normalize(cx, &p, Some(&x), &mut y, stats).unwrap();
                    let epsilon = f64::from(1e-2f32);
                    let want = reference::normalize(&x, n, epsilon, center, &scale, &bias, |_, i| i);
                    close(&y, &want, &format!("rows of {n}"));
                    let mut same = x.clone();
                    normalize(cx, &p, None, &mut same, Statistics::default()).unwrap();
                    assert_eq!(same, y);
                    let want = if center { x[..n].iter().sum::<f32>() / n as f32 } else { 0.0 };
                    assert!((mean[0] - want).abs() < 1e-5);
                    assert!(inverse.iter().all(|v| v.is_finite()));
                }
            }
        });
    }

    #[test]
    fn groups_of_channels_match_the_reference() {
        each_context(|cx| {
            for (channels, groups, run) in [(4, 4, 5), (4, 2, 16), (6, 3, 7), (4, 1, 1)] {
                let n = channels / groups * run;
                let x = integers(2 * channels * run, 11);
                let (scale, bias) = (integers(channels, 12), integers(channels, 13));
                let affine = Affine::PerChannel { channels, run };
                let (s, b) = (Some(&scale[..]), Some(&bias[..]));
                let p = Normalize { n, epsilon: 1e-2, center: true, scale: s, bias: b, affine };
                let mut y = vec![0.0; x.len()];
                normalize(cx, &p, Some(&x), &mut y, Statistics::default()).unwrap();
                let channel = |r: usize, i: usize| (r * n + i) / run % channels;
                let want = reference::normalize(&x, n, f64::from(1e-2f32), true, &scale, &bias, channel);
                close(&y, &want, &format!("{channels} channels in {groups} groups"));
            }
        });
    }

    #[test]
    fn channels_are_scaled_in_both_layouts() {
        each_context(|cx| {
            for (channels, inner) in [(1, 1), (5, 1), (16, 1), (33, 1), (3, 4), (2, 37)] {
                let x = integers(3 * channels * inner, 1);
                let (scale, shift) = (integers(channels, 2), integers(channels, 3));
                let mut y = vec![0.0; x.len()];
                scale_channels(cx, Some(&x), &mut y, inner, &scale, &shift).unwrap();
                for (i, (x, y)) in x.iter().zip(&y).enumerate() {
                    let c = i / inner % channels;
                    assert_eq!(*y, x * scale[c] + shift[c]);
                }
            }
            assert!(scale_channels(cx, None, &mut [0.0; 5], 1, &[1.0; 2], &[0.0; 2]).is_err());
        });
    }

    #[test]
    fn local_response_and_unit_length_by_hand() {
        let mut y = [0.0; 3];
        local_response(&[1.0f64, 2.0, 3.0], [1, 3, 1], 3, [3.0, 1.0, 1.0], &mut y);
        assert_eq!(y, [1.0 / 6.0, 2.0 / 15.0, 3.0 / 14.0]);
        let mut y = [0.0f32; 4];
        unit_length(&[3.0, 0.0, 4.0, 0.0], [1, 2, 2], 2, &mut y);
        assert_eq!(y, [0.6, 0.0, 0.8, 0.0]);
    }

    #[test]
    fn groups_of_channels_that_stand_last() {
        each_context(|cx| {
            for (batch, pixels, channels, groups) in [
                (1, 1, 1, 1),
                (2, 7, 6, 3),
                (1, 50, 70, 70),
                (2, 300, 64, 8),
                (1, 5000, 5, 1),
                (0, 3, 2, 1),
                (1, 0, 2, 2),
            ] {
                let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 100.0 + 20.0;
                let x: Vec<f32> = (0..batch * pixels * channels).map(value).collect();
                let (scale, bias): (Vec<f32>, Vec<f32>) =
                    (0..channels).map(|c| (1.0 + c as f32 / 8.0, c as f32 - 3.0)).unzip();
                let p = ChannelGroups { batch, pixels, channels, groups, epsilon: 1e-5, scale: &scale, bias: &bias };
                let (mut y, mut held) = (vec![0.0; x.len()], x.clone());
                normalize_channel_groups(cx, &p, Some(&x), &mut y).unwrap();
                normalize_channel_groups(cx, &p, None, &mut held).unwrap();
                assert_eq!(y, held);
                let group = channels / groups;
                for b in 0..batch {
                    for g in 0..groups {
                        let all = |f: &dyn Fn(f64) -> f64| -> f64 {
                            let at = |i: usize| x[(b * pixels + i / group) * channels + g * group + i % group];
                            (0..pixels * group).map(|i| f(f64::from(at(i)))).sum::<f64>() / (pixels * group) as f64
                        };
                        let mean = all(&|x| x);
                        let inverse = 1.0 / (all(&|x| (x - mean).powi(2)) + 1e-5).sqrt();
                        for i in 0..pixels * group {
                            let c = g * group + i % group;
                            let at = (b * pixels + i / group) * channels + c;
                            let want = (f64::from(x[at]) - mean) * inverse * f64::from(scale[c]) + f64::from(bias[c]);
                            assert!((f64::from(y[at]) - want).abs() < 3e-5 * (1.0 + want.abs()), "{p:?} {i}");
                        }
                    }
                }
            }
            let p = ChannelGroups { batch: 1, pixels: 2, channels: 4, groups: 3, epsilon: 0.0, scale: &[], bias: &[] };
            assert!(normalize_channel_groups(cx, &p, None, &mut [0.0; 8]).is_err());
        });
    }
}
