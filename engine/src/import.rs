//! From the structs of the file format to a [`Graph`] of known operators.

use crate::error::{Error, ErrorCode, Result};
use crate::fact::{Dim, Fact};
use crate::graph::{Graph, Node, ValueId};
use crate::onnx::{self, AttributeValue, Model, TypeProto};
use crate::ops::identity::Identity;
use crate::ops::{self, Attributes};
use crate::tensor::DType;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Bodies may nest this deep (an `If` in an `If` ...); a file that goes deeper is refused before the stack suffers.
const MAX_DEPTH: usize = 48;

/// The largest opset whose operators were read against the specification.
pub const MAX_OPSET: i64 = 28;

/// Makes the graph.
///
/// # Errors
/// `UnsupportedOperator` names every operator of the model that the engine does not have, at once; the other codes
/// name the first node that is not understood.
pub fn import(model: Model) -> Result<Graph> {
    let opset = model.opset("").or_else(|| model.opset_imports.first().map(|o| o.version)).unwrap_or(0);
    if model.opset("").is_some() && !(1..=MAX_OPSET).contains(&opset) {
        return Err(Error::new(
            ErrorCode::UnsupportedOperator,
            format!("the model is of opset {opset}; opsets up to {MAX_OPSET} can be read"),
        ));
    }
    let versions: HashMap<String, i64> =
        model.opset_imports.iter().map(|o| (canonical(&o.domain).to_owned(), o.version)).collect();
    check_operators(&model)?;
    let functions = model.functions.iter().map(|f| ((canonical(&f.domain), f.name.as_str()), f)).collect();
    let left = Cell::new(MAX_EXPANDED_NODES);
    let scope =
        Scope { versions: &versions, functions: &functions, attributes: &HashMap::new(), left: &left, depth: 0 };
    import_graph(model.graph, &scope, &[])
}

fn canonical(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

fn check_operators(model: &Model) -> Result<()> {
    let mut missing: BTreeMap<String, usize> = BTreeMap::new();
    let is_function = |n: &onnx::Node| {
        model.functions.iter().any(|f| canonical(&f.domain) == canonical(&n.domain) && f.name == n.op_type)
    };
    let mut lists: Vec<&[onnx::Node]> = vec![&model.graph.nodes];
    lists.extend(model.functions.iter().map(|f| f.nodes.as_slice()));
    while let Some(nodes) = lists.pop() {
        for node in nodes {
            if ops::find(&node.domain, &node.op_type).is_none() && !is_function(node) {
                *missing.entry(full_name(&node.domain, &node.op_type)).or_default() += 1;
            }
            lists.extend(bodies(node).map(|(_, g)| g.nodes.as_slice()));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = missing.iter().map(|(name, n)| format!("{name} ({n} node{})", plural(*n))).collect();
    let what = match missing.len() {
        1 => "an operator that is not supported".to_owned(),
        n => format!("{n} operators that are not supported"),
    };
    Err(Error::new(ErrorCode::UnsupportedOperator, format!("the model uses {what}: {}", list.join(", "))))
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

fn full_name(domain: &str, op_type: &str) -> String {
    if canonical(domain).is_empty() { op_type.to_owned() } else { format!("{domain}.{op_type}") }
}

fn bodies(node: &onnx::Node) -> impl Iterator<Item = (&str, &onnx::Graph)> {
    node.attributes.iter().filter_map(|a| match &a.value {
        AttributeValue::Graph(g) => Some((a.name.as_str(), &**g)),
        _ => None,
    })
}

/// Names that a body reads and does not define: its captures.
fn free_names(graph: &onnx::Graph) -> Vec<String> {
    let mut defined: HashSet<&str> = graph.inputs.iter().map(|i| i.name.as_str()).collect();
    defined.extend(graph.initializers.iter().map(|t| t.name.as_str()));
    defined.extend(graph.sparse_initializers.iter().map(|t| t.values.name.as_str()));
    defined.extend(graph.nodes.iter().flat_map(|n| n.outputs.iter().map(String::as_str)));
    let mut free = Vec::new();
    let mut seen = HashSet::new();
    let mut read = |name: &str| {
        if !name.is_empty() && !defined.contains(name) && seen.insert(name.to_owned()) {
            free.push(name.to_owned());
        }
    };
    for node in &graph.nodes {
        node.inputs.iter().for_each(|n| read(n));
        for (_, body) in bodies(node) {
            free_names(body).iter().for_each(|n| read(n));
        }
    }
    graph.outputs.iter().for_each(|o| read(&o.name));
    free
}

/// What a node is read in: the model's graph, a body, or the body of a function that the model defines.
struct Scope<'a> {
    /// Version of each operator set.
    versions: &'a HashMap<String, i64>,
    /// The model's functions by domain and name.
    functions: &'a HashMap<(&'a str, &'a str), &'a onnx::Function>,
    /// Attributes of the call, in the body of a function.
    attributes: &'a HashMap<String, AttributeValue>,
    /// Nodes that calls may still expand to.
    left: &'a Cell<usize>,
    depth: usize,
}

/// Functions that call functions can make a short file expand to any number of nodes; this many are imported.
const MAX_EXPANDED_NODES: usize = 1 << 20;

type Names = HashMap<String, ValueId>;

fn import_graph(proto: onnx::Graph, scope: &Scope, captures: &[String]) -> Result<Graph> {
    if scope.depth > MAX_DEPTH {
        return Err(Error::limit(format!("bodies of control-flow operators nest deeper than {MAX_DEPTH}")));
    }
    let mut graph = Graph { name: proto.name, ..Graph::default() };
    let mut names = Names::new();
    let dense = proto.sparse_initializers.iter().map(|s| s.to_dense(usize::MAX / 4));
    let initializers: Result<Vec<_>> = proto.initializers.into_iter().map(Ok).chain(dense).collect();
    for t in initializers? {
        let name = t.name.clone();
        let tensor = t.into_tensor()?;
        let id = graph.add_constant(name.clone(), tensor);
        if names.insert(name.clone(), id).is_some() {
            return Err(Error::invalid_model(format!("two initializers are called \"{name}\"")));
        }
    }
    for info in &proto.inputs {
        // Before format version 4 the inputs list the initializers too.
        if names.contains_key(&info.name) {
            continue;
        }
        let id = graph.add_value(info.name.clone());
        graph.values[id.index()].declared = declared(info)?;
        graph.inputs.push(id);
        names.insert(info.name.clone(), id);
    }
    for name in captures {
        let id = graph.add_value(name.clone());
        graph.inputs.push(id);
        names.insert(name.clone(), id);
    }
    import_nodes(proto.nodes, &mut graph, &mut names, scope)?;
    for info in &proto.outputs {
        let id = names.get(&info.name).copied().ok_or_else(|| {
            Error::invalid_model(format!("no node computes the output \"{}\" of the graph", info.name))
        })?;
        if graph.value(id).declared.is_none() {
            graph.values[id.index()].declared = declared(info).unwrap_or(None);
        }
        graph.outputs.push(id);
    }
    graph.sort()?;
    Ok(graph)
}

/// Adds the nodes to the graph, and their results to the names.
fn import_nodes(nodes: Vec<onnx::Node>, graph: &mut Graph, names: &mut Names, scope: &Scope) -> Result<()> {
    // Nodes of a valid file stand in order; others are sorted later, so all results get their values first.
    for node in &nodes {
        for name in node.outputs.iter().filter(|n| !n.is_empty()) {
            let id = graph.add_value(name.clone());
            if names.insert(name.clone(), id).is_some() {
                let e = Error::invalid_model(format!("the name \"{name}\" is given to two values"));
                return Err(e.at(&node.name, &full_name(&node.domain, &node.op_type)));
            }
        }
    }
    for mut node in nodes {
        let (name, op) = (node.name.clone(), full_name(&node.domain, &node.op_type));
        let place = |e: Error| e.at(&name, &op);
        resolve_references(&mut node, scope);
        // An operator that the engine has is faster than the definition that the model carries along.
        let function = match ops::find(&node.domain, &node.op_type) {
            Some(_) => None,
            None => scope.functions.get(&(canonical(&node.domain), node.op_type.as_str())),
        };
        match function {
            Some(function) => import_call(&node, function, graph, names, scope).map_err(place)?,
            None => {
                let node = import_node(node, graph, names, scope).map_err(place)?;
                graph.nodes.push(node);
            }
        }
    }
    Ok(())
}

/// In the body of a function, attributes that name one of the call get its value, or go when the call lacks it.
fn resolve_references(node: &mut onnx::Node, scope: &Scope) {
    node.attributes.retain_mut(|a| match &a.value {
        AttributeValue::Ref { ref_attr_name, .. } => match scope.attributes.get(ref_attr_name) {
            Some(value) => {
                a.value = value.clone();
                true
            }
            None => false,
        },
        _ => true,
    });
}

/// Puts the nodes of a function in the place of its call.
fn import_call(
    call: &onnx::Node,
    function: &onnx::Function,
    graph: &mut Graph,
    names: &Names,
    scope: &Scope,
) -> Result<()> {
    if scope.depth >= MAX_DEPTH {
        return Err(Error::limit(format!("calls of functions nest deeper than {MAX_DEPTH}")));
    }
    let left =
        scope.left.get().checked_sub(function.nodes.len()).ok_or_else(|| {
            Error::limit(format!("the model's functions expand to more than {MAX_EXPANDED_NODES} nodes"))
        })?;
    scope.left.set(left);
    if call.inputs.len() > function.inputs.len() || call.outputs.len() > function.outputs.len() {
        return Err(Error::invalid_model(format!(
            "the call has {} operands and {} results, the function {} and {}",
            call.inputs.len(),
            call.outputs.len(),
            function.inputs.len(),
            function.outputs.len()
        )));
    }
    let mut attributes: HashMap<String, AttributeValue> =
        function.attribute_defaults.iter().map(|a| (a.name.clone(), a.value.clone())).collect();
    attributes.extend(call.attributes.iter().map(|a| (a.name.clone(), a.value.clone())));
    let versions: HashMap<String, i64> =
        function.opset_imports.iter().map(|o| (canonical(&o.domain).to_owned(), o.version)).collect();
    let mut inner = Names::new();
    let mut absent = HashSet::new();
    for (k, formal) in function.inputs.iter().enumerate() {
        match call.inputs.get(k).filter(|n| !n.is_empty()) {
            Some(actual) => {
                inner.insert(formal.clone(), lookup(names, actual)?);
            }
            None => {
                absent.insert(formal.as_str());
            }
        }
    }
    let mut nodes = function.nodes.clone();
    for (i, node) in nodes.iter_mut().enumerate() {
        node.name = format!("{}/{}", call.name, if node.name.is_empty() { i.to_string() } else { node.name.clone() });
        for name in node.inputs.iter_mut().filter(|n| absent.contains(n.as_str())) {
            name.clear();
        }
    }
    let scope = Scope { versions: &versions, attributes: &attributes, depth: scope.depth + 1, ..*scope };
    import_nodes(nodes, graph, &mut inner, &scope)?;
    for (formal, actual) in function.outputs.iter().zip(&call.outputs).filter(|(_, a)| !a.is_empty()) {
        let (from, to) = (lookup(&inner, formal)?, lookup(names, actual)?);
        graph.nodes.push(Node {
            name: format!("{}/{formal}", call.name),
            op: Identity.into(),
            inputs: vec![Some(from)],
            outputs: vec![to],
        });
    }
    Ok(())
}

fn lookup(names: &Names, name: &str) -> Result<ValueId> {
    names.get(name).copied().ok_or_else(|| Error::invalid_model(format!("nothing computes the operand \"{name}\"")))
}

fn import_node(proto: onnx::Node, graph: &mut Graph, names: &Names, scope: &Scope) -> Result<Node> {
    let lookup = |name: &str| lookup(names, name);
    let registration = ops::find(&proto.domain, &proto.op_type)
        .ok_or_else(|| Error::new(ErrorCode::UnsupportedOperator, "the operator is not supported"))?;
    let opset = scope.versions.get(canonical(&proto.domain)).copied().unwrap_or(1);
    if registration.domain.is_empty() && opset < registration.since {
        return Err(Error::new(
            ErrorCode::UnsupportedOperator,
            format!("the form of opset {opset} is not supported, those from opset {} on are", registration.since),
        ));
    }
    let mut inputs = Vec::with_capacity(proto.inputs.len());
    for name in &proto.inputs {
        inputs.push(if name.is_empty() { None } else { Some(lookup(name)?) });
    }
    let given: Vec<bool> = inputs.iter().map(Option::is_some).collect();

    let mut captures: Vec<String> = Vec::new();
    for (_, body) in bodies(&proto) {
        for name in free_names(body) {
            if !captures.contains(&name) {
                captures.push(name);
            }
        }
    }
    for name in &captures {
        inputs.push(Some(lookup(name)?));
    }
    let inner = Scope { depth: scope.depth + 1, ..*scope };
    let mut attributes = Vec::with_capacity(proto.attributes.len());
    let mut imported = HashMap::new();
    for a in proto.attributes {
        match a.value {
            AttributeValue::Graph(body) => {
                imported.insert(a.name, import_graph(*body, &inner, &captures)?);
            }
            value => attributes.push(onnx::Attribute { name: a.name, value }),
        }
    }
    let mut attributes = Attributes::new(&proto.op_type, opset, attributes, imported, given, proto.outputs.len());
    let op = (registration.parse)(&mut attributes)?;
    attributes.finish()?;
    let outputs = proto
        .outputs
        .iter()
        .map(|name| if name.is_empty() { Ok(graph.add_value("")) } else { lookup(name) })
        .collect::<Result<_>>()?;
    Ok(Node { name: proto.name, op, inputs, outputs })
}

/// What the file says of a value; `None` when it says nothing.
pub(crate) fn declared(info: &onnx::ValueInfo) -> Result<Option<Fact>> {
    let (elem_type, shape) = match &info.ty {
        None => return Ok(None),
        Some(TypeProto::Tensor { elem_type, shape }) => (*elem_type, shape),
        Some(_) => {
            return Err(Error::unsupported_dtype(format!(
                "\"{}\" is not a dense tensor; only those can be used",
                info.name
            )));
        }
    };
    if elem_type == 0 {
        return Ok(None);
    }
    let dtype = DType::from_onnx(i64::from(elem_type)).ok_or_else(|| {
        Error::unsupported_dtype(format!(
            "\"{}\" has element type number {elem_type}, which is not supported",
            info.name
        ))
    })?;
    let dim = |d: &onnx::Dim| match d {
        onnx::Dim::Known(n) => usize::try_from(*n).map_or(Dim::Unknown, Dim::Known),
        onnx::Dim::Param(name) if name.is_empty() => Dim::Unknown,
        onnx::Dim::Param(name) => Dim::Symbol(Arc::from(name.as_str())),
        onnx::Dim::Unknown => Dim::Unknown,
    };
    Ok(Some(match shape {
        Some(s) => Fact::with_shape(dtype, s.iter().map(dim).collect()),
        None => Fact::of_dtype(dtype),
    }))
}
