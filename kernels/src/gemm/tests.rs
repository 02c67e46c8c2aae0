use super::*;
use crate::par::Pool;
use crate::reference;
use crate::testing::{each_context, integers};
use ndarray::ArrayView2;

/// Small integers: every sum is exact in f32, so that results can be compared bit by bit.
fn check(m: usize, n: usize, k: usize) {
    let (a, b) = (integers(m * k, 1), integers(k * n, 2));
    let (bias, residual) = (integers(n, 3), integers(m * (n + 3), 4));
    let sums =
        reference::gemm::gemm(ArrayView2::from_shape((m, k), &a).unwrap(), ArrayView2::from_shape((k, n), &b).unwrap());
    let transposed = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
    };
    let (a_t, b_t) = (transposed(&a, m, k), transposed(&b, k, n));
    let activations = [Activation::Identity, Activation::Relu, Activation::Clip { lo: -2.0, hi: 3.0 }];
    each_context(|cx| {
        let packed = [
            PackedB::new(cx.isa(), Matrix::new(&b, k, n)).unwrap(),
            PackedB::new(cx.isa(), Matrix::new(&b_t, n, k).transposed()).unwrap(),
        ];
        assert_eq!(packed[0].data(), packed[1].data(), "{m} {n} {k} {:?}", cx.isa());
        let lhs = [Matrix::new(&a, m, k), Matrix::new(&a_t, k, m).transposed()];
        let rhs = [
            Rhs::Packed(&packed[0]),
            Rhs::Plain(Matrix::new(&b, k, n)),
            Rhs::Plain(Matrix::new(&b_t, n, k).transposed()),
        ];
        for (l, lhs) in lhs.into_iter().enumerate() {
            for (r, rhs) in rhs.into_iter().enumerate() {
                for (e, activation) in activations.into_iter().enumerate() {
                    let epilogue = Epilogue {
                        bias: (e != 1).then_some(&bias[..]),
                        residual: (e != 0).then_some(&residual[..]),
                        activation,
                    };
                    let ldc = n + 3;
                    let mut c = vec![-77.0; m * ldc];
                    gemm(cx, lhs, rhs, &epilogue, &mut c, ldc).unwrap();
                    for i in 0..m {
                        for j in 0..ldc {
                            let got = c[i * ldc + j];
                            let want = if j >= n {
                                -77.0
                            } else {
                                let x = sums[[i, j]] as f32
                                    + if e != 1 { bias[j] } else { 0.0 }
                                    + if e != 0 { residual[i * ldc + j] } else { 0.0 };
                                match activation {
                                    Activation::Relu => x.max(0.0),
                                    Activation::Clip { lo, hi } => x.max(lo).min(hi),
                                    _ => x,
                                }
                            };
                            assert_eq!(
                                got,
                                want,
                                "{:?} {m}x{n}x{k} at {i},{j}: lhs {l} rhs {r} epilogue {e}",
                                cx.isa()
                            );
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn boundary_shapes() {
    for m in [1, 2, 3, 4, 5, 7, 12, 13, 15] {
        for n in [1, 3, 4, 5, 8, 9, 17, 31, 32, 33] {
            check(m, n, 5);
        }
    }
    for k in [0, 1, 2, 3, 4, 7, 8, 255, 256, 257, 600] {
        check(1, 35, k);
        check(7, 20, k);
        check(13, 33, k);
    }
}

#[test]
fn many_blocks() {
    check(1, 1000, 128);
    check(1, 523, 300);
    check(49, 1000, 64);
    check(300, 130, 70);
    check(131, 48, 520);
    check(14, 131, 600);
}

#[test]
fn empty_is_nothing() {
    check(0, 5, 3);
    check(5, 0, 3);
}

#[test]
fn nan_and_infinity_propagate() {
    let (m, n, k) = (5, 9, 6);
    each_context(|cx| {
        let (mut a, mut b) = (vec![1.0; m * k], vec![1.0; k * n]);
        a[2 * k] = f32::NAN;
        b[3 * n + 4] = f32::INFINITY;
        b[4 * n + 4] = f32::NEG_INFINITY;
        b[3 * n + 5] = f32::INFINITY;
        for activation in [Activation::Identity, Activation::Relu, Activation::Clip { lo: 0.0, hi: 50.0 }] {
            for rows in [1, m] {
                let mut c = vec![0.0; m * n];
                let packed = PackedB::new(cx.isa(), Matrix::new(&b, k, n)).unwrap();
                let epilogue = Epilogue { activation, ..Epilogue::default() };
                gemm(cx, Matrix::new(&a, rows, k), Rhs::Packed(&packed), &epilogue, &mut c, n).unwrap();
                for i in 0..rows {
                    for j in 0..n {
                        let x = c[i * n + j];
                        let hi = if let Activation::Clip { hi, .. } = activation { hi } else { f32::INFINITY };
                        match (i, j) {
                            (2, _) | (_, 4) => assert!(x.is_nan(), "{:?} {i},{j}: {x}", cx.isa()),
                            (_, 5) => assert_eq!(x, hi),
                            _ => assert_eq!(x, 6.0),
                        }
                    }
                }
            }
        }
    });
}

/// Functions that are applied in a second sweep give what applying them to the finished product gives.
#[test]
fn costly_activations() {
    each_context(|cx| {
        for (m, n, k) in [(1, 37, 9), (15, 37, 300)] {
            let (a, b) = (integers(m * k, 1), integers(k * n, 2));
            for activation in [Activation::HardSwish, Activation::LeakyRelu { alpha: 0.1 }, Activation::Gelu] {
                let run = |activation| {
                    let mut c = vec![0.0; m * n];
                    let epilogue = Epilogue { activation, ..Epilogue::default() };
                    let b = Rhs::Plain(Matrix::new(&b, k, n));
                    gemm(cx, Matrix::new(&a, m, k), b, &epilogue, &mut c, n).unwrap();
                    c
                };
                let mut want = run(Activation::Identity);
                let (c, cols) = (want.as_mut_ptr(), want.len());
                dispatch(cx.isa(), Activate { activation, c, rows: 1, cols, ld: 0 });
                let got = run(activation);
                for (got, want) in got.iter().zip(&want) {
                    assert!((got - want).abs() <= 1e-6 * want.abs(), "{activation:?}: {got} {want}");
                }
            }
        }
    });
}

#[test]
fn batched() {
    // Attention: [b, t, h, d] queries and keys, [b, h, t, t] scores.
    let (b, t, h, d) = (2, 17, 3, 5);
    let (q, k) = (integers(b * t * h * d, 1), integers(b * t * h * d, 2));
    each_context(|cx| {
        let mut c = vec![0.0; b * h * t * t];
        let g = Batched {
            batch_dims: &[b, h],
            m: t,
            n: t,
            k: d,
            a: &q,
            a_batch_strides: &[t * h * d, d],
            a_strides: [h * d, 1],
            b: &k,
            b_batch_strides: &[t * h * d, d],
            b_strides: [1, h * d],
            c_batch_strides: &[h * t * t, t * t],
            ldc: t,
            bias: None,
            activation: Activation::Identity,
        };
        gemm_batched(cx, &g, &mut c).unwrap();
        for ib in 0..b {
            for ih in 0..h {
                for i in 0..t {
                    for j in 0..t {
                        let want: f32 = (0..d)
                            .map(|p| q[((ib * t + i) * h + ih) * d + p] * k[((ib * t + j) * h + ih) * d + p])
                            .sum();
                        assert_eq!(c[((ib * h + ih) * t + i) * t + j], want);
                    }
                }
            }
        }
        // One B for all, stacked and not, and k of zero.
        let shared = Batched { b_batch_strides: &[0, 0], ..g };
        let mut c2 = vec![0.0; b * h * t * t];
        gemm_batched(cx, &shared, &mut c2).unwrap();
        assert_eq!(c2[..t * t], c[..t * t]);
        let want: f32 = (0..d).map(|p| q[((t + 4) * h + 2) * d + p] * k[7 * h * d + p]).sum();
        assert_eq!(c2[((h + 2) * t + 4) * t + 7], want);
        let (m, n) = (3, 4);
        let a = integers(2 * m * d, 5);
        let stacked = Batched {
            batch_dims: &[2],
            m,
            n,
            a: &a,
            a_batch_strides: &[m * d],
            a_strides: [d, 1],
            b_batch_strides: &[0],
            b_strides: [n, 1],
            c_batch_strides: &[m * n],
            ldc: n,
            bias: Some(&[1.0, 2.0, 3.0, 4.0]),
            ..g
        };
        let mut c3 = vec![0.0; 2 * m * n];
        gemm_batched(cx, &stacked, &mut c3).unwrap();
        let want: f32 = (0..d).map(|p| a[(m + 1) * d + p] * k[p * n + 2]).sum::<f32>() + 3.0;
        assert_eq!(c3[(m + 1) * n + 2], want);
        gemm_batched(cx, &Batched { k: 0, ..stacked }, &mut c3).unwrap();
        assert_eq!(c3[..n], [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(c3[5 * n..], [1.0, 2.0, 3.0, 4.0]);
        let overlap = Batched { c_batch_strides: &[m * n - 1], ..stacked };
        assert!(gemm_batched(cx, &overlap, &mut c3).unwrap_err().to_string().contains("overlap"));
    });
}

/// Random floats against f64, and the same bits for any number of threads.
#[test]
fn rounding_and_threads() {
    for isa in Isa::available() {
        for (m, n, k) in [(1, 700, 900), (61, 210, 700), (200, 96, 96)] {
            let float = |len, seed| {
                integers(len, seed)
                    .iter()
                    .enumerate()
                    .map(|(i, x)| x * 0.37 + (i % 7) as f32 * 0.11)
                    .collect::<Vec<_>>()
            };
            let (a, b): (Vec<f32>, Vec<f32>) = (float(m * k, 8), float(k * n, 9));
            let want = reference::gemm::gemm(
                ArrayView2::from_shape((m, k), &a).unwrap(),
                ArrayView2::from_shape((k, n), &b).unwrap(),
            );
            let run = |cx: &Cx<'_>| {
                let packed = PackedB::new(isa, Matrix::new(&b, k, n)).unwrap();
                let mut c = vec![0.0; m * n];
                gemm(cx, Matrix::new(&a, m, k), Rhs::Packed(&packed), &Epilogue::default(), &mut c, n).unwrap();
                c
            };
            let results = [1, 2].map(|lanes| Pool::new(lanes).run(isa, run));
            assert!(results[0].iter().zip(&results[1]).all(|(x, y)| x.to_bits() == y.to_bits()));
            for (got, want) in results[0].iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() < 1e-6 * k as f64, "{isa:?} {got} {want}");
            }
        }
    }
}

#[test]
fn wrong_operands_are_refused() {
    Pool::new(1).run(Isa::best(), refuse);
}

fn refuse(cx: &Cx<'_>) {
    let x = [0.0; 12];
    let mut c = [0.0; 6];
    let error = gemm(cx, Matrix::new(&x, 2, 4), Rhs::Plain(Matrix::new(&x, 3, 3)), &Epilogue::default(), &mut c, 3);
    assert_eq!(error.unwrap_err().to_string(), "A is 2 x 4, but B is 3 x 3");
    let too_long = Matrix::new(&x, 5, 3);
    assert!(gemm(cx, too_long, Rhs::Plain(Matrix::new(&x, 3, 3)), &Epilogue::default(), &mut c, 3).is_err());
    let (a, b) = (Matrix::new(&x, 3, 3), Rhs::Plain(Matrix::new(&x, 3, 3)));
    assert!(gemm(cx, a, b, &Epilogue::default(), &mut c, 3).unwrap_err().to_string().contains("C has 6"));
    let huge = Matrix { row_stride: usize::MAX, ..Matrix::new(&x, 3, 3) };
    assert!(PackedB::new(cx.isa(), huge).is_err());
}
