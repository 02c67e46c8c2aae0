//! Shape arithmetic and strided copies that the operators of data movement share.

use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact, Shape, axis_index};
use crate::tensor::{DType, Dims, TensorMut, TensorView};
use smallvec::SmallVec;
use weblane_kernels::movement::{self, Axis};
use weblane_kernels::par::Cx;

/// A kernel's refusal as an error of the engine.
pub(crate) fn kernel_error(e: weblane_kernels::error::Error) -> Error {
    Error::invalid_input(e.to_string())
}

/// Row-major strides in elements; the caller has checked that the product of the sizes does not overflow.
pub(crate) fn strides(dims: &[usize]) -> Dims {
    let mut out = Dims::from_elem(1, dims.len());
    for a in (1..dims.len()).rev() {
        out[a - 1] = out[a] * dims[a];
    }
    out
}

/// Strides that read an operand of shape `from` along the axes of `to`, which it broadcasts to; 0 where it repeats.
pub(crate) fn broadcast_strides(from: &[usize], to: &[usize]) -> Dims {
    let dense = strides(from);
    let lead = to.len().saturating_sub(from.len());
    (0..to.len()).map(|a| if a < lead || from[a - lead] == 1 { 0 } else { dense[a - lead] }).collect()
}

/// Product of sizes, or an error when it overflows.
pub(crate) fn product(dims: &[usize]) -> Result<usize> {
    crate::tensor::element_count(dims)
}

/// `a + b`, or an error when it overflows.
pub(crate) fn sum(a: usize, b: usize) -> Result<usize> {
    a.checked_add(b).ok_or_else(|| Error::limit(format!("a size of {a} + {b} cannot be addressed")))
}

/// `a + b` of sizes that may not be known.
pub(crate) fn dim_sum(a: &Dim, b: &Dim) -> Result<Dim> {
    Ok(match (a, b) {
        (Dim::Known(x), Dim::Known(y)) => Dim::Known(sum(*x, *y)?),
        (Dim::Known(0), d) | (d, Dim::Known(0)) => d.clone(),
        (Dim::Unknown, _) | (_, Dim::Unknown) => Dim::Unknown,
        _ => named_sum(&format!("{a} + {b}"))?,
    })
}

/// The sum that a name says, its names in order and its numbers as one at the end, so that equal sums have one name: a cache
/// grows by the same positions in keys and in values. Exporters name the inputs that have such sizes in the same way.
fn named_sum(text: &str) -> Result<Dim> {
    // Longer names are those of chains of sums, which nobody compares.
    const MAX_NAME: usize = 200;
    if text.len() > MAX_NAME {
        return Ok(Dim::Unknown);
    }
    let (mut names, mut number): (Vec<&str>, usize) = (Vec::new(), 0);
    for term in text.split(" + ") {
        match term.parse() {
            Ok(n) => number = sum(number, n)?,
            Err(_) => names.push(term),
        }
    }
    names.sort_unstable();
    let mut name = names.join(" + ");
    if number > 0 {
        name = format!("{name} + {number}");
    }
    Ok(Dim::Symbol(name.into()))
}

/// `a - b` of sizes that may not be known: a number, or what is left of a sum whose terms those of `b` are among, as the
/// positions after a cache are.
pub(crate) fn dim_difference(a: &Dim, b: &Dim) -> Dim {
    if *a == Dim::Unknown || *b == Dim::Unknown {
        return Dim::Unknown;
    }
    let (a, b) = (a.to_string(), b.to_string());
    let (mut names, mut number): (Vec<&str>, usize) = (Vec::new(), 0);
    for term in a.split(" + ") {
        match term.parse() {
            Ok(n) => number = n,
            Err(_) => names.push(term),
        }
    }
    for term in b.split(" + ") {
        match (term.parse::<usize>(), names.iter().position(|name| *name == term)) {
            (Ok(n), _) if n <= number => number -= n,
            (Err(_), Some(at)) => drop(names.remove(at)),
            _ => return Dim::Unknown,
        }
    }
    if names.is_empty() {
        return Dim::Known(number);
    }
    if number == 0 {
        return Dim::Symbol(names.join(" + ").into());
    }
    Dim::Symbol(format!("{} + {number}", names.join(" + ")).into())
}

/// `a * b` of sizes that may not be known.
pub(crate) fn dim_product(a: &Dim, b: &Dim) -> Result<Dim> {
    Ok(match (a, b) {
        (Dim::Known(x), Dim::Known(y)) => Dim::Known(product(&[*x, *y])?),
        (Dim::Known(0), _) | (_, Dim::Known(0)) => Dim::Known(0),
        (Dim::Known(1), d) | (d, Dim::Known(1)) => d.clone(),
        _ => Dim::Unknown,
    })
}

/// The size that both names stand for, where two facts about the same axis meet.
pub(crate) fn dim_meet(a: &Dim, b: &Dim, what: &str) -> Result<Dim> {
    match (a, b) {
        (Dim::Known(x), Dim::Known(y)) if x != y => Err(Error::shape(format!("{what}: {x} and {y} should be equal"))),
        (Dim::Known(_), _) => Ok(a.clone()),
        (_, Dim::Known(_)) => Ok(b.clone()),
        (Dim::Unknown, _) => Ok(b.clone()),
        _ => Ok(a.clone()),
    }
}

/// What is known of the elements of an integer scalar or vector in shape arithmetic. A negative number (a marker such
/// as the -1 of a reshape) counts as not known.
pub(crate) fn loose_sizes(fact: &Fact) -> Option<Shape> {
    if fact.rank()? > 1 {
        return None;
    }
    match &fact.content {
        Content::Dims(d) => Some(Shape::clone(d)),
        Content::Tensor(_) if matches!(fact.dtype, DType::I64 | DType::I32) => {
            let values = fact.i64s()?;
            Some(values.iter().map(|&v| usize::try_from(v).map_or(Dim::Unknown, Dim::Known)).collect())
        }
        _ => None,
    }
}

/// The fact of an integer scalar (rank 0) or vector with these elements. It is a constant only through the folding of
/// the analysis, so that the element type stays what the operator says.
pub(crate) fn sizes_fact(dtype: DType, sizes: Shape, rank: usize) -> Fact {
    let mut fact = Fact::new(dtype, if rank == 0 { &[] } else { std::slice::from_ref(&0) });
    if let Some(first) = fact.shape.as_mut().and_then(|s| s.first_mut()) {
        *first = Dim::Known(sizes.len());
    }
    if dtype == DType::I64
        && sizes.iter().all(|d| d.known().is_some())
        && let Ok(constant) = Fact::of_sizes(sizes.clone(), rank)
    {
        return constant;
    }
    fact.content = Content::Dims(Box::new(sizes));
    fact
}

/// An operand of integers (axes, sizes, starts ...) where inference looks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ints {
    /// The operand is left out.
    Absent,
    /// Its elements.
    Known(SmallVec<[i64; 8]>),
    /// It is computed at run time; the number of elements may be known.
    Computed(Option<usize>),
}

/// Reads an operand of integers, which must be a scalar or a vector.
pub(crate) fn ints(fact: Option<&Fact>, what: &str) -> Result<Ints> {
    let Some(fact) = fact else { return Ok(Ints::Absent) };
    if !matches!(fact.dtype, DType::I64 | DType::I32) {
        return Err(Error::dtype(format!("{what} is {}; int64 or int32 was wanted", fact.dtype)));
    }
    if fact.rank().is_some_and(|r| r > 1) {
        return Err(Error::shape(format!("{what} has shape {}; a vector was wanted", fact.shape_text())));
    }
    Ok(match fact.i64s() {
        Some(values) => Ints::Known(values),
        None => Ints::Computed(fact.shape.as_ref().and_then(|s| s.first().map_or(Some(1), Dim::known))),
    })
}

/// The axes of a list, each once, in the order of the list.
pub(crate) fn distinct_axes(axes: &[i64], rank: usize) -> Result<Dims> {
    let mut out = Dims::new();
    for &a in axes {
        let axis = axis_index(a, rank)?;
        if out.contains(&axis) {
            return Err(Error::shape(format!("axis {axis} is named twice in {axes:?}")));
        }
        out.push(axis);
    }
    Ok(out)
}

/// Where an axis is in a permuted tensor, whose axis `i` is axis `perm[i]` of the original.
pub(crate) fn permuted_axis(axis: i64, perm: &[usize]) -> Option<i64> {
    let axis = axis_index(axis, perm.len()).ok()?;
    perm.iter().position(|&p| p == axis).map(|i| i as i64)
}

/// Bytes of an element that data movement can carry.
pub(crate) fn element_size(dtype: DType) -> Result<usize> {
    match dtype.bits() {
        8 | 16 | 32 | 64 => Ok(dtype.bits() / 8),
        _ => Err(Error::unsupported_dtype(format!("{dtype} elements cannot be moved one by one"))),
    }
}

/// Checks in inference that data movement can carry the elements.
pub(crate) fn check_movable(dtype: DType) -> Result<()> {
    if dtype == DType::String { Ok(()) } else { element_size(dtype).map(|_| ()) }
}

/// [`movement::copy_strided`] for tensors, text included.
pub(crate) fn copy_axes(
    cx: &Cx,
    axes: &[Axis],
    x: TensorView,
    x_offset: usize,
    y: &mut TensorMut,
    y_offset: usize,
) -> Result<()> {
    if let Some(from) = x.strings() {
        let to = y.strings().ok_or_else(|| Error::dtype("text cannot become numbers here"))?;
        return copy_strings(axes, from, x_offset, to, y_offset);
    }
    let element = element_size(x.dtype)?;
    movement::copy_strided(cx, element, axes, x.bytes(), x_offset, y.bytes(), y_offset).map_err(kernel_error)
}

fn copy_strings(axes: &[Axis], x: &[String], x_offset: usize, y: &mut [String], y_offset: usize) -> Result<()> {
    let Some((axis, rest)) = axes.split_first() else {
        let (Some(from), Some(to)) = (x.get(x_offset), y.get_mut(y_offset)) else {
            return Err(Error::internal("a copy of text leaves its tensor"));
        };
        to.clone_from(from);
        return Ok(());
    };
    for i in 0..axis.len {
        let from = x_offset as isize + axis.src * i as isize;
        copy_strings(rest, x, usize::try_from(from).unwrap_or(usize::MAX), y, y_offset + axis.dst * i)?;
    }
    Ok(())
}

/// A list of axes of a copy that stays inline.
pub(crate) type Axes = SmallVec<[Axis; 12]>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_of_a_broadcast_operand() {
        assert_eq!(broadcast_strides(&[3, 1], &[2, 3, 4]).as_slice(), [0, 1, 0]);
        assert_eq!(strides(&[2, 3, 4]).as_slice(), [12, 4, 1]);
    }

    #[test]
    fn negative_markers_are_not_sizes() {
        let fact = Fact::constant(std::sync::Arc::new(crate::tensor::Tensor::from_slice(&[2], &[-1i64, 7]).unwrap()));
        assert_eq!(loose_sizes(&fact).unwrap().as_slice(), [Dim::Unknown, Dim::Known(7)]);
    }

    #[test]
    fn text_moves_too() {
        let x: Vec<String> = ["a", "b", "c", "d"].map(String::from).into();
        let mut y = vec![String::new(); 4];
        let axes = [Axis { len: 2, src: 1, dst: 2 }, Axis { len: 2, src: 2, dst: 1 }];
        copy_strings(&axes, &x, 0, &mut y, 0).unwrap();
        assert_eq!(y, ["a", "c", "b", "d"]);
    }

    #[test]
    fn equal_sums_have_one_name() {
        let dim = |s: &str| Dim::Symbol(s.into());
        let sum = |a: &Dim, b: &Dim| dim_sum(a, b).unwrap();
        let (past, new) = (dim("past"), dim("new"));
        assert_eq!(sum(&past, &new), dim("new + past"));
        assert_eq!(sum(&past, &new), sum(&new, &past));
        assert_eq!(sum(&sum(&past, &Dim::Known(2)), &sum(&new, &Dim::Known(1))), dim("new + past + 3"));
        assert_eq!(sum(&past, &Dim::Known(0)), past);
        assert_eq!(sum(&past, &Dim::Unknown), Dim::Unknown);
        assert_eq!(sum(&dim(&"long".repeat(60)), &new), Dim::Unknown);
        let less = |a: &Dim, b: &Dim| dim_difference(a, b);
        assert_eq!(less(&sum(&past, &new), &past), new);
        assert_eq!(less(&dim("new + new + past + 3"), &dim("new + 1")), dim("new + past + 2"));
        assert_eq!((less(&past, &past), less(&Dim::Known(5), &Dim::Known(2))), (Dim::Known(0), Dim::Known(3)));
        for (a, b) in [(&past, &new), (&past, &Dim::Known(1)), (&Dim::Known(1), &Dim::Known(2)), (&past, &Dim::Unknown)]
        {
            assert_eq!(less(a, b), Dim::Unknown);
        }
        let most = dim(&format!("n + {}", usize::MAX));
        assert!(dim_sum(&most, &Dim::Known(1)).is_err());
    }
}
