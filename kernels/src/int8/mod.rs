//! Products of 8-bit integers with exact 32-bit sums: matrix product and convolution.
//!
//! ```text
//! sum[i, j] = bias[j] + sum over k of (a[i, k] - a_zero) * (b[k, j] - b_zero[j])          in i32, wrapping
//! ```
//!
//! What becomes of a sum is an [`Output`]: it is stored, made a real number, or quantised again. Every result has the
//! same bits on every instruction set, in every [`Form`] and for any number of threads: sums are exact, and the
//! arithmetic behind them is that of [`Requantize`], rounded after each operation.

/// An expression for each `i` below a constant `n` of at most 12, written out: a loop that LLVM does not unroll keeps
/// vectors in memory.
macro_rules! unrolled {
    ($i:ident in 0..$n:expr, $body:expr) => {
        unrolled!(@ $i, $n, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $i:ident, $n:expr, $body:expr, $($value:literal)*) => {{
        $(if $value < $n {
            // Elements beyond the last one would not compile.
            let $i = if $value < $n { $value } else { 0 };
            $body
        })*
    }};
}

mod depthwise;
mod digest;
mod form;
mod gather;
mod nest;
mod output;
mod pack;
mod pointwise;
mod resize;
mod softmax;
pub(crate) mod table;
mod tile;
mod winograd;

pub use digest::{DIGEST, digest};
pub use form::Form;
pub(crate) use output::{load_bytes, store_bytes};
pub use pack::PackedQ;
pub use pointwise::{Binary, Function, Mean, binary, lookup, lookup_in_place, max_pool, mean};
pub use resize::{Interpolation, resize};
pub use softmax::softmax;

use crate::conv::{Algorithm, ConvInput, ConvParams, volume};
use crate::epilogue::Activation;
use crate::error::{Error, Result};
use crate::par::Cx;
use crate::simd::Isa;
use crate::winograd::TileSize;
use depthwise::QDepthwise;
use gather::{Lhs, Matrix, Patches};
use nest::Problem;
use output::{Sink, largest_sum};
use std::borrow::Cow;
use winograd::QWinograd;

/// 8-bit elements.
#[derive(Clone, Copy, Debug)]
pub enum Bytes<'a> {
    /// 0 to 255.
    U8(&'a [u8]),
    /// -128 to 127.
    I8(&'a [i8]),
}

impl Bytes<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Bytes::U8(x) => x.len(),
            Bytes::I8(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An element.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn get(&self, i: usize) -> i32 {
        match self {
            Bytes::U8(x) => x[i].into(),
            Bytes::I8(x) => x[i].into(),
        }
    }

    /// Without the first `count` elements.
    fn skip(self, count: usize) -> Self {
        match self {
            Bytes::U8(x) => Bytes::U8(&x[count..]),
            Bytes::I8(x) => Bytes::I8(&x[count..]),
        }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        match self {
            Bytes::U8(x) => x.as_ptr(),
            Bytes::I8(x) => x.as_ptr().cast(),
        }
    }

    /// Refuses a zero point that is not of the range of the elements.
    fn check_zero(&self, name: &str, zero: i32) -> Result<()> {
        let [lo, hi] = match self {
            Bytes::U8(_) => [0, 255],
            Bytes::I8(_) => [-128, 127],
        };
        if (lo..=hi).contains(&zero) {
            return Ok(());
        }
        Err(Error::new(format!("the zero point {zero} of {name} does not lie in {lo} to {hi}")))
    }
}

/// 8-bit elements to be written.
#[derive(Debug)]
pub enum BytesMut<'a> {
    /// 0 to 255.
    U8(&'a mut [u8]),
    /// -128 to 127.
    I8(&'a mut [i8]),
}

impl BytesMut<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            BytesMut::U8(x) => x.len(),
            BytesMut::I8(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether they are signed, and where they are.
    pub(crate) fn raw(&mut self) -> (bool, *mut u8) {
        match self {
            BytesMut::U8(x) => (false, x.as_mut_ptr()),
            BytesMut::I8(x) => (true, x.as_mut_ptr().cast()),
        }
    }

    /// Refuses bounds that do not lie in the range of the elements, and a zero point that is of no byte.
    fn check_bounds(&self, lo: i32, hi: i32, zero: i32) -> Result<()> {
        let [least, largest] = match self {
            BytesMut::U8(_) => [0, 255],
            BytesMut::I8(_) => [-128, 127],
        };
        check_byte("the zero point", zero)?;
        if least <= lo && lo <= hi && hi <= largest {
            return Ok(());
        }
        Err(Error::new(format!("the bounds {lo} and {hi} do not lie in {least} to {largest}")))
    }
}

/// Refuses what is neither a signed nor an unsigned byte.
fn check_byte(name: &str, x: i32) -> Result<()> {
    if (-128..=255).contains(&x) {
        return Ok(());
    }
    Err(Error::new(format!("{name} {x} does not lie in -128 to 255")))
}

/// Refuses factors that are not finite, or so large that products with sums may not be: nothing here meets a NaN.
fn check_factor(x: f32) -> Result<()> {
    if x.abs() <= 1e25 { Ok(()) } else { Err(Error::new(format!("a factor of {x} is too large"))) }
}

/// The largest of some factors, whatever their signs; NaN if one is. By bits, which compilers make vectors of: onnxruntime's
/// quantiser writes a factor for each channel.
fn largest_factor(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |most, x| x.abs().to_bits().max(most)))
}

/// A matrix of 8-bit elements: `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct QMatrix<'a> {
    /// The elements.
    pub data: Bytes<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> QMatrix<'a> {
    /// A row-major matrix without gaps.
    pub fn new(data: Bytes<'a>, rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The same memory read as `cols` x `rows`.
    pub fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn check(&self, name: &str) -> Result<()> {
        let last = |n: usize, stride: usize| n.checked_sub(1).and_then(|n| n.checked_mul(stride));
        let Self { rows, cols, row_stride, col_stride, .. } = *self;
        let fits = rows == 0
            || cols == 0
            || last(rows, row_stride)
                .and_then(|r| r.checked_add(last(cols, col_stride)?))
                .is_some_and(|last| last < self.data.len());
        if fits {
            return Ok(());
        }
        Err(Error::new(format!(
            "{name} is {rows} x {cols} with strides {row_stride} and {col_stride} but has {} elements",
            self.data.len()
        )))
    }
}

/// How a sum becomes a quantised number again:
///
/// ```text
/// q = clamp(round(f32(sum) * multiplier[j]) + zero, lo, hi)                           halves to even
/// y = q                                                                               without an addend
/// y = clamp(round((q - zero) * add.first + (r - add.other_zero) * add.second + add.offset) + add.zero, add.lo, add.hi)
/// ```
///
/// in `f32`, every operation rounded. `multiplier` is `a_scale * b_scale[j] / y_scale`.
#[derive(Clone, Copy, Debug)]
pub struct Requantize<'a> {
    /// One for all columns, or one for each.
    pub multiplier: &'a [f32],
    /// Zero point of q.
    pub zero: i32,
    /// Least q: that of the element type, or of an activation before the quantisation.
    pub lo: i32,
    /// Largest q.
    pub hi: i32,
    /// A quantised tensor that is added.
    pub add: Option<Addend<'a>>,
}

/// The residual of a quantised product; see [`Requantize`].
#[derive(Clone, Copy, Debug)]
pub struct Addend<'a> {
    /// Laid out like the output.
    pub other: Bytes<'a>,
    /// Zero point of `other`.
    pub other_zero: i32,
    /// Scale of q over scale of y.
    pub first: f32,
    /// Scale of `other` over scale of y.
    pub second: f32,
    /// Added to the sum before it is rounded: onnxruntime's own operators add the zero point there, which decides where
    /// halves go.
    pub offset: f32,
    /// Zero point of y.
    pub zero: i32,
    /// Least y.
    pub lo: i32,
    /// Largest y.
    pub hi: i32,
}

/// What becomes of the sums. The output has rows of `n` elements without gaps (a channels-last tensor).
#[derive(Debug)]
pub enum Output<'a> {
    /// They are stored.
    Sums(&'a mut [i32]),
    /// `activation(f32(sum) * scale[j] + bias[j] + residual)`, every operation rounded.
    Real {
        /// One for all columns, or one for each: `a_scale * b_scale[j]`.
        scale: &'a [f32],
        /// One for each column.
        bias: Option<&'a [f32]>,
        /// Laid out like the output.
        residual: Option<&'a [f32]>,
        /// Applied last.
        activation: Activation,
        /// The result.
        y: &'a mut [f32],
    },
    /// They are quantised again.
    Quantized {
        /// How.
        requantize: Requantize<'a>,
        /// The result. `lo` and `hi` lie in the range of its type.
        y: BytesMut<'a>,
    },
}

impl Output<'_> {
    fn check(&self, m: usize, n: usize) -> Result<()> {
        let len = volume(&[m, n])?;
        let want = |name: &str, have: usize, want: usize| {
            if have == want { Ok(()) } else { Err(Error::new(format!("{name} has {have} elements, expected {want}"))) }
        };
        let per_column = |name: &str, have: usize| if have == 1 { Ok(()) } else { want(name, have, n) };
        match self {
            Output::Sums(y) => want("the output", y.len(), len),
            Output::Real { scale, bias, residual, y, .. } => {
                per_column("the scale", scale.len())?;
                bias.map_or(Ok(()), |bias| want("the bias", bias.len(), n))?;
                residual.map_or(Ok(()), |r| want("the residual", r.len(), len))?;
                want("the output", y.len(), len)
            }
            Output::Quantized { requantize, y } => {
                per_column("the multiplier", requantize.multiplier.len())?;
                check_factor(largest_factor(requantize.multiplier))?;
                if let Some(add) = requantize.add {
                    check_byte("the zero point", requantize.zero)?;
                    check_byte("the lower bound", requantize.lo)?;
                    check_byte("the upper bound", requantize.hi)?;
                    if requantize.lo > requantize.hi {
                        return Err(Error::new(format!("the bounds {} and {} cross", requantize.lo, requantize.hi)));
                    }
                    want("the addend", add.other.len(), len)?;
                    add.other.check_zero("the addend", add.other_zero)?;
                    check_factor(add.first)?;
                    check_factor(add.second)?;
                    check_factor(add.offset)?;
                    y.check_bounds(add.lo, add.hi, add.zero)?;
                } else {
                    y.check_bounds(requantize.lo, requantize.hi, requantize.zero)?;
                }
                want("the output", y.len(), len)
            }
        }
    }
}

/// The product of `a` (`m` x `k`, zero point `a_zero`) and packed weights; `bias` is one integer for each column.
///
/// # Errors
/// If shapes do not fit together, a slice has the wrong length, or `b` was packed for another instruction set.
pub fn qgemm(
    cx: &Cx<'_>,
    a: QMatrix<'_>,
    a_zero: i32,
    b: &PackedQ,
    bias: Option<&[i32]>,
    output: Output<'_>,
) -> Result<()> {
    if b.isa() != cx.isa() {
        return Err(Error::new(format!("B was packed for {}, but {} runs", b.isa(), cx.isa())));
    }
    a.check("A")?;
    a.data.check_zero("A", a_zero)?;
    if a.cols != b.k() {
        return Err(Error::new(format!("A is {} x {}, but B is {} x {}", a.rows, a.cols, b.k(), b.n())));
    }
    if let Some(bias) = bias {
        crate::conv::check_len("the bias", bias.len(), b.n())?;
    }
    output.check(a.rows, b.n())?;
    let sink = Sink::new(b.n(), output, largest_sum(a.cols, bias));
    let lhs = Lhs::Matrix(Matrix { data: a.data, row_stride: a.row_stride, col_stride: a.col_stride });
    // SAFETY: A was checked to have its rows, the output to have all of `m` x `n`.
    unsafe { nest::run(cx, 1, a.rows, a_zero, b, &|_| Problem { lhs, b, column: 0, bias }, &sink) }
}

/// A convolution of 8-bit tensors with its weights packed for one instruction set and one form of it.
#[derive(Clone, Debug)]
pub struct QConv {
    isa: Isa,
    params: ConvParams,
    weights: Weights,
}

#[derive(Clone, Debug)]
enum Weights {
    /// For each group a matrix of `kd * kh * kw * in / groups` rows and `out / groups` columns.
    Products(Vec<PackedQ>),
    /// One channel per group, or a few.
    Depthwise(QDepthwise),
    Winograd(QWinograd),
}

/// Weights `[out, in, tap]` as `[out, tap, in]`, the order in which patches lie in memory.
fn taps_first(weights: &[u8], ipg: usize, taps: usize) -> Cow<'_, [u8]> {
    if taps == 1 || ipg == 1 {
        return weights.into();
    }
    let mut rows = Vec::with_capacity(weights.len());
    for filter in weights.chunks_exact(ipg * taps) {
        for tap in 0..taps {
            rows.extend(filter[tap..].iter().step_by(taps));
        }
    }
    rows.into()
}

impl QConv {
    /// The fastest algorithm for a convolution and an input that is worth its memory. All give the same sums.
    pub fn choose(isa: Isa, form: Form, params: &ConvParams, input: &ConvInput) -> Algorithm {
        if Self::depends_on_input(isa, form, params) { Algorithm::by_size(params, input) } else { Algorithm::Direct }
    }

    /// Whether [`choose`](Self::choose) looks at the input.
    pub fn depends_on_input(isa: Isa, form: Form, params: &ConvParams) -> bool {
        QWinograd::supports(isa, form, params)
    }

    /// Packs `weights`, laid out `[out, in / groups, kd, kh, kw]` as in ONNX, with zero points `zero`: one for all, or
    /// one for each output channel. Weights that are too large for the algorithm get one with smaller tiles or without.
    ///
    /// # Errors
    /// If sizes are zero, groups do not divide the channels, `weights` or `zero` have the wrong length, the form is not
    /// of this instruction set, or the algorithm not for these parameters ([`QConv::choose`] names one that is).
    pub fn new(
        isa: Isa,
        form: Form,
        params: ConvParams,
        algorithm: Algorithm,
        weights: Bytes<'_>,
        zero: &[i32],
    ) -> Result<Self> {
        form.check(isa)?;
        Self::pack(isa, form, params, algorithm, weights, zero, PackedQ::new)
    }

    /// [`QConv::new`] with another way to pack the first group; the others follow it in its form.
    fn pack(
        isa: Isa,
        form: Form,
        params: ConvParams,
        algorithm: Algorithm,
        weights: Bytes<'_>,
        zero: &[i32],
        pack: fn(Isa, Form, QMatrix<'_>, &[i32]) -> Result<PackedQ>,
    ) -> Result<Self> {
        params.check()?;
        let ConvParams { in_channels, out_channels, groups, kernel, .. } = params;
        let (ipg, opg, taps) = (in_channels / groups, out_channels / groups, volume(&kernel)?);
        let k = volume(&[ipg, taps])?;
        crate::conv::check_len("the weights", weights.len(), volume(&[out_channels, k])?)?;
        if zero.len() != 1 && zero.len() != out_channels {
            return Err(Error::new(format!("{} zero points for {out_channels} output channels", zero.len())));
        }
        zero.iter().try_for_each(|&zero| weights.check_zero("the weights", zero))?;
        if let Algorithm::Winograd(size) = algorithm {
            if !QWinograd::supports(isa, form, &params) {
                return Err(Error::new(format!("Winograd's algorithm is not for {params:?} with {isa} and {form}")));
            }
            for smaller in [TileSize::Four, TileSize::Two].into_iter().filter(|s| s.outputs() <= size.outputs()) {
                if let Some(winograd) = QWinograd::new(isa, smaller, &params, weights, zero)? {
                    return Ok(Self { isa, params, weights: Weights::Winograd(winograd) });
                }
            }
        }
        if QDepthwise::supports(isa, form, &params) {
            let weights = Weights::Depthwise(QDepthwise::new(isa, form, &params, weights, zero)?);
            return Ok(Self { isa, params, weights });
        }
        let mut packed: Vec<PackedQ> = Vec::with_capacity(groups);
        for group in 0..groups {
            let zero = if zero.len() == 1 { zero } else { &zero[group * opg..][..opg] };
            let (rows, signed): (&[u8], _) = match weights {
                Bytes::U8(w) => (w, false),
                Bytes::I8(w) => (bytemuck::cast_slice(w), true),
            };
            let rows = taps_first(&rows[group * opg * k..][..opg * k], ipg, taps);
            let data = if signed { Bytes::I8(bytemuck::cast_slice(&rows)) } else { Bytes::U8(&rows) };
            let matrix = QMatrix::new(data, opg, k).transposed();
            packed.push(match packed.first() {
                Some(first) => PackedQ::pack(isa, first.form(), matrix, zero)?,
                None => pack(isa, form, matrix, zero)?,
            });
        }
        Ok(Self { isa, params, weights: Weights::Products(packed) })
    }

    /// What it was made with.
    pub fn params(&self) -> &ConvParams {
        &self.params
    }

    /// How it is computed.
    pub fn algorithm(&self) -> Algorithm {
        match &self.weights {
            Weights::Products(_) | Weights::Depthwise(_) => Algorithm::Direct,
            Weights::Winograd(winograd) => Algorithm::Winograd(winograd.size()),
        }
    }

    /// Memory the packed weights hold.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Winograd(winograd) => winograd.bytes(),
            Weights::Products(groups) => groups.iter().map(PackedQ::bytes).sum(),
            Weights::Depthwise(depthwise) => depthwise.bytes(),
        }
    }

    /// Convolves `x`, `[batch, d, h, w, channels]` with zero point `x_zero`, which is also what padding stands for; the
    /// output is channels-last too, `bias` one integer for each of its channels.
    ///
    /// # Errors
    /// If slices do not have the lengths that `input` says, or `cx` runs another instruction set than the weights were
    /// packed for.
    pub fn run(
        &self,
        cx: &Cx<'_>,
        input: &ConvInput,
        x: Bytes<'_>,
        x_zero: i32,
        bias: Option<&[i32]>,
        output: Output<'_>,
    ) -> Result<()> {
        if cx.isa() != self.isa {
            return Err(Error::new(format!("the weights were packed for {}, but {} runs", self.isa, cx.isa())));
        }
        let ConvParams { in_channels, out_channels, groups, kernel, strides, dilations } = self.params;
        let out_spatial = self.params.output_spatial(input)?;
        let [d, h, w] = input.spatial;
        crate::conv::check_len("the input", x.len(), volume(&[input.batch, d, h, w, in_channels])?)?;
        x.check_zero("the input", x_zero)?;
        if let Some(bias) = bias {
            crate::conv::check_len("the bias", bias.len(), out_channels)?;
        }
        let m = volume(&[input.batch, out_spatial[0], out_spatial[1], out_spatial[2]])?;
        output.check(m, out_channels)?;
        if m == 0 || out_channels == 0 {
            return Ok(());
        }
        let taps = volume(&kernel)?;
        let sink = Sink::new(out_channels, output, largest_sum(in_channels / groups * taps, bias));
        let weights = match &self.weights {
            Weights::Products(weights) => weights,
            Weights::Depthwise(depthwise) => {
                // SAFETY: the input and the output were checked to have the sizes that the parameters say.
                return unsafe { depthwise.run(cx, &self.params, input, out_spatial, x, x_zero, bias, &sink) };
            }
            Weights::Winograd(winograd) => {
                // SAFETY: as above.
                return unsafe { winograd.run(cx, &self.params, input, out_spatial, x, x_zero, bias, &sink) };
            }
        };
        let (ipg, opg) = (in_channels / groups, out_channels / groups);
        let direct = kernel == [1; 3] && strides == [1; 3] && out_spatial == input.spatial;
        let problem = |group: usize| {
            let lhs = if direct {
                let data = x.skip(group * ipg);
                Lhs::Matrix(Matrix { data, row_stride: in_channels, col_stride: 1 })
            } else {
                Lhs::Patches(Patches {
                    x,
                    channels: in_channels,
                    first: group * ipg,
                    depth: ipg,
                    spatial: input.spatial,
                    out_spatial,
                    kernel,
                    strides,
                    dilations,
                    pads: input.pads_begin,
                })
            };
            let bias = bias.map(|bias| &bias[group * opg..][..opg]);
            Problem { lhs, b: &weights[group], column: group * opg, bias }
        };
        // SAFETY: the input and the output were checked to have the sizes that the parameters say.
        unsafe { nest::run(cx, groups, m, x_zero, &weights[0], &problem, &sink) }
    }
}

#[cfg(test)]
mod tests;
