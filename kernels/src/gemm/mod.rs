//! f32 matrix product: the loop nest of BLIS over prepacked panels, cut into independent blocks of C.
//!
//! ```text
//! for (jc, ic) in blocks of C                   in parallel; cut by sizes alone
//!     for pc in 0..k step kc
//!         gather A[ic.., pc..] into rows        only if A is not contiguous along k (patches, transposed)
//!         interleave the rows of each tile      only where it pays, see tile.rs
//!         for jr in panels of the block         panel of B: kc x NR, stays in L1
//!             for ir in tiles of the block      rows of A: MR x kc, from L2
//!                 C[ir, jr] += A[ir, pc..] B[pc.., jr]         microkernel, see tile.rs
//!                 after the last pc: bias, residual, activation
//! ```
//!
//! Departures from BLIS: B is packed once, outside of all loops, because it is nearly always a weight; a block of C is
//! small enough for its part of A to stay in L2, so that the loops over jc and ic are one grid of tasks; and instead of
//! full tiles plus a remainder, m is divided into tiles whose heights differ by one at most, since a tile of one row is
//! bound by latency and costs nearly as much as a full one.
//!
//! Every element of C is summed in the order of k within a pass, pass by pass, wherever it lies in a tile: neither the
//! cut into blocks nor the number of threads can change a bit.

mod gemv;
mod pack;
pub mod table;
mod tile;

pub use pack::PackedB;
pub(crate) use pack::{Aligned, pack_panels};

use crate::epilogue::{Activation, Epilogue};
use crate::error::{Error, Result};
use crate::math;
use crate::nbits::NBits;
use crate::par::Cx;
use crate::simd::interleave::{GATHERED, interleave_tiles};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use core::ops::Range;
use tile::{Finish, Operands, Strip};

/// A matrix in memory: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix without gaps.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The same memory read as `cols` x `rows`.
    pub fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Refuses data that is too short for shape and strides.
    fn check(&self, name: &str) -> Result<()> {
        let Self { rows, cols, row_stride, col_stride, .. } = *self;
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let needed = extent(&[(rows, row_stride), (cols, col_stride)]);
        match needed {
            Some(needed) if needed <= self.data.len() => Ok(()),
            _ => Err(Error::new(format!(
                "{name} is {rows} x {cols} with strides {row_stride} and {col_stride} but has {} elements",
                self.data.len()
            ))),
        }
    }
}

/// Elements from the first to the last index of a strided array, both included; `None` if the address space is exceeded.
/// No size may be zero.
fn extent(sizes_and_strides: &[(usize, usize)]) -> Option<usize> {
    let mut last = 0usize;
    for &(size, stride) in sizes_and_strides {
        last = last.checked_add((size - 1).checked_mul(stride)?)?;
    }
    last.checked_add(1)
}

/// The right-hand side of a product.
#[derive(Clone, Copy, Debug)]
pub enum Rhs<'a> {
    /// Packed before: weights.
    Packed(&'a PackedB),
    /// Packed on the way.
    Plain(Matrix<'a>),
    /// Of few bits, unpacked on the way.
    Bits(&'a NBits),
}

/// With fewer rows than this, weights of few bits are multiplied row by row instead of being unpacked: that takes three
/// operations for each weight and row, unpacking five and the product one.
const MIN_UNPACK_ROWS: usize = 4;

/// `c[i * ldc + j] = activation((a b)[i, j] + bias[j] + residual[i * ldc + j])`.
///
/// `a` is `m` x `k`, `b` is `k` x `n`, `c` has `m` rows of `n`, `ldc` elements apart. `k == 0` gives the epilogue of zero.
/// The result has the same bits for any number of threads.
///
/// # Errors
/// If shapes do not fit together, a slice is too short, or `b` was packed for another instruction set.
pub fn gemm(cx: &Cx<'_>, a: Matrix<'_>, b: Rhs<'_>, epilogue: &Epilogue<'_>, c: &mut [f32], ldc: usize) -> Result<()> {
    let isa = cx.isa();
    let (b_rows, n) = match b {
        Rhs::Packed(b) => {
            if b.isa() != isa {
                return Err(Error::new(format!("B was packed for {}, but {isa} runs", b.isa())));
            }
            (b.k(), b.n())
        }
        Rhs::Plain(b) => {
            b.check("B")?;
            (b.rows, b.cols)
        }
        Rhs::Bits(b) => {
            if b.isa() != isa {
                return Err(Error::new(format!("B was packed for {}, but {isa} runs", b.isa())));
            }
            (b.k(), b.n())
        }
    };
    a.check("A")?;
    let (m, k) = (a.rows, a.cols);
    if b_rows != k {
        return Err(Error::new(format!("A is {m} x {k}, but B is {b_rows} x {n}")));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    check_output(m, n, ldc, epilogue, c.len())?;
    if let Rhs::Bits(bits) = b
        && m < MIN_UNPACK_ROWS
        && a.col_stride == 1
        && k > 0
    {
        for i in 0..m {
            let residual = epilogue.residual.map(|r| &r[i * ldc..]);
            let epilogue = Epilogue { residual, ..*epilogue };
            let (a, c) = (&a.data[i * a.row_stride..][..k], &mut c[i * ldc..][..n]);
            bits.with_ready(cx, a, |ready| gemv::gemv(cx, ready, b, &epilogue, c));
        }
        return Ok(());
    }
    if m == 1 && a.col_stride == 1 && gemv::supports(&b) {
        gemv::gemv(cx, &a.data[..k], b, epilogue, c);
        return Ok(());
    }
    let c = OutPtr(c.as_mut_ptr());
    run(cx, 1, m, n, k, !matches!(b, Rhs::Packed(_)), a.col_stride != 1 && k > 1, &|_| Problem {
        a,
        b,
        c,
        ldc,
        bias: epilogue.bias,
        residual: epilogue.residual,
        activation: epilogue.activation,
    })
}

/// Refuses an output, bias or residual that is too short for `m` rows of `n` with stride `ldc`.
fn check_output(m: usize, n: usize, ldc: usize, epilogue: &Epilogue<'_>, len: usize) -> Result<()> {
    if ldc < n && m > 1 {
        return Err(Error::new(format!("rows of C overlap: {n} columns, stride {ldc}")));
    }
    let short = |name: &str, len: usize| Err(Error::new(format!("{name} has {len} elements, too few for {m} x {n}")));
    let needed = extent(&[(m, ldc), (n, 1)]).unwrap_or(usize::MAX);
    if len < needed {
        return short("C", len);
    }
    if let Some(residual) = epilogue.residual
        && residual.len() < needed
    {
        return short("the residual", residual.len());
    }
    if let Some(bias) = epilogue.bias
        && bias.len() < n
    {
        return short("the bias", bias.len());
    }
    Ok(())
}

/// Many products of one shape, reached by strides: `MatMul` with broadcasting, attention.
#[derive(Clone, Copy, Debug)]
pub struct Batched<'a> {
    /// One product per index of this box.
    pub batch_dims: &'a [usize],
    /// Rows of each A and C.
    pub m: usize,
    /// Columns of each B and C.
    pub n: usize,
    /// Columns of each A, rows of each B.
    pub k: usize,
    /// The left operands.
    pub a: &'a [f32],
    /// Elements between As along each batch dimension; 0 broadcasts.
    pub a_batch_strides: &'a [usize],
    /// Elements between rows (m) and columns (k) of A.
    pub a_strides: [usize; 2],
    /// The right operands.
    pub b: &'a [f32],
    /// Elements between Bs along each batch dimension; 0 broadcasts.
    pub b_batch_strides: &'a [usize],
    /// Elements between rows (k) and columns (n) of B.
    pub b_strides: [usize; 2],
    /// Elements between Cs along each batch dimension. The Cs must not overlap.
    pub c_batch_strides: &'a [usize],
    /// Elements between rows of C, whose columns are contiguous.
    pub ldc: usize,
    /// Per column, shared by all products.
    pub bias: Option<&'a [f32]>,
    /// Applied last.
    pub activation: Activation,
}

/// All products of `g`, over threads by product and by block.
///
/// # Errors
/// If a slice is too short for shape and strides, the numbers of dimensions differ, or Cs overlap.
pub fn gemm_batched(cx: &Cx<'_>, g: &Batched<'_>, c: &mut [f32]) -> Result<()> {
    let dims = g.batch_dims;
    let ranks = [g.a_batch_strides.len(), g.b_batch_strides.len(), g.c_batch_strides.len()];
    if ranks.iter().any(|&rank| rank != dims.len()) {
        return Err(Error::new(format!("{} batch dimensions, but strides for {ranks:?} of them", dims.len())));
    }
    let (m, n, k) = (g.m, g.n, g.k);
    if m == 0 || n == 0 || dims.contains(&0) {
        return Ok(());
    }
    let needs = |batch: &[usize], rows: usize, row_stride: usize, cols: usize, col_stride: usize| {
        let mut last = 0usize;
        for (&size, &stride) in dims.iter().zip(batch) {
            last = last.checked_add((size - 1).checked_mul(stride)?)?;
        }
        last.checked_add(extent(&[(rows, row_stride), (cols, col_stride)])?)
    };
    let check = |name: &str, needed: Option<usize>, len: usize| match needed {
        Some(needed) if needed <= len => Ok(()),
        _ => Err(Error::new(format!("{name} has {len} elements, too few for its shape and strides"))),
    };
    if k > 0 {
        check("A", needs(g.a_batch_strides, m, g.a_strides[0], k, g.a_strides[1]), g.a.len())?;
        check("B", needs(g.b_batch_strides, k, g.b_strides[0], n, g.b_strides[1]), g.b.len())?;
    }
    check("C", needs(g.c_batch_strides, m, g.ldc, n, 1), c.len())?;
    if let Some(bias) = g.bias {
        check("the bias", Some(n), bias.len())?;
    }
    check_disjoint(g)?;

    let count = dims.iter().product();
    let matrix =
        |data, rows, cols, [row_stride, col_stride]: [usize; 2]| Matrix { data, rows, cols, row_stride, col_stride };
    // One B for all and As one after the other: one tall product.
    let stacked = g.b_batch_strides.iter().zip(dims).all(|(&stride, &size)| stride == 0 || size == 1)
        && is_stacked(dims, g.a_batch_strides, m, g.a_strides[0])
        && is_stacked(dims, g.c_batch_strides, m, g.ldc);
    if stacked && k > 0 {
        let epilogue = Epilogue { bias: g.bias, residual: None, activation: g.activation };
        let a = matrix(g.a, count * m, k, g.a_strides);
        return gemm(cx, a, Rhs::Plain(matrix(g.b, k, n, g.b_strides)), &epilogue, c, g.ldc);
    }
    let c = OutPtr(c.as_mut_ptr());
    let problem = |index: usize| {
        let (mut a, mut b, mut at, mut rest) = (0, 0, 0, index);
        for d in (0..dims.len()).rev() {
            let i = rest % dims[d];
            rest /= dims[d];
            a += i * g.a_batch_strides[d];
            b += i * g.b_batch_strides[d];
            at += i * g.c_batch_strides[d];
        }
        let from = |data: &'_ [f32], start: usize| if k == 0 { 0..0 } else { start..data.len() };
        Problem {
            a: matrix(&g.a[from(g.a, a)], m, k, g.a_strides),
            b: Rhs::Plain(matrix(&g.b[from(g.b, b)], k, n, g.b_strides)),
            c: c.offset(at),
            ldc: g.ldc,
            bias: g.bias,
            residual: None,
            activation: g.activation,
        }
    };
    run(cx, count, m, n, k, true, g.a_strides[1] != 1 && k > 1, &problem)
}

/// Refuses products that would write the same element of C: sorted by stride, each dimension must step over all
/// smaller ones.
fn check_disjoint(g: &Batched<'_>) -> Result<()> {
    let steps = || {
        let batch = g.batch_dims.iter().copied().zip(g.c_batch_strides.iter().copied());
        batch.chain([(g.m, g.ldc), (g.n, 1)]).filter(|&(size, _)| size > 1)
    };
    // Few dimensions, and nothing is allocated in a run: look for the next stride instead of sorting.
    let (mut reach, mut done) = (0, 0);
    while done < steps().count() {
        let next = steps().filter(|&(_, stride)| stride > reach).min_by_key(|&(_, stride)| stride);
        let Some((size, stride)) = next else {
            return Err(Error::new(format!(
                "the products' results overlap: batch {:?} with strides {:?}, {} x {} with row stride {}",
                g.batch_dims, g.c_batch_strides, g.m, g.n, g.ldc
            )));
        };
        reach += (size - 1) * stride;
        done += 1;
    }
    Ok(())
}

/// Whether matrices of `rows` rows, `row_stride` apart, follow each other without a gap in the order of `dims`.
fn is_stacked(dims: &[usize], strides: &[usize], rows: usize, row_stride: usize) -> bool {
    let mut expected = rows.checked_mul(row_stride);
    for (&size, &stride) in dims.iter().zip(strides).rev() {
        if size > 1 && expected != Some(stride) {
            return false;
        }
        expected = expected.and_then(|x| x.checked_mul(size));
    }
    true
}

/// The left operand of the loop nest: a matrix, or one that is made up on the way (the patches of a convolution).
pub(crate) trait Lhs: Sync {
    /// Where the rows lie, and how many elements apart, if each is contiguous along k.
    fn direct(&self) -> Option<(*const f32, usize)>;

    /// Writes columns `ks` of row `rows.start + i` to `dst[i * ld..][..ks.len()]`.
    fn gather(&self, isa: Isa, rows: Range<usize>, ks: Range<usize>, dst: &mut [f32], ld: usize);
}

impl Lhs for Matrix<'_> {
    fn direct(&self) -> Option<(*const f32, usize)> {
        (self.col_stride == 1 || self.cols <= 1).then_some((self.data.as_ptr(), self.row_stride))
    }

    fn gather(&self, _: Isa, rows: Range<usize>, ks: Range<usize>, dst: &mut [f32], ld: usize) {
        for (p, k) in ks.enumerate() {
            let column = &self.data[k * self.col_stride..];
            for (i, row) in rows.clone().enumerate() {
                dst[i * ld + p] = column[row * self.row_stride];
            }
        }
    }
}

/// The output, shared by tasks that write disjoint parts of it.
#[derive(Clone, Copy)]
pub(crate) struct OutPtr(pub(crate) *mut f32);

impl OutPtr {
    /// Address of an element.
    #[inline(always)]
    pub(crate) fn at(&self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }

    /// The output from an element on.
    pub(crate) fn offset(&self, index: usize) -> Self {
        Self(self.at(index))
    }
}

// SAFETY: tasks write disjoint parts, see `run`.
unsafe impl Send for OutPtr {}
// SAFETY: as above.
unsafe impl Sync for OutPtr {}

/// One product: operands whose sizes were checked.
pub(crate) struct Problem<'a, A> {
    /// m x k.
    pub(crate) a: A,
    /// k x n.
    pub(crate) b: Rhs<'a>,
    /// First element of m rows of n, `ldc` apart.
    pub(crate) c: OutPtr,
    pub(crate) ldc: usize,
    /// n values.
    pub(crate) bias: Option<&'a [f32]>,
    /// Laid out like C.
    pub(crate) residual: Option<&'a [f32]>,
    pub(crate) activation: Activation,
}

impl<'a, A> Problem<'a, A> {
    /// The same with a left operand.
    pub(crate) fn with<B>(self, a: B) -> Problem<'a, B> {
        let Self { b, c, ldc, bias, residual, activation, .. } = self;
        Problem { a, b, c, ldc, bias, residual, activation }
    }
}

/// A task should take this many floating-point operations at least: about ten microseconds of one core's 128-bit vectors.
const TASK_FLOPS: u64 = 1 << 19;
/// More tasks than this would not balance better.
const MAX_TASKS: u64 = 32;
/// Fewest columns of a block whose rows of A are gathered, which is done for each block anew.
const MIN_GATHER_COLUMNS: usize = 128;
/// Fewest columns of a block whose rows of A are interleaved, for each block anew too.
const MIN_INTERLEAVED_COLUMNS: usize = 64;
/// Elements of B that a task packs at most, so that they stay in L2.
const MAX_PACK: usize = 1 << 16;
/// Elements of a packed B from which blocks along m do not pay, unless lanes were idle without: it comes from L3 or memory for each
/// of them. In Chromium on two lanes (Zen 5, modules in turns) that made DistilBERT 1.05 times as fast, MiniLM and ResNet-50 1.01.
const LARGE_B: usize = 1 << 16;
/// Fewest rows of a block then. With the 12 that had been there before, the 3 x 3 convolution of stride 2 and
/// 7 x 7 outputs of ResNet-50, 9 MB of weights, ran at 30 GFLOP/s where others reach 44.
const MIN_LARGE_ROWS: usize = 48;

/// How the C of each product is cut.
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
    fn new(cx: &Cx<'_>, problems: usize, m: usize, n: usize, k: usize, pack_b: bool, gather_a: bool) -> Self {
        let t = table::tile(cx.isa());
        let nr = table::panel_width(cx.isa());
        let (tiles, panels) = (m.div_ceil(t.mr), n.div_ceil(nr));
        let flops = 2 * m as u64 * (n as u64).saturating_mul(k as u64);
        // One lane needs no cut but those that keep blocks in its caches. Each element of C has the same sum either way.
        let most_tasks = if cx.threads() == 1 { 1 } else { MAX_TASKS };
        let want = (flops.saturating_mul(problems as u64) / TASK_FLOPS).clamp(1, most_tasks).div_ceil(problems as u64);
        let mut row_blocks = m.div_ceil(t.mc);
        let mut panel_blocks = 1;
        let interleaves = t.interleaves(m / tiles, n, k);
        let min_cols = match (gather_a, interleaves) {
            (true, _) => MIN_GATHER_COLUMNS.max(2 * nr),
            (false, true) => MIN_INTERLEAVED_COLUMNS.max(2 * nr),
            (false, false) => 2 * nr,
        };
        let large = !pack_b && n.saturating_mul(k) > LARGE_B;
        let min_rows = if large { MIN_LARGE_ROWS } else { 2 * t.mr };
        if pack_b {
            panel_blocks = panels.div_ceil((MAX_PACK / (nr * k.max(1))).max(1));
        }
        while ((row_blocks * panel_blocks) as u64) < want {
            let (rows, cols) = (m / row_blocks, panels / panel_blocks * nr);
            let can_rows = rows >= 2 * min_rows && !(large && row_blocks * panel_blocks >= 2 * cx.threads());
            let can_cols = cols >= 2 * min_cols;
            // A block costs the reading of its rows of A and columns of B: keep it square. But if B is packed, each
            // block of rows packs it anew: then cut columns first.
            if can_rows && (!can_cols || (rows >= cols && !pack_b)) {
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
    #[inline(always)]
    fn row(&self, tile: usize) -> usize {
        tile * self.height + tile.min(self.tall)
    }
}

/// Part `index` of `0..len` cut into `parts`.
#[inline(always)]
pub(crate) fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    let start = |i: usize| i * (len / parts) + i.min(len % parts);
    start(index)..start(index + 1)
}

/// Computes `problems` products of one shape (`m`, `n` >= 1), all blocks of all of them in parallel.
///
/// `pack_b` says whether the right-hand sides are plain or of few bits, `gather_a` whether the left-hand sides are not direct.
pub(crate) fn run<'a, A: Lhs>(
    cx: &Cx<'_>,
    problems: usize,
    m: usize,
    n: usize,
    k: usize,
    pack_b: bool,
    gather_a: bool,
    problem: &(dyn Fn(usize) -> Problem<'a, A> + Sync),
) -> Result<()> {
    let isa = cx.isa();
    let t = table::tile(isa);
    let nr = table::panel_width(isa);
    let grid = Grid::new(cx, problems, m, n, k, pack_b, gather_a);
    let passes = k.div_ceil(t.kc).max(1);
    let kc = k.div_ceil(passes);
    let lda = leading_dimension(kc);
    let block_tiles = grid.tiles.div_ceil(grid.row_blocks);
    let interleave_a = t.interleaves(grid.height, n, k);
    // Rows are gathered a few tiles at a time if they are interleaved then.
    let gather_tiles = if interleave_a { (GATHERED / (t.mr * lda)).clamp(1, block_tiles) } else { block_tiles };
    let rows_len = if gather_a { gather_tiles * (grid.height + 1) * lda } else { 0 };
    let a_len = if interleave_a { (block_tiles * (grid.height + 1) * kc).next_multiple_of(16) } else { 0 };
    // Whole cache lines, so that the rows of A start at one too.
    let b_len = if pack_b { (grid.panels.div_ceil(grid.panel_blocks) * nr * k).next_multiple_of(16) } else { 0 };
    let per_problem = grid.row_blocks * grid.panel_blocks;
    let tasks =
        per_problem.checked_mul(problems).ok_or_else(|| Error::new("too many products for the address space"))?;
    let cost = (2 * m as u64).saturating_mul(n as u64).saturating_mul(k as u64).saturating_mul(problems as u64);
    cx.for_each_scratch(tasks, cost, b_len + a_len + rows_len, &|task, scratch| {
        let problem = problem(task / per_problem);
        let block = task % per_problem;
        // Rows first: a lane has its own rows from layer to layer, see `par`.
        let (row_block, panel_block) = (block / grid.panel_blocks, block % grid.panel_blocks);
        let tiles = part(grid.tiles, grid.row_blocks, row_block);
        let panels = part(grid.panels, grid.panel_blocks, panel_block);
        let (b_scratch, scratch) = scratch.split_at_mut(b_len);
        let (a_scratch, rows_scratch) = scratch.split_at_mut(a_len);
        let first_panel = panels.start;
        let (b, b_first) = match &problem.b {
            Rhs::Packed(packed) => (packed.data(), 0),
            Rhs::Plain(b) => {
                pack::pack_panels(isa, b, panels.clone(), b_scratch);
                (&*b_scratch, first_panel)
            }
            Rhs::Bits(b) => {
                b.unpack_panels(panels.clone(), b_scratch);
                (&*b_scratch, first_panel)
            }
        };
        let rows = grid.row(tiles.start)..grid.row(tiles.end);
        let (clamp, after) = split_activation(problem.activation);
        let mut pc = 0;
        loop {
            let depth = kc.min(k - pc);
            let last = pc + depth == k;
            let columns = pc..pc + depth;
            let from = |a: *const f32, lda: usize, row: usize| a.wrapping_add(row * lda + pc);
            let (a, lda) = match problem.a.direct() {
                Some((a, lda)) if !interleave_a => (from(a, lda, rows.start), lda),
                None if !interleave_a => {
                    problem.a.gather(isa, rows.clone(), columns, rows_scratch, lda);
                    (rows_scratch.as_ptr(), lda)
                }
                direct => {
                    for first in tiles.clone().step_by(gather_tiles) {
                        let some = first..(first + gather_tiles).min(tiles.end);
                        let first_row = grid.row(some.start);
                        let (a, lda) = match direct {
                            Some((a, lda)) => (from(a, lda, first_row), lda),
                            None => {
                                let rows = first_row..grid.row(some.end);
                                problem.a.gather(isa, rows, columns.clone(), rows_scratch, lda);
                                (rows_scratch.as_ptr(), lda)
                            }
                        };
                        let to = bytemuck::cast_slice_mut(&mut a_scratch[(first_row - rows.start) * depth..]);
                        // SAFETY: A has these rows and columns, and the scratch memory is not a part of it.
                        unsafe { interleave_tiles(some, &|tile| grid.row(tile), a.cast(), lda, depth, to, None) };
                    }
                    (a_scratch.as_ptr(), depth)
                }
            };
            Pass {
                a,
                lda,
                interleaved: interleave_a,
                b,
                b_first,
                c: problem.c,
                ldc: problem.ldc,
                accumulate: pc > 0,
                bias: problem.bias.filter(|_| last),
                residual: problem.residual.filter(|_| last),
                clamp: clamp.filter(|_| last),
                after: after.filter(|_| last),
                grid: &grid,
                tiles: tiles.clone(),
                panels: panels.clone(),
                n,
                k,
                pc,
                depth,
            }
            .run(isa);
            pc += depth;
            if last {
                break;
            }
        }
    });
    Ok(())
}

/// `c (+)= a b` for some rows and panels, on this thread, without an epilogue.
pub(crate) struct Block<'a> {
    /// Rows of A and C, at least one.
    pub(crate) m: usize,
    /// First row of A, contiguous along k.
    pub(crate) a: *const f32,
    /// Elements between rows of A.
    pub(crate) lda: usize,
    /// Panels as [`pack_panels`] leaves them, from the first on.
    pub(crate) b: &'a [f32],
    /// Rows and columns of B.
    pub(crate) size: [usize; 2],
    /// The panels to multiply by.
    pub(crate) panels: Range<usize>,
    /// First element of C.
    pub(crate) c: OutPtr,
    /// Elements between rows of C.
    pub(crate) ldc: usize,
    /// Whether to add to what C holds.
    pub(crate) accumulate: bool,
}

impl Block<'_> {
    /// Computes it. Where `scratch`, of `m * k` elements, is given, rows of A are interleaved there if that pays.
    ///
    /// # Safety
    /// A and C have these rows, of `k` and `n` elements. Nobody else uses the columns that the panels have of C.
    pub(crate) unsafe fn run(self, isa: Isa, mut scratch: Option<&mut [f32]>) {
        let Self { m, a, lda, b, size: [k, n], panels, c, ldc, accumulate } = self;
        let t = table::tile(isa);
        let tiles = m.div_ceil(t.mr);
        let grid = Grid {
            tiles,
            height: m / tiles,
            tall: m % tiles,
            panels: n.div_ceil(table::panel_width(isa)),
            row_blocks: 1,
            panel_blocks: 1,
        };
        let kc = k.div_ceil(k.div_ceil(t.kc).max(1));
        let interleaved = scratch.is_some() && t.interleaves(grid.height, n, k);
        let mut pc = 0;
        loop {
            let depth = kc.min(k - pc);
            let from = a.wrapping_add(pc);
            let (a, lda) = match &mut scratch {
                Some(to) if interleaved => {
                    let words = bytemuck::cast_slice_mut(to);
                    // SAFETY: A has these rows and columns, and the scratch memory is not a part of it.
                    unsafe { interleave_tiles(0..tiles, &|tile| grid.row(tile), from.cast(), lda, depth, words, None) };
                    (to.as_ptr(), depth)
                }
                _ => (from, lda),
            };
            let pass = Pass {
                a,
                lda,
                interleaved,
                b,
                b_first: 0,
                c,
                ldc,
                accumulate: accumulate || pc > 0,
                bias: None,
                residual: None,
                clamp: None,
                after: None,
                grid: &grid,
                tiles: 0..tiles,
                panels: panels.clone(),
                n,
                k,
                pc,
                depth,
            };
            pass.run(isa);
            pc += depth;
            if pc == k {
                break;
            }
        }
    }
}

/// Elements between gathered rows: whole cache lines, and not a power of two of them, which would map the rows of a tile
/// to the same few places of the cache.
pub(crate) fn leading_dimension(kc: usize) -> usize {
    let lines = kc.div_ceil(16);
    16 * (lines | 1)
}

/// Columns of C that get a costly activation at a time: some turns of its loop for each row.
const ACTIVATED_COLUMNS: usize = 32;

/// One pass over a block of C.
struct Pass<'a> {
    /// First row of the block, first column of the pass; or all interleaved, tile by tile.
    a: *const f32,
    lda: usize,
    interleaved: bool,
    /// Packed panels, from panel `b_first` on.
    b: &'a [f32],
    b_first: usize,
    c: OutPtr,
    ldc: usize,
    accumulate: bool,
    bias: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    clamp: Option<(f32, f32)>,
    after: Option<Activation>,
    grid: &'a Grid,
    tiles: Range<usize>,
    panels: Range<usize>,
    n: usize,
    k: usize,
    pc: usize,
    depth: usize,
}

impl Pass<'_> {
    fn run(self, isa: Isa) {
        let Self { a, lda, interleaved, b, ldc, grid, n, k, pc, depth, .. } = self;
        let t = table::tile(isa);
        let nr = table::panel_width(isa);
        let rows = grid.row(self.tiles.start)..grid.row(self.tiles.end);
        // First row, tiles, and their height. Tall tiles come first: at most two strips of one height each.
        let border = grid.tall.clamp(self.tiles.start, self.tiles.end);
        let full = [
            (rows.start, border - self.tiles.start, grid.height + 1),
            (grid.row(border), self.tiles.end - border, grid.height),
        ];
        let together = (ACTIVATED_COLUMNS / nr).max(1);
        let Range { start, end } = self.panels;
        let tiles = rows.len().div_ceil(t.narrow_mr).max(1);
        let (height, tall) = (rows.len() / tiles, rows.len() % tiles);
        let narrow = [(rows.start, tall, height + 1), (rows.start + tall * (height + 1), tiles - tall, height)];
        for panel in start..end {
            let j = panel * nr;
            let cols = nr.min(n - j);
            let width = cols.next_multiple_of(isa.lanes());
            // All panels before this one are of full width.
            let b = &b[(panel - self.b_first) * nr * k + pc * width..][..depth * width];
            let bias = self.bias.map_or(core::ptr::null(), |bias| bias[j..j + cols].as_ptr());
            let strips = if width == nr || interleaved { &full } else { &narrow };
            for &(i, tiles, height) in strips {
                if tiles == 0 {
                    continue;
                }
                let strip = Strip {
                    height,
                    tiles,
                    interleaved,
                    cols,
                    operands: Operands {
                        k: depth,
                        a: a.wrapping_add((i - rows.start) * lda),
                        lda,
                        b: b.as_ptr(),
                        c: self.c.at(i * ldc + j),
                        ldc,
                    },
                    finish: Finish {
                        accumulate: self.accumulate,
                        bias,
                        residual: self.residual.map_or(core::ptr::null(), |residual| residual[i * ldc + j..].as_ptr()),
                        clamp: self.clamp,
                    },
                };
                // SAFETY: the block lies inside m x n, for which A, B, C, bias and residual were checked; tasks have
                // disjoint blocks of C.
                unsafe { strip.run(isa) };
            }
            if let Some(activation) = self.after
                && ((panel + 1 - start).is_multiple_of(together) || panel + 1 == end)
            {
                let first = (panel - (panel - start) % together) * nr;
                let c = self.c.at(rows.start * ldc + first);
                dispatch(isa, Activate { activation, c, rows: rows.len(), cols: j + cols - first, ld: ldc });
            }
        }
    }
}

/// What of an activation happens in registers (bounds), and what in a second sweep.
///
/// The costly functions would make each of the two dozen tile functions several times as long; the sweep runs over a
/// few panels of C that are still in a cache, and costs a load and a store beside their dozens of operations.
#[inline(always)]
pub(crate) fn split_activation(activation: Activation) -> (Option<(f32, f32)>, Option<Activation>) {
    match activation {
        Activation::Identity => (None, None),
        Activation::Relu => (Some((0.0, f32::INFINITY)), None),
        Activation::Clip { lo, hi } => (Some((lo, hi)), None),
        other => (None, Some(other)),
    }
}

/// Applies an activation to `rows` rows of `cols` elements, `ld` apart.
///
/// Whoever makes one promises that they are there and that nobody else uses them.
pub(crate) struct Activate {
    pub(crate) activation: Activation,
    pub(crate) c: *mut f32,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) ld: usize,
}

impl Kernel for Activate {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { activation, c, rows, cols, ld } = self;
        // Some vectors at a time, which share the loads of constants: V8 spends three instructions on each, and has registers
        // for a few of them. A macro: a closure would not be compiled for the instruction set.
        macro_rules! sweep {
            ([$($v:literal)+] |$x:ident| $f:expr) => {
                for i in 0..rows {
                    // SAFETY: the contract of the type.
                    let row = unsafe { core::slice::from_raw_parts_mut(c.add(i * ld), cols) };
                    let mut turns = row.chunks_exact_mut([$($v),+].len() * S::LANES);
                    for turn in &mut turns {
                        // All are computed before the first is stored, which could change a constant for all LLVM knows.
                        let v = [$(s.load(&turn[$v * S::LANES..])),+];
                        let v = [$({ let $x = v[$v]; $f }),+];
                        $(s.store(&mut turn[$v * S::LANES..], v[$v]);)+
                    }
                    for part in turns.into_remainder().chunks_mut(S::LANES) {
                        let $x = s.load_partial(part);
                        let y = $f;
                        s.store_partial(part, y);
                    }
                }
            };
        }
        // A loop for each of the functions that take long: a branch inside would cost as much as a quarter of them.
        match activation {
            Activation::Silu => sweep!([0 1] |x| math::silu(s, x)),
            Activation::Gelu if S::LANES == 4 => sweep!([0 1 2 3] |x| math::gelu(s, x)),
            Activation::Gelu => sweep!([0 1] |x| math::gelu(s, x)),
            Activation::Sigmoid => sweep!([0 1] |x| math::sigmoid(s, x)),
            Activation::HardSwish => sweep!([0 1] |x| Activation::HardSwish.apply(s, x)),
            other => sweep!([0 1] |x| other.apply(s, x)),
        }
    }
}

/// Bounds in registers; NaN passes both.
#[inline(always)]
pub(crate) fn clamp<S: Simd>(s: S, x: S::F32, (lo, hi): (f32, f32)) -> S::F32 {
    s.at_most(s.at_least(x, s.splat(lo)), s.splat(hi))
}

#[cfg(test)]
mod tests;
