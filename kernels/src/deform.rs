//! Deformable convolution over two axes (Dai et al., 2017), with masks (Zhu et al., 2018): a matrix product over patches
//! that are sampled between pixels.
//!
//! ```text
//! x_last = x, channels last
//! for pixels of the output, as many as fit into a workspace
//!     for pixels, groups of offsets, taps                      in parallel
//!         place = where the tap lies + offset
//!         patch[pixel][group][tap][channels] = mask * the mean of the four pixels round the place, by distance
//!     for groups
//!         out[group][o][pixels] = w[group] * transpose(patches of the group) + bias[o]
//! ```
//!
//! Offsets and masks are shared by the channels of a group of offsets, so that a place is computed once for all of them.

use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::gemm::{Matrix, Rhs, gemm, part};
use crate::movement;
use crate::par::{Cx, DisjointMut};
use crate::sampling::DeformConv;
use crate::simd::{Kernel, Simd, dispatch};
use core::ops::Range;

/// Elements of patches that are made at once: what stays near (4 MiB).
const PATCHES: usize = 1 << 20;
/// Tasks that make them.
const TASKS: usize = 64;

/// Computes `out`; tensors are laid out channels first, as ONNX's DeformConv has them: offsets
/// `[batch, offset_groups, taps, (y, x), pixels]`, masks `[batch, offset_groups, taps, pixels]`.
///
/// # Errors
/// If slices do not have the sizes, or these exceed the address space.
pub fn deform_conv(
    cx: &Cx<'_>,
    p: &DeformConv,
    x: &[f32],
    w: &[f32],
    offset: &[f32],
    bias: Option<&[f32]>,
    mask: Option<&[f32]>,
    out: &mut [f32],
) -> Result<()> {
    use crate::conv::{check_len, volume};
    let [batch, channels, height, width] = p.x;
    let [out_channels, per_group, kh, kw] = p.w;
    let (image, plane, taps) = (volume(&[height, width])?, volume(&p.output)?, volume(&[kh, kw])?);
    let (k, row) = (volume(&[per_group, taps])?, volume(&[channels, taps])?);
    check_len("x", x.len(), volume(&[batch, channels, image])?)?;
    check_len("the weights", w.len(), volume(&[out_channels, k])?)?;
    check_len("the offsets", offset.len(), volume(&[batch, p.offset_groups, taps, 2, plane])?)?;
    check_len("the bias", bias.map_or(out_channels, <[f32]>::len), out_channels)?;
    let masks = volume(&[batch, p.offset_groups, taps, plane])?;
    check_len("the mask", mask.map_or(masks, <[f32]>::len), masks)?;
    check_len("the output", out.len(), volume(&[batch, out_channels, plane])?)?;
    if out.is_empty() || row == 0 {
        let bias = |i: usize| bias.map_or(0.0, |bias| bias[i / plane % out_channels]);
        out.iter_mut().enumerate().for_each(|(i, y)| *y = bias(i));
        return Ok(());
    }
    let chunk = (PATCHES / row).clamp(1, plane);
    let lengths = [x.len() + channels, w.len(), chunk * row].map(|len| len.next_multiple_of(16));
    cx.with_workspace(lengths.iter().sum(), |workspace| {
        let (x_last, rest) = workspace.split_at_mut(lengths[0]);
        let (rows, patches) = rest.split_at_mut(lengths[1]);
        let patches = &mut patches[..chunk * row];
        let (x_last, zeros) = x_last.split_at_mut(x.len());
        zeros.fill(0.0);
        let (from, to) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(x_last));
        movement::transpose(cx, 4, &[batch, channels, image], &[0, 2, 1], from, to)?;
        // To [out, tap, in], the order of a patch.
        let (from, to) = (bytemuck::cast_slice(w), bytemuck::cast_slice_mut(&mut rows[..w.len()]));
        movement::transpose(cx, 4, &[out_channels, per_group, taps], &[0, 2, 1], from, to)?;
        for n in 0..batch {
            for first in (0..plane).step_by(chunk) {
                let pixels = first..(first + chunk).min(plane);
                let count = pixels.len();
                let image = &x_last[n * image * channels..][..image * channels];
                let s = Samples { p, n, image, zeros: &zeros[..channels], offset, mask, row };
                let tasks = count.min(TASKS);
                let to = DisjointMut::new(&mut *patches);
                cx.for_each(tasks, 8 * (count * row) as u64, &|task| {
                    let some = part(count, tasks, task);
                    // SAFETY: each task has its own rows.
                    let to = unsafe { to.range(some.start * row, some.len() * row) };
                    dispatch(cx.isa(), Sample { s: &s, pixels: first + some.start..first + some.end, to });
                });
                if cx.cancelled() {
                    return Ok(());
                }
                for group in 0..p.groups {
                    let outputs = out_channels / p.groups;
                    let a = Matrix::new(&rows[group * outputs * k..][..outputs * k], outputs, k);
                    let data = &patches[group * k..];
                    let b = Matrix { data, rows: count, cols: k, row_stride: row, col_stride: 1 }.transposed();
                    let at = (n * out_channels + group * outputs) * plane;
                    let y = &mut out[at..at + outputs * plane];
                    gemm(cx, a, Rhs::Plain(b), &Epilogue::default(), &mut y[first..], plane)?;
                    for (y, bias) in y.chunks_exact_mut(plane).zip(bias.iter().flat_map(|b| &b[group * outputs..])) {
                        y[pixels.clone()].iter_mut().for_each(|y| *y += bias);
                    }
                }
            }
        }
        Ok(())
    })
}

/// What the patches of an image are made of.
struct Samples<'a> {
    p: &'a DeformConv,
    /// Which image.
    n: usize,
    /// It, channels last.
    image: &'a [f32],
    /// A pixel outside of it.
    zeros: &'a [f32],
    offset: &'a [f32],
    mask: Option<&'a [f32]>,
    /// Elements of the patches of a pixel.
    row: usize,
}

/// The patches of some pixels of the output.
struct Sample<'a> {
    s: &'a Samples<'a>,
    pixels: Range<usize>,
    to: &'a mut [f32],
}

impl Kernel for Sample<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { s: &Samples { p, n, image, zeros, offset, mask, row }, pixels, to } = self;
        let [_, channels, height, width] = p.x;
        let [_, per_group, kh, kw] = p.w;
        let ([_, ow], plane, taps) = (p.output, p.output[0] * p.output[1], kh * kw);
        let per_offset = channels / p.offset_groups;
        for (pixel, patch) in pixels.zip(to.chunks_exact_mut(row)) {
            let at = [pixel / ow, pixel % ow];
            for index in 0..p.offset_groups * taps {
                let (group, tap) = (index / taps, index % taps);
                let index = n * p.offset_groups * taps + index;
                let place = |d: usize, tap: usize| {
                    let base = (at[d] * p.strides[d] + tap * p.dilations[d]) as f32 - p.begin[d] as f32;
                    base + offset[(index * 2 + d) * plane + pixel]
                };
                let (y, x) = (place(0, tap / kw), place(1, tap % kw));
                let (top, left) = (y.floor(), x.floor());
                let (ty, tx) = (y - top, x - left);
                let m = mask.map_or(1.0, |mask| mask[index * plane + pixel]);
                let corner = |y: f32, x: f32| {
                    let inside = y >= 0.0 && x >= 0.0 && y < height as f32 && x < width as f32;
                    if inside { &image[(y as usize * width + x as usize) * channels..][..channels] } else { zeros }
                };
                let corners = [(top, left), (top, left + 1.0), (top + 1.0, left), (top + 1.0, left + 1.0)];
                let from = corners.map(|(y, x)| corner(y, x));
                let [a, b] = [(1.0 - ty) * m, ty * m];
                let weights = [a * (1.0 - tx), a * tx, b * (1.0 - tx), b * tx];
                // The channels that share the offset, by the groups that they are in.
                let mut c = group * per_offset;
                while c < (group + 1) * per_offset {
                    let own = c / per_group;
                    let end = ((own + 1) * per_group).min((group + 1) * per_offset);
                    let to = &mut patch[(own * taps + tap) * per_group + c - own * per_group..][..end - c];
                    blend(s, from.map(|x| &x[c..end]), weights, to);
                    c = end;
                }
            }
        }
    }
}

/// `y = sum of x[i] * weights[i]`, all of one length.
#[inline(always)]
fn blend<S: Simd>(s: S, x: [&[f32]; 4], weights: [f32; 4], y: &mut [f32]) {
    let len = y.len();
    let mut i = 0;
    while i + S::LANES <= len {
        let mut sum = s.mul(s.load(&x[0][i..]), s.splat(weights[0]));
        for k in 1..4 {
            sum = s.mul_add(s.load(&x[k][i..]), s.splat(weights[k]), sum);
        }
        s.store(&mut y[i..], sum);
        i += S::LANES;
    }
    while i < len {
        y[i] = x[0][i] * weights[0] + x[1][i] * weights[1] + x[2][i] * weights[2] + x[3][i] * weights[3];
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::deform_conv as reference;
    use crate::testing::{each_context, integers};

    #[test]
    fn any_groups_match_the_definition() {
        for (channels, groups, offset_groups, masked) in
            [([6, 4], 1, 1, false), ([24, 10], 2, 3, true), ([40, 6], 1, 2, true), ([12, 12], 4, 1, false)]
        {
            let p = DeformConv {
                x: [2, channels[0], 7, 9],
                w: [channels[1], channels[0] / groups, 3, 2],
                output: [4, 9],
                groups,
                offset_groups,
                strides: [2, 1],
                dilations: [1, 2],
                begin: [1, 1],
            };
            let parts = |len: usize, seed: u32| integers(len, seed).iter().map(|v| v * 0.37).collect::<Vec<f32>>();
            let per_pixel = 2 * offset_groups * 6 * 36;
            let x = parts(2 * channels[0] * 63, 1);
            let w = parts(channels[1] * p.w[1] * 6, 2);
            let (offset, mask, bias) = (parts(2 * per_pixel, 3), parts(per_pixel, 4), parts(channels[1], 5));
            let mask = masked.then_some(&mask[..]);
            let mut want = vec![0.0; 2 * channels[1] * 36];
            reference(&p, &x, &w, &offset, Some(&bias), mask, &mut want);
            each_context(|cx| {
                let mut got = vec![f32::NAN; want.len()];
                deform_conv(cx, &p, &x, &w, &offset, Some(&bias), mask, &mut got).unwrap();
                for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                    assert!((g - w).abs() <= 1e-4 * (1.0 + w.abs()), "{} {p:?} {i}: {g} for {w}", cx.isa());
                }
                assert!(deform_conv(cx, &p, &x[1..], &w, &offset, None, mask, &mut got).is_err());
            });
        }
    }

    #[test]
    fn patches_of_many_pixels_are_made_in_parts() {
        let p = DeformConv {
            x: [1, 512, 16, 20],
            w: [3, 512, 3, 3],
            output: [16, 20],
            groups: 1,
            offset_groups: 1,
            strides: [1; 2],
            dilations: [1; 2],
            begin: [1; 2],
        };
        let (x, w, offset) = (integers(512 * 320, 1), integers(3 * 512 * 9, 2), integers(18 * 320, 3));
        let mut want = vec![0.0; 3 * 320];
        reference(&p, &x, &w, &offset, None, None, &mut want);
        each_context(|cx| {
            let mut got = vec![f32::NAN; want.len()];
            deform_conv(cx, &p, &x, &w, &offset, None, None, &mut got).unwrap();
            assert_eq!(got, want, "{}", cx.isa());
        });
    }
}
