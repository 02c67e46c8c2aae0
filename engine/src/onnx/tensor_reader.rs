//! One `TensorProto`: seven encodings, one layout.

use super::fields::{Msg, tensor};
use super::schema::{ExternalData, TensorData, TensorProto, dtype_of, normalise_bools};
use crate::error::{Error, ErrorCode, Result};
use crate::storage::AlignedBytes;
use crate::tensor::{DType, byte_count, element_count};

/// Growth of storage that was not allocated at once because the file's length is unknown.
const STEP: usize = 1 << 20;

/// A tensor that is being read.
#[derive(Debug, Default)]
pub(super) struct TensorReader {
    pub(super) name: String,
    pub(super) external: Vec<(String, String)>,
    dims: Vec<i64>,
    data_type: i32,
    located_outside: bool,
    // Elements in their final layout, or, if `wide`, as the integers of the file, since the type was not known yet.
    bytes: AlignedBytes,
    wide: bool,
    // Bytes that were announced, and those that memory was reserved for.
    announced: usize,
    reserved: usize,
    strings: Vec<String>,
    // Field that the elements came in; 0 before the first.
    encoding: u32,
}

impl TensorReader {
    /// Whether a field holds elements as bytes.
    pub(super) fn is_data(number: u32) -> bool {
        matches!(number, tensor::raw_data | tensor::float_data | tensor::double_data)
    }

    /// A run of bytes is announced, of which `allowance` may be allocated at once.
    pub(super) fn begin_bytes(&mut self, number: u32, len: u64, allowance: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.encode(number)?;
        let len = usize::try_from(len).map_err(|_| Error::limit(format!("{len} bytes are more than memory can be")))?;
        if !self.bytes.is_empty() {
            // A list in several runs, perhaps one for each element: its end is not known, let it grow by doubling.
            self.announced = usize::MAX;
            return Ok(());
        }
        self.announced = len;
        // Dimensions come first in the files of every known writer. If they did and do not match, the file is wrong
        // (and nothing is reserved for it) or has an order of its own; the end of the message tells.
        let plausible = self.dims.is_empty() || self.expected_bytes().is_none_or(|n| n >= self.announced);
        if len <= allowance && plausible {
            self.bytes.reserve_exact(len)?;
            self.reserved = self.announced;
        }
        Ok(())
    }

    /// The next bytes of a run.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let len = self.bytes.len() + bytes.len();
        if len > self.reserved {
            // A half, a quarter... of what is announced: the last step ends exactly there, so nothing is left over,
            // and both blocks together never exceed one and a half of it.
            let mut room = self.announced.max(len);
            while room.div_ceil(2) >= len.max(STEP) {
                room = room.div_ceil(2);
            }
            self.bytes.reserve_exact(room - self.bytes.len())?;
            self.reserved = room;
        }
        self.bytes.extend_from_slice(bytes)
    }

    /// A packed run of integers is announced.
    pub(super) fn begin_ints(&mut self, number: u32, len: u64, allowance: usize) -> Result<()> {
        if number == tensor::dims || len == 0 {
            return Ok(());
        }
        // Every integer takes at least one byte of the file.
        if let Some(n) = self.expected_bytes() {
            let total = self.bytes.len().saturating_add(n);
            if n <= allowance && n as u64 / 8 <= len && total > self.reserved {
                self.bytes.reserve_exact(n)?;
                self.reserved = total;
            }
        }
        Ok(())
    }

    /// An integer of any field.
    pub(super) fn int(&mut self, number: u32, value: u64) -> Result<()> {
        match number {
            tensor::dims => self.dims.push(value as i64),
            tensor::data_type => {
                let code = value as i32;
                if self.data_type != 0 && self.data_type != code {
                    return Err(self.invalid(format!("has the data types {} and {code}", self.data_type)));
                }
                self.data_type = code;
            }
            tensor::data_location => self.located_outside = value as i32 == 1,
            tensor::int32_data | tensor::int64_data | tensor::uint64_data => {
                self.encode(number)?;
                let value = if number == tensor::int32_data { i64::from(value as i32) as u64 } else { value };
                self.wide |= self.data_type == 0;
                if self.wide {
                    self.bytes.extend_from_slice(&value.to_le_bytes())?;
                } else {
                    let dtype = self.dtype()?;
                    let (bytes, width) = self.narrow(value, dtype)?;
                    self.bytes.extend_from_slice(&bytes[..width])?;
                }
            }
            _ => return Err(Error::internal(format!("an integer in field {number} of a tensor"))),
        }
        Ok(())
    }

    /// An element of a tensor of text.
    pub(super) fn string(&mut self, value: String) -> Result<()> {
        self.encode(tensor::string_data)?;
        self.strings.push(value);
        Ok(())
    }

    /// The tensor, with as many elements as its shape has.
    #[inline(never)]
    pub(super) fn finish(mut self) -> Result<TensorProto> {
        let dtype = self.dtype()?;
        let dims = checked_dims(&self.name, &self.dims)?;
        let want = byte_count(dtype, &dims).map_err(|e| self.named(e))?;
        if self.located_outside {
            let external = self.external_data(want as u64)?;
            return Ok(TensorProto { name: self.name, dtype, dims, data: TensorData::External(external) });
        }
        let fits = match self.encoding {
            0 => true,
            tensor::raw_data => dtype != DType::String,
            tensor::float_data => dtype == DType::F32,
            tensor::double_data => dtype == DType::F64,
            tensor::int64_data => dtype == DType::I64,
            tensor::uint64_data => matches!(dtype, DType::U64 | DType::U32),
            tensor::string_data => dtype == DType::String,
            _ => integer_width(dtype).is_some(),
        };
        if !fits {
            let field = Msg::Tensor.field(self.encoding);
            return Err(self.invalid(format!("of {dtype} has its elements in {field}, which is for other types")));
        }
        if dtype == DType::String {
            let count = element_count(&dims)?;
            if self.strings.len() != count {
                return Err(self.invalid(format!("of shape {dims:?} has {} strings, not {count}", self.strings.len())));
            }
            let data = TensorData::Strings(self.strings);
            return Ok(TensorProto { name: self.name, dtype, dims, data });
        }
        if self.wide {
            self.bytes = self.narrow_all(dtype)?;
        }
        if self.bytes.len() != want {
            return Err(self
                .invalid(format!("of {dtype} and shape {dims:?} takes {want} bytes, {} are there", self.bytes.len())));
        }
        // Storage that grew by doubling may be twice as large as what it holds.
        if self.bytes.len() != self.reserved && self.bytes.len() > 4096 {
            self.bytes = AlignedBytes::copy_of(self.bytes.as_ref())?;
        }
        if dtype == DType::Bool {
            normalise_bools(self.bytes.as_mut());
        }
        Ok(TensorProto { name: self.name, dtype, dims, data: TensorData::Bytes(self.bytes) })
    }

    fn dtype(&self) -> Result<DType> {
        dtype_of(self.data_type).map_err(|e| self.named(e))
    }

    /// Bytes that shape and type announce, as far as they were read; `None` when they say nothing sensible.
    fn expected_bytes(&self) -> Option<usize> {
        let dtype = dtype_of(self.data_type).ok()?;
        byte_count(dtype, &checked_dims("", &self.dims).ok()?).ok()
    }

    fn encode(&mut self, number: u32) -> Result<()> {
        if self.encoding != 0 && self.encoding != number {
            let (a, b) = (Msg::Tensor.field(self.encoding), Msg::Tensor.field(number));
            return Err(self.invalid(format!("has elements both in {a} and in {b}")));
        }
        self.encoding = number;
        Ok(())
    }

    /// One integer of the file as an element: bit patterns of the small floats, two elements at once for 4-bit types.
    fn narrow(&self, value: u64, dtype: DType) -> Result<([u8; 8], usize)> {
        let width = match (self.encoding, dtype) {
            (tensor::int32_data, _) => integer_width(dtype),
            (tensor::int64_data, DType::I64) | (tensor::uint64_data, DType::U64) => Some(8),
            (tensor::uint64_data, DType::U32) => Some(4),
            _ => None,
        };
        let Some(width) = width else {
            let field = Msg::Tensor.field(self.encoding);
            return Err(self.invalid(format!("of {dtype} has its elements in {field}, which is for other types")));
        };
        if dtype == DType::Bool {
            return Ok((u64::from(value != 0).to_le_bytes(), 1));
        }
        // Signed or not, the value must have this many bits.
        let bits = 8 * width as u32;
        let signed = value as i64;
        if width < 8 && !(-(1i64 << (bits - 1))..1i64 << bits).contains(&signed) {
            return Err(self.invalid(format!("of {dtype} has the element {signed}, which does not fit")));
        }
        Ok((value.to_le_bytes(), width))
    }

    fn narrow_all(&self, dtype: DType) -> Result<AlignedBytes> {
        let mut narrow = AlignedBytes::new();
        for value in self.bytes.as_ref().as_chunks().0 {
            let (bytes, width) = self.narrow(u64::from_le_bytes(*value), dtype)?;
            narrow.extend_from_slice(&bytes[..width])?;
        }
        Ok(narrow)
    }

    fn external_data(&self, want: u64) -> Result<ExternalData> {
        let wrong = |what: String| {
            Error::new(ErrorCode::ExternalData, format!("external data of tensor \"{}\": {what}", self.name))
        };
        let get = |key: &str| self.external.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let number = |key: &str| match get(key) {
            None => Ok(None),
            Some(v) => v.parse::<u64>().map(Some).map_err(|_| wrong(format!("{key} {v:?} is not a number of bytes"))),
        };
        let location = get("location").ok_or_else(|| wrong("there is no location".into()))?;
        if !stays_inside(location) {
            return Err(wrong(format!("{location:?} is not a path below the model's own folder")));
        }
        if self.data_type == DType::String as i32 {
            return Err(wrong("text cannot be stored outside".into()));
        }
        let length = number("length")?.unwrap_or(want);
        if length != want {
            return Err(wrong(format!("{length} bytes where type and shape take {want}")));
        }
        let offset = number("offset")?.unwrap_or(0);
        if offset.checked_add(length).is_none() {
            return Err(wrong(format!("offset {offset} is beyond the end of any file")));
        }
        let checksum = get("checksum").map(str::to_owned);
        Ok(ExternalData { location: location.to_owned(), offset, length, checksum })
    }

    fn invalid(&self, what: String) -> Error {
        Error::invalid_model(format!("tensor \"{}\" {what}", self.name))
    }

    fn named(&self, e: Error) -> Error {
        Error { message: format!("tensor \"{}\": {}", self.name, e.message), ..e }
    }
}

/// Bytes that one entry of `int32_data` stands for; `None` for types that are stored elsewhere.
fn integer_width(dtype: DType) -> Option<usize> {
    match dtype {
        DType::I32 => Some(4),
        DType::I16 | DType::U16 | DType::F16 | DType::Bf16 => Some(2),
        DType::I8 | DType::U8 | DType::Bool | DType::I4 | DType::U4 => Some(1),
        _ => None,
    }
}

/// Sizes of a tensor that exists; they are not negative.
pub(super) fn checked_dims(name: &str, dims: &[i64]) -> Result<Vec<usize>> {
    dims.iter()
        .map(|&d| usize::try_from(d))
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| Error::invalid_model(format!("tensor \"{name}\" has the impossible shape {dims:?}")))
}

/// Whether a path, also when it is read as part of an address, names something below where it starts.
fn stays_inside(location: &str) -> bool {
    let mut parts = location.split(['/', '\\']);
    let first = parts.clone().next().unwrap_or_default();
    // A leading slash makes it absolute; a colon in the first part makes it a drive or an address with a scheme.
    !first.is_empty()
        && !first.contains(':')
        && !location.contains('\0')
        && parts.all(|p| p.to_ascii_lowercase().replace("%2e", ".") != "..")
}

#[cfg(test)]
mod tests {
    use super::stays_inside;

    #[test]
    fn paths() {
        for good in ["w.bin", "a/b.bin", "./w", "a..b", "...", "a\\b"] {
            assert!(stays_inside(good), "{good}");
        }
        for bad in
            ["", "/etc/passwd", "\\x", "../w", "a/../../w", "a\\..\\w", "C:\\w", "http://x/w", "a/%2E%2e/w", "a\0"]
        {
            assert!(!stays_inside(bad), "{bad}");
        }
    }
}
