//! Products of integers that the model names, with constant weights, become the engine's own.

use super::{Scheme, Weights, columns, input, integers, is_byte};
use crate::fact::Fact;
use crate::graph::{Node, ValueId};
use crate::ops::Table;
use crate::ops::cast::Cast;
use crate::ops::conv::Conv;
use crate::ops::integer_product::{IntegerProduct, Kind, Target};
use crate::ops::matmul::MatMul;
use crate::ops::quantize::{Product as QuantizedKind, QuantizedProduct};
use crate::optimize::pattern::{Replacement, View};
use weblane_kernels::conv::Layout;
use weblane_kernels::epilogue::Activation;

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
