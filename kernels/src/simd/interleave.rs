//! Rows of A side by side: what the tiles of some instruction sets read.
//!
//! ```text
//! rows of a tile            a0 a1 a2 ...    b0 b1 b2 ...    (height rows of k)
//! interleaved               a0 b0 ... a1 b1 ... a2 b2 ...   (k groups of height)
//! ```
//!
//! A tile that walks along k then reads one stream of memory instead of one per row, and its broadcasts lie at constant
//! distances from one address.

use crate::{gemm, int8};

/// Fewest columns of the other operand for which rows are worth interleaving. In Chromium, builds in turns
/// (`cargo xtask bench gemm`), interleaving cost a float product with 64 columns 8% in quiet spells of the machine, when its
/// tiles are hardly faster with rows in the second-level cache, and won 5 to 10% in slow ones.
pub(crate) const MIN_COLUMNS: usize = 128;
/// Elements that are gathered at once before they are interleaved: what stays in the first-level cache.
pub(crate) const GATHERED: usize = 4096;

/// Columns that are transposed at once.
const COLUMNS: usize = 4;

/// Rows that can be interleaved at once: those of the highest tile.
pub(crate) const MAX_HEIGHT: usize =
    if gemm::table::MAX_MR > int8::table::MAX_MR { gemm::table::MAX_MR } else { int8::table::MAX_MR };

/// Interleaves rows of `k` elements of 32 bits into groups that are `stride` apart.
///
/// Rows are taken by fours, then by twos: transpositions in registers, as long as there are four columns.
///
/// # Safety
/// The rows are readable, and `dst` is writable for `stride * k` elements that do not overlap them; a stride is no less than
/// the number of rows.
#[inline(never)]
pub(crate) unsafe fn interleave(mut rows: &[*const u32], k: usize, mut dst: *mut u32, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        while !rows.is_empty() {
            let some = match rows.len() {
                4.. => 4,
                2.. => 2,
                _ => 1,
            };
            let mut to = dst;
            let mut p = 0;
            while p + COLUMNS <= k {
                match *rows {
                    [a, b, c, d, ..] => four([a.add(p), b.add(p), c.add(p), d.add(p)], to, stride),
                    [a, b, ..] => two([a.add(p), b.add(p)], to, stride),
                    _ => elements(rows, p, to, stride, COLUMNS),
                }
                to = to.add(COLUMNS * stride);
                p += COLUMNS;
            }
            elements(&rows[..some], p, to, stride, k - p);
            rows = &rows[some..];
            dst = dst.add(some);
        }
    }
}

/// Interleaves the rows of some tiles, of which `row` says the first; the first of all is at `src`. Tiles follow each
/// other in `dst`; their groups are `stride` apart, or as many as a tile has rows.
///
/// # Safety
/// `src` has the rows, `ld` apart, of `k` elements, and is no part of `dst`.
#[inline(never)]
pub(crate) unsafe fn interleave_tiles(
    tiles: core::ops::Range<usize>,
    row: &dyn Fn(usize) -> usize,
    src: *const u32,
    ld: usize,
    k: usize,
    dst: &mut [u32],
    stride: Option<usize>,
) {
    let start = row(tiles.start);
    let mut to = 0;
    for tile in tiles {
        let (first, height) = (row(tile) - start, row(tile + 1) - row(tile));
        let stride = stride.unwrap_or(height);
        assert!(height <= stride);
        let dst = &mut dst[to..][..stride * k];
        let mut rows = [src; MAX_HEIGHT];
        for (i, row) in rows[..height].iter_mut().enumerate() {
            *row = src.wrapping_add((first + i) * ld);
        }
        // SAFETY: promised by the caller; `dst` was just checked.
        unsafe { interleave(&rows[..height], k, dst.as_mut_ptr(), stride) };
        to += stride * k;
    }
}

/// `dst[p * stride + row] = rows[row][first + p]`.
///
/// # Safety
/// Rows have the `columns`, `dst` the places.
#[inline(always)]
unsafe fn elements(rows: &[*const u32], first: usize, dst: *mut u32, stride: usize, columns: usize) {
    for p in 0..columns {
        for (i, row) in rows.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { *dst.add(p * stride + i) = *row.add(first + p) };
        }
    }
}

/// Four rows of four columns.
///
/// # Safety
/// As [`elements`].
#[inline(always)]
unsafe fn four(rows: [*const u32; 4], dst: *mut u32, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        {
            use core::arch::wasm32::{i32x4_shuffle, i64x2_shuffle, v128_load, v128_store};
            let [a, b, c, d] = rows.map(|row| v128_load(row.cast()));
            let (ab, cd) = (i32x4_shuffle::<0, 4, 1, 5>(a, b), i32x4_shuffle::<0, 4, 1, 5>(c, d));
            v128_store(dst.cast(), i64x2_shuffle::<0, 2>(ab, cd));
            v128_store(dst.add(stride).cast(), i64x2_shuffle::<1, 3>(ab, cd));
            let (ab, cd) = (i32x4_shuffle::<2, 6, 3, 7>(a, b), i32x4_shuffle::<2, 6, 3, 7>(c, d));
            v128_store(dst.add(2 * stride).cast(), i64x2_shuffle::<0, 2>(ab, cd));
            v128_store(dst.add(3 * stride).cast(), i64x2_shuffle::<1, 3>(ab, cd));
        }
        #[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
        elements(&rows, 0, dst, stride, COLUMNS);
    }
}

/// Two rows of four columns.
///
/// # Safety
/// As [`elements`].
#[inline(always)]
unsafe fn two(rows: [*const u32; 2], dst: *mut u32, stride: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        {
            use core::arch::wasm32::{i32x4_shuffle, v128_load, v128_store64_lane};
            let [a, b] = rows.map(|row| v128_load(row.cast()));
            let low = i32x4_shuffle::<0, 4, 1, 5>(a, b);
            v128_store64_lane::<0>(low, dst.cast());
            v128_store64_lane::<1>(low, dst.add(stride).cast());
            let high = i32x4_shuffle::<2, 6, 3, 7>(a, b);
            v128_store64_lane::<0>(high, dst.add(2 * stride).cast());
            v128_store64_lane::<1>(high, dst.add(3 * stride).cast());
        }
        #[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
        elements(&rows, 0, dst, stride, COLUMNS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_heights_and_depths() {
        for height in 1..=9 {
            for k in [0, 1, 3, 4, 5, 8, 11] {
                let (ld, stride) = (k + 2, height + k % 3);
                let src: Vec<u32> = (0..(height * ld) as u32).collect();
                let mut dst = vec![u32::MAX; stride * k];
                let rows: Vec<*const u32> = (0..height).map(|i| src[i * ld..].as_ptr()).collect();
                // SAFETY: both have the elements.
                unsafe { interleave(&rows, k, dst.as_mut_ptr(), stride) };
                for (i, x) in dst.into_iter().enumerate() {
                    let (p, row) = (i / stride, i % stride);
                    let want = if row < height { src[row * ld + p] } else { u32::MAX };
                    assert_eq!(x, want, "{height} rows of {k}, {stride} apart: row {row}, column {p}");
                }
            }
        }
    }
}
