//! The graph engine of weblane: from the bytes of an ONNX model to numbers.
//!
//! The stages, in the order a model passes through them:
//!
//! 1. [`onnx`]: bytes to the structs of the file format;
//! 2. [`import`]: those to a [`graph::Graph`] of known operators;
//! 3. [`optimize`]: portable rewriting of that graph;
//! 4. [`plan`]: for one set of input shapes, the kernels, the memory and the order;
//! 5. [`execute`]: walks a plan and decides nothing.
//!
//! [`session`] ties them together; [`ops`] has one file per operator or family of operators.

#![deny(unsafe_code)]

pub mod analyze;
pub mod error;
pub mod execute;
pub mod fact;
pub mod graph;
pub mod import;
pub mod onnx;
pub mod ops;
pub mod optimize;
pub mod plan;
pub mod prepack;
pub mod quantize;
pub mod session;
pub mod storage;
pub mod tensor;

pub use error::{Error, ErrorCode, Result};
pub use ops::Precision;
pub use session::{Loader, Options, Session};
pub use tensor::{DType, Tensor, TensorMut, TensorView};
