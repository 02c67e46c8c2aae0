//! DepthToSpace and SpaceToDepth: blocks of pixels become channels, or channels become blocks.

use super::sizes::{check_movable, copy_axes, strides};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use smallvec::SmallVec;
use weblane_kernels::conv::Layout;
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("DepthToSpace", 1, parse), Registration::onnx("SpaceToDepth", 1, parse)];

/// On `[batch, channels, spatial...]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Whether channels become pixels.
    pub to_space: bool,
    /// Length of a block along each spatial axis.
    pub size: usize,
    /// Whether the channel varies slowest in the deep tensor's channels (`CRD`), the place in the block fastest.
    pub channel_first: bool,
    /// Of the operand and the result.
    pub layout: Layout,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let size = a.required("blocksize", Attributes::int)?;
    let size = usize::try_from(size).ok().filter(|&n| n > 0 && n < 1 << 20);
    Ok(Blocks {
        to_space: a.op_type() == "DepthToSpace",
        size: size.ok_or_else(|| Error::unsupported_attribute("attribute blocksize must be at least 1"))?,
        channel_first: a.choice("mode", &[("DCR", false), ("CRD", true)])?,
        layout: Layout::Nchw,
    }
    .into())
}

impl Blocks {
    /// The axis of channels, and the spatial axes.
    fn axes(&self, rank: usize) -> (usize, std::ops::Range<usize>) {
        match self.layout {
            Layout::Nchw => (1, 2..rank),
            Layout::Nhwc => (rank - 1, 1..rank - 1),
        }
    }

    /// Elements of a block over `spatial` axes.
    fn block(&self, spatial: usize) -> Result<usize> {
        u32::try_from(spatial)
            .ok()
            .and_then(|s| self.size.checked_pow(s))
            .ok_or_else(|| Error::limit(format!("blocks of {} along {spatial} axes", self.size)))
    }
}

impl Operator for Blocks {
    fn name(&self) -> &'static str {
        if self.to_space { "DepthToSpace" } else { "SpaceToDepth" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_movable(x.dtype)?;
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        if shape.len() < 2 {
            return Err(Error::shape(format!("the operand is {}; batch and channels were wanted", x.shape_text())));
        }
        let (channels, spatial) = self.axes(shape.len());
        let block = self.block(spatial.len())?;
        let times = |d: &Dim, n: usize| match d.known() {
            Some(d) => d.checked_mul(n).map(Dim::Known).ok_or_else(|| Error::limit("a size overflows")),
            None => Ok(Dim::Unknown),
        };
        let part = |d: &Dim, n: usize| match d.known() {
            Some(d) if d % n == 0 => Ok(Dim::Known(d / n)),
            Some(d) => Err(Error::shape(format!("{d} of {} is not a multiple of {n}", x.shape_text()))),
            None => Ok(Dim::Unknown),
        };
        let mut out = shape.clone();
        let deep = &shape[channels];
        out[channels] = if self.to_space { part(deep, block)? } else { times(deep, block)? };
        for (to, from) in out[spatial.clone()].iter_mut().zip(&shape[spatial]) {
            *to = if self.to_space { times(from, self.size)? } else { part(from, self.size)? };
        }
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let y = io.output(0)?;
        let (x_dims, y_dims) = (x.dims, y.dims);
        let (deep, wide) = if self.to_space { (x_dims, y_dims) } else { (y_dims, x_dims) };
        let (in_deep, in_wide) = (strides(deep), strides(wide));
        let (c, spatial) = self.axes(wide.len());
        let (channels, block) = (wide[c], self.block(spatial.len())?);
        // Each axis by its strides in the deep and in the wide tensor.
        let mut axes: SmallVec<[(usize, usize, usize); 12]> = SmallVec::new();
        axes.push((wide[0], in_deep[0], in_wide[0]));
        let channel = if self.channel_first { block } else { 1 };
        axes.push((channels, channel * in_deep[c], in_wide[c]));
        let mut step = if self.channel_first { 1 } else { channels };
        for a in spatial.rev() {
            axes.push((self.size, step * in_deep[c], in_wide[a]));
            axes.push((deep[a], in_deep[a], self.size * in_wide[a]));
            step *= self.size;
        }
        let axis = |&(len, deep, wide): &(usize, usize, usize)| match self.to_space {
            true => Axis { len, src: deep as isize, dst: wide },
            false => Axis { len, src: wide as isize, dst: deep },
        };
        let axes: SmallVec<[Axis; 12]> = axes.iter().map(axis).collect();
        copy_axes(cx, &axes, x, 0, y, 0)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn permuted(&self, perm: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        let last =
            self.layout == Layout::Nchw && perm.iter().copied().eq(std::iter::once(0).chain(2..perm.len()).chain([1]));
        let op = Blocks { layout: Layout::Nhwc, ..self.clone() }.into();
        last.then(|| Permuted { op, roles: vec![Role::Permute] })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::onnx::AttributeValue;
    use crate::optimize::testing::{Net, int, ints};

    #[test]
    fn both_modes_and_back() {
        let ramp: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let x = f32s(&[1, 8, 1, 1], &ramp);
        for (mode, want) in
            [("DCR", [0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0]), ("CRD", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])]
        {
            let node = OneNode::new("DepthToSpace").int("blocksize", 2).string("mode", mode);
            let y = node.run(std::slice::from_ref(&x)).unwrap();
            assert_eq!(y[0].dims(), [1, 2, 2, 2]);
            assert_eq!(y[0].as_slice::<f32>().unwrap(), want);
            let back = OneNode::new("SpaceToDepth").opset(28).int("blocksize", 2).string("mode", mode);
            assert_eq!(back.run(&y).unwrap()[0], x);
        }
        let e = OneNode::new("DepthToSpace").int("blocksize", 3).run(&[x]).unwrap_err();
        assert!(e.message.contains("multiple of 9"), "{e}");
    }

    #[test]
    fn follows_channels_last() {
        for (mode, deeper) in [("DCR", false), ("CRD", false), ("DCR", true), ("CRD", true)] {
            let mut n = Net::new(28);
            let x = n.input("x", &[2, 8, 6, 4]);
            let window = [("kernel_shape", ints(&[1, 3])), ("pads", ints(&[0, 1, 0, 1]))];
            let y = n.op_with("MaxPool", &[x], &window);
            let attrs = [("blocksize", int(2)), ("mode", AttributeValue::String(mode.into()))];
            let y = n.op_with(if deeper { "SpaceToDepth" } else { "DepthToSpace" }, &[y], &attrs);
            let y = n.op_with("MaxPool", &[y], &window);
            n.output(y);
            let name = if deeper { "SpaceToDepth" } else { "DepthToSpace" };
            assert_eq!(n.optimized(), ["Transpose", "MaxPool", name, "MaxPool", "Transpose"]);
        }
    }
}
