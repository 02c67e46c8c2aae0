//! What became of a model, in numbers.

use super::edit::{full_op, label, with_outputs};
use super::weights::Noise;
use super::{Mode, edit};
use crate::error::{Error, Result};
use crate::onnx::{Model, Node};
use crate::session::{self, Session};
use crate::tensor::{DType, Tensor, TensorView};
use half::{bf16, f16};
use serde::Serialize;
use std::collections::HashMap;
use std::sync::Arc;
use weblane_kernels::par::Pool;

/// A node that was quantised.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReport {
    /// Its name in the model, or its first result when it has none.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Its weights; empty when it has none.
    pub weights: String,
    /// Their shape.
    pub shape: Vec<usize>,
    /// What they became.
    pub kind: String,
    /// Signal-to-quantisation-noise ratio of the weights in dB; none without weights, or when nothing was lost.
    pub sqnr_db: Option<f64>,
    /// The same of the node's result over the samples: the noise of everything before it is in there too.
    pub output_sqnr_db: Option<f64>,
    /// Bytes of the weights before.
    pub bytes_before: usize,
    /// And after, scales and zero points included.
    pub bytes_after: usize,
    /// Value of the float model and the quantised one whose difference is `output_sqnr_db`.
    #[serde(skip)]
    pub(super) observed: Option<[String; 2]>,
}

impl NodeReport {
    pub(super) fn new(
        node: &Node,
        weights: &str,
        shape: &[usize],
        kind: &str,
        noise: &Noise,
        bytes_before: usize,
        bytes_after: usize,
    ) -> Self {
        NodeReport {
            node: label(node).to_owned(),
            op: full_op(node),
            weights: weights.to_owned(),
            shape: shape.to_vec(),
            kind: kind.to_owned(),
            sqnr_db: noise.sqnr_db(),
            output_sqnr_db: None,
            bytes_before,
            bytes_after,
            observed: None,
        }
    }
}

/// A node that stayed as it was although it is of a kind that is quantised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Skipped {
    /// Its name in the model, or its first result when it has none.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Why.
    pub reason: String,
}

/// An output of the model, float and quantised, over the samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OutputReport {
    /// Its name.
    pub name: String,
    /// Mean over the samples of the cosine of the angle between both.
    pub cosine: f64,
    /// The least of them.
    pub min_cosine: f64,
    /// The largest difference of an element.
    pub max_error: f64,
    /// Share of rows, along the last axis of more than one element, whose largest element is at the same place; none where there is no such axis.
    pub top1: Option<f64>,
    /// Samples that were compared.
    pub samples: usize,
}

/// What became of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// How it was quantised.
    pub mode: Mode,
    /// Nodes that were quantised, in the order of the file.
    pub nodes: Vec<NodeReport>,
    /// Nodes of the same kinds that were not.
    pub skipped: Vec<Skipped>,
    /// Outputs, when samples were given.
    pub outputs: Vec<OutputReport>,
    /// Samples that were given.
    pub samples: usize,
    /// Bytes of the file before, external data included.
    pub bytes_before: usize,
    /// Bytes of the file after.
    pub bytes_after: usize,
}

/// Both models side by side on samples.
pub(super) struct Comparison {
    float: Session,
    quantised: Session,
    outputs: Vec<Compared>,
    /// By report: index of the float output and of the quantised one.
    pairs: Vec<(usize, [usize; 2], Noise)>,
}

struct Compared {
    name: String,
    at: [usize; 2],
    sum_cosine: f64,
    min_cosine: f64,
    max_error: f64,
    rows: u64,
    agreeing: u64,
    samples: usize,
}

impl Comparison {
    pub(super) fn new(
        float: Session,
        model: &Model,
        report: &Report,
        engine: session::Options,
        pool: Arc<Pool>,
    ) -> Result<Self> {
        let observed: Vec<(usize, &[String; 2])> =
            report.nodes.iter().enumerate().filter_map(|(i, n)| Some((i, n.observed.as_ref()?))).collect();
        let more = observed.iter().map(|(_, names)| names[1].as_str());
        let mut unique: Vec<&str> = Vec::new();
        for name in more {
            if !unique.contains(&name) {
                unique.push(name);
            }
        }
        let model_outputs: Vec<String> = model.graph.outputs.iter().map(|o| o.name.clone()).collect();
        let quantised = Session::with_pool(with_outputs(model.clone(), unique.into_iter()), engine, pool)?;
        let places = |s: &Session| -> HashMap<String, usize> {
            s.outputs().iter().enumerate().map(|(i, o)| (o.name.clone(), i)).collect()
        };
        let (a, b) = (places(&float), places(&quantised));
        let outputs = model_outputs.into_iter().filter_map(|name| {
            let at = [*a.get(&name)?, *b.get(&name)?];
            let numbers = float.outputs()[at[0]].dtype != DType::String;
            numbers.then_some(Compared {
                name,
                at,
                sum_cosine: 0.0,
                min_cosine: 1.0,
                max_error: 0.0,
                rows: 0,
                agreeing: 0,
                samples: 0,
            })
        });
        let outputs = outputs.collect();
        let pairs = observed
            .into_iter()
            .filter_map(|(i, [x, y])| Some((i, [*a.get(x)?, *b.get(y)?], Noise::default())))
            .collect();
        Ok(Comparison { float, quantised, outputs, pairs })
    }

    /// One sample through both.
    pub(super) fn run(&mut self, feeds: &[(&str, TensorView)]) -> Result<()> {
        let wanted = self.float.run(feeds)?;
        let half: Vec<(usize, Tensor)> = self.converted(feeds)?;
        let views: Vec<(&str, TensorView)> = feeds
            .iter()
            .enumerate()
            .map(|(i, &(name, view))| {
                let other = half.iter().find(|(at, _)| *at == i);
                (name, other.map_or(view, |(_, t)| t.view()))
            })
            .collect();
        let got = self.quantised.run(&views)?;
        for o in &mut self.outputs {
            o.add(&wanted[o.at[0]], &got[o.at[1]])?;
        }
        for (_, at, noise) in &mut self.pairs {
            let (x, y) = (wanted[at[0]].as_slice::<f32>()?, got[at[1]].as_slice::<f32>()?);
            x.iter().zip(y).filter(|(x, _)| x.is_finite()).for_each(|(&x, &y)| noise.add(x, y));
        }
        Ok(())
    }

    /// Inputs whose element type the conversion changed.
    fn converted(&self, feeds: &[(&str, TensorView)]) -> Result<Vec<(usize, Tensor)>> {
        let mut out = Vec::new();
        for (i, (name, view)) in feeds.iter().enumerate() {
            let wanted = self.quantised.inputs().iter().find(|info| info.name == *name).map(|info| info.dtype);
            let t = match (view.dtype, wanted) {
                (DType::F32, Some(DType::F16)) => {
                    let x: Vec<f16> = view.as_slice::<f32>()?.iter().map(|&v| f16::from_f32(v)).collect();
                    Tensor::from_slice(view.dims, &x)?
                }
                (DType::F16, Some(DType::F32)) => {
                    let x: Vec<f32> = view.as_slice::<f16>()?.iter().map(|v| v.to_f32()).collect();
                    Tensor::from_slice(view.dims, &x)?
                }
                _ => continue,
            };
            out.push((i, t));
        }
        Ok(out)
    }

    pub(super) fn finish(self, report: &mut Report) {
        for (i, _, noise) in self.pairs {
            report.nodes[i].output_sqnr_db = noise.sqnr_db();
        }
        report.outputs = self.outputs.into_iter().filter(|o| o.samples > 0).map(Compared::finish).collect();
    }
}

impl Compared {
    fn add(&mut self, want: &Tensor, got: &Tensor) -> Result<()> {
        if want.dims() != got.dims() {
            return Err(Error::internal(format!(
                "the output \"{}\" is {:?} after quantisation, it was {:?}",
                self.name,
                got.dims(),
                want.dims()
            )));
        }
        let (x, y) = (floats(want)?, floats(got)?);
        let mut dots = [0f64; 3];
        for (&x, &y) in x.iter().zip(&y) {
            dots[0] += x * y;
            dots[1] += x * x;
            dots[2] += y * y;
            self.max_error = self.max_error.max((x - y).abs());
        }
        let cosine = match dots[1] * dots[2] {
            0.0 => f64::from(u8::from(dots[1] == dots[2])),
            product => dots[0] / product.sqrt(),
        };
        self.sum_cosine += cosine;
        self.min_cosine = self.min_cosine.min(cosine);
        // Classifiers give [n, classes], and those that end in a pooling [n, classes, 1, 1].
        if let Some(&row) = want.dims().iter().rev().find(|&&n| n != 1).filter(|&&n| n > 1) {
            for (x, y) in x.chunks_exact(row).zip(y.chunks_exact(row)) {
                self.rows += 1;
                self.agreeing += u64::from(largest(x) == largest(y));
            }
        }
        self.samples += 1;
        Ok(())
    }

    fn finish(self) -> OutputReport {
        OutputReport {
            name: self.name,
            cosine: self.sum_cosine / self.samples as f64,
            min_cosine: self.min_cosine,
            max_error: self.max_error,
            top1: (self.rows > 0).then(|| self.agreeing as f64 / self.rows as f64),
            samples: self.samples,
        }
    }
}

fn largest(x: &[f64]) -> usize {
    x.iter().enumerate().fold(0, |best, (i, v)| if *v > x[best] { i } else { best })
}

fn floats(t: &Tensor) -> Result<Vec<f64>> {
    Ok(match t.dtype() {
        DType::F32 => t.as_slice::<f32>()?.iter().map(|&v| f64::from(v)).collect(),
        DType::F64 => t.as_slice::<f64>()?.to_vec(),
        DType::F16 => t.as_slice::<f16>()?.iter().map(|v| v.to_f64()).collect(),
        DType::Bf16 => t.as_slice::<bf16>()?.iter().map(|v| v.to_f64()).collect(),
        _ => t.view().to_i64s()?.iter().map(|&v| v as f64).collect(),
    })
}

/// What is said of a constant that merely changed its element type.
pub(super) fn converted(
    name: &str,
    t: &crate::onnx::TensorProto,
    kind: &str,
    noise: &Noise,
    after: usize,
) -> NodeReport {
    NodeReport {
        node: name.to_owned(),
        op: "initializer".to_owned(),
        weights: name.to_owned(),
        shape: t.dims.clone(),
        kind: kind.to_owned(),
        sqnr_db: noise.sqnr_db(),
        output_sqnr_db: None,
        bytes_before: edit::bytes_of(t),
        bytes_after: after,
        observed: None,
    }
}
