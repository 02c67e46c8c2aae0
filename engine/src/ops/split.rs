//! Split.

use super::sizes::{Ints, check_movable, copy_axes, ints, loose_sizes, permuted_axis, sizes_fact};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, axis_index};
use crate::tensor::Dims;
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Split", 2, Split::parse)];

/// Consecutive parts along an axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// In `-rank..rank`.
    pub axis: i64,
    /// Sizes of the parts, when they stand in the node (up to opset 12).
    pub sizes: Option<Vec<i64>>,
    /// Into how many parts; the last one is smaller when it does not come out even (from opset 18 on).
    pub parts: Option<usize>,
}

impl Split {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let parts = a.int("num_outputs")?;
        if let Some(n) = parts
            && n != a.output_count() as i64
        {
            return Err(Error::invalid_model(format!(
                "num_outputs is {n}, the node names {} results",
                a.output_count()
            )));
        }
        let parts = parts.and_then(|n| usize::try_from(n).ok());
        Ok(Split { axis: a.int_or("axis", 0)?, sizes: a.ints("split")?, parts }.into())
    }

    /// Sizes of the parts of an axis of `len`, or an error when they do not make it up.
    fn lengths(&self, len: usize, outputs: usize, sizes: Option<&[i64]>) -> Result<Dims> {
        if let Some(sizes) = self.sizes.as_deref().or(sizes) {
            let lengths: Option<Dims> = sizes.iter().map(|&s| usize::try_from(s).ok()).collect();
            let total = lengths.as_ref().and_then(|l| l.iter().try_fold(0usize, |n, &s| n.checked_add(s)));
            return match lengths {
                Some(l) if total == Some(len) && l.len() == outputs => Ok(l),
                _ => Err(Error::shape(format!("sizes {sizes:?} for {outputs} parts of an axis of {len}"))),
            };
        }
        if outputs == 0 {
            return Err(Error::invalid_model("a split into no parts"));
        }
        if self.parts.is_none() && !len.is_multiple_of(outputs) {
            return Err(Error::shape(format!("an axis of {len} does not split into {outputs} equal parts")));
        }
        let part = len.div_ceil(outputs);
        Ok((0..outputs).map(|i| part.min(len.saturating_sub(i * part))).collect())
    }
}

impl Operator for Split {
    fn name(&self) -> &'static str {
        "Split"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_movable(x.dtype)?;
        let Some(shape) = &x.shape else { return Ok(vec![Fact::of_dtype(x.dtype); cx.outputs]) };
        let axis = axis_index(self.axis, shape.len())?;
        let operand = ints(cx.optional(1), "the list of sizes")?;
        let listed: Option<Vec<i64>> = match &operand {
            Ints::Known(v) => Some(v.to_vec()),
            _ => self.sizes.clone(),
        };
        let lengths: Vec<Dim> = match (&shape[axis], &operand) {
            (_, Ints::Computed(_)) => vec![Dim::Unknown; cx.outputs],
            (Dim::Known(len), _) => {
                let lengths = self.lengths(*len, cx.outputs, listed.as_deref())?;
                lengths.into_iter().map(Dim::Known).collect()
            }
            _ => {
                let of = |i: usize| usize::try_from(*listed.as_ref()?.get(i)?).ok();
                (0..cx.outputs).map(|i| of(i).map_or(Dim::Unknown, Dim::Known)).collect()
            }
        };
        let mut facts = Vec::new();
        let mut at = 0;
        for length in lengths {
            let mut part = shape.clone();
            part[axis] = length.clone();
            let mut fact = Fact::with_shape(x.dtype, part);
            if let (Some(sizes), 1, Dim::Known(n)) = (loose_sizes(x), shape.len(), length) {
                fact = sizes_fact(x.dtype, sizes.iter().skip(at).take(n).cloned().collect(), 1);
                at += n;
            }
            facts.push(fact);
        }
        Ok(facts)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let axis = axis_index(self.axis, x.rank())?;
        let outer: usize = x.dims[..axis].iter().product();
        let inner = |d: &[usize]| d[axis..].iter().product::<usize>();
        let row = inner(x.dims);
        let mut at = 0;
        for i in 0..io.outputs.len() {
            let y = io.output(i)?;
            let block = inner(y.dims);
            let axes = [Axis { len: outer, src: row as isize, dst: block }, Axis { len: block, src: 1, dst: 1 }];
            copy_axes(cx, &axes, x, at, y, 0)?;
            at += block;
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn cuts(&self, operands: &[Option<&Fact>], results: &[Dims]) -> Option<Dims> {
        let dims = operands.first()?.as_ref()?.dims()?;
        let axis = axis_index(self.axis, dims.len()).ok()?;
        let mut at = 0;
        let begin = |part: &Dims| {
            let begin = at;
            at += part.iter().product::<usize>();
            begin
        };
        dims[..axis].iter().all(|&d| d == 1).then(|| results.iter().map(begin).collect())
    }

    fn permuted(&self, perm: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        let op = Split { axis: permuted_axis(self.axis, perm)?, ..self.clone() };
        Some(Permuted { op: op.into(), roles: vec![Role::Permute, Role::Keep] })
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn each_way_to_give_the_sizes() {
        let x = || f32s(&[7], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        let y = OneNode::new("Split").int("num_outputs", 3).outputs(3).run(&[x()]).unwrap();
        assert_eq!(y[2], f32s(&[1], &[7.0]));
        let y = OneNode::new("Split").outputs(2).run(&[x(), i64s(&[2], &[2, 5])]).unwrap();
        assert_eq!((y[0].dims(), y[1].dims()), (&[2][..], &[5][..]));
        let y = OneNode::new("Split").opset(11).ints("split", &[0, 7]).outputs(2).run(&[x()]).unwrap();
        assert_eq!((y[0].dims(), &y[1]), (&[0][..], &x()));
        assert!(OneNode::new("Split").outputs(2).run(&[x()]).is_err(), "7 is odd");
        assert!(OneNode::new("Split").outputs(2).run(&[x(), i64s(&[2], &[2, 6])]).is_err());
        assert!(OneNode::new("Split").outputs(2).run(&[x(), i64s(&[2], &[-1, 8])]).is_err());
    }

    #[test]
    fn splits_columns() {
        let x = f32s(&[2, 4], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let y = OneNode::new("Split").int("axis", 1).outputs(2).run(&[x]).unwrap();
        assert_eq!(y[1], f32s(&[2, 2], &[3.0, 4.0, 7.0, 8.0]));
    }
}
