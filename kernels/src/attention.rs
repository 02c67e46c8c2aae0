//! Scaled dot-product attention without the matrix of all scores (Dao et al., "FlashAttention", 2022; the running
//! softmax is Milakov and Gimelshein, 2018).
//!
//! ```text
//! for each (batch, head, 144 queries), in parallel
//!     m = -inf, l = 0, o = 0                                   one per query; with a sink m is its score and l = 1
//!     for each block of 128 keys that any of the queries may see
//!         pack k^T * scale and v as for a GEMM
//!         for each 36 of the queries
//!             s = q k^T, capped, + mask; -inf where not seen
//!             m' = max(m, max s);  p = exp(s - m')
//!             l = l * exp(m - m') + sum p;  o = o * exp(m - m') + p v;  m = m'
//!     y = o / l                                                `unseen` for a query that sees nothing
//! ```
//!
//! Both products are those of [`gemm`]: rows of heads lie so many bytes apart that few of them fit into the
//! first-level cache together, which panels mend. The packing is paid back by the queries; for fewer than 4 of them (a
//! decoder's step) rows of keys are read as they lie.

use crate::error::{Error, Result};
use crate::gemm::{self, Matrix, OutPtr, table};
use crate::math;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};
use crate::softmax::{map_row, row_exp_sum, row_max};
use core::ops::Range;

/// Queries of a task, at most: they share the packed keys and values.
const BLOCK: usize = 144;
/// Queries that are scored at a time: their scores stay in the first-level cache, and they fill tiles of all heights but
/// NEON's.
const QUERIES: usize = 36;
/// Tasks of fewer queries are made if there would be fewer than this many of them.
const MIN_TASKS: usize = 8;
/// Keys that are scored at a time.
const KEYS: usize = 128;

/// `[batch, head, position, element]` with contiguous elements; strides of the first three.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Elements from batch to batch, head to head, position to position.
    pub strides: [usize; 3],
}

/// Added to the scores: `[batch, head, query, key]` with contiguous keys; a stride of 0 broadcasts.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// The elements; minus infinity hides a key.
    pub data: &'a [f32],
    /// Elements from batch to batch, head to head, query to query.
    pub strides: [usize; 3],
    /// Keys that it covers; those behind are hidden.
    pub keys: usize,
    /// Whether an element that is not 0 takes the place of the score instead of being added to it.
    pub replaces: bool,
}

/// Which keys query `i` of batch `b` may see.
pub type Visible<'a> = &'a (dyn Fn(usize, usize) -> Range<usize> + Sync);

/// One attention.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Number of batches.
    pub batch: usize,
    /// Heads of q and of the result.
    pub heads: usize,
    /// Heads of k and v; each serves `heads / kv_heads` neighbouring heads of q.
    pub kv_heads: usize,
    /// Number of queries.
    pub queries: usize,
    /// Number of keys.
    pub keys: usize,
    /// Elements of a query and a key.
    pub size: usize,
    /// Elements of a value.
    pub value_size: usize,
    /// Queries.
    pub q: Heads<'a>,
    /// Keys.
    pub k: Heads<'a>,
    /// Values.
    pub v: Heads<'a>,
    /// Factor of the scores.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)` if it is not 0.
    pub cap: f32,
    /// Added to the scores.
    pub mask: Option<Mask<'a>>,
    /// Which keys a query may see; all of them if absent.
    pub visible: Option<Visible<'a>>,
    /// The result of a query that sees no key: 0, or NaN, which is what `softmax` of nothing but minus infinity gives.
    pub unseen: f32,
    /// One number per head of q that softmax takes for the score of one key more, whose value is 0 ("attention sink").
    pub sinks: Option<&'a [f32]>,
    /// Strides of the result: batch, head, position.
    pub y_strides: [usize; 3],
}

/// Elements that a view of these sizes and strides reaches, or `None` if that overflows.
fn reach(sizes: [usize; 3], strides: [usize; 3], inner: usize) -> Option<usize> {
    if sizes.contains(&0) || inner == 0 {
        return Some(0);
    }
    let steps = sizes.iter().zip(strides).map(|(n, s)| (n - 1).checked_mul(s));
    steps.into_iter().try_fold(inner, |sum, s| sum.checked_add(s?))
}

impl Attention<'_> {
    fn check(&self, y: usize) -> Result<()> {
        let a = self;
        if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
            return Err(Error::new(format!("{} heads of queries cannot share {} of keys", a.heads, a.kv_heads)));
        }
        let mask = a.mask.map(|m| (m.data.len(), reach([a.batch, a.heads, a.queries], m.strides, m.keys)));
        let views = [
            ("q", a.q.data.len(), reach([a.batch, a.heads, a.queries], a.q.strides, a.size)),
            ("k", a.k.data.len(), reach([a.batch, a.kv_heads, a.keys], a.k.strides, a.size)),
            ("v", a.v.data.len(), reach([a.batch, a.kv_heads, a.keys], a.v.strides, a.value_size)),
            ("y", y, reach([a.batch, a.heads, a.queries], a.y_strides, a.value_size)),
            ("mask", mask.map_or(0, |m| m.0), mask.map_or(Some(0), |m| m.1)),
            ("sinks", a.sinks.map_or(a.heads, <[f32]>::len), Some(a.heads)),
        ];
        match views.iter().find(|(_, have, want)| want.is_none_or(|w| w > *have)) {
            Some((name, have, _)) => Err(Error::new(format!("{name} has {have} elements, fewer than its shape wants"))),
            None => Ok(()),
        }
    }
}

/// Computes `y = softmax(scale q k^T + mask) v`.
///
/// # Errors
/// If a slice is too short for its strides, or the numbers of heads do not fit.
pub fn attention(cx: &Cx, a: &Attention, y: &mut [f32]) -> Result<()> {
    a.check(y.len())?;
    // The parts that tasks write must not overlap: every (batch, head, query) needs its own value.
    let rows = [a.batch, a.heads, a.queries];
    let mut order = [0, 1, 2];
    order.sort_unstable_by_key(|&i| a.y_strides[i]);
    let mut extent = a.value_size;
    for i in order.into_iter().filter(|&i| rows[i] > 1) {
        if a.y_strides[i] < extent {
            return Err(Error::new(format!("strides {:?} make results overlap", a.y_strides)));
        }
        extent = a.y_strides[i] * rows[i];
    }
    if rows.contains(&0) || a.value_size == 0 {
        return Ok(());
    }
    let lanes = cx.isa().lanes();
    let width = a.value_size.next_multiple_of(lanes);
    let cost = 4 * (a.batch * a.heads * a.queries * a.keys) as u64 * (a.size + a.value_size).max(1) as u64;
    let many = a.batch * a.heads * a.queries.div_ceil(BLOCK) >= MIN_TASKS;
    let per_task = if many { BLOCK } else { QUERIES }.min(a.queries);
    let blocks = a.queries.div_ceil(per_task);
    let scratch = per_task * (width + 2) + QUERIES * (a.size + KEYS) + KEYS * (a.size + width);
    let out = DisjointMut::new(y);
    cx.for_each_scratch(a.batch * a.heads * blocks, cost, scratch, &|task, scratch| {
        let (block, head) = (task % blocks, task / blocks % a.heads);
        let batch = task / blocks / a.heads;
        let first = block * per_task;
        let rows = per_task.min(a.queries - first);
        dispatch(cx.isa(), Block { a, batch, head, first, rows, width, scratch });
        for i in 0..rows {
            let at = batch * a.y_strides[0] + head * a.y_strides[1] + (first + i) * a.y_strides[2];
            // SAFETY: results do not overlap, and each belongs to one task.
            let y = unsafe { out.range(at, a.value_size) };
            y.copy_from_slice(&scratch[i * width..][..a.value_size]);
        }
    });
    Ok(())
}

/// One task; leaves its results in the first `rows * width` elements of the scratch.
struct Block<'a> {
    a: &'a Attention<'a>,
    batch: usize,
    head: usize,
    first: usize,
    rows: usize,
    width: usize,
    scratch: &'a mut [f32],
}

impl Kernel for Block<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block { a, batch, head, first, rows, width, scratch } = self;
        let kv_head = head / (a.heads / a.kv_heads);
        let (o, rest) = scratch.split_at_mut(rows * width);
        let (max, rest) = rest.split_at_mut(rows);
        let (sum, rest) = rest.split_at_mut(rows);
        let (q, rest) = rest.split_at_mut(QUERIES * a.size);
        let (scores, rest) = rest.split_at_mut(QUERIES * KEYS);
        let (k_panels, v_panels) = rest.split_at_mut(KEYS * a.size);
        o.fill(0.0);
        let sink = a.sinks.map_or(f32::NEG_INFINITY, |s| s[head]);
        max.fill(sink);
        sum.fill(if sink == f32::NEG_INFINITY { 0.0 } else { 1.0 });
        let all = 0..a.keys;
        // What query `i` of the task sees.
        let seen = |i: usize| match a.visible {
            None => all.clone(),
            Some(f) => {
                let r = f(batch, first + i);
                r.start.min(a.keys)..r.end.min(a.keys)
            }
        };
        let limit = a.mask.map_or(a.keys, |m| m.keys.min(a.keys));
        // What any of some queries sees.
        let span = |queries: Range<usize>| {
            let begin = queries.clone().map(|i| seen(i).start).min().unwrap_or(0);
            begin..queries.map(|i| seen(i).end).max().unwrap_or(0).min(limit)
        };
        let Range { start: mut at, end } = span(0..rows);
        while at < end {
            let count = KEYS.min(end - at);
            let keys = &a.k.data[batch * a.k.strides[0] + kv_head * a.k.strides[1] + at * a.k.strides[2]..];
            let values = &a.v.data[batch * a.v.strides[0] + kv_head * a.v.strides[1] + at * a.v.strides[2]..];
            let keys = Matrix { data: keys, rows: a.size, cols: count, row_stride: 1, col_stride: a.k.strides[2] };
            let values =
                Matrix { data: values, rows: count, cols: a.value_size, row_stride: a.v.strides[2], col_stride: 1 };
            let panels = |columns: usize| 0..columns.div_ceil(table::panel_width(S::ISA));
            let padded = count.next_multiple_of(S::LANES);
            if rows >= 4 {
                gemm::pack_panels(S::ISA, &keys, panels(count), k_panels);
                // Exact for powers of two; else the scores are as close as if they were scaled themselves.
                map_row(s, &mut k_panels[..a.size * padded], |v| s.mul(v, s.splat(a.scale)));
            }
            // For a decoder's step the packing would cost as much as the product.
            let direct = rows < 4 && width == a.value_size;
            if !direct {
                gemm::pack_panels(S::ISA, &values, panels(a.value_size), v_panels);
            }
            let mut from = 0;
            while from < rows {
                let part = from..(from + QUERIES).min(rows);
                from = part.end;
                let wanted = span(part.clone());
                if wanted.end <= at || wanted.start >= at + count {
                    continue;
                }
                let queries = &a.q.data[batch * a.q.strides[0] + head * a.q.strides[1]..];
                let query = |i: usize| &queries[(first + i) * a.q.strides[2]..][..a.size];
                if rows < 4 {
                    for i in 0..part.len() {
                        for j in 0..count {
                            let key = &keys.data[j * keys.col_stride..][..a.size];
                            scores[i * KEYS + j] = a.scale * dot(s, query(i), key);
                        }
                    }
                } else {
                    let block = gemm::Block {
                        m: part.len(),
                        a: query(part.start).as_ptr(),
                        lda: a.q.strides[2],
                        b: k_panels,
                        size: [a.size, padded],
                        panels: panels(padded),
                        c: OutPtr(scores.as_mut_ptr()),
                        ldc: KEYS,
                        accumulate: false,
                    };
                    assert!(part.len() * KEYS <= scores.len() && query(part.end - 1).len() == a.size);
                    // SAFETY: q has all rows of the part, as the last of them shows, and the scores have as many.
                    unsafe { block.run(S::ISA, Some(q)) };
                }
                for i in part.clone() {
                    let row = &mut scores[(i - part.start) * KEYS..][..count];
                    let shown = seen(i);
                    let clip = |j: usize| j.saturating_sub(at).min(count);
                    let (begin, end) = (clip(shown.start), clip(shown.end).max(clip(shown.start)));
                    row[..begin].fill(0.0);
                    row[end..].fill(0.0);
                    let row = &mut row[begin..end];
                    if a.cap != 0.0 {
                        let (cap, inverse) = (s.splat(a.cap), s.splat(1.0 / a.cap));
                        map_row(s, row, |v| s.mul(cap, math::tanh(s, s.mul(v, inverse))));
                    }
                    let highest = match a.mask {
                        Some(m) => {
                            let from = batch * m.strides[0] + head * m.strides[1] + (first + i) * m.strides[2] + at;
                            add_mask(s, row, &m.data[from + begin..][..end - begin], m.replaces)
                        }
                        None => row_max(s, row),
                    };
                    let old = max[i];
                    let new = if highest > old || highest.is_nan() { highest } else { old };
                    if new == f32::NEG_INFINITY && !row.iter().any(|score| score.is_nan()) {
                        // Nothing to see yet; differences of infinities would be NaN.
                        row.fill(0.0);
                        continue;
                    }
                    let total = row_exp_sum(s, row, new, true);
                    // exp(-inf) is 0: the first block that shows something starts from nothing.
                    let keep = (old - new).exp();
                    if keep != 1.0 {
                        map_row(s, &mut o[i * width..][..width], |v| s.mul(v, s.splat(keep)));
                    }
                    sum[i] = sum[i] * keep + total;
                    max[i] = new;
                }
                let o = &mut o[part.start * width..][..part.len() * width];
                if direct {
                    for (weights, o) in scores.chunks_exact(KEYS).zip(o.chunks_exact_mut(width)) {
                        add_rows(s, &weights[..count], &values, o);
                    }
                } else {
                    let block = gemm::Block {
                        m: part.len(),
                        a: scores.as_ptr(),
                        lda: KEYS,
                        b: v_panels,
                        size: [count, width],
                        panels: panels(width),
                        c: OutPtr(o.as_mut_ptr()),
                        ldc: width,
                        accumulate: true,
                    };
                    // SAFETY: the scores and the results have as many rows as the part.
                    unsafe { block.run(S::ISA, None) };
                }
            }
            at += count;
        }
        for (row, sum) in o.chunks_exact_mut(width).zip(sum) {
            if *sum == 0.0 {
                row.fill(if a.keys == 0 { 0.0 } else { a.unseen });
            } else {
                let scale = s.splat(1.0 / *sum);
                map_row(s, row, |v| s.mul(v, scale));
            }
        }
    }
}

/// `row += mask`, and exactly minus infinity where the mask is, whatever stood there. If it `replaces`, the same holds for
/// all elements that are not 0. Gives what [`row_max`] would.
#[inline(always)]
fn add_mask<S: Simd>(s: S, row: &mut [f32], mask: &[f32], replaces: bool) -> f32 {
    let (hidden, zero) = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
    let mut highest = hidden;
    let (mut vectors, mut masks) = (row.chunks_exact_mut(S::LANES), mask.chunks_exact(S::LANES));
    for (to, m) in (&mut vectors).zip(&mut masks) {
        let (x, m) = (s.load(to), s.load(m));
        let x = if replaces { s.select(s.eq(m, zero), x, m) } else { s.select(s.eq(m, hidden), hidden, s.add(x, m)) };
        highest = s.at_least(x, highest);
        s.store(to, x);
    }
    let mut highest = s.reduce_max(highest);
    for (x, &m) in vectors.into_remainder().iter_mut().zip(masks.remainder()) {
        *x = match m {
            0.0 => *x,
            m if replaces || m == f32::NEG_INFINITY => m,
            m => *x + m,
        };
        highest = highest.max(*x);
    }
    highest
}

/// `sum a b`.
#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [s.splat(0.0); 2];
    let n = a.len().min(b.len());
    let mut i = 0;
    while i + 2 * S::LANES <= n {
        acc[0] = s.mul_add(s.load(&a[i..]), s.load(&b[i..]), acc[0]);
        acc[1] = s.mul_add(s.load(&a[i + S::LANES..]), s.load(&b[i + S::LANES..]), acc[1]);
        i += 2 * S::LANES;
    }
    while i < n {
        let end = (i + S::LANES).min(n);
        acc[0] = s.mul_add(s.load_partial(&a[i..end]), s.load_partial(&b[i..end]), acc[0]);
        i = end;
    }
    s.reduce_add(s.add(acc[0], acc[1]))
}

/// `y += weights rows`, for a y of whole vectors.
#[inline(always)]
fn add_rows<S: Simd>(s: S, weights: &[f32], rows: &Matrix, y: &mut [f32]) {
    assert!(weights.is_empty() || (weights.len() - 1) * rows.row_stride + y.len() <= rows.data.len());
    let (mut quads, vectors) = (y.chunks_exact_mut(4 * S::LANES), rows.data.as_ptr());
    let mut e = 0;
    for y in &mut quads {
        // SAFETY: the assertion covers all columns of all rows.
        unsafe { add_columns::<S, 4>(s, weights, vectors.add(e), rows.row_stride, y) };
        e += y.len();
    }
    for y in quads.into_remainder().chunks_exact_mut(S::LANES) {
        // SAFETY: as above.
        unsafe { add_columns::<S, 1>(s, weights, vectors.add(e), rows.row_stride, y) };
        e += y.len();
    }
}

/// `N` vectors of [`add_rows`], in registers.
///
/// # Safety
/// As many rows as there are weights, `stride` apart, have `N` vectors from `rows` on.
#[inline(always)]
unsafe fn add_columns<S: Simd, const N: usize>(s: S, weights: &[f32], rows: *const f32, stride: usize, y: &mut [f32]) {
    let mut sums = [s.splat(0.0); N];
    for (v, sum) in sums.iter_mut().enumerate() {
        *sum = s.load(&y[v * S::LANES..]);
    }
    for (p, weight) in weights.iter().enumerate() {
        let weight = s.splat(*weight);
        for (v, sum) in sums.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            *sum = s.mul_add(weight, unsafe { s.load_ptr(rows.add(p * stride + v * S::LANES)) }, *sum);
        }
    }
    for (v, sum) in sums.into_iter().enumerate() {
        s.store(&mut y[v * S::LANES..], sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::{each_context, integers};

    fn close(got: &[f32], want: &[f64], what: &str) {
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(*g) - w).abs() <= 2e-5 * (1.0 + w.abs()), "{what} at {i}: {g} for {w}");
        }
    }

    #[test]
    fn every_size_matches_the_reference() {
        each_context(|cx| {
            for (heads, kv_heads, queries, keys, size, value_size) in [
                (1, 1, 1, 1, 1, 1),
                (2, 1, 3, 5, 4, 4),
                (2, 2, 4, 7, 8, 3),
                (4, 2, 33, 130, 16, 20),
                (1, 1, 5, 300, 7, 32),
                (2, 2, 65, 64, 32, 32),
                (3, 1, 150, 270, 32, 40),
                (1, 1, 2, 0, 4, 4),
            ] {
                let batch = 2;
                let q = integers(batch * heads * queries * size, 1);
                let k = integers(batch * kv_heads * keys * size, 2);
                let v = integers(batch * kv_heads * keys * value_size, 3);
                let mut mask = integers(queries * keys, 4);
                mask.iter_mut().step_by(3).for_each(|m| *m = f32::NEG_INFINITY);
                let sinks = integers(heads, 5);
                let causal = |_: usize, i: usize| 0..i + 2;
                for (masked, hides, cap) in
                    [(false, false, 0.0), (true, false, 0.0), (false, true, 5.0), (true, true, 3.0)]
                {
                    let a = Attention {
                        batch,
                        heads,
                        kv_heads,
                        queries,
                        keys,
                        size,
                        value_size,
                        q: Heads { data: &q, strides: [heads * queries * size, queries * size, size] },
                        k: Heads { data: &k, strides: [kv_heads * keys * size, keys * size, size] },
                        v: Heads { data: &v, strides: [kv_heads * keys * value_size, keys * value_size, value_size] },
                        scale: 0.3,
                        cap,
                        mask: masked.then_some(Mask { data: &mask, strides: [0, 0, keys], keys, replaces: cap == 3.0 }),
                        visible: if hides { Some(&causal) } else { None },
                        unseen: 0.0,
                        sinks: (cap == 5.0).then_some(&sinks),
                        // Heads inside: the layout of the layer that follows.
                        y_strides: [queries * heads * value_size, value_size, heads * value_size],
                    };
                    let want = reference::attention(&a);
                    let mut y = vec![0.0; batch * heads * queries * value_size];
                    attention(cx, &a, &mut y).unwrap();
                    close(&y, &want, &format!("{heads} {queries}x{keys} {size} {value_size} {masked} {hides} {cap}"));
                }
            }
        });
    }

    #[test]
    fn a_query_that_sees_nothing_gives_zeros() {
        each_context(|cx| {
            let x = [1.0, 2.0, 3.0, 4.0];
            let heads = Heads { data: &x, strides: [4, 4, 2] };
            let mask = [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
            let a = Attention {
                batch: 1,
                heads: 1,
                kv_heads: 1,
                queries: 2,
                keys: 2,
                size: 2,
                value_size: 2,
                q: heads,
                k: heads,
                v: heads,
                scale: 1.0,
                cap: 0.0,
                mask: Some(Mask { data: &mask, strides: [0, 0, 2], keys: 2, replaces: false }),
                visible: None,
                unseen: 0.0,
                sinks: None,
                y_strides: [4, 4, 2],
            };
            let mut y = [9.0; 4];
            attention(cx, &a, &mut y).unwrap();
            assert_eq!(y, [0.0, 0.0, 1.0, 2.0]);
            attention(cx, &Attention { unseen: f32::NAN, ..a }, &mut y).unwrap();
            assert!(y[0].is_nan() && y[1].is_nan() && y[2..] == [1.0, 2.0], "{y:?}");
            attention(cx, &Attention { unseen: f32::NAN, keys: 0, ..a }, &mut y).unwrap();
            assert_eq!(y, [0.0; 4], "a product over no keys");
            // NaN is no score to skip, even beside nothing but hidden keys, nor does a later score cover it.
            let k = [f32::NAN, 2.0, 3.0, 4.0];
            let one_or_two = [0.0, f32::NEG_INFINITY, 0.0, 0.0];
            let mask = Some(Mask { data: &one_or_two, strides: [0, 0, 2], keys: 2, replaces: false });
            attention(cx, &Attention { k: Heads { data: &k, ..heads }, mask, ..a }, &mut y).unwrap();
            assert!(y.iter().all(|y| y.is_nan()), "{y:?}");
            assert!(attention(cx, &Attention { y_strides: [4, 4, 1], ..a }, &mut y).is_err(), "overlapping results");
            assert!(attention(cx, &Attention { keys: 3, ..a }, &mut y).is_err(), "too few keys");
        });
    }
}
