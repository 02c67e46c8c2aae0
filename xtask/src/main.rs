//! The commands of the project: `cargo xtask setup|build|demo|test|bench|conformance|fuzz`.
//!
//! Every command sets up what it needs first; set-up steps leave stamps in `target/setup/`, so that a
//! warm run costs seconds. Node scripts under `tests/wasm/` drive the browsers; this program finds or
//! installs the tools, builds, calls those scripts and joins their reports.

mod bench;
mod browsers;
mod build;
mod conformance;
mod context;
mod demo;
mod models;
mod node;
mod python;
mod setup;
mod size;
mod tests;
mod toolchain;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use context::Context;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and shows weblane")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install or find everything the other commands need; warm runs take seconds
    Setup {
        /// Set up only these parts
        #[arg(long = "only", value_enum)]
        only: Vec<setup::Part>,
    },
    /// Build the npm package: WebAssembly variants, TypeScript and the demo site
    Build(build::BuildArgs),
    /// Build and serve the demo site
    Demo(demo::DemoArgs),
    /// Run every check of the project
    Test(tests::TestArgs),
    /// Run a benchmark; benches/README.md says what each measures
    Bench(bench::BenchArgs),
    /// Run ONNX's own cases natively and in browsers, and write docs/conformance.md
    Conformance(conformance::ConformanceArgs),
    /// Fuzz one target with cargo-fuzz
    Fuzz(FuzzArgs),
}

#[derive(Args)]
struct FuzzArgs {
    /// A target of fuzz/; without it the targets are listed
    target: Option<String>,
    /// Seconds to run
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

fn main() -> ExitCode {
    match Context::new().and_then(|ctx| run(&ctx, Cli::parse().command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(ctx: &Context, command: Command) -> Result<()> {
    ctx.check_disk()?;
    match command {
        Command::Setup { only } => setup::run(ctx, &only),
        Command::Build(args) => build::run(ctx, &args),
        Command::Demo(args) => demo::run(ctx, &args),
        Command::Test(args) => tests::run(ctx, &args),
        Command::Bench(args) => bench::run(ctx, &args),
        Command::Conformance(args) => conformance::run(ctx, &args).map(drop),
        Command::Fuzz(args) => fuzz(ctx, &args),
    }
}

fn fuzz(ctx: &Context, fuzz: &FuzzArgs) -> Result<()> {
    let tool = toolchain::ensure_cargo_tool(ctx, "cargo-fuzz", None)?;
    let command = ctx.cmd(tool).env("RUSTC_BOOTSTRAP", "1").arg("fuzz").args(if fuzz.target.is_some() {
        &["run"][..]
    } else {
        &["list"]
    });
    match &fuzz.target {
        None => ctx.run(command),
        Some(target) => ctx.run(
            command
                // The sanitiser of a Debian compiler is a separate package; crashes are found without it.
                .args(["--sanitizer", "none", target, "--"])
                .arg(format!("-max_total_time={}", fuzz.seconds)),
        ),
    }
}
