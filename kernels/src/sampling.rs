//! Reading images between their pixels: grids, regions of interest, deformed windows.
//!
//! Plain loops in `f64` over any element type; a caller checks the sizes, which slices panic on otherwise.

use crate::naive::Number;

/// How a value between pixels is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    /// The nearest pixel, ties to even.
    Nearest,
    /// From the two neighbours along each axis.
    Linear,
    /// From four neighbours along each axis, with Keys' coefficient -0.75.
    Cubic,
}

/// What lies beyond the borders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Border {
    /// Zeros.
    Zeros,
    /// The nearest pixel of the border.
    Clamp,
    /// The image, mirrored.
    Reflect,
}

/// Mirrors `x` into `low..=high`.
fn reflect(x: f64, low: f64, high: f64) -> f64 {
    let range = high - low;
    if range <= 0.0 || !x.is_finite() {
        return low;
    }
    let beyond = if x < low {
        low - x
    } else if x > high {
        x - high
    } else {
        return x;
    };
    let times = (beyond / range).floor();
    let rest = beyond - times * range;
    let even = times % 2.0 == 0.0;
    // An even number of whole turns comes back to the side where it left.
    if (x < low) == even { low + rest } else { high - rest }
}

/// Samples images `x`, `[batch, channels, sizes...]`, at the points of `grid`, `[batch, points, axes]` with the last
/// axis' coordinate first and -1..1 for the whole image, into `[batch, channels, points]`.
///
/// # Panics
/// If slices do not have these sizes.
pub fn grid_sample<T: Number>(
    x: &[T],
    batch: usize,
    channels: usize,
    sizes: &[usize],
    grid: &[T],
    interpolation: Interpolation,
    border: Border,
    align_corners: bool,
    y: &mut [T],
) {
    let axes = sizes.len();
    let plane: usize = sizes.iter().product();
    let points = if batch * axes == 0 { 0 } else { grid.len() / batch / axes };
    // Limits of the image for mirroring: centres of the border pixels, or their outer edges.
    let limits = |n: usize| if align_corners { (0.0, n as f64 - 1.0) } else { (-0.5, n as f64 - 0.5) };
    let mut taps: Vec<Vec<(Option<usize>, f64)>> = vec![Vec::new(); axes];
    for n in 0..batch {
        for p in 0..points {
            for (axis, taps) in taps.iter_mut().enumerate() {
                let size = sizes[axis];
                let g = grid[(n * points + p) * axes + axes - 1 - axis].to_f64();
                let mut at = if align_corners {
                    (g + 1.0) / 2.0 * (size as f64 - 1.0)
                } else {
                    ((g + 1.0) * size as f64 - 1.0) / 2.0
                };
                let (low, high) = limits(size);
                if interpolation == Interpolation::Nearest {
                    at = at.round_ties_even();
                }
                if at < low || at > high {
                    match border {
                        Border::Zeros => {}
                        Border::Clamp => at = at.clamp(0.0, size as f64 - 1.0),
                        Border::Reflect => at = reflect(at, low, high),
                    }
                }
                let pixel = |i: f64| {
                    let i = match border {
                        Border::Zeros => i,
                        Border::Clamp => i.clamp(0.0, size as f64 - 1.0),
                        Border::Reflect => reflect(i, low, high).trunc(),
                    };
                    (i >= 0.0 && i < size as f64).then_some(i as usize)
                };
                taps.clear();
                let floor = at.floor();
                let t = at - floor;
                match interpolation {
                    Interpolation::Nearest => taps.push((pixel(at.round_ties_even()), 1.0)),
                    Interpolation::Linear => taps.extend([(pixel(floor), 1.0 - t), (pixel(floor + 1.0), t)]),
                    Interpolation::Cubic => {
                        for (i, w) in cubic(t, -0.75).into_iter().enumerate() {
                            taps.push((pixel(floor - 1.0 + i as f64), w));
                        }
                    }
                }
            }
            let corners: usize = taps.iter().map(Vec::len).product();
            for c in 0..channels {
                let image = &x[(n * channels + c) * plane..][..plane];
                let mut sum = 0.0;
                for mut corner in 0..corners {
                    let (mut at, mut weight, mut step) = (Some(0), 1.0, 1);
                    for (taps, &size) in taps.iter().zip(sizes).rev() {
                        let (pixel, w) = taps[corner % taps.len()];
                        corner /= taps.len();
                        at = at.zip(pixel).map(|(at, p)| at + p * step);
                        weight *= w;
                        step *= size;
                    }
                    if let Some(at) = at {
                        sum += weight * image[at].to_f64();
                    }
                }
                y[(n * channels + c) * points + p] = T::from_f64(sum);
            }
        }
    }
}

/// Weights of the four neighbours at -1, 0, 1, 2 for a point `t` behind the second (Keys, 1981).
pub fn cubic(t: f64, a: f64) -> [f64; 4] {
    let near = |d: f64| ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0;
    let far = |d: f64| ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a;
    [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]
}

/// The two pixels around a point of an axis of RoiAlign and how far it is from the first: a point up to one pixel outside
/// is at the border.
pub(crate) fn between(v: f64, size: usize) -> Option<(usize, usize, f64)> {
    if !(-1.0..=size as f64).contains(&v) || size == 0 {
        return None;
    }
    let v = v.max(0.0);
    let low = v as usize;
    Some(if low + 1 >= size { (size - 1, size - 1, 0.0) } else { (low, low + 1, v - low as f64) })
}

/// The four pixels around a point of an image and their weights.
fn around(y: f64, x: f64, height: usize, width: usize) -> Option<[(usize, f64); 4]> {
    let ((y0, y1, ty), (x0, x1, tx)) = (between(y, height)?, between(x, width)?);
    Some([
        (y0 * width + x0, (1.0 - ty) * (1.0 - tx)),
        (y0 * width + x1, (1.0 - ty) * tx),
        (y1 * width + x0, ty * (1.0 - tx)),
        (y1 * width + x1, ty * tx),
    ])
}

/// What RoiAlign does with its regions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoiAlign {
    /// Largest weighted pixel instead of the mean.
    pub max: bool,
    /// Whether coordinates are shifted by half a pixel.
    pub half_pixel: bool,
    /// Rows and columns of the result.
    pub output: [usize; 2],
    /// Samples per cell and axis; 0 for as many as the cell has pixels.
    pub sampling: usize,
    /// From coordinates of regions to those of x.
    pub scale: f64,
}

/// One axis of a region.
pub(crate) struct Region {
    start: f64,
    cell: f64,
    /// Samples per cell.
    pub(crate) samples: usize,
}

impl Region {
    /// Where a sample of a cell lies.
    pub(crate) fn at(&self, cell: usize, sample: usize) -> f64 {
        self.start + cell as f64 * self.cell + (sample as f64 + 0.5) * self.cell / self.samples as f64
    }
}

impl RoiAlign {
    /// Rows and columns of the region with sides x1, y1, x2, y2 in an image of that height and width.
    pub(crate) fn region(&self, side: impl Fn(usize) -> f64, image: [usize; 2]) -> [Region; 2] {
        let shift = if self.half_pixel { 0.5 } else { 0.0 };
        [0, 1].map(|axis| {
            let [start, end] = [1 - axis, 3 - axis].map(|i| side(i) * self.scale - shift);
            // The first form of the operator makes regions at least one pixel large.
            let size = if self.half_pixel { end - start } else { (end - start).max(1.0) };
            let cell = size / self.output[axis] as f64;
            // A region cannot want more samples than would fit the image twice over.
            let samples = match self.sampling {
                0 => (cell.ceil().max(0.0) as usize).min(2 * image[axis] + 2),
                s => s,
            };
            Region { start, cell, samples }
        })
    }
}

/// RoiAlign of `x`, `[batch, channels, height, width]`, for `rois`, `[n, 4]` as x1, y1, x2, y2, of images `batches`.
///
/// # Panics
/// If slices do not have these sizes, or an index is not below the number of images.
pub fn roi_align<T: Number>(x: &[T], dims: [usize; 4], rois: &[T], batches: &[usize], p: &RoiAlign, y: &mut [T]) {
    let [_, channels, height, width] = dims;
    let [rows, cols] = p.output;
    for (r, &batch) in batches.iter().enumerate() {
        let [down, across] = p.region(|i| rois[r * 4 + i].to_f64(), [height, width]);
        let (sh, sw) = (down.samples, across.samples);
        for c in 0..channels {
            let image = &x[(batch * channels + c) * height * width..][..height * width];
            for i in 0..rows {
                for j in 0..cols {
                    let (mut sum, mut max) = (0.0, None);
                    for a in 0..sh {
                        let py = down.at(i, a);
                        for b in 0..sw {
                            let px = across.at(j, b);
                            let taps = around(py, px, height, width).unwrap_or([(0, 0.0); 4]);
                            let values = taps.map(|(at, w)| if w == 0.0 { 0.0 } else { w * image[at].to_f64() });
                            sum += values.iter().sum::<f64>();
                            let high = values.into_iter().fold(f64::NEG_INFINITY, f64::max);
                            max = Some(max.map_or(high, |m: f64| m.max(high)));
                        }
                    }
                    let value = if p.max { max.unwrap_or(0.0) } else { sum / (sh * sw).max(1) as f64 };
                    y[((r * channels + c) * rows + i) * cols + j] = T::from_f64(value);
                }
            }
        }
    }
}

/// Largest pixels of the cells of regions `[n, 5]`: image, x1, y1, x2, y2.
///
/// # Panics
/// If slices do not have these sizes, or an index is not below the number of images.
pub fn max_roi_pool<T: Number>(x: &[T], dims: [usize; 4], rois: &[T], output: [usize; 2], scale: f64, y: &mut [T]) {
    let [_, channels, height, width] = dims;
    for (r, roi) in rois.chunks_exact(5).enumerate() {
        let side = |i: usize| (roi[i].to_f64() * scale).round();
        let batch = roi[0].to_f64() as usize;
        // Start and end of cell `i` of `n` along an axis of `size` pixels.
        let cells = |from: f64, to: f64, n: usize, size: usize, i: usize| {
            let cell = (to - from + 1.0).max(1.0) / n as f64;
            let clamp = |v: f64| v.clamp(0.0, size as f64) as usize;
            clamp((i as f64 * cell).floor() + from)..clamp(((i + 1) as f64 * cell).ceil() + from)
        };
        for c in 0..channels {
            let image = &x[(batch * channels + c) * height * width..][..height * width];
            for i in 0..output[0] {
                for j in 0..output[1] {
                    let mut best = None;
                    for h in cells(side(2), side(4), output[0], height, i) {
                        for w in cells(side(1), side(3), output[1], width, j) {
                            let v = image[h * width + w];
                            best = Some(best.map_or(v, |b| if v > b { v } else { b }));
                        }
                    }
                    y[((r * channels + c) * output[0] + i) * output[1] + j] = best.unwrap_or(T::ZERO);
                }
            }
        }
    }
}

/// Sizes of a deformable convolution over two axes.
#[derive(Clone, Copy, Debug)]
pub struct DeformConv {
    /// Batch, input channels, height, width.
    pub x: [usize; 4],
    /// Output channels, input channels per group, height and width of the window.
    pub w: [usize; 4],
    /// Height and width of the result.
    pub output: [usize; 2],
    /// Groups of channels.
    pub groups: usize,
    /// Groups of channels that share offsets.
    pub offset_groups: usize,
    /// Steps between windows.
    pub strides: [usize; 2],
    /// Steps between elements of a window.
    pub dilations: [usize; 2],
    /// Padding before.
    pub begin: [usize; 2],
}

/// Convolution whose windows' elements are moved by offsets (Dai et al., 2017) and weighted by a mask (Zhu et al., 2018).
///
/// # Panics
/// If slices do not have the sizes.
pub fn deform_conv<T: Number>(
    p: &DeformConv,
    x: &[T],
    w: &[T],
    offset: &[T],
    bias: Option<&[T]>,
    mask: Option<&[T]>,
    out: &mut [T],
) {
    let [batch, channels, height, width] = p.x;
    let [out_channels, per_group, kh, kw] = p.w;
    let [oh, ow] = p.output;
    let (taps, plane) = (kh * kw, oh * ow);
    let out_per_group = out_channels / p.groups;
    let per_offset = channels / p.offset_groups;
    for n in 0..batch {
        for oc in 0..out_channels {
            for i in 0..oh {
                for j in 0..ow {
                    let mut sum = bias.map_or(0.0, |b| b[oc].to_f64());
                    for ic in 0..per_group {
                        let c = oc / out_per_group * per_group + ic;
                        let group = n * p.offset_groups + c / per_offset;
                        let image = &x[(n * channels + c) * height * width..][..height * width];
                        for t in 0..taps {
                            let moved = |d: usize| offset[((group * taps + t) * 2 + d) * plane + i * ow + j].to_f64();
                            let base = |o: usize, k: usize, d: usize| {
                                (o * p.strides[d] + k * p.dilations[d]) as f64 - p.begin[d] as f64
                            };
                            let py = base(i, t / kw, 0) + moved(0);
                            let px = base(j, t % kw, 1) + moved(1);
                            let m = mask.map_or(1.0, |m| m[(group * taps + t) * plane + i * ow + j].to_f64());
                            let weight = w[(oc * per_group + ic) * taps + t].to_f64();
                            sum += weight * m * bilinear(image, height, width, py, px);
                        }
                    }
                    out[(n * out_channels + oc) * plane + i * ow + j] = T::from_f64(sum);
                }
            }
        }
    }
}

/// The image at a point, with zeros outside.
fn bilinear<T: Number>(image: &[T], height: usize, width: usize, y: f64, x: f64) -> f64 {
    let (y0, x0) = (y.floor(), x.floor());
    let (ty, tx) = (y - y0, x - x0);
    let pixel = |y: f64, x: f64| {
        let inside = y >= 0.0 && x >= 0.0 && y < height as f64 && x < width as f64;
        if inside { image[y as usize * width + x as usize].to_f64() } else { 0.0 }
    };
    (1.0 - ty) * ((1.0 - tx) * pixel(y0, x0) + tx * pixel(y0, x0 + 1.0))
        + ty * ((1.0 - tx) * pixel(y0 + 1.0, x0) + tx * pixel(y0 + 1.0, x0 + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors() {
        assert_eq!([-1.0, 0.5, 3.0, 5.0].map(|x| reflect(x, 0.0, 2.0)), [1.0, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn grids_between_pixels() {
        let sample = |g: f64, how, border| {
            let mut y = [0.0];
            grid_sample(&[1.0, 3.0], 1, 1, &[2], &[g], how, border, true, &mut y);
            y[0]
        };
        assert_eq!(sample(0.0, Interpolation::Linear, Border::Zeros), 2.0);
        assert_eq!(sample(2.0, Interpolation::Linear, Border::Zeros), 1.5);
        assert_eq!(sample(2.0, Interpolation::Linear, Border::Clamp), 3.0);
        assert_eq!(sample(2.0, Interpolation::Linear, Border::Reflect), 2.0);
        assert_eq!(sample(0.9, Interpolation::Nearest, Border::Zeros), 3.0);
        assert!((cubic(0.25, -0.75).iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn regions() {
        let x: Vec<f32> = (0..16).map(|v| v as f32).collect();
        let p = RoiAlign { max: false, half_pixel: true, output: [1, 1], sampling: 2, scale: 1.0 };
        let mut y = [0.0];
        roi_align(&x, [1, 1, 4, 4], &[0.0, 0.0, 4.0, 4.0], &[0], &p, &mut y);
        assert_eq!(y, [7.5]);
        max_roi_pool(&x, [1, 1, 4, 4], &[0.0, 0.0, 0.0, 1.0, 1.0], [1, 1], 1.0, &mut y);
        assert_eq!(y, [5.0]);
    }

    #[test]
    fn undeformed_windows_convolve() {
        let p = DeformConv {
            x: [1, 1, 2, 2],
            w: [1, 1, 2, 2],
            output: [1, 1],
            groups: 1,
            offset_groups: 1,
            strides: [1; 2],
            dilations: [1; 2],
            begin: [0; 2],
        };
        let mut y = [0.0];
        deform_conv(&p, &[1.0, 2.0, 3.0, 4.0], &[1.0; 4], &[0.0; 8], Some(&[0.5]), None, &mut y);
        assert_eq!(y, [10.5]);
        let half = [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        deform_conv(&p, &[1.0, 2.0, 3.0, 4.0], &[1.0; 4], &half, None, None, &mut y);
        assert_eq!(y, [11.0]);
    }
}
