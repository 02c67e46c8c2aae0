//! `cargo xtask bench`: measurements. Each prepares what it needs and hands over to a program under `benches/`.

use crate::browsers::{self, Browser};
use crate::build::{self, Variant};
use crate::context::Context;
use crate::{models, node, python};
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
    /// Time from the call that loads a model to its first result, first and second visit
    Load,
    /// Time of a word of a decoder with a cache, weblane and onnxruntime-web
    Decode,
    /// Matrix products as a share of the peak of multiply-add, and the cost of a parallel region, in a browser
    Gemm,
    /// Tiles and blocks of float products beside each other, in a browser
    Tune,
    /// Time by node on both sides, weblane and onnxruntime-web
    Profile,
    /// Two threads beside one, in turns on one page
    Threads,
    /// The native build beside native onnxruntime, and WebAssembly beside the native build
    Native,
    /// What the quantiser does to models with real weights: similarity, classes, bytes
    Quantize,
    /// Every node of quantised models beside native onnxruntime's
    Nodes,
    /// Peak memory of the page's process, weblane and onnxruntime-web
    Memory,
}

/// Runs a benchmark.
pub(crate) fn run(ctx: &Context, bench: &BenchArgs) -> Result<()> {
    match bench.what {
        Bench::Peers => peers(ctx, &bench.args),
        Bench::Load => page(ctx, "benches/peers/load.mjs", &bench.args),
        Bench::Decode => page(ctx, "benches/peers/decode.mjs", &bench.args),
        Bench::Gemm => {
            build::bench_module(ctx)?;
            in_browser(ctx, "benches/kernels/run.mjs", &bench.args)
        }
        Bench::Tune => tune(ctx, &bench.args),
        Bench::Profile => page(ctx, "benches/peers/profile.mjs", &bench.args),
        Bench::Threads => {
            let record = ctx.path("benches/records/threads.json").display().to_string();
            let workloads = "mobilenet_v2,resnet50,bert_base";
            let own = ["--peers", "weblane-1t", "--threads", "2", "--workloads", workloads, "--record", &record];
            let args: Vec<String> = own.into_iter().map(str::to_owned).chain(bench.args.iter().cloned()).collect();
            page(ctx, "benches/peers/run.mjs", &args)
        }
        Bench::Native => {
            ctx.run(ctx.cmd("cargo").args(["build", "--quiet", "--release", "-p", "weblane-cli"]))?;
            python::ensure(ctx)?;
            page(ctx, "benches/native/run.mjs", &bench.args)
        }
        Bench::Quantize => {
            ctx.run(ctx.cmd("cargo").args(["build", "--quiet", "--release", "-p", "weblane-cli"]))?;
            models::ensure_demo_models(ctx)?;
            let record = ctx.path("benches/records/quantize.json").display().to_string();
            let program = ctx.cmd(python::ensure(ctx)?).args(["benches/quantize/run.py", "--record", &record]);
            ctx.run(program.args(&bench.args))
        }
        Bench::Nodes => {
            ctx.run(ctx.cmd("cargo").args(["build", "--quiet", "--release", "-p", "weblane-cli"]))?;
            models::ensure_workloads(ctx)?;
            ctx.run(ctx.cmd(python::ensure(ctx)?).arg("benches/quantize/nodes.py").args(&bench.args))
        }
        Bench::Memory => page(ctx, "benches/peers/memory.mjs", &bench.args),
    }
}

/// Candidates for the row of WebAssembly's relaxed SIMD in `kernels/src/gemm/table.rs`, as `WEBLANE_TILE` takes them:
/// `mr,narrow_mr,nrv,kc,mc,unroll,interleaves`.
const RELAXED_TILES: [&str; 8] = [
    "6,6,2,512,128,1,1",
    "6,6,2,512,128,1,0",
    "6,6,2,256,128,1,1",
    "6,6,2,512,72,1,1",
    "5,5,2,512,128,1,1",
    "4,4,2,512,128,1,1",
    "4,4,3,512,128,1,1",
    "8,8,1,512,128,1,1",
];

/// The same for SIMD without relaxed instructions, which WebKit has.
const PLAIN_TILES: [&str; 6] = [
    "3,5,3,384,128,1,0",
    "3,5,3,384,128,1,1",
    "4,4,2,384,128,1,1",
    "5,5,2,384,128,1,0",
    "5,5,2,384,128,1,1",
    "6,6,2,384,128,1,1",
];

/// Builds a module with each of the tiles, and measures them in turns.
fn tune(ctx: &Context, args: &[String]) -> Result<()> {
    let (tiles, variant, cache) = match browser(args) {
        Browser::Webkit => (&PLAIN_TILES[..], Variant::SimdMt, "tune-simd"),
        _ => (&RELAXED_TILES[..], Variant::RelaxedMt, "tune"),
    };
    let directory = ctx.path("target").join(cache);
    for tile in tiles {
        println!("   candidate {tile}");
        build::bench_module_with(ctx, &directory.join(tile), variant, cache, Some(tile))?;
    }
    let list = ["--tiles".to_owned(), tiles.join(" "), "--modules".to_owned(), directory.display().to_string()];
    let args: Vec<String> = list.into_iter().chain(args.iter().cloned()).collect();
    in_browser(ctx, "benches/kernels/tune.mjs", &args)
}

fn peers(ctx: &Context, args: &[String]) -> Result<()> {
    let listed = args.iter().position(|arg| arg.starts_with("--peers")).map(|at| args[at..].join(" "));
    // By default LiteRT.js takes part in Chromium only, whose figures it is compared by.
    if listed.map_or(browser(args) == Browser::Chromium, |list| list.contains("litert")) {
        models::ensure_tflite(ctx)?;
    }
    page(ctx, "benches/peers/run.mjs", args)
}

/// A bench of the package: builds it and the models first.
fn page(ctx: &Context, script: &str, args: &[String]) -> Result<()> {
    build::run(ctx, &build::BuildArgs::default())?;
    models::ensure_workloads(ctx)?;
    in_browser(ctx, script, args)
}

/// Runs a script that drives a browser.
fn in_browser(ctx: &Context, script: &str, args: &[String]) -> Result<()> {
    // The benches drive browsers with the code of the test harness.
    for directory in ["tests/wasm", "benches/peers"] {
        node::install(ctx, directory)?;
    }
    let mut command = ctx.cmd("node").arg(script).args(args);
    for (key, value) in browsers::ensure(ctx, browser(args))?.environment() {
        command = command.env(key, value);
    }
    ctx.run(command)
}

/// The browser that `--browser` names, by default Chromium.
fn browser(args: &[String]) -> Browser {
    let named = |browser: &Browser| args.iter().any(|arg| arg.trim_start_matches("--browser=") == browser.name());
    [Browser::Firefox, Browser::Webkit].into_iter().find(named).unwrap_or(Browser::Chromium)
}
