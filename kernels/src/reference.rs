//! Naive counterparts of all kernels: the oracle that tests and benches compare with.
//!
//! Each is the textbook loop over `ndarray` views, accumulating in `f64`, with no regard to speed.

pub mod gemm;
pub mod int8;
pub mod movement;
pub mod nbits;
mod norm;
pub use norm::{normalize, softmax};
mod pool;
pub use pool::pool;
mod reduce;
pub use reduce::reduce;
mod attention;
pub use attention::attention;
