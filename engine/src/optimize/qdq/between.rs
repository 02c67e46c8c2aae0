//! An operator of real numbers between DequantizeLinear and QuantizeLinear becomes one of integers.

use super::{Product, Scheme, bounded, dequantized, input, quantizer, transposed};
use crate::fact::axis_index;
use crate::graph::Node;
use crate::ops::binary::{Arithmetic, Function};
use crate::ops::concat::Concat;
use crate::ops::lookup::Lookup;
use crate::ops::matmul::MatMul;
use crate::ops::pool::{GlobalPool, Pool};
use crate::ops::qlinear_softmax::QLinearSoftmax;
use crate::ops::quantize::{Product as QuantizedKind, QuantizedProduct};
use crate::ops::quantized_binary::QuantizedBinary;
use crate::ops::quantized_pool::{QuantizedMean, Windows};
use crate::ops::quantized_resize::QuantizedResize;
use crate::ops::reduce::Reduce;
use crate::ops::reshape::Squeeze;
use crate::ops::resize::{Coordinates, Resize};
use crate::ops::softmax::{self, Softmax};
use crate::ops::{Op, resize};
use crate::optimize::pattern::{Operand, Replacement, View};
use std::collections::BTreeSet;
use weblane_kernels::conv::Layout;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{Binary, Function as QuantizedFunction, Interpolation, Mean};
use weblane_kernels::pool::PoolOp;
use weblane_kernels::reduce::Reduction;

/// A QuantizeLinear with what it quantises.
pub(super) fn operator(view: &View, i: usize) -> Option<Replacement> {
    let (x, y) = quantizer(view, &view.graph.nodes[i])?;
    let mut nodes = vec![i];
    let (x, bounds) = bounded(view, x, &mut nodes);
    let (p, node) = view.producer(x).filter(|(_, n)| view.uses(x) == 1 && n.outputs.len() == 1)?;
    let bounds = y.quantize_bounds(bounds);
    nodes.push(p);
    let (op, operands) = product(view, node, y, bounds)
        .or_else(|| binary(view, node, y, bounds))
        .or_else(|| transposed::convolution(view, node, y, bounds))
        .or_else(|| mean(view, node, y, bounds))
        .or_else(|| interpolation(view, node, y, bounds))
        .or_else(|| if bounds == y.bounds() { unbounded(view, node, y) } else { None })?;
    Some(Replacement { root: i, nodes, op, operands })
}

/// An operator and what it reads.
pub(super) type Made = (Op, Vec<Operand>);

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
    let binary = Binary { function, zeros: [sa.zero, sb.zero], offset: 0.0, zero: y.zero, lo, hi };
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

fn interpolation(view: &View, node: &Node, y: Scheme, (lo, hi): (i32, i32)) -> Option<Made> {
    let resize = node.op.get::<Resize>()?.clone();
    // What copies elements goes before DequantizeLinear.
    if resize.mode == resize::Mode::Nearest || resize.coordinates == Coordinates::TfCropAndResize {
        return None;
    }
    let (x, from) = dequantized(view, input(node, 0)?)?;
    let interpolation = Interpolation { x_zero: from.zero, multiplier: from.scale / y.scale, zero: y.zero, lo, hi };
    let mut operands: Vec<Operand> = node.inputs.iter().map(|&id| id.into()).collect();
    operands[0] = x.into();
    Some((QuantizedResize { resize, interpolation, dtype: y.dtype }.into(), operands))
}

/// What has no bounds of its own.
fn unbounded(view: &View, node: &Node, y: Scheme) -> Option<Made> {
    concat(view, node, y).or_else(|| softmax(view, node, y)).or_else(|| product_of_two(view, node, y))
}

fn softmax(view: &View, node: &Node, y: Scheme) -> Option<Made> {
    let softmax = node.op.get::<Softmax>().filter(|s| s.kind == softmax::Kind::Softmax)?;
    let (x, from) = dequantized(view, input(node, 0)?)?;
    let op = QLinearSoftmax { axis: softmax.axis, flatten: softmax.flatten, whole_steps: false };
    let mut operands = vec![x.into()];
    operands.extend(from.operands(1.0)?);
    operands.extend(y.operands(1.0)?);
    (from.dtype == y.dtype).then(|| (op.into(), operands))
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

pub(super) fn requantizer(from: &Scheme, to: &Scheme) -> Lookup {
    Lookup { table: to.table_from(from), dtype: to.dtype }
}
