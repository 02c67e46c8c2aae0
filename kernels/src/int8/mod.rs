//! Products of 8-bit integers with exact 32-bit sums: matrix product and convolution.
//!
//! ```text
//! sum[i, j] = bias[j] + sum over k of (a[i, k] - a_zero) * (b[k, j] - b_zero[j])          in i32, wrapping
//! ```
//!
//! What becomes of a sum is an [`Output`]: it is stored, made a real number, or quantised again. Every result has the
//! same bits on every instruction set, in every [`Form`] and for any number of threads: sums are exact, and the
//! arithmetic behind them is that of [`Requantize`], rounded after each operation.

mod form;
pub use form::Form;

use crate::conv::{ConvInput, ConvParams, volume};
use crate::epilogue::Activation;
use crate::error::{Error, Result};
use crate::par::Cx;
use crate::reference::int8 as reference;
use crate::simd::Isa;

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
/// y = clamp(round((q - zero) * add.first + (r - add.other_zero) * add.second) + add.zero, add.lo, add.hi)
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
                let range = |lo: i32, hi: i32| {
                    let [least, largest] = match y {
                        BytesMut::U8(_) => [0, 255],
                        BytesMut::I8(_) => [-128, 127],
                    };
                    if least <= lo && lo <= hi && hi <= largest {
                        Ok(())
                    } else {
                        Err(Error::new(format!("the bounds {lo} and {hi} do not lie in {least} to {largest}")))
                    }
                };
                if let Some(add) = requantize.add {
                    want("the addend", add.other.len(), len)?;
                    range(add.lo, add.hi)?;
                } else {
                    range(requantize.lo, requantize.hi)?;
                }
                want("the output", y.len(), len)
            }
        }
    }
}

/// The right-hand side of a product, packed once for one instruction set and one form of it; made for weights.
#[derive(Clone, Debug)]
pub struct PackedQ {
    isa: Isa,
    form: Form,
    k: usize,
    n: usize,
    /// Elements minus their zero points, `[k, n]`.
    data: Vec<i16>,
}

impl PackedQ {
    /// Packs the `k` x `n` matrix `b`, whose columns have the zero points `zero` (one for all, or one for each). For
    /// weights stored `[n, k]` pass their [`transposed`](QMatrix::transposed) view.
    ///
    /// # Errors
    /// If `b`'s data is shorter than its shape and strides need, the zero points are neither 1 nor `n` or not of the
    /// range of `b`'s elements, the form is not of this instruction set, or memory is short.
    pub fn new(isa: Isa, form: Form, b: QMatrix<'_>, zero: &[i32]) -> Result<Self> {
        b.check("B")?;
        form.check(isa)?;
        let (k, n) = (b.rows, b.cols);
        if zero.len() != 1 && zero.len() != n {
            return Err(Error::new(format!("{} zero points for {n} columns", zero.len())));
        }
        let mut data = Vec::with_capacity(volume(&[k, n])?);
        for p in 0..k {
            for j in 0..n {
                let zero = zero[if zero.len() == 1 { 0 } else { j }];
                data.push((b.data.get(p * b.row_stride + j * b.col_stride) - zero) as i16);
            }
        }
        Ok(Self { isa, form, k, n, data })
    }

    /// Rows of the matrix: the length of the dot products.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the matrix.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The instruction set it was packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The form of the dot product it was packed for.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Memory it holds.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<i16>()
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
    if b.isa != cx.isa() {
        return Err(Error::new(format!("B was packed for {}, but {} runs", b.isa, cx.isa())));
    }
    a.check("A")?;
    if a.cols != b.k {
        return Err(Error::new(format!("A is {} x {}, but B is {} x {}", a.rows, a.cols, b.k, b.n)));
    }
    if let Some(bias) = bias.filter(|bias| bias.len() != b.n) {
        return Err(Error::new(format!("the bias has {} elements, expected {}", bias.len(), b.n)));
    }
    output.check(a.rows, b.n)?;
    let mut sums = vec![0i32; a.rows * b.n];
    for (i, row) in sums.chunks_exact_mut(b.n.max(1)).enumerate() {
        for (j, sum) in row.iter_mut().enumerate() {
            *sum = bias.map_or(0, |bias| bias[j]);
            for p in 0..b.k {
                let x = a.data.get(i * a.row_stride + p * a.col_stride) - a_zero;
                *sum = sum.wrapping_add(x * i32::from(b.data[p * b.n + j]));
            }
        }
    }
    reference::finish(&sums, b.n, output);
    Ok(())
}

/// A convolution of 8-bit tensors with its weights packed for one instruction set and one form of it.
#[derive(Clone, Debug)]
pub struct QConv {
    isa: Isa,
    params: ConvParams,
    weights: Vec<i32>,
}

impl QConv {
    /// Packs `weights`, laid out `[out, in / groups, kd, kh, kw]` as in ONNX, with zero points `zero`: one for all, or
    /// one for each output channel.
    ///
    /// # Errors
    /// If sizes are zero, groups do not divide the channels, `weights` or `zero` have the wrong length, or the form is
    /// not of this instruction set.
    pub fn new(isa: Isa, form: Form, params: ConvParams, weights: Bytes<'_>, zero: &[i32]) -> Result<Self> {
        params.check()?;
        form.check(isa)?;
        let ConvParams { in_channels, out_channels, groups, kernel, .. } = params;
        let per_output = volume(&[in_channels / groups, volume(&kernel)?])?;
        crate::conv::check_len("the weights", weights.len(), volume(&[out_channels, per_output])?)?;
        if zero.len() != 1 && zero.len() != out_channels {
            return Err(Error::new(format!("{} zero points for {out_channels} output channels", zero.len())));
        }
        let zero = |i: usize| zero[if zero.len() == 1 { 0 } else { i / per_output }];
        let weights = (0..weights.len()).map(|i| weights.get(i) - zero(i)).collect();
        Ok(Self { isa, params, weights })
    }

    /// What it was made with.
    pub fn params(&self) -> &ConvParams {
        &self.params
    }

    /// Memory the packed weights hold.
    pub fn bytes(&self) -> usize {
        self.weights.len() * size_of::<i32>()
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
        let out = self.params.output_spatial(input)?;
        let [d, h, w] = input.spatial;
        crate::conv::check_len("the input", x.len(), volume(&[input.batch, d, h, w, self.params.in_channels])?)?;
        if let Some(bias) = bias {
            crate::conv::check_len("the bias", bias.len(), self.params.out_channels)?;
        }
        output.check(volume(&[input.batch, out[0], out[1], out[2]])?, self.params.out_channels)?;
        let sums = reference::conv(&self.params, input, out, x, x_zero, &self.weights, bias)?;
        reference::finish(&sums, self.params.out_channels, output);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
