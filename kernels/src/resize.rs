//! Interpolation: every element of the result is a weighted sum of some elements along each axis.
//!
//! ```text
//! nearest:  y[i, j, ..] = x[map0[i], map1[j], ..]; axes that stay are part of the element that moves
//! else:     one pass per resized axis, y[o, i, ..] = sum over taps k of weight[i, k] * x[o, index[i, k], ..]
//! ```
//!
//! Linear, cubic and their antialiased forms differ only in the table of taps, which [`Taps`] holds.

use crate::error::{Error, Result};
use crate::movement::FILL;
use crate::naive::Number;
use crate::par::{Cx, DisjointMut};

/// Elements that make a task.
const TASK: usize = 16 * 1024;

/// The weighted elements that one axis of a result is made of.
#[derive(Clone, Debug, Default)]
pub struct Taps<T> {
    /// How many elements go into each one of the result.
    pub count: usize,
    /// Their indices, `count` for each element of the result.
    pub index: Vec<usize>,
    /// Their weights.
    pub weight: Vec<T>,
}

impl<T> Taps<T> {
    /// Length of the axis of the result.
    pub fn len(&self) -> usize {
        self.index.len() / self.count.max(1)
    }

    /// Whether there is a weight for each tap, and all taps lie inside an axis of so many elements.
    pub(crate) fn fits(&self, n: usize) -> bool {
        self.count > 0
            && self.index.len() == self.weight.len()
            && self.index.len() == self.len() * self.count
            && self.index.iter().all(|&i| i < n)
    }

    /// Indices and weights of an element of the result.
    pub(crate) fn of(&self, i: usize) -> (&[usize], &[T]) {
        let taps = i * self.count..(i + 1) * self.count;
        (&self.index[taps.clone()], &self.weight[taps])
    }

    /// Whether the result has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Resizes the middle axis of `[outer, n, inner]`.
///
/// # Errors
/// If a tap lies outside of the axis or the slices do not fit.
pub fn resize_axis<T: Number>(
    cx: &Cx,
    x: &[T],
    [outer, n, inner]: [usize; 3],
    taps: &Taps<T>,
    y: &mut [T],
) -> Result<()> {
    let (count, len) = (taps.count, taps.len());
    let size = |n: usize| outer.checked_mul(n).and_then(|s| s.checked_mul(inner));
    if !taps.fits(n) || size(n) != Some(x.len()) || size(len) != Some(y.len()) {
        return Err(Error::new(format!("taps of {len} elements over [{outer}, {n}, {inner}] do not fit")));
    }
    if y.is_empty() {
        return Ok(());
    }
    let cost = (y.len() * count * 2) as u64;
    // Rows of the result: whole ones along the axis, or, when it is not the innermost, one per index of it.
    let row = if inner == 1 { len } else { inner };
    let rows = y.len() / row;
    let per_task = (TASK / row).max(1);
    let out = DisjointMut::new(y);
    cx.for_each(rows.div_ceil(per_task), cost, &|task| {
        for r in task * per_task..rows.min((task + 1) * per_task) {
            // SAFETY: tasks write different rows.
            let y = unsafe { out.range(r * row, row) };
            if inner == 1 {
                along(&x[r * n..][..n], taps, y);
            } else {
                let (o, i) = (r / len, r % len);
                let (index, weight) = taps.of(i);
                let taps = index.iter().zip(weight);
                across(&x[o * n * inner..][..n * inner], taps, y);
            }
        }
    });
    Ok(())
}

/// A line whose taps are elements.
pub(crate) fn along<T: Number>(x: &[T], taps: &Taps<T>, y: &mut [T]) {
    let groups = taps.index.chunks_exact(taps.count).zip(taps.weight.chunks_exact(taps.count));
    for (y, (index, weight)) in y.iter_mut().zip(groups) {
        *y = index.iter().zip(weight).fold(T::ZERO, |sum, (&i, &w)| sum.plus(w.times(x[i])));
    }
}

fn across<'a, T: Number>(x: &[T], taps: impl Iterator<Item = (&'a usize, &'a T)>, y: &mut [T]) {
    let inner = y.len();
    for (k, (&i, &w)) in taps.enumerate() {
        let x = &x[i * inner..][..inner];
        if k == 0 {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = w.times(x));
        } else if w != T::ZERO {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = y.plus(w.times(x)));
        }
    }
}

/// `y[i, j, ..] = x[maps[0][i], maps[1][j], ..]`, or `value` where a map says [`FILL`]; on bytes.
///
/// Like [`crate::movement::take`], for maps of which the inner ones are mostly the identity.
///
/// # Errors
/// If a map leads outside of `x`, or the slices do not fit.
pub fn nearest(cx: &Cx, dims: &[usize], maps: &[Vec<usize>], x: &[u8], value: &[u8], y: &mut [u8]) -> Result<()> {
    let element = value.len();
    let count = maps.iter().try_fold(element, |n, m| n.checked_mul(m.len()));
    let source = dims.iter().try_fold(element, |n, &d| n.checked_mul(d));
    let inside = maps.iter().zip(dims).all(|(m, &d)| m.iter().all(|&i| i < d || i == FILL));
    if element == 0 || maps.len() != dims.len() || !inside || count != Some(y.len()) || source != Some(x.len()) {
        return Err(Error::new(format!("maps into a shape of {dims:?} lead outside of it or do not fit the result")));
    }
    if y.is_empty() {
        return Ok(());
    }
    let identity = |(m, &d): (&Vec<usize>, &usize)| m.len() == d && m.iter().enumerate().all(|(i, &at)| i == at);
    let whole = maps.iter().zip(dims).rev().take_while(|&(m, d)| identity((m, d))).count();
    let (maps, kept) = (&maps[..maps.len() - whole], &dims[dims.len() - whole..]);
    let block = element * kept.iter().product::<usize>();
    let Some((inner, outer)) = maps.split_last() else {
        y.copy_from_slice(x);
        return Ok(());
    };
    let row = inner.len() * block;
    let rows = y.len() / row;
    let length = dims[outer.len()];
    let per_task = (4 * TASK / row).max(1);
    let bytes = y.len() as u64;
    let out = DisjointMut::new(y);
    cx.for_each(rows.div_ceil(per_task), bytes / 2, &|task| {
        for r in task * per_task..rows.min((task + 1) * per_task) {
            // SAFETY: tasks write different rows.
            let to = unsafe { out.range(r * row, row) };
            let (mut from, mut rest, mut stride) = (Some(0), r, length * block);
            for (map, d) in outer.iter().zip(dims).rev() {
                let at = map[rest % map.len()];
                from = from.filter(|_| at != FILL).map(|f| f + at * stride);
                rest /= map.len();
                stride *= d;
            }
            let Some(from) = from else {
                to.chunks_exact_mut(element).for_each(|to| to.copy_from_slice(value));
                continue;
            };
            let from = &x[from..][..length * block];
            match (block, value) {
                (1, &[v]) => gather([v], from, inner, to),
                (2, &[a, b]) => gather([a, b], from, inner, to),
                (4, &[a, b, c, d]) => gather([a, b, c, d], from, inner, to),
                _ => {
                    for (to, &at) in to.chunks_exact_mut(block).zip(inner) {
                        match at {
                            FILL => to.chunks_exact_mut(element).for_each(|to| to.copy_from_slice(value)),
                            _ => to.copy_from_slice(&from[at * block..][..block]),
                        }
                    }
                }
            }
        }
    });
    Ok(())
}

fn gather<const N: usize>(value: [u8; N], from: &[u8], map: &[usize], to: &mut [u8]) {
    let (from, _) = from.as_chunks::<N>();
    let (to, _) = to.as_chunks_mut::<N>();
    for (to, &at) in to.iter_mut().zip(map) {
        *to = if at == FILL { value } else { from[at] };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{each_context, integers};

    #[test]
    fn taps_along_every_axis() {
        let dims = [3, 5, 19];
        let x = integers(dims.iter().product(), 1);
        each_context(|cx| {
            for axis in 0..3 {
                let n = dims[axis];
                let taps = Taps {
                    count: 2,
                    index: (0..2 * 7).map(|i| (i * 3) % n).collect(),
                    weight: (0..2 * 7).map(|i| i as f32 - 4.0).collect(),
                };
                let sizes: [usize; 3] = [dims[..axis].iter().product(), n, dims[axis + 1..].iter().product()];
                let mut y = vec![0.0; sizes[0] * 7 * sizes[2]];
                resize_axis(cx, &x, sizes, &taps, &mut y).unwrap();
                for (at, &y) in y.iter().enumerate() {
                    let (o, i, j) = (at / sizes[2] / 7, at / sizes[2] % 7, at % sizes[2]);
                    let term = |k: usize| taps.weight[2 * i + k] * x[(o * n + taps.index[2 * i + k]) * sizes[2] + j];
                    assert_eq!(y, term(0) + term(1));
                }
            }
        });
    }

    #[test]
    fn nearest_is_take() {
        let dims = [2, 3, 4];
        let x: Vec<u8> = (0..24 * 4).collect();
        let identity: Vec<usize> = (0..4).collect();
        each_context(|cx| {
            for (element, value) in [(1, &[9u8][..]), (2, &[9, 8]), (4, &[9, 8, 7, 6])] {
                for last in [vec![0, 0, FILL, 3, 1], identity.clone()] {
                    let maps = [vec![1, FILL, 0], vec![2, 2, 0], last];
                    let count: usize = maps.iter().map(Vec::len).product();
                    let (mut y, mut want) = (vec![0; count * element], vec![0; count * element]);
                    nearest(cx, &dims, &maps, &x[..24 * element], value, &mut y).unwrap();
                    crate::movement::take(cx, &dims, &maps, &x[..24 * element], value, &mut want).unwrap();
                    assert_eq!(y, want);
                }
            }
            assert!(nearest(cx, &[2], &[vec![2]], &[1, 2], &[0], &mut [0]).is_err());
        });
    }
}
