//! Attention (ONNX) and the operator that the optimiser puts for spelled-out attention.

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, broadcast};
use crate::tensor::{DType, Dims, TensorView};
use std::ops::Range;
use weblane_kernels::attention::{Attention as Kernel, Heads, Mask, Visible, attention};
use weblane_kernels::par::Cx;
use weblane_kernels::reference;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Attention", 23, parse)];

/// How heads and positions lie in a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `[batch, heads, positions, size]`.
    HeadsFirst,
    /// `[batch, positions, heads * size]`, or the same bytes as `[batch, positions, heads, size]`.
    HeadsInside,
}

/// Sizes of one operand: batch, heads, positions, size of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) positions: usize,
    pub(super) size: usize,
}

impl Form {
    pub(super) fn sizes(self, what: &str, dims: &[usize], heads: usize) -> Result<Sizes> {
        match (self, dims) {
            (Form::HeadsFirst, &[batch, heads, positions, size]) => Ok(Sizes { batch, heads, positions, size }),
            (Form::HeadsInside, &[batch, positions, heads, size]) => Ok(Sizes { batch, heads, positions, size }),
            (Form::HeadsInside, &[batch, positions, hidden]) if heads > 0 && hidden % heads == 0 => {
                Ok(Sizes { batch, heads, positions, size: hidden / heads })
            }
            _ => Err(Error::shape(format!("{what} is of shape {dims:?}, which does not hold {heads} heads"))),
        }
    }

    pub(super) fn strides(self, s: Sizes) -> [usize; 3] {
        let all = s.heads * s.positions * s.size;
        match self {
            Form::HeadsFirst => [all, s.positions * s.size, s.size],
            Form::HeadsInside => [all, s.size, s.heads * s.size],
        }
    }
}

/// A mask broadcast to `[batch, heads, queries, keys]`: its strides over the first three.
pub(super) fn mask_strides(dims: &[usize], wanted: [usize; 3]) -> Result<[usize; 3]> {
    let refuse = || Error::shape(format!("the mask is of shape {dims:?}; [{wanted:?}, keys] was wanted"));
    let Some((&keys, lead)) = dims.split_last() else { return Err(refuse()) };
    if lead.len() > 3 {
        return Err(refuse());
    }
    let mut strides = [0; 3];
    let mut step = keys;
    for (i, &d) in lead.iter().enumerate().rev() {
        let axis = 3 - lead.len() + i;
        if d != 1 {
            if d != wanted[axis] {
                return Err(refuse());
            }
            strides[axis] = step;
        }
        step *= d;
    }
    Ok(strides)
}

/// `softmax(scale q k^T + mask) v`, set by the optimiser. Operands q, k, v, optional mask that broadcasts against the scores
/// `[batch, heads, queries, keys]`; batch and queries of 1 broadcast against those of the mask too.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedAttention {
    /// Factor of the scores.
    pub scale: f32,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Of q.
    pub q: Form,
    /// Of k.
    pub k: Form,
    /// Of v.
    pub v: Form,
    /// Of the result; `HeadsInside` gives `[batch, queries, heads * size]`.
    pub y: Form,
    /// Whether a query sees only keys at and before its position.
    pub causal: bool,
    /// Whether an element of the mask that is not 0 takes the place of the score instead of being added to it.
    pub replaces: bool,
    /// The result of a query that sees no key: NaN, as softmax says, or the 0 that a model puts in its place.
    pub unseen: f32,
}

/// The dims of batch, positions and head size, as far as they are known.
pub(super) fn parts(form: Form, fact: &Fact, heads: usize) -> Result<Option<[Dim; 3]>> {
    let Some(shape) = &fact.shape else { return Ok(None) };
    let per_head = |d: &Dim| match d.known() {
        Some(n) if heads > 0 && n % heads == 0 => Ok(Dim::Known(n / heads)),
        Some(n) => Err(Error::shape(format!("{n} elements cannot be cut into {heads} heads"))),
        None => Ok(Dim::Unknown),
    };
    match (form, shape.as_slice()) {
        (Form::HeadsFirst, [b, h, t, d]) | (Form::HeadsInside, [b, t, h, d]) => match h.known() {
            Some(n) if n != heads => Err(Error::shape(format!("{} has {n} heads, not {heads}", fact.shape_text()))),
            _ => Ok(Some([b.clone(), t.clone(), d.clone()])),
        },
        (Form::HeadsInside, [b, t, hidden]) => Ok(Some([b.clone(), t.clone(), per_head(hidden)?])),
        _ => Err(Error::shape(format!("an operand is {}; batch, positions and heads were wanted", fact.shape_text()))),
    }
}

pub(super) fn result_shape(form: Form, batch: Dim, heads: usize, positions: Dim, size: Dim) -> Shape {
    match form {
        Form::HeadsFirst => [batch, Dim::Known(heads), positions, size].into_iter().collect(),
        Form::HeadsInside => {
            let hidden = size.known().and_then(|s| s.checked_mul(heads)).map_or(Dim::Unknown, Dim::Known);
            [batch, positions, hidden].into_iter().collect()
        }
    }
}

pub(super) fn agree(what: &str, a: &Dim, b: &Dim) -> Result<()> {
    match (a.known(), b.known()) {
        (Some(a), Some(b)) if a != b => Err(Error::shape(format!("{what}: {a} against {b}"))),
        _ => Ok(()),
    }
}

impl Operator for FusedAttention {
    fn name(&self) -> &'static str {
        "weblane.FusedAttention"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let q = cx.input(0)?;
        let parts_of = |i: usize, form, heads| parts(form, cx.input(i)?, heads);
        let (qp, kp) = (parts_of(0, self.q, self.heads)?, parts_of(1, self.k, self.kv_heads)?);
        let vp = parts_of(2, self.v, self.kv_heads)?;
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::shape(format!("{} heads of q cannot share {} of k and v", self.heads, self.kv_heads)));
        }
        let (Some([b, tq, dq]), Some([kb, tk, dk]), Some([vb, tv, dv])) = (qp, kp, vp) else {
            return cx.results(vec![Fact::of_dtype(q.dtype)]);
        };
        agree("sizes of the heads of q and k", &dq, &dk)?;
        agree("positions of k and v", &tk, &tv)?;
        agree("batches of q and k", &b, &kb)?;
        agree("batches of k and v", &kb, &vb)?;
        let (mut b, mut tq) = (b, tq);
        if let Some(mask) = cx.optional(3) {
            let refuse = || Error::shape(format!("the mask is {}, which does not fit the scores", mask.shape_text()));
            let Some(shape) = &mask.shape else { return cx.results(vec![Fact::of_dtype(q.dtype)]) };
            let (keys, lead) = shape.split_last().filter(|(_, lead)| lead.len() <= 3).ok_or_else(refuse)?;
            if let (Some(keys), Some(tk)) = (keys.known(), tk.known())
                && keys != tk
                && keys != 1
            {
                return Err(refuse());
            }
            let joint = broadcast(&[b, Dim::Known(self.heads), tq], lead)?;
            let [joint_b, heads, joint_tq] = joint.as_slice() else { return Err(refuse()) };
            if heads.known() != Some(self.heads) {
                return Err(refuse());
            }
            (b, tq) = (joint_b.clone(), joint_tq.clone());
        }
        cx.results(vec![Fact::with_shape(q.dtype, result_shape(self.y, b, self.heads, tq, dv))])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (q, k, v) = (io.input(0)?, io.input(1)?, io.input(2)?);
        if q.dtype != DType::F32 {
            return Err(wrong_dtype("q", q.dtype, "float32"));
        }
        let qs = self.q.sizes("q", q.dims, self.heads)?;
        let (ks, vs) = (self.k.sizes("k", k.dims, self.kv_heads)?, self.v.sizes("v", v.dims, self.kv_heads)?);
        // The mask may have more batches, and more queries, than the operands.
        let ys = self.y.sizes("y", io.output(0)?.dims, self.heads)?;
        let strides = |form: Form, s: Sizes, positions: usize| {
            let [batch, head, position] = form.strides(s);
            let step = |size: usize, joint: usize, step: usize| if size == joint { step } else { 0 };
            [step(s.batch, ys.batch, batch), head, step(s.positions, positions, position)]
        };
        let repeated: Vec<f32>;
        let mask = match io.optional(3) {
            Some(m) => {
                let (mut data, mut dims) = (m.as_slice::<f32>()?, Dims::from_slice(m.dims));
                // Rare: one number for all keys, in a model whose names for sizes turned out to mean 1.
                if let Some(keys) = dims.last_mut().filter(|keys| **keys == 1 && ks.positions != 1) {
                    *keys = ks.positions;
                    repeated = data.iter().flat_map(|&v| std::iter::repeat_n(v, ks.positions)).collect();
                    data = &repeated;
                }
                let strides = mask_strides(&dims, [ys.batch, ys.heads, ys.positions])?;
                Some(Mask { data, strides, keys: ks.positions, replaces: self.replaces })
            }
            None => None,
        };
        let a = Kernel {
            batch: ys.batch,
            heads: self.heads,
            kv_heads: self.kv_heads,
            queries: ys.positions,
            keys: ks.positions,
            size: qs.size,
            value_size: vs.size,
            q: Heads { data: q.as_slice::<f32>()?, strides: strides(self.q, qs, ys.positions) },
            k: Heads { data: k.as_slice::<f32>()?, strides: strides(self.k, ks, ks.positions) },
            v: Heads { data: v.as_slice::<f32>()?, strides: strides(self.v, vs, ks.positions) },
            scale: self.scale,
            cap: 0.0,
            mask,
            visible: if self.causal { Some(&|_, i| 0..ks.positions.min(i + 1)) } else { None },
            unseen: self.unseen,
            sinks: None,
            y_strides: self.y.strides(ys),
        };
        Ok(attention(cx, &a, io.output(0)?.as_slice::<f32>()?)?)
    }
}

pub(super) fn head_count(n: i64, name: &str) -> Result<usize> {
    let heads = usize::try_from(n).ok().filter(|h| (1..1 << 20).contains(h));
    heads.ok_or_else(|| Error::unsupported_attribute(format!("attribute {name} is {n}; at least 1 was wanted")))
}

/// ONNX's Attention. Operands q, k, v, then optional mask, past key, past value, valid keys per batch; results y, present
/// key, present value, scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Heads of q, for operands of rank 3.
    pub heads: Option<usize>,
    /// Heads of k and v, for operands of rank 3.
    pub kv_heads: Option<usize>,
    /// Factor of the scores, by default one over the square root of the head size.
    pub scale: Option<f32>,
    /// Scores are capped softly if it is not 0.
    pub cap: f32,
    /// Whether a query sees only keys at and before its position.
    pub causal: bool,
    /// What the fourth result holds: scores as they are (0), capped (1), with the mask (2), after softmax (3).
    pub scores: i64,
    /// How far to the left and to the right a query sees.
    pub window: [Option<usize>; 2],
    /// Whether softmax is wanted in `float64`.
    pub double: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let count = |name: &str, n: Option<i64>| n.map(|n| head_count(n, name)).transpose();
    let heads = count("q_num_heads", a.int("q_num_heads")?)?;
    let kv_heads = count("kv_num_heads", a.int("kv_num_heads")?)?;
    let scale = a.float("scale")?;
    let cap = a.float_or("softcap", 0.0)?;
    let causal = a.flag_or("is_causal", false)?;
    let scores = a.int_or("qk_matmul_output_mode", 0)?;
    if !(0..=3).contains(&scores) {
        return Err(Error::unsupported_attribute(format!(
            "attribute qk_matmul_output_mode is {scores}; 0 to 3 was wanted"
        )));
    }
    let mut side = |name: &str| match a.int_or(name, -1)? {
        -1 => Ok(None),
        n => usize::try_from(n).map(Some).map_err(|_| Error::unsupported_attribute(format!("attribute {name} is {n}"))),
    };
    let window = [side("left_window_size")?, side("right_window_size")?];
    // Softmax is computed in float32, no less exact than float16 or bfloat16, or all of it in float64.
    let precision = a.dtype("softmax_precision")?;
    let double = precision == Some(DType::F64);
    if let Some(p) = precision.filter(|p| !p.is_float()) {
        return Err(Error::unsupported_attribute(format!(
            "attribute softmax_precision is {p}; a float type was wanted"
        )));
    }
    Ok(Attention { heads, kv_heads, scale, cap: cap.max(0.0), causal, scores, window, double }.into())
}

impl Attention {
    fn forms(&self, rank: usize) -> Result<Form> {
        match rank {
            4 => Ok(Form::HeadsFirst),
            3 => Ok(Form::HeadsInside),
            _ => Err(Error::shape(format!("an operand of rank {rank}; 3 or 4 was wanted"))),
        }
    }

    /// Heads of q and of k and v; those of operands of rank 4 stand in their shapes.
    fn head_counts(&self, q: &Fact, k: &Fact) -> Result<(Option<usize>, Option<usize>)> {
        let of = |f: &Fact, said: Option<usize>, name: &str| match f.shape.as_deref() {
            Some([_, h, _, _]) => Ok(h.known()),
            Some([_, _, _]) => said.map(Some).ok_or_else(|| {
                Error::invalid_model(format!("attribute {name} is missing; operands of rank 3 want it"))
            }),
            _ => Ok(None),
        };
        Ok((of(q, self.heads, "q_num_heads")?, of(k, self.kv_heads, "kv_num_heads")?))
    }
}

impl Operator for Attention {
    fn name(&self) -> &'static str {
        "Attention"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (q, k, v) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        let unknown = || [q.dtype, k.dtype, v.dtype, q.dtype].map(Fact::of_dtype).to_vec();
        let (Some(rq), Some(rk), Some(rv)) = (q.rank(), k.rank(), v.rank()) else { return cx.results(unknown()) };
        if rq != rk || rk != rv {
            return Err(Error::shape(format!("q, k and v have ranks {rq}, {rk} and {rv}; equal ones were wanted")));
        }
        let form = self.forms(rq)?;
        let (Some(heads), Some(kv_heads)) = self.head_counts(q, k)? else { return cx.results(unknown()) };
        let (Some([b, tq, dq]), Some([kb, tk, dk]), Some([_, tv, dv])) =
            (parts(form, q, heads)?, parts(form, k, kv_heads)?, parts(form, v, kv_heads)?)
        else {
            return cx.results(unknown());
        };
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::shape(format!("{heads} heads of q cannot share {kv_heads} of k and v")));
        }
        agree("sizes of the heads of q and k", &dq, &dk)?;
        agree("positions of k and v", &tk, &tv)?;
        agree("batches of q and k", &b, &kb)?;
        if cx.optional(4).is_some() != cx.optional(5).is_some() {
            return Err(Error::invalid_model("past key and past value (operands 4 and 5) come together"));
        }
        if cx.optional(6).is_some() && cx.optional(4).is_some() {
            return Err(Error::invalid_model(
                "a past (operand 4) and numbers of valid keys (operand 6) exclude each other",
            ));
        }
        let total = match cx.optional(4) {
            None => tk.clone(),
            Some(past) => match (past.shape.as_deref(), tk.known()) {
                (Some([_, h, p, d]), now) => {
                    agree("heads of past and k", h, &Dim::Known(kv_heads))?;
                    agree("sizes of the heads of past and k", d, &dk)?;
                    let sum = p.known().zip(now).and_then(|(p, t)| p.checked_add(t));
                    sum.map_or(Dim::Unknown, Dim::Known)
                }
                (None, _) => Dim::Unknown,
                _ => return Err(Error::shape(format!("the past is {}; rank 4 was wanted", past.shape_text()))),
            },
        };
        let cache = |size: &Dim, dtype| {
            let shape = [b.clone(), Dim::Known(kv_heads), total.clone(), size.clone()];
            Fact::with_shape(dtype, shape.into_iter().collect())
        };
        let scores = [b.clone(), Dim::Known(heads), tq.clone(), total.clone()].into_iter().collect();
        let y = Fact::with_shape(q.dtype, result_shape(form, b.clone(), heads, tq, dv.clone()));
        cx.results(vec![y, cache(&dk, k.dtype), cache(&dv, v.dtype), Fact::with_shape(q.dtype, scores)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (q, k, v) = (io.input(0)?, io.input(1)?, io.input(2)?);
        if q.dtype != DType::F32 {
            return Err(wrong_dtype("q", q.dtype, "float32"));
        }
        let form = self.forms(q.rank())?;
        let (heads, kv_heads) = (self.heads.unwrap_or(0), self.kv_heads.unwrap_or(0));
        let qs = form.sizes("q", q.dims, heads)?;
        let (ks, vs) = (form.sizes("k", k.dims, kv_heads)?, form.sizes("v", v.dims, kv_heads)?);
        let past = io.optional(4).map_or(0, |p| p.dims.get(2).copied().unwrap_or(0));
        let keys = ks.positions + past;
        // Present states are the past with the new positions behind, heads first.
        let (k_all, v_all);
        let full = |s: Sizes| Sizes { positions: keys, ..s };
        let first = Form::HeadsFirst;
        let (k_heads, v_heads) = if past > 0 || io.outputs.len() > 1 {
            k_all = append(io.optional(4), k.as_slice()?, form.strides(ks), ks, keys)?;
            v_all = append(io.optional(5), v.as_slice()?, form.strides(vs), vs, keys)?;
            for (i, all) in [(1, &k_all), (2, &v_all)] {
                if io.outputs.len() > i {
                    io.output(i)?.as_slice::<f32>()?.copy_from_slice(all);
                }
            }
            let heads = |data, s| Heads { data, strides: first.strides(full(s)) };
            (heads(k_all.as_slice(), ks), heads(v_all.as_slice(), vs))
        } else {
            let k_heads = Heads { data: k.as_slice::<f32>()?, strides: form.strides(ks) };
            (k_heads, Heads { data: v.as_slice::<f32>()?, strides: form.strides(vs) })
        };
        // A mask of truth values says which keys are seen.
        let mask_data: Vec<f32>;
        let mask = match io.optional(3) {
            None => None,
            Some(m) => {
                let data = match m.dtype {
                    DType::Bool => {
                        mask_data = m.bytes().iter().map(|&b| if b == 0 { f32::NEG_INFINITY } else { 0.0 }).collect();
                        mask_data.as_slice()
                    }
                    _ => m.as_slice::<f32>()?,
                };
                let strides = mask_strides(m.dims, [qs.batch, qs.heads, qs.positions])?;
                Some(Mask { data, strides, keys: m.dims.last().copied().unwrap_or(1), replaces: false })
            }
        };
        let valid = io.optional(6).map(|n| n.to_i64s()).transpose()?;
        if valid.as_ref().is_some_and(|n| n.len() != qs.batch) {
            return Err(Error::shape(format!("operand 6 must have one number per batch ({})", qs.batch)));
        }
        let visible = |b: usize, i: usize| -> Range<usize> {
            let limit = valid.as_ref().map_or(keys as i64, |n| n[b].clamp(0, keys as i64));
            let offset = valid.as_ref().map_or(past as i64, |n| n[b].saturating_sub(qs.positions as i64));
            let position = offset.saturating_add(i as i64);
            let reach = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
            let start = self.window[0].map_or(0, |w| position.saturating_sub(reach(w)));
            let mut end = self.window[1].map_or(limit, |w| position.saturating_add(reach(w)).saturating_add(1));
            if self.causal {
                end = end.min(position.saturating_add(1));
            }
            let clamp = |v: i64| v.clamp(0, limit) as usize;
            clamp(start)..clamp(end).max(clamp(start))
        };
        let limited = self.causal || self.window != [None, None] || valid.is_some();
        let a = Kernel {
            batch: qs.batch,
            heads: qs.heads,
            kv_heads: ks.heads,
            queries: qs.positions,
            keys,
            size: qs.size,
            value_size: vs.size,
            q: Heads { data: q.as_slice::<f32>()?, strides: form.strides(qs) },
            k: k_heads,
            v: v_heads,
            scale: self.scale.unwrap_or(1.0 / (qs.size as f32).sqrt()),
            cap: self.cap,
            mask,
            visible: if limited { Some(&visible as Visible) } else { None },
            unseen: 0.0,
            sinks: None,
            y_strides: form.strides(Sizes { size: vs.size, ..qs }),
        };
        if self.double {
            // Nobody waits for this one: the plain form, which is in float64 throughout.
            let exact = reference::attention(&a);
            let y = io.output(0)?.as_slice::<f32>()?;
            y.iter_mut().zip(exact).for_each(|(y, v)| *y = v as f32);
        } else {
            attention(cx, &a, io.output(0)?.as_slice::<f32>()?)?;
        }
        if io.outputs.len() > 3 {
            self.write_scores(&a, io.output(3)?.as_slice::<f32>()?);
        }
        Ok(())
    }
}

impl Attention {
    /// The fourth result, for those who want to look inside: computed beside the attention, plainly.
    fn write_scores(&self, a: &Kernel, out: &mut [f32]) {
        let mut rows = out.chunks_exact_mut(a.keys.max(1));
        for b in 0..a.batch {
            for h in 0..a.heads {
                let kv = h / (a.heads / a.kv_heads);
                for i in 0..a.queries {
                    let Some(row) = rows.next() else { return };
                    let at = |x: &Heads, h: usize, i: usize| b * x.strides[0] + h * x.strides[1] + i * x.strides[2];
                    let query = &a.q.data[at(&a.q, h, i)..][..a.size];
                    for (j, y) in row.iter_mut().enumerate() {
                        let key = &a.k.data[at(&a.k, kv, j)..][..a.size];
                        *y = a.scale * query.iter().zip(key).map(|(x, y)| x * y).sum::<f32>();
                        if a.cap != 0.0 && self.scores > 0 {
                            *y = a.cap * (*y / a.cap).tanh();
                        }
                        if self.scores < 2 {
                            continue;
                        }
                        let hidden = a.visible.is_some_and(|f| !f(b, i).contains(&j));
                        let masked = match a.mask {
                            Some(m) if j < m.keys => m.data[b * m.strides[0] + h * m.strides[1] + i * m.strides[2] + j],
                            Some(_) => f32::NEG_INFINITY,
                            None => 0.0,
                        };
                        *y = if hidden || masked == f32::NEG_INFINITY { f32::NEG_INFINITY } else { *y + masked };
                    }
                    if self.scores == 3 {
                        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        if max == f32::NEG_INFINITY {
                            row.fill(0.0);
                        } else {
                            let sum: f32 = row.iter().map(|v| (v - max).exp()).sum();
                            row.iter_mut().for_each(|v| *v = (*v - max).exp() / sum);
                        }
                    }
                }
            }
        }
    }
}

/// `past` followed by the positions of `x`, heads first.
pub(super) fn append(
    past: Option<TensorView>,
    x: &[f32],
    strides: [usize; 3],
    s: Sizes,
    keys: usize,
) -> Result<Vec<f32>> {
    let before = keys - s.positions;
    let past = match past {
        Some(p) if before > 0 => {
            let want = [s.batch, s.heads, before, s.size];
            if p.dims != want {
                return Err(Error::shape(format!("a past of shape {:?}; {want:?} was wanted", p.dims)));
            }
            p.as_slice::<f32>()?
        }
        _ => &[],
    };
    let mut all = Vec::with_capacity(s.batch * s.heads * keys * s.size);
    for b in 0..s.batch {
        for h in 0..s.heads {
            if before > 0 {
                let run = before * s.size;
                all.extend_from_slice(&past[(b * s.heads + h) * run..][..run]);
            }
            for i in 0..s.positions {
                all.extend_from_slice(&x[b * strides[0] + h * strides[1] + i * strides[2]..][..s.size]);
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};

    #[test]
    fn equal_scores_average_the_values() {
        let (q, k) = (f32s(&[1, 1, 1, 2], &[0.0; 2]), f32s(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0]));
        let y = OneNode::new("Attention").run(&[q, k.clone(), k]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [2.0, 3.0]);
    }

    #[test]
    fn causal_queries_see_what_came_before() {
        let x = f32s(&[1, 2, 2], &[0.0, 0.0, 0.0, 4.0]);
        let node = OneNode::new("Attention").int("q_num_heads", 2).int("kv_num_heads", 2).int("is_causal", 1);
        let y = node.run(&[f32s(&[1, 2, 2], &[0.0; 4]), x.clone(), x]).unwrap();
        assert_eq!(y[0].dims(), [1, 2, 2]);
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [0.0, 0.0, 0.0, 2.0]);
    }

    #[test]
    fn the_present_is_the_past_and_the_new() {
        let one = |v: f32| f32s(&[1, 1, 1, 1], &[v]);
        let inputs = [Some(one(0.0)), Some(one(1.0)), Some(one(2.0)), None, Some(one(3.0)), Some(one(4.0))];
        let y = OneNode::new("Attention").outputs(3).run_optional(&inputs).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [3.0]);
        assert_eq!(y[1].as_slice::<f32>().unwrap(), [3.0, 1.0]);
        assert_eq!(y[2].as_slice::<f32>().unwrap(), [4.0, 2.0]);
    }

    #[test]
    fn onnxruntime_form_and_mistakes() {
        let x = f32s(&[1, 2, 4], &[0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 4.0, 4.0]);
        let q = f32s(&[1, 1, 4], &[0.0; 4]);
        let node = || OneNode::new("MultiHeadAttention").domain("com.microsoft").int("num_heads", 2);
        let y = node().run(&[q.clone(), x.clone(), x.clone()]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [1.0, 1.0, 2.0, 2.0]);
        let e = OneNode::new("Attention").run(&[q, x.clone(), x]).unwrap_err();
        assert!(e.message.contains("q_num_heads"), "{e}");
    }
}
