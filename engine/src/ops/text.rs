//! StringConcat, StringSplit and StringNormalizer.

use super::sizes::broadcast_strides;
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Content, Dim, Fact, Shape, broadcast};
use crate::tensor::{DType, Tensor, TensorView};
use std::sync::Arc;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[
    Registration::onnx("StringConcat", 20, |_| Ok(StringConcat.into())),
    Registration::onnx("StringSplit", 20, StringSplit::parse),
    Registration::onnx("StringNormalizer", 10, StringNormalizer::parse),
];

fn check_text(fact: &Fact) -> Result<()> {
    if fact.dtype == DType::String { Ok(()) } else { Err(wrong_dtype("an operand", fact.dtype, "string")) }
}

fn text<'a>(view: TensorView<'a>) -> Result<&'a [String]> {
    view.strings().ok_or_else(|| wrong_dtype("an operand", view.dtype, "string"))
}

/// The texts of both operands, one behind the other, with broadcasting.
#[derive(Clone, Debug, PartialEq)]
pub struct StringConcat;

impl Operator for StringConcat {
    fn name(&self) -> &'static str {
        "StringConcat"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let (a, b) = (cx.input(0)?, cx.input(1)?);
        check_text(a)?;
        check_text(b)?;
        let shape = match (&a.shape, &b.shape) {
            (Some(x), Some(y)) => Some(broadcast(x, y)?),
            _ => None,
        };
        cx.results(vec![Fact { dtype: DType::String, shape, content: Content::Unknown }])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let (a, b) = (io.input(0)?, io.input(1)?);
        let y = io.output(0)?;
        let dims = y.dims;
        let steps = [a, b].map(|v| broadcast_strides(v.dims, dims));
        let (p, q) = (text(a)?, text(b)?);
        for (i, y) in y.strings().into_iter().flatten().enumerate() {
            let (mut rest, mut at) = (i, [0, 0]);
            for axis in (0..dims.len()).rev() {
                at[0] += rest % dims[axis] * steps[0][axis];
                at[1] += rest % dims[axis] * steps[1][axis];
                rest /= dims[axis];
            }
            *y = format!("{}{}", p[at[0]], q[at[1]]);
        }
        Ok(())
    }
}

/// The parts of each text between delimiters, filled up with empty texts, and how many there are.
#[derive(Clone, Debug, PartialEq)]
pub struct StringSplit {
    /// `None` splits at runs of white space.
    pub delimiter: Option<String>,
    /// The rest stays one part after so many splits.
    pub max_splits: Option<usize>,
}

impl StringSplit {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let delimiter = a.string("delimiter")?.filter(|d| !d.is_empty());
        let max_splits = a.int("maxsplit")?.and_then(|n| usize::try_from(n).ok());
        Ok(StringSplit { delimiter, max_splits }.into())
    }

    fn parts<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let most = self.max_splits.unwrap_or(usize::MAX).saturating_add(1);
        match &self.delimiter {
            _ if text.is_empty() => Vec::new(),
            Some(d) => text.splitn(most, d.as_str()).collect(),
            None => {
                let mut rest = text.trim();
                let mut parts = Vec::new();
                while !rest.is_empty() {
                    let end = if parts.len() + 1 < most { rest.find(char::is_whitespace) } else { None };
                    let (part, more) = rest.split_at(end.unwrap_or(rest.len()));
                    parts.push(part);
                    rest = more.trim_start();
                }
                parts
            }
        }
    }
}

impl Operator for StringSplit {
    fn name(&self) -> &'static str {
        "StringSplit"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_text(x)?;
        let counts = Fact { dtype: DType::I64, shape: x.shape.clone(), content: Content::Unknown };
        let Some(shape) = &x.shape else { return cx.results(vec![Fact::of_dtype(DType::String), counts]) };
        // The number of parts is the largest of all texts, which only they can say.
        let longest = x.tensor().and_then(|t| t.strings().map(|s| s.iter().map(|s| self.parts(s).len()).max()));
        let mut parts: Shape = shape.clone();
        parts.push(longest.map_or(Dim::Unknown, |n| Dim::Known(n.unwrap_or(0))));
        cx.results(vec![Fact::with_shape(DType::String, parts), counts])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let x = text(io.input(0)?)?;
        let y = io.output(0)?;
        let width = y.dims.last().copied().unwrap_or(0);
        if width > 0 {
            for (x, y) in x.iter().zip(y.strings().into_iter().flat_map(|y| y.chunks_mut(width))) {
                let parts = self.parts(x);
                for (i, y) in y.iter_mut().enumerate() {
                    *y = parts.get(i).copied().unwrap_or("").to_owned();
                }
            }
        }
        if let Some(counts) = io.outputs.get_mut(1) {
            for (x, n) in x.iter().zip(counts.as_slice::<i64>()?) {
                *n = self.parts(x).len() as i64;
            }
        }
        Ok(())
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0]
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Case {
    Same,
    Lower,
    Upper,
}

impl Case {
    fn apply(self, text: &str) -> String {
        match self {
            Case::Same => text.to_owned(),
            Case::Lower => text.to_lowercase(),
            Case::Upper => text.to_uppercase(),
        }
    }
}

/// Drops words of a list and changes the case of the others.
#[derive(Clone, Debug, PartialEq)]
pub struct StringNormalizer {
    case: Case,
    case_sensitive: bool,
    stop_words: Vec<String>,
}

impl StringNormalizer {
    fn parse(a: &mut Attributes) -> Result<Op> {
        let case =
            a.choice("case_change_action", &[("NONE", Case::Same), ("LOWER", Case::Lower), ("UPPER", Case::Upper)])?;
        let case_sensitive = a.flag_or("is_case_sensitive", false)?;
        // Case changes go by Unicode's tables, which are those of all locales but the Turkic and Lithuanian ones.
        if let Some(locale) = a.string("locale")?
            && ["tr", "az", "lt"].iter().any(|l| locale.to_lowercase().starts_with(l))
        {
            return Err(Error::unsupported_attribute(format!("locale \"{locale}\" has letter cases of its own")));
        }
        Ok(StringNormalizer { case, case_sensitive, stop_words: a.strings("stopwords")?.unwrap_or_default() }.into())
    }

    fn normalized(&self, words: &[String]) -> Vec<String> {
        let stops = |word: &String| match self.case_sensitive {
            true => self.stop_words.contains(word),
            false => self.stop_words.iter().any(|s| s.to_lowercase() == word.to_lowercase()),
        };
        let mut kept: Vec<String> = words.iter().filter(|w| !stops(w)).map(|w| self.case.apply(w)).collect();
        if kept.is_empty() {
            kept.push(String::new());
        }
        kept
    }
}

impl Operator for StringNormalizer {
    fn name(&self) -> &'static str {
        "StringNormalizer"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let x = cx.input(0)?;
        check_text(x)?;
        let lead: Shape = match x.shape.as_deref() {
            Some([_]) => Shape::new(),
            Some([Dim::Known(1), _]) => std::iter::once(Dim::Known(1)).collect(),
            None => return cx.results(vec![Fact::of_dtype(DType::String)]),
            Some(_) => {
                let shape = x.shape_text();
                return Err(Error::shape(format!("words of shape {shape}; a vector or one row was wanted")));
            }
        };
        if let Some(words) = x.tensor().and_then(|t| t.strings()) {
            let kept = self.normalized(words);
            let dims: Vec<usize> = lead.iter().filter_map(Dim::known).chain([kept.len()]).collect();
            return cx.results(vec![Fact::constant(Arc::new(Tensor::from_strings(&dims, kept)?))]);
        }
        cx.results(vec![Fact::with_shape(DType::String, lead.into_iter().chain([Dim::Unknown]).collect())])
    }

    fn run(&self, _: &Cx, io: &mut Io) -> Result<()> {
        let kept = self.normalized(text(io.input(0)?)?);
        match io.output(0)?.strings() {
            Some(y) if y.len() == kept.len() => y.clone_from_slice(&kept),
            _ => return Err(Error::internal("another number of words than inference found")),
        }
        Ok(())
    }

    fn shape_operands(&self) -> &'static [usize] {
        &[0]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, i64s};
    use super::*;
    use crate::onnx::AttributeValue;

    fn words(dims: &[usize], words: &[&str]) -> Tensor {
        Tensor::from_strings(dims, words.iter().map(|s| s.to_string()).collect()).unwrap()
    }

    #[test]
    fn concatenates() {
        let y = OneNode::new("StringConcat").run(&[words(&[2, 1], &["a", "b"]), words(&[2], &["x", "y"])]).unwrap();
        assert_eq!(y[0], words(&[2, 2], &["ax", "ay", "bx", "by"]));
        assert!(OneNode::new("StringConcat").run(&[words(&[1], &["a"]), i64s(&[1], &[1])]).is_err());
    }

    #[test]
    fn splits() {
        let x = words(&[3], &["a  bc d", "", " e"]);
        let y = OneNode::new("StringSplit").outputs(2).run(&[x.clone()]).unwrap();
        assert_eq!(y[0], words(&[3, 3], &["a", "bc", "d", "", "", "", "e", "", ""]));
        assert_eq!(y[1], i64s(&[3], &[3, 0, 1]));
        let y = OneNode::new("StringSplit").outputs(2).int("maxsplit", 1).run(&[x]).unwrap();
        assert_eq!(y[0], words(&[3, 2], &["a", "bc d", "", "", "e", ""]));
        let comma = OneNode::new("StringSplit").outputs(2).attr("delimiter", AttributeValue::String(",".into()));
        assert_eq!(comma.run(&[words(&[1], &["a,,b"])]).unwrap()[0], words(&[1, 3], &["a", "", "b"]));
    }

    #[test]
    fn normalizes() {
        let node = |case: &str| {
            OneNode::new("StringNormalizer")
                .attr("case_change_action", AttributeValue::String(case.into()))
                .attr("stopwords", AttributeValue::Strings(vec!["Monday".into()]))
        };
        let x = words(&[3], &["monday", "Tuesday", "x"]);
        assert_eq!(node("UPPER").run(&[x.clone()]).unwrap()[0], words(&[2], &["TUESDAY", "X"]));
        let y = node("NONE").int("is_case_sensitive", 1).run(&[x]).unwrap();
        assert_eq!(y[0], words(&[3], &["monday", "Tuesday", "x"]));
        assert_eq!(node("NONE").run(&[words(&[1, 1], &["MONDAY"])]).unwrap()[0], words(&[1, 1], &[""]));
    }
}
