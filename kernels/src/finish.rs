//! What a product without a matching epilogue leaves to do: scale, broadcast addition, activation.
//!
//! ```text
//! for each row i, in parallel
//!     y[i, j] = activation(alpha * y[i, j] + beta * addend[i * strides[0] + j * strides[1]])
//! ```

use crate::epilogue::Activation;
use crate::par::{Cx, DisjointMut};
use crate::simd::{Kernel, Simd, dispatch};

/// The step; see the module.
#[derive(Clone, Copy, Debug)]
pub struct Finish<'a> {
    /// Length of a row of y.
    pub cols: usize,
    /// Factor of y.
    pub alpha: f32,
    /// Factor of the addend.
    pub beta: f32,
    /// What is added; nothing if absent.
    pub addend: Option<&'a [f32]>,
    /// Elements of the addend from row to row and from column to column; 0 broadcasts, columns are 0 or 1 apart.
    pub strides: [usize; 2],
    /// Applied last.
    pub activation: Activation,
}

/// Elements that make a task.
const TASK: usize = 16 * 1024;

/// Finishes `y`, rows of `cols` without gaps.
///
/// # Panics
/// If the addend is shorter than its strides want.
pub fn finish(cx: &Cx, y: &mut [f32], f: &Finish) {
    if y.is_empty() || f.cols == 0 {
        return;
    }
    let rows = y.len() / f.cols;
    let per_task = (TASK / f.cols).max(1);
    let cost = 4 * y.len() as u64;
    let out = DisjointMut::new(y);
    cx.for_each(rows.div_ceil(per_task), cost, &|task| {
        let first = task * per_task;
        let count = per_task.min(rows - first);
        // SAFETY: each task has its own rows.
        let y = unsafe { out.range(first * f.cols, count * f.cols) };
        dispatch(cx.isa(), Rows { y, first, f });
    });
}

struct Rows<'a> {
    y: &'a mut [f32],
    first: usize,
    f: &'a Finish<'a>,
}

impl Kernel for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let f = self.f;
        let alpha = s.splat(f.alpha);
        for (i, row) in self.y.chunks_exact_mut(f.cols).enumerate() {
            let addend = f.addend.map(|a| &a[(self.first + i) * f.strides[0]..]);
            let fixed = match addend {
                Some(a) if f.strides[1] == 0 => s.splat(f.beta * a[0]),
                _ => s.splat(0.0),
            };
            let moving = addend.filter(|_| f.strides[1] != 0);
            let beta = s.splat(f.beta);
            let mut j = 0;
            while j < f.cols {
                let part = &mut row[j..(j + S::LANES).min(f.cols)];
                let whole = part.len() == S::LANES;
                let x = if whole { s.load(part) } else { s.load_partial(part) };
                let added = match moving {
                    Some(a) if whole => s.mul(beta, s.load(&a[j..])),
                    Some(a) => s.mul(beta, s.load_partial(&a[j..j + part.len()])),
                    None => fixed,
                };
                let x = f.activation.apply(s, s.mul_add(alpha, x, added));
                if whole {
                    s.store(part, x)
                } else {
                    s.store_partial(part, x)
                }
                j += S::LANES;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{each_context, integers};

    #[test]
    fn matches_the_formula() {
        each_context(|cx| {
            for cols in [1, 3, 4, 7, 16, 33] {
                let y = integers(5 * cols, 1);
                for strides in [[0, 0], [0, 1], [1, 0], [cols, 1]] {
                    let addend = integers(5 * cols, 2);
                    let mut got = y.clone();
                    let activation = Activation::Relu;
                    finish(
                        cx,
                        &mut got,
                        &Finish { cols, alpha: 2.0, beta: -3.0, addend: Some(&addend), strides, activation },
                    );
                    for i in 0..5 {
                        for j in 0..cols {
                            let want = 2.0 * y[i * cols + j] - 3.0 * addend[i * strides[0] + j * strides[1]];
                            assert_eq!(got[i * cols + j], want.max(0.0), "{i} {j} of {cols}, strides {strides:?}");
                        }
                    }
                }
            }
        });
    }
}
