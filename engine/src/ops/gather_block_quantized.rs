//! GatherBlockQuantized of onnxruntime: slices of a table of few bits, as real numbers.

use super::gather::check_indices;
use super::sizes::kernel_error;
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, axis_index};
use crate::tensor::{DType, Dims, TensorView};
use weblane_kernels::movement::{normalize, out_of_range};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("GatherBlockQuantized", parse)];

/// Operands: data, indices, scales (one for each block), zero points (stored like the data).
///
/// Data of `uint8` has elements of `bits` bits, several in a byte along its last axis, low bits first; its zero points
/// are the middle of the range unless given, those of `int4` and `uint4` are 0.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherBlockQuantized {
    /// The axis that the indices count.
    pub gather_axis: i64,
    /// The axis that is cut into blocks.
    pub quantize_axis: i64,
    /// Neighbours along it that share scale and zero point.
    pub block: usize,
    /// Bits of an element where the data is of bytes.
    pub bits: usize,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let (block, bits) = (a.int_or("block_size", 128)?, a.int_or("bits", 4)?);
    let fits = |b: &usize| *b >= 16 && b.is_power_of_two();
    let block = usize::try_from(block).ok().filter(fits).ok_or_else(|| {
        Error::unsupported_attribute(format!(
            "attribute block_size is {block}; a power of two of at least 16 was wanted"
        ))
    })?;
    if !matches!(bits, 2 | 4 | 8) {
        return Err(Error::unsupported_attribute(format!("attribute bits is {bits}; 2, 4 or 8 were wanted")));
    }
    Ok(GatherBlockQuantized {
        gather_axis: a.int_or("gather_axis", 0)?,
        quantize_axis: a.int_or("quantize_axis", 1)?,
        block,
        bits: bits as usize,
    }
    .into())
}

/// Element `i` of packed unsigned numbers, or of signed ones.
fn unpack(bytes: &[u8], bits: usize, signed: bool, i: usize) -> i32 {
    let q = i32::from(bytes[i * bits / 8] >> (i * bits % 8)) & ((1 << bits) - 1);
    if signed && q >= 1 << (bits - 1) { q - (1 << bits) } else { q }
}

impl GatherBlockQuantized {
    /// Elements in one of the data's.
    fn components(&self, dtype: DType) -> usize {
        if dtype == DType::U8 { 8 / self.bits } else { 1 }
    }

    /// Both axes; data of bytes has fixed ones.
    fn axes(&self, dtype: DType, rank: usize) -> Result<(usize, usize)> {
        let (gather, quantize) = (axis_index(self.gather_axis, rank)?, axis_index(self.quantize_axis, rank)?);
        if dtype == DType::U8 && (gather != 0 || quantize + 1 != rank || rank < 2) {
            return Err(Error::unsupported_attribute(format!(
                "gather_axis {gather} and quantize_axis {quantize} of uint8 data of rank {rank}; the first and the last \
                 of two axes or more were wanted"
            )));
        }
        Ok((gather, quantize))
    }

    fn check(&self, data: &Fact, scales: &Fact, zeros: Option<&Fact>) -> Result<()> {
        let Some(rank) = data.rank() else { return Ok(()) };
        let (_, axis) = self.axes(data.dtype, rank)?;
        let (Some(shape), Some(met)) = (data.dims(), scales.dims()) else { return Ok(()) };
        let components = self.components(data.dtype);
        let elements = shape[axis].checked_mul(components).ok_or_else(|| Error::limit("an axis overflows"))?;
        let mut want: Dims = shape.clone();
        want[axis] = elements.div_ceil(self.block);
        if met != want {
            return Err(Error::shape(format!(
                "scales of shape {met:?} for data of shape {shape:?}; {want:?} was wanted"
            )));
        }
        want[axis] = want[axis].div_ceil(components);
        match zeros.and_then(Fact::dims) {
            Some(met) if met != want => Err(Error::shape(format!(
                "zero points of shape {met:?} for data of shape {shape:?}; {want:?} was wanted"
            ))),
            _ => Ok(()),
        }
    }
}

impl Operator for GatherBlockQuantized {
    fn name(&self) -> &'static str {
        "com.microsoft.GatherBlockQuantized"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (data, indices, scales, zeros) = (cx.input(0)?, cx.input(1)?, cx.input(2)?, cx.optional(3));
        check_indices(indices)?;
        match data.dtype {
            DType::U8 => {}
            DType::U4 | DType::I4 if self.bits == 4 => {}
            DType::U4 | DType::I4 => {
                return Err(Error::unsupported_attribute(format!(
                    "attribute bits is {}, data is {}",
                    self.bits, data.dtype
                )));
            }
            other => return Err(wrong_dtype("data", other, "uint8, uint4 and int4")),
        }
        if !scales.dtype.is_float() {
            return Err(wrong_dtype("the scales", scales.dtype, "floats"));
        }
        if let Some(z) = zeros.filter(|z| z.dtype != data.dtype) {
            return Err(Error::dtype(format!("zero_points is {}, data is {}", z.dtype, data.dtype)));
        }
        self.check(data, scales, zeros)?;
        if let Some(t) = scales.tensor().filter(|t| t.dtype() == DType::F32)
            && let Some(bad) = t.as_slice::<f32>()?.iter().find(|v| !v.is_finite())
        {
            return Err(Error::invalid_input(format!("a scale is {bad}; finite numbers were wanted")));
        }
        let (Some(shape), Some(at)) = (&data.shape, &indices.shape) else {
            return cx.results(vec![Fact::of_dtype(scales.dtype)]);
        };
        let (axis, _) = self.axes(data.dtype, shape.len())?;
        let mut y: Shape = shape[..axis].iter().chain(at).chain(&shape[axis + 1..]).cloned().collect();
        if let Some(last) = y.last_mut() {
            *last = match last.known() {
                Some(n) => n
                    .checked_mul(self.components(data.dtype))
                    .map(Dim::Known)
                    .ok_or_else(|| Error::limit("an axis overflows"))?,
                None if self.components(data.dtype) == 1 => last.clone(),
                None => Dim::Unknown,
            };
        }
        cx.results(vec![Fact::with_shape(scales.dtype, y)])
    }

    fn run(&self, _cx: &Cx, io: &mut Io) -> Result<()> {
        let (data, indices, scales, zeros) = (io.input(0)?, io.input(1)?, io.input(2)?, io.optional(3));
        let (gather, axis) = self.axes(data.dtype, data.rank())?;
        let (components, signed) = (self.components(data.dtype), data.dtype == DType::I4);
        let bits = if data.dtype == DType::U8 { self.bits } else { 4 };
        let mut shape: Dims = data.dims.into();
        shape[axis] *= components;
        let scale = scales.as_slice::<f32>()?;
        let (blocks, n): (usize, usize) = (scales.dims[axis], shape[axis]);
        let behind: usize = shape[axis + 1..].iter().product();
        // Zero points of bytes begin each row of blocks with a byte of their own.
        let zero = |z: TensorView, s: usize| {
            let row = blocks.div_ceil(components) * components;
            let at = if components > 1 { s / blocks * row + s % blocks } else { s };
            unpack(z.bytes(), bits, signed, at)
        };
        let middle = if data.dtype == DType::U8 { 1 << (bits - 1) } else { 0 };
        let (rows, len, inner) =
            (shape[..gather].iter().product::<usize>(), shape[gather], shape[gather + 1..].iter().product::<usize>());
        let list = indices.to_i64s()?;
        let y = io.output(0)?.as_slice::<f32>()?;
        for (slice, y) in y.chunks_exact_mut(inner.max(1)).enumerate().take(rows * list.len()) {
            let (row, i) = (slice / list.len(), list[slice % list.len()]);
            let place = normalize(i, len).ok_or_else(|| kernel_error(out_of_range(i, len)))?;
            let from = (row * len + place) * inner;
            for (j, y) in y.iter_mut().enumerate() {
                let at = from + j;
                let (x, block, z) = (at / (n * behind), at / behind % n / self.block, at % behind);
                let s = (x * blocks + block) * behind + z;
                let zero = zeros.map_or(middle, |z| zero(z, s));
                *y = (unpack(data.bytes(), bits, signed, at) - zero) as f32 * scale[s];
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::tensor::Tensor;

    fn node() -> OneNode {
        OneNode::new("GatherBlockQuantized").domain("com.microsoft").int("block_size", 16)
    }

    #[test]
    fn rows_by_hand() {
        let data: Vec<u8> = [[0x21u8; 16], [0x98; 16]].concat();
        let data = Tensor::from_slice(&[2, 16], &data).unwrap();
        let scales = f32s(&[2, 2], &[1.0, 2.0, 0.5, -1.0]);
        let y = node().run(&[data.clone(), i64s(&[2], &[1, -2]), scales.clone()]).unwrap();
        assert_eq!(y[0].dims(), [2, 32]);
        let y = y[0].as_slice::<f32>().unwrap();
        assert_eq!([y[0], y[1], y[16], y[17]], [0.0, 0.5, 0.0, -1.0]);
        assert_eq!([y[32], y[33], y[48], y[49]], [-7.0, -6.0, -14.0, -12.0]);
        let zeros = Tensor::from_slice(&[2, 1], &[0x31u8, 0x00]).unwrap();
        let y = node().run(&[data, i64s(&[], &[0]), scales, zeros]).unwrap();
        let y = y[0].as_slice::<f32>().unwrap();
        assert_eq!([y[0], y[1], y[16], y[17]], [0.0, 1.0, -4.0, -2.0]);
    }

    #[test]
    fn mistakes_are_named() {
        let data = Tensor::from_slice(&[2, 16], &[0u8; 32]).unwrap();
        let run = |node: OneNode, at: i64, scales: Tensor| node.run(&[data.clone(), i64s(&[1], &[at]), scales]);
        let good = || f32s(&[2, 2], &[1.0; 4]);
        assert!(run(node(), 1, good()).is_ok());
        assert!(run(node(), 2, good()).is_err(), "an index out of range");
        assert!(run(node(), 1, f32s(&[2, 1], &[1.0; 2])).unwrap_err().message.contains("[2, 2] was wanted"));
        assert!(run(node(), 1, f32s(&[2, 2], &[f32::INFINITY; 4])).unwrap_err().message.contains("finite"));
        assert!(run(node().int("bits", 5), 1, good()).unwrap_err().message.contains("bits is 5"));
        let e = OneNode::new("GatherBlockQuantized").domain("com.microsoft").int("block_size", 20);
        assert!(run(e, 1, good()).unwrap_err().message.contains("block_size is 20"));
        assert!(run(node().int("gather_axis", 1), 1, good()).unwrap_err().message.contains("gather_axis 1"));
    }
}
