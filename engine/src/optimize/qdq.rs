//! Quantised graphs run as integers. What quantisers write round an operator of real numbers becomes an operator of 8-bit
//! integers:
//!
//! ```text
//! Q(act(product(DQ(a), DQ(w), bias)))        -> product of integers, quantised again; the bounds of `act` among them
//! product(DQ(a), DQ(w), bias)                -> product of integers, made real
//! Q(act(DQ(a) + DQ(b))), the same with *     -> sum or product of quantised tensors
//! Q(f(DQ(x))), f any chain of functions      -> a table of 256 results
//! Q(mean over windows of DQ(x))              -> mean of integers
//! Q(DQ(a) DQ(b))                             -> product of integers, neither of which is known before
//! Q(act(transposed convolution))             -> convolution of integers whose channels become pixels; see [`transposed`]
//! Q(Concat(DQ(a), DQ(b), ..))                -> Concat of bytes, each brought to the scale of the result before
//! move(DQ(x))                                -> DQ(move(x)) for all that moves elements only, and for maxima
//! product quantised + other quantised        -> the other is added in the epilogue of the product
//! real(sums) * a_scale * w_scale             -> product of integers, made real
//! ```
//!
//! `Q` and `DQ` are QuantizeLinear and DequantizeLinear with one scale for a tensor of bytes; weights may have one for
//! each column. Runs before weights could be folded into real numbers.

use super::activation::activation_of;
use super::pattern::{Operand, Replacement, View, rewrite};
use super::{Pass, fold};
use crate::analyze::{Folding, infer_node};
use crate::error::Result;
use crate::fact::{Fact, axis_index};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::binary::{Arithmetic, Function};
use crate::ops::cast::Cast;
use crate::ops::clip::Clip;
use crate::ops::concat::Concat;
use crate::ops::conv::Conv;
use crate::ops::conv_transpose::ConvTranspose;
use crate::ops::depth_to_space::Blocks;
use crate::ops::gemm::Gemm;
use crate::ops::identity::Identity;
use crate::ops::integer_product::{IntegerProduct, Kind, Sum, Target};
use crate::ops::lookup::Lookup;
use crate::ops::matmul::MatMul;
use crate::ops::pad::{Mode, Pad};
use crate::ops::pool::{GlobalPool, Pool};
use crate::ops::quantize::{Linear, Product as QuantizedKind, QuantizedProduct};
use crate::ops::quantized_binary::QuantizedBinary;
use crate::ops::quantized_pool::{QuantizedMean, Windows};
use crate::ops::reduce::Reduce;
use crate::ops::reshape::Squeeze;
use crate::ops::resize::{self, Coordinates, Resize};
use crate::ops::slice::Slice;
use crate::ops::spatial::{AutoPad, Axes, Window};
use crate::ops::split::Split;
use crate::ops::unary::Pointwise;
use crate::ops::{Op, Table};
use crate::tensor::{DType, Tensor};
use std::collections::BTreeSet;
use std::sync::Arc;
use weblane_kernels::conv::Layout;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{Binary, Function as QuantizedFunction, Mean};
use weblane_kernels::pool::PoolOp;
use weblane_kernels::reduce::Reduction;

/// Nodes that a table may stand for.
const MAX_REGION: usize = 32;

/// Sums and biases above this stay real: half of what 32 bits hold.
const MAX_SUM: i64 = 1 << 30;

/// Brings quantised graphs to integers.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let quantized = |n: &Node| n.op.is::<Linear>() || n.op.is::<QuantizedProduct>();
    if !graph.nodes.iter().any(quantized) {
        return Ok(());
    }
    loop {
        rewrite(graph, pass, |view, i| {
            if let Some(found) = lookup(view, pass, i)? {
                return Ok(Some(found));
            }
            Ok(between(view, i)?
                .or_else(|| moved(view, i))
                .or_else(|| named_product(view, i))
                .or_else(|| dynamic(view, i)))
        })?;
        if !split(graph, pass)? {
            break;
        }
    }
    fold::drop_identities(graph);
    rewrite(graph, pass, |view, i| Ok(real(view, i)?.or_else(|| residual(view, i)).or_else(|| clamp(view, i))))?;
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

/// A QuantizeLinear with what it quantises.
fn between(view: &View, i: usize) -> Result<Option<Replacement>> {
    let find = || {
        let (x, y) = quantizer(view, &view.graph.nodes[i])?;
        let mut nodes = vec![i];
        let (x, bounds) = bounded(view, x, &mut nodes);
        let (p, node) = view.producer(x).filter(|(_, n)| view.uses(x) == 1 && n.outputs.len() == 1)?;
        let bounds = y.quantize_bounds(bounds);
        nodes.push(p);
        let (op, operands) = product(view, node, y, bounds)
            .or_else(|| binary(view, node, y, bounds))
            .or_else(|| transposed(view, node, y, bounds))
            .or_else(|| mean(view, node, y, bounds))
            .or_else(|| if bounds == y.bounds() { concat(view, node, y) } else { None })
            .or_else(|| if bounds == y.bounds() { product_of_two(view, node, y) } else { None })?;
        Some(Replacement { root: i, nodes, op, operands })
    };
    Ok(find())
}

type Made = (Op, Vec<Operand>);

fn product(view: &View, node: &Node, y: Scheme, bounds: (i32, i32)) -> Option<Made> {
    let (op, operands) = Product::of(view, node)?.quantized(y, bounds)?;
    Some((op.into(), operands))
}

fn binary(view: &View, node: &Node, y: Scheme, (lo, hi): (i32, i32)) -> Option<Made> {
    let arithmetic = node.op.get::<Arithmetic>()?;
    let Function::Kernel(_) = arithmetic.function else { return None };
    let [(a, sa), (b, sb)] = [dequantized(view, input(node, 0)?)?, dequantized(view, input(node, 1)?)?];
    let function = match node.op.name() {
        "Add" => QuantizedFunction::Add { first: sa.scale / y.scale, second: sb.scale / y.scale },
        "Mul" => QuantizedFunction::Mul { scale: sa.scale * sb.scale / y.scale },
        _ => return None,
    };
    let binary = Binary { function, zeros: [sa.zero, sb.zero], zero: y.zero, lo, hi };
    Some((QuantizedBinary { binary, dtype: y.dtype }.into(), vec![a.into(), b.into()]))
}

fn mean(view: &View, node: &Node, y: Scheme, (lo, hi): (i32, i32)) -> Option<Made> {
    let mut squeezed = None;
    let (windows, op) = if let Some(pool) = node.op.get::<Pool>() {
        (Windows::Sliding(pool.clone()), pool.op)
    } else if let Some(reduce) = node.op.get::<Reduce>() {
        let spatial = spatial_mean(view, node, reduce)?;
        squeezed = (!reduce.keep).then_some(spatial);
        let op = PoolOp::Average { include_pad: false };
        (Windows::Global(GlobalPool { op, layout: Layout::Nchw }), op)
    } else {
        let pool = node.op.get::<GlobalPool>()?;
        (Windows::Global(pool.clone()), pool.op)
    };
    let PoolOp::Average { include_pad } = op else { return None };
    let (x, from) = dequantized(view, input(node, 0)?)?;
    let mean = Mean { x_zero: from.zero, multiplier: from.scale / y.scale, zero: y.zero, lo, hi, include_pad };
    let op = QuantizedMean { windows, mean, dtype: y.dtype };
    Some(match squeezed {
        None => (op.into(), vec![x.into()]),
        axes => (Squeeze { axes }.into(), vec![Operand::Computed(op.into(), vec![x.into()])]),
    })
}

/// The axes of a mean over all but batch and channels.
fn spatial_mean(view: &View, node: &Node, reduce: &Reduce) -> Option<Vec<i64>> {
    let rank = view.fact(input(node, 0)?)?.rank().filter(|r| (3..=5).contains(r))?;
    let axes: Vec<i64> = match input(node, 1) {
        Some(id) => view.fact(id)?.i64s()?.to_vec(),
        None => reduce.axes.as_ref()?.to_vec(),
    };
    let found: Option<BTreeSet<usize>> = axes.iter().map(|&a| axis_index(a, rank).ok()).collect();
    let all = found?.into_iter().eq(2..rank) && axes.len() == rank - 2 && reduce.reduction == Reduction::Mean;
    all.then(|| (2..rank as i64).collect())
}

/// A product of matrices, neither of which is known before.
fn product_of_two(view: &View, node: &Node, y: Scheme) -> Option<Made> {
    let m = node.op.get::<MatMul>()?;
    let plain = !(m.bias || m.residual || m.trans_a || m.trans_b) && m.activation == Activation::Identity;
    let scaled = m.alpha.is_finite() && m.alpha > 0.0;
    let [(a, sa), (b, sb)] = [dequantized(view, input(node, 0)?)?, dequantized(view, input(node, 1)?)?];
    let mut operands = vec![a.into()];
    operands.extend(sa.operands(m.alpha)?);
    operands.push(b.into());
    operands.extend(sb.operands(1.0)?);
    operands.extend(y.operands(1.0)?);
    let op = QuantizedProduct { kind: QuantizedKind::MatMul, scaled: true };
    (plain && scaled).then(|| (op.into(), operands))
}

/// A transposed convolution as a convolution whose channels become pixels.
///
/// ```text
/// y[s q + p] = sum over j of x[q - j] w[s j + p]     stride s, phase p in 0..s, window of taps = ceil(k / s)
/// ```
///
/// Every phase is a convolution with the flipped weights at a distance of `s`; all phases together are one with `s s` times
/// the channels, the phase first, which DepthToSpace lays out. What the padding cuts off is cut off by whole windows of the
/// convolution first, the rest by Slice. (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016)
fn transposed(view: &View, node: &Node, y: Scheme, bounds: (i32, i32)) -> Option<Made> {
    let c = node.op.get::<ConvTranspose>()?;
    let plain = c.layout == Layout::Nchw && c.activation == Activation::Identity && c.groups == 1;
    let sized = c.output_shape.is_none() && c.window.auto_pad == AutoPad::NotSet;
    let (a, a_scheme) = dequantized(view, input(node, 0)?)?;
    let b = Weights::dequantized(view, input(node, 1)?, 1)?;
    let at = |list: &[usize], i: usize, default| list.get(i).copied().unwrap_or(default);
    let stride = at(&c.window.strides, 0, 1);
    let even = at(&c.window.strides, 1, 1) == stride && c.window.dilations.iter().all(|&d| d == 1);
    let &[inputs, channels, height, width] = b.dims.as_slice() else { return None };
    if !(plain && sized && even) || stride == 0 || inputs.min(channels).min(height).min(width) == 0 {
        return None;
    }
    // Along each axis: taps of a phase, padding of the convolution before and after, pixels to cut off before and after.
    let axis = |i: usize, k: usize| {
        let taps = k.div_ceil(stride);
        // Phases that hardly have weights would be a larger product than the one they stand for.
        if taps * stride > 2 * k {
            return None;
        }
        let (begin, end) = (at(&c.window.pads, i, 0), at(&c.window.pads, 2 + i, 0));
        let first = (begin / stride).min(taps - 1);
        let surplus = (taps * stride + end).checked_sub(k + at(&c.output_padding, i, 0))?;
        let last = (surplus / stride).min(taps - 1);
        Some((taps, [taps - 1 - first, taps - 1 - last], [begin - first * stride, surplus - last * stride]))
    };
    let [(rows, row_pads, row_cuts), (cols, col_pads, col_cuts)] = [axis(0, height)?, axis(1, width)?];

    let tensor = view.tensor(b.id)?;
    let weights = tensor.bytes();
    let zero = |m: usize| b.zeros[if b.zeros.len() == 1 { 0 } else { m }] as u8;
    let mut packed = Vec::with_capacity(stride * stride * channels * inputs * rows * cols);
    for phase in 0..stride * stride {
        for m in 0..channels {
            for (i, t) in (0..inputs).flat_map(|i| (0..rows * cols).map(move |t| (i, t))) {
                let row = (rows - 1 - t / cols) * stride + phase / stride;
                let col = (cols - 1 - t % cols) * stride + phase % stride;
                let inside = row < height && col < width;
                packed.push(if inside { weights[((i * channels + m) * height + row) * width + col] } else { zero(m) });
            }
        }
    }
    let dims = [stride * stride * channels, inputs, rows, cols];
    let constant = byte_tensor(tensor.dtype(), &dims, &packed)?;

    let bias = match input(node, 2) {
        Some(bias) => Some(view.tensor(bias)?.as_slice::<f32>().ok().filter(|b| b.len() == channels)?.to_vec()),
        None => None,
    };
    let spread = |list: &[f32]| if list.len() == 1 { list.to_vec() } else { list.repeat(stride * stride) };
    let units: Vec<f32> = b.scales.iter().map(|s| a_scheme.scale * s).collect();
    let zeros = if b.zeros.len() == 1 { b.zeros.clone() } else { b.zeros.repeat(stride * stride) };
    let b = Weights { scales: spread(&b.scales), zeros, dims: dims.to_vec(), ..b };
    let pads = [row_pads[0], col_pads[0], row_pads[1], col_pads[1]];
    let conv = Conv {
        window: Window {
            kernel: None,
            strides: Axes::new(),
            dilations: Axes::new(),
            pads: Axes::from_slice(&pads),
            auto_pad: AutoPad::NotSet,
            ceil: false,
        },
        groups: 1,
        layout: Layout::Nchw,
        activation: Activation::Identity,
        residual: false,
    };
    let kind = Kind::Conv(conv);
    let (k, n) = columns(&kind, &b.dims)?;
    if !b.fit(k, n) {
        return None;
    }
    let bias = bias.map(|b| b.repeat(stride * stride));
    let product = Product { kind, a, a_scheme, b, units: spread(&units), bias };
    let (op, mut operands) = product.quantized(y, bounds)?;
    operands[1] = Operand::Constant(constant);
    let mut made: Made = (op.into(), operands);
    if stride > 1 {
        let blocks = Blocks { to_space: true, size: stride, channel_first: false, layout: Layout::Nchw };
        made = (blocks.into(), vec![Operand::Computed(made.0, made.1)]);
    }
    let cuts = [row_cuts, col_cuts];
    if cuts != [[0; 2]; 2] {
        let ends = cuts.map(|[_, end]| if end == 0 { i64::MAX } else { -(end as i64) });
        let attributes = Some((cuts.map(|[begin, _]| begin as i64).to_vec(), ends.to_vec()));
        let slice = Slice { attributes, axes: Some(vec![2, 3]) };
        made = (slice.into(), vec![Operand::Computed(made.0, made.1)]);
    }
    Some(made)
}

fn concat(view: &View, node: &Node, y: Scheme) -> Option<Made> {
    let concat = node.op.get::<Concat>()?;
    let operands: Option<Vec<Operand>> = (0..node.inputs.len())
        .map(|k| {
            let (x, from) = dequantized(view, input(node, k)?)?;
            Some(match from == y {
                true => x.into(),
                false => Operand::Computed(requantizer(&from, &y).into(), vec![x.into()]),
            })
        })
        .collect();
    Some((concat.clone().into(), operands?))
}

fn requantizer(from: &Scheme, to: &Scheme) -> Lookup {
    Lookup { table: to.table_from(from), dtype: to.dtype }
}

/// DequantizeLinear goes behind what only moves elements.
fn moved(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let data = input(node, 0)?;
    let (x, scheme) = dequantized(view, data)?;
    let (_, linear) = view.producer(strip(view, data))?;
    let mut operands: Vec<Operand> = node.inputs.iter().map(|&id| id.into()).collect();
    operands[0] = x.into();
    let op: Op = match node.op.name() {
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Transpose" | "Slice" | "Gather" | "Expand"
        | "DepthToSpace" | "SpaceToDepth" | "Identity" => node.op.clone(),
        // Quantisation keeps order, and padding takes no part.
        "MaxPool" if !node.op.get::<Pool>()?.indices => node.op.clone(),
        "Resize" | "Upsample" => {
            let resize = node.op.get::<Resize>()?;
            let copies = resize.mode == resize::Mode::Nearest && resize.coordinates != Coordinates::TfCropAndResize;
            copies.then(|| node.op.clone())?
        }
        "Pad" => {
            let pad = node.op.get::<Pad>()?;
            let zero = match input(node, 2) {
                Some(id) => view.scalar(id)? == 0.0,
                None => pad.value.unwrap_or(0.0) == 0.0,
            };
            if pad.mode == Mode::Constant {
                operands.resize_with(operands.len().max(3), || Operand::Absent);
                operands[2] = Operand::Constant(scheme.zero_point().filter(|_| zero)?);
            }
            Pad { value: None, ..pad.clone() }.into()
        }
        _ => return None,
    };
    if node.outputs.len() != 1 {
        return None;
    }
    let mut outer = vec![Operand::Computed(op, operands)];
    outer.extend(linear.inputs[1..].iter().map(|&id| Operand::from(id)));
    Some(Replacement { root: i, nodes: vec![i], op: linear.op.clone(), operands: outer })
}

/// DequantizeLinear goes behind a Split, once for each part.
fn split(graph: &mut Graph, pass: &Pass) -> Result<bool> {
    if !graph.nodes.iter().any(|node| node.op.is::<Split>()) {
        return Ok(false);
    }
    let facts = pass.facts(graph)?;
    let view = View::new(graph, &facts);
    let found = |node: &Node| {
        node.op.get::<Split>()?;
        let data = input(node, 0)?;
        let (x, _) = dequantized(&view, data)?;
        view.producer(strip(&view, data)).map(|(linear, _)| (x, linear))
    };
    let splits: Vec<_> = graph.nodes.iter().enumerate().filter_map(|(i, n)| found(n).map(|f| (i, f))).collect();
    for &(i, (x, linear)) in &splits {
        let Node { op, inputs: scheme, .. } = graph.nodes[linear].clone();
        graph.nodes[i].inputs[0] = Some(x);
        for k in 0..graph.nodes[i].outputs.len() {
            let real = graph.nodes[i].outputs[k];
            let name = graph.value(real).name.clone();
            let bytes = graph.add_value(format!("{name}/quantized"));
            graph.nodes[i].outputs[k] = bytes;
            let inputs = std::iter::once(Some(bytes)).chain(scheme[1..].iter().copied()).collect();
            graph.nodes.push(Node { name, op: op.clone(), inputs, outputs: vec![real] });
        }
    }
    graph.remove_dead_nodes();
    graph.sort()?;
    Ok(!splits.is_empty())
}

/// Whether a node computes each element of its result from one element of what it reads and from constants.
fn is_pointwise(view: &View, node: &Node) -> bool {
    let constant = |k: usize| input(node, k).is_none_or(|id| view.tensor(id).is_some_and(|t| t.len() == 1));
    let function = if let Some(linear) = node.op.get::<Linear>() {
        linear.block == 0 && constant(1) && constant(2)
    } else {
        let kernel = |a: &Arithmetic| matches!(a.function, Function::Kernel(_));
        node.op.is::<Pointwise>()
            || node.op.is::<Lookup>()
            || node.op.is::<Identity>()
            || node.op.is::<Clip>()
            || node.op.get::<Arithmetic>().is_some_and(kernel)
    };
    let result = |id: ValueId| view.fact(id).is_some_and(|f| f.dtype == DType::F32 || is_byte(f.dtype));
    function && node.outputs.len() == 1 && result(node.outputs[0])
}

/// The bytes from which a value could be computed by a table, those before others first.
fn sources(view: &View, root: ValueId) -> Vec<ValueId> {
    let (mut todo, mut seen, mut found) = (vec![root], BTreeSet::new(), BTreeSet::new());
    while let Some(id) = todo.pop() {
        if view.tensor(id).is_some() || !seen.insert(id) || seen.len() > 2 * MAX_REGION {
            continue;
        }
        if id != root && view.fact(id).is_some_and(|f| is_byte(f.dtype)) {
            found.insert((view.producer(id).map(|(i, _)| i), id));
        }
        if let Some((_, node)) = view.producer(id).filter(|(_, n)| is_pointwise(view, n)) {
            todo.extend(node.operands());
        }
    }
    found.into_iter().map(|(_, id)| id).collect()
}

/// Whether a value follows from the bytes `source` by pointwise nodes, which are collected.
fn follows(view: &View, id: ValueId, source: ValueId, nodes: &mut BTreeSet<usize>) -> bool {
    if id == source || view.tensor(id).is_some_and(|t| t.len() == 1) {
        return true;
    }
    let Some((i, node)) = view.producer(id).filter(|(_, n)| is_pointwise(view, n)) else { return false };
    if nodes.contains(&i) {
        return true;
    }
    nodes.len() < MAX_REGION && nodes.insert(i) && node.operands().all(|id| follows(view, id, source, nodes))
}

/// Pointwise functions from bytes to bytes.
fn lookup(view: &View, pass: &Pass, i: usize) -> Result<Option<Replacement>> {
    let node = &view.graph.nodes[i];
    if !(node.op.get::<Linear>().is_some_and(|l| !l.back) || node.op.is::<Lookup>()) || !is_pointwise(view, node) {
        return Ok(None);
    }
    let root = node.outputs[0];
    let Some(dtype) = view.fact(root).map(|f| f.dtype).filter(|&d| is_byte(d)) else { return Ok(None) };
    for source in sources(view, root) {
        let mut nodes = BTreeSet::new();
        if !view.same_rank(source, root) || !follows(view, root, source, &mut nodes) {
            continue;
        }
        // A table alone is what it should become.
        if nodes.len() == 1 && node.op.is::<Lookup>() {
            continue;
        }
        let Some(table) = tabulate(view, pass, source, root, &nodes)? else { continue };
        let same = view.fact(source).is_some_and(|f| f.dtype == dtype) && (0..=255).all(|b| table[usize::from(b)] == b);
        let op: Op = if same { Identity.into() } else { Lookup { table: table.into(), dtype }.into() };
        return Ok(Some(Replacement { root: i, nodes: vec![i], op, operands: vec![source.into()] }));
    }
    Ok(None)
}

/// The nodes' own results for all 256 bytes.
fn tabulate(
    view: &View,
    pass: &Pass,
    source: ValueId,
    root: ValueId,
    nodes: &BTreeSet<usize>,
) -> Result<Option<Vec<u8>>> {
    let mut facts: Vec<Option<Fact>> = vec![None; view.graph.values.len()];
    let bytes: Vec<u8> = (0..=255).collect();
    let Some(dtype) = view.fact(source).map(|f| f.dtype) else { return Ok(None) };
    let all = match dtype {
        DType::U8 => Tensor::from_slice(&[256], &bytes)?,
        _ => Tensor::from_slice(&[256], &bytes.iter().map(|&b| b as i8).collect::<Vec<_>>())?,
    };
    facts[source.index()] = Some(Fact::constant(Arc::new(all)));
    for &i in nodes {
        let node = &view.graph.nodes[i];
        for id in node.operands().filter(|&id| view.tensor(id).is_some()) {
            facts[id.index()] = view.fact(id).cloned();
        }
        let results = infer_node(node, &facts, pass.cx, Folding { max_bytes: usize::MAX })?;
        facts[node.outputs[0].index()] = results.into_iter().next();
    }
    let table = facts[root.index()].as_ref().and_then(Fact::tensor).map(|t| t.bytes().to_vec());
    Ok(table.filter(|t| t.len() == 256))
}

/// QLinearConv, QLinearMatMul, ConvInteger and MatMulInteger with constant weights, scales and zero points.
fn named_product(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let product = node.op.get::<QuantizedProduct>()?;
    let a = input(node, 0)?;
    let dtype = view.fact(a)?.dtype;
    let kind = integer_kind(product);
    if !product.scaled {
        let b = integer_weights(view, node)?;
        let zero = match input(node, 2) {
            Some(zero) => match *integers(view, zero)? {
                [zero] => zero,
                _ => return None,
            },
            None => 0,
        };
        columns(&kind, &b.dims).filter(|&(_, n)| b.zeros.len() == 1 || b.zeros.len() == n)?;
        let b_zero = Table::shortest(b.zeros);
        let op = IntegerProduct { kind, a_zero: Some(zero), b_zero, bias: None, target: Target::Sums };
        return Some(Replacement { root: i, nodes: vec![i], op: op.into(), operands: vec![a.into(), b.id.into()] });
    }
    let a_scheme = Scheme::new(view, dtype, input(node, 1)?, input(node, 2))?;
    let y = Scheme::new(view, view.fact(node.outputs[0])?.dtype, input(node, 6)?, input(node, 7))?;
    let b = Weights::new(view, input(node, 3)?, input(node, 4)?, input(node, 5))?;
    let (_, n) = columns(&kind, &b.dims)?;
    if [b.scales.len(), b.zeros.len()].iter().any(|&len| len != 1 && len != n) {
        return None;
    }
    let bias = match input(node, 8) {
        Some(bias) => Some(integers(view, bias).filter(|b| b.len() == n)?.into()),
        None => None,
    };
    let multiplier = Table::shortest(b.scales.iter().map(|s| a_scheme.scale * s / y.scale).collect());
    let (lo, hi) = y.bounds();
    let target = Target::Quantized { dtype: y.dtype, multiplier, zero: y.zero, lo, hi, add: None };
    let b_zero = Table::shortest(b.zeros);
    let op = IntegerProduct { kind, a_zero: Some(a_scheme.zero), b_zero, bias, target };
    Some(Replacement { root: i, nodes: vec![i], op: op.into(), operands: vec![a.into(), b.id.into()] })
}

fn integer_kind(product: &QuantizedProduct) -> Kind {
    match &product.kind {
        QuantizedKind::MatMul => Kind::MatMul(MatMul::default()),
        QuantizedKind::Conv(window, groups) => Kind::Conv(Conv {
            window: window.clone(),
            groups: *groups,
            layout: Layout::Nchw,
            activation: Activation::Identity,
            residual: false,
        }),
    }
}

/// B of a MatMulInteger or ConvInteger; its scale is not known here.
fn integer_weights(view: &View, node: &Node) -> Option<Weights> {
    let b = input(node, 1)?;
    let tensor = view.tensor(b).filter(|t| is_byte(t.dtype()))?;
    let zeros = match input(node, 3) {
        Some(zero) => integers(view, zero)?,
        None => vec![0],
    };
    Some(Weights { id: b, scales: vec![1.0], zeros, dims: tensor.dims().to_vec(), reach: 255 })
}

/// `real(sums) * scale of a * scale of b`, as quantisers write it behind DynamicQuantizeLinear.
fn dynamic(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    if node.op.name() != "Mul" || !view.is_f32(node.outputs[0]) {
        return None;
    }
    let (x, s) = (input(node, 0)?, input(node, 1)?);
    [(x, s), (s, x)].into_iter().find_map(|(x, s)| {
        let (c, cast) = view.producer(x).filter(|(_, n)| n.op.is::<Cast>() && view.uses(x) == 1)?;
        let sums = input(cast, 0)?;
        let (p, product) = view.producer(sums).filter(|_| view.uses(sums) == 1)?;
        let op = product.op.get::<QuantizedProduct>().filter(|p| !p.scaled)?;
        let kind = integer_kind(op);
        let b = integer_weights(view, product)?;
        let (_, n) = columns(&kind, &b.dims).filter(|&(_, n)| b.zeros.len() == 1 || b.zeros.len() == n)?;
        let one = |id: ValueId| view.fact(id).and_then(Fact::dims).is_some_and(|d| d.iter().all(|&d| d == 1));
        let zero = input(product, 2);
        if zero.is_some_and(|zero| !one(zero)) {
            return None;
        }
        // The scale of b alone is known; it may stand for columns, along the last axis.
        let both = view.producer(s).filter(|(_, n)| n.op.name() == "Mul").map(|(_, n)| n);
        let parts = both.and_then(|n| {
            let (a, b) = (input(n, 0)?, input(n, 1)?);
            [(a, b), (b, a)].into_iter().find(|&(a, b)| view.tensor(b).is_some() && one(a))
        });
        let (a_scale, scales) = match parts {
            Some((a, b)) => {
                let tensor = view.tensor(b)?;
                let columns = matches!(kind, Kind::MatMul(_)) && tensor.dims().last() == Some(&n);
                let fits = tensor.len() == 1 || (columns && tensor.len() == n);
                (a, fits.then(|| tensor.as_slice::<f32>().ok())??.to_vec())
            }
            None => (s, vec![1.0]),
        };
        let shape = view.same_rank(sums, node.outputs[0]) && one(a_scale) && view.is_f32(a_scale);
        if !shape || scales.iter().any(|s| !s.is_finite() || *s <= 0.0) {
            return None;
        }
        let scale = Table::shortest(scales);
        let target = Target::Real { scale, bias: false, residual: false, activation: Activation::Identity };
        let op = IntegerProduct { kind, a_zero: None, b_zero: Table::shortest(b.zeros), bias: None, target };
        let operands = vec![input(product, 0)?.into(), b.id.into(), a_scale.into(), zero.into()];
        Some(Replacement { root: i, nodes: vec![i, c, p], op: op.into(), operands })
    })
}

/// A product that nobody quantises again.
fn real(view: &View, i: usize) -> Result<Option<Replacement>> {
    let node = &view.graph.nodes[i];
    let Some(product) = Product::of(view, node).filter(|_| node.outputs.len() == 1) else { return Ok(None) };
    let bias = match &product.bias {
        Some(bias) => Some(Operand::Constant(Tensor::from_slice(&[bias.len()], bias)?)),
        None => None,
    };
    let scale = Table::shortest(product.units.clone());
    let target = Target::Real { scale, bias: bias.is_some(), residual: false, activation: Activation::Identity };
    let (op, mut operands) = product.operator(None, target);
    operands.extend(bias);
    Ok(Some(Replacement { root: i, nodes: vec![i], op: op.into(), operands }))
}

/// A sum with the result of a product that nobody else reads; of two products the later one takes it.
fn residual(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let sum = node.op.get::<QuantizedBinary>()?;
    let binary = &sum.binary;
    let QuantizedFunction::Add { first, second } = binary.function else { return None };
    let (a, b) = (input(node, 0)?, input(node, 1)?);
    let mut order = [(a, b, first, second, binary.zeros[1]), (b, a, second, first, binary.zeros[0])];
    let position = |id: ValueId| view.producer(id).map(|(p, _)| p);
    if position(b) > position(a) {
        order.reverse();
    }
    order.into_iter().find_map(|(x, other, first, second, other_zero)| {
        let (p, product) = view.producer(x).filter(|_| view.uses(x) == 1)?;
        let op = product.op.get::<IntegerProduct>()?;
        let Target::Quantized { add: None, .. } = op.target else { return None };
        if !view.same_shape(x, other) {
            return None;
        }
        let mut op = op.clone();
        if let Target::Quantized { add, dtype, .. } = &mut op.target {
            let &Binary { zero, lo, hi, .. } = binary;
            *add = Some(Sum { other_zero, first, second, zero, lo, hi });
            *dtype = sum.dtype;
        }
        let mut operands: Vec<Operand> = product.inputs.iter().map(|&id| id.into()).collect();
        operands.push(other.into());
        Some(Replacement { root: i, nodes: vec![i, p], op: op.into(), operands })
    })
}

/// A table behind a product that only bounds its result.
fn clamp(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let lookup = node.op.get::<Lookup>()?;
    let x = input(node, 0)?;
    let (p, product) = view.producer(x).filter(|_| view.uses(x) == 1)?;
    let op = product.op.get::<IntegerProduct>()?;
    let Target::Quantized { dtype, lo, hi, ref add, .. } = op.target else { return None };
    if dtype != lookup.dtype {
        return None;
    }
    let (least, largest) = add.as_ref().map_or((lo, hi), |add| (add.lo, add.hi));
    let value = |code: i32| match dtype {
        DType::U8 => i32::from(lookup.table[code as usize & 255]),
        _ => i32::from(lookup.table[code as usize & 255] as i8),
    };
    let (lo, hi) = (value(least), value(largest));
    let bounds_only = lo <= hi && (least..=largest).all(|code| value(code) == code.clamp(lo, hi));
    if !bounds_only {
        return None;
    }
    let mut op = op.clone();
    match &mut op.target {
        Target::Quantized { add: Some(add), .. } => (add.lo, add.hi) = (lo, hi),
        Target::Quantized { lo: l, hi: h, .. } => (*l, *h) = (lo, hi),
        _ => return None,
    }
    let operands = product.inputs.iter().map(|&id| id.into()).collect();
    Some(Replacement { root: i, nodes: vec![i, p], op: op.into(), operands })
}

#[cfg(test)]
mod tests {
    use super::super::optimize;
    use super::super::testing::{Net, float, int, ints, names, noise, with_cx};
    use super::*;

    fn bytes(n: &mut Net, dims: &[usize], values: &[u8]) -> ValueId {
        n.graph.add_constant("constant", Tensor::from_slice(dims, values).unwrap())
    }

    fn q(n: &mut Net, x: ValueId, scale: f32, zero: u8) -> ValueId {
        let (scale, zero) = (n.scalar(scale), bytes(n, &[], &[zero]));
        n.op("QuantizeLinear", &[x, scale, zero])
    }

    fn dq(n: &mut Net, x: ValueId, scale: f32, zero: u8) -> ValueId {
        let (scale, zero) = (n.scalar(scale), bytes(n, &[], &[zero]));
        n.op("DequantizeLinear", &[x, scale, zero])
    }

    /// There and back.
    fn qdq(n: &mut Net, x: ValueId, scale: f32, zero: u8) -> ValueId {
        let x = q(n, x, scale, zero);
        dq(n, x, scale, zero)
    }

    /// Signed weights with a scale for each index of an axis, and the scales.
    fn weights(n: &mut Net, dims: &[usize], axis: usize, seed: u64) -> (ValueId, Vec<f32>) {
        let values: Vec<i8> = noise(dims.iter().product(), seed).iter().map(|v| (v * 127.0) as i8).collect();
        let scales: Vec<f32> = noise(dims[axis], seed + 1).iter().map(|v| 0.01 + 0.005 * v).collect();
        let w = n.graph.add_constant("w", Tensor::from_slice(dims, &values).unwrap());
        let scale = n.constant(&[dims[axis]], &scales);
        let zero = n.graph.add_constant("zero", Tensor::from_slice(&[dims[axis]], &vec![0i8; dims[axis]]).unwrap());
        (n.op_with("DequantizeLinear", &[w, scale, zero], &[("axis", int(axis as i64))]), scales)
    }

    /// A bias in units of the sums, as onnxruntime's quantiser writes it.
    fn bias(n: &mut Net, x_scale: f32, scales: &[f32], seed: u64) -> ValueId {
        let values: Vec<i32> = noise(scales.len(), seed).iter().map(|v| (v * 3000.0) as i32).collect();
        let units: Vec<f32> = scales.iter().map(|s| s * x_scale).collect();
        let b = n.graph.add_constant("bias", Tensor::from_slice(&[values.len()], &values).unwrap());
        let scale = n.constant(&[values.len()], &units);
        n.op_with("DequantizeLinear", &[b, scale], &[("axis", int(0))])
    }

    /// Codes differ by one step in few places: a sum times `a b / y` in one product and in three operations of real numbers
    /// may lie on either side of a half.
    fn close(n: &Net, graph: &Graph, share: f32) {
        let [want, got] = n.both(graph);
        for (want, got) in want.iter().zip(&got) {
            assert_eq!((want.dtype(), want.dims()), (got.dtype(), got.dims()));
            let codes = |t: &Tensor| t.view().to_i64s().unwrap();
            let (want, got) = (codes(want), codes(got));
            let other = want.iter().zip(&got).filter(|(w, g)| w != g).count();
            assert!(want.iter().zip(&got).all(|(w, g)| w.abs_diff(*g) <= 1), "more than a step");
            assert!(other as f32 <= share * want.len() as f32, "{other} of {} differ", want.len());
            let spread = want.iter().collect::<BTreeSet<_>>().len();
            assert!(spread > 20, "{spread} different results say little");
        }
    }

    fn optimized(n: &Net, facts: &[Fact]) -> Graph {
        with_cx(|cx| optimize(n.graph.clone(), facts, cx).unwrap())
    }

    #[test]
    fn an_inverted_residual_block() {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 8, 12, 11]);
        let x = qdq(&mut n, x, 0.03, 120);
        let conv = |n: &mut Net, x, x_scale: f32, dims: [usize; 4], groups: i64, seed: u64| {
            let (w, scales) = weights(n, &dims, 0, seed);
            let b = bias(n, x_scale, &scales, seed + 2);
            let pad = dims[2] as i64 / 2;
            n.op_with("Conv", &[x, w, b], &[("pads", ints(&[pad; 4])), ("group", int(groups))])
        };
        let y = conv(&mut n, x, 0.03, [24, 8, 1, 1], 1, 10);
        let y = n.op("Relu", &[y]);
        let y = qdq(&mut n, y, 0.05, 3);
        let y = conv(&mut n, y, 0.05, [24, 1, 3, 3], 24, 20);
        let (lo, hi) = (n.scalar(0.0), n.scalar(6.0));
        let y = n.op("Clip", &[y, lo, hi]);
        let y = qdq(&mut n, y, 6.0 / 255.0, 0);
        let y = conv(&mut n, y, 6.0 / 255.0, [8, 24, 1, 1], 1, 30);
        let y = qdq(&mut n, y, 0.04, 100);
        let y = n.op("Add", &[y, x]);
        let y = q(&mut n, y, 0.05, 110);
        n.output(y);
        let graph = optimized(&n, &[Fact::new(DType::F32, &[2, 8, 12, 11])]);
        let conv = "weblane.IntegerConv";
        assert_eq!(names(&graph), ["QuantizeLinear", "Transpose", conv, conv, conv, "Transpose"]);
        close(&n, &graph, 0.003);
        let Target::Quantized { lo: 3, .. } = graph.nodes[2].op.get::<IntegerProduct>().unwrap().target else {
            panic!("Relu is no bound");
        };
        // In the layout of the model too, as where a rank is not known.
        let graph = n.apply(run);
        assert_eq!(names(&graph), ["QuantizeLinear", conv, conv, conv]);
        close(&n, &graph, 0.003);
    }

    #[test]
    fn a_classifier_behind_a_mean() {
        for last in [true, false] {
            let mut n = Net::new(13);
            let x = n.input("x", &[3, 16, 6, 5]);
            let y = qdq(&mut n, x, 0.03, 128);
            let y = n.op("GlobalAveragePool", &[y]);
            let y = qdq(&mut n, y, 0.005, 128);
            let y = n.op_with("Flatten", &[y], &[("axis", int(1))]);
            let y = qdq(&mut n, y, 0.005, 128);
            let (w, scales) = weights(&mut n, &[100, 16], 0, 5);
            let b = bias(&mut n, 0.005, &scales, 6);
            let y = n.op_with("Gemm", &[y, w, b], &[("transB", int(1))]);
            let y = if last { q(&mut n, y, 0.01, 128) } else { y };
            n.output(y);
            let graph = n.apply(run);
            let mean = "weblane.QuantizedGlobalAveragePool";
            assert_eq!(names(&graph), ["QuantizeLinear", mean, "Flatten", "weblane.IntegerMatMul"]);
            if last {
                close(&n, &graph, 0.001);
            } else {
                n.check(&graph);
            }
        }
    }

    #[test]
    fn means_over_windows() {
        let mean = |name: &str, attrs: &[(&str, crate::onnx::AttributeValue)], want: &[&str]| {
            let mut n = Net::new(13);
            let x = n.input("x", &[2, 96, 9, 8]);
            let y = qdq(&mut n, x, 0.03, 128);
            let y = n.op_with(name, &[y], attrs);
            let y = n.op("Relu", &[y]);
            // Not a ratio of scales at which means lie on halves.
            let y = q(&mut n, y, 0.0023, 5);
            n.output(y);
            let graph = n.apply(run);
            assert_eq!(names(&graph)[1..], *want);
            close(&n, &graph, 0.001);
            let graph = optimized(&n, &[Fact::new(DType::F32, &[2, 96, 9, 8])]);
            close(&n, &graph, 0.001);
        };
        let kernel = || ("kernel_shape", ints(&[3, 2]));
        let pads = || ("pads", ints(&[1, 0, 1, 1]));
        let [sliding, global] = ["weblane.QuantizedAveragePool", "weblane.QuantizedGlobalAveragePool"];
        mean("AveragePool", &[kernel(), ("strides", ints(&[2, 1])), pads()], &[sliding]);
        mean("AveragePool", &[kernel(), pads(), ("count_include_pad", int(1))], &[sliding]);
        mean("GlobalAveragePool", &[], &[global]);
        mean("ReduceMean", &[("axes", ints(&[-1, 2]))], &[global]);
        mean("ReduceMean", &[("axes", ints(&[2, 3])), ("keepdims", int(0))], &[global, "Squeeze"]);
    }

    #[test]
    fn transposed_convolutions_are_convolutions() {
        // Window, strides, padding, added elements, and whether DepthToSpace and Slice are needed.
        type Case = ([usize; 2], i64, [i64; 4], [i64; 2], [bool; 2]);
        let cases: [Case; 7] = [
            ([2, 2], 2, [0; 4], [0; 2], [true, false]),
            ([4, 4], 2, [1; 4], [0; 2], [true, true]),
            ([3, 3], 2, [1; 4], [1; 2], [true, true]),
            ([3, 2], 2, [0, 1, 1, 0], [1, 0], [true, true]),
            ([3, 3], 1, [1; 4], [0; 2], [false, false]),
            ([5, 4], 1, [0, 3, 1, 0], [0; 2], [false, false]),
            ([6, 5], 3, [4, 1, 2, 3], [0, 1], [true, true]),
        ];
        for ([kh, kw], stride, pads, added, [blocks, cut]) in cases {
            let mut n = Net::new(13);
            let x = n.input("x", &[2, 8, 6, 5]);
            let x = qdq(&mut n, x, 0.03, 120);
            let (w, scales) = weights(&mut n, &[8, 5, kh, kw], 1, 10);
            let b = bias(&mut n, 0.03, &scales, 12);
            let attrs = [("strides", ints(&[stride; 2])), ("pads", ints(&pads)), ("output_padding", ints(&added))];
            let y = n.op_with("ConvTranspose", &[x, w, b], &attrs);
            let y = n.op("Relu", &[y]);
            let y = q(&mut n, y, 0.05, 7);
            n.output(y);
            let graph = n.apply(run);
            let mut want = vec!["QuantizeLinear", "weblane.IntegerConv"];
            want.extend(blocks.then_some("DepthToSpace"));
            want.extend(cut.then_some("Slice"));
            assert_eq!(names(&graph), want);
            close(&n, &graph, 0.002);
            // Channels-last from the quantised input to the result.
            let graph = optimized(&n, &[Fact::new(DType::F32, &[2, 8, 6, 5])]);
            want.insert(1, "Transpose");
            want.push("Transpose");
            assert_eq!(names(&graph), want);
            close(&n, &graph, 0.002);
        }
        // A stride beyond the window leaves most of the result to the bias; groups are products of their own.
        for attrs in [("strides", ints(&[3, 3])), ("group", int(2))] {
            let mut n = Net::new(13);
            let x = n.input("x", &[1, 8, 6, 5]);
            let x = qdq(&mut n, x, 0.03, 120);
            let (w, _) = weights(&mut n, &[8, 5, 1, 1], 1, 10);
            let y = n.op_with("ConvTranspose", &[x, w], &[attrs]);
            let y = q(&mut n, y, 0.05, 7);
            n.output(y);
            let graph = n.apply(run);
            assert!(names(&graph).contains(&"ConvTranspose".to_owned()));
        }
    }

    #[test]
    fn attention_between_quantised_tensors() {
        let mut n = Net::new(13);
        let [a, b] = ["a", "b"].map(|name| n.input(name, &[2, 3, 9, 16]));
        let (a, b) = (qdq(&mut n, a, 0.03, 120), qdq(&mut n, b, 0.04, 131));
        let t = n.op_with("Transpose", &[b], &[("perm", ints(&[0, 1, 3, 2]))]);
        let y = n.op("MatMul", &[a, t]);
        let y = qdq(&mut n, y, 0.2, 128);
        let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
        let y = qdq(&mut n, y, 1.0 / 256.0, 0);
        let y = n.op("MatMul", &[y, b]);
        let y = q(&mut n, y, 0.03, 125);
        n.output(y);
        let graph = n.apply(run);
        let [q, dq, product] = ["QuantizeLinear", "DequantizeLinear", "QLinearMatMul"];
        assert_eq!(names(&graph), [q, q, "Transpose", product, dq, "Softmax", q, product]);
        close(&n, &graph, 0.003);
    }

    #[test]
    fn parts_stay_bytes() {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 8, 6, 6]);
        let x = qdq(&mut n, x, 0.04, 100);
        let parts = n.nodes("Split", &[x], 2);
        if let Some(node) = n.graph.nodes.last_mut() {
            node.op = Split { axis: 1, sizes: None, parts: None }.into();
        }
        let a = n.op_with("MaxPool", &[parts[0]], &[("kernel_shape", ints(&[1, 1]))]);
        let y = n.op("Add", &[a, parts[1]]);
        let y = q(&mut n, y, 0.06, 110);
        n.output(y);
        let graph = n.apply(run);
        assert_eq!(names(&graph), ["QuantizeLinear", "Split", "MaxPool", "weblane.QuantizedAdd"]);
        close(&n, &graph, 0.001);
        // A part that is a result of the model stays real.
        n.output(parts[0]);
        let left = n.passed(run);
        assert_eq!(left[..3], ["QuantizeLinear", "Split", "DequantizeLinear"]);
    }

    #[test]
    fn functions_become_tables() {
        let build = |f: &dyn Fn(&mut Net, ValueId) -> ValueId, want: &[&str]| {
            let mut n = Net::new(22);
            let x = n.input("x", &[3, 2, 100]);
            let x = q(&mut n, x, 0.04, 100);
            let y = dq(&mut n, x, 0.04, 100);
            let y = f(&mut n, y);
            let y = q(&mut n, y, 0.02, 90);
            n.output(y);
            assert_eq!(n.passed(run)[1..], *want);
        };
        let lookup: &[&str] = &["weblane.Lookup"];
        for name in ["Sigmoid", "HardSwish", "HardSigmoid", "LeakyRelu", "Tanh", "Gelu", "Relu", "Elu", "Exp"] {
            build(&|n, x| n.op(name, &[x]), lookup);
        }
        // SiLU with both factors quantised, the scale of the model in between.
        let silu = |n: &mut Net, x| {
            let s = n.op("Sigmoid", &[x]);
            let s = qdq(n, s, 1.0 / 256.0, 0);
            n.op("Mul", &[x, s])
        };
        build(&silu, lookup);
        build(&|_, x| x, lookup);
        let spelled = |n: &mut Net, x| {
            let (three, sixth) = (n.scalar(3.0), n.constant(&[1], &[1.0 / 6.0]));
            let y = n.op("Add", &[x, three]);
            let (lo, hi) = (n.scalar(0.0), n.scalar(6.0));
            let y = n.op("Clip", &[y, lo, hi]);
            let y = n.op("Mul", &[y, x]);
            n.op("Mul", &[sixth, y])
        };
        build(&spelled, lookup);
        // The same scale again is nothing; a constant of another rank adds an axis.
        let mut n = Net::new(13);
        let x = n.input("x", &[3, 100]);
        let x = q(&mut n, x, 0.04, 100);
        let y = dq(&mut n, x, 0.04, 100);
        let y = qdq(&mut n, y, 0.04, 100);
        let y = n.op("Softmax", &[y]);
        n.output(y);
        assert_eq!(n.optimized(), ["QuantizeLinear", "DequantizeLinear", "Softmax"]);
        let higher = |n: &mut Net, x| {
            let c = n.constant(&[1, 1, 1, 1], &[0.5]);
            n.op("Mul", &[x, c])
        };
        build(&higher, &["DequantizeLinear", "Mul", "QuantizeLinear"]);
    }

    #[test]
    fn elements_move_as_bytes() {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 4, 6, 6]);
        let y = qdq(&mut n, x, 0.04, 100);
        let y = n.op_with("MaxPool", &[y], &[("kernel_shape", ints(&[3, 3])), ("pads", ints(&[1, 1, 1, 1]))]);
        let pads = n.i64s(&[0, 1, 0, 0, 0, 0, 0, 2]);
        let y = n.op("Pad", &[y, pads]);
        let other = qdq(&mut n, x, 0.03, 110);
        let y = qdq(&mut n, y, 0.04, 100);
        let shape = n.i64s(&[2, 5, 6, 8]);
        let y = n.op("Reshape", &[y, shape]);
        let (starts, ends, axes) = (n.i64s(&[1]), n.i64s(&[7]), n.i64s(&[3]));
        let y = n.op("Slice", &[y, starts, ends, axes]);
        let y = n.op_with("Concat", &[y, other], &[("axis", int(1))]);
        let y = qdq(&mut n, y, 0.04, 100);
        let scales = n.constant(&[4], &[1.0, 1.0, 2.0, 2.0]);
        let y = n.node("Resize", &[Some(y), None, Some(scales)], &[]);
        let y = q(&mut n, y, 0.04, 100);
        n.output(y);
        let mut left = n.passed(run);
        left.sort();
        let [q, lookup] = ["QuantizeLinear", "weblane.Lookup"];
        // The last QuantizeLinear does nothing but name the output.
        assert_eq!(left, ["Concat", "Identity", "MaxPool", "Pad", q, q, "Reshape", "Resize", "Slice", lookup]);
    }

    #[test]
    fn sums_and_products_broadcast() {
        for (name, other) in [("Add", &["n", "4", "1", "1"][..]), ("Mul", &["n", "4", "1", "1"]), ("Mul", &["1"])] {
            let mut n = Net::new(13);
            let x = n.symbolic("x", &["n", "4", "9", "10"]);
            let other = n.symbolic("other", other);
            let x = qdq(&mut n, x, 0.04, 100);
            let other = qdq(&mut n, other, 0.03, 128);
            let y = n.op(name, &[x, other]);
            let y = n.op("Relu", &[y]);
            let y = q(&mut n, y, 0.05, 10);
            n.output(y);
            let graph = n.apply(run);
            assert_eq!(names(&graph)[2..], [format!("weblane.Quantized{name}")]);
            close(&n, &graph, 0.001);
        }
    }

    #[test]
    fn products_of_the_standard_with_constants() {
        let mut n = Net::new(13);
        let x = n.input("x", &[1, 3, 9, 8]);
        let x = q(&mut n, x, 0.04, 100);
        let w: Vec<i8> = noise(4 * 3 * 9, 3).iter().map(|v| (v * 127.0) as i8).collect();
        let w = n.graph.add_constant("w", Tensor::from_slice(&[4, 3, 3, 3], &w).unwrap());
        let ws = n.constant(&[4], &[0.01, 0.02, 0.03, 0.015]);
        let wz = n.graph.add_constant("zero", Tensor::from_slice(&[4], &[1i8, 2, -3, 4]).unwrap());
        let (xs, ys) = (n.scalar(0.04), n.scalar(0.1));
        let (xz, yz) = (bytes(&mut n, &[], &[100]), bytes(&mut n, &[], &[128]));
        let b = n.graph.add_constant("bias", Tensor::from_slice(&[4], &[100i32, -200, 300, 50]).unwrap());
        let pads = [("pads", ints(&[1, 1, 1, 1]))];
        let y = n.op_with("QLinearConv", &[x, xs, xz, w, ws, wz, ys, yz, b], &pads);
        let sums = n.op_with("ConvInteger", &[x, w, xz], &pads);
        let m: Vec<u8> = noise(8 * 5, 4).iter().map(|v| (v * 100.0 + 128.0) as u8).collect();
        let m = bytes(&mut n, &[8, 5], &m);
        let (ms, mz) = (n.scalar(0.02), bytes(&mut n, &[], &[120]));
        let z = n.op("QLinearMatMul", &[x, xs, xz, m, ms, mz, ys, yz]);
        let more = n.op("MatMulInteger", &[x, m, xz, mz]);
        for id in [y, sums, z, more] {
            n.output(id);
        }
        // The same arithmetic: the same integers.
        let mut left = n.optimized();
        left.retain(|name| name.starts_with("weblane"));
        left.sort();
        let [conv, product] = ["weblane.IntegerConv", "weblane.IntegerMatMul"];
        assert_eq!(left, [conv, conv, product, product]);
    }

    #[test]
    fn products_quantised_at_run_time() {
        for columns in [true, false] {
            let mut n = Net::new(14);
            let x = n.symbolic("x", &["batch", "tokens", "16"]);
            let r = n.symbolic("r", &["batch", "tokens", "12"]);
            let quantized = n.nodes("DynamicQuantizeLinear", &[x], 3);
            let mut dense = |x: &[ValueId], seed: u64| {
                let w: Vec<i8> = noise(16 * 12, seed).iter().map(|v| (v * 127.0) as i8).collect();
                let w = n.graph.add_constant("w", Tensor::from_slice(&[16, 12], &w).unwrap());
                let count = if columns { 12 } else { 1 };
                let scales: Vec<f32> = noise(count, seed).iter().map(|v| 0.01 + 0.005 * v).collect();
                let dims: &[usize] = if columns { &[12] } else { &[] };
                let ws = n.constant(dims, &scales);
                let wz = n.graph.add_constant("zero", Tensor::from_slice(dims, &vec![0i8; count]).unwrap());
                let y = n.op("MatMulInteger", &[x[0], w, x[2], wz]);
                let y = n.op_with("Cast", &[y], &[("to", int(1))]);
                let s = n.op("Mul", &[x[1], ws]);
                let y = n.op("Mul", &[y, s]);
                let b = n.weights(&[12]);
                n.op("Add", &[b, y])
            };
            let (a, b) = (dense(&quantized, 1), dense(&quantized, 2));
            let a = n.op("Relu", &[a]);
            let b = n.op("Add", &[b, r]);
            n.output(a);
            n.output(b);
            let product = "weblane.IntegerMatMul";
            assert_eq!(n.optimized(), ["DynamicQuantizeLinear", product, product]);
        }
    }

    #[test]
    fn convolutions_quantised_at_run_time() {
        let mut n = Net::new(14);
        let x = n.input("x", &[2, 3, 7, 6]);
        let quantized = n.nodes("DynamicQuantizeLinear", &[x], 3);
        let w: Vec<u8> = noise(4 * 3 * 9, 5).iter().map(|v| (v * 100.0 + 128.0) as u8).collect();
        let (w, zero, scale) = (bytes(&mut n, &[4, 3, 3, 3], &w), bytes(&mut n, &[], &[128]), n.scalar(0.02));
        let y = n.op("ConvInteger", &[quantized[0], w, quantized[2], zero]);
        let y = n.op_with("Cast", &[y], &[("to", int(1))]);
        let s = n.op("Mul", &[quantized[1], scale]);
        let y = n.op("Mul", &[y, s]);
        let b = n.weights(&[4]);
        let shape = n.i64s(&[1, -1, 1, 1]);
        let b = n.op("Reshape", &[b, shape]);
        let y = n.op("Add", &[y, b]);
        let y = n.op("Relu", &[y]);
        n.output(y);
        let want = ["DynamicQuantizeLinear", "Transpose", "weblane.IntegerConv", "Transpose"];
        assert_eq!(n.optimized(), want);
    }

    #[test]
    fn stays_real_where_integers_do_not_fit() {
        // Scales along the rows of a product, weights that only one side quantises, sums that others read too.
        let build = |axis: usize, quantise: bool, shared: bool| {
            let mut n = Net::new(13);
            let x = n.input("x", &[7, 12]);
            let x = if quantise { qdq(&mut n, x, 0.04, 100) } else { x };
            let (w, _) = weights(&mut n, &[12, 12], axis, 3);
            let y = n.op("MatMul", &[x, w]);
            if shared {
                n.output(y);
            }
            let y = n.op_with("LeakyRelu", &[y], &[("alpha", float(0.1))]);
            let y = q(&mut n, y, 0.1, 128);
            n.output(y);
            let graph = n.apply(run);
            names(&graph).contains(&"weblane.IntegerMatMul".to_owned())
        };
        assert!(build(1, true, false));
        assert!(build(1, true, true), "real results are shared");
        assert!(!build(0, true, false));
        assert!(!build(1, false, false));
    }
}
