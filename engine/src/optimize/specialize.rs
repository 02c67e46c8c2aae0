//! Bodies of `If` for certain inputs: what the shapes and the flags among the inputs decide is decided before planning.
//!
//! ```text
//! loop
//!     facts <- analyze(graph, shapes of the inputs, elements of flags)
//!     if a condition is computed from small integer inputs alone: these are flags, again
//!     if no condition is known: done
//!     each If whose condition is known <- the nodes of its body
//! ```
//!
//! What results depends on the decisions only, not on the shapes that led to them; so the caller can optimise it once
//! and plan it for any shapes that lead to the same decisions.

use super::bodies::inline;
use crate::analyze::{Folding, analyze};
use crate::error::Result;
use crate::fact::{Content, Fact};
use crate::graph::{Graph, ValueId};
use crate::ops::if_::If;
use crate::tensor::TensorView;
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// A graph whose `If` nodes gave way to the bodies that run.
#[derive(Debug)]
pub struct Specialized {
    /// The graph, not optimised.
    pub graph: Graph,
    /// Which `If` was decided how: the round, the position of the node in that round, the condition.
    pub decisions: Vec<(usize, usize, bool)>,
    /// Graph inputs whose elements led to the decisions, beside all shapes.
    pub flags: Vec<usize>,
}

/// Decides what can be decided for these inputs; `None` where nothing can. Without `use_flags` shapes alone decide.
///
/// # Errors
/// If shapes do not fit together.
pub fn specialize(graph: &Graph, inputs: &[TensorView], use_flags: bool, cx: &Cx) -> Result<Option<Specialized>> {
    let is_if = |graph: &Graph| graph.nodes.iter().any(|n| n.op.is::<If>());
    if !is_if(graph) {
        return Ok(None);
    }
    let mut known: Vec<Fact> = inputs.iter().map(|v| Fact::new(v.dtype, v.dims)).collect();
    let mut found = Specialized { graph: graph.clone(), decisions: Vec::new(), flags: Vec::new() };
    for round in 0.. {
        let facts = analyze(&found.graph, &known, cx, Folding::default())?;
        let fresh = if use_flags { flags(&found.graph, &facts) } else { Vec::new() };
        for &i in &fresh {
            known[i].content = Content::Tensor(Arc::new(inputs[i].to_tensor()?));
            found.flags.push(i);
        }
        if !fresh.is_empty() {
            continue;
        }
        let before = found.decisions.len();
        for (position, node) in std::mem::take(&mut found.graph.nodes).into_iter().enumerate() {
            let condition = node.inputs.first().copied().flatten().and_then(|id| facts[id.index()].as_ref());
            let condition = condition.and_then(Fact::tensor).and_then(|t| t.bytes().first().copied());
            match (node.op.get::<If>(), condition) {
                (Some(op), Some(condition)) => {
                    inline(&mut found.graph, &node, op.body(condition != 0));
                    found.decisions.push((round, position, condition != 0));
                }
                _ => found.graph.nodes.push(node),
            }
        }
        if found.decisions.len() == before || !is_if(&found.graph) {
            break;
        }
    }
    Ok((!found.decisions.is_empty()).then_some(found))
}

/// Small integer inputs from which a condition is computed, together with constants and shapes alone.
fn flags(graph: &Graph, facts: &[Option<Fact>]) -> Vec<usize> {
    const MAX_ELEMENTS: usize = 64;
    let producers = graph.producers();
    let mut found = vec![false; graph.inputs.len()];
    for node in graph.nodes.iter().filter(|n| n.op.is::<If>()) {
        let mut todo: Vec<ValueId> = node.inputs.first().copied().flatten().into_iter().collect();
        let mut seen = vec![false; graph.values.len()];
        let mut inputs = Some(Vec::new());
        while let Some(id) = todo.pop() {
            let fact = facts[id.index()].as_ref();
            if std::mem::replace(&mut seen[id.index()], true) || fact.is_some_and(|f| f.tensor().is_some()) {
                continue;
            }
            if let Some(producer) = producers[id.index()] {
                todo.extend(graph.nodes[producer].operands());
            } else if let Some(i) = graph.inputs.iter().position(|&g| g == id) {
                let small = fact.is_some_and(|f| f.is_small_integer(MAX_ELEMENTS));
                inputs = if small { inputs } else { None };
                inputs.iter_mut().for_each(|list| list.push(i));
            }
        }
        inputs.into_iter().flatten().for_each(|i| found[i] = true);
    }
    (0..found.len()).filter(|&i| found[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, names, with_cx};
    use super::*;
    use crate::graph::Node;
    use crate::tensor::{DType, Tensor};

    /// `if flag == 7 { if rows == 2 { relu(x) } else { neg(x) } } else { abs(x) }`; the inner one reads a shape.
    fn nested() -> Net {
        let body = |op: &str| {
            let mut n = Net::new(16);
            let x = n.symbolic("x", &["rows", "cols"]);
            let y = n.op(op, &[x]);
            n.output(y);
            n.graph
        };
        let mut then = Net::new(16);
        let x = then.symbolic("x", &["rows", "cols"]);
        let shape = then.op("Shape", &[x]);
        let (zero, two) = (then.i64s(&[0]), then.i64s(&[2]));
        let rows = then.op("Gather", &[shape, zero]);
        let condition = then.op("Equal", &[rows, two]);
        let y = add_if(&mut then, condition, x, body("Relu"), body("Neg"));
        then.output(y);
        let mut n = Net::new(16);
        let x = n.symbolic("x", &["rows", "cols"]);
        let flag = n.input_of("flag", Fact::new(DType::I64, &[]));
        let seven = n.i64s(&[7]);
        let condition = n.op("Equal", &[flag, seven]);
        let y = add_if(&mut n, condition, x, then.graph, body("Abs"));
        n.output(y);
        n
    }

    fn add_if(n: &mut Net, condition: ValueId, x: ValueId, then: Graph, otherwise: Graph) -> ValueId {
        let output = n.graph.add_value("result");
        let inputs = vec![Some(condition), Some(x)];
        n.graph.nodes.push(Node {
            name: "if".into(),
            op: If { then, otherwise }.into(),
            inputs,
            outputs: vec![output],
        });
        output
    }

    fn decided(rows: usize, flag: i64, use_flags: bool) -> Option<(Vec<String>, Vec<usize>)> {
        let (x, flag) = (Tensor::zeros(DType::F32, &[rows, 3]).unwrap(), Tensor::scalar(flag).unwrap());
        let net = nested();
        let found = with_cx(|cx| specialize(&net.graph, &[x.view(), flag.view()], use_flags, cx).unwrap())?;
        let mut graph = found.graph;
        graph.sort().unwrap();
        graph.remove_dead_nodes();
        Some((names(&graph), found.flags))
    }

    #[test]
    fn flags_and_shapes_decide() {
        let body = |name: &str| Some((vec![name.to_owned(), "Identity".into()], vec![1]));
        let twice = |name: &str| {
            body(name).map(|(mut ops, flags)| {
                ops.push("Identity".into());
                (ops, flags)
            })
        };
        assert_eq!(decided(2, 7, true), twice("Relu"));
        assert_eq!(decided(4, 7, true), twice("Neg"));
        assert_eq!(decided(2, 8, true), body("Abs"));
        assert_eq!(decided(2, 7, false), None);
    }

    #[test]
    fn conditions_on_other_values_stay() {
        let mut n = nested();
        // The flag is what an operator made of the data.
        let sum = n.graph.nodes[0].inputs[0].unwrap();
        let x = n.graph.inputs[0];
        let total = n.op("ReduceMax", &[x]);
        let whole = n.op_with("Cast", &[total], &[("to", super::super::testing::int(7))]);
        n.graph.replace_uses(sum, whole);
        n.graph.sort().unwrap();
        let (x, flag) = (Tensor::zeros(DType::F32, &[2, 3]).unwrap(), Tensor::scalar(7i64).unwrap());
        assert!(with_cx(|cx| specialize(&n.graph, &[x.view(), flag.view()], true, cx).unwrap()).is_none());
    }
}
