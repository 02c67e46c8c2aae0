//! Cast and CastLike: other element types.

use super::identity::copy;
use super::sizes::{kernel_error, sizes_fact};
use super::{Attributes, Infer, Io, Op, Operator, Permuted, Registration};
use crate::error::{Error, Result};
use crate::fact::{Content, Fact, Shape};
use crate::for_dtype;
use crate::tensor::{DType, Element, Tensor, TensorMut, TensorView};
use half::{bf16, f16};
use weblane_kernels::convert as halves;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] =
    &[Registration::onnx("Cast", 6, Cast::parse), Registration::onnx("CastLike", 15, CastLike::parse)];

/// `saturate` and `round_mode` choose among ways to round to 8-bit floats, which the engine has no type for: a model
/// that casts to one is refused because of the type, and no other cast depends on them.
fn skip_float8_attributes(a: &mut Attributes) -> Result<()> {
    a.flag_or("saturate", true)?;
    a.choice("round_mode", &[("up", ()), ("down", ()), ("nearest", ())])
}

/// The operand in another element type.
#[derive(Clone, Debug, PartialEq)]
pub struct Cast {
    /// The type of the result.
    pub to: DType,
}

impl Cast {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let to = a.required("to", Attributes::dtype)?;
        skip_float8_attributes(a)?;
        Ok(Cast { to }.into())
    }
}

fn cast_fact(x: &Fact, to: DType) -> Fact {
    let is_index = |d| matches!(d, DType::I64 | DType::I32);
    if let (Content::Dims(sizes), true, Some(rank)) = (&x.content, is_index(x.dtype) && is_index(to), x.rank()) {
        return sizes_fact(to, Shape::clone(sizes), rank);
    }
    Fact { dtype: to, shape: x.shape.clone(), content: Content::Unknown }
}

impl Operator for Cast {
    fn name(&self) -> &'static str {
        "Cast"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        cx.results(vec![cast_fact(cx.input(0)?, self.to)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        cast(cx, io)
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 1)
    }
}

/// Operand 0 in the element type of operand 1.
#[derive(Clone, Debug, PartialEq)]
pub struct CastLike;

impl CastLike {
    fn parse(a: &mut Attributes) -> Result<Op> {
        skip_float8_attributes(a)?;
        Ok(CastLike.into())
    }
}

impl Operator for CastLike {
    fn name(&self) -> &'static str {
        "CastLike"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        cx.results(vec![cast_fact(cx.input(0)?, cx.input(1)?.dtype)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        cast(cx, io)
    }

    fn takes_half(&self) -> bool {
        true
    }
}

fn cast(cx: &Cx, io: &mut Io) -> Result<()> {
    let x = io.input(0)?;
    if x.dtype == io.output(0)?.dtype {
        return copy(io);
    }
    let y = io.output(0)?;
    // What whole models in half precision go through.
    match (x.dtype, y.dtype) {
        (DType::F16, DType::F32) => halves::f16_to_f32(cx, x.as_slice()?, y.as_slice()?),
        (DType::F32, DType::F16) => halves::f32_to_f16(cx, x.as_slice()?, y.as_slice()?),
        (DType::Bf16, DType::F32) => halves::bf16_to_f32(cx, x.as_slice()?, y.as_slice()?),
        (DType::F32, DType::Bf16) => halves::f32_to_bf16(cx, x.as_slice()?, y.as_slice()?),
        _ => return convert(x, y),
    }
    .map_err(kernel_error)
}

/// Elements on their way through one of three wide types, so that the number of loops is the sum of the types on both
/// sides and not their product. Nothing is lost on the way in, and on the way out is rounded once.
enum Chunk {
    Float([f64; CHUNK]),
    Signed([i64; CHUNK]),
    Unsigned([u64; CHUNK]),
}

const CHUNK: usize = 64;

/// An element type that numbers can be converted from and to.
trait Number: Element {
    fn load(x: &[Self]) -> Chunk;
    fn store(chunk: &Chunk, y: &mut [Self]);
}

macro_rules! number {
    ($($t:ty, $chunk:ident, $wide:ty;)*) => { $(
        impl Number for $t {
            fn load(x: &[Self]) -> Chunk {
                let mut out = [0 as $wide; CHUNK];
                for (o, &v) in out.iter_mut().zip(x) {
                    *o = <$wide>::from(v);
                }
                Chunk::$chunk(out)
            }
            fn store(chunk: &Chunk, y: &mut [Self]) {
                match chunk {
                    Chunk::Float(c) => y.iter_mut().zip(c).for_each(|(y, &v)| *y = v as $t),
                    Chunk::Signed(c) => y.iter_mut().zip(c).for_each(|(y, &v)| *y = v as $t),
                    Chunk::Unsigned(c) => y.iter_mut().zip(c).for_each(|(y, &v)| *y = v as $t),
                }
            }
        }
    )* };
}

// Floats become integers by cutting off, as NumPy and onnxruntime do; out of range the nearest one results.
number! {
    f32, Float, f64;
    f64, Float, f64;
    i8, Signed, i64;
    i16, Signed, i64;
    i32, Signed, i64;
    i64, Signed, i64;
    u8, Signed, i64;
    u16, Signed, i64;
    u32, Signed, i64;
    u64, Unsigned, u64;
}

impl Number for f16 {
    fn load(x: &[Self]) -> Chunk {
        let mut out = [0.0; CHUNK];
        out.iter_mut().zip(x).for_each(|(o, v)| *o = v.to_f64());
        Chunk::Float(out)
    }
    fn store(chunk: &Chunk, y: &mut [Self]) {
        store_as_f64(chunk, y, f16::from_f64);
    }
}

impl Number for bf16 {
    fn load(x: &[Self]) -> Chunk {
        let mut out = [0.0; CHUNK];
        out.iter_mut().zip(x).for_each(|(o, v)| *o = v.to_f64());
        Chunk::Float(out)
    }
    fn store(chunk: &Chunk, y: &mut [Self]) {
        store_as_f64(chunk, y, bf16::from_f64);
    }
}

/// Integers of up to 53 bits are exact in between; larger ones differ from the exact rounding only where they overflow
/// the target or lie within a part in 2^40 of a tie.
fn store_as_f64<T>(chunk: &Chunk, y: &mut [T], round: impl Fn(f64) -> T) {
    match chunk {
        Chunk::Float(c) => y.iter_mut().zip(c).for_each(|(y, &v)| *y = round(v)),
        Chunk::Signed(c) => y.iter_mut().zip(c).for_each(|(y, &v)| *y = round(v as f64)),
        Chunk::Unsigned(c) => y.iter_mut().zip(c).for_each(|(y, &v)| *y = round(v as f64)),
    }
}

/// Converts the elements; the types differ.
pub(crate) fn convert(x: TensorView, y: &mut TensorMut) -> Result<()> {
    let (from, to) = (x.dtype, y.dtype);
    match (from, to) {
        (DType::String, _) => return parse_numbers(x, y),
        (_, DType::String) => return format_numbers(x, y),
        // Indices in models whose exporter could not decide.
        (DType::I64, DType::I32) => return each(x.as_slice()?, y.as_slice()?, |v: i64| v as i32),
        (DType::I32, DType::I64) => return each(x.as_slice()?, y.as_slice()?, |v: i32| i64::from(v)),
        _ => {}
    }
    let count = x.len();
    let mut at = 0;
    while at < count {
        let n = CHUNK.min(count - at);
        let chunk = load(&x, at, n)?;
        store(&chunk, y, at, n)?;
        at += n;
    }
    Ok(())
}

/// The elements as those of another type, which must not be their own.
pub(super) fn converted(x: TensorView, dtype: DType) -> Result<Tensor> {
    let mut y = Tensor::zeros(dtype, x.dims)?;
    convert(x, &mut y.view_mut())?;
    Ok(y)
}

fn each<A: Copy, B>(x: &[A], y: &mut [B], f: impl Fn(A) -> B) -> Result<()> {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = f(x));
    Ok(())
}

fn load(x: &TensorView, at: usize, n: usize) -> Result<Chunk> {
    if let DType::U4 | DType::I4 = x.dtype {
        let mut out = [0i64; CHUNK];
        for (i, o) in out.iter_mut().take(n).enumerate() {
            let byte = x.bytes()[(at + i) / 2];
            let nibble = if (at + i).is_multiple_of(2) { byte & 15 } else { byte >> 4 };
            let signed = i64::from(nibble as i8) - if nibble > 7 { 16 } else { 0 };
            *o = if x.dtype == DType::I4 { signed } else { i64::from(nibble) };
        }
        return Ok(Chunk::Signed(out));
    }
    for_dtype!(x.dtype, [F32, F64, F16, Bf16, I8, I16, I32, I64, U8, U16, U32, U64, Bool], T =>
        Ok(T::load(&x.as_slice::<T>()?[at..at + n])), else Err(no_numbers(x.dtype)))
}

fn store(chunk: &Chunk, y: &mut TensorMut, at: usize, n: usize) -> Result<()> {
    match y.dtype {
        DType::Bool => {
            let to = &mut y.bytes()[at..at + n];
            match chunk {
                Chunk::Float(c) => to.iter_mut().zip(c).for_each(|(y, &v)| *y = u8::from(v != 0.0)),
                Chunk::Signed(c) => to.iter_mut().zip(c).for_each(|(y, &v)| *y = u8::from(v != 0)),
                Chunk::Unsigned(c) => to.iter_mut().zip(c).for_each(|(y, &v)| *y = u8::from(v != 0)),
            }
            Ok(())
        }
        DType::U4 | DType::I4 => {
            // Floats are cut off like for wider integers, and the low bits are kept, as ONNX's own cases have it.
            for i in 0..n {
                let nibble = match chunk {
                    Chunk::Float(c) => c[i] as i64 as u8,
                    Chunk::Signed(c) => c[i] as u8,
                    Chunk::Unsigned(c) => c[i] as u8,
                } & 15;
                let byte = &mut y.bytes()[(at + i) / 2];
                *byte = if (at + i).is_multiple_of(2) { nibble } else { (*byte & 15) | nibble << 4 };
            }
            Ok(())
        }
        other => for_dtype!(other, [F32, F64, F16, Bf16, I8, I16, I32, I64, U8, U16, U32, U64], T => {
            T::store(chunk, &mut y.as_slice::<T>()?[at..at + n]);
            Ok(())
        }, else Err(no_numbers(other))),
    }
}

fn no_numbers(dtype: DType) -> Error {
    Error::unsupported_dtype(format!("{dtype} elements cannot be converted"))
}

fn parse_numbers(x: TensorView, y: &mut TensorMut) -> Result<()> {
    let to = y.dtype;
    for (i, text) in x.strings().into_iter().flatten().enumerate() {
        let wrong = || Error::invalid_input(format!("the text \"{text}\" is not a number of type {to}"));
        let trimmed = text.trim();
        let mut chunk = Chunk::Float([0.0; CHUNK]);
        match (to.is_float() || to == DType::Bool, trimmed.parse::<i64>(), trimmed.parse::<u64>(), &mut chunk) {
            (false, Ok(v), ..) => chunk = Chunk::Signed([v; CHUNK]),
            (false, _, Ok(v), _) => chunk = Chunk::Unsigned([v; CHUNK]),
            // One rounding for single precision: "0.1" as a double may round differently.
            (_, _, _, Chunk::Float(c)) if to == DType::F32 => {
                c[0] = f64::from(trimmed.parse::<f32>().map_err(|_| wrong())?);
            }
            (_, _, _, Chunk::Float(c)) => c[0] = trimmed.parse::<f64>().map_err(|_| wrong())?,
            _ => return Err(wrong()),
        }
        store(&chunk, y, i, 1)?;
    }
    Ok(())
}

fn format_numbers(x: TensorView, y: &mut TensorMut) -> Result<()> {
    fn float(v: f64, text: String) -> String {
        if v.is_nan() {
            return "NaN".into();
        }
        if v.is_infinite() {
            return if v > 0.0 { "INF".into() } else { "-INF".into() };
        }
        // 1e20 is 1e+20 in the C and Python spelling.
        match text.find('e') {
            Some(at) if !text[at..].starts_with("e-") => text.replacen('e', "e+", 1),
            _ => text,
        }
    }
    for i in 0..x.len() {
        let text = match x.dtype {
            DType::F32 => float(f64::from(x.as_slice::<f32>()?[i]), format!("{:?}", x.as_slice::<f32>()?[i])),
            DType::Bool => (if x.bytes()[i] != 0 { "True" } else { "False" }).into(),
            _ => match load(&x, i, 1)? {
                Chunk::Float(c) if x.dtype == DType::F64 => float(c[0], format!("{:?}", c[0])),
                // The shortest text of a half is that of the same number in single precision.
                Chunk::Float(c) => float(c[0], format!("{:?}", c[0] as f32)),
                Chunk::Signed(c) => c[0].to_string(),
                Chunk::Unsigned(c) => c[0].to_string(),
            },
        };
        if let Some(to) = y.strings().and_then(|s| s.get_mut(i)) {
            *to = text;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::tensor::{DType, Tensor};
    use half::f16;

    fn cast(x: Tensor, to: DType) -> Tensor {
        OneNode::new("Cast").int("to", to as i64).run(&[x]).unwrap().remove(0)
    }

    #[test]
    fn numbers() {
        let x = f32s(&[5], &[1.9, -1.9, 300.0, f32::NAN, 0.0]);
        assert_eq!(cast(x.clone(), DType::I32).as_slice::<i32>().unwrap(), [1, -1, 300, 0, 0]);
        assert_eq!(cast(x.clone(), DType::U8).as_slice::<u8>().unwrap(), [1, 0, 255, 0, 0]);
        assert_eq!(cast(x, DType::Bool).bytes(), [1, 1, 1, 1, 0]);
        assert_eq!(cast(i64s(&[2], &[-1, 256]), DType::U8).as_slice::<u8>().unwrap(), [255, 0]);
        assert_eq!(cast(i64s(&[1], &[16_777_217]), DType::F32), f32s(&[1], &[16_777_216.0]));
        let half = Tensor::from_slice(&[1], &[f16::from_f32(0.1)]).unwrap();
        assert_eq!(cast(f32s(&[1], &[0.1]), DType::F16), half);
        let x = Tensor::from_slice(&[1], &[u64::MAX]).unwrap();
        assert_eq!(cast(x, DType::F64).as_slice::<f64>().unwrap(), [u64::MAX as f64]);
    }

    #[test]
    fn more_than_one_chunk() {
        let values: Vec<f32> = (0..200).map(|i| i as f32).collect();
        let want: Vec<i16> = (0..200).collect();
        assert_eq!(cast(f32s(&[200], &values), DType::I16).as_slice::<i16>().unwrap(), want);
    }

    #[test]
    fn four_bits() {
        let x = f32s(&[3], &[-3.5, 7.9, 2.0]);
        let y = cast(x, DType::I4);
        assert_eq!(y.bytes(), [0x7D, 0x02]);
        assert_eq!(cast(y, DType::I64), i64s(&[3], &[-3, 7, 2]));
    }

    #[test]
    fn text() {
        let x = Tensor::from_strings(&[3], ["0.1", " -INF", "1e3"].map(String::from).into()).unwrap();
        assert_eq!(cast(x, DType::F32), f32s(&[3], &[0.1, f32::NEG_INFINITY, 1000.0]));
        let y = cast(f32s(&[3], &[0.1, 1.0, f32::INFINITY]), DType::String);
        assert_eq!(y.strings().unwrap(), ["0.1", "1.0", "INF"]);
        let bad = Tensor::from_strings(&[1], vec!["x".into()]).unwrap();
        assert!(OneNode::new("Cast").int("to", 1).run(&[bad]).is_err());
        assert!(OneNode::new("Cast").int("to", 99).run(&[i64s(&[1], &[1])]).is_err());
        let y = OneNode::new("CastLike").run(&[i64s(&[1], &[3]), f32s(&[0], &[])]).unwrap();
        assert_eq!(y[0], f32s(&[1], &[3.0]));
    }
}
