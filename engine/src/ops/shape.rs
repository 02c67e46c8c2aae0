//! Shape and Size.

use super::sizes::{dim_product, sizes_fact};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::Result;
use crate::fact::{Dim, Fact};
use crate::tensor::DType;
use smallvec::smallvec;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("Shape", 1, Shape::parse), Registration::onnx("Size", 1, |_| Ok(Size.into()))];

/// The sizes of the operand along the axes `start..end`, as `int64`.
#[derive(Debug, PartialEq)]
pub struct Shape {
    /// First axis; negative ones count from the end, and what lies outside is cut off.
    pub start: i64,
    /// The axis behind the last one.
    pub end: Option<i64>,
}

impl Shape {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Shape { start: a.int_or("start", 0)?, end: a.int("end")? }.into())
    }

    /// The axes of an operand of this rank.
    fn range(&self, rank: usize) -> std::ops::Range<usize> {
        let signed = rank as i64;
        let clamp = |v: i64| (if v < 0 { v.saturating_add(signed) } else { v }).clamp(0, signed) as usize;
        let (start, end) = (clamp(self.start), self.end.map_or(rank, clamp));
        start..end.max(start)
    }
}

impl Operator for Shape {
    fn name(&self) -> &'static str {
        "Shape"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let fact = match &cx.input(0)?.shape {
            Some(shape) => sizes_fact(DType::I64, shape[self.range(shape.len())].iter().cloned().collect(), 1),
            None => Fact::of_rank(DType::I64, 1),
        };
        cx.results(vec![fact])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let dims = io.input(0)?.dims;
        for (y, &d) in io.output(0)?.as_slice::<i64>()?.iter_mut().zip(&dims[self.range(dims.len())]) {
            *y = d as i64;
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }
}

/// The number of elements of the operand, an `int64` scalar.
#[derive(Debug, PartialEq)]
pub struct Size;

impl Operator for Size {
    fn name(&self) -> &'static str {
        "Size"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let fact = match &cx.input(0)?.shape {
            Some(shape) => {
                let size = shape.iter().try_fold(Dim::Known(1), |n, d| dim_product(&n, d))?;
                sizes_fact(DType::I64, smallvec![size], 0)
            }
            None => Fact::new(DType::I64, &[]),
        };
        cx.results(vec![fact])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let n = io.input(0)?.len();
        io.output(0)?.as_slice::<i64>()?[0] = n as i64;
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::fact::Content;

    #[test]
    fn ranges_of_axes() {
        let x = || f32s(&[2, 3, 1], &[0.0; 6]);
        let cases: [(Option<i64>, Option<i64>, &[i64]); 6] = [
            (None, None, &[2, 3, 1]),
            (Some(1), None, &[3, 1]),
            (Some(-1), None, &[1]),
            (None, Some(-1), &[2, 3]),
            (Some(-9), Some(9), &[2, 3, 1]),
            (Some(2), Some(1), &[]),
        ];
        for (start, end, want) in cases {
            let mut node = OneNode::new("Shape");
            if let Some(s) = start {
                node = node.int("start", s);
            }
            if let Some(e) = end {
                node = node.int("end", e);
            }
            assert_eq!(node.run(&[x()]).unwrap()[0], i64s(&[want.len()], want));
        }
        assert_eq!(OneNode::new("Size").run(&[x()]).unwrap()[0], i64s(&[], &[6]));
    }

    #[test]
    fn names_flow() {
        let x = Fact::with_shape(DType::F32, smallvec![Dim::Symbol("n".into()), Dim::Known(4)]);
        let out = OneNode::new("Shape").infer(&[Some(x)]).unwrap();
        assert!(matches!(&out[0].content, Content::Dims(d) if d[1] == Dim::Known(4) && d[0] != Dim::Unknown));
    }
}
