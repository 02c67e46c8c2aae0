//! Whole models against native onnxruntime: on every instruction set of the machine, optimised and as they stand.
//!
//! Models come from `models/build.py`, `models/contrib.py` and the mirror of published ones; what is not there is named and
//! skipped.

use std::path::{Path, PathBuf};
use std::process::Command;
use weblane_kernels::simd::Isa;

/// Name, and the folders with `model.onnx` and `data.json`, of every model with goldens.
fn models() -> Vec<(String, PathBuf, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mirror = std::env::var_os("WEBLANE_MODEL_MIRROR").map_or_else(|| root.join("../shared/models"), PathBuf::from);
    let published = ["mnist", "silero_vad_v5", "squeezenet_fp16", "ultraface_rfb_320", "yolox_nano"];
    let built = [
        "digits",
        "mobilenet_v2",
        "efficientnet_lite0",
        "resnet50",
        "minilm_l6",
        "all_minilm_l6_v2",
        "distilbert_base",
        "bert_base",
    ];
    let published = published.iter().map(|n| (n, mirror.join(n), mirror.join(n)));
    let built = built.iter().map(|n| (n, root.join("target/models").join(n), root.join("target/goldens").join(n)));
    let mut models: Vec<_> = published.chain(built).map(|(n, model, data)| (n.to_string(), model, data)).collect();
    let families = std::fs::read_dir(root.join("target/contrib")).into_iter().flatten().flatten();
    models.extend(
        families
            .filter(|f| f.path().is_dir())
            .map(|f| (f.file_name().to_string_lossy().into_owned(), f.path(), f.path())),
    );
    models
}

#[test]
fn goldens_hold_on_every_instruction_set() {
    let mut failures = Vec::new();
    let mut ran = 0;
    for (name, model, data) in models() {
        let (model, data) = (model.join("model.onnx"), data.join("data.json"));
        if !model.exists() || !data.exists() {
            eprintln!("skipped {name}: {} or {} is not there", model.display(), data.display());
            continue;
        }
        for isa in Isa::available() {
            for optimize in ["all", "none"] {
                let output = Command::new(env!("CARGO_BIN_EXE_weblane"))
                    .args(["golden", "--threads", "2", "--optimize", optimize, "--isa", &isa.to_string()])
                    .args([&model, &data])
                    .output()
                    .expect("the program of this package starts");
                ran += 1;
                if !output.status.success() {
                    let error = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
                    failures.push(format!("{name}, {isa}, optimize {optimize}: {error}"));
                }
            }
        }
    }
    eprintln!("{ran} runs");
    assert!(failures.is_empty(), "{} of {ran} runs failed:\n{}", failures.len(), failures.join("\n"));
}
