//! What both number types share: where tiles lie in an image, and the order of the three steps.

use crate::conv::{ConvInput, ConvParams};
use crate::error::{Error, Result};
use crate::gemm::{self, OutPtr, part};
use crate::par::{Cx, DisjointMut};
use core::ops::Range;

use super::TileSize;

/// Bytes of packed weights up to which every block of tiles reads all of them.
pub(super) const SMALL_WEIGHTS: usize = 1 << 20;
/// Elements of transformed inputs and products of a block of tiles, if the weights are small.
const BLOCK: usize = 1 << 17;
/// Elements of transformed inputs and products of a part of the image, if they are not.
const PART: usize = 1 << 20;
/// Tasks of each step of a part.
const STEP_TASKS: usize = 16;

/// The sizes of one convolution. Pairs are `[input, output]`.
pub(crate) struct Geometry {
    pub(crate) channels: [usize; 2],
    pub(crate) depth: [usize; 2],
    pub(crate) height: [usize; 2],
    pub(crate) width: [usize; 2],
    pub(crate) pads: [usize; 3],
    /// Tiles of a plane: rows, columns.
    grid: [usize; 2],
    /// All tiles.
    tiles: usize,
}

impl Geometry {
    /// Of a convolution whose sizes were checked.
    pub(crate) fn new(size: TileSize, params: &ConvParams, input: &ConvInput, [depth, oh, ow]: [usize; 3]) -> Self {
        let m = size.outputs();
        let grid = [oh.div_ceil(m), ow.div_ceil(m)];
        Self {
            channels: [params.in_channels, params.out_channels],
            depth: [input.spatial[0], depth],
            height: [input.spatial[1], oh],
            width: [input.spatial[2], ow],
            pads: input.pads_begin,
            grid,
            tiles: input.batch * depth * grid[0] * grid[1],
        }
    }

    /// Plane, first row and first column of the outputs of a tile.
    #[inline(always)]
    pub(crate) fn place(&self, tile: usize, outputs: usize) -> [usize; 3] {
        let [rows, columns] = self.grid;
        [tile / columns / rows, tile / columns % rows * outputs, tile % columns * outputs]
    }

    /// Where the inputs of a tile lie, row by row: in the image `x`, or the pixel of padding.
    #[inline(always)]
    pub(crate) fn pixels<T, const N: usize>(&self, tile: usize, x: *const T, padding: *const T) -> [*const T; 36] {
        let mut pixels = [padding; 36];
        let [plane, top, left] = self.place(tile, N - 2);
        let (b, z) = (plane / self.depth[1], (plane % self.depth[1]).wrapping_sub(self.pads[0]));
        if z >= self.depth[0] {
            return pixels;
        }
        let plane = b * self.depth[0] + z;
        // Before the image they wrap around and are not less than its size.
        for i in 0..N {
            let y = (top + i).wrapping_sub(self.pads[1]);
            if y >= self.height[0] {
                continue;
            }
            let line = (plane * self.height[0] + y) * self.width[0];
            for j in 0..N {
                let column = (left + j).wrapping_sub(self.pads[2]);
                if column < self.width[0] {
                    pixels[i * N + j] = x.wrapping_add((line + column) * self.channels[0]);
                }
            }
        }
        pixels
    }
}

/// A matrix per point with a row per tile, of elements of 32 bits.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    start: OutPtr,
    /// Elements between tiles.
    pub(crate) ld: usize,
    /// Elements between points.
    pub(crate) point: usize,
    /// The tile of the first row.
    pub(crate) first: usize,
}

impl Rows {
    /// The matrix of a point.
    pub(crate) fn at(&self, point: usize) -> *mut f32 {
        self.start.at(point * self.point)
    }

    /// The row of a tile in the matrix of the first point.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> *mut f32 {
        self.start.at((tile - self.first) * self.ld)
    }
}

/// The three steps; `v` and `r` are given rows that nobody else uses.
pub(crate) trait Steps: Sync {
    /// Transforms the inputs of `tiles` into `v`, which has them all.
    fn forward(&self, tiles: Range<usize>, v: Rows);
    /// `r = v U` for one point and the first `m` rows.
    fn multiply(&self, point: usize, m: usize, v: Rows, r: Rows);
    /// Computes the outputs of `tiles` from `r`.
    fn backward(&self, tiles: Range<usize>, r: Rows);
}

/// Runs the steps for all tiles. `row` is the number of elements that a row of `v` and one of `r` have at each of
/// `points`, `weights` the bytes of all U.
pub(crate) fn run(
    cx: &Cx<'_>,
    geometry: &Geometry,
    points: usize,
    row: [usize; 2],
    weights: usize,
    steps: &dyn Steps,
) -> Result<()> {
    let tiles = geometry.tiles;
    let [lda, ldc] = row.map(gemm::leading_dimension);
    let per_tile = points * (lda + ldc);
    let [k, n] = geometry.channels;
    let cost = |tiles: usize| (2 * tiles as u64).saturating_mul((points * k) as u64).saturating_mul(n as u64);
    if weights <= SMALL_WEIGHTS {
        let blocks = tiles.div_ceil((BLOCK / per_tile).max(4));
        let most = tiles.div_ceil(blocks);
        cx.for_each_scratch(blocks, cost(tiles), most * per_tile, &|block, scratch| {
            let tiles = part(tiles, blocks, block);
            let (v, r) = scratch.split_at_mut(most * points * lda);
            let v = Rows { start: OutPtr(v.as_mut_ptr()), ld: lda, point: most * lda, first: tiles.start };
            let r = Rows { start: OutPtr(r.as_mut_ptr()), ld: ldc, point: most * ldc, first: tiles.start };
            steps.forward(tiles.clone(), v);
            (0..points).for_each(|p| steps.multiply(p, tiles.len(), v, r));
            steps.backward(tiles, r);
        });
        return Ok(());
    }
    let parts = tiles.div_ceil((PART / per_tile).max(32));
    let most = tiles.div_ceil(parts);
    let len = most.checked_mul(per_tile).ok_or_else(|| Error::new("too many channels for the address space"))?;
    cx.with_workspace(len, |workspace| {
        let workspace = DisjointMut::new(workspace);
        let start = OutPtr(workspace.as_mut_ptr());
        for index in 0..parts {
            let tiles = part(tiles, parts, index);
            let v = Rows { start, ld: lda, point: most * lda, first: tiles.start };
            let r = Rows { start: start.offset(most * points * lda), ld: ldc, point: most * ldc, ..v };
            let cost = cost(tiles.len());
            let tasks = STEP_TASKS.min(tiles.len());
            let some = |task: usize| {
                let some = part(tiles.len(), tasks, task);
                tiles.start + some.start..tiles.start + some.end
            };
            cx.for_each(tasks, cost / 8, &|task| steps.forward(some(task), v));
            cx.for_each(points, cost, &|p| steps.multiply(p, tiles.len(), v, r));
            cx.for_each(tasks, cost / 8, &|task| steps.backward(some(task), r));
        }
    });
    Ok(())
}
