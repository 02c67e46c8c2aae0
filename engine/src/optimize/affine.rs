//! What follows a convolution channel by channel goes into its weights: BatchNormalization, and `Mul`, `Add`, `Sub` and
//! `Div` by a constant per channel.
//!
//! ```text
//! f * (w x + b) + a  =  (f w) x + (f b + a)            f, a: one number per output channel
//! ```
//!
//! The same for `Gemm`, whose output channels are columns. Chains vanish one by one.

use super::Pass;
use super::pattern::{Operand, Replacement, View, rewrite};
use crate::error::Result;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::batch_norm::{BatchNormalization, fold_statistics};
use crate::ops::conv::Conv;
use crate::ops::conv_transpose::ConvTranspose;
use crate::ops::gemm::Gemm;
use crate::tensor::Tensor;
use weblane_kernels::conv::Layout;
use weblane_kernels::epilogue::Activation;

/// A factor and an addend per channel.
struct Affine {
    factor: Vec<f32>,
    addend: Vec<f32>,
}

/// Moves factors and addends per channel into the weights before them.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, fold).map(drop)
}

fn fold(view: &View, i: usize) -> Result<Option<Replacement>> {
    let node = &view.graph.nodes[i];
    for source in node.operands() {
        let Some((p, product)) = view.producer(source) else { continue };
        if view.uses(source) != 1 || !view.is_f32(source) || product.outputs.len() != 1 {
            continue;
        }
        let operands = if let Some(conv) = product.op.get::<Conv>() {
            let free = conv.activation == Activation::Identity && !conv.residual && conv.layout == Layout::Nchw;
            if free { fold_conv(view, node, source, product, None)? } else { None }
        } else if let Some(conv) = product.op.get::<ConvTranspose>() {
            let free = conv.activation == Activation::Identity && conv.layout == Layout::Nchw;
            if free { fold_conv(view, node, source, product, Some(conv.groups))? } else { None }
        } else if let Some(gemm) = product.op.get::<Gemm>() {
            let free = gemm.activation == Activation::Identity && gemm.alpha == 1.0 && gemm.beta == 1.0;
            if free { fold_gemm(view, node, source, product, gemm)? } else { None }
        } else {
            None
        };
        if let Some([weights, bias]) = operands {
            let operands = vec![product.inputs[0].into(), weights, bias];
            return Ok(Some(Replacement { root: i, nodes: vec![i, p], op: product.op.clone(), operands }));
        }
    }
    Ok(None)
}

/// The `float32` elements of an optional constant operand: `Some(None)` if it is left out, `None` if it is no such
/// constant.
fn optional_f32<'a>(view: &View<'a>, node: &Node, k: usize) -> Option<Option<&'a Tensor>> {
    match node.inputs.get(k).copied().flatten() {
        None => Some(None),
        Some(id) => view.tensor(id).filter(|t| t.as_slice::<f32>().is_ok()).map(|t| Some(&**t)),
    }
}

/// `transposed` has the groups of a transposed convolution, whose weights are `[in, out / groups, kernel...]`.
fn fold_conv(
    view: &View,
    node: &Node,
    source: ValueId,
    conv: &Node,
    transposed: Option<usize>,
) -> Result<Option<[Operand; 2]>> {
    let (Some(Some(w)), Some(bias)) = (optional_f32(view, conv, 1), optional_f32(view, conv, 2)) else {
        return Ok(None);
    };
    let &[rows, cols, ref kernel @ ..] = w.dims() else { return Ok(None) };
    let (Some(channels), taps) = (transposed.map_or(Some(rows), |g| cols.checked_mul(g)), kernel.iter().product())
    else {
        return Ok(None);
    };
    let groups = transposed.unwrap_or(1);
    if w.is_empty() || groups == 0 || rows % groups != 0 || bias.is_some_and(|b| b.len() != channels) {
        return Ok(None);
    }
    let Some(affine) = affine(view, node, source, w.dims().len(), channels) else { return Ok(None) };
    let mut weights = w.clone();
    for (at, block) in view_mut(&mut weights)?.chunks_exact_mut(taps).enumerate() {
        let (row, col) = (at / cols, at % cols);
        let f = affine.factor[if transposed.is_some() { row / (rows / groups) * cols + col } else { row }];
        block.iter_mut().for_each(|v| *v *= f);
    }
    Ok(Some([Operand::Constant(weights), Operand::Constant(affine.bias(bias)?)]))
}

fn fold_gemm(view: &View, node: &Node, source: ValueId, product: &Node, gemm: &Gemm) -> Result<Option<[Operand; 2]>> {
    let (Some(Some(b)), Some(bias)) = (optional_f32(view, product, 1), optional_f32(view, product, 2)) else {
        return Ok(None);
    };
    let &[rows, cols] = b.dims() else { return Ok(None) };
    let (n, k) = if gemm.trans_b { (rows, cols) } else { (cols, rows) };
    // A bias of shape [n, 1] or a scalar is another broadcast.
    if n == 0 || k == 0 || bias.is_some_and(|b| b.len() != n || b.dims().last() != Some(&n)) {
        return Ok(None);
    }
    let Some(affine) = affine(view, node, source, 2, n) else { return Ok(None) };
    let mut weights = b.clone();
    for (at, v) in view_mut(&mut weights)?.iter_mut().enumerate() {
        *v *= affine.factor[if gemm.trans_b { at / k } else { at % n }];
    }
    Ok(Some([Operand::Constant(weights), Operand::Constant(affine.bias(bias)?)]))
}

fn view_mut(tensor: &mut Tensor) -> Result<&mut [f32]> {
    Ok(bytemuck::cast_slice_mut(tensor.bytes_mut()))
}

impl Affine {
    /// `f b + a`.
    fn bias(&self, bias: Option<&Tensor>) -> Result<Tensor> {
        let mut sum = self.addend.clone();
        if let Some(b) = bias {
            let terms = b.as_slice::<f32>()?.iter().zip(&self.factor);
            sum.iter_mut().zip(terms).for_each(|(s, (b, f))| *s += f * b);
        }
        Tensor::from_slice(&[sum.len()], &sum)
    }
}

/// What a node does to each channel (axis 1) of `source`, if it does no more than that.
fn affine(view: &View, node: &Node, source: ValueId, rank: usize, channels: usize) -> Option<Affine> {
    let affine = match node.op.get::<BatchNormalization>() {
        Some(norm) => {
            if norm.training.is_some() || norm.layout != Layout::Nchw || node.inputs.first() != Some(&Some(source)) {
                return None;
            }
            let mut lists = Vec::with_capacity(4);
            for k in 1..5 {
                let list = optional_f32(view, node, k)??.as_slice::<f32>().ok()?;
                lists.push(Some(list).filter(|l| l.len() == channels)?);
            }
            let (factor, addend) = fold_statistics(lists[0], lists[1], lists[2], lists[3], norm.epsilon);
            Affine { factor, addend }
        }
        None => {
            let name = node.op.name();
            if !matches!(name, "Mul" | "Add" | "Sub" | "Div") {
                return None;
            }
            let &[Some(a), Some(b)] = node.inputs.as_slice() else { return None };
            let left = a == source;
            let c = per_channel(view, if left { b } else { a }, rank, channels)?;
            let (zeros, ones) = (|| vec![0.0; channels], || vec![1.0; channels]);
            match (name, left) {
                ("Mul", _) => Affine { factor: c, addend: zeros() },
                ("Add", _) => Affine { factor: ones(), addend: c },
                ("Sub", true) => Affine { factor: ones(), addend: c.iter().map(|v| -v).collect() },
                ("Sub", false) => Affine { factor: vec![-1.0; channels], addend: c },
                ("Div", true) => Affine { factor: c.iter().map(|v| 1.0 / v).collect(), addend: zeros() },
                _ => return None,
            }
        }
    };
    // 0 * infinity must not appear where the model has a number.
    let finite = affine.factor.iter().chain(&affine.addend).all(|v| v.is_finite());
    finite.then_some(affine)
}

/// A constant that broadcasts to one number per channel (axis 1) of a value of the given rank.
fn per_channel(view: &View, id: ValueId, rank: usize, channels: usize) -> Option<Vec<f32>> {
    let tensor = view.tensor(id)?;
    let (dims, values) = (tensor.dims(), tensor.as_slice::<f32>().ok()?);
    if dims.len() > rank {
        return None;
    }
    if let [one] = values {
        return Some(vec![*one; channels]);
    }
    let along = |axis: usize| (axis + dims.len()).checked_sub(rank).map_or(1, |at| dims[at]);
    let fits = (0..rank).all(|axis| along(axis) == if axis == 1 { channels } else { 1 });
    fits.then(|| values.to_vec())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, float, int, ints, noise};
    use super::*;

    fn norm(n: &mut Net, x: ValueId, channels: usize) -> ValueId {
        let [scale, bias, mean] = [(); 3].map(|()| n.weights(&[channels]));
        let var: Vec<f32> = noise(channels, 9).iter().map(|v| v.abs() + 0.1).collect();
        let var = n.constant(&[channels], &var);
        n.op_with("BatchNormalization", &[x, scale, bias, mean, var], &[("epsilon", float(1e-3))])
    }

    #[test]
    fn batch_norm_goes_into_plain_and_grouped_convolutions() {
        for (groups, with_bias, rank) in [(1, false, 2), (1, true, 2), (2, true, 2), (4, false, 1)] {
            let mut n = Net::new(14);
            let spatial = [6, 5];
            let x = n.input("x", &[&[2, 4], &spatial[..rank]].concat());
            let w = n.weights(&[&[8, 4 / groups], &[3, 3][..rank]].concat());
            let mut operands = vec![x, w];
            if with_bias {
                operands.push(n.weights(&[8]));
            }
            let y = n.op_with("Conv", &operands, &[("group", int(groups as i64))]);
            let y = norm(&mut n, y, 8);
            n.output(y);
            assert_eq!(n.passed(run), ["Conv"]);
        }
    }

    #[test]
    fn batch_norm_goes_into_transposed_convolutions() {
        for groups in [1, 2] {
            let mut n = Net::new(14);
            let x = n.input("x", &[1, 4, 3, 3]);
            let w = n.weights(&[4, 3, 2, 2]);
            let attrs = [("group", int(groups)), ("strides", ints(&[2, 2]))];
            let y = n.op_with("ConvTranspose", &[x, w], &attrs);
            let y = norm(&mut n, y, 3 * groups as usize);
            n.output(y);
            assert_eq!(n.passed(run), ["ConvTranspose"]);
        }
    }

    #[test]
    fn arithmetic_per_channel_goes_into_the_convolution() {
        // As tf2onnx and older exporters spell a normalisation: factor, then addend; constants of rank 3 or 4, or scalar.
        let mut n = Net::new(11);
        let x = n.input("x", &[1, 3, 5, 5]);
        let w = n.weights(&[4, 3, 3, 3]);
        let y = n.op_with("Conv", &[x, w], &[("pads", ints(&[1, 1, 1, 1]))]);
        let factor = n.weights(&[1, 4, 1, 1]);
        let y = n.op("Mul", &[factor, y]);
        let addend = n.weights(&[4, 1, 1]);
        let y = n.op("Sub", &[y, addend]);
        let two = n.scalar(2.0);
        let y = n.op("Div", &[y, two]);
        let y = n.op("Sub", &[two, y]);
        let y = n.op("Add", &[y, addend]);
        n.output(y);
        assert_eq!(n.passed(run), ["Conv"]);
    }

    #[test]
    fn columns_of_a_product() {
        for trans_b in [0, 1] {
            let mut n = Net::new(13);
            let x = n.symbolic("x", &["batch", "6"]);
            let w = n.weights(if trans_b == 1 { &[5, 6] } else { &[6, 5] });
            let b = n.weights(&[5]);
            let y = n.op_with("Gemm", &[x, w, b], &[("transB", int(trans_b))]);
            let y = norm(&mut n, y, 5);
            n.output(y);
            assert_eq!(n.passed(run), ["Gemm"]);
        }
    }

    #[test]
    fn stays_where_it_would_change_something() {
        let build = |change: &dyn Fn(&mut Net, ValueId) -> ValueId| {
            let mut n = Net::new(14);
            let x = n.input("x", &[1, 3, 4, 4]);
            let w = n.weights(&[4, 3, 1, 1]);
            let y = n.op("Conv", &[x, w]);
            let y = change(&mut n, y);
            n.output(y);
            n.passed(run).len()
        };
        // The convolution's own result is an output.
        assert_eq!(
            build(&|n, y| {
                n.output(y);
                norm(n, y, 4)
            }),
            2
        );
        // Another reader.
        assert_eq!(
            build(&|n, y| {
                let z = norm(n, y, 4);
                n.op("Add", &[y, z])
            }),
            3
        );
        // A constant along another axis.
        assert_eq!(
            build(&|n, y| {
                let c = n.weights(&[1, 1, 1, 4]);
                n.op("Mul", &[y, c])
            }),
            2
        );
        // A constant that adds an axis.
        assert_eq!(
            build(&|n, y| {
                let c = n.weights(&[1, 1, 4, 1, 1]);
                n.op("Mul", &[y, c])
            }),
            2
        );
        // A division by the result.
        assert_eq!(
            build(&|n, y| {
                let c = n.weights(&[1, 4, 1, 1]);
                n.op("Div", &[c, y])
            }),
            2
        );
    }
}
