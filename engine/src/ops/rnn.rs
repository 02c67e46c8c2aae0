//! LSTM, GRU and RNN.

use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::tensor::{DType, Element, Tensor, TensorMut, TensorView};
use std::sync::Arc;
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;
use weblane_kernels::rnn::{Cell, Gate, Layer, Operands, Packed, Results, Sizes, Weights};

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("LSTM", 7, parse), Registration::onnx("GRU", 7, parse), Registration::onnx("RNN", 7, parse)];

/// A recurrent layer: operands X, W, R, B, sequence_lens, initial_h and, for the LSTM, initial_c and P.
#[derive(Clone, Debug, PartialEq)]
pub struct Recurrent {
    /// Everything but the hidden size, which is 0 here until the weights say it.
    pub layer: Layer,
    /// The hidden size by attribute.
    pub hidden: Option<usize>,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    Ok(parse_layer(a)?.into())
}

/// The layer of a node, also of one with quantised weights.
pub(super) fn parse_layer(a: &mut Attributes) -> Result<Recurrent> {
    let cell = match a.op_type() {
        "LSTM" | "DynamicQuantizeLSTM" => Cell::Lstm,
        "GRU" => Cell::Gru { linear_before_reset: a.int_or("linear_before_reset", 0)? != 0 },
        _ => Cell::Rnn,
    };
    let directions: &[bool] =
        a.choice("direction", &[("forward", &[false][..]), ("reverse", &[true]), ("bidirectional", &[false, true])])?;
    let each = match cell {
        Cell::Lstm => 3,
        Cell::Gru { .. } => 2,
        Cell::Rnn => 1,
    };
    let names = a.strings("activations")?;
    let mut alpha = a.floats("activation_alpha")?.unwrap_or_default().into_iter();
    let mut beta = a.floats("activation_beta")?.unwrap_or_default().into_iter();
    let mut gates = vec![[Gate::Sigmoid, Gate::Tanh, Gate::Tanh]; directions.len()];
    if cell == Cell::Rnn {
        gates.fill([Gate::Tanh; 3]);
    }
    if let Some(names) = names {
        if names.len() != each * directions.len() {
            return Err(Error::invalid_model(format!(
                "attribute activations has {} names; {each} for each of {} directions were wanted",
                names.len(),
                directions.len()
            )));
        }
        for (i, name) in names.iter().enumerate() {
            gates[i / each][i % each] = gate(name, &mut alpha, &mut beta)?;
        }
    }
    if alpha.next().is_some() || beta.next().is_some() {
        return Err(Error::unsupported_attribute(
            "activation_alpha or activation_beta has more numbers than the activations take",
        ));
    }
    let clip = a.float("clip")?;
    if clip.is_some_and(|c| c.is_nan() || c < 0.0) {
        return Err(Error::invalid_model("attribute clip is negative"));
    }
    let hidden = a.int("hidden_size")?;
    let hidden = hidden
        .map(|h| usize::try_from(h).map_err(|_| Error::invalid_model(format!("attribute hidden_size is {h}"))))
        .transpose()?;
    let layer = Layer {
        cell,
        hidden: 0,
        directions: directions.iter().copied().zip(gates).collect(),
        clip,
        input_forget: cell == Cell::Lstm && a.int_or("input_forget", 0)? != 0,
        batch_first: a.flag_or("layout", false)?,
    };
    Ok(Recurrent { layer, hidden })
}

fn gate(name: &str, alpha: &mut impl Iterator<Item = f32>, beta: &mut impl Iterator<Item = f32>) -> Result<Gate> {
    let mut a = |default: f32| alpha.next().unwrap_or(default);
    let mut b = |default: f32| beta.next().unwrap_or(default);
    // Exporters do not agree on the case.
    Ok(match name.to_ascii_lowercase().as_str() {
        "relu" => Gate::Relu,
        "tanh" => Gate::Tanh,
        "sigmoid" => Gate::Sigmoid,
        "affine" => Gate::Affine(a(1.0), b(0.0)),
        "leakyrelu" => Gate::LeakyRelu(a(0.01)),
        "thresholdedrelu" => Gate::ThresholdedRelu(a(1.0)),
        "scaledtanh" => Gate::ScaledTanh(a(1.0), b(1.0)),
        "hardsigmoid" => Gate::HardSigmoid(a(0.2), b(0.5)),
        "elu" => Gate::Elu(a(1.0)),
        "softsign" => Gate::Softsign,
        "softplus" => Gate::Softplus,
        _ => {
            return Err(Error::unsupported_attribute(format!(
                "activation \"{name}\"; Relu, Tanh, Sigmoid, Affine, LeakyRelu, ThresholdedRelu, ScaledTanh, \
                 HardSigmoid, Elu, Softsign and Softplus can be computed"
            )));
        }
    })
}

const NAMES: [&str; 8] = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"];

/// The sizes of a layer, as far as they are known.
struct Known {
    steps: Dim,
    batch: Dim,
    hidden: Dim,
}

impl Recurrent {
    fn directions(&self) -> usize {
        self.layer.directions.len()
    }

    fn rows(&self, hidden: &Dim, factor: usize) -> Dim {
        hidden.known().and_then(|h| h.checked_mul(factor)).map_or(Dim::Unknown, Dim::Known)
    }

    /// Checks all shapes against each other.
    fn check(&self, cx: &Infer) -> Result<Known> {
        let x = cx.input(0)?;
        let axes = |i: usize, rank: usize| -> Result<Option<Shape>> {
            match cx.optional(i).and_then(|f| f.shape.clone()) {
                Some(s) if s.len() != rank => {
                    Err(Error::shape(format!("{} has rank {}; {rank} was wanted", NAMES[i], s.len())))
                }
                s => Ok(s),
            }
        };
        let [mut steps, mut batch, mut input] = [const { Dim::Unknown }; 3];
        if let Some(s) = axes(0, 3)? {
            [steps, batch, input] = [s[0].clone(), s[1].clone(), s[2].clone()];
            if self.layer.batch_first {
                std::mem::swap(&mut steps, &mut batch);
            }
        }
        let mut hidden = self.hidden.map_or(Dim::Unknown, Dim::Known);
        if hidden == Dim::Unknown
            && let Some(s) = axes(2, 3)?
        {
            hidden = s[2].clone();
        }
        let (d, gates) = (Dim::Known(self.directions()), self.layer.cell.gates());
        let state = || match self.layer.batch_first {
            true => vec![batch.clone(), d.clone(), hidden.clone()],
            false => vec![d.clone(), batch.clone(), hidden.clone()],
        };
        let wanted: [Vec<Dim>; 8] = [
            vec![],
            vec![d.clone(), self.rows(&hidden, gates), input],
            vec![d.clone(), self.rows(&hidden, gates), hidden.clone()],
            vec![d.clone(), self.rows(&hidden, 2 * gates)],
            vec![batch.clone()],
            state(),
            state(),
            vec![d.clone(), self.rows(&hidden, 3)],
        ];
        let lstm = self.layer.cell == Cell::Lstm;
        for (i, want) in wanted.iter().enumerate().skip(1) {
            if cx.optional(i).is_none() {
                continue;
            }
            if i > 5 && !lstm {
                return Err(Error::invalid_model(format!("operand {i} is not known to {}", self.name())));
            }
            let Some(met) = axes(i, want.len())? else { continue };
            let differ = |(m, w): (&Dim, &Dim)| matches!((m, w), (Dim::Known(m), Dim::Known(w)) if m != w);
            if met.iter().zip(want).any(differ) {
                let want: Vec<_> = want.iter().map(Dim::to_string).collect();
                let met = cx.input(i)?.shape_text();
                return Err(Error::shape(format!("{} is {met}; [{}] was wanted", NAMES[i], want.join(", "))));
            }
        }
        for i in (1..8).filter(|&i| i != 4) {
            if let Some(f) = cx.optional(i)
                && f.dtype != x.dtype
            {
                return Err(Error::dtype(format!("{} is {}, X is {}", NAMES[i], f.dtype, x.dtype)));
            }
        }
        if let Some(f) = cx.optional(4)
            && f.dtype != DType::I32
        {
            return Err(Error::dtype(format!("sequence_lens is {}; int32 was wanted", f.dtype)));
        }
        cx.input(1)?;
        cx.input(2)?;
        Ok(Known { steps, batch, hidden })
    }

    /// The layer for weights R of this shape, and the sizes for X of that one.
    pub(super) fn sized(&self, x: &[usize], r: &[usize]) -> Result<(Layer, Sizes)> {
        let (&[t, b, input], &[_, _, hidden]) = (x, r) else {
            return Err(Error::shape(format!("X of shape {x:?} and R of shape {r:?}; three axes each were wanted")));
        };
        let (steps, batch) = if self.layer.batch_first { (b, t) } else { (t, b) };
        Ok((Layer { hidden, ..self.layer.clone() }, Sizes { steps, batch, input }))
    }
}

/// The operands that are no weights.
pub(super) fn operands<'a, T: Element>(io: &Io<'a, '_>) -> Result<Operands<'a, T>> {
    let part = |i: usize| io.optional(i).map(|v: TensorView<'a>| v.as_slice::<T>()).transpose();
    Ok(Operands {
        x: io.slice(0)?,
        lengths: io.optional(4).map(|v| v.as_slice::<i32>()).transpose()?,
        initial_h: part(5)?,
        initial_c: part(6)?,
        peepholes: part(7)?,
    })
}

/// The results that the node names.
pub(super) fn results<'a, T: Element>(outputs: &'a mut [TensorMut<'_>]) -> Result<Results<'a, T>> {
    let mut parts = outputs.iter_mut().map(TensorMut::as_slice::<T>);
    Ok(Results { y: parts.next().transpose()?, last_h: parts.next().transpose()?, last_c: parts.next().transpose()? })
}

fn run_any<T: Element + Number>(op: &Recurrent, io: &mut Io) -> Result<()> {
    let (layer, sizes) = op.sized(io.input(0)?.dims, io.input(2)?.dims)?;
    let bias = io.optional(3).map(|v| v.as_slice::<T>()).transpose()?;
    let weights = Weights { w: io.slice::<T>(1)?, r: io.slice(2)?, bias };
    let operands = operands::<T>(io)?;
    Ok(layer.run_any(&weights, sizes, &operands, &mut results(io.outputs)?)?)
}

impl Operator for Recurrent {
    fn name(&self) -> &'static str {
        match self.layer.cell {
            Cell::Lstm => "LSTM",
            Cell::Gru { .. } => "GRU",
            Cell::Rnn => "RNN",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let Known { steps, batch, hidden } = self.check(cx)?;
        let dtype = cx.input(0)?.dtype;
        if !dtype.is_float() {
            return Err(wrong_dtype("X", dtype, "floats"));
        }
        let d = Dim::Known(self.directions());
        let (y, state) = match self.layer.batch_first {
            true => ([batch.clone(), steps, d.clone(), hidden.clone()], [batch, d, hidden]),
            false => ([steps, d.clone(), batch.clone(), hidden.clone()], [d, batch, hidden]),
        };
        let fact = |dims: &[Dim]| Fact::with_shape(dtype, dims.iter().cloned().collect());
        let mut facts = vec![fact(&y), fact(&state)];
        if self.layer.cell == Cell::Lstm {
            facts.push(fact(&state));
        }
        cx.results(facts)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        match io.input(0)?.dtype {
            DType::F32 => {
                let (layer, sizes) = self.sized(io.input(0)?.dims, io.input(2)?.dims)?;
                let bias = io.optional(3).map(|v| v.as_slice::<f32>()).transpose()?;
                let weights = Weights { w: io.slice(1)?, r: io.slice(2)?, bias };
                let packed = layer.pack(cx.isa(), sizes.input, &weights)?;
                Prepared { layer, sizes, packed: Arc::new(packed), flops: 0 }.run(cx, io)
            }
            DType::F64 => run_any::<f64>(self, io),
            other => Err(wrong_dtype("X", other, "float32 and float64")),
        }
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let (Some(w), Some(r)) = (cx.constant(1), cx.constant(2)) else { return Ok(None) };
        let bias = cx.constant(3);
        if w.dtype() != DType::F32 || (cx.has(3) && bias.is_none()) {
            return Ok(None);
        }
        let (layer, sizes) = self.sized(&cx.dims(0)?, r.dims())?;
        let packed = pack(cx, &layer, sizes.input, [w, r], bias)?;
        let steps = (sizes.steps * sizes.batch) as u64;
        let flops = 2 * steps * (w.len() + r.len()) as u64;
        Ok(Some(Arc::new(Prepared { layer, sizes, packed, flops })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        let (Some(w), Some(r)) = (cx.constant(1), cx.constant(2)) else { return Ok(&[]) };
        let bias = cx.constant(3);
        let (&[_, _, input], &[_, _, hidden]) = (w.dims(), r.dims()) else { return Ok(&[]) };
        if w.dtype() != DType::F32 || (cx.has(3) && bias.is_none()) {
            return Ok(&[]);
        }
        pack(cx, &Layer { hidden, ..self.layer.clone() }, input, [w, r], bias)?;
        Ok(&[1, 2, 3])
    }
}

/// Weights W and R of a layer with its bias, in one packed form.
fn pack(
    cx: &Prepare,
    layer: &Layer,
    input: usize,
    [w, r]: [&Arc<Tensor>; 2],
    bias: Option<&Arc<Tensor>>,
) -> Result<Arc<Packed>> {
    let bias_id = bias.map(|b| cx.cache.id(b)).transpose()?;
    let kind = format!("rnn {} {:?} {} {bias_id:?}", cx.isa, layer.cell, cx.cache.id(r)?);
    cx.cache.get(w, &kind, |w| {
        let weights = Weights { w: w.as_slice()?, r: r.as_slice()?, bias: bias.map(|b| b.as_slice()).transpose()? };
        Ok(layer.pack(cx.isa, input, &weights)?)
    })
}

#[derive(Debug)]
struct Prepared {
    layer: Layer,
    sizes: Sizes,
    packed: Arc<Packed>,
    flops: u64,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let operands = operands(io)?;
        Ok(self.layer.run(cx, &self.packed, self.sizes, &operands, &mut results(io.outputs)?)?)
    }

    fn kernel(&self) -> &str {
        "recurrent"
    }

    fn packed_operands(&self) -> &[usize] {
        &[1, 2, 3]
    }

    fn flops(&self) -> u64 {
        self.flops
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use super::*;

    /// One step of an RNN with one hidden value, by hand; peepholes and coupled gates of an LSTM by the formulas.
    #[test]
    fn values() {
        let node = OneNode::new("RNN").int("hidden_size", 1).outputs(2);
        let y =
            node.run(&[f32s(&[2, 1, 1], &[1.0, 2.0]), f32s(&[1, 1, 1], &[0.5]), f32s(&[1, 1, 1], &[0.25])]).unwrap();
        let first = 0.5f32.tanh();
        let second = (1.0 + 0.25 * first).tanh();
        let got = y[0].as_slice::<f32>().unwrap();
        assert!((got[0] - first).abs() < 1e-6 && (got[1] - second).abs() < 1e-6, "{got:?}");
        assert_eq!(y[0].dims(), [2, 1, 1, 1]);
        assert_eq!(y[1].as_slice::<f32>().unwrap()[0], got[1]);

        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let inputs = [
            Some(f32s(&[1, 1, 1], &[1.0])),
            Some(f32s(&[1, 4, 1], &[0.1, 0.2, 0.3, 0.4])),
            Some(f32s(&[1, 4, 1], &[0.0; 4])),
            None,
            None,
            None,
            Some(f32s(&[1, 1, 1], &[0.5])),
            Some(f32s(&[1, 3], &[1.0, 2.0, 3.0])),
        ];
        let run = |node: OneNode| f64::from(node.run_optional(&inputs).unwrap()[0].as_slice::<f32>().unwrap()[0]);
        let i = sigmoid(0.1 + 0.5);
        let c = sigmoid(0.3 + 1.5) * 0.5 + i * 0.4f64.tanh();
        assert!((run(OneNode::new("LSTM")) - sigmoid(0.2 + 2.0 * c) * c.tanh()).abs() < 1e-6);
        let c = (1.0 - i) * 0.5 + i * 0.4f64.tanh();
        assert!((run(OneNode::new("LSTM").int("input_forget", 1)) - sigmoid(0.2 + 2.0 * c) * c.tanh()).abs() < 1e-6);
    }

    #[test]
    fn shapes_with_symbols_and_errors() {
        let n = Dim::Symbol("n".into());
        let x = Fact::with_shape(DType::F32, [n.clone(), 2.into(), 3.into()].into_iter().collect());
        let w = Fact::new(DType::F32, &[2, 16, 3]);
        let r = Fact::new(DType::F32, &[2, 16, 4]);
        let node = || OneNode::new("LSTM").string("direction", "bidirectional").outputs(3);
        let y = node().infer(&[Some(x.clone()), Some(w.clone()), Some(r.clone())]).unwrap();
        assert_eq!((y[0].shape_text(), y[2].shape_text()), ("[n, 2, 2, 4]".into(), "[2, 2, 4]".into()));
        let y = node().int("layout", 1).infer(&[Some(x.clone()), Some(w.clone()), Some(r.clone())]).unwrap();
        assert_eq!((y[0].shape_text(), y[1].shape_text()), ("[n, 2, 2, 4]".into(), "[n, 2, 4]".into()));
        let e = node().int("hidden_size", 5).infer(&[Some(x.clone()), Some(w.clone()), Some(r.clone())]).unwrap_err();
        assert!(e.message.contains("W is [2, 16, 3]; [2, 20, 3] was wanted"), "{e}");
        let e = node().attr("activations", crate::onnx::AttributeValue::Strings(vec![b"Tanh".to_vec()]));
        assert!(e.infer(&[Some(x), Some(w), Some(r)]).unwrap_err().message.contains("3 for each of 2"));
    }
}
