//! Means over windows of quantised tensors: what the optimiser makes of `AveragePool` and `GlobalAveragePool` between
//! `DequantizeLinear` and `QuantizeLinear`.

use super::integer_product::{bytes_mut, bytes_of, check_bytes};
use super::pool::{GlobalPool, Pool};
use super::spatial::split_dims;
use super::{Infer, Io, Operator, Permuted, Registration, Role, wrong_dtype};
use crate::error::Result;
use crate::fact::Fact;
use crate::tensor::DType;
use weblane_kernels::conv::Layout;
use weblane_kernels::int8::BytesMut;
use weblane_kernels::par::Cx;
use weblane_kernels::pool::{PoolOp, PoolShape};

/// No model has this operator by name.
pub const OPERATORS: &[Registration] = &[];

/// The windows of a mean.
#[derive(Clone, Debug)]
pub enum Windows {
    /// Those of an `AveragePool`.
    Sliding(Pool),
    /// One over all spatial axes.
    Global(GlobalPool),
}

/// `clamp(round((sum of (x - x_zero)) * (multiplier / count)) + zero)`, halves to even, in `float32`; bounds are those of
/// the element type. Padding stands for the zero point, where it counts.
#[derive(Clone, Debug)]
pub struct QuantizedMean {
    /// The windows.
    pub windows: Windows,
    /// Zero point of the operand.
    pub x_zero: i32,
    /// Scale of the operand over that of the result.
    pub multiplier: f32,
    /// Zero point of the result.
    pub zero: i32,
    /// Element type of the result: `uint8` or `int8`.
    pub dtype: DType,
}

impl QuantizedMean {
    fn layout(&self) -> Layout {
        match &self.windows {
            Windows::Sliding(pool) => pool.layout,
            Windows::Global(pool) => pool.layout,
        }
    }

    fn shape(&self, dims: &[usize]) -> Result<(PoolShape, bool)> {
        match &self.windows {
            Windows::Sliding(pool) => Ok((pool.shape(dims)?, pool.op == PoolOp::Average { include_pad: true })),
            Windows::Global(pool) => {
                let (batch, channels, spatial) = split_dims(dims, pool.layout)?;
                let (one, line) = ([1; 3], [1, 1, spatial.iter().product()]);
                let zero = [0; 3];
                let shape = PoolShape {
                    batch,
                    channels,
                    input: line,
                    output: one,
                    kernel: line,
                    strides: one,
                    dilations: one,
                    begin: zero,
                    end: zero,
                };
                Ok((shape, false))
            }
        }
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
        check_bytes(x)?;
        let real = Fact { dtype: DType::F32, shape: x.shape.clone(), content: Default::default() };
        let as_real = Infer { inputs: &[Some(real)], outputs: 1, cx: cx.cx };
        let mut y = match &self.windows {
            Windows::Sliding(pool) => pool.infer(&as_real)?,
            Windows::Global(pool) => pool.infer(&as_real)?,
        };
        y.iter_mut().for_each(|f| f.dtype = self.dtype);
        cx.results(y)
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let (s, include_pad) = self.shape(x.dims)?;
        let x = bytes_of(x)?;
        let y = io.output(0)?;
        let (lo, hi) = match y.dtype {
            DType::U8 => (0, 255),
            DType::I8 => (-128, 127),
            other => return Err(wrong_dtype("the result", other, "uint8 and int8")),
        };
        let mut y = bytes_mut(y)?;
        let [pixels, windows] = [s.input, s.output].map(|spatial| spatial.iter().product::<usize>());
        let at = |image: usize, channel: usize, pixel: usize, pixels: usize| match self.layout() {
            Layout::Nchw => (image * s.channels + channel) * pixels + pixel,
            Layout::Nhwc => (image * pixels + pixel) * s.channels + channel,
        };
        for image in 0..s.batch {
            for window in 0..windows {
                let o = [window / s.output[2] / s.output[1], window / s.output[2] % s.output[1], window % s.output[2]];
                let taps = |axis: usize| {
                    (0..s.kernel[axis]).map(move |k| o[axis] * s.strides[axis] + k * s.dilations[axis])
                };
                let inside = |axis: usize| {
                    taps(axis).filter_map(move |p| p.checked_sub(s.begin[axis]).filter(|&p| p < s.input[axis]))
                };
                let counted = |axis: usize| match include_pad {
                    true => taps(axis).filter(|&p| p < s.begin[axis] + s.input[axis] + s.end[axis]).count(),
                    false => inside(axis).count(),
                };
                let factor = self.multiplier / (counted(0) * counted(1) * counted(2)) as f32;
                for channel in 0..s.channels {
                    let mut sum = 0i32;
                    for d in inside(0) {
                        for h in inside(1) {
                            for w in inside(2) {
                                let pixel = (d * s.input[1] + h) * s.input[2] + w;
                                let v = x.get(at(image, channel, pixel, pixels)) - self.x_zero;
                                sum = sum.wrapping_add(v);
                            }
                        }
                    }
                    let q = ((sum as f32 * factor).round_ties_even() as i32).saturating_add(self.zero).clamp(lo, hi);
                    let to = at(image, channel, window, windows);
                    match &mut y {
                        BytesMut::U8(y) => y[to] = q as u8,
                        BytesMut::I8(y) => y[to] = q as i8,
                    }
                }
            }
        }
        Ok(())
    }

    fn channels_last(&self, _: &[Option<Fact>]) -> Option<Permuted> {
        if self.layout() == Layout::Nhwc {
            return None;
        }
        let windows = match &self.windows {
            Windows::Sliding(pool) => Windows::Sliding(Pool { layout: Layout::Nhwc, ..pool.clone() }),
            Windows::Global(pool) => Windows::Global(GlobalPool { layout: Layout::Nhwc, ..pool.clone() }),
        };
        Some(Permuted { op: QuantizedMean { windows, ..self.clone() }.into(), roles: vec![Role::Permute] })
    }
}
