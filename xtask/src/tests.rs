//! `cargo xtask test`: every check of the project, stage by stage, and a table at the end.

use crate::browsers::{self, Browser};
use crate::build::{self, BuildArgs};
use crate::conformance::{self, ConformanceArgs};
use crate::context::{Context, apt_install, heading, may_apt_install};
use crate::setup::{self, Part};
use crate::{demo, models, node, size, toolchain};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::json;
use std::fs;
use std::time::Instant;

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Run only these stages
    #[arg(long)]
    only: Vec<String>,
    /// Leave these stages out
    #[arg(long)]
    skip: Vec<String>,
    /// Print the stages and end
    #[arg(long)]
    list: bool,
}

/// What a stage ended with, when it did not fail.
enum Outcome {
    Pass(String),
    Skip(String),
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self::Pass(String::new())
    }
}

struct Stage {
    name: &'static str,
    about: &'static str,
    run: fn(&Context) -> Result<Outcome>,
    /// Needs what [`prepare`] installs.
    tools: bool,
}

impl Stage {
    const fn new(name: &'static str, about: &'static str, run: fn(&Context) -> Result<Outcome>) -> Self {
        Self { name, about, run, tools: false }
    }

    const fn with_tools(name: &'static str, about: &'static str, run: fn(&Context) -> Result<Outcome>) -> Self {
        Self { tools: true, ..Self::new(name, about, run) }
    }
}

/// In order: what is quick and often wrong comes first.
const STAGES: &[Stage] = &[
    Stage::new("fmt", "rustfmt", fmt),
    Stage::new("clippy", "clippy, warnings denied", clippy),
    Stage::new("npm", "types and lint of TypeScript and JavaScript", npm),
    Stage::new("models", "models and goldens that tests compare with", test_models),
    Stage::new("native", "tests of the Rust crates", native),
    Stage::new("doc", "rustdoc, warnings denied", doc),
    Stage::with_tools("neon", "kernels for Arm: check, and tests under qemu-user", neon),
    Stage::with_tools("build", "WebAssembly variants, npm package, demo site", build_all),
    Stage::new("npm-test", "unit tests of the npm package and what was built", npm_test),
    Stage::new("size", "size budget", size_budget),
    Stage::with_tools("node", "the cases in Node", |ctx| browser(ctx, Browser::Node)),
    Stage::with_tools("chromium", "the cases in Chromium, isolated and not", |ctx| browser(ctx, Browser::Chromium)),
    Stage::with_tools("firefox", "the cases in Firefox, isolated and not", |ctx| browser(ctx, Browser::Firefox)),
    Stage::with_tools("webkit", "the cases in WebKit", |ctx| browser(ctx, Browser::Webkit)),
    Stage::with_tools("package", "the packed tarball in a scratch project", package),
    Stage::with_tools("demo", "the demo site, used by headless Chromium", demo_check),
    Stage::with_tools("conformance", "ONNX's own cases, native and Chromium", onnx_cases),
];

/// Runs the stages; fails when one of them fails.
pub(crate) fn run(ctx: &Context, args: &TestArgs) -> Result<()> {
    if args.list {
        for stage in STAGES {
            println!("{:12} {}", stage.name, stage.about);
        }
        return Ok(());
    }
    if let Some(unknown) =
        args.only.iter().chain(&args.skip).find(|name| STAGES.iter().all(|stage| stage.name != **name))
    {
        bail!("no stage is called {unknown}; `cargo xtask test --list` names them");
    }
    let begin = Instant::now();
    let left_out = |stage: &&Stage| {
        args.skip.iter().any(|name| name == stage.name)
            || !args.only.is_empty() && args.only.iter().all(|name| name != stage.name)
    };
    let stages: Vec<&Stage> = STAGES.iter().filter(|stage| !left_out(stage)).collect();
    // Downloads and the unpacking of packages leave the cores to the compilers of the stages that need none of them.
    let mut prepared =
        (stages.len() > 1 && stages.iter().any(|stage| stage.tools)).then(|| std::thread::spawn(prepare));
    let mut rows = Vec::new();
    for stage in stages {
        if let Some(preparation) = stage.tools.then(|| prepared.take()).flatten() {
            // A stage that misses something tries once more, and fails with what to type.
            match preparation.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => println!("   set-up beside the stages: {error:#}"),
                Err(_) => println!("   set-up beside the stages panicked"),
            }
        }
        heading(&format!("stage {}: {}", stage.name, stage.about));
        let start = Instant::now();
        let (verdict, note) = match (stage.run)(ctx) {
            Ok(Outcome::Pass(note)) => ("pass", note),
            Ok(Outcome::Skip(reason)) => ("skip", reason),
            Err(error) => {
                eprintln!("error: {error:#}");
                ("FAIL", format!("{error}"))
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        println!("   stage {}: {verdict}, {seconds:.1} s", stage.name);
        rows.push((stage.name, verdict, seconds, note.lines().next().unwrap_or_default().to_owned()));
    }
    heading("summary");
    for (name, verdict, seconds, note) in &rows {
        println!("   {name:12} {verdict:5} {seconds:8.1} s  {note}");
    }
    println!("   {:12} {:5} {:8.1} s", "total", "", begin.elapsed().as_secs_f64());
    let report: Vec<_> = rows
        .iter()
        .map(|(name, verdict, seconds, note)| json!({"stage": name, "result": verdict, "seconds": seconds, "note": note}))
        .collect();
    fs::create_dir_all(ctx.path("target"))?;
    fs::write(ctx.path("target/test-report.json"), serde_json::to_string_pretty(&report)?)?;
    let failed: Vec<&str> = rows.iter().filter(|row| row.1 == "FAIL").map(|row| row.0).collect();
    if failed.is_empty() { Ok(()) } else { bail!("stages failed: {}", failed.join(", ")) }
}

/// Installs the WebAssembly toolchain and the browsers.
fn prepare() -> Result<()> {
    // A thread of its own has a shell of its own: a shell's working directory is not shared.
    setup::run(&Context::new()?, &[Part::Rust, Part::Browsers])
}

fn fmt(ctx: &Context) -> Result<Outcome> {
    ctx.run(ctx.cmd("cargo").args(["fmt", "--all", "--check"]))?;
    // Modules that a macro names are not found by it.
    let mut named = Vec::new();
    for entry in fs::read_dir(ctx.path("engine/src/ops"))? {
        named.push(entry?.path());
    }
    named.retain(|path| path.extension().is_some_and(|e| e == "rs") && !path.ends_with("mod.rs"));
    ctx.run(ctx.cmd("rustfmt").args(["--edition", "2024", "--check"]).args(named)).map(Outcome::from)
}

fn clippy(ctx: &Context) -> Result<Outcome> {
    let args = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    ctx.run(ctx.cmd("cargo").args(args)).map(Outcome::from)
}

fn native(ctx: &Context) -> Result<Outcome> {
    let nextest = ctx.output(ctx.cmd("cargo").args(["nextest", "--version"])).is_some();
    if nextest {
        let args = ["nextest", "run", "--workspace", "--cargo-quiet", "--status-level", "fail", "--no-tests", "pass"];
        ctx.run(ctx.cmd("cargo").args(args))?;
        // nextest leaves the examples in documentation to cargo.
        ctx.run(ctx.cmd("cargo").args(["test", "--workspace", "--doc", "--quiet"]))?;
    } else {
        ctx.run(ctx.cmd("cargo").args(["test", "--workspace", "--quiet"]))?;
    }
    Ok(Outcome::Pass(if nextest { "cargo nextest" } else { "cargo test" }.into()))
}

fn doc(ctx: &Context) -> Result<Outcome> {
    let command = ctx.cmd("cargo").args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    ctx.run(command.env("RUSTDOCFLAGS", "-Dwarnings -Arustdoc::private_intra_doc_links")).map(Outcome::from)
}

/// The toolchain here has no compiled Arm library, so it is built like the one for wasm.
fn neon(ctx: &Context) -> Result<Outcome> {
    const TARGET: &str = "aarch64-unknown-linux-gnu";
    // The emulator takes a quarter of its time for these three, whose subject is how matrices larger than caches are cut.
    const LARGE: [&str; 3] = [
        "conv::tests::weights_larger_than_a_cache",
        "gemm::tests::many_blocks",
        "winograd::tests::weights_beyond_the_cache_run_step_by_step",
    ];
    let toolchain = toolchain::ensure(ctx)?;
    let cargo = |verb: &str| {
        let command = toolchain.apply(ctx.cmd("cargo")).env("CARGO_TARGET_DIR", ctx.path("target/aarch64"));
        // Assertions of the same code are checked natively; here they are compiled once more, and emulated.
        let without = ["DEBUG", "DEBUG_ASSERTIONS", "OVERFLOW_CHECKS"];
        let command = without.into_iter().fold(command, |c, name| c.env(format!("CARGO_PROFILE_DEV_{name}"), "false"));
        command.args([verb, "--quiet", "-Zbuild-std", "--target", TARGET, "-p", "weblane-kernels"])
    };
    let programs = ["aarch64-linux-gnu-gcc", "qemu-aarch64"];
    let complete = |ctx: &Context| programs.iter().all(|name| ctx.find_program(name).is_some());
    if !complete(ctx) && may_apt_install(ctx) {
        let packages = ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user"];
        if let Err(error) = apt_install(ctx, &packages, "Arm tests") {
            println!("   {error:#}");
        }
    }
    if !complete(ctx) {
        ctx.run(cargo("check").arg("--lib"))?;
        return Ok(Outcome::Pass(format!("compiled only: {} not found", programs.join(" or "))));
    }
    let test = cargo("test")
        .args(["--lib", "--", "--exact"])
        .args(LARGE.iter().flat_map(|name| ["--skip", name]))
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", programs[0])
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", "qemu-aarch64 -L /usr/aarch64-linux-gnu");
    ctx.run(test)?;
    Ok(Outcome::Pass("under qemu-user".into()))
}

/// The directories with a package of their own.
const PACKAGES: [&str; 3] = ["npm", "demo-site", "tests/wasm"];

fn npm(ctx: &Context) -> Result<Outcome> {
    node::ensure(ctx)?;
    // The demo site is checked against the declarations that the package is published with.
    node::install(ctx, "npm")?;
    node::script(ctx, "npm", "build:modules")?;
    npm_scripts(ctx, &["typecheck", "lint"])
}

fn npm_test(ctx: &Context) -> Result<Outcome> {
    npm_scripts(ctx, &["test"])
}

fn npm_scripts(ctx: &Context, scripts: &[&str]) -> Result<Outcome> {
    for directory in PACKAGES {
        node::install(ctx, directory)?;
        for script in scripts {
            if node::has_script(ctx, directory, script)? {
                node::script(ctx, directory, script).with_context(|| format!("npm run {script} in {directory}/"))?;
            }
        }
    }
    Ok(().into())
}

fn test_models(ctx: &Context) -> Result<Outcome> {
    models::ensure_for_tests(ctx).map(Outcome::from)
}

fn build_all(ctx: &Context) -> Result<Outcome> {
    build::run(ctx, &BuildArgs::with_site()).map(Outcome::from)
}

fn size_budget(ctx: &Context) -> Result<Outcome> {
    size::check(ctx).map(Outcome::from)
}

/// The cases in one browser, with isolation headers and, where it makes a difference, without.
fn browser(ctx: &Context, browser: Browser) -> Result<Outcome> {
    node::install(ctx, "tests/wasm")?;
    let found = match browsers::ensure(ctx, browser) {
        Ok(found) => found,
        Err(error) if browser == Browser::Webkit => return Ok(Outcome::Skip(format!("{error:#}"))),
        Err(error) => return Err(error),
    };
    let modes: &[&str] = match browser {
        Browser::Chromium | Browser::Firefox => &["isolated", "plain"],
        Browser::Webkit | Browser::Node => &["isolated"],
    };
    for mode in modes {
        let mut command = ctx
            .cmd("node")
            .args(["tests/wasm/run.mjs", "--browser", browser.name(), "--mode", mode, "--json"])
            .arg(ctx.path(format!("target/wasm-tests-{}-{mode}.json", browser.name())));
        for (key, value) in found.environment() {
            command = command.env(key, value);
        }
        ctx.run(command)?;
    }
    Ok(Outcome::Pass(modes.join(" and ")))
}

/// What a user would install, in a project of its own, with and without isolation.
fn package(ctx: &Context) -> Result<Outcome> {
    node::install(ctx, "tests/wasm")?;
    let found = browsers::ensure(ctx, Browser::Chromium)?;
    let mut command = ctx.cmd("node").arg("tests/wasm/package-check.mjs");
    for (key, value) in found.environment() {
        command = command.env(key, value);
    }
    ctx.run(command).map(Outcome::from)
}

fn demo_check(ctx: &Context) -> Result<Outcome> {
    demo::check(ctx).map(Outcome::from)
}

fn onnx_cases(ctx: &Context) -> Result<Outcome> {
    conformance::run(ctx, &ConformanceArgs::after_build()).map(Outcome::Pass)
}
