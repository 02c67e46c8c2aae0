//! Ranges of the values between nodes, from runs of the float model on samples.
//!
//! ```text
//! first pass:   the least and the largest of each value
//! second pass:  a histogram over that range, widened to hold zero (entropy: without the zeros)
//! ```

use super::{QuantizeOptions, Sample};
use crate::error::{Error, Result};
use crate::onnx::Model;
use crate::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// How ranges follow from samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// From the least to the largest.
    #[default]
    MinMax,
    /// What is left when the outermost values are cut off, the same share at both ends.
    Percentile,
    /// The range that loses the least information, by Kullback-Leibler divergence of the distributions before and after.
    Entropy,
}

const BINS: usize = 2048;

/// Levels that entropy takes a range to have: with the 256 there are, few bins would share one.
const LEVELS: usize = 128;

/// Ranges that entropy tries.
const TRIES: usize = 128;

#[derive(Clone, Debug)]
struct Statistics {
    lo: f32,
    hi: f32,
    bins: Vec<u64>,
}

/// What is known so far.
pub(super) struct Calibration {
    method: Method,
    percentile: f64,
    values: BTreeMap<String, Statistics>,
    /// Inputs of the model are no outputs of a run.
    inputs: Vec<String>,
}

impl Calibration {
    /// Observes these values of the model's graph.
    pub(super) fn new(model: &Model, names: Vec<String>, options: &QuantizeOptions) -> Result<Self> {
        let inputs: Vec<String> = model.graph.inputs.iter().map(|i| i.name.clone()).collect();
        let fresh = Statistics { lo: f32::INFINITY, hi: f32::NEG_INFINITY, bins: Vec::new() };
        let values = names.into_iter().map(|n| (n, fresh.clone())).collect();
        Ok(Calibration { method: options.method, percentile: options.percentile, values, inputs })
    }

    /// The values that runs have to give.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str).filter(|n| !self.inputs.iter().any(|i| i == n))
    }

    /// Runs over all samples that are needed.
    pub(super) fn passes(&self) -> usize {
        if self.method == Method::MinMax { 1 } else { 2 }
    }

    /// Takes the values of a run.
    pub(super) fn observe<'a>(
        &mut self,
        outputs: impl Iterator<Item = (&'a str, &'a Tensor)>,
        sample: &'a Sample,
        second: bool,
    ) -> Result<()> {
        let inputs = sample.iter().map(|(n, t)| (n.as_str(), t));
        for (name, t) in outputs.chain(inputs).filter(|(_, t)| t.dtype() == DType::F32) {
            let Some(s) = self.values.get_mut(name) else { continue };
            let x = t.as_slice::<f32>()?;
            if second {
                s.count(x, self.method == Method::Entropy);
            } else {
                // Masks are often infinite; NaN compares with nothing.
                for &v in x.iter().filter(|v| v.is_finite()) {
                    s.lo = s.lo.min(v);
                    s.hi = s.hi.max(v);
                }
                if x.iter().any(|v| v.is_nan()) {
                    return Err(Error::invalid_input(format!("the value \"{name}\" is NaN for a sample")));
                }
            }
        }
        Ok(())
    }

    /// The range of each value that was seen; those that hold no floats have none.
    pub(super) fn ranges(&self) -> HashMap<&str, (f32, f32)> {
        let seen = self.values.iter().filter(|(_, s)| s.lo <= s.hi);
        seen.map(|(name, s)| {
            let range = match self.method {
                Method::MinMax => (s.lo, s.hi),
                Method::Percentile => s.percentile(self.percentile),
                Method::Entropy => s.entropy(),
            };
            (name.as_str(), range)
        })
        .collect()
    }
}

impl Statistics {
    fn bounds(&self) -> (f64, f64) {
        (f64::from(self.lo.min(0.0)), f64::from(self.hi.max(0.0)))
    }

    /// Zeros are exact in any range, and after an activation there are so many of them that nothing else would count.
    fn count(&mut self, x: &[f32], without_zeros: bool) {
        if self.lo > self.hi {
            return;
        }
        let (lo, hi) = self.bounds();
        self.bins.resize(BINS, 0);
        let scale = if hi > lo { BINS as f64 / (hi - lo) } else { 0.0 };
        for &v in x.iter().filter(|&&v| v.is_finite() && !(without_zeros && v == 0.0)) {
            let at = ((f64::from(v) - lo) * scale) as usize;
            self.bins[at.min(BINS - 1)] += 1;
        }
    }

    /// The range between two edges of bins, cut to what was seen.
    fn between(&self, first: usize, end: usize) -> (f32, f32) {
        let (lo, hi) = self.bounds();
        let width = (hi - lo) / BINS as f64;
        let (from, to) = (lo + width * first as f64, lo + width * end as f64);
        ((from as f32).max(self.lo), (to as f32).min(self.hi))
    }

    fn percentile(&self, percentile: f64) -> (f32, f32) {
        let total: u64 = self.bins.iter().sum();
        let cut = (1.0 - percentile / 100.0) / 2.0 * total as f64;
        // The first bin, from either end, with which more than the share to be cut off has been passed.
        let reach = |at: &dyn Fn(usize) -> usize| {
            let mut passed = 0;
            (0..self.bins.len()).find(|&i| {
                passed += self.bins[at(i)];
                passed as f64 > cut
            })
        };
        match (reach(&|i| i), reach(&|i| BINS - 1 - i)) {
            (Some(a), Some(b)) if a + b < BINS => self.between(a, BINS - b),
            _ => (self.lo, self.hi),
        }
    }

    /// Of the ranges that cut off what is further from zero than some bound the one with the least divergence; see
    /// Migacz, 8-bit inference with TensorRT (2017), of which this is the two-sided form.
    fn entropy(&self) -> (f32, f32) {
        if self.bins.iter().all(|&n| n == 0) {
            return (self.lo, self.hi);
        }
        let (lo, hi) = self.bounds();
        let bin = |v: f64| ((v - lo) / (hi - lo) * BINS as f64).round().clamp(0.0, BINS as f64) as usize;
        let mut best = (f64::INFINITY, 0, BINS);
        // From the whole range down, so that of equals the widest counts.
        for step in (1..=TRIES).rev() {
            let bound = hi.max(-lo) * step as f64 / TRIES as f64;
            let (first, end) = (bin(-bound), bin(bound));
            if end - first < LEVELS {
                break;
            }
            let divergence = divergence(&self.bins, first, end);
            if divergence < best.0 {
                best = (divergence, first, end);
            }
        }
        self.between(best.1, best.2)
    }
}

/// KL divergence between the bins of a range, with what lies outside put into its ends, and the same range in `LEVELS`
/// equal levels.
fn divergence(bins: &[u64], first: usize, end: usize) -> f64 {
    let inside = &bins[first..end];
    let n = inside.len();
    let total: u64 = bins.iter().sum();
    let (below, above): (u64, u64) = (bins[..first].iter().sum(), bins[end..].iter().sum());
    let kept: u64 = inside.iter().sum();
    if kept == 0 || total == 0 {
        return f64::INFINITY;
    }
    let mut sum = 0.0;
    for level in 0..LEVELS {
        let part = level * n / LEVELS..(level + 1) * n / LEVELS;
        let held: u64 = inside[part.clone()].iter().sum();
        let filled = inside[part.clone()].iter().filter(|&&b| b > 0).count();
        // What one filled bin of this level has when the level is spread over them again.
        let q = held as f64 / filled.max(1) as f64 / kept as f64;
        for i in part {
            let mut p = inside[i];
            p += if i == 0 { below } else { 0 } + if i == n - 1 { above } else { 0 };
            if p > 0 {
                // Outliers in an end that nothing else fills would divide by zero; they count as a lot.
                let q = if inside[i] > 0 { q } else { 1e-9 };
                let p = p as f64 / total as f64;
                sum += p * (p / q).ln();
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(x: &[f32], symmetric: bool) -> Statistics {
        let (lo, hi) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
        let mut s = Statistics { lo, hi, bins: Vec::new() };
        s.count(x, symmetric);
        s
    }

    #[test]
    fn percentile_cuts_outliers() {
        // 0, 1, .. 998 and one at a million: of a thousand values 99.8 percent keep all but one at each end.
        let mut x: Vec<f32> = (0..999).map(|v| v as f32).collect();
        x.push(1e6);
        let (lo, hi) = of(&x, false).percentile(99.7);
        assert!(lo <= 0.0 && (999.0..2000.0).contains(&hi), "{lo} {hi}");
        assert_eq!(of(&x, false).percentile(100.0), (0.0, 1e6));
    }

    #[test]
    fn entropy_cuts_a_lone_outlier_and_keeps_what_is_full() {
        // Sums of four uniform numbers, nearly normal, with and without a value far outside; then what Relu leaves.
        let uniform = |i: usize, k: f32| (i as f32 * k).fract() - 0.5;
        let bell = |i: usize| [0.618_034, 0.754_878, 0.324_718, 0.569_84].iter().map(|&k| uniform(i, k)).sum::<f32>();
        let mut x: Vec<f32> = (0..50_000).map(bell).collect();
        let (lo, hi) = of(&x, true).entropy();
        assert!((-2.0..-1.0).contains(&lo) && (1.0..2.0).contains(&hi), "{lo} {hi}");
        x.push(40.0);
        let (lo, hi) = of(&x, true).entropy();
        assert!((-2.0..-1.0).contains(&lo) && (1.0..8.0).contains(&hi), "{lo} {hi}");
        x.pop();
        x.iter_mut().for_each(|v| *v = v.max(0.0));
        let (lo, hi) = of(&x, true).entropy();
        assert!(lo == 0.0 && (1.0..2.0).contains(&hi), "{lo} {hi}");
    }

    #[test]
    fn constant_values_have_a_range() {
        assert_eq!(of(&[3.0; 9], true).entropy().1, 3.0);
        assert_eq!(of(&[3.0; 9], false).percentile(99.0), (3.0, 3.0));
    }
}
