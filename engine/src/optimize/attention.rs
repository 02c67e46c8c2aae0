//! Attention, spelled out as two products with a softmax in between, becomes one node that never holds all scores.
//!
//! ```text
//! scores = q kᵀ * factor                    the factor on the product, on q, on k or on both
//! scores = scores + mask                    or Where(condition, number, scores), or two of them
//! y = softmax(scores) v                     zeros for rows of NaN, if the model says so
//! ```
//!
//! for `[batch, heads, positions, size]`, and for `[batch * heads, positions, size]`. The transposes between
//! `[batch, positions, heads, size]` and the first form go as well, the kernel reads and writes both; so do the copies of
//! keys and values that several heads of queries share. ONNX's own Attention, where it has no past and shows no scores,
//! becomes the same node for the same reason.

use super::Pass;
use super::pattern::{Match, Operand, Pattern, Replacement, View, any, constant, op, op_if, rewrite, var};
use crate::error::Result;
use crate::fact::{Dim, Fact, axis_index};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use crate::ops::attention::{Attention, Form, FusedAttention};
use crate::ops::binary::{Arithmetic, Function};
use crate::ops::matmul::MatMul;
use crate::ops::reshape::{Reshape, Unsqueeze};
use crate::ops::softmax::Softmax;
use crate::ops::transpose::Transpose;
use crate::ops::where_::Where;
use crate::tensor::{DType, Tensor};
use weblane_kernels::elementwise::Binary;
use weblane_kernels::epilogue::Activation;

/// Replaces the spelled-out form by [`FusedAttention`].
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let (outer, inner) = patterns();
    rewrite(graph, pass, |view, i| {
        let node = &view.graph.nodes[i];
        let inside = match node.op.name() {
            "Transpose" => true,
            "MatMul" => false,
            "Attention" => return of_onnx(view, i, i),
            _ => return Ok(None),
        };
        if inside
            && let Some((p, _)) = node.inputs[0].and_then(|x| view.producer(x)).filter(|(_, n)| n.op.is::<Attention>())
        {
            return of_onnx(view, i, p);
        }
        let Some(found) = view.find(if inside { &outer } else { &inner }, i) else { return Ok(None) };
        replacement(view, &found, inside)
    })
    .map(drop)
}

/// A product, perhaps with a factor.
fn product_of(a: impl Into<Pattern>, b: impl Into<Pattern>) -> Pattern {
    op_if(&["MatMul"], [a.into(), b.into()], |_, node| {
        node.op.get::<MatMul>().is_some_and(|m| {
            let extra = m.bias || m.residual || m.trans_a || m.trans_b;
            !extra && m.activation == Activation::Identity
        })
    })
}

/// With the heads brought back inside, and as it leaves the last product.
fn patterns() -> (Pattern, Pattern) {
    let scaled =
        |x: Pattern, times: &'static str, over: &'static str| any([&x * constant(times), &x / constant(over), x]);
    let qk = product_of(scaled(var("q"), "q times", "q over"), scaled(var("k"), "k times", "k over"));
    let scores = scaled(qk.named("scores"), "times", "over");
    let hidden = op("Where", [var("hidden"), constant("fill"), scores.clone()]);
    let visible = op("Where", [var("visible"), scores.clone(), constant("fill")]);
    let masked = any([
        // T5 and MPNet: a bias of positions beside the mask.
        (&scores + var("bias")) + var("mask"),
        // GPT-2: what lies ahead, and then what is padding.
        &hidden + var("mask"),
        &visible + var("mask"),
        &scores + var("mask"),
        hidden,
        visible,
        scores,
    ]);
    let softmax = op_if(&["Softmax"], [masked], |view, node| along_last_axis(view, node).unwrap_or(false));
    // PyTorch: rows that see nothing become zeros instead of NaN, as they do in the kernel.
    let safe = op("Where", [op("IsNaN", [softmax.clone()]).named("lost"), 0.0.into(), softmax.clone()]);
    let y = product_of(any([softmax, safe]), var("v")).named("y");
    let inside = op_if(&["Transpose"], [y.clone()], |view, node| permutes(view, node, &[0, 2, 1, 3]));
    (inside, y)
}

fn along_last_axis(view: &View, node: &Node) -> Option<bool> {
    let rank = view.fact(node.inputs.first().copied()??)?.rank()?;
    let axis = node.op.get::<Softmax>()?.axis;
    Some(axis_index(axis, rank).ok()? + 1 == rank)
}

fn permutes(view: &View, node: &Node, perm: &[usize]) -> bool {
    let of = || {
        let rank = view.fact(node.inputs.first().copied()??)?.rank()?;
        node.op.get::<Transpose>()?.permutation(rank).ok()
    };
    of().is_some_and(|p| *p == *perm)
}

/// Batch, heads, rows and columns; a value of rank 3 has one head in each batch.
fn sizes(view: &View, id: ValueId) -> Option<[Dim; 4]> {
    match view.fact(id)?.shape.as_deref()? {
        [b, h, r, c] => Some([b.clone(), h.clone(), r.clone(), c.clone()]),
        [b, r, c] => Some([b.clone(), Dim::Known(1), r.clone(), c.clone()]),
        _ => None,
    }
}

fn agree(a: &Dim, b: &Dim) -> bool {
    a == b && *a != Dim::Unknown
}

/// The factor that a name pair stands for, 1 if none matched; `None` if it is no number.
fn factor(found: &Match, times: &str, over: &str) -> Option<f32> {
    let of = |name: &str| match found.get(name) {
        None => Some(1.0),
        Some(_) => found.scalar(name),
    };
    Some(of(times)? / of(over)?)
}

fn replacement(view: &View, found: &Match, inside: bool) -> Result<Option<Replacement>> {
    let Some((op, operands)) = operands(view, found, inside)? else { return Ok(None) };
    let (op, operands) = result(op, operands, inside)?;
    Ok(Some(found.replace(op, operands)))
}

/// The node in the shape that the model wants.
fn result(op: FusedAttention, operands: Vec<Operand>, inside: bool) -> Result<(Op, Vec<Operand>)> {
    if !inside {
        return Ok((op.into(), operands));
    }
    // `[batch, positions, heads * size]` as `[batch, positions, heads, size]`; the model will join them again.
    let shape = [0, 0, op.heads as i64, -1];
    let shape = Operand::Constant(Tensor::from_slice(&[shape.len()], &shape)?);
    Ok((Reshape { allow_zero: false }.into(), vec![Operand::Computed(op.into(), operands), shape]))
}

/// For node `p`, an Attention; what `root` computes stays, which is the same or the transpose of its result.
fn of_onnx(view: &View, root: usize, p: usize) -> Result<Option<Replacement>> {
    let (node, inside) = (&view.graph.nodes[p], root != p);
    let of = || {
        let op = node.op.get::<Attention>().filter(|a| a.cap == 0.0 && a.window == [None, None] && !a.double)?;
        let &[Some(q), Some(k), Some(v), ref rest @ ..] = node.inputs.as_slice() else { return None };
        let (y, others) = node.outputs.split_first()?;
        let hidden = others.iter().all(|&id| view.uses(id) == 0) && (!inside || view.uses(*y) == 1);
        let plain = hidden && rest.iter().skip(1).all(Option::is_none) && view.fact(q)?.rank() == Some(4);
        let ([batch, heads, queries, size], [_, kv_heads, keys, _]) = (sizes(view, q)?, sizes(view, k)?);
        let fits = plain && [q, k, v].iter().all(|&id| view.is_f32(id));
        if !fits || (inside && !permutes(view, &view.graph.nodes[root], &[0, 2, 1, 3])) {
            return None;
        }
        let mask = rest.first().copied().flatten();
        let last = |id| view.fact(id)?.shape.as_ref()?.last().filter(|&last| agree(last, &keys));
        let wanted = [batch, heads.clone(), queries, keys.clone()];
        let typed = |id| view.is_f32(id) || view.fact(id).is_some_and(|f| f.dtype == DType::Bool);
        if mask.is_some_and(|id| {
            !typed(id) || last(id).is_none() || view.fact(id).is_none_or(|f| !covers(f, &wanted, false))
        }) {
            return None;
        }
        let scale = op.scale.or_else(|| Some(1.0 / (size.known()? as f32).sqrt()))?;
        Some((op, [q, k, v], mask, scale, heads.known()?, kv_heads.known()?))
    };
    let Some((op, [q, k, v], mask, scale, heads, mut kv_heads)) = of() else { return Ok(None) };
    let first = |id: ValueId| (Operand::from(id), Form::HeadsFirst);
    let [(q, q_form), (k, k_form), (v, v_form)] = apart(view, [first(q), first(k), first(v)], &mut kv_heads);
    let mut operands = vec![q, k, v];
    if let Some(id) = mask {
        operands.push(match view.is_f32(id) {
            true => id.into(),
            false => {
                let numbers = [0.0, f32::NEG_INFINITY].map(Tensor::scalar);
                let [seen, unseen] = numbers.map(|t| t.map(Operand::Constant));
                Operand::Computed(Where.into(), vec![id.into(), seen?, unseen?])
            }
        });
    }
    let y = if inside { Form::HeadsInside } else { Form::HeadsFirst };
    let forms = FusedAttention {
        scale,
        heads,
        kv_heads,
        q: q_form,
        k: k_form,
        v: v_form,
        y,
        causal: op.causal,
        replaces: false,
        unseen: 0.0,
    };
    let (op, operands) = result(forms, operands, inside)?;
    Ok(Some(Replacement { root, nodes: vec![root, p], op, operands }))
}

/// Queries, keys and values before they were transposed, and before heads of the latter were repeated.
fn apart(view: &View, [q, mut k, mut v]: [(Operand, Form); 3], kv_heads: &mut usize) -> [(Operand, Form); 3] {
    if let (Some((one, groups)), Some((other, same))) = (ungrouped(view, &k), ungrouped(view, &v))
        && groups == same
    {
        *kv_heads = groups;
        (k, v) = ((one.into(), Form::HeadsFirst), (other.into(), Form::HeadsFirst));
    }
    [q, k, v].map(|(operand, form)| match (operand, form) {
        (Operand::Value(id), Form::HeadsFirst) => match heads_inside(view, id) {
            Some((id, form)) => (joined(view, id).into(), form),
            None => (id.into(), form),
        },
        (Operand::Value(id), Form::HeadsInside) => (joined(view, id).into(), form),
        other => other,
    })
}

fn operands(view: &View, found: &Match, inside: bool) -> Result<Option<(FusedAttention, Vec<Operand>)>> {
    let (Some(q), Some(kt), Some(v)) = (found.get("q"), found.get("k"), found.get("v")) else { return Ok(None) };
    let scales = [("times", "over"), ("q times", "q over"), ("k times", "k over")].map(|(t, o)| factor(found, t, o));
    // onnxruntime's FusedMatMul has the factor inside.
    let alpha = |name| {
        let (_, node) = view.producer(found.get(name)?)?;
        Some(node.op.get::<MatMul>()?.alpha)
    };
    if alpha("y") != Some(1.0) {
        return Ok(None);
    }
    let scale: Option<f32> = scales.into_iter().chain([alpha("scores")]).product();
    let (Some(qs), Some(ks), Some(vs), Some(scale)) = (sizes(view, q), sizes(view, kt), sizes(view, v), scale) else {
        return Ok(None);
    };
    // k stands transposed: [batch, heads, size, keys].
    let [batch, heads, queries, size] = &qs;
    let keys = &ks[3];
    let fits = agree(batch, &ks[0])
        && agree(batch, &vs[0])
        && agree(heads, &ks[1])
        && agree(heads, &vs[1])
        && agree(size, &ks[2])
        && agree(keys, &vs[2])
        && [q, kt, v].iter().all(|&id| view.is_f32(id))
        && scale.is_finite();
    let (Some(heads), Some(_), true) = (heads.known(), vs[3].known(), fits) else { return Ok(None) };
    let rank = |id| view.fact(id).and_then(Fact::rank);
    let flat = rank(q) == Some(3);
    if [kt, v].iter().any(|&id| rank(id) != rank(q)) {
        return Ok(None);
    }

    let mut kv_heads = heads;
    let parts = if flat {
        // One head is as good as inside.
        let before = view.producer(kt).filter(|(_, n)| permutes(view, n, &[0, 2, 1]));
        let k = match before.and_then(|(_, n)| n.inputs.first().copied().flatten()) {
            Some(k) => k.into(),
            None => Operand::Computed(Transpose::new(&[0, 2, 1]).into(), vec![kt.into()]),
        };
        [q.into(), k, v.into()].map(|operand| (operand, Form::HeadsInside))
    } else {
        let k = match untransposed(view, kt) {
            Some((k, form)) => (k.into(), form),
            // For a single query that would cost more than the attention.
            None if queries.known() == Some(1) => return Ok(None),
            None => (Operand::Computed(Transpose::new(&[0, 1, 3, 2]).into(), vec![kt.into()]), Form::HeadsFirst),
        };
        apart(view, [(q.into(), Form::HeadsFirst), k, (v.into(), Form::HeadsFirst)], &mut kv_heads)
    };
    let [(q, q_form), (k, k_form), (v, v_form)] = parts;
    let y_form = if inside || flat { Form::HeadsInside } else { Form::HeadsFirst };
    let mut operands = vec![q, k, v];
    let wanted = [batch.clone(), Dim::Known(heads), queries.clone(), keys.clone()];
    let replaces = match mask(view, found, &wanted, flat)? {
        Masking::None => false,
        Masking::Operand { mask, replaces } => {
            operands.push(mask);
            replaces
        }
        Masking::Other => return Ok(None),
    };
    let unseen = if found.get("lost").is_some() { 0.0 } else { f32::NAN };
    let op = FusedAttention {
        scale,
        heads,
        kv_heads,
        q: q_form,
        k: k_form,
        v: v_form,
        y: y_form,
        causal: false,
        replaces,
        unseen,
    };
    Ok(Some((op, operands)))
}

enum Masking {
    None,
    Operand {
        mask: Operand,
        replaces: bool,
    },
    /// One that the operator does not have.
    Other,
}

/// `flat`: the scores are of rank 3, with one head in each batch.
fn mask(view: &View, found: &Match, wanted: &[Dim; 4], flat: bool) -> Result<Masking> {
    let covered = |id: ValueId| view.fact(id).is_some_and(|f| covers(f, wanted, flat));
    // The batch of a mask of rank 3 stands where heads would.
    let placed = |id: ValueId, mask: Operand| match flat && view.fact(id).and_then(Fact::rank) == Some(3) {
        true => Operand::Computed(Unsqueeze { axes: Some(vec![1]) }.into(), vec![mask]),
        false => mask,
    };
    let condition = match (found.get("hidden"), found.get("visible")) {
        (Some(c), _) => Some((c, true)),
        (None, c) => c.map(|c| (c, false)),
    };
    // What the condition adds to scores instead of taking their place.
    let chosen = match condition {
        None => None,
        Some((condition, hides)) => {
            let (Some(fill), true) = (found.scalar("fill").filter(|f| *f < 0.0), covered(condition)) else {
                return Ok(Masking::Other);
            };
            let numbers = if hides { [fill, 0.0] } else { [0.0, fill] };
            let mut operands: Vec<Operand> = vec![condition.into()];
            for number in numbers {
                operands.push(Operand::Constant(Tensor::scalar(number)?));
            }
            Some((condition, fill, Operand::Computed(Where.into(), operands)))
        }
    };
    let Some(mask) = found.get("mask") else {
        return Ok(match chosen {
            None => Masking::None,
            Some((condition, _, numbers)) => Masking::Operand { mask: placed(condition, numbers), replaces: true },
        });
    };
    let fits = |id| view.is_f32(id) && covered(id);
    let other: Option<Operand> = match (found.get("bias"), chosen) {
        (None, None) => None,
        (Some(bias), None) if fits(bias) && !flat => Some(bias.into()),
        // So large a number leaves nothing of a score that it is added to.
        (None, Some((_, fill, numbers))) if fill <= -1e30 && !flat => Some(numbers),
        _ => return Ok(Masking::Other),
    };
    if !fits(mask) {
        return Ok(Masking::Other);
    }
    let mask = match other {
        None => placed(mask, mask.into()),
        // Layers that share both share the sum.
        Some(other) => {
            let sum: Op = Arithmetic::new("Add", Function::Kernel(Binary::Add)).into();
            Operand::Computed(sum, vec![other, mask.into()])
        }
    };
    Ok(Masking::Operand { mask, replaces: false })
}

/// Whether a mask broadcasts against the scores without adding axes or heads. Batches and queries of any name will do: of
/// two sizes that turn out to differ one is 1, and the operator broadcasts either way; so does a single key.
fn covers(mask: &Fact, wanted: &[Dim; 4], flat: bool) -> bool {
    let most = if flat { 3 } else { 4 };
    let Some(shape) = mask.shape.as_ref().filter(|s| (1..=most).contains(&s.len())) else { return false };
    // From the last axis to the first.
    let wanted = wanted.iter().rev().enumerate().filter(|(back, _)| !(flat && *back == 2));
    shape.iter().rev().zip(wanted).all(|(have, (back, want))| match have {
        // One number for all keys does not change the distribution, but rounding; it is left as it is.
        Dim::Known(1) => back > 0 || have == want,
        Dim::Known(_) => have == want,
        _ => back != 2,
    })
}

/// What stands before `Transpose(x, [0, 2, 1, 3])`.
fn heads_inside(view: &View, id: ValueId) -> Option<(ValueId, Form)> {
    let (_, node) = view.producer(id)?;
    permutes(view, node, &[0, 2, 1, 3]).then_some((node.inputs.first().copied()??, Form::HeadsInside))
}

/// Keys before they were transposed for the product.
fn untransposed(view: &View, id: ValueId) -> Option<(ValueId, Form)> {
    let (_, node) = view.producer(id)?;
    let x = node.inputs.first().copied()??;
    if node.op.name() == "Reshape" {
        // PyTorch joins batches and heads for that: `Reshape(Transpose(Reshape(x), [0, 2, 1]))`.
        let (_, middle) = view.producer(x).filter(|(_, n)| permutes(view, n, &[0, 2, 1]))?;
        let flat = middle.inputs.first().copied()??;
        let (_, first) = view.producer(flat).filter(|(_, n)| n.op.name() == "Reshape")?;
        let x = first.inputs.first().copied()??;
        let (from, to) = (sizes(view, x)?, sizes(view, id)?);
        let same = [(0, 0), (1, 1), (2, 3), (3, 2)].into_iter().all(|(i, j)| agree(&from[i], &to[j]));
        return (same && from[2..] == sizes(view, flat)?[2..]).then_some((x, Form::HeadsFirst));
    }
    if permutes(view, node, &[0, 2, 3, 1]) {
        return Some((x, Form::HeadsInside));
    }
    permutes(view, node, &[0, 1, 3, 2]).then_some((x, Form::HeadsFirst))
}

/// Keys or values before each head of them was repeated for neighbouring heads of queries, and how many there are:
/// `Reshape(Expand(Unsqueeze(x, 2)))`, as PyTorch writes `repeat_interleave` over heads.
fn ungrouped(view: &View, (operand, form): &(Operand, Form)) -> Option<(ValueId, usize)> {
    let &Operand::Value(id) = operand else { return None };
    let step = |id: ValueId, names: &[&str]| {
        let (_, node) = view.producer(id).filter(|(_, n)| names.contains(&n.op.name()))?;
        node.inputs.first().copied().flatten()
    };
    let shape = |id: ValueId| view.fact(id)?.shape.as_deref();
    let repeated = step(id, &["Reshape"]).filter(|_| *form == Form::HeadsFirst)?;
    let single = step(repeated, &["Expand"])?;
    let x = step(single, &["Unsqueeze", "Reshape"])?;
    let ([b, h, t, d], [sb, sh, Dim::Known(1), st, sd]) = (shape(x)?, shape(single)?) else { return None };
    let ([rb, rh, rg, rt, rd], [yb, yh, yt, yd]) = (shape(repeated)?, shape(id)?) else { return None };
    let alike = [(b, sb), (h, sh), (t, st), (d, sd), (b, rb), (h, rh), (t, rt), (d, rd), (b, yb), (t, yt), (d, yd)];
    let heads = h.known()?;
    let all = heads.checked_mul(rg.known()?)?;
    (alike.iter().all(|(a, b)| agree(a, b)) && yh.known() == Some(all)).then_some((x, heads))
}

/// `[batch, positions, heads * size]` before a reshape to `[batch, positions, heads, size]`: the same bytes.
fn joined(view: &View, id: ValueId) -> ValueId {
    let before = || {
        let (_, node) = view.producer(id).filter(|(_, n)| n.op.name() == "Reshape")?;
        let x = node.inputs.first().copied()??;
        let (from, to) = (view.fact(x)?.shape.as_ref()?, view.fact(id)?.shape.as_ref()?);
        let hidden = to.get(2)?.known()?.checked_mul(to.get(3)?.known()?)?;
        let same = from.len() == 3 && agree(&from[0], &to[0]) && agree(&from[1], &to[1]);
        (same && from[2].known() == Some(hidden)).then_some(x)
    };
    before().unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, float, int, ints, names};
    use super::*;

    const HEADS: i64 = 2;
    const SIZE: i64 = 4;

    /// `[batch, tokens, 8]` to heads, by a shape that is computed as PyTorch does.
    fn heads(n: &mut Net, x: ValueId, perm: &[i64]) -> ValueId {
        let shape = n.op("Shape", &[x]);
        let mut parts = Vec::new();
        for axis in 0..2 {
            let at = n.i64s(&[axis]);
            parts.push(n.op_with("Gather", &[shape, at], &[("axis", int(0))]));
        }
        parts.push(n.i64s(&[HEADS]));
        parts.push(n.i64s(&[SIZE]));
        let shape = n.op_with("Concat", &parts, &[("axis", int(0))]);
        let y = n.op("Reshape", &[x, shape]);
        n.op_with("Transpose", &[y], &[("perm", ints(perm))])
    }

    fn joined(n: &mut Net, y: ValueId) -> ValueId {
        let y = n.op_with("Transpose", &[y], &[("perm", ints(&[0, 2, 1, 3]))]);
        let shape = n.i64s(&[0, 0, HEADS * SIZE]);
        let y = n.op("Reshape", &[y, shape]);
        // What comes next: an output of the graph would keep its reshape, which costs nothing.
        n.op("Abs", &[y])
    }

    fn qkv(n: &mut Net) -> [ValueId; 3] {
        ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "tokens", "8"]))
    }

    /// Of queries, transposed keys and values.
    fn attention_is_found(mut n: Net, [q, k, v]: [ValueId; 3]) {
        let y = n.op("MatMul", &[q, k]);
        let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
        let y = n.op("MatMul", &[y, v]);
        let y = joined(&mut n, y);
        n.output(y);
        assert!(n.optimized().contains(&"weblane.FusedAttention".to_owned()), "{:?}", n.optimized());
        n.check(&n.apply(run));
    }

    fn fused(n: &Net) -> FusedAttention {
        let graph = n.apply(run);
        graph.nodes.iter().find_map(|n| n.op.get::<FusedAttention>()).expect("a fused attention").clone()
    }

    #[test]
    fn as_bert_is_exported() {
        let mut n = Net::new(14);
        let [q, k, v] = qkv(&mut n);
        let mask = n.symbolic("mask", &["batch", "1", "1", "tokens"]);
        let k = heads(&mut n, k, &[0, 2, 3, 1]);
        let v = heads(&mut n, v, &[0, 2, 1, 3]);
        let q = heads(&mut n, q, &[0, 2, 1, 3]);
        let y = n.op("MatMul", &[q, k]);
        let root = n.scalar(2.0);
        let y = n.op("Div", &[y, root]);
        let y = n.op("Add", &[y, mask]);
        let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
        let y = n.op("MatMul", &[y, v]);
        let y = joined(&mut n, y);
        n.output(y);
        assert_eq!(n.optimized(), ["weblane.FusedAttention", "Abs"]);
        let f = fused(&n);
        let inside = Form::HeadsInside;
        assert_eq!((f.scale, f.heads, f.q, f.k, f.v, f.y), (0.5, 2, inside, inside, inside, inside));
    }

    #[test]
    fn as_distilbert_is_exported() {
        let mut n = Net::new(14);
        let [q, k, v] = qkv(&mut n);
        let mask = n.symbolic("mask", &["batch", "1", "1", "tokens"]);
        let [q, k, v] = [(q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3])].map(|(x, p)| heads(&mut n, x, &p));
        let (root, zero, low) = (n.scalar(2.0), n.scalar(0.0), n.scalar(f32::MIN));
        let q = n.op("Div", &[q, root]);
        let y = n.op("MatMul", &[q, k]);
        let hidden = n.op("Less", &[mask, zero]);
        let y = n.op("Where", &[hidden, low, y]);
        let y = n.op("Softmax", &[y]);
        let y = n.op("MatMul", &[y, v]);
        let y = joined(&mut n, y);
        n.output(y);
        assert_eq!(n.optimized(), ["Less", "Where", "weblane.FusedAttention", "Abs"]);
    }

    #[test]
    fn as_pytorch_exports_its_own_function() {
        let mut n = Net::new(17);
        let [q, k, v] = qkv(&mut n);
        let mask = n.symbolic("mask", &["tokens", "tokens"]);
        let [q, k, v] = [q, k, v].map(|x| heads(&mut n, x, &[0, 2, 1, 3]));
        let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
        let root = n.scalar(0.5f32.sqrt());
        let q = n.op("Mul", &[q, root]);
        let k = n.op("Mul", &[k, root]);
        let y = n.op("MatMul", &[q, k]);
        let y = n.op("Add", &[y, mask]);
        let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
        let (lost, zero) = (n.op("IsNaN", &[y]), n.scalar(0.0));
        let y = n.op("Where", &[lost, zero, y]);
        let y = n.op("MatMul", &[y, v]);
        n.output(y);
        assert_eq!(n.passed(run), ["weblane.FusedAttention"]);
        let f = fused(&n);
        assert!((f.scale - 0.5).abs() < 1e-6 && f.y == Form::HeadsFirst && f.k == Form::HeadsInside, "{f:?}");
    }

    #[test]
    fn keys_transposed_with_batches_and_heads_joined() {
        // As PyTorch's exporter spells the function out for opsets below 23: the last two sizes of the keys, then those before.
        let mut n = Net::new(18);
        let [q, k, v] = qkv(&mut n).map(|x| heads(&mut n, x, &[0, 2, 1, 3]));
        let shape = n.op("Shape", &[k]);
        let part = |n: &mut Net, from: i64, to: i64| {
            let (from, to) = (n.i64s(&[from]), n.i64s(&[to]));
            n.op("Slice", &[shape, from, to])
        };
        let (lead, tokens, size) = (part(&mut n, i64::MIN, -2), part(&mut n, -2, -1), part(&mut n, -1, i64::MAX));
        let rest = n.i64s(&[-1]);
        let axis = [("axis", int(0))];
        let flat = n.op_with("Concat", &[rest, tokens, size], &axis);
        let y = n.op("Reshape", &[k, flat]);
        let y = n.op_with("Transpose", &[y], &[("perm", ints(&[0, 2, 1]))]);
        let full = n.op_with("Concat", &[lead, size, tokens], &axis);
        let k = n.op("Reshape", &[y, full]);
        let y = n.op("MatMul", &[q, k]);
        let y = n.op("Softmax", &[y]);
        let y = n.op("MatMul", &[y, v]);
        let y = joined(&mut n, y);
        n.output(y);
        assert_eq!(n.optimized(), ["weblane.FusedAttention", "Abs"]);
        assert_eq!(fused(&n).k, Form::HeadsInside);
    }

    #[test]
    fn operator_of_onnx_between_transposes() {
        // Llama and GPT-2 as PyTorch exports them: a mask of truth values that all layers share, or a causal flag.
        for (masked, causal) in [(true, 0), (false, 1), (true, 1), (false, 0)] {
            let mut n = Net::new(23);
            let [q, k, v] = qkv(&mut n).map(|x| heads(&mut n, x, &[0, 2, 1, 3]));
            let mask = n.symbolic("mask", &["batch", "1", "tokens", "tokens"]);
            let zero = n.scalar(0.0);
            let mask = n.op("Less", &[mask, zero]);
            let mut operands = vec![Some(q), Some(k), Some(v)];
            operands.extend(masked.then_some(Some(mask)));
            let attributes = [("is_causal", int(causal)), ("scale", float(0.4))];
            let y = n.node("Attention", &operands, &attributes);
            let y = joined(&mut n, y);
            n.output(y);
            let left = n.optimized();
            let want = ["Less", "Where", "weblane.FusedAttention", "Abs"];
            assert_eq!(left, want[if masked { 0 } else { 2 }..]);
            let f = fused(&n);
            assert_eq!(
                (f.q, f.v, f.y, f.causal),
                (Form::HeadsInside, Form::HeadsInside, Form::HeadsInside, causal == 1)
            );
        }
    }

    #[test]
    fn operator_of_onnx_stays_where_it_does_more() {
        let build = |attributes: super::super::testing::Attrs, mask: Option<&[&str]>, results: usize| {
            let mut n = Net::new(23);
            let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "2", "tokens", "4"]));
            let mut operands = vec![Some(q), Some(k), Some(v)];
            operands.extend(mask.map(|dims| Some(n.symbolic("mask", dims))));
            let y = n.nodes_of("", "Attention", &operands, attributes, results);
            n.graph.outputs = y;
            n.passed(run).concat()
        };
        assert_eq!(build(&[], Some(&["tokens", "tokens"]), 1), "weblane.FusedAttention");
        assert_eq!(build(&[("softcap", float(2.0))], None, 1), "Attention");
        assert_eq!(build(&[], None, 4), "Attention", "scores are shown");
        assert_eq!(build(&[], Some(&["tokens", "1"]), 1), "Attention", "a mask with fewer keys");
    }

    #[test]
    fn near_misses_stay() {
        let build = |axis: i64, mask: &[&str], low: f32, show: bool| {
            let mut n = Net::new(14);
            let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "2", "4", "4"]));
            let mask = n.symbolic("mask", mask);
            let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
            let y = n.op("MatMul", &[q, k]);
            let (zero, low) = (n.scalar(0.0), n.scalar(low));
            let hidden = n.op("Less", &[mask, zero]);
            let y = n.op("Where", &[hidden, low, y]);
            let y = n.op_with("Softmax", &[y], &[("axis", int(axis))]);
            if show {
                n.output(y);
            }
            let y = n.op("MatMul", &[y, v]);
            n.output(y);
            let graph = n.apply(run);
            n.check(&graph);
            names(&graph).contains(&"weblane.FusedAttention".to_owned())
        };
        assert!(build(-1, &["1", "1", "4"], f32::NEG_INFINITY, false));
        assert!(!build(2, &["1", "1", "4"], f32::MIN, false), "another axis");
        assert!(build(-1, &["1", "1", "4"], -10.0, false), "a score that counts");
        assert!(!build(-1, &["1", "4", "1"], f32::MIN, false), "a mask that repeats along keys");
        assert!(!build(-1, &["4", "1", "1", "1", "4"], f32::MIN, false), "a mask with an axis of its own");
        assert!(!build(-1, &["1", "1", "4"], f32::MIN, true), "the distribution is an output");
    }

    #[test]
    fn keys_that_come_transposed() {
        for queries in ["4", "1"] {
            let mut n = Net::new(14);
            let q = n.symbolic("q", &["batch", "2", queries, "4"]);
            let [k, v] = ["k", "v"].map(|name| n.symbolic(name, &["batch", "2", "4", "4"]));
            let y = n.op("MatMul", &[q, k]);
            let y = n.op("Softmax", &[y]);
            let y = n.op("MatMul", &[y, v]);
            n.output(y);
            let fused: &[&str] = &["Transpose", "weblane.FusedAttention"];
            assert_eq!(n.passed(run), if queries == "4" { fused } else { &["MatMul", "Softmax", "MatMul"] });
        }
    }

    #[test]
    fn rows_that_see_nothing() {
        // PyTorch's guard gives zeros, softmax alone gives NaN; numbers that only look like infinity give the mean.
        for (low, guard) in [(f32::NEG_INFINITY, true), (f32::NEG_INFINITY, false), (f32::MIN, false), (-1e9, false)] {
            let mut n = Net::new(17);
            let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "2", "4", "4"]));
            let seen = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0];
            let (seen, half, low, zero) = (n.constant(&[4, 4], &seen), n.scalar(0.5), n.scalar(low), n.scalar(0.0));
            let seen = n.op("Greater", &[seen, half]);
            let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
            let y = n.op("MatMul", &[q, k]);
            let y = n.op("Where", &[seen, y, low]);
            let mut y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
            if guard {
                let lost = n.op("IsNaN", &[y]);
                y = n.op("Where", &[lost, zero, y]);
            }
            let y = n.op("MatMul", &[y, v]);
            n.output(y);
            assert!(n.passed(run).contains(&"weblane.FusedAttention".to_owned()));
        }
    }

    #[test]
    fn a_bias_beside_the_mask_is_added_to_it() {
        let mut n = Net::new(14);
        let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "2", "tokens", "4"]));
        let bias = n.symbolic("bias", &["1", "2", "tokens", "tokens"]);
        let mask = n.symbolic("mask", &["batch", "1", "1", "tokens"]);
        let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
        let y = n.op("MatMul", &[q, k]);
        let y = n.op("Add", &[y, bias]);
        let y = n.op("Add", &[y, mask]);
        let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
        let y = n.op("MatMul", &[y, v]);
        n.output(y);
        let graph = n.apply(run);
        assert_eq!(names(&graph), ["Add", "weblane.FusedAttention"]);
        n.check(&graph);
    }

    /// GPT-2 hides what lies ahead by a condition, and then adds the mask of padding.
    #[test]
    fn a_mask_after_a_condition_is_added_to_what_it_chooses() {
        let build = |low: f32, hides: bool| {
            let mut n = Net::new(14);
            let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "2", "4", "4"]));
            let mask = n.symbolic("mask", &["batch", "1", "1", "4"]);
            let seen = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0];
            let (seen, half, low) = (n.constant(&[1, 1, 4, 4], &seen), n.scalar(0.5), n.scalar(low));
            let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
            let y = n.op("MatMul", &[q, k]);
            let condition = n.op(if hides { "Less" } else { "Greater" }, &[seen, half]);
            let y = n.op("Where", &if hides { [condition, low, y] } else { [condition, y, low] });
            let y = n.op("Add", &[y, mask]);
            let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
            let y = n.op("MatMul", &[y, v]);
            n.output(y);
            n.passed(run).contains(&"weblane.FusedAttention".to_owned())
        };
        assert!(build(f32::MIN, false) && build(f32::NEG_INFINITY, true));
        assert!(!build(-1e4, false), "a row that sees nothing would tell the difference");
    }

    #[test]
    fn a_factor_inside_of_the_product_counts() {
        let mut n = Net::new(14);
        let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "2", "tokens", "4"]));
        let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
        let y = n.contrib("FusedMatMul", &[Some(q), Some(k)], &[("alpha", float(0.25))]);
        let y = n.op_with("Softmax", &[y], &[("axis", int(-1))]);
        let y = n.op("MatMul", &[y, v]);
        n.output(y);
        assert_eq!(fused(&n).scale, 0.25);
        n.check(&n.apply(run));
    }

    #[test]
    fn a_cache_that_grows_is_fused() {
        let mut n = Net::new(14);
        let [q, k, v] = qkv(&mut n);
        let grown = |n: &mut Net, name: &str, x, perm: Option<&[i64]>| {
            let past = n.symbolic(name, &["batch", "2", "past", "4"]);
            let x = heads(n, x, &[0, 2, 1, 3]);
            let all = n.op_with("Concat", &[past, x], &[("axis", int(-2))]);
            match perm {
                Some(perm) => n.op_with("Transpose", &[all], &[("perm", ints(perm))]),
                None => all,
            }
        };
        let k = grown(&mut n, "past_k", k, Some(&[0, 1, 3, 2]));
        let v = grown(&mut n, "past_v", v, None);
        let q = heads(&mut n, q, &[0, 2, 1, 3]);
        attention_is_found(n, [q, k, v]);
    }

    #[test]
    fn positions_cut_from_a_table_keep_the_name_of_the_tokens() {
        let mut n = Net::new(14);
        let x = n.symbolic("x", &["batch", "tokens", "8"]);
        let table = n.weights(&[1, 64, 8]);
        let (start, one, two) = (n.i64s(&[0]), n.i64s(&[1]), n.i64s(&[2]));
        let shape = n.op("Shape", &[x]);
        let tokens = n.op("Slice", &[shape, one, two]);
        let places = n.op("Slice", &[table, start, tokens, one]);
        let x = n.op("Add", &[x, places]);
        let k = heads(&mut n, x, &[0, 2, 3, 1]);
        let v = heads(&mut n, x, &[0, 2, 1, 3]);
        let q = heads(&mut n, x, &[0, 2, 1, 3]);
        attention_is_found(n, [q, k, v]);
    }

    #[test]
    fn masks_of_other_names_broadcast() {
        // Symbols get the sizes 3, 4, ... in this order: the mask has three batches, the operands have one.
        for (mask, batch, queries) in [
            (["many", "1", "1", "keys"], "1", "1"),
            (["many", "1", "queries", "keys"], "1", "queries"),
            (["many", "2", "more", "keys"], "many", "1"),
        ] {
            let mut n = Net::new(14);
            let m = n.symbolic("mask", &mask);
            let q = n.symbolic("q", &[batch, "2", queries, "4"]);
            let [k, v] = ["k", "v"].map(|name| n.symbolic(name, &[batch, "2", "keys", "4"]));
            let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
            let y = n.op("MatMul", &[q, k]);
            let y = n.op("Add", &[y, m]);
            let y = n.op("Softmax", &[y]);
            let y = n.op("MatMul", &[y, v]);
            n.output(y);
            assert_eq!(n.passed(run), ["weblane.FusedAttention"], "{mask:?}");
        }
        // Heads of an unknown number could be more than those of the operands.
        let mut n = Net::new(14);
        let m = n.symbolic("mask", &["batch", "heads", "1", "keys"]);
        let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "1", "keys", "4"]));
        let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
        let y = n.op("MatMul", &[q, k]);
        let y = n.op("Add", &[y, m]);
        let y = n.op("Softmax", &[y]);
        let y = n.op("MatMul", &[y, v]);
        n.output(y);
        assert_eq!(n.passed(run).len(), 5);
    }

    #[test]
    fn as_tf2onnx_writes_it() {
        // Dense layers on [batch * tokens, hidden], the factor as a product, a mask that is added.
        let mut n = Net::new(13);
        let x = n.input("x", &[10, 8]);
        let mask = n.input("mask", &[2, 1, 1, 5]);
        let [q, k, v] = [(); 3].map(|()| {
            let w = n.weights(&[8, 8]);
            let y = n.op("MatMul", &[x, w]);
            let shape = n.i64s(&[2, 5, HEADS, SIZE]);
            let y = n.op("Reshape", &[y, shape]);
            n.op_with("Transpose", &[y], &[("perm", ints(&[0, 2, 1, 3]))])
        });
        let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
        let y = n.op("MatMul", &[q, k]);
        let half = n.scalar(0.5);
        let y = n.op("Mul", &[y, half]);
        let y = n.op("Add", &[y, mask]);
        let y = n.op_with("Softmax", &[y], &[("axis", int(3))]);
        let y = n.op("MatMul", &[y, v]);
        let y = n.op_with("Transpose", &[y], &[("perm", ints(&[0, 2, 1, 3]))]);
        let shape = n.i64s(&[10, 8]);
        let y = n.op("Reshape", &[y, shape]);
        let y = n.op("Abs", &[y]);
        n.output(y);
        let left = n.optimized();
        assert!(
            left.contains(&"weblane.FusedAttention".to_owned()) && !left.contains(&"Transpose".to_owned()),
            "{left:?}"
        );
    }

    #[test]
    fn batched_products_of_rank_3() {
        // As nn.MultiheadAttention writes it: batch * heads in one axis.
        for mask in [&["n", "keys", "keys"][..], &["keys", "keys"], &["1", "keys", "keys"]] {
            let mut n = Net::new(14);
            let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["n", "keys", "4"]));
            let mask = n.symbolic("mask", mask);
            let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 2, 1]))]);
            let half = n.scalar(0.5);
            let q = n.op("Mul", &[q, half]);
            let y = n.op("MatMul", &[q, k]);
            let y = n.op("Add", &[mask, y]);
            let y = n.op_with("Softmax", &[y], &[("axis", int(2))]);
            let y = n.op("MatMul", &[y, v]);
            n.output(y);
            let left = n.passed(run);
            assert_eq!(left.last().unwrap(), "weblane.FusedAttention");
            assert!(left.len() <= 2, "{left:?}");
        }
    }

    #[test]
    fn shared_keys_and_values() {
        // Grouped queries: two heads of keys and values for four of queries.
        let mut n = Net::new(14);
        let q = n.symbolic("q", &["batch", "4", "tokens", "4"]);
        let [k, v] = ["k", "v"].map(|name| {
            let x = n.symbolic(name, &["batch", "tokens", "2", "4"]);
            let x = n.op_with("Transpose", &[x], &[("perm", ints(&[0, 2, 1, 3]))]);
            let axis = n.i64s(&[2]);
            let y = n.op("Unsqueeze", &[x, axis]);
            let sizes = n.op("Shape", &[q]);
            let [at0, at2] = [0, 2].map(|i| n.i64s(&[i]));
            let batch = n.op_with("Gather", &[sizes, at0], &[("axis", int(0))]);
            let tokens = n.op_with("Gather", &[sizes, at2], &[("axis", int(0))]);
            let [two, four] = [2, 4].map(|i| n.i64s(&[i]));
            let shape = n.op_with("Concat", &[batch, two, two, tokens, four], &[("axis", int(0))]);
            let y = n.op("Expand", &[y, shape]);
            let shape = n.op_with("Concat", &[batch, four, tokens, four], &[("axis", int(0))]);
            n.op("Reshape", &[y, shape])
        });
        let k = n.op_with("Transpose", &[k], &[("perm", ints(&[0, 1, 3, 2]))]);
        let y = n.op("MatMul", &[q, k]);
        let y = n.op("Softmax", &[y]);
        let y = n.op("MatMul", &[y, v]);
        n.output(y);
        assert_eq!(n.optimized(), ["weblane.FusedAttention"]);
        assert_eq!(fused(&n).kv_heads, 2);
    }
}
