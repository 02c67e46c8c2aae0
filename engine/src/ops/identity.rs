//! Identity, and Dropout at inference: the operand itself.

use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact};
use crate::tensor::{DType, TensorMut, TensorView};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("Identity", 1, |_| Ok(Identity.into())), Registration::onnx("Dropout", 7, Dropout::parse)];

/// `y = x`.
#[derive(Debug, PartialEq)]
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

    fn takes_half(&self) -> bool {
        true
    }
}

/// Dropout as inference has it: the operand, and a mask that keeps everything.
#[derive(Clone, Debug, PartialEq)]
pub struct Dropout {
    /// Up to opset 9 the mask is of the operand's type.
    typed_mask: bool,
    /// Whether an operand may ask for training, and then a ratio of 0 makes it harmless.
    trains: bool,
}

impl Dropout {
    fn parse(a: &mut Attributes) -> Result<Op> {
        // Both say which elements are dropped, and inference drops none.
        a.float_or("ratio", 0.5)?;
        a.int("seed")?;
        if a.output_count() == 1 && !a.has_input(2) {
            return Ok(Identity.into());
        }
        Ok(Dropout { typed_mask: a.opset() < 10, trains: a.has_input(2) }.into())
    }
}

/// Accepts what drops nothing: no training, or a ratio of 0. A ratio that is left out is one half.
fn check_inference(training: TensorView, ratio: Option<TensorView>) -> Result<()> {
    let zero = |v: TensorView| v.bytes().iter().all(|b| *b == 0);
    if zero(training) || ratio.is_some_and(zero) {
        return Ok(());
    }
    Err(Error::unsupported_attribute("training_mode is true; inference drops no elements and can compute nothing else"))
}

impl Operator for Dropout {
    fn name(&self) -> &'static str {
        "Dropout"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        // What is not constant is looked at when it is there.
        let known = |i: usize| cx.optional(i).map(Fact::tensor);
        if self.trains
            && let Some(Some(training)) = known(2)
            && !matches!(known(1), Some(None))
        {
            check_inference(training.view(), known(1).flatten().map(|r| r.view()))?;
        }
        let dtype = if self.typed_mask { x.dtype } else { DType::Bool };
        cx.results(vec![x.clone(), Fact { dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        if let (true, Some(training)) = (self.trains, io.optional(2)) {
            check_inference(training, io.optional(1))?;
        }
        copy(io)?;
        let Some(mask) = io.outputs.get_mut(1) else { return Ok(()) };
        match mask.dtype {
            DType::Bool => mask.bytes().fill(1),
            DType::F64 => mask.as_slice::<f64>()?.fill(1.0),
            _ => mask.as_slice::<f32>()?.fill(1.0),
        }
        Ok(())
    }
}

/// Copies the elements of operand 0 to result 0, for operators that change the shape at most.
pub fn copy(io: &mut Io) -> Result<()> {
    let x = io.input(0)?;
    copy_view(&x, io.output(0)?)
}

/// Copies elements between tensors of one type and size.
pub fn copy_view(x: &TensorView, y: &mut TensorMut) -> Result<()> {
    if x.dtype != y.dtype || x.len() != y.len() {
        let (a, b) = (x.dims, y.dims);
        return Err(Error::shape(format!("{} {a:?} where {} {b:?} was expected", x.dtype, y.dtype)));
    }
    match (x.strings(), y.strings()) {
        (Some(from), Some(to)) => to.clone_from_slice(from),
        _ => y.bytes().copy_from_slice(x.bytes()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn dropout_drops_nothing() {
        let x = f32s(&[2], &[1.0, -2.0]);
        let y = OneNode::new("Dropout").int("seed", 1).outputs(2).run(&[x.clone()]).unwrap();
        assert_eq!((&y[0], &y[1]), (&x, &Tensor::from_bools(&[2], &[true, true]).unwrap()));
        let y = OneNode::new("Dropout").opset(7).float("ratio", 0.3).outputs(2).run(&[x.clone()]).unwrap();
        assert_eq!(y[1], f32s(&[2], &[1.0, 1.0]));
        let training = Tensor::from_bools(&[], &[true]).unwrap();
        let run =
            |ratio: f32| OneNode::new("Dropout").outputs(2).run(&[x.clone(), f32s(&[], &[ratio]), training.clone()]);
        assert!(run(0.5).is_err());
        assert_eq!(run(0.0).unwrap()[0], x);
    }
}
