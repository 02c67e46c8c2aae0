//! SIMD kernels for neural-network inference.
//!
//! Slices and sizes in, numbers out: this crate knows no graph and no file format. Every kernel is written once,
//! generic over [`simd::Simd`], and compiled for each instruction set of the target; [`simd::dispatch()`] is the only
//! place where one is chosen. Work is spread over threads by [`par::Cx`], and each kernel has a naive counterpart in
//! [`reference`](mod@reference) that tests and benches compare it with.

pub mod attention;
pub mod chain;
pub mod conv;
pub mod conv_transpose;
pub mod convert;
pub mod deform;
mod depthwise;
pub mod elementwise;
pub mod epilogue;
pub mod error;
pub mod finish;
pub mod gemm;
pub mod int8;
pub mod math;
pub mod movement;
pub mod naive;
pub mod nbits;
pub mod norm;
pub mod par;
pub mod patches;
pub mod pool;
pub mod quant;
pub mod reduce;
pub mod reference;
pub mod resize;
pub mod rnn;
pub mod roi;
pub mod sampling;
pub mod signal;
pub mod simd;
pub mod softmax;
#[cfg(test)]
mod testing;
pub mod winograd;
