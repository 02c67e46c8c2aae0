//! Products by constant matrices, whichever way a file spells them, and tables that Gather reads: what dynamic and
//! weight-only quantisation look for.

use super::edit::{Editor, constant, elements, float, int, label, node, onnx_op, transpose, with_int};
use super::report::NodeReport;
use super::weights::{check_finite, symmetric};
use crate::error::{Error, Result};
use crate::onnx::Node;
use crate::tensor::DType;
use std::collections::HashMap;

/// `A W + bias`.
pub(super) struct Product {
    /// The file's name of the weights.
    pub(super) name: String,
    /// Rows: length of the sums.
    pub(super) k: usize,
    /// Columns.
    pub(super) n: usize,
    /// `[k, n]`, with the node's factor in it.
    pub(super) weights: Vec<f32>,
    /// Added to the product: a value of the graph.
    pub(super) bias: Option<String>,
    /// Under which weights that were quantised for another node can be found.
    pub(super) key: String,
}

/// What a node is to these methods.
enum Found {
    /// A product by constant weights.
    Product(Product),
    /// A product that they cannot take, and why.
    Unfit(&'static str),
    /// Another operator.
    Other,
}

/// The node and its product, if there is a product to quantise. Everything else is dealt with here: tables of embeddings where
/// they are asked for, and nodes that stay as they are.
pub(super) fn product(
    e: &mut Editor,
    weights: &mut HashMap<String, Vec<String>>,
    embeddings: bool,
    old: Node,
) -> Result<Option<(Node, Product)>> {
    let is_table = embeddings && onnx_op(&old) == "Gather";
    if !(is_table || matches!(onnx_op(&old), "MatMul" | "Gemm")) || e.skips(&old) {
        e.nodes.push(old);
        return Ok(None);
    }
    if is_table {
        let rest = table(e, weights, old)?;
        e.nodes.extend(rest);
        return Ok(None);
    }
    match find(e, &old)? {
        Found::Product(p) => return Ok(Some((old, p))),
        Found::Unfit(reason) => e.skip(&old, reason),
        Found::Other => {}
    }
    e.nodes.push(old);
    Ok(None)
}

/// Classifies a node. Weights are copied.
fn find(e: &mut Editor, node: &Node) -> Result<Found> {
    let gemm = match onnx_op(node) {
        "MatMul" => false,
        "Gemm" => true,
        _ => return Ok(Found::Other),
    };
    let (Some(a), Some(b)) = (node.inputs.first(), node.inputs.get(1)) else {
        return Err(Error::invalid_model("two operands were wanted"));
    };
    one_result(node)?;
    let Some(w) = e.constant(b) else { return Ok(Found::Unfit("the second operand is not constant")) };
    if e.constant(a).is_some() {
        return Ok(Found::Unfit("both operands are constant"));
    }
    if w.dtype != DType::F32 {
        return Ok(Found::Unfit("the weights are not float32"));
    }
    let &[rows, cols] = w.dims.as_slice() else { return Ok(Found::Unfit("the weights are no matrix")) };
    if rows == 0 || cols == 0 {
        return Ok(Found::Unfit("the weights are empty"));
    }
    let x = elements::<f32>(w)?;
    check_finite(b, x)?;
    if !gemm {
        return Ok(Found::Product(Product {
            name: b.clone(),
            k: rows,
            n: cols,
            weights: x.to_vec(),
            bias: None,
            key: b.clone(),
        }));
    }
    if int(node, "transA", 0) != 0 {
        return Ok(Found::Unfit("the first operand is transposed"));
    }
    let (alpha, beta) = (float(node, "alpha", 1.0), float(node, "beta", 1.0));
    let flipped = int(node, "transB", 0) != 0;
    let (k, n) = if flipped { (cols, rows) } else { (rows, cols) };
    let mut weights = if flipped { transpose(x, rows, cols) } else { x.to_vec() };
    if alpha != 1.0 {
        weights.iter_mut().for_each(|v| *v *= alpha);
        check_finite(b, &weights)?;
    }
    let (name, key) = (b.clone(), format!("{b} {flipped} {alpha}"));
    let c = node.inputs.get(2).filter(|c| !c.is_empty() && beta != 0.0);
    let bias = match c {
        Some(c) if beta != 1.0 => {
            let Some(t) = e.constant(c) else {
                return Ok(Found::Unfit("beta is not 1 and C is not constant"));
            };
            let scaled: Vec<f32> = elements::<f32>(t)?.iter().map(|v| v * beta).collect();
            let dims = t.dims.clone();
            let name = e.fresh(format!("{c}_scaled"));
            let t = constant(&name, &dims, &scaled)?;
            e.add(t);
            Some(name)
        }
        Some(c) => Some(c.clone()),
        None => None,
    };
    Ok(Found::Product(Product { name, k, n, weights, bias, key }))
}

fn one_result(node: &Node) -> Result<()> {
    match node.outputs.as_slice() {
        [y] if !y.is_empty() => Ok(()),
        other => Err(Error::invalid_model(format!("{} results; one was wanted", other.len()))),
    }
}

/// Writes `from + bias` to the result of `old`, or has `last` write there itself when there is no bias.
pub(super) fn with_bias(e: &mut Editor, old: &Node, mut last: Node, bias: Option<String>) {
    let y = &old.outputs[0];
    match bias {
        None => {
            last.outputs[0].clone_from(y);
            e.nodes.push(last);
        }
        Some(bias) => {
            let from = e.fresh(format!("{y}_product"));
            last.outputs[0].clone_from(&from);
            e.nodes.push(last);
            e.nodes.push(node("Add", format!("{}_bias", label(old)), &[&from, &bias], &[y]));
        }
    }
}

/// Tables smaller than this are not worth a further node.
const MIN_TABLE: usize = 1024;

/// A Gather from a constant float matrix becomes one from an 8-bit matrix with a scale per column and a
/// DequantizeLinear behind it. Gives the node back when it is something else.
///
/// `known` has the matrices that were quantised before.
fn table(e: &mut Editor, known: &mut HashMap<String, Vec<String>>, old: Node) -> Result<Option<Node>> {
    let (Some(name), Some(indices)) = (old.inputs.first().cloned(), old.inputs.get(1).cloned()) else {
        return Err(Error::invalid_model("two operands were wanted"));
    };
    let Some(t) = e.constant(&name).filter(|t| t.dtype == DType::F32) else { return Ok(Some(old)) };
    let &[rows, cols] = t.dims.as_slice() else { return Ok(Some(old)) };
    let fits = onnx_op(&old) == "Gather" && matches!(int(&old, "axis", 0), 0 | -2);
    if !fits || rows.saturating_mul(cols) < MIN_TABLE {
        return Ok(Some(old));
    }
    one_result(&old)?;
    let key = format!("table {name}");
    let names = match known.get(&key) {
        Some(names) => names.clone(),
        None => {
            let x = elements::<f32>(t)?;
            check_finite(&name, x)?;
            let q = symmetric(x, [rows, cols, 1], 127.0, &|_| 0.0);
            let after = q.values.len() + 5 * q.scales.len();
            e.note(NodeReport::new(&old, &name, &[rows, cols], "int8 per column", &q.noise, 4 * q.values.len(), after));
            let names = ["quantized", "scale", "zero_point"].map(|s| e.fresh(format!("{name}_{s}")));
            e.add(constant(&names[0], &[rows, cols], &q.values)?);
            e.add(constant(&names[1], &[cols], &q.scales)?);
            e.add(constant(&names[2], &[cols], &vec![0i8; cols])?);
            known.insert(key, names.to_vec());
            names.to_vec()
        }
    };
    e.release(&name);
    let y = &old.outputs[0];
    let picked = e.fresh(format!("{y}_quantized"));
    let back = node("DequantizeLinear", format!("{}_dequantize", label(&old)), &[&picked, &names[1], &names[2]], &[y]);
    let mut gather = old;
    gather.inputs = vec![names[0].clone(), indices];
    gather.outputs = vec![picked];
    e.nodes.push(gather);
    e.nodes.push(with_int(back, "axis", -1));
    Ok(None)
}
