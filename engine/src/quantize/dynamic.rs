//! Dynamic quantisation: products by constant weights in 8 bits, activations quantised as they come.
//!
//! ```text
//! Y = A W + b   becomes
//! (q, s, z) = DynamicQuantizeLinear(A)            once for all products of A
//! Y = Cast(MatMulInteger(q, W_q, z, 0)) * (s * s_w) + b
//! ```
//!
//! These are the nodes, in the order, that onnxruntime's `quantize_dynamic` writes, so that what it fuses is fused here
//! too. Recurrent operators and com.microsoft's Attention stay float.

use super::edit::{Editor, constant, label, node, with_int};
use super::product::{product, with_bias};
use super::report::NodeReport;
use super::weights::symmetric;
use super::{QuantizeOptions, Rewrite};
use crate::error::Result;
use crate::onnx::Node;
use crate::tensor::DType;
use std::collections::HashMap;

/// See above.
pub(super) struct Dynamic {
    options: QuantizeOptions,
    /// By activation: its integers, scale and zero point.
    activations: HashMap<String, [String; 3]>,
    /// By weights: their integers, scales and zero points.
    weights: HashMap<String, Vec<String>>,
}

impl Dynamic {
    pub(super) fn new(options: &QuantizeOptions) -> Self {
        Dynamic { options: options.clone(), activations: HashMap::new(), weights: HashMap::new() }
    }
}

impl Rewrite for Dynamic {
    fn node(&mut self, e: &mut Editor, old: Node) -> Result<()> {
        let Some((old, p)) = product(e, &mut self.weights, self.options.embeddings, old)? else { return Ok(()) };
        let (name, a) = (label(&old).to_owned(), old.inputs[0].clone());
        let [q, scale, zero] = match self.activations.get(&a) {
            Some(names) => names.clone(),
            None => {
                let names = ["quantized", "scale", "zero_point"].map(|s| e.fresh(format!("{a}_{s}")));
                let outputs = names.each_ref().map(String::as_str);
                e.nodes.push(node("DynamicQuantizeLinear", format!("{a}_QuantizeLinear"), &[&a], &outputs));
                self.activations.insert(a, names.clone());
                names
            }
        };
        let per_channel = self.options.per_channel;
        let names = match self.weights.get(&p.key) {
            Some(names) => names.clone(),
            None => {
                let grid = if per_channel { [p.k, p.n, 1] } else { [1, 1, p.weights.len()] };
                let quantised = symmetric(&p.weights, grid, q_max(&self.options), &|_| 0.0);
                let names = ["quantized", "scale", "zero_point"].map(|s| e.fresh(format!("{}_{s}", p.name)));
                let n = quantised.scales.len();
                let dims: &[usize] = if per_channel { &[n] } else { &[] };
                e.add(constant(&names[0], &[p.k, p.n], &quantised.values)?);
                e.add(constant(&names[1], dims, &quantised.scales)?);
                e.add(constant(&names[2], dims, &vec![0i8; n])?);
                let how = if per_channel { "int8 per column" } else { "int8" };
                let (before, after) = (4 * p.weights.len(), p.weights.len() + 5 * n);
                e.note(NodeReport::new(&old, &p.name, &[p.k, p.n], how, &quantised.noise, before, after));
                self.weights.insert(p.key, names.to_vec());
                names.to_vec()
            }
        };
        e.release(&p.name);
        let y = old.outputs[0].clone();
        let [sums, real, scales] = ["output_quantized", "output_cast", "scales"].map(|s| e.fresh(format!("{y}_{s}")));
        e.nodes.push(node("MatMulInteger", format!("{name}_quant"), &[&q, &names[0], &zero, &names[2]], &[&sums]));
        let cast = node("Cast", format!("{name}_cast"), &[&sums], &[&real]);
        e.nodes.push(with_int(cast, "to", DType::F32 as i64));
        e.nodes.push(node("Mul", format!("{name}_scales_mul"), &[&scale, &names[1]], &[&scales]));
        let last = node("Mul", format!("{name}_output_scale_mul"), &[&real, &scales], &[&y]);
        with_bias(e, &old, last, p.bias);
        Ok(())
    }
}

/// The largest weight.
pub(super) fn q_max(options: &QuantizeOptions) -> f32 {
    if options.reduce_range { 63.0 } else { 127.0 }
}
