//! Control flow: bodies are optimised like graphs, and an `If` whose condition is known gives way to its body.

use super::{Pass, optimize, promote_half};
use crate::analyze::{Folding, analyze, operand_facts};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::identity::Identity;
use crate::ops::if_::If;
use crate::ops::loop_::Loop;
use crate::tensor::DType;
use std::collections::HashMap;

/// Rewrites the bodies of all nodes.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    if !graph.nodes.iter().any(|n| n.op.is::<If>() || n.op.is::<Loop>()) {
        return Ok(());
    }
    let facts = pass.facts(graph)?;
    for node in std::mem::take(&mut graph.nodes) {
        let operands = operand_facts(&node, &facts)?;
        if let Some(op) = node.op.get::<If>() {
            let condition = operands[0].and_then(Fact::tensor).and_then(|t| t.bytes().first().copied());
            if let Some(condition) = condition {
                inline(graph, &node, op.body(condition != 0));
                continue;
            }
            let captures: Vec<Fact> = operands[1..].iter().flatten().map(|f| Fact::clone(f)).collect();
            // A body that does not fit the shapes is one that never runs with them; it stays as it is.
            let body = |g: &Graph| optimize_body(g, &captures, pass).unwrap_or_else(|_| g.clone());
            let op = If { then: body(&op.then), otherwise: body(&op.otherwise) };
            graph.nodes.push(Node { op: op.into(), ..node });
        } else if let Some(op) = node.op.get::<Loop>() {
            // Shapes of carried values may change from one iteration to the next: only their types are known.
            let mut inputs = vec![Fact::new(DType::I64, &[]), Fact::new(DType::Bool, &[])];
            for (i, fact) in operands.iter().enumerate().skip(2) {
                let Some(fact) = fact else { continue };
                inputs.push(match i < 2 + op.carried {
                    true => Fact::of_dtype(fact.dtype),
                    false => Fact::clone(fact),
                });
            }
            let op = Loop { body: optimize_body(&op.body, &inputs, pass)?, carried: op.carried };
            graph.nodes.push(Node { op: op.into(), ..node });
        } else {
            graph.nodes.push(node);
        }
    }
    Ok(())
}

fn optimize_body(body: &Graph, inputs: &[Fact], pass: &Pass) -> Result<Graph> {
    // Captured constants are shapes and flags more often than weights; their elements help folding either way.
    let facts = analyze(body, inputs, pass.cx, Folding { max_bytes: 0 })?;
    optimize(promote_half(body.clone(), &facts)?, inputs, false, pass.cx)
}

/// Puts the nodes of a body in the place of the node that would run it.
pub(super) fn inline(graph: &mut Graph, node: &Node, body: &Graph) {
    let mut moved: HashMap<ValueId, ValueId> =
        body.inputs.iter().copied().zip(node.inputs[1..].iter().flatten().copied()).collect();
    for (i, value) in body.values.iter().enumerate() {
        let id = ValueId(i as u32);
        moved.entry(id).or_insert_with(|| {
            let new = graph.add_value(value.name.clone());
            graph.values[new.index()].constant = value.constant.clone();
            new
        });
    }
    for inner in &body.nodes {
        graph.nodes.push(Node {
            name: inner.name.clone(),
            op: inner.op.clone(),
            inputs: inner.inputs.iter().map(|i| i.map(|i| moved[&i])).collect(),
            outputs: inner.outputs.iter().map(|o| moved[o]).collect(),
        });
    }
    for (from, to) in body.outputs.iter().zip(&node.outputs) {
        let name = format!("{}/result", node.name);
        graph.nodes.push(Node { name, op: Identity.into(), inputs: vec![Some(moved[from])], outputs: vec![*to] });
    }
}
