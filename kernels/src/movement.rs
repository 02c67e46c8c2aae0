//! Data movement: elements change their place, never their value, so everything here works on bytes and an element
//! size.
//!
//! Nearly all of it is one primitive, [`copy_strided`]: transposing, slicing (also backwards), concatenating,
//! splitting, padding, tiling and broadcasting differ only in the strides on both sides.
//!
//! ```text
//! drop axes of length 1; order the axes by their stride in the destination; merge neighbours that are one axis
//! if the innermost axis is dense on both sides and 2, 4, 8 or 16 bytes long: it is one wider element
//! for each index of the outer axes (spread over threads):
//!     innermost axis dense on both sides:       copy a run of bytes
//!     some other axis is dense in the source:   transpose a matrix, tile by tile (a tile stays in registers, a
//!                                               column of tiles writes whole cache lines)
//!     otherwise:                                element by element
//! ```

use crate::error::{Error, Result};
use crate::par::{Cx, DisjointMut};

/// Most axes that can be left after merging.
const MAX_AXES: usize = 16;

/// Bytes that make a task worth handing to another thread.
const TASK_BYTES: usize = 32 * 1024;

/// One axis of a copy. Strides count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Number of elements along the axis.
    pub len: usize,
    /// Step in the source; 0 repeats an element, a negative one walks backwards.
    pub src: isize,
    /// Step in the destination.
    pub dst: usize,
}

/// An axis with strides in bytes.
#[derive(Clone, Copy, Default)]
struct ByteAxis {
    len: usize,
    src: isize,
    dst: usize,
}

/// Copies `dst[dst_offset + sum i_a * axes[a].dst] = src[src_offset + sum i_a * axes[a].src]` for all indices.
///
/// `element` is the size of an element in bytes (1, 2, 4, 8 or 16); offsets and strides count elements.
///
/// # Errors
/// If an index would leave a slice, if two indices would write the same element, or if more than 16 axes remain after
/// merging.
pub fn copy_strided(
    cx: &Cx,
    element: usize,
    axes: &[Axis],
    src: &[u8],
    src_offset: usize,
    dst: &mut [u8],
    dst_offset: usize,
) -> Result<()> {
    check_element(element)?;
    if axes.iter().any(|a| a.len == 0) {
        return Ok(());
    }
    let Some((axes, src_start, dst_start)) = byte_axes(element, axes, src.len(), src_offset, dst.len(), dst_offset)?
    else {
        return Err(Error::new(format!(
            "a copy of {axes:?} reaches outside of its {} source or {} destination bytes, or writes one twice",
            src.len(),
            dst.len()
        )));
    };
    let (list, count) = axes;
    let mut axes = &list[..count];
    let mut width = element;
    // A short dense run is a wider element: the rest then moves in fewer and larger steps.
    while let Some((last, outer)) = axes.split_last()
        && last.src == width as isize
        && last.dst == width
        && matches!(width * last.len, 2 | 4 | 8 | 16)
    {
        width *= last.len;
        axes = outer;
    }
    let job = Job {
        // SAFETY: the start offsets were checked against the slices by `byte_axes`.
        src: unsafe { src.as_ptr().add(src_start) },
        // SAFETY: as above.
        dst: unsafe { dst.as_mut_ptr().add(dst_start) },
        axes,
    };
    match width {
        1 => job.run::<u8>(cx),
        2 => job.run::<u16>(cx),
        4 => job.run::<u32>(cx),
        8 => job.run::<u64>(cx),
        _ => job.run::<[u64; 2]>(cx),
    }
    Ok(())
}

fn check_element(element: usize) -> Result<()> {
    match element {
        1 | 2 | 4 | 8 | 16 => Ok(()),
        _ => Err(Error::new(format!("an element of {element} bytes was met; 1, 2, 4, 8 or 16 were wanted"))),
    }
}

type Checked = (([ByteAxis; MAX_AXES], usize), usize, usize);

/// Axes in bytes, ordered and merged, and both start offsets in bytes; `None` when an index leaves a slice or two
/// indices write the same place. All lengths are above 0.
fn byte_axes(
    element: usize,
    axes: &[Axis],
    src_len: usize,
    src_offset: usize,
    dst_len: usize,
    dst_offset: usize,
) -> Result<Option<Checked>> {
    let mut list = [ByteAxis::default(); MAX_AXES];
    let mut count = 0;
    let (Ok(size), Ok(src_len)) = (isize::try_from(element), isize::try_from(src_len)) else { return Ok(None) };
    let bounds = |axes: &[Axis]| -> Option<(usize, usize)> {
        let start = isize::try_from(src_offset).ok()?.checked_mul(size)?;
        let (mut low, mut high) = (start, start.checked_add(size)?);
        let dst_start = dst_offset.checked_mul(element)?;
        let mut dst_high = dst_start.checked_add(element)?;
        for a in axes {
            let steps = isize::try_from(a.len - 1).ok()?;
            let reach = a.src.checked_mul(size)?.checked_mul(steps)?;
            if reach < 0 {
                low = low.checked_add(reach)?;
            } else {
                high = high.checked_add(reach)?;
            }
            dst_high = dst_high.checked_add(a.dst.checked_mul(element)?.checked_mul(a.len - 1)?)?;
        }
        (low >= 0 && high <= src_len && dst_high <= dst_len).then_some((start as usize, dst_start))
    };
    let Some((src_start, dst_start)) = bounds(axes) else { return Ok(None) };
    for a in axes.iter().filter(|a| a.len > 1) {
        let b = ByteAxis { len: a.len, src: a.src * size, dst: a.dst * element };
        // Insertion into descending order of the destination's strides; equal ones keep their order.
        let at = list[..count].iter().position(|l| l.dst < b.dst).unwrap_or(count);
        if at > 0
            && let outer = &mut list[at - 1]
            && outer.dst == b.dst * b.len
            && outer.src == b.src * b.len as isize
        {
            *outer = ByteAxis { len: outer.len * b.len, ..b };
            continue;
        }
        if count == MAX_AXES {
            return Err(Error::new(format!("more than {MAX_AXES} axes to copy along: {axes:?}")));
        }
        list.copy_within(at..count, at + 1);
        list[at] = b;
        count += 1;
    }
    // Merging once more: an axis that came late may be the outer half of its inner neighbour.
    let mut kept = 0;
    for i in 0..count {
        let b = list[i];
        if kept > 0
            && let outer = list[kept - 1]
            && outer.dst == b.dst * b.len
            && outer.src == b.src * b.len as isize
        {
            list[kept - 1] = ByteAxis { len: outer.len * b.len, ..b };
        } else {
            list[kept] = b;
            kept += 1;
        }
    }
    let mut inner = element;
    for b in list[..kept].iter().rev() {
        if b.dst < inner {
            return Ok(None);
        }
        inner = b.dst * b.len;
    }
    Ok(Some(((list, kept), src_start, dst_start)))
}

/// A checked copy: every address that an index of `axes` names lies inside of the slices, and no two indices write
/// the same bytes.
struct Job<'a> {
    src: *const u8,
    dst: *mut u8,
    axes: &'a [ByteAxis],
}

// SAFETY: tasks read the source and write disjoint parts of the destination; both outlive the parallel region.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    fn run<T: Copy>(&self, cx: &Cx) {
        let width = size_of::<T>();
        let Some((inner, outer)) = self.axes.split_last() else {
            // SAFETY: a single element inside of both slices.
            unsafe { copy_element::<T>(self.src, self.dst) };
            return;
        };
        if inner.src == width as isize && inner.dst == width {
            return self.runs(cx, outer, inner.len * width);
        }
        let dense = outer.iter().position(|a| a.src == width as isize);
        if let (Some(p), true) = (dense, inner.dst == width) {
            let mut rest = [ByteAxis::default(); MAX_AXES];
            let mut count = 0;
            for a in outer.iter().enumerate().filter(|(i, _)| *i != p).map(|(_, a)| a) {
                rest[count] = *a;
                count += 1;
            }
            return self.matrices::<T>(cx, &rest[..count], outer[p], *inner);
        }
        let per_task = (TASK_BYTES / (inner.len * width)).max(1);
        self.each(cx, outer, per_task, inner.len, &|src, dst| {
            // SAFETY: the row lies inside of both slices, see the type.
            unsafe { strided_row::<T>(inner.len, src, inner.src, dst, inner.dst) }
        });
    }

    /// Runs of `bytes` bytes, dense on both sides.
    fn runs(&self, cx: &Cx, outer: &[ByteAxis], bytes: usize) {
        if outer.is_empty() {
            let chunk = 8 * TASK_BYTES;
            cx.for_each(bytes.div_ceil(chunk), bytes as u64 / 8, &|t| {
                let job = self;
                let (from, to) = (t * chunk, bytes.min((t + 1) * chunk));
                // SAFETY: the range lies inside of both slices and tasks do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(job.src.add(from), job.dst.add(from), to - from) };
            });
            return;
        }
        let per_task = (4 * TASK_BYTES / bytes).max(1);
        self.each(cx, outer, per_task, bytes / 8 + 8, &|src, dst| {
            // SAFETY: the run lies inside of both slices, see the type.
            unsafe { copy_run(src, dst, bytes) }
        });
    }

    /// Matrices that are transposed: `row` is dense in the source, `col` in the destination.
    fn matrices<T: Copy>(&self, cx: &Cx, outer: &[ByteAxis], row: ByteAxis, col: ByteAxis) {
        // A task takes a band of the matrix that is some cache lines wide in the source.
        let width = size_of::<T>();
        let lines = 64 / width.min(16);
        let band = (TASK_BYTES / (col.len * width)).max(1).next_multiple_of(lines).min(row.len.next_multiple_of(lines));
        let mut axes = [ByteAxis::default(); MAX_AXES];
        axes[..outer.len()].copy_from_slice(outer);
        axes[outer.len()] = ByteAxis { len: row.len.div_ceil(band), src: 0, dst: 0 };
        let axes = &axes[..=outer.len()];
        let bands = row.len.div_ceil(band);
        let tasks: usize = axes.iter().map(|a| a.len).product();
        let per_task = (TASK_BYTES / (band.min(row.len) * col.len * width)).max(1);
        cx.for_each(tasks.div_ceil(per_task), (tasks * band.min(row.len) * col.len) as u64, &|t| {
            let job = self;
            for unit in t * per_task..tasks.min((t + 1) * per_task) {
                let (from, (src, dst)) = (unit % bands * band, offsets(outer, unit / bands));
                let n = band.min(row.len - from);
                // SAFETY: the band lies inside of both slices and no two bands share a byte of the destination.
                unsafe {
                    let src = job.src.offset(src).add(from * width);
                    let dst = job.dst.add(dst + from * row.dst);
                    transpose_band::<T>(n, col.len, src, col.src, dst, row.dst);
                }
            }
        });
    }

    /// Calls `f` with both addresses for every index of `outer`, `per_task` of them to a task; one takes about `cost`
    /// operations.
    fn each(&self, cx: &Cx, outer: &[ByteAxis], per_task: usize, cost: usize, f: &(dyn Fn(*const u8, *mut u8) + Sync)) {
        let total: usize = outer.iter().map(|a| a.len).product();
        cx.for_each(total.div_ceil(per_task), (total * cost) as u64, &|t| {
            let job = self;
            let (from, to) = (t * per_task, total.min((t + 1) * per_task));
            let mut index = [0usize; MAX_AXES];
            let mut rest = from;
            for (i, a) in outer.iter().enumerate().rev() {
                index[i] = rest % a.len;
                rest /= a.len;
            }
            let (mut src, mut dst) = offsets(outer, from);
            for _ in from..to {
                // SAFETY: offsets of an index of the checked axes.
                unsafe { f(job.src.offset(src), job.dst.add(dst)) };
                for (i, a) in outer.iter().enumerate().rev() {
                    index[i] += 1;
                    src += a.src;
                    dst += a.dst;
                    if index[i] < a.len {
                        break;
                    }
                    index[i] = 0;
                    src -= a.src * a.len as isize;
                    dst -= a.dst * a.len;
                }
            }
        });
    }
}

/// Byte offsets of the `unit`-th index of the axes, the last one running fastest.
fn offsets(axes: &[ByteAxis], mut unit: usize) -> (isize, usize) {
    let (mut src, mut dst) = (0isize, 0usize);
    for a in axes.iter().rev() {
        let i = unit % a.len;
        unit /= a.len;
        src += a.src * i as isize;
        dst += a.dst * i;
    }
    (src, dst)
}

/// # Safety
/// `src` must be readable and `dst` writable for the size of `T`.
#[inline(always)]
unsafe fn copy_element<T: Copy>(src: *const u8, dst: *mut u8) {
    // SAFETY: as the caller promises; no alignment is assumed.
    unsafe { dst.cast::<T>().write_unaligned(src.cast::<T>().read_unaligned()) }
}

/// Copies `bytes` bytes. Short runs are copied here: on WebAssembly the instruction for copies is a call of the engine,
/// which takes longer than they do.
///
/// # Safety
/// They must be readable at `src` and writable at `dst`, and the two must not overlap.
#[inline(always)]
unsafe fn copy_run(src: *const u8, dst: *mut u8, bytes: usize) {
    /// Bytes of a vector.
    const VECTOR: usize = 16;
    type Vector = [u64; 2];
    // SAFETY: as the caller promises; the last vector overlaps the one before.
    unsafe {
        if !(VECTOR..=2048).contains(&bytes) {
            std::ptr::copy_nonoverlapping(src, dst, bytes);
            return;
        }
        let mut at = 0;
        while at + 2 * VECTOR <= bytes {
            copy_element::<[Vector; 2]>(src.add(at), dst.add(at));
            at += 2 * VECTOR;
        }
        if at + VECTOR <= bytes {
            copy_element::<Vector>(src.add(at), dst.add(at));
        }
        copy_element::<Vector>(src.add(bytes - VECTOR), dst.add(bytes - VECTOR));
    }
}

/// # Safety
/// `n` elements at both addresses and strides (in bytes) must be readable and writable.
unsafe fn strided_row<T: Copy>(n: usize, src: *const u8, src_step: isize, dst: *mut u8, dst_step: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        if src_step == 0 {
            let value = src.cast::<T>().read_unaligned();
            for i in 0..n {
                dst.add(i * dst_step).cast::<T>().write_unaligned(value);
            }
            return;
        }
        for i in 0..n {
            copy_element::<T>(src.offset(i as isize * src_step), dst.add(i * dst_step));
        }
    }
}

/// `dst[i][j] = src[j][i]` for `i < m`, `j < n`; rows of the source are `src_step` bytes apart, rows of the
/// destination `dst_step`.
///
/// # Safety
/// All those elements must be readable and writable.
unsafe fn transpose_band<T: Copy>(m: usize, n: usize, src: *const u8, src_step: isize, dst: *mut u8, dst_step: usize) {
    let width = size_of::<T>();
    // The tile that compilers turn into shuffles of vector registers.
    let side = if width <= 2 { 8 } else { 4 };
    let line = 64 / width.min(16);
    // SAFETY: indices stay below m and n, which the caller promises to be in bounds.
    unsafe {
        for i0 in (0..m).step_by(line) {
            let i1 = m.min(i0 + line);
            let mut j = 0;
            while j + side <= n {
                let mut i = i0;
                while i + side <= i1 {
                    let (s, d) = (src.offset(j as isize * src_step).add(i * width), dst.add(i * dst_step + j * width));
                    if width <= 2 {
                        tile::<T, 8>(s, src_step, d, dst_step);
                    } else {
                        tile::<T, 4>(s, src_step, d, dst_step);
                    }
                    i += side;
                }
                for i in i..i1 {
                    for k in j..j + side {
                        let from = src.offset(k as isize * src_step).add(i * width);
                        copy_element::<T>(from, dst.add(i * dst_step + k * width));
                    }
                }
                j += side;
            }
            for i in i0..i1 {
                for k in j..n {
                    let from = src.offset(k as isize * src_step).add(i * width);
                    copy_element::<T>(from, dst.add(i * dst_step + k * width));
                }
            }
        }
    }
}

/// # Safety
/// `B` rows of `B` elements must be readable and writable.
#[inline(always)]
unsafe fn tile<T: Copy, const B: usize>(src: *const u8, src_step: isize, dst: *mut u8, dst_step: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        let rows: [[T; B]; B] =
            std::array::from_fn(|j| src.offset(j as isize * src_step).cast::<[T; B]>().read_unaligned());
        // An index, not an iterator: the compiler turns this form into register shuffles.
        #[allow(clippy::needless_range_loop)]
        for i in 0..B {
            let column: [T; B] = std::array::from_fn(|j| rows[j][i]);
            dst.add(i * dst_step).cast::<[T; B]>().write_unaligned(column);
        }
    }
}

/// Transposes: axis `a` of `y` is axis `perm[a]` of `x`, which has the shape `dims`.
///
/// # Errors
/// If `perm` is not a permutation of the axes, or the slices do not fit the shape.
pub fn transpose(cx: &Cx, element: usize, dims: &[usize], perm: &[usize], x: &[u8], y: &mut [u8]) -> Result<()> {
    let rank = dims.len();
    let valid = perm.len() == rank && (0..rank).all(|a| perm.contains(&a));
    let bytes = dims.iter().try_fold(element, |n, &d| n.checked_mul(d));
    if !valid || bytes != Some(x.len()) || x.len() != y.len() {
        return Err(Error::new(format!(
            "a transpose of shape {dims:?} by {perm:?}, {} to {} bytes, is not possible",
            x.len(),
            y.len()
        )));
    }
    let mut buffer = [Axis { len: 1, src: 0, dst: 0 }; 32];
    let Some(axes) = buffer.get_mut(..rank) else {
        return Err(Error::new(format!("a transpose of rank {rank}; at most 32 is possible")));
    };
    for (axis, &p) in axes.iter_mut().zip(perm) {
        *axis = Axis { len: dims[p], src: dims[p + 1..].iter().product::<usize>() as isize, dst: 0 };
    }
    let mut stride = 1;
    for axis in axes.iter_mut().rev() {
        axis.dst = stride;
        stride *= axis.len;
    }
    copy_strided(cx, element, axes, x, 0, y, 0)
}

/// Sets every element of `y` to the bytes of `value`.
///
/// # Errors
/// If `y` is not a whole number of elements.
pub fn fill(cx: &Cx, value: &[u8], y: &mut [u8]) -> Result<()> {
    check_element(value.len())?;
    if !y.len().is_multiple_of(value.len()) {
        return Err(Error::new(format!("{} bytes are no whole number of {}-byte elements", y.len(), value.len())));
    }
    if value.iter().all(|b| *b == value[0]) {
        y.fill(value[0]);
        return Ok(());
    }
    let len = y.len() / value.len();
    copy_strided(cx, value.len(), &[Axis { len, src: 0, dst: 1 }], value, 0, y, 0)
}

/// `y[o, k, ..] = x[o, indices[k], ..]` for blocks of `block` bytes: `x` is `[outer, axis, block]` and `y` is
/// `[outer, indices.len(), block]`. Negative indices count from the end.
///
/// # Errors
/// Names the first index outside of `-axis..axis`, and slices that do not fit.
pub fn gather<I: Copy + Into<i64> + Sync>(
    cx: &Cx,
    outer: usize,
    axis: usize,
    block: usize,
    x: &[u8],
    indices: &[I],
    y: &mut [u8],
) -> Result<()> {
    let n = indices.len();
    let size = |count: usize| outer.checked_mul(count)?.checked_mul(block);
    if size(axis) != Some(x.len()) || size(n) != Some(y.len()) {
        return Err(Error::new(format!(
            "a gather of {n} of {axis} blocks of {block} bytes, {outer} times, from {} to {} bytes is not possible",
            x.len(),
            y.len()
        )));
    }
    if let Some(bad) = indices.iter().map(|&i| i.into()).find(|&i| normalize(i, axis).is_none()) {
        return Err(out_of_range(bad, axis));
    }
    if y.is_empty() {
        return Ok(());
    }
    let total = outer * n;
    let per_task = (4 * TASK_BYTES / block).max(1);
    let out = DisjointMut::new(y);
    cx.for_each(total.div_ceil(per_task), (total * (block / 8 + 8)) as u64, &|t| {
        for unit in t * per_task..total.min((t + 1) * per_task) {
            let (o, k) = (unit / n, unit % n);
            let at = normalize(indices[k].into(), axis).unwrap_or(0);
            let from = &x[(o * axis + at) * block..][..block];
            // SAFETY: tasks write different units.
            copy_block(from, unsafe { out.range(unit * block, block) });
        }
    });
    Ok(())
}

/// Copies a block to one of its length. The sizes of single elements avoid the call of memcpy.
#[inline(always)]
pub fn copy_block(from: &[u8], to: &mut [u8]) {
    fn sized<const N: usize>(from: &[u8], to: &mut [u8]) -> Option<()> {
        *<&mut [u8; N]>::try_from(to).ok()? = *<&[u8; N]>::try_from(from).ok()?;
        Some(())
    }
    let done = match from.len() {
        1 => sized::<1>(from, to),
        4 => sized::<4>(from, to),
        8 => sized::<8>(from, to),
        _ => None,
    };
    if done.is_none() {
        to.copy_from_slice(from);
    }
}

/// An index in `-len..len` as one in `0..len`.
#[inline(always)]
pub fn normalize(index: i64, len: usize) -> Option<usize> {
    let at = if index < 0 { index.checked_add(i64::try_from(len).ok()?)? } else { index };
    usize::try_from(at).ok().filter(|&a| a < len)
}

/// The error of an index that [`normalize`] refused.
pub fn out_of_range(index: i64, len: usize) -> Error {
    Error::new(format!("index {index} into an axis of length {len}; -{len}..{len} was wanted"))
}

/// Marks a place of the result that gets the fill value in [`take`].
pub const FILL: usize = usize::MAX;

/// `y[i, j, ..] = x[maps[0][i], maps[1][j], ..]`, or `value` where a map says [`FILL`]: padding of every kind.
///
/// `x` has the shape `dims`; `y` has as many elements along each axis as the map has entries.
///
/// # Errors
/// If a map leads outside of `x`, or the slices do not fit.
pub fn take(cx: &Cx, dims: &[usize], maps: &[Vec<usize>], x: &[u8], value: &[u8], y: &mut [u8]) -> Result<()> {
    let element = value.len();
    check_element(element)?;
    let count = maps.iter().try_fold(element, |n, m| n.checked_mul(m.len()));
    let source = dims.iter().try_fold(element, |n, &d| n.checked_mul(d));
    let inside = maps.iter().zip(dims).all(|(m, &d)| m.iter().all(|&i| i < d || i == FILL));
    if maps.len() != dims.len() || !inside || count != Some(y.len()) || source != Some(x.len()) {
        return Err(Error::new(format!("maps into a shape of {dims:?} lead outside of it or do not fit the result")));
    }
    if y.is_empty() {
        return Ok(());
    }
    let Some((inner, outer)) = maps.split_last() else {
        y.copy_from_slice(x);
        return Ok(());
    };
    let row = inner.len() * element;
    let rows = y.len() / row;
    let per_task = (TASK_BYTES / row).max(1);
    // Padding leaves the middle of a row as it is: one copy, where a copy per element is a call each.
    let run = longest_run(inner);
    let out = DisjointMut::new(y);
    cx.for_each(rows.div_ceil(per_task), (rows * inner.len() * 4) as u64, &|t| {
        for r in t * per_task..rows.min((t + 1) * per_task) {
            // SAFETY: tasks write different rows.
            let to = unsafe { out.range(r * row, row) };
            let mut from = Some(0);
            let (mut rest, mut stride) = (r, dims.last().copied().unwrap_or(1) * element);
            for (map, d) in outer.iter().zip(dims).rev() {
                let at = map[rest % map.len()];
                from = from.filter(|_| at != FILL).map(|f| f + at * stride);
                rest /= map.len();
                stride *= d;
            }
            let one_by_one = |to: &mut [u8], map: &[usize]| {
                for (to, &at) in to.chunks_exact_mut(element).zip(map) {
                    match from {
                        Some(f) if at != FILL => to.copy_from_slice(&x[f + at * element..][..element]),
                        _ => to.copy_from_slice(value),
                    }
                }
            };
            match from {
                Some(f) if !run.is_empty() => {
                    let bytes = run.start * element..run.end * element;
                    one_by_one(&mut to[..bytes.start], &inner[..run.start]);
                    to[bytes.clone()].copy_from_slice(&x[f + inner[run.start] * element..][..bytes.len()]);
                    one_by_one(&mut to[bytes.end..], &inner[run.end..]);
                }
                _ => one_by_one(to, inner),
            }
        }
    });
    Ok(())
}

/// The longest part of a map in which each place follows the one before; empty when all places get the fill value.
fn longest_run(map: &[usize]) -> core::ops::Range<usize> {
    let mut longest = 0..0;
    let mut start = 0;
    for i in 0..map.len() {
        if map[i] == FILL {
            start = i + 1;
            continue;
        }
        if i > start && map[i] != map[i - 1] + 1 {
            start = i;
        }
        if i + 1 - start > longest.len() {
            longest = start..i + 1;
        }
    }
    longest
}

/// `y = if condition { a } else { b }` with broadcasting. Strides count elements along the axes of `dims`, the shape
/// of `y`; 0 broadcasts.
///
/// # Errors
/// If the strides lead outside of an operand, or `y` does not fit `dims`.
pub fn select(
    cx: &Cx,
    element: usize,
    dims: &[usize],
    condition: (&[u8], &[usize]),
    a: (&[u8], &[usize]),
    b: (&[u8], &[usize]),
    y: &mut [u8],
) -> Result<()> {
    check_element(element)?;
    let fits = |(data, strides): (&[u8], &[usize]), size: usize| -> bool {
        let reach = dims.iter().zip(strides).try_fold(1usize, |n, (&d, &s)| n.checked_add((d - 1).checked_mul(s)?));
        strides.len() == dims.len() && reach.and_then(|r| r.checked_mul(size)).is_some_and(|r| r <= data.len())
    };
    let total = dims.iter().try_fold(element, |n, &d| n.checked_mul(d));
    if total == Some(0) && y.is_empty() {
        return Ok(());
    }
    if total != Some(y.len()) || !fits(condition, 1) || !fits(a, element) || !fits(b, element) {
        return Err(Error::new(format!("operands of a selection do not fit the shape {dims:?}")));
    }
    match element {
        1 => select_typed::<u8>(cx, dims, condition, a, b, y),
        2 => select_typed::<u16>(cx, dims, condition, a, b, y),
        4 => select_typed::<u32>(cx, dims, condition, a, b, y),
        8 => select_typed::<u64>(cx, dims, condition, a, b, y),
        _ => select_typed::<[u64; 2]>(cx, dims, condition, a, b, y),
    }
    Ok(())
}

/// The checked part of [`select`].
fn select_typed<T: Copy>(
    cx: &Cx,
    dims: &[usize],
    condition: (&[u8], &[usize]),
    a: (&[u8], &[usize]),
    b: (&[u8], &[usize]),
    y: &mut [u8],
) {
    let element = size_of::<T>();
    let inner = dims.last().copied().unwrap_or(1);
    let outer = &dims[..dims.len().saturating_sub(1)];
    let step = |s: &[usize]| s.last().copied().unwrap_or(0);
    let (cs, xs, ys) = (step(condition.1), step(a.1), step(b.1));
    let rows = y.len() / element / inner;
    let per_task = (TASK_BYTES / (inner * element)).max(1);
    let out = DisjointMut::new(y);
    cx.for_each(rows.div_ceil(per_task), (rows * inner * 2) as u64, &|t| {
        for r in t * per_task..rows.min((t + 1) * per_task) {
            let (mut rest, mut c0, mut a0, mut b0) = (r, 0, 0, 0);
            for (i, &d) in outer.iter().enumerate().rev() {
                let at = rest % d;
                rest /= d;
                c0 += at * condition.1[i];
                a0 += at * a.1[i];
                b0 += at * b.1[i];
            }
            // SAFETY: `select` checked that all offsets stay inside of the slices; rows of `y` are disjoint.
            unsafe {
                let (c, x, z) = (
                    condition.0.as_ptr().add(c0),
                    a.0.as_ptr().add(a0 * element).cast::<T>(),
                    b.0.as_ptr().add(b0 * element).cast::<T>(),
                );
                let y = out.as_mut_ptr().add(r * inner * element).cast::<T>();
                for i in 0..inner {
                    let (p, q) = (x.add(i * xs).read_unaligned(), z.add(i * ys).read_unaligned());
                    y.add(i).write_unaligned(if *c.add(i * cs) != 0 { p } else { q });
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::movement as reference;
    use crate::testing::each_context;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    #[test]
    fn transposes_of_every_element_size() {
        let shapes: &[&[usize]] = &[
            &[],
            &[5],
            &[0, 3],
            &[1, 1],
            &[7, 9],
            &[4, 8],
            &[16, 33],
            &[130, 67],
            &[2, 3, 4],
            &[1, 3, 20, 18],
            &[2, 17, 5, 6],
            &[2, 3, 2, 3, 2],
            &[3, 1, 4, 2],
        ];
        each_context(|cx| {
            for dims in shapes {
                for perm in permutations(dims.len()) {
                    for element in [1, 2, 4, 8, 16] {
                        let x = bytes(dims.iter().product::<usize>() * element);
                        let mut y = vec![0xEE; x.len()];
                        transpose(cx, element, dims, &perm, &x, &mut y).unwrap();
                        assert_eq!(y, reference::transpose(element, dims, &perm, &x), "{dims:?} {perm:?} {element}");
                    }
                }
            }
        });
    }

    fn permutations(n: usize) -> Vec<Vec<usize>> {
        if n == 0 {
            return vec![vec![]];
        }
        let shorter = permutations(n - 1);
        shorter
            .iter()
            .flat_map(|p| {
                (0..n).map(|i| {
                    let mut p = p.clone();
                    p.insert(i, n - 1);
                    p
                })
            })
            .collect()
    }

    #[test]
    fn runs_of_every_length_stay_inside() {
        each_context(|cx| {
            for len in (1..70).chain([2047, 2048, 2049]) {
                let (rows, gap) = (3, 5);
                let x = bytes(rows * len);
                let mut y = vec![0xEE; rows * (len + gap)];
                let axes = [Axis { len: rows, src: len as isize, dst: len + gap }, Axis { len, src: 1, dst: 1 }];
                copy_strided(cx, 1, &axes, &x, 0, &mut y, 0).unwrap();
                for (x, y) in x.chunks(len).zip(y.chunks(len + gap)) {
                    assert_eq!((&y[..len], &y[len..]), (x, &[0xEE; 5][..]), "{len} bytes");
                }
            }
        });
    }

    #[test]
    fn large_transposes_are_cut_into_tasks() {
        each_context(|cx| {
            let long = (vec![1, 9, 40_000], vec![0, 2, 1]);
            for (dims, perm) in [(vec![3, 300, 257], vec![2, 0, 1]), (vec![2, 65, 66, 67], vec![0, 2, 3, 1]), long] {
                let x = bytes(dims.iter().product::<usize>() * 4);
                let mut y = vec![0; x.len()];
                transpose(cx, 4, &dims, &perm, &x, &mut y).unwrap();
                assert!(y == reference::transpose(4, &dims, &perm, &x), "{dims:?}");
            }
        });
    }

    #[test]
    fn copies_with_any_strides() {
        let axis = |len, src, dst| Axis { len, src, dst };
        let cases: Vec<(Vec<Axis>, usize, usize)> = vec![
            (vec![axis(5, -1, 1)], 4, 0),
            (vec![axis(3, -8, 10), axis(4, 2, 1)], 20, 3),
            (vec![axis(3, 0, 4), axis(4, 1, 1)], 2, 0),
            (vec![axis(3, 1, 4), axis(4, 0, 1)], 2, 0),
            (vec![axis(3, 2, 40), axis(6, 6, 2), axis(2, 1, 1)], 0, 1),
            (vec![axis(2, 1, 1), axis(50, 2, 2)], 0, 0),
            (vec![axis(0, 1, 1)], 99, 0),
        ];
        each_context(|cx| {
            for (axes, from, to) in &cases {
                for element in [1, 2, 4, 8] {
                    let x = bytes(120 * element);
                    let (mut y, mut want) = (vec![1; 130 * element], vec![1; 130 * element]);
                    copy_strided(cx, element, axes, &x, *from, &mut y, *to).unwrap();
                    reference::copy_strided(element, axes, &x, *from, &mut want, *to);
                    assert_eq!(y, want, "{axes:?} {element}");
                }
            }
        });
    }

    #[test]
    fn what_leaves_a_slice_is_refused() {
        let axis = |len, src, dst| Axis { len, src, dst };
        each_context(|cx| {
            let x = bytes(40);
            let mut y = vec![0; 40];
            let mut copy = |axes: &[Axis], from, to| copy_strided(cx, 4, axes, &x, from, &mut y, to);
            assert!(copy(&[axis(10, 1, 1)], 0, 0).is_ok());
            assert!(copy(&[axis(11, 1, 1)], 0, 0).is_err());
            assert!(copy(&[axis(10, 1, 1)], 1, 0).is_err());
            assert!(copy(&[axis(10, 1, 1)], 0, 1).is_err());
            assert!(copy(&[axis(10, -1, 1)], 8, 0).is_err());
            assert!(copy(&[axis(2, isize::MAX, 1)], 0, 0).is_err());
            assert!(copy(&[axis(2, 1, usize::MAX)], 0, 0).is_err());
            assert!(copy(&[axis(2, 1, 0)], 0, 0).is_err(), "writes an element twice");
            assert!(copy(&[axis(3, 1, 2), axis(4, 1, 1)], 0, 0).is_err(), "rows overlap");
        });
    }

    #[test]
    fn gathers_and_takes() {
        each_context(|cx| {
            for block in [1, 3, 4, 8, 40] {
                let x = bytes(2 * 5 * block);
                let mut y = vec![0; 2 * 3 * block];
                gather(cx, 2, 5, block, &x, &[4i64, -5, 2], &mut y).unwrap();
                assert_eq!(y, reference::gather(2, 5, block, &x, &[4, 0, 2]));
                let e = gather(cx, 2, 5, block, &x, &[4i64, 5, 2], &mut y).unwrap_err();
                assert!(e.to_string().contains("index 5"), "{e}");
                assert!(gather(cx, 2, 5, block, &x, &[i64::MIN; 3], &mut y).is_err());
            }
            let x = [1u8, 2, 3, 4, 5, 6];
            let mut y = [0; 12];
            let maps = [vec![1, FILL, 0], vec![2, 2, FILL, 0]];
            take(cx, &[2, 3], &maps, &x, &[9], &mut y).unwrap();
            assert_eq!(y, [6, 6, 9, 4, 9, 9, 9, 9, 3, 3, 9, 1]);
            assert!(take(cx, &[2, 2], &maps, &x[..4], &[9], &mut y).is_err());

            // Runs at the begin, in the middle, at the end, as long as another one, of one place, and none.
            let inners: [&[usize]; 8] = [
                &[0, 1, 2, 3, 4],
                &[2, 1, 0, 1, 2, 3, 4, 3],
                &[FILL, 0, 1, 2],
                &[3, 4, FILL, 0, 1, 2, FILL],
                &[0, 1, 3, 4],
                &[4, 3, 2],
                &[FILL, FILL],
                &[1],
            ];
            for (inner, element) in inners.into_iter().flat_map(|inner| [1, 4, 8].map(|e| (inner, e))) {
                let (x, value) = (bytes(3 * 5 * element), vec![200; element]);
                let outer = [2, FILL, 0, 1];
                let mut y = vec![0; outer.len() * inner.len() * element];
                take(cx, &[3, 5], &[outer.to_vec(), inner.to_vec()], &x, &value, &mut y).unwrap();
                let places = outer.iter().flat_map(|&i| inner.iter().map(move |&j| (i, j)));
                let want: Vec<u8> = places
                    .flat_map(|(i, j)| match i == FILL || j == FILL {
                        true => value.clone(),
                        false => x[(i * 5 + j) * element..][..element].to_vec(),
                    })
                    .collect();
                assert_eq!(y, want, "{inner:?}");
            }
        });
    }

    #[test]
    fn selections_broadcast() {
        each_context(|cx| {
            let (c, a, b) = ([1u8, 0, 1], [1u8, 0, 2, 0], [7u8, 0, 8, 0, 9, 0]);
            let mut y = [0; 12];
            // A row of conditions, a column of two-byte values, a row of two-byte values.
            select(cx, 2, &[2, 3], (&c, &[0, 1]), (&a, &[1, 0]), (&b, &[0, 1]), &mut y).unwrap();
            assert_eq!(y, [1, 0, 8, 0, 1, 0, 2, 0, 8, 0, 2, 0]);
            assert!(select(cx, 2, &[2, 3], (&c, &[1, 1]), (&a, &[1, 0]), (&b, &[0, 1]), &mut y).is_err());
            let mut y = [0; 12];
            fill(cx, &[1, 2, 3, 4], &mut y).unwrap();
            assert_eq!(y, [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]);
        });
    }
}
