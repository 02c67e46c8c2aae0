//! Quantised graphs run as integers. What quantisers write round an operator of real numbers becomes an operator of 8-bit
//! integers:
//!
//! ```text
//! Q(act(product(DQ(a), DQ(w), bias)))        -> product of integers, quantised again; the bounds of `act` among them
//! product(DQ(a), DQ(w), bias)                -> product of integers, made real
//! Q(act(DQ(a) + DQ(b))), the same with *     -> sum or product of quantised tensors
//! Q(f(DQ(x))), f any chain of functions      -> a table of 256 results
//! Q(mean over windows of DQ(x))              -> mean of integers
//! Q(linear or cubic Resize(DQ(x)))           -> interpolation of bytes
//! Q(DQ(a) DQ(b))                             -> product of integers, neither of which is known before
//! Q(act(transposed convolution))             -> convolution of integers whose channels become pixels
//! Q(Softmax(DQ(x)))                          -> shares of a table of 256 powers
//! Q(Concat(DQ(a), DQ(b), ..))                -> Concat of bytes, each brought to the scale of the result before
//! move(DQ(x))                                -> DQ(move(x)) for all that moves elements only, and for maxima
//! product quantised + other quantised        -> the other is added in the epilogue of the product
//! real(sums) * a_scale * w_scale             -> product of integers, made real
//! ```
//!
//! `Q` and `DQ` are QuantizeLinear and DequantizeLinear with one scale for a tensor of bytes; weights may have one for
//! each column. Runs before weights could be folded into real numbers.

mod after;
mod between;
mod lookup;
mod movement;
mod named;
mod transposed;

use super::activation::activation_of;
use super::pattern::{Operand, View, rewrite};
use super::{Pass, fold};
use crate::error::Result;
use crate::fact::axis_index;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Table;
use crate::ops::conv::Conv;
use crate::ops::gemm::Gemm;
use crate::ops::identity::Identity;
use crate::ops::integer_product::{IntegerProduct, Kind, Target};
use crate::ops::matmul::MatMul;
use crate::ops::quantize::{Linear, QuantizedProduct};
use crate::tensor::{DType, Tensor};
use weblane_kernels::conv::Layout;
use weblane_kernels::epilogue::Activation;

/// Sums and biases above this stay real: half of what 32 bits hold.
const MAX_SUM: i64 = 1 << 30;

/// Brings quantised graphs to integers.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let quantized = |n: &Node| n.op.is::<Linear>() || n.op.is::<QuantizedProduct>() || named::is_named(n);
    if !graph.nodes.iter().any(quantized) {
        return Ok(());
    }
    loop {
        rewrite(graph, pass, |view, i| {
            if let Some(found) = lookup::table(view, pass, i)? {
                return Ok(Some(found));
            }
            Ok(between::operator(view, i)
                .or_else(|| movement::moved(view, i))
                .or_else(|| named::product(view, i))
                .or_else(|| named::dynamic(view, i))
                .or_else(|| named::operator(view, i)))
        })?;
        if !movement::split(graph, pass)? {
            break;
        }
    }
    fold::drop_identities(graph);
    rewrite(graph, pass, |view, i| {
        Ok(after::real(view, i)?.or_else(|| after::residual(view, i)).or_else(|| after::clamp(view, i)))
    })?;
    Ok(())
}

/// Scale and zero point of a tensor of bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scheme {
    scale: f32,
    zero: i32,
    dtype: DType,
}

impl Scheme {
    fn new(view: &View, dtype: DType, scale: ValueId, zero: Option<ValueId>) -> Option<Scheme> {
        let scale = view.scalar(scale).filter(|s| s.is_finite() && *s > 0.0)?;
        let zero = match zero {
            Some(zero) => match *integers(view, zero)? {
                [zero] => zero,
                _ => return None,
            },
            None => 0,
        };
        is_byte(dtype).then_some(Scheme { scale, zero, dtype })
    }

    /// As operands of an operator: the scale, times `factor`, and the zero point.
    fn operands(&self, factor: f32) -> Option<[Operand; 2]> {
        let scale = Tensor::scalar(self.scale * factor).ok()?;
        Some([Operand::Constant(scale), Operand::Constant(self.zero_point()?)])
    }

    fn zero_point(&self) -> Option<Tensor> {
        byte_tensor(self.dtype, &[], &[self.zero as u8])
    }

    fn bounds(&self) -> (i32, i32) {
        if self.dtype == DType::U8 { (0, 255) } else { (-128, 127) }
    }

    fn quantize(&self, x: f32) -> i32 {
        let (lo, hi) = self.bounds();
        ((x / self.scale).round_ties_even() as i32).saturating_add(self.zero).clamp(lo, hi)
    }

    /// What `lo <= x <= hi` becomes; quantisation keeps order.
    fn quantize_bounds(&self, (lo, hi): (f32, f32)) -> (i32, i32) {
        (self.quantize(lo), self.quantize(hi))
    }

    /// The byte that stands for each code of another scheme.
    fn table_from(&self, from: &Scheme) -> Table<u8> {
        let one = |byte: u8| {
            let code = if from.dtype == DType::U8 { i32::from(byte) } else { i32::from(byte as i8) };
            self.quantize((code - from.zero) as f32 * from.scale) as u8
        };
        (0..=255).map(one).collect::<Vec<u8>>().into()
    }
}

fn is_byte(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::I8)
}

fn byte_tensor(dtype: DType, dims: &[usize], bytes: &[u8]) -> Option<Tensor> {
    match dtype {
        DType::U8 => Tensor::from_slice(dims, bytes).ok(),
        _ => Tensor::from_slice::<i8>(dims, bytemuck::cast_slice(bytes)).ok(),
    }
}

fn integers(view: &View, id: ValueId) -> Option<Vec<i32>> {
    Some(view.tensor(id)?.view().to_i64s().ok()?.iter().map(|&v| v as i32).collect())
}

fn input(node: &Node, k: usize) -> Option<ValueId> {
    node.inputs.get(k).copied().flatten()
}

/// The value itself behind identities.
fn strip(view: &View, mut id: ValueId) -> ValueId {
    while let Some((_, node)) = view.producer(id)
        && node.op.is::<Identity>()
        && let Some(x) = input(node, 0)
    {
        id = x;
    }
    id
}

/// The bytes behind a value that is their DequantizeLinear.
fn dequantized(view: &View, id: ValueId) -> Option<(ValueId, Scheme)> {
    let (_, node) = view.producer(strip(view, id))?;
    node.op.get::<Linear>().filter(|l| l.back && l.block == 0)?;
    let x = strip(view, input(node, 0)?);
    let scheme = Scheme::new(view, view.fact(x)?.dtype, input(node, 1)?, input(node, 2))?;
    view.is_f32(id).then_some((x, scheme))
}

/// The real number that a node quantises, and how.
fn quantizer(view: &View, node: &Node) -> Option<(ValueId, Scheme)> {
    node.op.get::<Linear>().filter(|l| !l.back && l.block == 0)?;
    let x = strip(view, input(node, 0)?);
    let scheme = Scheme::new(view, view.fact(node.outputs[0])?.dtype, input(node, 1)?, input(node, 2))?;
    view.is_f32(x).then_some((x, scheme))
}

/// Constant bytes with scales for the whole or for each index of an axis.
struct Weights {
    id: ValueId,
    scales: Vec<f32>,
    zeros: Vec<i32>,
    dims: Vec<usize>,
    /// Largest distance from a zero point.
    reach: i64,
}

impl Weights {
    fn new(view: &View, x: ValueId, scale: ValueId, zero: Option<ValueId>) -> Option<Weights> {
        let tensor = view.tensor(x).filter(|t| is_byte(t.dtype()))?;
        let scales = view.tensor(scale)?.as_slice::<f32>().ok()?.to_vec();
        let zeros = match zero {
            Some(zero) => integers(view, zero)?,
            None => vec![0],
        };
        if scales.is_empty() || scales.iter().any(|s| !s.is_finite() || *s <= 0.0) || zeros.is_empty() {
            return None;
        }
        let reach = if tensor.dtype() == DType::I8 && zeros.iter().all(|&z| z == 0) { 128 } else { 255 };
        Some(Weights { id: x, scales, zeros, dims: tensor.dims().to_vec(), reach })
    }

    /// Behind their DequantizeLinear, with scales along `axis` or for the whole.
    fn dequantized(view: &View, id: ValueId, axis: usize) -> Option<Weights> {
        let (_, node) = view.producer(strip(view, id))?;
        let linear = node.op.get::<Linear>().filter(|l| l.back && l.block == 0)?;
        let weights = Weights::new(view, strip(view, input(node, 0)?), input(node, 1)?, input(node, 2))?;
        let along = weights.scales.len() == 1 || axis_index(linear.axis, weights.dims.len()).ok()? == axis;
        (along && view.is_f32(id)).then_some(weights)
    }

    /// Whether the columns are `n`, and dot products of length `k` fit into 32 bits.
    fn fit(&self, k: usize, n: usize) -> bool {
        let lists = [self.scales.len(), self.zeros.len()];
        lists.into_iter().all(|len| len == 1 || len == n)
            && i64::try_from(k).is_ok_and(|k| k.saturating_mul(255 * self.reach) <= MAX_SUM)
    }
}

/// A product of real numbers that are quantised.
struct Product {
    kind: Kind,
    a: ValueId,
    a_scheme: Scheme,
    b: Weights,
    /// What a sum of 1 stands for: one for all columns, or one for each.
    units: Vec<f32>,
    /// One for each column.
    bias: Option<Vec<f32>>,
}

impl Product {
    fn of(view: &View, node: &Node) -> Option<Product> {
        let (a, b) = (input(node, 0)?, input(node, 1)?);
        let (kind, b, alpha, bias) = if let Some(conv) = node.op.get::<Conv>() {
            let plain = conv.layout == Layout::Nchw && !conv.residual && conv.activation == Activation::Identity;
            let bias = input(node, 2).map(|id| (id, 1.0));
            (Kind::Conv(plain.then(|| conv.clone())?), Weights::dequantized(view, b, 0)?, 1.0, bias)
        } else if let Some(m) = node.op.get::<MatMul>() {
            let plain = !m.bias && !m.residual && !m.trans_a && m.activation == Activation::Identity;
            let m = plain.then(|| MatMul { alpha: 1.0, ..m.clone() })?;
            let axis = usize::from(!m.trans_b);
            (Kind::MatMul(m), Weights::dequantized(view, b, axis)?, node.op.get::<MatMul>()?.alpha, None)
        } else {
            let g = node.op.get::<Gemm>().filter(|g| !g.trans_a && g.activation == Activation::Identity)?;
            let bias = input(node, 2).map(|id| (id, g.beta));
            let m = MatMul { trans_b: g.trans_b, ..MatMul::default() };
            (Kind::MatMul(m), Weights::dequantized(view, b, usize::from(!g.trans_b))?, g.alpha, bias)
        };
        let (a, a_scheme) = dequantized(view, a)?;
        let (k, n) = columns(&kind, &b.dims)?;
        if !(b.fit(k, n) && alpha.is_finite() && alpha > 0.0) {
            return None;
        }
        let bias = match bias {
            None => None,
            Some((id, beta)) => {
                let tensor = view.tensor(id).filter(|t| matches!(t.dims(), [] | [_] | [1, _]))?;
                match tensor.as_slice::<f32>().ok()? {
                    [one] => Some(vec![one * beta; n]),
                    row if row.len() == n => Some(row.iter().map(|v| v * beta).collect()),
                    _ => return None,
                }
            }
        };
        let units = b.scales.iter().map(|s| a_scheme.scale * s * alpha).collect();
        Some(Product { kind, a, a_scheme, b, units, bias })
    }

    /// The bias in units of the sums.
    fn integer_bias(&self) -> Option<Option<Table<i32>>> {
        let Some(bias) = &self.bias else { return Some(None) };
        let unit = |j: usize| f64::from(self.units[if self.units.len() == 1 { 0 } else { j }]);
        let one = |(j, v): (usize, &f32)| {
            let v = (f64::from(*v) / unit(j)).round_ties_even();
            (v.abs() <= MAX_SUM as f64).then_some(v as i32)
        };
        Some(Some(bias.iter().enumerate().map(one).collect::<Option<Vec<_>>>()?.into()))
    }

    fn operator(self, bias: Option<Table<i32>>, target: Target) -> (IntegerProduct, Vec<Operand>) {
        let b_zero = Table::shortest(self.b.zeros);
        let op = IntegerProduct { kind: self.kind, a_zero: Some(self.a_scheme.zero), b_zero, bias, target };
        (op, vec![self.a.into(), self.b.id.into()])
    }

    /// With sums quantised again.
    fn quantized(self, y: Scheme, (lo, hi): (i32, i32)) -> Option<(IntegerProduct, Vec<Operand>)> {
        let multiplier = Table::shortest(self.units.iter().map(|u| u / y.scale).collect());
        let bias = self.integer_bias()?;
        let target = Target::Quantized { dtype: y.dtype, multiplier, zero: y.zero, lo, hi, add: None };
        Some(self.operator(bias, target))
    }
}

/// Length of the dot products and number of columns.
fn columns(kind: &Kind, b: &[usize]) -> Option<(usize, usize)> {
    match (kind, b) {
        (Kind::Conv(_), [n, rest @ ..]) if !rest.is_empty() => {
            Some((rest.iter().fold(1, |k: usize, &d| k.saturating_mul(d)), *n))
        }
        (Kind::MatMul(m), &[r, c]) => Some(if m.trans_b { (c, r) } else { (r, c) }),
        _ => None,
    }
}

/// What stands before the activations that only bound a value, if nobody else reads it, and their bounds.
fn bounded(view: &View, mut x: ValueId, nodes: &mut Vec<usize>) -> (ValueId, (f32, f32)) {
    let (mut lo, mut hi) = (f32::NEG_INFINITY, f32::INFINITY);
    while let Some((i, node)) = view.producer(x)
        && view.uses(x) == 1
        && let Some((inner, activation)) = activation_of(view, node)
    {
        let (a, b) = match activation {
            Activation::Relu => (0.0, f32::INFINITY),
            Activation::Clip { lo, hi } if lo <= hi => (lo, hi),
            _ => break,
        };
        (lo, hi) = (a.clamp(lo, hi), b.clamp(lo, hi));
        nodes.push(i);
        x = strip(view, inner);
    }
    (x, (lo, hi))
}

#[cfg(test)]
mod tests;
