//! Loop: a body that runs until it says stop, or a number of times.

use super::body::{PlannedBody, either, infer_outputs};
use super::identity::copy_view;
use super::{Attributes, Infer, Io, Op, Operator, Registration, Same};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::graph::Graph;
use crate::tensor::{DType, Tensor, TensorView};
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Loop", 1, parse)];

/// Values that the results of a loop may take in all, for a trip count that nobody vouches for.
const MAX_ITERATIONS: i64 = 1 << 24;

/// `while condition and i < trip_count { condition, carried..., scanned... = body(i, condition, carried...) }`
///
/// Operands: optional trip count, optional condition, the carried values, then the captured ones. Results: the carried
/// values of the last iteration, then the scanned ones of all, stacked along a new first axis.
#[derive(Clone, Debug)]
pub struct Loop {
    /// Inputs: iteration, condition, carried, captured. Outputs: condition, carried, scanned.
    pub body: Graph,
    /// How many values are carried.
    pub carried: usize,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let body = a.graph("body")?;
    let carried = a.input_count().saturating_sub(2);
    if body.inputs.len() < carried + 2 || body.outputs.len() < carried + 1 {
        return Err(Error::invalid_model(format!(
            "{carried} values are carried; the body has {} inputs and {} outputs",
            body.inputs.len(),
            body.outputs.len()
        )));
    }
    Ok(Loop { body, carried }.into())
}

impl Loop {
    fn first_captured(&self) -> usize {
        2 + self.carried
    }

    /// All iterations on tensors; the values are those that the node's results stack.
    fn iterate(&self, operands: &[Option<TensorView>], cx: &Cx) -> Result<(Vec<Tensor>, Vec<Vec<Tensor>>)> {
        let operand = |i: usize| operands.get(i).copied().flatten();
        let trips = match operand(0) {
            Some(v) => v.to_i64s()?.first().copied().unwrap_or(0),
            None => i64::MAX,
        };
        let mut go = operand(1).is_none_or(|v| v.bytes().first().is_none_or(|&b| b != 0));
        let mut carried: Vec<Tensor> = (2..self.first_captured())
            .map(|i| operand(i).ok_or_else(|| Error::invalid_model(format!("operand {i} is missing")))?.to_tensor())
            .collect::<Result<_>>()?;
        let captured: Vec<TensorView> =
            operands[self.first_captured().min(operands.len())..].iter().copied().flatten().collect();
        let mut scanned: Vec<Vec<Tensor>> = vec![Vec::new(); self.body.outputs.len() - 1 - self.carried];
        let mut planned: Option<(Vec<Vec<usize>>, PlannedBody)> = None;
        let mut i = 0;
        while go && i < trips {
            if i >= MAX_ITERATIONS {
                return Err(Error::limit(format!("the loop has run {MAX_ITERATIONS} times and would go on")));
            }
            if cx.cancelled() {
                return Err(Error::new(crate::error::ErrorCode::Aborted, "the run was stopped"));
            }
            let (step, condition) = (Tensor::scalar(i)?, Tensor::from_bools(&[], &[go])?);
            let mut inputs = vec![step.view(), condition.view()];
            inputs.extend(carried.iter().map(Tensor::view));
            inputs.extend(&captured);
            let shapes: Vec<Vec<usize>> = inputs.iter().map(|v| v.dims.to_vec()).collect();
            // A plan serves as long as the shapes stay; one that depends on elements is made anew each time.
            let mut outputs: Vec<Tensor> = Vec::with_capacity(self.body.outputs.len());
            if planned.as_ref().is_none_or(|(s, _)| *s != shapes) {
                let facts: Vec<Fact> = inputs.iter().map(|v| Fact::new(v.dtype, v.dims)).collect();
                planned = Some((shapes, PlannedBody::new(&self.body, &facts, &Default::default(), cx)?));
            }
            if let Some((_, body)) = &planned {
                body.run(inputs.iter().copied(), cx, |_, view| {
                    outputs.push(view.to_tensor()?);
                    Ok(())
                })?;
            }
            let mut outputs = outputs.into_iter();
            let condition = outputs.next().ok_or_else(|| Error::internal("the body gave no condition"))?;
            go = condition.bytes().first().is_some_and(|&b| b != 0);
            carried = outputs.by_ref().take(self.carried).collect();
            for (all, one) in scanned.iter_mut().zip(outputs) {
                if all.first().is_some_and(|first| first.dims() != one.dims()) {
                    return Err(Error::shape("a scanned value changes its shape from one iteration to the next"));
                }
                all.push(one);
            }
            i += 1;
        }
        Ok((carried, scanned))
    }

    /// Facts of the node's results from those of the body's outputs, with an unknown number of iterations.
    fn symbolic(&self, inputs: &[Option<&Fact>], pool: &Cx) -> Result<Vec<Fact>> {
        let mut carried = Vec::with_capacity(self.carried);
        for i in 2..self.first_captured() {
            let fact = inputs.get(i).copied().flatten();
            let fact = fact.ok_or_else(|| Error::invalid_model(format!("operand {i} is missing")))?;
            carried.push(Fact { content: Default::default(), ..fact.clone() });
        }
        let captured: Vec<Fact> =
            inputs[self.first_captured().min(inputs.len())..].iter().flatten().map(|f| Fact::clone(f)).collect();
        // What an iteration changes about a shape is not known for the next one: twice is enough to find that out, since
        // a size that differs becomes unknown, and a rank that differs too.
        let mut outputs = Vec::new();
        for _ in 0..3 {
            let mut facts = vec![Fact::new(DType::I64, &[]), Fact::new(DType::Bool, &[])];
            facts.extend(carried.iter().cloned());
            facts.extend(captured.iter().cloned());
            outputs = infer_outputs(&self.body, &facts, pool)?;
            for (have, found) in carried.iter_mut().zip(&outputs[1..]) {
                *have = either(have, found)?;
            }
        }
        let scanned = outputs[1 + self.carried..].iter().map(|f| match &f.shape {
            Some(s) => {
                Fact::with_shape(f.dtype, std::iter::once(Dim::Unknown).chain(s.iter().cloned()).collect::<Shape>())
            }
            None => Fact::of_dtype(f.dtype),
        });
        Ok(carried.into_iter().chain(scanned).collect())
    }

    fn results(&self, operands: &[Option<TensorView>], cx: &Cx) -> Result<Vec<Tensor>> {
        let (carried, scanned) = self.iterate(operands, cx)?;
        let mut results = carried;
        for (k, all) in scanned.iter().enumerate() {
            results.push(match all.first() {
                Some(_) => stack(all)?,
                None => self.empty(k, operands, cx)?,
            });
        }
        Ok(results)
    }

    /// A scanned value of no iterations has the element type and the sizes that the body says, as far as it does.
    fn empty(&self, k: usize, operands: &[Option<TensorView>], cx: &Cx) -> Result<Tensor> {
        let facts: Vec<Option<Fact>> = operands.iter().map(|v| v.map(|v| Fact::new(v.dtype, v.dims))).collect();
        let facts: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
        let facts = self.symbolic(&facts, cx)?;
        let fact = &facts[self.carried + k];
        let dims: Vec<usize> = fact.shape.iter().flatten().map(|d| d.known().unwrap_or(0)).collect();
        Tensor::zeros(fact.dtype, if dims.is_empty() { &[0] } else { &dims })
    }
}

/// The tensors along a new first axis.
pub(super) fn stack(all: &[Tensor]) -> Result<Tensor> {
    let first = all.first().ok_or_else(|| Error::internal("nothing to stack"))?;
    let dims: Vec<usize> = std::iter::once(all.len()).chain(first.dims().iter().copied()).collect();
    if first.strings().is_some() {
        return Tensor::from_strings(&dims, all.iter().filter_map(Tensor::strings).flatten().cloned().collect());
    }
    let mut stacked = Tensor::zeros(first.dtype(), &dims)?;
    let size = first.bytes().len();
    if size > 0 {
        for (to, from) in stacked.bytes_mut().chunks_exact_mut(size).zip(all) {
            to.copy_from_slice(from.bytes());
        }
    }
    Ok(stacked)
}

impl Same for Loop {
    /// Graphs are not compared.
    fn same(&self, _: &dyn Operator) -> bool {
        false
    }
}

impl Operator for Loop {
    fn name(&self) -> &'static str {
        "Loop"
    }

    fn bodies(&self) -> Vec<&Graph> {
        vec![&self.body]
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let constants: Option<Vec<Option<&Arc<Tensor>>>> =
            cx.inputs.iter().map(|f| f.as_ref().map_or(Some(None), |f| f.tensor().map(Some))).collect();
        match constants {
            Some(constants) => {
                let views: Vec<_> = constants.iter().map(|t| t.map(|t| t.view())).collect();
                let results = self.results(&views, cx.cx)?;
                cx.results(results.into_iter().map(|t| Fact::constant(Arc::new(t))).collect())
            }
            None => cx.results(self.symbolic(cx.inputs, cx.cx)?),
        }
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let inputs = io.inputs;
        for (i, tensor) in self.results(inputs, cx)?.iter().enumerate().take(io.outputs.len()) {
            copy_view(&tensor.view(), io.output(i)?)?;
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shapes_by_running(&self) -> bool {
        true
    }
}
