//! Reading and writing `.onnx` files.

pub mod schema;

pub use schema::*;
