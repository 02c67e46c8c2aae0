//! Sums and products of quantised tensors, with NumPy broadcasting: what the optimiser makes of `Add` and `Mul` between
//! `DequantizeLinear` and `QuantizeLinear`.

use super::integer_product::{bytes_mut, bytes_of, check_bytes};
use super::sizes::broadcast_strides;
use super::{Infer, Io, Operator, Permuted, Registration};
use crate::error::Result;
use crate::fact::{Fact, broadcast};
use crate::tensor::DType;
use weblane_kernels::int8::BytesMut;
use weblane_kernels::par::Cx;

/// No model has this operator by name.
pub const OPERATORS: &[Registration] = &[];

/// What is computed of `a` and `b`, the operands minus their zero points, in `float32`, every operation rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Function {
    /// `a first + b second`: each scale over that of the result.
    Add {
        /// Factor of a.
        first: f32,
        /// Factor of b.
        second: f32,
    },
    /// `a b scale`: the product of both scales over that of the result.
    Mul {
        /// Factor of the product.
        scale: f32,
    },
}

/// `clamp(round(f(a - a_zero, b - b_zero)) + zero, lo, hi)`, halves to even.
#[derive(Clone, Debug)]
pub struct QuantizedBinary {
    /// The function.
    pub function: Function,
    /// Zero points of the operands.
    pub zeros: [i32; 2],
    /// Zero point of the result.
    pub zero: i32,
    /// Least result.
    pub lo: i32,
    /// Largest result.
    pub hi: i32,
    /// Element type of the result: `uint8` or `int8`.
    pub dtype: DType,
}

impl QuantizedBinary {
    fn one(&self, a: i32, b: i32) -> i32 {
        let (a, b) = (a - self.zeros[0], b - self.zeros[1]);
        let real = match self.function {
            Function::Add { first, second } => a as f32 * first + b as f32 * second,
            Function::Mul { scale } => (a * b) as f32 * scale,
        };
        (real.round_ties_even() as i32).saturating_add(self.zero).clamp(self.lo, self.hi)
    }
}

impl Operator for QuantizedBinary {
    fn name(&self) -> &'static str {
        match self.function {
            Function::Add { .. } => "weblane.QuantizedAdd",
            Function::Mul { .. } => "weblane.QuantizedMul",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        check_bytes(a)?;
        check_bytes(b)?;
        let shape = match (&a.shape, &b.shape) {
            (Some(a), Some(b)) => Some(broadcast(a, b)?),
            _ => None,
        };
        cx.results(vec![Fact { dtype: self.dtype, shape, content: Default::default() }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        let y = io.output(0)?;
        let dims = y.dims;
        let strides = [broadcast_strides(a.dims, dims), broadcast_strides(b.dims, dims)];
        let (a, b) = (bytes_of(a)?, bytes_of(b)?);
        let mut y = bytes_mut(y)?;
        for i in 0..y.len() {
            let (mut at, mut rest) = ([0; 2], i);
            for (axis, &d) in dims.iter().enumerate().rev() {
                at.iter_mut().zip(&strides).for_each(|(at, strides)| *at += rest % d * strides[axis]);
                rest /= d;
            }
            let v = self.one(a.get(at[0]), b.get(at[1]));
            match &mut y {
                BytesMut::U8(y) => y[i] = v as u8,
                BytesMut::I8(y) => y[i] = v as i8,
            }
        }
        Ok(())
    }

    fn permuted(&self, _: &[usize], _: &[Option<Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 2)
    }
}
