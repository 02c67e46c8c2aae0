//! CenterCropPad.

use super::sizes::{Axes, Ints, copy_axes, distinct_axes, element_size, ints, loose_sizes, strides};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("CenterCropPad", 18, CenterCropPad::parse)];

/// The middle of the operand, or the operand in the middle of zeros, axis by axis.
#[derive(Clone, Debug, PartialEq)]
pub struct CenterCropPad {
    /// The axes that operand 1 has sizes for; all where the node does not say.
    pub axes: Option<Vec<i64>>,
}

impl CenterCropPad {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(CenterCropPad { axes: a.ints("axes")? }.into())
    }
}

impl Operator for CenterCropPad {
    fn name(&self) -> &'static str {
        "CenterCropPad"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, wanted) = (cx.input(0)?, cx.input(1)?);
        element_size(x.dtype)?;
        if let Ints::Known(v) = ints(Some(wanted), "the wanted shape")?
            && v.iter().any(|n| *n < 0)
        {
            return Err(Error::shape(format!("the wanted shape {:?}; sizes of 0 or more were wanted", v.as_slice())));
        }
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let axes = match &self.axes {
            Some(list) => distinct_axes(list, shape.len())?,
            None => (0..shape.len()).collect(),
        };
        let mut out = shape.clone();
        let sizes = loose_sizes(wanted);
        if let Some(sizes) = sizes.as_ref().filter(|s| s.len() != axes.len()) {
            return Err(Error::shape(format!("{} sizes for {} axes", sizes.len(), axes.len())));
        }
        for (i, &a) in axes.iter().enumerate() {
            out[a] = sizes.as_ref().map_or(Dim::Unknown, |s| s[i].clone());
        }
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let y = io.output(0)?;
        y.bytes().fill(0);
        let (from, to) = (strides(x.dims), strides(y.dims));
        let (mut source, mut target) = (0, 0);
        let mut axes = Axes::new();
        for a in 0..x.rank() {
            let (have, want) = (x.dims[a], y.dims[a]);
            // An odd remainder goes to the end, of what is cut off and of what is added alike.
            source += have.saturating_sub(want) / 2 * from[a];
            target += want.saturating_sub(have) / 2 * to[a];
            axes.push(Axis { len: have.min(want), src: from[a] as isize, dst: to[a] });
        }
        copy_axes(cx, &axes, x, source, y, target)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn crops_and_pads() {
        let x = || f32s(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let y = OneNode::new("CenterCropPad").run(&[x(), i64s(&[2], &[1, 5])]).unwrap();
        assert_eq!(y[0], f32s(&[1, 5], &[0.0, 1.0, 2.0, 3.0, 0.0]));
        let y = OneNode::new("CenterCropPad").ints("axes", &[-1]).run(&[x(), i64s(&[1], &[2])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 2], &[1.0, 2.0, 4.0, 5.0]));
        assert!(OneNode::new("CenterCropPad").run(&[x(), i64s(&[1], &[2])]).is_err());
        assert!(OneNode::new("CenterCropPad").run(&[x(), i64s(&[2], &[2, -1])]).is_err());
    }
}
