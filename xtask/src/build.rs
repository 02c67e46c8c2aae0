//! `cargo xtask build`: the WebAssembly variants, the npm package and the demo site.
//!
//! Per variant: wasm-pack compiles runtime-web and writes glue to `npm/build/<variant>/`, then wasm-opt
//! writes `npm/dist/weblane_<variant>.wasm`. The variants with threads have a cargo target directory, and those
//! without have one: two builds run side by side, and a standard library, dependencies and procedural macros are
//! compiled for two variants each.

use crate::context::{Context, hash_file, timed};
use crate::toolchain::{self, Toolchain, WasmTools};
use crate::{models, node, size};
use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bound of a shared memory, declared up front because the format wants one.
const MAX_SHARED_MEMORY: u64 = 2 << 30;
const WASM_OPT: &str = "xtask/node/node_modules/.bin/wasm-opt";

/// The binaries that the package ships.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Variant {
    #[value(name = "simd_st")]
    SimdSt,
    #[value(name = "simd_mt")]
    SimdMt,
    #[value(name = "relaxed_st")]
    RelaxedSt,
    #[value(name = "relaxed_mt")]
    RelaxedMt,
}

impl Variant {
    pub(crate) const ALL: [Self; 4] = [Self::SimdSt, Self::SimdMt, Self::RelaxedSt, Self::RelaxedMt];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SimdSt => "simd_st",
            Self::SimdMt => "simd_mt",
            Self::RelaxedSt => "relaxed_st",
            Self::RelaxedMt => "relaxed_mt",
        }
    }

    fn threads(self) -> bool {
        matches!(self, Self::SimdMt | Self::RelaxedMt)
    }

    fn relaxed(self) -> bool {
        matches!(self, Self::RelaxedSt | Self::RelaxedMt)
    }

    /// Directory of cargo's under `target/wasm`.
    fn cache(self) -> &'static str {
        if self.threads() { "mt" } else { "st" }
    }

    /// Of all crates, the standard library among them. With the same flags relaxed and plain variants share what they do
    /// not differ in.
    fn rustflags(self) -> String {
        let features = String::from("-Ctarget-feature=+simd128,+bulk-memory,+mutable-globals");
        // By itself LLVM's WebAssembly backend orders the operations of a block to need few registers, by a model in which
        // they are unlimited: of a GEMM's 12 sums it kept six broadcasts alive where the source has one, and V8 spilled.
        // This keeps the order of the source, which in kernels is chosen.
        // A panic says in which file it is. Line and column of each place that may are 13 kB of a compressed module.
        let places = "-Zlocation-detail=file".to_owned();
        let mut flags = vec![features, "-Cllvm-args=-pre-RA-sched=source".to_owned(), places];
        if self.threads() {
            flags[0] += ",+atomics";
            let exports = ["__wasm_init_tls", "__tls_size", "__tls_align", "__tls_base", "__heap_base"];
            flags.extend(["--shared-memory", "--import-memory"].map(|arg| format!("-Clink-arg={arg}")));
            flags.push(format!("-Clink-arg=--max-memory={MAX_SHARED_MEMORY}"));
            flags.extend(exports.map(|name| format!("-Clink-arg=--export={name}")));
        }
        flags.join(" ")
    }

    /// Arguments of cargo's: what is added for those crates of this workspace that a module is made of. One that is left out
    /// could not inline what the kernels have for relaxed SIMD.
    fn own_flags(self) -> Vec<String> {
        if !self.relaxed() {
            return Vec::new();
        }
        let crates = ["weblane-kernels", "weblane-engine", "weblane-web", "weblane-bench-kernels"];
        let flags = crates
            .map(|name| format!("--config=profile.wasm.package.{name}.rustflags=[\"-Ctarget-feature=+relaxed-simd\"]"));
        ["-Zprofile-rustflags".to_owned()].into_iter().chain(flags).collect()
    }

    fn wasm_opt_flags(self) -> Vec<&'static str> {
        let mut flags = vec![
            "-O3",
            // Lets constant parts of addresses become offsets of loads and stores. It assumes that no address wraps
            // around into the first kilobyte, which is the far end of the stack: nothing computes addresses into it
            // from above. 6% on products with k = 16 in Chromium.
            "--low-memory-unused",
            // LLVM has inlined what is worth it. Only what is smaller than a call is inlined here: 600 functions of 9,100
            // less, which browsers need not compile one by one during a load. What is called once stays as it is, however
            // small: inlined, V8 ran MobileNetV2 in 8 bits 7% slower, and the compressed modules were larger.
            "--always-inline-max-function-size=6",
            "--flexible-inline-max-function-size=0",
            "--one-caller-inline-max-function-size=0",
            // Short numbers for the functions that are called from many places: 12 kB.
            "--reorder-functions",
            "--enable-simd",
            "--enable-bulk-memory",
            "--enable-bulk-memory-opt",
            "--enable-mutable-globals",
            "--enable-sign-ext",
            "--enable-nontrapping-float-to-int",
            "--enable-reference-types",
            "--enable-multivalue",
            "--strip-debug",
            "--strip-producers",
            "--strip-target-features",
        ];
        if self.relaxed() {
            flags.push("--enable-relaxed-simd");
        }
        if self.threads() {
            flags.push("--enable-threads");
        }
        flags
    }

    /// Where the finished module lies.
    pub(crate) fn output(self, ctx: &Context) -> PathBuf {
        ctx.path(format!("npm/dist/weblane_{}.wasm", self.name()))
    }
}

#[derive(Args, Default)]
pub(crate) struct BuildArgs {
    /// Build only these variants; the package then says that the others are not in this build
    #[arg(long = "variant", value_enum)]
    variants: Vec<Variant>,
    /// Only the WebAssembly, not the TypeScript
    #[arg(long)]
    wasm_only: bool,
    /// Also build the demo site
    #[arg(long)]
    site: bool,
}

impl BuildArgs {
    /// The package and the demo site.
    pub(crate) fn with_site() -> Self {
        Self { site: true, ..Self::default() }
    }
}

/// Builds what the arguments ask for.
pub(crate) fn run(ctx: &Context, args: &BuildArgs) -> Result<()> {
    let variants = if args.variants.is_empty() { &Variant::ALL[..] } else { &args.variants };
    timed("WebAssembly", || wasm(ctx, variants))?;
    if args.wasm_only {
        return Ok(());
    }
    timed("npm package", || npm(ctx, variants))?;
    if args.site {
        timed("demo site", || site(ctx))?;
    }
    Ok(())
}

fn wasm(ctx: &Context, variants: &[Variant]) -> Result<()> {
    let toolchain = toolchain::ensure(ctx)?;
    let tools = toolchain::ensure_wasm_tools(ctx)?;
    node::ensure(ctx)?;
    node::install(ctx, "xtask/node")?;
    fs::create_dir_all(ctx.path("npm/dist"))?;
    fs::create_dir_all(ctx.path("target/wasm"))?;
    // The crates are downloaded before two builds want the same registry lock.
    ctx.run(ctx.cmd("cargo").args(["fetch", "--quiet"]))?;

    // Crates that are one unit of code each leave a core idle at the end of a build, so two run side by side.
    let lane = |ctx: &Context, threads: bool| -> Result<()> {
        for variant in variants.iter().filter(|variant| variant.threads() == threads) {
            one_variant(ctx, *variant, &toolchain, &tools)
                .with_context(|| format!("variant {} (log: target/wasm/{}.log)", variant.name(), variant.name()))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        // Each thread has its own shell: a shell's working directory is not shared.
        let second = scope.spawn(|| lane(&Context::new()?, true));
        let first = lane(ctx, false);
        first.and(second.join().expect("a build thread panicked"))
    })?;
    size::report(ctx, variants)
}

fn one_variant(ctx: &Context, variant: Variant, toolchain: &Toolchain, tools: &WasmTools) -> Result<()> {
    let start = Instant::now();
    let name = variant.name();
    let directory = ctx.path("npm/build").join(name);
    let (source, glue) = ("runtime-web", "weblane_web");
    let module = Module { variant, name, source, glue, directory: &directory, cache: variant.cache(), tile: None };
    let fresh = module.build(ctx, toolchain, tools, &variant.output(ctx))?;
    let note = if fresh { "unchanged" } else { "built" };
    println!("   {name}: {note}, {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Builds the native program as the workspace's tests do, with debug assertions, and says where it is. The whole workspace
/// decides the features of dependencies: by `-p weblane-cli` they would differ, and kernels and engine be compiled once more.
pub(crate) fn native_program(ctx: &Context) -> Result<PathBuf> {
    let target = ctx.path("target");
    let build =
        ctx.cmd("cargo").args(["build", "--quiet", "--workspace", "--bin", "weblane", "--target-dir"]).arg(&target);
    ctx.run(build)?;
    Ok(target.join("debug").join(format!("weblane{}", std::env::consts::EXE_SUFFIX)))
}

/// Builds the kernels' bench with the flags of `relaxed_mt` into `target/bench-kernels`.
pub(crate) fn bench_module(ctx: &Context) -> Result<()> {
    let directory = ctx.path("target/bench-kernels");
    bench_module_with(ctx, &directory, Variant::RelaxedMt, Variant::RelaxedMt.cache(), None)
}

/// The same for any variant with threads, into any directory, compiled in `target/wasm/<cache>`, with a candidate for the
/// tile of products.
pub(crate) fn bench_module_with(
    ctx: &Context,
    directory: &Path,
    variant: Variant,
    cache: &str,
    tile: Option<&str>,
) -> Result<()> {
    let toolchain = toolchain::ensure(ctx)?;
    let tools = toolchain::ensure_wasm_tools(ctx)?;
    node::install(ctx, "xtask/node")?;
    fs::create_dir_all(ctx.path("target/wasm"))?;
    let glue = "weblane_bench_kernels";
    let (name, source) = ("bench-kernels", "benches/kernels");
    let module = Module { variant, name, source, glue, directory, cache, tile };
    // In the place of the compiled module, where the glue looks for it.
    module.build(ctx, &toolchain, &tools, &directory.join(format!("{glue}_bg.wasm"))).map(drop)
}

/// A crate that becomes a WebAssembly module with JavaScript glue.
struct Module<'a> {
    variant: Variant,
    /// Of logs and stamps.
    name: &'a str,
    /// The crate's directory.
    source: &'a str,
    /// Base name of the glue.
    glue: &'a str,
    /// Where the glue and the module before optimisation go.
    directory: &'a Path,
    /// Directory of cargo's under `target/wasm`.
    cache: &'a str,
    /// What `WEBLANE_TILE` is for the compiler.
    tile: Option<&'a str>,
}

impl Module<'_> {
    /// Compiles and optimises; returns whether `output` was up to date.
    fn build(&self, ctx: &Context, toolchain: &Toolchain, tools: &WasmTools, output: &Path) -> Result<bool> {
        let Self { variant, name, source, glue, directory, cache, tile } = *self;
        let mut command = toolchain
            .apply(ctx.cmd(&tools.pack))
            .env("PATH", tools.search_path()?)
            .env("RUSTFLAGS", variant.rustflags())
            .env("CARGO_TARGET_DIR", ctx.path("target/wasm").join(cache))
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .args(["--log-level", "warn", "build", "--target", "web", "--no-opt", "--mode", "force", "--no-pack"])
            .args(["--profile", "wasm", "--out-name", glue, "--out-dir"])
            .arg(directory)
            .arg(ctx.path(source))
            // Without std's default features: what prints backtraces, which a page has no symbols for. Sorts in small code, of
            // which there are dozens, save 50 kB.
            .args(["--", "--quiet", "-Zbuild-std=std,panic_abort", "-Zbuild-std-features=optimize_for_size"])
            .args(variant.own_flags());
        if variant.threads() {
            command = command.args(["--features", "threads"]);
        }
        command = match tile {
            Some(tile) => command.env("WEBLANE_TILE", tile),
            None => command.env_remove("WEBLANE_TILE"),
        };
        logged(command, &ctx.path(format!("target/wasm/{name}.log")))?;

        let compiled = directory.join(format!("{glue}_bg.wasm"));
        let flags = variant.wasm_opt_flags();
        let stamp = format!("{} {}", hash_file(&compiled)?, flags.join(" "));
        let fresh = compiled != output && output.exists() && ctx.is_stamped(&format!("wasm-opt-{name}"), &stamp);
        if !fresh {
            let optimise = ctx.cmd(ctx.path(WASM_OPT)).args(&flags).arg(&compiled).arg("-o").arg(output);
            logged(optimise, &ctx.path(format!("target/wasm/{name}.opt.log")))?;
            ctx.write_stamp(&format!("wasm-opt-{name}"), &stamp)?;
        }
        Ok(fresh)
    }
}

/// Runs a command with its output in a file, and shows the end of it when it fails.
fn logged(command: xshell::Cmd<'_>, log: &Path) -> Result<()> {
    let output = command.quiet().ignore_status().output()?;
    let text = [output.stdout, output.stderr].concat();
    fs::write(log, &text)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(60)..].join("\n");
    bail!("{}\n{tail}", output.status)
}

/// Type declarations, the bundled worker and the entries.
fn npm(ctx: &Context, variants: &[Variant]) -> Result<()> {
    node::install(ctx, "npm")?;
    // A tarball carries its own copy of the licences.
    for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
        fs::copy(ctx.path(licence), ctx.path("npm").join(licence)).with_context(|| format!("cannot copy {licence}"))?;
    }
    let names: Vec<&str> = variants.iter().map(|variant| variant.name()).collect();
    ctx.run_in("npm", |ctx| ctx.cmd("npm").args(["run", "--silent", "build"]).env("WEBLANE_VARIANTS", names.join(",")))
}

/// The demo site with the models that its pages load.
fn site(ctx: &Context) -> Result<()> {
    models::ensure_for_demo(ctx)?;
    node::install(ctx, "demo-site")?;
    node::script(ctx, "demo-site", "build")
}
