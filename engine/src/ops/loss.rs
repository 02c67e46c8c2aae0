//! NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss.

use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::for_dtype;
use crate::tensor::DType;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("NegativeLogLikelihoodLoss", 12, parse),
    Registration::onnx("SoftmaxCrossEntropyLoss", 12, parse),
];

/// How the losses of all places become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean, weighted by the weights of the classes.
    Mean,
    /// Their sum.
    Sum,
    /// They do not.
    None,
}

/// `-weight[label] x[label]` along axis 1, of logarithms of probabilities, or of scores of which it takes the
/// logarithmic softmax first (and gives it as result 1). Operands: x, labels, weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    /// Whether x are scores.
    pub softmax: bool,
    /// What becomes of the losses.
    pub reduction: Reduction,
    /// A label that counts as nothing.
    pub ignore: Option<i64>,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    Ok(Loss {
        softmax: a.op_type() == "SoftmaxCrossEntropyLoss",
        reduction: a
            .choice("reduction", &[("mean", Reduction::Mean), ("sum", Reduction::Sum), ("none", Reduction::None)])?,
        ignore: a.int("ignore_index")?,
    }
    .into())
}

impl Loss {
    fn compute<T: Number>(
        &self,
        x: &[T],
        [batch, classes, inner]: [usize; 3],
        labels: &[i64],
        weights: Option<&[T]>,
        y: &mut [T],
        mut log: Option<&mut [T]>,
    ) -> Result<()> {
        let (mut sum, mut total) = (0.0, 0.0);
        for (i, &label) in labels.iter().enumerate().take(batch * inner) {
            let (o, j) = (i / inner, i % inner);
            let at = |c: usize| (o * classes + c) * inner + j;
            let mut shift = 0.0;
            if self.softmax {
                let max = (0..classes).map(|c| x[at(c)].to_f64()).fold(f64::NEG_INFINITY, f64::max);
                shift = max + (0..classes).map(|c| (x[at(c)].to_f64() - max).exp()).sum::<f64>().ln();
                if let Some(log) = &mut log {
                    (0..classes).for_each(|c| log[at(c)] = T::from_f64(x[at(c)].to_f64() - shift));
                }
            }
            let mut loss = 0.0;
            if Some(label) != self.ignore {
                let class = usize::try_from(label).ok().filter(|&c| c < classes).ok_or_else(|| {
                    Error::invalid_input(format!("a label is {label}; a class in 0..{classes} was wanted"))
                })?;
                let weight = weights.map_or(1.0, |w| w[class].to_f64());
                loss = (shift - x[at(class)].to_f64()) * weight;
                total += weight;
            }
            sum += loss;
            if self.reduction == Reduction::None {
                y[i] = T::from_f64(loss);
            }
        }
        match self.reduction {
            Reduction::None => {}
            Reduction::Sum => y[0] = T::from_f64(sum),
            Reduction::Mean => y[0] = T::from_f64(sum / total),
        }
        Ok(())
    }
}

impl Operator for Loss {
    fn name(&self) -> &'static str {
        if self.softmax { "SoftmaxCrossEntropyLoss" } else { "NegativeLogLikelihoodLoss" }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (x, labels) = (cx.input(0)?, cx.input(1)?);
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floats"));
        }
        if !matches!(labels.dtype, DType::I32 | DType::I64) {
            return Err(wrong_dtype("the labels", labels.dtype, "int32 and int64"));
        }
        let mut places: Option<Shape> = labels.shape.clone();
        if let Some(s) = &x.shape {
            let [batch, classes, rest @ ..] = s.as_slice() else {
                return Err(Error::shape(format!("the operand is {}; batch and classes were wanted", x.shape_text())));
            };
            let want: Shape = std::iter::once(batch).chain(rest).cloned().collect();
            let differs = |(a, b): (&Dim, &Dim)| matches!((a, b), (Dim::Known(a), Dim::Known(b)) if a != b);
            if labels.shape.as_ref().is_some_and(|l| l.len() != want.len() || l.iter().zip(&want).any(differs)) {
                let (l, x) = (labels.shape_text(), x.shape_text());
                return Err(Error::shape(format!("labels of shape {l} for an operand of shape {x}")));
            }
            if let (Some(w), Some(c)) = (cx.optional(2).and_then(Fact::dims), classes.known())
                && w.as_slice() != [c]
            {
                return Err(Error::shape(format!("weights of shape {w:?} for {c} classes")));
            }
            places = places.or(Some(want));
        }
        if let Some(w) = cx.optional(2).filter(|w| w.dtype != x.dtype) {
            return Err(Error::dtype(format!("the weights are {}, the operand is {}", w.dtype, x.dtype)));
        }
        let loss = match self.reduction {
            Reduction::None => Fact { dtype: x.dtype, shape: places, content: Default::default() },
            _ => Fact::new(x.dtype, &[]),
        };
        let mut facts = vec![loss];
        if self.softmax {
            facts.push(Fact { dtype: x.dtype, shape: x.shape.clone(), content: Default::default() });
        }
        cx.results(facts)
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let labels = io.input(1)?.to_i64s()?;
        let weights = io.optional(2);
        let sizes = super::reduce::around(x.dims, 1);
        for_dtype!(x.dtype, [F32, F64], T => {
            let weights = weights.map(|w| w.as_slice::<T>()).transpose()?;
            let mut outputs = io.outputs.iter_mut();
            let y = outputs.next().ok_or_else(|| Error::internal("result 0 has no buffer"))?.as_slice::<T>()?;
            let log = outputs.next().map(|l| l.as_slice::<T>()).transpose()?;
            self.compute(x.as_slice::<T>()?, sizes, &labels, weights, y, log)
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};

    #[test]
    fn reductions() {
        let inputs = [f32s(&[2, 2], &[-1.0, -2.0, -3.0, -5.0]), i64s(&[2], &[0, 1]), f32s(&[2], &[1.0, 3.0])];
        let run = |node: OneNode| node.run(&inputs).unwrap()[0].as_slice::<f32>().unwrap().to_vec();
        let node = || OneNode::new("NegativeLogLikelihoodLoss");
        assert_eq!(run(node().string("reduction", "none")), [1.0, 15.0]);
        assert_eq!(run(node().string("reduction", "sum")), [16.0]);
        assert_eq!(run(node()), [4.0]);
        assert_eq!(run(node().int("ignore_index", 1)), [1.0]);
    }

    #[test]
    fn softmax_first() {
        let inputs = [f32s(&[1, 2], &[1.0, 1.0]), i64s(&[1], &[1])];
        let y = OneNode::new("SoftmaxCrossEntropyLoss").outputs(2).run(&inputs).unwrap();
        let ln2 = 2f32.ln();
        assert!((y[0].as_slice::<f32>().unwrap()[0] - ln2).abs() < 1e-6);
        assert!(y[1].as_slice::<f32>().unwrap().iter().all(|v| (v + ln2).abs() < 1e-6));
        let e = OneNode::new("SoftmaxCrossEntropyLoss").run(&[inputs[0].clone(), i64s(&[1], &[2])]).unwrap_err();
        assert!(e.message.contains("a label is 2"), "{e}");
    }
}
