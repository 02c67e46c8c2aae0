//! Discrete Fourier transforms and mel filters, in `f64`.

use core::f64::consts::PI;

/// The transform of complex numbers `x`, or its inverse (with factor 1/n): by halving while the length is even, the
/// defining sum for odd lengths.
pub fn dft(x: &[[f64; 2]], inverse: bool) -> Vec<[f64; 2]> {
    let mut y = transform(x, if inverse { 1.0 } else { -1.0 });
    if inverse {
        let n = x.len() as f64;
        y.iter_mut().for_each(|v| *v = [v[0] / n, v[1] / n]);
    }
    y
}

fn times(a: [f64; 2], b: [f64; 2]) -> [f64; 2] {
    [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]]
}

fn root(n: usize, k: usize, sign: f64) -> [f64; 2] {
    let (sin, cos) = (sign * 2.0 * PI * (k % n) as f64 / n as f64).sin_cos();
    [cos, sin]
}

fn transform(x: &[[f64; 2]], sign: f64) -> Vec<[f64; 2]> {
    let n = x.len();
    if n < 2 {
        return x.to_vec();
    }
    if n % 2 == 1 {
        let term = |k: usize, j: usize| times(x[j], root(n, j * k % n, sign));
        let sum = |k| (0..n).map(|j| term(k, j)).fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
        return (0..n).map(sum).collect();
    }
    let half = |first: usize| transform(&x[first..].iter().step_by(2).copied().collect::<Vec<_>>(), sign);
    let (even, odd) = (half(0), half(1));
    let mut y = vec![[0.0; 2]; n];
    for k in 0..n / 2 {
        let t = times(odd[k], root(n, k, sign));
        y[k] = [even[k][0] + t[0], even[k][1] + t[1]];
        y[k + n / 2] = [even[k][0] - t[0], even[k][1] - t[1]];
    }
    y
}

/// Triangular filters on the mel scale: `[length / 2 + 1, bins]`, as ONNX's MelWeightMatrix defines them; `None` if an
/// edge lies outside of the spectrum.
pub fn mel_weights(bins: usize, length: usize, rate: f64, low: f64, high: f64) -> Option<Vec<f64>> {
    let rows = length / 2 + 1;
    let mel = |hertz: f64| 2595.0 * (hertz / 700.0).ln_1p() / 10f64.ln();
    let step = (mel(high) - mel(low)) / (bins + 2) as f64;
    let edge = |i: usize| {
        let hertz = 700.0 * ((i as f64 * step + mel(low)) / 2595.0 * 10f64.ln()).exp_m1();
        let at = ((length + 1) as f64 * hertz / rate).floor();
        (at >= 0.0 && at < rows as f64).then_some(at as usize)
    };
    let mut out = vec![0.0; rows * bins];
    for i in 0..bins {
        let (left, centre, right) = (edge(i)?, edge(i + 1)?, edge(i + 2)?);
        if left == centre {
            out[centre * bins + i] = 1.0;
        }
        for j in left..=centre {
            if centre > left {
                out[j * bins + i] = (j - left) as f64 / (centre - left) as f64;
            }
        }
        for j in centre..right {
            out[j * bins + i] = (right - j) as f64 / (right - centre) as f64;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_matches_the_sum_and_comes_back() {
        for n in [1, 2, 3, 4, 6, 7, 8, 12, 15, 16] {
            let x: Vec<[f64; 2]> = (0..n).map(|i| [(i * i % 7) as f64, (i % 3) as f64]).collect();
            let y = dft(&x, false);
            for (k, y) in y.iter().enumerate() {
                let want =
                    (0..n).map(|j| times(x[j], root(n, j * k, -1.0))).fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
                assert!((y[0] - want[0]).abs() + (y[1] - want[1]).abs() < 1e-9, "{n} {k}");
            }
            for (a, b) in dft(&y, true).iter().zip(&x) {
                assert!((a[0] - b[0]).abs() + (a[1] - b[1]).abs() < 1e-9, "{n}");
            }
        }
    }

    #[test]
    fn filters_rise_and_fall() {
        let w = mel_weights(4, 64, 8192.0, 0.0, 4096.0).unwrap();
        assert_eq!(w.len(), 33 * 4);
        assert!(w.iter().all(|v| (0.0..=1.0).contains(v)) && w.contains(&1.0));
        assert!(mel_weights(4, 64, 8192.0, 0.0, 40960.0).is_none());
    }
}
