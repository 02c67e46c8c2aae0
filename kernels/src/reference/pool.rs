//! Pooling by the textbook.

use crate::pool::{PoolOp, PoolShape};

/// Pools `x`, channels first, in `f64`.
pub fn pool(op: PoolOp, p: &PoolShape, x: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    let [id, ih, iw] = p.input.map(|v| v as isize);
    let taps = |axis: usize, o: usize| {
        let start = (o * p.strides[axis]) as isize - p.begin[axis] as isize;
        (0..p.kernel[axis]).map(move |k| start + (k * p.dilations[axis]) as isize)
    };
    for plane in 0..p.batch * p.channels {
        let x = &x[plane * p.input.iter().product::<usize>()..];
        for od in 0..p.output[0] {
            for oh in 0..p.output[1] {
                for ow in 0..p.output[2] {
                    let mut values = Vec::new();
                    let mut padded = 0;
                    for d in taps(0, od) {
                        for h in taps(1, oh) {
                            for w in taps(2, ow) {
                                let within = |v: isize, n: isize, axis: usize| v < n + p.end[axis] as isize;
                                padded += usize::from(within(d, id, 0) && within(h, ih, 1) && within(w, iw, 2));
                                if (0..id).contains(&d) && (0..ih).contains(&h) && (0..iw).contains(&w) {
                                    values.push(f64::from(x[((d * ih + h) * iw + w) as usize]));
                                }
                            }
                        }
                    }
                    out.push(match op {
                        PoolOp::Max => values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                        PoolOp::Average { include_pad: true } => values.iter().sum::<f64>() / padded as f64,
                        PoolOp::Average { include_pad: false } => values.iter().sum::<f64>() / values.len() as f64,
                        PoolOp::Lp { p } => {
                            let p = f64::from(p);
                            values.iter().map(|v| v.abs().powf(p)).sum::<f64>().powf(1.0 / p)
                        }
                    });
                }
            }
        }
    }
    out
}
