//! Pointwise functions of two or more tensors, with NumPy broadcasting.

use super::cast::{convert, converted};
use super::identity::copy;
use super::sizes::{
    Axes, broadcast_strides, copy_axes, dim_difference, dim_product, dim_sum, kernel_error, loose_sizes, sizes_fact,
    strides,
};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact, Shape, broadcast};
use crate::for_dtype;
use crate::tensor::{DType, Element, Tensor, TensorMut, TensorView};
use bytemuck::cast;
use std::sync::Arc;
use weblane_kernels::elementwise::{self, Binary, binary_f32, binary_f32_assign, broadcast_map, broadcast_map_assign};
use weblane_kernels::movement::Axis;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("Add", 7, |_| Ok(Arithmetic::new("Add", Function::Kernel(Binary::Add)).into())),
    Registration::onnx("Sub", 7, |_| Ok(Arithmetic::new("Sub", Function::Kernel(Binary::Sub)).into())),
    Registration::onnx("Mul", 7, |_| Ok(Arithmetic::new("Mul", Function::Kernel(Binary::Mul)).into())),
    Registration::onnx("Div", 7, |_| Ok(Arithmetic::new("Div", Function::Kernel(Binary::Div)).into())),
    Registration::onnx("PRelu", 7, |_| Ok(Arithmetic::new("PRelu", Function::Kernel(Binary::PRelu)).into())),
    Registration::onnx("Pow", 7, |_| Ok(Pow.into())),
    Registration::onnx("Mod", 10, |a| {
        let fmod = a.flag_or("fmod", false)?;
        Ok(Arithmetic::new("Mod", if fmod { Function::Kernel(Binary::Rem) } else { Function::FloorMod }).into())
    }),
    Registration::onnx("And", 7, |_| Ok(Arithmetic::new("And", Function::And).into())),
    Registration::onnx("Or", 7, |_| Ok(Arithmetic::new("Or", Function::Or).into())),
    Registration::onnx("Xor", 7, |_| Ok(Arithmetic::new("Xor", Function::Xor).into())),
    Registration::onnx("BitwiseAnd", 18, |_| Ok(Arithmetic::new("BitwiseAnd", Function::And).into())),
    Registration::onnx("BitwiseOr", 18, |_| Ok(Arithmetic::new("BitwiseOr", Function::Or).into())),
    Registration::onnx("BitwiseXor", 18, |_| Ok(Arithmetic::new("BitwiseXor", Function::Xor).into())),
    Registration::onnx("BitShift", 11, |a| {
        if !a.has("direction") {
            return Err(Error::invalid_model("attribute direction is missing"));
        }
        let function = a.choice("direction", &[("LEFT", Function::ShiftLeft), ("RIGHT", Function::ShiftRight)])?;
        Ok(Arithmetic::new("BitShift", function).into())
    }),
    Registration::onnx("Max", 6, |a| Ok(variadic(a, "Max", Binary::Max))),
    Registration::onnx("Min", 6, |a| Ok(variadic(a, "Min", Binary::Min))),
    Registration::onnx("Sum", 6, |a| Ok(variadic(a, "Sum", Binary::Add))),
    Registration::onnx("Mean", 6, |_| Ok(Variadic { name: "Mean", function: Binary::Add }.into())),
    Registration::onnx("Equal", 7, |_| Ok(Compare { name: "Equal", relation: Relation::Equal }.into())),
    Registration::onnx("Less", 7, |_| Ok(Compare { name: "Less", relation: Relation::Less }.into())),
    Registration::onnx("LessOrEqual", 12, |_| {
        Ok(Compare { name: "LessOrEqual", relation: Relation::LessOrEqual }.into())
    }),
    Registration::onnx("Greater", 7, |_| Ok(Compare { name: "Greater", relation: Relation::Greater }.into())),
    Registration::onnx("GreaterOrEqual", 12, |_| {
        Ok(Compare { name: "GreaterOrEqual", relation: Relation::GreaterOrEqual }.into())
    }),
];

/// With two operands, as residual connections have, the variadic ones are the plain function.
fn variadic(a: &Attributes, name: &'static str, function: Binary) -> Op {
    match a.input_count() {
        2 => Arithmetic::new(name, Function::Kernel(function)).into(),
        _ => Variadic { name, function }.into(),
    }
}

/// A function of two numbers of one type that gives a number of that type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// One that the kernels have for `float32`.
    Kernel(Binary),
    /// Remainder with the sign of the divisor.
    FloorMod,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
    /// `a << b`; 0 when all bits are shifted out, as a negative count does too.
    ShiftLeft,
    /// `a >> b`; 0, or -1 for negative numbers, when all bits are shifted out.
    ShiftRight,
}

/// `y = f(a, b)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Arithmetic {
    name: &'static str,
    /// The function.
    pub function: Function,
}

impl Arithmetic {
    /// A function under the name that profiles show.
    pub fn new(name: &'static str, function: Function) -> Self {
        Arithmetic { name, function }
    }

    fn check_dtype(&self, dtype: DType) -> Result<()> {
        let logical = matches!(self.name, "And" | "Or" | "Xor");
        let integers = !matches!(self.function, Function::Kernel(_) | Function::FloorMod);
        // Of integers it is an operator of its own.
        let power = self.function == Function::Kernel(Binary::Pow);
        let fits = match dtype {
            DType::Bool => logical,
            DType::F32 | DType::F64 | DType::F16 | DType::Bf16 => !integers,
            DType::String => false,
            d => d.bits() >= 8 && !logical && !power,
        };
        let wanted = if logical {
            "bool"
        } else if integers {
            "integers"
        } else {
            "numbers"
        };
        if fits { Ok(()) } else { Err(wrong_dtype("an operand", dtype, wanted)) }
    }
}

/// The shape that two operands broadcast to.
fn broadcast_facts(a: &Fact, b: &Fact) -> Result<Option<Shape>> {
    match (&a.shape, &b.shape) {
        (Some(x), Some(y)) => broadcast(x, y).map(Some),
        _ => Ok(None),
    }
}

fn same_dtype(a: &Fact, b: &Fact) -> Result<()> {
    if a.dtype == b.dtype {
        return Ok(());
    }
    Err(Error::dtype(format!("the operands are {} and {}; the same type was wanted", a.dtype, b.dtype)))
}

impl Operator for Arithmetic {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        same_dtype(a, b)?;
        self.check_dtype(a.dtype)?;
        let shape = broadcast_facts(a, b)?;
        if self.function == Function::Kernel(Binary::PRelu)
            && let (Some(x), Some(y)) = (&a.shape, &shape)
            && (x.len() != y.len()
                || x.iter().zip(y).any(|(x, y)| matches!((x, y), (Dim::Known(1), Dim::Known(n)) if *n != 1)))
        {
            let (slope, x) = (b.shape_text(), a.shape_text());
            return Err(Error::shape(format!("slopes of shape {slope} do not broadcast to the operand's shape {x}")));
        }
        if let (Function::Kernel(function), Some(shape)) = (self.function, &shape)
            && let Some(fact) = arithmetic_of_sizes(function, a, b, shape)?
        {
            return cx.results(vec![fact]);
        }
        cx.results(vec![Fact { dtype: a.dtype, shape, content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let dtype = io.output(0)?.dtype;
        if let (DType::F32, Function::Kernel(function)) = (dtype, self.function) {
            return run_f32(cx, function, io);
        }
        if let Function::Kernel(Binary::Div | Binary::Rem) | Function::FloorMod = self.function
            && !dtype.is_float()
        {
            let zero = match io.optional(1) {
                Some(b) => has_zero(b)?,
                None => has_zero(io.output(0)?.as_view())?,
            };
            if zero {
                return Err(Error::invalid_input("a division of integers by zero"));
            }
        }
        for_dtype!(dtype, [F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, Bool], T =>
            run_as_bits(cx, io, T::function(self.function)), else Err(wrong_dtype("an operand", dtype, "numbers")))
    }

    fn in_place(&self) -> &'static [usize] {
        &[0, 1]
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 2)
    }
}

fn run_f32(cx: &Cx, function: Binary, io: &mut Io) -> Result<()> {
    match io.in_place {
        Some(held) => {
            let other = io.input(1 - held.min(1))?;
            let y = io.output(0)?;
            let dims = y.dims;
            binary_f32_assign(cx, function, held == 1, y.as_slice()?, dims, other.as_slice()?, other.dims)
        }
        None => {
            let (a, b) = (io.input(0)?, io.input(1)?);
            let y = io.output(0)?;
            let dims = y.dims;
            binary_f32(cx, function, a.as_slice()?, a.dims, b.as_slice()?, b.dims, y.as_slice()?, dims)
        }
    }
    .map_err(kernel_error)
}

fn run_as_bits<B: Element>(cx: &Cx, io: &mut Io, f: fn(B, B) -> B) -> Result<()> {
    match io.in_place {
        Some(held) => {
            let other = io.input(1 - held.min(1))?;
            assign_as_bits(cx, io.output(0)?, other, held == 1, f)
        }
        None => {
            let (a, b) = (io.input(0)?.as_bits(), io.input(1)?.as_bits());
            let y = io.output(0)?;
            let dims = y.dims;
            broadcast_map(cx, 8, a.as_slice()?, a.dims, b.as_slice()?, b.dims, y.as_bits()?, dims, f)
                .map_err(kernel_error)
        }
    }
}

/// `y = f(y, other)`, or `f(other, y)` when swapped.
fn assign_as_bits<B: Element>(
    cx: &Cx,
    y: &mut TensorMut,
    other: TensorView,
    swapped: bool,
    f: fn(B, B) -> B,
) -> Result<()> {
    let dims = y.dims;
    let b = other.as_bits();
    let f = |y, b| if swapped { f(b, y) } else { f(y, b) };
    broadcast_map_assign(cx, 8, y.as_bits()?, dims, b.as_slice()?, b.dims, f).map_err(kernel_error)
}

/// `y = f(y, other)` for tensors of any numbers, the other one broadcast.
pub(super) fn assign(cx: &Cx, function: Binary, y: &mut TensorMut, other: TensorView) -> Result<()> {
    if y.dtype == DType::F32 {
        let dims = y.dims;
        return binary_f32_assign(cx, function, false, y.as_slice()?, dims, other.as_slice()?, other.dims)
            .map_err(kernel_error);
    }
    for_dtype!(y.dtype, [F64, I8, I16, I32, I64, U8, U16, U32, U64], T =>
        assign_as_bits(cx, y, other, false, T::function(Function::Kernel(function))),
        else Err(wrong_dtype("an operand", y.dtype, "numbers")))
}

fn has_zero(v: TensorView) -> Result<bool> {
    let v = v.signless();
    for_dtype!(v.dtype, [I8, I16, I32, I64], T => Ok(v.as_slice::<T>()?.contains(&0)), else Ok(false))
}

/// A type that the functions are defined for. They are reached through pointers and take numbers as integers of their
/// size, so that the loop around them is compiled once per size and not once per type and function.
trait Number: Element + PartialOrd {
    type Bits: Element;
    fn function(function: Function) -> fn(Self::Bits, Self::Bits) -> Self::Bits;

    fn relation(relation: Relation) -> fn(Self::Bits, Self::Bits) -> u8 {
        match relation {
            Relation::Equal => |a, b| u8::from(cast::<_, Self>(a) == cast(b)),
            Relation::Less => |a, b| u8::from(cast::<_, Self>(a) < cast(b)),
            Relation::LessOrEqual => |a, b| u8::from(cast::<_, Self>(a) <= cast(b)),
            Relation::Greater => |a, b| u8::from(cast::<_, Self>(a) > cast(b)),
            Relation::GreaterOrEqual => |a, b| u8::from(cast::<_, Self>(a) >= cast(b)),
        }
    }
}

/// A function of two numbers `$t` as one of their bits.
macro_rules! on {
    ($t:ty, |$a:ident, $b:ident| $y:expr) => {
        |a, b| {
            let ($a, $b): ($t, $t) = (cast(a), cast(b));
            let y: $t = $y;
            cast(y)
        }
    };
}

macro_rules! integer_functions {
    ($($t:ty as $bits:ty),*) => { $(
        impl Number for $t {
            type Bits = $bits;
            #[allow(unused_comparisons)]
            fn function(function: Function) -> fn($bits, $bits) -> $bits {
                match function {
                    Function::Kernel(Binary::Add) => on!($t, |a, b| a.wrapping_add(b)),
                    Function::Kernel(Binary::Sub) => on!($t, |a, b| a.wrapping_sub(b)),
                    Function::Kernel(Binary::Mul) => on!($t, |a, b| a.wrapping_mul(b)),
                    // Zero was refused before.
                    Function::Kernel(Binary::Div) => on!($t, |a, b| if b == 0 { 0 } else { a.wrapping_div(b) }),
                    Function::Kernel(Binary::Rem) => on!($t, |a, b| if b == 0 { 0 } else { a.wrapping_rem(b) }),
                    Function::Kernel(Binary::Min) => on!($t, |a, b| a.min(b)),
                    Function::Kernel(Binary::Max) => on!($t, |a, b| a.max(b)),
                    Function::Kernel(Binary::PRelu) => on!($t, |a, b| if a < 0 { a.wrapping_mul(b) } else { a }),
                    // `check_dtype` lets no integers come here.
                    Function::Kernel(Binary::Pow) => |a, _| a,
                    Function::FloorMod => on!($t, |a, b| {
                        let r = if b == 0 { 0 } else { a.wrapping_rem(b) };
                        if r != 0 && (r < 0) != (b < 0) { r.wrapping_add(b) } else { r }
                    }),
                    Function::And => |a, b| a & b,
                    Function::Or => |a, b| a | b,
                    Function::Xor => |a, b| a ^ b,
                    Function::ShiftLeft => {
                        on!($t, |a, b| u32::try_from(b).ok().and_then(|b| a.checked_shl(b)).unwrap_or(0))
                    }
                    // Shifting everything out, as a negative count does too, leaves the sign.
                    Function::ShiftRight => on!($t, |a, b| {
                        u32::try_from(b).ok().and_then(|b| a.checked_shr(b)).unwrap_or((a >> (<$t>::BITS - 1)) >> 1)
                    }),
                }
            }
        }
    )* };
}
integer_functions!(i8 as u8, i16 as u16, i32 as u32, i64 as u64, u8 as u8, u16 as u16, u32 as u32, u64 as u64);

macro_rules! float_functions {
    ($($t:ty as $bits:ty),*) => { $(
        impl Number for $t {
            type Bits = $bits;
            fn function(function: Function) -> fn($bits, $bits) -> $bits {
                match function {
                    Function::Kernel(Binary::Add) => on!($t, |a, b| a + b),
                    Function::Kernel(Binary::Sub) => on!($t, |a, b| a - b),
                    Function::Kernel(Binary::Mul) => on!($t, |a, b| a * b),
                    Function::Kernel(Binary::Div) => on!($t, |a, b| a / b),
                    Function::Kernel(Binary::Rem) => on!($t, |a, b| a % b),
                    // Those of std drop NaN.
                    Function::Kernel(Binary::Min) => on!($t, |a, b| if a.is_nan() || a < b { a } else { b }),
                    Function::Kernel(Binary::Max) => on!($t, |a, b| if a.is_nan() || a > b { a } else { b }),
                    Function::Kernel(Binary::PRelu) => on!($t, |a, b| if a < 0.0 { a * b } else { a }),
                    Function::Kernel(Binary::Pow) => on!($t, |a, b| a.powf(b)),
                    Function::FloorMod => on!($t, |a, b| {
                        let r = a % b;
                        if r == 0.0 {
                            (0.0 as $t).copysign(b)
                        } else if (r < 0.0) != (b < 0.0) {
                            r + b
                        } else {
                            r
                        }
                    }),
                    // `check_dtype` lets only integers come here.
                    _ => |a, _| a,
                }
            }
        }
    )* };
}
float_functions!(f32 as u32, f64 as u64);

/// `a^b`, wrapping; a negative exponent gives the truncated fraction.
fn power(a: i64, exponent: i64) -> i64 {
    if exponent < 0 {
        return match a {
            1 => 1,
            -1 => 1 - 2 * (exponent & 1),
            _ => 0,
        };
    }
    let (mut base, mut rest, mut out) = (a, exponent, 1i64);
    while rest > 0 {
        if rest & 1 == 1 {
            out = out.wrapping_mul(base);
        }
        base = base.wrapping_mul(base);
        rest >>= 1;
    }
    out
}

/// Shape arithmetic: sums, products ... of sizes of which some are names.
fn arithmetic_of_sizes(function: Binary, a: &Fact, b: &Fact, shape: &Shape) -> Result<Option<Fact>> {
    let is_sizes = |f: &Fact| matches!(f.content, Content::Dims(_));
    let rank = shape.len();
    if !(is_sizes(a) || is_sizes(b)) || rank > 1 {
        return Ok(None);
    }
    let (Some(x), Some(y)) = (loose_sizes(a), loose_sizes(b)) else { return Ok(None) };
    let count = x.len().max(y.len());
    let at = |s: &Shape, i: usize| s.get(if s.len() == 1 { 0 } else { i }).cloned().unwrap_or(Dim::Unknown);
    let one = |p: Dim, q: Dim| -> Result<Dim> {
        Ok(match (function, &p, &q) {
            (Binary::Add, ..) => dim_sum(&p, &q)?,
            (Binary::Mul, ..) => dim_product(&p, &q)?,
            (Binary::Sub, ..) => dim_difference(&p, &q),
            (Binary::Div, _, Dim::Known(1)) => p,
            (Binary::Div, Dim::Known(m), Dim::Known(n)) if *n > 0 => Dim::Known(m / n),
            (Binary::Max, Dim::Known(m), Dim::Known(n)) => Dim::Known(*m.max(n)),
            (Binary::Min, Dim::Known(m), Dim::Known(n)) => Dim::Known(*m.min(n)),
            (Binary::Max | Binary::Min, ..) if p == q => p,
            _ => Dim::Unknown,
        })
    };
    let sizes = (0..count).map(|i| one(at(&x, i), at(&y, i))).collect::<Result<Shape>>()?;
    Ok(Some(sizes_fact(a.dtype, sizes, rank)))
}

/// `a^b`; the exponent may be of another type.
#[derive(Clone, Debug, PartialEq)]
pub struct Pow;

impl Operator for Pow {
    fn name(&self) -> &'static str {
        "Pow"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        for (x, what) in [(a, "the base"), (b, "the exponent")] {
            if matches!(x.dtype, DType::Bool | DType::String) || x.dtype.bits() < 8 {
                return Err(wrong_dtype(what, x.dtype, "numbers"));
            }
        }
        cx.results(vec![Fact { dtype: a.dtype, shape: broadcast_facts(a, b)?, content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let exponent = io.input(1)?;
        let dtype = io.output(0)?.dtype;
        if dtype == DType::F32 && exponent.dtype == DType::F32 {
            return run_f32(cx, Binary::Pow, io);
        }
        let base = match io.optional(0) {
            Some(a) => a.to_tensor()?,
            None => io.output(0)?.as_view().to_tensor()?,
        };
        // Integers stay integers; whatever has a fraction goes through double precision.
        let integers = !dtype.is_float() && !exponent.dtype.is_float();
        let wide = if integers { DType::I64 } else { DType::F64 };
        let widen =
            |v: TensorView| -> Result<Tensor> { if v.dtype == wide { v.to_tensor() } else { converted(v, wide) } };
        let (a, b) = (widen(base.view())?, widen(exponent)?);
        let y = io.output(0)?;
        let mut out = Tensor::zeros(wide, y.dims)?;
        if integers {
            let to: &mut [i64] = bytemuck::cast_slice_mut(out.bytes_mut());
            broadcast_map(cx, 40, a.as_slice()?, a.dims(), b.as_slice()?, b.dims(), to, y.dims, power)
        } else {
            let to: &mut [f64] = bytemuck::cast_slice_mut(out.bytes_mut());
            broadcast_map(cx, 40, a.as_slice()?, a.dims(), b.as_slice()?, b.dims(), to, y.dims, f64::powf)
        }
        .map_err(kernel_error)?;
        if y.dtype == wide {
            y.bytes().copy_from_slice(out.bytes());
            return Ok(());
        }
        convert(out.view(), y)
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 2)
    }
}

/// Max, Min, Sum and Mean of any number of operands.
#[derive(Clone, Debug, PartialEq)]
pub struct Variadic {
    name: &'static str,
    function: Binary,
}

impl Operator for Variadic {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let first = cx.input(0)?;
        Arithmetic::new(self.name, Function::Kernel(self.function)).check_dtype(first.dtype)?;
        if self.name == "Mean" && !first.dtype.is_float() {
            return Err(wrong_dtype("an operand", first.dtype, "floating-point numbers"));
        }
        let mut shape = first.shape.clone();
        for i in 1..cx.inputs.len() {
            let x = cx.input(i)?;
            same_dtype(first, x)?;
            shape = match (&shape, &x.shape) {
                (Some(a), Some(b)) => Some(broadcast(a, b)?),
                _ => None,
            };
        }
        cx.results(vec![Fact { dtype: first.dtype, shape, content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        if io.in_place.is_none() {
            let x = io.input(0)?;
            let y = io.output(0)?;
            if x.dims == y.dims {
                copy(io)?;
            } else {
                let (from, to) = (broadcast_strides(x.dims, y.dims), strides(y.dims));
                let axis = |a: usize| Axis { len: y.dims[a], src: from[a] as isize, dst: to[a] };
                let axes: Axes = (0..y.dims.len()).map(axis).collect();
                copy_axes(cx, &axes, x, 0, y, 0)?;
            }
        }
        let count = io.inputs.len();
        for i in 1..count {
            let x = io.input(i)?;
            assign(cx, self.function, io.output(0)?, x)?;
        }
        if self.name == "Mean" {
            let y = io.output(0)?;
            for_dtype!(y.dtype, [F32, F64], T => {
                let n = count as T;
                elementwise::map_assign(cx, 4, y.as_slice::<T>()?, |v| v / n);
            }, else return Err(wrong_dtype("an operand", y.dtype, "float32 and float64")));
        }
        Ok(())
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, _: &[usize], operands: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, operands.len())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Compare {
    name: &'static str,
    relation: Relation,
}

impl Operator for Compare {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        same_dtype(a, b)?;
        let ordered = !matches!(a.dtype, DType::Bool | DType::String);
        if !(ordered || self.relation == Relation::Equal) || matches!(a.dtype, DType::U4 | DType::I4) {
            return Err(wrong_dtype("an operand", a.dtype, "numbers"));
        }
        let shape = broadcast_facts(a, b)?;
        if self.relation == Relation::Equal
            && let Some(shape) = &shape
            && let Some(fact) = equality_of_sizes(a, b, shape)?
        {
            return cx.results(vec![fact]);
        }
        cx.results(vec![Fact { dtype: DType::Bool, shape, content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        let y = io.output(0)?;
        let dims = y.dims;
        if let (Some(p), Some(q)) = (a.strings(), b.strings()) {
            let places = |n: usize| -> Vec<u32> { (0..n as u32).collect() };
            let (x, z) = (places(p.len()), places(q.len()));
            let equal = |i: u32, j: u32| u8::from(p[i as usize] == q[j as usize]);
            return broadcast_map(cx, 20, &x, a.dims, &z, b.dims, y.bytes(), dims, equal).map_err(kernel_error);
        }
        for_dtype!(a.dtype, [F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, Bool], T => compare_as_bits(cx, io, T::relation(self.relation)),
            else Err(wrong_dtype("an operand", a.dtype, "numbers")))
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 2)
    }
}

fn compare_as_bits<B: Element>(cx: &Cx, io: &mut Io, f: fn(B, B) -> u8) -> Result<()> {
    let (a, b) = (io.input(0)?.as_bits(), io.input(1)?.as_bits());
    let y = io.output(0)?;
    let dims = y.dims;
    broadcast_map(cx, 8, a.as_slice()?, a.dims, b.as_slice()?, b.dims, y.bytes(), dims, f).map_err(kernel_error)
}

/// Whether sizes are equal, where that is certain for all: a name is equal to itself and to no negative number.
fn equality_of_sizes(a: &Fact, b: &Fact, shape: &Shape) -> Result<Option<Fact>> {
    let (sizes, other) = match (&a.content, &b.content) {
        (Content::Dims(s), _) => (s, b),
        (_, Content::Dims(s)) => (s, a),
        _ => return Ok(None),
    };
    let Some(others) = loose_sizes(other).filter(|_| shape.len() <= 1) else { return Ok(None) };
    let numbers = other.i64s();
    let count = sizes.len().max(others.len());
    let place = |len: usize, i: usize| if len == 1 { 0 } else { i };
    let mut out = Vec::with_capacity(count);
    for i in 0..count {
        let (Some(p), Some(q)) = (sizes.get(place(sizes.len(), i)), others.get(place(others.len(), i))) else {
            return Ok(None);
        };
        let negative = numbers.as_ref().and_then(|n| n.get(place(n.len(), i))).is_some_and(|n| *n < 0);
        out.push(match (p, q) {
            (Dim::Known(x), Dim::Known(y)) => x == y,
            (Dim::Known(_) | Dim::Symbol(_), _) if negative => false,
            (Dim::Symbol(x), Dim::Symbol(y)) if x == y => true,
            _ => return Ok(None),
        });
    }
    let dims: &[usize] = if shape.is_empty() { &[] } else { std::slice::from_ref(&count) };
    Ok(Some(Fact::constant(Arc::new(Tensor::from_bools(dims, &out)?))))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use super::*;
    use crate::onnx::AttributeValue;

    fn run(name: &'static str, a: Tensor, b: Tensor) -> Result<Tensor> {
        Ok(OneNode::new(name).run(&[a, b])?.remove(0))
    }

    #[test]
    fn floats_broadcast() {
        let (a, b) = (|| f32s(&[2, 1], &[7.0, -7.0]), || f32s(&[2], &[2.0, -3.0]));
        let cases: &[(&'static str, [f32; 4])] = &[
            ("Add", [9.0, 4.0, -5.0, -10.0]),
            ("Sub", [5.0, 10.0, -9.0, -4.0]),
            ("Mul", [14.0, -21.0, -14.0, 21.0]),
            ("Div", [3.5, -7.0 / 3.0, -3.5, 7.0 / 3.0]),
            ("Pow", [49.0, 1.0 / 343.0, 49.0, -1.0 / 343.0]),
            ("Max", [7.0, 7.0, 2.0, -3.0]),
            ("Min", [2.0, -3.0, -7.0, -7.0]),
            ("Sum", [9.0, 4.0, -5.0, -10.0]),
            ("Mean", [4.5, 2.0, -2.5, -5.0]),
        ];
        for (name, want) in cases {
            let y = run(name, a(), b()).unwrap();
            assert_eq!(y.dims(), [2, 2]);
            let close = y.as_slice::<f32>().unwrap().iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-6);
            assert!(close, "{name}: {y:?}");
        }
        assert!(run("Add", f32s(&[2], &[0.0; 2]), f32s(&[3], &[0.0; 3])).is_err());
        assert!(run("Add", f32s(&[1], &[0.0]), i64s(&[1], &[0])).is_err());
        let y = run("PRelu", f32s(&[2, 2], &[1.0, -1.0, -2.0, 2.0]), f32s(&[2], &[0.5, 0.25])).unwrap();
        assert_eq!(y, f32s(&[2, 2], &[1.0, -0.25, -1.0, 2.0]));
        assert!(run("PRelu", f32s(&[2], &[0.0; 2]), f32s(&[2, 2], &[0.0; 4])).is_err());
    }

    #[test]
    fn integers() {
        let (a, b) = (|| i64s(&[4], &[7, -7, 7, -7]), || i64s(&[4], &[3, 3, -3, -3]));
        let cases: &[(&'static str, [i64; 4])] = &[
            ("Add", [10, -4, 4, -10]),
            ("Div", [2, -2, -2, 2]),
            ("Mod", [1, 2, -2, -1]),
            ("BitwiseAnd", [3, 1, 5, -7]),
            ("BitwiseXor", [4, -6, -6, 4]),
            ("Max", [7, 3, 7, -3]),
        ];
        for (name, want) in cases {
            assert_eq!(run(name, a(), b()).unwrap(), i64s(&[4], want), "{name}");
        }
        let y = OneNode::new("Mod").int("fmod", 1).run(&[a(), b()]).unwrap();
        assert_eq!(y[0], i64s(&[4], &[1, -1, 1, -1]));
        assert!(run("Div", a(), i64s(&[1], &[0])).is_err());
        let y = run("Mod", f32s(&[3], &[-4.5, 4.5, 6.0]), f32s(&[3], &[2.0, -2.0, -3.0])).unwrap();
        assert_eq!(y, f32s(&[3], &[1.5, -1.5, -0.0]));
        assert_eq!(run("Pow", i64s(&[3], &[2, -3, 5]), i64s(&[3], &[10, 3, -1])).unwrap(), i64s(&[3], &[1024, -27, 0]));
        assert_eq!(run("Pow", f32s(&[1], &[2.0]), i64s(&[1], &[3])).unwrap(), f32s(&[1], &[8.0]));
        assert_eq!(run("Pow", i64s(&[1], &[9]), f32s(&[1], &[0.5])).unwrap(), i64s(&[1], &[3]));
        let bytes = |v: &[u8]| Tensor::from_slice(&[v.len()], v).unwrap();
        let shift = |d: &str| OneNode::new("BitShift").attr("direction", AttributeValue::String(d.into()));
        let y = shift("LEFT").run(&[bytes(&[16, 4, 1]), bytes(&[1, 2, 9])]).unwrap();
        assert_eq!(y[0].bytes(), [32, 16, 0]);
        let y = shift("RIGHT").run(&[bytes(&[16, 4, 1]), bytes(&[1, 2, 0])]).unwrap();
        assert_eq!(y[0].bytes(), [8, 1, 1]);
        let y = shift("RIGHT").run(&[i64s(&[3], &[-8, 8, -1]), i64s(&[3], &[64, 64, -1])]).unwrap();
        assert_eq!(y[0], i64s(&[3], &[-1, 0, -1]));
        let y = shift("RIGHT").run(&[bytes(&[255]), bytes(&[8])]).unwrap();
        assert_eq!(y[0].bytes(), [0]);
        assert!(OneNode::new("BitShift").run(&[bytes(&[1]), bytes(&[1])]).is_err());
    }

    #[test]
    fn truth_values_and_comparisons() {
        let bools = |v: &[bool]| Tensor::from_bools(&[v.len()], v).unwrap();
        let (a, b) = (|| bools(&[true, true, false]), || bools(&[true, false, false]));
        for (name, want) in [("And", [true, false, false]), ("Or", [true, true, false]), ("Xor", [false, true, false])]
        {
            assert_eq!(run(name, a(), b()).unwrap(), bools(&want), "{name}");
        }
        assert_eq!(run("Equal", a(), b()).unwrap(), bools(&[true, false, true]));
        assert!(run("Less", a(), b()).is_err());
        assert!(run("And", i64s(&[1], &[1]), i64s(&[1], &[1])).is_err());
        let (x, y) = (|| f32s(&[3], &[1.0, 2.0, f32::NAN]), || f32s(&[1], &[2.0]));
        assert_eq!(run("Less", x(), y()).unwrap(), bools(&[true, false, false]));
        assert_eq!(run("LessOrEqual", x(), y()).unwrap(), bools(&[true, true, false]));
        assert_eq!(run("Greater", x(), y()).unwrap(), bools(&[false, false, false]));
        assert_eq!(run("GreaterOrEqual", x(), y()).unwrap(), bools(&[false, true, false]));
        let text = |v: &[&str]| Tensor::from_strings(&[v.len()], v.iter().map(|s| s.to_string()).collect()).unwrap();
        assert_eq!(run("Equal", text(&["a", "b"]), text(&["b"])).unwrap(), bools(&[false, true]));
    }

    #[test]
    fn any_number_of_operands() {
        let x = |v: f32| f32s(&[1], &[v]);
        assert_eq!(OneNode::new("Max").run(&[x(1.0)]).unwrap()[0], x(1.0));
        let y = OneNode::new("Mean").run(&[x(1.0), f32s(&[2, 1], &[2.0, 5.0]), x(3.0)]).unwrap();
        assert_eq!(y[0], f32s(&[2, 1], &[2.0, 3.0]));
        let y = OneNode::new("Min").run(&[i64s(&[2], &[5, 1]), i64s(&[], &[3]), i64s(&[1], &[4])]).unwrap();
        assert_eq!(y[0], i64s(&[2], &[3, 1]));
    }

    #[test]
    fn sizes_with_names() {
        let n = Dim::Symbol("n".into());
        let sizes = || Some(sizes_fact(DType::I64, [n.clone(), Dim::Known(6)].into_iter().collect(), 1));
        let constant = |v: &[i64]| Some(Fact::constant(Arc::new(i64s(&[v.len()], v))));
        let content = |name, other| match &OneNode::new(name).infer(&[sizes(), other]).unwrap()[0].content {
            Content::Dims(d) => d.to_vec(),
            other => panic!("{other:?}"),
        };
        assert_eq!(content("Mul", constant(&[1, 2])), [n.clone(), Dim::Known(12)]);
        assert_eq!(content("Div", constant(&[2])), [Dim::Unknown, Dim::Known(3)]);
        assert_eq!(content("Sub", constant(&[0])), [n.clone(), Dim::Known(6)]);
        let equal = OneNode::new("Equal").infer(&[sizes(), constant(&[-1])]).unwrap();
        assert_eq!(equal[0].tensor().unwrap().bytes(), [0, 0]);
        assert!(OneNode::new("Equal").infer(&[sizes(), constant(&[6])]).unwrap()[0].tensor().is_none());
    }
}
