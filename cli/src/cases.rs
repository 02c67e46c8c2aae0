//! `weblane conformance` and `weblane golden`: models with inputs and the outputs that they must give.

use crate::{EngineArgs, read_model};
use anyhow::{Context, Result, anyhow, bail};
use base64::Engine as _;
use clap::Args;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use weblane_engine::storage::AlignedBytes;
use weblane_engine::{DType, Error, ErrorCode, Options, Session, Tensor, TensorView, for_dtype};

/// A tensor of a golden or conformance file.
#[derive(Deserialize)]
struct TensorJson {
    name: Option<String>,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    dtype: String,
    #[serde(default)]
    dims: Vec<usize>,
    #[serde(default)]
    b64: Option<String>,
    #[serde(default)]
    strings: Option<Vec<String>>,
    #[serde(default)]
    rtol: Option<f64>,
}

#[derive(Deserialize)]
struct Set {
    inputs: Vec<TensorJson>,
    outputs: Vec<TensorJson>,
}

#[derive(Deserialize)]
struct Case {
    #[serde(default)]
    rtol: f64,
    #[serde(default)]
    atol: f64,
    /// Of quantised models: the least cosine of outputs, in place of `rtol` and `atol`.
    #[serde(default)]
    cosine: Option<f64>,
    sets: Vec<Set>,
    /// Names, in golden files.
    #[serde(default)]
    inputs: Vec<String>,
    #[serde(default)]
    outputs: Vec<String>,
}

impl TensorJson {
    fn tensor(&self) -> Result<Tensor> {
        if self.kind.as_deref().is_some_and(|k| k != "tensor") {
            let kind = self.kind.as_deref().unwrap_or_default();
            return Err(Error::new(ErrorCode::UnsupportedDtype, format!("a {kind}; tensors can be given")).into());
        }
        let dtype = dtype(&self.dtype)?;
        if let Some(strings) = &self.strings {
            return Ok(Tensor::from_strings(&self.dims, strings.clone())?);
        }
        let b64 = self.b64.as_ref().ok_or_else(|| anyhow!("a tensor without elements"))?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(b64)?;
        Ok(Tensor::from_bytes(dtype, &self.dims, AlignedBytes::copy_of(&bytes)?)?)
    }
}

/// ONNX's names of element types, and NumPy's.
fn dtype(name: &str) -> Result<DType> {
    let alias = match name {
        "float" => "float32",
        "double" => "float64",
        other => other,
    };
    DType::ALL
        .iter()
        .copied()
        .find(|d| d.as_str() == alias)
        .ok_or_else(|| Error::new(ErrorCode::UnsupportedDtype, format!("element type {name} is not supported")).into())
}

/// Refuses a tensor whose angle to the wanted one has a cosine of less than `least`.
fn compare_angle(got: &Tensor, want: &Tensor, least: f64) -> Result<()> {
    if got.dtype() != want.dtype() || got.dims() != want.dims() {
        bail!("got {} {:?}, wanted {} {:?}", got.dtype(), got.dims(), want.dtype(), want.dims());
    }
    let (got, want) = (floats(got)?, floats(want)?);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = dot(&got, &want) / (dot(&got, &got) * dot(&want, &want)).sqrt();
    if cosine >= least { Ok(()) } else { bail!("the cosine is {cosine}, at least {least} was wanted") }
}

/// Says where two tensors differ by more than `atol + rtol * |want|`.
fn compare(got: &Tensor, want: &Tensor, rtol: f64, atol: f64) -> Result<()> {
    if got.dtype() != want.dtype() || got.dims() != want.dims() {
        bail!("got {} {:?}, wanted {} {:?}", got.dtype(), got.dims(), want.dtype(), want.dims());
    }
    if got.strings() != want.strings() {
        bail!("the strings differ");
    }
    let (got, want) = (floats(got)?, floats(want)?);
    let mut worst: Option<(usize, f64)> = None;
    let mut wrong = 0;
    for (i, (&g, &w)) in got.iter().zip(&want).enumerate() {
        let close = g == w || (g.is_nan() && w.is_nan()) || (g - w).abs() <= atol + rtol * w.abs();
        if !close {
            wrong += 1;
            let error = if (g - w).is_nan() { f64::INFINITY } else { (g - w).abs() };
            if worst.is_none_or(|(_, e)| error > e) {
                worst = Some((i, error));
            }
        }
    }
    match worst {
        None => Ok(()),
        Some((i, _)) => {
            bail!("{wrong} of {} elements differ, worst {i}: got {}, wanted {}", got.len(), got[i], want[i])
        }
    }
}

fn floats(t: &Tensor) -> Result<Vec<f64>> {
    if t.dtype() == DType::String {
        return Ok(Vec::new());
    }
    Ok(match t.dtype() {
        DType::F16 => t.as_slice::<f16>()?.iter().map(|x| x.to_f64()).collect(),
        DType::Bf16 => t.as_slice::<bf16>()?.iter().map(|x| x.to_f64()).collect(),
        // Exact up to 2^53; larger values of test cases are compared to that precision.
        DType::I64 => t.as_slice::<i64>()?.iter().map(|&x| x as f64).collect(),
        DType::U64 => t.as_slice::<u64>()?.iter().map(|&x| x as f64).collect(),
        DType::U4 | DType::I4 => t.bytes().iter().map(|&x| f64::from(x)).collect(),
        other => for_dtype!(other, [F32, F64, I8, I16, I32, U8, U16, U32, Bool], T =>
            t.as_slice::<T>()?.iter().map(|&x| f64::from(x)).collect(), else bail!("{other} cannot be compared")),
    })
}

fn check(session: &mut Session, case: &Case) -> Result<()> {
    for (s, set) in case.sets.iter().enumerate() {
        let mut feeds = Vec::new();
        for (i, t) in set.inputs.iter().enumerate() {
            let name = t.name.clone().or_else(|| case.inputs.get(i).cloned());
            let name = name.or_else(|| session.inputs().get(i).map(|v| v.name.clone()));
            let name = name.ok_or_else(|| anyhow!("input {i} has no name"))?;
            // A case may list an input that the graph has as an initializer.
            if session.inputs().iter().any(|v| v.name == name) {
                feeds.push((name, t.tensor()?));
            }
        }
        let views: Vec<(&str, TensorView)> = feeds.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        let got = session.run(&views)?;
        for (i, want) in set.outputs.iter().enumerate() {
            let name = want.name.as_ref().or_else(|| case.outputs.get(i));
            let at = match name {
                Some(name) => session.outputs().iter().position(|v| v.name == *name),
                None => Some(i),
            };
            let got = at.and_then(|at| got.get(at)).ok_or_else(|| anyhow!("output {i} is missing"))?;
            let wanted = want.tensor()?;
            match case.cosine {
                Some(least) => compare_angle(got, &wanted, least),
                None => compare(got, &wanted, want.rtol.unwrap_or(case.rtol), case.atol),
            }
            .with_context(|| format!("set {s}, output {i}"))?;
        }
    }
    Ok(())
}

/// Runs a file of goldens.
#[derive(Args)]
pub(crate) struct Golden {
    /// The .onnx file
    model: PathBuf,
    /// The .json file with inputs and outputs
    data: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
}

impl Golden {
    pub(crate) fn run(self) -> Result<()> {
        let case: Case = serde_json::from_str(&std::fs::read_to_string(&self.data)?)?;
        let mut session = crate::open(&self.model, &self.engine)?;
        check(&mut session, &case)?;
        println!("ok  {}  {} sets", self.model.display(), case.sets.len());
        Ok(())
    }
}

/// Runs ONNX's own cases.
#[derive(Args)]
pub(crate) struct Conformance {
    /// Folder with index.json
    #[arg(long, default_value = "target/conformance")]
    cases: PathBuf,
    /// File for the results
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only cases whose kind/name matches this regular expression
    #[arg(long = "match", value_name = "REGEX")]
    matching: Option<String>,
    /// Print each case that does not pass
    #[arg(long)]
    verbose: bool,
    /// The same as --optimize none
    #[arg(long)]
    no_optimize: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Deserialize)]
struct Entry {
    name: String,
    kind: String,
    path: String,
    ops: Vec<String>,
}

#[derive(Serialize)]
struct Outcome {
    name: String,
    ops: Vec<String>,
    status: &'static str,
    message: String,
}

impl Conformance {
    pub(crate) fn run(mut self) -> Result<()> {
        if self.no_optimize {
            self.engine.optimize = crate::OptimizeArg::None;
        }
        let options = self.engine.options()?;
        let filter = self.matching.as_deref().map(regex::Regex::new).transpose()?;
        let index = self.cases.join("index.json");
        let text = std::fs::read_to_string(&index)
            .with_context(|| format!("cannot read {}; models/export_conformance.py writes it", index.display()))?;
        let entries: Vec<Entry> = serde_json::from_str(&text)?;
        let mut outcomes = Vec::new();
        // A defect that panics fails its case, not the report.
        std::panic::set_hook(Box::new(|_| {}));
        for entry in entries {
            let name = format!("{}/{}", entry.kind, entry.name);
            if filter.as_ref().is_some_and(|f| !f.is_match(&name)) {
                continue;
            }
            let folder = self.cases.join(&entry.path);
            let run = std::panic::catch_unwind(|| run_case(&folder, options.clone()));
            let (status, message) = match run {
                Ok(Ok(())) => ("pass", String::new()),
                Ok(Err(e)) if is_unsupported(&e) => ("unsupported", format!("{e:#}")),
                Ok(Err(e)) => ("fail", format!("{e:#}")),
                Err(_) => ("fail", "the engine panicked".to_owned()),
            };
            outcomes.push(Outcome { name, ops: entry.ops, status, message });
        }
        let _ = std::panic::take_hook();
        self.report(&outcomes)
    }

    fn report(&self, outcomes: &[Outcome]) -> Result<()> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for o in outcomes {
            *counts.entry(o.status).or_default() += 1;
            if self.verbose && o.status != "pass" {
                println!("{:11}  {}  {}", o.status, o.name, o.message);
            }
        }
        if let Some(path) = &self.json {
            let body = serde_json::json!({ "results": outcomes });
            std::fs::write(path, serde_json::to_vec(&body)?)?;
        }
        println!("{} cases: {counts:?}", outcomes.len());
        Ok(())
    }
}

fn is_unsupported(e: &anyhow::Error) -> bool {
    e.chain().filter_map(|e| e.downcast_ref::<Error>()).any(|e| {
        matches!(e.code, ErrorCode::UnsupportedOperator | ErrorCode::UnsupportedDtype | ErrorCode::UnsupportedAttribute)
    })
}

fn run_case(folder: &Path, options: Options) -> Result<()> {
    let case: Case = serde_json::from_str(&std::fs::read_to_string(folder.join("case.json"))?)?;
    let mut session = Session::new(read_model(&folder.join("model.onnx"))?, options)?;
    check(&mut session, &case)
}
