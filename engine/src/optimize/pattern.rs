//! Patterns over the graph, written as algebra.
//!
//! ```text
//! let x = var("x");
//! let gelu = &x * (op("Erf", [&x / SQRT_2]) + 1.0) * 0.5;
//! ```
//!
//! describes nodes as an exporter may have written them: operands of `Add` and `Mul` match in either order, a number
//! matches a constant with one element of about that value, a variable that stands twice must be the same value twice.
//! [`rewrite`] looks for patterns from the last node to the first, so that the largest one wins, and replaces what it
//! found by one node. The result of a match keeps its value; what was computed in between must have no other reader
//! and be no output of the graph.
//!
//! ```text
//! solve(goals)                                goal: this value must match that pattern
//!     take a goal; none left: matched
//!     for each way to match it                (orders of operands, alternatives)
//!         solve(the other goals + those of the operands), or undo and try the next way
//! ```

use super::Pass;
use crate::error::Result;
use crate::fact::{Dim, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use crate::tensor::{DType, Tensor};
use std::rc::Rc;
use std::sync::Arc;

/// How far a constant of the model may be from the number of a pattern, relative to it: models that were written in
/// half precision carry constants rounded to 11 bits.
const TOLERANCE: f32 = 2.5e-4;

/// A sweep ends early when it has made constants of so many bytes, so that those that they replace go before more come.
const MAX_NEW_BYTES: usize = 16 << 20;

/// Rewriting stops after so many sweeps even if there was more to do.
const MAX_SWEEPS: usize = 64;

type Test = Rc<dyn Fn(&View, &Node) -> bool>;

enum Kind {
    /// Any value, by name.
    Var(&'static str),
    /// A constant, by name.
    Constant(&'static str),
    /// A constant of one element, about this number.
    Number(f32),
    /// Result 0 of a node.
    Op { names: Vec<&'static str>, operands: Vec<Pattern>, test: Option<Test> },
    /// One of these.
    Any(Vec<Pattern>),
    /// A pattern whose value gets a name.
    Bound(&'static str, Pattern),
}

/// What a value should look like.
#[derive(Clone)]
pub(super) struct Pattern(Rc<Kind>);

impl Pattern {
    fn new(kind: Kind) -> Self {
        Pattern(Rc::new(kind))
    }

    /// Gives the matched value a name.
    pub(super) fn named(self, name: &'static str) -> Pattern {
        Pattern::new(Kind::Bound(name, self))
    }
}

impl From<f32> for Pattern {
    fn from(number: f32) -> Self {
        Pattern::new(Kind::Number(number))
    }
}

impl From<&Pattern> for Pattern {
    fn from(p: &Pattern) -> Self {
        p.clone()
    }
}

/// Any value; the same name stands for the same value.
pub(super) fn var(name: &'static str) -> Pattern {
    Pattern::new(Kind::Var(name))
}

/// Any constant.
pub(super) fn constant(name: &'static str) -> Pattern {
    Pattern::new(Kind::Constant(name))
}

/// An operator without attributes, by its name.
pub(super) fn op<const N: usize>(name: &'static str, operands: [Pattern; N]) -> Pattern {
    Pattern::new(Kind::Op { names: vec![name], operands: operands.into(), test: None })
}

/// A node that also passes a test, for attributes. Only as many operands as are given have to match; the test judges
/// the others.
pub(super) fn op_if<const N: usize>(
    names: &[&'static str],
    operands: [Pattern; N],
    test: impl Fn(&View, &Node) -> bool + 'static,
) -> Pattern {
    Pattern::new(Kind::Op { names: names.to_vec(), operands: operands.into(), test: Some(Rc::new(test)) })
}

/// One of several forms.
pub(super) fn any<const N: usize>(forms: [Pattern; N]) -> Pattern {
    Pattern::new(Kind::Any(forms.into()))
}

/// `a * b * c`, however it is grouped.
pub(super) fn product(a: impl Into<Pattern>, b: impl Into<Pattern>, c: impl Into<Pattern>) -> Pattern {
    let (a, b, c) = (a.into(), b.into(), c.into());
    any([&a * &b * &c, &a * &c * &b, &b * &c * &a])
}

/// `x²`, spelled with `Pow` or `Mul`.
pub(super) fn square(x: impl Into<Pattern>) -> Pattern {
    let x = x.into();
    any([op("Pow", [x.clone(), 2.0.into()]), &x * &x])
}

macro_rules! algebra {
    ($($trait:ident $method:ident $name:literal;)*) => { $(
        impl<R: Into<Pattern>> std::ops::$trait<R> for Pattern {
            type Output = Pattern;
            fn $method(self, other: R) -> Pattern {
                op($name, [self, other.into()])
            }
        }
        impl<R: Into<Pattern>> std::ops::$trait<R> for &Pattern {
            type Output = Pattern;
            fn $method(self, other: R) -> Pattern {
                op($name, [self.clone(), other.into()])
            }
        }
    )* };
}
algebra! {
    Add add "Add";
    Sub sub "Sub";
    Mul mul "Mul";
    Div div "Div";
}

/// The graph as one sweep sees it: with facts, and who computes and reads what.
pub(super) struct View<'a> {
    pub(super) graph: &'a Graph,
    pub(super) facts: &'a [Option<Fact>],
    producers: Vec<Option<usize>>,
    uses: Vec<usize>,
}

impl<'a> View<'a> {
    pub(super) fn new(graph: &'a Graph, facts: &'a [Option<Fact>]) -> Self {
        View { graph, facts, producers: graph.producers(), uses: graph.use_counts() }
    }

    /// What is known of a value.
    pub(super) fn fact(&self, id: ValueId) -> Option<&'a Fact> {
        self.facts.get(id.index())?.as_ref()
    }

    /// The elements of a constant.
    pub(super) fn tensor(&self, id: ValueId) -> Option<&'a Arc<Tensor>> {
        self.fact(id)?.tensor()
    }

    /// The only element of a `float32` constant.
    pub(super) fn scalar(&self, id: ValueId) -> Option<f32> {
        match self.tensor(id)?.as_slice::<f32>().ok()? {
            [one] => Some(*one),
            _ => None,
        }
    }

    /// The node that computes a value.
    pub(super) fn producer(&self, id: ValueId) -> Option<(usize, &'a Node)> {
        let i = self.producers[id.index()]?;
        Some((i, &self.graph.nodes[i]))
    }

    /// How many operands and graph outputs refer to the value.
    pub(super) fn uses(&self, id: ValueId) -> usize {
        self.uses[id.index()]
    }

    /// Whether a value is known to be `float32`.
    pub(super) fn is_f32(&self, id: ValueId) -> bool {
        self.fact(id).is_some_and(|f| f.dtype == DType::F32)
    }

    /// Whether two values are sure to have the same shape, whatever the sizes of the inputs.
    pub(super) fn same_shape(&self, a: ValueId, b: ValueId) -> bool {
        match (self.fact(a).and_then(|f| f.shape.as_ref()), self.fact(b).and_then(|f| f.shape.as_ref())) {
            (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b && *a != Dim::Unknown),
            _ => false,
        }
    }

    /// Whether two values are sure to be of the same rank.
    pub(super) fn same_rank(&self, a: ValueId, b: ValueId) -> bool {
        let rank = |id| self.fact(id).and_then(Fact::rank);
        rank(a).is_some() && rank(a) == rank(b)
    }

    /// Looks for a pattern whose last node is the given one.
    pub(super) fn find(&self, pattern: &Pattern, root: usize) -> Option<Match<'_>> {
        let output = *self.graph.nodes[root].outputs.first()?;
        let mut found = Match { view: self, root, values: Vec::new(), nodes: Vec::new() };
        let mut goals = vec![(pattern.clone(), output)];
        (self.solve(&mut goals, &mut found) && self.is_closed(&found)).then_some(found)
    }

    fn solve(&self, goals: &mut Vec<(Pattern, ValueId)>, found: &mut Match) -> bool {
        let Some((pattern, id)) = goals.pop() else { return true };
        match &*pattern.0 {
            Kind::Var(name) => found.bind(name, id) && self.solve(goals, found),
            Kind::Constant(name) => self.tensor(id).is_some() && found.bind(name, id) && self.solve(goals, found),
            Kind::Number(want) => {
                let near = |have: f32| (have - want).abs() <= TOLERANCE * want.abs();
                self.scalar(id).is_some_and(near) && self.solve(goals, found)
            }
            Kind::Bound(name, inner) => {
                goals.push((inner.clone(), id));
                found.bind(name, id) && self.solve(goals, found)
            }
            Kind::Any(forms) => {
                forms.iter().any(|form| self.attempt(goals, found, |goals| goals.push((form.clone(), id))))
            }
            Kind::Op { names, operands, test } => {
                let Some((i, node)) = self.producer(id) else { return false };
                if node.outputs[0] != id || !names.contains(&node.op.name()) {
                    return false;
                }
                let given = node.inputs.iter().take(operands.len()).flatten().copied().collect::<Vec<_>>();
                let extra = node.operands().count() - given.len();
                let fits = match test {
                    Some(test) => test(self, node),
                    None => extra == 0,
                };
                if given.len() != operands.len() || !fits {
                    return false;
                }
                if !found.nodes.contains(&i) {
                    found.nodes.push(i);
                }
                let commutes = matches!(node.op.name(), "Add" | "Mul") && given.len() == 2;
                let straight =
                    |goals: &mut Vec<_>| goals.extend(operands.iter().cloned().zip(given.iter().copied()).rev());
                let swapped =
                    |goals: &mut Vec<_>| goals.extend(operands.iter().cloned().zip(given.iter().rev().copied()));
                self.attempt(goals, found, straight) || (commutes && self.attempt(goals, found, swapped))
            }
        }
    }

    /// Solves with the goals that `add` adds, or leaves everything as it was.
    fn attempt(
        &self,
        goals: &[(Pattern, ValueId)],
        found: &mut Match,
        add: impl FnOnce(&mut Vec<(Pattern, ValueId)>),
    ) -> bool {
        let (values, nodes) = (found.values.len(), found.nodes.len());
        let mut tried = goals.to_vec();
        add(&mut tried);
        if self.solve(&mut tried, found) {
            return true;
        }
        found.values.truncate(values);
        found.nodes.truncate(nodes);
        false
    }

    /// Whether nothing outside reads what the nodes compute, but for result 0 of the root.
    fn is_closed(&self, found: &Match) -> bool {
        let result = self.graph.nodes[found.root].outputs[0];
        let inner = found.nodes.iter().flat_map(|&i| self.graph.nodes[i].operands());
        let inner: Vec<ValueId> = inner.collect();
        found
            .nodes
            .iter()
            .flat_map(|&i| &self.graph.nodes[i].outputs)
            .all(|&id| id == result || self.uses(id) == inner.iter().filter(|&&read| read == id).count())
    }
}

/// Where a pattern was found.
pub(super) struct Match<'a> {
    view: &'a View<'a>,
    root: usize,
    values: Vec<(&'static str, ValueId)>,
    nodes: Vec<usize>,
}

impl Match<'_> {
    fn bind(&mut self, name: &'static str, id: ValueId) -> bool {
        match self.values.iter().find(|(n, _)| *n == name) {
            Some((_, bound)) => *bound == id,
            None => {
                self.values.push((name, id));
                true
            }
        }
    }

    /// The value that a variable stands for, if the form that matched has the variable.
    pub(super) fn get(&self, name: &str) -> Option<ValueId> {
        self.values.iter().find(|(n, _)| *n == name).map(|(_, id)| *id)
    }

    /// The only element of a constant.
    pub(super) fn scalar(&self, name: &str) -> Option<f32> {
        self.view.scalar(self.get(name)?)
    }

    /// The value that the pattern computes.
    pub(super) fn result(&self) -> ValueId {
        self.view.graph.nodes[self.root].outputs[0]
    }

    /// Makes a replacement of the nodes that matched.
    pub(super) fn replace(&self, op: impl Into<Op>, operands: Vec<Operand>) -> Replacement {
        Replacement { root: self.root, nodes: self.nodes.clone(), op: op.into(), operands }
    }
}

/// An operand of a node to be made.
pub(super) enum Operand {
    /// A value that exists.
    Value(ValueId),
    /// A new constant.
    Constant(Tensor),
    /// An optional one that is left out.
    Absent,
    /// The result of a new node.
    Computed(Op, Vec<Operand>),
}

impl Operand {
    /// Size of the new constants in it.
    fn bytes(&self) -> usize {
        match self {
            Operand::Constant(tensor) => tensor.bytes().len(),
            Operand::Computed(_, operands) => operands.iter().map(Operand::bytes).sum(),
            Operand::Value(_) | Operand::Absent => 0,
        }
    }
}

impl From<ValueId> for Operand {
    fn from(id: ValueId) -> Self {
        Operand::Value(id)
    }
}

impl From<Option<ValueId>> for Operand {
    fn from(id: Option<ValueId>) -> Self {
        id.map_or(Operand::Absent, Operand::Value)
    }
}

/// One node that takes the place of several.
pub(super) struct Replacement {
    /// The node whose result 0 stays, and where the new node stands.
    pub(super) root: usize,
    /// All nodes that it replaces.
    pub(super) nodes: Vec<usize>,
    /// What the new node computes.
    pub(super) op: Op,
    /// What it reads.
    pub(super) operands: Vec<Operand>,
}

/// Applies a rule wherever it fits, again until it fits nowhere. The rule sees the graph and the index of a node, and
/// says what shall stand for that node and some of those before it. Returns whether anything changed.
pub(super) fn rewrite(
    graph: &mut Graph,
    pass: &Pass,
    rule: impl Fn(&View, usize) -> Result<Option<Replacement>>,
) -> Result<bool> {
    sweeps(graph, pass, &rule)
}

/// [`rewrite`], compiled once for all rules.
fn sweeps(graph: &mut Graph, pass: &Pass, rule: &dyn Fn(&View, usize) -> Result<Option<Replacement>>) -> Result<bool> {
    let mut changed = false;
    for _ in 0..MAX_SWEEPS {
        let facts = pass.facts(graph)?;
        let view = View::new(graph, &facts);
        let mut taken = vec![false; graph.nodes.len()];
        let mut found = Vec::new();
        let mut made = 0;
        for root in (0..graph.nodes.len()).rev() {
            if made > MAX_NEW_BYTES {
                break;
            }
            if taken[root] {
                continue;
            }
            if let Some(replacement) = rule(&view, root)?
                && !replacement.nodes.iter().any(|&i| taken[i])
            {
                replacement.nodes.iter().for_each(|&i| taken[i] = true);
                taken[root] = true;
                made += replacement.operands.iter().map(Operand::bytes).sum::<usize>();
                found.push(replacement);
            }
        }
        if found.is_empty() {
            return Ok(changed);
        }
        changed = true;
        for replacement in found {
            apply(graph, replacement);
        }
        graph.remove_dead_nodes();
        graph.remove_dead_constants();
        graph.sort()?;
    }
    Ok(changed)
}

fn apply(graph: &mut Graph, replacement: Replacement) {
    let name = graph.nodes[replacement.root].name.clone();
    let inputs = operands(graph, &name, replacement.operands);
    let outputs = vec![graph.nodes[replacement.root].outputs[0]];
    graph.nodes[replacement.root] = Node { name, op: replacement.op, inputs, outputs };
}

/// Makes what does not exist yet; new nodes stand at the end until the graph is sorted.
fn operands(graph: &mut Graph, name: &str, operands: Vec<Operand>) -> Vec<Option<ValueId>> {
    let mut ids = Vec::with_capacity(operands.len());
    for operand in operands {
        ids.push(match operand {
            Operand::Value(id) => Some(id),
            Operand::Constant(tensor) => Some(graph.add_constant(format!("{name}/constant"), tensor)),
            Operand::Absent => None,
            Operand::Computed(op, inner) => {
                let inputs = self::operands(graph, name, inner);
                let name = format!("{name}/{}", op.name());
                let output = graph.add_value(name.clone());
                graph.nodes.push(Node { name, op, inputs, outputs: vec![output] });
                Some(output)
            }
        });
    }
    ids
}
