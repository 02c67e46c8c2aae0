//! Convolution in one, two and three dimensions, channels last: a matrix product over patches.
//!
//! ```text
//! C[pixel, o] = epilogue(sum over (kd, kh, kw, c) of patch(pixel)[kd, kh, kw, c] * W[kd, kh, kw, c, o])
//! ```
//!
//! - 1x1, stride 1, no padding: the activation is the left operand as it lies.
//! - k x k: the matrix product asks for a block of rows and a range of k at a time, and [`Patches`] copies just that
//!   from the image, with zeros for the padding. A patch is `kd * kh` runs of `kw * c` contiguous elements
//!   (`kw` times as many of `c` if dilated or grouped). There is no im2col buffer, unless it is small and many output
//!   channels would have it gathered many times: then all rows are gathered before, once.
//! - One channel per group: the kernel of [`crate::depthwise`]; a few channels per group: the same, see `spread`.
//! - One to four output channels: dot products, see `narrow`.
//! - 3 x 3 of stride 1 where it is faster and allowed: [`crate::winograd`].
//!
//! Channels-first tensors are transposed in a workspace around this.

use crate::depthwise::Depthwise;
use crate::epilogue::{Activation, Epilogue};
use crate::error::{Error, Result};
use crate::gemm::{self, Lhs, Matrix, OutPtr, PackedB, Problem, Rhs};
use crate::movement::{self, Axis};
use crate::par::{Cx, DisjointMut};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::winograd::{self, TileSize, Winograd};
use core::ops::Range;
use narrow::Narrow;
use spread::Spread;

mod narrow;
mod spread;

/// Where the channels of a tensor stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Channels last: `[batch, d, h, w, channels]`.
    Nhwc,
    /// Channels first: `[batch, channels, d, h, w]`.
    Nchw,
}

/// What of a convolution does not depend on its input.
///
/// Spatial sizes are `[d, h, w]`; with fewer dimensions the leading ones have kernel, stride and dilation 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvParams {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Groups; both channel counts are multiples of it.
    pub groups: usize,
    /// Size of the kernel.
    pub kernel: [usize; 3],
    /// Steps between neighbouring outputs.
    pub strides: [usize; 3],
    /// Steps between neighbouring taps.
    pub dilations: [usize; 3],
}

impl ConvParams {
    /// Refuses sizes of zero and channels that the groups do not divide.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { in_channels, out_channels, groups, kernel, strides, dilations } = self;
        if *groups == 0 || in_channels % groups != 0 || out_channels % groups != 0 {
            return Err(Error::new(format!(
                "{in_channels} input and {out_channels} output channels are not multiples of {groups} groups"
            )));
        }
        if [kernel, strides, dilations].iter().any(|sizes| sizes.contains(&0)) {
            return Err(Error::new(format!(
                "kernel {kernel:?}, strides {strides:?} and dilations {dilations:?} must not be 0"
            )));
        }
        Ok(())
    }

    /// Size of the output for an input, `[d, h, w]`.
    ///
    /// # Errors
    /// If the kernel does not fit into the padded input.
    pub fn output_spatial(&self, input: &ConvInput) -> Result<[usize; 3]> {
        let ConvParams { kernel, strides, dilations, .. } = self;
        let mut out = [0; 3];
        for d in 0..3 {
            let reach = (kernel[d] - 1).checked_mul(dilations[d]).and_then(|x| x.checked_add(1));
            let padded =
                input.spatial[d].checked_add(input.pads_begin[d]).and_then(|x| x.checked_add(input.pads_end[d]));
            out[d] = match (padded, reach) {
                // Half of the address space: positions are computed with signed numbers.
                (Some(padded), Some(reach)) if reach <= padded && padded <= isize::MAX as usize => {
                    (padded - reach) / strides[d] + 1
                }
                _ => {
                    return Err(Error::new(format!(
                        "a kernel of {kernel:?} with dilations {dilations:?} does not fit an input of {:?} with pads \
                         {:?} and {:?}",
                        input.spatial, input.pads_begin, input.pads_end
                    )));
                }
            };
        }
        Ok(out)
    }

    /// The same convolution of such an input without the sides of the kernel that meet nothing but padding, whatever the
    /// output: its parameters, its padding, and the first tap that is left.
    ///
    /// A 3 x 3 kernel whose dilation is the size of the image is its tap in the middle.
    ///
    /// # Errors
    /// If the kernel does not fit into the padded input.
    pub fn trimmed(&self, input: &ConvInput) -> Result<(Self, ConvInput, [usize; 3])> {
        let out = self.output_spatial(input)?;
        let (mut params, mut part, mut first) = (self.clone(), input.clone(), [0; 3]);
        for d in 0..3 {
            let (taps, dilation, pads) = (self.kernel[d], self.dilations[d], [input.pads_begin[d], input.pads_end[d]]);
            let used = |&t: &usize| {
                // The first output for which the tap is not before the image.
                let o = pads[0].saturating_sub(t * dilation).div_ceil(self.strides[d]);
                o < out[d] && o * self.strides[d] + t * dilation < pads[0] + input.spatial[d]
            };
            let (Some(start), Some(last)) = ((0..taps).find(used), (0..taps).rfind(used)) else { continue };
            // There is no padding of negative size.
            let start = start.min(pads[0] / dilation);
            let after = (taps - 1 - last).min(pads[1] / dilation);
            first[d] = start;
            params.kernel[d] = taps - start - after;
            part.pads_begin[d] -= start * dilation;
            part.pads_end[d] -= after * dilation;
        }
        Ok((params, part, first))
    }

    /// Columns of the output, of which there are `ow`, whose taps all lie inside the line.
    pub(crate) fn interior(&self, input: &ConvInput, ow: usize) -> Range<usize> {
        let (stride, reach) = (self.strides[2], (self.kernel[2] - 1) * self.dilations[2]);
        let start = input.pads_begin[2].div_ceil(stride).min(ow);
        match (input.spatial[2] + input.pads_begin[2]).checked_sub(reach + 1) {
            Some(last) => start..(last / stride + 1).clamp(start, ow),
            None => start..start,
        }
    }
}

/// What of a convolution depends on its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvInput {
    /// Images.
    pub batch: usize,
    /// Size of each, `[d, h, w]`; missing leading dimensions are 1.
    pub spatial: [usize; 3],
    /// Zeros before each dimension.
    pub pads_begin: [usize; 3],
    /// Zeros after each dimension.
    pub pads_end: [usize; 3],
}

/// How a convolution is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Every product of an input and a weight, as the definition says.
    Direct,
    /// Fewer products of sums of inputs and sums of weights, see [`crate::winograd`].
    Winograd(TileSize),
}

impl Algorithm {
    /// The fastest for a convolution and an input that is worth its memory. The number of images does not count, which
    /// often is known only when a model runs.
    pub fn choose(isa: Isa, params: &ConvParams, input: &ConvInput) -> Self {
        if Self::depends_on_input(isa, params) { Self::by_size(params, input) } else { Self::Direct }
    }

    /// [`choose`](Self::choose) for a convolution that may be of either kind.
    pub(crate) fn by_size(params: &ConvParams, input: &ConvInput) -> Self {
        let size = params.output_spatial(input).ok().and_then(|out| winograd::choose(params, out));
        size.map_or(Self::Direct, Self::Winograd)
    }

    /// Whether [`choose`](Self::choose) looks at the input.
    pub fn depends_on_input(isa: Isa, params: &ConvParams) -> bool {
        Winograd::supports(isa, params)
    }
}

/// A convolution with its weights packed for one instruction set.
#[derive(Clone, Debug)]
pub struct Conv {
    isa: Isa,
    params: ConvParams,
    weights: Weights,
    bias: Option<Vec<f32>>,
}

#[derive(Clone, Debug)]
enum Weights {
    /// Per group a matrix of `kd * kh * kw * in/groups` rows and `out/groups` columns.
    Gemm(Vec<PackedB>),
    /// One channel per group.
    Depthwise(Depthwise),
    /// Few channels per group.
    Spread(Spread),
    /// Few output channels.
    Narrow(Narrow),
    Winograd(Winograd),
}

/// The product of sizes, or an error that they exceed the address space.
pub(crate) fn volume(sizes: &[usize]) -> Result<usize> {
    sizes
        .iter()
        .try_fold(1usize, |product, &size| product.checked_mul(size))
        .filter(|&product| product <= isize::MAX as usize / size_of::<f32>())
        .ok_or_else(|| Error::new(format!("a tensor of {sizes:?} elements does not fit the address space")))
}

/// Of weights `[..., kd, kh, kw]` the part of each kernel that begins at `first`.
///
/// # Panics
/// If it ends outside of the kernel.
pub fn part_of_kernels(weights: &[f32], kernel: [usize; 3], first: [usize; 3], part: [usize; 3]) -> Vec<f32> {
    let mut out = Vec::with_capacity(weights.len() / kernel.iter().product::<usize>() * part.iter().product::<usize>());
    for kernel_of_one in weights.chunks_exact(kernel.iter().product()) {
        for line in 0..part[0] * part[1] {
            let (z, y) = (first[0] + line / part[1], first[1] + line % part[1]);
            out.extend_from_slice(&kernel_of_one[(z * kernel[1] + y) * kernel[2] + first[2]..][..part[2]]);
        }
    }
    out
}

/// Refuses a slice that does not have the `wanted` number of elements.
pub(crate) fn check_len(name: &str, len: usize, wanted: usize) -> Result<()> {
    if len == wanted { Ok(()) } else { Err(Error::new(format!("{name} has {len} elements, expected {wanted}"))) }
}

impl Conv {
    /// Packs `weights`, laid out `[out, in / groups, kd, kh, kw]` as in ONNX.
    ///
    /// # Errors
    /// If sizes are zero, groups do not divide the channels, `weights` or `bias` have the wrong length, or the algorithm
    /// is not for these parameters ([`Algorithm::choose`] names one that is).
    pub fn new(
        isa: Isa,
        params: ConvParams,
        algorithm: Algorithm,
        weights: &[f32],
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        params.check()?;
        let ConvParams { in_channels, out_channels, groups, kernel, .. } = params;
        let (ipg, opg) = (in_channels / groups, out_channels / groups);
        let taps = volume(&kernel)?;
        check_len("the weights", weights.len(), volume(&[out_channels, ipg, taps])?)?;
        if let Some(bias) = bias {
            check_len("the bias", bias.len(), out_channels)?;
        }
        let weights = if let Algorithm::Winograd(size) = algorithm {
            if !Winograd::supports(isa, &params) {
                return Err(Error::new(format!("no Winograd convolution for {params:?}")));
            }
            Weights::Winograd(Winograd::new(isa, size, &params, weights, bias)?)
        } else if ipg == 1 && opg == 1 && groups > 1 && Depthwise::supports(&params) {
            Weights::Depthwise(Depthwise::new(&params, weights, bias)?)
        } else if Spread::supports(isa, &params) {
            Weights::Spread(Spread::new(&params, weights, bias)?)
        } else if Narrow::supports(isa, &params) {
            Weights::Narrow(Narrow::new(isa, &params, weights, bias)?)
        } else {
            let k = taps * ipg;
            let mut rows = vec![0.0; if taps == 1 { 0 } else { opg * k }];
            let pack = |group: usize| {
                let weights = &weights[group * opg * k..][..opg * k];
                let matrix = if taps == 1 {
                    Matrix::new(weights, opg, k)
                } else {
                    // [out, in, tap] to [out, tap, in]: the order in which patches lie in memory.
                    for (row, weights) in rows.chunks_exact_mut(k.max(1)).zip(weights.chunks_exact(k.max(1))) {
                        for (tap, row) in row.chunks_exact_mut(ipg).enumerate() {
                            for (c, x) in row.iter_mut().enumerate() {
                                *x = weights[c * taps + tap];
                            }
                        }
                    }
                    Matrix::new(&rows, opg, k)
                };
                PackedB::new(isa, matrix.transposed())
            };
            Weights::Gemm((0..groups).map(pack).collect::<Result<_>>()?)
        };
        Ok(Self { isa, params, weights, bias: bias.map(<[f32]>::to_vec) })
    }

    /// What it was made with.
    pub fn params(&self) -> &ConvParams {
        &self.params
    }

    /// How it is computed.
    pub fn algorithm(&self) -> Algorithm {
        match &self.weights {
            Weights::Gemm(_) | Weights::Depthwise(_) | Weights::Spread(_) | Weights::Narrow(_) => Algorithm::Direct,
            Weights::Winograd(winograd) => Algorithm::Winograd(winograd.size()),
        }
    }

    /// Memory the packed weights hold.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Gemm(groups) => groups.iter().map(PackedB::bytes).sum(),
            Weights::Depthwise(depthwise) => depthwise.bytes(),
            Weights::Spread(spread) => spread.bytes(),
            Weights::Narrow(narrow) => narrow.bytes(),
            Weights::Winograd(winograd) => winograd.bytes(),
        }
    }

    /// See [`ConvParams::output_spatial`].
    ///
    /// # Errors
    /// If the kernel does not fit into the padded input.
    pub fn output_spatial(&self, input: &ConvInput) -> Result<[usize; 3]> {
        self.params.output_spatial(input)
    }

    /// `out = activation(conv(x) + bias + residual)`; all tensors in `layout`.
    ///
    /// # Errors
    /// If slices do not have the lengths that `input` says, or `cx` runs another instruction set than the weights were
    /// packed for.
    pub fn run(
        &self,
        cx: &Cx<'_>,
        input: &ConvInput,
        layout: Layout,
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        out: &mut [f32],
    ) -> Result<()> {
        if cx.isa() != self.isa {
            return Err(Error::new(format!("the weights were packed for {}, but {} runs", self.isa, cx.isa())));
        }
        let out_spatial = self.output_spatial(input)?;
        let (c, o) = (self.params.in_channels, self.params.out_channels);
        let [d, h, w] = input.spatial;
        let [od, oh, ow] = out_spatial;
        check_len("the input", x.len(), volume(&[input.batch, d, h, w, c])?)?;
        check_len("the output", out.len(), volume(&[input.batch, od, oh, ow, o])?)?;
        if let Some(residual) = residual {
            check_len("the residual", residual.len(), out.len())?;
        }
        if out.is_empty() {
            return Ok(());
        }
        channels_last(
            cx,
            layout,
            input.batch,
            (c, d * h * w, x),
            (o, od * oh * ow, residual, out),
            |x, residual, out| self.run_channels_last(cx, input, out_spatial, x, residual, activation, out),
        )
    }

    fn run_channels_last(
        &self,
        cx: &Cx<'_>,
        input: &ConvInput,
        out_spatial: [usize; 3],
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        out: &mut [f32],
    ) -> Result<()> {
        let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = self.params;
        let packed = match &self.weights {
            Weights::Gemm(packed) => packed,
            Weights::Depthwise(depthwise) => {
                depthwise.run(cx, &self.params, input, out_spatial, x, residual, activation, out);
                return Ok(());
            }
            Weights::Spread(spread) => return spread.run(cx, input, out_spatial, x, residual, activation, out),
            Weights::Narrow(narrow) => {
                narrow.run(cx, &self.params, input, out_spatial, x, residual, activation, out);
                return Ok(());
            }
            Weights::Winograd(winograd) => {
                return winograd.run(cx, &self.params, input, out_spatial, x, residual, activation, out);
            }
        };
        let (ipg, opg) = (in_channels / groups, out_channels / groups);
        let m = out.len() / out_channels;
        let k = packed[0].k();
        let direct = kernel == [1; 3] && strides == [1; 3] && out_spatial == input.spatial;
        let bias = self.bias.as_deref();
        if direct && groups == 1 {
            let epilogue = Epilogue { bias, residual, activation };
            return gemm::gemm(cx, Matrix::new(x, m, k), Rhs::Packed(&packed[0]), &epilogue, out, opg);
        }
        let c = OutPtr(out.as_mut_ptr());
        let problem = |group: usize| Problem {
            a: (),
            b: Rhs::Packed(&packed[group]),
            c: c.offset(group * opg),
            ldc: out_channels,
            bias: bias.map(|bias| &bias[group * opg..][..opg]),
            residual: residual.map(|residual| &residual[group * opg..]),
            activation,
        };
        if direct {
            return gemm::run(cx, groups, m, opg, k, false, false, &|group| {
                let rows = Matrix { data: &x[group * ipg..], rows: m, cols: k, row_stride: in_channels, col_stride: 1 };
                problem(group).with(rows)
            });
        }
        let pads = |d: usize| input.pads_begin[d] + input.pads_end[d];
        let padded = [0, 1, 2].map(|d| input.spatial[d] + pads(d));
        if kernel[0] > 1
            && in_channels <= PADDED_CHANNELS
            && padded != input.spatial
            && let Ok(len) = volume(&[input.batch, padded[0], padded[1], padded[2], in_channels])
            && len / 4 <= x.len()
        {
            return cx.with_workspace(len, |workspace| {
                workspace.fill(0.0);
                let (mut from, mut to, mut axes) =
                    (in_channels, in_channels, [Axis { len: in_channels, src: 1, dst: 1 }; 5]);
                let mut first = 0;
                for d in (0..3).rev() {
                    axes[d + 1] = Axis { len: input.spatial[d], src: from as isize, dst: to };
                    first += input.pads_begin[d] * to;
                    (from, to) = (from * input.spatial[d], to * padded[d]);
                }
                axes[0] = Axis { len: input.batch, src: from as isize, dst: to };
                let (from, to) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(&mut *workspace));
                movement::copy_strided(cx, 4, &axes, from, 0, to, first)?;
                let input = ConvInput { batch: input.batch, spatial: padded, pads_begin: [0; 3], pads_end: [0; 3] };
                self.run_channels_last(cx, &input, out_spatial, workspace, residual, activation, out)
            });
        }
        let patches = |group: usize| Patches {
            x,
            channels: in_channels,
            first: group * ipg,
            depth: ipg,
            spatial: input.spatial,
            out_spatial,
            kernel,
            strides,
            dilations,
            pads: input.pads_begin,
        };
        let lda = gemm::leading_dimension(k);
        if groups == 1 && opg >= GATHER_ONCE_COLUMNS && k > 0 && m.saturating_mul(lda) <= GATHER_ONCE {
            return cx.with_workspace(m * lda, |workspace| {
                let patches = patches(0);
                let rows = DisjointMut::new(workspace);
                let tasks = m.min(GATHER_TASKS);
                cx.for_each(tasks, (m * k) as u64, &|task| {
                    let some = gemm::part(m, tasks, task);
                    // SAFETY: each task has its own rows.
                    let dst = unsafe { rows.range(some.start * lda, some.len() * lda) };
                    patches.gather(cx.isa(), some, 0..k, dst, lda);
                });
                if cx.cancelled() {
                    return Ok(());
                }
                let a = Matrix { data: workspace, rows: m, cols: k, row_stride: lda, col_stride: 1 };
                gemm::run(cx, 1, m, opg, k, false, false, &|group| problem(group).with(a))
            });
        }
        gemm::run(cx, groups, m, opg, k, false, true, &|group| problem(group).with(patches(group)))
    }
}

/// Channels up to which images of three dimensions are copied with their padding: there a sixth of the patches may reach
/// into it, and to clip their short runs takes several times as long as to copy them.
const PADDED_CHANNELS: usize = 4;
/// Output channels from which a small number of patches is gathered once: with fewer, blocks do not share rows.
const GATHER_ONCE_COLUMNS: usize = 256;
/// Elements of patches that are gathered once at most: what stays near (1 MiB).
const GATHER_ONCE: usize = 1 << 18;
/// Tasks of this gathering.
const GATHER_TASKS: usize = 16;

/// Runs a channels-last kernel on tensors of any layout: `(channels, pixels per image, elements)` each.
pub(crate) fn channels_last(
    cx: &Cx<'_>,
    layout: Layout,
    batch: usize,
    (c, pixels, x): (usize, usize, &[f32]),
    (o, out_pixels, residual, out): (usize, usize, Option<&[f32]>, &mut [f32]),
    kernel: impl FnOnce(&[f32], Option<&[f32]>, &mut [f32]) -> Result<()>,
) -> Result<()> {
    // With one channel or one pixel both layouts are the same memory.
    let turn_x = layout == Layout::Nchw && c != 1 && pixels != 1;
    let turn_out = layout == Layout::Nchw && o != 1 && out_pixels != 1;
    let turn_residual = turn_out && residual.is_some();
    if !turn_x && !turn_out {
        return kernel(x, residual, out);
    }
    let lengths = [
        if turn_x { x.len() } else { 0 },
        if turn_residual { out.len() } else { 0 },
        if turn_out { out.len() } else { 0 },
    ]
    .map(|len| len.next_multiple_of(16));
    cx.with_workspace(lengths.iter().sum(), |workspace| {
        let (x_last, rest) = workspace.split_at_mut(lengths[0]);
        let (residual_last, rest) = rest.split_at_mut(lengths[1]);
        let out_last = &mut rest[..lengths[2]];
        let turn = |rows: usize, cols: usize, src: &[f32], dst: &mut [f32]| {
            let dst = &mut dst[..src.len()];
            let dims = [batch, rows, cols];
            movement::transpose(cx, 4, &dims, &[0, 2, 1], bytemuck::cast_slice(src), bytemuck::cast_slice_mut(dst))
        };
        let x = if turn_x {
            turn(c, pixels, x, x_last)?;
            &x_last[..x.len()]
        } else {
            x
        };
        let residual = match residual {
            Some(residual) if turn_residual => {
                turn(o, out_pixels, residual, residual_last)?;
                Some(&residual_last[..residual.len()])
            }
            residual => residual,
        };
        if turn_out {
            let out_last = &mut out_last[..out.len()];
            kernel(x, residual, out_last)?;
            turn(out_pixels, o, out_last, out)
        } else {
            kernel(x, residual, out)
        }
    })
}

/// The left operand of a k x k convolution: row = output pixel, column = `(kd, kh, kw, c)`.
struct Patches<'a> {
    x: &'a [f32],
    /// Channels of the tensor: elements between pixels.
    channels: usize,
    /// First channel of the group.
    first: usize,
    /// Channels of the group.
    depth: usize,
    spatial: [usize; 3],
    out_spatial: [usize; 3],
    kernel: [usize; 3],
    strides: [usize; 3],
    dilations: [usize; 3],
    pads: [usize; 3],
}

impl Lhs for Patches<'_> {
    fn direct(&self) -> Option<(*const f32, usize)> {
        None
    }

    fn gather(&self, isa: Isa, rows: Range<usize>, ks: Range<usize>, dst: &mut [f32], ld: usize) {
        dispatch(isa, Gather { patches: self, rows, ks, dst, ld });
    }
}

struct Gather<'a> {
    patches: &'a Patches<'a>,
    rows: Range<usize>,
    ks: Range<usize>,
    dst: &'a mut [f32],
    ld: usize,
}

impl Kernel for Gather<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { patches: p, rows, ks, dst, ld } = self;
        if ks.is_empty() {
            return;
        }
        let [id, ih, iw] = p.spatial;
        let [od, oh, ow] = p.out_spatial;
        let [_, kh, kw] = p.kernel;
        // Taps side by side in memory form one run.
        let merged = p.dilations[2] == 1 && p.depth == p.channels;
        let (taps, run) = if merged { (kw, kw * p.depth) } else { (1, p.depth) };
        let runs = ks.start / run..ks.end.div_ceil(run);
        let runs_per_row = kw / taps;
        // The pieces of runs that are asked for, if there are few, for patches without padding: where they stand after the
        // first tap of the patch, where they go, how many elements they have.
        let mut pieces = [(0, 0, 0); MAX_PIECES];
        let few = runs.len() <= MAX_PIECES;
        let (mut to, mut from, mut extent) = (0, ks.start - runs.start * run, 0);
        for (piece, r) in pieces.iter_mut().zip(runs.clone()) {
            let (tap, line) = (r % runs_per_row * taps, r / runs_per_row);
            let [dz, dy, dx] = p.dilations;
            let start = ((line / kh * dz * ih + line % kh * dy) * iw + tap * dx) * p.channels + from;
            let len = (run - from).min(ks.len() - to);
            *piece = (start, to, len);
            extent = extent.max(start + len);
            to += len;
            from = 0;
        }
        let mut at = [rows.start / ow / oh / od, rows.start / ow / oh % od, rows.start / ow % oh, rows.start % ow];
        let reach = [0, 1, 2].map(|d| (p.kernel[d] - 1) * p.dilations[d]);
        for row in dst.chunks_mut(ld).take(rows.len()) {
            let [b, z, y, x] = at;
            let corner = [0, 1, 2].map(|d| (at[d + 1] * p.strides[d]).wrapping_sub(p.pads[d]));
            let inside = (0..3).all(|d| corner[d] < p.spatial[d] && reach[d] < p.spatial[d] - corner[d]);
            if few && inside {
                let start = (((b * id + corner[0]) * ih + corner[1]) * iw + corner[2]) * p.channels + p.first;
                let (x, row) = (&p.x[start..][..extent], &mut row[..ks.len()]);
                for &(from, to, len) in &pieces[..runs.len()] {
                    // SAFETY: `extent` and the lengths of all pieces, which follow each other, were just checked.
                    unsafe { copy_ptr(s, row.as_mut_ptr().add(to), x.as_ptr().add(from), len) };
                }
                step(&mut at, [od, oh, ow]);
                continue;
            }
            for r in runs.clone() {
                // The part of this run that is asked for, counted from the run's first element.
                let from = ks.start.max(r * run) - r * run;
                let to = ks.end.min((r + 1) * run) - r * run;
                let piece = &mut row[r * run + from - ks.start..][..to - from];
                let (tap, line) = (r % runs_per_row * taps, r / runs_per_row);
                // Positions in the padded image cannot overflow: it was checked to be half an address space at most.
                let position = |d: usize, out: usize, tap: usize| {
                    (out * p.strides[d] + tap * p.dilations[d]) as isize - p.pads[d] as isize
                };
                let (iz, iy) = (position(0, z, line / kh), position(1, y, line % kh));
                let ix = position(2, x, tap);
                if iz < 0 || iz >= id as isize || iy < 0 || iy >= ih as isize {
                    fill(s, piece);
                    continue;
                }
                // Elements of the run that lie inside the line.
                let inside = ix.min(0).unsigned_abs().min(taps) * p.depth
                    ..(iw as isize - ix).clamp(0, taps as isize) as usize * p.depth;
                let (start, end) = (inside.start.clamp(from, to), inside.end.clamp(from, to));
                if start >= end {
                    fill(s, piece);
                    continue;
                }
                let (before, rest) = piece.split_at_mut(start - from);
                let (middle, after) = rest.split_at_mut(end - start);
                let line = ((b * id + iz as usize) * ih + iy as usize) * iw;
                // `ix` may be negative, but `start` skips what lies before the line.
                let pixel = (line as isize + ix) * p.channels as isize + (p.first + start) as isize;
                if !before.is_empty() {
                    fill(s, before);
                }
                copy(s, middle, &p.x[pixel as usize..][..end - start]);
                if !after.is_empty() {
                    fill(s, after);
                }
            }
            step(&mut at, [od, oh, ow]);
        }
    }
}

/// Runs of a patch whose places are computed once per block.
const MAX_PIECES: usize = 64;

/// The next pixel, `[batch, d, h, w]`.
#[inline(always)]
fn step(at: &mut [usize; 4], [d, h, w]: [usize; 3]) {
    at[3] += 1;
    if at[3] == w {
        at[3] = 0;
        at[2] += 1;
        if at[2] == h {
            at[2] = 0;
            at[1] += 1;
            if at[1] == d {
                at[1] = 0;
                at[0] += 1;
            }
        }
    }
}

/// `dst = src`, same lengths.
#[inline(always)]
fn copy<S: Simd>(s: S, dst: &mut [f32], src: &[f32]) {
    assert!(src.len() == dst.len());
    // SAFETY: checked above.
    unsafe { copy_ptr(s, dst.as_mut_ptr(), src.as_ptr(), dst.len()) }
}

/// Copies `len` elements. Not `copy_from_slice`: runs are short, and a call of `memcpy` (in the page, of the browser's)
/// costs more than moving them.
///
/// # Safety
/// They must be readable and writable and not overlap.
#[inline(always)]
unsafe fn copy_ptr<S: Simd>(s: S, dst: *mut f32, src: *const f32, len: usize) {
    // SAFETY: promised by the caller; vectors lie inside, the last one overlaps the one before.
    unsafe {
        if len < S::LANES {
            for i in 0..len {
                *dst.add(i) = *src.add(i);
            }
            return;
        }
        let last = len - S::LANES;
        if len <= 3 * S::LANES {
            // Three taps of three channels are two vectors and one element: no loop, nothing to predict.
            for i in [0, S::LANES.min(last), last] {
                s.store_ptr(dst.add(i), s.load_ptr(src.add(i)));
            }
            return;
        }
        let mut i = 0;
        while i < last {
            s.store_ptr(dst.add(i), s.load_ptr(src.add(i)));
            i += S::LANES;
        }
        s.store_ptr(dst.add(last), s.load_ptr(src.add(last)));
    }
}

/// `dst = 0`.
#[inline(always)]
fn fill<S: Simd>(s: S, dst: &mut [f32]) {
    let mut chunks = dst.chunks_exact_mut(S::LANES);
    for chunk in &mut chunks {
        s.store(chunk, s.splat(0.0));
    }
    for x in chunks.into_remainder() {
        *x = 0.0;
    }
}

#[cfg(test)]
mod tests;
