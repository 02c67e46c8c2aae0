//! Range.

use super::sizes::{dim_difference, loose_sizes};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::for_dtype;
use crate::tensor::{DType, Tensor};
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Range", 11, Range::parse)];

/// `start, start + step, ..` up to before `limit`.
#[derive(Clone, Debug, PartialEq)]
pub struct Range;

impl Range {
    fn parse(a: &mut Attributes) -> Result<Op> {
        // The type in which halves are summed; the casts that the importer puts around make it single precision.
        match a.int_or("stash_type", DType::F32 as i64)? {
            1 => Ok(Range.into()),
            other => Err(Error::unsupported_attribute(format!("stash_type is {other}; 1 (float32) can be computed"))),
        }
    }
}

/// Number of elements: `max(ceil((limit - start) / step), 0)`.
fn count(start: &Tensor, limit: &Tensor, step: &Tensor) -> Result<usize> {
    let scalar = |t: &Tensor| -> Result<f64> {
        for_dtype!(t.dtype(), [F32, F64, I16], T => Ok(f64::from(one(t.as_slice::<T>()?)?)), else Err(wrong(t)))
    };
    let zero = || Error::invalid_input("a range with a step of 0");
    let n = match (start.view().to_i64s(), limit.view().to_i64s(), step.view().to_i64s()) {
        (Ok(a), Ok(b), Ok(c)) => {
            let (a, b, c) = (i128::from(one(&a)?), i128::from(one(&b)?), i128::from(one(&c)?));
            if c == 0 {
                return Err(zero());
            }
            let n = if c > 0 { (b - a + c - 1).div_euclid(c) } else { (a - b - c - 1).div_euclid(-c) };
            n.max(0) as f64
        }
        _ => {
            let (a, b, c) = (scalar(start)?, scalar(limit)?, scalar(step)?);
            if c == 0.0 {
                return Err(zero());
            }
            let n = ((b - a) / c).ceil();
            if n < 0.0 { 0.0 } else { n }
        }
    };
    // NaN compares false.
    if n < 2f64.powi(40) { Ok(n as usize) } else { Err(Error::limit(format!("a range of {n} elements"))) }
}

fn one<T: Copy>(values: &[T]) -> Result<T> {
    match values {
        [v] => Ok(*v),
        _ => Err(Error::shape(format!("{} elements where a scalar was wanted", values.len()))),
    }
}

fn wrong(t: &Tensor) -> Error {
    wrong_dtype("an operand", t.dtype(), "float32, float64, int16, int32 or int64")
}

impl Operator for Range {
    fn name(&self) -> &'static str {
        "Range"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (start, limit, step) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        if limit.dtype != start.dtype || step.dtype != start.dtype {
            let (a, b, c) = (start.dtype, limit.dtype, step.dtype);
            return Err(Error::dtype(format!("a range from {a} to {b} by {c}; one type was wanted")));
        }
        let fact = match (start.tensor(), limit.tensor(), step.tensor()) {
            (Some(a), Some(b), Some(c)) => Fact::new(start.dtype, &[half_count(a, b, c)?]),
            _ => Fact::with_shape(start.dtype, std::iter::once(symbolic_count(start, limit, step)).collect()),
        };
        cx.results(vec![fact])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (start, step) = (io.input(0)?, io.input(2)?);
        let y = io.output(0)?;
        for_dtype!(start.dtype, [I16, I32, I64], T => {
            let (a, c) = (one(start.as_slice::<T>()?)?, one(step.as_slice::<T>()?)?);
            for (i, y) in y.as_slice::<T>()?.iter_mut().enumerate() {
                *y = a.wrapping_add(c.wrapping_mul(i as T));
            }
            return Ok(());
        }, else ());
        for_dtype!(start.dtype, [F32, F64], T => {
            let (a, c) = (one(start.as_slice::<T>()?)?, one(step.as_slice::<T>()?)?);
            for (i, y) in y.as_slice::<T>()?.iter_mut().enumerate() {
                *y = a + c * i as T;
            }
            Ok(())
        }, else Err(wrong_dtype("an operand", start.dtype, "float32, float64, int16, int32 or int64")))
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0, 1, 2]
    }
}

/// A range by ones, such as the positions of a sequence, has as many elements as lie between two sizes.
fn symbolic_count(start: &Fact, limit: &Fact, step: &Fact) -> Dim {
    match (loose_sizes(start).as_deref(), loose_sizes(limit).as_deref()) {
        (Some([start]), Some([limit])) if step.i64s().is_some_and(|v| v[..] == [1]) => dim_difference(limit, start),
        _ => Dim::Unknown,
    }
}

/// [`count`] for halves too, which inference meets before the importer's casts.
fn half_count(a: &Arc<Tensor>, b: &Arc<Tensor>, c: &Arc<Tensor>) -> Result<usize> {
    let wide = |t: &Tensor| -> Result<Tensor> {
        for_dtype!(t.dtype(), [F16, Bf16], T => Tensor::scalar(one(t.as_slice::<T>()?)?.to_f32()), else Ok(t.clone()))
    };
    count(&wide(a)?, &wide(b)?, &wide(c)?)
}

#[cfg(test)]
mod tests {
    use super::super::sizes::sizes_fact;
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;

    #[test]
    fn positions_have_the_size_of_the_sequence() {
        let n = Dim::Symbol("n".into());
        let constant = |v| Some(Fact::constant(Arc::new(i64s(&[], &[v]))));
        let size = || Some(sizes_fact(DType::I64, std::iter::once(n.clone()).collect(), 0));
        let shape = |a, c| OneNode::new("Range").infer(&[a, size(), c]).unwrap()[0].shape.clone().unwrap();
        assert_eq!(shape(constant(0), constant(1))[..], [n.clone()]);
        assert_eq!(shape(constant(1), constant(1))[..], [Dim::Unknown]);
        assert_eq!(shape(size(), constant(1))[..], [Dim::Known(0)]);
        assert_eq!(shape(constant(0), constant(2))[..], [Dim::Unknown]);
    }

    #[test]
    fn counts_up_and_down() {
        let range = |a, b, c| OneNode::new("Range").run(&[i64s(&[], &[a]), i64s(&[], &[b]), i64s(&[], &[c])]);
        assert_eq!(range(1, 5, 2).unwrap()[0], i64s(&[2], &[1, 3]));
        assert_eq!(range(10, 4, -2).unwrap()[0], i64s(&[3], &[10, 8, 6]));
        assert_eq!(range(4, 4, 1).unwrap()[0].dims(), [0]);
        assert_eq!(range(4, 0, 1).unwrap()[0].dims(), [0]);
        assert!(range(0, 1, 0).is_err());
        assert!(range(i64::MIN, i64::MAX, 1).is_err());
        let y = OneNode::new("Range").run(&[f32s(&[], &[1.0]), f32s(&[], &[2.1]), f32s(&[], &[0.5])]).unwrap();
        assert_eq!(y[0], f32s(&[3], &[1.0, 1.5, 2.0]));
        assert!(OneNode::new("Range").run(&[f32s(&[], &[f32::NAN]), f32s(&[], &[2.1]), f32s(&[], &[0.5])]).is_err());
    }
}
