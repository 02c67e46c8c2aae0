//! The one error type: a stable code, a sentence, and where in the model it happened.

use std::fmt;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What kind of failure it was. The strings of [`as_str`](ErrorCode::as_str) are part of the public interface
        /// of every front end and never change their meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorCode { $($(#[$doc])* $name,)* }

        impl ErrorCode {
            /// All codes, for tables in documentation and for tests.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name,)*];

            /// The stable spelling.
            pub fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$name => $text,)* }
            }
        }
    };
}

error_codes! {
    /// The file has no bytes.
    EmptyModel = "empty_model",
    /// The bytes are not an ONNX model.
    NotOnnx = "not_onnx",
    /// The bytes end in the middle of a model.
    TruncatedModel = "truncated_model",
    /// The bytes are ONNX but contradict themselves or the specification.
    InvalidModel = "invalid_model",
    /// Operators that the engine does not have; the message names all of them.
    UnsupportedOperator = "unsupported_operator",
    /// An attribute, or an attribute's value, that the engine does not implement.
    UnsupportedAttribute = "unsupported_attribute",
    /// An element type that the engine or the operator does not implement.
    UnsupportedDtype = "unsupported_dtype",
    /// Shapes that do not fit the operator or the declared input.
    ShapeMismatch = "shape_mismatch",
    /// An element type that differs from the wanted one.
    TypeMismatch = "type_mismatch",
    /// A model input was not given.
    MissingInput = "missing_input",
    /// A name that is not a model input or output.
    UnknownInput = "unknown_input",
    /// A value outside of what the operator accepts.
    InvalidInput = "invalid_input",
    /// A size above the configured limits.
    LimitExceeded = "limit_exceeded",
    /// Memory could not be had.
    OutOfMemory = "out_of_memory",
    /// External data is missing or of the wrong size.
    ExternalData = "external_data",
    /// The caller stopped the run.
    Aborted = "aborted",
    /// An option with an unknown name or value.
    InvalidOption = "invalid_option",
    /// A defect of the engine itself.
    Internal = "internal",
}

/// A failure, with the node and operator where it happened when there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The kind, stable over versions.
    pub code: ErrorCode,
    /// A sentence a person can act on: what was met and what was wanted.
    pub message: String,
    /// Name of the node in the model.
    pub node: Option<String>,
    /// Its operator, such as `Conv` or `com.microsoft.QGemm`.
    pub op: Option<String>,
}

impl Error {
    /// An error that is not tied to a node (yet; see [`at`](Error::at)).
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Error { code, message: message.into(), node: None, op: None }
    }

    /// Adds the place, unless a more exact one (of a node inside a subgraph) stands already.
    pub fn at(mut self, node: &str, op: &str) -> Self {
        if self.op.is_none() {
            self.node = Some(node.to_owned());
            self.op = Some(op.to_owned());
        }
        self
    }
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $fn:ident => $code:ident,)*) => {
        impl Error { $(
            $(#[$doc])*
            pub fn $fn(message: impl Into<String>) -> Self { Error::new(ErrorCode::$code, message) }
        )* }
    };
}

constructors! {
    /// See [`ErrorCode::InvalidModel`].
    invalid_model => InvalidModel,
    /// See [`ErrorCode::UnsupportedAttribute`].
    unsupported_attribute => UnsupportedAttribute,
    /// See [`ErrorCode::UnsupportedDtype`].
    unsupported_dtype => UnsupportedDtype,
    /// See [`ErrorCode::ShapeMismatch`].
    shape => ShapeMismatch,
    /// See [`ErrorCode::TypeMismatch`].
    dtype => TypeMismatch,
    /// See [`ErrorCode::InvalidInput`].
    invalid_input => InvalidInput,
    /// See [`ErrorCode::LimitExceeded`].
    limit => LimitExceeded,
    /// See [`ErrorCode::OutOfMemory`].
    out_of_memory => OutOfMemory,
    /// See [`ErrorCode::Internal`].
    internal => Internal,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.node, &self.op) {
            (Some(node), Some(op)) if node.is_empty() => write!(f, "{op}: {}", self.message),
            (Some(node), Some(op)) => write!(f, "{op} \"{node}\": {}", self.message),
            _ => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}

impl From<weblane_kernels::error::Error> for Error {
    /// What a kernel refuses are sizes that do not fit together.
    fn from(e: weblane_kernels::error::Error) -> Self {
        Error::shape(e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_place_wins() {
        let e = Error::shape("a must be 3").at("inner", "Add").at("outer", "If");
        assert_eq!(e.to_string(), "Add \"inner\": a must be 3");
    }

    #[test]
    fn codes_are_unique() {
        let mut names: Vec<_> = ErrorCode::ALL.iter().map(|c| c.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ErrorCode::ALL.len());
    }
}
