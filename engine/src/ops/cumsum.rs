//! CumSum and CumProd: running sums and products along an axis.

use super::reduce::around;
use super::sizes::{Ints, ints};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Fact, axis_index};
use crate::for_dtype;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("CumSum", 11, parse), Registration::onnx("CumProd", 26, parse)];

/// Operands: x and the axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Cumulate {
    /// Products instead of sums.
    pub product: bool,
    /// Whether an element does not count for its own place.
    pub exclusive: bool,
    /// Whether it goes from the last element to the first.
    pub reverse: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    Ok(Cumulate {
        product: a.op_type() == "CumProd",
        exclusive: a.flag_or("exclusive", false)?,
        reverse: a.flag_or("reverse", false)?,
    }
    .into())
}

impl Cumulate {
    fn compute<T: Number>(&self, x: &[T], [outer, n, inner]: [usize; 3], y: &mut [T]) {
        let start = if self.product { T::ONE } else { T::ZERO };
        for o in 0..outer {
            for j in 0..inner {
                let mut sum = start;
                for i in 0..n {
                    let i = if self.reverse { n - 1 - i } else { i };
                    let at = (o * n + i) * inner + j;
                    let next = if self.product { sum.times(x[at]) } else { sum.plus(x[at]) };
                    y[at] = if self.exclusive { sum } else { next };
                    sum = next;
                }
            }
        }
    }
}

impl Operator for Cumulate {
    fn name(&self) -> &'static str {
        if self.product { "CumProd" } else { "CumSum" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        cx.input(1)?;
        match (ints(cx.optional(1), "the axis")?, x.rank()) {
            (Ints::Known(axis), Some(rank)) => match axis.as_slice() {
                [axis] => axis_index(*axis, rank).map(|_| ())?,
                other => return Err(Error::shape(format!("the axis is {other:?}; one number was wanted"))),
            },
            (Ints::Computed(Some(n)), _) if n != 1 => {
                return Err(Error::shape(format!("the axis has {n} elements; one number was wanted")));
            }
            _ => {}
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Default::default() }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?.signless();
        let axis = io.input(1)?.to_i64s()?;
        let axis = axis.first().copied().ok_or_else(|| Error::shape("the axis has no element"))?;
        let sizes = around(x.dims, axis_index(axis, x.rank())?);
        for_dtype!(x.dtype, [F32, F64, I8, I16, I32, I64], T => {
            self.compute(x.as_slice::<T>()?, sizes, io.output(0)?.signless::<T>()?);
            Ok(())
        }, else Err(wrong_dtype("x", x.dtype, "numbers")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::tensor::Tensor;

    #[test]
    fn directions() {
        let x = || f32s(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let run =
            |node: OneNode, axis| node.run(&[x(), i64s(&[], &[axis])]).unwrap()[0].as_slice::<f32>().unwrap().to_vec();
        assert_eq!(run(OneNode::new("CumSum"), 1), [1.0, 3.0, 6.0, 4.0, 9.0, 15.0]);
        assert_eq!(run(OneNode::new("CumSum"), -2), [1.0, 2.0, 3.0, 5.0, 7.0, 9.0]);
        assert_eq!(
            run(OneNode::new("CumSum").int("exclusive", 1).int("reverse", 1), 1),
            [5.0, 3.0, 0.0, 11.0, 6.0, 0.0]
        );
        assert_eq!(run(OneNode::new("CumProd").opset(26), 1), [1.0, 2.0, 6.0, 4.0, 20.0, 120.0]);
        assert!(OneNode::new("CumSum").run(&[x(), i64s(&[], &[2])]).is_err());
        let bytes = Tensor::from_slice(&[3], &[200u8, 100, 1]).unwrap();
        let y = OneNode::new("CumSum").run(&[bytes, i64s(&[], &[0])]).unwrap();
        assert_eq!(y[0].as_slice::<u8>().unwrap(), [200, 44, 45]);
    }
}
