//! Portable rewriting of the graph. Each pass is one file with one function; [`optimize`] is their order.

use crate::analyze::{Folding, analyze};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::Graph;
use weblane_kernels::par::Cx;

mod activation;
mod affine;
mod bodies;
mod cse;
mod epilogue;
mod fold;
mod half;
mod layer_norm;
mod layout;
mod pattern;
mod simplify;
#[cfg(test)]
mod testing;

pub use half::promote_half;

/// What a pass may use.
#[derive(Debug)]
pub struct Pass<'a> {
    /// For constant folding.
    pub cx: &'a Cx<'a>,
    /// What is known of the graph's inputs.
    pub inputs: &'a [Fact],
}

impl Pass<'_> {
    /// What is known of every value of the graph as it is now.
    pub fn facts(&self, graph: &Graph) -> Result<Vec<Option<Fact>>> {
        analyze(graph, self.inputs, self.cx, Folding { max_bytes: 0 })
    }
}

/// Rewrites the graph; its inputs and outputs stay, its results too up to rounding. `inputs` are the facts of the
/// graph's inputs.
pub fn optimize(mut graph: Graph, inputs: &[Fact], cx: &Cx) -> Result<Graph> {
    let pass = Pass { cx, inputs };
    half::drop_round_trips(&mut graph);
    fold::run(&mut graph, &pass)?;
    bodies::run(&mut graph, &pass)?;
    // What does nothing hides patterns, and copies of a chain look like other readers of it.
    cse::run(&mut graph, &pass)?;
    simplify::run(&mut graph, &pass)?;
    // Into weights first: it leaves nothing to compute.
    affine::run(&mut graph, &pass)?;
    // Many nodes into one, then that one into the product before it.
    layer_norm::run(&mut graph, &pass)?;
    activation::run(&mut graph, &pass)?;
    epilogue::run(&mut graph, &pass)?;
    graph.sort()?;
    // Last, so that every pass before it sees the layout of the model.
    layout::run(&mut graph, &pass)?;
    fold::run(&mut graph, &pass)?;
    graph.remove_dead_nodes();
    graph.remove_dead_constants();
    Ok(graph)
}
