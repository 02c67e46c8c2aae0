//! Attention by the textbook.

use crate::attention::Attention;

/// The result of [`crate::attention::attention`] in `f64`, at the places its strides give.
pub fn attention(a: &Attention) -> Vec<f64> {
    let mut y = vec![0.0; a.batch * a.heads * a.queries * a.value_size];
    for b in 0..a.batch {
        for h in 0..a.heads {
            let kv = h / (a.heads / a.kv_heads);
            for i in 0..a.queries {
                let q = &a.q.data[b * a.q.strides[0] + h * a.q.strides[1] + i * a.q.strides[2]..];
                let score = |j: usize| {
                    let k = &a.k.data[b * a.k.strides[0] + kv * a.k.strides[1] + j * a.k.strides[2]..];
                    let dot: f64 = (0..a.size).map(|e| f64::from(q[e]) * f64::from(k[e])).sum();
                    let mut s = dot * f64::from(a.scale);
                    if a.cap != 0.0 {
                        s = f64::from(a.cap) * (s / f64::from(a.cap)).tanh();
                    }
                    if let Some(m) = a.mask {
                        let at = b * m.strides[0] + h * m.strides[1] + i * m.strides[2] + j;
                        let element = if j < m.keys { f64::from(m.data[at]) } else { f64::NEG_INFINITY };
                        s = if m.replaces && element != 0.0 { element } else { s + element };
                    }
                    if a.visible.is_some_and(|f| !f(b, i).contains(&j)) { f64::NEG_INFINITY } else { s }
                };
                let scores: Vec<f64> = (0..a.keys).map(score).collect();
                let sink = a.sinks.map_or(f64::NEG_INFINITY, |s| f64::from(s[h]));
                let max = scores.iter().copied().fold(sink, f64::max);
                let at = b * a.y_strides[0] + h * a.y_strides[1] + i * a.y_strides[2];
                if max == f64::NEG_INFINITY {
                    let none = if a.keys == 0 { 0.0 } else { f64::from(a.unseen) };
                    y[at..][..a.value_size].fill(none);
                    continue;
                }
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum::<f64>() + (sink - max).exp();
                for (j, s) in scores.iter().enumerate() {
                    let v = &a.v.data[b * a.v.strides[0] + kv * a.v.strides[1] + j * a.v.strides[2]..];
                    for e in 0..a.value_size {
                        y[at + e] += (s - max).exp() / sum * f64::from(v[e]);
                    }
                }
            }
        }
    }
    y
}
