//! Quantisation: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear, and products of quantised numbers:
//! MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv.

use super::matmul::{MatMul, batch_offsets};
use super::qparams::{self, part, part_mut};
use super::sizes::permuted_axis;
use super::spatial::{Window, split_dims};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, axis_index};
use crate::for_dtype;
use crate::tensor::{DType, Dims, Element, TensorView, element_count};
use weblane_kernels::conv::{ConvInput, ConvParams, Layout};
use weblane_kernels::int8::{Output, QMatrix, Requantize, qgemm};
use weblane_kernels::naive::{self, Number};
use weblane_kernels::par::Cx;
use weblane_kernels::quant::{self, Grid, Sharing};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("QuantizeLinear", 10, parse_quantize),
    Registration::onnx("DequantizeLinear", 10, parse_dequantize),
    Registration::onnx("DynamicQuantizeLinear", 11, |_| Ok(DynamicQuantize.into())),
    Registration::onnx("MatMulInteger", 10, |_| Ok(QuantizedProduct { kind: Product::MatMul, scaled: false }.into())),
    Registration::onnx("QLinearMatMul", 10, |_| Ok(QuantizedProduct { kind: Product::MatMul, scaled: true }.into())),
    Registration::onnx("ConvInteger", 10, parse_conv),
    Registration::onnx("QLinearConv", 10, parse_conv),
];

/// QuantizeLinear (operands x, scale, zero point) or DequantizeLinear.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// Whether it goes back to real numbers.
    pub back: bool,
    /// The axis of scales that are no scalar.
    pub axis: i64,
    /// Neighbours along the axis that share a scale; 0 when there are no blocks.
    pub block: usize,
    /// Element type of the result, where the attribute says it.
    pub output: Option<DType>,
}

fn parse_linear(a: &mut Attributes, back: bool) -> Result<Op> {
    let block = a.int_or("block_size", 0)?;
    let block = usize::try_from(block).map_err(|_| Error::invalid_model(format!("attribute block_size is {block}")))?;
    let output = match a.int_or("output_dtype", 0)? {
        0 => None,
        code => Some(DType::from_onnx(code).ok_or_else(|| {
            Error::unsupported_dtype(format!(
                "attribute output_dtype is element type number {code}, which is not supported"
            ))
        })?),
    };
    Ok(Linear { back, axis: a.int_or("axis", 1)?, block, output }.into())
}

fn parse_quantize(a: &mut Attributes) -> Result<Op> {
    // Saturation is for 8-bit floats, which have no element type here; integers saturate always.
    a.ignore("saturate");
    if let Some(precision) = a.dtype("precision")?
        && precision != DType::F32
    {
        return Err(Error::unsupported_attribute(format!(
            "attribute precision is {precision}; float32 can be computed"
        )));
    }
    parse_linear(a, false)
}

fn parse_dequantize(a: &mut Attributes) -> Result<Op> {
    parse_linear(a, true)
}

impl Linear {
    /// Whether scales may be negative or 0: onnxruntime's tools give a block of 4-bit weights the sign of its largest
    /// number, which then takes the one level that only one side has.
    fn may_be_signed(&self) -> bool {
        self.back && self.block > 0
    }

    fn grid(&self, x: &[usize], scale: &[usize]) -> Result<Grid> {
        let one = Grid { outer: 1, n: 1, inner: element_count(x)?, sharing: Sharing::Tensor };
        if scale.iter().all(|&d| d == 1) && scale.len() <= 1 {
            return Ok(one);
        }
        let axis = axis_index(self.axis, x.len())?;
        let [outer, n, inner] = super::reduce::around(x, axis);
        let wrong = |want: &str| {
            Err(Error::shape(format!("scales of shape {scale:?} for an operand of shape {x:?}; {want} was wanted")))
        };
        if self.block > 0 {
            let mut want: Dims = x.into();
            want[axis] = n.div_ceil(self.block);
            if scale != want.as_slice() {
                return wrong(&format!("{want:?}"));
            }
            return Ok(Grid { outer, n, inner, sharing: Sharing::Block(self.block) });
        }
        if scale != [n] {
            return wrong(&format!("[{n}]"));
        }
        Ok(Grid { outer, n, inner, sharing: Sharing::Axis })
    }
}

/// 4-bit numbers one per byte; they become ordinary bytes here and nowhere else.
fn unpack(v: TensorView) -> Vec<i8> {
    let nibble = |i: usize| (v.bytes()[i / 2] >> (4 * (i % 2))) & 15;
    let signed = v.dtype == DType::I4;
    let widen = |n: u8| if signed { ((n << 4) as i8) >> 4 } else { n as i8 };
    (0..v.len()).map(|i| widen(nibble(i))).collect()
}

fn pack(values: &[i8], out: &mut [u8]) {
    for (pair, out) in values.chunks(2).zip(out) {
        *out = (pair[0] as u8 & 15) | pair.get(1).map_or(0, |&v| (v as u8 & 15) << 4);
    }
}

fn is_nibble(dtype: DType) -> bool {
    matches!(dtype, DType::U4 | DType::I4)
}

const QUANTA: &str = "integers of 4, 8 and 16 bits";

/// A scale, unless it is one that nothing can be quantised with.
pub(super) fn checked_scale(scale: f32, what: &str) -> Result<f32> {
    match scale.is_finite() && scale > 0.0 {
        true => Ok(scale),
        false => Err(Error::invalid_input(format!("{what} is {scale}; a finite number above 0 was wanted"))),
    }
}

/// Refuses scales that nothing can be quantised with.
fn check_scales(scales: TensorView, what: &str) -> Result<()> {
    if scales.dtype != DType::F32 {
        return Ok(());
    }
    scales.as_slice::<f32>()?.iter().try_for_each(|&s| checked_scale(s, what).map(drop))
}

/// Refuses such scales among constants, when the model is loaded.
fn check_constant_scales(scales: &Fact, what: &str) -> Result<()> {
    match scales.tensor().filter(|t| !t.is_released()) {
        Some(t) => check_scales(t.view(), what),
        None => Ok(()),
    }
}

/// Refuses zero points of sums, which have none: the specification lets `int32` through for biases only.
fn check_zero_of_sums(zero: TensorView) -> Result<()> {
    match zero.as_slice::<i32>()?.iter().find(|&&z| z != 0) {
        Some(z) => Err(Error::invalid_input(format!("a zero point of int32 is {z}; 0 was wanted"))),
        None => Ok(()),
    }
}

impl Operator for Linear {
    fn name(&self) -> &'static str {
        if self.back { "DequantizeLinear" } else { "QuantizeLinear" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, scale, zero) = (cx.input(0)?, cx.input(1)?, cx.optional(2));
        if !scale.dtype.is_float() && scale.dtype != DType::I32 {
            return Err(wrong_dtype("the scale", scale.dtype, "floats"));
        }
        if !self.may_be_signed() {
            check_constant_scales(scale, "a scale")?;
        }
        if let (Some(x), Some(s)) = (x.dims(), scale.dims()) {
            self.grid(&x, &s)?;
        }
        if let (Some(z), Some(s)) = (zero.and_then(Fact::dims), scale.dims())
            && element_count(&z)? != element_count(&s)?
        {
            return Err(Error::shape(format!("zero points of shape {z:?} beside scales of shape {s:?}")));
        }
        let dtype = match self.back {
            true => {
                if let Some(z) = zero.filter(|z| z.dtype != x.dtype) {
                    return Err(Error::dtype(format!("the zero point is {}, x is {}", z.dtype, x.dtype)));
                }
                if let Some(z) = zero.and_then(Fact::tensor).filter(|z| z.dtype() == DType::I32 && !z.is_released()) {
                    check_zero_of_sums(z.view())?;
                }
                self.output.unwrap_or(scale.dtype)
            }
            false => match (zero.map(|z| z.dtype), self.output) {
                (Some(z), Some(o)) if z != o => {
                    return Err(Error::dtype(format!("the zero point is {z}, attribute output_dtype says {o}")));
                }
                (z, o) => z.or(o).unwrap_or(DType::U8),
            },
        };
        cx.results(vec![Fact { dtype, shape: x.shape.clone(), content: Default::default() }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, scale, zero) = (io.input(0)?, io.input(1)?, io.optional(2));
        let grid = self.grid(x.dims, scale.dims)?;
        let scales = scale.as_slice::<f32>()?;
        if self.may_be_signed() {
            if let Some(s) = scales.iter().find(|s| !s.is_finite()) {
                return Err(Error::invalid_input(format!("a scale is {s}; a finite number was wanted")));
            }
        } else {
            check_scales(scale, "a scale")?;
        }
        if self.back {
            let y = io.output(0)?.as_slice::<f32>()?;
            if is_nibble(x.dtype) {
                let zero = zero.map(unpack);
                return Ok(quant::dequantize(cx, &unpack(x), &grid, scales, zero.as_deref(), y)?);
            }
            if let Some(zero) = zero.filter(|z| z.dtype == DType::I32) {
                check_zero_of_sums(zero)?;
            }
            return for_dtype!(x.dtype, [U8, I8, U16, I16, I32], T => {
                let zero = zero.map(|z| z.as_slice::<T>()).transpose()?;
                Ok(quant::dequantize(cx, x.as_slice::<T>()?, &grid, scales, zero, y)?)
            }, else Err(wrong_dtype("x", x.dtype, "integers of 4, 8, 16 and 32 bits")));
        }
        let widened: Vec<f32>;
        let x = match x.dtype {
            DType::I32 => {
                widened = x.as_slice::<i32>()?.iter().map(|&v| v as f32).collect();
                &widened
            }
            _ => x.as_slice::<f32>()?,
        };
        let y = io.output(0)?;
        let bounds = match y.dtype {
            DType::U4 => [0.0, 15.0],
            DType::I4 => [-8.0, 7.0],
            DType::U8 => [0.0, 255.0],
            DType::I8 => [-128.0, 127.0],
            DType::U16 => [0.0, 65535.0],
            _ => [-32768.0, 32767.0],
        };
        if is_nibble(y.dtype) {
            let mut wide = vec![0i8; x.len()];
            let zero = zero.map(unpack);
            quant::quantize(cx, x, &grid, scales, zero.as_deref(), bounds, &mut wide)?;
            pack(&wide, y.bytes());
            return Ok(());
        }
        for_dtype!(y.dtype, [U8, I8, U16, I16], T => {
            let zero = zero.map(|z| z.as_slice::<T>()).transpose()?;
            Ok(quant::quantize(cx, x, &grid, scales, zero, bounds, y.as_slice::<T>()?)?)
        }, else Err(wrong_dtype("the result", y.dtype, QUANTA)))
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        let scale = operands.get(1)?.as_ref()?.dims()?;
        let mut roles = vec![Role::Keep; operands.len()];
        roles[0] = Role::Permute;
        // One scale for all, or one for each index of an axis; blocks stay where they are.
        let axis = match scale.as_slice() {
            [] | [1] => self.axis,
            _ if self.block > 0 => return None,
            _ => permuted_axis(self.axis, perm)?,
        };
        Some(Permuted { op: Linear { axis, ..self.clone() }.into(), roles })
    }
}

/// Quantises to `uint8` with the scale and zero point that the operand's range wants; results y, scale, zero point.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicQuantize;

impl Operator for DynamicQuantize {
    fn name(&self) -> &'static str {
        "DynamicQuantizeLinear"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let y = Fact { dtype: DType::U8, shape: x.shape.clone(), content: Default::default() };
        cx.results(vec![y, Fact::new(DType::F32, &[]), Fact::new(DType::U8, &[])])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.slice::<f32>(0)?;
        let (scale, zero) = quant::dynamic_range([&quant::range(cx, x)[..]]);
        let grid = Grid { outer: 1, n: 1, inner: x.len(), sharing: Sharing::Tensor };
        quant::quantize(cx, x, &grid, &[scale], Some(&[zero]), [0.0, 255.0], io.output(0)?.as_slice::<u8>()?)?;
        if io.outputs.len() > 1 {
            io.output(1)?.as_slice::<f32>()?.fill(scale);
        }
        if io.outputs.len() > 2 {
            io.output(2)?.as_slice::<u8>()?.fill(zero);
        }
        Ok(())
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 1)
    }
}

/// Which product.
#[derive(Clone, Debug, PartialEq)]
pub enum Product {
    /// Of matrices.
    MatMul,
    /// Convolution with this window and number of groups.
    Conv(Window, usize),
}

/// A product of quantised numbers.
///
/// MatMulInteger and ConvInteger have operands a, b, zero point of a, zero point of b, and give the sums. QLinearMatMul
/// and QLinearConv have a, its scale and zero point, b, its scale and zero point, the scale and zero point of the
/// result, and (convolution only) a bias in units of the product of both scales.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedProduct {
    /// Which product.
    pub kind: Product,
    /// Whether the result is quantised again.
    pub scaled: bool,
}

fn parse_conv(a: &mut Attributes) -> Result<Op> {
    let groups = a.int_or("group", 1)?;
    let groups = usize::try_from(groups).ok().filter(|&g| g > 0 && g < 1 << 31);
    let groups = groups.ok_or_else(|| Error::unsupported_attribute("attribute group must be at least 1"))?;
    Ok(QuantizedProduct { kind: Product::Conv(Window::parse(a)?, groups), scaled: a.op_type() == "QLinearConv" }.into())
}

/// Where the operands of a product are.
struct Places {
    b: usize,
    zeros: [usize; 2],
}

impl QuantizedProduct {
    fn places(&self) -> Places {
        if self.scaled { Places { b: 3, zeros: [2, 5] } } else { Places { b: 1, zeros: [2, 3] } }
    }
}

/// Values minus zero points; `rows` and `cols` say for each element which zero point counts: one for all, one per row,
/// or one per column of the last two axes.
fn centred(v: TensorView, zero: Option<TensorView>, index: impl Fn(usize) -> usize) -> Result<Vec<i32>> {
    fn all<T: Element + Into<i32>>(
        v: TensorView,
        zero: Option<TensorView>,
        index: impl Fn(usize) -> usize,
    ) -> Result<Vec<i32>> {
        let x = v.as_slice::<T>()?;
        let Some(zero) = zero.filter(|z| !z.is_empty()) else { return Ok(x.iter().map(|&x| x.into()).collect()) };
        let zero = zero.as_slice::<T>()?;
        let at = |i: usize| zero[if zero.len() == 1 { 0 } else { index(i) % zero.len() }];
        Ok(x.iter().enumerate().map(|(i, &x)| x.into() - at(i).into()).collect())
    }
    for_dtype!(v.dtype, [U8, I8], T => all::<T>(v, zero, index), else
        Err(wrong_dtype("an operand of the product", v.dtype, "uint8 and int8")))
}

impl QuantizedProduct {
    /// Sums of products, for a result of these dims.
    fn sums(&self, cx: &Cx, io: &Io, out: &[usize], y: &mut [i32]) -> Result<()> {
        let places = self.places();
        let (a, b) = (io.input(0)?, io.input(places.b)?);
        let (za, zb) = (io.optional(places.zeros[0]), io.optional(places.zeros[1]));
        match &self.kind {
            Product::MatMul => {
                let k = a.dims.last().copied().unwrap_or(1);
                let m = if a.rank() > 1 { a.dims[a.rank() - 2] } else { 1 };
                let n = if b.rank() > 1 { b.dims[b.rank() - 1] } else { 1 };
                // Zero points of A belong to rows, those of B to columns; with batches there is one per row of each.
                let av = centred(a, za, |i| i / k.max(1))?;
                let per_batch = zb.is_some_and(|z| z.rank() > 1);
                let bv = centred(b, zb, |i| if per_batch { i / (k * n).max(1) * n + i % n } else { i % n.max(1) })?;
                for (y, [a, b]) in y.chunks_exact_mut((m * n).max(1)).zip(batch_offsets(a.dims, b.dims)?) {
                    quant::matmul(cx, &av[a..], &bv[b..], y, [m, n, k])?;
                }
                Ok(())
            }
            Product::Conv(window, groups) => {
                let (batch, in_channels, spatial) = split_dims(a.dims, Layout::Nchw)?;
                let kernel = b.dims.get(2..).ok_or_else(|| Error::shape(format!("weights of shape {:?}", b.dims)))?;
                let s = window.over(&spatial, kernel)?;
                let params = ConvParams {
                    in_channels,
                    out_channels: out[1],
                    groups: *groups,
                    kernel: s.kernel,
                    strides: s.strides,
                    dilations: s.dilations,
                };
                let input = ConvInput { batch, spatial: s.input, pads_begin: s.begin, pads_end: s.end };
                let per_channel = element_count(&b.dims[1..])?.max(1);
                let (x, w) = (centred(a, za, |_| 0)?, centred(b, zb, |i| i / per_channel)?);
                let bias = if self.scaled { io.optional(8) } else { None };
                let bias = bias.map(|b| b.as_slice::<i32>()).transpose()?;
                naive::conv(&params, &input, &x, &w, bias, y)?;
                Ok(())
            }
        }
    }
}

impl QuantizedProduct {
    /// Whether the kernel of products of matrices has this form: one zero point for A, one for B or for each column.
    fn suits_kernel(&self, io: &Io) -> Result<bool> {
        let places = self.places();
        let (a_zero, b_zero) = (io.optional(places.zeros[0]), io.optional(places.zeros[1]));
        let one = a_zero.is_none_or(|z| z.len() == 1);
        let columns = b_zero.is_none_or(|z| z.len() == 1 || z.rank() == 1);
        Ok(matches!(self.kind, Product::MatMul) && one && columns && !io.input(0)?.is_empty())
    }

    /// Products of matrices of which B is not known before; one that is becomes another operator.
    fn multiply(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let places = self.places();
        let (a, b) = (io.input(0)?, io.input(places.b)?);
        let last = |dims: &[usize], i: usize| dims.len().checked_sub(i).map_or(1, |at| dims[at]);
        let k = last(a.dims, 1);
        let n = if b.rank() > 1 { last(b.dims, 1) } else { 1 };
        // One matrix for all batches: their rows are those of one product.
        let m = if b.rank() > 2 { last(a.dims, 2) } else { a.len() / k.max(1) };
        let a_zero = qparams::zero(io.optional(places.zeros[0]), "the zero point of A")?;
        let b_zero = qparams::zeros(io.optional(places.zeros[1]), "the zero points of B", n)?;
        let (mut multiplier, mut zero) = (Vec::new(), 0);
        if self.scaled {
            let a_scale = qparams::scale(io.input(1)?, "the scale of A")?;
            let y_scale = qparams::scale(io.input(6)?, "the scale of the result")?;
            let b_scale = qparams::scales(io.input(4)?, "a scale of B", n)?;
            multiplier.extend(b_scale.iter().map(|b| a_scale * b / y_scale));
            zero = qparams::zero(Some(io.input(7)?), "the zero point of the result")?;
        }
        let offsets = if b.rank() > 2 { batch_offsets(a.dims, b.dims)? } else { vec![[0, 0]] };
        let (a, b) = (qparams::bytes(a)?, qparams::bytes(b)?);
        let (isa, y) = (cx.isa(), io.output(0)?);
        let [lo, hi] = qparams::bounds(y.dtype);
        for (i, [a_at, b_at]) in offsets.into_iter().enumerate() {
            let packed = qparams::pack(isa, part(b, b_at, k * n), [k, n], false, &b_zero)?;
            let output = match self.scaled {
                true => {
                    let requantize = Requantize { multiplier: &multiplier, zero, lo, hi, add: None };
                    Output::Quantized { requantize, y: part_mut(qparams::bytes_mut(y)?, i * m * n, m * n) }
                }
                false => Output::Sums(&mut y.as_slice::<i32>()?[i * m * n..][..m * n]),
            };
            qgemm(cx, QMatrix::new(part(a, a_at, m * k), m, k), a_zero, &packed, None, output)?;
        }
        Ok(())
    }
}

impl Operator for QuantizedProduct {
    fn name(&self) -> &'static str {
        match (&self.kind, self.scaled) {
            (Product::MatMul, false) => "MatMulInteger",
            (Product::MatMul, true) => "QLinearMatMul",
            (Product::Conv(..), false) => "ConvInteger",
            (Product::Conv(..), true) => "QLinearConv",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let places = self.places();
        let (a, b) = (cx.input(0)?, cx.input(places.b)?);
        for (f, zero) in [(a, places.zeros[0]), (b, places.zeros[1])] {
            if !matches!(f.dtype, DType::U8 | DType::I8) {
                return Err(wrong_dtype("an operand of the product", f.dtype, "uint8 and int8"));
            }
            if let Some(z) = cx.optional(zero).filter(|z| z.dtype != f.dtype) {
                return Err(Error::dtype(format!("a zero point is {}, its operand is {}", z.dtype, f.dtype)));
            }
        }
        // Shapes are those of the product of real numbers.
        let real = |f: &Fact| Fact { dtype: DType::F32, ..f.clone() };
        let mut inputs = vec![real(a), real(b)];
        if let (true, Product::Conv(..), Some(bias)) = (self.scaled, &self.kind, cx.optional(8)) {
            if bias.dtype != DType::I32 {
                return Err(wrong_dtype("the bias", bias.dtype, "int32"));
            }
            inputs.push(real(bias));
        }
        let inputs: Vec<Option<&Fact>> = inputs.iter().map(Some).collect();
        let as_real = Infer { inputs: &inputs, outputs: 1, cx: cx.cx };
        let mut y = match &self.kind {
            Product::MatMul => MatMul::default().infer(&as_real)?,
            Product::Conv(window, groups) => super::conv::Conv {
                window: window.clone(),
                groups: *groups,
                layout: Layout::Nchw,
                activation: Default::default(),
                residual: false,
            }
            .infer(&as_real)?,
        };
        let what = ["A", "B"];
        for (i, &zero) in places.zeros.iter().enumerate() {
            let Some(dims) = cx.optional(zero).and_then(Fact::dims) else { continue };
            let count = element_count(&dims)?;
            let Some(of) = [a, b][i].dims() else { continue };
            let wanted = match (&self.kind, i) {
                (Product::Conv(..), 0) => 1,
                (Product::Conv(..), _) => of.first().copied().unwrap_or(1),
                (Product::MatMul, 0) if dims.len() > 1 => element_count(&of[..of.len().saturating_sub(1)])?,
                (Product::MatMul, 0) => of.len().checked_sub(2).map_or(1, |r| of[r]),
                (Product::MatMul, _) if dims.len() > 1 => {
                    element_count(&of[..of.len().saturating_sub(2)])? * of.last().copied().unwrap_or(1)
                }
                (Product::MatMul, _) => {
                    if of.len() > 1 {
                        of[of.len() - 1]
                    } else {
                        1
                    }
                }
            };
            if count > 1 && count != wanted {
                return Err(Error::shape(format!(
                    "zero points of shape {dims:?} for {} of shape {of:?}; 1 or {wanted} were wanted",
                    what[i]
                )));
            }
        }
        let dtype = match self.scaled {
            false => DType::I32,
            true => {
                for (i, what) in [(1, "the scale of A"), (4, "a scale of B"), (6, "the scale of the result")] {
                    check_constant_scales(cx.input(i)?, what)?;
                }
                let zero = cx.input(7)?;
                if !matches!(zero.dtype, DType::U8 | DType::I8) {
                    return Err(wrong_dtype("the zero point of the result", zero.dtype, "uint8 and int8"));
                }
                for i in [1, 4, 6, 7] {
                    let f = cx.input(i)?;
                    let count = f.dims().map(|d| element_count(&d)).transpose()?;
                    let columns = y.first().and_then(|y| y.shape.as_ref()).and_then(|s| match self.kind {
                        Product::MatMul => s.last().and_then(Dim::known),
                        Product::Conv(..) => s.get(1).and_then(Dim::known),
                    });
                    // Only B may have a scale for each column.
                    let fits = |n: usize| n == 1 || (i == 4 && columns.is_none_or(|c| c == n));
                    if count.is_some_and(|n| !fits(n)) {
                        return Err(Error::unsupported_attribute(format!(
                            "operand {i} is {}; one number{} can be computed",
                            f.shape_text(),
                            if i == 4 { ", or one for each column," } else { "" }
                        )));
                    }
                }
                zero.dtype
            }
        };
        y.iter_mut().for_each(|f| f.dtype = dtype);
        cx.results(y)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        if self.suits_kernel(io)? {
            return self.multiply(cx, io);
        }
        let out: Dims = io.output(0)?.dims.into();
        if !self.scaled {
            let count = element_count(&out)?;
            let mut sums = vec![0; count];
            self.sums(cx, io, &out, &mut sums)?;
            io.output(0)?.as_slice::<i32>()?.copy_from_slice(&sums);
            return Ok(());
        }
        let mut sums = vec![0; element_count(&out)?];
        self.sums(cx, io, &out, &mut sums)?;
        let scalar = |i: usize| -> Result<f32> {
            io.slice::<f32>(i)?.first().copied().ok_or_else(|| Error::shape(format!("operand {i} is empty")))
        };
        for (i, what) in [(1, "the scale of A"), (4, "a scale of B"), (6, "the scale of the result")] {
            check_scales(io.input(i)?, what)?;
        }
        let (a_scale, y_scale) = (scalar(1)?, scalar(6)?);
        let b_scale = io.slice::<f32>(4)?;
        let zero = io.input(7)?;
        let zero = *zero.to_i64s()?.first().ok_or_else(|| Error::shape("operand 7 is empty"))? as f32;
        let column = |i: usize| match self.kind {
            Product::MatMul => i % out.last().copied().unwrap_or(1).max(1),
            Product::Conv(..) => i / out[2..].iter().product::<usize>().max(1) % out[1].max(1),
        };
        let y = io.output(0)?;
        for_dtype!(y.dtype, [U8, I8], T => {
            for (i, (y, &sum)) in y.as_slice::<T>()?.iter_mut().zip(&sums).enumerate() {
                let scale = a_scale * b_scale[if b_scale.len() == 1 { 0 } else { column(i) }] / y_scale;
                *y = T::from_f64(f64::from((sum as f32 * scale).round_ties_even() + zero));
            }
            Ok(())
        }, else Err(wrong_dtype("the result", y.dtype, "uint8 and int8")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use super::*;
    use crate::tensor::Tensor;

    fn u8s(dims: &[usize], v: &[u8]) -> Tensor {
        Tensor::from_slice(dims, v).unwrap()
    }

    #[test]
    fn there_and_back() {
        let x = f32s(&[2, 2], &[0.0, 2.0, 3.0, 1000.0]);
        let (scale, zero) = (f32s(&[2], &[2.0, 4.0]), u8s(&[2], &[128, 100]));
        let q = OneNode::new("QuantizeLinear").run(&[x, scale.clone(), zero.clone()]).unwrap();
        assert_eq!(q[0].as_slice::<u8>().unwrap(), [128, 100, 130, 255]);
        let y = OneNode::new("DequantizeLinear").run(&[q[0].clone(), scale, zero]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [0.0, 0.0, 4.0, 620.0]);
    }

    #[test]
    fn four_bits() {
        let x = f32s(&[3], &[-100.0, 2.4, 6.0]);
        let node = OneNode::new("QuantizeLinear").int("output_dtype", DType::I4 as i64);
        let q = node.run(&[x, f32s(&[], &[1.0])]).unwrap();
        assert_eq!((q[0].dtype(), q[0].bytes()), (DType::I4, &[0x28, 0x06][..]));
        let y = OneNode::new("DequantizeLinear").run(&[q[0].clone(), f32s(&[], &[0.5])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-4.0, 1.0, 3.0]);
    }

    #[test]
    fn ranges_with_what_is_no_number() {
        // What onnxruntime gives, bit for bit.
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        for (x, y, scale, zero) in [
            ([1.0, nan, 3.0, 4.0], [64, 0, 191, 255], 4.0 / 255.0, 0),
            ([nan; 4], [0; 4], 1.0, 0),
            ([1.0, inf, nan, -3.0], [0; 4], inf, 0),
            ([1.0, -inf, 3.0, nan], [255, 0, 255, 0], inf, 255),
            ([f32::MAX, f32::MIN, 1.0, 0.0], [0; 4], inf, 0),
            ([1e-45, 0.0, 0.0, nan], [255, 0, 0, 0], 0.0, 255),
        ] {
            let got = OneNode::new("DynamicQuantizeLinear").outputs(3).run(&[f32s(&[4], &x)]).unwrap();
            assert_eq!(got[0].as_slice::<u8>().unwrap(), y, "{x:?}");
            assert_eq!(got[1].as_slice::<f32>().unwrap(), [scale]);
            assert_eq!(got[2].as_slice::<u8>().unwrap(), [zero]);
        }
    }

    #[test]
    fn products() {
        let (a, b) = (u8s(&[2, 2], &[1, 2, 3, 4]), u8s(&[2, 2], &[5, 6, 7, 8]));
        let y = OneNode::new("MatMulInteger").run(&[a.clone(), b.clone(), u8s(&[], &[1]), u8s(&[2], &[5, 6])]).unwrap();
        // [[0, 1], [2, 3]] x [[0, 0], [2, 2]]
        assert_eq!(y[0].as_slice::<i32>().unwrap(), [2, 2, 6, 6]);
        let one = || f32s(&[], &[1.0]);
        let zero = || u8s(&[], &[0]);
        let y = OneNode::new("QLinearMatMul")
            .run(&[a, one(), zero(), b, f32s(&[2], &[1.0, 0.5]), zero(), f32s(&[], &[2.0]), u8s(&[], &[10])])
            .unwrap();
        // [[19, 22], [43, 50]] times [0.5, 0.25], halves to even.
        assert_eq!(y[0].as_slice::<u8>().unwrap(), [20, 16, 32, 22]);
        let x = u8s(&[1, 1, 3], &[1, 2, 3]);
        let y = OneNode::new("ConvInteger").ints("pads", &[1, 0]).run(&[x, u8s(&[1, 1, 2], &[1, 1]), u8s(&[], &[1])]);
        assert_eq!(y.unwrap()[0].as_slice::<i32>().unwrap(), [0, 1, 3]);
    }

    #[test]
    fn batches_share_matrices() {
        let bytes = |dims: &[usize], seed: usize| {
            let count = dims.iter().product::<usize>();
            u8s(dims, &(0..count).map(|i| (i * 37 + seed * i * i) as u8).collect::<Vec<_>>())
        };
        let want = |a: &Tensor, b: &Tensor, [m, k, n]: [usize; 3], [i, j]: [usize; 2]| -> Vec<i32> {
            let (a, b) = (&a.bytes()[i * m * k..], &b.bytes()[j * k * n..]);
            let one = |at: usize| {
                (0..k).map(|l| (i32::from(a[at / n * k + l]) - 7) * (i32::from(b[l * n + at % n]) - 9)).sum()
            };
            (0..m * n).map(one).collect()
        };
        let sizes = [3, 5, 4];
        for (a_dims, b_dims, pairs) in [
            (&[2, 2, 3, 5][..], &[2, 1, 5, 4][..], &[[0, 0], [1, 0], [2, 1], [3, 1]][..]),
            (&[2, 3, 5], &[5, 4], &[[0, 0], [1, 0]]),
            (&[3, 5], &[2, 5, 4], &[[0, 0], [0, 1]]),
        ] {
            let (a, b) = (bytes(a_dims, 3), bytes(b_dims, 5));
            let zeros = [u8s(&[], &[7]), u8s(&[1], &[9])];
            let got = OneNode::new("MatMulInteger").run(&[a.clone(), b.clone(), zeros[0].clone(), zeros[1].clone()]);
            let all: Vec<i32> = pairs.iter().flat_map(|&p| want(&a, &b, sizes, p)).collect();
            assert_eq!(got.unwrap()[0].as_slice::<i32>().unwrap(), all);
            let [one, scale] = [f32s(&[], &[1.0]), f32s(&[], &[500.0])];
            let operands = [a, one.clone(), zeros[0].clone(), b, one, zeros[1].clone(), scale, u8s(&[], &[128])];
            let got = OneNode::new("QLinearMatMul").run(&operands).unwrap();
            let all: Vec<u8> = all.iter().map(|&v| ((v as f32 / 500.0).round_ties_even() + 128.0) as u8).collect();
            assert_eq!(got[0].as_slice::<u8>().unwrap(), all);
        }
        let empty = OneNode::new("MatMulInteger").run(&[u8s(&[2, 0], &[]), u8s(&[0, 3], &[])]).unwrap();
        assert_eq!(empty[0].as_slice::<i32>().unwrap(), [0; 6]);
    }

    #[test]
    fn mistakes_are_named() {
        let e = OneNode::new("QuantizeLinear").run(&[f32s(&[2, 3], &[0.0; 6]), f32s(&[2], &[1.0; 2])]).unwrap_err();
        assert!(e.message.contains("[3] was wanted"), "{e}");
        let (a, b) = (u8s(&[2, 2], &[1; 4]), u8s(&[2, 2], &[5; 4]));
        let e = OneNode::new("MatMulInteger").run(&[a, b, u8s(&[3], &[1; 3])]).unwrap_err();
        assert!(e.message.contains("1 or 2 were wanted"), "{e}");
    }

    #[test]
    fn sums_have_no_zero_point() {
        let i32s = |values: &[i32]| Tensor::from_slice(&[values.len()], values).unwrap();
        let run = |zero: i32| {
            let operands = [i32s(&[6, -4]), f32s(&[2], &[0.5, 2.0]), i32s(&[0, zero])];
            OneNode::new("DequantizeLinear").int("axis", 0).run(&operands)
        };
        assert_eq!(run(0).unwrap()[0].as_slice::<f32>().unwrap(), [3.0, -8.0]);
        let e = run(-1).unwrap_err();
        assert!(e.message.contains("int32 is -1; 0 was wanted") && e.node.is_some(), "{e}");
    }

    #[test]
    fn scales_that_nothing_can_be_quantised_with() {
        for scale in [0.0, -0.5, f32::NAN, f32::INFINITY] {
            for name in ["QuantizeLinear", "DequantizeLinear"] {
                let x = if name == "QuantizeLinear" { f32s(&[2], &[1.0; 2]) } else { u8s(&[2], &[1; 2]) };
                let e = OneNode::new(name).run(&[x, f32s(&[2], &[1.0, scale])]).unwrap_err();
                assert!(e.message.contains("a finite number above 0") && e.node.is_some(), "{e}");
            }
            for wrong in [1, 4, 6] {
                let (x, one, zero) = (u8s(&[2, 2], &[1; 4]), f32s(&[], &[1.0]), u8s(&[], &[0]));
                let mut operands =
                    [x.clone(), one.clone(), zero.clone(), x, one.clone(), zero.clone(), one, zero.clone()];
                operands[wrong] = f32s(&[], &[scale]);
                let e = OneNode::new("QLinearMatMul").run(&operands).unwrap_err();
                assert!(e.message.contains("a finite number above 0"), "{e}");
            }
        }
    }
}
