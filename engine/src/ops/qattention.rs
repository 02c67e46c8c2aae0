//! QAttention of onnxruntime: the projections of self-attention as one product of quantised matrices, then attention.

use super::qparams::{ByPacked, Prepared, scale, scales, zero, zeros};
use super::qparams::{Count, bytes, check_byte, infer_scale, infer_zero, pack, pack_constant};
use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::{DType, TensorView, element_count};
use std::ops::Range;
use std::sync::Arc;
use weblane_kernels::attention::{Attention, Heads, Mask, Visible, attention};
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{Output, PackedQ, QMatrix, qgemm};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("QAttention", parse)];

/// Operands: input `[batch, positions, features]`, weights `[features, 3 hidden]` (of queries, keys and values), bias, scale
/// of the input, scales of the weights, mask, zero point of the input, zero points of the weights, and the past
/// `[2, batch, heads, positions, size]`. Results: `[batch, positions, hidden]`, and the past with the new positions.
#[derive(Clone, Debug, PartialEq)]
pub struct QAttention {
    /// Number of heads.
    pub heads: usize,
    /// Whether a position sees those before it only.
    pub causal: bool,
    /// Factor of the scores; one over the root of the size of a head if it is absent.
    pub scale: Option<f32>,
    /// Added to the scores of keys that the mask hides.
    pub hidden: f32,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let heads = a.required("num_heads", Attributes::int)?;
    let heads = usize::try_from(heads).ok().filter(|&h| h > 0);
    let heads = heads.ok_or_else(|| Error::unsupported_attribute("attribute num_heads must be at least 1"))?;
    for name in ["do_rotary", "past_present_share_buffer"] {
        if a.flag_or(name, false)? {
            return Err(Error::unsupported_attribute(format!("attribute {name} is 1; 0 can be computed")));
        }
    }
    Ok(QAttention {
        heads,
        causal: a.flag_or("unidirectional", false)?,
        scale: a.float("scale")?.filter(|&s| s != 0.0),
        hidden: a.float_or("mask_filter_value", -10_000.0)?,
    }
    .into())
}

/// Sizes of one run.
struct Sizes {
    batch: usize,
    positions: usize,
    /// All heads together.
    hidden: usize,
    /// Positions of the past.
    past: usize,
}

impl QAttention {
    /// What is added to the scores, `[batch, positions, keys]` or `[batch, keys]`, and elements from query to query.
    fn mask(&self, mask: TensorView, s: &Sizes) -> Result<Option<(Vec<f32>, usize)>> {
        let keys = s.past + s.positions;
        let m = mask.as_slice::<i32>()?;
        let value = |visible: bool| if visible { 0.0 } else { self.hidden };
        let by_position = |visible: &dyn Fn(usize, i64) -> bool| -> Vec<f32> {
            (0..s.batch)
                .flat_map(|b| (0..keys).map(move |j| (b, j)))
                .map(|(b, j)| value(visible(b, j as i64)))
                .collect()
        };
        match *mask.dims {
            // The end of each sequence; then also its beginning.
            [n] if n == s.batch => Ok(Some((by_position(&|b, j| j < i64::from(m[b])), 0))),
            [n] if Some(n) == s.batch.checked_mul(2) => {
                Ok(Some((by_position(&|b, j| j < i64::from(m[b]) && j >= i64::from(m[s.batch + b])), 0)))
            }
            // A place holder.
            [n, 1] if (n == s.batch || n == 1) && keys != 1 => Ok(None),
            [n, t] if n == s.batch && t == keys => Ok(Some((m.iter().map(|&v| value(v > 0)).collect(), 0))),
            [n, q, t] if n == s.batch && q == s.positions && t == keys => {
                Ok(Some((m.iter().map(|&v| value(v > 0)).collect(), keys)))
            }
            _ => Err(Error::shape(format!(
                "mask_index is of shape {:?}; [{b}], [{}], [{b}, {keys}] or [{b}, {}, {keys}] was wanted",
                mask.dims,
                2 * s.batch,
                s.positions,
                b = s.batch
            ))),
        }
    }

    fn run_with(&self, cx: &Cx, io: &mut Io, packed: Option<&PackedQ>) -> Result<()> {
        let (x, w) = (io.input(0)?, io.input(1)?);
        let (&[batch, positions, features], &[_, columns]) = (x.dims, w.dims) else {
            return Err(Error::shape(format!("an input of shape {:?} and weights of shape {:?}", x.dims, w.dims)));
        };
        let past = io.optional(8);
        let s = Sizes {
            batch,
            positions,
            hidden: columns / 3,
            past: past.map_or(0, |p| p.dims.get(3).copied().unwrap_or(0)),
        };
        let made: PackedQ;
        let packed = match packed {
            Some(packed) => packed,
            None => {
                let zero = zeros(io.optional(7), "weight_zero_point", columns)?;
                made = pack(cx.isa(), bytes(w)?, [features, columns], false, &zero)?;
                &made
            }
        };
        let x_scale = scale(io.input(3)?, "input_scale")?;
        let factor: Vec<f32> = scales(io.input(4)?, "weight_scale", columns)?.iter().map(|w| x_scale * w).collect();
        let x_zero = zero(io.optional(6), "input_zero_point")?;
        let bias = io.slice::<f32>(2)?;
        let rows = element_count(&[batch, positions])?;
        cx.with_workspace(element_count(&[rows, columns])?, |qkv| {
            let x = QMatrix::new(bytes(x)?, rows, features);
            let real = Output::Real {
                scale: &factor,
                bias: Some(bias),
                residual: None,
                activation: Activation::Identity,
                y: &mut *qkv,
            };
            qgemm(cx, x, x_zero, packed, None, real)?;
            self.attend(cx, io, &s, past, qkv)
        })
    }

    /// Attention of the projections, `[batch, positions, 3 hidden]`.
    fn attend(&self, cx: &Cx, io: &mut Io, s: &Sizes, past: Option<TensorView>, qkv: &[f32]) -> Result<()> {
        let Sizes { batch, positions, hidden, .. } = *s;
        let (heads, size, keys) = (self.heads, hidden / self.heads, s.past + positions);
        let projected = |part: usize| Heads {
            data: if qkv.is_empty() { qkv } else { &qkv[part * hidden..] },
            strides: [positions * 3 * hidden, size, 3 * hidden],
        };
        let mut state: Vec<f32> = Vec::new();
        let (mut k, mut v) = (projected(1), projected(2));
        if past.is_some() || io.outputs.len() > 1 {
            let before = past.map(|p| p.as_slice::<f32>()).transpose()?.unwrap_or(&[]);
            state.reserve_exact(element_count(&[2, batch, heads, keys, size])?);
            for (part, new) in [k, v].into_iter().enumerate() {
                for head in 0..batch * heads {
                    let run = s.past * size;
                    state.extend_from_slice(&before[(part * batch * heads + head) * run..][..run]);
                    for i in 0..positions {
                        let at = head / heads * new.strides[0] + head % heads * size + i * new.strides[2];
                        state.extend_from_slice(&new.data[at..][..size]);
                    }
                }
            }
            if io.outputs.len() > 1 {
                io.output(1)?.as_slice::<f32>()?.copy_from_slice(&state);
            }
            let strides = [heads * keys * size, keys * size, size];
            let (of_k, of_v) = state.split_at(state.len() / 2);
            (k, v) = (Heads { data: of_k, strides }, Heads { data: of_v, strides });
        }
        let mask = io.optional(5).map(|m| self.mask(m, s)).transpose()?.flatten();
        let mask = mask.as_ref().map(|(data, query)| {
            let image = if *query == 0 { keys } else { positions * keys };
            Mask { data, strides: [image, 0, *query], keys, replaces: false }
        });
        let visible = |_: usize, i: usize| -> Range<usize> { 0..s.past + i + 1 };
        let a = Attention {
            batch,
            heads,
            kv_heads: heads,
            queries: positions,
            keys,
            size,
            value_size: size,
            q: projected(0),
            k,
            v,
            scale: self.scale.unwrap_or(1.0 / (size as f32).sqrt()),
            cap: 0.0,
            mask,
            visible: if self.causal { Some(&visible as Visible) } else { None },
            unseen: 0.0,
            sinks: None,
            y_strides: [positions * hidden, size, hidden],
        };
        Ok(attention(cx, &a, io.output(0)?.as_slice::<f32>()?)?)
    }
}

impl Operator for QAttention {
    fn name(&self) -> &'static str {
        "com.microsoft.QAttention"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, w, bias) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        check_byte("the input", x.dtype)?;
        check_byte("the weights", w.dtype)?;
        if !bias.dtype.is_float() {
            return Err(wrong_dtype("the bias", bias.dtype, "floats"));
        }
        if let Some(mask) = cx.optional(5).filter(|m| m.dtype != DType::I32) {
            return Err(wrong_dtype("mask_index", mask.dtype, "int32"));
        }
        let [batch, positions, features] = match x.shape.as_deref() {
            Some([b, t, f]) => [b.clone(), t.clone(), f.clone()],
            None => [const { Dim::Unknown }; 3],
            Some(_) => return Err(Error::shape(format!("the input is {}; three axes were wanted", x.shape_text()))),
        };
        let [rows, columns] = match w.shape.as_deref() {
            Some([r, c]) => [r.clone(), c.clone()],
            None => [const { Dim::Unknown }; 2],
            Some(_) => return Err(Error::shape(format!("the weights are {}; a matrix was wanted", w.shape_text()))),
        };
        if let (Some(f), Some(r)) = (features.known(), rows.known())
            && f != r
        {
            return Err(Error::shape(format!("the input has {f} features, the weights {r} rows")));
        }
        let hidden = columns.known().map(|c| c / 3);
        if let Some(c) = columns.known()
            && (c == 0 || c % 3 != 0 || !(c / 3).is_multiple_of(self.heads))
        {
            return Err(Error::shape(format!(
                "weights of {c} columns; three times as many as {} heads can share were wanted",
                self.heads
            )));
        }
        if let (Some(dims), Some(c)) = (bias.dims(), columns.known())
            && element_count(&dims)? != c
        {
            return Err(Error::shape(format!("the bias is of shape {dims:?}; {c} elements were wanted")));
        }
        infer_scale(cx, 3, "input_scale", Count::One)?;
        infer_scale(cx, 4, "weight_scale", Count::Columns(columns.known()))?;
        infer_zero(cx, 6, "input_zero_point", x.dtype, Count::One)?;
        infer_zero(cx, 7, "weight_zero_point", w.dtype, Count::Columns(columns.known()))?;
        let size = hidden.map_or(Dim::Unknown, |h| Dim::Known(h / self.heads));
        let mut keys = positions.clone();
        if let Some(past) = cx.optional(8) {
            if past.dtype != bias.dtype {
                return Err(Error::dtype(format!("the past is {}, the bias is {}", past.dtype, bias.dtype)));
            }
            keys = Dim::Unknown;
            if let Some(met) = &past.shape {
                let want = [Dim::Known(2), batch.clone(), Dim::Known(self.heads), Dim::Unknown, size.clone()];
                let differ = |(m, w): (&Dim, &Dim)| matches!((m, w), (Dim::Known(m), Dim::Known(w)) if m != w);
                if met.len() != 5 || met.iter().zip(&want).any(differ) {
                    let want = want.iter().map(Dim::to_string).collect::<Vec<_>>().join(", ");
                    return Err(Error::shape(format!("the past is {}; [{want}] was wanted", past.shape_text())));
                }
                keys = super::sizes::dim_sum(&met[3], &positions)?;
            }
        }
        let y: Shape = [batch.clone(), positions, hidden.map_or(Dim::Unknown, Dim::Known)].into_iter().collect();
        let present: Shape = [Dim::Known(2), batch, Dim::Known(self.heads), keys, size].into_iter().collect();
        cx.results(vec![Fact::with_shape(bias.dtype, y), Fact::with_shape(bias.dtype, present)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.run_with(cx, io, None)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(packed) = pack_constant(cx, 1, 7, false)? else { return Ok(None) };
        let rows = element_count(&cx.dims(0)?[..2])?;
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, rows })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        Ok(if pack_constant(cx, 1, 7, false)?.is_some() { &[1] } else { &[] })
    }
}

impl ByPacked for QAttention {
    const KERNEL: &'static str = "qgemm, attention";
    const PACKED: &'static [usize] = &[1];

    fn run_packed(&self, cx: &Cx, io: &mut Io, packed: &PackedQ) -> Result<()> {
        self.run_with(cx, io, Some(packed))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    fn operands() -> Vec<Option<Tensor>> {
        let x = Tensor::from_slice(&[1, 2, 1], &[129u8, 131]).unwrap();
        // Queries 0, keys 0, values the input.
        let w = Tensor::from_slice(&[1, 3], &[0i8, 0, 1]).unwrap();
        let zero = Tensor::from_slice(&[], &[128u8]).unwrap();
        vec![
            Some(x),
            Some(w),
            Some(f32s(&[3], &[0.0, 0.0, 0.5])),
            Some(f32s(&[], &[1.0])),
            Some(f32s(&[], &[2.0])),
            None,
            Some(zero),
        ]
    }

    fn node() -> OneNode {
        OneNode::new("QAttention").domain("com.microsoft").int("num_heads", 1)
    }

    #[test]
    fn values_by_hand() {
        let y = node().outputs(2).run_optional(&operands()).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [4.5, 4.5]);
        assert_eq!((y[1].dims(), y[1].as_slice::<f32>().unwrap()), (&[2, 1, 1, 2, 1][..], &[0.0, 0.0, 2.5, 6.5][..]));
        let y = node().int("unidirectional", 1).run_optional(&operands()).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [2.5, 4.5]);
        let mut masked = operands();
        masked[5] = Some(Tensor::from_slice(&[1, 2], &[0i32, 1]).unwrap());
        assert_eq!(node().run_optional(&masked).unwrap()[0].as_slice::<f32>().unwrap(), [6.5, 6.5]);
        let mut later = operands();
        later.extend([None, Some(f32s(&[2, 1, 1, 1, 1], &[0.0, 20.5]))]);
        let y = node().outputs(2).run_optional(&later).unwrap();
        assert!((y[0].as_slice::<f32>().unwrap()[0] - 29.5 / 3.0).abs() < 1e-6);
        assert_eq!(y[1].as_slice::<f32>().unwrap(), [0.0, 0.0, 0.0, 20.5, 2.5, 6.5]);
    }

    #[test]
    fn mistakes_are_named() {
        let said = |i: usize, t: Tensor| {
            let mut wrong = operands();
            wrong[i] = Some(t);
            node().run_optional(&wrong).unwrap_err().message
        };
        assert!(said(3, f32s(&[], &[0.0])).contains("input_scale[0] is 0"));
        assert!(said(4, f32s(&[2], &[1.0; 2])).contains("one number, or 3,"));
        assert!(said(5, Tensor::from_slice(&[3], &[1i32; 3]).unwrap()).contains("mask_index"));
        assert!(said(6, Tensor::from_slice(&[], &[1i8]).unwrap()).contains("input_zero_point is int8"));
        let e = OneNode::new("QAttention").domain("com.microsoft").int("num_heads", 2).run_optional(&operands());
        assert!(e.unwrap_err().message.contains("2 heads"));
    }
}
