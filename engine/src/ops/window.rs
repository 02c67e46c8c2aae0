//! HannWindow, HammingWindow and BlackmanWindow.

use super::sizes::{Ints, ints};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::for_dtype;
use crate::tensor::DType;
use half::{bf16, f16};
use std::f64::consts::TAU;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("HannWindow", 17, |a| Window::parse(a, "HannWindow", [0.5, 0.5, 0.0])),
    // The coefficients that ONNX takes for Hamming's window: 25/46 and 21/46.
    Registration::onnx("HammingWindow", 17, |a| Window::parse(a, "HammingWindow", [25.0 / 46.0, 21.0 / 46.0, 0.0])),
    Registration::onnx("BlackmanWindow", 17, |a| Window::parse(a, "BlackmanWindow", [0.42, 0.5, 0.08])),
];

/// `a - b cos(2 pi n / N) + c cos(4 pi n / N)` for `n` below the size; `N` is the size of a periodic window and one
/// less of a symmetric one.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    name: &'static str,
    coefficients: [f64; 3],
    periodic: bool,
    dtype: DType,
}

impl Window {
    fn parse(a: &mut Attributes, name: &'static str, coefficients: [f64; 3]) -> Result<Op> {
        let periodic = a.flag_or("periodic", true)?;
        let dtype = a.dtype("output_datatype")?.unwrap_or(DType::F32);
        if matches!(dtype, DType::Bool | DType::String) || dtype.bits() < 8 {
            return Err(wrong_dtype("the result", dtype, "numbers"));
        }
        Ok(Window { name, coefficients, periodic, dtype }.into())
    }
}

impl Operator for Window {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let fact = match ints(cx.optional(0), "the size")? {
            Ints::Known(v) => match v.first().map(|&n| usize::try_from(n)) {
                Some(Ok(n)) if v.len() == 1 => Fact::new(self.dtype, &[n]),
                _ => return Err(Error::shape(format!("size {:?}; one number of 0 or more was wanted", v.as_slice()))),
            },
            Ints::Computed(_) => Fact::of_rank(self.dtype, 1),
            Ints::Absent => return Err(Error::invalid_model("operand 0 is missing")),
        };
        cx.results(vec![fact])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let y = io.output(0)?;
        let len = y.len();
        let period = (if self.periodic { len } else { len.saturating_sub(1) }).max(1) as f64;
        let [a, b, c] = self.coefficients;
        let value = |n: usize| {
            let x = TAU * n as f64 / period;
            a - b * x.cos() + c * (2.0 * x).cos()
        };
        match y.dtype {
            DType::F16 => {
                y.as_slice::<f16>().map(|y| y.iter_mut().enumerate().for_each(|(n, y)| *y = f16::from_f64(value(n))))
            }
            DType::Bf16 => {
                y.as_slice::<bf16>().map(|y| y.iter_mut().enumerate().for_each(|(n, y)| *y = bf16::from_f64(value(n))))
            }
            dtype => for_dtype!(dtype, [F32, F64, I8, I16, I32, I64, U8, U16, U32, U64], T =>
                y.as_slice::<T>().map(|y| y.iter_mut().enumerate().for_each(|(n, y)| *y = value(n) as T)),
                else Err(wrong_dtype("the result", dtype, "numbers"))),
        }
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, i64s};

    #[test]
    fn periodic_and_symmetric() {
        let y = OneNode::new("HannWindow").run(&[i64s(&[], &[4])]).unwrap();
        for (got, want) in y[0].as_slice::<f32>().unwrap().iter().zip([0.0, 0.5, 1.0, 0.5]) {
            assert!((got - want).abs() < 1e-6);
        }
        let y = OneNode::new("BlackmanWindow").int("periodic", 0).int("output_datatype", 11).run(&[i64s(&[], &[3])]);
        for (got, want) in y.unwrap()[0].as_slice::<f64>().unwrap().iter().zip([0.0, 1.0, 0.0]) {
            assert!((got - want).abs() < 1e-12);
        }
        assert_eq!(OneNode::new("HammingWindow").run(&[i64s(&[], &[0])]).unwrap()[0].dims(), [0]);
        assert!(OneNode::new("HannWindow").run(&[i64s(&[], &[-1])]).is_err());
    }
}
