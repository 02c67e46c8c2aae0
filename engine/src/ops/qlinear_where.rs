//! QLinearWhere of onnxruntime: one of two quantised tensors, element by element, brought to one scale and zero point.

use super::qparams::{Count, check_byte, infer_scale, infer_zero, look_up, scale, table, zero};
use super::sizes::{broadcast_strides, kernel_error};
use super::where_::Where;
use super::{Infer, Io, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::Fact;
use weblane_kernels::movement;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("QLinearWhere", |_| Ok(QLinearWhere.into()))];

/// Operands: the condition, then tensor, scale and zero point of either choice, then scale and zero point of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearWhere;

/// Of X, Y and the result: place and name of the scale, name of the zero point behind it.
const PARAMETERS: [(usize, &str, &str); 3] =
    [(2, "x_scale", "x_zero_point"), (5, "y_scale", "y_zero_point"), (7, "z_scale", "z_zero_point")];

impl Operator for QLinearWhere {
    fn name(&self) -> &'static str {
        "com.microsoft.QLinearWhere"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, y) = (cx.input(1)?, cx.input(4)?);
        check_byte("X", x.dtype)?;
        if y.dtype != x.dtype {
            return Err(Error::dtype(format!("X is {}, Y {}", x.dtype, y.dtype)));
        }
        for (i, scale, zero) in PARAMETERS {
            infer_scale(cx, i, scale, Count::One)?;
            infer_zero(cx, i + 1, zero, x.dtype, Count::One)?;
        }
        let inputs = [cx.inputs[0], cx.inputs[1], cx.inputs[4]];
        Where.infer(&Infer { inputs: &inputs, outputs: cx.outputs, cx: cx.cx })
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (c, x, y) = (io.input(0)?, io.input(1)?, io.input(4)?);
        let mut params = [(0.0, 0); 3];
        for ((i, scale_name, zero_name), to) in PARAMETERS.into_iter().zip(&mut params) {
            *to = (scale(io.input(i)?, scale_name)?, zero(io.optional(i + 1), zero_name)?);
        }
        let [of_x, of_y, of_z] = params;
        let z = io.output(0)?;
        let [cs, xs, ys] = [c, x, y].map(|v| broadcast_strides(v.dims, z.dims));
        let words = x.bytes().len().div_ceil(4) + y.bytes().len().div_ceil(4);
        cx.with_workspace(words, |space| {
            let (to_x, to_y) = bytemuck::cast_slice_mut::<f32, u8>(space).split_at_mut(x.bytes().len());
            look_up(&table(x.dtype, of_x, of_z, |v| v), x.bytes(), to_x);
            look_up(&table(y.dtype, of_y, of_z, |v| v), y.bytes(), to_y);
            let (x, y) = ((&to_x[..], &xs[..]), (&to_y[..], &ys[..]));
            movement::select(cx, 1, z.dims, (c.bytes(), &cs), x, y, z.bytes()).map_err(kernel_error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn choices_are_brought_to_one_scale() {
        let u8s = |dims: &[usize], v: &[u8]| Tensor::from_slice(dims, v).unwrap();
        let one = |v: f32| f32s(&[], &[v]);
        let operands = [
            Tensor::from_bools(&[2, 1], &[true, false]).unwrap(),
            u8s(&[3], &[0, 7, 255]),
            one(1.0),
            u8s(&[], &[100]),
            u8s(&[], &[3]),
            one(2.0),
            u8s(&[], &[1]),
            one(1.0),
            u8s(&[], &[100]),
        ];
        let node = || OneNode::new("QLinearWhere").domain("com.microsoft");
        assert_eq!(node().run(&operands).unwrap()[0], u8s(&[2, 3], &[0, 7, 255, 104, 104, 104]));
        let mut none = operands.clone();
        none[1] = u8s(&[0], &[]);
        assert_eq!(node().run(&none).unwrap()[0], u8s(&[2, 0], &[]));
        let mut wrong = operands.clone();
        wrong[7] = one(0.0);
        assert!(node().run(&wrong).unwrap_err().message.contains("z_scale"));
        wrong = operands;
        wrong[4] = Tensor::from_slice(&[], &[3i8]).unwrap();
        assert!(node().run(&wrong).unwrap_err().message.contains("X is uint8, Y int8"));
    }
}
