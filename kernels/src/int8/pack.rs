//! Packed B: panels as wide as the microkernel's tile, each contiguous along k in groups of neighbours.
//!
//! ```text
//! panel j = columns j*NR .. min((j+1)*NR, n), the last one filled up with zeros to whole tiles
//! group g (elements g*G.. along k) of column q of a panel of width w stands at g*w + q
//! Form::Wide      G = 2: b - zero as i16; A is widened likewise, and nothing has to be corrected
//! of bytes        G = 4: b as i8 (u8 less 128), so that for a' and b', the bytes as the dot product reads them,
//!                 sum = dot(a', b') - a_zero' (colsum[j] - k zero'[j]) - zero'[j] rowsum[i]
//! Form::Split     the same, and where two neighbours of a group could saturate, |b[0] + b[1]| > 128 of one sign,
//!                 b[0] = (+-128 - b[1]) + rest; the rest, whole vectors of few groups, gets steps of its own.
//!                 Before, k is permuted in windows of 16, in which a row of A is by one instruction, for few to be split
//! ```

use super::{Bytes, Form, QMatrix, table};
use crate::conv::volume;
use crate::error::{Error, Result};
use crate::gemm::Aligned;
use crate::simd::Isa;

/// The right-hand side of a product, packed once for one instruction set and one form of it; made for weights.
#[derive(Clone, Debug)]
pub struct PackedQ {
    isa: Isa,
    form: Form,
    k: usize,
    n: usize,
    data: Aligned,
    order: Option<Vec<u8>>,
    rest: Option<Rest>,
    correction: Option<Correction>,
}

/// Largest sum of two neighbours among weights that meet bytes up to 255: 128 times 255 fits 16 bits. Neighbours of
/// different signs are never added up.
const MOST_OF_PAIR: i16 = 128;
/// Neighbours along k that [`Form::Split`] permutes.
const WINDOW: usize = 16;
/// Rows of the order are filled up to the widest vector.
const ORDER_UNIT: usize = 64;
/// A window with so many columns to each pair that has to be split, or more, stays as it is.
const FEW: usize = 64;
/// Most columns that an order is chosen by.
const MOST_COLUMNS: usize = 256;

/// What [`Form::Split`] took off: steps of one vector each, in the order of the vectors.
#[derive(Clone, Debug, Default)]
struct Rest {
    /// For each vector of columns the end of its steps.
    ends: Vec<u32>,
    /// For each step its group along k.
    groups: Vec<u32>,
    /// For each step a vector of groups.
    weights: Vec<i32>,
}

/// The steps of one vector of columns that [`Form::Split`] has besides.
#[derive(Clone, Copy, Default)]
pub(super) struct Steps<'a> {
    groups: &'a [u32],
    weights: &'a [i32],
}

impl Steps<'_> {
    /// Groups along k and the `lanes` weights of each.
    #[inline(always)]
    pub(super) fn iter(&self, lanes: usize) -> impl Iterator<Item = (usize, *const i32)> {
        debug_assert_eq!(self.groups.len() * lanes, self.weights.len());
        let weights = self.weights.as_ptr();
        self.groups.iter().enumerate().map(move |(i, &group)| (group as usize, weights.wrapping_add(i * lanes)))
    }
}

/// When [`Form::Split`] pays: a step of it takes 0.8 of those of [`Form::Wide`] in Chromium, one of the rest a little more;
/// rows of A are permuted and interleaved, which costs them as much as some columns do, short ones more. Fitted to the
/// layers of MobileNetV2.
const MAX_REST: f64 = 0.22;
const ROW_COLUMNS: f64 = 2.0;
const MIN_K: usize = 64;

/// What the forms of bytes need to take zero points back.
#[derive(Clone, Debug)]
pub(super) struct Correction {
    /// `colsum[j] - k * zero[j]`, to be multiplied by A's zero point.
    pub(super) columns: Vec<i32>,
    /// `zero[j]`, to be multiplied by the sum of A's row; none if all are zero.
    pub(super) zeros: Option<Vec<i32>>,
}

impl PackedQ {
    /// Packs the `k` x `n` matrix `b`, whose columns have the zero points `zero` (one for all, or one for each). For
    /// weights stored `[n, k]` pass their [`transposed`](QMatrix::transposed) view. A matrix that [`Form::Split`] does not
    /// pay for becomes [`Form::Wide`].
    ///
    /// # Errors
    /// If `b`'s data is shorter than its shape and strides need, the zero points are neither 1 nor `n` or not of the
    /// range of `b`'s elements, the form is not of this instruction set, or memory is short.
    pub fn new(isa: Isa, form: Form, b: QMatrix<'_>, zero: &[i32]) -> Result<Self> {
        form.check(isa)?;
        let packed = Self::pack(isa, form, b, zero)?;
        if packed.pays() { Ok(packed) } else { Self::pack(isa, Form::Wide, b, zero) }
    }

    /// Whether [`Form::Wide`] would not be faster.
    pub(super) fn pays(&self) -> bool {
        self.rest.as_ref().is_none_or(|rest| {
            let steps = self.k.div_ceil(self.form.group()) as f64 * rest.ends.len() as f64;
            self.k >= MIN_K && rest.groups.len() as f64 / steps + ROW_COLUMNS / self.n as f64 <= MAX_REST
        })
    }

    /// [`PackedQ::new`] for any form, whether it pays or not.
    pub(super) fn pack(isa: Isa, form: Form, b: QMatrix<'_>, zero: &[i32]) -> Result<Self> {
        b.check("B")?;
        let (k, n) = (b.rows, b.cols);
        if zero.len() != 1 && zero.len() != n {
            return Err(Error::new(format!("{} zero points for {n} columns", zero.len())));
        }
        for &zero in zero {
            b.data.check_zero("B", zero)?;
        }
        volume(&[k, n])?;
        let (group, nr) = (form.group(), table::panel_width(isa, form));
        let groups = k.div_ceil(group);
        let len = n.checked_next_multiple_of(table::unit(isa, form)).and_then(|width| width.checked_mul(groups));
        let len = len.ok_or_else(|| Error::new(format!("a packed {k} x {n} matrix does not fit the address space")))?;
        let mut data = Aligned::zeros(len)?;
        let zero_of = |j: usize| zero[if zero.len() == 1 { 0 } else { j }];
        // What the dot product reads is signed.
        let shift = if matches!(b.data, Bytes::U8(_)) { 128 } else { 0 };
        let mut columns = vec![0i32; if form == Form::Wide { 0 } else { n }];
        let mut rest = Rest::default();
        let stored = |p: usize, j: usize| b.data.get(p * b.row_stride + j * b.col_stride) - shift;
        let order = if form == Form::Split { order(k, n, stored) } else { None };
        let place = |p: usize| order.as_ref().map_or(p, |order| p / WINDOW * WINDOW + usize::from(order[p]));
        let mut panels: &mut [i32] = bytemuck::cast_slice_mut(data.as_mut_slice());
        let mut first = 0;
        while first < n {
            let cols = nr.min(n - first);
            let width = table::width(isa, form, first, n);
            let (panel, others) = panels.split_at_mut(groups * width);
            panels = others;
            for q in 0..cols {
                let j = first + q;
                if form == Form::Wide {
                    let zero = zero_of(j) - shift;
                    let centred = |p: usize| if p < k { (stored(p, j) - zero) as i16 } else { 0 };
                    for g in 0..groups {
                        panel[g * width + q] = bytemuck::cast([centred(2 * g), centred(2 * g + 1)]);
                    }
                } else {
                    let shifted = |p: usize| if p < k { stored(place(p), j) as i8 } else { 0 };
                    let mut sum = 0i32;
                    for g in 0..groups {
                        let x = [0, 1, 2, 3].map(|i| shifted(4 * g + i));
                        sum = x.iter().fold(sum, |sum, &x| sum.wrapping_add(x.into()));
                        panel[g * width + q] = bytemuck::cast(x);
                    }
                    columns[j] = sum.wrapping_sub((zero_of(j) - shift).wrapping_mul(k as i32));
                }
            }
            if form == Form::Split {
                rest.take(panel, width, isa.lanes())?;
            }
            first += nr;
        }
        let correction = (form != Form::Wide).then(|| {
            let zeros = (0..n).map(|j| zero_of(j) - shift);
            Correction { columns, zeros: zeros.clone().any(|zero| zero != 0).then(|| zeros.collect()) }
        });
        let rest = (form == Form::Split).then_some(rest);
        Ok(Self { isa, form, k, n, data, order, rest, correction })
    }

    /// Rows of the matrix: the length of the dot products.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the matrix.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The instruction set it was packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The form of the dot product it was packed for.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Memory it holds.
    pub fn bytes(&self) -> usize {
        let correction = self.correction.as_ref().map_or(0, |c| c.columns.len() + c.zeros.as_ref().map_or(0, Vec::len));
        let rest = self.rest.as_ref().map_or(0, |rest| rest.ends.len() + rest.groups.len() + rest.weights.len());
        let order = self.order.as_ref().map_or(0, Vec::len);
        size_of_val(self.data.as_slice()) + order + (correction + rest) * size_of::<i32>()
    }

    /// All panels.
    pub(super) fn data(&self) -> &[i32] {
        bytemuck::cast_slice(self.data.as_slice())
    }

    /// The order of the rows if it is another one: for each its place in its window of 16. Filled up to whole vectors.
    pub(super) fn order(&self) -> Option<&[u8]> {
        self.order.as_deref()
    }

    /// What a vector of columns has besides; nothing in other forms, and beyond the last vector.
    pub(super) fn rest(&self, vector: usize) -> Steps<'_> {
        let Some(rest) = &self.rest else { return Steps::default() };
        let Some(&end) = rest.ends.get(vector) else { return Steps::default() };
        let start = if vector == 0 { 0 } else { rest.ends[vector - 1] };
        let (start, end, lanes) = (start as usize, end as usize, self.isa.lanes());
        Steps { groups: &rest.groups[start..end], weights: &rest.weights[start * lanes..end * lanes] }
    }

    pub(super) fn correction(&self) -> Option<&Correction> {
        self.correction.as_ref()
    }
}

/// An order of the rows in which few neighbours have to be split; none if it is theirs.
fn order(k: usize, n: usize, stored: impl Fn(usize, usize) -> i32) -> Option<Vec<u8>> {
    if n == 0 {
        return None;
    }
    // Some of many columns tell enough.
    let step = n.div_ceil(MOST_COLUMNS);
    let columns = n.div_ceil(step);
    let mut rows = vec![0i16; WINDOW * columns];
    let mut order: Vec<u8> = (0..k.next_multiple_of(ORDER_UNIT)).map(|p| (p % WINDOW) as u8).collect();
    let mut changed = false;
    for (window, order) in order.chunks_exact_mut(WINDOW).take(k / WINDOW).enumerate() {
        // Column by column, which is how weights mostly lie.
        for j in 0..columns {
            (0..WINDOW).for_each(|i| rows[i * columns + j] = stored(window * WINDOW + i, j * step) as i16);
        }
        changed |= pair_up(&rows, columns, order);
    }
    changed.then_some(order)
}

/// Columns in which two rows would have to be split as neighbours.
#[inline(never)]
fn split_columns(a: &[i16], b: &[i16]) -> usize {
    a.iter().zip(b).map(|(a, b)| usize::from((a + b).unsigned_abs() > MOST_OF_PAIR as u16)).sum()
}

/// Exchanges rows of `n` columns between two pairs of neighbours for as long as that leaves less to split; each time the
/// whole becomes less, so it ends. Whether the order is another one then.
#[inline(never)]
fn pair_up(rows: &[i16], n: usize, order: &mut [u8]) -> bool {
    let row = |i: u8| &rows[usize::from(i) * n..][..n];
    let cost = |i: u8, j: u8| split_columns(row(i), row(j));
    if order.chunks_exact(2).map(|pair| cost(pair[0], pair[1])).sum::<usize>() * FEW <= n {
        return false;
    }
    let window = order.len();
    let mut costs = vec![0; window * window];
    for i in 0..window {
        for j in 0..i {
            let cost = cost(i as u8, j as u8);
            (costs[i * window + j], costs[j * window + i]) = (cost, cost);
        }
    }
    let cost = |i: u8, j: u8| costs[usize::from(i) * window + usize::from(j)];
    let (mut changed, mut better) = (false, true);
    while better {
        better = false;
        for p in (0..window).step_by(2) {
            for q in 0..p {
                // One of the first pair's for either of another's.
                let ([a, b], [c, d]) = ([order[p], order[p + 1]], [order[q], order[q ^ 1]]);
                if cost(c, b) + cost(a, d) < cost(a, b) + cost(c, d) {
                    (order[p], order[q]) = (c, a);
                    (better, changed) = (true, true);
                }
            }
        }
    }
    changed
}

impl Rest {
    /// Takes off what is too much of a panel of rows of `width`, vectors of `lanes`.
    fn take(&mut self, panel: &mut [i32], width: usize, lanes: usize) -> Result<()> {
        for vector in 0..width / lanes {
            for (group, row) in panel.chunks_exact_mut(width).enumerate() {
                let row = &mut row[vector * lanes..][..lanes];
                if !row.iter().fold(false, |any, weights| any | must_be_split(bytemuck::cast(*weights))) {
                    continue;
                }
                let first = self.weights.len();
                for (lane, weights) in row.iter_mut().enumerate() {
                    let [kept, rest] = split(bytemuck::cast(*weights));
                    if rest == [0; 4] {
                        continue;
                    }
                    if self.weights.len() == first {
                        self.groups.push(group as u32);
                        self.weights.resize(first + lanes, 0);
                    }
                    *weights = bytemuck::cast(kept);
                    self.weights[first + lane] = bytemuck::cast(rest);
                }
            }
            let end = u32::try_from(self.groups.len());
            self.ends.push(end.map_err(|_| Error::new("too many weights to split"))?);
        }
        Ok(())
    }
}

/// Whether neighbours among the weights of a group could leave 16 bits.
fn must_be_split([a, b, c, d]: [i8; 4]) -> bool {
    let excess = |a: i8, b: i8| (i16::from(a) + i16::from(b)).unsigned_abs() > MOST_OF_PAIR as u16;
    excess(a, b) | excess(c, d)
}

/// Weights of a group as two sums, in neither of which neighbours can leave 16 bits.
fn split(weights: [i8; 4]) -> [[i8; 4]; 2] {
    let (mut kept, mut rest) = (weights, [0; 4]);
    for pair in [0, 2] {
        let [a, b] = [0, 1].map(|i| i16::from(weights[pair + i]));
        let excess = a + b - (a + b).clamp(-MOST_OF_PAIR, MOST_OF_PAIR);
        kept[pair] = (a - excess) as i8;
        rest[pair] = excess as i8;
    }
    [kept, rest]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_pair_of_weights_saturates() {
        let fits = |pair: [i8; 2]| {
            let [a, b] = pair.map(i32::from);
            let (most, least) = (255 * (a.max(0) + b.max(0)), 255 * (a.min(0) + b.min(0)));
            most <= i16::MAX.into() && least >= i16::MIN.into()
        };
        for a in i8::MIN..=i8::MAX {
            for b in i8::MIN..=i8::MAX {
                let [kept, rest] = split([a, b, b, a]);
                for i in 0..4 {
                    assert_eq!(i32::from(kept[i]) + i32::from(rest[i]), [a, b, b, a][i].into());
                }
                for x in [kept, rest] {
                    assert!(fits([x[0], x[1]]) && fits([x[2], x[3]]), "{a} {b}: {x:?}");
                }
                assert_eq!(rest == [0; 4], fits([a, b]), "{a} {b}");
            }
        }
    }

    #[test]
    fn rows_change_places_so_that_few_weights_are_split() {
        // Neighbours that add up, behind which stand the ones that they go with.
        let (k, n) = (40, 8);
        let stored = |p: usize, _: usize| if (p / 8).is_multiple_of(2) { 100 } else { -100 };
        let order = order(k, n, stored).expect("another order");
        assert_eq!(order.len(), 64);
        for (window, places) in order.chunks(WINDOW).enumerate() {
            let mut sorted = places.to_vec();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..16));
            let at = |i: usize| stored(window * WINDOW + usize::from(places[i]), 0);
            let split = (0..8).filter(|i| at(2 * i) == at(2 * i + 1)).count();
            // The rows behind the last whole window keep theirs.
            assert!(if window < 2 { split == 0 } else { places.is_sorted() }, "{places:?}");
        }
        assert_eq!(super::order(k, n, |p, _| if p.is_multiple_of(2) { 100 } else { -100 }), None, "nothing to split");
        assert_eq!(super::order(k, 0, stored), None);
    }

    #[test]
    fn matrices_that_splitting_does_not_pay_for_are_widened() {
        let isa = Isa::best();
        if !Form::available(isa).contains(&Form::Split) {
            return;
        }
        let pack = |weight: i8| {
            let data = vec![weight; 64 * 64];
            PackedQ::new(isa, Form::Split, QMatrix::new(Bytes::I8(&data), 64, 64), &[0]).unwrap().form()
        };
        assert_eq!([pack(64), pack(65)], [Form::Split, Form::Wide]);
    }
}
