//! `weblane bench`: times of runs on random input, with a profile by node.

use crate::{EngineArgs, inspect::describe, open};
use anyhow::{Context, Result, ensure};
use clap::Args;
use half::f16;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;
use weblane_engine::session::Timing;
use weblane_engine::{DType, Session, Tensor, TensorView};

#[derive(Args)]
pub(crate) struct Bench {
    /// The .onnx file
    model: PathBuf,
    /// Measured runs
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Size of a named or unknown dimension as NAME=N; others are 1 for the first axis and 128 elsewhere
    #[arg(long = "dim", value_name = "NAME=N")]
    dims: Vec<String>,
    /// Shape of an input as NAME=AxB, where the model leaves it open
    #[arg(long = "shape", value_name = "NAME=AxB")]
    shapes: Vec<String>,
    /// Number that all elements of an input have as NAME=N; others get random floats, or ones
    #[arg(long = "fill", value_name = "NAME=N")]
    fills: Vec<String>,
    /// Print time, speed and memory traffic by node and by operator
    #[arg(long)]
    profile: bool,
    /// Write the profile as a trace for chrome://tracing and ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        let start = Instant::now();
        let mut session = open(&self.model, &self.engine)?;
        let loaded = start.elapsed();
        let feeds = self.random_inputs(&session)?;
        let views: Vec<(&str, TensorView)> = feeds.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        session.inputs().iter().for_each(|i| println!("input  {}", describe(i)));
        let start = Instant::now();
        session.run(&views)?;
        let first = start.elapsed();
        let mut ms = Vec::with_capacity(self.runs);
        for _ in 0..self.runs.max(1) {
            let start = Instant::now();
            session.begin(&views)?;
            session.advance(|_, _| false)?;
            ms.push(start.elapsed().as_secs_f64() * 1e3);
        }
        ms.sort_by(f64::total_cmp);
        let at = |q: f64| ms[((ms.len() - 1) as f64 * q).round() as usize];
        println!(
            "isa {}  threads {}  load {:.1} ms  first run {:.1} ms  arena {} KiB",
            session.options().isa,
            session.options().threads,
            loaded.as_secs_f64() * 1e3,
            first.as_secs_f64() * 1e3,
            session.arena_bytes() / 1024
        );
        println!("run  median {:.3} ms  quartiles {:.3} .. {:.3}  best {:.3}", at(0.5), at(0.25), at(0.75), ms[0]);
        if self.profile || self.trace.is_some() {
            let steps = profile(&mut session, &views)?;
            if self.profile {
                print(&steps);
            }
            if let Some(path) = &self.trace {
                let text = serde_json::to_string(&trace(&steps))?;
                std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn random_inputs(&self, session: &Session) -> Result<Vec<(String, Tensor)>> {
        let sizes: BTreeMap<&str, usize> = assignments(&self.dims, |v| Ok(v.parse()?))?;
        let shapes: BTreeMap<&str, Vec<usize>> = assignments(&self.shapes, |v| {
            v.split('x').filter(|n| !n.is_empty()).map(|n| Ok(n.parse()?)).collect::<Result<_>>()
        })?;
        let fills: BTreeMap<&str, f64> = assignments(&self.fills, |v| Ok(v.parse()?))?;
        for name in shapes.keys().chain(fills.keys()) {
            ensure!(session.inputs().iter().any(|i| i.name == *name), "the model has no input \"{name}\"");
        }
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut next = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 40) as f32 / (1u64 << 24) as f32
        };
        let mut feeds = Vec::new();
        for info in session.inputs() {
            let declared = info.shape.clone().unwrap_or_default();
            let declared = declared.iter().enumerate().map(|(axis, d)| {
                let fallback = if axis == 0 { 1 } else { 128 };
                d.known().unwrap_or_else(|| sizes.get(d.to_string().as_str()).copied().unwrap_or(fallback))
            });
            let dims = shapes.get(info.name.as_str()).cloned().unwrap_or_else(|| declared.collect());
            let n = dims.iter().product();
            let fill = fills.get(info.name.as_str()).copied();
            let floats: Vec<f32> = (0..n).map(|_| fill.map_or_else(&mut next, |v| v as f32)).collect();
            // Ids, masks and lengths: ones are valid for all of them.
            let whole = fill.unwrap_or(1.0);
            let tensor = match info.dtype {
                DType::F32 => Tensor::from_slice(&dims, &floats)?,
                DType::F16 => Tensor::from_slice(&dims, &floats.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>())?,
                DType::I64 => Tensor::from_slice(&dims, &vec![whole as i64; n])?,
                DType::I32 => Tensor::from_slice(&dims, &vec![whole as i32; n])?,
                other => Tensor::zeros(other, &dims)?,
            };
            feeds.push((info.name.clone(), tensor));
        }
        Ok(feeds)
    }
}

/// Arguments of the form NAME=VALUE.
fn assignments<T>(arguments: &[String], parse: impl Fn(&str) -> Result<T>) -> Result<BTreeMap<&str, T>> {
    let mut found = BTreeMap::new();
    for argument in arguments {
        let (name, value) = argument.split_once('=').with_context(|| format!("\"{argument}\" is not NAME=VALUE"))?;
        found.insert(name, parse(value).with_context(|| format!("the value in \"{argument}\""))?);
    }
    Ok(found)
}

/// One run, the times of its steps being the medians of several.
fn profile(session: &mut Session, views: &[(&str, TensorView)]) -> Result<Vec<Timing>> {
    const RUNS: usize = 5;
    let epoch = Instant::now();
    let clock = move || epoch.elapsed().as_secs_f64() * 1e3;
    let mut runs: Vec<Vec<Timing>> = Vec::new();
    for _ in 0..RUNS {
        let mut times = Vec::new();
        session.begin(views)?;
        session.advance_timed(|_, _| false, Some(&clock), &mut times)?;
        runs.push(times);
    }
    let mut steps = runs.pop().unwrap_or_default();
    runs.push(steps.clone());
    let mut at = 0.0;
    for (i, step) in steps.iter_mut().enumerate() {
        let mut ms: Vec<f64> = runs.iter().map(|r| r[i].ms).collect();
        ms.sort_by(f64::total_cmp);
        // One after another, as a single run of these times would have them.
        (step.start, step.ms) = (at, ms[RUNS / 2]);
        at += step.ms;
    }
    Ok(steps)
}

fn print(steps: &[Timing]) {
    let total: f64 = steps.iter().map(|t| t.ms).sum();
    println!(
        "{:>9}  {:>6}  {:>8}  {:>7}  {:>9}  {:>9}  {:20}  {:24}  node",
        "ms", "share", "GFLOP/s", "GB/s", "KiB read", "written", "operator", "kernel"
    );
    let mut by_op: BTreeMap<&str, (f64, usize, u64)> = BTreeMap::new();
    for t in steps {
        let (ms, count, flops) = by_op.get(t.op.as_str()).copied().unwrap_or_default();
        by_op.insert(&t.op, (ms + t.ms, count + 1, flops + t.flops));
        let speed = t.gflops().map_or_else(String::new, |g| format!("{g:.1}"));
        let traffic = (t.read_bytes + t.written_bytes) as f64 / t.ms / 1e6;
        let share = t.ms / total * 100.0;
        println!(
            "{:9.3}  {share:5.1}%  {speed:>8}  {traffic:7.1}  {:9}  {:9}  {:20}  {:24}  {}",
            t.ms,
            t.read_bytes.div_ceil(1024),
            t.written_bytes.div_ceil(1024),
            t.op,
            t.kernel,
            t.node
        );
    }
    println!();
    let mut by_op: Vec<_> = by_op.into_iter().collect();
    by_op.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
    for (op, (ms, n, flops)) in by_op {
        let speed = if flops > 0 { format!("{:8.1} GFLOP/s", flops as f64 / ms / 1e6) } else { String::new() };
        println!("{ms:9.3} ms  {:5.1}%  {n:4} x {op:24}{speed}", ms / total * 100.0);
    }
}

/// The steps in Chrome's trace format ("JSON Object Format" with complete events), as `chromeTrace` of the npm package
/// writes them.
fn trace(steps: &[Timing]) -> serde_json::Value {
    use serde_json::json;
    let named =
        |name: &str, value: &str| json!({ "name": name, "ph": "M", "pid": 1, "tid": 1, "args": { "name": value } });
    let mut events = vec![named("process_name", "weblane"), named("thread_name", "run")];
    events.extend(steps.iter().map(|t| {
        json!({
            "name": t.op, "cat": "node", "ph": "X", "pid": 1, "tid": 1, "ts": t.start * 1e3, "dur": t.ms * 1e3,
            "args": {
                "node": t.node, "kernel": t.kernel, "flops": t.flops, "gflops": t.gflops().unwrap_or(0.0),
                "readBytes": t.read_bytes, "writtenBytes": t.written_bytes,
            },
        })
    }));
    json!({ "displayTimeUnit": "ms", "traceEvents": events })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing(start: f64, ms: f64) -> Timing {
        let (op, kernel) = ("Conv".into(), "conv".into());
        Timing { node: "a".into(), op, kernel, start, ms, flops: 4_000_000, read_bytes: 8, written_bytes: 16 }
    }

    #[test]
    fn a_trace_has_one_complete_event_per_step() {
        let made = trace(&[timing(0.0, 0.5), timing(0.5, 0.25)]);
        let events = made["traceEvents"].as_array().unwrap();
        let nodes: Vec<_> = events.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!((events.len(), nodes.len()), (4, 2));
        assert_eq!((nodes[1]["ts"].as_f64(), nodes[1]["dur"].as_f64()), (Some(500.0), Some(250.0)));
        assert_eq!(nodes[0]["args"]["gflops"].as_f64(), Some(8.0));
        assert_eq!(nodes[0]["args"]["writtenBytes"].as_u64(), Some(16));
        assert!(events.iter().all(|e| e["pid"].is_u64() && e["tid"].is_u64() && e["name"].is_string()));
    }

    #[test]
    fn names_and_values() {
        let given = ["a=1x2".to_owned(), "b=".to_owned()];
        assert_eq!(assignments(&given, |v| Ok(v.len())).unwrap(), BTreeMap::from([("a", 3), ("b", 0)]));
        assert!(assignments(&["a".to_owned()], |v| Ok(v.len())).is_err());
    }
}
