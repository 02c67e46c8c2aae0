//! The plan: for one set of input shapes, which kernels run in which order, and where every value lives.
//!
//! ```text
//! facts   <- analyze(graph, input facts)              all shapes, and the constants among the values
//! for each node with work left:
//!     a step <- a kernel for these shapes             (Operator::prepare)
//! for each value:
//!     a place <- constant | bytes of the arena | bytes of an input | a result's own tensor | dynamic
//! ```
//!
//! Inputs are read where the caller has them. A result of the graph that shares no bytes with other values has a tensor of
//! its own, which the caller may take away when the run is over.
//!
//! Values that are runs of the bytes of others (reshapes, parts along the outermost axis) are views. What a `Concat` along the
//! outermost axis reads is computed where it will lie in the result; only operands that stand elsewhere (constants, inputs,
//! parts of other values) are copied.
//!
//! A value whose shape depends on the elements of another (`NonZero`, a `Reshape` to a computed shape) is dynamic: its
//! step infers the shape when it runs, and allocates. All other steps allocate nothing.
//!
//! Offsets in the arena follow "greedy by size" (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
//! Inference", 2020): the largest buffers are placed first, each at the lowest offset that is free while it lives.

use crate::analyze::{Folding, analyze, operand_facts};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::if_::If;
use crate::ops::{Compute, PackCache, Prepare};
use crate::storage::ALIGN;
use crate::tensor::{DType, Dims, Tensor, TensorView, byte_count};
use std::ops::Range;
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// Where a value lives while a plan runs.
#[derive(Clone, Debug)]
pub enum Place {
    /// In the arena.
    Arena(Range<usize>),
    /// In an input of the run, by its position among the graph's inputs.
    Input(usize, Range<usize>),
    /// In a tensor of its own, an index into [`Plan::results`].
    Result(usize),
    /// In the graph.
    Constant(Arc<Tensor>),
    /// In a tensor of its own that is made when its step runs; an index into the run's list.
    Dynamic(usize),
}

/// A value that a step of the plan reads or writes.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Element type.
    pub dtype: DType,
    /// Shape; empty and meaningless for dynamic values.
    pub dims: Dims,
    /// Where it is.
    pub place: Place,
}

/// One node, ready to run.
#[derive(Debug)]
pub struct Step {
    /// The node, for dynamic steps and for messages.
    pub node: Node,
    /// The kernel that was chosen; `None` runs the operator itself.
    pub compute: Option<Arc<dyn Compute>>,
    /// Operands, as indices into [`Plan::values`].
    pub inputs: Vec<Option<usize>>,
    /// Results, as indices into [`Plan::values`].
    pub outputs: Vec<usize>,
    /// The operand whose buffer result 0 takes over.
    pub in_place: Option<usize>,
    /// Whether shapes are inferred when it runs.
    pub is_dynamic: bool,
    /// Dynamic values that nobody reads afterwards.
    pub frees: Vec<usize>,
}

impl Step {
    /// About how many scalar operations it takes; `None` when that is known only at run time.
    fn work(&self, values: &[Planned]) -> Option<u64> {
        // An element that is moved or mapped costs about as much as this many operations of a matrix product.
        const PER_ELEMENT: u64 = 8;
        // Bodies of control flow do more than their results show.
        if self.is_dynamic || self.node.op.shapes_by_running() || self.node.op.is::<If>() {
            return None;
        }
        let counted = self.compute.as_ref().map_or(0, |c| c.flops());
        let elements = |&v: &usize| values[v].dims.iter().product::<usize>() as u64;
        // What was packed is counted already.
        let computed = |v: &&usize| !matches!(values[**v].place, Place::Constant(_));
        let moved: u64 = self.inputs.iter().flatten().filter(computed).chain(&self.outputs).map(elements).sum();
        Some(counted.saturating_add(moved.saturating_mul(PER_ELEMENT)))
    }
}

/// Everything that a run needs to know.
#[derive(Debug)]
pub struct Plan {
    /// In the order of execution.
    pub steps: Vec<Step>,
    /// The values that steps, inputs and outputs refer to.
    pub values: Vec<Planned>,
    /// One per graph input; `None` where nothing reads it.
    pub inputs: Vec<Option<usize>>,
    /// One per graph output.
    pub outputs: Vec<usize>,
    /// Element types and shapes of the results that have tensors of their own.
    pub results: Vec<(DType, Dims)>,
    /// Size of the arena.
    pub arena_bytes: usize,
    /// Number of dynamic values.
    pub dynamic_values: usize,
    /// Packed constants, for dynamic steps.
    pub packed: PackCache,
    /// About how many scalar operations a run takes; `None` when that is known only at run time.
    pub work: Option<u64>,
    /// Graph inputs whose elements decide shapes: with their content known, fewer steps would be dynamic.
    pub shape_inputs: Vec<usize>,
}

/// Makes the plan; `inputs` are the facts of the graph's inputs, with all shapes known.
pub fn plan(graph: &Graph, inputs: &[Fact], cache: &PackCache, cx: &Cx) -> Result<Plan> {
    let facts = analyze(graph, inputs, cx, Folding::default())?;
    let nodes = live_nodes(graph, &facts);
    let dynamic = dynamic_values(graph, inputs, &facts, &nodes);
    let buffers = Buffers::assign(graph, &facts, &nodes, &dynamic)?;

    let index = vec![None; graph.values.len()];
    let mut planned =
        Values { graph, facts: &facts, dynamic: &dynamic, buffers: &buffers, index, values: vec![], results: vec![] };
    let mut steps = Vec::with_capacity(nodes.len());
    for (position, &i) in nodes.iter().enumerate() {
        let node = &graph.nodes[i];
        if buffers.skipped[position] {
            for &k in &buffers.copied[position] {
                steps.push(planned.copy_operand(node, k)?);
            }
            continue;
        }
        let is_dynamic = node.outputs.iter().any(|o| dynamic[o.index()].is_some());
        let compute = if is_dynamic { None } else { prepare(node, &facts, cache, cx).map_err(|e| node.error(e))? };
        steps.push(Step {
            compute,
            inputs: node.inputs.iter().map(|id| id.map(|id| planned.get(id)).transpose()).collect::<Result<_>>()?,
            outputs: node.outputs.iter().map(|&id| planned.get(id)).collect::<Result<_>>()?,
            in_place: buffers.in_place[position],
            is_dynamic,
            frees: Vec::new(),
            node: node.clone(),
        });
    }
    let used: Vec<bool> = graph.use_counts().iter().map(|&n| n > 0).collect();
    let inputs = graph
        .inputs
        .iter()
        .map(|&id| if used[id.index()] { planned.get(id).map(Some) } else { Ok(None) })
        .collect::<Result<_>>()?;
    let outputs = graph.outputs.iter().map(|&id| planned.get(id)).collect::<Result<Vec<_>>>()?;
    let Values { values, results, .. } = planned;
    note_frees(&mut steps, &values, &outputs);
    let work = steps.iter().map(|step| step.work(&values)).try_fold(0u64, |sum, work| Some(sum.saturating_add(work?)));
    Ok(Plan {
        work,
        steps,
        values,
        inputs,
        outputs,
        results,
        arena_bytes: buffers.arena_bytes,
        dynamic_values: dynamic.iter().flatten().count(),
        packed: cache.clone(),
        shape_inputs: shape_inputs(graph, &facts, &nodes, &dynamic),
    })
}

/// Makes the plan for certain inputs. The elements of those that decide shapes become part of it; the second result
/// names them.
pub fn plan_for(graph: &Graph, inputs: &[TensorView], cache: &PackCache, cx: &Cx) -> Result<(Plan, Vec<usize>)> {
    let mut facts: Vec<Fact> = inputs.iter().map(|v| Fact::new(v.dtype, v.dims)).collect();
    let mut fixed = Vec::new();
    loop {
        let made = plan(graph, &facts, cache, cx)?;
        let fresh: Vec<_> = made.shape_inputs.iter().copied().filter(|i| facts[*i].tensor().is_none()).collect();
        if fresh.is_empty() {
            return Ok((made, fixed));
        }
        for i in fresh {
            facts[i].content = Content::Tensor(Arc::new(inputs[i].to_tensor()?));
            fixed.push(i);
        }
    }
}

fn prepare(node: &Node, facts: &[Option<Fact>], cache: &PackCache, cx: &Cx) -> Result<Option<Arc<dyn Compute>>> {
    let inputs = operand_facts(node, facts)?;
    let outputs: Option<Vec<&Fact>> = node.outputs.iter().map(|o| facts[o.index()].as_ref()).collect();
    let outputs = outputs.ok_or_else(|| Error::internal("a result has no fact"))?;
    let compute = node.op.prepare(&Prepare { isa: cx.isa(), cx, inputs: &inputs, outputs: &outputs, cache })?;
    check_released(&inputs, compute.as_deref())?;
    Ok(compute)
}

/// Refuses a kernel that would read elements that are gone: a defect of its `prepack`.
pub(crate) fn check_released(operands: &[Option<&Fact>], compute: Option<&dyn Compute>) -> Result<()> {
    let packed = compute.map_or(&[][..], |c| c.packed_operands());
    let is_released = |f: &Option<&Fact>| f.and_then(Fact::tensor).is_some_and(|t| t.is_released());
    match operands.iter().enumerate().find(|(k, f)| is_released(f) && !packed.contains(k)) {
        Some((k, _)) => Err(Error::internal(format!("operand {k} was packed, and the kernel wants its elements"))),
        None => Ok(()),
    }
}

fn is_constant(facts: &[Option<Fact>], id: ValueId) -> bool {
    facts[id.index()].as_ref().is_some_and(|f| f.tensor().is_some())
}

/// Nodes with a result that is read and not known already, in order.
fn live_nodes(graph: &Graph, facts: &[Option<Fact>]) -> Vec<usize> {
    let mut wanted = vec![false; graph.values.len()];
    for &id in &graph.outputs {
        wanted[id.index()] = true;
    }
    let mut live = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate().rev() {
        if node.outputs.iter().any(|&o| wanted[o.index()] && !is_constant(facts, o)) {
            live.push(i);
            for id in node.operands() {
                wanted[id.index()] = true;
            }
        }
    }
    live.reverse();
    live
}

/// For each value, its number among the dynamic ones.
fn dynamic_values(graph: &Graph, inputs: &[Fact], facts: &[Option<Fact>], nodes: &[usize]) -> Vec<Option<usize>> {
    let mut of = vec![None; graph.values.len()];
    let mut next = 0;
    let mut number = || {
        next += 1;
        Some(next - 1)
    };
    // Text does not live in the arena.
    for (id, fact) in graph.inputs.iter().zip(inputs) {
        if fact.dtype == DType::String && fact.tensor().is_none() {
            of[id.index()] = number();
        }
    }
    for &i in nodes {
        let node = &graph.nodes[i];
        let unknown =
            |id: &ValueId| facts[id.index()].as_ref().is_none_or(|f| f.dims().is_none() || f.dtype == DType::String);
        if node.operands().any(|id| of[id.index()].is_some()) || node.outputs.iter().any(unknown) {
            for id in &node.outputs {
                of[id.index()] = number();
            }
        }
    }
    of
}

/// Small integer inputs of the graph from which the shapes of dynamic values are computed.
fn shape_inputs(graph: &Graph, facts: &[Option<Fact>], nodes: &[usize], dynamic: &[Option<usize>]) -> Vec<usize> {
    const MAX_ELEMENTS: usize = 64;
    let producers = graph.producers();
    let mut found = vec![false; graph.inputs.len()];
    for &i in nodes {
        let node = &graph.nodes[i];
        let starts_here = node.outputs.iter().any(|o| dynamic[o.index()].is_some())
            && !node.operands().any(|id| dynamic[id.index()].is_some());
        if !starts_here {
            continue;
        }
        let mut todo: Vec<ValueId> = node.op.shape_operands().iter().filter_map(|&k| *node.inputs.get(k)?).collect();
        let mut seen = vec![false; graph.values.len()];
        let mut inputs = Vec::new();
        let mut all_small = true;
        while let Some(id) = todo.pop() {
            if std::mem::replace(&mut seen[id.index()], true) || is_constant(facts, id) {
                continue;
            }
            if let Some(position) = graph.inputs.iter().position(|&g| g == id) {
                all_small &= facts[id.index()].as_ref().is_some_and(|f| f.is_small_integer(MAX_ELEMENTS));
                inputs.push(position);
            } else if let Some(p) = producers[id.index()] {
                todo.extend(graph.nodes[p].operands());
            }
        }
        if all_small {
            inputs.into_iter().for_each(|p| found[p] = true);
        }
    }
    (0..found.len()).filter(|&p| found[p]).collect()
}

fn note_frees(steps: &mut [Step], values: &[Planned], outputs: &[usize]) {
    let mut seen: std::collections::HashSet<usize> = outputs.iter().copied().collect();
    for step in steps.iter_mut().rev() {
        for v in step.inputs.iter().flatten().chain(&step.outputs).copied() {
            if let Place::Dynamic(slot) = values[v].place
                && seen.insert(v)
            {
                step.frees.push(slot);
            }
        }
    }
}

/// Collects the values that the plan mentions.
struct Values<'a> {
    graph: &'a Graph,
    facts: &'a [Option<Fact>],
    dynamic: &'a [Option<usize>],
    buffers: &'a Buffers,
    index: Vec<Option<usize>>,
    values: Vec<Planned>,
    results: Vec<(DType, Dims)>,
}

impl Values<'_> {
    fn get(&mut self, id: ValueId) -> Result<usize> {
        if let Some(i) = self.index[id.index()] {
            return Ok(i);
        }
        let name = &self.graph.value(id).name;
        let lost = |what: &str| Error::internal(format!("the value \"{name}\" has no {what}"));
        let fact = self.facts[id.index()].as_ref().ok_or_else(|| lost("element type"))?;
        let place = match (fact.tensor(), self.dynamic[id.index()]) {
            (Some(t), _) => Place::Constant(t.clone()),
            (None, Some(slot)) => Place::Dynamic(slot),
            (None, None) => {
                let dims = fact.dims().ok_or_else(|| lost("known shape"))?;
                let bytes = byte_count(fact.dtype, &dims)?;
                match self.buffers.spot_of(id).ok_or_else(|| lost("place in memory"))? {
                    Spot::Buffer(buffer, at) => {
                        let offset = self.buffers.offsets[buffer] + at;
                        Place::Arena(offset..offset + bytes)
                    }
                    Spot::Input(input, at) => Place::Input(input, at..at + bytes),
                    Spot::Result => {
                        self.results.push((fact.dtype, dims));
                        Place::Result(self.results.len() - 1)
                    }
                }
            }
        };
        self.values.push(Planned { dtype: fact.dtype, dims: fact.dims().unwrap_or_default(), place });
        self.index[id.index()] = Some(self.values.len() - 1);
        Ok(self.values.len() - 1)
    }

    /// The step that copies one operand to its place in the result of a node that joins its operands.
    fn copy_operand(&mut self, node: &Node, operand: usize) -> Result<Step> {
        let lost = || Error::internal("an operand to be joined has no place");
        let (from, to) = (self.get(node.inputs[operand].ok_or_else(lost)?)?, self.get(node.outputs[0])?);
        let Place::Arena(whole) = self.values[to].place.clone() else { return Err(lost()) };
        let mut start = whole.start;
        for id in node.inputs[..operand].iter().flatten() {
            let fact = self.facts[id.index()].as_ref().ok_or_else(lost)?;
            start += byte_count(fact.dtype, &fact.dims().ok_or_else(lost)?)?;
        }
        let Planned { dtype, dims, .. } = self.values[from].clone();
        let end = start + byte_count(dtype, &dims)?;
        self.values.push(Planned { dtype, dims, place: Place::Arena(start..end) });
        Ok(Step {
            // Of one operand: a copy.
            node: Node { inputs: vec![node.inputs[operand]], ..node.clone() },
            compute: None,
            inputs: vec![Some(from)],
            outputs: vec![self.values.len() - 1],
            in_place: None,
            is_dynamic: false,
            frees: Vec::new(),
        })
    }
}

/// Which values share a buffer, and where the buffers are.
struct Buffers {
    of_value: Vec<Option<Spot>>,
    offsets: Vec<usize>,
    arena_bytes: usize,
    /// Per position in the list of nodes: the operand that result 0 is computed in.
    in_place: Vec<Option<usize>>,
    /// Per position in the list of nodes: nothing to run, but for the copies.
    skipped: Vec<bool>,
    /// Per position in the list of nodes: operands to be copied to their place in the result.
    copied: Vec<Vec<usize>>,
}

/// What holds a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spot {
    /// A buffer of the arena, from this byte on.
    Buffer(usize, usize),
    /// An input of the graph, from this byte on.
    Input(usize, usize),
    /// A tensor of its own.
    Result,
}

/// Parts of a buffer that are values of their own begin at multiples of this many bytes: a vector of the smallest kind.
/// Kernels read and write from any address; lines of the cache that two values share, or vectors across two lines, cost less
/// than a copy.
const PART_ALIGN: usize = 16;

#[derive(Clone, Copy)]
struct Life {
    bytes: usize,
    first: usize,
    last: usize,
}

impl Buffers {
    fn spot_of(&self, id: ValueId) -> Option<Spot> {
        self.of_value[id.index()]
    }

    fn assign(graph: &Graph, facts: &[Option<Fact>], nodes: &[usize], dynamic: &[Option<usize>]) -> Result<Buffers> {
        let in_arena = |id: ValueId| dynamic[id.index()].is_none() && !is_constant(facts, id);
        let bytes = |id: ValueId| -> Result<usize> {
            let fact = facts[id.index()].as_ref();
            match fact.and_then(|f| Some((f.dtype, f.dims()?))) {
                Some((dtype, dims)) => byte_count(dtype, &dims),
                None => Err(Error::internal("a planned value has no shape")),
            }
        };
        // Views share the value that they look at; `root` of a value is the one it lies in, `at` where in it, in bytes.
        let mut root: Vec<usize> = (0..graph.values.len()).collect();
        let mut at = vec![0; graph.values.len()];
        let mut skipped = vec![false; nodes.len()];
        let mut copied = vec![Vec::new(); nodes.len()];
        for (position, &i) in nodes.iter().enumerate() {
            let node = &graph.nodes[i];
            if let Some(begins) = views(node, facts, &in_arena)? {
                let Some(from) = node.inputs[0] else { continue };
                for (to, begin) in node.outputs.iter().zip(begins) {
                    root[to.index()] = root[from.index()];
                    at[to.index()] = at[from.index()] + begin;
                }
                skipped[position] = true;
            }
        }
        // The value that another one was moved into, and where. The last nodes first: a result may lie in another.
        let mut within: Vec<Option<(usize, usize)>> = vec![None; graph.values.len()];
        let find = |within: &[Option<(usize, usize)>], id: ValueId| {
            let (mut value, mut offset) = (root[id.index()], at[id.index()]);
            while let Some((outer, begin)) = within[value] {
                (value, offset) = (outer, offset + begin);
            }
            (value, offset)
        };
        let mut is_input = vec![false; graph.values.len()];
        graph.inputs.iter().for_each(|id| is_input[id.index()] = true);
        for (position, &i) in nodes.iter().enumerate().rev() {
            let node = &graph.nodes[i];
            let &[to] = node.outputs.as_slice() else { continue };
            let fact = facts[to.index()].as_ref().filter(|f| in_arena(to) && f.dtype.bits() >= 8);
            if !fact.and_then(Fact::dims).is_some_and(|d| node.op.joins(&d)) {
                continue;
            }
            let (outer, mut begin) = find(&within, to);
            let (mut others, mut is_joined) = (Vec::new(), false);
            for (k, id) in node.operands().enumerate() {
                let ((inner, offset), size) = (find(&within, id), bytes(id)?);
                let is_own = in_arena(id)
                    && size > 0
                    && offset == 0
                    && bytes(ValueId(inner as u32))? == size
                    && inner != outer
                    && !is_input[inner]
                    && begin.is_multiple_of(PART_ALIGN);
                if is_own {
                    within[inner] = Some((outer, begin));
                    is_joined = true;
                } else if size > 0 {
                    others.push(k);
                }
                begin += size;
            }
            if is_joined {
                skipped[position] = true;
                copied[position] = others;
            }
        }
        let (root, at): (Vec<usize>, Vec<usize>) =
            (0..graph.values.len() as u32).map(|v| find(&within, ValueId(v))).unzip();
        let mut last_use = vec![0; graph.values.len()];
        for (position, &i) in nodes.iter().enumerate() {
            for id in graph.nodes[i].operands() {
                last_use[root[id.index()]] = position;
            }
        }
        for id in &graph.outputs {
            last_use[root[id.index()]] = usize::MAX;
        }
        // Results that share no bytes with other values.
        let mut is_alone = vec![false; graph.values.len()];
        graph.outputs.iter().for_each(|id| is_alone[id.index()] = root[id.index()] == id.index());
        (0..root.len()).filter(|&v| root[v] != v).for_each(|v| is_alone[root[v]] = false);

        let mut of_root: Vec<Option<Spot>> = vec![None; graph.values.len()];
        let mut lives: Vec<Life> = Vec::new();
        let mut in_place = vec![None; nodes.len()];
        for (i, id) in graph.inputs.iter().enumerate() {
            of_root[id.index()] = in_arena(*id).then_some(Spot::Input(i, 0));
        }
        for (position, &i) in nodes.iter().enumerate() {
            let node = &graph.nodes[i];
            for (k, &id) in node.outputs.iter().enumerate() {
                let r = root[id.index()];
                // Views, and values whose parts are there already.
                if !in_arena(id) || of_root[r].is_some() {
                    continue;
                }
                let last = last_use[r].max(position);
                if r != id.index() {
                    of_root[r] = Some(Spot::Buffer(lives.len(), 0));
                    lives.push(Life { bytes: bytes(ValueId(r as u32))?, first: position, last });
                    continue;
                }
                let taken = if k == 0 {
                    node.op.in_place().iter().copied().find(|&operand| {
                        let Some(Some(from)) = node.inputs.get(operand).copied() else { return false };
                        let from_root = root[from.index()];
                        in_arena(from)
                            && !is_input[from_root]
                            && last_use[from_root] == position
                            && bytes(from).ok() == bytes(id).ok()
                            && node.operands().filter(|o| root[o.index()] == from_root).count() == 1
                    })
                } else {
                    None
                };
                let place_of = |operand: usize| {
                    let from = node.inputs[operand]?.index();
                    match of_root[root[from]] {
                        Some(Spot::Buffer(buffer, base)) => Some((buffer, base + at[from])),
                        _ => None,
                    }
                };
                of_root[r] = Some(match taken.and_then(place_of) {
                    Some((buffer, base)) => {
                        in_place[position] = taken;
                        lives[buffer].last = lives[buffer].last.max(last);
                        Spot::Buffer(buffer, base)
                    }
                    None if is_alone[r] => Spot::Result,
                    None => {
                        lives.push(Life { bytes: bytes(id)?, first: position, last });
                        Spot::Buffer(lives.len() - 1, 0)
                    }
                });
            }
        }
        let (offsets, arena_bytes) = place(&lives)?;
        let moved = |spot: Spot, by: usize| match spot {
            Spot::Buffer(buffer, base) => Spot::Buffer(buffer, base + by),
            Spot::Input(input, base) => Spot::Input(input, base + by),
            Spot::Result => Spot::Result,
        };
        let of_value = root.iter().zip(&at).map(|(&r, &at)| of_root[r].map(|spot| moved(spot, at))).collect();
        Ok(Buffers { of_value, offsets, arena_bytes, in_place, skipped, copied })
    }
}

/// Where the results of a node begin in operand 0, in bytes, if they are views of it.
fn views(node: &Node, facts: &[Option<Fact>], in_arena: &impl Fn(ValueId) -> bool) -> Result<Option<Dims>> {
    let Some(Some(from)) = node.inputs.first() else { return Ok(None) };
    if !in_arena(*from) || !node.outputs.iter().all(|&to| in_arena(to)) {
        return Ok(None);
    }
    if node.op.is_view() && node.outputs.len() == 1 {
        return Ok(Some([0].into_iter().collect()));
    }
    let dtype = facts[from.index()].as_ref().map_or(DType::U8, |f| f.dtype);
    if dtype.bits() < 8 {
        return Ok(None);
    }
    let dims: Option<Vec<Dims>> = node.outputs.iter().map(|o| facts[o.index()].as_ref()?.dims()).collect();
    let Some(dims) = dims else { return Ok(None) };
    let Some(begins) = node.op.cuts(&operand_facts(node, facts)?, &dims) else { return Ok(None) };
    let begins = begins.iter().map(|&n| byte_count(dtype, &[n])).collect::<Result<Dims>>()?;
    Ok(begins.iter().all(|b| b.is_multiple_of(PART_ALIGN)).then_some(begins))
}

/// Offsets of buffers, and the size of the arena that holds them.
fn place(lives: &[Life]) -> Result<(Vec<usize>, usize)> {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lives[i].bytes));
    let mut offsets = vec![0; lives.len()];
    let mut placed: Vec<usize> = Vec::with_capacity(lives.len());
    let mut total = 0;
    for i in order {
        let size = lives[i].bytes.checked_next_multiple_of(ALIGN);
        let size = size.ok_or_else(|| Error::limit("a value is larger than memory can be"))?;
        let mut offset = 0usize;
        // `placed` is kept in the order of offsets.
        for &other in &placed {
            let (a, b) = (lives[i], lives[other]);
            if a.first > b.last || b.first > a.last {
                continue;
            }
            let end = offset.checked_add(size).ok_or_else(|| Error::limit("the values do not fit into memory"))?;
            if end <= offsets[other] {
                break;
            }
            offset = offset.max(offsets[other] + b.bytes.next_multiple_of(ALIGN));
        }
        offsets[i] = offset;
        let end = offset.checked_add(size).ok_or_else(|| Error::limit("the values do not fit into memory"))?;
        total = total.max(end);
        let at = placed.partition_point(|&o| offsets[o] <= offset);
        placed.insert(at, i);
    }
    Ok((offsets, total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimize::testing::{Net, int};

    fn joined(n: &mut Net, parts: &[ValueId]) -> ValueId {
        n.op_with("Concat", parts, &[("axis", int(1))])
    }

    fn cut(n: &mut Net, x: ValueId, sizes: &[i64]) -> Vec<ValueId> {
        let sizes_id = n.i64s(sizes);
        n.nodes_of("", "Split", &[Some(x), Some(sizes_id)], &[("axis", int(1))], sizes.len())
    }

    #[test]
    fn what_is_joined_and_cut_along_the_outermost_axis_costs_nothing() {
        let mut n = Net::new(18);
        let x = n.input("x", &[1, 8, 4]);
        let parts = cut(&mut n, x, &[3, 5]);
        let (a, b) = (n.op("Neg", &[parts[0]]), n.op("Exp", &[parts[1]]));
        let shape = n.i64s(&[1, 4, 5]);
        let c = n.op("Reshape", &[b, shape]);
        let c = n.op("Abs", &[c]);
        let y = joined(&mut n, &[b, a]);
        let y = n.op("Sin", &[y]);
        n.output(y);
        n.output(c);
        assert_eq!(n.planned(), ["Neg", "Exp", "Abs", "Sin"]);
        // Inputs, constants, parts of other values and what stands there twice are copied, the others not.
        let mut n = Net::new(18);
        let x = n.input("x", &[1, 2, 4]);
        let (w, a) = (n.weights(&[1, 1, 4]), n.op("Neg", &[x]));
        let inner = joined(&mut n, &[a, a]);
        let y = joined(&mut n, &[w, inner, x]);
        n.output(y);
        assert_eq!(n.planned(), ["Neg", "Concat", "Concat", "Concat"]);
        // Along another axis rows interleave; parts of 4 bytes do not begin where a vector may.
        let mut n = Net::new(18);
        let x = n.input("x", &[2, 4]);
        let a = n.op("Neg", &[x]);
        let y = joined(&mut n, &[a, x]);
        let z = n.input("z", &[1, 3]);
        let parts = cut(&mut n, z, &[1, 2]);
        let z = n.op("Abs", &[parts[1]]);
        n.output(y);
        n.output(z);
        assert_eq!(n.planned(), ["Neg", "Concat", "Split", "Abs"]);
    }

    #[test]
    fn slices_that_are_runs() {
        let slice = |start: i64, end: i64, axis: i64, step: i64| {
            let mut n = Net::new(18);
            let x = n.input("x", &[4, 4, 8]);
            let [start, end, axis, step] = [start, end, axis, step].map(|v| n.i64s(&[v]));
            let y = n.op("Slice", &[x, start, end, axis, step]);
            let y = n.op("Neg", &[y]);
            n.output(y);
            n.planned().len() == 1
        };
        assert!(slice(1, 3, 0, 1) && slice(-1, -2, 0, -1));
        assert!(!slice(3, 0, 0, -1) && !slice(0, 4, 0, 2) && !slice(1, 3, 1, 1) && !slice(0, 2, 2, 1));
    }

    #[test]
    fn any_graph_of_parts_computes_what_its_nodes_say() {
        let mut seed = 3u64;
        let mut next = |n: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % n
        };
        for _ in 0..200 {
            let mut n = Net::new(18);
            // Values of shape [1, rows, 4].
            let mut values: Vec<(ValueId, usize)> = Vec::new();
            for name in ["x", "y"] {
                let rows = 1 + next(5);
                values.push((n.input(name, &[1, rows, 4]), rows));
            }
            for _ in 0..14 {
                let (x, rows) = values[next(values.len())];
                match next(6) {
                    0 => values.push((n.op("Neg", &[x]), rows)),
                    1 => {
                        let others: Vec<_> = values.iter().filter(|v| v.1 == rows).map(|v| v.0).collect();
                        let other = others[next(others.len())];
                        values.push((n.op("Add", &[x, other]), rows));
                    }
                    2 if rows > 1 => {
                        let first = 1 + next(rows - 1);
                        let parts = cut(&mut n, x, &[first as i64, (rows - first) as i64]);
                        values.extend([(parts[0], first), (parts[1], rows - first)]);
                    }
                    3 => {
                        let shape = n.i64s(&[1, 4 * rows as i64]);
                        let flat = n.op("Reshape", &[x, shape]);
                        let flat = n.op("Abs", &[flat]);
                        let shape = n.i64s(&[1, rows as i64, 4]);
                        values.push((n.op("Reshape", &[flat, shape]), rows));
                    }
                    _ if rows < 40 => {
                        let others: Vec<_> = (0..next(3)).map(|_| values[next(values.len())]).collect();
                        let parts: Vec<_> = others.iter().map(|o| o.0).chain([x]).collect();
                        values.push((joined(&mut n, &parts), rows + others.iter().map(|o| o.1).sum::<usize>()));
                    }
                    _ => {}
                }
            }
            for (id, _) in [values[values.len() - 1], values[next(values.len())]] {
                if !n.graph.inputs.contains(&id) && !n.graph.outputs.contains(&id) {
                    n.output(id);
                }
            }
            n.planned();
        }
    }

    #[test]
    fn buffers_that_live_together_do_not_overlap() {
        let mut seed = 7u64;
        let mut next = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((seed >> 33) % n) as usize
        };
        for _ in 0..50 {
            let lives: Vec<Life> = (0..60)
                .map(|_| {
                    let first = next(40);
                    Life { bytes: next(5000), first, last: first + next(6) }
                })
                .collect();
            let (offsets, total) = place(&lives).unwrap();
            for i in 0..lives.len() {
                assert!(offsets[i] % ALIGN == 0 && offsets[i] + lives[i].bytes <= total);
                for j in 0..i {
                    let (a, b) = (lives[i], lives[j]);
                    let together = a.first <= b.last && b.first <= a.last && a.bytes > 0 && b.bytes > 0;
                    let apart = offsets[i] + a.bytes <= offsets[j] || offsets[j] + b.bytes <= offsets[i];
                    assert!(!together || apart, "buffers {i} and {j}");
                }
            }
            let sum: usize = lives.iter().map(|l| l.bytes.next_multiple_of(ALIGN)).sum();
            assert!(total < sum, "nothing was shared");
        }
    }
}
