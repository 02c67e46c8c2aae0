//! The session: a model that is ready to run, and the memory of its runs.

use crate::analyze::{Folding, analyze};
use crate::error::{Error, ErrorCode, Result};
use crate::execute::Memory;
use crate::fact::{Dim, Fact, Shape};
use crate::graph::{Graph, ValueId};
use crate::import::import;
use crate::onnx::{Limits, Model, Reader};
use crate::ops::if_::If;
use crate::ops::{PackCache, Precision};
use crate::optimize::{Decisions, Known, Specialized, optimize, promote_half, specialize};
use crate::plan::{Place, Plan, plan_for};
use crate::prepack;
use crate::tensor::{DType, Tensor, TensorView};
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;

/// Plans that a session keeps, least recently used first out.
const KEPT_PLANS: usize = 8;

/// Graphs without the branches that certain inputs leave out; as many as plans, since each plan has one.
const KEPT_VARIANTS: usize = KEPT_PLANS;

/// Plans for the same shapes and different elements of flags. Beyond that, what looked like a flag is data.
const MAX_PLANS_BY_FLAG: usize = 4;

/// How much the graph is rewritten before it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Optimize {
    /// Every node of the model runs as it stands.
    None,
    /// All passes.
    #[default]
    All,
}

/// How a session is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Rewriting of the graph.
    pub optimize: Optimize,
    /// Number of threads, the caller's included.
    pub threads: usize,
    /// The instruction set.
    pub isa: Isa,
    /// What kernels may trade for speed.
    pub precision: Precision,
}

impl Default for Options {
    fn default() -> Self {
        Options { optimize: Optimize::All, threads: 1, isa: Isa::best(), precision: Precision::Fast }
    }
}

/// Name, element type and shape of an input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct ValueInfo {
    /// The model's name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape; `None` when not even the rank is known.
    pub shape: Option<Shape>,
}

/// What a model is, for people and tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelInfo {
    /// Version of the default operator set; 0 when the model imports none.
    pub opset: i64,
    /// Program that wrote the file.
    pub producer: String,
    /// Operators of the file and how many nodes have each.
    pub operators: BTreeMap<String, usize>,
    /// Nodes that are left after optimisation.
    pub nodes: usize,
    /// Bytes of the constants that are left.
    pub constant_bytes: usize,
}

/// Reads a model as its bytes arrive.
#[derive(Debug)]
pub struct Loader {
    reader: Reader,
    options: Options,
}

impl Loader {
    /// A loader that has seen nothing yet.
    pub fn new(options: Options) -> Self {
        Loader { reader: Reader::new(Limits::default()), options }
    }

    /// Says how long the file will be, if that is known; see [`Reader::expect_len`].
    pub fn expect_len(self, bytes: u64) -> Self {
        Loader { reader: self.reader.expect_len(bytes), options: self.options }
    }

    /// Takes the next bytes, cut anywhere.
    pub fn push(&mut self, chunk: &[u8]) -> Result<()> {
        self.reader.push(chunk)
    }

    /// The model, once all bytes are there. External data has to be resolved before [`Session::new`].
    pub fn finish(self) -> Result<(Model, Options)> {
        Ok((self.reader.finish()?, self.options))
    }
}

/// Runs of fewer scalar operations stay on the caller's lane: a few hundred microseconds of work, which waking the
/// helpers and waiting for them would take longer than it saves.
const MIN_PARALLEL_WORK: u64 = 8 << 20;

/// One entry of a profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// Node name.
    pub node: String,
    /// Operator.
    pub op: String,
    /// Kernel.
    pub kernel: String,
    /// When it began, in milliseconds by the clock that was given.
    pub start: f64,
    /// Milliseconds, by the clock that was given.
    pub ms: f64,
    /// Multiplications and additions; 0 where nobody counts them.
    pub flops: u64,
    /// Bytes of its operands, weights as the graph has them included.
    pub read_bytes: u64,
    /// Bytes of its results.
    pub written_bytes: u64,
}

impl Timing {
    /// Multiplications and additions per nanosecond; `None` where nobody counts them.
    pub fn gflops(&self) -> Option<f64> {
        (self.flops > 0 && self.ms > 0.0).then(|| self.flops as f64 / self.ms / 1e6)
    }
}

struct Cached {
    shapes: Vec<Vec<usize>>,
    /// For inputs that decide shapes, the bytes that the plan was made for.
    contents: Vec<(usize, Vec<u8>)>,
    plan: Arc<Plan>,
}

/// The graph without the branches that certain inputs leave out.
struct Variant {
    decisions: Decisions,
    graph: Arc<Graph>,
}

struct Running {
    plan: Arc<Plan>,
    next: usize,
}

/// A model that is ready to run.
///
/// A run goes in steps, so that the caller can stop in between: [`begin`](Self::begin), [`advance`](Self::advance)
/// until it says that all is done, then [`output`](Self::output). [`run`](Self::run) does all three.
pub struct Session {
    graph: Arc<Graph>,
    variants: Vec<Variant>,
    /// The same before they were optimised.
    known: Known,
    /// What the model says of its inputs.
    declared: Vec<Fact>,
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
    info: ModelInfo,
    options: Options,
    pool: Arc<Pool>,
    packed: PackCache,
    plans: Vec<Cached>,
    memory: Memory,
    /// What the inputs are in the run that was begun last.
    given: Vec<Option<Arc<Tensor>>>,
    /// They are copies, to be written again.
    copied: bool,
    running: Option<Running>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("inputs", &self.inputs).field("outputs", &self.outputs).finish_non_exhaustive()
    }
}

impl Session {
    /// Imports, checks and optimises a model.
    pub fn new(model: Model, options: Options) -> Result<Self> {
        let pool = Arc::new(Pool::new(options.threads.max(1)));
        Session::with_pool(model, options, pool)
    }

    /// The same, on threads that several sessions share.
    pub fn with_pool(model: Model, options: Options, pool: Arc<Pool>) -> Result<Self> {
        let mut info = ModelInfo {
            opset: model.opset("").unwrap_or(0),
            producer: model.producer_name.clone(),
            operators: count_operators(&model.graph),
            ..ModelInfo::default()
        };
        let graph = import(model)?;
        let declared = graph
            .inputs
            .iter()
            .map(|&id| {
                let value = graph.value(id);
                value.declared.clone().ok_or_else(|| {
                    Error::invalid_model(format!("the input \"{}\" has no element type in the model", value.name))
                })
            })
            .collect::<Result<Vec<Fact>>>()?;
        let isa = options.isa;
        let packed = PackCache::new(options.precision);
        let (graph, output_facts, constant_bytes) = pool.run(isa, |cx| -> Result<_> {
            let facts = analyze(&graph, &declared, cx, Folding { max_bytes: 0 })?;
            let output_facts: Vec<_> = graph.outputs.iter().map(|o| facts[o.index()].clone()).collect();
            let graph = promote_half(graph, &facts)?;
            // They hold on to constants.
            drop(facts);
            let mut graph = match options.optimize {
                Optimize::None => graph,
                Optimize::All => optimize(graph, &declared, true, cx)?,
            };
            let constant_bytes = constant_bytes(&graph);
            // A branch may take the place of its If when a plan is made, and that wants the elements of constants.
            if !graph.nodes.iter().any(|n| n.op.is::<If>()) {
                prepack::run(&mut graph, &declared, &packed, cx)?;
            }
            Ok((graph, output_facts, constant_bytes))
        })?;
        let describe = |id: &ValueId, fact: &Fact| ValueInfo {
            name: graph.value(*id).name.clone(),
            dtype: fact.dtype,
            shape: fact.shape.clone(),
        };
        let inputs: Vec<_> = graph.inputs.iter().zip(&declared).map(|(id, f)| describe(id, f)).collect();
        let mut outputs = Vec::with_capacity(graph.outputs.len());
        for (id, found) in graph.outputs.iter().zip(&output_facts) {
            let declared = graph.value(*id).declared.as_ref();
            // What the model says of a shape has names for sizes, which inference may not find.
            let fact = match (found, declared) {
                (Some(f), Some(d)) if d.rank() == f.rank() && f.dims().is_none() => d,
                (Some(f), _) => f,
                (None, Some(d)) => d,
                (None, None) => return Err(Error::invalid_model("an output has no element type")),
            };
            outputs.push(describe(id, fact));
        }
        info.nodes = graph.nodes.len();
        info.constant_bytes = constant_bytes;
        Ok(Session {
            graph: Arc::new(graph),
            variants: Vec::new(),
            known: Known::default(),
            declared,
            inputs,
            outputs,
            info,
            options,
            pool,
            packed,
            plans: Vec::new(),
            memory: Memory::default(),
            given: Vec::new(),
            copied: true,
            running: None,
        })
    }

    /// From the bytes of a file.
    pub fn from_bytes(bytes: &[u8], options: Options) -> Result<Self> {
        Session::new(Model::parse(bytes)?, options)
    }

    /// What a run wants.
    pub fn inputs(&self) -> &[ValueInfo] {
        &self.inputs
    }

    /// What a run gives.
    pub fn outputs(&self) -> &[ValueInfo] {
        &self.outputs
    }

    /// What the model is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// How the session was made.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The graph as it runs.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Bytes that the intermediate values of the largest run so far took.
    pub fn arena_bytes(&self) -> usize {
        self.memory.arena_bytes()
    }

    /// The threads.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Checks the inputs, copies them, and makes a run ready. A run that is under way is given up.
    pub fn begin(&mut self, feeds: &[(&str, TensorView)]) -> Result<()> {
        self.running = None;
        self.check_names(feeds)?;
        self.check_shapes(feeds)?;
        if !std::mem::replace(&mut self.copied, true) {
            self.given.clear();
        }
        self.given.resize(self.inputs.len(), None);
        for (slot, info) in self.given.iter_mut().zip(&self.inputs) {
            let view = feed(feeds, &info.name)?;
            let own = slot.as_mut().and_then(Arc::get_mut);
            match own.filter(|t| t.dtype() == view.dtype && t.dims() == view.dims && view.strings().is_none()) {
                Some(t) => t.bytes_mut().copy_from_slice(view.bytes()),
                None => *slot = Some(Arc::new(view.to_tensor()?)),
            }
        }
        self.begin_given()
    }

    /// The same without copies: the run reads the tensors that it is given, and holds them until the next one begins or
    /// [`end`](Self::end).
    pub fn begin_with(&mut self, feeds: &[(&str, Arc<Tensor>)]) -> Result<()> {
        self.running = None;
        let views: SmallVec<[(&str, TensorView); 16]> = feeds.iter().map(|(name, t)| (*name, t.view())).collect();
        self.check_names(&views)?;
        self.check_shapes(&views)?;
        self.copied = false;
        self.given.clear();
        self.given.extend(self.inputs.iter().map(|i| feeds.iter().find(|(n, _)| *n == i.name).map(|(_, t)| t.clone())));
        self.begin_given()
    }

    fn begin_given(&mut self) -> Result<()> {
        let given = std::mem::take(&mut self.given);
        let made = self.make_ready(&views(&given));
        self.given = given;
        self.running = Some(Running { plan: made?, next: 0 });
        Ok(())
    }

    fn make_ready(&mut self, inputs: &[TensorView]) -> Result<Arc<Plan>> {
        let plan = match self.cached(inputs) {
            Some(plan) => plan,
            None => self.new_plan(inputs)?,
        };
        self.memory.fit(&plan, inputs)?;
        Ok(plan)
    }

    /// The run is over, complete or not: its outputs are gone, and inputs that were given to it are let go. Those that nobody
    /// else holds are where results of the next run will be.
    pub fn end(&mut self) {
        self.running = None;
        if !self.copied {
            self.memory.recycle(self.given.drain(..).flatten().filter_map(Arc::into_inner));
        }
    }

    /// Whether the run that was begun takes well below a millisecond, so that there is no point in pausing it.
    pub fn is_brief(&self) -> bool {
        self.running.as_ref().is_some_and(|r| r.plan.work.is_some_and(|work| work < MIN_PARALLEL_WORK))
    }

    /// Runs steps until `pause` says so, asked before each step with the number of steps done and of all steps.
    /// Returns whether the run is complete. After an error the run is over and the session can begin another.
    pub fn advance(&mut self, pause: impl FnMut(usize, usize) -> bool) -> Result<bool> {
        self.advance_timed(pause, None, &mut Vec::new())
    }

    /// The same, with one entry per step appended to `profile`; `clock` gives milliseconds.
    pub fn advance_timed(
        &mut self,
        mut pause: impl FnMut(usize, usize) -> bool,
        clock: Option<&dyn Fn() -> f64>,
        profile: &mut Vec<Timing>,
    ) -> Result<bool> {
        let Some(running) = &mut self.running else {
            return Err(Error::internal("no run was begun"));
        };
        let plan = running.plan.clone();
        let inputs = views(&self.given);
        let memory = &mut self.memory;
        let first = running.next;
        let lanes = if plan.work.is_some_and(|work| work < MIN_PARALLEL_WORK) { 1 } else { usize::MAX };
        let (next, result) = self.pool.run_on(lanes, self.options.isa, |cx| {
            for (i, step) in plan.steps.iter().enumerate().skip(first) {
                if pause(i, plan.steps.len()) {
                    return (i, Ok(()));
                }
                let start = clock.map(|c| (memory.bytes_of(&plan, step.inputs.iter().flatten().copied()), c()));
                if let Err(e) = memory.run_step(&plan, &inputs, step, cx) {
                    return (i, Err(e));
                }
                if cx.cancelled() {
                    return (i, Err(Error::new(ErrorCode::Aborted, "the run was stopped")));
                }
                if let (Some((read_bytes, start)), Some(clock)) = (start, clock) {
                    let ms = clock() - start;
                    profile.push(Timing {
                        node: step.node.name.clone(),
                        op: step.node.op.name().to_owned(),
                        kernel: step.compute.as_ref().map_or_else(String::new, |c| c.kernel().to_owned()),
                        start,
                        ms,
                        flops: step.compute.as_ref().map_or(0, |c| c.flops()),
                        read_bytes,
                        written_bytes: memory.bytes_of(&plan, step.outputs.iter().copied()),
                    });
                }
            }
            (plan.steps.len(), Ok(()))
        });
        if let Err(e) = result {
            self.running = None;
            return Err(e);
        }
        running.next = next;
        Ok(next == plan.steps.len())
    }

    /// An output of the run that is complete.
    pub fn output(&self, i: usize) -> Result<TensorView<'_>> {
        let (plan, value) = self.planned_output(i)?;
        self.memory.view(plan, &views(&self.given), value)
    }

    /// An output of the run that is complete, to keep: in most cases without a copy. One that is an input as it stands, such as
    /// the caches that a decoder has of its encoder's output, is that input's tensor: the caller must not write it any more.
    pub fn keep(&self, i: usize) -> Result<Arc<Tensor>> {
        let (plan, value) = self.planned_output(i)?;
        let planned = &plan.values[value];
        if let Place::Input(input, range) = &planned.place
            && let Some(given) = &self.given[*input]
            && given.bytes().len() == range.len()
            && given.dims() == planned.dims.as_slice()
        {
            return Ok(given.clone());
        }
        self.memory.keep(plan, &views(&self.given), value)
    }

    fn planned_output(&self, i: usize) -> Result<(&Arc<Plan>, usize)> {
        let running = self.running.as_ref().ok_or_else(|| Error::internal("no run was begun"))?;
        if running.next < running.plan.steps.len() {
            return Err(Error::internal("the run is not complete"));
        }
        let value = running.plan.outputs.get(i);
        let value = value.ok_or_else(|| Error::new(ErrorCode::UnknownInput, format!("the model has no output {i}")))?;
        Ok((&running.plan, *value))
    }

    /// A whole run; the outputs are in the order of [`outputs`](Self::outputs).
    pub fn run(&mut self, feeds: &[(&str, TensorView)]) -> Result<Vec<Tensor>> {
        self.begin(feeds)?;
        self.advance(|_, _| false)?;
        (0..self.outputs.len()).map(|i| self.output(i)?.to_tensor()).collect()
    }

    fn check_names(&self, feeds: &[(&str, TensorView)]) -> Result<()> {
        let known = || self.inputs.iter().map(|i| i.name.as_str()).collect::<Vec<_>>().join("\", \"");
        for (i, (name, _)) in feeds.iter().enumerate() {
            if !self.inputs.iter().any(|info| info.name == *name) {
                let message = format!("the model has no input \"{name}\"; its inputs are \"{}\"", known());
                return Err(Error::new(ErrorCode::UnknownInput, message));
            }
            if feeds[..i].iter().any(|(other, _)| other == name) {
                return Err(Error::invalid_input(format!("the input \"{name}\" is given twice")));
            }
        }
        self.inputs.iter().try_for_each(|info| feed(feeds, &info.name).map(|_| ()))
    }

    fn check_shapes(&self, feeds: &[(&str, TensorView)]) -> Result<()> {
        let mut symbols: SmallVec<[(&Arc<str>, usize, &str); 8]> = SmallVec::new();
        for info in &self.inputs {
            let view = feed(feeds, &info.name)?;
            let name = &info.name;
            if view.dtype != info.dtype {
                let message = format!("the input \"{name}\" is {}; {} was wanted", view.dtype, info.dtype);
                return Err(Error::dtype(message));
            }
            let Some(shape) = &info.shape else { continue };
            // Exporters declare a scalar and callers give a list of one, or the other way round; both are one element.
            if view.len() == 1 && (shape.is_empty() || view.dims.is_empty() && shape.len() == 1) {
                continue;
            }
            let wanted = || shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", ");
            let wrong = || {
                let message = format!("the input \"{name}\" has shape {:?}; [{}] was wanted", view.dims, wanted());
                Error::shape(message)
            };
            if view.rank() != shape.len() {
                return Err(wrong());
            }
            for (&size, dim) in view.dims.iter().zip(shape) {
                match dim {
                    Dim::Known(n) if *n != size => return Err(wrong()),
                    Dim::Symbol(s) => match symbols.iter().find(|(name, ..)| *name == s) {
                        Some((_, other, first)) if *other != size => {
                            return Err(Error::shape(format!(
                                "\"{s}\" is {other} in the input \"{first}\" and {size} in \"{name}\"; both must be equal"
                            )));
                        }
                        Some(_) => {}
                        None => symbols.push((s, size, name)),
                    },
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn cached(&mut self, inputs: &[TensorView]) -> Option<Arc<Plan>> {
        let fits = |c: &Cached| {
            inputs.iter().zip(&c.shapes).all(|(view, dims)| view.dims == dims.as_slice())
                && c.contents.iter().all(|(i, bytes)| inputs[*i].bytes() == bytes.as_slice())
        };
        // A plan for certain elements before one for any.
        let fitting = (0..self.plans.len()).filter(|&i| fits(&self.plans[i]));
        let at = fitting.max_by_key(|&i| self.plans[i].contents.len())?;
        self.plans[at..].rotate_left(1);
        self.plans.last().map(|c| c.plan.clone())
    }

    /// The graph to plan for these inputs, and the inputs whose elements chose it.
    fn variant(&mut self, inputs: &[TensorView], use_flags: bool) -> Result<(Arc<Graph>, Vec<usize>)> {
        if self.options.optimize == Optimize::None {
            return Ok((self.graph.clone(), Vec::new()));
        }
        let (isa, graph, declared) = (self.options.isa, self.graph.clone(), &self.declared);
        let known = &mut self.known;
        let found = self.pool.run(isa, |cx| specialize(&graph, inputs, use_flags, known, cx))?;
        let Some(Specialized { graph: decided, decisions, flags }) = found else { return Ok((graph, Vec::new())) };
        if let Some(known) = self.variants.iter().find(|v| v.decisions == decisions) {
            return Ok((known.graph.clone(), flags));
        }
        // What does not fit the declared shapes may still fit these; else planning says what is wrong.
        let rewritten = self.pool.run(isa, |cx| optimize(Graph::clone(&decided), declared, false, cx));
        let decided = rewritten.map_or(decided, Arc::new);
        if self.variants.len() == KEPT_VARIANTS {
            self.variants.remove(0);
            self.packed.forget_dead();
        }
        self.variants.push(Variant { decisions, graph: decided.clone() });
        Ok((decided, flags))
    }

    fn new_plan(&mut self, inputs: &[TensorView]) -> Result<Arc<Plan>> {
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|v| v.dims.to_vec()).collect();
        let by_flag = self.plans.iter().filter(|c| c.shapes == shapes && !c.contents.is_empty()).count();
        let (graph, mut fixed) = self.variant(inputs, by_flag < MAX_PLANS_BY_FLAG)?;
        let packed = &self.packed;
        let (made, more) = self.pool.run(self.options.isa, |cx| plan_for(&graph, inputs, packed, cx))?;
        fixed.extend(more.into_iter().filter(|i| !fixed.contains(i)).collect::<Vec<_>>());
        let contents = fixed.into_iter().map(|i| (i, inputs[i].bytes().to_vec())).collect();
        let made = Arc::new(made);
        if self.plans.len() == KEPT_PLANS {
            self.plans.remove(0);
        }
        self.plans.push(Cached { shapes, contents, plan: made.clone() });
        Ok(made)
    }
}

/// The inputs of a run that was begun: all of them are there.
fn views(given: &[Option<Arc<Tensor>>]) -> SmallVec<[TensorView<'_>; 16]> {
    given.iter().flatten().map(|t| t.view()).collect()
}

fn feed<'a, 'b>(feeds: &'b [(&str, TensorView<'a>)], name: &str) -> Result<&'b TensorView<'a>> {
    feeds
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, v)| v)
        .ok_or_else(|| Error::new(ErrorCode::MissingInput, format!("the input \"{name}\" is missing")))
}

/// Bytes of the constants of a graph and of the bodies in it; one that several bodies share counts once.
fn constant_bytes(graph: &Graph) -> usize {
    let mut seen = std::collections::HashSet::new();
    let mut graphs = vec![graph];
    let mut bytes = 0;
    while let Some(g) = graphs.pop() {
        let constants = g.values.iter().filter_map(|v| v.constant.as_ref());
        bytes += constants.filter(|t| seen.insert(Arc::as_ptr(t))).map(|t| t.bytes().len()).sum::<usize>();
        graphs.extend(g.nodes.iter().flat_map(|n| n.op.bodies()));
    }
    bytes
}

fn count_operators(graph: &crate::onnx::Graph) -> BTreeMap<String, usize> {
    let mut counts = HashMap::new();
    let mut graphs = vec![graph];
    while let Some(g) = graphs.pop() {
        for node in &g.nodes {
            let name = if node.domain.is_empty() || node.domain == "ai.onnx" {
                node.op_type.clone()
            } else {
                format!("{}.{}", node.domain, node.op_type)
            };
            *counts.entry(name).or_insert(0) += 1;
            graphs.extend(node.attributes.iter().filter_map(|a| match &a.value {
                crate::onnx::AttributeValue::Graph(g) => Some(&**g),
                _ => None,
            }));
        }
    }
    counts.into_iter().collect()
}
