//! SwiGLU.

use super::sizes::kernel_error;
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact};
use crate::tensor::DType;
use weblane_kernels::elementwise::{Binary, Unary, binary_f32_assign, broadcast_map, unary};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("SwiGLU", 28, SwiGlu::parse)];

/// `a * sigmoid(alpha * a) * b`, element by element.
#[derive(Clone, Debug, PartialEq)]
pub struct SwiGlu {
    /// Factor inside the sigmoid.
    pub alpha: f32,
}

impl SwiGlu {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(SwiGlu { alpha: a.float_or("alpha", 1.0)? }.into())
    }
}

impl Operator for SwiGlu {
    fn name(&self) -> &'static str {
        "SwiGLU"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        if !a.dtype.is_float() || a.dtype != b.dtype {
            return Err(wrong_dtype("the gate", a.dtype, "floating-point numbers of the type of the other operand"));
        }
        if let (Some(x), Some(y)) = (&a.shape, &b.shape) {
            let differ = |(p, q): (&Dim, &Dim)| matches!((p, q), (Dim::Known(m), Dim::Known(n)) if m != n);
            if x.len() != y.len() || x.iter().zip(y).any(differ) {
                let (x, y) = (a.shape_text(), b.shape_text());
                return Err(Error::shape(format!("shapes {x} and {y}; equal ones were wanted")));
            }
        }
        cx.results(vec![Fact { dtype: a.dtype, shape: a.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        let y = io.output(0)?;
        let dims = y.dims;
        let function = if self.alpha == 1.0 { Unary::Silu } else { Unary::Swish { alpha: self.alpha } };
        match a.dtype {
            DType::F32 => {
                unary(cx, function, a.as_slice()?, y.as_slice()?).map_err(kernel_error)?;
                binary_f32_assign(cx, Binary::Mul, false, y.as_slice()?, dims, b.as_slice()?, dims)
            }
            _ => {
                let (p, q) = (a.as_slice::<f64>()?, b.as_slice::<f64>()?);
                broadcast_map(cx, 60, p, dims, q, dims, y.as_slice()?, dims, |p, q| function.eval_f64(p) * q)
            }
        }
        .map_err(kernel_error)
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 2)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};

    #[test]
    fn gates() {
        let (a, b) = (|| f32s(&[2], &[0.6, -1.0]), || f32s(&[2], &[2.0, 3.0]));
        for (alpha, want) in [(1.0, [0.774_787_5, -0.806_824_3]), (2.0, [0.922_229_7, -0.357_608_8])] {
            let y = OneNode::new("SwiGLU").opset(28).float("alpha", alpha).run(&[a(), b()]).unwrap();
            for (got, want) in y[0].as_slice::<f32>().unwrap().iter().zip(want) {
                assert!((got - want).abs() < 1e-6, "{got} {want}");
            }
        }
        assert!(OneNode::new("SwiGLU").opset(28).run(&[a(), f32s(&[1], &[1.0])]).is_err());
    }
}
