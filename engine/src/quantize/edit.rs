//! The graph while it is rewritten: the nodes so far, the constants by name, and who still reads them.

use super::QuantizeOptions;
use super::report::{NodeReport, Report, Skipped};
use super::skip::skips;
use crate::error::{Error, ErrorCode, Result};
use crate::onnx::{Attribute, AttributeValue, Graph, Model, Node, OpsetId, TensorData, TensorProto, ValueInfo};
use crate::storage::AlignedBytes;
use crate::tensor::{DType, Element};
use std::collections::{HashMap, HashSet};

/// Operator of a node that stands for the beginning of the graph.
pub(super) const BEGIN: &str = "weblane.Begin";

/// The domain of onnxruntime's own operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// The oldest file format in which constants are no inputs and that has all element types which are written here.
const IR_VERSION: i64 = 8;

/// What messages call a node: its name, or its first result when it has none.
pub(super) fn label(node: &Node) -> &str {
    if node.name.is_empty() { node.outputs.first().map_or("", String::as_str) } else { &node.name }
}

/// Operator with its domain, if that is not ONNX's own.
pub(super) fn full_op(node: &Node) -> String {
    if is_onnx(node) { node.op_type.clone() } else { format!("{}.{}", node.domain, node.op_type) }
}

/// Whether the operator is one of ONNX's own.
pub(super) fn is_onnx(node: &Node) -> bool {
    matches!(node.domain.as_str(), "" | "ai.onnx")
}

/// The operator if it is one of ONNX's own, else nothing.
pub(super) fn onnx_op(node: &Node) -> &str {
    if is_onnx(node) { &node.op_type } else { "" }
}

/// A node of ONNX's own domain.
pub(super) fn node(op: &str, name: String, inputs: &[&str], outputs: &[&str]) -> Node {
    Node {
        name,
        op_type: op.to_owned(),
        inputs: inputs.iter().map(|&s| s.to_owned()).collect(),
        outputs: outputs.iter().map(|&s| s.to_owned()).collect(),
        ..Node::default()
    }
}

/// The node without its attributes.
pub(super) fn names_of(node: &Node) -> Node {
    let Node { name, op_type, domain, overload, inputs, outputs, .. } = node;
    Node {
        name: name.clone(),
        op_type: op_type.clone(),
        domain: domain.clone(),
        overload: overload.clone(),
        inputs: inputs.clone(),
        outputs: outputs.clone(),
        attributes: Vec::new(),
    }
}

/// Adds an attribute.
pub(super) fn with_int(mut node: Node, name: &str, value: i64) -> Node {
    node.attributes.push(Attribute { name: name.to_owned(), value: AttributeValue::Int(value) });
    node
}

/// The value of an attribute.
pub(super) fn attribute<'a>(node: &'a Node, name: &str) -> Option<&'a AttributeValue> {
    node.attributes.iter().find(|a| a.name == name).map(|a| &a.value)
}

/// An integer attribute.
pub(super) fn int(node: &Node, name: &str, default: i64) -> i64 {
    match attribute(node, name) {
        Some(AttributeValue::Int(i)) => *i,
        _ => default,
    }
}

/// A float attribute.
pub(super) fn float(node: &Node, name: &str, default: f32) -> f32 {
    match attribute(node, name) {
        Some(AttributeValue::Float(f)) => *f,
        _ => default,
    }
}

/// A constant.
pub(super) fn constant<T: Element>(name: &str, dims: &[usize], values: &[T]) -> Result<TensorProto> {
    bytes_constant(name, T::DTYPE, dims, bytemuck::cast_slice(values))
}

/// A constant from its bytes, which must be as many as shape and type want.
fn bytes_constant(name: &str, dtype: DType, dims: &[usize], bytes: &[u8]) -> Result<TensorProto> {
    if crate::tensor::byte_count(dtype, dims)? != bytes.len() {
        return Err(Error::internal(format!("{} bytes for {dtype} {dims:?}", bytes.len())));
    }
    let data = TensorData::Bytes(AlignedBytes::copy_of(bytes)?);
    Ok(TensorProto { name: name.to_owned(), dtype, dims: dims.to_vec(), data })
}

/// The elements of a constant, which must be of type `T`.
pub(super) fn elements<T: Element>(t: &TensorProto) -> Result<&[T]> {
    let TensorData::Bytes(bytes) = &t.data else {
        let message = format!("the elements of tensor \"{}\" are not in the model; give its external data", t.name);
        return Err(Error::new(ErrorCode::ExternalData, message));
    };
    let wrong = || Error::invalid_model(format!("tensor \"{}\" does not hold {} elements", t.name, T::DTYPE));
    if t.dtype != T::DTYPE || crate::tensor::byte_count(t.dtype, &t.dims)? != bytes.len() {
        return Err(wrong());
    }
    bytemuck::try_cast_slice(bytes.as_ref()).map_err(|_| wrong())
}

/// Bytes of a constant's elements.
pub(super) fn bytes_of(t: &TensorProto) -> usize {
    crate::tensor::byte_count(t.dtype, &t.dims).unwrap_or(usize::MAX)
}

/// Calls `visit` with every graph inside the attributes of these nodes, at any depth.
pub(super) fn each_body<'a>(nodes: &'a [Node], visit: &mut dyn FnMut(&'a Graph)) {
    let mut lists = vec![nodes];
    while let Some(nodes) = lists.pop() {
        for a in nodes.iter().flat_map(|n| &n.attributes) {
            let graphs = match &a.value {
                AttributeValue::Graph(g) => std::slice::from_ref(&**g),
                AttributeValue::Graphs(gs) => gs.as_slice(),
                _ => continue,
            };
            for g in graphs {
                visit(g);
                lists.push(&g.nodes);
            }
        }
    }
}

/// Whether a node has bodies.
pub(super) fn has_bodies(node: &Node) -> bool {
    node.attributes.iter().any(|a| matches!(a.value, AttributeValue::Graph(_) | AttributeValue::Graphs(_)))
}

/// The names that the bodies of these nodes mention as operands or results. A body's own names are among them, which
/// errs on the side of keeping a value.
pub(super) fn names_in_bodies(nodes: &[Node]) -> Vec<&str> {
    let mut names = Vec::new();
    each_body(nodes, &mut |g| {
        names.extend(g.nodes.iter().flat_map(|n| &n.inputs).map(String::as_str));
        names.extend(g.outputs.iter().map(|o| o.name.as_str()));
    });
    names
}

/// How often each value of the graph is read: by nodes, by bodies, and as an output.
pub(super) fn uses(graph: &Graph) -> HashMap<String, usize> {
    let mut uses = HashMap::new();
    let mut count = |name: &str| *uses.entry(name.to_owned()).or_insert(0) += 1;
    graph.nodes.iter().flat_map(|n| &n.inputs).filter(|n| !n.is_empty()).for_each(|n| count(n));
    graph.outputs.iter().for_each(|o| count(&o.name));
    names_in_bodies(&graph.nodes).into_iter().for_each(count);
    uses
}

/// Constants that the file has as nodes become initializers, and so do transposes of constant matrices: weights are
/// looked for in one place only.
pub(super) fn constants_to_initializers(graph: &mut Graph) -> Result<()> {
    let outputs: HashSet<String> = graph.outputs.iter().map(|o| o.name.clone()).collect();
    let mut kept = Vec::with_capacity(graph.nodes.len());
    for mut n in std::mem::take(&mut graph.nodes) {
        let movable = onnx_op(&n) == "Constant" && matches!(n.outputs.as_slice(), [o] if !outputs.contains(o));
        let at = n.attributes.iter().position(|a| matches!(a.value, AttributeValue::Tensor(_)));
        match at.filter(|_| movable && n.attributes.len() == 1) {
            Some(at) => {
                if let AttributeValue::Tensor(mut t) = n.attributes.swap_remove(at).value {
                    t.name = n.outputs.swap_remove(0);
                    graph.initializers.push(t);
                }
            }
            None => kept.push(n),
        }
    }
    let places: HashMap<String, usize> =
        graph.initializers.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    for n in kept {
        let folded = match (onnx_op(&n), n.inputs.as_slice(), n.outputs.as_slice()) {
            ("Transpose", [x], [y]) if !outputs.contains(y) => match places.get(x).map(|&i| &graph.initializers[i]) {
                Some(t) if t.dtype == DType::F32 && t.dims.len() == 2 && bytes_of(t) > 0 => {
                    let swaps = match attribute(&n, "perm") {
                        None => true,
                        Some(AttributeValue::Ints(p)) => p.as_slice() == [1, 0],
                        Some(_) => false,
                    };
                    if swaps { Some(transposed(y, t)?) } else { None }
                }
                _ => None,
            },
            _ => None,
        };
        match folded {
            Some(t) => graph.initializers.push(t),
            None => graph.nodes.push(n),
        }
    }
    drop_unread(graph);
    Ok(())
}

fn transposed(name: &str, t: &TensorProto) -> Result<TensorProto> {
    let (rows, cols) = (t.dims[0], t.dims[1]);
    constant(name, &[cols, rows], &transpose(elements::<f32>(t)?, rows, cols))
}

/// `[rows, cols]` to `[cols, rows]`.
pub(super) fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for c in 0..cols {
        out.extend((0..rows).map(|r| x[r * cols + c]));
    }
    out
}

/// Initializers that nothing reads go, and so do inputs that only stand for an initializer.
pub(super) fn drop_unread(graph: &mut Graph) {
    let uses = uses(graph);
    let constants: HashSet<&str> = graph.initializers.iter().map(|t| t.name.as_str()).collect();
    graph.inputs.retain(|i| !constants.contains(i.name.as_str()));
    graph.initializers.retain(|t| uses.contains_key(&t.name));
}

/// The format version that the new constants need.
pub(super) fn set_ir(model: &mut Model) {
    model.ir_version = model.ir_version.max(IR_VERSION);
}

/// Makes onnxruntime's operators known to the model.
pub(super) fn import_microsoft(model: &mut Model) {
    if model.opset(MICROSOFT).is_none() {
        model.opset_imports.push(OpsetId { domain: MICROSOFT.to_owned(), version: 1 });
    }
}

/// The model with values of its graph as further outputs.
pub(super) fn with_outputs<'a>(mut model: Model, names: impl Iterator<Item = &'a str>) -> Model {
    let known: HashSet<String> = model.graph.outputs.iter().map(|o| o.name.clone()).collect();
    let more = names.filter(|n| !known.contains(*n)).map(|n| ValueInfo { name: n.to_owned(), ty: None });
    model.graph.outputs.extend(more);
    model
}

/// The graph while it is rewritten.
pub(super) struct Editor {
    /// The new nodes.
    pub(super) nodes: Vec<Node>,
    options: QuantizeOptions,
    constants: Vec<Option<TensorProto>>,
    places: HashMap<String, usize>,
    uses: HashMap<String, usize>,
    names: HashSet<String>,
    reports: Vec<NodeReport>,
    skipped: Vec<Skipped>,
}

impl Editor {
    /// Takes the constants out of the graph; its nodes have to be there still.
    pub(super) fn new(graph: &mut Graph, options: &QuantizeOptions) -> Result<Self> {
        let uses = uses(graph);
        let mut names: HashSet<String> = uses.keys().cloned().collect();
        names.extend(graph.nodes.iter().flat_map(|n| &n.outputs).cloned());
        names.extend(graph.inputs.iter().map(|i| i.name.clone()));
        names.extend(graph.sparse_initializers.iter().map(|s| s.values.name.clone()));
        each_body(&graph.nodes, &mut |g| {
            names.extend(g.nodes.iter().flat_map(|n| &n.outputs).cloned());
            names.extend(g.initializers.iter().map(|t| t.name.clone()));
            names.extend(g.inputs.iter().map(|i| i.name.clone()));
        });
        let mut places = HashMap::new();
        let mut constants = Vec::with_capacity(graph.initializers.len());
        for t in std::mem::take(&mut graph.initializers) {
            names.insert(t.name.clone());
            if places.insert(t.name.clone(), constants.len()).is_some() {
                return Err(Error::invalid_model(format!("two initializers are called \"{}\"", t.name)));
            }
            constants.push(Some(t));
        }
        Ok(Editor {
            nodes: Vec::new(),
            options: options.clone(),
            constants,
            places,
            uses,
            names,
            reports: Vec::new(),
            skipped: Vec::new(),
        })
    }

    /// A constant by name.
    pub(super) fn constant(&self, name: &str) -> Option<&TensorProto> {
        self.constants[*self.places.get(name)?].as_ref()
    }

    /// A node does not read this constant any more; with its last reader it goes.
    pub(super) fn release(&mut self, name: &str) {
        if let (Some(uses), Some(&at)) = (self.uses.get_mut(name), self.places.get(name)) {
            *uses = uses.saturating_sub(1);
            if *uses == 0 {
                self.constants[at] = None;
            }
        }
    }

    /// Adds a constant under a name from [`fresh`](Self::fresh).
    pub(super) fn add(&mut self, t: TensorProto) {
        self.places.insert(t.name.clone(), self.constants.len());
        self.uses.insert(t.name.clone(), usize::MAX);
        self.constants.push(Some(t));
    }

    /// A name that nothing has yet.
    pub(super) fn fresh(&mut self, base: String) -> String {
        let mut name = base.clone();
        let mut n = 1usize;
        while !self.names.insert(name.clone()) {
            name = format!("{base}_{n}");
            n += 1;
        }
        name
    }

    /// Whether the caller leaves this node out; if so that is noted.
    pub(super) fn skips(&mut self, node: &Node) -> bool {
        let skips = skips(&self.options, node);
        if skips {
            self.skip(node, "left out by the caller");
        }
        skips
    }

    /// Notes why a node stays as it is.
    pub(super) fn skip(&mut self, node: &Node, reason: &str) {
        self.skipped.push(Skipped { node: label(node).to_owned(), op: full_op(node), reason: reason.to_owned() });
    }

    /// Notes what became of a node.
    pub(super) fn note(&mut self, report: NodeReport) {
        self.reports.push(report);
    }

    /// Says where the result of a node that was noted, or is noted now, can be seen before and after.
    pub(super) fn observe(&mut self, node: &Node, values: [String; 2]) {
        let known = self.reports.iter_mut().rev().find(|r| r.node == label(node));
        match known {
            Some(report) => report.observed = Some(values),
            None => {
                let noise = super::weights::Noise::default();
                let mut report = NodeReport::new(node, "", &[], "8-bit values", &noise, 0, 0);
                report.observed = Some(values);
                self.reports.push(report);
            }
        }
    }

    /// Puts everything into the graph.
    pub(super) fn finish(self, graph: &mut Graph, report: &mut Report) {
        graph.nodes = self.nodes;
        graph.initializers = self.constants.into_iter().flatten().collect();
        drop_unread(graph);
        // Types of values that are gone would be refused by others.
        let known: HashSet<&str> = graph.nodes.iter().flat_map(|n| &n.outputs).map(String::as_str).collect();
        graph.value_info.retain(|v| known.contains(v.name.as_str()));
        report.nodes.extend(self.reports);
        report.skipped.extend(self.skipped);
    }
}
