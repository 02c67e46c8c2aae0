//! The loop nest: blocks of the output in parallel, each with its rows of A and some panels of B.
//!
//! ```text
//! for (ic, jc) in blocks of the output            in parallel
//!     gather A[ic..] into rows, all of k          stays in L2; interleaved where it pays, from the image itself if that can be
//!                                                 read; not if tiles can read A itself
//!     start = bias, less what A's zero point adds
//!     for groups of panels of the block           their sums stay in L1
//!         for pc in 0..k step kc
//!             for panels of the group             kc x NR of B, stays in L1
//!                 for tiles of the block
//!                     sums += A[tile, pc..] B[pc.., panel]        tile.rs
//!         take zero points of B back              forms of bytes only, if there are any
//!         output(sums)                            output.rs
//! ```
//!
//! Departures from the nest for floats ([`crate::gemm`]): A is gathered unless tiles can read its bytes where they are, and whole,
//! since a group of four bytes per element is a quarter of it; sums never leave the cache, so that an output sees each once.

use super::gather::Lhs;
use super::output::{Quantized, Sink};
use super::pack::{Pieces, Sequence};
use super::tile::Strip;
use super::{Form, PackedQ, table};
use crate::error::{Error, Result};
use crate::gemm::{leading_dimension, part};
use crate::par::Cx;
use crate::simd::interleave::{GATHERED, interleave_tiles};
use crate::simd::{Dot, DotKernel, Isa, Kernel, Simd, dispatch, dispatch_dot};
use core::ops::Range;

/// One product: `m` rows of `lhs` times `b`, whose columns stand from `column` on in the output.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) lhs: Lhs<'a>,
    pub(super) b: &'a PackedQ,
    pub(super) column: usize,
    /// One for each column of `b`.
    pub(super) bias: Option<&'a [i32]>,
}

/// A task should have this many multiplications and additions at least: about ten microseconds.
const TASK_OPS: u64 = 1 << 20;
/// More tasks than this would not balance better.
const MAX_TASKS: u64 = 32;
/// Fewest columns of a block, whose rows of A are gathered for each block anew.
const MIN_COLUMNS: usize = 128;
/// Groups of A that a block gathers at most; 192 KiB.
const MAX_GATHER: usize = 48 * 1024;
/// Bytes of B from which blocks along m do not pay, unless lanes were idle without: B comes from L3 or memory for each of them. In
/// Chromium on two lanes (Zen 5, modules in turns) that made DistilBERT 1.05 times as fast, ResNet-50 1.02.
const LARGE_B: usize = 512 << 10;
/// Most rows of a block.
const MAX_ROWS: usize = 128;
/// Sums of a group of panels, if there are several; 8 KiB.
const GROUP_SUMS: usize = 2048;

/// How the output of each product is cut.
struct Grid {
    /// Tiles along m: `tall` of `height + 1` rows, then the others of `height`.
    tiles: usize,
    height: usize,
    tall: usize,
    panels: usize,
    row_blocks: usize,
    panel_blocks: usize,
}

impl Grid {
    fn new(cx: &Cx<'_>, form: Form, problems: usize, m: usize, n: usize, k: usize) -> Self {
        let isa = cx.isa();
        let mr = table::tile(isa, form).mr;
        let nr = table::panel_width(isa, form);
        let (tiles, panels) = (m.div_ceil(mr), n.div_ceil(nr));
        let ops = (2 * m as u64).saturating_mul(n as u64).saturating_mul(k as u64);
        // One lane needs no cut but those that keep blocks in its caches.
        let most_tasks = if cx.threads() == 1 { 1 } else { MAX_TASKS };
        let want = (ops.saturating_mul(problems as u64) / TASK_OPS).clamp(1, most_tasks).div_ceil(problems as u64);
        let most = (MAX_GATHER / k.div_ceil(form.group()).max(1)).clamp(4 * mr, MAX_ROWS.max(4 * mr));
        let (mut row_blocks, mut panel_blocks) = (m.div_ceil(most), 1);
        let large = n.saturating_mul(k) > LARGE_B;
        while ((row_blocks * panel_blocks) as u64) < want {
            let (rows, cols) = (m / row_blocks, panels / panel_blocks * nr);
            let can_rows = rows >= 4 * mr && !(large && row_blocks * panel_blocks >= 2 * cx.threads());
            let can_cols = cols >= 2 * MIN_COLUMNS;
            // A block costs the reading of its rows of A and columns of B: keep it square.
            if can_rows && (!can_cols || rows >= cols) {
                row_blocks *= 2;
            } else if can_cols {
                panel_blocks *= 2;
            } else {
                break;
            }
        }
        Self {
            tiles,
            height: m / tiles,
            tall: m % tiles,
            panels,
            row_blocks: row_blocks.min(tiles),
            panel_blocks: panel_blocks.min(panels),
        }
    }

    /// First row of a tile.
    fn row(&self, tile: usize) -> usize {
        tile * self.height + tile.min(self.tall)
    }

    /// Some tiles as strips of one height, of which the first may be none; tiles and rows count from the first one.
    fn strips(&self, tiles: Range<usize>) -> [Tall; 2] {
        // Tall tiles come first.
        let border = self.tall.clamp(tiles.start, tiles.end);
        let row = self.row(border) - self.row(tiles.start);
        [
            Tall { first: 0, row: 0, tiles: border - tiles.start, height: self.height + 1 },
            Tall { first: border - tiles.start, row, tiles: tiles.end - border, height: self.height },
        ]
    }
}

/// Tiles of one height, one below the other.
#[derive(Clone, Copy)]
struct Tall {
    first: usize,
    row: usize,
    tiles: usize,
    height: usize,
}

/// Rows of A times panels of B, to sums: the inner loops of the nest.
struct Sweep<'a> {
    form: Form,
    strips: [Tall; 2],
    /// First row of A; or all interleaved, tile by tile.
    a: *const i32,
    lda: usize,
    interleaved: bool,
    /// All panels of the right-hand side, of `groups` along k and `n` columns.
    b: &'a [i32],
    /// What takes the place of the panels in [`Form::Split`].
    pieces: Option<&'a Pieces>,
    groups: usize,
    n: usize,
    panels: Range<usize>,
    /// What the sums begin with, for all columns of the panels filled up to whole tiles.
    start: &'a [i32],
    /// First sum.
    sums: *mut i32,
    ld: usize,
    /// Where the sums of whole panels go instead, and the first row and column in it.
    to: Option<(&'a Quantized<'a>, usize, usize)>,
}

impl Sweep<'_> {
    /// # Safety
    /// A has the rows of the strips, `lda` apart, of `groups` each, and so have the sums, `ld` of at least the width of the
    /// panels each, and the output, which nobody else uses.
    unsafe fn run(&self, isa: Isa) {
        let Self { form, groups, n, lda, interleaved, ld, to, .. } = *self;
        let (mr, nr) = (table::tile(isa, form).mr, table::panel_width(isa, form));
        let kc = if self.pieces.is_some() { groups } else { table::tile(isa, form).kc };
        let mut pc = 0;
        loop {
            let depth = kc.min(groups - pc);
            for panel in self.panels.clone() {
                let width = table::width(isa, form, panel * nr, n);
                // All panels before this one are of full width.
                let (b, sequence) = match self.pieces {
                    Some(pieces) => pieces.panel(self.b, panel, nr),
                    None => (&self.b[panel * nr * groups + pc * width..][..depth * width], Sequence::default()),
                };
                let column = (panel - self.panels.start) * nr;
                let to = to.filter(|_| pc + depth == groups && (panel + 1) * nr <= n);
                let start = if pc == 0 { self.start[column..][..width].as_ptr() } else { core::ptr::null() };
                for Tall { first, row, tiles, height } in self.strips {
                    if tiles == 0 {
                        continue;
                    }
                    let (a, next) = match self.pieces {
                        Some(_) => (first * mr * groups, mr * groups),
                        None => (row * lda, height * lda),
                    };
                    let strip = Strip {
                        height,
                        tiles,
                        vectors: width / isa.lanes(),
                        k: depth,
                        before: pc,
                        interleaved,
                        a: self.a.wrapping_add(a),
                        lda,
                        next,
                        b: b.as_ptr(),
                        sums: self.sums.wrapping_add(row * ld + column),
                        ld,
                        start,
                        to: to.map(|(to, first_row, first_column)| (to, first_row + row, first_column + column)),
                        sequence,
                    };
                    // SAFETY: the caller's contract.
                    unsafe { strip.run(isa, form) };
                }
            }
            pc += depth;
            if pc == groups {
                break;
            }
        }
    }
}

/// Sums of `m` rows of A and all columns of a right-hand side in [`Form::Wide`], whose packed panels are `b`: `groups`
/// pairs along k, `n` columns. `zeros` are as many as a row of sums has.
///
/// # Safety
/// A has the rows, `lda` of at least `groups` each, and so have the sums, `ld` of at least `n` filled up to whole tiles
/// each, which nobody else uses.
pub(super) unsafe fn multiply(
    isa: Isa,
    m: usize,
    [a, sums]: [*mut i32; 2],
    [lda, ld]: [usize; 2],
    b: &[i32],
    [groups, n]: [usize; 2],
    zeros: &[i32],
) {
    let form = Form::Wide;
    let (mr, nr) = (table::tile(isa, form).mr, table::panel_width(isa, form));
    let (tiles, panels) = (m.div_ceil(mr), n.div_ceil(nr));
    let grid = Grid { tiles, height: m / tiles, tall: m % tiles, panels, row_blocks: 1, panel_blocks: 1 };
    let strips = grid.strips(0..tiles);
    let interleaved = false;
    let panels = 0..panels;
    let (pieces, to) = (None, None);
    let sweep = Sweep { form, strips, a, lda, interleaved, b, pieces, groups, n, panels, start: zeros, sums, ld, to };
    // SAFETY: the caller's contract.
    unsafe { sweep.run(isa) };
}

/// Computes `problems` products of one shape, `m` rows with zero point `a_zero` and `b` like `first`, in parallel.
///
/// # Safety
/// The left operands have `m` rows; the outputs of different products are different columns of the sink, which nobody
/// else uses.
pub(super) unsafe fn run<'a>(
    cx: &Cx<'_>,
    problems: usize,
    m: usize,
    a_zero: i32,
    first: &PackedQ,
    problem: &(dyn Fn(usize) -> Problem<'a> + Sync),
    sink: &Sink<'_>,
) -> Result<()> {
    let (isa, form, n, k) = (cx.isa(), first.form(), first.n(), first.k());
    if m == 0 || n == 0 || problems == 0 {
        return Ok(());
    }
    let grid = Grid::new(cx, form, problems, m, n, k);
    let nr = table::panel_width(isa, form);
    let groups = k.div_ceil(form.group());
    let lda = leading_dimension(groups);
    let block_tiles = grid.tiles.div_ceil(grid.row_blocks);
    let rows = block_tiles * (grid.height + 1);
    let interleaved = table::tile(isa, form).interleaves(grid.height, n, groups);
    // Rows are gathered a few tiles at a time if they are interleaved then.
    let gather_tiles =
        if interleaved { (GATHERED / ((grid.height + 1) * lda)).clamp(1, block_tiles) } else { block_tiles };
    let gathered_len = if interleaved { gather_tiles * (grid.height + 1) * lda } else { 0 };
    // Even numbers of panels: the output takes two vectors at a time.
    let together = (GROUP_SUMS / (rows * nr)).next_multiple_of(2).max(2);
    let together = together.min(grid.panels.div_ceil(grid.panel_blocks).next_multiple_of(2));
    // Whole cache lines, so that the rows of A start at one too.
    let sums_len = (rows * together * nr).next_multiple_of(16);
    let too_many = || Error::new("too many products for the address space");
    let stride = (form == Form::Split).then_some(table::tile(isa, form).mr);
    let a_len = (block_tiles * stride.unwrap_or(grid.height + 1)).checked_mul(lda).ok_or_else(too_many)?;
    let per_problem = grid.row_blocks * grid.panel_blocks;
    let tasks = per_problem.checked_mul(problems).ok_or_else(too_many)?;
    let cost = (m as u64).saturating_mul(n as u64).saturating_mul(k as u64).saturating_mul(problems as u64);
    let start_len = grid.panels.div_ceil(grid.panel_blocks) * nr;
    cx.for_each_scratch(tasks, cost, sums_len + a_len + gathered_len + start_len + rows, &|task, scratch| {
        let scratch: &mut [i32] = bytemuck::cast_slice_mut(scratch);
        let (sums, rest) = scratch.split_at_mut(sums_len);
        let (a, rest) = rest.split_at_mut(a_len);
        let (gathered, rest) = rest.split_at_mut(gathered_len);
        let (start, row_sums) = rest.split_at_mut(start_len);
        let block = task % per_problem;
        let block = Block {
            problem: problem(task / per_problem),
            grid: &grid,
            // Rows first: a lane has its own rows from layer to layer, see `par`.
            tiles: part(grid.tiles, grid.row_blocks, block / grid.panel_blocks),
            panels: part(grid.panels, grid.panel_blocks, block % grid.panel_blocks),
            a_zero,
            lda,
            interleaved,
            stride,
            gather_tiles,
            together,
        };
        // SAFETY: the caller's contract; blocks are disjoint.
        unsafe { block.run(isa, [sums, a, gathered, start, row_sums], sink) };
    });
    Ok(())
}

/// A part of one output.
struct Block<'a> {
    problem: Problem<'a>,
    grid: &'a Grid,
    tiles: Range<usize>,
    panels: Range<usize>,
    a_zero: i32,
    /// Groups between rows that were gathered.
    lda: usize,
    interleaved: bool,
    /// Of [`Form::Split`]: elements between interleaved groups, whatever a tile's height is.
    stride: Option<usize>,
    /// Tiles whose rows are gathered at once.
    gather_tiles: usize,
    together: usize,
}

impl Block<'_> {
    /// # Safety
    /// The block lies inside the output and nobody else uses it.
    unsafe fn run(&self, isa: Isa, [sums, a, gathered, start, row_sums]: [&mut [i32]; 5], sink: &Sink<'_>) {
        let Self { problem: Problem { lhs, b, column, bias }, grid, a_zero, lda, together, .. } = *self;
        let (form, n, k) = (b.form(), b.n(), b.k());
        let groups = k.div_ceil(form.group());
        let nr = table::panel_width(isa, form);
        let rows = grid.row(self.tiles.start)..grid.row(self.tiles.end);
        let first_column = self.panels.start * nr;
        let columns = first_column..(self.panels.end * nr).min(n);
        match bias {
            Some(bias) => start[..columns.len()].copy_from_slice(&bias[columns.clone()]),
            None => start[..columns.len()].fill(0),
        }
        // What the lanes beyond the last column begin with does not matter.
        let correction = b.correction();
        let zeros = correction.and_then(|c| c.zeros.as_deref());
        if let Some(correction) = correction {
            let a_zero = a_zero + lhs.shift(form);
            for (start, column) in start.iter_mut().zip(&correction.columns[columns]) {
                *start = start.wrapping_sub(a_zero.wrapping_mul(*column));
            }
        }
        let as_it_is = zeros.is_none() && b.order().is_none();
        let in_place = lhs.in_place(form, rows.start, k).filter(|_| as_it_is);
        let taps = lhs.taps(form).filter(|_| as_it_is && self.interleaved);
        if let Some(taps) = taps {
            let padding = &mut gathered[..taps.depth / 4];
            padding.fill(i32::from_ne_bytes([a_zero as u8; 4]));
            let to = bytemuck::cast_slice_mut(a);
            // SAFETY: the rows are there, and `a` and the padding are memory of their own.
            unsafe { taps.interleave(self.tiles.clone(), &|tile| grid.row(tile), padding, to, self.stride) };
        }
        let ready = taps.is_some() || in_place.is_some() && !self.interleaved;
        let gathered_tiles = if ready { self.tiles.end..self.tiles.end } else { self.tiles.clone() };
        for first in gathered_tiles.step_by(self.gather_tiles) {
            let tiles = first..(first + self.gather_tiles).min(self.tiles.end);
            let some = grid.row(tiles.start)..grid.row(tiles.end);
            let to = if self.interleaved { &mut *gathered } else { &mut *a };
            if zeros.is_some() && groups > 0 {
                // Elements that are added up must be zero if they are not there.
                to.chunks_mut(lda).take(some.len()).for_each(|row| row[groups - 1] = 0);
            }
            if in_place.is_none() {
                lhs.gather(isa, form, a_zero, some.clone(), k, to, lda);
            }
            if let Some(order) = b.order() {
                dispatch(isa, Permute { order, rows: &mut to[..some.len() * lda], lda });
            }
            if zeros.is_some() {
                let sums = &mut row_sums[some.start - rows.start..][..some.len()];
                dispatch_dot(isa, form, RowSums { a: to, lda, groups, sums });
            }
            if !self.interleaved {
                continue;
            }
            let before = match self.stride {
                Some(stride) => (tiles.start - self.tiles.start) * stride,
                None => some.start - rows.start,
            };
            let to = bytemuck::cast_slice_mut(&mut a[before * groups..]);
            let (from, lda) = match in_place {
                Some((first, lda)) => (first.wrapping_add((some.start - rows.start) * lda).cast(), lda),
                None => (gathered.as_ptr().cast(), lda),
            };
            // SAFETY: the rows are there or were gathered, into memory of their own.
            unsafe { interleave_tiles(tiles, &|tile| grid.row(tile), from, lda, groups, to, self.stride) };
        }
        let strips = grid.strips(self.tiles.clone());
        let (a, lda) = match in_place {
            _ if self.interleaved => (a.as_ptr(), groups),
            Some(place) => place,
            None => (a.as_ptr(), lda),
        };
        let ld = together * nr;
        assert!(sums.len() >= rows.len() * ld);
        let quantizes = zeros.is_none() && table::tile(isa, form).quantizes(grid.height);
        let quantized = sink.quantized().filter(|_| quantizes);
        for first in self.panels.clone().step_by(together) {
            let panels = first..(first + together).min(self.panels.end);
            let cols = panels.start * nr..(panels.end * nr).min(n);
            let sweep = Sweep {
                form,
                strips,
                a,
                lda,
                interleaved: self.interleaved,
                b: b.data(),
                pieces: b.pieces(),
                groups,
                n,
                panels,
                start: &start[cols.start - first_column..],
                sums: sums.as_mut_ptr(),
                ld,
                to: quantized.map(|to| (to, rows.start, column + cols.start)),
            };
            // SAFETY: A has the rows of the block, `lda` apart, of `groups` each, and so have the sums, `ld` each; the output is
            // the caller's contract.
            unsafe { sweep.run(isa) };
            if let Some(zeros) = zeros {
                let row_sums = &row_sums[..rows.len()];
                dispatch(isa, TakeBack { zeros: &zeros[cols.clone()], sums, ld, row_sums });
            }
            let done = if quantized.is_some() { cols.len() / nr * nr } else { 0 };
            let (sums, left) = (sums.as_ptr().wrapping_add(done), column + cols.start + done..column + cols.end);
            // SAFETY: the caller's contract.
            unsafe { sink.finish(isa, sums, ld, rows.clone(), left) };
        }
    }
}

/// Rows of bytes in the order of [`PackedQ::order`].
struct Permute<'a> {
    order: &'a [u8],
    /// `lda` groups each, with room for whole vectors.
    rows: &'a mut [i32],
    lda: usize,
}

impl Kernel for Permute<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { order, rows, lda } = self;
        for row in rows.chunks_exact_mut(lda) {
            let row: &mut [u8] = &mut bytemuck::cast_slice_mut(row)[..order.len()];
            if S::LANES < 4 {
                // A vector is less than a window.
                for (row, order) in row.as_chunks_mut::<16>().0.iter_mut().zip(order.as_chunks::<16>().0) {
                    *row = order.map(|place| row[usize::from(place) % 16]);
                }
                continue;
            }
            for (row, order) in row.chunks_exact_mut(4 * S::LANES).zip(order.chunks_exact(4 * S::LANES)) {
                let row = row.as_mut_ptr().cast();
                // SAFETY: a whole vector each.
                unsafe {
                    s.store_i32_ptr(row, s.permute_bytes(s.load_i32_ptr(row), s.load_i32_ptr(order.as_ptr().cast())))
                };
            }
        }
    }
}

/// `sums[i] = sum of the numbers in row i of A`, as the dot product reads them.
struct RowSums<'a> {
    a: &'a [i32],
    lda: usize,
    groups: usize,
    sums: &'a mut [i32],
}

impl DotKernel for RowSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dot>(self, d: D) {
        let s = d.simd();
        let ones = s.splat_i32(i32::from_ne_bytes([1; 4]));
        for (i, sum) in self.sums.iter_mut().enumerate() {
            let row = &self.a[i * self.lda..][..self.groups];
            let (whole, rest) = row.split_at(row.len() - row.len() % D::S::LANES);
            let mut acc = s.splat_i32(0);
            for part in whole.chunks_exact(D::S::LANES) {
                acc = d.dot(acc, s.load_i32(part), ones);
            }
            let mut last = [0; 16];
            last[..rest.len()].copy_from_slice(rest);
            acc = d.dot(acc, s.load_i32(&last), ones);
            let mut lanes = [0; 16];
            s.store_i32(&mut lanes, acc);
            *sum = lanes.iter().fold(0, |sum, &x| sum.wrapping_add(x));
        }
    }
}

/// `sums[i, j] -= zeros[j] * row_sums[i]`.
struct TakeBack<'a> {
    zeros: &'a [i32],
    sums: &'a mut [i32],
    ld: usize,
    row_sums: &'a [i32],
}

impl Kernel for TakeBack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { zeros, sums, ld, row_sums } = self;
        for (part, zeros) in zeros.chunks(S::LANES).enumerate() {
            let mut own = [0; 16];
            own[..zeros.len()].copy_from_slice(zeros);
            let zeros = s.load_i32(&own);
            for (i, row_sum) in row_sums.iter().enumerate() {
                // Rows of sums are whole vectors.
                let sums = &mut sums[i * ld + part * S::LANES..];
                s.store_i32(sums, s.sub_i32(s.load_i32(sums), s.mul_i32(zeros, s.splat_i32(*row_sum))));
            }
        }
    }
}
