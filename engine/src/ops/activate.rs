//! A pointwise function in one pass over the data: what the optimiser makes of functions that exporters spell out.

use super::{Infer, Io, Operator, Permuted, Registration, wrong_dtype};
use crate::error::Result;
use crate::fact::Fact;
use crate::tensor::DType;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::finish::{Finish, finish};
use weblane_kernels::par::Cx;

/// None: models do not name this operator.
pub const OPERATORS: &[Registration] = &[];

/// `activation(x)` on `float32`.
#[derive(Clone, Debug)]
pub struct Activate {
    /// The function.
    pub activation: Activation,
}

impl Operator for Activate {
    fn name(&self) -> &'static str {
        match self.activation {
            Activation::Identity => "Identity",
            Activation::Relu => "Relu",
            Activation::Clip { .. } => "Clip",
            Activation::LeakyRelu { .. } => "LeakyRelu",
            Activation::Sigmoid => "Sigmoid",
            Activation::Silu => "Swish",
            Activation::Tanh => "Tanh",
            Activation::HardSigmoid { .. } => "HardSigmoid",
            Activation::HardSwish => "HardSwish",
            Activation::Gelu | Activation::GeluTanh => "Gelu",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if x.dtype != DType::F32 {
            return Err(wrong_dtype("the operand", x.dtype, "float32"));
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Default::default() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = if io.in_place == Some(0) { None } else { Some(io.slice::<f32>(0)?) };
        let y = io.output(0)?.as_slice::<f32>()?;
        if let Some(x) = x {
            y.copy_from_slice(x);
        }
        // Rows of this length for the kernel, which hands rows to threads.
        const ROW: usize = 4096;
        let (rows, rest) = y.split_at_mut(y.len() / ROW * ROW);
        for (part, cols) in [(rows, ROW), (rest, 0)] {
            let cols = if cols == 0 { part.len() } else { cols };
            let step =
                Finish { cols, alpha: 1.0, beta: 0.0, addend: None, strides: [0, 0], activation: self.activation };
            finish(cx, part, &step);
        }
        Ok(())
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, _perm: &[usize], _operands: &[Option<Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 1)
    }
}
