//! Chains of pointwise functions, set by the optimiser: one pass over memory instead of one for each function.

use super::{Infer, Io, Operator, Permuted, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact, Shape};
use crate::tensor::DType;
use smallvec::SmallVec;
use weblane_kernels::chain::{Operand, Step, chain};
use weblane_kernels::par::Cx;

/// The file format does not have it.
pub const OPERATORS: &[Registration] = &[];

/// The steps, one after the other. Operands: what goes through them, of the result's shape, then one for each binary step:
/// of the same shape, or broadcasting to it along all axes but neighbouring ones, as one along an axis does, or the cosines
/// of rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    /// In the order of their application.
    pub steps: Vec<Step>,
}

/// How many axes of a shape lie behind those in which an operand of another shape has its elements, where it meets them one
/// by one; `None` if it is not of the forms that a chain takes.
pub(crate) fn axes_behind<D: PartialEq>(operand: &[D], of: &[D], one: &D) -> Option<usize> {
    let missing = of.len().checked_sub(operand.len())?;
    let Some(first) = operand.iter().position(|d| d != one) else { return Some(0) };
    let last = operand.iter().rposition(|d| d != one)?;
    let fits = operand[first..=last] == of[missing + first..=missing + last];
    fits.then(|| operand.len() - 1 - last)
}

/// How often an operand's elements repeat in a row; `None` if it is not of the forms that a chain takes.
fn inner(dims: &[usize], of: &[usize]) -> Option<usize> {
    if dims == of {
        return Some(1);
    }
    axes_behind(dims, of, &1).map(|n| of[of.len() - n..].iter().product())
}

impl Operator for Chain {
    fn name(&self) -> &'static str {
        "weblane.Chain"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if x.dtype != DType::F32 {
            return Err(wrong_dtype("the operand", x.dtype, "float32"));
        }
        for i in 1..cx.inputs.len() {
            if let (Some(have), Some(of)) = (cx.input(i)?.dims(), x.dims())
                && inner(&have, &of).is_none()
            {
                return Err(Error::shape(format!("operand {i} is of shape {have:?}, the chain of shape {of:?}")));
            }
        }
        cx.results(vec![Fact { content: Content::Unknown, ..x.clone() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let dims: SmallVec<[usize; 6]> = io.output(0)?.dims.into();
        let mut operands = SmallVec::<[Operand; 8]>::new();
        for i in 1..io.inputs.len() {
            let operand = io.input(i)?;
            let inner = inner(operand.dims, &dims).filter(|&n| n > 0 || operand.is_empty());
            // Without elements there is nothing that could meet one.
            operands.push(Operand { data: operand.as_slice()?, inner: inner.unwrap_or(1).max(1) });
        }
        let x = io.optional(0).map(|x| x.as_slice::<f32>()).transpose()?;
        Ok(chain(cx, &self.steps, x, &operands, io.output(0)?.as_slice()?)?)
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        let of = operands.first()?.as_ref()?.shape.as_ref()?;
        let moved = |shape: &[Dim]| {
            let missing = perm.len().checked_sub(shape.len())?;
            let at = |&axis: &usize| axis.checked_sub(missing).map_or(Dim::Known(1), |i| shape[i].clone());
            Some(perm.iter().map(at).collect::<Shape>())
        };
        let of = moved(of)?;
        for operand in &operands[1..] {
            let shape = moved(operand.as_ref()?.shape.as_ref()?)?;
            axes_behind(&shape, &of, &Dim::Known(1))?;
        }
        Permuted::elementwise(self, operands.len())
    }
}
