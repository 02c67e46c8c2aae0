//! BatchNormalization at inference: stored statistics, folded into one factor and one addend per channel.

use super::spatial::split_dims;
use super::{Attributes, Compute, Infer, Io, Op, Operator, Permuted, Prepare, Registration, Role, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::Fact;
use crate::tensor::{DType, Tensor};
use std::sync::Arc;
use weblane_kernels::conv::Layout;
use weblane_kernels::norm::scale_channels;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("BatchNormalization", 1, parse)];

/// `(x - mean) / sqrt(var + epsilon) * scale + bias`; operands x, scale, bias, mean, variance.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNormalization {
    /// Added to the variance.
    pub epsilon: f32,
    /// Where the channels of x are; for rank 2 both layouts are the same.
    pub layout: Layout,
    /// Whether statistics are those of the batch, and the running ones are updated.
    pub training: Option<Training>,
}

/// What training mode wants beyond inference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// Weight of the old running statistics.
    pub momentum: f32,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    if a.opset() < 9 && !a.flag_or("spatial", true)? {
        return Err(Error::unsupported_attribute("attribute spatial is 0; statistics per channel (1) can be computed"));
    }
    if a.opset() < 7 && !a.flag_or("is_test", false)? {
        return Err(Error::unsupported_attribute("attribute is_test is 0 (training); inference (1) can be computed"));
    }
    if a.opset() < 6 {
        a.ignore("consumed_inputs");
    }
    let epsilon = a.float_or("epsilon", 1e-5)?;
    let momentum = a.float_or("momentum", 0.9)?;
    let training = a.flag_or("training_mode", false)?;
    if training && a.opset() < 14 {
        return Err(Error::unsupported_attribute("attribute training_mode came with opset 14"));
    }
    if !training && a.output_count() > 1 {
        return Err(Error::unsupported_attribute(format!(
            "the node names {} results, as training wants; inference has 1",
            a.output_count()
        )));
    }
    let training = training.then_some(Training { momentum });
    Ok(BatchNormalization { epsilon, layout: Layout::Nchw, training }.into())
}

/// Factor and addend per channel.
pub fn fold_statistics(scale: &[f32], bias: &[f32], mean: &[f32], var: &[f32], epsilon: f32) -> (Vec<f32>, Vec<f32>) {
    let factor: Vec<f32> = scale.iter().zip(var).map(|(s, v)| s / (v + epsilon).sqrt()).collect();
    let addend = factor.iter().zip(bias).zip(mean).map(|((f, b), m)| b - m * f).collect();
    (factor, addend)
}

impl BatchNormalization {
    /// Channels, and elements from one channel to the next.
    fn channels(&self, dims: &[usize]) -> Result<(usize, usize)> {
        match dims {
            [] => Err(Error::shape("the operand is a scalar; batch and channels were wanted")),
            [_] => Ok((1, 1)),
            [_, c] => Ok((*c, 1)),
            _ => {
                let (_, channels, spatial) = split_dims(dims, self.layout)?;
                Ok((channels, if self.layout == Layout::Nhwc { 1 } else { spatial.iter().product() }))
            }
        }
    }
}

impl Operator for BatchNormalization {
    fn name(&self) -> &'static str {
        "BatchNormalization"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        let channels = match x.dims() {
            Some(dims) => Some(self.channels(&dims)?.0),
            None => None,
        };
        for i in 1..5 {
            let f = cx.input(i)?;
            if let (Some(dims), Some(c)) = (f.dims(), channels)
                && dims.as_slice() != [c]
            {
                return Err(Error::shape(format!("operand {i} is {}; [{c}] was wanted", f.shape_text())));
            }
        }
        let mut results = vec![Fact { content: Default::default(), ..x.clone() }];
        if self.training.is_some() {
            results.extend(
                [3, 4]
                    .map(|i| cx.input(i).map(|f| Fact { content: Default::default(), ..f.clone() }))
                    .into_iter()
                    .collect::<Result<Vec<_>>>()?,
            );
        }
        cx.results(results)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let dims = match io.optional(0) {
            Some(x) => x.dims,
            None => io.output(0)?.dims,
        };
        let (channels, inner) = self.channels(dims)?;
        if io.output(0)?.dtype == DType::F64 {
            return self.run_any::<f64>(io, channels, inner);
        }
        if self.training.is_some() {
            return self.run_any::<f32>(io, channels, inner);
        }
        let (scale, bias) = (io.slice::<f32>(1)?, io.slice::<f32>(2)?);
        let (mean, var) = (io.slice::<f32>(3)?, io.slice::<f32>(4)?);
        let x = io.optional(0).map(|x| x.as_slice::<f32>()).transpose()?;
        let y = io.output(0)?.as_slice::<f32>()?;
        cx.with_workspace(2 * channels, |folded| {
            let (factor, addend) = folded.split_at_mut(channels);
            for c in 0..channels {
                factor[c] = scale[c] / (var[c] + self.epsilon).sqrt();
                addend[c] = bias[c] - mean[c] * factor[c];
            }
            Ok(scale_channels(cx, x, y, inner, factor, addend)?)
        })
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let constants = [1, 2, 3, 4].map(|i| cx.constant(i).filter(|t| t.dtype() == DType::F32));
        let [Some(scale), Some(bias), Some(mean), Some(var)] = constants else { return Ok(None) };
        if self.training.is_some() || !cx.outputs.first().is_some_and(|y| y.dtype == DType::F32) {
            return Ok(None);
        }
        let (_, inner) = self.channels(&cx.dims(0)?)?;
        let of = |t: &'_ Arc<Tensor>| t.as_slice::<f32>().map(<[f32]>::to_vec);
        let (factor, addend) = fold_statistics(&of(scale)?, &of(bias)?, &of(mean)?, &of(var)?, self.epsilon);
        Ok(Some(Arc::new(Folded { factor, addend, inner })))
    }

    fn in_place(&self) -> &'static [usize] {
        if self.training.is_some() { &[] } else { &[0] }
    }

    fn channels_last(&self, operands: &[Option<&Fact>]) -> Option<Permuted> {
        let rank = operands.first()?.as_ref()?.rank()?;
        if rank < 3 || self.layout == Layout::Nhwc || self.training.is_some() {
            return None;
        }
        let op = BatchNormalization { layout: Layout::Nhwc, ..self.clone() }.into();
        Some(Permuted { op, roles: vec![Role::Permute, Role::Keep, Role::Keep, Role::Keep, Role::Keep] })
    }
}

impl BatchNormalization {
    /// Any float type, in `f64`, with training mode.
    fn run_any<T: crate::tensor::Element + weblane_kernels::naive::Number>(
        &self,
        io: &mut Io,
        channels: usize,
        inner: usize,
    ) -> Result<()> {
        let parameters = [1, 2, 3, 4].map(|i| io.slice::<T>(i));
        let [scale, bias, mean, var] = parameters;
        let (scale, bias, mean, var) = (scale?, bias?, mean?, var?);
        let held: Vec<T>;
        let x = match io.optional(0) {
            Some(x) => x.as_slice::<T>()?,
            None => {
                held = io.output(0)?.as_slice::<T>()?.to_vec();
                &held
            }
        };
        let epsilon = f64::from(self.epsilon);
        for c in 0..channels {
            let indices = || (0..x.len()).filter(|i| i / inner.max(1) % channels == c);
            let (m, v) = match self.training {
                None => (mean[c].to_f64(), var[c].to_f64()),
                Some(t) => {
                    let n = indices().count() as f64;
                    let m = indices().map(|i| x[i].to_f64()).sum::<f64>() / n;
                    let v = indices().map(|i| (x[i].to_f64() - m).powi(2)).sum::<f64>() / n;
                    let keep = f64::from(t.momentum);
                    for (result, old, new) in [(1, mean[c], m), (2, var[c], v)] {
                        if io.outputs.len() > result {
                            let value = old.to_f64() * keep + new * (1.0 - keep);
                            io.output(result)?.as_slice::<T>()?[c] = T::from_f64(value);
                        }
                    }
                    (m, v)
                }
            };
            let factor = scale[c].to_f64() / (v + epsilon).sqrt();
            let y = io.output(0)?.as_slice::<T>()?;
            for i in indices() {
                y[i] = T::from_f64((x[i].to_f64() - m) * factor + bias[c].to_f64());
            }
        }
        Ok(())
    }
}

/// All statistics are constant.
#[derive(Debug)]
struct Folded {
    factor: Vec<f32>,
    addend: Vec<f32>,
    inner: usize,
}

impl Compute for Folded {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.optional(0).map(|x| x.as_slice::<f32>()).transpose()?;
        Ok(scale_channels(cx, x, io.output(0)?.as_slice::<f32>()?, self.inner, &self.factor, &self.addend)?)
    }

    fn kernel(&self) -> &str {
        "scale_channels"
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};

    #[test]
    fn by_hand() {
        let x = f32s(&[1, 2, 2], &[1.0, 3.0, -1.0, 5.0]);
        let p = |a: f32, b: f32| f32s(&[2], &[a, b]);
        let inputs = [x, p(2.0, 1.0), p(0.5, 0.0), p(1.0, 2.0), p(4.0, 9.0)];
        let y = OneNode::new("BatchNormalization").float("epsilon", 0.0).run(&inputs).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [0.5, 2.5, -1.0, 1.0]);
    }

    #[test]
    fn training_updates_the_statistics() {
        let x = f32s(&[2, 1], &[1.0, 3.0]);
        let one = |v: f32| f32s(&[1], &[v]);
        let node = OneNode::new("BatchNormalization").int("training_mode", 1).float("epsilon", 0.0).outputs(3);
        let y = node.float("momentum", 0.5).run(&[x, one(1.0), one(0.0), one(4.0), one(3.0)]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [-1.0, 1.0]);
        assert_eq!(y[1].as_slice::<f32>().unwrap(), [3.0]);
        assert_eq!(y[2].as_slice::<f32>().unwrap(), [2.0]);
    }

    #[test]
    fn parameters_must_fit() {
        let one = f32s(&[1], &[1.0]);
        let inputs = [f32s(&[1, 2, 2], &[1.0; 4]), one.clone(), one.clone(), one.clone(), one];
        let e = OneNode::new("BatchNormalization").run(&inputs).unwrap_err();
        assert!(e.message.contains("operand 1 is [1]; [2] was wanted"), "{e}");
    }
}
