//! The quantiser: from a float model to a smaller and faster one, as an `.onnx` file that any runtime reads.
//!
//! ```text
//! samples ──► calibrate ──► ranges ─┐
//!                                   ▼
//! Model ──► prepare ──► one node after the other ──► Model ──► compare with the float model ──► Report
//! ```
//!
//! It works on the structs of the file format ([`crate::onnx`]), so that names, attributes and metadata stay as they
//! are. A weight is replaced before the next one is looked at: beside the model there is one float copy of one tensor.
//! With samples there is also a session of the float model. Bodies of `If`, `Loop` and `Scan` stay as they are, except
//! that [`Mode::Float32`] converts them too.

mod calibrate;
mod dynamic;
mod edit;
mod float16;
mod opset;
mod product;
mod qdq;
mod report;
mod skip;
mod weight_only;
mod weights;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use calibrate::Method;
pub use report::{NodeReport, OutputReport, Report, Skipped};

use crate::error::{Error, ErrorCode, Result};
use crate::onnx::{Model, Node};
use crate::session::{self, Session};
use crate::tensor::{Tensor, TensorView};
use calibrate::Calibration;
use edit::Editor;
use report::Comparison;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use weblane_kernels::par::Pool;

/// What the model becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Products by constant weights in 8 bits; activations are quantised as they come. Needs no samples.
    #[default]
    Dynamic,
    /// 8-bit operators between QuantizeLinear and DequantizeLinear, with ranges from samples.
    Static,
    /// Weights of products in blocks of 4-bit numbers, activations float: `com.microsoft.MatMulNBits`.
    Int4,
    /// The same with 8-bit numbers.
    Int8Weights,
    /// Half precision.
    Float16,
    /// Half precision back to single.
    Float32,
}

/// How a model is quantised.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct QuantizeOptions {
    /// What the model becomes.
    pub mode: Mode,
    /// Nodes that stay as they are, by name or by a pattern with `*` and `?`.
    pub skip_nodes: Vec<String>,
    /// Operators that stay as they are, in the same way; those of other domains as `domain.Name`.
    pub skip_ops: Vec<String>,
    /// Dynamic and static: one scale per column or output channel of weights instead of one per tensor.
    pub per_channel: bool,
    /// Dynamic and static: weights of 7 bits, for runtimes whose sums of 8-bit products saturate.
    pub reduce_range: bool,
    /// Dynamic, int4 and int8-weights: tables that Gather reads become 8-bit too.
    pub embeddings: bool,
    /// Int4 and int8-weights: weights that share a scale, a power of two from 16 to 256.
    pub block_size: usize,
    /// Int4 and int8-weights: no zero points.
    pub symmetric: bool,
    /// Int4 and int8-weights: how exact the runtime has to be; 0 leaves it the choice, 1 is float32, 4 is int8.
    pub accuracy_level: i64,
    /// Static: how ranges follow from samples.
    pub method: Method,
    /// Static, with the percentile method: percentage of values inside of the range.
    pub percentile: f64,
    /// Static: int8 instead of uint8 activations.
    pub signed_activations: bool,
    /// Float16: inputs and outputs of the model stay `float32`.
    pub keep_io: bool,
    /// Samples on which the result is compared with the float model; all when absent.
    pub compare: Option<usize>,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        QuantizeOptions {
            mode: Mode::Dynamic,
            skip_nodes: Vec::new(),
            skip_ops: Vec::new(),
            per_channel: true,
            reduce_range: false,
            embeddings: true,
            block_size: 32,
            symmetric: true,
            accuracy_level: 0,
            method: Method::MinMax,
            percentile: 99.99,
            signed_activations: false,
            keep_io: true,
            compare: None,
        }
    }
}

impl QuantizeOptions {
    fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::new(ErrorCode::InvalidOption, message));
        if !(16..=256).contains(&self.block_size) || !self.block_size.is_power_of_two() {
            return wrong(format!("the block size is {}; a power of two from 16 to 256 was wanted", self.block_size));
        }
        if !(0..=4).contains(&self.accuracy_level) {
            return wrong(format!("the accuracy level is {}; 0 to 4 was wanted", self.accuracy_level));
        }
        if !(self.percentile > 50.0 && self.percentile <= 100.0) {
            return wrong(format!("the percentile is {}; more than 50 and at most 100 was wanted", self.percentile));
        }
        Ok(())
    }
}

/// The inputs of one run of the float model, by name.
pub type Sample = Vec<(String, Tensor)>;

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The float model runs on samples.
    Calibrate,
    /// Nodes are rewritten.
    Quantize,
    /// Both models run on samples.
    Compare,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// What is going on.
    pub stage: Stage,
    /// Samples or nodes done in this stage.
    pub done: usize,
    /// Of how many.
    pub total: usize,
}

/// One way of rewriting nodes.
trait Rewrite {
    /// Puts the node, or what takes its place, into the new graph.
    fn node(&mut self, e: &mut Editor, node: Node) -> Result<()>;
}

enum State {
    Calibrating { calibration: Box<Calibration>, next: usize },
    Rewriting { editor: Box<Editor>, rewrite: Box<dyn Rewrite>, nodes: std::vec::IntoIter<Node>, total: usize },
    Comparing { comparison: Box<Comparison>, next: usize },
    Done,
}

/// A model on its way, in steps, so that the caller can report progress or stop in between.
pub struct Quantizer {
    options: QuantizeOptions,
    engine: session::Options,
    pool: Arc<Pool>,
    model: Model,
    samples: Vec<Sample>,
    /// The float model, when there are samples; after calibration it also gives the values between nodes.
    float: Option<Session>,
    state: State,
    report: Report,
}

impl std::fmt::Debug for Quantizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Quantizer").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Quantizer {
    /// Checks the options and makes everything ready. External data has to be resolved before.
    ///
    /// # Errors
    /// `InvalidOption` for options, `MissingInput` when samples are needed and there are none, and what the engine
    /// says of the model.
    pub fn new(
        mut model: Model,
        options: QuantizeOptions,
        samples: Vec<Sample>,
        engine: session::Options,
        pool: Arc<Pool>,
    ) -> Result<Self> {
        options.check()?;
        if options.mode == Mode::Static && samples.is_empty() {
            return Err(Error::new(
                ErrorCode::MissingInput,
                "static quantisation takes the ranges of values from samples; give at least one",
            ));
        }
        let mut report = Report { mode: options.mode, bytes_before: model.byte_len(), ..Report::default() };
        edit::constants_to_initializers(&mut model.graph)?;
        skip::check(&options, &model.graph)?;
        match options.mode {
            Mode::Float32 => {}
            Mode::Float16 => edit::set_ir(&mut model),
            Mode::Static => opset::raise(&mut model, 13)?,
            Mode::Dynamic => opset::raise(&mut model, if options.embeddings { 13 } else { 11 })?,
            Mode::Int4 | Mode::Int8Weights => {
                opset::raise(&mut model, if options.embeddings { 13 } else { 11 })?;
                edit::import_microsoft(&mut model);
            }
        }
        if options.mode == Mode::Static {
            qdq::fold_batch_norm(&mut model.graph, &options)?;
        }
        let mut float = None;
        let mut state = None;
        if options.mode == Mode::Static {
            let calibration = Calibration::new(&model, qdq::observed(&model.graph, &options), &options)?;
            let observing = edit::with_outputs(model.clone(), calibration.names());
            float = Some(Session::with_pool(observing, engine.clone(), pool.clone())?);
            state = Some(State::Calibrating { calibration: Box::new(calibration), next: 0 });
        } else if !samples.is_empty() {
            float = Some(Session::with_pool(model.clone(), engine.clone(), pool.clone())?);
        }
        report.samples = samples.len();
        let mut quantizer = Quantizer { options, engine, pool, model, samples, float, state: State::Done, report };
        quantizer.state = match state {
            Some(state) => state,
            None => quantizer.rewriting(None)?,
        };
        Ok(quantizer)
    }

    fn rewriting(&mut self, calibration: Option<Calibration>) -> Result<State> {
        let o = &self.options;
        let rewrite: Box<dyn Rewrite> = match o.mode {
            Mode::Dynamic => Box::new(dynamic::Dynamic::new(o)),
            Mode::Int4 | Mode::Int8Weights => Box::new(weight_only::WeightOnly::new(o)),
            Mode::Static => {
                let calibration = calibration.ok_or_else(|| Error::internal("no ranges"))?;
                Box::new(qdq::Qdq::new(&mut self.model.graph, o, &calibration)?)
            }
            Mode::Float16 => Box::new(float16::Half::new(&mut self.model, o)?),
            Mode::Float32 => {
                float16::to_float32(&mut self.model, &mut self.report)?;
                Box::new(float16::Keep)
            }
        };
        let mut editor = Editor::new(&mut self.model.graph, o)?;
        let nodes = std::mem::take(&mut self.model.graph.nodes);
        if let Mode::Static | Mode::Float16 = o.mode {
            // Values that come from outside are converted before the first node.
            let none = Node { op_type: edit::BEGIN.into(), ..Node::default() };
            let mut all = vec![none];
            all.extend(nodes);
            let total = all.len();
            editor.nodes.reserve(total);
            return Ok(State::Rewriting { editor: Box::new(editor), rewrite, nodes: all.into_iter(), total });
        }
        let total = nodes.len();
        Ok(State::Rewriting { editor: Box::new(editor), rewrite, nodes: nodes.into_iter(), total })
    }

    /// One run of a sample, or the rewriting of one node. Returns whether all is done.
    ///
    /// # Errors
    /// Name the node and the operator. After an error the quantiser is of no more use.
    pub fn step(&mut self) -> Result<bool> {
        match std::mem::replace(&mut self.state, State::Done) {
            State::Calibrating { mut calibration, mut next } => {
                let count = self.samples.len();
                let session = self.float.as_mut().ok_or_else(|| Error::internal("no float model"))?;
                let sample = &self.samples[next % count];
                let outputs = session.run(&views(sample)).map_err(|e| of_sample(e, next % count))?;
                let names = session.outputs().iter().map(|o| o.name.as_str());
                calibration.observe(names.zip(&outputs), sample, next >= count)?;
                next += 1;
                self.state = if next < calibration.passes() * count {
                    State::Calibrating { calibration, next }
                } else {
                    self.rewriting(Some(*calibration))?
                };
            }
            State::Rewriting { mut editor, mut rewrite, mut nodes, total } => match nodes.next() {
                Some(node) => {
                    let (name, op) = (edit::label(&node).to_owned(), edit::full_op(&node));
                    rewrite.node(&mut editor, node).map_err(|e| e.at(&name, &op))?;
                    self.state = State::Rewriting { editor, rewrite, nodes, total };
                }
                None => {
                    editor.finish(&mut self.model.graph, &mut self.report);
                    self.report.bytes_after = self.model.byte_len();
                    if let Some(float) = self.float.take() {
                        let (engine, pool) = (self.engine.clone(), self.pool.clone());
                        let comparison = Comparison::new(float, &self.model, &self.report, engine, pool)?;
                        self.state = State::Comparing { comparison: Box::new(comparison), next: 0 };
                    }
                }
            },
            State::Comparing { mut comparison, next } if next < self.compared() => {
                comparison.run(&views(&self.samples[next])).map_err(|e| of_sample(e, next))?;
                self.state = State::Comparing { comparison, next: next + 1 };
            }
            State::Comparing { comparison, .. } => comparison.finish(&mut self.report),
            State::Done => {}
        }
        Ok(matches!(self.state, State::Done))
    }

    fn compared(&self) -> usize {
        self.samples.len().min(self.options.compare.unwrap_or(usize::MAX))
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        match &self.state {
            State::Calibrating { calibration, next } => {
                Progress { stage: Stage::Calibrate, done: *next, total: calibration.passes() * self.samples.len() }
            }
            State::Rewriting { nodes, total, .. } => {
                Progress { stage: Stage::Quantize, done: total - nodes.len(), total: *total }
            }
            State::Comparing { next, .. } => Progress { stage: Stage::Compare, done: *next, total: self.compared() },
            State::Done => {
                let total = self.compared();
                Progress { stage: Stage::Compare, done: total, total }
            }
        }
    }

    /// The new model and what became of it, once [`step`](Self::step) has said that all is done.
    pub fn finish(self) -> Result<(Model, Report)> {
        match self.state {
            State::Done => Ok((self.model, self.report)),
            _ => Err(Error::internal("the model is not quantised yet")),
        }
    }
}

/// The inputs that samples of a model give values for.
///
/// # Errors
/// `InvalidModel` when an input has no element type.
pub fn inputs(model: &Model) -> Result<Vec<session::ValueInfo>> {
    let graph = &model.graph;
    let constant = |name: &str| graph.initializers.iter().any(|t| t.name == name);
    let wanted = graph.inputs.iter().filter(|i| !constant(&i.name));
    wanted
        .map(|info| {
            let fact = crate::import::declared(info)?.ok_or_else(|| {
                Error::invalid_model(format!("the input \"{}\" has no element type in the model", info.name))
            })?;
            Ok(session::ValueInfo { name: info.name.clone(), dtype: fact.dtype, shape: fact.shape })
        })
        .collect()
}

fn views(sample: &Sample) -> Vec<(&str, TensorView<'_>)> {
    sample.iter().map(|(name, t)| (name.as_str(), t.view())).collect()
}

fn of_sample(mut e: Error, i: usize) -> Error {
    e.message = format!("sample {i}: {}", e.message);
    e
}

/// Quantises a model in one go.
///
/// `proceed` is asked before every step; false ends it with `Aborted`.
pub fn quantize(
    model: Model,
    options: QuantizeOptions,
    samples: Vec<Sample>,
    engine: session::Options,
    proceed: &mut dyn FnMut(Progress) -> bool,
) -> Result<(Model, Report)> {
    let pool = Arc::new(Pool::new(engine.threads.max(1)));
    let mut quantizer = Quantizer::new(model, options, samples, engine, pool)?;
    loop {
        if !proceed(quantizer.progress()) {
            return Err(Error::new(ErrorCode::Aborted, "the quantisation was stopped"));
        }
        if quantizer.step()? {
            return quantizer.finish();
        }
    }
}
