//! Operators of integers that the model names, as onnxruntime's quantiser does in its format of operators, become the
//! engine's own where scales and zero points are constants.

use super::between::{Made, requantizer};
use super::{Scheme, Weights, columns, input, integers, is_byte};
use crate::fact::Fact;
use crate::graph::{Node, ValueId};
use crate::ops::Table;
use crate::ops::cast::Cast;
use crate::ops::concat::Concat;
use crate::ops::conv::Conv;
use crate::ops::integer_product::{IntegerProduct, Kind, Target};
use crate::ops::matmul::MatMul;
use crate::ops::pool::GlobalPool;
use crate::ops::qgemm::QGemm;
use crate::ops::qlinear_binary::QLinearBinary;
use crate::ops::qlinear_concat::QLinearConcat;
use crate::ops::qlinear_pool::QLinearPool;
use crate::ops::quantize::{Product as QuantizedKind, QuantizedProduct};
use crate::ops::quantized_binary::QuantizedBinary;
use crate::ops::quantized_pool::{QuantizedMean, Windows};
use crate::optimize::pattern::{Operand, Replacement, View};
use weblane_kernels::conv::Layout;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::Mean;
use weblane_kernels::pool::PoolOp;

/// QLinearConv, QLinearMatMul, ConvInteger and MatMulInteger with constant weights, scales and zero points.
pub(super) fn product(view: &View, i: usize) -> Option<Replacement> {
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

/// Whether [`operator`] may take the node.
pub(super) fn is_named(node: &Node) -> bool {
    let op = &node.op;
    op.is::<QLinearBinary>() || op.is::<QLinearConcat>() || op.is::<QLinearPool>() || op.is::<QGemm>()
}

/// QLinearAdd, QLinearMul, QLinearConcat, QLinearGlobalAveragePool and QGemm of onnxruntime.
pub(super) fn operator(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let (op, operands) = if let Some(binary) = node.op.get::<QLinearBinary>() {
        self::binary(view, node, binary)?
    } else if node.op.is::<QLinearConcat>() {
        concat(view, node)?
    } else if let Some(pool) = node.op.get::<QLinearPool>() {
        global_mean(view, node, pool)?
    } else {
        gemm(view, node, node.op.get::<QGemm>()?)?
    };
    Some(Replacement { root: i, nodes: vec![i], op, operands })
}

/// The tensor at an operand's place, before its scale and zero point.
fn quantized(view: &View, node: &Node, at: usize) -> Option<(ValueId, Scheme)> {
    let x = input(node, at)?;
    Some((x, Scheme::new(view, view.fact(x)?.dtype, input(node, at + 1)?, input(node, at + 2))?))
}

/// The scheme of the result, whose scale is the operand `at`.
fn result(view: &View, node: &Node, at: usize) -> Option<Scheme> {
    Scheme::new(view, view.fact(node.outputs[0])?.dtype, input(node, at)?, input(node, at + 1))
}

fn binary(view: &View, node: &Node, op: &QLinearBinary) -> Option<Made> {
    let [(a, sa), (b, sb)] = [quantized(view, node, 0)?, quantized(view, node, 3)?];
    let y = result(view, node, 6)?;
    let (lo, hi) = y.bounds();
    let binary = op.binary([sa.scale, sb.scale, y.scale], [sa.zero, sb.zero, y.zero], [lo, hi]);
    Some((QuantizedBinary { binary, dtype: y.dtype }.into(), vec![a.into(), b.into()]))
}

fn concat(view: &View, node: &Node) -> Option<Made> {
    let axis = node.op.get::<QLinearConcat>()?.axis;
    let y = result(view, node, 0)?;
    let part = |k: usize| {
        let (x, from) = quantized(view, node, k)?;
        Some(match from == y {
            true => x.into(),
            false => Operand::Computed(requantizer(&from, &y).into(), vec![x.into()]),
        })
    };
    let parts: Option<Vec<Operand>> = (2..node.inputs.len()).step_by(3).map(part).collect();
    Some((Concat { axis }.into(), parts?))
}

/// Means over windows stay: their sums are rounded as they grow, which decides where halves go.
fn global_mean(view: &View, node: &Node, pool: &QLinearPool) -> Option<Made> {
    let (x, from) = quantized(view, node, 0)?;
    let y = result(view, node, 3)?;
    let (lo, hi) = y.bounds();
    let multiplier = from.scale / y.scale;
    let mean = Mean { x_zero: from.zero, multiplier, zero: y.zero, lo, hi, include_pad: false };
    let op = PoolOp::Average { include_pad: false };
    let windows = Windows::Global(GlobalPool { op, layout: pool.layout });
    let global = pool.window.is_none() && pool.layout == Layout::Nchw;
    global.then(|| (QuantizedMean { windows, mean, dtype: y.dtype }.into(), vec![x.into()]))
}

fn gemm(view: &View, node: &Node, op: &QGemm) -> Option<Made> {
    let (a, a_scheme) = quantized(view, node, 0).filter(|_| !op.trans_a)?;
    let b = Weights::new(view, input(node, 3)?, input(node, 4)?, input(node, 5))?;
    let kind = Kind::MatMul(MatMul { trans_b: op.trans_b, ..MatMul::default() });
    let (_, n) = columns(&kind, &b.dims)?;
    let lengths = [b.scales.len(), b.zeros.len()].iter().all(|&len| len == 1 || len == n);
    if !lengths || !op.alpha.is_finite() {
        return None;
    }
    let bias: Option<Table<i32>> = match input(node, 6) {
        None => None,
        Some(c) => {
            view.tensor(c).filter(|t| matches!(t.dims(), [] | [_] | [1, _]))?;
            Some(match integers(view, c)?.as_slice() {
                [one] => vec![*one; n].into(),
                row => (row.len() == n).then(|| row.to_vec().into())?,
            })
        }
    };
    let unit = |s: &f32| op.alpha * a_scheme.scale * s;
    let target = match input(node, 7) {
        None => {
            let scale = Table::shortest(b.scales.iter().map(unit).collect());
            Target::Real { scale, bias: false, residual: false, activation: Activation::Identity }
        }
        Some(_) => {
            let y = result(view, node, 7)?;
            let multiplier = Table::shortest(b.scales.iter().map(|s| unit(s) / y.scale).collect());
            let (lo, hi) = y.bounds();
            Target::Quantized { dtype: y.dtype, multiplier, zero: y.zero, lo, hi, add: None }
        }
    };
    let op = IntegerProduct { kind, a_zero: Some(a_scheme.zero), b_zero: Table::shortest(b.zeros), bias, target };
    Some((op.into(), vec![a.into(), b.id.into()]))
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
pub(super) fn dynamic(view: &View, i: usize) -> Option<Replacement> {
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
