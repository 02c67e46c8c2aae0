//! Softmax and normalisations by the textbook.

/// Softmax (or its logarithm) along the middle axis of `[outer, n, inner]`, in `f64`.
pub fn softmax(x: &[f32], [outer, n, inner]: [usize; 3], log: bool) -> Vec<f64> {
    let mut out = vec![0.0; x.len()];
    for o in 0..outer {
        for j in 0..inner {
            let at = |i: usize| (o * n + i) * inner + j;
            let max = (0..n).map(|i| f64::from(x[at(i)])).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (0..n).map(|i| (f64::from(x[at(i)]) - max).exp()).sum();
            for i in 0..n {
                let v = f64::from(x[at(i)]) - max;
                out[at(i)] = if log { v - sum.ln() } else { v.exp() / sum };
            }
        }
    }
    out
}

/// `(x - mean) / sqrt(var + epsilon) * scale + bias` for rows of `n`, where element `i` of row `r` takes scale and bias
/// number `channel(r, i)`; without `center` the mean counts as 0. In `f64`.
pub fn normalize(
    x: &[f32],
    n: usize,
    epsilon: f64,
    center: bool,
    scale: &[f32],
    bias: &[f32],
    channel: impl Fn(usize, usize) -> usize,
) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for (r, row) in x.chunks_exact(n).enumerate() {
        let mean = if center { row.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64 } else { 0.0 };
        let var = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64;
        for (i, &v) in row.iter().enumerate() {
            let c = channel(r, i);
            out.push((f64::from(v) - mean) / (var + epsilon).sqrt() * f64::from(scale[c]) + f64::from(bias[c]));
        }
    }
    out
}
