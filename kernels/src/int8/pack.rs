//! Packed B: panels as wide as the microkernel's tile, each contiguous along k in groups of neighbours.
//!
//! ```text
//! panel j = columns j*NR .. min((j+1)*NR, n), the last one filled up with zeros to whole tiles
//! group g (elements g*G.. along k) of column q of a panel of width w stands at g*w + q
//! Form::Wide      G = 2: b - zero as i16; A is widened likewise, and nothing has to be corrected
//! of bytes        G = 4: b as i8 (u8 less 128), so that for a' and b', the bytes as the dot product reads them,
//!                 sum = dot(a', b') - a_zero' (colsum[j] - k zero'[j]) - zero'[j] rowsum[i]
//! Form::Split     the same, but a panel is rows of groups in a sequence of its own:
//!                 for each group g: row = b[g]
//!                     where two neighbours could saturate, |b[0] + b[1]| > 128 of one sign, a half of both goes to
//!                     another row of the same group
//!                 pairs of rows whose products can be added in 16 bits, and then the others
//!                 Before, k is permuted in windows of 16, in which a row of A is by one instruction, for few to be split
//! ```
//!
//! Products of bytes up to 255 fit 16 bits as long as what they are multiplied by adds up to at most 128 on either side of
//! zero. Any two rows of a panel can be a pair, so nearly all of them find a partner: those of weights that are
//! quantised per tensor at once, of a normal distribution's per channel after a few tries.

use super::{Bytes, Form, QMatrix, table};
use crate::conv::volume;
use crate::error::{Error, Result};
use crate::gemm::Aligned;
use crate::simd::Isa;
use core::ops::Range;

/// The right-hand side of a product, packed once for one instruction set and one form of it; made for weights.
#[derive(Clone, Debug)]
pub struct PackedQ {
    isa: Isa,
    form: Form,
    k: usize,
    n: usize,
    data: Aligned,
    order: Option<Vec<u8>>,
    pieces: Option<Pieces>,
    correction: Option<Correction>,
}

/// Largest sum of weights of one sign that meet bytes up to 255 and are added in 16 bits: 128 times 255 fits.
const MOST: i16 = 128;
/// Neighbours along k that [`Form::Split`] permutes.
const WINDOW: usize = 16;
/// Rows of the order are filled up to the widest vector.
const ORDER_UNIT: usize = 64;
/// A window with so many columns to each pair that has to be split, or more, stays as it is.
const FEW: usize = 64;
/// Most columns that an order is chosen by.
const MOST_COLUMNS: usize = 256;

/// What the panels of [`Form::Split`] are: a row of weights for each step, two steps to a pair.
#[derive(Clone, Debug, Default)]
pub(super) struct Pieces {
    /// Where the groups of the rows that come in pairs are, panel by panel: bytes from the first interleaved group of A on.
    pairs: Vec<[u32; 2]>,
    /// The same of the others.
    others: Vec<u32>,
    /// For each panel where its pairs and its others end.
    ends: Vec<[usize; 2]>,
}

/// Where the groups along k of the rows of a panel in [`Form::Split`] are, bytes from the first one on: pairs, and then others.
#[derive(Clone, Copy, Default)]
pub(super) struct Sequence<'a> {
    pub(super) pairs: &'a [[u32; 2]],
    pub(super) others: &'a [u32],
}

/// Longest products of [`Form::Split`]: places in rows of A are counted in 32 bits.
const MAX_K: usize = 1 << 24;
/// Rows that are tried as the partner of one; nearly all that find one do so before.
const TRIES: usize = 128;

/// About what steps of [`Form::Split`] take of those of [`Form::Wide`] for as many products: two in a pair, and one. From
/// 0.8 for steps without pairs, over the layers of MobileNetV2 in Chromium, and tiles with and without pairs, timed alone.
const PAIR: f64 = 1.41;
const OTHER: f64 = 0.85;
/// When [`Form::Split`] pays besides: rows of A are permuted and interleaved, which costs them as much as some columns do,
/// short ones more. Fitted to the layers of MobileNetV2.
const ROW_COLUMNS: f64 = 1.8;
const MIN_K: usize = 64;
/// Columns by which that is judged first, where there are several times as many.
const SAMPLE: usize = 64;

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
        Self::pack_if(isa, form, b, zero, true)
    }

    /// [`PackedQ::new`] for any form, whether it pays or not; but products that are too long are [`Form::Wide`].
    pub(super) fn pack(isa: Isa, form: Form, b: QMatrix<'_>, zero: &[i32]) -> Result<Self> {
        Self::pack_if(isa, form, b, zero, false)
    }

    /// Packs in `form`; in [`Form::Wide`] if it has to pay (`if_pays`) and does not.
    fn pack_if(isa: Isa, form: Form, b: QMatrix<'_>, zero: &[i32], if_pays: bool) -> Result<Self> {
        b.check("B")?;
        let (k, n) = (b.rows, b.cols);
        let form = if form == Form::Split && k > MAX_K { Form::Wide } else { form };
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
        let too_large = || Error::new(format!("a packed {k} x {n} matrix does not fit the address space"));
        let len = len.ok_or_else(too_large)?;
        // Of a panel at a time in the form whose panels have as many rows as it turns out.
        let split = form == Form::Split;
        let mut data = Aligned::zeros(if split { groups * nr } else { len })?;
        let elements = Elements::new(b);
        let zero_of = |j: usize| zero[if zero.len() == 1 { 0 } else { j }] - elements.shift();
        let mut columns = vec![0i32; if form == Form::Wide { 0 } else { n }];
        let (mut pieces, mut rows) = (Pieces::default(), Vec::new());
        rows.try_reserve(if split { len } else { 0 }).map_err(|_| too_large())?;
        let order = if split { order(&elements) } else { None };
        let mut column = vec![0; groups * group];
        for first in (0..n).step_by(nr) {
            let cols = nr.min(n - first);
            let width = table::width(isa, form, first, n);
            let panels: &mut [i32] = bytemuck::cast_slice_mut(data.as_mut_slice());
            let at = if split { 0 } else { first * groups };
            let words = &mut panels[at..][..groups * width];
            if split && cols < width {
                // What the panel before has left there.
                words.fill(0);
            }
            let panel = Panel { columns: first..first + cols, width, words };
            let mut zeros = [0; MAX_PANEL];
            (0..cols).for_each(|q| zeros[q] = zero_of(first + q) as i16);
            if form == Form::Wide {
                // Behind the last row stand zero points, of which nothing is left.
                let centre = |x: [i8; 2], q: usize| bytemuck::cast(x.map(|x| i16::from(x) - zeros[q]));
                let pad = zeros.map(|zero| zero as i8);
                elements.fill(panel, None, &pad, &mut column, centre);
            } else {
                let group = |x: [i8; 4], _| bytemuck::cast(x);
                elements.fill(panel, order.as_deref(), &[0; MAX_PANEL], &mut column, group);
                let mut sums = [0; MAX_PANEL];
                add_up(words, width, &mut sums);
                for (q, sum) in columns[first..][..cols].iter_mut().enumerate() {
                    *sum = sums[q].wrapping_sub(i32::from(zeros[q]).wrapping_mul(k as i32));
                }
            }
            if split {
                pieces.add(words, width, table::tile(isa, form).mr * size_of::<i32>(), &mut rows);
                // A few columns of many tell mostly.
                let done = first + cols;
                if if_pays && (done == n || done == SAMPLE && n >= 4 * SAMPLE) && !pays(k, n, &pieces) {
                    return Self::pack_if(isa, Form::Wide, b, zero, false);
                }
            }
        }
        if split {
            data = Aligned::zeros(rows.len())?;
            bytemuck::cast_slice_mut(data.as_mut_slice()).copy_from_slice(&rows);
        }
        let correction = (form != Form::Wide).then(|| {
            let zeros = (0..n).map(zero_of);
            Correction { columns, zeros: zeros.clone().any(|zero| zero != 0).then(|| zeros.collect()) }
        });
        let pieces = split.then_some(pieces);
        Ok(Self { isa, form, k, n, data, order, pieces, correction })
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
        let pieces = self.pieces.as_ref().map_or(0, |Pieces { pairs, others, ends }| {
            size_of_val(&pairs[..]) + size_of_val(&others[..]) + size_of_val(&ends[..])
        });
        let order = self.order.as_ref().map_or(0, Vec::len);
        size_of_val(self.data.as_slice()) + order + pieces + correction * size_of::<i32>()
    }

    /// All panels.
    pub(super) fn data(&self) -> &[i32] {
        bytemuck::cast_slice(self.data.as_slice())
    }

    /// The order of the rows if it is another one: for each its place in its window of 16. Filled up to whole vectors.
    pub(super) fn order(&self) -> Option<&[u8]> {
        self.order.as_deref()
    }

    /// Of [`Form::Split`] what the panels are.
    pub(super) fn pieces(&self) -> Option<&Pieces> {
        self.pieces.as_ref()
    }

    pub(super) fn correction(&self) -> Option<&Correction> {
        self.correction.as_ref()
    }
}

/// Whether [`Form::Wide`] would not be faster with `n` columns like these, of length `k`.
fn pays(k: usize, n: usize, Pieces { pairs, others, ends }: &Pieces) -> bool {
    let groups = k.div_ceil(Form::Split.group()) as f64 * ends.len() as f64;
    let steps = PAIR * pairs.len() as f64 + OTHER * others.len() as f64;
    k >= MIN_K && steps / groups + ROW_COLUMNS / n as f64 <= 1.0
}

/// The most columns of a panel.
const MAX_PANEL: usize = 32;

/// A panel to be filled: a row of `width` for each group, of which so many columns are the matrix's; the others are left as
/// they are.
struct Panel<'a> {
    columns: Range<usize>,
    width: usize,
    words: &'a mut [i32],
}

/// The elements of a matrix as the dot product reads them, which is signed: `u8` less 128.
struct Elements<'a> {
    bytes: &'a [u8],
    /// Exclusive or of it and a byte is what is read.
    mask: u8,
    k: usize,
    n: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Elements<'a> {
    /// Of a matrix that was checked.
    fn new(QMatrix { data, rows, cols, row_stride, col_stride }: QMatrix<'a>) -> Self {
        let (bytes, mask) = match data {
            Bytes::U8(x) => (x, 128),
            Bytes::I8(x) => (bytemuck::cast_slice(x), 0),
        };
        Self { bytes, mask, k: rows, n: cols, row_stride, col_stride }
    }

    /// What is taken off.
    fn shift(&self) -> i32 {
        self.mask.into()
    }

    /// Fills a panel. `make` gets the neighbours of a group, in `order` if there is one, and the number of the column in the
    /// panel; behind the last row stands `pad` of the column. `column` is memory for one, as long as all groups.
    ///
    /// Weights lie one way or the other. Rows without gaps are read a group at a time, for all columns; columns are copied
    /// first. Elements one by one took several times as long.
    #[inline(always)]
    fn fill<const G: usize>(
        &self,
        Panel { columns, width, words }: Panel<'_>,
        order: Option<&[u8]>,
        pad: &[i8; MAX_PANEL],
        column: &mut [u8],
        make: impl Fn([i8; G], usize) -> i32,
    ) {
        if self.k == 0 {
            return;
        }
        let (first, cols) = (columns.start, columns.len());
        // As it would be stored.
        let pad = pad.map(|x| x as u8 ^ self.mask);
        let place = |p: usize| order.map_or(p, |order| p / WINDOW * WINDOW + usize::from(order[p]));
        if self.col_stride == 1 {
            for (g, to) in words.chunks_exact_mut(width).enumerate() {
                let mut rows = [&pad[..cols]; G];
                for (row, p) in rows.iter_mut().zip(G * g..self.k) {
                    *row = &self.bytes[place(p) * self.row_stride + first..][..cols];
                }
                for (q, to) in to[..cols].iter_mut().enumerate() {
                    let mut group = [0; G];
                    (0..G).for_each(|i| group[i] = (rows[i][q] ^ self.mask) as i8);
                    *to = make(group, q);
                }
            }
            return;
        }
        for q in 0..cols {
            let from = &self.bytes[(first + q) * self.col_stride..];
            let (known, behind) = column.split_at_mut(self.k);
            if self.row_stride == 1 {
                known.copy_from_slice(&from[..self.k]);
            } else {
                known.iter_mut().zip(from.iter().step_by(self.row_stride)).for_each(|(to, from)| *to = *from);
            }
            behind.fill(pad[q]);
            if let Some(order) = order {
                for (line, order) in column.as_chunks_mut::<WINDOW>().0.iter_mut().zip(order.as_chunks::<WINDOW>().0) {
                    let from = *line;
                    for (to, i) in line.iter_mut().zip(order) {
                        *to = from[usize::from(*i) % WINDOW];
                    }
                }
            }
            let groups = column.as_chunks::<G>().0;
            for (to, bytes) in words[q..].iter_mut().step_by(width).zip(groups) {
                let mut group = [0; G];
                (0..G).for_each(|i| group[i] = (bytes[i] ^ self.mask) as i8);
                *to = make(group, q);
            }
        }
    }
}

/// Adds the elements of each column of a panel.
#[inline(never)]
fn add_up(panel: &[i32], width: usize, sums: &mut [i32; MAX_PANEL]) {
    for row in panel.chunks_exact(width) {
        for (sum, word) in sums.iter_mut().zip(row) {
            *sum = [24, 16, 8, 0].iter().fold(*sum, |sum, left| sum.wrapping_add(word << left >> 24));
        }
    }
}

/// An order of the rows in which few neighbours have to be split; none if it is theirs.
fn order(elements: &Elements<'_>) -> Option<Vec<u8>> {
    let &Elements { bytes, mask, k, n, row_stride, col_stride } = elements;
    if n == 0 {
        return None;
    }
    // Some of many columns tell enough.
    let step = n.div_ceil(MOST_COLUMNS);
    let columns = n.div_ceil(step);
    let words = columns.div_ceil(8);
    let mut rows = vec![u64::from_ne_bytes([128; 8]); WINDOW * words];
    let mut order: Vec<u8> = (0..k.next_multiple_of(ORDER_UNIT)).map(|p| (p % WINDOW) as u8).collect();
    let mut changed = false;
    for (window, order) in order.chunks_exact_mut(WINDOW).take(k / WINDOW).enumerate() {
        let from = &bytes[window * WINDOW * row_stride..];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut rows);
        // Column by column, which is how weights mostly lie.
        for j in 0..columns {
            for i in 0..WINDOW {
                bytes[i * 8 * words + j] = from[i * row_stride + j * step * col_stride] ^ mask ^ 128;
            }
        }
        changed |= pair_up(&rows, words, columns, order);
    }
    changed.then_some(order)
}

/// Columns in which two rows would have to be split as neighbours: signed bytes plus 128, eight to a word, of at most 255
/// words.
#[inline(never)]
fn split_columns(a: &[u64], b: &[u64]) -> usize {
    const UPPER: u64 = u64::from_ne_bytes([128; 8]);
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let counts = a.iter().zip(b).fold(0, |counts, (a, b)| {
        let mean = (a & b) + (((a ^ b) & !ONES) >> 1);
        // The two upper bits are one and the same where the sum is 128 or more, or less than -128. It does no harm that
        // 128 counts, which need not be split.
        counts + ((!(mean ^ mean << 1) & UPPER) >> 7)
    });
    counts.to_ne_bytes().into_iter().map(usize::from).sum()
}

/// Exchanges rows of `n` columns, which take so many words, between two pairs of neighbours for as long as that leaves less
/// to split; each time the whole becomes less, so it ends. Whether the order is another one then.
#[inline(never)]
fn pair_up(rows: &[u64], words: usize, n: usize, order: &mut [u8]) -> bool {
    let row = |i: u8| &rows[usize::from(i) * words..][..words];
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

impl Pieces {
    /// The rows of a panel among those of all, `width` each, and their groups.
    pub(super) fn panel<'a>(&'a self, rows: &'a [i32], panel: usize, width: usize) -> (&'a [i32], Sequence<'a>) {
        let start = panel.checked_sub(1).map_or([0; 2], |before| self.ends[before]);
        let end = self.ends[panel];
        let [first, last] = [start, end].map(|[pairs, others]| (2 * pairs + others) * width);
        let sequence = Sequence { pairs: &self.pairs[start[0]..end[0]], others: &self.others[start[1]..end[1]] };
        (&rows[first..last], sequence)
    }

    /// Adds the next panel, of whose `groups` each has a row of `width`, and its rows to those of all. Groups of A are
    /// `stride` bytes apart.
    fn add(&mut self, groups: &[i32], width: usize, stride: usize, rows: &mut Vec<i32>) {
        let mut own = groups.to_vec();
        let mut group_of: Vec<usize> = (0..groups.len() / width).collect();
        let mut loads = Loads { words: Vec::new(), per_row: width.div_ceil(2) };
        own.chunks_exact(width).for_each(|row| loads.push(row));
        let nothing = vec![0; loads.per_row];
        for group in 0..group_of.len() {
            if fit(loads.row(group), &nothing) {
                continue;
            }
            let end = own.len();
            for at in group * width..(group + 1) * width {
                let [kept, other] = split(bytemuck::cast(own[at]));
                own[at] = bytemuck::cast(kept);
                own.push(bytemuck::cast(other));
            }
            loads.set(group, &own[group * width..][..width]);
            loads.push(&own[end..]);
            group_of.push(group);
        }
        let partners = loads.partners();
        let mut add = |row: usize| {
            let row_of_panel = &own[row * width..][..width];
            match <&[i32; 8]>::try_from(row_of_panel) {
                // As wide as panels of 128-bit vectors are: two loads and stores instead of a call.
                Ok(row) => rows.extend(*row),
                Err(_) => rows.extend_from_slice(row_of_panel),
            }
            (group_of[row] * stride) as u32
        };
        // In the order of the rows: those of A are read from front to back then.
        for (row, &partner) in partners.iter().enumerate().filter(|(row, partner)| row < partner) {
            self.pairs.push([row, partner].map(&mut add));
        }
        self.others.extend((0..partners.len()).filter(|row| partners[*row] == *row).map(add));
        self.ends.push([self.pairs.len(), self.others.len()]);
    }
}

/// What each two neighbours of the rows of a panel add up to on either side of zero: halves, rounded up, of which eight
/// are added and compared in a word. Rounding keeps few rows apart that fit.
struct Loads {
    words: Vec<u64>,
    per_row: usize,
}

/// A half of [`MOST`].
const HALF: u8 = (MOST / 2) as u8;

impl Loads {
    fn row(&self, row: usize) -> &[u64] {
        &self.words[row * self.per_row..][..self.per_row]
    }

    fn push(&mut self, weights: &[i32]) {
        self.words.resize(self.words.len() + self.per_row, 0);
        self.set(self.words.len() / self.per_row - 1, weights);
    }

    fn set(&mut self, row: usize, weights: &[i32]) {
        let words = &mut self.words[row * self.per_row..][..self.per_row];
        for (loads, pair) in bytemuck::cast_slice_mut(words).iter_mut().zip(bytemuck::cast_slice(weights)) {
            *loads = loads_of(*pair);
        }
    }

    /// For each row another one with which its products can be added in 16 bits, itself if there is none.
    ///
    /// The heaviest look for theirs first, as heavy as can be: they have the fewest to choose from.
    fn partners(&self) -> Vec<usize> {
        const CLASSES: usize = 256;
        let class = |row: usize| {
            let loads: &[u8] = bytemuck::cast_slice(self.row(row));
            let sum: usize = loads.iter().map(|load| usize::from(*load)).sum();
            sum * CLASSES / (loads.len() * usize::from(HALF + 2))
        };
        let mut partners: Vec<usize> = (0..self.words.len() / self.per_row).collect();
        // Sorted by counting, the lightest first.
        let classes: Vec<usize> = partners.iter().map(|row| class(*row)).collect();
        let mut ends = [0; CLASSES + 1];
        classes.iter().for_each(|class| ends[class + 1] += 1);
        (0..CLASSES).for_each(|class| ends[class + 1] += ends[class]);
        let mut left = vec![0; partners.len()];
        for (row, &class) in classes.iter().enumerate() {
            left[ends[class]] = row;
            ends[class] += 1;
        }
        while let Some(row) = left.pop() {
            let from = left.len().saturating_sub(TRIES);
            if let Some(at) = self.last_beside(row, &left[from..]) {
                let other = left.remove(from + at);
                (partners[row], partners[other]) = (other, row);
            }
        }
        partners
    }

    /// The last of the `others` with which the products of a row can be added in 16 bits.
    #[inline(never)]
    fn last_beside(&self, row: usize, others: &[usize]) -> Option<usize> {
        let row = self.row(row);
        others.iter().rposition(|other| fit(row, self.row(*other)))
    }
}

/// Whether the loads of two rows together are nowhere more than [`HALF`].
#[inline(always)]
fn fit(a: &[u64], b: &[u64]) -> bool {
    /// What lifts a sum that is more into the upper bit of its byte. No sum leaves its byte.
    const LIFT: u64 = u64::from_ne_bytes([127 - HALF; 8]);
    const UPPER: u64 = u64::from_ne_bytes([128; 8]);
    // Compared once, at the end: where it would stop is not to be foreseen.
    a.iter().zip(b).fold(0, |over, (a, b)| over | (a + b + LIFT)) & UPPER == 0
}

/// The halves of what two neighbours, the bytes of `pair`, add up to above zero and, in the upper byte, below it; one more
/// than [`HALF`] if it is more.
#[inline(always)]
fn loads_of(pair: i16) -> u16 {
    let (a, b) = (pair << 8 >> 8, pair >> 8);
    let half = |load: i16| ((load + 1) >> 1).min(i16::from(HALF) + 1) as u16;
    half(a.max(0) + b.max(0)) | half(-(a.min(0) + b.min(0))) << 8
}

/// Weights of a group as two sums, in neither of which neighbours can leave 16 bits.
fn split(weights: [i8; 4]) -> [[i8; 4]; 2] {
    let [a, b, c, d] = weights;
    let half = |a: i8, b: i8| {
        let too_much = (i16::from(a) + i16::from(b)).unsigned_abs() > MOST as u16;
        if too_much { [a / 2, b / 2] } else { [0; 2] }
    };
    let ([p, q], [r, t]) = (half(a, b), half(c, d));
    let other = [p, q, r, t];
    [core::array::from_fn(|i| weights[i] - other[i]), other]
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
    fn rows_of_a_panel_add_up_to_it_and_no_pair_saturates() {
        for (width, groups, spread) in [(4, 40, 60), (4, 300, 255), (8, 50, 120), (16, 30, 30), (1, 7, 200), (4, 0, 1)]
        {
            let mut random = 1u32;
            let mut weight = || {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((random >> 8) as i32 % (spread + 1) - spread / 2) as i8
            };
            let panel: Vec<i32> = (0..groups * width).map(|_| bytemuck::cast([0; 4].map(|_: u8| weight()))).collect();
            let (mut pieces, mut rows) = (Pieces::default(), Vec::new());
            // Another panel before it.
            pieces.add(&panel[..groups / 2 * width], width, 3, &mut rows);
            pieces.add(&panel, width, 3, &mut rows);
            let (rows, Sequence { pairs, others }) = pieces.panel(&rows, 1, width);
            assert_eq!(rows.len(), (2 * pairs.len() + others.len()) * width);
            if spread <= 120 && groups > 0 {
                assert!(2 * others.len() < groups, "{width} {groups} {spread}: {} without partner", others.len());
            }
            let mut sums = vec![0i32; groups * width * 4];
            let mut add = |place: u32, row: &[i32]| {
                let group = place as usize / 3;
                let bytes: &[i8] = bytemuck::cast_slice(row);
                sums[group * 4 * width..].iter_mut().zip(bytes).for_each(|(sum, x)| *sum += i32::from(*x));
            };
            let (in_pairs, alone) = rows.split_at(2 * pairs.len() * width);
            let fits = |half: u8| assert!(half <= HALF && i32::from(2 * half) * 255 <= i16::MAX.into());
            for (pair, rows) in pairs.iter().zip(in_pairs.chunks_exact(2 * width)) {
                let (first, second) = rows.split_at(width);
                add(pair[0], first);
                add(pair[1], second);
                let pairs = |row| bytemuck::cast_slice(row).iter().map(|pair: &i16| loads_of(*pair).to_ne_bytes());
                for (p, q) in pairs(first).zip(pairs(second)) {
                    p.iter().zip(q).for_each(|(p, q)| fits(p + q));
                }
            }
            for (group, row) in others.iter().zip(alone.chunks_exact(width)) {
                add(*group, row);
                bytemuck::cast_slice(row).iter().flat_map(|pair| loads_of(*pair).to_ne_bytes()).for_each(fits);
            }
            let want: Vec<i32> = bytemuck::cast_slice(&panel).iter().map(|x: &i8| i32::from(*x)).collect();
            assert_eq!(sums, want);
        }
    }

    #[test]
    fn rows_change_places_so_that_few_weights_are_split() {
        // Neighbours that add up, behind which stand the ones that they go with.
        let (k, n) = (40, 8);
        let order_of = |n: usize, stored: &dyn Fn(usize) -> i8| {
            let data: Vec<i8> = (0..k * n).map(|i| stored(i / n)).collect();
            let of_rows = order(&Elements::new(QMatrix::new(Bytes::I8(&data), k, n)));
            let data: Vec<u8> = (0..k * n).map(|i| stored(i % k) as u8 ^ 128).collect();
            assert_eq!(of_rows, order(&Elements::new(QMatrix::new(Bytes::U8(&data), n, k).transposed())));
            of_rows
        };
        let stored = |p: usize| if (p / 8).is_multiple_of(2) { 100 } else { -100 };
        let order = order_of(n, &stored).expect("another order");
        assert_eq!(order.len(), 64);
        for (window, places) in order.chunks(WINDOW).enumerate() {
            let mut sorted = places.to_vec();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..16));
            let at = |i: usize| stored(window * WINDOW + usize::from(places[i]));
            let split = (0..8).filter(|i| at(2 * i) == at(2 * i + 1)).count();
            // The rows behind the last whole window keep theirs.
            assert!(if window < 2 { split == 0 } else { places.is_sorted() }, "{places:?}");
        }
        assert_eq!(order_of(n, &|p| if p.is_multiple_of(2) { 100 } else { -100 }), None, "nothing to split");
        assert_eq!(order_of(0, &stored), None);
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
