//! If: one of two bodies.

use super::body::{PlannedBody, either, infer_outputs, run_once};
use super::identity::copy_view;
use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, Same};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::graph::Graph;
use crate::tensor::{DType, TensorView};
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("If", 1, parse)];

/// `then()` if operand 0 is true, `otherwise()` if not.
///
/// Operands after the first are the outer values that the bodies read; they are the inputs of both bodies.
#[derive(Clone, Debug)]
pub struct If {
    /// Runs on true.
    pub then: Graph,
    /// Runs on false.
    pub otherwise: Graph,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let (then, otherwise) = (a.graph("then_branch")?, a.graph("else_branch")?);
    if then.outputs.len() != otherwise.outputs.len() {
        return Err(Error::invalid_model(format!(
            "then_branch has {} outputs, else_branch {}",
            then.outputs.len(),
            otherwise.outputs.len()
        )));
    }
    Ok(If { then, otherwise }.into())
}

fn truth(view: &TensorView) -> Result<bool> {
    match view.bytes() {
        [b] if view.dtype == DType::Bool => Ok(*b != 0),
        _ => Err(Error::shape(format!("the condition is {} {:?}; one truth value was wanted", view.dtype, view.dims))),
    }
}

impl If {
    /// The body for a condition.
    pub fn body(&self, condition: bool) -> &Graph {
        if condition { &self.then } else { &self.otherwise }
    }
}

impl Same for If {
    /// Graphs are not compared.
    fn same(&self, _: &dyn Operator) -> bool {
        false
    }
}

impl Operator for If {
    fn name(&self) -> &'static str {
        "If"
    }

    fn bodies(&self) -> Vec<&Graph> {
        vec![&self.then, &self.otherwise]
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let condition = cx.input(0)?;
        if condition.dtype != DType::Bool {
            return Err(Error::dtype(format!("the condition is {}; bool was wanted", condition.dtype)));
        }
        let captures: Option<Vec<Fact>> = cx.inputs[1..].iter().map(|f| f.cloned()).collect();
        let captures = captures.ok_or_else(|| Error::internal("a captured value is missing"))?;
        match condition.tensor() {
            Some(t) => {
                let body = self.body(truth(&t.view())?);
                let facts = infer_outputs(body, &captures, cx.cx)?;
                let constants: Option<Vec<_>> = captures.iter().map(|f| f.tensor().map(|t| t.view())).collect();
                match constants {
                    // Shapes that only the elements show.
                    Some(constants) if facts.iter().any(|f| f.dims().is_none()) => {
                        let tensors = run_once(body, &constants, cx.cx)?;
                        cx.results(tensors.into_iter().map(|t| Fact::constant(Arc::new(t))).collect())
                    }
                    _ => cx.results(facts),
                }
            }
            None => {
                let then = infer_outputs(&self.then, &captures, cx.cx);
                let otherwise = infer_outputs(&self.otherwise, &captures, cx.cx);
                cx.results(match (then, otherwise) {
                    (Ok(a), Ok(b)) => a.iter().zip(&b).map(|(a, b)| either(a, b)).collect::<Result<_>>()?,
                    // A body that does not fit these shapes is one that the condition keeps from running.
                    (Ok(a), Err(_)) | (Err(_), Ok(a)) => a.iter().map(|f| Fact::of_dtype(f.dtype)).collect(),
                    (Err(e), Err(_)) => return Err(e),
                })
            }
        }
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let body = self.body(truth(&io.input(0)?)?);
        let captures: Vec<TensorView> = (1..io.inputs.len()).map(|i| io.input(i)).collect::<Result<_>>()?;
        for (i, tensor) in run_once(body, &captures, cx)?.iter().enumerate().take(io.outputs.len()) {
            copy_view(&tensor.view(), io.output(i)?)?;
        }
        Ok(())
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let captures: Option<Vec<Fact>> = cx.inputs[1..].iter().map(|f| f.cloned()).collect();
        let captures = captures.ok_or_else(|| Error::internal("a captured value is missing"))?;
        let plan = |body| PlannedBody::new(body, &captures, cx.cache, cx.cx).map(Some);
        let fixed = cx.constant(0).map(|t| truth(&t.view())).transpose()?;
        Ok(Some(Arc::new(Prepared {
            then: if fixed == Some(false) { None } else { plan(&self.then)? },
            otherwise: if fixed == Some(true) { None } else { plan(&self.otherwise)? },
        })))
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0]
    }
}

#[derive(Debug)]
struct Prepared {
    then: Option<PlannedBody>,
    otherwise: Option<PlannedBody>,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let body = if truth(&io.input(0)?)? { &self.then } else { &self.otherwise };
        let body = body.as_ref().ok_or_else(|| Error::internal("the condition was constant and is another now"))?;
        let inputs = io.inputs;
        let captures = inputs[1..].iter().copied().flatten();
        body.run(captures, cx, |i, view| match io.outputs.get_mut(i) {
            Some(output) => copy_view(&view, output),
            None => Ok(()),
        })
    }

    fn kernel(&self) -> &str {
        "body"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimize::testing::{Net, with_cx};
    use crate::tensor::Tensor;

    /// A number that is known, as many of them as said, and what an operator makes of the operand.
    fn body(count: usize, op: &str) -> Graph {
        let mut n = Net::new(17);
        let x = n.input("x", &[4]);
        let (known, y) = (n.constant(&[count], &vec![count as f32; count]), n.op(op, &[x]));
        n.output(known);
        n.output(y);
        n.graph
    }

    #[test]
    fn results_that_the_condition_makes_known() {
        // Shapes that differ put the condition into the plan; those of NonZero are found when it runs.
        for (op, dtype) in [("Neg", DType::F32), ("NonZero", DType::I64)] {
            let mut n = Net::new(17);
            let (condition, x) = (n.input_of("c", Fact::new(DType::Bool, &[])), n.input("x", &[4]));
            let outputs = vec![n.graph.add_value("known"), n.graph.add_value("y")];
            let op = If { then: body(2, op), otherwise: body(3, op) }.into();
            let inputs = vec![Some(condition), Some(x)];
            n.graph.nodes.push(crate::graph::Node { name: "if".into(), op, inputs, outputs: outputs.clone() });
            outputs.into_iter().for_each(|id| n.output(id));
            let x = Tensor::from_slice(&[4], &[0f32, 1.0, 0.0, 2.0]).unwrap();
            for (condition, count) in [(true, 2), (false, 3)] {
                let condition = Tensor::from_bools(&[], &[condition]).unwrap();
                let y = with_cx(|cx| run_once(&n.graph, &[condition.view(), x.view()], cx)).unwrap();
                assert_eq!(y[0].as_slice::<f32>().unwrap(), vec![count as f32; count]);
                assert_eq!(y[1].dtype(), dtype);
                match dtype {
                    DType::F32 => assert_eq!(y[1].as_slice::<f32>().unwrap(), [0.0, -1.0, 0.0, -2.0]),
                    _ => assert_eq!(y[1].as_slice::<i64>().unwrap(), [1, 3]),
                }
            }
        }
    }
}
