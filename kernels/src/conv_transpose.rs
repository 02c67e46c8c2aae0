//! Transposed convolution, channels last: a matrix product and a sum over overlapping patches.
//!
//! ```text
//! patches[pixel, (kd, kh, kw, o)] = sum over c of x[pixel, c] * W[c, o, kd, kh, kw]
//! for rows of the output                               in parallel; each row gathers what falls on it
//!     row = bias
//!     for taps and input rows that meet it
//!         for ix: row[ix*stride + kw*dilation - pad] += patches[ix, kw]
//!     row = activation(row)
//! ```

use crate::conv::{ConvParams, Layout, channels_last, check_len, volume};
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

/// A transposed convolution with its weights packed for one instruction set.
#[derive(Clone, Debug)]
pub struct ConvTranspose {
    isa: Isa,
    params: ConvParams,
    /// Per group a matrix of `in/groups` rows and `kd * kh * kw * out/groups` columns.
    weights: Vec<PackedB>,
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
        let weights = packed.collect::<Result<_>>()?;
        let bias = bias.map_or_else(|| vec![0.0; out_channels], <[f32]>::to_vec);
        Ok(Self { isa, params, weights, bias })
    }

    /// What it was made with.
    pub fn params(&self) -> &ConvParams {
        &self.params
    }

    /// Memory the packed weights hold.
    pub fn bytes(&self) -> usize {
        self.weights.iter().map(PackedB::bytes).sum()
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
        let pixels = d * h * w;
        let taps: usize = self.params.kernel.iter().product();
        let patches_len = volume(&[pixels, taps, o])?;
        channels_last(cx, layout, input.batch, (c, pixels, x), (o, od * oh * ow, None, out), |x, _, out| {
            cx.with_workspace(patches_len, |patches| {
                for (image, out) in out.chunks_exact_mut(od * oh * ow * o).enumerate() {
                    self.image(
                        cx,
                        input,
                        [od, oh, ow],
                        &x[image * pixels * c..][..pixels * c],
                        activation,
                        patches,
                        out,
                    )?;
                }
                Ok(())
            })
        })
    }

    fn image(
        &self,
        cx: &Cx<'_>,
        input: &ConvTransposeInput,
        out_spatial: [usize; 3],
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
            b: Rhs::Packed(&self.weights[group]),
            c: c.offset(group * taps * opg),
            ldc: taps * out_channels,
            bias: None,
            residual: None,
            activation: Activation::Identity,
        })?;
        let [od, oh, ow] = out_spatial;
        let row_len = ow * out_channels;
        let out = DisjointMut::new(out);
        let patches = &*patches;
        cx.for_each(od * oh, patches.len() as u64, &|row| {
            // SAFETY: every task has its own row.
            let out = unsafe { out.range(row * row_len, row_len) };
            let at = [row / oh, row % oh];
            dispatch(cx.isa(), Row { transpose: self, input, patches, at, opg, taps, activation, out });
        });
        Ok(())
    }
}

/// One row of the output.
struct Row<'a> {
    transpose: &'a ConvTranspose,
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
        let Self { transpose, input, patches, at, opg, taps, activation, out } = self;
        let ConvParams { out_channels, kernel, strides, dilations, .. } = transpose.params;
        let [kd, kh, kw] = kernel;
        let [_, h, w] = input.spatial;
        let ow = out.len() / out_channels;
        for pixel in out.chunks_exact_mut(out_channels) {
            pixel.copy_from_slice(&transpose.bias);
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
            Activate { activation, c: out.as_mut_ptr(), rows: 1, cols: out.len(), ld: 0 }.run(s);
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
                    let params = ConvParams {
                        in_channels,
                        out_channels,
                        groups,
                        kernel,
                        strides: [1, stride, stride],
                        dilations: [1, 1, 1 + stride % 2],
                    };
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
