//! The microkernel: a tile of sums in registers.
//!
//! ```text
//! acc[0..H][0..NV] = bias, or what an earlier pass left
//! for p in 0..k                                   groups of 2 or 4 neighbours along k
//!     b = NV vectors of row p of the panel
//!     for i in 0..H
//!         acc[i] += dot(splat(a[i][p]), b)
//! sums = acc
//!
//! and with Form::Split, whose groups are in a sequence of the panel's own, instead of the loop along k
//!
//! for (p, q) in pairs of groups                   whose products may be added in 16 bits
//!     for i in 0..H
//!         acc[i] += dot_two(splat(a[i][p]), splat(a[i][q]), row of p, row of q)
//! for p in other groups
//!     for i in 0..H
//!         acc[i] += dot(splat(a[i][p]), row of p)
//! ```
//!
//! The sums go to a buffer that stays in the first-level cache, whose rows are whole vectors, for `output.rs`: a tile knows no
//! edges. Only where all its columns are bytes of an output to which nothing is added are they quantised in registers.

use super::Form;
use super::output::{Columns, Quantized};
use super::pack::Sequence;
use super::table::{self, MAX_MR, MAX_NRV};
use crate::simd::{Dot, DotKernel, Isa, Simd, dispatch_dot, opaque};

/// Tiles of one height, one below the other, times one panel of B.
#[derive(Clone, Copy)]
pub(super) struct Strip<'a> {
    /// Rows of each tile.
    pub(super) height: usize,
    /// Number of tiles.
    pub(super) tiles: usize,
    /// Whether the rows of A are.
    pub(super) interleaved: bool,
    /// Vectors of the panel.
    pub(super) vectors: usize,
    /// Groups along k of this pass.
    pub(super) k: usize,
    /// Groups before them.
    pub(super) before: usize,
    /// First row of A, or the first tile's interleaved rows.
    pub(super) a: *const i32,
    /// Groups between rows of A; the first ones of tiles if interleaved.
    pub(super) lda: usize,
    /// Elements between tiles of A.
    pub(super) next: usize,
    /// First row of this pass of the panel of B; rows are as wide as the tile, without gaps.
    pub(super) b: *const i32,
    /// First sum.
    pub(super) sums: *mut i32,
    /// Elements between rows of sums.
    pub(super) ld: usize,
    /// What sums begin with in the first pass over k, as wide as the tile; null in others, which add to what is there.
    pub(super) start: *const i32,
    /// Where sums go instead of the buffer if this is the last pass, and the first tile's row and column in it; none for tiles
    /// that do not quantise.
    pub(super) to: Option<(&'a Quantized<'a>, usize, usize)>,
    /// Of [`Form::Split`]: which groups the rows of the panel are, instead of `k` from `before` on.
    pub(super) sequence: Sequence<'a>,
}

impl Strip<'_> {
    /// Computes it.
    ///
    /// # Safety
    /// A: `tiles * height` rows of `before + k`, and of what the sequence asks for; B: `k` rows of `vectors`, or as many as the
    /// sequence has; start: one row or null; sums and the output: `tiles * height` rows of `vectors`, which nobody else uses. The
    /// table has a tile of `height` and `vectors`, and the form is available.
    pub(super) unsafe fn run(self, isa: Isa, form: Form) {
        macro_rules! heights {
            ($nv:literal: $($h:literal)*) => {
                match self.height {
                    $($h if self.interleaved => dispatch_dot(isa, form, Tiles::<$h, $nv, true>(self)),)*
                    $($h => dispatch_dot(isa, form, Tiles::<$h, $nv, false>(self)),)*
                    height => unreachable!("tile height {height}"),
                }
            };
        }
        const { assert!(MAX_MR == 12 && MAX_NRV == 2) };
        match self.vectors {
            1 => heights!(1: 1 2 3 4 5 6 7 8 9 10 11 12),
            2 => heights!(2: 1 2 3 4 5 6 7 8 9 10 11 12),
            vectors => unreachable!("tile width {vectors}"),
        }
    }
}

/// A [`Strip`] of tiles of `H` rows and `NV` vectors; [`Strip::run`]'s contract holds for whoever makes one.
struct Tiles<'a, const H: usize, const NV: usize, const INTERLEAVED: bool>(Strip<'a>);

impl<const H: usize, const NV: usize, const INTERLEAVED: bool> DotKernel for Tiles<'_, H, NV, INTERLEAVED> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dot>(self, d: D) {
        // Constant: tiles that the table does not use leave no code.
        if const {
            let tile = table::tile(D::S::ISA, D::FORM);
            tile.has(H, NV, INTERLEAVED)
        } {
            // SAFETY: the contract of `Strip::run`.
            unsafe { strip::<D, H, NV, INTERLEAVED>(d, &self.0) }
        } else {
            unreachable!("no microkernel of {H} rows and {NV} vectors for {:?}", D::S::ISA)
        }
    }
}

/// Never inlined on wasm, where optimising compilers choke on huge functions; inlined natively, where only the outermost
/// function of a dispatch has the target features.
///
/// # Safety
/// As [`Strip::run`].
#[cfg_attr(target_arch = "wasm32", inline(never))]
#[cfg_attr(not(target_arch = "wasm32"), inline(always))]
unsafe fn strip<D: Dot, const H: usize, const NV: usize, const INTERLEAVED: bool>(d: D, strip: &Strip<'_>) {
    let s = d.simd();
    let lanes = D::S::LANES;
    let Strip { tiles, k, before, lda, ld, start, .. } = *strip;
    // SAFETY: the caller promises that all rows are there, and every offset below stays inside them.
    unsafe {
        for tile in 0..tiles {
            let sums = strip.sums.add(tile * H * ld);
            let mut acc = [[s.splat_i32(0); NV]; H];
            // The first row again and again, or each.
            let (from, next) = if start.is_null() { (sums.cast_const(), ld) } else { (start, 0) };
            for (i, row) in acc.iter_mut().enumerate() {
                for (v, x) in row.iter_mut().enumerate() {
                    *x = s.load_i32_ptr(from.add(i * next + v * lanes));
                }
            }
            let a = strip.a.add(tile * strip.next);
            if const { matches!(D::FORM, Form::Split) } {
                sequence_of_rows(d, &mut acc, a, strip.b, strip.sequence);
            } else if INTERLEAVED {
                interleaved_rows(d, &mut acc, a.add(before * H), strip.b, k);
            } else {
                let mut b = strip.b;
                for p in before..before + k {
                    step(d, &mut acc, core::array::from_fn(|i| a.add(i * lda + p)), b);
                    b = b.add(NV * lanes);
                }
            }
            if const { NV == 2 && table::tile(D::S::ISA, D::FORM).quantizes(H) }
                && let Some((to, row, column)) = strip.to
            {
                let columns = Columns::new(s, to, column);
                let y = to.at(row + tile * H, column);
                unrolled!(i in 0..H, columns.store(s, y.add(i * to.row_len()), [acc[i][0], acc[i][NV - 1]]));
                continue;
            }
            for (i, row) in acc.iter().enumerate() {
                for (v, x) in row.iter().enumerate() {
                    s.store_i32_ptr(sums.add(i * ld + v * lanes), *x);
                }
            }
        }
    }
}

/// Lowest tile whose steps along k are written out several times.
const MIN_UNROLLED: usize = 4;

/// All steps along k with interleaved rows of A; for its shape see the same for floats, in `gemm/tile.rs`.
///
/// # Safety
/// As [`Strip::run`].
#[inline(always)]
unsafe fn interleaved_rows<D: Dot, const H: usize, const NV: usize>(
    d: D,
    acc: &mut [[<D::S as Simd>::I32; NV]; H],
    mut a: *const i32,
    mut b: *const i32,
    k: usize,
) {
    let ldb = NV * D::S::LANES;
    let next = H * size_of::<i32>();
    // SAFETY: promised by the caller.
    unsafe {
        let end = b.add(k * ldb);
        macro_rules! step {
            ($next:ident) => {
                step(d, acc, core::array::from_fn(|i| a.add(i)), b);
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
            // Low tiles are rare, and are kept short.
            if const { H >= MIN_UNROLLED } {
                step!(next);
                step!(next);
                step!(next);
            }
        }
    }
}

/// All groups of a panel in its sequence, with interleaved rows of A.
///
/// # Safety
/// As [`Strip::run`].
#[inline(always)]
unsafe fn sequence_of_rows<D: Dot, const H: usize, const NV: usize>(
    d: D,
    acc: &mut [[<D::S as Simd>::I32; NV]; H],
    a: *const i32,
    mut b: *const i32,
    Sequence { pairs, others }: Sequence<'_>,
) {
    let s = d.simd();
    let ldb = NV * D::S::LANES;
    // SAFETY: promised by the caller.
    unsafe {
        for pair in pairs {
            let [p, q] = pair.map(|place| a.byte_add(place as usize));
            let mut bv = [[s.splat_i32(0); 2]; NV];
            for (v, x) in bv.iter_mut().enumerate() {
                *x = [0, ldb].map(|row| s.load_i32_ptr(b.add(row + v * D::S::LANES)));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let a = [p, q].map(|a| s.splat_i32_ptr(a.add(i)));
                for v in 0..NV {
                    acc[v] = d.dot_two(acc[v], a, bv[v]);
                }
            }
            b = b.add(2 * ldb);
        }
        for &place in others {
            let a = a.byte_add(place as usize);
            step(d, acc, core::array::from_fn(|i| a.add(i)), b);
            b = b.add(ldb);
        }
    }
}

/// One step along k.
///
/// # Safety
/// A group at each of `rows` and `NV` vectors at `b` must be readable.
#[inline(always)]
unsafe fn step<D: Dot, const H: usize, const NV: usize>(
    d: D,
    acc: &mut [[<D::S as Simd>::I32; NV]; H],
    rows: [*const i32; H],
    b: *const i32,
) {
    let s = d.simd();
    let mut bv = [s.splat_i32(0); NV];
    // SAFETY: promised by the caller.
    unsafe {
        for (v, x) in bv.iter_mut().enumerate() {
            *x = s.load_i32_ptr(b.add(v * D::S::LANES));
        }
        for i in 0..H {
            let a = s.splat_i32_ptr(rows[i]);
            for v in 0..NV {
                acc[i][v] = d.dot(acc[i][v], a, bv[v]);
            }
        }
    }
}
