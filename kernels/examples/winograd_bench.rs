//! Time of 3 x 3 convolutions by every algorithm: the measurements behind `Algorithm::choose`.
//!
//! `cargo run --release -p weblane-kernels --example winograd_bench [-- [int8] [<instruction set> [<lanes>]]]`

use std::time::Instant;
use weblane_kernels::conv::{Algorithm, Conv, ConvInput, ConvParams, Layout};
use weblane_kernels::epilogue::Activation;
use weblane_kernels::int8::{Bytes, BytesMut, Form, Output, QConv, Requantize};
use weblane_kernels::par::Pool;
use weblane_kernels::simd::Isa;
use weblane_kernels::winograd::TileSize;

/// Size of the image along a side, channels of the input and of the output.
const SHAPES: [[usize; 3]; 27] = [
    [208, 12, 16],
    [208, 16, 16],
    [112, 16, 16],
    [112, 32, 32],
    [112, 64, 64],
    [60, 32, 32],
    [56, 16, 64],
    [56, 24, 24],
    [56, 64, 64],
    [28, 16, 16],
    [28, 32, 32],
    [28, 32, 128],
    [28, 64, 64],
    [28, 128, 128],
    [20, 64, 64],
    [14, 32, 32],
    [14, 64, 64],
    [14, 48, 192],
    [14, 64, 256],
    [14, 128, 128],
    [14, 256, 256],
    [13, 64, 256],
    [10, 64, 64],
    [10, 128, 128],
    [7, 64, 64],
    [7, 128, 128],
    [7, 512, 512],
];

/// Median of the time of one call in microseconds.
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || start.elapsed().as_secs_f64() < 0.1 {
        let t = Instant::now();
        f();
        times.push(t.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

const ALGORITHMS: [Algorithm; 3] =
    [Algorithm::Direct, Algorithm::Winograd(TileSize::Two), Algorithm::Winograd(TileSize::Four)];

/// Microseconds of each algorithm that there is for a convolution.
fn floats(pool: &Pool, isa: Isa, params: &ConvParams, input: &ConvInput) -> [f64; 3] {
    let weights = vec![0.25; params.in_channels * params.out_channels * 9];
    let bias = vec![1.0; params.out_channels];
    let pixels = input.spatial[1] * input.spatial[2];
    let x = vec![0.5; pixels * params.in_channels];
    let mut out = vec![0.0; pixels * params.out_channels];
    ALGORITHMS.map(|algorithm| {
        let conv = Conv::new(isa, params.clone(), algorithm, &weights, Some(&bias));
        let Ok(conv) = conv else { return f64::INFINITY };
        pool.run(isa, |cx| {
            time(|| {
                conv.run(cx, input, Layout::Nhwc, &x, None, Activation::Relu, &mut out).expect("sizes fit");
            })
        })
    })
}

/// The same for bytes, quantised again.
fn integers(pool: &Pool, isa: Isa, params: &ConvParams, input: &ConvInput) -> [f64; 3] {
    let weights = vec![3; params.in_channels * params.out_channels * 9];
    let (bias, multiplier) = (vec![100; params.out_channels], vec![1e-3; params.out_channels]);
    let pixels = input.spatial[1] * input.spatial[2];
    let x = vec![131; pixels * params.in_channels];
    let mut out = vec![0; pixels * params.out_channels];
    ALGORITHMS.map(|algorithm| {
        let conv = QConv::new(isa, Form::Wide, params.clone(), algorithm, Bytes::I8(&weights), &[0]);
        let Ok(conv) = conv else { return f64::INFINITY };
        pool.run(isa, |cx| {
            time(|| {
                let requantize = Requantize { multiplier: &multiplier, zero: 3, lo: 0, hi: 255, add: None };
                let output = Output::Quantized { requantize, y: BytesMut::U8(&mut out) };
                conv.run(cx, input, Bytes::U8(&x), 128, Some(&bias), output).expect("sizes fit");
            })
        })
    })
}

fn main() {
    let mut args = std::env::args().skip(1).peekable();
    let int8 = args.next_if(|arg| arg == "int8").is_some();
    let isa = args.next().map_or(Isa::best(), |name| name.parse().expect("an instruction set"));
    let pool = Pool::new(args.next().map_or(1, |lanes| lanes.parse().expect("a number of lanes")));
    println!("{isa}, microseconds\n{:20} {:>9} {:>9} {:>9}   chosen", "", "direct", "M = 2", "M = 4");
    for [size, in_channels, out_channels] in SHAPES {
        let (kernel, ones) = ([1, 3, 3], [1; 3]);
        let params = ConvParams { in_channels, out_channels, groups: 1, kernel, strides: ones, dilations: ones };
        let input = ConvInput { batch: 1, spatial: [1, size, size], pads_begin: [0, 1, 1], pads_end: [0, 1, 1] };
        let (times, chosen) = if int8 {
            (integers(&pool, isa, &params, &input), QConv::choose(isa, Form::Wide, &params, &input))
        } else {
            (floats(&pool, isa, &params, &input), Algorithm::choose(isa, &params, &input))
        };
        let chosen = ALGORITHMS.iter().position(|algorithm| *algorithm == chosen).expect("one of them");
        println!(
            "{:20} {:9.0} {:9.0} {:9.0}   {}{}",
            format!("{size}^2 {in_channels} > {out_channels}"),
            times[0],
            times[1],
            times[2],
            ["direct", "2", "4"][chosen],
            if times.iter().all(|time| times[chosen] <= *time) { "" } else { "  (not the fastest)" },
        );
    }
}
