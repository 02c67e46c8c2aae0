//! From bytes to [`Model`]: what the fields mean.
//!
//! [`wire`](super::wire) calls the [`Builder`] for every value. The builder keeps one [`Frame`] for each open message;
//! a message that ends is put into the one around it. Elements of tensors go to their own aligned storage as they
//! arrive, so that reading takes little more memory than the weights.

use super::fields::{
    Kind, Msg, attribute, dim, entry, function, graph, map, model, node, opaque, opset, sparse, tensor, tensor_type,
    type_proto, value_info, wrapper,
};
use super::schema::{
    Attribute, AttributeValue, Dim, Function, Graph, Model, Node, OpsetId, SparseTensor, TensorProto, TypeProto,
    ValueInfo,
};
use super::sniff::looks_like;
use super::tensor_reader::TensorReader;
use super::wire::{Visitor, Wire};
use crate::error::{Error, ErrorCode, Result};

/// What a file may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file. Protobuf itself stops at 2 GiB; larger models use external data.
    pub max_bytes: u64,
    /// Messages inside each other; a body of an `If` inside another takes three. 100 is what protobuf libraries allow.
    pub max_depth: usize,
    /// Messages in all. Each takes a few hundred bytes of memory but may take two bytes of the file.
    pub max_messages: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_bytes: 1 << 31, max_depth: 100, max_messages: 1 << 22 }
    }
}

/// Reads a model from bytes that arrive piece by piece.
///
/// ```
/// use weblane_engine::error::ErrorCode;
/// use weblane_engine::onnx::{Limits, Reader};
/// let mut reader = Reader::new(Limits::default());
/// reader.push(&[0x08, 0x08])?; // ir_version: 8
/// assert_eq!(reader.finish().unwrap_err().code, ErrorCode::TruncatedModel);
/// # Ok::<(), weblane_engine::error::Error>(())
/// ```
#[derive(Debug)]
pub struct Reader {
    wire: Wire,
    builder: Builder,
    // The first bytes, held back so that they tell the same about a file that is no model in any chunking.
    head: Vec<u8>,
    received: u64,
    failure: Option<Error>,
}

/// Bytes of the beginning that tell what a file is that is not a model.
const HEAD: usize = 64;

impl Reader {
    /// A reader at the beginning of a file.
    pub fn new(limits: Limits) -> Self {
        Reader {
            wire: Wire::new(limits.max_bytes, limits.max_depth),
            builder: Builder::new(limits),
            head: Vec::with_capacity(HEAD),
            received: 0,
            failure: None,
        }
    }

    /// Says how long the file will be, if that is known. Storage of tensors that fit is then allocated at once instead
    /// of growing with what has arrived. Nothing else depends on it, so a wrong number does no harm.
    pub fn expect_len(mut self, bytes: u64) -> Self {
        self.builder.expected_len = bytes;
        self
    }

    /// Bytes received so far.
    pub fn position(&self) -> u64 {
        self.received
    }

    /// Reads the next bytes, in pieces of any size.
    ///
    /// # Errors
    /// `NotOnnx`, `InvalidModel`, `UnsupportedDtype`, `ExternalData`, `LimitExceeded` or `OutOfMemory`. After an error
    /// the reader gives the same one for ever.
    pub fn push(&mut self, chunk: &[u8]) -> Result<()> {
        if let Some(e) = &self.failure {
            return Err(e.clone());
        }
        self.received += chunk.len() as u64;
        if self.head.len() == HEAD {
            return self.feed(chunk);
        }
        let (first, rest) = chunk.split_at(chunk.len().min(HEAD - self.head.len()));
        self.head.extend_from_slice(first);
        if self.head.len() < HEAD {
            return Ok(());
        }
        self.feed_head()?;
        self.feed(rest)
    }

    fn feed_head(&mut self) -> Result<()> {
        let head = std::mem::take(&mut self.head);
        let result = self.wire.feed(&head, &mut self.builder);
        self.head = head;
        result.map_err(|e| self.fail(e))
    }

    fn feed(&mut self, chunk: &[u8]) -> Result<()> {
        self.wire.feed(chunk, &mut self.builder).map_err(|e| self.fail(e))
    }

    fn fail(&mut self, e: Error) -> Error {
        let e = self.explain(e);
        self.failure = Some(e.clone());
        // What was read is of no use any more; the weights may be large.
        self.builder = Builder::new(Limits::default());
        e
    }

    /// The model.
    ///
    /// # Errors
    /// Those of [`push`](Self::push); `EmptyModel` when there were no bytes; `TruncatedModel` when they end inside of
    /// a message, or before the graph and the operator sets that every model has. A file that lost only whole fields
    /// behind those (further operator sets, metadata, functions) is a valid shorter file.
    pub fn finish(mut self) -> Result<Model> {
        if let Some(e) = self.failure {
            return Err(e);
        }
        if self.head.len() < HEAD {
            self.feed_head()?;
        }
        let pos = self.wire.pos();
        let truncated = |what: &str| {
            Error::new(ErrorCode::TruncatedModel, format!("the model is cut short: it ends at byte {pos} {what}"))
        };
        if pos == 0 {
            return Err(Error::new(ErrorCode::EmptyModel, "the model is empty: it has no bytes"));
        }
        if !self.wire.is_complete() {
            return Err(self.explain(truncated(&format!("inside {}", self.builder.place()))));
        }
        if !self.builder.graph_seen {
            return Err(self.explain(truncated("without a graph")));
        }
        let model = match self.builder.stack.into_iter().next().map(|o| o.frame) {
            Some(Frame::Model(model)) => *model,
            _ => return Err(Error::internal("the reader lost the model")),
        };
        if model.opset_imports.is_empty() {
            return Err(truncated("before any opset_import, which every model has"));
        }
        Ok(model)
    }

    /// Says what a file is that is not a model.
    fn explain(&self, e: Error) -> Error {
        let not_onnx = |what: &str| {
            Error::new(ErrorCode::NotOnnx, format!("this is not an ONNX model: {what} ({})", e.message.as_str()))
        };
        let meaningless =
            matches!(e.code, ErrorCode::InvalidModel | ErrorCode::TruncatedModel | ErrorCode::LimitExceeded);
        match looks_like(&self.head) {
            Some(what) if !self.builder.graph_seen => not_onnx(&format!("it looks like {what}")),
            None if meaningless && !self.builder.recognised => not_onnx("no field of a model was found in it"),
            _ => e,
        }
    }
}

impl Default for Reader {
    /// A reader with the default [`Limits`].
    fn default() -> Self {
        Reader::new(Limits::default())
    }
}

impl Model {
    /// Reads a model that is in memory as a whole.
    ///
    /// # Errors
    /// Those of [`Reader::push`] and [`Reader::finish`].
    pub fn parse(bytes: &[u8]) -> Result<Model> {
        let mut reader = Reader::default().expect_len(bytes.len() as u64);
        reader.push(bytes)?;
        reader.finish()
    }
}

/// A message that is being read.
#[derive(Debug)]
enum Frame {
    Model(Box<Model>),
    Opset(OpsetId),
    Entry(String, String),
    Graph(Box<Graph>),
    Function(Box<Function>),
    Node(Node),
    Attribute(Box<AttributeReader>),
    Tensor(Box<TensorReader>),
    Sparse(Box<SparseReader>),
    ValueInfo(ValueInfo),
    Type(Option<TypeProto>),
    TensorType { elem_type: i32, shape: Option<Vec<Dim>> },
    Wrapper(Option<TypeProto>),
    Map { key_type: i32, value_type: Option<TypeProto> },
    Opaque { domain: String, name: String },
    Shape(Vec<Dim>),
    Dim(Dim),
}

#[derive(Debug, Default)]
struct AttributeReader {
    name: String,
    attribute_type: i32,
    ref_attr_name: String,
    f: Option<f32>,
    i: Option<i64>,
    s: Option<Vec<u8>>,
    t: Option<TensorProto>,
    g: Option<Box<Graph>>,
    tp: Option<TypeProto>,
    sparse_tensor: Option<Box<SparseTensor>>,
    floats: Vec<f32>,
    ints: Vec<i64>,
    strings: Vec<Vec<u8>>,
    tensors: Vec<TensorProto>,
    graphs: Vec<Graph>,
    type_protos: Vec<TypeProto>,
    sparse_tensors: Vec<SparseTensor>,
}

#[derive(Debug, Default)]
struct SparseReader {
    values: Option<TensorProto>,
    indices: Option<TensorProto>,
    dims: Vec<i64>,
}

impl AttributeReader {
    /// The value that the type names. Files of format version 1 have no type, so there the value that is present counts.
    /// A default value of protobuf may be missing in the file: some writers leave out a 0.
    #[inline(never)]
    fn finish(self) -> Result<Attribute> {
        let AttributeReader { name, attribute_type, ref_attr_name, .. } = self;
        if !ref_attr_name.is_empty() {
            return Ok(Attribute { name, value: AttributeValue::Ref { ref_attr_name, attribute_type } });
        }
        let present: [(i32, bool); 14] = [
            (1, self.f.is_some()),
            (2, self.i.is_some()),
            (3, self.s.is_some()),
            (4, self.t.is_some()),
            (5, self.g.is_some()),
            (6, !self.floats.is_empty()),
            (7, !self.ints.is_empty()),
            (8, !self.strings.is_empty()),
            (9, !self.tensors.is_empty()),
            (10, !self.graphs.is_empty()),
            (11, self.sparse_tensor.is_some()),
            (12, !self.sparse_tensors.is_empty()),
            (13, self.tp.is_some()),
            (14, !self.type_protos.is_empty()),
        ];
        let code = if attribute_type != 0 {
            attribute_type
        } else {
            let mut codes = present.iter().filter(|(_, here)| *here).map(|(code, _)| *code);
            match (codes.next(), codes.next()) {
                (Some(code), None) => code,
                (None, _) => return Err(Error::invalid_model(format!("attribute \"{name}\" has no value"))),
                _ => {
                    return Err(Error::invalid_model(format!(
                        "attribute \"{name}\" has several values and does not say its type"
                    )));
                }
            }
        };
        let missing =
            |what: &str| Error::invalid_model(format!("attribute \"{name}\" says it is {what} and holds none"));
        let value = match code {
            1 => AttributeValue::Float(self.f.unwrap_or_default()),
            2 => AttributeValue::Int(self.i.unwrap_or_default()),
            3 => AttributeValue::String(self.s.unwrap_or_default()),
            4 => AttributeValue::Tensor(self.t.ok_or_else(|| missing("a tensor"))?),
            5 => AttributeValue::Graph(self.g.ok_or_else(|| missing("a graph"))?),
            6 => AttributeValue::Floats(self.floats),
            7 => AttributeValue::Ints(self.ints),
            8 => AttributeValue::Strings(self.strings),
            9 => AttributeValue::Tensors(self.tensors),
            10 => AttributeValue::Graphs(self.graphs),
            11 => AttributeValue::SparseTensor(self.sparse_tensor.ok_or_else(|| missing("a sparse tensor"))?),
            12 => AttributeValue::SparseTensors(self.sparse_tensors),
            13 => AttributeValue::Type(self.tp.ok_or_else(|| missing("a type"))?),
            14 => AttributeValue::Types(self.type_protos),
            _ => return Err(Error::invalid_model(format!("attribute \"{name}\" has the unknown type {code}"))),
        };
        Ok(Attribute { name, value })
    }
}

impl SparseReader {
    #[inline(never)]
    fn finish(self) -> Result<SparseTensor> {
        let missing = |what: &str| Error::invalid_model(format!("a sparse tensor has no {what}"));
        let values = self.values.ok_or_else(|| missing("values"))?;
        let indices = self.indices.ok_or_else(|| missing("indices"))?;
        let dims = super::tensor_reader::checked_dims(&values.name, &self.dims)?;
        Ok(SparseTensor { values, indices, dims })
    }
}

impl Frame {
    fn new(msg: Msg) -> Result<Frame> {
        Ok(match msg {
            Msg::Model => Frame::Model(Box::default()),
            Msg::Opset => Frame::Opset(OpsetId::default()),
            Msg::Entry => Frame::Entry(String::new(), String::new()),
            Msg::Graph => Frame::Graph(Box::default()),
            Msg::Function => Frame::Function(Box::default()),
            Msg::Node => Frame::Node(Node::default()),
            Msg::Attribute => Frame::Attribute(Box::default()),
            Msg::Tensor => Frame::Tensor(Box::default()),
            Msg::Segment => return Err(Error::invalid_model("tensors in segments are not supported")),
            Msg::Sparse => Frame::Sparse(Box::default()),
            Msg::ValueInfo => Frame::ValueInfo(ValueInfo::default()),
            Msg::Type => Frame::Type(None),
            Msg::TensorType => Frame::TensorType { elem_type: 0, shape: None },
            Msg::Wrapper => Frame::Wrapper(None),
            Msg::Map => Frame::Map { key_type: 0, value_type: None },
            Msg::Opaque => Frame::Opaque { domain: String::new(), name: String::new() },
            Msg::Shape => Frame::Shape(Vec::new()),
            Msg::Dim => Frame::Dim(Dim::Unknown),
        })
    }

    /// The name that the message has, as far as it was read.
    fn name(&self) -> &str {
        match self {
            Frame::Graph(g) => &g.name,
            Frame::Function(f) => &f.name,
            Frame::Node(n) if n.name.is_empty() => &n.op_type,
            Frame::Node(n) => &n.name,
            Frame::Attribute(a) => &a.name,
            Frame::Tensor(t) => &t.name,
            Frame::ValueInfo(v) => &v.name,
            _ => "",
        }
    }
}

#[derive(Debug)]
struct Open {
    msg: Msg,
    // Field of the message around it.
    number: u32,
    frame: Frame,
}

#[derive(Debug)]
struct Builder {
    stack: Vec<Open>,
    // The run of bytes that is being read: its field, and what came of it unless it goes straight to a tensor.
    run: u32,
    scratch: Vec<u8>,
    messages: u64,
    max_messages: u64,
    expected_len: u64,
    graph_seen: bool,
    recognised: bool,
}

impl Builder {
    fn new(limits: Limits) -> Self {
        Builder {
            stack: vec![Open { msg: Msg::Model, number: 0, frame: Frame::Model(Box::default()) }],
            run: 0,
            scratch: Vec::new(),
            messages: 0,
            max_messages: limits.max_messages,
            expected_len: 0,
            graph_seen: false,
            recognised: false,
        }
    }

    fn top(&mut self) -> Result<&mut Open> {
        self.stack.last_mut().ok_or_else(|| Error::internal("the reader lost the model"))
    }

    /// Bytes that may be allocated for something announced at `pos`, before it has arrived: what the file is known
    /// to hold, or as much again as has arrived already.
    fn allowance(&self, pos: u64) -> usize {
        usize::try_from(self.expected_len.saturating_sub(pos).max(pos).max(1 << 20)).unwrap_or(usize::MAX)
    }

    fn located(&self, e: Error) -> Error {
        Error { message: format!("{}, in {}", e.message, self.place()), ..e }
    }
}

fn once<T>(slot: &mut Option<T>, value: T, what: &str) -> Result<()> {
    if slot.replace(value).is_some() {
        return Err(Error::invalid_model(format!("{what} is there twice")));
    }
    Ok(())
}

fn text(bytes: &[u8], field: &str) -> Result<String> {
    match std::str::from_utf8(bytes) {
        Ok(s) => Ok(s.to_owned()),
        Err(e) => Err(Error::invalid_model(format!("{field} is not UTF-8 from its byte {} on", e.valid_up_to()))),
    }
}

fn float(bytes: &[u8]) -> Result<f32> {
    bytes.try_into().map(f32::from_le_bytes).map_err(|_| Error::invalid_model("a float of other than 4 bytes"))
}

/// Where the bytes of a field go.
enum Text<'a> {
    One(&'a mut String),
    Many(&'a mut Vec<String>),
    /// They are no text, or more is to be done.
    Other(&'a mut Frame),
}

/// Puts a finished message into the one around it.
///
/// In functions by kind: V8 counts a call of a function by the code that lies before its return, and would optimise one
/// large function after the thousand calls that a model takes, while there is better to do.
fn attach(parent: &mut Frame, number: u32, child: Frame) -> Result<()> {
    match (parent, number, child) {
        (Frame::Node(n), node::attribute, Frame::Attribute(a)) => n.attributes.push(a.finish()?),
        (Frame::Shape(dims), super::fields::shape::dim, Frame::Dim(d)) => dims.push(d),
        (Frame::Graph(g), _, child) => return attach_to_graph(g, number, child),
        (Frame::Attribute(a), _, child) => return attach_to_attribute(a, number, child),
        (parent @ (Frame::Model(_) | Frame::Function(_) | Frame::Tensor(_) | Frame::Sparse(_)), _, child) => {
            return attach_rare(parent, number, child);
        }
        (parent, _, child) => return attach_type(parent, number, child),
    }
    Ok(())
}

#[inline(never)]
fn attach_rare(parent: &mut Frame, number: u32, child: Frame) -> Result<()> {
    match (parent, number, child) {
        (Frame::Model(m), model::graph, Frame::Graph(g)) => m.graph = *g,
        (Frame::Model(m), model::opset_import, Frame::Opset(o)) => m.opset_imports.push(o),
        (Frame::Model(m), model::metadata_props, Frame::Entry(k, v)) => m.metadata_props.push((k, v)),
        (Frame::Model(m), model::functions, Frame::Function(f)) => m.functions.push(*f),

        (Frame::Function(f), function::node, Frame::Node(n)) => f.nodes.push(n),
        (Frame::Function(f), function::opset_import, Frame::Opset(o)) => f.opset_imports.push(o),
        (Frame::Function(f), function::attribute_proto, Frame::Attribute(a)) => f.attribute_defaults.push(a.finish()?),
        (Frame::Function(f), function::value_info, Frame::ValueInfo(v)) => f.value_info.push(v),

        (Frame::Tensor(t), tensor::external_data, Frame::Entry(k, v)) => t.external.push((k, v)),
        (Frame::Sparse(s), sparse::values, Frame::Tensor(t)) => once(&mut s.values, t.finish()?, "values")?,
        (Frame::Sparse(s), sparse::indices, Frame::Tensor(t)) => once(&mut s.indices, t.finish()?, "indices")?,
        _ => return Err(misplaced(number)),
    }
    Ok(())
}

#[inline(never)]
fn attach_to_graph(g: &mut Graph, number: u32, child: Frame) -> Result<()> {
    match (number, child) {
        (graph::node, Frame::Node(n)) => g.nodes.push(n),
        (graph::initializer, Frame::Tensor(t)) => g.initializers.push(t.finish()?),
        (graph::sparse_initializer, Frame::Sparse(s)) => g.sparse_initializers.push(s.finish()?),
        (graph::input, Frame::ValueInfo(v)) => g.inputs.push(v),
        (graph::output, Frame::ValueInfo(v)) => g.outputs.push(v),
        (graph::value_info, Frame::ValueInfo(v)) => g.value_info.push(v),
        _ => return Err(misplaced(number)),
    }
    Ok(())
}

#[inline(never)]
fn attach_to_attribute(a: &mut AttributeReader, number: u32, child: Frame) -> Result<()> {
    match (number, child) {
        (attribute::t, Frame::Tensor(t)) => once(&mut a.t, t.finish()?, "the tensor")?,
        (attribute::tensors, Frame::Tensor(t)) => a.tensors.push(t.finish()?),
        (attribute::g, Frame::Graph(g)) => once(&mut a.g, g, "the graph")?,
        (attribute::graphs, Frame::Graph(g)) => a.graphs.push(*g),
        (attribute::sparse_tensor, Frame::Sparse(s)) => {
            once(&mut a.sparse_tensor, Box::new(s.finish()?), "the sparse tensor")?;
        }
        (attribute::sparse_tensors, Frame::Sparse(s)) => a.sparse_tensors.push(s.finish()?),
        (attribute::tp, Frame::Type(t)) => once(&mut a.tp, some_type(t)?, "the type")?,
        (attribute::type_protos, Frame::Type(t)) => a.type_protos.push(some_type(t)?),
        _ => return Err(misplaced(number)),
    }
    Ok(())
}

#[inline(never)]
fn attach_type(parent: &mut Frame, number: u32, child: Frame) -> Result<()> {
    match (parent, number, child) {
        // A type that is there but says nothing is as good as none.
        (Frame::ValueInfo(v), value_info::value_type, Frame::Type(Some(t))) => once(&mut v.ty, t, "the type")?,
        (Frame::ValueInfo(_), value_info::value_type, Frame::Type(None)) => {}
        (Frame::Type(t), type_proto::tensor_type, Frame::TensorType { elem_type, shape }) => {
            once(t, TypeProto::Tensor { elem_type, shape }, "the type")?;
        }
        (Frame::Type(t), type_proto::sparse_tensor_type, Frame::TensorType { elem_type, shape }) => {
            once(t, TypeProto::SparseTensor { elem_type, shape }, "the type")?;
        }
        (Frame::Type(t), type_proto::sequence_type, Frame::Wrapper(e)) => {
            once(t, TypeProto::Sequence(Box::new(some_type(e)?)), "the type")?;
        }
        (Frame::Type(t), type_proto::optional_type, Frame::Wrapper(e)) => {
            once(t, TypeProto::Optional(Box::new(some_type(e)?)), "the type")?;
        }
        (Frame::Type(t), type_proto::map_type, Frame::Map { key_type, value_type }) => {
            once(t, TypeProto::Map { key_type, value_type: Box::new(some_type(value_type)?) }, "the type")?;
        }
        (Frame::Type(t), type_proto::opaque_type, Frame::Opaque { domain, name }) => {
            once(t, TypeProto::Opaque { domain, name }, "the type")?;
        }
        (Frame::Wrapper(e), wrapper::elem_type, Frame::Type(t)) => once(e, some_type(t)?, "the element type")?,
        (Frame::Map { value_type, .. }, map::value_type, Frame::Type(t)) => {
            once(value_type, some_type(t)?, "the value type")?;
        }
        (Frame::TensorType { shape, .. }, tensor_type::shape, Frame::Shape(dims)) => once(shape, dims, "the shape")?,
        _ => return Err(misplaced(number)),
    }
    Ok(())
}

fn misplaced(number: u32) -> Error {
    Error::internal(format!("field {number} was opened where it does not belong"))
}

fn some_type(t: Option<TypeProto>) -> Result<TypeProto> {
    t.ok_or_else(|| Error::invalid_model("a type says nothing"))
}

impl Visitor for Builder {
    fn kind(&self, number: u32) -> Option<Kind> {
        self.stack.last().and_then(|o| o.msg.kind(number))
    }

    fn open(&mut self, number: u32, msg: Msg) -> Result<()> {
        self.messages += 1;
        if self.messages > self.max_messages {
            return Err(Error::limit(format!("the model has more than {} messages", self.max_messages)));
        }
        if msg == Msg::Graph && self.stack.len() == 1 {
            if self.graph_seen {
                return Err(Error::invalid_model("the graph is there twice"));
            }
            self.graph_seen = true;
            self.recognised = true;
        }
        let frame = Frame::new(msg).map_err(|e| self.located(e))?;
        self.stack.push(Open { msg, number, frame });
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let Some(child) = self.stack.pop() else { return Err(Error::internal("the reader lost the model")) };
        let parent = self.top()?;
        attach(&mut parent.frame, child.number, child.frame).map_err(|e| self.located(e))
    }

    fn int(&mut self, number: u32, value: u64) -> Result<()> {
        // Two's complement in ten bytes for int64; int32 and enumerations are the low half of it.
        let (v, v32) = (value as i64, value as i32);
        let top = self.top()?;
        let result = match (&mut top.frame, number) {
            (Frame::Model(m), model::ir_version) => {
                m.ir_version = v;
                self.recognised = true;
                Ok(())
            }
            (Frame::Model(m), model::model_version) => set(&mut m.model_version, v),
            (Frame::Opset(o), opset::version) => set(&mut o.version, v),
            (Frame::Attribute(a), attribute::i) => set(&mut a.i, Some(v)),
            (Frame::Attribute(a), attribute::ints) => push(&mut a.ints, v),
            (Frame::Attribute(a), attribute::attribute_type) => set(&mut a.attribute_type, v32),
            (Frame::Tensor(t), _) => t.int(number, value),
            (Frame::Sparse(s), sparse::dims) => push(&mut s.dims, v),
            (Frame::TensorType { elem_type, .. }, tensor_type::elem_type) => set(elem_type, v32),
            (Frame::Map { key_type, .. }, map::key_type) => set(key_type, v32),
            // Some exporters write -1 for a size that is not known.
            (Frame::Dim(d), dim::dim_value) if v == -1 => set(d, Dim::Unknown),
            (Frame::Dim(d), dim::dim_value) if v >= 0 => set(d, Dim::Known(v)),
            (Frame::Dim(_), dim::dim_value) => Err(Error::invalid_model(format!("a dimension of size {v}"))),
            _ => Err(Error::internal(format!("an integer in field {number}, which holds none"))),
        };
        result.map_err(|e| self.located(e))
    }

    fn begin_packed(&mut self, number: u32, len: u64, pos: u64) -> Result<()> {
        let allowance = self.allowance(pos);
        match &mut self.top()?.frame {
            Frame::Tensor(t) => t.begin_ints(number, len, allowance),
            _ => Ok(()),
        }
    }

    fn begin(&mut self, number: u32, len: u64, pos: u64) -> Result<()> {
        self.run = number;
        self.scratch.clear();
        let allowance = self.allowance(pos);
        let result = match &mut self.top()?.frame {
            Frame::Tensor(t) if TensorReader::is_data(number) => t.begin_bytes(number, len, allowance),
            _ => Ok(()),
        };
        result.map_err(|e| self.located(e))
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let number = self.run;
        match &mut self.top()?.frame {
            Frame::Tensor(t) if TensorReader::is_data(number) => t.bytes(bytes),
            _ => {
                let enough = self.scratch.try_reserve(bytes.len());
                enough.map_err(|_| Error::out_of_memory(format!("no memory for {} bytes of text", bytes.len())))?;
                self.scratch.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn end(&mut self) -> Result<()> {
        let number = self.run;
        let bytes = std::mem::take(&mut self.scratch);
        let top = self.top()?;
        let field = top.msg.field(number);
        let place = match (&mut top.frame, number) {
            (Frame::Tensor(t), tensor::name) => Text::One(&mut t.name),
            (Frame::Attribute(a), attribute::name) => Text::One(&mut a.name),
            (Frame::Attribute(a), attribute::ref_attr_name) => Text::One(&mut a.ref_attr_name),
            (Frame::Model(m), model::producer_name) => Text::One(&mut m.producer_name),
            (Frame::Model(m), model::producer_version) => Text::One(&mut m.producer_version),
            (Frame::Model(m), model::domain) => Text::One(&mut m.domain),
            (Frame::Opset(o), opset::domain) => Text::One(&mut o.domain),
            (Frame::Entry(k, _), entry::key) => Text::One(k),
            (Frame::Entry(_, v), entry::value) => Text::One(v),
            (Frame::Graph(g), graph::name) => Text::One(&mut g.name),
            (Frame::Function(f), function::name) => Text::One(&mut f.name),
            (Frame::Function(f), function::domain) => Text::One(&mut f.domain),
            (Frame::Function(f), function::overload) => Text::One(&mut f.overload),
            (Frame::Function(f), function::input) => Text::Many(&mut f.inputs),
            (Frame::Function(f), function::output) => Text::Many(&mut f.outputs),
            (Frame::Function(f), function::attribute) => Text::Many(&mut f.attributes),
            (Frame::Node(n), node::name) => Text::One(&mut n.name),
            (Frame::Node(n), node::op_type) => Text::One(&mut n.op_type),
            (Frame::Node(n), node::domain) => Text::One(&mut n.domain),
            (Frame::Node(n), node::overload) => Text::One(&mut n.overload),
            (Frame::Node(n), node::input) => Text::Many(&mut n.inputs),
            (Frame::Node(n), node::output) => Text::Many(&mut n.outputs),
            (Frame::ValueInfo(v), value_info::name) => Text::One(&mut v.name),
            (Frame::Opaque { domain, .. }, opaque::domain) => Text::One(domain),
            (Frame::Opaque { name, .. }, opaque::name) => Text::One(name),
            (frame, _) => Text::Other(frame),
        };
        let string = || text(&bytes, field);
        let result = match place {
            Text::One(place) => string().map(|s| *place = s),
            Text::Many(list) => string().map(|s| list.push(s)),
            Text::Other(frame) => match (frame, number) {
                (Frame::Tensor(_), _) if TensorReader::is_data(number) => Ok(()),
                (Frame::Tensor(t), tensor::string_data) => string().and_then(|s| t.string(s)),
                (Frame::Attribute(a), attribute::f) => float(&bytes).map(|f| a.f = Some(f)),
                (Frame::Attribute(a), attribute::floats) => {
                    a.floats.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
                    Ok(())
                }
                (Frame::Attribute(a), attribute::s) => set(&mut a.s, Some(bytes.clone())),
                (Frame::Attribute(a), attribute::strings) => push(&mut a.strings, bytes.clone()),
                (Frame::Dim(d), dim::dim_param) => {
                    string().map(|s| *d = if s.is_empty() { Dim::Unknown } else { Dim::Param(s) })
                }
                _ => Err(Error::internal(format!("bytes in field {number}, which holds none"))),
            },
        };
        // The buffer serves the next text too, unless this one was uncommonly long.
        if bytes.capacity() <= 1 << 16 {
            self.scratch = bytes;
        }
        result.map_err(|e| self.located(e))
    }

    fn place(&self) -> String {
        let mut place = String::new();
        for (i, open) in self.stack.iter().enumerate() {
            if i > 0 {
                place.push_str(" > ");
            }
            place.push_str(open.msg.as_str());
            // A broken file may hold names of any length.
            let name: String = open.frame.name().chars().take(80).collect();
            if !name.is_empty() {
                place.push_str(&format!(" {name:?}"));
            }
        }
        place
    }
}

fn set<T>(slot: &mut T, value: T) -> Result<()> {
    *slot = value;
    Ok(())
}

fn push<T>(list: &mut Vec<T>, value: T) -> Result<()> {
    list.push(value);
    Ok(())
}
