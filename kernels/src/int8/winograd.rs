//! [Winograd's minimal filtering](crate::winograd) in whole numbers: the same sums as by the definition, bit for bit.
//!
//! ```text
//! U[p] = (G' w G'^T)[p]                        at packing, i16
//! for blocks of tiles of M x M outputs
//!     V[p][tile] = (B^T x B)[p]                i16, per channel
//!     R[p] = V[p] U[p]                         matrix products, i32, wrapping
//!     sums[tile] = (A'^T R[.][tile] A') / D + bias
//!     output(sums)                             output.rs
//! ```
//!
//! The points are 0, +-1 (M = 2) and 0, +-1, +-2 (M = 4), and infinity: those of small whole numbers. What divides a row of
//! `G`, 2 or 24, is left out of `G'` and taken to its column of `A^T` instead, times a factor that makes it whole; a row `i`
//! of `A'^T` is then `d_i` times that of `A^T`, without the factors that all of it has in common:
//!
//! ```text
//! M = 2   A'^T =  2  1  1  0    d = 2        M = 4   A'^T =  6 -4 -4  1  1  0    d = 24
//!                 0  1 -1  2        2                        0 -2  2  1 -1  0        12
//!                                                            0 -1 -1  1  1  0         6
//!                                                            0 -1  1  2 -2  6         6
//! ```
//!
//! **Exact.** A row of `B^T` has absolute values that add up to 10 at most, one of `G'` to 7: `V` is at most
//! `10^2 * 255` and `U` at most `7^2 * 255`, so that both fit 16 bits. All that comes after is computed modulo `2^32`, up to
//! a result that is `D = d_i d_j` times the sum: an odd part, which is 9, is divided by with its inverse modulo `2^32`,
//! and a power of two, at most 64, by a shift. The shift wants that the product with it fits 32 bits, which the weights of
//! each output channel tell at packing ([`QWinograd::new`]).
//!
//! This is for [`Form::Wide`], whose operands have room for it: forms of bytes multiply twice as many at once. Microseconds
//! of `examples/winograd_bench.rs int8 fma128`, one thread, Zen 3:
//!
//! | image, channels | direct | M = 2 | M = 4 |
//! |---|---|---|---|
//! | 56 x 56, 64 > 64 | 4903 | 2749 | 1689 |
//! | 28 x 28, 128 > 128 | 4639 | 2046 | 1245 |
//! | 14 x 14, 256 > 256 | 5196 | 2534 | 1981 |
//! | 14 x 14, 32 > 32 | 90 | 58 | 46 |
//! | 7 x 7, 512 > 512 | 3689 | 3064 | 2131 |

use super::output::Sink;
use super::{Bytes, Form, nest, table};
use crate::conv::{ConvInput, ConvParams, volume};
use crate::error::{Error, Result};
use crate::gemm::Aligned;
use crate::par::Cx;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::winograd::{Geometry, Rows, Steps, TileSize, fits, run};
use core::mem::MaybeUninit;
use core::ops::Range;

/// The weights of a convolution, transformed.
#[derive(Clone, Debug)]
pub(super) struct QWinograd {
    size: TileSize,
    /// Pairs of input channels, output channels.
    groups: usize,
    n: usize,
    /// For each point of the tile the panels of a matrix of input x output channels, as [`PackedQ`](super::PackedQ) has
    /// them.
    weights: Aligned,
    /// What products begin with.
    zeros: Aligned,
}

/// Largest difference of a byte and a zero point.
const MOST: i64 = 255;

impl QWinograd {
    /// Whether a convolution can run here.
    pub(super) fn supports(isa: Isa, form: Form, params: &ConvParams) -> bool {
        matches!(form, Form::Wide | Form::Split) && fits(params, 2 * isa.lanes())
    }

    /// Transforms and packs `weights` laid out `[out, in, 3, 3]`, whose lengths were checked; `None` if the sums of a
    /// channel may become too large for tiles of this size.
    pub(super) fn new(
        isa: Isa,
        size: TileSize,
        params: &ConvParams,
        weights: Bytes<'_>,
        zero: &[i32],
    ) -> Result<Option<Self>> {
        let (k, n) = (params.in_channels, params.out_channels);
        let points = size.inputs() * size.inputs();
        let (nr, groups) = (table::panel_width(isa, Form::Wide), k.div_ceil(2));
        let columns = n.next_multiple_of(table::unit(isa, Form::Wide));
        let point = volume(&[columns, groups])?;
        let mut packed = Aligned::zeros(volume(&[point, points])?)?;
        let words: &mut [i32] = bytemuck::cast_slice_mut(packed.as_mut_slice());
        let largest_divisor = match size {
            TileSize::Two => 4,
            TileSize::Four => 64,
        };
        for j in 0..n {
            let zero = zero[if zero.len() == 1 { 0 } else { j }];
            let kernel = |c: usize| [0, 1, 2, 3, 4, 5, 6, 7, 8].map(|tap| weights.get((j * k + c) * 9 + tap) - zero);
            // Inputs less their zero point z lie in -z ..= 255 - z (of unsigned ones): a sum is at most (255 - z) times that
            // of the positive weights and z times that of the negative ones, which is no more than 255 times the larger.
            let (mut positive, mut negative) = (0i64, 0i64);
            // Where the column of panels is.
            let panel = j / nr * nr;
            let width = table::width(isa, Form::Wide, panel, n);
            let at = panel * groups + j - panel;
            for g in 0..groups {
                let mut pair = [[0; 36]; 2];
                for (half, transformed) in pair.iter_mut().enumerate() {
                    let c = 2 * g + half;
                    if c < k {
                        let w = kernel(c);
                        positive += w.iter().map(|&w| i64::from(w.max(0))).sum::<i64>();
                        negative -= w.iter().map(|&w| i64::from(w.min(0))).sum::<i64>();
                        *transformed = match size {
                            TileSize::Two => filter::<4>(&w),
                            TileSize::Four => filter::<6>(&w),
                        };
                    }
                }
                for p in 0..points {
                    words[p * point + at + g * width] = bytemuck::cast([pair[0][p], pair[1][p]]);
                }
            }
            if MOST * positive.max(negative) * largest_divisor > i64::from(i32::MAX) {
                return Ok(None);
            }
        }
        Ok(Some(Self { size, groups, n, weights: packed, zeros: Aligned::zeros(columns)? }))
    }

    pub(super) fn size(&self) -> TileSize {
        self.size
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.weights.as_slice()) + size_of_val(self.zeros.as_slice())
    }

    /// # Safety
    /// `x` and the sink have the sizes that `params` and `input` say; nobody else uses the sink's output.
    pub(super) unsafe fn run(
        &self,
        cx: &Cx<'_>,
        params: &ConvParams,
        input: &ConvInput,
        out_spatial: [usize; 3],
        x: Bytes<'_>,
        x_zero: i32,
        bias: Option<&[i32]>,
        sink: &Sink<'_>,
    ) -> Result<()> {
        let geometry = Geometry::new(self.size, params, input, out_spatial);
        let points = self.size.inputs() * self.size.inputs();
        let [k, n] = geometry.channels;
        let start = self.zeros.as_slice().len();
        let len =
            start.checked_add(k.div_ceil(4)).ok_or_else(|| Error::new("too many channels for the address space"))?;
        cx.with_workspace(len, |workspace| {
            let (start, padding) = workspace.split_at_mut(start);
            let start: &mut [i32] = bytemuck::cast_slice_mut(start);
            start.fill(0);
            if let Some(bias) = bias {
                start[..n].copy_from_slice(bias);
            }
            let padding: &mut [u8] = bytemuck::cast_slice_mut(padding);
            padding.fill(x_zero as u8);
            let image = Image { isa: cx.isa(), winograd: self, geometry: &geometry, x, x_zero, padding, start, sink };
            run(cx, &geometry, points, [self.groups, start.len()], self.bytes(), &image)
        })
    }
}

/// `G' w G'^T`, row by row.
fn filter<const N: usize>(w: &[i32; 9]) -> [i16; 36] {
    let line = |[a, b, c]: [i32; 3]| -> [i32; 6] {
        if N == 4 {
            [a, a + b + c, a - b + c, c, 0, 0]
        } else {
            [a, a + b + c, a - b + c, a + 2 * b + 4 * c, a - 2 * b + 4 * c, c]
        }
    };
    let columns = [0, 1, 2].map(|x| line([w[x], w[3 + x], w[6 + x]]));
    let mut u = [0; 36];
    for i in 0..N {
        let row = line([0, 1, 2].map(|x| columns[x][i]));
        for j in 0..N {
            // At most 7 * 7 * 255.
            u[i * N + j] = row[j] as i16;
        }
    }
    u
}

/// One convolution. Whoever makes one promises that the input and the output of the sink have the sizes that the geometry
/// says, and that nobody else uses the output.
struct Image<'a> {
    isa: Isa,
    winograd: &'a QWinograd,
    geometry: &'a Geometry,
    x: Bytes<'a>,
    x_zero: i32,
    /// A pixel of padding.
    padding: &'a [u8],
    /// What is added to the sums of each channel; whole vectors.
    start: &'a [i32],
    sink: &'a Sink<'a>,
}

impl Steps for Image<'_> {
    fn forward(&self, tiles: Range<usize>, rows: Rows) {
        let image = self;
        match (self.winograd.size, &self.x) {
            (TileSize::Two, Bytes::U8(_)) => dispatch(self.isa, Forward::<4, false> { image, tiles, rows }),
            (TileSize::Two, Bytes::I8(_)) => dispatch(self.isa, Forward::<4, true> { image, tiles, rows }),
            (TileSize::Four, Bytes::U8(_)) => dispatch(self.isa, Forward::<6, false> { image, tiles, rows }),
            (TileSize::Four, Bytes::I8(_)) => dispatch(self.isa, Forward::<6, true> { image, tiles, rows }),
        }
    }

    fn multiply(&self, point: usize, m: usize, v: Rows, r: Rows) {
        let QWinograd { groups, n, weights, zeros, .. } = self.winograd;
        let zeros = bytemuck::cast_slice(zeros.as_slice());
        let len = zeros.len() * groups;
        let b = &bytemuck::cast_slice(weights.as_slice())[point * len..][..len];
        let operands = [v.at(point).cast(), r.at(point).cast()];
        // SAFETY: both have `m` rows for each point, which nobody else uses.
        unsafe { nest::multiply(self.isa, m, operands, [v.ld, r.ld], b, [*groups, *n], zeros) };
    }

    fn backward(&self, tiles: Range<usize>, rows: Rows) {
        let image = self;
        match self.winograd.size {
            TileSize::Two => dispatch(self.isa, Backward::<4, 2> { image, tiles, rows }),
            TileSize::Four => dispatch(self.isa, Backward::<6, 4> { image, tiles, rows }),
        }
    }
}

/// `B^T d`, the inputs of a tile along one side.
#[inline(always)]
fn input_transform<S: Simd, const N: usize>(s: S, d: &[S::I32; N]) -> [S::I32; N] {
    let twice = |x| s.add_i16(x, x);
    let mut t = *d;
    if N == 4 {
        t[0] = s.sub_i16(d[0], d[2]);
        t[1] = s.add_i16(d[1], d[2]);
        t[2] = s.sub_i16(d[2], d[1]);
        t[3] = s.sub_i16(d[3], d[1]);
    } else {
        // 4 d0 - 5 d2 + d4 and 4 d1 - 5 d3 + d5.
        let even = s.sub_i16(d[4], d[2]);
        let odd = twice(s.sub_i16(d[3], d[1]));
        t[0] = s.add_i16(twice(twice(s.sub_i16(d[0], d[2]))), even);
        t[5] = s.sub_i16(s.sub_i16(d[5], d[3]), twice(odd));
        // -4 d2 + d4 -+ (4 d1 - d3), -d2 + d4 -+ 2 (d1 - d3).
        let (a, b) = (s.sub_i16(d[4], twice(twice(d[2]))), s.sub_i16(d[3], twice(twice(d[1]))));
        t[1] = s.add_i16(a, b);
        t[2] = s.sub_i16(a, b);
        t[3] = s.add_i16(even, odd);
        t[4] = s.sub_i16(even, odd);
    }
    t
}

/// `A'^T r`, the outputs of a tile along one side, times `d`.
#[inline(always)]
fn output_transform<S: Simd, const N: usize, const M: usize>(s: S, r: &[S::I32; N]) -> [S::I32; M] {
    let twice = |x| s.add_i32(x, x);
    let mut y = [r[0]; M];
    if N == 4 {
        y[0] = s.add_i32(twice(r[0]), s.add_i32(r[1], r[2]));
        y[1] = s.add_i32(twice(r[3]), s.sub_i32(r[1], r[2]));
    } else {
        let six = |x| twice(s.add_i32(x, twice(x)));
        let (sum, sum_two) = (s.add_i32(r[1], r[2]), s.add_i32(r[3], r[4]));
        y[0] = s.add_i32(s.sub_i32(six(r[0]), twice(twice(sum))), sum_two);
        y[2] = s.sub_i32(sum_two, sum);
        let (difference, difference_two) = (s.sub_i32(r[1], r[2]), s.sub_i32(r[3], r[4]));
        y[1] = s.sub_i32(difference_two, twice(difference));
        y[3] = s.add_i32(s.sub_i32(twice(difference_two), difference), six(r[5]));
    }
    y
}

/// What is divided by a power of two along one side: that of `d`.
const SHIFTS: [u32; 4] = [3, 2, 1, 1];
/// Times 9 it is 1 modulo `2^32`. In memory that the compiler cannot see through, see `winograd.rs`.
static NINTH: i32 = 0x38e3_8e39;

/// An output `(i, j)` of a tile, from what is `d_i d_j` times it.
#[inline(always)]
fn divide<S: Simd, const N: usize>(s: S, x: S::I32, i: usize, j: usize, ninth: S::I32) -> S::I32 {
    if N == 4 {
        return s.shr_i32::<2>(x);
    }
    let x = s.mul_i32(x, ninth);
    // Constants, once the loops are unrolled.
    match SHIFTS[i] + SHIFTS[j] {
        2 => s.shr_i32::<2>(x),
        3 => s.shr_i32::<3>(x),
        4 => s.shr_i32::<4>(x),
        5 => s.shr_i32::<5>(x),
        _ => s.shr_i32::<6>(x),
    }
}

/// Channels that the transform of inputs takes through both passes at a time: a cache line of `i16`.
const LINE: usize = 32;

/// What lies between both passes over inputs: a line of channels for each point of a tile.
#[repr(align(64))]
struct Between {
    _elements: [i16; 36 * LINE],
}

/// See [`Steps::forward`].
struct Forward<'a, const N: usize, const SIGNED: bool> {
    image: &'a Image<'a>,
    tiles: Range<usize>,
    rows: Rows,
}

impl<const N: usize, const SIGNED: bool> Kernel for Forward<'_, N, SIGNED> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { image, tiles, rows } = self;
        let channels = image.geometry.channels[0];
        let width = 2 * S::LANES;
        let vectors = channels.div_ceil(width);
        // The last vector may overlap the one before.
        let channel = |index: usize| (index * width).min(channels - width);
        let zero = s.splat_i16(image.x_zero as i16);
        let mut between = MaybeUninit::<Between>::uninit();
        let between = between.as_mut_ptr().cast::<i16>();
        for tile in tiles {
            let pixels = image.geometry.pixels::<u8, N>(tile, image.x.as_ptr(), image.padding.as_ptr());
            let to = rows.tile(tile);
            let mut v = 0;
            while v < vectors {
                let end = (v + LINE / width).min(vectors);
                // SAFETY: every pixel has `channels` elements, `between` has `LINE` for each of N*N points, and `rows` has
                // a row of `channels` for the tile.
                unsafe {
                    for j in 0..N {
                        for u in v..end {
                            let mut d = [s.splat_i32(0); N];
                            for (i, d) in d.iter_mut().enumerate() {
                                let x = s.widen_bytes::<SIGNED>(pixels[i * N + j].add(channel(u)));
                                *d = s.sub_i16(x, zero);
                            }
                            let t = input_transform::<S, N>(s, &d);
                            for (i, t) in t.iter().enumerate() {
                                s.store_i32_ptr(between.add((i * N + j) * LINE + (u - v) * width).cast(), *t);
                            }
                        }
                    }
                    for i in 0..N {
                        for u in v..end {
                            let mut d = [s.splat_i32(0); N];
                            for (j, d) in d.iter_mut().enumerate() {
                                *d = s.load_i32_ptr(between.add((i * N + j) * LINE + (u - v) * width).cast());
                            }
                            let t = input_transform::<S, N>(s, &d);
                            for (j, t) in t.iter().enumerate() {
                                let to = to.add((i * N + j) * rows.point).cast::<i16>();
                                s.store_i32_ptr(to.add(channel(u)).cast(), *t);
                            }
                        }
                    }
                }
                v = end;
            }
        }
    }
}

/// Columns whose sums of a tile are computed before they go to the output; 4 KiB.
const COLUMNS: usize = 64;

/// The columns of a row that is computed for a tile by the first pass, and the sums by the second. What the output reads
/// beyond the last row is there.
#[repr(align(64))]
struct Sums {
    _columns: [i32; 24 * COLUMNS],
    _sums: [i32; 16 * COLUMNS + 32],
}

/// See [`Steps::backward`].
struct Backward<'a, const N: usize, const M: usize> {
    image: &'a Image<'a>,
    tiles: Range<usize>,
    rows: Rows,
}

impl<const N: usize, const M: usize> Kernel for Backward<'_, N, M> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { image, tiles, rows } = self;
        let Geometry { channels: [_, n], height: [_, oh], width: [_, ow], .. } = *image.geometry;
        // SAFETY: a reference.
        let ninth = unsafe { s.splat_i32_ptr(core::hint::black_box(&NINTH)) };
        // The output reads whole vectors, also where the last columns do not fill two.
        let mut memory = MaybeUninit::<Sums>::zeroed();
        let between = memory.as_mut_ptr().cast::<i32>();
        let sums = between.wrapping_add(24 * COLUMNS);
        for tile in tiles {
            let [plane, top, left] = image.geometry.place(tile, M);
            let (height, width) = (M.min(oh - top), M.min(ow - left));
            let from = rows.tile(tile).cast::<i32>();
            for first in (0..n).step_by(COLUMNS) {
                let cols = first..(first + COLUMNS).min(n);
                let vectors = cols.len().div_ceil(S::LANES);
                // SAFETY: `rows` has a row of `n` channels, filled up to whole vectors, for the tile at each of N*N points,
                // `start` has as many, and the memory has `COLUMNS` for M*N and for M*M.
                unsafe {
                    for j in 0..N {
                        for u in 0..vectors {
                            let from = from.add(j * rows.point + first + u * S::LANES);
                            let mut r = [s.splat_i32(0); N];
                            for (i, r) in r.iter_mut().enumerate() {
                                *r = s.load_i32_ptr(from.add(i * N * rows.point));
                            }
                            let y = output_transform::<S, N, M>(s, &r);
                            for (i, y) in y.iter().enumerate() {
                                s.store_i32_ptr(between.add((i * N + j) * COLUMNS + u * S::LANES), *y);
                            }
                        }
                    }
                    for i in 0..M {
                        for u in 0..vectors {
                            let mut r = [s.splat_i32(0); N];
                            for (j, r) in r.iter_mut().enumerate() {
                                *r = s.load_i32_ptr(between.add((i * N + j) * COLUMNS + u * S::LANES));
                            }
                            let y = output_transform::<S, N, M>(s, &r);
                            let start = s.load_i32_ptr(image.start.as_ptr().add(first + u * S::LANES));
                            for (j, y) in y.iter().enumerate() {
                                let sum = s.add_i32(divide::<S, N>(s, *y, i, j, ninth), start);
                                s.store_i32_ptr(sums.add((i * M + j) * COLUMNS + u * S::LANES), sum);
                            }
                        }
                    }
                    for i in 0..height {
                        let pixel = (plane * oh + top + i) * ow + left;
                        let sums = sums.add(i * M * COLUMNS).cast_const();
                        // The contract of the image.
                        image.sink.finish(S::ISA, sums, COLUMNS, pixel..pixel + width, cols.clone());
                    }
                }
            }
        }
    }
}
