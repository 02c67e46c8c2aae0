//! Portable rewriting of the graph. Each pass is one file with one function; [`optimize`] is their order.

use crate::error::Result;
use crate::fact::Fact;
use crate::graph::Graph;
use facts::{Facts, Memo};
use std::cell::RefCell;
use std::rc::Rc;
use weblane_kernels::par::Cx;

mod activation;
mod affine;
mod attention;
mod bodies;
mod chain;
mod cse;
mod epilogue;
mod facts;
mod fold;
mod group_norm;
mod half;
mod layer_norm;
mod layout;
mod multi_head;
mod nbits;
mod padding;
mod pattern;
mod pooling;
mod products;
mod qdq;
mod rotary;
mod simplify;
mod skip_norm;
mod softmax;
mod space_to_depth;
mod specialize;
#[cfg(test)]
pub(crate) mod testing;

pub use half::promote_half;
pub use specialize::{Decisions, Known, Specialized, specialize};

/// What a pass may use.
#[derive(Debug)]
pub struct Pass<'a> {
    /// For constant folding.
    pub cx: &'a Cx<'a>,
    /// What is known of the graph's inputs.
    pub inputs: &'a [Fact],
    /// Whether products pack their weights next, and let go of them.
    packs: bool,
    memo: RefCell<Memo>,
}

impl<'a> Pass<'a> {
    /// For one graph, from its first pass to its last.
    fn new(cx: &'a Cx<'a>, inputs: &'a [Fact], packs: bool) -> Self {
        Pass { cx, inputs, packs, memo: RefCell::default() }
    }

    /// What is known of every value of the graph as it is now.
    ///
    /// Sizes that inference knows nothing of get names of their own, which flow on to whatever has the same size: so
    /// passes can tell that two values have one shape without knowing it.
    fn facts(&self, graph: &Graph) -> Result<Facts> {
        self.memo.borrow_mut().update(graph, self.inputs, self.cx)
    }

    /// The same for a pass that changes them; the next one starts from nothing.
    fn own_facts(&self, graph: &Graph) -> Result<Vec<Option<Fact>>> {
        let facts = self.facts(graph)?;
        self.memo.take();
        Ok(Rc::unwrap_or_clone(facts))
    }
}

/// Rewrites the graph; its inputs and outputs stay, its results too up to rounding. `inputs` are the facts of the
/// graph's inputs; `packs` says whether products pack their weights next, and let go of them.
pub fn optimize(mut graph: Graph, inputs: &[Fact], packs: bool, cx: &Cx) -> Result<Graph> {
    let pass = Pass::new(cx, inputs, packs);
    // Before folding, which would make real numbers of quantised weights.
    qdq::run(&mut graph, &pass)?;
    // Folding lets go of weights one by one; facts would hold them.
    pass.memo.take();
    nbits::run(&mut graph, &pass)?;
    // Weights in half precision become single here, once.
    fold::run(&mut graph, &pass)?;
    half::drop_round_trips(&mut graph, &pass)?;
    bodies::run(&mut graph, &pass)?;
    multi_head::run(&mut graph, &pass)?;
    // What does nothing hides patterns, and copies of a chain look like other readers of it.
    cse::run(&mut graph, &pass)?;
    simplify::run(&mut graph, &pass)?;
    // Into weights first: it leaves nothing to compute.
    padding::run(&mut graph, &pass)?;
    space_to_depth::run(&mut graph, &pass)?;
    group_norm::run(&mut graph, &pass)?;
    affine::run(&mut graph, &pass)?;
    pooling::run(&mut graph, &pass)?;
    // Many nodes into one, then that one into the product before it.
    layer_norm::run(&mut graph, &pass)?;
    activation::run(&mut graph, &pass)?;
    softmax::run(&mut graph, &pass)?;
    rotary::run(&mut graph, &pass)?;
    attention::run(&mut graph, &pass)?;
    // The masks that attention made, once per layer, and the reshapes around it.
    cse::run(&mut graph, &pass)?;
    simplify::run(&mut graph, &pass)?;
    products::run(&mut graph, &pass)?;
    epilogue::run(&mut graph, &pass)?;
    // What no product could take.
    skip_norm::run(&mut graph, &pass)?;
    chain::run(&mut graph, &pass)?;
    graph.sort()?;
    // Last, so that every pass before it sees the layout of the model.
    layout::run(&mut graph, &pass)?;
    fold::run(&mut graph, &pass)?;
    graph.remove_dead_nodes();
    graph.remove_dead_constants();
    Ok(graph)
}

#[cfg(test)]
mod tests {
    use super::testing::{Net, ints};

    #[test]
    fn half_of_a_transformer_layer() {
        let mut n = Net::new(14);
        let x = n.symbolic("x", &["batch", "tokens", "6"]);
        let (w, b) = (n.weights(&[6, 8]), n.weights(&[8]));
        let y = n.op("MatMul", &[x, w]);
        let y = n.op("Add", &[b, y]);
        let (root, one, half) = (n.scalar(2f32.sqrt()), n.scalar(1.0), n.scalar(0.5));
        let z = n.op("Div", &[y, root]);
        let z = n.op("Erf", &[z]);
        let z = n.op("Add", &[z, one]);
        let y = n.op("Mul", &[y, z]);
        let y = n.op("Mul", &[y, half]);
        let (w, b) = (n.weights(&[8, 6]), n.weights(&[6]));
        let y = n.op("MatMul", &[y, w]);
        let y = n.op("Add", &[b, y]);
        let y = n.op("Add", &[y, x]);
        let mean = n.op_with("ReduceMean", &[y], &[("axes", ints(&[-1]))]);
        let d = n.op("Sub", &[y, mean]);
        let (two, epsilon) = (n.scalar(2.0), n.scalar(1e-12));
        let v = n.op("Pow", &[d, two]);
        let v = n.op_with("ReduceMean", &[v], &[("axes", ints(&[-1]))]);
        let v = n.op("Add", &[v, epsilon]);
        let v = n.op("Sqrt", &[v]);
        let y = n.op("Div", &[d, v]);
        let (scale, bias) = (n.weights(&[6]), n.weights(&[6]));
        let y = n.op("Mul", &[y, scale]);
        let y = n.op("Add", &[y, bias]);
        n.output(y);
        assert_eq!(n.optimized(), ["MatMul", "MatMul", "LayerNormalization"]);
    }

    #[test]
    fn inverted_residual_block() {
        let mut n = Net::new(13);
        let x = n.input("x", &[1, 4, 5, 5]);
        let (lo, hi) = (n.scalar(0.0), n.scalar(6.0));
        let conv = |n: &mut Net, x, [o, i, k]: [usize; 3], groups: i64| {
            let w = n.weights(&[o, i, k, k]);
            let pad = k as i64 / 2;
            let y = n.op_with("Conv", &[x, w], &[("group", super::testing::int(groups)), ("pads", ints(&[pad; 4]))]);
            let [scale, bias, mean] = [(); 3].map(|()| n.weights(&[o]));
            let var: Vec<f32> = super::testing::noise(o, 5).iter().map(|v| v.abs() + 0.5).collect();
            let var = n.constant(&[o], &var);
            n.op("BatchNormalization", &[y, scale, bias, mean, var])
        };
        let y = conv(&mut n, x, [8, 4, 1], 1);
        let y = n.op("Clip", &[y, lo, hi]);
        let y = conv(&mut n, y, [8, 1, 3], 8);
        let y = n.op("Clip", &[y, lo, hi]);
        let y = conv(&mut n, y, [4, 8, 1], 1);
        let y = n.op("Add", &[x, y]);
        n.output(y);
        // Transposed to channels-last and back.
        assert_eq!(n.optimized(), ["Transpose", "Conv", "Conv", "Conv", "Transpose"]);
    }
}
