//! Nodes that change nothing, or nothing that matters, go: casts to the same type, transposes and reshapes to the same
//! shape, slices of everything, sums with 0 and products with 1, `Expand` before an operator that broadcasts anyway.
//! Two transposes in a row become one, a mean over all places of an image becomes the pooling that follows its layout, and
//! sizes that are asked whether they are -1 answer.

use super::Pass;
use super::pattern::{Operand, Replacement, View, rewrite};
use crate::error::Result;
use crate::fact::{Dim, Fact, Shape, broadcast};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::concat::Concat;
use crate::ops::pool::GlobalPool;
use crate::ops::reduce::Reduce;
use crate::ops::transpose::Transpose;
use crate::tensor::{DType, Tensor};
use weblane_kernels::conv::Layout;
use weblane_kernels::pool::PoolOp;
use weblane_kernels::reduce::Reduction;

/// Removes what does nothing.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, |view, i| Ok(pooled(view, i)))?;
    // One simplification may make way for another.
    for _ in 0..4 {
        let facts = pass.facts(graph)?;
        let mut changed = drop_noops(graph, &facts);
        changed |= join_transposes(graph, &facts);
        changed |= drop_expands(graph, &facts);
        graph.remove_dead_nodes();
        changed |= rewrite(graph, pass, guarded)?;
        if !changed {
            break;
        }
    }
    Ok(())
}

/// `ReduceMean` over axes 2 and up of an image, which stay with length 1, is `GlobalAveragePool`: newer exporters write the
/// former for the latter.
fn pooled(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let reduce = node.op.get::<Reduce>().filter(|r| r.reduction == Reduction::Mean && r.keep)?;
    let x = node.inputs.first().copied().flatten()?;
    let fact = view.fact(x).filter(|f| f.dtype == DType::F32)?;
    let rank = fact.rank().filter(|r| (4..=5).contains(r))?;
    let axes = match node.inputs.get(1).copied().flatten() {
        Some(id) => view.fact(id)?.i64s()?,
        None => reduce.axes.as_deref()?.into(),
    };
    let mut axes: Vec<i64> = axes.iter().map(|&a| if a < 0 { a + rank as i64 } else { a }).collect();
    axes.sort_unstable();
    let op = GlobalPool { op: PoolOp::Average { include_pad: false }, layout: Layout::Nchw };
    let fits = axes.iter().copied().eq(2..rank as i64);
    fits.then(|| Replacement { root: i, nodes: vec![i], op: op.into(), operands: vec![x.into()] })
}

/// `Where(sizes == -1, a, sizes)` for sizes that a `Concat` joins from numbers and sizes of values: the latter are not -1,
/// and of the former it is known. PyTorch's exporter writes it before an `Expand`, whose result has no known shape else.
fn guarded(view: &View, i: usize) -> Result<Option<Replacement>> {
    let node = &view.graph.nodes[i];
    let &[Some(condition), Some(instead), Some(sizes)] = node.inputs.as_slice() else { return Ok(None) };
    let (Some((_, equal)), Some((_, concat))) = (view.producer(condition), view.producer(sizes)) else {
        return Ok(None);
    };
    let fits = node.op.name() == "Where" && equal.op.name() == "Equal" && concat.op.is::<Concat>();
    let other = match equal.inputs.as_slice() {
        [Some(a), Some(b)] if fits && *a == sizes => *b,
        [Some(a), Some(b)] if fits && *b == sizes => *a,
        _ => return Ok(None),
    };
    let numbers = |id: ValueId| view.fact(id).and_then(Fact::i64s);
    let (Some(wanted), Some(instead)) = (numbers(other), numbers(instead)) else { return Ok(None) };
    let at = |v: &[i64], i: usize| v.get(if v.len() == 1 { 0 } else { i }).copied();
    let (mut operands, mut place): (Vec<Operand>, usize) = (Vec::new(), 0);
    for id in concat.operands() {
        let fact = view.fact(id);
        if let Some(own) = numbers(id) {
            let mut values = Vec::with_capacity(own.len());
            for &v in &own {
                let (Some(w), Some(a)) = (at(&wanted, place), at(&instead, place)) else { return Ok(None) };
                values.push(if v == w { a } else { v });
                place += 1;
            }
            operands.push(Operand::Constant(Tensor::from_slice(&[values.len()], &values)?));
        } else if let Some(own) = fact.and_then(Fact::sizes).filter(|s| !s.contains(&Dim::Unknown)) {
            if (place..place + own.len()).any(|i| at(&wanted, i).is_none_or(|w| w >= 0)) {
                return Ok(None);
            }
            place += own.len();
            operands.push(id.into());
        } else {
            return Ok(None);
        }
    }
    let op = concat.op.clone();
    Ok((operands.len() == concat.inputs.len()).then_some(Replacement { root: i, nodes: vec![i], op, operands }))
}

/// The operand that result 0 equals.
fn noop(view: &View, node: &Node) -> Option<ValueId> {
    let x = node.inputs.first().copied().flatten()?;
    let y = *node.outputs.first()?;
    if node.outputs[1..].iter().any(|&o| view.uses(o) > 0) {
        return None;
    }
    let (fx, fy) = (view.fact(x)?, view.fact(y)?);
    if fx.dtype != fy.dtype {
        return None;
    }
    let scalar = |k: usize, value: f32| {
        let id = node.inputs.get(k).copied().flatten()?;
        view.scalar(id).filter(|&v| v == value)
    };
    let other = || node.inputs.get(1).copied().flatten();
    match node.op.name() {
        // What a cast to the same type may change is its rounding, which has happened already.
        "Identity" | "Cast" | "CastLike" => Some(x),
        // A dropout whose mask nobody reads; one that may be asked to train has to look.
        "Dropout" if node.inputs.get(2).copied().flatten().is_none() => Some(x),
        "Transpose" => {
            let perm = node.op.get::<Transpose>()?.permutation(fx.rank()?).ok()?;
            perm.iter().enumerate().all(|(i, &p)| i == p).then_some(x)
        }
        "Expand" => view.same_shape(x, y).then_some(x),
        // Forth and back: what stands before the first of them.
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => {
            let mut source = x;
            for _ in 0..4 {
                if view.same_shape(source, y) {
                    return Some(source);
                }
                let (_, before) = view.producer(source).filter(|(_, n)| is_reshape(n))?;
                source = before.inputs.first().copied()??;
            }
            None
        }
        "Concat" if node.operands().count() == 1 => Some(x),
        "Slice" => {
            let steps = match node.inputs.get(4).copied().flatten() {
                None => true,
                Some(steps) => view.fact(steps).and_then(Fact::i64s).is_some_and(|s| s.iter().all(|&s| s == 1)),
            };
            (steps && view.same_shape(x, y)).then_some(x)
        }
        // Not by the shapes: what one side gains the other may lose.
        "Pad" => {
            let pads = node.inputs.get(1).copied().flatten().and_then(|id| view.fact(id)?.i64s())?;
            (node.inputs.get(3).copied().flatten().is_none() && pads.iter().all(|&p| p == 0)).then_some(x)
        }
        "Add" | "Sub" if scalar(1, 0.0).is_some() => view.same_rank(x, y).then_some(x),
        "Mul" | "Div" | "Pow" if scalar(1, 1.0).is_some() => view.same_rank(x, y).then_some(x),
        "Add" if scalar(0, 0.0).is_some() => other().filter(|&o| view.same_rank(o, y)),
        "Mul" if scalar(0, 1.0).is_some() => other().filter(|&o| view.same_rank(o, y)),
        _ => None,
    }
}

fn is_reshape(node: &Node) -> bool {
    matches!(node.op.name(), "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze")
}

fn drop_noops(graph: &mut Graph, facts: &[Option<Fact>]) -> bool {
    let view = View::new(graph, facts);
    let mut same: Vec<ValueId> = (0..graph.values.len() as u32).map(ValueId).collect();
    let mut changed = false;
    // In order, so that what a no-op reads is resolved already.
    for node in &graph.nodes {
        if let Some(x) = noop(&view, node)
            && !graph.outputs.contains(&node.outputs[0])
        {
            same[node.outputs[0].index()] = same[x.index()];
            changed = true;
        }
    }
    for id in graph.nodes.iter_mut().flat_map(|n| n.inputs.iter_mut().flatten()) {
        *id = same[id.index()];
    }
    changed
}

fn join_transposes(graph: &mut Graph, facts: &[Option<Fact>]) -> bool {
    let view = View::new(graph, facts);
    let mut joined = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let of = |node: &Node| {
            let x = node.inputs.first().copied().flatten()?;
            let perm = node.op.get::<Transpose>()?.permutation(view.fact(x)?.rank()?).ok()?;
            Some((x, perm))
        };
        let Some((middle, second)) = of(node) else { continue };
        let Some((x, first)) = view.producer(middle).and_then(|(_, n)| of(n)) else { continue };
        let perm: Vec<usize> = second.iter().map(|&p| first[p]).collect();
        joined.push((i, x, Transpose::new(&perm)));
    }
    let changed = !joined.is_empty();
    for (i, x, op) in joined {
        graph.nodes[i].op = op.into();
        graph.nodes[i].inputs[0] = Some(x);
    }
    changed
}

/// Operators whose operands broadcast against each other as in NumPy.
const BROADCASTING: &[&str] = &[
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Where",
    "And",
    "Or",
    "Xor",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Min",
    "Max",
];

/// `f(Expand(x, ..), y)` is `f(x, y)` where y already has all the sizes; a cast may stand in between.
fn drop_expands(graph: &mut Graph, facts: &[Option<Fact>]) -> bool {
    let view = View::new(graph, facts);
    let mut swaps: Vec<(usize, usize, ValueId)> = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        if !BROADCASTING.contains(&node.op.name()) || swaps.iter().any(|s| s.0 == i) {
            continue;
        }
        for (k, id) in node.inputs.iter().enumerate() {
            let Some((at, slot, x)) = id.and_then(|id| expanded(&view, i, k, id)) else { continue };
            let shape_of = |id: ValueId| view.fact(id).and_then(|f| f.shape.clone());
            let others = node.inputs.iter().enumerate().filter(|(j, _)| *j != k).filter_map(|(_, id)| *id);
            let sizes: Option<Vec<Shape>> = others.chain([x]).map(shape_of).collect();
            let (Some(sizes), Some(want)) = (sizes, shape_of(node.outputs[0])) else { continue };
            let have = sizes.iter().try_fold(Shape::new(), |a, b| broadcast(&a, b).ok());
            // Sizes must be sure: a name against a number may turn out to be 1.
            if have.is_some_and(|have| have == want && !have.contains(&Dim::Unknown)) && sure(&sizes, &want) {
                swaps.push((at, slot, x));
                break;
            }
        }
    }
    let changed = !swaps.is_empty();
    for (i, k, x) in swaps {
        graph.nodes[i].inputs[k] = Some(x);
    }
    changed
}

/// Whether some operand has each size of the result in so many words.
fn sure(sizes: &[Shape], want: &Shape) -> bool {
    (0..want.len()).all(|back| {
        let size = &want[want.len() - 1 - back];
        *size == Dim::Known(1) || sizes.iter().any(|s| s.len() > back && s[s.len() - 1 - back] == *size)
    })
}

/// For operand `k` of node `i`, if it is an `Expand` of x or a cast of one: which operand of which node may read x.
fn expanded(view: &View, i: usize, k: usize, id: ValueId) -> Option<(usize, usize, ValueId)> {
    let source = |node: &Node| node.inputs.first().copied().flatten();
    let (p, node) = view.producer(id)?;
    match node.op.name() {
        "Expand" => Some((i, k, source(node)?)),
        "Cast" if view.uses(id) == 1 => {
            let (_, expand) = view.producer(source(node)?)?;
            (expand.op.name() == "Expand").then_some((p, 0, source(expand)?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints, names};
    use super::*;

    #[test]
    fn sizes_beside_minus_one_are_themselves() {
        let mut n = Net::new(14);
        let x = n.symbolic("x", &["batch", "1", "1", "tokens"]);
        let shape = n.op("Shape", &[x]);
        let size = |n: &mut Net, i: i64| {
            let i = n.i64s(&[i]);
            n.op_with("Gather", &[shape, i], &[("axis", int(0))])
        };
        let (batch, tokens, keep) = (size(&mut n, 0), size(&mut n, 3), n.i64s(&[-1]));
        let sizes = n.op_with("Concat", &[batch, keep, tokens, tokens], &[("axis", int(0))]);
        let (minus, ones) = (n.i64s(&[-1, -1, -1, -1]), n.i64s(&[1, 1, 1, 1]));
        let asked = n.op("Equal", &[sizes, minus]);
        let sizes = n.op("Where", &[asked, ones, sizes]);
        let y = n.op("Expand", &[x, sizes]);
        let y = n.op("Neg", &[y]);
        n.output(y);
        let graph = n.apply(run);
        n.check(&graph);
        assert!(!names(&graph).iter().any(|n| n == "Where"), "{:?}", names(&graph));
    }

    #[test]
    fn only_a_padding_of_nothing_goes() {
        for (pads, want) in [([0, 0, 0, 0], &["Neg"][..]), ([0, 1, 0, -1], &["Pad", "Neg"])] {
            let mut n = Net::new(13);
            let x = n.input("x", &[2, 3]);
            let pads = n.i64s(&pads);
            let y = n.op("Pad", &[x, pads]);
            let y = n.op("Neg", &[y]);
            n.output(y);
            let graph = n.apply(run);
            n.check(&graph);
            assert_eq!(names(&graph), want);
        }
    }

    #[test]
    fn a_mean_over_the_places_of_an_image_is_a_pooling() {
        for (axes, opset) in [(&[2i64, 3][..], 13), (&[-1, -2], 18)] {
            let mut n = Net::new(opset);
            let x = n.input("x", &[2, 3, 5, 4]);
            let y = if opset == 13 {
                n.op_with("ReduceMean", &[x], &[("axes", ints(axes))])
            } else {
                let axes = n.i64s(axes);
                n.op("ReduceMean", &[x, axes])
            };
            n.output(y);
            let graph = n.apply(run);
            n.check(&graph);
            assert_eq!(names(&graph), ["GlobalAveragePool"]);
        }
        let mut n = Net::new(13);
        let x = n.input("x", &[2, 3, 5, 4]);
        let y = n.op_with("ReduceMean", &[x], &[("axes", ints(&[1, 2]))]);
        n.output(y);
        assert_eq!(names(&n.apply(run)), ["ReduceMean"]);
    }

    #[test]
    fn what_does_nothing_goes() {
        let mut n = Net::new(14);
        let x = n.symbolic("x", &["batch", "4"]);
        let y = n.op("Sigmoid", &[x]);
        let y = n.op_with("Cast", &[y], &[("to", int(1))]);
        let y = n.op_with("Transpose", &[y], &[("perm", ints(&[1, 0]))]);
        let y = n.op_with("Transpose", &[y], &[("perm", ints(&[1, 0]))]);
        let y = n.op_with("Concat", &[y], &[("axis", int(0))]);
        let shape = n.op("Shape", &[x]);
        let y = n.op("Reshape", &[y, shape]);
        let (zero, one) = (n.scalar(0.0), n.scalar(1.0));
        let y = n.op("Add", &[zero, y]);
        let y = n.op("Div", &[y, one]);
        let y = n.op("Relu", &[y]);
        n.output(y);
        assert_eq!(n.passed(run), ["Sigmoid", "Relu"]);
    }

    #[test]
    fn reshapes_forth_and_back() {
        let mut n = Net::new(14);
        let x = n.symbolic("x", &["batch", "tokens", "6"]);
        let y = n.op("Relu", &[x]);
        let (cut, join) = (n.i64s(&[0, 0, 2, 3]), n.i64s(&[0, 0, 6]));
        let y = n.op("Reshape", &[y, cut]);
        let z = n.op("Reshape", &[y, join]);
        let z = n.op("Abs", &[z]);
        n.output(y);
        n.output(z);
        assert_eq!(n.passed(run), ["Relu", "Reshape", "Abs"]);
    }

    #[test]
    fn what_does_something_stays() {
        let mut n = Net::new(14);
        let x = n.input("x", &[4, 4]);
        // Backwards, one more axis, an output of the graph, another type.
        let [starts, ends, axes, steps] = [[-1], [-5], [0], [-1]].map(|v| n.i64s(&v));
        let y = n.op("Slice", &[x, starts, ends, axes, steps]);
        let zero = n.constant(&[1, 1, 1], &[0.0]);
        let y = n.op("Add", &[y, zero]);
        let y = n.op_with("Cast", &[y], &[("to", int(11))]);
        let y = n.op_with("Cast", &[y], &[("to", int(1))]);
        let y = n.op_with("Cast", &[y], &[("to", int(1))]);
        n.output(y);
        assert_eq!(n.passed(run), ["Slice", "Add", "Cast", "Cast", "Cast"]);
    }

    #[test]
    fn expand_before_a_broadcast() {
        let build = |dims: &[&str]| {
            let mut n = Net::new(14);
            let scores = n.symbolic("scores", &["batch", "2", "tokens", "tokens"]);
            let mask = n.symbolic("mask", dims);
            let shape = n.op("Shape", &[scores]);
            let y = n.op("Expand", &[mask, shape]);
            let y = n.op_with("Cast", &[y], &[("to", int(9))]);
            let low = n.scalar(-9.0);
            let y = n.op("Where", &[y, low, scores]);
            n.output(y);
            n.passed(run)
        };
        assert_eq!(build(&["batch", "1", "1", "tokens"]), ["Cast", "Where"]);
        // The expansion makes the result larger.
        let mut n = Net::new(14);
        let x = n.input("x", &[1, 3]);
        let shape = n.i64s(&[2, 3]);
        let y = n.op("Expand", &[x, shape]);
        let y = n.op("Add", &[y, x]);
        n.output(y);
        assert_eq!(n.passed(run), ["Expand", "Add"]);
    }
}
