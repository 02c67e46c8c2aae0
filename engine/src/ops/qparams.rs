//! What the quantised operators share: 8-bit elements, scales and zero points with their checks, packed weights.

use super::{Compute, Infer, Io, Prepare, wrong_dtype};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorMut, TensorView, element_count};
use smallvec::{SmallVec, smallvec};
use std::fmt::Debug;
use std::sync::Arc;
use weblane_kernels::int8::{Bytes, BytesMut, Form, PackedQ, QMatrix};
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;

/// The element types of quantised tensors.
pub(super) const BYTES: &str = "uint8 and int8";

/// Refuses what is not of 8 bits.
pub(super) fn check_byte(what: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::U8 | DType::I8 => Ok(()),
        other => Err(wrong_dtype(what, other, BYTES)),
    }
}

/// 8-bit elements.
pub(super) fn bytes<'a>(v: TensorView<'a>) -> Result<Bytes<'a>> {
    match v.dtype {
        DType::U8 => Ok(Bytes::U8(v.as_slice()?)),
        DType::I8 => Ok(Bytes::I8(v.as_slice()?)),
        other => Err(wrong_dtype("an operand", other, BYTES)),
    }
}

/// 8-bit elements for writing.
pub(super) fn bytes_mut<'a>(v: &'a mut TensorMut<'_>) -> Result<BytesMut<'a>> {
    match v.dtype {
        DType::U8 => Ok(BytesMut::U8(v.as_slice()?)),
        DType::I8 => Ok(BytesMut::I8(v.as_slice()?)),
        other => Err(wrong_dtype("the result", other, BYTES)),
    }
}

/// Some of the elements.
pub(super) fn part(x: Bytes<'_>, from: usize, len: usize) -> Bytes<'_> {
    match x {
        Bytes::U8(x) => Bytes::U8(&x[from..][..len]),
        Bytes::I8(x) => Bytes::I8(&x[from..][..len]),
    }
}

/// Some of the elements, for writing.
pub(super) fn part_mut(y: BytesMut<'_>, from: usize, len: usize) -> BytesMut<'_> {
    match y {
        BytesMut::U8(y) => BytesMut::U8(&mut y[from..][..len]),
        BytesMut::I8(y) => BytesMut::I8(&mut y[from..][..len]),
    }
}

/// Least and largest value of an 8-bit type.
pub(super) fn bounds(dtype: DType) -> [i32; 2] {
    if dtype == DType::I8 { [-128, 127] } else { [0, 255] }
}

/// How many scales or zero points there may be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Count {
    /// One.
    One,
    /// One, or one for each column; how many these are may not be known.
    Columns(Option<usize>),
}

impl Count {
    fn check(self, what: &str, dims: &[usize]) -> Result<()> {
        let n = element_count(dims)?;
        let wanted = match self {
            _ if n == 1 => return Ok(()),
            Count::Columns(None) if n > 0 => return Ok(()),
            Count::Columns(Some(columns)) if n == columns => return Ok(()),
            Count::Columns(Some(columns)) => format!("one number, or {columns},"),
            _ => "one number".to_owned(),
        };
        Err(Error::shape(format!("{what} is of shape {dims:?}; {wanted} was wanted")))
    }
}

fn check_scales(what: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !(v.is_finite() && *v > 0.0)) {
        None => Ok(()),
        Some(i) => Err(Error::invalid_input(format!("{what}[{i}] is {}; a positive number was wanted", values[i]))),
    }
}

/// Checks a scale where shapes are inferred, its elements too if it is a constant.
pub(super) fn infer_scale(cx: &Infer, i: usize, what: &str, count: Count) -> Result<()> {
    let fact = cx.input(i)?;
    if !fact.dtype.is_float() {
        return Err(wrong_dtype(what, fact.dtype, "floats"));
    }
    if let Some(dims) = fact.dims() {
        count.check(what, &dims)?;
    }
    match fact.tensor().filter(|t| t.dtype() == DType::F32 && !t.is_released()) {
        Some(t) => check_scales(what, t.as_slice()?),
        None => Ok(()),
    }
}

/// Checks a zero point that may be left out, for an operand of this type.
pub(super) fn infer_zero(cx: &Infer, i: usize, what: &str, of: DType, count: Count) -> Result<()> {
    let Some(fact) = cx.optional(i) else { return Ok(()) };
    if fact.dtype != of {
        return Err(Error::dtype(format!(
            "{what} is {}; {of}, the type of what it belongs to, was wanted",
            fact.dtype
        )));
    }
    fact.dims().map_or(Ok(()), |dims| count.check(what, &dims))
}

/// Scales: one, or one for each column.
pub(super) fn scales<'a>(v: TensorView<'a>, what: &str, columns: usize) -> Result<&'a [f32]> {
    Count::Columns(Some(columns)).check(what, v.dims)?;
    let values = v.as_slice::<f32>()?;
    check_scales(what, values)?;
    Ok(values)
}

/// The only scale.
pub(super) fn scale(v: TensorView, what: &str) -> Result<f32> {
    Count::One.check(what, v.dims)?;
    let values = v.as_slice::<f32>()?;
    check_scales(what, values)?;
    Ok(values[0])
}

/// Zero points: one, or one for each column; 0 when left out.
pub(super) fn zeros(v: Option<TensorView>, what: &str, columns: usize) -> Result<SmallVec<[i32; 4]>> {
    let Some(v) = v else { return Ok(smallvec![0]) };
    Count::Columns(Some(columns)).check(what, v.dims)?;
    let values = bytes(v)?;
    Ok((0..values.len()).map(|i| values.get(i)).collect())
}

/// The only zero point; 0 when left out.
pub(super) fn zero(v: Option<TensorView>, what: &str) -> Result<i32> {
    let Some(v) = v else { return Ok(0) };
    Count::One.check(what, v.dims)?;
    Ok(bytes(v)?.get(0))
}

/// A function of one quantised number, as the table of its results for all bytes.
pub(super) type Table = [u8; 256];

/// The table of `f`, from numbers of one scale and zero point to those of another, both of type `dtype`.
pub(super) fn table(dtype: DType, x: (f32, i32), y: (f32, i32), f: impl Fn(f32) -> f32) -> Table {
    let [lo, hi] = bounds(dtype);
    std::array::from_fn(|byte| {
        let q = if dtype == DType::I8 { i32::from(byte as u8 as i8) } else { byte as i32 };
        let v = f(x.0 * (q - x.1) as f32) / y.0;
        // NaN becomes the zero point.
        (v.round_ties_even() as i32).saturating_add(y.1).clamp(lo, hi) as u8
    })
}

/// Looks bytes up.
pub(super) fn look_up(table: &Table, x: &[u8], y: &mut [u8]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = table[usize::from(x)]);
}

/// Packs a matrix `[k, n]` for one run.
pub(super) fn pack(isa: Isa, b: Bytes, sizes: [usize; 2], transposed: bool, zero: &[i32]) -> Result<PackedQ> {
    pack_as(isa, Form::best_unprepared(isa), b, sizes, transposed, zero)
}

/// Packs a matrix `[k, n]`, stored `[n, k]` when `transposed`.
fn pack_as(isa: Isa, form: Form, b: Bytes, [k, n]: [usize; 2], transposed: bool, zero: &[i32]) -> Result<PackedQ> {
    let stored = if transposed { QMatrix::new(b, n, k).transposed() } else { QMatrix::new(b, k, n) };
    Ok(PackedQ::new(isa, form, stored, zero)?)
}

/// The packed form of operand `b`, a matrix, with the zero points of operand `zero`, if both are constants.
pub(super) fn pack_constant(cx: &Prepare, b: usize, zero: usize, transposed: bool) -> Result<Option<Arc<PackedQ>>> {
    let Some(b) = cx.constant(b) else { return Ok(None) };
    let &[rows, cols] = b.dims() else { return Ok(None) };
    let zero_points = cx.constant(zero);
    if cx.has(zero) && zero_points.is_none() {
        return Ok(None);
    }
    let (k, n) = if transposed { (cols, rows) } else { (rows, cols) };
    let isa = cx.isa;
    let id = zero_points.map(|z| cx.cache.id(z)).transpose()?;
    let packed = cx.cache.get(b, &format!("qgemm {isa} {transposed} {id:?}"), |b| {
        let zero = zeros(zero_points.map(|z| z.view()), "the zero point of B", n)?;
        pack_as(isa, Form::best(isa), bytes(b.view())?, [k, n], transposed, &zero)
    })?;
    Ok(Some(packed))
}

/// An operator that multiplies by what [`pack_constant`] packed.
pub(super) trait ByPacked: Send + Sync {
    /// Name of the kernel, for profiles.
    const KERNEL: &'static str;
    /// The operand that was packed.
    const PACKED: &'static [usize];

    /// Computes.
    fn run_packed(&self, cx: &Cx, io: &mut Io, packed: &PackedQ) -> Result<()>;
}

/// Such an operator for one number of rows.
#[derive(Debug)]
pub(super) struct Prepared<T> {
    pub(super) op: T,
    pub(super) packed: Arc<PackedQ>,
    pub(super) rows: usize,
}

impl<T: ByPacked> Compute for Prepared<T> {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.op.run_packed(cx, io, &self.packed)
    }

    fn kernel(&self) -> &str {
        T::KERNEL
    }

    fn packed_operands(&self) -> &[usize] {
        T::PACKED
    }

    fn flops(&self) -> u64 {
        2 * self.rows.saturating_mul(self.packed.k()).saturating_mul(self.packed.n()) as u64
    }
}
