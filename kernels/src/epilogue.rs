//! What happens to an accumulator while it is still in registers: bias, residual, activation.

use crate::math;
use crate::simd::Simd;

/// A pointwise function applied to a kernel's result before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum Activation {
    /// `x`.
    #[default]
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, lo), hi)`.
    Clip {
        /// Lower bound.
        lo: f32,
        /// Upper bound.
        hi: f32,
    },
    /// `x` for `x >= 0`, `alpha * x` below.
    LeakyRelu {
        /// Slope of the negative half.
        alpha: f32,
    },
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `x * sigmoid(x)`, also called swish.
    Silu,
    /// `tanh(x)`.
    Tanh,
    /// `clip(alpha * x + beta, 0, 1)`.
    HardSigmoid {
        /// Slope.
        alpha: f32,
        /// Offset.
        beta: f32,
    },
    /// `x * clip(x / 6 + 1/2, 0, 1)`.
    HardSwish,
    /// `x/2 * (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// `x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
}

impl Activation {
    /// The function on a vector. NaN gives NaN.
    ///
    /// In a loop the branch goes the same way every time, which costs next to nothing beside the functions that have
    /// code of any length; keep the loop rolled, since all of them are inlined.
    #[inline(always)]
    pub fn apply<S: Simd>(self, s: S, x: S::F32) -> S::F32 {
        match self {
            Self::Identity => x,
            Self::Relu => s.max(x, s.splat(0.0)),
            Self::Clip { lo, hi } => s.min(s.max(x, s.splat(lo)), s.splat(hi)),
            Self::LeakyRelu { alpha } => s.select(s.lt(x, s.splat(0.0)), s.mul(x, s.splat(alpha)), x),
            Self::Sigmoid => math::sigmoid(s, x),
            Self::Silu => math::silu(s, x),
            Self::Tanh => math::tanh(s, x),
            Self::HardSigmoid { alpha, beta } => hard_sigmoid(s, x, alpha, beta),
            Self::HardSwish => s.mul(x, hard_sigmoid(s, x, 1.0 / 6.0, 0.5)),
            Self::Gelu => math::gelu(s, x),
            Self::GeluTanh => math::gelu_tanh(s, x),
        }
    }

    /// The function on one number, through the same code as [`apply`](Self::apply).
    pub fn apply_scalar(self, x: f32) -> f32 {
        struct One(Activation, f32);
        impl crate::simd::Kernel for One {
            type Output = f32;
            #[inline(always)]
            fn run<S: Simd>(self, s: S) -> f32 {
                let mut y = [self.1];
                s.store_partial(&mut y, self.0.apply(s, s.splat(self.1)));
                y[0]
            }
        }
        crate::simd::dispatch(crate::simd::Isa::best(), One(self, x))
    }
}

#[inline(always)]
fn hard_sigmoid<S: Simd>(s: S, x: S::F32, alpha: f32, beta: f32) -> S::F32 {
    let y = s.mul_add(x, s.splat(alpha), s.splat(beta));
    s.min(s.max(y, s.splat(0.0)), s.splat(1.0))
}

/// What a matrix product or convolution does with its accumulators: `activation(acc + bias + residual)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// One value per output column (channel of a channels-last tensor).
    pub bias: Option<&'a [f32]>,
    /// Same shape and row stride as the output.
    pub residual: Option<&'a [f32]>,
    /// Applied last.
    pub activation: Activation,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, Kernel, dispatch};

    struct Apply<'a>(Activation, &'a mut [f32]);
    impl Kernel for Apply<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for part in self.1.chunks_mut(S::LANES) {
                s.store_partial(part, self.0.apply(s, s.load_partial(part)));
            }
        }
    }

    #[test]
    fn every_activation_is_its_formula() {
        use Activation::*;
        type Case = (Activation, fn(f64) -> f64);
        let cases: [Case; 11] = [
            (Identity, |x| x),
            (Relu, |x| x.max(0.0)),
            (Clip { lo: -1.5, hi: 2.0 }, |x| x.clamp(-1.5, 2.0)),
            (LeakyRelu { alpha: 0.1 }, |x| if x < 0.0 { 0.1 * x } else { x }),
            (Sigmoid, |x| 1.0 / (1.0 + (-x).exp())),
            (Silu, |x| x / (1.0 + (-x).exp())),
            (Tanh, f64::tanh),
            (HardSigmoid { alpha: 0.2, beta: 0.4 }, |x| (0.2 * x + 0.4).clamp(0.0, 1.0)),
            (HardSwish, |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
            (Gelu, |x| 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt()))),
            (GeluTanh, |x| {
                0.5 * x * (1.0 + ((2.0 / core::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }),
        ];
        let x: Vec<f32> = (-400..=400).map(|i| i as f32 / 37.0).collect();
        for (activation, formula) in cases {
            for isa in Isa::available() {
                let mut y = x.clone();
                dispatch(isa, Apply(activation, &mut y));
                for (&x, &y) in x.iter().zip(&y) {
                    let want = formula(f64::from(x));
                    assert!(
                        (f64::from(y) - want).abs() <= 2e-6 * want.abs().max(1.0),
                        "{isa} {activation:?}({x}) = {y}"
                    );
                }
                let mut nan = [f32::NAN];
                dispatch(isa, Apply(activation, &mut nan));
                assert!(nan[0].is_nan(), "{isa} {activation:?}(NaN)");
            }
            assert!((f64::from(activation.apply_scalar(-0.7)) - formula(f64::from(-0.7f32))).abs() < 1e-6);
        }
    }
}
