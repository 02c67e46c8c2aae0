//! Resize and Upsample.

use super::sizes::kernel_error;
use super::{Attributes, Compute, Infer, Io, Op, Operator, Permuted, Prepare, Registration, Role, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::for_dtype;
use crate::tensor::{DType, Dims, TensorView, element_count};
use smallvec::SmallVec;
use std::sync::Arc;
use weblane_kernels::int8::{Bytes, BytesMut, Interpolation, resize};
use weblane_kernels::movement::FILL;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;
use weblane_kernels::quant::{Grid, Sharing, quantize};
use weblane_kernels::resize::{Taps, nearest, resize_axis};

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("Resize", 10, parse), Registration::onnx("Upsample", 7, parse)];

/// How a position in the result becomes one in the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coordinates {
    /// `(x + 0.5) / scale - 0.5`.
    HalfPixel,
    /// The same about the centre of the real-valued result.
    HalfPixelSymmetric,
    /// As `HalfPixel`; a single element is taken from the beginning.
    PytorchHalfPixel,
    /// `(x + 0.5) / scale`, of opset 11 and 12.
    TfHalfPixelForNn,
    /// First and last elements meet.
    AlignCorners,
    /// `x / scale`.
    Asymmetric,
    /// A region of interest is stretched.
    TfCropAndResize,
}

/// How values between elements are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The element that [`Rounding`] says.
    Nearest,
    /// Two neighbours.
    Linear,
    /// Four neighbours.
    Cubic,
}

/// Which element is the nearest one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Half is rounded down.
    PreferFloor,
    /// Half is rounded up.
    PreferCeil,
    /// The one below.
    Floor,
    /// The one above.
    Ceil,
}

/// What becomes of the proportions when `sizes` are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// Whatever the sizes say.
    Stretch,
    /// Kept; no size is exceeded.
    NotLarger,
    /// Kept; no size is fallen short of.
    NotSmaller,
}

/// Operands X, roi, scales, sizes; or X, scales.
#[derive(Clone, Debug, PartialEq)]
pub struct Resize {
    /// Positions.
    pub coordinates: Coordinates,
    /// Interpolation.
    pub mode: Mode,
    /// Of mode nearest.
    pub rounding: Rounding,
    /// Of mode cubic.
    pub cubic_a: f32,
    /// Whether elements outside have no weight, instead of the value of the border.
    pub exclude_outside: bool,
    /// Whether shrinking averages over all elements that it covers.
    pub antialias: bool,
    /// Outside of the region of interest.
    pub extrapolation: f32,
    /// Proportions.
    pub aspect: Aspect,
    /// The axes that roi, scales and sizes speak of; all in order when absent.
    pub axes: Option<Vec<i64>>,
    /// Scales by attribute, of opset 7 and 8.
    pub scales: Option<Vec<f32>>,
    /// The operands that hold roi, scales and sizes.
    pub operands: [Option<usize>; 3],
    /// The name in the model.
    pub upsample: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let upsample = a.op_type() == "Upsample";
    // "bilinear" is the word of opset 1 to 8 of some exporters.
    let modes =
        [("nearest", Mode::Nearest), ("linear", Mode::Linear), ("bilinear", Mode::Linear), ("cubic", Mode::Cubic)];
    let mode = a.choice("mode", if upsample || a.opset() < 11 { &modes[..3] } else { &modes })?;
    let simple = Resize {
        coordinates: Coordinates::Asymmetric,
        mode,
        rounding: Rounding::Floor,
        cubic_a: -0.75,
        exclude_outside: false,
        antialias: false,
        extrapolation: 0.0,
        aspect: Aspect::Stretch,
        axes: None,
        scales: None,
        operands: [None, Some(1), None],
        upsample,
    };
    if upsample && a.opset() < 9 {
        let scales = a.required("scales", Attributes::floats)?;
        return Ok(Resize { scales: Some(scales), operands: [None; 3], ..simple }.into());
    }
    if upsample || a.opset() < 11 {
        return Ok(simple.into());
    }
    use Coordinates::*;
    let op = Resize {
        coordinates: a.choice(
            "coordinate_transformation_mode",
            &[
                ("half_pixel", HalfPixel),
                ("half_pixel_symmetric", HalfPixelSymmetric),
                ("pytorch_half_pixel", PytorchHalfPixel),
                ("tf_half_pixel_for_nn", TfHalfPixelForNn),
                ("align_corners", AlignCorners),
                ("asymmetric", Asymmetric),
                ("tf_crop_and_resize", TfCropAndResize),
            ],
        )?,
        rounding: a.choice(
            "nearest_mode",
            &[
                ("round_prefer_floor", Rounding::PreferFloor),
                ("round_prefer_ceil", Rounding::PreferCeil),
                ("floor", Rounding::Floor),
                ("ceil", Rounding::Ceil),
            ],
        )?,
        cubic_a: a.float_or("cubic_coeff_a", -0.75)?,
        exclude_outside: a.flag_or("exclude_outside", false)?,
        antialias: a.flag_or("antialias", false)?,
        extrapolation: a.float_or("extrapolation_value", 0.0)?,
        aspect: a.choice(
            "keep_aspect_ratio_policy",
            &[("stretch", Aspect::Stretch), ("not_larger", Aspect::NotLarger), ("not_smaller", Aspect::NotSmaller)],
        )?,
        axes: a.ints("axes")?,
        operands: [Some(1), Some(2), Some(3)],
        ..simple
    };
    Ok(op.into())
}

/// One axis of the result.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stretch {
    input: usize,
    output: usize,
    /// The size of the result as a real number.
    real: f64,
    roi: (f64, f64),
}

/// What roi, scales and sizes say.
struct Given {
    scales: Option<Vec<f64>>,
    sizes: Option<Vec<i64>>,
    roi: Option<Vec<f64>>,
}

fn floats(v: TensorView) -> Result<Vec<f64>> {
    fn all<T: crate::tensor::Element + Into<f64>>(v: TensorView) -> Result<Vec<f64>> {
        Ok(v.as_slice::<T>()?.iter().map(|&x| x.into()).collect())
    }
    for_dtype!(v.dtype, [F32, F64, F16], T => all::<T>(v), else Err(wrong_dtype("roi or scales", v.dtype, "floats")))
}

impl Given {
    /// From tensors; an empty one counts as left out.
    fn of<'a>(op: &Resize, operand: &dyn Fn(usize) -> Option<TensorView<'a>>) -> Result<Given> {
        let get = |i: usize| op.operands[i].and_then(operand).filter(|v| !v.is_empty());
        let mut scales = get(1).map(floats).transpose()?;
        if let Some(attribute) = &op.scales {
            scales = Some(attribute.iter().map(|&s| f64::from(s)).collect());
        }
        let sizes = get(2).map(|v| v.to_i64s()).transpose()?.map(|s| s.to_vec());
        Ok(Given { scales, sizes, roi: get(0).map(floats).transpose()? })
    }
}

impl Resize {
    /// The axes that roi, scales and sizes speak of.
    fn axes(&self, rank: usize) -> Result<Dims> {
        match &self.axes {
            None => Ok((0..rank).collect()),
            Some(list) => super::sizes::distinct_axes(list, rank),
        }
    }

    /// All axes of the result for known sizes.
    fn stretches(&self, dims: &[usize], given: &Given) -> Result<Vec<Stretch>> {
        let axes = self.axes(dims.len())?;
        let whole = |&n: &usize| Stretch { input: n, output: n, real: n as f64, roi: (0.0, 1.0) };
        let mut out: Vec<Stretch> = dims.iter().map(whole).collect();
        let check = |what: &str, met: usize, want: usize| match met == want {
            true => Ok(()),
            false => Err(Error::shape(format!("{what} has {met} elements; {want} were wanted"))),
        };
        match (&given.scales, &given.sizes) {
            (Some(scales), None) => {
                check("scales", scales.len(), axes.len())?;
                for (&a, &scale) in axes.iter().zip(scales) {
                    if !(scale > 0.0 && scale.is_finite()) {
                        return Err(Error::invalid_input(format!("a scale is {scale}; a positive number was wanted")));
                    }
                    out[a].real = dims[a] as f64 * scale;
                    out[a].output = out[a].real as usize;
                }
            }
            (None, Some(sizes)) => {
                check("sizes", sizes.len(), axes.len())?;
                let mut wanted = Vec::with_capacity(axes.len());
                for (&a, &size) in axes.iter().zip(sizes) {
                    let size = usize::try_from(size)
                        .map_err(|_| Error::invalid_input(format!("sizes has {size}; a size was wanted")))?;
                    wanted.push((a, size));
                }
                let ratio = |&(a, size): &(usize, usize)| size as f64 / dims[a].max(1) as f64;
                let ratios = wanted.iter().map(ratio);
                let kept = match self.aspect {
                    Aspect::Stretch => None,
                    Aspect::NotLarger => Some(ratios.fold(f64::INFINITY, f64::min)),
                    Aspect::NotSmaller => Some(ratios.fold(0.0, f64::max)),
                };
                for (a, size) in wanted {
                    out[a].real = kept.map_or(size as f64, |k| k * dims[a] as f64);
                    out[a].output = kept.map_or(size, |_| (out[a].real + 0.5).floor() as usize);
                }
            }
            (None, None) => return Err(Error::invalid_model("neither scales nor sizes are given")),
            (Some(_), Some(_)) => return Err(Error::invalid_model("both scales and sizes are given")),
        }
        if self.coordinates == Coordinates::TfCropAndResize {
            let roi = given.roi.as_ref().ok_or_else(|| Error::invalid_model("roi is missing"))?;
            check("roi", roi.len(), 2 * axes.len())?;
            for (i, &a) in axes.iter().enumerate() {
                out[a].roi = (roi[i], roi[i + axes.len()]);
            }
        }
        for s in &out {
            if s.input == 0 && s.output != 0 {
                return Err(Error::shape(format!("an axis of length 0 cannot become one of {}", s.output)));
            }
        }
        Ok(out)
    }

    /// The position in the operand of element `x` of the result.
    fn position(&self, s: &Stretch, x: usize) -> f64 {
        let (n, x) = (s.input as f64, x as f64);
        // Multiplied first: whole positions stay whole.
        let unscaled = |x: f64| x * n / s.real;
        match self.coordinates {
            Coordinates::HalfPixel => unscaled(x + 0.5) - 0.5,
            Coordinates::PytorchHalfPixel if s.output == 1 => -0.5,
            Coordinates::PytorchHalfPixel => unscaled(x + 0.5) - 0.5,
            Coordinates::HalfPixelSymmetric => n / 2.0 * (1.0 - s.output as f64 / s.real) + unscaled(x + 0.5) - 0.5,
            Coordinates::TfHalfPixelForNn => unscaled(x + 0.5),
            Coordinates::Asymmetric => unscaled(x),
            Coordinates::AlignCorners if s.real == 1.0 || s.output == 1 => 0.0,
            Coordinates::AlignCorners => x * (n - 1.0) / (s.real - 1.0),
            Coordinates::TfCropAndResize => {
                let (start, end) = s.roi;
                match s.output {
                    1 => 0.5 * (start + end) * (n - 1.0),
                    _ => start * (n - 1.0) + x * (end - start) * (n - 1.0) / (s.real - 1.0),
                }
            }
        }
    }

    fn is_outside(&self, s: &Stretch, position: f64) -> bool {
        self.coordinates == Coordinates::TfCropAndResize && !(0.0..=s.input as f64 - 1.0).contains(&position)
    }

    fn nearest_map(&self, s: &Stretch) -> Vec<usize> {
        let at = |x: usize| {
            let position = self.position(s, x);
            if self.is_outside(s, position) {
                return FILL;
            }
            let whole = match self.rounding {
                Rounding::Floor => position.floor(),
                Rounding::Ceil => position.ceil(),
                Rounding::PreferFloor => (position - 0.5).ceil(),
                Rounding::PreferCeil => (position + 0.5).floor(),
            };
            (whole.max(0.0) as usize).min(s.input - 1)
        };
        (0..s.output).map(at).collect()
    }

    /// The taps of an axis, and the elements of the result that lie outside of the region of interest.
    fn taps(&self, s: &Stretch) -> (Taps<f64>, Vec<usize>) {
        // Antialiasing widens the kernel when the axis shrinks.
        let shrink = if self.antialias { (s.real / s.input as f64).min(1.0) } else { 1.0 };
        let radius = if self.mode == Mode::Cubic { 2.0 } else { 1.0 };
        let before = (-radius / shrink).floor() as i64 + 1;
        let count = (2 - 2 * before) as usize;
        let a = f64::from(self.cubic_a);
        let kernel = |x: f64| {
            let x = x.abs();
            match self.mode {
                Mode::Cubic if x <= 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
                Mode::Cubic if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
                Mode::Cubic => 0.0,
                _ => (1.0 - x).max(0.0),
            }
        };
        let mut taps = Taps { count, index: Vec::new(), weight: Vec::new() };
        let mut outside = Vec::new();
        let last = s.input as i64 - 1;
        for x in 0..s.output {
            let position = self.position(s, x);
            if self.is_outside(s, position) {
                outside.push(x);
            }
            let floor = position.floor();
            let first = taps.weight.len();
            for k in 0..count as i64 {
                let at = floor as i64 + before + k;
                let weight = kernel((at as f64 - position) * shrink);
                let excluded = self.exclude_outside && !(0..=last).contains(&at);
                taps.weight.push(if excluded { 0.0 } else { weight });
                taps.index.push(at.clamp(0, last) as usize);
            }
            if self.antialias || self.exclude_outside {
                let sum: f64 = taps.weight[first..].iter().sum();
                if sum != 0.0 {
                    taps.weight[first..].iter_mut().for_each(|w| *w /= sum);
                }
            }
        }
        (taps, outside)
    }

    /// Tables for the operands of a run.
    pub(super) fn tables_of(&self, io: &Io) -> Result<Tables> {
        let given = Given::of(self, &|k| io.optional(k))?;
        self.tables(&self.stretches(io.input(0)?.dims, &given)?)
    }

    /// Tables for all runs, if what they depend on is constant.
    pub(super) fn known_tables(&self, cx: &Prepare) -> Result<Option<Tables>> {
        if self.operands.iter().flatten().any(|&k| cx.has(k) && cx.constant(k).is_none()) {
            return Ok(None);
        }
        let given = Given::of(self, &|k| cx.constant(k).map(|t| t.view()))?;
        self.tables(&self.stretches(&cx.dims(0)?, &given)?).map(Some)
    }

    fn tables(&self, stretches: &[Stretch]) -> Result<Tables> {
        let dims: Dims = stretches.iter().map(|s| s.output).collect();
        // Nothing to compute, and an axis of any length beside one of length 0 wants no table.
        if element_count(&dims)? == 0 {
            return Ok(Tables { maps: Vec::new(), passes: Vec::new() });
        }
        if self.mode == Mode::Nearest {
            return Ok(Tables { maps: stretches.iter().map(|s| self.nearest_map(s)).collect(), passes: Vec::new() });
        }
        let mut passes = Vec::new();
        for (axis, s) in stretches.iter().enumerate() {
            let crop = self.coordinates == Coordinates::TfCropAndResize && s.roi != (0.0, 1.0);
            if s.input == s.output && s.real == s.input as f64 && !crop {
                continue;
            }
            let (taps, outside) = self.taps(s);
            let weight = taps.weight.iter().map(|&w| w as f32).collect();
            let narrow = Taps { count: taps.count, index: taps.index.clone(), weight };
            passes.push(Pass { axis, taps, narrow, outside });
        }
        // Axes that shrink most go first: the others then have less to do.
        passes.sort_by(|a, b| {
            let ratio = |p: &Pass| p.taps.len() as f64 / stretches[p.axis].input as f64;
            ratio(a).total_cmp(&ratio(b))
        });
        Ok(Tables { maps: Vec::new(), passes })
    }
}

/// Everything that depends on sizes only.
#[derive(Debug)]
pub(super) struct Tables {
    /// Mode nearest: the element along each axis.
    maps: Vec<Vec<usize>>,
    /// The other modes: one pass for each axis that changes.
    passes: Vec<Pass>,
}

#[derive(Debug)]
struct Pass {
    axis: usize,
    taps: Taps<f64>,
    narrow: Taps<f32>,
    outside: Vec<usize>,
}

impl Tables {
    fn run(&self, cx: &Cx, op: &Resize, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let extrapolation = op.extrapolation;
        let y = io.output(0)?;
        if y.is_empty() {
            return Ok(());
        }
        if op.mode == Mode::Nearest {
            let value = fill(x.dtype, extrapolation).ok_or_else(|| wrong_dtype("X", x.dtype, "numbers"))?;
            return nearest(cx, x.dims, &self.maps, x.bytes(), &value, y.bytes()).map_err(kernel_error);
        }
        match x.dtype {
            DType::F32 => {
                let (from, to) = (x.as_slice::<f32>()?, y.as_slice::<f32>()?);
                let size = self.workspace(x.dims)?;
                cx.with_workspace(2 * size, |work| {
                    self.passes(cx, from, x.dims, to, work, extrapolation, |p| &p.narrow)
                })
            }
            other => for_dtype!(other, [F64, I8, U8, I16, U16, I32, U32, I64, U64], T => {
                let from: Vec<f64> = x.as_slice::<T>()?.iter().map(|v| v.to_f64()).collect();
                let to = y.as_slice::<T>()?;
                let mut wide = vec![0.0; to.len()];
                let mut work = vec![0.0; 2 * self.workspace(x.dims)?];
                let fill = f64::from(extrapolation);
                self.passes(cx, &from, x.dims, &mut wide, &mut work, fill, |p| &p.taps)?;
                to.iter_mut().zip(wide).for_each(|(y, v)| *y = T::from_f64(v));
                Ok(())
            }, else Err(wrong_dtype("X", other, "numbers"))),
        }
    }

    /// Interpolates bytes, of a mode other than nearest and without a region of interest.
    pub(super) fn run_bytes(
        &self,
        cx: &Cx,
        f: &Interpolation,
        dims: &[usize],
        x: Bytes<'_>,
        y: BytesMut<'_>,
    ) -> Result<()> {
        if y.is_empty() {
            return Ok(());
        }
        let ([outer, rows, columns, inner], taps) = match &self.passes[..] {
            [] => ([1, 1, x.len(), 1], [None, None]),
            [p] => match super::reduce::around(dims, p.axis) {
                [outer, n, 1] => ([outer, 1, n, 1], [None, Some(&p.narrow)]),
                [outer, n, inner] => ([outer, n, inner, 1], [Some(&p.narrow), None]),
            },
            [p, q] if p.axis.abs_diff(q.axis) == 1 => {
                let (p, q) = if p.axis < q.axis { (p, q) } else { (q, p) };
                let [outer, rows, _] = super::reduce::around(dims, p.axis);
                let [_, columns, inner] = super::reduce::around(dims, q.axis);
                ([outer, rows, columns, inner], [Some(&p.narrow), Some(&q.narrow)])
            }
            // Axes apart from each other, or more than two.
            _ => return self.run_apart(cx, f, dims, x, y),
        };
        Ok(resize(cx, f, [outer, rows, columns, inner], taps, x, y)?)
    }

    /// [`Tables::run_bytes`] by way of a tensor of real numbers.
    fn run_apart(&self, cx: &Cx, f: &Interpolation, dims: &[usize], x: Bytes<'_>, y: BytesMut<'_>) -> Result<()> {
        let from: Vec<f32> = (0..x.len()).map(|i| (x.get(i) - f.x_zero) as f32).collect();
        let mut real = vec![0.0; y.len()];
        let mut work = vec![0.0; 2 * self.workspace(dims)?];
        self.passes(cx, &from, dims, &mut real, &mut work, 0.0, |p| &p.narrow)?;
        real.iter_mut().for_each(|v| *v *= f.multiplier);
        let grid = Grid { outer: 1, n: 1, inner: real.len(), sharing: Sharing::Tensor };
        let bounds = [f.lo as f32, f.hi as f32];
        match y {
            BytesMut::U8(y) => quantize(cx, &real, &grid, &[1.0], Some(&[f.zero as u8]), bounds, y)?,
            BytesMut::I8(y) => quantize(cx, &real, &grid, &[1.0], Some(&[f.zero as i8]), bounds, y)?,
        }
        Ok(())
    }

    /// Elements of the largest intermediate result.
    fn workspace(&self, dims: &[usize]) -> Result<usize> {
        let mut dims: Dims = dims.into();
        let mut most = 0;
        for p in self.passes.iter().rev().skip(1).rev() {
            dims[p.axis] = p.taps.len();
            most = most.max(element_count(&dims)?);
        }
        Ok(most)
    }

    fn passes<T: Number>(
        &self,
        cx: &Cx,
        x: &[T],
        dims: &[usize],
        y: &mut [T],
        work: &mut [T],
        extrapolation: T,
        taps: fn(&Pass) -> &Taps<T>,
    ) -> Result<()> {
        let Some((last, first)) = self.passes.split_last() else {
            y.copy_from_slice(x);
            return Ok(());
        };
        let mut dims: Dims = dims.into();
        let (mut here, mut there) = work.split_at_mut(work.len() / 2);
        let mut length = None;
        for p in first {
            let sizes = super::reduce::around(&dims, p.axis);
            dims[p.axis] = p.taps.len();
            let count = element_count(&dims)?;
            let from = length.map_or(x, |n| &here[..n]);
            resize_axis(cx, from, sizes, taps(p), &mut there[..count])?;
            std::mem::swap(&mut here, &mut there);
            length = Some(count);
        }
        let from = length.map_or(x, |n| &here[..n]);
        resize_axis(cx, from, super::reduce::around(&dims, last.axis), taps(last), y)?;
        dims[last.axis] = last.taps.len();
        for p in self.passes.iter().filter(|p| !p.outside.is_empty()) {
            let [_, n, inner] = super::reduce::around(&dims, p.axis);
            for block in y.chunks_exact_mut(n * inner) {
                p.outside.iter().for_each(|&i| block[i * inner..][..inner].fill(extrapolation));
            }
        }
        Ok(())
    }
}

/// The extrapolation value as the bytes of an element.
fn fill(dtype: DType, value: f32) -> Option<SmallVec<[u8; 8]>> {
    for_dtype!(dtype, [F32, F64, I8, U8, I16, U16, I32, U32, I64, U64, Bool], T => {
        Some(bytemuck::bytes_of(&<T as Number>::from_f64(f64::from(value))).into())
    }, else match dtype {
        DType::F16 => Some(half::f16::from_f32(value).to_ne_bytes().as_slice().into()),
        DType::Bf16 => Some(half::bf16::from_f32(value).to_ne_bytes().as_slice().into()),
        _ => None,
    })
}

impl Operator for Resize {
    fn name(&self) -> &'static str {
        if self.upsample { "Upsample" } else { "Resize" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let axes = self.axes(shape.len())?;
        let fact = |i: usize| self.operands[i].and_then(|k| cx.optional(k));
        let is_given = |f: &&Fact| f.dims().is_none_or(|d| d.iter().product::<usize>() > 0);
        // With all constants known the shape is exact; else sizes may still name it.
        let known = (1..3).all(|i| fact(i).filter(is_given).is_none_or(|f| f.tensor().is_some()));
        let shape = match (x.dims(), known) {
            (Some(dims), true) => {
                let mut given = Given::of(self, &|k| cx.optional(k).and_then(Fact::tensor).map(|t| t.view()))?;
                if self.coordinates == Coordinates::TfCropAndResize && given.roi.is_none() {
                    // It moves values only, not sizes.
                    given.roi = Some(vec![0.0; 2 * axes.len()]);
                }
                let sizes: Dims = self.stretches(&dims, &given)?.iter().map(|s| s.output).collect();
                element_count(&sizes)?;
                sizes.iter().map(|&n| Dim::Known(n)).collect()
            }
            _ => {
                let mut out: Shape = shape.iter().cloned().collect();
                let sizes = fact(2).filter(is_given).and_then(Fact::sizes).filter(|s| s.len() == axes.len());
                let ones: Option<Vec<bool>> = match (&self.scales, fact(1).filter(is_given).and_then(Fact::tensor)) {
                    (Some(s), _) => Some(s.iter().map(|&s| s == 1.0).collect()),
                    (_, Some(t)) => Some(floats(t.view())?.iter().map(|&s| s == 1.0).collect()),
                    _ => None,
                };
                for (i, &a) in axes.iter().enumerate() {
                    out[a] = match (&sizes, &ones) {
                        (Some(s), _) if self.aspect == Aspect::Stretch => s[i].clone(),
                        (_, Some(ones)) if ones.get(i) == Some(&true) => out[a].clone(),
                        _ => Dim::Unknown,
                    };
                }
                out
            }
        };
        cx.results(vec![Fact::with_shape(x.dtype, shape)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.tables_of(io)?.run(cx, self, io)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let tables = self.known_tables(cx)?;
        Ok(tables.map(|tables| -> Arc<dyn Compute> { Arc::new(Prepared { op: self.clone(), tables }) }))
    }

    fn takes_half(&self) -> bool {
        self.mode == Mode::Nearest
    }

    fn shape_operands(&self) -> &'static [usize] {
        if self.operands[2].is_some() { &[2, 3] } else { &[1] }
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        let axes = self.axes(perm.len()).ok()?;
        let moved: Option<Vec<i64>> = axes.iter().map(|a| perm.iter().position(|p| p == a).map(|i| i as i64)).collect();
        let op = Resize { axes: Some(moved?), ..self.clone() };
        let mut roles = vec![Role::Keep; operands.len()];
        *roles.first_mut()? = Role::Permute;
        Some(Permuted { op: op.into(), roles })
    }
}

#[derive(Debug)]
struct Prepared {
    op: Resize,
    tables: Tables,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.tables.run(cx, &self.op, io)
    }

    fn kernel(&self) -> &str {
        match self.op.mode {
            Mode::Nearest => "resize nearest",
            Mode::Linear => "resize linear",
            Mode::Cubic => "resize cubic",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::tensor::Tensor;

    fn picture() -> Tensor {
        f32s(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0])
    }

    #[test]
    fn scales_by_attribute_by_operand_and_by_sizes() {
        let want = [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 3.0, 3.0, 4.0, 4.0];
        let scales = [1.0, 1.0, 2.0, 2.0];
        let floats = crate::onnx::AttributeValue::Floats(scales.to_vec());
        let old = OneNode::new("Upsample").opset(7).attr("scales", floats).run(&[picture()]).unwrap();
        let ten = OneNode::new("Resize").opset(10).run(&[picture(), f32s(&[4], &scales)]).unwrap();
        let node = OneNode::new("Resize").string("coordinate_transformation_mode", "asymmetric");
        let node = node.string("nearest_mode", "floor");
        let new = node.run_optional(&[Some(picture()), None, None, Some(i64s(&[4], &[1, 1, 4, 4]))]).unwrap();
        for y in [old, ten, new] {
            assert_eq!(y[0].dims(), [1, 1, 4, 4]);
            assert_eq!(y[0].as_slice::<f32>().unwrap(), want);
        }
    }

    #[test]
    fn bilinear() {
        let node = OneNode::new("Resize").string("mode", "linear").ints("axes", &[3]);
        let y = node.run_optional(&[Some(picture()), None, Some(f32s(&[1], &[2.0]))]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [1.0, 1.25, 1.75, 2.0, 3.0, 3.25, 3.75, 4.0]);
        let bytes = Tensor::from_slice(&[1, 2], &[10u8, 21]).unwrap();
        let node =
            OneNode::new("Resize").string("mode", "linear").string("coordinate_transformation_mode", "align_corners");
        let y = node.run_optional(&[Some(bytes), None, None, Some(i64s(&[2], &[1, 3]))]).unwrap();
        assert_eq!(y[0].as_slice::<u8>().unwrap(), [10, 15, 21]);
    }

    #[test]
    fn shapes_and_errors() {
        let x = Fact::with_shape(DType::F32, [1.into(), Dim::Symbol("c".into()), 8.into()].into_iter().collect());
        let scales = Fact::constant(Arc::new(f32s(&[3], &[1.0, 1.0, 0.5])));
        let y = OneNode::new("Resize").infer(&[Some(x), None, Some(scales)]).unwrap();
        assert_eq!(y[0].shape_text(), "[1, c, ?]");
        let e = OneNode::new("Resize").run_optional(&[Some(picture()), None, None]).unwrap_err();
        assert!(e.message.contains("neither"), "{e}");
        let e = OneNode::new("Resize").opset(10).run(&[picture(), f32s(&[4], &[1.0, 1.0, -1.0, 1.0])]).unwrap_err();
        assert!(e.message.contains("a scale is -1"), "{e}");
        let huge = i64s(&[4], &[1, 1, i64::MAX, i64::MAX]);
        assert!(OneNode::new("Resize").run_optional(&[Some(picture()), None, None, Some(huge)]).is_err());
    }

    #[test]
    fn permuted_axes() {
        let node = Resize { axes: Some(vec![2, 3]), ..parse_test() };
        let p = node.permuted(&[0, 2, 3, 1], &[None, None, None]).unwrap();
        assert_eq!(p.op.get::<Resize>().unwrap().axes, Some(vec![1, 2]));
        assert!(matches!(p.roles[..], [Role::Permute, Role::Keep, Role::Keep]));
    }

    fn parse_test() -> Resize {
        let mut a = Attributes::new("Resize", 19, vec![], Default::default(), vec![true], 1);
        parse(&mut a).unwrap().get::<Resize>().unwrap().clone()
    }
}
