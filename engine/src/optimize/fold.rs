//! Constant folding: nodes whose results inference could compute become constants; views of no effect go.

use super::Pass;
use crate::analyze::{Folding, infer_node};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::Graph;
use crate::ops::identity::Identity;

/// Replaces every computed value that is known by a constant.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let mut facts: Vec<Option<Fact>> =
        graph.values.iter().map(|v| v.constant.as_ref().map(|t| Fact::constant(t.clone()))).collect();
    for (id, fact) in graph.inputs.iter().zip(pass.inputs) {
        facts[id.index()] = Some(fact.clone());
    }
    let mut uses = graph.use_counts();
    for node in std::mem::take(&mut graph.nodes) {
        for (id, fact) in node.outputs.iter().zip(infer_node(&node, &facts, pass.cx, Folding::default())?) {
            facts[id.index()] = Some(fact);
        }
        let known: Option<Vec<_>> =
            node.outputs.iter().map(|o| facts[o.index()].as_ref().and_then(Fact::tensor).cloned()).collect();
        let Some(tensors) = known else {
            graph.nodes.push(node);
            continue;
        };
        for (id, tensor) in node.outputs.iter().zip(tensors) {
            graph.values[id.index()].constant = Some(tensor);
        }
        // Weights that were turned into others go at once, so that there are never two of all of them.
        for id in node.operands() {
            uses[id.index()] -= 1;
            if uses[id.index()] == 0 {
                facts[id.index()] = None;
                graph.values[id.index()].constant = None;
            }
        }
    }
    drop_identities(graph);
    Ok(())
}

/// Readers of an `Identity` read its operand instead. One that feeds a graph output stays: outputs keep their names.
pub(super) fn drop_identities(graph: &mut Graph) {
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
