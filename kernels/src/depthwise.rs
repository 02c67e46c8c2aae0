//! Depthwise convolution, channels last: each channel has its own kernel.
//!
//! ```text
//! for rows of the output                                 in parallel
//!     for T columns at once                              inside the image: no checks; at its sides: one by one, clipped
//!         for vectors of channels
//!             acc[0..T] = bias
//!             for kh that fall into the image
//!                 w[0..KW] = weights[kh]
//!                 for the (T-1)*stride + KW inputs x of the row
//!                     acc[t] += x * w[kw]                for all t*stride + kw that hit x: each input is loaded once
//!             out[0..T] = activation(acc + residual)
//! ```
//!
//! Columns are outside of channels, so that each of the `KH * ((T-1)*stride + KW)` pixels of a tile is read from end to
//! end. Channels that do not fill the last vector are computed with a vector that ends with them and overlaps the one
//! before, which stores the same values twice.

use crate::conv::{ConvInput, ConvParams};
use crate::epilogue::Activation;
use crate::error::Result;
use crate::gemm::{Aligned, OutPtr, activate, split_activation};
use crate::par::Cx;
use crate::simd::{Kernel, Simd, dispatch};
use core::ops::Range;

/// The weights of a depthwise convolution.
#[derive(Clone, Debug)]
pub(crate) struct Depthwise {
    /// `[kh * kw][channels]`.
    weights: Aligned,
    /// Zeros if there is none.
    bias: Aligned,
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
        let mut zeros = Aligned::zeros(channels)?;
        if let Some(bias) = bias {
            zeros.as_mut_slice().copy_from_slice(bias);
        }
        Ok(Self { weights: packed, bias: zeros })
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
        // Columns whose taps all lie inside the line.
        let (stride, reach) = (params.strides[2], (kw - 1) * params.dilations[2]);
        let start = input.pads_begin[2].div_ceil(stride).min(ow);
        let end = match (input.spatial[2] + input.pads_begin[2]).checked_sub(reach + 1) {
            Some(last) => (last / stride + 1).clamp(start, ow),
            None => start,
        };
        let residual = residual.map_or(OutPtr(core::ptr::null_mut()), |x| OutPtr(x.as_ptr().cast_mut()));
        let image = Image {
            x,
            weights: self.weights.as_slice(),
            bias: self.bias.as_slice(),
            residual,
            out: OutPtr(out.as_mut_ptr()),
            activation,
            channels,
            depth: [input.spatial[0], od],
            pad_depth: input.pads_begin[0],
            height: [input.spatial[1], oh],
            width: [input.spatial[2], ow],
            kernel: [kh, kw],
            strides: [params.strides[1], stride],
            dilations: [params.dilations[1], params.dilations[2]],
            pads: [input.pads_begin[1], input.pads_begin[2]],
            interior: start..end,
        };
        cx.for_each(tasks, cost, &|task| {
            let start = |task: usize| task * (rows / tasks) + task.min(rows % tasks);
            dispatch(cx.isa(), Rows { image: &image, rows: start(task)..start(task + 1) });
        });
    }
}

/// All of one depthwise convolution. Pairs are `[rows, columns]` or `[input, output]`.
struct Image<'a> {
    x: &'a [f32],
    weights: &'a [f32],
    bias: &'a [f32],
    /// Null if there is none; only read.
    residual: OutPtr,
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

struct Rows<'a> {
    image: &'a Image<'a>,
    rows: Range<usize>,
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
    /// First output, and first element of the residual or null.
    out: *mut f32,
    residual: *const f32,
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let image = self.image;
        let [kh, kw] = image.kernel;
        let [stride, dilation] = [image.strides[1], image.dilations[1]];
        let [oh, ow] = [image.height[1], image.width[1]];
        let c = image.channels;
        for row in self.rows {
            let (z, y) = (row / oh, row % oh);
            let (b, z) = (z / image.depth[1], z % image.depth[1]);
            let z = z.wrapping_sub(image.pad_depth);
            // Rows of taps inside the image, none if the plane itself is padding.
            let top = (y * image.strides[0]) as isize - image.pads[0] as isize;
            let mut rows = clip(top, image.dilations[0], kh, image.height[0]);
            if z >= image.depth[0] {
                rows = 0..0;
            }
            let plane = b * image.depth[0] + if rows.is_empty() { 0 } else { z };
            let first = top + (rows.start * image.dilations[0]) as isize;
            let line = if rows.is_empty() { 0 } else { (plane * image.height[0] + first as usize) * image.width[0] };
            let place = |column: usize, taps: Range<usize>| {
                let left = (column * stride + taps.start * dilation) as isize - image.pads[1] as isize;
                let at = (row * ow + column) * c;
                Place {
                    // Without taps nothing is read, wherever this points.
                    x: image.x.as_ptr().wrapping_offset((line as isize + left) * c as isize),
                    row_step: image.dilations[0] * image.width[0] * c,
                    w: image.weights.as_ptr().wrapping_add((rows.start * kw + taps.start) * c),
                    taps: [rows.len(), taps.len()],
                    out: image.out.at(at),
                    residual: if image.residual.0.is_null() { core::ptr::null() } else { image.residual.at(at) },
                }
            };
            let inside = image.interior.clone();
            let mut column = 0;
            while column < ow {
                // SAFETY: rows and columns of taps are clipped to the image, whose sizes were checked against the
                // slices; a row of the output belongs to one task.
                unsafe {
                    if !inside.contains(&column) {
                        let left = (column * stride) as isize - image.pads[1] as isize;
                        let taps = clip(left, dilation, kw, image.width[0]);
                        tile_any::<S, 1>(s, image, place(column, taps));
                        column += 1;
                    } else if inside.end - column >= COLUMNS {
                        tile::<S, COLUMNS>(s, image, place(column, 0..kw));
                        column += COLUMNS;
                    } else if inside.end - column >= 2 {
                        tile::<S, 2>(s, image, place(column, 0..kw));
                        column += 2;
                    } else {
                        tile::<S, 1>(s, image, place(column, 0..kw));
                        column += 1;
                    }
                }
            }
            if let Some(activation) = split_activation(image.activation).1 {
                // SAFETY: the row belongs to this task.
                unsafe { activate(s, activation, image.out.at(row * ow * c), 1, ow * c, 0) };
            }
        }
    }
}

/// Taps `t` of `taps` for which `0 <= first + t * dilation < size`.
#[inline(always)]
fn clip(first: isize, dilation: usize, taps: usize, size: usize) -> Range<usize> {
    let start = if first < 0 { first.unsigned_abs().div_ceil(dilation).min(taps) } else { 0 };
    let room = size as isize - first;
    let end = if room <= 0 { 0 } else { (room as usize).div_ceil(dilation).min(taps) };
    start..end.max(start)
}

/// `T` columns with all taps of a row inside the image.
///
/// # Safety
/// All inputs and outputs that `place` and the sizes of `image` lead to must be there.
#[inline(always)]
unsafe fn tile<S: Simd, const T: usize>(s: S, image: &Image<'_>, place: Place) {
    // SAFETY: promised by the caller.
    unsafe {
        match (image.kernel[1], image.strides[1], image.dilations[1]) {
            (3, 1, 1) => tile_of::<S, T, 3, 1>(s, image, place),
            (3, 2, 1) => tile_of::<S, T, 3, 2>(s, image, place),
            (5, 1, 1) => tile_of::<S, T, 5, 1>(s, image, place),
            (5, 2, 1) => tile_of::<S, T, 5, 2>(s, image, place),
            _ => tile_any::<S, T>(s, image, place),
        }
    }
}

/// Kernel width and stride known.
///
/// # Safety
/// As [`tile`].
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
unsafe fn tile_of<S: Simd, const T: usize, const KW: usize, const STRIDE: usize>(
    s: S,
    image: &Image<'_>,
    place: Place,
) {
    let channels = image.channels;
    // SAFETY: promised by the caller.
    unsafe {
        each_vector(s, image, place, |s, x, w, acc: &mut [S::F32; T], lanes| {
            for kh in 0..place.taps[0] {
                let mut weights = [s.splat(0.0); KW];
                let w = w.add(kh * KW * channels);
                for (kw, weight) in weights.iter_mut().enumerate() {
                    *weight = load(s, w.add(kw * channels), lanes);
                }
                let mut x = x.add(kh * place.row_step);
                for j in 0..(T - 1) * STRIDE + KW {
                    let value = load(s, x, lanes);
                    x = x.wrapping_add(channels);
                    for (t, acc) in acc.iter_mut().enumerate() {
                        if j >= t * STRIDE && j - t * STRIDE < KW {
                            *acc = s.mul_add(value, weights[j - t * STRIDE], *acc);
                        }
                    }
                }
            }
        });
    }
}

/// Any kernel width, stride, dilation, and any clipping.
///
/// # Safety
/// As [`tile`].
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
unsafe fn tile_any<S: Simd, const T: usize>(s: S, image: &Image<'_>, place: Place) {
    let channels = image.channels;
    let [step, tap_step] = [image.strides[1] * channels, image.dilations[1] * channels];
    // SAFETY: promised by the caller.
    unsafe {
        each_vector(s, image, place, |s, x, w, acc: &mut [S::F32; T], lanes| {
            for kh in 0..place.taps[0] {
                let w = w.add(kh * image.kernel[1] * channels);
                let x = x.wrapping_add(kh * place.row_step);
                for kw in 0..place.taps[1] {
                    let weight = load(s, w.add(kw * channels), lanes);
                    let x = x.wrapping_add(kw * tap_step);
                    for (t, acc) in acc.iter_mut().enumerate() {
                        *acc = s.mul_add(load(s, x.add(t * step), lanes), weight, *acc);
                    }
                }
            }
        });
    }
}

/// A whole vector, or the first `lanes` elements if that is fewer.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, p: *const f32, lanes: usize) -> S::F32 {
    // SAFETY: promised by the caller.
    unsafe {
        if lanes == S::LANES { s.load_ptr(p) } else { s.load_partial(core::slice::from_raw_parts(p, lanes)) }
    }
}

/// Walks the channels: `sum(s, x, w, acc, lanes)` adds to `acc`, everything else happens here.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn each_vector<S: Simd, const T: usize>(
    s: S,
    image: &Image<'_>,
    place: Place,
    sum: impl Fn(S, *const f32, *const f32, &mut [S::F32; T], usize),
) {
    let channels = image.channels;
    let clamp = split_activation(image.activation).0;
    let finish = |acc: &mut [S::F32; T], c: usize, lanes: usize| {
        for (t, acc) in acc.iter_mut().enumerate() {
            let at = t * channels + c;
            // SAFETY: promised by the caller.
            unsafe {
                if !place.residual.is_null() {
                    *acc = s.add(*acc, load(s, place.residual.add(at), lanes));
                }
                if let Some((lo, hi)) = clamp {
                    let (lo, hi) = (s.splat(lo), s.splat(hi));
                    let raised = s.select(s.lt(*acc, lo), lo, *acc);
                    *acc = s.select(s.lt(hi, raised), hi, raised);
                }
                let out = place.out.add(at);
                if lanes == S::LANES {
                    s.store_ptr(out, *acc);
                } else {
                    s.store_partial(core::slice::from_raw_parts_mut(out, lanes), *acc);
                }
            }
        }
    };
    // Two loops, so that in the first one the number of lanes is a constant.
    if channels >= S::LANES {
        let mut c = 0;
        loop {
            // SAFETY: c + LANES <= channels.
            let mut acc = [unsafe { s.load_ptr(image.bias.as_ptr().add(c)) }; T];
            sum(s, place.x.wrapping_add(c), place.w.wrapping_add(c), &mut acc, S::LANES);
            finish(&mut acc, c, S::LANES);
            if c + S::LANES == channels {
                break;
            }
            c = (c + S::LANES).min(channels - S::LANES);
        }
    } else {
        let mut acc = [s.load_partial(image.bias); T];
        sum(s, place.x, place.w, &mut acc, channels);
        finish(&mut acc, 0, channels);
    }
}
