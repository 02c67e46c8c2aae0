//! Weights of 2, 4 or 8 bits in blocks with scales of their own (the operator `MatMulNBits`), multiplied as they are.
//!
//! ```text
//! B[p, j] = (q[p, j] - zero[p / block, j]) * scale[p / block, j]                       k x n
//!
//! a strip is LANES columns; word (p / PER, j) holds q[p.., j] of PER = 32 / bits neighbours along k
//!
//! one row of A:  x[p] = a[p] / 2^(bits * (p % PER)),  sum[b] = sum of a over block b   once
//!     for strips, four side by side
//!         for each block b
//!             part = 0
//!             for each word w of the block, t in 0..PER
//!                 part += f32(w & (mask << bits * t)) * x[p]                            t * bits places cancel
//!             y += (part - zero * sum[b]) * scale
//!
//! more rows:     the GEMM's loops; a task unpacks its panels as it would pack those of a plain B
//! ```
//!
//! A field is masked where it stands instead of being shifted down: the power of two that it is too large by is taken from
//! `x`, which is exact, so that a weight costs three operations. The field at the top of a word is the exception, since
//! it would be negative. The zero point leaves the inner loop as a product with the sum of the block.

use crate::error::{Error, Result};
use crate::gemm::{Aligned, table};
use crate::par::Cx;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use core::ops::Range;

/// Strips that are multiplied side by side.
pub(crate) const STRIPS: usize = 4;

/// Zero points of [`NBits`].
#[derive(Clone, Copy, Debug)]
pub enum BlockZeros<'a> {
    /// The middle of the range, `2^(bits - 1)`, for all blocks.
    Middle,
    /// As many bits as a weight, packed from the low bits up; each column starts at a byte.
    Packed(&'a [u8]),
    /// One for each block of each column, `[n, blocks]`.
    Real(&'a [f32]),
}

/// What weights of few bits look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Bits of a weight: 2, 4 or 8.
    pub bits: usize,
    /// Neighbours along k that share scale and zero point: a power of two, at least 16.
    pub block: usize,
    /// Rows of the matrix: the length of the dot products.
    pub k: usize,
    /// Columns of the matrix.
    pub n: usize,
}

impl Format {
    /// Blocks of a column.
    pub fn blocks(&self) -> usize {
        self.k.div_ceil(self.block.max(1))
    }

    /// Bytes of all weights, `[n, blocks, block * bits / 8]`; `None` when that overflows.
    pub fn bytes(&self) -> Option<usize> {
        self.n.checked_mul(self.blocks())?.checked_mul(self.block.checked_mul(self.bits)? / 8)
    }

    /// Bytes of packed zero points, `[n, ceil(blocks * bits / 8)]`; `None` when that overflows.
    pub fn zero_bytes(&self) -> Option<usize> {
        self.n.checked_mul(self.blocks().checked_mul(self.bits)?.div_ceil(8))
    }

    /// Refuses bits and blocks that there are no loops for.
    ///
    /// # Errors
    /// See the fields.
    pub fn check(&self) -> Result<()> {
        if !matches!(self.bits, 2 | 4 | 8) {
            return Err(Error::new(format!("weights of {} bits; 2, 4 or 8 were wanted", self.bits)));
        }
        if self.block < 16 || !self.block.is_power_of_two() {
            return Err(Error::new(format!(
                "blocks of {} weights; a power of two of at least 16 was wanted",
                self.block
            )));
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Zeros {
    Same(f32),
    /// Whole numbers, by strip, block and lane.
    Whole(Vec<u16>),
    Real(Aligned),
}

/// A matrix of few bits, packed once for one instruction set; made for weights.
#[derive(Clone, Debug)]
pub struct NBits {
    isa: Isa,
    format: Format,
    /// By strip, block, word of the block and lane.
    words: Aligned,
    /// By strip, block and lane.
    scales: Aligned,
    zeros: Zeros,
}

impl NBits {
    /// Packs weights `[n, blocks, block * bits / 8]`, low bits first, with scales `[n, blocks]`.
    ///
    /// # Errors
    /// If the format is refused, a slice has another length than it says, or memory is short.
    pub fn new(isa: Isa, format: Format, data: &[u8], scales: &[f32], zeros: BlockZeros<'_>) -> Result<Self> {
        format.check()?;
        let Format { bits, block, n, .. } = format;
        let blocks = format.blocks();
        let too_large = || Error::new(format!("weights {} x {n} do not fit the address space", format.k));
        let want = |name: &str, have: usize, want: Option<usize>| match want {
            Some(want) if want == have => Ok(()),
            Some(want) => Err(Error::new(format!("{name} has {have} elements, expected {want}"))),
            None => Err(too_large()),
        };
        want("B", data.len(), format.bytes())?;
        want("the scale", scales.len(), n.checked_mul(blocks))?;
        match zeros {
            BlockZeros::Middle => {}
            BlockZeros::Packed(z) => want("the zero point", z.len(), format.zero_bytes())?,
            BlockZeros::Real(z) => want("the zero point", z.len(), n.checked_mul(blocks))?,
        }
        let lanes = isa.lanes();
        let words_per_block = block * bits / 32;
        let strips = n.div_ceil(lanes);
        let per_block = strips.checked_mul(lanes).and_then(|n| n.checked_mul(blocks)).ok_or_else(too_large)?;
        let mut words = Aligned::zeros(per_block.checked_mul(words_per_block).ok_or_else(too_large)?)?;
        let mut packed_scales = Aligned::zeros(per_block)?;
        let at = |j: usize, b: usize| ((j / lanes) * blocks + b) * lanes + j % lanes;
        {
            let words: &mut [u32] = bytemuck::cast_slice_mut(words.as_mut_slice());
            for (i, word) in data.chunks_exact(4).enumerate() {
                let (j, b, w) = (i / (blocks * words_per_block), i / words_per_block % blocks, i % words_per_block);
                words[(((j / lanes) * blocks + b) * words_per_block + w) * lanes + j % lanes] =
                    u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            }
        }
        let grid = || (0..n).flat_map(|j| (0..blocks).map(move |b| (j, b)));
        for (j, b) in grid() {
            packed_scales.as_mut_slice()[at(j, b)] = scales[j * blocks + b];
        }
        let zeros = match zeros {
            BlockZeros::Middle => Zeros::Same((1u32 << (bits - 1)) as f32),
            BlockZeros::Packed(z) => {
                let per_column = (blocks * bits).div_ceil(8);
                let mut whole = Vec::new();
                whole.try_reserve_exact(per_block).map_err(|_| Error::new("no memory for zero points"))?;
                whole.resize(per_block, 0u16);
                for (j, b) in grid() {
                    let byte = z[j * per_column + b * bits / 8];
                    whole[at(j, b)] = u16::from(byte) >> (b * bits % 8) & ((1 << bits) - 1);
                }
                Zeros::Whole(whole)
            }
            BlockZeros::Real(z) => {
                let mut real = Aligned::zeros(per_block)?;
                for (j, b) in grid() {
                    real.as_mut_slice()[at(j, b)] = z[j * blocks + b];
                }
                Zeros::Real(real)
            }
        };
        Ok(Self { isa, format, words, scales: packed_scales, zeros })
    }

    /// Rows of the matrix: the length of the dot products.
    pub fn k(&self) -> usize {
        self.format.k
    }

    /// Columns of the matrix.
    pub fn n(&self) -> usize {
        self.format.n
    }

    /// The instruction set it was packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// What was packed.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Memory it holds.
    pub fn bytes(&self) -> usize {
        let zeros = match &self.zeros {
            Zeros::Same(_) => 0,
            Zeros::Whole(z) => 2 * z.len(),
            Zeros::Real(z) => 4 * z.as_slice().len(),
        };
        4 * (self.words.as_slice().len() + self.scales.as_slice().len()) + zeros
    }

    /// Elements of a row that is ready for [`multiply`](Self::multiply).
    fn ready_len(&self) -> usize {
        self.format.blocks() * (self.format.block + 1)
    }

    /// Calls `f` with a row of A that is ready for [`multiply`](Self::multiply): the scaled elements, filled up with
    /// zeros to whole blocks, then the sum of each block.
    pub(crate) fn with_ready<R>(&self, cx: &Cx<'_>, a: &[f32], f: impl FnOnce(&[f32]) -> R) -> R {
        let Format { bits, block, .. } = self.format;
        let per = 32 / bits;
        cx.with_workspace(self.ready_len(), |ready| {
            let (x, sums) = ready.split_at_mut(self.format.blocks() * block);
            for (b, sum) in sums.iter_mut().enumerate() {
                let a = &a[b * block..a.len().min((b + 1) * block)];
                let x = &mut x[b * block..][..block];
                x[a.len()..].fill(0.0);
                *sum = 0.0;
                for (p, (&a, x)) in a.iter().zip(x).enumerate() {
                    *sum += a;
                    let t = p % per;
                    // 2^-(bits t); the top field of a word is shifted down instead.
                    *x = if t + 1 == per { a } else { a * f32::from_bits(((127 - bits * t) as u32) << 23) };
                }
            }
            f(ready)
        })
    }

    /// Columns, from a whole number of strips on, of one row that [`with_ready`](Self::with_ready) made.
    #[inline(always)]
    pub(crate) fn multiply<S: Simd>(&self, s: S, ready: &[f32], columns: Range<usize>, out: &mut [f32]) {
        match self.format.bits {
            2 => row::<S, 2>(s, self, ready, columns, out),
            4 => row::<S, 4>(s, self, ready, columns, out),
            _ => row::<S, 8>(s, self, ready, columns, out),
        }
    }

    /// Unpacks some panels, the first of them at the start of `dst`, as `pack_panels` would have packed them.
    pub(crate) fn unpack_panels(&self, panels: Range<usize>, dst: &mut [f32]) {
        let (lanes, nr) = (self.isa.lanes(), table::panel_width(self.isa));
        let mut rest = dst;
        for panel in panels {
            let first = panel * nr;
            let width = nr.min(self.n() - first).next_multiple_of(lanes);
            let (dst, tail) = rest.split_at_mut(self.k() * width);
            rest = tail;
            dispatch(self.isa, Unpack { b: self, strips: first / lanes..(first + width) / lanes, dst });
        }
    }

    /// Zero points of a strip's block.
    #[inline(always)]
    fn zero<S: Simd>(&self, s: S, at: usize) -> S::F32 {
        match &self.zeros {
            Zeros::Same(z) => s.splat(*z),
            Zeros::Whole(z) => s.to_f32(s.load_u16(&z[at..])),
            Zeros::Real(z) => s.load(&z.as_slice()[at..]),
        }
    }
}

/// Field `t` of each word as a number that is `2^(BITS t)` times too large, except for the topmost.
#[inline(always)]
fn field<S: Simd, const BITS: u32>(s: S, words: S::I32, t: u32) -> S::F32 {
    let mask = (1i32 << BITS) - 1;
    let top = match BITS {
        2 => s.shr_i32::<30>(words),
        4 => s.shr_i32::<28>(words),
        _ => s.shr_i32::<24>(words),
    };
    let field = if t + 1 == 32 / BITS {
        s.and_i32(top, s.splat_i32(mask))
    } else {
        s.and_i32(words, s.splat_i32(mask << (BITS * t)))
    };
    s.to_f32(field)
}

#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
fn row<S: Simd, const BITS: u32>(s: S, b: &NBits, ready: &[f32], columns: Range<usize>, out: &mut [f32]) {
    let mut strip = columns.start / S::LANES;
    for out in out.chunks_mut(STRIPS * S::LANES) {
        if out.len() == STRIPS * S::LANES {
            let sums = strips::<S, BITS, STRIPS>(s, b, ready, strip);
            for (out, sum) in out.chunks_exact_mut(S::LANES).zip(sums) {
                s.store(out, sum);
            }
            strip += STRIPS;
        } else {
            for out in out.chunks_mut(S::LANES) {
                let [sum] = strips::<S, BITS, 1>(s, b, ready, strip);
                s.store_partial(out, sum);
                strip += 1;
            }
        }
    }
}

/// Sums of `N` strips from `first` on.
#[inline(always)]
fn strips<S: Simd, const BITS: u32, const N: usize>(s: S, b: &NBits, ready: &[f32], first: usize) -> [S::F32; N] {
    let per = (32 / BITS) as usize;
    let Format { block, .. } = b.format;
    let (blocks, words_per_block) = (b.format.blocks(), block / per);
    let (x, sums) = ready.split_at(blocks * block);
    let strip_words = blocks * words_per_block * S::LANES;
    let words: [&[f32]; N] = core::array::from_fn(|v| &b.words.as_slice()[(first + v) * strip_words..][..strip_words]);
    let mut acc = [s.splat(0.0); N];
    for (block, (&sum, x)) in sums.iter().zip(x.chunks_exact(block)).enumerate() {
        let mut part = [s.splat(0.0); N];
        for (w, x) in x.chunks_exact(per).enumerate() {
            let at = (block * words_per_block + w) * S::LANES;
            let word: [S::I32; N] = core::array::from_fn(|v| s.bits(s.load(&words[v][at..])));
            for (t, &x) in x.iter().enumerate() {
                let x = s.splat(x);
                for (part, &word) in part.iter_mut().zip(&word) {
                    *part = s.mul_add(field::<S, BITS>(s, word, t as u32), x, *part);
                }
            }
        }
        let sum = s.splat(sum);
        for (v, (acc, part)) in acc.iter_mut().zip(part).enumerate() {
            let at = ((first + v) * blocks + block) * S::LANES;
            let centred = s.sub(part, s.mul(b.zero(s, at), sum));
            *acc = s.mul_add(centred, s.load(&b.scales.as_slice()[at..]), *acc);
        }
    }
    acc
}

/// Strips as rows of `strips.len()` vectors, one for each of k.
struct Unpack<'a> {
    b: &'a NBits,
    strips: Range<usize>,
    dst: &'a mut [f32],
}

impl Kernel for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.b.format.bits {
            2 => unpack::<S, 2>(s, self),
            4 => unpack::<S, 4>(s, self),
            _ => unpack::<S, 8>(s, self),
        }
    }
}

#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
fn unpack<S: Simd, const BITS: u32>(s: S, Unpack { b, strips, dst }: Unpack<'_>) {
    let per = (32 / BITS) as usize;
    let words_per_block = b.format.block / per;
    let blocks = b.format.blocks();
    let width = strips.len() * S::LANES;
    let mask = s.splat_i32((1 << BITS) - 1);
    for (v, strip) in strips.enumerate() {
        for block in 0..blocks {
            let at = (strip * blocks + block) * S::LANES;
            let (zero, scale) = (b.zero(s, at), s.load(&b.scales.as_slice()[at..]));
            for w in 0..words_per_block {
                let p = (block * words_per_block + w) * per;
                let mut word = s.bits(s.load(&b.words.as_slice()[(at * words_per_block) + w * S::LANES..]));
                // The last block may reach beyond k.
                for row in dst.chunks_exact_mut(width).skip(p).take(per) {
                    let q = s.to_f32(s.and_i32(word, mask));
                    s.store(&mut row[v * S::LANES..], s.mul(s.sub(q, zero), scale));
                    word = match BITS {
                        2 => s.shr_i32::<2>(word),
                        4 => s.shr_i32::<4>(word),
                        _ => s.shr_i32::<8>(word),
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epilogue::{Activation, Epilogue};
    use crate::gemm::{Matrix, Rhs, gemm};
    use crate::reference::{gemm as reference, nbits};
    use crate::testing::each_context;

    /// Seeded bytes.
    fn bytes(len: usize, seed: u32) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    fn reals(len: usize, seed: u32) -> Vec<f32> {
        bytes(len, seed).iter().map(|&b| (f32::from(b) - 127.0) / 97.0).collect()
    }

    #[test]
    fn every_format_agrees_with_the_reference() {
        each_context(|cx| {
            for bits in [2, 4, 8] {
                for (block, k, n) in
                    [(16, 16, 1), (16, 40, 17), (32, 96, 35), (64, 100, 130), (128, 256, 33), (256, 300, 8)]
                {
                    let format = Format { bits, block, k, n };
                    let blocks = format.blocks();
                    let data = bytes(format.bytes().unwrap(), 1);
                    let scales: Vec<f32> = reals(n * blocks, 2).iter().map(|s| s * 0.1).collect();
                    let packed_zeros = bytes(format.zero_bytes().unwrap(), 3);
                    let real_zeros: Vec<f32> = reals(n * blocks, 4).iter().map(|z| z * 3.0 + 1.5).collect();
                    let bias = reals(n, 5);
                    for zeros in [BlockZeros::Middle, BlockZeros::Packed(&packed_zeros), BlockZeros::Real(&real_zeros)]
                    {
                        let w = nbits::dequantize(&format, &data, &scales, zeros);
                        let packed = NBits::new(cx.isa(), format, &data, &scales, zeros).unwrap();
                        for m in [1, 2, 3, 4, 7, 33] {
                            let a = reals(m * k, 6);
                            let want = reference::gemm(ndarray::ArrayView2::from_shape((m, k), &a).unwrap(), w.view());
                            let residual = reals(m * n, 7);
                            let epilogue = Epilogue {
                                bias: Some(&bias),
                                residual: Some(&residual),
                                activation: Activation::LeakyRelu { alpha: 0.5 },
                            };
                            let mut y = vec![9.0; m * n];
                            gemm(cx, Matrix::new(&a, m, k), Rhs::Bits(&packed), &epilogue, &mut y, n).unwrap();
                            // Sums of k products of up to 1.3 with weights of up to 2^bits * 0.13.
                            let tolerance = 1e-6 * (k as f64).sqrt() * f64::from(1u32 << bits);
                            for (i, (&y, want)) in y.iter().zip(want.iter()).enumerate() {
                                let want = want + f64::from(bias[i % n]) + f64::from(residual[i]);
                                let want = if want < 0.0 { 0.5 * want } else { want };
                                assert!(
                                    (f64::from(y) - want).abs() <= tolerance,
                                    "{} {format:?} {zeros:?} m {m} element {i}: {y} for {want}",
                                    cx.isa()
                                );
                            }
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn packed_weights_stay_small() {
        let format = Format { bits: 4, block: 32, k: 256, n: 64 };
        let data = bytes(format.bytes().unwrap(), 1);
        let packed = NBits::new(Isa::best(), format, &data, &[1.0; 512], BlockZeros::Middle).unwrap();
        assert_eq!(packed.bytes(), 64 * 256 / 2 + 4 * 512);
    }

    #[test]
    fn formats_and_lengths_are_checked() {
        let new = |bits, block, bytes: usize, scales: usize, zeros: BlockZeros<'_>| {
            let format = Format { bits, block, k: 32, n: 2 };
            NBits::new(Isa::best(), format, &vec![0; bytes], &vec![1.0; scales], zeros)
        };
        assert!(new(4, 16, 32, 4, BlockZeros::Middle).is_ok());
        assert!(new(3, 16, 32, 4, BlockZeros::Middle).unwrap_err().to_string().contains("2, 4 or 8"));
        for block in [0, 8, 24] {
            assert!(new(4, block, 32, 4, BlockZeros::Middle).unwrap_err().to_string().contains("power of two"));
        }
        assert!(new(4, 16, 31, 4, BlockZeros::Middle).is_err());
        assert!(new(4, 16, 32, 3, BlockZeros::Middle).is_err());
        assert!(new(4, 16, 32, 4, BlockZeros::Packed(&[0; 3])).is_err());
        assert!(new(4, 16, 32, 4, BlockZeros::Real(&[0.0; 2])).is_err());
        let huge = Format { bits: 4, block: 16, k: usize::MAX, n: usize::MAX };
        assert!(NBits::new(Isa::best(), huge, &[], &[], BlockZeros::Middle).is_err());
    }
}
