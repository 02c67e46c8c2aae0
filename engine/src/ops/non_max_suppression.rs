//! NonMaxSuppression: of boxes that overlap, the one with the best score.

use super::{Attributes, Infer, Io, Op, Operator, Registration};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::tensor::{DType, TensorView};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("NonMaxSuppression", 10, parse)];

/// Operands: boxes `[batch, n, 4]`, scores `[batch, classes, n]`, largest number per class, largest allowed overlap
/// (intersection over union), smallest score. The result has rows of batch, class and box.
#[derive(Clone, Debug, PartialEq)]
pub struct NonMaxSuppression {
    /// Boxes are `[x, y, width, height]` about their centre instead of two corners `[y, x, y, x]`.
    pub center: bool,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    Ok(NonMaxSuppression { center: a.flag_or("center_point_box", false)? }.into())
}

/// Two corners in any unit, ordered.
type Corners = [f32; 4];

fn overlap(a: &Corners, b: &Corners) -> f32 {
    let area = |c: &Corners| (c[2] - c[0]) * (c[3] - c[1]);
    let (w, h) = (a[2].min(b[2]) - a[0].max(b[0]), a[3].min(b[3]) - a[1].max(b[1]));
    if w <= 0.0 || h <= 0.0 {
        return 0.0;
    }
    let both = w * h;
    let union = area(a) + area(b) - both;
    if union > 0.0 { both / union } else { 0.0 }
}

fn number(v: Option<TensorView>) -> Result<Option<f32>> {
    Ok(v.map(|v| v.as_slice::<f32>()).transpose()?.and_then(|v| v.first().copied()))
}

impl NonMaxSuppression {
    fn corners(&self, b: &[f32]) -> Corners {
        if self.center {
            let (w, h) = (b[2] / 2.0, b[3] / 2.0);
            return [b[0] - w, b[1] - h, b[0] + w, b[1] + h];
        }
        [b[0].min(b[2]), b[1].min(b[3]), b[0].max(b[2]), b[1].max(b[3])]
    }

    fn select<'a>(&self, operand: impl Fn(usize) -> Option<TensorView<'a>>) -> Result<Vec<[i64; 3]>> {
        let missing = || Error::invalid_model("boxes or scores are missing");
        let (boxes, scores) = (operand(0).ok_or_else(missing)?, operand(1).ok_or_else(missing)?);
        let (&[batch, n, 4], &[_, classes, _]) = (boxes.dims, scores.dims) else {
            return Err(Error::shape(format!("boxes of shape {:?} and scores of shape {:?}", boxes.dims, scores.dims)));
        };
        let most = match operand(2) {
            Some(v) => v.to_i64s()?.first().map_or(0, |&n| usize::try_from(n).unwrap_or(0)),
            None => 0,
        };
        let most_overlap = number(operand(3))?.unwrap_or(0.0);
        let least_score = number(operand(4))?;
        let (boxes, scores) = (boxes.as_slice::<f32>()?, scores.as_slice::<f32>()?);
        let corners: Vec<Corners> = boxes.chunks_exact(4).map(|b| self.corners(b)).collect();
        let mut found = Vec::new();
        for (bc, scores) in scores.chunks_exact(n.max(1)).enumerate().take(batch * classes) {
            let (b, class) = (bc / classes, bc % classes);
            let corners = &corners[b * n..][..n];
            let mut order: Vec<usize> = (0..n).filter(|&i| least_score.is_none_or(|least| scores[i] > least)).collect();
            // Stable: of equal scores the first box counts.
            order.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]));
            let mut kept: Vec<usize> = Vec::new();
            for i in order {
                if kept.len() >= most {
                    break;
                }
                if kept.iter().all(|&k| overlap(&corners[k], &corners[i]) <= most_overlap) {
                    kept.push(i);
                }
            }
            found.extend(kept.into_iter().map(|i| [b as i64, class as i64, i as i64]));
        }
        Ok(found)
    }
}

impl Operator for NonMaxSuppression {
    fn name(&self) -> &'static str {
        "NonMaxSuppression"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        for (i, name) in ["boxes", "scores"].into_iter().enumerate() {
            let f = cx.input(i)?;
            if f.dtype != DType::F32 {
                return Err(super::wrong_dtype(name, f.dtype, "float32"));
            }
            if f.rank().is_some_and(|r| r != 3) {
                return Err(Error::shape(format!("{name} have shape {}; three axes were wanted", f.shape_text())));
            }
        }
        if let (Some(b), Some(s)) = (cx.input(0)?.dims(), cx.input(1)?.dims())
            && (b[2] != 4 || b[0] != s[0] || b[1] != s[2])
        {
            return Err(Error::shape(format!(
                "boxes of shape {b:?} and scores of shape {s:?}; [batch, n, 4] and [batch, classes, n] were wanted"
            )));
        }
        let known = (0..cx.inputs.len()).all(|i| cx.optional(i).is_none_or(|f| f.tensor().is_some()));
        let count = match known {
            true => Dim::Known(self.select(|i| cx.optional(i).and_then(Fact::tensor).map(|t| t.view()))?.len()),
            false => Dim::Unknown,
        };
        cx.results(vec![Fact::with_shape(DType::I64, [count, Dim::Known(3)].into_iter().collect())])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let found = self.select(|i| io.optional(i))?;
        io.output(0)?.as_slice::<i64>()?.copy_from_slice(found.as_flattened());
        Ok(())
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0, 1, 2, 3, 4]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn overlapping_boxes() {
        let boxes = f32s(&[1, 3, 4], &[0.0, 0.0, 1.0, 1.0, 0.0, 0.1, 1.0, 1.1, 0.0, 10.0, 1.0, 11.0]);
        let scores = f32s(&[1, 1, 3], &[0.9, 0.95, 0.3]);
        let run = |most: i64, overlap: f32, score: f32| {
            let inputs =
                [boxes.clone(), scores.clone(), i64s(&[1], &[most]), f32s(&[1], &[overlap]), f32s(&[1], &[score])];
            OneNode::new("NonMaxSuppression").run(&inputs).unwrap()[0].as_slice::<i64>().unwrap().to_vec()
        };
        assert_eq!(run(3, 0.5, 0.0), [0, 0, 1, 0, 0, 2]);
        assert_eq!(run(3, 0.9, 0.0), [0, 0, 1, 0, 0, 0, 0, 0, 2]);
        assert_eq!(run(3, 0.5, 0.5), [0, 0, 1]);
        assert_eq!(run(0, 0.5, 0.0), []);
    }

    #[test]
    fn shapes() {
        let e = OneNode::new("NonMaxSuppression").run(&[f32s(&[1, 1, 3], &[0.0; 3]), f32s(&[1, 1, 1], &[0.0])]);
        assert!(e.unwrap_err().message.contains("[batch, n, 4]"));
    }
}
