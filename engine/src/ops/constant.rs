//! Constant and ConstantOfShape.

use super::sizes::{Ints, ints, kernel_error};
use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact, Shape};
use crate::onnx::AttributeValue;
use crate::tensor::{DType, Tensor, byte_count};
use smallvec::SmallVec;
use std::sync::Arc;
use weblane_kernels::movement;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("Constant", 1, Constant::parse),
    Registration::onnx("ConstantOfShape", 9, ConstantOfShape::parse),
];

/// A tensor that stands in the node.
#[derive(Debug, PartialEq)]
pub struct Constant {
    /// The tensor.
    pub value: Arc<Tensor>,
}

impl Constant {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let mut values: Vec<Arc<Tensor>> = Vec::new();
        values.extend(a.tensor("value")?);
        if let Some(v) = a.float("value_float")? {
            values.push(Arc::new(Tensor::scalar(v)?));
        }
        if let Some(v) = a.floats("value_floats")? {
            values.push(Arc::new(Tensor::from_slice(&[v.len()], &v)?));
        }
        if let Some(v) = a.int("value_int")? {
            values.push(Arc::new(Tensor::scalar(v)?));
        }
        if let Some(v) = a.ints("value_ints")? {
            values.push(Arc::new(Tensor::from_slice(&[v.len()], &v)?));
        }
        if let Some(v) = a.string("value_string")? {
            values.push(Arc::new(Tensor::from_strings(&[], vec![v])?));
        }
        if let Some(v) = a.strings("value_strings")? {
            values.push(Arc::new(Tensor::from_strings(&[v.len()], v)?));
        }
        if let Some(AttributeValue::SparseTensor(s)) = a.raw("sparse_value") {
            values.push(Arc::new(s.to_dense(MAX_DENSE_BYTES)?.into_tensor()?));
        }
        match <[_; 1]>::try_from(values) {
            Ok([value]) => Ok(Constant { value }.into()),
            Err(v) => Err(Error::invalid_model(format!("{} values are given; exactly one was wanted", v.len()))),
        }
    }
}

/// A few bytes of a file may claim to be a huge sparse tensor.
const MAX_DENSE_BYTES: usize = 1 << 30;

impl Operator for Constant {
    fn name(&self) -> &'static str {
        "Constant"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        cx.results(vec![Fact::constant(self.value.clone())])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let from = self.value.view();
        let y = io.output(0)?;
        match (from.strings(), y.strings()) {
            (Some(from), Some(to)) => to.clone_from_slice(from),
            _ => y.bytes().copy_from_slice(from.bytes()),
        }
        Ok(())
    }

    fn takes_half(&self) -> bool {
        true
    }
}

/// A tensor of one value repeated, of the shape that the operand's elements say.
#[derive(Debug, PartialEq)]
pub struct ConstantOfShape {
    /// The value: one element.
    pub value: Arc<Tensor>,
}

impl ConstantOfShape {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let value = match a.tensor("value")? {
            Some(t) => t,
            None => Arc::new(Tensor::from_slice(&[1], &[0f32])?),
        };
        if value.len() != 1 || value.dtype().bits() < 8 {
            let (d, n) = (value.dtype(), value.len());
            return Err(Error::unsupported_attribute(format!("value has {n} elements of {d}; one number was wanted")));
        }
        Ok(ConstantOfShape { value }.into())
    }
}

impl Operator for ConstantOfShape {
    fn name(&self) -> &'static str {
        "ConstantOfShape"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let dtype = self.value.dtype();
        let shape: Option<Shape> = match ints(cx.optional(0), "the shape")? {
            Ints::Absent => return Err(Error::invalid_model("operand 0 is missing")),
            Ints::Known(values) => {
                let size = |&v| {
                    usize::try_from(v)
                        .map_err(|_| Error::shape(format!("{v} in the wanted shape; sizes are 0 or more")))
                };
                let dims = values.iter().map(size).collect::<Result<SmallVec<[usize; 6]>>>()?;
                byte_count(dtype, &dims)?;
                Some(dims.into_iter().map(Dim::Known).collect())
            }
            Ints::Computed(count) => match &cx.input(0)?.content {
                Content::Dims(sizes) => Some(Shape::clone(sizes)),
                _ => count.map(|n| SmallVec::from_elem(Dim::Unknown, n)),
            },
        };
        let fact = Fact { dtype, shape, content: Content::Unknown };
        // A vector of equal sizes, as exporters write before an Expand.
        let constant = match (fact.dims(), dtype) {
            (Some(dims), DType::I64) if dims.len() <= 1 && dims.iter().all(|&d| d <= 64) => {
                let value = self.value.as_slice::<i64>()?[0];
                let values = vec![value; dims.iter().product()];
                Some(Fact::constant(Arc::new(Tensor::from_slice(&dims, &values)?)))
            }
            _ => None,
        };
        cx.results(vec![constant.unwrap_or(fact)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        movement::fill(cx, self.value.bytes(), io.output(0)?.bytes()).map_err(kernel_error)
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
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::onnx::TensorProto;

    #[test]
    fn each_form_of_a_constant() {
        let node = OneNode::new("Constant").ints("value_ints", &[1, 2]);
        assert_eq!(node.run(&[]).unwrap()[0], i64s(&[2], &[1, 2]));
        let node = OneNode::new("Constant").float("value_float", 2.5);
        assert_eq!(node.run(&[]).unwrap()[0], f32s(&[], &[2.5]));
        assert!(OneNode::new("Constant").run(&[]).is_err());
        assert!(OneNode::new("Constant").int("value_int", 1).float("value_float", 1.0).run(&[]).is_err());
    }

    #[test]
    fn a_value_fills_the_shape() {
        let value = TensorProto::new("", &f32s(&[1], &[3.5])).unwrap();
        let node = || OneNode::new("ConstantOfShape").attr("value", AttributeValue::Tensor(value.clone()));
        assert_eq!(node().run(&[i64s(&[2], &[1, 3])]).unwrap()[0], f32s(&[1, 3], &[3.5; 3]));
        assert_eq!(node().run(&[i64s(&[0], &[])]).unwrap()[0], f32s(&[], &[3.5]));
        assert!(node().run(&[i64s(&[1], &[-2])]).unwrap_err().message.contains("-2"));
        assert!(node().run(&[i64s(&[2], &[i64::MAX, i64::MAX])]).is_err());
        let symbolic = node().infer(&[Some(Fact::of_rank(DType::I64, 1))]).unwrap();
        assert_eq!(symbolic[0].rank(), None);
    }
}
