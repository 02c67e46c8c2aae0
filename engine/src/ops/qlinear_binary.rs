//! QLinearAdd and QLinearMul of onnxruntime: sums and products of quantised tensors, with NumPy's broadcasting.

use super::qparams::{Count, bounds, check_byte, infer_scale, infer_zero, scale, zero};
use super::{Infer, Io, Operator, Registration, quantized_binary};
use crate::error::{Error, Result};
use crate::fact::{Fact, broadcast};
use weblane_kernels::int8::{Binary, Function};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::microsoft("QLinearAdd", |_| Ok(QLinearBinary { multiply: false }.into())),
    Registration::microsoft("QLinearMul", |_| Ok(QLinearBinary { multiply: true }.into())),
];

/// Operands: A, its scale and zero point, B, its scale and zero point, scale and zero point of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearBinary {
    /// Whether it is the product.
    pub multiply: bool,
}

impl QLinearBinary {
    /// What the kernels compute for scales and zero points of A, B and C, and the bounds of C's type. The zero point is added
    /// before rounding, as onnxruntime does.
    pub fn binary(&self, [a, b, c]: [f32; 3], zeros: [i32; 3], [lo, hi]: [i32; 2]) -> Binary {
        let function = match self.multiply {
            true => Function::Mul { scale: a * b / c },
            false => Function::Add { first: a / c, second: b / c },
        };
        Binary { function, zeros: [zeros[0], zeros[1]], offset: zeros[2] as f32, zero: 0, lo, hi }
    }
}

impl Operator for QLinearBinary {
    fn name(&self) -> &'static str {
        if self.multiply { "com.microsoft.QLinearMul" } else { "com.microsoft.QLinearAdd" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(3)?);
        check_byte("A", a.dtype)?;
        if a.dtype != b.dtype {
            return Err(Error::dtype(format!("A is {}, B is {}", a.dtype, b.dtype)));
        }
        for (i, name) in [(1, "A"), (4, "B"), (6, "C")] {
            infer_scale(cx, i, &format!("{name}_scale"), Count::One)?;
            infer_zero(cx, i + 1, &format!("{name}_zero_point"), a.dtype, Count::One)?;
        }
        cx.results(vec![match (&a.shape, &b.shape) {
            (Some(sa), Some(sb)) => Fact::with_shape(a.dtype, broadcast(sa, sb)?),
            _ => Fact::of_dtype(a.dtype),
        }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(3)?);
        let [sa, sb, sc] =
            [scale(io.input(1)?, "A_scale")?, scale(io.input(4)?, "B_scale")?, scale(io.input(6)?, "C_scale")?];
        let zeros = [
            zero(io.optional(2), "A_zero_point")?,
            zero(io.optional(5), "B_zero_point")?,
            zero(io.optional(7), "C_zero_point")?,
        ];
        let y = io.output(0)?;
        let binary = self.binary([sa, sb, sc], zeros, bounds(y.dtype));
        quantized_binary::run(cx, &binary, a, b, y)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use super::*;
    use crate::tensor::Tensor;

    fn u8s(dims: &[usize], v: &[u8]) -> Tensor {
        Tensor::from_slice(dims, v).unwrap()
    }

    fn operands(scales: [f32; 3]) -> Vec<Tensor> {
        let one = |v: f32| f32s(&[], &[v]);
        vec![
            u8s(&[2, 2], &[0, 10, 20, 255]),
            one(scales[0]),
            u8s(&[], &[10]),
            u8s(&[2], &[1, 3]),
            one(scales[1]),
            u8s(&[], &[1]),
            one(scales[2]),
            u8s(&[], &[5]),
        ]
    }

    fn run(name: &'static str, operands: &[Tensor]) -> Result<Vec<Tensor>> {
        OneNode::new(name).domain("com.microsoft").run(operands)
    }

    #[test]
    fn values_by_hand() {
        let y = run("QLinearAdd", &operands([1.0, 0.5, 2.0])).unwrap();
        // [[-10, 0], [10, 245]] / 2 + [0, 2] / 4 + 5: halves go to even after the zero point.
        assert_eq!(y[0].as_slice::<u8>().unwrap(), [0, 6, 10, 128]);
        let y = run("QLinearMul", &operands([1.0, 0.5, 2.0])).unwrap();
        assert_eq!(y[0].as_slice::<u8>().unwrap(), [5, 5, 5, 128]);
    }

    #[test]
    fn mistakes_are_named() {
        for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let e = run("QLinearAdd", &operands([1.0, bad, 1.0])).unwrap_err();
            assert!(e.message.contains("B_scale[0]") && e.message.contains("positive"), "{e}");
            assert_eq!((e.node.as_deref(), e.op.as_deref()), (Some("test"), Some("com.microsoft.QLinearAdd")));
        }
        let mut wrong = operands([1.0; 3]);
        wrong[2] = Tensor::from_slice(&[], &[1i8]).unwrap();
        assert!(run("QLinearMul", &wrong).unwrap_err().message.contains("A_zero_point is int8"));
        wrong = operands([1.0; 3]);
        wrong[6] = f32s(&[2], &[1.0; 2]);
        assert!(run("QLinearMul", &wrong).unwrap_err().message.contains("one number was wanted"));
        wrong = operands([1.0; 3]);
        wrong[5] = u8s(&[0], &[]);
        assert!(run("QLinearMul", &wrong).unwrap_err().message.contains("B_zero_point"));
    }
}
