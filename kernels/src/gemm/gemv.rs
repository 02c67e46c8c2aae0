//! One row times a matrix: bound by reading B, so nothing is packed.
//!
//! ```text
//! for panels of NRV vectors of columns (packed)
//!     acc[0..R][0..NRV] = 0
//!     for p in 0..k: acc[p mod R] += splat(a[p]) * B[p, columns]
//!     c = sum of acc[0..R]
//! for groups of G vectors of columns (row-major)
//!     acc[0..G] = 0
//!     for p in 0..k: acc += splat(a[p]) * B[p, columns]
//! for 4 columns (B stored transposed)
//!     acc[0..4] = 0
//!     for vectors of k: acc[q] += a * B[.., q]
//!     c[q] = sum of lanes
//! for strips of weights of few bits: see nbits.rs
//! ```

use super::{Activate, Matrix, OutPtr, Rhs, clamp, part, split_activation, table};
use crate::epilogue::Epilogue;
use crate::nbits;
use crate::par::Cx;
use crate::simd::{Kernel, Simd, dispatch};
use core::ops::Range;

/// Vectors of columns that are summed side by side: enough chains to hide the latency of a multiply-add.
const VECTORS: usize = 8;
/// Columns of a transposed B that are summed side by side.
const COLUMNS: usize = 4;
/// Most elements of B that one task reads; 256 KiB.
const TASK_ELEMENTS: usize = 1 << 16;

/// Whether [`gemv`] has a loop for this layout.
pub(super) fn supports(b: &Rhs<'_>) -> bool {
    match b {
        Rhs::Packed(_) => true,
        // Needs a row that was made ready.
        Rhs::Bits(_) => false,
        Rhs::Plain(b) => b.col_stride == 1 || b.row_stride == 1,
    }
}

/// `c = activation(a b + bias + residual)` for one row `a`; shapes were checked. For weights of few bits it is a row that
/// [`NBits::with_ready`](crate::nbits::NBits::with_ready) made.
pub(super) fn gemv(cx: &Cx<'_>, a: &[f32], b: Rhs<'_>, epilogue: &Epilogue<'_>, c: &mut [f32]) {
    let isa = cx.isa();
    let (k, n) = match b {
        Rhs::Packed(b) => (b.k(), b.n()),
        Rhs::Plain(b) => (b.rows, b.cols),
        Rhs::Bits(b) => (b.k(), b.n()),
    };
    // Units of whole groups: which columns share a group does not depend on the cut.
    let unit = match b {
        Rhs::Packed(_) => table::panel_width(isa),
        Rhs::Plain(b) if b.col_stride == 1 => VECTORS * isa.lanes(),
        Rhs::Plain(_) => COLUMNS,
        Rhs::Bits(_) => nbits::STRIPS * isa.lanes(),
    };
    let units = n.div_ceil(unit);
    let tasks = units.min((k.saturating_mul(n)).div_ceil(TASK_ELEMENTS)).max(1);
    let c = OutPtr(c.as_mut_ptr());
    cx.for_each(tasks, 2 * k as u64 * n as u64, &|task| {
        let units = part(units, tasks, task);
        let columns = units.start * unit..(units.end * unit).min(n);
        // SAFETY: C has n elements, and tasks have disjoint columns.
        let out = unsafe { core::slice::from_raw_parts_mut(c.at(columns.start), columns.len()) };
        dispatch(isa, Gemv { a, b, columns, epilogue, out });
    });
}

/// The loops are not inlined on wasm: optimising compilers choke on huge functions.
struct Gemv<'a> {
    a: &'a [f32],
    b: Rhs<'a>,
    columns: Range<usize>,
    epilogue: &'a Epilogue<'a>,
    out: &'a mut [f32],
}

impl Kernel for Gemv<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { a, b, columns, epilogue, out } = self;
        match b {
            Rhs::Packed(b) => packed(s, a, b.data(), b.n(), columns.clone(), out),
            Rhs::Plain(b) if b.col_stride == 1 => row_major(s, a, &b, columns.clone(), out),
            Rhs::Plain(b) => transposed(s, a, &b, columns.clone(), out),
            Rhs::Bits(b) => b.multiply(s, a, columns.clone(), out),
        }
        finish(s, epilogue, columns, out);
    }
}

/// Panels of packed B, one after the other: a single stream of addresses. Four panels side by side, whose sums need no
/// addition at the end, took a quarter longer where B does not fit into the caches.
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
fn packed<S: Simd>(s: S, a: &[f32], b: &[f32], n: usize, columns: Range<usize>, out: &mut [f32]) {
    let k = a.len();
    let nr = const { table::tile(S::ISA).nrv * S::LANES };
    for j in columns.clone().step_by(nr) {
        let width = nr.min((n - j).next_multiple_of(S::LANES));
        let panel = &b[j * k..][..width * k];
        let end = columns.end.min(j + width);
        let out = &mut out[j - columns.start..end - columns.start];
        match width / S::LANES {
            1 => one_panel::<S, 1>(s, a, panel, out),
            2 => one_panel::<S, 2>(s, a, panel, out),
            3 => one_panel::<S, 3>(s, a, panel, out),
            vectors => unreachable!("panel of {vectors} vectors"),
        }
    }
}

/// A panel of `NV` vectors. Rows of it that follow each other have sums of their own, for as many chains as `VECTORS`.
#[inline(always)]
fn one_panel<S: Simd, const NV: usize>(s: S, a: &[f32], panel: &[f32], out: &mut [f32]) {
    /// Most rows side by side.
    const ROWS: usize = 4;
    let rows = const { if VECTORS / NV < ROWS { VECTORS / NV } else { ROWS } };
    let width = NV * S::LANES;
    let mut acc = [[s.splat(0.0); NV]; ROWS];
    let (blocks, xs) = (panel.chunks_exact(rows * width), a.chunks_exact(rows));
    let (last, last_xs) = (blocks.remainder(), xs.remainder());
    for (block, x) in blocks.zip(xs) {
        for (u, acc) in acc.iter_mut().enumerate().take(rows) {
            let x = s.splat(x[u]);
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = s.mul_add(x, s.load(&block[u * width + v * S::LANES..]), *acc);
            }
        }
    }
    for (row, &x) in last.chunks_exact(width).zip(last_xs) {
        for (v, acc) in acc[0].iter_mut().enumerate() {
            *acc = s.mul_add(s.splat(x), s.load(&row[v * S::LANES..]), *acc);
        }
    }
    for (v, out) in out.chunks_mut(S::LANES).enumerate().take(NV) {
        let sum = s.add(s.add(acc[0][v], acc[1][v]), s.add(acc[2][v], acc[3][v]));
        s.store_partial(out, sum);
    }
}

/// Rows of B contiguous along n.
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
fn row_major<S: Simd>(s: S, a: &[f32], b: &Matrix<'_>, columns: Range<usize>, out: &mut [f32]) {
    let mut j = columns.start;
    while j < columns.end {
        let group = VECTORS * S::LANES;
        let at = j - columns.start;
        if j + group <= columns.end {
            let mut acc = [s.splat(0.0); VECTORS];
            for (p, &x) in a.iter().enumerate() {
                let row = &b.data[p * b.row_stride + j..][..group];
                let x = s.splat(x);
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = s.mul_add(x, s.load(&row[v * S::LANES..]), *acc);
                }
            }
            for (v, acc) in acc.into_iter().enumerate() {
                s.store(&mut out[at + v * S::LANES..], acc);
            }
            j += group;
        } else {
            let cols = S::LANES.min(columns.end - j);
            let mut acc = s.splat(0.0);
            for (p, &x) in a.iter().enumerate() {
                let row = &b.data[p * b.row_stride + j..][..cols];
                acc = s.mul_add(s.splat(x), s.load_partial(row), acc);
            }
            s.store_partial(&mut out[at..at + cols], acc);
            j += cols;
        }
    }
}

/// Columns of B contiguous along k.
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
fn transposed<S: Simd>(s: S, a: &[f32], b: &Matrix<'_>, columns: Range<usize>, out: &mut [f32]) {
    let k = a.len();
    let whole = k - k % S::LANES;
    let mut j = columns.start;
    while j < columns.end {
        let count = COLUMNS.min(columns.end - j);
        // Missing columns repeat the last one, so that one loop serves.
        let mut column = [&b.data[..0]; COLUMNS];
        for (q, column) in column.iter_mut().enumerate() {
            *column = if k == 0 { &[] } else { &b.data[(j + q.min(count - 1)) * b.col_stride..][..k] };
        }
        let mut acc = [s.splat(0.0); COLUMNS];
        let mut p = 0;
        while p < whole {
            let x = s.load(&a[p..]);
            for (acc, column) in acc.iter_mut().zip(&column) {
                *acc = s.mul_add(x, s.load(&column[p..]), *acc);
            }
            p += S::LANES;
        }
        if p < k {
            let x = s.load_partial(&a[p..]);
            for (acc, column) in acc.iter_mut().zip(&column) {
                *acc = s.mul_add(x, s.load_partial(&column[p..]), *acc);
            }
        }
        let at = j - columns.start;
        for (out, acc) in out[at..at + count].iter_mut().zip(acc) {
            *out = s.reduce_add(acc);
        }
        j += count;
    }
}

/// Bias, residual and activation of finished sums.
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
fn finish<S: Simd>(s: S, epilogue: &Epilogue<'_>, columns: Range<usize>, out: &mut [f32]) {
    let (bounds, after) = split_activation(epilogue.activation);
    for (at, out) in out.chunks_mut(S::LANES).enumerate() {
        let j = columns.start + at * S::LANES;
        let mut x = s.load_partial(out);
        if let Some(bias) = epilogue.bias {
            x = s.add(x, s.load_partial(&bias[j..j + out.len()]));
        }
        if let Some(residual) = epilogue.residual {
            x = s.add(x, s.load_partial(&residual[j..j + out.len()]));
        }
        if let Some(bounds) = bounds {
            x = clamp(s, x, bounds);
        }
        s.store_partial(out, x);
    }
    if let Some(activation) = after {
        // Its loops are one function of the module that all kernels share.
        dispatch(S::ISA, Activate { activation, c: out.as_mut_ptr(), rows: 1, cols: out.len(), ld: 0 });
    }
}
