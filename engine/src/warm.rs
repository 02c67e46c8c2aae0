//! A small network that runs while the bytes of the real model arrive.
//!
//! A browser compiles a function of WebAssembly when it is first called, fast and badly, and again, well, once it has
//! run for about a millisecond; the good code counts from the next call on. Without this all of that happens in the
//! load and the first run. The network has the layers that most of a typical run is spent in, each with enough work to
//! be noticed.

use crate::error::Result;
use crate::onnx::{Attribute, AttributeValue, Dim, Graph, Model, Node, OpsetId, TensorProto, TypeProto, ValueInfo};
use crate::session::{Options, Session};
use crate::tensor::{DType, Tensor, TensorView};
use std::sync::Arc;
use weblane_kernels::par::Pool;

/// Width and height of the image: small enough that a layer takes no longer than a read of the network.
const SIZE: usize = 28;
/// Channels of the layers.
const CHANNELS: usize = 64;
/// Runs of the network.
const RUNS: usize = 3;

/// The network, between its steps.
#[derive(Debug)]
pub struct WarmUp {
    session: Session,
    input: Tensor,
    runs: usize,
    running: bool,
}

impl WarmUp {
    /// Loads the network, which takes the way of every model.
    pub fn new(options: Options, pool: Arc<Pool>) -> Result<Self> {
        let model = Model::parse(&network()?.to_bytes())?;
        let session = Session::with_pool(model, options, pool)?;
        let input = Tensor::zeros(DType::F32, &[1, 3, SIZE, SIZE])?;
        Ok(WarmUp { session, input, runs: 0, running: false })
    }

    /// Runs steps until `pause` says so, as [`Session::advance`]. Returns whether that was all.
    pub fn advance(&mut self, pause: impl FnMut(usize, usize) -> bool) -> Result<bool> {
        if self.runs == RUNS {
            return Ok(true);
        }
        if !self.running {
            let input: TensorView = self.input.view();
            self.session.begin(&[("x", input)])?;
            self.running = true;
        }
        if self.session.advance(pause)? {
            self.runs += 1;
            self.running = false;
        }
        Ok(self.runs == RUNS)
    }
}

/// Stem, expansion, two depthwise layers, projection, residual, 3 x 3 convolution, classifier.
fn network() -> Result<Model> {
    let mut n = Network::default();
    n.constant("low", &[], 0.0)?;
    n.constant("high", &[], 6.0)?;
    n.conv("x", "stem", [CHANNELS, 3, 3], 1, 1)?;
    n.node("Clip", &["stem", "low", "high"], "a", vec![]);
    n.conv("a", "b", [CHANNELS, CHANNELS, 1], 1, 1)?;
    n.node("Clip", &["b", "low", "high"], "c", vec![]);
    n.conv("c", "d", [CHANNELS, 1, 3], CHANNELS, 1)?;
    n.node("Clip", &["d", "low", "high"], "e", vec![]);
    n.conv("e", "f", [CHANNELS, CHANNELS, 1], 1, 1)?;
    n.node("Add", &["f", "a"], "g", vec![]);
    n.conv("g", "h", [CHANNELS, 1, 3], CHANNELS, 2)?;
    n.node("Clip", &["h", "low", "high"], "i", vec![]);
    n.conv("i", "j", [CHANNELS, CHANNELS, 3], 1, 1)?;
    n.node("Relu", &["j"], "k", vec![]);
    n.node("GlobalAveragePool", &["k"], "l", vec![]);
    n.node("Flatten", &["l"], "m", vec![]);
    n.constant("w", &[CHANNELS, CHANNELS], 0.01)?;
    n.constant("v", &[CHANNELS], 0.0)?;
    n.node("Gemm", &["m", "w", "v"], "y", vec![("transB", AttributeValue::Int(1))]);
    let info = |name: &str, dims: &[usize]| {
        let shape = dims.iter().map(|&d| Dim::Known(d as i64)).collect();
        ValueInfo { name: name.into(), ty: Some(TypeProto::Tensor { elem_type: FLOAT, shape: Some(shape) }) }
    };
    n.graph.inputs = vec![info("x", &[1, 3, SIZE, SIZE])];
    n.graph.outputs = vec![info("y", &[1, CHANNELS])];
    Ok(Model {
        ir_version: 8,
        opset_imports: vec![OpsetId { domain: String::new(), version: 13 }],
        graph: n.graph,
        ..Model::default()
    })
}

/// `TensorProto.FLOAT`.
const FLOAT: i32 = 1;

#[derive(Default)]
struct Network {
    graph: Graph,
}

impl Network {
    /// A constant with one value everywhere.
    fn constant(&mut self, name: &str, dims: &[usize], value: f32) -> Result<()> {
        let tensor = Tensor::from_slice(dims, &vec![value; dims.iter().product()])?;
        self.graph.initializers.push(TensorProto::new(name, &tensor)?);
        Ok(())
    }

    fn node(&mut self, op: &str, inputs: &[&str], output: &str, attributes: Vec<(&str, AttributeValue)>) {
        self.graph.nodes.push(Node {
            name: output.into(),
            op_type: op.into(),
            inputs: inputs.iter().map(|&i| i.into()).collect(),
            outputs: vec![output.into()],
            attributes: attributes.into_iter().map(|(name, value)| Attribute { name: name.into(), value }).collect(),
            ..Node::default()
        });
    }

    /// A convolution with weights and bias of its own; `shape` is outputs, inputs of a group, side of the kernel.
    fn conv(&mut self, x: &str, y: &str, shape: [usize; 3], groups: usize, stride: i64) -> Result<()> {
        let [outputs, inputs, side] = shape;
        let (weights, bias) = (format!("{y}/w"), format!("{y}/b"));
        self.constant(&weights, &[outputs, inputs, side, side], 0.01)?;
        self.constant(&bias, &[outputs], 0.0)?;
        let attributes = vec![
            ("group", AttributeValue::Int(groups as i64)),
            ("pads", AttributeValue::Ints(vec![side as i64 / 2; 4])),
            ("strides", AttributeValue::Ints(vec![stride; 2])),
        ];
        self.node("Conv", &[x, &weights, &bias], y, attributes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_to_its_end_in_steps() {
        let pool = Arc::new(Pool::new(1));
        let mut warm = WarmUp::new(Options::default(), pool).unwrap();
        let mut calls = 1;
        // One step per call.
        while !warm
            .advance({
                let mut first = true;
                move |_, _| !std::mem::replace(&mut first, false)
            })
            .unwrap()
        {
            calls += 1;
        }
        assert!(calls > RUNS * 7, "{calls}");
        assert!(warm.advance(|_, _| false).unwrap());
    }

    #[test]
    fn has_the_kernels_of_a_typical_run() {
        let pool = Arc::new(Pool::new(1));
        let mut session = Session::with_pool(network().unwrap(), Options::default(), pool).unwrap();
        let input = Tensor::zeros(DType::F32, &[1, 3, SIZE, SIZE]).unwrap();
        session.begin(&[("x", input.view())]).unwrap();
        let mut profile = Vec::new();
        assert!(session.advance_timed(|_, _| false, Some(&|| 0.0), &mut profile).unwrap());
        let kernels: Vec<&str> = profile.iter().filter(|t| t.op == "Conv").map(|t| t.kernel.as_str()).collect();
        assert_eq!(kernels, [""; 6]);
        assert!(session.output(0).unwrap().as_slice::<f32>().unwrap().iter().all(|v| v.is_finite()));
    }
}
