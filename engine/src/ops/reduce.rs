//! The Reduce family, ArgMax and ArgMin.

use super::cast::{convert, converted};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, axis_index};
use crate::for_dtype;
use crate::tensor::{DType, Tensor};
use smallvec::SmallVec;
use weblane_kernels::par::Cx;
use weblane_kernels::reduce::{Reduction, arg_extreme, reduce, reduce_any};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("ReduceSum", 1, parse),
    Registration::onnx("ReduceMean", 1, parse),
    Registration::onnx("ReduceMax", 1, parse),
    Registration::onnx("ReduceMin", 1, parse),
    Registration::onnx("ReduceProd", 1, parse),
    Registration::onnx("ReduceL1", 1, parse),
    Registration::onnx("ReduceL2", 1, parse),
    Registration::onnx("ReduceLogSum", 1, parse),
    Registration::onnx("ReduceLogSumExp", 1, parse),
    Registration::onnx("ReduceSumSquare", 1, parse),
    Registration::onnx("ArgMax", 1, parse_arg),
    Registration::onnx("ArgMin", 1, parse_arg),
];

/// A reduction over axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Reduce {
    /// What is computed.
    pub reduction: Reduction,
    /// Axes by attribute; an operand 1 takes precedence. None, or no axes, means all of them.
    pub axes: Option<SmallVec<[i64; 4]>>,
    /// Whether reduced axes stay with length 1.
    pub keep: bool,
    /// Whether no axes means none of them instead of all.
    pub empty_is_none: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let reduction = match a.op_type() {
        "ReduceSum" => Reduction::Sum,
        "ReduceMean" => Reduction::Mean,
        "ReduceMax" => Reduction::Max,
        "ReduceMin" => Reduction::Min,
        "ReduceProd" => Reduction::Prod,
        "ReduceL1" => Reduction::L1,
        "ReduceL2" => Reduction::L2,
        "ReduceLogSum" => Reduction::LogSum,
        "ReduceLogSumExp" => Reduction::LogSumExp,
        "ReduceSumSquare" => Reduction::SumSquare,
        other => return Err(Error::internal(format!("{other} is no reduction"))),
    };
    let axes = a.ints("axes")?.map(SmallVec::from_vec);
    let keep = a.flag_or("keepdims", true)?;
    let empty_is_none = a.flag_or("noop_with_empty_axes", false)?;
    Ok(Reduce { reduction, axes, keep, empty_is_none }.into())
}

type Mask = SmallVec<[bool; 8]>;

impl Reduce {
    /// Which axes are reduced, given what operand 1 says.
    fn mask(&self, rank: usize, operand: Option<&[i64]>) -> Result<Mask> {
        let axes = operand.or(self.axes.as_deref()).unwrap_or(&[]);
        if axes.is_empty() {
            return Ok(Mask::from_elem(!self.empty_is_none, rank));
        }
        let mut mask = Mask::from_elem(false, rank);
        for &axis in axes {
            mask[axis_index(axis, rank)?] = true;
        }
        Ok(mask)
    }
}

impl Operator for Reduce {
    fn name(&self) -> &'static str {
        match self.reduction {
            Reduction::Sum => "ReduceSum",
            Reduction::Mean => "ReduceMean",
            Reduction::Max => "ReduceMax",
            Reduction::Min => "ReduceMin",
            Reduction::Prod => "ReduceProd",
            Reduction::L1 => "ReduceL1",
            Reduction::L2 => "ReduceL2",
            Reduction::LogSum => "ReduceLogSum",
            Reduction::LogSumExp => "ReduceLogSumExp",
            Reduction::SumSquare => "ReduceSumSquare",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let operand = match cx.optional(1) {
            None => None,
            Some(axes) => match axes.i64s() {
                Some(values) => Some(values),
                None if self.keep => return cx.results(vec![Fact::of_rank(x.dtype, shape.len())]),
                None => return cx.results(vec![Fact::of_dtype(x.dtype)]),
            },
        };
        let mask = self.mask(shape.len(), operand.as_deref())?;
        let one = |(d, reduced): (&Dim, &bool)| match (*reduced, self.keep) {
            (false, _) => Some(d.clone()),
            (true, true) => Some(Dim::Known(1)),
            (true, false) => None,
        };
        let reduced: Shape = shape.iter().zip(&mask).filter_map(one).collect();
        cx.results(vec![Fact::with_shape(x.dtype, reduced)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let axes = io.optional(1).map(|a| a.to_i64s()).transpose()?;
        if self.empty_is_none && axes.as_deref().or(self.axes.as_deref()).is_none_or(|a| a.is_empty()) {
            // Nothing is reduced, not even by the function of a single element.
            io.output(0)?.bytes().copy_from_slice(x.bytes());
            return Ok(());
        }
        let mask = self.mask(x.rank(), axes.as_deref())?;
        if x.dtype == DType::F32 {
            let y = io.output(0)?.as_slice::<f32>()?;
            return Ok(reduce(cx, self.reduction, x.as_slice::<f32>()?, x.dims, &mask, y)?);
        }
        if matches!(x.dtype, DType::U32 | DType::I8 | DType::U8 | DType::Bool) {
            // What wraps at their width has these bits at any greater one.
            let wide = converted(x, DType::I64)?;
            let y = io.output(0)?;
            let mut sums = Tensor::zeros(DType::I64, y.dims)?;
            let mut view = sums.view_mut();
            let out = view.as_slice::<i64>()?;
            reduce_any(self.reduction, wide.as_slice::<i64>()?, x.dims, &mask, out)?;
            if let Reduction::Max | Reduction::Min = self.reduction {
                // The extreme of nothing is that of the type.
                let (least, greatest) = match x.dtype {
                    DType::U32 => (0, u32::MAX.into()),
                    DType::I8 => (i8::MIN.into(), i8::MAX.into()),
                    DType::U8 => (0, u8::MAX.into()),
                    _ => (0, 1),
                };
                out.iter_mut().for_each(|v| *v = (*v).clamp(least, greatest));
            }
            return convert(sums.view(), y);
        }
        for_dtype!(x.dtype, [F64, I32, I64, U64], T => {
            Ok(reduce_any(self.reduction, x.as_slice::<T>()?, x.dims, &mask, io.output(0)?.as_slice::<T>()?)?)
        }, else Err(wrong_dtype("the operand", x.dtype, "float32, float64, bool and integers of 8, 32 and 64 bits")))
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1]
    }
}

/// ArgMax or ArgMin.
#[derive(Clone, Debug, PartialEq)]
pub struct ArgExtreme {
    /// Whether the smallest is looked for.
    pub smallest: bool,
    /// The axis that is searched.
    pub axis: i64,
    /// Whether it stays with length 1.
    pub keep: bool,
    /// Whether the last of equal elements counts.
    pub last: bool,
}

fn parse_arg(a: &mut Attributes) -> Result<Op> {
    Ok(ArgExtreme {
        smallest: a.op_type() == "ArgMin",
        axis: a.int_or("axis", 0)?,
        keep: a.flag_or("keepdims", true)?,
        last: a.flag_or("select_last_index", false)?,
    }
    .into())
}

/// `dims` as `[outer, n, inner]` around an axis.
pub(super) fn around(dims: &[usize], axis: usize) -> [usize; 3] {
    [dims[..axis].iter().product(), dims[axis], dims[axis + 1..].iter().product()]
}

impl Operator for ArgExtreme {
    fn name(&self) -> &'static str {
        if self.smallest { "ArgMin" } else { "ArgMax" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(DType::I64)]) };
        let axis = axis_index(self.axis, shape.len())?;
        let mut shape = shape.clone();
        if self.keep {
            shape[axis] = Dim::Known(1);
        } else {
            shape.remove(axis);
        }
        cx.results(vec![Fact::with_shape(DType::I64, shape)])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let narrow = io.input(0)?;
        let wide = match narrow.dtype {
            DType::I8 | DType::U8 | DType::I16 | DType::U16 | DType::I32 | DType::U32 => {
                Some(converted(narrow, DType::I64)?)
            }
            _ => None,
        };
        let x = wide.as_ref().map_or(narrow, Tensor::view);
        let sizes = around(x.dims, axis_index(self.axis, x.rank())?);
        for_dtype!(x.dtype, [F32, F64, I64, U64], T => {
            let y = io.output(0)?.as_slice::<i64>()?;
            Ok(arg_extreme(x.as_slice::<T>()?, sizes, self.smallest, self.last, y)?)
        }, else Err(wrong_dtype("the operand", x.dtype, "float32, float64 and integers")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;

    fn cube() -> crate::tensor::Tensor {
        f32s(&[3, 2, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])
    }

    #[test]
    fn axes_by_attribute_and_by_operand() {
        let y = OneNode::new("ReduceSum").opset(11).ints("axes", &[1]).int("keepdims", 0).run(&[cube()]).unwrap();
        assert_eq!(y[0].dims(), [3, 2]);
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [4.0, 6.0, 12.0, 14.0, 20.0, 22.0]);
        let y = OneNode::new("ReduceMean").run(&[cube(), i64s(&[2], &[-1, 0])]).unwrap();
        assert_eq!(y[0].dims(), [1, 2, 1]);
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [5.5, 7.5]);
        let y = OneNode::new("ReduceMax").run(&[cube()]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [12.0]);
    }

    #[test]
    fn no_axes_may_mean_nothing() {
        let y = OneNode::new("ReduceSumSquare").int("noop_with_empty_axes", 1).run(&[cube(), i64s(&[0], &[])]).unwrap();
        assert_eq!(y[0], cube());
    }

    #[test]
    fn integers_stay_integers() {
        let y = OneNode::new("ReduceProd").run(&[i64s(&[3], &[3_000_000_000, 2, 1]), i64s(&[1], &[0])]).unwrap();
        assert_eq!(y[0].as_slice::<i64>().unwrap(), [6_000_000_000]);
    }

    #[test]
    fn narrow_integers_wrap() {
        let x = || Tensor::from_slice(&[3], &[200u8, 100, 7]).unwrap();
        let run = |node: OneNode| node.run(&[x()]).unwrap()[0].bytes().to_vec();
        assert_eq!(run(OneNode::new("ReduceSum")), [51]);
        assert_eq!(run(OneNode::new("ReduceMax")), [200]);
        assert_eq!(run(OneNode::new("ReduceMean")), [102]);
        assert_eq!(run(OneNode::new("ArgMin").int("axis", 0)), 2i64.to_le_bytes());
        let nothing = Tensor::from_slice::<i8>(&[0], &[]).unwrap();
        let y = OneNode::new("ReduceMax").run(&[nothing]).unwrap();
        assert_eq!(y[0].as_slice::<i8>().unwrap(), [i8::MIN]);
    }

    #[test]
    fn symbols_of_kept_axes_stay() {
        let x = Fact::with_shape(DType::F32, [Dim::Symbol("n".into()), 4.into()].into_iter().collect());
        let axes = Fact::constant(std::sync::Arc::new(i64s(&[1], &[1])));
        let y = OneNode::new("ReduceMean").int("keepdims", 0).infer(&[Some(x), Some(axes)]).unwrap();
        assert_eq!(y[0].shape_text(), "[n]");
        assert!(OneNode::new("ReduceMean").run(&[cube(), i64s(&[1], &[3])]).is_err());
    }

    #[test]
    fn positions() {
        let x = f32s(&[2, 3], &[2.0, 1.0, 2.0, 3.0, 10.0, 10.0]);
        let run = |node: OneNode| node.run(std::slice::from_ref(&x)).unwrap()[0].as_slice::<i64>().unwrap().to_vec();
        assert_eq!(run(OneNode::new("ArgMax").int("axis", 1)), [0, 1]);
        assert_eq!(run(OneNode::new("ArgMax").int("axis", 1).int("select_last_index", 1)), [2, 2]);
        assert_eq!(run(OneNode::new("ArgMin").int("keepdims", 0)), [0, 0, 0]);
    }
}
