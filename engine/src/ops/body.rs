//! Bodies of control-flow operators: graphs whose last inputs are captured outer values.

use super::{PackCache, Precision};
use crate::analyze::{Folding, analyze};
use crate::error::{Error, Result};
use crate::execute::Memory;
use crate::fact::{Dim, Fact, Shape};
use crate::graph::Graph;
use crate::plan::{Plan, plan, plan_for};
use crate::tensor::{Tensor, TensorView};
use smallvec::SmallVec;
use std::sync::Mutex;
use weblane_kernels::par::Cx;

/// Facts of a body's outputs for certain inputs. Nothing large is computed.
pub fn infer_outputs(body: &Graph, inputs: &[Fact], cx: &Cx) -> Result<Vec<Fact>> {
    if inputs.len() != body.inputs.len() {
        let (have, want) = (inputs.len(), body.inputs.len());
        return Err(Error::invalid_model(format!("the body \"{}\" takes {want} inputs, {have} are given", body.name)));
    }
    let facts = analyze(body, inputs, cx, Folding { max_bytes: 1 << 12 })?;
    let of = |id: &crate::graph::ValueId| {
        let lost = || Error::invalid_model(format!("nothing is known of the output \"{}\"", body.value(*id).name));
        facts[id.index()].clone().ok_or_else(lost)
    };
    body.outputs.iter().map(of).collect()
}

/// What is known of a value that is one or the other.
pub fn either(a: &Fact, b: &Fact) -> Result<Fact> {
    if a.dtype != b.dtype {
        return Err(Error::dtype(format!("one body gives {}, the other {}", a.dtype, b.dtype)));
    }
    let shape: Option<Shape> = match (&a.shape, &b.shape) {
        (Some(a), Some(b)) if a.len() == b.len() => {
            Some(a.iter().zip(b).map(|(x, y)| if x == y { x.clone() } else { Dim::Unknown }).collect())
        }
        _ => None,
    };
    Ok(shape.map_or_else(|| Fact::of_dtype(a.dtype), |s| Fact::with_shape(a.dtype, s)))
}

/// A body that is ready to run for one set of input shapes, with memory of its own that stays.
#[derive(Debug)]
pub struct PlannedBody {
    plan: Plan,
    memory: Mutex<Memory>,
}

impl PlannedBody {
    /// For known shapes.
    pub fn new(body: &Graph, inputs: &[Fact], cache: &PackCache, cx: &Cx) -> Result<Self> {
        Ok(PlannedBody { plan: plan(body, inputs, cache, cx)?, memory: Mutex::default() })
    }

    /// For certain inputs, of which those that decide shapes become part of the plan.
    pub fn of_inputs(body: &Graph, inputs: &[TensorView], cx: &Cx) -> Result<Self> {
        // For few runs: transforming weights would not pay.
        let (plan, _) = plan_for(body, inputs, &PackCache::new(Precision::Exact), cx)?;
        Ok(PlannedBody { plan, memory: Mutex::default() })
    }

    /// Runs, and hands each output to `take`.
    pub fn run<'a>(
        &self,
        inputs: impl Iterator<Item = TensorView<'a>>,
        cx: &Cx,
        mut take: impl FnMut(usize, TensorView) -> Result<()>,
    ) -> Result<()> {
        let mut memory = self.memory.lock().map_err(|_| Error::internal("an earlier run of the body panicked"))?;
        let inputs: SmallVec<[TensorView; 16]> = inputs.collect();
        memory.fit(&self.plan, &inputs)?;
        for step in &self.plan.steps {
            memory.run_step(&self.plan, &inputs, step, cx)?;
        }
        for (i, &value) in self.plan.outputs.iter().enumerate() {
            take(i, memory.view(&self.plan, &inputs, value)?)?;
        }
        Ok(())
    }
}

/// Plans and runs a body once.
pub fn run_once(body: &Graph, inputs: &[TensorView], cx: &Cx) -> Result<Vec<Tensor>> {
    let mut outputs = Vec::with_capacity(body.outputs.len());
    PlannedBody::of_inputs(body, inputs, cx)?.run(inputs.iter().copied(), cx, |_, view| {
        outputs.push(view.to_tensor()?);
        Ok(())
    })?;
    Ok(outputs)
}
