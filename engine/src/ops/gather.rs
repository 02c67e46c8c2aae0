//! Gather, GatherElements and GatherND.

use super::sizes::{check_movable, element_size, kernel_error, loose_sizes, sizes_fact, strides};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, axis_index};
use crate::tensor::{DType, TensorView};
use smallvec::SmallVec;
use std::borrow::Cow;
use weblane_kernels::movement::{self, copy_block, normalize, out_of_range};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("Gather", 1, |a| Ok(Gather { axis: a.int_or("axis", 0)? }.into())),
    Registration::onnx("GatherElements", 11, |a| Ok(GatherElements { axis: a.int_or("axis", 0)? }.into())),
    Registration::onnx("GatherND", 11, GatherNd::parse),
];

/// Checks the element type of a list of indices.
pub(crate) fn check_indices(fact: &Fact) -> Result<()> {
    match fact.dtype {
        DType::I32 | DType::I64 => Ok(()),
        other => Err(Error::dtype(format!("the indices are {other}; int32 or int64 was wanted"))),
    }
}

/// Slices along an axis, at the places that operand 1 says.
#[derive(Clone, Debug, PartialEq)]
pub struct Gather {
    /// In `-rank..rank`.
    pub axis: i64,
}

impl Operator for Gather {
    fn name(&self) -> &'static str {
        "Gather"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, indices) = (cx.input(0)?, cx.input(1)?);
        check_movable(x.dtype)?;
        check_indices(indices)?;
        let (Some(shape), Some(at)) = (&x.shape, &indices.shape) else {
            return cx.results(vec![Fact::of_dtype(x.dtype)]);
        };
        let axis = axis_index(self.axis, shape.len())?;
        let out: Shape = shape[..axis].iter().chain(at).chain(&shape[axis + 1..]).cloned().collect();
        if let (Some(sizes), Some(list), true) = (loose_sizes(x), indices.i64s(), shape.len() == 1 && at.len() <= 1) {
            let size = |i: &i64| {
                let place = normalize(*i, sizes.len()).ok_or_else(|| kernel_error(out_of_range(*i, sizes.len())))?;
                Ok(sizes.get(place).cloned().unwrap_or(Dim::Unknown))
            };
            let taken = list.iter().map(size).collect::<Result<Shape>>()?;
            return cx.results(vec![sizes_fact(x.dtype, taken, at.len())]);
        }
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, indices) = (io.input(0)?, io.input(1)?);
        let axis = axis_index(self.axis, x.rank())?;
        let outer: usize = x.dims[..axis].iter().product();
        let block: usize = x.dims[axis + 1..].iter().product();
        let len = x.dims[axis];
        let y = io.output(0)?;
        if let (Some(from), Some(to)) = (x.strings(), y.strings()) {
            let list = indices.to_i64s()?;
            for (k, to) in to.iter_mut().enumerate() {
                let (o, i, b) = (k / block / list.len().max(1), list[k / block % list.len()], k % block);
                let place = normalize(i, len).ok_or_else(|| kernel_error(out_of_range(i, len)))?;
                to.clone_from(&from[(o * len + place) * block + b]);
            }
            return Ok(());
        }
        let bytes = block * element_size(x.dtype)?;
        match indices.dtype {
            DType::I64 => movement::gather(cx, outer, len, bytes, x.bytes(), indices.as_slice::<i64>()?, y.bytes()),
            _ => movement::gather(cx, outer, len, bytes, x.bytes(), indices.as_slice::<i32>()?, y.bytes()),
        }
        .map_err(kernel_error)
    }

    fn takes_half(&self) -> bool {
        true
    }
}

/// `y[i, j, ..] = x[i, indices[i, j, ..], ..]`: an index of its own for each element.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherElements {
    /// In `-rank..rank`.
    pub axis: i64,
}

impl Operator for GatherElements {
    fn name(&self) -> &'static str {
        "GatherElements"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, indices) = (cx.input(0)?, cx.input(1)?);
        check_movable(x.dtype)?;
        check_indices(indices)?;
        check_elementwise_indices(x, indices, self.axis)?;
        cx.results(vec![Fact { dtype: x.dtype, shape: indices.shape.clone(), content: Default::default() }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (x, indices) = (io.input(0)?, io.input(1)?);
        let places = elementwise_places(x.dims, indices, self.axis)?;
        move_blocks(io, &places, 1)
    }

    fn takes_half(&self) -> bool {
        true
    }
}

/// Checks in inference the shapes that GatherElements and ScatterElements ask for.
pub(crate) fn check_elementwise_indices(x: &Fact, indices: &Fact, axis: i64) -> Result<()> {
    let (Some(shape), Some(at)) = (&x.shape, &indices.shape) else { return Ok(()) };
    let axis = axis_index(axis, shape.len())?;
    let fits = |a: usize| a == axis || !matches!((&shape[a], &at[a]), (Dim::Known(x), Dim::Known(i)) if i > x);
    if shape.len() != at.len() || !(0..at.len()).all(fits) {
        return Err(Error::shape(format!(
            "indices of shape {} into {}; the same rank and, but for axis {axis}, no larger sizes were wanted",
            indices.shape_text(),
            x.shape_text()
        )));
    }
    Ok(())
}

/// For each element of `indices`, in order, the place in a tensor of shape `dims` that it names.
pub(crate) fn elementwise_places(dims: &[usize], indices: TensorView, axis: i64) -> Result<Vec<usize>> {
    let axis = axis_index(axis, dims.len())?;
    let list = match indices.dtype {
        DType::I64 => Cow::Borrowed(indices.as_slice()?),
        _ => Cow::Owned(indices.to_i64s()?.into_vec()),
    };
    let (step, len) = (strides(dims), dims[axis]);
    let Some((&row_len, rows)) = indices.dims.split_last() else { return Ok(Vec::new()) };
    // From one element of a row to the next; along the axis, indices say how far.
    let along = if axis == rows.len() { 0 } else { 1 };
    let mut index: SmallVec<[usize; 6]> = SmallVec::from_elem(0, rows.len());
    let mut places = Vec::with_capacity(list.len());
    for row in list.chunks_exact(row_len.max(1)) {
        let base: usize = (0..rows.len()).filter(|&a| a != axis).map(|a| index[a] * step[a]).sum();
        for (k, &i) in row.iter().enumerate() {
            let at = normalize(i, len).ok_or_else(|| kernel_error(out_of_range(i, len)))?;
            places.push(base + k * along + at * step[axis]);
        }
        for a in (0..rows.len()).rev() {
            index[a] += 1;
            if index[a] < rows[a] {
                break;
            }
            index[a] = 0;
        }
    }
    Ok(places)
}

/// Writes to result 0, one behind the other, blocks of `block` elements of operand 0 that begin at the given places.
fn move_blocks(io: &mut Io, places: &[usize], block: usize) -> Result<()> {
    let x = io.input(0)?;
    let y = io.output(0)?;
    let outside = || Error::internal("a gather leaves its operand");
    if let (Some(from), Some(to)) = (x.strings(), y.strings()) {
        for (&p, to) in places.iter().zip(to.chunks_mut(block.max(1))) {
            to.clone_from_slice(from.get(p..p + block).ok_or_else(outside)?);
        }
        return Ok(());
    }
    let element = element_size(x.dtype)?;
    let (from, size) = (x.bytes(), block * element);
    for (&p, to) in places.iter().zip(y.bytes().chunks_mut(size.max(1))) {
        copy_block(from.get(p * element..p * element + size).ok_or_else(outside)?, to);
    }
    Ok(())
}

/// Slices at the places that the rows of operand 1 name; the first `batch_dims` axes are common to both.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherNd {
    /// Number of leading axes that operand and indices share.
    pub batch_dims: usize,
}

impl GatherNd {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let n = a.int_or("batch_dims", 0)?;
        let batch_dims =
            usize::try_from(n).map_err(|_| Error::invalid_model(format!("batch_dims is {n}; 0 or more was wanted")))?;
        Ok(GatherNd { batch_dims }.into())
    }
}

impl Operator for GatherNd {
    fn name(&self) -> &'static str {
        "GatherND"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, indices) = (cx.input(0)?, cx.input(1)?);
        check_movable(x.dtype)?;
        check_indices(indices)?;
        let (Some(shape), Some(at)) = (&x.shape, &indices.shape) else {
            return cx.results(vec![Fact::of_dtype(x.dtype)]);
        };
        let b = self.batch_dims;
        let wrong = || {
            Error::shape(format!(
                "indices of shape {} into {} with {b} common axes",
                indices.shape_text(),
                x.shape_text()
            ))
        };
        let Some((row, lead)) = at.split_last() else { return Err(wrong()) };
        if lead.len() < b || shape.len() < b {
            return Err(wrong());
        }
        let Some(row) = row.known() else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let differs = |a: usize| matches!((&shape[a], &lead[a]), (Dim::Known(p), Dim::Known(q)) if p != q);
        if b + row > shape.len() || (0..b).any(differs) {
            return Err(wrong());
        }
        let out = lead.iter().chain(&shape[b + row..]).cloned().collect();
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (x, indices) = (io.input(0)?, io.input(1)?);
        let b = self.batch_dims;
        let row = indices.dims.last().copied().unwrap_or(1);
        let block: usize = x.dims[b + row..].iter().product();
        let places = rows_to_places(x.dims, b, row, indices)?;
        move_blocks(io, &places, block)
    }

    fn takes_half(&self) -> bool {
        true
    }
}

/// For each row of `row` indices, the place in a tensor of shape `dims` where the slice that it names begins.
pub(crate) fn rows_to_places(dims: &[usize], batch_dims: usize, row: usize, indices: TensorView) -> Result<Vec<usize>> {
    let list = indices.to_i64s()?;
    let step = strides(dims);
    let count: usize = indices.dims[..indices.dims.len() - 1].iter().product();
    let batch: usize = dims[..batch_dims].iter().product();
    let per_batch = count.checked_div(batch).unwrap_or(0);
    let batch_size: usize = dims[batch_dims..].iter().product();
    let mut places = Vec::with_capacity(count);
    for r in 0..count {
        let mut place = r.checked_div(per_batch).unwrap_or(0) * batch_size;
        for (k, &i) in list[r * row..(r + 1) * row].iter().enumerate() {
            let len = dims[batch_dims + k];
            let at = normalize(i, len).ok_or_else(|| kernel_error(out_of_range(i, len)))?;
            place += at * step[batch_dims + k];
        }
        places.push(place);
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::fact::Content;
    use std::sync::Arc;

    #[test]
    fn rows_and_columns() {
        let x = || f32s(&[3, 2], &[1.0, 1.2, 2.3, 3.4, 4.5, 5.7]);
        let y = OneNode::new("Gather").run(&[x(), i64s(&[2, 2], &[0, 1, 1, -1])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 2, 2], &[1.0, 1.2, 2.3, 3.4, 2.3, 3.4, 4.5, 5.7]));
        let y = OneNode::new("Gather").int("axis", 1).run(&[x(), i64s(&[], &[1])]).unwrap();
        assert_eq!(y[0], f32s(&[3], &[1.2, 3.4, 5.7]));
        let e = OneNode::new("Gather").run(&[x(), i64s(&[1], &[3])]).unwrap_err();
        assert!(e.message.contains("index 3"), "{e}");
        assert!(OneNode::new("Gather").run(&[x(), f32s(&[1], &[0.0])]).is_err());
    }

    #[test]
    fn one_size_of_a_shape() {
        let n = Dim::Symbol("n".into());
        let sizes = sizes_fact(DType::I64, [n.clone(), Dim::Known(3)].into_iter().collect(), 1);
        let pick = |i| Some(Fact::constant(Arc::new(i64s(&[], &[i]))));
        let out = OneNode::new("Gather").infer(&[Some(sizes.clone()), pick(0)]).unwrap();
        assert!(matches!(&out[0].content, Content::Dims(d) if d[..] == [n]));
        let out = OneNode::new("Gather").infer(&[Some(sizes.clone()), pick(-1)]).unwrap();
        assert_eq!(out[0].i64s().unwrap()[..], [3]);
        assert!(OneNode::new("Gather").infer(&[Some(sizes), pick(2)]).is_err());
    }

    #[test]
    fn elements() {
        let x = f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let y = OneNode::new("GatherElements").int("axis", 1).run(&[x, i64s(&[2, 2], &[0, 0, 1, 0])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 2], &[1.0, 1.0, 4.0, 3.0]));
        // Along each of three axes, fewer and more of them than there are; x counts its elements.
        let dims = [3, 5, 7];
        for axis in 0..3 {
            let mut at = [2, 5, 6];
            at[axis] = 11;
            let count: usize = at.iter().product();
            let list: Vec<i64> = (0..count).map(|k| (k * 13 % dims[axis]) as i64 - dims[axis] as i64).collect();
            let x = f32s(&dims, &(0..105).map(|i| i as f32).collect::<Vec<_>>());
            let node = OneNode::new("GatherElements").int("axis", axis as i64);
            let y = node.run(&[x, i64s(&at, &list)]).unwrap();
            let want = (0..count).map(|k| {
                let mut index = [k / (at[1] * at[2]), k / at[2] % at[1], k % at[2]];
                index[axis] = k * 13 % dims[axis];
                (index[0] * 35 + index[1] * 7 + index[2]) as f32
            });
            assert_eq!(y[0].as_slice::<f32>().unwrap(), want.collect::<Vec<_>>(), "axis {axis}");
        }
    }

    #[test]
    fn slices_by_rows_of_indices() {
        let x = i64s(&[2, 2, 2], &[0, 1, 2, 3, 4, 5, 6, 7]);
        let y = OneNode::new("GatherND").run(&[x.clone(), i64s(&[2, 2], &[0, 1, 1, 0])]).unwrap();
        assert_eq!(y[0], i64s(&[2, 2], &[2, 3, 4, 5]));
        let y = OneNode::new("GatherND").int("batch_dims", 1).run(&[x.clone(), i64s(&[2, 1], &[1, 0])]).unwrap();
        assert_eq!(y[0], i64s(&[2, 2], &[2, 3, 4, 5]));
        assert!(OneNode::new("GatherND").run(&[x.clone(), i64s(&[1, 4], &[0; 4])]).is_err());
        assert!(OneNode::new("GatherND").run(&[x, i64s(&[1, 1], &[2])]).is_err());
    }
}
