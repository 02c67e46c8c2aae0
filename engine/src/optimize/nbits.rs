//! Products with quantised weights that stay small: weights of 4 bits, or of 8 bits in blocks, are multiplied as they are.
//!
//! ```text
//! MatMul(x, DQ(w))                            w [k, n] in blocks along k, or with scales for columns or for all
//! MatMul(x, Transpose(DQ(w)))                 w [n, k]                                -> MatMulNBits(x, w', scales', zeros')
//! MatMul(x, DQ(Transpose(w)))                 w [n, k]
//! Gemm(x, DQ(w), bias [n]), transposed too
//! ```
//!
//! `DQ` is DequantizeLinear of constants; casts to half precision and back may stand behind it. w' is `[n, blocks, bytes]`.
//! Without this such weights would be made real in every run. Whole bytes without blocks are made real at load instead,
//! by constant folding, unless there are so many that reading them is what a product of few rows takes.

use super::Pass;
use crate::error::Result;
use crate::fact::axis_index;
use crate::for_dtype;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::cast::Cast;
use crate::ops::gemm::Gemm;
use crate::ops::matmul::MatMul;
use crate::ops::matmul_nbits::MatMulNBits;
use crate::ops::quantize::Linear;
use crate::ops::transpose::Transpose;
use crate::tensor::{DType, Tensor};
use std::collections::HashMap;
use std::sync::Arc;
use weblane_kernels::epilogue::Activation;
use weblane_kernels::nbits::Format;

/// Weights of fewer elements become real by constant folding. 16 layers of 256 x 256 times one row take 0.6 of the time with
/// real weights and 16-byte vectors, and 0.7 at this size; then the cache is full, and few bits win by 1.7 (16-byte vectors)
/// to 4 (64-byte ones). For 128 rows there is little difference at any size.
const MIN_ELEMENTS: usize = 1 << 18;

/// Whole bytes without blocks become real below so many, which are 16 MB of real weights.
const MIN_WHOLE_BYTES: usize = 1 << 22;

/// The longest block that is made where the model has longer ones or none: scales are small beside it, and the sums of
/// blocks are not.
const MAX_BLOCK: usize = 256;

/// Columns that are repacked together, so that the lines they are written to stay in the first cache.
const COLUMNS: usize = 64;

/// Replaces products whose weights nobody has packed yet.
pub(super) fn run(graph: &mut Graph, pass: &Pass) -> Result<()> {
    replace(graph, pass, MIN_ELEMENTS, MIN_WHOLE_BYTES)
}

fn replace(graph: &mut Graph, pass: &Pass, min_elements: usize, min_whole_bytes: usize) -> Result<()> {
    // Elsewhere the weights would stay beside what they become.
    if !pass.packs || !graph.nodes.iter().any(is_dequantizing) {
        return Ok(());
    }
    let (producers, mut uses) = (graph.producers(), graph.use_counts());
    let mut made: HashMap<(usize, bool), [Option<ValueId>; 3]> = HashMap::new();
    for i in 0..graph.nodes.len() {
        let Some((linear, trans)) = product(graph, &producers, i) else { continue };
        let Some(weights) = Weights::new(graph, &producers, &graph.nodes[linear], trans) else { continue };
        let format = weights.format;
        let least = if weights.whole_bytes { min_whole_bytes } else { min_elements };
        if format.k * format.n < least {
            continue;
        }
        let node = &graph.nodes[i];
        let (x, w, bias) = (node.inputs[0], node.inputs[1], node.inputs.get(2).copied().flatten());
        let is_row = |t: &Tensor| matches!(*t.dims(), [n] | [1, n] if n == format.n);
        if !bias.is_none_or(|id| stored_at(graph, &producers, id).is_some_and(|t| is_row(t))) {
            continue;
        }
        let operands = match made.get(&(linear, trans)) {
            Some(&known) => known,
            None => {
                let name = format!("{}/constant", node.name);
                let tensors = weights.repacked()?;
                let ids = tensors.map(|t| t.map(|t| graph.add_constant(name.as_str(), t)));
                made.insert((linear, trans), ids);
                ids
            }
        };
        let node = &mut graph.nodes[i];
        node.op = MatMulNBits { format, activation: Activation::Identity }.into();
        node.inputs = std::iter::once(x).chain(operands).collect();
        if bias.is_some() {
            node.inputs.extend([None, bias]);
        }
        // What was repacked goes at once, so that there are never two of all weights.
        w.into_iter().for_each(|w| release(graph, &producers, &mut uses, w));
    }
    graph.remove_dead_nodes();
    Ok(())
}

fn is_dequantizing(node: &Node) -> bool {
    node.op.get::<Linear>().is_some_and(|l| l.back)
}

/// One reader less; without any, constants go.
fn release(graph: &mut Graph, producers: &[Option<usize>], uses: &mut [usize], id: ValueId) {
    uses[id.index()] -= 1;
    if uses[id.index()] > 0 {
        return;
    }
    graph.values[id.index()].constant = None;
    if let Some(i) = producers[id.index()] {
        let operands: Vec<ValueId> = graph.nodes[i].operands().collect();
        operands.into_iter().for_each(|id| release(graph, producers, uses, id));
    }
}

/// The node that dequantises the right operand of a plain product, and whether it gives the transpose of that operand.
fn product(graph: &Graph, producers: &[Option<usize>], i: usize) -> Option<(usize, bool)> {
    let node = &graph.nodes[i];
    let mut trans = if let Some(m) = node.op.get::<MatMul>() {
        let plain = !m.bias && !m.residual && !m.trans_a && m.alpha == 1.0 && m.activation == Activation::Identity;
        plain.then_some(m.trans_b)?
    } else {
        let g = node.op.get::<Gemm>()?;
        let plain = !g.trans_a && g.alpha == 1.0 && g.beta == 1.0 && g.activation == Activation::Identity;
        plain.then_some(g.trans_b)?
    };
    let mut i = producers[node.inputs.get(1).copied()??.index()]?;
    loop {
        let node = &graph.nodes[i];
        if is_dequantizing(node) {
            return Some((i, trans));
        } else if let Some(t) = node.op.get::<Transpose>() {
            trans ^= t.permutation(2).ok()?.as_slice() == [1, 0];
        } else {
            node.op.get::<Cast>().filter(|c| c.to == DType::F32 || c.to.is_half())?;
        }
        i = producers[node.inputs.first().copied()??.index()]?;
    }
}

/// A constant, which may be cast to `float32`.
fn stored_at<'a>(graph: &'a Graph, producers: &[Option<usize>], id: ValueId) -> Option<&'a Arc<Tensor>> {
    let cast = producers[id.index()].map(|i| &graph.nodes[i]);
    let id = match cast {
        Some(node) => node.op.get::<Cast>().filter(|c| c.to == DType::F32).and(node.inputs[0])?,
        None => id,
    };
    graph.constant(id).filter(|t| !t.is_released())
}

/// Quantised weights as the model has them.
struct Weights {
    codes: Arc<Tensor>,
    zeros: Option<Arc<Tensor>>,
    scales: Vec<f32>,
    /// How far to go in `codes` for the next row and the next column.
    strides: [usize; 2],
    /// The same in scales and zero points, where rows are blocks of `block`.
    scale_strides: [usize; 2],
    block: usize,
    /// Bytes that are not in blocks.
    whole_bytes: bool,
    format: Format,
}

impl Weights {
    /// Operands of a DequantizeLinear, if a product with its result, or with the transpose of that, can be a MatMulNBits.
    fn new(graph: &Graph, producers: &[Option<usize>], node: &Node, trans: bool) -> Option<Weights> {
        let linear = node.op.get::<Linear>().filter(|l| l.output.is_none_or(DType::is_float))?;
        let stored = |at: usize| stored_at(graph, producers, node.inputs.get(at).copied().flatten()?);
        // onnxruntime's quantiser leaves the transpose of weights that others read too before them.
        let codes = node.inputs.first().copied().flatten()?;
        let turned = producers[codes.index()].map(|i| &graph.nodes[i]).filter(|n| {
            n.op.get::<Transpose>().is_some_and(|t| t.permutation(2).is_ok_and(|p| p.as_slice() == [1, 0]))
        });
        let codes = stored_at(graph, producers, turned.map_or(Some(codes), |n| n.inputs.first().copied().flatten())?)?;
        let (scale, zeros) = (stored(1)?, stored(2));
        let &[first, second] = codes.dims() else { return None };
        let (rows, cols) = if turned.is_some() { (second, first) } else { (first, second) };
        let (k, n) = if trans { (cols, rows) } else { (rows, cols) };
        let bits = codes.dtype().bits();
        let fits = matches!(codes.dtype(), DType::U4 | DType::I4 | DType::U8 | DType::I8);
        let whole_bytes = bits == 8 && linear.block == 0;
        if !fits || k == 0 || (zeros.is_none() && node.operands().count() > 2) {
            return None;
        }
        let along_k = axis_index(linear.axis, 2).ok()? == usize::from(trans);
        let blocks = |block: usize| k.div_ceil(block);
        let (block, scale_strides) = match (scale.dims(), linear.block) {
            ([] | [1], _) => (k, [0, 0]),
            (&[len], 0) if len == n && !along_k => (k, [0, 1]),
            (&[_, len], block) if block > 0 && along_k && !trans && len == n => (block, [n, 1]),
            (&[len, _], block) if block > 0 && along_k && trans && len == n => (block, [1, blocks(block)]),
            _ => return None,
        };
        let shared = 1 << block.trailing_zeros().min(MAX_BLOCK.ilog2());
        if (shared < 16 && block < k) || zeros.is_some_and(|z| z.dtype() != codes.dtype() || z.len() != scale.len()) {
            return None;
        }
        let scales: Vec<f32> = for_dtype!(scale.dtype(), [F32, F16, Bf16], T => {
            scale.as_slice::<T>().ok()?.iter().map(|&v| f32::from(v)).collect()
        }, else return None);
        if !scales.iter().all(|s| s.is_finite()) {
            return None;
        }
        let format = Format { bits, block: shared.max(16), k, n };
        format.bytes()?;
        let (down, right) = if turned.is_some() { (1, rows) } else { (cols, 1) };
        let strides = if trans { [right, down] } else { [down, right] };
        Some(Weights {
            codes: codes.clone(),
            zeros: zeros.cloned(),
            scales,
            strides,
            scale_strides,
            block,
            whole_bytes,
            format,
        })
    }

    /// Operands 1 to 3 of a MatMulNBits.
    fn repacked(&self) -> Result<[Option<Tensor>; 3]> {
        let Format { bits, block, k, n } = self.format;
        let (blocks, mask) = (self.format.blocks(), u8::MAX >> (8 - bits));
        // Signed codes, and 0 among them, as unsigned ones.
        let middle = 1 << (bits - 1);
        let flip = if matches!(self.codes.dtype(), DType::I4 | DType::I8) { middle } else { 0 };
        // Which byte an element is in, and where it begins there; divisions would take most of the time.
        let per = 8 / bits;
        let (byte, shift) = (|i: usize| i >> per.ilog2(), |i: usize| (i & (per - 1)) * bits);
        let code = |codes: &[u8], i: usize| ((codes[byte(i)] >> shift(i)) & mask) ^ flip;
        let stride = blocks * byte(block);
        let mut b = Tensor::zeros(DType::U8, &[n, blocks, byte(block)])?;
        let (source, target) = (self.codes.bytes(), b.bytes_mut());
        for first in (0..n).step_by(COLUMNS) {
            for p in 0..k {
                for j in first..n.min(first + COLUMNS) {
                    target[j * stride + byte(p)] |= code(source, p * self.strides[0] + j * self.strides[1]) << shift(p);
                }
            }
        }
        let place = |j: usize, b: usize| b * block / self.block * self.scale_strides[0] + j * self.scale_strides[1];
        let places = || (0..n).flat_map(|j| (0..blocks).map(move |b| (j, b)));
        let scales: Vec<f32> = places().map(|(j, b)| self.scales[place(j, b)]).collect();
        let mut zeros = Tensor::zeros(DType::U8, &[n, (blocks * bits).div_ceil(8)])?;
        let mut all_middle = true;
        let stride = zeros.dims()[1];
        for (j, b) in places() {
            let zero = self.zeros.as_ref().map_or(flip, |z| code(z.bytes(), place(j, b)));
            zeros.bytes_mut()[j * stride + byte(b)] |= zero << shift(b);
            all_middle &= zero == middle;
        }
        Ok([Some(b), Some(Tensor::from_slice(&[n, blocks], &scales)?), (!all_middle).then_some(zeros)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::optimize;
    use super::super::testing::{Net, float, int, ints, names, noise, with_cx};
    use super::*;
    use crate::fact::Fact;

    const NBITS: &str = "com.microsoft.MatMulNBits";

    /// A constant of random codes.
    fn codes(n: &mut Net, dtype: DType, dims: &[usize], seed: u64) -> ValueId {
        let mut t = Tensor::zeros(dtype, dims).unwrap();
        let random = noise(t.bytes().len(), seed);
        t.bytes_mut().iter_mut().zip(random).for_each(|(b, r)| *b = (r * 127.0) as i8 as u8);
        n.graph.add_constant("codes", t)
    }

    /// What stands before the zero points.
    struct Form {
        dtype: DType,
        /// Of the weights as they are stored.
        dims: [usize; 2],
        axis: usize,
        block: usize,
        scale_dims: Vec<usize>,
    }

    impl Form {
        /// Weights `[k, n]`, or `[n, k]`, in blocks along k.
        fn blocks(dtype: DType, [k, n]: [usize; 2], trans: bool, block: usize) -> Form {
            let blocks = k.div_ceil(block);
            let (dims, scale_dims) = if trans { ([n, k], vec![n, blocks]) } else { ([k, n], vec![blocks, n]) };
            Form { dtype, dims, axis: usize::from(trans), block, scale_dims }
        }

        /// One scale for each column.
        fn columns(dtype: DType, [k, n]: [usize; 2], trans: bool) -> Form {
            let dims = if trans { [n, k] } else { [k, n] };
            Form { dtype, dims, axis: usize::from(!trans), block: 0, scale_dims: vec![n] }
        }

        fn dequantized(&self, n: &mut Net, with_zeros: bool) -> ValueId {
            let w = codes(n, self.dtype, &self.dims, 3);
            // Scales of blocks have a sign, and some are 0.
            let signed = |v: &f32| if self.block > 0 { v.max(-0.5) } else { v.abs() + 0.1 };
            let unit = 0.5 / f32::from(1u16 << self.dtype.bits());
            let scales: Vec<f32> =
                noise(self.scale_dims.iter().product(), 4).iter().map(|v| signed(v) * unit).collect();
            let scale = n.constant(&self.scale_dims, &scales);
            let zeros = with_zeros.then(|| codes(n, self.dtype, &self.scale_dims, 5));
            let operands: Vec<_> = [w, scale].into_iter().chain(zeros).collect();
            let attributes = [("axis", int(self.axis as i64)), ("block_size", int(self.block as i64))];
            n.op_with("DequantizeLinear", &operands, &attributes)
        }
    }

    fn small(graph: &mut Graph, pass: &Pass) -> Result<()> {
        replace(graph, pass, 1, 1)
    }

    /// Products of an input with what a form stands for: by MatMul, behind a transpose, by Gemm with a bias.
    fn products(form: &Form, trans: bool, with_zeros: bool) -> [Net; 2] {
        let (k, columns) = if trans { (form.dims[1], form.dims[0]) } else { (form.dims[0], form.dims[1]) };
        let mut matmul = Net::new(21);
        let x = matmul.input("x", &[2, 3, k]);
        let mut w = form.dequantized(&mut matmul, with_zeros);
        if trans {
            w = matmul.op_with("Transpose", &[w], &[("perm", ints(&[1, 0]))]);
        }
        let y = matmul.op("MatMul", &[x, w]);
        matmul.output(y);
        let mut gemm = Net::new(21);
        let x = gemm.input("x", &[5, k]);
        let w = form.dequantized(&mut gemm, with_zeros);
        let bias = gemm.weights(&[columns]);
        let y = gemm.op_with("Gemm", &[x, w, bias], &[("transB", int(i64::from(trans)))]);
        gemm.output(y);
        [matmul, gemm]
    }

    #[test]
    fn weights_in_blocks_and_columns() {
        for dtype in [DType::U4, DType::I4, DType::U8, DType::I8] {
            for trans in [false, true] {
                // Odd sizes begin rows within a byte; 40 leaves a part of a block; 48 is thrice 16, 512 more than all.
                let mut forms: Vec<Form> = [([96, 9], 16), ([96, 7], 32), ([40, 5], 16), ([96, 9], 48), ([40, 3], 512)]
                    .map(|(size, block)| Form::blocks(dtype, size, trans, block))
                    .into();
                forms.extend([[64, 9], [768, 5], [41, 3]].map(|size| Form::columns(dtype, size, trans)));
                forms.push(Form { scale_dims: vec![], ..Form::columns(dtype, [64, 9], trans) });
                for (form, with_zeros) in forms.iter().flat_map(|f| [(f, false), (f, true)]) {
                    for net in products(form, trans, with_zeros) {
                        assert_eq!(net.passed(small), [NBITS], "{dtype} {:?} block {}", form.dims, form.block);
                    }
                }
            }
        }
    }

    /// As onnxruntime quantises the words of GPT-2, which embed the tokens and give the logits.
    #[test]
    fn weights_that_are_turned_before_they_become_real() {
        for dtype in [DType::I8, DType::U8] {
            for one_scale in [true, false] {
                let mut n = Net::new(21);
                let x = n.input("x", &[2, 40]);
                let w = codes(&mut n, dtype, &[7, 40], 3);
                let w = n.op_with("Transpose", &[w], &[("perm", ints(&[1, 0]))]);
                let scales = noise(7, 4).iter().map(|v| v.abs() + 0.1).collect::<Vec<_>>();
                let scale = if one_scale { n.scalar(0.1) } else { n.constant(&[7], &scales) };
                let w = n.op_with("DequantizeLinear", &[w, scale], &[("axis", int(1))]);
                let y = n.op("MatMul", &[x, w]);
                n.output(y);
                assert_eq!(n.passed(small), [NBITS]);
                assert_eq!(n.passed(|graph, pass| replace(graph, pass, usize::MAX, usize::MAX)).len(), 3);
            }
        }
    }

    #[test]
    fn zero_points_in_the_middle_are_left_out() {
        for (fill, left) in [(0x88, false), (0x78, true)] {
            let mut n = Net::new(21);
            let x = n.input("x", &[2, 32]);
            let (w, scale) = (codes(&mut n, DType::U4, &[32, 6], 3), n.constant(&[2, 6], &[0.1; 12]));
            let mut zeros = Tensor::zeros(DType::U4, &[2, 6]).unwrap();
            zeros.bytes_mut().fill(fill);
            let zeros = n.graph.add_constant("zeros", zeros);
            let attributes = [("axis", int(0)), ("block_size", int(16))];
            let w = n.op_with("DequantizeLinear", &[w, scale, zeros], &attributes);
            let y = n.op("MatMul", &[x, w]);
            n.output(y);
            let graph = n.apply(small);
            n.check(&graph);
            assert_eq!(graph.nodes[0].inputs[3].is_some(), left);
        }
    }

    #[test]
    fn half_scales_and_casts() {
        let mut n = Net::new(21);
        let x = n.input("x", &[2, 64]);
        let scales: Vec<half::f16> = noise(4 * 6, 4).iter().map(|&v| half::f16::from_f32(v * 0.02)).collect();
        let scale = n.graph.add_constant("scale", Tensor::from_slice(&[4, 6], &scales).unwrap());
        let w = codes(&mut n, DType::I4, &[64, 6], 3);
        let scale = n.op_with("Cast", &[scale], &[("to", int(DType::F32 as i64))]);
        let w = n.op_with("DequantizeLinear", &[w, scale], &[("axis", int(0)), ("block_size", int(16))]);
        let w = n.op_with("Cast", &[w], &[("to", int(DType::F16 as i64))]);
        let w = n.op_with("Cast", &[w], &[("to", int(DType::F32 as i64))]);
        let y = n.op("MatMul", &[x, w]);
        n.output(y);
        // The rounding of weights to half precision is left out.
        assert_eq!(names(&n.apply(small)), [NBITS]);
    }

    #[test]
    fn what_no_block_can_say_stays() {
        let size = [32, 6];
        let along_columns = Form { axis: 1, scale_dims: vec![32, 1], ..Form::blocks(DType::I4, size, false, 16) };
        let along_k = Form { axis: 0, scale_dims: vec![32], ..Form::columns(DType::I4, size, false) };
        for form in [Form::blocks(DType::I4, size, false, 8), along_columns, along_k] {
            let [matmul, gemm] = products(&form, false, false);
            assert_eq!(matmul.passed(small), ["DequantizeLinear", "MatMul"]);
            assert_eq!(gemm.passed(small), ["DequantizeLinear", "Gemm"]);
        }
    }

    #[test]
    fn other_products_stay() {
        let form = Form::blocks(DType::U4, [32, 6], false, 16);
        let gemm = |attributes: super::super::testing::Attrs, dims: &[usize], bias: &[usize]| {
            let mut n = Net::new(21);
            let (x, w) = (n.input("x", dims), form.dequantized(&mut n, true));
            let bias = n.weights(bias);
            let y = n.op_with("Gemm", &[x, w, bias], attributes);
            n.output(y);
            assert_eq!(n.passed(small), ["DequantizeLinear", "Gemm"]);
        };
        gemm(&[("alpha", float(0.5))], &[3, 32], &[6]);
        gemm(&[("beta", float(0.5))], &[3, 32], &[6]);
        gemm(&[("transA", int(1))], &[32, 3], &[6]);
        gemm(&[], &[3, 32], &[3, 6]);
        gemm(&[], &[3, 32], &[1]);
        // The left operand, and scales that the caller gives.
        let mut n = Net::new(21);
        let (x, w) = (n.input("x", &[6, 4]), form.dequantized(&mut n, true));
        let y = n.op("MatMul", &[w, x]);
        let (w, scale) = (codes(&mut n, DType::U4, &[4, 6], 3), n.input("scale", &[1, 6]));
        let w = n.op_with("DequantizeLinear", &[w, scale], &[("axis", int(0)), ("block_size", int(16))]);
        let y = n.op("MatMul", &[y, w]);
        n.output(y);
        assert_eq!(n.passed(small), ["DequantizeLinear", "MatMul", "DequantizeLinear", "MatMul"]);
    }

    #[test]
    fn several_readers_share_weights() {
        let mut n = Net::new(21);
        let x = n.input("x", &[3, 32]);
        let w = Form::blocks(DType::I4, [32, 32], false, 16).dequantized(&mut n, false);
        let y = n.op("MatMul", &[x, w]);
        let y = n.op("MatMul", &[y, w]);
        n.output(y);
        let graph = n.apply(small);
        n.check(&graph);
        assert_eq!(names(&graph), [NBITS, NBITS]);
        assert_eq!(graph.nodes[0].inputs[1..], graph.nodes[1].inputs[1..]);
        // What the model had is gone.
        let dtypes = graph.values.iter().filter_map(|v| v.constant.as_ref()).map(|t| t.dtype());
        assert_eq!(dtypes.collect::<Vec<_>>(), [DType::U8, DType::F32]);
        // A reader that is no product keeps them.
        let y = n.op("Add", &[y, w]);
        n.facts[0] = Fact::new(DType::F32, &[32, 32]);
        n.graph.outputs = vec![y];
        assert_eq!(n.passed(small), ["DequantizeLinear", NBITS, NBITS, "Add"]);
    }

    #[test]
    fn among_the_other_passes() {
        for (size, want) in [([512, 512], NBITS), ([64, 64], "MatMul")] {
            let mut n = Net::new(21);
            let x = n.input("x", &[2, size[0]]);
            let w = Form::blocks(DType::I4, size, false, 32).dequantized(&mut n, false);
            let y = n.op("MatMul", &[x, w]);
            let bias = n.weights(&[size[1]]);
            let y = n.op("Add", &[y, bias]);
            n.output(y);
            assert_eq!(n.optimized(), [want]);
        }
        // Bodies of loops keep what they have: nothing would be let go.
        let mut n = Net::new(21);
        let x = n.input("x", &[2, 512]);
        let w = Form::blocks(DType::I4, [512, 1024], false, 32).dequantized(&mut n, false);
        let y = n.op("MatMul", &[x, w]);
        n.output(y);
        let graph = with_cx(|cx| optimize(n.graph.clone(), &n.facts, false, cx).unwrap());
        assert_eq!(names(&graph), ["DequantizeLinear", "MatMul"]);
    }
}
