//! Chains of pointwise functions in one pass over memory.
//!
//! ```text
//! for each task's elements, in parallel
//!     for each block of them that stays in the first-level cache
//!         y = x
//!         for each step: y = f(y), y = f(y, operand) or y = f(operand, y)
//! ```
//!
//! An interpreter: a step costs one branch per block, and a load and a store per vector, which the cache answers. What is
//! saved are the trips to memory, one for each step but the first.

use crate::elementwise::{Binary, Unary, unary_part};
use crate::error::{Error, Result};
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};

/// Elements of a block: 2 kB, so that an operand of the same shape fits beside it.
const BLOCK: usize = 512;
/// Elements that make a task.
const TASK: usize = 16 * 1024;

/// One function of a chain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// `y = f(y)`.
    Unary(Unary),
    /// `y = f(y, operand)`, or `y = f(operand, y)` if `reversed`. Operands are taken in turn, one for each such step.
    Binary {
        /// The function; one of those that vectors have: no `Pow`, no `Rem`.
        op: Binary,
        /// Whether the running value is the second argument.
        reversed: bool,
    },
}

/// The other argument of a step: element `i` of the chain meets `data[i / inner % data.len()]`.
///
/// So `inner` is 1 for an operand of the same shape, for one along the last axis and for a single number, and the number
/// of elements behind the axis for one along another axis.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Elements of the chain that meet one of them.
    pub inner: usize,
}

/// Computes `y`. With `x` absent, y holds it already.
///
/// # Errors
/// If lengths do not fit, or a step has no operand or no vector code.
pub fn chain(cx: &Cx<'_>, steps: &[Step], x: Option<&[f32]>, operands: &[Operand<'_>], y: &mut [f32]) -> Result<()> {
    let len = y.len();
    let binary = steps.iter().filter(|s| matches!(s, Step::Binary { .. })).count();
    if x.is_some_and(|x| x.len() != len) || binary != operands.len() {
        return Err(Error::new(format!("{binary} operands were wanted for {len} elements")));
    }
    for o in operands {
        if o.inner == 0 || len > 0 && (o.data.is_empty() || !len.is_multiple_of(o.data.len().saturating_mul(o.inner))) {
            let (n, inner) = (o.data.len(), o.inner);
            return Err(Error::new(format!("an operand of {n} elements, each {inner} times, for {len}")));
        }
    }
    if let Some(op) = steps.iter().find_map(|s| match s {
        Step::Binary { op: op @ (Binary::Pow | Binary::Rem), .. } => Some(op),
        _ => None,
    }) {
        return Err(Error::new(format!("a chain does not have {op:?}")));
    }
    let cost = steps.iter().map(|s| if let Step::Unary(f) = s { f.cost() } else { 2 }).sum::<u64>();
    let out = DisjointMut::new(y);
    cx.for_each(len.div_ceil(TASK), cost.saturating_mul(len as u64), &|task| {
        let end = (task * TASK + TASK).min(len);
        let mut start = task * TASK;
        while start < end {
            let n = BLOCK.min(end - start);
            // SAFETY: every task has its own elements.
            let y = unsafe { out.range(start, n) };
            if let Some(x) = x {
                y.copy_from_slice(&x[start..start + n]);
            }
            let mut others = operands.iter();
            for step in steps {
                match *step {
                    Step::Unary(f) => unary_part(cx.isa(), f, None, y),
                    Step::Binary { op, reversed } => {
                        if let Some(o) = others.next() {
                            dispatch(cx.isa(), Runs { op, reversed, o, start, y });
                        }
                    }
                }
            }
            start += n;
        }
    });
    Ok(())
}

/// One binary step on a block whose first element is element `start` of the chain.
struct Runs<'a> {
    op: Binary,
    reversed: bool,
    o: &'a Operand<'a>,
    start: usize,
    y: &'a mut [f32],
}

impl Kernel for Runs<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { op, reversed, o, start, y } = self;
        let count = o.data.len();
        // A run meets either neighbours, or one number.
        let single = o.inner > 1 || count == 1;
        let mut at = 0;
        while at < y.len() {
            let i = start + at;
            let element = i / o.inner % count;
            let left = if count == 1 {
                y.len()
            } else if single {
                o.inner - i % o.inner
            } else {
                count - element
            };
            let run = left.min(y.len() - at);
            let part = &mut y[at..at + run];
            let mut j = 0;
            while j < run {
                let n = S::LANES.min(run - j);
                let whole = n == S::LANES;
                let v = if whole { s.load(&part[j..]) } else { s.load_partial(&part[j..]) };
                let other = if single {
                    s.splat(o.data[element])
                } else if whole {
                    s.load(&o.data[element + j..])
                } else {
                    s.load_partial(&o.data[element + j..element + run])
                };
                let (a, b) = if reversed { (other, v) } else { (v, other) };
                let v = match op {
                    Binary::Add => s.add(a, b),
                    Binary::Sub => s.sub(a, b),
                    Binary::Mul => s.mul(a, b),
                    Binary::Div => s.div(a, b),
                    Binary::Min => s.min(a, b),
                    Binary::Max => s.max(a, b),
                    Binary::PRelu => s.select(s.lt(a, s.splat(0.0)), s.mul(a, b), a),
                    Binary::Pow | Binary::Rem => unreachable!("refused by `chain`"),
                };
                if whole {
                    s.store(&mut part[j..], v);
                } else {
                    s.store_partial(&mut part[j..], v);
                }
                j += n;
            }
            at += run;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{each_context, integers};

    #[test]
    fn steps_in_turn() {
        each_context(|cx| {
            for shape in [[1, 1, 1], [2, 3, 5], [1, 7, 600], [3, 40, 33], [2, 1000, 17]] {
                let [outer, n, inner] = shape;
                let len = outer * n * inner;
                let x: Vec<f32> = integers(len, 1);
                let (same, axis, last) = (integers(len, 2), integers(n, 3), integers(inner, 4));
                let steps = [
                    Step::Binary { op: Binary::Mul, reversed: false },
                    Step::Unary(Unary::Relu),
                    Step::Binary { op: Binary::Sub, reversed: true },
                    Step::Binary { op: Binary::Max, reversed: false },
                    Step::Unary(Unary::Abs),
                    Step::Binary { op: Binary::Add, reversed: false },
                ];
                let operands = [
                    Operand { data: &axis, inner },
                    Operand { data: &same, inner: 1 },
                    Operand { data: &last, inner: 1 },
                    Operand { data: &[0.5], inner: 1 },
                ];
                let want: Vec<f32> = (0..len)
                    .map(|i| (same[i] - (x[i] * axis[i / inner % n]).max(0.0)).max(last[i % inner]).abs() + 0.5)
                    .collect();
                let mut y = vec![0.0; len];
                chain(cx, &steps, Some(&x), &operands, &mut y).unwrap();
                assert_eq!(y, want, "{shape:?}");
                let mut y = x;
                chain(cx, &steps, None, &operands, &mut y).unwrap();
                assert_eq!(y, want, "{shape:?} in place");
            }
        });
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        each_context(|cx| {
            let mut y = [1.0; 6];
            let step = |op| [Step::Binary { op, reversed: false }];
            let mut run = |op, data: &[f32], inner| chain(cx, &step(op), None, &[Operand { data, inner }], &mut y);
            assert!(run(Binary::Add, &[1.0; 4], 1).is_err());
            assert!(run(Binary::Add, &[1.0; 3], 0).is_err());
            assert!(run(Binary::Add, &[], 1).is_err());
            assert!(run(Binary::Pow, &[1.0; 6], 1).is_err());
            assert!(run(Binary::Add, &[1.0; 3], 2).is_ok());
            assert!(chain(cx, &step(Binary::Add), None, &[], &mut y).is_err());
        });
    }
}
