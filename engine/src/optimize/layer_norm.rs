//! LayerNorm and RMSNorm over the last axis, spelled out by exporters, become one node.
//!
//! ```text
//! d = x - mean(x)          y = d / sqrt(mean(d²) + epsilon) * scale + bias          LayerNormalization
//!                          y = x / sqrt(mean(x²) + epsilon) * scale                 RMSNormalization
//! ```

use super::Pass;
use super::pattern::{Match, Operand, Pattern, View, any, constant, op, op_if, rewrite, square, var};
use crate::error::Result;
use crate::fact::axis_index;
use crate::graph::{Graph, Node};
use crate::ops::norm::LayerNormalization;
use crate::ops::reduce::Reduce;
use crate::tensor::Tensor;

/// Replaces the spelled-out forms by [`LayerNormalization`].
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let (layer, rms) = (layer_norm(), rms_norm());
    rewrite(graph, pass, |view, i| {
        if !matches!(view.graph.nodes[i].op.name(), "Add" | "Mul" | "Div") {
            return Ok(None);
        }
        let found = view.find(&layer, i).map(|f| (f, true)).or_else(|| view.find(&rms, i).map(|f| (f, false)));
        let Some((found, center)) = found else { return Ok(None) };
        let Some((epsilon, operands)) = operands(view, &found)? else { return Ok(None) };
        Ok(Some(found.replace(LayerNormalization { axis: -1, epsilon, center }, operands)))
    })
    .map(drop)
}

/// Epsilon, and x, scale and bias; `None` if they do not fit the operator.
fn operands(view: &View, found: &Match) -> Result<Option<(f32, Vec<Operand>)>> {
    let (Some(x), Some(epsilon)) = (found.get("x"), found.scalar("epsilon")) else { return Ok(None) };
    let n = view.fact(x).and_then(|f| f.shape.as_ref()).and_then(|s| s.last()?.known());
    let (Some(n), true, true) = (n, view.is_f32(x), view.same_rank(x, found.result())) else { return Ok(None) };
    let mut operands = vec![x.into()];
    for name in ["scale", "bias"] {
        operands.push(match found.get(name) {
            // Leading axes of size 1 are no news; other broadcasts are.
            Some(id) => match view.tensor(id).filter(|t| t.len() == n && t.dims().last() == Some(&n)) {
                Some(t) if t.dims().len() == 1 => id.into(),
                Some(t) => Operand::Constant(Tensor::clone(t).reshaped(&[n])?),
                None => return Ok(None),
            },
            None if name == "scale" => Operand::Constant(Tensor::from_slice(&[n], &vec![1f32; n])?),
            None => break,
        });
    }
    Ok(Some((epsilon, operands)))
}

/// The mean over the last axis, which stays with length 1.
fn mean(x: impl Into<Pattern>) -> Pattern {
    op_if(&["ReduceMean"], [x.into()], |view, node| over_last_axis(view, node).unwrap_or(false))
}

fn over_last_axis(view: &View, node: &Node) -> Option<bool> {
    let reduce = node.op.get::<Reduce>()?;
    let input = |k: usize| node.inputs.get(k).copied().flatten();
    let rank = view.fact(input(0)?)?.rank()?;
    let axes = match input(1) {
        Some(axes) => view.fact(axes)?.i64s()?,
        None => reduce.axes.as_deref()?.into(),
    };
    let &[axis] = axes.as_slice() else { return Some(false) };
    Some(reduce.keep && axis_index(axis, rank).ok()? + 1 == rank)
}

/// `x / sqrt(v)` in the ways it is written.
fn over_root(x: impl Into<Pattern>, v: impl Into<Pattern>) -> Pattern {
    let (x, v) = (x.into(), v.into());
    let root = any([op("Sqrt", [v.clone()]), op("Pow", [v.clone(), 0.5.into()])]);
    let power = op("Pow", [v, (-0.5).into()]);
    let inverse = any([op("Reciprocal", [root.clone()]), op("Div", [1.0.into(), root.clone()]), power]);
    any([&x / &root, &x * &inverse])
}

fn layer_norm() -> Pattern {
    let x = &var("x");
    let (scale, bias) = (&constant("scale"), &constant("bias"));
    let mean_x = mean(x).named("mean");
    let d = x - &mean_x;
    let v = mean(square(&d)) + constant("epsilon");
    let normal = over_root(&d, &v);
    let scaled = &normal * scale;
    // As tf2onnx writes it: x f + (bias - mean f) with f = scale / sqrt(v).
    let root = op("Sqrt", [v]);
    let f = any([op("Reciprocal", [root.clone()]), op("Div", [1.0.into(), root])]) * scale;
    let f = f.named("factor");
    let keras = x * &f + (bias - &mean_x * &f);
    any([&scaled + bias, keras, scaled, normal])
}

fn rms_norm() -> Pattern {
    let x = &var("x");
    let v = mean(square(x)) + constant("epsilon");
    let normal = over_root(x, v);
    any([&normal * constant("scale"), normal])
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, float, int, ints, names};
    use super::*;
    use crate::graph::ValueId;

    struct Style {
        opset: i64,
        square_by_pow: bool,
        reciprocal: bool,
        scale: bool,
        bias: bool,
        swapped: bool,
    }

    fn means(n: &mut Net, x: ValueId, opset: i64) -> ValueId {
        if opset < 18 {
            return n.op_with("ReduceMean", &[x], &[("axes", ints(&[-1]))]);
        }
        let axes = n.i64s(&[2]);
        n.op("ReduceMean", &[x, axes])
    }

    fn spelled_out(n: &mut Net, x: ValueId, s: &Style, center: bool) -> ValueId {
        let d = if center {
            let mean = means(n, x, s.opset);
            n.op("Sub", &[x, mean])
        } else {
            x
        };
        let two = n.scalar(2.0);
        let square = if s.square_by_pow { n.op("Pow", &[d, two]) } else { n.op("Mul", &[d, d]) };
        let (v, epsilon) = (means(n, square, s.opset), n.scalar(1e-5));
        let v = if s.swapped { n.op("Add", &[epsilon, v]) } else { n.op("Add", &[v, epsilon]) };
        let root = n.op("Sqrt", &[v]);
        let mut y = if s.reciprocal {
            let inverse = n.op("Reciprocal", &[root]);
            n.op("Mul", &[d, inverse])
        } else {
            n.op("Div", &[d, root])
        };
        for (wanted, name) in [(s.scale, "Mul"), (s.bias, "Add")] {
            if wanted {
                let c = n.weights(&[6]);
                y = if s.swapped { n.op(name, &[c, y]) } else { n.op(name, &[y, c]) };
            }
        }
        y
    }

    #[test]
    fn as_exporters_write_it() {
        let styles = [
            Style { opset: 14, square_by_pow: true, reciprocal: false, scale: true, bias: true, swapped: false },
            Style { opset: 18, square_by_pow: false, reciprocal: true, scale: true, bias: true, swapped: true },
            Style { opset: 18, square_by_pow: true, reciprocal: false, scale: true, bias: false, swapped: false },
            Style { opset: 14, square_by_pow: false, reciprocal: false, scale: false, bias: false, swapped: true },
        ];
        for s in &styles {
            for center in [true, false] {
                let mut n = Net::new(s.opset);
                let x = n.symbolic("x", &["batch", "tokens", "6"]);
                let y = spelled_out(&mut n, x, s, center);
                n.output(y);
                let left = n.passed(run);
                match (center, s.bias) {
                    (true, _) => assert_eq!(left, ["LayerNormalization"]),
                    (false, false) => assert_eq!(left, ["RMSNormalization"]),
                    (false, true) => assert_eq!(left, ["RMSNormalization", "Add"]),
                }
            }
        }
    }

    #[test]
    fn as_keras_writes_it() {
        let mut n = Net::new(13);
        let x = n.symbolic("x", &["batch", "6"]);
        let mean = n.op_with("ReduceMean", &[x], &[("axes", ints(&[1])), ("keepdims", int(1))]);
        let d = n.op("Sub", &[x, mean]);
        let d = n.op("Mul", &[d, d]);
        let v = n.op_with("ReduceMean", &[d], &[("axes", ints(&[1]))]);
        let epsilon = n.scalar(1e-3);
        let v = n.op("Add", &[v, epsilon]);
        let root = n.op("Sqrt", &[v]);
        let f = n.op("Reciprocal", &[root]);
        let (scale, bias) = (n.weights(&[6]), n.weights(&[6]));
        let f = n.op("Mul", &[f, scale]);
        let a = n.op("Mul", &[mean, f]);
        let a = n.op("Sub", &[bias, a]);
        let y = n.op("Mul", &[x, f]);
        let y = n.op("Add", &[y, a]);
        n.output(y);
        let graph = n.apply(run);
        n.check(&graph);
        assert_eq!(names(&graph), ["LayerNormalization"]);
        assert_eq!(graph.nodes[0].op.get::<LayerNormalization>().unwrap().epsilon, 1e-3);
    }

    #[test]
    fn roots_written_as_powers() {
        for (exponent, over) in [(0.5, true), (-0.5, false)] {
            let mut n = Net::new(18);
            let x = n.symbolic("x", &["batch", "tokens", "6"]);
            let two = n.scalar(2.0);
            let y = n.op("Pow", &[x, two]);
            let (v, epsilon, exponent) = (means(&mut n, y, 18), n.scalar(1e-6), n.scalar(exponent));
            let v = n.op("Add", &[v, epsilon]);
            let root = n.op("Pow", &[v, exponent]);
            let y = n.op(if over { "Div" } else { "Mul" }, &[x, root]);
            let scale = n.weights(&[6]);
            let y = n.op("Mul", &[scale, y]);
            n.output(y);
            assert_eq!(n.passed(run), ["RMSNormalization"]);
        }
    }

    #[test]
    fn the_operator_of_opset_17_stays() {
        let mut n = Net::new(17);
        let x = n.input("x", &[2, 6]);
        let (scale, bias) = (n.weights(&[6]), n.weights(&[6]));
        let y = n.op_with("LayerNormalization", &[x, scale, bias], &[("epsilon", float(1e-5))]);
        n.output(y);
        assert_eq!(n.passed(run), ["LayerNormalization"]);
    }

    #[test]
    fn near_misses_stay() {
        let build = |change: &dyn Fn(&mut Net, ValueId) -> ValueId| {
            let mut n = Net::new(14);
            let x = n.input("x", &[2, 6, 6]);
            let y = change(&mut n, x);
            n.output(y);
            n.passed(run)
        };
        let style =
            Style { opset: 14, square_by_pow: true, reciprocal: false, scale: true, bias: true, swapped: false };
        // The mean over another axis.
        let other_axis = build(&|n, x| {
            let mean = n.op_with("ReduceMean", &[x], &[("axes", ints(&[1]))]);
            let d = n.op("Sub", &[x, mean]);
            let two = n.scalar(2.0);
            let v = n.op("Pow", &[d, two]);
            let v = n.op_with("ReduceMean", &[v], &[("axes", ints(&[1]))]);
            let epsilon = n.scalar(1e-5);
            let v = n.op("Add", &[v, epsilon]);
            let v = n.op("Sqrt", &[v]);
            n.op("Div", &[d, v])
        });
        assert!(!other_axis.contains(&"LayerNormalization".to_owned()));
        // A value in the middle is an output of the graph.
        let shown = build(&|n, x| {
            let y = spelled_out(n, x, &style, true);
            let middle = n.graph.nodes[3].outputs[0];
            n.output(middle);
            y
        });
        assert_eq!(shown.len(), 9);
        // A cube instead of a square.
        let cubed = build(&|n, x| {
            let mean = means(n, x, 14);
            let d = n.op("Sub", &[x, mean]);
            let three = n.scalar(3.0);
            let v = n.op("Pow", &[d, three]);
            let v = n.op("Abs", &[v]);
            let v = means(n, v, 14);
            let epsilon = n.scalar(1e-5);
            let v = n.op("Add", &[v, epsilon]);
            let v = n.op("Sqrt", &[v]);
            n.op("Div", &[d, v])
        });
        assert_eq!(cubed.len(), 8);
    }
}
