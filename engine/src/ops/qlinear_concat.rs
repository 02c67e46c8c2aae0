//! QLinearConcat of onnxruntime: quantised tensors one behind the other, brought to one scale and zero point.

use super::concat::Concat;
use super::qparams::{Count, check_byte, infer_scale, infer_zero, look_up, scale, table, zero};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Fact, axis_index};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("QLinearConcat", parse)];

/// Operands: scale and zero point of the result, then for each part the tensor, its scale and its zero point.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearConcat {
    /// In `-rank..rank`.
    pub axis: i64,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    Ok(QLinearConcat { axis: a.required("axis", Attributes::int)? }.into())
}

/// How many parts so many operands are.
fn parts(operands: usize) -> Result<usize> {
    match operands.checked_sub(2) {
        Some(n) if n > 0 && n % 3 == 0 => Ok(n / 3),
        _ => Err(Error::invalid_model(format!(
            "{operands} operands; scale and zero point, then three for each part were wanted"
        ))),
    }
}

impl Operator for QLinearConcat {
    fn name(&self) -> &'static str {
        "com.microsoft.QLinearConcat"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let dtype = cx.input(1)?.dtype;
        check_byte("Y_zero_point", dtype)?;
        infer_scale(cx, 0, "Y_scale", Count::One)?;
        infer_zero(cx, 1, "Y_zero_point", dtype, Count::One)?;
        let mut inputs = Vec::new();
        for i in 0..parts(cx.inputs.len())? {
            let x = cx.input(2 + 3 * i)?;
            if x.dtype != dtype {
                return Err(Error::dtype(format!("part {i} is {}, the result {dtype}", x.dtype)));
            }
            infer_scale(cx, 3 + 3 * i, &format!("the scale of part {i}"), Count::One)?;
            infer_zero(cx, 4 + 3 * i, &format!("the zero point of part {i}"), dtype, Count::One)?;
            inputs.push(Fact { content: Default::default(), ..x.clone() });
        }
        let inputs: Vec<Option<&Fact>> = inputs.iter().map(Some).collect();
        Concat { axis: self.axis }.infer(&Infer { inputs: &inputs, outputs: cx.outputs, cx: cx.cx })
    }

    fn run(&self, _cx: &Cx, io: &mut Io) -> Result<()> {
        let of_y = (scale(io.input(0)?, "Y_scale")?, zero(io.optional(1), "Y_zero_point")?);
        let mut at = 0;
        for i in 0..parts(io.inputs.len())? {
            let x = io.input(2 + 3 * i)?;
            let of_x = (
                scale(io.input(3 + 3 * i)?, &format!("the scale of part {i}"))?,
                zero(io.optional(4 + 3 * i), &format!("the zero point of part {i}"))?,
            );
            let y = io.output(0)?;
            let axis = axis_index(self.axis, y.dims.len())?;
            let inner = |d: &[usize]| d[axis..].iter().product::<usize>();
            let (block, row) = (inner(x.dims), inner(y.dims));
            let table = table(x.dtype, of_x, of_y, |v| v);
            let rows = y.bytes().chunks_exact_mut(row.max(1));
            for (x, y) in x.bytes().chunks_exact(block.max(1)).zip(rows) {
                let y = &mut y[at..][..block];
                if of_x == of_y { y.copy_from_slice(x) } else { look_up(&table, x, y) }
            }
            at += block;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn parts_are_brought_to_one_scale() {
        let u8s = |dims: &[usize], v: &[u8]| Tensor::from_slice(dims, v).unwrap();
        let one = |v: f32| f32s(&[], &[v]);
        let operands = [
            one(1.0),
            u8s(&[], &[100]),
            u8s(&[2, 1], &[0, 7]),
            one(1.0),
            u8s(&[], &[100]),
            u8s(&[2, 2], &[1, 2, 3, 255]),
            one(2.0),
            u8s(&[], &[1]),
        ];
        let node = || OneNode::new("QLinearConcat").domain("com.microsoft").int("axis", -1);
        let y = node().run(&operands).unwrap();
        assert_eq!(y[0], u8s(&[2, 3], &[0, 100, 102, 7, 104, 255]));
        assert!(node().run(&operands[..7]).unwrap_err().message.contains("three for each part"));
        let mut wrong = operands.clone();
        wrong[6] = one(f32::NAN);
        assert!(node().run(&wrong).unwrap_err().message.contains("the scale of part 1"));
    }
}
