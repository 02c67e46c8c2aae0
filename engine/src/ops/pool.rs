//! MaxPool, AveragePool, LpPool and their global forms.

use super::qparams::{bytes, bytes_mut};
use super::spatial::{Sliding, Window, join, split_dims, split_fact};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, Role, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::for_dtype;
use crate::tensor::DType;
use weblane_kernels::conv::Layout;
use weblane_kernels::int8::max_pool;
use weblane_kernels::par::Cx;
use weblane_kernels::pool::{PoolOp, PoolShape, max_pool_indices, pool, pool_any};
use weblane_kernels::reduce::{Reduction, reduce};

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("MaxPool", 1, parse),
    Registration::onnx("AveragePool", 1, parse),
    Registration::onnx("LpPool", 2, parse),
    Registration::onnx("GlobalMaxPool", 1, parse_global),
    Registration::onnx("GlobalAveragePool", 1, parse_global),
    Registration::onnx("GlobalLpPool", 2, parse_global),
];

/// A pooling over windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Window, strides, dilations and padding.
    pub window: Window,
    /// What is computed.
    pub op: PoolOp,
    /// Of the operand and the result.
    pub layout: Layout,
    /// Whether indices of maxima count columns first.
    pub column_major: bool,
    /// Whether the second result, the indices of the maxima, is wanted: they count channels first.
    pub indices: bool,
}

/// A pooling over all spatial axes.
#[derive(Clone, Debug, PartialEq)]
pub struct GlobalPool {
    /// What is computed.
    pub op: PoolOp,
    /// Of the operand and the result.
    pub layout: Layout,
}

fn exponent(a: &mut Attributes) -> Result<f32> {
    match a.int_or("p", 2)? {
        p @ 1..=1000 => Ok(p as f32),
        p => Err(Error::unsupported_attribute(format!("attribute p is {p}; 1 to 1000 was wanted"))),
    }
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let mut window = Window::parse(a)?;
    if window.kernel.is_none() {
        return Err(Error::invalid_model("attribute kernel_shape is missing"));
    }
    window.ceil = a.flag_or("ceil_mode", false)?;
    let mut column_major = false;
    let op = match a.op_type() {
        "MaxPool" => {
            column_major = a.flag_or("storage_order", false)?;
            PoolOp::Max
        }
        "AveragePool" => PoolOp::Average { include_pad: a.flag_or("count_include_pad", false)? },
        _ => PoolOp::Lp { p: exponent(a)? },
    };
    let indices = op == PoolOp::Max && a.output_count() > 1;
    Ok(Pool { window, op, layout: Layout::Nchw, column_major, indices }.into())
}

fn parse_global(a: &mut Attributes) -> Result<Op> {
    let op = match a.op_type() {
        "GlobalMaxPool" => PoolOp::Max,
        "GlobalAveragePool" => PoolOp::Average { include_pad: false },
        _ => PoolOp::Lp { p: exponent(a)? },
    };
    Ok(GlobalPool { op, layout: Layout::Nchw }.into())
}

impl Pool {
    pub(super) fn shape(&self, dims: &[usize]) -> Result<PoolShape> {
        let (batch, channels, spatial) = split_dims(dims, self.layout)?;
        let kernel = self.window.kernel.as_deref().unwrap_or_default();
        let Sliding { input, kernel, strides, dilations, begin, end, output } = self.window.over(&spatial, kernel)?;
        Ok(PoolShape { batch, channels, input, output, kernel, strides, dilations, begin, end })
    }
}

impl Operator for Pool {
    fn name(&self) -> &'static str {
        match self.op {
            PoolOp::Max => "MaxPool",
            PoolOp::Average { .. } => "AveragePool",
            PoolOp::Lp { .. } => "LpPool",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let indices = |y: &Fact| Fact { dtype: DType::I64, ..y.clone() };
        let Some((batch, channels, spatial)) = split_fact(x, self.layout)? else {
            let y = Fact::of_dtype(x.dtype);
            return cx.results(vec![y.clone(), indices(&y)]);
        };
        if self.op == PoolOp::Max && cx.outputs > 1 && self.layout == Layout::Nhwc {
            return Err(Error::internal("indices of maxima are computed channels first only"));
        }
        let kernel: Shape = self.window.kernel.iter().flatten().map(|&k| Dim::Known(k)).collect();
        if kernel.len() != spatial.len() {
            return Err(Error::shape(format!(
                "attribute kernel_shape has {} numbers, the operand {} has {} spatial axes",
                kernel.len(),
                x.shape_text(),
                spatial.len()
            )));
        }
        let spatial = self.window.infer(&spatial, &kernel)?;
        let y = Fact::with_shape(x.dtype, join(batch, channels, spatial, self.layout));
        let mut results = vec![y.clone()];
        if self.op == PoolOp::Max {
            results.push(indices(&y));
        }
        cx.results(results)
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let shape = self.shape(x.dims)?;
        if io.outputs.len() > 1 {
            let mut indices = vec![0i64; io.output(1)?.len()];
            for_dtype!(x.dtype, [F32, F64, I8, U8], T => {
                let y = io.output(0)?.as_slice::<T>()?;
                max_pool_indices(&shape, x.as_slice::<T>()?, y, Some(&mut indices), self.column_major)?;
            }, else return Err(wrong_dtype("the operand", x.dtype, "float32, float64, int8 and uint8")));
            io.output(1)?.as_slice::<i64>()?.copy_from_slice(&indices);
            return Ok(());
        }
        if x.dtype == DType::F32 {
            let y = io.output(0)?.as_slice::<f32>()?;
            return Ok(pool(cx, self.op, &shape, self.layout, x.as_slice::<f32>()?, y)?);
        }
        if self.layout == Layout::Nhwc {
            let is_byte = matches!(x.dtype, DType::U8 | DType::I8) && self.op == PoolOp::Max;
            if !is_byte {
                return Err(wrong_dtype("the operand", x.dtype, "float32, and maxima of bytes, channels last,"));
            }
            return Ok(max_pool(cx, &shape, bytes(x)?, bytes_mut(io.output(0)?)?)?);
        }
        for_dtype!(x.dtype, [F64, I8, U8], T => {
            Ok(pool_any(self.op, &shape, x.as_slice::<T>()?, io.output(0)?.as_slice::<T>()?)?)
        }, else Err(wrong_dtype("the operand", x.dtype, "float32, float64, int8 and uint8")))
    }

    fn channels_last(&self, operands: &[Option<&Fact>]) -> Option<Permuted> {
        let x = operands.first()?.as_ref()?;
        let fits = match x.dtype {
            DType::F32 => !matches!(self.op, PoolOp::Lp { .. }),
            DType::U8 | DType::I8 => self.op == PoolOp::Max,
            _ => false,
        };
        if !fits || self.layout == Layout::Nhwc || self.indices {
            return None;
        }
        let op = Pool { layout: Layout::Nhwc, ..self.clone() }.into();
        Some(Permuted { op, roles: vec![Role::Permute] })
    }
}

impl Operator for GlobalPool {
    fn name(&self) -> &'static str {
        match self.op {
            PoolOp::Max => "GlobalMaxPool",
            PoolOp::Average { .. } => "GlobalAveragePool",
            PoolOp::Lp { .. } => "GlobalLpPool",
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        let Some((batch, channels, spatial)) = split_fact(x, self.layout)? else {
            return cx.results(vec![Fact::of_dtype(x.dtype)]);
        };
        let ones = spatial.iter().map(|_| Dim::Known(1)).collect();
        cx.results(vec![Fact::with_shape(x.dtype, join(batch, channels, ones, self.layout))])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let (batch, channels, spatial) = split_dims(x.dims, self.layout)?;
        let n: usize = spatial.iter().product();
        let reduction = match self.op {
            PoolOp::Max => Reduction::Max,
            PoolOp::Average { .. } => Reduction::Mean,
            PoolOp::Lp { p: 1.0 } => Reduction::L1,
            PoolOp::Lp { p: 2.0 } => Reduction::L2,
            PoolOp::Lp { .. } => return self.run_windows(io, batch, channels, n),
        };
        if x.dtype != DType::F32 {
            return self.run_windows(io, batch, channels, n);
        }
        let y = io.output(0)?.as_slice::<f32>()?;
        let (dims, reduced) = match self.layout {
            Layout::Nchw => ([batch, channels, n], [false, false, true]),
            Layout::Nhwc => ([batch, n, channels], [false, true, false]),
        };
        Ok(reduce(cx, reduction, x.as_slice::<f32>()?, &dims, &reduced, y)?)
    }

    fn channels_last(&self, operands: &[Option<&Fact>]) -> Option<Permuted> {
        let x = operands.first()?.as_ref()?;
        let fits = x.dtype == DType::F32 && self.layout == Layout::Nchw;
        let fits = fits && matches!(self.op, PoolOp::Max | PoolOp::Average { .. });
        let op = GlobalPool { layout: Layout::Nhwc, ..self.clone() }.into();
        fits.then(|| Permuted { op, roles: vec![Role::Permute] })
    }
}

impl GlobalPool {
    /// One window over everything, for what the reductions do not have.
    fn run_windows(&self, io: &mut Io, batch: usize, channels: usize, n: usize) -> Result<()> {
        let x = io.input(0)?;
        if self.layout == Layout::Nhwc {
            return Err(Error::internal("this pooling is computed channels first only"));
        }
        let line = [1, 1, n.max(1)];
        let one = [1; 3];
        let shape = PoolShape {
            batch,
            channels,
            input: [1, 1, n],
            output: one,
            kernel: line,
            strides: one,
            dilations: one,
            begin: [0; 3],
            end: [0; 3],
        };
        for_dtype!(x.dtype, [F32, F64], T => {
            Ok(pool_any(self.op, &shape, x.as_slice::<T>()?, io.output(0)?.as_slice::<T>()?)?)
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use super::*;
    use crate::tensor::Tensor;

    fn ramp(dims: &[usize]) -> Tensor {
        f32s(dims, &(1..=dims.iter().product::<usize>()).map(|i| i as f32).collect::<Vec<_>>())
    }

    #[test]
    fn maxima_with_indices_in_both_orders() {
        let node = || OneNode::new("MaxPool").ints("kernel_shape", &[5, 5]).ints("pads", &[2, 2, 2, 2]).outputs(2);
        let y = node().run(&[ramp(&[1, 1, 5, 5])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap()[..5], [13.0, 14.0, 15.0, 15.0, 15.0]);
        assert_eq!(y[1].as_slice::<i64>().unwrap()[..5], [12, 13, 14, 14, 14]);
        let y = node().int("storage_order", 1).run(&[ramp(&[1, 1, 5, 5])]).unwrap();
        assert_eq!(y[1].as_slice::<i64>().unwrap()[..3], [12, 17, 22]);
    }

    #[test]
    fn bytes_are_pooled() {
        let x = Tensor::from_slice(&[1, 1, 3], &[-3i8, -1, -2]).unwrap();
        let y = OneNode::new("MaxPool").ints("kernel_shape", &[2]).run(&[x]).unwrap();
        assert_eq!(y[0].as_slice::<i8>().unwrap(), [-1, -1]);
    }

    #[test]
    fn padding_counts_when_it_should() {
        let node = || OneNode::new("AveragePool").ints("kernel_shape", &[2]).ints("pads", &[1, 0]);
        let y = node().run(&[ramp(&[1, 1, 2])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [1.0, 1.5]);
        let y = node().int("count_include_pad", 1).run(&[ramp(&[1, 1, 2])]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [0.5, 1.5]);
    }

    #[test]
    fn global_forms() {
        let run = |name| OneNode::new(name).run(&[ramp(&[1, 2, 2, 1])]).unwrap()[0].as_slice::<f32>().unwrap().to_vec();
        assert_eq!(run("GlobalAveragePool"), [1.5, 3.5]);
        assert_eq!(run("GlobalMaxPool"), [2.0, 4.0]);
        assert_eq!(run("GlobalLpPool"), [5f32.sqrt(), 5.0]);
    }

    #[test]
    fn channels_last_keeps_symbols() {
        let x =
            Fact::with_shape(DType::F32, [Dim::Symbol("n".into()), 3.into(), 8.into(), 8.into()].into_iter().collect());
        let y = OneNode::new("GlobalAveragePool").infer(&[Some(x)]).unwrap();
        assert_eq!(y[0].shape_text(), "[n, 3, 1, 1]");
    }

    #[test]
    fn a_missing_window_is_named() {
        let e = OneNode::new("MaxPool").run(&[ramp(&[1, 1, 2])]).unwrap_err();
        assert!(e.message.contains("kernel_shape"), "{e}");
    }
}
