//! `Pad` before a convolution or a pool becomes the padding of its window.
//!
//! A convolution pads with 0, MaxPool with minus infinity, AveragePool with 0 where it counts padding.

use super::Pass;
use super::pattern::{Operand, Replacement, View, rewrite};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use crate::ops::conv::Conv;
use crate::ops::pad::{Mode, Pad};
use crate::ops::pool::Pool;
use crate::ops::spatial::{AutoPad, Axes, Window};
use weblane_kernels::conv::Layout;
use weblane_kernels::pool::PoolOp;

/// Moves padding into windows.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, |view, i| Ok(fold(view, i))).map(drop)
}

fn fold(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let padded = node.inputs.first().copied()??;
    let (p, pad) = view.producer(padded)?;
    if view.uses(padded) != 1 || node.outputs.len() != 1 {
        return None;
    }
    let (x, value, pads) = spatial_pads(view, pad)?;
    let op: Op = if let Some(conv) = node.op.get::<Conv>() {
        if value != 0.0 || conv.layout != Layout::Nchw {
            return None;
        }
        Conv { window: widened(&conv.window, &pads)?, ..conv.clone() }.into()
    } else {
        let pool = node.op.get::<Pool>().filter(|p| p.layout == Layout::Nchw)?;
        let op = match pool.op {
            PoolOp::Max if value == f32::NEG_INFINITY => pool.op,
            // Padding of its own that is not counted cannot stand beside padding that is.
            PoolOp::Average { include_pad } if value == 0.0 && !pool.window.ceil => {
                let own = pool.window.pads.iter().any(|&p| p > 0);
                if own && !include_pad {
                    return None;
                }
                PoolOp::Average { include_pad: true }
            }
            _ => return None,
        };
        Pool { window: widened(&pool.window, &pads)?, op, ..pool.clone() }.into()
    };
    let mut operands: Vec<Operand> = node.inputs.iter().map(|&id| id.into()).collect();
    operands[0] = x.into();
    Some(Replacement { root: i, nodes: vec![i, p], op, operands })
}

/// The operand, the constant and the spatial pads (begins, then ends) of a `Pad` that leaves batch and channels alone.
fn spatial_pads(view: &View, node: &Node) -> Option<(ValueId, f32, Axes)> {
    let pad = node.op.get::<Pad>().filter(|p| p.mode == Mode::Constant)?;
    let operand = |k: usize| node.inputs.get(k).copied().flatten();
    let x = operand(0)?;
    let rank = view.fact(x).filter(|_| view.is_f32(x))?.rank()?;
    // Left out or constant; anything else stays.
    let constants = |k: usize| match operand(k) {
        None => Some(None),
        Some(id) => view.fact(id).and_then(Fact::i64s).map(Some),
    };
    let value = match operand(2) {
        None => pad.value.unwrap_or(0.0),
        Some(id) => view.scalar(id)?,
    };
    let resolved = pad.resolve(constants(1)?.as_deref(), constants(3)?.as_deref(), rank).ok()?;
    let (outer, spatial) = resolved.split_at_checked(2)?;
    if outer.iter().any(|&p| p != (0, 0)) || spatial.is_empty() {
        return None;
    }
    let sizes = spatial.iter().map(|p| p.0).chain(spatial.iter().map(|p| p.1));
    let pads: Option<Axes> = sizes.map(|n| usize::try_from(n).ok().filter(|&n| n < 1 << 24)).collect();
    Some((x, value, pads?))
}

/// The window with more padding; `None` where its own depends on the size of the operand.
fn widened(window: &Window, pads: &Axes) -> Option<Window> {
    let own = match window.auto_pad {
        AutoPad::NotSet if !window.pads.is_empty() => window.pads.clone(),
        AutoPad::NotSet | AutoPad::Valid => Axes::from_elem(0, pads.len()),
        AutoPad::SameUpper | AutoPad::SameLower => return None,
    };
    if own.len() != pads.len() {
        return None;
    }
    let pads = own.iter().zip(pads).map(|(a, b)| a.saturating_add(*b)).collect();
    Some(Window { pads, auto_pad: AutoPad::NotSet, ..window.clone() })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints};
    use super::*;
    use crate::onnx::AttributeValue;

    fn build(opset: i64, pads: &[i64], value: Option<f32>, then: impl Fn(&mut Net, ValueId) -> ValueId) -> Vec<String> {
        let mut n = Net::new(opset);
        let x = n.input("x", &[1, 2, 6, 7]);
        let y = if opset < 11 {
            n.op_with("Pad", &[x], &[("pads", ints(pads))])
        } else {
            let mut operands = vec![x, n.i64s(pads)];
            operands.extend(value.map(|v| n.scalar(v)));
            n.op("Pad", &operands)
        };
        let y = then(&mut n, y);
        n.output(y);
        n.passed(run)
    }

    #[test]
    fn into_convolutions_and_pools() {
        let conv = |n: &mut Net, y: ValueId| {
            let w = n.weights(&[3, 2, 3, 3]);
            n.op_with("Conv", &[y, w], &[("strides", ints(&[2, 2])), ("pads", ints(&[1, 0, 0, 1]))])
        };
        // The asymmetric padding of TensorFlow's SAME, as attribute (opset 10) and operand.
        for opset in [10, 13] {
            assert_eq!(build(opset, &[0, 0, 0, 0, 0, 0, 1, 1], None, conv), ["Conv"]);
        }
        let kernel = ("kernel_shape", ints(&[2, 3]));
        let max = |n: &mut Net, y: ValueId| n.op_with("MaxPool", &[y], &[kernel.clone()]);
        assert_eq!(build(13, &[0, 0, 1, 1, 0, 0, 1, 1], Some(f32::NEG_INFINITY), max), ["MaxPool"]);
        let average = |n: &mut Net, y: ValueId| n.op_with("AveragePool", &[y], &[kernel.clone()]);
        assert_eq!(build(13, &[0, 0, 1, 1, 0, 0, 1, 1], Some(0.0), average), ["AveragePool"]);
    }

    #[test]
    fn stays_where_it_would_change_something() {
        let kernel = ("kernel_shape", ints(&[2, 3]));
        let conv = |n: &mut Net, y: ValueId| {
            let w = n.weights(&[3, 2, 3, 3]);
            n.op("Conv", &[y, w])
        };
        let same = |n: &mut Net, y: ValueId| {
            let w = n.weights(&[3, 2, 3, 3]);
            n.op_with("Conv", &[y, w], &[("auto_pad", AttributeValue::String("SAME_UPPER".into()))])
        };
        let max = |n: &mut Net, y: ValueId| n.op_with("MaxPool", &[y], &[kernel.clone()]);
        let average = |n: &mut Net, y: ValueId| {
            n.op_with("AveragePool", &[y], &[kernel.clone(), ("ceil_mode", int(1)), ("strides", ints(&[2, 2]))])
        };
        let spatial = [0, 0, 1, 1, 0, 0, 1, 1];
        assert_eq!(build(13, &spatial, Some(1.0), conv).len(), 2, "another constant");
        assert_eq!(build(13, &[0, 0, 1, 1, 0, 0, -1, 1], None, conv).len(), 2, "cut off");
        assert_eq!(build(13, &[1, 0, 1, 1, 0, 0, 0, 1], None, conv).len(), 2, "the batch padded");
        assert_eq!(build(13, &spatial, None, same).len(), 2, "padding that depends on the size");
        assert_eq!(build(13, &spatial, Some(0.0), max).len(), 2, "maximum with zeros");
        assert_eq!(build(13, &spatial, Some(0.0), average).len(), 2, "partial windows");
    }
}
