//! Recurrent layers: LSTM, GRU and the plain RNN.
//!
//! ```text
//! for each direction:
//!     XW = X W' + bias                      one matrix product for all steps
//!     for each step t, forwards or backwards:
//!         gates = H R' + XW[t]              R is packed once; one row of H is a matrix-vector product
//!         H, C  = cell(gates, H, C)         one pass over vectors that has all gates of an element in registers
//! ```
//!
//! A GRU whose reset gate acts before the product (`linear_before_reset = 0`) takes two products per step, since the
//! second one needs the reset gate. Rows whose sequence has ended keep their state.
//!
//! The vector pass knows the usual activations (sigmoid for gates, tanh elsewhere), without peepholes, clipping or
//! coupled gates. Everything else takes the plain loop, in `f64`; so does `f64` data.
//!
//! With 8-bit weights the left operand of each product is quantised by its own range first, as the operator
//! `DynamicQuantizeLSTM` wants it; all else is the same.

use crate::epilogue::{Activation, Epilogue};
use crate::error::{Error, Result};
use crate::gemm::{Matrix, PackedB, Rhs, gemm};
use crate::int8::{Bytes, Form, Output, PackedQ, QMatrix, qgemm};
use crate::math;
use crate::naive::{self, Number};
use crate::par::{Cx, DisjointMut};
use crate::quant::{self, Grid, Sharing};
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// Which layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Long short-term memory; gates in the order input, output, forget, cell.
    Lstm,
    /// Gated recurrent unit; gates in the order update, reset, hidden.
    Gru {
        /// Whether the reset gate multiplies the product of hidden state and weights instead of the hidden state.
        linear_before_reset: bool,
    },
    /// `h = f(x W' + h R' + b)`.
    Rnn,
}

impl Cell {
    /// Number of gates: rows of W and R are this many times the hidden size.
    pub fn gates(self) -> usize {
        match self {
            Cell::Lstm => 4,
            Cell::Gru { .. } => 3,
            Cell::Rnn => 1,
        }
    }
}

/// An activation of a gate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `max(x, 0)`.
    Relu,
    /// `tanh x`.
    Tanh,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `a x + b`.
    Affine(f32, f32),
    /// `x` above 0, `a x` below.
    LeakyRelu(f32),
    /// `x` above `a`, 0 elsewhere.
    ThresholdedRelu(f32),
    /// `a tanh(b x)`.
    ScaledTanh(f32, f32),
    /// `a x + b` within 0 and 1.
    HardSigmoid(f32, f32),
    /// `x` above 0, `a (e^x - 1)` below.
    Elu(f32),
    /// `x / (1 + |x|)`.
    Softsign,
    /// `log(1 + e^x)`.
    Softplus,
}

impl Gate {
    fn apply(self, x: f64) -> f64 {
        match self {
            Gate::Relu => x.max(0.0),
            Gate::Tanh => x.tanh(),
            Gate::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Gate::Affine(a, b) => f64::from(a) * x + f64::from(b),
            Gate::LeakyRelu(a) => x.max(0.0) + f64::from(a) * x.min(0.0),
            Gate::ThresholdedRelu(a) => {
                if x > f64::from(a) {
                    x
                } else {
                    0.0
                }
            }
            Gate::ScaledTanh(a, b) => f64::from(a) * (f64::from(b) * x).tanh(),
            Gate::HardSigmoid(a, b) => (f64::from(a) * x + f64::from(b)).clamp(0.0, 1.0),
            Gate::Elu(a) => {
                if x > 0.0 {
                    x
                } else {
                    f64::from(a) * x.exp_m1()
                }
            }
            Gate::Softsign => x / (1.0 + x.abs()),
            Gate::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        }
    }
}

/// A layer without its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Which layer.
    pub cell: Cell,
    /// Size of the hidden state.
    pub hidden: usize,
    /// One entry per direction: whether it goes from the last step to the first, and its activations (for gates, for the
    /// candidate, for the output of an LSTM; the RNN has one).
    pub directions: Vec<(bool, [Gate; 3])>,
    /// Inputs of activations stay within plus and minus this.
    pub clip: Option<f32>,
    /// LSTM: the forget gate is one minus the input gate.
    pub input_forget: bool,
    /// `[batch, steps, ...]` instead of `[steps, batch, ...]`, and `[batch, directions, hidden]` for states.
    pub batch_first: bool,
}

/// Sizes of one run.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Time steps.
    pub steps: usize,
    /// Sequences.
    pub batch: usize,
    /// Features of the input.
    pub input: usize,
}

/// What a run reads; D directions, B sequences, H the hidden size.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a, T> {
    /// `[steps, B, input]`.
    pub x: &'a [T],
    /// Valid steps of each sequence.
    pub lengths: Option<&'a [i32]>,
    /// `[D, B, H]`.
    pub initial_h: Option<&'a [T]>,
    /// `[D, B, H]`, LSTM only.
    pub initial_c: Option<&'a [T]>,
    /// Peepholes of an LSTM, `[D, 3 H]`: input, output, forget.
    pub peepholes: Option<&'a [T]>,
}

/// What a run writes.
#[derive(Debug)]
pub struct Results<'a, T> {
    /// `[steps, D, B, H]` (`[B, steps, D, H]` with the batch first).
    pub y: Option<&'a mut [T]>,
    /// `[D, B, H]`.
    pub last_h: Option<&'a mut [T]>,
    /// `[D, B, H]`, LSTM only.
    pub last_c: Option<&'a mut [T]>,
}

/// Weights of all directions, as the model has them.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a, T> {
    /// `[D, gates H, input]`.
    pub w: &'a [T],
    /// `[D, gates H, H]`.
    pub r: &'a [T],
    /// `[D, 2 gates H]`: of W, then of R.
    pub bias: Option<&'a [T]>,
}

/// 8-bit weights of all directions.
#[derive(Clone, Copy, Debug)]
pub struct Quantized<'a> {
    /// `[D, k, gates H]`: transposed, unlike [`Weights`].
    pub data: Bytes<'a>,
    /// One for each direction, or for each of its columns.
    pub scale: &'a [f32],
    /// The same.
    pub zero: &'a [i32],
}

impl Quantized<'_> {
    /// Packs direction `d` of `directions`, `k` x `n`.
    fn pack(&self, isa: Isa, form: Form, [d, directions]: [usize; 2], [k, n]: [usize; 2]) -> Result<PackedWeights> {
        let each = self.scale.len() / directions;
        let len = k.checked_mul(n).filter(|len| len.checked_mul(directions) == Some(self.data.len()));
        if (each != 1 && each != n) || each * directions != self.scale.len() || self.zero.len() != self.scale.len() {
            return Err(Error::new(format!(
                "{} scales and {} zero points for {directions} directions of {n} columns",
                self.scale.len(),
                self.zero.len()
            )));
        }
        let Some(len) = len else {
            return Err(Error::new(format!("{} weights for {directions} directions of {k} x {n}", self.data.len())));
        };
        let data = match self.data {
            Bytes::U8(x) => Bytes::U8(&x[d * len..][..len]),
            Bytes::I8(x) => Bytes::I8(&x[d * len..][..len]),
        };
        Ok(PackedWeights::Bytes {
            b: PackedQ::new(isa, form, QMatrix::new(data, k, n), &self.zero[d * each..][..each])?,
            scale: self.scale[d * each..][..each].to_vec(),
        })
    }
}

/// Weights of an LSTM whose products are of bytes.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedWeights<'a> {
    /// Of the input.
    pub w: Quantized<'a>,
    /// Of the hidden state.
    pub r: Quantized<'a>,
    /// `[D, 8 H]`: of W, then of R.
    pub bias: Option<&'a [f32]>,
}

/// Weights of all directions, packed.
#[derive(Debug)]
pub struct Packed(Vec<PackedDirection>);

#[derive(Debug)]
enum PackedWeights {
    Real(PackedB),
    Bytes { b: PackedQ, scale: Vec<f32> },
}

impl PackedWeights {
    fn k(&self) -> usize {
        match self {
            PackedWeights::Real(b) => b.k(),
            PackedWeights::Bytes { b, .. } => b.k(),
        }
    }
}

#[derive(Debug)]
struct PackedDirection {
    w: PackedWeights,
    r: PackedWeights,
    /// The rows of R of the candidate, for a GRU that resets before the product; `r` has the others.
    r_candidate: Option<PackedWeights>,
    bias: Bias<f32>,
}

/// The biases, added up as far as the cell allows.
#[derive(Debug)]
struct Bias<T> {
    /// Added to X W'.
    input: Vec<T>,
    /// Added to H R': zero but for a GRU that resets after the product.
    hidden: Option<Vec<T>>,
}

impl<T: Number> Bias<T> {
    fn new(layer: &Layer, bias: Option<&[T]>) -> Self {
        let n = layer.cell.gates() * layer.hidden;
        let Some(bias) = bias else { return Bias { input: vec![T::ZERO; n], hidden: None } };
        let (of_w, of_r) = bias.split_at(n);
        let apart = match layer.cell {
            Cell::Gru { linear_before_reset: true } => 2 * layer.hidden..n,
            _ => n..n,
        };
        let input = (0..n).map(|i| if apart.contains(&i) { of_w[i] } else { of_w[i].plus(of_r[i]) }).collect();
        let hidden = (0..n).map(|i| if apart.contains(&i) { of_r[i] } else { T::ZERO }).collect();
        Bias { input, hidden: (!apart.is_empty()).then_some(hidden) }
    }
}

/// The products of one direction: of W, of R, and of the rows of R that a GRU wants apart.
#[derive(Clone, Copy)]
enum Which {
    Input,
    Hidden,
    Candidate,
}

/// Whether a row counts for the range of the rows.
type Counts<'a> = &'a dyn Fn(usize) -> bool;

/// Products and cells in the arithmetic of one element type.
trait Backend<T> {
    /// `c = a weights' + bias? + add?`, rows of c and `add` being `ld` apart. Where `a` gets quantised, the rows that
    /// `counts` names decide its range.
    fn product(
        &self,
        d: usize,
        which: Which,
        a: &[T],
        counts: Counts,
        add: Option<&[T]>,
        c: &mut [T],
        ld: usize,
    ) -> Result<()>;
    /// The reset gate times the hidden state, of a GRU that resets before the product, in vectors; whether there is such a
    /// form.
    fn reset(&self, _gates: &[T], _h: &[T], _out: &mut [T]) -> bool {
        false
    }
    /// The step of a cell with all gates given, in vectors; whether there is such a form.
    fn step(&self, _gates: &[T], _add: &[T], _c: &mut [T], _h: &mut [T], _alive: &dyn Fn(usize) -> bool) -> bool {
        false
    }
}

impl Layer {
    /// Whether the vector pass can be taken.
    fn is_usual(&self, d: usize, peepholes: bool) -> bool {
        let plain = self.clip.is_none() && !self.input_forget && !peepholes;
        let gates = self.directions.get(d).map(|(_, g)| *g);
        plain
            && match (self.cell, gates) {
                (Cell::Rnn, Some(g)) => g[0] == Gate::Tanh,
                (Cell::Lstm, Some(g)) => g == [Gate::Sigmoid, Gate::Tanh, Gate::Tanh],
                (Cell::Gru { .. }, Some(g)) => g[..2] == [Gate::Sigmoid, Gate::Tanh],
                _ => false,
            }
    }

    fn check_weights<T>(&self, input: usize, weights: &Weights<'_, T>) -> Result<usize> {
        let (d, h) = (self.directions.len(), self.hidden);
        let rows = self.cell.gates().checked_mul(h).ok_or_else(|| Error::new("the hidden size is too large"))?;
        let size = |cols: usize| rows.checked_mul(cols).and_then(|n| n.checked_mul(d));
        let fits = size(input) == Some(weights.w.len())
            && size(h) == Some(weights.r.len())
            && weights.bias.is_none_or(|b| size(2) == Some(b.len()));
        if fits && h > 0 {
            return Ok(rows);
        }
        Err(Error::new(format!(
            "recurrent weights of {} and {} elements for {d} directions of {input} inputs and {h} hidden values",
            weights.w.len(),
            weights.r.len()
        )))
    }

    /// Packs weights.
    ///
    /// # Errors
    /// If sizes do not fit together.
    pub fn pack(&self, isa: Isa, input: usize, weights: &Weights<'_, f32>) -> Result<Packed> {
        let (rows, h) = (self.check_weights(input, weights)?, self.hidden);
        let apart = self.cell == Cell::Gru { linear_before_reset: false };
        let pack = |data: &[f32], cols: usize| {
            PackedB::new(isa, Matrix::new(data, data.len() / cols.max(1), cols).transposed()).map(PackedWeights::Real)
        };
        let of = |d: usize| -> Result<PackedDirection> {
            let r = &weights.r[d * rows * h..][..rows * h];
            let (r, candidate) = if apart { r.split_at(2 * h * h) } else { (r, &r[..0]) };
            Ok(PackedDirection {
                w: PackedWeights::Real(PackedB::new(
                    isa,
                    Matrix::new(&weights.w[d * rows * input..][..rows * input], rows, input).transposed(),
                )?),
                r: pack(r, h)?,
                r_candidate: if apart { Some(pack(candidate, h)?) } else { None },
                bias: Bias::new(self, weights.bias.map(|b| &b[d * 2 * rows..][..2 * rows])),
            })
        };
        Ok(Packed((0..self.directions.len()).map(of).collect::<Result<_>>()?))
    }

    /// Packs the 8-bit weights of an LSTM.
    ///
    /// # Errors
    /// If it is none, or sizes do not fit together.
    pub fn pack_quantized(&self, isa: Isa, form: Form, input: usize, weights: &QuantizedWeights<'_>) -> Result<Packed> {
        let (h, directions) = (self.hidden, self.directions.len());
        let rows = h.checked_mul(4).filter(|&rows| rows > 0 && self.cell == Cell::Lstm);
        let rows =
            rows.ok_or_else(|| Error::new(format!("8-bit weights of {:?} with {h} hidden values", self.cell)))?;
        let bias_len = rows.checked_mul(2).and_then(|n| n.checked_mul(directions));
        if weights.bias.is_some_and(|b| bias_len != Some(b.len())) {
            return Err(Error::new(format!("a bias of another length than 8 x {h} for {directions} directions")));
        }
        let of = |d: usize| -> Result<PackedDirection> {
            Ok(PackedDirection {
                w: weights.w.pack(isa, form, [d, directions], [input, rows])?,
                r: weights.r.pack(isa, form, [d, directions], [h, rows])?,
                r_candidate: None,
                bias: Bias::new(self, weights.bias.map(|b| &b[d * 2 * rows..][..2 * rows])),
            })
        };
        Ok(Packed((0..directions).map(of).collect::<Result<_>>()?))
    }

    /// Runs the layer on `f32`.
    ///
    /// # Errors
    /// If sizes do not fit together or a length is not within the steps.
    pub fn run(
        &self,
        cx: &Cx,
        packed: &Packed,
        sizes: Sizes,
        operands: &Operands<'_, f32>,
        results: &mut Results<'_, f32>,
    ) -> Result<()> {
        let needed = self.check_operands(sizes, operands, results)?;
        if packed.0.len() != self.directions.len() {
            return Err(Error::new("weights of another layer"));
        }
        cx.with_workspace(needed, |work| {
            for d in 0..self.directions.len() {
                let usual = self.is_usual(d, operands.peepholes.is_some());
                let backend = Vectors { cx, packed, cell: self.cell, hidden: self.hidden, usual };
                self.direction(d, &backend, sizes, operands, work, results)?;
            }
            Ok(())
        })
    }

    /// Runs the layer on any float, in plain loops.
    ///
    /// # Errors
    /// If sizes do not fit together or a length is not within the steps.
    pub fn run_any<T: Number>(
        &self,
        weights: &Weights<'_, T>,
        sizes: Sizes,
        operands: &Operands<'_, T>,
        results: &mut Results<'_, T>,
    ) -> Result<()> {
        let rows = self.check_weights(sizes.input, weights)?;
        let needed = self.check_operands(sizes, operands, results)?;
        let bias = |d: usize| Bias::new(self, weights.bias.map(|b| &b[d * 2 * rows..][..2 * rows]));
        let bias = (0..self.directions.len()).map(bias).collect();
        let backend = Plain { layer: self, weights, input: sizes.input, bias };
        let mut work = vec![T::ZERO; needed];
        for d in 0..self.directions.len() {
            self.direction(d, &backend, sizes, operands, &mut work, results)?;
        }
        Ok(())
    }

    /// Checks sizes; returns the elements of workspace that [`Self::direction`] wants.
    fn check_operands<T>(&self, sizes: Sizes, o: &Operands<'_, T>, r: &Results<'_, T>) -> Result<usize> {
        let Sizes { steps, batch, input } = sizes;
        let (d, h, gates) = (self.directions.len(), self.hidden, self.cell.gates());
        let count = |list: &[usize]| list.iter().try_fold(1usize, |n, &x| n.checked_mul(x));
        let state = count(&[d, batch, h]);
        let is = |x: Option<usize>, wanted: Option<usize>| x.is_none() || x == wanted;
        let fits = count(&[steps, batch, input]) == Some(o.x.len())
            && o.lengths.is_none_or(|l| l.len() == batch)
            && is(o.initial_h.map(<[T]>::len), state)
            && is(o.initial_c.map(<[T]>::len), state)
            && is(o.peepholes.map(<[T]>::len), count(&[d, 3, h]))
            && is(r.y.as_ref().map(|y| y.len()), count(&[steps, d, batch, h]))
            && is(r.last_h.as_ref().map(|y| y.len()), state)
            && is(r.last_c.as_ref().map(|y| y.len()), state);
        if !fits {
            return Err(Error::new(format!(
                "operands of a recurrent layer do not have {steps} steps, {batch} sequences, {input} inputs, {h} hidden values"
            )));
        }
        if let Some(&bad) = o.lengths.unwrap_or(&[]).iter().find(|&&l| usize::try_from(l).map_or(true, |l| l > steps)) {
            return Err(Error::new(format!("a sequence of length {bad} where there are {steps} steps")));
        }
        // X W', gates and what is added to them, h, c, and the reset hidden state.
        let rows = steps.checked_add(2).and_then(|n| n.checked_mul(gates)).and_then(|n| n.checked_add(3));
        rows.and_then(|n| count(&[n, batch, h])).ok_or_else(|| Error::new("a recurrent layer larger than memory"))
    }

    fn direction<T: Number>(
        &self,
        d: usize,
        backend: &impl Backend<T>,
        Sizes { steps, batch, input }: Sizes,
        o: &Operands<'_, T>,
        work: &mut [T],
        results: &mut Results<'_, T>,
    ) -> Result<()> {
        let (h, directions) = (self.hidden, self.directions.len());
        let (reverse, activations) = self.directions[d];
        let g = self.cell.gates() * h;
        let (xw, work) = work.split_at_mut(steps * batch * g);
        let (gates, work) = work.split_at_mut(batch * g);
        let (gathered, work) = work.split_at_mut(batch * g);
        let (hs, work) = work.split_at_mut(batch * h);
        let (cs, reset) = work.split_at_mut(batch * h);
        let reset = &mut reset[..batch * h];

        // Where the state of a sequence lies.
        let state_at = |b: usize| if self.batch_first { (b * directions + d) * h } else { (d * batch + b) * h };
        for (state, initial) in [(&mut *hs, o.initial_h), (&mut *cs, o.initial_c)] {
            match initial {
                None => state.fill(T::ZERO),
                Some(from) => {
                    (0..batch).for_each(|b| state[b * h..][..h].copy_from_slice(&from[state_at(b)..][..h]));
                }
            }
        }
        if steps * batch > 0 && input > 0 {
            // Steps behind the longest sequence are read by nobody. Only layers with the steps first have 8-bit weights.
            let longest = o.lengths.and_then(|l| l.iter().max()).map_or(steps, |&l| usize::try_from(l).unwrap_or(0));
            backend.product(d, Which::Input, o.x, &|row| row < longest * batch, None, xw, g)?;
        } else if steps * batch > 0 {
            return Err(Error::new("a recurrent layer without input features"));
        }
        let length = |b: usize| o.lengths.map_or(steps, |l| usize::try_from(l[b]).unwrap_or(0));
        if let (Some(y), Some(_)) = (&mut results.y, o.lengths) {
            for b in 0..batch {
                for t in length(b)..steps {
                    y[self.y_at(t, b, d, steps, batch)..][..h].fill(T::ZERO);
                }
            }
        }
        let peepholes = o.peepholes.map(|p| &p[d * 3 * h..][..3 * h]);
        // With one sequence the rows of a step lie together whatever the layout.
        let together = o.lengths.is_none() && (!self.batch_first || batch == 1);
        for s in 0..steps {
            let alive = |b: usize| s < length(b);
            // The state of a sequence that ended before the last step is read by nobody.
            let counts = |b: usize| s <= length(b);
            let time = |b: usize| if reverse { (length(b).max(1) - 1).saturating_sub(s) } else { s };
            let add: &[T] = if together {
                &xw[time(0) * batch * g..][..batch * g]
            } else {
                for b in 0..batch {
                    let row = if self.batch_first { b * steps + time(b) } else { time(b) * batch + b };
                    gathered[b * g..][..g].copy_from_slice(&xw[row * g..][..g]);
                }
                gathered
            };
            let cell = PlainCell { layer: self, activations, peepholes };
            match self.cell {
                Cell::Gru { linear_before_reset: false } => {
                    backend.product(d, Which::Hidden, hs, &counts, Some(add), gates, g)?;
                    if !backend.reset(gates, hs, reset) {
                        cell.reset(gates, hs, reset);
                    }
                    backend.product(
                        d,
                        Which::Candidate,
                        reset,
                        &counts,
                        Some(&add[2 * h..]),
                        &mut gates[2 * h..],
                        g,
                    )?;
                }
                Cell::Gru { .. } => backend.product(d, Which::Hidden, hs, &counts, None, gates, g)?,
                Cell::Lstm | Cell::Rnn => backend.product(d, Which::Hidden, hs, &counts, Some(add), gates, g)?,
            }
            if !backend.step(gates, add, cs, hs, &alive) {
                for b in (0..batch).filter(|&b| alive(b)) {
                    let (gates, add) = (&gates[b * g..][..g], &add[b * g..][..g]);
                    cell.step(gates, add, &mut cs[b * h..][..h], &mut hs[b * h..][..h]);
                }
            }
            if let Some(y) = &mut results.y {
                for b in (0..batch).filter(|&b| alive(b)) {
                    y[self.y_at(time(b), b, d, steps, batch)..][..h].copy_from_slice(&hs[b * h..][..h]);
                }
            }
        }
        for (state, last) in [(hs, &mut results.last_h), (cs, &mut results.last_c)] {
            if let Some(last) = last {
                (0..batch).for_each(|b| last[state_at(b)..][..h].copy_from_slice(&state[b * h..][..h]));
            }
        }
        Ok(())
    }

    /// Where the hidden state after a step lies in the output.
    fn y_at(&self, t: usize, b: usize, d: usize, steps: usize, batch: usize) -> usize {
        let directions = self.directions.len();
        let row = if self.batch_first { (b * steps + t) * directions + d } else { (t * directions + d) * batch + b };
        row * self.hidden
    }
}

/// The cells of one direction in `f64`, element by element.
struct PlainCell<'a, T> {
    layer: &'a Layer,
    activations: [Gate; 3],
    peepholes: Option<&'a [T]>,
}

impl<T: Number> PlainCell<'_, T> {
    fn activate(&self, which: usize, x: f64) -> f64 {
        let clip = self.layer.clip.map_or(f64::INFINITY, f64::from);
        self.activations[which].apply(x.max(-clip).min(clip))
    }

    /// The reset gate times the hidden state.
    fn reset(&self, gates: &[T], hs: &[T], out: &mut [T]) {
        let h = self.layer.hidden;
        for (i, (out, hidden)) in out.iter_mut().zip(hs).enumerate() {
            let r = self.activate(0, gates[i / h * 3 * h + h + i % h].to_f64());
            *out = T::from_f64(r * hidden.to_f64());
        }
    }

    fn step(&self, gates: &[T], add: &[T], c: &mut [T], hs: &mut [T]) {
        let h = self.layer.hidden;
        let gate = |i: usize, j: usize| gates[i * h + j].to_f64();
        let peep = |i: usize, j: usize| self.peepholes.map_or(0.0, |p| p[i * h + j].to_f64());
        for j in 0..h {
            let before = hs[j].to_f64();
            let y = match self.layer.cell {
                Cell::Rnn => self.activate(0, gate(0, j)),
                Cell::Lstm => {
                    let old = c[j].to_f64();
                    let i = self.activate(0, gate(0, j) + peep(0, j) * old);
                    let f = match self.layer.input_forget {
                        true => 1.0 - i,
                        false => self.activate(0, gate(2, j) + peep(2, j) * old),
                    };
                    let new = f * old + i * self.activate(1, gate(3, j));
                    c[j] = T::from_f64(new);
                    self.activate(0, gate(1, j) + peep(1, j) * new) * self.activations[2].apply(new)
                }
                Cell::Gru { linear_before_reset } => {
                    let of_x = |i: usize| if linear_before_reset { add[i * h + j].to_f64() } else { 0.0 };
                    let z = self.activate(0, gate(0, j) + of_x(0));
                    let candidate = match linear_before_reset {
                        true => of_x(2) + self.activate(0, gate(1, j) + of_x(1)) * gate(2, j),
                        false => gate(2, j),
                    };
                    (1.0 - z) * self.activate(1, candidate) + z * before
                }
            };
            hs[j] = T::from_f64(y);
        }
    }
}

struct Plain<'a, T> {
    layer: &'a Layer,
    weights: &'a Weights<'a, T>,
    input: usize,
    bias: Vec<Bias<T>>,
}

impl<T: Number> Backend<T> for Plain<'_, T> {
    fn product(
        &self,
        d: usize,
        which: Which,
        a: &[T],
        _: Counts,
        add: Option<&[T]>,
        c: &mut [T],
        ld: usize,
    ) -> Result<()> {
        let h = self.layer.hidden;
        let rows = self.layer.cell.gates() * h;
        let apart = self.layer.cell == Cell::Gru { linear_before_reset: false };
        let r = &self.weights.r[d * rows * h..][..rows * h];
        let bias = &self.bias[d];
        let (b, k, bias) = match which {
            Which::Input => {
                (&self.weights.w[d * rows * self.input..][..rows * self.input], self.input, Some(&bias.input))
            }
            Which::Hidden => (if apart { &r[..2 * h * h] } else { r }, h, bias.hidden.as_ref()),
            Which::Candidate => (&r[2 * h * h..], h, None),
        };
        let n = b.len() / k;
        for (i, row) in a.chunks_exact(k).enumerate() {
            let c = &mut c[i * ld..][..n];
            naive::matmul(row, [k, 1], b, [1, k], c, [1, n, k]);
            for (j, c) in c.iter_mut().enumerate() {
                *c = c.plus(bias.map_or(T::ZERO, |b| b[j])).plus(add.map_or(T::ZERO, |a| a[i * ld + j]));
            }
        }
        Ok(())
    }
}

struct Vectors<'a> {
    cx: &'a Cx<'a>,
    packed: &'a Packed,
    cell: Cell,
    hidden: usize,
    usual: bool,
}

impl Vectors<'_> {
    /// `c = a b scale + bias + add`, with `a` quantised by the range of the rows that `counts` names.
    fn quantized(
        &self,
        a: &[f32],
        counts: Counts,
        (b, scale): (&PackedQ, &[f32]),
        bias: Option<&[f32]>,
        add: Option<&[f32]>,
        c: &mut [f32],
    ) -> Result<()> {
        let counted = a.chunks_exact(b.k()).enumerate().filter(|(row, _)| counts(*row)).map(|(_, row)| row);
        let (a_scale, a_zero) = quant::dynamic_range(counted);
        let (rows, bytes) = (a.len() / b.k(), a.len().div_ceil(4));
        self.cx.with_workspace(bytes + scale.len(), |work| {
            let (q, factor) = work.split_at_mut(bytes);
            let q = &mut bytemuck::cast_slice_mut::<f32, u8>(q)[..a.len()];
            let grid = Grid { outer: 1, n: 1, inner: a.len(), sharing: Sharing::Tensor };
            quant::quantize(self.cx, a, &grid, &[a_scale], Some(&[a_zero]), [0.0, 255.0], q)?;
            factor.iter_mut().zip(scale).for_each(|(f, s)| *f = a_scale * s);
            let a = QMatrix::new(Bytes::U8(q), rows, b.k());
            let activation = Activation::Identity;
            let real = Output::Real { scale: factor, bias, residual: add, activation, y: &mut c[..rows * b.n()] };
            qgemm(self.cx, a, a_zero.into(), b, None, real)
        })
    }
}

impl Backend<f32> for Vectors<'_> {
    fn product(
        &self,
        d: usize,
        which: Which,
        a: &[f32],
        counts: Counts,
        add: Option<&[f32]>,
        c: &mut [f32],
        ld: usize,
    ) -> Result<()> {
        let p = &self.packed.0[d];
        let (b, bias) = match which {
            Which::Input => (&p.w, Some(p.bias.input.as_slice())),
            Which::Hidden => (&p.r, p.bias.hidden.as_deref()),
            Which::Candidate => (p.r_candidate.as_ref().unwrap_or(&p.r), None),
        };
        let k = b.k();
        let b = match b {
            PackedWeights::Real(b) => b,
            PackedWeights::Bytes { b, scale } => {
                let add = add.map(|add| &add[..a.len() / k * b.n()]);
                return self.quantized(a, counts, (b, scale), bias, add, c);
            }
        };
        let epilogue = Epilogue { bias, residual: add, activation: Activation::Identity };
        gemm(self.cx, Matrix::new(a, a.len() / k, k), Rhs::Packed(b), &epilogue, c, ld)
    }

    fn reset(&self, gates: &[f32], h: &[f32], out: &mut [f32]) -> bool {
        if !self.usual {
            return false;
        }
        let n = self.hidden;
        for ((gates, h), out) in gates.chunks_exact(3 * n).zip(h.chunks_exact(n)).zip(out.chunks_exact_mut(n)) {
            dispatch(self.cx.isa(), ResetKernel { gate: &gates[n..2 * n], h, out });
        }
        true
    }

    fn step(&self, gates: &[f32], add: &[f32], c: &mut [f32], h: &mut [f32], alive: &dyn Fn(usize) -> bool) -> bool {
        if !self.usual {
            return false;
        }
        let (n, g) = (self.hidden, self.cell.gates() * self.hidden);
        let batch = h.len() / n;
        let rows_per_task = (2048 / n).max(1);
        let tasks = batch.div_ceil(rows_per_task);
        // Which rows live is asked here: the answer may not come from another thread.
        if tasks == 1 {
            for b in (0..batch).filter(|&b| alive(b)) {
                let (c, h) = (&mut c[b * n..][..n], &mut h[b * n..][..n]);
                let (gates, add) = (&gates[b * g..][..g], &add[b * g..][..g]);
                dispatch(self.cx.isa(), CellKernel { cell: self.cell, gates, add, c, h });
            }
            return true;
        }
        let live: Vec<bool> = (0..batch).map(alive).collect();
        let (c, h) = (DisjointMut::new(c), DisjointMut::new(h));
        self.cx.for_each(tasks, 60 * (batch * n) as u64, &|task| {
            for b in (task * rows_per_task..batch.min((task + 1) * rows_per_task)).filter(|&b| live[b]) {
                // SAFETY: each task has its own rows.
                let (c, h) = unsafe { (c.range(b * n, n), h.range(b * n, n)) };
                let (gates, add) = (&gates[b * g..][..g], &add[b * g..][..g]);
                dispatch(self.cx.isa(), CellKernel { cell: self.cell, gates, add, c, h });
            }
        });
        true
    }
}

/// `out = sigmoid(gate) h`.
struct ResetKernel<'a> {
    gate: &'a [f32],
    h: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for ResetKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let parts = self.gate.chunks(S::LANES).zip(self.h.chunks(S::LANES)).zip(self.out.chunks_mut(S::LANES));
        for ((gate, h), out) in parts {
            s.store_partial(out, s.mul(math::sigmoid(s, s.load_partial(gate)), s.load_partial(h)));
        }
    }
}

/// One sequence's step with the usual activations.
struct CellKernel<'a> {
    cell: Cell,
    gates: &'a [f32],
    add: &'a [f32],
    c: &'a mut [f32],
    h: &'a mut [f32],
}

impl Kernel for CellKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let CellKernel { cell, gates, add, c, h } = self;
        let n = h.len();
        let mut j = 0;
        while j < n {
            let len = S::LANES.min(n - j);
            let gate = |i: usize| s.load_partial(&gates[i * n + j..][..len]);
            let h = &mut h[j..][..len];
            match cell {
                Cell::Rnn => s.store_partial(h, math::tanh(s, gate(0))),
                Cell::Lstm => {
                    let c = &mut c[j..][..len];
                    let kept = s.mul(math::sigmoid(s, gate(2)), s.load_partial(c));
                    let new = s.mul_add(math::sigmoid(s, gate(0)), math::tanh(s, gate(3)), kept);
                    s.store_partial(c, new);
                    s.store_partial(h, s.mul(math::sigmoid(s, gate(1)), math::tanh(s, new)));
                }
                Cell::Gru { linear_before_reset: false } => {
                    let z = math::sigmoid(s, gate(0));
                    let candidate = math::tanh(s, gate(2));
                    // As below.
                    let before = s.load_partial(h);
                    s.store_partial(h, s.mul_add(z, s.sub(before, candidate), candidate));
                }
                Cell::Gru { linear_before_reset: true } => {
                    let of_x = |i: usize| s.load_partial(&add[i * n + j..][..len]);
                    let z = math::sigmoid(s, s.add(gate(0), of_x(0)));
                    let r = math::sigmoid(s, s.add(gate(1), of_x(1)));
                    let candidate = math::tanh(s, s.mul_add(r, gate(2), of_x(2)));
                    // (1 - z) candidate + z h, with one product less.
                    let before = s.load_partial(h);
                    s.store_partial(h, s.mul_add(z, s.sub(before, candidate), candidate));
                }
            }
            j += S::LANES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{each_context, integers};

    fn values(len: usize, seed: u32) -> Vec<f32> {
        integers(len, seed).iter().map(|x| x * 0.11).collect()
    }

    fn widen(x: &[f32]) -> Vec<f64> {
        x.iter().copied().map(f64::from).collect()
    }

    /// Both forms of every cell, in both directions, with and without lengths, against the plain loops in `f64`.
    #[test]
    fn vectors_agree_with_plain_loops() {
        let usual = [Gate::Sigmoid, Gate::Tanh, Gate::Tanh];
        let odd = [Gate::HardSigmoid(0.2, 0.5), Gate::Softsign, Gate::Elu(0.7)];
        let cells = [
            (Cell::Lstm, usual),
            (Cell::Lstm, odd),
            (Cell::Gru { linear_before_reset: true }, usual),
            (Cell::Gru { linear_before_reset: false }, usual),
            (Cell::Rnn, [Gate::Tanh; 3]),
        ];
        each_context(|cx| {
            for (cell, gates) in cells {
                for (hidden, batch, batch_first) in [(1, 1, false), (17, 3, false), (16, 3, true), (64, 70, false)] {
                    let layer = Layer {
                        cell,
                        hidden,
                        directions: vec![(false, gates), (true, gates)],
                        clip: None,
                        input_forget: false,
                        batch_first,
                    };
                    let sizes = Sizes { steps: 4, batch, input: 5 };
                    let rows = cell.gates() * hidden;
                    let (w, r, b) = (values(2 * rows * 5, 1), values(2 * rows * hidden, 2), values(4 * rows, 3));
                    let r: Vec<f32> = r.iter().map(|x| x / hidden as f32).collect();
                    let (x, h0) = (values(4 * batch * 5, 4), values(2 * batch * hidden, 5));
                    let lengths: Vec<i32> = (0..batch).map(|i| [4, 0, 2][i % 3]).collect();
                    for lengths in [None, Some(lengths.as_slice())] {
                        let (mut y, mut last) = (vec![9.0; 8 * batch * hidden], vec![9.0; 2 * batch * hidden]);
                        let packed = layer.pack(cx.isa(), 5, &Weights { w: &w, r: &r, bias: Some(&b) }).unwrap();
                        let o =
                            Operands { x: &x, lengths, initial_h: Some(&h0), initial_c: Some(&h0), peepholes: None };
                        let mut out = Results { y: Some(&mut y), last_h: Some(&mut last), last_c: None };
                        layer.run(cx, &packed, sizes, &o, &mut out).unwrap();

                        let (w, r, b, x, h0) = (widen(&w), widen(&r), widen(&b), widen(&x), widen(&h0));
                        let (mut want, mut want_last) = (vec![7.0; y.len()], vec![7.0; last.len()]);
                        let o =
                            Operands { x: &x, lengths, initial_h: Some(&h0), initial_c: Some(&h0), peepholes: None };
                        let mut out = Results { y: Some(&mut want), last_h: Some(&mut want_last), last_c: None };
                        layer.run_any(&Weights { w: &w, r: &r, bias: Some(&b) }, sizes, &o, &mut out).unwrap();
                        for (got, want) in y.iter().zip(&want).chain(last.iter().zip(&want_last)) {
                            assert!((f64::from(*got) - want).abs() < 2e-6, "{cell:?} {hidden}: {got} for {want}");
                        }
                    }
                }
            }
        });
    }

    /// Both directions of an LSTM with 8-bit weights against the formulas, with operands quantised one by one.
    #[test]
    fn eight_bit_products_agree_with_the_formulas() {
        const I: usize = 3;
        const H: usize = 5;
        const B: usize = 2;
        const T: usize = 3;
        let gates = [Gate::Sigmoid, Gate::Tanh, Gate::Tanh];
        let layer = Layer {
            cell: Cell::Lstm,
            hidden: H,
            directions: vec![(false, gates), (true, gates)],
            clip: None,
            input_forget: false,
            batch_first: false,
        };
        let bytes = |len, seed| -> Vec<i8> { integers(len, seed).iter().map(|&v| (v * 15.0) as i8).collect() };
        let (w, r) = (bytes(2 * I * 4 * H, 1), bytes(2 * H * 4 * H, 2));
        let w_scale: Vec<f32> = (0..2 * 4 * H).map(|i| 0.01 + i as f32 * 0.0003).collect();
        let (r_scale, w_zero) = ([0.011, 0.013], vec![3; 2 * 4 * H]);
        let (bias, x) = (values(2 * 8 * H, 3), values(T * B * I, 4));
        let lengths = [3, 1];
        // In f32, as the kernel: where a number lies between two steps must not depend on the arithmetic.
        let quantize = |rows: &[f32], counted: &[f32]| -> (Vec<i32>, f64) {
            let (scale, zero) = quant::dynamic_range([counted]);
            let q = rows.iter().map(|v| ((v / scale).round_ties_even() + f32::from(zero)).clamp(0.0, 255.0));
            (q.map(|q| q as i32 - i32::from(zero)).collect(), f64::from(scale))
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let mut want = vec![0.0; T * 2 * B * H];
        for d in 0..2 {
            let (mut h, mut c) = (vec![0f32; B * H], vec![0f64; B * H]);
            let (qx, x_scale) = quantize(&x, &x);
            for s in 0..T {
                let counted: Vec<f32> =
                    (0..B).filter(|&b| s <= lengths[b]).flat_map(|b| h[b * H..][..H].to_vec()).collect();
                let (qh, h_scale) = quantize(&h, &counted);
                for b in (0..B).filter(|&b| s < lengths[b]) {
                    let t = if d == 1 { lengths[b] - 1 - s } else { s };
                    let gate = |g: usize, j: usize| {
                        let column = g * H + j;
                        let of_w = |k: usize| i32::from(w[(d * I + k) * 4 * H + column]) - 3;
                        let of_r = |k: usize| i32::from(r[(d * H + k) * 4 * H + column]);
                        let from_x: i32 = (0..I).map(|k| qx[(t * B + b) * I + k] * of_w(k)).sum();
                        let from_h: i32 = (0..H).map(|k| qh[b * H + k] * of_r(k)).sum();
                        let at = d * 8 * H + column;
                        f64::from(from_x) * x_scale * f64::from(w_scale[d * 4 * H + column])
                            + f64::from(from_h) * h_scale * f64::from(r_scale[d])
                            + f64::from(bias[at])
                            + f64::from(bias[at + 4 * H])
                    };
                    for j in 0..H {
                        let new = sigmoid(gate(2, j)) * c[b * H + j] + sigmoid(gate(0, j)) * gate(3, j).tanh();
                        c[b * H + j] = new;
                        want[((t * 2 + d) * B + b) * H + j] = sigmoid(gate(1, j)) * new.tanh();
                    }
                }
                for b in (0..B).filter(|&b| s < lengths[b]) {
                    let t = if d == 1 { lengths[b] - 1 - s } else { s };
                    for j in 0..H {
                        h[b * H + j] = want[((t * 2 + d) * B + b) * H + j] as f32;
                    }
                }
            }
        }
        each_context(|cx| {
            let weights = QuantizedWeights {
                w: Quantized { data: Bytes::I8(&w), scale: &w_scale, zero: &w_zero },
                r: Quantized { data: Bytes::I8(&r), scale: &r_scale, zero: &[0, 0] },
                bias: Some(&bias),
            };
            for form in Form::available(cx.isa()) {
                let packed = layer.pack_quantized(cx.isa(), form, I, &weights).unwrap();
                let lengths = [3, 1];
                let o = Operands { x: &x, lengths: Some(&lengths), initial_h: None, initial_c: None, peepholes: None };
                let mut y = vec![9.0; want.len()];
                let mut out = Results { y: Some(&mut y), last_h: None, last_c: None };
                layer.run(cx, &packed, Sizes { steps: T, batch: B, input: I }, &o, &mut out).unwrap();
                for (i, (got, want)) in y.iter().zip(&want).enumerate() {
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{} {i}: {got} for {want}", cx.isa());
                }
                let wrong = QuantizedWeights { r: Quantized { scale: &[1.0; 3], ..weights.r }, ..weights };
                assert!(layer.pack_quantized(cx.isa(), form, I, &wrong).is_err());
            }
        });
    }

    /// One element of each cell by the formulas of the specification.
    #[test]
    fn one_step_by_hand() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let run = |cell: Cell, w: &[f64], r: &[f64], b: &[f64]| {
            let gates = [Gate::Sigmoid, Gate::Tanh, Gate::Tanh];
            let gates = if cell == Cell::Rnn { [Gate::Tanh; 3] } else { gates };
            let layer = Layer {
                cell,
                hidden: 1,
                directions: vec![(false, gates)],
                clip: None,
                input_forget: false,
                batch_first: false,
            };
            let mut y = [0.0];
            let o = Operands {
                x: &[2.0],
                lengths: None,
                initial_h: Some(&[0.5]),
                initial_c: Some(&[-0.25]),
                peepholes: None,
            };
            let mut out = Results { y: Some(&mut y), last_h: None, last_c: None };
            let sizes = Sizes { steps: 1, batch: 1, input: 1 };
            layer.run_any(&Weights { w, r, bias: Some(b) }, sizes, &o, &mut out).unwrap();
            y[0]
        };
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} and {b}");
        close(run(Cell::Rnn, &[0.3], &[0.4], &[0.1, 0.2]), (0.6f64 + 0.2 + 0.3).tanh());
        let (w, r) = ([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]);
        let at = |i: usize| w[i] * 2.0 + r[i] * 0.5 + 0.1;
        let c = sigmoid(at(2)) * -0.25 + sigmoid(at(0)) * at(3).tanh();
        close(run(Cell::Lstm, &w, &r, &[0.05; 8]), sigmoid(at(1)) * c.tanh());
        let (z, reset) = (sigmoid(at(0)), sigmoid(at(1)));
        let after = (0.6 + 0.05 + reset * (0.7 * 0.5 + 0.05)).tanh();
        let before = (0.6 + 0.1 + reset * 0.5 * 0.7).tanh();
        let gru = |linear_before_reset| run(Cell::Gru { linear_before_reset }, &w[..3], &r[..3], &[0.05; 6]);
        close(gru(true), (1.0 - z) * after + z * 0.5);
        close(gru(false), (1.0 - z) * before + z * 0.5);
    }

    #[test]
    fn sizes_are_checked() {
        let layer = Layer {
            cell: Cell::Rnn,
            hidden: 2,
            directions: vec![(false, [Gate::Tanh; 3])],
            clip: None,
            input_forget: false,
            batch_first: false,
        };
        let weights = Weights { w: &[0.0; 4], r: &[0.0; 4], bias: None };
        let mut y = [0.0f64; 2];
        let mut run = |x: &[f64], lengths: Option<&[i32]>| {
            let o = Operands { x, lengths, initial_h: None, initial_c: None, peepholes: None };
            let mut out = Results { y: Some(&mut y), last_h: None, last_c: None };
            layer.run_any(&weights, Sizes { steps: 1, batch: 1, input: 2 }, &o, &mut out)
        };
        assert!(run(&[0.0; 2], None).is_ok());
        assert!(run(&[0.0; 3], None).is_err());
        assert!(run(&[0.0; 2], Some(&[2])).is_err());
        assert!(run(&[0.0; 2], Some(&[-1])).is_err());
    }
}
