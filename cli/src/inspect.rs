//! `weblane inspect`.

use crate::{EngineArgs, open};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use weblane_engine::fact::Dim;
use weblane_engine::session::ValueInfo;

#[derive(Args)]
pub(crate) struct Inspect {
    /// The .onnx file
    model: PathBuf,
    /// Also list the nodes that are left after optimisation
    #[arg(long)]
    nodes: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

impl Inspect {
    pub(crate) fn run(self) -> Result<()> {
        let session = open(&self.model, &self.engine)?;
        let info = session.info();
        println!("opset {}   producer {}", info.opset, if info.producer.is_empty() { "?" } else { &info.producer });
        for (what, values) in [("input ", session.inputs()), ("output", session.outputs())] {
            values.iter().for_each(|v| println!("{what}  {}", describe(v)));
        }
        println!("nodes in the file:");
        info.operators.iter().for_each(|(name, n)| println!("  {n:5}  {name}"));
        println!("{} nodes and {} bytes of constants after optimisation", info.nodes, info.constant_bytes);
        if self.nodes {
            for node in &session.graph().nodes {
                println!("  {:24} {:?}", node.op.name(), node.name);
            }
        }
        Ok(())
    }
}

/// `name  float32 [batch, 3, 224, 224]`
pub(crate) fn describe(v: &ValueInfo) -> String {
    let shape = v.shape.as_ref().map_or_else(
        || "of unknown rank".to_owned(),
        |s| format!("[{}]", s.iter().map(Dim::to_string).collect::<Vec<_>>().join(", ")),
    );
    format!("{}  {} {shape}", v.name, v.dtype)
}
