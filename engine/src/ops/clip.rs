//! Clip.

use super::binary::assign;
use super::cast::converted;
use super::identity::copy;
use super::sizes::kernel_error;
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::tensor::{DType, Tensor, TensorView};
use weblane_kernels::elementwise::{Binary, Unary, unary, unary_assign};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Clip", 6, Clip::parse)];

/// `min(max(x, lo), hi)`; the bounds are operands 1 and 2 or, up to opset 10, attributes.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    /// Lower bound, when it stands in the node.
    pub min: Option<f32>,
    /// Upper bound, when it stands in the node.
    pub max: Option<f32>,
}

impl Clip {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Clip { min: a.float("min")?, max: a.float("max")? }.into())
    }

    /// Both bounds of a `float32` clip, given its constant operands; an operand that is there and not constant must
    /// not be passed as `None`.
    pub fn bounds(&self, min: Option<&Tensor>, max: Option<&Tensor>) -> Option<(f32, f32)> {
        let of = |attribute: Option<f32>, operand: Option<&Tensor>, default: f32| match operand {
            Some(t) => t.as_slice::<f32>().ok().and_then(|s| s.first().copied()),
            None => Some(attribute.unwrap_or(default)),
        };
        Some((of(self.min, min, f32::NEG_INFINITY)?, of(self.max, max, f32::INFINITY)?))
    }
}

impl Operator for Clip {
    fn name(&self) -> &'static str {
        "Clip"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if matches!(x.dtype, DType::Bool | DType::String) || x.dtype.bits() < 8 {
            return Err(wrong_dtype("the operand", x.dtype, "numbers"));
        }
        for (i, what) in [(1, "lower"), (2, "upper")] {
            let Some(bound) = cx.optional(i) else { continue };
            if bound.dtype != x.dtype {
                return Err(Error::dtype(format!("the {what} bound is {}, the operand {}", bound.dtype, x.dtype)));
            }
            if bound.dims().is_some_and(|d| d.iter().product::<usize>() != 1) {
                let shape = bound.shape_text();
                return Err(Error::shape(format!("the {what} bound has shape {shape}; a scalar was wanted")));
            }
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (min, max) = (io.optional(1), io.optional(2));
        let dtype = io.output(0)?.dtype;
        if dtype == DType::F32 {
            let of = |v: Option<TensorView>, attribute: Option<f32>, default: f32| -> Result<f32> {
                match v {
                    Some(v) => v.as_slice()?.first().copied().ok_or_else(|| Error::shape("a bound has no elements")),
                    None => Ok(attribute.unwrap_or(default)),
                }
            };
            let lo = of(min, self.min, f32::NEG_INFINITY)?;
            let function = Unary::Clip { lo, hi: of(max, self.max, f32::INFINITY)? };
            if io.in_place.is_some() {
                unary_assign(cx, function, io.output(0)?.as_slice()?);
                return Ok(());
            }
            let x = io.slice(0)?;
            return unary(cx, function, x, io.output(0)?.as_slice()?).map_err(kernel_error);
        }
        if io.in_place.is_none() {
            copy(io)?;
        }
        for (function, operand, attribute) in [(Binary::Max, min, self.min), (Binary::Min, max, self.max)] {
            let y = io.output(0)?;
            match (operand, attribute) {
                (Some(bound), _) => assign(cx, function, y, bound)?,
                (None, Some(bound)) => {
                    let bound = converted(Tensor::from_slice(&[], &[bound])?.view(), dtype)?;
                    assign(cx, function, y, bound.view())?;
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Some(Permuted { op: self.clone().into(), roles: vec![Role::Permute, Role::Keep, Role::Keep] })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::tensor::Tensor;

    #[test]
    fn bounds_from_everywhere() {
        let x = || f32s(&[3], &[-2.0, 0.5, f32::NAN]);
        let y = OneNode::new("Clip").run(&[x(), f32s(&[], &[0.0]), f32s(&[1], &[0.25])]).unwrap().remove(0);
        let y = y.as_slice::<f32>().unwrap();
        assert!(y[0] == 0.0 && y[1] == 0.25 && y[2].is_nan());
        let y = OneNode::new("Clip").run_optional(&[Some(i64s(&[2], &[-5, 5])), None, Some(i64s(&[], &[1]))]);
        assert_eq!(y.unwrap()[0], i64s(&[2], &[-5, 1]));
        let y = OneNode::new("Clip").opset(10).float("min", 0.0).float("max", 6.0).run(&[f32s(&[2], &[-1.0, 7.0])]);
        assert_eq!(y.unwrap()[0], f32s(&[2], &[0.0, 6.0]));
        let y = OneNode::new("Clip").run(&[Tensor::from_slice(&[1], &[200u8]).unwrap()]).unwrap();
        assert_eq!(y[0].bytes(), [200]);
        assert!(OneNode::new("Clip").run(&[x(), i64s(&[], &[0])]).is_err());
        assert!(OneNode::new("Clip").run(&[x(), f32s(&[2], &[0.0, 1.0])]).is_err());
    }

    #[test]
    fn crossed_bounds_give_the_upper_one() {
        let y = OneNode::new("Clip").run(&[f32s(&[2], &[-9.0, 9.0]), f32s(&[], &[2.0]), f32s(&[], &[1.0])]).unwrap();
        assert_eq!(y[0], f32s(&[2], &[1.0, 1.0]));
    }
}
