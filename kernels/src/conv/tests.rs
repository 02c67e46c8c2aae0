use super::*;
use crate::reference::gemm::conv as reference;
use crate::testing::{each_context, integers};

struct Case {
    params: ConvParams,
    input: ConvInput,
}

/// `[in, out, groups]`, then 2-D sizes.
fn case(channels: [usize; 3], batch: usize, size: [usize; 2], kernel: [usize; 2], stride: usize, pad: usize) -> Case {
    let [in_channels, out_channels, groups] = channels;
    Case {
        params: ConvParams {
            in_channels,
            out_channels,
            groups,
            kernel: [1, kernel[0], kernel[1]],
            strides: [1, stride, stride],
            dilations: [1; 3],
        },
        input: ConvInput { batch, spatial: [1, size[0], size[1]], pads_begin: [0, pad, pad], pads_end: [0, pad, pad] },
    }
}

fn to_channels_first(x: &[f32], batch: usize, channels: usize) -> Vec<f32> {
    let pixels = x.len() / (batch * channels).max(1);
    (0..x.len()).map(|i| x[(i / channels / pixels * pixels + i % pixels) * channels + i / pixels % channels]).collect()
}

fn check(case: &Case) {
    let Case { params, input } = case;
    let taps: usize = params.kernel.iter().product();
    let w = integers(params.out_channels * params.in_channels / params.groups * taps, 1);
    let bias = integers(params.out_channels, 2);
    let x = integers(input.batch * input.spatial.iter().product::<usize>() * params.in_channels, 3);
    each_context(|cx| {
        let isa = cx.isa();
        let conv = Conv::new(isa, params.clone(), Algorithm::Direct, &w, Some(&bias)).unwrap();
        let spatial = conv.output_spatial(input).unwrap();
        let want = reference(params, input, spatial, &x, &w, &bias);
        let residual = integers(want.len(), 4);
        let clip = Activation::Clip { lo: -3.0, hi: 20.0 };
        for (residual, activation) in [(None, Activation::Identity), (Some(&residual[..]), clip)] {
            let want: Vec<f32> = (0..want.len())
                .map(|i| {
                    let x = want[i] as f32 + residual.map_or(0.0, |residual| residual[i]);
                    if activation == clip { x.clamp(-3.0, 20.0) } else { x }
                })
                .collect();
            let mut got = vec![f32::NAN; want.len()];
            conv.run(cx, input, Layout::Nhwc, &x, residual, activation, &mut got).unwrap();
            assert_eq!(got, want, "{isa:?} {params:?} {input:?}");
            let (b, o) = (input.batch, params.out_channels);
            let first = residual.map(|residual| to_channels_first(residual, b, o));
            let x = to_channels_first(&x, b, params.in_channels);
            conv.run(cx, input, Layout::Nchw, &x, first.as_deref(), activation, &mut got).unwrap();
            assert_eq!(got, to_channels_first(&want, b, o), "channels first, {isa:?} {params:?} {input:?}");
        }
    });
}

#[test]
fn pointwise() {
    check(&case([5, 7, 1], 2, [3, 4], [1, 1], 1, 0));
    check(&case([16, 24, 1], 1, [7, 7], [1, 1], 1, 0));
    check(&case([33, 17, 1], 1, [9, 8], [1, 1], 2, 0));
    check(&case([8, 6, 2], 2, [5, 3], [1, 1], 1, 0));
    check(&case([40, 19, 1], 1, [1, 1], [1, 1], 1, 0));
    check(&case([4, 3, 1], 1, [4, 4], [1, 1], 1, 1));
}

#[test]
fn patches() {
    check(&case([3, 32, 1], 1, [23, 24], [3, 3], 2, 1));
    check(&case([3, 8, 1], 2, [15, 17], [7, 7], 2, 3));
    check(&case([16, 9, 1], 1, [7, 6], [3, 3], 1, 1));
    check(&case([65, 33, 1], 1, [5, 5], [3, 3], 1, 1));
    check(&case([64, 40, 1], 1, [28, 30], [3, 3], 1, 1));
    check(&case([1, 1, 1], 1, [1, 1], [3, 3], 1, 1));
    check(&case([2, 3, 1], 1, [2, 2], [5, 5], 1, 2));
    check(&case([6, 5, 1], 1, [4, 9], [2, 3], 3, 4));
    check(&case([8, 12, 4], 2, [6, 5], [3, 3], 1, 1));
    check(&case([3, 6, 3], 1, [6, 5], [3, 3], 1, 1));
}

#[test]
fn weights_larger_than_a_cache() {
    // Patches that are gathered once, in few rows, in many; without padding and with.
    check(&case([64, 256, 1], 1, [15, 13], [3, 3], 2, 1));
    check(&case([65, 257, 1], 2, [9, 8], [1, 1], 2, 0));
    check(&case([3, 300, 1], 1, [1, 1], [3, 3], 1, 1));
    // Too few columns for that: gathered block by block.
    check(&case([64, 120, 1], 1, [20, 21], [3, 3], 1, 1));
}

#[test]
fn dilated_and_uneven() {
    for (in_channels, groups) in [(3, 1), (16, 1), (8, 2), (8, 8)] {
        let mut c = case([in_channels, 8, groups], 2, [9, 11], [3, 2], 1, 0);
        c.params.dilations = [1, 2, 3];
        c.params.strides = [1, 1, 2];
        c.input.pads_begin = [0, 3, 0];
        c.input.pads_end = [0, 1, 5];
        check(&c);
    }
}

#[test]
fn three_dimensions_of_few_channels() {
    for (channels, groups) in [(1, 1), (3, 1), (4, 2), (5, 1)] {
        let mut c = case([channels, 6, groups], 2, [6, 9], [3, 3], 1, 1);
        c.params.kernel[0] = 2;
        c.params.strides[2] = 2;
        c.input.spatial[0] = 4;
        c.input.pads_begin[0] = 1;
        c.input.pads_end = [0, 2, 3];
        check(&c);
    }
}

#[test]
fn one_and_three_dimensions() {
    for groups in [1, 4] {
        let mut c = case([4, 4, groups], 2, [1, 19], [1, 5], 2, 0);
        c.input.pads_begin = [0, 0, 2];
        c.input.pads_end = [0, 0, 1];
        check(&c);
        c.params.kernel = [3, 2, 2];
        c.params.strides = [2, 1, 1];
        c.params.dilations = [1, 2, 1];
        c.input.spatial = [5, 4, 3];
        c.input.pads_begin = [1, 0, 1];
        c.input.pads_end = [1, 1, 0];
        check(&c);
        // Depth 1 and padded depth: the planes of padding are bias only.
        c.params.kernel = [1, 3, 3];
        c.params.strides = [1; 3];
        c.params.dilations = [1; 3];
        check(&c);
    }
}

#[test]
fn depthwise() {
    for channels in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 33, 40] {
        check(&case([channels, channels, channels], 1, [5, 9], [3, 3], 1, 1));
    }
    for kernel in [[3, 3], [5, 5], [2, 4], [1, 7]] {
        for stride in [1, 2, 3] {
            for pad in [0, 1, 2, 4] {
                check(&case([20, 20, 20], 2, [7, 13], kernel, stride, pad));
            }
        }
    }
    check(&case([64, 64, 64], 1, [40, 40], [3, 3], 1, 1));
    // Several vectors of channels at the sides of the image, the last ones overlapping.
    for (kernel, stride) in [([7, 7], 1), ([7, 7], 2), ([2, 9], 1), ([13, 13], 1)] {
        check(&case([70, 70, 70], 1, [6, 12], kernel, stride, kernel[1] / 2));
    }
    check(&case([6, 6, 6], 1, [1, 1], [3, 3], 1, 1));
    check(&case([6, 6, 6], 1, [2, 2], [5, 5], 2, 2));
}

#[test]
fn nothing_to_do() {
    check(&case([3, 4, 1], 0, [5, 5], [3, 3], 1, 1));
    check(&case([3, 0, 1], 1, [5, 5], [3, 3], 1, 1));
    check(&case([0, 4, 1], 1, [5, 5], [3, 3], 1, 1));
}

#[test]
fn costly_activation_matches_a_second_sweep() {
    for c in [case([9, 9, 9], 1, [5, 9], [3, 3], 1, 1), case([9, 5, 1], 1, [5, 9], [3, 3], 1, 1)] {
        let w = integers(c.params.out_channels * c.params.in_channels / c.params.groups * 9, 1);
        let x = integers(45 * 9, 2);
        each_context(|cx| {
            let conv = Conv::new(cx.isa(), c.params.clone(), Algorithm::Direct, &w, None).unwrap();
            let run = |activation| {
                let mut out = vec![0.0; 45 * c.params.out_channels];
                conv.run(cx, &c.input, Layout::Nhwc, &x, None, activation, &mut out).unwrap();
                out
            };
            let mut want = run(Activation::Identity);
            let (c, cols) = (want.as_mut_ptr(), want.len());
            dispatch(cx.isa(), gemm::Activate { activation: Activation::HardSwish, c, rows: 1, cols, ld: 0 });
            for (got, want) in run(Activation::HardSwish).iter().zip(&want) {
                assert!((got - want).abs() <= 1e-6 * want.abs(), "{got} {want}");
            }
        });
    }
}

#[test]
fn wrong_operands_are_refused() {
    let c = case([3, 4, 1], 1, [5, 5], [3, 3], 1, 0);
    let w = vec![0.0; 108];
    each_context(|cx| {
        let isa = cx.isa();
        let new = |params| Conv::new(isa, params, Algorithm::Direct, &w, None).map(|_| ()).unwrap_err().to_string();
        assert!(new(ConvParams { groups: 2, ..c.params.clone() }).contains("groups"));
        assert!(new(ConvParams { strides: [1, 0, 1], ..c.params.clone() }).contains("must not be 0"));
        assert!(new(ConvParams { out_channels: 5, ..c.params.clone() }).contains("108"));
        assert!(new(ConvParams { kernel: [usize::MAX, 3, 3], ..c.params.clone() }).contains("address space"));
        let conv = Conv::new(isa, c.params.clone(), Algorithm::Direct, &w, None).unwrap();
        let mut out = vec![0.0; 36];
        let mut run = |input: &ConvInput, x: &[f32]| {
            conv.run(cx, input, Layout::Nhwc, x, None, Activation::Identity, &mut out).map_err(|e| e.to_string())
        };
        assert!(run(&c.input, &[0.0; 74]).unwrap_err().contains("the input has 74 elements, expected 75"));
        assert_eq!(run(&c.input, &[0.0; 75]), Ok(()));
        let small = ConvInput { spatial: [1, 2, 5], ..c.input.clone() };
        assert!(run(&small, &[0.0; 30]).unwrap_err().contains("does not fit"));
        let huge = ConvInput { pads_begin: [0, usize::MAX, 0], ..c.input.clone() };
        assert!(run(&huge, &[0.0; 75]).is_err());
    });
}

#[test]
fn groups_of_few_channels() {
    for (inputs, outputs) in [(1, 2), (2, 1), (2, 2), (3, 4), (4, 4), (4, 7), (5, 2)] {
        for (kernel, stride, pad) in [([3, 3], 1, 1), ([3, 3], 2, 0), ([5, 5], 2, 2), ([7, 2], 1, 1), ([1, 3], 3, 1)] {
            check(&case([17 * inputs, 17 * outputs, 17], 2, [9, 11], kernel, stride, pad));
        }
    }
    let mut dilated = case([32, 32, 16], 1, [9, 11], [3, 3], 1, 2);
    dilated.params.dilations = [1, 1, 2];
    check(&dilated);
    dilated.params.dilations = [1, 2, 2];
    check(&dilated);
}

#[test]
fn few_outputs() {
    // Channels that fill vectors of different lengths and that do not, columns that fill tiles and that do not, sides.
    for outputs in [1, 2, 3, 4] {
        check(&case([32, outputs, 1], 2, [5, 11], [1, 1], 1, 0));
        check(&case([16, outputs, 1], 1, [9, 21], [3, 3], 1, 1));
        check(&case([24, outputs, 1], 2, [7, 23], [3, 5], 1, 2));
        check(&case([19, outputs, 1], 1, [8, 17], [3, 3], 2, 1));
        check(&case([4, outputs, 1], 1, [2, 2], [5, 5], 1, 2));
        let mut c = case([20, outputs, 1], 1, [9, 30], [3, 3], 1, 0);
        c.params.dilations = [1, 2, 3];
        c.input.pads_begin = [0, 3, 2];
        c.input.pads_end = [0, 1, 5];
        check(&c);
        c.params.kernel = [2, 3, 3];
        c.input.spatial = [3, 6, 14];
        check(&c);
    }
}

#[test]
fn taps_in_the_padding_are_left_out() {
    // Kernel, stride, dilation, pads before and after, what is left of the kernel and from where; height 7, width 9.
    for (kernel, stride, dilation, begin, end, left, first) in [
        ([3, 3], 1, [9, 9], [9, 9], [9, 9], [1, 1], [1, 1]),
        ([3, 3], 1, [7, 8], [7, 8], [7, 8], [1, 3], [1, 0]),
        ([3, 3], 2, [9, 9], [8, 9], [9, 9], [2, 1], [0, 1]),
        ([5, 4], 1, [3, 5], [6, 0], [6, 15], [5, 2], [0, 0]),
        ([3, 3], 1, [1, 1], [1, 1], [1, 1], [3, 3], [0, 0]),
        ([1, 2], 3, [1, 9], [0, 9], [0, 0], [1, 1], [0, 1]),
    ] {
        let mut c = case([5, 6, 1], 2, [7, 9], kernel, stride, 0);
        c.params.dilations = [1, dilation[0], dilation[1]];
        c.input.pads_begin = [0, begin[0], begin[1]];
        c.input.pads_end = [0, end[0], end[1]];
        let (params, input, from) = c.params.trimmed(&c.input).unwrap();
        assert_eq!(
            (params.kernel, from),
            ([1, left[0], left[1]], [0, first[0], first[1]]),
            "{:?} {:?}",
            c.params,
            c.input
        );
        let out = c.params.output_spatial(&c.input).unwrap();
        assert_eq!(params.output_spatial(&input).unwrap(), out);
        let w = integers(30 * kernel[0] * kernel[1], 1);
        let (x, bias) = (integers(2 * 63 * 5, 2), [0.5; 6]);
        let part = part_of_kernels(&w, c.params.kernel, from, params.kernel);
        let want = reference(&c.params, &c.input, out, &x, &w, &bias);
        assert_eq!(reference(&params, &input, out, &x, &part, &bias), want);
    }
}
