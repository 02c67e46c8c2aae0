//! Attention, spelled out as two products with a softmax in between, becomes one node that never holds all scores.
//!
//! ```text
//! scores = q kᵀ * factor                    the factor on the product, on q, on k or on both
//! scores = scores + mask                    or Where(condition, -huge, scores)
//! y = softmax(scores) v
//! ```
//!
//! The transposes between `[batch, positions, heads, size]` and `[batch, heads, positions, size]` around it go as well,
//! the kernel reads and writes both forms.

use super::Pass;
use super::pattern::{Match, Operand, Pattern, Replacement, View, any, constant, op, op_if, rewrite, var};
use crate::error::Result;
use crate::fact::{Dim, Fact, axis_index};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::attention::{Form, FusedAttention};
use crate::ops::matmul::MatMul;
use crate::ops::reshape::Reshape;
use crate::ops::softmax::Softmax;
use crate::ops::transpose::Transpose;
use crate::ops::where_::Where;
use crate::tensor::Tensor;
use weblane_kernels::epilogue::Activation;

/// Scores that a mask replaces by a number below this one are as good as minus this number added to them: any score is
/// lost in the rounding.
const HUGE: f32 = -1e30;

/// Replaces the spelled-out form by [`FusedAttention`].
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let (outer, inner) = patterns();
    rewrite(graph, pass, |view, i| {
        let inside = match view.graph.nodes[i].op.name() {
            "Transpose" => true,
            "MatMul" => false,
            _ => return Ok(None),
        };
        let Some(found) = view.find(if inside { &outer } else { &inner }, i) else { return Ok(None) };
        replacement(view, &found, inside)
    })
    .map(drop)
}

fn product_of(a: impl Into<Pattern>, b: impl Into<Pattern>) -> Pattern {
    op_if(&["MatMul"], [a.into(), b.into()], |_, node| {
        node.op.get::<MatMul>().is_some_and(|m| {
            let extra = m.bias || m.residual || m.trans_a || m.trans_b;
            m.alpha == 1.0 && !extra && m.activation == Activation::Identity
        })
    })
}

/// With the heads brought back inside, and as it leaves the last product.
fn patterns() -> (Pattern, Pattern) {
    let scaled =
        |x: Pattern, times: &'static str, over: &'static str| any([&x * constant(times), &x / constant(over), x]);
    let qk = product_of(scaled(var("q"), "q times", "q over"), scaled(var("k"), "k times", "k over"));
    let scores = scaled(qk, "times", "over");
    let masked = any([
        &scores + var("mask"),
        op("Where", [var("hidden"), constant("fill"), scores.clone()]),
        op("Where", [var("visible"), scores.clone(), constant("fill")]),
        scores,
    ]);
    let softmax = op_if(&["Softmax"], [masked], |view, node| along_last_axis(view, node).unwrap_or(false));
    // PyTorch: rows that see nothing become zeros instead of NaN, as they do in the kernel.
    let safe = op("Where", [op("IsNaN", [softmax.clone()]), 0.0.into(), softmax.clone()]);
    let y = product_of(any([softmax, safe]), var("v"));
    let inside = op_if(&["Transpose"], [y.clone()], |view, node| permutes(view, node, [0, 2, 1, 3]));
    (inside, y)
}

fn along_last_axis(view: &View, node: &Node) -> Option<bool> {
    let rank = view.fact(node.inputs.first().copied()??)?.rank()?;
    let axis = node.op.get::<Softmax>()?.axis;
    Some(axis_index(axis, rank).ok()? + 1 == rank)
}

fn permutes(view: &View, node: &Node, perm: [usize; 4]) -> bool {
    let of = || {
        let rank = view.fact(node.inputs.first().copied()??)?.rank()?;
        node.op.get::<Transpose>()?.permutation(rank).ok()
    };
    of().is_some_and(|p| p.as_slice() == perm)
}

fn sizes(view: &View, id: ValueId) -> Option<[Dim; 4]> {
    let shape = view.fact(id)?.shape.as_ref()?;
    Some([shape.first()?.clone(), shape.get(1)?.clone(), shape.get(2)?.clone(), shape.get(3)?.clone()])
        .filter(|_| shape.len() == 4)
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
    if !inside {
        return Ok(Some(found.replace(op, operands)));
    }
    // `[batch, positions, heads * size]` as `[batch, positions, heads, size]`; the model will join them again.
    let shape = [0, 0, op.heads as i64, -1];
    let shape = Operand::Constant(Tensor::from_slice(&[shape.len()], &shape)?);
    Ok(Some(found.replace(Reshape { allow_zero: false }, vec![Operand::Computed(op.into(), operands), shape])))
}

fn operands(view: &View, found: &Match, inside: bool) -> Result<Option<(FusedAttention, Vec<Operand>)>> {
    let (Some(q), Some(kt), Some(v)) = (found.get("q"), found.get("k"), found.get("v")) else { return Ok(None) };
    let scales = [("times", "over"), ("q times", "q over"), ("k times", "k over")].map(|(t, o)| factor(found, t, o));
    let scale: Option<f32> = scales.into_iter().product();
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

    let Some((k, k_form)) = untransposed(view, kt) else { return Ok(None) };
    let (q, q_form) = heads_inside(view, q).unwrap_or((q, Form::HeadsFirst));
    let (v, v_form) = heads_inside(view, v).unwrap_or((v, Form::HeadsFirst));
    let y_form = if inside { Form::HeadsInside } else { Form::HeadsFirst };
    let mut operands: Vec<Operand> = [(q, q_form), (k, k_form), (v, v_form)]
        .into_iter()
        .map(|(id, form)| if form == Form::HeadsInside { joined(view, id) } else { id }.into())
        .collect();
    let wanted = [batch.clone(), Dim::Known(heads), queries.clone(), keys.clone()];
    match mask(view, found, &wanted)? {
        Masking::None => {}
        Masking::Operand(mask) => operands.push(mask),
        Masking::Other => return Ok(None),
    }
    Ok(Some((FusedAttention { scale, heads, kv_heads: heads, q: q_form, k: k_form, v: v_form, y: y_form }, operands)))
}

enum Masking {
    None,
    Operand(Operand),
    /// One that the operator does not have.
    Other,
}

fn mask(view: &View, found: &Match, wanted: &[Dim; 4]) -> Result<Masking> {
    if let Some(mask) = found.get("mask") {
        let fits = view.is_f32(mask) && view.fact(mask).is_some_and(|f| covers(f, wanted));
        return Ok(if fits { Masking::Operand(mask.into()) } else { Masking::Other });
    }
    let (condition, hides) = match (found.get("hidden"), found.get("visible")) {
        (Some(c), _) => (c, true),
        (None, Some(c)) => (c, false),
        (None, None) => return Ok(Masking::None),
    };
    let fill = found.scalar("fill").filter(|f| *f <= HUGE);
    let (Some(fill), Some(true)) = (fill, view.fact(condition).map(|f| covers(f, wanted))) else {
        return Ok(Masking::Other);
    };
    let numbers = if hides { [fill, 0.0] } else { [0.0, fill] };
    let mut operands: Vec<Operand> = vec![condition.into()];
    for number in numbers {
        operands.push(Operand::Constant(Tensor::scalar(number)?));
    }
    Ok(Masking::Operand(Operand::Computed(Where.into(), operands)))
}

/// Whether a mask broadcasts to the scores without adding axes or sizes. A size that has only a name may turn out to be
/// 1 or that of the scores, the operator takes both; anything else is an error there.
fn covers(mask: &Fact, wanted: &[Dim; 4]) -> bool {
    let Some(shape) = mask.shape.as_ref().filter(|s| (1..=4).contains(&s.len())) else { return false };
    shape.iter().rev().zip(wanted.iter().rev()).enumerate().all(|(back, (have, want))| match have {
        // One number for all keys does not change the distribution, but rounding; it is left as it is.
        Dim::Known(1) => back > 0 || have == want,
        Dim::Known(_) => have == want,
        _ => true,
    })
}

/// What stands before `Transpose(x, [0, 2, 1, 3])`.
fn heads_inside(view: &View, id: ValueId) -> Option<(ValueId, Form)> {
    let (_, node) = view.producer(id)?;
    permutes(view, node, [0, 2, 1, 3]).then_some((node.inputs.first().copied()??, Form::HeadsInside))
}

/// Keys before they were transposed for the product.
fn untransposed(view: &View, id: ValueId) -> Option<(ValueId, Form)> {
    let (_, node) = view.producer(id)?;
    let x = node.inputs.first().copied()??;
    if permutes(view, node, [0, 2, 3, 1]) {
        return Some((x, Form::HeadsInside));
    }
    permutes(view, node, [0, 1, 3, 2]).then(|| heads_inside(view, x).unwrap_or((x, Form::HeadsFirst)))
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
    use super::super::testing::{Net, int, ints, names};
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
        assert!(!build(-1, &["1", "1", "4"], -10.0, false), "a score that counts");
        assert!(!build(-1, &["1", "4", "1"], f32::MIN, false), "a mask that repeats along keys");
        assert!(!build(-1, &["4", "1", "1", "1", "4"], f32::MIN, false), "a mask with an axis of its own");
        assert!(!build(-1, &["1", "1", "4"], f32::MIN, true), "the distribution is an output");
        // Keys that come transposed already.
        let mut n = Net::new(14);
        let [q, k, v] = ["q", "k", "v"].map(|name| n.symbolic(name, &["batch", "2", "4", "4"]));
        let y = n.op("MatMul", &[q, k]);
        let y = n.op("Softmax", &[y]);
        let y = n.op("MatMul", &[y, v]);
        n.output(y);
        assert_eq!(n.passed(run), ["MatMul", "Softmax", "MatMul"]);
    }
}
