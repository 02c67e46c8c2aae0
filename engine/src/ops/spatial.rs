//! What convolutions and pools share: the sliding window, its attributes and the sizes that come of it.

use super::Attributes;
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::Dims;
use smallvec::SmallVec;
use weblane_kernels::conv::Layout;

/// One number per spatial axis.
pub type Axes = SmallVec<[usize; 3]>;

/// How missing padding is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoPad {
    /// `pads` says it.
    NotSet,
    /// As much as makes the output `ceil(input / stride)`, the odd one at the end.
    SameUpper,
    /// The same, the odd one at the beginning.
    SameLower,
    /// None.
    Valid,
}

/// The attributes of a sliding window. An empty list stands for the default (strides and dilations 1, no padding).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Size of the window; convolutions may take it from their weights.
    pub kernel: Option<Axes>,
    /// Steps between windows.
    pub strides: Axes,
    /// Steps between elements of a window.
    pub dilations: Axes,
    /// Padding before each axis, then after each axis.
    pub pads: Axes,
    /// How padding is found when `pads` is empty.
    pub auto_pad: AutoPad,
    /// Whether a last, partial window counts.
    pub ceil: bool,
}

/// A window over known sizes; arrays are `[d, h, w]` where missing leading axes have size, stride and dilation 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sliding {
    /// Size of the input.
    pub input: [usize; 3],
    /// Size of the window.
    pub kernel: [usize; 3],
    /// Steps between windows.
    pub strides: [usize; 3],
    /// Steps between elements of a window.
    pub dilations: [usize; 3],
    /// Padding before.
    pub begin: [usize; 3],
    /// Padding after.
    pub end: [usize; 3],
    /// Number of windows.
    pub output: [usize; 3],
}

fn sizes(name: &str, values: Vec<i64>, least: i64) -> Result<Axes> {
    // The bound keeps every product below far from overflow; no real window is that large.
    let fits = |v: i64| (least..=i64::from(u32::MAX) / 2).contains(&v);
    match values.iter().find(|&&v| !fits(v)) {
        Some(v) => Err(Error::unsupported_attribute(format!("attribute {name} has {v}; at least {least} was wanted"))),
        None => Ok(values.into_iter().map(|v| v as usize).collect()),
    }
}

impl Window {
    /// Reads `kernel_shape`, `strides`, `dilations`, `pads` and `auto_pad`.
    pub fn parse(a: &mut Attributes) -> Result<Self> {
        let mut list = |name: &str, least| a.ints(name)?.map(|v| sizes(name, v, least)).transpose();
        let kernel = list("kernel_shape", 1)?;
        let strides = list("strides", 1)?.unwrap_or_default();
        let dilations = list("dilations", 1)?.unwrap_or_default();
        let pads = list("pads", 0)?.unwrap_or_default();
        let auto_pad = a.choice(
            "auto_pad",
            &[
                ("NOTSET", AutoPad::NotSet),
                ("SAME_UPPER", AutoPad::SameUpper),
                ("SAME_LOWER", AutoPad::SameLower),
                ("VALID", AutoPad::Valid),
            ],
        )?;
        Ok(Window { kernel, strides, dilations, pads, auto_pad, ceil: false })
    }

    /// Checks that all lists are of the same, supported rank.
    pub fn check_rank(&self, rank: usize) -> Result<()> {
        if !(1..=3).contains(&rank) {
            return Err(Error::shape(format!("{rank} spatial axes; 1 to 3 can be computed")));
        }
        let lists = [
            ("kernel_shape", self.kernel.as_ref().map_or(0, |k| k.len()), rank),
            ("strides", self.strides.len(), rank),
            ("dilations", self.dilations.len(), rank),
            ("pads", self.pads.len(), 2 * rank),
        ];
        match lists.into_iter().find(|&(_, met, want)| met != 0 && met != want) {
            Some((name, met, want)) => Err(Error::invalid_model(format!(
                "attribute {name} has {met} numbers; {want} were wanted for {rank} spatial axes"
            ))),
            None => Ok(()),
        }
    }

    fn stride(&self, axis: usize) -> usize {
        self.strides.get(axis).copied().unwrap_or(1)
    }

    fn dilation(&self, axis: usize) -> usize {
        self.dilations.get(axis).copied().unwrap_or(1)
    }

    fn pad(&self, axis: usize, rank: usize) -> (usize, usize) {
        match self.auto_pad {
            AutoPad::NotSet => {
                (self.pads.get(axis).copied().unwrap_or(0), self.pads.get(rank + axis).copied().unwrap_or(0))
            }
            _ => (0, 0),
        }
    }

    /// Elements that a window spans along an axis.
    fn extent(&self, axis: usize, kernel: usize) -> Result<usize> {
        let span = kernel.saturating_sub(1).checked_mul(self.dilation(axis)).and_then(|n| n.checked_add(1));
        span.filter(|&n| n < usize::MAX / 8 && kernel > 0)
            .ok_or_else(|| Error::shape(format!("a window of {kernel} with dilation {}", self.dilation(axis))))
    }

    /// Shape of an input that a window of this shape fits into, with one image.
    pub fn least_input(&self, channels: usize, kernel: &[usize], layout: Layout) -> Result<Dims> {
        let mut shape: Dims = kernel.iter().enumerate().map(|(i, &k)| self.extent(i, k)).collect::<Result<_>>()?;
        shape.insert(if layout == Layout::Nchw { 0 } else { shape.len() }, channels);
        shape.insert(0, 1);
        Ok(shape)
    }

    /// Padding before, padding after and number of windows along one axis.
    fn axis(&self, axis: usize, rank: usize, input: usize, kernel: usize) -> Result<(usize, usize, usize)> {
        let (stride, extent) = (self.stride(axis), self.extent(axis, kernel)?);
        let (begin, end) = match self.auto_pad {
            AutoPad::NotSet | AutoPad::Valid => self.pad(axis, rank),
            same => {
                let output = input.div_ceil(stride);
                let total =
                    output.saturating_sub(1).saturating_mul(stride).saturating_add(extent).saturating_sub(input);
                let (less, more) = (total / 2, total - total / 2);
                if same == AutoPad::SameUpper { (less, more) } else { (more, less) }
            }
        };
        let padded = input.checked_add(begin).and_then(|n| n.checked_add(end));
        let padded = padded.ok_or_else(|| Error::limit("a padded size overflows"))?;
        let Some(room) = padded.checked_sub(extent) else {
            return Err(Error::shape(format!(
                "a window of {extent} elements does not fit into {padded} (input {input} with padding {begin} and {end})"
            )));
        };
        let mut output = if self.ceil { room.div_ceil(stride) } else { room / stride } + 1;
        // A window that starts behind the input and its leading padding would see padding only.
        if self.ceil && (output - 1) * stride >= input + begin {
            output -= 1;
        }
        Ok((begin, end, output))
    }

    /// The window over known sizes.
    pub fn over(&self, input: &[usize], kernel: &[usize]) -> Result<Sliding> {
        let rank = input.len();
        self.check_rank(rank)?;
        if kernel.len() != rank {
            return Err(Error::shape(format!("a window of shape {kernel:?} over {rank} spatial axes")));
        }
        if let Some(said) = self.kernel.as_ref().filter(|k| k.as_slice() != kernel) {
            return Err(Error::shape(format!("attribute kernel_shape is {said:?}, the weights have {kernel:?}")));
        }
        let one = [1; 3];
        let mut s =
            Sliding { input: one, kernel: one, strides: one, dilations: one, begin: [0; 3], end: [0; 3], output: one };
        for i in 0..rank {
            let to = 3 - rank + i;
            (s.begin[to], s.end[to], s.output[to]) = self.axis(i, rank, input[i], kernel[i])?;
            s.input[to] = input[i];
            s.kernel[to] = kernel[i];
            s.strides[to] = self.stride(i);
            s.dilations[to] = self.dilation(i);
        }
        Ok(s)
    }

    /// Sizes of the output where some sizes have no number.
    pub fn infer(&self, input: &[Dim], kernel: &[Dim]) -> Result<Shape> {
        let rank = input.len();
        self.check_rank(rank)?;
        let one = |(i, (x, k)): (usize, (&Dim, &Dim))| {
            let k = self.kernel.as_ref().map(|k| k[i]).or(k.known());
            match (x, k) {
                (Dim::Known(x), Some(k)) => Ok(Dim::Known(self.axis(i, rank, *x, k)?.2)),
                (x, Some(k)) => {
                    let (begin, end) = self.pad(i, rank);
                    let kept = match self.auto_pad {
                        AutoPad::NotSet | AutoPad::Valid => begin + end + 1 == self.extent(i, k)?,
                        _ => true,
                    };
                    Ok(if kept && self.stride(i) == 1 { x.clone() } else { Dim::Unknown })
                }
                _ => Ok(Dim::Unknown),
            }
        };
        input.iter().zip(kernel).enumerate().map(one).collect()
    }
}

/// Batch, channels and spatial sizes of an activation tensor in the given layout.
pub fn split<T: Clone>(shape: &[T], layout: Layout) -> Option<(T, T, SmallVec<[T; 3]>)> {
    let (batch, rest) = shape.split_first()?;
    let (channels, spatial) = match layout {
        Layout::Nchw => rest.split_first()?,
        Layout::Nhwc => rest.split_last()?,
    };
    Some((batch.clone(), channels.clone(), spatial.iter().cloned().collect()))
}

/// The inverse of [`split`].
pub fn join(batch: Dim, channels: Dim, spatial: Shape, layout: Layout) -> Shape {
    let mut shape = Shape::new();
    shape.push(batch);
    match layout {
        Layout::Nchw => {
            shape.push(channels);
            shape.extend(spatial);
        }
        Layout::Nhwc => {
            shape.extend(spatial);
            shape.push(channels);
        }
    }
    shape
}

/// Batch, channels and spatial sizes, as far as they are known.
pub type Parts = (Dim, Dim, SmallVec<[Dim; 3]>);

/// Batch, channels and spatial sizes of operand 0, or an error when its rank is below 3.
pub fn split_fact(fact: &Fact, layout: Layout) -> Result<Option<Parts>> {
    let Some(shape) = &fact.shape else { return Ok(None) };
    match split(shape, layout) {
        Some(parts) if !parts.2.is_empty() => Ok(Some(parts)),
        _ => Err(Error::shape(format!(
            "the operand is {}; batch, channels and at least one spatial axis were wanted",
            fact.shape_text()
        ))),
    }
}

/// Batch, channels and spatial sizes of known dims.
pub fn split_dims(dims: &[usize], layout: Layout) -> Result<(usize, usize, Axes)> {
    split(dims, layout).ok_or_else(|| Error::shape(format!("an operand of shape {dims:?}; rank 3 or more was wanted")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(strides: &[usize], pads: &[usize], auto_pad: AutoPad, ceil: bool) -> Window {
        Window { kernel: None, strides: strides.into(), dilations: Axes::new(), pads: pads.into(), auto_pad, ceil }
    }

    #[test]
    fn sizes_follow_the_specification() {
        let plain = window(&[2, 2], &[1, 1, 1, 1], AutoPad::NotSet, false);
        assert_eq!(plain.over(&[5, 6], &[3, 3]).unwrap().output, [1, 3, 3]);
        let ceil = window(&[2, 2], &[], AutoPad::NotSet, true);
        assert_eq!(ceil.over(&[4, 4], &[3, 3]).unwrap().output, [1, 2, 2]);
        // The third window would start in the padding behind the input.
        let skipped = window(&[3], &[1, 1], AutoPad::NotSet, true);
        assert_eq!(skipped.over(&[2], &[1]).unwrap().output, [1, 1, 1]);
        let same = window(&[2], &[], AutoPad::SameUpper, false).over(&[4], &[3]).unwrap();
        assert_eq!((same.begin[2], same.end[2], same.output[2]), (0, 1, 2));
        let lower = window(&[2], &[], AutoPad::SameLower, false).over(&[4], &[3]).unwrap();
        assert_eq!((lower.begin[2], lower.end[2], lower.output[2]), (1, 0, 2));
    }

    #[test]
    fn symbols_survive_windows_that_keep_the_size() {
        let s = Dim::Symbol("w".into());
        let keep = window(&[], &[1, 1], AutoPad::NotSet, false);
        assert_eq!(keep.infer(std::slice::from_ref(&s), &[Dim::Known(3)]).unwrap()[0], s);
        let half = window(&[2], &[1, 1], AutoPad::NotSet, false);
        assert_eq!(half.infer(&[s], &[Dim::Known(3)]).unwrap()[0], Dim::Unknown);
    }

    #[test]
    fn a_window_larger_than_the_input_is_refused() {
        let w = window(&[], &[], AutoPad::NotSet, false);
        assert!(w.over(&[2], &[3]).unwrap_err().message.contains("does not fit"));
        assert!(w.over(&[2, 2, 2, 2], &[1, 1, 1, 1]).is_err());
    }
}
