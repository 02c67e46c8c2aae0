//! Conv: convolution over 1 to 3 spatial axes, with bias, residual and activation in its epilogue.

use super::spatial::{Window, join, split_dims, split_fact};
use super::{
    Attributes, Compute, Infer, Io, Op, Operator, Permuted, Precision, Prepare, Registration, Role, wrong_dtype,
};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::tensor::{DType, Tensor};
use std::borrow::Cow;
use std::sync::Arc;
use weblane_kernels::conv::{Algorithm, Conv as Kernel, ConvInput, ConvParams, Layout, part_of_kernels};
use weblane_kernels::epilogue::Activation;
use weblane_kernels::naive;
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;
use weblane_kernels::winograd::TileSize;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("Conv", 1, |a| Ok(parse(a)?.into())), Registration::microsoft("FusedConv", parse_fused)];

/// `activation(conv(x, w) + bias + residual)`.
///
/// Operands: x, weights `[out_channels, in_channels / groups, kernel...]` whatever the layout, optional bias
/// `[out_channels]`, and last, if `residual` is set, a tensor of the shape of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv {
    /// Strides, dilations and padding.
    pub window: Window,
    /// Channels are cut into so many independent groups.
    pub groups: usize,
    /// Of x, the residual and the result. The importer says `Nchw`, the planner may choose otherwise.
    pub layout: Layout,
    /// Applied last; set by the optimiser, ours or that of onnxruntime.
    pub activation: Activation,
    /// Whether the last operand is added before the activation; set by the optimiser as well.
    pub residual: bool,
}

/// Operands: x, weights, bias, and a tensor that is added before the activation.
fn parse_fused(a: &mut Attributes) -> Result<Op> {
    let parameters = a.floats("activation_params")?.unwrap_or_default();
    let wanted = |i: usize| Error::invalid_model(format!("attribute activation_params has no number {i}"));
    let activation = a.activation(&mut |_, i| parameters.get(i).copied().ok_or_else(|| wanted(i)))?;
    Ok(Conv { activation, residual: a.has_input(3), ..parse(a)? }.into())
}

fn parse(a: &mut Attributes) -> Result<Conv> {
    let groups = a.int_or("group", 1)?;
    let groups = usize::try_from(groups).ok().filter(|&g| g > 0 && g < 1 << 31);
    let groups = groups.ok_or_else(|| Error::unsupported_attribute("attribute group must be at least 1"))?;
    let window = Window::parse(a)?;
    Ok(Conv { window, groups, layout: Layout::Nchw, activation: Activation::Identity, residual: false })
}

impl Conv {
    /// Index of the residual among `count` operands.
    fn residual_index(&self, count: usize) -> Option<usize> {
        self.residual.then(|| count.saturating_sub(1))
    }

    /// Index of the bias among `count` operands.
    fn bias_index(&self, count: usize) -> Option<usize> {
        (count > 2 && self.residual_index(count) != Some(2)).then_some(2)
    }

    /// What does not depend on the input, from the shape of the weights.
    pub(super) fn params(&self, w: &[usize]) -> Result<ConvParams> {
        let &[_, per_group, ref kernel @ ..] = w else { return Err(Error::shape(format!("weights of shape {w:?}"))) };
        // Any input will do that the window fits into.
        let x = self.window.least_input(per_group.saturating_mul(self.groups), kernel, self.layout)?;
        Ok(self.geometry(&x, w)?.0)
    }

    pub(super) fn geometry(&self, x: &[usize], w: &[usize]) -> Result<(ConvParams, ConvInput)> {
        let (batch, in_channels, spatial) = split_dims(x, self.layout)?;
        let kernel = w.get(2..).ok_or_else(|| Error::shape(format!("weights of shape {w:?}")))?;
        let s = self.window.over(&spatial, kernel)?;
        let params = ConvParams {
            in_channels,
            out_channels: w[0],
            groups: self.groups,
            kernel: s.kernel,
            strides: s.strides,
            dilations: s.dilations,
        };
        Ok((params, ConvInput { batch, spatial: s.input, pads_begin: s.begin, pads_end: s.end }))
    }
}

impl Operator for Conv {
    fn name(&self) -> &'static str {
        "Conv"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, w) = (cx.input(0)?, cx.input(1)?);
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        for i in 1..cx.inputs.len() {
            if let Some(f) = cx.optional(i).filter(|f| f.dtype != x.dtype) {
                return Err(Error::dtype(format!("operand {i} is {}, operand 0 is {}", f.dtype, x.dtype)));
            }
        }
        let Some((batch, channels, spatial)) = split_fact(x, self.layout)? else {
            return cx.results(vec![w.rank().map_or(Fact::of_dtype(x.dtype), |r| Fact::of_rank(x.dtype, r))]);
        };
        let Some(ws) = &w.shape else {
            return cx.results(vec![Fact::of_rank(x.dtype, spatial.len() + 2)]);
        };
        if ws.len() != spatial.len() + 2 {
            return Err(Error::shape(format!(
                "x is {} and the weights are {}; both must have the same rank",
                x.shape_text(),
                w.shape_text()
            )));
        }
        if let (Some(c), Some(per_group)) = (channels.known(), ws[1].known())
            && per_group.checked_mul(self.groups) != Some(c)
        {
            return Err(Error::shape(format!(
                "x has {c} channels; weights {} with {} groups want {}",
                w.shape_text(),
                self.groups,
                per_group.saturating_mul(self.groups)
            )));
        }
        if let Some(out) = ws[0].known().filter(|o| o % self.groups != 0) {
            return Err(Error::shape(format!("{out} output channels cannot be cut into {} groups", self.groups)));
        }
        if let Some(bias) = self.bias_index(cx.inputs.len()).and_then(|i| cx.optional(i))
            && let (Some(dims), Some(out)) = (bias.dims(), ws[0].known())
            && dims.as_slice() != [out]
        {
            return Err(Error::shape(format!("the bias is {}; [{out}] was wanted", bias.shape_text())));
        }
        let spatial = self.window.infer(&spatial, &ws[2..])?;
        let y = Fact::with_shape(x.dtype, join(batch, ws[0].clone(), spatial, self.layout));
        if let Some(r) = self.residual_index(cx.inputs.len()) {
            let r = cx.input(r)?;
            if let (Some(have), Some(want)) = (r.dims(), y.dims())
                && have != want
            {
                return Err(Error::shape(format!(
                    "the residual is {}, the result is {}",
                    r.shape_text(),
                    y.shape_text()
                )));
            }
        }
        cx.results(vec![y])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, w) = (io.input(0)?, io.input(1)?);
        let (params, input) = self.geometry(x.dims, w.dims)?;
        let bias = self.bias_index(io.inputs.len()).and_then(|i| io.optional(i));
        match x.dtype {
            DType::F32 => {
                let bias = bias.map(|b| b.as_slice::<f32>()).transpose()?;
                let kernel = Kernel::new(cx.isa(), params, Algorithm::Direct, w.as_slice::<f32>()?, bias)?;
                self.run_kernel(cx, io, &kernel, &input)
            }
            DType::F64 if self.layout == Layout::Nchw && !self.residual && self.activation == Activation::Identity => {
                let bias = bias.map(|b| b.as_slice::<f64>()).transpose()?;
                let (x, w) = (x.as_slice::<f64>()?, w.as_slice::<f64>()?);
                naive::conv(&params, &input, x, w, bias, io.output(0)?.as_slice::<f64>()?)?;
                Ok(())
            }
            other => Err(wrong_dtype("the operand", other, "float32 and float64")),
        }
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(weights) = cx.constant(1).filter(|w| w.dtype() == DType::F32) else { return Ok(None) };
        let bias_index = self.bias_index(cx.inputs.len()).filter(|&i| cx.has(i));
        let bias = bias_index.and_then(|i| cx.constant(i)).cloned();
        if bias_index.is_some() && bias.is_none() {
            return Ok(None);
        }
        let (params, input) = self.geometry(&cx.dims(0)?, weights.dims())?;
        let packed_for = |whole: [usize; 3], (params, input, first): (ConvParams, ConvInput, [usize; 3])| {
            let algorithm = algorithm(cx, &params, Some(&input)).unwrap_or(Algorithm::Direct);
            Ok((pack(cx, weights, bias.clone(), whole, params, first, algorithm)?, input))
        };
        // Weights that were packed and dropped before the size of the image was known are there with all taps only.
        let whole = params.kernel;
        let (packed, input) = packed_for(whole, params.trimmed(&input)?)
            .or_else(|_: Error| packed_for(whole, (params.clone(), input.clone(), [0; 3])))?;
        let flops = input_flops(&packed.kernel, &input)?;
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, input, flops })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        let Some(weights) = cx.constant(1).filter(|w| w.dtype() == DType::F32) else { return Ok(&[]) };
        let bias_index = self.bias_index(cx.inputs.len()).filter(|&i| cx.has(i));
        let bias = bias_index.and_then(|i| cx.constant(i)).cloned();
        if bias_index.is_some() && bias.is_none() {
            return Ok(&[]);
        }
        let params = self.params(weights.dims())?;
        let input = self.input_if_known(cx, weights.dims())?;
        // Without the size of the image the choice has to wait, and with it the packing.
        let whole = params.kernel;
        let (params, input, first) = match input.map(|input| params.trimmed(&input)).transpose()? {
            Some((params, input, first)) => (params, Some(input), first),
            None => (params, None, [0; 3]),
        };
        let Some(algorithm) = algorithm(cx, &params, input.as_ref()) else { return Ok(&[]) };
        pack(cx, weights, bias, whole, params, first, algorithm)?;
        Ok(&[1])
    }

    fn channels_last(&self, operands: &[Option<&Fact>]) -> Option<Permuted> {
        let x = operands.first()?.as_ref()?;
        if x.dtype != DType::F32 || self.layout == Layout::Nhwc {
            return None;
        }
        let mut roles = vec![Role::Keep; operands.len()];
        roles[0] = Role::Permute;
        if let Some(i) = self.residual_index(operands.len()) {
            roles[i] = Role::Permute;
        }
        Some(Permuted { op: Conv { layout: Layout::Nhwc, ..self.clone() }.into(), roles })
    }
}

impl Conv {
    /// The input for one image, if the sizes of images are known.
    pub(super) fn input_if_known(&self, cx: &Prepare, w: &[usize]) -> Result<Option<ConvInput>> {
        let Some(x) = cx.inputs.first().and_then(Option::as_ref) else { return Ok(None) };
        let Some((_, _, spatial)) = split_fact(x, self.layout)? else { return Ok(None) };
        let Some(spatial) = spatial.iter().map(Dim::known).collect::<Option<Vec<_>>>() else { return Ok(None) };
        let kernel = w.get(2..).ok_or_else(|| Error::shape(format!("weights of shape {w:?}")))?;
        let s = self.window.over(&spatial, kernel)?;
        Ok(Some(ConvInput { batch: 1, spatial: s.input, pads_begin: s.begin, pads_end: s.end }))
    }

    fn run_kernel(&self, cx: &Cx, io: &mut Io, kernel: &Kernel, input: &ConvInput) -> Result<()> {
        let x = io.slice::<f32>(0)?;
        let residual = self.residual_index(io.inputs.len()).map(|i| io.slice::<f32>(i)).transpose()?;
        let y = io.output(0)?.as_slice::<f32>()?;
        Ok(kernel.run(cx, input, self.layout, x, residual, self.activation, y)?)
    }
}

/// The algorithm; `None` if it depends on the input, and that is not known yet.
fn algorithm(cx: &Prepare, params: &ConvParams, input: Option<&ConvInput>) -> Option<Algorithm> {
    match cx.cache.precision() {
        Precision::Fast if Algorithm::depends_on_input(cx.isa, params) => {
            input.map(|input| Algorithm::choose(cx.isa, params, input))
        }
        Precision::Fast | Precision::Exact => Some(Algorithm::Direct),
    }
}

/// Multiplications and additions of one convolution.
fn input_flops(kernel: &Kernel, input: &ConvInput) -> Result<u64> {
    let p = kernel.params();
    let windows: usize = kernel.output_spatial(input)?.iter().product();
    let taps: usize = p.kernel.iter().product();
    let per_output = taps.saturating_mul(p.in_channels / p.groups.max(1));
    Ok(2 * (input.batch.saturating_mul(windows).saturating_mul(p.out_channels)).saturating_mul(per_output) as u64)
}

/// Packed weights with their bias. The bias tensor is kept alive so that its address, part of the key in the cache,
/// cannot come to mean another tensor.
#[derive(Debug)]
struct Packed {
    kernel: Kernel,
    _bias: Option<Arc<Tensor>>,
}

/// Packs the taps from `first` on of a kernel of size `whole`, as many as `params` says.
fn pack(
    cx: &Prepare,
    weights: &Arc<Tensor>,
    bias: Option<Arc<Tensor>>,
    whole: [usize; 3],
    params: ConvParams,
    first: [usize; 3],
    algorithm: Algorithm,
) -> Result<Arc<Packed>> {
    let isa: Isa = cx.isa;
    let kind = format!("conv {isa} {algorithm:?} {params:?} {first:?} {:?}", bias.as_ref().map(Arc::as_ptr));
    cx.cache.get(weights, &kind, |w| {
        let b = bias.as_ref().map(|b| b.as_slice::<f32>()).transpose()?;
        let mut w = Cow::Borrowed(w.as_slice::<f32>()?);
        if params.kernel != whole {
            w = part_of_kernels(&w, whole, first, params.kernel).into();
        }
        let kernel = Kernel::new(isa, params, algorithm, &w, b)?;
        Ok(Packed { kernel, _bias: bias })
    })
}

#[derive(Debug)]
struct Prepared {
    op: Conv,
    packed: Arc<Packed>,
    input: ConvInput,
    flops: u64,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.op.run_kernel(cx, io, &self.packed.kernel, &self.input)
    }

    fn kernel(&self) -> &str {
        match self.packed.kernel.algorithm() {
            Algorithm::Direct => "conv",
            Algorithm::Winograd(TileSize::Two) => "conv winograd 2x2",
            Algorithm::Winograd(TileSize::Four) => "conv winograd 4x4",
        }
    }

    fn packed_operands(&self) -> &[usize] {
        match self.packed._bias {
            Some(_) => &[1, 2],
            None => &[1],
        }
    }

    fn flops(&self) -> u64 {
        self.flops
    }
}

#[cfg(test)]
mod tests {
    use super::super::PackCache;
    use super::super::spatial::AutoPad;
    use super::super::testing::{OneNode, f32s};
    use super::*;
    use weblane_kernels::par::Pool;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32).collect()
    }

    #[test]
    fn the_example_of_the_specification() {
        let y = OneNode::new("Conv")
            .ints("pads", &[1, 1, 1, 1])
            .ints("kernel_shape", &[3, 3])
            .run(&[f32s(&[1, 1, 5, 5], &ramp(25)), f32s(&[1, 1, 3, 3], &[1.0; 9])])
            .unwrap();
        assert_eq!(y[0].dims(), [1, 1, 5, 5]);
        assert_eq!(y[0].as_slice::<f32>().unwrap()[..6], [12.0, 21.0, 27.0, 33.0, 24.0, 33.0]);
    }

    #[test]
    fn one_axis_with_groups_and_bias() {
        let x = f32s(&[1, 2, 4], &ramp(8));
        let w = f32s(&[2, 1, 2], &[1.0, 1.0, 1.0, -1.0]);
        let y = OneNode::new("Conv").int("group", 2).run(&[x, w, f32s(&[2], &[0.5, 10.0])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [1.5, 3.5, 5.5, 9.0, 9.0, 9.0]);
    }

    #[test]
    fn precision_decides_the_algorithm() {
        let (x, w) = (Fact::new(DType::F32, &[1, 16, 12, 12]), Arc::new(f32s(&[16, 16, 3, 3], &ramp(2304))));
        let output = Fact::new(DType::F32, &[1, 16, 12, 12]);
        let axes = |sizes: &[usize]| sizes.iter().copied().collect();
        let (strides, dilations, pads) = (axes(&[]), axes(&[]), axes(&[1; 4]));
        let window = Window { kernel: None, strides, dilations, pads, auto_pad: AutoPad::NotSet, ceil: false };
        let (layout, activation) = (Layout::Nchw, Activation::Identity);
        let conv = Conv { window, groups: 1, layout, activation, residual: false };
        let known = |x: &[Dim]| Fact::with_shape(DType::F32, x.iter().cloned().collect());
        let [batch, channels, size] = [Dim::Symbol("n".into()), Dim::Known(16), Dim::Known(12)];
        let images = known(&[batch.clone(), channels.clone(), size.clone(), size]);
        let unknown = known(&[batch, channels, Dim::Unknown, Dim::Unknown]);
        Pool::new(1).run(Isa::best(), |cx| {
            for (precision, kernel) in [(Precision::Fast, "conv winograd 4x4"), (Precision::Exact, "conv")] {
                let cache = PackCache::new(precision);
                let prepare = |x: &Fact, now: bool| {
                    let w = Fact::constant(w.clone());
                    let (inputs, outputs) = ([Some(x), Some(&w)], [&output]);
                    let prepare = Prepare { isa: cx.isa(), cx, inputs: &inputs, outputs: &outputs, cache: &cache };
                    if now {
                        conv.prepare(&prepare).unwrap().unwrap().kernel().to_owned()
                    } else {
                        format!("{:?}", conv.prepack(&prepare).unwrap())
                    }
                };
                let early = if precision == Precision::Fast { "[]" } else { "[1]" };
                assert_eq!(prepare(&unknown, false), early, "the choice has to wait for the size");
                // The form that was packed before shapes were known is the one that a plan asks for.
                assert_eq!(prepare(&images, false), "[1]");
                assert_eq!(cache.len(), 1);
                assert_eq!(prepare(&x, true), kernel);
                assert_eq!(cache.len(), 1);
            }
        });
    }

    #[test]
    fn taps_in_the_padding_are_not_packed() {
        let (x, w) = (ramp(8), ramp(18));
        let bias = f32s(&[1], &[0.5]);
        let pads = OneNode::new("Conv").ints("pads", &[2; 4]).ints("dilations", &[2, 2]);
        let y = pads.run(&[f32s(&[1, 2, 2, 2], &x), f32s(&[1, 2, 3, 3], &w), bias]).unwrap();
        let want: Vec<f32> = (0..4).map(|i| 4.0 * x[i] + 13.0 * x[4 + i] + 0.5).collect();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), want);
        // Of unknown size: all taps are packed before, and the plan makes do with them.
        let conv = |size: Dim| {
            let axes = |sizes: &[usize]| sizes.iter().copied().collect();
            let (strides, dilations, pads) = (axes(&[]), axes(&[2, 2]), axes(&[2; 4]));
            let window = Window { kernel: None, strides, dilations, pads, auto_pad: AutoPad::NotSet, ceil: false };
            let (layout, activation) = (Layout::Nchw, Activation::Identity);
            let conv = Conv { window, groups: 1, layout, activation, residual: false };
            let w = Arc::new(f32s(&[1, 2, 3, 3], &w));
            let dims = [Dim::Known(1), Dim::Known(2), size.clone(), size];
            let early = [Fact::with_shape(DType::F32, dims.into_iter().collect()), Fact::constant(w.clone())];
            let output = Fact::new(DType::F32, &[1, 1, 2, 2]);
            let cache = PackCache::new(Precision::Fast);
            Pool::new(1).run(Isa::best(), |cx| {
                let (inputs, outputs) = (early.each_ref().map(Some), [&output]);
                let prepare = Prepare { isa: cx.isa(), cx, inputs: &inputs, outputs: &outputs, cache: &cache };
                assert_eq!(conv.prepack(&prepare).unwrap(), [1]);
                let released = Arc::new(Tensor::released(DType::F32, &[1, 2, 3, 3]));
                cache.release(&w, &released).unwrap();
                let late = [Fact::new(DType::F32, &[1, 2, 2, 2]), Fact::constant(released)];
                let inputs = late.each_ref().map(Some);
                let prepare = Prepare { isa: cx.isa(), cx, inputs: &inputs, outputs: &outputs, cache: &cache };
                let flops = conv.prepare(&prepare).unwrap().unwrap().flops();
                assert_eq!(cache.len(), 1);
                flops
            })
        };
        assert_eq!([conv(Dim::Known(2)), conv(Dim::Unknown)], [16, 144]);
    }

    #[test]
    fn symbolic_sizes() {
        let x =
            Fact::with_shape(DType::F32, [Dim::Symbol("n".into()), Dim::Known(3), Dim::Unknown].into_iter().collect());
        let w = Fact::new(DType::F32, &[8, 3, 3]);
        let y = OneNode::new("Conv").ints("pads", &[1, 1]).infer(&[Some(x), Some(w)]).unwrap();
        assert_eq!(y[0].shape_text(), "[n, 8, ?]");
    }

    #[test]
    fn mistakes_are_named() {
        let e = OneNode::new("Conv").run(&[f32s(&[1, 2, 4], &ramp(8)), f32s(&[1, 1, 2], &[1.0; 2])]).unwrap_err();
        assert!(e.message.contains("x has 2 channels"), "{e}");
        let e = OneNode::new("Conv").int("group", 0).run(&[f32s(&[1, 1, 1], &[1.0]), f32s(&[1, 1, 1], &[1.0])]);
        assert!(e.is_err());
    }
}
