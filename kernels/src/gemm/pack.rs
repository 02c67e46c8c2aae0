//! Packed B: panels as wide as the microkernel's tile, each contiguous along k.
//!
//! ```text
//! panel j = columns j*NR .. min((j+1)*NR, n), the last one filled up with zeros to whole vectors
//! element (p, q) of a panel of width w stands at p*w + q
//! ```
//!
//! A pass over rows pc.. of B reads a contiguous piece of each panel, so that the layout does not depend on blocking.

use super::{Matrix, table};
use crate::error::{Error, Result};
use crate::simd::Isa;
use core::ops::Range;

/// A cache line of elements: vectors of packed B never straddle two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

// SAFETY: sixteen f32 without padding; all zero bits are zeros.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: sixteen f32 without padding, any bits are valid.
unsafe impl bytemuck::Pod for Line {}

/// Storage that starts at a cache line.
#[derive(Clone)]
pub(crate) struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

impl core::fmt::Debug for Aligned {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "[f32; {}]", self.len)
    }
}

impl Aligned {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Result<Self> {
        let count = len.div_ceil(16);
        let mut lines: Vec<Line> = Vec::new();
        lines.try_reserve_exact(count).map_err(|_| Error::new(format!("no memory for {len} packed weights")))?;
        // Not `Vec::resize`: built for size it is a loop over lines, which in a browser's first compiler takes
        // milliseconds for a model.
        // SAFETY: there is room for `count` lines, and zeros are a line.
        unsafe {
            lines.as_mut_ptr().write_bytes(0, count);
            lines.set_len(count);
        }
        Ok(Self { lines, len })
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

/// The right-hand side of a product, packed once for one instruction set; made for weights.
#[derive(Clone, Debug)]
pub struct PackedB {
    isa: Isa,
    k: usize,
    n: usize,
    data: Aligned,
}

impl PackedB {
    /// Packs the `k` x `n` matrix `b` for the tiles of `isa`. For weights stored `[n, k]` pass their
    /// [`transposed`](Matrix::transposed) view.
    ///
    /// # Errors
    /// If `b`'s data is shorter than its shape and strides need, or memory is short.
    pub fn new(isa: Isa, b: Matrix<'_>) -> Result<Self> {
        b.check("B")?;
        let (k, n) = (b.rows, b.cols);
        let len = packed_len(isa, k, n)?;
        let mut data = Aligned::zeros(len)?;
        let nr = table::panel_width(isa);
        pack_panels(isa, &b, 0..n.div_ceil(nr), data.as_mut_slice());
        Ok(Self { isa, k, n, data })
    }

    /// Rows of the matrix: the length of the dot products.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the matrix.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Panels of columns.
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(table::panel_width(self.isa))
    }

    /// The instruction set whose tiles it was packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Memory it holds.
    pub fn bytes(&self) -> usize {
        self.data.len * size_of::<f32>()
    }

    pub(crate) fn data(&self) -> &[f32] {
        self.data.as_slice()
    }
}

/// Four columns into four places from `at` on of each row. Weights lie like this, and a first load packs them in code
/// that the engine of a browser has not optimised yet: tiles of 4 x 4, which compilers turn into shuffles of registers,
/// are a fifth of the instructions there.
fn transpose_columns(columns: [&[f32]; 4], rows: &mut [f32], width: usize, at: usize) {
    let count = rows.len() / width;
    let mut i = 0;
    while i + 4 <= count {
        let tile: [[f32; 4]; 4] = core::array::from_fn(|j| columns[j][i..][..4].try_into().unwrap_or_default());
        #[allow(clippy::needless_range_loop)]
        for p in 0..4 {
            let row: [f32; 4] = core::array::from_fn(|j| tile[j][p]);
            rows[(i + p) * width + at..][..4].copy_from_slice(&row);
        }
        i += 4;
    }
    for i in i..count {
        for (j, column) in columns.iter().enumerate() {
            rows[i * width + at + j] = column[i];
        }
    }
}

/// Elements that a packed `k` x `n` matrix takes.
pub(crate) fn packed_len(isa: Isa, k: usize, n: usize) -> Result<usize> {
    n.checked_next_multiple_of(isa.lanes())
        .and_then(|width| width.checked_mul(k))
        .ok_or_else(|| Error::new(format!("a packed {k} x {n} matrix does not fit the address space")))
}

/// Packs some panels of `b`, the first of them at the start of `dst`.
pub(crate) fn pack_panels(isa: Isa, b: &Matrix<'_>, panels: Range<usize>, dst: &mut [f32]) {
    let (lanes, nr) = (isa.lanes(), table::panel_width(isa));
    let k = b.rows;
    let mut rest = dst;
    for panel in panels {
        let first = panel * nr;
        let cols = nr.min(b.cols - first);
        let width = cols.next_multiple_of(lanes);
        let (dst, tail) = rest.split_at_mut(k * width);
        rest = tail;
        if b.col_stride == 1 {
            for (p, row) in dst.chunks_exact_mut(width.max(1)).enumerate() {
                let src = &b.data[p * b.row_stride + first..][..cols];
                row[..cols].copy_from_slice(src);
                row[cols..].fill(0.0);
            }
        } else {
            // Blocks of rows that stay in the first-level cache while each column is walked along k.
            for (block, rows) in dst.chunks_mut(width * 32).enumerate() {
                let p0 = block * 32;
                let mut q0 = 0;
                if b.row_stride == 1 {
                    while q0 + 4 <= cols {
                        let columns: [&[f32]; 4] =
                            core::array::from_fn(|j| &b.data[p0 + (first + q0 + j) * b.col_stride..]);
                        transpose_columns(columns, rows, width, q0);
                        q0 += 4;
                    }
                }
                for q in q0..cols {
                    let src = &b.data[p0 * b.row_stride + (first + q) * b.col_stride..];
                    for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                        row[q] = src[i * b.row_stride];
                    }
                }
                for row in rows.chunks_exact_mut(width) {
                    row[cols..].fill(0.0);
                }
            }
        }
    }
}
