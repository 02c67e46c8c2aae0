//! Softmax and its logarithm along any axis.
//!
//! ```text
//! rows (the axis is the last):                 columns (anything else), a vector of them at a time:
//!     m = max x                                    the same, with one m and one sum per lane
//!     y = exp(x - m), s = sum y
//!     y = y / s                                or, for the logarithm, y = (x - m) - log s
//! ```

use crate::error::{Error, Result};
use crate::math;
use crate::naive::Number;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};

/// Elements that make a task.
const TASK: usize = 4 * 1024;

/// Softmax (or its logarithm) along the middle axis of `[outer, n, inner]`. With `x` absent, y holds it already.
///
/// # Errors
/// If the slices do not have these sizes.
pub fn softmax(cx: &Cx, x: Option<&[f32]>, [outer, n, inner]: [usize; 3], log: bool, y: &mut [f32]) -> Result<()> {
    let count = outer.checked_mul(n).and_then(|c| c.checked_mul(inner));
    if Some(y.len()) != count || x.is_some_and(|x| x.len() != y.len()) {
        return Err(Error::new(format!("softmax over [{outer}, {n}, {inner}] of {} elements", y.len())));
    }
    if y.is_empty() {
        return Ok(());
    }
    let block = n * inner;
    let per_task = (TASK / block).max(1);
    let cost = 20 * y.len() as u64;
    let out = DisjointMut::new(y);
    cx.for_each(outer.div_ceil(per_task), cost, &|task| {
        let first = task * per_task;
        let count = per_task.min(outer - first);
        // SAFETY: each task has its own blocks.
        let y = unsafe { out.range(first * block, count * block) };
        if let Some(x) = x {
            y.copy_from_slice(&x[first * block..][..count * block]);
        }
        dispatch(cx.isa(), Blocks { y, n, inner, log });
    });
    Ok(())
}

struct Blocks<'a> {
    y: &'a mut [f32],
    n: usize,
    inner: usize,
    log: bool,
}

impl Kernel for Blocks<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for block in self.y.chunks_exact_mut(self.n * self.inner) {
            if self.inner == 1 {
                row(s, block, self.log);
            } else {
                columns(s, block, self.n, self.inner, self.log);
            }
        }
    }
}

/// Softmax of one row, in place.
#[inline(always)]
pub(crate) fn row<S: Simd>(s: S, y: &mut [f32], log: bool) {
    let max = row_max(s, y);
    let sum = row_exp_sum(s, y, max, !log);
    if log {
        // The difference from the maximum is taken first: it is exact for neighbours, x - (m + log s) would not be.
        let (max, shift) = (s.splat(max), s.splat(sum.ln()));
        map_row(s, y, |v| s.sub(s.sub(v, max), shift));
    } else {
        let scale = s.splat(1.0 / sum);
        map_row(s, y, |v| s.mul(v, scale));
    }
}

/// `y = f(y)`, a vector at a time.
#[inline(always)]
pub(crate) fn map_row<S: Simd>(s: S, y: &mut [f32], f: impl Fn(S::F32) -> S::F32) {
    let mut chunks = y.chunks_exact_mut(S::LANES);
    for chunk in &mut chunks {
        let v = f(s.load(chunk));
        s.store(chunk, v);
    }
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        let v = f(s.load_partial(rest));
        s.store_partial(rest, v);
    }
}

/// Largest element; minus infinity for an empty row. With a NaN among them it may be any element, which makes no difference
/// to a softmax: the NaN's own exponential makes the sum NaN. So the bound of one instruction will do.
#[inline(always)]
pub(crate) fn row_max<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = [s.splat(f32::NEG_INFINITY); 2];
    let mut chunks = x.chunks_exact(2 * S::LANES);
    for chunk in &mut chunks {
        acc[0] = s.at_least(s.load(chunk), acc[0]);
        acc[1] = s.at_least(s.load(&chunk[S::LANES..]), acc[1]);
    }
    let mut max = s.at_least(acc[0], acc[1]);
    for &v in chunks.remainder() {
        max = s.at_least(s.splat(v), max);
    }
    s.reduce_max(max)
}

/// `sum exp(y - max)` for `max` not below any element; the terms are stored if `keep`.
#[inline(always)]
pub(crate) fn row_exp_sum<S: Simd>(s: S, y: &mut [f32], max: f32, keep: bool) -> f32 {
    let m = s.splat(max);
    let mut acc = [s.splat(0.0); 2];
    let mut chunks = y.chunks_exact_mut(2 * S::LANES);
    for chunk in &mut chunks {
        let (low, high) = chunk.split_at_mut(S::LANES);
        let e = [math::exp_minus(s, s.sub(m, s.load(low))), math::exp_minus(s, s.sub(m, s.load(high)))];
        acc = [s.add(acc[0], e[0]), s.add(acc[1], e[1])];
        if keep {
            s.store(low, e[0]);
            s.store(high, e[1]);
        }
    }
    let mut sum = s.reduce_add(s.add(acc[0], acc[1]));
    for part in chunks.into_remainder().chunks_mut(S::LANES) {
        let mut terms = [0.0; 16];
        s.store(&mut terms, math::exp_minus(s, s.sub(m, s.load_partial(part))));
        for (y, &e) in part.iter_mut().zip(&terms) {
            sum += e;
            if keep {
                *y = e;
            }
        }
    }
    sum
}

/// Softmax of the columns of one `[n, inner]` block, in place.
#[inline(always)]
fn columns<S: Simd>(s: S, y: &mut [f32], n: usize, inner: usize, log: bool) {
    let mut j = 0;
    while j < inner {
        let width = S::LANES.min(inner - j);
        let mut max = s.splat(f32::NEG_INFINITY);
        for i in 0..n {
            max = s.max(max, s.load_partial(&y[i * inner + j..][..width]));
        }
        let mut sum = s.splat(0.0);
        for i in 0..n {
            let part = &mut y[i * inner + j..][..width];
            let e = math::exp_minus(s, s.sub(max, s.load_partial(part)));
            sum = s.add(sum, e);
            if !log {
                s.store_partial(part, e);
            }
        }
        let mut lanes = [0.0; 16];
        s.store(&mut lanes, sum);
        lanes.iter_mut().for_each(|v| *v = if log { v.ln() } else { 1.0 / *v });
        let last = s.load(&lanes);
        for i in 0..n {
            let part = &mut y[i * inner + j..][..width];
            let v = s.load_partial(part);
            s.store_partial(part, if log { s.sub(s.sub(v, max), last) } else { s.mul(v, last) });
        }
        j += S::LANES;
    }
}

/// The same for any element type, in `f64`.
///
/// # Panics
/// If the slices do not have these sizes.
pub fn softmax_any<T: Number>(x: &[T], [outer, n, inner]: [usize; 3], log: bool, y: &mut [T]) {
    for o in 0..outer {
        for j in 0..inner {
            let at = |i: usize| (o * n + i) * inner + j;
            let value = |i: usize| x[at(i)].to_f64();
            let max = (0..n).map(value).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (0..n).map(|i| (value(i) - max).exp()).sum();
            for i in 0..n {
                let v = value(i) - max;
                y[at(i)] = T::from_f64(if log { v - sum.ln() } else { v.exp() / sum });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::{each_context, integers};

    #[test]
    fn rows_and_columns_match_the_reference() {
        each_context(|cx| {
            for sizes in [[3, 1, 1], [2, 3, 1], [2, 16, 1], [1, 17, 1], [5, 1000, 1], [2, 5, 3], [1, 7, 16], [2, 9, 37]]
            {
                let x: Vec<f32> = integers(sizes.iter().product(), 7).iter().map(|v| v * 3.7).collect();
                for log in [false, true] {
                    let want = reference::softmax(&x, sizes, log);
                    let mut got = vec![0.0; x.len()];
                    softmax(cx, Some(&x), sizes, log, &mut got).unwrap();
                    for (g, w) in got.iter().zip(&want) {
                        // A sum near 1 has its own rounding, which the logarithm shows in full.
                        let eps = 2e-6 * (w.abs() + if log { 0.1 } else { 1e-3 });
                        assert!((f64::from(*g) - w).abs() <= eps, "{sizes:?} log {log}: {g} for {w}");
                    }
                    let mut inside = x.clone();
                    softmax(cx, None, sizes, log, &mut inside).unwrap();
                    assert_eq!(inside, got, "in place");
                }
            }
        });
    }

    #[test]
    fn huge_and_infinite_elements() {
        each_context(|cx| {
            let mut y = [0.0; 5];
            softmax(cx, Some(&[1e30, f32::NEG_INFINITY, 1e30, 0.0, -1e30]), [1, 5, 1], false, &mut y).unwrap();
            assert_eq!(y, [0.5, 0.0, 0.5, 0.0, 0.0]);
            softmax(cx, Some(&[1.0, f32::NAN, 2.0, 3.0, 4.0]), [1, 5, 1], false, &mut y).unwrap();
            assert!(y.iter().all(|v| v.is_nan()));
        });
    }
}
