//! BitCast.

use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::tensor::DType;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("BitCast", 26, BitCast::parse)];

/// The same bytes as another element type of the same size.
#[derive(Clone, Debug, PartialEq)]
pub struct BitCast {
    /// The type of the result.
    pub to: DType,
}

impl BitCast {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(BitCast { to: a.required("to", Attributes::dtype)? }.into())
    }
}

impl Operator for BitCast {
    fn name(&self) -> &'static str {
        "BitCast"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if x.dtype.bits() != self.to.bits() || x.dtype == DType::String {
            return Err(Error::dtype(format!("{} as {}; types of the same size were wanted", x.dtype, self.to)));
        }
        cx.results(vec![Fact { dtype: self.to, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let y = io.output(0)?;
        let is_bool = y.dtype == DType::Bool;
        y.bytes().copy_from_slice(x.bytes());
        if is_bool {
            // Truth values are 0 and 1 everywhere in the engine.
            y.bytes().iter_mut().for_each(|b| *b = u8::from(*b != 0));
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
    use crate::tensor::Tensor;

    #[test]
    fn bits_stay() {
        let y = OneNode::new("BitCast").opset(26).int("to", 6).run(&[f32s(&[1], &[1.0])]).unwrap();
        assert_eq!(y[0], Tensor::from_slice(&[1], &[0x3f80_0000i32]).unwrap());
        assert!(OneNode::new("BitCast").opset(26).int("to", 6).run(&[i64s(&[1], &[1])]).is_err());
    }
}
