//! A convolution over cuts of an image that were joined along the channels reads the image itself.
//!
//! ```text
//! joined = Concat(x[:, :, b::s, a::t] for some a < t, b < s; axis = channels)
//! y = Conv(joined, w)                    becomes  y = Conv(x, w') with a window and a stride s, t times as large
//! ```
//!
//! where weight `[.., ky, kx]` of the channels of a cut is weight `[.., s ky + b, t kx + a]`, and places that no cut has are
//! zero. The first layer of YOLOv5 and YOLOX, "Focus", is written that way; it leaves six cuts, a join and the transposes of
//! twelve channels out, for as many multiplications.

use super::Pass;
use super::pattern::{Operand, Replacement, View, rewrite};
use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::ops::concat::Concat;
use crate::ops::conv::Conv;
use crate::ops::slice::Slice;
use crate::ops::spatial::{AutoPad, Axes, Window};
use crate::tensor::Tensor;
use weblane_kernels::conv::Layout;

/// More than so many cuts are of another kind of network.
const MAX_CUTS: usize = 16;

/// Lets convolutions read what was cut and joined for them.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, |view, i| fold(view, i).transpose()).map(drop)
}

/// Where a cut of an image begins and what its step is, along the height and the width.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cut {
    start: [usize; 2],
    step: [usize; 2],
}

/// The image that a value was cut from, and how.
fn cut(view: &View, mut value: ValueId) -> Option<(ValueId, Cut)> {
    let mut cut = Cut { start: [0; 2], step: [1; 2] };
    while let Some((_, node)) = view.producer(value) {
        let Some(slice) = node.op.get::<Slice>() else { break };
        let facts: Vec<_> = node.inputs.iter().map(|id| id.and_then(|id| view.fact(id))).collect();
        let [(0, 1), (0, 1), rows, columns] = slice.strided(&facts)?[..] else { return None };
        for (axis, (start, step)) in [rows, columns].into_iter().enumerate() {
            // Of what was cut already, so that it counts in steps of the cut before.
            cut.start[axis] = start.checked_add(cut.start[axis].checked_mul(step)?)?;
            cut.step[axis] = cut.step[axis].checked_mul(step)?;
        }
        value = node.inputs.first().copied()??;
    }
    Some((value, cut))
}

fn fold(view: &View, i: usize) -> Option<Result<Replacement>> {
    let node = &view.graph.nodes[i];
    let conv = node.op.get::<Conv>().filter(|c| c.groups == 1 && !c.residual && c.layout == Layout::Nchw)?;
    let (joined, weights) = (node.inputs.first().copied()??, node.inputs.get(1).copied()??);
    let (j, join) = view.producer(joined)?;
    let concat = join.op.get::<Concat>()?;
    let dims = view.fact(joined)?.dims()?;
    let weights = view.tensor(weights)?;
    let &[out, channels, kh, kw] = weights.dims() else { return None };
    if view.uses(joined) != 1 || dims.len() != 4 || !matches!(concat.axis, 1 | -3) || join.inputs.len() > MAX_CUTS {
        return None;
    }
    let cuts: Vec<(ValueId, Cut)> = join.operands().map(|id| cut(view, id)).collect::<Option<_>>()?;
    let &(x, Cut { step, .. }) = cuts.first()?;
    let image = view.fact(x).filter(|_| view.is_f32(x))?.dims()?;
    // Steps that divide the image leave cuts of one size, and no row or column behind the last window.
    let whole = image.len() == 4 && (0..2).all(|axis| step[axis] > 0 && image[2 + axis] == dims[2 + axis] * step[axis]);
    let alike = cuts.iter().all(|(id, cut)| *id == x && cut.step == step && (0..2).all(|a| cut.start[a] < step[a]));
    let distinct = (0..cuts.len()).all(|a| (0..a).all(|b| cuts[a].1 != cuts[b].1));
    let full = step[0].checked_mul(step[1]) == Some(cuts.len()) && cuts.len() > 1;
    if !whole || !alike || !distinct || !full || image[1].checked_mul(cuts.len()) != Some(channels) {
        return None;
    }
    let window = wider(&conv.window, step, [kh, kw])?;
    let starts: Vec<[usize; 2]> = cuts.iter().map(|(_, cut)| cut.start).collect();
    let weights = spread(weights, [out, image[1], kh, kw], step, &starts);
    Some(weights.map(|weights| {
        let mut operands: Vec<Operand> = node.inputs.iter().map(|&id| id.into()).collect();
        operands[0] = x.into();
        operands[1] = Operand::Constant(weights);
        Replacement { root: i, nodes: vec![i, j], op: Conv { window, ..conv.clone() }.into(), operands }
    }))
}

/// The window over the image; `None` where padding depends on its size, or taps have gaps.
fn wider(window: &Window, step: [usize; 2], kernel: [usize; 2]) -> Option<Window> {
    let times = |list: &Axes, default: usize| -> Option<Axes> {
        let list = if list.is_empty() { Axes::from_elem(default, 2) } else { list.clone() };
        list.iter().enumerate().map(|(i, n)| n.checked_mul(step[i % 2])).collect()
    };
    let pads = match window.auto_pad {
        AutoPad::NotSet if window.pads.len() == 4 => window.pads.clone(),
        AutoPad::NotSet if !window.pads.is_empty() => return None,
        AutoPad::NotSet | AutoPad::Valid => Axes::from_elem(0, 4),
        AutoPad::SameUpper | AutoPad::SameLower => return None,
    };
    if window.dilations.iter().any(|&d| d != 1) || window.ceil || !matches!(window.strides.len(), 0 | 2) {
        return None;
    }
    Some(Window {
        kernel: Some([kernel[0].checked_mul(step[0])?, kernel[1].checked_mul(step[1])?].into_iter().collect()),
        strides: times(&window.strides, 1)?,
        pads: times(&pads, 0)?,
        auto_pad: AutoPad::NotSet,
        ..window.clone()
    })
}

/// Weights `[out, cuts * channels, kh, kw]` as `[out, channels, kh * step, kw * step]`.
fn spread(
    weights: &Tensor,
    [out, channels, kh, kw]: [usize; 4],
    step: [usize; 2],
    starts: &[[usize; 2]],
) -> Result<Tensor> {
    let from = weights.as_slice::<f32>()?;
    let (height, width) = (kh * step[0], kw * step[1]);
    if from.len() != out * starts.len() * channels * kh * kw {
        return Err(Error::internal("weights do not have the size of their shape"));
    }
    // As many cuts as places: every weight has one.
    let mut to = vec![0.0; from.len()];
    for (row, from) in from.chunks_exact(kw).enumerate() {
        let (ky, rest) = (row % kh, row / kh);
        let (c, rest) = (rest % channels, rest / channels);
        let ([top, left], o) = (starts[rest % starts.len()], rest / starts.len());
        for (kx, &w) in from.iter().enumerate() {
            to[((o * channels + c) * height + ky * step[0] + top) * width + kx * step[1] + left] = w;
        }
    }
    Tensor::from_slice(&[out, channels, height, width], &to)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints};
    use super::*;

    fn slice(n: &mut Net, x: ValueId, axis: i64, start: i64, step: i64) -> ValueId {
        let operands = [x, n.i64s(&[start]), n.i64s(&[i64::from(i32::MAX)]), n.i64s(&[axis]), n.i64s(&[step])];
        n.op("Slice", &operands)
    }

    fn focus(cuts: &[[i64; 2]], step: i64, attrs: &[(&str, crate::onnx::AttributeValue)]) -> Vec<String> {
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 3, 12, 24]);
        let parts: Vec<ValueId> = cuts
            .iter()
            .map(|&[top, left]| {
                let rows = slice(&mut n, x, 2, top, step);
                slice(&mut n, rows, -1, left, step)
            })
            .collect();
        let joined = n.op_with("Concat", &parts, &[("axis", int(1))]);
        let (w, b) = (n.weights(&[5, 3 * cuts.len(), 3, 3]), n.weights(&[5]));
        let y = n.op_with("Conv", &[joined, w, b], attrs);
        n.output(y);
        n.passed(run)
    }

    #[test]
    fn the_focus_of_yolo() {
        let cuts = [[0, 0], [1, 0], [0, 1], [1, 1]];
        assert_eq!(focus(&cuts, 2, &[("pads", ints(&[1, 1, 1, 1]))]), ["Conv"]);
        assert_eq!(focus(&cuts, 2, &[("pads", ints(&[0, 2, 1, 0])), ("strides", ints(&[2, 1]))]), ["Conv"]);
        assert_eq!(focus(&cuts, 2, &[]), ["Conv"]);
    }

    #[test]
    fn other_cuts_stay() {
        let stays = |cuts: &[[i64; 2]], step, attrs: &[_]| focus(cuts, step, attrs).len() > 1;
        assert!(stays(&[[0, 0], [1, 0], [0, 1]], 2, &[]), "one is missing");
        assert!(stays(&[[0, 0], [1, 0], [0, 1], [0, 1]], 2, &[]), "one stands twice");
        assert!(stays(&[[0, 0], [1, 0], [0, 1], [1, 1]], 3, &[]), "steps leave a gap");
        let dilated = ("dilations", ints(&[2, 2]));
        assert!(stays(&[[0, 0], [1, 0], [0, 1], [1, 1]], 2, &[dilated]));
    }
}
