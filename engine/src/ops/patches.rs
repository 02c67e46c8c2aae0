//! Col2Im, MaxUnpool and DeformConv.

use super::spatial::{Window, split_dims};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::for_dtype;
use crate::tensor::{DType, Dims, element_count};
use weblane_kernels::conv::Layout;
use weblane_kernels::deform;
use weblane_kernels::par::Cx;
use weblane_kernels::patches::{PatchAxis, col2im, scatter_maxima};
use weblane_kernels::sampling::{DeformConv as Sizes, deform_conv};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("Col2Im", 18, parse_col2im),
    Registration::onnx("MaxUnpool", 9, parse_unpool),
    Registration::onnx("DeformConv", 19, parse_deform),
];

/// Adds columns back to images. Operands: `[batch, channels * block, windows]`, sizes of the image, sizes of the block.
#[derive(Clone, Debug, PartialEq)]
pub struct Col2Im {
    /// Strides, dilations and padding.
    pub window: Window,
}

fn parse_col2im(a: &mut Attributes) -> Result<Op> {
    Ok(Col2Im { window: Window::parse(a)? }.into())
}

impl Col2Im {
    fn axes(&self, image: &[usize], block: &[usize]) -> Result<Vec<PatchAxis>> {
        let rank = image.len();
        if rank != block.len() {
            return Err(Error::shape(format!("an image of shape {image:?} with blocks of shape {block:?}")));
        }
        let list = |list: &[usize], name: &str, want: usize| match list.len() {
            0 => Ok(()),
            n if n == want => Ok(()),
            n => Err(Error::invalid_model(format!("attribute {name} has {n} numbers; {want} were wanted"))),
        };
        list(&self.window.strides, "strides", rank)?;
        list(&self.window.dilations, "dilations", rank)?;
        list(&self.window.pads, "pads", 2 * rank)?;
        let at = |list: &[usize], i: usize, default| list.get(i).copied().unwrap_or(default);
        let axis = |i: usize| {
            let (stride, dilation) = (at(&self.window.strides, i, 1), at(&self.window.dilations, i, 1));
            let (begin, end) = (at(&self.window.pads, i, 0), at(&self.window.pads, rank + i, 0));
            let span = block[i].checked_sub(1).and_then(|b| b.checked_mul(dilation)).and_then(|s| s.checked_add(1));
            let padded = image[i].checked_add(begin).and_then(|n| n.checked_add(end));
            let room = padded.zip(span).and_then(|(p, s)| p.checked_sub(s));
            let room = room.ok_or_else(|| Error::shape(format!("blocks of {block:?} do not fit into {image:?}")))?;
            Ok(PatchAxis { image: image[i], block: block[i], windows: room / stride + 1, stride, dilation, begin })
        };
        (0..rank).map(axis).collect()
    }
}

fn known(shape: &Shape) -> Option<Dims> {
    shape.iter().map(Dim::known).collect()
}

impl Operator for Col2Im {
    fn name(&self) -> &'static str {
        "Col2Im"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let image = cx.input(1)?.sizes();
        let block = cx.input(2)?.sizes().and_then(|b| known(&b));
        let Some(image) = image else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let (batch, columns) = match x.shape.as_deref() {
            Some([n, c, _]) => (n.clone(), c.clone()),
            None => (Dim::Unknown, Dim::Unknown),
            _ => return Err(Error::shape(format!("the operand is {}; rank 3 was wanted", x.shape_text()))),
        };
        let mut channels = Dim::Unknown;
        if let (Some(c), Some(block)) = (columns.known(), &block) {
            let size = element_count(block)?;
            if size == 0 || c % size != 0 {
                return Err(Error::shape(format!("{c} rows are no multiple of blocks of shape {block:?}")));
            }
            channels = Dim::Known(c / size);
        }
        if let (Some(block), Some(sizes)) = (&block, known(&image)) {
            let windows: usize = self.axes(&sizes, block)?.iter().map(|a| a.windows).product();
            if let Some(dims) = x.dims().filter(|d| d[2] != windows) {
                return Err(Error::shape(format!("the operand is of shape {dims:?}; {windows} columns were wanted")));
            }
        }
        let shape = [batch, channels].into_iter().chain(image).collect();
        cx.results(vec![Fact::with_shape(x.dtype, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let block = io.input(2)?.to_i64s()?;
        let block: Vec<usize> = block.iter().map(|&b| usize::try_from(b).unwrap_or(0)).collect();
        let y = io.output(0)?;
        let axes = self.axes(&y.dims[2..], &block)?;
        let planes = y.dims[0] * y.dims[1];
        for_dtype!(x.dtype, [F32, F64, I32, I64], T => {
            col2im(x.as_slice::<T>()?, planes, &axes, y.as_slice::<T>()?);
            Ok(())
        }, else Err(wrong_dtype("the operand", x.dtype, "float32, float64, int32 and int64")))
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1, 2]
    }
}

/// Puts the maxima of a pooling back. Operands: x, their indices, optional shape of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct MaxUnpool {
    /// Window, strides and padding of the pooling.
    pub window: Window,
}

fn parse_unpool(a: &mut Attributes) -> Result<Op> {
    let window = Window::parse(a)?;
    if window.kernel.is_none() {
        return Err(Error::invalid_model("attribute kernel_shape is missing"));
    }
    Ok(MaxUnpool { window }.into())
}

impl MaxUnpool {
    /// The shape that the indices count in.
    fn default_shape(&self, dims: &[usize]) -> Result<Dims> {
        let (batch, channels, spatial) = split_dims(dims, Layout::Nchw)?;
        let rank = spatial.len();
        self.window.check_rank(rank)?;
        let mut shape: Dims = [batch, channels].into_iter().collect();
        for (i, &n) in spatial.iter().enumerate() {
            let at = |list: &[usize], i: usize, default| list.get(i).copied().unwrap_or(default);
            let kernel = self.window.kernel.as_ref().map_or(1, |k| at(k, i, 1));
            let pads = at(&self.window.pads, i, 0) + at(&self.window.pads, rank + i, 0);
            let full =
                n.saturating_sub(1).checked_mul(at(&self.window.strides, i, 1)).and_then(|v| v.checked_add(kernel));
            let size = full.and_then(|f| f.checked_sub(pads));
            shape
                .push(size.ok_or_else(|| Error::shape(format!("padding {pads} leaves nothing along axis {}", i + 2)))?);
        }
        Ok(shape)
    }
}

impl Operator for MaxUnpool {
    fn name(&self) -> &'static str {
        "MaxUnpool"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, indices) = (cx.input(0)?, cx.input(1)?);
        if let (Some(a), Some(b)) = (x.dims(), indices.dims())
            && a != b
        {
            return Err(Error::shape(format!("x is of shape {a:?}, the indices {b:?}")));
        }
        let rank = x.rank();
        let unknown = || rank.map_or(Fact::of_dtype(x.dtype), |r| Fact::of_rank(x.dtype, r));
        let Some(dims) = x.dims() else { return cx.results(vec![unknown()]) };
        let default = self.default_shape(&dims)?;
        let Some(said) = cx.optional(2) else { return cx.results(vec![Fact::new(x.dtype, &default)]) };
        let Some(shape) = said.sizes() else { return cx.results(vec![unknown()]) };
        if let Some(want) = known(&shape)
            && (want.len() != default.len() || want.iter().zip(&default).any(|(w, d)| w < d))
        {
            return Err(Error::shape(format!("operand 2 asks for shape {want:?}; at least {default:?} was wanted")));
        }
        cx.results(vec![Fact::with_shape(x.dtype, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let indices = io.slice::<i64>(1)?;
        let default = self.default_shape(x.dims)?;
        let y = io.output(0)?;
        let shape: Dims = y.dims.into();
        for_dtype!(x.dtype, [F32, F64, I8, U8], T => {
            let x = x.as_slice::<T>()?;
            let y = y.as_slice::<T>()?;
            let outside = || Error::invalid_input("an index lies outside of the result");
            if shape == default {
                return if scatter_maxima(x, indices, y) { Ok(()) } else { Err(outside()) };
            }
            // A larger result has the default one in its first corner.
            let mut small = vec![T::default(); element_count(&default)?];
            if !scatter_maxima(x, indices, &mut small) {
                return Err(outside());
            }
            y.fill(T::default());
            for (i, v) in small.into_iter().enumerate() {
                let (mut rest, mut at, mut step) = (i, 0, 1);
                for (d, s) in default.iter().zip(&shape).rev() {
                    at += rest % d * step;
                    rest /= d;
                    step *= s;
                }
                y[at] = v;
            }
            Ok(())
        }, else Err(wrong_dtype("x", x.dtype, "float32, float64, int8 and uint8")))
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[2]
    }
}

/// Deformable convolution over two axes. Operands: x, weights, offsets, optional bias and mask.
#[derive(Clone, Debug, PartialEq)]
pub struct DeformConv {
    /// Strides, dilations and padding.
    pub window: Window,
    /// Groups of channels.
    pub groups: usize,
    /// Groups of channels that share offsets.
    pub offset_groups: usize,
}

fn parse_deform(a: &mut Attributes) -> Result<Op> {
    let mut count = |name: &str| {
        let n = a.int_or(name, 1)?;
        let fits = usize::try_from(n).ok().filter(|n| (1..1 << 24).contains(n));
        fits.ok_or_else(|| Error::unsupported_attribute(format!("attribute {name} is {n}; at least 1 was wanted")))
    };
    let (groups, offset_groups) = (count("group")?, count("offset_group")?);
    Ok(DeformConv { window: Window::parse(a)?, groups, offset_groups }.into())
}

impl DeformConv {
    fn sizes(&self, x: &[usize], w: &[usize]) -> Result<Sizes> {
        let (&[n, c, h, wd], &[oc, per_group, kh, kw]) = (x, w) else {
            return Err(Error::shape(format!("x is of shape {x:?}, the weights {w:?}; rank 4 can be computed")));
        };
        let s = self.window.over(&[h, wd], &[kh, kw])?;
        if per_group.checked_mul(self.groups) != Some(c) || oc % self.groups != 0 || c % self.offset_groups != 0 {
            return Err(Error::shape(format!(
                "{c} channels, weights {w:?}, {} groups and {} groups of offsets do not fit",
                self.groups, self.offset_groups
            )));
        }
        let last = |v: [usize; 3]| [v[1], v[2]];
        Ok(Sizes {
            x: [n, c, h, wd],
            w: [oc, per_group, kh, kw],
            output: last(s.output),
            groups: self.groups,
            offset_groups: self.offset_groups,
            strides: last(s.strides),
            dilations: last(s.dilations),
            begin: last(s.begin),
        })
    }
}

impl Operator for DeformConv {
    fn name(&self) -> &'static str {
        "DeformConv"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, w) = (cx.input(0)?, cx.input(1)?);
        let (Some(xd), Some(wd)) = (x.dims(), w.dims()) else {
            return cx.results(vec![Fact::of_rank(x.dtype, 4)]);
        };
        let s = self.sizes(&xd, &wd)?;
        let taps = s.w[2] * s.w[3] * self.offset_groups;
        let plane = [s.output[0], s.output[1]];
        let wanted = [
            (2, [s.x[0], 2 * taps, plane[0], plane[1]].to_vec()),
            (3, [s.w[0]].to_vec()),
            (4, [s.x[0], taps, plane[0], plane[1]].to_vec()),
        ];
        for (i, want) in wanted {
            if let Some(dims) = cx.optional(i).and_then(Fact::dims).filter(|d| d.as_slice() != want) {
                return Err(Error::shape(format!("operand {i} is of shape {dims:?}; {want:?} was wanted")));
            }
        }
        cx.results(vec![Fact::new(x.dtype, &[s.x[0], s.w[0], plane[0], plane[1]])])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (x, w, offset) = (io.input(0)?, io.input(1)?, io.input(2)?);
        let s = self.sizes(x.dims, w.dims)?;
        let (bias, mask) = (io.optional(3), io.optional(4));
        match x.dtype {
            DType::F32 => {
                let bias = bias.map(|b| b.as_slice()).transpose()?;
                let mask = mask.map(|m| m.as_slice()).transpose()?;
                let y = io.output(0)?.as_slice()?;
                Ok(deform::deform_conv(cx, &s, x.as_slice()?, w.as_slice()?, offset.as_slice()?, bias, mask, y)?)
            }
            DType::F64 => {
                let bias = bias.map(|b| b.as_slice::<f64>()).transpose()?;
                let mask = mask.map(|m| m.as_slice::<f64>()).transpose()?;
                let y = io.output(0)?.as_slice()?;
                deform_conv(&s, x.as_slice()?, w.as_slice()?, offset.as_slice()?, bias, mask, y);
                Ok(())
            }
            other => Err(wrong_dtype("x", other, "float32 and float64")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn columns_become_images() {
        let x = f32s(&[1, 2, 2], &[1.0, 2.0, 10.0, 20.0]);
        let y = OneNode::new("Col2Im").run(&[x.clone(), i64s(&[1], &[3]), i64s(&[1], &[2])]).unwrap();
        assert_eq!(y[0].dims(), [1, 1, 3]);
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [1.0, 12.0, 20.0]);
        let e = OneNode::new("Col2Im").run(&[x, i64s(&[1], &[4]), i64s(&[1], &[2])]).unwrap_err();
        assert!(e.message.contains("3 columns were wanted"), "{e}");
    }

    #[test]
    fn maxima_go_back() {
        let inputs = [f32s(&[1, 1, 1], &[5.0]), i64s(&[1, 1, 1], &[1])];
        let node = || OneNode::new("MaxUnpool").ints("kernel_shape", &[2]).ints("strides", &[2]);
        assert_eq!(node().run(&inputs).unwrap()[0].as_slice::<f32>().unwrap(), [0.0, 5.0]);
        let [x, i] = inputs;
        let y = node().run(&[x.clone(), i, i64s(&[3], &[1, 1, 3])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [0.0, 5.0, 0.0]);
        assert!(node().run(&[x, i64s(&[1, 1, 1], &[2])]).is_err());
    }

    #[test]
    fn no_offset_is_a_convolution() {
        let x = f32s(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let inputs = [x, f32s(&[1, 1, 2, 2], &[1.0; 4]), f32s(&[1, 8, 1, 1], &[0.0; 8])];
        assert_eq!(OneNode::new("DeformConv").run(&inputs).unwrap()[0].as_slice::<f32>().unwrap(), [10.0]);
    }
}
