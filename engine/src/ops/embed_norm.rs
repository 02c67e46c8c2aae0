//! onnxruntime's EmbedLayerNormalization: the first layer of encoders such as BERT.

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::{DType, TensorView};
use weblane_kernels::norm::{Affine, Normalize, Statistics, normalize};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("EmbedLayerNormalization", parse)];

/// Operands: words `[batch, positions]`, segments of the same shape or none, the rows of words, positions and segments
/// `[rows, size]`, scale, bias, a mask and the numbers of the positions, both `[batch, positions]` or none. Results: y
/// `[batch, positions, size]`, how many positions of each batch the mask keeps, and the sum before it was normalised.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedLayerNormalization {
    epsilon: f32,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let epsilon = a.float_or("epsilon", 1e-12)?;
    let kind = a.int_or("mask_index_type", 0)?;
    if kind != 0 {
        return Err(Error::unsupported_attribute(format!("attribute mask_index_type is {kind}; 0 can be computed")));
    }
    if a.has_input(1) != a.has_input(4) {
        return Err(Error::invalid_model("segments and their rows (operands 1 and 4) come together"));
    }
    Ok(EmbedLayerNormalization { epsilon }.into())
}

/// Row `i` of a table; `what` it is of.
fn row<'a>(table: &'a [f32], size: usize, i: i64, what: &str) -> Result<&'a [f32]> {
    let at = usize::try_from(i).ok().and_then(|i| i.checked_mul(size));
    at.and_then(|at| table.get(at..at.checked_add(size)?)).ok_or_else(|| {
        let rows = table.len().checked_div(size).unwrap_or(0);
        Error::invalid_input(format!("{what} {i}; there are rows for {rows}"))
    })
}

impl Operator for EmbedLayerNormalization {
    fn name(&self) -> &'static str {
        "com.microsoft.EmbedLayerNormalization"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (ids, words) = (cx.input(0)?, cx.input(2)?);
        let kept = |b: Dim| Fact::with_shape(DType::I32, std::iter::once(b).collect());
        let Some(shape) = ids.shape.as_deref() else {
            let y = Fact::of_rank(words.dtype, 3);
            return cx.results(vec![y.clone(), Fact::of_rank(DType::I32, 1), y]);
        };
        let [b, t] = shape else {
            return Err(Error::shape(format!("words of shape {}; rank 2 was wanted", ids.shape_text())));
        };
        let size = words.dims().and_then(|d| d.last().copied());
        for i in [2, 3, 4] {
            if let Some(dims) = cx.optional(i).and_then(Fact::dims)
                && (dims.len() != 2 || Some(dims[1]) != size)
            {
                return Err(Error::shape(format!("operand {i} is of shape {dims:?}; [rows, {size:?}] was wanted")));
            }
        }
        for i in [5, 6] {
            if let (Some(dims), Some(size)) = (cx.input(i)?.dims(), size)
                && dims.as_slice() != [size]
            {
                return Err(Error::shape(format!("operand {i} is of shape {dims:?}; [{size}] was wanted")));
            }
        }
        for i in [1, 7, 8] {
            if let (Some(ids), Some(own)) = (ids.dims(), cx.optional(i).and_then(Fact::dims))
                && ids != own
                // Positions may be those of all batches.
                && !(i == 8 && own.as_slice() == [1, ids[1]])
            {
                return Err(Error::shape(format!("operand {i} is of shape {own:?}; {ids:?} was wanted")));
            }
        }
        let y: Shape = [b.clone(), t.clone(), size.map_or(Dim::Unknown, Dim::Known)].into_iter().collect();
        let y = Fact::with_shape(words.dtype, y);
        cx.results(vec![y.clone(), kept(b.clone()), y])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let words = io.input(2)?;
        if words.dtype != DType::F32 {
            return Err(wrong_dtype("the rows of words", words.dtype, "float32"));
        }
        let numbers = |t: Option<TensorView>| t.map(|t| t.to_i64s()).transpose();
        let ids = io.input(0)?;
        let &[batch, positions] = ids.dims else { return Err(Error::shape("words are not of rank 2")) };
        let ids = ids.to_i64s()?;
        let [segments, mask, places] = [1, 7, 8].map(|i| numbers(io.optional(i)));
        let (segments, mask, places) = (segments?, mask?, places?);
        let (words, of_place) = (words.as_slice::<f32>()?, io.slice::<f32>(3)?);
        let of_segment = io.optional(4).map(|t| t.as_slice::<f32>()).transpose()?.unwrap_or(&[]);
        let (scale, bias) = (io.slice::<f32>(5)?, io.slice::<f32>(6)?);
        let size = scale.len();
        let [y, more @ ..] = &mut *io.outputs else { return Err(Error::internal("a result has no buffer")) };
        let y = y.as_slice::<f32>()?;
        for (i, (y, &id)) in y.chunks_exact_mut(size.max(1)).zip(&ids).enumerate() {
            let place = match &places {
                None => (i % positions) as i64,
                Some(places) => places[i % places.len().max(1)],
            };
            let (word, place) = (row(words, size, id, "word")?, row(of_place, size, place, "position")?);
            y.iter_mut().zip(word.iter().zip(place)).for_each(|(y, (w, p))| *y = w + p);
            if let Some(segments) = &segments {
                let segment = row(of_segment, size, segments[i], "segment")?;
                y.iter_mut().zip(segment).for_each(|(y, s)| *y += s);
            }
        }
        if let Some(kept) = more.first_mut() {
            let of = |b: usize| match &mask {
                None => 0,
                Some(mask) => mask[b * positions..][..positions].iter().filter(|&&m| m == 1).count() as i32,
            };
            kept.as_slice::<i32>()?.iter_mut().zip(0..batch).for_each(|(kept, b)| *kept = of(b));
        }
        if let Some(sum) = more.get_mut(1) {
            let sum = sum.as_slice::<f32>()?;
            // A result that nobody named has no buffer.
            if sum.len() == y.len() {
                sum.copy_from_slice(y);
            }
        }
        let affine = Affine::PerElement;
        let p =
            Normalize { n: size, epsilon: self.epsilon, center: true, scale: Some(scale), bias: Some(bias), affine };
        Ok(normalize(cx, &p, None, y, Statistics::default())?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn sums_rows_and_counts_the_mask() {
        let i32s = |values: &[i32]| Tensor::from_slice(&[1, 2], values).unwrap();
        let (words, places) = (f32s(&[2, 2], &[0.0, 1.0, 2.0, 5.0]), f32s(&[2, 2], &[0.0, 0.0, 1.0, 1.0]));
        let segments = f32s(&[1, 2], &[1.0, 2.0]);
        let norm = [f32s(&[2], &[1.0, 1.0]), f32s(&[2], &[0.0, 10.0])];
        let [scale, bias] = norm;
        let inputs = |words_of: &[i32]| {
            let first = [i32s(words_of), i32s(&[0, 0]), words.clone(), places.clone(), segments.clone()];
            let rest = [scale.clone(), bias.clone(), i32s(&[1, 0])];
            first.into_iter().chain(rest).collect::<Vec<_>>()
        };
        let node = || OneNode::new("EmbedLayerNormalization").domain("com.microsoft").outputs(3);
        let y = node().run(&inputs(&[1, 0])).unwrap();
        assert_eq!(y[2].as_slice::<f32>().unwrap(), [3.0, 7.0, 2.0, 4.0]);
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-1.0, 11.0, -1.0, 11.0]);
        assert_eq!((y[1].dims(), y[1].as_slice::<i32>().unwrap()), (&[1][..], &[1][..]));
        let e = node().run(&inputs(&[0, 2])).unwrap_err();
        assert!(e.message.contains("word 2; there are rows for 2"), "{e}");
        let e = node().run(&inputs(&[0, -1])).unwrap_err();
        assert!(e.message.contains("word -1"), "{e}");
    }
}
