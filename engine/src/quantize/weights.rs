//! From float weights to integers, and what that costs them.
//!
//! ```text
//! symmetric:   s = max|w| / q_max            q = clamp(round(w / s), -q_max, q_max)       w' = s q
//! affine:      s = (hi - lo) / 255           z = round(-lo / s)    q = clamp(round(w / s) + z, 0, 255)    w' = s (q - z)
//! ```
//!
//! Rounding is half to even, as ONNX's QuantizeLinear has it.

use crate::error::{Error, Result};

/// Signal and noise of a quantised tensor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Noise {
    signal: f64,
    noise: f64,
}

impl Noise {
    /// One value and what became of it.
    pub(super) fn add(&mut self, was: f32, is: f32) {
        let (was, is) = (f64::from(was), f64::from(is));
        self.signal += was * was;
        self.noise += (was - is) * (was - is);
    }

    /// Signal-to-quantisation-noise ratio, `10 log10(sum w^2 / sum (w - w')^2)`; none when nothing was lost.
    pub(super) fn sqnr_db(&self) -> Option<f64> {
        (self.noise > 0.0).then(|| 10.0 * (self.signal / self.noise).log10()).filter(|db| db.is_finite())
    }
}

/// 8-bit weights with one scale per channel.
pub(super) struct Symmetric {
    /// The integers, in the order of the weights.
    pub(super) values: Vec<i8>,
    /// One per channel.
    pub(super) scales: Vec<f32>,
    /// What was lost.
    pub(super) noise: Noise,
}

/// A scale that can be divided by, whatever the range of the weights is.
pub(super) fn usable(scale: f32) -> f32 {
    if scale >= f32::MIN_POSITIVE && scale.is_finite() { scale } else { 1.0 }
}

/// What no integers can stand for.
pub(super) fn check_finite(name: &str, x: &[f32]) -> Result<()> {
    match x.iter().find(|v| !v.is_finite()) {
        Some(v) => Err(Error::invalid_model(format!("the weights \"{name}\" hold {v}; finite numbers were wanted"))),
        None => Ok(()),
    }
}

/// Quantises `[outer, channels, inner]` elements to `-q_max..=q_max`, with one scale per channel; `least` is the
/// smallest that the scale of a channel may be.
pub(super) fn symmetric(
    x: &[f32],
    [outer, channels, inner]: [usize; 3],
    q_max: f32,
    least: &dyn Fn(usize) -> f32,
) -> Symmetric {
    let mut scales = vec![0f32; channels];
    let run = |o: usize, c: usize| (o * channels + c) * inner..(o * channels + c + 1) * inner;
    for o in 0..outer {
        for (c, scale) in scales.iter_mut().enumerate() {
            *scale = x[run(o, c)].iter().fold(*scale, |m, v| m.max(v.abs()));
        }
    }
    scales.iter_mut().enumerate().for_each(|(c, s)| *s = usable((*s / q_max).max(least(c))));
    let mut values = Vec::with_capacity(x.len());
    let mut noise = Noise::default();
    for o in 0..outer {
        for (c, &scale) in scales.iter().enumerate() {
            for &v in &x[run(o, c)] {
                let q = (v / scale).round_ties_even().clamp(-q_max, q_max);
                noise.add(v, q * scale);
                values.push(q as i8);
            }
        }
    }
    Symmetric { values, scales, noise }
}

/// Where an axis lies in a dense tensor: elements before it, along it, after it.
pub(super) fn around(dims: &[usize], axis: usize) -> [usize; 3] {
    [dims[..axis].iter().product(), dims[axis], dims[axis + 1..].iter().product()]
}

/// Scale and zero point of 8-bit numbers for a range, which is widened to hold 0 so that padding is exact.
pub(super) fn affine(lo: f32, hi: f32, signed: bool) -> (f32, i32) {
    let (lo, hi) = (lo.min(0.0), hi.max(0.0));
    // In double precision, since the range of two large floats may not be a float.
    let scale = usable(((f64::from(hi) - f64::from(lo)) / 255.0) as f32);
    let least = if signed { -128 } else { 0 };
    let zero = (f64::from(least) - f64::from(lo) / f64::from(scale)).round_ties_even();
    (scale, (zero as i32).clamp(least, least + 255))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symmetric_by_hand() {
        // Channels are the columns: 1.27 and -2.54 give scales of 0.01 and 0.02.
        let q = symmetric(&[1.27, 0.5, 0.004, -2.54], [2, 2, 1], 127.0, &|_| 0.0);
        assert_eq!(q.values, [127, 25, 0, -127]);
        assert!((q.scales[0] - 0.01).abs() < 1e-9 && (q.scales[1] - 0.02).abs() < 1e-9);
        // Only 0.004 is lost: 1.27^2 + 0.5^2 + 0.004^2 + 2.54^2 over 0.004^2.
        let want = 10.0 * ((1.27f64 * 1.27 + 0.25 + 0.000_016 + 2.54 * 2.54) / 0.000_016).log10();
        assert!((q.noise.sqnr_db().unwrap() - want).abs() < 1e-3, "{:?} {want}", q.noise.sqnr_db());
    }

    #[test]
    fn affine_by_hand() {
        assert_eq!(affine(-1.0, 1.55, false), (0.01, 100));
        assert_eq!(affine(-1.0, 1.55, true), (0.01, -28));
        assert_eq!(affine(0.5, 2.55, false), (0.01, 0));
        assert_eq!(affine(0.0, 0.0, false), (1.0, 0));
        assert_eq!(affine(-2.55, -1.0, false), (0.01, 255));
        let (scale, zero) = affine(-f32::MAX, f32::MAX, false);
        assert!(scale.is_finite() && zero == 128);
    }

    #[test]
    fn all_zero_is_exact() {
        let q = symmetric(&[0.0; 4], [1, 1, 4], 127.0, &|_| 0.0);
        assert_eq!((q.values, q.scales, q.noise.sqnr_db()), (vec![0; 4], vec![1.0], None));
    }
}
