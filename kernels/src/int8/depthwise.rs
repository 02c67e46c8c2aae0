//! Depthwise convolution of bytes, channels last: each channel has its own kernel. And convolutions of groups of a few
//! channels, which are made one.
//!
//! ```text
//! for rows of the output                                  in parallel
//!     for runs of pixels whose taps lie alike             a tap outside of the image reads a pixel of zero points
//!         for 2 pixels at once
//!             for 2 vectors of channels
//!                 acc = bias - x_zero * sum of the weights
//!                 for pairs of rows of taps (r, r + 1)
//!                     for the inputs x of these rows, each loaded once
//!                         acc += dot([x_r, x_r+1], [w_r, w_r+1])   bytes side by side, widened to pairs of i16
//!                 for the row that is left of an odd number
//!                     for pairs of its inputs
//!                         acc += dot([x[j], x[j+1]], weights that meet them)
//!     output(acc)                                         output.rs
//! ```
//!
//! Where four products of unsigned and signed bytes at a time are exact ([`Form::U8S8`]) and vectors short, as in a browser, tiles of widths 3 and 5 take four
//! rows of taps at once, bytes of the same channel beside each other:
//!
//! ```text
//!                 for fours of rows of taps                       those that are missing are zero points of zero weights
//!                     acc += dot([x_r, x_r+1, x_r+2, x_r+3], [w_r, w_r+1, w_r+2, w_r+3])
//! ```
//!
//! One product of pairs does two taps, so that it costs half of what one of floats does. That is for widths 3 and 5 with
//! strides 1 and 2, away from the sides; other pixels and kernels have a list of places, two for each product, and load
//! each input for each tap. Pairs of inputs side by side begin at even places, so that a pixel at an odd one meets them with
//! its weights moved by one: `(w0, w1), (w2, 0)` or `(0, w0), (w1, w2)`. Channels that do not fill the last vectors are
//! computed with vectors that end with them and overlap the ones before; where there are too few for that, the vectors are
//! those of a weaker instruction set.
//!
//! Groups of a few channels, as products, would be matrices of a few columns, of which a tile has room for many, and each
//! would gather patches of its own. They are spread first, as those of floats are ([`crate::conv`]), with planes instead of
//! rows in turns:
//!
//! ```text
//! for each i of the inputs of a group, row of the input                  in parallel
//!     spread[i][row][x][o] = input[row][x][input i of the group of o]
//! sums = as above, with a row of taps in each plane for each row of the kernel
//! ```
//!
//! Where all outputs are less than two of the shortest vectors, pixels of the planes have channels more, of zero weights.

use super::output::Sink;
use super::{Bytes, Form};
use crate::conv::{ConvInput, ConvParams, volume};
use crate::error::Result;
use crate::gemm::Aligned;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Dot, DotKernel, Isa, Kernel, Simd, dispatch, dispatch_dot, dot_available};
use core::ops::Range;

/// The weights of a depthwise convolution.
#[derive(Clone, Debug)]
pub(super) struct QDepthwise {
    /// The one whose vectors the channels fill.
    isa: Isa,
    /// `[pairs of rows][kw][channels]` of `[kd, kh, inputs]` rows, two `i16` each, less their zero points; zeros for the
    /// partner of an odd row. Then, for an odd number of rows, the last of them twice as `[kw / 2 + 1][channels]`, pairs of
    /// its own: from its first weight on, and behind a zero.
    weights: Aligned,
    /// `[fours of rows][kw][channels]` of four bytes each, for unsigned inputs, if all weights are such bytes.
    quads: Option<Aligned>,
    /// Their sum for each channel.
    sums: Vec<i32>,
    /// Inputs of a group and its outputs, if they have to be spread.
    spread: Option<[usize; 2]>,
}

/// Most taps with those of the partner of an odd row; of other kernels each group is a product of its own.
const MAX_TAPS: usize = 100;
/// Lanes of the longest vectors that four rows are joined in. Longer ones take more than shuffles for it: natively MobileNetV2 took
/// 1.05 and EfficientNet-Lite0 1.11 of the time with AVX2, 0.98 and 1.03 with AVX-512 (medians of three, Zen 5).
const MAX_FOURS_LANES: usize = 4;
/// Multiplications that a task should have at least.
const TASK_COST: u64 = 1 << 16;
/// More tasks than this would not balance better.
const MAX_TASKS: u64 = 64;
/// Sums that are kept before they go to the output; 16 KiB.
const CHUNK_SUMS: usize = 4096;

/// Most inputs of a group: each is a plane.
const MAX_INPUTS: usize = 8;
/// Most outputs of a group, the factor by which inputs grow.
const MAX_OUTPUTS: usize = 8;

/// Taps of an even number of rows.
fn padded_taps([kd, kh, kw]: [usize; 3], inputs: usize) -> Option<usize> {
    kd.checked_mul(kh)?.checked_mul(inputs)?.checked_next_multiple_of(2)?.checked_mul(kw)
}

impl QDepthwise {
    /// Whether a convolution can run here, and should.
    pub(super) fn supports(isa: Isa, form: Form, params: &ConvParams) -> bool {
        let ConvParams { in_channels, out_channels, groups, kernel, strides, .. } = *params;
        let (inputs, outputs) = (in_channels / groups, out_channels / groups);
        // Products gather runs of inputs that fill vectors fast. Where runs of 8 do not, spreading them pays if every copy is
        // read several times: 1.4 to 2.4 times as fast, but 0.75 to 1.06 with strides of 2, and 0.3 to
        // 0.6 at 1 x 1.
        let few = if kernel == [1; 3] || strides != [1; 3] { MAX_INPUTS - 1 } else { MAX_INPUTS };
        // One group is no narrower a product than it must be; but patches of one channel are gathered byte by byte.
        (groups > 1 || inputs == 1)
            && (1..=few.min(form.group() * isa.lanes() - 1)).contains(&inputs)
            && outputs <= MAX_OUTPUTS
            && padded_taps(kernel, inputs).is_some_and(|taps| taps <= MAX_TAPS)
    }

    /// Packs `weights` laid out `[channels, inputs, taps]`; lengths were checked.
    pub(super) fn new(isa: Isa, form: Form, params: &ConvParams, weights: Bytes<'_>, zero: &[i32]) -> Result<Self> {
        let ConvParams { in_channels, out_channels, groups, kernel: [kd, kh, kw], .. } = *params;
        let (inputs, outputs) = (in_channels / groups, out_channels / groups);
        let narrowed = isa.narrowed(out_channels / 2);
        // The form is one of `isa`; shorter vectors may not have it.
        let joins_fours = form == Form::U8S8
            && narrowed.lanes() <= MAX_FOURS_LANES
            && (narrowed == isa || dot_available(narrowed, form));
        let isa = narrowed;
        let channels = out_channels.max(2 * isa.lanes());
        let plain = channels == in_channels && channels == out_channels;
        let spread = (!plain || inputs > 1).then_some([inputs, outputs]);
        let taps = kd * kh * inputs * kw;
        let (pairs, side_by_side) = (taps.div_ceil(2 * kw) * kw, kw / 2 + 1);
        let odd = taps / kw % 2 == 1;
        let mut packed = Aligned::zeros((pairs + if odd { 2 * side_by_side } else { 0 }) * channels)?;
        let centred = |c: usize, tap: usize| {
            if tap >= taps || c >= out_channels {
                return 0;
            }
            let (line, input, x) = (tap / kw / inputs, tap / kw % inputs, tap % kw);
            weights.get(((c * inputs + input) * kd * kh + line) * kw + x) - zero[if zero.len() == 1 { 0 } else { c }]
        };
        let (rows, last) = bytemuck::cast_slice_mut::<f32, i32>(packed.as_mut_slice()).split_at_mut(pairs * channels);
        for (pair, row) in rows.chunks_exact_mut(channels).enumerate() {
            let first = pair / kw * 2 * kw + pair % kw;
            for (c, x) in row.iter_mut().enumerate() {
                *x = bytemuck::cast([first, first + kw].map(|tap| centred(c, tap) as i16));
            }
        }
        for (pair, row) in last.chunks_exact_mut(channels).enumerate() {
            let shift = pair / side_by_side;
            let place = 2 * (pair % side_by_side);
            let weight = |c: usize, place: usize| match place.checked_sub(shift) {
                Some(tap) if tap < kw => centred(c, taps - kw + tap) as i16,
                _ => 0,
            };
            for (c, x) in row.iter_mut().enumerate() {
                *x = bytemuck::cast([weight(c, place), weight(c, place + 1)]);
            }
        }
        let sums = (0..channels).map(|c| (0..taps).map(|tap| centred(c, tap)).sum()).collect();
        let byte = |c: usize, tap: usize| i8::try_from(centred(c, tap)).ok();
        let is_bytes = || (0..channels).all(|c| (0..taps).all(|tap| byte(c, tap).is_some()));
        let quads = if joins_fours && matches!((taps / kw, kw), (3, 3) | (_, 5)) && is_bytes() {
            let fours = (taps / kw).div_ceil(4);
            let mut quads = Aligned::zeros(fours * kw * channels)?;
            let lanes = bytemuck::cast_slice_mut::<f32, [i8; 4]>(quads.as_mut_slice());
            for (four, row) in lanes.chunks_exact_mut(channels).enumerate() {
                let first = four / kw * 4 * kw + four % kw;
                for (c, lane) in row.iter_mut().enumerate() {
                    *lane = [0, 1, 2, 3].map(|r| byte(c, first + r * kw).unwrap_or(0));
                }
            }
            Some(quads)
        } else {
            None
        };
        Ok(Self { isa, weights: packed, quads, sums, spread })
    }

    pub(super) fn bytes(&self) -> usize {
        let quads = self.quads.as_ref().map_or(0, |quads| size_of_val(quads.as_slice()));
        size_of_val(self.weights.as_slice()) + quads + size_of_val(&self.sums[..])
    }

    /// # Errors
    /// If what is spread does not fit the address space.
    ///
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
        let [od, oh, ow] = out_spatial;
        let [id, ih, iw] = input.spatial;
        let channels = self.sums.len();
        let rows = input.batch * od * oh;
        let [inputs, outputs] = self.spread.unwrap_or([1; 2]);
        let taps = params.kernel.iter().product::<usize>() * inputs;
        let cost = ((rows * ow) as u64).saturating_mul((channels * taps) as u64);
        let tasks = (cost / TASK_COST).clamp(1, MAX_TASKS.min(rows as u64)) as usize;
        let chunk = (CHUNK_SUMS / channels).next_multiple_of(2).max(2).min(ow);
        let lines = input.batch * id * ih;
        let plane = volume(&[lines, iw, channels])?;
        let spread_len = if self.spread.is_some() { volume(&[plane, inputs])?.div_ceil(4) } else { 0 };
        cx.with_workspace(channels + channels.div_ceil(4) + spread_len, |workspace| {
            let (first, workspace) = workspace.split_at_mut(channels);
            let (zeros, spread) = workspace.split_at_mut(channels.div_ceil(4));
            let first: &mut [i32] = bytemuck::cast_slice_mut(first);
            for (c, first) in first.iter_mut().enumerate() {
                let bias = bias.and_then(|bias| bias.get(c)).copied().unwrap_or(0);
                *first = bias.wrapping_sub(x_zero * self.sums[c]);
            }
            let zeros: &mut [u8] = bytemuck::cast_slice_mut(zeros);
            zeros.fill(x_zero as u8);
            let spread: &mut [u8] = bytemuck::cast_slice_mut(spread);
            if self.spread.is_some() && plane > 0 {
                let from: &[u8] = match x {
                    Bytes::U8(x) => x,
                    Bytes::I8(x) => bytemuck::cast_slice(x),
                };
                // Whole lines if nothing is filled up.
                let unit = if channels == params.out_channels { iw } else { 1 };
                let to = DisjointMut::new(&mut *spread);
                cx.for_each(lines * inputs, (plane * inputs) as u64, &|task| {
                    let (input, line) = (task / lines, task % lines);
                    // SAFETY: each task has its own line.
                    let to = unsafe { to.range(task * iw * channels, iw * channels) };
                    let from = &from[line * iw * params.in_channels..][..iw * params.in_channels];
                    for (i, from) in from.chunks_exact(unit * params.in_channels).enumerate() {
                        repeat(&from[input..], inputs, &mut to[i * unit * channels..], outputs);
                    }
                });
            }
            let image = Image {
                x: if self.spread.is_some() { spread.as_ptr() } else { x.as_ptr() },
                signed: matches!(x, Bytes::I8(_)),
                weights: bytemuck::cast_slice(self.weights.as_slice()),
                quads: self.quads.as_ref().map(|quads| bytemuck::cast_slice(quads.as_slice())),
                first,
                zeros,
                params,
                spatial: input.spatial,
                out_spatial,
                pads: input.pads_begin,
                interior: params.interior(input, ow),
                planes: inputs,
                plane,
                taps: taps.div_ceil(2 * params.kernel[2]) * 2 * params.kernel[2],
            };
            cx.for_each_scratch(tasks, cost, chunk * channels, &|task, sums| {
                let sums: &mut [i32] = bytemuck::cast_slice_mut(sums);
                let mut places = [[image.padding(); MAX_TAPS]; 2];
                for row in crate::gemm::part(rows, tasks, task) {
                    for first in (0..ow).step_by(chunk) {
                        let columns = first..(first + chunk).min(ow);
                        image.pixels(self.isa, row, columns.clone(), sums, &mut places);
                        // SAFETY: the caller's contract; tasks have different rows.
                        unsafe {
                            let pixels = row * ow + columns.start..row * ow + columns.end;
                            sink.finish(self.isa, sums.as_ptr(), channels, pixels, 0..params.out_channels);
                        }
                    }
                }
            });
        });
        Ok(())
    }
}

/// Every `step`th byte `times` times, at most [`MAX_OUTPUTS`]; behind the last one is room, or it may be written to.
fn repeat(from: &[u8], step: usize, to: &mut [u8], times: usize) {
    for (i, &x) in from.iter().step_by(step).enumerate() {
        let to = &mut to[i * times..];
        // Not `fill`, of which LLVM makes one call of `memset` for all lengths.
        let bytes = (u64::from(x) * 0x0101_0101_0101_0101).to_ne_bytes();
        match to.first_chunk_mut() {
            // What is too much is overwritten by the next.
            Some(to) => *to = bytes,
            None => to[..times].copy_from_slice(&bytes[..times]),
        }
    }
}

/// All of one convolution.
struct Image<'a> {
    x: *const u8,
    signed: bool,
    weights: &'a [i32],
    quads: Option<&'a [i32]>,
    /// What sums begin with.
    first: &'a [i32],
    /// A pixel of padding.
    zeros: &'a [u8],
    params: &'a ConvParams,
    spatial: [usize; 3],
    out_spatial: [usize; 3],
    pads: [usize; 3],
    interior: Range<usize>,
    /// Of the input, and the bytes of each.
    planes: usize,
    plane: usize,
    /// With those of the partner of an odd row.
    taps: usize,
}

// SAFETY: the pointer is of a slice that lives as long as the image, and is only read.
unsafe impl Sync for Image<'_> {}

/// Where a tap of a pixel is, and how far it is to that of the next pixel.
#[derive(Clone, Copy)]
struct Tap {
    x: *const u8,
    step: usize,
}

impl Image<'_> {
    /// A tap, or a row of them, outside of the image.
    fn padding(&self) -> Tap {
        Tap { x: self.zeros.as_ptr(), step: 0 }
    }

    /// Sums of some pixels of one row of the output, `[pixels, channels]`. `rows` and `taps` are room for them.
    fn pixels(
        &self,
        isa: Isa,
        row: usize,
        columns: Range<usize>,
        sums: &mut [i32],
        [rows, taps]: &mut [[Tap; MAX_TAPS]; 2],
    ) {
        let ConvParams { kernel: [kd, kh, kw], strides, dilations, .. } = *self.params;
        let channels = self.first.len();
        let [id, ih, iw] = self.spatial;
        let [od, oh, _] = self.out_spatial;
        let (b, z, y) = (row / oh / od, row / oh % od, row % oh);
        // Positions in the padded image cannot overflow: it was checked to be half an address space at most.
        let position =
            |d: usize, out: usize, tap: usize| (out * strides[d] + tap * dilations[d]) as isize - self.pads[d] as isize;
        let inside = |position: isize, size: usize| position >= 0 && position < size as isize;
        let count_of_rows = kd * kh * self.planes;
        // Those behind are padding, and stay it.
        let (rows, fours) = (rows, count_of_rows.next_multiple_of(4));
        // An odd row is paired with zero points, whose weights are zero.
        let taps = &mut taps[..self.taps];
        let mut column = columns.start;
        while column < columns.end {
            let interior = self.interior.contains(&column);
            let count = if interior { self.interior.end.min(columns.end) - column } else { 1 };
            // Rows of taps; those outside of the image are zero points however far one goes.
            rows[..count_of_rows].fill(self.padding());
            for (line, rows) in rows[..count_of_rows].chunks_exact_mut(self.planes).enumerate() {
                let (iz, iy) = (position(0, z, line / kh), position(1, y, line % kh));
                if inside(iz, id) && inside(iy, ih) {
                    let line = ((b * id + iz as usize) * ih + iy as usize) * iw;
                    // May lie before the line, where no tap of it is read.
                    let first = line as isize + position(2, column, 0);
                    let x = self.x.wrapping_offset(first.wrapping_mul(channels as isize));
                    for (i, row) in rows.iter_mut().enumerate() {
                        *row = Tap { x: x.wrapping_add(i * self.plane), step: channels };
                    }
                }
            }
            let sums = &mut sums[(column - columns.start) * channels..][..count * channels];
            // Two pixels at once.
            let tiled = if interior && dilations[2] == 1 { count / 2 * 2 } else { 0 };
            let tile = |sums: &mut [i32]| match self.quads {
                Some(weights) if !self.signed => self.quad_tiles(isa, weights, &rows[..fours], sums),
                _ => self.tiles(isa, &rows[..count_of_rows], sums),
            };
            let tiled = if tiled > 0 && tile(&mut sums[..tiled * channels]) { tiled } else { 0 };
            if tiled < count {
                let step = strides[2] * channels;
                taps.fill(self.padding());
                for (row, first) in rows[..count_of_rows].iter().enumerate().filter(|(_, row)| row.step > 0) {
                    for kx in 0..kw {
                        if inside(position(2, column + tiled, kx), iw) {
                            let x = first.x.wrapping_add(tiled * step + kx * dilations[2] * channels);
                            taps[(row / 2 * kw + kx) * 2 + row % 2] = Tap { x, step };
                        }
                    }
                }
                let (count, sums) = (count - tiled, &mut sums[tiled * channels..]);
                if self.signed {
                    dispatch(isa, Pixels::<true> { image: self, taps: &mut *taps, count, sums });
                } else {
                    dispatch(isa, Pixels::<false> { image: self, taps: &mut *taps, count, sums });
                }
            }
            column += count;
        }
    }
}

impl Image<'_> {
    /// Sums of an even number of pixels whose taps all lie inside the line, unless no tile is for this kernel.
    fn tiles(&self, isa: Isa, rows: &[Tap], sums: &mut [i32]) -> bool {
        let image = self;
        macro_rules! tiles {
            ($kw:literal, $stride:literal) => {
                if self.signed {
                    dispatch(isa, Tiles::<$kw, $stride, true> { image, rows, sums })
                } else {
                    dispatch(isa, Tiles::<$kw, $stride, false> { image, rows, sums })
                }
            };
        }
        match (self.params.kernel[2], self.params.strides[2]) {
            (3, 1) => tiles!(3, 1),
            (3, 2) => tiles!(3, 2),
            (5, 1) => tiles!(5, 1),
            (5, 2) => tiles!(5, 2),
            _ => return false,
        }
        true
    }
}

impl Image<'_> {
    /// [`tiles`](Self::tiles) of unsigned bytes, by fours of rows; those that are missing are padding.
    fn quad_tiles(&self, isa: Isa, weights: &[i32], rows: &[Tap], sums: &mut [i32]) -> bool {
        let image = self;
        macro_rules! tiles {
            ($kw:literal, $stride:literal, $three:literal) => {
                dispatch_dot(isa, Form::U8S8, QuadTiles::<$kw, $stride, $three> { image, weights, rows, sums })
            };
        }
        match (self.params.kernel[2], self.params.strides[2]) {
            (3, 1) => tiles!(3, 1, true),
            (3, 2) => tiles!(3, 2, true),
            (5, 1) => tiles!(5, 1, false),
            (5, 2) => tiles!(5, 2, false),
            _ => return false,
        }
        true
    }
}

/// An expression for each `i` below `n`, which is at most 5, written out: a loop that LLVM does not unroll keeps vectors in
/// memory.
macro_rules! unrolled {
    ($i:ident in 0..$n:expr, $body:expr) => {
        unrolled!(@ $i, $n, $body, 0 1 2 3 4)
    };
    (@ $i:ident, $n:expr, $body:expr, $($value:literal)*) => {{
        $(if $value < $n {
            let $i = $value;
            $body
        })*
    }};
}

/// Pixels side by side, two at once, for a known width of the kernel and stride. Whoever makes one promises that all
/// their taps can be read: `rows` says where the first of each row is, and how far it is to the next in it.
struct Tiles<'a, const KW: usize, const STRIDE: usize, const SIGNED: bool> {
    image: &'a Image<'a>,
    rows: &'a [Tap],
    /// An even number of rows of all channels.
    sums: &'a mut [i32],
}

impl<const KW: usize, const STRIDE: usize, const SIGNED: bool> Kernel for Tiles<'_, KW, STRIDE, SIGNED> {
    type Output = ();

    // Not inlined on wasm: optimising compilers choke on huge functions.
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { image, rows, sums } = self;
        let channels = image.first.len();
        let (width, lanes) = (2 * S::LANES, S::LANES);
        let (pairs, odd) = rows.as_chunks::<2>();
        for (tile, sums) in sums.chunks_exact_mut(2 * channels).enumerate() {
            let sums = sums.as_mut_ptr();
            let mut c = 0;
            loop {
                // SAFETY: the contract of the type; c + width <= channels, and weights have KW rows for each pair of rows.
                unsafe {
                    let first = image.first.as_ptr().add(c);
                    let mut acc = [[s.load_i32_ptr(first), s.load_i32_ptr(first.add(lanes))]; 2];
                    let mut w = image.weights.as_ptr().add(c);
                    for [upper, lower] in pairs {
                        let x = upper.x.wrapping_add(tile * 2 * STRIDE * upper.step + c);
                        let y = lower.x.wrapping_add(tile * 2 * STRIDE * lower.step + c);
                        unrolled!(kw in 0..KW, {
                            let w = w.add(kw * channels);
                            let weights = [s.load_i32_ptr(w), s.load_i32_ptr(w.add(lanes))];
                            // The compiler sees inputs that are the same for both pixels.
                            for (t, acc) in acc.iter_mut().enumerate() {
                                let j = t * STRIDE + kw;
                                let x = s.pair_bytes::<SIGNED>(x.wrapping_add(j * upper.step), y.wrapping_add(j * lower.step));
                                acc[0] = s.add_i32(acc[0], s.dot_i16(x[0], weights[0]));
                                acc[1] = s.add_i32(acc[1], s.dot_i16(x[1], weights[1]));
                            }
                        });
                        w = w.add(KW * channels);
                    }
                    for row in odd {
                        // Behind the pairs of an odd row and the one that it has not.
                        let w = w.add(KW * channels);
                        let mut x = row.x.wrapping_add(tile * 2 * STRIDE * row.step + c);
                        for p in 0..(STRIDE + KW).div_ceil(2) {
                            // The last input may have no neighbour; then its weight is zero.
                            let next = if 2 * p + 1 < STRIDE + KW { x.wrapping_add(row.step) } else { x };
                            let pair = s.pair_bytes::<SIGNED>(x, next);
                            for (t, acc) in acc.iter_mut().enumerate() {
                                let (shift, before) = (t * STRIDE % 2, t * STRIDE / 2);
                                if p >= before && p - before <= KW / 2 {
                                    let w = w.add((shift * (KW / 2 + 1) + p - before) * channels);
                                    acc[0] = s.add_i32(acc[0], s.dot_i16(pair[0], s.load_i32_ptr(w)));
                                    acc[1] = s.add_i32(acc[1], s.dot_i16(pair[1], s.load_i32_ptr(w.add(lanes))));
                                }
                            }
                            x = x.wrapping_add(2 * row.step);
                        }
                    }
                    for (t, acc) in acc.iter().enumerate() {
                        s.store_i32_ptr(sums.add(t * channels + c), acc[0]);
                        s.store_i32_ptr(sums.add(t * channels + c + lanes), acc[1]);
                    }
                }
                if c + width == channels {
                    break;
                }
                c = (c + width).min(channels - width);
            }
        }
    }
}

/// [`Tiles`] of unsigned bytes by products of four rows at once, of which the last is padding if there are `THREE` in all. The
/// same contract.
struct QuadTiles<'a, const KW: usize, const STRIDE: usize, const THREE: bool> {
    image: &'a Image<'a>,
    /// `[fours of rows][KW][channels]`.
    weights: &'a [i32],
    /// Fours.
    rows: &'a [Tap],
    /// An even number of rows of all channels.
    sums: &'a mut [i32],
}

impl<const KW: usize, const STRIDE: usize, const THREE: bool> DotKernel for QuadTiles<'_, KW, STRIDE, THREE> {
    type Output = ();

    // Not inlined on wasm: optimising compilers choke on huge functions.
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<D: Dot>(self, d: D) {
        let Self { image, weights, rows, sums } = self;
        let s = d.simd();
        let (channels, lanes) = (image.first.len(), <D::S as Simd>::LANES);
        let width = 2 * lanes;
        for (tile, sums) in sums.chunks_exact_mut(2 * channels).enumerate() {
            let sums = sums.as_mut_ptr();
            let mut c = 0;
            loop {
                // SAFETY: the contract of the type; c + width <= channels, and weights have KW rows for each four rows.
                unsafe {
                    let first = image.first.as_ptr().add(c);
                    let mut acc = [[s.load_i32_ptr(first), s.load_i32_ptr(first.add(lanes))]; 2];
                    let mut w = weights.as_ptr().add(c);
                    for four in rows.as_chunks::<4>().0 {
                        let [p, q, r, u] = four;
                        // A macro: a closure would not be compiled for the instruction set.
                        macro_rules! place {
                            ($row:ident, $j:expr) => {
                                $row.x.wrapping_add((tile * 2 * STRIDE + $j) * $row.step + c)
                            };
                        }
                        unrolled!(kw in 0..KW, {
                            let w = w.add(kw * channels);
                            let weights = [s.load_i32_ptr(w), s.load_i32_ptr(w.add(lanes))];
                            // The compiler sees inputs that are the same for both pixels.
                            for (t, acc) in acc.iter_mut().enumerate() {
                                let j = t * STRIDE + kw;
                                // Known to stay where it is, padding is read once.
                                let last = if THREE { u.x.wrapping_add(c) } else { place!(u, j) };
                                let x = s.quad_bytes([place!(p, j), place!(q, j), place!(r, j), last]);
                                acc[0] = d.dot(acc[0], x[0], weights[0]);
                                acc[1] = d.dot(acc[1], x[1], weights[1]);
                            }
                        });
                        w = w.add(KW * channels);
                    }
                    for (t, acc) in acc.iter().enumerate() {
                        s.store_i32_ptr(sums.add(t * channels + c), acc[0]);
                        s.store_i32_ptr(sums.add(t * channels + c + lanes), acc[1]);
                    }
                }
                if c + width == channels {
                    break;
                }
                c = (c + width).min(channels - width);
            }
        }
    }
}

/// Pixels side by side whose taps all lie inside the image or are zero points. Whoever makes one promises that.
struct Pixels<'a, const SIGNED: bool> {
    image: &'a Image<'a>,
    taps: &'a mut [Tap],
    count: usize,
    /// `count` rows of all channels.
    sums: &'a mut [i32],
}

impl<const SIGNED: bool> Kernel for Pixels<'_, SIGNED> {
    type Output = ();

    // Not inlined on wasm: optimising compilers choke on huge functions.
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { image, taps, count, sums } = self;
        let channels = image.first.len();
        let mut p = 0;
        while p < count {
            let columns = if p + 2 <= count { 2 } else { 1 };
            let sums = &mut sums[p * channels..][..columns * channels];
            // SAFETY: the contract of the type.
            unsafe {
                let sums = sums.as_mut_ptr();
                if columns == 2 {
                    pixels::<S, SIGNED, 2>(s, image, taps, sums);
                } else {
                    pixels::<S, SIGNED, 1>(s, image, taps, sums);
                }
            }
            for tap in taps.iter_mut() {
                tap.x = tap.x.wrapping_add(columns * tap.step);
            }
            p += columns;
        }
    }
}

/// `T` pixels.
///
/// # Safety
/// There are two vectors of channels at least; for all of them taps are readable and `T` rows of sums writable.
#[inline(always)]
unsafe fn pixels<S: Simd, const SIGNED: bool, const T: usize>(s: S, image: &Image<'_>, taps: &[Tap], sums: *mut i32) {
    let channels = image.first.len();
    let width = 2 * S::LANES;
    let mut c = 0;
    // SAFETY: promised by the caller; c + width <= channels, and weights have a row for each pair of taps.
    unsafe {
        loop {
            let first = image.first.as_ptr().add(c);
            let mut acc = [[s.load_i32_ptr(first), s.load_i32_ptr(first.add(S::LANES))]; T];
            let mut w = image.weights.as_ptr().add(c);
            for pair in taps.chunks_exact(2) {
                let weights = [s.load_i32_ptr(w), s.load_i32_ptr(w.add(S::LANES))];
                for (t, acc) in acc.iter_mut().enumerate() {
                    let x = s
                        .pair_bytes::<SIGNED>(pair[0].x.add(t * pair[0].step + c), pair[1].x.add(t * pair[1].step + c));
                    acc[0] = s.add_i32(acc[0], s.dot_i16(x[0], weights[0]));
                    acc[1] = s.add_i32(acc[1], s.dot_i16(x[1], weights[1]));
                }
                w = w.add(channels);
            }
            for (t, acc) in acc.iter().enumerate() {
                s.store_i32_ptr(sums.add(t * channels + c), acc[0]);
                s.store_i32_ptr(sums.add(t * channels + c + S::LANES), acc[1]);
            }
            if c + width == channels {
                break;
            }
            c = (c + width).min(channels - width);
        }
    }
}
