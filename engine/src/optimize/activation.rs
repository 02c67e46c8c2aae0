//! Pointwise functions that exporters spell out become one node: GELU, SiLU, HardSwish, Mish, in the forms below.

use super::Pass;
use super::pattern::{Pattern, View, any, op, op_if, product, rewrite, square, var};
use crate::error::Result;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::clip::Clip;
use crate::ops::unary::Pointwise;
use std::f32::consts::{FRAC_1_SQRT_2, PI, SQRT_2};
use weblane_kernels::elementwise::Unary;
use weblane_kernels::epilogue::Activation;

/// Replaces the spelled-out forms by [`Pointwise`].
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let patterns = patterns();
    rewrite(graph, pass, |view, i| {
        // All forms end in one of these.
        if !matches!(view.graph.nodes[i].op.name(), "Mul" | "Div") {
            return Ok(None);
        }
        Ok(patterns.iter().find_map(|(pattern, name, function)| {
            let found = view.find(pattern, i)?;
            let x = found.get("x")?;
            // A constant of higher rank than x would add axes.
            let fits = view.is_f32(x) && view.same_rank(x, found.result());
            fits.then(|| found.replace(Pointwise::new(name, *function), vec![x.into()]))
        }))
    })
    .map(drop)
}

fn patterns() -> Vec<(Pattern, &'static str, Unary)> {
    let x = &var("x");
    let scaled = any([x / SQRT_2, x * FRAC_1_SQRT_2]);
    let gelu = product(x, op("Erf", [scaled]) + 1.0, 0.5);
    // Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016: the approximation.
    let cube = any([op("Pow", [x.clone(), 3.0.into()]), x * square(x)]);
    let k = (2.0 / PI).sqrt();
    let inner = any([
        (x + cube * 0.044715) * k,
        // x (1 + 0.044715 x²), the square before or after its factor.
        product(x, product(x, x, 0.044715) + 1.0, k),
        product(x, square(x) * 0.044715 + 1.0, k),
    ]);
    let gelu_tanh = product(x, op("Tanh", [inner]) + 1.0, 0.5);
    let silu = x * op("Sigmoid", [x.clone()]);
    // Howard et al., "Searching for MobileNetV3", 2019: x relu6(x + 3) / 6.
    let relu6 = |x: Pattern| {
        let clip = op_if(&["Clip", "Min"], [x.clone()], |view, node| {
            matches!(activation_of(view, node), Some((_, Activation::Clip { lo: 0.0, hi: 6.0 })))
        });
        let positive = any([op("Relu", [x.clone()]), either("Max", x, 0.0)]);
        any([clip, either("Min", positive, 6.0)])
    };
    let clipped = relu6(x + 3.0);
    let sixth = 1.0 / 6.0;
    let hard_sigmoid = any([&clipped / 6.0, &clipped * sixth]);
    let hard = op_if(&["HardSigmoid"], [x.clone()], |view, node| {
        matches!(activation_of(view, node), Some((_, Activation::HardSigmoid { alpha, beta }))
            if (alpha - 1.0 / 6.0).abs() < 1e-5 && (beta - 0.5).abs() < 1e-6)
    });
    let hard_swish = any([
        x * any([hard, hard_sigmoid.clone()]),
        x * &clipped / 6.0,
        product(x, &clipped, sixth),
        (x / 6.0) * &clipped,
    ]);
    // Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019.
    let mish = x * op("Tanh", [op("Softplus", [x.clone()])]);
    let softplus = op("Log", [op("Exp", [x.clone()]) + 1.0]);
    let mish = any([mish, x * op("Tanh", [softplus])]);
    // OpenAI's CLIP: x sigmoid(1.702 x).
    let quick = x * op("Sigmoid", [x * 1.702]);
    vec![
        (gelu, "Gelu", Unary::Gelu),
        (gelu_tanh, "Gelu", Unary::GeluTanh),
        (silu, "Swish", Unary::Silu),
        (quick, "Swish", Unary::Swish { alpha: 1.702 }),
        (mish, "Mish", Unary::Mish),
        (hard_swish, "HardSwish", Unary::HardSwish),
        (hard_sigmoid, "HardSigmoid", Unary::HardSigmoid { alpha: sixth, beta: 0.5 }),
    ]
}

/// A symmetric operator of two operands, in either order.
fn either(name: &'static str, x: Pattern, number: f32) -> Pattern {
    any([op(name, [x.clone(), number.into()]), op(name, [number.into(), x])])
}

/// The operand and the function, if the node is a pointwise function that epilogues know.
pub(super) fn activation_of(view: &View, node: &Node) -> Option<(ValueId, Activation)> {
    let operand = |k: usize| node.inputs.get(k).copied().flatten();
    let x = operand(0)?;
    let &[y] = node.outputs.as_slice() else { return None };
    if !view.is_f32(y) {
        return None;
    }
    if let Some(function) = node.op.get::<Pointwise>() {
        return Some((x, function.activation()?));
    }
    if let Some(clip) = node.op.get::<Clip>() {
        let bound = |k: usize| match operand(k) {
            None => Some(None),
            Some(id) => view.tensor(id).map(|t| Some(&**t)),
        };
        let (lo, hi) = clip.bounds(bound(1)?, bound(2)?)?;
        return Some((x, Activation::Clip { lo, hi }));
    }
    let name = node.op.name();
    if !matches!(name, "Min" | "Max") || node.inputs.len() != 2 {
        return None;
    }
    let (x, bound) = match (view.scalar(x), view.scalar(operand(1)?)) {
        (None, Some(bound)) => (x, bound),
        (Some(bound), None) => (operand(1)?, bound),
        _ => return None,
    };
    let activation = match name {
        "Max" => Activation::Clip { lo: bound, hi: f32::INFINITY },
        _ => Activation::Clip { lo: f32::NEG_INFINITY, hi: bound },
    };
    view.same_rank(x, y).then_some((x, activation))
}

/// One function for `second(first(x))`, if there is one.
pub(super) fn compose(first: Activation, second: Activation) -> Option<Activation> {
    let bounds = |a: Activation| match a {
        Activation::Relu => Some((0.0, f32::INFINITY)),
        Activation::Clip { lo, hi } if lo <= hi => Some((lo, hi)),
        _ => None,
    };
    if first == Activation::Identity {
        return Some(second);
    }
    let ((a, b), (lo, hi)) = (bounds(first)?, bounds(second)?);
    Some(Activation::Clip { lo: a.clamp(lo, hi), hi: b.clamp(lo, hi) })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, float};
    use super::*;

    fn build(opset: i64, f: impl Fn(&mut Net, ValueId) -> ValueId) -> Vec<String> {
        let mut n = Net::new(opset);
        let x = n.symbolic("x", &["batch", "7"]);
        let y = f(&mut n, x);
        n.output(y);
        n.passed(run)
    }

    #[test]
    fn gelu_as_exporters_write_it() {
        // PyTorch: x * (1 + erf(x / sqrt 2)) * 0.5
        let torch = build(14, |n, x| {
            let (root, one, half) = (n.scalar(SQRT_2), n.scalar(1.0), n.scalar(0.5));
            let y = n.op("Div", &[x, root]);
            let y = n.op("Erf", &[y]);
            let y = n.op("Add", &[y, one]);
            let y = n.op("Mul", &[x, y]);
            n.op("Mul", &[y, half])
        });
        assert_eq!(torch, ["Gelu"]);
        // TensorFlow: 0.5 * x * (1 + erf(x * 0.7071)), with the constant of rank 1
        let tf = build(13, |n, x| {
            let (inverse, one, half) = (n.constant(&[1], &[FRAC_1_SQRT_2]), n.scalar(1.0), n.scalar(0.5));
            let y = n.op("Mul", &[inverse, x]);
            let y = n.op("Erf", &[y]);
            let y = n.op("Add", &[one, y]);
            let z = n.op("Mul", &[half, x]);
            n.op("Mul", &[z, y])
        });
        assert_eq!(tf, ["Gelu"]);
        // x * (0.5 * (1 + erf(..)))
        let other = build(13, |n, x| {
            let (inverse, one, half) = (n.scalar(FRAC_1_SQRT_2), n.scalar(1.0), n.scalar(0.5));
            let y = n.op("Mul", &[x, inverse]);
            let y = n.op("Erf", &[y]);
            let y = n.op("Add", &[one, y]);
            let y = n.op("Mul", &[half, y]);
            n.op("Mul", &[x, y])
        });
        assert_eq!(other, ["Gelu"]);
        assert_eq!(build(20, |n, x| n.op("Gelu", &[x])), ["Gelu"]);
    }

    #[test]
    fn tanh_gelu_as_exporters_write_it() {
        let k = (2.0 / PI).sqrt();
        // Hugging Face's gelu_new: 0.5 * x * (1 + tanh(k * (x + 0.044715 * x^3)))
        let hugging = build(14, |n, x| {
            let [half, one, three, factor, k] = [0.5, 1.0, 3.0, 0.044715, k].map(|v| n.scalar(v));
            let z = n.op("Mul", &[half, x]);
            let y = n.op("Pow", &[x, three]);
            let y = n.op("Mul", &[factor, y]);
            let y = n.op("Add", &[x, y]);
            let y = n.op("Mul", &[k, y]);
            let y = n.op("Tanh", &[y]);
            let y = n.op("Add", &[y, one]);
            n.op("Mul", &[z, y])
        });
        assert_eq!(hugging, ["Gelu"]);
        // gelu_fast: 0.5 * x * (1 + tanh(x * k * (1 + 0.044715 * x * x)))
        let fast = build(14, |n, x| {
            let [half, one, factor, k] = [0.5, 1.0, 0.044715, k].map(|v| n.scalar(v));
            let z = n.op("Mul", &[x, half]);
            let a = n.op("Mul", &[x, k]);
            let b = n.op("Mul", &[x, factor]);
            let b = n.op("Mul", &[b, x]);
            let b = n.op("Add", &[b, one]);
            let y = n.op("Mul", &[a, b]);
            let y = n.op("Tanh", &[y]);
            let y = n.op("Add", &[one, y]);
            n.op("Mul", &[z, y])
        });
        assert_eq!(fast, ["Gelu"]);
    }

    #[test]
    fn gated_functions() {
        let silu = build(14, |n, x| {
            let y = n.op("Sigmoid", &[x]);
            n.op("Mul", &[y, x])
        });
        assert_eq!(silu, ["Swish"]);
        let mish = build(14, |n, x| {
            let y = n.op("Softplus", &[x]);
            let y = n.op("Tanh", &[y]);
            n.op("Mul", &[x, y])
        });
        assert_eq!(mish, ["Mish"]);
        let quick = build(14, |n, x| {
            let k = n.scalar(1.702);
            let y = n.op("Mul", &[x, k]);
            let y = n.op("Sigmoid", &[y]);
            n.op("Mul", &[x, y])
        });
        assert_eq!(quick, ["Swish"]);
    }

    #[test]
    fn hard_swish_as_exporters_write_it() {
        for form in 0..4 {
            let left = build(13, |n, x| {
                let [zero, three, six, sixth] = [0.0, 3.0, 6.0, 1.0 / 6.0].map(|v| n.scalar(v));
                if form == 0 {
                    let y = n.op_with("HardSigmoid", &[x], &[("alpha", float(1.0 / 6.0))]);
                    return n.op("Mul", &[x, y]);
                }
                let y = n.op("Add", &[x, three]);
                let y = match form {
                    1 => n.op("Clip", &[y, zero, six]),
                    2 => {
                        let y = n.op("Relu", &[y]);
                        n.op("Min", &[y, six])
                    }
                    _ => {
                        let y = n.op("Max", &[zero, y]);
                        n.op("Min", &[y, six])
                    }
                };
                if form == 1 {
                    let y = n.op("Mul", &[x, y]);
                    n.op("Div", &[y, six])
                } else {
                    let y = n.op("Mul", &[y, sixth]);
                    n.op("Mul", &[x, y])
                }
            });
            assert_eq!(left, ["HardSwish"], "form {form}");
        }
    }

    #[test]
    fn near_misses_stay() {
        let gelu = |n: &mut Net, x: ValueId, inner: f32, half: &[usize], show: bool| {
            let (root, one) = (n.scalar(inner), n.scalar(1.0));
            let half = n.constant(half, &[0.5]);
            let y = n.op("Div", &[x, root]);
            let y = n.op("Erf", &[y]);
            if show {
                n.output(y);
            }
            let y = n.op("Add", &[y, one]);
            let y = n.op("Mul", &[x, y]);
            n.op("Mul", &[y, half])
        };
        assert_eq!(build(14, |n, x| gelu(n, x, SQRT_2, &[], false)).len(), 1);
        // Another constant, a constant that adds axes, a value in the middle that is an output.
        assert_eq!(build(14, |n, x| gelu(n, x, 1.5, &[], false)).len(), 5);
        assert_eq!(build(14, |n, x| gelu(n, x, SQRT_2, &[1, 1, 1], false)).len(), 5);
        assert_eq!(build(14, |n, x| gelu(n, x, SQRT_2, &[], true)).len(), 5);
        // The sigmoid of something else, and one that another node reads too.
        let other = build(14, |n, x| {
            let y = n.op("Abs", &[x]);
            let y = n.op("Sigmoid", &[y]);
            n.op("Mul", &[x, y])
        });
        assert_eq!(other.len(), 3);
        let shared = build(14, |n, x| {
            let s = n.op("Sigmoid", &[x]);
            let y = n.op("Mul", &[x, s]);
            n.op("Add", &[y, s])
        });
        assert_eq!(shared.len(), 3);
    }

    #[test]
    fn clips_compose() {
        let (relu, clip) = (Activation::Relu, |lo, hi| Activation::Clip { lo, hi });
        assert_eq!(compose(relu, clip(f32::NEG_INFINITY, 6.0)), Some(clip(0.0, 6.0)));
        assert_eq!(compose(clip(-1.0, 9.0), clip(0.0, 6.0)), Some(clip(0.0, 6.0)));
        assert_eq!(compose(clip(7.0, 9.0), clip(0.0, 6.0)), Some(clip(6.0, 6.0)));
        assert_eq!(compose(Activation::Tanh, relu), None);
    }
}
