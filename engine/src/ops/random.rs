//! Random numbers: RandomNormal, RandomUniform, their Like forms, Bernoulli and Multinomial.
//!
//! ONNX leaves the generator open. Here it is SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom
//! number generators", 2014), started from the seed of the node, or from its own place in the order of all nodes without
//! one; each run goes on where the last one ended.

use super::{Attributes, Infer, Io, Op, Operator, Registration, Same, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact};
use crate::for_dtype;
use crate::tensor::{DType, Dims, byte_count};
use half::{bf16, f16};
use std::sync::atomic::{AtomicU64, Ordering};
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("RandomNormal", 1, |a| Random::parse(a, "RandomNormal")),
    Registration::onnx("RandomNormalLike", 1, |a| Random::parse(a, "RandomNormalLike")),
    Registration::onnx("RandomUniform", 1, |a| Random::parse(a, "RandomUniform")),
    Registration::onnx("RandomUniformLike", 1, |a| Random::parse(a, "RandomUniformLike")),
    Registration::onnx("Bernoulli", 15, |a| Random::parse(a, "Bernoulli")),
    Registration::onnx("Multinomial", 7, |a| Random::parse(a, "Multinomial")),
];

#[derive(Clone, Copy, Debug)]
enum Distribution {
    Normal {
        mean: f64,
        scale: f64,
    },
    Uniform {
        low: f64,
        high: f64,
    },
    /// 1 with the probability that the operand says.
    Bernoulli,
    /// Classes by the logarithms of their probabilities, so many draws from each row.
    Multinomial {
        draws: usize,
    },
}

/// A tensor of random numbers.
#[derive(Debug)]
pub struct Random {
    name: &'static str,
    distribution: Distribution,
    /// The shape, when it stands in the node.
    shape: Option<Dims>,
    dtype: Option<DType>,
    state: AtomicU64,
}

/// Makes nodes without a seed differ from each other.
static UNSEEDED: AtomicU64 = AtomicU64::new(1);

const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    fn parse(a: &mut Attributes, name: &'static str) -> Result<Op> {
        let distribution = match name {
            "Bernoulli" => Distribution::Bernoulli,
            "Multinomial" => {
                let n = a.int_or("sample_size", 1)?;
                let draws = usize::try_from(n)
                    .map_err(|_| Error::invalid_model(format!("sample_size is {n}; 0 or more was wanted")))?;
                Distribution::Multinomial { draws }
            }
            _ if name.starts_with("RandomNormal") => {
                Distribution::Normal { mean: a.float_or("mean", 0.0)?.into(), scale: a.float_or("scale", 1.0)?.into() }
            }
            _ => Distribution::Uniform { low: a.float_or("low", 0.0)?.into(), high: a.float_or("high", 1.0)?.into() },
        };
        let shape = match a.ints("shape")? {
            Some(list) => {
                let dims: Option<Dims> = list.iter().map(|&d| usize::try_from(d).ok()).collect();
                Some(dims.ok_or_else(|| Error::invalid_model(format!("shape is {list:?}; sizes were wanted")))?)
            }
            None if matches!(name, "RandomNormal" | "RandomUniform") => {
                return Err(Error::invalid_model("attribute shape is missing"));
            }
            None => None,
        };
        let default = match name {
            "Multinomial" => Some(DType::I32),
            "RandomNormal" | "RandomUniform" => Some(DType::F32),
            _ => None,
        };
        let dtype = a.dtype("dtype")?.or(default);
        let seed = match a.float("seed")? {
            Some(seed) => u64::from(seed.to_bits()),
            None => mix(UNSEEDED.fetch_add(1, Ordering::Relaxed).wrapping_mul(STEP)),
        };
        Ok(Random { name, distribution, shape, dtype, state: AtomicU64::new(mix(seed)) }.into())
    }

    /// A number in `[0, 1)` with 53 random bits.
    fn unit(&self) -> f64 {
        let z = mix(self.state.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP));
        (z >> 11) as f64 / (1u64 << 53) as f64
    }

    /// By the method of Box and Muller.
    fn normal(&self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}

impl Same for Random {
    /// Each draws numbers of its own.
    fn same(&self, _: &dyn Operator) -> bool {
        false
    }
}

impl Operator for Random {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let fact = match (&self.shape, self.distribution) {
            (Some(dims), _) => {
                let dtype = self.dtype.unwrap_or(DType::F32);
                byte_count(dtype, dims)?;
                Fact::new(dtype, dims)
            }
            (None, Distribution::Multinomial { draws }) => {
                let x = cx.input(0)?;
                let batch = match x.shape.as_deref() {
                    Some([b, _]) => b.clone(),
                    None => Dim::Unknown,
                    Some(_) => {
                        let shape = x.shape_text();
                        return Err(Error::shape(format!("probabilities of shape {shape}; a matrix was wanted")));
                    }
                };
                Fact::with_shape(self.dtype.unwrap_or(DType::I32), [batch, Dim::Known(draws)].into_iter().collect())
            }
            (None, _) => {
                let x = cx.input(0)?;
                let dtype = self.dtype.unwrap_or(x.dtype);
                Fact { dtype, shape: x.shape.clone(), content: Content::Unknown }
            }
        };
        if matches!(fact.dtype, DType::String) || fact.dtype.bits() < 8 {
            return Err(wrong_dtype("the result", fact.dtype, "numbers"));
        }
        cx.results(vec![fact])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let probabilities: Option<Vec<f64>> = match (self.distribution, io.optional(0)) {
            (Distribution::Bernoulli | Distribution::Multinomial { .. }, Some(x)) => {
                Some(for_dtype!(x.dtype, [F32, F64], T =>
                    x.as_slice::<T>()?.iter().map(|&p| f64::from(p)).collect(),
                    else return Err(wrong_dtype("the probabilities", x.dtype, "float32 and float64"))))
            }
            _ => None,
        };
        let classes = io.optional(0).and_then(|x| x.dims.last().copied()).unwrap_or(0);
        let p = probabilities.unwrap_or_default();
        let draw = |i: usize| match self.distribution {
            Distribution::Normal { mean, scale } => mean + scale * self.normal(),
            Distribution::Uniform { low, high } => low + (high - low) * self.unit(),
            Distribution::Bernoulli => f64::from(u8::from(self.unit() < p[i])),
            Distribution::Multinomial { draws } => {
                let row = &p[i / draws * classes..][..classes];
                // Subtracting the largest keeps the exponentials in range.
                let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mut left = self.unit() * row.iter().map(|l| (l - top).exp()).sum::<f64>();
                let chosen = row.iter().position(|l| {
                    left -= (l - top).exp();
                    left < 0.0
                });
                chosen.unwrap_or(classes.saturating_sub(1)) as f64
            }
        };
        let y = io.output(0)?;
        match y.dtype {
            DType::F16 => y.as_slice::<f16>()?.iter_mut().enumerate().for_each(|(i, y)| *y = f16::from_f64(draw(i))),
            DType::Bf16 => y.as_slice::<bf16>()?.iter_mut().enumerate().for_each(|(i, y)| *y = bf16::from_f64(draw(i))),
            dtype => for_dtype!(dtype, [F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, Bool], T =>
                y.as_slice::<T>()?.iter_mut().enumerate().for_each(|(i, y)| *y = draw(i) as T),
                else return Err(wrong_dtype("the result", dtype, "numbers"))),
        }
        Ok(())
    }

    fn is_deterministic(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;
    use crate::ops::testing::{OneNode, f32s};
    use crate::tensor::Tensor;
    use std::sync::Arc;
    use weblane_kernels::par::Pool;
    use weblane_kernels::simd::Isa;

    fn sample(name: &'static str, distribution: Distribution, x: &Tensor, len: usize) -> Vec<f32> {
        let random = Random { name, distribution, shape: None, dtype: None, state: AtomicU64::new(7) };
        let mut y = Tensor::zeros(DType::F32, &[1, len]).unwrap();
        Pool::new(1).run(Isa::best(), |cx| {
            random
                .run(cx, &mut Io { inputs: &[Some(x.view())], outputs: &mut [y.view_mut()], in_place: None })
                .unwrap();
        });
        y.as_slice::<f32>().unwrap().to_vec()
    }

    #[test]
    fn moments() {
        const N: usize = 20_000;
        let mean = |v: &[f32]| v.iter().map(|&x| f64::from(x)).sum::<f64>() / N as f64;
        let like = f32s(&[1, N], &vec![0.25; N]);
        let normal = sample("RandomNormalLike", Distribution::Normal { mean: 3.0, scale: 2.0 }, &like, N);
        let variance = normal.iter().map(|&x| (f64::from(x) - 3.0).powi(2)).sum::<f64>() / N as f64;
        assert!((mean(&normal) - 3.0).abs() < 0.1 && (variance - 4.0).abs() < 0.2, "{} {variance}", mean(&normal));
        let uniform = sample("RandomUniformLike", Distribution::Uniform { low: -1.0, high: 3.0 }, &like, N);
        assert!((mean(&uniform) - 1.0).abs() < 0.05 && uniform.iter().all(|x| (-1.0..3.0).contains(x)));
        let coin = sample("Bernoulli", Distribution::Bernoulli, &like, N);
        assert!((mean(&coin) - 0.25).abs() < 0.02 && coin.iter().all(|x| *x == 0.0 || *x == 1.0));
        let logs = f32s(&[1, 2], &[0.75f32.ln(), 0.25f32.ln()]);
        let classes = sample("Multinomial", Distribution::Multinomial { draws: N }, &logs, N);
        assert!((mean(&classes) - 0.25).abs() < 0.02);
    }

    #[test]
    fn shapes() {
        let y = OneNode::new("RandomNormal").ints("shape", &[2, 3]).infer(&[]).unwrap();
        assert_eq!(y[0].dims().unwrap().as_slice(), [2, 3]);
        assert!(y[0].tensor().is_none(), "random numbers are no constants");
        let e = OneNode::new("RandomNormal").infer(&[]).unwrap_err();
        assert_eq!(e.code, ErrorCode::InvalidModel);
        let x = Fact::constant(Arc::new(f32s(&[2, 3], &[0.0; 6])));
        let y = OneNode::new("Multinomial").int("sample_size", 5).infer(&[Some(x)]).unwrap();
        assert_eq!((y[0].dtype, y[0].dims().unwrap().as_slice()), (DType::I32, &[2, 5][..]));
    }
}
