//! What is measured: matrix shapes of BERT and of 1x1 convolutions, layers of ResNet-50 and MobileNetV2.

use weblane_kernels::epilogue::{Activation, Epilogue};
use weblane_kernels::gemm::{Matrix, PackedB, Rhs, gemm};
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;

/// One measured call.
pub type Run = Box<dyn FnMut(&Cx<'_>)>;

/// One line of the table.
pub struct Work {
    /// What it is.
    pub name: String,
    /// Floating-point operations of one run: two per multiply-add.
    pub flops: f64,
    /// Packs the weights for an instruction set and returns the run.
    pub prepare: Box<dyn Fn(Isa) -> Run>,
}

/// Everything that is measured.
pub fn works() -> Vec<Work> {
    let mut works = Vec::new();
    for (m, k, n) in [
        (1024, 1024, 1024),
        (128, 768, 768),
        (128, 768, 3072),
        (128, 3072, 768),
        (128, 384, 1536),
        (3136, 64, 64),
        (784, 192, 64),
        (12544, 32, 16),
        (49, 320, 1280),
        (7, 512, 100),
        (1, 1024, 1000),
    ] {
        works.push(Work {
            name: format!("gemm {m} x {k} x {n}"),
            flops: 2.0 * (m * k * n) as f64,
            prepare: Box::new(move |isa| {
                let (a, b) = (vec![0.5; m * k], vec![0.25; k * n]);
                let b = PackedB::new(isa, Matrix::new(&b, k, n)).expect("sizes fit");
                let bias = vec![1.0; n];
                let mut c = vec![0.0; m * n];
                Box::new(move |cx| {
                    let epilogue = Epilogue { bias: Some(&bias), residual: None, activation: Activation::Relu };
                    gemm(cx, Matrix::new(&a, m, k), Rhs::Packed(&b), &epilogue, &mut c, n).expect("sizes fit");
                })
            }),
        });
    }
    works
}
