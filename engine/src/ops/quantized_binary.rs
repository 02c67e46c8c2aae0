//! Sums and products of quantised tensors, with NumPy broadcasting: what the optimiser makes of `Add` and `Mul` between
//! `DequantizeLinear` and `QuantizeLinear`.

use super::qparams::{bytes, bytes_mut, check_byte};
use super::sizes::broadcast_strides;
use super::{Infer, Io, Operator, Permuted, Registration};
use crate::error::Result;
use crate::fact::{Fact, broadcast};
use crate::tensor::{DType, TensorMut, TensorView};
use weblane_kernels::int8::{Binary, Bytes, BytesMut, Function, binary};
use weblane_kernels::par::Cx;

/// No model has this operator by name.
pub const OPERATORS: &[Registration] = &[];

/// `clamp(round(f(a - a_zero, b - b_zero) + offset) + zero, lo, hi)`; see [`Binary`].
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedBinary {
    /// Function, zero points and bounds.
    pub binary: Binary,
    /// Element type of the result: `uint8` or `int8`.
    pub dtype: DType,
}

/// The first axis from which on an operand of shape `x` is repeated as a whole until it has the shape `y`.
fn repeats_from(x: &[usize], y: &[usize]) -> usize {
    let missing = y.len().saturating_sub(x.len());
    let size = |axis: usize| axis.checked_sub(missing).map_or(1, |i| x[i]);
    // From the last axis to the first: those of full size, then those where it repeats.
    let mut axis = y.len();
    while axis > 0 && size(axis - 1) == y[axis - 1] {
        axis -= 1;
    }
    while axis > 0 && size(axis - 1) == 1 {
        axis -= 1;
    }
    axis
}

fn part<'a>(x: &Bytes<'a>, from: usize, len: usize) -> Bytes<'a> {
    match *x {
        Bytes::U8(x) => Bytes::U8(&x[from..from + len]),
        Bytes::I8(x) => Bytes::I8(&x[from..from + len]),
    }
}

impl Operator for QuantizedBinary {
    fn name(&self) -> &'static str {
        match self.binary.function {
            Function::Add { .. } => "weblane.QuantizedAdd",
            Function::Mul { .. } => "weblane.QuantizedMul",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        check_byte("an operand", a.dtype)?;
        check_byte("an operand", b.dtype)?;
        let shape = match (&a.shape, &b.shape) {
            (Some(a), Some(b)) => Some(broadcast(a, b)?),
            _ => None,
        };
        cx.results(vec![Fact { dtype: self.dtype, shape, content: Default::default() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        run(cx, &self.binary, a, b, io.output(0)?)
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 2)
    }
}

/// Combines two tensors of bytes that broadcast to the shape of `y`.
pub(super) fn run(cx: &Cx, f: &Binary, a: TensorView, b: TensorView, y: &mut TensorMut) -> Result<()> {
    if y.is_empty() {
        return Ok(());
    }
    // The axes before `inner` are walked here, the kernel repeats operands along the others.
    let dims = y.dims;
    let inner = repeats_from(a.dims, dims).max(repeats_from(b.dims, dims));
    let block: usize = dims[inner..].iter().product();
    let places = [a, b].map(|x| {
        let own = x.dims[x.rank().saturating_sub(dims.len() - inner)..].iter().product::<usize>();
        (broadcast_strides(x.dims, dims), own)
    });
    let (a, b) = (bytes(a)?, bytes(b)?);
    let at = |i: usize, strides: &[usize]| {
        let mut rest = i;
        let step = |(axis, &d): (usize, &usize)| {
            let place = rest % d * strides[axis];
            rest /= d;
            place
        };
        dims[..inner].iter().enumerate().rev().map(step).sum::<usize>()
    };
    let mut y = bytes_mut(y)?;
    for i in 0..dims[..inner].iter().product() {
        let [x, z] = [(&a, &places[0]), (&b, &places[1])].map(|(x, (strides, own))| part(x, at(i, strides), *own));
        let y = match &mut y {
            BytesMut::U8(y) => BytesMut::U8(&mut y[i * block..][..block]),
            BytesMut::I8(y) => BytesMut::I8(&mut y[i * block..][..block]),
        };
        binary(cx, f, x, z, y)?;
    }
    Ok(())
}
