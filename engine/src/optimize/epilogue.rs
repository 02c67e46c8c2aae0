//! Epilogues: what follows a product element by element is computed while the product is in registers.
//!
//! ```text
//! MatMul + bias [n]                  -> with bias
//! Conv or MatMul + other             -> with residual, if `other` has the shape of the result for sure
//! activation(Conv, MatMul or Gemm)   -> with activation
//! ```
//!
//! and MatMulNBits like MatMul. Kernels compute `activation(product + bias + residual)`, so nothing is added after an activation.

use super::Pass;
use super::activation::{activation_of, compose};
use super::pattern::{Operand, Replacement, View, rewrite};
use super::products::unflatten;
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use crate::ops::conv::Conv;
use crate::ops::conv_transpose::ConvTranspose;
use crate::ops::gemm::Gemm;
use crate::ops::integer_product::{IntegerProduct, Kind, Target};
use crate::ops::matmul::MatMul;
use crate::ops::matmul_nbits::MatMulNBits;
use crate::tensor::Tensor;
use weblane_kernels::epilogue::Activation;

/// Moves additions and activations into the products before them.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, |view, i| {
        Ok(match view.graph.nodes[i].op.name() {
            "Add" => add(view, i),
            "Reshape" | "Flatten" => unflatten(view, i),
            _ => activate(view, i),
        })
    })
    .map(drop)
}

/// The node that computes a `float32` value which has one reader and is no output.
fn only_product<'a>(view: &View<'a>, id: ValueId) -> Option<(usize, &'a Node)> {
    view.producer(id).filter(|(_, n)| view.uses(id) == 1 && n.outputs.len() == 1 && view.is_f32(id))
}

fn operands(node: &Node) -> Vec<Operand> {
    node.inputs.iter().map(|&id| id.into()).collect()
}

fn activate(view: &View, i: usize) -> Option<Replacement> {
    let (x, activation) = activation_of(view, &view.graph.nodes[i])?;
    let (p, product) = only_product(view, x)?;
    let op: Op = if let Some(conv) = product.op.get::<Conv>() {
        Conv { activation: compose(conv.activation, activation)?, ..conv.clone() }.into()
    } else if let Some(conv) = product.op.get::<ConvTranspose>() {
        ConvTranspose { activation: compose(conv.activation, activation)?, ..conv.clone() }.into()
    } else if let Some(matmul) = product.op.get::<MatMul>() {
        MatMul { activation: compose(matmul.activation, activation)?, ..matmul.clone() }.into()
    } else if let Some(gemm) = product.op.get::<Gemm>() {
        Gemm { activation: compose(gemm.activation, activation)?, ..gemm.clone() }.into()
    } else if let Some(few_bits) = product.op.get::<MatMulNBits>() {
        MatMulNBits { activation: compose(few_bits.activation, activation)?, ..few_bits.clone() }.into()
    } else {
        let mut integer = product.op.get::<IntegerProduct>()?.clone();
        let Target::Real { activation: last, .. } = &mut integer.target else { return None };
        *last = compose(*last, activation)?;
        integer.into()
    };
    Some(Replacement { root: i, nodes: vec![i, p], op, operands: operands(product) })
}

fn add(view: &View, i: usize) -> Option<Replacement> {
    let &[Some(a), Some(b)] = view.graph.nodes[i].inputs.as_slice() else { return None };
    // Of two products the later one takes the sum: the other is ready when it begins.
    let position = |id: ValueId| view.producer(id).map(|(p, _)| p);
    let order = if position(a) > position(b) { [(a, b), (b, a)] } else { [(b, a), (a, b)] };
    order
        .into_iter()
        .find_map(|(x, other)| add_bias(view, i, x, other))
        .or_else(|| order.into_iter().find_map(|(x, other)| add_residual(view, i, x, other)))
}

fn add_bias(view: &View, i: usize, x: ValueId, bias: ValueId) -> Option<Replacement> {
    let (p, product) = only_product(view, x)?;
    let plain = Activation::Identity;
    let (op, at): (Op, usize) = if let Some(integer) = product.op.get::<IntegerProduct>() {
        let mut integer = integer.clone();
        let (at, channels) = (integer.extras(), matches!(integer.kind, Kind::Conv(_)));
        match &mut integer.target {
            Target::Real { bias, residual: false, activation, .. } if !*bias && *activation == plain => *bias = true,
            _ => return None,
        }
        if channels {
            let mut operands = operands(product);
            operands.insert(at, Operand::Constant(channel_bias(view, x, bias)?));
            return Some(Replacement { root: i, nodes: vec![i, p], op: integer.into(), operands });
        }
        (integer.into(), at)
    } else if let Some(few_bits) = few_bits(product).filter(|_| product.inputs.get(5).is_none_or(Option::is_none)) {
        (few_bits.clone().into(), 5)
    } else {
        let matmul = product.op.get::<MatMul>().filter(|m| !m.bias && m.activation == plain)?;
        (MatMul { bias: true, ..matmul.clone() }.into(), 2)
    };
    let rank_of_b = view.fact(product.inputs.get(1).copied().flatten()?).and_then(Fact::rank)?;
    let shape = view.fact(x)?.shape.as_ref()?;
    let n = shape.last()?.known()?;
    let dims = view.fact(bias).filter(|_| view.is_f32(bias))?.dims()?;
    // [n], or with leading ones that add no axis to the result.
    let (last, leading) = dims.split_last()?;
    if rank_of_b < 2 || *last != n || dims.len() > shape.len() || leading.iter().any(|&d| d != 1) {
        return None;
    }
    let mut operands = operands(product);
    if few_bits(product).is_some() {
        operands.resize_with(operands.len().max(at + 1), || Operand::Absent);
        operands[at] = bias.into();
    } else {
        operands.insert(at, bias.into());
    }
    Some(Replacement { root: i, nodes: vec![i, p], op, operands })
}

/// Weights of few bits in a product without activation: its operands have fixed places.
fn few_bits(product: &Node) -> Option<&MatMulNBits> {
    product.op.get::<MatMulNBits>().filter(|m| m.activation == Activation::Identity)
}

/// A constant that adds one number to each channel of `[batch, channels, spatial...]`, as a vector.
fn channel_bias(view: &View, x: ValueId, bias: ValueId) -> Option<Tensor> {
    let shape = view.fact(x)?.shape.as_ref()?;
    let channels = shape.get(1)?.known()?;
    let tensor = view.tensor(bias).filter(|t| t.dims().len() <= shape.len())?;
    let place = shape.len() - tensor.dims().len();
    let fits = tensor.dims().iter().enumerate().all(|(k, &d)| d == if place + k == 1 { channels } else { 1 });
    (fits && tensor.len() == channels).then(|| Tensor::clone(tensor).reshaped(&[channels]).ok())?
}

fn add_residual(view: &View, i: usize, x: ValueId, residual: ValueId) -> Option<Replacement> {
    let (p, product) = only_product(view, x)?;
    if x == residual || !view.same_shape(x, residual) || !view.is_f32(residual) {
        return None;
    }
    let plain = Activation::Identity;
    let mut operands = operands(product);
    let op: Op = if let Some(few_bits) = few_bits(product).filter(|_| operands.len() <= 6) {
        operands.resize_with(6, || Operand::Absent);
        few_bits.clone().into()
    } else if let Some(conv) = product.op.get::<Conv>().filter(|c| c.activation == plain && !c.residual) {
        Conv { residual: true, ..conv.clone() }.into()
    } else if let Some(matmul) = product.op.get::<MatMul>().filter(|m| m.activation == plain && !m.residual) {
        MatMul { residual: true, ..matmul.clone() }.into()
    } else {
        let mut integer = product.op.get::<IntegerProduct>()?.clone();
        match &mut integer.target {
            Target::Real { residual, activation, .. } if !*residual && *activation == plain => *residual = true,
            _ => return None,
        }
        integer.into()
    };
    operands.push(residual.into());
    Some(Replacement { root: i, nodes: vec![i, p], op, operands })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints, names};
    use super::*;

    #[test]
    fn bias_residual_and_activation_of_a_matrix_product() {
        // The bias stands first, as PyTorch writes it, or last.
        for bias_first in [true, false] {
            let mut n = Net::new(14);
            let x = n.symbolic("x", &["batch", "tokens", "6"]);
            let r = n.symbolic("r", &["batch", "tokens", "5"]);
            let (w, b) = (n.weights(&[6, 5]), n.weights(&[5]));
            let y = n.op("MatMul", &[x, w]);
            let y = if bias_first { n.op("Add", &[b, y]) } else { n.op("Add", &[y, b]) };
            let y = n.op("Add", &[y, r]);
            let y = n.op("Relu", &[y]);
            n.output(y);
            assert_eq!(n.passed(run), ["MatMul"]);
        }
    }

    #[test]
    fn residual_block_of_convolutions() {
        let mut n = Net::new(14);
        let x = n.input("x", &[1, 4, 5, 5]);
        let pads = [("pads", ints(&[1, 1, 1, 1]))];
        let (w, b) = (n.weights(&[4, 4, 3, 3]), n.weights(&[4]));
        let y = n.op_with("Conv", &[x, w, b], &pads);
        let y = n.op("Relu", &[y]);
        let w = n.weights(&[4, 4, 3, 3]);
        let y = n.op_with("Conv", &[y, w], &pads);
        let short = n.op_with("Conv", &[x, w], &pads);
        let y = n.op("Add", &[y, short]);
        let y = n.op("Relu", &[y]);
        n.output(y);
        let graph = n.apply(run);
        n.check(&graph);
        assert_eq!(names(&graph), ["Conv", "Conv", "Conv"]);
        let last = graph.nodes[2].op.get::<Conv>().unwrap();
        assert!(last.residual && last.activation == Activation::Relu);
    }

    #[test]
    fn outputs_keep_their_values() {
        let mut n = Net::new(14);
        let x = n.input("x", &[2, 6]);
        let w = n.weights(&[6, 5]);
        let y = n.op("Gemm", &[x, w]);
        let z = n.op("Tanh", &[y]);
        n.output(y);
        n.output(z);
        assert_eq!(n.passed(run), ["Gemm", "Tanh"]);
    }

    #[test]
    fn stays_where_shapes_or_order_forbid() {
        let build = |r: &[&str], relu_first: bool| {
            let mut n = Net::new(14);
            let x = n.symbolic("x", &["batch", "tokens", "6"]);
            let r = n.symbolic("r", r);
            let w = n.weights(&[6, 5]);
            let mut y = n.op("MatMul", &[x, w]);
            if relu_first {
                y = n.op("Relu", &[y]);
            }
            let y = n.op("Add", &[y, r]);
            n.output(y);
            n.passed(run)
        };
        assert_eq!(build(&["batch", "tokens", "5"], false), ["MatMul"]);
        assert_eq!(build(&["batch", "tokens", "5"], true), ["MatMul", "Add"]);
        assert_eq!(build(&["batch", "1", "5"], false), ["MatMul", "Add"]);
        assert_eq!(build(&["tokens", "5"], false), ["MatMul", "Add"]);
        assert_eq!(build(&["2", "batch", "tokens", "5"], false), ["MatMul", "Add"]);
    }

    #[test]
    fn weights_of_few_bits() {
        // A row, which has a loop of its own, and several; with a bias before, behind or no bias.
        for (rows, bias) in [("1", None), ("1", Some(true)), ("tokens", Some(true)), ("tokens", Some(false))] {
            let mut n = Net::new(21);
            let x = n.symbolic("x", &["1", rows, "32"]);
            let r = n.symbolic("r", &["1", rows, "5"]);
            let bytes: Vec<u8> = (0..5 * 16).map(|i| (i * 37 % 251) as u8).collect();
            let b = n.graph.add_constant("b", Tensor::from_slice(&[5, 1, 16], &bytes).unwrap());
            let scales = n.weights(&[5, 1]);
            let attributes = [("K", int(32)), ("N", int(5)), ("block_size", int(32))];
            let mut y = n.contrib("MatMulNBits", &[Some(x), Some(b), Some(scales)], &attributes);
            if bias == Some(true) {
                let bias = n.weights(&[1, 5]);
                y = n.op("Add", &[bias, y]);
            }
            y = n.op("Add", &[y, r]);
            if bias == Some(false) {
                let bias = n.weights(&[5]);
                y = n.op("Add", &[y, bias]);
            }
            y = n.op("Gelu", &[y]);
            n.output(y);
            assert_eq!(n.passed(run), ["com.microsoft.MatMulNBits"]);
            // It has room for one of each, and nothing is added behind the activation.
            let bias = n.weights(&[5]);
            let y = n.op("Add", &[y, bias]);
            let y = n.op("Add", &[y, r]);
            n.graph.outputs = vec![y];
            assert_eq!(n.passed(run), ["com.microsoft.MatMulNBits", "Add", "Add"]);
        }
    }
}
