//! Reshape, Flatten, Squeeze and Unsqueeze: the same elements in another shape.

use super::identity::copy;
use super::sizes::{Ints, dim_product, distinct_axes, ints, loose_sizes, sizes_fact};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact, Shape, axis_index};
use smallvec::SmallVec;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("Reshape", 5, Reshape::parse),
    Registration::onnx("Flatten", 1, Flatten::parse),
    Registration::onnx("Squeeze", 1, Squeeze::parse),
    Registration::onnx("Unsqueeze", 1, Unsqueeze::parse),
];

/// A view of operand 0 in this shape; sizes that it holds stay known.
fn reshaped(x: &Fact, shape: Option<Shape>) -> Fact {
    if let (Some(sizes), Some(shape)) = (loose_sizes(x), &shape)
        && shape.len() <= 1
    {
        return sizes_fact(x.dtype, sizes, shape.len());
    }
    Fact { dtype: x.dtype, shape, content: Content::Unknown }
}

/// A shape from operand 1: -1 stands for what is left over, 0 for the operand's own size (unless `allow_zero`).
#[derive(Debug, PartialEq)]
pub struct Reshape {
    /// Whether 0 is a size like any other.
    pub allow_zero: bool,
}

impl Reshape {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Reshape { allow_zero: a.flag_or("allowzero", false)? }.into())
    }

    /// The result's shape; `None` entries of `target` are not known or were -1.
    fn resolve(&self, x: &Fact, target: Vec<Option<Dim>>, inferred: Option<usize>) -> Result<Shape> {
        let mut shape = Shape::new();
        for (i, t) in target.into_iter().enumerate() {
            shape.push(match t {
                Some(Dim::Known(0)) if !self.allow_zero => match &x.shape {
                    Some(s) => s.get(i).cloned().ok_or_else(|| {
                        let rank = s.len();
                        Error::shape(format!("size {i} of the wanted shape is 0 (copy), the operand's rank is {rank}"))
                    })?,
                    None => Dim::Unknown,
                },
                Some(d) => d,
                None => Dim::Unknown,
            });
        }
        // One size that is not known follows from the number of elements, whatever the reason that it is not known.
        let unknown: Vec<usize> = (0..shape.len()).filter(|&i| shape[i] == Dim::Unknown).collect();
        let hole = inferred.or(if let [one] = unknown[..] { Some(one) } else { None });
        if let (Some(hole), Some(from)) = (hole, &x.shape)
            && unknown.iter().all(|&i| i == hole)
            && let Some(size) = quotient(from, &shape, hole)?
        {
            shape[hole] = size;
        }
        let count = |s: &Shape| s.iter().try_fold(Dim::Known(1), |n, d| dim_product(&n, d));
        if let (Some(from), Dim::Known(to)) = (&x.shape, count(&shape)?)
            && let Dim::Known(have) = count(from)?
            && have != to
        {
            let to: Vec<_> = shape.iter().map(Dim::to_string).collect();
            let (from, to) = (x.shape_text(), to.join(", "));
            return Err(Error::shape(format!("{have} elements of shape {from} cannot take the shape [{to}]")));
        }
        Ok(shape)
    }
}

/// `product(from) / product(shape without hole)` where names on both sides cancel.
fn quotient(from: &Shape, shape: &Shape, hole: usize) -> Result<Option<Dim>> {
    let (mut have, mut want) = (1usize, 1usize);
    let mut names: Vec<&Dim> = Vec::new();
    let times = |n: usize, d: usize| super::sizes::product(&[n, d]);
    for d in from {
        match d {
            Dim::Known(n) => have = times(have, *n)?,
            Dim::Symbol(_) => names.push(d),
            Dim::Unknown => return Ok(None),
        }
    }
    for (_, d) in shape.iter().enumerate().filter(|(i, _)| *i != hole) {
        match d {
            Dim::Known(n) => want = times(want, *n)?,
            Dim::Symbol(_) => match names.iter().position(|n| *n == d) {
                Some(at) => {
                    names.swap_remove(at);
                }
                None => return Ok(None),
            },
            Dim::Unknown => return Ok(None),
        }
    }
    Ok(match names[..] {
        [] if want > 0 && have % want == 0 => Some(Dim::Known(have / want)),
        [] if want > 0 => {
            return Err(Error::shape(format!(
                "{have} elements are not a whole multiple of {want}, which the wanted shape asks for"
            )));
        }
        // No element: what is left over may be anything, and 0 is what others choose.
        [] if have == 0 => Some(Dim::Known(0)),
        [name] if have == want && have > 0 => Some(name.clone()),
        _ => None,
    })
}

impl Operator for Reshape {
    fn name(&self) -> &'static str {
        "Reshape"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let wanted = cx.input(1)?;
        let shape = match ints(Some(wanted), "the wanted shape")? {
            Ints::Known(values) => {
                let holes: Vec<usize> = (0..values.len()).filter(|&i| values[i] == -1).collect();
                if holes.len() > 1
                    || values.iter().any(|&v| v < -1)
                    || (self.allow_zero && !holes.is_empty() && values.contains(&0))
                {
                    return Err(Error::shape(format!(
                        "the wanted shape {:?}; sizes, and -1 once at most, were wanted",
                        values.as_slice()
                    )));
                }
                let target = values.iter().map(|&v| usize::try_from(v).ok().map(Dim::Known)).collect();
                Some(self.resolve(x, target, holes.first().copied())?)
            }
            Ints::Computed(count) => match &wanted.content {
                Content::Dims(sizes) => Some(self.resolve(x, sizes.iter().cloned().map(Some).collect(), None)?),
                _ => count.map(|n| SmallVec::from_elem(Dim::Unknown, n)),
            },
            Ints::Absent => return Err(Error::invalid_model("operand 1 is missing")),
        };
        cx.results(vec![reshaped(x, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        copy(io)
    }

    fn is_view(&self) -> bool {
        true
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

/// A matrix: the axes before `axis` and those from it on, each merged into one.
#[derive(Debug, PartialEq)]
pub struct Flatten {
    /// In `-rank..=rank`.
    pub axis: i64,
}

impl Flatten {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Flatten { axis: a.int_or("axis", 1)? }.into())
    }
}

impl Operator for Flatten {
    fn name(&self) -> &'static str {
        "Flatten"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let shape: Shape = match &x.shape {
            Some(s) => {
                let rank = s.len();
                let axis = if self.axis == rank as i64 { rank } else { axis_index(self.axis, rank)? };
                let merge = |part: &[Dim]| part.iter().try_fold(Dim::Known(1), |n, d| dim_product(&n, d));
                [merge(&s[..axis])?, merge(&s[axis..])?].into_iter().collect()
            }
            None => SmallVec::from_elem(Dim::Unknown, 2),
        };
        cx.results(vec![Fact::with_shape(x.dtype, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        copy(io)
    }

    fn is_view(&self) -> bool {
        true
    }

    fn takes_half(&self) -> bool {
        true
    }
}

/// Where the axes of Squeeze and Unsqueeze are: an attribute up to opset 12, an operand after.
fn axes_of(attribute: &Option<Vec<i64>>, cx: &Infer) -> Result<Ints> {
    match attribute {
        Some(axes) => Ok(Ints::Known(axes.iter().copied().collect())),
        None => ints(cx.optional(1), "the list of axes"),
    }
}

/// Drops axes of size 1: the named ones, or all.
#[derive(Debug, PartialEq)]
pub struct Squeeze {
    /// The axes, when they stand in the node.
    pub axes: Option<Vec<i64>>,
}

impl Squeeze {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Squeeze { axes: a.ints("axes")? }.into())
    }
}

impl Operator for Squeeze {
    fn name(&self) -> &'static str {
        "Squeeze"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let axes = axes_of(&self.axes, cx)?;
        let shape = match (&x.shape, axes) {
            (Some(s), Ints::Known(axes)) => {
                let axes = distinct_axes(&axes, s.len())?;
                if let Some(&a) = axes.iter().find(|&&a| s[a].known().is_some_and(|d| d != 1)) {
                    return Err(Error::shape(format!(
                        "axis {a} of shape {} is to be dropped; only size 1 can be",
                        x.shape_text()
                    )));
                }
                Some(s.iter().enumerate().filter(|(a, _)| !axes.contains(a)).map(|(_, d)| d.clone()).collect())
            }
            (Some(s), Ints::Absent) if s.iter().all(|d| d.known().is_some()) => {
                Some(s.iter().filter(|d| **d != Dim::Known(1)).cloned().collect())
            }
            (Some(s), Ints::Computed(Some(n))) => {
                let rank = s.len().checked_sub(n).ok_or_else(|| Error::shape("more axes to drop than there are"))?;
                Some(SmallVec::from_elem(Dim::Unknown, rank))
            }
            _ => None,
        };
        cx.results(vec![reshaped(x, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        copy(io)
    }

    fn is_view(&self) -> bool {
        true
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

/// Inserts axes of size 1, at the named places of the result.
#[derive(Debug, PartialEq)]
pub struct Unsqueeze {
    /// The axes, when they stand in the node.
    pub axes: Option<Vec<i64>>,
}

impl Unsqueeze {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Unsqueeze { axes: a.ints("axes")? }.into())
    }
}

impl Operator for Unsqueeze {
    fn name(&self) -> &'static str {
        "Unsqueeze"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let shape = match (&x.shape, axes_of(&self.axes, cx)?) {
            (_, Ints::Absent) => return Err(Error::invalid_model("the axes are missing")),
            (Some(s), Ints::Known(axes)) => {
                let rank = s.len() + axes.len();
                let axes = distinct_axes(&axes, rank)?;
                let mut rest = s.iter().cloned();
                let one = |a: usize| if axes.contains(&a) { Some(Dim::Known(1)) } else { rest.next() };
                Some((0..rank).filter_map(one).collect())
            }
            (Some(s), Ints::Computed(Some(n))) => Some(SmallVec::from_elem(Dim::Unknown, s.len().saturating_add(n))),
            _ => None,
        };
        cx.results(vec![reshaped(x, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        copy(io)
    }

    fn is_view(&self) -> bool {
        true
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
    use super::*;
    use crate::tensor::DType;
    use std::sync::Arc;

    fn reshape(dims: &[usize], wanted: &[i64]) -> Result<Vec<usize>> {
        let x = f32s(dims, &vec![1.0; dims.iter().product()]);
        let y = OneNode::new("Reshape").run(&[x, i64s(&[wanted.len()], wanted)])?;
        Ok(y[0].dims().to_vec())
    }

    #[test]
    fn shapes_are_resolved() {
        assert_eq!(reshape(&[2, 3, 4], &[0, -1]).unwrap(), [2, 12]);
        assert_eq!(reshape(&[2, 3, 4], &[-1]).unwrap(), [24]);
        assert_eq!(reshape(&[1], &[]).unwrap(), [0usize; 0]);
        assert_eq!(reshape(&[0, 3], &[3, -1]).unwrap(), [3, 0]);
        for wrong in [&[5, -1][..], &[-1, -1], &[7], &[2, 3, 4, 0], &[-2, 12]] {
            assert!(reshape(&[2, 3, 4], wrong).is_err(), "{wrong:?}");
        }
        let y = OneNode::new("Reshape").int("allowzero", 1).run(&[f32s(&[0, 3], &[]), i64s(&[3], &[3, 4, 0])]);
        assert_eq!(y.unwrap()[0].dims(), [3, 4, 0]);
    }

    #[test]
    fn names_cancel() {
        let n = Dim::Symbol("n".into());
        let x = Fact::with_shape(DType::F32, [n.clone(), Dim::Known(4), Dim::Known(6)].into_iter().collect());
        let target = |v: &[i64]| Some(Fact::constant(Arc::new(i64s(&[v.len()], v))));
        let infer = |t| OneNode::new("Reshape").infer(&[Some(x.clone()), t]).unwrap()[0].shape.clone().unwrap();
        assert_eq!(infer(target(&[0, -1, 3])).as_slice(), [n.clone(), Dim::Known(8), Dim::Known(3)]);
        assert_eq!(infer(target(&[-1, 24])).as_slice(), [n.clone(), Dim::Known(24)]);
        let sizes = sizes_fact(DType::I64, [n.clone(), Dim::Unknown].into_iter().collect(), 1);
        assert_eq!(infer(Some(sizes)).as_slice(), [n, Dim::Known(24)]);
    }

    #[test]
    fn flatten_and_squeeze() {
        let x = || f32s(&[2, 1, 3, 1], &[0.0; 6]);
        for (axis, want) in [(0, [1, 6]), (1, [2, 3]), (-1, [6, 1]), (4, [6, 1])] {
            assert_eq!(OneNode::new("Flatten").int("axis", axis).run(&[x()]).unwrap()[0].dims(), want);
        }
        assert_eq!(OneNode::new("Squeeze").run(&[x()]).unwrap()[0].dims(), [2, 3]);
        assert_eq!(OneNode::new("Squeeze").run(&[x(), i64s(&[1], &[-1])]).unwrap()[0].dims(), [2, 1, 3]);
        let old = OneNode::new("Squeeze").opset(11).ints("axes", &[1]);
        assert_eq!(old.run(&[x()]).unwrap()[0].dims(), [2, 3, 1]);
        assert!(OneNode::new("Squeeze").run(&[x(), i64s(&[1], &[0])]).is_err());
        let y = OneNode::new("Unsqueeze").run(&[x(), i64s(&[2], &[0, -1])]).unwrap();
        assert_eq!(y[0].dims(), [1, 2, 1, 3, 1, 1]);
        assert!(OneNode::new("Unsqueeze").run(&[x(), i64s(&[2], &[0, 0])]).is_err());
        assert!(OneNode::new("Unsqueeze").run(&[x()]).is_err());
    }
}
