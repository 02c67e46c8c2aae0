//! Weights in their final form: right after optimisation, before any input shape is known, on all lanes.
//!
//! ```text
//! for each node that packs operands:          one task each
//!     pack them into the session's cache      (Operator::prepack)
//!     for each operand packed:
//!         if no reader is left that has not packed it: drop its elements
//! ```
//!
//! So a model takes its weights' bytes once, and while it is packed one tensor per lane more. A constant that is also
//! read in plain form keeps its elements. Constants of the bodies of control flow are packed with the first plan and
//! keep theirs: what a body sees of its operands' ranks depends on the run.

use crate::analyze::{Folding, analyze, operand_facts};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::graph::{Graph, Node};
use crate::ops::{PackCache, Prepare};
use crate::tensor::Tensor;
use std::sync::{Arc, Mutex, MutexGuard};
use weblane_kernels::par::Cx;

/// A constant while its readers pack it.
struct Source {
    tensor: Option<Arc<Tensor>>,
    /// Readers, graph outputs among them, that have not packed it.
    plain_uses: usize,
}

/// Packs the constant operands of all nodes; those that nobody reads otherwise are left without elements. `inputs` are
/// the facts of the graph's inputs.
pub fn run(graph: &mut Graph, inputs: &[Fact], cache: &PackCache, cx: &Cx) -> Result<()> {
    let mut facts = analyze(graph, inputs, cx, Folding { max_bytes: 0 })?;
    // The list of sources becomes the only owner of the constants.
    facts.iter_mut().flatten().for_each(|fact| fact.content = Content::Unknown);
    let uses = graph.use_counts();
    let mut elements = 0;
    let mut sources = Vec::with_capacity(graph.values.len());
    for (value, plain_uses) in graph.values.iter_mut().zip(uses) {
        let tensor = value.constant.take();
        elements += tensor.as_ref().map_or(0, |t| t.len());
        sources.push(Mutex::new(Source { tensor, plain_uses }));
    }
    cx.for_each(graph.nodes.len(), elements as u64, &|i| {
        // A node that cannot be packed may be one that never runs; the plan that needs it meets the same error.
        let _ = pack(&graph.nodes[i], &facts, &sources, cache, cx);
    });
    for (value, source) in graph.values.iter_mut().zip(sources) {
        value.constant = source.into_inner().map_err(|_| broken())?.tensor;
    }
    Ok(())
}

/// Packs the operands of one node and drops what is not needed any more.
fn pack(node: &Node, facts: &[Option<Fact>], sources: &[Mutex<Source>], cache: &PackCache, cx: &Cx) -> Result<()> {
    let operands = operand_facts(node, facts)?;
    let mut operands: Vec<Option<Fact>> = operands.into_iter().map(Option::<&Fact>::cloned).collect();
    for (id, fact) in node.inputs.iter().zip(&mut operands) {
        if let (Some(id), Some(fact)) = (id, fact)
            && let Some(tensor) = &lock(&sources[id.index()])?.tensor
        {
            fact.content = Content::Tensor(tensor.clone());
        }
    }
    let outputs: Option<Vec<&Fact>> = node.outputs.iter().map(|o| facts[o.index()].as_ref()).collect();
    let outputs = outputs.ok_or_else(|| Error::internal("a result has no fact"))?;
    let inputs: Vec<Option<&Fact>> = operands.iter().map(Option::as_ref).collect();
    let packed = node.op.prepack(&Prepare { isa: cx.isa(), cx, inputs: &inputs, outputs: &outputs, cache })?;
    drop(operands);
    for id in packed.iter().filter_map(|&k| *node.inputs.get(k)?) {
        let mut source = lock(&sources[id.index()])?;
        source.plain_uses = source.plain_uses.saturating_sub(1);
        if let (0, Some(tensor)) = (source.plain_uses, &source.tensor) {
            let released = Arc::new(Tensor::released(tensor.dtype(), tensor.dims()));
            cache.release(tensor, &released)?;
            source.tensor = Some(released);
        }
    }
    Ok(())
}

fn lock(source: &Mutex<Source>) -> Result<MutexGuard<'_, Source>> {
    source.lock().map_err(|_| broken())
}

fn broken() -> Error {
    Error::internal("packing of weights panicked")
}
