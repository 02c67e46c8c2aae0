//! Portable rewriting of the graph. Each pass is one file with one function; the list below is their order.

use crate::error::Result;
use crate::fact::Fact;
use crate::graph::Graph;
use weblane_kernels::par::Cx;

mod fold;

/// Facts of the graph's inputs as the model declares them.
pub type InputFacts = [Fact];

/// What a pass may use.
#[derive(Debug)]
pub struct Pass<'a> {
    /// For constant folding.
    pub cx: &'a Cx<'a>,
    /// What is known of the graph's inputs.
    pub inputs: &'a InputFacts,
}

/// Rewrites the graph; its inputs and outputs stay, its results too up to rounding.
pub fn optimize(mut graph: Graph, inputs: &InputFacts, cx: &Cx) -> Result<Graph> {
    let pass = Pass { cx, inputs };
    fold::run(&mut graph, &pass)?;
    graph.remove_dead_nodes();
    graph.remove_dead_constants();
    Ok(graph)
}
