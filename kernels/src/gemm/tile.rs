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
//! is first gathered into such rows, which is a plain copy, where the classic interleaved panel of A would need a
//! transposition; broadcasts come from the first-level cache either way.
//!
//! Where the table says so, and the product is large enough for it, the rows of a tile are interleaved first, and a second
//! loop reads those. In V8 a broadcast is two instructions, the address (row plus k plus memory) and the load; with
//! constant distances the addresses are shared by the four steps of a turn but for one register: of a step of 6 x 2 sums
//! 26 instructions instead of 31, for 12 multiply-adds. And A, which comes from the second-level cache, is one stream.
//! CONTRIBUTING.md says how to have V8 print its code.

use super::table::{self, MAX_MR, MAX_NRV};
use crate::simd::{Isa, Kernel, Simd, dispatch, opaque};
use core::mem::MaybeUninit;

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
    /// First row of A, contiguous along k, or the first of the tile's interleaved rows.
    pub(super) a: *const f32,
    /// Elements between rows of A; the first ones of tiles if interleaved.
    pub(super) lda: usize,
    /// First row of the panel of B; rows are as wide as the tile, without gaps.
    pub(super) b: *const f32,
    /// First element of the tile of C.
    pub(super) c: *mut f32,
    /// Elements between rows of C (and of the residual).
    pub(super) ldc: usize,
}

/// `H` rows by `NV` vectors of C, from interleaved rows of A or from any.
///
/// # Safety
/// A: `H` rows of `k`; B: `k` rows of `NV` vectors; C (and the residual): `H` rows of `NV` vectors; bias: `NV` vectors.
#[inline(always)]
unsafe fn full<S: Simd, const H: usize, const NV: usize, const INTERLEAVED: bool>(s: S, o: &Operands, f: &Finish) {
    let lanes = S::LANES;
    let mut acc = [[s.splat(0.0); NV]; H];
    // SAFETY: the caller promises that all rows are there, and every offset below stays inside them.
    unsafe {
        if INTERLEAVED {
            interleaved_rows(s, &mut acc, o);
        } else {
            any_rows(s, &mut acc, o);
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
        if let Some(bounds) = f.clamp {
            for row in &mut acc {
                for x in row {
                    *x = super::clamp(s, *x, bounds);
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

/// All steps along k with rows of A anywhere.
///
/// # Safety
/// As [`full`].
#[inline(always)]
unsafe fn any_rows<S: Simd, const H: usize, const NV: usize>(s: S, acc: &mut [[S::F32; NV]; H], o: &Operands) {
    let mut rows = [o.a; H];
    // Constant, so that the second vector's offset is part of the instruction.
    let ldb = NV * S::LANES;
    let mut b = o.b;
    let mut p = 0;
    // SAFETY: promised by the caller.
    unsafe {
        for (i, row) in rows.iter_mut().enumerate() {
            *row = o.a.add(i * o.lda);
        }
        if const { table::tile(S::ISA).unroll == 4 } {
            while p + 4 <= o.k {
                for u in 0..4 {
                    step(s, acc, rows.map(|row| row.add(p + u)), b);
                    b = b.add(ldb);
                }
                p += 4;
            }
        }
        while p < o.k {
            step(s, acc, rows.map(|row| row.add(p)), b);
            b = b.add(ldb);
            p += 1;
        }
    }
}

/// All steps along k with interleaved rows of A.
///
/// The step to the next column of A comes from memory, anew for each turn, so that LLVM does not see that addresses grow
/// evenly: its loop strength reduction would rewrite them, and lose that their sums do not wrap around, which WebAssembly's
/// offsets ask for. A way out after each step keeps the steps in blocks of their own: in one, LLVM would move the sums of
/// one step among those of the next, with more vectors alive than there are registers.
///
/// # Safety
/// As [`full`].
#[inline(always)]
unsafe fn interleaved_rows<S: Simd, const H: usize, const NV: usize>(s: S, acc: &mut [[S::F32; NV]; H], o: &Operands) {
    let ldb = NV * S::LANES;
    let next = H * size_of::<f32>();
    let (mut a, mut b) = (o.a, o.b);
    // SAFETY: promised by the caller.
    unsafe {
        let end = b.add(o.k * ldb);
        macro_rules! step {
            ($next:ident) => {
                step(s, acc, core::array::from_fn(|i| a.add(i)), b);
                b = b.add(ldb);
                a = a.byte_add($next);
                if b == end {
                    break;
                }
            };
        }
        while b != end {
            let next = opaque(&next);
            step!(next);
            step!(next);
            step!(next);
            step!(next);
        }
    }
}

/// One step along k.
///
/// # Safety
/// An element at each of `rows` and `NV` vectors at `b` must be readable.
#[inline(always)]
unsafe fn step<S: Simd, const H: usize, const NV: usize>(
    s: S,
    acc: &mut [[S::F32; NV]; H],
    rows: [*const f32; H],
    b: *const f32,
) {
    let mut bv = [s.splat(0.0); NV];
    // SAFETY: promised by the caller.
    unsafe {
        for (v, x) in bv.iter_mut().enumerate() {
            *x = s.load_ptr(b.add(v * S::LANES));
        }
        for i in 0..H {
            let a = s.splat_ptr(rows[i]);
            for v in 0..NV {
                acc[i][v] = s.mul_add(a, bv[v], acc[i][v]);
            }
        }
    }
}

/// Most elements of a tile of any instruction set: AVX-512 has 16 lanes.
const MAX_TILE: usize = MAX_MR * MAX_NRV * 16;

/// Tiles of one height, one below the other, times one panel of B.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    /// Rows of each tile.
    pub(super) height: usize,
    /// Number of tiles.
    pub(super) tiles: usize,
    /// Whether the rows of A are.
    pub(super) interleaved: bool,
    /// Columns; they need not fill the panel's vectors.
    pub(super) cols: usize,
    /// The first tile.
    pub(super) operands: Operands,
    /// The first tile.
    pub(super) finish: Finish,
}

impl Strip {
    /// Computes it with the vectors of `isa`.
    ///
    /// # Safety
    /// A: `tiles * height` rows of `k`, or the interleaved rows of as many tiles, for which the table must have tiles; B: `k`
    /// rows of `cols` rounded up to vectors; C and residual: `tiles * height` rows of `cols`, which nobody else uses; bias:
    /// `cols`. `height` and `cols` are at most what the table says.
    pub(super) unsafe fn run(self, isa: Isa) {
        let vectors = self.cols.div_ceil(isa.lanes());
        macro_rules! heights {
            ($nv:literal: $($h:literal)*) => {
                match self.height {
                    $($h if self.interleaved => dispatch(isa, Tiles::<$h, $nv, true>(self)),)*
                    $($h => dispatch(isa, Tiles::<$h, $nv, false>(self)),)*
                    height => unreachable!("tile height {height}"),
                }
            };
        }
        const { assert!(MAX_MR == 14 && MAX_NRV == 3) };
        match vectors {
            1 => heights!(1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
            2 => heights!(2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
            3 => heights!(3: 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
            vectors => unreachable!("tile width {vectors}"),
        }
    }
}

/// A [`Strip`] of tiles of `H` rows and `NV` vectors; [`Strip::run`]'s contract holds for whoever makes one.
struct Tiles<const H: usize, const NV: usize, const INTERLEAVED: bool>(Strip);

impl<const H: usize, const NV: usize, const INTERLEAVED: bool> Kernel for Tiles<H, NV, INTERLEAVED> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Constant: tiles that the table does not use leave no code.
        if const {
            let t = table::tile(S::ISA);
            NV <= t.nrv && H <= t.rows(NV) && (!INTERLEAVED || t.has_interleaved(H))
        } {
            // SAFETY: the contract of `Strip::run`.
            unsafe { strip::<S, H, NV, INTERLEAVED>(s, &self.0) }
        } else {
            unreachable!("no microkernel of {H} rows and {NV} vectors for {:?}", S::ISA)
        }
    }
}

/// A partial tile goes through a buffer of full width, so that the microkernel knows whole vectors only.
///
/// Never inlined on wasm, where optimising compilers choke on huge functions; inlined natively, where only the outermost
/// function of a dispatch has the target features.
///
/// # Safety
/// As [`Strip::run`].
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
unsafe fn strip<S: Simd, const H: usize, const NV: usize, const INTERLEAVED: bool>(s: S, strip: &Strip) {
    let Strip { tiles, cols, operands, finish, .. } = *strip;
    let width = NV * S::LANES;
    let edge = cols != width;
    // Opaque inside the loop: it is for every tile the same, and the compiler would write all of `full` out for each case.
    let is_edge = || opaque(&edge);
    // Zeros, since the lanes beyond the last column are computed too. Filled only if needed: a tile of a product with
    // small k takes less time than the filling.
    let mut c = MaybeUninit::<[f32; MAX_TILE]>::uninit();
    let mut residual = MaybeUninit::<[f32; MAX_TILE]>::uninit();
    let mut bias = MaybeUninit::<[f32; MAX_NRV * 16]>::uninit();
    // SAFETY: H * width <= MAX_TILE elements in the buffers; outside, `cols` columns as the caller promises.
    unsafe {
        if edge {
            c.as_mut_ptr().cast::<f32>().write_bytes(0, H * width);
            residual.as_mut_ptr().cast::<f32>().write_bytes(0, H * width);
            bias.as_mut_ptr().cast::<f32>().write_bytes(0, width);
            if !finish.bias.is_null() {
                copy_rows(finish.bias, 0, bias.as_mut_ptr().cast(), 0, 1, cols);
            }
        }
        for tile in 0..tiles {
            let mut o = operands;
            o.a = o.a.wrapping_add(tile * H * o.lda);
            o.c = o.c.wrapping_add(tile * H * o.ldc);
            let mut f = finish;
            if !f.residual.is_null() {
                f.residual = f.residual.wrapping_add(tile * H * o.ldc);
            }
            let out = o.c;
            if is_edge() {
                if f.accumulate {
                    copy_rows(out, o.ldc, c.as_mut_ptr().cast(), width, H, cols);
                }
                if !f.residual.is_null() {
                    copy_rows(f.residual, o.ldc, residual.as_mut_ptr().cast(), width, H, cols);
                    f.residual = residual.as_ptr().cast();
                }
                if !f.bias.is_null() {
                    f.bias = bias.as_ptr().cast();
                }
                o.c = c.as_mut_ptr().cast();
                o.ldc = width;
            }
            full::<S, H, NV, INTERLEAVED>(s, &o, &f);
            if is_edge() {
                copy_rows(o.c, width, out, operands.ldc, H, cols);
            }
        }
    }
}

/// Never inlined: each tile would carry its own copies for what few products need.
///
/// # Safety
/// `rows` rows of `cols` elements on both sides.
#[inline(never)]
unsafe fn copy_rows(src: *const f32, lds: usize, dst: *mut f32, ldd: usize, rows: usize, cols: usize) {
    for i in 0..rows {
        for j in 0..cols {
            // SAFETY: promised by the caller.
            unsafe { *dst.add(i * ldd + j) = *src.add(i * lds + j) };
        }
    }
}
