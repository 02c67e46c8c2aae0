//! The WebAssembly surface of weblane: what the worker of the npm package calls. No logic lives here.
//!
//! `npm/src/wasm.ts` describes the same surface for TypeScript. Methods throw `{ code, message, node, op }`; a panic or
//! a refused allocation ends in a trap, and [`last_failure`] says afterwards what it was.

mod external;
mod failure;
mod quantize;

use external::Externals;
use failure::Failure;
use serde::{Deserialize, Serialize};
use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use wasm_bindgen::prelude::*;
use weblane_engine::fact::Dim;
use weblane_engine::session::{Optimize, Timing, ValueInfo};
use weblane_engine::{DType, Error, ErrorCode, Loader, Options, Precision, Session, Tensor, TensorView};
use weblane_kernels::int8;
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;

#[cfg(feature = "threads")]
pub use wasm_bindgen_rayon::init_thread_pool;

thread_local! {
    // One per module: its helpers occupy the workers of the global rayon pool, and all sessions share it.
    static POOL: OnceCell<Arc<Pool>> = const { OnceCell::new() };
    // Outputs that the page wants to stay here, by number. Any session may take them as inputs.
    static KEPT: RefCell<Kept> = const { RefCell::new(Kept { last: 0, tensors: Vec::new() }) };
}

struct Kept {
    last: u32,
    tensors: Vec<(u32, Arc<Tensor>)>,
}

fn kept(id: u32) -> Result<Arc<Tensor>, JsValue> {
    let found = KEPT.with_borrow(|kept| kept.tensors.iter().find(|(known, _)| *known == id).map(|(_, t)| t.clone()));
    found.ok_or_else(|| throw(Error::invalid_input("the tensor is not in the engine any more")))
}

/// What a tensor that was kept is and where it lies; its address holds until the next call.
#[wasm_bindgen(js_name = readKept)]
pub fn read_kept(id: u32) -> Result<JsValue, JsValue> {
    describe_output("", &kept(id)?.view())
}

/// Lets go of a tensor that was kept, if it is still there.
#[wasm_bindgen(js_name = releaseKept)]
pub fn release_kept(id: u32) {
    KEPT.with_borrow_mut(|kept| kept.tensors.retain(|(known, _)| *known != id));
}

fn pool() -> Arc<Pool> {
    POOL.with(|pool| pool.get_or_init(|| Arc::new(Pool::new(1))).clone())
}

/// Runs once in the engine's worker and in every worker of the pool.
#[wasm_bindgen(start)]
pub fn on_load() {
    failure::install_hook();
}

/// Makes the pool, whose other lanes come with [`start_helpers`]. Returns how many lanes there are.
#[wasm_bindgen(js_name = startPool)]
pub fn start_pool(threads: usize) -> usize {
    POOL.with(|pool| pool.get_or_init(|| Arc::new(Pool::without_helpers(threads))).threads())
}

/// Has the workers that `initThreadPool(threads - 1)` started join the pool. Once, and after [`start_pool`].
#[wasm_bindgen(js_name = startHelpers)]
pub fn start_helpers() {
    pool().start_helpers();
}

/// Address of the word that stops the nodes under way when the page sets it. It may be set only while the word at
/// [`running_word`] is 1: elsewhere a stop would leave work undone that outlasts the run, such as packing weights.
#[wasm_bindgen(js_name = stopWord)]
pub fn stop_word() -> usize {
    pool().cancel_flag().as_ptr() as usize
}

/// Address of the word that is 1 while [`WasmSession::advance`] executes nodes.
#[wasm_bindgen(js_name = runningWord)]
pub fn running_word() -> usize {
    RUNNING.as_ptr() as usize
}

static RUNNING: AtomicU32 = AtomicU32::new(0);

/// Version of this build.
#[wasm_bindgen]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

/// For tests: the digest of the integer kernels with a form of the dot product (`i16`, `u8s8 split`, `u8s8`, `s8s8`),
/// which has to be the same in every engine; 0 if the form is not exact here.
#[wasm_bindgen(js_name = int8Digest)]
pub fn int8_digest(form: usize) -> u64 {
    let digest = |form: &int8::Form| Pool::new(1).run(Isa::best(), |cx| int8::digest(cx, *form)).unwrap_or(0);
    int8::Form::ALL.get(form).map_or(0, digest)
}

/// What the panic or the refused allocation before a trap was; `undefined` when there was none.
#[wasm_bindgen(js_name = lastFailure)]
pub fn last_failure() -> Result<JsValue, JsValue> {
    failure::last().map_or(Ok(JsValue::UNDEFINED), |failure| to_js(&failure))
}

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = performance)]
    fn now() -> f64;
}

/// Maps become plain objects, as JavaScript code expects of metadata.
fn to_js<T: Serialize>(value: &T) -> Result<JsValue, JsValue> {
    value.serialize(&serde_wasm_bindgen::Serializer::json_compatible()).map_err(|e| JsValue::from_str(&e.to_string()))
}

fn throw(error: Error) -> JsValue {
    failure::forget_refused_allocation();
    to_js(&Failure::from(error)).unwrap_or_else(|e| e)
}

/// See `EngineOptions` in `npm/src/protocol.ts`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct JsOptions {
    optimize: String,
    precision: String,
}

/// See `ValueInfo` in `npm/src/protocol.ts`.
#[derive(Serialize)]
struct JsValueInfo<'a> {
    name: &'a str,
    r#type: &'static str,
    dims: Vec<JsDim<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum JsDim<'a> {
    Size(usize),
    Name(&'a str),
}

/// See `ModelInfo` in `npm/src/protocol.ts`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsModelInfo<'a> {
    inputs: Vec<JsValueInfo<'a>>,
    outputs: Vec<JsValueInfo<'a>>,
    opset: f64,
    producer: &'a str,
    operators: &'a BTreeMap<String, usize>,
    nodes: usize,
    weight_bytes: f64,
}

/// See `NodeTiming` in `npm/src/protocol.ts`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsTiming<'a> {
    node: &'a str,
    op: &'a str,
    kernel: &'a str,
    start_ms: f64,
    ms: f64,
    flops: f64,
    read_bytes: f64,
    written_bytes: f64,
}

/// See `WasmOutput` in `npm/src/wasm.ts`.
#[derive(Serialize)]
struct JsOutput<'a> {
    name: &'a str,
    r#type: &'static str,
    dims: &'a [usize],
    ptr: usize,
    len: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    strings: Option<&'a [String]>,
}

/// See `WasmKept` in `npm/src/wasm.ts`.
#[derive(Serialize)]
struct JsKept<'a> {
    name: &'a str,
    r#type: &'static str,
    dims: &'a [usize],
    id: u32,
}

enum Stage {
    Reading(Loader),
    Collecting {
        externals: Externals,
        options: Options,
    },
    Ready(Box<Session>),
    /// A step before failed.
    Failed,
}

struct Input {
    name: String,
    tensor: Arc<Tensor>,
    /// Whether the next run uses it; the storage stays for later runs of the same shape.
    given: bool,
}

/// Where an output of a run lies, as the caller was told.
#[derive(Clone, PartialEq)]
struct Place {
    output: usize,
    dtype: DType,
    dims: Vec<usize>,
    ptr: usize,
}

/// One model: first it takes the bytes, then it runs.
#[wasm_bindgen]
pub struct WasmSession {
    stage: Stage,
    inputs: Vec<Input>,
    /// Inputs of the next run that are in the engine already.
    kept: Vec<(String, Arc<Tensor>)>,
    /// Indices of the outputs that the run's caller wants.
    wanted: Vec<usize>,
    /// Where the outputs were after the last run that somebody asked about, unless there were strings among them.
    places: Vec<Place>,
    /// The last run has ended: the next input is the first of a new set.
    ended: bool,
    timings: Vec<Timing>,
    timed: bool,
    began: f64,
    done: usize,
    total: usize,
}

#[wasm_bindgen]
impl WasmSession {
    /// A session that waits for the bytes of its model.
    #[wasm_bindgen(constructor)]
    pub fn new(options: JsValue) -> Result<WasmSession, JsValue> {
        let bad = |message: String| throw(Error::new(ErrorCode::InvalidOption, message));
        let options: JsOptions = serde_wasm_bindgen::from_value(options).map_err(|e| bad(e.to_string()))?;
        let optimize = match options.optimize.as_str() {
            "all" => Optimize::All,
            "none" => Optimize::None,
            other => return Err(bad(format!("optimize must be \"all\" or \"none\", not \"{other}\""))),
        };
        let precision = match options.precision.as_str() {
            "fast" => Precision::Fast,
            "exact" => Precision::Exact,
            other => return Err(bad(format!("precision must be \"fast\" or \"exact\", not \"{other}\""))),
        };
        let options = Options { optimize, precision, ..Options::default() };
        Ok(WasmSession {
            stage: Stage::Reading(Loader::new(options)),
            inputs: Vec::new(),
            kept: Vec::new(),
            wanted: Vec::new(),
            places: Vec::new(),
            ended: false,
            timings: Vec::new(),
            timed: false,
            began: 0.0,
            done: 0,
            total: 0,
        })
    }

    /// How long the model file will be, where that is known. Call it before the first bytes.
    pub fn expect(&mut self, bytes: f64) -> Result<(), JsValue> {
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Reading(loader) => {
                self.stage = Stage::Reading(loader.expect_len(bytes as u64));
                Ok(())
            }
            other => {
                self.stage = other;
                Err(out_of_turn("expect"))
            }
        }
    }

    /// The next bytes of the model file, in chunks of any size.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), JsValue> {
        match &mut self.stage {
            Stage::Reading(loader) => loader.push(bytes).map_err(throw),
            _ => Err(out_of_turn("push")),
        }
    }

    /// The model file is complete. Returns the locations of external data that it names.
    pub fn externals(&mut self) -> Result<Vec<String>, JsValue> {
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Reading(loader) => {
                let (model, options) = loader.finish().map_err(throw)?;
                let externals = Externals::new(model);
                let locations = externals.locations();
                self.stage = Stage::Collecting { externals, options };
                Ok(locations)
            }
            other => {
                self.stage = other;
                Err(out_of_turn("externals"))
            }
        }
    }

    /// The next bytes of a file of external data.
    #[wasm_bindgen(js_name = pushExternal)]
    pub fn push_external(&mut self, location: &str, bytes: &[u8]) -> Result<(), JsValue> {
        match &mut self.stage {
            Stage::Collecting { externals, .. } => externals.push(location, bytes).map_err(throw),
            _ => Err(out_of_turn("pushExternal")),
        }
    }

    /// All bytes are there: optimises the graph and describes the model.
    pub fn finish(&mut self) -> Result<JsValue, JsValue> {
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Collecting { externals, mut options } => {
                // The pool is started while the files arrive.
                options.threads = pool().threads();
                let model = externals.resolve().map_err(throw)?;
                pool().cancel_flag().reset();
                let session = Session::with_pool(model, options, pool()).map_err(throw)?;
                let described = describe(&session)?;
                self.stage = Stage::Ready(Box::new(session));
                Ok(described)
            }
            other => {
                self.stage = other;
                Err(out_of_turn("finish"))
            }
        }
    }

    /// Storage for an input of the next run; returns the address to which `byte_length` bytes go.
    pub fn input(&mut self, name: &str, dtype: &str, dims: &[u32], byte_length: usize) -> Result<usize, JsValue> {
        let dims: Vec<usize> = dims.iter().map(|&d| d as usize).collect();
        let dtype = DType::ALL.iter().copied().find(|d| d.as_str() == dtype).ok_or_else(|| {
            throw(Error::unsupported_dtype(format!("the input \"{name}\": \"{dtype}\" is not an element type")))
        })?;
        self.forget_given();
        let fits = |t: &mut Tensor| t.dtype() == dtype && t.dims() == dims;
        let known = self.inputs.iter().position(|i| i.name == name);
        // One that somebody holds is not to be written.
        let at = match known.filter(|&at| Arc::get_mut(&mut self.inputs[at].tensor).is_some_and(fits)) {
            Some(at) => at,
            None => {
                let former = known.and_then(|at| Arc::into_inner(self.inputs.swap_remove(at).tensor));
                let tensor = former.map_or_else(|| Tensor::zeros(dtype, &dims), |t| t.recycled(dtype, &dims));
                self.set_input(name, tensor.map_err(throw)?)
            }
        };
        let input = &mut self.inputs[at];
        let bytes = Arc::get_mut(&mut input.tensor).ok_or_else(|| out_of_turn("input"))?.bytes_mut();
        if bytes.len() != byte_length {
            let message = format!("the input \"{name}\" takes {} bytes, {byte_length} were given", bytes.len());
            return Err(throw(Error::invalid_input(message)));
        }
        input.given = true;
        Ok(bytes.as_mut_ptr() as usize)
    }

    /// A tensor that was kept as an input of the next run.
    #[wasm_bindgen(js_name = inputKept)]
    pub fn input_kept(&mut self, name: &str, id: u32) -> Result<(), JsValue> {
        self.forget_given();
        self.kept.push((name.to_owned(), kept(id)?));
        Ok(())
    }

    /// A string input of the next run.
    #[wasm_bindgen(js_name = inputStrings)]
    pub fn input_strings(&mut self, name: &str, dims: &[u32], values: Vec<String>) -> Result<(), JsValue> {
        self.forget_given();
        let dims: Vec<usize> = dims.iter().map(|&d| d as usize).collect();
        let at = self.set_input(name, Tensor::from_strings(&dims, values).map_err(throw)?);
        self.inputs[at].given = true;
        Ok(())
    }

    /// Begins a run over the inputs given since the last one, or, when there were none, over those of the last one,
    /// whose elements may have been written anew at the same addresses. `outputs` names those that [`outputs`](Self::outputs)
    /// returns; all when absent.
    pub fn begin(&mut self, outputs: Option<Vec<String>>, profile: bool) -> Result<(), JsValue> {
        let Stage::Ready(session) = &mut self.stage else { return Err(out_of_turn("begin")) };
        self.wanted.clear();
        match outputs {
            None => self.wanted.extend(0..session.outputs().len()),
            Some(names) => {
                for name in names {
                    self.wanted.push(output_named(session, &name)?);
                }
            }
        }
        self.timings.clear();
        self.timed = profile;
        self.ended = false;
        self.began = now();
        self.done = 0;
        self.total = 0;
        session.pool().cancel_flag().reset();
        let given = self.inputs.iter().filter(|i| i.given).map(|i| (i.name.as_str(), i.tensor.clone()));
        let kept = self.kept.iter().map(|(name, tensor)| (name.as_str(), tensor.clone()));
        session.begin_with(&given.chain(kept).collect::<Vec<_>>()).map_err(throw)
    }

    /// Executes nodes until all are done (true) or `budget_ms` have passed (false); at least one, and all of a brief run.
    pub fn advance(&mut self, budget_ms: f64) -> Result<bool, JsValue> {
        let Stage::Ready(session) = &mut self.stage else { return Err(out_of_turn("advance")) };
        // The clock is a call out of the module: one per step would be a part of what a small model takes.
        let end = if session.is_brief() { None } else { Some(now() + budget_ms) };
        let (done, total) = (&mut self.done, &mut self.total);
        let mut first = true;
        let pause = |i: usize, n: usize| {
            (*done, *total) = (i, n);
            !std::mem::replace(&mut first, false) && end.is_some_and(|end| now() >= end)
        };
        let clock: Option<&dyn Fn() -> f64> = if self.timed { Some(&now) } else { None };
        RUNNING.store(1, Ordering::SeqCst);
        let done = session.advance_timed(pause, clock, &mut self.timings);
        RUNNING.store(0, Ordering::SeqCst);
        done.map_err(throw)
    }

    /// Nodes executed.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Nodes in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Whether [`outputs`](Self::outputs) would say something else than the last time: a steady state need not ask.
    #[wasm_bindgen(js_name = outputsChanged)]
    pub fn outputs_changed(&mut self) -> Result<bool, JsValue> {
        let Stage::Ready(session) = &self.stage else { return Err(out_of_turn("outputsChanged")) };
        let mut same = self.places.len() == self.wanted.len();
        for (k, &output) in self.wanted.iter().enumerate() {
            let view = session.output(output).map_err(throw)?;
            let ptr = view.bytes().as_ptr() as usize;
            same = same
                && view.strings().is_none()
                && self.places.get(k).is_some_and(|p| {
                    p.output == output && p.dtype == view.dtype && p.ptr == ptr && p.dims.as_slice() == view.dims
                });
        }
        if !same {
            self.places.clear();
            for &output in &self.wanted {
                let view = session.output(output).map_err(throw)?;
                let (dims, ptr) = (view.dims.to_vec(), view.bytes().as_ptr() as usize);
                self.places.push(Place { output, dtype: view.dtype, dims, ptr });
            }
        }
        Ok(!same)
    }

    /// The outputs of the finished run that were asked for. Their addresses hold until the next call.
    pub fn outputs(&self) -> Result<Vec<JsValue>, JsValue> {
        let Stage::Ready(session) = &self.stage else { return Err(out_of_turn("outputs")) };
        let output = |&at: &usize| describe_output(&session.outputs()[at].name, &session.output(at).map_err(throw)?);
        self.wanted.iter().map(output).collect()
    }

    /// Keeps an output of the finished run here, where it outlasts the run and the session.
    pub fn keep(&self, name: &str) -> Result<JsValue, JsValue> {
        let Stage::Ready(session) = &self.stage else { return Err(out_of_turn("keep")) };
        let tensor = session.keep(output_named(session, name)?).map_err(throw)?;
        let id = KEPT.with_borrow_mut(|kept| {
            kept.last = kept.last.wrapping_add(1);
            kept.tensors.push((kept.last, tensor.clone()));
            kept.last
        });
        to_js(&JsKept { name, r#type: tensor.dtype().as_str(), dims: tensor.dims(), id })
    }

    /// Times of the finished run, when [`begin`](Self::begin) asked for them.
    pub fn timings(&self) -> Result<JsValue, JsValue> {
        to_js(&self.timings.iter().map(|t| JsTiming::new(t, self.began)).collect::<Vec<_>>())
    }

    /// Ends a run, finished or not.
    pub fn end(&mut self) {
        self.ended = true;
        self.timings.clear();
        self.kept.clear();
        if let Stage::Ready(session) = &mut self.stage {
            session.end();
        }
    }
}

impl WasmSession {
    /// The first input after a run begins a new set.
    fn forget_given(&mut self) {
        if std::mem::take(&mut self.ended) {
            self.inputs.iter_mut().for_each(|i| i.given = false);
            self.kept.clear();
        }
    }

    /// Puts a tensor in the place of an input's former one.
    fn set_input(&mut self, name: &str, tensor: Tensor) -> usize {
        let tensor = Arc::new(tensor);
        match self.inputs.iter().position(|i| i.name == name) {
            Some(at) => {
                self.inputs[at].tensor = tensor;
                at
            }
            None => {
                self.inputs.push(Input { name: name.to_owned(), tensor, given: false });
                self.inputs.len() - 1
            }
        }
    }
}

fn output_named(session: &Session, name: &str) -> Result<usize, JsValue> {
    session
        .outputs()
        .iter()
        .position(|o| o.name == name)
        .ok_or_else(|| throw(Error::new(ErrorCode::UnknownInput, format!("the model has no output \"{name}\""))))
}

fn describe_output(name: &str, view: &TensorView) -> Result<JsValue, JsValue> {
    let (bytes, strings) = (view.bytes(), view.strings());
    to_js(&JsOutput {
        name,
        r#type: view.dtype.as_str(),
        dims: view.dims,
        ptr: bytes.as_ptr() as usize,
        len: bytes.len(),
        strings,
    })
}

fn out_of_turn(method: &str) -> JsValue {
    throw(Error::internal(format!("{method} was called at the wrong stage of a session")))
}

fn describe(session: &Session) -> Result<JsValue, JsValue> {
    let info = session.info();
    to_js(&JsModelInfo {
        inputs: session.inputs().iter().map(JsValueInfo::from).collect(),
        outputs: session.outputs().iter().map(JsValueInfo::from).collect(),
        opset: info.opset as f64,
        producer: &info.producer,
        operators: &info.operators,
        nodes: info.nodes,
        weight_bytes: info.constant_bytes as f64,
    })
}

impl<'a> From<&'a ValueInfo> for JsValueInfo<'a> {
    fn from(info: &'a ValueInfo) -> Self {
        let dim = |d: &'a Dim| match d {
            Dim::Known(n) => JsDim::Size(*n),
            Dim::Symbol(name) => JsDim::Name(name),
            Dim::Unknown => JsDim::Name("?"),
        };
        let dims = match &info.shape {
            Some(shape) => shape.iter().map(dim).collect(),
            None => vec![JsDim::Name("*")],
        };
        JsValueInfo { name: &info.name, r#type: info.dtype.as_str(), dims }
    }
}

impl<'a> JsTiming<'a> {
    /// `began` is when the run did, by the same clock.
    fn new(t: &'a Timing, began: f64) -> Self {
        JsTiming {
            node: &t.node,
            op: &t.op,
            kernel: &t.kernel,
            start_ms: t.start - began,
            ms: t.ms,
            flops: t.flops as f64,
            read_bytes: t.read_bytes as f64,
            written_bytes: t.written_bytes as f64,
        }
    }
}
