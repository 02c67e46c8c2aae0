//! Reading a node of the model: each attribute is asked for by name, and one that nobody asked for is an error.

use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::onnx::{Attribute, AttributeValue};
use crate::tensor::{DType, Tensor};
use std::collections::HashMap;
use std::sync::Arc;
use weblane_kernels::epilogue::Activation;

/// The attributes of one node, and what else `parse` may want to know of it.
#[derive(Debug)]
pub struct Attributes {
    attributes: HashMap<String, AttributeValue>,
    bodies: HashMap<String, Graph>,
    op_type: String,
    opset: i64,
    inputs: Vec<bool>,
    outputs: usize,
}

macro_rules! scalar_and_list {
    ($($one:ident $many:ident $t:ty, $variant:ident $variants:ident, $what:literal;)*) => { $(
        #[doc = concat!("The attribute as ", $what, ", if the node has it.")]
        pub fn $one(&mut self, name: &str) -> Result<Option<$t>> {
            match self.attributes.remove(name) {
                None => Ok(None),
                Some(AttributeValue::$variant(v)) => Ok(Some(v)),
                Some(other) => Err(wrong_type(name, &other, $what)),
            }
        }

        #[doc = concat!("The attribute as a list of ", $what, ", if the node has it.")]
        pub fn $many(&mut self, name: &str) -> Result<Option<Vec<$t>>> {
            match self.attributes.remove(name) {
                None => Ok(None),
                Some(AttributeValue::$variants(v)) => Ok(Some(v)),
                Some(other) => Err(wrong_type(name, &other, concat!("list of ", $what))),
            }
        }
    )* };
}

impl Attributes {
    /// For a node of operator `op_type` in version `opset` of its domain; `bodies` are its imported subgraphs.
    pub fn new(
        op_type: &str,
        opset: i64,
        attributes: Vec<Attribute>,
        bodies: HashMap<String, Graph>,
        inputs: Vec<bool>,
        outputs: usize,
    ) -> Self {
        let attributes = attributes.into_iter().map(|a| (a.name, a.value)).collect();
        Attributes { attributes, bodies, op_type: op_type.to_owned(), opset, inputs, outputs }
    }

    scalar_and_list! {
        int ints i64, Int Ints, "int";
        float floats f32, Float Floats, "float";
    }

    /// The attribute, or its default.
    pub fn int_or(&mut self, name: &str, default: i64) -> Result<i64> {
        Ok(self.int(name)?.unwrap_or(default))
    }

    /// The attribute, or its default.
    pub fn float_or(&mut self, name: &str, default: f32) -> Result<f32> {
        Ok(self.float(name)?.unwrap_or(default))
    }

    /// An int attribute that stands for a truth value.
    pub fn flag_or(&mut self, name: &str, default: bool) -> Result<bool> {
        match self.int(name)? {
            None => Ok(default),
            Some(v @ (0 | 1)) => Ok(v == 1),
            Some(v) => Err(Error::unsupported_attribute(format!("attribute {name} is {v}; 0 or 1 was wanted"))),
        }
    }

    /// The attribute as text, if the node has it.
    pub fn string(&mut self, name: &str) -> Result<Option<String>> {
        let bytes = match self.attributes.remove(name) {
            None => return Ok(None),
            Some(AttributeValue::String(v)) => v,
            Some(other) => return Err(wrong_type(name, &other, "string")),
        };
        let text = String::from_utf8(bytes);
        text.map(Some).map_err(|_| Error::invalid_model(format!("attribute {name} is not UTF-8")))
    }

    /// The attribute as text, or its default.
    pub fn string_or(&mut self, name: &str, default: &str) -> Result<String> {
        Ok(self.string(name)?.unwrap_or_else(|| default.to_owned()))
    }

    /// The attribute as a list of texts, if the node has it.
    pub fn strings(&mut self, name: &str) -> Result<Option<Vec<String>>> {
        let list = match self.attributes.remove(name) {
            None => return Ok(None),
            Some(AttributeValue::Strings(v)) => v,
            Some(other) => return Err(wrong_type(name, &other, "list of string")),
        };
        let texts: std::result::Result<_, _> = list.into_iter().map(String::from_utf8).collect();
        texts.map(Some).map_err(|_| Error::invalid_model(format!("attribute {name} is not UTF-8")))
    }

    /// The function that onnxruntime's optimiser has put into a product, attribute `activation`; `parameter` gives its
    /// numbers in the order of ONNX.
    pub fn activation(&mut self, parameter: &mut dyn FnMut(&mut Self, usize) -> Result<f32>) -> Result<Activation> {
        let Some(name) = self.string("activation")? else { return Ok(Activation::Identity) };
        Ok(match name.as_str() {
            "" => Activation::Identity,
            "Relu" => Activation::Relu,
            "Sigmoid" => Activation::Sigmoid,
            "Tanh" => Activation::Tanh,
            "HardSwish" => Activation::HardSwish,
            "LeakyRelu" => Activation::LeakyRelu { alpha: parameter(self, 0)? },
            "Clip" => Activation::Clip { lo: parameter(self, 0)?, hi: parameter(self, 1)? },
            "HardSigmoid" => Activation::HardSigmoid { alpha: parameter(self, 0)?, beta: parameter(self, 1)? },
            other => {
                return Err(Error::unsupported_attribute(format!(
                    "attribute activation is {other}; Relu, Sigmoid, Tanh, HardSwish, LeakyRelu, Clip or HardSigmoid \
                     was wanted"
                )));
            }
        })
    }

    /// One of a fixed set of texts, by the value that stands beside it; the first is the default.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<T> {
        let text = self.string(name)?;
        let Some(text) = text else { return Ok(choices[0].1) };
        choices.iter().find(|(s, _)| *s == text).map(|(_, t)| *t).ok_or_else(|| {
            let wanted: Vec<_> = choices.iter().map(|(s, _)| *s).collect();
            Error::unsupported_attribute(format!("attribute {name} is \"{text}\"; one of {wanted:?} was wanted"))
        })
    }

    /// The attribute as a tensor, if the node has it.
    pub fn tensor(&mut self, name: &str) -> Result<Option<Arc<Tensor>>> {
        match self.attributes.remove(name) {
            None => Ok(None),
            Some(AttributeValue::Tensor(t)) => Ok(Some(Arc::new(t.into_tensor()?))),
            Some(other) => Err(wrong_type(name, &other, "tensor")),
        }
    }

    /// The attribute as it stands in the file, for kinds that hardly any operator has.
    pub fn raw(&mut self, name: &str) -> Option<AttributeValue> {
        self.attributes.remove(name)
    }

    /// The attribute as an element type in ONNX's numbering, if the node has it.
    pub fn dtype(&mut self, name: &str) -> Result<Option<DType>> {
        let code = self.int(name)?;
        let known = |c| {
            DType::from_onnx(c).ok_or_else(|| {
                Error::unsupported_dtype(format!("attribute {name} is element type number {c}, which is not supported"))
            })
        };
        code.map(known).transpose()
    }

    /// The attribute as a body. Its inputs are its own, then the captured values, which are the node's last operands.
    pub fn graph(&mut self, name: &str) -> Result<Graph> {
        self.bodies.remove(name).ok_or_else(|| Error::invalid_model(format!("the body \"{name}\" is missing")))
    }

    /// The attribute, which must be there.
    pub fn required<T>(&mut self, name: &str, read: impl FnOnce(&mut Self, &str) -> Result<Option<T>>) -> Result<T> {
        read(self, name)?.ok_or_else(|| Error::invalid_model(format!("attribute {name} is missing")))
    }

    /// Accepts an attribute without reading it, because it cannot change the result of inference.
    pub fn ignore(&mut self, name: &str) {
        self.attributes.remove(name);
    }

    /// Whether the node has the attribute and nobody read it yet.
    pub fn has(&self, name: &str) -> bool {
        self.attributes.contains_key(name)
    }

    /// The operator's name in the model, for files that serve several.
    pub fn op_type(&self) -> &str {
        &self.op_type
    }

    /// Version of the operator's domain that the model imports.
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// How many operands the node lists, left-out ones included and captured ones not.
    pub fn input_count(&self) -> usize {
        self.inputs.len()
    }

    /// Whether the operand is given.
    pub fn has_input(&self, i: usize) -> bool {
        self.inputs.get(i).copied().unwrap_or(false)
    }

    /// How many results the node lists.
    pub fn output_count(&self) -> usize {
        self.outputs
    }

    /// Checks that every attribute was read.
    pub fn finish(self) -> Result<()> {
        let mut unread: Vec<_> = self.attributes.into_keys().collect();
        unread.sort_unstable();
        match unread.is_empty() {
            true => Ok(()),
            false => Err(Error::unsupported_attribute(format!(
                "{} of opset {} is not known with attribute {}",
                self.op_type,
                self.opset,
                unread.join(", ")
            ))),
        }
    }
}

fn wrong_type(name: &str, met: &AttributeValue, wanted: &str) -> Error {
    Error::invalid_model(format!("attribute {name} is of kind {}; {wanted} was wanted", met.type_code()))
}
