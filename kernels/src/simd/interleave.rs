//! Rows of A side by side: what the tiles of some instruction sets read.
//!
//! ```text
//! rows of a tile            a0 a1 a2 ...    b0 b1 b2 ...    (height rows of k)
//! interleaved               a0 b0 ... a1 b1 ... a2 b2 ...   (k groups of height)
//! ```
//!
//! A tile that walks along k then reads one stream of memory instead of one per row, and its broadcasts lie at constant
//! distances from one address.

/// Fewest columns of the other operand for which rows are worth interleaving. In Chromium, builds in turns
/// (`cargo xtask bench gemm`), interleaving cost a float product with 64 columns 8% in quiet spells of the machine, when its
/// tiles are hardly faster with rows in the second-level cache, and won 5 to 10% in slow ones.
pub(crate) const MIN_COLUMNS: usize = 128;
/// Elements that are gathered at once before they are interleaved: what stays in the first-level cache.
pub(crate) const GATHERED: usize = 4096;

/// Columns that are transposed at once.
const COLUMNS: usize = 4;

/// Interleaves `height` rows of `k` elements of 32 bits, `ld` apart at `src`.
///
/// Rows are taken by fours, then by twos: transpositions in registers, as long as there are four columns.
///
/// # Safety
/// `src` has the rows, and `dst` is writable for `height * k` elements that do not overlap them.
unsafe fn interleave(src: *const u32, ld: usize, height: usize, k: usize, dst: *mut u32) {
    // SAFETY: promised by the caller.
    unsafe {
        // Known heights of tiles, so that places in `dst` are constants of its addresses.
        match height {
            4 => all_rows(src, ld, 4, k, dst),
            5 => all_rows(src, ld, 5, k, dst),
            6 => all_rows(src, ld, 6, k, dst),
            height => all_rows(src, ld, height, k, dst),
        }
    }
}

/// Interleaves the rows of some tiles, of which `row` says the first; the first of all is at `src`. Tiles follow each
/// other in `dst`.
///
/// # Safety
/// `src` has the rows, `ld` apart, of `k` elements, and is no part of `dst`.
#[inline(always)]
pub(crate) unsafe fn interleave_tiles(
    tiles: core::ops::Range<usize>,
    row: impl Fn(usize) -> usize,
    src: *const u32,
    ld: usize,
    k: usize,
    dst: &mut [u32],
) {
    let start = row(tiles.start);
    for tile in tiles {
        let (first, height) = (row(tile) - start, row(tile + 1) - row(tile));
        let dst = &mut dst[first * k..][..height * k];
        // SAFETY: promised by the caller; `dst` was just checked.
        unsafe { interleave(src.wrapping_add(first * ld), ld, height, k, dst.as_mut_ptr()) };
    }
}

/// See [`interleave`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn all_rows(src: *const u32, ld: usize, height: usize, k: usize, dst: *mut u32) {
    // SAFETY: all rows and columns below are less than `height` and `k`.
    unsafe {
        let mut row = 0;
        while row < height {
            let rows = match height - row {
                4.. => 4,
                2.. => 2,
                rows => rows,
            };
            let (mut from, mut to) = (src.add(row * ld), dst.add(row));
            let mut left = k;
            while left >= COLUMNS {
                match rows {
                    4 => four(from, ld, to, height),
                    2 => two(from, ld, to, height),
                    _ => elements(from, ld, to, height, 1, COLUMNS),
                }
                from = from.add(COLUMNS);
                to = to.add(COLUMNS * height);
                left -= COLUMNS;
            }
            elements(from, ld, to, height, rows, left);
            row += rows;
        }
    }
}

/// `dst[p * height + row] = src[row * ld + p]`.
///
/// # Safety
/// `src` has `rows` rows of `columns`, `dst` the places.
#[inline(always)]
unsafe fn elements(src: *const u32, ld: usize, dst: *mut u32, height: usize, rows: usize, columns: usize) {
    for p in 0..columns {
        for row in 0..rows {
            // SAFETY: promised by the caller.
            unsafe { *dst.add(p * height + row) = *src.add(row * ld + p) };
        }
    }
}

/// Four rows of four columns.
///
/// # Safety
/// As [`elements`].
#[inline(always)]
unsafe fn four(src: *const u32, ld: usize, dst: *mut u32, height: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        {
            use core::arch::wasm32::{i32x4_shuffle, i64x2_shuffle, v128_load, v128_store};
            let [a, b, c, d] = [0, 1, 2, 3].map(|row| v128_load(src.add(row * ld).cast()));
            let (ab, cd) = (i32x4_shuffle::<0, 4, 1, 5>(a, b), i32x4_shuffle::<0, 4, 1, 5>(c, d));
            v128_store(dst.cast(), i64x2_shuffle::<0, 2>(ab, cd));
            v128_store(dst.add(height).cast(), i64x2_shuffle::<1, 3>(ab, cd));
            let (ab, cd) = (i32x4_shuffle::<2, 6, 3, 7>(a, b), i32x4_shuffle::<2, 6, 3, 7>(c, d));
            v128_store(dst.add(2 * height).cast(), i64x2_shuffle::<0, 2>(ab, cd));
            v128_store(dst.add(3 * height).cast(), i64x2_shuffle::<1, 3>(ab, cd));
        }
        #[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
        elements(src, ld, dst, height, 4, COLUMNS);
    }
}

/// Two rows of four columns.
///
/// # Safety
/// As [`elements`].
#[inline(always)]
unsafe fn two(src: *const u32, ld: usize, dst: *mut u32, height: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        {
            use core::arch::wasm32::{i32x4_shuffle, v128_load, v128_store64_lane};
            let [a, b] = [0, 1].map(|row| v128_load(src.add(row * ld).cast()));
            let low = i32x4_shuffle::<0, 4, 1, 5>(a, b);
            v128_store64_lane::<0>(low, dst.cast());
            v128_store64_lane::<1>(low, dst.add(height).cast());
            let high = i32x4_shuffle::<2, 6, 3, 7>(a, b);
            v128_store64_lane::<0>(high, dst.add(2 * height).cast());
            v128_store64_lane::<1>(high, dst.add(3 * height).cast());
        }
        #[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
        elements(src, ld, dst, height, 2, COLUMNS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_heights_and_depths() {
        for height in 1..=9 {
            for k in [0, 1, 3, 4, 5, 8, 11] {
                let ld = k + 2;
                let src: Vec<u32> = (0..(height * ld) as u32).collect();
                let mut dst = vec![u32::MAX; height * k];
                // SAFETY: both have the elements.
                unsafe { interleave(src.as_ptr(), ld, height, k, dst.as_mut_ptr()) };
                for p in 0..k {
                    for row in 0..height {
                        assert_eq!(
                            dst[p * height + row],
                            src[row * ld + p],
                            "{height} rows of {k}: row {row}, column {p}"
                        );
                    }
                }
            }
        }
    }
}
