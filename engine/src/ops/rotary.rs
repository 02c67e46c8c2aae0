//! RotaryEmbedding: pairs of elements turned by an angle that grows with the position (Su et al., 2021).

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::for_dtype;
use core::ops::{Add, Mul, Sub};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("RotaryEmbedding", 23, parse), Registration::microsoft("RotaryEmbedding", parse_microsoft)];

/// Operands: x `[batch, heads, positions, size]` or `[batch, positions, heads * size]`, cosines, sines, and the numbers of
/// the positions; without them cosines and sines are `[batch, positions, pairs]`, or those of one batch for all, with them
/// `[rows, pairs]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryEmbedding {
    /// Whether pairs are neighbours instead of half a head apart.
    pub interleaved: bool,
    /// Heads of operands of rank 3.
    pub heads: usize,
    /// Elements of a head that turn; 0 for all.
    pub size: usize,
    /// onnxruntime's form: the positions are operand 1, before cosines and sines; they may be the first one only, and the
    /// number of heads may be left to the cosines.
    pub microsoft: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    parse_form(a, false)
}

fn parse_microsoft(a: &mut Attributes) -> Result<Op> {
    let scale = a.float_or("scale", 1.0)?;
    if scale != 1.0 {
        return Err(Error::unsupported_attribute(format!("attribute scale is {scale}; 1 can be computed")));
    }
    // Lets cosines be fewer than positions, of which every one is checked.
    a.ignore("is_packed_batching");
    parse_form(a, true)
}

fn parse_form(a: &mut Attributes, microsoft: bool) -> Result<Op> {
    let mut count = |name: &str| {
        let n = a.int_or(name, 0)?;
        usize::try_from(n).map_err(|_| Error::unsupported_attribute(format!("attribute {name} is {n}")))
    };
    let (heads, size) = (count("num_heads")?, count("rotary_embedding_dim")?);
    Ok(RotaryEmbedding { interleaved: a.flag_or("interleaved", false)?, heads, size, microsoft }.into())
}

/// Batch, heads, positions, size of a head, and strides of the first three.
struct Layout {
    sizes: [usize; 4],
    strides: [usize; 3],
}

/// Cosines and sines, a row for each position.
#[derive(Clone, Copy)]
pub(super) struct Turns<'a, T> {
    pub(super) cos: &'a [T],
    pub(super) sin: &'a [T],
    /// Length of a row.
    pub(super) pairs: usize,
    /// Whether pairs are neighbours instead of half a head apart.
    pub(super) interleaved: bool,
}

impl<T: Copy + Add<Output = T> + Sub<Output = T> + Mul<Output = T>> Turns<'_, T> {
    /// Turns the first pairs of a head by the angles of row `row`.
    pub(super) fn turn(&self, head: &mut [T], row: i64) -> Result<()> {
        let n = self.pairs;
        let at = usize::try_from(row)
            .ok()
            .and_then(|row| row.checked_mul(n))
            .filter(|at| at.checked_add(n).is_some_and(|end| end <= self.cos.len().min(self.sin.len())));
        let Some(at) = at else {
            let rows = self.cos.len().min(self.sin.len()).checked_div(n).unwrap_or(0);
            return Err(Error::invalid_input(format!("position {row}; there are cosines of {rows}")));
        };
        let turns = self.cos[at..][..n].iter().zip(&self.sin[at..][..n]);
        let turn = |u: &mut T, v: &mut T, c: T, s: T| (*u, *v) = (c * *u - s * *v, s * *u + c * *v);
        let head = &mut head[..2 * n];
        if self.interleaved {
            for (pair, (&c, &s)) in head.chunks_exact_mut(2).zip(turns) {
                let (u, v) = pair.split_at_mut(1);
                turn(&mut u[0], &mut v[0], c, s);
            }
        } else {
            let (u, v) = head.split_at_mut(n);
            for ((u, v), (&c, &s)) in u.iter_mut().zip(v).zip(turns) {
                turn(u, v, c, s);
            }
        }
        Ok(())
    }
}

impl RotaryEmbedding {
    /// Which operands hold cosines, sines and positions.
    fn operands(&self) -> [usize; 3] {
        if self.microsoft { [2, 3, 1] } else { [1, 2, 3] }
    }

    /// `columns` are those of the cosines.
    fn layout(&self, dims: &[usize], columns: Option<usize>) -> Result<Layout> {
        match *dims {
            [b, h, t, d] => Ok(Layout { sizes: [b, h, t, d], strides: [h * t * d, t * d, d] }),
            [b, t, hidden] => {
                let heads = match (self.heads, columns) {
                    // All of a head turns where its size is not said.
                    (0, Some(n)) if self.microsoft && self.size == 0 && n > 0 => hidden / (2 * n),
                    (heads, _) => heads,
                };
                if heads == 0 || !hidden.is_multiple_of(heads) {
                    return Err(Error::shape(format!("{hidden} elements cannot be cut into {heads} heads")));
                }
                let d = hidden / heads;
                Ok(Layout { sizes: [b, heads, t, d], strides: [t * hidden, d, hidden] })
            }
            _ => Err(Error::shape(format!("x is of shape {dims:?}; rank 3 or 4 was wanted"))),
        }
    }

    /// Elements that turn.
    fn turning(&self, head: usize) -> Result<usize> {
        let n = if self.size == 0 { head } else { self.size };
        if n > head || n % 2 != 0 {
            return Err(Error::shape(format!("{n} of {head} elements cannot turn in pairs")));
        }
        Ok(n)
    }
}

impl Operator for RotaryEmbedding {
    fn name(&self) -> &'static str {
        if self.microsoft { "com.microsoft.RotaryEmbedding" } else { "RotaryEmbedding" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let [cos, sin, ids] = self.operands();
        let (cos, sin) = (cx.input(cos)?.dims(), cx.input(sin)?.dims());
        if self.microsoft {
            cx.input(ids)?;
        }
        if let (Some(dims), Some(columns)) = (x.dims(), cos.as_ref().map(|c| c.last().copied())) {
            let [b, _, t, d] = self.layout(&dims, columns)?.sizes;
            let pairs = self.turning(d)? / 2;
            let numbered = cx.optional(ids).is_some();
            for table in [cos, sin].into_iter().flatten() {
                let fits = if numbered {
                    table.len() == 2 && table[1] == pairs
                } else {
                    matches!(table.as_slice(), &[n, p, c] if (n == b || n == 1) && (p, c) == (t, pairs))
                };
                if !fits {
                    return Err(Error::shape(format!(
                        "cosines or sines of shape {table:?} for {pairs} pairs of {dims:?}"
                    )));
                }
            }
            let first_only = |ids: &[usize]| self.microsoft && matches!(ids, [] | [1]);
            let ids = cx.optional(ids).and_then(Fact::dims);
            if let Some(ids) = ids.filter(|i| i.as_slice() != [b, t] && !first_only(i)) {
                return Err(Error::shape(format!("the positions are of shape {ids:?}; [{b}, {t}] was wanted")));
            }
        }
        cx.results(vec![Fact { content: Default::default(), ..x.clone() }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let [cos, sin, ids] = self.operands();
        let (x, cos, sin) = (io.optional(0), io.input(cos)?, io.input(sin)?);
        let ids = io.optional(ids).map(|i| i.to_i64s()).transpose()?;
        let y = io.output(0)?;
        let Layout { sizes: [batch, heads, positions, d], strides } = self.layout(y.dims, cos.dims.last().copied())?;
        let pairs = self.turning(d)? / 2;
        // Exporters leave the turns of all batches to one, which torch broadcasts.
        let shared = cos.dims.first() == Some(&1);
        let row = |b: usize, t: usize| match ids.as_deref() {
            None => (if shared { t } else { b * positions + t }) as i64,
            Some(&[first]) => first.saturating_add(t as i64),
            Some(ids) => ids[b * positions + t],
        };
        for_dtype!(y.dtype, [F32, F64], T => {
            let turns =
                Turns { cos: cos.as_slice::<T>()?, sin: sin.as_slice::<T>()?, pairs, interleaved: self.interleaved };
            let y = y.as_slice::<T>()?;
            if let Some(x) = x {
                y.copy_from_slice(x.as_slice::<T>()?);
            }
            for b in 0..batch {
                for t in 0..positions {
                    for h in 0..heads {
                        let at = b * strides[0] + h * strides[1] + t * strides[2];
                        turns.turn(&mut y[at..][..d], row(b, t))?;
                    }
                }
            }
            Ok(())
        }, else Err(wrong_dtype("x", y.dtype, "float32 and float64")))
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn a_quarter_turn() {
        let x = f32s(&[1, 1, 1, 4], &[1.0, 2.0, 3.0, 4.0]);
        let (cos, sin) = (f32s(&[1, 2], &[0.0, 1.0]), f32s(&[1, 2], &[1.0, 0.0]));
        let inputs = [x.clone(), cos.clone(), sin.clone(), i64s(&[1, 1], &[0])];
        let y = OneNode::new("RotaryEmbedding").run(&inputs).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-3.0, 2.0, 1.0, 4.0]);
        let y = OneNode::new("RotaryEmbedding").int("interleaved", 1).run(&inputs).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-2.0, 1.0, 3.0, 4.0]);
        let e = OneNode::new("RotaryEmbedding").run(&[x, cos, sin, i64s(&[1, 1], &[1])]).unwrap_err();
        assert!(e.message.contains("position 1"), "{e}");
    }

    #[test]
    fn turns_of_one_batch_serve_all() {
        let x = f32s(&[2, 1, 1, 2], &[1.0, 2.0, 3.0, 4.0]);
        let y = OneNode::new("RotaryEmbedding").run(&[x, f32s(&[1, 1, 1], &[0.0]), f32s(&[1, 1, 1], &[1.0])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-2.0, 1.0, -4.0, 3.0]);
    }

    #[test]
    fn onnxruntime_form_begins_at_a_position() {
        let x = f32s(&[1, 2, 4], &[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
        let (cos, sin) = (f32s(&[3, 1], &[1.0, 0.0, -1.0]), f32s(&[3, 1], &[0.0, 1.0, 0.0]));
        let node = || OneNode::new("RotaryEmbedding").domain("com.microsoft");
        let y = node().run(&[x.clone(), i64s(&[1], &[1]), cos.clone(), sin.clone()]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-2.0, 1.0, -4.0, 3.0, -1.0, -2.0, -3.0, -4.0]);
        let y = node().run(&[x.clone(), i64s(&[1, 2], &[2, 0]), cos.clone(), sin.clone()]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-1.0, -2.0, -3.0, -4.0, 1.0, 2.0, 3.0, 4.0]);
        for bad in [i64::MAX, -1, 2] {
            let e = node().run(&[x.clone(), i64s(&[1], &[bad]), cos.clone(), sin.clone()]).unwrap_err();
            assert!(e.message.contains("there are cosines of 3"), "{e}");
        }
    }
}
