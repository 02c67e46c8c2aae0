//! Einsum: sums of products over named axes.

use super::sizes::strides;
use super::{Attributes, Infer, Io, Op, Operator, Registration, wrong_dtype};
use crate::error::{Error, Result};
use crate::fact::{Dim, Fact, Shape};
use crate::for_dtype;
use crate::tensor::{DType, Dims, TensorView, element_count};
use smallvec::SmallVec;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::gemm::{Batched, gemm_batched};
use weblane_kernels::naive::Number;
use weblane_kernels::par::Cx;

/// The operators of this file.
pub const OPERATORS: &[Registration] = &[Registration::onnx("Einsum", 12, parse)];

/// A name of an axis; those of an ellipsis are numbered from the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Dots(usize),
    Letter(char),
}

/// Labels of one operand or of the result, as written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Term {
    before: Vec<char>,
    dots: bool,
    after: Vec<char>,
}

/// `y[output labels] = sum over all other labels of the product of the operands`.
#[derive(Clone, Debug, PartialEq)]
pub struct Einsum {
    inputs: Vec<Term>,
    output: Option<Term>,
}

fn parse(a: &mut Attributes) -> Result<Op> {
    let text = a.required("equation", Attributes::string)?;
    let wrong = |why: &str| Error::invalid_model(format!("the equation \"{text}\" {why}"));
    let plain: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match plain.split_once("->") {
        Some((l, r)) => (l, Some(r)),
        None => (plain.as_str(), None),
    };
    let term = |s: &str| -> Result<Term> {
        let letters = |s: &str| match s.chars().all(|c| c.is_ascii_alphabetic()) {
            true => Ok(s.chars().collect::<Vec<_>>()),
            false => Err(wrong("has something that is neither a letter nor an ellipsis")),
        };
        match s.split_once("...") {
            Some((before, after)) => Ok(Term { before: letters(before)?, dots: true, after: letters(after)? }),
            None => Ok(Term { before: letters(s)?, ..Term::default() }),
        }
    };
    let inputs: Vec<Term> = left.split(',').map(term).collect::<Result<_>>()?;
    if inputs.len() != a.input_count() {
        return Err(wrong(&format!("has {} terms, the node has {} operands", inputs.len(), a.input_count())));
    }
    let output = right.map(term).transpose()?;
    if let Some(out) = &output {
        let letters: Vec<char> = out.before.iter().chain(&out.after).copied().collect();
        for (i, c) in letters.iter().enumerate() {
            let known = inputs.iter().any(|t| t.before.contains(c) || t.after.contains(c));
            if !known || letters[..i].contains(c) {
                return Err(wrong(&format!("has '{c}' in its result twice or in no operand")));
            }
        }
    }
    Ok(Einsum { inputs, output }.into())
}

impl Term {
    /// One label per axis of a tensor of this rank.
    fn labels(&self, rank: usize) -> Result<Vec<Label>> {
        let named = self.before.len() + self.after.len();
        let dots = rank.checked_sub(named).filter(|&n| n == 0 || self.dots).ok_or_else(|| {
            Error::shape(format!("an operand of rank {rank}; its term of the equation names {named} axes"))
        })?;
        let letter = |c: &char| Label::Letter(*c);
        let middle = (0..dots).rev().map(Label::Dots);
        Ok(self.before.iter().map(letter).chain(middle).chain(self.after.iter().map(letter)).collect())
    }
}

/// Labels of the operands and of the result.
struct Labels {
    inputs: Vec<Vec<Label>>,
    output: Vec<Label>,
}

impl Einsum {
    fn labels(&self, ranks: &[usize]) -> Result<Labels> {
        let inputs: Vec<_> = self.inputs.iter().zip(ranks).map(|(t, &r)| t.labels(r)).collect::<Result<_>>()?;
        let dots = inputs.iter().flatten().filter_map(|l| if let Label::Dots(n) = l { Some(n + 1) } else { None });
        let dots = dots.max().unwrap_or(0);
        let output = match &self.output {
            // An ellipsis that the result does not name is summed over.
            Some(t) => t.labels(t.before.len() + t.after.len() + if t.dots { dots } else { 0 })?,
            None => {
                let mut letters: Vec<Label> =
                    inputs.iter().flatten().copied().filter(|l| matches!(l, Label::Letter(_))).collect();
                letters.sort_unstable();
                let once = |l: &Label| letters.iter().filter(|m| *m == l).count() == 1;
                (0..dots).rev().map(Label::Dots).chain(letters.iter().copied().filter(once)).collect()
            }
        };
        Ok(Labels { inputs, output })
    }
}

/// Sizes of the labels, and for each operand its stride along each; 0 where it repeats or does not have the label.
struct Loops {
    sizes: Dims,
    strides: SmallVec<[Dims; 2]>,
    /// How many labels, the first ones, are those of the result.
    outer: usize,
}

impl Loops {
    fn new(labels: &Labels, dims: &[&[usize]]) -> Result<Loops> {
        let mut all: Vec<Label> = labels.output.clone();
        for &l in labels.inputs.iter().flatten() {
            if !all.contains(&l) {
                all.push(l);
            }
        }
        let mut sizes = Dims::from_elem(1, all.len());
        let mut per_operand: SmallVec<[Dims; 2]> = SmallVec::new();
        for (term, dims) in labels.inputs.iter().zip(dims) {
            let dense = strides(dims);
            let mut own = Dims::from_elem(0, all.len());
            for ((l, &d), s) in term.iter().zip(dims.iter()).zip(&dense) {
                let at = all.iter().position(|m| m == l).unwrap_or(0);
                if d != 1 {
                    if sizes[at] != 1 && sizes[at] != d {
                        return Err(Error::shape(format!("axes of sizes {} and {d} have the same label", sizes[at])));
                    }
                    sizes[at] = d;
                    // A label that stands twice walks the diagonal.
                    own[at] += s;
                }
            }
            per_operand.push(own);
        }
        Ok(Loops { sizes, strides: per_operand, outer: labels.output.len() })
    }

    /// The loops as one batched matrix product, if two operands and their axes allow it: one axis each for rows, columns
    /// and the sum, all others in common.
    fn product(&self) -> Option<[Option<usize>; 3]> {
        let [a, b] = self.strides.as_slice() else { return None };
        let (mut row, mut col, mut sum) = (None, None, None);
        for i in 0..self.sizes.len() {
            if self.sizes[i] == 1 {
                continue;
            }
            match (i < self.outer, a[i] != 0, b[i] != 0) {
                (true, true, true) => {}
                // The last one is the innermost of the result; more rows or columns become batches.
                (true, true, false) => row = Some(i),
                (true, false, true) => col = Some(i),
                (false, true, true) if sum.is_none() => sum = Some(i),
                _ => return None,
            }
        }
        Some([row, col, sum])
    }

    fn run<T: Number>(&self, operands: &[&[T]], y: &mut [T]) {
        let rank = self.sizes.len();
        let mut index = Dims::from_elem(0, rank);
        let inner: usize = self.sizes[self.outer..].iter().product();
        let mut at: SmallVec<[usize; 4]> = SmallVec::from_elem(0, operands.len());
        for y in y {
            let mut sum = T::ZERO;
            for _ in 0..inner {
                sum = sum.plus(operands.iter().zip(&at).fold(T::ONE, |p, (x, &i)| p.times(x[i])));
                self.step(&mut index, &mut at, self.outer);
            }
            *y = sum;
            self.step_outer(&mut index, &mut at);
        }
    }

    /// Goes to the next index of the labels from `first` on; wraps around at the end.
    fn step(&self, index: &mut [usize], at: &mut [usize], first: usize) {
        for i in (first..self.sizes.len()).rev() {
            index[i] += 1;
            at.iter_mut().zip(&self.strides).for_each(|(at, s)| *at += s[i]);
            if index[i] < self.sizes[i] {
                return;
            }
            index[i] = 0;
            at.iter_mut().zip(&self.strides).for_each(|(at, s)| *at -= s[i] * self.sizes[i]);
        }
    }

    fn step_outer(&self, index: &mut [usize], at: &mut [usize]) {
        for i in (0..self.outer).rev() {
            index[i] += 1;
            at.iter_mut().zip(&self.strides).for_each(|(at, s)| *at += s[i]);
            if index[i] < self.sizes[i] {
                return;
            }
            index[i] = 0;
            at.iter_mut().zip(&self.strides).for_each(|(at, s)| *at -= s[i] * self.sizes[i]);
        }
    }

    fn run_product(
        &self,
        cx: &Cx,
        [row, col, sum]: [Option<usize>; 3],
        a: &[f32],
        b: &[f32],
        y: &mut [f32],
    ) -> Result<()> {
        let out = strides(&self.sizes[..self.outer]);
        let size = |i: Option<usize>| i.map_or(1, |i| self.sizes[i]);
        let along = |s: &Dims, i: Option<usize>| i.map_or(0, |i| s[i]);
        let pick = |s: &Dims| -> Dims { self.batches(row, col).map(|i| s[i]).collect() };
        let (sa, sb) = (&self.strides[0], &self.strides[1]);
        // The kernel writes rows: the columns must be dense in the result, else both sides change places.
        if col.is_some_and(|c| out[c] != 1) || (col.is_none() && row.is_some_and(|r| out[r] == 1)) {
            let swapped = Loops {
                sizes: self.sizes.clone(),
                strides: [sb.clone(), sa.clone()].into_iter().collect(),
                outer: self.outer,
            };
            if col.is_some_and(|c| out[c] != 1) && row.is_none_or(|r| out[r] != 1) {
                self.run(&[a, b], y);
                return Ok(());
            }
            return swapped.run_product(cx, [col, row, sum], b, a, y);
        }
        let product = Batched {
            batch_dims: &pick(&self.sizes),
            m: size(row),
            n: size(col),
            k: size(sum),
            a,
            a_batch_strides: &pick(sa),
            a_strides: [along(sa, row), along(sa, sum)],
            b,
            b_batch_strides: &pick(sb),
            b_strides: [along(sb, sum), along(sb, col)],
            c_batch_strides: &pick(&out),
            ldc: row.map_or(size(col), |r| out[r]),
            bias: None,
            activation: Activation::Identity,
        };
        Ok(gemm_batched(cx, &product, y)?)
    }

    fn batches(&self, row: Option<usize>, col: Option<usize>) -> impl Iterator<Item = usize> {
        (0..self.outer).filter(move |&i| Some(i) != row && Some(i) != col)
    }
}

impl Operator for Einsum {
    fn name(&self) -> &'static str {
        "Einsum"
    }

    fn infer(&self, cx: &Infer) -> Result<Vec<Fact>> {
        let dtype = cx.input(0)?.dtype;
        let mut shapes: Vec<&Shape> = Vec::new();
        for i in 0..self.inputs.len() {
            let f = cx.input(i)?;
            if f.dtype != dtype {
                return Err(Error::dtype(format!("operand {i} is {}, operand 0 is {dtype}", f.dtype)));
            }
            match &f.shape {
                Some(s) => shapes.push(s),
                None => return cx.results(vec![Fact::of_dtype(dtype)]),
            }
        }
        let ranks: Vec<usize> = shapes.iter().map(|s| s.len()).collect();
        let labels = self.labels(&ranks)?;
        let mut out: Shape = SmallVec::from_elem(Dim::Known(1), labels.output.len());
        for (term, shape) in labels.inputs.iter().zip(&shapes) {
            for (l, d) in term.iter().zip(shape.iter()) {
                let Some(at) = labels.output.iter().position(|m| m == l) else { continue };
                out[at] = match (&out[at], d) {
                    (Dim::Known(1), d) => d.clone(),
                    (d, Dim::Known(1)) => d.clone(),
                    (Dim::Known(a), Dim::Known(b)) if a != b => {
                        return Err(Error::shape(format!("axes of sizes {a} and {b} have the same label")));
                    }
                    (Dim::Known(a), _) => Dim::Known(*a),
                    (_, d) => d.clone(),
                };
            }
        }
        if let Some(dims) =
            shapes.iter().map(|s| s.iter().map(Dim::known).collect::<Option<Dims>>()).collect::<Option<Vec<_>>>()
        {
            let dims: Vec<&[usize]> = dims.iter().map(|d| d.as_slice()).collect();
            element_count(&Loops::new(&labels, &dims)?.sizes)?;
        }
        cx.results(vec![Fact::with_shape(dtype, out)])
    }

    fn run(&self, cx: &Cx, io: &mut Io) -> Result<()> {
        let operands: Vec<TensorView> =
            (0..self.inputs.len()).map(|i| Ok(io.input(i)?.signless())).collect::<Result<_>>()?;
        let dims: Vec<&[usize]> = operands.iter().map(|o| o.dims).collect();
        let ranks: Vec<usize> = dims.iter().map(|d| d.len()).collect();
        let loops = Loops::new(&self.labels(&ranks)?, &dims)?;
        let dtype = operands.first().map_or(DType::F32, |o| o.dtype);
        if loops.sizes.contains(&0) {
            io.output(0)?.bytes().fill(0);
            return Ok(());
        }
        if let (DType::F32, Some(product), [a, b]) = (dtype, loops.product(), operands.as_slice()) {
            let (a, b) = (a.as_slice::<f32>()?, b.as_slice::<f32>()?);
            return loops.run_product(cx, product, a, b, io.output(0)?.as_slice::<f32>()?);
        }
        for_dtype!(dtype, [F32, F64, I8, I16, I32, I64], T => {
            let slices: Vec<&[T]> = operands.iter().map(|o| o.as_slice::<T>()).collect::<Result<_>>()?;
            loops.run(&slices, io.output(0)?.signless::<T>()?);
            Ok(())
        }, else Err(wrong_dtype("an operand", dtype, "numbers")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{OneNode, f32s, i64s};
    use crate::tensor::Tensor;

    fn ramp(dims: &[usize]) -> Tensor {
        let n: usize = dims.iter().product();
        f32s(dims, &(0..n).map(|i| (i * 7 % 11) as f32 - 5.0).collect::<Vec<_>>())
    }

    /// Both ways through the loops give the same, whatever the order of axes.
    #[test]
    fn products_in_every_order() {
        let sizes = |c: char| match c {
            'a' => 2,
            'b' => 3,
            'i' => 4,
            'j' => 5,
            _ => 6,
        };
        let dims = |s: &str| s.chars().map(sizes).collect::<Vec<_>>();
        for (l, r, out) in [
            ("ik", "kj", "ij"),
            ("ik", "jk", "ji"),
            ("abik", "abjk", "abij"),
            ("aibk", "ajbk", "abij"),
            ("ik", "k", "i"),
            ("i", "j", "ij"),
            ("i", "j", "ji"),
            ("bik", "kj", "bij"),
            ("bik", "bkj", "ibj"),
            ("ai", "ai", "a"),
            ("abij", "k", "kabij"),
            ("aij", "aij", ""),
            ("ibk", "jk", "bij"),
        ] {
            let (a, b) = (ramp(&dims(l)), ramp(&dims(r)));
            let equation = format!("{l},{r}->{out}");
            let real = OneNode::new("Einsum").string("equation", &equation).run(&[a.clone(), b.clone()]).unwrap();
            let whole = |t: &Tensor| {
                let v: Vec<i64> = t.as_slice::<f32>().unwrap().iter().map(|&v| v as i64).collect();
                i64s(t.dims(), &v)
            };
            let plain = OneNode::new("Einsum").string("equation", &equation).run(&[whole(&a), whole(&b)]).unwrap();
            assert_eq!(whole(&real[0]), plain[0], "{equation}");
        }
    }

    #[test]
    fn by_hand() {
        let x = i64s(&[2, 2], &[1, 2, 3, 4]);
        let run = |equation: &str, inputs: &[Tensor]| {
            let y = OneNode::new("Einsum").string("equation", equation).run(inputs).unwrap();
            y[0].as_slice::<i64>().unwrap().to_vec()
        };
        assert_eq!(run("ij->ji", &[x.clone()]), [1, 3, 2, 4]);
        assert_eq!(run("ii->i", &[x.clone()]), [1, 4]);
        assert_eq!(run("...i->...", &[x.clone()]), [3, 7]);
        assert_eq!(run("ij,jk", &[x.clone(), x.clone()]), [7, 10, 15, 22]);
        assert_eq!(run("i,i,i->", &[i64s(&[2], &[1, 2]), i64s(&[2], &[3, 4]), i64s(&[2], &[5, 6])]), [63]);
        assert_eq!(run("...i,...i->...i", &[x, i64s(&[2], &[10, 100])]), [10, 200, 30, 400]);
    }

    #[test]
    fn mistakes_are_named() {
        let x = || ramp(&[2, 3]);
        let run = |equation: &str| OneNode::new("Einsum").string("equation", equation).run(&[x(), x()]).unwrap_err();
        assert!(run("ij->i").message.contains("1 terms"));
        assert!(run("ij,jk->ik").message.contains("sizes 3 and 2"));
        assert!(run("ij,ijk->ik").message.contains("names 3 axes"));
        assert!(run("ij,i1->ik").message.contains("neither a letter"));
        assert!(run("ij,ij->q").message.contains("'q'"));
    }
}
