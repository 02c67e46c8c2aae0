//! The messages of an ONNX file as plain structs, checked no further than the file format goes.
//!
//! Names follow `onnx.proto`. What inference has no use for (documentation, training information, device placement,
//! quantisation annotations) is not kept.

use crate::error::{Error, ErrorCode, Result};
use crate::storage::AlignedBytes;
use crate::tensor::{DType, Tensor, byte_count};

/// A whole file: `ModelProto`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    /// Version of the file format; 0 when the file does not say.
    pub ir_version: i64,
    /// Program that wrote the file.
    pub producer_name: String,
    /// Version of that program.
    pub producer_version: String,
    /// Reverse-DNS name space of the model.
    pub domain: String,
    /// The author's version of the model.
    pub model_version: i64,
    /// Operator sets that nodes refer to.
    pub opset_imports: Vec<OpsetId>,
    /// Free key-value pairs.
    pub metadata_props: Vec<(String, String)>,
    /// The computation.
    pub graph: Graph,
    /// Operators that the model itself defines.
    pub functions: Vec<Function>,
}

/// `OperatorSetIdProto`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpsetId {
    /// Empty for the standard operators (which files also spell `ai.onnx`).
    pub domain: String,
    /// Version of the operator set.
    pub version: i64,
}

/// `GraphProto`: the model's graph, or the body of an `If`, `Loop` or `Scan`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// Name for messages.
    pub name: String,
    /// Operators, in an order in which they can run.
    pub nodes: Vec<Node>,
    /// Constants by name.
    pub initializers: Vec<TensorProto>,
    /// Constants in coordinate form; the name is that of [`SparseTensor::values`].
    pub sparse_initializers: Vec<SparseTensor>,
    /// Inputs; before format version 4 they list the initializers too.
    pub inputs: Vec<ValueInfo>,
    /// Outputs.
    pub outputs: Vec<ValueInfo>,
    /// Types of values in between, as far as the exporter knew them.
    pub value_info: Vec<ValueInfo>,
}

/// `NodeProto`: one use of an operator.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// Name for messages; often empty.
    pub name: String,
    /// Operator.
    pub op_type: String,
    /// Operator set; empty for the standard one.
    pub domain: String,
    /// Which of several functions of the same name.
    pub overload: String,
    /// Names of values; empty where an optional input is left out.
    pub inputs: Vec<String>,
    /// Names of values; empty where nobody wants the output.
    pub outputs: Vec<String>,
    /// Attributes.
    pub attributes: Vec<Attribute>,
}

/// `AttributeProto`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute {
    /// Name.
    pub name: String,
    /// Value.
    pub value: AttributeValue,
}

/// Value of an attribute.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // The variants are those of `AttributeProto.AttributeType`.
pub enum AttributeValue {
    Float(f32),
    Int(i64),
    /// Not necessarily UTF-8.
    String(Vec<u8>),
    Tensor(TensorProto),
    Graph(Box<Graph>),
    SparseTensor(Box<SparseTensor>),
    Type(TypeProto),
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Strings(Vec<Vec<u8>>),
    Tensors(Vec<TensorProto>),
    Graphs(Vec<Graph>),
    SparseTensors(Vec<SparseTensor>),
    Types(Vec<TypeProto>),
    /// In the body of a function: the value of this attribute of the call.
    Ref {
        /// Attribute of the call.
        ref_attr_name: String,
        /// `AttributeProto.AttributeType` that it has; 0 when the file does not say.
        attribute_type: i32,
    },
}

impl AttributeValue {
    /// The number of `AttributeProto.AttributeType`.
    pub fn type_code(&self) -> i32 {
        match self {
            AttributeValue::Float(_) => 1,
            AttributeValue::Int(_) => 2,
            AttributeValue::String(_) => 3,
            AttributeValue::Tensor(_) => 4,
            AttributeValue::Graph(_) => 5,
            AttributeValue::Floats(_) => 6,
            AttributeValue::Ints(_) => 7,
            AttributeValue::Strings(_) => 8,
            AttributeValue::Tensors(_) => 9,
            AttributeValue::Graphs(_) => 10,
            AttributeValue::SparseTensor(_) => 11,
            AttributeValue::SparseTensors(_) => 12,
            AttributeValue::Type(_) => 13,
            AttributeValue::Types(_) => 14,
            AttributeValue::Ref { attribute_type, .. } => *attribute_type,
        }
    }
}

/// `FunctionProto`: an operator made of others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Function {
    /// Operator name that nodes call it by.
    pub name: String,
    /// Operator set it belongs to.
    pub domain: String,
    /// Which of several functions of the same name.
    pub overload: String,
    /// Formal inputs.
    pub inputs: Vec<String>,
    /// Formal outputs.
    pub outputs: Vec<String>,
    /// Attributes that a call must give.
    pub attributes: Vec<String>,
    /// Attributes with a default.
    pub attribute_defaults: Vec<Attribute>,
    /// Body.
    pub nodes: Vec<Node>,
    /// Operator sets of the body.
    pub opset_imports: Vec<OpsetId>,
    /// Types of values of the body.
    pub value_info: Vec<ValueInfo>,
}

/// `ValueInfoProto`: name and type of a value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValueInfo {
    /// Name of the value.
    pub name: String,
    /// Its type, when the file says.
    pub ty: Option<TypeProto>,
}

/// `TypeProto`. Element types are ONNX's numbers, see [`dtype_of`]: a model may mention types of values that are
/// never computed here.
#[derive(Clone, Debug, PartialEq)]
pub enum TypeProto {
    /// A dense tensor.
    Tensor {
        /// Number of the element type; 0 when unknown.
        elem_type: i32,
        /// Sizes; `None` when not even the rank is known.
        shape: Option<Vec<Dim>>,
    },
    /// A tensor in coordinate form.
    SparseTensor {
        /// Number of the element type; 0 when unknown.
        elem_type: i32,
        /// Sizes; `None` when not even the rank is known.
        shape: Option<Vec<Dim>>,
    },
    /// A list.
    Sequence(Box<TypeProto>),
    /// A value that may be absent.
    Optional(Box<TypeProto>),
    /// A dictionary.
    Map {
        /// Number of the keys' element type.
        key_type: i32,
        /// Type of the values.
        value_type: Box<TypeProto>,
    },
    /// A type that only its producer knows.
    Opaque {
        /// Name space.
        domain: String,
        /// Name.
        name: String,
    },
}

/// One size of a shape: `TensorShapeProto.Dimension`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Dim {
    /// A number, not negative.
    Known(i64),
    /// A name; equal names stand for equal sizes.
    Param(String),
    /// Nothing is said.
    #[default]
    Unknown,
}

/// `TensorProto`: a constant.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorProto {
    /// Name; empty in attributes.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub dims: Vec<usize>,
    /// Elements, as many as the shape says.
    pub data: TensorData,
}

/// Where the elements of a [`TensorProto`] are.
#[derive(Clone, Debug)]
pub enum TensorData {
    /// Here, dense, row-major, little-endian; 4-bit elements two per byte, low nibble first; `Bool` is 0 or 1.
    Bytes(AlignedBytes),
    /// Here, as text.
    Strings(Vec<String>),
    /// In another file.
    External(ExternalData),
}

impl PartialEq for TensorData {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (TensorData::Bytes(a), TensorData::Bytes(b)) => a.as_ref() == b.as_ref(),
            (TensorData::Strings(a), TensorData::Strings(b)) => a == b,
            (TensorData::External(a), TensorData::External(b)) => a == b,
            _ => false,
        }
    }
}

/// A byte range of another file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalData {
    /// Path relative to the model, with `/`; the reader refuses absolute ones and those with `..`.
    pub location: String,
    /// First byte.
    pub offset: u64,
    /// Number of bytes, equal to what the shape takes.
    pub length: u64,
    /// SHA-1 digest of the whole file in hexadecimal, where the model has one.
    pub checksum: Option<String>,
}

/// `SparseTensorProto`.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseTensor {
    /// The elements that are not zero, a list.
    pub values: TensorProto,
    /// Where they belong: linear indices (rank 1) or one row of coordinates each (rank 2), `I64`.
    pub indices: TensorProto,
    /// Shape of the dense tensor.
    pub dims: Vec<usize>,
}

impl TensorProto {
    /// A constant whose elements are at hand.
    pub fn new(name: impl Into<String>, tensor: &Tensor) -> Result<Self> {
        let data = match tensor.strings() {
            Some(s) => TensorData::Strings(s.to_vec()),
            None => TensorData::Bytes(AlignedBytes::copy_of(tensor.bytes())?),
        };
        Ok(TensorProto { name: name.into(), dtype: tensor.dtype(), dims: tensor.dims().to_vec(), data })
    }

    /// The tensor itself; the elements move, they are not copied.
    ///
    /// # Errors
    /// `ExternalData` when the elements are still in another file.
    pub fn into_tensor(self) -> Result<Tensor> {
        match self.data {
            TensorData::Bytes(bytes) => Tensor::from_bytes(self.dtype, &self.dims, bytes),
            TensorData::Strings(s) => Tensor::from_strings(&self.dims, s),
            TensorData::External(e) => Err(Error::new(
                ErrorCode::ExternalData,
                format!(
                    "the elements of tensor \"{}\" are in the file \"{}\", which was not given",
                    self.name, e.location
                ),
            )),
        }
    }
}

/// A stretch of an external file that a model needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExternalRange<'a> {
    /// Path relative to the model.
    pub location: &'a str,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl Model {
    /// What the model needs from other files, tensor by tensor; empty for a model of one file.
    pub fn external(&self) -> impl Iterator<Item = ExternalRange<'_>> {
        let mut found = Vec::new();
        self.each_tensor(&mut |t| {
            if let TensorData::External(e) = &t.data {
                found.push(ExternalRange { location: &e.location, offset: e.offset, length: e.length });
            }
        });
        found.into_iter()
    }

    /// Fetches every external range with `fetch(location, offset, length)`, tensor by tensor.
    ///
    /// # Errors
    /// Those of `fetch`; `ExternalData` when it returns another number of bytes than asked for. Tensors before the
    /// failing one are resolved then, the others are not.
    pub fn resolve_external<F>(&mut self, mut fetch: F) -> Result<()>
    where
        F: FnMut(&str, u64, u64) -> Result<AlignedBytes>,
    {
        let mut resolve = |t: &mut TensorProto| {
            let TensorData::External(e) = &t.data else { return Ok(()) };
            let mut bytes = fetch(&e.location, e.offset, e.length)?;
            if bytes.len() as u64 != e.length {
                return Err(Error::new(
                    ErrorCode::ExternalData,
                    format!(
                        "tensor \"{}\" takes {} bytes at offset {} of \"{}\", {} were found",
                        t.name,
                        e.length,
                        e.offset,
                        e.location,
                        bytes.len()
                    ),
                ));
            }
            if t.dtype == DType::Bool {
                normalise_bools(bytes.as_mut());
            }
            t.data = TensorData::Bytes(bytes);
            Ok(())
        };
        let mut result = Ok(());
        let mut visit = |t: &mut TensorProto| {
            if result.is_ok() {
                result = resolve(t);
            }
        };
        let mut graphs = vec![&mut self.graph];
        for f in &mut self.functions {
            visit_attributes_mut(f.attribute_defaults.iter_mut(), &mut graphs, &mut visit);
            visit_attributes_mut(f.nodes.iter_mut().flat_map(|n| &mut n.attributes), &mut graphs, &mut visit);
        }
        while let Some(g) = graphs.pop() {
            g.initializers.iter_mut().for_each(&mut visit);
            g.sparse_initializers.iter_mut().for_each(|s| each_of_sparse_mut(s, &mut visit));
            visit_attributes_mut(g.nodes.iter_mut().flat_map(|n| &mut n.attributes), &mut graphs, &mut visit);
        }
        result
    }

    /// Calls `visit` with every tensor of the file: initializers and attributes, of bodies and functions too.
    pub fn each_tensor<'a>(&'a self, visit: &mut dyn FnMut(&'a TensorProto)) {
        let mut graphs = vec![&self.graph];
        for f in &self.functions {
            visit_attributes(f.attribute_defaults.iter(), &mut graphs, visit);
            visit_attributes(f.nodes.iter().flat_map(|n| &n.attributes), &mut graphs, visit);
        }
        while let Some(g) = graphs.pop() {
            g.initializers.iter().for_each(&mut *visit);
            for s in &g.sparse_initializers {
                visit(&s.values);
                visit(&s.indices);
            }
            visit_attributes(g.nodes.iter().flat_map(|n| &n.attributes), &mut graphs, visit);
        }
    }

    /// Version of an operator set that the model imports; `""` and `"ai.onnx"` are the same set.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let canonical = |d: &str| if d == "ai.onnx" { String::new() } else { d.to_owned() };
        self.opset_imports.iter().find(|o| canonical(&o.domain) == canonical(domain)).map(|o| o.version)
    }
}

// Bodies are put on a list instead of being entered, so that nesting costs no stack.
fn visit_attributes<'a>(
    attributes: impl Iterator<Item = &'a Attribute>,
    graphs: &mut Vec<&'a Graph>,
    visit: &mut dyn FnMut(&'a TensorProto),
) {
    for a in attributes {
        match &a.value {
            AttributeValue::Tensor(t) => visit(t),
            AttributeValue::Tensors(ts) => ts.iter().for_each(&mut *visit),
            AttributeValue::SparseTensor(s) => {
                visit(&s.values);
                visit(&s.indices);
            }
            AttributeValue::SparseTensors(ss) => ss.iter().flat_map(|s| [&s.values, &s.indices]).for_each(&mut *visit),
            AttributeValue::Graph(g) => graphs.push(g),
            AttributeValue::Graphs(gs) => graphs.extend(gs),
            _ => {}
        }
    }
}

fn visit_attributes_mut<'a>(
    attributes: impl Iterator<Item = &'a mut Attribute>,
    graphs: &mut Vec<&'a mut Graph>,
    visit: &mut dyn FnMut(&mut TensorProto),
) {
    for a in attributes {
        match &mut a.value {
            AttributeValue::Tensor(t) => visit(t),
            AttributeValue::Tensors(ts) => ts.iter_mut().for_each(&mut *visit),
            AttributeValue::SparseTensor(s) => each_of_sparse_mut(s, visit),
            AttributeValue::SparseTensors(ss) => ss.iter_mut().for_each(|s| each_of_sparse_mut(s, visit)),
            AttributeValue::Graph(g) => graphs.push(g),
            AttributeValue::Graphs(gs) => graphs.extend(gs),
            _ => {}
        }
    }
}

fn each_of_sparse_mut(s: &mut SparseTensor, visit: &mut dyn FnMut(&mut TensorProto)) {
    visit(&mut s.values);
    visit(&mut s.indices);
}

/// Any byte but 0 is true; the kernels want 1.
pub(crate) fn normalise_bools(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|b| *b = u8::from(*b != 0));
}

impl SparseTensor {
    /// The dense tensor, zeros filled in, under the name of the values.
    ///
    /// # Errors
    /// `InvalidModel` when indices leave the shape or do not match the values; `ExternalData` when values or indices
    /// are in another file; `LimitExceeded` when the dense tensor takes more than `max_bytes`.
    pub fn to_dense(&self, max_bytes: usize) -> Result<TensorProto> {
        let name = &self.values.name;
        let invalid = |what: String| Error::invalid_model(format!("sparse tensor \"{name}\": {what}"));
        let width = match self.values.dtype.bits() {
            bits if bits >= 8 => bits / 8,
            _ => return Err(Error::unsupported_dtype(format!("sparse tensor \"{name}\" of {}", self.values.dtype))),
        };
        let values = self.values.clone().into_tensor()?;
        let indices = self.indices.clone().into_tensor()?;
        let (count, rank) = (values.len(), self.dims.len());
        let row = match *indices.dims() {
            [n] if n == count => 1,
            [n, r] if n == count && r == rank => r,
            _ => return Err(invalid(format!("{count} values with indices of shape {:?}", indices.dims()))),
        };
        let linear = indices.dims().len() == 1;
        let total = byte_count(self.values.dtype, &self.dims)?;
        if total > max_bytes {
            return Err(Error::limit(format!(
                "sparse tensor \"{name}\" of shape {:?} takes {total} bytes when dense, the limit is {max_bytes}",
                self.dims
            )));
        }
        let mut dense = AlignedBytes::zeroed(total)?;
        let indices = indices.as_slice::<i64>()?;
        for (i, value) in values.bytes().chunks_exact(width).enumerate() {
            let at = if linear {
                usize::try_from(indices[i]).ok()
            } else {
                indices[i * row..(i + 1) * row]
                    .iter()
                    .zip(&self.dims)
                    .try_fold(0usize, |at, (&x, &d)| usize::try_from(x).ok().filter(|&x| x < d).map(|x| at * d + x))
            };
            let place = at
                .and_then(|at| dense.as_mut().get_mut(at.checked_mul(width)?..at.checked_add(1)?.checked_mul(width)?))
                .ok_or_else(|| invalid(format!("the index of value {i} is outside of shape {:?}", self.dims)))?;
            place.copy_from_slice(value);
        }
        Ok(TensorProto {
            name: name.clone(),
            dtype: self.values.dtype,
            dims: self.dims.clone(),
            data: TensorData::Bytes(dense),
        })
    }
}

/// The engine's element type of an ONNX number.
///
/// # Errors
/// `UnsupportedDtype`, naming the type.
pub fn dtype_of(code: i32) -> Result<DType> {
    DType::from_onnx(i64::from(code)).ok_or_else(|| {
        let name = match code {
            0 => "undefined",
            14 => "complex64",
            15 => "complex128",
            17 => "float8e4m3fn",
            18 => "float8e4m3fnuz",
            19 => "float8e5m2",
            20 => "float8e5m2fnuz",
            23 => "float4e2m1",
            24 => "float8e8m0",
            25 => "uint2",
            26 => "int2",
            27 => "float6e2m3",
            28 => "float6e3m2",
            _ => "unknown to this version",
        };
        Error::unsupported_dtype(format!("element type {code} ({name}) is not supported"))
    })
}
