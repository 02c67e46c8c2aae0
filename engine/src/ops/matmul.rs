//! MatMul: matrix product with NumPy's batch broadcasting, and its fused forms.

use super::gemm::pack_rhs;
use super::{Attributes, Compute, Infer, Io, Op, Operator, Prepare, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape, broadcast, broadcast_dims};
use crate::for_dtype;
use crate::tensor::{DType, Dims, Tensor, element_count};
use std::sync::Arc;
use weblane_kernels::epilogue::{Activation, Epilogue};
use weblane_kernels::finish::{Finish, finish};
use weblane_kernels::gemm::{Batched, Matrix, PackedB, Rhs, gemm, gemm_batched};
use weblane_kernels::naive;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("MatMul", 1, |_| Ok(MatMul::default().into())),
    Registration::microsoft("FusedMatMul", parse_fused),
];

/// `activation(alpha A' B' + bias + residual)`.
///
/// Operands: A, B, then, as the flags say, a bias `[n]` and a residual of the result's shape. Operands of rank 1 are
/// a row at the left and a column at the right, and take no part in broadcasting.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMul {
    /// Factor of the product.
    pub alpha: f32,
    /// Whether the last two axes of A are swapped.
    pub trans_a: bool,
    /// Whether the last two axes of B are swapped.
    pub trans_b: bool,
    /// Whether there is a bias; set by the optimiser.
    pub bias: bool,
    /// Whether there is a residual; set by the optimiser.
    pub residual: bool,
    /// Applied last; set by the optimiser.
    pub activation: Activation,
}

impl Default for MatMul {
    fn default() -> Self {
        MatMul {
            alpha: 1.0,
            trans_a: false,
            trans_b: false,
            bias: false,
            residual: false,
            activation: Activation::Identity,
        }
    }
}

fn parse_fused(a: &mut Attributes) -> Result<Op> {
    for name in ["transBatchA", "transBatchB"] {
        if a.flag_or(name, false)? {
            return Err(Error::unsupported_attribute(format!("attribute {name} is 1; 0 can be computed")));
        }
    }
    Ok(MatMul {
        alpha: a.float_or("alpha", 1.0)?,
        trans_a: a.flag_or("transA", false)?,
        trans_b: a.flag_or("transB", false)?,
        ..MatMul::default()
    }
    .into())
}

/// Sizes of one run: batch dims, and `[m, n, k]` of each product.
struct Sizes {
    batch: Dims,
    a_batch: Dims,
    b_batch: Dims,
    m: usize,
    n: usize,
    k: usize,
}

impl MatMul {
    fn sizes(&self, a: &[usize], b: &[usize]) -> Result<Sizes> {
        let scalar = || Error::shape("an operand is a scalar; vectors or matrices were wanted");
        let (a_batch, m, k) = match a {
            [] => return Err(scalar()),
            [k] => (&[][..], 1, *k),
            [batch @ .., r, c] => (batch, if self.trans_a { *c } else { *r }, if self.trans_a { *r } else { *c }),
        };
        let (b_batch, l, n) = match b {
            [] => return Err(scalar()),
            [k] => (&[][..], *k, 1),
            [batch @ .., r, c] => (batch, if self.trans_b { *c } else { *r }, if self.trans_b { *r } else { *c }),
        };
        if k != l {
            return Err(Error::shape(format!("shapes {a:?} and {b:?}: inner sizes {k} and {l} differ")));
        }
        let batch = broadcast_dims(a_batch, b_batch)?;
        Ok(Sizes { batch, a_batch: a_batch.into(), b_batch: b_batch.into(), m, n, k })
    }

    /// A constant vector or matrix, packed.
    fn pack(&self, cx: &Prepare, b: &Arc<Tensor>) -> Result<Arc<PackedB>> {
        match *b.dims() {
            [k] => pack_rhs(cx, b, k, 1, false, self.alpha),
            [n, k] if self.trans_b => pack_rhs(cx, b, k, n, true, self.alpha),
            [k, n] => pack_rhs(cx, b, k, n, false, self.alpha),
            _ => Err(Error::internal("a stack of matrices is not packed")),
        }
    }

    fn bias<'a>(&self, io: &Io<'a, '_>) -> Result<Option<&'a [f32]>> {
        self.bias.then(|| io.slice::<f32>(2)).transpose()
    }

    fn residual<'a>(&self, io: &Io<'a, '_>) -> Result<Option<&'a [f32]>> {
        self.residual.then(|| io.slice::<f32>(2 + usize::from(self.bias))).transpose()
    }

    /// One product, all rows of A against a matrix B.
    fn run_flat(&self, cx: &Cx, io: &mut Io, rows: usize, k: usize, n: usize, rhs: Rhs, alpha: f32) -> Result<()> {
        let a = Matrix::new(io.slice::<f32>(0)?, rows, k);
        let (bias, residual) = (self.bias(io)?, self.residual(io)?);
        let y = io.output(0)?.as_slice::<f32>()?;
        if alpha == 1.0 {
            let epilogue = Epilogue { bias, residual, activation: self.activation };
            return Ok(gemm(cx, a, rhs, &epilogue, y, n)?);
        }
        gemm(cx, a, rhs, &Epilogue::default(), y, n)?;
        self.finish(cx, y, n, bias, residual, alpha);
        Ok(())
    }

    /// What a product without a matching epilogue leaves to do.
    fn finish(&self, cx: &Cx, y: &mut [f32], n: usize, bias: Option<&[f32]>, residual: Option<&[f32]>, alpha: f32) {
        let last = if residual.is_some() { Activation::Identity } else { self.activation };
        let step = Finish { cols: n, alpha, beta: 1.0, addend: bias, strides: [0, 1], activation: last };
        finish(cx, y, &step);
        if residual.is_some() {
            let activation = self.activation;
            finish(cx, y, &Finish { cols: n, alpha: 1.0, beta: 1.0, addend: residual, strides: [n, 1], activation });
        }
    }
}

/// Strides that walk `dims` (times `unit` elements each) along the axes of `batch`; 0 where it broadcasts.
pub(super) fn batch_strides(dims: &[usize], batch: &[usize], unit: usize) -> Dims {
    let mut strides = Dims::from_elem(0, batch.len());
    let mut step = unit;
    for (i, &d) in dims.iter().enumerate().rev() {
        if d != 1 {
            strides[batch.len() - dims.len() + i] = step;
        }
        step = step.saturating_mul(d);
    }
    strides
}

/// Where the matrices of each product begin in A and B, of these dims, whose batches broadcast.
pub(super) fn batch_offsets(a: &[usize], b: &[usize]) -> Result<Vec<[usize; 2]>> {
    let cut = |dims: &[usize]| -> Result<(Dims, usize)> {
        let (lead, matrix) = dims.split_at(dims.len().saturating_sub(2));
        Ok((lead.into(), element_count(matrix)?))
    };
    let ((a_batch, a_size), (b_batch, b_size)) = (cut(a)?, cut(b)?);
    let batch = crate::fact::broadcast_dims(&a_batch, &b_batch)?;
    let (a_steps, b_steps) = (batch_strides(&a_batch, &batch, a_size), batch_strides(&b_batch, &batch, b_size));
    let at = |i: usize| [offset(i, &batch, &a_steps), offset(i, &batch, &b_steps)];
    Ok((0..element_count(&batch)?).map(at).collect())
}

fn is_zero_fold(rank_a: usize, trans_a: bool, rank_b: usize) -> bool {
    rank_b <= 2 && (!trans_a || rank_a <= 1)
}

impl Operator for MatMul {
    fn name(&self) -> &'static str {
        "MatMul"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        if a.dtype != b.dtype {
            return Err(Error::dtype(format!("operand 0 is {}, operand 1 is {}", a.dtype, b.dtype)));
        }
        let (Some(sa), Some(sb)) = (&a.shape, &b.shape) else {
            return cx.results(vec![Fact::of_dtype(a.dtype)]);
        };
        let scalar = || Error::shape("an operand is a scalar; vectors or matrices were wanted");
        let (a_batch, m, k): (&[Dim], Option<Dim>, Dim) = match sa.as_slice() {
            [] => return Err(scalar()),
            [k] => (&[], None, k.clone()),
            [batch @ .., r, c] if self.trans_a => (batch, Some(c.clone()), r.clone()),
            [batch @ .., r, c] => (batch, Some(r.clone()), c.clone()),
        };
        let (b_batch, l, n): (&[Dim], Dim, Option<Dim>) = match sb.as_slice() {
            [] => return Err(scalar()),
            [k] => (&[], k.clone(), None),
            [batch @ .., r, c] if self.trans_b => (batch, c.clone(), Some(r.clone())),
            [batch @ .., r, c] => (batch, r.clone(), Some(c.clone())),
        };
        if let (Some(k), Some(l)) = (k.known(), l.known())
            && k != l
        {
            let (a, b) = (a.shape_text(), b.shape_text());
            return Err(Error::shape(format!("operands of shapes {a} and {b}: inner sizes {k} and {l} differ")));
        }
        if self.bias
            && let (Some(dims), Some(n)) = (cx.input(2)?.dims(), n.as_ref().and_then(Dim::known))
            && element_count(&dims)? != n
        {
            return Err(Error::shape(format!("the bias is of shape {dims:?}; {n} elements were wanted")));
        }
        let mut shape: Shape = broadcast(a_batch, b_batch)?;
        shape.extend(m);
        shape.extend(n);
        let y = Fact::with_shape(a.dtype, shape);
        if self.residual
            && let (Some(r), Some(y)) = (cx.input(2 + usize::from(self.bias))?.dims(), y.dims())
            && r != y
        {
            return Err(Error::shape(format!("the residual is of shape {r:?}, the result {y:?}")));
        }
        cx.results(vec![y])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        let s = self.sizes(a.dims, b.dims)?;
        // A vector has one row (or column), however it is read.
        let a_strides = if self.trans_a && a.rank() > 1 { [1, s.m] } else { [s.k, 1] };
        let b_strides = if self.trans_b && b.rank() > 1 { [1, s.k] } else { [s.n, 1] };
        let a_steps = batch_strides(&s.a_batch, &s.batch, s.m * s.k);
        let b_steps = batch_strides(&s.b_batch, &s.batch, s.k * s.n);
        if a.dtype != DType::F32 {
            if self.bias || self.residual || self.alpha != 1.0 || self.activation != Activation::Identity {
                return Err(wrong_dtype("operand 0", a.dtype, "float32, in fused products,"));
            }
            let (dtype, a, b) = (a.dtype, a.signless(), b.signless());
            return for_dtype!(a.dtype, [F64, I32, I64], T => {
                let (a, b, y) = (a.as_slice::<T>()?, b.as_slice::<T>()?, io.output(0)?.signless::<T>()?);
                for (i, y) in y.chunks_exact_mut((s.m * s.n).max(1)).enumerate() {
                    let (at, bt) = (offset(i, &s.batch, &a_steps), offset(i, &s.batch, &b_steps));
                    naive::matmul(&a[at..], a_strides, &b[bt..], b_strides, y, [s.m, s.n, s.k]);
                }
                Ok(())
            }, else Err(wrong_dtype("operand 0", dtype, "float32, float64, int32, int64, uint32 and uint64")));
        }
        let rhs = b.as_slice::<f32>()?;
        if is_zero_fold(a.rank(), self.trans_a, b.rank()) {
            let rhs = if self.trans_b && b.rank() == 2 {
                Matrix::new(rhs, s.n, s.k).transposed()
            } else {
                Matrix::new(rhs, s.k, s.n)
            };
            let rows = s.m * element_count(&s.a_batch)?;
            return self.run_flat(cx, io, rows, s.k, s.n, Rhs::Plain(rhs), self.alpha);
        }
        let (bias, residual) = (self.bias(io)?, self.residual(io)?);
        let simple = self.alpha == 1.0 && residual.is_none();
        let c_steps = batch_strides(&s.batch, &s.batch, s.m * s.n);
        let product = Batched {
            batch_dims: &s.batch,
            m: s.m,
            n: s.n,
            k: s.k,
            a: a.as_slice::<f32>()?,
            a_batch_strides: &a_steps,
            a_strides,
            b: rhs,
            b_batch_strides: &b_steps,
            b_strides,
            c_batch_strides: &c_steps,
            ldc: s.n,
            bias: if simple { bias } else { None },
            activation: if simple { self.activation } else { Activation::Identity },
        };
        let y = io.output(0)?.as_slice::<f32>()?;
        gemm_batched(cx, &product, y)?;
        if !simple {
            self.finish(cx, y, s.n, bias, residual, self.alpha);
        }
        Ok(())
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let (a, b) = (cx.dims(0)?, cx.dims(1)?);
        let Some(weights) = cx.constant(1).filter(|b| b.dtype() == DType::F32) else { return Ok(None) };
        if !is_zero_fold(a.len(), self.trans_a, b.len()) {
            return Ok(None);
        }
        let s = self.sizes(&a, &b)?;
        let packed = self.pack(cx, weights)?;
        let rows = s.m * element_count(&s.a_batch)?;
        Ok(Some(Arc::new(Prepared { op: self.clone(), packed, rows })))
    }

    fn prepack(&self, cx: &Prepare) -> Result<&'static [usize]> {
        match (cx.constant(1).filter(|b| b.dtype() == DType::F32), cx.rank(0)) {
            (Some(b), Some(rank)) if is_zero_fold(rank, self.trans_a, b.dims().len()) => {
                self.pack(cx, b)?;
                Ok(&[1])
            }
            _ => Ok(&[]),
        }
    }
}

fn offset(mut index: usize, dims: &[usize], strides: &[usize]) -> usize {
    let mut at = 0;
    for (&d, &s) in dims.iter().zip(strides).rev() {
        at += index % d * s;
        index /= d;
    }
    at
}

#[derive(Debug)]
struct Prepared {
    op: MatMul,
    packed: Arc<PackedB>,
    rows: usize,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (k, n) = (self.packed.k(), self.packed.n());
        self.op.run_flat(cx, io, self.rows, k, n, Rhs::Packed(&self.packed), 1.0)
    }

    fn kernel(&self) -> &str {
        "gemm"
    }

    fn packed_operands(&self) -> &[usize] {
        &[1]
    }

    fn flops(&self) -> u64 {
        2 * self.rows.saturating_mul(self.packed.k()).saturating_mul(self.packed.n()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;

    #[test]
    fn ranks_broadcast_as_in_numpy() {
        let ramp =
            |dims: &[usize]| f32s(dims, &(0..dims.iter().product::<usize>()).map(|i| i as f32).collect::<Vec<_>>());
        let run = |a: &[usize], b: &[usize]| OneNode::new("MatMul").run(&[ramp(a), ramp(b)]).unwrap().remove(0);
        assert_eq!(run(&[3], &[3]).as_slice::<f32>().unwrap(), [5.0]);
        assert_eq!(run(&[3], &[3]).dims(), [0usize; 0]);
        assert_eq!(run(&[2, 3], &[3]).as_slice::<f32>().unwrap(), [5.0, 14.0]);
        assert_eq!(run(&[3], &[2, 3, 1]).as_slice::<f32>().unwrap(), [5.0, 14.0]);
        let y = run(&[2, 1, 1, 2], &[3, 2, 1]);
        assert_eq!(y.dims(), [2, 3, 1, 1]);
        assert_eq!(y.as_slice::<f32>().unwrap(), [1.0, 3.0, 5.0, 3.0, 13.0, 23.0]);
    }

    #[test]
    fn fused_form() {
        let y = OneNode::new("FusedMatMul").domain("com.microsoft").int("transB", 1).float("alpha", 0.5);
        let y = y.run(&[f32s(&[1, 1, 2], &[1.0, 2.0]), f32s(&[1, 2, 2], &[1.0, 2.0, 3.0, 4.0])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [2.5, 5.5]);
    }

    #[test]
    fn integers_and_mistakes() {
        let y = OneNode::new("MatMul").run(&[i64s(&[1, 2], &[3, 4]), i64s(&[2, 1], &[5, 6])]).unwrap();
        assert_eq!(y[0].as_slice::<i64>().unwrap(), [39]);
        let e = OneNode::new("MatMul").run(&[f32s(&[1, 2], &[1.0; 2]), f32s(&[3, 1], &[1.0; 3])]).unwrap_err();
        assert!(e.message.contains("inner sizes 2 and 3"), "{e}");
    }

    #[test]
    fn symbolic_rows_stay() {
        let x = Fact::with_shape(DType::F32, [Dim::Symbol("t".into()), Dim::Known(4)].into_iter().collect());
        let y = OneNode::new("MatMul").infer(&[Some(x), Some(Fact::new(DType::F32, &[4, 5]))]).unwrap();
        assert_eq!(y[0].shape_text(), "[t, 5]");
    }
}
