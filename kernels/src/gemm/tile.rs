//! The microkernel: a tile of C in registers.
//!
//! ```text
//! acc[0..H][0..NV] = 0
//! for p in 0..k
//!     b = NV vectors of row p of the panel
//!     for i in 0..H
//!         acc[i] += splat(a[i][p]) * b
//! C = epilogue(acc, + C if an earlier pass left partial sums there)
//! ```
//!
//! A is read where it lies: H rows, each contiguous along k. What is not contiguous (transposed A, convolution patches)
//! is first gathered into such rows, which is a plain copy; the classic interleaved panel of A would need a
//! transposition and measured no faster, since broadcasts come from the first-level cache either way.

use super::table::{MAX_MR, MAX_NRV};
use crate::simd::Simd;

/// What happens to the accumulators; pointers are at the tile's first column, null where absent.
#[derive(Clone, Copy)]
pub(super) struct Finish {
    /// Add what is in C: this is not the first pass over k.
    pub(super) accumulate: bool,
    /// One value per column.
    pub(super) bias: *const f32,
    /// Laid out like C.
    pub(super) residual: *const f32,
    /// `min(max(x, lo), hi)`; NaN stays.
    pub(super) clamp: Option<(f32, f32)>,
}

/// Where a tile reads and writes.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// Length of the dot products.
    pub(super) k: usize,
    /// First row of A, contiguous along k.
    pub(super) a: *const f32,
    /// Elements between rows of A.
    pub(super) lda: usize,
    /// First row of the panel of B.
    pub(super) b: *const f32,
    /// Elements between rows of the panel.
    pub(super) ldb: usize,
    /// First element of the tile of C.
    pub(super) c: *mut f32,
    /// Elements between rows of C (and of the residual).
    pub(super) ldc: usize,
}

/// `H` rows by `NV` vectors of C.
///
/// Never inlined on wasm, where optimising compilers choke on huge functions; inlined natively, where only the outermost
/// function of a dispatch has the target features.
///
/// # Safety
/// A: `H` rows of `k`; B: `k` rows of `NV` vectors; C (and the residual): `H` rows of `NV` vectors; bias: `NV` vectors.
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
unsafe fn full<S: Simd, const H: usize, const NV: usize>(s: S, o: &Operands, f: &Finish) {
    let lanes = S::LANES;
    let mut acc = [[s.splat(0.0); NV]; H];
    let mut rows = [o.a; H];
    // SAFETY: the caller promises that all rows are there, and every offset below stays inside them.
    unsafe {
        for (i, row) in rows.iter_mut().enumerate() {
            *row = o.a.add(i * o.lda);
        }
        let mut b = o.b;
        let ldb = o.ldb;
        let mut p = 0;
        // Four steps per turn of the loop: the pointers move once, and addresses are constants apart.
        while p + 4 <= o.k {
            for u in 0..4 {
                step(s, &mut acc, &rows, p + u, b);
                b = b.add(ldb);
            }
            p += 4;
        }
        while p < o.k {
            step(s, &mut acc, &rows, p, b);
            b = b.add(ldb);
            p += 1;
        }

        if f.accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                for (v, x) in row.iter_mut().enumerate() {
                    *x = s.add(*x, s.load_ptr(o.c.add(i * o.ldc + v * lanes)));
                }
            }
        }
        if !f.bias.is_null() {
            let mut bias = [s.splat(0.0); NV];
            for (v, x) in bias.iter_mut().enumerate() {
                *x = s.load_ptr(f.bias.add(v * lanes));
            }
            for row in &mut acc {
                for (x, bias) in row.iter_mut().zip(bias) {
                    *x = s.add(*x, bias);
                }
            }
        }
        if !f.residual.is_null() {
            for (i, row) in acc.iter_mut().enumerate() {
                for (v, x) in row.iter_mut().enumerate() {
                    *x = s.add(*x, s.load_ptr(f.residual.add(i * o.ldc + v * lanes)));
                }
            }
        }
        if let Some((lo, hi)) = f.clamp {
            let (lo, hi) = (s.splat(lo), s.splat(hi));
            for row in &mut acc {
                for x in row {
                    // Comparisons with NaN are false: NaN passes both.
                    let raised = s.select(s.lt(*x, lo), lo, *x);
                    *x = s.select(s.lt(hi, raised), hi, raised);
                }
            }
        }
        for (i, row) in acc.iter().enumerate() {
            for (v, x) in row.iter().enumerate() {
                s.store_ptr(o.c.add(i * o.ldc + v * lanes), *x);
            }
        }
    }
}

/// One step along k.
///
/// # Safety
/// `rows[..][p]` and `NV` vectors at `b` must be readable.
#[inline(always)]
unsafe fn step<S: Simd, const H: usize, const NV: usize>(
    s: S,
    acc: &mut [[S::F32; NV]; H],
    rows: &[*const f32; H],
    p: usize,
    b: *const f32,
) {
    let mut bv = [s.splat(0.0); NV];
    // SAFETY: promised by the caller.
    unsafe {
        for (v, x) in bv.iter_mut().enumerate() {
            *x = s.load_ptr(b.add(v * S::LANES));
        }
        for i in 0..H {
            let a = s.splat_ptr(rows[i].add(p));
            for v in 0..NV {
                acc[i][v] = s.mul_add(a, bv[v], acc[i][v]);
            }
        }
    }
}

/// Most elements of a tile of any instruction set: AVX-512 has 16 lanes.
const MAX_TILE: usize = MAX_MR * MAX_NRV * 16;

/// A tile of `h` rows and `cols` columns, where `cols` need not fill its vectors.
///
/// A partial tile goes through a buffer of full width, so that the microkernel knows whole vectors only.
///
/// # Safety
/// As [`full`], but C, residual and bias need only have `cols` columns. `1 <= h <= MAX_MR` and
/// `1 <= cols <= MAX_NRV * LANES`; `o.b` has `cols` rounded up to vectors.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const MR: usize, const NRV: usize>(
    s: S,
    h: usize,
    cols: usize,
    o: &Operands,
    f: &Finish,
) {
    let nv = cols.div_ceil(S::LANES);
    if nv * S::LANES == cols {
        // SAFETY: promised by the caller.
        return unsafe { select::<S, MR, NRV>(s, h, nv, o, f) };
    }
    let width = nv * S::LANES;
    let mut c = [0.0f32; MAX_TILE];
    let mut residual = [0.0f32; MAX_TILE];
    let mut bias = [0.0f32; MAX_NRV * 16];
    let mut edge = Operands { c: c.as_mut_ptr(), ldc: width, ..*o };
    let mut finish = *f;
    // SAFETY: h * width <= MAX_TILE elements in the buffers; outside, `cols` columns as the caller promises.
    unsafe {
        if f.accumulate {
            copy_rows(o.c, o.ldc, edge.c, width, h, cols);
        }
        if !f.residual.is_null() {
            copy_rows(f.residual, o.ldc, residual.as_mut_ptr(), width, h, cols);
            finish.residual = residual.as_ptr();
        }
        if !f.bias.is_null() {
            copy_rows(f.bias, 0, bias.as_mut_ptr(), 0, 1, cols);
            finish.bias = bias.as_ptr();
        }
        edge.c = c.as_mut_ptr();
        select::<S, MR, NRV>(s, h, nv, &edge, &finish);
        copy_rows(edge.c, width, o.c, o.ldc, h, cols);
    }
}

/// # Safety
/// `rows` rows of `cols` elements on both sides.
#[inline(always)]
unsafe fn copy_rows(src: *const f32, lds: usize, dst: *mut f32, ldd: usize, rows: usize, cols: usize) {
    for i in 0..rows {
        for j in 0..cols {
            // SAFETY: promised by the caller.
            unsafe { *dst.add(i * ldd + j) = *src.add(i * lds + j) };
        }
    }
}

/// Calls the microkernel of `h` rows and `nv` vectors.
///
/// # Safety
/// As [`full`].
#[inline(always)]
unsafe fn select<S: Simd, const MR: usize, const NRV: usize>(s: S, h: usize, nv: usize, o: &Operands, f: &Finish) {
    const { assert!(MR <= MAX_MR && NRV <= MAX_NRV && MAX_MR == 14 && MAX_NRV == 2) };
    macro_rules! heights {
        ($nv:literal: $($h:literal)*) => {
            match h {
                // The comparisons are constant: heights above MR leave no code.
                $($h => if const { $h <= MR && $nv <= NRV } { unsafe { full::<S, $h, $nv>(s, o, f) } },)*
                _ => unreachable!("tile height {h}"),
            }
        };
    }
    // SAFETY: promised by the caller.
    match nv {
        1 => heights!(1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        2 => heights!(2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        _ => unreachable!("tile width {nv}"),
    }
}
