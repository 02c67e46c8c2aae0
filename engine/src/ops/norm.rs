//! Normalisations by the statistics of the operand itself.

use super::reduce::around;
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, axis_index};
use crate::for_dtype;
use crate::tensor::{DType, Dims, TensorView};
use smallvec::SmallVec;
use weblane_kernels::conv::Layout;
use weblane_kernels::naive::Number;
use weblane_kernels::norm::{
    Affine, ChannelGroups, Normalize, Statistics, Sum, local_response, normalize, normalize_any,
    normalize_channel_groups, normalize_sum, unit_length,
};
use weblane_kernels::par::Cx;
use weblane_kernels::reduce::{Reduction, reduce_any};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("LayerNormalization", 1, parse_layer),
    Registration::onnx("RMSNormalization", 23, parse_rms),
    // Exporters of onnxruntime put these under ONNX's own domain, before ONNX had the first.
    Registration::onnx("SimplifiedLayerNormalization", 1, parse_rms),
    Registration::microsoft("LayerNormalization", parse_layer),
    Registration::microsoft("SimplifiedLayerNormalization", parse_rms),
    Registration::microsoft("SkipLayerNormalization", parse_skip),
    Registration::microsoft("SkipSimplifiedLayerNormalization", parse_skip),
    Registration::onnx("InstanceNormalization", 6, parse_instance),
    Registration::onnx("GroupNormalization", 18, parse_group),
    Registration::onnx("LpNormalization", 1, parse_lp),
    Registration::onnx("MeanVarianceNormalization", 9, parse_mean_variance),
    Registration::onnx("LRN", 1, parse_lrn),
];

fn float(fact: &Fact) -> Result<()> {
    match fact.dtype.is_float() {
        true => Ok(()),
        false => Err(wrong_dtype("the operand", fact.dtype, "floating-point numbers")),
    }
}

fn same(fact: &Fact) -> Fact {
    Fact { content: Default::default(), ..fact.clone() }
}

/// LayerNorm and, without `center`, RMSNorm over the axis and all behind it. Operands x, scale, optional bias.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNormalization {
    /// The first of the normalised axes.
    pub axis: i64,
    /// Added to the variance.
    pub epsilon: f32,
    /// Whether the mean is subtracted.
    pub center: bool,
}

/// Statistics are computed in `float32` for `float32` and below and in `float64` for `float64`, whatever type the model
/// asks for: no less exact than it wants.
fn parse_stash(a: &mut Attributes) -> Result<()> {
    match a.int_or("stash_type", 1)? {
        1 | 10 | 11 | 16 => Ok(()),
        other => Err(Error::unsupported_attribute(format!("attribute stash_type is {other}; a float type was wanted"))),
    }
}

fn parse_layer(a: &mut Attributes) -> Result<Op> {
    parse_stash(a)?;
    let (axis, epsilon) = (a.int_or("axis", -1)?, a.float_or("epsilon", 1e-5)?);
    Ok(LayerNormalization { axis, epsilon, center: true }.into())
}

fn parse_rms(a: &mut Attributes) -> Result<Op> {
    parse_stash(a)?;
    let (axis, epsilon) = (a.int_or("axis", -1)?, a.float_or("epsilon", 1e-5)?);
    Ok(LayerNormalization { axis, epsilon, center: false }.into())
}

/// An operand that broadcasts to the last axes, expanded to all of them unless it has them already.
fn expanded<T: Copy>(v: TensorView, values: &[T], normalized: &[usize]) -> Option<Vec<T>> {
    let n: usize = normalized.iter().product();
    if values.len() == n {
        return None;
    }
    let dims = &v.dims[v.rank().saturating_sub(normalized.len())..];
    let mut out = Vec::with_capacity(n);
    for mut i in 0..n {
        let (mut at, mut step) = (0, 1);
        for (a, &d) in normalized.iter().enumerate().rev() {
            let own = (a + dims.len()).checked_sub(normalized.len()).map_or(1, |j| dims[j]);
            if own != 1 {
                at += i % d * step;
            }
            step *= own;
            i /= d;
        }
        out.push(values[at]);
    }
    Some(out)
}

impl Operator for LayerNormalization {
    fn name(&self) -> &'static str {
        if self.center { "LayerNormalization" } else { "RMSNormalization" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        float(x)?;
        // Statistics are as wide as the operand, except that those of halves are float32.
        let wide = if x.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let Some(shape) = &x.shape else {
            return cx.results(vec![same(x), Fact::of_dtype(wide), Fact::of_dtype(wide)]);
        };
        let axis = axis_index(self.axis, shape.len())?;
        for i in 1..cx.inputs.len().min(3) {
            let Some(dims) = cx.optional(i).and_then(Fact::dims) else { continue };
            let fits = dims.len() <= shape.len()
                && dims
                    .iter()
                    .rev()
                    .zip(shape.iter().rev().take(shape.len() - axis).map(Some).chain(std::iter::repeat(None)))
                    .all(|(&d, x)| d == 1 || x.is_some_and(|x| x.known().is_none_or(|x| x == d)));
            if !fits {
                return Err(Error::shape(format!(
                    "operand {i} is of shape {dims:?}, which does not broadcast to the axes from {axis} on of {}",
                    x.shape_text()
                )));
            }
        }
        let reduced = shape.iter().enumerate().map(|(i, d)| if i < axis { d.clone() } else { Dim::Known(1) });
        let stats = Fact::with_shape(wide, reduced.collect());
        cx.results(vec![same(x), stats.clone(), stats])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let dims: Dims = io.output(0)?.dims.into();
        let axis = axis_index(self.axis, dims.len())?;
        let n: usize = dims[axis..].iter().product();
        let dtype = io.output(0)?.dtype;
        if dtype == DType::F64 {
            return self.run_f64(io, &dims, axis, n);
        }
        if dtype != DType::F32 {
            return Err(wrong_dtype("the operand", dtype, "float32 and float64"));
        }
        let parameter = |i: usize| io.optional(i).map(|v| v.as_slice::<f32>().map(|s| (v, s))).transpose();
        let (scale, bias) = (parameter(1)?, parameter(2)?);
        let wide_scale = scale.and_then(|(v, s)| expanded(v, s, &dims[axis..]));
        let wide_bias = bias.and_then(|(v, s)| expanded(v, s, &dims[axis..]));
        let x = io.optional(0).map(|x| x.as_slice::<f32>()).transpose()?;
        let p = Normalize {
            n,
            epsilon: self.epsilon,
            center: self.center,
            scale: wide_scale.as_deref().or(scale.map(|s| s.1)),
            bias: wide_bias.as_deref().or(bias.map(|s| s.1)),
            affine: Affine::PerElement,
        };
        let (y, rest) = io.outputs.split_first_mut().ok_or_else(|| Error::internal("no result"))?;
        let mut rest = rest.iter_mut().map(|t| t.as_slice::<f32>());
        // Without a mean there is none among the results.
        let mean = if self.center { rest.next().transpose()? } else { None };
        let stats = Statistics { mean, inverse: rest.next().transpose()? };
        Ok(normalize(cx, &p, x, y.as_slice::<f32>()?, stats)?)
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }
}

impl LayerNormalization {
    fn run_f64(&self, io: &mut Io, dims: &[usize], axis: usize, n: usize) -> Result<()> {
        let held;
        let x = match io.optional(0) {
            Some(x) => x.as_slice::<f64>()?,
            None => {
                held = io.output(0)?.as_slice::<f64>()?.to_vec();
                &held
            }
        };
        let parameter = |i: usize| io.optional(i).map(|v| v.as_slice::<f64>().map(|s| (v, s))).transpose();
        let (scale, bias) = (parameter(1)?, parameter(2)?);
        let wide_scale = scale.and_then(|(v, s)| expanded(v, s, &dims[axis..]));
        let wide_bias = bias.and_then(|(v, s)| expanded(v, s, &dims[axis..]));
        let (scale, bias) = (wide_scale.as_deref().or(scale.map(|s| s.1)), wide_bias.as_deref().or(bias.map(|s| s.1)));
        let epsilon = f64::from(self.epsilon);
        for (r, row) in x.chunks_exact(n.max(1)).enumerate() {
            let mean = if self.center { row.iter().sum::<f64>() / n as f64 } else { 0.0 };
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            let inverse = 1.0 / (var + epsilon).sqrt();
            // Without a mean there is none among the results.
            let stats = if self.center { [mean, inverse] } else { [inverse; 2] };
            for (result, value) in io.outputs.iter_mut().skip(1).zip(stats) {
                result.as_slice::<f64>()?[r] = value;
            }
        }
        normalize_any(x, n, epsilon, self.center, scale, bias, |_, i| i, io.output(0)?.as_slice::<f64>()?);
        Ok(())
    }
}

/// onnxruntime's `LayerNormalization(x + skip + bias)`. Operands x, skip, gamma, then beta (LayerNorm only), bias.
/// Results: the normalised sum, the mean of each row (0 for RMSNorm), the reciprocal of its deviation, the sum.
#[derive(Clone, Debug, PartialEq)]
pub struct SkipLayerNormalization {
    /// Added to the variance.
    pub epsilon: f32,
    /// Whether the mean is subtracted.
    pub center: bool,
}

fn parse_skip(a: &mut Attributes) -> Result<Op> {
    let center = a.op_type() == "SkipLayerNormalization";
    Ok(SkipLayerNormalization { epsilon: a.float_or("epsilon", 1e-12)?, center }.into())
}

impl Operator for SkipLayerNormalization {
    fn name(&self) -> &'static str {
        if self.center {
            "com.microsoft.SkipLayerNormalization"
        } else {
            "com.microsoft.SkipSimplifiedLayerNormalization"
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, skip) = (cx.input(0)?, cx.input(1)?);
        float(x)?;
        if let (Some(x), Some(s)) = (x.dims(), skip.dims()) {
            let fits = s.len() <= x.len() && x.ends_with(&s)
                || s.len() == x.len() && s.first() == Some(&1) && s[1..] == x[1..];
            if !fits || x.is_empty() {
                return Err(Error::shape(format!("skip is of shape {s:?}, x {x:?}: they cannot be added")));
            }
            let parameters = if self.center { 2..5 } else { 2..4 };
            for i in parameters {
                if let Some(p) = cx.optional(i).and_then(Fact::dims)
                    && p.as_slice() != &x[x.len() - 1..]
                {
                    return Err(Error::shape(format!(
                        "operand {i} is of shape {p:?}; [{}] was wanted",
                        x[x.len() - 1]
                    )));
                }
            }
        }
        let mut stats = Fact { dtype: DType::F32, ..same(x) };
        if let Some(last) = stats.shape.as_mut().and_then(|s| s.last_mut()) {
            *last = Dim::Known(1);
        }
        cx.results(vec![same(x), stats.clone(), stats, same(x)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.slice::<f32>(0)?;
        let skip = io.slice::<f32>(1)?;
        let (beta, bias) = if self.center { (io.optional(3), io.optional(4)) } else { (None, io.optional(3)) };
        let (scale, beta) = (io.slice::<f32>(2)?, beta.map(|b| b.as_slice::<f32>()).transpose()?);
        let bias = bias.map(|b| b.as_slice::<f32>()).transpose()?;
        let n = io.output(0)?.dims.last().copied().unwrap_or(1);
        let affine = Affine::PerElement;
        let p = Normalize { n, epsilon: self.epsilon, center: self.center, scale: Some(scale), bias: beta, affine };
        let (y, rest) = io.outputs.split_first_mut().ok_or_else(|| Error::internal("no result"))?;
        let mut rest = rest.iter_mut().map(|t| t.as_slice::<f32>());
        let [mean, inverse, kept] = [(); 3].map(|()| rest.next().transpose());
        let stats = Statistics { mean: mean?, inverse: inverse? };
        Ok(normalize_sum(cx, &p, Sum { x, skip, bias, kept: kept? }, y.as_slice::<f32>()?, stats)?)
    }
}

/// InstanceNormalization (one channel per group) and GroupNormalization. Operands x, scale, bias.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupNormalization {
    /// Number of groups; none for a group per channel.
    pub groups: Option<usize>,
    /// Added to the variance.
    pub epsilon: f32,
    /// Opset 20 and below: scale and bias have one element per group.
    pub per_group: bool,
    /// Of the operand and the result.
    pub layout: Layout,
}

fn parse_instance(a: &mut Attributes) -> Result<Op> {
    Ok(GroupNormalization {
        groups: None,
        epsilon: a.float_or("epsilon", 1e-5)?,
        per_group: false,
        layout: Layout::Nchw,
    }
    .into())
}

fn parse_group(a: &mut Attributes) -> Result<Op> {
    parse_stash(a)?;
    let groups = a.required("num_groups", Attributes::int)?;
    let groups = usize::try_from(groups).ok().filter(|g| *g > 0);
    let groups = groups.ok_or_else(|| Error::unsupported_attribute("attribute num_groups must be at least 1"))?;
    let per_group = a.opset() < 21;
    Ok(GroupNormalization {
        groups: Some(groups),
        epsilon: a.float_or("epsilon", 1e-5)?,
        per_group,
        layout: Layout::Nchw,
    }
    .into())
}

impl Operator for GroupNormalization {
    fn name(&self) -> &'static str {
        if self.groups.is_some() { "GroupNormalization" } else { "InstanceNormalization" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        float(x)?;
        if let Some(shape) = &x.shape {
            if shape.len() < 2 {
                return Err(Error::shape(format!("the operand is {}; batch and channels were wanted", x.shape_text())));
            }
            let axis = if self.layout == Layout::Nhwc { shape.len() - 1 } else { 1 };
            if let Some(c) = shape[axis].known() {
                let groups = self.groups.unwrap_or(c.max(1));
                if c % groups != 0 {
                    return Err(Error::shape(format!("{c} channels cannot be cut into {groups} groups")));
                }
                let wanted = if self.per_group { groups } else { c };
                for i in [1, 2] {
                    if let Some(dims) = cx.input(i)?.dims().filter(|d| d.as_slice() != [wanted]) {
                        return Err(Error::shape(format!("operand {i} is of shape {dims:?}; [{wanted}] was wanted")));
                    }
                }
            }
        }
        cx.results(vec![same(x)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let dims: Dims = io.output(0)?.dims.into();
        if self.layout == Layout::Nhwc {
            let x = io.optional(0).map(|x| x.as_slice::<f32>()).transpose()?;
            let (batch, channels) = (dims[0], dims[dims.len() - 1]);
            let pixels = dims[1..dims.len() - 1].iter().product();
            let groups = self.groups.unwrap_or(channels.max(1));
            let (scale, bias) = (io.slice::<f32>(1)?, io.slice::<f32>(2)?);
            let p = ChannelGroups { batch, pixels, channels, groups, epsilon: self.epsilon, scale, bias };
            return Ok(normalize_channel_groups(cx, &p, x, io.output(0)?.as_slice::<f32>()?)?);
        }
        let (channels, run) = (dims[1], dims[2..].iter().product::<usize>());
        let groups = self.groups.unwrap_or(channels.max(1));
        let n = channels / groups * run;
        let dtype = io.output(0)?.dtype;
        match dtype {
            DType::F32 => {
                let x = io.optional(0).map(|x| x.as_slice::<f32>()).transpose()?;
                // With one number per group a run of the same number is the whole group.
                let affine = if self.per_group {
                    Affine::PerChannel { channels: groups, run: n }
                } else {
                    Affine::PerChannel { channels, run }
                };
                let (scale, bias) = (Some(io.slice::<f32>(1)?), Some(io.slice::<f32>(2)?));
                let p = Normalize { n, epsilon: self.epsilon, center: true, scale, bias, affine };
                Ok(normalize(cx, &p, x, io.output(0)?.as_slice::<f32>()?, Statistics::default())?)
            }
            DType::F64 => {
                let held;
                let x = match io.optional(0) {
                    Some(x) => x.as_slice::<f64>()?,
                    None => {
                        held = io.output(0)?.as_slice::<f64>()?.to_vec();
                        &held
                    }
                };
                let (scale, bias) = (Some(io.slice::<f64>(1)?), Some(io.slice::<f64>(2)?));
                let channel =
                    |r: usize, i: usize| if self.per_group { r % groups } else { (r * n + i) / run % channels };
                let epsilon = f64::from(self.epsilon);
                normalize_any(x, n, epsilon, true, scale, bias, channel, io.output(0)?.as_slice::<f64>()?);
                Ok(())
            }
            other => Err(wrong_dtype("the operand", other, "float32 and float64")),
        }
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        let last = perm.iter().copied().eq([0].into_iter().chain(2..perm.len()).chain([1]));
        let fits = last && perm.len() > 2 && self.layout == Layout::Nchw && !self.per_group;
        let op = GroupNormalization { layout: Layout::Nhwc, ..self.clone() }.into();
        let is_f32 = operands.first()?.as_ref()?.dtype == DType::F32;
        (fits && is_f32).then(|| Permuted { op, roles: vec![Role::Permute, Role::Keep, Role::Keep] })
    }
}

/// Division along an axis by the norm.
#[derive(Clone, Debug, PartialEq)]
pub struct LpNormalization {
    /// The axis.
    pub axis: i64,
    /// 1 or 2.
    pub p: u32,
}

fn parse_lp(a: &mut Attributes) -> Result<Op> {
    let p = match a.int_or("p", 2)? {
        1 => 1,
        2 => 2,
        other => return Err(Error::unsupported_attribute(format!("attribute p is {other}; 1 or 2 was wanted"))),
    };
    Ok(LpNormalization { axis: a.int_or("axis", -1)?, p }.into())
}

impl Operator for LpNormalization {
    fn name(&self) -> &'static str {
        "LpNormalization"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        float(x)?;
        if let Some(rank) = x.rank() {
            axis_index(self.axis, rank)?;
        }
        cx.results(vec![same(x)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let sizes = around(x.dims, axis_index(self.axis, x.rank())?);
        for_dtype!(x.dtype, [F32, F64], T => {
            unit_length(x.as_slice::<T>()?, sizes, self.p, io.output(0)?.as_slice::<T>()?);
            Ok(())
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }
}

/// `(x - mean) / (sqrt(var) + 1e-9)` with statistics over axes.
#[derive(Clone, Debug, PartialEq)]
pub struct MeanVarianceNormalization {
    /// The axes that share statistics.
    pub axes: SmallVec<[i64; 4]>,
}

fn parse_mean_variance(a: &mut Attributes) -> Result<Op> {
    let axes = a.ints("axes")?.unwrap_or_else(|| vec![0, 2, 3]);
    Ok(MeanVarianceNormalization { axes: SmallVec::from_vec(axes) }.into())
}

impl Operator for MeanVarianceNormalization {
    fn name(&self) -> &'static str {
        "MeanVarianceNormalization"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        float(x)?;
        if let Some(rank) = x.rank() {
            self.axes.iter().try_for_each(|&a| axis_index(a, rank).map(|_| ()))?;
        }
        cx.results(vec![same(x)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let mut mask = vec![false; x.rank()];
        for &a in &self.axes {
            mask[axis_index(a, x.rank())?] = true;
        }
        let kept: usize = x.dims.iter().zip(&mask).filter(|(_, m)| !**m).map(|(d, _)| d).product();
        let mut strides = vec![0; x.rank()];
        let mut step = 1;
        for i in (0..x.rank()).rev().filter(|&i| !mask[i]) {
            strides[i] = step;
            step *= x.dims[i];
        }
        let group = |mut i: usize| {
            let mut at = 0;
            for (d, s) in x.dims.iter().zip(&strides).rev() {
                at += i % d * s;
                i /= d;
            }
            at
        };
        for_dtype!(x.dtype, [F32, F64], T => {
            let values = x.as_slice::<T>()?;
            let wide: Vec<f64> = values.iter().map(|&v| v.to_f64()).collect();
            let mut mean = vec![0.0; kept];
            reduce_any(Reduction::Mean, &wide, x.dims, &mask, &mut mean)?;
            let squares: Vec<f64> = wide.iter().enumerate().map(|(i, v)| (v - mean[group(i)]).powi(2)).collect();
            let mut var = vec![0.0; kept];
            reduce_any(Reduction::Mean, &squares, x.dims, &mask, &mut var)?;
            for (i, (y, v)) in io.output(0)?.as_slice::<T>()?.iter_mut().zip(wide).enumerate() {
                let g = group(i);
                *y = T::from_f64((v - mean[g]) / (var[g].sqrt() + 1e-9));
            }
            Ok(())
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }
}

/// Local response normalisation over channels, channels first.
#[derive(Clone, Debug, PartialEq)]
pub struct Lrn {
    /// Channels that count.
    pub size: usize,
    /// Factor of the sum of squares.
    pub alpha: f32,
    /// Exponent.
    pub beta: f32,
    /// Added to the sum.
    pub bias: f32,
}

fn parse_lrn(a: &mut Attributes) -> Result<Op> {
    let size = a.required("size", Attributes::int)?;
    let size = usize::try_from(size).ok().filter(|s| (1..1 << 31).contains(s));
    let size = size.ok_or_else(|| Error::unsupported_attribute("attribute size must be at least 1"))?;
    let (alpha, beta, bias) = (a.float_or("alpha", 1e-4)?, a.float_or("beta", 0.75)?, a.float_or("bias", 1.0)?);
    Ok(Lrn { size, alpha, beta, bias }.into())
}

impl Operator for Lrn {
    fn name(&self) -> &'static str {
        "LRN"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        float(x)?;
        if x.rank().is_some_and(|r| r < 2) {
            return Err(Error::shape(format!("the operand is {}; batch and channels were wanted", x.shape_text())));
        }
        cx.results(vec![same(x)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let sizes = around(x.dims, axis_index(1, x.rank())?);
        let p = [self.alpha, self.beta, self.bias].map(f64::from);
        for_dtype!(x.dtype, [F32, F64], T => {
            local_response(x.as_slice::<T>()?, sizes, self.size, p, io.output(0)?.as_slice::<T>()?);
            Ok(())
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    fn near(y: &Tensor, want: &[f32]) {
        let got = y.as_slice::<f32>().unwrap();
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{got:?} for {want:?}"));
    }

    #[test]
    fn rows_with_statistics() {
        let x = f32s(&[2, 2], &[1.0, 3.0, -2.0, 2.0]);
        let node = OneNode::new("LayerNormalization").float("epsilon", 0.0).outputs(3);
        let y = node.run(&[x, f32s(&[2], &[2.0, 1.0]), f32s(&[1], &[0.5])]).unwrap();
        near(&y[0], &[-1.5, 1.5, -1.5, 1.5]);
        near(&y[1], &[2.0, 0.0]);
        near(&y[2], &[1.0, 0.5]);
        let node = OneNode::new("RMSNormalization").float("epsilon", 0.0);
        near(&node.run(&[f32s(&[1, 2], &[3.0, 4.0]), f32s(&[2], &[12.5f32.sqrt(); 2])]).unwrap()[0], &[3.0, 4.0]);
    }

    #[test]
    fn skip_adds_first() {
        let node = OneNode::new("SkipLayerNormalization").domain("com.microsoft").float("epsilon", 0.0);
        let one = f32s(&[2], &[1.0, 1.0]);
        let inputs = [f32s(&[1, 1, 2], &[1.0, 0.0]), f32s(&[1, 1, 2], &[0.0, 3.0]), one.clone(), one];
        near(&node.run(&inputs).unwrap()[0], &[0.0, 2.0]);
        let [x, skip, one, _] = inputs;
        for (op, want) in
            [("SkipLayerNormalization", [2.0, 1.0]), ("SkipSimplifiedLayerNormalization", [0.0, 0.2f32.sqrt()])]
        {
            let node = OneNode::new(op).domain("com.microsoft").float("epsilon", 0.0).outputs(4);
            let y = node.run(&[x.clone(), skip.clone(), one.clone()]).unwrap();
            assert_eq!([y[1].dims(), y[2].dims()], [[1, 1, 1]; 2]);
            near(&y[1], &want[..1]);
            near(&y[2], &want[1..]);
            near(&y[3], &[1.0, 3.0]);
        }
    }

    #[test]
    fn without_a_mean_the_deviation_comes_first() {
        let x = Tensor::from_slice(&[1, 2], &[1f64, 7.0]).unwrap();
        let node = || OneNode::new("SimplifiedLayerNormalization").float("epsilon", 0.0).outputs(2);
        let wide = node().run(&[x, Tensor::from_slice(&[2], &[1f64; 2]).unwrap()]).unwrap();
        assert_eq!(wide[1].as_slice::<f64>().unwrap(), [0.2]);
        let single = node().run(&[f32s(&[1, 2], &[1.0, 7.0]), f32s(&[2], &[1.0; 2])]).unwrap();
        near(&single[1], &[0.2]);
    }

    #[test]
    fn groups_before_and_after_opset_21() {
        let x = f32s(&[1, 4, 1], &[1.0, 3.0, 10.0, 14.0]);
        let node = || OneNode::new("GroupNormalization").int("num_groups", 2).float("epsilon", 0.0);
        let y = node().run(&[x.clone(), f32s(&[4], &[1.0, 2.0, 3.0, 4.0]), f32s(&[4], &[0.0; 4])]).unwrap();
        near(&y[0], &[-1.0, 2.0, -3.0, 4.0]);
        let y = node().opset(18).run(&[x, f32s(&[2], &[1.0, 3.0]), f32s(&[2], &[0.0; 2])]).unwrap();
        near(&y[0], &[-1.0, 1.0, -3.0, 3.0]);
    }

    #[test]
    fn instances() {
        let x = f32s(&[1, 2, 2], &[1.0, 3.0, 5.0, 9.0]);
        let node = OneNode::new("InstanceNormalization").float("epsilon", 0.0);
        near(&node.run(&[x, f32s(&[2], &[1.0, 2.0]), f32s(&[2], &[0.0, 1.0])]).unwrap()[0], &[-1.0, 1.0, -1.0, 3.0]);
    }

    #[test]
    fn mistakes_are_named() {
        let e = OneNode::new("LayerNormalization").run(&[f32s(&[1, 2], &[0.0; 2]), f32s(&[3], &[0.0; 3])]).unwrap_err();
        assert!(e.message.contains("does not broadcast"), "{e}");
        let x = f32s(&[1, 3, 1], &[0.0; 3]);
        let s = f32s(&[3], &[0.0; 3]);
        let e = OneNode::new("GroupNormalization").int("num_groups", 2).run(&[x, s.clone(), s]).unwrap_err();
        assert!(e.message.contains("3 channels cannot be cut into 2 groups"), "{e}");
        assert!(OneNode::new("LpNormalization").int("p", 3).run(&[f32s(&[1], &[1.0])]).is_err());
    }
}
