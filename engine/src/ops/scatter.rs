//! Scatter, ScatterElements and ScatterND.

use super::gather::{check_elementwise_indices, check_indices, elementwise_places, rows_to_places};
use super::identity::copy;
use super::sizes::{check_movable, element_size};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact};
use crate::for_dtype;
use crate::tensor::{DType, TensorMut, TensorView};
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("Scatter", 9, |a| ScatterElements::parse(a, "Scatter")),
    Registration::onnx("ScatterElements", 11, |a| ScatterElements::parse(a, "ScatterElements")),
    Registration::onnx("ScatterND", 11, ScatterNd::parse),
];

/// What becomes of an element that is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reduction {
    Replace,
    Add,
    Mul,
    Max,
    Min,
}

impl Reduction {
    fn parse(a: &mut Attributes) -> Result<Self> {
        let all = [
            ("none", Reduction::Replace),
            ("add", Reduction::Add),
            ("mul", Reduction::Mul),
            ("max", Reduction::Max),
            ("min", Reduction::Min),
        ];
        a.choice("reduction", &all)
    }

    fn check_dtype(self, dtype: DType) -> Result<()> {
        check_movable(dtype)?;
        if self != Reduction::Replace && matches!(dtype, DType::String | DType::Bool) {
            return Err(wrong_dtype("the operand of a reduction", dtype, "numbers"));
        }
        Ok(())
    }

    fn function<T: Number>(self) -> fn(T, T) -> T {
        match self {
            Reduction::Replace => |_, b| b,
            Reduction::Add => T::plus,
            Reduction::Mul => T::times,
            Reduction::Max => |a, b| if b > a { b } else { a },
            Reduction::Min => |a, b| if b < a { b } else { a },
        }
    }
}

/// Blocks of `block` elements of `updates`, one behind the other, to the given places of `y`.
fn scatter(reduction: Reduction, places: &[usize], block: usize, updates: TensorView, y: &mut TensorMut) -> Result<()> {
    let outside = || Error::internal("a scatter leaves its operand");
    if block == 0 {
        return Ok(());
    }
    if let (Some(from), Some(to)) = (updates.strings(), y.strings()) {
        for (&p, from) in places.iter().zip(from.chunks(block)) {
            to.get_mut(p..p + block).ok_or_else(outside)?.clone_from_slice(from);
        }
        return Ok(());
    }
    if reduction == Reduction::Replace {
        let element = element_size(y.dtype)?;
        let to = y.bytes();
        for (&p, from) in places.iter().zip(updates.bytes().chunks(block * element)) {
            to.get_mut(p * element..(p + block) * element).ok_or_else(outside)?.copy_from_slice(from);
        }
        return Ok(());
    }
    // One loop for all types: only what combines two elements knows theirs.
    type Combine = Box<dyn Fn(&mut [u8], &[u8])>;
    let combine = for_dtype!(y.dtype, [F32, F64, I8, I16, I32, I64, U8, U16, U32, U64], T => {
        let f = reduction.function::<T>();
        Ok::<Combine, Error>(Box::new(move |to, from| {
            let value = f(bytemuck::pod_read_unaligned::<T>(to), bytemuck::pod_read_unaligned::<T>(from));
            to.copy_from_slice(bytemuck::bytes_of(&value));
        }))
    }, else Err(wrong_dtype("the operand of a reduction", y.dtype, "numbers")))?;
    let element = element_size(y.dtype)?;
    let to = y.bytes();
    for (&p, from) in places.iter().zip(updates.bytes().chunks(block * element)) {
        let to = to.get_mut(p * element..(p + block) * element).ok_or_else(outside)?;
        to.chunks_exact_mut(element).zip(from.chunks_exact(element)).for_each(|(to, from)| combine(to, from));
    }
    Ok(())
}

/// `y = x; y[i, indices[i, j, ..], ..] = updates[i, j, ..]`, an index for each update.
#[derive(Clone, Debug, PartialEq)]
pub struct ScatterElements {
    name: &'static str,
    axis: i64,
    reduction: Reduction,
}

impl ScatterElements {
    fn parse(a: &mut Attributes, name: &'static str) -> Result<Op> {
        Ok(ScatterElements { name, axis: a.int_or("axis", 0)?, reduction: Reduction::parse(a)? }.into())
    }
}

fn check_updates(x: &Fact, updates: &Fact) -> Result<()> {
    if x.dtype == updates.dtype {
        return Ok(());
    }
    Err(Error::dtype(format!("updates of {} for an operand of {}; one type was wanted", updates.dtype, x.dtype)))
}

impl Operator for ScatterElements {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, indices, updates) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        self.reduction.check_dtype(x.dtype)?;
        check_indices(indices)?;
        check_updates(x, updates)?;
        check_elementwise_indices(x, indices, self.axis)?;
        if let (Some(i), Some(u)) = (indices.dims(), updates.dims())
            && i != u
        {
            return Err(Error::shape(format!("updates of shape {:?} for indices of shape {:?}", &u[..], &i[..])));
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        if io.in_place.is_none() {
            copy(io)?;
        }
        let (indices, updates) = (io.input(1)?, io.input(2)?);
        let y = io.output(0)?;
        let places = elementwise_places(y.dims, indices, self.axis)?;
        scatter(self.reduction, &places, 1, updates, y)
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn takes_half(&self) -> bool {
        self.reduction == Reduction::Replace
    }
}

/// `y = x; y[indices[i, ..]] = updates[i, ..]`: slices at the places that the rows of operand 1 name.
#[derive(Clone, Debug, PartialEq)]
pub struct ScatterNd {
    reduction: Reduction,
}

impl ScatterNd {
    fn parse(a: &mut Attributes) -> Result<Op> {
        Ok(ScatterNd { reduction: Reduction::parse(a)? }.into())
    }
}

impl Operator for ScatterNd {
    fn name(&self) -> &'static str {
        "ScatterND"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, indices, updates) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        self.reduction.check_dtype(x.dtype)?;
        check_indices(indices)?;
        check_updates(x, updates)?;
        let wrong = || {
            let (x, i, u) = (x.shape_text(), indices.shape_text(), updates.shape_text());
            Error::shape(format!("updates of shape {u} at indices of shape {i} of an operand of shape {x}"))
        };
        if let (Some(shape), Some(at)) = (&x.shape, &indices.shape) {
            let (row, lead) = at.split_last().ok_or_else(wrong)?;
            if let (Some(row), Some(given)) = (row.known(), &updates.shape) {
                let rest = shape.get(row..).ok_or_else(wrong)?;
                let want: Vec<&Dim> = lead.iter().chain(rest).collect();
                let differ = |(a, b): (&Dim, &&Dim)| matches!((a, b), (Dim::Known(m), Dim::Known(n)) if m != n);
                if want.len() != given.len() || given.iter().zip(&want).any(differ) {
                    return Err(wrong());
                }
            } else if row.known().is_some_and(|r| r > shape.len()) {
                return Err(wrong());
            }
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        if io.in_place.is_none() {
            copy(io)?;
        }
        let (indices, updates) = (io.input(1)?, io.input(2)?);
        let y = io.output(0)?;
        let row = indices.dims.last().copied().unwrap_or(1);
        let block: usize = y.dims[row..].iter().product();
        let places = rows_to_places(y.dims, 0, row, indices)?;
        scatter(self.reduction, &places, block, updates, y)
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn takes_half(&self) -> bool {
        self.reduction == Reduction::Replace
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::onnx::AttributeValue;

    fn reduction(node: OneNode, name: &str) -> OneNode {
        node.attr("reduction", AttributeValue::String(name.into()))
    }

    #[test]
    fn elements() {
        let x = || f32s(&[1, 5], &[1.0, 2.0, 3.0, 4.0, 5.0]);
        let (at, new) = (|| i64s(&[1, 2], &[1, -2]), || f32s(&[1, 2], &[1.1, 2.1]));
        let node = || OneNode::new("ScatterElements").int("axis", 1);
        let y = node().run(&[x(), at(), new()]).unwrap();
        assert_eq!(y[0], f32s(&[1, 5], &[1.0, 1.1, 3.0, 2.1, 5.0]));
        let twice = i64s(&[1, 2], &[1, 1]);
        let y = reduction(node(), "add").run(&[x(), twice.clone(), f32s(&[1, 2], &[0.5, 0.25])]).unwrap();
        assert_eq!(y[0], f32s(&[1, 5], &[1.0, 2.75, 3.0, 4.0, 5.0]));
        let y = reduction(node(), "max").run(&[x(), twice, f32s(&[1, 2], &[7.0, 0.0])]).unwrap();
        assert_eq!(y[0], f32s(&[1, 5], &[1.0, 7.0, 3.0, 4.0, 5.0]));
        assert!(node().run(&[x(), i64s(&[1, 2], &[1, 5]), new()]).is_err());
        assert!(node().run(&[x(), at(), f32s(&[1, 1], &[1.0])]).is_err());
        assert!(reduction(node(), "avg").run(&[x(), at(), new()]).is_err());
    }

    #[test]
    fn slices() {
        let x = || f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let y = OneNode::new("ScatterND").run(&[x(), i64s(&[1, 1], &[-1]), f32s(&[1, 2], &[8.0, 9.0])]).unwrap();
        assert_eq!(y[0], f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 8.0, 9.0]));
        let node = || reduction(OneNode::new("ScatterND"), "mul");
        let y = node().run(&[x(), i64s(&[2, 2], &[0, 1, 0, 1]), f32s(&[2], &[2.0, 3.0])]).unwrap();
        assert_eq!(y[0], f32s(&[3, 2], &[1.0, 12.0, 3.0, 4.0, 5.0, 6.0]));
        assert!(node().run(&[x(), i64s(&[1, 3], &[0; 3]), f32s(&[1], &[2.0])]).is_err());
        assert!(node().run(&[x(), i64s(&[1, 1], &[3]), f32s(&[1, 2], &[2.0; 2])]).is_err());
        assert!(node().run(&[x(), i64s(&[1, 1], &[0]), f32s(&[2], &[2.0; 2])]).is_err());
    }
}
