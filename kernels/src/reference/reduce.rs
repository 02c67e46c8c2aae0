//! Reductions by the textbook.

use crate::reduce::Reduction;
use ndarray::{ArrayView, Axis, IxDyn};

/// Reduces `x` of shape `dims` over the axes where `reduced` is true, in `f64`.
///
/// # Panics
/// If `x` does not have the shape.
pub fn reduce(r: Reduction, x: &[f32], dims: &[usize], reduced: &[bool]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..dims.len()).filter(|&i| !reduced[i]).collect();
    let kept: usize = order.iter().map(|&i| dims[i]).product();
    order.extend((0..dims.len()).filter(|&i| reduced[i]));
    let view = ArrayView::from_shape(IxDyn(dims), x).expect("x has the shape").permuted_axes(order);
    let flat: Vec<f64> = view.iter().map(|&v| f64::from(v)).collect();
    let rows = ArrayView::from_shape((kept, flat.len() / kept.max(1)), &flat).expect("as many elements");
    let of_row = |row: ndarray::ArrayView1<f64>| match r {
        Reduction::Sum => row.sum(),
        Reduction::Mean => row.sum() / row.len() as f64,
        Reduction::Max => row.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        Reduction::Min => row.iter().copied().fold(f64::INFINITY, f64::min),
        Reduction::Prod => row.product(),
        Reduction::L1 => row.iter().map(|v| v.abs()).sum(),
        Reduction::L2 => row.iter().map(|v| v * v).sum::<f64>().sqrt(),
        Reduction::LogSum => row.sum().ln(),
        Reduction::LogSumExp => row.iter().map(|v| v.exp()).sum::<f64>().ln(),
        Reduction::SumSquare => row.iter().map(|v| v * v).sum(),
    };
    rows.axis_iter(Axis(0)).map(of_row).collect()
}
