//! LayerNorm or RMSNorm of a sum: both in one pass over memory. The sum is kept where other nodes read it too, as in
//! transformers that normalise before each layer.

use super::Pass;
use super::pattern::View;
use crate::error::Result;
use crate::fact::axis_index;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::norm::{LayerNormalization, SkipLayerNormalization};

/// Joins additions that no product could take with the normalisation that reads them.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let facts = pass.facts(graph)?;
    let view = View::new(graph, &facts);
    // The addition of each normalisation, and the node that stands for both.
    let mut found: Vec<(usize, usize, Node)> = Vec::new();
    for (i, node) in view.graph.nodes.iter().enumerate() {
        if let Some((add, new)) = joined(&view, node)
            && !found.iter().any(|(_, other, _)| *other == add)
        {
            found.push((i, add, new));
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    let mut sums = Vec::new();
    for (i, add, mut node) in found {
        let sum = graph.nodes[add].outputs[0];
        sums.push(sum);
        // Results 1 and 2 are statistics that nobody reads.
        for _ in 0..2 {
            node.outputs.push(graph.add_value(format!("{}/statistics", node.name)));
        }
        node.outputs.push(sum);
        graph.nodes[i] = node;
    }
    graph.nodes.retain(|n| n.outputs.len() != 1 || !sums.contains(&n.outputs[0]));
    // A sum that nobody else reads is not kept.
    let uses = graph.use_counts();
    for node in graph.nodes.iter_mut().filter(|n| n.op.is::<SkipLayerNormalization>()) {
        if node.outputs.get(3).is_some_and(|sum: &ValueId| uses[sum.index()] == 0) {
            node.outputs.truncate(1);
        }
    }
    graph.sort()
}

fn joined(view: &View, node: &Node) -> Option<(usize, Node)> {
    let norm = node.op.get::<LayerNormalization>()?;
    let (x, scale) = (node.inputs.first().copied()??, node.inputs.get(1).copied()??);
    let shape = view.fact(x)?.shape.as_ref()?;
    let (add, sum) = view.producer(x).filter(|(_, n)| n.op.name() == "Add")?;
    let &[Some(a), Some(b)] = sum.inputs.as_slice() else { return None };
    let last = axis_index(norm.axis, shape.len()).ok()? + 1 == shape.len();
    // Scale and bias that repeat along the row are another operator's.
    let n = shape.last()?.known()?;
    let parameter = |id: ValueId| view.fact(id).and_then(|f| f.dims()).is_some_and(|d| d.as_slice() == [n]);
    let bias = node.inputs.get(2).copied().flatten();
    let fits = node.outputs.len() == 1
        && last
        && view.is_f32(x)
        && view.same_shape(a, x)
        && view.same_shape(b, x)
        && parameter(scale)
        && bias.is_none_or(|b| norm.center && parameter(b));
    let op = SkipLayerNormalization { epsilon: norm.epsilon, center: norm.center };
    let mut inputs = vec![Some(a), Some(b), Some(scale)];
    inputs.extend(bias.map(Some));
    fits.then(|| (add, Node { name: node.name.clone(), op: op.into(), inputs, outputs: node.outputs.clone() }))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, float, int, names};
    use super::*;

    fn norm(n: &mut Net, x: ValueId) -> ValueId {
        let (scale, bias) = (n.weights(&[6]), n.weights(&[6]));
        n.op_with("LayerNormalization", &[x, scale, bias], &[("axis", int(-1)), ("epsilon", float(1e-5))])
    }

    #[test]
    fn a_sum_with_one_reader() {
        let mut n = Net::new(17);
        let [x, y] = ["x", "y"].map(|name| n.symbolic(name, &["batch", "tokens", "6"]));
        let y = n.op("Add", &[x, y]);
        let y = norm(&mut n, y);
        n.output(y);
        assert_eq!(n.passed(run), ["com.microsoft.SkipLayerNormalization"]);
        assert_eq!(n.optimized(), ["com.microsoft.SkipLayerNormalization"]);
    }

    #[test]
    fn a_residual_stream_is_kept() {
        // As GPT-2 is exported: the sum goes on beside the normalised value, and is an output in the end.
        let mut n = Net::new(17);
        let [x, y] = ["x", "y"].map(|name| n.symbolic(name, &["batch", "tokens", "6"]));
        let sum = n.op("Add", &[x, y]);
        let z = norm(&mut n, sum);
        let z = n.op("Sin", &[z]);
        let sum = n.op("Add", &[z, sum]);
        let z = norm(&mut n, sum);
        n.output(z);
        n.output(sum);
        let skip = "com.microsoft.SkipLayerNormalization";
        assert_eq!(n.passed(run), [skip, "Sin", skip]);
    }

    #[test]
    fn rms_norm_in_the_same_way() {
        let mut n = Net::new(23);
        let [x, y] = ["x", "y"].map(|name| n.symbolic(name, &["batch", "6"]));
        let sum = n.op("Add", &[x, y]);
        let scale = n.weights(&[6]);
        let z = n.op_with("RMSNormalization", &[sum, scale], &[("axis", int(1))]);
        let z = n.op("Mul", &[z, sum]);
        n.output(z);
        assert_eq!(n.passed(run), ["com.microsoft.SkipSimplifiedLayerNormalization", "Mul"]);
    }

    #[test]
    fn other_sums_stay() {
        // One that broadcasts, and one that is normalised over two axes.
        for (dims, axis) in [(&["1", "6"][..], -1), (&["batch", "tokens", "6"], 1)] {
            let mut n = Net::new(17);
            let x = n.symbolic("x", &["batch", "tokens", "6"]);
            let y = n.symbolic("y", dims);
            let y = n.op("Add", &[x, y]);
            let scale = n.weights(&[6]);
            let y = n.op_with("LayerNormalization", &[y, scale], &[("axis", int(axis))]);
            n.output(y);
            let graph = n.apply(run);
            n.check(&graph);
            assert_eq!(names(&graph), ["Add", "LayerNormalization"]);
        }
    }
}
