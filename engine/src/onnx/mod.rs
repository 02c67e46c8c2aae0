//! Reading and writing `.onnx` files: protobuf by hand, so that a model can be read while it arrives.
#![forbid(unsafe_code)]

mod fields;
mod reader;
pub mod schema;
mod sniff;
mod tensor_reader;
mod wire;
mod write;

pub use reader::{Limits, Reader};
pub use schema::*;
