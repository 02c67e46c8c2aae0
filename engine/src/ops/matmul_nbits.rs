//! MatMulNBits of onnxruntime: a product with weights of 2, 4 or 8 bits, which stay as small in memory.

use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::{DType, TensorView, element_count};
use std::sync::Arc;
use weblane_kernels::epilogue::{Activation, Epilogue};
use weblane_kernels::gemm::{Matrix, Rhs, gemm};
use weblane_kernels::nbits::{BlockZeros, Format, NBits};
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("MatMulNBits", parse)];

/// `activation(A B + bias + residual)` for A of `[..., k]`. Operands: A, B as bytes of `[n, blocks, block * bits / 8]`, scales
/// `[n, blocks]`, zero points (packed like B, or real, or left out for the middle of the range), none, bias `[n]`, a residual
/// of the result's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMulNBits {
    /// What B is.
    pub format: Format,
    /// Applied last; set by the optimiser, which adds the residual too.
    pub activation: Activation,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let size = |name: &str, value: i64| {
        usize::try_from(value).map_err(|_| Error::invalid_model(format!("attribute {name} is {value}")))
    };
    let (k, n) = (a.required("K", Attributes::int)?, a.required("N", Attributes::int)?);
    let (bits, block) = (a.int_or("bits", 4)?, a.required("block_size", Attributes::int)?);
    let format =
        Format { bits: size("bits", bits)?, block: size("block_size", block)?, k: size("K", k)?, n: size("N", n)? };
    if !matches!(format.bits, 2 | 4 | 8) {
        return Err(Error::unsupported_attribute(format!("attribute bits is {bits}; 2, 4 or 8 were wanted")));
    }
    if block < 16 || !format.block.is_power_of_two() {
        return Err(Error::unsupported_attribute(format!(
            "attribute block_size is {block}; a power of two of at least 16 was wanted"
        )));
    }
    // The least accuracy that is asked for. What is computed here is exact up to float32's rounding.
    let accuracy = a.int_or("accuracy_level", 0)?;
    if !(0..=4).contains(&accuracy) {
        return Err(Error::unsupported_attribute(format!("attribute accuracy_level is {accuracy}; 0 to 4 was wanted")));
    }
    if a.flag_or("weight_prepacked", false)? {
        return Err(Error::unsupported_attribute(
            "attribute weight_prepacked is 1: weights in the layout of one device; 0 can be computed",
        ));
    }
    if a.has_input(4) {
        return Err(Error::unsupported_attribute(
            "operand g_idx, which orders blocks anew, is given; only blocks of neighbours can be computed",
        ));
    }
    // A residual stands there in graphs of ours alone.
    if a.has_input(6) {
        return Err(Error::invalid_model("operand 6 is given; there are 6 at most"));
    }
    Ok(MatMulNBits { format, activation: Activation::Identity }.into())
}

/// Blocks may have scale 0, and a negative one where the range leans that way: quantisers write both.
fn check_finite(what: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::invalid_input(format!("{what}[{i}] is {}; a finite number was wanted", values[i]))),
    }
}

impl MatMulNBits {
    fn pack(&self, isa: Isa, b: TensorView, scales: TensorView, zeros: Option<TensorView>) -> Result<NBits> {
        let scales = scales.as_slice::<f32>()?;
        check_finite("scales", scales)?;
        let zeros = match zeros {
            None => BlockZeros::Middle,
            Some(z) if z.dtype == DType::U8 => BlockZeros::Packed(z.as_slice()?),
            Some(z) => {
                check_finite("zero_points", z.as_slice()?)?;
                BlockZeros::Real(z.as_slice()?)
            }
        };
        Ok(NBits::new(isa, self.format, b.as_slice::<u8>()?, scales, zeros)?)
    }

    /// The packed form, if all that it consists of is constant.
    fn pack_constants(&self, cx: &Prepare) -> Result<Option<Arc<NBits>>> {
        let (Some(b), Some(scales), zeros) = (cx.constant(1), cx.constant(2), cx.constant(3)) else { return Ok(None) };
        if cx.has(3) && zeros.is_none() {
            return Ok(None);
        }
        let ids = (cx.cache.id(scales)?, zeros.map(|z| cx.cache.id(z)).transpose()?);
        let kind = format!("nbits {} {:?} {ids:?}", cx.isa, self.format);
        let pack = |b: &crate::tensor::Tensor| self.pack(cx.isa, b.view(), scales.view(), zeros.map(|z| z.view()));
        Ok(Some(cx.cache.get(b, &kind, pack)?))
    }

    fn run_with(&self, cx: &Cx, io: &mut Io, b: &NBits) -> Result<()> {
        let (a, n) = (io.input(0)?, self.format.n);
        let rows = element_count(&a.dims[..a.rank().saturating_sub(1)])?;
        let a = Matrix::new(a.as_slice::<f32>()?, rows, self.format.k);
        let extra = |at| io.optional(at).map(|t| t.as_slice::<f32>()).transpose();
        let epilogue = Epilogue { bias: extra(5)?, residual: extra(6)?, activation: self.activation };
        Ok(gemm(cx, a, Rhs::Bits(b), &epilogue, io.output(0)?.as_slice::<f32>()?, n)?)
    }
}

impl Operator for MatMulNBits {
    fn name(&self) -> &'static str {
        "com.microsoft.MatMulNBits"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b, scales) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        if !a.dtype.is_float() || scales.dtype != a.dtype {
            return Err(Error::dtype(format!(
                "A is {}, the scales are {}; floats of one type were wanted",
                a.dtype, scales.dtype
            )));
        }
        if b.dtype != DType::U8 {
            return Err(wrong_dtype("B", b.dtype, "uint8"));
        }
        let Format { k, n, block, bits } = self.format;
        let blocks = self.format.blocks();
        let check = |what: &str, fact: &Fact, want: Option<usize>| {
            let Some(dims) = fact.dims() else { return Ok(()) };
            match want {
                Some(want) if element_count(&dims)? == want => Ok(()),
                Some(want) => Err(Error::shape(format!(
                    "{what} is of shape {dims:?}; {want} elements were wanted for K = {k}, N = {n}, {bits} bits in blocks of {block}"
                ))),
                None => Err(Error::limit(format!("a matrix of {k} x {n} cannot be addressed"))),
            }
        };
        check("B", b, self.format.bytes())?;
        check("scales", scales, n.checked_mul(blocks))?;
        match cx.optional(3) {
            Some(z) if z.dtype == DType::U8 => check("zero_points", z, self.format.zero_bytes())?,
            Some(z) if z.dtype == scales.dtype => check("zero_points", z, n.checked_mul(blocks))?,
            Some(z) => return Err(wrong_dtype("zero_points", z.dtype, &format!("uint8 and {}", scales.dtype))),
            None => {}
        }
        if let Some(bias) = cx.optional(5) {
            if bias.dtype != a.dtype {
                return Err(Error::dtype(format!("the bias is {}, A is {}", bias.dtype, a.dtype)));
            }
            check("the bias", bias, Some(n))?;
        }
        let constant = scales.tensor().filter(|t| t.dtype() == DType::F32 && !t.is_released());
        constant.map_or(Ok(()), |t| check_finite("scales", t.as_slice()?))?;
        let Some(shape) = &a.shape else { return cx.results(vec![Fact::of_dtype(a.dtype)]) };
        match shape.last() {
            Some(last) if last.known().is_none_or(|last| last == k) => {}
            _ => return Err(Error::shape(format!("A is {}; {k} columns were wanted", a.shape_text()))),
        }
        let rows = shape[..shape.len() - 1].iter().cloned();
        let y: Shape = rows.chain(std::iter::once(Dim::Known(n))).collect();
        let y = Fact::with_shape(a.dtype, y);
        if let (Some(r), Some(y)) = (cx.optional(6).and_then(Fact::dims), y.dims())
            && r != y
        {
            return Err(Error::shape(format!("the residual is of shape {r:?}, the result {y:?}")));
        }
        cx.results(vec![y])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let packed = self.pack(cx.isa(), io.input(1)?, io.input(2)?, io.optional(3))?;
        self.run_with(cx, io, &packed)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(packed) = self.pack_constants(cx)? else { return Ok(None) };
        let a = cx.dims(0)?;
        let rows = element_count(&a[..a.len().saturating_sub(1)])?;
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, rows })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        Ok(if self.pack_constants(cx)?.is_some() { &[1, 2, 3] } else { &[] })
    }
}

#[derive(Debug)]
struct Prepared {
    op: MatMulNBits,
    packed: Arc<NBits>,
    rows: usize,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.op.run_with(cx, io, &self.packed)
    }

    fn kernel(&self) -> &str {
        match self.op.format.bits {
            2 => "gemm, 2-bit weights",
            4 => "gemm, 4-bit weights",
            _ => "gemm, 8-bit weights",
        }
    }

    fn packed_operands(&self) -> &[usize] {
        &[1, 2, 3]
    }

    fn flops(&self) -> u64 {
        2 * self.rows.saturating_mul(self.packed.k()).saturating_mul(self.packed.n()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    fn node(bits: i64, block: i64) -> OneNode {
        OneNode::new("MatMulNBits")
            .domain("com.microsoft")
            .int("K", 16)
            .int("N", 2)
            .int("bits", bits)
            .int("block_size", block)
    }

    fn operands(columns: [u8; 2]) -> Vec<Option<Tensor>> {
        let a = f32s(&[1, 1, 16], &[1.0; 16]);
        let b: Vec<u8> = columns.iter().flat_map(|&byte| [byte; 8]).collect();
        vec![Some(a), Some(Tensor::from_slice(&[2, 1, 8], &b).unwrap()), Some(f32s(&[2, 1], &[1.0, -0.5]))]
    }

    #[test]
    fn values_by_hand() {
        // Nibbles 9 and 7, then 15 and 8: minus 8, times 8 of each, times the scale.
        let y = node(4, 16).run_optional(&operands([0x79, 0x8f])).unwrap();
        assert_eq!((y[0].dims(), y[0].as_slice::<f32>().unwrap()), (&[1, 1, 2][..], &[0.0, -28.0][..]));
        let mut with_zeros = operands([0x79, 0x8f]);
        with_zeros.push(Some(Tensor::from_slice(&[2, 1], &[0x0fu8, 0x00]).unwrap()));
        with_zeros.extend([None, Some(f32s(&[2], &[0.5, 0.25]))]);
        let y = node(4, 16).run_optional(&with_zeros).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-111.5, -91.75]);
        with_zeros[3] = Some(f32s(&[2], &[0.5, 1.5]));
        let y = node(4, 16).run_optional(&with_zeros).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [120.5, -79.75]);
    }

    #[test]
    fn mistakes_are_named() {
        let said = |node: OneNode, operands: &[Option<Tensor>]| node.run_optional(operands).unwrap_err().to_string();
        let good = || operands([1, 2]);
        assert!(said(node(3, 16), &good()).contains("bits is 3"));
        for block in [-16, 0, 8, 24] {
            assert!(said(node(4, block), &good()).contains("block_size is"), "{block}");
        }
        assert!(said(node(8, 16), &good()).contains("B is of shape [2, 1, 8]; 32 elements"));
        let mut wrong = good();
        wrong[2] = Some(f32s(&[2, 1], &[1.0, f32::NAN]));
        let e = said(node(4, 16), &wrong);
        assert!(e.contains("scales[1] is NaN") && e.contains("com.microsoft.MatMulNBits \"test\""), "{e}");
        wrong[2] = Some(f32s(&[3], &[1.0; 3]));
        assert!(said(node(4, 16), &wrong).contains("scales is of shape [3]; 2 elements"));
        wrong = good();
        wrong.push(Some(Tensor::from_slice(&[2, 2], &[0u8; 4]).unwrap()));
        assert!(said(node(4, 16), &wrong).contains("zero_points"));
        wrong[3] = Some(Tensor::from_slice(&[2], &[0i8; 2]).unwrap());
        assert!(said(node(4, 16), &wrong).contains("zero_points is int8"));
        wrong[3] = None;
        wrong.push(Some(Tensor::from_slice(&[16], &[0i32; 16]).unwrap()));
        assert!(said(node(4, 16), &wrong).contains("g_idx"));
        wrong[4] = None;
        wrong.extend([None, Some(f32s(&[1, 2], &[0.0; 2]))]);
        assert!(said(node(4, 16), &wrong).contains("operand 6 is given"));
        wrong = good();
        wrong[0] = Some(f32s(&[1, 8], &[1.0; 8]));
        assert!(said(node(4, 16), &wrong).contains("16 columns were wanted"));
        let huge = OneNode::new("MatMulNBits").domain("com.microsoft").int("K", i64::MAX).int("N", i64::MAX);
        assert!(said(huge.int("block_size", 16), &good()).contains("cannot be addressed"));
    }
}
