//! Where.

use super::sizes::{broadcast_strides, check_movable, element_size, kernel_error, loose_sizes, sizes_fact};
use super::{Infer, Io, Operator, Permuted, Registration};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, broadcast};
use crate::tensor::DType;
use weblane_kernels::movement;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Where", 9, |_| Ok(Where.into()))];

/// `condition ? a : b`, element by element, with broadcasting.
#[derive(Clone, Debug, PartialEq)]
pub struct Where;

impl Operator for Where {
    fn name(&self) -> &'static str {
        "Where"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (c, a, b) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        check_movable(a.dtype)?;
        if c.dtype != DType::Bool || a.dtype != b.dtype {
            return Err(Error::dtype(format!(
                "{} ? {} : {}; bool and twice the same type were wanted",
                c.dtype, a.dtype, b.dtype
            )));
        }
        let (Some(p), Some(q), Some(r)) = (&c.shape, &a.shape, &b.shape) else {
            return cx.results(vec![Fact::of_dtype(a.dtype)]);
        };
        let shape = broadcast(&broadcast(p, q)?, r)?;
        // Exporters spell "this size, or 1 where it is -1" this way before an Expand.
        if let (Some(c), Some(x), Some(y)) = (c.tensor(), loose_sizes(a), loose_sizes(b))
            && let [Dim::Known(n)] = shape[..]
            && n <= 64
        {
            let c = c.as_slice::<u8>()?;
            let at = |s: &Shape, i: usize| s.get(if s.len() == 1 { 0 } else { i }).cloned().unwrap_or(Dim::Unknown);
            let chosen = |i: usize| {
                let condition = c.get(if c.len() == 1 { 0 } else { i }).copied().unwrap_or(0);
                if condition != 0 { at(&x, i) } else { at(&y, i) }
            };
            return cx.results(vec![sizes_fact(a.dtype, (0..n).map(chosen).collect(), 1)]);
        }
        cx.results(vec![Fact::with_shape(a.dtype, shape)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (c, a, b) = (io.input(0)?, io.input(1)?, io.input(2)?);
        let y = io.output(0)?;
        let [cs, xs, ys] = [c, a, b].map(|v| broadcast_strides(v.dims, y.dims));
        if let (Some(p), Some(q)) = (a.strings(), b.strings()) {
            let dims = y.dims;
            for (i, to) in y.strings().into_iter().flatten().enumerate() {
                let at = |s: &[usize]| offset(i, dims, s);
                to.clone_from(if c.bytes()[at(&cs)] != 0 { &p[at(&xs)] } else { &q[at(&ys)] });
            }
            return Ok(());
        }
        let element = element_size(a.dtype)?;
        let (c, a, b) = ((c.bytes(), &cs[..]), (a.bytes(), &xs[..]), (b.bytes(), &ys[..]));
        movement::select(cx, element, y.dims, c, a, b, y.bytes()).map_err(kernel_error)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 3)
    }
}

/// Place in an operand with these strides of the `i`-th element of a result of shape `dims`.
fn offset(mut i: usize, dims: &[usize], strides: &[usize]) -> usize {
    let mut at = 0;
    for (d, s) in dims.iter().zip(strides).rev() {
        at += i % d * s;
        i /= d;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::fact::Content;
    use crate::tensor::Tensor;
    use std::sync::Arc;

    #[test]
    fn selects_with_broadcasting() {
        let c = Tensor::from_bools(&[2, 1], &[true, false]).unwrap();
        let y = OneNode::new("Where").run(&[c.clone(), f32s(&[3], &[1.0, 2.0, 3.0]), f32s(&[], &[9.0])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 3], &[1.0, 2.0, 3.0, 9.0, 9.0, 9.0]));
        assert!(OneNode::new("Where").run(&[c.clone(), f32s(&[1], &[1.0]), i64s(&[1], &[1])]).is_err());
        assert!(OneNode::new("Where").run(&[c, f32s(&[3, 1], &[1.0; 3]), f32s(&[], &[1.0])]).is_err());
    }

    #[test]
    fn sizes_are_chosen_one_by_one() {
        let n = Dim::Symbol("n".into());
        let c = Fact::constant(Arc::new(Tensor::from_bools(&[2], &[true, false]).unwrap()));
        let sizes = sizes_fact(DType::I64, [Dim::Known(3), n.clone()].into_iter().collect(), 1);
        let ones = Fact::constant(Arc::new(i64s(&[2], &[1, 1])));
        let out = OneNode::new("Where").infer(&[Some(c), Some(ones), Some(sizes)]).unwrap();
        assert!(matches!(&out[0].content, Content::Dims(d) if d[..] == [Dim::Known(1), n]));
    }
}
