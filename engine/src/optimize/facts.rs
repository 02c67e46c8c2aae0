//! What is known of every value between rewrites, kept from one pass to the next: most sweeps change few nodes, and
//! inference over all of them would be most of what optimisation costs.
//!
//! ```text
//! for each node, in order
//!     same operator, operands and results as last time, and no operand's fact changed: keep the facts of its results
//!     otherwise: infer them; results with another fact than before have changed
//! forget what no value of the graph has any more, so that replaced constants go
//! ```

use crate::analyze::{Folding, infer_node};
use crate::error::Result;
use crate::fact::{Content, Dim, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use std::rc::Rc;
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// Facts by value; shared with whoever looks at them.
pub(super) type Facts = Rc<Vec<Option<Fact>>>;

/// The node that facts were inferred for.
#[derive(Debug)]
struct Origin {
    op: Op,
    inputs: Vec<Option<ValueId>>,
    outputs: Vec<ValueId>,
}

impl Origin {
    fn is(&self, node: &Node) -> bool {
        self.op.is_same(&node.op) && self.inputs == node.inputs && self.outputs == node.outputs
    }
}

/// The facts of the last time, and by the first result of each node where they come from.
#[derive(Debug, Default)]
pub(super) struct Memo {
    facts: Facts,
    origins: Vec<Option<Origin>>,
}

impl Memo {
    /// The facts of the graph as it is now.
    pub(super) fn update(&mut self, graph: &Graph, inputs: &[Fact], cx: &Cx) -> Result<Facts> {
        let result = self.infer(graph, inputs, cx);
        if result.is_err() {
            *self = Memo::default();
        }
        result
    }

    fn infer(&mut self, graph: &Graph, inputs: &[Fact], cx: &Cx) -> Result<Facts> {
        let count = graph.values.len();
        // Copied only if a pass still holds the ones of last time.
        let facts = Rc::make_mut(&mut self.facts);
        facts.resize(count, None);
        self.origins.resize_with(count, || None);
        let (mut changed, mut alive) = (vec![false; count], vec![false; count]);
        let mut given: Vec<Option<&Fact>> = vec![None; count];
        for (id, fact) in graph.inputs.iter().zip(inputs) {
            given[id.index()] = Some(fact);
        }
        for (i, value) in graph.values.iter().enumerate() {
            let fact = match (given[i], &value.constant) {
                (Some(fact), _) => named(opaque(fact.clone()), ValueId(i as u32)),
                (None, Some(t)) => Fact::constant(t.clone()),
                (None, None) => continue,
            };
            alive[i] = true;
            changed[i] = self.origins[i].take().is_some() || !facts[i].as_ref().is_some_and(|old| is_same(old, &fact));
            if changed[i] {
                facts[i] = Some(fact);
            }
        }
        for node in &graph.nodes {
            node.outputs.iter().for_each(|o| alive[o.index()] = true);
            let key = node.outputs.first().map(|o| o.index());
            let known = key.is_some_and(|k| self.origins[k].as_ref().is_some_and(|o| o.is(node)));
            if known && !node.operands().any(|id| changed[id.index()]) {
                continue;
            }
            for (id, fact) in node.outputs.iter().zip(infer_node(node, facts, cx, Folding { max_bytes: 0 })?) {
                let (at, fact) = (id.index(), named(fact, *id));
                changed[at] = !facts[at].as_ref().is_some_and(|old| is_same(old, &fact));
                if changed[at] {
                    facts[at] = Some(fact);
                }
            }
            if let Some(key) = key {
                let origin = Origin { op: node.op.clone(), inputs: node.inputs.clone(), outputs: node.outputs.clone() };
                self.origins[key] = Some(origin);
            }
        }
        for (i, alive) in alive.into_iter().enumerate() {
            if !alive {
                facts[i] = None;
                self.origins[i] = None;
            }
        }
        Ok(self.facts.clone())
    }
}

/// Whether two facts are sure to say the same.
fn is_same(a: &Fact, b: &Fact) -> bool {
    let content = match (&a.content, &b.content) {
        (Content::Unknown, Content::Unknown) => true,
        (Content::Tensor(a), Content::Tensor(b)) => Arc::ptr_eq(a, b),
        (Content::Dims(a), Content::Dims(b)) => a == b,
        _ => false,
    };
    content && a.dtype == b.dtype && a.shape == b.shape
}

/// Names of a model that look like sums or cuts of sizes are names and no more: a run is not held to what they say, and
/// exporters write `past_sequence_length + 1` where a first run gives a mask of another length.
fn opaque(mut fact: Fact) -> Fact {
    for dim in fact.shape.iter_mut().flatten() {
        if let Dim::Symbol(name) = dim
            && (name.contains(" + ") || name.starts_with("min("))
        {
            *dim = Dim::Symbol(format!("({name})").into());
        }
    }
    fact
}

/// Names for the sizes of a value that have none. No model has such names: a size in a model is a name or nothing.
fn named(mut fact: Fact, id: ValueId) -> Fact {
    for (axis, dim) in fact.shape.iter_mut().flatten().enumerate() {
        if *dim == Dim::Unknown {
            *dim = Dim::Symbol(format!("size {axis} of value {}", id.index()).into());
        }
    }
    fact
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, with_cx};
    use super::*;
    use crate::tensor::{DType, Tensor};

    /// Facts as if nothing had been known before.
    fn afresh(graph: &Graph, inputs: &[Fact], cx: &Cx) -> Facts {
        Memo::default().update(graph, inputs, cx).unwrap()
    }

    fn equal(a: &Facts, b: &Facts) -> bool {
        let text = |f: &Option<Fact>| {
            f.as_ref().map(|f| (f.dtype, f.shape_text(), f.tensor().map(|t| t.bytes().to_vec()), f.sizes()))
        };
        a.len() == b.len() && a.iter().zip(b.iter()).all(|(a, b)| text(a) == text(b))
    }

    #[test]
    fn what_changes_is_inferred_again_and_nothing_else() {
        with_cx(|cx| {
            let mut n = Net::new(14);
            let x = n.symbolic("x", &["batch", "6"]);
            let w = n.weights(&[6, 4]);
            let y = n.op("MatMul", &[x, w]);
            let z = n.op("Relu", &[y]);
            let sizes = n.op("Shape", &[z]);
            n.output(z);
            n.output(sizes);
            let inputs =
                [Fact::with_shape(DType::F32, [Dim::Symbol("batch".into()), Dim::Known(6)].into_iter().collect())];
            let mut graph = n.graph.clone();
            let mut memo = Memo::default();
            let first = memo.update(&graph, &inputs, cx).unwrap();
            assert!(equal(&first, &afresh(&graph, &inputs, cx)));
            // Other weights under the same name: everything behind them.
            graph.values[w.index()].constant = Some(Arc::new(Tensor::zeros(DType::F32, &[6, 5]).unwrap()));
            let second = memo.update(&graph, &inputs, cx).unwrap();
            assert!(equal(&second, &afresh(&graph, &inputs, cx)) && !equal(&second, &first));
            assert_eq!(first[z.index()].as_ref().unwrap().shape_text(), "[batch, 4]", "facts in use must not change");
            assert_eq!(second[z.index()].as_ref().unwrap().shape_text(), "[batch, 5]");
            // A node that goes takes its fact along, and the memory of constants returns.
            let gone = Arc::downgrade(graph.values[w.index()].constant.as_ref().unwrap());
            graph.nodes.remove(0);
            graph.nodes[0].inputs[0] = Some(x);
            graph.remove_dead_constants();
            drop((first, second));
            let third = memo.update(&graph, &inputs, cx).unwrap();
            assert!(third[y.index()].is_none() && gone.upgrade().is_none());
            assert!(equal(&third, &afresh(&graph, &inputs, cx)));
            assert_eq!(third[z.index()].as_ref().unwrap().shape_text(), "[batch, 6]");
        });
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        with_cx(|cx| {
            let mut n = Net::new(14);
            let x = n.input("x", &[2, 6]);
            let w = n.weights(&[6, 4]);
            let y = n.op("MatMul", &[x, w]);
            n.output(y);
            let mut memo = Memo::default();
            let inputs = [Fact::new(DType::F32, &[2, 6])];
            assert!(memo.update(&n.graph, &[Fact::new(DType::F32, &[2, 5])], cx).is_err());
            assert!(equal(&memo.update(&n.graph, &inputs, cx).unwrap(), &afresh(&n.graph, &inputs, cx)));
        });
    }
}
