//! Tile shapes and block sizes as data: one row per instruction set. That of WebAssembly's relaxed SIMD is the winner of
//! `cargo xtask bench tune`, which measures candidates in a browser; the others were chosen with `examples/gemm_bench`.

use crate::simd::Isa;
use crate::simd::interleave::MIN_COLUMNS;

/// How the loop nest cuts a product for one instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Most rows of A (and C) that one call of the microkernel takes; it exists for every smaller height too.
    pub mr: usize,
    /// The same for panels of fewer than `nrv` vectors, the last ones of a row of panels.
    pub narrow_mr: usize,
    /// Vectors of B (and C) per row of the tile. A panel of packed B is this wide.
    pub nrv: usize,
    /// Rows of B per pass: `kc` x `nrv` vectors of B and `mr` x `kc` of A stay in the first-level cache. In Chromium 512
    /// (24 of 32 KB) was 1 to 5% faster than 256 at k = 384 to 3072.
    pub kc: usize,
    /// Rows of A per pass: `mc` x `kc` stay in the second-level cache.
    pub mc: usize,
    /// Steps along k per turn of the innermost loop, 1 or 4. Unrolling gives the compiler room to reorder, and it then
    /// keeps more broadcasts and rows of B alive than there are registers: with AVX-512 it spilled (84 instead of 114
    /// GFLOP/s), and for wasm it nests the steps of each accumulator in one expression (in Chromium, relaxed SIMD,
    /// k = 512, operands in the first two caches: 4 x 2 tiles reached 98% of the peak with 1 step, 58% with 4).
    pub unroll: usize,
    /// Whether there are tiles for rows of A that were interleaved, see [`interleave`](mod@crate::simd::interleave).
    pub interleaves: bool,
}

impl Tile {
    /// Most rows of a tile of some vectors.
    pub const fn rows(&self, vectors: usize) -> usize {
        if vectors == self.nrv { self.mr } else { self.narrow_mr }
    }

    /// Whether there is a tile for interleaved rows of A. Lower ones are rare, and left out.
    pub(super) const fn has_interleaved(&self, height: usize) -> bool {
        self.interleaves && height + 2 >= self.mr && height <= self.mr
    }

    /// Whether rows of A are worth interleaving for tiles of at least `height` rows.
    pub(super) const fn interleaves(&self, height: usize, n: usize, k: usize) -> bool {
        self.has_interleaved(height) && n >= MIN_COLUMNS && k >= INTERLEAVE_DEPTH
    }
}

/// Fewest rows of B for which A is interleaved.
const INTERLEAVE_DEPTH: usize = 16;

/// Highest tile of any row of the table.
pub const MAX_MR: usize = 14;
/// Widest tile of any row of the table, in vectors.
pub const MAX_NRV: usize = 3;

/// The row of the table for `isa`.
///
/// 16 vector registers hold 6 x 2 accumulators, a row of B and a broadcast of A: 15, which is what V8 gives to a function
/// on x86, too. It takes the operations in the order of the source, for which the build has to ask LLVM (see
/// `xtask/src/build.rs`; in LLVM's own order of before, 4 x 2 was the largest tile that did not spill). In that order,
/// operands in the first two caches, 4 x 2 reached at best 97.8% of the best peak, 5 x 2 97.5%, 6 x 2 99.1% (medians were
/// 83 to 98%, unsteady); eight accumulators are just what two multiply-adds a cycle of latency four need. Tiles of 4 x 3
/// reached 47%. AVX-512 has room for 12 x 2 and more of 32, NEON (32 registers) for 8 x 2.
///
/// Without relaxed SIMD a product takes one more register. WebKit, the browser without it, makes three instructions of a
/// broadcast (it adds the row, then the base of memory, as its vector load with a splat takes a plain address) and one of
/// a vector of B: of a step of 4 x 2 sums 35 instructions for 16 products and additions, of 3 x 3 sums 35 for 18, of 5 x 2
/// sums 42 for 20, of 6 x 2 sums 49 for 24 (`JSC_dumpOMGDisassembly=1`). The tiles alone, in a program outside of this tree
/// (Zen 3, operands in the first two caches), had 70, 83, 73 and 76% of the peak there as medians; in Chromium, without
/// relaxed SIMD, 87, 87, 91 and 60%. So 3 x 3, and 5 x 2 for a last panel; k per pass made no difference between 64 and
/// 768, 384 is a panel of 18 KB. `cargo xtask bench tune --browser webkit` measures that in the browser, and interleaved rows
/// of A beside it, which lose there. The scalar tile has the same shape for the sake of its tests.
pub const fn tile(isa: Isa) -> Tile {
    match isa {
        Isa::Scalar => Tile { mr: 3, narrow_mr: 5, nrv: 3, kc: 256, mc: 128, unroll: 4, interleaves: true },
        Isa::WasmSimd128 => match candidate() {
            Some(tile) => tile,
            None => Tile { mr: 3, narrow_mr: 5, nrv: 3, kc: 384, mc: 128, unroll: 1, interleaves: false },
        },
        Isa::WasmRelaxedSimd => match candidate() {
            Some(tile) => tile,
            None => Tile { mr: 6, narrow_mr: 6, nrv: 2, kc: 512, mc: 128, unroll: 1, interleaves: true },
        },
        Isa::Sse41 | Isa::Fma128 => {
            Tile { mr: 4, narrow_mr: 4, nrv: 2, kc: 256, mc: 128, unroll: 4, interleaves: false }
        }
        Isa::Neon => Tile { mr: 8, narrow_mr: 8, nrv: 2, kc: 256, mc: 128, unroll: 4, interleaves: false },
        Isa::Avx2 => Tile { mr: 6, narrow_mr: 6, nrv: 2, kc: 256, mc: 144, unroll: 4, interleaves: false },
        Isa::Avx512 => Tile { mr: 12, narrow_mr: 12, nrv: 2, kc: 256, mc: 192, unroll: 1, interleaves: false },
    }
}

/// `mr,narrow_mr,nrv,kc,mc,unroll,interleaves`, in the place of the row of WebAssembly's instruction set: what `cargo xtask bench
/// tune` compiles a candidate with.
const fn candidate() -> Option<Tile> {
    let Some(text) = option_env!("WEBLANE_TILE") else { return None };
    let text = text.as_bytes();
    let (mut numbers, mut field, mut i) = ([0; 7], 0, 0);
    while i < text.len() {
        match text[i] {
            b',' => field += 1,
            digit @ b'0'..=b'9' => numbers[field] = 10 * numbers[field] + (digit - b'0') as usize,
            _ => panic!("WEBLANE_TILE has something else than digits and commas"),
        }
        i += 1;
    }
    assert!(field == 6, "WEBLANE_TILE wants seven numbers");
    let [mr, narrow_mr, nrv, kc, mc, unroll, interleaves] = numbers;
    Some(Tile { mr, narrow_mr, nrv, kc, mc, unroll, interleaves: interleaves != 0 })
}

/// Width of a panel of packed B in elements.
pub const fn panel_width(isa: Isa) -> usize {
    tile(isa).nrv * isa.lanes()
}
