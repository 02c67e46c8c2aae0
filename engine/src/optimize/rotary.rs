//! Rotary positions as PyTorch spells them out become one node, and transposes move behind it.
//!
//! ```text
//! x * cos + Concat(-x[.., n..], x[.., ..n]) * sin         -> RotaryEmbedding(x, cos[.., ..n], sin[.., ..n])
//! Concat(RotaryEmbedding(x[.., ..m], ..), x[.., m..])     -> RotaryEmbedding(x, ..) of m elements of each head
//! RotaryEmbedding(Transpose(x, [0, 2, 1, 3]), ..)         -> Transpose(RotaryEmbedding(x, ..), [0, 2, 1, 3])
//! ```
//!
//! for x of `[batch, heads, positions, 2 n]` and tables whose two halves are the same. Attention reads heads where they are,
//! so the transpose goes there.

use super::Pass;
use super::pattern::{Match, Operand, Pattern, Replacement, View, op, op_if, rewrite, var};
use crate::error::Result;
use crate::fact::{Dim, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::reshape::{Reshape, Squeeze};
use crate::ops::rotary::RotaryEmbedding;
use crate::ops::slice::Slice;
use crate::ops::transpose::Transpose;
use crate::tensor::Tensor;

/// Replaces the spelled-out form, and brings heads inside.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let pattern = pattern();
    rewrite(graph, pass, |view, i| match view.graph.nodes[i].op.name() {
        "Add" => view.find(&pattern, i).map_or(Ok(None), |found| turned(view, &found)),
        "Concat" => Ok(partial(view, i)),
        _ => inside(view, i),
    })
    .map(drop)
}

fn pattern() -> Pattern {
    let x = var("x");
    let half = |second: bool| {
        op_if(&["Slice"], [var("x")], move |view, node| {
            part(view, node).is_some_and(|(_, [start, n, of])| 2 * n == of && start == if second { n } else { 0 })
        })
    };
    let turned = op_if(&["Concat"], [op("Neg", [half(true)]), half(false)], |_, node| node.inputs.len() == 2);
    &x * var("cos") + turned.named("turned") * var("sin")
}

/// The operand of a slice of neighbours along the last axis, where it begins there, and how many of how many it takes.
fn part(view: &View, node: &Node) -> Option<(ValueId, [usize; 3])> {
    let number = |k: usize| match *view.fact(node.inputs.get(k).copied()??)?.i64s()? {
        [n] => Some(n),
        _ => None,
    };
    let shape = |id: ValueId| view.fact(id)?.shape.as_deref();
    let x = node.inputs.first().copied().flatten().filter(|_| node.op.is::<Slice>())?;
    let (from, to) = (shape(x)?, shape(*node.outputs.first()?)?);
    let (of, count) = (from.last()?.known()?, to.last()?.known()?);
    let positive = |n: i64, of: usize| usize::try_from(if n < 0 { n + of as i64 } else { n }).ok();
    let fits = positive(number(3)?, from.len())? + 1 == from.len() && (node.inputs.len() < 5 || number(4) == Some(1));
    fits.then_some((x, [positive(number(1)?, of)?, count, of]))
}

/// Whether the rows of a table are twice the same.
fn is_twice(view: &View, mut id: ValueId, size: usize) -> Option<bool> {
    loop {
        let fact = view.fact(id)?;
        if fact.shape.as_ref()?.last()?.known()? != size {
            return None;
        }
        if let Some(t) = fact.tensor() {
            let same = |row: &[f32]| row[..size / 2] == row[size / 2..];
            return Some(t.as_slice::<f32>().ok()?.chunks_exact(size).all(same));
        }
        let (_, node) = view.producer(id)?;
        let operand = |k: usize| node.inputs.get(k).copied().flatten();
        id = match node.op.name() {
            "Concat" => {
                let last = |id| view.fact(id)?.shape.as_ref()?.last()?.known();
                return Some(node.inputs.len() == 2 && operand(0) == operand(1) && last(operand(0)?) == Some(size / 2));
            }
            "Cos" | "Sin" | "Cast" | "Unsqueeze" | "Reshape" => operand(0)?,
            "Mul" if view.scalar(operand(1)?).is_some() => operand(0)?,
            _ => return None,
        };
    }
}

fn turned(view: &View, found: &Match) -> Result<Option<Replacement>> {
    let [x, cos, sin, turned] = ["x", "cos", "sin", "turned"].map(|name| found.get(name));
    let (Some(x), Some(cos), Some(sin), Some(turned)) = (x, cos, sin, turned) else { return Ok(None) };
    let shape = |id: ValueId| view.fact(id).and_then(|f| f.shape.as_deref());
    let Some([batch, _, positions, size]) = shape(x) else { return Ok(None) };
    let Some(size) = size.known().filter(|&size| size > 0 && view.same_shape(x, turned) && view.is_f32(x)) else {
        return Ok(None);
    };
    // All heads share them, and all batches may.
    let fits = |id: ValueId| {
        let one = Dim::Known(1);
        let rows = matches!(shape(id), Some([b, h, p, _]) if (b == batch || *b == one) && *h == one && p == positions);
        rows && *positions != Dim::Unknown && is_twice(view, id, size) == Some(true)
    };
    if !fits(cos) || !fits(sin) {
        return Ok(None);
    }
    let mut operands = vec![x.into()];
    for table in [cos, sin] {
        let rows = Operand::Computed(Squeeze { axes: Some(vec![1]) }.into(), vec![table.into()]);
        let mut cut = vec![rows];
        for number in [0, size as i64 / 2, 2] {
            cut.push(Operand::Constant(Tensor::from_slice(&[1], &[number])?));
        }
        operands.push(Operand::Computed(Slice { attributes: None, axes: None }.into(), cut));
    }
    let op = RotaryEmbedding { interleaved: false, heads: 0, size: 0, microsoft: false };
    Ok(Some(found.replace(op, operands)))
}

/// Heads of which only the first elements turn.
fn partial(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let &[Some(turned), Some(rest)] = node.inputs.as_slice() else { return None };
    let (p, rotary) = view.producer(turned).filter(|_| view.uses(turned) == 1)?;
    let op = rotary.op.get::<RotaryEmbedding>().filter(|r| r.size == 0)?;
    let (x, [start, size, of]) = part(view, view.producer(rotary.inputs[0]?)?.1)?;
    let (other, [after, count, _]) = part(view, view.producer(rest)?.1)?;
    let fits = x == other && start == 0 && after == size && size + count == of && view.same_shape(x, node.outputs[0]);
    let rank = view.fact(x).and_then(Fact::rank);
    let tables = rotary.inputs.iter().skip(1).map(|&id| id.into());
    let operands = std::iter::once(x.into()).chain(tables).collect();
    let op = RotaryEmbedding { size, ..op.clone() }.into();
    (fits && rank == Some(4)).then_some(Replacement { root: i, nodes: vec![i, p], op, operands })
}

fn inside(view: &View, i: usize) -> Result<Option<Replacement>> {
    let node = &view.graph.nodes[i];
    let of = || {
        let op = node.op.get::<RotaryEmbedding>()?;
        let (_, before) = view.producer(node.inputs[0]?)?;
        let x = before.inputs.first().copied()??;
        let [_, _, heads, size] = view.fact(x)?.shape.as_deref()? else { return None };
        let perm = before.op.get::<Transpose>()?.permutation(4).ok()?;
        (*perm == [0, 2, 1, 3]).then_some((op, x, heads.known()?, size.known()?))
    };
    let Some((op, x, heads, size)) = of() else { return Ok(None) };
    let reshape = |x: Operand, last: &[usize]| {
        let shape: Vec<i64> = [0, 0].iter().chain(last).map(|&n| n as i64).collect();
        let shape = Operand::Constant(Tensor::from_slice(&[shape.len()], &shape)?);
        Ok::<_, crate::error::Error>(Operand::Computed(Reshape { allow_zero: false }.into(), vec![x, shape]))
    };
    let rest = node.inputs.iter().skip(1).map(|&id| id.into());
    let operands = std::iter::once(reshape(x.into(), &[heads * size])?).chain(rest).collect();
    let y = Operand::Computed(RotaryEmbedding { heads, ..op.clone() }.into(), operands);
    let y = reshape(y, &[heads, size])?;
    let op = Transpose::new(&[0, 2, 1, 3]).into();
    Ok(Some(Replacement { root: i, nodes: vec![i], op, operands: vec![y] }))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints};
    use super::*;

    /// Queries in two heads, `[batch, 2, tokens, size]`, from a product.
    fn queries(n: &mut Net, size: i64) -> ValueId {
        let x = n.symbolic("x", &["batch", "tokens", &(2 * size).to_string()]);
        let shape = n.i64s(&[0, 0, 2, size]);
        let q = n.op("Reshape", &[x, shape]);
        n.op_with("Transpose", &[q], &[("perm", ints(&[0, 2, 1, 3]))])
    }

    /// Heads of size 8, turned as Llama turns them, by tables from positions `[.., tokens, 1]`.
    fn llama(n: &mut Net, q: ValueId, positions: &[&str], twice: bool) -> ValueId {
        let at = n.symbolic("at", positions);
        let (frequencies, others) = (n.weights(&[4]), n.weights(&[4]));
        let angles = n.op("Mul", &[at, frequencies]);
        let others = if twice { angles } else { n.op("Mul", &[at, others]) };
        let angles = n.op_with("Concat", &[angles, others], &[("axis", int(-1))]);
        let [cos, sin] = ["Cos", "Sin"].map(|name| {
            let table = n.op(name, &[angles]);
            let (factor, axis) = (n.scalar(1.5), n.i64s(&[1]));
            let table = n.op("Mul", &[table, factor]);
            n.op("Unsqueeze", &[table, axis])
        });
        let [zero, four, all, last] = [0, 4, i64::MAX, 3].map(|v| n.i64s(&[v]));
        let left = n.op("Slice", &[q, zero, four, last]);
        let right = n.op("Slice", &[q, four, all, last]);
        let right = n.op("Neg", &[right]);
        let turned = n.op_with("Concat", &[right, left], &[("axis", int(-1))]);
        let a = n.op("Mul", &[q, cos]);
        let b = n.op("Mul", &[turned, sin]);
        n.op("Add", &[a, b])
    }

    #[test]
    fn as_llama_is_exported() {
        for batch in ["batch", "1"] {
            let mut n = Net::new(18);
            let q = queries(&mut n, 8);
            let y = llama(&mut n, q, &[batch, "tokens", "1"], true);
            n.output(y);
            let left = n.passed(run);
            assert!(left.contains(&"RotaryEmbedding".into()) && !left.contains(&"Neg".into()), "{left:?}");
            // The transpose goes with another one behind it.
            let y = n.op_with("Transpose", &[y], &[("perm", ints(&[0, 2, 1, 3]))]);
            let shape = n.i64s(&[0, 0, 16]);
            let y = n.op("Reshape", &[y, shape]);
            let y = n.op("Abs", &[y]);
            n.graph.outputs = vec![y];
            let left = n.optimized();
            assert!(!left.contains(&"Transpose".into()) && !left.contains(&"Reshape".into()), "{left:?}");
        }
    }

    #[test]
    fn part_of_a_head() {
        // As Phi and GPT-NeoX: the rest of a head stays. If it is not the rest, so does the graph.
        for (from, found) in [(8, true), (2, false)] {
            let mut n = Net::new(18);
            let q = queries(&mut n, 10);
            let [zero, eight, from, to, last] = [0, 8, from, from + 2, 3].map(|v| n.i64s(&[v]));
            let first = n.op("Slice", &[q, zero, eight, last]);
            let rest = n.op("Slice", &[q, from, to, last]);
            let y = llama(&mut n, first, &["1", "tokens", "1"], true);
            let y = n.op_with("Concat", &[y, rest], &[("axis", int(-1))]);
            let y = n.op("Abs", &[y]);
            n.output(y);
            let graph = n.apply(run);
            n.check(&graph);
            let size = graph.nodes.iter().find_map(|n| n.op.get::<RotaryEmbedding>()).map(|r| r.size);
            assert_eq!(size, Some(if found { 8 } else { 0 }));
        }
    }

    #[test]
    fn tables_of_constants() {
        for (last, found) in [(0.3, true), (0.4, false)] {
            let mut n = Net::new(18);
            let x = n.symbolic("x", &["batch", "2", "3", "2"]);
            let [cos, sin] = [0.1, 0.2].map(|v| n.constant(&[1, 1, 3, 2], &[v, v, 0.5, 0.5, 0.3, last]));
            let [one, minus, all, last] = [1, -1, i64::MAX, -1].map(|v| n.i64s(&[v]));
            let zero = n.i64s(&[0]);
            let left = n.op("Slice", &[x, zero, one, last]);
            let right = n.op("Slice", &[x, minus, all, last]);
            let right = n.op("Neg", &[right]);
            let turned = n.op_with("Concat", &[right, left], &[("axis", int(3))]);
            let b = n.op("Mul", &[turned, sin]);
            let a = n.op("Mul", &[cos, x]);
            let y = n.op("Add", &[b, a]);
            n.output(y);
            assert_eq!(n.optimized() == ["RotaryEmbedding"], found);
        }
    }

    #[test]
    fn other_turns_stay() {
        // Halves with angles of their own, and positions that are not known to be as many.
        for (positions, twice) in [(["batch", "tokens", "1"], false), (["batch", "1", "1"], true)] {
            let mut n = Net::new(18);
            let q = queries(&mut n, 8);
            let y = llama(&mut n, q, &positions, twice);
            n.output(y);
            assert!(!n.passed(run).contains(&"RotaryEmbedding".into()));
        }
    }
}
