//! onnxruntime's BiasGelu and FastGelu: the sum with a row, then the activation.

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::DType;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::finish::{Finish, finish};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::microsoft("BiasGelu", parse), Registration::microsoft("FastGelu", parse)];

/// `activation(x + bias)`; the bias, of the last axis, may be left out of FastGelu.
#[derive(Clone, Debug, PartialEq)]
pub struct BiasGelu {
    /// By the error function (BiasGelu) or the hyperbolic tangent (FastGelu).
    pub activation: Activation,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let fast = a.op_type() == "FastGelu";
    if !fast && !a.has_input(1) {
        return Err(Error::invalid_model("operand 1, the bias, is missing"));
    }
    Ok(BiasGelu { activation: if fast { Activation::GeluTanh } else { Activation::Gelu } }.into())
}

impl Operator for BiasGelu {
    fn name(&self) -> &'static str {
        if self.activation == Activation::Gelu { "com.microsoft.BiasGelu" } else { "com.microsoft.FastGelu" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        if let (Some(x), Some(b)) = (x.dims(), cx.optional(1).and_then(Fact::dims))
            && (b.len() != 1 || x.last() != b.first())
        {
            return Err(Error::shape(format!("the bias is of shape {b:?}; the last axis of {x:?} was wanted")));
        }
        cx.results(vec![Fact { content: Default::default(), ..x.clone() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, bias) = (io.optional(0), io.optional(1));
        let y = io.output(0)?;
        if y.dtype != DType::F32 {
            return Err(wrong_dtype("the operand", y.dtype, "float32"));
        }
        let cols = y.dims.last().copied().unwrap_or(1);
        let addend = bias.map(|b| b.as_slice::<f32>()).transpose()?;
        let y = y.as_slice::<f32>()?;
        if let Some(x) = x {
            y.copy_from_slice(x.as_slice::<f32>()?);
        }
        let f = Finish { cols, alpha: 1.0, beta: 1.0, addend, strides: [0, 1], activation: self.activation };
        finish(cx, y, &f);
        Ok(())
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};

    #[test]
    fn the_bias_comes_first() {
        let inputs = [f32s(&[2, 2], &[1.0, 5.0, 2.0, 7.0]), f32s(&[2], &[-1.0, -5.0])];
        for (name, at) in [("BiasGelu", [0.0, 0.0, 0.841_345, 1.954_5]), ("FastGelu", [0.0, 0.0, 0.841_192, 1.954_6])] {
            let y = OneNode::new(name).domain("com.microsoft").run(&inputs).unwrap();
            for (a, b) in y[0].as_slice::<f32>().unwrap().iter().zip(at) {
                assert!((a - b).abs() < 1e-4, "{name}: {a} {b}");
            }
        }
        assert!(OneNode::new("BiasGelu").domain("com.microsoft").run(&inputs[..1]).is_err());
    }
}
