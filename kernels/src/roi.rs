//! Means of regions: RoiAlign (He et al., 2017) as two sums, one per axis.
//!
//! A sample between pixels is a sum over rows of sums over columns, and a cell of the result is a mean of a grid of
//! samples. So all of it is, with a few weights per row and column of the result,
//!
//! ```text
//! for regions, channels                                   in parallel
//!     for i in rows of the result
//!         line = sum over y of down[i][y] * image[y]      vectors of pixels, between the region's sides
//!         for j in columns of the result
//!             y[i][j] = sum over x of across[j][x] * line[x]
//! ```
//!
//! Samples of a cell share pixels; their weights are added before.

use crate::conv::{check_len, volume};
use crate::error::{Error, Result};
use crate::par::{Cx, DisjointMut};
use crate::sampling::{Region, RoiAlign, between};
use crate::simd::{Kernel, Simd, dispatch};

/// Channels of a task.
const CHANNELS: usize = 64;

/// What [`sampling::roi_align`](crate::sampling::roi_align) computes unless `p.max` is set, which is ignored.
///
/// # Errors
/// If slices do not have the sizes, or an index is not below the number of images.
pub fn roi_mean(
    cx: &Cx<'_>,
    x: &[f32],
    dims: [usize; 4],
    rois: &[f32],
    batches: &[usize],
    p: &RoiAlign,
    y: &mut [f32],
) -> Result<()> {
    let [batch, channels, height, width] = dims;
    let [rows, cols] = p.output;
    let (image, cells) = (volume(&[height, width])?, volume(&p.output)?);
    check_len("x", x.len(), volume(&[batch, channels, image])?)?;
    check_len("the regions", rois.len(), volume(&[batches.len(), 4])?)?;
    check_len("the output", y.len(), volume(&[batches.len(), channels, cells])?)?;
    if let Some(i) = batches.iter().find(|&&i| i >= batch) {
        return Err(Error::new(format!("a region of image {i}; there are {batch}")));
    }
    if y.is_empty() {
        return Ok(());
    }
    let blocks = channels.div_ceil(CHANNELS);
    let to = DisjointMut::new(y);
    let scratch = width.next_multiple_of(16);
    cx.for_each_scratch(batches.len() * blocks, 16 * to.len() as u64, scratch, &|task, line| {
        let (r, block) = (task / blocks, task % blocks);
        let some = block * CHANNELS..((block + 1) * CHANNELS).min(channels);
        let [down, across] = p.region(|i| f64::from(rois[r * 4 + i]), [height, width]);
        let (down, across) = (Axis::new(&down, rows, height), Axis::new(&across, cols, width));
        // SAFETY: each task has its own channels of a region.
        let to = unsafe { to.range((r * channels + some.start) * cells, some.len() * cells) };
        let x = &x[(batches[r] * channels + some.start) * image..];
        dispatch(cx.isa(), Mean { x, image, width, down: &down, across: &across, line, to });
    });
    Ok(())
}

/// Weights of the pixels along an axis.
struct Axis {
    /// Pixels and their weights.
    taps: Vec<(usize, f32)>,
    /// Where those of each cell end.
    ends: Vec<usize>,
}

impl Axis {
    fn new(region: &Region, cells: usize, size: usize) -> Self {
        let (mut taps, mut ends) = (Vec::<(usize, f64)>::new(), Vec::with_capacity(cells));
        let share = 1.0 / region.samples as f64;
        for cell in 0..cells {
            let first = taps.len();
            for sample in 0..region.samples {
                let Some((low, high, t)) = between(region.at(cell, sample), size) else { continue };
                for (at, weight) in [(low, 1.0 - t), (high, t)] {
                    if weight == 0.0 {
                        continue;
                    }
                    // Samples go one way: a pixel that was met before is one of the last two.
                    let known = taps[first..].iter_mut().rev().take(2).find(|tap| tap.0 == at);
                    match known {
                        Some(tap) => tap.1 += weight * share,
                        None => taps.push((at, weight * share)),
                    }
                }
            }
            ends.push(taps.len());
        }
        Self { taps: taps.into_iter().map(|(at, weight)| (at, weight as f32)).collect(), ends }
    }
}

/// Some channels of a region.
struct Mean<'a> {
    /// From the first channel on.
    x: &'a [f32],
    /// Pixels of a channel.
    image: usize,
    width: usize,
    down: &'a Axis,
    across: &'a Axis,
    /// Room for a line.
    line: &'a mut [f32],
    to: &'a mut [f32],
}

impl Kernel for Mean<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { x, image, width, down, across, line, to } = self;
        let (rows, cols) = (down.ends.len(), across.ends.len());
        let columns = || across.taps.iter().map(|tap| tap.0);
        let left = columns().min().unwrap_or(0);
        let right = columns().max().map_or(0, |right| right + 1);
        for (c, to) in to.chunks_exact_mut(rows * cols).enumerate() {
            let x = &x[c * image..];
            let mut first = 0;
            for (to, &end) in to.chunks_exact_mut(cols).zip(&down.ends) {
                let mut column = left;
                while column < right {
                    let mut sum = s.splat(0.0);
                    for &(row, weight) in &down.taps[first..end] {
                        let at = row * width + column;
                        // What lies right of the region is computed as well, and not used.
                        let pixels = match x.get(at..at + S::LANES) {
                            Some(whole) => s.load(whole),
                            None => s.load_partial(&x[at..]),
                        };
                        sum = s.mul_add(pixels, s.splat(weight), sum);
                    }
                    s.store(&mut line[column - left..], sum);
                    column += S::LANES;
                }
                first = end;
                let mut first = 0;
                for (y, &end) in to.iter_mut().zip(&across.ends) {
                    *y = across.taps[first..end].iter().map(|&(at, weight)| line[at - left] * weight).sum();
                    first = end;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::roi_align;
    use crate::testing::{each_context, integers};

    #[test]
    fn any_region_matches_the_definition() {
        // Inside, at the corners, beyond the sides, outside, empty, backwards.
        let rois = [
            [1.0, 2.0, 9.0, 7.5],
            [0.0, 0.0, 26.0, 18.0],
            [-5.0, -3.0, 40.0, 30.0],
            [60.0, 60.0, 70.0, 70.0],
            [4.0, 4.0, 4.0, 4.0],
            [20.0, 12.0, 3.0, 2.0],
        ];
        let batches = [0, 1, 1, 0, 1, 0];
        for (channels, size) in [(1, [9, 13]), (3, [1, 1]), (70, [17, 40])] {
            let dims = [2, channels, size[0], size[1]];
            let x = integers(dims.iter().product(), 1);
            for (half_pixel, output, sampling) in
                [(true, [3, 2], 2), (false, [7, 7], 0), (true, [1, 5], 0), (false, [2, 2], 3)]
            {
                let p = RoiAlign { max: false, half_pixel, output, sampling, scale: 0.5 };
                let mut want = vec![f32::NAN; rois.len() * channels * output[0] * output[1]];
                roi_align(&x, dims, rois.as_flattened(), &batches, &p, &mut want);
                each_context(|cx| {
                    let mut got = vec![f32::NAN; want.len()];
                    roi_mean(cx, &x, dims, rois.as_flattened(), &batches, &p, &mut got).unwrap();
                    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                        assert!((g - w).abs() <= 1e-5, "{} {p:?} {i}: {g} for {w}", cx.isa());
                    }
                    assert!(roi_mean(cx, &x, dims, &rois.as_flattened()[1..], &batches, &p, &mut got).is_err());
                });
            }
        }
    }

    #[test]
    fn pixels_without_weight_are_not_read() {
        let x = [1.0, f32::NAN, f32::NAN, f32::NAN];
        let p = RoiAlign { max: false, half_pixel: true, output: [1, 1], sampling: 1, scale: 1.0 };
        each_context(|cx| {
            let mut y = [f32::NAN];
            roi_mean(cx, &x, [1, 1, 2, 2], &[0.0, 0.0, 1.0, 1.0], &[0], &p, &mut y).unwrap();
            assert_eq!(y, [1.0]);
            assert!(roi_mean(cx, &x, [1, 1, 2, 2], &[0.0; 4], &[1], &p, &mut y).is_err());
        });
    }
}
