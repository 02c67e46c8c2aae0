//! What products take in once the rest of the graph is of integers: results that stay real, sums and bounds.

use super::{Product, input};
use crate::error::Result;
use crate::graph::ValueId;
use crate::ops::Table;
use crate::ops::integer_product::{IntegerProduct, Sum, Target};
use crate::ops::lookup::Lookup;
use crate::ops::quantized_binary::QuantizedBinary;
use crate::optimize::pattern::{Operand, Replacement, View};
use crate::tensor::{DType, Tensor};
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{Binary, Function as QuantizedFunction};

/// A product that nobody quantises again.
pub(super) fn real(view: &View, i: usize) -> Result<Option<Replacement>> {
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
pub(super) fn residual(view: &View, i: usize) -> Option<Replacement> {
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
            let &Binary { offset, zero, lo, hi, .. } = binary;
            *add = Some(Sum { other_zero, first, second, offset, zero, lo, hi });
            *dtype = sum.dtype;
        }
        let mut operands: Vec<Operand> = product.inputs.iter().map(|&id| id.into()).collect();
        operands.push(other.into());
        Some(Replacement { root: i, nodes: vec![i, p], op: op.into(), operands })
    })
}

/// A table behind a product that only bounds its result.
pub(super) fn clamp(view: &View, i: usize) -> Option<Replacement> {
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
