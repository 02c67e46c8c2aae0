//! Transposed convolution, channels last: a convolution whose channels become pixels, see [`Phases`], or, with groups and
//! strides, dilation, or where many places of windows would have no weight, a matrix product and a sum over overlapping
//! patches:
//!
//! ```text
//! patches[pixel, (kd, kh, kw, o)] = sum over c of x[pixel, c] * W[c, o, kd, kh, kw]
//! for rows of the output                               in parallel; each row gathers what falls on it
//!     row = bias
//!     for taps and input rows that meet it
//!         for ix: row[ix*stride + kw*dilation - pad] += patches[ix, kw]
//!     row = activation(row)
//! ```

use crate::conv::{Algorithm, Conv, ConvInput, ConvParams, Layout, channels_last, check_len, volume};
use crate::epilogue::Activation;
use crate::error::{Error, Result};
use crate::gemm::{self, Activate, Matrix, OutPtr, PackedB, Problem, Rhs};
use crate::par::{Cx, DisjointMut};
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// What of a transposed convolution depends on its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvTransposeInput {
    /// Images.
    pub batch: usize,
    /// Size of each, `[d, h, w]`; missing leading dimensions are 1.
    pub spatial: [usize; 3],
    /// Elements cut off at the start of each dimension of the output.
    pub pads_begin: [usize; 3],
    /// Elements cut off at its end.
    pub pads_end: [usize; 3],
    /// Elements added at its end, after cutting.
    pub output_padding: [usize; 3],
}

/// A transposed convolution as a convolution whose channels become pixels.
///
/// ```text
/// y[s q + p] = sum over j of x[q - j] w[s j + p]     stride s, phase p in 0..s, window of taps = ceil(k / s)
/// ```
///
/// Every phase is a convolution with the flipped weights at a distance of `s`; all phases together are one, with as many
/// times the channels as there are phases, the phase before the channel. With groups the channel comes first, so that those
/// of a group lie together. What padding cuts off is cut off by whole pixels of the convolution first, the rest from the
/// result. (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phases {
    channels: usize,
    kernel: [usize; 3],
    strides: [usize; 3],
    conv: ConvParams,
}

/// What padding makes of one dimension of [`Phases`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trim {
    /// Padding of the convolution, before and after.
    pub pads: [usize; 2],
    /// Pixels to cut off from its result, before and after.
    pub cuts: [usize; 2],
}

impl Phases {
    /// Without dilation, and with channels to compute.
    pub fn new(params: &ConvParams) -> Option<Self> {
        let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = *params;
        params.check().ok()?;
        let dense = (0..3).all(|d| dilations[d] == 1 || kernel[d] == 1);
        let taps: [usize; 3] = std::array::from_fn(|d| kernel[d].div_ceil(strides[d]));
        let phases = volume(&strides).ok()?;
        let conv = ConvParams {
            in_channels,
            out_channels: out_channels.checked_mul(phases)?,
            groups,
            kernel: taps,
            strides: [1; 3],
            dilations: [1; 3],
        };
        let some = in_channels > 0 && out_channels > 0;
        (dense && some).then_some(Self { channels: out_channels, kernel, strides, conv })
    }

    /// Places of all windows; those beyond the number of taps have no weight.
    pub fn places(&self) -> usize {
        (0..3).fold(1, |n, d| n.saturating_mul(self.conv.kernel[d]).saturating_mul(self.strides[d]))
    }

    /// The convolution, whose output channels are `[phase d, phase h, phase w, channel]`, or, with groups,
    /// `[channel, phase d, phase h, phase w]`.
    pub fn conv(&self) -> &ConvParams {
        &self.conv
    }

    /// Phase and channel of the result that an output channel of the convolution is.
    fn place(&self, n: usize) -> (usize, usize) {
        match self.conv.groups {
            1 => (n / self.channels, n % self.channels),
            _ => (n % self.phases(), n / self.phases()),
        }
    }

    fn phases(&self) -> usize {
        self.conv.out_channels / self.channels
    }

    /// Its weights `[out, in / groups, taps]`, from those of the transposed convolution, `[in, out / groups, kernel]`;
    /// `zero` is what stands where there are none, by output channel.
    ///
    /// # Errors
    /// If `weights` have the wrong length, or those of the convolution would not fit the address space.
    pub fn weights<T: Copy>(&self, weights: &[T], zero: impl Fn(usize) -> T) -> Result<Vec<T>> {
        let ConvParams { in_channels, out_channels, groups, kernel: taps, .. } = self.conv;
        let (ipg, opg) = (in_channels / groups, self.channels / groups);
        let [kd, kh, kw] = self.kernel;
        let [_, sh, sw] = self.strides;
        let size = volume(&self.kernel)?;
        check_len("the weights", weights.len(), volume(&[in_channels, opg, size])?)?;
        let mut packed = Vec::with_capacity(volume(&[out_channels, ipg, volume(&taps)?])?);
        for n in 0..out_channels {
            let (phase, o) = self.place(n);
            let phase = [phase / sw / sh, phase / sw % sh, phase % sw];
            let places = |d: usize| (0..taps[d]).rev().map(move |tap| tap * self.strides[d] + phase[d]);
            for i in o / opg * ipg..(o / opg + 1) * ipg {
                let weights = &weights[(i * opg + o % opg) * size..][..size];
                for (z, y) in places(0).flat_map(|z| places(1).map(move |y| (z, y))) {
                    packed.extend(places(2).map(|x| {
                        let inside = z < kd && y < kh && x < kw;
                        if inside { weights[(z * kh + y) * kw + x] } else { zero(o) }
                    }));
                }
            }
        }
        Ok(packed)
    }

    /// What is one value for each channel, or for each of a group, for the channels of the convolution.
    pub fn spread<T: Copy>(&self, values: &[T]) -> Vec<T> {
        (0..self.conv.out_channels).map(|n| values[self.place(n).1 % values.len()]).collect()
    }

    /// What cutting off `begin` and `end` pixels of dimension `d`, and adding `added` before that, asks of the convolution;
    /// nothing if numbers overflow.
    pub fn trim(&self, d: usize, begin: usize, end: usize, added: usize) -> Option<Trim> {
        let (stride, last_tap) = (self.strides[d], self.conv.kernel[d] - 1);
        // Whole pixels of the convolution that are not computed at its start.
        let first = (begin / stride).min(last_tap);
        // What the last input reaches, and what is added to it.
        let reach = self.kernel[d].checked_add(added)?;
        let pixels = reach.saturating_sub(end).div_ceil(stride).max(1);
        let cut_end = pixels.checked_mul(stride)?.checked_add(end)? - reach;
        Some(Trim { pads: [last_tap - first, pixels - 1], cuts: [begin - first * stride, cut_end] })
    }
}

impl Phases {
    /// The convolution and its channels' way to their pixels; `x` and `out` have the channels last.
    fn run(
        &self,
        cx: &Cx<'_>,
        conv: &Conv,
        input: &ConvTransposeInput,
        x: &[f32],
        activation: Activation,
        [od, oh, ow]: [usize; 3],
        out: &mut [f32],
    ) -> Result<()> {
        let [sd, sh, sw] = self.strides;
        let trim = |d: usize| {
            self.trim(d, input.pads_begin[d], input.pads_end[d], input.output_padding[d])
                .ok_or_else(|| Error::new(format!("padding of {input:?} overflows")))
        };
        let trims = [trim(0)?, trim(1)?, trim(2)?];
        let image = ConvInput {
            batch: 1,
            spatial: input.spatial,
            pads_begin: trims.map(|trim| trim.pads[0]),
            pads_end: trims.map(|trim| trim.pads[1]),
        };
        let convolve =
            |input: &ConvInput, x: &[f32], y: &mut [f32]| conv.run(cx, input, Layout::Nhwc, x, None, activation, y);
        if self.strides == [1; 3] && trims.iter().all(|trim| trim.cuts == [0; 2]) {
            return convolve(&ConvInput { batch: input.batch, ..image }, x, out);
        }
        let [cut_d, cut_h, cut_w] = trims.map(|trim| trim.cuts[0]);
        let [_, h, w] = conv.output_spatial(&image)?;
        let (channels, pixel) = (self.channels, self.conv.out_channels);
        let pixels = volume(&conv.output_spatial(&image)?)?;
        let (x_len, out_len) = (x.len() / input.batch, od * oh * ow * channels);
        cx.with_workspace(volume(&[pixels, pixel])?, |phases| {
            for (i, out) in out.chunks_exact_mut(out_len).enumerate() {
                convolve(&image, &x[i * x_len..][..x_len], phases)?;
                let (phases, out) = (&*phases, DisjointMut::new(out));
                cx.for_each(od * oh, out_len as u64, &|row| {
                    // SAFETY: every task has its own row.
                    let out = unsafe { out.range(row * ow * channels, ow * channels) };
                    let (z, y) = (row / oh + cut_d, row % oh + cut_h);
                    let line = &phases[(z / sd * h + y / sh) * w * pixel..][..w * pixel];
                    // The phases of one pixel along the line lie side by side.
                    let (phase, run) = ((z % sd * sh + y % sh) * sw * channels, sw * channels);
                    let mut place = cut_w * channels;
                    let mut left = out;
                    while !left.is_empty() {
                        let (dst, rest) = left.split_at_mut((run - place % run).min(left.len()));
                        dst.copy_from_slice(&line[place / run * pixel + phase + place % run..][..dst.len()]);
                        place += dst.len();
                        left = rest;
                    }
                });
            }
            Ok(())
        })
    }
}

/// What an element of a patch costs by being written, read and added, in multiplications. Chosen from both ways' times with 64
/// and with 256 channels.
const PATCH_COST: usize = 64;

/// A transposed convolution with its weights packed for one instruction set.
#[derive(Clone, Debug)]
pub struct ConvTranspose {
    isa: Isa,
    params: ConvParams,
    weights: Weights,
}

#[derive(Clone, Debug)]
enum Weights {
    Patches(Patches),
    Phases(Box<(Phases, Conv)>),
}

/// What sums over patches need.
#[derive(Clone, Debug)]
struct Patches {
    /// Per group a matrix of `in/groups` rows and `kd * kh * kw * out/groups` columns.
    groups: Vec<PackedB>,
    bias: Vec<f32>,
}

impl ConvTranspose {
    /// Packs `weights`, laid out `[in, out / groups, kd, kh, kw]` as in ONNX.
    ///
    /// # Errors
    /// If sizes are zero, groups do not divide the channels, or `weights` or `bias` have the wrong length.
    pub fn new(isa: Isa, params: ConvParams, weights: &[f32], bias: Option<&[f32]>) -> Result<Self> {
        params.check()?;
        let ConvParams { in_channels, out_channels, groups, kernel, .. } = params;
        let (ipg, opg) = (in_channels / groups, out_channels / groups);
        let taps = volume(&kernel)?;
        check_len("the weights", weights.len(), volume(&[in_channels, opg, taps])?)?;
        if let Some(bias) = bias {
            check_len("the bias", bias.len(), out_channels)?;
        }
        let cheaper = |phases: &Phases| {
            let patches = taps.saturating_mul(ipg.saturating_add(PATCH_COST));
            // Channels of several groups and phases do not lie in the order in which they are copied.
            (groups == 1 || params.strides == [1; 3]) && phases.places().saturating_mul(ipg) < patches
        };
        if let Some(phases) = Phases::new(&params).filter(cheaper) {
            let bias = bias.map(|bias| phases.spread(bias));
            let weights = phases.weights(weights, |_| 0.0)?;
            let conv = Conv::new(isa, phases.conv().clone(), Algorithm::Direct, &weights, bias.as_deref())?;
            return Ok(Self { isa, params, weights: Weights::Phases(Box::new((phases, conv))) });
        }
        let columns = taps * opg;
        let mut rows = vec![0.0; ipg * columns];
        let packed = (0..groups).map(|group| {
            // [in, out, tap] to [in, tap, out].
            for (i, row) in rows.chunks_exact_mut(columns.max(1)).enumerate() {
                let weights = &weights[(group * ipg + i) * columns..][..columns];
                for (tap, row) in row.chunks_exact_mut(opg).enumerate() {
                    for (o, x) in row.iter_mut().enumerate() {
                        *x = weights[o * taps + tap];
                    }
                }
            }
            PackedB::new(isa, Matrix::new(&rows, ipg, columns))
        });
        let groups = packed.collect::<Result<_>>()?;
        let bias = bias.map_or_else(|| vec![0.0; out_channels], <[f32]>::to_vec);
        Ok(Self { isa, params, weights: Weights::Patches(Patches { groups, bias }) })
    }

    /// What it was made with.
    pub fn params(&self) -> &ConvParams {
        &self.params
    }

    /// Memory the packed weights hold.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Patches(weights) => weights.groups.iter().map(PackedB::bytes).sum(),
            Weights::Phases(phases) => phases.1.bytes(),
        }
    }

    /// Size of the output for an input, `[d, h, w]`:
    /// `(in - 1) * stride + (kernel - 1) * dilation + 1 - pads + output_padding`.
    ///
    /// # Errors
    /// If nothing would be left, or too much.
    pub fn output_spatial(&self, input: &ConvTransposeInput) -> Result<[usize; 3]> {
        let ConvParams { kernel, strides, dilations, .. } = &self.params;
        let mut out = [0; 3];
        for d in 0..3 {
            let size = || {
                input.spatial[d]
                    .checked_sub(1)?
                    .checked_mul(strides[d])?
                    .checked_add((kernel[d] - 1).checked_mul(dilations[d])?)?
                    .checked_add(1)?
                    .checked_add(input.output_padding[d])?
                    .checked_sub(input.pads_begin[d].checked_add(input.pads_end[d])?)
                    .filter(|&size| size > 0 && size <= isize::MAX as usize / 2)
            };
            out[d] = size().ok_or_else(|| {
                Error::new(format!(
                    "a transposed convolution of {:?} with kernel {kernel:?}, strides {strides:?}, dilations \
                     {dilations:?}, pads {:?} and {:?} and output padding {:?} has no output",
                    input.spatial, input.pads_begin, input.pads_end, input.output_padding
                ))
            })?;
        }
        Ok(out)
    }

    /// `out = activation(conv_transpose(x) + bias)`; both tensors in `layout`.
    ///
    /// # Errors
    /// If slices do not have the lengths that `input` says, or `cx` runs another instruction set than the weights were
    /// packed for.
    pub fn run(
        &self,
        cx: &Cx<'_>,
        input: &ConvTransposeInput,
        layout: Layout,
        x: &[f32],
        activation: Activation,
        out: &mut [f32],
    ) -> Result<()> {
        if cx.isa() != self.isa {
            return Err(Error::new(format!("the weights were packed for {}, but {} runs", self.isa, cx.isa())));
        }
        let [od, oh, ow] = self.output_spatial(input)?;
        let [d, h, w] = input.spatial;
        let (c, o) = (self.params.in_channels, self.params.out_channels);
        check_len("the input", x.len(), volume(&[input.batch, d, h, w, c])?)?;
        check_len("the output", out.len(), volume(&[input.batch, od, oh, ow, o])?)?;
        if out.is_empty() {
            return Ok(());
        }
        let weights = match &self.weights {
            Weights::Patches(weights) => weights,
            Weights::Phases(phases) => {
                let (phases, conv) = &**phases;
                let sizes = (c, d * h * w, x);
                return channels_last(cx, layout, input.batch, sizes, (o, od * oh * ow, None, out), |x, _, out| {
                    phases.run(cx, conv, input, x, activation, [od, oh, ow], out)
                });
            }
        };
        let pixels = d * h * w;
        let taps: usize = self.params.kernel.iter().product();
        let patches_len = volume(&[pixels, taps, o])?;
        channels_last(cx, layout, input.batch, (c, pixels, x), (o, od * oh * ow, None, out), |x, _, out| {
            cx.with_workspace(patches_len, |patches| {
                for (image, out) in out.chunks_exact_mut(od * oh * ow * o).enumerate() {
                    let x = &x[image * pixels * c..][..pixels * c];
                    self.image(cx, weights, input, x, activation, patches, out)?;
                }
                Ok(())
            })
        })
    }

    fn image(
        &self,
        cx: &Cx<'_>,
        weights: &Patches,
        input: &ConvTransposeInput,
        x: &[f32],
        activation: Activation,
        patches: &mut [f32],
        out: &mut [f32],
    ) -> Result<()> {
        let ConvParams { in_channels, out_channels, groups, kernel, .. } = self.params;
        let (ipg, opg) = (in_channels / groups, out_channels / groups);
        let taps: usize = kernel.iter().product();
        let pixels: usize = input.spatial.iter().product();
        let c = OutPtr(patches.as_mut_ptr());
        gemm::run(cx, groups, pixels, taps * opg, ipg, false, false, &|group| Problem {
            a: Matrix {
                data: &x[(group * ipg).min(x.len())..],
                rows: pixels,
                cols: ipg,
                row_stride: in_channels,
                col_stride: 1,
            },
            b: Rhs::Packed(&weights.groups[group]),
            c: c.offset(group * taps * opg),
            ldc: taps * out_channels,
            bias: None,
            residual: None,
            activation: Activation::Identity,
        })?;
        let [od, oh, ow] = self.output_spatial(input)?;
        let row_len = ow * out_channels;
        let out = DisjointMut::new(out);
        let patches = &*patches;
        cx.for_each(od * oh, patches.len() as u64, &|row| {
            // SAFETY: every task has its own row.
            let out = unsafe { out.range(row * row_len, row_len) };
            let at = [row / oh, row % oh];
            dispatch(
                cx.isa(),
                Row { params: &self.params, bias: &weights.bias, input, patches, at, opg, taps, activation, out },
            );
        });
        Ok(())
    }
}

/// One row of the output.
struct Row<'a> {
    params: &'a ConvParams,
    bias: &'a [f32],
    input: &'a ConvTransposeInput,
    patches: &'a [f32],
    at: [usize; 2],
    opg: usize,
    taps: usize,
    activation: Activation,
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { params, bias, input, patches, at, opg, taps, activation, out } = self;
        let ConvParams { out_channels, kernel, strides, dilations, .. } = *params;
        let [kd, kh, kw] = kernel;
        let [_, h, w] = input.spatial;
        let ow = out.len() / out_channels;
        for pixel in out.chunks_exact_mut(out_channels) {
            pixel.copy_from_slice(bias);
        }
        // The input index whose tap falls on an output index.
        let source = |d: usize, out: usize, tap: usize| {
            let shifted = (out + input.pads_begin[d]).checked_sub(tap * dilations[d])?;
            (shifted % strides[d] == 0 && shifted / strides[d] < input.spatial[d]).then_some(shifted / strides[d])
        };
        for (td, th) in (0..kd).flat_map(|td| (0..kh).map(move |th| (td, th))) {
            let (Some(iz), Some(iy)) = (source(0, at[0], td), source(1, at[1], th)) else {
                continue;
            };
            for tw in 0..kw {
                let tap = (td * kh + th) * kw + tw;
                for ix in 0..w {
                    let Some(ox) = (ix * strides[2] + tw * dilations[2]).checked_sub(input.pads_begin[2]) else {
                        continue;
                    };
                    if ox >= ow {
                        break;
                    }
                    let pixel = &mut out[ox * out_channels..][..out_channels];
                    let patch = &patches[((iz * h + iy) * w + ix) * taps * out_channels..][..taps * out_channels];
                    // Per group: [tap][out / groups].
                    for (pixel, patch) in pixel.chunks_exact_mut(opg).zip(patch.chunks_exact(taps * opg)) {
                        let patch = &patch[tap * opg..][..opg];
                        let mut i = 0;
                        while i + S::LANES <= opg {
                            let sum = s.add(s.load(&pixel[i..]), s.load(&patch[i..]));
                            s.store(&mut pixel[i..], sum);
                            i += S::LANES;
                        }
                        for (pixel, patch) in pixel[i..].iter_mut().zip(&patch[i..]) {
                            *pixel += patch;
                        }
                    }
                }
            }
        }
        if activation != Activation::Identity {
            dispatch(S::ISA, Activate { activation, c: out.as_mut_ptr(), rows: 1, cols: out.len(), ld: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::gemm::conv_transpose as reference;
    use crate::testing::{each_context, integers};

    fn check(params: &ConvParams, input: &ConvTransposeInput) {
        let taps: usize = params.kernel.iter().product();
        let w = integers(params.in_channels * params.out_channels / params.groups * taps, 1);
        let bias = integers(params.out_channels, 2);
        let pixels: usize = input.spatial.iter().product();
        let x = integers(input.batch * pixels * params.in_channels, 3);
        each_context(|cx| {
            let conv = ConvTranspose::new(cx.isa(), params.clone(), &w, Some(&bias)).unwrap();
            let spatial = conv.output_spatial(input).unwrap();
            let want: Vec<f32> =
                reference(params, input, spatial, &x, &w, &bias).into_iter().map(|x| (x as f32).max(0.0)).collect();
            let mut got = vec![f32::NAN; want.len()];
            conv.run(cx, input, Layout::Nhwc, &x, Activation::Relu, &mut got).unwrap();
            assert_eq!(got, want, "{:?} {params:?} {input:?}", cx.isa());
            let turn = |x: &[f32], channels: usize| -> Vec<f32> {
                let pixels = x.len() / input.batch / channels;
                (0..x.len())
                    .map(|i| x[(i / channels / pixels * pixels + i % pixels) * channels + i / pixels % channels])
                    .collect()
            };
            conv.run(cx, input, Layout::Nchw, &turn(&x, params.in_channels), Activation::Relu, &mut got).unwrap();
            assert_eq!(got, turn(&want, params.out_channels));
        });
    }

    #[test]
    fn all_parameters() {
        for (in_channels, out_channels, groups) in [(3, 5, 1), (16, 9, 1), (6, 8, 2), (5, 5, 5)] {
            for kernel in [[1, 2, 2], [1, 3, 4], [2, 1, 3]] {
                for stride in [1, 2, 3] {
                    for (dilation, strides) in [(1, [1, stride, 2]), (2, [1, stride, stride]), (1, [2, 1, stride])] {
                        let dilations = [1, 1, dilation];
                        let params = ConvParams { in_channels, out_channels, groups, kernel, strides, dilations };
                        let input = ConvTransposeInput {
                            batch: 2,
                            spatial: [2, 4, 5],
                            pads_begin: [0, 1, 0],
                            pads_end: [0, 0, 2],
                            output_padding: [0, 0, stride - 1],
                        };
                        check(&params, &input);
                    }
                }
            }
        }
    }

    #[test]
    fn padding_cuts_phases() {
        let cases = [
            ([4, 4], 2, [1, 1], [1, 1], [0, 0]),
            ([3, 3], 2, [1, 0], [0, 2], [1, 1]),
            ([3, 2], 1, [2, 1], [0, 0], [0, 4]),
            ([6, 5], 3, [4, 1], [2, 3], [0, 1]),
            // More than a pixel of the convolution, at either end, and more than a window behind it.
            ([2, 2], 2, [5, 0], [0, 3], [0, 7]),
            ([8, 7], 4, [9, 13], [7, 9], [3, 0]),
        ];
        for ([kh, kw], stride, begin, end, added) in cases {
            for groups in [1, 2] {
                let params = ConvParams {
                    in_channels: 6,
                    out_channels: 10,
                    groups,
                    kernel: [1, kh, kw],
                    strides: [1, stride, stride],
                    dilations: [1; 3],
                };
                let input = ConvTransposeInput {
                    batch: 2,
                    spatial: [1, 6, 7],
                    pads_begin: [0, begin[0], begin[1]],
                    pads_end: [0, end[0], end[1]],
                    output_padding: [0, added[0], added[1]],
                };
                check(&params, &input);
            }
        }
    }

    #[test]
    fn wrong_operands_are_refused() {
        let params = ConvParams {
            in_channels: 2,
            out_channels: 3,
            groups: 1,
            kernel: [1, 2, 2],
            strides: [1; 3],
            dilations: [1; 3],
        };
        let input = ConvTransposeInput {
            batch: 1,
            spatial: [1, 2, 2],
            pads_begin: [0; 3],
            pads_end: [0, 3, 0],
            output_padding: [0; 3],
        };
        each_context(|cx| {
            assert!(ConvTranspose::new(cx.isa(), params.clone(), &[0.0; 23], None).is_err());
            assert_eq!(Phases::new(&ConvParams { in_channels: 0, ..params.clone() }), None);
            assert_eq!(Phases::new(&ConvParams { strides: [1, usize::MAX, 2], ..params.clone() }), None);
            let conv = ConvTranspose::new(cx.isa(), params.clone(), &[0.0; 24], None).unwrap();
            assert!(conv.output_spatial(&input).unwrap_err().to_string().contains("no output"));
            let huge = ConvTransposeInput { spatial: [1, usize::MAX, 2], ..input.clone() };
            assert!(conv.output_spatial(&huge).is_err());
            let fits = ConvTransposeInput { pads_end: [0; 3], ..input.clone() };
            let mut out = [0.0; 27];
            let mut run = |x: &[f32]| conv.run(cx, &fits, Layout::Nhwc, x, Activation::Identity, &mut out);
            assert!(run(&[0.0; 7]).is_err());
            assert!(run(&[0.0; 8]).is_ok());
        });
    }
}
