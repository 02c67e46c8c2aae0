use super::*;
use crate::conv::{Algorithm, Conv, Layout};
use crate::par::Pool;
use crate::reference::gemm::conv as reference;
use crate::testing::each_context;

/// For comparison, on the same data.
const DIRECT_ERROR: f64 = 8e-7;

const SIZES: [TileSize; 2] = [TileSize::Two, TileSize::Four];

/// Pseudo-random numbers in `-1..1`.
fn uniform(len: usize, seed: u32) -> Vec<f32> {
    let mut state = u64::from(seed) << 32 | 0x9e37_79b9;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn params(in_channels: usize, out_channels: usize) -> ConvParams {
    let (kernel, ones) = ([1, 3, 3], [1; 3]);
    ConvParams { in_channels, out_channels, groups: 1, kernel, strides: ones, dilations: ones }
}

/// Padding: top, left, bottom, right.
fn input(batch: usize, [h, w]: [usize; 2], [t, l, b, r]: [usize; 4]) -> ConvInput {
    ConvInput { batch, spatial: [1, h, w], pads_begin: [0, t, l], pads_end: [0, b, r] }
}

fn largest(y: &[f64]) -> f64 {
    y.iter().fold(0.0, |most, y| most.max(y.abs()))
}

/// With residual and bounds; channels last and first; the same bits on one lane and two.
fn check(params: &ConvParams, input: &ConvInput) {
    let w: Vec<f32> = uniform(params.out_channels * params.in_channels * 9, 1);
    let bias = uniform(params.out_channels, 2);
    let x = uniform(input.batch * input.spatial.iter().product::<usize>() * params.in_channels, 3);
    let spatial = params.output_spatial(input).unwrap();
    let want = reference(params, input, spatial, &x, &w, &bias);
    let residual = uniform(want.len(), 4);
    for size in SIZES {
        let mut first: Vec<(Isa, Vec<f32>)> = Vec::new();
        each_context(|cx| {
            let isa = cx.isa();
            let conv = Conv::new(isa, params.clone(), Algorithm::Winograd(size), &w, Some(&bias)).unwrap();
            let bound = MAX_ERROR[size as usize] * largest(&want).max(1.0);
            let clip = Activation::Clip { lo: -0.5, hi: 2.0 };
            for (residual, activation) in
                [(None, Activation::Identity), (Some(&residual[..]), clip), (None, Activation::Silu)]
            {
                let mut got = vec![f32::NAN; want.len()];
                conv.run(cx, input, Layout::Nhwc, &x, residual, activation, &mut got).unwrap();
                for i in 0..want.len() {
                    let y = want[i] + residual.map_or(0.0, |r| f64::from(r[i]));
                    let y = match activation {
                        Activation::Silu => y / (1.0 + (-y).exp()),
                        Activation::Clip { lo, hi } => y.clamp(lo.into(), hi.into()),
                        _ => y,
                    };
                    let error = (f64::from(got[i]) - y).abs();
                    assert!(error <= bound * 1.1 + 1e-6, "{isa} {size:?} {params:?} {input:?} {i}: {} {y}", got[i]);
                }
                if activation == clip {
                    match first.iter().find(|(other, _)| *other == isa) {
                        None => first.push((isa, got)),
                        Some((_, first)) => assert_eq!(*first, got, "{isa}: the number of lanes changes the result"),
                    }
                }
            }
        });
    }
}

#[test]
fn ragged_edges_and_padding() {
    check(&params(16, 16), &input(1, [8, 8], [1; 4]));
    check(&params(17, 19), &input(2, [7, 9], [1; 4]));
    check(&params(20, 33), &input(1, [3, 3], [0; 4]));
    check(&params(33, 16), &input(1, [1, 1], [1; 4]));
    check(&params(16, 24), &input(1, [6, 5], [0, 1, 2, 3]));
    check(&params(16, 16), &input(1, [5, 11], [4, 0, 0, 4]));
    check(&params(16, 16), &input(1, [2, 2], [3; 4]));
}

#[test]
fn planes_of_padding() {
    let mut input = input(2, [5, 6], [1; 4]);
    input.spatial[0] = 3;
    input.pads_begin[0] = 2;
    input.pads_end[0] = 1;
    check(&params(16, 16), &input);
}

#[test]
fn weights_beyond_the_cache_run_step_by_step() {
    check(&params(96, 80), &input(1, [9, 9], [1; 4]));
    let (params, input) = (params(130, 140), input(1, [30, 31], [1; 4]));
    let w = vec![0.0; params.in_channels * params.out_channels * 9];
    let conv = Winograd::new(Isa::Scalar, TileSize::Two, &params, &w, None).unwrap();
    assert!(conv.bytes() > steps::SMALL_WEIGHTS);
    check(&params, &input);
}

#[test]
fn several_passes_along_the_channels() {
    check(&params(300, 20), &input(1, [4, 6], [1; 4]));
}

#[test]
fn infinities_and_nan_stay_in_their_tile() {
    let (params, input) = (params(16, 16), input(1, [12, 12], [1; 4]));
    let w = uniform(16 * 16 * 9, 1);
    let mut x = uniform(144 * 16, 2);
    x[5] = f32::NAN;
    for size in SIZES {
        let conv = Conv::new(Isa::best(), params.clone(), Algorithm::Winograd(size), &w, None).unwrap();
        let mut y = vec![0.0; 144 * 16];
        Pool::new(1).run(Isa::best(), |cx| {
            conv.run(cx, &input, Layout::Nhwc, &x, None, Activation::Identity, &mut y).unwrap();
        });
        assert!(y[..16].iter().all(|y| y.is_nan()));
        assert!(y[size.outputs() * 16..12 * 16].iter().all(|y| y.is_finite()));
    }
}

/// The error that the documentation of the module states, relative to the largest output.
#[test]
fn error_is_bounded() {
    for channels in [16, 64, 256, 512] {
        let (params, input) = (params(channels, 16), input(1, [12, 12], [1; 4]));
        let scale = (3.0 / (9.0 * channels as f32)).sqrt();
        let w: Vec<f32> = uniform(16 * channels * 9, 7).iter().map(|w| w * scale).collect();
        for positive in [false, true] {
            let mut x = uniform(144 * channels, 8);
            if positive {
                x.iter_mut().for_each(|x| *x = x.abs());
            }
            let want = reference(&params, &input, [1, 12, 12], &x, &w, &[0.0; 16]);
            let largest = largest(&want);
            each_context(|cx| {
                let [two, four] = SIZES.map(Algorithm::Winograd);
                let algorithms = [Algorithm::Direct, two, four];
                for (algorithm, bound) in algorithms.into_iter().zip([DIRECT_ERROR, MAX_ERROR[0], MAX_ERROR[1]]) {
                    let conv = Conv::new(cx.isa(), params.clone(), algorithm, &w, None).unwrap();
                    let mut got = vec![0.0; want.len()];
                    conv.run(cx, &input, Layout::Nhwc, &x, None, Activation::Identity, &mut got).unwrap();
                    let error = got.iter().zip(&want).map(|(got, want)| (f64::from(*got) - want).abs());
                    let error = error.fold(0.0, f64::max) / largest;
                    println!("{} {channels} channels {algorithm:?}: {error:.1e}", cx.isa());
                    assert!(error <= bound, "{} {channels} channels {algorithm:?}: {error:e}", cx.isa());
                }
            });
        }
    }
}

#[test]
fn the_choice_weighs_products_and_memory() {
    let isa = Isa::Scalar;
    let chosen = |size: usize, k: usize, n: usize| {
        let input = input(1, [size; 2], [1; 4]);
        Algorithm::choose(isa, &params(k, n), &input)
    };
    let [two, four] = SIZES.map(Algorithm::Winograd);
    for (want, cases) in [
        (four, &[(56, 64, 64), (28, 128, 128), (28, 512, 512), (14, 64, 256), (7, 64, 64), (14, 256, 256)][..]),
        (two, &[(10, 256, 256), (7, 512, 512)]),
        (Algorithm::Direct, &[(6, 512, 512), (1, 64, 64), (3, 16, 16), (56, 3, 64), (56, 64, 4)]),
    ] {
        for &(size, k, n) in cases {
            assert_eq!(chosen(size, k, n), want, "{size} {k} {n}");
        }
    }
    let strided = ConvParams { strides: [1, 2, 2], ..params(64, 64) };
    assert_eq!(Algorithm::choose(isa, &strided, &input(1, [56, 56], [1; 4])), Algorithm::Direct);
    let small = ConvInput { spatial: [1, 1, 1], pads_begin: [0; 3], pads_end: [0; 3], batch: 1 };
    assert_eq!(Algorithm::choose(isa, &params(64, 64), &small), Algorithm::Direct, "the kernel does not fit");
}

#[test]
fn other_convolutions_are_refused() {
    let good = params(16, 16);
    let new = |params: ConvParams| {
        let w = vec![0.0; params.in_channels / params.groups * params.out_channels * params.kernel[1] * 3];
        Conv::new(Isa::best(), params, Algorithm::Winograd(TileSize::Four), &w, None)
    };
    assert!(new(good.clone()).is_ok());
    for params in [
        ConvParams { strides: [1, 2, 1], ..good.clone() },
        ConvParams { dilations: [1, 1, 2], ..good.clone() },
        ConvParams { groups: 2, ..good.clone() },
        ConvParams { kernel: [1, 5, 3], ..good.clone() },
        ConvParams { in_channels: 7, ..good.clone() },
        ConvParams { out_channels: 7, ..good },
    ] {
        assert!(new(params.clone()).unwrap_err().to_string().contains("no Winograd"), "{params:?}");
    }
}
