//! Interpolation of quantised tensors: what the optimiser makes of `Resize` between `DequantizeLinear` and
//! `QuantizeLinear`.

use super::qparams::{bytes, bytes_mut, check_byte};
use super::resize::{Resize, Tables};
use super::{Compute, Infer, Io, Operator, Permuted, Prepare, Registration};
use crate::error::Result;
use crate::fact::Fact;
use crate::tensor::DType;
use std::sync::Arc;
use weblane_kernels::int8::Interpolation;
use weblane_kernels::par::Cx;

/// No model has this operator by name.
pub const OPERATORS: &[Registration] = &[];

/// Operands are those of [`Resize`], of which the first has 8-bit elements.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedResize {
    /// Linear or cubic, and without a region of interest.
    pub resize: Resize,
    /// How the result is quantised; see [`Interpolation`].
    pub interpolation: Interpolation,
    /// Element type of the result: `uint8` or `int8`.
    pub dtype: DType,
}

impl QuantizedResize {
    fn run_tables(&self, cx: &Cx, io: &mut Io, tables: &Tables) -> Result<()> {
        let x = io.input(0)?;
        tables.run_bytes(cx, &self.interpolation, x.dims, bytes(x)?, bytes_mut(io.output(0)?)?)
    }
}

impl Operator for QuantizedResize {
    fn name(&self) -> &'static str {
        "weblane.QuantizedResize"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        check_byte("the operand", cx.input(0)?.dtype)?;
        let mut y = self.resize.infer(cx)?;
        y.iter_mut().for_each(|f| f.dtype = self.dtype);
        cx.results(y)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let tables = self.resize.tables_of(io)?;
        self.run_tables(cx, io, &tables)
    }

    fn prepare(&self, cx: &Prepare) -> Result<Option<Arc<dyn Compute>>> {
        let tables = self.resize.known_tables(cx)?;
        Ok(tables.map(|tables| -> Arc<dyn Compute> { Arc::new(Prepared { op: self.clone(), tables }) }))
    }

    fn shape_operands(&self) -> &'static [usize] {
        self.resize.shape_operands()
    }

    fn permuted(&self, perm: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        let Permuted { op, roles } = self.resize.permuted(perm, operands)?;
        let op = QuantizedResize { resize: op.get::<Resize>()?.clone(), ..self.clone() };
        Some(Permuted { op: op.into(), roles })
    }
}

#[derive(Debug)]
struct Prepared {
    op: QuantizedResize,
    tables: Tables,
}

impl Compute for Prepared {
    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        self.op.run_tables(cx, io, &self.tables)
    }

    fn kernel(&self) -> &str {
        "int8 resize"
    }
}
