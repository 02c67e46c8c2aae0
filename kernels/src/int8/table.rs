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
    /// How tiles read the rows of A.
    pub(crate) rows: Rows,
    /// Whether there are tiles of one vector for the last columns; where code is short, they are filled up instead.
    pub(crate) narrows: bool,
}

/// How tiles read the rows of A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// As they were gathered.
    Plain,
    /// Interleaved where it pays, as for floats.
    Either,
    /// Always interleaved: where code is short.
    Interleaved,
}

impl Tile {
    /// Whether there is a tile of this size. Lower ones with interleaved rows are rare, and left out.
    pub(super) const fn has(&self, height: usize, vectors: usize, interleaved: bool) -> bool {
        let rows = match self.rows {
            Rows::Plain => !interleaved,
            Rows::Either => !interleaved || height + 1 >= self.mr,
            Rows::Interleaved => interleaved,
        };
        rows && height <= self.mr && (vectors == self.nrv || self.narrows && vectors < self.nrv)
    }

    /// Whether tiles of `height` rows quantise their sums in registers. Lower ones are rare, and kept short.
    pub(super) const fn quantizes(&self, height: usize) -> bool {
        height + 1 >= self.mr
    }

    /// Whether rows of A are interleaved for tiles of at least `height` rows.
    pub(super) const fn interleaves(&self, height: usize, n: usize, groups: usize) -> bool {
        match self.rows {
            Rows::Plain => false,
            Rows::Either => self.has(height, self.nrv, true) && n >= MIN_COLUMNS && groups >= INTERLEAVE_GROUPS,
            Rows::Interleaved => true,
        }
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
/// As for floats, but a tile of pairs needs one register more here, for the products that are about to be added: of 16,
/// 5 x 2 accumulators leave what a wasm compiler keeps besides, and need fewer broadcasts per product than 4 x 2. In Chromium
/// (Zen 3, builds in turns, `cargo xtask bench gemm --filter int8`) 66.6 and 73.3 GOP/s at 1024^3 as medians, 70.9 and
/// 74.5 as best ones; products with k = 64 were up to 8% slower.
///
/// Products of bytes that the relaxed instruction adds by itself need none: 6 x 2, over 5 x 2 (Zen 5, V8 14.6, modules in
/// turns, medians over whole models), was 1.06 times as fast on MiniLM, 1.04 on DistilBERT, 1.05 on ResNet-50, 1.02 on
/// MobileNetV2.
///
/// [`Form::Split`] keeps two rows of B besides and the products of one, for which 4 x 2 leaves room. In Chromium's engine
/// (Zen 4, builds in turns, medians over whole models, over the tile of 5 x 2 without pairs) 4 x 2 was 1.124 times as fast on
/// DistilBERT and 1.047 on ResNet-50, 10 x 1, of whose narrow panels more rows make pairs, 1.053 and 1.044, 3 x 2 1.12 and
/// 1.03. It makes no passes along k: its rows are in no order that could be cut.
pub(crate) const fn tile(isa: Isa, form: Form) -> Tile {
    match (isa, form) {
        (Isa::Avx512, Form::Split) => Tile { mr: 8, nrv: 2, kc: 512, rows: Rows::Interleaved, narrows: false },
        (_, Form::Split) => Tile { mr: 4, nrv: 2, kc: 512, rows: Rows::Interleaved, narrows: false },
        (Isa::Scalar, _) => Tile { mr: 4, nrv: 2, kc: 512, rows: Rows::Either, narrows: true },
        (Isa::WasmRelaxedSimd, Form::U8S8 | Form::S8S8) => {
            Tile { mr: 6, nrv: 2, kc: 512, rows: Rows::Either, narrows: false }
        }
        (Isa::WasmSimd128 | Isa::WasmRelaxedSimd, _) => {
            Tile { mr: 5, nrv: 2, kc: 512, rows: Rows::Either, narrows: false }
        }
        (Isa::Sse41 | Isa::Fma128, _) => Tile { mr: 4, nrv: 2, kc: 512, rows: Rows::Plain, narrows: true },
        (Isa::Neon, _) => Tile { mr: 8, nrv: 2, kc: 512, rows: Rows::Plain, narrows: true },
        (Isa::Avx2, _) => Tile { mr: 6, nrv: 2, kc: 256, rows: Rows::Plain, narrows: true },
        (Isa::Avx512, _) => Tile { mr: 12, nrv: 2, kc: 256, rows: Rows::Plain, narrows: true },
    }
}

/// Width of a panel of packed B in elements.
pub(crate) const fn panel_width(isa: Isa, form: Form) -> usize {
    tile(isa, form).nrv * isa.lanes()
}

/// Columns of packed B are filled up to a multiple of this.
pub(super) const fn unit(isa: Isa, form: Form) -> usize {
    if tile(isa, form).narrows { isa.lanes() } else { panel_width(isa, form) }
}

/// Width of the panel of `n` columns of packed B that begins at column `first`.
pub(super) fn width(isa: Isa, form: Form, first: usize, n: usize) -> usize {
    panel_width(isa, form).min(n - first).next_multiple_of(unit(isa, form))
}
