//! Packed B: panels as wide as the microkernel's tile, each contiguous along k in groups of neighbours.
//!
//! ```text
//! panel j = columns j*NR .. min((j+1)*NR, n), the last one filled up with zeros to whole vectors
//! group g (elements g*G.. along k) of column q of a panel of width w stands at g*w + q
//! Form::Wide      G = 2: b - zero as i16; A is widened likewise, and nothing has to be corrected
//! of bytes        G = 4: b as i8 (u8 less 128), so that for a' and b', the bytes as the dot product reads them,
//!                 sum = dot(a', b') - a_zero' (colsum[j] - k zero'[j]) - zero'[j] rowsum[i]
//! ```

use super::{Bytes, Form, QMatrix, table};
use crate::conv::volume;
use crate::error::{Error, Result};
use crate::gemm::Aligned;
use crate::simd::Isa;

/// The right-hand side of a product, packed once for one instruction set and one form of it; made for weights.
#[derive(Clone, Debug)]
pub struct PackedQ {
    isa: Isa,
    form: Form,
    k: usize,
    n: usize,
    data: Aligned,
    correction: Option<Correction>,
}

/// What the forms of bytes need to take zero points back.
#[derive(Clone, Debug)]
pub(super) struct Correction {
    /// `colsum[j] - k * zero[j]`, to be multiplied by A's zero point.
    pub(super) columns: Vec<i32>,
    /// `zero[j]`, to be multiplied by the sum of A's row; none if all are zero.
    pub(super) zeros: Option<Vec<i32>>,
}

impl PackedQ {
    /// Packs the `k` x `n` matrix `b`, whose columns have the zero points `zero` (one for all, or one for each). For
    /// weights stored `[n, k]` pass their [`transposed`](QMatrix::transposed) view.
    ///
    /// # Errors
    /// If `b`'s data is shorter than its shape and strides need, the zero points are neither 1 nor `n` or not of the
    /// range of `b`'s elements, the form is not of this instruction set, or memory is short.
    pub fn new(isa: Isa, form: Form, b: QMatrix<'_>, zero: &[i32]) -> Result<Self> {
        form.check(isa)?;
        Self::pack(isa, form, b, zero)
    }

    /// [`PackedQ::new`] for any form.
    pub(super) fn pack(isa: Isa, form: Form, b: QMatrix<'_>, zero: &[i32]) -> Result<Self> {
        b.check("B")?;
        let (k, n) = (b.rows, b.cols);
        if zero.len() != 1 && zero.len() != n {
            return Err(Error::new(format!("{} zero points for {n} columns", zero.len())));
        }
        for &zero in zero {
            b.data.check_zero("B", zero)?;
        }
        volume(&[k, n])?;
        let (group, nr) = (form.group(), table::panel_width(isa, form));
        let groups = k.div_ceil(group);
        let len = n.checked_next_multiple_of(isa.lanes()).and_then(|width| width.checked_mul(groups));
        let len = len.ok_or_else(|| Error::new(format!("a packed {k} x {n} matrix does not fit the address space")))?;
        let mut data = Aligned::zeros(len)?;
        let zero_of = |j: usize| zero[if zero.len() == 1 { 0 } else { j }];
        // What the dot product reads is signed.
        let shift = if matches!(b.data, Bytes::U8(_)) { 128 } else { 0 };
        let mut columns = vec![0i32; if form == Form::Wide { 0 } else { n }];
        let mut panels: &mut [i32] = bytemuck::cast_slice_mut(data.as_mut_slice());
        let mut first = 0;
        while first < n {
            let cols = nr.min(n - first);
            let width = cols.next_multiple_of(isa.lanes());
            let (panel, rest) = panels.split_at_mut(groups * width);
            panels = rest;
            for q in 0..cols {
                let j = first + q;
                let element = |p: usize| if p < k { b.data.get(p * b.row_stride + j * b.col_stride) } else { 0 };
                if form == Form::Wide {
                    let zero = zero_of(j);
                    let centred = |p: usize| if p < k { (element(p) - zero) as i16 } else { 0 };
                    for g in 0..groups {
                        panel[g * width + q] = bytemuck::cast([centred(2 * g), centred(2 * g + 1)]);
                    }
                } else {
                    let shifted = |p: usize| if p < k { (element(p) - shift) as i8 } else { 0 };
                    let mut sum = 0i32;
                    for g in 0..groups {
                        let x = [0, 1, 2, 3].map(|i| shifted(4 * g + i));
                        sum = x.iter().fold(sum, |sum, &x| sum.wrapping_add(x.into()));
                        panel[g * width + q] = bytemuck::cast(x);
                    }
                    columns[j] = sum.wrapping_sub((zero_of(j) - shift).wrapping_mul(k as i32));
                }
            }
            first += nr;
        }
        let correction = (form != Form::Wide).then(|| {
            let zeros = (0..n).map(|j| zero_of(j) - shift);
            Correction { columns, zeros: zeros.clone().any(|zero| zero != 0).then(|| zeros.collect()) }
        });
        Ok(Self { isa, form, k, n, data, correction })
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
        let correction = self.correction.as_ref().map_or(0, |c| c.columns.len() + c.zeros.as_ref().map_or(0, Vec::len));
        size_of_val(self.data.as_slice()) + correction * size_of::<i32>()
    }

    /// All panels.
    pub(super) fn data(&self) -> &[i32] {
        bytemuck::cast_slice(self.data.as_slice())
    }

    pub(super) fn correction(&self) -> Option<&Correction> {
        self.correction.as_ref()
    }
}
