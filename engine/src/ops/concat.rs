//! Concat.

use super::sizes::{check_movable, copy_axes, dim_meet, dim_sum, loose_sizes, permuted_axis, sizes_fact};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, axis_index};
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Concat", 4, Concat::parse)];

/// The operands one behind the other along an axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Concat {
    /// In `-rank..rank`.
    pub axis: i64,
}

impl Concat {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(Concat { axis: a.required("axis", Attributes::int)? }.into())
    }
}

impl Operator for Concat {
    fn name(&self) -> &'static str {
        "Concat"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let first = cx.input(0)?;
        check_movable(first.dtype)?;
        let mut rank = None;
        for i in 0..cx.inputs.len() {
            let x = cx.input(i)?;
            if x.dtype != first.dtype {
                let (a, b) = (x.dtype, first.dtype);
                return Err(Error::dtype(format!("operand {i} is {a}, operand 0 is {b}; all must be of one type")));
            }
            if let (Some(r), Some(have)) = (x.rank(), rank)
                && r != have
            {
                return Err(Error::shape(format!("operand {i} has rank {r}, others have rank {have}")));
            }
            rank = rank.or(x.rank());
        }
        let Some(rank) = rank else { return cx.results(vec![Fact::of_dtype(first.dtype)]) };
        let axis = axis_index(self.axis, rank)?;
        let mut shape: Option<Shape> = None;
        for i in 0..cx.inputs.len() {
            let Some(s) = cx.input(i)?.shape.clone() else {
                // Sizes across the axis come from the others.
                if let Some(shape) = shape.as_mut() {
                    shape[axis] = Dim::Unknown;
                    continue;
                }
                shape = Some(Shape::from_elem(Dim::Unknown, rank));
                continue;
            };
            shape = Some(match shape {
                None => s,
                Some(have) => {
                    let mut out = Shape::new();
                    for (a, (x, y)) in have.iter().zip(&s).enumerate() {
                        out.push(match a == axis {
                            true => dim_sum(x, y)?,
                            false => dim_meet(x, y, &format!("size of axis {a} of operand {i} and those before"))?,
                        });
                    }
                    out
                }
            });
        }
        let sizes: Option<Vec<Shape>> = cx.inputs.iter().map(|x| loose_sizes(x.as_ref()?)).collect();
        if let (1, Some(parts)) = (rank, sizes) {
            return cx.results(vec![sizes_fact(first.dtype, parts.into_iter().flatten().collect(), 1)]);
        }
        cx.results(vec![Fact { dtype: first.dtype, shape, content: Default::default() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let mut at = 0;
        for i in 0..io.inputs.len() {
            let x = io.input(i)?;
            let y = io.output(0)?;
            let axis = axis_index(self.axis, y.dims.len())?;
            let outer: usize = y.dims[..axis].iter().product();
            let inner = |d: &[usize]| d[axis..].iter().product::<usize>();
            let (block, row) = (inner(x.dims), inner(y.dims));
            let axes = [Axis { len: outer, src: block as isize, dst: row }, Axis { len: block, src: 1, dst: 1 }];
            copy_axes(cx, &axes, x, 0, y, at)?;
            at += block;
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn joins(&self, result: &[usize]) -> bool {
        axis_index(self.axis, result.len()).is_ok_and(|axis| result[..axis].iter().all(|&d| d == 1))
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(&Concat { axis: permuted_axis(self.axis, perm)? }, operands.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::fact::Content;
    use crate::tensor::DType;
    use std::sync::Arc;

    #[test]
    fn joins_along_an_axis() {
        let (a, b) = (f32s(&[2, 1], &[1.0, 2.0]), f32s(&[2, 2], &[3.0, 4.0, 5.0, 6.0]));
        let y = OneNode::new("Concat").int("axis", -1).run(&[a.clone(), b.clone()]).unwrap();
        assert_eq!(y[0], f32s(&[2, 3], &[1.0, 3.0, 4.0, 2.0, 5.0, 6.0]));
        assert!(OneNode::new("Concat").int("axis", 0).run(&[a.clone(), b]).is_err());
        assert!(OneNode::new("Concat").int("axis", 0).run(&[a.clone(), i64s(&[1, 1], &[1])]).is_err());
        assert!(OneNode::new("Concat").run(&[a]).is_err(), "the axis is required");
        let y = OneNode::new("Concat").int("axis", 0).run(&[f32s(&[0], &[]), f32s(&[1], &[9.0])]).unwrap();
        assert_eq!(y[0], f32s(&[1], &[9.0]));
    }

    #[test]
    fn shape_arithmetic_keeps_names() {
        let n = Dim::Symbol("n".into());
        let sizes = sizes_fact(DType::I64, std::iter::once(n.clone()).collect(), 1);
        let rest = Fact::constant(Arc::new(i64s(&[2], &[-1, 8])));
        let out = OneNode::new("Concat").int("axis", 0).infer(&[Some(sizes), Some(rest)]).unwrap();
        assert!(matches!(&out[0].content, Content::Dims(d) if d[..] == [n, Dim::Unknown, Dim::Known(8)]));
    }
}
