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
//! What results depends on the decisions only, not on the shapes that led to them; so it is kept, and the caller can
//! optimise it once and plan it for any shapes that lead to the same decisions. A decoder asks for each word that it adds:
//! then only what the conditions are computed from is looked at.

use super::bodies::inline;
use crate::analyze::{Folding, analyze_values};
use crate::error::Result;
use crate::fact::{Content, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::if_::If;
use crate::tensor::TensorView;
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// Which `If` was decided how: the round, the position of the node in that round, the condition.
pub type Decisions = Vec<(usize, usize, bool)>;

/// A graph whose `If` nodes gave way to the bodies that run.
#[derive(Debug)]
pub struct Specialized {
    /// The graph, not optimised.
    pub graph: Arc<Graph>,
    /// What was decided.
    pub decisions: Decisions,
    /// Graph inputs whose elements led to the decisions, beside all shapes.
    pub flags: Vec<usize>,
}

/// What decisions made of a graph, for the next time.
#[derive(Debug, Default)]
pub struct Known(Vec<(Decisions, Arc<Graph>)>);

impl Known {
    /// Graphs that are kept at most: some rounds of some variants.
    const KEPT: usize = 16;

    fn get(&self, decisions: &Decisions) -> Option<Arc<Graph>> {
        self.0.iter().find(|(made, _)| made == decisions).map(|(_, graph)| graph.clone())
    }

    fn keep(&mut self, decisions: Decisions, graph: Arc<Graph>) {
        if self.0.len() == Self::KEPT {
            self.0.remove(0);
        }
        self.0.push((decisions, graph));
    }
}

/// Decides what can be decided for these inputs; `None` where nothing can. Without `use_flags` shapes alone decide. `known` is
/// of the same graph.
///
/// # Errors
/// If shapes do not fit together.
pub fn specialize(
    graph: &Arc<Graph>,
    inputs: &[TensorView],
    use_flags: bool,
    known: &mut Known,
    cx: &Cx,
) -> Result<Option<Specialized>> {
    let mut facts_of_inputs: Vec<Fact> = inputs.iter().map(|v| Fact::new(v.dtype, v.dims)).collect();
    let mut found = Specialized { graph: graph.clone(), decisions: Vec::new(), flags: Vec::new() };
    for round in 0.. {
        let condition = |node: &Node| node.op.get::<If>().and_then(|_| node.inputs.first().copied().flatten());
        let conditions: Vec<ValueId> = found.graph.nodes.iter().filter_map(condition).collect();
        if conditions.is_empty() {
            break;
        }
        let facts = analyze_values(&found.graph, conditions.into_iter(), &facts_of_inputs, cx, Folding::default())?;
        let fresh = if use_flags { flags(&found.graph, &facts) } else { Vec::new() };
        for &i in &fresh {
            facts_of_inputs[i].content = Content::Tensor(Arc::new(inputs[i].to_tensor()?));
            found.flags.push(i);
        }
        if !fresh.is_empty() {
            continue;
        }
        let decided = |node: &Node| {
            let fact = facts[condition(node)?.index()].as_ref();
            fact.and_then(Fact::tensor).and_then(|t| t.bytes().first().copied()).map(|b| b != 0)
        };
        let before = found.decisions.len();
        let nodes = found.graph.nodes.iter().enumerate();
        found.decisions.extend(nodes.filter_map(|(position, node)| Some((round, position, decided(node)?))));
        if found.decisions.len() == before {
            break;
        }
        found.graph = match known.get(&found.decisions) {
            Some(graph) => graph,
            None => {
                let mut graph = Graph::clone(&found.graph);
                for node in std::mem::take(&mut graph.nodes) {
                    match (node.op.get::<If>(), decided(&node)) {
                        (Some(op), Some(condition)) => inline(&mut graph, &node, op.body(condition)),
                        _ => graph.nodes.push(node),
                    }
                }
                let graph = Arc::new(graph);
                known.keep(found.decisions.clone(), graph.clone());
                graph
            }
        };
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
        let (graph, mut known) = (Arc::new(nested().graph), Known::default());
        let mut found =
            || with_cx(|cx| specialize(&graph, &[x.view(), flag.view()], use_flags, &mut known, cx).unwrap());
        let (first, found) = (found()?, found()?);
        assert!(Arc::ptr_eq(&first.graph, &found.graph), "the same decisions were known");
        assert_eq!((first.decisions, &first.flags), (found.decisions, &found.flags));
        let mut graph = Graph::clone(&found.graph);
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
        let (graph, mut known) = (Arc::new(n.graph), Known::default());
        let found = with_cx(|cx| specialize(&graph, &[x.view(), flag.view()], true, &mut known, cx).unwrap());
        assert!(found.is_none());
    }
}
