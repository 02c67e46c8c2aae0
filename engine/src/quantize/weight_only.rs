//! Weights in blocks of 4 or 8 bits, activations float: `com.microsoft.MatMulNBits`.
//!
//! The layout is onnxruntime's. Column by column of W `[k, n]`, blocks of `block_size` weights, the last one filled up:
//!
//! ```text
//! B            uint8 [n, blocks, block_size * bits / 8]    4-bit numbers two per byte, the earlier one low
//! scales       float [n * blocks]
//! zero points  uint8 [n * ceil(blocks * bits / 8)]         packed like B per column; 8 or 128 where there are none
//! w' = (q - zero) * scale
//! ```

use super::edit::{Editor, MICROSOFT, constant, label, node, with_int};
use super::product::{Product, product, with_bias};
use super::report::NodeReport;
use super::weights::{Noise, usable};
use super::{Mode, QuantizeOptions, Rewrite};
use crate::error::{Error, Result};
use crate::onnx::Node;
use std::collections::HashMap;

/// See above.
pub(super) struct WeightOnly {
    options: QuantizeOptions,
    bits: usize,
    /// By weights: their integers, scales and zero points.
    weights: HashMap<String, Vec<String>>,
}

/// The weights of a product, packed.
struct Packed {
    values: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
    blob: usize,
    blocks: usize,
    noise: Noise,
}

impl WeightOnly {
    pub(super) fn new(options: &QuantizeOptions) -> Self {
        let bits = if options.mode == Mode::Int4 { 4 } else { 8 };
        WeightOnly { options: options.clone(), bits, weights: HashMap::new() }
    }

    fn pack(&self, p: &Product) -> Result<Packed> {
        let (bits, size) = (self.bits, self.options.block_size);
        let blocks = p.k.div_ceil(size);
        let blob = size * bits / 8;
        let too_large = || Error::limit(format!("weights of shape [{}, {}] have too many blocks", p.k, p.n));
        let count = p.n.checked_mul(blocks).ok_or_else(too_large)?;
        let zero_bytes = (blocks * bits).div_ceil(8);
        let mut packed = Packed {
            values: vec![0; count.checked_mul(blob).ok_or_else(too_large)?],
            scales: Vec::with_capacity(count),
            zeros: vec![0; if self.options.symmetric { 0 } else { p.n * zero_bytes }],
            blob,
            blocks,
            noise: Noise::default(),
        };
        let mut block = vec![0f32; size];
        let mut q = vec![0u8; size];
        for n in 0..p.n {
            for b in 0..blocks {
                let rows = b * size..p.k.min((b + 1) * size);
                let len = rows.len();
                block[..len].iter_mut().zip(rows).for_each(|(v, k)| *v = p.weights[k * p.n + n]);
                let (scale, zero) = quantise_block(&block[..len], &mut q[..len], bits, self.options.symmetric);
                q[len..].fill(zero);
                for (&v, &q) in block[..len].iter().zip(&q) {
                    packed.noise.add(v, (f32::from(q) - f32::from(zero)) * scale);
                }
                packed.scales.push(scale);
                let at = (n * blocks + b) * blob;
                pack(&q, bits, &mut packed.values[at..at + blob]);
                if !self.options.symmetric {
                    let byte = &mut packed.zeros[n * zero_bytes + b * bits / 8];
                    *byte |= zero << (b * bits % 8);
                }
            }
        }
        Ok(packed)
    }
}

fn pack(q: &[u8], bits: usize, out: &mut [u8]) {
    match bits {
        4 => out.iter_mut().zip(q.chunks_exact(2)).for_each(|(o, q)| *o = q[0] | q[1] << 4),
        _ => out.copy_from_slice(q),
    }
}

/// Quantises a block and gives its scale and zero point: of a few of each, those that lose the least.
///
/// Symmetric ones make the weight of the largest magnitude `-2^(bits - 1)`, the end with one step more.
fn quantise_block(x: &[f32], q: &mut [u8], bits: usize, symmetric: bool) -> (f32, u8) {
    let max = ((1u32 << bits) - 1) as f32;
    // Ranges that cut off the largest weights, which normally distributed ones gain by. With 8 bits they do not.
    let shares: &[f32] = if bits == 4 { &[1.0, 0.95, 0.9, 0.85, 0.8] } else { &[1.0] };
    let mut best = (f64::INFINITY, 1.0, 0.0);
    let mut attempt = |scale: f32, zero: f32| {
        let scale = if scale.abs() >= f32::MIN_POSITIVE { scale } else { 1.0 };
        let lost = |&v: &f32| {
            let q = (v / scale).round_ties_even().clamp(-zero, max - zero);
            f64::from(v - q * scale).powi(2)
        };
        let loss = x.iter().map(lost).sum();
        if loss < best.0 {
            best = (loss, scale, zero);
        }
    };
    if symmetric {
        let zero = (1u32 << (bits - 1)) as f32;
        let largest = x.iter().fold(0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
        shares.iter().for_each(|share| attempt(-largest / zero * share, zero));
        // The other end, with a step less.
        attempt(largest.abs() / (zero - 1.0), zero);
    } else {
        let (lo, hi) = x.iter().fold((0f32, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
        for from in shares.iter().map(|s| lo * s) {
            for to in shares.iter().map(|s| hi * s) {
                let scale = usable(to / max - from / max);
                attempt(scale, (-from / scale).round_ties_even().clamp(0.0, max));
            }
        }
    }
    let (_, scale, zero) = best;
    q.iter_mut().zip(x).for_each(|(q, v)| *q = ((v / scale).round_ties_even() + zero).clamp(0.0, max) as u8);
    (scale, zero as u8)
}

impl Rewrite for WeightOnly {
    fn node(&mut self, e: &mut Editor, old: Node) -> Result<()> {
        let Some((old, p)) = product(e, &mut self.weights, self.options.embeddings, old)? else { return Ok(()) };
        let operands = match self.weights.get(&p.key) {
            Some(names) => names.clone(),
            None => {
                let packed = self.pack(&p)?;
                let kind = format!("Q{}", self.bits);
                let mut names = vec![e.fresh(format!("{}_{kind}", p.name)), e.fresh(format!("{}_scales", p.name))];
                e.add(constant(&names[0], &[p.n, packed.blocks, packed.blob], &packed.values)?);
                e.add(constant(&names[1], &[packed.scales.len()], &packed.scales)?);
                if !self.options.symmetric {
                    names.push(e.fresh(format!("{}_zero_points", p.name)));
                    e.add(constant(&names[2], &[packed.zeros.len()], &packed.zeros)?);
                }
                let how = format!("int{} in blocks of {}", self.bits, self.options.block_size);
                let after = packed.values.len() + 4 * packed.scales.len() + packed.zeros.len();
                let before = 4 * p.weights.len();
                e.note(NodeReport::new(&old, &p.name, &[p.k, p.n], &how, &packed.noise, before, after));
                self.weights.insert(p.key, names.clone());
                names
            }
        };
        e.release(&p.name);
        let mut inputs = vec![old.inputs[0].as_str()];
        inputs.extend(operands.iter().map(String::as_str));
        let mut new = node("MatMulNBits", format!("{}_Q{}", label(&old), self.bits), &inputs, &[""]);
        new.domain = MICROSOFT.to_owned();
        for (name, value) in [
            ("K", p.k as i64),
            ("N", p.n as i64),
            ("bits", self.bits as i64),
            ("block_size", self.options.block_size as i64),
            ("accuracy_level", self.options.accuracy_level),
        ] {
            new = with_int(new, name, value);
        }
        with_bias(e, &old, new, p.bias);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_by_hand() {
        // The largest, -0.8, becomes -8 with a scale of 0.1, and nothing is lost.
        let mut q = [0u8; 4];
        let (scale, zero) = quantise_block(&[-0.8, 0.7, 0.1, 0.0], &mut q, 4, true);
        assert!((scale - 0.1).abs() < 1e-7);
        assert_eq!((q, zero), ([0, 15, 9, 8], 8));
        // From -0.5 to 1.0 in 15 steps: scale 0.1, zero point 5.
        let (scale, zero) = quantise_block(&[-0.5, 1.0, 0.3, 0.0], &mut q, 4, false);
        assert!((scale - 0.1).abs() < 1e-7);
        assert_eq!((q, zero), ([0, 15, 8, 5], 5));
        assert_eq!(quantise_block(&[0.0; 4], &mut q, 8, true), (1.0, 128));
        assert_eq!(q, [128; 4]);
    }

    #[test]
    fn layout_by_hand() {
        let options = QuantizeOptions { mode: Mode::Int4, block_size: 16, symmetric: false, ..Default::default() };
        let method = WeightOnly::new(&options);
        // Two columns of 17: the second block has one weight, the rest of it is the zero point.
        let mut weights = vec![0f32; 34];
        weights[0] = 15.0;
        weights[2] = 1.0;
        weights[32] = -15.0;
        weights[33] = 15.0;
        let p = Product { name: "w".into(), k: 17, n: 2, weights, bias: None, key: String::new() };
        let packed = method.pack(&p).unwrap();
        assert_eq!((packed.blocks, packed.blob, packed.values.len()), (2, 8, 32));
        assert_eq!(packed.scales, [1.0, 1.0, 1.0, 1.0]);
        assert_eq!(packed.values[..2], [0x1f, 0]);
        // Second block of column 0: -15 is 0, the zero point 15 and its filling are 15.
        assert_eq!(packed.values[8..10], [0xf0, 0xff]);
        assert_eq!(packed.values[24..26], [0x0f, 0]);
        assert_eq!(packed.zeros, [0xf0, 0x00]);
        assert_eq!(packed.noise.sqnr_db(), None);
    }
}
