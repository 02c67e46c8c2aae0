//! Older models are brought to the operator set in which per-channel scales exist (13), node by node.
//!
//! Most operators mean the same in both; those that changed are listed with what replaces them. What is not listed is an
//! error that names the node, never a guess.

use super::edit::{attribute, constant, each_body, full_op, int, is_onnx, label, node, set_ir, with_int};
use crate::error::{Error, ErrorCode, Result};
use crate::onnx::{Attribute, AttributeValue, Graph, Model, Node, OpsetId};
use std::collections::HashSet;

/// The oldest opset that is understood: broadcasting is NumPy's from 7 on.
const OLDEST: i64 = 7;

/// Operators whose nodes stand for the same in opsets 7 to 13.
const UNCHANGED: &[&str] = &[
    "Abs",
    "Acos",
    "Acosh",
    "Add",
    "And",
    "ArgMax",
    "ArgMin",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "AveragePool",
    "BitShift",
    "Cast",
    "Ceil",
    "Celu",
    "Compress",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "Cos",
    "Cosh",
    "CumSum",
    "DepthToSpace",
    "DequantizeLinear",
    "Det",
    "Div",
    "DynamicQuantizeLinear",
    "Einsum",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "Expand",
    "EyeLike",
    "Flatten",
    "Floor",
    "GRU",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gemm",
    "GlobalAveragePool",
    "GlobalLpPool",
    "GlobalMaxPool",
    "Greater",
    "GreaterOrEqual",
    "HardSigmoid",
    "Identity",
    "If",
    "InstanceNormalization",
    "IsInf",
    "IsNaN",
    "LRN",
    "LSTM",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "Loop",
    "LpNormalization",
    "LpPool",
    "MatMul",
    "MatMulInteger",
    "Max",
    "MaxPool",
    "MaxRoiPool",
    "MaxUnpool",
    "Mean",
    "MeanVarianceNormalization",
    "Min",
    "Mod",
    "Mul",
    "Multinomial",
    "Neg",
    "NonMaxSuppression",
    "NonZero",
    "Not",
    "OneHot",
    "Or",
    "PRelu",
    "Pow",
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
    "RNN",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Range",
    "Reciprocal",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
    "Relu",
    "Reshape",
    "ReverseSequence",
    "RoiAlign",
    "Round",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Selu",
    "Shape",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Size",
    "Softplus",
    "Softsign",
    "SpaceToDepth",
    "Sqrt",
    "StringNormalizer",
    "Sub",
    "Sum",
    "Tan",
    "Tanh",
    "TfIdfVectorizer",
    "ThresholdedRelu",
    "Tile",
    "Transpose",
    "Unique",
    "Where",
    "Xor",
];

/// Brings a model of an opset below `to` to it; `to` is at most 13.
///
/// # Errors
/// `UnsupportedOperator` names the node that has no counterpart.
pub(super) fn raise(model: &mut Model, to: i64) -> Result<()> {
    set_ir(model);
    let Some(from) = model.opset("") else {
        // Nothing but operators of other domains so far.
        model.opset_imports.push(OpsetId { domain: String::new(), version: to });
        return Ok(());
    };
    if from >= to {
        return Ok(());
    }
    if from < OLDEST {
        return Err(Error::new(
            ErrorCode::UnsupportedOperator,
            format!("the model is of opset {from}; models from opset {OLDEST} on can be quantised"),
        ));
    }
    let mut names = HashSet::new();
    let mut collect = |g: &Graph| {
        names.extend(g.nodes.iter().flat_map(|n| n.outputs.iter().chain(&n.inputs)).cloned());
        names.extend(g.initializers.iter().map(|t| t.name.clone()));
        names.extend(g.inputs.iter().map(|i| i.name.clone()));
    };
    collect(&model.graph);
    each_body(&model.graph.nodes, &mut collect);
    let mut raising = Raising { from, to, names };
    let mut graphs = vec![&mut model.graph];
    while let Some(graph) = graphs.pop() {
        for n in std::mem::take(&mut graph.nodes) {
            let (name, op) = (label(&n).to_owned(), full_op(&n));
            raising.node(n, &mut graph.nodes).map_err(|e| e.at(&name, &op))?;
        }
        for a in graph.nodes.iter_mut().flat_map(|n| &mut n.attributes) {
            match &mut a.value {
                AttributeValue::Graph(g) => graphs.push(g),
                AttributeValue::Graphs(gs) => graphs.extend(gs),
                _ => {}
            }
        }
    }
    for o in model.opset_imports.iter_mut().filter(|o| matches!(o.domain.as_str(), "" | "ai.onnx")) {
        o.version = to;
    }
    Ok(())
}

struct Raising {
    from: i64,
    to: i64,
    names: HashSet<String>,
}

impl Raising {
    fn fresh(&mut self, base: String) -> String {
        let mut name = base.clone();
        let mut n = 1usize;
        while !self.names.insert(name.clone()) {
            name = format!("{base}_{n}");
            n += 1;
        }
        name
    }

    /// Whether an operator that changed in opset `version` is affected.
    fn crosses(&self, version: i64) -> bool {
        self.from < version && version <= self.to
    }

    fn node(&mut self, mut n: Node, out: &mut Vec<Node>) -> Result<()> {
        if !is_onnx(&n) || UNCHANGED.contains(&n.op_type.as_str()) {
            out.push(n);
            return Ok(());
        }
        match n.op_type.as_str() {
            "BatchNormalization" if self.crosses(9) => {
                if int(&n, "spatial", 1) != 1 {
                    return Err(self.refused("attribute spatial is 0"));
                }
                n.attributes.retain(|a| a.name != "spatial");
            }
            // A training-time operator that passes its operand through.
            "Dropout" if self.crosses(12) => n.attributes.retain(|a| a.name != "ratio"),
            "BatchNormalization" | "Dropout" => {}
            "Squeeze" | "Unsqueeze" | "ReduceSum" if self.crosses(13) => self.ints_to_input(&mut n, "axes", 1, out)?,
            "Split" if self.crosses(13) => self.ints_to_input(&mut n, "split", 1, out)?,
            "Squeeze" | "Unsqueeze" | "ReduceSum" | "Split" => {}
            "Slice" => {
                if self.crosses(10) {
                    self.ints_to_input(&mut n, "starts", 1, out)?;
                    self.ints_to_input(&mut n, "ends", 2, out)?;
                    self.ints_to_input(&mut n, "axes", 3, out)?;
                }
            }
            "TopK" => {
                if self.crosses(10) {
                    let k = int(&n, "k", 1);
                    n.attributes.retain(|a| a.name != "k");
                    self.input(&mut n, 1, "k", &[1], &[k], out)?;
                }
            }
            "Clip" => {
                if self.crosses(11) {
                    for (at, name) in [(1, "min"), (2, "max")] {
                        if let Some(&AttributeValue::Float(v)) = attribute(&n, name) {
                            self.input(&mut n, at, name, &[], &[v], out)?;
                        }
                    }
                    n.attributes.clear();
                }
            }
            "Pad" => {
                if self.crosses(11) {
                    let value = super::edit::float(&n, "value", 0.0);
                    n.attributes.retain(|a| a.name != "value");
                    self.ints_to_input(&mut n, "pads", 1, out)?;
                    self.input(&mut n, 2, "value", &[], &[value], out)?;
                }
            }
            "Upsample" | "Resize" if self.crosses(11) => {
                if let Some(AttributeValue::Floats(scales)) = attribute(&n, "scales") {
                    let scales = scales.clone();
                    self.input(&mut n, 1, "scales", &[scales.len()], &scales, out)?;
                    n.attributes.retain(|a| a.name != "scales");
                }
                if n.inputs.len() != 2 {
                    return Err(Error::invalid_model(format!("{} operands; 2 were wanted", n.inputs.len())));
                }
                n.inputs.insert(1, String::new());
                n.op_type = "Resize".into();
                for (name, value) in [("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")] {
                    let value = AttributeValue::String(value.into());
                    n.attributes.push(Attribute { name: name.into(), value });
                }
            }
            "Resize" => {}
            "Scatter" => n.op_type = "ScatterElements".into(),
            "Softmax" | "LogSoftmax" | "Hardmax" if self.crosses(13) => {
                let axis = int(&n, "axis", 1);
                n.attributes.retain(|a| a.name != "axis");
                if axis == -1 || n.inputs.is_empty() || n.outputs.is_empty() {
                    out.push(with_int(n, "axis", -1));
                    return Ok(());
                }
                // All axes from this one on together, as these operators had it before.
                let (x, y, at) = (n.inputs[0].clone(), n.outputs[0].clone(), label(&n).to_owned());
                let [flat, shape, done] = ["flat", "shape", "done"].map(|s| self.fresh(format!("{y}_{s}")));
                out.push(node("Shape", format!("{at}_shape"), &[&x], &[&shape]));
                out.push(with_int(node("Flatten", format!("{at}_flatten"), &[&x], &[&flat]), "axis", axis));
                n.inputs[0] = flat;
                n.outputs[0].clone_from(&done);
                out.push(with_int(n, "axis", -1));
                out.push(node("Reshape", format!("{at}_reshape"), &[&done, &shape], &[&y]));
                return Ok(());
            }
            "Softmax" | "LogSoftmax" | "Hardmax" => {}
            _ => return Err(self.refused("the operator")),
        }
        out.push(n);
        Ok(())
    }

    fn refused(&self, what: &str) -> Error {
        Error::new(
            ErrorCode::UnsupportedOperator,
            format!(
                "the model is of opset {} and has to be of opset {}; {what} has no counterpart there, export the \
                 model with a newer opset",
                self.from, self.to
            ),
        )
    }

    /// Moves a list from an attribute to an operand.
    fn ints_to_input(&mut self, n: &mut Node, name: &str, at: usize, out: &mut Vec<Node>) -> Result<()> {
        if let Some(AttributeValue::Ints(values)) = attribute(n, name) {
            let values = values.clone();
            self.input(n, at, name, &[values.len()], &values, out)?;
            n.attributes.retain(|a| a.name != name);
        }
        Ok(())
    }

    fn input<T: crate::tensor::Element>(
        &mut self,
        n: &mut Node,
        at: usize,
        name: &str,
        dims: &[usize],
        values: &[T],
        out: &mut Vec<Node>,
    ) -> Result<()> {
        let value = self.fresh(format!("{}_{name}", label(n)));
        let mut c = node("Constant", value.clone(), &[], &[&value]);
        let tensor = AttributeValue::Tensor(constant("", dims, values)?);
        c.attributes.push(Attribute { name: "value".into(), value: tensor });
        out.push(c);
        if n.inputs.len() <= at {
            n.inputs.resize(at + 1, String::new());
        }
        n.inputs[at] = value;
        Ok(())
    }
}
