//! Transposes of the last two axes go into the product that reads them: kernels read either operand by rows or by columns.

use super::Pass;
use super::pattern::{Operand, Replacement, View, rewrite};
use crate::error::Result;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use crate::ops::gemm::Gemm;
use crate::ops::matmul::MatMul;
use crate::ops::transpose::Transpose;

/// Lets `MatMul` and `Gemm` read what stands before a transpose.
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

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints};
    use super::*;

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
