//! Softmax, LogSoftmax and Hardmax.

use super::reduce::around;
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::Result;
use crate::fact::{Fact, axis_index};
use crate::for_dtype;
use crate::tensor::{DType, Element};
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;
use weblane_kernels::reduce::arg_extreme;
use weblane_kernels::softmax::{softmax, softmax_any};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("Softmax", 1, parse),
    Registration::onnx("LogSoftmax", 1, parse),
    Registration::onnx("Hardmax", 1, parse),
];

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `exp(x) / sum exp(x)`.
    Softmax,
    /// Its logarithm.
    Log,
    /// 1 for the first of the largest, 0 elsewhere.
    Hard,
}

/// A distribution along an axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Softmax {
    /// Which function.
    pub kind: Kind,
    /// The axis.
    pub axis: i64,
    /// Opset 12 and below: the axis and all behind it count as one.
    pub flatten: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let flatten = a.opset() < 13;
    let kind = match a.op_type() {
        "Softmax" => Kind::Softmax,
        "LogSoftmax" => Kind::Log,
        _ => Kind::Hard,
    };
    Ok(Softmax { kind, axis: a.int_or("axis", if flatten { 1 } else { -1 })?, flatten }.into())
}

impl Softmax {
    fn sizes(&self, dims: &[usize]) -> Result<[usize; 3]> {
        if dims.is_empty() {
            // A scalar is a distribution over one element.
            return Ok([1, 1, 1]);
        }
        if self.flatten {
            // The axis may be the rank: then every element stands alone in its row.
            let axis = if self.axis == dims.len() as i64 { dims.len() } else { axis_index(self.axis, dims.len())? };
            return Ok([dims[..axis].iter().product(), dims[axis..].iter().product(), 1]);
        }
        Ok(around(dims, axis_index(self.axis, dims.len())?))
    }
}

fn hardmax<T: Element + Number>(x: &[T], sizes: [usize; 3], y: &mut [T]) -> Result<()> {
    let [outer, n, inner] = sizes;
    if y.is_empty() {
        return Ok(());
    }
    let mut best = vec![0; outer * inner];
    arg_extreme(x, sizes, false, false, &mut best)?;
    y.fill(T::ZERO);
    for (i, b) in best.into_iter().enumerate() {
        y[(i / inner * n + b as usize) * inner + i % inner] = T::ONE;
    }
    Ok(())
}

impl Operator for Softmax {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Softmax => "Softmax",
            Kind::Log => "LogSoftmax",
            Kind::Hard => "Hardmax",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        if let Some(rank) = x.rank().filter(|&r| r > 0 && !(self.flatten && self.axis == r as i64)) {
            axis_index(self.axis, rank)?;
        }
        cx.results(vec![Fact { content: Default::default(), ..x.clone() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.optional(0);
        let y = io.output(0)?;
        let sizes = self.sizes(y.dims)?;
        let log = self.kind == Kind::Log;
        match (x, y.dtype) {
            (x, DType::F32) if self.kind != Kind::Hard => {
                let x = x.map(|x| x.as_slice::<f32>()).transpose()?;
                Ok(softmax(cx, x, sizes, log, y.as_slice::<f32>()?)?)
            }
            (x, dtype) => for_dtype!(dtype, [F32, F64], T => {
                let held: Vec<T>;
                let to = y.as_slice::<T>()?;
                let from = match x {
                    Some(x) => x.as_slice::<T>()?,
                    None => {
                        held = to.to_vec();
                        &held
                    }
                };
                if self.kind == Kind::Hard {
                    return hardmax(from, sizes, to);
                }
                softmax_any(from, sizes, log, to);
                Ok(())
            }, else Err(wrong_dtype("the operand", dtype, "float32 and float64"))),
        }
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn the_axis_counts_alone_or_with_all_behind_it() {
        let x = f32s(&[1, 2, 2], &[0.0, 0.0, 3f32.ln(), 0.0]);
        let y = OneNode::new("Softmax").int("axis", 1).run(std::slice::from_ref(&x)).unwrap();
        let near = |y: &Tensor, want: [f32; 4]| {
            y.as_slice::<f32>().unwrap().iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{a} {b}"));
        };
        near(&y[0], [0.25, 0.5, 0.75, 0.5]);
        let old = OneNode::new("Softmax").opset(11).run(std::slice::from_ref(&x)).unwrap();
        near(&old[0], [1.0 / 6.0, 1.0 / 6.0, 0.5, 1.0 / 6.0]);
        let log = OneNode::new("LogSoftmax").opset(11).run(&[x]).unwrap();
        near(&log[0], [-(6f32.ln()), -(6f32.ln()), -(2f32.ln()), -(6f32.ln())]);
    }

    #[test]
    fn the_first_of_equal_maxima() {
        let y = OneNode::new("Hardmax").run(&[f32s(&[2, 3], &[1.0, 2.0, 2.0, 9.0, 1.0, 1.0])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn doubles_and_mistakes() {
        let y = OneNode::new("Softmax").run(&[Tensor::from_slice(&[2], &[0.0f64, 0.0]).unwrap()]).unwrap();
        assert_eq!(y[0].as_slice::<f64>().unwrap(), [0.5, 0.5]);
        assert!(OneNode::new("Softmax").int("axis", 2).run(&[f32s(&[1, 2], &[0.0; 2])]).is_err());
    }
}
