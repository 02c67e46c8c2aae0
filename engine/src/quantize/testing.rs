//! For the tests of the quantiser: models written node by node.

use super::edit::constant;
use super::{QuantizeOptions, Report, Sample, quantize};
use crate::error::Result;
use crate::onnx::{Attribute, AttributeValue, Dim, Graph, Model, Node, OpsetId, TypeProto, ValueInfo};
use crate::session::{Options, Session};
use crate::tensor::{DType, Tensor};

pub(super) use crate::optimize::testing::noise;

/// A model in the making.
pub(super) struct Net {
    pub(super) model: Model,
}

pub(super) fn value(name: &str, dtype: DType, dims: &[i64]) -> ValueInfo {
    let dim = |&d: &i64| if d < 0 { Dim::Param("n".into()) } else { Dim::Known(d) };
    let shape = Some(dims.iter().map(dim).collect());
    ValueInfo { name: name.into(), ty: Some(TypeProto::Tensor { elem_type: dtype as i32, shape }) }
}

impl Net {
    pub(super) fn new(opset: i64) -> Self {
        let opset_imports = vec![OpsetId { domain: String::new(), version: opset }];
        let graph = Graph { name: "g".into(), ..Graph::default() };
        Net { model: Model { ir_version: 8, opset_imports, graph, ..Model::default() } }
    }

    pub(super) fn input(mut self, name: &str, dims: &[i64]) -> Self {
        self.model.graph.inputs.push(value(name, DType::F32, dims));
        self
    }

    pub(super) fn typed_input(mut self, name: &str, dtype: DType, dims: &[i64]) -> Self {
        self.model.graph.inputs.push(value(name, dtype, dims));
        self
    }

    pub(super) fn output(mut self, name: &str, dims: &[i64]) -> Self {
        self.model.graph.outputs.push(value(name, DType::F32, dims));
        self
    }

    pub(super) fn weights(mut self, name: &str, dims: &[usize], values: &[f32]) -> Self {
        self.model.graph.initializers.push(constant(name, dims, values).unwrap());
        self
    }

    pub(super) fn node(
        mut self,
        op: &str,
        inputs: &[&str],
        output: &str,
        attributes: &[(&str, AttributeValue)],
    ) -> Self {
        let attributes = attributes.iter().map(|(n, v)| Attribute { name: (*n).into(), value: v.clone() }).collect();
        self.model.graph.nodes.push(Node {
            name: format!("node_{output}"),
            op_type: op.into(),
            inputs: inputs.iter().map(|&s| s.into()).collect(),
            outputs: vec![output.into()],
            attributes,
            ..Node::default()
        });
        self
    }
}

pub(super) fn run(model: &Model, sample: &Sample) -> Vec<Tensor> {
    // Through the bytes of a file, as everybody else gets it.
    let mut session = Session::from_bytes(&model.to_bytes(), Options::default()).unwrap();
    session.run(&super::views(sample)).unwrap()
}

pub(super) fn quantised(model: &Model, options: QuantizeOptions, samples: &[Sample]) -> Result<(Model, Report)> {
    quantize(model.clone(), options, samples.to_vec(), Options::default(), &mut |_| true)
}

pub(super) fn sample(name: &str, dims: &[usize], seed: u64) -> Sample {
    let count = dims.iter().product();
    vec![(name.to_owned(), Tensor::from_slice(dims, &noise(count, seed)).unwrap())]
}

pub(super) fn ops(model: &Model) -> Vec<&str> {
    model.graph.nodes.iter().map(|n| n.op_type.as_str()).collect()
}
