//! Matrix products and convolutions.

use crate::conv::{ConvInput, ConvParams};
use crate::conv_transpose::ConvTransposeInput;
use ndarray::{Array2, ArrayView2};

/// `a b`, summed in `f64`.
pub fn gemm(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f64> {
    assert_eq!(a.ncols(), b.nrows());
    Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
        a.row(i).iter().zip(b.column(j)).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    })
}

/// Convolution of a channels-last tensor `[batch, d, h, w, channels]` with weights `[out, in / groups, kd, kh, kw]`, as
/// the ONNX operator `Conv` defines it; returns `[batch, od, oh, ow, out]`.
pub fn conv(params: &ConvParams, input: &ConvInput, out: [usize; 3], x: &[f32], w: &[f32], bias: &[f32]) -> Vec<f64> {
    let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = params;
    let (ipg, opg) = (in_channels / groups, out_channels / groups);
    assert_eq!(bias.len(), *out_channels);
    let mut y = Vec::new();
    for b in 0..input.batch {
        for at in boxed(out) {
            for (o, &bias) in bias.iter().enumerate() {
                let mut sum = f64::from(bias);
                for tap in boxed(*kernel) {
                    let mut from = [0; 3];
                    let inside = (0..3).all(|d| {
                        let p = (at[d] * strides[d] + tap[d] * dilations[d]).checked_sub(input.pads_begin[d]);
                        from[d] = p.unwrap_or(usize::MAX);
                        from[d] < input.spatial[d]
                    });
                    if !inside {
                        continue;
                    }
                    for c in 0..ipg {
                        let xi =
                            index(&[b, from[0], from[1], from[2]], &input.spatial) * in_channels + o / opg * ipg + c;
                        let wi = index(&[o * ipg + c, tap[0], tap[1], tap[2]], kernel);
                        sum += f64::from(x[xi]) * f64::from(w[wi]);
                    }
                }
                y.push(sum);
            }
        }
    }
    y
}

/// Transposed convolution of a channels-last tensor `[batch, d, h, w, in]` with weights `[in, out / groups, kd, kh, kw]`,
/// as the ONNX operator `ConvTranspose` defines it: every input is scattered. Returns `[batch, od, oh, ow, out]`.
pub fn conv_transpose(
    params: &ConvParams,
    input: &ConvTransposeInput,
    out: [usize; 3],
    x: &[f32],
    w: &[f32],
    bias: &[f32],
) -> Vec<f64> {
    let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = params;
    let (ipg, opg) = (in_channels / groups, out_channels / groups);
    let pixels = input.batch * out.iter().product::<usize>();
    let mut y: Vec<f64> = (0..pixels).flat_map(|_| bias.iter().map(|&b| f64::from(b))).collect();
    for b in 0..input.batch {
        for at in boxed(input.spatial) {
            for tap in boxed(*kernel) {
                let mut to = [0; 3];
                let inside = (0..3).all(|d| {
                    let p = (at[d] * strides[d] + tap[d] * dilations[d]).checked_sub(input.pads_begin[d]);
                    to[d] = p.unwrap_or(usize::MAX);
                    to[d] < out[d]
                });
                if !inside {
                    continue;
                }
                for c in 0..*in_channels {
                    for o in 0..opg {
                        let xi = index(&[b, at[0], at[1], at[2]], &input.spatial) * in_channels + c;
                        let wi = index(&[c * opg + o, tap[0], tap[1], tap[2]], kernel);
                        let yi = index(&[b, to[0], to[1], to[2]], &out) * out_channels + c / ipg * opg + o;
                        y[yi] += f64::from(x[xi]) * f64::from(w[wi]);
                    }
                }
            }
        }
    }
    y
}

/// All indices of a box, in order.
fn boxed([a, b, c]: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| [i, j, k])))
}

/// Position of `[outer, i, j, k]` in an array of boxes.
fn index(at: &[usize; 4], sizes: &[usize; 3]) -> usize {
    ((at[0] * sizes[0] + at[1]) * sizes[1] + at[2]) * sizes[2] + at[3]
}
