//! DFT, STFT and MelWeightMatrix.

use super::cast::convert;
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, axis_index};
use crate::for_dtype;
use crate::tensor::{DType, Tensor, TensorView};
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;
use weblane_kernels::signal::{Lines, Real, Transform, mel_weights};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("DFT", 17, parse_dft),
    Registration::onnx("STFT", 17, parse_stft),
    Registration::onnx("MelWeightMatrix", 17, parse_mel),
];

/// Lengths above this are refused: the tables of a transform must fit into memory.
const MAX_LENGTH: usize = 1 << 26;

/// A constant integer scalar operand.
fn scalar(fact: &Fact) -> Option<i64> {
    fact.i64s().and_then(|v| v.first().copied())
}

fn scalar_of(view: TensorView) -> Result<i64> {
    view.to_i64s()?.first().copied().ok_or_else(|| Error::shape("an empty operand; a number was wanted"))
}

fn length(v: i64) -> Result<usize> {
    let fits = usize::try_from(v).ok().filter(|n| (1..=MAX_LENGTH).contains(n));
    fits.ok_or_else(|| Error::invalid_input(format!("a transform of length {v}; 1 to {MAX_LENGTH} was wanted")))
}

/// Discrete Fourier transform along an axis. Operands: `[..., 1 or 2]` (real, or real and imaginary parts), optional
/// length, optional axis (opset 20 on).
#[derive(Clone, Debug, PartialEq)]
pub struct Dft {
    /// By attribute, or the default of the operand.
    pub axis: i64,
    /// Back from frequencies.
    pub inverse: bool,
    /// Frequencies come, or are given, up to half the rate only.
    pub onesided: bool,
}

fn parse_dft(a: &mut Attributes) -> Result<Op> {
    let axis = if a.opset() < 20 { a.int_or("axis", 1)? } else { -2 };
    Ok(Dft { axis, inverse: a.flag_or("inverse", false)?, onesided: a.flag_or("onesided", false)? }.into())
}

impl Dft {
    fn axis(&self, given: Option<i64>, rank: usize) -> Result<usize> {
        let axis = axis_index(given.unwrap_or(self.axis), rank)?;
        if axis + 1 >= rank {
            return Err(Error::shape(format!("axis {axis} of rank {rank} holds real and imaginary parts")));
        }
        Ok(axis)
    }

    /// Length of the transform for an axis of `n`.
    fn length(&self, given: Option<i64>, n: usize) -> Result<usize> {
        match given {
            Some(v) => length(v),
            None if self.inverse && self.onesided => length(2 * (n as i64 - 1)),
            None => length(n as i64),
        }
    }

    /// Elements of the result along the axis, and its number of parts.
    fn result(&self, n: usize) -> (usize, usize) {
        match (self.inverse, self.onesided) {
            (false, true) => (n / 2 + 1, 2),
            (true, true) => (n, 1),
            _ => (n, 2),
        }
    }
}

impl Operator for Dft {
    fn name(&self) -> &'static str {
        "DFT"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let rank = shape.len();
        if let Some(parts) = shape.last().and_then(Dim::known).filter(|p| !(1..=2).contains(p)) {
            return Err(Error::shape(format!("the last axis has {parts}; 1 (real) or 2 (complex) was wanted")));
        }
        let known = |i: usize| cx.optional(i).map(|f| scalar(f).ok_or(()));
        let Ok(axis) = known(2).transpose() else { return cx.results(vec![Fact::of_rank(x.dtype, rank)]) };
        let axis = self.axis(axis, rank)?;
        let mut result: Shape = shape.clone();
        let parts = if self.inverse && self.onesided { 1 } else { 2 };
        result[axis] = Dim::Unknown;
        result[rank - 1] = Dim::Known(parts);
        if let (Ok(given), Some(n)) = (known(1).transpose(), shape[axis].known()) {
            result[axis] = Dim::Known(self.result(self.length(given, n)?).0);
        }
        cx.results(vec![Fact::with_shape(x.dtype, result)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let axis = self.axis(io.optional(2).map(scalar_of).transpose()?, x.rank())?;
        let n = self.length(io.optional(1).map(scalar_of).transpose()?, x.dims[axis])?;
        let (count, parts) = self.result(n);
        let from = x.dims[axis];
        let in_parts = x.dims[x.rank() - 1];
        let outer: usize = x.dims[..axis].iter().product();
        let inner: usize = x.dims[axis + 1..x.rank() - 1].iter().product();
        for_dtype!(x.dtype, [F32, F64], T => {
            let x = x.as_slice::<T>()?;
            let y = io.output(0)?.as_slice::<T>()?;
            let lines = |len: usize, parts: usize| Lines {
                per_outer: inner,
                outer: len * inner * parts,
                inner: parts,
                step: inner * parts,
                len,
                parts,
            };
            let plan = Transform::new(n, in_parts, self.inverse, self.onesided);
            T::transform(cx, &plan, outer * inner, (x, lines(from, in_parts)), None, (y, lines(count, parts)));
            Ok(())
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1, 2]
    }
}

/// Short-time Fourier transform. Operands: signal `[batch, length, 1 or 2]`, step between frames, optional window, optional
/// length of a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Stft {
    /// Frequencies up to half the rate only.
    pub onesided: bool,
}

fn parse_stft(a: &mut Attributes) -> Result<Op> {
    Ok(Stft { onesided: a.flag_or("onesided", true)? }.into())
}

/// Number of frames.
fn frames(signal: usize, frame: usize, step: i64) -> Result<usize> {
    let step = usize::try_from(step).ok().filter(|s| *s > 0);
    let step = step.ok_or_else(|| Error::invalid_input("the step between frames must be at least 1"))?;
    let room = signal.checked_sub(frame);
    room.map(|r| r / step + 1).ok_or_else(|| Error::shape(format!("a frame of {frame} in a signal of {signal}")))
}

impl Operator for Stft {
    fn name(&self) -> &'static str {
        "STFT"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if x.rank().is_some_and(|r| r != 3) {
            return Err(Error::shape(format!("the signal is {}; [batch, length, 1 or 2] was wanted", x.shape_text())));
        }
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_rank(x.dtype, 4)]) };
        if let Some(parts) = shape[2].known().filter(|p| !(1..=2).contains(p)) {
            return Err(Error::shape(format!("the last axis has {parts}; 1 (real) or 2 (complex) was wanted")));
        }
        let window = cx.optional(2).and_then(Fact::dims).and_then(|d| d.first().copied());
        let said = cx.optional(3).map(|f| scalar(f).map(length).transpose()).transpose()?;
        let frame = match said {
            Some(frame) => frame,
            None if cx.optional(2).is_some() => window,
            None => {
                return Err(Error::invalid_model(
                    "a window (operand 2) or the length of a frame (operand 3) is missing",
                ));
            }
        };
        if let (Some(w), Some(f)) = (window, frame)
            && w != f
        {
            return Err(Error::shape(format!("a window of {w} for frames of {f}")));
        }
        let bins = frame.map_or(Dim::Unknown, |f| Dim::Known(if self.onesided { f / 2 + 1 } else { f }));
        let count = match (shape[1].known(), frame, scalar(cx.input(1)?)) {
            (Some(n), Some(f), Some(step)) => Dim::Known(frames(n, f, step)?),
            _ => Dim::Unknown,
        };
        let result = [shape[0].clone(), count, bins, Dim::Known(2)].into_iter().collect();
        cx.results(vec![Fact::with_shape(x.dtype, result)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let &[batch, n, parts] = x.dims else { return Err(Error::internal("a signal of another rank")) };
        let step = scalar_of(io.input(1)?)?;
        let window = io.optional(2);
        let frame = match (io.optional(3), window) {
            (Some(f), _) => length(scalar_of(f)?)?,
            (None, Some(w)) => w.len(),
            (None, None) => return Err(Error::invalid_model("the length of a frame is missing")),
        };
        if let Some(w) = window.filter(|w| w.len() != frame) {
            return Err(Error::shape(format!("a window of {} for frames of {frame}", w.len())));
        }
        let count = frames(n, frame, step)?;
        let bins = if self.onesided { frame / 2 + 1 } else { frame };
        for_dtype!(x.dtype, [F32, F64], T => {
            let x = x.as_slice::<T>()?;
            let window = window.map(|w| w.as_slice::<T>()).transpose()?;
            let y = io.output(0)?.as_slice::<T>()?;
            let inner = step as usize * parts;
            let from = Lines { per_outer: count, outer: n * parts, inner, step: parts, len: frame, parts };
            let to = Lines { per_outer: 1, outer: bins * 2, inner: 0, step: 2, len: bins, parts: 2 };
            T::transform(cx, &Transform::new(frame, parts, false, false), batch * count, (x, from), window, (y, to));
            Ok(())
        }, else Err(wrong_dtype("the signal", x.dtype, "float32 and float64")))
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1, 3]
    }
}

/// Filters that weigh a spectrum into mel bins. Operands: bins, length of the transform, sample rate, lower and upper edge.
#[derive(Clone, Debug, PartialEq)]
pub struct MelWeightMatrix {
    /// Of the result.
    pub dtype: DType,
}

fn parse_mel(a: &mut Attributes) -> Result<Op> {
    Ok(MelWeightMatrix { dtype: a.dtype("output_datatype")?.unwrap_or(DType::F32) }.into())
}

fn edge(view: TensorView) -> Result<f64> {
    let empty = || Error::shape("an empty operand; a number was wanted");
    for_dtype!(view.dtype, [F32, F64], T => {
        Ok(view.as_slice::<T>()?.first().ok_or_else(empty)?.to_f64())
    }, else Err(wrong_dtype("an edge", view.dtype, "float32 and float64")))
}

impl Operator for MelWeightMatrix {
    fn name(&self) -> &'static str {
        "MelWeightMatrix"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let size = |i: usize| scalar(cx.input(i)?).map(length).transpose();
        let dim = |n: Option<usize>| n.map_or(Dim::Unknown, Dim::Known);
        let shape = [dim(size(1)?.map(|n| n / 2 + 1)), dim(size(0)?)];
        cx.results(vec![Fact::with_shape(self.dtype, shape.into_iter().collect())])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let size = |i: usize| length(scalar_of(io.input(i)?)?);
        let (bins, n, rate) = (size(0)?, size(1)?, size(2)?);
        let (low, high) = (edge(io.input(3)?)?, edge(io.input(4)?)?);
        let weights = mel_weights(bins, n, rate as f64, low, high).ok_or_else(|| {
            Error::invalid_input(format!(
                "edges at {low} and {high} Hz lie outside of the spectrum at a rate of {rate} Hz"
            ))
        })?;
        let y = io.output(0)?;
        match y.dtype {
            DType::F64 => y.as_slice()?.copy_from_slice(&weights),
            DType::Bool | DType::String => {
                return Err(wrong_dtype("attribute output_datatype", y.dtype, "floats and integers"));
            }
            _ => convert(Tensor::from_slice(y.dims, &weights)?.view(), y)?,
        }
        Ok(())
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0, 1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    fn near(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{got:?} for {want:?}"));
    }

    #[test]
    fn there_and_back() {
        let x = f32s(&[1, 4, 1], &[1.0, 2.0, 3.0, 4.0]);
        let y = OneNode::new("DFT").int("onesided", 1).run(std::slice::from_ref(&x)).unwrap().remove(0);
        assert_eq!(y.dims(), [1, 3, 2]);
        near(y.as_slice().unwrap(), &[10.0, 0.0, -2.0, 2.0, -2.0, 0.0]);
        let z = OneNode::new("DFT").int("onesided", 1).int("inverse", 1).run(&[y]).unwrap().remove(0);
        assert_eq!(z.dims(), [1, 4, 1]);
        near(z.as_slice().unwrap(), x.as_slice().unwrap());
    }

    #[test]
    fn frames_of_a_signal() {
        let x = f32s(&[1, 4, 1], &[1.0, 2.0, 3.0, 4.0]);
        let inputs = [Some(x), Some(i64s(&[], &[2])), None, Some(i64s(&[], &[2]))];
        let y = OneNode::new("STFT").run_optional(&inputs).unwrap().remove(0);
        assert_eq!(y.dims(), [1, 2, 2, 2]);
        near(y.as_slice().unwrap(), &[3.0, 0.0, -1.0, 0.0, 7.0, 0.0, -1.0, 0.0]);
    }

    #[test]
    fn mistakes_are_named() {
        let e = OneNode::new("DFT").run(&[f32s(&[1, 1, 3], &[0.0; 3])]).unwrap_err();
        assert!(e.message.contains("1 (real) or 2 (complex)"), "{e}");
    }
}
