//! Det.

use super::{Infer, Io, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::for_dtype;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Det", 11, |_| Ok(Det.into()))];

/// The determinant of each matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Det;

/// By elimination with partial pivoting, over a copy in double precision.
fn determinant(m: &mut [f64], n: usize) -> f64 {
    let mut det = 1.0;
    for k in 0..n {
        let pivot = (k..n).max_by(|&a, &b| m[a * n + k].abs().total_cmp(&m[b * n + k].abs())).unwrap_or(k);
        if m[pivot * n + k] == 0.0 {
            return 0.0;
        }
        if pivot != k {
            (0..n).for_each(|c| m.swap(k * n + c, pivot * n + c));
            det = -det;
        }
        det *= m[k * n + k];
        for r in k + 1..n {
            let factor = m[r * n + k] / m[k * n + k];
            (k..n).for_each(|c| m[r * n + c] -= factor * m[k * n + c]);
        }
    }
    det
}

impl Operator for Det {
    fn name(&self) -> &'static str {
        "Det"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        match shape.as_slice() {
            [_, .., Dim::Known(a), Dim::Known(b)] | [Dim::Known(a), Dim::Known(b)] if a != b => {
                Err(Error::shape(format!("an operand of shape {}; square matrices were wanted", x.shape_text())))
            }
            [lead @ .., _, _] => cx.results(vec![Fact::with_shape(x.dtype, lead.iter().cloned().collect())]),
            _ => Err(Error::shape(format!("an operand of shape {}; rank 2 or more was wanted", x.shape_text()))),
        }
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let n = x.dims.last().copied().unwrap_or(0);
        let y = io.output(0)?;
        for_dtype!(x.dtype, [F32, F64], T => {
            let x = x.as_slice::<T>()?;
            for (i, y) in y.as_slice::<T>()?.iter_mut().enumerate() {
                let mut m: Vec<f64> = x[i * n * n..(i + 1) * n * n].iter().map(|&v| f64::from(v)).collect();
                *y = determinant(&mut m, n) as T;
            }
            Ok(())
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};

    #[test]
    fn determinants() {
        let x = f32s(&[3, 2, 2], &[1.0, 2.0, 3.0, 4.0, 0.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0, 4.0]);
        let y = OneNode::new("Det").run(&[x]).unwrap();
        for (got, want) in y[0].as_slice::<f32>().unwrap().iter().zip([-2.0, -4.0, 0.0]) {
            assert!((got - want).abs() < 1e-5);
        }
        assert!(OneNode::new("Det").run(&[f32s(&[2, 1], &[1.0, 2.0])]).is_err());
    }
}
