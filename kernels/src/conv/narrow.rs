//! Convolutions of one to four output channels: dot products along the channels of the input.
//!
//! ```text
//! for rows of the output                                      in parallel
//!     for 8, 4, 3 or 2 columns: what 16 registers hold        at the sides of the image one by one, tap by tap
//!         for rows of the kernel that fall into the image
//!             for vectors of the kw * c inputs that lie side by side
//!                 acc[column][o] += x[column] * w[o]          each x is loaded once for all o, each w for all columns
//!         out[column][o] = bias[o] + the lanes of acc[column][o] + residual
//!     activation(row)
//! ```
//!
//! As products such convolutions are matrices of so few columns that most of a tile is empty. Channels fill whole vectors:
//! if need be those of a weaker instruction set.

use super::{ConvInput, ConvParams};
use crate::epilogue::Activation;
use crate::error::Result;
use crate::gemm::{Activate, Aligned, OutPtr};
use crate::par::Cx;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use core::ops::Range;

/// Most output channels. With more, 16 registers hold the sums of so few columns that a product is as fast.
const MAX_OUTPUTS: usize = 4;
/// Most rows of a kernel.
const MAX_LINES: usize = 32;
/// Scalar operations that a task should have at least.
const TASK_COST: u64 = 1 << 18;
/// More tasks than this would not balance better.
const MAX_TASKS: u64 = 64;

/// A convolution with its weights packed.
#[derive(Clone, Debug)]
pub(super) struct Narrow {
    /// The one whose vectors the channels fill.
    isa: Isa,
    /// `[out, taps, in]`.
    weights: Aligned,
    bias: [f32; MAX_OUTPUTS],
}

impl Narrow {
    /// The instruction set whose vectors the channels of a pixel fill, if there is one.
    fn isa(isa: Isa, channels: usize) -> Option<Isa> {
        Some(isa.narrowed(1 << channels.trailing_zeros().min(4))).filter(|isa| channels.is_multiple_of(isa.lanes()))
    }

    /// Whether a convolution can run here and should.
    pub(super) fn supports(isa: Isa, params: &ConvParams) -> bool {
        let ConvParams { in_channels, out_channels, groups, kernel: [kd, kh, _], .. } = *params;
        groups == 1
            && kd.checked_mul(kh).is_some_and(|lines| lines <= MAX_LINES)
            && (1..=MAX_OUTPUTS).contains(&out_channels)
            && in_channels > 0
            && Self::isa(isa, in_channels).is_some()
    }

    /// Packs `weights` laid out `[out, in, taps]`; lengths were checked.
    pub(super) fn new(isa: Isa, params: &ConvParams, weights: &[f32], bias: Option<&[f32]>) -> Result<Self> {
        let isa = Self::isa(isa, params.in_channels).unwrap_or(isa);
        let taps: usize = params.kernel.iter().product();
        let mut packed = Aligned::zeros(weights.len())?;
        let (k, rows) = (taps * params.in_channels, packed.as_mut_slice());
        for (row, weights) in rows.chunks_exact_mut(k).zip(weights.chunks_exact(k)) {
            for (tap, row) in row.chunks_exact_mut(params.in_channels).enumerate() {
                row.iter_mut().enumerate().for_each(|(c, w)| *w = weights[c * taps + tap]);
            }
        }
        let mut own_bias = [0.0; MAX_OUTPUTS];
        own_bias.iter_mut().zip(bias.unwrap_or(&[])).for_each(|(own, bias)| *own = *bias);
        Ok(Self { isa, weights: packed, bias: own_bias })
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.weights.as_slice())
    }

    /// Channels last; lengths were checked, `out` is not empty.
    pub(super) fn run(
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
        let rows = input.batch * od * oh;
        let cost = (2 * self.weights.as_slice().len() as u64).saturating_mul((rows * ow) as u64);
        let tasks = (cost / TASK_COST).clamp(1, MAX_TASKS.min(rows as u64)) as usize;
        let out = OutPtr(out.as_mut_ptr());
        let image =
            Image { narrow: self, x, residual, out, params, input, out_spatial, interior: params.interior(input, ow) };
        cx.for_each(tasks, cost, &|task| {
            for row in crate::gemm::part(rows, tasks, task) {
                dispatch(self.isa, Row { image: &image, row });
                let cols = ow * params.out_channels;
                let c = image.out.offset(row * cols).0;
                dispatch(cx.isa(), Activate { activation, c, rows: 1, cols, ld: cols });
            }
        });
    }
}

/// All of one convolution.
struct Image<'a> {
    narrow: &'a Narrow,
    x: &'a [f32],
    residual: Option<&'a [f32]>,
    out: OutPtr,
    params: &'a ConvParams,
    input: &'a ConvInput,
    out_spatial: [usize; 3],
    interior: Range<usize>,
}

/// A row of an image; no other task has it.
struct Row<'a> {
    image: &'a Image<'a>,
    row: usize,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { image, row } = self;
        let lines = image.lines(row);
        let (outputs, ow) = (image.params.out_channels, image.out_spatial[2]);
        let first = row * ow;
        let columns = [8, 4, 3, 2][outputs - 1];
        let (start, end) = (image.interior.start, image.interior.end);
        let end = start + (end - start) / columns * columns;
        // What fills no tile, and the sides, in one piece of code for all numbers of outputs.
        for pixel in (first..first + start).chain(first + end..first + ow) {
            for output in 0..outputs {
                tile::<S, 1, 1>(s, image, &lines, pixel, output);
            }
        }
        let pixels = first + start..first + end;
        match outputs {
            1 => tiles::<S, 1, 8>(s, image, &lines, pixels),
            2 => tiles::<S, 2, 4>(s, image, &lines, pixels),
            3 => tiles::<S, 3, 3>(s, image, &lines, pixels),
            _ => tiles::<S, 4, 2>(s, image, &lines, pixels),
        }
    }
}

/// Rows of a kernel that fall into the image, for one row of the output: where each line of the image and its taps begin.
struct Lines {
    list: [[usize; 2]; MAX_LINES],
    count: usize,
}

impl Image<'_> {
    /// Position of a tap along an axis, if it is not padding.
    #[inline(always)]
    fn position(&self, axis: usize, out: usize, tap: usize) -> Option<usize> {
        let ConvParams { strides, dilations, .. } = self.params;
        // Cannot overflow: the padded image was checked to be half an address space at most.
        let at = (out * strides[axis] + tap * dilations[axis]) as isize - self.input.pads_begin[axis] as isize;
        usize::try_from(at).ok().filter(|&at| at < self.input.spatial[axis])
    }

    fn lines(&self, row: usize) -> Lines {
        let ConvParams { in_channels: channels, kernel: [_, kh, kw], .. } = *self.params;
        let ([id, ih, iw], [od, oh, _]) = (self.input.spatial, self.out_spatial);
        let mut lines = Lines { list: [[0; 2]; MAX_LINES], count: 0 };
        for line in 0..self.params.kernel[0] * kh {
            let (z, y) = (self.position(0, row / oh % od, line / kh), self.position(1, row % oh, line % kh));
            if let (Some(z), Some(y)) = (z, y) {
                let start = ((row / oh / od * id + z) * ih + y) * iw;
                lines.list[lines.count] = [start * channels, line * kw * channels];
                lines.count += 1;
            }
        }
        lines
    }
}

/// The columns of a range in whole tiles.
#[inline(always)]
fn tiles<S: Simd, const N: usize, const P: usize>(s: S, image: &Image<'_>, lines: &Lines, pixels: Range<usize>) {
    for pixel in pixels.step_by(P) {
        tile::<S, N, P>(s, image, lines, pixel, 0);
    }
}

/// The outputs from `first` on of `P` pixels whose taps all lie inside the line, or of any one.
#[inline(always)]
fn tile<S: Simd, const N: usize, const P: usize>(s: S, image: &Image<'_>, lines: &Lines, pixel: usize, first: usize) {
    let Image { narrow, x, residual, params, .. } = image;
    let ConvParams { in_channels: channels, kernel: [_, _, kw], strides, dilations, .. } = **params;
    let column = pixel % image.out_spatial[2];
    let (weights, step) = (narrow.weights.as_slice(), strides[2] * channels);
    let k = weights.len() / params.out_channels;
    // Taps side by side in memory form one run.
    let merged = dilations[2] == 1 && image.interior.contains(&column);
    let (runs, length) = if merged { (1, kw * channels) } else { (kw, channels) };
    let mut acc = [[s.splat(0.0); N]; P];
    for [line, tap] in &lines.list[..lines.count] {
        for run in 0..runs {
            let Some(at) = image.position(2, column, run) else { continue };
            let x = &x[line + at * channels..][..(P - 1) * step + length];
            let w = &weights[first * k + tap + run * channels..][..(N - 1) * k + length];
            // SAFETY: the slices are that long, and lengths are multiples of that of a vector.
            unsafe { dots::<S, N, P>(s, x.as_ptr(), step, w.as_ptr(), k, length, &mut acc) };
        }
    }
    let outputs = params.out_channels;
    let at = pixel * outputs + first;
    for (p, acc) in acc.iter().enumerate() {
        for (n, acc) in acc.iter().enumerate() {
            let i = at + p * outputs + n;
            let y = s.reduce_add(*acc) + narrow.bias[first + n] + residual.map_or(0.0, |residual| residual[i]);
            // SAFETY: the row lies inside the output, and nobody else writes it.
            unsafe { *image.out.offset(i).0 = y };
        }
    }
}

/// `acc[p][n] += x[p * step ..] * w[n * k ..]`, of `length` elements each.
///
/// # Safety
/// They must be readable, and whole vectors.
#[inline(always)]
unsafe fn dots<S: Simd, const N: usize, const P: usize>(
    s: S,
    x: *const f32,
    step: usize,
    w: *const f32,
    k: usize,
    length: usize,
    acc: &mut [[S::F32; N]; P],
) {
    for j in (0..length).step_by(S::LANES) {
        // SAFETY: promised by the caller.
        unsafe {
            let mut weights = [s.splat(0.0); N];
            for (n, weights) in weights.iter_mut().enumerate() {
                *weights = s.load_ptr(w.add(n * k + j));
            }
            for (p, acc) in acc.iter_mut().enumerate() {
                let x = s.load_ptr(x.add(p * step + j));
                for (acc, w) in acc.iter_mut().zip(weights) {
                    *acc = s.mul_add(x, w, *acc);
                }
            }
        }
    }
}
