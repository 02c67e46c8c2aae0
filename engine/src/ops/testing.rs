//! For the tests of operators: one node, built as the importer would, on tensors.

use super::{Attributes, find};
use crate::analyze::{Folding, infer_node};
use crate::error::Result;
use crate::fact::Fact;
use crate::graph::{Node, ValueId};
use crate::onnx::{Attribute, AttributeValue};
use crate::tensor::Tensor;
use std::collections::HashMap;
use std::sync::Arc;
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;

/// A node of one operator with its attributes.
pub(crate) struct OneNode {
    op_type: &'static str,
    domain: &'static str,
    opset: i64,
    attributes: Vec<Attribute>,
    outputs: usize,
}

impl OneNode {
    /// An operator of ONNX's own domain, newest opset, one result.
    pub(crate) fn new(op_type: &'static str) -> Self {
        OneNode { op_type, domain: "", opset: 24, attributes: Vec::new(), outputs: 1 }
    }

    pub(crate) fn domain(mut self, domain: &'static str) -> Self {
        self.domain = domain;
        self
    }

    pub(crate) fn opset(mut self, opset: i64) -> Self {
        self.opset = opset;
        self
    }

    pub(crate) fn outputs(mut self, outputs: usize) -> Self {
        self.outputs = outputs;
        self
    }

    pub(crate) fn attr(mut self, name: &str, value: AttributeValue) -> Self {
        self.attributes.push(Attribute { name: name.into(), value });
        self
    }

    pub(crate) fn int(self, name: &str, value: i64) -> Self {
        self.attr(name, AttributeValue::Int(value))
    }

    pub(crate) fn ints(self, name: &str, value: &[i64]) -> Self {
        self.attr(name, AttributeValue::Ints(value.to_vec()))
    }

    pub(crate) fn float(self, name: &str, value: f32) -> Self {
        self.attr(name, AttributeValue::Float(value))
    }

    pub(crate) fn string(self, name: &str, value: &str) -> Self {
        self.attr(name, AttributeValue::String(value.into()))
    }

    /// Parses and infers with facts of the given operands, and computes when all are constant.
    pub(crate) fn infer(self, inputs: &[Option<Fact>]) -> Result<Vec<Fact>> {
        let registration = find(self.domain, self.op_type).expect("a registered operator");
        let given: Vec<bool> = inputs.iter().map(Option::is_some).collect();
        let mut attributes =
            Attributes::new(self.op_type, self.opset, self.attributes, HashMap::new(), given, self.outputs);
        let op = (registration.parse)(&mut attributes)?;
        attributes.finish()?;
        let id = |i: usize| ValueId(i as u32);
        let node = Node {
            name: "test".into(),
            op,
            inputs: inputs.iter().enumerate().map(|(i, f)| f.as_ref().map(|_| id(i))).collect(),
            outputs: (0..self.outputs).map(|i| id(inputs.len() + i)).collect(),
        };
        let mut facts = inputs.to_vec();
        facts.resize(inputs.len() + self.outputs, None);
        let pool = Pool::new(1);
        pool.run(Isa::best(), |cx| infer_node(&node, &facts, cx, Folding { max_bytes: usize::MAX }))
    }

    /// Runs on tensors.
    pub(crate) fn run_optional(self, inputs: &[Option<Tensor>]) -> Result<Vec<Tensor>> {
        let facts: Vec<_> = inputs.iter().map(|t| t.clone().map(|t| Fact::constant(Arc::new(t)))).collect();
        let results = self.infer(&facts)?;
        Ok(results.iter().map(|f| Tensor::clone(f.tensor().expect("constants give constants"))).collect())
    }

    /// Runs on tensors.
    pub(crate) fn run(self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let inputs: Vec<_> = inputs.iter().cloned().map(Some).collect();
        self.run_optional(&inputs)
    }
}

/// A `float32` tensor.
pub(crate) fn f32s(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(dims, values).expect("a valid test tensor")
}

/// An `int64` tensor.
pub(crate) fn i64s(dims: &[usize], values: &[i64]) -> Tensor {
    Tensor::from_slice(dims, values).expect("a valid test tensor")
}
