//! Tile shapes and block sizes of the integer product as data, chosen with `examples/gemm_bench`.

use super::Form;
use crate::simd::Isa;
use crate::simd::interleave::MIN_COLUMNS;

/// How the loop nest cuts a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Most rows of A that one call of the microkernel takes; it exists for every smaller height too.
    pub(crate) mr: usize,
    /// Vectors of B per row of the tile. A panel of packed B is this wide.
    pub(crate) nrv: usize,
    /// Groups along k per pass: `kc` x `nrv` vectors of B stay in the first-level cache.
    pub(crate) kc: usize,
    /// Whether there are tiles for interleaved rows of A, as for floats.
    pub(crate) interleaves: bool,
}

impl Tile {
    /// Whether there is a tile for interleaved rows of A. Lower ones are rare, and left out.
    pub(super) const fn has_interleaved(&self, height: usize) -> bool {
        self.interleaves && height + 1 >= self.mr && height <= self.mr
    }

    /// Whether rows of A are worth interleaving for tiles of at least `height` rows.
    pub(super) const fn interleaves(&self, height: usize, n: usize, groups: usize) -> bool {
        self.has_interleaved(height) && n >= MIN_COLUMNS && groups >= INTERLEAVE_GROUPS
    }
}

/// Fewest groups along k for which A is interleaved.
const INTERLEAVE_GROUPS: usize = 8;

/// Highest tile of any row of the table.
pub(crate) const MAX_MR: usize = 12;
/// Widest tile of any row of the table, in vectors.
pub(crate) const MAX_NRV: usize = 2;

/// The row of the table for `isa` and `form`.
///
/// As for floats, but a tile needs one register more here, for the products that are about to be added: of 16, 5 x 2
/// accumulators leave what a wasm compiler keeps besides, and need fewer broadcasts per product than 4 x 2. In Chromium
/// (Zen 3, builds in turns, `cargo xtask bench gemm --filter int8`) 66.6 and 73.3 GOP/s at 1024^3 as medians, 70.9 and
/// 74.5 as best ones; products with k = 64 were up to 8% slower.
pub(crate) const fn tile(isa: Isa, form: Form) -> Tile {
    match (isa, form) {
        (Isa::Scalar, _) => Tile { mr: 4, nrv: 2, kc: 512, interleaves: true },
        (Isa::WasmSimd128 | Isa::WasmRelaxedSimd, _) => Tile { mr: 5, nrv: 2, kc: 512, interleaves: true },
        (Isa::Sse41 | Isa::Fma128, _) => Tile { mr: 4, nrv: 2, kc: 512, interleaves: false },
        (Isa::Neon, _) => Tile { mr: 8, nrv: 2, kc: 512, interleaves: false },
        (Isa::Avx2, _) => Tile { mr: 6, nrv: 2, kc: 256, interleaves: false },
        (Isa::Avx512, _) => Tile { mr: 12, nrv: 2, kc: 256, interleaves: false },
    }
}

/// Width of a panel of packed B in elements.
pub(crate) const fn panel_width(isa: Isa, form: Form) -> usize {
    tile(isa, form).nrv * isa.lanes()
}
