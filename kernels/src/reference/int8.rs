//! Products of 8-bit integers, element by element.

use crate::conv::{ConvInput, ConvParams};
use crate::error::Result;
use crate::int8::{Bytes, BytesMut, Output, QMatrix, Requantize};
use crate::naive;

/// Sums of a product; `b_zero` holds one zero point for all columns, or one for each.
///
/// # Panics
/// If a matrix is smaller than its sizes say.
pub fn matmul(a: QMatrix<'_>, a_zero: i32, b: QMatrix<'_>, b_zero: &[i32], bias: Option<&[i32]>) -> Vec<i32> {
    let element = |m: &QMatrix<'_>, i: usize, j: usize| m.data.get(i * m.row_stride + j * m.col_stride);
    let mut sums = vec![0i32; a.rows * b.cols];
    for (i, sum) in sums.iter_mut().enumerate() {
        let (i, j) = (i / b.cols, i % b.cols);
        let zero = b_zero[if b_zero.len() == 1 { 0 } else { j }];
        *sum = (0..a.cols).fold(bias.map_or(0, |bias| bias[j]), |sum, p| {
            sum.wrapping_add((element(&a, i, p) - a_zero) * (element(&b, p, j) - zero))
        });
    }
    sums
}

/// Sums of a convolution, channels-last in and out; `weights` are centred, `[out, in / groups, kd, kh, kw]`.
///
/// # Errors
/// If a window does not fit into the padded input.
pub fn conv(
    params: &ConvParams,
    input: &ConvInput,
    out: [usize; 3],
    x: Bytes<'_>,
    x_zero: i32,
    weights: &[i32],
    bias: Option<&[i32]>,
) -> Result<Vec<i32>> {
    let (pixels, channels) = (input.spatial.iter().product::<usize>(), params.in_channels);
    let mut first = vec![0i32; x.len()];
    for (i, v) in first.iter_mut().enumerate() {
        let (image, c, pixel) = (i / (channels * pixels), i / pixels % channels, i % pixels);
        *v = x.get((image * pixels + pixel) * channels + c) - x_zero;
    }
    let (pixels, channels) = (out.iter().product::<usize>(), params.out_channels);
    let mut sums = vec![0i32; input.batch * pixels * channels];
    naive::conv(params, input, &first, weights, bias, &mut sums)?;
    let mut last = vec![0i32; sums.len()];
    for (i, v) in sums.iter().enumerate() {
        let (image, c, pixel) = (i / (channels * pixels), i / pixels % channels, i % pixels);
        last[(image * pixels + pixel) * channels + c] = *v;
    }
    Ok(last)
}

/// What becomes of sums whose rows have `n` columns; see [`Output`].
///
/// # Panics
/// If the output's slices are shorter than the sums.
pub fn finish(sums: &[i32], n: usize, output: Output<'_>) {
    let column = |per_column: &[f32], i: usize| per_column[if per_column.len() == 1 { 0 } else { i % n }];
    match output {
        Output::Sums(y) => y.copy_from_slice(sums),
        Output::Real { scale, bias, residual, activation, y } => {
            for (i, &sum) in sums.iter().enumerate() {
                let v = sum as f32 * column(scale, i) + bias.map_or(0.0, |bias| bias[i % n]);
                y[i] = activation.apply_scalar(v + residual.map_or(0.0, |r| r[i]));
            }
        }
        Output::Quantized { requantize, mut y } => {
            for (i, &sum) in sums.iter().enumerate() {
                let q = requantized(&requantize, sum as f32 * column(requantize.multiplier, i), i);
                match &mut y {
                    BytesMut::U8(y) => y[i] = q as u8,
                    BytesMut::I8(y) => y[i] = q as i8,
                }
            }
        }
    }
}

fn requantized(r: &Requantize<'_>, scaled: f32, i: usize) -> i32 {
    let q = (scaled.round_ties_even() as i32).saturating_add(r.zero).clamp(r.lo, r.hi);
    let Some(add) = r.add else { return q };
    let sum = (q - r.zero) as f32 * add.first + (add.other.get(i) - add.other_zero) as f32 * add.second + add.offset;
    (sum.round_ties_even() as i32).saturating_add(add.zero).clamp(add.lo, add.hi)
}
