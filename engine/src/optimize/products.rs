//! Transposes and reshapes around products.
//!
//! ```text
//! MatMul or Gemm of Transpose(a)              reads a: kernels read either operand by rows or by columns
//! Reshape(Gemm(Reshape(x), w, bias))          -> MatMul(x, w) + bias, if only the axes before the last were joined
//! ```
//!
//! PyTorch writes the second for layers that are products of matrices to it, such as GPT-2's: what follows such a layer would
//! not find the product. That one is a rule of the epilogues', since a bias may stand before the second reshape.

use super::Pass;
use super::pattern::{Operand, Replacement, View, rewrite};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use crate::ops::gemm::Gemm;
use crate::ops::matmul::MatMul;
use crate::ops::matmul_nbits::MatMulNBits;
use crate::ops::transpose::Transpose;

/// Lets products read what stands before a transpose.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, |view, i| Ok(fold(view, i))).map(drop)
}

/// The operand of a node that swaps the last two axes and no others.
fn untransposed(view: &View, id: ValueId) -> Option<ValueId> {
    let (_, node) = view.producer(id)?;
    let perm = node.op.get::<Transpose>()?.permutation(view.fact(id)?.rank()?).ok()?;
    let last = perm.len().checked_sub(2)?;
    let kept = perm[..last].iter().enumerate().all(|(i, &p)| i == p);
    (kept && perm[last..] == [last + 1, last]).then(|| node.inputs.first().copied().flatten())?
}

fn fold(view: &View, i: usize) -> Option<Replacement> {
    let node: &Node = &view.graph.nodes[i];
    let (a, b) = (node.inputs.first().copied()??, node.inputs.get(1).copied()??);
    let (new_a, new_b) = (untransposed(view, a), untransposed(view, b));
    if new_a.is_none() && new_b.is_none() {
        return None;
    }
    let (flip_a, flip_b) = (new_a.is_some(), new_b.is_some());
    let op: Op = if let Some(m) = node.op.get::<MatMul>() {
        MatMul { trans_a: m.trans_a ^ flip_a, trans_b: m.trans_b ^ flip_b, ..m.clone() }.into()
    } else if let Some(g) = node.op.get::<Gemm>() {
        Gemm { trans_a: g.trans_a ^ flip_a, trans_b: g.trans_b ^ flip_b, ..g.clone() }.into()
    } else {
        return None;
    };
    let mut operands: Vec<Operand> = node.inputs.iter().map(|&id| id.into()).collect();
    operands[0] = new_a.unwrap_or(a).into();
    operands[1] = new_b.unwrap_or(b).into();
    Some(Replacement { root: i, nodes: vec![i], op, operands })
}

/// The operand of a node that gives the same elements another shape.
fn reshaped(node: &Node) -> Option<ValueId> {
    matches!(node.op.name(), "Reshape" | "Flatten").then(|| node.inputs.first().copied().flatten())?
}

/// A product of the model's rank for a reshape behind one of rows.
pub(super) fn unflatten(view: &View, i: usize) -> Option<Replacement> {
    let product = reshaped(&view.graph.nodes[i]).filter(|&id| view.uses(id) == 1 && view.is_f32(id))?;
    let (p, node) = view.producer(product)?;
    let flat = node.inputs.first().copied().flatten()?;
    let shape = |id: ValueId| view.fact(id).and_then(|f| f.shape.as_deref());
    let (k, (n, rows)) = (shape(flat)?.last()?, shape(view.graph.nodes[i].outputs[0])?.split_last()?);
    // Sizes have names here, so that equal ones are the same. What was reshaped may have been so before.
    let before = |&id: &ValueId| reshaped(view.producer(id)?.1);
    let fits = |&id: &ValueId| shape(id).and_then(|s| s.split_last()).is_some_and(|(last, s)| (last, s) == (k, rows));
    let x = std::iter::successors(before(&flat), before).take(3).find(fits)?;
    if rows.is_empty() || shape(product)?.last() != Some(n) {
        return None;
    }
    let matrix = || view.fact(node.inputs[1]?).and_then(Fact::rank).filter(|&rank| rank == 2);
    let bias = node.inputs.get(2).copied();
    let op: Op = if let Some(g) = node.op.get::<Gemm>().filter(|g| !g.trans_a && (g.beta == 1.0 || bias.is_none())) {
        let is_row =
            |id| matches!(shape(id), Some([one @ .., last]) if last == n && one.iter().all(|d| d.known() == Some(1)));
        let (alpha, trans_b, activation) = (g.alpha, g.trans_b, g.activation);
        let op = MatMul { alpha, trans_b, activation, bias: bias.is_some(), ..MatMul::default() };
        bias.is_none_or(|id| id.is_some_and(is_row)).then_some(op)?.into()
    } else if let Some(m) = node.op.get::<MatMul>().filter(|m| !m.trans_a && !m.residual) {
        matrix().map(|_| m.clone())?.into()
    } else {
        node.op.get::<MatMulNBits>().filter(|_| node.inputs.len() <= 6)?.clone().into()
    };
    let rest = node.inputs.iter().skip(1).map(|&id| id.into());
    let operands = std::iter::once(x.into()).chain(rest).collect();
    Some(Replacement { root: i, nodes: vec![i, p], op, operands })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, float, int, ints};
    use super::*;
    use crate::tensor::Tensor;

    fn rows(graph: &mut Graph, pass: &Pass) -> Result<()> {
        rewrite(graph, pass, |view, i| Ok(unflatten(view, i))).map(drop)
    }

    /// A shape computed from the first sizes of a value and a number, as PyTorch writes it.
    fn sizes_of(n: &mut Net, x: ValueId, axes: &[i64], last: i64) -> ValueId {
        let shape = n.op("Shape", &[x]);
        let at = n.i64s(axes);
        let first = n.op("Gather", &[shape, at]);
        let last = n.i64s(&[last]);
        n.op_with("Concat", &[first, last], &[("axis", int(0))])
    }

    #[test]
    fn layers_of_gpt2() {
        // Conv1D of transformers: rows of all batches, the product, and back; then Gelu, a second one and the residual.
        let mut n = Net::new(20);
        let x = n.symbolic("x", &["batch", "tokens", "6"]);
        let mut y = x;
        for [k, m] in [[6, 10], [10, 6]] {
            let shape = n.i64s(&[-1, k]);
            let flat = n.op("Reshape", &[y, shape]);
            let (w, b) = (n.weights(&[k as usize, m as usize]), n.weights(&[m as usize]));
            let product = n.op("Gemm", &[flat, w, b]);
            let shape = sizes_of(&mut n, y, &[0, 1], m);
            y = n.op("Reshape", &[product, shape]);
            if k == 6 {
                y = n.op("Gelu", &[y]);
            }
        }
        y = n.op("Add", &[y, x]);
        n.output(y);
        assert_eq!(n.passed(rows), ["MatMul", "Gelu", "MatMul", "Add"]);
        assert_eq!(n.optimized(), ["MatMul", "MatMul"]);
    }

    #[test]
    fn rows_of_other_products() {
        for (attributes, bias, left) in [
            (&[("alpha", float(0.5)), ("transB", int(1))][..], &[1, 5][..], true),
            (&[("alpha", float(0.5)), ("beta", float(2.0)), ("transB", int(1))], &[5], false),
            (&[("transB", int(1))], &[6, 1], false),
            (&[("transB", int(1))], &[1, 1], false),
        ] {
            let mut n = Net::new(20);
            let x = n.input("x", &[2, 3, 4]);
            let (w, b) = (n.weights(&[5, 4]), n.weights(bias));
            let y = n.op_with("Flatten", &[x], &[("axis", int(2))]);
            let y = n.op_with("Gemm", &[y, w, b], attributes);
            let shape = n.i64s(&[2, 3, 5]);
            let y = n.op("Reshape", &[y, shape]);
            n.output(y);
            let names = n.passed(rows);
            assert_eq!(names == ["MatMul"], left, "{names:?}");
        }
    }

    #[test]
    fn rows_of_weights_of_few_bits() {
        let mut n = Net::new(20);
        let x = n.symbolic("x", &["batch", "tokens", "32"]);
        let shape = n.i64s(&[-1, 32]);
        let flat = n.op("Reshape", &[x, shape]);
        let b = n.graph.add_constant("b", Tensor::from_slice(&[5, 1, 16], &[0x5au8; 80]).unwrap());
        let (scales, bias) = (n.weights(&[5, 1]), n.weights(&[5]));
        let attributes = [("K", int(32)), ("N", int(5)), ("block_size", int(32))];
        let y = n.contrib("MatMulNBits", &[Some(flat), Some(b), Some(scales)], &attributes);
        // Where quantisers leave the bias of a Gemm.
        let y = n.op("Add", &[y, bias]);
        let shape = sizes_of(&mut n, x, &[0, 1], 5);
        let y = n.op("Reshape", &[y, shape]);
        let y = n.op("Gelu", &[y]);
        n.output(y);
        assert_eq!(n.optimized(), ["com.microsoft.MatMulNBits"]);
    }

    #[test]
    fn rows_in_other_axes_stay() {
        // Batches and tokens are not what they were, or columns are not the last axis.
        for (dims, axes, flat) in [
            (["batch", "tokens", "6"], [1, 0], [-1, 6]),
            (["batch", "2", "3"], [0, 1], [-1, 6]),
            (["1", "6", "6"], [0, 1], [12, 3]),
        ] {
            let mut n = Net::new(20);
            let x = n.symbolic("x", &dims);
            let flat = n.i64s(&flat);
            let y = n.op("Reshape", &[x, flat]);
            let w = n.weights(&[if dims[0] == "1" { 3 } else { 6 }, 4]);
            let y = n.op("MatMul", &[y, w]);
            let shape = sizes_of(&mut n, x, &axes, -1);
            let y = n.op("Reshape", &[y, shape]);
            n.output(y);
            let names = n.passed(rows);
            assert!(names.iter().filter(|n| *n == "Reshape").count() == 2, "{names:?}");
        }
    }

    #[test]
    fn products_of_transposes() {
        // As tf2onnx writes `transpose_a` and `transpose_b`, and PyTorch `x.transpose(-1, -2) @ y.transpose(-1, -2)`.
        for (left, right) in [(true, false), (false, true), (true, true)] {
            for batch in [&["batch", "3"][..], &["2"], &[]] {
                let rank = batch.len() + 2;
                let mut swap: Vec<i64> = (0..rank as i64).collect();
                swap.swap(rank - 1, rank - 2);
                let mut n = Net::new(13);
                let mut operand = |name: &str, rows: &'static str, cols: &'static str, transposed: bool| {
                    let last = if transposed { [cols, rows] } else { [rows, cols] };
                    let x = n.symbolic(name, &[batch, &last].concat());
                    if transposed { n.op_with("Transpose", &[x], &[("perm", ints(&swap))]) } else { x }
                };
                let a = operand("a", "rows", "5", left);
                let b = operand("b", "5", "7", right);
                let y = n.op("MatMul", &[a, b]);
                n.output(y);
                assert_eq!(n.passed(run), ["MatMul"]);
            }
        }
    }

    #[test]
    fn a_transposed_operand_of_gemm() {
        for stored in [0, 1] {
            let mut n = Net::new(13);
            let x = n.input("x", &[6, 4]);
            let w = n.input("w", if stored == 1 { &[6, 5] } else { &[5, 6] });
            let x = n.op_with("Transpose", &[x], &[("perm", ints(&[1, 0]))]);
            let w = n.op_with("Transpose", &[w], &[("perm", ints(&[1, 0]))]);
            let y = n.op_with("Gemm", &[x, w], &[("transB", int(stored))]);
            n.output(y);
            assert_eq!(n.passed(run), ["Gemm"]);
        }
    }

    #[test]
    fn other_permutations_stay() {
        let mut n = Net::new(13);
        let x = n.input("x", &[4, 2, 3, 5]);
        let y = n.input("y", &[3, 4, 5, 2]);
        let x = n.op_with("Transpose", &[x], &[("perm", ints(&[2, 0, 1, 3]))]);
        let y = n.op("MatMul", &[x, y]);
        n.output(y);
        assert_eq!(n.passed(run), ["Transpose", "MatMul"]);
    }
}
