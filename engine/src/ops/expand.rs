//! Expand and Tile: elements repeated along axes.

use super::sizes::{Axes, Ints, broadcast_strides, check_movable, copy_axes, dim_product, ints, loose_sizes, strides};
use super::{Infer, Io, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, broadcast};
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("Expand", 8, |_| Ok(Expand.into())), Registration::onnx("Tile", 6, |_| Ok(Tile.into()))];

/// Broadcasts operand 0 together with the shape in operand 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Expand;

impl Operator for Expand {
    fn name(&self) -> &'static str {
        "Expand"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, wanted) = (cx.input(0)?, cx.input(1)?);
        check_movable(x.dtype)?;
        let known = ints(Some(wanted), "the wanted shape")?;
        if let Ints::Known(values) = &known
            && let Some(v) = values.iter().find(|v| **v < 0)
        {
            return Err(Error::shape(format!("{v} in the wanted shape; sizes are 0 or more")));
        }
        let fact = match (&x.shape, loose_sizes(wanted), known) {
            (Some(s), Some(sizes), _) => Fact::with_shape(x.dtype, broadcast(s, &sizes)?),
            (Some(s), None, Ints::Computed(Some(n))) => Fact::of_rank(x.dtype, n.max(s.len())),
            _ => Fact::of_dtype(x.dtype),
        };
        cx.results(vec![fact])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let y = io.output(0)?;
        let (from, to) = (broadcast_strides(x.dims, y.dims), strides(y.dims));
        let axes: Axes =
            y.dims.iter().enumerate().map(|(a, &len)| Axis { len, src: from[a] as isize, dst: to[a] }).collect();
        copy_axes(cx, &axes, x, 0, y, 0)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

/// Operand 0, repeated along each axis as often as operand 1 says.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile;

impl Operator for Tile {
    fn name(&self) -> &'static str {
        "Tile"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, repeats) = (cx.input(0)?, cx.input(1)?);
        check_movable(x.dtype)?;
        if let Ints::Known(values) = ints(Some(repeats), "the list of repeats")?
            && let Some(v) = values.iter().find(|v| **v < 0)
        {
            return Err(Error::invalid_input(format!("{v} repeats")));
        }
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let Some(times) = loose_sizes(repeats) else { return cx.results(vec![Fact::of_rank(x.dtype, shape.len())]) };
        if times.len() != shape.len() {
            return Err(Error::shape(format!("{} repeats for an operand of rank {}", times.len(), shape.len())));
        }
        let out = shape.iter().zip(&times).map(|(d, t): (&Dim, &Dim)| dim_product(d, t)).collect::<Result<_>>()?;
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let y = io.output(0)?;
        let (from, to) = (strides(x.dims), strides(y.dims));
        let mut axes = Axes::new();
        for a in 0..x.rank() {
            let n = x.dims[a];
            axes.push(Axis { len: y.dims[a].checked_div(n).unwrap_or(0), src: 0, dst: to[a] * n });
            axes.push(Axis { len: n, src: from[a] as isize, dst: to[a] });
        }
        copy_axes(cx, &axes, x, 0, y, 0)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn expands_both_ways() {
        let x = || f32s(&[3, 1], &[1.0, 2.0, 3.0]);
        let y = OneNode::new("Expand").run(&[x(), i64s(&[3], &[2, 1, 2])]).unwrap();
        let half = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0];
        assert_eq!(y[0], f32s(&[2, 3, 2], &[half, half].concat()));
        let y = OneNode::new("Expand").run(&[x(), i64s(&[1], &[1])]).unwrap();
        assert_eq!(y[0], x());
        assert!(OneNode::new("Expand").run(&[x(), i64s(&[2], &[2, 1])]).is_err());
        assert!(OneNode::new("Expand").run(&[x(), i64s(&[2], &[-1, 1])]).is_err());
    }

    #[test]
    fn tiles() {
        let x = || f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let y = OneNode::new("Tile").run(&[x(), i64s(&[2], &[1, 2])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 4], &[1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]));
        let y = OneNode::new("Tile").run(&[x(), i64s(&[2], &[2, 0])]).unwrap();
        assert_eq!(y[0].dims(), [4, 0]);
        assert!(OneNode::new("Tile").run(&[x(), i64s(&[1], &[1])]).is_err());
        assert!(OneNode::new("Tile").run(&[x(), i64s(&[2], &[1, -1])]).is_err());
    }
}
