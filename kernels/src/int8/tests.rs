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
            let add =
                Addend { other: Bytes::U8(&other), other_zero: 10, first: 1.0, second: 0.25, zero: 3, lo: 0, hi: 255 };
            // q = [53, -47, 816, 704] and 7, clamped to -128..=127.
            let requantize = Requantize { multiplier: &[0.5], zero: 7, lo: -128, hi: 127, add: Some(add) };
            qgemm(cx, a, 1, &packed, Some(&[100, -100]), Output::Quantized { requantize, y: BytesMut::U8(&mut y) })
                .unwrap();
            // [53, -47, 120, 120] + [0, 2.5, 5, 7.5] + 3, halves to even.
            assert_eq!(y, [56, 0, 128, 131]);
        }
    });
}
