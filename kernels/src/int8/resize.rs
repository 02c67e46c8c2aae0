//! Interpolation of bytes along two axes side by side, quantised again.
//!
//! ```text
//! for rows of the result                                             in parallel
//!     line = sum over taps k of down[i, k] * (x[row down.index[i, k]] - zero)          real, a row of the operand
//!     for j of the row
//!         y[j] = byte(sum over taps k of (sideways[j, k] * multiplier) * line[sideways.index[j, k]])
//! ```
//!
//! The operand is read as bytes and the result written as bytes: between them there is one row of real numbers, which
//! stays in the cache.

use super::output::{load_bytes, store_bytes};
use super::pointwise::{End, Out};
use super::{Bytes, BytesMut, check_factor};
use crate::error::{Error, Result};
use crate::par::Cx;
use crate::resize::{Taps, along};
use crate::simd::{Kernel, Simd, dispatch};

/// How [`resize`] quantises: `clamp(round(sum * multiplier) + zero, lo, hi)` of weighted sums of `x - x_zero`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interpolation {
    /// Zero point of the operand.
    pub x_zero: i32,
    /// Scale of the operand over that of the result.
    pub multiplier: f32,
    /// Zero point of the result.
    pub zero: i32,
    /// Least result.
    pub lo: i32,
    /// Largest result.
    pub hi: i32,
}

/// Resizes the two axes in the middle of `[outer, rows, columns, inner]`; one without taps stays as it is.
///
/// # Errors
/// If a tap lies outside of its axis, slices do not have the sizes that follow, bounds do not lie in the range of `y`'s
/// type, the zero point not in that of `x`'s, or the multiplier is not finite.
pub fn resize(
    cx: &Cx<'_>,
    f: &Interpolation,
    [outer, rows, columns, inner]: [usize; 4],
    [down, sideways]: [Option<&Taps<f32>>; 2],
    x: Bytes<'_>,
    mut y: BytesMut<'_>,
) -> Result<()> {
    x.check_zero("the operand", f.x_zero)?;
    y.check_bounds(f.lo, f.hi, f.zero)?;
    check_factor(f.multiplier)?;
    let fits = |taps: Option<&Taps<f32>>, n: usize| taps.is_none_or(|taps| taps.fits(n));
    let length = |taps: Option<&Taps<f32>>, n: usize| taps.map_or(n, Taps::len);
    let (new_rows, new_columns) = (length(down, rows), length(sideways, columns));
    let size = |sizes: [usize; 4]| sizes.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
    if !(fits(down, rows) && fits(sideways, columns))
        || size([outer, rows, columns, inner]) != Some(x.len())
        || size([outer, new_rows, new_columns, inner]) != Some(y.len())
    {
        let from = [outer, rows, columns, inner];
        return Err(Error::new(format!("taps of {new_rows} rows and {new_columns} columns over {from:?} do not fit")));
    }
    if y.is_empty() {
        return Ok(());
    }
    let (line, row) = (columns * inner, new_columns * inner);
    let count = |taps: Option<&Taps<f32>>| taps.map_or(1, |taps| taps.count as u64);
    let of_row =
        (line as u64).saturating_mul(count(down)).saturating_add((row as u64).saturating_mul(count(sideways) + 4));
    let cost = of_row.saturating_mul((outer * new_rows) as u64);
    let (signed, to) = y.raw();
    let out = Out(to);
    // Elements side by side along the axis are added up one by one, and quantised together afterwards.
    let single = sideways.filter(|_| inner == 1);
    cx.for_each_scratch(outer * new_rows, cost, line + if single.is_some() { row } else { 0 }, &|task, scratch| {
        let (line, sums) = scratch.split_at_mut(line);
        let (o, i) = (task / new_rows, task % new_rows);
        let (index, weight) = match down {
            Some(taps) => taps.of(i),
            None => (&[i][..], &[1.0][..]),
        };
        dispatch(cx.isa(), Line { x: &x, first: o * rows * line.len(), index, weight, zero: f.x_zero, line });
        // SAFETY: each task has its own row.
        let y = unsafe { out.at(task * row) };
        let whole = |line| Row { f, line, taps: None, inner: row, y, signed };
        dispatch(
            cx.isa(),
            match (single, sideways) {
                (Some(taps), _) => {
                    along(line, taps, sums);
                    whole(sums)
                }
                (None, None) => whole(line),
                (None, taps) => Row { f, line, taps, inner, y, signed },
            },
        );
    });
    Ok(())
}

/// The weighted sum of rows of bytes, each as long as `line`, the first of which begins at `first`.
struct Line<'a> {
    x: &'a Bytes<'a>,
    first: usize,
    index: &'a [usize],
    weight: &'a [f32],
    zero: i32,
    line: &'a mut [f32],
}

impl Kernel for Line<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { x, first, index, weight, zero, line } = self;
        let (length, zero) = (line.len(), s.splat_i32(zero));
        assert!(index.iter().all(|&i| first + (i + 1) * length <= x.len()));
        for (c, y) in line.chunks_mut(2 * S::LANES).enumerate() {
            let mut acc = [s.splat(0.0); 2];
            for (&i, &w) in index.iter().zip(weight) {
                let at = first + i * length + c * 2 * S::LANES;
                // SAFETY: as many elements as y has are there.
                let v = unsafe { load_bytes(s, x, at, y.len()) };
                let w = s.splat(w);
                acc = [0, 1].map(|k| s.add(acc[k], s.mul(s.to_f32(s.sub_i32(v[k], zero)), w)));
            }
            let (low, high) = y.split_at_mut(S::LANES.min(y.len()));
            s.store_partial(low, acc[0]);
            s.store_partial(high, acc[1]);
        }
    }
}

/// A row of the result at `y`: weighted sums of parts of a line, or all of it. Whoever makes one promises that the row may
/// be written.
struct Row<'a> {
    f: &'a Interpolation,
    line: &'a [f32],
    taps: Option<&'a Taps<f32>>,
    /// Elements of a part.
    inner: usize,
    y: *mut u8,
    signed: bool,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { f, line, taps, inner, y, signed } = self;
        let end = End::new(s, f.lo, f.hi, f.zero);
        let width = 2 * S::LANES;
        for j in 0..taps.map_or(1, Taps::len) {
            let (index, weight) = taps.map_or((&[0][..], &[1.0][..]), |taps| taps.of(j));
            assert!(index.iter().all(|i| (i + 1) * inner <= line.len()));
            let part = |c: usize, cols: usize| {
                let mut acc = [s.splat(0.0); 2];
                for (&i, &w) in index.iter().zip(weight) {
                    let w = s.splat(w * f.multiplier);
                    // SAFETY: the part lies inside the line, which was asserted.
                    let x = unsafe { core::slice::from_raw_parts(line.as_ptr().add(i * inner + c), cols) };
                    let (low, high) = x.split_at(cols.min(S::LANES));
                    let v = match cols == width {
                        true => [s.load(low), s.load(high)],
                        false => [s.load_partial(low), s.load_partial(high)],
                    };
                    acc = [s.add(acc[0], s.mul(v[0], w)), s.add(acc[1], s.mul(v[1], w))];
                }
                let v = acc.map(|acc| end.apply(s, acc));
                // SAFETY: the contract of the type.
                unsafe { store_bytes(s, y.add(j * inner + c), v, cols, signed) };
            };
            if inner < width {
                part(0, inner);
                continue;
            }
            // The last vectors end with the part, and overlap the ones before.
            for c in (0..inner - width).step_by(width) {
                part(c, width);
            }
            part(inner - width, width);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::each_context;

    /// Three taps of a kind, of which one may be the same as another.
    fn taps(n: usize, len: usize) -> Taps<f32> {
        let index = (0..3 * len).map(|k| (k * 5 + k / 7) % n).collect();
        let weight = (0..3 * len).map(|k| [0.5, -0.125, 0.75, 0.25][k % 4]).collect();
        Taps { count: 3, index, weight }
    }

    #[test]
    fn both_axes_or_one() {
        let bytes = |n: usize| -> Vec<u8> { (0..n).map(|i| (i * 37 + i / 11) as u8).collect() };
        let f = Interpolation { x_zero: 7, multiplier: 1.25, zero: 3, lo: -100, hi: 120 };
        each_context(|cx| {
            for ([outer, rows, columns, inner], [down, sideways]) in [
                ([2, 5, 7, 1], [Some(4), Some(11)]),
                ([1, 5, 7, 3], [Some(9), Some(5)]),
                ([3, 2, 4, 37], [Some(3), Some(9)]),
                ([2, 4, 19, 2], [Some(6), None]),
                ([2, 3, 6, 1], [None, Some(13)]),
                ([1, 1, 1, 50], [None, None]),
            ] {
                let [down, sideways] = [down.map(|n| taps(rows, n)), sideways.map(|n| taps(columns, n))];
                let x = bytes(outer * rows * columns * inner);
                let x: &[i8] = bytemuck::cast_slice(&x);
                let [height, width] =
                    [down.as_ref().map_or(rows, Taps::len), sideways.as_ref().map_or(columns, Taps::len)];
                let mut y = vec![0i8; outer * height * width * inner];
                let sizes = [outer, rows, columns, inner];
                let both = [down.as_ref(), sideways.as_ref()];
                resize(cx, &f, sizes, both, Bytes::I8(x), BytesMut::I8(&mut y)).unwrap();
                let weighted = |taps: &Option<Taps<f32>>, i: usize| match taps {
                    Some(t) => (0..3).map(|k| (t.index[3 * i + k], f64::from(t.weight[3 * i + k]))).collect(),
                    None => vec![(i, 1.0)],
                };
                for (at, &y) in y.iter().enumerate() {
                    let (o, i) = (at / inner / width / height, at / inner / width % height);
                    let (j, c) = (at / inner % width, at % inner);
                    let mut sum = 0.0;
                    for (r, a) in weighted(&down, i) {
                        for (k, b) in weighted(&sideways, j) {
                            sum += a * b * f64::from(i32::from(x[((o * rows + r) * columns + k) * inner + c]) - 7);
                        }
                    }
                    // All of it is exact in floats.
                    let want = ((sum * 1.25).round_ties_even() as i32 + 3).clamp(-100, 120);
                    assert_eq!(i32::from(y), want, "{at} of {sizes:?}");
                }
            }
        });
    }

    #[test]
    fn what_does_not_fit() {
        let f = Interpolation { x_zero: 0, multiplier: 1.0, zero: 0, lo: 0, hi: 255 };
        each_context(|cx| {
            let (x, mut y) = ([0u8; 12], [0u8; 12]);
            let mut run = |f: &Interpolation, sizes, down: Option<&Taps<f32>>| {
                resize(cx, f, sizes, [down, None], Bytes::U8(&x), BytesMut::U8(&mut y)).is_err()
            };
            assert!(!run(&f, [1, 3, 4, 1], Some(&taps(3, 3))));
            assert!(run(&f, [1, 3, 4, 1], Some(&taps(4, 3))), "a tap outside");
            assert!(run(&f, [1, 3, 4, 1], Some(&taps(3, 4))), "a longer result");
            assert!(run(&f, [usize::MAX, usize::MAX, 4, 1], None), "more than there can be");
            assert!(run(&Interpolation { multiplier: f32::NAN, ..f }, [1, 3, 4, 1], None));
            assert!(run(&Interpolation { x_zero: -1, ..f }, [1, 3, 4, 1], None));
            assert!(run(&Interpolation { hi: 256, ..f }, [1, 3, 4, 1], None));
        });
    }
}
