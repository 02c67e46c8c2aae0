//! Constant folding: nodes whose results inference could compute become constants; views of no effect go.

use super::Pass;
use crate::analyze::{Folding, analyze};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::Graph;
use crate::ops::identity::Identity;

/// Replaces every computed value that is known by a constant.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let facts = analyze(graph, pass.inputs, pass.cx, Folding::default())?;
    let mut folded = vec![false; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        let known: Option<Vec<_>> =
            node.outputs.iter().map(|o| facts[o.index()].as_ref().and_then(Fact::tensor).cloned()).collect();
        if let Some(tensors) = known {
            folded[i] = true;
            for (id, tensor) in node.outputs.iter().zip(tensors) {
                graph.values[id.index()].constant = Some(tensor);
            }
        }
    }
    let mut keep = folded.iter().map(|f| !f);
    graph.nodes.retain(|_| keep.next().unwrap_or(true));
    drop_identities(graph);
    Ok(())
}

/// Readers of an `Identity` read its operand instead. One that feeds a graph output stays: outputs keep their names.
fn drop_identities(graph: &mut Graph) {
    let pairs: Vec<_> = graph
        .nodes
        .iter()
        .filter(|n| n.op.is::<Identity>() && n.outputs.len() == 1 && !graph.outputs.contains(&n.outputs[0]))
        .filter_map(|n| Some((n.outputs[0], n.inputs.first().copied().flatten()?)))
        .collect();
    for (output, operand) in pairs {
        // An identity of an identity: later pairs see the operand that earlier ones put in place.
        let operand = operand_after(graph, output).unwrap_or(operand);
        graph.replace_uses(output, operand);
    }
    graph.remove_dead_nodes();
}

fn operand_after(graph: &Graph, output: crate::graph::ValueId) -> Option<crate::graph::ValueId> {
    graph.nodes.iter().find(|n| n.outputs.first() == Some(&output))?.inputs.first().copied().flatten()
}
