//! The one error type of the kernels: a sentence.

use core::fmt;

/// A kernel refused its operands. Holds one sentence that names what was met and what was wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(Box<str>);

/// What a kernel that checks its operands returns.
pub type Result<T> = core::result::Result<T, Error>;

impl Error {
    /// An error that says `sentence`.
    pub fn new(sentence: impl Into<String>) -> Self {
        Error(sentence.into().into_boxed_str())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Error {}
