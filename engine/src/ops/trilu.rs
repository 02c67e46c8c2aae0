//! Trilu: a triangle of each matrix.

use super::identity::copy;
use super::sizes::{element_size, kernel_error, strides};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::tensor::DType;
use weblane_kernels::movement::{Axis, copy_strided};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Trilu", 14, Trilu::parse)];

/// Keeps the elements on one side of a diagonal and sets the others to zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Trilu {
    /// Keeps what is on and above the diagonal, else what is on and below.
    pub upper: bool,
}

impl Trilu {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Trilu { upper: a.flag_or("upper", true)? }.into())
    }
}

impl Operator for Trilu {
    fn name(&self) -> &'static str {
        "Trilu"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        element_size(x.dtype)?;
        if x.rank().is_some_and(|r| r < 2) {
            return Err(Error::shape(format!("an operand of shape {}; rank 2 or more was wanted", x.shape_text())));
        }
        if let Some(k) = cx.optional(1)
            && (k.dtype != DType::I64 || k.dims().is_some_and(|d| d.iter().product::<usize>() != 1))
        {
            let (d, s) = (k.dtype, k.shape_text());
            return Err(Error::shape(format!("the diagonal is {d} of shape {s}; one int64 was wanted")));
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let k = io.optional(1).map_or(Ok(0), |k| Ok::<_, Error>(k.to_i64s()?.first().copied().unwrap_or(0)))?;
        if io.in_place.is_none() {
            copy(io)?;
        }
        let y = io.output(0)?;
        let element = element_size(y.dtype)?;
        let [.., rows, cols] = *y.dims else { return Ok(()) };
        let step = strides(y.dims)[..y.dims.len() - 2].last().copied().unwrap_or(rows * cols);
        let matrices = y.len().checked_div(rows * cols).unwrap_or(0);
        for r in 0..rows {
            // Column of the diagonal in this row.
            let diagonal = (r as i64).saturating_add(k);
            let edge = |v: i64| v.clamp(0, cols as i64) as usize;
            let (from, to) = if self.upper { (0, edge(diagonal)) } else { (edge(diagonal.saturating_add(1)), cols) };
            let axes =
                [Axis { len: matrices, src: 0, dst: step }, Axis { len: to.saturating_sub(from), src: 0, dst: 1 }];
            copy_strided(cx, element, &axes, &[0; 8][..element], 0, y.bytes(), r * cols + from)
                .map_err(kernel_error)?;
        }
        Ok(())
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn takes_half(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn both_sides() {
        let x = || i64s(&[2, 2, 3], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let run = |upper, k| OneNode::new("Trilu").int("upper", upper).run(&[x(), i64s(&[], &[k])]).unwrap().remove(0);
        assert_eq!(run(1, 0), i64s(&[2, 2, 3], &[1, 2, 3, 0, 5, 6, 7, 8, 9, 0, 11, 12]));
        assert_eq!(run(1, 2), i64s(&[2, 2, 3], &[0, 0, 3, 0, 0, 0, 0, 0, 9, 0, 0, 0]));
        assert_eq!(run(0, 0), i64s(&[2, 2, 3], &[1, 0, 0, 4, 5, 0, 7, 0, 0, 10, 11, 0]));
        assert_eq!(run(0, -9), i64s(&[2, 2, 3], &[0; 12]));
        assert_eq!(run(0, i64::MAX), x());
        assert_eq!(run(1, i64::MIN), x());
        assert!(OneNode::new("Trilu").run(&[f32s(&[2], &[1.0; 2])]).is_err());
    }
}
