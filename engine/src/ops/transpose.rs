//! Transpose.

use super::sizes::{Axes, check_movable, copy_axes, strides};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::Dims;
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Transpose", 1, Transpose::parse)];

/// Axis `a` of the result is axis `perm[a]` of the operand.
#[derive(Clone, Debug, PartialEq)]
pub struct Transpose {
    /// The permutation; `None` reverses the axes.
    pub perm: Option<Dims>,
}

impl Transpose {
    /// With a permutation.
    pub fn new(perm: &[usize]) -> Self {
        Transpose { perm: Some(perm.into()) }
    }

    fn parse(a: &mut Attributes) -> Result<Op> {
        let perm = match a.ints("perm")? {
            None => None,
            Some(list) => {
                let perm: Option<Dims> = list.iter().map(|&p| usize::try_from(p).ok()).collect();
                let valid = perm.filter(|p| (0..p.len()).all(|a| p.contains(&a)));
                Some(
                    valid
                        .ok_or_else(|| Error::invalid_model(format!("perm is {list:?}; every axis once was wanted")))?,
                )
            }
        };
        Ok(Transpose { perm }.into())
    }

    /// The permutation for an operand of this rank.
    pub fn permutation(&self, rank: usize) -> Result<Dims> {
        match &self.perm {
            None => Ok((0..rank).rev().collect()),
            Some(p) if p.len() == rank => Ok(p.clone()),
            Some(p) => Err(Error::shape(format!("perm {:?} for an operand of rank {rank}", p.as_slice()))),
        }
    }
}

impl Operator for Transpose {
    fn name(&self) -> &'static str {
        "Transpose"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_movable(x.dtype)?;
        let fact = match (&x.shape, &self.perm) {
            (Some(s), _) => {
                let perm = self.permutation(s.len())?;
                Fact::with_shape(x.dtype, perm.iter().map(|&p| s[p].clone()).collect())
            }
            (None, Some(p)) => Fact::of_rank(x.dtype, p.len()),
            (None, None) => Fact::of_dtype(x.dtype),
        };
        cx.results(vec![fact])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let perm = self.permutation(x.rank())?;
        let from = strides(x.dims);
        let y = io.output(0)?;
        let to = strides(y.dims);
        let axes: Axes =
            perm.iter().zip(&to).map(|(&p, &dst)| Axis { len: x.dims[p], src: from[p] as isize, dst }).collect();
        copy_axes(cx, &axes, x, 0, y, 0)
    }

    fn takes_half(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};

    #[test]
    fn permutes() {
        let x = f32s(&[1, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let y = OneNode::new("Transpose").run(&[x.clone()]).unwrap();
        assert_eq!(y[0], f32s(&[3, 2, 1], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        let y = OneNode::new("Transpose").ints("perm", &[1, 0, 2]).run(&[x.clone()]).unwrap();
        assert_eq!(y[0], f32s(&[2, 1, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        for wrong in [&[0, 0, 1][..], &[0, 1], &[0, 1, -1]] {
            assert!(OneNode::new("Transpose").ints("perm", wrong).run(&[x.clone()]).is_err(), "{wrong:?}");
        }
    }
}
