//! Pad.

use super::sizes::{Axes, Ints, copy_axes, distinct_axes, element_size, ints, kernel_error, permuted_axis, strides};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::for_dtype;
use crate::tensor::Element;
use smallvec::SmallVec;
use weblane_kernels::movement::{self, Axis, FILL};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Pad", 2, Pad::parse)];

/// What stands in the places that padding adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A constant.
    Constant,
    /// The elements mirrored at the edge, which itself is not repeated.
    Reflect,
    /// The element at the edge.
    Edge,
    /// The elements from the other end.
    Wrap,
}

/// Adds elements at both ends of some axes; negative numbers cut off.
#[derive(Clone, Debug, PartialEq)]
pub struct Pad {
    /// What is added.
    pub mode: Mode,
    /// Begins of all axes, then ends, when they stand in the node (up to opset 10).
    pub pads: Option<Vec<i64>>,
    /// The constant, when it stands in the node.
    pub value: Option<f32>,
    /// The axes that there are pads for; operand 3 does not matter then.
    pub axes: Option<Vec<i64>>,
}

type Pads = SmallVec<[(i64, i64); 6]>;

impl Pad {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let modes =
            [("constant", Mode::Constant), ("reflect", Mode::Reflect), ("edge", Mode::Edge), ("wrap", Mode::Wrap)];
        Ok(Pad { mode: a.choice("mode", &modes)?, pads: a.ints("pads")?, value: a.float("value")?, axes: None }.into())
    }

    /// Begin and end of each axis; `pads` and `axes` are those of the operands.
    pub fn resolve(&self, pads: Option<&[i64]>, axes: Option<&[i64]>, rank: usize) -> Result<Pads> {
        let pads = self.pads.as_deref().or(pads).ok_or_else(|| Error::invalid_model("the pads are missing"))?;
        let axes = match self.axes.as_deref().or(axes) {
            Some(list) => distinct_axes(list, rank)?,
            None => (0..rank).collect(),
        };
        if pads.len() != 2 * axes.len() {
            return Err(Error::shape(format!("{} pads for {} axes; two each were wanted", pads.len(), axes.len())));
        }
        let mut out = Pads::from_elem((0, 0), rank);
        for (i, &a) in axes.iter().enumerate() {
            out[a] = (pads[i], pads[axes.len() + i]);
        }
        Ok(out)
    }
}

fn padded(len: usize, (begin, end): (i64, i64)) -> Result<usize> {
    let size = (len as i64).checked_add(begin).and_then(|n| n.checked_add(end));
    size.and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| Error::shape(format!("pads {begin} and {end} of an axis of {len} leave no valid size")))
}

impl Operator for Pad {
    fn name(&self) -> &'static str {
        "Pad"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        element_size(x.dtype)?;
        if let Some(value) = cx.optional(2) {
            if value.dtype != x.dtype {
                return Err(Error::dtype(format!("the constant is {}, the operand {}", value.dtype, x.dtype)));
            }
            if value.dims().is_some_and(|d| d.iter().product::<usize>() != 1) {
                return Err(Error::shape(format!(
                    "the constant has shape {}; one element was wanted",
                    value.shape_text()
                )));
            }
        }
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(x.dtype)]) };
        let (pads, axes) = (ints(cx.optional(1), "the list of pads")?, ints(cx.optional(3), "the list of axes")?);
        let (pads, axes) = match (&pads, &axes) {
            (Ints::Computed(_), _) | (_, Ints::Computed(_)) => {
                return cx.results(vec![Fact::of_rank(x.dtype, shape.len())]);
            }
            (p, a) => (known(p), known(a)),
        };
        let pads = self.resolve(pads, axes, shape.len())?;
        let mut out = shape.clone();
        for (d, &p) in out.iter_mut().zip(&pads) {
            *d = match &*d {
                Dim::Known(n) => {
                    let reach = p.0.max(p.1);
                    if (*n == 0 && reach > 0 && self.mode != Mode::Constant)
                        || (self.mode == Mode::Reflect && *n > 0 && reach > *n as i64 - 1 && reach > 0)
                    {
                        return Err(Error::shape(format!("an axis of {n} has no elements to pad {reach} more from")));
                    }
                    Dim::Known(padded(*n, p)?)
                }
                same if p == (0, 0) => same.clone(),
                _ => Dim::Unknown,
            };
        }
        cx.results(vec![Fact::with_shape(x.dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let list = |i: usize| io.optional(i).map(|v| v.to_i64s()).transpose();
        let (pads, axes) = (list(1)?, list(3)?);
        let pads = self.resolve(pads.as_deref(), axes.as_deref(), x.rank())?;
        let element = element_size(x.dtype)?;
        let mut buffer = [0u8; 8];
        let value: &[u8] = match (io.optional(2), self.value) {
            (Some(v), _) => v.bytes(),
            (None, Some(v)) if v != 0.0 => {
                for_dtype!(x.dtype, [F32, F64, I8, I16, I32, I64, U8, U16, U32, U64], T =>
                put(&mut buffer, v as T), else match x.dtype {
                    crate::tensor::DType::F16 => put(&mut buffer, half::f16::from_f32(v)),
                    _ => put(&mut buffer, half::bf16::from_f32(v)),
                });
                &buffer[..element]
            }
            _ => &buffer[..element],
        };
        let y = io.output(0)?;
        if self.mode == Mode::Constant {
            movement::fill(cx, value, y.bytes()).map_err(kernel_error)?;
            let (from, to) = (strides(x.dims), strides(y.dims));
            let (mut source, mut target) = (0, 0);
            let mut axes = Axes::new();
            for a in 0..x.rank() {
                let (begin, end) = pads[a];
                // What negative pads cut off at either end.
                let cut = |p: i64| p.min(0).unsigned_abs() as usize;
                let len = x.dims[a].saturating_sub(cut(begin)).saturating_sub(cut(end));
                let len = if y.dims[a] == 0 { 0 } else { len };
                source += cut(begin) * from[a];
                target += begin.max(0) as usize * to[a];
                axes.push(Axis { len, src: from[a] as isize, dst: to[a] });
            }
            return copy_axes(cx, &axes, x, source, y, target);
        }
        let maps: Vec<Vec<usize>> = (0..x.rank())
            .map(|a| (0..y.dims[a]).map(|i| self.source(i as i64 - pads[a].0, x.dims[a])).collect())
            .collect();
        movement::take(cx, x.dims, &maps, x.bytes(), &[0; 8][..element], y.bytes()).map_err(kernel_error)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        let axes: Vec<i64> = match (&self.axes, operands.get(3).and_then(Option::as_ref)) {
            (Some(axes), _) => axes.clone(),
            (None, Some(axes)) => axes.i64s()?.to_vec(),
            (None, None) => (0..perm.len() as i64).collect(),
        };
        let axes = Some(axes.iter().map(|&a| permuted_axis(a, perm)).collect::<Option<_>>()?);
        let roles = vec![Role::Permute, Role::Keep, Role::Keep, Role::Keep];
        Some(Permuted { op: Pad { axes, ..self.clone() }.into(), roles })
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[1, 3]
    }
}

impl Pad {
    /// Where the element `at` (which may lie outside) of an axis of `len` comes from.
    fn source(&self, at: i64, len: usize) -> usize {
        let n = len as i64;
        // Almost all of them, and the divisions below are slow.
        if (0..n).contains(&at) {
            return at as usize;
        }
        let place = match self.mode {
            Mode::Constant => at,
            Mode::Edge => at.clamp(0, n - 1),
            Mode::Wrap => at.rem_euclid(n.max(1)),
            Mode::Reflect => {
                let period = (2 * (n - 1)).max(1);
                let at = at.rem_euclid(period);
                at.min(period - at)
            }
        };
        usize::try_from(place).ok().filter(|&p| p < len).unwrap_or(FILL)
    }
}

fn known(list: &Ints) -> Option<&[i64]> {
    match list {
        Ints::Known(v) => Some(v),
        _ => None,
    }
}

fn put<T: Element>(buffer: &mut [u8; 8], value: T) {
    let values = [value];
    let bytes: &[u8] = bytemuck::cast_slice(&values);
    buffer[..bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::onnx::AttributeValue;

    #[test]
    fn modes() {
        let x = || f32s(&[1, 4], &[1.0, 2.0, 3.0, 4.0]);
        let cases: [(&str, [i64; 4], &[f32]); 6] = [
            ("constant", [0, 1, 0, 2], &[9.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0]),
            ("constant", [0, -1, 0, 1], &[2.0, 3.0, 4.0, 9.0]),
            ("reflect", [0, 2, 0, 1], &[3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0]),
            ("edge", [0, 2, 0, -1], &[1.0, 1.0, 1.0, 2.0, 3.0]),
            ("wrap", [0, 2, 0, 1], &[3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 1.0]),
            ("constant", [0, -4, 0, 1], &[9.0]),
        ];
        for (mode, pads, want) in cases {
            let node = OneNode::new("Pad").attr("mode", AttributeValue::String(mode.into()));
            let y = node.run(&[x(), i64s(&[4], &pads), f32s(&[], &[9.0])]).unwrap();
            assert_eq!(y[0], f32s(&[1, want.len()], want), "{mode} {pads:?}");
        }
    }

    #[test]
    fn permuted_pads_follow_their_axes() {
        let pad = Pad { mode: Mode::Constant, pads: Some(vec![0, 1, 2, 0, 3, 4]), value: None, axes: None };
        let permuted = pad.permuted(&[0, 2, 1], &[]).unwrap();
        let pads = permuted.op.get::<Pad>().unwrap().resolve(None, None, 3).unwrap();
        assert_eq!(pads.as_slice(), [(0, 0), (2, 4), (1, 3)]);
    }

    #[test]
    fn axes_and_old_attributes() {
        let x = || f32s(&[2, 1], &[1.0, 2.0]);
        let y =
            OneNode::new("Pad").run_optional(&[Some(x()), Some(i64s(&[2], &[1, 0])), None, Some(i64s(&[1], &[-1]))]);
        assert_eq!(y.unwrap()[0], f32s(&[2, 2], &[0.0, 1.0, 0.0, 2.0]));
        let old = OneNode::new("Pad").opset(9).ints("pads", &[1, 0, 0, 0]).float("value", 7.0);
        assert_eq!(old.run(&[x()]).unwrap()[0], f32s(&[3, 1], &[7.0, 1.0, 2.0]));
        assert!(OneNode::new("Pad").run(&[x()]).is_err());
        assert!(OneNode::new("Pad").run(&[x(), i64s(&[3], &[1; 3])]).is_err());
        assert!(OneNode::new("Pad").run(&[x(), i64s(&[4], &[-3, 0, 0, 0])]).is_err());
        let node = OneNode::new("Pad").attr("mode", AttributeValue::String("reflect".into()));
        assert!(node.run(&[x(), i64s(&[4], &[2, 0, 0, 0])]).is_err());
    }
}
