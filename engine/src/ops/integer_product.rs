//! Products of 8-bit integers, convolution and matrix product, in the form that the optimiser brings quantised graphs to:
//! what is known of scales and zero points is part of the operator, and what becomes of the sums too.

use super::conv::Conv;
use super::matmul::MatMul;
use super::qparams::{bytes, bytes_mut, check_byte};
use super::transpose::Transpose;
use super::{Compute, Infer, Io, Operator, Permuted, Prepare, Registration, Role, Table};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::{DType, Dims, Tensor, TensorView, element_count};
use std::sync::Arc;
use weblane_kernels::conv::{Algorithm, ConvInput, Layout};
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{Addend, Form, Output, PackedQ, QConv, QMatrix, Requantize, qgemm};
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;
use weblane_kernels::winograd::TileSize;

/// No model has these operators by name.
pub const OPERATORS: &[Registration] = &[];

/// Which product.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Of A, whatever its rank, and a matrix; without bias, residual or activation of its own.
    MatMul(MatMul),
    /// Convolution; without residual or activation of its own.
    Conv(Conv),
}

/// What becomes of the sums.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// They are the result, `int32`.
    Sums,
    /// `activation(sum * scale[j] + bias[j] + residual)`, `float32`.
    Real {
        /// One for all columns, or one for each: the scale of A times that of B, or, where the scale of A is an operand,
        /// that of B.
        scale: Table<f32>,
        /// Whether there is a bias, an operand of `[n]`.
        bias: bool,
        /// Whether there is a residual, the last operand.
        residual: bool,
        /// Applied last.
        activation: Activation,
    },
    /// They are quantised again; see [`Requantize`].
    Quantized {
        /// Element type of the result.
        dtype: DType,
        /// One for all columns, or one for each.
        multiplier: Table<f32>,
        /// Zero point.
        zero: i32,
        /// Least result, before an addend.
        lo: i32,
        /// Largest result, before an addend.
        hi: i32,
        /// A quantised residual, the last operand, is added.
        add: Option<Sum>,
    },
}

/// See [`Addend`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sum {
    /// Zero point of the residual.
    pub other_zero: i32,
    /// Scale of the product over that of the result.
    pub first: f32,
    /// Scale of the residual over that of the result.
    pub second: f32,
    /// Added to the sum before it is rounded.
    pub offset: f32,
    /// Zero point of the result.
    pub zero: i32,
    /// Least result.
    pub lo: i32,
    /// Largest result.
    pub hi: i32,
}

/// `target(sum of (a - a_zero) (b - b_zero[j]) + bias[j])`.
///
/// Operands: A and B, `uint8` or `int8`; if `a_zero` is `None` the scale of A (left out where the target does not want
/// it) and its zero point (0 if left out); a bias and a residual, as the target says.
#[derive(Clone, Debug, PartialEq)]
pub struct IntegerProduct {
    /// Which product.
    pub kind: Kind,
    /// Zero point of A; `None` if it is an operand.
    pub a_zero: Option<i32>,
    /// Zero points of B: one for all columns, or one for each.
    pub b_zero: Table<i32>,
    /// In units of the product of both scales, one for each column.
    pub bias: Option<Table<i32>>,
    /// What becomes of the sums.
    pub target: Target,
}

#[derive(Debug)]
enum Packed {
    MatMul(PackedQ),
    Conv(QConv),
}

impl IntegerProduct {
    /// Where the operands behind those of the product begin.
    pub(crate) fn extras(&self) -> usize {
        if self.a_zero.is_some() { 2 } else { 4 }
    }

    /// Index of the residual.
    fn residual_index(&self) -> Option<usize> {
        match self.target {
            Target::Real { bias, residual: true, .. } => Some(self.extras() + usize::from(bias)),
            Target::Quantized { add: Some(_), .. } => Some(self.extras()),
            _ => None,
        }
    }

    /// The size of the dot products, and how many results they give for each row or window.
    fn columns(&self, b: &[usize]) -> Result<(usize, usize)> {
        let wrong =
            || Error::shape(format!("B is of shape {b:?}; a matrix, or the weights of a convolution, was wanted"));
        match &self.kind {
            Kind::MatMul(m) => match *b {
                [n, k] if m.trans_b => Ok((k, n)),
                [k, n] => Ok((k, n)),
                _ => Err(wrong()),
            },
            Kind::Conv(_) => {
                let (&out, rest) = b.split_first().ok_or_else(wrong)?;
                Ok((element_count(rest)?, out))
            }
        }
    }

    /// `algorithm` is that of a convolution.
    fn pack(&self, isa: Isa, form: Form, algorithm: Algorithm, b: TensorView) -> Result<Packed> {
        match &self.kind {
            Kind::MatMul(m) => {
                let (k, n) = self.columns(b.dims)?;
                let data = bytes(b)?;
                let b = if m.trans_b { QMatrix::new(data, n, k).transposed() } else { QMatrix::new(data, k, n) };
                Ok(Packed::MatMul(PackedQ::new(isa, form, b, &self.b_zero)?))
            }
            Kind::Conv(c) => {
                let params = c.params(b.dims)?;
                Ok(Packed::Conv(QConv::new(isa, form, params, algorithm, bytes(b)?, &self.b_zero)?))
            }
        }
    }

    /// The packed form of a constant B.
    fn packed(&self, cx: &Prepare, algorithm: Algorithm, b: &Arc<Tensor>) -> Result<Arc<Packed>> {
        let geometry = match &self.kind {
            Kind::MatMul(m) => format!("transposed {}", m.trans_b),
            Kind::Conv(c) => format!("{algorithm:?} {:?}", c.params(b.dims())?),
        };
        let (isa, zeros): (Isa, &[i32]) = (cx.isa, &self.b_zero);
        let kind = format!("int8 {isa} {geometry} {zeros:?}");
        cx.cache.get(b, &kind, |b| self.pack(isa, Form::best(isa), algorithm, b.view()))
    }

    /// How a convolution is computed, by any precision, since integers are exact; `None` if that depends on the input,
    /// and it is not known yet.
    fn algorithm(&self, isa: Isa, b: &[usize], image: Option<&ConvInput>) -> Result<Option<Algorithm>> {
        let Kind::Conv(c) = &self.kind else { return Ok(Some(Algorithm::Direct)) };
        let (form, params) = (Form::best(isa), c.params(b)?);
        if !QConv::depends_on_input(isa, form, &params) {
            return Ok(Some(Algorithm::Direct));
        }
        Ok(image.map(|image| QConv::choose(isa, form, &params, image)))
    }

    /// The image of a convolution.
    fn image(&self, a: &[usize], b: &[usize]) -> Result<Option<ConvInput>> {
        match &self.kind {
            Kind::MatMul(_) => Ok(None),
            Kind::Conv(c) => Ok(Some(c.geometry(a, b)?.1)),
        }
    }

    /// Scale and zero point of A where they are operands.
    fn scheme(&self, io: &Io) -> Result<(f32, i32)> {
        if let Some(zero) = self.a_zero {
            return Ok((1.0, zero));
        }
        let scale = match io.optional(2) {
            Some(scale) => *scale.as_slice::<f32>()?.first().ok_or_else(|| Error::shape("the scale of A is empty"))?,
            None => 1.0,
        };
        let zero = match io.optional(3) {
            Some(zero) => *zero.to_i64s()?.first().ok_or_else(|| Error::shape("the zero point of A is empty"))?,
            None => 0,
        };
        Ok((super::quantize::checked_scale(scale, "the scale of A")?, zero as i32))
    }

    fn run_packed(&self, cx: &Cx, io: &mut Io, packed: &Packed, image: Option<&ConvInput>) -> Result<()> {
        let (a_scale, a_zero) = self.scheme(io)?;
        match &self.target {
            Target::Real { scale, .. } if self.a_zero.is_none() => cx.with_workspace(scale.len(), |both| {
                both.iter_mut().zip(scale.iter()).for_each(|(both, b)| *both = a_scale * b);
                self.finish(cx, io, packed, image, a_zero, both)
            }),
            Target::Real { scale, .. } => self.finish(cx, io, packed, image, a_zero, scale),
            Target::Quantized { multiplier, .. } => self.finish(cx, io, packed, image, a_zero, multiplier),
            Target::Sums => self.finish(cx, io, packed, image, a_zero, &[]),
        }
    }

    /// `factors` stand for the scales, or the multipliers.
    fn finish(
        &self,
        cx: &Cx,
        io: &mut Io,
        packed: &Packed,
        image: Option<&ConvInput>,
        a_zero: i32,
        factors: &[f32],
    ) -> Result<()> {
        let a = io.input(0)?;
        let residual = self.residual_index().map(|i| io.input(i)).transpose()?;
        let float_bias = match self.target {
            Target::Real { bias: true, .. } => Some(io.slice::<f32>(self.extras())?),
            _ => None,
        };
        let y = io.output(0)?;
        let output = match &self.target {
            Target::Sums => Output::Sums(y.as_slice()?),
            Target::Real { activation, .. } => Output::Real {
                scale: factors,
                bias: float_bias,
                residual: residual.map(|r| r.as_slice()).transpose()?,
                activation: *activation,
                y: y.as_slice()?,
            },
            Target::Quantized { zero, lo, hi, add, .. } => {
                let add = match (add, residual) {
                    (Some(add), Some(other)) => {
                        let &Sum { other_zero, first, second, offset, zero, lo, hi } = add;
                        Some(Addend { other: bytes(other)?, other_zero, first, second, offset, zero, lo, hi })
                    }
                    _ => None,
                };
                let requantize = Requantize { multiplier: factors, zero: *zero, lo: *lo, hi: *hi, add };
                Output::Quantized { requantize, y: bytes_mut(y)? }
            }
        };
        let bias = self.bias.as_deref();
        match (packed, image) {
            (Packed::MatMul(b), _) => {
                let (_, rows) = a.dims.split_last().ok_or_else(|| Error::shape("A is a scalar"))?;
                let a = QMatrix::new(bytes(a)?, element_count(rows)?, b.k());
                Ok(qgemm(cx, a, a_zero, b, bias, output)?)
            }
            (Packed::Conv(w), Some(image)) => Ok(w.run(cx, image, bytes(a)?, a_zero, bias, output)?),
            (Packed::Conv(_), None) => Err(Error::internal("a convolution without an image")),
        }
    }

    fn run_any(&self, cx: &Cx, io: &mut Io, packed: &Packed, image: Option<&ConvInput>) -> Result<()> {
        match &self.kind {
            Kind::Conv(c) if c.layout == Layout::Nchw => {
                let moved: Vec<usize> = [Some(0), self.residual_index()].into_iter().flatten().collect();
                run_channels_last(cx, io, &moved, &|io| self.run_packed(cx, io, packed, image))
            }
            _ => self.run_packed(cx, io, packed, image),
        }
    }
}

/// Runs in channels-last what stayed in the layout of the model, because its rank was not known: transposes the operands
/// `moved` and the result, and allocates.
pub(super) fn run_channels_last(
    cx: &Cx,
    io: &mut Io,
    moved: &[usize],
    run: &dyn Fn(&mut Io) -> Result<()>,
) -> Result<()> {
    let rank = io.input(0)?.rank();
    let last: Dims = std::iter::once(0).chain(2..rank).chain(std::iter::once(1)).collect();
    let first: Dims = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    let moved: Vec<(usize, Tensor)> =
        moved.iter().map(|&i| Ok((i, transposed(cx, io.input(i)?, &last)?))).collect::<Result<_>>()?;
    let y = io.output(0)?;
    let mut result = Tensor::zeros(y.dtype, &last.iter().map(|&i| y.dims[i]).collect::<Dims>())?;
    let mut inputs: Vec<Option<TensorView>> = io.inputs.to_vec();
    for (i, tensor) in &moved {
        inputs[*i] = Some(tensor.view());
    }
    run(&mut Io { inputs: &inputs, outputs: &mut [result.view_mut()], in_place: None })?;
    let back = transposed(cx, result.view(), &first)?;
    io.output(0)?.bytes().copy_from_slice(back.bytes());
    Ok(())
}

fn transposed(cx: &Cx, x: TensorView, perm: &[usize]) -> Result<Tensor> {
    let mut y = Tensor::zeros(x.dtype, &perm.iter().map(|&i| x.dims[i]).collect::<Dims>())?;
    Transpose::new(perm).run(cx, &mut Io { inputs: &[Some(x)], outputs: &mut [y.view_mut()], in_place: None })?;
    Ok(y)
}

impl Operator for IntegerProduct {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::MatMul(_) => "weblane.IntegerMatMul",
            Kind::Conv(_) => "weblane.IntegerConv",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        check_byte("an operand", a.dtype)?;
        check_byte("an operand", b.dtype)?;
        // Shapes are those of the product of real numbers.
        let real = |f: &Fact| Fact { dtype: DType::F32, shape: f.shape.clone(), content: Default::default() };
        let (real_a, real_b) = (real(a), real(b));
        let as_real = Infer { inputs: &[Some(&real_a), Some(&real_b)], outputs: 1, cx: cx.cx };
        let mut y = match &self.kind {
            Kind::MatMul(m) => m.infer(&as_real)?,
            Kind::Conv(c) => c.infer(&as_real)?,
        };
        if let Some(dims) = b.dims() {
            let (_, n) = self.columns(&dims)?;
            let factors = match &self.target {
                Target::Sums => 1,
                Target::Real { scale, .. } => scale.len(),
                Target::Quantized { multiplier, .. } => multiplier.len(),
            };
            let lists = [("zero points", self.b_zero.len()), ("scales", factors)];
            if let Some((what, met)) = lists.into_iter().find(|&(_, met)| met != 1 && met != n) {
                return Err(Error::shape(format!("{met} {what} for {n} columns")));
            }
        }
        let residual = self.residual_index().map(|i| cx.input(i)).transpose()?;
        if let (Some(have), Some(want)) = (residual.and_then(Fact::dims), y.first().and_then(Fact::dims))
            && have != want
        {
            return Err(Error::shape(format!("the residual is of shape {have:?}, the result {want:?}")));
        }
        let dtype = match self.target {
            Target::Sums => DType::I32,
            Target::Real { .. } => DType::F32,
            Target::Quantized { dtype, .. } => dtype,
        };
        y.iter_mut().for_each(|f| f.dtype = dtype);
        cx.results(y)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        // Transforming weights for one run is not worth it.
        let packed = self.pack(cx.isa(), Form::best_unprepared(cx.isa()), Algorithm::Direct, b)?;
        let image = self.image(a.dims, b.dims)?;
        self.run_any(cx, io, &packed, image.as_ref())
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(b) = cx.constant(1) else { return Ok(None) };
        let image = self.image(&cx.dims(0)?, b.dims())?;
        let algorithm = self.algorithm(cx.isa, b.dims(), image.as_ref())?;
        let algorithm = algorithm.ok_or_else(|| Error::internal("a convolution without an image"))?;
        let packed = self.packed(cx, algorithm, b)?;
        let results = element_count(&cx.output_dims(0)?)?;
        let flops = 2 * results.saturating_mul(self.columns(b.dims())?.0) as u64;
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, image, flops })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        let Some(b) = cx.constant(1) else { return Ok(&[]) };
        let image = match &self.kind {
            Kind::Conv(c) => c.input_if_known(cx, b.dims())?,
            Kind::MatMul(_) => None,
        };
        let Some(algorithm) = self.algorithm(cx.isa, b.dims(), image.as_ref())? else { return Ok(&[]) };
        self.packed(cx, algorithm, b)?;
        Ok(&[1])
    }

    fn channels_last(&self, operands: &[Option<&Fact>]) -> Option<Permuted> {
        let Kind::Conv(conv) = &self.kind else { return None };
        if conv.layout == Layout::Nhwc {
            return None;
        }
        let mut roles = vec![Role::Keep; operands.len()];
        roles[0] = Role::Permute;
        if let Some(role) = self.residual_index().and_then(|i| roles.get_mut(i)) {
            *role = Role::Permute;
        }
        let kind = Kind::Conv(Conv { layout: Layout::Nhwc, ..conv.clone() });
        Some(Permuted { op: IntegerProduct { kind, ..self.clone() }.into(), roles })
    }
}

#[derive(Debug)]
struct Prepared {
    op: IntegerProduct,
    packed: Arc<Packed>,
    image: Option<ConvInput>,
    flops: u64,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.op.run_any(cx, io, &self.packed, self.image.as_ref())
    }

    fn kernel(&self) -> &str {
        match &*self.packed {
            Packed::MatMul(_) => "int8 gemm",
            Packed::Conv(conv) => match conv.algorithm() {
                Algorithm::Direct => "int8 conv",
                Algorithm::Winograd(TileSize::Two) => "int8 conv winograd 2x2",
                Algorithm::Winograd(TileSize::Four) => "int8 conv winograd 4x4",
            },
        }
    }

    fn packed_operands(&self) -> &[usize] {
        &[1]
    }

    fn flops(&self) -> u64 {
        self.flops
    }
}

#[cfg(test)]
mod tests {
    use super::super::PackCache;
    use super::super::spatial::{AutoPad, Window};
    use super::*;
    use crate::fact::Dim;
    use weblane_kernels::par::Pool;

    #[test]
    fn the_size_of_the_image_decides_the_algorithm() {
        let weights = Arc::new(Tensor::from_slice(&[64, 64, 3, 3], &[1i8; 64 * 64 * 9]).unwrap());
        let axes = |sizes: &[usize]| sizes.iter().copied().collect();
        let window = Window {
            kernel: None,
            strides: axes(&[]),
            dilations: axes(&[]),
            pads: axes(&[1; 4]),
            auto_pad: AutoPad::NotSet,
            ceil: false,
        };
        let (layout, activation) = (Layout::Nhwc, Activation::Identity);
        let op = IntegerProduct {
            kind: Kind::Conv(Conv { window, groups: 1, layout, activation, residual: false }),
            a_zero: Some(0),
            b_zero: Table::shortest(vec![0]),
            bias: None,
            target: Target::Sums,
        };
        let image = |size: Dim| {
            let dims = [Dim::Known(1), size.clone(), size, Dim::Known(64)];
            Fact::with_shape(DType::U8, dims.into_iter().collect())
        };
        let output = Fact::new(DType::I32, &[1, 12, 12, 64]);
        Pool::new(1).run(Isa::best(), |cx| {
            let (cache, isa) = (PackCache::default(), cx.isa());
            let prepare = |size: Dim, run: &dyn Fn(&Prepare) -> String| {
                let inputs = [image(size), Fact::constant(weights.clone())];
                let (inputs, outputs) = (inputs.each_ref().map(Some), [&output]);
                run(&Prepare { isa, cx, inputs: &inputs, outputs: &outputs, cache: &cache })
            };
            let early = |p: &Prepare| format!("{:?}", op.prepack(p).unwrap());
            let wide = matches!(Form::best(isa), Form::Wide | Form::Split);
            assert_eq!(prepare(Dim::Unknown, &early), if wide { "[]" } else { "[1]" });
            assert_eq!(prepare(Dim::Known(12), &early), "[1]");
            let kernel = prepare(Dim::Known(12), &|p| op.prepare(p).unwrap().unwrap().kernel().to_owned());
            assert_eq!(kernel, if wide { "int8 conv winograd 4x4" } else { "int8 conv" });
            assert_eq!(cache.len(), 1, "what was packed early is what a plan asks for");
        });
    }
}
