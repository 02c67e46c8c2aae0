//! `weblane run`: NumPy files in, NumPy files out.

use crate::{EngineArgs, open};
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use half::f16;
use npyz::WriterBuilder;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use weblane_engine::tensor::Element;
use weblane_engine::{DType, Tensor, TensorView};

#[derive(Args)]
pub(crate) struct Run {
    /// The .onnx file
    model: PathBuf,
    /// An input as NAME=FILE.npy; once per input
    #[arg(long = "input", value_name = "NAME=FILE")]
    inputs: Vec<String>,
    /// Folder for the outputs, one .npy file each; without it a summary is printed
    #[arg(long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

impl Run {
    pub(crate) fn run(self) -> Result<()> {
        let mut session = open(&self.model, &self.engine)?;
        let mut feeds = Vec::new();
        for text in &self.inputs {
            let (name, file) = text.split_once('=').ok_or_else(|| anyhow!("\"{text}\" is not NAME=FILE"))?;
            let wanted = session.inputs().iter().find(|i| i.name == name).map(|i| i.dtype);
            let tensor = read_npy(Path::new(file), wanted).with_context(|| format!("input {name} from {file}"))?;
            feeds.push((name, tensor));
        }
        let views: Vec<(&str, TensorView)> = feeds.iter().map(|(n, t)| (*n, t.view())).collect();
        let outputs = session.run(&views)?;
        for (info, tensor) in session.outputs().iter().zip(&outputs) {
            println!("{}  {} {:?}  {}", info.name, tensor.dtype(), tensor.dims(), summary(tensor));
            if let Some(folder) = &self.output {
                std::fs::create_dir_all(folder)?;
                let safe: String = info.name.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
                write_npy(&folder.join(format!("{safe}.npy")), tensor)?;
            }
        }
        Ok(())
    }
}

fn summary(t: &Tensor) -> String {
    let Ok(x) = t.as_slice::<f32>() else { return String::new() };
    let (lo, hi) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len().max(1) as f64;
    format!("min {lo:.6}  mean {mean:.6}  max {hi:.6}")
}

fn read_npy(path: &Path, wanted: Option<DType>) -> Result<Tensor> {
    read_npy_from(BufReader::new(File::open(path)?), wanted)
}

/// An array from the bytes of an .npy file.
pub(crate) fn read_npy_from(file: impl std::io::Read, wanted: Option<DType>) -> Result<Tensor> {
    let npy = npyz::NpyFile::new(file)?;
    if npy.order() != npyz::Order::C {
        bail!("the array is in Fortran order; save it with numpy.ascontiguousarray");
    }
    let dims: Vec<usize> = npy.shape().iter().map(|&d| usize::try_from(d)).collect::<Result<_, _>>()?;
    let text = npy.dtype().descr();
    let text = text.trim_matches(['\'', '"']);
    fn read<T: npyz::Deserialize + Element>(npy: npyz::NpyFile<impl std::io::Read>, dims: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_slice(dims, &npy.into_vec::<T>()?)?)
    }
    match text.trim_start_matches(['<', '|', '=']) {
        "f4" => read::<f32>(npy, &dims),
        "f8" => read::<f64>(npy, &dims),
        "i1" => read::<i8>(npy, &dims),
        "i2" => read::<i16>(npy, &dims),
        "i4" => read::<i32>(npy, &dims),
        "i8" => read::<i64>(npy, &dims),
        "u1" => read::<u8>(npy, &dims),
        "u2" => read::<u16>(npy, &dims),
        "u4" => read::<u32>(npy, &dims),
        "u8" => read::<u64>(npy, &dims),
        "b1" => Ok(Tensor::from_bools(&dims, &npy.into_vec::<bool>()?)?),
        "f2" => {
            let bits = npy.into_vec::<f16>()?;
            Ok(Tensor::from_slice(&dims, &bits)?)
        }
        _ => bail!("element type {text} cannot be read; the model wants {}", wanted.map_or("?", DType::as_str)),
    }
}

fn write_npy(path: &Path, t: &Tensor) -> Result<()> {
    fn write<T: npyz::Serialize + npyz::AutoSerialize + Copy>(path: &Path, dims: &[usize], values: &[T]) -> Result<()> {
        let shape: Vec<u64> = dims.iter().map(|&d| d as u64).collect();
        let mut w = npyz::WriteOptions::new()
            .default_dtype()
            .shape(&shape)
            .writer(BufWriter::new(File::create(path)?))
            .begin_nd()?;
        w.extend(values.iter().copied())?;
        Ok(w.finish()?)
    }
    let dims = t.dims();
    match t.dtype() {
        DType::F32 => write(path, dims, t.as_slice::<f32>()?),
        DType::F64 => write(path, dims, t.as_slice::<f64>()?),
        DType::F16 => write(path, dims, t.as_slice::<f16>()?),
        DType::I8 => write(path, dims, t.as_slice::<i8>()?),
        DType::I16 => write(path, dims, t.as_slice::<i16>()?),
        DType::I32 => write(path, dims, t.as_slice::<i32>()?),
        DType::I64 => write(path, dims, t.as_slice::<i64>()?),
        DType::U8 => write(path, dims, t.as_slice::<u8>()?),
        DType::U16 => write(path, dims, t.as_slice::<u16>()?),
        DType::U32 => write(path, dims, t.as_slice::<u32>()?),
        DType::U64 => write(path, dims, t.as_slice::<u64>()?),
        DType::Bool => write(path, dims, &t.bytes().iter().map(|&b| b != 0).collect::<Vec<bool>>()),
        other => bail!("{other} tensors have no .npy form"),
    }
}
