//! Static quantisation: every operator of a list between DequantizeLinear and QuantizeLinear.
//!
//! ```text
//! x ─ Q ─ DQ ─┐
//! W_q ─── DQ ─┤ Conv ─ y ─ Q ─ DQ ─ ...        x, y: one scale and zero point, from samples
//! b_q ─── DQ ─┘                                W: int8 with a scale per channel;  b: int32, scale s_x s_w
//! ```
//!
//! The list is the one that onnxruntime's `quantize_static` has by default, without the normalisations, and with
//! HardSwish and HardSigmoid. Every reader of a value gets the same quantised form of it. An activation that only cuts
//! off goes when the range of its result cuts off the same.

use super::calibrate::Calibration;
use super::dynamic::q_max;
use super::edit::{self, BEGIN, Editor, bytes_of, constant, elements, float, int, node, onnx_op, uses, with_int};
use super::report::NodeReport;
use super::skip::skips;
use super::weights::{affine, around, check_finite, symmetric};
use super::{QuantizeOptions, Rewrite};
use crate::error::Result;
use crate::onnx::{Graph, Node, TensorProto};
use crate::tensor::DType;
use std::collections::{HashMap, HashSet};

/// How an operator is quantised.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// By weights and a bias, if they are constant.
    Weighted,
    /// Results are the operand's elements, or lie between them: they keep its scale.
    Passing,
    /// All operands are values.
    Elementwise,
    /// The first operand is a value, the others are parameters.
    First,
}

fn kind(node: &Node) -> Option<Kind> {
    Some(match onnx_op(node) {
        "Conv" | "ConvTranspose" | "Gemm" | "MatMul" => Kind::Weighted,
        "MaxPool" | "Reshape" | "Transpose" | "Squeeze" | "Unsqueeze" | "Flatten" | "Resize" | "Split" | "Pad"
        | "Gather" => Kind::Passing,
        "Add" | "Mul" | "Concat" => Kind::Elementwise,
        "Relu" | "Clip" | "LeakyRelu" | "Sigmoid" | "HardSwish" | "HardSigmoid" | "AveragePool"
        | "GlobalAveragePool" | "Softmax" => Kind::First,
        _ => return None,
    })
}

/// The operands of a node that are values.
fn operands(node: &Node, kind: Kind) -> &[String] {
    let n = match kind {
        Kind::Weighted => 2,
        Kind::Passing | Kind::First => 1,
        Kind::Elementwise => usize::MAX,
    };
    &node.inputs[..n.min(node.inputs.len())]
}

fn selected(node: &Node, options: &QuantizeOptions) -> Option<Kind> {
    kind(node).filter(|_| !skips(options, node))
}

/// The values whose ranges are wanted.
pub(super) fn observed(graph: &Graph, options: &QuantizeOptions) -> Vec<String> {
    let constants: HashSet<&str> = graph.initializers.iter().map(|t| t.name.as_str()).collect();
    let mut names = Vec::new();
    for n in &graph.nodes {
        if let Some(kind) = selected(n, options) {
            let values = operands(n, kind).iter().chain(&n.outputs);
            names.extend(values.filter(|v| !v.is_empty() && !constants.contains(v.as_str())).cloned());
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// Scale and zero point of a value, and what they are called once they are constants.
#[derive(Clone)]
struct Params {
    scale: f32,
    zero: i32,
    /// The value whose constants these are.
    owner: String,
}

/// See above.
pub(super) struct Qdq {
    options: QuantizeOptions,
    inputs: Vec<String>,
    outputs: HashSet<String>,
    params: HashMap<String, Params>,
    /// Names of the constants of a scale and zero point, by the value that they were made for.
    made: HashMap<String, [String; 2]>,
    /// What readers of a value get.
    quantised: HashMap<String, String>,
    /// Weights and other constants, by what they became.
    constants: HashMap<String, (String, Vec<f32>)>,
}

impl Qdq {
    /// Decides which values are quantised, and takes out the activations that this makes superfluous.
    pub(super) fn new(graph: &mut Graph, options: &QuantizeOptions, calibration: &Calibration) -> Result<Self> {
        let ranges = calibration.ranges();
        let signed = options.signed_activations;
        let params = |name: &str| {
            ranges.get(name).map(|&(lo, hi)| {
                let (scale, zero) = affine(lo, hi, signed);
                Params { scale, zero, owner: name.to_owned() }
            })
        };
        drop_activations(graph, options, &|name| params(name).map(|p| (p.scale, p.zero)))?;
        let mut chosen: HashMap<String, Params> = HashMap::new();
        for n in &graph.nodes {
            let Some(kind) = selected(n, options).filter(|&k| k != Kind::Passing) else { continue };
            for name in operands(n, kind).iter().chain(n.outputs.first()) {
                if let Some(p) = params(name) {
                    chosen.insert(name.clone(), p);
                }
            }
            // A probability has a range of its own, whatever the samples were.
            if onnx_op(n) == "Softmax"
                && let Some(p) = n.outputs.first().and_then(|y| chosen.get_mut(y))
            {
                (p.scale, p.zero) = affine(0.0, 1.0, signed);
            }
        }
        for n in &graph.nodes {
            if selected(n, options) == Some(Kind::Passing)
                && let Some(p) = n.inputs.first().and_then(|x| chosen.get(x)).cloned()
            {
                for y in n.outputs.iter().filter(|y| ranges.contains_key(y.as_str())) {
                    chosen.insert(y.clone(), p.clone());
                }
            }
        }
        let inputs: Vec<String> = graph.inputs.iter().map(|i| i.name.clone()).collect();
        let outputs: HashSet<String> = graph.outputs.iter().map(|o| o.name.clone()).collect();
        // An input that is an output too cannot get another form.
        inputs.iter().filter(|i| outputs.contains(*i)).for_each(|i| {
            chosen.remove(i);
        });
        Ok(Qdq {
            options: options.clone(),
            inputs,
            outputs,
            params: chosen,
            made: HashMap::new(),
            quantised: HashMap::new(),
            constants: HashMap::new(),
        })
    }

    /// Puts QuantizeLinear and DequantizeLinear behind a value; the name of the result.
    fn pair(&mut self, e: &mut Editor, from: &str, value: &str, p: &Params) -> Result<String> {
        let [scale, zero] = match self.made.get(&p.owner) {
            Some(names) => names.clone(),
            None => {
                let names = ["scale", "zero_point"].map(|s| e.fresh(format!("{}_{s}", p.owner)));
                e.add(constant(&names[0], &[], &[p.scale])?);
                e.add(self.zeros(&names[1], &[], &[p.zero])?);
                self.made.insert(p.owner.clone(), names.clone());
                names
            }
        };
        let q = e.fresh(format!("{value}_quantized"));
        let to = if from == value { e.fresh(format!("{value}_dequantized")) } else { value.to_owned() };
        e.nodes.push(node("QuantizeLinear", format!("{value}_QuantizeLinear"), &[from, &scale, &zero], &[&q]));
        e.nodes.push(node("DequantizeLinear", format!("{value}_DequantizeLinear"), &[&q, &scale, &zero], &[&to]));
        if to != value {
            self.quantised.insert(value.to_owned(), to.clone());
        }
        Ok(to)
    }

    /// A constant of the activations' type.
    fn zeros(&self, name: &str, dims: &[usize], values: &[i32]) -> Result<TensorProto> {
        if self.options.signed_activations {
            constant(name, dims, &values.iter().map(|&v| v as i8).collect::<Vec<_>>())
        } else {
            constant(name, dims, &values.iter().map(|&v| v as u8).collect::<Vec<_>>())
        }
    }

    /// A constant operand in 8 bits; the name of its dequantised form. `None` when it holds no floats.
    fn operand(&mut self, e: &mut Editor, name: &str) -> Result<Option<String>> {
        if let Some((made, _)) = self.constants.get(name) {
            let made = made.clone();
            e.release(name);
            return Ok(Some(made));
        }
        let Some(t) = e.constant(name).filter(|t| t.dtype == DType::F32) else { return Ok(None) };
        let x = elements::<f32>(t)?;
        check_finite(name, x)?;
        let dims = t.dims.clone();
        let (lo, hi) = x.iter().fold((0f32, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
        let signed = self.options.signed_activations;
        let (scale, zero) = affine(lo, hi, signed);
        let least = if signed { -128 } else { 0 };
        let q: Vec<i32> = x
            .iter()
            .map(|v| ((v / scale).round_ties_even() as i32).saturating_add(zero).clamp(least, least + 255))
            .collect();
        let [values, scales, zeros, to] =
            ["quantized", "scale", "zero_point", "dequantized"].map(|s| e.fresh(format!("{name}_{s}")));
        e.add(self.zeros(&values, &dims, &q)?);
        e.add(constant(&scales, &[], &[scale])?);
        e.add(self.zeros(&zeros, &[], &[zero])?);
        e.nodes.push(node("DequantizeLinear", to.clone(), &[&values, &scales, &zeros], &[&to]));
        e.release(name);
        self.constants.insert(name.to_owned(), (to.clone(), vec![scale]));
        Ok(Some(to))
    }

    /// Weights and bias of a node whose first operand is quantised.
    fn weights(&mut self, e: &mut Editor, n: &mut Node) -> Result<()> {
        let Some(x) = self.params.get(&n.inputs[0]).cloned() else { return Ok(()) };
        let name = n.inputs[1].clone();
        let Some(t) = e.constant(&name).filter(|t| t.dtype == DType::F32) else { return Ok(()) };
        if bytes_of(t) == 0 {
            return Ok(());
        }
        let dims = t.dims.clone();
        let group = int(n, "group", 1);
        let axis = match (onnx_op(n), dims.len()) {
            _ if !self.options.per_channel => None,
            ("Conv", 3..) => Some(0),
            ("ConvTranspose", 3..) if group == 1 => Some(1),
            ("Gemm", 2) => Some(usize::from(int(n, "transB", 0) == 0)),
            ("MatMul", 2) => Some(1),
            _ => None,
        };
        // A bias is in units of both scales; those of the weights have to be large enough for it.
        let simple = onnx_op(n) != "Gemm" || float(n, "alpha", 1.0) == 1.0 && float(n, "beta", 1.0) == 1.0;
        let bias = n.inputs.get(2).filter(|b| !b.is_empty() && simple && onnx_op(n) != "MatMul").cloned();
        let channels = axis.map_or(1, |a| dims[a]);
        let bias = match &bias {
            Some(b) => match e.constant(b).filter(|t| t.dtype == DType::F32) {
                Some(t) if t.dims.len() == 1 && (channels == t.dims[0] || channels == 1) => {
                    let values = elements::<f32>(t)?.to_vec();
                    check_finite(b, &values)?;
                    Some((b.clone(), values))
                }
                _ => None,
            },
            None => None,
        };
        let key = format!("{name} {axis:?} {} {}", x.scale.to_bits(), bias.as_ref().map_or("", |(b, _)| b));
        let (to, scales) = match self.constants.get(&key) {
            Some(made) => made.clone(),
            None => {
                let w = elements::<f32>(t)?;
                check_finite(&name, w)?;
                let grid = axis.map_or([1, 1, w.len()], |a| around(&dims, a));
                let least = |c: usize| match &bias {
                    Some((_, b)) => {
                        let largest = if channels == 1 {
                            b.iter().fold(0f32, |m, v| m.max(v.abs()))
                        } else {
                            b.get(c).map_or(0.0, |v| v.abs())
                        };
                        largest / x.scale / (1u32 << 30) as f32
                    }
                    None => 0.0,
                };
                let q = symmetric(w, grid, q_max(&self.options), &least);
                let count = q.scales.len();
                let shape: &[usize] = if axis.is_some() { &[count] } else { &[] };
                let [values, scales, zeros, to] =
                    ["quantized", "scale", "zero_point", "dequantized"].map(|s| e.fresh(format!("{name}_{s}")));
                e.add(constant(&values, &dims, &q.values)?);
                e.add(constant(&scales, shape, &q.scales)?);
                e.add(constant(&zeros, shape, &vec![0i8; count])?);
                let back = node("DequantizeLinear", to.clone(), &[&values, &scales, &zeros], &[&to]);
                e.nodes.push(match axis {
                    Some(a) => with_int(back, "axis", a as i64),
                    None => back,
                });
                let how = if axis.is_some() { "int8 per channel" } else { "int8" };
                let (before, after) = (4 * q.values.len(), q.values.len() + 5 * count);
                e.note(NodeReport::new(n, &name, &dims, how, &q.noise, before, after));
                self.constants.insert(key, (to.clone(), q.scales.clone()));
                (to, q.scales)
            }
        };
        e.release(&name);
        n.inputs[1] = to;
        let Some((b, values)) = bias else { return Ok(()) };
        let units: Vec<f32> = scales.iter().map(|s| s * x.scale).collect();
        if units.iter().any(|&u| u < f32::MIN_POSITIVE || !u.is_finite()) {
            return Ok(());
        }
        let q: Vec<i32> = values
            .iter()
            .enumerate()
            .map(|(c, v)| (f64::from(*v) / f64::from(units[c % units.len()])).round_ties_even() as i32)
            .collect();
        let shape: &[usize] = if units.len() > 1 || axis.is_some() { &[units.len()] } else { &[] };
        let [ints, scale, zeros, to] = ["quantized", "quantized_scale", "quantized_zero_point", "dequantized"]
            .map(|s| e.fresh(format!("{b}_{s}")));
        e.add(constant(&ints, &[q.len()], &q)?);
        e.add(constant(&scale, shape, &units)?);
        e.add(constant(&zeros, shape, &vec![0i32; units.len()])?);
        let back = node("DequantizeLinear", to.clone(), &[&ints, &scale, &zeros], &[&to]);
        e.nodes.push(if shape.is_empty() { back } else { with_int(back, "axis", 0) });
        e.release(&b);
        n.inputs[2] = to;
        Ok(())
    }
}

impl Rewrite for Qdq {
    fn node(&mut self, e: &mut Editor, mut n: Node) -> Result<()> {
        if n.op_type == BEGIN {
            for name in self.inputs.clone() {
                if let Some(p) = self.params.get(&name).cloned() {
                    self.pair(e, &name, &name, &p)?;
                }
            }
            return Ok(());
        }
        let chosen = match kind(&n) {
            Some(kind) if !e.skips(&n) => Some(kind),
            _ => None,
        };
        let original = edit::names_of(&n);
        if let Some(kind) = chosen {
            if kind == Kind::Weighted && n.inputs.len() >= 2 {
                self.weights(e, &mut n)?;
            }
            // The other constants of a product and of element-wise operators.
            if matches!(kind, Kind::Weighted | Kind::Elementwise) {
                let quantises = |name: &String| self.params.contains_key(name);
                if original.inputs.iter().any(quantises) {
                    for i in 0..operands(&original, kind).len() {
                        if n.inputs[i] == original.inputs[i]
                            && let Some(to) = self.operand(e, &original.inputs[i])?
                        {
                            n.inputs[i] = to;
                        }
                    }
                }
            }
        }
        for name in &mut n.inputs {
            if let Some(to) = self.quantised.get(name) {
                name.clone_from(to);
            }
        }
        let mut behind = Vec::new();
        for y in &mut n.outputs {
            let Some(p) = self.params.get(y).cloned() else { continue };
            let value = y.clone();
            if self.outputs.contains(&value) {
                *y = e.fresh(format!("{value}_float"));
            }
            behind.push((y.clone(), value, p));
        }
        e.nodes.push(n);
        for (i, (from, value, p)) in behind.into_iter().enumerate() {
            let to = self.pair(e, &from, &value, &p)?;
            if i == 0 && chosen.is_some() {
                e.observe(&original, [value, to]);
            }
        }
        Ok(())
    }
}

/// Takes out Relu and Clip behind an operator that is quantised, where the integers of their result cut off the same.
fn drop_activations(
    graph: &mut Graph,
    options: &QuantizeOptions,
    params: &dyn Fn(&str) -> Option<(f32, i32)>,
) -> Result<()> {
    let uses = uses(graph);
    let scalars: HashMap<String, f32> = graph
        .initializers
        .iter()
        .filter(|t| t.dtype == DType::F32 && bytes_of(t) == 4)
        .map(|t| Ok((t.name.clone(), elements::<f32>(t)?[0])))
        .collect::<Result<_>>()?;
    let mut producers: HashMap<String, usize> = HashMap::new();
    let mut gone = vec![false; graph.nodes.len()];
    for (i, gone) in gone.iter_mut().enumerate() {
        let n = &graph.nodes[i];
        let bound = |at: usize, name: &str, none: f32| match n.inputs.get(at).filter(|s| !s.is_empty()) {
            Some(input) => scalars.get(input).copied(),
            None => Some(float(n, name, none)),
        };
        let bounds = match onnx_op(n) {
            "Relu" => Some((0.0, f32::INFINITY)),
            "Clip" => bound(1, "min", f32::NEG_INFINITY).zip(bound(2, "max", f32::INFINITY)),
            _ => None,
        };
        let place = match (bounds, n.inputs.first(), n.outputs.first()) {
            (Some((lo, hi)), Some(x), Some(y)) if selected(n, options).is_some() && uses.get(x) == Some(&1) => {
                let covered = params(y).is_some_and(|(scale, zero)| {
                    let least = if options.signed_activations { -128 } else { 0 };
                    let (from, to) = ((least - zero) as f32 * scale, (least + 255 - zero) as f32 * scale);
                    from >= lo - scale / 2.0 && to <= hi + scale / 2.0
                });
                producers.get(x).copied().filter(|_| covered).map(|p| (p, y.clone()))
            }
            _ => None,
        };
        match place {
            Some((p, y)) => {
                graph.nodes[p].outputs[0].clone_from(&y);
                producers.insert(y, p);
                *gone = true;
            }
            None => {
                let takes = matches!(selected(n, options), Some(Kind::Weighted | Kind::Elementwise | Kind::First));
                if let [y] = n.outputs.as_slice()
                    && takes
                {
                    producers.insert(y.clone(), i);
                }
            }
        }
    }
    let mut gone = gone.iter();
    graph.nodes.retain(|_| !gone.next().copied().unwrap_or(false));
    Ok(())
}

/// Puts a BatchNormalization into the weights of the convolution before it.
pub(super) fn fold_batch_norm(graph: &mut Graph, options: &QuantizeOptions) -> Result<()> {
    let uses = uses(graph);
    let places: HashMap<String, usize> =
        graph.initializers.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    let mut convs: HashMap<String, usize> = HashMap::new();
    let mut gone = vec![false; graph.nodes.len()];
    for (i, gone) in gone.iter_mut().enumerate() {
        let n = &graph.nodes[i];
        if skips(options, n) {
            continue;
        }
        if onnx_op(n) == "Conv" && n.inputs.len() >= 2 && n.outputs.len() == 1 {
            convs.insert(n.outputs[0].clone(), i);
            continue;
        }
        let inference = n.outputs.len() == 1 && int(n, "training_mode", 0) == 0;
        if onnx_op(n) != "BatchNormalization" || n.inputs.len() != 5 || !inference {
            continue;
        }
        let Some(&at) = convs.get(&n.inputs[0]).filter(|_| uses.get(&n.inputs[0]) == Some(&1)) else { continue };
        let conv = &graph.nodes[at];
        let bias = conv.inputs.get(2).filter(|b| !b.is_empty());
        let names = [&n.inputs[1], &n.inputs[2], &n.inputs[3], &n.inputs[4], &conv.inputs[1]];
        let found: Option<Vec<&TensorProto>> = names
            .into_iter()
            .chain(bias)
            .map(|name| places.get(name).map(|&p| &graph.initializers[p]).filter(|t| t.dtype == DType::F32))
            .collect();
        let Some(found) = found else { continue };
        let channels = found[4].dims.first().copied().unwrap_or(0);
        let lists = found[..4].iter().chain(&found[5..]).all(|t| t.dims.as_slice() == [channels]);
        if channels == 0 || !lists || bytes_of(found[4]) == 0 {
            continue;
        }
        let x = |k: usize| elements::<f32>(found[k]);
        let (gain, shift, mean, variance, w) = (x(0)?, x(1)?, x(2)?, x(3)?, x(4)?);
        let epsilon = float(n, "epsilon", 1e-5);
        let factors: Vec<f32> = gain.iter().zip(variance).map(|(g, v)| g / (v + epsilon).sqrt()).collect();
        let inner = w.len() / channels;
        let weights: Vec<f32> = w.iter().enumerate().map(|(k, v)| v * factors[k / inner.max(1)]).collect();
        let old = if found.len() > 5 { x(5)?.to_vec() } else { vec![0.0; channels] };
        let biases: Vec<f32> = (0..channels).map(|c| (old[c] - mean[c]) * factors[c] + shift[c]).collect();
        let base = n.outputs[0].clone();
        let (wn, bn) = (format!("{base}_folded_weights"), format!("{base}_folded_bias"));
        if places.contains_key(&wn) || places.contains_key(&bn) || uses.contains_key(&wn) || uses.contains_key(&bn) {
            continue;
        }
        let dims = found[4].dims.clone();
        let tensors = [constant(&wn, &dims, &weights)?, constant(&bn, &[channels], &biases)?];
        graph.initializers.extend(tensors);
        let conv = &mut graph.nodes[at];
        conv.inputs.truncate(2);
        conv.inputs[1] = wn;
        conv.inputs.push(bn);
        conv.outputs[0] = base;
        *gone = true;
    }
    let mut gone = gone.iter();
    graph.nodes.retain(|_| !gone.next().copied().unwrap_or(false));
    edit::drop_unread(graph);
    Ok(())
}
