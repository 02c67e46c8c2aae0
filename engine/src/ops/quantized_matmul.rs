//! DynamicQuantizeMatMul and MatMulIntegerToFloat of onnxruntime: products of quantised matrices that give real numbers.

use super::matmul::{MatMul, batch_offsets};
use super::qparams::{ByPacked, Prepared, scale, scales, zero, zeros};
use super::qparams::{Count, bytes, check_byte, infer_scale, infer_zero, pack, pack_constant, part};
use super::{Compute, Infer, Io, Operator, Prepare, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::{DType, element_count};
use std::sync::Arc;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{Bytes, Output, PackedQ, QMatrix, qgemm};
use weblane_kernels::par::Cx;
use weblane_kernels::quant::{self, Grid, Sharing};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::microsoft("DynamicQuantizeMatMul", |_| Ok(QuantizedMatMul { dynamic: true }.into())),
    Registration::microsoft("MatMulIntegerToFloat", |_| Ok(QuantizedMatMul { dynamic: false }.into())),
];

/// `(A - a_zero) (B - b_zero) a_scale b_scale + bias`.
///
/// Operands of the dynamic form: A, which is real and gets quantised to `uint8` by its own range, B, b_scale,
/// b_zero_point, bias. Of the other: A, B, a_scale, b_scale, a_zero_point, b_zero_point, bias.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatMul {
    /// Whether A is real.
    pub dynamic: bool,
}

struct Places {
    b_scale: usize,
    b_zero: usize,
    bias: usize,
}

/// The last axis of B.
fn columns(b: &[usize]) -> usize {
    if b.len() > 1 { b[b.len() - 1] } else { 1 }
}

impl QuantizedMatMul {
    fn places(&self) -> Places {
        match self.dynamic {
            true => Places { b_scale: 2, b_zero: 3, bias: 4 },
            false => Places { b_scale: 3, b_zero: 5, bias: 6 },
        }
    }

    fn run_with(&self, cx: &Cx, io: &mut Io, packed: Option<&PackedQ>) -> Result<()> {
        let a = io.input(0)?;
        if !self.dynamic {
            let (a_scale, a_zero) = (scale(io.input(2)?, "a_scale")?, zero(io.optional(4), "a_zero_point")?);
            return self.multiply(cx, io, bytes(a)?, a_scale, a_zero, packed);
        }
        let x = a.as_slice::<f32>()?;
        let (a_scale, a_zero) = quant::dynamic_range([x]);
        cx.with_workspace(x.len().div_ceil(4), |work| {
            let q = &mut bytemuck::cast_slice_mut::<f32, u8>(work)[..x.len()];
            let grid = Grid { outer: 1, n: 1, inner: x.len(), sharing: Sharing::Tensor };
            quant::quantize(cx, x, &grid, &[a_scale], Some(&[a_zero]), [0.0, 255.0], q)?;
            self.multiply(cx, io, Bytes::U8(q), a_scale, a_zero.into(), packed)
        })
    }

    fn multiply(
        &self,
        cx: &Cx,
        io: &mut Io,
        a: Bytes,
        a_scale: f32,
        a_zero: i32,
        packed: Option<&PackedQ>,
    ) -> Result<()> {
        let (places, b) = (self.places(), io.input(1)?);
        let (a_dims, n) = (io.input(0)?.dims, columns(b.dims));
        let k = a_dims.last().copied().unwrap_or(1);
        let b_scale = scales(io.input(places.b_scale)?, "b_scale", n)?;
        let factor: Vec<f32> = b_scale.iter().map(|b| a_scale * b).collect();
        let bias = io.optional(places.bias).map(|b| b.as_slice::<f32>()).transpose()?;
        let zero_points = io.optional(places.b_zero);
        let real = |y| Output::Real { scale: &factor, bias, residual: None, activation: Activation::Identity, y };
        let y = io.output(0)?.as_slice::<f32>()?;
        if let Some(packed) = packed {
            let m = a.len() / k.max(1);
            // Without elements of A there is nothing to sum, but still a bias.
            let m = if k == 0 { y.len() / n.max(1) } else { m };
            return Ok(qgemm(cx, QMatrix::new(a, m, k), a_zero, packed, None, real(y))?);
        }
        let zero_points = zeros(zero_points, "b_zero_point", n)?;
        let m = if a_dims.len() > 1 { a_dims[a_dims.len() - 2] } else { 1 };
        let elements = bytes(b)?;
        for (y, [a_at, b_at]) in y.chunks_exact_mut((m * n).max(1)).zip(batch_offsets(a_dims, b.dims)?) {
            let packed = pack(cx.isa(), part(elements, b_at, k * n), [k, n], false, &zero_points)?;
            let a = QMatrix::new(part(a, a_at, m * k), m, k);
            qgemm(cx, a, a_zero, &packed, None, real(y))?;
        }
        Ok(())
    }
}

impl Operator for QuantizedMatMul {
    fn name(&self) -> &'static str {
        if self.dynamic { "com.microsoft.DynamicQuantizeMatMul" } else { "com.microsoft.MatMulIntegerToFloat" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b, places) = (cx.input(0)?, cx.input(1)?, self.places());
        check_byte("B", b.dtype)?;
        if self.dynamic && !a.dtype.is_float() {
            return Err(wrong_dtype("A", a.dtype, "floats"));
        }
        // Shapes are those of the product of real numbers.
        let real = |f: &Fact| Fact { dtype: DType::F32, content: Default::default(), ..f.clone() };
        let (real_a, real_b) = (real(a), real(b));
        let inputs = [Some(&real_a), Some(&real_b)];
        let mut y = MatMul::default().infer(&Infer { inputs: &inputs, outputs: 1, cx: cx.cx })?;
        let n = match b.shape.as_deref() {
            Some([.., _, n]) => n.known(),
            Some([_]) => Some(1),
            _ => None,
        };
        if !self.dynamic {
            check_byte("A", a.dtype)?;
            infer_scale(cx, 2, "a_scale", Count::One)?;
            infer_zero(cx, 4, "a_zero_point", a.dtype, Count::One)?;
        }
        infer_scale(cx, places.b_scale, "b_scale", Count::Columns(n))?;
        infer_zero(cx, places.b_zero, "b_zero_point", b.dtype, Count::Columns(n))?;
        let b_scale = cx.input(places.b_scale)?.dtype;
        if let Some(bias) = cx.optional(places.bias) {
            if bias.dtype != b_scale {
                return Err(wrong_dtype("the bias", bias.dtype, &format!("{b_scale}, the type of the scales,")));
            }
            let dims = bias.dims();
            if let (Some(dims), Some(n)) = (dims, n)
                && element_count(&dims)? != n
            {
                return Err(Error::shape(format!("the bias is of shape {dims:?}; {n} elements were wanted")));
            }
        }
        y.iter_mut().for_each(|f| f.dtype = b_scale);
        cx.results(y)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.run_with(cx, io, None)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(packed) = pack_constant(cx, 1, self.places().b_zero, false)? else { return Ok(None) };
        let a = cx.dims(0)?;
        let rows = element_count(&a[..a.len().saturating_sub(1)])?;
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, rows })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        Ok(if pack_constant(cx, 1, self.places().b_zero, false)?.is_some() { &[1] } else { &[] })
    }
}

impl ByPacked for QuantizedMatMul {
    const KERNEL: &'static str = "qgemm";
    const PACKED: &'static [usize] = &[1];

    fn run_packed(&self, cx: &Cx, io: &mut Io, packed: &PackedQ) -> Result<()> {
        self.run_with(cx, io, Some(packed))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    fn scalar(v: f32) -> Option<Tensor> {
        Some(f32s(&[], &[v]))
    }

    #[test]
    fn values_by_hand() {
        let a = Tensor::from_slice(&[1, 1, 2], &[3u8, 5]).unwrap();
        let b = Tensor::from_slice(&[2, 2], &[1i8, -2, 3, 4]).unwrap();
        let b_scale = Some(f32s(&[2], &[1.0, 0.5]));
        let zero = Some(Tensor::from_slice(&[], &[1u8]).unwrap());
        let bias = Some(f32s(&[2], &[0.25, 0.75]));
        let node = || OneNode::new("MatMulIntegerToFloat").domain("com.microsoft");
        let operands = vec![Some(a), Some(b.clone()), scalar(0.5), b_scale.clone(), zero, None, bias];
        let y = node().run_optional(&operands).unwrap();
        // [2, 4] x [[1, -2], [3, 4]] = [14, 12], times [0.5, 0.25], plus the bias.
        assert_eq!((y[0].dims(), y[0].as_slice::<f32>().unwrap()), (&[1, 1, 2][..], &[7.25, 3.75][..]));
        for (i, bad, said) in [(2, scalar(f32::NAN), "a_scale"), (3, Some(f32s(&[3], &[1.0; 3])), "b_scale")] {
            let mut operands = operands.clone();
            operands[i] = bad;
            assert!(node().run_optional(&operands).unwrap_err().message.contains(said));
        }
        // The range 0..255 makes the scale 1: A is exact. Two Bs, one A.
        let a = f32s(&[1, 2], &[255.0, 7.0]);
        let b = Tensor::from_slice(&[2, 2, 1], &[1u8, 2, 3, 4]).unwrap();
        let y = OneNode::new("DynamicQuantizeMatMul").domain("com.microsoft");
        let y = y.run_optional(&[Some(a), Some(b), scalar(0.5)]).unwrap();
        assert_eq!((y[0].dims(), y[0].as_slice::<f32>().unwrap()), (&[2, 1, 1][..], &[134.5, 396.5][..]));
    }
}
