//! `cargo xtask conformance`: ONNX's own cases, natively and in browsers, in one table per operator.

use crate::browsers::{self, Browser};
use crate::build::{self, BuildArgs};
use crate::context::{Context, hash_file, heading, timed};
use crate::{node, python};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

const CASES: &str = "target/conformance";
const PAGE: &str = "docs/conformance.md";
const RECORD: &str = "benches/records/conformance.json";
/// Fewer passing cases than this in any place is a failure of the command.
const MINIMUM: usize = 1000;

#[derive(Args, Default)]
pub(crate) struct ConformanceArgs {
    /// Run only here (the native engine is always run); Chromium when not given
    #[arg(long = "browser", value_enum)]
    browsers: Vec<Browser>,
    /// Only cases whose kind/name matches; then no page and no record are written
    #[arg(long = "match", value_name = "REGEX")]
    pattern: Option<String>,
    /// Only the native engine
    #[arg(long, conflicts_with = "browsers")]
    native_only: bool,
    /// Use the package in npm/dist as it is
    #[arg(long)]
    no_build: bool,
}

impl ConformanceArgs {
    /// As the test command runs it, after its own build.
    pub(crate) fn after_build() -> Self {
        Self { no_build: true, ..Self::default() }
    }
}

/// Cases by result of one place.
struct Column {
    title: String,
    results: BTreeMap<String, (bool, String)>,
}

impl Column {
    fn passed(&self) -> usize {
        self.results.values().filter(|(passed, _)| *passed).count()
    }
}

/// Runs the cases everywhere and returns a one-line summary.
pub(crate) fn run(ctx: &Context, args: &ConformanceArgs) -> Result<String> {
    let python = python::ensure(ctx)?;
    let stamp = format!(
        "{} {}",
        hash_file(&ctx.path("models/export_conformance.py"))?,
        hash_file(&ctx.path("models/requirements.txt"))?
    );
    if !ctx.path(CASES).join("index.json").exists() || !ctx.is_stamped("conformance", &stamp) {
        timed("exporting ONNX's cases", || {
            ctx.run(ctx.cmd(python).args(["models/export_conformance.py", "--out", CASES]))
        })?;
        ctx.write_stamp("conformance", &stamp)?;
    }
    let mut columns = Vec::new();
    for (title, optimize) in [("native", true), ("native, not optimised", false)] {
        columns.push(timed(&format!("conformance: {title}"), || native(ctx, args, title, optimize))?);
    }
    if !args.native_only {
        if !args.no_build {
            build::run(ctx, &BuildArgs::default())?;
        }
        node::install(ctx, "tests/wasm")?;
        let browsers = if args.browsers.is_empty() { &[Browser::Chromium][..] } else { &args.browsers };
        for browser in browsers {
            let name = browser.name();
            columns.push(timed(&format!("conformance: {name}"), || in_browser(ctx, args, *browser))?);
        }
    }
    heading("conformance");
    let summary: Vec<String> = columns
        .iter()
        .map(|column| format!("{}: {} of {} pass", column.title, column.passed(), column.results.len()))
        .collect();
    println!("   {}", summary.join("\n   "));
    if args.pattern.is_some() {
        for column in &columns {
            for (name, (_, message)) in column.results.iter().filter(|(_, (passed, _))| !passed) {
                println!("   {} {name}: {message}", column.title);
            }
        }
    } else {
        write_page(ctx, &columns)?;
        if let Some(column) = columns.iter().find(|column| column.passed() < MINIMUM) {
            bail!("{} passes {} cases, fewer than {MINIMUM}", column.title, column.passed());
        }
    }
    Ok(summary.join("; "))
}

fn native(ctx: &Context, args: &ConformanceArgs, title: &str, optimize: bool) -> Result<Column> {
    let out = ctx.path(format!("target/conformance-native{}.json", if optimize { "" } else { "-plain" }));
    let mut command = ctx.cmd(build::native_program(ctx)?).args(["conformance", "--cases", CASES, "--json"]).arg(&out);
    if !optimize {
        command = command.arg("--no-optimize");
    }
    if let Some(pattern) = &args.pattern {
        command = command.args(["--match", pattern]);
    }
    run_for_report(ctx, command, &out)?;
    read(title.into(), &out)
}

fn in_browser(ctx: &Context, args: &ConformanceArgs, browser: Browser) -> Result<Column> {
    let name = browser.name();
    let out = ctx.path(format!("target/conformance-{name}.json"));
    let mut command = ctx
        .cmd("node")
        .args(["tests/wasm/run.mjs", "--browser", name, "--cases", "conformance", "--quiet", "--json"])
        .arg(&out);
    for (key, value) in browsers::ensure(ctx, browser)?.environment() {
        command = command.env(key, value);
    }
    if let Some(pattern) = &args.pattern {
        command = command.args(["--match", pattern]);
    }
    run_for_report(ctx, command, &out)?;
    read(name.into(), &out)
}

/// Runners end with an error when a case fails, which is no news here; a missing report is.
fn run_for_report(ctx: &Context, command: xshell::Cmd<'_>, out: &PathBuf) -> Result<()> {
    if out.exists() {
        fs::remove_file(out)?;
    }
    ctx.run(command.ignore_status())?;
    if !out.exists() {
        bail!("the runner wrote no report");
    }
    Ok(())
}

/// Both runners write `{results: [{name, status: "pass" | "fail" | "skip", message}]}`.
fn read(title: String, path: &PathBuf) -> Result<Column> {
    let report: Value = serde_json::from_str(&fs::read_to_string(path)?)?;
    let list = report["results"].as_array().context("the report has no results")?;
    let results = list.iter().map(|result| {
        let name = result["name"].as_str().unwrap_or_default().trim_start_matches("conformance/");
        let message = result["message"].as_str().unwrap_or_default();
        (name.to_owned(), (result["status"] == "pass", message.lines().next().unwrap_or_default().to_owned()))
    });
    Ok(Column { title, results: results.collect() })
}

/// docs/conformance.md and the record: passed cases per operator and place.
fn write_page(ctx: &Context, columns: &[Column]) -> Result<()> {
    let index: Value = serde_json::from_str(&fs::read_to_string(ctx.path(CASES).join("index.json"))?)?;
    // Operator -> (cases, passed per column). A case counts for every operator that its model uses.
    let mut operators: BTreeMap<String, (usize, Vec<usize>)> = BTreeMap::new();
    let mut kinds: BTreeMap<String, (usize, Vec<usize>)> = BTreeMap::new();
    for case in index.as_array().context("index.json is not a list")? {
        let (Some(kind), Some(name)) = (case["kind"].as_str(), case["name"].as_str()) else { continue };
        let key = format!("{kind}/{name}");
        let passed: Vec<bool> =
            columns.iter().map(|column| column.results.get(&key).is_some_and(|(passed, _)| *passed)).collect();
        let count = |row: &mut (usize, Vec<usize>)| {
            row.0 += 1;
            row.1.resize(columns.len(), 0);
            for (sum, passed) in row.1.iter_mut().zip(&passed) {
                *sum += usize::from(*passed);
            }
        };
        count(kinds.entry(kind.to_owned()).or_default());
        for operator in case["ops"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            count(operators.entry(operator.to_owned()).or_default());
        }
    }
    let titles: Vec<&str> = columns.iter().map(|column| column.title.as_str()).collect();
    let table = |first: &str, rows: &BTreeMap<String, (usize, Vec<usize>)>| {
        let mut text =
            format!("| {first} | cases | {} |\n|---|---|{}\n", titles.join(" | "), "---|".repeat(titles.len()));
        for (name, (cases, passed)) in rows {
            let passed: Vec<String> = passed.iter().map(usize::to_string).collect();
            let _ = writeln!(text, "| {name} | {cases} | {} |", passed.join(" | "));
        }
        text
    };
    let page = format!(
        "# Conformance\n\nONNX's own backend cases (the version of `onnx` in `{}`), and how many of them pass where. \
         Written by\n`cargo xtask conformance`; do not edit.\n\n{}\n## By operator\n\nA case counts for every operator \
         that its model uses.\n\n{}",
        "models/requirements.txt",
        table("kind", &kinds),
        table("operator", &operators)
    );
    fs::create_dir_all(ctx.path("docs"))?;
    fs::write(ctx.path(PAGE), page)?;
    let failing: BTreeMap<&str, BTreeMap<&str, &str>> = columns
        .iter()
        .map(|column| {
            let failed = column.results.iter().filter(|(_, (passed, _))| !passed);
            (column.title.as_str(), failed.map(|(name, (_, message))| (name.as_str(), message.as_str())).collect())
        })
        .collect();
    let record = json!({
        "passed": columns.iter().map(|column| (column.title.clone(), column.passed())).collect::<BTreeMap<_, _>>(),
        "failing": failing,
    });
    fs::create_dir_all(ctx.path("benches/records"))?;
    fs::write(ctx.path(RECORD), serde_json::to_string_pretty(&record)? + "\n")?;
    println!("   wrote {PAGE} and {RECORD}");
    Ok(())
}
