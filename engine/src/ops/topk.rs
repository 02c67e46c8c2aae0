//! TopK.

use super::non_zero::sort_keys;
use super::sizes::{Ints, ints};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, axis_index};
use crate::tensor::DType;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("TopK", 1, TopK::parse)];

/// The largest or smallest elements along an axis, and where they were; of equal ones the first.
#[derive(Clone, Debug, PartialEq)]
pub struct TopK {
    axis: i64,
    largest: bool,
    /// How many, when it stands in the node (up to opset 9).
    k: Option<i64>,
}

impl TopK {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let (axis, largest, k) = (a.int_or("axis", -1)?, a.flag_or("largest", true)?, a.int("k")?);
        // Without it any order will do, and the sorted one is one of them.
        a.flag_or("sorted", true)?;
        Ok(TopK { axis, largest, k }.into())
    }
}

impl Operator for TopK {
    fn name(&self) -> &'static str {
        "TopK"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if matches!(x.dtype, DType::Bool | DType::String) || x.dtype.bits() < 8 {
            return Err(wrong_dtype("the operand", x.dtype, "numbers"));
        }
        let k = match (self.k, ints(cx.optional(1), "the number of elements")?) {
            (Some(k), _) => Some(k),
            (None, Ints::Known(v)) => match v[..] {
                [k] => Some(k),
                _ => return Err(Error::shape(format!("{} numbers of elements; one was wanted", v.len()))),
            },
            (None, Ints::Computed(_)) => None,
            (None, Ints::Absent) => return Err(Error::invalid_model("the number of elements is missing")),
        };
        let shape = match &x.shape {
            None => None,
            Some(s) => {
                let axis = axis_index(self.axis, s.len())?;
                let mut out = s.clone();
                out[axis] = match k {
                    None => Dim::Unknown,
                    Some(k) => {
                        let n = usize::try_from(k).ok().filter(|&n| s[axis].known().is_none_or(|len| n <= len));
                        let len = &s[axis];
                        Dim::Known(n.ok_or_else(|| Error::invalid_input(format!("the top {k} of {len} elements")))?)
                    }
                };
                Some(out)
            }
        };
        let fact = |dtype| Fact { dtype, shape: shape.clone(), content: Default::default() };
        cx.results(vec![fact(x.dtype), fact(DType::I64)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let axis = axis_index(self.axis, x.rank())?;
        let k = io.output(0)?.dims[axis];
        let (len, inner) = (x.dims[axis], x.dims[axis + 1..].iter().product::<usize>());
        if k == 0 || io.output(0)?.is_empty() {
            return Ok(());
        }
        let keys = sort_keys(x)?;
        let size = x.bytes().len() / x.len();
        let mut order: Vec<(u64, usize)> = Vec::with_capacity(len);
        for row in 0..x.len() / len {
            let base = row / inner * len * inner + row % inner;
            order.clear();
            let flip = if self.largest { u64::MAX } else { 0 };
            order.extend((0..len).map(|i| (keys[base + i * inner] ^ flip, i)));
            if k < len {
                order.select_nth_unstable(k - 1);
            }
            let top = &mut order[..k];
            top.sort_unstable();
            let to = row / inner * k * inner + row % inner;
            for (j, &(_, i)) in top.iter().enumerate() {
                let (from, to) = (base + i * inner, to + j * inner);
                io.output(0)?.bytes()[to * size..][..size].copy_from_slice(&x.bytes()[from * size..][..size]);
                if let Some(indices) = io.outputs.get_mut(1) {
                    indices.as_slice::<i64>()?[to] = i as i64;
                }
            }
        }
        Ok(())
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn along_any_axis() {
        let x = || f32s(&[2, 3], &[1.0, 9.0, 9.0, -2.0, 0.0, -5.0]);
        let y = OneNode::new("TopK").outputs(2).run(&[x(), i64s(&[1], &[2])]).unwrap();
        assert_eq!(y[0], f32s(&[2, 2], &[9.0, 9.0, 0.0, -2.0]));
        assert_eq!(y[1], i64s(&[2, 2], &[1, 2, 1, 0]));
        let node = OneNode::new("TopK").outputs(2).int("largest", 0).int("axis", 0);
        let y = node.run(&[x(), i64s(&[1], &[1])]).unwrap();
        assert_eq!((&y[0], &y[1]), (&f32s(&[1, 3], &[-2.0, 0.0, -5.0]), &i64s(&[1, 3], &[1, 1, 1])));
        let y = OneNode::new("TopK").opset(9).outputs(2).int("k", 1).run(&[x()]).unwrap();
        assert_eq!(y[1], i64s(&[2, 1], &[1, 1]));
        assert!(OneNode::new("TopK").outputs(2).run(&[x(), i64s(&[1], &[4])]).is_err());
        assert!(OneNode::new("TopK").outputs(2).run(&[x(), i64s(&[1], &[-1])]).is_err());
    }
}
