//! Reductions over any set of axes.
//!
//! ```text
//! drop axes of length 1, merge neighbours that are both reduced or both kept: [outer, n, inner] per reduced group
//! while there is a reduced group, from the last one:
//!     inner == 1: a row at a time, four accumulators, folded at the end
//!     inner > 1:  columns in blocks of four vectors, one accumulator each
//! finish: divide, square root, logarithm
//! ```
//!
//! The order of additions depends on sizes and on the number of lanes of the instruction set only.

use crate::error::{Error, Result};
use crate::naive::Number;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};

/// What is computed over the reduced axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// `sum x`.
    Sum,
    /// `sum x / n`.
    Mean,
    /// Largest; NaN if any is.
    Max,
    /// Smallest; NaN if any is.
    Min,
    /// `product x`.
    Prod,
    /// `sum |x|`.
    L1,
    /// `sqrt(sum x^2)`.
    L2,
    /// `log(sum x)`.
    LogSum,
    /// `log(sum exp x)`, computed without overflow.
    LogSumExp,
    /// `sum x^2`.
    SumSquare,
}

/// Most groups of axes that alternate between kept and reduced.
const MAX_GROUPS: usize = 16;

/// Alternating groups of axes: length, and whether it is reduced.
struct Groups {
    list: [(usize, bool); MAX_GROUPS],
    count: usize,
}

impl Groups {
    fn new(dims: &[usize], reduced: &[bool]) -> Result<Self> {
        let mut g = Groups { list: [(1, false); MAX_GROUPS], count: 0 };
        for (&d, &r) in dims.iter().zip(reduced).filter(|(d, _)| **d != 1) {
            if g.count > 0 && g.list[g.count - 1].1 == r {
                g.list[g.count - 1].0 *= d;
            } else if g.count < MAX_GROUPS {
                g.list[g.count] = (d, r);
                g.count += 1;
            } else {
                return Err(Error::new(format!("more than {MAX_GROUPS} alternating groups of axes in {dims:?}")));
            }
        }
        Ok(g)
    }
}

/// Reduces `x` of shape `dims` over the axes where `reduced` is true; `out` has the other axes in order.
///
/// # Errors
/// If slices and shapes do not fit, or if the axes alternate between kept and reduced more than 16 times.
pub fn reduce(cx: &Cx, r: Reduction, x: &[f32], dims: &[usize], reduced: &[bool], out: &mut [f32]) -> Result<()> {
    let kept: usize = dims.iter().zip(reduced).filter(|(_, r)| !**r).map(|(d, _)| d).product();
    let n: usize = dims.iter().zip(reduced).filter(|(_, r)| **r).map(|(d, _)| d).product();
    if dims.len() != reduced.len() || x.len() != dims.iter().product() || out.len() != kept {
        return Err(Error::new(format!("{} elements of shape {dims:?} cannot be reduced to {}", x.len(), out.len())));
    }
    if out.is_empty() {
        return Ok(());
    }
    if n == 0 {
        out.fill(match r {
            Reduction::Prod => 1.0,
            Reduction::Max | Reduction::LogSumExp | Reduction::LogSum => f32::NEG_INFINITY,
            Reduction::Min => f32::INFINITY,
            Reduction::Mean => f32::NAN,
            _ => 0.0,
        });
        return Ok(());
    }
    let mut g = Groups::new(dims, reduced)?;
    let (first, then) = match r {
        Reduction::Sum | Reduction::Mean | Reduction::LogSum => (Fold::Sum, Fold::Sum),
        Reduction::L1 => (Fold::SumAbs, Fold::Sum),
        Reduction::L2 | Reduction::SumSquare => (Fold::SumSquare, Fold::Sum),
        Reduction::Max => (Fold::Max, Fold::Max),
        Reduction::Min => (Fold::Min, Fold::Min),
        Reduction::Prod => (Fold::Prod, Fold::Prod),
        Reduction::LogSumExp => (Fold::LogSumExp, Fold::LogSumExp),
    };
    passes(cx, first, then, x, &mut g, out);
    match r {
        Reduction::Mean => {
            let scale = 1.0 / n as f32;
            out.iter_mut().for_each(|v| *v *= scale);
        }
        Reduction::L2 => out.iter_mut().for_each(|v| *v = v.sqrt()),
        Reduction::LogSum => out.iter_mut().for_each(|v| *v = v.ln()),
        _ => {}
    }
    Ok(())
}

/// One pass per reduced group; all but the last into temporaries.
fn passes(cx: &Cx, fold: Fold, then: Fold, x: &[f32], g: &mut Groups, out: &mut [f32]) {
    let groups = g.list[..g.count].iter().filter(|g| g.1).count();
    let Some(last) = g.list[..g.count].iter().rposition(|g| g.1) else {
        // Nothing but axes of length 1 is reduced.
        return pass(cx, fold, x, 1, 1, out.len(), out);
    };
    let n = g.list[last].0;
    let outer: usize = g.list[..last].iter().map(|g| g.0).product();
    let inner: usize = g.list[last + 1..g.count].iter().map(|g| g.0).product();
    if groups == 1 {
        return pass(cx, fold, x, outer, n, inner, out);
    }
    cx.with_workspace(outer * inner, |part| {
        pass(cx, fold, x, outer, n, inner, part);
        g.list[last].0 = 1;
        // The kept groups on both sides of the one that is gone are one now.
        let mut merged = Groups { list: [(1, false); MAX_GROUPS], count: 0 };
        for &(d, r) in g.list[..g.count].iter().filter(|g| g.0 != 1) {
            if merged.count > 0 && merged.list[merged.count - 1].1 == r {
                merged.list[merged.count - 1].0 *= d;
            } else {
                merged.list[merged.count] = (d, r);
                merged.count += 1;
            }
        }
        passes(cx, then, then, part, &mut merged, out);
    });
}

#[derive(Clone, Copy)]
enum Fold {
    Sum,
    SumAbs,
    SumSquare,
    Max,
    Min,
    Prod,
    LogSumExp,
}

/// Elements that make a task.
const TASK: usize = 16 * 1024;

fn pass(cx: &Cx, fold: Fold, x: &[f32], outer: usize, n: usize, inner: usize, out: &mut [f32]) {
    let cost = x.len() as u64;
    let out = DisjointMut::new(out);
    // Rows in blocks; columns of one long matrix in blocks of whole vectors.
    let rows_per_task = (TASK / (n * inner).max(1)).max(1);
    let columns = if rows_per_task == 1 { inner.min((TASK / n).max(64).next_multiple_of(64)) } else { inner };
    let (row_tasks, column_tasks) = (outer.div_ceil(rows_per_task), inner.div_ceil(columns));
    cx.for_each(row_tasks * column_tasks, cost, &|task| {
        let first = task / column_tasks * rows_per_task;
        let begin = task % column_tasks * columns;
        for row in first..(first + rows_per_task).min(outer) {
            let width = columns.min(inner - begin);
            // SAFETY: each task has its own rows and columns.
            let out = unsafe { out.range(row * inner + begin, width) };
            dispatch(cx.isa(), Block { fold, x: &x[row * n * inner + begin..], n, inner, out });
        }
    });
}

/// `out[j] = fold over i of x[i * inner + j]`.
struct Block<'a> {
    fold: Fold,
    x: &'a [f32],
    n: usize,
    inner: usize,
    out: &'a mut [f32],
}

impl Kernel for Block<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.fold {
            Fold::Sum => self.fold(s, 0.0, |a, x| s.add(a, x), |a, b| s.add(a, b), |a, b| a + b),
            Fold::SumAbs => self.fold(s, 0.0, |a, x| s.add(a, s.abs(x)), |a, b| s.add(a, b), |a, b| a + b),
            Fold::SumSquare => self.fold(s, 0.0, |a, x| s.mul_add(x, x, a), |a, b| s.add(a, b), |a, b| a + b),
            Fold::Max => {
                let larger = |a: f32, b: f32| if a > b || a.is_nan() { a } else { b };
                self.fold(s, f32::NEG_INFINITY, |a, x| s.max(a, x), |a, b| s.max(a, b), larger);
            }
            Fold::Min => {
                let smaller = |a: f32, b: f32| if a < b || a.is_nan() { a } else { b };
                self.fold(s, f32::INFINITY, |a, x| s.min(a, x), |a, b| s.min(a, b), smaller);
            }
            Fold::Prod => self.fold(s, 1.0, |a, x| s.mul(a, x), |a, b| s.mul(a, b), |a, b| a * b),
            Fold::LogSumExp => self.log_sum_exp(),
        }
    }
}

impl Block<'_> {
    #[inline(always)]
    fn fold<S: Simd>(
        self,
        s: S,
        start: f32,
        take: impl Fn(S::F32, S::F32) -> S::F32,
        join: impl Fn(S::F32, S::F32) -> S::F32,
        join_lanes: impl Fn(f32, f32) -> f32,
    ) {
        let lanes = S::LANES;
        let begin = s.splat(start);
        if self.inner == 1 {
            let mut acc = [begin; 4];
            let mut chunks = self.x[..self.n].chunks_exact(4 * lanes);
            for chunk in &mut chunks {
                for (v, a) in acc.iter_mut().enumerate() {
                    *a = take(*a, s.load(&chunk[v * lanes..]));
                }
            }
            let mut rest = chunks.remainder().chunks_exact(lanes);
            for chunk in &mut rest {
                acc[0] = take(acc[0], s.load(chunk));
            }
            let acc = join(join(acc[0], acc[1]), join(acc[2], acc[3]));
            let mut buffer = [start; 16];
            s.store(&mut buffer, acc);
            let mut total = buffer[0];
            for &v in &buffer[1..lanes] {
                total = join_lanes(total, v);
            }
            // The remaining elements one by one, as lane 0 of vectors of their own.
            for &v in rest.remainder() {
                s.store(&mut buffer, take(begin, s.splat(v)));
                total = join_lanes(total, buffer[0]);
            }
            self.out[0] = total;
            return;
        }
        let width = self.out.len();
        let mut j = 0;
        while j + 4 * lanes <= width {
            let mut acc = [begin; 4];
            for i in 0..self.n {
                let row = &self.x[i * self.inner + j..][..4 * lanes];
                for (v, a) in acc.iter_mut().enumerate() {
                    *a = take(*a, s.load(&row[v * lanes..]));
                }
            }
            for (v, a) in acc.iter().enumerate() {
                s.store(&mut self.out[j + v * lanes..], *a);
            }
            j += 4 * lanes;
        }
        while j < width {
            let part = lanes.min(width - j);
            let mut acc = begin;
            for i in 0..self.n {
                let row = &self.x[i * self.inner + j..][..part];
                acc = take(acc, if part == lanes { s.load(row) } else { s.load_partial(row) });
            }
            s.store_partial(&mut self.out[j..j + part], acc);
            j += lanes;
        }
    }

    /// `max + log(sum exp(x - max))`: exact where the sum alone would overflow.
    fn log_sum_exp(self) {
        for (j, y) in self.out.iter_mut().enumerate() {
            let column = || self.x[j..].iter().step_by(self.inner).take(self.n);
            let max = column().fold(f32::NEG_INFINITY, |a, &b| if b > a || b.is_nan() { b } else { a });
            // Infinite or NaN: differences would be NaN where the limit is max itself.
            *y = if max.is_finite() { max + column().map(|v| (v - max).exp()).sum::<f32>().ln() } else { max };
        }
    }
}

/// Reduces any element type; floats and logarithms in `f64`, integer sums and products wrap.
///
/// # Errors
/// If slices and shapes do not fit.
pub fn reduce_any<T: Number>(r: Reduction, x: &[T], dims: &[usize], reduced: &[bool], out: &mut [T]) -> Result<()> {
    let kept: usize = dims.iter().zip(reduced).filter(|(_, r)| !**r).map(|(d, _)| d).product();
    if dims.len() != reduced.len() || x.len() != dims.iter().product() || out.len() != kept {
        return Err(Error::new(format!("{} elements of shape {dims:?} cannot be reduced to {}", x.len(), out.len())));
    }
    let mut strides = vec![0; dims.len()];
    let mut step = 1;
    for i in (0..dims.len()).rev() {
        if !reduced[i] {
            strides[i] = step;
            step *= dims[i];
        }
    }
    let mut index = vec![0; dims.len()];
    let mut at = 0;
    let mut each = |f: &mut dyn FnMut(usize, T)| {
        index.fill(0);
        at = 0;
        for &v in x {
            f(at, v);
            for i in (0..dims.len()).rev() {
                index[i] += 1;
                at += strides[i];
                if index[i] < dims[i] {
                    break;
                }
                at -= strides[i] * dims[i];
                index[i] = 0;
            }
        }
    };
    let n: usize = dims.iter().zip(reduced).filter(|(_, r)| **r).map(|(d, _)| d).product();
    match r {
        Reduction::Max => {
            out.fill(T::LEAST);
            each(&mut |o, v| {
                if v > out[o] {
                    out[o] = v;
                }
            });
        }
        Reduction::Min => {
            out.fill(T::GREATEST);
            each(&mut |o, v| {
                if v < out[o] {
                    out[o] = v;
                }
            });
        }
        Reduction::Prod => {
            out.fill(T::ONE);
            each(&mut |o, v| out[o] = out[o].times(v));
        }
        Reduction::Sum | Reduction::L1 | Reduction::SumSquare => {
            out.fill(T::ZERO);
            each(&mut |o, v| {
                out[o] = out[o].plus(match r {
                    Reduction::L1 => v.magnitude(),
                    Reduction::SumSquare => v.times(v),
                    _ => v,
                });
            });
        }
        Reduction::Mean | Reduction::L2 | Reduction::LogSum => {
            let mut sums = vec![0.0; out.len()];
            each(&mut |o, v| {
                let v = v.to_f64();
                sums[o] += if r == Reduction::L2 { v * v } else { v };
            });
            for (y, s) in out.iter_mut().zip(sums) {
                *y = T::from_f64(match r {
                    Reduction::Mean => s / n as f64,
                    Reduction::L2 => f64::sqrt(s),
                    _ => f64::ln(s),
                });
            }
        }
        Reduction::LogSumExp => {
            let mut max = vec![f64::NEG_INFINITY; out.len()];
            each(&mut |o, v| max[o] = max[o].max(v.to_f64()));
            let mut sums = vec![0.0; out.len()];
            each(&mut |o, v| sums[o] += (v.to_f64() - max[o]).exp());
            for ((y, s), m) in out.iter_mut().zip(sums).zip(max) {
                *y = T::from_f64(if m.is_finite() { m + f64::ln(s) } else { m });
            }
        }
    }
    Ok(())
}

/// Position of the largest (or, if `smallest`, smallest) element along the middle axis of `[outer, n, inner]`; the first
/// or, if `last`, the last of equal ones.
///
/// # Errors
/// If the slices do not have these sizes, or n is 0 and there is something to find.
pub fn arg_extreme<T: Number>(
    x: &[T],
    [outer, n, inner]: [usize; 3],
    smallest: bool,
    last: bool,
    out: &mut [i64],
) -> Result<()> {
    if x.len() != outer * n * inner || out.len() != outer * inner {
        return Err(Error::new(format!("{} and {} elements for [{outer}, {n}, {inner}]", x.len(), out.len())));
    }
    if n == 0 && !out.is_empty() {
        return Err(Error::new("there is no extreme element along an axis of length 0"));
    }
    for o in 0..outer {
        for j in 0..inner {
            let at = |i: usize| x[(o * n + i) * inner + j];
            let mut best = 0;
            for i in 1..n {
                let (a, b) = (at(i), at(best));
                let better = if smallest { a < b } else { a > b };
                if better || (last && a == b) {
                    best = i;
                }
            }
            out[o * inner + j] = best as i64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::{each_context, integers};

    const ALL: [Reduction; 10] = [
        Reduction::Sum,
        Reduction::Mean,
        Reduction::Max,
        Reduction::Min,
        Reduction::Prod,
        Reduction::L1,
        Reduction::L2,
        Reduction::LogSum,
        Reduction::LogSumExp,
        Reduction::SumSquare,
    ];

    #[test]
    fn every_set_of_axes_matches_the_reference() {
        each_context(|cx| {
            for dims in [[2, 3, 1, 5], [1, 4, 17, 3], [3, 2, 33, 1], [2, 1, 3, 70]] {
                let x: Vec<f32> = integers(dims.iter().product(), 5).iter().map(|v| v.abs() / 4.0 + 0.5).collect();
                for mask in 0..16 {
                    let reduced: Vec<bool> = (0..4).map(|i| mask >> i & 1 == 1).collect();
                    for r in ALL {
                        let want = reference::reduce(r, &x, &dims, &reduced);
                        let mut got = vec![0.0; want.len()];
                        reduce(cx, r, &x, &dims, &reduced, &mut got).unwrap();
                        let mut any = vec![0.0f64; want.len()];
                        let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
                        reduce_any(r, &wide, &dims, &reduced, &mut any).unwrap();
                        for ((g, a), w) in got.iter().zip(any).zip(&want) {
                            let close = |g: f64, eps: f64| (g - w).abs() <= eps * (1.0 + w.abs());
                            assert!(
                                close(f64::from(*g), 2e-5) && close(a, 1e-12),
                                "{r:?} {dims:?} {reduced:?}: {g} {w}"
                            );
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn boundary_lengths() {
        each_context(|cx| {
            for n in [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000] {
                let x = integers(n, 9);
                for r in [Reduction::Sum, Reduction::Max, Reduction::Min, Reduction::SumSquare] {
                    let want = reference::reduce(r, &x, &[n], &[true]);
                    let mut got = [0.0];
                    reduce(cx, r, &x, &[n], &[true], &mut got).unwrap();
                    assert_eq!(f64::from(got[0]), want[0], "{r:?} of {n}");
                }
            }
        });
    }

    #[test]
    fn not_a_number_is_both_extremes() {
        each_context(|cx| {
            for at in [0, 3, 20, 32] {
                let mut x = [1.0; 33];
                x[at] = f32::NAN;
                for r in [Reduction::Max, Reduction::Min] {
                    let mut y = [0.0];
                    reduce(cx, r, &x, &[33], &[true], &mut y).unwrap();
                    assert!(y[0].is_nan(), "{r:?} with NaN at {at}");
                }
            }
        });
    }

    #[test]
    fn nothing_reduces_to_the_neutral_element() {
        each_context(|cx| {
            let mut y = [5.0; 2];
            reduce(cx, Reduction::Max, &[], &[2, 0], &[false, true], &mut y).unwrap();
            assert_eq!(y, [f32::NEG_INFINITY; 2]);
            reduce(cx, Reduction::Prod, &[], &[2, 0], &[false, true], &mut y).unwrap();
            assert_eq!(y, [1.0; 2]);
        });
    }

    #[test]
    fn extremes_have_positions() {
        let x = [1, 3, 3, 2];
        let find = |smallest, last| {
            let mut i = [0];
            arg_extreme(&x, [1, 4, 1], smallest, last, &mut i).unwrap();
            i[0]
        };
        assert_eq!((find(false, false), find(false, true), find(true, false)), (1, 2, 0));
        assert!(arg_extreme::<i32>(&[], [1, 0, 1], false, false, &mut [0]).is_err());
    }
}
