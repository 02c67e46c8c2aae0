//! Softmax from bytes to bytes.
//!
//! ```text
//! exp[d] = e^(-d * scale of x)                           for the 256 distances d from the largest element of a row
//! for rows                                               in parallel
//!     for i: e[i] = exp[max - x[i]], sum += e[i]         element by element: vectors have no loads from a table
//!     for i: y[i] = saturate(round(e[i] / (sum / steps)) + zero)
//! ```
//!
//! Sums are taken in one order on every machine, so that results have the same bits.

use super::{Bytes, BytesMut};
use crate::conv::{check_len, volume};
use crate::error::{Error, Result};
use crate::gemm::part;
use crate::par::{Cx, DisjointMut};
use crate::quant::ToBytes;
use crate::simd::dispatch;

/// Elements that make a task.
const TASK: usize = 8 * 1024;
/// Rows that lie side by side and are computed together.
const COLUMNS: usize = 16;
/// More tasks than this would not balance better.
const MAX_TASKS: usize = 64;

/// The softmax of `x * x_scale` along the middle axis of `[outer, n, inner]`, in `steps` per unit, around `zero`. Halves are
/// rounded to even. Elements of `y` are signed if those of `x` are.
///
/// # Errors
/// If the tensors do not have the sizes, or `y` is of the other kind.
pub fn softmax(
    cx: &Cx<'_>,
    x: Bytes<'_>,
    x_scale: f32,
    [outer, n, inner]: [usize; 3],
    steps: f32,
    zero: i32,
    mut y: BytesMut<'_>,
) -> Result<()> {
    let len = volume(&[outer, n, inner])?;
    check_len("the input", x.len(), len)?;
    check_len("the output", y.len(), len)?;
    let signed = matches!(x, Bytes::I8(_));
    let y: &mut [u8] = match &mut y {
        BytesMut::U8(y) if !signed => y,
        BytesMut::I8(y) if signed => bytemuck::cast_slice_mut(y),
        _ => return Err(Error::new("softmax from signed bytes to unsigned ones, or the other way")),
    };
    if len == 0 {
        return Ok(());
    }
    let exp: [f32; 256] = std::array::from_fn(|d| (-(d as f64) * f64::from(x_scale)).exp() as f32);
    let x: &[u8] = match x {
        Bytes::U8(x) => x,
        Bytes::I8(x) => bytemuck::cast_slice(x),
    };
    // Signed bytes with the first bit turned have the order of unsigned ones.
    let turn = if signed { 128 } else { 0 };
    let steps = f64::from(steps);
    let to_bytes = |x: &[f32], scale: f32, y: &mut [u8]| {
        let y = if signed { BytesMut::I8(bytemuck::cast_slice_mut(y)) } else { BytesMut::U8(y) };
        let (lo, hi) = if signed { (-128.0, 127.0) } else { (0.0, 255.0) };
        dispatch(cx.isa(), ToBytes { x, scale, zero: zero as f32, lo, hi, y });
    };
    // A sum is at least 1, the power of the largest.
    let unit = |sum: f64| ((sum / steps) as f32).max(f32::MIN_POSITIVE);
    let tasks = |units: usize| (len / TASK).clamp(1, MAX_TASKS.min(units));
    let out = DisjointMut::new(y);
    if inner == 1 {
        let tasks = tasks(outer);
        cx.for_each_scratch(tasks, 8 * len as u64, n, &|task, powers| {
            for row in part(outer, tasks, task) {
                let sum = fill(&exp, &x[row * n..][..n], turn, powers);
                // SAFETY: each task has its own rows.
                to_bytes(powers, unit(sum), unsafe { out.range(row * n, n) });
            }
        });
        return Ok(());
    }
    // Rows side by side, so that bytes are read and written in runs.
    let groups = inner.div_ceil(COLUMNS);
    let tasks = tasks(outer * groups);
    let powers_len = volume(&[n, COLUMNS])?;
    cx.for_each_scratch(tasks, 8 * len as u64, powers_len + powers_len / 4, &|task, scratch| {
        let (powers, bytes) = scratch.split_at_mut(powers_len);
        let (powers, bytes) = (powers.as_chunks_mut().0, bytemuck::cast_slice_mut::<f32, u8>(bytes));
        for group in part(outer * groups, tasks, task) {
            let first = group / groups * n * inner + group % groups * COLUMNS;
            let columns = (inner - group % groups * COLUMNS).min(COLUMNS);
            let units = fill_columns(&exp, &x[first..], inner, columns, turn, powers).map(unit);
            for power in powers.iter_mut() {
                power.iter_mut().zip(units).for_each(|(power, unit)| *power /= unit);
            }
            to_bytes(powers.as_flattened(), 1.0, bytes);
            for (i, bytes) in bytes.chunks_exact(COLUMNS).enumerate() {
                // SAFETY: each task has its own columns.
                let y = unsafe { out.range(first + i * inner, columns) };
                y.copy_from_slice(&bytes[..columns]);
            }
        }
    });
    Ok(())
}

/// Powers of the elements of a row by their distance from the largest, and their sum.
fn fill(exp: &[f32; 256], x: &[u8], turn: u8, powers: &mut [f32]) -> f64 {
    let max = x.iter().fold(0, |max: u8, &x| max.max(x ^ turn));
    let power = |x: u8| exp[usize::from(max - (x ^ turn))];
    // Four sums: each addition waits for the one before it.
    let mut sums = [0f64; 4];
    let ((groups, rest), (to, to_rest)) = (x.as_chunks::<4>(), powers.as_chunks_mut::<4>());
    for (group, to) in groups.iter().zip(to) {
        for i in 0..4 {
            to[i] = power(group[i]);
            sums[i] += f64::from(to[i]);
        }
    }
    for (i, (&x, to)) in rest.iter().zip(to_rest).enumerate() {
        *to = power(x);
        sums[i] += f64::from(*to);
    }
    sums.iter().sum()
}

/// [`fill`] for rows side by side, `columns` of them; elements of a row are `stride` apart.
fn fill_columns(
    exp: &[f32; 256],
    x: &[u8],
    stride: usize,
    columns: usize,
    turn: u8,
    powers: &mut [[f32; COLUMNS]],
) -> [f64; COLUMNS] {
    let line = |i: usize| {
        let mut line = [0u8; COLUMNS];
        line[..columns].copy_from_slice(&x[i * stride..][..columns]);
        line.map(|x| x ^ turn)
    };
    let mut max = [0u8; COLUMNS];
    for i in 0..powers.len() {
        max.iter_mut().zip(line(i)).for_each(|(max, x)| *max = x.max(*max));
    }
    let mut sums = [0f64; COLUMNS];
    for (i, powers) in powers.iter_mut().enumerate() {
        let line = line(i);
        for c in 0..COLUMNS {
            powers[c] = exp[usize::from(max[c] - line[c])];
            sums[c] += f64::from(powers[c]);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::each_context;

    #[test]
    fn steps_of_the_distribution() {
        for ([outer, n, inner], x_scale, steps) in [
            ([3, 5, 1], 0.3, 256.0),
            ([7, 131, 1], 0.05, 256.0),
            ([2, 33, 6], 0.1, 100.0),
            ([3, 21, 50], 0.2, 256.0),
            ([400, 64, 1], 0.02, 255.0),
        ] {
            let len = outer * n * inner;
            let x: Vec<u8> = (0..len).map(|i| (i * 7919 % 251) as u8).collect();
            for signed in [false, true] {
                let kind = if signed { Bytes::I8(bytemuck::cast_slice(&x)) } else { Bytes::U8(&x) };
                let real: Vec<f64> = (0..len).map(|i| f64::from(kind.get(i)) * f64::from(x_scale)).collect();
                let zero = if signed { -128 } else { 3 };
                let share =
                    reference::softmax(&real.iter().map(|&x| x as f32).collect::<Vec<_>>(), [outer, n, inner], false);
                let mut first: Option<Vec<u8>> = None;
                each_context(|cx| {
                    let mut y = vec![0u8; len];
                    let to = if signed { BytesMut::I8(bytemuck::cast_slice_mut(&mut y)) } else { BytesMut::U8(&mut y) };
                    softmax(cx, kind, x_scale, [outer, n, inner], steps, zero, to).unwrap();
                    for (i, (&y, share)) in y.iter().zip(&share).enumerate() {
                        let y = if signed { f64::from(y as i8) } else { f64::from(y) };
                        let want = share * f64::from(steps) + f64::from(zero);
                        assert!(
                            (y - want.min(if signed { 127.0 } else { 255.0 })).abs() < 0.501,
                            "{i}: {y} for {want}"
                        );
                    }
                    let first = first.get_or_insert_with(|| y.clone());
                    assert_eq!(*first, y, "{:?} differs", cx.isa());
                });
            }
        }
    }

    #[test]
    fn extremes() {
        each_context(|cx| {
            // Steps without end, of which every share but nothing is more than a byte holds.
            let mut y = [7u8; 3];
            softmax(cx, Bytes::U8(&[0, 255, 255]), 1.0, [1, 3, 1], f32::INFINITY, 0, BytesMut::U8(&mut y)).unwrap();
            assert_eq!(y, [0, 255, 255]);
            softmax(cx, Bytes::U8(&[0, 255, 255]), f32::MAX, [1, 3, 1], 256.0, 1, BytesMut::U8(&mut y)).unwrap();
            assert_eq!(y, [1, 129, 129]);
            assert!(softmax(cx, Bytes::U8(&[1]), 1.0, [1, 2, 1], 1.0, 0, BytesMut::U8(&mut y[..1])).is_err());
            assert!(softmax(cx, Bytes::U8(&[1]), 1.0, [1, 1, 1], 1.0, 0, BytesMut::I8(&mut [0])).is_err());
            softmax(cx, Bytes::U8(&[]), 1.0, [0, 2, 1], 1.0, 0, BytesMut::U8(&mut [])).unwrap();
        });
    }
}
