//! Scan: a body over the slices of its operands.

use super::body::{PlannedBody, infer_outputs};
use super::identity::copy_view;
use super::{Attributes, Infer, Io, Op, Operator, Registration, Same};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, axis_index};
use crate::graph::Graph;
use crate::tensor::{Tensor, TensorView};
use smallvec::SmallVec;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Scan", 8, parse)];

/// `for i { state..., scanned... = body(state..., slice i of each scanned operand...) }`
///
/// Operands: state, scanned operands, captured values. Results: the last state, then the stacked scanned outputs.
/// In opset 8 the first operand is a list of lengths and every operand has a leading batch axis.
#[derive(Clone, Debug)]
pub struct Scan {
    /// Inputs: state, slices, captured. Outputs: state, scanned.
    pub body: Graph,
    states: usize,
    scans: usize,
    input_axes: Vec<i64>,
    input_reversed: Vec<bool>,
    output_axes: Vec<i64>,
    output_reversed: Vec<bool>,
    /// The form of opset 8.
    batched: bool,
}

fn flags(a: &mut Attributes, name: &str, count: usize) -> Result<Vec<bool>> {
    let list = a.ints(name)?.unwrap_or_else(|| vec![0; count]);
    if list.len() != count || list.iter().any(|v| !matches!(v, 0 | 1)) {
        return Err(Error::invalid_model(format!("attribute {name} is {list:?}; {count} of 0 or 1 were wanted")));
    }
    Ok(list.into_iter().map(|v| v == 1).collect())
}

fn axes(a: &mut Attributes, name: &str, count: usize) -> Result<Vec<i64>> {
    let list = a.ints(name)?.unwrap_or_else(|| vec![0; count]);
    if list.len() != count {
        return Err(Error::invalid_model(format!("attribute {name} has {} numbers; {count} were wanted", list.len())));
    }
    Ok(list)
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let batched = a.opset() < 9;
    let body = a.graph("body")?;
    let scans = usize::try_from(a.required("num_scan_inputs", Attributes::int)?).unwrap_or(0);
    let operands = a.input_count() - usize::from(batched && a.input_count() > 0);
    let states = operands.checked_sub(scans).filter(|_| scans > 0);
    let states = states
        .ok_or_else(|| Error::invalid_model(format!("num_scan_inputs is {scans}, the node has {operands} operands")))?;
    let outputs = body.outputs.len().checked_sub(states).filter(|_| body.inputs.len() >= states + scans);
    let outputs = outputs.ok_or_else(|| Error::invalid_model("the body does not fit the operands"))?;
    let (input_reversed, output_reversed, input_axes, output_axes) = if batched {
        (flags(a, "directions", scans)?, vec![false; outputs], vec![0; scans], vec![0; outputs])
    } else {
        (
            flags(a, "scan_input_directions", scans)?,
            flags(a, "scan_output_directions", outputs)?,
            axes(a, "scan_input_axes", scans)?,
            axes(a, "scan_output_axes", outputs)?,
        )
    };
    Ok(Scan { body, states, scans, input_axes, input_reversed, output_axes, output_reversed, batched }.into())
}

/// Moves elements between a tensor and its slice `i` along an axis.
fn each_row(dims: &[usize], axis: usize, i: usize, element: usize, mut f: impl FnMut(usize, usize, usize)) {
    let inner: usize = dims[axis + 1..].iter().product::<usize>() * element;
    let outer: usize = dims[..axis].iter().product();
    for o in 0..outer {
        f((o * dims[axis] + i) * inner, o * inner, inner);
    }
}

fn slice(x: &TensorView, axis: usize, i: usize) -> Result<Tensor> {
    let dims: SmallVec<[usize; 6]> = x.dims.iter().enumerate().filter(|(a, _)| *a != axis).map(|(_, d)| *d).collect();
    let mut y = Tensor::zeros(x.dtype, &dims)?;
    let (from, to) = (x.bytes(), y.bytes_mut());
    each_row(x.dims, axis, i, x.dtype.bits() / 8, |a, b, n| to[b..b + n].copy_from_slice(&from[a..a + n]));
    Ok(y)
}

impl Scan {
    fn check_dtype(fact: &Fact) -> Result<()> {
        match fact.dtype.bits() {
            bits if bits >= 8 => Ok(()),
            _ => Err(Error::unsupported_dtype(format!("{} values cannot be scanned", fact.dtype))),
        }
    }

    /// Facts of the body's outputs, and the number of slices.
    fn body_facts(&self, inputs: &[Option<&Fact>], cx: &Cx) -> Result<(Vec<Fact>, Dim)> {
        let fact = |i: usize| {
            let fact = inputs.get(i).copied().flatten();
            fact.ok_or_else(|| Error::invalid_model(format!("operand {i} is missing")))
        };
        let mut length = Dim::Unknown;
        let mut facts = Vec::with_capacity(inputs.len());
        for i in 0..self.states {
            facts.push(Fact { content: Default::default(), ..fact(i)?.clone() });
        }
        for k in 0..self.scans {
            let x = fact(self.states + k)?;
            Scan::check_dtype(x)?;
            let shape = x.shape.as_ref().ok_or_else(|| Error::shape("the rank of a scanned operand is not known"))?;
            let axis = axis_index(self.input_axes[k], shape.len())?;
            match (&length, &shape[axis]) {
                (Dim::Known(a), Dim::Known(b)) if a != b => {
                    return Err(Error::shape(format!(
                        "scanned operands have {a} and {b} slices; all must have as many"
                    )));
                }
                (Dim::Known(_), _) => {}
                (_, other) => length = other.clone(),
            }
            let rest: Shape = shape.iter().enumerate().filter(|(a, _)| *a != axis).map(|(_, d)| d.clone()).collect();
            facts.push(Fact::with_shape(x.dtype, rest));
        }
        facts.extend(inputs.iter().skip(self.states + self.scans).flatten().map(|f| Fact::clone(f)));
        Ok((infer_outputs(&self.body, &facts, cx)?, length))
    }
}

impl Same for Scan {
    /// Graphs are not compared.
    fn same(&self, _: &dyn Operator) -> bool {
        false
    }
}

impl Operator for Scan {
    fn name(&self) -> &'static str {
        "Scan"
    }

    fn bodies(&self) -> Vec<&Graph> {
        vec![&self.body]
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        if self.batched {
            return Err(Error::unsupported_attribute(
                "the form of opset 8, with a batch axis, is not supported; opset 9 is",
            ));
        }
        let (outputs, length) = self.body_facts(cx.inputs, cx.cx)?;
        let mut results = Vec::with_capacity(outputs.len());
        for (k, fact) in outputs.into_iter().enumerate() {
            let fact = Fact { content: Default::default(), ..fact };
            if k < self.states {
                results.push(cx.input(k)?.shape.clone().map_or(fact.clone(), |s| Fact::with_shape(fact.dtype, s)));
                continue;
            }
            Scan::check_dtype(&fact)?;
            results.push(match fact.shape {
                Some(mut s) => {
                    let axis = axis_index(self.output_axes[k - self.states], s.len() + 1)?;
                    s.insert(axis, length.clone());
                    Fact::with_shape(fact.dtype, s)
                }
                None => Fact::of_dtype(fact.dtype),
            });
        }
        cx.results(results)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let inputs = io.inputs;
        let first = io.input(self.states)?;
        let length = first.dims[axis_index(self.input_axes[0], first.rank())?];
        let mut states: Vec<Tensor> = (0..self.states).map(|i| io.input(i)?.to_tensor()).collect::<Result<_>>()?;
        let mut planned: Option<PlannedBody> = None;
        for i in 0..length {
            let mut slices = Vec::with_capacity(self.scans);
            for k in 0..self.scans {
                let x = io.input(self.states + k)?;
                let at = if self.input_reversed[k] { length - 1 - i } else { i };
                slices.push(slice(&x, axis_index(self.input_axes[k], x.rank())?, at)?);
            }
            let mut views: Vec<TensorView> = states.iter().chain(&slices).map(Tensor::view).collect();
            views.extend(inputs.iter().skip(self.states + self.scans).flatten());
            if planned.is_none() {
                let facts: Vec<Fact> = views.iter().map(|v| Fact::new(v.dtype, v.dims)).collect();
                planned = Some(PlannedBody::new(&self.body, &facts, &Default::default(), cx)?);
            }
            let body = planned.as_ref().ok_or_else(|| Error::internal("the body has no plan"))?;
            let mut next = Vec::with_capacity(self.states);
            body.run(views.iter().copied(), cx, |k, view| {
                if k < self.states {
                    next.push(view.to_tensor()?);
                    return Ok(());
                }
                let Some(y) = io.outputs.get_mut(k) else { return Ok(()) };
                let axis = axis_index(self.output_axes[k - self.states], y.dims.len())?;
                let at = if self.output_reversed[k - self.states] { length - 1 - i } else { i };
                let (dims, element) = (y.dims, y.dtype.bits() / 8);
                if y.len() != view.len() * length {
                    return Err(Error::shape("a scanned output changes its shape from one slice to the next"));
                }
                let (from, to) = (view.bytes(), y.bytes());
                each_row(dims, axis, at, element, |a, b, n| to[a..a + n].copy_from_slice(&from[b..b + n]));
                Ok(())
            })?;
            states = next;
        }
        for (i, state) in states.iter().enumerate().take(io.outputs.len()) {
            copy_view(&state.view(), io.output(i)?)?;
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }
}
