//! GroupNorm, which exporters spell as InstanceNormalization of groups, becomes one node.
//!
//! ```text
//! g = InstanceNormalization(Reshape(x, [batch, groups, -1]), ones, zeros)
//! y = Reshape(g, shape of x) * scale + bias                                  both of [channels, 1, ..]
//! ```
//!
//! The reshapes would keep it from following the layout of the convolutions around it.

use super::Pass;
use super::pattern::{Match, Operand, View, constant, op_if, rewrite, var};
use crate::error::Result;
use crate::graph::Graph;
use crate::ops::norm::GroupNormalization;
use crate::tensor::Tensor;
use weblane_kernels::conv::Layout;

/// Replaces the spelled-out form by [`GroupNormalization`].
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let reshape = |x, extra| op_if(&["Reshape"], [x, var(extra)], |_, _| true);
    let parts = reshape(var("x"), "first").named("parts");
    let normal = op_if(&["InstanceNormalization"], [parts, constant("ones"), constant("zeros")], |_, _| true);
    let whole = reshape(normal.named("normal"), "second").named("whole");
    let pattern = whole * constant("scale") + constant("bias");
    rewrite(graph, pass, |view, i| {
        let found = (view.graph.nodes[i].op.name() == "Add").then(|| view.find(&pattern, i)).flatten();
        let Some(found) = found else { return Ok(None) };
        let Some((op, operands)) = operands(view, &found)? else { return Ok(None) };
        Ok(Some(found.replace(op, operands)))
    })
    .map(drop)
}

fn operands(view: &View, found: &Match) -> Result<Option<(GroupNormalization, Vec<Operand>)>> {
    let of = |name| found.get(name).and_then(|id| view.fact(id));
    let (Some(x), Some(whole), Some((_, normal))) =
        (found.get("x"), found.get("whole"), found.get("normal").and_then(|id| view.producer(id)))
    else {
        return Ok(None);
    };
    let (Some(shape), Some(parts)) =
        (of("x").and_then(|f| f.shape.as_deref()), of("parts").and_then(|f| f.shape.as_deref()))
    else {
        return Ok(None);
    };
    let ([batch, channels, _, ..], [same, groups, _]) = (shape, parts) else { return Ok(None) };
    let (Some(channels), Some(groups)) = (channels.known(), groups.known()) else { return Ok(None) };
    let all = |name: &str, value: f32| {
        let tensor = found.get(name).and_then(|id| view.tensor(id))?;
        Some(tensor.as_slice::<f32>().ok()?.iter().all(|v| *v == value))
    };
    let fits = batch == same
        && groups > 0
        && channels % groups == 0
        && view.is_f32(x)
        && view.same_shape(x, whole)
        && all("ones", 1.0) == Some(true)
        && all("zeros", 0.0) == Some(true);
    let Some(inner) = normal.op.get::<GroupNormalization>().filter(|n| fits && n.groups.is_none()) else {
        return Ok(None);
    };
    let mut operands = vec![x.into()];
    for name in ["scale", "bias"] {
        // Only the axis of the channels, counted from the last one.
        let Some(tensor) = found.get(name).and_then(|id| view.tensor(id)) else { return Ok(None) };
        let places = shape.len() - 2;
        let dims = tensor.dims();
        let own = dims.len().checked_sub(places + 1).and_then(|axis| dims.get(axis));
        if tensor.len() != channels || own != Some(&channels) {
            return Ok(None);
        }
        operands.push(Operand::Constant(Tensor::clone(tensor).reshaped(&[channels])?));
    }
    let op =
        GroupNormalization { groups: Some(groups), epsilon: inner.epsilon, per_group: false, layout: Layout::Nchw };
    Ok(Some((op, operands)))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints, names};
    use super::*;

    fn net(scale: &[usize]) -> Net {
        let mut n = Net::new(17);
        let x = n.input("x", &[2, 6, 5, 4]);
        let w = n.weights(&[6, 6, 3, 3]);
        let x = n.op_with("Conv", &[x, w], &[("pads", ints(&[1; 4]))]);
        let (ones, zeros) = (n.constant(&[3], &[1.0; 3]), n.constant(&[3], &[0.0; 3]));
        let parts = n.i64s(&[0, 3, -1]);
        let y = n.op("Reshape", &[x, parts]);
        let y = n.op("InstanceNormalization", &[y, ones, zeros]);
        let shape = n.op("Shape", &[x]);
        let y = n.op("Reshape", &[y, shape]);
        let (scale, bias) = (n.weights(scale), n.weights(&[6, 1, 1]));
        let y = n.op("Mul", &[y, scale]);
        let y = n.op("Add", &[y, bias]);
        let w = n.weights(&[6, 6, 3, 3]);
        let y = n.op_with("Conv", &[y, w], &[("group", int(1))]);
        n.output(y);
        n
    }

    #[test]
    fn between_convolutions_it_stays_channels_last() {
        for scale in [&[6, 1, 1][..], &[1, 6, 1, 1]] {
            let n = net(scale);
            n.check(&n.apply(run));
            assert_eq!(n.optimized(), ["Transpose", "Conv", "GroupNormalization", "Conv", "Transpose"]);
        }
    }

    #[test]
    fn factors_of_another_axis_are_left() {
        let n = net(&[5, 1]);
        assert!(names(&n.apply(run)).contains(&"InstanceNormalization".to_owned()));
    }
}
