//! The quantiser as the worker calls it. `npm/src/wasm.ts` describes the same surface for TypeScript.

use crate::external::Externals;
use crate::{JsValueInfo, now, pool, throw, to_js};
use wasm_bindgen::prelude::*;
use weblane_engine::quantize::{self, QuantizeOptions, Quantizer, Sample};
use weblane_engine::{DType, Error, ErrorCode, Loader, Options, Tensor};

enum Stage {
    Reading(Loader),
    Collecting(Externals),
    Running(Box<Quantizer>),
    Done { bytes: Vec<u8>, report: JsValue },
    Failed,
}

/// One model on its way: first it takes the bytes, then samples, then it works in steps.
#[wasm_bindgen]
pub struct WasmQuantizer {
    stage: Stage,
    options: QuantizeOptions,
    samples: Vec<Sample>,
}

#[wasm_bindgen]
impl WasmQuantizer {
    /// A quantiser that waits for the bytes of its model.
    #[wasm_bindgen(constructor)]
    pub fn new(options: JsValue) -> Result<WasmQuantizer, JsValue> {
        let bad = |e: serde_wasm_bindgen::Error| throw(Error::new(ErrorCode::InvalidOption, e.to_string()));
        let options = serde_wasm_bindgen::from_value(options).map_err(bad)?;
        let loader = Loader::new(Options::default());
        Ok(WasmQuantizer { stage: Stage::Reading(loader), options, samples: Vec::new() })
    }

    /// How long the model file will be, where that is known. Call it before the first bytes.
    pub fn expect(&mut self, bytes: f64) -> Result<(), JsValue> {
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Reading(loader) => {
                self.stage = Stage::Reading(loader.expect_len(bytes as u64));
                Ok(())
            }
            _ => Err(out_of_turn("expect")),
        }
    }

    /// The next bytes of the model file, in chunks of any size.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), JsValue> {
        match &mut self.stage {
            Stage::Reading(loader) => loader.push(bytes).map_err(throw),
            _ => Err(out_of_turn("push")),
        }
    }

    /// The model file is complete. Returns the locations of external data that it names.
    pub fn externals(&mut self) -> Result<Vec<String>, JsValue> {
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Reading(loader) => {
                let externals = Externals::new(loader.finish().map_err(throw)?.0);
                let locations = externals.locations();
                self.stage = Stage::Collecting(externals);
                Ok(locations)
            }
            _ => Err(out_of_turn("externals")),
        }
    }

    /// The next bytes of a file of external data.
    #[wasm_bindgen(js_name = pushExternal)]
    pub fn push_external(&mut self, location: &str, bytes: &[u8]) -> Result<(), JsValue> {
        match &mut self.stage {
            Stage::Collecting(externals) => externals.push(location, bytes).map_err(throw),
            _ => Err(out_of_turn("pushExternal")),
        }
    }

    /// The inputs that samples give values for.
    pub fn inputs(&self) -> Result<JsValue, JsValue> {
        match &self.stage {
            Stage::Collecting(externals) => {
                let inputs = quantize::inputs(externals.model()).map_err(throw)?;
                to_js(&inputs.iter().map(JsValueInfo::from).collect::<Vec<_>>())
            }
            _ => Err(out_of_turn("inputs")),
        }
    }

    /// The inputs given from now on belong to a further sample.
    #[wasm_bindgen(js_name = nextSample)]
    pub fn next_sample(&mut self) {
        self.samples.push(Vec::new());
    }

    /// An input of the current sample.
    pub fn input(&mut self, name: &str, dtype: &str, dims: &[u32], bytes: &[u8]) -> Result<(), JsValue> {
        let dims: Vec<usize> = dims.iter().map(|&d| d as usize).collect();
        let dtype =
            DType::ALL.iter().copied().find(|d| d.as_str() == dtype && *d != DType::String).ok_or_else(|| {
                throw(Error::unsupported_dtype(format!(
                    "the input \"{name}\": samples of type {dtype} cannot be given"
                )))
            })?;
        let mut tensor = Tensor::zeros(dtype, &dims).map_err(throw)?;
        if tensor.bytes().len() != bytes.len() {
            let want = tensor.bytes().len();
            let message = format!("the input \"{name}\" takes {want} bytes, {} were given", bytes.len());
            return Err(throw(Error::invalid_input(message)));
        }
        tensor.bytes_mut().copy_from_slice(bytes);
        match self.samples.last_mut() {
            Some(sample) => sample.push((name.to_owned(), tensor)),
            None => return Err(out_of_turn("input")),
        }
        Ok(())
    }

    /// Model and samples are complete.
    pub fn begin(&mut self) -> Result<(), JsValue> {
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Collecting(externals) => {
                let model = externals.resolve().map_err(throw)?;
                let engine = Options { threads: pool().threads(), ..Options::default() };
                pool().cancel_flag().reset();
                let (options, samples) = (self.options.clone(), std::mem::take(&mut self.samples));
                let quantizer = Quantizer::new(model, options, samples, engine, pool()).map_err(throw)?;
                self.stage = Stage::Running(Box::new(quantizer));
                Ok(())
            }
            _ => Err(out_of_turn("begin")),
        }
    }

    /// Works until all is done (true) or `budget_ms` have passed (false).
    pub fn advance(&mut self, budget_ms: f64) -> Result<bool, JsValue> {
        let Stage::Running(quantizer) = &mut self.stage else { return Err(out_of_turn("advance")) };
        let end = now() + budget_ms;
        while !quantizer.step().map_err(throw)? {
            if now() >= end {
                return Ok(false);
            }
        }
        if let Stage::Running(quantizer) = std::mem::replace(&mut self.stage, Stage::Failed) {
            let (model, report) = quantizer.finish().map_err(throw)?;
            self.stage = Stage::Done { bytes: model.to_bytes(), report: to_js(&report)? };
        }
        Ok(true)
    }

    /// How far it has come.
    pub fn progress(&self) -> Result<JsValue, JsValue> {
        match &self.stage {
            Stage::Running(quantizer) => to_js(&quantizer.progress()),
            _ => Err(out_of_turn("progress")),
        }
    }

    /// The new file; it can be taken once.
    pub fn model(&mut self) -> Result<Vec<u8>, JsValue> {
        match &mut self.stage {
            Stage::Done { bytes, .. } => Ok(std::mem::take(bytes)),
            _ => Err(out_of_turn("model")),
        }
    }

    /// What became of the model.
    pub fn report(&self) -> Result<JsValue, JsValue> {
        match &self.stage {
            Stage::Done { report, .. } => Ok(report.clone()),
            _ => Err(out_of_turn("report")),
        }
    }
}

fn out_of_turn(method: &str) -> JsValue {
    throw(Error::internal(format!("{method} was called at the wrong stage of a quantisation")))
}
