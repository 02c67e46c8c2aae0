//! Where the project is, and how commands are run and remembered.

use anyhow::{Context as _, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use xshell::{Cmd, Shell};

/// The project root and a shell that works in it.
pub(crate) struct Context {
    /// Root of the work tree.
    pub(crate) root: PathBuf,
    shell: Shell,
}

/// What a cold set-up, build and test may write to the disk: `target/` had 8.3 GiB after them.
const COLD_BYTES: u64 = 11 << 30;
/// What a build over an earlier one may need.
const WARM_BYTES: u64 = 2 << 30;

impl Context {
    pub(crate) fn new() -> Result<Self> {
        let manifest =
            std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let root = manifest.parent().context("xtask has no parent directory")?.to_path_buf();
        let shell = Shell::new()?;
        shell.change_dir(&root);
        Ok(Self { root, shell })
    }

    /// Says so before the first step if the disk will be full: afterwards every tool says it in its own words.
    pub(crate) fn check_disk(&self) -> Result<()> {
        let free = fs4::available_space(&self.root).context("looking for room on the disk")?;
        let wanted = if self.path("target/wasm").exists() { WARM_BYTES } else { COLD_BYTES };
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        if free < wanted {
            println!(
                "warning: {:.1} GiB are free where {} lies; up to {:.0} GiB may be written",
                gib(free),
                self.root.display(),
                gib(wanted)
            );
        }
        Ok(())
    }

    /// A path under the root.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// A command that runs in the project root.
    pub(crate) fn cmd(&self, program: impl AsRef<Path>) -> Cmd<'_> {
        self.shell.cmd(program).env_remove("CARGO").env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_MANIFEST_PATH")
    }

    /// Echoes and runs a command; its output goes to the terminal.
    pub(crate) fn run(&self, command: Cmd<'_>) -> Result<()> {
        Ok(command.run()?)
    }

    /// Runs a command in a directory under the root.
    pub(crate) fn run_in(&self, directory: impl AsRef<Path>, build: impl FnOnce(&Self) -> Cmd<'_>) -> Result<()> {
        let _guard = self.shell.push_dir(self.path(directory));
        self.run(build(self))
    }

    /// Trimmed standard output of a command, or `None` when it cannot run or fails.
    pub(crate) fn output(&self, command: Cmd<'_>) -> Option<String> {
        let output = command.quiet().ignore_stderr().read().ok()?;
        Some(output.trim().to_owned())
    }

    /// Finds a program: an absolute path that exists, or a name on the PATH.
    pub(crate) fn find_program(&self, name: &str) -> Option<PathBuf> {
        if Path::new(name).is_absolute() {
            return Path::new(name).exists().then(|| name.into());
        }
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
    }

    /// Whether the step called `name` was last completed with exactly this content.
    pub(crate) fn is_stamped(&self, name: &str, content: &str) -> bool {
        fs::read_to_string(self.stamp(name)).is_ok_and(|stored| stored == content)
    }

    /// Remembers that the step called `name` was completed with this content.
    pub(crate) fn write_stamp(&self, name: &str, content: &str) -> Result<()> {
        let path = self.stamp(name);
        fs::create_dir_all(path.parent().context("stamp without directory")?)?;
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    }

    fn stamp(&self, name: &str) -> PathBuf {
        self.path("target/setup").join(format!("{}.stamp", name.replace('/', "_")))
    }
}

/// SHA-256 of one file in hexadecimal.
pub(crate) fn hash_file(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&Sha256::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Prints the heading of a step.
pub(crate) fn heading(text: &str) {
    println!("\n== {text}");
}

/// Runs a step under a heading and says how long it took.
pub(crate) fn timed<T>(text: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
    heading(text);
    let start = Instant::now();
    let result = step().with_context(|| text.to_owned());
    println!("   {text}: {:.1} s", start.elapsed().as_secs_f64());
    result
}

/// The user's rights to install system packages: root on a system with apt.
pub(crate) fn may_apt_install(ctx: &Context) -> bool {
    ctx.find_program("apt-get").is_some() && ctx.output(ctx.cmd("id").arg("-u")).as_deref() == Some("0")
}

/// apt has one lock for the system; two threads of set-up take turns.
static APT: Mutex<()> = Mutex::new(());

/// Installs Debian packages, or fails with the command to type.
pub(crate) fn apt_install(ctx: &Context, packages: &[&str], why: &str) -> Result<()> {
    let list = packages.join(" ");
    if !may_apt_install(ctx) {
        anyhow::bail!(
            "{why} needs packages that only an administrator may install. On Debian or Ubuntu type:\n    \
             sudo apt-get update && sudo apt-get install --no-install-recommends {list}"
        );
    }
    // What it guards is outside of this program, so a thread that panicked with it left nothing half done here.
    let _turn = APT.lock().unwrap_or_else(PoisonError::into_inner);
    println!("   {why}: installing {list}");
    let apt = |args: &[&str]| ctx.cmd("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(args);
    let install = ["install", "-y", "-qq", "--no-install-recommends"];
    let first = ctx.run(apt(&install).args(packages));
    if first.is_ok() {
        return Ok(());
    }
    // A fresh image has no package lists, an old one has stale ones.
    ctx.run(apt(&["update", "-qq"]))?;
    ctx.run(apt(&install).args(packages))
}
