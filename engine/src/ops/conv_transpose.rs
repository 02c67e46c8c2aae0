//! ConvTranspose: transposed convolution over 1 to 3 spatial axes.

use super::spatial::{AutoPad, Axes, Window, join, split_dims, split_fact};
use super::{Attributes, Compute, Infer, Io, Op, Operator, Permuted, Prepare, Registration, Role, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;
use weblane_kernels::conv::{ConvParams, Layout};
use weblane_kernels::conv_transpose::{ConvTranspose as Kernel, ConvTransposeInput};
use weblane_kernels::epilogue::Activation;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("ConvTranspose", 1, parse)];

/// Operands: x, weights `[in_channels, out_channels / groups, kernel...]` whatever the layout, optional bias.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvTranspose {
    /// Strides, dilations and padding.
    pub window: Window,
    /// Channels are cut into so many independent groups.
    pub groups: usize,
    /// Elements added behind each axis of the result.
    pub output_padding: Axes,
    /// Sizes of the result; padding follows from them.
    pub output_shape: Option<Axes>,
    /// Of x and the result.
    pub layout: Layout,
    /// Applied last; set by the optimiser.
    pub activation: Activation,
}

fn sizes(name: &str, values: Option<Vec<i64>>) -> Result<Option<Axes>> {
    let one = |v: i64| {
        usize::try_from(v)
            .ok()
            .filter(|&v| v < 1 << 31)
            .ok_or_else(|| Error::unsupported_attribute(format!("attribute {name} has {v}; a size was wanted")))
    };
    values.map(|v| v.into_iter().map(one).collect()).transpose()
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let groups = a.int_or("group", 1)?;
    let groups = usize::try_from(groups).ok().filter(|&g| g > 0 && g < 1 << 31);
    let groups = groups.ok_or_else(|| Error::unsupported_attribute("attribute group must be at least 1"))?;
    let window = Window::parse(a)?;
    let output_padding = sizes("output_padding", a.ints("output_padding")?)?.unwrap_or_default();
    let output_shape = sizes("output_shape", a.ints("output_shape")?)?.filter(|s| !s.is_empty());
    let (layout, activation) = (Layout::Nchw, Activation::Identity);
    Ok(ConvTranspose { window, groups, output_padding, output_shape, layout, activation }.into())
}

/// Padding before and after, added elements, and size of the result along one axis.
struct AxisSizes {
    begin: usize,
    end: usize,
    extra: usize,
    output: usize,
}

impl ConvTranspose {
    fn axis(&self, i: usize, rank: usize, input: usize, kernel: usize) -> Result<AxisSizes> {
        let at = |list: &Axes, i: usize, default| list.get(i).copied().unwrap_or(default);
        let (stride, dilation) = (at(&self.window.strides, i, 1), at(&self.window.dilations, i, 1));
        let extra = at(&self.output_padding, i, 0);
        if kernel == 0 || input == 0 {
            return Err(Error::shape(format!("a window of {kernel} over {input} elements; both must be at least 1")));
        }
        let full = (input - 1)
            .checked_mul(stride)
            .and_then(|n| n.checked_add((kernel - 1).checked_mul(dilation)?)?.checked_add(1)?.checked_add(extra));
        let full = full.ok_or_else(|| Error::limit("the size of the result overflows"))?;
        let same = matches!(self.window.auto_pad, AutoPad::SameUpper | AutoPad::SameLower);
        let wanted = match &self.output_shape {
            Some(shape) => Some(at(shape, i, 1)),
            None if same => Some(input.saturating_mul(stride)),
            None => None,
        };
        let Some(output) = wanted else {
            let pad = |j| if self.window.auto_pad == AutoPad::NotSet { at(&self.window.pads, j, 0) } else { 0 };
            let (begin, end) = (pad(i), pad(rank + i));
            let output = begin.checked_add(end).and_then(|p| full.checked_sub(p)).filter(|&o| o > 0);
            let output =
                output.ok_or_else(|| Error::shape(format!("padding {begin} and {end} leaves nothing of {full}")))?;
            return Ok(AxisSizes { begin, end, extra, output });
        };
        if output == 0 {
            return Err(Error::shape("attribute output_shape has 0; at least 1 was wanted"));
        }
        // More than the window reaches is filled behind; less is cut off on both sides.
        let total = full.saturating_sub(output);
        let (less, more) = (total / 2, total - total / 2);
        let (begin, end) = if self.window.auto_pad == AutoPad::SameUpper { (less, more) } else { (more, less) };
        Ok(AxisSizes { begin, end, extra: extra + output.saturating_sub(full), output })
    }

    fn check_lists(&self, rank: usize) -> Result<()> {
        self.window.check_rank(rank)?;
        for (name, len) in [
            ("output_padding", self.output_padding.len()),
            ("output_shape", self.output_shape.as_ref().map_or(0, |s| s.len())),
        ] {
            if len != 0 && len != rank {
                return Err(Error::invalid_model(format!("attribute {name} has {len} numbers; {rank} were wanted")));
            }
        }
        Ok(())
    }

    fn geometry(&self, x: &[usize], w: &[usize]) -> Result<(ConvParams, ConvTransposeInput)> {
        let (batch, in_channels, spatial) = split_dims(x, self.layout)?;
        let rank = spatial.len();
        self.check_lists(rank)?;
        let kernel = w.get(2..).filter(|k| k.len() == rank);
        let kernel = kernel.ok_or_else(|| Error::shape(format!("weights of shape {w:?} for {rank} spatial axes")))?;
        let mut p = ConvParams {
            in_channels,
            out_channels: w[1].saturating_mul(self.groups),
            groups: self.groups,
            kernel: [1; 3],
            strides: [1; 3],
            dilations: [1; 3],
        };
        let zero = [0; 3];
        let mut input =
            ConvTransposeInput { batch, spatial: [1; 3], pads_begin: zero, pads_end: zero, output_padding: zero };
        for i in 0..rank {
            let to = 3 - rank + i;
            let sizes = self.axis(i, rank, spatial[i], kernel[i])?;
            p.kernel[to] = kernel[i];
            p.strides[to] = self.window.strides.get(i).copied().unwrap_or(1);
            p.dilations[to] = self.window.dilations.get(i).copied().unwrap_or(1);
            input.spatial[to] = spatial[i];
            input.pads_begin[to] = sizes.begin;
            input.pads_end[to] = sizes.end;
            input.output_padding[to] = sizes.extra;
        }
        Ok((p, input))
    }

    fn run_kernel(&self, cx: &Cx, io: &mut Io, kernel: &Kernel, input: &ConvTransposeInput) -> Result<()> {
        let x = io.slice::<f32>(0)?;
        let y = io.output(0)?.as_slice::<f32>()?;
        Ok(kernel.run(cx, input, self.layout, x, self.activation, y)?)
    }
}

impl Operator for ConvTranspose {
    fn name(&self) -> &'static str {
        "ConvTranspose"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, w) = (cx.input(0)?, cx.input(1)?);
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        let Some((batch, channels, spatial)) = split_fact(x, self.layout)? else {
            return cx.results(vec![Fact::of_dtype(x.dtype)]);
        };
        let rank = spatial.len();
        self.check_lists(rank)?;
        let Some(ws) = &w.shape else { return cx.results(vec![Fact::of_rank(x.dtype, rank + 2)]) };
        if ws.len() != rank + 2 {
            return Err(Error::shape(format!(
                "x is {} and the weights are {}; both must have the same rank",
                x.shape_text(),
                w.shape_text()
            )));
        }
        if let (Some(c), Some(wc)) = (channels.known(), ws[0].known())
            && (c != wc || c % self.groups != 0)
        {
            return Err(Error::shape(format!(
                "x has {c} channels; weights {} with {} groups want {wc}",
                w.shape_text(),
                self.groups
            )));
        }
        let out_channels = match ws[1].known() {
            None => Dim::Unknown,
            Some(n) => Dim::Known(
                n.checked_mul(self.groups).ok_or_else(|| Error::limit("the number of output channels overflows"))?,
            ),
        };
        if let (Some(b), Some(c)) = (cx.optional(2).and_then(Fact::dims), out_channels.known())
            && b.as_slice() != [c]
        {
            return Err(Error::shape(format!("the bias is of shape {b:?}; [{c}] was wanted")));
        }
        if let Some(said) = &self.window.kernel
            && let Some(kernel) = ws[2..].iter().map(Dim::known).collect::<Option<Axes>>()
            && kernel != *said
        {
            return Err(Error::shape(format!("attribute kernel_shape is {said:?}, the weights have {kernel:?}")));
        }
        let one = |(i, (x, k)): (usize, (&Dim, &Dim))| match (x.known(), k.known()) {
            (Some(x), Some(k)) => Ok(Dim::Known(self.axis(i, rank, x, k)?.output)),
            _ => Ok(self.output_shape.as_ref().and_then(|s| s.get(i)).map_or(Dim::Unknown, |&n| Dim::Known(n))),
        };
        let out: Shape = spatial.iter().zip(&ws[2..]).enumerate().map(one).collect::<Result<_>>()?;
        cx.results(vec![Fact::with_shape(x.dtype, join(batch, out_channels, out, self.layout))])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, w) = (io.input(0)?, io.input(1)?);
        if x.dtype != DType::F32 {
            return Err(wrong_dtype("the operand", x.dtype, "float32"));
        }
        let (params, input) = self.geometry(x.dims, w.dims)?;
        let bias = io.optional(2).map(|b| b.as_slice::<f32>()).transpose()?;
        let kernel = Kernel::new(cx.isa(), params, w.as_slice::<f32>()?, bias)?;
        self.run_kernel(cx, io, &kernel, &input)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(weights) = cx.constant(1).filter(|w| w.dtype() == DType::F32) else { return Ok(None) };
        let bias = cx.constant(2).cloned();
        if cx.has(2) && bias.is_none() {
            return Ok(None);
        }
        let (params, input) = self.geometry(&cx.dims(0)?, weights.dims())?;
        let packed = pack(cx, weights, bias, params)?;
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, input })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        let Some(weights) = cx.constant(1).filter(|w| w.dtype() == DType::F32) else { return Ok(&[]) };
        let bias = cx.constant(2).cloned();
        let &[in_channels, _, ref kernel @ ..] = weights.dims() else { return Ok(&[]) };
        // An output_shape may fit no input but the model's own.
        let x = self.window.least_input(in_channels, kernel, self.layout)?;
        let Ok((params, _)) = self.geometry(&x, weights.dims()) else { return Ok(&[]) };
        if cx.has(2) && bias.is_none() {
            return Ok(&[]);
        }
        pack(cx, weights, bias, params)?;
        Ok(&[1])
    }

    fn channels_last(&self, operands: &[Option<&Fact>]) -> Option<Permuted> {
        let x = operands.first()?.as_ref()?;
        if x.dtype != DType::F32 || self.layout == Layout::Nhwc {
            return None;
        }
        let mut roles = vec![Role::Keep; operands.len()];
        roles[0] = Role::Permute;
        Some(Permuted { op: ConvTranspose { layout: Layout::Nhwc, ..self.clone() }.into(), roles })
    }
}

fn pack(cx: &Prepare, weights: &Arc<Tensor>, bias: Option<Arc<Tensor>>, params: ConvParams) -> Result<Arc<Packed>> {
    let isa = cx.isa;
    let kind = format!("conv_transpose {isa} {params:?} {:?}", bias.as_ref().map(Arc::as_ptr));
    cx.cache.get(weights, &kind, |w| {
        let b = bias.as_ref().map(|b| b.as_slice::<f32>()).transpose()?;
        let kernel = Kernel::new(isa, params, w.as_slice::<f32>()?, b)?;
        Ok(Packed { kernel, bias })
    })
}

/// Packed weights; the bias tensor stays alive because its address is part of the key in the cache.
struct Packed {
    kernel: Kernel,
    bias: Option<Arc<Tensor>>,
}

struct Prepared {
    op: ConvTranspose,
    packed: Arc<Packed>,
    input: ConvTransposeInput,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("op", &self.op).finish_non_exhaustive()
    }
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.op.run_kernel(cx, io, &self.packed.kernel, &self.input)
    }

    fn kernel(&self) -> &str {
        "conv_transpose"
    }

    fn packed_operands(&self) -> &[usize] {
        if self.packed.bias.is_some() { &[1, 2] } else { &[1] }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};

    #[test]
    fn windows_overlap_and_add() {
        let (x, w) = (f32s(&[1, 1, 2], &[1.0, 2.0]), f32s(&[1, 1, 3], &[1.0, 10.0, 100.0]));
        let run = |node: OneNode| node.run(&[x.clone(), w.clone()]).unwrap()[0].as_slice::<f32>().unwrap().to_vec();
        assert_eq!(run(OneNode::new("ConvTranspose")), [1.0, 12.0, 120.0, 200.0]);
        assert_eq!(run(OneNode::new("ConvTranspose").ints("pads", &[1, 1])), [12.0, 120.0]);
        let strided = || OneNode::new("ConvTranspose").ints("strides", &[2]);
        assert_eq!(run(strided()), [1.0, 10.0, 102.0, 20.0, 200.0]);
        assert_eq!(run(strided().ints("output_padding", &[1])), [1.0, 10.0, 102.0, 20.0, 200.0, 0.0]);
        assert_eq!(run(strided().ints("output_shape", &[4])), [10.0, 102.0, 20.0, 200.0]);
        assert_eq!(
            run(strided().attr("auto_pad", crate::onnx::AttributeValue::String(b"SAME_UPPER".to_vec()))).len(),
            4
        );
    }

    #[test]
    fn mistakes_are_named() {
        let (x, w) = (f32s(&[1, 2, 1], &[1.0; 2]), f32s(&[1, 1, 3], &[1.0; 3]));
        let e = OneNode::new("ConvTranspose").run(&[x, w.clone()]).unwrap_err();
        assert!(e.message.contains("x has 2 channels"), "{e}");
        let e = OneNode::new("ConvTranspose").ints("pads", &[2, 2]).run(&[f32s(&[1, 1, 1], &[1.0]), w]).unwrap_err();
        assert!(e.message.contains("leaves nothing"), "{e}");
    }
}
