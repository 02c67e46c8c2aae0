//! Identity, and Dropout at inference: the operand itself.

use super::{Infer, Io, Operator, Registration};
use crate::error::Result;
use crate::fact::Fact;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Identity", 1, |_| Ok(Identity.into()))];

/// `y = x`.
#[derive(Debug)]
pub struct Identity;

impl Operator for Identity {
    fn name(&self) -> &'static str {
        "Identity"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        cx.results(vec![cx.input(0)?.clone()])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        copy(io)
    }

    fn is_view(&self) -> bool {
        true
    }
}

/// Copies the elements of operand 0 to result 0, for operators that change the shape at most.
pub fn copy(io: &mut Io) -> Result<()> {
    let x = io.input(0)?;
    let y = io.output(0)?;
    if let (Some(from), Some(to)) = (x.strings(), y.strings()) {
        to.clone_from_slice(from);
    } else {
        y.bytes().copy_from_slice(x.bytes());
    }
    Ok(())
}
