//! Common subexpressions: of nodes with equal operators and operands the first one is kept, and of those that compute the
//! same sizes. Exporters repeat shape arithmetic, masks and small constants for every layer, and ask each layer's own
//! values for sizes that all of them have.

use super::Pass;
use crate::error::Result;
use crate::fact::{Content, Dim, Fact, Shape};
use crate::graph::{Graph, Node, ValueId};
use crate::tensor::{DType, Dims, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// Constants above this many bytes are not compared.
const MAX_CONSTANT: usize = 4096;

/// A node is compared with at most so many of the same name and operands.
const MAX_COMPARED: usize = 64;

/// Merges equal constants and equal nodes.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let facts = pass.facts(graph)?;
    // A value that stands for an equal one, by index.
    let mut same: Vec<ValueId> = (0..graph.values.len() as u32).map(ValueId).collect();
    let mut constants: HashMap<(DType, Dims, &[u8]), ValueId> = HashMap::new();
    for (i, value) in graph.values.iter().enumerate() {
        if let Some(t) = value.constant.as_ref().filter(|t| is_small(t)) {
            same[i] = *constants.entry((t.dtype(), t.dims().into(), t.bytes())).or_insert(same[i]);
        }
    }
    // By name and operands first: most nodes are alone with theirs.
    let mut nodes: HashMap<(&'static str, Vec<Option<ValueId>>), Vec<usize>> = HashMap::new();
    let mut by_size: HashMap<(DType, usize, &Shape), ValueId> = HashMap::new();
    let mut kept: Vec<Node> = Vec::with_capacity(graph.nodes.len());
    for mut node in std::mem::take(&mut graph.nodes) {
        for id in node.inputs.iter_mut().flatten() {
            *id = same[id.index()];
        }
        // What an output of the graph gets must be computed under its own name.
        let is_output = node.outputs.iter().any(|o| graph.outputs.contains(o));
        if let &[y] = node.outputs.as_slice()
            && let Some(key) = facts[y.index()].as_ref().and_then(sizes)
        {
            match by_size.get(&key) {
                Some(first) if !is_output => {
                    same[y.index()] = *first;
                    continue;
                }
                Some(_) => {}
                None => drop(by_size.insert(key, y)),
            }
        }
        let alike = nodes.entry((node.op.name(), node.inputs.clone())).or_default();
        let equal = |k: usize| {
            let first: &Node = &kept[k];
            first.outputs.len() == node.outputs.len() && first.op.is_deterministic() && first.op.same(&*node.op)
        };
        match alike.iter().copied().take(MAX_COMPARED).find(|&k| equal(k)) {
            Some(k) if !is_output => {
                for (mine, its) in node.outputs.iter().zip(&kept[k].outputs) {
                    same[mine.index()] = *its;
                }
                continue;
            }
            Some(_) => {}
            None => alike.push(kept.len()),
        }
        kept.push(node);
    }
    graph.nodes = kept;
    Ok(())
}

/// Type, rank and elements of a value that holds sizes, all with a name or number.
fn sizes(fact: &Fact) -> Option<(DType, usize, &Shape)> {
    match &fact.content {
        Content::Dims(sizes) if !sizes.contains(&Dim::Unknown) => Some((fact.dtype, fact.rank()?, sizes)),
        _ => None,
    }
}

fn is_small(t: &Arc<Tensor>) -> bool {
    t.dtype() != DType::String && t.bytes().len() <= MAX_CONSTANT
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int};
    use super::*;
    use crate::onnx::{AttributeValue, TensorProto};

    #[test]
    fn equal_chains_become_one() {
        let mut n = Net::new(14);
        let x = n.input("x", &[2, 3]);
        let chain = |n: &mut Net, to: i64| {
            let two = n.scalar(2.0);
            let y = n.op("Softmax", &[x]);
            let y = n.op("Add", &[y, two]);
            n.op_with("Softmax", &[y], &[("axis", int(to))])
        };
        let (a, b, c) = (chain(&mut n, 1), chain(&mut n, 1), chain(&mut n, 0));
        let y = n.op("Sub", &[a, b]);
        let y = n.op("Mul", &[y, c]);
        n.output(y);
        // The last steps differ in their axis.
        assert_eq!(n.passed(run), ["Softmax", "Add", "Softmax", "Softmax", "Sub", "Mul"]);
    }

    #[test]
    fn sizes_that_are_equal_by_name_become_one() {
        let mut n = Net::new(14);
        let [x, y] = ["x", "y"].map(|name| n.symbolic(name, &["batch", "tokens"]));
        let z = n.symbolic("z", &["batch", "others"]);
        let one = n.i64s(&[1]);
        let [a, b, c] = [x, y, z].map(|x| {
            let shape = n.op("Shape", &[x]);
            let tokens = n.op("Gather", &[shape, one]);
            n.op("Expand", &[one, tokens])
        });
        let sum = n.op_with("Concat", &[a, b, c], &[("axis", int(0))]);
        n.output(sum);
        assert_eq!(n.passed(run), ["Shape", "Gather", "Expand", "Shape", "Gather", "Expand", "Concat"]);
    }

    /// What a model calls a size is no promise of what it is the sum of.
    #[test]
    fn names_that_look_like_sums_are_not_trusted() {
        let mut n = Net::new(14);
        let [past, new] = ["past", "new"].map(|name| n.symbolic(name, &[name]));
        let mask = n.symbolic("mask", &["new + past"]);
        let [past, new, mask] = [past, new, mask].map(|x| n.op("Shape", &[x]));
        let total = n.op("Add", &[past, new]);
        let y = n.op_with("Concat", &[total, mask], &[("axis", int(0))]);
        n.output(y);
        assert_eq!(n.passed(run), ["Shape", "Shape", "Shape", "Add", "Concat"]);
    }

    #[test]
    fn tensors_of_operators_are_compared_by_their_elements() {
        let mut n = Net::new(14);
        let shape = n.i64s(&[2]);
        let fill = |n: &mut Net, value: f32| {
            let value =
                AttributeValue::Tensor(TensorProto::new("", &Tensor::from_slice(&[1], &[value]).unwrap()).unwrap());
            n.op_with("ConstantOfShape", &[shape], &[("value", value)])
        };
        let (a, b, c) = (fill(&mut n, 1.0), fill(&mut n, 1.0), fill(&mut n, 2.0));
        let y = n.op("Sub", &[a, b]);
        let y = n.op("Mul", &[y, c]);
        n.output(y);
        assert_eq!(n.passed(run), ["ConstantOfShape", "ConstantOfShape", "Sub", "Mul"]);
    }

    #[test]
    fn outputs_and_constants_that_differ_stay() {
        let mut n = Net::new(14);
        let x = n.input("x", &[2, 3]);
        let (one, two) = (n.scalar(1.0), n.constant(&[1], &[1.0]));
        let y = n.op("Add", &[x, one]);
        let z = n.op("Add", &[x, one]);
        let w = n.op("Add", &[x, two]);
        let w = n.op("Mul", &[w, z]);
        for id in [y, z, w] {
            n.output(id);
        }
        assert_eq!(n.passed(run).len(), 4);
    }
}
