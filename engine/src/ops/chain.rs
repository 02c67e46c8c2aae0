//! Chains of pointwise functions, set by the optimiser: one pass over memory instead of one for each function.

use super::{Infer, Io, Operator, Permuted, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::tensor::DType;
use smallvec::SmallVec;
use weblane_kernels::chain::{Operand, Step, chain};
use weblane_kernels::par::Cx;

/// The file format does not have it.
pub const OPERATORS: &[Registration] = &[];

/// The steps, one after the other. Operands: what goes through them, of the result's shape, then one for each binary step:
/// of the same shape, or broadcasting to it with at most one axis that is not 1.
#[derive(Clone, Debug)]
pub struct Chain {
    /// In the order of their application.
    pub steps: Vec<Step>,
}

/// How often an operand's elements repeat in a row; `None` if it is not of the forms that a chain takes.
fn inner(dims: &[usize], of: &[usize]) -> Option<usize> {
    if dims == of {
        return Some(1);
    }
    let missing = of.len().checked_sub(dims.len())?;
    let mut axes = (0..dims.len()).filter(|&i| dims[i] != 1);
    match (axes.next(), axes.next()) {
        (None, _) => Some(1),
        (Some(i), None) if dims[i] == of[missing + i] => Some(of[missing + i + 1..].iter().product()),
        _ => None,
    }
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

    fn permuted(&self, _: &[usize], operands: &[Option<Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, operands.len())
    }
}
