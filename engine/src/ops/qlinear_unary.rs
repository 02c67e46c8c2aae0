//! QLinearSigmoid and QLinearLeakyRelu of onnxruntime: functions of quantised numbers, as tables of 256 results.

use super::qparams::{Count, check_byte, infer_scale, infer_zero, look_up, scale, table, zero};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::Result;
use crate::fact::Fact;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::microsoft("QLinearSigmoid", |_| Ok(QLinearUnary { function: Activation::Sigmoid }.into())),
    Registration::microsoft("QLinearLeakyRelu", parse_leaky),
];

/// Operands: X, its scale and zero point, scale and zero point of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearUnary {
    /// Which function.
    pub function: Activation,
}

fn parse_leaky(a: &mut Attributes) -> Result<Op> {
    Ok(QLinearUnary { function: Activation::LeakyRelu { alpha: a.float_or("alpha", 0.01)? } }.into())
}

impl Operator for QLinearUnary {
    fn name(&self) -> &'static str {
        match self.function {
            Activation::Sigmoid => "com.microsoft.QLinearSigmoid",
            _ => "com.microsoft.QLinearLeakyRelu",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_byte("X", x.dtype)?;
        infer_scale(cx, 1, "X_scale", Count::One)?;
        infer_zero(cx, 2, "X_zero_point", x.dtype, Count::One)?;
        infer_scale(cx, 3, "Y_scale", Count::One)?;
        infer_zero(cx, 4, "Y_zero_point", x.dtype, Count::One)?;
        cx.results(vec![Fact { content: Default::default(), ..x.clone() }])
    }

    fn run(&self, _cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let of_x = (scale(io.input(1)?, "X_scale")?, zero(io.optional(2), "X_zero_point")?);
        let of_y = (scale(io.input(3)?, "Y_scale")?, zero(io.optional(4), "Y_zero_point")?);
        let table = table(x.dtype, of_x, of_y, |v| self.function.apply_scalar(v));
        look_up(&table, x.bytes(), io.output(0)?.bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn values_by_hand() {
        let x = Tensor::from_slice(&[3], &[-128i8, 0, 127]).unwrap();
        let zero = |v: i8| Some(Tensor::from_slice(&[], &[v]).unwrap());
        let one = |v: f32| Some(f32s(&[1], &[v]));
        let run = |node: OneNode, y: f32| {
            let operands = [Some(x.clone()), one(0.5), zero(1), one(y), zero(-128)];
            node.domain("com.microsoft").run_optional(&operands).unwrap()[0].as_slice::<i8>().unwrap().to_vec()
        };
        // sigmoid of -64.5, -0.5, 63 in steps of 1 / 256 from -128 on.
        assert_eq!(run(OneNode::new("QLinearSigmoid"), 1.0 / 256.0), [-128, -31, 127]);
        // -64.5 / 2, -0.25, 63 in steps of 0.5.
        assert_eq!(run(OneNode::new("QLinearLeakyRelu").float("alpha", 0.5), 0.5), [-128, -128, -2]);
    }

    #[test]
    fn mistakes_are_named() {
        let x = Tensor::from_slice(&[1], &[1u8]).unwrap();
        let run = |scale: f32| {
            let one = Some(f32s(&[], &[1.0]));
            OneNode::new("QLinearSigmoid").domain("com.microsoft").run_optional(&[
                Some(x.clone()),
                one.clone(),
                None,
                Some(f32s(&[], &[scale])),
                None,
            ])
        };
        assert!(run(0.25).is_ok());
        assert!(run(-0.25).unwrap_err().message.contains("Y_scale"));
        let e = OneNode::new("QLinearSigmoid").domain("com.microsoft").run(&[f32s(&[1], &[1.0])]).unwrap_err();
        assert!(e.message.contains("uint8 and int8"), "{e}");
    }
}
