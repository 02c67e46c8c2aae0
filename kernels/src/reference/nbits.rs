//! Weights of few bits.

use crate::nbits::{BlockZeros, Format};
use ndarray::Array2;

/// The matrix `[k, n]` that weights `[n, blocks, block * bits / 8]` with scales `[n, blocks]` stand for, as the operator
/// `MatMulNBits` defines it.
///
/// # Panics
/// If a slice is shorter than the format says.
pub fn dequantize(format: &Format, data: &[u8], scales: &[f32], zeros: BlockZeros<'_>) -> Array2<f32> {
    let Format { bits, block, k, n } = *format;
    let blocks = k.div_ceil(block);
    let unpack = |bytes: &[u8], i: usize| f32::from(bytes[i * bits / 8] >> (i * bits % 8) & ((1u16 << bits) - 1) as u8);
    Array2::from_shape_fn((k, n), |(p, j)| {
        let b = p / block;
        let zero = match zeros {
            BlockZeros::Middle => (1 << (bits - 1)) as f32,
            BlockZeros::Packed(z) => unpack(&z[j * (blocks * bits).div_ceil(8)..], b),
            BlockZeros::Real(z) => z[j * blocks + b],
        };
        (unpack(&data[j * blocks * block * bits / 8..], p) - zero) * scales[j * blocks + b]
    })
}
