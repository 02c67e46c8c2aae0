//! Protobuf's wire format as a state machine that takes its input in pieces of any size.
//!
//! ```text
//! Key:    close messages that end here; read a varint (field number, wire type); ask the visitor what the field holds
//!         varint -> Int;   fixed -> Run of 4 or 8 bytes;   length-delimited -> Length
//! Length: read a varint, check it against what is left of the message around it
//!         message -> push its end, Key;   bytes and packed floats -> Run;   packed ints -> Packed
//! Int:    read a varint, hand it over -> Key
//! Run:    hand over what is there, until the end -> Key
//! Packed: read varints, hand them over, until the end -> Key
//! ```
//!
//! Nothing is buffered but the bits of one varint, nothing recurses, and nothing is allocated but one offset for every
//! open message. Whoever receives the values decides about memory; a length has been checked by then.

use super::fields::{Kind, Msg};
use crate::error::{Error, Result};

/// Receives the values. "The field" is one of the innermost open message.
pub(super) trait Visitor {
    /// What a field holds; `None` to have it skipped.
    fn kind(&self, number: u32) -> Option<Kind>;
    /// A message begins.
    fn open(&mut self, number: u32, msg: Msg) -> Result<()>;
    /// The innermost message ends.
    fn close(&mut self) -> Result<()>;
    /// One integer of a field; called for each element when the field is repeated.
    fn int(&mut self, number: u32, value: u64) -> Result<()>;
    /// A packed run of integers of `len` bytes begins at byte `pos` of the file.
    fn begin_packed(&mut self, number: u32, len: u64, pos: u64) -> Result<()>;
    /// A run of `len` bytes (text, raw data, one or more little-endian floats) begins at byte `pos` of the file.
    fn begin(&mut self, number: u32, len: u64, pos: u64) -> Result<()>;
    /// The next bytes of the run.
    fn bytes(&mut self, bytes: &[u8]) -> Result<()>;
    /// The run is complete.
    fn end(&mut self) -> Result<()>;
    /// The innermost message, in words.
    fn place(&self) -> String;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Key,
    Length { number: u32, kind: Option<Kind> },
    Int { number: u32, skip: bool },
    Run { end: u64, skip: bool },
    Packed { number: u32, end: u64 },
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Wire {
    pos: u64,
    // Where each open message ends; the first is the file, which ends at the size limit.
    ends: Vec<u64>,
    max_depth: usize,
    state: State,
    bits: u64,
    shift: u32,
}

impl Wire {
    pub(super) fn new(max_bytes: u64, max_depth: usize) -> Self {
        Wire { pos: 0, ends: vec![max_bytes], max_depth, state: State::Key, bits: 0, shift: 0 }
    }

    /// Bytes consumed.
    pub(super) fn pos(&self) -> u64 {
        self.pos
    }

    /// Whether the input may end here.
    pub(super) fn is_complete(&self) -> bool {
        self.state == State::Key && self.ends.len() == 1 && self.shift == 0
    }

    /// Consumes all of `input`. What a turn of the loop does is in functions that stay out of it, so that the loop is
    /// small: see the reader's `attach`.
    pub(super) fn feed(&mut self, mut input: &[u8], visitor: &mut impl Visitor) -> Result<()> {
        loop {
            let end = self.end();
            match self.state {
                State::Key if self.pos == end && self.ends.len() > 1 && self.shift == 0 => {
                    self.ends.pop();
                    visitor.close()?;
                }
                State::Key => {
                    let Some(key) = self.varint(&mut input, end, visitor)? else { return Ok(()) };
                    self.state = self.field(key, visitor)?;
                }
                State::Int { number, skip } => {
                    let Some(value) = self.varint(&mut input, end, visitor)? else { return Ok(()) };
                    if !skip {
                        visitor.int(number, value)?;
                    }
                    self.state = State::Key;
                }
                State::Length { number, kind } => {
                    let Some(len) = self.varint(&mut input, end, visitor)? else { return Ok(()) };
                    self.state = self.delimited(number, kind, len, visitor)?;
                }
                State::Run { end, skip } => {
                    if self.pos == end {
                        if !skip {
                            visitor.end()?;
                        }
                        self.state = State::Key;
                        continue;
                    }
                    let n = input.len().min(usize::try_from(end - self.pos).unwrap_or(usize::MAX));
                    if n == 0 {
                        return Ok(());
                    }
                    let (now, later) = input.split_at(n);
                    if !skip {
                        visitor.bytes(now)?;
                    }
                    self.pos += n as u64;
                    input = later;
                }
                State::Packed { number, end } => {
                    while self.pos < end || self.shift > 0 {
                        let Some(value) = self.varint(&mut input, end, visitor)? else { return Ok(()) };
                        visitor.int(number, value)?;
                    }
                    self.state = State::Key;
                }
            }
        }
    }

    fn end(&self) -> u64 {
        *self.ends.last().expect("the file's own end is never popped")
    }

    #[cold]
    #[inline(never)]
    fn invalid(&self, what: &str, visitor: &impl Visitor) -> Error {
        Error::invalid_model(format!("{what}, at byte {} in {}", self.pos, visitor.place()))
    }

    /// Continues a varint; `None` when the input ends first.
    #[inline(never)]
    fn varint(&mut self, input: &mut &[u8], end: u64, visitor: &impl Visitor) -> Result<Option<u64>> {
        loop {
            let whole_file = self.ends.len() == 1 && end == self.end();
            if self.pos == end && !(whole_file && input.is_empty()) {
                return Err(if whole_file {
                    Error::limit(format!("the model has more than {end} bytes, which is the limit"))
                } else {
                    self.invalid("a number runs past the end of what it belongs to", visitor)
                });
            }
            let Some((&byte, rest)) = input.split_first() else { return Ok(None) };
            // The tenth byte has room for one bit.
            if self.shift == 63 && byte > 1 {
                return Err(self.invalid("a number of more than 64 bits", visitor));
            }
            *input = rest;
            self.pos += 1;
            self.bits |= u64::from(byte & 0x7f) << self.shift;
            self.shift += 7;
            if byte < 0x80 {
                self.shift = 0;
                return Ok(Some(std::mem::take(&mut self.bits)));
            }
        }
    }

    #[inline(never)]
    fn field(&mut self, key: u64, visitor: &mut impl Visitor) -> Result<State> {
        let (wire_type, number) = (key & 7, key >> 3);
        let number = match u32::try_from(number) {
            Ok(n) if (1..1 << 29).contains(&n) => n,
            _ => return Err(self.invalid(&format!("field number {number} does not exist in protobuf"), visitor)),
        };
        let kind = visitor.kind(number);
        match (wire_type, kind) {
            (0, None | Some(Kind::Int)) => Ok(State::Int { number, skip: kind.is_none() }),
            (1, None | Some(Kind::F64)) => self.run(number, 8, kind.is_none(), visitor),
            (2, _) => Ok(State::Length { number, kind }),
            (5, None | Some(Kind::F32)) => self.run(number, 4, kind.is_none(), visitor),
            (3 | 4, _) => Err(self.invalid(&format!("field {number} is a group, which ONNX does not use"), visitor)),
            (6 | 7, _) => Err(self.invalid(&format!("wire type {wire_type} does not exist in protobuf"), visitor)),
            (_, _) => Err(self.invalid(&format!("field {number} has the wrong wire type {wire_type}"), visitor)),
        }
    }

    #[inline(never)]
    fn delimited(&mut self, number: u32, kind: Option<Kind>, len: u64, visitor: &mut impl Visitor) -> Result<State> {
        match kind {
            Some(Kind::Message(msg)) => {
                let end = self.checked_end(len, visitor)?;
                if self.ends.len() > self.max_depth {
                    return Err(Error::limit(format!(
                        "messages are nested more than {} deep, at byte {} in {}",
                        self.max_depth,
                        self.pos,
                        visitor.place()
                    )));
                }
                visitor.open(number, msg)?;
                self.ends.push(end);
                Ok(State::Key)
            }
            Some(Kind::Int) => {
                let end = self.checked_end(len, visitor)?;
                visitor.begin_packed(number, len, self.pos)?;
                Ok(State::Packed { number, end })
            }
            Some(Kind::F32) if !len.is_multiple_of(4) => {
                Err(self.invalid(&format!("{len} bytes are no list of 32-bit floats"), visitor))
            }
            Some(Kind::F64) if !len.is_multiple_of(8) => {
                Err(self.invalid(&format!("{len} bytes are no list of 64-bit floats"), visitor))
            }
            Some(Kind::Bytes | Kind::F32 | Kind::F64) => self.run(number, len, false, visitor),
            None => self.run(number, len, true, visitor),
        }
    }

    fn run(&mut self, number: u32, len: u64, skip: bool, visitor: &mut impl Visitor) -> Result<State> {
        let end = self.checked_end(len, visitor)?;
        if !skip {
            visitor.begin(number, len, self.pos)?;
        }
        Ok(State::Run { end, skip })
    }

    fn checked_end(&self, len: u64, visitor: &impl Visitor) -> Result<u64> {
        let left = self.end() - self.pos;
        if len <= left {
            return Ok(self.pos + len);
        }
        Err(if self.ends.len() == 1 {
            Error::limit(format!(
                "{len} bytes are announced at byte {} of the model, which may have {} at most",
                self.pos,
                self.end()
            ))
        } else {
            self.invalid(&format!("{len} bytes are announced where {left} are left"), visitor)
        })
    }
}
