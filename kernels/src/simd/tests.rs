//! Every method on every instruction set against plain scalar arithmetic.

use super::*;
use crate::simd::dispatch::dispatch;

/// Values at every boundary, of every kind, and plain ones between.
fn values() -> Vec<f32> {
    let mut v = vec![
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -1.5,
        -2.5,
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        -f32::MIN_POSITIVE,
        f32::from_bits(1),
        -f32::from_bits(1),
        f32::from_bits(0x007f_ffff),
        f32::MAX,
        f32::MIN,
        8_388_607.5,
        -8_388_607.5,
        16_777_216.0,
        2_147_483_520.0,
        -2_147_483_648.0,
        3.0e9,
        0.499_999_97,
        -0.499_999_97,
        0.333_333_34,
        1e-20,
        1e20,
        f32::EPSILON,
    ];
    let mut state = 12345u32;
    for _ in 0..200 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        v.push((state >> 8) as f32 / 65536.0 - 128.0);
    }
    v
}

/// The same bits, or both NaN (whose payload is open).
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

struct Methods;

impl Kernel for Methods {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let v = values();
        let n = S::LANES;
        let get = |x: S::F32| {
            let mut out = [0.0; 16];
            s.store(&mut out, x);
            out
        };
        let geti = |x: S::I32| {
            let mut out = [0; 16];
            s.store_i32(&mut out, x);
            out
        };
        let mask = |m: S::Mask| get(s.select(m, s.splat(1.0), s.splat(0.0)));
        let name = S::ISA;
        assert_eq!(S::ISA.lanes(), n);

        // Unary and conversions, at every alignment.
        for (i, w) in v.windows(n).enumerate() {
            let a = s.load(w);
            let check = |what: &str, got: S::F32, want: &dyn Fn(f32) -> f32| {
                for (lane, (&x, got)) in w.iter().zip(get(got)).enumerate() {
                    assert!(same(got, want(x)), "{name} {what}({x:?}) = {got:?}, want {:?}, lane {lane}", want(x));
                }
            };
            check("load", a, &|x| x);
            // SAFETY: the window has `LANES` elements.
            check("load_ptr", unsafe { s.load_ptr(w.as_ptr()) }, &|x| x);
            // SAFETY: the window is not empty.
            let splat = get(unsafe { s.splat_ptr(w.as_ptr()) });
            assert!(splat[..n].iter().chain(&get(s.splat(w[0]))[..n]).all(|&x| same(x, w[0])), "{name} splat");
            check("sqrt", s.sqrt(a), &f32::sqrt);
            check("neg", s.neg(a), &|x| -x);
            check("abs", s.abs(a), &f32::abs);
            check("round", s.round(a), &f32::round_ties_even);
            check("floor", s.floor(a), &f32::floor);
            check("ceil", s.ceil(a), &f32::ceil);
            check("trunc", s.trunc(a), &f32::trunc);
            check("from_bits", s.from_bits(s.bits(a)), &|x| x);
            for (&x, got) in w.iter().zip(geti(s.bits(a))) {
                assert_eq!(got, x.to_bits() as i32, "{name} bits");
            }
            for (&x, got) in w.iter().zip(geti(s.to_i32_fast(a))) {
                if x.abs() < 2_147_483_648.0 {
                    assert_eq!(got, x as i32, "{name} to_i32_fast({x})");
                }
            }
            check("to_f32", s.to_f32(s.bits(a)), &|x| (x.to_bits() as i32) as f32);

            // Reductions: the sum in its tree, the extremes exactly.
            let mut tree = w.to_vec();
            while tree.len() > 1 {
                let half = tree.len() / 2;
                tree = (0..half).map(|i| tree[i] + tree[i + half]).collect();
            }
            assert!(same(s.reduce_add(a), tree[0]), "{name} reduce_add of {w:?}");
            let nan = w.iter().any(|x| x.is_nan());
            let (max, min) = (s.reduce_max(a), s.reduce_min(a));
            if nan {
                assert!(max.is_nan() && min.is_nan(), "{name} reductions must propagate NaN");
            } else {
                assert_eq!(max, w.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{name} reduce_max");
                assert_eq!(min, w.iter().copied().fold(f32::INFINITY, f32::min), "{name} reduce_min");
            }
            assert_eq!(s.mask_any(s.lt(a, s.splat(0.0))), w.iter().any(|&x| x < 0.0), "{name} mask_any {i}");
        }

        // Binary: every pair.
        for &y in &v {
            let b = s.splat(y);
            for w in v.windows(n).step_by(n).chain(v.windows(n).skip(v.len() - n)) {
                let a = s.load(w);
                let check = |what: &str, got: [f32; 16], want: &dyn Fn(f32, f32) -> f32| {
                    for (&x, got) in w.iter().zip(got) {
                        assert!(same(got, want(x, y)), "{name} {what}({x:?}, {y:?}) = {got:?}, want {:?}", want(x, y));
                    }
                };
                let flag = |m: bool| if m { 1.0 } else { 0.0 };
                check("add", get(s.add(a, b)), &|x, y| x + y);
                check("sub", get(s.sub(a, b)), &|x, y| x - y);
                check("mul", get(s.mul(a, b)), &|x, y| x * y);
                check("div", get(s.div(a, b)), &|x, y| x / y);
                check("mul_add_exact", get(s.mul_add_exact(a, b, a)), &|x, y| x * y + x);
                for (&x, got) in w.iter().zip(get(s.mul_add(a, b, a))) {
                    assert!(
                        same(got, x * y + x) || same(got, x.mul_add(y, x)),
                        "{name} mul_add({x:?}, {y:?}, {x:?}) = {got:?}"
                    );
                }
                let least = |x: f32, y: f32| match (x.is_nan() || y.is_nan(), x == y) {
                    (true, _) => f32::NAN,
                    (_, true) => f32::from_bits(x.to_bits() | y.to_bits()),
                    _ => x.min(y),
                };
                check("min", get(s.min(a, b)), &least);
                check("max", get(s.max(a, b)), &|x, y| -least(-x, -y));
                for (&x, (low, high)) in w.iter().zip(get(s.min_fast(a, b)).into_iter().zip(get(s.max_fast(a, b)))) {
                    if !x.is_nan() && !y.is_nan() {
                        assert!(low == x.min(y) && high == x.max(y), "{name} min_fast or max_fast({x}, {y})");
                    }
                }
                check("lt", mask(s.lt(a, b)), &|x, y| flag(x < y));
                check("le", mask(s.le(a, b)), &|x, y| flag(x <= y));
                check("eq", mask(s.eq(a, b)), &|x, y| flag(x == y));
                check("mask_and", mask(s.mask_and(s.le(a, b), s.le(b, a))), &|x, y| flag(x == y));
                check("mask_or", mask(s.mask_or(s.lt(a, b), s.lt(b, a))), &|x, y| flag(x < y || y < x));
                check("select", get(s.select(s.lt(a, b), a, b)), &|x, y| if x < y { x } else { y });

                let (ia, ib) = (s.bits(a), s.bits(b));
                let int = |x: f32| x.to_bits() as i32;
                let checki = |what: &str, got: S::I32, want: &dyn Fn(i32, i32) -> i32| {
                    for (&x, got) in w.iter().zip(geti(got)) {
                        assert_eq!(got, want(int(x), int(y)), "{name} {what}");
                    }
                };
                checki("add_i32", s.add_i32(ia, ib), &i32::wrapping_add);
                checki("sub_i32", s.sub_i32(ia, ib), &i32::wrapping_sub);
                checki("and_i32", s.and_i32(ia, ib), &|x, y| x & y);
                checki("or_i32", s.or_i32(ia, ib), &|x, y| x | y);
                checki("xor_i32", s.xor_i32(ia, ib), &|x, y| x ^ y);
                checki("shl_i32", s.shl_i32::<23>(ia), &|x, _| x << 23);
                checki("shr_i32", s.shr_i32::<23>(ia), &|x, _| x >> 23);
                checki("splat_i32", s.splat_i32(int(y)), &|_, y| y);
                check("lt_i32", mask(s.lt_i32(ia, ib)), &|x, y| flag(int(x) < int(y)));
                check("eq_i32", mask(s.eq_i32(ia, ib)), &|x, y| flag(int(x) == int(y)));
            }
        }

        // Integers in and out.
        let ints: Vec<i32> = (0..n as i32).map(|i| i * 7 - 3).collect();
        assert_eq!(geti(s.load_i32(&ints))[..n], ints, "{name} load_i32");

        let shorts: Vec<u16> = [0, 1, 0x7fff, 0x8000, 0xffff].into_iter().cycle().take(n).collect();
        let wide = s.load_u16(&shorts);
        assert!(geti(wide).iter().zip(&shorts).all(|(&w, &x)| w == i32::from(x)), "{name} load_u16");
        let mut back = vec![7; n + 1];
        s.store_u16(&mut back, wide);
        assert_eq!((&back[..n], back[n]), (&shorts[..], 7), "{name} store_u16");

        // Parts: what is missing reads as zero, and nothing beyond the end is touched.
        for len in 0..=n + 2 {
            let x: Vec<f32> = (1..=len).map(|i| i as f32).collect();
            let got = get(s.load_partial(&x));
            for (lane, &got) in got[..n].iter().enumerate() {
                assert_eq!(got, if lane < len { lane as f32 + 1.0 } else { 0.0 }, "{name} load_partial {len}");
            }
            let mut out = [-1.0f32; 20];
            s.store_partial(&mut out[..len], s.splat(5.0));
            for (i, &x) in out.iter().enumerate() {
                assert_eq!(x, if i < len.min(n) { 5.0 } else { -1.0 }, "{name} store_partial {len}");
            }
            let mut out = [-1.0f32; 20];
            // SAFETY: `out` has 20 elements.
            unsafe { s.store_ptr(out.as_mut_ptr().add(3), s.splat(5.0)) };
            assert!(out.iter().enumerate().all(|(i, &x)| (x == 5.0) == (3..3 + n).contains(&i)), "{name} store_ptr");
        }
    }
}

#[test]
fn every_method_on_every_instruction_set() {
    for &isa in Isa::compiled() {
        if isa.is_available() {
            dispatch(isa, Methods);
        } else {
            eprintln!("skipped: this processor has no {isa}");
        }
    }
}

/// Operations on short integers.
struct Shorts;

impl Kernel for Shorts {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n, name) = (S::LANES, S::ISA);
        let mut state = 7u32;
        let mut bytes = [0u8; 160];
        for (i, x) in bytes.iter_mut().enumerate() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *x = if i % 3 == 0 { [0, 255, 127, 128][i / 3 % 4] } else { (state >> 24) as u8 };
        }
        let get = |x: S::I32| {
            let mut out = [0i32; 16];
            s.store_i32(&mut out, x);
            out[..n].to_vec()
        };
        let shorts = |x: S::I32| get(x).into_iter().flat_map(bytemuck::cast::<i32, [i16; 2]>).collect::<Vec<i16>>();
        for at in 0..40 {
            let (p, q) = (bytes[at..].as_ptr(), bytes[at + 50..].as_ptr());
            // SAFETY: 64 bytes are there from all of these places on, more than any vector has.
            unsafe {
                let wide: Vec<i16> = bytes[at..at + 2 * n].iter().map(|&x| x.into()).collect();
                assert_eq!(shorts(s.widen_bytes::<false>(p)), wide, "{name} widen_bytes");
                let wide_signed: Vec<i16> = bytes[at..at + 2 * n].iter().map(|&x| (x as i8).into()).collect();
                assert_eq!(shorts(s.widen_bytes::<true>(p)), wide_signed, "{name} widen_bytes, signed");
                let long: Vec<i32> = wide[..n].iter().map(|&x| x.into()).collect();
                assert_eq!(get(s.load_bytes::<false>(p)), long, "{name} load_bytes");
                let long: Vec<i32> = wide_signed[..n].iter().map(|&x| x.into()).collect();
                assert_eq!(get(s.load_bytes::<true>(p)), long, "{name} load_bytes, signed");
                let pairs = |signed: bool| -> Vec<i16> {
                    let widen = |x: u8| if signed { (x as i8).into() } else { x.into() };
                    (0..2 * n).flat_map(|i| [widen(bytes[at + i]), widen(bytes[at + 50 + i])]).collect()
                };
                let [low, high] = s.pair_bytes::<false>(p, q);
                assert_eq!([shorts(low), shorts(high)].concat(), pairs(false), "{name} pair_bytes");
                let [low, high] = s.pair_bytes::<true>(p, q);
                assert_eq!([shorts(low), shorts(high)].concat(), pairs(true), "{name} pair_bytes, signed");
                let places = [p, q, p.add(11), q.add(7)];
                let quads: Vec<i32> = (0..4 * n)
                    .map(|i| i32::from_le_bytes([at, at + 50, at + 11, at + 57].map(|place| bytes[place + i])))
                    .collect();
                assert_eq!(s.quad_bytes(places).map(get).concat(), quads, "{name} quad_bytes");
                let mut out = [99u8; 40];
                s.store_bytes::<false>(out.as_mut_ptr(), [s.load_bytes::<false>(p), s.load_bytes::<false>(p.add(n))]);
                assert!(
                    out[..2 * n] == bytes[at..at + 2 * n] && out[2 * n..] == [99; 40][2 * n..],
                    "{name} store_bytes"
                );
                s.store_bytes::<true>(out.as_mut_ptr(), [s.load_bytes::<true>(q), s.load_bytes::<true>(q.add(n))]);
                assert!(out[..2 * n] == bytes[at + 50..at + 50 + 2 * n], "{name} store_bytes, signed");

                for (flip, zero) in [(0, 7.0), (0x80, 128.0 - 9.0)] {
                    let reals: Vec<f32> = (0..2 * n).map(|i| f32::from(bytes[at + i] ^ flip) - zero).collect();
                    let mut got = [0.0; 32];
                    for (half, x) in s.load_reals(p, flip, s.splat(zero), s.reals()).into_iter().enumerate() {
                        s.store(&mut got[half * n..], x);
                    }
                    assert_eq!(got[..2 * n], reals, "{name} load_reals");
                }
                s.store_flipped(out.as_mut_ptr(), [s.load_bytes::<false>(p), s.load_bytes::<false>(p.add(n))], 0x80);
                let flipped = (0..2 * n).all(|i| out[i] == bytes[at + i] ^ 0x80);
                assert!(flipped && out[2 * n..] == [99; 40][2 * n..], "{name} store_flipped");

                for x in [i32::MIN, -40_000, -129, -128, -1, 0, 127, 128, 255, 256, 40_000, i32::MAX] {
                    s.store_bytes::<false>(out.as_mut_ptr(), [s.splat_i32(x); 2]);
                    assert!(out[..2 * n].iter().all(|&y| i32::from(y) == x.clamp(0, 255)), "{name} store_bytes {x}");
                    s.store_bytes::<true>(out.as_mut_ptr(), [s.splat_i32(x); 2]);
                    let signed = out[..2 * n].iter().all(|&y| i32::from(y as i8) == x.clamp(-128, 127));
                    assert!(signed, "{name} store_bytes, signed {x}");
                }

                let (a, b) = (s.load_i32_ptr(p.cast()), s.load_i32_ptr(q.cast()));
                let both = || shorts(a).into_iter().zip(shorts(b));
                let plus: Vec<i16> = both().map(|(a, b)| a.wrapping_add(b)).collect();
                assert_eq!(shorts(s.add_i16(a, b)), plus, "{name} add_i16");
                let minus: Vec<i16> = both().map(|(a, b)| a.wrapping_sub(b)).collect();
                assert_eq!(shorts(s.sub_i16(a, b)), minus, "{name} sub_i16");
                let products: Vec<i32> = both().map(|(a, b)| i32::from(a) * i32::from(b)).collect();
                let dots: Vec<i32> = products.chunks(2).map(|pair| pair[0].wrapping_add(pair[1])).collect();
                assert_eq!(get(s.dot_i16(a, b)), dots, "{name} dot_i16");
                let places: Vec<u8> = bytes[at + 7..at + 7 + 4 * n].iter().map(|x| x % 16).collect();
                let window = (4 * n).min(16);
                let permuted: Vec<u8> =
                    (0..4 * n).map(|i| bytes[at + i / window * window + usize::from(places[i]) % window]).collect();
                let got = get(s.permute_bytes(a, s.load_i32_ptr(places.as_ptr().cast())));
                assert_eq!(bytemuck::cast_slice::<i32, u8>(&got), permuted, "{name} permute_bytes");
                let product = |(&a, &b): (&u8, &u8)| i32::from(a) * i32::from(b as i8);
                let products: Vec<i32> = bytes[at..].iter().zip(&bytes[at + 50..]).take(4 * n).map(product).collect();
                let saturated = |pair: &[i32]| (pair[0] + pair[1]).clamp(i16::MIN.into(), i16::MAX.into()) as i16;
                let pairs: Vec<i16> = products.chunks(2).map(saturated).collect();
                assert_eq!(shorts(s.dot_pairs_u8_i8(a, b)), pairs, "{name} dot_pairs_u8_i8");
                let times: Vec<i32> = get(a).iter().zip(get(b)).map(|(a, b)| a.wrapping_mul(b)).collect();
                assert_eq!(get(s.mul_i32(a, b)), times, "{name} mul_i32");
                assert_eq!(get(s.splat_i32_ptr(p.cast())), vec![get(a)[0]; n], "{name} splat_i32_ptr");
                assert_eq!(shorts(s.splat_i16(-77)), vec![-77; 2 * n], "{name} splat_i16");
                let mut out = [5i32; 20];
                s.store_i32_ptr(out.as_mut_ptr().wrapping_add(1), a);
                assert!(out[1..=n] == get(a) && out[0] == 5 && out[n + 1] == 5, "{name} store_i32_ptr");
            }
        }
    }
}

#[test]
fn short_integers_on_every_instruction_set() {
    for isa in Isa::available() {
        dispatch(isa, Shorts);
    }
}
