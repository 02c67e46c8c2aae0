//! QuantizeLinear and DequantizeLinear of onnxruntime's domain: ONNX's own, which had no 16 and 4 bits for long.

use super::quantize::Linear;
use super::{Attributes, Op, Registration};
use crate::error::Result;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::microsoft("QuantizeLinear", |a| parse(a, false)),
    Registration::microsoft("DequantizeLinear", |a| parse(a, true)),
];

fn parse(a: &mut Attributes, back: bool) -> Result<Op> {
    Ok(Linear { back, axis: a.int_or("axis", 1)?, block: 0, output: None }.into())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn sixteen_bits_there_and_back() {
        let x = f32s(&[2, 2], &[0.0, 2.0, 3.0, -100_000.0]);
        let (scale, zero) = (f32s(&[2], &[2.0, 4.0]), Tensor::from_slice(&[2], &[-1000i16, 7]).unwrap());
        let node = |name| OneNode::new(name).domain("com.microsoft");
        let q = node("QuantizeLinear").run(&[x, scale.clone(), zero.clone()]).unwrap();
        assert_eq!(q[0].as_slice::<i16>().unwrap(), [-1000, 7, -998, -24993]);
        let y = node("DequantizeLinear").int("axis", 1).run(&[q[0].clone(), scale, zero]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [0.0, 0.0, 4.0, -100_000.0]);
    }
}
