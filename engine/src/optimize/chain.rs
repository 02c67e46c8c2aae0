//! Pointwise functions one after the other, which no product before them could take, become one pass over memory.
//!
//! ```text
//! f(g(x, c), d)  ->  Chain[g . c, f . d](x)
//! ```
//!
//! where every step has the shape of `x`, and `c`, `d` are of that shape too, or repeat along all axes but neighbouring ones.

use super::Pass;
use super::pattern::{Operand, Replacement, View, rewrite};
use crate::error::Result;
use crate::fact::Dim;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::binary::{Arithmetic, Function};
use crate::ops::chain::{Chain, axes_behind};
use crate::ops::clip::Clip;
use crate::ops::unary::Pointwise;
use weblane_kernels::chain::Step;
use weblane_kernels::elementwise::{Binary, Unary};
use weblane_kernels::epilogue::Activation;

/// Joins pointwise nodes.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, |view, i| Ok(join(view, i))).map(drop)
}

/// The value that goes through a node, the steps, and the other operands.
type Steps = (ValueId, Vec<Step>, Vec<ValueId>);

/// A node as part of a chain, in the ways it can be read: with either operand as the value that goes through.
fn readings(view: &View, node: &Node) -> Vec<Steps> {
    let operand = |k: usize| node.inputs.get(k).copied().flatten();
    let (Some(x), &[y]) = (operand(0), node.outputs.as_slice()) else { return Vec::new() };
    if !view.is_f32(y) {
        return Vec::new();
    }
    if let Some(chain) = node.op.get::<Chain>() {
        return vec![(x, chain.steps.clone(), node.operands().skip(1).collect())];
    }
    if let Some(function) = node.op.get::<Pointwise>() {
        return vec![(x, vec![Step::Unary(function.function)], Vec::new())];
    }
    if node.op.is::<Clip>() {
        return match super::activation::activation_of(view, node) {
            Some((x, Activation::Clip { lo, hi })) => vec![(x, vec![Step::Unary(Unary::Clip { lo, hi })], Vec::new())],
            _ => Vec::new(),
        };
    }
    let (Some(arithmetic), Some(other)) = (node.op.get::<Arithmetic>(), operand(1)) else { return Vec::new() };
    let Function::Kernel(op) = arithmetic.function else { return Vec::new() };
    if matches!(op, Binary::Pow | Binary::Rem) || node.inputs.len() != 2 || x == other {
        return Vec::new();
    }
    [(x, other, false), (other, x, true)]
        .into_iter()
        .filter(|&(x, other, _)| view.same_shape(x, y) && meets(view, other, y))
        .map(|(x, other, reversed)| (x, vec![Step::Binary { op, reversed }], vec![other]))
        .collect()
}

/// Whether a value is of the same shape, or repeats along all axes but neighbouring ones.
fn meets(view: &View, other: ValueId, y: ValueId) -> bool {
    if view.same_shape(other, y) {
        return view.is_f32(other);
    }
    let shape = |id: ValueId| view.fact(id).and_then(|f| f.shape.as_deref());
    let (Some(have), Some(of)) = (shape(other), shape(y)) else { return false };
    let fits = !have.contains(&Dim::Unknown) && axes_behind(have, of, &Dim::Known(1)).is_some();
    fits && view.is_f32(other)
}

fn join(view: &View, i: usize) -> Option<Replacement> {
    readings(view, &view.graph.nodes[i]).into_iter().find_map(|(middle, last, last_operands)| {
        let (p, before) = view.producer(middle)?;
        if view.uses(middle) != 1 || last_operands.contains(&middle) {
            return None;
        }
        let (x, mut steps, operands) = readings(view, before).into_iter().next()?;
        steps.extend(last);
        let operands = std::iter::once(x).chain(operands).chain(last_operands).map(Operand::from).collect();
        Some(Replacement { root: i, nodes: vec![i, p], op: Chain { steps }.into(), operands })
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, float, int, names};
    use super::*;

    #[test]
    fn arithmetic_after_a_pooling() {
        // A factor and an addend per channel, as older exporters write a normalisation, then Elu, then a second branch.
        let mut n = Net::new(13);
        let x = n.symbolic("x", &["batch", "4", "high", "wide"]);
        let other = n.symbolic("other", &["batch", "4", "high", "wide"]);
        let (factor, addend, three) = (n.weights(&[4, 1, 1]), n.weights(&[1, 4, 1, 1]), n.scalar(3.0));
        let y = n.op("Mul", &[factor, x]);
        let y = n.op("Sub", &[addend, y]);
        let y = n.op_with("Elu", &[y], &[("alpha", float(0.5))]);
        let y = n.op("Div", &[three, y]);
        let y = n.op("Min", &[y, other]);
        let y = n.op("Exp", &[y]);
        n.output(y);
        assert_eq!(n.passed(run), ["weblane.Chain"]);
        assert_eq!(n.optimized(), ["weblane.Chain"]);
    }

    #[test]
    fn channels_last() {
        // The chain follows the convolution before it into its layout.
        let mut n = Net::new(13);
        let x = n.input("x", &[1, 3, 5, 4]);
        let w = n.weights(&[4, 3, 3, 3]);
        let y = n.op("Conv", &[x, w]);
        let z = n.op("Sin", &[y]);
        let w = n.weights(&[4, 1, 1]);
        let z = n.op("Mul", &[z, w]);
        let z = n.op("Add", &[z, y]);
        let w = n.weights(&[2, 4, 1, 1]);
        let y = n.op("Conv", &[z, w]);
        n.output(y);
        let left = n.optimized();
        assert_eq!(left, ["Transpose", "Conv", "weblane.Chain", "Conv", "Transpose"]);
    }

    #[test]
    fn rotary_positions() {
        // As PyTorch exports them for Llama, with cosines and sines that all heads share.
        let mut n = Net::new(14);
        let q = n.symbolic("q", &["1", "2", "tokens", "8"]);
        let [cos, sin] = ["cos", "sin"].map(|name| n.symbolic(name, &["1", "1", "tokens", "8"]));
        let a = n.op("Mul", &[q, cos]);
        let [zero, four, all, last] = [0, 4, i64::MAX, 3].map(|v| n.i64s(&[v]));
        let left = n.op("Slice", &[q, zero, four, last]);
        let right = n.op("Slice", &[q, four, all, last]);
        let right = n.op("Neg", &[right]);
        let turned = n.op_with("Concat", &[right, left], &[("axis", int(-1))]);
        let b = n.op("Mul", &[turned, sin]);
        let y = n.op("Add", &[a, b]);
        n.output(y);
        assert_eq!(n.optimized(), ["Slice", "Slice", "Neg", "Concat", "Mul", "weblane.Chain"]);
    }

    #[test]
    fn permuted_operands_stay_neighbours() {
        // Channels and rows of the first operand lie side by side in the model, and apart in channels-last.
        for (operand, chain) in [(&[4, 3, 1][..], false), (&[4, 1, 1], true), (&[1, 3, 2], true)] {
            let mut n = Net::new(13);
            let x = n.input("x", &[1, 3, 5, 4]);
            let w = n.weights(&[4, 3, 3, 3]);
            let y = n.op("Conv", &[x, w]);
            let z = n.op("Sin", &[y]);
            let w = n.weights(operand);
            let z = n.op("Mul", &[z, w]);
            let w = n.weights(&[2, 4, 1, 1]);
            let y = n.op("Conv", &[z, w]);
            n.output(y);
            let left = n.optimized();
            let at = left.iter().position(|name| name == "weblane.Chain").expect("a chain");
            // What cannot move stands between transposes.
            assert_eq!(left[at - 1] == "Conv", chain, "{left:?}");
        }
    }

    #[test]
    fn stays_where_it_would_compute_more() {
        let build = |change: &dyn Fn(&mut Net, ValueId, ValueId) -> ValueId| {
            let mut n = Net::new(13);
            let x = n.symbolic("x", &["rows", "6"]);
            let one = n.symbolic("one", &["1", "6"]);
            let y = change(&mut n, x, one);
            n.output(y);
            let graph = n.apply(run);
            n.check(&graph);
            names(&graph).len()
        };
        // A value that another node reads too, one that grows on the way, an operand with two axes of its own.
        let shared = |n: &mut Net, x, _| {
            let y = n.op("Exp", &[x]);
            let z = n.op("Neg", &[y]);
            n.op("Mul", &[z, y])
        };
        assert_eq!(build(&shared), 2);
        let grows = |n: &mut Net, x, one| {
            let y = n.op("Exp", &[one]);
            n.op("Mul", &[x, y])
        };
        assert_eq!(build(&grows), 2);
        let square = |n: &mut Net, x, _| {
            let y = n.op("Exp", &[x]);
            n.op("Mul", &[y, y])
        };
        assert_eq!(build(&square), 2);
    }
}
