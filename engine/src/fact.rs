//! What is known of a value before it is computed: element type, shape, sometimes the elements.

use crate::error::{Error, Result};
use crate::tensor::{DType, Dims, Tensor};
use smallvec::SmallVec;
use std::fmt;
use std::sync::Arc;

/// Size along one axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// A number.
    Known(usize),
    /// A name from the model: equal names are equal sizes.
    Symbol(Arc<str>),
    /// Nothing is known.
    Unknown,
}

impl Dim {
    /// The number, if it is one.
    pub fn known(&self) -> Option<usize> {
        match self {
            Dim::Known(n) => Some(*n),
            _ => None,
        }
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Self {
        Dim::Known(n)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(n) => write!(f, "{n}"),
            Dim::Symbol(s) => f.write_str(s),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

/// A shape of known rank.
pub type Shape = SmallVec<[Dim; 6]>;

/// What is known of a value's elements.
#[derive(Clone, Debug, Default)]
pub enum Content {
    /// Nothing.
    #[default]
    Unknown,
    /// All of them: the value is a constant.
    Tensor(Arc<Tensor>),
    /// The value is an integer scalar or vector that holds these sizes, as shape arithmetic does. On the heap, since it is
    /// rare and would double what every fact takes.
    Dims(Box<Shape>),
}

/// What is known of a value.
#[derive(Clone, Debug)]
pub struct Fact {
    /// Element type.
    pub dtype: DType,
    /// Shape, if at least its rank is known.
    pub shape: Option<Shape>,
    /// Elements.
    pub content: Content,
}

impl Fact {
    /// A value of known shape.
    pub fn new(dtype: DType, dims: &[usize]) -> Self {
        Fact { dtype, shape: Some(dims.iter().map(|&d| Dim::Known(d)).collect()), content: Content::Unknown }
    }

    /// A value of known rank.
    pub fn with_shape(dtype: DType, shape: Shape) -> Self {
        Fact { dtype, shape: Some(shape), content: Content::Unknown }
    }

    /// A value of which only the element type is known.
    pub fn of_dtype(dtype: DType) -> Self {
        Fact { dtype, shape: None, content: Content::Unknown }
    }

    /// A value of known rank and unknown sizes.
    pub fn of_rank(dtype: DType, rank: usize) -> Self {
        Fact::with_shape(dtype, SmallVec::from_elem(Dim::Unknown, rank))
    }

    /// A constant.
    pub fn constant(tensor: Arc<Tensor>) -> Self {
        let mut fact = Fact::new(tensor.dtype(), tensor.dims());
        fact.content = Content::Tensor(tensor);
        fact
    }

    /// An `int64` value that holds sizes, of the given rank (0 or 1). Becomes a constant when all sizes are numbers.
    pub fn of_sizes(sizes: Shape, rank: usize) -> Result<Self> {
        let dims: &[usize] = if rank == 0 { &[] } else { &[sizes.len()] };
        if let Some(known) = sizes.iter().map(|d| d.known().map(|n| n as i64)).collect::<Option<Vec<i64>>>() {
            return Ok(Fact::constant(Arc::new(Tensor::from_slice(dims, &known)?)));
        }
        let mut fact = Fact::new(DType::I64, dims);
        fact.content = Content::Dims(Box::new(sizes));
        Ok(fact)
    }

    /// Rank, if known.
    pub fn rank(&self) -> Option<usize> {
        self.shape.as_ref().map(|s| s.len())
    }

    /// The shape, if every size is a number.
    pub fn dims(&self) -> Option<Dims> {
        self.shape.as_ref()?.iter().map(Dim::known).collect()
    }

    /// The constant, if it is one.
    pub fn tensor(&self) -> Option<&Arc<Tensor>> {
        match &self.content {
            Content::Tensor(t) => Some(t),
            _ => None,
        }
    }

    /// The elements as sizes (of a constant integer tensor, or of shape arithmetic); negative numbers are not sizes.
    pub fn sizes(&self) -> Option<Shape> {
        match &self.content {
            Content::Dims(d) => Some(Shape::clone(d)),
            Content::Tensor(t) => {
                let values = t.view().to_i64s().ok()?;
                values.iter().map(|&v| usize::try_from(v).ok().map(Dim::Known)).collect()
            }
            Content::Unknown => None,
        }
    }

    /// The elements of a constant integer tensor.
    pub fn i64s(&self) -> Option<SmallVec<[i64; 8]>> {
        self.tensor().and_then(|t| t.view().to_i64s().ok())
    }

    /// Whether it is an integer or truth value of known shape with at most so many elements: what a plan may depend on.
    pub fn is_small_integer(&self, max_elements: usize) -> bool {
        !self.dtype.is_float()
            && self.dtype != DType::String
            && self.dims().is_some_and(|d| d.iter().product::<usize>() <= max_elements)
    }

    /// The shape for a message, such as `[1, 3, height, ?]`.
    pub fn shape_text(&self) -> String {
        match &self.shape {
            Some(s) => format!("[{}]", s.iter().map(Dim::to_string).collect::<Vec<_>>().join(", ")),
            None => "of unknown rank".into(),
        }
    }
}

/// Turns an axis in `-rank..rank` into an index.
pub fn axis_index(axis: i64, rank: usize) -> Result<usize> {
    let signed = rank as i64;
    if (-signed..signed).contains(&axis) {
        Ok(if axis < 0 { axis + signed } else { axis } as usize)
    } else {
        Err(Error::shape(format!("axis {axis} of a tensor of rank {rank}; it must lie in -{rank}..{rank}")))
    }
}

/// The smaller of a number and a size, as what a slice from the start takes; its name is read by [`is_cut_of`].
pub(crate) fn dim_min(n: usize, d: &Dim) -> Dim {
    match d {
        Dim::Known(m) => Dim::Known(n.min(*m)),
        Dim::Symbol(name) => Dim::Symbol(format!("min({n}, {name})").into()),
        Dim::Unknown => Dim::Unknown,
    }
}

/// Whether a name is that of a size cut to a number above 1, by [`dim_min`].
fn is_cut_of(name: &str, size: &str) -> bool {
    let inner = name.strip_prefix("min(").and_then(|n| n.strip_suffix(')')).and_then(|n| n.split_once(", "));
    inner.is_some_and(|(n, of)| of == size && n.parse().is_ok_and(|n: usize| n > 1))
}

/// NumPy broadcasting of two shapes.
pub fn broadcast(a: &[Dim], b: &[Dim]) -> Result<Shape> {
    let rank = a.len().max(b.len());
    let at = |s: &[Dim], i: usize| (i + s.len()).checked_sub(rank).map_or(Dim::Known(1), |j| s[j].clone());
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y && x != Dim::Unknown => Ok(x),
            (Dim::Known(1), d) | (d, Dim::Known(1)) => Ok(d),
            (Dim::Known(x), Dim::Known(y)) => Err(Error::shape(format!(
                "shapes [{}] and [{}] do not broadcast: {x} against {y}",
                a.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "),
                b.iter().map(Dim::to_string).collect::<Vec<_>>().join(", ")
            ))),
            // A number above 1 wins over a name: if the name turns out to be neither it nor 1, the run will say so.
            (Dim::Known(x), _) | (_, Dim::Known(x)) => Ok(Dim::Known(x)),
            // Equal to the size, or neither that nor 1.
            (Dim::Symbol(x), Dim::Symbol(y)) if is_cut_of(&x, &y) => Ok(Dim::Symbol(y)),
            (Dim::Symbol(x), Dim::Symbol(y)) if is_cut_of(&y, &x) => Ok(Dim::Symbol(x)),
            _ => Ok(Dim::Unknown),
        })
        .collect()
}

/// NumPy broadcasting of two concrete shapes.
pub fn broadcast_dims(a: &[usize], b: &[usize]) -> Result<Dims> {
    let lift = |s: &[usize]| s.iter().map(|&d| Dim::Known(d)).collect::<Shape>();
    let shape = broadcast(&lift(a), &lift(b))?;
    Ok(shape.iter().filter_map(Dim::known).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting() {
        assert_eq!(broadcast_dims(&[2, 1, 3], &[4, 1]).unwrap().as_slice(), [2, 4, 3]);
        assert_eq!(broadcast_dims(&[0], &[1]).unwrap().as_slice(), [0]);
        assert!(broadcast_dims(&[2], &[3]).is_err());
        let n = Dim::Symbol("n".into());
        assert_eq!(broadcast(&[n.clone()], &[n.clone()]).unwrap()[0], n);
        assert_eq!(broadcast(&[n], &[Dim::Known(4)]).unwrap()[0], Dim::Known(4));
        assert_eq!(broadcast(&[Dim::Unknown], &[Dim::Unknown]).unwrap()[0], Dim::Unknown);
    }

    #[test]
    fn axes() {
        assert_eq!(axis_index(-1, 3).unwrap(), 2);
        assert!(axis_index(3, 3).is_err());
        assert!(axis_index(0, 0).is_err());
    }

    #[test]
    fn a_cut_of_a_size_is_the_size_where_both_must_fit() {
        let dim = |s: &str| Dim::Symbol(s.into());
        let cut = dim_min(64, &dim("n"));
        assert_eq!(broadcast(&[dim("n")], std::slice::from_ref(&cut)).unwrap()[0], dim("n"));
        assert_eq!(broadcast(&[cut], &[dim("n")]).unwrap()[0], dim("n"));
        for other in [dim_min(1, &dim("n")), dim_min(64, &dim("m")), dim("min(64, n"), dim("min(, n)")] {
            assert_eq!(broadcast(&[dim("n")], std::slice::from_ref(&other)).unwrap()[0], Dim::Unknown, "{other}");
        }
    }
}
