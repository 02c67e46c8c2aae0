//! What only moves elements moves bytes: DequantizeLinear goes behind it.

use super::{dequantized, input, strip};
use crate::error::Result;
use crate::graph::{Graph, Node};
use crate::ops::pad::{Mode, Pad};
use crate::ops::pool::Pool;
use crate::ops::resize::{Coordinates, Resize};
use crate::ops::split::Split;
use crate::ops::{Op, resize};
use crate::optimize::Pass;
use crate::optimize::pattern::{Operand, Replacement, View};

/// DequantizeLinear goes behind what only moves elements.
pub(super) fn moved(view: &View, i: usize) -> Option<Replacement> {
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
pub(super) fn split(graph: &mut Graph, pass: &Pass) -> Result<bool> {
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
