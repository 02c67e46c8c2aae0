//! Slice.

use super::sizes::{
    Axes, Ints, check_movable, copy_axes, distinct_axes, ints, loose_sizes, permuted_axis, sizes_fact, strides,
};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, dim_min};
use crate::tensor::Dims;
use smallvec::SmallVec;
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Slice", 1, Slice::parse)];

/// Every `step`-th element from `start` to before `end`, along some axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// Starts and ends, when they stand in the node (up to opset 9).
    pub attributes: Option<(Vec<i64>, Vec<i64>)>,
    /// The axes, when they stand in the node; operand 3 does not matter then.
    pub axes: Option<Vec<i64>>,
}

type Numbers = SmallVec<[i64; 8]>;

/// What to take along one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    axis: usize,
    start: i64,
    end: i64,
    step: i64,
}

impl Range {
    /// First index and number of elements along an axis of `len`, as NumPy has it.
    fn resolve(&self, len: usize) -> (usize, usize) {
        let n = len as i64;
        let from_end = |v: i64| if v < 0 { v.saturating_add(n) } else { v };
        let (low, high) = if self.step > 0 { (0, n) } else { (-1, n - 1) };
        let start = from_end(self.start).clamp(low, high);
        let end = from_end(self.end).clamp(low, high);
        let distance = if self.step > 0 { end - start } else { start - end };
        if distance <= 0 {
            return (0, 0);
        }
        (start as usize, (distance as u64).div_ceil(self.step.unsigned_abs()) as usize)
    }

    /// Whether it takes the whole axis, whatever its length.
    fn is_whole(&self) -> bool {
        self.step == 1 && self.start == 0 && self.end >= i64::from(i32::MAX)
    }
}

impl Slice {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let axes = a.ints("axes")?;
        let attributes = match (a.ints("starts")?, a.ints("ends")?) {
            (Some(starts), Some(ends)) => Some((starts, ends)),
            (None, None) if axes.is_none() => None,
            _ => return Err(Error::invalid_model("starts and ends are wanted together")),
        };
        Ok(Slice { attributes, axes }.into())
    }

    fn ranges(&self, operands: [Option<Numbers>; 4], rank: usize) -> Result<SmallVec<[Range; 6]>> {
        let [mut starts, mut ends, mut axes, steps] = operands;
        if let Some((s, e)) = &self.attributes {
            starts = Some(s.as_slice().into());
            ends = Some(e.as_slice().into());
        }
        if let Some(a) = &self.axes {
            axes = Some(a.as_slice().into());
        }
        let missing = || Error::invalid_model("starts and ends are wanted");
        let (starts, ends) = (starts.ok_or_else(missing)?, ends.ok_or_else(missing)?);
        let axes = axes.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = steps.unwrap_or_else(|| SmallVec::from_elem(1, starts.len()));
        if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
            return Err(Error::shape(format!(
                "{} starts, {} ends, {} axes and {} steps; as many of each were wanted",
                starts.len(),
                ends.len(),
                axes.len(),
                steps.len()
            )));
        }
        if steps.contains(&0) {
            return Err(Error::invalid_input("a step of 0"));
        }
        let axes = distinct_axes(&axes, rank)?;
        Ok((0..starts.len()).map(|i| Range { axis: axes[i], start: starts[i], end: ends[i], step: steps[i] }).collect())
    }

    /// The ranges, if the operands that say them are known.
    fn known_ranges(&self, operands: &[Option<&Fact>], rank: usize) -> Option<SmallVec<[Range; 6]>> {
        let mut numbers = [None, None, None, None];
        for (i, numbers) in numbers.iter_mut().enumerate() {
            if let Some(fact) = operands.get(i + 1).and_then(Option::as_ref) {
                *numbers = Some(fact.i64s()?);
            }
        }
        self.ranges(numbers, rank).ok()
    }

    /// Start and step along each axis where every element from a start on is taken, `step` apart; `None` for other cuts
    /// and where something is not known.
    pub(crate) fn strided(&self, operands: &[Option<&Fact>]) -> Option<SmallVec<[(usize, usize); 6]>> {
        let dims = operands.first()?.as_ref()?.dims()?;
        let mut axes = SmallVec::from_elem((0, 1), dims.len());
        for range in self.known_ranges(operands, dims.len())? {
            let (start, count) = range.resolve(dims[range.axis]);
            let step = usize::try_from(range.step).ok()?;
            if count == 0 || count != (dims[range.axis] - start).div_ceil(step) {
                return None;
            }
            axes[range.axis] = (start, step);
        }
        Some(axes)
    }
}

impl Operator for Slice {
    fn name(&self) -> &'static str {
        "Slice"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_movable(x.dtype)?;
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let mut operands = [None, None, None, None];
        let mut computed = false;
        for (i, what) in ["starts", "ends", "the list of axes", "steps"].iter().enumerate() {
            match ints(cx.optional(i + 1), what)? {
                Ints::Known(v) => operands[i] = Some(v),
                Ints::Computed(_) => computed = true,
                Ints::Absent => {}
            }
        }
        if let Some(a) = &self.axes {
            operands[2] = Some(a.as_slice().into());
        }
        if computed {
            // Axes that are not named keep their size.
            let mut shape = shape.clone();
            match &operands[2] {
                Some(axes) => {
                    // The first so many elements, where only the end is computed, and it is a size.
                    let all = |i: usize, n: i64| operands[i].as_ref().is_some_and(|v| v.iter().all(|&v| v == n));
                    let from_start = all(0, 0) && (all(3, 1) || cx.optional(4).is_none());
                    let ends = cx.optional(2).and_then(Fact::sizes).filter(|_| from_start);
                    for (i, a) in distinct_axes(axes, shape.len())?.into_iter().enumerate() {
                        let end = ends.as_ref().and_then(|ends| ends.get(i)).unwrap_or(&Dim::Unknown);
                        shape[a] = match &shape[a] {
                            Dim::Known(n) => dim_min(*n, end),
                            d if d == end => d.clone(),
                            _ => Dim::Unknown,
                        };
                    }
                }
                None => shape.iter_mut().for_each(|d| *d = Dim::Unknown),
            }
            return cx.results(vec![Fact::with_shape(x.dtype, shape)]);
        }
        let ranges = self.ranges(operands, shape.len())?;
        let mut out = shape.clone();
        for r in &ranges {
            out[r.axis] = match &shape[r.axis] {
                Dim::Known(n) => Dim::Known(r.resolve(*n).1),
                d if r.is_whole() => d.clone(),
                _ => Dim::Unknown,
            };
        }
        if let (Some(sizes), 1) = (loose_sizes(x), shape.len()) {
            let (start, count, step) = match ranges.first() {
                Some(r) => (r.resolve(sizes.len()).0, r.resolve(sizes.len()).1, r.step),
                None => (0, sizes.len(), 1),
            };
            let at = |i: usize| sizes.get((start as i64 + step.saturating_mul(i as i64)) as usize).cloned();
            let taken = (0..count).map(|i| at(i).unwrap_or(Dim::Unknown)).collect();
            return cx.results(vec![sizes_fact(x.dtype, taken, 1)]);
        }
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let list = |i| io.optional(i).map(|v| v.to_i64s()).transpose();
        let ranges = self.ranges([list(1)?, list(2)?, list(3)?, list(4)?], x.rank())?;
        let from = strides(x.dims);
        let y = io.output(0)?;
        let to = strides(y.dims);
        let mut offset = 0;
        let mut axes: Axes =
            (0..x.rank()).map(|a| Axis { len: y.dims[a], src: from[a] as isize, dst: to[a] }).collect();
        for r in ranges {
            let (start, count) = r.resolve(x.dims[r.axis]);
            offset += start * from[r.axis];
            // One element needs no step, and the step may be out of all proportion.
            let step = if count > 1 { r.step as isize } else { 0 };
            axes[r.axis].src = step.saturating_mul(from[r.axis] as isize);
        }
        copy_axes(cx, &axes, x, offset, y, 0)
    }

    fn cuts(&self, operands: &[Option<&Fact>], results: &[Dims]) -> Option<Dims> {
        let dims = operands.first()?.as_ref()?.dims()?;
        let taken = results.first()?;
        // From the first axis of which more than one element is taken, what lies behind must be taken whole.
        let first = taken.iter().position(|&n| n != 1).unwrap_or(taken.len());
        let is_run = dims.iter().zip(taken).skip(first + 1).all(|(have, taken)| have == taken);
        let mut begin = 0;
        for range in self.known_ranges(operands, dims.len())? {
            if range.step != 1 && taken[range.axis] > 1 {
                return None;
            }
            begin += range.resolve(dims[range.axis]).0 * dims[range.axis + 1..].iter().product::<usize>();
        }
        is_run.then(|| [begin].into_iter().collect())
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        let operand = |i: usize| operands.get(i).and_then(Option::as_ref);
        let axes: Vec<i64> = match (&self.axes, operand(3)) {
            (Some(axes), _) => axes.clone(),
            (None, Some(axes)) => axes.i64s()?.to_vec(),
            (None, None) => {
                let count = match &self.attributes {
                    Some((starts, _)) => starts.len(),
                    None => operand(1)?.dims()?.iter().product(),
                };
                (0..count as i64).collect()
            }
        };
        let axes = Some(axes.iter().map(|&a| permuted_axis(a, perm)).collect::<Option<_>>()?);
        let mut roles = vec![Role::Keep; 5];
        roles[0] = Role::Permute;
        Some(Permuted { op: Slice { attributes: self.attributes.clone(), axes }.into(), roles })
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1, 2, 3, 4]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::tensor::DType;
    use std::sync::Arc;

    fn numbers(v: &[i64]) -> crate::tensor::Tensor {
        i64s(&[v.len()], v)
    }

    #[test]
    fn ranges_as_numpy_has_them() {
        let x = f32s(&[6], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let cases: [(i64, i64, i64, &[f32]); 10] = [
            (1, 4, 1, &[1.0, 2.0, 3.0]),
            (-2, i64::MAX, 1, &[4.0, 5.0]),
            (0, -1, 2, &[0.0, 2.0, 4.0]),
            (5, -7, -2, &[5.0, 3.0, 1.0]),
            (i64::MAX, i64::MIN, -1, &[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]),
            (-1, 0, -3, &[5.0, 2.0]),
            (4, 2, 1, &[]),
            (9, 12, 1, &[]),
            (0, 6, i64::MAX, &[0.0]),
            (5, i64::MIN, i64::MIN, &[5.0]),
        ];
        for (start, end, step, want) in cases {
            let y = OneNode::new("Slice")
                .run(&[x.clone(), numbers(&[start]), numbers(&[end]), numbers(&[0]), numbers(&[step])])
                .unwrap();
            assert_eq!(y[0], f32s(&[want.len()], want), "{start}:{end}:{step}");
        }
        let zero = OneNode::new("Slice").run(&[x, numbers(&[0]), numbers(&[1]), numbers(&[0]), numbers(&[0])]);
        assert!(zero.is_err());
    }

    #[test]
    fn attributes_of_old_opsets() {
        let x = f32s(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let node = OneNode::new("Slice").opset(9).ints("starts", &[1]).ints("ends", &[9]).ints("axes", &[-1]);
        assert_eq!(node.run(&[x]).unwrap()[0], f32s(&[2, 2], &[2.0, 3.0, 5.0, 6.0]));
    }

    #[test]
    fn permuted_ranges_follow_their_axes() {
        let slice = Slice { attributes: Some((vec![0, 1], vec![2, 3])), axes: Some(vec![-1, 0]) };
        let permuted = slice.permuted(&[0, 2, 3, 1], &[]).unwrap();
        assert_eq!(permuted.op.get::<Slice>().unwrap().axes, Some(vec![2, 0]));
    }

    #[test]
    fn names_stay_where_nothing_is_cut() {
        let n = Dim::Symbol("n".into());
        let x = Fact::with_shape(DType::F32, [n.clone(), Dim::Known(4)].into_iter().collect());
        let constant = |v: &[i64]| Some(Fact::constant(Arc::new(numbers(v))));
        let out = OneNode::new("Slice").infer(&[Some(x.clone()), constant(&[0, 1]), constant(&[i64::MAX, 3])]).unwrap();
        assert_eq!(out[0].shape.as_ref().unwrap()[..], [n.clone(), Dim::Known(2)]);
        let computed = Some(Fact::new(DType::I64, &[1]));
        let out = OneNode::new("Slice").infer(&[Some(x), constant(&[0]), computed, constant(&[1])]).unwrap();
        assert_eq!(out[0].shape.as_ref().unwrap()[..], [n, Dim::Unknown]);
    }
}
