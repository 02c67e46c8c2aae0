//! QLinearSoftmax of onnxruntime: a distribution along an axis, of quantised numbers.

use super::qparams::{Count, bounds, bytes, check_byte, infer_scale, infer_zero, scale, zero};
use super::reduce::around;
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Fact, axis_index};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("QLinearSoftmax", parse)];

/// Operands: X, its scale and zero point, scale and zero point of the result.
#[derive(Clone, Debug)]
pub struct QLinearSoftmax {
    /// The axis.
    pub axis: i64,
    /// The form of ONNX's opset 12 and below: the axis and all behind it count as one.
    pub flatten: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let flatten = a.required("opset", Attributes::int)? < 13;
    Ok(QLinearSoftmax { axis: a.int_or("axis", if flatten { 1 } else { -1 })?, flatten }.into())
}

impl Operator for QLinearSoftmax {
    fn name(&self) -> &'static str {
        "com.microsoft.QLinearSoftmax"
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

    fn run(&self, _cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let x_scale = scale(io.input(1)?, "X_scale")?;
        let (y_scale, y_zero) = (scale(io.input(3)?, "y_scale")?, zero(io.optional(4), "y_zero_point")?);
        let axis = axis_index(self.axis, x.rank())?;
        let [outer, n, inner] = match self.flatten {
            true => [x.dims[..axis].iter().product(), x.dims[axis..].iter().product(), 1],
            false => around(x.dims, axis),
        };
        let [lo, hi] = bounds(x.dtype);
        // exp of what lies so many steps below the largest; onnxruntime counts steps of the result per unit in whole ones.
        let exp: [f32; 256] = std::array::from_fn(|i| (-(i as f64) * f64::from(x_scale)).exp() as f32);
        let steps = (1.0 / y_scale).floor();
        let q = bytes(x)?;
        let y = io.output(0)?.bytes();
        for row in 0..if n == 0 { 0 } else { outer * inner } {
            let at = |i: usize| (row / inner * n + i) * inner + row % inner;
            let values = || (0..n).map(|i| q.get(at(i)));
            let Some(max) = values().max() else { return Err(Error::internal("a row without elements")) };
            let sum: f32 = values().map(|v| exp[(max - v) as usize]).sum();
            for (i, v) in values().enumerate() {
                let share = exp[(max - v) as usize] * steps / sum;
                y[at(i)] = (share.round_ties_even() as i32).saturating_add(y_zero).clamp(lo, hi) as u8;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use super::*;
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
