//! The Rust toolchain that compiles for WebAssembly, and the tools around it.
//!
//! The wasm variants need a standard library compiled with their own target features
//! (`-Z build-std`), so they need the library's source and a compiler that accepts `-Z`.
//! In this order:
//!
//! 1. `WEBLANE_WASM_TOOLCHAIN` names a rustup toolchain;
//! 2. an installed nightly that has `rust-src`;
//! 3. an installed Debian toolchain (`rustc-web` and its source);
//! 4. root on Debian: the same packages, installed now. They come before rustup because one known
//!    version is what the project is tested with;
//! 5. rustup installs a nightly and `rust-src`.

use crate::context::{Context, apt_install, may_apt_install};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use xshell::Cmd;

const DEBIAN_TOOLCHAIN: &str = "debian-web";
const DEBIAN_PACKAGES: [&str; 5] = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-llvm", "lld-22"];
const WASM_PACK_VERSION: &str = "0.15.0";

/// A toolchain that can build the standard library.
pub(crate) struct Toolchain {
    /// rustup's name of it.
    pub(crate) name: String,
    /// Why it was chosen, for people.
    pub(crate) reason: String,
}

impl Toolchain {
    /// Lets a command use this toolchain.
    pub(crate) fn apply<'a>(&self, command: Cmd<'a>) -> Cmd<'a> {
        command
            .env("RUSTUP_TOOLCHAIN", &self.name)
            // Debian's compiler is a stable one; this opens -Z, and changes nothing on a nightly.
            .env("RUSTC_BOOTSTRAP", "1")
            .env_remove("RUSTC")
            .env_remove("RUSTC_WRAPPER")
    }
}

/// Finds or installs the wasm toolchain.
pub(crate) fn ensure(ctx: &Context) -> Result<Toolchain> {
    if ctx.find_program("rustup").is_none() {
        bail!("rustup is not on the PATH; install it from https://rustup.rs (or `apt-get install rustup`)");
    }
    let toolchain = choose(ctx)?;
    if !has_source(ctx, &toolchain.name) {
        bail!("toolchain {} has no standard library source (component rust-src)", toolchain.name);
    }
    println!("   wasm toolchain: {} ({})", toolchain.name, toolchain.reason);
    Ok(toolchain)
}

fn choose(ctx: &Context) -> Result<Toolchain> {
    if let Ok(name) = std::env::var("WEBLANE_WASM_TOOLCHAIN") {
        return Ok(Toolchain { name, reason: "WEBLANE_WASM_TOOLCHAIN asks for it".into() });
    }
    let installed = ctx.output(ctx.cmd("rustup").args(["toolchain", "list"])).unwrap_or_default();
    let names: Vec<&str> = installed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    if let Some(name) = names.iter().rev().find(|name| name.starts_with("nightly") && has_source(ctx, name)) {
        return Ok(Toolchain { name: (*name).into(), reason: "an installed nightly with rust-src".into() });
    }
    let linked = names.contains(&DEBIAN_TOOLCHAIN) && has_source(ctx, DEBIAN_TOOLCHAIN);
    if linked && ctx.find_program("/usr/bin/rust-lld").is_some() {
        return Ok(Toolchain {
            name: DEBIAN_TOOLCHAIN.into(),
            reason: "Debian's rustc-web is installed and no nightly has rust-src".into(),
        });
    }
    if may_apt_install(ctx) {
        match install_debian(ctx) {
            Ok(()) => {
                return Ok(Toolchain {
                    name: DEBIAN_TOOLCHAIN.into(),
                    reason: "Debian's rustc-web, installed from its packages".into(),
                });
            }
            Err(error) => println!("   Debian's packages do not serve here ({error:#}); trying rustup"),
        }
    }
    println!("   installing a nightly with rust-src through rustup");
    let install = ["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"];
    ctx.run(ctx.cmd("rustup").args(install)).with_context(|| {
        format!(
            "no toolchain can build the standard library. Either give rustup a connection and type\n    rustup {}\n\
             or, on Debian,\n    sudo apt-get install --no-install-recommends {} && rustup toolchain link {DEBIAN_TOOLCHAIN} /usr",
            install.join(" "),
            DEBIAN_PACKAGES.join(" ")
        )
    })?;
    Ok(Toolchain { name: "nightly".into(), reason: "a nightly with rust-src, installed by rustup".into() })
}

fn install_debian(ctx: &Context) -> Result<()> {
    apt_install(ctx, &DEBIAN_PACKAGES, "the wasm toolchain")?;
    ctx.run(ctx.cmd("rustup").args(["toolchain", "link", DEBIAN_TOOLCHAIN, "/usr"]))
}

fn has_source(ctx: &Context, toolchain: &str) -> bool {
    let command = ctx.cmd("rustc").env("RUSTUP_TOOLCHAIN", toolchain).args(["--print", "sysroot"]);
    ctx.output(command)
        .is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib/src/rust/library/std/Cargo.toml").exists())
}

/// wasm-bindgen's command line in the version that Cargo.lock holds, and wasm-pack.
/// Returns the directories to put in front of the PATH.
pub(crate) fn ensure_wasm_tools(ctx: &Context) -> Result<WasmTools> {
    let version = locked_version(ctx, "wasm-bindgen")?;
    let bindgen = ensure_cargo_tool(ctx, "wasm-bindgen", Some(("wasm-bindgen-cli", &version)))?;
    let pack = ensure_cargo_tool(ctx, "wasm-pack", Some(("wasm-pack", WASM_PACK_VERSION)))?;
    Ok(WasmTools { bindgen, pack })
}

/// Programs that turn a compiled crate into a module with JavaScript glue.
pub(crate) struct WasmTools {
    bindgen: PathBuf,
    /// The wasm-pack program.
    pub(crate) pack: PathBuf,
}

impl WasmTools {
    /// The PATH on which wasm-pack finds the right wasm-bindgen.
    pub(crate) fn search_path(&self) -> Result<std::ffi::OsString> {
        let old = std::env::var_os("PATH").unwrap_or_default();
        let own = self.bindgen.parent().context("wasm-bindgen has no directory")?.to_path_buf();
        Ok(std::env::join_paths(std::iter::once(own).chain(std::env::split_paths(&old)))?)
    }
}

/// A program that cargo can install. With `Some((package, version))` exactly that version, from the
/// PATH, from `target/tools`, or built now; with `None` any version under the program's own name.
pub(crate) fn ensure_cargo_tool(ctx: &Context, program: &str, wanted: Option<(&str, &str)>) -> Result<PathBuf> {
    let own = ctx.path("target/tools/bin").join(program);
    for candidate in [Some(own.clone()), ctx.find_program(program)].into_iter().flatten() {
        let Some(text) = ctx.output(ctx.cmd(&candidate).arg("--version")) else { continue };
        match wanted {
            Some((_, version)) if text.split_whitespace().nth(1) != Some(version) => {}
            _ => return Ok(candidate),
        }
    }
    let package = wanted.map_or(program, |(package, _)| package);
    println!("   installing {package} with cargo (a few minutes on a small machine)");
    let mut command = ctx
        .cmd("cargo")
        .args(["install", "--quiet", package, "--root"])
        .arg(ctx.path("target/tools"))
        .env("CARGO_TARGET_DIR", ctx.path("target/setup/cargo-install"))
        // These programs run for seconds; optimising them would cost minutes.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    if let Some((_, version)) = wanted {
        command = command.args(["--version", version]);
    }
    ctx.run(command)?;
    Ok(own)
}

/// The version of a package in Cargo.lock.
fn locked_version(ctx: &Context, package: &str) -> Result<String> {
    let lock = ctx.path("Cargo.lock");
    if !lock.exists() {
        ctx.run(ctx.cmd("cargo").args(["generate-lockfile", "--quiet"]))?;
    }
    let text = fs::read_to_string(&lock).context("cannot read Cargo.lock")?;
    let heading = format!("name = \"{package}\"");
    text.lines()
        .skip_while(|line| *line != heading)
        .nth(1)
        .and_then(|line| line.strip_prefix("version = \"")?.strip_suffix('"'))
        .map(str::to_owned)
        .with_context(|| format!("Cargo.lock does not name {package}"))
}
