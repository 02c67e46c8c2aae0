//! NonZero, Compress and Unique: results whose shape depends on the elements.

use super::sizes::{Axes, check_movable, copy_axes, strides};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, axis_index};
use crate::for_dtype;
use crate::tensor::{DType, Tensor, TensorView};
use std::sync::Arc;
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("NonZero", 9, |_| Ok(NonZero.into())),
    Registration::onnx("Compress", 9, |a| Ok(Compress { axis: a.int("axis")? }.into())),
    Registration::onnx("Unique", 11, Unique::parse),
];

/// The places of the elements that are not zero: a column of indices for each.
#[derive(Clone, Debug, PartialEq)]
pub struct NonZero;

fn non_zero_places(x: TensorView) -> Result<Vec<usize>> {
    let x = x.signless();
    for_dtype!(x.dtype, [F32, F64, I8, I16, I32, I64, Bool], T => {
        let x = x.as_slice::<T>()?;
        Ok((0..x.len()).filter(|&i| x[i] != 0 as T).collect())
    }, else match x.dtype {
        // All bits but the sign.
        DType::F16 | DType::Bf16 => {
            let halves = x.bytes().chunks_exact(2).enumerate();
            Ok(halves.filter(|(_, b)| b[0] != 0 || b[1] & 0x7F != 0).map(|(i, _)| i).collect())
        }
        other => Err(wrong_dtype("the operand", other, "numbers")),
    })
}

impl Operator for NonZero {
    fn name(&self) -> &'static str {
        "NonZero"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if x.dtype == DType::String || x.dtype.bits() < 8 {
            return Err(wrong_dtype("the operand", x.dtype, "numbers"));
        }
        if let Some(t) = x.tensor() {
            let places = non_zero_places(t.view())?;
            let step = strides(t.dims());
            let mut out = Vec::with_capacity(places.len() * t.dims().len());
            for a in 0..t.dims().len() {
                out.extend(places.iter().map(|p| (p / step[a] % t.dims()[a]) as i64));
            }
            let dims = [t.dims().len(), places.len()];
            return cx.results(vec![Fact::constant(Arc::new(Tensor::from_slice(&dims, &out)?))]);
        }
        let rank = x.rank().map_or(Dim::Unknown, Dim::Known);
        cx.results(vec![Fact::with_shape(DType::I64, [rank, Dim::Unknown].into_iter().collect())])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let places = non_zero_places(x)?;
        let step = strides(x.dims);
        let y = io.output(0)?;
        if y.dims != [x.rank(), places.len()] {
            return Err(Error::internal("another number of elements than inference found"));
        }
        for (i, y) in y.as_slice::<i64>()?.iter_mut().enumerate() {
            let (a, p) = (i / places.len(), places[i % places.len()]);
            *y = (p / step[a] % x.dims[a]) as i64;
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0]
    }
}

/// The slices along an axis (or the elements in order) for which operand 1 says true.
#[derive(Clone, Debug, PartialEq)]
pub struct Compress {
    axis: Option<i64>,
}

impl Operator for Compress {
    fn name(&self) -> &'static str {
        "Compress"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, keep) = (cx.input(0)?, cx.input(1)?);
        check_movable(x.dtype)?;
        if keep.dtype != DType::Bool || keep.rank().is_some_and(|r| r != 1) {
            let (d, s) = (keep.dtype, keep.shape_text());
            return Err(Error::dtype(format!("the condition is {d} of shape {s}; a vector of bool was wanted")));
        }
        let count = keep.tensor().map(|t| t.bytes().iter().filter(|b| **b != 0).count());
        let count = count.map_or(Dim::Unknown, Dim::Known);
        let Some(axis) = self.axis else {
            return cx.results(vec![Fact::with_shape(x.dtype, std::iter::once(count).collect())]);
        };
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let mut out = shape.clone();
        out[axis_index(axis, shape.len())?] = count;
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, keep) = (io.input(0)?, io.input(1)?);
        let (len, inner) = match self.axis {
            None => (x.len(), 1),
            Some(axis) => {
                let axis = axis_index(axis, x.rank())?;
                (x.dims[axis], x.dims[axis + 1..].iter().product())
            }
        };
        let places: Vec<usize> = (0..keep.len()).filter(|&i| keep.bytes()[i] != 0).collect();
        if let Some(&bad) = places.iter().find(|p| **p >= len) {
            return Err(Error::invalid_input(format!("the condition asks for element {bad} of {len}")));
        }
        if io.output(0)?.is_empty() {
            return Ok(());
        }
        copy_items(cx, io, &places, len, inner)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

/// Copies the named items of the middle axis of `[outer, len, inner]` to result 0.
fn copy_items(cx: &Cx, io: &mut Io, places: &[usize], len: usize, inner: usize) -> Result<()> {
    let x = io.input(0)?;
    let y = io.output(0)?;
    let outer = x.len() / (len * inner);
    for (i, p) in places.iter().enumerate() {
        let axes: Axes = [
            Axis { len: outer, src: (len * inner) as isize, dst: places.len() * inner },
            Axis { len: inner, src: 1, dst: 1 },
        ]
        .into_iter()
        .collect();
        copy_axes(cx, &axes, x, p * inner, y, i * inner)?;
    }
    Ok(())
}

/// Numbers whose order is that of the elements; NaN comes last and both zeros are equal.
pub(crate) fn sort_keys(x: TensorView) -> Result<Vec<u64>> {
    const TOP: u64 = 1 << 63;
    if let Some(texts) = x.strings() {
        let mut sorted: Vec<&String> = texts.iter().collect();
        sorted.sort_unstable();
        sorted.dedup();
        let place = |t| sorted.binary_search(&t).map_or(0, |i| i as u64);
        return Ok(texts.iter().map(place).collect());
    }
    for_dtype!(x.dtype, [F32, F64], T => {
        let key = |&v: &T| {
            let v = f64::from(v);
            if v.is_nan() {
                return u64::MAX;
            }
            let bits = (v + 0.0).to_bits();
            if bits & TOP != 0 { !bits } else { bits | TOP }
        };
        return Ok(x.as_slice::<T>()?.iter().map(key).collect());
    }, else ());
    match x.dtype {
        DType::U64 => Ok(x.as_slice::<u64>()?.to_vec()),
        _ => Ok(x.to_i64s()?.iter().map(|&v| v as u64 ^ TOP).collect()),
    }
}

/// The different elements, or slices along an axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Unique {
    axis: Option<i64>,
    sorted: bool,
}

/// Per different item the place where it is first and how often it is there; per item which one it is.
struct Groups {
    first: Vec<usize>,
    counts: Vec<i64>,
    inverse: Vec<i64>,
}

impl Unique {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Unique { axis: a.int("axis")?, sorted: a.flag_or("sorted", true)? }.into())
    }

    /// Number of items and elements of one item per outer index.
    fn items(&self, dims: &[usize]) -> Result<(usize, usize)> {
        Ok(match self.axis {
            None => (dims.iter().product(), 1),
            Some(axis) => {
                let axis = axis_index(axis, dims.len())?;
                (dims[axis], dims[axis + 1..].iter().product())
            }
        })
    }

    fn groups(&self, x: TensorView) -> Result<Groups> {
        let (len, inner) = self.items(x.dims)?;
        let keys = sort_keys(x)?;
        let outer = keys.len().checked_div(len * inner).unwrap_or(0);
        let item = |i: usize| {
            let keys = &keys;
            (0..outer * inner).map(move |k| keys[(k / inner * len + i) * inner + k % inner])
        };
        let mut order: Vec<usize> = (0..len).collect();
        order.sort_by(|&a, &b| item(a).cmp(item(b)));
        // Ranges of equal items; the sort is stable, so the first of each is its first place.
        let mut ranges: Vec<Vec<usize>> = Vec::new();
        for i in order {
            match ranges.last_mut() {
                Some(last) if item(last[0]).eq(item(i)) => last.push(i),
                _ => ranges.push(vec![i]),
            }
        }
        if !self.sorted {
            ranges.sort_by_key(|r| r[0]);
        }
        let mut inverse = vec![0; len];
        for (g, range) in ranges.iter().enumerate() {
            range.iter().for_each(|&i| inverse[i] = g as i64);
        }
        let counts = ranges.iter().map(|r| r.len() as i64).collect();
        Ok(Groups { first: ranges.iter().map(|r| r[0]).collect(), counts, inverse })
    }
}

impl Operator for Unique {
    fn name(&self) -> &'static str {
        "Unique"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_movable(x.dtype)?;
        let known = x.tensor().map(|t| Ok::<_, Error>(self.groups(t.view())?.first.len())).transpose()?;
        let count = known.map_or(Dim::Unknown, Dim::Known);
        let list = |n: Dim| Fact::with_shape(DType::I64, std::iter::once(n).collect());
        let (values, items) = match (self.axis, &x.shape) {
            (None, shape) => {
                let n = shape.as_ref().map_or(Ok(Dim::Unknown), |s| {
                    s.iter().try_fold(Dim::Known(1), |n, d| super::sizes::dim_product(&n, d))
                })?;
                (Fact::with_shape(x.dtype, std::iter::once(count.clone()).collect()), n)
            }
            (Some(axis), Some(shape)) => {
                let axis = axis_index(axis, shape.len())?;
                let mut out = shape.clone();
                out[axis] = count.clone();
                (Fact::with_shape(x.dtype, out), shape[axis].clone())
            }
            (Some(_), None) => (Fact::of_dtype(x.dtype), Dim::Unknown),
        };
        cx.results(vec![values, list(count.clone()), list(items), list(count)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let groups = self.groups(x)?;
        let (len, inner) = self.items(x.dims)?;
        if !io.output(0)?.is_empty() {
            copy_items(cx, io, &groups.first, len, inner)?;
        }
        let first: Vec<i64> = groups.first.iter().map(|&p| p as i64).collect();
        for (i, list) in [first, groups.inverse, groups.counts].iter().enumerate() {
            if let Some(y) = io.outputs.get_mut(i + 1) {
                let y = y.as_slice::<i64>()?;
                if y.len() != list.len() {
                    return Err(Error::internal("another number of items than inference found"));
                }
                y.copy_from_slice(list);
            }
        }
        Ok(())
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;

    #[test]
    fn places_of_what_is_not_zero() {
        let y = OneNode::new("NonZero").run(&[f32s(&[2, 2], &[1.0, -0.0, f32::NAN, 2.0])]).unwrap();
        assert_eq!(y[0], i64s(&[2, 3], &[0, 1, 1, 0, 0, 1]));
        assert_eq!(OneNode::new("NonZero").run(&[f32s(&[3], &[0.0; 3])]).unwrap()[0].dims(), [1, 0]);
    }

    #[test]
    fn compresses() {
        let x = || f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let bools = |v: &[bool]| Tensor::from_bools(&[v.len()], v).unwrap();
        let y = OneNode::new("Compress").int("axis", 0).run(&[x(), bools(&[false, true, true])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 2], &[3.0, 4.0, 5.0, 6.0]));
        let y = OneNode::new("Compress").int("axis", 1).run(&[x(), bools(&[false, true])]).unwrap();
        assert_eq!(y[0], f32s(&[3, 1], &[2.0, 4.0, 6.0]));
        let y = OneNode::new("Compress").run(&[x(), bools(&[false, true, false, false, true])]).unwrap();
        assert_eq!(y[0], f32s(&[2], &[2.0, 5.0]));
        assert!(OneNode::new("Compress").int("axis", 1).run(&[x(), bools(&[false, true, true])]).is_err());
    }

    #[test]
    fn different_elements_and_slices() {
        let x = || f32s(&[6], &[2.0, 1.0, 1.0, 3.0, 4.0, 3.0]);
        let y = OneNode::new("Unique").outputs(4).int("sorted", 0).run(&[x()]).unwrap();
        assert_eq!(y[0], f32s(&[4], &[2.0, 1.0, 3.0, 4.0]));
        assert_eq!(y[1], i64s(&[4], &[0, 1, 3, 4]));
        assert_eq!(y[2], i64s(&[6], &[0, 1, 1, 2, 3, 2]));
        assert_eq!(y[3], i64s(&[4], &[1, 2, 2, 1]));
        let x = f32s(&[3, 3], &[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 3.0, 4.0]);
        let y = OneNode::new("Unique").outputs(4).int("axis", 0).run(&[x]).unwrap();
        assert_eq!(y[0], f32s(&[2, 3], &[1.0, 0.0, 0.0, 2.0, 3.0, 4.0]));
        assert_eq!(y[2], i64s(&[3], &[0, 0, 1]));
        assert_eq!(OneNode::new("Unique").run(&[f32s(&[0], &[])]).unwrap()[0].dims(), [0]);
    }
}
