//! What is measured: matrix shapes of BERT and of 1x1 convolutions, layers of ResNet-50 and MobileNetV2.

use weblane_kernels::conv::{Algorithm, Conv, ConvInput, ConvParams, Layout};
use weblane_kernels::epilogue::{Activation, Epilogue};
use weblane_kernels::gemm::{Batched, Matrix, PackedB, Rhs, gemm, gemm_batched};
use weblane_kernels::int8::{Bytes, BytesMut, Form, Output, PackedQ, QConv, QMatrix, Requantize, qgemm};
use weblane_kernels::par::Cx;
use weblane_kernels::simd::Isa;

/// One measured call.
pub(crate) type Run = Box<dyn FnMut(&Cx<'_>)>;

/// One line of the table.
pub(crate) struct Work {
    /// What it is.
    pub(crate) name: String,
    /// Operations of one run: two per multiply-add.
    pub(crate) flops: f64,
    /// Whether they are those of 8-bit integers in their fastest exact form.
    pub(crate) int8: bool,
    /// Packs the weights for an instruction set and returns the run.
    pub(crate) prepare: Box<dyn Fn(Isa) -> Run>,
}

/// `m`, `k`, `n`.
const PRODUCTS: [[usize; 3]; 14] = [
    [1024, 1024, 1024],
    [128, 768, 768],
    [128, 768, 3072],
    [128, 3072, 768],
    [128, 384, 1536],
    [3136, 64, 64],
    [784, 192, 64],
    [784, 64, 192],
    [197, 768, 768],
    [12544, 32, 16],
    [49, 320, 1280],
    [7, 512, 100],
    [1, 1024, 1000],
    [1, 768, 3072],
];

/// Input size, channels in and out, groups, kernel, stride.
const CONVOLUTIONS: [[usize; 6]; 18] = [
    // ResNet-50
    [224, 3, 64, 1, 7, 2],
    [56, 64, 64, 1, 3, 1],
    [28, 128, 128, 1, 3, 1],
    [14, 256, 256, 1, 3, 1],
    [7, 512, 512, 1, 3, 1],
    [56, 256, 512, 1, 1, 2],
    [14, 1024, 256, 1, 1, 1],
    [28, 256, 256, 1, 3, 2],
    [14, 512, 512, 1, 3, 2],
    [7, 2048, 512, 1, 1, 1],
    // MobileNetV2
    [224, 3, 32, 1, 3, 2],
    [112, 32, 16, 1, 1, 1],
    [56, 24, 144, 1, 1, 1],
    [112, 32, 32, 32, 3, 1],
    [112, 96, 96, 96, 3, 2],
    [28, 192, 192, 192, 3, 1],
    [14, 384, 384, 384, 3, 1],
    [7, 960, 960, 960, 3, 1],
];

/// The same with SiLU behind it, from YOLOX-nano.
const SILU_CONVOLUTIONS: [[usize; 6]; 3] = [[52, 64, 64, 64, 3, 1], [208, 16, 16, 16, 3, 2], [104, 32, 16, 1, 1, 1]];

/// Everything that is measured.
pub(crate) fn works() -> Vec<Work> {
    let mut works: Vec<Work> = PRODUCTS.into_iter().map(product).collect();
    works.push(attention());
    works.extend(CONVOLUTIONS.into_iter().map(|sizes| convolution(sizes, Activation::Relu)));
    works.extend(SILU_CONVOLUTIONS.into_iter().map(|sizes| convolution(sizes, Activation::Silu)));
    works.extend(PRODUCTS.into_iter().map(product_int8));
    works.extend(CONVOLUTIONS.into_iter().map(convolution_int8));
    works
}

fn product([m, k, n]: [usize; 3]) -> Work {
    Work {
        name: format!("gemm {m} x {k} x {n}"),
        flops: 2.0 * (m * k * n) as f64,
        int8: false,
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
    }
}

/// Scores of 12 heads, 128 tokens, 32 dimensions: queries times transposed keys.
fn attention() -> Work {
    let (heads, tokens, dims) = (12, 128, 32);
    Work {
        name: "scores 12 x 128 x 32 x 128".into(),
        flops: 2.0 * (heads * tokens * dims * tokens) as f64,
        int8: false,
        prepare: Box::new(move |_| {
            let (q, k) = (vec![0.5; heads * tokens * dims], vec![0.25; heads * tokens * dims]);
            let mut c = vec![0.0; heads * tokens * tokens];
            Box::new(move |cx| {
                let g = Batched {
                    batch_dims: &[heads],
                    m: tokens,
                    n: tokens,
                    k: dims,
                    a: &q,
                    a_batch_strides: &[dims],
                    a_strides: [heads * dims, 1],
                    b: &k,
                    b_batch_strides: &[dims],
                    b_strides: [1, heads * dims],
                    c_batch_strides: &[tokens * tokens],
                    ldc: tokens,
                    bias: None,
                    activation: Activation::Identity,
                };
                gemm_batched(cx, &g, &mut c).expect("sizes fit");
            })
        }),
    }
}

/// `k` x `n` weights as quantising normally distributed ones by columns gives them: how many are large decides how
/// [`Form::Split`] fares.
fn weights_int8(k: usize, n: usize) -> Vec<i8> {
    let mut random = 1u32;
    let mut uniform = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 8) as f32 / (1 << 24) as f32
    };
    // The sum of twelve is close to normal, with variance 1.
    let normal: Vec<f32> = (0..k * n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    let largest = |j: usize| normal[j..].iter().step_by(n).fold(0.0f32, |max, x| max.max(x.abs()));
    let scales: Vec<f32> = (0..n).map(|j| 127.0 / largest(j)).collect();
    normal.iter().zip(scales.iter().cycle()).map(|(x, scale)| (x * scale).round_ties_even() as i8).collect()
}

/// Unsigned activations, signed weights with a scale for each column, quantised again.
fn product_int8([m, k, n]: [usize; 3]) -> Work {
    Work {
        name: format!("int8 gemm {m} x {k} x {n}"),
        flops: 2.0 * (m * k * n) as f64,
        int8: true,
        prepare: Box::new(move |isa| {
            let (a, b) = (vec![131; m * k], weights_int8(k, n));
            let b = QMatrix::new(Bytes::I8(&b), k, n);
            let b = PackedQ::new(isa, Form::best(isa), b, &[0]).expect("sizes fit");
            let (bias, multiplier) = (vec![100; n], vec![1e-3; n]);
            let mut c = vec![0; m * n];
            Box::new(move |cx| {
                let requantize = Requantize { multiplier: &multiplier, zero: 3, lo: 0, hi: 255, add: None };
                let output = Output::Quantized { requantize, y: BytesMut::U8(&mut c) };
                qgemm(cx, QMatrix::new(Bytes::U8(&a), m, k), 128, &b, Some(&bias), output).expect("sizes fit");
            })
        }),
    }
}

fn conv_shape([size, in_channels, out_channels, groups, kernel, stride]: [usize; 6]) -> (ConvParams, ConvInput, usize) {
    let pad = kernel / 2;
    let params = ConvParams {
        in_channels,
        out_channels,
        groups,
        kernel: [1, kernel, kernel],
        strides: [1, stride, stride],
        dilations: [1; 3],
    };
    let input = ConvInput { batch: 1, spatial: [1, size, size], pads_begin: [0, pad, pad], pads_end: [0, pad, pad] };
    (params, input, (size + 2 * pad - kernel) / stride + 1)
}

fn convolution_int8(shape: [usize; 6]) -> Work {
    let [size, in_channels, out_channels, groups, kernel, stride] = shape;
    let (params, input, side) = conv_shape(shape);
    let per_output = in_channels / groups * kernel * kernel;
    Work {
        name: format!("int8 conv {size}^2 {in_channels}>{out_channels}/{groups} {kernel}x{kernel} s{stride}"),
        flops: 2.0 * (side * side * out_channels * per_output) as f64,
        int8: true,
        prepare: Box::new(move |isa| {
            let columns = weights_int8(per_output, out_channels);
            let weight = |i: usize| columns[i % per_output * out_channels + i / per_output];
            let weights: Vec<i8> = (0..out_channels * per_output).map(weight).collect();
            let (bias, multiplier) = (vec![100; out_channels], vec![1e-3; out_channels]);
            let (form, params) = (Form::best(isa), params.clone());
            let conv = QConv::new(isa, form, params, Algorithm::Direct, Bytes::I8(&weights), &[0]).expect("sizes fit");
            let x = vec![131; size * size * in_channels];
            let mut out = vec![0; side * side * out_channels];
            let input = input.clone();
            Box::new(move |cx| {
                let requantize = Requantize { multiplier: &multiplier, zero: 3, lo: 0, hi: 255, add: None };
                let output = Output::Quantized { requantize, y: BytesMut::U8(&mut out) };
                conv.run(cx, &input, Bytes::U8(&x), 128, Some(&bias), output).expect("sizes fit");
            })
        }),
    }
}

fn convolution(shape: [usize; 6], activation: Activation) -> Work {
    let [size, in_channels, out_channels, groups, kernel, stride] = shape;
    let (params, input, side) = conv_shape(shape);
    let per_output = in_channels / groups * kernel * kernel;
    Work {
        name: format!(
            "conv {size}^2 {in_channels}>{out_channels}/{groups} {kernel}x{kernel} s{stride}{}",
            if activation == Activation::Relu { String::new() } else { format!(" {activation:?}") }
        ),
        flops: 2.0 * (side * side * out_channels * per_output) as f64,
        int8: false,
        prepare: Box::new(move |isa| {
            let weights = vec![0.25; out_channels * per_output];
            let bias = vec![1.0; out_channels];
            let conv = Conv::new(isa, params.clone(), Algorithm::Direct, &weights, Some(&bias)).expect("sizes fit");
            let x = vec![0.5; size * size * in_channels];
            let mut out = vec![0.0; side * side * out_channels];
            let input = input.clone();
            Box::new(move |cx| {
                conv.run(cx, &input, Layout::Nhwc, &x, None, activation, &mut out).expect("sizes fit");
            })
        }),
    }
}
