//! Convolutions of many groups with few channels each, on the kernel of depthwise convolutions.
//!
//! ```text
//! for each row y of the input, each i of the channels of a group        in parallel
//!     spread[y * inputs + i][x][o] = input[y][x][channel i of the group of o]
//! out = depthwise(spread) with kernels of (kh * inputs) x kw, strides of (s * inputs) x s
//! ```
//!
//! As products such groups are matrices of a few columns, of which a tile has room for many. The input becomes as many times
//! larger as a group has output channels; each output reads all of it that it needs with vectors over the output channels.

use super::{ConvInput, ConvParams};
use crate::depthwise::Depthwise;
use crate::epilogue::Activation;
use crate::error::Result;
use crate::par::{Cx, DisjointMut};
use crate::simd::Isa;

/// Most input channels of a group: each is a copy of the rows, and of the kernel.
const MAX_INPUTS: usize = 4;
/// Most output channels of a group: the factor by which the input grows.
const MAX_OUTPUTS: usize = 8;

/// A convolution of small groups with its weights packed.
#[derive(Clone, Debug)]
pub(super) struct Spread {
    depthwise: Depthwise,
    /// Of the depthwise convolution.
    params: ConvParams,
    /// Channels of a group: inputs, outputs.
    group: [usize; 2],
}

impl Spread {
    /// Whether a convolution can run here and should: fewer columns in a group than a tile of products has.
    pub(super) fn supports(isa: Isa, params: &ConvParams) -> bool {
        let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = *params;
        let (inputs, outputs) = (in_channels / groups, out_channels / groups);
        groups > 1
            && inputs <= MAX_INPUTS
            && outputs < MAX_OUTPUTS.min(2 * isa.lanes())
            && out_channels >= 2 * isa.lanes()
            // Copies of rows lie side by side, so taps must too.
            && dilations[1] == 1
            // Without taps around it there is little to compute for what is copied.
            && kernel[1] * kernel[2] > 1
            && strides[1].checked_mul(inputs).is_some()
            && Depthwise::supports(params)
    }

    /// Packs `weights` laid out `[out, in / groups, 1, kh, kw]`; lengths were checked.
    pub(super) fn new(params: &ConvParams, weights: &[f32], bias: Option<&[f32]>) -> Result<Self> {
        let ConvParams { in_channels, out_channels, groups, kernel: [_, kh, kw], strides, dilations } = *params;
        let group = [in_channels / groups, out_channels / groups];
        let [inputs, _] = group;
        // [out, in, kh, kw] to [out, kh, in, kw].
        let mut rows = Vec::with_capacity(weights.len());
        for weights in weights.chunks_exact((inputs * kh * kw).max(1)) {
            for y in 0..kh {
                for i in 0..inputs {
                    rows.extend_from_slice(&weights[(i * kh + y) * kw..][..kw]);
                }
            }
        }
        let params = ConvParams {
            in_channels: out_channels,
            out_channels,
            groups: out_channels,
            kernel: [1, kh * inputs, kw],
            strides: [1, strides[1] * inputs, strides[2]],
            dilations,
        };
        Ok(Self { depthwise: Depthwise::new(&params, &rows, bias)?, params, group })
    }

    pub(super) fn bytes(&self) -> usize {
        self.depthwise.bytes()
    }

    /// Channels last; lengths were checked, `out` is not empty.
    pub(super) fn run(
        &self,
        cx: &Cx<'_>,
        input: &ConvInput,
        out_spatial: [usize; 3],
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        out: &mut [f32],
    ) -> Result<()> {
        let [inputs, outputs] = self.group;
        let channels = self.params.out_channels;
        let in_channels = channels / outputs * inputs;
        let [d, h, w] = input.spatial;
        let len = super::volume(&[input.batch, d, h, inputs, w, channels])?;
        let times = |[d, h, w]: [usize; 3]| Ok([d, super::volume(&[h, inputs])?, w]);
        let rows = ConvInput {
            batch: input.batch,
            spatial: times(input.spatial)?,
            pads_begin: times(input.pads_begin)?,
            pads_end: times(input.pads_end)?,
        };
        cx.with_workspace(len, |workspace| {
            let spread = DisjointMut::new(workspace);
            let row = w * channels;
            cx.for_each(input.batch * d * h * inputs, len as u64, &|task| {
                let (y, i) = (task / inputs, task % inputs);
                // SAFETY: each task has its own row.
                let to = unsafe { spread.range(task * row, row) };
                let from = &x[y * w * in_channels..][..w * in_channels];
                for (to, from) in to.chunks_exact_mut(outputs).zip(from[i..].iter().step_by(inputs)) {
                    to.fill(*from);
                }
            });
            if cx.cancelled() {
                return;
            }
            self.depthwise.run(cx, &self.params, &rows, out_spatial, workspace, residual, activation, out);
        });
        Ok(())
    }
}
