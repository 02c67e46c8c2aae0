//! `cargo xtask bench`: measurements. Each prepares what it needs and hands over to a program under `benches/`.

use crate::context::Context;
use crate::{browsers, build, models, node};
use anyhow::Result;
use clap::{Args, ValueEnum};

#[derive(Args)]
pub(crate) struct BenchArgs {
    #[arg(value_enum)]
    what: Bench,
    /// Go to the program under benches/ unchanged
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Bench {
    /// Time of a run beside other runtimes, in turns on one page
    Peers,
    /// Peak memory of the page's process, weblane and onnxruntime-web
    Memory,
}

/// Runs a benchmark.
pub(crate) fn run(ctx: &Context, bench: &BenchArgs) -> Result<()> {
    match bench.what {
        Bench::Peers => page(ctx, "run.mjs", &bench.args),
        Bench::Memory => page(ctx, "memory.mjs", &bench.args),
    }
}

/// A bench of `benches/peers`: the package beside others in a browser.
fn page(ctx: &Context, script: &str, args: &[String]) -> Result<()> {
    build::run(ctx, &build::BuildArgs::default())?;
    models::ensure_workloads(ctx)?;
    in_browser(ctx, &format!("benches/peers/{script}"), args)
}

/// Runs a script that drives the browser which `--browser` names, by default Chromium.
fn in_browser(ctx: &Context, script: &str, args: &[String]) -> Result<()> {
    // The benches drive browsers with the code of the test harness.
    for directory in ["tests/wasm", "benches/peers"] {
        node::install(ctx, directory)?;
    }
    let named = |name: &str| args.iter().any(|arg| arg.trim_start_matches("--browser=") == name);
    let browser = if named("firefox") {
        browsers::Browser::Firefox
    } else if named("webkit") {
        browsers::Browser::Webkit
    } else {
        browsers::Browser::Chromium
    };
    let mut command = ctx.cmd("node").arg(script).args(args);
    for (key, value) in browsers::ensure(ctx, browser)?.environment() {
        command = command.env(key, value);
    }
    ctx.run(command)
}
