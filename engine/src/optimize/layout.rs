//! Channels-last: convolutions and their kind get the layout that their kernels are made for.
//!
//! ```text
//! for each node, in order:
//!     if the operator has a channels-last kernel, or reads a permuted value and can follow:
//!         it is replaced by its form for permuted data and gives the permuted twins of its results
//!     if it reshapes a value that exists only as a twin, and axes that merge are neighbours in the twin too:
//!         it reshapes the twin
//!     otherwise:
//!         it reads the values of the model, and those that exist only as twins are transposed back for it
//! ```
//!
//! So a transpose is made only where a value is needed in an order in which it does not exist, and pairs of opposite
//! transposes never come into being. A `Transpose` of the model makes no work here either: its result is a value whose
//! twin, its operand, exists already. That is how the transposes that tf2onnx writes around a network vanish, and those
//! that turn maps `[N, C, H, W]` into tokens `[N, H W, C]`: as the twin of the map is `[N, H, W, C]`, it is reshaped only.

use super::Pass;
use crate::analyze::operand_facts;
use crate::error::Result;
use crate::fact::{Dim, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::identity::Identity;
use crate::ops::reshape::Reshape;
use crate::ops::transpose::Transpose;
use crate::ops::{Permuted, Role};
use crate::tensor::Tensor;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Axis `i` of the permuted tensor is axis `perm[i]` of the original.
type Perm = SmallVec<[usize; 6]>;

fn inverse(perm: &[usize]) -> Perm {
    let mut inv: Perm = SmallVec::from_elem(0, perm.len());
    for (i, &p) in perm.iter().enumerate() {
        inv[p] = i;
    }
    inv
}

/// First `a`, then `b`.
fn compose(a: &[usize], b: &[usize]) -> Perm {
    b.iter().map(|&i| a[i]).collect()
}

fn is_identity(perm: &[usize]) -> bool {
    perm.iter().enumerate().all(|(i, &p)| i == p)
}

/// `[0, 2, 3, 1]` for rank 4.
fn channels_last(rank: usize) -> Perm {
    std::iter::once(0).chain(2..rank).chain(std::iter::once(1)).collect()
}

struct Layout<'a> {
    graph: &'a mut Graph,
    facts: Vec<Option<Fact>>,
    nodes: Vec<Node>,
    /// Permuted forms of a value of the model.
    twins: HashMap<ValueId, Vec<(Perm, ValueId)>>,
    /// Whether the value of the model itself exists.
    exists: Vec<bool>,
}

/// Moves the graph to channels-last where operators gain from it.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let facts = pass.own_facts(graph)?;
    let old = std::mem::take(&mut graph.nodes);
    let exists = vec![true; graph.values.len()];
    let mut layout = Layout { graph, facts, nodes: Vec::with_capacity(old.len()), twins: HashMap::new(), exists };
    for node in old {
        layout.visit(node)?;
    }
    for id in layout.graph.outputs.clone() {
        layout.materialise(id);
    }
    let nodes = layout.nodes;
    graph.nodes = nodes;
    Ok(())
}

impl Layout<'_> {
    fn visit(&mut self, node: Node) -> Result<()> {
        let rank = self.facts[node.outputs[0].index()].as_ref().and_then(Fact::rank);
        if let (Some(t), Some(x)) = (node.op.get::<Transpose>(), node.inputs.first().copied().flatten())
            && let Some(rank) = rank
            && self.facts[x.index()].as_ref().is_some_and(|f| f.tensor().is_none())
        {
            let perm = t.permutation(rank).map_err(|e| node.error(e))?;
            self.note_transpose(&node, x, &perm);
            return Ok(());
        }
        if node.op.is_view() && self.reshape_twin(&node)? {
            return Ok(());
        }
        let followed = match rank {
            Some(rank) if rank >= 3 => {
                let operands = operand_facts(&node, &self.facts)?;
                match node.op.channels_last(&operands) {
                    Some(permuted) => Some((channels_last(rank), permuted)),
                    None => self.follow(&node, &operands, rank),
                }
            }
            _ => None,
        };
        match followed {
            Some((perm, permuted)) => self.move_node(node, &perm, permuted),
            None => self.keep_node(node),
        }
        Ok(())
    }

    /// The permutation that a node without a favourite layout should follow, if any.
    fn follow(&self, node: &Node, operands: &[Option<&Fact>], rank: usize) -> Option<(Perm, Permuted)> {
        let lazy = |id: ValueId| self.twins.get(&id).and_then(|t| t.first()).filter(|_| !self.exists[id.index()]);
        let perm = node.operands().find_map(|id| lazy(id).map(|(p, _)| p.clone()).filter(|p| p.len() == rank))?;
        let permuted = node.op.permuted(&perm, operands)?;
        let (mut gained, mut lost) = (0, 0);
        for ((id, role), fact) in node.inputs.iter().zip(&permuted.roles).zip(operands) {
            let (Some(id), Role::Permute, Some(fact)) = (id, role, fact) else { continue };
            let single = fact.dims().is_some_and(|d| d.iter().product::<usize>() == 1);
            if self.twin(*id, &perm).is_some() {
                gained += usize::from(!self.exists[id.index()]);
            } else if fact.rank() != Some(rank) && !single && fact.tensor().is_none() {
                return None;
            } else if fact.tensor().is_none() && !single {
                lost += 1;
            }
        }
        (gained > lost).then_some((perm, permuted))
    }

    fn twin(&self, id: ValueId, perm: &[usize]) -> Option<ValueId> {
        self.twins.get(&id)?.iter().find(|(p, _)| p.as_slice() == perm).map(|(_, t)| *t)
    }

    fn new_value(&mut self, name: String) -> ValueId {
        let id = self.graph.add_value(name);
        self.facts.push(None);
        self.exists.push(true);
        id
    }

    /// `y = transpose(x, perm)` of the model: nothing to do, `y` has a twin.
    fn note_transpose(&mut self, node: &Node, x: ValueId, perm: &[usize]) {
        let y = node.outputs[0];
        let (source, from_source) = match self.twins.get(&x).and_then(|t| t.first()) {
            Some((p, twin)) if !self.exists[x.index()] => (*twin, compose(&inverse(p), perm)),
            _ => (x, Perm::from_slice(perm)),
        };
        self.twins.entry(y).or_default().push((inverse(&from_source), source));
        self.exists[y.index()] = false;
    }

    /// Gives the result of a reshaping from the twin of its operand, if only that exists and its order allows it.
    fn reshape_twin(&mut self, node: &Node) -> Result<bool> {
        let (&[Some(x), ..], &[y]) = (&node.inputs[..], &node.outputs[..]) else { return Ok(false) };
        let Some((perm, twin)) = self.twins.get(&x).and_then(|t| t.first()).cloned() else { return Ok(false) };
        let shape = |id: ValueId| self.facts[id.index()].as_ref().and_then(|fact| fact.shape.as_ref());
        let (Some(from), Some(to)) = (shape(x), shape(y)) else { return Ok(false) };
        let Some(order) = reshaped_order(from, to, &perm).filter(|_| !self.exists[x.index()]) else {
            return Ok(false);
        };
        // One size may be a name; it is what is left over.
        let sizes: Vec<i64> =
            order.iter().map(|&axis| to[axis].known().and_then(|n| n.try_into().ok()).unwrap_or(-1)).collect();
        if sizes.iter().filter(|&&size| size < 0).count() > 1 {
            return Ok(false);
        }
        let sizes = Arc::new(Tensor::from_slice(&[sizes.len()], &sizes)?);
        let constant = self.graph.add_constant(format!("{}/shape", node.name), sizes.clone());
        self.facts.push(Some(Fact::constant(sizes)));
        self.exists.push(true);
        let output = if is_identity(&order) {
            y
        } else {
            let output = self.new_value(format!("{}/permuted", self.graph.value(y).name));
            self.twins.entry(y).or_default().push((order, output));
            self.exists[y.index()] = false;
            output
        };
        let op = Reshape { allow_zero: false }.into();
        let inputs = vec![Some(twin), Some(constant)];
        self.nodes.push(Node { name: node.name.clone(), op, inputs, outputs: vec![output] });
        Ok(true)
    }

    fn move_node(&mut self, node: Node, perm: &[usize], permuted: Permuted) {
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for (id, role) in node.inputs.iter().zip(&permuted.roles) {
            inputs.push(match (id, role) {
                (Some(id), Role::Permute) => Some(self.permuted_operand(*id, perm)),
                (Some(id), Role::Keep) => {
                    self.materialise(*id);
                    Some(*id)
                }
                (_, Role::Replace(tensor)) => {
                    let id = self.graph.add_constant(format!("{}/constant", node.name), tensor.clone());
                    self.facts.push(Some(Fact::constant(tensor.clone())));
                    self.exists.push(true);
                    Some(id)
                }
                (None, _) => None,
            });
        }
        let mut outputs = Vec::with_capacity(node.outputs.len());
        for &id in &node.outputs {
            // The scale and the zero point beside a quantised tensor have no axes to permute.
            if self.facts[id.index()].as_ref().and_then(Fact::rank).is_some_and(|rank| rank != perm.len()) {
                outputs.push(id);
                continue;
            }
            let twin = self.new_value(format!("{}/permuted", self.graph.value(id).name));
            self.twins.entry(id).or_default().push((Perm::from_slice(perm), twin));
            self.exists[id.index()] = false;
            outputs.push(twin);
        }
        self.nodes.push(Node { name: node.name, op: permuted.op, inputs, outputs });
    }

    fn keep_node(&mut self, node: Node) {
        for id in node.operands() {
            self.materialise(id);
        }
        self.nodes.push(node);
    }

    fn permuted_operand(&mut self, id: ValueId, perm: &[usize]) -> ValueId {
        if let Some(twin) = self.twin(id, perm) {
            return twin;
        }
        let dims = self.facts[id.index()].as_ref().and_then(Fact::dims);
        if dims.as_ref().is_some_and(|d| d.len() < perm.len() && d.iter().product::<usize>() == 1) {
            self.materialise(id);
            return id;
        }
        let mut source = id;
        if let (Some(tensor), Some(dims)) = (self.facts[id.index()].as_ref().and_then(Fact::tensor), dims)
            && dims.len() < perm.len()
        {
            let mut full: Perm = SmallVec::from_elem(1, perm.len() - dims.len());
            full.extend_from_slice(&dims);
            if let Ok(reshaped) = crate::tensor::Tensor::clone(tensor).reshaped(&full) {
                let name = format!("{}/full rank", self.graph.value(id).name);
                let fact = Fact::constant(reshaped.into());
                source = self.graph.add_constant(name, fact.tensor().cloned().unwrap_or_else(|| tensor.clone()));
                self.facts.push(Some(fact));
                self.exists.push(true);
            }
        }
        // A lazy value of another order goes straight from its twin to the wanted one.
        let (from, wanted) = match self.twins.get(&source).and_then(|t| t.first()) {
            Some((p, twin)) if !self.exists[source.index()] => (*twin, compose(&inverse(p), perm)),
            _ => (source, Perm::from_slice(perm)),
        };
        let name = format!("{}/permuted", self.graph.value(id).name);
        let twin = self.transpose(from, &wanted, None, name);
        self.twins.entry(id).or_default().push((Perm::from_slice(perm), twin));
        twin
    }

    /// Makes the value of the model from its twin, unless it exists.
    fn materialise(&mut self, id: ValueId) {
        if self.exists[id.index()] {
            return;
        }
        self.exists[id.index()] = true;
        if let Some((perm, twin)) = self.twins.get(&id).and_then(|t| t.first()).cloned() {
            let name = self.graph.value(id).name.clone();
            self.transpose(twin, &inverse(&perm), Some(id), name);
        }
    }

    fn transpose(&mut self, x: ValueId, perm: &[usize], output: Option<ValueId>, name: String) -> ValueId {
        let output = output.unwrap_or_else(|| self.new_value(name.clone()));
        let op = if is_identity(perm) { Identity.into() } else { Transpose::new(perm).into() };
        self.nodes.push(Node { name, op, inputs: vec![Some(x)], outputs: vec![output] });
        output
    }
}

/// The order of axes that the reshaping of a permuted tensor has, if it is a permutation of the reshaped tensor: `from`
/// becomes `to`, and axis `i` of the permuted tensor is axis `perm[i]` of `from`.
///
/// Both shapes fall into blocks of neighbouring axes with as many elements; each must be in one piece, in its order,
/// in the permuted tensor. Axes of size 1 may be anywhere. Tensors without elements stay as they are: a size of 0 has a
/// meaning of its own to `Reshape`.
fn reshaped_order(from: &[Dim], to: &[Dim], perm: &[usize]) -> Option<Perm> {
    if from.contains(&Dim::Known(0)) || to.contains(&Dim::Known(0)) {
        return None;
    }
    let one = Dim::Known(1);
    let real = |shape: &[Dim]| (0..shape.len()).filter(|&axis| shape[axis] != one).collect::<Perm>();
    let (from_axes, to_axes) = (real(from), real(to));
    // Of each block: its axes in `from_axes` and in `to_axes`.
    let mut blocks: SmallVec<[(Range<usize>, Range<usize>); 6]> = SmallVec::new();
    let (mut i, mut j) = (0, 0);
    while i < from_axes.len() && j < to_axes.len() {
        let (a, b) = (&from[from_axes[i]], &to[to_axes[j]]);
        let start = (i, j);
        (i, j) = (i + 1, j + 1);
        if a != b {
            let (mut n, mut m) = (a.known()?, b.known()?);
            while n != m {
                if n < m {
                    n = n.checked_mul(from[*from_axes.get(i)?].known()?)?;
                    i += 1;
                } else {
                    m = m.checked_mul(to[*to_axes.get(j)?].known()?)?;
                    j += 1;
                }
            }
        } else if *a == Dim::Unknown {
            return None;
        }
        blocks.push((start.0..i, start.1..j));
    }
    if i < from_axes.len() || j < to_axes.len() {
        return None;
    }
    let permuted: Perm = perm.iter().copied().filter(|&axis| from[axis] != one).collect();
    let mut order = Perm::new();
    let mut at = 0;
    while at < permuted.len() {
        let (axes, reshaped) = blocks.iter().find(|(axes, _)| from_axes[axes.start] == permuted[at])?;
        if permuted.get(at..at + axes.len())? != &from_axes[axes.clone()] {
            return None;
        }
        order.extend_from_slice(&to_axes[reshaped.clone()]);
        at += axes.len();
    }
    // Axes of size 1 stay behind the one before them.
    for axis in (0..to.len()).filter(|&axis| to[axis] == one) {
        let place =
            axis.checked_sub(1).map_or(0, |before| order.iter().position(|&a| a == before).map_or(0, |p| p + 1));
        order.insert(place, axis);
    }
    Some(order)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints};
    use super::*;

    #[test]
    fn orders_of_reshaped_tensors() {
        let order = |from: &[usize], to: &[usize], perm: &[usize]| {
            let dims = |sizes: &[usize]| sizes.iter().map(|&n| Dim::Known(n)).collect::<Vec<_>>();
            reshaped_order(&dims(from), &dims(to), perm).map(|order| order.to_vec())
        };
        let last = [0, 2, 3, 1];
        assert_eq!(order(&[2, 3, 4, 5], &[2, 3, 20], &last), Some(vec![0, 2, 1]));
        assert_eq!(order(&[1, 85, 4, 5], &[1, 85, 20], &last), Some(vec![0, 2, 1]));
        assert_eq!(order(&[2, 6, 4, 5], &[2, 3, 2, 4, 5], &last), Some(vec![0, 3, 4, 1, 2]));
        assert_eq!(order(&[2, 3, 1, 1], &[2, 3], &last), Some(vec![0, 1]));
        assert_eq!(order(&[2, 3, 4, 5], &[2, 60], &last), None, "channels and pixels become one");
        assert_eq!(order(&[2, 3, 4, 5], &[2, 12, 5], &last), None);
        assert_eq!(order(&[2, 3, 4, 5], &[2, 1, 3, 20, 1], &last), Some(vec![0, 1, 3, 4, 2]));
        assert_eq!(order(&[2, 3, 4, 5], &[2, 3, 5, 4], &last), Some(vec![0, 2, 3, 1]), "one block of several");
        assert_eq!(order(&[0, 3, 4, 5], &[0, 3, 20], &last), None, "nothing");
        let n = Dim::Symbol("n".into());
        let from = [n.clone(), Dim::Known(3), Dim::Known(4), Dim::Known(5)];
        assert_eq!(reshaped_order(&from, &[n, Dim::Known(3), Dim::Known(20)], &last).unwrap().as_slice(), [0, 2, 1]);
        let unknown = [Dim::Unknown, Dim::Known(3), Dim::Known(20)];
        assert_eq!(reshaped_order(&from, &unknown, &last), None);
    }

    /// The heads of YOLO: maps become tokens, those of all scales are joined, tokens come before channels.
    #[test]
    fn maps_become_tokens_without_a_transpose() {
        let mut n = Net::new(17);
        let x = n.input("x", &[1, 3, 8, 8]);
        let mut tokens = Vec::new();
        for (size, stride) in [(8, 1), (4, 2)] {
            let w = n.weights(&[5, 3, 1, 1]);
            let map = n.op_with("Conv", &[x, w], &[("strides", ints(&[stride, stride]))]);
            let shape = n.i64s(&[1, 5, size * size]);
            tokens.push(n.op("Reshape", &[map, shape]));
        }
        let all = n.op_with("Concat", &tokens, &[("axis", int(2))]);
        let y = n.op_with("Transpose", &[all], &[("perm", ints(&[0, 2, 1]))]);
        n.output(y);
        assert_eq!(n.optimized(), ["Transpose", "Conv", "Reshape", "Conv", "Reshape", "Concat", "Identity"]);
    }

    #[test]
    fn permutations() {
        let p = channels_last(4);
        assert_eq!(p.as_slice(), [0, 2, 3, 1]);
        assert_eq!(inverse(&p).as_slice(), [0, 3, 1, 2]);
        assert!(is_identity(&compose(&p, &inverse(&p))));
        // Axis names: x = [n c h w], y = T(x, p) = [n h w c], T(y, [3 0 1 2]) = [c n h w].
        assert_eq!(compose(&p, &[3, 0, 1, 2]).as_slice(), [1, 0, 2, 3]);
    }
}
