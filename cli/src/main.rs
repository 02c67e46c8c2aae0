//! The native program `weblane`: the same kernels and engine as in the page, for inspection, measurement and tests.

mod bench;
mod cases;
mod inspect;
mod quantize;
mod run;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use weblane_engine::onnx::Model;
use weblane_engine::session::Optimize;
use weblane_engine::storage::AlignedBytes;
use weblane_engine::{Error, ErrorCode, Options, Precision, Session};
use weblane_kernels::simd::Isa;

#[derive(Parser)]
#[command(name = "weblane", version, about = "Inspect, run and measure ONNX models on this machine's processor")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show inputs, outputs and operators of a model
    Inspect(inspect::Inspect),
    /// Run a model on .npy files and write its outputs
    Run(run::Run),
    /// Quantise a model to 8 or 4 bits, or convert it to another precision
    Quantize(Box<quantize::Quantize>),
    /// Measure runs of a model on random input
    Bench(bench::Bench),
    /// Run ONNX's own test cases, as models/export_conformance.py writes them
    Conformance(cases::Conformance),
    /// Run a model on golden inputs and compare with golden outputs
    Golden(cases::Golden),
}

#[derive(Clone, Copy, ValueEnum)]
enum OptimizeArg {
    None,
    All,
}

#[derive(Clone, Copy, ValueEnum)]
enum PrecisionArg {
    Fast,
    Exact,
}

/// How the engine is set up.
#[derive(Args)]
struct EngineArgs {
    /// Number of threads
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Instruction set, such as sse4.1, fma128, avx2 or avx512; the best one by default
    #[arg(long)]
    isa: Option<String>,
    /// Rewriting of the graph before it runs
    #[arg(long, value_enum, default_value = "all")]
    optimize: OptimizeArg,
    /// What kernels may trade for speed: fast lets convolutions use Winograd's method
    #[arg(long, value_enum, default_value = "fast")]
    precision: PrecisionArg,
}

impl EngineArgs {
    fn options(&self) -> Result<Options> {
        let isa = match &self.isa {
            None => Isa::from_env().map_err(|e| anyhow!("{e}"))?,
            Some(name) => name.parse::<Isa>().map_err(|e| anyhow!("{e}"))?,
        };
        let optimize = match self.optimize {
            OptimizeArg::None => Optimize::None,
            OptimizeArg::All => Optimize::All,
        };
        let precision = match self.precision {
            PrecisionArg::Fast => Precision::Fast,
            PrecisionArg::Exact => Precision::Exact,
        };
        Ok(Options { optimize, threads: self.threads, isa, precision })
    }
}

/// Reads a model and the files beside it that hold its external data.
fn read_model(path: &Path) -> Result<Model> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut model = Model::parse(&bytes)?;
    let folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
    model.resolve_external(|location, offset, length| read_range(&folder.join(location), offset, length))?;
    Ok(model)
}

fn read_range(path: &PathBuf, offset: u64, length: u64) -> weblane_engine::Result<AlignedBytes> {
    use std::io::{Read, Seek, SeekFrom};
    let failed = |e: std::io::Error| {
        Error::new(ErrorCode::ExternalData, format!("{length} bytes at {offset} of {}: {e}", path.display()))
    };
    let mut file = std::fs::File::open(path).map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let length = usize::try_from(length).map_err(|_| Error::limit("external data larger than memory can be"))?;
    let mut bytes = AlignedBytes::zeroed(length)?;
    file.read_exact(bytes.as_mut()).map_err(failed)?;
    Ok(bytes)
}

fn open(path: &Path, engine: &EngineArgs) -> Result<Session> {
    Ok(Session::new(read_model(path)?, engine.options()?)?)
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Inspect(c) => c.run(),
        Command::Run(c) => c.run(),
        Command::Quantize(c) => c.run(),
        Command::Bench(c) => c.run(),
        Command::Conformance(c) => c.run(),
        Command::Golden(c) => c.run(),
    }
}
