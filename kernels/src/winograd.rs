//! Winograd's minimal filtering for 3 x 3 convolutions of stride 1, channels last.
//!
//! ```text
//! U[p] = (G w G^T)[p]                          at packing, in f64: N*N matrices of in x out channels
//! for blocks of tiles of M x M outputs         N = M + 2; tiles overlap by 2 inputs
//!     V[p][tile] = (B^T x B)[p]                per channel: rows of the tile, then columns
//!     R[p] = V[p] U[p]                         N*N matrix products with the tiles as rows
//!     y[tile] = epilogue(A^T R[.][tile] A)     per channel
//! ```
//!
//! Per output and pair of channels that is `N^2 / M^2` multiplications instead of 9: 4 for M = 2, 2.25 for M = 4.
//! The matrices are those of Toom and Cook for polynomials evaluated at the points 0, +-1 (M = 2) and
//! 0, +-sqrt(1/2), +-sqrt(2) (M = 4) and at infinity. Row `i` of `B^T` holds the coefficients of `m(x) / (x - p_i)` with
//! `m(x)` the product of all `x - p_i`, row `i` of `G` is `(1, p_i, p_i^2) / prod_{j != i} (p_i - p_j)`, column `i` of
//! `A^T` is `(1, p_i, p_i^2, ...)`; for infinity they are `m(x)`, `(0, 0, 1)` and `(0, ..., 0, 1)`. S. Winograd,
//! "Arithmetic Complexity of Computations", 1980; A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural
//! Networks", 2015.
//!
//! The points decide the error. The textbook's 0, +-1, +-2 lose four times as much; with the points above the sums in
//! the transforms stay balanced, and they have few factors: `1/2 * 2 = 1`, `1/2 + 2 = 5/2`. Largest error relative to
//! the largest output, against f64, with weights of variance `1 / (9 channels)`; `tests::error_is_bounded` measures it
//! and asserts [`MAX_ERROR`]:
//!
//! | channels | direct | M = 2 | M = 4 |
//! |---|---|---|---|
//! | 16 | 4.5e-7 | 2.2e-7 | 7.3e-7 |
//! | 64 | 3.5e-7 | 3.1e-7 | 1.2e-6 |
//! | 256 | 3.9e-7 | 6.0e-7 | 2.7e-6 |
//! | 512 | 3.7e-7 | 6.2e-7 | 2.3e-6 |
//!
//! Weights of more than about the second-level cache are read once for all tiles: then the three steps are parallel
//! regions of their own over a part of the image. Smaller ones stay in the cache, and each task takes a block of tiles
//! through all three steps.

mod steps;

pub(crate) use steps::{Geometry, Rows, Steps, run};

use crate::conv::{ConvInput, ConvParams};
use crate::epilogue::Activation;
use crate::error::Result;
use crate::gemm::{self, Activate, Aligned, Matrix, OutPtr, PackedB, clamp, split_activation};
use crate::par::Cx;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use core::mem::MaybeUninit;
use core::ops::Range;

/// Outputs of a tile along each side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TileSize {
    /// F(2x2, 3x3): 16 products.
    Two,
    /// F(4x4, 3x3): 36 products.
    Four,
}

/// Bounds of the error relative to the largest output, for up to 512 channels: M = 2, M = 4.
pub const MAX_ERROR: [f64; 2] = [1e-6, 4e-6];

impl TileSize {
    /// Outputs along a side.
    pub const fn outputs(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Four => 4,
        }
    }

    /// Inputs along a side.
    pub const fn inputs(self) -> usize {
        self.outputs() + 2
    }

    /// `G`: a row of three per point.
    fn filter_matrix(self) -> Vec<[f64; 3]> {
        let (a, b) = (core::f64::consts::FRAC_1_SQRT_2, core::f64::consts::SQRT_2);
        let points: &[f64] = match self {
            Self::Two => &[0.0, 1.0, -1.0],
            Self::Four => &[0.0, a, -a, b, -b],
        };
        let mut rows: Vec<[f64; 3]> = points
            .iter()
            .map(|p| {
                let divisor: f64 = points.iter().filter(|q| *q != p).map(|q| p - q).product();
                [1.0, *p, p * p].map(|x| x / divisor)
            })
            .collect();
        rows.push([0.0, 0.0, 1.0]);
        rows
    }
}

/// Fewest channels on both sides; the transforms know whole vectors only, so that it may also be a vector's.
const MIN_CHANNELS: usize = 8;
/// Fewest tiles: they are the rows of the matrix products.
const MIN_TILES: usize = 4;
/// Outputs from which M = 4, or else M = 2, is worth the memory of its weights: 4 times and 16/9 times as much as they
/// have themselves. Time that is saved grows with outputs times weights, memory with weights, so the outputs decide.
const MIN_OUTPUTS: [usize; 2] = [150, 40];
/// Bytes of weights for M = 4 that are worth it for any number of outputs.
const ANY_OUTPUTS: usize = 5 << 19;

/// The size of tile that makes a convolution fastest, if any does and its memory is in proportion.
///
/// Counts the products: `N^2` per tile against 9 per output, so that tiles that stick out of the image are paid for. They
/// predict the order well; microseconds of `examples/winograd_bench.rs`, one thread, 128-bit vectors with multiply-add:
///
/// | image, channels | direct | M = 2 | M = 4 | chosen |
/// |---|---|---|---|---|
/// | 208 x 208, 16 > 16 | 4773 | 2639 | 1634 | 4 |
/// | 56 x 56, 64 > 64 | 4533 | 2268 | 1389 | 4 |
/// | 28 x 28, 128 > 128 | 4602 | 2074 | 1268 | 4 |
/// | 14 x 14, 256 > 256 | 4619 | 2157 | 1753 | 4 |
/// | 13 x 13, 64 > 256 | 999 | 549 | 400 | 4 |
/// | 10 x 10, 128 > 128 | 568 | 280 | 262 | 4 |
/// | 7 x 7, 128 > 128 | 289 | 167 | 104 | 4 |
/// | 7 x 7, 512 > 512 | 5585 | 4067 | 4972 | 2 |
///
/// Integers of 16 bits choose alike: the memory of their weights grows in the same proportion.
pub(crate) fn choose(params: &ConvParams, [d, h, w]: [usize; 3]) -> Option<TileSize> {
    let outputs = d.saturating_mul(h).saturating_mul(w);
    let weights = params.in_channels.saturating_mul(params.out_channels);
    let worth = |size: TileSize| match size {
        TileSize::Four => outputs >= MIN_OUTPUTS[0] || weights <= ANY_OUTPUTS / (36 * size_of::<f32>()),
        TileSize::Two => outputs >= MIN_OUTPUTS[1],
    };
    let products = |size: TileSize| {
        let (m, n) = (size.outputs(), size.inputs());
        let tiles = d.saturating_mul(h.div_ceil(m)).saturating_mul(w.div_ceil(m));
        (worth(size) && tiles >= MIN_TILES).then(|| tiles.saturating_mul(n * n))
    };
    let best = [TileSize::Four, TileSize::Two].into_iter().filter_map(|size| Some((products(size)?, size)));
    let (products, size) = best.min_by_key(|(products, _)| *products)?;
    // The transforms take time too.
    (products < outputs.saturating_mul(6)).then_some(size)
}

/// Channels that the transforms take through both passes at a time: a cache line, whose parts are then read and written
/// one after the other. (With a power of two of channels the pixels of a tile share few places of the cache.)
const LINE: usize = 16;

/// The weights of a convolution, transformed.
#[derive(Clone, Debug)]
pub(crate) struct Winograd {
    size: TileSize,
    /// Per point of the tile a matrix of in x out channels.
    weights: Vec<PackedB>,
    /// Zeros if there is none.
    bias: Aligned,
    /// A pixel of padding.
    zeros: Aligned,
}

/// Whether a convolution is of the kind that is computed here, with at least a vector of channels on both sides.
pub(crate) fn fits(params: &ConvParams, vector: usize) -> bool {
    let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = params;
    *kernel == [1, 3, 3]
        && *strides == [1; 3]
        && *dilations == [1; 3]
        && *groups == 1
        && (*in_channels).min(*out_channels) >= vector.max(MIN_CHANNELS)
}

impl Winograd {
    /// Whether a convolution can run here.
    pub(crate) fn supports(isa: Isa, params: &ConvParams) -> bool {
        fits(params, isa.lanes())
    }

    /// Transforms and packs `weights` laid out `[out, in, 3, 3]`; lengths were checked.
    pub(crate) fn new(
        isa: Isa,
        size: TileSize,
        params: &ConvParams,
        weights: &[f32],
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        let (k, n) = (params.in_channels, params.out_channels);
        let g = size.filter_matrix();
        let mut packed = Vec::with_capacity(g.len() * g.len());
        let mut lines = vec![[0f64; 3]; k * n];
        let mut matrix = vec![0f32; k * n];
        for row in &g {
            for (line, w) in lines.iter_mut().zip(weights.chunks_exact(9)) {
                for (x, sum) in line.iter_mut().enumerate() {
                    *sum = (0..3).map(|y| row[y] * f64::from(w[y * 3 + x])).sum();
                }
            }
            for column in &g {
                for (u, line) in matrix.iter_mut().zip(&lines) {
                    *u = (0..3).map(|x| column[x] * line[x]).sum::<f64>() as f32;
                }
                packed.push(PackedB::new(isa, Matrix::new(&matrix, n, k).transposed())?);
            }
        }
        let zeros = Aligned::zeros(k)?;
        let mut own_bias = Aligned::zeros(n)?;
        if let Some(bias) = bias {
            own_bias.as_mut_slice().copy_from_slice(bias);
        }
        Ok(Self { size, weights: packed, bias: own_bias, zeros })
    }

    pub(crate) fn size(&self) -> TileSize {
        self.size
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weights.iter().map(PackedB::bytes).sum()
    }

    /// Lengths were checked; `out` is not empty.
    pub(crate) fn run(
        &self,
        cx: &Cx<'_>,
        params: &ConvParams,
        input: &ConvInput,
        out_spatial: [usize; 3],
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        out: &mut [f32],
    ) -> Result<()> {
        let geometry = Geometry::new(self.size, params, input, out_spatial);
        let image = Image {
            isa: cx.isa(),
            winograd: self,
            geometry: &geometry,
            x,
            residual,
            out: OutPtr(out.as_mut_ptr()),
            activation,
        };
        run(cx, &geometry, self.weights.len(), geometry.channels, self.bytes(), &image)
    }
}

/// One convolution.
struct Image<'a> {
    isa: Isa,
    winograd: &'a Winograd,
    geometry: &'a Geometry,
    x: &'a [f32],
    residual: Option<&'a [f32]>,
    out: OutPtr,
    activation: Activation,
}

impl Steps for Image<'_> {
    fn forward(&self, tiles: Range<usize>, rows: Rows) {
        let (image, constants) = (self, &CONSTANTS);
        match self.winograd.size {
            TileSize::Two => dispatch(self.isa, Forward::<4> { image, tiles, rows, constants }),
            TileSize::Four => dispatch(self.isa, Forward::<6> { image, tiles, rows, constants }),
        }
    }

    fn multiply(&self, point: usize, m: usize, v: Rows, r: Rows) {
        let weights = &self.winograd.weights[point];
        let block = gemm::Block {
            m,
            a: v.at(point),
            lda: v.ld,
            b: weights.data(),
            size: [weights.k(), weights.n()],
            panels: 0..weights.panels(),
            c: OutPtr(r.at(point)),
            ldc: r.ld,
            accumulate: false,
        };
        // SAFETY: both have `m` rows for each point, which nobody else uses.
        unsafe { block.run(self.isa, None) };
    }

    fn backward(&self, tiles: Range<usize>, rows: Rows) {
        let (image, constants, size) = (self, &CONSTANTS, self.winograd.size);
        match size {
            TileSize::Two => dispatch(self.isa, Backward::<4, 2> { image, tiles: tiles.clone(), rows, constants }),
            TileSize::Four => dispatch(self.isa, Backward::<6, 4> { image, tiles: tiles.clone(), rows, constants }),
        }
        let Some(activation) = split_activation(self.activation).1 else { return };
        let Geometry { channels: [_, n], height: [_, oh], width: [_, ow], .. } = *self.geometry;
        for tile in tiles {
            let [plane, top, left] = self.geometry.place(tile, size.outputs());
            let (rows, cols) = (size.outputs().min(oh - top), size.outputs().min(ow - left));
            let c = self.out.at(((plane * oh + top) * ow + left) * n);
            dispatch(self.isa, Activate { activation, c, rows, cols: cols * n, ld: ow * n });
        }
    }
}

/// Factors of the transforms for M = 4. In memory that the compiler cannot see through: constants that it knows would be
/// made anew at each use by browsers' compilers, which takes several instructions each.
struct Constants {
    /// `-5/2, -2, -1/2, sqrt(1/2), sqrt(2)`.
    forward: [f32; 5],
    /// `2, 1/2, sqrt(1/2), sqrt(2), sqrt(1/2)^3, sqrt(2)^3`.
    backward: [f32; 6],
}

const A: f32 = core::f32::consts::FRAC_1_SQRT_2;
const B: f32 = core::f32::consts::SQRT_2;

static CONSTANTS: Constants =
    Constants { forward: [-2.5, -2.0, -0.5, A, B], backward: [2.0, 0.5, A, B, A / 2.0, B * 2.0] };

/// `B^T d`, the inputs of a tile along one side.
#[inline(always)]
fn input_transform<S: Simd, const N: usize>(s: S, c: &[S::F32; 5], d: &[S::F32; N]) -> [S::F32; N] {
    let mut t = *d;
    if N == 4 {
        t[0] = s.sub(d[2], d[0]);
        t[1] = s.add(d[2], d[1]);
        t[2] = s.sub(d[2], d[1]);
        t[3] = s.sub(d[3], d[1]);
    } else {
        let [minus_five_halves, minus_two, minus_half, a, b] = *c;
        t[0] = s.mul_add(d[2], minus_five_halves, s.add(d[0], d[4]));
        let even = s.mul_add(d[2], minus_two, d[4]);
        let odd = s.mul(a, s.mul_add(d[1], minus_two, d[3]));
        t[1] = s.add(even, odd);
        t[2] = s.sub(even, odd);
        let even = s.mul_add(d[2], minus_half, d[4]);
        let odd = s.mul(b, s.mul_add(d[1], minus_half, d[3]));
        t[3] = s.add(even, odd);
        t[4] = s.sub(even, odd);
        t[5] = s.mul_add(d[3], minus_five_halves, s.add(d[1], d[5]));
    }
    t
}

/// `A^T r`, the outputs of a tile along one side.
#[inline(always)]
fn output_transform<S: Simd, const N: usize, const M: usize>(s: S, c: &[S::F32; 6], r: &[S::F32; N]) -> [S::F32; M] {
    let mut y = [r[0]; M];
    if N == 4 {
        y[0] = s.add(r[0], s.add(r[1], r[2]));
        y[1] = s.add(r[3], s.sub(r[1], r[2]));
    } else {
        let [two, half, a, b, aaa, bbb] = *c;
        let (sum, sum_b) = (s.add(r[1], r[2]), s.add(r[3], r[4]));
        y[0] = s.add(r[0], s.add(sum, sum_b));
        y[2] = s.mul_add(sum_b, two, s.mul(sum, half));
        let (difference, difference_b) = (s.sub(r[1], r[2]), s.sub(r[3], r[4]));
        y[1] = s.mul_add(difference_b, b, s.mul(difference, a));
        y[3] = s.mul_add(difference_b, bbb, s.mul_add(difference, aaa, r[5]));
    }
    y
}

/// What lies between both passes: a line of channels for each point of a tile.
#[repr(align(64))]
struct Between {
    _elements: [f32; 36 * LINE],
}

/// First channel of vector `index`: the last one may overlap the one before.
#[inline(always)]
fn channel<S: Simd>(index: usize, channels: usize) -> usize {
    (index * S::LANES).min(channels - S::LANES)
}

/// See [`Steps::forward`].
struct Forward<'a, const N: usize> {
    image: &'a Image<'a>,
    tiles: Range<usize>,
    rows: Rows,
    constants: &'a Constants,
}

impl<const N: usize> Kernel for Forward<'_, N> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { image, tiles, rows, constants } = self;
        let c: [S::F32; 5] = {
            let mut c = [s.splat(0.0); 5];
            for (c, x) in c.iter_mut().zip(&constants.forward) {
                // SAFETY: a reference.
                *c = unsafe { s.splat_ptr(core::hint::black_box(x)) };
            }
            c
        };
        let channels = image.geometry.channels[0];
        let vectors = channels.div_ceil(S::LANES);
        let mut between = MaybeUninit::<Between>::uninit();
        let between = between.as_mut_ptr().cast::<f32>();
        for tile in tiles {
            let zeros = image.winograd.zeros.as_slice();
            let pixels = image.geometry.pixels::<f32, N>(tile, image.x.as_ptr(), zeros.as_ptr());
            let to = rows.tile(tile);
            let mut v = 0;
            while v < vectors {
                let end = (v + LINE / S::LANES).min(vectors);
                // SAFETY: every pixel has `channels` elements, `between` has `LINE` for each of N*N points, and `rows` has
                // a row of `channels` for the tile.
                unsafe {
                    for j in 0..N {
                        for u in v..end {
                            let at = channel::<S>(u, channels);
                            let mut d = [s.splat(0.0); N];
                            for (i, d) in d.iter_mut().enumerate() {
                                *d = s.load_ptr(pixels[i * N + j].add(at));
                            }
                            let t = input_transform::<S, N>(s, &c, &d);
                            for (i, t) in t.iter().enumerate() {
                                s.store_ptr(between.add((i * N + j) * LINE + (u - v) * S::LANES), *t);
                            }
                        }
                    }
                    for i in 0..N {
                        for u in v..end {
                            let mut d = [s.splat(0.0); N];
                            for (j, d) in d.iter_mut().enumerate() {
                                *d = s.load_ptr(between.add((i * N + j) * LINE + (u - v) * S::LANES));
                            }
                            let t = input_transform::<S, N>(s, &c, &d);
                            let to = to.add(i * N * rows.point + channel::<S>(u, channels));
                            for (j, t) in t.iter().enumerate() {
                                s.store_ptr(to.add(j * rows.point), *t);
                            }
                        }
                    }
                }
                v = end;
            }
        }
    }
}

/// See [`Steps::backward`].
struct Backward<'a, const N: usize, const M: usize> {
    image: &'a Image<'a>,
    tiles: Range<usize>,
    rows: Rows,
    constants: &'a Constants,
}

impl<const N: usize, const M: usize> Kernel for Backward<'_, N, M> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { image, tiles, rows, constants } = self;
        let c: [S::F32; 6] = {
            let mut c = [s.splat(0.0); 6];
            for (c, x) in c.iter_mut().zip(&constants.backward) {
                // SAFETY: a reference.
                *c = unsafe { s.splat_ptr(core::hint::black_box(x)) };
            }
            c
        };
        let Geometry { channels: [_, channels], height: [_, oh], width: [_, ow], .. } = *image.geometry;
        let bias = image.winograd.bias.as_slice();
        let vectors = channels.div_ceil(S::LANES);
        let bounds = split_activation(image.activation).0;
        let mut between = MaybeUninit::<Between>::uninit();
        let between = between.as_mut_ptr().cast::<f32>();
        for tile in tiles {
            let [plane, top, left] = image.geometry.place(tile, M);
            let (height, width) = (M.min(oh - top), M.min(ow - left));
            let first = ((plane * oh + top) * ow + left) * channels;
            let from = rows.tile(tile);
            let mut v = 0;
            while v < vectors {
                let end = (v + LINE / S::LANES).min(vectors);
                // SAFETY: `rows` has a row of `channels` for the tile at each of N*N points, `between` has `LINE` elements
                // for each of M*N; outputs beyond `height` and `width` are not touched.
                unsafe {
                    for j in 0..N {
                        for u in v..end {
                            let from = from.add(j * rows.point + channel::<S>(u, channels));
                            let mut r = [s.splat(0.0); N];
                            for (i, r) in r.iter_mut().enumerate() {
                                *r = s.load_ptr(from.add(i * N * rows.point));
                            }
                            let y = output_transform::<S, N, M>(s, &c, &r);
                            for (i, y) in y.iter().enumerate() {
                                s.store_ptr(between.add((i * N + j) * LINE + (u - v) * S::LANES), *y);
                            }
                        }
                    }
                    for i in 0..height {
                        for u in v..end {
                            let at = channel::<S>(u, channels);
                            let mut r = [s.splat(0.0); N];
                            for (j, r) in r.iter_mut().enumerate() {
                                *r = s.load_ptr(between.add((i * N + j) * LINE + (u - v) * S::LANES));
                            }
                            let y = output_transform::<S, N, M>(s, &c, &r);
                            let bias = s.load_ptr(bias.as_ptr().add(at));
                            let at = first + i * ow * channels + at;
                            for (j, y) in y.iter().enumerate() {
                                if j < width {
                                    let at = at + j * channels;
                                    let mut y = s.add(*y, bias);
                                    if let Some(residual) = image.residual {
                                        y = s.add(y, s.load_ptr(residual.as_ptr().add(at)));
                                    }
                                    if let Some(bounds) = bounds {
                                        y = clamp(s, y, bounds);
                                    }
                                    s.store_ptr(image.out.at(at), y);
                                }
                            }
                        }
                    }
                }
                v = end;
            }
        }
    }
}

#[cfg(test)]
mod tests;
