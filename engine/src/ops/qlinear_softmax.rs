//! QLinearSoftmax of onnxruntime: a distribution along an axis, of quantised numbers.

use super::qparams::{Count, bytes, bytes_mut, check_byte, infer_scale, infer_zero, scale, zero};
use super::reduce::around;
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::Result;
use crate::fact::{Fact, axis_index};
use weblane_kernels::int8::softmax;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("QLinearSoftmax", parse)];

/// Operands: X, its scale and zero point, scale and zero point of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearSoftmax {
    /// The axis.
    pub axis: i64,
    /// The form of ONNX's opset 12 and below: the axis and all behind it count as one.
    pub flatten: bool,
    /// onnxruntime's operator counts steps of the result per unit in whole ones; Softmax between quantised tensors does not.
    pub whole_steps: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let flatten = a.required("opset", Attributes::int)? < 13;
    Ok(QLinearSoftmax { axis: a.int_or("axis", if flatten { 1 } else { -1 })?, flatten, whole_steps: true }.into())
}

impl Operator for QLinearSoftmax {
    fn name(&self) -> &'static str {
        if self.whole_steps { "com.microsoft.QLinearSoftmax" } else { "weblane.QuantizedSoftmax" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_byte("X", x.dtype)?;
        infer_scale(cx, 1, "X_scale", Count::One)?;
        infer_zero(cx, 2, "x_zero_point", x.dtype, Count::One)?;
        infer_scale(cx, 3, "y_scale", Count::One)?;
        infer_zero(cx, 4, "y_zero_point", x.dtype, Count::One)?;
        if let Some(rank) = x.rank() {
            axis_index(self.axis, rank)?;
        }
        cx.results(vec![Fact { content: Default::default(), ..x.clone() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let x_scale = scale(io.input(1)?, "X_scale")?;
        let (y_scale, y_zero) = (scale(io.input(3)?, "y_scale")?, zero(io.optional(4), "y_zero_point")?);
        let axis = axis_index(self.axis, x.rank())?;
        let sizes = match self.flatten {
            true => [x.dims[..axis].iter().product(), x.dims[axis..].iter().product(), 1],
            false => around(x.dims, axis),
        };
        let steps = if self.whole_steps { (1.0 / y_scale).floor() } else { 1.0 / y_scale };
        Ok(softmax(cx, bytes(x)?, x_scale, sizes, steps, y_zero, bytes_mut(io.output(0)?)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::error::Error;
    use crate::tensor::Tensor;

    #[test]
    fn shares_by_hand() {
        let run = |opset: i64, y_scale: f32| {
            let zero = |v: i8| Tensor::from_slice(&[], &[v]).unwrap();
            let x = Tensor::from_slice(&[1, 2, 2], &[-5i8, 7, -5, 7]).unwrap();
            let operands = [x, f32s(&[], &[1.0]), zero(0), f32s(&[], &[y_scale]), zero(-128)];
            let node = OneNode::new("QLinearSoftmax").domain("com.microsoft").int("opset", opset).int("axis", 1);
            Ok::<_, Error>(node.run(&operands)?[0].as_slice::<i8>()?.to_vec())
        };
        assert_eq!(run(13, 1.0 / 256.0).unwrap(), [0; 4]);
        assert_eq!(run(12, 1.0 / 256.0).unwrap(), [-128, 0, -128, 0]);
        assert!(run(13, f32::INFINITY).unwrap_err().message.contains("y_scale"));
    }
}
