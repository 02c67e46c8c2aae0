//! One number for what the integer kernels compute: the same seeded cases on every machine, in every form.
//!
//! Tests compare it on native instruction sets and in browsers. The kernels promise the same bits everywhere, and each
//! engine compiles WebAssembly in its own way.

use super::{Addend, Bytes, BytesMut, Form, Output, PackedQ, QConv, QMatrix, Requantize, qgemm, softmax};
use crate::conv::{Algorithm, ConvInput, ConvParams};
use crate::epilogue::Activation;
use crate::error::Result;
use crate::par::Cx;
use crate::winograd::TileSize;

/// The number that [`digest`] gives.
pub const DIGEST: u64 = 4_238_780_685_819_252_297;

/// Rows, columns and length of products: at the edges of tiles, passes and vectors; the last two wide enough to interleave
/// rows where tiles read those, and with small weights, of which there are pairs in [`Form::Split`].
const PRODUCTS: [[usize; 3]; 10] = [
    [1, 1, 1],
    [4, 16, 2],
    [5, 17, 3],
    [13, 25, 31],
    [7, 9, 257],
    [3, 33, 1031],
    [1, 70, 64],
    [65, 40, 2051],
    [14, 131, 70],
    [10, 130, 2051],
];

/// Channels in and out, groups, kernel, stride, size; the last two wide enough to interleave taps where they lie.
const CONVOLUTIONS: [[usize; 6]; 10] = [
    [3, 8, 1, 3, 2, 9],
    [16, 5, 1, 1, 1, 6],
    [8, 12, 2, 3, 1, 7],
    [33, 33, 33, 3, 1, 8],
    [40, 40, 40, 5, 2, 9],
    [4, 8, 4, 3, 1, 5],
    [34, 40, 1, 3, 1, 9],
    [40, 33, 1, 3, 1, 10],
    [16, 130, 1, 3, 1, 7],
    [32, 260, 2, 3, 2, 9],
];

const SIZES: [TileSize; 2] = [TileSize::Four, TileSize::Two];

/// Sizes around an axis, whether bytes are signed, and scale.
const SOFTMAXES: [([usize; 3], bool, f32); 3] =
    [([3, 41, 1], false, 0.05), ([2, 9, 5], true, 0.011), ([1, 1, 3], false, 2.0)];

/// Pseudo-random numbers (a linear congruential generator) and a hash of results (FNV-1a).
struct State {
    random: u32,
    hash: u64,
}

impl State {
    fn next(&mut self) -> u32 {
        self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.random >> 8
    }

    /// Half of them extremes.
    #[inline(never)]
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let byte = |x: u32| if x & 256 == 0 { [0, 255, 127, 128][x as usize & 3] } else { x as u8 };
        (0..len).map(|_| byte(self.next())).collect()
    }

    fn zero(&mut self, signed: bool) -> i32 {
        let zero = [0, 255, 128, 127, 7][self.next() as usize % 5];
        if signed { i32::from(zero as u8 as i8) } else { zero }
    }

    #[inline(never)]
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    /// All outputs of one product with `n` columns.
    #[inline(never)]
    fn outputs(&mut self, len: usize, n: usize, run: &dyn Fn(Output<'_>) -> Result<()>) -> Result<()> {
        let mut sums = vec![0i32; len];
        run(Output::Sums(&mut sums))?;
        sums.iter().for_each(|x| self.add(&x.to_le_bytes()));
        let largest = sums.iter().map(|x| x.unsigned_abs()).max().unwrap_or(0).max(1) as f32;
        let scale: Vec<f32> = (0..n).map(|_| (self.next() as f32 / 8_388_608.0 - 0.9) * 200.0 / largest).collect();
        let bias: Vec<f32> = (0..n).map(|_| self.next() as f32 / 1e6).collect();
        let mut y = vec![0.0f32; len];
        let activation = Activation::Clip { lo: -5.0, hi: 60.0 };
        run(Output::Real { scale: &scale, bias: Some(&bias), residual: None, activation, y: &mut y })?;
        y.iter().for_each(|x| self.add(&x.to_le_bytes()));
        let requantize = Requantize { multiplier: &scale, zero: 3, lo: -128, hi: 127, add: None };
        let mut q = vec![0i8; len];
        run(Output::Quantized { requantize, y: BytesMut::I8(&mut q) })?;
        self.add(bytemuck::cast_slice(&q));
        let other = self.bytes(len);
        let other = Bytes::U8(&other);
        let add =
            Some(Addend { other, other_zero: 100, first: 0.75, second: 0.5, offset: 0.0, zero: 120, lo: 0, hi: 250 });
        let requantize = Requantize { multiplier: &scale[..1], zero: -9, lo: -128, hi: 127, add };
        let mut q = vec![0u8; len];
        run(Output::Quantized { requantize, y: BytesMut::U8(&mut q) })?;
        self.add(&q);
        Ok(())
    }
}

fn kind(bytes: &[u8], signed: bool) -> Bytes<'_> {
    if signed { Bytes::I8(bytemuck::cast_slice(bytes)) } else { Bytes::U8(bytes) }
}

/// Computes the cases with a form; the result is [`DIGEST`], or the kernels are wrong.
///
/// # Errors
/// If the form is not available.
pub fn digest(cx: &Cx<'_>, form: Form) -> Result<u64> {
    form.check(cx.isa())?;
    cases(cx, form)
}

/// [`digest`] for any form.
pub(super) fn cases(cx: &Cx<'_>, form: Form) -> Result<u64> {
    let mut s = State { random: 1, hash: 0xcbf2_9ce4_8422_2325 };
    for (case, [m, n, k]) in PRODUCTS.into_iter().enumerate() {
        let (a_signed, b_signed) = (case % 2 == 1, case % 4 < 2);
        let (a, mut b) = (s.bytes(m * k), s.bytes(k * n));
        if case + 2 >= PRODUCTS.len() {
            b.iter_mut().for_each(|b| *b = (*b as i8 / 4) as u8);
        }
        let (a_zero, bias) = (s.zero(a_signed), (0..n).map(|_| s.next() as i32 - 8_000_000).collect::<Vec<_>>());
        let b_zero: Vec<i32> = (0..n).map(|_| if case < 3 { 0 } else { s.zero(b_signed) }).collect();
        let packed = PackedQ::pack(cx.isa(), form, QMatrix::new(kind(&b, b_signed), k, n), &b_zero)?;
        let a = QMatrix::new(kind(&a, a_signed), m, k);
        s.outputs(m * n, n, &|output| qgemm(cx, a, a_zero, &packed, Some(&bias), output))?;
    }
    for (case, [ic, oc, groups, kernel, stride, size]) in CONVOLUTIONS.into_iter().enumerate() {
        let (x_signed, w_signed) = (case % 2 == 0, case % 3 < 2);
        let params = ConvParams {
            in_channels: ic,
            out_channels: oc,
            groups,
            kernel: [1, kernel, kernel],
            strides: [1, stride, stride],
            dilations: [1; 3],
        };
        let pad = [0, kernel / 2, kernel / 2];
        let input = ConvInput { batch: 1, spatial: [1, size, size], pads_begin: pad, pads_end: pad };
        let (x, w) = (s.bytes(size * size * ic), s.bytes(oc * (ic / groups) * kernel * kernel));
        let (x_zero, w_zero) = (s.zero(x_signed), [if w_signed { 0 } else { 128 }]);
        let out = params.output_spatial(&input)?;
        // Two by Winograd's, with those vectors and forms that it is for.
        let algorithm = match case {
            6 | 7 if QConv::depends_on_input(cx.isa(), form, &params) => Algorithm::Winograd(SIZES[case % 2]),
            _ => Algorithm::Direct,
        };
        let conv = QConv::pack(cx.isa(), form, params, algorithm, kind(&w, w_signed), &w_zero, PackedQ::pack)?;
        s.outputs(out[1] * out[2] * oc, oc, &|output| conv.run(cx, &input, kind(&x, x_signed), x_zero, None, output))?;
    }
    for ([outer, n, inner], signed, scale) in SOFTMAXES {
        let x = s.bytes(outer * n * inner);
        let mut y = vec![0u8; x.len()];
        let to = if signed { BytesMut::I8(bytemuck::cast_slice_mut(&mut y)) } else { BytesMut::U8(&mut y) };
        softmax(cx, kind(&x, signed), scale, [outer, n, inner], 255.0, if signed { -128 } else { 0 }, to)?;
        s.add(&y);
    }
    Ok(s.hash)
}
