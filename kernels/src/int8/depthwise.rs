//! Depthwise convolution of bytes, channels last: each channel has its own kernel. And convolutions of groups of a few
//! channels, which are made one.
//!
//! ```text
//! for rows of the output                                  in parallel
//!     for runs of pixels
//!         for 2 or 4 vectors of channels
//!             for bundles of 2 or 4 rows of taps          those that are missing are zero points of zero weights
//!                 for columns of the image under the run  outside of it zero points: a run knows no sides
//!                     lanes[column] = [x_r, x_r+1] as i16, or [x_r, x_r+1, x_r+2, x_r+3]
//!                 for pixels of the run                   2 vectors at once
//!                     acc = bias - x_zero * sum of the weights, or what the bundle before left
//!                     for columns under the pixel
//!                         acc += dot(lanes[column], [w_r, w_r+1, ...])
//!             output(acc)                                 in registers if it quantises and adds nothing; output.rs
//! ```
//!
//! Rows of the same channel lie side by side in a lane, so that one product does two taps, and costs half of what one of
//! floats does. Bundles are of four where four products of bytes at a time are exact ([`Form::U8S8`], [`Form::S8S8`]), weights are
//! such bytes and vectors short, as in a browser; inputs of the other sign are moved by 128. Columns are joined once for all
//! pixels that read them. Weights of kernels of widths 3 and 5 stay in registers.
//!
//! Channels that do not fill the last vectors are computed with vectors that end with them and overlap the ones before;
//! where there are too few for that, the vectors are those of a weaker instruction set.
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

use super::output::{Columns, Quantized, Sink};
use super::{Bytes, Form};
use crate::conv::{ConvInput, ConvParams, volume};
use crate::error::Result;
use crate::gemm::Aligned;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Dot, DotKernel, Isa, Simd, dispatch_dot, dot_available};
use core::ops::Range;

/// The weights of a depthwise convolution.
#[derive(Clone, Debug)]
pub(super) struct QDepthwise {
    /// The one whose vectors the channels fill.
    isa: Isa,
    /// Of bytes, or [`Form::Wide`].
    form: Form,
    /// `[bundles of rows][kw][channels]` of `[kd, kh, inputs]` rows, two `i16` or four bytes each, less their zero points; zeros
    /// for rows that are missing in the last bundle.
    weights: Aligned,
    /// Their sum for each channel.
    sums: Vec<i32>,
    /// Inputs of a group and its outputs, if they have to be spread.
    spread: Option<[usize; 2]>,
}

/// Most taps with those that are missing in a last bundle of two; of other kernels each group is a product of its own. As many
/// rows are whole bundles of four.
const MAX_TAPS: usize = 100;
/// Lanes of the longest vectors that four rows are joined in: longer ones take more than shuffles for it.
const MAX_FOURS_LANES: usize = 4;
/// Multiplications that a task should have at least.
const TASK_COST: u64 = 1 << 16;
/// More tasks than this would not balance better.
const MAX_TASKS: u64 = 64;
/// Sums that are kept before they go to the output; 16 KiB.
const CHUNK_SUMS: usize = 4096;
/// Columns that are joined at once: with four rows of lines of the cache they stay in its first level.
const COLUMNS: usize = 128;

/// Most inputs of a group: each is a plane.
const MAX_INPUTS: usize = 8;
/// Most outputs of a group, the factor by which inputs grow.
const MAX_OUTPUTS: usize = 8;

/// Taps of whole bundles of two rows.
fn padded_taps([kd, kh, kw]: [usize; 3], inputs: usize) -> Option<usize> {
    kd.checked_mul(kh)?.checked_mul(inputs)?.checked_next_multiple_of(2)?.checked_mul(kw)
}

impl QDepthwise {
    /// Whether a convolution can run here, and should.
    pub(super) fn supports(isa: Isa, form: Form, params: &ConvParams) -> bool {
        let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = *params;
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
            && (kernel[2] - 1).checked_mul(dilations[2]).is_some_and(|reach| reach < COLUMNS)
    }

    /// Packs `weights` laid out `[channels, inputs, taps]`; lengths were checked.
    pub(super) fn new(isa: Isa, form: Form, params: &ConvParams, weights: Bytes<'_>, zero: &[i32]) -> Result<Self> {
        let ConvParams { in_channels, out_channels, groups, kernel: [kd, kh, kw], .. } = *params;
        let (inputs, outputs) = (in_channels / groups, out_channels / groups);
        let narrowed = isa.narrowed(out_channels / 2);
        // The form is one of `isa`; shorter vectors may not have it.
        let joins_fours = matches!(form, Form::U8S8 | Form::S8S8)
            && narrowed.lanes() <= MAX_FOURS_LANES
            && out_channels >= 4 * narrowed.lanes()
            && (narrowed == isa || dot_available(narrowed, form));
        let isa = narrowed;
        let channels = out_channels.max(2 * isa.lanes());
        let plain = channels == in_channels && channels == out_channels;
        let spread = (!plain || inputs > 1).then_some([inputs, outputs]);
        let taps = kd * kh * inputs * kw;
        let centred = |c: usize, tap: usize| {
            if tap >= taps || c >= out_channels {
                return 0;
            }
            let (line, input, x) = (tap / kw / inputs, tap / kw % inputs, tap % kw);
            weights.get(((c * inputs + input) * kd * kh + line) * kw + x) - zero[if zero.len() == 1 { 0 } else { c }]
        };
        let is_byte = |x: i32| i8::try_from(x).is_ok();
        let bytes = joins_fours && (0..channels).all(|c| (0..taps).all(|tap| is_byte(centred(c, tap))));
        let form = if bytes { form } else { Form::Wide };
        let bundle = form.group();
        let mut packed = Aligned::zeros((taps / kw).div_ceil(bundle) * kw * channels)?;
        let lanes = bytemuck::cast_slice_mut::<f32, [u8; 4]>(packed.as_mut_slice());
        for (row, lanes) in lanes.chunks_exact_mut(channels).enumerate() {
            let first = row / kw * bundle * kw + row % kw;
            for (c, lane) in lanes.iter_mut().enumerate() {
                *lane = if bytes {
                    [0, 1, 2, 3].map(|r| centred(c, first + r * kw) as u8)
                } else {
                    bytemuck::cast([0, 1].map(|r| centred(c, first + r * kw) as i16))
                };
            }
        }
        let sums = (0..channels).map(|c| (0..taps).map(|tap| centred(c, tap)).sum()).collect();
        Ok(Self { isa, form, weights: packed, sums, spread })
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.weights.as_slice()) + size_of_val(&self.sums[..])
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
        // What inputs are moved by to have the sign of the form.
        let shift = match (self.form, x) {
            (Form::U8S8, Bytes::I8(_)) => 128,
            (Form::S8S8, Bytes::U8(_)) => -128,
            _ => 0,
        };
        let width = vectors(self.form) * self.isa.lanes();
        // All columns, and all of an output that they fill.
        let quantized = sink.quantized().filter(|_| channels == params.out_channels);
        let [.., stride] = params.strides;
        let reach = (params.kernel[2] - 1) * params.dilations[2];
        let mut chunk = ((COLUMNS - 1 - reach) / stride + 1).min(ow);
        if quantized.is_none() {
            chunk = chunk.min((CHUNK_SUMS / channels).max(2));
        }
        let ld = if quantized.is_some() { width } else { channels };
        let lines = input.batch * id * ih;
        let plane = volume(&[lines, iw, channels])?;
        let spread_len = if self.spread.is_some() { volume(&[plane, inputs])?.div_ceil(4) } else { 0 };
        cx.with_workspace(channels + channels.div_ceil(4) + spread_len, |workspace| {
            let (first, workspace) = workspace.split_at_mut(channels);
            let (zeros, spread) = workspace.split_at_mut(channels.div_ceil(4));
            let first: &mut [i32] = bytemuck::cast_slice_mut(first);
            for (c, first) in first.iter_mut().enumerate() {
                let bias = bias.and_then(|bias| bias.get(c)).copied().unwrap_or(0);
                *first = bias.wrapping_sub((x_zero + shift) * self.sums[c]);
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
                flip: if shift == 0 { 0 } else { 0x80 },
                form: self.form,
                weights: bytemuck::cast_slice(self.weights.as_slice()),
                first,
                zeros,
                params,
                spatial: input.spatial,
                out_spatial,
                pads: input.pads_begin,
                planes: inputs,
                plane,
            };
            cx.for_each_scratch(tasks, cost, chunk * ld + COLUMNS * width, &|task, scratch| {
                let (sums, lanes) = bytemuck::cast_slice_mut(scratch).split_at_mut(chunk * ld);
                for row in crate::gemm::part(rows, tasks, task) {
                    for first in (0..ow).step_by(chunk) {
                        let columns = first..(first + chunk).min(ow);
                        let pixels = row * ow + columns.start..row * ow + columns.end;
                        let to = quantized.map(|quantized| (quantized, pixels.start));
                        image.pixels(self.isa, row, columns, lanes, sums, to);
                        if quantized.is_none() {
                            // SAFETY: the caller's contract; tasks have different rows.
                            unsafe { sink.finish(self.isa, sums.as_ptr(), channels, pixels, 0..params.out_channels) };
                        }
                    }
                }
            });
        });
        Ok(())
    }
}

/// Vectors of channels that are joined at once: 16 bytes of short vectors, or half of that if they are widened.
const fn vectors(form: Form) -> usize {
    if form.group() == 4 { 4 } else { 2 }
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
    /// Exclusive or that moves bytes.
    flip: u8,
    form: Form,
    weights: &'a [i32],
    /// What sums begin with.
    first: &'a [i32],
    /// A pixel of padding.
    zeros: &'a [u8],
    params: &'a ConvParams,
    spatial: [usize; 3],
    out_spatial: [usize; 3],
    pads: [usize; 3],
    /// Of the input, and the bytes of each.
    planes: usize,
    plane: usize,
}

// SAFETY: the pointer is of a slice that lives as long as the image, and is only read.
unsafe impl Sync for Image<'_> {}

/// Where the first of a row of taps is, and how far it is to the next column.
#[derive(Clone, Copy)]
struct Tap {
    x: *const u8,
    step: usize,
}

impl Image<'_> {
    /// A row of taps outside of the image.
    fn padding(&self) -> Tap {
        Tap { x: self.zeros.as_ptr(), step: 0 }
    }

    /// Position in the padded image less its padding, of a tap of an element of the output. It cannot overflow: the padded
    /// image was checked to be half an address space at most.
    fn position(&self, d: usize, out: usize, tap: usize) -> isize {
        (out * self.params.strides[d] + tap * self.params.dilations[d]) as isize - self.pads[d] as isize
    }

    /// Where the rows of taps of a pixel begin; those outside of the image are zero points however far one goes.
    fn rows_of(&self, row: usize, column: usize, rows: &mut [Tap]) {
        let [_, kh, _] = self.params.kernel;
        let channels = self.first.len();
        let [id, ih, iw] = self.spatial;
        let [od, oh, _] = self.out_spatial;
        let (b, z, y) = (row / oh / od, row / oh % od, row % oh);
        rows.fill(self.padding());
        for (line, rows) in rows.chunks_exact_mut(self.planes).enumerate() {
            let (iz, iy) = (self.position(0, z, line / kh), self.position(1, y, line % kh));
            if inside(iz, id) && inside(iy, ih) {
                let line = ((b * id + iz as usize) * ih + iy as usize) * iw;
                // May lie before the line, where no tap of it is read.
                let first = line as isize + self.position(2, column, 0);
                let x = self.x.wrapping_offset(first.wrapping_mul(channels as isize));
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = Tap { x: x.wrapping_add(i * self.plane), step: channels };
                }
            }
        }
    }

    /// Number of rows of taps.
    fn count_of_rows(&self) -> usize {
        self.params.kernel[0] * self.params.kernel[1] * self.planes
    }

    /// Sums of some pixels of one row of the output, `[pixels, channels]`. `to` is an output for which they need not be kept, and
    /// the first pixel in it; then `sums` is room for them.
    fn pixels(
        &self,
        isa: Isa,
        row: usize,
        columns: Range<usize>,
        lanes: &mut [i32],
        sums: &mut [i32],
        to: Option<(&Quantized<'_>, usize)>,
    ) {
        let ConvParams { kernel: [_, _, kw], strides, dilations, .. } = *self.params;
        let count = self.count_of_rows();
        // Those behind are padding.
        let mut rows = [self.padding(); MAX_TAPS];
        self.rows_of(row, columns.start, &mut rows[..count]);
        let rows = &rows[..count.next_multiple_of(self.form.group())];
        let first = self.position(2, columns.start, 0);
        let len = (columns.len() - 1) * strides[2] + (kw - 1) * dilations[2] + 1;
        // Which of the columns lie inside the line.
        let end = (self.spatial[2] as isize - first).clamp(0, len as isize) as usize;
        let inside = (-first).clamp(0, end as isize) as usize..end;
        let (image, pixels) = (self, columns.len());
        assert!(lanes.len() >= vectors(self.form) * isa.lanes() * len);
        macro_rules! pixels {
            ($kw:literal) => {
                dispatch_dot(isa, self.form, Pixels::<$kw> { image, rows, len, inside, lanes, pixels, sums, to })
            };
        }
        match kw {
            3 if dilations[2] == 1 => pixels!(3),
            5 if dilations[2] == 1 => pixels!(5),
            _ => pixels!(0),
        }
    }
}

fn inside(position: isize, size: usize) -> bool {
    position >= 0 && position < size as isize
}

/// Pixels side by side. Whoever makes one promises that taps of columns `inside` can be read, that there is room for the sums,
/// and that the output has the pixels and nobody else uses them.
struct Pixels<'a, const KW: usize> {
    image: &'a Image<'a>,
    /// Where their first columns are; whole bundles.
    rows: &'a [Tap],
    /// Columns under the pixels.
    len: usize,
    /// Those of them that are in the image.
    inside: Range<usize>,
    /// Room for [`vectors`] for each.
    lanes: &'a mut [i32],
    pixels: usize,
    /// `[pixels, channels]`, or [`vectors`] for each pixel if there is an output.
    sums: &'a mut [i32],
    to: Option<(&'a Quantized<'a>, usize)>,
}

/// For a kernel of width `KW` without dilation, or of any if that is 0.
impl<const KW: usize> DotKernel for Pixels<'_, KW> {
    type Output = ();

    // Not inlined on wasm: optimising compilers choke on huge functions.
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<D: Dot>(self, d: D) {
        // Constant: what no weights are packed for leaves no code.
        if const { matches!(D::FORM, Form::Split) } {
            unreachable!("no bundles of rows for {:?}", D::FORM);
        }
        let Self { image, rows, len, inside, lanes, pixels, sums, to } = self;
        let s = d.simd();
        let (channels, vector) = (image.first.len(), <D::S as Simd>::LANES);
        let width = const { vectors(D::FORM) } * vector;
        let ConvParams { kernel: [_, _, kw], strides, dilations, .. } = *image.params;
        // Both may be anything where there is one tap, or one pixel, and no next.
        let (kw, next) = if KW == 0 { (kw, dilations[2].wrapping_mul(width)) } else { (KW, width) };
        let stride = strides[2].wrapping_mul(width);
        let lanes = lanes.as_mut_ptr();
        let flip = s.splat_i32(i32::from_ne_bytes([image.flip; 4]));
        let zero = image.zeros[0];
        let padding = if const { D::FORM.group() == 4 } {
            s.splat_i32(i32::from_ne_bytes([zero ^ image.flip; 4]))
        } else {
            s.splat_i16(if image.signed { (zero as i8).into() } else { zero.into() })
        };
        // Sides are the same for all channels.
        for column in (0..inside.start).chain(inside.end..len) {
            for part in (0..width).step_by(vector) {
                // SAFETY: the contract of the type.
                unsafe { s.store_i32_ptr(lanes.add(column * width + part), padding) };
            }
        }
        let mut c = 0;
        loop {
            let bundles = rows.chunks_exact(const { D::FORM.group() });
            let last = bundles.len() - 1;
            for (bundle, rows) in bundles.enumerate() {
                // A macro: a closure would not be compiled for the instruction set.
                macro_rules! columns {
                    (|$places:ident| $vectors:expr) => {{
                        // Of two rows the others are not read.
                        let mut $places = [0, 1, 2, 3].map(|r| {
                            let row = rows[r % rows.len()];
                            row.x.wrapping_add(inside.start * row.step + c)
                        });
                        let mut to = lanes.wrapping_add(inside.start * width);
                        for _ in inside.clone() {
                            // SAFETY: the contract of the type; c + width <= channels.
                            unsafe {
                                for (part, x) in $vectors.into_iter().enumerate() {
                                    s.store_i32_ptr(to.add(part * vector), x);
                                }
                            }
                            to = to.wrapping_add(width);
                            for (place, row) in $places.iter_mut().zip(rows) {
                                *place = place.wrapping_add(row.step);
                            }
                        }
                    }};
                }
                if const { D::FORM.group() == 4 } {
                    columns!(|places| {
                        let x = s.quad_bytes(places);
                        [s.xor_i32(x[0], flip), s.xor_i32(x[1], flip), s.xor_i32(x[2], flip), s.xor_i32(x[3], flip)]
                    });
                } else if image.signed {
                    columns!(|places| s.pair_bytes::<true>(places[0], places[1]));
                } else {
                    columns!(|places| s.pair_bytes::<false>(places[0], places[1]));
                }
                for part in (0..width).step_by(2 * vector) {
                    // SAFETY: the contract of the type; weights have `kw` rows for each bundle.
                    unsafe {
                        let w = image.weights.as_ptr().add(bundle * kw * channels + c + part);
                        let mut weights = [[padding; 2]; KW];
                        unrolled!(k in 0..KW, {
                            let w = w.add(k * channels);
                            weights[k] = [s.load_i32_ptr(w), s.load_i32_ptr(w.add(vector))];
                        });
                        let (sums, ld) = match to {
                            Some(_) => (sums.as_mut_ptr().add(part), width),
                            None => (sums.as_mut_ptr().add(c + part), channels),
                        };
                        // The same again and again, or those of each pixel.
                        let first = image.first.as_ptr().add(c + part);
                        let (mut from, step) = if bundle == 0 { (first, 0) } else { (sums.cast_const(), ld) };
                        let mut x = lanes.add(part).cast_const();
                        macro_rules! sums {
                            () => {{
                                let mut acc = [s.load_i32_ptr(from), s.load_i32_ptr(from.add(vector))];
                                from = from.add(step);
                                unrolled!(k in 0..KW, {
                                    let x = x.add(k * width);
                                    acc[0] = d.dot(acc[0], s.load_i32_ptr(x), weights[k][0]);
                                    acc[1] = d.dot(acc[1], s.load_i32_ptr(x.add(vector)), weights[k][1]);
                                });
                                if KW == 0 {
                                    let (mut x, mut w) = (x, w);
                                    for _ in 0..kw {
                                        acc[0] = d.dot(acc[0], s.load_i32_ptr(x), s.load_i32_ptr(w));
                                        acc[1] = d.dot(acc[1], s.load_i32_ptr(x.add(vector)), s.load_i32_ptr(w.add(vector)));
                                        x = x.wrapping_add(next);
                                        w = w.wrapping_add(channels);
                                    }
                                }
                                x = x.wrapping_add(stride);
                                acc
                            }};
                        }
                        match to {
                            Some((to, row)) if bundle == last => {
                                let columns = Columns::new(s, to, c + part);
                                let mut y = to.at(row, c + part);
                                for _ in 0..pixels {
                                    let acc = sums!();
                                    columns.store(s, y, acc);
                                    y = y.wrapping_add(to.row_len());
                                }
                            }
                            _ => {
                                for pixel in 0..pixels {
                                    let acc = sums!();
                                    s.store_i32_ptr(sums.add(pixel * ld), acc[0]);
                                    s.store_i32_ptr(sums.add(pixel * ld + vector), acc[1]);
                                }
                            }
                        }
                    }
                }
            }
            if c + width == channels {
                break;
            }
            c = (c + width).min(channels - width);
        }
    }
}
