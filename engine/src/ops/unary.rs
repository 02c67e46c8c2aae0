//! Pointwise functions of one tensor.

use super::identity::copy;
use super::sizes::kernel_error;
use super::{Attributes, Infer, Io, Operator, Permuted, Registration, wrong_dtype};
use crate::error::Result;
use crate::fact::{Content, Fact};
use crate::for_dtype;
use crate::tensor::DType;
use weblane_kernels::elementwise::{Unary, map, map_assign, unary, unary_assign};
use weblane_kernels::epilogue::Activation;
use weblane_kernels::par::Cx;

/// One row per operator: its name, the first opset, and the function, with its attributes.
macro_rules! table {
    ($($name:literal $since:literal $parse:expr;)*) => {
        /// The operators of this file.
        pub const OPERATORS: &[Registration] = &[
            $(Registration::onnx($name, $since, |a| {
                let parse: fn(&mut Attributes) -> Result<Unary> = $parse;
                Ok(Pointwise { name: $name, function: parse(a)? }.into())
            }),)*
            Registration::microsoft("Gelu", |_| Ok(Pointwise { name: "com.microsoft.Gelu", function: Unary::Gelu }.into())),
            Registration::microsoft("QuickGelu", |a| {
                let function = Unary::Swish { alpha: a.float_or("alpha", 1.702)? };
                Ok(Pointwise { name: "com.microsoft.QuickGelu", function }.into())
            }),
            Registration::onnx("Not", 1, |_| Ok(Bits { name: "Not" }.into())),
            Registration::onnx("BitwiseNot", 18, |_| Ok(Bits { name: "BitwiseNot" }.into())),
            Registration::onnx("IsNaN", 9, |_| Ok(Classify { name: "IsNaN", positive: false, negative: false }.into())),
            Registration::onnx("IsInf", 10, |a| {
                let (positive, negative) = (a.flag_or("detect_positive", true)?, a.flag_or("detect_negative", true)?);
                Ok(Classify { name: "IsInf", positive, negative }.into())
            }),
        ];
    };
}

table! {
    "Abs" 6 |_| Ok(Unary::Abs);
    "Neg" 6 |_| Ok(Unary::Neg);
    "Exp" 6 |_| Ok(Unary::Exp);
    "Log" 6 |_| Ok(Unary::Log);
    "Sqrt" 6 |_| Ok(Unary::Sqrt);
    "Reciprocal" 6 |_| Ok(Unary::Reciprocal);
    "Floor" 6 |_| Ok(Unary::Floor);
    "Ceil" 6 |_| Ok(Unary::Ceil);
    "Round" 11 |_| Ok(Unary::Round);
    "Sign" 9 |_| Ok(Unary::Sign);
    "Sin" 7 |_| Ok(Unary::Sin);
    "Cos" 7 |_| Ok(Unary::Cos);
    "Tan" 7 |_| Ok(Unary::Tan);
    "Asin" 7 |_| Ok(Unary::Asin);
    "Acos" 7 |_| Ok(Unary::Acos);
    "Atan" 7 |_| Ok(Unary::Atan);
    "Sinh" 9 |_| Ok(Unary::Sinh);
    "Cosh" 9 |_| Ok(Unary::Cosh);
    "Asinh" 9 |_| Ok(Unary::Asinh);
    "Acosh" 9 |_| Ok(Unary::Acosh);
    "Atanh" 9 |_| Ok(Unary::Atanh);
    "Erf" 9 |_| Ok(Unary::Erf);
    "Sigmoid" 6 |_| Ok(Unary::Sigmoid);
    "Tanh" 6 |_| Ok(Unary::Tanh);
    "Softplus" 1 |_| Ok(Unary::Softplus);
    "Softsign" 1 |_| Ok(Unary::Softsign);
    "Relu" 6 |_| Ok(Unary::Relu);
    "LeakyRelu" 6 |a| Ok(Unary::LeakyRelu { alpha: a.float_or("alpha", 0.01)? });
    "Elu" 6 |a| Ok(Unary::Elu { alpha: a.float_or("alpha", 1.0)? });
    "Selu" 6 |a| {
        // The fixed points of J. Klambauer et al., "Self-Normalizing Neural Networks", as ONNX rounds them.
        let (alpha, gamma) = (a.float_or("alpha", 1.673_263_2)?, a.float_or("gamma", 1.050_701)?);
        Ok(Unary::Selu { alpha, gamma })
    };
    "Celu" 12 |a| Ok(Unary::Celu { alpha: a.float_or("alpha", 1.0)? });
    "HardSigmoid" 6 |a| {
        Ok(Unary::HardSigmoid { alpha: a.float_or("alpha", 0.2)?, beta: a.float_or("beta", 0.5)? })
    };
    "HardSwish" 14 |_| Ok(Unary::HardSwish);
    "ThresholdedRelu" 10 |a| Ok(Unary::ThresholdedRelu { alpha: a.float_or("alpha", 1.0)? });
    "Gelu" 20 |a| a.choice("approximate", &[("none", Unary::Gelu), ("tanh", Unary::GeluTanh)]);
    "Mish" 18 |_| Ok(Unary::Mish);
    "Swish" 24 |a| {
        let alpha = a.float_or("alpha", 1.0)?;
        Ok(if alpha == 1.0 { Unary::Silu } else { Unary::Swish { alpha } })
    };
    "Shrink" 9 |a| Ok(Unary::Shrink { bias: a.float_or("bias", 0.0)?, lambda: a.float_or("lambd", 0.5)? });
}

/// `y = f(x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pointwise {
    name: &'static str,
    /// The function.
    pub function: Unary,
}

impl Pointwise {
    /// A function under the name that profiles show.
    pub fn new(name: &'static str, function: Unary) -> Self {
        Pointwise { name, function }
    }

    /// The function as something that other kernels can do with their results, if they can.
    pub fn activation(&self) -> Option<Activation> {
        Some(match self.function {
            Unary::Relu => Activation::Relu,
            Unary::Clip { lo, hi } => Activation::Clip { lo, hi },
            Unary::LeakyRelu { alpha } => Activation::LeakyRelu { alpha },
            Unary::Sigmoid => Activation::Sigmoid,
            Unary::Silu => Activation::Silu,
            Unary::Tanh => Activation::Tanh,
            Unary::HardSigmoid { alpha, beta } => Activation::HardSigmoid { alpha, beta },
            Unary::HardSwish => Activation::HardSwish,
            Unary::Gelu => Activation::Gelu,
            Unary::GeluTanh => Activation::GeluTanh,
            _ => return None,
        })
    }

    /// Whether it is defined for integers.
    fn takes_integers(&self) -> bool {
        matches!(self.function, Unary::Abs | Unary::Neg | Unary::Sign | Unary::Relu | Unary::Square)
    }
}

impl Operator for Pointwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let integer = matches!(
            x.dtype,
            DType::I8 | DType::I16 | DType::I32 | DType::I64 | DType::U8 | DType::U16 | DType::U32 | DType::U64
        );
        if !(x.dtype.is_float() || integer && self.takes_integers()) {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let dtype = io.output(0)?.dtype;
        if dtype == DType::F32 {
            return match io.in_place {
                Some(_) => {
                    unary_assign(cx, self.function, io.output(0)?.as_slice()?);
                    Ok(())
                }
                None => {
                    let x = io.slice(0)?;
                    unary(cx, self.function, x, io.output(0)?.as_slice()?).map_err(kernel_error)
                }
            };
        }
        if io.in_place.is_none() {
            copy(io)?;
        }
        let y = io.output(0)?;
        let function = self.function;
        if dtype == DType::F64 {
            map_assign(cx, 40, y.as_slice::<f64>()?, |x| function.eval_f64(x));
            return Ok(());
        }
        for_dtype!(dtype, [I8, I16, I32, I64], T => {
            let f: fn(T) -> T = match function {
                Unary::Abs => T::wrapping_abs,
                Unary::Neg => T::wrapping_neg,
                Unary::Sign => T::signum,
                Unary::Relu => |x| x.max(0),
                _ => |x| x.wrapping_mul(x),
            };
            map_assign(cx, 4, y.as_slice::<T>()?, f);
            return Ok(());
        }, else ());
        for_dtype!(dtype, [U8, U16, U32, U64], T => {
            let f: fn(T) -> T = match function {
                Unary::Neg => T::wrapping_neg,
                Unary::Sign => |x| x.min(1),
                Unary::Square => |x| x.wrapping_mul(x),
                // The absolute value, and the positive part.
                _ => |x| x,
            };
            map_assign(cx, 4, y.as_slice::<T>()?, f);
            Ok(())
        }, else Err(wrong_dtype("the operand", dtype, "numbers")))
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 1)
    }
}

/// Not and BitwiseNot.
#[derive(Clone, Debug, PartialEq)]
pub struct Bits {
    name: &'static str,
}

impl Operator for Bits {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        let logical = self.name == "Not";
        if logical != (x.dtype == DType::Bool) || x.dtype.is_float() || x.dtype.bits() < 8 {
            return Err(wrong_dtype("the operand", x.dtype, if logical { "bool" } else { "integers" }));
        }
        cx.results(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        if io.in_place.is_none() {
            copy(io)?;
        }
        let y = io.output(0)?;
        // Truth values are 0 and 1.
        let flip = if y.dtype == DType::Bool { 1 } else { u8::MAX };
        map_assign(cx, 1, y.bytes(), |x| x ^ flip);
        Ok(())
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 1)
    }
}

/// IsNaN and IsInf.
#[derive(Clone, Debug, PartialEq)]
pub struct Classify {
    name: &'static str,
    positive: bool,
    negative: bool,
}

impl Operator for Classify {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        if !x.dtype.is_float() {
            return Err(wrong_dtype("the operand", x.dtype, "floating-point numbers"));
        }
        cx.results(vec![Fact { dtype: DType::Bool, shape: x.shape.clone(), content: Content::Unknown }])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let x = io.input(0)?;
        let y = io.output(0)?.bytes();
        let (nan, positive, negative) = (self.name == "IsNaN", self.positive, self.negative);
        for_dtype!(x.dtype, [F32, F64], T => {
            map(cx, 4, x.as_slice::<T>()?, y, |v: T| {
                u8::from(if nan { v.is_nan() } else { v == T::INFINITY && positive || v == T::NEG_INFINITY && negative })
            })
            .map_err(kernel_error)
        }, else Err(wrong_dtype("the operand", x.dtype, "float32 and float64")))
    }

    fn permuted(&self, _: &[usize], _: &[Option<&Fact>]) -> Option<Permuted> {
        Permuted::elementwise(self, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s};
    use crate::tensor::Tensor;

    #[test]
    fn each_function_is_the_one_of_its_name() {
        let x = 0.6f32;
        let cases: &[(&str, f64)] = &[
            ("Abs", 0.6),
            ("Neg", -0.6),
            ("Exp", 1.822_118_8),
            ("Log", -0.510_825_6),
            ("Sqrt", 0.774_596_67),
            ("Reciprocal", 1.666_666_7),
            ("Floor", 0.0),
            ("Ceil", 1.0),
            ("Round", 1.0),
            ("Sign", 1.0),
            ("Sin", 0.564_642_47),
            ("Cos", 0.825_335_6),
            ("Tan", 0.684_136_8),
            ("Asin", 0.643_501_1),
            ("Acos", 0.927_295_2),
            ("Atan", 0.540_419_5),
            ("Sinh", 0.636_653_6),
            ("Cosh", 1.185_465_2),
            ("Asinh", 0.568_824_9),
            ("Atanh", std::f64::consts::LN_2),
            ("Erf", 0.603_856_1),
            ("Sigmoid", 0.645_656_3),
            ("Tanh", 0.537_049_6),
            ("Softplus", 1.037_488),
            ("Softsign", 0.375),
            ("Relu", 0.6),
            ("LeakyRelu", 0.6),
            ("Elu", 0.6),
            ("Selu", 0.630_420_6),
            ("Celu", 0.6),
            ("HardSigmoid", 0.62),
            ("HardSwish", 0.36),
            ("ThresholdedRelu", 0.0),
            ("Gelu", 0.435_448_1),
            ("Mish", 0.466_136_5),
            ("Swish", 0.387_393_8),
            ("Shrink", 0.6),
        ];
        for &(name, want) in cases {
            for x in [f32s(&[1], &[x]), Tensor::from_slice(&[1], &[f64::from(x)]).unwrap()] {
                let y = OneNode::new(name).run(&[x]).unwrap().remove(0);
                let got = y.as_slice::<f32>().map_or_else(|_| y.as_slice::<f64>().unwrap()[0], |v| f64::from(v[0]));
                assert!((got - want).abs() < 2e-6, "{name}: {got}, {want} was wanted");
            }
        }
        assert_eq!(
            cases.len() + 1,
            super::OPERATORS.iter().filter(|r| r.domain.is_empty()).count() - 4,
            "all but Acosh"
        );
    }

    #[test]
    fn attributes_reach_the_function() {
        let x = || f32s(&[2], &[-2.0, 2.0]);
        let y = OneNode::new("LeakyRelu").float("alpha", 0.5).run(&[x()]).unwrap();
        assert_eq!(y[0], f32s(&[2], &[-1.0, 2.0]));
        let y = OneNode::new("Shrink").float("lambd", 1.0).float("bias", 0.5).run(&[x()]).unwrap();
        assert_eq!(y[0], f32s(&[2], &[-1.5, 1.5]));
        assert!(OneNode::new("Relu").float("alpha", 0.5).run(&[x()]).is_err(), "Relu has no attribute");
    }

    #[test]
    fn integers_and_truth_values() {
        let x = || Tensor::from_slice(&[3], &[-128i8, 0, 5]).unwrap();
        let run = |name: &'static str| OneNode::new(name).run(&[x()]).unwrap()[0].as_slice::<i8>().unwrap().to_vec();
        assert_eq!(run("Abs"), [-128, 0, 5]);
        assert_eq!(run("Neg"), [-128, 0, -5]);
        assert_eq!(run("Sign"), [-1, 0, 1]);
        assert_eq!(run("Relu"), [0, 0, 5]);
        assert_eq!(run("BitwiseNot"), [127, -1, -6]);
        assert!(OneNode::new("Exp").run(&[x()]).is_err());
        assert!(OneNode::new("Not").run(&[x()]).is_err());
        let b = Tensor::from_bools(&[2], &[true, false]).unwrap();
        assert_eq!(OneNode::new("Not").run(&[b]).unwrap()[0], Tensor::from_bools(&[2], &[false, true]).unwrap());
        let x = || f32s(&[3], &[f32::NAN, f32::NEG_INFINITY, f32::INFINITY]);
        assert_eq!(OneNode::new("IsNaN").run(&[x()]).unwrap()[0].bytes(), [1, 0, 0]);
        assert_eq!(OneNode::new("IsInf").int("detect_negative", 0).run(&[x()]).unwrap()[0].bytes(), [0, 0, 1]);
    }
}
