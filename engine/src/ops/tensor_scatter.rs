//! TensorScatter: new steps written into a cache of keys or values.

use super::identity::copy;
use super::sizes::{Axes, check_movable, copy_axes, strides};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact, axis_index};
use crate::tensor::DType;
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("TensorScatter", 24, TensorScatter::parse)];

/// The cache with the update at the sequence's write index, batch by batch.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorScatter {
    /// Whether the sequence axis wraps around.
    pub circular: bool,
    /// The sequence axis.
    pub axis: i64,
}

impl TensorScatter {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let circular = a.choice("mode", &[("linear", false), ("circular", true)])?;
        Ok(TensorScatter { circular, axis: a.int_or("axis", -2)? }.into())
    }
}

impl Operator for TensorScatter {
    fn name(&self) -> &'static str {
        "TensorScatter"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (cache, update) = (cx.input(0)?, cx.input(1)?);
        check_movable(cache.dtype)?;
        if update.dtype != cache.dtype || cx.optional(2).is_some_and(|i| i.dtype != DType::I64) {
            let (a, b) = (cache.dtype, update.dtype);
            return Err(Error::dtype(format!(
                "a cache of {a} and an update of {b}; one type, and int64 indices, were wanted"
            )));
        }
        if let (Some(c), Some(u)) = (&cache.shape, &update.shape) {
            let axis = axis_index(self.axis, c.len())?;
            let wrong = |a: usize| match (&c[a], &u[a]) {
                (Dim::Known(x), Dim::Known(y)) => (a != axis && x != y) || y > x,
                _ => false,
            };
            if axis == 0 || c.len() != u.len() || (0..c.len()).any(wrong) {
                let (c, u) = (cache.shape_text(), update.shape_text());
                return Err(Error::shape(format!("an update of shape {u} for a cache of shape {c} along axis {axis}")));
            }
            if let Some([Dim::Known(n)]) = cx.optional(2).and_then(|i| i.shape.as_deref())
                && c[0].known().is_some_and(|b| b != *n)
            {
                return Err(Error::shape(format!("{n} write indices for a batch of {}", c[0])));
            }
        }
        cx.results(vec![Fact { dtype: cache.dtype, shape: cache.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        if io.in_place.is_none() {
            copy(io)?;
        }
        let (update, indices) = (io.input(1)?, io.optional(2));
        let y = io.output(0)?;
        let axis = axis_index(self.axis, y.dims.len())?;
        let (from, to) = (strides(update.dims), strides(y.dims));
        let (capacity, steps) = (y.dims[axis], update.dims[axis]);
        for b in 0..y.dims[0] {
            let at = match indices {
                Some(i) => i.as_slice::<i64>()?.get(b).copied().unwrap_or(0),
                None => 0,
            };
            let wrong =
                || Error::invalid_input(format!("write index {at} for {steps} steps into a cache of {capacity}"));
            let start = match (self.circular, capacity) {
                (_, 0) => return Ok(()),
                (true, _) => at.rem_euclid(capacity as i64) as usize,
                (false, _) => usize::try_from(at).map_err(|_| wrong())?,
            };
            if !self.circular && start.checked_add(steps).is_none_or(|end| end > capacity) {
                return Err(wrong());
            }
            // What fits before the end, then what wraps around.
            let first = steps.min(capacity - start);
            for (skip, count, place) in [(0, first, start), (first, steps - first, 0)] {
                let axes: Axes = (1..y.dims.len())
                    .map(|a| {
                        let len = if a == axis { count } else { y.dims[a] };
                        Axis { len, src: from[a] as isize, dst: to[a] }
                    })
                    .collect();
                copy_axes(cx, &axes, update, b * from[0] + skip * from[axis], y, b * to[0] + place * to[axis])?;
            }
        }
        Ok(())
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn takes_half(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::onnx::AttributeValue;

    #[test]
    fn linear_and_circular() {
        let cache = || f32s(&[2, 3, 1], &[0.0; 6]);
        let update = || f32s(&[2, 2, 1], &[1.0, 2.0, 3.0, 4.0]);
        let y = OneNode::new("TensorScatter").run(&[cache(), update(), i64s(&[2], &[0, 1])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 3, 1], &[1.0, 2.0, 0.0, 0.0, 3.0, 4.0]));
        assert!(OneNode::new("TensorScatter").run(&[cache(), update(), i64s(&[2], &[0, 2])]).is_err());
        let circular = OneNode::new("TensorScatter").attr("mode", AttributeValue::String("circular".into()));
        let y = circular.run(&[cache(), update(), i64s(&[2], &[5, 1])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 3, 1], &[2.0, 0.0, 1.0, 0.0, 3.0, 4.0]));
    }
}
