//! Gemm: `alpha A' B' + beta C`, with an activation in its epilogue.

use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::for_dtype;
use crate::tensor::{DType, Tensor};
use std::sync::Arc;
use weblane_kernels::epilogue::{Activation, Epilogue};
use weblane_kernels::finish::{Finish, finish};
use weblane_kernels::gemm::{Matrix, PackedB, Rhs, gemm};
use weblane_kernels::naive;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("Gemm", 1, |a| Ok(parse(a)?.into())), Registration::microsoft("FusedGemm", parse_fused)];

/// `activation(alpha A' B' + beta C)` with A' of `[m, k]`, B' of `[k, n]` and C broadcast to `[m, n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemm {
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of C.
    pub beta: f32,
    /// Whether A is stored as `[k, m]`.
    pub trans_a: bool,
    /// Whether B is stored as `[n, k]`.
    pub trans_b: bool,
    /// Applied last; set by the optimiser, ours or that of onnxruntime.
    pub activation: Activation,
}

fn parse_fused(a: &mut Attributes) -> Result<Op> {
    let activation = a.activation(&mut |a, i| match i {
        0 => a.required("activation_alpha", Attributes::float),
        _ => a.required("activation_beta", Attributes::float),
    })?;
    // Written for functions that have none, too.
    ["activation_alpha", "activation_beta", "activation_gamma"].iter().for_each(|name| a.ignore(name));
    Ok(Gemm { activation, ..parse(a)? }.into())
}

fn parse(a: &mut Attributes) -> Result<Gemm> {
    if a.opset() < 7 {
        // Said whether C may broadcast; where it need not, broadcasting changes nothing.
        a.flag_or("broadcast", false)?;
    }
    Ok(Gemm {
        alpha: a.float_or("alpha", 1.0)?,
        beta: a.float_or("beta", 1.0)?,
        trans_a: a.int_or("transA", 0)? != 0,
        trans_b: a.int_or("transB", 0)? != 0,
        activation: Activation::Identity,
    })
}

fn matrix_dims(fact: &Fact, name: &str, transposed: bool) -> Result<[Dim; 2]> {
    match fact.shape.as_deref() {
        None => Ok([Dim::Unknown, Dim::Unknown]),
        Some([r, c]) if transposed => Ok([c.clone(), r.clone()]),
        Some([r, c]) => Ok([r.clone(), c.clone()]),
        Some(_) => Err(Error::shape(format!("{name} is {}; a matrix was wanted", fact.shape_text()))),
    }
}

/// A matrix as it is stored, read as its transpose where asked.
fn matrix<'a>(data: &'a [f32], dims: &[usize], transposed: bool) -> Result<Matrix<'a>> {
    let &[rows, cols] = dims else {
        return Err(Error::shape(format!("an operand of shape {dims:?}; a matrix was wanted")));
    };
    let m = Matrix::new(data, rows, cols);
    Ok(if transposed { m.transposed() } else { m })
}

impl Gemm {
    fn sizes(&self, a: &[usize], b: &[usize]) -> Result<(usize, usize, usize)> {
        match (a, b) {
            (&[r, c], &[s, t]) => {
                let (m, k) = if self.trans_a { (c, r) } else { (r, c) };
                Ok((m, if self.trans_b { s } else { t }, k))
            }
            _ => Err(Error::shape(format!("operands of shapes {a:?} and {b:?}; matrices were wanted"))),
        }
    }
}

impl Operator for Gemm {
    fn name(&self) -> &'static str {
        "Gemm"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        let [m, k] = matrix_dims(a, "A", self.trans_a)?;
        let [l, n] = matrix_dims(b, "B", self.trans_b)?;
        if let (Some(k), Some(l)) = (k.known(), l.known())
            && k != l
        {
            return Err(Error::shape(format!(
                "A is {}{}, B is {}{}: inner sizes {k} and {l} differ",
                a.shape_text(),
                if self.trans_a { " transposed" } else { "" },
                b.shape_text(),
                if self.trans_b { " transposed" } else { "" },
            )));
        }
        if a.dtype != b.dtype {
            return Err(Error::dtype(format!("A is {}, B is {}", a.dtype, b.dtype)));
        }
        if self.activation != Activation::Identity && !(a.dtype == DType::F32 || a.dtype.is_half()) {
            return Err(wrong_dtype("an operand of a product with an activation", a.dtype, "float32"));
        }
        let shape: Shape = [m, n].into_iter().collect();
        if let Some(c) = cx.optional(2) {
            if c.dtype != a.dtype {
                return Err(Error::dtype(format!("C is {}, A is {}", c.dtype, a.dtype)));
            }
            let fits = |s: &Shape| {
                s.len() <= 2
                    && s.iter().rev().zip(shape.iter().rev()).all(|(c, y)| match (c.known(), y.known()) {
                        (Some(c), Some(y)) => c == 1 || c == y,
                        _ => true,
                    })
            };
            if c.shape.as_ref().is_some_and(|s| !fits(s)) {
                let want = Fact::with_shape(c.dtype, shape).shape_text();
                return Err(Error::shape(format!("C is {}, which does not broadcast to {want}", c.shape_text())));
            }
        }
        cx.results(vec![Fact::with_shape(a.dtype, shape)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        match a.dtype {
            DType::F32 => {
                let b = matrix(b.as_slice::<f32>()?, b.dims, self.trans_b)?;
                self.run_f32(cx, io, Rhs::Plain(b), self.alpha)
            }
            other if self.activation == Activation::Identity => {
                let (m, n, k) = self.sizes(a.dims, b.dims)?;
                let c = io.optional(2);
                for_dtype!(other, [F64, I32, I64, U32, U64], T => {
                    let y = io.output(0)?.as_slice::<T>()?;
                    let (sa, sb) = (if self.trans_a { [1, m] } else { [k, 1] }, if self.trans_b { [1, k] } else { [n, 1] });
                    naive::matmul(a.as_slice::<T>()?, sa, b.as_slice::<T>()?, sb, y, [m, n, k]);
                    let c = c.map(|c| Ok::<_, Error>((c.as_slice::<T>()?, c.dims))).transpose()?;
                    naive::scale_add(y, [m, n], f64::from(self.alpha), f64::from(self.beta), c);
                    Ok(())
                }, else Err(wrong_dtype("A", other, "float32, float64, int32, int64, uint32 and uint64")))
            }
            other => Err(wrong_dtype("A", other, "float32, with an activation,")),
        }
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let Some(b) = cx.constant(1).filter(|b| b.dtype() == DType::F32) else { return Ok(None) };
        let (m, n, k) = self.sizes(&cx.dims(0)?, b.dims())?;
        let packed = pack_rhs(cx, b, k, n, self.trans_b, self.alpha)?;
        let flops = 2 * m.saturating_mul(n).saturating_mul(k) as u64;
        // A constant row is scaled once, here; anything else is scaled as it is added.
        let bias = match cx.constant(2) {
            Some(c) if c.dtype() == DType::F32 && c.len() == n && matches!(c.dims(), [_] | [1, _]) => {
                let beta = self.beta;
                Some(cx.cache.get(c, &format!("gemm bias {beta}"), |c| {
                    Ok(c.as_slice::<f32>()?.iter().map(|v| v * beta).collect::<Vec<f32>>())
                })?)
            }
            _ => None,
        };
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, bias, flops })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        let Some(b) = cx.constant(1).filter(|b| b.dtype() == DType::F32) else { return Ok(&[]) };
        let &[rows, cols] = b.dims() else { return Ok(&[]) };
        let (k, n) = if self.trans_b { (cols, rows) } else { (rows, cols) };
        pack_rhs(cx, b, k, n, self.trans_b, self.alpha)?;
        Ok(&[1])
    }
}

/// Packs a constant `[k, n]` (stored `[n, k]` when `transposed`) times `alpha`.
pub(super) fn pack_rhs(
    cx: &Prepare,
    b: &Arc<Tensor>,
    k: usize,
    n: usize,
    transposed: bool,
    alpha: f32,
) -> Result<Arc<PackedB>> {
    let isa = cx.isa;
    cx.cache.get(b, &format!("gemm {isa} {k}x{n} {transposed} {alpha}"), |b| {
        let values = b.as_slice::<f32>()?;
        let scaled: Vec<f32>;
        let values = if alpha == 1.0 {
            values
        } else {
            scaled = values.iter().map(|v| v * alpha).collect();
            &scaled
        };
        let stored = if transposed { Matrix::new(values, n, k).transposed() } else { Matrix::new(values, k, n) };
        Ok(PackedB::new(isa, stored)?)
    })
}

impl Gemm {
    /// `rhs` may hold `alpha` already, then `alpha` is 1 here.
    fn run_f32(&self, cx: &Cx, io: &mut Io, rhs: Rhs, alpha: f32) -> Result<()> {
        let a = io.input(0)?;
        let a = matrix(a.as_slice::<f32>()?, a.dims, self.trans_a)?;
        let c = io.optional(2);
        let c_row = match c {
            Some(c) if self.beta != 0.0 => Some((c.as_slice::<f32>()?, c.dims)),
            _ => None,
        };
        let y = io.output(0)?;
        let &[m, n] = y.dims else { return Err(Error::internal("the result is no matrix")) };
        let y = y.as_slice::<f32>()?;
        // What the epilogue of the product can do by itself: a row, or a whole matrix, with factor 1.
        let simple = alpha == 1.0 && self.beta == 1.0;
        match c_row {
            None if alpha == 1.0 => {
                let epilogue = Epilogue { activation: self.activation, ..Epilogue::default() };
                return Ok(gemm(cx, a, rhs, &epilogue, y, n)?);
            }
            Some((c, [_] | [1, _])) if simple && c.len() == n => {
                let epilogue = Epilogue { bias: Some(c), residual: None, activation: self.activation };
                return Ok(gemm(cx, a, rhs, &epilogue, y, n)?);
            }
            Some((c, [_, _])) if simple && c.len() == m * n => {
                let epilogue = Epilogue { bias: None, residual: Some(c), activation: self.activation };
                return Ok(gemm(cx, a, rhs, &epilogue, y, n)?);
            }
            _ => {}
        }
        gemm(cx, a, rhs, &Epilogue::default(), y, n)?;
        let (c, strides) = match c_row {
            None => (None, [0, 0]),
            Some((c, dims)) => {
                let at = |i: usize| dims.len().checked_sub(i).map_or(1, |j| dims[j]);
                let row = if at(2) == 1 { 0 } else { at(1) };
                (Some(c), [row, usize::from(at(1) != 1)])
            }
        };
        finish(cx, y, &Finish { cols: n, alpha, beta: self.beta, addend: c, strides, activation: self.activation });
        Ok(())
    }
}

#[derive(Debug)]
struct Prepared {
    op: Gemm,
    packed: Arc<PackedB>,
    bias: Option<Arc<Vec<f32>>>,
    flops: u64,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let Some(bias) = &self.bias else {
            return self.op.run_f32(cx, io, Rhs::Packed(&self.packed), 1.0);
        };
        let a = io.input(0)?;
        let a = matrix(a.as_slice::<f32>()?, a.dims, self.op.trans_a)?;
        let epilogue = Epilogue { bias: Some(bias.as_slice()), residual: None, activation: self.op.activation };
        let n = self.packed.n();
        Ok(gemm(cx, a, Rhs::Packed(&self.packed), &epilogue, io.output(0)?.as_slice::<f32>()?, n)?)
    }

    fn kernel(&self) -> &str {
        "gemm"
    }

    fn packed_operands(&self) -> &[usize] {
        if self.bias.is_some() { &[1, 2] } else { &[1] }
    }

    fn flops(&self) -> u64 {
        self.flops
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::onnx::AttributeValue;

    #[test]
    fn factors_transposes_and_every_broadcast_of_c() {
        // A' = [[1, 2, 3], [4, 5, 6]], B' = [[1, 0], [0, 1], [1, 1]]: the product is [[4, 5], [10, 11]].
        let a = f32s(&[3, 2], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let b = f32s(&[2, 3], &[1.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
        for (dims, c, want) in [
            (&[][..], &[2.0][..], [11.0, 13.5, 26.0, 28.5]),
            (&[2][..], &[2.0, 4.0][..], [11.0, 14.5, 26.0, 29.5]),
            (&[2, 1][..], &[2.0, 4.0][..], [11.0, 13.5, 27.0, 29.5]),
            (&[2, 2][..], &[2.0, 4.0, 6.0, 8.0][..], [11.0, 14.5, 28.0, 31.5]),
        ] {
            let node = OneNode::new("Gemm").int("transA", 1).int("transB", 1).float("alpha", 2.5).float("beta", 0.5);
            let y = node.run(&[a.clone(), b.clone(), f32s(dims, c)]).unwrap();
            assert_eq!(y[0].as_slice::<f32>().unwrap(), want, "C of shape {dims:?}");
        }
    }

    #[test]
    fn integers() {
        let y = OneNode::new("Gemm").run(&[i64s(&[1, 2], &[3, 4]), i64s(&[2, 1], &[5, 6]), i64s(&[1], &[1])]).unwrap();
        assert_eq!(y[0].as_slice::<i64>().unwrap(), [40]);
    }

    #[test]
    fn inner_sizes_must_agree() {
        let e = OneNode::new("Gemm").run(&[f32s(&[1, 2], &[1.0; 2]), f32s(&[3, 1], &[1.0; 3])]).unwrap_err();
        assert!(e.message.contains("inner sizes 2 and 3"), "{e}");
    }

    #[test]
    fn functions_of_onnxruntimes_optimiser() {
        let run = |node: OneNode| {
            node.domain("com.microsoft").run(&[f32s(&[1, 2], &[1.0, -1.0]), f32s(&[2, 2], &[1.0, 0.0, 3.0, 0.5])])
        };
        let node = |name: &str| OneNode::new("FusedGemm").attr("activation", AttributeValue::String(name.into()));
        assert_eq!(run(node("Relu")).unwrap()[0], f32s(&[1, 2], &[0.0, 0.0]));
        let y = run(node("LeakyRelu").float("activation_alpha", 0.5)).unwrap();
        assert_eq!(y[0], f32s(&[1, 2], &[-1.0, -0.25]));
        assert!(run(node("LeakyRelu")).unwrap_err().message.contains("activation_alpha"));
        assert!(run(node("Softsign")).unwrap_err().message.contains("attribute activation is Softsign"));
    }
}
