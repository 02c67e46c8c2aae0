//! Operators: one file for each, or for each family that shares its code.
//!
//! A file has the operator's attributes as a struct, `parse` from the model's node, shape inference, `run`, the
//! in-place rule and tests, and names what it implements in its `OPERATORS`. The list below is the only one: the
//! registry, the table of supported operators in the documentation and the tests come from it.

use crate::error::{Error, ErrorCode, Result};
use crate::fact::Fact;
use crate::graph::Graph;
use crate::tensor::{DType, Dims, Element, Tensor, TensorMut, TensorView};
use std::any::Any;
use std::fmt::{Debug, Formatter};
use std::sync::Arc;
use weblane_kernels::par::Cx;

mod attributes;
pub mod body;
mod prepare;
mod qparams;
mod sizes;
pub mod spatial;
mod table;
#[cfg(test)]
pub(crate) mod testing;
pub use attributes::Attributes;
pub use prepare::{Compute, PackCache, Precision, Prepare};
pub use table::Table;

/// What is known where a shape is inferred.
#[derive(Debug)]
pub struct Infer<'a> {
    /// One entry per operand; `None` where an optional one was left out.
    pub inputs: &'a [Option<&'a Fact>],
    /// How many results the node has.
    pub outputs: usize,
    /// For what has to be computed to be known, such as constants in bodies.
    pub cx: &'a Cx<'a>,
}

impl Infer<'_> {
    /// The fact of an operand, or `None` when it was left out.
    pub fn optional(&self, i: usize) -> Option<&Fact> {
        self.inputs.get(i).copied().flatten()
    }

    /// The fact of an operand that must be there.
    pub fn input(&self, i: usize) -> Result<&Fact> {
        self.optional(i).ok_or_else(|| Error::invalid_model(format!("operand {i} is missing")))
    }

    /// As many facts as the node has results, made from the given ones; an error when fewer are given.
    pub fn results(&self, facts: Vec<Fact>) -> Result<Vec<Fact>> {
        if facts.len() < self.outputs {
            let (have, want) = (facts.len(), self.outputs);
            return Err(Error::invalid_model(format!("the node names {want} results, the operator has {have}")));
        }
        let mut facts = facts;
        facts.truncate(self.outputs);
        Ok(facts)
    }
}

/// Operands and results of one run of a node.
#[derive(Debug)]
pub struct Io<'a, 'b> {
    /// One entry per operand; `None` where an optional one was left out, or where it is the buffer of result 0.
    pub inputs: &'b [Option<TensorView<'a>>],
    /// One entry per result, of the shape that inference found.
    pub outputs: &'b mut [TensorMut<'a>],
    /// The operand whose elements result 0 holds already, when the plan computes in place.
    pub in_place: Option<usize>,
}

impl<'a> Io<'a, '_> {
    /// An operand, or `None` when it was left out.
    pub fn optional(&self, i: usize) -> Option<TensorView<'a>> {
        self.inputs.get(i).copied().flatten()
    }

    /// An operand that must be there.
    pub fn input(&self, i: usize) -> Result<TensorView<'a>> {
        self.optional(i).ok_or_else(|| Error::invalid_model(format!("operand {i} is missing")))
    }

    /// The elements of an operand.
    pub fn slice<T: Element>(&self, i: usize) -> Result<&'a [T]> {
        self.input(i)?.as_slice()
    }

    /// A result.
    pub fn output(&mut self, i: usize) -> Result<&mut TensorMut<'a>> {
        self.outputs.get_mut(i).ok_or_else(|| Error::internal(format!("result {i} has no buffer")))
    }
}

/// What an operator is to every stage.
pub trait Operator: Any + Same + Send + Sync {
    /// The name in messages, profiles and tables: ONNX's, with the domain in front of those that are not ONNX's own.
    fn name(&self) -> &'static str;

    /// Element types and shapes of the results, as far as those of the operands say; checks the operands.
    ///
    /// When every operand is a constant, all shapes must be found, or the operator cannot run at all.
    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>>;

    /// Computes. Shapes and types are as `infer` found them. May be called before any `prepare`, for constants.
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()>;

    /// Chooses a kernel for known shapes and packs constant operands; `None` leaves it to [`run`](Self::run).
    fn prepare(&self, _cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        Ok(None)
    }

    /// Packs constant operands before any input shape is known, by the same calls of the cache as
    /// [`prepare`](Self::prepare). Names the operands of which every later `prepare` and what it returns read the packed
    /// form only, whatever the shapes: their elements may be dropped. The others stay as they are.
    fn prepack(&self, _cx: &Prepare) -> Result<&'static [usize]> {
        Ok(&[])
    }

    /// The operand in whose buffer result 0 may be computed by [`run`](Self::run), in order of preference; both have
    /// the same size then. `run` sees that by [`Io::in_place`].
    fn in_place(&self) -> &'static [usize] {
        &[]
    }

    /// Whether result 0 has the bytes of operand 0, so that the plan may drop the node and use one buffer for both.
    fn is_view(&self) -> bool {
        false
    }

    /// Where each result begins in operand 0, in elements, if all results are runs of its elements: the plan may drop the
    /// node then. Shapes are known.
    fn cuts(&self, _operands: &[Option<&Fact>], _results: &[Dims]) -> Option<Dims> {
        None
    }

    /// Whether result 0, of this shape, has the elements of the operands one behind the other, so that each may be computed
    /// where it will lie.
    fn joins(&self, _result: &[usize]) -> bool {
        false
    }

    /// Whether equal operands give equal results: everything but random numbers.
    fn is_deterministic(&self) -> bool {
        true
    }

    /// Whether `run` takes `float16` and `bfloat16` operands as they are, as data movement does. Around the others the
    /// importer puts casts to and from `float32`.
    fn takes_half(&self) -> bool {
        false
    }

    /// The same operator for channels-last data (`[batch, spatial..., channels]`), if it has such a kernel; the layout
    /// pass starts from these.
    fn channels_last(&self, _operands: &[Option<&Fact>]) -> Option<Permuted> {
        None
    }

    /// The operator that gives the permuted result 0 for permuted operands, if there is one: axis `i` of a permuted
    /// tensor is axis `perm[i]` of the original. All results must be of the rank of `perm`, and all get permuted.
    fn permuted(&self, _perm: &[usize], _operands: &[Option<&Fact>]) -> Option<Permuted> {
        None
    }

    /// Whether the shapes of results are known only by computing them, as for a loop. `infer` computes the results then,
    /// if all operands are constants.
    fn shapes_by_running(&self) -> bool {
        false
    }

    /// The graphs that control flow runs.
    fn bodies(&self) -> Vec<&Graph> {
        Vec::new()
    }

    /// Operands whose elements, not only shapes, decide the shapes of the results.
    fn shape_operands(&self) -> &'static [usize] {
        &[]
    }
}

/// What becomes of an operand when an operator is moved to permuted data.
#[derive(Clone, Debug)]
pub enum Role {
    /// Gets permuted; one of lower rank is first brought to full rank with leading axes of size 1.
    Permute,
    /// Stays as it is.
    Keep,
    /// Becomes this constant.
    Replace(Arc<Tensor>),
}

/// An operator for permuted data.
#[derive(Clone, Debug)]
pub struct Permuted {
    /// The operator.
    pub op: Op,
    /// One entry per operand.
    pub roles: Vec<Role>,
}

impl Permuted {
    /// For an operator that treats all operands alike and knows no axes, such as `Add`.
    pub fn elementwise(op: &(impl Operator + Clone), operands: usize) -> Option<Permuted> {
        Some(Permuted { op: op.clone().into(), roles: vec![Role::Permute; operands] })
    }
}

/// Comparison of operators of any type.
pub trait Same {
    /// Whether the other one is of the same type and has equal attributes, where zeros are equal whatever their sign. An
    /// operator need not be the same as itself: NaN is not, and graphs inside of operators are not compared.
    fn same(&self, other: &dyn Operator) -> bool;
}

impl<T: Operator + PartialEq> Same for T {
    fn same(&self, other: &dyn Operator) -> bool {
        let other: &dyn Any = other;
        other.downcast_ref().is_some_and(|other| self == other)
    }
}

// As for `Compute`.
impl Debug for dyn Operator {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An operator with its attributes: shared, immutable, cheap to clone.
#[derive(Clone, Debug)]
pub struct Op(Arc<dyn Operator>);

impl Op {
    /// The operator as its own type, for pattern matching.
    pub fn get<T: Operator>(&self) -> Option<&T> {
        let any: &dyn Any = &*self.0;
        any.downcast_ref()
    }

    /// Whether both are the same object.
    pub fn is_same(&self, other: &Op) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether it is of this type.
    pub fn is<T: Operator>(&self) -> bool {
        self.get::<T>().is_some()
    }
}

impl<T: Operator> From<T> for Op {
    fn from(op: T) -> Self {
        Op(Arc::new(op))
    }
}

impl std::ops::Deref for Op {
    type Target = dyn Operator;
    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

/// Reads one operator's node of the model.
pub type Parse = fn(&mut Attributes) -> Result<Op>;

/// One operator of the file format and the range of its versions that the engine implements.
#[derive(Clone, Copy, Debug)]
pub struct Registration {
    /// `""` for ONNX's own.
    pub domain: &'static str,
    /// `op_type` of the node.
    pub name: &'static str,
    /// The first opset whose form of the operator `parse` understands.
    pub since: i64,
    /// Makes the operator.
    pub parse: Parse,
}

impl Registration {
    /// An operator of ONNX's own domain.
    pub const fn onnx(name: &'static str, since: i64, parse: Parse) -> Self {
        Registration { domain: "", name, since, parse }
    }

    /// An operator of onnxruntime's domain.
    pub const fn microsoft(name: &'static str, parse: Parse) -> Self {
        Registration { domain: "com.microsoft", name, since: 1, parse }
    }
}

macro_rules! ops {
    ($($module:ident)*) => {
        $(pub mod $module;)*

        /// Everything that can be imported, in the order of the list of modules.
        const REGISTRY: &[&[Registration]] = &[$($module::OPERATORS),*];
    };
}

ops! {
    attention
    batch_norm
    bias_gelu
    binary
    bit_cast
    cast
    center_crop_pad
    chain
    clip
    concat
    constant
    conv
    conv_transpose
    cumsum
    depth_to_space
    det
    dynamic_lstm
    einsum
    embed_norm
    expand
    eye_like
    gather
    gather_block_quantized
    gemm
    grid_sample
    group_query
    identity
    if_
    integer_product
    lookup
    loop_
    loss
    matmul
    matmul_nbits
    multi_head
    non_max_suppression
    non_zero
    norm
    one_hot
    pad
    patches
    pool
    qattention
    qgemm
    qlinear_binary
    qlinear_concat
    qlinear_pool
    qlinear_softmax
    qlinear_unary
    qlinear_where
    quantize
    quantize_microsoft
    quantized_binary
    quantized_matmul
    quantized_pool
    quantized_resize
    random
    range
    reduce
    reshape
    resize
    reverse_sequence
    rnn
    roi
    rotary
    scan
    scatter
    shape
    signal
    slice
    softmax
    split
    swiglu
    tensor_scatter
    text
    topk
    transpose
    trilu
    unary
    where_
    window
}

/// The registration for a node, if there is one.
pub fn find(domain: &str, name: &str) -> Option<&'static Registration> {
    // "ai.onnx" is another spelling of the default domain.
    let domain = if domain == "ai.onnx" { "" } else { domain };
    // Plain loops: this is done three times for each node, in code that browsers have not optimised by then.
    for operators in REGISTRY {
        for registration in *operators {
            if registration.name == name && registration.domain == domain {
                return Some(registration);
            }
        }
    }
    None
}

/// An error that says which element types an operator takes.
pub fn wrong_dtype(what: &str, met: DType, wanted: &str) -> Error {
    Error::new(ErrorCode::UnsupportedDtype, format!("{what} is {met}; {wanted} can be computed"))
}
