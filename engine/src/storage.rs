//! Bytes: aligned owned storage, and the arena that a run works in. The only module of this crate with `unsafe` code.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use std::ops::Range;

/// Alignment of every tensor: a cache line, and the widest vector of any instruction set.
pub const ALIGN: usize = 64;

/// Lines that an exact reservation has too many. The allocator of the WebAssembly build (dlmalloc) looks for an aligned
/// block of n bytes as an unaligned one of n + 64 and some more; so weights that are packed, which takes as many bytes
/// again, would never fit into the holes that weights packed before have left. With BERT-base that was 160 MB.
const SPARE: usize = 2;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; ALIGN]);

/// A growable run of bytes that starts on a 64-byte boundary.
#[derive(Clone, Default)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    /// No bytes.
    pub const fn new() -> Self {
        AlignedBytes { lines: Vec::new(), len: 0 }
    }

    /// `len` zero bytes, or an error when memory cannot be had.
    pub fn zeroed(len: usize) -> Result<Self> {
        let mut bytes = AlignedBytes::new();
        bytes.resize(len)?;
        Ok(bytes)
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        let mut own = AlignedBytes::new();
        own.extend_from_slice(bytes)?;
        Ok(own)
    }

    /// Room for `more` bytes beyond [`len`](Self::len), and a little to spare.
    pub fn reserve_exact(&mut self, more: usize) -> Result<()> {
        let want = self.len.checked_add(more).ok_or_else(|| no_memory(usize::MAX))?.div_ceil(ALIGN) + SPARE;
        let missing = want.saturating_sub(self.lines.len());
        self.lines.try_reserve_exact(missing).map_err(|_| no_memory(want.saturating_mul(ALIGN)))
    }

    /// Sets the length; new bytes are zero.
    pub fn resize(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            self.reserve_exact(len - self.len)?;
            let old = self.len;
            let lines = len.div_ceil(ALIGN);
            // Not `Vec::resize`: built for size it is a loop over lines, which in a browser's first compiler took
            // milliseconds for a model.
            // SAFETY: there is room for `lines`, and zeros are a line.
            unsafe {
                let more = lines - self.lines.len();
                self.lines.as_mut_ptr().add(self.lines.len()).write_bytes(0, more);
                self.lines.set_len(lines);
            }
            self.len = len;
            // The tail of the last old line may hold bytes of an earlier, longer content.
            let stale = (old.div_ceil(ALIGN) * ALIGN).min(len);
            self.as_mut()[old..stale].fill(0);
        } else {
            self.lines.truncate(len.div_ceil(ALIGN));
            self.len = len;
        }
        Ok(())
    }

    /// Appends, growing by doubling at most what [`reserve_exact`](Self::reserve_exact) did not foresee.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) -> Result<()> {
        let old = self.len;
        let len = old.checked_add(bytes.len()).ok_or_else(|| no_memory(usize::MAX))?;
        let lines = len.div_ceil(ALIGN);
        self.lines.try_reserve(lines.saturating_sub(self.lines.len())).map_err(|_| no_memory(len))?;
        // SAFETY: there is room for `lines`. All bytes of those that are new are written: the given ones, and zeros.
        unsafe {
            let own = self.lines.as_mut_ptr().cast::<u8>();
            own.add(old).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            own.add(len).write_bytes(0, lines * ALIGN - len);
            self.lines.set_len(lines);
        }
        self.len = len;
        Ok(())
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of bytes up to which it can be resized where it is.
    pub fn capacity(&self) -> usize {
        self.lines.capacity().saturating_sub(SPARE) * ALIGN
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

fn no_memory(bytes: usize) -> Error {
    Error::out_of_memory(format!("{bytes} bytes could not be allocated"))
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `lines` holds at least `len` initialised bytes, and `Line` has no padding.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl AsMut<[u8]> for AlignedBytes {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_ref`; the borrow of self is unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBytes({})", self.len)
    }
}

/// The memory that a run's intermediate values share; the plan says which range holds what and when.
#[derive(Debug, Default)]
pub struct Arena {
    bytes: AlignedBytes,
}

impl Arena {
    /// Makes room for at least `len` bytes; keeps what is there when that is enough.
    pub fn ensure(&mut self, len: usize) -> Result<()> {
        if self.bytes.len() < len {
            // The old content is not needed: free it first, so that both never live side by side.
            self.bytes = AlignedBytes::new();
            self.bytes = AlignedBytes::zeroed(len)?;
        }
        Ok(())
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// One range for reading.
    pub fn get(&self, range: Range<usize>) -> &[u8] {
        &self.bytes.as_ref()[range]
    }

    /// One range for writing.
    pub fn get_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.bytes.as_mut()[range]
    }

    /// Ranges for reading and ranges for writing at the same time, appended to the two lists in order.
    ///
    /// # Errors
    /// If a range leaves the arena, or a written one overlaps another range: a defect of the plan.
    pub fn split<'a>(
        &'a mut self,
        reads: impl Iterator<Item = Range<usize>> + Clone,
        writes: impl Iterator<Item = Range<usize>> + Clone,
        mut on_read: impl FnMut(&'a [u8]),
        mut on_write: impl FnMut(&'a mut [u8]),
    ) -> Result<()> {
        let len = self.bytes.len();
        let overlap = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
        for (i, w) in writes.clone().enumerate() {
            let clash = w.start > w.end
                || w.end > len
                || reads.clone().any(|r| overlap(&w, &r))
                || writes.clone().skip(i + 1).any(|o| overlap(&w, &o));
            if clash {
                return Err(Error::internal(format!("the plan writes bytes {w:?} of the arena while they are in use")));
            }
        }
        if let Some(r) = reads.clone().find(|r| r.start > r.end || r.end > len) {
            return Err(Error::internal(format!("the plan reads bytes {r:?} of an arena of {len}")));
        }
        let base: *mut u8 = self.bytes.as_mut().as_mut_ptr();
        for r in reads {
            // SAFETY: in bounds, and no written range overlaps it (both checked above); `self` stays borrowed for 'a.
            on_read(unsafe { std::slice::from_raw_parts(base.add(r.start), r.len()) });
        }
        for w in writes {
            // SAFETY: in bounds and disjoint from every other range (checked above); `self` stays borrowed for 'a.
            on_write(unsafe { std::slice::from_raw_parts_mut(base.add(w.start), w.len()) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_grow_and_stay_aligned() {
        let mut b = AlignedBytes::new();
        for i in 0..300u32 {
            b.extend_from_slice(&i.to_le_bytes()).unwrap();
        }
        assert_eq!(b.len(), 1200);
        assert_eq!(b.as_ref().as_ptr() as usize % ALIGN, 0);
        assert_eq!(&b.as_ref()[1196..], &299u32.to_le_bytes());
        b.resize(3).unwrap();
        b.resize(70).unwrap();
        assert!(b.as_ref()[3..].iter().all(|&x| x == 0), "bytes of the longer content must not come back");
    }

    #[test]
    fn absurd_sizes_are_errors() {
        assert!(AlignedBytes::zeroed(usize::MAX / 2).is_err());
        assert!(AlignedBytes::new().reserve_exact(usize::MAX).is_err());
    }

    #[test]
    fn split_refuses_overlap() {
        let mut arena = Arena::default();
        arena.ensure(256).unwrap();
        let ok = arena.split([0..64, 0..64].into_iter(), [64..128, 128..192].into_iter(), |_| {}, |w| w.fill(1));
        assert!(ok.is_ok());
        assert_eq!(arena.get(64..192), [1; 128]);
        for (r, w) in [(0..64, 63..70), (0..64, 200..300)] {
            assert!(arena.split([r].into_iter(), [w].into_iter(), |_| {}, |_| {}).is_err());
        }
        assert!(arena.split([].into_iter(), [0..10, 9..12].into_iter(), |_| {}, |_| {}).is_err());
    }
}
