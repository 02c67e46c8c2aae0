//! Half precision, there and back.
//!
//! ```text
//! x ─ Cast ─ x_fp16 ─┐
//! W_fp16 ────────────┤ MatMul ─ y_fp16 ─ Cast ─ y          casts where a reader wants the other form, once per value
//! ```
//!
//! Operators that have no half-precision form, or lose too much by it, stay `float32`; so do those with bodies.

use super::edit::{BEGIN, Editor, constant, elements, has_bodies, is_onnx, label, names_in_bodies, node, with_int};
use super::report::{Report, converted};
use super::weights::Noise;
use super::{QuantizeOptions, Rewrite, edit};
use crate::analyze::{Folding, analyze};
use crate::error::{Error, ErrorCode, Result};
use crate::import::import;
use crate::onnx::{Attribute, AttributeValue, Graph, Model, Node, TensorProto, TypeProto};
use crate::tensor::DType;
use half::f16;
use std::collections::{HashMap, HashSet};
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;

/// Operators that stay `float32`.
const BLOCKED: &[&str] = &[
    "Bernoulli",
    "CumSum",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "Max",
    "Min",
    "Multinomial",
    "NonMaxSuppression",
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Range",
    "Resize",
    "RoiAlign",
    "TopK",
    "Upsample",
];

const F32: i64 = DType::F32 as i64;
const F16: i64 = DType::F16 as i64;

/// See above.
pub(super) struct Half {
    keep_io: bool,
    inputs: Vec<String>,
    outputs: HashSet<String>,
    captured: HashSet<String>,
    /// Values that are `float32` in the model.
    floats: HashSet<String>,
    /// What the two forms of a value are called, as far as they exist.
    half: HashMap<String, String>,
    full: HashMap<String, String>,
}

impl Half {
    pub(super) fn new(model: &mut Model, options: &QuantizeOptions) -> Result<Self> {
        let floats = float_values(model.clone())?;
        let graph = &mut model.graph;
        graph.value_info.clear();
        let captured: HashSet<String> = names_in_bodies(&graph.nodes).into_iter().map(str::to_owned).collect();
        let outputs: HashSet<String> = graph.outputs.iter().map(|o| o.name.clone()).collect();
        let inputs: Vec<String> = graph.inputs.iter().map(|i| i.name.clone()).filter(|n| floats.contains(n)).collect();
        if !options.keep_io {
            let both = inputs.iter().chain(&outputs).find(|n| captured.contains(*n) && floats.contains(*n));
            let passed = inputs.iter().find(|n| outputs.contains(*n));
            if let Some(name) = both.or(passed) {
                return Err(Error::new(
                    ErrorCode::InvalidOption,
                    format!(
                        "\"{name}\" is read as float32 as well; inputs and outputs of this model have to stay float32"
                    ),
                ));
            }
            for info in graph.inputs.iter_mut().chain(&mut graph.outputs) {
                change_type(info.ty.as_mut(), F32, F16);
            }
        }
        Ok(Half {
            keep_io: options.keep_io,
            inputs,
            outputs,
            captured,
            floats,
            half: HashMap::new(),
            full: HashMap::new(),
        })
    }

    /// The name of a value in the wanted form; makes it when nobody has yet.
    fn form(&mut self, e: &mut Editor, name: &str, half: bool) -> Result<String> {
        if let Some(t) = e.constant(name).filter(|t| t.dtype == DType::F32) {
            if !half {
                return Ok(name.to_owned());
            }
            if let Some(known) = self.half.get(name).cloned() {
                e.release(name);
                return Ok(known);
            }
            let (mut small, noise) = to_half(t)?;
            let report = converted(name, t, "float16", &noise, edit::bytes_of(&small));
            e.note(report);
            small.name = e.fresh(format!("{name}_fp16"));
            let to = small.name.clone();
            e.add(small);
            e.release(name);
            self.half.insert(name.to_owned(), to.clone());
            return Ok(to);
        }
        if !self.floats.contains(name) {
            return Ok(name.to_owned());
        }
        let (there, other) = if half { (&self.half, &self.full) } else { (&self.full, &self.half) };
        if let Some(known) = there.get(name) {
            return Ok(known.clone());
        }
        // Neither form exists of a constant whose elements are in another form, such as a sparse one.
        let from = other.get(name).cloned().unwrap_or_else(|| name.to_owned());
        let to = e.fresh(format!("{name}_{}", if half { "fp16" } else { "fp32" }));
        cast(e, &from, &to, half);
        let there = if half { &mut self.half } else { &mut self.full };
        there.insert(name.to_owned(), to.clone());
        Ok(to)
    }
}

fn cast(e: &mut Editor, from: &str, to: &str, half: bool) {
    e.nodes.push(with_int(node("Cast", format!("{to}_cast"), &[from], &[to]), "to", if half { F16 } else { F32 }));
}

fn stays(node: &Node) -> bool {
    let known = if is_onnx(node) {
        BLOCKED.contains(&node.op_type.as_str())
    } else {
        node.domain != edit::MICROSOFT || ["QLinear", "Quant", "Integer"].iter().any(|s| node.op_type.contains(s))
    };
    let constant =
        node.op_type == "Constant" && node.attributes.iter().any(|a| !matches!(a.value, AttributeValue::Tensor(_)));
    known || constant || has_bodies(node)
}

impl Rewrite for Half {
    fn node(&mut self, e: &mut Editor, mut n: Node) -> Result<()> {
        if n.op_type == BEGIN {
            for name in self.inputs.clone() {
                let map = if self.keep_io { &mut self.full } else { &mut self.half };
                map.insert(name.clone(), name);
            }
            return Ok(());
        }
        let blocked = stays(&n);
        if blocked && n.outputs.iter().any(|y| self.floats.contains(y)) && !has_bodies(&n) {
            e.skip(&n, "stays float32");
        }
        let blocked = blocked || e.skips(&n);
        for x in n.inputs.iter_mut().filter(|x| !x.is_empty()) {
            *x = self.form(e, x, !blocked)?;
        }
        if !blocked {
            change_attributes(&mut n)?;
        }
        let mut casts = Vec::new();
        for y in n.outputs.iter_mut().filter(|y| self.floats.contains(*y)) {
            let value = y.clone();
            let is_output = self.outputs.contains(&value);
            // The model's name belongs to the form that outputs and bodies want.
            let named_half = is_output && !self.keep_io;
            let other = e.fresh(format!("{value}_{}", if named_half { "fp32" } else { "fp16" }));
            let (half, full) = if named_half { (value.clone(), other) } else { (other, value.clone()) };
            *y = if blocked { full.clone() } else { half.clone() };
            let wanted = is_output || self.captured.contains(&value);
            if wanted && *y != value {
                casts.push((y.clone(), value.clone(), named_half));
                self.half.insert(value.clone(), half);
                self.full.insert(value, full);
            } else if blocked {
                self.full.insert(value, full);
            } else {
                self.half.insert(value, half);
            }
        }
        e.nodes.push(n);
        for (from, to, half) in casts {
            cast(e, &from, &to, half);
        }
        Ok(())
    }
}

/// Attributes that say which element type a result has.
fn change_attributes(n: &mut Node) -> Result<()> {
    let op = n.op_type.clone();
    for a in &mut n.attributes {
        match &mut a.value {
            AttributeValue::Int(i)
                if *i == F32 && matches!((op.as_str(), a.name.as_str()), ("Cast", "to") | (_, "dtype")) =>
            {
                *i = F16;
            }
            AttributeValue::Tensor(t) if t.dtype == DType::F32 => *t = to_half(t)?.0,
            _ => {}
        }
    }
    if op == "ConstantOfShape" && n.attributes.is_empty() {
        let value = AttributeValue::Tensor(constant("", &[1], &[f16::ZERO])?);
        n.attributes.push(Attribute { name: "value".into(), value });
    }
    Ok(())
}

/// Finite numbers stay finite: exporters write masks as the least float.
fn to_half(t: &TensorProto) -> Result<(TensorProto, Noise)> {
    let mut noise = Noise::default();
    let narrow = |&v: &f32| {
        let h = f16::from_f32(v);
        let h = if h.is_infinite() && v.is_finite() { f16::MAX.copysign(h) } else { h };
        if v.is_finite() {
            noise.add(v, h.to_f32());
        }
        h
    };
    let values: Vec<f16> = elements::<f32>(t)?.iter().map(narrow).collect();
    Ok((constant(&t.name, &t.dims, &values)?, noise))
}

/// The values of the graph that are `float32`.
fn float_values(model: Model) -> Result<HashSet<String>> {
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
        .collect::<Result<Vec<_>>>()?;
    let facts = Pool::new(1).run(Isa::best(), |cx| analyze(&graph, &declared, cx, Folding { max_bytes: 0 }))?;
    let mut floats = HashSet::new();
    for (value, fact) in graph.values.iter().zip(&facts).filter(|(v, _)| !v.name.is_empty()) {
        let dtype = fact.as_ref().or(value.declared.as_ref()).map(|f| f.dtype);
        match dtype {
            Some(DType::F32) => {
                floats.insert(value.name.clone());
            }
            Some(_) => {}
            None => {
                return Err(Error::invalid_model(format!("the element type of \"{}\" cannot be found", value.name)));
            }
        }
    }
    Ok(floats)
}

fn change_type(ty: Option<&mut TypeProto>, from: i64, to: i64) {
    let mut next = ty;
    while let Some(ty) = next {
        next = match ty {
            TypeProto::Tensor { elem_type, .. } | TypeProto::SparseTensor { elem_type, .. } => {
                if i64::from(*elem_type) == from {
                    *elem_type = to as i32;
                }
                None
            }
            TypeProto::Sequence(t) | TypeProto::Optional(t) => Some(t),
            TypeProto::Map { value_type, .. } => Some(value_type),
            TypeProto::Opaque { .. } => None,
        };
    }
}

/// Nodes stay as they are.
pub(super) struct Keep;

impl Rewrite for Keep {
    fn node(&mut self, e: &mut Editor, node: Node) -> Result<()> {
        e.nodes.push(node);
        Ok(())
    }
}

/// Every half-precision number of the model becomes a single-precision one, in bodies and functions too.
pub(super) fn to_float32(model: &mut Model, report: &mut Report) -> Result<()> {
    let mut graphs: Vec<&mut Graph> = vec![&mut model.graph];
    for f in &mut model.functions {
        f.value_info.iter_mut().for_each(|v| change_type(v.ty.as_mut(), F16, F32));
        widen_attributes(&mut f.nodes, &mut graphs)?;
    }
    while let Some(g) = graphs.pop() {
        for t in &mut g.initializers {
            if t.dtype == DType::F16 {
                let after = edit::bytes_of(t).saturating_mul(2);
                report.nodes.push(converted(&t.name, t, "float32", &Noise::default(), after));
                widen(t)?;
            }
        }
        for s in &mut g.sparse_initializers {
            widen(&mut s.values)?;
        }
        for v in g.inputs.iter_mut().chain(&mut g.outputs).chain(&mut g.value_info) {
            change_type(v.ty.as_mut(), F16, F32);
        }
        widen_attributes(&mut g.nodes, &mut graphs)?;
    }
    Ok(())
}

fn widen(t: &mut TensorProto) -> Result<()> {
    if t.dtype == DType::F16 {
        let values: Vec<f32> = elements::<f16>(t)?.iter().map(|v| v.to_f32()).collect();
        *t = constant(&t.name, &t.dims, &values)?;
    }
    Ok(())
}

fn widen_attributes<'a>(nodes: &'a mut [Node], graphs: &mut Vec<&'a mut Graph>) -> Result<()> {
    for n in nodes {
        let (name, op) = (label(n).to_owned(), n.op_type.clone());
        for a in &mut n.attributes {
            match &mut a.value {
                AttributeValue::Int(i)
                    if *i == F16 && matches!((op.as_str(), a.name.as_str()), ("Cast", "to") | (_, "dtype")) =>
                {
                    *i = F32;
                }
                AttributeValue::Tensor(t) => widen(t).map_err(|e| e.at(&name, &op))?,
                AttributeValue::Graph(g) => graphs.push(g),
                AttributeValue::Graphs(gs) => graphs.extend(gs),
                _ => {}
            }
        }
    }
    Ok(())
}
