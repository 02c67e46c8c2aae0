//! Putting windows back: Col2Im, MaxUnpool. Plain loops over any element type.

use crate::naive::Number;

/// One axis of windows over an image.
#[derive(Clone, Copy, Debug)]
pub struct PatchAxis {
    /// Size of the image.
    pub image: usize,
    /// Size of a window.
    pub block: usize,
    /// Number of windows.
    pub windows: usize,
    /// Steps between windows.
    pub stride: usize,
    /// Steps between elements of a window.
    pub dilation: usize,
    /// Padding before.
    pub begin: usize,
}

/// Adds the columns of `x`, `[planes, block..., windows...]`, to images `y`, `[planes, image...]`.
///
/// # Panics
/// If slices do not have these sizes.
pub fn col2im<T: Number>(x: &[T], planes: usize, axes: &[PatchAxis], y: &mut [T]) {
    y.fill(T::ZERO);
    let block: usize = axes.iter().map(|a| a.block).product();
    let windows: usize = axes.iter().map(|a| a.windows).product();
    let image: usize = axes.iter().map(|a| a.image).product();
    for plane in 0..planes {
        for b in 0..block {
            for w in 0..windows {
                let (mut b_rest, mut w_rest, mut at, mut step) = (b, w, Some(0), 1);
                for a in axes.iter().rev() {
                    let position = w_rest % a.windows * a.stride + b_rest % a.block * a.dilation;
                    let inside = position.checked_sub(a.begin).filter(|&p| p < a.image);
                    at = at.zip(inside).map(|(at, p)| at + p * step);
                    step *= a.image;
                    b_rest /= a.block;
                    w_rest /= a.windows;
                }
                if let Some(at) = at {
                    let y = &mut y[plane * image + at];
                    *y = y.plus(x[(plane * block + b) * windows + w]);
                }
            }
        }
    }
}

/// `y[indices[i]] = x[i]`, zeros elsewhere. Returns whether all indices were inside.
pub fn scatter_maxima<T: Number>(x: &[T], indices: &[i64], y: &mut [T]) -> bool {
    y.fill(T::ZERO);
    x.iter().zip(indices).all(|(&v, &i)| {
        let to = usize::try_from(i).ok().and_then(|i| y.get_mut(i));
        to.map(|y| *y = v).is_some()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_add_up() {
        let axis = PatchAxis { image: 3, block: 2, windows: 2, stride: 1, dilation: 1, begin: 0 };
        let mut y = [9.0; 3];
        col2im(&[1.0, 2.0, 10.0, 20.0], 1, &[axis], &mut y);
        assert_eq!(y, [1.0, 12.0, 20.0]);
        col2im(&[1.0, 2.0, 10.0, 20.0], 1, &[PatchAxis { begin: 1, ..axis }], &mut y);
        assert_eq!(y, [12.0, 20.0, 0.0]);
    }

    #[test]
    fn maxima_go_back() {
        let mut y = [1; 3];
        assert!(scatter_maxima(&[7], &[2], &mut y));
        assert_eq!(y, [0, 0, 7]);
        assert!(!scatter_maxima(&[7], &[3], &mut y) && !scatter_maxima(&[7], &[-1], &mut y));
    }
}
