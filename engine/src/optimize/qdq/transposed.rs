//! A transposed convolution becomes a convolution of integers whose channels become pixels, see [`Phases`].

use super::between::Made;
use super::{Product, Scheme, Weights, byte_tensor, columns, dequantized, input};
use crate::graph::Node;
use crate::ops::conv::Conv;
use crate::ops::conv_transpose::ConvTranspose;
use crate::ops::depth_to_space::Blocks;
use crate::ops::integer_product::Kind;
use crate::ops::slice::Slice;
use crate::ops::spatial::{AutoPad, Axes, Window};
use crate::optimize::pattern::{Operand, View};
use weblane_kernels::conv::{ConvParams, Layout};
use weblane_kernels::conv_transpose::Phases;
use weblane_kernels::epilogue::Activation;

/// Places of windows over weights, above which the operator stays real.
const MAX_PLACES: usize = 4;

pub(super) fn convolution(view: &View, node: &Node, y: Scheme, bounds: (i32, i32)) -> Option<Made> {
    let c = node.op.get::<ConvTranspose>()?;
    let plain = c.layout == Layout::Nchw && c.activation == Activation::Identity;
    let sized = c.output_shape.is_none() && c.window.auto_pad == AutoPad::NotSet;
    let (a, a_scheme) = dequantized(view, input(node, 0)?)?;
    let b = Weights::dequantized(view, input(node, 1)?, 1)?;
    let at = |list: &[usize], i: usize, default| list.get(i).copied().unwrap_or(default);
    let stride = at(&c.window.strides, 0, 1);
    let even = at(&c.window.strides, 1, 1) == stride;
    let &[in_channels, per_group, height, width] = b.dims.as_slice() else { return None };
    if !(plain && sized && even) {
        return None;
    }
    let out_channels = per_group.checked_mul(c.groups)?;
    let params = ConvParams {
        in_channels,
        out_channels,
        groups: c.groups,
        kernel: [1, height, width],
        strides: [1, stride, stride],
        dilations: [1, at(&c.window.dilations, 0, 1), at(&c.window.dilations, 1, 1)],
    };
    let phases = Phases::new(&params).filter(|phases| phases.places() / MAX_PLACES <= height * width)?;
    // Padding and cuts do not depend on the size of the input, which need not be known.
    let trim = |i: usize| {
        let (begin, end) = (at(&c.window.pads, i, 0), at(&c.window.pads, 2 + i, 0));
        phases.trim(1 + i, begin, end, at(&c.output_padding, i, 0))
    };
    let [rows, cols] = [trim(0)?, trim(1)?];

    let tensor = view.tensor(b.id)?;
    // Scales and zero points are for all channels, or for those of a group.
    if [b.scales.len(), b.zeros.len()].iter().any(|&len| len != 1 && len != per_group) {
        return None;
    }
    let zero = |channel: usize| b.zeros[channel % b.zeros.len()] as u8;
    let &ConvParams { out_channels: n, kernel: [_, kh, kw], .. } = phases.conv();
    let dims = [n, in_channels / c.groups, kh, kw];
    let constant = byte_tensor(tensor.dtype(), &dims, &phases.weights(tensor.bytes(), zero).ok()?)?;

    let bias = match input(node, 2) {
        Some(bias) => {
            let bias = view.tensor(bias)?.as_slice::<f32>().ok().filter(|b| b.len() == out_channels)?;
            Some(phases.spread(bias))
        }
        None => None,
    };
    let spread = |list: &[f32]| if list.len() == 1 { list.to_vec() } else { phases.spread(list) };
    let units: Vec<f32> = b.scales.iter().map(|s| a_scheme.scale * s).collect();
    let zeros = if b.zeros.len() == 1 { b.zeros.clone() } else { phases.spread(&b.zeros) };
    let b = Weights { scales: spread(&b.scales), zeros, dims: dims.to_vec(), ..b };
    let conv = Conv {
        window: Window {
            kernel: None,
            strides: Axes::new(),
            dilations: Axes::new(),
            pads: Axes::from_slice(&[rows.pads[0], cols.pads[0], rows.pads[1], cols.pads[1]]),
            auto_pad: AutoPad::NotSet,
            ceil: false,
        },
        groups: c.groups,
        layout: Layout::Nchw,
        activation: Activation::Identity,
        residual: false,
    };
    let kind = Kind::Conv(conv);
    let (k, n) = columns(&kind, &b.dims)?;
    if !b.fit(k, n) {
        return None;
    }
    let product = Product { kind, a, a_scheme, b, units: spread(&units), bias };
    let (op, mut operands) = product.quantized(y, bounds)?;
    operands[1] = Operand::Constant(constant);
    let mut made: Made = (op.into(), operands);
    if stride > 1 {
        let blocks = Blocks { to_space: true, size: stride, channel_first: c.groups > 1, layout: Layout::Nchw };
        made = (blocks.into(), vec![Operand::Computed(made.0, made.1)]);
    }
    let cuts = [rows.cuts, cols.cuts];
    if cuts != [[0; 2]; 2] {
        let ends = cuts.map(|[_, end]| if end == 0 { i64::MAX } else { -(end as i64) });
        let attributes = Some((cuts.map(|[begin, _]| begin as i64).to_vec(), ends.to_vec()));
        let slice = Slice { attributes, axes: Some(vec![2, 3]) };
        made = (slice.into(), vec![Operand::Computed(made.0, made.1)]);
    }
    Some(made)
}
