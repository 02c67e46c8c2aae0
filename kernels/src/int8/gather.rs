//! Rows of A in the form that the tiles read: widened to 16 bits with the zero point taken off, or bytes.
//!
//! ```text
//! for rows of the block
//!     a matrix         row[p] = convert(a[i, p])
//!     patches          for kd, kh (and kw, if taps are not side by side in memory)
//!                          convert the run of taps inside the image, zero points on both sides
//! ```
//!
//! The element after an odd row is read by the tile and meets a zero of B.

use super::{Bytes, Form};
use crate::simd::interleave::{MAX_HEIGHT, interleave};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use core::ops::Range;

/// A left operand. Lengths were checked: everything that the fields lead to is there.
#[derive(Clone, Copy)]
pub(super) enum Lhs<'a> {
    Matrix(Matrix<'a>),
    Patches(Patches<'a>),
}

/// `(i, p)` is `data[i * row_stride + p * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: Bytes<'a>,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// Windows of a channels-last image, see [`crate::conv`]: a row for each pixel of the output.
#[derive(Clone, Copy)]
pub(super) struct Patches<'a> {
    pub(super) x: Bytes<'a>,
    /// Of the image, the first of the group, those of the group.
    pub(super) channels: usize,
    pub(super) first: usize,
    pub(super) depth: usize,
    pub(super) spatial: [usize; 3],
    pub(super) out_spatial: [usize; 3],
    pub(super) kernel: [usize; 3],
    pub(super) strides: [usize; 3],
    pub(super) dilations: [usize; 3],
    pub(super) pads: [usize; 3],
}

impl Lhs<'_> {
    fn data(&self) -> Bytes<'_> {
        match self {
            Self::Matrix(a) => a.data,
            Self::Patches(p) => p.x,
        }
    }

    /// What is added to an element for it to be read by a form of bytes.
    pub(super) fn shift(&self, form: Form) -> i32 {
        match (form, self.data()) {
            (Form::Split | Form::U8S8, Bytes::I8(_)) => 128,
            (Form::S8S8, Bytes::U8(_)) => -128,
            _ => 0,
        }
    }

    /// Row `row` and the groups from one row to the next, if a form of bytes can read the rows of `k` elements where they are.
    pub(super) fn in_place(&self, form: Form, row: usize, k: usize) -> Option<(*const i32, usize)> {
        let Self::Matrix(a) = self else { return None };
        let bytes = matches!(form, Form::U8S8 | Form::S8S8) && self.shift(form) == 0;
        let first = a.data.as_ptr().wrapping_add(row * a.row_stride).cast::<i32>();
        let groups = a.col_stride == 1 && [k, a.row_stride].iter().all(|n| n.is_multiple_of(4)) && first.is_aligned();
        (bytes && groups).then_some((first, a.row_stride / 4))
    }

    /// Windows, if a form of bytes can read their taps where they are: channels come in whole groups.
    pub(super) fn taps(&self, form: Form) -> Option<&Patches<'_>> {
        let Self::Patches(p) = self else { return None };
        let bytes = form != Form::Wide && self.shift(form) == 0;
        let groups = [p.channels, p.first, p.depth].iter().all(|n| n.is_multiple_of(4)) && p.depth >= MIN_DEPTH;
        (bytes && groups && p.x.as_ptr().cast::<i32>().is_aligned()).then_some(p)
    }

    /// Writes `k` elements of each of some rows to `dst`, `ld` groups of the form (32 bits) apart.
    pub(super) fn gather(
        &self,
        isa: Isa,
        form: Form,
        zero: i32,
        rows: Range<usize>,
        k: usize,
        dst: &mut [i32],
        ld: usize,
    ) {
        assert!(k.div_ceil(form.group()) <= ld && dst.len() >= rows.len() * ld);
        let convert = Convert::new(form, &self.data(), zero);
        dispatch(isa, Gather { lhs: self, convert, rows, k, dst: dst.as_mut_ptr().cast(), ld: 4 * ld });
    }
}

/// Fewest channels for which taps are read where they are.
const MIN_DEPTH: usize = 16;

impl Patches<'_> {
    /// Interleaves the rows of some tiles, of which `row` says the first, as [`interleave_tiles`] does, from where the
    /// taps are: no row is gathered. Taps outside of the image are read from `padding`, which holds a zero point for each
    /// channel of the group.
    ///
    /// [`interleave_tiles`]: crate::simd::interleave::interleave_tiles
    ///
    /// # Safety
    /// The windows are those of [`Lhs::taps`], and have the rows; no part of `dst` is in the image or the padding.
    #[inline(never)]
    pub(super) unsafe fn interleave(
        &self,
        tiles: Range<usize>,
        row: &dyn Fn(usize) -> usize,
        padding: &[i32],
        dst: &mut [u32],
        stride: Option<usize>,
    ) {
        let x = self.x.as_ptr().wrapping_add(self.first);
        let [id, ih, iw] = self.spatial;
        let [kd, kh, kw] = self.kernel;
        let groups = self.depth / 4;
        let padding = padding[..groups].as_ptr().cast();
        let mut at = place(row(tiles.start), self.out_spatial);
        let mut to = 0;
        for tile in tiles {
            let height = row(tile + 1) - row(tile);
            let stride = stride.unwrap_or(height);
            assert!(height <= stride);
            // Image, and first tap, whose places left of the image and above it are huge numbers.
            let mut corners = [(0, [0; 3]); MAX_HEIGHT];
            for corner in &mut corners[..height] {
                *corner = (at[0], [0, 1, 2].map(|d| (at[d + 1] * self.strides[d]).wrapping_sub(self.pads[d])));
                step(&mut at, self.out_spatial);
            }
            let mut rows = [padding; MAX_HEIGHT];
            for tap in 0..kd * kh * kw {
                let tap = [tap / kw / kh, tap / kw % kh, tap % kw];
                for (row, (image, corner)) in rows.iter_mut().zip(&corners[..height]) {
                    let [d, h, w] = [0, 1, 2].map(|d| corner[d].wrapping_add(tap[d] * self.dilations[d]));
                    *row = if d < id && h < ih && w < iw {
                        x.wrapping_add((((image * id + d) * ih + h) * iw + w) * self.channels).cast()
                    } else {
                        padding
                    };
                }
                let dst = &mut dst[to..][..stride * groups];
                // SAFETY: a tap that lies inside the image has all channels; `dst` was just checked.
                unsafe { interleave(&rows[..height], groups, dst.as_mut_ptr(), stride) };
                to += stride * groups;
            }
        }
    }
}

/// How the elements of A are read by a form of the dot product.
#[derive(Clone, Copy)]
pub(super) struct Convert {
    wide: bool,
    signed: bool,
    zero: i16,
    /// Exclusive or that makes signed bytes unsigned, or the other way.
    flip: u8,
}

impl Convert {
    /// For elements like these.
    fn new(form: Form, data: &Bytes<'_>, zero: i32) -> Self {
        let signed = matches!(data, Bytes::I8(_));
        let flip = match form {
            Form::Wide => false,
            Form::Split | Form::U8S8 => signed,
            Form::S8S8 => !signed,
        };
        Self { wide: form == Form::Wide, signed, zero: zero as i16, flip: if flip { 0x80 } else { 0 } }
    }

    /// Bytes that an element becomes.
    #[inline(always)]
    fn size(self) -> usize {
        1 + usize::from(self.wide)
    }

    /// One element.
    ///
    /// # Safety
    /// `dst` must be writable for [`size`](Self::size) bytes.
    #[inline(always)]
    unsafe fn one(self, x: u8, dst: *mut u8) {
        // SAFETY: promised by the caller.
        unsafe {
            if self.wide {
                let x = if self.signed { i16::from(x as i8) } else { i16::from(x) };
                dst.cast::<i16>().write_unaligned(x - self.zero);
            } else {
                *dst = x ^ self.flip;
            }
        }
    }

    /// `len` neighbours.
    ///
    /// # Safety
    /// They must be readable and writable, and not overlap.
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S, src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: promised by the caller; vectors lie inside, the last one overlaps the one before.
        unsafe {
            let step = if self.wide { 2 * S::LANES } else { 4 * S::LANES };
            if S::LANES == 16 && !self.wide && (8..step).contains(&len) {
                // Those of a few channels are far shorter than such vectors.
                let flip = u64::from_ne_bytes([self.flip; 8]);
                let mut i = 0;
                loop {
                    dst.add(i).cast::<u64>().write_unaligned(src.add(i).cast::<u64>().read_unaligned() ^ flip);
                    if i == len - 8 {
                        return;
                    }
                    i = (i + 8).min(len - 8);
                }
            }
            if len < step {
                for i in 0..len {
                    self.one(*src.add(i), dst.add(i * self.size()));
                }
                return;
            }
            let last = len - step;
            let mut i = 0;
            if self.wide {
                let zero = s.splat_i16(self.zero);
                macro_rules! widen {
                    ($signed:literal) => {
                        loop {
                            let x = s.sub_i16(s.widen_bytes::<$signed>(src.add(i)), zero);
                            s.store_i32_ptr(dst.add(2 * i).cast(), x);
                            if i == last {
                                break;
                            }
                            i = (i + step).min(last);
                        }
                    };
                }
                if self.signed { widen!(true) } else { widen!(false) }
            } else {
                let flip = s.splat_i32(i32::from_ne_bytes([self.flip; 4]));
                loop {
                    s.store_i32_ptr(dst.add(i).cast(), s.xor_i32(s.load_i32_ptr(src.add(i).cast()), flip));
                    if i == last {
                        break;
                    }
                    i = (i + step).min(last);
                }
            }
        }
    }

    /// 16 neighbours, not of the form of pairs: for runs that are shorter, behind which something else is written later.
    ///
    /// # Safety
    /// 16 bytes must be readable and writable, and not overlap.
    #[inline(always)]
    unsafe fn sixteen(self, src: *const u8, dst: *mut u8) {
        let flip = u128::from_ne_bytes([self.flip; 16]);
        // SAFETY: promised by the caller.
        unsafe { dst.cast::<u128>().write_unaligned(src.cast::<u128>().read_unaligned() ^ flip) };
    }

    /// `len` elements of padding, whose value is the zero point.
    ///
    /// # Safety
    /// They must be writable.
    #[inline(always)]
    unsafe fn fill(self, dst: *mut u8, len: usize) {
        let byte = if self.wide { 0 } else { self.zero as u8 ^ self.flip };
        // SAFETY: promised by the caller.
        unsafe { dst.write_bytes(byte, len * self.size()) };
    }
}

/// Whoever makes one promises that `dst` has `ld` bytes for each row.
struct Gather<'a> {
    lhs: &'a Lhs<'a>,
    convert: Convert,
    rows: Range<usize>,
    k: usize,
    dst: *mut u8,
    ld: usize,
}

impl Kernel for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.lhs {
            Lhs::Matrix(a) => self.matrix(s, a),
            Lhs::Patches(p) => self.patches(s, p),
        }
    }
}

// Not inlined on wasm, where optimising compilers choke on huge functions.
impl Gather<'_> {
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn matrix<S: Simd>(&self, s: S, a: &Matrix<'_>) {
        let Self { convert, k, dst, ld, .. } = *self;
        if k == 0 {
            return;
        }
        let data = a.data.as_ptr();
        for (i, row) in self.rows.clone().enumerate() {
            // SAFETY: the matrix has these elements, the destination this row.
            unsafe {
                let (src, dst) = (data.add(row * a.row_stride), dst.add(i * ld));
                if a.col_stride == 1 {
                    convert.run(s, src, dst, k);
                } else {
                    for p in 0..k {
                        convert.one(*src.add(p * a.col_stride), dst.add(p * convert.size()));
                    }
                }
            }
        }
    }

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn patches<S: Simd>(&self, s: S, p: &Patches<'_>) {
        let Self { convert, dst, ld, .. } = *self;
        let size = convert.size();
        let x = p.x.as_ptr();
        let [id, ih, iw] = p.spatial;
        let [kd, kh, kw] = p.kernel;
        // Taps side by side in memory form one run.
        let merged = p.dilations[2] == 1 && p.depth == p.channels;
        let (runs, taps) = if merged { (1, kw) } else { (kw, 1) };
        // Where the runs of a patch begin after its first tap, if there are few, for patches without padding.
        let count = kd * kh * runs;
        let few = count <= MAX_RUNS;
        let mut starts = [0; MAX_RUNS];
        if few {
            for (r, start) in starts[..count].iter_mut().enumerate() {
                let (line, tap) = (r / runs, r % runs);
                let [dz, dy, dx] = p.dilations;
                *start = ((line / kh * dz * ih + line % kh * dy) * iw + tap * dx) * p.channels;
            }
        }
        let len = taps * p.depth;
        // Short runs, of a first layer say, are copied with what follows them.
        let short = !convert.wide && len <= 16;
        let reach = [0, 1, 2].map(|d| (p.kernel[d] - 1) * p.dilations[d]);
        let mut at = place(self.rows.start, p.out_spatial);
        for i in 0..self.rows.len() {
            let corner = [0, 1, 2].map(|d| (at[d + 1] * p.strides[d]).wrapping_sub(p.pads[d]));
            let inside = (0..3).all(|d| corner[d] < p.spatial[d] && reach[d] < p.spatial[d] - corner[d]);
            if few && inside {
                let start = (((at[0] * id + corner[0]) * ih + corner[1]) * iw + corner[2]) * p.channels + p.first;
                // SAFETY: all taps lie inside the image, the lengths of all runs of a row add up to k, which is at most ld.
                unsafe {
                    let (src, mut dst) = (x.add(start), dst.add(i * ld));
                    // 16 bytes from the last run on are in the image, and a row behind this one is still to be written.
                    if short && start + starts[count - 1] + 16 <= p.x.len() && i + 1 < self.rows.len() && ld >= 16 {
                        for start in &starts[..count] {
                            convert.sixteen(src.add(*start), dst);
                            dst = dst.add(len);
                        }
                        // The end of the last group counts in sums of rows.
                        dst.write_bytes(0, (count * len).next_multiple_of(4) - count * len);
                        step(&mut at, p.out_spatial);
                        continue;
                    }
                    for start in &starts[..count] {
                        convert.run(s, src.add(*start), dst, len);
                        dst = dst.add(len * size);
                    }
                }
                step(&mut at, p.out_spatial);
                continue;
            }
            // SAFETY: taps that lie inside the image are read, the lengths of all runs of a row add up to k.
            unsafe {
                let mut dst = dst.add(i * ld);
                // Positions in the padded image cannot overflow: it was checked to be half an address space at most.
                let corner = |d: usize| (at[d + 1] * p.strides[d]) as isize - p.pads[d] as isize;
                let (top, left) = (corner(1), corner(2));
                for z in 0..kd {
                    let iz = corner(0) + (z * p.dilations[0]) as isize;
                    let plane = iz >= 0 && iz < id as isize;
                    for y in 0..kh {
                        let iy = top + (y * p.dilations[1]) as isize;
                        if !plane || iy < 0 || iy >= ih as isize {
                            convert.fill(dst, kw * p.depth);
                            dst = dst.add(kw * p.depth * size);
                            continue;
                        }
                        let line = ((at[0] * id + iz as usize) * ih + iy as usize) * iw;
                        for run in 0..runs {
                            let ix = left + (run * p.dilations[2]) as isize;
                            // Taps left of the line, and those that end inside it.
                            let before = ix.min(0).unsigned_abs().min(taps);
                            let inside = ((iw as isize - ix).clamp(0, taps as isize) as usize).max(before);
                            if before > 0 {
                                convert.fill(dst, before * p.depth);
                                dst = dst.add(before * p.depth * size);
                            }
                            if inside > before {
                                let pixel = (line as isize + ix + before as isize) as usize;
                                let len = (inside - before) * p.depth;
                                convert.run(s, x.add(pixel * p.channels + p.first), dst, len);
                                dst = dst.add(len * size);
                            }
                            if taps > inside {
                                convert.fill(dst, (taps - inside) * p.depth);
                                dst = dst.add((taps - inside) * p.depth * size);
                            }
                        }
                    }
                }
            }
            step(&mut at, p.out_spatial);
        }
    }
}

/// Runs of a patch whose places are computed once per block.
const MAX_RUNS: usize = 64;

/// A pixel as `[batch, d, h, w]`.
fn place(pixel: usize, [d, h, w]: [usize; 3]) -> [usize; 4] {
    [pixel / w / h / d, pixel / w / h % d, pixel / w % h, pixel % w]
}

/// The next pixel.
#[inline(always)]
fn step(at: &mut [usize; 4], [d, h, w]: [usize; 3]) {
    at[3] += 1;
    if at[3] == w {
        at[3] = 0;
        at[2] += 1;
        if at[2] == h {
            at[2] = 0;
            at[1] += 1;
            if at[1] == d {
                at[1] = 0;
                at[0] += 1;
            }
        }
    }
}
