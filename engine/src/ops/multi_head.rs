//! onnxruntime's Attention and MultiHeadAttention, as its tools write them into models of transformers: with packed
//! projections, biases, masks of three kinds and past keys and values.

use super::attention::{Form, Sizes, agree, append, head_count, mask_strides, parts, result_shape};
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::{DType, Tensor, TensorView, element_count};
use std::borrow::Cow;
use std::ops::Range;
use weblane_kernels::attention::{Attention as Kernel, Heads, Mask, Visible, attention};
use weblane_kernels::epilogue::Epilogue;
use weblane_kernels::gemm::{Matrix, Rhs, gemm};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::microsoft("Attention", parse_attention),
    Registration::microsoft("MultiHeadAttention", parse_multi_head),
];

/// What both operators say of the attention itself.
#[derive(Clone, Debug, PartialEq)]
struct Core {
    heads: usize,
    /// Factor of the scores, by default one over the square root of the head size.
    scale: Option<f32>,
    /// Whether a query sees only keys at and before its position.
    causal: bool,
    /// What is added to the scores of keys that the padding mask hides.
    fill: f32,
}

impl Core {
    fn parse(a: &mut Attributes) -> Result<Self> {
        let heads = head_count(a.required("num_heads", Attributes::int)?, "num_heads")?;
        let scale = a.float_or("scale", 0.0)?;
        let fill = a.float_or("mask_filter_value", -10000.0)?;
        let causal = a.flag_or("unidirectional", false)?;
        Ok(Core { heads, scale: (scale != 0.0).then_some(scale), causal, fill })
    }
}

/// Refuses operands that would change the result without being read.
fn refuse(a: &Attributes, operands: &[(usize, &str)], known: usize) -> Result<()> {
    let named = operands.iter().find(|(i, _)| a.has_input(*i));
    let (i, what) = match named {
        Some(&(i, what)) => (i, what),
        None if a.input_count() > known => (known, "of a newer form"),
        None => return Ok(()),
    };
    Err(Error::unsupported_attribute(format!("operand {i}, {what}, cannot be computed")))
}

/// Elements of one of q, k and v, and how its heads lie in them.
#[derive(Clone, Copy)]
struct Part<'a> {
    data: &'a [f32],
    form: Form,
    sizes: Sizes,
    strides: [usize; 3],
}

impl<'a> Part<'a> {
    fn of(what: &str, x: TensorView<'a>, form: Form, heads: usize) -> Result<Self> {
        let sizes = form.sizes(what, x.dims, heads)?;
        Ok(Part { data: x.as_slice()?, form, sizes, strides: form.strides(sizes) })
    }

    /// Columns from `first` on of rows that hold more than this part.
    fn columns(data: &'a [f32], width: usize, first: usize, sizes: Sizes) -> Self {
        let strides = [sizes.positions.saturating_mul(width), sizes.size, width];
        Part { data: data.get(first..).unwrap_or_default(), form: Form::HeadsInside, sizes, strides }
    }

    fn heads(&self) -> Heads<'a> {
        Heads { data: self.data, strides: self.strides }
    }

    /// The elements with a bias added, which has one for each element of each head, as `[batch, positions, heads, size]`.
    fn plus(&self, bias: &[f32]) -> Result<Vec<f32>> {
        let s = self.sizes;
        if bias.len() != s.heads * s.size {
            let (have, want) = (bias.len(), s.heads * s.size);
            return Err(Error::shape(format!("a bias of {have} elements; {want} were wanted")));
        }
        let mut all = Vec::with_capacity(s.batch * s.positions * bias.len());
        for b in 0..s.batch {
            for i in 0..s.positions {
                for (h, bias) in bias.chunks_exact(s.size.max(1)).enumerate() {
                    let row = &self.data[b * self.strides[0] + h * self.strides[1] + i * self.strides[2]..][..s.size];
                    all.extend(row.iter().zip(bias).map(|(x, b)| x + b));
                }
            }
        }
        Ok(all)
    }

    /// The same part over other elements, as [`plus`](Self::plus) makes them.
    fn over(&self, data: &'a [f32]) -> Part<'a> {
        let form = Form::HeadsInside;
        Part { data, form, sizes: self.sizes, strides: form.strides(self.sizes) }
    }
}

/// Past keys and values, `[batch, heads, positions, size]` each.
#[derive(Clone, Copy, Default)]
struct Past<'a> {
    keys: Option<TensorView<'a>>,
    values: Option<TensorView<'a>>,
}

impl Past<'_> {
    fn positions(&self) -> usize {
        self.keys.map_or(0, |p| p.dims.get(2).copied().unwrap_or(0))
    }
}

/// What hides keys: a mask of integers, and numbers that are added to the scores.
#[derive(Clone, Copy, Default)]
struct Masks<'a> {
    padding: Option<TensorView<'a>>,
    bias: Option<TensorView<'a>>,
}

/// Numbers to be added to the scores, and their strides over batches, heads and queries.
type Joined<'a> = (Cow<'a, [f32]>, [usize; 3]);

impl<'a> Masks<'a> {
    /// Both as one mask of the kernel.
    fn join(&self, fill: f32, [batch, heads, queries, keys]: [usize; 4]) -> Result<Option<Joined<'a>>> {
        let bias = match self.bias {
            None => None,
            Some(b) if b.dims.last() == Some(&keys) => {
                Some((b.as_slice::<f32>()?, mask_strides(b.dims, [batch, heads, queries])?))
            }
            Some(b) => return Err(Error::shape(format!("a bias of shape {:?} for {keys} keys", b.dims))),
        };
        let Some(padding) = self.padding else {
            return Ok(bias.map(|(data, strides)| (Cow::Borrowed(data), strides)));
        };
        let numbers = padding.to_i64s()?;
        let dims = padding.dims;
        let added = |hidden: bool| if hidden { fill } else { 0.0 };
        // `[batch, rows, keys]`, where the rows are all queries or one for all of them.
        let (data, rows): (Vec<f32>, usize) = match *dims {
            // Where each batch's keys end, and perhaps where they begin.
            [n] if n == batch || n == 2 * batch => {
                let limits = |b: usize| (numbers.get(batch + b).copied().unwrap_or(0), numbers[b]);
                let hidden = |b: usize, j: i64| j < limits(b).0 || j >= limits(b).1;
                ((0..batch).flat_map(|b| (0..keys).map(move |j| added(hidden(b, j as i64)))).collect(), 1)
            }
            [b, k] if (b, k) == (batch, keys) => (numbers.iter().map(|&n| added(n <= 0)).collect(), 1),
            [b, q, k] if (b, q, k) == (batch, queries, keys) => {
                (numbers.iter().map(|&n| added(n <= 0)).collect(), queries)
            }
            _ => {
                return Err(Error::shape(format!(
                    "a mask of shape {dims:?}; [{batch}], [{}], [{batch}, {keys}] or [{batch}, {queries}, {keys}] can be \
                     computed",
                    2 * batch
                )));
            }
        };
        let per_query = if rows == 1 { 0 } else { keys };
        let Some((bias, strides)) = bias else { return Ok(Some((Cow::Owned(data), [rows * keys, 0, per_query]))) };
        let mut sum = Vec::new();
        let count = element_count(&[batch, heads, queries, keys])?;
        sum.try_reserve_exact(count).map_err(|_| Error::out_of_memory(format!("a mask of {count} numbers")))?;
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..queries {
                    let mask = &data[b * rows * keys + i * per_query..][..keys];
                    let bias = &bias[b * strides[0] + h * strides[1] + i * strides[2]..][..keys];
                    sum.extend(mask.iter().zip(bias).map(|(m, b)| m + b));
                }
            }
        }
        Ok(Some((Cow::Owned(sum), [heads * queries * keys, queries * keys, keys])))
    }
}

impl Core {
    /// The attention of given parts. `present` takes keys and values with the past ones in front.
    fn run(
        &self,
        cx: &Cx,
        [q, k, v]: [Part; 3],
        past: Past,
        masks: Masks,
        y: &mut [f32],
        present: Option<[&mut [f32]; 2]>,
    ) -> Result<()> {
        let (qs, ks, vs) = (q.sizes, k.sizes, v.sizes);
        if ks.batch != qs.batch || vs.batch != qs.batch || vs.positions != ks.positions || ks.size != qs.size {
            return Err(Error::shape(format!("q, k and v do not fit each other: {qs:?}, {ks:?}, {vs:?}")));
        }
        let before = past.positions();
        let keys = before + ks.positions;
        let (k_all, v_all);
        let (k_heads, v_heads) = if before > 0 || present.is_some() {
            k_all = append(past.keys, k.data, k.strides, ks, keys)?;
            v_all = append(past.values, v.data, v.strides, vs, keys)?;
            if let Some(present) = present {
                for (to, from) in present.into_iter().zip([&k_all, &v_all]) {
                    // Results that nobody named have no buffer.
                    if to.len() == from.len() {
                        to.copy_from_slice(from);
                    } else if !to.is_empty() {
                        return Err(Error::shape("past keys or values have no shape that fits the new ones"));
                    }
                }
            }
            let strides = |s: Sizes| Form::HeadsFirst.strides(Sizes { positions: keys, ..s });
            (Heads { data: &k_all, strides: strides(ks) }, Heads { data: &v_all, strides: strides(vs) })
        } else {
            (k.heads(), v.heads())
        };
        let mask = masks.join(self.fill, [qs.batch, qs.heads, qs.positions, keys])?;
        let mask = mask.as_ref().map(|(data, strides)| Mask { data, strides: *strides, keys, replaces: false });
        let visible = |_: usize, i: usize| -> Range<usize> { 0..before + i + 1 };
        let a = Kernel {
            batch: qs.batch,
            heads: self.heads,
            kv_heads: self.heads,
            queries: qs.positions,
            keys,
            size: qs.size,
            value_size: vs.size,
            q: q.heads(),
            k: k_heads,
            v: v_heads,
            scale: self.scale.unwrap_or(1.0 / (qs.size as f32).sqrt()),
            cap: 0.0,
            mask,
            visible: if self.causal { Some(&visible as Visible) } else { None },
            unseen: 0.0,
            sinks: None,
            y_strides: Form::HeadsInside.strides(Sizes { size: vs.size, ..qs }),
        };
        Ok(attention(cx, &a, y)?)
    }

    /// What is known of a present state.
    fn present(&self, dtype: DType, lead: &[Dim], before: Option<&Fact>, new: &Dim, size: &Dim) -> Fact {
        let past = match before {
            None => Some(0),
            Some(f) => f.shape.as_ref().and_then(|s| s.iter().rev().nth(1)?.known()),
        };
        let total = past.zip(new.known()).and_then(|(p, n)| p.checked_add(n)).map_or(Dim::Unknown, Dim::Known);
        let mut shape: Shape = lead.iter().cloned().collect();
        shape.extend([Dim::Known(self.heads), total, size.clone()]);
        Fact::with_shape(dtype, shape)
    }
}

/// onnxruntime's MultiHeadAttention.
///
/// Operands: q, k, v, a bias of all three, a padding mask, numbers added to the scores, past keys, past values. Results: y,
/// present keys, present values. q is `[batch, positions, heads * size]`; k and v are too, or `[batch, heads, positions, size]`;
/// or k is `[batch, positions, heads, 2, size]` and holds v, or q is `[batch, positions, heads, 3, size]` and holds both.
#[derive(Clone, Debug, PartialEq)]
pub struct MultiHeadAttention {
    core: Core,
}

fn parse_multi_head(a: &mut Attributes) -> Result<Op> {
    let core = Core::parse(a)?;
    refuse(a, &[(8, "the length of a past in a shared buffer"), (9, "an indirection of beams")], 10)?;
    if a.has_input(6) != a.has_input(7) {
        return Err(Error::invalid_model("past key and past value (operands 6 and 7) come together"));
    }
    if a.has_input(2) && !a.has_input(1) {
        return Err(Error::invalid_model("operand 2, the value, is given without operand 1, the key"));
    }
    if a.has_input(3) && !a.has_input(2) {
        return Err(Error::unsupported_attribute("operand 3, a bias, cannot be computed for packed operands"));
    }
    if a.output_count() > 3 {
        return Err(Error::unsupported_attribute("the scores (result 3) cannot be computed"));
    }
    Ok(MultiHeadAttention { core }.into())
}

impl MultiHeadAttention {
    /// How the columns of the bias (operand 3) belong to q, k and v of `[batch, positions, columns]`; `None` if it cannot
    /// be added to them beforehand.
    pub fn bias_columns(&self, operands: [&Fact; 3]) -> Option<[usize; 3]> {
        let columns = |f: &Fact| match f.shape.as_deref()? {
            [_, _, n] => n.known(),
            _ => None,
        };
        let [q, k, v] = operands;
        Some([columns(q)?, columns(k)?, columns(v)?])
    }
}

/// Batch, positions and size of a head of an operand that may hold several parts, and whether its heads stand first.
fn part_of(fact: &Fact, heads: usize) -> Result<Option<[Dim; 3]>> {
    match fact.shape.as_deref() {
        None => Ok(None),
        Some([b, t, h, _, d]) => {
            agree("numbers of heads", h, &Dim::Known(heads))?;
            Ok(Some([b.clone(), t.clone(), d.clone()]))
        }
        Some([_, _, _, _]) => parts(Form::HeadsFirst, fact, heads),
        Some(_) => parts(Form::HeadsInside, fact, heads),
    }
}

/// Part `i` of an operand of `[batch, positions, heads, count, size]`.
fn packed<'a>(x: TensorView<'a>, i: usize, count: usize, heads: usize) -> Result<Part<'a>> {
    match *x.dims {
        [batch, positions, h, n, size] if (h, n) == (heads, count) => {
            let sizes = Sizes { batch, heads, positions, size };
            let row = heads * count * size;
            let data = x.as_slice::<f32>()?.get(i * size..).unwrap_or_default();
            Ok(Part { data, form: Form::HeadsInside, sizes, strides: [positions * row, count * size, row] })
        }
        _ => {
            let dims = x.dims;
            Err(Error::shape(format!("an operand of shape {dims:?}; [.., {heads}, {count}, size] was wanted")))
        }
    }
}

impl Operator for MultiHeadAttention {
    fn name(&self) -> &'static str {
        "com.microsoft.MultiHeadAttention"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let heads = self.core.heads;
        let q = cx.input(0)?;
        let k = cx.optional(1).unwrap_or(q);
        let v = cx.optional(2).unwrap_or(k);
        let (Some([b, tq, dq]), Some([_, tk, dk]), Some([_, tv, dv])) =
            (part_of(q, heads)?, part_of(k, heads)?, part_of(v, heads)?)
        else {
            return cx.results(vec![Fact::of_dtype(q.dtype); 3]);
        };
        agree("sizes of the heads of q and k", &dq, &dk)?;
        agree("positions of k and v", &tk, &tv)?;
        let y = Fact::with_shape(q.dtype, result_shape(Form::HeadsInside, b.clone(), heads, tq, dv.clone()));
        let present =
            |i: usize, size: &Dim| self.core.present(q.dtype, std::slice::from_ref(&b), cx.optional(i), &tk, size);
        cx.results(vec![y, present(6, &dk), present(7, &dv)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let heads = self.core.heads;
        let q = io.input(0)?;
        if q.dtype != DType::F32 {
            return Err(wrong_dtype("q", q.dtype, "float32"));
        }
        let form = |t: TensorView| if t.rank() == 4 { Form::HeadsFirst } else { Form::HeadsInside };
        let mut parts = match (io.optional(1), io.optional(2)) {
            (None, _) => [packed(q, 0, 3, heads)?, packed(q, 1, 3, heads)?, packed(q, 2, 3, heads)?],
            (Some(k), None) => {
                [Part::of("q", q, Form::HeadsInside, heads)?, packed(k, 0, 2, heads)?, packed(k, 1, 2, heads)?]
            }
            (Some(k), Some(v)) => [
                Part::of("q", q, Form::HeadsInside, heads)?,
                Part::of("k", k, form(k), heads)?,
                Part::of("v", v, form(v), heads)?,
            ],
        };
        let mut biased: [Vec<f32>; 3] = Default::default();
        if let Some(bias) = io.optional(3) {
            let mut rest = bias.as_slice::<f32>()?;
            for (part, own) in parts.iter().zip(&mut biased) {
                let (mine, others) = rest.split_at(rest.len().min(part.sizes.heads * part.sizes.size));
                rest = others;
                // Keys and values of an earlier run, heads first, have had theirs.
                if part.form == Form::HeadsInside {
                    *own = part.plus(mine)?;
                }
            }
            for (part, own) in parts.iter_mut().zip(&biased) {
                if part.form == Form::HeadsInside {
                    *part = part.over(own);
                }
            }
        }
        let past = Past { keys: io.optional(6), values: io.optional(7) };
        let masks = Masks { padding: io.optional(4), bias: io.optional(5) };
        let [y, present @ ..] = &mut *io.outputs else { return Err(Error::internal("a result has no buffer")) };
        let present: Option<[&mut [f32]; 2]> = match present {
            [] => None,
            [k] => Some([k.as_slice::<f32>()?, &mut []]),
            [k, v, ..] => Some([k.as_slice::<f32>()?, v.as_slice::<f32>()?]),
        };
        self.core.run(cx, parts, past, masks, y.as_slice::<f32>()?, present)
    }
}

/// onnxruntime's Attention: the projections of q, k and v in one product, then the attention.
///
/// Operands: x `[batch, positions, in]`, weights `[in, columns]`, a bias `[columns]`, a padding mask, the past
/// `[2, batch, heads, positions, size]`, numbers added to the scores. Results: y and the present, of the form of the past.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    core: Core,
    /// Columns of q, k and v, if they are not equal.
    columns: Option<[usize; 3]>,
    /// Whether operand 0 is the product already, and operands 1 and 2 are left out; set by the optimiser.
    projected: bool,
}

fn parse_attention(a: &mut Attributes) -> Result<Op> {
    let core = Core::parse(a)?;
    refuse(a, &[(6, "the length of a past in a shared buffer")], 7)?;
    for name in ["do_rotary", "past_present_share_buffer"] {
        if a.flag_or(name, false)? {
            return Err(Error::unsupported_attribute(format!("attribute {name} is 1; 0 can be computed")));
        }
    }
    // Says how much of a head would turn.
    a.ignore("rotary_embedding_dim");
    let columns = match a.ints("qkv_hidden_sizes")?.as_deref() {
        None | Some([]) => None,
        Some(sizes @ &[q, k, v]) => {
            let of = |n: i64| usize::try_from(n).ok().filter(|n| *n > 0 && n % core.heads == 0);
            match (of(q), of(k), of(v)) {
                (Some(q), Some(k), Some(v)) if q == k => Some([q, k, v]),
                _ => return Err(sizes_error(sizes)),
            }
        }
        Some(sizes) => return Err(sizes_error(sizes)),
    };
    Ok(Attention { core, columns, projected: false }.into())
}

fn sizes_error(sizes: &[i64]) -> Error {
    Error::unsupported_attribute(format!(
        "attribute qkv_hidden_sizes is {sizes:?}; three numbers that the heads divide, the first two equal, were wanted"
    ))
}

impl Attention {
    /// The operator that reads the product of x and the weights with the bias added; `None` if it does already.
    pub fn after_projection(&self) -> Option<Attention> {
        (!self.projected).then(|| Attention { projected: true, ..self.clone() })
    }

    /// Columns of q, k and v among so many.
    fn columns(&self, all: usize) -> Result<[usize; 3]> {
        let heads = self.core.heads;
        let columns = self.columns.unwrap_or([all / 3; 3]);
        if columns.iter().sum::<usize>() != all || columns.iter().any(|c| c % heads != 0) {
            return Err(Error::shape(format!("{all} columns of weights do not hold q, k and v of {heads} heads")));
        }
        Ok(columns)
    }

    /// From the projections, `[batch * positions, columns]`.
    fn attend(&self, cx: &Cx, io: &mut Io, qkv: &[f32], [batch, positions, columns]: [usize; 3]) -> Result<()> {
        let [nq, nk, nv] = self.columns(columns)?;
        let heads = self.core.heads;
        let sizes = |n: usize| Sizes { batch, heads, positions, size: n / heads };
        let part = |first: usize, n: usize| Part::columns(qkv, columns, first, sizes(n));
        let parts = [part(0, nq), part(nq, nk), part(nq + nk, nv)];
        // Keys and values one behind the other.
        let past = match io.optional(4) {
            None => Past::default(),
            Some(p) if p.dtype != DType::F32 => return Err(wrong_dtype("the past", p.dtype, "float32")),
            Some(p) => {
                let [2, dims @ ..] = p.dims else {
                    return Err(Error::shape(format!("the past is of shape {:?}; [2, ..] was wanted", p.dims)));
                };
                let (k, v) = p.bytes().split_at(p.bytes().len() / 2);
                let of = |bytes| TensorView::new(DType::F32, dims, bytes).map(Some);
                Past { keys: of(k)?, values: of(v)? }
            }
        };
        let masks = Masks { padding: io.optional(3), bias: io.optional(5) };
        let [y, present @ ..] = &mut *io.outputs else { return Err(Error::internal("a result has no buffer")) };
        let present: Option<[&mut [f32]; 2]> = match present {
            [] => None,
            [both, ..] => {
                let both = both.as_slice::<f32>()?;
                let middle = both.len() / 2;
                let (k, v) = both.split_at_mut(middle);
                Some([k, v])
            }
        };
        self.core.run(cx, parts, past, masks, y.as_slice::<f32>()?, present)
    }
}

impl Operator for Attention {
    fn name(&self) -> &'static str {
        "com.microsoft.Attention"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let wrong = |what: &str, f: &Fact, rank: usize| {
            Err(Error::shape(format!("{what} of shape {}; rank {rank} was wanted", f.shape_text())))
        };
        let unknown = vec![Fact::of_dtype(x.dtype); 2];
        let (b, t, width) = match x.shape.as_deref() {
            None => return cx.results(unknown),
            Some([b, t, width]) => (b, t, width),
            Some(_) => return wrong("x", x, 3),
        };
        let all = if self.projected {
            width
        } else {
            let w = cx.input(1)?;
            match w.shape.as_deref() {
                None => return cx.results(unknown),
                Some([rows, all]) => {
                    agree("columns of x and rows of the weights", width, rows)?;
                    all
                }
                Some(_) => return wrong("weights", w, 2),
            }
        };
        let Some(all) = all.known() else { return cx.results(unknown) };
        let [_, nk, nv] = self.columns(all)?;
        if let Some(bias) = cx.optional(2).and_then(Fact::dims)
            && bias.as_slice() != [all]
        {
            return Err(Error::shape(format!("the bias is of shape {bias:?}; {all} elements were wanted")));
        }
        if nk != nv && (cx.outputs > 1 || cx.optional(4).is_some()) {
            return Err(Error::shape("a past of keys and values of different sizes"));
        }
        let size = Dim::Known(nk / self.core.heads);
        let y = Fact::with_shape(x.dtype, [b.clone(), t.clone(), Dim::Known(nv)].into_iter().collect());
        cx.results(vec![y, self.core.present(x.dtype, &[Dim::Known(2), b.clone()], cx.optional(4), t, &size)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        if x.dtype != DType::F32 {
            return Err(wrong_dtype("x", x.dtype, "float32"));
        }
        let &[batch, positions, width] = x.dims else {
            return Err(Error::shape(format!("x is of shape {:?}; rank 3 was wanted", x.dims)));
        };
        let elements = x.as_slice::<f32>()?;
        if self.projected {
            return self.attend(cx, io, elements, [batch, positions, width]);
        }
        let w = io.input(1)?;
        let &[rows, columns] = w.dims else {
            return Err(Error::shape(format!("weights of shape {:?}; a matrix was wanted", w.dims)));
        };
        let mut qkv = Tensor::zeros(DType::F32, &[batch, positions, columns])?;
        let mut qkv = qkv.view_mut();
        let qkv = qkv.as_slice::<f32>()?;
        let bias = io.optional(2).map(|b| b.as_slice::<f32>()).transpose()?;
        let rhs = Rhs::Plain(Matrix::new(w.as_slice::<f32>()?, rows, columns));
        let epilogue = Epilogue { bias, ..Epilogue::default() };
        gemm(cx, Matrix::new(elements, batch * positions, width), rhs, &epilogue, qkv, columns)?;
        self.attend(cx, io, qkv, [batch, positions, columns])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use super::*;

    // What is wanted below comes from onnxruntime 1.31, on its CPU, but for packed operands, which that does not have.

    fn ramp(dims: &[usize], seed: usize) -> Tensor {
        let n: usize = dims.iter().product();
        f32s(dims, &(0..n).map(|i| ((i * 7 + seed * 5) % 23) as f32 / 8.0 - 11.0 / 8.0).collect::<Vec<_>>())
    }

    fn i32s(dims: &[usize], values: &[i32]) -> Tensor {
        Tensor::from_slice(dims, values).unwrap()
    }

    fn close(y: &Tensor, dims: &[usize], want: &[f32]) {
        assert_eq!(y.dims(), dims);
        let y = y.as_slice::<f32>().unwrap();
        assert!(y.iter().zip(want).all(|(y, w)| (y - w).abs() < 2e-5 * (1.0 + w.abs())), "{y:?} for {want:?}");
    }

    fn attention() -> OneNode {
        OneNode::new("Attention").domain("com.microsoft").int("num_heads", 2)
    }

    fn multi_head() -> OneNode {
        OneNode::new("MultiHeadAttention").domain("com.microsoft").int("num_heads", 2)
    }

    /// x, weights and bias of four columns each for q, k and v, and more operands.
    fn operands<const N: usize>(more: [Option<Tensor>; N]) -> Vec<Option<Tensor>> {
        let first = [ramp(&[2, 3, 4], 1), ramp(&[4, 12], 2), ramp(&[12], 3)].map(Some);
        first.into_iter().chain(more).collect()
    }

    #[test]
    fn masks_of_each_kind() {
        let ends = operands([Some(i32s(&[2], &[3, 2]))]);
        close(
            &attention().run_optional(&ends).unwrap()[0],
            &[2, 3, 4],
            &[
                -3.79695, 1.52455, 1.24691, -3.59149, 0.265902, 0.526724, -1.00644, -0.655853, 0.205825, 0.564984,
                -1.20344, -0.402285, 0.906245, -2.98437, 1.39063, 0.374928, -4.02651, 1.56669, 1.59303, -4.0467,
                -4.19719, 1.72415, 1.56672, -3.4721,
            ],
        );
        let spans = operands([Some(i32s(&[4], &[3, 2, 1, 0]))]);
        close(
            &attention().run_optional(&spans).unwrap()[0],
            &[2, 3, 4],
            &[
                -0.0286297, 0.714242, -1.27014, -0.305732, 0.266128, 0.526668, -1.23707, -0.35533, 0.205973, 0.564949,
                -1.22104, -0.379384, 0.906245, -2.98437, 1.39063, 0.374928, -4.02651, 1.56669, 1.59303, -4.0467,
                -4.19719, 1.72415, 1.56672, -3.4721,
            ],
        );
        let raw = Some(i32s(&[2, 3], &[1, 1, 0, 0, 1, 1]));
        let raw = operands([raw, None, Some(ramp(&[1, 2, 3, 3], 4))]);
        close(
            &attention().int("unidirectional", 1).run_optional(&raw).unwrap()[0],
            &[2, 3, 4],
            &[
                -3.82812, 1.53125, 1.5, -3.92188, -0.461565, 0.985743, -1.00687, -0.667345, -0.457052, 0.985011,
                -1.16134, -0.466799, 0.90625, -2.98438, 1.39062, 0.375, -4.34375, 1.85938, 1.59375, -4.0625, -3.77469,
                1.49725, 1.56859, -4.02475,
            ],
        );
        let by_query = operands([Some(i32s(&[2, 3, 3], &[1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0]))]);
        let node = attention().float("scale", 0.25).float("mask_filter_value", -3.0);
        close(
            &node.run_optional(&by_query).unwrap()[0],
            &[2, 3, 4],
            &[
                -3.37901,
                1.45595,
                0.832693,
                -3.0551,
                0.0932945,
                0.634956,
                -1.20822,
                -0.391312,
                -0.00286914,
                0.669647,
                -0.968883,
                -0.704396,
                0.897815,
                -2.97623,
                1.39088,
                0.366338,
                -3.15836,
                0.874291,
                1.4984,
                -3.69034,
                -4.23594,
                1.77066,
                1.5808,
                -3.94504,
            ],
        );
        let e = attention().run_optional(&operands([Some(i32s(&[5], &[1; 5]))])).unwrap_err();
        assert!(e.message.contains("mask of shape [5]"), "{e}");
    }

    #[test]
    fn a_past_and_values_of_another_size() {
        let past = operands([None, Some(ramp(&[2, 2, 2, 1, 2], 5))]);
        let y = attention().int("unidirectional", 1).outputs(2).run_optional(&past).unwrap();
        close(
            &y[0],
            &[2, 3, 4],
            &[
                -3.81334, 1.52926, 1.44724, -3.84174, -0.120285, 0.993462, -0.892815, -0.571129, 0.186744, 0.667684,
                -1.09826, -0.258917, 0.904682, -2.96697, 1.3906, 0.375002, -4.00963, 1.55673, 1.53378, -3.90982,
                -3.86973, 1.53474, 1.35012, -3.34457,
            ],
        );
        close(
            &y[1],
            &[2, 2, 2, 4, 2],
            &[
                -1.125, -0.25, 1.6875, -3.73438, -1.17188, -0.453125, -0.078125, 1.03125, 0.625, -1.375, 1.625,
                1.59375, 0.984375, -1.17188, 1.0625, -0.703125, -0.5, 0.375, 2.45312, 1.4375, 1.03125, -4.625, 2.125,
                -3.14062, 1.25, -0.75, -2.45312, 1.92188, 1.57812, 1.3125, 1.65625, 1.78125, 0.125, 1.0, -3.82812,
                1.53125, -0.453125, 0.984375, 0.40625, 0.4375, -1.0, -0.125, 1.5, -3.92188, -1.17188, -0.453125,
                -1.32812, -0.21875, 0.75, -1.25, 0.90625, -2.98438, -4.34375, 1.85938, -3.48438, 1.3125, -0.375, 0.5,
                1.39062, 0.375, 1.59375, -4.0625, 1.4375, -3.82812,
            ],
        );
        let narrow = [ramp(&[2, 3, 4], 1), ramp(&[4, 10], 2), ramp(&[10], 3)];
        let y = attention().ints("qkv_hidden_sizes", &[4, 4, 2]).run(&narrow).unwrap();
        close(
            &y[0],
            &[2, 3, 2],
            &[
                -0.584003, -0.414128, -0.322603, -0.321486, -1.33886, -1.01274, -2.13149, -0.638917, 0.664493,
                0.330515, -2.06294, -0.501419,
            ],
        );
        assert!(attention().ints("qkv_hidden_sizes", &[4, 2, 2]).run(&narrow).is_err());
        assert!(attention().run(&narrow).is_err(), "ten columns for three parts");
    }

    #[test]
    fn separate_operands() {
        let [q, k, v] = [(3, 1), (2, 2), (2, 3)].map(|(n, seed)| Some(ramp(&[2, n, 4], seed)));
        let bias = Some(ramp(&[12], 3));
        let raw = Some(i32s(&[2, 2], &[1, 1, 0, 1]));
        let y = multi_head().run_optional(&[q.clone(), k.clone(), v.clone(), bias.clone(), raw]).unwrap();
        close(
            &y[0],
            &[2, 3, 4],
            &[
                -0.228313, -0.303072, 0.286664, -0.838336, -0.15552, -0.565129, 0.182734, -0.942266, -0.10008,
                -0.764714, 0.261179, -0.863821, -1.625, 0.125, 1.875, -2.125, -1.625, 0.125, 1.875, -2.125, -1.625,
                0.125, 1.875, -2.125,
            ],
        );
        let y = multi_head().outputs(3).run_optional(&[q.clone(), k.clone(), v.clone(), bias.clone()]).unwrap();
        close(
            &y[0],
            &[2, 3, 4],
            &[
                -0.228313, -0.303072, 0.286664, -0.838336, -0.15552, -0.565129, 0.182734, -0.942266, -0.10008,
                -0.764714, 0.261179, -0.863821, -2.19629, -0.446294, 1.32027, -2.67973, -1.73981, 0.0101946, 1.78557,
                -2.21443, -1.82234, -0.0723403, 1.71558, -2.28442,
            ],
        );
        close(
            &y[1],
            &[2, 2, 2, 2],
            &[1.0, -0.125, 1.625, 0.5, -1.25, 0.5, -0.625, 1.125, 2.25, -1.75, 0.0, -1.125, 0.0, 1.75, 0.625, -0.5],
        );
        close(
            &y[2],
            &[2, 2, 2, 2],
            &[
                -0.625, 1.125, 0.0, -1.125, 0.0, -1.125, 0.625, -0.5, -2.25, -0.5, -1.625, 0.125, 1.25, -2.75, 1.875,
                -2.125,
            ],
        );
        let ends = Some(i32s(&[2], &[1, 2]));
        let y = multi_head().run_optional(&[q.clone(), k, v, None, ends]).unwrap();
        close(
            &y[0],
            &[2, 3, 4],
            &[
                0.5, 1.375, -0.625, 0.25, 0.5, 1.375, -0.625, 0.25, 0.5, 1.375, -0.625, 0.25, -1.06133, -0.186328,
                0.749419, -1.25058, -0.598236, 0.276764, 1.20098, -0.799021, -0.672896, 0.202104, 1.15713, -0.842871,
            ],
        );
        // Keys and values of another layer, heads first, have their bias already.
        let [k, v] = [2, 3].map(|seed| Some(ramp(&[2, 2, 2, 2], seed)));
        let y = multi_head().run_optional(&[q.clone(), k, v, bias.clone()]).unwrap();
        close(
            &y[0],
            &[2, 3, 4],
            &[
                0.196194, 1.07119, 0.479217, 0.129552, 0.364561, 1.23956, 0.1904, 0.578822, 0.445781, 1.32078,
                0.399507, 0.253545, -0.534182, -0.629812, -0.222368, 0.196522, 0.395183, -1.22726, 0.742337, -0.423645,
                0.444942, -1.25925, 0.835866, -0.483771,
            ],
        );
        let past = [5, 6].map(|seed| Some(ramp(&[2, 2, 1, 2], seed)));
        let [keys, values] = past;
        let inputs = [q.clone(), q.clone(), q.clone(), bias, None, None, keys, values];
        let y = multi_head().int("unidirectional", 1).outputs(3).run_optional(&inputs).unwrap();
        close(
            &y[0],
            &[2, 3, 4],
            &[
                -0.927611, 0.219505, 1.38603, -1.33946, -1.16859, 0.352466, -0.360513, -1.69373, -0.752304, 0.974594,
                -0.168167, -1.50162, 0.0103151, -0.949644, 0.506339, -0.472617, -0.32517, 0.629436, 0.056278, -1.25093,
                -0.495797, 0.563527, 0.522398, -1.39273,
            ],
        );
        close(
            &y[1],
            &[2, 2, 4, 2],
            &[
                -1.125, -0.25, 0.375, -0.75, 1.0, -0.125, 1.625, 0.5, 0.625, -1.375, 1.0, -0.125, -1.25, 0.5, -0.625,
                1.125, -0.5, 0.375, 2.25, -1.75, 0.0, -1.125, 0.625, -0.5, 1.25, -0.75, 0.0, 1.75, 0.625, -0.5, 1.25,
                0.125,
            ],
        );
        close(
            &y[2],
            &[2, 2, 4, 2],
            &[
                -0.5, 0.375, -1.875, -0.125, -1.25, 0.5, -0.625, 1.125, 1.25, -0.75, 1.625, -2.375, -0.625, -1.75, 0.0,
                -1.125, 0.125, 1.0, 0.0, -1.125, -2.25, -0.5, -1.625, 0.125, -1.0, -0.125, 0.625, -0.5, 1.25, -2.75,
                1.875, -2.125,
            ],
        );
    }

    #[test]
    fn packed_operands() {
        // `[batch, positions, heads, 3, size]`, and its parts alone.
        let all = ramp(&[2, 3, 2, 3, 2], 1);
        let part = |which: &[usize]| -> Vec<f32> {
            let rows = all.as_slice::<f32>().unwrap().chunks_exact(6);
            rows.flat_map(|head| which.iter().flat_map(|&i| &head[2 * i..][..2])).copied().collect()
        };
        let [q, k, v] = [0, 1, 2].map(|i| f32s(&[2, 3, 4], &part(&[i])));
        let want = multi_head().run(&[q.clone(), k, v]).unwrap().remove(0);
        assert_eq!(multi_head().run(&[all.clone()]).unwrap()[0], want);
        let kv = f32s(&[2, 3, 2, 2, 2], &part(&[1, 2]));
        assert_eq!(multi_head().run(&[q, kv]).unwrap()[0], want);
        let e = multi_head().run(&[ramp(&[2, 3, 2, 2, 2], 1)]).unwrap_err();
        assert!(e.message.contains("[.., 2, 3, size]"), "{e}");
    }
}
