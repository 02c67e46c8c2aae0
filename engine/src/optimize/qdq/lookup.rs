//! Chains of functions of one tensor of bytes become a table of 256 results.

use super::{input, is_byte};
use crate::analyze::{Folding, infer_node};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Node, ValueId};
use crate::ops::Op;
use crate::ops::binary::{Arithmetic, Function};
use crate::ops::clip::Clip;
use crate::ops::identity::Identity;
use crate::ops::lookup::Lookup;
use crate::ops::qlinear_unary::QLinearUnary;
use crate::ops::quantize::Linear;
use crate::ops::unary::Pointwise;
use crate::optimize::Pass;
use crate::optimize::pattern::{Replacement, View};
use crate::tensor::{DType, Tensor};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Nodes that a table may stand for.
const MAX_REGION: usize = 32;

/// Whether a node computes each element of its result from one element of what it reads and from constants.
fn is_pointwise(view: &View, node: &Node) -> bool {
    let constant = |k: usize| input(node, k).is_none_or(|id| view.tensor(id).is_some_and(|t| t.len() == 1));
    let function = if let Some(linear) = node.op.get::<Linear>() {
        linear.block == 0 && constant(1) && constant(2)
    } else {
        let kernel = |a: &Arithmetic| matches!(a.function, Function::Kernel(_));
        node.op.is::<Pointwise>()
            || node.op.is::<Lookup>()
            || (node.op.is::<QLinearUnary>() && (1..5).all(constant))
            || node.op.is::<Identity>()
            || node.op.is::<Clip>()
            || node.op.get::<Arithmetic>().is_some_and(kernel)
    };
    let result = |id: ValueId| view.fact(id).is_some_and(|f| f.dtype == DType::F32 || is_byte(f.dtype));
    function && node.outputs.len() == 1 && result(node.outputs[0])
}

/// The bytes from which a value could be computed by a table, those before others first.
fn sources(view: &View, root: ValueId) -> Vec<ValueId> {
    let (mut todo, mut seen, mut found) = (vec![root], BTreeSet::new(), BTreeSet::new());
    while let Some(id) = todo.pop() {
        if view.tensor(id).is_some() || !seen.insert(id) || seen.len() > 2 * MAX_REGION {
            continue;
        }
        if id != root && view.fact(id).is_some_and(|f| is_byte(f.dtype)) {
            found.insert((view.producer(id).map(|(i, _)| i), id));
        }
        if let Some((_, node)) = view.producer(id).filter(|(_, n)| is_pointwise(view, n)) {
            todo.extend(node.operands());
        }
    }
    found.into_iter().map(|(_, id)| id).collect()
}

/// Whether a value follows from the bytes `source` by pointwise nodes, which are collected.
fn follows(view: &View, id: ValueId, source: ValueId, nodes: &mut BTreeSet<usize>) -> bool {
    if id == source || view.tensor(id).is_some_and(|t| t.len() == 1) {
        return true;
    }
    let Some((i, node)) = view.producer(id).filter(|(_, n)| is_pointwise(view, n)) else { return false };
    if nodes.contains(&i) {
        return true;
    }
    nodes.len() < MAX_REGION && nodes.insert(i) && node.operands().all(|id| follows(view, id, source, nodes))
}

/// Pointwise functions from bytes to bytes.
pub(super) fn table(view: &View, pass: &Pass, i: usize) -> Result<Option<Replacement>> {
    let node = &view.graph.nodes[i];
    let quantizes = node.op.get::<Linear>().is_some_and(|l| !l.back);
    if !(quantizes || node.op.is::<Lookup>() || node.op.is::<QLinearUnary>()) || !is_pointwise(view, node) {
        return Ok(None);
    }
    let root = node.outputs[0];
    let Some(dtype) = view.fact(root).map(|f| f.dtype).filter(|&d| is_byte(d)) else { return Ok(None) };
    for source in sources(view, root) {
        let mut nodes = BTreeSet::new();
        if !view.same_rank(source, root) || !follows(view, root, source, &mut nodes) {
            continue;
        }
        // A table alone is what it should become.
        if nodes.len() == 1 && node.op.is::<Lookup>() {
            continue;
        }
        let Some(table) = tabulate(view, pass, source, root, &nodes)? else { continue };
        let same = view.fact(source).is_some_and(|f| f.dtype == dtype) && (0..=255).all(|b| table[usize::from(b)] == b);
        let op: Op = if same { Identity.into() } else { Lookup { table: table.into(), dtype }.into() };
        return Ok(Some(Replacement { root: i, nodes: vec![i], op, operands: vec![source.into()] }));
    }
    Ok(None)
}

/// The nodes' own results for all 256 bytes.
fn tabulate(
    view: &View,
    pass: &Pass,
    source: ValueId,
    root: ValueId,
    nodes: &BTreeSet<usize>,
) -> Result<Option<Vec<u8>>> {
    let mut facts: Vec<Option<Fact>> = vec![None; view.graph.values.len()];
    let bytes: Vec<u8> = (0..=255).collect();
    let Some((dtype, rank)) = view.fact(source).map(|f| (f.dtype, f.rank())) else { return Ok(None) };
    // Of the source's rank, which what is broadcast to it may want.
    let mut dims = vec![1; rank.unwrap_or(1).max(1)];
    dims[rank.unwrap_or(1).max(1) - 1] = 256;
    let all = match dtype {
        DType::U8 => Tensor::from_slice(&dims, &bytes)?,
        _ => Tensor::from_slice(&dims, &bytes.iter().map(|&b| b as i8).collect::<Vec<_>>())?,
    };
    facts[source.index()] = Some(Fact::constant(Arc::new(all)));
    for &i in nodes {
        let node = &view.graph.nodes[i];
        for id in node.operands().filter(|&id| view.tensor(id).is_some()) {
            facts[id.index()] = view.fact(id).cloned();
        }
        // What does not fit these sizes is no function of single bytes.
        let Ok(results) = infer_node(node, &facts, pass.cx, Folding { max_bytes: usize::MAX }) else { return Ok(None) };
        facts[node.outputs[0].index()] = results.into_iter().next();
    }
    let table = facts[root.index()].as_ref().and_then(Fact::tensor).map(|t| t.bytes().to_vec());
    Ok(table.filter(|t| t.len() == 256))
}
