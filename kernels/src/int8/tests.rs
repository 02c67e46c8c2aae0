use super::*;
use crate::testing::each_context;

#[test]
fn a_product_by_hand() {
    each_context(|cx| {
        for form in Form::available(cx.isa()) {
            let b = QMatrix::new(Bytes::I8(&[5, -6, 7, 8]), 2, 2);
            let packed = PackedQ::new(cx.isa(), form, b, &[1, 2]).unwrap();
            let a = QMatrix::new(Bytes::U8(&[1, 2, 3, 255]), 2, 2);
            // [[0, 1], [2, 254]] x [[4, -8], [6, 6]] + [100, -100]
            let mut sums = [0; 4];
            qgemm(cx, a, 1, &packed, Some(&[100, -100]), Output::Sums(&mut sums)).unwrap();
            assert_eq!(sums, [106, -94, 1632, 1408]);
            let mut y = [0u8; 4];
            let other = [10, 20, 30, 40];
            let add = Addend {
                other: Bytes::U8(&other),
                other_zero: 10,
                first: 1.0,
                second: 0.25,
                offset: 0.0,
                zero: 3,
                lo: 0,
                hi: 255,
            };
            // q = [53, -47, 816, 704] and 7, clamped to -128..=127.
            let requantize = Requantize { multiplier: &[0.5], zero: 7, lo: -128, hi: 127, add: Some(add) };
            qgemm(cx, a, 1, &packed, Some(&[100, -100]), Output::Quantized { requantize, y: BytesMut::U8(&mut y) })
                .unwrap();
            // [53, -47, 120, 120] + [0, 2.5, 5, 7.5] + 3, halves to even.
            assert_eq!(y, [56, 0, 128, 131]);
        }
    });
}

/// Pseudo-random bits (a linear congruential generator).
struct Random(u32);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Bytes of either kind; a quarter of the time the extremes alone, another one those near the middle alone.
    fn bytes(&mut self, len: usize) -> Owned {
        let (range, signed) = (self.below(4), self.below(2) == 0);
        let middle = if signed { 0 } else { 128 };
        let byte = |r: &mut Self| match range {
            0 => r.pick(&[0, 255, 127, 128]),
            1 => (r.next() as u8 % 61).wrapping_add(middle).wrapping_sub(30),
            _ => r.next() as u8,
        };
        Owned { bytes: (0..len).map(|_| byte(self)).collect(), signed }
    }

    fn reals(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| (self.next() as f32 / (1 << 23) as f32 - 1.0) * scale).collect()
    }

    fn integers(&mut self, len: usize) -> Vec<i32> {
        (0..len).map(|_| self.next() as i32 % 20_000 - 10_000).collect()
    }
}

struct Owned {
    bytes: Vec<u8>,
    signed: bool,
}

impl Owned {
    fn get(&self) -> Bytes<'_> {
        if self.signed { Bytes::I8(bytemuck::cast_slice(&self.bytes)) } else { Bytes::U8(&self.bytes) }
    }

    fn get_mut(&mut self) -> BytesMut<'_> {
        if self.signed {
            BytesMut::I8(bytemuck::cast_slice_mut(&mut self.bytes))
        } else {
            BytesMut::U8(&mut self.bytes)
        }
    }

    /// A zero point, often an extreme one.
    fn zero(&self, r: &mut Random) -> i32 {
        let zero = r.pick(&[0, 0, 255, 127, 128, 1, 77]);
        if self.signed { i32::from(zero as u8 as i8) } else { zero }
    }
}

/// Every kind of output from the same sums, compared with the oracle's.
fn compare(what: &str, r: &mut Random, sums: &[i32], n: usize, mut run: impl FnMut(Output<'_>) -> Result<()>) {
    let mut got = vec![7; sums.len()];
    run(Output::Sums(&mut got)).unwrap();
    assert_eq!(got, sums, "{what}: sums");

    let per_column = r.pick(&[1, n]);
    let largest = sums.iter().map(|x| x.unsigned_abs()).max().unwrap_or(0).max(1) as f32;
    let scale = r.reals(per_column, 300.0 / largest);
    let (bias, residual) = (r.reals(n, 20.0), r.reals(sums.len(), 20.0));
    let activation = r.pick(&[Activation::Identity, Activation::Relu, Activation::Clip { lo: -3.0, hi: 6.0 }]);
    let (with_bias, with_residual) = (r.below(2) == 0, r.below(2) == 0);
    fn real<'a>(
        scale: &'a [f32],
        bias: Option<&'a [f32]>,
        residual: Option<&'a [f32]>,
        activation: Activation,
        y: &'a mut [f32],
    ) -> Output<'a> {
        Output::Real { scale, bias, residual, activation, y }
    }
    let (bias, residual) = (with_bias.then_some(&bias[..]), with_residual.then_some(&residual[..]));
    let (mut want, mut got) = (vec![0.0; sums.len()], vec![7.0; sums.len()]);
    crate::reference::int8::finish(sums, n, real(&scale, bias, residual, activation, &mut want));
    run(real(&scale, bias, residual, activation, &mut got)).unwrap();
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&want), "{what}: {activation:?}");

    for _ in 0..2 {
        let width = r.pick(&[100.0, 300.0, 1e25]) / largest;
        let scale = r.reals(per_column, width);
        // Sums that are halves after scaling.
        let scale = if r.below(3) == 0 { vec![0.5; per_column] } else { scale };
        let mut want = r.bytes(sums.len());
        let mut got = Owned { bytes: vec![7; sums.len()], signed: want.signed };
        let full = if want.signed { [-128, 127] } else { [0, 255] };
        let other = r.bytes(sums.len());
        let [lo, hi] = if r.below(2) == 0 { full } else { [full[0] + 10, full[1] - 100] };
        let add = (r.below(2) == 0).then(|| Addend {
            other: other.get(),
            other_zero: other.zero(r),
            first: r.pick(&[1.0, 0.37]),
            second: r.pick(&[0.5, 1.9]),
            offset: r.pick(&[0.0, 3.5]),
            zero: want.zero(r),
            lo,
            hi,
        });
        let zero = want.zero(r);
        let requantize = match add {
            Some(_) => Requantize { multiplier: &scale, zero, lo: -128, hi: 127, add },
            None => Requantize { multiplier: &scale, zero, lo, hi, add },
        };
        crate::reference::int8::finish(sums, n, Output::Quantized { requantize, y: want.get_mut() });
        run(Output::Quantized { requantize, y: got.get_mut() }).unwrap();
        assert_eq!(got.bytes, want.bytes, "{what}: {requantize:?}");
    }
}

#[test]
fn products_match_the_oracle() {
    let mut r = Random(1);
    each_context(|cx| {
        let isa = cx.isa();
        for form in Form::ALL {
            let (mr, nr, lanes) = (table::tile(isa, form).mr, table::panel_width(isa, form), isa.lanes());
            let kc = table::tile(isa, form).kc * form.group();
            let ms = [1, 2, mr - 1, mr, mr + 1, 2 * mr + 1, 0, 5 * mr + 2];
            let ns = [1, lanes, lanes + 1, nr - 1, nr, 3 * nr, nr + 1, 2 * nr + lanes, 3 * nr + 5, 0, 150];
            let ks = [1, 2, 3, 4, 5, 7, 8, 31, 64, kc - 1, kc, kc + 1, 2 * kc + 3, 0];
            for case in 0..60 {
                let (m, n, k) = match ks.get(case) {
                    Some(&k) => (mr + 1, nr + 1, k),
                    None if case == ks.len() => (4 * mr + 3, 3 * nr + 1, 40),
                    // Wide enough to interleave rows, where tiles read those; one pass and several.
                    None if case == ks.len() + 1 => (3 * mr - 1, 150, 70),
                    None if case == ks.len() + 2 => (2 * mr, 131, 2 * kc + 3),
                    None => (r.pick(&ms), r.pick(&ns), r.pick(&ks[..9])),
                };
                let (a, b) = (r.bytes(m * k), r.bytes(2 * k * n));
                // A transposed view of the other way round is the same matrix in another order.
                let (mut ma, mut mb) = (QMatrix::new(a.get(), m, k), QMatrix::new(b.get(), k, n));
                if r.below(3) == 0 {
                    ma = QMatrix::new(a.get(), k, m).transposed();
                }
                match r.below(4) {
                    0 => mb = QMatrix { row_stride: 2 * n, col_stride: 2, ..mb },
                    1 | 2 => mb = QMatrix::new(b.get(), n, k).transposed(),
                    _ => {}
                }
                let a_zero = a.zero(&mut r);
                let b_zero: Vec<i32> = (0..r.pick(&[1, n.max(1)])).map(|_| b.zero(&mut r)).collect();
                if b_zero.len() != 1 && b_zero.len() != n {
                    continue;
                }
                let bias = r.integers(n);
                let bias = (r.below(2) == 0).then_some(&bias[..]);
                let sums = crate::reference::int8::matmul(ma, a_zero, mb, &b_zero, bias);
                let packed = PackedQ::pack(isa, form, mb, &b_zero).unwrap();
                let what = format!("{isa} {form} {m} x {k} x {n}, zeros {a_zero} and {b_zero:?}");
                compare(&what, &mut r, &sums, n, |output| qgemm(cx, ma, a_zero, &packed, bias, output));
            }
        }
    });
}

#[test]
fn sums_wrap_and_tasks_do_not_change_them() {
    // Large enough for many tasks and passes.
    let (m, n, k) = (70, 290, 2100);
    let (a, b) = (vec![255u8; m * k], vec![-128i8; k * n]);
    each_context(|cx| {
        for form in Form::ALL {
            let b = QMatrix::new(Bytes::I8(&b), k, n);
            let packed = PackedQ::pack(cx.isa(), form, b, &[0]).unwrap();
            let bias = vec![i32::MIN; n];
            let mut y = vec![0; m * n];
            qgemm(cx, QMatrix::new(Bytes::U8(&a), m, k), 0, &packed, Some(&bias), Output::Sums(&mut y)).unwrap();
            let want = i32::MIN.wrapping_sub(255 * 128 * k as i32);
            assert!(y.iter().all(|&y| y == want), "{} {form}", cx.isa());
        }
    });
}

/// Those that can compute a convolution.
fn algorithms(isa: Isa, form: Form, params: &ConvParams) -> Vec<Algorithm> {
    let all = [Algorithm::Direct, Algorithm::Winograd(TileSize::Two), Algorithm::Winograd(TileSize::Four)];
    all[..if QWinograd::supports(isa, form, params) { 3 } else { 1 }].to_vec()
}

fn conv(
    in_channels: usize,
    out_channels: usize,
    groups: usize,
    kernel: [usize; 3],
    strides: [usize; 3],
    dilations: [usize; 3],
) -> ConvParams {
    ConvParams { in_channels, out_channels, groups, kernel, strides, dilations }
}

fn three_by_three(in_channels: usize, out_channels: usize) -> ConvParams {
    conv(in_channels, out_channels, 1, [1, 3, 3], [1; 3], [1; 3])
}

/// A convolution of 3 x 3 whose operands all are as large as they can be, and where tiles of 4 x 4 would overflow.
#[test]
fn the_largest_sums_fit_the_tiles_that_are_taken() {
    each_context(|cx| {
        let isa = cx.isa();
        // 9 * 255 * 255 * 64 times 57 is just below 2^31.
        for (channels, size) in [(57, TileSize::Four), (58, TileSize::Two)] {
            let params = three_by_three(channels, 32);
            let input = ConvInput { batch: 1, spatial: [1, 6, 6], pads_begin: [0; 3], pads_end: [0; 3] };
            let x = vec![255; channels * 36];
            for (weights, zero, sign) in [(vec![255; 32 * channels * 9], 0, 1), (vec![0; 32 * channels * 9], 255, -1)] {
                let algorithm = Algorithm::Winograd(TileSize::Four);
                let conv =
                    QConv::new(isa, Form::Wide, params.clone(), algorithm, Bytes::U8(&weights), &[zero]).unwrap();
                assert_eq!(conv.algorithm(), Algorithm::Winograd(size));
                let mut sums = vec![0; 16 * 32];
                conv.run(cx, &input, Bytes::U8(&x), 0, None, Output::Sums(&mut sums)).unwrap();
                let want = sign * 255 * 255 * 9 * channels as i32;
                assert!(sums.iter().all(|&sum| sum == want), "{isa} {channels}: {want} {sums:?}");
            }
        }
        let params = three_by_three(2, 32);
        let algorithm = Algorithm::Winograd(TileSize::Two);
        let refused = QConv::new(isa, Form::Wide, params, algorithm, Bytes::U8(&[0; 2 * 32 * 9]), &[0]);
        assert!(refused.is_err(), "too few channels");
    });
}

/// Enough weights that the three steps run one after the other, for all tiles.
#[test]
fn weights_beyond_the_cache_give_the_same_sums() {
    let params = three_by_three(96, 160);
    let input = ConvInput { batch: 2, spatial: [1, 5, 9], pads_begin: [0, 1, 1], pads_end: [0, 1, 1] };
    let mut r = Random(9);
    let (x, w) = (r.bytes(2 * 5 * 9 * 96), r.bytes(160 * 96 * 9));
    let centred: Vec<i32> = (0..w.bytes.len()).map(|i| w.get().get(i)).collect();
    let sums = crate::reference::int8::conv(&params, &input, [1, 5, 9], x.get(), 3, &centred, None).unwrap();
    each_context(|cx| {
        let isa = cx.isa();
        for algorithm in algorithms(isa, Form::Wide, &params) {
            let conv = QConv::new(isa, Form::Wide, params.clone(), algorithm, w.get(), &[0]).unwrap();
            let mut got = vec![0; sums.len()];
            conv.run(cx, &input, x.get(), 3, None, Output::Sums(&mut got)).unwrap();
            assert!(got == sums, "{isa} {algorithm:?}");
        }
    });
}

/// Convolutions whose taps are interleaved where they lie, where tiles and forms read such.
#[test]
fn taps_that_are_read_in_place_give_the_same_sums() {
    let mut r = Random(5);
    let one = [1; 3];
    let cases = [
        (conv(16, 128, 1, [1, 3, 3], one, one), [1, 7, 9], [0, 1, 1]),
        (conv(20, 131, 1, [1, 3, 3], [1, 2, 2], one), [1, 9, 8], [0, 1, 1]),
        (conv(40, 256, 2, [1, 3, 2], one, [1, 2, 3]), [1, 8, 9], [0, 2, 3]),
        (conv(16, 130, 1, [2, 3, 3], [2, 1, 1], one), [4, 5, 6], [1, 1, 1]),
        (conv(16, 128, 1, [1, 5, 5], one, one), [1, 2, 3], [0, 4, 4]),
        // Windows that no tap of the image is in.
        (conv(16, 128, 1, [1, 1, 2], one, one), [1, 1, 2], [0, 0, 7]),
    ];
    each_context(|cx| {
        for form in Form::ALL {
            for (params, spatial, pads) in &cases {
                let input = ConvInput { batch: 2, spatial: *spatial, pads_begin: *pads, pads_end: *pads };
                let out = params.output_spatial(&input).unwrap();
                let taps: usize = params.kernel.iter().product();
                let pixels: usize = spatial.iter().product();
                let mut bytes =
                    |len: usize, signed| Owned { bytes: (0..len).map(|_| r.next() as u8).collect(), signed };
                for signed in [false, true] {
                    let x = bytes(2 * pixels * params.in_channels, signed);
                    let w = bytes(params.out_channels * (params.in_channels / params.groups) * taps, true);
                    let centred: Vec<i32> = (0..w.bytes.len()).map(|i| w.get().get(i)).collect();
                    let sums = crate::reference::int8::conv(params, &input, out, x.get(), 77, &centred, None).unwrap();
                    let direct = Algorithm::Direct;
                    let conv =
                        QConv::pack(cx.isa(), form, params.clone(), direct, w.get(), &[0], PackedQ::pack).unwrap();
                    let mut got = vec![0; sums.len()];
                    conv.run(cx, &input, x.get(), 77, None, Output::Sums(&mut got)).unwrap();
                    assert!(got == sums, "{} {form} {params:?} {input:?}, signed: {signed}", cx.isa());
                }
            }
        }
    });
}

#[test]
fn convolutions_match_the_oracle() {
    let mut r = Random(2);
    let one = [1; 3];
    let cases = [
        (conv(3, 8, 1, [1, 3, 3], [1, 2, 2], one), [1, 9, 11], [0, 1, 1]),
        (conv(16, 5, 1, one, one, one), [1, 6, 7], [0; 3]),
        (conv(7, 9, 1, one, [1, 2, 2], one), [1, 7, 6], [0; 3]),
        (conv(8, 12, 2, [1, 3, 3], one, one), [1, 5, 6], [0, 1, 1]),
        (conv(4, 6, 2, one, one, one), [1, 5, 5], [0; 3]),
        (conv(5, 4, 1, [1, 3, 2], one, [1, 2, 3]), [1, 9, 9], [0, 2, 1]),
        (conv(2, 3, 1, [2, 3, 2], [2, 1, 1], one), [4, 5, 6], [1, 1, 1]),
        (conv(6, 12, 6, [1, 3, 3], one, one), [1, 5, 5], [0, 1, 1]),
        (conv(33, 33, 33, [1, 3, 3], one, one), [1, 7, 9], [0, 1, 1]),
        (conv(32, 32, 32, [1, 3, 3], [1, 2, 2], one), [1, 8, 8], [0, 1, 1]),
        (conv(5, 5, 5, [1, 5, 5], one, one), [1, 7, 7], [0, 2, 2]),
        (conv(72, 72, 72, [1, 5, 5], [1, 2, 2], one), [1, 9, 10], [0, 2, 2]),
        (conv(16, 16, 16, [2, 1, 4], one, [1, 1, 2]), [3, 4, 9], [1, 0, 2]),
        (conv(8, 8, 8, [1, 1, 1], one, one), [1, 4, 4], [0; 3]),
        // Groups of a few channels, and depthwise convolutions of fewer than two vectors.
        (conv(1, 1, 1, [1, 3, 3], one, one), [1, 6, 7], [0, 1, 1]),
        (conv(1, 8, 1, [1, 5, 5], one, one), [1, 7, 9], [0, 2, 2]),
        (conv(2, 2, 2, [1, 7, 7], [1, 2, 2], one), [1, 9, 10], [0, 3, 3]),
        (conv(3, 3, 3, [1, 3, 3], [1, 2, 2], one), [1, 8, 9], [0, 1, 1]),
        (conv(4, 4, 4, [1, 1, 1], one, one), [1, 3, 5], [0; 3]),
        (conv(8, 4, 4, [1, 3, 3], one, one), [1, 5, 6], [0, 1, 1]),
        (conv(6, 3, 3, [1, 3, 3], one, [1, 2, 2]), [1, 7, 8], [0, 2, 2]),
        (conv(12, 12, 3, [1, 5, 5], one, one), [1, 6, 8], [0, 2, 2]),
        (conv(40, 80, 40, [1, 3, 3], one, one), [1, 5, 9], [0, 1, 1]),
        (conv(66, 33, 33, [1, 3, 3], [1, 2, 2], one), [1, 7, 8], [0, 1, 1]),
        (conv(14, 16, 2, [1, 3, 3], one, one), [1, 5, 7], [0, 1, 1]),
        (conv(24, 21, 3, [1, 3, 3], one, one), [1, 4, 7], [0, 1, 1]),
        (conv(3, 3, 3, [1, 3, 3], one, one), [1, 4, 0], [0, 1, 2]),
        // Groups that are products.
        (conv(18, 26, 2, [1, 3, 3], one, one), [1, 5, 6], [0, 1, 1]),
        (conv(20, 24, 2, one, one, one), [1, 5, 5], [0; 3]),
        (conv(64, 32, 2, [1, 3, 3], [1, 2, 2], one), [1, 5, 6], [0, 1, 1]),
        (conv(20, 10, 5, [2, 3, 2], [2, 1, 1], [1, 1, 2]), [4, 5, 7], [1, 1, 1]),
        (conv(64, 64, 16, one, [1, 2, 2], one), [1, 5, 6], [0; 3]),
        // Channels that fill shorter vectors than the instruction set has.
        (conv(8, 8, 8, [1, 3, 3], one, one), [1, 5, 6], [0, 1, 1]),
        (conv(13, 13, 13, [1, 5, 5], [1, 2, 2], one), [1, 8, 9], [0, 2, 2]),
        (conv(16, 16, 16, [1, 3, 3], [1, 2, 2], one), [1, 7, 6], [0, 1, 1]),
        (conv(27, 27, 27, [1, 3, 3], one, one), [1, 6, 6], [0, 1, 1]),
        (conv(1, 4, 1, [1, 1, 7], one, one), [1, 1, 3], [0, 0, 6]),
        // Rows of more columns than are joined at once, strides over more; wide kernels, and one without a reach.
        (conv(16, 16, 16, [1, 3, 3], [1, 1, 2], one), [1, 3, 300], [0, 1, 1]),
        (conv(24, 24, 24, [1, 3, 5], one, one), [1, 2, 140], [0, 1, 2]),
        (conv(16, 16, 16, [1, 1, 3], [1, 1, 200], one), [1, 1, 500], [0, 0, 1]),
        (conv(20, 20, 20, [1, 1, 31], one, one), [1, 1, 40], [0, 0, 15]),
        (conv(9, 9, 9, [1, 9, 9], one, one), [1, 10, 10], [0, 4, 4]),
        (conv(16, 16, 16, [1, 2, 1], one, [1, 1, usize::MAX]), [1, 5, 4], [0, 1, 0]),
        (conv(6, 6, 6, [1, 1, 3], one, [1, 1, 64]), [1, 1, 140], [0, 0, 64]),
        // Also by Winograd's algorithm.
        (conv(16, 17, 1, [1, 3, 3], one, one), [2, 5, 11], [0, 1, 1]),
        (conv(35, 32, 1, [1, 3, 3], one, one), [1, 8, 9], [0, 1, 1]),
        (conv(33, 70, 1, [1, 3, 3], one, one), [1, 4, 3], [0, 2, 0]),
        (conv(70, 90, 1, [1, 3, 3], one, one), [2, 6, 7], [1, 1, 1]),
    ];
    each_context(|cx| {
        for form in Form::ALL {
            for (params, spatial, pads) in &cases {
                let input = ConvInput {
                    batch: r.pick(&[1, 2]),
                    spatial: *spatial,
                    pads_begin: *pads,
                    pads_end: pads.map(|p| p + r.below(2) * usize::from(p > 0)),
                };
                let out = params.output_spatial(&input).unwrap();
                let pixels: usize = spatial.iter().product();
                let x = r.bytes(input.batch * pixels * params.in_channels);
                let taps: usize = params.kernel.iter().product();
                let per_output = params.in_channels / params.groups * taps;
                let w = r.bytes(params.out_channels * per_output);
                let x_zero = x.zero(&mut r);
                let w_zero: Vec<i32> = (0..r.pick(&[1, params.out_channels])).map(|_| w.zero(&mut r)).collect();
                let centred: Vec<i32> = (0..w.bytes.len())
                    .map(|i| w.get().get(i) - w_zero[if w_zero.len() == 1 { 0 } else { i / per_output }])
                    .collect();
                let bias = r.integers(params.out_channels);
                let bias = (r.below(2) == 0).then_some(&bias[..]);
                let sums = crate::reference::int8::conv(params, &input, out, x.get(), x_zero, &centred, bias).unwrap();
                for algorithm in algorithms(cx.isa(), form, params) {
                    let conv = QConv::pack(cx.isa(), form, params.clone(), algorithm, w.get(), &w_zero, PackedQ::pack)
                        .unwrap();
                    assert_eq!(conv.algorithm(), algorithm);
                    let what = format!("{} {form} {algorithm:?} {params:?} {input:?}", cx.isa());
                    compare(&what, &mut r, &sums, params.out_channels, |output| {
                        conv.run(cx, &input, x.get(), x_zero, bias, output)
                    });
                }
            }
        }
    });
}

#[test]
fn tables_sums_and_products_match_their_formulas() {
    let mut r = Random(3);
    each_context(|cx| {
        for len in [0, 1, 3, 8, 15, 33, 64, 40_000] {
            let table: [u8; 256] = core::array::from_fn(|i| (i * 37 + 11) as u8);
            let x = r.bytes(len);
            let mut y = vec![0; len];
            lookup(cx, &x.bytes, &table, &mut y).unwrap();
            assert!(y.iter().zip(&x.bytes).all(|(&y, &x)| y == table[usize::from(x)]));
            let mut z = x.bytes.clone();
            lookup_in_place(cx, &table, &mut z);
            assert_eq!(z, y);
            for _ in 0..6 {
                let lengths = [len.max(1), 1, if len % 8 == 0 && len > 0 { len / 8 } else { 1 }];
                let (la, lb) = (r.pick(&lengths), r.pick(&lengths));
                let (a, b) = (r.bytes(la), r.bytes(lb));
                let function = if r.below(2) == 0 {
                    Function::Add { first: 0.75, second: r.pick(&[0.5, 1.31]) }
                } else {
                    Function::Mul { scale: r.pick(&[0.5, 0.013]) }
                };
                let mut y = Owned { bytes: vec![7; len], signed: r.below(2) == 0 };
                let [lo, hi] = if y.signed { [-128, 100] } else { [3, 255] };
                let (zeros, offset) = ([a.zero(&mut r), b.zero(&mut r)], r.pick(&[0.0, 7.0]));
                let f = Binary { function, zeros, offset, zero: y.zero(&mut r), lo, hi };
                binary(cx, &f, a.get(), b.get(), y.get_mut()).unwrap();
                for i in 0..len {
                    let (x, z) = (a.get().get(i % la) - f.zeros[0], b.get().get(i % lb) - f.zeros[1]);
                    let real = match function {
                        Function::Add { first, second } => x as f32 * first + z as f32 * second,
                        Function::Mul { scale } => (x * z) as f32 * scale,
                    };
                    let want = ((real + offset).round_ties_even() as i32 + f.zero).clamp(lo, hi);
                    assert_eq!(y.get().get(i), want, "{} {f:?} {i}", cx.isa());
                }
            }
        }
        let f =
            Binary { function: Function::Mul { scale: f32::NAN }, zeros: [0; 2], offset: 0.0, zero: 0, lo: 0, hi: 1 };
        assert!(binary(cx, &f, Bytes::U8(&[1]), Bytes::U8(&[1]), BytesMut::U8(&mut [0])).is_err());
        let f = Binary { function: Function::Mul { scale: 1.0 }, ..f };
        assert!(binary(cx, &f, Bytes::U8(&[1, 2]), Bytes::U8(&[1]), BytesMut::U8(&mut [0; 3])).is_err());
    });
}

#[test]
fn pools_match_their_formulas() {
    use crate::pool::PoolShape;
    let mut r = Random(4);
    each_context(|cx| {
        for (channels, kernel, stride, pad) in [(1, 2, 2, 0), (7, 3, 1, 1), (33, 3, 2, 1), (16, 5, 5, 0)] {
            for include_pad in [false, true] {
                let (h, w) = (5, 7);
                let out = [h, w].map(|d| (d + 2 * pad - kernel) / stride + 1);
                let shape = PoolShape {
                    batch: 2,
                    channels,
                    input: [1, h, w],
                    output: [1, out[0], out[1]],
                    kernel: [1, kernel, kernel],
                    strides: [1, stride, stride],
                    dilations: [1; 3],
                    begin: [0, pad, pad],
                    end: [0, pad, pad],
                };
                let x = r.bytes(2 * h * w * channels);
                let mut y = Owned { bytes: vec![7; 2 * out[0] * out[1] * channels], signed: r.below(2) == 0 };
                let [lo, hi] = if y.signed { [-128, 127] } else { [0, 255] };
                let (x_zero, zero) = (x.zero(&mut r), y.zero(&mut r));
                let f = Mean { x_zero, multiplier: 0.77, zero, lo, hi, include_pad };
                mean(cx, &f, &shape, x.get(), y.get_mut()).unwrap();
                let mut largest = Owned { bytes: y.bytes.clone(), signed: x.signed };
                max_pool(cx, &shape, x.get(), largest.get_mut()).unwrap();
                for i in 0..y.bytes.len() {
                    let (c, pixel) = (i % channels, i / channels);
                    let (b, oy, ox) = (pixel / out[1] / out[0], pixel / out[1] % out[0], pixel % out[1]);
                    let (mut sum, mut count, mut most) = (0, 0, i32::MIN);
                    for (ky, kx) in (0..kernel * kernel).map(|k| (k / kernel, k % kernel)) {
                        let (iy, ix) = ((oy * stride + ky).wrapping_sub(pad), (ox * stride + kx).wrapping_sub(pad));
                        if iy < h && ix < w {
                            let v = x.get().get(((b * h + iy) * w + ix) * channels + c);
                            sum += v - x_zero;
                            most = most.max(v);
                            count += 1;
                        }
                    }
                    let count = if include_pad { kernel * kernel } else { count };
                    let want = ((sum as f32 * (0.77 / count as f32)).round_ties_even() as i32 + zero).clamp(lo, hi);
                    assert_eq!(y.get().get(i), want, "{} {shape:?} {i}", cx.isa());
                    assert_eq!(largest.get().get(i), most);
                }
            }
        }
    });
}

#[test]
fn the_digest_is_the_same_everywhere() {
    each_context(|cx| {
        for form in Form::ALL {
            assert_eq!(super::digest::cases(cx, form).unwrap(), DIGEST, "{} {form}", cx.isa());
        }
    });
}

#[test]
fn wrong_operands_are_refused() {
    each_context(|cx| {
        let isa = cx.isa();
        let b = QMatrix::new(Bytes::I8(&[1, 2, 3, 4]), 2, 2);
        assert!(PackedQ::new(isa, Form::Wide, b, &[200]).is_err(), "a zero point of the other kind");
        assert!(PackedQ::new(isa, Form::Wide, b, &[0; 3]).is_err(), "too many zero points");
        assert!(PackedQ::new(isa, Form::Wide, QMatrix { rows: 3, ..b }, &[0]).is_err(), "too little data");
        for form in Form::ALL {
            assert_eq!(PackedQ::new(isa, form, b, &[0]).is_ok(), Form::available(isa).contains(&form));
        }
        let b = PackedQ::new(isa, Form::Wide, b, &[0]).unwrap();
        let a = QMatrix::new(Bytes::U8(&[1, 2]), 1, 2);
        let run = |multiplier: &[f32], zero, lo, hi, len: usize| {
            let mut y = vec![0u8; len];
            let requantize = Requantize { multiplier, zero, lo, hi, add: None };
            qgemm(cx, a, 0, &b, None, Output::Quantized { requantize, y: BytesMut::U8(&mut y) })
        };
        assert!(run(&[1.0], 0, 0, 255, 2).is_ok());
        assert!(run(&[1.0, 1.0], 0, 0, 255, 2).is_ok());
        assert!(run(&[1.0; 3], 0, 0, 255, 2).is_err());
        assert!(run(&[f32::NAN], 0, 0, 255, 2).is_err());
        assert!(run(&[f32::INFINITY], 0, 0, 255, 2).is_err());
        assert!(run(&[1.0], 0, -1, 255, 2).is_err());
        assert!(run(&[1.0], 0, 9, 8, 2).is_err());
        assert!(run(&[1.0], 256, 0, 255, 2).is_err());
        assert!(run(&[1.0], 0, 0, 255, 3).is_err());
        let mut sums = [0; 2];
        assert!(qgemm(cx, a, -1, &b, None, Output::Sums(&mut sums)).is_err(), "a zero point of the other kind");
        assert!(qgemm(cx, a.transposed(), 0, &b, None, Output::Sums(&mut sums)).is_err());
        assert!(qgemm(cx, a, 0, &b, Some(&[1]), Output::Sums(&mut sums)).is_err());
    });
}
