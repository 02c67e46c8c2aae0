//! The graph: plain data that stages rewrite, with no run-time state.

use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::ops::Op;
use crate::tensor::Tensor;
use std::sync::Arc;

/// Index of a [`Value`] in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

impl ValueId {
    /// As an index into [`Graph::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Something that flows between nodes.
#[derive(Clone, Debug)]
pub struct Value {
    /// The model's name for it; optimised graphs have values without a name of the model.
    pub name: String,
    /// What the model declares of it; what inference finds stands in the facts of [`crate::analyze`].
    pub declared: Option<Fact>,
    /// The elements, for constants.
    pub constant: Option<Arc<Tensor>>,
}

/// One application of an operator.
#[derive(Clone, Debug)]
pub struct Node {
    /// The model's name, for messages and profiles.
    pub name: String,
    /// What it computes.
    pub op: Op,
    /// Operands; `None` where an optional one was left out.
    pub inputs: Vec<Option<ValueId>>,
    /// Results; one that the model left out has a value nobody reads.
    pub outputs: Vec<ValueId>,
}

impl Node {
    /// The values it reads.
    pub fn operands(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.inputs.iter().flatten().copied()
    }

    /// Puts this node's place on an error.
    pub fn error(&self, e: Error) -> Error {
        e.at(&self.name, self.op.name())
    }
}

/// A model or the body of a control-flow operator.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// The model's name.
    pub name: String,
    /// All values; nodes refer to them by index.
    pub values: Vec<Value>,
    /// In topological order: a node stands behind those that it reads from.
    pub nodes: Vec<Node>,
    /// What a caller gives. In the body of a control-flow operator the captured outer values stand last.
    pub inputs: Vec<ValueId>,
    /// What a caller gets.
    pub outputs: Vec<ValueId>,
}

impl Graph {
    /// A new value.
    pub fn add_value(&mut self, name: impl Into<String>) -> ValueId {
        self.push(Value { name: name.into(), declared: None, constant: None })
    }

    /// A new constant.
    pub fn add_constant(&mut self, name: impl Into<String>, tensor: impl Into<Arc<Tensor>>) -> ValueId {
        self.push(Value { name: name.into(), declared: None, constant: Some(tensor.into()) })
    }

    fn push(&mut self, value: Value) -> ValueId {
        let id =
            ValueId(u32::try_from(self.values.len()).expect("fewer than 2^32 values: each took bytes of the file"));
        self.values.push(value);
        id
    }

    /// A new node with one output, at the end of the list; call [`sort`](Self::sort) when its readers stand before it.
    pub fn add_node(&mut self, name: impl Into<String>, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        let name = name.into();
        let output = self.add_value(name.clone());
        let inputs = inputs.iter().copied().map(Some).collect();
        self.nodes.push(Node { name, op: op.into(), inputs, outputs: vec![output] });
        output
    }

    /// The value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// The elements, if it is a constant.
    pub fn constant(&self, id: ValueId) -> Option<&Arc<Tensor>> {
        self.value(id).constant.as_ref()
    }

    /// For each value, the index of the node that computes it.
    pub fn producers(&self) -> Vec<Option<usize>> {
        let mut of = vec![None; self.values.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for o in &node.outputs {
                of[o.index()] = Some(i);
            }
        }
        of
    }

    /// For each value, how many operands and graph outputs refer to it.
    pub fn use_counts(&self) -> Vec<usize> {
        let mut n = vec![0; self.values.len()];
        for id in self.nodes.iter().flat_map(Node::operands).chain(self.outputs.iter().copied()) {
            n[id.index()] += 1;
        }
        n
    }

    /// For each value, the nodes that read it, in order; a node stands twice if it reads the value twice.
    pub fn readers(&self) -> Vec<Vec<usize>> {
        let mut of = vec![Vec::new(); self.values.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for id in node.operands() {
                of[id.index()].push(i);
            }
        }
        of
    }

    /// Makes every reader of `old`, and the graph's outputs, refer to `new`.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        let swap = |id: &mut ValueId| {
            if *id == old {
                *id = new;
            }
        };
        self.nodes.iter_mut().flat_map(|n| n.inputs.iter_mut().flatten()).for_each(swap);
        self.outputs.iter_mut().for_each(swap);
    }

    /// Drops nodes whose results nobody reads. Returns whether there were any.
    pub fn remove_dead_nodes(&mut self) -> bool {
        let producers = self.producers();
        let mut live = vec![false; self.nodes.len()];
        let mut todo: Vec<ValueId> = self.outputs.clone();
        while let Some(id) = todo.pop() {
            if let Some(n) = producers[id.index()]
                && !std::mem::replace(&mut live[n], true)
            {
                todo.extend(self.nodes[n].operands());
            }
        }
        let before = self.nodes.len();
        let mut keep = live.iter();
        self.nodes.retain(|_| *keep.next().expect("one flag per node"));
        self.nodes.len() < before
    }

    /// Forgets the elements of constants that nothing refers to, so that their memory returns.
    pub fn remove_dead_constants(&mut self) {
        let uses = self.use_counts();
        for (value, uses) in self.values.iter_mut().zip(uses) {
            if uses == 0 {
                value.constant = None;
            }
        }
    }

    /// Restores topological order, keeping the order of independent nodes.
    ///
    /// # Errors
    /// If the nodes depend on each other in a circle.
    pub fn sort(&mut self) -> Result<()> {
        let producers = self.producers();
        let mut missing: Vec<usize> =
            self.nodes.iter().map(|n| n.operands().filter(|id| producers[id.index()].is_some()).count()).collect();
        let readers = self.readers();
        let mut ready: std::collections::BinaryHeap<std::cmp::Reverse<usize>> =
            missing.iter().enumerate().filter(|(_, m)| **m == 0).map(|(i, _)| std::cmp::Reverse(i)).collect();
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some(std::cmp::Reverse(i)) = ready.pop() {
            order.push(i);
            for &reader in self.nodes[i].outputs.iter().flat_map(|o| &readers[o.index()]) {
                missing[reader] -= 1;
                if missing[reader] == 0 {
                    ready.push(std::cmp::Reverse(reader));
                }
            }
        }
        if order.len() < self.nodes.len() {
            let stuck = missing.iter().position(|&m| m > 0).unwrap_or(0);
            let node = &self.nodes[stuck];
            return Err(node.error(Error::invalid_model("the node depends on its own result")));
        }
        let mut nodes: Vec<Option<Node>> = std::mem::take(&mut self.nodes).into_iter().map(Some).collect();
        self.nodes = order.into_iter().filter_map(|i| nodes[i].take()).collect();
        Ok(())
    }
}
