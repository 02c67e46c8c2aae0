//! Half precision: casts around the operators that compute in `float32`.
//!
//! Processors behind a browser have no half-precision arithmetic, so `float16` and `bfloat16` are forms of storage. An
//! operator that does arithmetic gets its operands as `float32`, and its results are rounded back, node by node; the
//! optimiser then drops the pairs of casts between two such nodes, which only adds precision.

use super::Pass;
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::cast::Cast;
use crate::tensor::DType;
use std::collections::HashMap;

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::Bf16)
}

/// Puts the casts into the graph. `facts` are those of its values.
pub fn promote_half(mut graph: Graph, facts: &[Option<Fact>]) -> Result<Graph> {
    let half = |id: ValueId| facts.get(id.index()).and_then(Option::as_ref).map(|f| f.dtype).filter(|d| is_half(*d));
    let mut widened: HashMap<ValueId, ValueId> = HashMap::new();
    let mut nodes = Vec::with_capacity(graph.nodes.len());
    for mut node in std::mem::take(&mut graph.nodes) {
        let touches = node.operands().chain(node.outputs.iter().copied()).any(|id| half(id).is_some());
        if !touches || node.op.takes_half() {
            nodes.push(node);
            continue;
        }
        for id in node.inputs.iter_mut().flatten().filter(|id| half(**id).is_some()) {
            *id = match widened.get(id) {
                Some(wide) => *wide,
                None => {
                    let name = format!("{}/float32", graph.value(*id).name);
                    let wide = graph.add_value(name.clone());
                    nodes.push(Node {
                        name,
                        op: Cast { to: DType::F32 }.into(),
                        inputs: vec![Some(*id)],
                        outputs: vec![wide],
                    });
                    widened.insert(*id, wide);
                    wide
                }
            };
        }
        let mut narrow = Vec::new();
        for id in &mut node.outputs {
            let Some(dtype) = half(*id) else { continue };
            let name = format!("{}/{dtype}", graph.value(*id).name);
            let wide = graph.add_value(format!("{}/float32", graph.value(*id).name));
            narrow.push(Node { name, op: Cast { to: dtype }.into(), inputs: vec![Some(wide)], outputs: vec![*id] });
            *id = wide;
        }
        nodes.push(node);
        nodes.extend(narrow);
    }
    graph.nodes = nodes;
    Ok(graph)
}

/// A cast to half precision and back is left out: its reader gets the `float32` value.
pub(super) fn drop_round_trips(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let narrows = |n: &Node| n.op.get::<Cast>().is_some_and(|c| is_half(c.to));
    if !graph.nodes.iter().any(narrows) {
        return Ok(());
    }
    let facts = pass.facts(graph)?;
    let producers = graph.producers();
    let is_single = |id: ValueId| facts[id.index()].as_ref().is_some_and(|f| f.dtype == DType::F32);
    let mut swaps = Vec::new();
    for node in &graph.nodes {
        let (Some(cast), Some(Some(half))) = (node.op.get::<Cast>(), node.inputs.first()) else { continue };
        let narrowing =
            producers[half.index()].map(|p| &graph.nodes[p]).filter(|p| cast.to == DType::F32 && narrows(p));
        if let Some(Some(wide)) = narrowing.and_then(|p| p.inputs.first())
            && is_single(*wide)
        {
            swaps.push((node.outputs[0], *wide));
        }
    }
    for (old, new) in swaps {
        if !graph.outputs.contains(&old) {
            graph.replace_uses(old, new);
        }
    }
    graph.remove_dead_nodes();
    Ok(())
}
