//! What onnxruntime's attention operators do besides attention becomes nodes that other passes and kernels know.
//!
//! ```text
//! Attention(x, w, b, ..)             ->  Attention'(MatMul(x, w) + b, ..)                one product, packed weights
//! MultiHeadAttention(q, k, v, b, ..) ->  MultiHeadAttention(q + b[..n], k + .., v + ..)  sums that the products take
//! ```

use super::Pass;
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::Op;
use crate::ops::binary::{Arithmetic, Function};
use crate::ops::matmul::MatMul;
use crate::ops::multi_head::{Attention, MultiHeadAttention};
use crate::tensor::{DType, Tensor};
use weblane_kernels::elementwise::Binary;

/// Takes projections and constant biases out of the operators.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    if !graph.nodes.iter().any(|n| n.op.is::<Attention>() || n.op.is::<MultiHeadAttention>()) {
        return Ok(());
    }
    let facts = pass.facts(graph)?;
    let is_f32 = |id: ValueId| facts[id.index()].as_ref().is_some_and(|f| f.dtype == DType::F32);
    for mut node in std::mem::take(&mut graph.nodes) {
        let operand = |k: usize| node.inputs.get(k).copied().flatten();
        if let (Some(op), Some(x), Some(w)) = (node.op.get::<Attention>(), operand(0), operand(1))
            && let Some(after) = op.after_projection()
            && is_f32(x)
        {
            let mut inputs = vec![x, w];
            inputs.extend(operand(2));
            let product = MatMul { bias: inputs.len() > 2, ..MatMul::default() };
            node.inputs[0] = Some(graph.add_node(format!("{}/projections", node.name), product, &inputs));
            node.inputs[1..].iter_mut().take(2).for_each(|id| *id = None);
            node.op = after.into();
        } else if let (Some(op), [Some(q), Some(k), Some(v), Some(bias), ..]) =
            (node.op.get::<MultiHeadAttention>(), node.inputs.as_slice())
            && let [Some(a), Some(b), Some(c)] = [q, k, v].map(|id| facts[id.index()].as_ref())
            && let Some(columns) = op.bias_columns([a, b, c])
            && let Some(t) = facts[bias.index()].as_ref().and_then(Fact::tensor).filter(|_| is_f32(*q))
            && t.dtype() == DType::F32
            && t.len() == columns.iter().sum::<usize>()
        {
            let t = t.clone();
            let mut rest = t.as_slice::<f32>()?;
            for (i, n) in columns.into_iter().enumerate() {
                let (mine, others) = rest.split_at(n);
                rest = others;
                node.inputs[i] = node.inputs[i].map(|x| add(graph, &node, x, mine)).transpose()?;
            }
            node.inputs[3] = None;
        }
        graph.nodes.push(node);
    }
    Ok(())
}

/// `x + row`, with a new constant.
fn add(graph: &mut Graph, node: &Node, x: ValueId, row: &[f32]) -> Result<ValueId> {
    let name = format!("{}/bias", node.name);
    let row = graph.add_constant(name.clone(), Tensor::from_slice(&[row.len()], row)?);
    let sum: Op = Arithmetic::new("Add", Function::Kernel(Binary::Add)).into();
    let output = graph.add_value(name.clone());
    graph.nodes.push(Node { name, op: sum, inputs: vec![Some(x), Some(row)], outputs: vec![output] });
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, int};
    use super::*;

    fn mask(n: &mut Net) -> ValueId {
        use crate::fact::Dim::{Known, Symbol};
        let shape = [Symbol("batch".into()), Known(5)].into_iter().collect();
        n.input_of("mask", Fact::with_shape(DType::I64, shape))
    }

    #[test]
    fn as_onnxruntime_writes_bert() {
        let mut n = Net::new(17);
        let x = n.symbolic("x", &["batch", "5", "8"]);
        let mask = mask(&mut n);
        let mut y = x;
        for _ in 0..2 {
            let (w, b) = (n.weights(&[8, 24]), n.weights(&[24]));
            y = n.contrib("Attention", &[Some(y), Some(w), Some(b), Some(mask)], &[("num_heads", int(2))]);
        }
        n.output(y);
        let one = ["MatMul", "com.microsoft.Attention"];
        assert_eq!(n.passed(run), [one, one].concat());
        assert_eq!(n.optimized(), [one, one].concat());
    }

    #[test]
    fn biases_go_into_the_products() {
        let mut n = Net::new(17);
        let x = n.symbolic("x", &["batch", "5", "8"]);
        let mask = mask(&mut n);
        let [q, k, v] = [(); 3].map(|()| {
            let w = n.weights(&[8, 8]);
            Some(n.op("MatMul", &[x, w]))
        });
        let b = Some(n.weights(&[24]));
        let y = n.contrib("MultiHeadAttention", &[q, k, v, b, Some(mask)], &[("num_heads", int(2))]);
        n.output(y);
        assert_eq!(n.optimized(), ["MatMul", "MatMul", "MatMul", "com.microsoft.MultiHeadAttention"]);
    }
}
