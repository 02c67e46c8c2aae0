//! ReverseSequence.

use super::identity::copy;
use super::sizes::{Axes, check_movable, copy_axes, strides};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact};
use crate::tensor::DType;
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("ReverseSequence", 10, ReverseSequence::parse)];

/// Reverses the first `sequence_lens[b]` steps of each sequence of a batch; the rest stays.
#[derive(Clone, Debug, PartialEq)]
pub struct ReverseSequence {
    /// The axis of the batch: 0 or 1, and the time axis is the other one.
    pub batch_axis: usize,
}

impl ReverseSequence {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let (batch, time) = (a.int_or("batch_axis", 1)?, a.int_or("time_axis", 0)?);
        match (batch, time) {
            (0, 1) => Ok(ReverseSequence { batch_axis: 0 }.into()),
            (1, 0) => Ok(ReverseSequence { batch_axis: 1 }.into()),
            _ => Err(Error::unsupported_attribute(format!(
                "batch_axis {batch} and time_axis {time}; 0 and 1 in either order were wanted"
            ))),
        }
    }
}

impl Operator for ReverseSequence {
    fn name(&self) -> &'static str {
        "ReverseSequence"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, lens) = (cx.input(0)?, cx.input(1)?);
        check_movable(x.dtype)?;
        if lens.dtype != DType::I64 {
            return Err(Error::dtype(format!("the lengths are {}; int64 was wanted", lens.dtype)));
        }
        if let (Some(s), Some(l)) = (&x.shape, &lens.shape) {
            let differ = |a: &Dim, b: &Dim| matches!((a, b), (Dim::Known(a), Dim::Known(b)) if a != b);
            if s.len() < 2 || l.len() != 1 || differ(&s[self.batch_axis], &l[0]) {
                let (x, l) = (x.shape_text(), lens.shape_text());
                return Err(Error::shape(format!("lengths of shape {l} for sequences of shape {x}")));
            }
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        copy(io)?;
        let (x, lens) = (io.input(0)?, io.input(1)?);
        let (batch, time) = (self.batch_axis, 1 - self.batch_axis);
        let step = strides(x.dims);
        let y = io.output(0)?;
        for (b, &len) in lens.as_slice::<i64>()?.iter().enumerate() {
            let limit = x.dims[time];
            let n = usize::try_from(len).ok().filter(|&n| n <= limit);
            let n = n.ok_or_else(|| Error::invalid_input(format!("a length of {len}; 0 to {limit} was wanted")))?;
            if n == 0 {
                continue;
            }
            let mut axes: Axes =
                (2..x.rank()).map(|a| Axis { len: x.dims[a], src: step[a] as isize, dst: step[a] }).collect();
            axes.insert(0, Axis { len: n, src: -(step[time] as isize), dst: step[time] });
            let base = b * step[batch];
            copy_axes(cx, &axes, x, base + (n - 1) * step[time], y, base)?;
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn the_examples_of_the_specification() {
        let x = f32s(&[4, 4], &[0., 4., 8., 12., 1., 5., 9., 13., 2., 6., 10., 14., 3., 7., 11., 15.]);
        let y = OneNode::new("ReverseSequence").run(&[x.clone(), i64s(&[4], &[4, 3, 2, 1])]).unwrap();
        let want = [3., 6., 9., 12., 2., 5., 8., 13., 1., 4., 10., 14., 0., 7., 11., 15.];
        assert_eq!(y[0], f32s(&[4, 4], &want));
        let node = || OneNode::new("ReverseSequence").int("time_axis", 1).int("batch_axis", 0);
        let x = f32s(&[2, 3], &[0., 1., 2., 3., 4., 5.]);
        let y = node().run(&[x.clone(), i64s(&[2], &[0, 3])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 3], &[0., 1., 2., 5., 4., 3.]));
        assert!(node().run(&[x.clone(), i64s(&[2], &[0, 4])]).is_err());
        assert!(node().run(&[x, i64s(&[3], &[0, 1, 2])]).is_err());
    }
}
