//! Models that tests, benches and the demo use, made or fetched by the recipes under `models/`.

use crate::context::{Context, heading};
use crate::{build, python};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Models with an architecture of their own and seeded weights.
const WORKLOADS: [&str; 15] = [
    "mobilenet_v2",
    "efficientnet_lite0",
    "resnet50",
    "distilbert_base",
    "bert_base",
    "minilm_l6",
    "all_minilm_l6_v2",
    "digits",
    "mobilenet_v2_int8",
    "efficientnet_lite0_int8",
    "resnet50_int8",
    "minilm_l6_int8",
    "distilbert_base_int8",
    "distilgpt2",
    "distilgpt2_int8",
];
/// Where the small models of onnxruntime's own operators are, with their goldens.
const CONTRIB: &str = "target/contrib";
/// Has no golden: two evaluations of the file that are both right do not agree to the cosine that is wanted. With onnxruntime it
/// is 0.9967 between the unoptimised graph and exact integers, with weblane's unoptimised graph 0.987 where multiply-add is not
/// fused: random weights and a softmax in few steps amplify what rounds the other way.
const WITHOUT_GOLDEN: &str = "efficientnet_lite0_int8";
/// What the pages of the demo site load.
const DEMO: [&str; 2] = ["all_minilm_l6_v2", "digits"];

/// Runs `models/build.py` for these names; models that are up to date cost nothing.
fn make(ctx: &Context, names: &[&str]) -> Result<()> {
    let python = python::ensure(ctx)?;
    ctx.run(ctx.cmd(python).args(["models/build.py", "--out", "target/models"]).args(names))
}

/// Builds the six workloads and the two small models.
pub(crate) fn ensure_workloads(ctx: &Context) -> Result<()> {
    make(ctx, &WORKLOADS)
}

/// Builds the twins that LiteRT.js runs. Only its bench needs them, so no other command does this.
pub(crate) fn ensure_tflite(ctx: &Context) -> Result<()> {
    let python = python::ensure_tflite(ctx)?;
    ctx.run(ctx.cmd(python).args(["models/build_tflite.py", "--out", "target/models-tflite"]))
}

/// The quantised form of a model, beside it.
const INT8: &str = "model_int8.onnx";

/// Writes the dynamic 8-bit form of a model.
fn quantise(ctx: &Context, name: &str) -> Result<()> {
    let folder = ctx.path("target/models").join(name);
    let weblane = ctx.cmd(build::native_program(ctx)?).args(["quantize", "--quiet", "--mode", "dynamic"]);
    ctx.run(weblane.arg(folder.join("model.onnx")).arg("-o").arg(folder.join(INT8)))
}

/// Builds the models of the demo.
pub(crate) fn ensure_demo_models(ctx: &Context) -> Result<()> {
    make(ctx, &DEMO)
}

/// Builds the models of the demo and copies them to where the site is built from.
pub(crate) fn ensure_for_demo(ctx: &Context) -> Result<()> {
    make(ctx, &DEMO)?;
    quantise(ctx, DEMO[0])?;
    for name in DEMO {
        let target = ctx.path("demo-site/public/models").join(name);
        fs::create_dir_all(&target)?;
        let source = ctx.path("target/models").join(name);
        // A page loads one of them.
        let quantised = source.join(INT8).exists();
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            if entry.file_name() == "stamp.json" {
                continue;
            }
            if quantised && entry.file_name() == "model.onnx" {
                let _ = fs::remove_file(target.join(entry.file_name()));
                continue;
            }
            let copy = target.join(entry.file_name());
            let source = entry.metadata()?;
            let same = fs::metadata(&copy).is_ok_and(|old| {
                old.len() == source.len() && matches!((old.modified(), source.modified()), (Ok(a), Ok(b)) if a >= b)
            });
            if !same {
                fs::copy(entry.path(), &copy).with_context(|| format!("cannot write {}", copy.display()))?;
            }
        }
    }
    Ok(())
}

fn with_golden() -> impl Iterator<Item = &'static str> {
    WORKLOADS.into_iter().filter(|name| *name != WITHOUT_GOLDEN)
}

/// Collects every model that has a golden in `target/models-test/<name>/{model.onnx,data.json}`, and the
/// names in `index.json` beside them. Published models that cannot be had here are named and left out.
pub(crate) fn ensure_for_tests(ctx: &Context) -> Result<()> {
    heading("models and goldens");
    let python = python::ensure(ctx)?;
    ensure_workloads(ctx)?;
    // The script leaves goldens alone that are up to date.
    ctx.run(ctx.cmd(&python).arg("models/goldens.py").args(with_golden()))?;
    // So does this one.
    ctx.run(ctx.cmd(&python).args(["models/contrib.py", "--out", CONTRIB]))?;

    let mut collected = Vec::new();
    let out = ctx.path("target/models-test");
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    for name in with_golden() {
        let model = ctx.path("target/models").join(name).join("model.onnx");
        let golden = ctx.path("target/goldens").join(name).join("data.json");
        collect(&out, name, &model, &golden)?;
        collected.push(name.to_owned());
    }
    let families =
        fs::read_to_string(ctx.path(CONTRIB).join("index.json")).context("models/contrib.py left no index")?;
    for name in serde_json::from_str::<Vec<String>>(&families)? {
        let made = ctx.path(CONTRIB).join(&name);
        collect(&out, &name, &made.join("model.onnx"), &made.join("data.json"))?;
        collected.push(name);
    }
    for name in published(ctx)? {
        let fetch = ctx.cmd(&python).args(["models/build.py", "--out", "target/models", &name]);
        let Some(line) = ctx.output(fetch) else {
            println!("   {name}: skipped, the published model is neither in a mirror nor reachable");
            continue;
        };
        let model = PathBuf::from(line.trim_start_matches(&name).trim_start_matches(": "));
        let beside = model.with_file_name("data.json");
        let golden = if beside.exists() { beside } else { ctx.path("target/goldens").join(&name).join("data.json") };
        if !golden.exists() {
            let write = ctx.cmd(&python).arg("models/goldens.py").args(["--dim", "batch=1"]).arg(&model);
            if ctx.run(write).is_err() || !golden.exists() {
                println!("   {name}: skipped, no golden could be made for it");
                continue;
            }
        }
        collect(&out, &name, &model, &golden)?;
        collected.push(name);
    }
    fs::write(out.join("index.json"), serde_json::to_string_pretty(&collected)?)?;
    println!("   {} models with goldens", collected.len());
    Ok(())
}

/// Hard links where the file system can, else copies: the largest model has 440 MB.
fn collect(out: &Path, name: &str, model: &Path, golden: &Path) -> Result<()> {
    let target = out.join(name);
    fs::create_dir_all(&target)?;
    for (source, file) in [(model, "model.onnx"), (golden, "data.json")] {
        let copy = target.join(file);
        if fs::hard_link(source, &copy).is_err() {
            fs::copy(source, &copy).with_context(|| format!("cannot copy {}", source.display()))?;
        }
    }
    Ok(())
}

/// Names of the models in the manifest.
fn published(ctx: &Context) -> Result<Vec<String>> {
    let text = fs::read_to_string(ctx.path("models/manifest.json")).context("cannot read models/manifest.json")?;
    let manifest: serde_json::Value = serde_json::from_str(&text)?;
    let Some(models) = manifest["models"].as_array() else { bail!("models/manifest.json has no list of models") };
    Ok(models.iter().filter_map(|model| model["name"].as_str()).map(str::to_owned).collect())
}
