//! Softmax and its logarithm, spelled out, become one node.
//!
//! ```text
//! d = x, or x - max(x)
//! y = exp(d) / sum(exp(d))                                Softmax
//! y = d - log(sum(exp(d)))  or  x - logsumexp(x)          LogSoftmax
//! ```
//!
//! Without the maximum the model overflows where the operator does not.

use super::Pass;
use super::pattern::{Match, Operand, Pattern, View, any, op, op_if, rewrite, var};
use crate::error::Result;
use crate::fact::axis_index;
use crate::graph::{Graph, ValueId};
use crate::ops::reduce::Reduce;
use crate::ops::softmax::{Kind, Softmax};

/// Replaces the spelled-out forms by [`Softmax`].
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let (softmax, log) = patterns();
    rewrite(graph, pass, |view, i| {
        let (pattern, kind) = match view.graph.nodes[i].op.name() {
            "Div" | "Mul" => (&softmax, Kind::Softmax),
            "Sub" => (&log, Kind::Log),
            _ => return Ok(None),
        };
        let Some(found) = view.find(pattern, i) else { return Ok(None) };
        let Some((axis, x)) = operand(view, &found) else { return Ok(None) };
        Ok(Some(found.replace(Softmax { kind, axis, flatten: false }, vec![x])))
    })
    .map(drop)
}

/// A reduction, by name, so that its axis can be compared.
fn reduced(reduction: &'static str, x: impl Into<Pattern>, name: &'static str) -> Pattern {
    op_if(&[reduction], [x.into()], |_, node| node.op.is::<Reduce>()).named(name)
}

fn patterns() -> (Pattern, Pattern) {
    let x = &var("x");
    let d = &any([x - reduced("ReduceMax", x, "max"), x.clone()]);
    let e = &op("Exp", [d.clone()]);
    let sum = &reduced("ReduceSum", e, "sum");
    let softmax = any([e / sum, e * op("Reciprocal", [sum.clone()])]);
    let log = any([
        d - op("Log", [sum.clone()]),
        d - reduced("ReduceLogSum", e, "sum"),
        x - reduced("ReduceLogSumExp", x, "sum"),
    ]);
    (softmax, log)
}

/// The only axis of a reduction that keeps it with length 1.
fn axis_of(view: &View, id: ValueId) -> Option<usize> {
    let (_, node) = view.producer(id)?;
    let reduce = node.op.get::<Reduce>().filter(|r| r.keep)?;
    let rank = view.fact(node.inputs.first().copied()??)?.rank()?;
    let axes = match node.inputs.get(1).copied().flatten() {
        Some(axes) => view.fact(axes)?.i64s()?,
        None => reduce.axes.as_deref()?.into(),
    };
    match axes.as_slice() {
        &[axis] => axis_index(axis, rank).ok(),
        _ => None,
    }
}

/// The axis and what goes in.
fn operand(view: &View, found: &Match) -> Option<(i64, Operand)> {
    let x = found.get("x").filter(|&x| view.is_f32(x))?;
    let axis = axis_of(view, found.get("sum")?)?;
    let same = found.get("max").is_none_or(|max| axis_of(view, max) == Some(axis));
    same.then(|| (axis as i64, x.into()))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int, ints, names};
    use super::*;

    fn reduce(n: &mut Net, name: &str, x: ValueId, axis: i64) -> ValueId {
        n.op_with(name, &[x], &[("axes", ints(&[axis]))])
    }

    #[test]
    fn as_older_exporters_write_it() {
        for (maximum, axis, inverse) in [(true, -1, false), (false, 2, false), (true, 1, false), (true, -1, true)] {
            let mut n = Net::new(12);
            let x = n.symbolic("x", &["batch", "5", "7"]);
            let mut d = x;
            if maximum {
                let max = reduce(&mut n, "ReduceMax", x, axis);
                d = n.op("Sub", &[x, max]);
            }
            let e = n.op("Exp", &[d]);
            let sum = reduce(&mut n, "ReduceSum", e, if axis == 2 { -1 } else { axis });
            let y = if inverse {
                let sum = n.op("Reciprocal", &[sum]);
                n.op("Mul", &[sum, e])
            } else {
                n.op("Div", &[e, sum])
            };
            n.output(y);
            assert_eq!(n.passed(run), ["Softmax"]);
            assert_eq!(n.optimized(), ["Softmax"]);
        }
    }

    #[test]
    fn its_logarithm() {
        // As JAX writes it (with the maximum), and by reductions of ONNX.
        for form in 0..3 {
            let mut n = Net::new(12);
            let x = n.symbolic("x", &["batch", "5"]);
            let max = reduce(&mut n, "ReduceMax", x, 1);
            let d = n.op("Sub", &[x, max]);
            let y = match form {
                0 => {
                    let e = n.op("Exp", &[d]);
                    let sum = reduce(&mut n, "ReduceSum", e, 1);
                    let sum = n.op("Log", &[sum]);
                    n.op("Sub", &[d, sum])
                }
                1 => {
                    let e = n.op("Exp", &[d]);
                    let sum = reduce(&mut n, "ReduceLogSum", e, 1);
                    n.op("Sub", &[d, sum])
                }
                _ => {
                    let sum = reduce(&mut n, "ReduceLogSumExp", x, 1);
                    n.op("Sub", &[x, sum])
                }
            };
            n.output(y);
            n.graph.remove_dead_nodes();
            assert_eq!(n.passed(run), ["LogSoftmax"], "form {form}");
        }
    }

    #[test]
    fn near_misses_stay() {
        let build = |sum_axes: &[i64], keep: i64, show: bool| {
            let mut n = Net::new(12);
            let x = n.input("x", &[4, 4]);
            let max = reduce(&mut n, "ReduceMax", x, 1);
            let d = n.op("Sub", &[x, max]);
            let e = n.op("Exp", &[d]);
            let sum = n.op_with("ReduceSum", &[e], &[("axes", ints(sum_axes)), ("keepdims", int(keep))]);
            let y = n.op("Div", &[e, sum]);
            if show {
                n.output(e);
            }
            n.output(y);
            let graph = n.apply(run);
            n.check(&graph);
            names(&graph).contains(&"Softmax".to_owned())
        };
        assert!(build(&[1], 1, false));
        assert!(!build(&[0], 1, false), "the sum runs along another axis");
        assert!(!build(&[0, 1], 1, false), "two axes");
        assert!(!build(&[1], 0, false), "the axis is gone");
        assert!(!build(&[1], 1, true), "the exponentials are an output");
    }
}
