//! OneHot: indices as vectors with one marked element.

use super::sizes::{check_movable, element_size};
use super::{Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, axis_index};
use crate::for_dtype;
use crate::tensor::TensorView;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("OneHot", 9, |a| Ok(Op::from(OneHot { axis: a.int_or("axis", -1)? })))];

/// Operands: indices, depth, `[off, on]`. An index outside of `-depth..depth` marks nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct OneHot {
    /// Where the new axis goes, in `-rank - 1..=rank` of the indices.
    pub axis: i64,
}

fn whole_numbers(v: TensorView) -> Result<Vec<i64>> {
    for_dtype!(v.dtype, [F32, F64, I8, U8, I16, U16, I32, U32, I64, U64], T => {
        Ok(v.as_slice::<T>()?.iter().map(|x| x.to_f64() as i64).collect())
    }, else Err(wrong_dtype("indices or depth", v.dtype, "numbers")))
}

impl Operator for OneHot {
    fn name(&self) -> &'static str {
        "OneHot"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (indices, depth, values) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        check_movable(values.dtype)?;
        if values.dims().is_some_and(|d| d.as_slice() != [2]) {
            return Err(Error::shape(format!("values have shape {}; [2] was wanted", values.shape_text())));
        }
        let Some(shape) = &indices.shape else { return cx.results(vec![Fact::of_dtype(values.dtype)]) };
        let axis = axis_index(self.axis, shape.len() + 1)?;
        let size = match depth.tensor() {
            Some(t) => match whole_numbers(t.view())?.as_slice() {
                &[n] if n > 0 => Dim::Known(n as usize),
                other => {
                    return Err(Error::invalid_input(format!("depth is {other:?}; one positive number was wanted")));
                }
            },
            None => depth.sizes().and_then(|s| s.first().cloned()).unwrap_or(Dim::Unknown),
        };
        let mut out = shape.clone();
        out.insert(axis, size);
        cx.results(vec![Fact::with_shape(values.dtype, out)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (indices, values) = (io.input(0)?, io.input(2)?);
        let list = whole_numbers(indices)?;
        let y = io.output(0)?;
        let axis = axis_index(self.axis, y.dims.len())?;
        let [_, depth, inner] = super::reduce::around(y.dims, axis);
        // The place in the result of the mark of index number i.
        let place = |i: usize| {
            let at = weblane_kernels::movement::normalize(list[i], depth)?;
            Some((i / inner * depth + at) * inner + i % inner)
        };
        if let (Some([off, on]), Some(y)) = (values.strings(), y.strings()) {
            y.fill(off.clone());
            (0..list.len()).filter_map(place).for_each(|p| y[p].clone_from(on));
            return Ok(());
        }
        let size = element_size(values.dtype)?;
        let (off, on) = values.bytes().split_at(size);
        let y = y.bytes();
        y.chunks_exact_mut(size).for_each(|y| y.copy_from_slice(off));
        (0..list.len()).filter_map(place).for_each(|p| y[p * size..][..size].copy_from_slice(on));
        Ok(())
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn marks() {
        let inputs = [i64s(&[3], &[0, -1, 5]), i64s(&[], &[3]), f32s(&[2], &[2.0, 5.0])];
        let y = OneNode::new("OneHot").run(&inputs).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [5.0, 2.0, 2.0, 2.0, 2.0, 5.0, 2.0, 2.0, 2.0]);
        let y = OneNode::new("OneHot").int("axis", 0).run(&inputs).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [5.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 5.0, 2.0]);
        let e = OneNode::new("OneHot").run(&[inputs[0].clone(), i64s(&[], &[0]), inputs[2].clone()]).unwrap_err();
        assert!(e.message.contains("positive"), "{e}");
    }

    #[test]
    fn symbolic_depth() {
        let i = Fact::with_shape(DType::I64, [Dim::Symbol("n".into())].into_iter().collect());
        let y = OneNode::new("OneHot")
            .infer(&[Some(i), Some(Fact::new(DType::I64, &[])), Some(Fact::new(DType::F32, &[2]))])
            .unwrap();
        assert_eq!(y[0].shape_text(), "[n, ?]");
    }
}
