//! Pointwise functions that exporters spell out become one node: GELU, SiLU, HardSwish; see [`patterns`] for the forms.

use super::Pass;
use super::pattern::{Pattern, View, any, op, op_if, product, rewrite, square, var};
use crate::error::Result;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::activate::Activate;
use std::f32::consts::{FRAC_1_SQRT_2, PI, SQRT_2};
use weblane_kernels::epilogue::Activation;

/// Replaces the spelled-out forms by [`Activate`].
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let patterns = patterns();
    rewrite(graph, pass, |view, i| {
        // All forms end in one of these.
        if !matches!(view.graph.nodes[i].op.name(), "Mul" | "Div") {
            return Ok(None);
        }
        Ok(patterns.iter().find_map(|(pattern, activation)| {
            let found = view.find(pattern, i)?;
            let x = found.get("x")?;
            // A constant of higher rank than x would add axes.
            let fits = view.is_f32(x) && view.same_rank(x, found.result());
            fits.then(|| found.replace(Activate { activation: *activation }, vec![x.into()]))
        }))
    })
    .map(drop)
}

fn patterns() -> Vec<(Pattern, Activation)> {
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
    vec![
        (gelu, Activation::Gelu),
        (gelu_tanh, Activation::GeluTanh),
        (silu, Activation::Silu),
        (hard_swish, Activation::HardSwish),
        (hard_sigmoid, Activation::HardSigmoid { alpha: sixth, beta: 0.5 }),
    ]
}

/// A symmetric operator of two operands, in either order.
fn either(name: &'static str, x: Pattern, number: f32) -> Pattern {
    any([op(name, [x.clone(), number.into()]), op(name, [number.into(), x])])
}

/// The operand and the function, if the node is a pointwise function that epilogues know.
pub(super) fn activation_of(view: &View, node: &Node) -> Option<(ValueId, Activation)> {
    let x = node.inputs.first().copied().flatten()?;
    if node.outputs.len() != 1 || !view.is_f32(x) {
        return None;
    }
    if let Some(a) = node.op.get::<Activate>() {
        return Some((x, a.activation));
    }
    // A constant of higher rank than x would add axes to the result.
    let bound = |k: usize, default: f32| match node.inputs.get(k).copied().flatten() {
        None => Some(default),
        Some(id) => view.scalar(id),
    };
    let activation = match node.op.name() {
        "Clip" if node.inputs.len() > 1 => {
            Activation::Clip { lo: bound(1, f32::NEG_INFINITY)?, hi: bound(2, f32::INFINITY)? }
        }
        "Relu" => Activation::Relu,
        "Sigmoid" => Activation::Sigmoid,
        "Tanh" => Activation::Tanh,
        "HardSwish" => Activation::HardSwish,
        _ => return None,
    };
    Some((x, activation))
}
