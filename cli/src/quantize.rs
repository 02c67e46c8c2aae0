//! `weblane quantize`: a smaller and faster model from a float one.

use crate::run::read_npy_from;
use crate::{EngineArgs, read_model};
use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use std::fs::File;
use std::io::{BufReader, Write as _};
use std::path::{Path, PathBuf};
use weblane_engine::Tensor;
use weblane_engine::onnx::Model;
use weblane_engine::quantize::{Method, Mode, Progress, QuantizeOptions, Report, Sample, inputs, quantize};
use weblane_engine::session::ValueInfo;

#[derive(Clone, Copy, ValueEnum)]
enum ModeArg {
    Dynamic,
    Static,
    Int4,
    Int8Weights,
    Float16,
    Float32,
}

#[derive(Clone, Copy, ValueEnum)]
enum MethodArg {
    Minmax,
    Percentile,
    Entropy,
}

/// Quantises a model, or converts it to another precision.
#[derive(Args)]
pub(crate) struct Quantize {
    /// The .onnx file
    model: PathBuf,
    /// The file to write
    #[arg(short, long)]
    output: PathBuf,
    /// dynamic: 8-bit products, activations quantised as they come. static: 8-bit operators, needs --calibration.
    /// int4, int8-weights: weights only. float16, float32: another precision
    #[arg(long, value_enum, default_value = "dynamic")]
    mode: ModeArg,
    /// Inputs of sample runs: a folder, or a file. An .npz holds one sample, an array for each input; an .npy is one
    /// sample of a model with one input. Also compares the result with the float model
    #[arg(long, value_name = "PATH")]
    calibration: Option<PathBuf>,
    /// How ranges follow from samples
    #[arg(long, value_enum, default_value = "minmax")]
    method: MethodArg,
    /// Share of values inside of the range, for --method percentile
    #[arg(long, default_value_t = 99.99)]
    percentile: f64,
    /// Node to leave as it is; * and ? match many. May be given more than once
    #[arg(long, value_name = "NAME")]
    skip_node: Vec<String>,
    /// Operator to leave as it is
    #[arg(long, value_name = "OPERATOR")]
    skip_op: Vec<String>,
    /// One scale per tensor of weights instead of one per channel
    #[arg(long)]
    per_tensor: bool,
    /// Weights of 7 bits, for runtimes whose 8-bit products saturate
    #[arg(long)]
    reduce_range: bool,
    /// Leave the tables of Gather as they are
    #[arg(long)]
    keep_embeddings: bool,
    /// Weights that share a scale, for int4 and int8-weights
    #[arg(long, default_value_t = 32)]
    block_size: usize,
    /// With zero points, for int4 and int8-weights
    #[arg(long)]
    asymmetric: bool,
    /// How exact a runtime has to be with int4 and int8-weights: 0 its choice, 1 float32, 4 int8
    #[arg(long, default_value_t = 0)]
    accuracy_level: i64,
    /// int8 activations instead of uint8, for static
    #[arg(long)]
    signed_activations: bool,
    /// Inputs and outputs become float16 too
    #[arg(long)]
    convert_io: bool,
    /// Samples to compare the result on; all by default
    #[arg(long, value_name = "N")]
    compare: Option<usize>,
    /// File for the report, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print nothing but the totals
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

impl Quantize {
    pub(crate) fn run(self) -> Result<()> {
        let model = read_model(&self.model)?;
        let samples = match &self.calibration {
            Some(path) => read_samples(path, &model).with_context(|| format!("samples of {}", path.display()))?,
            None => Vec::new(),
        };
        let options = self.options();
        let engine = self.engine.options()?;
        let mut shown = None;
        let mut tell = |p: Progress| {
            // A line for each tenth of a stage.
            let now = (p.stage, p.done * 10 / p.total.max(1));
            if !self.quiet && shown != Some(now) {
                shown = Some(now);
                eprint!("\r{:?} {} of {}   ", p.stage, p.done, p.total);
                let _ = std::io::stderr().flush();
            }
            true
        };
        let result = quantize(model, options, samples, engine, &mut tell);
        if !self.quiet {
            eprintln!();
        }
        let (model, report) = result?;
        std::fs::write(&self.output, model.to_bytes())
            .with_context(|| format!("cannot write {}", self.output.display()))?;
        if let Some(path) = &self.report {
            std::fs::write(path, serde_json::to_vec_pretty(&report)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.print(&report);
        Ok(())
    }

    fn options(&self) -> QuantizeOptions {
        QuantizeOptions {
            mode: match self.mode {
                ModeArg::Dynamic => Mode::Dynamic,
                ModeArg::Static => Mode::Static,
                ModeArg::Int4 => Mode::Int4,
                ModeArg::Int8Weights => Mode::Int8Weights,
                ModeArg::Float16 => Mode::Float16,
                ModeArg::Float32 => Mode::Float32,
            },
            skip_nodes: self.skip_node.clone(),
            skip_ops: self.skip_op.clone(),
            per_channel: !self.per_tensor,
            reduce_range: self.reduce_range,
            embeddings: !self.keep_embeddings,
            block_size: self.block_size,
            symmetric: !self.asymmetric,
            accuracy_level: self.accuracy_level,
            method: match self.method {
                MethodArg::Minmax => Method::MinMax,
                MethodArg::Percentile => Method::Percentile,
                MethodArg::Entropy => Method::Entropy,
            },
            percentile: self.percentile,
            signed_activations: self.signed_activations,
            keep_io: !self.convert_io,
            compare: self.compare,
        }
    }

    fn print(&self, report: &Report) {
        let db = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.1}"));
        if !self.quiet && !report.nodes.is_empty() {
            println!("{:>10}  {:>10}  {:>9}  {:24}  operator, node", "weights dB", "output dB", "kB", "became");
            for n in &report.nodes {
                let size =
                    if n.bytes_after == 0 { "-".to_owned() } else { format!("{:.1}", n.bytes_after as f64 / 1e3) };
                let (w, o) = (db(n.sqnr_db), db(n.output_sqnr_db));
                println!("{w:>10}  {o:>10}  {size:>9}  {:24}  {} {}", n.kind, n.op, n.node);
            }
        }
        if !self.quiet {
            for s in &report.skipped {
                println!("left: {} {}: {}", s.op, s.node, s.reason);
            }
        }
        for o in &report.outputs {
            let top1 = o.top1.map_or_else(String::new, |t| format!("  top-1 {:.2}%", 100.0 * t));
            println!(
                "output {}: cosine {:.6} (least {:.6})  max error {:.4e}{top1}  over {} samples",
                o.name, o.cosine, o.min_cosine, o.max_error, o.samples
            );
        }
        let (before, after) = (report.bytes_before as f64, report.bytes_after as f64);
        let nodes = report.nodes.len();
        println!("{nodes} entries, {:.2} MB -> {:.2} MB ({:.1}%)", before / 1e6, after / 1e6, 100.0 * after / before);
    }
}

fn read_samples(path: &Path, model: &Model) -> Result<Vec<Sample>> {
    let inputs = inputs(model)?;
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        files = std::fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
        files.retain(|f| f.extension().is_some_and(|e| e == "npz" || e == "npy"));
        files.sort();
    }
    if files.is_empty() {
        bail!("there is no .npz or .npy file");
    }
    files.iter().map(|f| read_sample(f, &inputs).with_context(|| f.display().to_string())).collect()
}

fn read_sample(path: &Path, inputs: &[ValueInfo]) -> Result<Sample> {
    if path.extension().is_some_and(|e| e == "npy") {
        let [input] = inputs else {
            bail!("an .npy file is for a model with one input; this one has {}, which an .npz can hold", inputs.len());
        };
        let tensor = read_npy_from(BufReader::new(File::open(path)?), Some(input.dtype))?;
        return Ok(vec![(input.name.clone(), tensor)]);
    }
    let mut archive = zip::ZipArchive::new(BufReader::new(File::open(path)?))?;
    // A file inside the archive has the input's name, and the ending that NumPy gives it.
    let names: Vec<String> = archive.file_names().map(|n| n.trim_end_matches(".npy").to_owned()).collect();
    if let Some(odd) = names.iter().find(|n| inputs.iter().all(|i| i.name != **n)) {
        let known = inputs.iter().map(|i| i.name.as_str()).collect::<Vec<_>>().join("\", \"");
        bail!("\"{odd}\" is no input of the model; its inputs are \"{known}\"");
    }
    inputs
        .iter()
        .map(|i| {
            let file = archive.by_name(&format!("{}.npy", i.name));
            let file = file.map_err(|e| anyhow!("the input \"{}\": {e}", i.name))?;
            let tensor: Tensor = read_npy_from(file, Some(i.dtype))?;
            Ok((i.name.clone(), tensor))
        })
        .collect()
}
