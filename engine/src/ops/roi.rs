//! RoiAlign and MaxRoiPool: fixed-size results from regions of images.

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::for_dtype;
use crate::tensor::DType;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;
use weblane_kernels::roi::roi_mean;
use weblane_kernels::sampling::{RoiAlign as Align, max_roi_pool, roi_align};

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("RoiAlign", 10, parse), Registration::onnx("MaxRoiPool", 1, parse_max)];

/// Operands: x `[batch, channels, height, width]`, regions `[n, 4]`, their images `[n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RoiAlign(Align);

fn size(name: &str, v: i64, least: i64) -> Result<usize> {
    let fits = usize::try_from(v).ok().filter(|_| (least..1 << 24).contains(&v));
    fits.ok_or_else(|| Error::unsupported_attribute(format!("attribute {name} is {v}; at least {least} was wanted")))
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let rows = size("output_height", a.int_or("output_height", 1)?, 1)?;
    let cols = size("output_width", a.int_or("output_width", 1)?, 1)?;
    let sampling = size("sampling_ratio", a.int_or("sampling_ratio", 0)?, 0)?;
    let scale = f64::from(a.float_or("spatial_scale", 1.0)?);
    let max = a.choice("mode", &[("avg", false), ("max", true)])?;
    // Before opset 16 there was the second form only.
    let modes = if a.opset() < 16 {
        [("output_half_pixel", false); 2]
    } else {
        [("half_pixel", true), ("output_half_pixel", false)]
    };
    let half_pixel = a.choice("coordinate_transformation_mode", &modes)?;
    Ok(RoiAlign(Align { max, half_pixel, output: [rows, cols], sampling, scale }).into())
}

fn image(x: &Fact) -> Result<Dim> {
    match x.shape.as_deref() {
        Some([_, c, _, _]) => Ok(c.clone()),
        None => Ok(Dim::Unknown),
        _ => Err(Error::shape(format!("x is {}; rank 4 was wanted", x.shape_text()))),
    }
}

fn regions(rois: &Fact, columns: usize) -> Result<Dim> {
    match rois.shape.as_deref() {
        Some([n, c]) if c.known().is_none_or(|c| c == columns) => Ok(n.clone()),
        None => Ok(Dim::Unknown),
        _ => Err(Error::shape(format!("the regions are {}; [n, {columns}] was wanted", rois.shape_text()))),
    }
}

impl Operator for RoiAlign {
    fn name(&self) -> &'static str {
        "RoiAlign"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, n) = (cx.input(0)?, regions(cx.input(1)?, 4)?);
        if let (Some(n), Some(dims)) = (n.known(), cx.input(2)?.dims())
            && dims.as_slice() != [n]
        {
            return Err(Error::shape(format!("operand 2 is of shape {dims:?}; [{n}] was wanted")));
        }
        let [rows, cols] = self.0.output;
        let shape = [n, image(x)?, Dim::Known(rows), Dim::Known(cols)];
        cx.results(vec![Fact::with_shape(x.dtype, shape.into_iter().collect())])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, rois) = (io.input(0)?, io.input(1)?);
        let &[batch, c, h, w] = x.dims else { return Err(Error::internal("x is no image")) };
        let index = |i: &i64| {
            let fits = usize::try_from(*i).ok().filter(|i| *i < batch);
            fits.ok_or_else(|| Error::invalid_input(format!("region of image {i}; there are {batch}")))
        };
        let batches: Vec<usize> = io.input(2)?.to_i64s()?.iter().map(index).collect::<Result<_>>()?;
        if x.dtype == DType::F32 && !self.0.max {
            let y = io.output(0)?.as_slice()?;
            return Ok(roi_mean(cx, x.as_slice()?, [batch, c, h, w], rois.as_slice()?, &batches, &self.0, y)?);
        }
        for_dtype!(x.dtype, [F32, F64], T => {
            let y = io.output(0)?.as_slice::<T>()?;
            roi_align(x.as_slice::<T>()?, [batch, c, h, w], rois.as_slice::<T>()?, &batches, &self.0, y);
            Ok(())
        }, else Err(wrong_dtype("x", x.dtype, "float32 and float64")))
    }
}

/// Operands: x `[batch, channels, height, width]`, regions `[n, 5]` with the image in front.
#[derive(Clone, Debug, PartialEq)]
pub struct MaxRoiPool {
    /// Rows and columns of the result.
    pub output: [usize; 2],
    /// From coordinates of regions to those of x.
    pub scale: f32,
}

fn parse_max(a: &mut Attributes) -> Result<Op> {
    let shape = a.required("pooled_shape", Attributes::ints)?;
    let &[rows, cols] = shape.as_slice() else {
        return Err(Error::invalid_model(format!("attribute pooled_shape is {shape:?}; two numbers were wanted")));
    };
    let output = [size("pooled_shape", rows, 1)?, size("pooled_shape", cols, 1)?];
    Ok(MaxRoiPool { output, scale: a.float_or("spatial_scale", 1.0)? }.into())
}

impl Operator for MaxRoiPool {
    fn name(&self) -> &'static str {
        "MaxRoiPool"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, n) = (cx.input(0)?, regions(cx.input(1)?, 5)?);
        let shape = [n, image(x)?, Dim::Known(self.output[0]), Dim::Known(self.output[1])];
        cx.results(vec![Fact::with_shape(x.dtype, shape.into_iter().collect())])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (x, rois) = (io.input(0)?, io.input(1)?);
        let &[batch, c, h, w] = x.dims else { return Err(Error::internal("x is no image")) };
        for_dtype!(x.dtype, [F32, F64], T => {
            let rois = rois.as_slice::<T>()?;
            let outside = |r: &&[T]| !(0.0..batch as f64).contains(&r[0].to_f64());
            if let Some(r) = rois.chunks_exact(5).find(outside) {
                return Err(Error::invalid_input(format!("region of image {}; there are {batch}", r[0])));
            }
            let y = io.output(0)?.as_slice::<T>()?;
            max_roi_pool(x.as_slice::<T>()?, [batch, c, h, w], rois, self.output, f64::from(self.scale), y);
            Ok(())
        }, else Err(wrong_dtype("x", x.dtype, "float32 and float64")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn the_mean_of_a_region() {
        let x = f32s(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let rois = f32s(&[1, 4], &[0.0, 0.0, 2.0, 2.0]);
        let y = OneNode::new("RoiAlign").run(&[x.clone(), rois.clone(), i64s(&[1], &[0])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [2.5]);
        let e = OneNode::new("RoiAlign").run(&[x, rois, i64s(&[1], &[1])]).unwrap_err();
        assert!(e.message.contains("region of image 1"), "{e}");
    }

    #[test]
    fn the_maximum_of_a_region() {
        let x = f32s(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let node = OneNode::new("MaxRoiPool").ints("pooled_shape", &[1, 1]);
        let y = node.run(&[x, f32s(&[1, 5], &[0.0, 0.0, 0.0, 0.0, 1.0])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [3.0]);
    }
}
