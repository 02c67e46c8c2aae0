//! Pyramids of poolings: a `MaxPool` over a large window is computed from that over a smaller window of the same value.
//!
//! ```text
//! max over 9 around i  =  max over 5 around i of (max over 5 around i)          9 = 5 + 5 - 1
//! ```
//!
//! for stride 1 and padding on both sides to the same size: a maximum does not mind that elements are met twice, nor
//! the padding, which never wins. YOLO's spatial pyramids pool one value with windows of 5, 9 and 13; one after the other
//! that is 3 x 25 comparisons for an element instead of 25 + 81 + 169. The results are the same bits.

use super::Pass;
use super::pattern::{Replacement, View, rewrite};
use crate::error::Result;
use crate::graph::{Graph, Node};
use crate::ops::pool::Pool;
use crate::ops::spatial::{AutoPad, Window};
use weblane_kernels::pool::PoolOp;

/// Makes chains of poolings of one value.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    rewrite(graph, pass, |view, i| Ok(chain(view, i))).map(drop)
}

/// The window, of a maximum over an odd window of stride 1 that keeps all sizes.
fn centred(node: &Node) -> Option<(&Pool, &[usize])> {
    let pool = node.op.get::<Pool>().filter(|p| p.op == PoolOp::Max && !p.indices)?;
    let w = &pool.window;
    let kernel = w.kernel.as_deref()?;
    let ones = |v: &[usize]| v.iter().all(|&s| s == 1);
    let half = kernel.iter().map(|k| k / 2);
    let pads = match w.auto_pad {
        AutoPad::NotSet => w.pads.iter().copied().eq(half.clone().chain(half)),
        AutoPad::SameUpper | AutoPad::SameLower => true,
        _ => false,
    };
    (pads && ones(&w.strides) && ones(&w.dilations) && kernel.iter().all(|k| k % 2 == 1)).then_some((pool, kernel))
}

fn chain(view: &View, i: usize) -> Option<Replacement> {
    let node = &view.graph.nodes[i];
    let x = node.inputs.first().copied().flatten()?;
    let (pool, kernel) = centred(node)?;
    // The largest of the smaller windows leaves least to do.
    let smaller = |other: &&Node| {
        let fits = |(p, k): (&Pool, &[usize])| {
            p.layout == pool.layout && k.len() == kernel.len() && k.iter().zip(kernel).all(|(a, b)| a < b)
        };
        other.inputs.first() == Some(&Some(x)) && centred(other).is_some_and(fits)
    };
    let before = view.graph.nodes.iter().filter(smaller).max_by_key(|n| centred(n).map(|(_, k)| k[0]))?;
    let (_, done) = centred(before)?;
    let rest: Vec<usize> = kernel.iter().zip(done).map(|(k, d)| k - d + 1).collect();
    let pads = rest.iter().chain(&rest).map(|k| k / 2).collect();
    let window =
        Window { kernel: Some(rest.into_iter().collect()), pads, auto_pad: AutoPad::NotSet, ..pool.window.clone() };
    let op = Pool { window, ..pool.clone() }.into();
    Some(Replacement { root: i, nodes: vec![i], op, operands: vec![before.outputs[0].into()] })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Net, ints};
    use super::*;

    fn window(graph: &Graph, node: usize) -> Vec<usize> {
        graph.nodes[node].op.get::<Pool>().unwrap().window.kernel.as_deref().unwrap().to_vec()
    }

    /// Poolings of one value, joined, as in YOLO's SPP block.
    fn pyramid(sizes: &[i64], change: &[(&str, crate::onnx::AttributeValue)]) -> (Net, Graph) {
        let mut n = Net::new(12);
        let x = n.input("x", &[1, 2, 13, 11]);
        let mut parts = vec![x];
        for &k in sizes {
            let mut attrs = vec![("kernel_shape", ints(&[k, k])), ("pads", ints(&[k / 2; 4]))];
            attrs.extend(change.iter().cloned());
            parts.push(n.op_with("MaxPool", &[x], &attrs));
        }
        for part in parts {
            let y = n.op("Abs", &[part]);
            n.output(y);
        }
        let graph = n.apply(run);
        (n, graph)
    }

    #[test]
    fn a_pyramid_becomes_a_chain() {
        let (n, graph) = pyramid(&[5, 9, 13], &[]);
        n.check(&graph);
        assert_eq!([0, 1, 2].map(|i| window(&graph, i)), [[5, 5]; 3]);
        // In any order of the model.
        let (n, graph) = pyramid(&[13, 5, 9], &[]);
        n.check(&graph);
        let mut windows: Vec<_> = graph.nodes.iter().filter_map(|n| centred(n).map(|(_, k)| k.to_vec())).collect();
        windows.sort();
        assert_eq!(windows, [[5, 5]; 3]);
    }

    #[test]
    fn other_windows_stay() {
        for sizes in [[4, 8, 12], [5, 5, 5]] {
            let (_, graph) = pyramid(&sizes, &[]);
            let windows: Vec<_> = graph.nodes.iter().filter_map(|n| n.op.get::<Pool>()).collect();
            assert!(windows.iter().zip(sizes).all(|(p, k)| p.window.kernel.as_deref() == Some(&[k as usize; 2][..])));
        }
        let (n, graph) = pyramid(&[5, 9], &[("strides", ints(&[2, 2]))]);
        n.check(&graph);
        assert_eq!(window(&graph, 1), [9, 9]);
    }
}
