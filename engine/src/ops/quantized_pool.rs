//! Means over windows of quantised tensors: what the optimiser makes of `AveragePool` and `GlobalAveragePool` between
//! `DequantizeLinear` and `QuantizeLinear`.

use super::integer_product::run_channels_last;
use super::pool::{GlobalPool, Pool};
use super::qparams::{bytes, bytes_mut, check_byte};
use super::spatial::split_dims;
use super::{Infer, Io, Operator, Permuted, Registration, Role};
use crate::error::Result;
use crate::fact::Fact;
use crate::tensor::DType;
use weblane_kernels::conv::Layout;
use weblane_kernels::int8::{Mean, mean};
use weblane_kernels::par::Cx;
use weblane_kernels::pool::PoolShape;

/// No model has this operator by name.
pub const OPERATORS: &[Registration] = &[];

/// The windows of a mean.
#[derive(Clone, Debug, PartialEq)]
pub enum Windows {
    /// Those of an `AveragePool`.
    Sliding(Pool),
    /// One over all spatial axes.
    Global(GlobalPool),
}

/// `clamp(round((sum of (x - x_zero)) * (multiplier / count)) + zero)`; see [`Mean`].
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMean {
    /// The windows.
    pub windows: Windows,
    /// How means are quantised.
    pub mean: Mean,
    /// Element type of the result: `uint8` or `int8`.
    pub dtype: DType,
}

impl Windows {
    fn layout(&self) -> Layout {
        match self {
            Windows::Sliding(pool) => pool.layout,
            Windows::Global(pool) => pool.layout,
        }
    }

    fn channels_last(&self) -> Windows {
        match self {
            Windows::Sliding(pool) => Windows::Sliding(Pool { layout: Layout::Nhwc, ..pool.clone() }),
            Windows::Global(pool) => Windows::Global(GlobalPool { layout: Layout::Nhwc, ..pool.clone() }),
        }
    }

    fn shape(&self, dims: &[usize]) -> Result<PoolShape> {
        let pool = match self {
            Windows::Sliding(pool) => return pool.shape(dims),
            Windows::Global(pool) => pool,
        };
        let (batch, channels, spatial) = split_dims(dims, pool.layout)?;
        let (one, line, none) = ([1; 3], [1, 1, spatial.iter().product()], [0; 3]);
        Ok(PoolShape {
            batch,
            channels,
            input: line,
            output: one,
            kernel: line,
            strides: one,
            dilations: one,
            begin: none,
            end: none,
        })
    }
}

impl Operator for QuantizedMean {
    fn name(&self) -> &'static str {
        match self.windows {
            Windows::Sliding(_) => "weblane.QuantizedAveragePool",
            Windows::Global(_) => "weblane.QuantizedGlobalAveragePool",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_byte("an operand", x.dtype)?;
        let real = Fact { dtype: DType::F32, shape: x.shape.clone(), content: Default::default() };
        let as_real = Infer { inputs: &[Some(&real)], outputs: 1, cx: cx.cx };
        let mut y = match &self.windows {
            Windows::Sliding(pool) => pool.infer(&as_real)?,
            Windows::Global(pool) => pool.infer(&as_real)?,
        };
        y.iter_mut().for_each(|f| f.dtype = self.dtype);
        cx.results(y)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        if self.windows.layout() == Layout::Nchw {
            let op = QuantizedMean { windows: self.windows.channels_last(), ..self.clone() };
            return run_channels_last(cx, io, &[0], &|io| op.run(cx, io));
        }
        let x = io.input(0)?;
        let shape = self.windows.shape(x.dims)?;
        Ok(mean(cx, &self.mean, &shape, bytes(x)?, bytes_mut(io.output(0)?)?)?)
    }

    fn channels_last(&self, _: &[Option<&Fact>]) -> Option<Permuted> {
        let op = QuantizedMean { windows: self.windows.channels_last(), ..self.clone() };
        (self.windows.layout() == Layout::Nchw).then(|| Permuted { op: op.into(), roles: vec![Role::Permute] })
    }
}
