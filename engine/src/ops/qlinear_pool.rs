//! QLinearAveragePool and QLinearGlobalAveragePool of onnxruntime: means of quantised numbers.

use super::qparams::{Count, bounds, bytes, check_byte, infer_scale, infer_zero, scale, zero};
use super::spatial::{Sliding, Window, join, split_dims, split_fact};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::element_count;
use weblane_kernels::conv::Layout;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::microsoft("QLinearAveragePool", parse),
    Registration::microsoft("QLinearGlobalAveragePool", parse_global),
];

/// Operands: X, its scale and zero point, scale and zero point of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearPool {
    /// The window; without one, all spatial axes are taken together.
    pub window: Option<Window>,
    /// Whether padding counts as elements of the window.
    pub include_pad: bool,
    /// Of the operand and the result.
    pub layout: Layout,
}

fn layout(a: &mut Attributes) -> Result<Layout> {
    Ok(if a.flag_or("channels_last", false)? { Layout::Nhwc } else { Layout::Nchw })
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let mut window = Window::parse(a)?;
    if window.kernel.is_none() {
        return Err(Error::invalid_model("attribute kernel_shape is missing"));
    }
    window.ceil = a.flag_or("ceil_mode", false)?;
    let include_pad = a.flag_or("count_include_pad", false)?;
    Ok(QLinearPool { window: Some(window), include_pad, layout: layout(a)? }.into())
}

fn parse_global(a: &mut Attributes) -> Result<Op> {
    Ok(QLinearPool { window: None, include_pad: false, layout: layout(a)? }.into())
}

/// `len` neighbours from where window `o` begins, cut to the `size` elements there are.
fn taps(o: usize, stride: usize, begin: usize, len: usize, size: usize) -> std::ops::Range<usize> {
    let start = o * stride;
    start.saturating_sub(begin).min(size)..(start + len).saturating_sub(begin).min(size)
}

impl Operator for QLinearPool {
    fn name(&self) -> &'static str {
        match self.window {
            Some(_) => "com.microsoft.QLinearAveragePool",
            None => "com.microsoft.QLinearGlobalAveragePool",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_byte("X", x.dtype)?;
        infer_scale(cx, 1, "x_scale", Count::One)?;
        infer_zero(cx, 2, "x_zero_point", x.dtype, Count::One)?;
        infer_scale(cx, 3, "y_scale", Count::One)?;
        infer_zero(cx, 4, "y_zero_point", x.dtype, Count::One)?;
        let Some((batch, channels, spatial)) = split_fact(x, self.layout)? else {
            return cx.results(vec![Fact::of_dtype(x.dtype)]);
        };
        let spatial: Shape = match &self.window {
            None => spatial.iter().map(|_| Dim::Known(1)).collect(),
            Some(window) => {
                let kernel: Shape = window.kernel.iter().flatten().map(|&k| Dim::Known(k)).collect();
                if kernel.len() != spatial.len() {
                    return Err(Error::shape(format!(
                        "attribute kernel_shape has {} numbers, the operand {} has {} spatial axes",
                        kernel.len(),
                        x.shape_text(),
                        spatial.len()
                    )));
                }
                window.infer(&spatial, &kernel)?
            }
        };
        cx.results(vec![Fact::with_shape(x.dtype, join(batch, channels, spatial, self.layout))])
    }

    fn run(&self, _cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let (x_scale, x_zero) = (scale(io.input(1)?, "x_scale")?, zero(io.optional(2), "x_zero_point")?);
        let (y_scale, y_zero) = (scale(io.input(3)?, "y_scale")?, zero(io.optional(4), "y_zero_point")?);
        let (batch, channels, spatial) = split_dims(x.dims, self.layout)?;
        let pixels = element_count(&spatial)?;
        let [lo, hi] = bounds(x.dtype);
        let q = bytes(x)?;
        // Where a pixel of a channel of an image lies.
        let place = |b: usize, c: usize, pixel: usize, pixels: usize| match self.layout {
            Layout::Nchw => (b * channels + c) * pixels + pixel,
            Layout::Nhwc => (b * pixels + pixel) * channels + c,
        };
        let y = io.output(0)?.bytes();
        let Some(window) = &self.window else {
            if pixels == 0 {
                return Err(Error::shape(format!("an operand of shape {:?} has no mean", x.dims)));
            }
            // onnxruntime: round(sum * ratio) + zero.
            let ratio = x_scale / (y_scale * pixels as f32);
            for b in 0..batch {
                for c in 0..channels {
                    let sum: i64 = (0..pixels).map(|p| i64::from(q.get(place(b, c, p, pixels)) - x_zero)).sum();
                    let v = (sum as f32 * ratio).round_ties_even() as i32;
                    y[b * channels + c] = v.saturating_add(y_zero).clamp(lo, hi) as u8;
                }
            }
            return Ok(());
        };
        let kernel = window.kernel.as_deref().unwrap_or_default();
        let Sliding { input, kernel, strides, begin, output, .. } = window.over(&spatial, kernel)?;
        if window.dilations.iter().any(|&d| d != 1) {
            return Err(Error::unsupported_attribute(
                "attribute dilations is not 1; windows without gaps can be computed",
            ));
        }
        let (whole, out_pixels) = (kernel.iter().product::<usize>(), output.iter().product::<usize>());
        let range = |axis: usize, o: usize| taps(o, strides[axis], begin[axis], kernel[axis], input[axis]);
        for b in 0..batch {
            for c in 0..channels {
                for o in 0..out_pixels {
                    let [od, oh, ow] = [o / (output[1] * output[2]), o / output[2] % output[1], o % output[2]];
                    // In this order and in f32, as onnxruntime: where scales are equal many means are halves, and the
                    // rounding of the sum decides which way they go.
                    let mut sum = 0f32;
                    for d in range(0, od) {
                        for h in range(1, oh) {
                            for w in range(2, ow) {
                                let pixel = (d * input[1] + h) * input[2] + w;
                                sum += x_scale * (q.get(place(b, c, pixel, pixels)) - x_zero) as f32;
                            }
                        }
                    }
                    let inside = range(0, od).len() * range(1, oh).len() * range(2, ow).len();
                    let mean = sum / if self.include_pad { whole } else { inside.max(1) } as f32;
                    let v = (mean / y_scale + y_zero as f32).round_ties_even() as i32;
                    y[place(b, c, o, out_pixels)] = v.clamp(lo, hi) as u8;
                }
            }
        }
        Ok(())
    }

    fn channels_last(&self, operands: &[Option<&Fact>]) -> Option<Permuted> {
        let op = QLinearPool { layout: Layout::Nhwc, ..self.clone() };
        let mut roles = vec![Role::Keep; operands.len()];
        *roles.first_mut()? = Role::Permute;
        (self.layout == Layout::Nchw).then(|| Permuted { op: op.into(), roles })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    fn operands(dims: &[usize], x: &[u8], scales: [f32; 2]) -> Vec<Tensor> {
        let zero = |v: u8| Tensor::from_slice(&[], &[v]).unwrap();
        let one = |v: f32| f32s(&[], &[v]);
        vec![Tensor::from_slice(dims, x).unwrap(), one(scales[0]), zero(1), one(scales[1]), zero(3)]
    }

    #[test]
    fn means_by_hand() {
        let node = || OneNode::new("QLinearAveragePool").domain("com.microsoft").ints("kernel_shape", &[2]);
        let run =
            |node: OneNode, operands: &[Tensor]| node.run(operands).unwrap()[0].as_slice::<u8>().unwrap().to_vec();
        let x = operands(&[1, 1, 3], &[1, 4, 11], [1.0, 0.5]);
        assert_eq!(run(node(), &x), [6, 16]);
        assert_eq!(run(node().ints("pads", &[1, 0]), &x), [3, 6, 16]);
        assert_eq!(run(node().ints("pads", &[1, 0]).int("count_include_pad", 1), &x), [3, 6, 16]);
        let x = operands(&[1, 2, 2], &[1, 2, 9, 4], [1.0, 1.0]);
        assert_eq!(run(node().int("channels_last", 1), &x), [7, 5]);
        let global =
            |last: i64| OneNode::new("QLinearGlobalAveragePool").domain("com.microsoft").int("channels_last", last);
        assert_eq!(run(global(0), &x), [3, 9], "0.5 goes to 0 and 5.5 to 6 before the zero point");
        assert_eq!(run(global(1), &x), [7, 5]);
    }

    #[test]
    fn mistakes_are_named() {
        let node = || OneNode::new("QLinearGlobalAveragePool").domain("com.microsoft");
        let e = node().run(&operands(&[1, 1, 2], &[1, 2], [0.0, 1.0])).unwrap_err();
        assert!(e.message.contains("x_scale"), "{e}");
        assert!(node().run(&operands(&[1, 1, 0], &[], [1.0, 1.0])).unwrap_err().message.contains("no mean"));
        let e = OneNode::new("QLinearAveragePool").domain("com.microsoft").run(&operands(&[1, 1, 1], &[1], [1.0; 2]));
        assert!(e.unwrap_err().message.contains("kernel_shape"));
    }
}
