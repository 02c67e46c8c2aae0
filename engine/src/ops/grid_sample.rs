//! GridSample and AffineGrid: images read at given points.

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::for_dtype;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;
use weblane_kernels::sampling::{Border, Interpolation, grid_sample};

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("GridSample", 16, parse), Registration::onnx("AffineGrid", 20, parse_affine)];

/// Samples x, `[batch, channels, sizes...]`, at the points of operand 1, `[batch, result sizes..., axes]`.
#[derive(Clone, Debug, PartialEq)]
pub struct GridSample {
    /// Between pixels.
    pub interpolation: Interpolation,
    /// Beyond the borders.
    pub border: Border,
    /// Whether -1 and 1 are the centres of the border pixels instead of their outer edges.
    pub align_corners: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    use Interpolation::{Cubic, Linear, Nearest};
    let modes = [("linear", Linear), ("bilinear", Linear), ("nearest", Nearest), ("cubic", Cubic), ("bicubic", Cubic)];
    let interpolation = a.choice("mode", &modes)?;
    let borders = [("zeros", Border::Zeros), ("border", Border::Clamp), ("reflection", Border::Reflect)];
    let border = a.choice("padding_mode", &borders)?;
    Ok(GridSample { interpolation, border, align_corners: a.flag_or("align_corners", false)? }.into())
}

impl Operator for GridSample {
    fn name(&self) -> &'static str {
        "GridSample"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, grid) = (cx.input(0)?, cx.input(1)?);
        if x.dtype != grid.dtype && !(x.dtype.is_float() && grid.dtype.is_float()) {
            return Err(Error::dtype(format!("x is {}, the grid {}", x.dtype, grid.dtype)));
        }
        let (Some(xs), Some(gs)) = (&x.shape, &grid.shape) else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        if xs.len() < 3 || gs.len() != xs.len() {
            return Err(Error::shape(format!(
                "x is {} and the grid {}; equal ranks of at least 3 were wanted",
                x.shape_text(),
                grid.shape_text()
            )));
        }
        let axes = xs.len() - 2;
        if gs[gs.len() - 1].known().is_some_and(|n| n != axes) {
            return Err(Error::shape(format!("the grid is {}; its last axis must have {axes}", grid.shape_text())));
        }
        if let (Some(a), Some(b)) = (xs[0].known(), gs[0].known())
            && a != b
        {
            return Err(Error::shape(format!("x has {a} images, the grid {b}")));
        }
        let mut shape: Shape = xs[..2].iter().cloned().collect();
        shape.extend(gs[1..gs.len() - 1].iter().cloned());
        cx.results(vec![Fact::with_shape(x.dtype, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (x, grid) = (io.input(0)?, io.input(1)?);
        if x.dims[2..].contains(&0) && !io.output(0)?.is_empty() {
            return Err(Error::shape(format!("x is of shape {:?}: there are no pixels to sample", x.dims)));
        }
        for_dtype!(x.dtype, [F32, F64], T => {
            grid_sample(
                x.as_slice::<T>()?,
                x.dims[0],
                x.dims[1],
                &x.dims[2..],
                grid.as_slice::<T>()?,
                self.interpolation,
                self.border,
                self.align_corners,
                io.output(0)?.as_slice::<T>()?,
            );
            Ok(())
        }, else Err(wrong_dtype("x", x.dtype, "float32 and float64")))
    }
}

/// The grid of an affine transformation: operand 0 `[batch, axes, axes + 1]`, operand 1 the shape of the result of the
/// sampling.
#[derive(Clone, Debug, PartialEq)]
pub struct AffineGrid {
    /// As in [`GridSample`].
    pub align_corners: bool,
}

fn parse_affine(a: &mut Attributes) -> Result<Op> {
    Ok(AffineGrid { align_corners: a.flag_or("align_corners", false)? }.into())
}

impl Operator for AffineGrid {
    fn name(&self) -> &'static str {
        "AffineGrid"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (theta, size) = (cx.input(0)?, cx.input(1)?);
        let Some(sizes) = size.sizes() else {
            let rank = theta.dims().and_then(|d| d.get(1).map(|axes| axes + 2));
            return cx.results(vec![rank.map_or(Fact::of_dtype(theta.dtype), |r| Fact::of_rank(theta.dtype, r))]);
        };
        let axes = sizes.len().checked_sub(2).filter(|a| (2..=3).contains(a));
        let axes =
            axes.ok_or_else(|| Error::shape(format!("operand 1 has {} sizes; 4 or 5 were wanted", sizes.len())))?;
        if let Some(dims) = theta.dims()
            && (dims.len() != 3 || dims[1..] != [axes, axes + 1] || sizes[0].known().is_some_and(|n| n != dims[0]))
        {
            return Err(Error::shape(format!(
                "operand 0 is of shape {dims:?}; [batch, {axes}, {}] was wanted",
                axes + 1
            )));
        }
        let mut shape: Shape = [sizes[0].clone()].into_iter().chain(sizes[2..].iter().cloned()).collect();
        shape.push(Dim::Known(axes));
        cx.results(vec![Fact::with_shape(theta.dtype, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let theta = io.input(0)?;
        let y = io.output(0)?;
        let (&[batch, ref sizes @ .., axes], dtype) = (y.dims, y.dtype) else {
            return Err(Error::internal("a grid without axes"));
        };
        let points: usize = sizes.iter().product();
        let at = |i: usize, n: usize| match (self.align_corners, n) {
            (true, 1) => -1.0,
            (true, n) => 2.0 * i as f64 / (n as f64 - 1.0) - 1.0,
            (false, n) => (2.0 * i as f64 + 1.0) / n as f64 - 1.0,
        };
        for_dtype!(dtype, [F32, F64], T => {
            let theta = theta.as_slice::<T>()?;
            let y = y.as_slice::<T>()?;
            for n in 0..batch {
                for p in 0..points {
                    let mut rest = p;
                    // Coordinates in the order of the matrix: last axis first, then 1.
                    let mut point = [1.0; 4];
                    for (k, &size) in sizes.iter().rev().enumerate() {
                        point[k] = at(rest % size, size);
                        rest /= size;
                    }
                    for a in 0..axes {
                        let row = &theta[(n * axes + a) * (axes + 1)..][..axes + 1];
                        let sum = (0..axes).map(|k| row[k].to_f64() * point[k]).sum::<f64>() + row[axes].to_f64();
                        y[(n * points + p) * axes + a] = T::from_f64(sum);
                    }
                }
            }
            Ok(())
        }, else Err(wrong_dtype("operand 0", dtype, "float32 and float64")))
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn the_identity_gives_the_image_back() {
        let theta = f32s(&[1, 2, 3], &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
        let grid = OneNode::new("AffineGrid").run(&[theta, i64s(&[4], &[1, 1, 2, 3])]).unwrap().remove(0);
        assert_eq!(grid.dims(), [1, 2, 3, 2]);
        let x = f32s(&[1, 1, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let y = OneNode::new("GridSample").run(&[x.clone(), grid]).unwrap();
        for (a, b) in y[0].as_slice::<f32>().unwrap().iter().zip(x.as_slice::<f32>().unwrap()) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    #[test]
    fn ranks_must_agree() {
        let e =
            OneNode::new("GridSample").run(&[f32s(&[1, 1, 1, 1], &[1.0]), f32s(&[1, 1, 2], &[0.0; 2])]).unwrap_err();
        assert!(e.message.contains("equal ranks"), "{e}");
    }
}
