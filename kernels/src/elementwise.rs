//! Pointwise functions of one and of two tensors.
//!
//! ```text
//! unary:   for each task's elements, a vector at a time: y[i] = f(x[i])
//! binary:  axes of size 1 are dropped and neighbours that every operand walks alike are merged, so that what is left is
//!          (nearly always) one row per step of an operand that broadcasts;
//!          for each row: y[row, i] = f(a[.. + i or 0], b[.. + i or 0])
//! ```
//!
//! `f32` goes through vectors, all other types through the generic [`map`] and [`broadcast_map`]. The `_assign` forms
//! write their result over the first operand. Nothing is allocated.

use crate::error::{Error, Result};
use crate::math;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// Elements that make a task.
const TASK: usize = 16 * 1024;

/// Axes that may remain after merging.
const MAX_AXES: usize = 16;

/// A function of one number. See the ONNX operators of the same names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    /// `|x|`.
    Abs,
    /// `-x`.
    Neg,
    /// `e^x`.
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// `x * x`.
    Square,
    /// `1 / x`.
    Reciprocal,
    /// Largest integer not above.
    Floor,
    /// Smallest integer not below.
    Ceil,
    /// Nearest integer, ties to even.
    Round,
    /// -1, 0 or 1; NaN for NaN.
    Sign,
    /// Sine.
    Sin,
    /// Cosine.
    Cos,
    /// Tangent.
    Tan,
    /// Inverse sine.
    Asin,
    /// Inverse cosine.
    Acos,
    /// Inverse tangent.
    Atan,
    /// Hyperbolic sine.
    Sinh,
    /// Hyperbolic cosine.
    Cosh,
    /// Inverse hyperbolic sine.
    Asinh,
    /// Inverse hyperbolic cosine.
    Acosh,
    /// Inverse hyperbolic tangent.
    Atanh,
    /// Error function.
    Erf,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `log(1 + e^x)`.
    Softplus,
    /// `x / (1 + |x|)`.
    Softsign,
    /// `max(x, 0)`.
    Relu,
    /// `x` for `x >= 0`, `alpha x` below.
    LeakyRelu {
        /// Slope of the negative half.
        alpha: f32,
    },
    /// `x` for `x >= 0`, `alpha (e^x - 1)` below.
    Elu {
        /// Minus the limit at -infinity.
        alpha: f32,
    },
    /// `gamma x` for `x > 0`, `gamma alpha (e^x - 1)` elsewhere.
    Selu {
        /// Factor of the negative half.
        alpha: f32,
        /// Factor of everything.
        gamma: f32,
    },
    /// `x` for `x >= 0`, `alpha (e^(x / alpha) - 1)` below.
    Celu {
        /// Minus the limit at -infinity.
        alpha: f32,
    },
    /// `x` for `x > alpha`, 0 elsewhere.
    ThresholdedRelu {
        /// Threshold.
        alpha: f32,
    },
    /// `min(max(alpha x + beta, 0), 1)`.
    HardSigmoid {
        /// Slope.
        alpha: f32,
        /// Offset.
        beta: f32,
    },
    /// `x * min(max(x / 6 + 1/2, 0), 1)`.
    HardSwish,
    /// `x/2 * (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * sigmoid(alpha x)`.
    Swish {
        /// Factor inside the sigmoid.
        alpha: f32,
    },
    /// `x * tanh(softplus(x))`.
    Mish,
    /// `x + bias` for `x < -lambda`, `x - bias` for `x > lambda`, 0 between.
    Shrink {
        /// How far the outer parts are moved.
        bias: f32,
        /// Half width of the part that is 0.
        lambda: f32,
    },
    /// `min(max(x, lo), hi)`.
    Clip {
        /// Lower bound.
        lo: f32,
        /// Upper bound; wins if it is below the lower.
        hi: f32,
    },
}

impl Unary {
    /// The formula in double precision: the function of `f64` tensors, and what the vectors are compared with.
    pub fn eval_f64(self, x: f64) -> f64 {
        let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
        // `max` and `min` of std drop NaN.
        let clip = |x: f64, lo: f64, hi: f64| if x.is_nan() { x } else { x.max(lo).min(hi) };
        // `x * gate`, with the limit 0 where a vanishing gate meets -infinity.
        let gated = |x: f64, gate: f64| if gate == 0.0 && !x.is_nan() { 0.0 } else { x * gate };
        let softplus = |x: f64| clip(x, 0.0, f64::INFINITY) + (-x.abs()).exp().ln_1p();
        match self {
            Self::Abs => x.abs(),
            Self::Neg => -x,
            Self::Exp => x.exp(),
            Self::Log => x.ln(),
            Self::Sqrt => x.sqrt(),
            Self::Square => x * x,
            Self::Reciprocal => 1.0 / x,
            Self::Floor => x.floor(),
            Self::Ceil => x.ceil(),
            Self::Round => x.round_ties_even(),
            Self::Sign => {
                if x > 0.0 {
                    1.0
                } else if x < 0.0 {
                    -1.0
                } else {
                    x
                }
            }
            Self::Sin => x.sin(),
            Self::Cos => x.cos(),
            Self::Tan => x.tan(),
            Self::Asin => x.asin(),
            Self::Acos => x.acos(),
            Self::Atan => x.atan(),
            Self::Sinh => x.sinh(),
            Self::Cosh => x.cosh(),
            // libm's, since the formulas of std lose the small arguments.
            Self::Asinh => libm::asinh(x),
            Self::Acosh => {
                if x < 1.0 {
                    f64::NAN
                } else {
                    libm::acosh(x)
                }
            }
            Self::Atanh => libm::atanh(x),
            Self::Erf => libm::erf(x),
            Self::Sigmoid => sigmoid(x),
            Self::Tanh => x.tanh(),
            Self::Softplus => softplus(x),
            Self::Softsign => {
                if x.is_infinite() {
                    x.signum()
                } else {
                    x / (1.0 + x.abs())
                }
            }
            Self::Relu => clip(x, 0.0, f64::INFINITY),
            Self::LeakyRelu { alpha } => {
                if x < 0.0 {
                    f64::from(alpha) * x
                } else {
                    x
                }
            }
            Self::Elu { alpha } => {
                if x < 0.0 {
                    f64::from(alpha) * x.exp_m1()
                } else {
                    x
                }
            }
            Self::Selu { alpha, gamma } => {
                let (alpha, gamma) = (f64::from(alpha), f64::from(gamma));
                if x <= 0.0 { gamma * (alpha * x.exp_m1()) } else { gamma * x }
            }
            Self::Celu { alpha } => {
                let alpha = f64::from(alpha);
                if x < 0.0 { alpha * (x / alpha).exp_m1() } else { x }
            }
            Self::ThresholdedRelu { alpha } => {
                if x > f64::from(alpha) || x.is_nan() {
                    x
                } else {
                    0.0
                }
            }
            Self::HardSigmoid { alpha, beta } => clip(f64::from(alpha) * x + f64::from(beta), 0.0, 1.0),
            Self::HardSwish => gated(x, clip(x / 6.0 + 0.5, 0.0, 1.0)),
            Self::Gelu => gated(x, 0.5 * libm::erfc(-x / core::f64::consts::SQRT_2)),
            Self::GeluTanh => {
                let u = (2.0 / core::f64::consts::PI).sqrt() * x * (1.0 + 0.044715 * x * x);
                gated(x, sigmoid(2.0 * u))
            }
            Self::Silu => gated(x, sigmoid(x)),
            Self::Swish { alpha } => gated(x, sigmoid(f64::from(alpha) * x)),
            Self::Mish => gated(x, softplus(x).tanh()),
            Self::Shrink { bias, lambda } => {
                let (bias, lambda) = (f64::from(bias), f64::from(lambda));
                if x < -lambda {
                    x + bias
                } else if x > lambda {
                    x - bias
                } else if x.is_nan() {
                    x
                } else {
                    0.0
                }
            }
            Self::Clip { lo, hi } => clip(x, f64::from(lo), f64::from(hi)),
        }
    }

    /// The ones that no vector code is worth: they go through std, number by number.
    fn scalar(self) -> Option<fn(f32) -> f32> {
        Some(match self {
            Self::Sin => f32::sin,
            Self::Cos => f32::cos,
            Self::Tan => f32::tan,
            Self::Asin => f32::asin,
            Self::Acos => f32::acos,
            Self::Atan => f32::atan,
            Self::Sinh => f32::sinh,
            Self::Cosh => f32::cosh,
            Self::Asinh => libm::asinhf,
            // libm's gives numbers for some arguments below 1.
            Self::Acosh => |x| if x < 1.0 { f32::NAN } else { libm::acoshf(x) },
            Self::Atanh => libm::atanhf,
            _ => return None,
        })
    }

    /// About how many scalar operations one element takes.
    pub(crate) fn cost(self) -> u64 {
        match self {
            Self::Abs
            | Self::Neg
            | Self::Square
            | Self::Floor
            | Self::Ceil
            | Self::Round
            | Self::Sign
            | Self::Relu
            | Self::LeakyRelu { .. }
            | Self::ThresholdedRelu { .. }
            | Self::HardSigmoid { .. }
            | Self::HardSwish
            | Self::Shrink { .. }
            | Self::Clip { .. } => 2,
            Self::Sqrt | Self::Reciprocal | Self::Softsign => 8,
            _ if self.scalar().is_some() => 100,
            _ => 40,
        }
    }
}

/// `y = f(x)` for every element.
///
/// # Errors
/// If the lengths differ.
pub fn unary(cx: &Cx<'_>, op: Unary, x: &[f32], y: &mut [f32]) -> Result<()> {
    if x.len() != y.len() {
        return Err(Error::new(format!("{op:?} of {} elements into {}", x.len(), y.len())));
    }
    unary_tasks(cx, op, Some(x), y);
    Ok(())
}

/// `y = f(y)` for every element.
pub fn unary_assign(cx: &Cx<'_>, op: Unary, y: &mut [f32]) {
    unary_tasks(cx, op, None, y);
}

fn unary_tasks(cx: &Cx<'_>, op: Unary, x: Option<&[f32]>, y: &mut [f32]) {
    let len = y.len();
    let out = DisjointMut::new(y);
    cx.for_each(len.div_ceil(TASK), op.cost() * len as u64, &|task| {
        let start = task * TASK;
        let n = TASK.min(len - start);
        // SAFETY: every task has its own elements.
        let y = unsafe { out.range(start, n) };
        let x = x.map(|x| &x[start..start + n]);
        unary_part(cx.isa(), op, x, y);
    });
}

/// `y = f(x)`, or `y = f(y)`, on this thread.
pub(crate) fn unary_part(isa: Isa, op: Unary, x: Option<&[f32]>, y: &mut [f32]) {
    let n = y.len();
    if let Some(f) = op.scalar() {
        match x {
            Some(x) => x.iter().zip(y).for_each(|(&x, y)| *y = f(x)),
            None => y.iter_mut().for_each(|y| *y = f(*y)),
        }
    } else {
        assert!(x.is_none_or(|x| x.len() == n));
        let y = y.as_mut_ptr();
        dispatch(isa, UnaryKernel { op, x: x.map_or(y.cast_const(), <[f32]>::as_ptr), y, n });
    }
}

/// `x` and `y` are the same or do not overlap; both have `n` elements.
struct UnaryKernel {
    op: Unary,
    x: *const f32,
    y: *mut f32,
    n: usize,
}

/// A loop over vectors in which the expression stands once: code that is inlined once is certain to be.
macro_rules! each_vector {
    ($S:ident, $s:ident, $kernel:ident, |$v:ident| $body:expr) => {{
        let mut i = 0;
        while i < $kernel.n {
            let whole = $kernel.n - i >= $S::LANES;
            let $v = if whole {
                // SAFETY: so many elements are left.
                unsafe { $s.load_ptr($kernel.x.add(i)) }
            } else {
                // SAFETY: so many elements are left, and nobody writes them while the slice lives.
                $s.load_partial(unsafe { core::slice::from_raw_parts($kernel.x.add(i), $kernel.n - i) })
            };
            let y = $body;
            if whole {
                // SAFETY: so many elements are left.
                unsafe { $s.store_ptr($kernel.y.add(i), y) };
            } else {
                // SAFETY: so many elements are left, and nobody else has them while the slice lives.
                $s.store_partial(unsafe { core::slice::from_raw_parts_mut($kernel.y.add(i), $kernel.n - i) }, y);
            }
            i += $S::LANES;
        }
    }};
}

impl Kernel for UnaryKernel {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let k = self;
        let zero = s.splat(0.0);
        let one = s.splat(1.0);
        match k.op {
            Unary::Abs => each_vector!(S, s, k, |x| s.abs(x)),
            Unary::Neg => each_vector!(S, s, k, |x| s.neg(x)),
            Unary::Exp => each_vector!(S, s, k, |x| math::exp(s, x)),
            Unary::Log => each_vector!(S, s, k, |x| math::log(s, x)),
            Unary::Sqrt => each_vector!(S, s, k, |x| s.sqrt(x)),
            Unary::Square => each_vector!(S, s, k, |x| s.mul(x, x)),
            Unary::Reciprocal => each_vector!(S, s, k, |x| s.div(one, x)),
            Unary::Floor => each_vector!(S, s, k, |x| s.floor(x)),
            Unary::Ceil => each_vector!(S, s, k, |x| s.ceil(x)),
            Unary::Round => each_vector!(S, s, k, |x| s.round(x)),
            Unary::Sign => each_vector!(S, s, k, |x| {
                let negative = s.select(s.lt(x, zero), s.splat(-1.0), x);
                s.select(s.lt(zero, x), one, negative)
            }),
            Unary::Erf => each_vector!(S, s, k, |x| math::erf(s, x)),
            Unary::Sigmoid => each_vector!(S, s, k, |x| math::sigmoid(s, x)),
            Unary::Tanh => each_vector!(S, s, k, |x| math::tanh(s, x)),
            Unary::Softplus => each_vector!(S, s, k, |x| math::softplus(s, x)),
            Unary::Softsign => each_vector!(S, s, k, |x| {
                // The limit keeps infinity / infinity out; the quotient is +-1 from far below on.
                let limit = s.splat(f32::MAX);
                let a = s.min(s.abs(x), limit);
                let q = s.div(a, s.add(one, a));
                s.select(s.lt(x, zero), s.neg(q), q)
            }),
            Unary::Relu => each_vector!(S, s, k, |x| s.max(x, zero)),
            Unary::LeakyRelu { alpha } => {
                each_vector!(S, s, k, |x| s.select(s.lt(x, zero), s.mul(x, s.splat(alpha)), x))
            }
            Unary::Elu { alpha } => each_vector!(S, s, k, |x| {
                let below = s.mul(s.splat(alpha), math::expm1_negative(s, s.min_fast(x, zero)));
                s.select(s.lt(x, zero), below, x)
            }),
            Unary::Selu { alpha, gamma } => each_vector!(S, s, k, |x| {
                let below = s.mul(s.splat(alpha), math::expm1_negative(s, s.min_fast(x, zero)));
                s.mul(s.splat(gamma), s.select(s.le(x, zero), below, x))
            }),
            Unary::Celu { alpha } => each_vector!(S, s, k, |x| {
                let scaled = s.div(s.min_fast(x, zero), s.splat(alpha));
                s.select(s.lt(x, zero), s.mul(s.splat(alpha), math::expm1_negative(s, scaled)), x)
            }),
            Unary::ThresholdedRelu { alpha } => {
                each_vector!(S, s, k, |x| s.select(s.le(x, s.splat(alpha)), zero, x))
            }
            Unary::HardSigmoid { alpha, beta } => each_vector!(S, s, k, |x| {
                let y = s.mul_add(x, s.splat(alpha), s.splat(beta));
                s.min(s.max(y, zero), one)
            }),
            Unary::HardSwish => each_vector!(S, s, k, |x| {
                // The limit keeps -infinity * 0 out.
                let x = s.max(x, s.splat(-4.0));
                let gate = s.mul_add(x, s.splat(1.0 / 6.0), s.splat(0.5));
                s.mul(x, s.min(s.max(gate, zero), one))
            }),
            Unary::Gelu => each_vector!(S, s, k, |x| math::gelu(s, x)),
            Unary::GeluTanh => each_vector!(S, s, k, |x| math::gelu_tanh(s, x)),
            Unary::Silu => each_vector!(S, s, k, |x| math::silu(s, x)),
            Unary::Swish { alpha } => each_vector!(S, s, k, |x| {
                let gate = math::sigmoid(s, s.mul(x, s.splat(alpha)));
                // Infinity times a gate that vanished is 0, the limit.
                let vanished = s.mask_and(s.eq(gate, zero), s.eq(s.abs(x), s.splat(f32::INFINITY)));
                s.select(vanished, zero, s.mul(x, gate))
            }),
            Unary::Mish => each_vector!(S, s, k, |x| math::mish(s, x)),
            Unary::Shrink { bias, lambda } => each_vector!(S, s, k, |x| {
                let inside = s.mask_and(s.le(x, s.splat(lambda)), s.le(s.splat(-lambda), x));
                let moved = s.select(s.lt(x, zero), s.splat(bias), s.splat(-bias));
                s.select(inside, zero, s.add(x, moved))
            }),
            Unary::Clip { lo, hi } => each_vector!(S, s, k, |x| s.min(s.max(x, s.splat(lo)), s.splat(hi))),
            Unary::Sin
            | Unary::Cos
            | Unary::Tan
            | Unary::Asin
            | Unary::Acos
            | Unary::Atan
            | Unary::Sinh
            | Unary::Cosh
            | Unary::Asinh
            | Unary::Acosh
            | Unary::Atanh => unreachable!("these have a scalar function"),
        }
    }
}

/// `y = f(x)` for elements of any type. `cost` is about how many scalar operations one element takes.
///
/// # Errors
/// If the lengths differ.
pub fn map<A: Copy + Sync, Y: Send>(
    cx: &Cx<'_>,
    cost: u64,
    x: &[A],
    y: &mut [Y],
    f: impl Fn(A) -> Y + Sync,
) -> Result<()> {
    if x.len() != y.len() {
        return Err(Error::new(format!("a function of {} elements into {}", x.len(), y.len())));
    }
    let len = y.len();
    let out = DisjointMut::new(y);
    cx.for_each(len.div_ceil(TASK), cost * len as u64, &|task| {
        let start = task * TASK;
        let n = TASK.min(len - start);
        // SAFETY: every task has its own elements.
        let y = unsafe { out.range(start, n) };
        for (y, &x) in y.iter_mut().zip(&x[start..start + n]) {
            *y = f(x);
        }
    });
    Ok(())
}

/// [`map`] over itself.
pub fn map_assign<T: Copy + Send>(cx: &Cx<'_>, cost: u64, y: &mut [T], f: impl Fn(T) -> T + Sync) {
    let len = y.len();
    let out = DisjointMut::new(y);
    cx.for_each(len.div_ceil(TASK), cost * len as u64, &|task| {
        let start = task * TASK;
        // SAFETY: every task has its own elements.
        for y in unsafe { out.range(start, TASK.min(len - start)) } {
            *y = f(*y);
        }
    });
}

/// A function of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// `a + b`.
    Add,
    /// `a - b`.
    Sub,
    /// `a * b`.
    Mul,
    /// `a / b`.
    Div,
    /// Smaller of both; NaN if either is NaN.
    Min,
    /// Larger of both; NaN if either is NaN.
    Max,
    /// `a` for `a >= 0`, `a b` below.
    PRelu,
    /// `a^b`.
    Pow,
    /// Remainder of the division truncated toward zero, with the sign of a, as C's `fmod`.
    Rem,
}

impl Binary {
    /// The ones that no vector code is worth.
    fn scalar(self) -> Option<fn(f32, f32) -> f32> {
        match self {
            Self::Pow => Some(f32::powf),
            Self::Rem => Some(|a, b| a % b),
            _ => None,
        }
    }
}

/// `y = f(a, b)` with NumPy broadcasting: shapes are aligned at their last axes, size 1 repeats.
///
/// # Errors
/// If the shapes do not broadcast to that of y, or a slice does not have the size of its shape.
pub fn binary_f32(
    cx: &Cx<'_>,
    op: Binary,
    a: &[f32],
    a_dims: &[usize],
    b: &[f32],
    b_dims: &[usize],
    y: &mut [f32],
    y_dims: &[usize],
) -> Result<()> {
    let walk = Walk::new([(a.len(), a_dims), (b.len(), b_dims)], (y.len(), y_dims))?;
    if let (Binary::Pow, [exponent]) = (op, b)
        && let Some(function) = power(*exponent)
        && walk.strides[0][walk.axes - 1] == 1
        && walk.axes == 1
    {
        return unary(cx, function, a, y);
    }
    binary_tasks(cx, op, &walk, Some(a), Some(b), y);
    Ok(())
}

/// `y = f(y, b)`, or `y = f(b, y)` if `reversed`, where b broadcasts to the shape of y.
///
/// # Errors
/// If b does not broadcast to the shape of y, or a slice does not have the size of its shape.
pub fn binary_f32_assign(
    cx: &Cx<'_>,
    op: Binary,
    reversed: bool,
    y: &mut [f32],
    y_dims: &[usize],
    b: &[f32],
    b_dims: &[usize],
) -> Result<()> {
    let own = (y.len(), y_dims);
    if reversed {
        let walk = Walk::new([(b.len(), b_dims), own], own)?;
        binary_tasks(cx, op, &walk, Some(b), None, y);
    } else {
        if let (Binary::Pow, [exponent]) = (op, b)
            && let Some(function) = power(*exponent)
        {
            Walk::new([own, (1, b_dims)], own)?;
            unary_assign(cx, function, y);
            return Ok(());
        }
        let walk = Walk::new([own, (b.len(), b_dims)], own)?;
        binary_tasks(cx, op, &walk, None, Some(b), y);
    }
    Ok(())
}

/// Exponents that have a function of their own: those that exporters write, in LayerNorm above all.
fn power(exponent: f32) -> Option<Unary> {
    match exponent {
        2.0 => Some(Unary::Square),
        -1.0 => Some(Unary::Reciprocal),
        _ => None,
    }
}

/// `a` and `b` have the sizes the walk was made for; an absent one is y itself, walked as y is.
fn binary_tasks(cx: &Cx<'_>, op: Binary, walk: &Walk<2>, a: Option<&[f32]>, b: Option<&[f32]>, y: &mut [f32]) {
    let cost = if op.scalar().is_some() { 100 } else { 2 };
    let out = DisjointMut::new(y);
    cx.for_each(walk.tasks(), cost * walk.len as u64, &|task| {
        let y = out.as_mut_ptr();
        let operand = |x: Option<&[f32]>| x.map_or(y.cast_const(), <[f32]>::as_ptr);
        let (a, b) = (operand(a), operand(b));
        let mut rows = walk.rows(task);
        if let Some(f) = op.scalar() {
            while let Some((at, [a_at, b_at], n)) = rows.next() {
                let [a_step, b_step] = rows.steps();
                for i in 0..n {
                    // SAFETY: the walk stays inside the operands, and a task's part of y is its own.
                    unsafe {
                        let value = f(*a.add(a_at + i * a_step), *b.add(b_at + i * b_step));
                        *y.add(at + i) = value;
                    }
                }
            }
        } else {
            dispatch(cx.isa(), BinaryKernel { op, rows, a, b, y });
        }
    });
}

struct BinaryKernel<'a> {
    op: Binary,
    rows: Rows<'a, 2>,
    a: *const f32,
    b: *const f32,
    y: *mut f32,
}

/// One operand of a row: the vector at `i` if it walks along, the same value in all lanes if it broadcasts.
///
/// # Safety
/// `p + i*step ..` must have `n` (at most `LANES`) elements, or one if `step` is 0.
#[inline(always)]
unsafe fn operand<S: Simd>(s: S, p: *const f32, step: usize, i: usize, n: usize) -> S::F32 {
    if step == 0 {
        // SAFETY: the caller's contract.
        unsafe { s.splat_ptr(p) }
    } else if n >= S::LANES {
        // SAFETY: the caller's contract.
        unsafe { s.load_ptr(p.add(i)) }
    } else {
        // SAFETY: the caller's contract; the slice is gone before anything is written.
        s.load_partial(unsafe { core::slice::from_raw_parts(p.add(i), n) })
    }
}

macro_rules! each_row {
    ($S:ident, $s:ident, $kernel:ident, |$a:ident, $b:ident| $body:expr) => {{
        let [a_step, b_step] = $kernel.rows.steps();
        while let Some((at, [a_at, b_at], n)) = $kernel.rows.next() {
            // SAFETY: the walk stays inside the operands.
            let (a, b, y) = unsafe { ($kernel.a.add(a_at), $kernel.b.add(b_at), $kernel.y.add(at)) };
            let mut i = 0;
            while i < n {
                let left = n - i;
                // SAFETY: the row has `n` elements of each operand that walks along.
                let ($a, $b) = unsafe { (operand($s, a, a_step, i, left), operand($s, b, b_step, i, left)) };
                let value = $body;
                if left >= $S::LANES {
                    // SAFETY: the row has `n` elements, and they are this task's.
                    unsafe { $s.store_ptr(y.add(i), value) };
                } else {
                    // SAFETY: as above.
                    $s.store_partial(unsafe { core::slice::from_raw_parts_mut(y.add(i), left) }, value);
                }
                i += $S::LANES;
            }
        }
    }};
}

impl Kernel for BinaryKernel<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut k = self;
        match k.op {
            Binary::Add => each_row!(S, s, k, |a, b| s.add(a, b)),
            Binary::Sub => each_row!(S, s, k, |a, b| s.sub(a, b)),
            Binary::Mul => each_row!(S, s, k, |a, b| s.mul(a, b)),
            Binary::Div => each_row!(S, s, k, |a, b| s.div(a, b)),
            Binary::Min => each_row!(S, s, k, |a, b| s.min(a, b)),
            Binary::Max => each_row!(S, s, k, |a, b| s.max(a, b)),
            Binary::PRelu => each_row!(S, s, k, |a, b| s.select(s.lt(a, s.splat(0.0)), s.mul(a, b), a)),
            Binary::Pow | Binary::Rem => unreachable!("these have a scalar function"),
        }
    }
}

/// `y = f(a, b)` with NumPy broadcasting, for elements of any types. `cost` is about how many scalar operations one
/// element takes.
///
/// # Errors
/// If the shapes do not broadcast to that of y, or a slice does not have the size of its shape.
pub fn broadcast_map<A: Copy + Sync, B: Copy + Sync, Y: Send>(
    cx: &Cx<'_>,
    cost: u64,
    a: &[A],
    a_dims: &[usize],
    b: &[B],
    b_dims: &[usize],
    y: &mut [Y],
    y_dims: &[usize],
    f: impl Fn(A, B) -> Y + Sync,
) -> Result<()> {
    let walk = Walk::new([(a.len(), a_dims), (b.len(), b_dims)], (y.len(), y_dims))?;
    let out = DisjointMut::new(y);
    cx.for_each(walk.tasks(), cost * walk.len as u64, &|task| {
        let mut rows = walk.rows(task);
        let [a_step, b_step] = rows.steps();
        while let Some((at, [a_at, b_at], n)) = rows.next() {
            // SAFETY: every task has its own rows.
            let y = unsafe { out.range(at, n) };
            match (a_step, b_step) {
                (0, 0) => y.iter_mut().for_each(|y| *y = f(a[a_at], b[b_at])),
                (_, 0) => y.iter_mut().zip(&a[a_at..a_at + n]).for_each(|(y, &a)| *y = f(a, b[b_at])),
                (0, _) => y.iter_mut().zip(&b[b_at..b_at + n]).for_each(|(y, &b)| *y = f(a[a_at], b)),
                _ => {
                    let operands = a[a_at..a_at + n].iter().zip(&b[b_at..b_at + n]);
                    y.iter_mut().zip(operands).for_each(|(y, (&a, &b))| *y = f(a, b));
                }
            }
        }
    });
    Ok(())
}

/// `y = f(y, b)`, where b broadcasts to the shape of y, for elements of any types.
///
/// # Errors
/// If b does not broadcast to the shape of y, or a slice does not have the size of its shape.
pub fn broadcast_map_assign<Y: Copy + Send, B: Copy + Sync>(
    cx: &Cx<'_>,
    cost: u64,
    y: &mut [Y],
    y_dims: &[usize],
    b: &[B],
    b_dims: &[usize],
    f: impl Fn(Y, B) -> Y + Sync,
) -> Result<()> {
    let walk = Walk::new([(b.len(), b_dims)], (y.len(), y_dims))?;
    let out = DisjointMut::new(y);
    cx.for_each(walk.tasks(), cost * walk.len as u64, &|task| {
        let mut rows = walk.rows(task);
        let [step] = rows.steps();
        while let Some((at, [b_at], n)) = rows.next() {
            // SAFETY: every task has its own rows.
            let y = unsafe { out.range(at, n) };
            if step == 0 {
                y.iter_mut().for_each(|y| *y = f(*y, b[b_at]));
            } else {
                y.iter_mut().zip(&b[b_at..b_at + n]).for_each(|(y, &b)| *y = f(*y, b));
            }
        }
    });
    Ok(())
}

/// The shape that shapes broadcast to, as NumPy has it, appended to `y`; false if they do not.
pub fn broadcast_dims(a: &[usize], b: &[usize], y: &mut impl Extend<usize>) -> bool {
    let rank = a.len().max(b.len());
    let dim = |dims: &[usize], axis: usize| {
        let missing = rank - dims.len();
        if axis < missing { 1 } else { dims[axis - missing] }
    };
    let fits = (0..rank).all(|i| dim(a, i) == dim(b, i) || dim(a, i) == 1 || dim(b, i) == 1);
    if fits {
        y.extend((0..rank).map(|i| if dim(a, i) == 1 { dim(b, i) } else { dim(a, i) }));
    }
    fits
}

/// How `N` operands are walked along a dense output: axes merged, the last one is the row.
struct Walk<const N: usize> {
    /// At least one.
    axes: usize,
    dims: [usize; MAX_AXES],
    /// Elements from step to step along each axis; along the last one 1, or 0 for an operand that repeats.
    strides: [[usize; MAX_AXES]; N],
    len: usize,
}

impl<const N: usize> Walk<N> {
    /// Each operand and the output with the length of its slice.
    fn new(operands: [(usize, &[usize]); N], (len, dims): (usize, &[usize])) -> Result<Self> {
        let refuse = || {
            let shapes: Vec<_> = operands.iter().map(|o| format!("{:?} ({} elements)", o.1, o.0)).collect();
            let shapes = shapes.join(" and ");
            Error::new(format!("{shapes} do not broadcast to {dims:?} ({len} elements)"))
        };
        let count = |dims: &[usize]| dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let fits = |&(len, own): &(usize, &[usize])| {
            count(own) == Some(len)
                && own.len() <= dims.len()
                && own.iter().zip(&dims[dims.len() - own.len()..]).all(|(&d, &y)| d == y || d == 1)
        };
        if count(dims) != Some(len) || !operands.iter().all(fits) {
            return Err(refuse());
        }
        // From the last axis to the first, so that strides and merging come naturally; reversed at the end.
        let mut walk = Self { axes: 0, dims: [1; MAX_AXES], strides: [[0; MAX_AXES]; N], len };
        let mut dense = [1; N];
        for (from_end, &dim) in dims.iter().rev().enumerate() {
            let mut strides = [0; N];
            for (i, (_, own)) in operands.iter().enumerate() {
                let own = if from_end < own.len() { own[own.len() - 1 - from_end] } else { 1 };
                if own != 1 {
                    strides[i] = dense[i];
                    dense[i] *= own;
                }
            }
            if dim == 1 {
                continue;
            }
            let merges = walk.axes > 0 && {
                let last = walk.axes - 1;
                // A stride of 0 continues one of 0, any other the one that a dense axis would have next.
                (0..N).all(|i| {
                    strides[i] == walk.strides[i][last] * walk.dims[last]
                        && (strides[i] == 0) == (walk.strides[i][last] == 0)
                })
            };
            if merges {
                walk.dims[walk.axes - 1] *= dim;
                continue;
            }
            if walk.axes == MAX_AXES {
                return Err(Error::new(format!("broadcasting to {dims:?} takes more than {MAX_AXES} loops")));
            }
            walk.dims[walk.axes] = dim;
            for (all, stride) in walk.strides.iter_mut().zip(strides) {
                all[walk.axes] = stride;
            }
            walk.axes += 1;
        }
        if walk.axes == 0 {
            // One element: a row of one, in which steps do not matter.
            walk.axes = 1;
            walk.strides = [[1; MAX_AXES]; N];
        }
        walk.dims[..walk.axes].reverse();
        for strides in &mut walk.strides {
            strides[..walk.axes].reverse();
        }
        Ok(walk)
    }

    fn row_len(&self) -> usize {
        self.dims[self.axes - 1]
    }

    /// Long rows are cut into pieces, short ones bundled; either way a task has about `TASK` elements.
    fn pieces_per_row(&self) -> usize {
        self.row_len().div_ceil(TASK)
    }

    fn rows_per_task(&self) -> usize {
        (TASK / self.row_len().max(1)).max(1)
    }

    fn tasks(&self) -> usize {
        if self.len == 0 {
            return 0;
        }
        let rows = self.len / self.row_len();
        if self.row_len() > TASK { rows * self.pieces_per_row() } else { rows.div_ceil(self.rows_per_task()) }
    }

    fn rows(&self, task: usize) -> Rows<'_, N> {
        let row_len = self.row_len();
        let rows = self.len / row_len;
        let (first, count, start, n) = if row_len > TASK {
            let pieces = self.pieces_per_row();
            let start = task % pieces * TASK;
            (task / pieces, 1, start, TASK.min(row_len - start))
        } else {
            let first = task * self.rows_per_task();
            (first, self.rows_per_task().min(rows - first), 0, row_len)
        };
        let mut index = [0; MAX_AXES];
        let mut rest = first;
        for axis in (0..self.axes - 1).rev() {
            index[axis] = rest % self.dims[axis];
            rest /= self.dims[axis];
        }
        let mut at = [0; N];
        for (i, at) in at.iter_mut().enumerate() {
            *at = (0..self.axes - 1).map(|axis| index[axis] * self.strides[i][axis]).sum::<usize>()
                + start * self.strides[i][self.axes - 1];
        }
        Rows { walk: self, index, at, out: first * row_len + start, n, left: count }
    }
}

/// The rows (or the piece of one) of a task.
struct Rows<'a, const N: usize> {
    walk: &'a Walk<N>,
    index: [usize; MAX_AXES],
    at: [usize; N],
    out: usize,
    n: usize,
    left: usize,
}

impl<const N: usize> Rows<'_, N> {
    /// Each operand's step along the row: 0 or 1.
    #[inline(always)]
    fn steps(&self) -> [usize; N] {
        core::array::from_fn(|i| self.walk.strides[i][self.walk.axes - 1])
    }

    /// Where the next row begins in the output and the operands, and its length.
    #[inline(always)]
    fn next(&mut self) -> Option<(usize, [usize; N], usize)> {
        if self.left == 0 {
            return None;
        }
        let row = (self.out, self.at, self.n);
        self.left -= 1;
        self.out += self.walk.row_len();
        let mut axis = self.walk.axes - 1;
        while axis > 0 {
            axis -= 1;
            self.index[axis] += 1;
            for (at, strides) in self.at.iter_mut().zip(&self.walk.strides) {
                *at += strides[axis];
            }
            if self.index[axis] < self.walk.dims[axis] {
                break;
            }
            self.index[axis] = 0;
            for (at, strides) in self.at.iter_mut().zip(&self.walk.strides) {
                *at -= strides[axis] * self.walk.dims[axis];
            }
        }
        Some(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use crate::simd::Isa;

    fn contexts(mut f: impl FnMut(&Cx<'_>)) {
        for lanes in [1, 2] {
            let pool = Pool::new(lanes);
            for isa in Isa::available() {
                pool.run(isa, &mut f);
            }
        }
    }

    fn all_unary() -> Vec<Unary> {
        use Unary::*;
        vec![
            Abs,
            Neg,
            Exp,
            Log,
            Sqrt,
            Square,
            Reciprocal,
            Floor,
            Ceil,
            Round,
            Sign,
            Sin,
            Cos,
            Tan,
            Asin,
            Acos,
            Atan,
            Sinh,
            Cosh,
            Asinh,
            Acosh,
            Atanh,
            Erf,
            Sigmoid,
            Tanh,
            Softplus,
            Softsign,
            Relu,
            LeakyRelu { alpha: 0.1 },
            Elu { alpha: 1.5 },
            Selu { alpha: 1.673, gamma: 1.05 },
            Celu { alpha: 2.0 },
            ThresholdedRelu { alpha: 0.7 },
            HardSigmoid { alpha: 0.2, beta: 0.5 },
            HardSwish,
            Gelu,
            GeluTanh,
            Silu,
            Swish { alpha: 1.7 },
            Swish { alpha: -0.5 },
            Mish,
            Shrink { bias: 0.5, lambda: 1.0 },
            Clip { lo: -1.0, hi: 2.0 },
            Clip { lo: 3.0, hi: 2.0 },
            Clip { lo: f32::NEG_INFINITY, hi: f32::INFINITY },
        ]
    }

    #[test]
    fn unary_functions_are_their_formulas() {
        let mut x: Vec<f32> = (-3000..3000).map(|i| i as f32 * 0.0137).collect();
        x.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 1.0, -1.0]);
        contexts(|cx| {
            for op in all_unary() {
                let mut y = vec![7.0; x.len()];
                unary(cx, op, &x, &mut y).unwrap();
                let mut z = x.clone();
                unary_assign(cx, op, &mut z);
                for ((&x, &y), &z) in x.iter().zip(&y).zip(&z) {
                    assert!(y.to_bits() == z.to_bits() || y.is_nan() && z.is_nan(), "in place");
                    let want = op.eval_f64(f64::from(x));
                    let nearest = want as f32;
                    let close = (f64::from(y) - want).abs() <= 1e-6 * want.abs().max(1.0);
                    assert!(
                        y == nearest || close || y.is_nan() && nearest.is_nan(),
                        "{} {op:?}({x:e}) = {y:e}, want {want:e}",
                        cx.isa()
                    );
                }
            }
        });
    }

    #[test]
    fn unary_of_every_length() {
        contexts(|cx| {
            for len in (0..40).chain([TASK - 1, TASK, TASK + 1, 5 * TASK + 3]) {
                let x: Vec<f32> = (0..len).map(|i| i as f32 - 7.0).collect();
                let mut y = vec![0.0; len];
                unary(cx, Unary::Neg, &x, &mut y).unwrap();
                assert!(x.iter().zip(&y).all(|(x, y)| *y == -x), "length {len}");
            }
            assert!(unary(cx, Unary::Neg, &[1.0], &mut []).is_err());
        });
    }

    /// The textbook: every output index, one by one.
    fn naive<A: Copy, B: Copy, Y>(
        a: &[A],
        a_dims: &[usize],
        b: &[B],
        b_dims: &[usize],
        dims: &[usize],
        f: impl Fn(A, B) -> Y,
    ) -> Vec<Y> {
        let at = |own: &[usize], mut i: usize| {
            let (mut offset, mut dense) = (0, 1);
            for (from_end, &d) in dims.iter().rev().enumerate() {
                let index = i % d;
                i /= d;
                let own = if from_end < own.len() { own[own.len() - 1 - from_end] } else { 1 };
                if own != 1 {
                    offset += index * dense;
                    dense *= own;
                }
            }
            offset
        };
        (0..dims.iter().product()).map(|i| f(a[at(a_dims, i)], b[at(b_dims, i)])).collect()
    }

    fn shapes() -> Vec<(Vec<usize>, Vec<usize>)> {
        vec![
            (vec![], vec![]),
            (vec![5], vec![]),
            (vec![1], vec![1, 1]),
            (vec![17], vec![17]),
            (vec![3, 17], vec![17]),
            (vec![3, 1], vec![1, 17]),
            (vec![2, 3, 4, 5], vec![3, 1, 1]),
            (vec![2, 3, 4, 5], vec![1, 3, 4, 1]),
            (vec![2, 1, 4, 1], vec![3, 1, 5]),
            (vec![1, 3, 1, 5, 1], vec![2, 3, 4, 1, 6]),
            (vec![0, 3], vec![1, 3]),
            (vec![2, 0, 1], vec![1, 9]),
            (vec![3, 2 * TASK + 5], vec![3, 1]),
            (vec![1, 2 * TASK + 5], vec![2, 1]),
            (vec![5000, 7], vec![7]),
            (vec![7], vec![5000, 7]),
            (vec![2, 2, 2, 2, 2, 2, 2, 2], vec![2, 1, 2, 1, 2, 1, 2, 1]),
        ]
    }

    #[test]
    fn binary_functions_broadcast() {
        let number = |i: usize| (i * 37 % 101) as f32 * 0.25 - 11.0;
        type Case = (Binary, fn(f32, f32) -> f32);
        let ops: [Case; 9] = [
            (Binary::Add, |a, b| a + b),
            (Binary::Sub, |a, b| a - b),
            (Binary::Mul, |a, b| a * b),
            (Binary::Div, |a, b| a / b),
            (Binary::Min, f32::min),
            (Binary::Max, f32::max),
            (Binary::PRelu, |a, b| if a < 0.0 { a * b } else { a }),
            (Binary::Pow, f32::powf),
            (Binary::Rem, |a, b| a % b),
        ];
        contexts(|cx| {
            for (a_dims, b_dims) in shapes() {
                let mut dims = Vec::new();
                assert!(broadcast_dims(&a_dims, &b_dims, &mut dims));
                let a: Vec<f32> = (0..a_dims.iter().product()).map(number).collect();
                let b: Vec<f32> = (0..b_dims.iter().product()).map(|i| number(i + 5)).collect();
                for (op, f) in ops {
                    let same = |got: &[f32], want: &[f32]| {
                        for (i, (g, w)) in got.iter().zip(want).enumerate() {
                            assert!(
                                g == w || g.is_nan() && w.is_nan(),
                                "{} {op:?} {a_dims:?} {b_dims:?} at {i}: {g}, want {w}",
                                cx.isa()
                            );
                        }
                    };
                    let want = naive(&a, &a_dims, &b, &b_dims, &dims, f);
                    let mut y = vec![-99.0; want.len()];
                    binary_f32(cx, op, &a, &a_dims, &b, &b_dims, &mut y, &dims).unwrap();
                    same(&y, &want);
                    y.fill(-99.0);
                    broadcast_map(cx, 1, &a, &a_dims, &b, &b_dims, &mut y, &dims, f).unwrap();
                    same(&y, &want);
                    if a_dims == dims {
                        let mut y = a.clone();
                        binary_f32_assign(cx, op, false, &mut y, &dims, &b, &b_dims).unwrap();
                        same(&y, &want);
                        let mut y = a.clone();
                        broadcast_map_assign(cx, 1, &mut y, &dims, &b, &b_dims, f).unwrap();
                        same(&y, &want);
                    }
                    if b_dims == dims {
                        let mut y = b.clone();
                        binary_f32_assign(cx, op, true, &mut y, &dims, &a, &a_dims).unwrap();
                        same(&y, &want);
                    }
                }
            }
        });
    }

    #[test]
    fn powers_that_have_a_function() {
        contexts(|cx| {
            let x: Vec<f32> = (-20..20).map(|i| i as f32 * 0.3).collect();
            for exponent in [2.0f32, -1.0, 0.5, 3.0] {
                let want: Vec<f32> = x.iter().map(|x| x.powf(exponent)).collect();
                let check = |y: &[f32]| {
                    for (y, w) in y.iter().zip(&want) {
                        assert!((y - w).abs() <= 1e-6 * w.abs() || y == w || y.is_nan() && w.is_nan(), "^{exponent}");
                    }
                };
                let mut y = vec![0.0; x.len()];
                binary_f32(cx, Binary::Pow, &x, &[4, 10], &[exponent], &[1], &mut y, &[4, 10]).unwrap();
                check(&y);
                y.copy_from_slice(&x);
                binary_f32_assign(cx, Binary::Pow, false, &mut y, &[4, 10], &[exponent], &[]).unwrap();
                check(&y);
            }
        });
    }

    #[test]
    fn other_types() {
        contexts(|cx| {
            let a: Vec<i64> = (0..12).collect();
            let b: Vec<i64> = vec![1, 5, 9, 2];
            let mut y = vec![9u8; 12];
            broadcast_map(cx, 1, &a, &[3, 4], &b, &[4], &mut y, &[3, 4], |a, b| u8::from(a < b)).unwrap();
            assert_eq!(y, naive(&a, &[3, 4], &b, &[4], &[3, 4], |a, b| u8::from(a < b)));
            let mut y = vec![0i32; 12];
            map(cx, 1, &a, &mut y, |a| a as i32 * 3).unwrap();
            map_assign(cx, 1, &mut y, |y| y + 1);
            assert!(y.iter().zip(&a).all(|(&y, &a)| i64::from(y) == 3 * a + 1));
        });
    }

    #[test]
    fn what_does_not_broadcast_is_refused() {
        contexts(|cx| {
            let x = [1.0; 6];
            let mut y = [0.0; 6];
            // Length and shape of both operands and of the output.
            type Case<'a> = (usize, &'a [usize], usize, &'a [usize], usize, &'a [usize]);
            let cases: [Case<'_>; 6] = [
                (6, &[2, 3], 2, &[2], 6, &[2, 3]),
                (6, &[2, 3], 6, &[3, 2], 6, &[2, 3]),
                (6, &[6], 6, &[6], 3, &[3]),
                (5, &[6], 6, &[6], 6, &[6]),
                (6, &[1, 6], 6, &[6], 6, &[6]),
                (6, &[usize::MAX, 2], 6, &[6], 6, &[6]),
            ];
            for (a, a_dims, b, b_dims, n, dims) in cases {
                let error = binary_f32(cx, Binary::Add, &x[..a], a_dims, &x[..b], b_dims, &mut y[..n], dims);
                assert!(error.is_err(), "{a_dims:?} {b_dims:?} {dims:?}");
            }
            assert!(binary_f32_assign(cx, Binary::Pow, false, &mut y, &[2, 3], &[2.0], &[1, 1, 1]).is_err());
        });
        assert!(!broadcast_dims(&[2, 3], &[2], &mut Vec::new()));
    }
}
