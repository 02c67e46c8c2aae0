//! QLinearAdd and QLinearMul of onnxruntime: sums and products of quantised tensors, with NumPy's broadcasting.

use super::qparams::{Count, bounds, check_byte, infer_scale, infer_zero, scale, zero};
use super::sizes::broadcast_strides;
use super::{Infer, Io, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Fact, broadcast};
use crate::for_dtype;
use crate::tensor::Element;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::microsoft("QLinearAdd", |_| Ok(QLinearBinary { multiply: false }.into())),
    Registration::microsoft("QLinearMul", |_| Ok(QLinearBinary { multiply: true }.into())),
];

/// Operands: A, its scale and zero point, B, its scale and zero point, scale and zero point of the result.
#[derive(Clone, Debug)]
pub struct QLinearBinary {
    /// Whether it is the product.
    pub multiply: bool,
}

/// The arithmetic, in `f32`; the zero point is added before rounding, as onnxruntime does.
#[derive(Clone, Copy)]
enum Formula {
    /// `round((a - a_zero) * first + (b - b_zero) * second + zero)`.
    Sum { first: f32, second: f32 },
    /// `round((a - a_zero) * (b - b_zero) * ratio + zero)`.
    Product { ratio: f32 },
}

/// Calls `f` with the places in both operands and in the result of each element.
fn pairs(a: &[usize], b: &[usize], y: &[usize], mut f: impl FnMut(usize, usize, usize)) {
    let (sa, sb) = (broadcast_strides(a, y), broadcast_strides(b, y));
    let Some((&cols, outer)) = y.split_last() else { return f(0, 0, 0) };
    let (ca, cb) = (sa[outer.len()], sb[outer.len()]);
    for row in 0..outer.iter().product() {
        let (mut at_a, mut at_b, mut rest) = (0, 0, row);
        for (d, &size) in outer.iter().enumerate().rev() {
            at_a += rest % size * sa[d];
            at_b += rest % size * sb[d];
            rest /= size;
        }
        (0..cols).for_each(|j| f(row * cols + j, at_a + j * ca, at_b + j * cb));
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

    fn run(&self, _cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(3)?);
        let [sa, sb, sc] =
            [scale(io.input(1)?, "A_scale")?, scale(io.input(4)?, "B_scale")?, scale(io.input(6)?, "C_scale")?];
        let zeros = [
            zero(io.optional(2), "A_zero_point")?,
            zero(io.optional(5), "B_zero_point")?,
            zero(io.optional(7), "C_zero_point")?,
        ];
        let formula = match self.multiply {
            true => Formula::Product { ratio: sa * sb / sc },
            false => Formula::Sum { first: sa / sc, second: sb / sc },
        };
        let y = io.output(0)?;
        let dims = y.dims;
        let bounds = bounds(y.dtype);
        for_dtype!(y.dtype, [U8, I8], T => {
            combine::<T>(formula, zeros, bounds, (a.as_slice()?, a.dims), (b.as_slice()?, b.dims), (y.as_slice()?, dims));
            Ok(())
        }, else Err(wrong_dtype("the result", y.dtype, super::qparams::BYTES)))
    }
}

fn combine<T: Element + Number + Into<i32>>(
    formula: Formula,
    [za, zb, zc]: [i32; 3],
    [lo, hi]: [i32; 2],
    a: (&[T], &[usize]),
    b: (&[T], &[usize]),
    y: (&mut [T], &[usize]),
) {
    if y.0.is_empty() {
        return;
    }
    let out = y.0;
    let zero = zc as f32;
    pairs(a.1, b.1, y.1, |i, at_a, at_b| {
        let (p, q): (i32, i32) = (a.0[at_a].into() - za, b.0[at_b].into() - zb);
        let v = match formula {
            Formula::Sum { first, second } => p as f32 * first + q as f32 * second + zero,
            Formula::Product { ratio } => (p * q) as f32 * ratio + zero,
        };
        out[i] = T::from_f64(f64::from((v.round_ties_even() as i32).clamp(lo, hi)));
    });
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
