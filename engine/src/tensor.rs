//! Tensors: element types, shapes, owned tensors and views. All are dense and row-major.

use crate::error::{Error, Result};
use crate::storage::AlignedBytes;
use half::{bf16, f16};
use smallvec::SmallVec;
use std::fmt;

/// Sizes along each axis. Rank 6 and below stays inline.
pub type Dims = SmallVec<[usize; 6]>;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal, $bits:literal;)*) => {
        /// Element type of a tensor; the discriminant is ONNX's `TensorProto.DataType`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DType { $($(#[$doc])* $name = $code,)* }

        impl DType {
            /// All element types.
            pub const ALL: &'static [DType] = &[$(DType::$name,)*];

            /// The spelling in messages and in every front end.
            pub fn as_str(self) -> &'static str {
                match self { $(DType::$name => $text,)* }
            }

            /// Bits per element; 0 for strings, which are not stored as bytes.
            pub fn bits(self) -> usize {
                match self { $(DType::$name => $bits,)* }
            }

            /// The type of ONNX's number, if the engine knows it.
            pub fn from_onnx(code: i64) -> Option<DType> {
                match code { $($code => Some(DType::$name),)* _ => None }
            }
        }
    };
}

dtypes! {
    /// IEEE single.
    F32 = 1, "float32", 32;
    /// Unsigned byte.
    U8 = 2, "uint8", 8;
    /// Signed byte.
    I8 = 3, "int8", 8;
    /// Unsigned 16-bit integer.
    U16 = 4, "uint16", 16;
    /// Signed 16-bit integer.
    I16 = 5, "int16", 16;
    /// Signed 32-bit integer.
    I32 = 6, "int32", 32;
    /// Signed 64-bit integer.
    I64 = 7, "int64", 64;
    /// UTF-8 text.
    String = 8, "string", 0;
    /// One byte per element, 0 or 1.
    Bool = 9, "bool", 8;
    /// IEEE half.
    F16 = 10, "float16", 16;
    /// IEEE double.
    F64 = 11, "float64", 64;
    /// Unsigned 32-bit integer.
    U32 = 12, "uint32", 32;
    /// Unsigned 64-bit integer.
    U64 = 13, "uint64", 64;
    /// Upper half of an IEEE single.
    Bf16 = 16, "bfloat16", 16;
    /// Unsigned 4-bit integer, two per byte, low nibble first.
    U4 = 21, "uint4", 4;
    /// Signed 4-bit integer, two per byte, low nibble first.
    I4 = 22, "int4", 4;
}

impl DType {
    /// Bytes of `count` elements, or `None` when that overflows.
    pub fn bytes_of(self, count: usize) -> Option<usize> {
        Some(count.checked_mul(self.bits())?.div_ceil(8))
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::F16 | DType::Bf16)
    }

    /// The signed type for an unsigned one of 8 to 64 bits: sums and products, which wrap, have the same bits, and one
    /// piece of code serves both.
    pub fn signless(self) -> Self {
        match self {
            DType::U8 => DType::I8,
            DType::U16 => DType::I16,
            DType::U32 => DType::I32,
            DType::U64 => DType::I64,
            other => other,
        }
    }

    /// The unsigned integer of the size of a number, for code that moves elements and leaves what they mean to a function.
    pub fn as_bits(self) -> Self {
        match self.bits() {
            8 => DType::U8,
            16 => DType::U16,
            32 => DType::U32,
            64 => DType::U64,
            _ => self,
        }
    }

    /// Whether it is a floating-point type of 16 bits, which the engine only stores.
    pub fn is_half(self) -> bool {
        matches!(self, DType::F16 | DType::Bf16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A Rust type that is an element type.
pub trait Element:
    bytemuck::NoUninit + bytemuck::AnyBitPattern + PartialEq + fmt::Debug + Send + Sync + 'static
{
    /// Its element type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty = $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
elements!(f32 = F32, f64 = F64, f16 = F16, bf16 = Bf16, i8 = I8, i16 = I16, i32 = I32, i64 = I64);
elements!(u8 = U8, u16 = U16, u32 = U32, u64 = U64);

/// Runs `$body` with the type alias `$t` bound to the Rust type of a numeric `$dtype`; evaluates `$other` for the rest.
///
/// ```
/// use weblane_engine::{for_dtype, tensor::DType};
/// let size = |d: DType| for_dtype!(d, [F32, I64], T => size_of::<T>(), else 0);
/// assert_eq!((size(DType::I64), size(DType::Bool)), (8, 0));
/// ```
#[macro_export]
macro_rules! for_dtype {
    ($dtype:expr, [$($d:ident),* $(,)?], $t:ident => $body:expr, else $other:expr) => {
        match $dtype {
            $(
                // A body that converts from `T` is written for all of them, the target type itself included.
                #[allow(clippy::useless_conversion)]
                $crate::tensor::DType::$d => {
                    type $t = $crate::rust_type!($d);
                    $body
                }
            )*
            #[allow(unreachable_patterns)]
            _ => $other,
        }
    };
}

/// The Rust type that stores an element type; `Bool` is a `u8`.
#[macro_export]
#[doc(hidden)]
macro_rules! rust_type {
    (F32) => {
        f32
    };
    (F64) => {
        f64
    };
    (F16) => {
        ::half::f16
    };
    (Bf16) => {
        ::half::bf16
    };
    (I8) => {
        i8
    };
    (I16) => {
        i16
    };
    (I32) => {
        i32
    };
    (I64) => {
        i64
    };
    (U8) => {
        u8
    };
    (U16) => {
        u16
    };
    (U32) => {
        u32
    };
    (U64) => {
        u64
    };
    (Bool) => {
        u8
    };
}

/// Number of elements of a shape, or an error naming it when that overflows.
pub fn element_count(dims: &[usize]) -> Result<usize> {
    dims.iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or_else(|| Error::limit(format!("a tensor of shape {dims:?} has more elements than can be addressed")))
}

/// Bytes of a dense tensor, or an error when that overflows.
pub fn byte_count(dtype: DType, dims: &[usize]) -> Result<usize> {
    dtype
        .bytes_of(element_count(dims)?)
        .ok_or_else(|| Error::limit(format!("a {dtype} tensor of shape {dims:?} is larger than memory can be")))
}

#[derive(Clone, Debug)]
enum Data {
    Bytes(AlignedBytes),
    Strings(Vec<String>),
    /// The elements are gone: kernels hold them in a packed form.
    Released,
}

/// A tensor that owns its elements.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    dims: Dims,
    data: Data,
}

impl Tensor {
    /// A tensor over bytes that are laid out already, little-endian.
    pub fn from_bytes(dtype: DType, dims: &[usize], bytes: AlignedBytes) -> Result<Self> {
        let want = byte_count(dtype, dims)?;
        if dtype == DType::String || bytes.len() != want {
            return Err(Error::shape(format!(
                "a {dtype} tensor of shape {dims:?} takes {want} bytes, {} were given",
                bytes.len()
            )));
        }
        Ok(Tensor { dtype, dims: dims.into(), data: Data::Bytes(bytes) })
    }

    /// All elements zero (empty for strings).
    pub fn zeros(dtype: DType, dims: &[usize]) -> Result<Self> {
        let data = if dtype == DType::String {
            Data::Strings(vec![String::new(); element_count(dims)?])
        } else {
            Data::Bytes(AlignedBytes::zeroed(byte_count(dtype, dims)?)?)
        };
        Ok(Tensor { dtype, dims: dims.into(), data })
    }

    /// A tensor of any elements in the storage of this one, if that does: neither too small nor several times too large.
    /// What grows step by step, as caches do, gets room for some steps.
    pub fn recycled(self, dtype: DType, dims: &[usize]) -> Result<Self> {
        let Data::Bytes(mut bytes) = self.data else { return Tensor::zeros(dtype, dims) };
        if dtype == DType::String {
            return Tensor::zeros(dtype, dims);
        }
        let want = byte_count(dtype, dims)?;
        let (before, room) = (bytes.len(), bytes.capacity());
        if room < want || room / 4 > want {
            // Frees the former storage first.
            drop(std::mem::take(&mut bytes));
            let step = want / 8;
            if before < want && want - before <= step {
                bytes.reserve_exact(want.saturating_add(step))?;
            }
        }
        bytes.resize(want)?;
        Tensor::from_bytes(dtype, dims, bytes)
    }

    /// A copy of `values`.
    pub fn from_slice<T: Element>(dims: &[usize], values: &[T]) -> Result<Self> {
        if values.len() != element_count(dims)? {
            return Err(Error::shape(format!("shape {dims:?} does not hold {} elements", values.len())));
        }
        Tensor::from_bytes(T::DTYPE, dims, AlignedBytes::copy_of(bytemuck::cast_slice(values))?)
    }

    /// A tensor of rank 0.
    pub fn scalar<T: Element>(value: T) -> Result<Self> {
        Tensor::from_slice(&[], &[value])
    }

    /// A tensor of text.
    pub fn from_strings(dims: &[usize], values: Vec<String>) -> Result<Self> {
        if values.len() != element_count(dims)? {
            return Err(Error::shape(format!("shape {dims:?} does not hold {} strings", values.len())));
        }
        Ok(Tensor { dtype: DType::String, dims: dims.into(), data: Data::Strings(values) })
    }

    /// What is left of a constant when kernels hold its elements in packed form: element type and shape.
    pub fn released(dtype: DType, dims: &[usize]) -> Self {
        Tensor { dtype, dims: dims.into(), data: Data::Released }
    }

    /// Whether the elements are gone; see [`released`](Self::released).
    pub fn is_released(&self) -> bool {
        matches!(self.data, Data::Released)
    }

    /// Truth values.
    pub fn from_bools(dims: &[usize], values: &[bool]) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().map(|&b| u8::from(b)).collect();
        let mut t = Tensor::from_slice(dims, &bytes)?;
        t.dtype = DType::Bool;
        Ok(t)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same elements in another shape.
    pub fn reshaped(mut self, dims: &[usize]) -> Result<Self> {
        if element_count(dims)? != self.len() {
            return Err(Error::shape(format!("{:?} cannot be reshaped to {dims:?}", self.dims())));
        }
        self.dims = dims.into();
        Ok(self)
    }

    /// Raw bytes; none for strings and released tensors.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Bytes(b) => b.as_ref(),
            Data::Strings(_) | Data::Released => &[],
        }
    }

    /// Raw bytes for writing; none for strings and released tensors.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.data {
            Data::Bytes(b) => b.as_mut(),
            Data::Strings(_) | Data::Released => &mut [],
        }
    }

    /// The text of a string tensor.
    pub fn strings(&self) -> Option<&[String]> {
        match &self.data {
            Data::Strings(s) => Some(s),
            Data::Bytes(_) | Data::Released => None,
        }
    }

    /// The elements, if they are of type `T` (`u8` serves `Bool` too).
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.view().as_slice()
    }

    /// A view of the whole tensor.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, dims: &self.dims, data: ViewData::of(self) }
    }

    /// A writable view of the whole tensor.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        let data = match &mut self.data {
            Data::Bytes(b) => MutData::Bytes(b.as_mut()),
            Data::Strings(s) => MutData::Strings(s),
            Data::Released => MutData::Bytes(&mut []),
        };
        TensorMut { dtype: self.dtype, dims: &self.dims, data }
    }
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        self.dtype == other.dtype
            && self.dims == other.dims
            && self.bytes() == other.bytes()
            && self.strings() == other.strings()
            && !self.is_released()
            && !other.is_released()
    }
}

#[derive(Clone, Copy, Debug)]
enum ViewData<'a> {
    Bytes(&'a [u8]),
    Strings(&'a [String]),
    Released,
}

impl<'a> ViewData<'a> {
    fn of(t: &'a Tensor) -> Self {
        match &t.data {
            Data::Bytes(b) => ViewData::Bytes(b.as_ref()),
            Data::Strings(s) => ViewData::Strings(s),
            Data::Released => ViewData::Released,
        }
    }
}

/// A tensor that is borrowed for reading.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub dims: &'a [usize],
    data: ViewData<'a>,
}

impl<'a> TensorView<'a> {
    /// The same bits as [`DType::signless`].
    pub fn signless(self) -> Self {
        TensorView { dtype: self.dtype.signless(), ..self }
    }

    /// The same bits as [`DType::as_bits`].
    pub fn as_bits(self) -> Self {
        TensorView { dtype: self.dtype.as_bits(), ..self }
    }

    /// A view over bytes; they must be as many as shape and type want.
    pub fn new(dtype: DType, dims: &'a [usize], bytes: &'a [u8]) -> Result<Self> {
        let want = byte_count(dtype, dims)?;
        if bytes.len() != want {
            return Err(Error::shape(format!(
                "a {dtype} tensor of shape {dims:?} takes {want} bytes, {} were given",
                bytes.len()
            )));
        }
        Ok(TensorView { dtype, dims, data: ViewData::Bytes(bytes) })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rank.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Whether the elements are gone; see [`Tensor::released`].
    pub fn is_released(&self) -> bool {
        matches!(self.data, ViewData::Released)
    }

    /// Raw bytes; none for strings and released tensors.
    pub fn bytes(&self) -> &'a [u8] {
        match self.data {
            ViewData::Bytes(b) => b,
            ViewData::Strings(_) | ViewData::Released => &[],
        }
    }

    /// The text of a string tensor.
    pub fn strings(&self) -> Option<&'a [String]> {
        match self.data {
            ViewData::Strings(s) => Some(s),
            ViewData::Bytes(_) | ViewData::Released => None,
        }
    }

    /// The elements, if they are of type `T` (`u8` serves `Bool` too).
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T]> {
        check_dtype::<T>(self.dtype)?;
        if self.is_released() {
            return Err(gone());
        }
        bytemuck::try_cast_slice(self.bytes())
            .map_err(|e| Error::invalid_input(format!("the bytes of a {} tensor cannot be viewed: {e}", self.dtype)))
    }

    /// The elements as `i64`, whatever integer type they have; for shapes, axes and indices.
    pub fn to_i64s(&self) -> Result<SmallVec<[i64; 8]>> {
        fn all<T: Element + Into<i64>>(v: &TensorView<'_>) -> Result<SmallVec<[i64; 8]>> {
            Ok(v.as_slice::<T>()?.iter().map(|&x| x.into()).collect())
        }
        for_dtype!(self.dtype, [I64, I32, I16, I8, U8, U16, U32, Bool], T => all::<T>(self), else
            Err(Error::dtype(format!("{} elements where integers were wanted", self.dtype))))
    }

    /// An owned copy.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let data = match self.data {
            ViewData::Bytes(b) => Data::Bytes(AlignedBytes::copy_of(b)?),
            ViewData::Strings(s) => Data::Strings(s.to_vec()),
            ViewData::Released => return Err(gone()),
        };
        Ok(Tensor { dtype: self.dtype, dims: self.dims.into(), data })
    }
}

#[derive(Debug)]
enum MutData<'a> {
    Bytes(&'a mut [u8]),
    Strings(&'a mut [String]),
}

/// A tensor that is borrowed for writing.
#[derive(Debug)]
pub struct TensorMut<'a> {
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub dims: &'a [usize],
    data: MutData<'a>,
}

impl<'a> TensorMut<'a> {
    /// Elements to be written as those of [`DType::signless`].
    pub fn signless<T: Element>(&mut self) -> Result<&mut [T]> {
        check_dtype::<T>(self.dtype.signless())?;
        self.elements()
    }

    /// Elements to be written as those of [`DType::as_bits`].
    pub fn as_bits<B: Element>(&mut self) -> Result<&mut [B]> {
        check_dtype::<B>(self.dtype.as_bits())?;
        self.elements()
    }

    /// A view over bytes; they must be as many as shape and type want.
    pub fn new(dtype: DType, dims: &'a [usize], bytes: &'a mut [u8]) -> Result<Self> {
        TensorView::new(dtype, dims, bytes)?;
        Ok(TensorMut { dtype, dims, data: MutData::Bytes(bytes) })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Raw bytes; none for strings.
    pub fn bytes(&mut self) -> &mut [u8] {
        match &mut self.data {
            MutData::Bytes(b) => b,
            MutData::Strings(_) => &mut [],
        }
    }

    /// The text of a string tensor.
    pub fn strings(&mut self) -> Option<&mut [String]> {
        match &mut self.data {
            MutData::Strings(s) => Some(s),
            MutData::Bytes(_) => None,
        }
    }

    /// The elements, if they are of type `T` (`u8` serves `Bool` too).
    pub fn as_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        check_dtype::<T>(self.dtype)?;
        self.elements()
    }

    fn elements<T: Element>(&mut self) -> Result<&mut [T]> {
        bytemuck::try_cast_slice_mut(self.bytes())
            .map_err(|e| Error::internal(format!("the bytes of an output cannot be viewed: {e}")))
    }

    /// The same, for reading.
    pub fn as_view(&self) -> TensorView<'_> {
        let data = match &self.data {
            MutData::Bytes(b) => ViewData::Bytes(b),
            MutData::Strings(s) => ViewData::Strings(s),
        };
        TensorView { dtype: self.dtype, dims: self.dims, data }
    }
}

fn gone() -> Error {
    Error::internal("the elements of a constant are read that were packed")
}

fn check_dtype<T: Element>(dtype: DType) -> Result<()> {
    if T::DTYPE == dtype || (T::DTYPE == DType::U8 && dtype == DType::Bool) {
        Ok(())
    } else {
        Err(Error::dtype(format!("{dtype} elements where {} was wanted", T::DTYPE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_must_fit() {
        assert!(Tensor::from_bytes(DType::F32, &[2], AlignedBytes::zeroed(7).unwrap()).is_err());
        assert!(Tensor::zeros(DType::F32, &[usize::MAX, 2]).is_err());
        assert_eq!(byte_count(DType::I4, &[3]).unwrap(), 2);
        assert_eq!(Tensor::scalar(3i64).unwrap().view().to_i64s().unwrap()[0], 3);
    }

    #[test]
    fn storage_is_used_again() {
        let zeros = |n: usize| Tensor::zeros(DType::F32, &[n]).unwrap();
        let at = |t: &Tensor| t.bytes().as_ptr();
        let t = zeros(1000);
        let place = at(&t);
        let t = t.recycled(DType::U8, &[2, 1500]).unwrap();
        assert_eq!((at(&t), t.dtype(), t.dims()), (place, DType::U8, &[2, 1500][..]));
        // What outgrew its storage by a little may grow further, what is another size altogether has just that.
        let capacity = |t: &Tensor| match &t.data {
            Data::Bytes(bytes) => bytes.capacity(),
            _ => 0,
        };
        let grown = zeros(100_000).recycled(DType::F32, &[101_000]).unwrap();
        let place = at(&grown);
        assert!(capacity(&grown) > 440_000);
        assert_eq!(at(&grown.recycled(DType::F32, &[110_000]).unwrap()), place);
        for (from, to) in [(100_000, 300_000), (100_000, 1_000)] {
            assert!(capacity(&zeros(from).recycled(DType::F32, &[to]).unwrap()) < 4 * to + 256);
        }
        assert_eq!(zeros(3).recycled(DType::String, &[1]).unwrap().strings().unwrap(), [""]);
        assert!(zeros(3).recycled(DType::F32, &[usize::MAX]).is_err());
    }

    #[test]
    fn wrong_type_is_said() {
        let t = Tensor::from_slice(&[2], &[1f32, 2.0]).unwrap();
        assert_eq!(t.as_slice::<i64>().unwrap_err().message, "float32 elements where int64 was wanted");
    }
}
