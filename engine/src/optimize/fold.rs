//! Constant folding: nodes whose results inference could compute become constants; views of no effect go.

use super::Pass;
use crate::analyze::{Folding, infer_node};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Graph, Node};
use crate::ops::conv::Conv;
use crate::ops::conv_transpose::ConvTranspose;
use crate::ops::gemm::Gemm;
use crate::ops::identity::Identity;
use crate::ops::if_::If;
use crate::ops::matmul::MatMul;
use crate::ops::quantize::Linear;

/// Replaces every computed value that is known by a constant.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    let mut facts: Vec<Option<Fact>> =
        graph.values.iter().map(|v| v.constant.as_ref().map(|t| Fact::constant(t.clone()))).collect();
    for (id, fact) in graph.inputs.iter().zip(pass.inputs) {
        facts[id.index()] = Some(fact.clone());
    }
    let mut uses = graph.use_counts();
    let packed = if pass.packs && !graph.nodes.iter().any(|n| n.op.is::<If>()) { packed(graph) } else { vec![] };
    for node in std::mem::take(&mut graph.nodes) {
        let mut folding = Folding::default();
        if is_dequantized(&node, &facts) && packed.get(node.outputs[0].index()) == Some(&true) {
            folding.max_bytes = usize::MAX;
        }
        for (id, fact) in node.outputs.iter().zip(infer_node(&node, &facts, pass.cx, folding)?) {
            facts[id.index()] = Some(fact);
        }
        let known: Option<Vec<_>> =
            node.outputs.iter().map(|o| facts[o.index()].as_ref().and_then(Fact::tensor).cloned()).collect();
        let Some(tensors) = known else {
            graph.nodes.push(node);
            continue;
        };
        for (id, tensor) in node.outputs.iter().zip(tensors) {
            graph.values[id.index()].constant = Some(tensor);
        }
        // Weights that were turned into others go at once, so that there are never two of all of them.
        for id in node.operands() {
            uses[id.index()] -= 1;
            if uses[id.index()] == 0 {
                facts[id.index()] = None;
                graph.values[id.index()].constant = None;
            }
        }
    }
    drop_identities(graph);
    Ok(())
}

/// Which values only products read, as weights, if need be behind nodes that only move elements: what is packed takes their
/// place, so that a quantised weight costs its real numbers once, and no time in a run.
fn packed(graph: &Graph) -> Vec<bool> {
    let mut packed = vec![true; graph.values.len()];
    graph.outputs.iter().for_each(|id| packed[id.index()] = false);
    for node in graph.nodes.iter().rev() {
        let op = &node.op;
        let weight = match op.name() {
            "Transpose" | "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Cast" | "Identity" => {
                packed[node.outputs[0].index()].then_some(0)
            }
            _ if op.is::<MatMul>() || op.is::<Gemm>() || op.is::<Conv>() || op.is::<ConvTranspose>() => Some(1),
            _ => None,
        };
        for (k, id) in node.inputs.iter().enumerate() {
            if let Some(id) = id
                && weight != Some(k)
            {
                packed[id.index()] = false;
            }
        }
    }
    packed
}

/// Whether a node makes real numbers of integers. Those of 4 bits would become 8 times as large, and are in models that are
/// large as they are.
fn is_dequantized(node: &Node, facts: &[Option<Fact>]) -> bool {
    let x = node.inputs.first().copied().flatten().and_then(|x| facts[x.index()].as_ref());
    node.op.get::<Linear>().is_some_and(|l| l.back) && x.is_some_and(|x| x.dtype.bits() >= 8)
}

/// Readers of an `Identity` read its operand instead. One that feeds a graph output stays: outputs keep their names.
pub(super) fn drop_identities(graph: &mut Graph) {
    let pairs: Vec<_> = graph
        .nodes
        .iter()
        .filter(|n| n.op.is::<Identity>() && n.outputs.len() == 1 && !graph.outputs.contains(&n.outputs[0]))
        .filter_map(|n| Some((n.outputs[0], n.inputs.first().copied().flatten()?)))
        .collect();
    for (output, operand) in pairs {
        // An identity of an identity: later pairs see the operand that earlier ones put in place.
        let operand = operand_after(graph, output).unwrap_or(operand);
        graph.replace_uses(output, operand);
    }
    graph.remove_dead_nodes();
}

fn operand_after(graph: &Graph, output: crate::graph::ValueId) -> Option<crate::graph::ValueId> {
    graph.nodes.iter().find(|n| n.outputs.first() == Some(&output))?.inputs.first().copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::super::optimize;
    use super::super::testing::{Net, float, int, ints, names, with_cx};
    use crate::fact::Fact;
    use crate::graph::ValueId;
    use crate::tensor::{DType, Tensor};

    const ROWS: usize = 512;
    const COLS: usize = 1024;

    /// Weights of bytes, more than 1 MiB as real numbers, and what they stand for; scales along an axis or one for all.
    fn weights(n: &mut Net, dims: &[usize], axis: Option<usize>) -> [ValueId; 2] {
        let values: Vec<i8> = (0..dims.iter().product()).map(|i: usize| (i * 37 % 251) as u8 as i8).collect();
        let scales: Vec<f32> = (0..axis.map_or(1, |a| dims[a])).map(|i| (1 + i % 3) as f32 / 4096.0).collect();
        let w = n.graph.add_constant("w", Tensor::from_slice(dims, &values).unwrap());
        let scale = n.constant(&[scales.len()][..axis.map_or(0, |_| 1)], &scales);
        [w, n.op_with("DequantizeLinear", &[w, scale], &[("axis", int(axis.unwrap_or(0) as i64))])]
    }

    /// The operators that are left, and the types of the large constants.
    fn left(n: &Net, packs: bool) -> (Vec<String>, Vec<DType>) {
        let graph = with_cx(|cx| optimize(n.graph.clone(), &n.facts, packs, cx).unwrap());
        n.check(&graph);
        let large = graph.values.iter().filter_map(|v| v.constant.as_ref()).filter(|t| t.len() >= ROWS * COLS);
        (names(&graph), large.map(|t| t.dtype()).collect())
    }

    #[test]
    fn weights_of_products_become_real_once() {
        let mut n = Net::new(17);
        let x = n.input("x", &[2, ROWS]);
        let [_, w] = weights(&mut n, &[ROWS, COLS], Some(1));
        let y = n.op("MatMul", &[x, w]);
        let [_, w] = weights(&mut n, &[ROWS, COLS], Some(0));
        let w = n.op_with("Transpose", &[w], &[("perm", ints(&[1, 0]))]);
        let w = n.op_with("Cast", &[w], &[("to", int(DType::F32 as i64))]);
        let y = n.op_with("Gemm", &[y, w], &[("alpha", float(0.5))]);
        let shape = n.i64s(&[2, ROWS as i64, 1, 1]);
        let y = n.op("Reshape", &[y, shape]);
        let [_, w] = weights(&mut n, &[COLS, ROWS], None);
        let shape = n.i64s(&[COLS as i64, ROWS as i64, 1, 1]);
        let w = n.op("Reshape", &[w, shape]);
        let y = n.op("Conv", &[y, w]);
        n.output(y);
        let (names, large) = left(&n, true);
        assert!(!names.iter().any(|n| n == "DequantizeLinear"), "{names:?}");
        assert_eq!(large, [DType::F32; 3]);
        // Elsewhere they stay, where packing would not take their place.
        let (names, large) = left(&n, false);
        assert_eq!(names.iter().filter(|n| *n == "DequantizeLinear").count(), 3);
        assert_eq!(large, [DType::I8; 3]);
    }

    #[test]
    fn other_readers_of_weights_leave_them_small() {
        // Rows of a table are made real after they were found; a product with the same table has numbers of its own.
        let mut n = Net::new(17);
        let i = n.input_of("i", Fact::new(DType::I64, &[3]));
        let [_, table] = weights(&mut n, &[COLS, ROWS], None);
        let rows = n.op("Gather", &[table, i]);
        n.output(rows);
        assert_eq!(left(&n, true), (vec!["Gather".into(), "DequantizeLinear".into()], vec![DType::I8]));
        let transposed = n.op_with("Transpose", &[table], &[("perm", ints(&[1, 0]))]);
        let x = n.input("x", &[2, ROWS]);
        let y = n.op("MatMul", &[x, transposed]);
        n.output(y);
        let (names, mut large) = left(&n, true);
        large.sort_by_key(|d| d.bits());
        assert_eq!((names.len(), large), (3, vec![DType::I8, DType::F32]));
        // One that adds them, and an output.
        let mut n = Net::new(17);
        let x = n.input("x", &[ROWS, COLS]);
        let [_, w] = weights(&mut n, &[ROWS, COLS], Some(1));
        let y = n.op("Add", &[x, w]);
        n.output(y);
        assert_eq!(left(&n, true), (vec!["DequantizeLinear".into(), "Add".into()], vec![DType::I8]));
    }

    #[test]
    fn four_bits_stay_four_bits() {
        let mut n = Net::new(21);
        let x = n.input("x", &[2, ROWS]);
        let mut w = Tensor::zeros(DType::U4, &[ROWS, COLS]).unwrap();
        w.view_mut().bytes().fill(0x3a);
        // Scales along k, which no product of few bits has.
        let (w, scale) = (n.graph.add_constant("w", w), n.constant(&[ROWS], &[0.01; ROWS]));
        let w = n.op_with("DequantizeLinear", &[w, scale], &[("axis", int(0))]);
        let y = n.op("MatMul", &[x, w]);
        n.output(y);
        assert_eq!(left(&n, true), (vec!["DequantizeLinear".into(), "MatMul".into()], vec![DType::U4]));
    }
}
