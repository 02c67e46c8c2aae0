//! Which instruction set runs: looked up once, checked at every dispatch.
//!
//! The functions marked `#[target_feature]` here are the only ones in the crate. A kernel is inlined into one of them
//! per instruction set; whatever is called through a pointer (a `dyn Fn` task of [`crate::par::Cx`], say) is not, so
//! a parallel kernel dispatches inside its task, not around the loop. A dispatch costs a load, a test and a jump.

use super::Kernel;
use core::fmt;
use core::str::FromStr;
use std::sync::OnceLock;

/// An instruction set that kernels are written for, ordered by capability.
///
/// Every variant exists on every target, so that names can be parsed and printed anywhere; [`Isa::compiled`] has those
/// of this build and [`Isa::available`] those that this processor can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// No vector instructions: one lane.
    Scalar,
    /// WebAssembly SIMD128: 4 lanes, no fused multiply-add.
    WasmSimd128,
    /// WebAssembly SIMD128 with relaxed SIMD: 4 lanes, multiply-add fused where the processor can.
    WasmRelaxedSimd,
    /// Arm NEON: 4 lanes, fused multiply-add.
    Neon,
    /// x86 SSE4.1: 4 lanes, no fused multiply-add.
    Sse41,
    /// x86 with 128-bit vectors, VEX encoding and fused multiply-add: what WebAssembly could reach at best on an x86
    /// processor, hence the yardstick that measures what WebAssembly costs.
    Fma128,
    /// x86 AVX2 with FMA and F16C: 8 lanes.
    Avx2,
    /// x86 AVX-512 F, VL, BW and DQ: 16 lanes.
    Avx512,
}

/// Why an instruction set asked for by name cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IsaError {
    /// No instruction set has this name.
    Unknown(String),
    /// This build or this processor does not have it.
    Unavailable(Isa),
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |isas: &[Isa]| isas.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
        match self {
            Self::Unknown(name) => write!(f, "unknown instruction set '{name}', expected one of: {}", list(&Isa::ALL)),
            Self::Unavailable(isa) => {
                write!(f, "instruction set '{isa}' is not available here, expected one of: {}", list(&Isa::available()))
            }
        }
    }
}

impl std::error::Error for IsaError {}

impl Isa {
    /// Every instruction set of every target, weakest first.
    pub const ALL: [Self; 8] = [
        Self::Scalar,
        Self::WasmSimd128,
        Self::WasmRelaxedSimd,
        Self::Neon,
        Self::Sse41,
        Self::Fma128,
        Self::Avx2,
        Self::Avx512,
    ];

    /// The name that [`FromStr`] reads and [`Display`](fmt::Display) writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::WasmSimd128 => "wasm-simd128",
            Self::WasmRelaxedSimd => "wasm-relaxed-simd",
            Self::Neon => "neon",
            Self::Sse41 => "sse4.1",
            Self::Fma128 => "fma128",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Number of 32-bit lanes.
    pub const fn lanes(self) -> usize {
        match self {
            Self::Scalar => 1,
            Self::WasmSimd128 | Self::WasmRelaxedSimd | Self::Neon | Self::Sse41 | Self::Fma128 => 4,
            Self::Avx2 => 8,
            Self::Avx512 => 16,
        }
    }

    /// The strongest instruction set up to this one, and available, whose vectors have no more than `lanes` lanes; but vectors
    /// it has if this one has any. For rows too short to fill wider ones.
    pub(crate) fn narrowed(self, lanes: usize) -> Self {
        let fits = |isa: &Self| *isa <= self && isa.lanes() <= lanes.max(4) && isa.is_available();
        Self::compiled().iter().copied().rev().find(fits).unwrap_or(self)
    }

    /// The instruction sets this build has code for, weakest first.
    ///
    /// On wasm that is exactly one, since an engine rejects a module with an opcode it does not know.
    pub const fn compiled() -> &'static [Self] {
        if cfg!(target_arch = "x86_64") {
            &[Self::Scalar, Self::Sse41, Self::Fma128, Self::Avx2, Self::Avx512]
        } else if cfg!(target_arch = "aarch64") {
            &[Self::Scalar, Self::Neon]
        } else if cfg!(all(target_arch = "wasm32", target_feature = "relaxed-simd")) {
            &[Self::WasmRelaxedSimd]
        } else if cfg!(all(target_arch = "wasm32", target_feature = "simd128")) {
            &[Self::WasmSimd128]
        } else {
            &[Self::Scalar]
        }
    }

    /// The compiled instruction sets that this processor has, weakest first; never empty.
    pub fn available() -> Vec<Self> {
        Self::compiled().iter().copied().filter(|isa| isa.is_available()).collect()
    }

    /// Whether [`dispatch`] can use it here.
    #[inline]
    pub fn is_available(self) -> bool {
        available_bits() & self.bit() != 0
    }

    /// The strongest available instruction set, or the one that the environment variable `WEBLANE_ISA` names.
    ///
    /// Looked up once per process.
    ///
    /// # Errors
    /// If `WEBLANE_ISA` holds an unknown name or one that this processor cannot run.
    pub fn from_env() -> Result<Self, IsaError> {
        static CHOICE: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        CHOICE
            .get_or_init(|| {
                // wasm has no environment: there the choice is which module was loaded.
                match std::env::var("WEBLANE_ISA") {
                    Ok(name) if !name.is_empty() => name.parse::<Self>()?.require(),
                    _ => {
                        let strongest = Self::compiled().iter().rev().copied().find(|isa| isa.is_available());
                        Ok(strongest.expect("the weakest compiled instruction set is the target's baseline"))
                    }
                }
            })
            .clone()
    }

    /// [`Isa::from_env`] for callers that cannot report an error.
    ///
    /// # Panics
    /// If `WEBLANE_ISA` holds an unknown name or one that this processor cannot run. A program that takes input from
    /// people calls [`Isa::from_env`] first.
    pub fn best() -> Self {
        match Self::from_env() {
            Ok(isa) => isa,
            Err(error) => panic!("WEBLANE_ISA: {error}"),
        }
    }

    /// The same, if [`dispatch`] can use it here.
    ///
    /// # Errors
    /// [`IsaError::Unavailable`] otherwise.
    pub fn require(self) -> Result<Self, IsaError> {
        if self.is_available() { Ok(self) } else { Err(IsaError::Unavailable(self)) }
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }

    fn detect(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Sse41 => is_x86_feature_detected!("sse4.1"),
            #[cfg(target_arch = "x86_64")]
            Self::Fma128 => is_x86_feature_detected!("avx") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.detect()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
            }
            // The target's baseline: scalar code, NEON on aarch64, on wasm what the module was compiled for.
            _ => true,
        }
    }
}

/// One bit per available instruction set.
#[cfg(not(target_arch = "wasm32"))]
#[inline]
fn available_bits() -> u32 {
    use core::sync::atomic::{AtomicU32, Ordering};
    // Zero means "not looked yet", since something is always available. Relaxed: the value stands alone, and two
    // threads that look at the same time store the same.
    static BITS: AtomicU32 = AtomicU32::new(0);
    #[cold]
    fn look() -> u32 {
        Isa::compiled().iter().filter(|isa| isa.detect()).fold(0, |bits, isa| bits | isa.bit())
    }
    match BITS.load(Ordering::Relaxed) {
        0 => {
            let bits = look();
            BITS.store(bits, Ordering::Relaxed);
            bits
        }
        bits => bits,
    }
}

/// One bit: the module would not have been loaded without its instruction set.
#[cfg(target_arch = "wasm32")]
#[inline(always)]
fn available_bits() -> u32 {
    debug_assert!(Isa::compiled()[0].detect());
    Isa::compiled()[0].bit()
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;
    fn from_str(name: &str) -> Result<Self, IsaError> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| IsaError::Unknown(name.to_owned()))
    }
}

/// Runs `kernel` with the vectors of `isa`.
///
/// # Panics
/// If `isa` is not [available](Isa::is_available). [`Isa::best`], [`Isa::available`] and [`Isa::require`] give only
/// those that are.
#[inline]
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    #[cold]
    fn unavailable(isa: Isa) -> ! {
        panic!("{}", IsaError::Unavailable(isa))
    }
    if !isa.is_available() {
        unavailable(isa);
    }
    match isa {
        #[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
        Isa::Scalar => kernel.run(super::scalar::Scalar),
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128", not(target_feature = "relaxed-simd")))]
        // SAFETY: this module is compiled for simd128.
        Isa::WasmSimd128 => kernel.run(unsafe { super::wasm::Simd128::new() }),
        #[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
        // SAFETY: this module is compiled for relaxed-simd.
        Isa::WasmRelaxedSimd => kernel.run(unsafe { super::wasm::RelaxedSimd::new() }),
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is part of every aarch64 target with a standard library.
        Isa::Neon => kernel.run(unsafe { super::neon::Neon::new() }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` looked for SSE4.1.
        Isa::Sse41 => unsafe { x86_trampolines::sse41(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` looked for AVX and FMA.
        Isa::Fma128 => unsafe { x86_trampolines::fma128(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` looked for AVX2, FMA and F16C.
        Isa::Avx2 => unsafe { x86_trampolines::avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `is_available` looked for AVX-512 F, VL, BW and DQ, and for what AVX2 needs.
        Isa::Avx512 => unsafe { x86_trampolines::avx512(kernel) },
        #[allow(unreachable_patterns)]
        _ => unavailable(isa),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_trampolines {
    use super::super::{Kernel, x86};

    macro_rules! trampoline {
        ($name:ident, $vector:ident, $features:literal) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name<K: Kernel>(kernel: K) -> K::Output {
                // SAFETY: this function has the features.
                kernel.run(unsafe { x86::$vector::new() })
            }
        };
    }
    trampoline!(sse41, Sse41, "sse4.1");
    trampoline!(fma128, Fma128, "avx,fma");
    trampoline!(avx2, Avx2, "avx2,fma,f16c");
    trampoline!(avx512, Avx512, "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "avx9".parse::<Isa>().unwrap_err();
        assert!(error.to_string().contains("'avx9'") && error.to_string().contains("avx512"), "{error}");
    }

    #[test]
    fn what_is_not_available_is_refused() {
        let absent = Isa::ALL.into_iter().find(|isa| !isa.is_available()).expect("no target has all of them");
        assert_eq!(absent.require(), Err(IsaError::Unavailable(absent)));
        struct Nothing;
        impl Kernel for Nothing {
            type Output = ();
            fn run<S: crate::simd::Simd>(self, _: S) {}
        }
        assert!(std::panic::catch_unwind(|| dispatch(absent, Nothing)).is_err());
    }

    #[test]
    fn narrowed_keeps_vectors_that_fit() {
        for isa in Isa::available() {
            for lanes in [0, 1, 3, 4, 7, 8, 15, 16, 99] {
                let narrowed = isa.narrowed(lanes);
                assert!(narrowed <= isa && narrowed.is_available(), "{isa} {lanes}: {narrowed}");
                assert!(narrowed.lanes() <= lanes.max(4) && narrowed.lanes() >= isa.lanes().min(4), "{isa} {lanes}");
                assert!(narrowed == isa || isa.lanes() > lanes, "{isa} {lanes}: {narrowed}");
            }
        }
    }

    #[test]
    fn levels_are_ordered() {
        assert!(Isa::ALL.is_sorted());
        assert!(Isa::compiled().is_sorted());
        assert!(Isa::available().contains(&Isa::best()));
    }
}
