//! EyeLike.

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::for_dtype;
use crate::tensor::DType;
use half::{bf16, f16};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("EyeLike", 9, EyeLike::parse)];

/// A matrix of the operand's shape with ones on a diagonal.
#[derive(Clone, Debug, PartialEq)]
pub struct EyeLike {
    /// Element type; the operand's where the node does not say.
    pub dtype: Option<DType>,
    /// Which diagonal: positive ones are above the main one.
    pub k: i64,
}

impl EyeLike {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(EyeLike { dtype: a.dtype("dtype")?, k: a.int_or("k", 0)? }.into())
    }
}

impl Operator for EyeLike {
    fn name(&self) -> &'static str {
        "EyeLike"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if x.rank().is_some_and(|r| r != 2) {
            return Err(Error::shape(format!("an operand of shape {}; a matrix was wanted", x.shape_text())));
        }
        let dtype = self.dtype.unwrap_or(x.dtype);
        if dtype == DType::String || dtype.bits() < 8 {
            return Err(wrong_dtype("the result", dtype, "numbers"));
        }
        cx.results(vec![Fact { dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let y = io.output(0)?;
        let [rows, cols] = *y.dims else { return Err(Error::internal("EyeLike of no matrix")) };
        y.bytes().fill(0);
        let places = (0..rows).filter_map(|r| {
            let c = usize::try_from((r as i64).checked_add(self.k)?).ok().filter(|&c| c < cols)?;
            Some(r * cols + c)
        });
        match y.dtype {
            DType::F16 => y.as_slice::<f16>().map(|y| places.for_each(|p| y[p] = f16::ONE)),
            DType::Bf16 => y.as_slice::<bf16>().map(|y| places.for_each(|p| y[p] = bf16::ONE)),
            dtype => for_dtype!(dtype.signless(), [F32, F64, I8, I16, I32, I64, Bool], T =>
                y.signless::<T>().map(|y| places.for_each(|p| y[p] = 1 as T)),
                else Err(wrong_dtype("the result", dtype, "numbers"))),
        }
    }

    fn takes_half(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn diagonals() {
        let x = || i64s(&[2, 3], &[7; 6]);
        assert_eq!(OneNode::new("EyeLike").run(&[x()]).unwrap()[0], i64s(&[2, 3], &[1, 0, 0, 0, 1, 0]));
        let y = OneNode::new("EyeLike").int("k", 2).int("dtype", 1).run(&[x()]).unwrap();
        assert_eq!(y[0], f32s(&[2, 3], &[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]));
        let y = OneNode::new("EyeLike").int("k", -1).run(&[x()]).unwrap();
        assert_eq!(y[0], i64s(&[2, 3], &[0, 0, 0, 1, 0, 0]));
        assert!(OneNode::new("EyeLike").run(&[i64s(&[3], &[0; 3])]).is_err());
    }
}
