//! RotaryEmbedding: pairs of elements turned by an angle that grows with the position (Su et al., 2021).

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::for_dtype;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("RotaryEmbedding", 23, parse)];

/// Operands: x `[batch, heads, positions, size]` or `[batch, positions, heads * size]`, cosines, sines, and the numbers of
/// the positions; without them cosines and sines are `[batch, positions, pairs]`, with them `[rows, pairs]`.
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    /// Whether pairs are neighbours instead of half a head apart.
    pub interleaved: bool,
    /// Heads of operands of rank 3.
    pub heads: usize,
    /// Elements of a head that turn; 0 for all.
    pub size: usize,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let mut count = |name: &str| {
        let n = a.int_or(name, 0)?;
        usize::try_from(n).map_err(|_| Error::unsupported_attribute(format!("attribute {name} is {n}")))
    };
    let (heads, size) = (count("num_heads")?, count("rotary_embedding_dim")?);
    Ok(RotaryEmbedding { interleaved: a.flag_or("interleaved", false)?, heads, size }.into())
}

/// Batch, heads, positions, size of a head, and strides of the first three.
struct Layout {
    sizes: [usize; 4],
    strides: [usize; 3],
}

impl RotaryEmbedding {
    fn layout(&self, dims: &[usize]) -> Result<Layout> {
        match *dims {
            [b, h, t, d] => Ok(Layout { sizes: [b, h, t, d], strides: [h * t * d, t * d, d] }),
            [b, t, hidden] if self.heads > 0 && hidden % self.heads == 0 => {
                let d = hidden / self.heads;
                Ok(Layout { sizes: [b, self.heads, t, d], strides: [t * hidden, d, hidden] })
            }
            _ => Err(Error::shape(format!(
                "x is of shape {dims:?} with {} heads; rank 4, or 3 and a number of heads that \
                                           divides the last axis, was wanted",
                self.heads
            ))),
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
        "RotaryEmbedding"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if let Some(dims) = x.dims() {
            let [b, _, t, d] = self.layout(&dims)?.sizes;
            let pairs = self.turning(d)? / 2;
            let (cos, sin) = (cx.input(1)?.dims(), cx.input(2)?.dims());
            let numbered = cx.optional(3).is_some();
            for table in [cos, sin].into_iter().flatten() {
                let fits =
                    if numbered { table.len() == 2 && table[1] == pairs } else { table.as_slice() == [b, t, pairs] };
                if !fits {
                    return Err(Error::shape(format!(
                        "cosines or sines of shape {table:?} for {pairs} pairs of {dims:?}"
                    )));
                }
            }
            if let Some(ids) = cx.optional(3).and_then(Fact::dims).filter(|i| i.as_slice() != [b, t]) {
                return Err(Error::shape(format!("the positions are of shape {ids:?}; [{b}, {t}] was wanted")));
            }
        }
        cx.results(vec![Fact { content: Default::default(), ..x.clone() }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (x, cos, sin) = (io.input(0)?, io.input(1)?, io.input(2)?);
        let Layout { sizes: [batch, heads, positions, d], strides } = self.layout(x.dims)?;
        let n = self.turning(d)?;
        let pairs = n / 2;
        let ids = io.optional(3).map(|i| i.to_i64s()).transpose()?;
        let rows = cos.len().min(sin.len()).checked_div(pairs).unwrap_or(0);
        for_dtype!(x.dtype, [F32, F64], T => {
            let (x, cos, sin) = (x.as_slice::<T>()?, cos.as_slice::<T>()?, sin.as_slice::<T>()?);
            let y = io.output(0)?.as_slice::<T>()?;
            y.copy_from_slice(x);
            for b in 0..batch {
                for t in 0..positions {
                    let row = match &ids {
                        None => b * positions + t,
                        Some(ids) => usize::try_from(ids[b * positions + t]).unwrap_or(usize::MAX),
                    };
                    if row >= rows && pairs > 0 {
                        return Err(Error::invalid_input(format!("position {row}; there are cosines of {rows}")));
                    }
                    for h in 0..heads {
                        let at = b * strides[0] + h * strides[1] + t * strides[2];
                        for p in 0..pairs {
                            let (i, j) = if self.interleaved { (2 * p, 2 * p + 1) } else { (p, p + pairs) };
                            let (u, v) = (x[at + i], x[at + j]);
                            let (c, s) = (cos[row * pairs + p], sin[row * pairs + p]);
                            y[at + i] = c * u - s * v;
                            y[at + j] = s * u + c * v;
                        }
                    }
                }
            }
            Ok(())
        }, else Err(wrong_dtype("x", x.dtype, "float32 and float64")))
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
}
