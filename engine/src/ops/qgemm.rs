//! QGemm of onnxruntime: `alpha A' B' + C` of quantised matrices.

use super::qparams::{ByPacked, Prepared, scale, scales, zero, zeros};
use super::qparams::{Count, bounds, bytes, bytes_mut, check_byte, infer_scale, infer_zero, pack, pack_constant};
use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, gemm, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::tensor::{DType, element_count};
use std::sync::Arc;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{BytesMut, Output, PackedQ, QMatrix, Requantize, qgemm};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("QGemm", parse)];

/// Operands: A, its scale and zero point, B, its scale and zero point, C (in units of both scales), and scale and zero
/// point of the result, which is real without them.
#[derive(Clone, Debug, PartialEq)]
pub struct QGemm {
    /// Factor of the whole.
    pub alpha: f32,
    /// Whether A is stored as `[k, m]`.
    pub trans_a: bool,
    /// Whether B is stored as `[n, k]`.
    pub trans_b: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    if a.has_input(7) != a.has_input(8) {
        return Err(Error::invalid_model("y_scale and y_zero_point must both be given, or neither"));
    }
    Ok(QGemm {
        alpha: a.float_or("alpha", 1.0)?,
        trans_a: a.flag_or("transA", false)?,
        trans_b: a.flag_or("transB", false)?,
    }
    .into())
}

impl QGemm {
    fn run_with(&self, cx: &Cx, io: &mut Io, packed: Option<&PackedQ>) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(3)?);
        let (&[ar, ac], &[br, bc]) = (a.dims, b.dims) else {
            return Err(Error::shape(format!("A is {:?}, B is {:?}; matrices were wanted", a.dims, b.dims)));
        };
        let (m, k) = if self.trans_a { (ac, ar) } else { (ar, ac) };
        let n = if self.trans_b { br } else { bc };
        let made: PackedQ;
        let packed = match packed {
            Some(packed) => packed,
            None => {
                let zero = zeros(io.optional(5), "b_zero_point", n)?;
                made = pack(cx.isa(), bytes(b)?, [k, n], self.trans_b, &zero)?;
                &made
            }
        };
        let rows = bytes(a)?;
        let rows = if self.trans_a { QMatrix::new(rows, k, m).transposed() } else { QMatrix::new(rows, m, k) };
        let a_zero = zero(io.optional(2), "a_zero_point")?;
        let a_scale = scale(io.input(1)?, "a_scale")?;
        let factor: Vec<f32> = scales(io.input(4)?, "b_scale", n)?.iter().map(|b| self.alpha * a_scale * b).collect();
        let target = match io.optional(7) {
            None => None,
            Some(s) => Some((scale(s, "y_scale")?, zero(io.optional(8), "y_zero_point")?)),
        };
        // C for each column goes into the product; another one is added to its sums.
        let c = io.optional(6).map(|c| Ok::<_, Error>((c.as_slice::<i32>()?, c.dims))).transpose()?;
        let c_row: Option<Vec<i32>> = match c {
            Some(([one], _)) => Some(vec![*one; n]),
            Some((c, [_] | [1, _])) => Some(c.to_vec()),
            _ => None,
        };
        let c_rest = if c_row.is_some() { None } else { c };
        let y = io.output(0)?;
        let requantize = |factor: &mut [f32], y_scale: f32| factor.iter_mut().for_each(|f| *f /= y_scale);
        let mut factor = factor;
        let [lo, hi] = bounds(y.dtype);
        let zero = target.map_or(0, |t| t.1);
        if let Some((y_scale, _)) = target {
            requantize(&mut factor, y_scale);
        }
        let Some((c, c_dims)) = c_rest else {
            let output = match target {
                None => Output::Real {
                    scale: &factor,
                    bias: None,
                    residual: None,
                    activation: Activation::Identity,
                    y: y.as_slice::<f32>()?,
                },
                Some(_) => Output::Quantized {
                    requantize: Requantize { multiplier: &factor, zero, lo, hi, add: None },
                    y: bytes_mut(y)?,
                },
            };
            return Ok(qgemm(cx, rows, a_zero, packed, c_row.as_deref(), output)?);
        };
        let mut sums = vec![0; element_count(&[m, n])?];
        qgemm(cx, rows, a_zero, packed, None, Output::Sums(&mut sums))?;
        let wide = c_dims.last().is_some_and(|&d| d > 1);
        let value = |i: usize| {
            let (row, column) = (i / n, i % n);
            let sum = sums[i].wrapping_add(c[if wide { i } else { row }]);
            sum as f32 * factor[if factor.len() == 1 { 0 } else { column }]
        };
        let quantized = |i: usize| (value(i).round_ties_even() as i32).saturating_add(zero).clamp(lo, hi);
        match target {
            None => y.as_slice::<f32>()?.iter_mut().enumerate().for_each(|(i, y)| *y = value(i)),
            Some(_) => match bytes_mut(y)? {
                BytesMut::U8(y) => y.iter_mut().enumerate().for_each(|(i, y)| *y = quantized(i) as u8),
                BytesMut::I8(y) => y.iter_mut().enumerate().for_each(|(i, y)| *y = quantized(i) as i8),
            },
        }
        Ok(())
    }
}

impl Operator for QGemm {
    fn name(&self) -> &'static str {
        "com.microsoft.QGemm"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(3)?);
        check_byte("A", a.dtype)?;
        check_byte("B", b.dtype)?;
        // Shapes are those of the product of real numbers.
        let real = |f: &Fact| Fact { dtype: DType::F32, content: Default::default(), ..f.clone() };
        let mut inputs = vec![real(a), real(b)];
        if let Some(c) = cx.optional(6) {
            if c.dtype != DType::I32 {
                return Err(wrong_dtype("C", c.dtype, "int32"));
            }
            inputs.push(real(c));
        }
        let product = gemm::Gemm {
            alpha: 1.0,
            beta: 1.0,
            trans_a: self.trans_a,
            trans_b: self.trans_b,
            activation: Activation::Identity,
        };
        let inputs: Vec<Option<&Fact>> = inputs.iter().map(Some).collect();
        let mut y = product.infer(&Infer { inputs: &inputs, outputs: 1, cx: cx.cx })?;
        let n = y.first().and_then(|y| y.shape.as_ref()).and_then(|s| s.last()).and_then(Dim::known);
        infer_scale(cx, 1, "a_scale", Count::One)?;
        infer_zero(cx, 2, "a_zero_point", a.dtype, Count::One)?;
        infer_scale(cx, 4, "b_scale", Count::Columns(n))?;
        infer_zero(cx, 5, "b_zero_point", b.dtype, Count::Columns(n))?;
        let dtype = match cx.optional(8) {
            None => DType::F32,
            Some(zero) => {
                check_byte("y_zero_point", zero.dtype)?;
                infer_scale(cx, 7, "y_scale", Count::One)?;
                infer_zero(cx, 8, "y_zero_point", zero.dtype, Count::One)?;
                zero.dtype
            }
        };
        y.iter_mut().for_each(|f| f.dtype = dtype);
        cx.results(y)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.run_with(cx, io, None)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(packed) = pack_constant(cx, 3, 5, self.trans_b)? else { return Ok(None) };
        let rows = cx.dims(0)?[usize::from(self.trans_a)];
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, rows })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        Ok(if pack_constant(cx, 3, 5, self.trans_b)?.is_some() { &[3] } else { &[] })
    }
}

impl ByPacked for QGemm {
    const KERNEL: &'static str = "qgemm";
    const PACKED: &'static [usize] = &[3];

    fn run_packed(&self, cx: &Cx, io: &mut Io, packed: &PackedQ) -> Result<()> {
        self.run_with(cx, io, Some(packed))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use super::*;
    use crate::tensor::Tensor;

    fn operands(c: Option<Tensor>, quantized: bool) -> Vec<Option<Tensor>> {
        let u8s = |dims: &[usize], v: &[u8]| Some(Tensor::from_slice(dims, v).unwrap());
        let one = |v: f32| Some(f32s(&[], &[v]));
        let b = Some(Tensor::from_slice(&[2, 2], &[1i8, 2, 3, -4]).unwrap());
        let mut list = vec![u8s(&[2, 2], &[10, 11, 12, 14]), one(0.5), u8s(&[], &[10]), b];
        list.extend([Some(f32s(&[2], &[1.0, 2.0])), Some(Tensor::from_slice(&[2], &[0i8, 1]).unwrap()), c]);
        if quantized {
            list.extend([one(0.25), u8s(&[], &[100])]);
        }
        list
    }

    fn run(operands: &[Option<Tensor>]) -> Result<Vec<Tensor>> {
        OneNode::new("QGemm").domain("com.microsoft").run_optional(operands)
    }

    #[test]
    fn values_by_hand() {
        // [[0, 1], [2, 4]] x [[1, 1], [3, -5]] = [[3, -5], [14, -18]] in units of 0.5 and 1.
        let y = run(&operands(None, false)).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [1.5, -5.0, 7.0, -18.0]);
        let ints = |dims: &[usize], v: &[i32]| Some(Tensor::from_slice(dims, v).unwrap());
        let of = |c: Option<Tensor>| run(&operands(c, true)).unwrap()[0].as_slice::<u8>().unwrap().to_vec();
        assert_eq!(of(None), [106, 80, 128, 28]);
        assert_eq!(of(ints(&[2], &[1, 2])), [108, 88, 130, 36]);
        assert_eq!(of(ints(&[1], &[1])), [108, 84, 130, 32]);
        assert_eq!(of(ints(&[2, 1], &[1, 2])), [108, 84, 132, 36]);
        assert_eq!(of(ints(&[2, 2], &[1, 2, 3, 4])), [108, 88, 134, 44]);
    }

    #[test]
    fn mistakes_are_named() {
        let mut wrong = operands(None, true);
        wrong[4] = Some(f32s(&[3], &[1.0; 3]));
        assert!(run(&wrong).unwrap_err().message.contains("b_scale is of shape [3]; one number, or 2,"));
        wrong = operands(None, true);
        wrong[4] = Some(f32s(&[2], &[1.0, -1.0]));
        assert!(run(&wrong).unwrap_err().message.contains("b_scale[1] is -1"));
        wrong = operands(None, true);
        wrong.pop();
        assert!(run(&wrong).unwrap_err().message.contains("or neither"));
    }
}
