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

/// Puts the casts into the graph. `facts` are those of its values.
pub fn promote_half(mut graph: Graph, facts: &[Option<Fact>]) -> Result<Graph> {
    let half = |id: ValueId| facts.get(id.index()).and_then(Option::as_ref).map(|f| f.dtype).filter(|d| d.is_half());
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

/// Operators that move elements and never look at them: they do to `float32` what they do to halves.
const MOVES: &[&str] = &[
    "CenterCropPad",
    "Concat",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Identity",
    "Pad",
    "Reshape",
    "ReverseSequence",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Where",
];

fn is_narrowing(node: &Node) -> bool {
    node.op.get::<Cast>().is_some_and(|c| c.to.is_half())
}

/// Leaves out casts to half precision and back.
///
/// ```text
/// move(narrow(x), y)     ->  narrow(move(x, widen(y)))     so that the casts around data movement meet
/// widen(narrow(x))       ->  x
/// ```
pub(super) fn drop_round_trips(graph: &mut Graph, pass: &Pass) -> Result<()> {
    if !graph.nodes.iter().any(is_narrowing) {
        return Ok(());
    }
    let facts = pass.facts(graph)?;
    let dtypes: Vec<Option<DType>> = facts.iter().map(|f| f.as_ref().map(|f| f.dtype)).collect();
    let mut moves = Moves { dtypes, wide: HashMap::new(), widened: HashMap::new(), nodes: Vec::new() };
    for node in std::mem::take(&mut graph.nodes) {
        moves.take(graph, node);
    }
    graph.nodes = moves.nodes;
    // Each widening cast of what a narrowing one made, and the single-precision value that its readers get instead.
    let swaps: Vec<_> = graph
        .nodes
        .iter()
        .filter(|n| n.op.get::<Cast>().is_some_and(|c| c.to == DType::F32))
        .filter_map(|n| Some((n.outputs[0], *moves.wide.get(&n.inputs.first().copied()??)?)))
        .collect();
    for (old, new) in swaps {
        if !graph.outputs.contains(&old) {
            graph.replace_uses(old, new);
        }
    }
    graph.remove_dead_nodes();
    Ok(())
}

/// Nodes on their way through [`drop_round_trips`], in topological order.
struct Moves {
    dtypes: Vec<Option<DType>>,
    /// For a half value that a cast made of a single-precision one: that one.
    wide: HashMap<ValueId, ValueId>,
    /// For other half values: the result of a cast to single precision.
    widened: HashMap<ValueId, ValueId>,
    nodes: Vec<Node>,
}

impl Moves {
    fn half(&self, id: ValueId) -> Option<DType> {
        self.dtypes.get(id.index()).copied().flatten().filter(|d| d.is_half())
    }

    fn take(&mut self, graph: &mut Graph, mut node: Node) {
        if is_narrowing(&node) {
            if let Some(Some(from)) = node.inputs.first().copied()
                && self.dtypes.get(from.index()).copied().flatten().is_none_or(|d| d == DType::F32)
            {
                self.wide.insert(node.outputs[0], from);
            }
            self.nodes.push(node);
            return;
        }
        if node.op.get::<Cast>().is_some_and(|c| c.to == DType::F32)
            && let Some(Some(from)) = node.inputs.first().copied()
        {
            self.widened.entry(from).or_insert(node.outputs[0]);
        }
        let was_single = node.operands().any(|id| self.wide.contains_key(&id));
        if !was_single || !MOVES.contains(&node.op.name()) {
            self.nodes.push(node);
            return;
        }
        for id in node.inputs.iter_mut().flatten() {
            if let Some(wide) = self.wide.get(id) {
                *id = *wide;
            } else if self.half(*id).is_some() {
                *id = match self.widened.get(id) {
                    Some(wide) => *wide,
                    None => {
                        let name = format!("{}/float32", graph.value(*id).name);
                        let wide = graph.add_value(name.clone());
                        let (inputs, outputs) = (vec![Some(*id)], vec![wide]);
                        self.nodes.push(Node { name, op: Cast { to: DType::F32 }.into(), inputs, outputs });
                        self.widened.insert(*id, wide);
                        wide
                    }
                };
            }
        }
        let mut narrow = Vec::new();
        for id in &mut node.outputs {
            let Some(dtype) = self.half(*id) else { continue };
            let wide = graph.add_value(format!("{}/float32", graph.value(*id).name));
            let name = format!("{}/{dtype}", graph.value(*id).name);
            narrow.push(Node { name, op: Cast { to: dtype }.into(), inputs: vec![Some(wide)], outputs: vec![*id] });
            self.wide.insert(*id, wide);
            *id = wide;
        }
        self.nodes.push(node);
        self.nodes.append(&mut narrow);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints};
    use super::*;

    /// Two branches in half precision, as exporters write them: joined, moved, and read by one node of arithmetic.
    fn branches(last: &str) -> Net {
        let mut n = Net::new(14);
        let x = n.input_of("x", Fact::new(DType::F16, &[1, 4]));
        let (a, b) = (n.op("Relu", &[x]), n.op("Sqrt", &[x]));
        let y = n.op_with("Concat", &[a, b, x], &[("axis", int(0))]);
        let y = n.op_with("Transpose", &[y], &[("perm", ints(&[1, 0]))]);
        let y = n.op(last, &[y]);
        n.output(y);
        n
    }

    #[test]
    fn data_movement_between_arithmetic_is_done_in_single_precision() {
        let names = branches("Neg").promoted().passed(drop_round_trips);
        assert_eq!(names, ["Cast", "Relu", "Sqrt", "Concat", "Transpose", "Neg", "Cast"]);
    }

    #[test]
    fn what_the_model_gives_stays_half() {
        let names = branches("Identity").promoted().passed(drop_round_trips);
        assert_eq!(names, ["Cast", "Relu", "Sqrt", "Concat", "Transpose", "Identity", "Cast"]);
        // Nothing was narrowed before it: the movement stays as it is.
        let mut n = Net::new(14);
        let x = n.input_of("x", Fact::new(DType::F16, &[2, 4]));
        let y = n.op_with("Transpose", &[x], &[("perm", ints(&[1, 0]))]);
        let y = n.op("Neg", &[y]);
        n.output(y);
        assert_eq!(n.promoted().passed(drop_round_trips), ["Transpose", "Cast", "Neg", "Cast"]);
    }
}
