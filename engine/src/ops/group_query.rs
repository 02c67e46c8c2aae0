//! onnxruntime's GroupQueryAttention, the attention of decoders that generate text: fewer heads of keys and values than of
//! queries (Ainslie et al., 2023), a cache of them, and positions that turn queries and keys.

use super::attention::{Form, Sizes, agree, head_count, mask_strides, result_shape};
use super::rotary::Turns;
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::tensor::{DType, TensorView, element_count};
use std::ops::Range;
use weblane_kernels::attention::{Attention as Kernel, Heads, Mask, Visible, attention};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("GroupQueryAttention", parse)];

const PAST: [usize; 2] = [3, 4];
const LAST_KEYS: usize = 5;
const TOTAL: usize = 6;
const COSINES: usize = 7;
const SINES: usize = 8;
const POSITIONS: usize = 9;
const BIAS: usize = 10;
const SINKS: usize = 11;

/// Operands: q `[batch, positions, heads * size]` with k and v `[batch, positions, kv_heads * size]`, or all three side by
/// side in q; past keys and values `[batch, kv_heads, positions, size]`; the place of each batch's last key; the most keys
/// of any batch; cosines and sines `[rows, pairs]`; numbers of the positions; numbers added to the scores; sinks.
/// Results: y, present keys and values, as long as the past if all keys fit there.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupQueryAttention {
    heads: usize,
    kv_heads: usize,
    /// Factor of the scores, by default one over the square root of the head size.
    scale: Option<f32>,
    /// Scores are capped softly if it is not 0.
    cap: f32,
    /// How many keys a query sees, its own among them.
    window: Option<usize>,
    /// Whether queries and keys turn, and if pairs of neighbours do.
    rotary: Option<bool>,
    /// Whether softmax takes a score of 0 more, where the model gives no sinks.
    smooth: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let heads = head_count(a.required("num_heads", Attributes::int)?, "num_heads")?;
    let kv_heads = head_count(a.required("kv_num_heads", Attributes::int)?, "kv_num_heads")?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(Error::invalid_model(format!("{heads} heads of q cannot share {kv_heads} of k and v")));
    }
    let (scale, cap) = (a.float_or("scale", 0.0)?, a.float_or("softcap", 0.0)?);
    let window = a.int_or("local_window_size", -1)?;
    let interleaved = a.flag_or("rotary_interleaved", false)?;
    let rotary = a.flag_or("do_rotary", false)?.then_some(interleaved);
    let smooth = a.flag_or("smooth_softmax", false)?;
    for name in ["k_quant_type", "v_quant_type"] {
        a.choice(name, &[("NONE", ())])?;
    }
    for name in ["qk_output", "kv_cache_bit_width"] {
        let n = a.int_or(name, 0)?;
        if n != 0 {
            return Err(Error::unsupported_attribute(format!("attribute {name} is {n}; 0 can be computed")));
        }
    }
    for i in SINKS + 1..a.input_count() {
        if a.has_input(i) {
            let what = if i < 14 { "a scale of a quantised cache" } else { "of a norm of q or k" };
            return Err(Error::unsupported_attribute(format!("operand {i}, {what}, cannot be computed")));
        }
    }
    let pair = |a: &Attributes, x: usize, y: usize, what: &str| match a.has_input(x) == a.has_input(y) {
        true => Ok(()),
        false => Err(Error::invalid_model(format!("{what} (operands {x} and {y}) come together"))),
    };
    pair(a, 1, 2, "keys and values")?;
    pair(a, PAST[0], PAST[1], "past keys and values")?;
    pair(a, COSINES, SINES, "cosines and sines")?;
    if rotary.is_some() && !a.has_input(COSINES) {
        return Err(Error::invalid_model(format!("do_rotary is 1 and there are no cosines (operand {COSINES})")));
    }
    if a.output_count() > 3 {
        return Err(Error::unsupported_attribute("the scores (result 3) cannot be computed"));
    }
    let window = match (window, usize::try_from(window)) {
        (-1, _) => None,
        (1.., Ok(window)) => Some(window),
        _ => {
            let what = format!("attribute local_window_size is {window}; -1 or at least 1 was wanted");
            return Err(Error::unsupported_attribute(what));
        }
    };
    let scale = (scale != 0.0).then_some(scale);
    Ok(GroupQueryAttention { heads, kv_heads, scale, cap: cap.max(0.0), window, rotary, smooth }.into())
}

/// The number of keys that operand 6 holds.
fn total_of(numbers: &[i64]) -> Result<usize> {
    match numbers {
        [n] => usize::try_from(*n).map_err(|_| Error::invalid_input(format!("{n} keys in all"))),
        _ => Err(Error::shape(format!("operand {TOTAL}, the number of all keys, has {} elements", numbers.len()))),
    }
}

impl GroupQueryAttention {
    /// Size of a head of so many columns of q, which hold k and v too if they are `packed`.
    fn size(&self, columns: usize, packed: bool) -> Result<usize> {
        let heads = if packed { self.heads + 2 * self.kv_heads } else { self.heads };
        match columns > 0 && columns.is_multiple_of(heads) {
            true => Ok(columns / heads),
            false => Err(Error::shape(format!("{columns} columns of q cannot be cut into {heads} heads"))),
        }
    }
}

/// One row of each head of an operand, in the order of batches, positions and heads.
fn rows(x: &[f32], width: usize, first: usize, s: Sizes) -> impl Iterator<Item = (usize, usize, usize, &[f32])> {
    (0..s.batch * s.positions).flat_map(move |r| {
        let row = &x[r * width + first..][..s.heads * s.size];
        (0..s.heads).map(move |h| (r / s.positions, r % s.positions, h, &row[h * s.size..][..s.size]))
    })
}

impl Operator for GroupQueryAttention {
    fn name(&self) -> &'static str {
        "com.microsoft.GroupQueryAttention"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let q = cx.input(0)?;
        let packed = cx.optional(1).is_none();
        cx.input(LAST_KEYS)?;
        let total = cx.input(TOTAL)?.i64s().map(|n| total_of(&n)).transpose()?;
        let (b, t, columns) = match q.shape.as_deref() {
            None => return cx.results(vec![Fact::of_dtype(q.dtype); 3]),
            Some([b, t, columns]) => (b, t, columns),
            Some(_) => return Err(Error::shape(format!("q is {}; rank 3 was wanted", q.shape_text()))),
        };
        let size = columns.known().map(|n| self.size(n, packed)).transpose()?;
        let size = size.map_or(Dim::Unknown, Dim::Known);
        for i in [1, 2] {
            let Some(shape) = cx.optional(i).and_then(|f| f.shape.as_deref()) else { continue };
            let [kb, kt, n] = shape else { return Err(Error::shape(format!("operand {i} must be of rank 3"))) };
            agree("batches of q and of k or v", b, kb)?;
            agree("positions of q and of k or v", t, kt)?;
            let own = n.known().map(|n| if n.is_multiple_of(self.kv_heads) { n / self.kv_heads } else { 0 });
            agree("sizes of the heads of q and of k or v", &size, &own.map_or(Dim::Unknown, Dim::Known))?;
        }
        let mut before = if cx.optional(PAST[0]).is_some() { Dim::Unknown } else { Dim::Known(0) };
        for i in PAST {
            let Some(past) = cx.optional(i) else { continue };
            before = match past.shape.as_deref() {
                None => continue,
                Some([pb, h, p, d]) => {
                    agree("batches of q and the past", b, pb)?;
                    agree("heads of the past", h, &Dim::Known(self.kv_heads))?;
                    agree("sizes of the heads of q and the past", &size, d)?;
                    agree("positions of past keys and values", &before, p)?;
                    p.clone()
                }
                Some(_) => return Err(Error::shape(format!("the past is {}; rank 4 was wanted", past.shape_text()))),
            };
        }
        let keys = before.known().zip(total).map_or(Dim::Unknown, |(p, n)| Dim::Known(p.max(n)));
        let y =
            Fact::with_shape(q.dtype, result_shape(Form::HeadsInside, b.clone(), self.heads, t.clone(), size.clone()));
        let present = [b.clone(), Dim::Known(self.kv_heads), keys, size];
        let present = Fact::with_shape(q.dtype, present.into_iter().collect());
        cx.results(vec![y, present.clone(), present])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let q = io.input(0)?;
        if q.dtype != DType::F32 {
            return Err(wrong_dtype("q", q.dtype, "float32"));
        }
        let &[batch, positions, width] = q.dims else {
            return Err(Error::shape(format!("q is of shape {:?}; rank 3 was wanted", q.dims)));
        };
        let packed = io.optional(1).is_none();
        let size = self.size(width, packed)?;
        let q = q.as_slice::<f32>()?;
        let sizes = |heads: usize| Sizes { batch, heads, positions, size };
        let (qs, ks) = (sizes(self.heads), sizes(self.kv_heads));
        // Elements, columns of a row, and the first column.
        let parts = match (io.optional(1), io.optional(2)) {
            (Some(k), Some(v)) => {
                let width = self.kv_heads * size;
                [(k.as_slice::<f32>()?, width, 0), (v.as_slice::<f32>()?, width, 0)]
            }
            _ => [(q, width, self.heads * size), (q, width, (self.heads + self.kv_heads) * size)],
        };
        let total = total_of(&io.input(TOTAL)?.to_i64s()?)?;
        let pasts = PAST.map(|i| io.optional(i));
        let before = pasts[0].map_or(0, |p| p.dims[2]);
        let room = before.max(total);
        let [first, ends] = self.spans(&io.input(LAST_KEYS)?.to_i64s()?, [batch, positions, before, total])?;
        let ids = io.optional(POSITIONS).map(|i| i.to_i64s()).transpose()?;
        if let Some(ids) = ids.as_ref().filter(|ids| ids.len() != batch * positions) {
            return Err(Error::shape(format!("{} numbers of positions; {} were wanted", ids.len(), batch * positions)));
        }
        // A prompt reads the first of them only, as onnxruntime's documentation says.
        let row = |b: usize, t: usize| match &ids {
            None => (first[b] + t) as i64,
            Some(ids) if positions == total => ids[0].saturating_add(t as i64),
            Some(ids) => ids[b * positions + t],
        };
        let turns = match self.rotary {
            None => None,
            Some(interleaved) => {
                let (cos, sin) = (io.input(COSINES)?, io.input(SINES)?);
                let pairs = cos.dims.last().copied().unwrap_or(0);
                if sin.dims != cos.dims || 2 * pairs > size {
                    let (cos, sin) = (cos.dims, sin.dims);
                    return Err(Error::shape(format!(
                        "cosines {cos:?} and sines {sin:?} for heads of {size} elements"
                    )));
                }
                Some(Turns { cos: cos.as_slice::<f32>()?, sin: sin.as_slice::<f32>()?, pairs, interleaved })
            }
        };
        let mask = match io.optional(BIAS) {
            None => None,
            Some(m) if m.dims.last() == Some(&total) => {
                let strides = mask_strides(m.dims, [batch, self.heads, positions])?;
                Some(Mask { data: m.as_slice::<f32>()?, strides, keys: total, replaces: false })
            }
            Some(m) => return Err(Error::shape(format!("a bias of shape {:?} for {total} keys", m.dims))),
        };
        let zeros = vec![0.0; if self.smooth { self.heads } else { 0 }];
        let sinks = match io.optional(SINKS) {
            None => self.smooth.then_some(zeros.as_slice()),
            Some(s) => Some(s.as_slice::<f32>()?),
        };

        let [y, present @ ..] = &mut *io.outputs else { return Err(Error::internal("a result has no buffer")) };
        let count = element_count(&[batch, self.kv_heads, room, size])?;
        let mut own = [Vec::new(), Vec::new()];
        let mut named = present.iter_mut();
        let mut caches: [&mut [f32]; 2] = [&mut [], &mut []];
        for (i, own) in own.iter_mut().enumerate() {
            let cache = match named.next().map(|p| p.as_slice::<f32>()).transpose()? {
                Some(p) if p.len() == count => p,
                // A result that nobody named has no buffer.
                None | Some([]) => {
                    let full = |_| Error::out_of_memory(format!("a cache of {count} numbers"));
                    own.try_reserve_exact(count).map_err(full)?;
                    own.resize(count, 0.0);
                    own
                }
                Some(p) => return Err(Error::internal(format!("a present of {} numbers for {count}", p.len()))),
            };
            fill(cache, pasts[i], parts[i], ks, room, &first)?;
            caches[i] = cache;
        }
        let [k, v] = caches;
        if let Some(turns) = &turns {
            for (b, keys) in k.chunks_exact_mut((self.kv_heads * room * size).max(1)).enumerate() {
                for head in keys.chunks_exact_mut((room * size).max(1)) {
                    for (t, key) in head[first[b] * size..].chunks_exact_mut(size).take(positions).enumerate() {
                        turns.turn(key, row(b, t))?;
                    }
                }
            }
        }
        let visible = |b: usize, i: usize| -> Range<usize> {
            let end = first[b] + i + 1;
            self.window.map_or(0, |w| end.saturating_sub(w)).min(ends[b])..end.min(ends[b])
        };
        let strides = Form::HeadsFirst.strides(Sizes { positions: room, ..ks });
        let attend = |q: Heads, y: &mut [f32]| -> Result<()> {
            let a = Kernel {
                batch,
                heads: self.heads,
                kv_heads: self.kv_heads,
                queries: positions,
                keys: total,
                size,
                value_size: size,
                q,
                k: Heads { data: k, strides },
                v: Heads { data: v, strides },
                scale: self.scale.unwrap_or(1.0 / (size as f32).sqrt()),
                cap: self.cap,
                mask,
                visible: Some(&visible as Visible),
                unseen: 0.0,
                sinks,
                y_strides: Form::HeadsInside.strides(qs),
            };
            Ok(attention(cx, &a, y)?)
        };
        let y = y.as_slice::<f32>()?;
        let Some(turns) = turns else {
            return attend(Heads { data: q, strides: [positions * width, size, width] }, y);
        };
        cx.with_workspace(y.len(), |turned| {
            for ((b, t, _, head), to) in rows(q, width, 0, qs).zip(turned.chunks_exact_mut(size)) {
                to.copy_from_slice(head);
                turns.turn(to, row(b, t))?;
            }
            attend(Heads { data: turned, strides: Form::HeadsInside.strides(qs) }, y)
        })
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[TOTAL]
    }
}

impl GroupQueryAttention {
    /// For each batch where the new keys begin, and where its keys end. A prompt, whose positions are all there are, begins
    /// at 0 and may end before its last position.
    fn spans(&self, last: &[i64], [batch, positions, before, total]: [usize; 4]) -> Result<[Vec<usize>; 2]> {
        if last.len() != batch {
            let n = last.len();
            return Err(Error::shape(format!(
                "operand {LAST_KEYS} has {n} elements; one per batch ({batch}) was wanted"
            )));
        }
        let (mut first, mut ends) = (Vec::with_capacity(batch), Vec::with_capacity(batch));
        for &last in last {
            let end = usize::try_from(last).ok().and_then(|n| n.checked_add(1)).filter(|n| *n <= total);
            let begin = if positions == total { Some(0) } else { end.and_then(|end| end.checked_sub(positions)) };
            match (begin, end) {
                (Some(begin), Some(end)) if begin <= before => {
                    first.push(begin);
                    ends.push(end);
                }
                _ => {
                    return Err(Error::invalid_input(format!(
                        "the last key is at {last} (operand {LAST_KEYS}), with {positions} new positions, a past of \
                         {before} and {total} keys in all (operand {TOTAL})"
                    )));
                }
            }
        }
        Ok([first, ends])
    }
}

/// The keys or values of each batch's past with the new ones behind, and zeros after them.
fn fill(
    cache: &mut [f32],
    past: Option<TensorView>,
    (x, width, column): (&[f32], usize, usize),
    s: Sizes,
    room: usize,
    first: &[usize],
) -> Result<()> {
    let before = past.map_or(0, |p| p.dims[2]);
    let past = past.map(|p| p.as_slice::<f32>()).transpose()?.unwrap_or(&[]);
    let head = room * s.size;
    for (i, to) in cache.chunks_exact_mut(head.max(1)).enumerate() {
        let kept = first[i / s.heads] * s.size;
        to[..kept].copy_from_slice(&past[i * before * s.size..][..kept]);
        to[kept..].fill(0.0);
    }
    for (b, t, h, row) in rows(x, width, column, s) {
        cache[(b * s.heads + h) * head + (first[b] + t) * s.size..][..s.size].copy_from_slice(row);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    // Numbers beside onnxruntime's are a family of `models/contrib.py`.

    /// Queries, keys and values of two positions, two heads and one of keys, heads of 2; then where the last key is, and the
    /// keys in all.
    fn operands(last: i32, total: i32) -> Vec<Option<Tensor>> {
        let q = f32s(&[1, 2, 4], &[0.0; 8]);
        let (k, v) = (f32s(&[1, 2, 2], &[1.0, 2.0, 3.0, 4.0]), f32s(&[1, 2, 2], &[2.0, 4.0, 6.0, 8.0]));
        let (last, total) = (Tensor::from_slice(&[1], &[last]).unwrap(), Tensor::from_slice(&[], &[total]).unwrap());
        vec![Some(q), Some(k), Some(v), None, None, Some(last), Some(total)]
    }

    fn node() -> OneNode {
        OneNode::new("GroupQueryAttention")
            .domain("com.microsoft")
            .int("num_heads", 2)
            .int("kv_num_heads", 1)
            .outputs(3)
    }

    #[test]
    fn a_prompt_and_a_step() {
        let y = node().run_optional(&operands(1, 2)).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [2.0, 4.0, 2.0, 4.0, 4.0, 6.0, 4.0, 6.0]);
        assert_eq!((y[1].dims(), y[1].as_slice::<f32>().unwrap()), (&[1, 1, 2, 2][..], &[1.0, 2.0, 3.0, 4.0][..]));
        let mut step = operands(2, 3);
        (step[3], step[4]) = (Some(f32s(&[1, 1, 1, 2], &[9.0, 9.0])), Some(f32s(&[1, 1, 1, 2], &[4.0, 0.0])));
        let y = node().run_optional(&step).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [3.0, 2.0, 3.0, 2.0, 4.0, 4.0, 4.0, 4.0]);
        assert_eq!(y[2].as_slice::<f32>().unwrap(), [4.0, 0.0, 2.0, 4.0, 6.0, 8.0]);
    }

    #[test]
    fn a_cache_with_room_is_filled_behind_its_last_key() {
        let mut step = operands(2, 4);
        let past = Some(f32s(&[1, 1, 5, 2], &[4.0, 0.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0]));
        (step[3], step[4]) = (past.clone(), past);
        let y = node().run_optional(&step).unwrap();
        assert_eq!(y[2].dims(), [1, 1, 5, 2]);
        assert_eq!(y[2].as_slice::<f32>().unwrap(), [4.0, 0.0, 2.0, 4.0, 6.0, 8.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(y[0].as_slice::<f32>().unwrap()[..2], [3.0, 2.0]);
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        for (last, total) in [(2, 2), (-2, 2), (i32::MAX, 2), (0, 3), (1, -1), (5, 9)] {
            let e = node().run_optional(&operands(last, total)).unwrap_err();
            assert!(e.message.contains("keys in all"), "{last} {total}: {e}");
        }
        let e = node().int("kv_num_heads", 2).run_optional(&operands(1, 2)).unwrap_err();
        assert!(e.message.contains("sizes of the heads"), "{e}");
        let e = node().int("local_window_size", 0).run_optional(&operands(1, 2)).unwrap_err();
        assert!(e.message.contains("local_window_size is 0"), "{e}");
        let e = node().int("do_rotary", 1).run_optional(&operands(1, 2)).unwrap_err();
        assert!(e.message.contains("no cosines"), "{e}");
    }
}
