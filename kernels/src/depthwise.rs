//! Depthwise convolution, channels last: each channel has its own kernel.
//!
//! ```text
//! for rows of the output                                 in parallel
//!     for T columns at once                              at the sides of the image a pixel of zeros stands in
//!         for V vectors of channels
//!             acc[0..T] = bias
//!             for kh that fall into the image
//!                 w[0..KW] = weights[kh]
//!                 for the (T-1)*stride + KW inputs x of the row
//!                     acc[t] += x * w[kw]                for all t*stride + kw that hit x: each input is loaded once
//!             out[0..T] = activation(acc + residual)
//! ```
//!
//! Columns are outside of channels, so that each of the `KH * ((T-1)*stride + KW)` pixels of a tile is read from end to
//! end. Two vectors of channels share the address of their input, which on WebAssembly is an instruction of its own; for
//! width 5 the weights of one fill the registers. Channels that do not fill the last vectors are computed with vectors
//! that end with them and overlap the ones before, which stores the same values twice; so do columns that do not fill
//! the last tile.
//!
//! That is for widths 3 and 5 with strides 1 and 2; other kernels have a loop over taps instead, with two vectors of channels so that sums do not wait for each other, and columns at the sides one by one,
//! with four.

use crate::conv::{ConvInput, ConvParams};
use crate::epilogue::Activation;
use crate::error::Result;
use crate::gemm::{Activate, Aligned, OutPtr, clamp, split_activation};
use crate::par::Cx;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use core::ops::Range;

/// The weights of a depthwise convolution.
#[derive(Clone, Debug)]
pub(crate) struct Depthwise {
    /// `[kh * kw][channels]`.
    weights: Aligned,
    /// Zeros if there is none.
    bias: Aligned,
    /// A pixel of padding.
    zeros: Aligned,
}

/// Output columns that are computed side by side.
const COLUMNS: usize = 4;
/// Scalar operations that a task should have at least.
const TASK_COST: u64 = 1 << 18;
/// More tasks than this would not balance better.
const MAX_TASKS: u64 = 64;

impl Depthwise {
    /// Whether a convolution of one channel per group can run here: two dimensions at most.
    pub(crate) fn supports(params: &ConvParams) -> bool {
        params.kernel[0] == 1 && params.strides[0] == 1
    }

    /// Packs `weights` laid out `[channels, 1, 1, kh, kw]`; lengths were checked.
    pub(crate) fn new(params: &ConvParams, weights: &[f32], bias: Option<&[f32]>) -> Result<Self> {
        let (channels, taps) = (params.out_channels, params.kernel.iter().product::<usize>());
        let mut packed = Aligned::zeros(weights.len())?;
        for (tap, row) in packed.as_mut_slice().chunks_exact_mut(channels).enumerate() {
            for (c, x) in row.iter_mut().enumerate() {
                *x = weights[c * taps + tap];
            }
        }
        let zeros = Aligned::zeros(channels)?;
        let mut own_bias = zeros.clone();
        if let Some(bias) = bias {
            own_bias.as_mut_slice().copy_from_slice(bias);
        }
        Ok(Self { weights: packed, bias: own_bias, zeros })
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(self.weights.as_slice())
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
    ) {
        let [od, oh, ow] = out_spatial;
        let [_, kh, kw] = params.kernel;
        let channels = params.out_channels;
        let rows = input.batch * od * oh;
        let cost = (2 * kh * kw) as u64 * out.len() as u64;
        let tasks = (cost / TASK_COST).clamp(1, MAX_TASKS.min(rows as u64)) as usize;
        let image = Image {
            x,
            weights: self.weights.as_slice(),
            bias: self.bias.as_slice(),
            zeros: self.zeros.as_slice(),
            residual,
            out: OutPtr(out.as_mut_ptr()),
            activation,
            channels,
            depth: [input.spatial[0], od],
            pad_depth: input.pads_begin[0],
            height: [input.spatial[1], oh],
            width: [input.spatial[2], ow],
            kernel: [kh, kw],
            strides: [params.strides[1], params.strides[2]],
            dilations: [params.dilations[1], params.dilations[2]],
            pads: [input.pads_begin[1], input.pads_begin[2]],
            interior: params.interior(input, ow),
        };
        cx.for_each(tasks, cost, &|task| {
            let start = |task: usize| task * (rows / tasks) + task.min(rows % tasks);
            for row in start(task)..start(task + 1) {
                image.row(cx.isa(), row);
            }
        });
    }
}

/// All of one depthwise convolution. Pairs are `[rows, columns]` or `[input, output]`.
struct Image<'a> {
    x: &'a [f32],
    weights: &'a [f32],
    bias: &'a [f32],
    zeros: &'a [f32],
    residual: Option<&'a [f32]>,
    out: OutPtr,
    activation: Activation,
    channels: usize,
    depth: [usize; 2],
    pad_depth: usize,
    height: [usize; 2],
    width: [usize; 2],
    kernel: [usize; 2],
    strides: [usize; 2],
    dilations: [usize; 2],
    pads: [usize; 2],
    interior: Range<usize>,
}

/// Where a tile of one row of the output reads and writes.
#[derive(Clone, Copy)]
struct Place {
    /// First input of the first tap that is used.
    x: *const f32,
    /// Elements between the input rows of neighbouring taps.
    row_step: usize,
    /// Weights of the first tap that is used.
    w: *const f32,
    /// Taps that are used: rows, columns.
    taps: [usize; 2],
    /// First output.
    out: *mut f32,
    /// First element of the residual, or null.
    residual: *const f32,
}

impl Image<'_> {
    /// One row of the output of all images.
    fn row(&self, isa: Isa, row: usize) {
        let [kh, kw] = self.kernel;
        let [stride, dilation] = [self.strides[1], self.dilations[1]];
        let [oh, ow] = [self.height[1], self.width[1]];
        let c = self.channels;
        let (z, y) = (row / oh, row % oh);
        let (b, z) = (z / self.depth[1], z % self.depth[1]);
        let z = z.wrapping_sub(self.pad_depth);
        // Rows of taps inside the image, none if the plane itself is padding.
        let top = (y * self.strides[0]) as isize - self.pads[0] as isize;
        let rows = if z < self.depth[0] { clip(top, self.dilations[0], kh, self.height[0]) } else { 0..0 };
        let line = if rows.is_empty() {
            0
        } else {
            let first = (top + (rows.start * self.dilations[0]) as isize) as usize;
            ((b * self.depth[0] + z) * self.height[0] + first) * self.width[0]
        };
        let left = |column: usize| (column * stride) as isize - self.pads[1] as isize;
        let place = |column: usize, taps: Range<usize>| {
            let at = (row * ow + column) * c;
            let from = line as isize + left(column) + (taps.start * dilation) as isize;
            Place {
                // Without taps nothing is read, wherever this points.
                x: self.x.as_ptr().wrapping_offset(from.wrapping_mul(c as isize)),
                row_step: self.dilations[0] * self.width[0] * c,
                w: self.weights.as_ptr().wrapping_add((rows.start * kw + taps.start) * c),
                taps: [rows.len(), taps.len()],
                out: self.out.at(at),
                residual: self.residual.map_or(core::ptr::null(), |residual| residual[at..].as_ptr()),
            }
        };
        // Several vectors overlap, so there must be as many.
        let several = |vectors: usize| c >= vectors * isa.lanes();
        let any = |columns: Range<usize>| {
            for column in columns {
                let taps = clip(left(column), dilation, kw, self.width[0]);
                let place = place(column, taps);
                if several(4) {
                    dispatch(isa, AnyTiles::<1, 4> { image: self, place, tiles: 1 });
                } else {
                    dispatch(isa, AnyTiles::<1, 1> { image: self, place, tiles: 1 });
                }
            }
        };
        if ow < COLUMNS {
            any(0..ow);
        } else if self.known(isa) {
            let inputs = (COLUMNS - 1) * stride + kw;
            let clipped = |column: usize| left(column) < 0 || left(column) + inputs as isize > self.width[0] as isize;
            let mut column = 0;
            while column < ow {
                // The last tile may overlap the one before and store some outputs a second time.
                let at = column.min(ow - COLUMNS);
                if clipped(at) {
                    self.tiles(isa, place(at, 0..kw), 1, Some(left(at)));
                    column = at + COLUMNS;
                } else {
                    let tiles = (column..ow).step_by(COLUMNS).take_while(|&at| at + COLUMNS <= ow && !clipped(at));
                    let tiles = tiles.count().max(1);
                    self.tiles(isa, place(at, 0..kw), tiles, None);
                    column = at + tiles * COLUMNS;
                }
            }
        } else {
            let inside = self.interior.clone();
            any(0..inside.start);
            let tiles = inside.len() / COLUMNS;
            if tiles > 0 {
                let place = place(inside.start, 0..kw);
                if several(2) {
                    dispatch(isa, AnyTiles::<COLUMNS, 2> { image: self, place, tiles });
                } else {
                    dispatch(isa, AnyTiles::<COLUMNS, 1> { image: self, place, tiles });
                }
            }
            any(inside.start + tiles * COLUMNS..ow);
        }
        if let Some(activation) = split_activation(self.activation).1 {
            dispatch(isa, Activate { activation, c: self.out.at(row * ow * c), rows: 1, cols: ow * c, ld: 0 });
        }
    }

    /// Whether there are [`Tiles`] for this kernel.
    fn known(&self, isa: Isa) -> bool {
        // They compute whole vectors only.
        self.channels >= vectors(self.kernel[1]) * isa.lanes()
            && matches!((self.kernel[1], self.strides[1], self.dilations[1]), (3 | 5, 1 | 2, 1))
    }

    /// Tiles side by side with all taps of a row inside the image, or one of which some are not, whose first input is
    /// column `left`.
    fn tiles(&self, isa: Isa, place: Place, tiles: usize, left: Option<isize>) {
        let image = self;
        macro_rules! tiles {
            ($kw:literal, $stride:literal) => {
                match left {
                    None => {
                        dispatch(isa, Tiles::<$kw, $stride, { vectors($kw) }, false> { image, place, tiles, left: 0 })
                    }
                    Some(left) => {
                        dispatch(isa, Tiles::<$kw, $stride, { vectors($kw) }, true> { image, place, tiles, left })
                    }
                }
            };
        }
        match (self.kernel[1], self.strides[1]) {
            (3, 1) => tiles!(3, 1),
            (3, _) => tiles!(3, 2),
            (_, 1) => tiles!(5, 1),
            _ => tiles!(5, 2),
        }
    }
}

/// Vectors of channels of a tile for a width of the kernel.
const fn vectors(kw: usize) -> usize {
    if kw == 3 { 2 } else { 1 }
}

/// Taps `t` of `taps` for which `0 <= first + t * dilation < size`.
fn clip(first: isize, dilation: usize, taps: usize, size: usize) -> Range<usize> {
    let start = if first < 0 { first.unsigned_abs().div_ceil(dilation).min(taps) } else { 0 };
    let room = size as isize - first;
    let end = if room <= 0 { 0 } else { (room as usize).div_ceil(dilation).min(taps) };
    start..end.max(start)
}

impl Place {
    /// The tile `index` tiles of `columns` columns to the right.
    #[inline(always)]
    fn tile(&self, image: &Image<'_>, index: usize, columns: usize) -> Self {
        let outputs = index * columns * image.channels;
        Self {
            x: self.x.wrapping_add(outputs * image.strides[1]),
            out: self.out.wrapping_add(outputs),
            residual: if self.residual.is_null() { self.residual } else { self.residual.wrapping_add(outputs) },
            ..*self
        }
    }
}

/// Tiles of [`COLUMNS`] for a known kernel width and stride, side by side, at least `V` vectors of channels. All taps of a
/// row are inside the image, unless it is an `EDGE`: there inputs left or right of the image are a pixel of zeros.
///
/// Whoever makes one promises that the image has all inputs and outputs that `place` and its sizes lead to, and that
/// nobody else uses these outputs.
struct Tiles<'a, const KW: usize, const STRIDE: usize, const V: usize, const EDGE: bool> {
    image: &'a Image<'a>,
    place: Place,
    tiles: usize,
    /// Column of the first input, at an edge.
    left: isize,
}

// The kernels below are not inlined on wasm: optimising compilers choke on huge functions.
impl<const KW: usize, const STRIDE: usize, const V: usize, const EDGE: bool> Kernel for Tiles<'_, KW, STRIDE, V, EDGE> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let image = self.image;
        let channels = image.channels;
        // Inputs inside the image.
        let inputs = clip(self.left, 1, (COLUMNS - 1) * STRIDE + KW, image.width[0]);
        for tile in 0..self.tiles {
            let place = self.place.tile(image, tile, COLUMNS);
            let mut c = 0;
            loop {
                // SAFETY: the contract of the type, and c + V * LANES <= channels.
                unsafe {
                    let mut acc = [load_all::<S, V>(s, image.bias.as_ptr().add(c), S::LANES); COLUMNS];
                    let zeros = image.zeros.as_ptr().add(c);
                    for kh in 0..place.taps[0] {
                        let x = place.x.wrapping_add(kh * place.row_step + c);
                        let w = place.w.add(kh * KW * channels + c);
                        // One vector after the other: weights and inputs of both would not fit into 16 registers.
                        for v in 0..V {
                            let w = weights::<S, KW>(s, w.add(v * S::LANES), channels);
                            for j in 0..(COLUMNS - 1) * STRIDE + KW {
                                let inside = !EDGE || inputs.contains(&j);
                                let from = if inside { x.wrapping_add(j * channels) } else { zeros };
                                let x = s.load_ptr(from.add(v * S::LANES));
                                add::<S, KW, STRIDE, V>(s, &mut acc, v, j, x, &w);
                            }
                        }
                    }
                    finish(s, image, &place, &mut acc, c, S::LANES);
                }
                if c + V * S::LANES == channels {
                    break;
                }
                c = (c + V * S::LANES).min(channels - V * S::LANES);
            }
        }
    }
}

/// Vectors side by side, or as many `lanes` of one.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn load_all<S: Simd, const V: usize>(s: S, p: *const f32, lanes: usize) -> [S::F32; V] {
    let mut all = [s.splat(0.0); V];
    for (v, x) in all.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        *x = unsafe { load(s, p.add(v * S::LANES), lanes) };
    }
    all
}

/// A row of weights for a vector of channels.
///
/// # Safety
/// `KW` vectors, `channels` apart, must be readable.
#[inline(always)]
unsafe fn weights<S: Simd, const KW: usize>(s: S, w: *const f32, channels: usize) -> [S::F32; KW] {
    let mut weights = [s.splat(0.0); KW];
    for (kw, weight) in weights.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        *weight = unsafe { s.load_ptr(w.add(kw * channels)) };
    }
    weights
}

/// Adds vector `v` of input `j` of a row to all outputs that it hits.
#[inline(always)]
fn add<S: Simd, const KW: usize, const STRIDE: usize, const V: usize>(
    s: S,
    acc: &mut [[S::F32; V]; COLUMNS],
    v: usize,
    j: usize,
    value: S::F32,
    weights: &[S::F32; KW],
) {
    for (t, acc) in acc.iter_mut().enumerate() {
        if j >= t * STRIDE && j - t * STRIDE < KW {
            acc[v] = s.mul_add(value, weights[j - t * STRIDE], acc[v]);
        }
    }
}

/// Tiles for any kernel width, stride, dilation, clipping and number of channels, `V` vectors at least if that is not 1.
/// Contract as for [`Tiles`].
struct AnyTiles<'a, const T: usize, const V: usize> {
    image: &'a Image<'a>,
    place: Place,
    tiles: usize,
}

impl<const T: usize, const V: usize> Kernel for AnyTiles<'_, T, V> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let image = self.image;
        let channels = image.channels;
        let [step, tap_step] = [image.strides[1] * channels, image.dilations[1] * channels];
        let lanes = if V == 1 { S::LANES.min(channels) } else { S::LANES };
        for tile in 0..self.tiles {
            let place = self.place.tile(image, tile, T);
            let mut c = 0;
            loop {
                // SAFETY: the contract of the type, and c + V * lanes <= channels.
                unsafe {
                    let mut acc = [load_all::<S, V>(s, image.bias.as_ptr().add(c), lanes); T];
                    for kh in 0..place.taps[0] {
                        let w = place.w.add(kh * image.kernel[1] * channels + c);
                        let x = place.x.wrapping_add(kh * place.row_step + c);
                        for kw in 0..place.taps[1] {
                            let weights = load_all::<S, V>(s, w.add(kw * channels), lanes);
                            let x = x.wrapping_add(kw * tap_step);
                            for (t, acc) in acc.iter_mut().enumerate() {
                                for (v, acc) in acc.iter_mut().enumerate() {
                                    let x = load(s, x.add(t * step + v * S::LANES), lanes);
                                    *acc = s.mul_add(x, weights[v], *acc);
                                }
                            }
                        }
                    }
                    finish(s, image, &place, &mut acc, c, lanes);
                }
                if c + V * lanes == channels {
                    break;
                }
                c = (c + V * lanes).min(channels - V * lanes);
            }
        }
    }
}

/// A whole vector, or the first `lanes` elements if that is fewer.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, p: *const f32, lanes: usize) -> S::F32 {
    // SAFETY: promised by the caller.
    unsafe { if lanes == S::LANES { s.load_ptr(p) } else { s.load_partial(core::slice::from_raw_parts(p, lanes)) } }
}

/// Residual, bounds, store.
///
/// # Safety
/// `V` times `lanes` outputs (and elements of the residual) from channel `c` of `T` columns must be there; whole vectors
/// if they are several.
#[inline(always)]
unsafe fn finish<S: Simd, const T: usize, const V: usize>(
    s: S,
    image: &Image<'_>,
    place: &Place,
    acc: &mut [[S::F32; V]; T],
    c: usize,
    lanes: usize,
) {
    // Reading it all before anything is stored leaves one branch.
    if !place.residual.is_null() {
        for (t, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                let at = t * image.channels + c + v * S::LANES;
                // SAFETY: promised by the caller.
                *acc = s.add(*acc, unsafe { load(s, place.residual.add(at), lanes) });
            }
        }
    }
    if let Some(bounds) = split_activation(image.activation).0 {
        for acc in acc.as_flattened_mut() {
            *acc = clamp(s, *acc, bounds);
        }
    }
    for (t, acc) in acc.iter().enumerate() {
        for (v, &acc) in acc.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe {
                let out = place.out.add(t * image.channels + c + v * S::LANES);
                if lanes == S::LANES {
                    s.store_ptr(out, acc);
                } else {
                    s.store_partial(core::slice::from_raw_parts_mut(out, lanes), acc);
                }
            }
        }
    }
}
