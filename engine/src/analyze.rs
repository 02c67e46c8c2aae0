//! Shape inference and constant folding: what is known of every value, given what is known of the inputs.

use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::{Compute, Infer, Io};
use crate::tensor::{Tensor, TensorView, byte_count};
use smallvec::SmallVec;
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// How much constant folding may compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folding {
    /// Results above this many bytes stay nodes, unless they have no more elements than the constants they come from:
    /// weights in half precision become twice as large, but once instead of in every run. 0 is for shape arithmetic
    /// alone: results above 1 MiB stay nodes too.
    pub max_bytes: usize,
}

impl Default for Folding {
    fn default() -> Self {
        Folding { max_bytes: 1 << 20 }
    }
}

/// What is known of each value of the graph, by index. `inputs` stand for the graph's inputs, in order.
///
/// A node whose operands are all constant is computed here and its results become constants. Values that inference
/// finds nothing about have `None`.
pub fn analyze(graph: &Graph, inputs: &[Fact], cx: &Cx, folding: Folding) -> Result<Vec<Option<Fact>>> {
    analyze_nodes(graph, graph.nodes.iter(), inputs, cx, folding)
}

/// The same for what some values are computed from; nothing is found out about the others.
pub fn analyze_values(
    graph: &Graph,
    values: impl Iterator<Item = ValueId>,
    inputs: &[Fact],
    cx: &Cx,
    folding: Folding,
) -> Result<Vec<Option<Fact>>> {
    let mut wanted = vec![false; graph.values.len()];
    values.for_each(|id| wanted[id.index()] = true);
    let mut nodes = Vec::new();
    for node in graph.nodes.iter().rev() {
        if node.outputs.iter().any(|o| wanted[o.index()]) {
            node.operands().for_each(|id| wanted[id.index()] = true);
            nodes.push(node);
        }
    }
    analyze_nodes(graph, nodes.into_iter().rev(), inputs, cx, folding)
}

fn analyze_nodes<'a>(
    graph: &Graph,
    nodes: impl Iterator<Item = &'a Node>,
    inputs: &[Fact],
    cx: &Cx,
    folding: Folding,
) -> Result<Vec<Option<Fact>>> {
    let mut facts: Vec<Option<Fact>> =
        graph.values.iter().map(|v| v.constant.as_ref().map(|t| Fact::constant(t.clone()))).collect();
    for (id, fact) in graph.inputs.iter().zip(inputs) {
        facts[id.index()] = Some(fact.clone());
    }
    for node in nodes {
        for (id, fact) in node.outputs.iter().zip(infer_node(node, &facts, cx, folding)?) {
            facts[id.index()] = Some(fact);
        }
    }
    Ok(facts)
}

/// The facts of a node's results.
pub fn infer_node(node: &Node, facts: &[Option<Fact>], cx: &Cx, folding: Folding) -> Result<Vec<Fact>> {
    let place = |e| node.error(e);
    let operands = operand_facts(node, facts).map_err(place)?;
    let results = node.op.infer(&Infer { inputs: &operands, outputs: node.outputs.len(), cx }).map_err(place)?;
    if results.len() != node.outputs.len() {
        return Err(place(Error::internal(format!(
            "{} results were inferred for {}",
            results.len(),
            node.outputs.len()
        ))));
    }
    if results.iter().all(|f| f.tensor().is_some()) || !node.op.is_deterministic() {
        return Ok(results);
    }
    let Some(constants) = operands.iter().map(|o| o.map(Fact::tensor)).map(transpose).collect::<Option<Vec<_>>>()
    else {
        return Ok(results);
    };
    // The kernel that holds the packed form computes it when the plan runs.
    if constants.iter().flatten().any(|t| t.is_released()) {
        return Ok(results);
    }
    let widened = |t: &Tensor| if t.dtype().is_half() { 2 * t.bytes().len() } else { t.bytes().len() };
    let source: usize = constants.iter().flatten().map(|t| widened(t)).sum();
    let size = results.iter().map(|f| f.dims().map_or(0, |d| byte_count(f.dtype, &d).unwrap_or(usize::MAX)));
    let limit = if folding.max_bytes == 0 { source.min(1 << 20) } else { folding.max_bytes.max(source) };
    if size.fold(0usize, usize::saturating_add) > limit {
        return Ok(results);
    }
    let views: Vec<Option<TensorView>> = constants.iter().map(|t| t.map(|t| t.view())).collect();
    let outputs = evaluate(node, &results, &views, None, cx).map_err(place)?;
    Ok(outputs.into_iter().map(|t| Fact::constant(Arc::new(t))).collect())
}

/// `None` for a known-to-be-absent operand becomes `Some(None)`, an operand that is no constant becomes `None`.
fn transpose<T>(operand: Option<Option<T>>) -> Option<Option<T>> {
    match operand {
        None => Some(None),
        Some(None) => None,
        Some(Some(t)) => Some(Some(t)),
    }
}

/// The facts of a node's operands.
pub fn operand_facts<'a>(node: &Node, facts: &'a [Option<Fact>]) -> Result<SmallVec<[Option<&'a Fact>; 8]>> {
    let of = |id: &ValueId| {
        facts[id.index()].as_ref().ok_or_else(|| Error::invalid_model("an operand has no element type".to_owned()))
    };
    node.inputs.iter().map(|i| i.as_ref().map(of).transpose()).collect()
}

/// Computes one node on tensors of its own, by `compute` if a kernel was chosen; `results` are the facts that inference
/// found.
pub fn evaluate(
    node: &Node,
    results: &[Fact],
    inputs: &[Option<TensorView>],
    compute: Option<&dyn Compute>,
    cx: &Cx,
) -> Result<Vec<Tensor>> {
    let mut outputs = Vec::with_capacity(results.len());
    for fact in results {
        let dims = fact.dims().ok_or_else(|| Error::internal("the shape of a result could not be found"))?;
        outputs.push(match fact.tensor() {
            Some(t) => Tensor::clone(t),
            None => Tensor::zeros(fact.dtype, &dims)?,
        });
    }
    if results.iter().any(|f| f.tensor().is_none()) {
        let mut views: Vec<_> = outputs.iter_mut().map(Tensor::view_mut).collect();
        let mut io = Io { inputs, outputs: &mut views, in_place: None };
        match compute {
            Some(compute) => compute.run(cx, &mut io)?,
            None => node.op.run(cx, &mut io)?,
        }
    }
    Ok(outputs)
}
