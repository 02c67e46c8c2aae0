//! DynamicQuantizeLSTM of onnxruntime: an LSTM with 8-bit weights whose operands are quantised by their own range.

use super::qparams::{bytes, check_byte, scales, zeros};
use super::rnn::{self, Recurrent, operands, results};
use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact};
use crate::tensor::{DType, TensorView, element_count};
use std::sync::Arc;
use weblane_kernels::int8::Form;
use weblane_kernels::par::Cx;
use weblane_kernels::rnn::{Layer, Packed, Quantized, QuantizedWeights, Sizes};
use weblane_kernels::simd::Isa;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::microsoft("DynamicQuantizeLSTM", parse)];

/// Operands 0 to 7 are those of LSTM, with W `[directions, input, 4 hidden]` and R `[directions, hidden, 4 hidden]`; then
/// scale and zero point of W, scale and zero point of R: one for each direction, or for each column of each direction.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicLstm {
    /// The layer.
    pub layer: Recurrent,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    Ok(DynamicLstm { layer: rnn::parse_layer(a)? }.into())
}

/// As ONNX's LSTM has these weights.
fn transposed(fact: &Fact) -> Fact {
    let mut fact = Fact { dtype: DType::F32, content: Default::default(), ..fact.clone() };
    if let Some(shape) = fact.shape.as_mut().filter(|s| s.len() == 3) {
        shape.swap(1, 2);
    }
    fact
}

impl DynamicLstm {
    fn sized(&self, x: &[usize], r: &[usize]) -> Result<(Layer, Sizes)> {
        let &[directions, hidden, columns] = r else {
            return Err(Error::shape(format!("R of shape {r:?}; three axes were wanted")));
        };
        self.layer.sized(x, &[directions, columns, hidden])
    }

    /// Packs operands, which are given by their place.
    fn pack<'a>(
        &self,
        isa: Isa,
        form: Form,
        layer: &Layer,
        input: usize,
        operand: &dyn Fn(usize) -> Option<TensorView<'a>>,
    ) -> Result<Packed> {
        let given = |i: usize| operand(i).ok_or_else(|| Error::invalid_model(format!("operand {i} is missing")));
        let of = |i: usize, at: usize, name: &str| -> Result<_> {
            let (w, count) = (given(i)?, given(at)?.len());
            let scale = scales(given(at)?, &format!("{name}_scale"), count)?;
            let zero = zeros(operand(at + 1), &format!("{name}_zero_point"), count)?;
            Ok((bytes(w)?, scale, zero))
        };
        let (w, w_scale, w_zero) = of(1, 8, "W")?;
        let (r, r_scale, r_zero) = of(2, 10, "R")?;
        let bias = operand(3).map(|b| b.as_slice::<f32>()).transpose()?;
        let weights = QuantizedWeights {
            w: Quantized { data: w, scale: w_scale, zero: &w_zero },
            r: Quantized { data: r, scale: r_scale, zero: &r_zero },
            bias,
        };
        Ok(layer.pack_quantized(isa, form, input, &weights)?)
    }

    fn pack_constants(&self, cx: &Prepare, layer: &Layer, input: usize) -> Result<Option<Arc<Packed>>> {
        const ALL: [usize; 7] = [1, 2, 3, 8, 9, 10, 11];
        let (Some(w), true) = (cx.constant(1), ALL.iter().all(|&i| !cx.has(i) || cx.constant(i).is_some())) else {
            return Ok(None);
        };
        let ids = ALL.iter().filter_map(|&i| cx.constant(i)).map(|t| cx.cache.id(t)).collect::<Result<Vec<_>>>()?;
        let kind = format!("dynamic lstm {} {ids:?}", cx.isa);
        let view = |i: usize| cx.constant(i).map(|t| t.view());
        Ok(Some(cx.cache.get(w, &kind, |_| self.pack(cx.isa, Form::best(cx.isa), layer, input, &view))?))
    }
}

impl Operator for DynamicLstm {
    fn name(&self) -> &'static str {
        "com.microsoft.DynamicQuantizeLSTM"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (w, r) = (cx.input(1)?, cx.input(2)?);
        check_byte("W", w.dtype)?;
        check_byte("R", r.dtype)?;
        let mut inputs: Vec<Option<&Fact>> = cx.inputs.iter().take(8).copied().collect();
        let turned = [transposed(w), transposed(r)];
        inputs[1] = Some(&turned[0]);
        inputs[2] = Some(&turned[1]);
        let results = self.layer.infer(&Infer { inputs: &inputs, outputs: cx.outputs, cx: cx.cx })?;
        let directions = self.layer.layer.directions.len();
        for (name, at, weights) in [("W", 8, w), ("R", 10, r)] {
            let (scale, zero) = (cx.input(at)?, cx.input(at + 1)?);
            if scale.dtype != DType::F32 {
                return Err(wrong_dtype(&format!("{name}_scale"), scale.dtype, "float32"));
            }
            if zero.dtype != weights.dtype {
                return Err(Error::dtype(format!("{name}_zero_point is {}, {name} is {}", zero.dtype, weights.dtype)));
            }
            let columns = weights.shape.as_ref().and_then(|s| s.last()).and_then(Dim::known);
            for (what, fact) in [("scale", scale), ("zero_point", zero)] {
                let Some(dims) = fact.dims() else { continue };
                let fits = match *dims {
                    [d] => d == directions,
                    [d, c] => d == directions && columns.is_none_or(|columns| columns == c),
                    _ => false,
                };
                if !fits {
                    return Err(Error::shape(format!(
                        "{name}_{what} is of shape {dims:?}; [{directions}] or [{directions}, {}] was wanted",
                        columns.map_or("?".to_owned(), |c| c.to_string())
                    )));
                }
            }
            if let (Some(s), Some(z)) = (scale.dims(), zero.dims())
                && element_count(&s)? != element_count(&z)?
            {
                return Err(Error::shape(format!(
                    "{name}_zero_point of shape {z:?} beside {name}_scale of shape {s:?}"
                )));
            }
            if let Some(t) = scale.tensor().filter(|t| !t.is_released()) {
                scales(t.view(), &format!("{name}_scale"), t.len())?;
            }
        }
        Ok(results)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (layer, sizes) = self.sized(io.input(0)?.dims, io.input(2)?.dims)?;
        let isa = cx.isa();
        let packed = self.pack(isa, Form::best_unprepared(isa), &layer, sizes.input, &|i| io.optional(i))?;
        Prepared { layer, sizes, packed: Arc::new(packed), flops: 0 }.run(cx, io)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let (layer, sizes) = self.sized(&cx.dims(0)?, &cx.dims(2)?)?;
        let Some(packed) = self.pack_constants(cx, &layer, sizes.input)? else { return Ok(None) };
        let weights = element_count(&cx.dims(1)?)?.saturating_add(element_count(&cx.dims(2)?)?);
        let flops = 2 * sizes.steps.saturating_mul(sizes.batch).saturating_mul(weights) as u64;
        Ok(Some(Arc::new(Prepared { layer, sizes, packed, flops })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        let (Some(w), Some(r)) = (cx.constant(1), cx.constant(2)) else { return Ok(&[]) };
        let (&[_, input, _], &[_, hidden, _]) = (w.dims(), r.dims()) else { return Ok(&[]) };
        let layer = Layer { hidden, ..self.layer.layer.clone() };
        Ok(if self.pack_constants(cx, &layer, input)?.is_some() { &[1, 2, 3] } else { &[] })
    }
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
        "recurrent, 8-bit"
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
    use crate::tensor::Tensor;

    /// Operands of one direction, one input and one hidden value, whose ranges make the quantisation exact.
    fn operands() -> Vec<Option<Tensor>> {
        let i8s = |dims: &[usize], v: &[i8]| Some(Tensor::from_slice(dims, v).unwrap());
        let zero = i8s(&[1], &[0]);
        let mut list = vec![Some(f32s(&[1, 1, 1], &[255.0])), i8s(&[1, 1, 4], &[1, 2, 3, 4]), i8s(&[1, 1, 4], &[0; 4])];
        list.extend([const { None }; 5]);
        list.extend([Some(f32s(&[1], &[0.001])), zero.clone(), Some(f32s(&[1], &[1.0])), zero]);
        list
    }

    fn node() -> OneNode {
        OneNode::new("DynamicQuantizeLSTM").domain("com.microsoft").int("hidden_size", 1)
    }

    #[test]
    fn one_step_by_hand() {
        let y = node().run_optional(&operands()).unwrap()[0].as_slice::<f32>().unwrap()[0];
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        // Input, output, forget and cell gate; the cell was 0.
        let cell = sigmoid(0.255) * (4.0 * 0.255f64).tanh();
        assert!((f64::from(y) - sigmoid(2.0 * 0.255) * cell.tanh()).abs() < 1e-6, "{y}");
    }

    #[test]
    fn mistakes_are_named() {
        let said = |i: usize, t: Tensor| {
            let mut wrong = operands();
            wrong[i] = Some(t);
            node().run_optional(&wrong).unwrap_err().message
        };
        assert!(said(8, f32s(&[1], &[-1.0])).contains("W_scale[0] is -1"));
        assert!(said(10, f32s(&[2], &[1.0; 2])).contains("R_scale is of shape [2]; [1] or [1, 4] was wanted"));
        assert!(said(9, Tensor::from_slice(&[1], &[0u8]).unwrap()).contains("W_zero_point is uint8"));
        assert!(said(9, Tensor::from_slice(&[1, 4], &[0i8; 4]).unwrap()).contains("beside W_scale"));
    }
}
