//! Linear quantisation, `x = (q - zero_point) scale`, and products of quantised numbers with exact 32-bit sums.

use crate::error::{Error, Result};
use crate::int8::{Bytes, BytesMut, load_bytes, store_bytes};
use crate::naive::{self, Number};
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};

/// Elements that make a task.
const TASK: usize = 16 * 1024;

/// Which scale and zero point belong to which element: the tensor is `[outer, n, inner]`, and `block` neighbours along
/// its middle axis share theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Product of the sizes before the axis.
    pub outer: usize,
    /// Length of the axis.
    pub n: usize,
    /// Product of the sizes behind the axis.
    pub inner: usize,
    /// How scales are shared.
    pub sharing: Sharing,
}

/// How scales are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// One for all.
    Tensor,
    /// One for each index of the axis.
    Axis,
    /// One for each `block` of the axis and each index of the other axes.
    Block(usize),
}

impl Grid {
    /// How many scales there are; `None` when sizes overflow.
    pub fn scales(&self) -> Option<usize> {
        match self.sharing {
            Sharing::Tensor => Some(1),
            Sharing::Axis => Some(self.n),
            Sharing::Block(block) => self.outer.checked_mul(self.n.div_ceil(block.max(1)))?.checked_mul(self.inner),
        }
    }

    fn check(&self, elements: [usize; 2], scales: usize, zeros: Option<usize>) -> Result<()> {
        let count = self.outer.checked_mul(self.n).and_then(|n| n.checked_mul(self.inner));
        let fits = self.sharing != Sharing::Block(0)
            && elements.iter().all(|&e| Some(e) == count)
            && self.scales() == Some(scales)
            && zeros.is_none_or(|z| z == scales);
        if fits {
            Ok(())
        } else {
            Err(Error::new(format!("{scales} scales do not fit {elements:?} elements of {self:?}")))
        }
    }

    /// Length of the runs that [`Grid::scale_of`] speaks of.
    fn run(&self) -> usize {
        match self.sharing {
            Sharing::Tensor => TASK,
            Sharing::Axis => self.inner,
            Sharing::Block(block) if self.inner == 1 && self.n.is_multiple_of(block) => block,
            Sharing::Block(_) => 1,
        }
    }

    /// Length of runs whose elements have a scale each, one after the other, if there are some.
    fn line(&self) -> Option<usize> {
        match self.sharing {
            Sharing::Axis if self.inner == 1 => Some(self.n),
            Sharing::Block(_) if self.inner > 1 => Some(self.inner),
            _ => None,
        }
    }

    /// The scale of the elements that start at `i`, a multiple of the run's length.
    fn scale_of(&self, i: usize) -> usize {
        match self.sharing {
            Sharing::Tensor => 0,
            Sharing::Axis => i / self.inner % self.n,
            Sharing::Block(block) => {
                let (o, k, j) = (i / self.inner / self.n, i / self.inner % self.n, i % self.inner);
                (o * self.n.div_ceil(block) + k / block) * self.inner + j
            }
        }
    }
}

/// `y = saturate(round(x / scale) + zero)`, halves to even, within `lo` and `hi`.
///
/// # Errors
/// If the slices do not fit the grid.
pub fn quantize<T: Number>(
    cx: &Cx,
    x: &[f32],
    grid: &Grid,
    scale: &[f32],
    zero: Option<&[T]>,
    [lo, hi]: [f32; 2],
    y: &mut [T],
) -> Result<()> {
    grid.check([x.len(), y.len()], scale.len(), zero.map(<[T]>::len))?;
    if x.is_empty() {
        return Ok(());
    }
    let run = grid.run();
    let runs = x.len().div_ceil(run);
    let per_task = (TASK / run).max(1);
    let out = DisjointMut::new(y);
    cx.for_each(runs.div_ceil(per_task), 8 * x.len() as u64, &|task| {
        if T::BYTE.is_some() {
            for r in task * per_task..runs.min((task + 1) * per_task) {
                let (from, to) = (r * run, x.len().min((r + 1) * run));
                let at = grid.scale_of(from);
                let (scale, zero) = (scale[at], zero.map_or(0.0, |z| z[at].to_f64() as f32));
                // SAFETY: tasks write different runs.
                let y = unsafe { out.range(from, to - from) };
                dispatch(cx.isa(), ToBytes { x: &x[from..to], scale, zero, lo, hi, y: bytes_mut(y) });
            }
            return;
        }
        // A run may be longer than what fits beside it on the stack.
        let mut rounded = [0.0; 256];
        for r in task * per_task..runs.min((task + 1) * per_task) {
            let (from, to) = (r * run, x.len().min((r + 1) * run));
            let at = grid.scale_of(from);
            let (scale, zero) = (scale[at], zero.map_or(0.0, |z| z[at].to_f64() as f32));
            // SAFETY: tasks write different runs.
            let y = unsafe { out.range(from, to - from) };
            for (x, y) in x[from..to].chunks(256).zip(y.chunks_mut(256)) {
                let rounded = &mut rounded[..x.len()];
                dispatch(cx.isa(), Round { x, scale, zero, lo, hi, y: rounded });
                y.iter_mut().zip(rounded).for_each(|(y, v)| *y = T::from_f64(f64::from(*v)));
            }
        }
    });
    Ok(())
}

/// A slice whose elements are bytes.
fn bytes_mut<T: Number>(y: &mut [T]) -> BytesMut<'_> {
    let (p, len) = (y.as_mut_ptr(), y.len());
    // SAFETY: `BYTE` tells which type `T` is, for a slice of which this is another name.
    unsafe {
        match T::BYTE {
            Some(false) => BytesMut::U8(core::slice::from_raw_parts_mut(p.cast(), len)),
            Some(true) => BytesMut::I8(core::slice::from_raw_parts_mut(p.cast(), len)),
            None => unreachable!("not bytes"),
        }
    }
}

/// As [`bytes_mut`], if they are bytes.
fn bytes<T: Number>(x: &[T]) -> Option<Bytes<'_>> {
    let (p, len) = (x.as_ptr(), x.len());
    // SAFETY: as above.
    unsafe {
        match T::BYTE? {
            false => Some(Bytes::U8(core::slice::from_raw_parts(p.cast(), len))),
            true => Some(Bytes::I8(core::slice::from_raw_parts(p.cast(), len))),
        }
    }
}

/// [`quantize`] with one scale; NaN becomes 0.
pub(crate) struct ToBytes<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) scale: f32,
    pub(crate) zero: f32,
    pub(crate) lo: f32,
    pub(crate) hi: f32,
    pub(crate) y: BytesMut<'a>,
}

impl Kernel for ToBytes<'_> {
    type Output = ();
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { x, scale, zero, lo, hi, mut y } = self;
        assert!(x.len() == y.len());
        let (signed, to) = y.raw();
        let [least, largest] = if signed { [-128.0, 127.0] } else { [0.0, 255.0] };
        // As a conversion to the type saturates.
        let (lo, hi) = (s.splat(f32::clamp(lo, least, largest)), s.splat(f32::clamp(hi, least, largest)));
        let (scale, zero) = (s.splat(scale), s.splat(zero));
        // The integers from 0 to 2^22 as the low bits of a float.
        let offset = s.splat(12_582_912.0);
        let mut at = 0;
        while at < x.len() {
            let cols = (2 * S::LANES).min(x.len() - at);
            let part = &x[at..at + cols];
            let v = if cols == 2 * S::LANES {
                [s.load(part), s.load(&part[S::LANES..])]
            } else {
                let (low, high) = part.split_at(cols.min(S::LANES));
                [s.load_partial(low), s.load_partial(high)]
            };
            let mut q = [s.splat_i32(0); 2];
            for (q, v) in q.iter_mut().zip(v) {
                // A true division: the product with the reciprocal would round some halves the other way.
                let v = s.add(s.round(s.div(v, scale)), zero);
                let v = s.at_most(s.at_least(v, lo), hi);
                let v = s.select(s.eq(v, v), v, s.splat(0.0));
                *q = s.sub_i32(s.bits(s.add(v, offset)), s.bits(offset));
            }
            // SAFETY: `cols` more bytes are there.
            unsafe { store_bytes(s, to.add(at), q, cols, signed) };
            at += cols;
        }
    }
}

/// [`dequantize`] with one scale.
struct FromBytes<'a> {
    x: Bytes<'a>,
    scale: f32,
    zero: i32,
    y: &'a mut [f32],
}

impl Kernel for FromBytes<'_> {
    type Output = ();
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Self { x, scale, zero, y } = self;
        assert!(x.len() == y.len());
        let (scale, zero) = (s.splat(scale), s.splat_i32(zero));
        for (i, y) in y.chunks_mut(2 * S::LANES).enumerate() {
            // SAFETY: as many elements as y has there.
            let v = unsafe { load_bytes(s, &x, i * 2 * S::LANES, y.len()) };
            let v = [s.mul(s.to_f32(s.sub_i32(v[0], zero)), scale), s.mul(s.to_f32(s.sub_i32(v[1], zero)), scale)];
            let (low, high) = y.split_at_mut(S::LANES.min(y.len()));
            s.store_partial(low, v[0]);
            s.store_partial(high, v[1]);
        }
    }
}

/// The least and the largest of 0 and of the elements that are numbers.
pub fn range(cx: &Cx, x: &[f32]) -> [f32; 2] {
    // The cut depends on the size alone, and minimum and maximum do not depend on the order.
    const PARTS: usize = 64;
    let mut ranges = [[0.0; 2]; PARTS];
    let parts = x.len().div_ceil(TASK).clamp(1, PARTS);
    let out = DisjointMut::new(&mut ranges);
    cx.for_each(parts, x.len() as u64, &|task| {
        let part = crate::gemm::part(x.len(), parts, task);
        // SAFETY: each task has its own element.
        let own = unsafe { out.range(task, 1) };
        own[0] = dispatch(cx.isa(), Range(&x[part]));
    });
    ranges.iter().fold([0.0; 2], |all, r| [all[0].min(r[0]), all[1].max(r[1])])
}

struct Range<'a>(&'a [f32]);

impl Kernel for Range<'_> {
    type Output = [f32; 2];
    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) -> [f32; 2] {
        let [mut lo, mut hi] = [[s.splat(0.0); 2]; 2];
        let (whole, rest) = self.0.split_at(self.0.len() - self.0.len() % (2 * S::LANES));
        for part in whole.chunks_exact(2 * S::LANES) {
            for (i, x) in [s.load(part), s.load(&part[S::LANES..])].into_iter().enumerate() {
                // An element that is NaN is no bound.
                lo[i] = s.at_most(lo[i], x);
                hi[i] = s.at_least(hi[i], x);
            }
        }
        let (lo, hi) = (s.reduce_min(s.min_fast(lo[0], lo[1])), s.reduce_max(s.max_fast(hi[0], hi[1])));
        rest.iter().fold([lo, hi], |[lo, hi], &x| [lo.min(x), hi.max(x)])
    }
}

struct Round<'a> {
    x: &'a [f32],
    scale: f32,
    zero: f32,
    lo: f32,
    hi: f32,
    y: &'a mut [f32],
}

impl Kernel for Round<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (scale, zero, lo, hi) = (s.splat(self.scale), s.splat(self.zero), s.splat(self.lo), s.splat(self.hi));
        for (x, y) in self.x.chunks(S::LANES).zip(self.y.chunks_mut(S::LANES)) {
            // A true division: the product with the reciprocal would round some halves the other way.
            let v = s.add(s.round(s.div(s.load_partial(x), scale)), zero);
            s.store_partial(y, s.min(s.max(v, lo), hi));
        }
    }
}

/// The scale and zero point with which the numbers of these slices, and 0, fit into `uint8`; NaN does not count.
pub fn dynamic_range<'a>(x: impl IntoIterator<Item = &'a [f32]>) -> (f32, u8) {
    let (lo, hi) = x.into_iter().flatten().fold((0f32, 0f32), |(lo, hi), &v| (lo.min(v), hi.max(v)));
    let scale = if hi == lo { 1.0 } else { (hi - lo) / 255.0 };
    let zero = -lo / scale;
    // A range that no scale covers (infinite, or so small that the scale is 0) has the zero point that onnxruntime gives.
    (scale, if zero.is_nan() { 255 } else { zero.clamp(0.0, 255.0).round_ties_even() as u8 })
}

/// `y = (x - zero) scale`.
///
/// # Errors
/// If the slices do not fit the grid.
pub fn dequantize<T: Number>(
    cx: &Cx,
    x: &[T],
    grid: &Grid,
    scale: &[f32],
    zero: Option<&[T]>,
    y: &mut [f32],
) -> Result<()> {
    grid.check([x.len(), y.len()], scale.len(), zero.map(<[T]>::len))?;
    if x.is_empty() {
        return Ok(());
    }
    let line = grid.line();
    let run = line.unwrap_or_else(|| grid.run());
    let runs = x.len().div_ceil(run);
    let per_task = (TASK / run).max(1);
    let out = DisjointMut::new(y);
    cx.for_each(runs.div_ceil(per_task), 3 * x.len() as u64, &|task| {
        for r in task * per_task..runs.min((task + 1) * per_task) {
            let (from, to) = (r * run, x.len().min((r + 1) * run));
            let at = grid.scale_of(from);
            // SAFETY: tasks write different runs.
            let y = unsafe { out.range(from, to - from) };
            if line.is_some() {
                for (i, ((y, x), scale)) in y.iter_mut().zip(&x[from..to]).zip(&scale[at..]).enumerate() {
                    let zero = zero.map_or(0.0, |z| z[at + i].to_f64());
                    *y = (x.to_f64() - zero) as f32 * scale;
                }
                continue;
            }
            let (scale, zero) = (scale[at], zero.map_or(0.0, |z| z[at].to_f64()));
            if let Some(x) = bytes(&x[from..to]) {
                dispatch(cx.isa(), FromBytes { x, scale, zero: zero as i32, y });
                continue;
            }
            // The difference is taken exactly: 32-bit integers do not fit into f32.
            y.iter_mut().zip(&x[from..to]).for_each(|(y, x)| *y = (x.to_f64() - zero) as f32 * scale);
        }
    });
    Ok(())
}

/// `c = a b` for `[m, k]` and `[k, n]` in 32-bit integers, spread over the lanes by rows.
///
/// # Errors
/// If the slices are shorter than the sizes want.
pub fn matmul(cx: &Cx, a: &[i32], b: &[i32], c: &mut [i32], [m, n, k]: [usize; 3]) -> Result<()> {
    let short = |len: usize, x: usize, y: usize| x.checked_mul(y).is_none_or(|want| len < want);
    if short(a.len(), m, k) || short(b.len(), k, n) || short(c.len(), m, n) {
        return Err(Error::new(format!("a product of [{m}, {k}] and [{k}, {n}] from too few elements")));
    }
    let cost = 2 * (m * n) as u64 * k as u64;
    let out = DisjointMut::new(c);
    cx.for_each(m, cost, &|i| {
        // SAFETY: each task has its own row.
        let row = unsafe { out.range(i * n, n) };
        naive::matmul(&a[i * k..], [k, 1], b, [n, 1], row, [1, n, k]);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::each_context;

    #[test]
    fn halves_go_to_even_and_ends_saturate() {
        let x = [0.5f32, 1.5, 2.5, -0.5, -1.5, 1000.0, -1000.0, f32::INFINITY, 127.4];
        let grid = Grid { outer: 1, n: 1, inner: x.len(), sharing: Sharing::Tensor };
        each_context(|cx| {
            let mut y = [0i8; 9];
            quantize(cx, &x, &grid, &[1.0], None, [-128.0, 127.0], &mut y).unwrap();
            assert_eq!(y, [0, 2, 2, 0, -2, 127, -128, 127, 127]);
            let mut y = [0u8; 9];
            quantize(cx, &x, &grid, &[0.5], Some(&[7]), [0.0, 255.0], &mut y).unwrap();
            assert_eq!(y, [8, 10, 12, 6, 4, 255, 0, 255, 255]);
        });
    }

    #[test]
    fn ranges_of_any_length() {
        each_context(|cx| {
            assert_eq!(range(cx, &[]), [0.0; 2]);
            assert_eq!(range(cx, &[f32::NAN; 40]), [0.0; 2]);
            for len in [1, 2, 3, 15, 16, 17, 31, 33, 70_000] {
                let mut x: Vec<f32> = (0..len).map(|i| (i * 7919 % 1013) as f32 - 500.0).collect();
                for at in [0, len / 2, len - 1] {
                    let want = x.iter().fold([0f32; 2], |[lo, hi], &x| [lo.min(x), hi.max(x)]);
                    assert_eq!(range(cx, &x), want);
                    x[at] = f32::NAN;
                }
                x[len / 2] = f32::NEG_INFINITY;
                assert_eq!(range(cx, &x)[0], f32::NEG_INFINITY);
            }
        });
    }

    #[test]
    fn bytes_go_both_ways() {
        each_context(|cx| {
            for len in [1, 3, 7, 8, 9, 31, 32, 33, 70] {
                let grid = Grid { outer: 1, n: 1, inner: len, sharing: Sharing::Tensor };
                let mut x: Vec<f32> = (0..len).map(|i| (i as f32 - 35.0) * 2.25).collect();
                x[len / 2] = f32::NAN;
                x[len / 3] = 1e20;
                let want =
                    |lo: f64, hi: f64, zero: f32| -> Vec<f64> {
                        x.iter()
                            .map(|x| {
                                if x.is_nan() {
                                    0.0
                                } else {
                                    f64::from((x / 0.5).round_ties_even() + zero).clamp(lo, hi)
                                }
                            })
                            .collect()
                    };
                let (mut y, mut back) = (vec![7u8; len], vec![7.0; len]);
                quantize(cx, &x, &grid, &[0.5], Some(&[3]), [0.0, 200.0], &mut y).unwrap();
                assert_eq!(y.iter().map(|&y| f64::from(y)).collect::<Vec<_>>(), want(0.0, 200.0, 3.0));
                dequantize(cx, &y, &grid, &[0.3], Some(&[3]), &mut back).unwrap();
                assert!(back.iter().zip(&y).all(|(&v, &y)| v == (f32::from(y) - 3.0) * 0.3));
                let mut y = vec![7i8; len];
                quantize(cx, &x, &grid, &[0.5], Some(&[-3]), [-1000.0, 1000.0], &mut y).unwrap();
                assert_eq!(y.iter().map(|&y| f64::from(y)).collect::<Vec<_>>(), want(-128.0, 127.0, -3.0));
                dequantize(cx, &y, &grid, &[0.3], Some(&[-3]), &mut back).unwrap();
                assert!(back.iter().zip(&y).all(|(&v, &y)| v == (f32::from(y) + 3.0) * 0.3));
            }
        });
    }

    #[test]
    fn every_way_of_sharing() {
        let x: Vec<f32> = (0..2 * 4 * 19).map(|i| i as f32 - 70.0).collect();
        let scales: Vec<f32> = (0..2 * 2 * 19).map(|i| 0.5 + i as f32 * 0.25).collect();
        let zeros: Vec<i16> = (0..2 * 2 * 19).map(|i| i as i16 - 30).collect();
        each_context(|cx| {
            for sharing in [Sharing::Tensor, Sharing::Axis, Sharing::Block(2), Sharing::Block(3)] {
                let grid = Grid { outer: 2, n: 4, inner: 19, sharing };
                let n = grid.scales().unwrap();
                let (scale, zero) = (&scales[..n], &zeros[..n]);
                let (mut q, mut y) = (vec![0i16; x.len()], vec![0f32; x.len()]);
                quantize(cx, &x, &grid, scale, Some(zero), [-32768.0, 32767.0], &mut q).unwrap();
                dequantize(cx, &q, &grid, scale, Some(zero), &mut y).unwrap();
                for i in 0..x.len() {
                    let (o, k, j) = (i / 76, i / 19 % 4, i % 19);
                    let at = match sharing {
                        Sharing::Tensor => 0,
                        Sharing::Axis => k,
                        Sharing::Block(b) => (o * 2 + k / b) * 19 + j,
                    };
                    let want = (x[i] / scale[at]).round_ties_even() as i16 + zero[at];
                    assert_eq!(q[i], want, "{sharing:?} {i}");
                    assert_eq!(y[i], f32::from(want - zero[at]) * scale[at]);
                }
                assert!(quantize(cx, &x[1..], &grid, scale, Some(zero), [0.0, 1.0], &mut q).is_err());
            }
        });
    }

    #[test]
    fn sums_are_exact() {
        each_context(|cx| {
            let (a, b) = (vec![255; 3 * 1000], vec![-128; 1000 * 2]);
            let mut c = [0; 6];
            matmul(cx, &a, &b, &mut c, [3, 2, 1000]).unwrap();
            assert_eq!(c, [-32_640_000; 6]);
            assert!(matmul(cx, &a, &b, &mut c, [4, 2, 1000]).is_err());
        });
    }

    #[test]
    fn every_way_to_share_scales() {
        each_context(|cx| {
            for (outer, n, inner) in [(3, 5, 1), (2, 6, 4), (1, 64, 1), (2, 64, 33), (4, 3, 1)] {
                for sharing in
                    [Sharing::Axis, Sharing::Block(1), Sharing::Block(2), Sharing::Block(16), Sharing::Block(5)]
                {
                    let grid = Grid { outer, n, inner, sharing };
                    let scales = grid.scales().unwrap();
                    let scale: Vec<f32> = (0..scales).map(|i| 0.25 + i as f32).collect();
                    let zero: Vec<i8> = (0..scales).map(|i| (i % 11) as i8 - 5).collect();
                    let x: Vec<i8> = (0..outer * n * inner).map(|i| (i * 37 % 251) as u8 as i8).collect();
                    for zero in [None, Some(&zero[..])] {
                        let mut y = vec![0.0; x.len()];
                        dequantize(cx, &x, &grid, &scale, zero, &mut y).unwrap();
                        for (i, y) in y.iter().enumerate() {
                            let (o, k, j) = (i / inner / n, i / inner % n, i % inner);
                            let at = match sharing {
                                Sharing::Block(block) => (o * n.div_ceil(block) + k / block) * inner + j,
                                _ => k,
                            };
                            let want = (f32::from(x[i]) - zero.map_or(0.0, |z| f32::from(z[at]))) * scale[at];
                            assert_eq!(*y, want, "{grid:?} {i}");
                        }
                    }
                }
            }
        });
    }
}
