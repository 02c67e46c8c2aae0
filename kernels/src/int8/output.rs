//! What becomes of sums: a sweep over a few rows of them that are still in the first-level cache, or, where they become bytes
//! and nothing is added, what their kernel does while they are in registers ([`Columns`]).
//!
//! ```text
//! for 2 vectors of columns
//!     m = multiplier
//!     for rows
//!         x = clamp(f32(sum) * m, lo - zero, hi - zero)
//!         y = byte(x + 1.5 * 2^23) + zero
//! ```
//!
//! Clamping comes before rounding, which gives the same since the bounds are integers; then adding `1.5 * 2^23`, whose
//! neighbours are 1 apart, rounds half to even and leaves the integer in the low bits. That is so for all numbers up to
//! `2^22`: where no sum can be larger and the bounds are those of the type of the result, which packing to bytes
//! saturates to, nothing is clamped; of a number that another is added to, the sum is what may be left. Nothing here may fuse a product with a sum: the same bits everywhere.

use super::{Addend, Bytes, BytesMut, Output, Requantize, largest_factor};
use crate::epilogue::Activation;
use crate::gemm::Activate;
use crate::simd::{Isa, Kernel, Simd, dispatch, opaque};
use core::ops::Range;

/// The output of a product, in parts that tasks write independently. Lengths were checked by `Output::check`.
pub(super) struct Sink<'a> {
    /// Elements of a row.
    n: usize,
    kind: Kind<'a>,
}

enum Kind<'a> {
    Sums(*mut i32),
    Real { scale: &'a [f32], bias: Option<&'a [f32]>, residual: Option<&'a [f32]>, activation: Activation, y: *mut f32 },
    Quantized(Quantized<'a>),
}

/// An output of quantised numbers.
pub(super) struct Quantized<'a> {
    requantize: Requantize<'a>,
    /// Signed bytes are stored as unsigned ones, 128 larger, whose highest bit is turned: an exclusive or with this.
    flip: u8,
    /// Packing to bytes clamps.
    packs: bool,
    y: *mut u8,
    /// Elements of a row.
    n: usize,
}

/// The largest sum of `k` products of bytes less their zero points, and a bias; none is of more than 32 bits.
pub(super) fn largest_sum(k: usize, bias: Option<&[i32]>) -> f32 {
    let bias = bias.into_iter().flatten().fold(0, |most, x| x.unsigned_abs().max(most));
    (k as f32 * (255.0 * 255.0) + bias as f32).min(2_147_483_648.0)
}

/// Numbers of which rounding as above is exact, with room for the error of what is compared.
const EXACT: f32 = 4e6;

// SAFETY: tasks write disjoint parts, which `finish` demands.
unsafe impl Sync for Sink<'_> {}
// SAFETY: the same, which `Columns::store` demands.
unsafe impl Sync for Quantized<'_> {}

impl<'a> Sink<'a> {
    /// For sums with rows of `n`, none larger than `largest`.
    pub(super) fn new(n: usize, output: Output<'a>, largest: f32) -> Self {
        let packs = |q: &Requantize<'_>, bounds: [i32; 2]| match q.add {
            None => [q.lo, q.hi] == bounds && largest_factor(q.multiplier) * largest <= EXACT,
            // Bytes less their zero points, whatever they are.
            Some(add) => {
                let largest = (add.first.abs() + add.second.abs()) * 512.0;
                [add.lo, add.hi] == bounds && add.offset == 0.0 && largest <= EXACT
            }
        };
        let kind = match output {
            Output::Sums(y) => Kind::Sums(y.as_mut_ptr()),
            Output::Real { scale, bias, residual, activation, y } => {
                Kind::Real { scale, bias, residual, activation, y: y.as_mut_ptr() }
            }
            Output::Quantized { requantize, y: BytesMut::U8(y) } => {
                let packs = packs(&requantize, [0, 255]);
                Kind::Quantized(Quantized { requantize, flip: 0, packs, y: y.as_mut_ptr(), n })
            }
            Output::Quantized { requantize, y: BytesMut::I8(y) } => {
                let packs = packs(&requantize, [-128, 127]);
                Kind::Quantized(Quantized { requantize, flip: 0x80, packs, y: y.as_mut_ptr().cast(), n })
            }
        };
        Self { n, kind }
    }

    /// Set if sums can become bytes while they are in registers: nothing is added to them then.
    pub(super) fn quantized(&self) -> Option<&Quantized<'a>> {
        match &self.kind {
            Kind::Quantized(quantized) if quantized.requantize.add.is_none() => Some(quantized),
            _ => None,
        }
    }

    /// Writes the part `rows` x `cols` of the output from `sums`, whose rows are `ld` apart.
    ///
    /// # Safety
    /// The part lies inside the output, nobody else uses it, and the sums are readable.
    pub(super) unsafe fn finish(&self, isa: Isa, sums: *const i32, ld: usize, rows: Range<usize>, cols: Range<usize>) {
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        // Columns that do not fill two vectors go row by row.
        let isa = isa.narrowed(cols.len() / 2);
        let part = Part { sink: self, sums, ld, rows: rows.clone(), cols: cols.clone() };
        match &self.kind {
            Kind::Sums(_) => dispatch(isa, Store(part)),
            Kind::Quantized(_) => dispatch(isa, Quantize(part)),
            Kind::Real { activation, y, .. } => {
                dispatch(isa, Convert(part));
                if *activation != Activation::Identity {
                    let c = y.wrapping_add(rows.start * self.n + cols.start);
                    let (rows, cols, ld) = (rows.len(), cols.len(), self.n);
                    dispatch(isa, Activate { activation: *activation, c, rows, cols, ld });
                }
            }
        }
    }
}

/// A part of an output; the contract of [`Sink::finish`] holds.
struct Part<'a> {
    sink: &'a Sink<'a>,
    sums: *const i32,
    ld: usize,
    rows: Range<usize>,
    cols: Range<usize>,
}

/// Where two vectors of columns of some rows are. Pointers are at the first column.
#[derive(Clone, Copy)]
struct Unit {
    sums: *const i32,
    ld: usize,
    rows: usize,
    /// First element in the output, and of what is laid out like it.
    at: usize,
    n: usize,
    /// Columns if fewer than two vectors; then one row.
    cols: usize,
    /// First column.
    j: usize,
}

impl Part<'_> {
    /// All columns, two vectors at a time. Those that do not fill two vectors overlap the ones before, which stores the
    /// same values twice; if there are none before, they go row by row.
    #[inline(always)]
    fn units<S: Simd>(&self, _: S) -> Units {
        let (n, width, cols) = (self.sink.n, 2 * S::LANES, self.cols.len());
        let narrow = cols < width;
        let next = Unit {
            sums: self.sums,
            ld: self.ld,
            rows: if narrow { 1 } else { self.rows.len() },
            at: self.rows.start * n + self.cols.start,
            n,
            cols: width.min(cols),
            j: self.cols.start,
        };
        Units { next, left: if narrow { self.rows.len() } else { cols }, narrow }
    }
}

/// Iterates over the units of a part.
struct Units {
    next: Unit,
    /// Rows if narrow, else columns.
    left: usize,
    narrow: bool,
}

impl Iterator for Units {
    type Item = Unit;

    #[inline(always)]
    fn next(&mut self) -> Option<Unit> {
        if self.left == 0 {
            return None;
        }
        let unit = self.next;
        if self.narrow {
            self.left -= 1;
            self.next.sums = unit.sums.wrapping_add(unit.ld);
            self.next.at += unit.n;
        } else {
            self.left -= unit.cols;
            let step = unit.cols.min(self.left);
            self.left = if step == 0 { 0 } else { self.left.max(unit.cols) };
            self.next.sums = unit.sums.wrapping_add(step);
            self.next.at += step;
            self.next.j += step;
        }
        Some(unit)
    }
}

/// Two vectors, of which only the first `cols` elements are there.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, p: *const f32, cols: usize) -> [S::F32; 2] {
    let lanes = S::LANES;
    // SAFETY: promised by the caller.
    unsafe {
        if cols == 2 * lanes {
            [s.load_ptr(p), s.load_ptr(p.add(lanes))]
        } else {
            let mut buffer = [0.0; 32];
            p.copy_to_nonoverlapping(buffer.as_mut_ptr(), cols);
            [s.load_ptr(buffer.as_ptr()), s.load_ptr(buffer.as_ptr().add(lanes))]
        }
    }
}

/// Writes the first `cols` elements of two vectors.
///
/// # Safety
/// They must be writable.
#[inline(always)]
unsafe fn store<S: Simd>(s: S, p: *mut f32, v: [S::F32; 2], cols: usize) {
    let lanes = S::LANES;
    // SAFETY: promised by the caller.
    unsafe {
        if cols == 2 * lanes {
            s.store_ptr(p, v[0]);
            s.store_ptr(p.add(lanes), v[1]);
        } else {
            let mut buffer = [0.0; 32];
            s.store_ptr(buffer.as_mut_ptr(), v[0]);
            s.store_ptr(buffer.as_mut_ptr().add(lanes), v[1]);
            buffer.as_ptr().copy_to_nonoverlapping(p, cols);
        }
    }
}

/// A value for each of two vectors of columns, or the same for all.
///
/// # Safety
/// Columns `j..j+cols` must be there unless there is one for all.
#[inline(always)]
unsafe fn per_column<S: Simd>(s: S, x: &[f32], j: usize, cols: usize) -> [S::F32; 2] {
    if x.len() == 1 {
        return [s.splat(x[0]); 2];
    }
    // SAFETY: promised by the caller.
    unsafe { load(s, x.as_ptr().add(j), cols) }
}

/// Sums of one row.
///
/// # Safety
/// Two vectors at `p` must be readable; the buffer of sums has whole vectors.
#[inline(always)]
unsafe fn sums<S: Simd>(s: S, p: *const i32) -> [S::I32; 2] {
    // SAFETY: promised by the caller.
    unsafe { [s.load_i32_ptr(p), s.load_i32_ptr(p.add(S::LANES))] }
}

// The kernels are not inlined on wasm: optimising compilers choke on huge functions.

struct Store<'a>(Part<'a>);

impl Kernel for Store<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let sink = self.0.sink;
        let Kind::Sums(y) = sink.kind else { unreachable!("not an output of sums") };
        for u in self.0.units(s) {
            // SAFETY: the contract of the type.
            unsafe {
                for i in 0..u.rows {
                    let v = sums(s, u.sums.add(i * u.ld));
                    store(s, y.add(u.at + i * u.n).cast(), [s.from_bits(v[0]), s.from_bits(v[1])], u.cols);
                }
            }
        }
    }
}

struct Convert<'a>(Part<'a>);

impl Kernel for Convert<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let sink = self.0.sink;
        let Kind::Real { scale, bias, residual, y, .. } = sink.kind else {
            unreachable!("not an output of real numbers")
        };
        for u in self.0.units(s) {
            // SAFETY: the contract of the type.
            unsafe {
                let scale = per_column(s, scale, u.j, u.cols);
                let added = match bias {
                    Some(bias) => load(s, bias.as_ptr().add(u.j), u.cols),
                    None => [s.splat(0.0); 2],
                };
                for i in 0..u.rows {
                    let v = sums(s, u.sums.add(i * u.ld));
                    let mut x = [s.mul(s.to_f32(v[0]), scale[0]), s.mul(s.to_f32(v[1]), scale[1])];
                    x = [s.add(x[0], added[0]), s.add(x[1], added[1])];
                    let at = u.at + i * u.n;
                    if let Some(residual) = residual {
                        let r = load(s, residual.as_ptr().add(at), u.cols);
                        x = [s.add(x[0], r[0]), s.add(x[1], r[1])];
                    } else {
                        // As the oracle, which adds a zero: -0 becomes 0.
                        x = [s.add(x[0], s.splat(0.0)), s.add(x[1], s.splat(0.0))];
                    }
                    store(s, y.add(at), x, u.cols);
                }
            }
        }
    }
}

/// `1.5 * 2^23`.
pub(super) const ROUND: f32 = 12_582_912.0;

/// [`ROUND`] in every lane. Not as a constant: V8 would make it anew for each vector, three instructions of about ten.
#[inline(always)]
pub(super) fn round<S: Simd>(s: S) -> S::F32 {
    s.splat(opaque(&ROUND))
}

struct Quantize<'a>(Part<'a>);

impl Kernel for Quantize<'_> {
    type Output = ();

    #[cfg_attr(target_arch = "wasm32", inline(never))]
    #[cfg_attr(not(target_arch = "wasm32"), inline(always))]
    fn run<S: Simd>(self, s: S) {
        let Kind::Quantized(to) = &self.0.sink.kind else { unreachable!("not an output of quantised numbers") };
        // Constant in the loops: what they branch over takes as long as what they compute.
        // SAFETY: the contract of the type.
        unsafe {
            match (to.requantize.add.is_some(), to.packs) {
                (false, false) => self.part::<S, false, false>(s, to),
                (false, true) => self.part::<S, false, true>(s, to),
                (true, false) => self.part::<S, true, false>(s, to),
                (true, true) => self.part::<S, true, true>(s, to),
            }
        }
    }
}

impl Quantize<'_> {
    /// # Safety
    /// The contract of the type; the parameters are what `to` says.
    #[inline(always)]
    unsafe fn part<S: Simd, const ADD: bool, const PACKS: bool>(&self, s: S, to: &Quantized<'_>) {
        for u in self.0.units(s) {
            // SAFETY: the caller's contract.
            unsafe {
                if u.cols == 2 * S::LANES {
                    quantize::<S, ADD, PACKS>(s, to, &u, 2 * S::LANES);
                } else {
                    quantize::<S, ADD, PACKS>(s, to, &u, u.cols);
                }
            }
        }
    }
}

/// What quantises sums of two vectors of columns that are still in registers.
pub(super) struct Columns<'a, S: Simd> {
    multiplier: [S::F32; 2],
    round: S::F32,
    back: S::I32,
    to: &'a Quantized<'a>,
}

impl<'a, S: Simd> Columns<'a, S> {
    /// For the columns from `j` on.
    ///
    /// # Safety
    /// Two vectors of columns must be there.
    #[inline(always)]
    pub(super) unsafe fn new(s: S, to: &'a Quantized<'a>, j: usize) -> Self {
        // SAFETY: promised by the caller.
        let multiplier = unsafe { per_column(s, to.requantize.multiplier, j, 2 * S::LANES) };
        let back = s.splat_i32(to.back(to.requantize.zero));
        Self { multiplier, round: round(s), back, to }
    }

    /// Writes a row of them.
    ///
    /// # Safety
    /// `y` is where the row begins in the output, and nobody else uses these columns of it.
    #[inline(always)]
    pub(super) unsafe fn store(&self, s: S, y: *mut u8, sums: [S::I32; 2]) {
        let mut x = scaled(s, sums, self.multiplier);
        if !self.to.packs {
            x = clamped(s, x, bounds(s, &self.to.requantize));
        }
        // SAFETY: promised by the caller.
        unsafe { s.store_flipped(y, rounded(s, x, self.round, self.back), self.to.flip) };
    }
}

impl Quantized<'_> {
    /// Where an element is.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, column: usize) -> *mut u8 {
        self.y.wrapping_add(row * self.n + column)
    }

    /// What the bits of a rounded sum are too large for a byte to be stored.
    #[inline(always)]
    fn back(&self, zero: i32) -> i32 {
        ROUND.to_bits() as i32 - zero - i32::from(self.flip)
    }

    /// Elements of a row.
    #[inline(always)]
    pub(super) fn row_len(&self) -> usize {
        self.n
    }
}

/// The steps of the module's formula, for two vectors.
#[inline(always)]
fn scaled<S: Simd>(s: S, sums: [S::I32; 2], multiplier: [S::F32; 2]) -> [S::F32; 2] {
    [s.mul(s.to_f32(sums[0]), multiplier[0]), s.mul(s.to_f32(sums[1]), multiplier[1])]
}

#[inline(always)]
fn bounds<S: Simd>(s: S, q: &Requantize<'_>) -> [S::F32; 2] {
    [s.splat((q.lo - q.zero) as f32), s.splat((q.hi - q.zero) as f32)]
}

#[inline(always)]
fn clamped<S: Simd>(s: S, x: [S::F32; 2], [lo, hi]: [S::F32; 2]) -> [S::F32; 2] {
    [s.at_most(s.at_least(x[0], lo), hi), s.at_most(s.at_least(x[1], lo), hi)]
}

#[inline(always)]
fn rounded<S: Simd>(s: S, x: [S::F32; 2], round: S::F32, back: S::I32) -> [S::I32; 2] {
    [s.sub_i32(s.bits(s.add(x[0], round)), back), s.sub_i32(s.bits(s.add(x[1], round)), back)]
}

/// `cols` columns of some rows.
///
/// # Safety
/// The unit lies inside the output; the parameters are what `to` says.
#[inline(always)]
unsafe fn quantize<S: Simd, const ADD: bool, const PACKS: bool>(s: S, to: &Quantized<'_>, u: &Unit, cols: usize) {
    let q = &to.requantize;
    let round = self::round(s);
    let bounds = bounds(s, q);
    let back = s.splat_i32(to.back(q.zero));
    // SAFETY: promised by the caller.
    unsafe {
        let multiplier = per_column(s, q.multiplier, u.j, cols);
        // A macro: a closure would not be compiled for the instruction set.
        macro_rules! rows {
            (|$x:ident, $at:ident| $bytes:expr) => {
                for i in 0..u.rows {
                    let mut $x = scaled(s, sums(s, u.sums.add(i * u.ld)), multiplier);
                    if ADD || !PACKS {
                        $x = clamped(s, $x, bounds);
                    }
                    let $at = u.at + i * u.n;
                    let (y, bytes) = (to.y.add($at), $bytes);
                    let mut buffer = [0u8; 32];
                    let whole = cols == 2 * S::LANES;
                    s.store_flipped(if whole { y } else { buffer.as_mut_ptr() }, bytes, to.flip);
                    if !whole {
                        buffer.as_ptr().copy_to_nonoverlapping(y, cols);
                    }
                }
            };
        }
        if !ADD {
            rows!(|x, at| rounded(s, x, round, back));
        } else if let Some(add) = &q.add {
            let added = Added::new(s, add, to.back(add.zero));
            rows!(|x, at| {
                let x = [s.sub(s.add(x[0], round), round), s.sub(s.add(x[1], round), round)];
                added.to::<PACKS>(s, x, at, cols)
            });
        }
    }
}

/// `clamp(round(x * first + (other - other_zero) * second + offset) + zero)` for x a number less its zero point.
struct Added<S: Simd> {
    other: *const u8,
    flip: u8,
    other_zero: S::F32,
    reals: S::I32,
    first: S::F32,
    second: S::F32,
    offset: S::F32,
    bounds: [S::F32; 2],
    round: S::F32,
    back: S::I32,
}

impl<S: Simd> Added<S> {
    #[inline(always)]
    fn new(s: S, add: &Addend<'_>, back: i32) -> Self {
        let (shift, flip) = match add.other {
            Bytes::U8(_) => (0, 0),
            Bytes::I8(_) => (128, 0x80),
        };
        Self {
            other: add.other.as_ptr(),
            flip,
            other_zero: s.splat((add.other_zero + shift) as f32),
            reals: s.reals(),
            first: s.splat(add.first),
            second: s.splat(add.second),
            offset: s.splat(add.offset),
            bounds: [s.splat((add.lo - add.zero) as f32), s.splat((add.hi - add.zero) as f32)],
            round: round(s),
            back: s.splat_i32(back),
        }
    }

    /// Adds `cols` elements from `at` on. Packing to bytes clamps, and there is no offset, if it `PACKS`.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn to<const PACKS: bool>(&self, s: S, x: [S::F32; 2], at: usize, cols: usize) -> [S::I32; 2] {
        let mut buffer = [0u8; 32];
        // SAFETY: promised by the caller.
        let mut y = unsafe {
            let mut p = self.other.add(at);
            if cols != 2 * S::LANES {
                p.copy_to_nonoverlapping(buffer.as_mut_ptr(), cols);
                p = buffer.as_ptr();
            }
            s.load_reals(p, self.flip, self.other_zero, self.reals)
        };
        for (y, x) in y.iter_mut().zip(x) {
            *y = s.add(s.mul(x, self.first), s.mul(*y, self.second));
        }
        if !PACKS {
            y = clamped(s, [s.add(y[0], self.offset), s.add(y[1], self.offset)], self.bounds);
        }
        rounded(s, y, self.round, self.back)
    }
}

/// Two vectors of bytes, of which only the first `cols` are there.
///
/// # Safety
/// They must be readable.
#[inline(always)]
pub(crate) unsafe fn load_bytes<S: Simd>(s: S, x: &Bytes<'_>, at: usize, cols: usize) -> [S::I32; 2] {
    let lanes = S::LANES;
    let mut buffer = [0u8; 32];
    // SAFETY: promised by the caller.
    unsafe {
        let mut p = x.as_ptr().add(at);
        if cols != 2 * lanes {
            p.copy_to_nonoverlapping(buffer.as_mut_ptr(), cols);
            p = buffer.as_ptr();
        }
        match x {
            Bytes::U8(_) => [s.load_bytes::<false>(p), s.load_bytes::<false>(p.add(lanes))],
            Bytes::I8(_) => [s.load_bytes::<true>(p), s.load_bytes::<true>(p.add(lanes))],
        }
    }
}

/// Writes the first `cols` elements of two vectors, which lie in the range of the type.
///
/// # Safety
/// They must be writable.
#[inline(always)]
pub(crate) unsafe fn store_bytes<S: Simd>(s: S, y: *mut u8, v: [S::I32; 2], cols: usize, signed: bool) {
    let mut buffer = [0u8; 32];
    let whole = cols == 2 * S::LANES;
    let p = if whole { y } else { buffer.as_mut_ptr() };
    // SAFETY: promised by the caller.
    unsafe {
        if signed {
            s.store_bytes::<true>(p, v);
        } else {
            s.store_bytes::<false>(p, v);
        }
        if !whole {
            buffer.as_ptr().copy_to_nonoverlapping(y, cols);
        }
    }
}
