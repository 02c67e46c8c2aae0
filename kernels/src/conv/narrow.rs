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
//! As products such convolutions are matrices of so few columns that most of a tile is empty. Inputs that do not
//! fill the last vector are read with one that ends with them, of which the lanes that were there before count as 0.

use super::{ConvInput, ConvParams};
use crate::epilogue::Activation;
use crate::error::Result;
use crate::gemm::{Activate, Aligned, OutPtr};
use crate::par::Cx;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use core::ops::Range;

/// Most output channels. With more, 16 registers hold the sums of so few columns that a product is as fast.
const MAX_OUTPUTS: usize = 4;
/// Scalar operations that a task should have at least.
const TASK_COST: u64 = 1 << 18;
/// More tasks than this would not balance better.
const MAX_TASKS: u64 = 64;

/// A convolution with its weights packed.
#[derive(Clone, Debug)]
pub(super) struct Narrow {
    /// `[out, taps, in]`.
    weights: Aligned,
    bias: [f32; MAX_OUTPUTS],
}

impl Narrow {
    /// Whether a convolution can run here and should: a pixel of the input fills a vector.
    pub(super) fn supports(isa: Isa, params: &ConvParams) -> bool {
        let ConvParams { in_channels, out_channels, groups, .. } = *params;
        groups == 1 && (1..=MAX_OUTPUTS).contains(&out_channels) && in_channels >= isa.lanes()
    }

    /// Packs `weights` laid out `[out, in, taps]`; lengths were checked.
    pub(super) fn new(params: &ConvParams, weights: &[f32], bias: Option<&[f32]>) -> Result<Self> {
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
        Ok(Self { weights: packed, bias: own_bias })
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
        // Columns whose taps all lie inside the line.
        let (stride, reach) = (params.strides[2], (params.kernel[2] - 1) * params.dilations[2]);
        let start = input.pads_begin[2].div_ceil(stride).min(ow);
        let end = match (input.spatial[2] + input.pads_begin[2]).checked_sub(reach + 1) {
            Some(last) => (last / stride + 1).clamp(start, ow),
            None => start,
        };
        let out = OutPtr(out.as_mut_ptr());
        let image =
            Image { narrow: self, x, residual, out, activation, params, input, out_spatial, interior: start..end };
        cx.for_each(tasks, cost, &|task| {
            for row in crate::gemm::part(rows, tasks, task) {
                dispatch(cx.isa(), Row { image: &image, row });
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
    activation: Activation,
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
        let outputs = image.params.out_channels;
        match outputs {
            1 => columns::<S, 1, 8>(s, image, row),
            2 => columns::<S, 2, 4>(s, image, row),
            3 => columns::<S, 3, 3>(s, image, row),
            _ => columns::<S, 4, 2>(s, image, row),
        }
        let cols = image.out_spatial[2] * outputs;
        let c = image.out.offset(row * cols).0;
        Activate { activation: image.activation, c, rows: 1, cols, ld: cols }.run(s);
    }
}

/// All columns of a row, `P` at once where all taps lie inside the line.
#[inline(always)]
fn columns<S: Simd, const N: usize, const P: usize>(s: S, image: &Image<'_>, row: usize) {
    let ow = image.out_spatial[2];
    let mut column = 0;
    while column < ow {
        if image.interior.contains(&column) && column + P <= image.interior.end {
            tile::<S, N, P>(s, image, row, column);
            column += P;
        } else {
            tile::<S, N, 1>(s, image, row, column);
            column += 1;
        }
    }
}

/// `P` columns whose taps all lie inside the line, or one.
#[inline(always)]
fn tile<S: Simd, const N: usize, const P: usize>(s: S, image: &Image<'_>, row: usize, column: usize) {
    let Image { narrow, x, residual, params, input, out_spatial: [od, oh, ow], .. } = image;
    let ConvParams { in_channels: channels, kernel: [kd, kh, kw], strides, dilations, .. } = **params;
    let [id, ih, iw] = input.spatial;
    let (b, z, y) = (row / oh / od, row / oh % od, row % oh);
    // Positions in the padded image cannot overflow: it was checked to be half an address space at most.
    let position = |d: usize, out: usize, tap: usize| {
        (out * strides[d] + tap * dilations[d]) as isize - input.pads_begin[d] as isize
    };
    let inside = |position: isize, size: usize| position >= 0 && position < size as isize;
    // Taps side by side in memory form one run.
    let merged = dilations[2] == 1 && image.interior.contains(&column);
    let (runs, run) = if merged { (1, kw * channels) } else { (kw, channels) };
    let k = kd * kh * kw * channels;
    let mut acc = [[s.splat(0.0); N]; P];
    for line in 0..kd * kh {
        let (iz, iy) = (position(0, z, line / kh), position(1, y, line % kh));
        if !inside(iz, id) || !inside(iy, ih) {
            continue;
        }
        let start = ((b * id + iz as usize) * ih + iy as usize) * iw;
        for kx in 0..runs {
            let ix = position(2, column, kx);
            if !inside(ix, iw) {
                continue;
            }
            let first = (start + ix as usize) * channels;
            let step = strides[2] * channels;
            // The last column's run ends inside the line.
            let x = &x[first..first + (P - 1) * step + run];
            let w = &narrow.weights.as_slice()[(line * kw + kx) * channels..][..(N - 1) * k + run];
            // SAFETY: the slices are that long.
            unsafe { dots::<S, N, P>(s, x.as_ptr(), step, w.as_ptr(), k, run, &mut acc) };
        }
    }
    let at = (row * ow + column) * N;
    for (p, acc) in acc.iter().enumerate() {
        for (n, acc) in acc.iter().enumerate() {
            let i = at + p * N + n;
            let y = s.reduce_add(*acc) + narrow.bias[n] + residual.map_or(0.0, |residual| residual[i]);
            // SAFETY: the row lies inside the output, and nobody else writes it.
            unsafe { *image.out.offset(i).0 = y };
        }
    }
}

/// The widest vectors.
const MAX_LANES: usize = 16;
/// Read from `MAX_LANES - lanes + n` on: the last `n` lanes are 1, those before 0.
static NEW: [f32; 2 * MAX_LANES] = {
    let mut new = [1.0; 2 * MAX_LANES];
    let mut i = 0;
    while i < MAX_LANES {
        new[i] = 0.0;
        i += 1;
    }
    new
};

/// `acc[p][n] += x[p * step ..] * w[n * k ..]`, of `run` elements each.
///
/// # Safety
/// They must be readable and fill a vector.
#[inline(always)]
unsafe fn dots<S: Simd, const N: usize, const P: usize>(
    s: S,
    x: *const f32,
    step: usize,
    w: *const f32,
    k: usize,
    run: usize,
    acc: &mut [[S::F32; N]; P],
) {
    let whole = run / S::LANES * S::LANES;
    let mut j = 0;
    // SAFETY: promised by the caller.
    unsafe {
        while j < whole {
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
            j += S::LANES;
        }
        if j < run {
            let at = run - S::LANES;
            let new = s.lt(s.splat(0.0), s.load_ptr(NEW.as_ptr().add(MAX_LANES - S::LANES + run - j)));
            for (p, acc) in acc.iter_mut().enumerate() {
                let x = s.select(new, s.load_ptr(x.add(p * step + at)), s.splat(0.0));
                for (n, acc) in acc.iter_mut().enumerate() {
                    *acc = s.mul_add(x, s.load_ptr(w.add(n * k + at)), *acc);
                }
            }
        }
    }
}
