/** The name of the quantised file of a float workload. */
const INT8 = "_int8";

/**
 * What is measured: a model, and the shapes and kinds of its inputs. The one list for every peer.
 * `kind` says what the elements are: "uniform" in 0..1, or the integer that all of them have. A quantised file names the
 * workload that it was made of as `float`.
 */
const tokens = (names, length) =>
  names.map((name) => ({
    name,
    type: "int64",
    dims: [1, length],
    kind: name === "token_type_ids" ? 0n : 1n,
  }));
const image = (name, dims, type = "float32") => [{ name, type, dims, kind: "uniform" }];
const bert = ["input_ids", "attention_mask", "token_type_ids"];

const FLOAT = [
  { name: "mobilenet_v2", inputs: image("input", [1, 3, 224, 224]) },
  { name: "efficientnet_lite0", inputs: image("images:0", [1, 224, 224, 3]) },
  { name: "resnet50", inputs: image("input", [1, 3, 224, 224]) },
  { name: "minilm_l6", inputs: tokens(bert, 128) },
  { name: "distilbert_base", inputs: tokens(bert.slice(0, 2), 128) },
  { name: "bert_base", inputs: tokens(bert, 128) },
  { name: "yolox_nano", inputs: image("images", [1, 3, 416, 416]) },
  { name: "ultraface_rfb_320", inputs: image("input", [1, 3, 240, 320]) },
  { name: "squeezenet_fp16", inputs: image("data_0", [1, 3, 224, 224], "float16") },
  {
    name: "silero_vad_v5",
    inputs: [
      ...image("input", [1, 576]),
      { name: "state", type: "float32", dims: [2, 1, 128], kind: "uniform" },
      { name: "sr", type: "int64", dims: [], kind: 16000n },
    ],
  },
];
const QUANTIZED = ["mobilenet_v2", "efficientnet_lite0", "resnet50", "minilm_l6", "distilbert_base"];

export const WORKLOADS = [
  ...FLOAT,
  ...QUANTIZED.map((float) => ({ ...FLOAT.find(({ name }) => name === float), name: float + INT8, float })),
];

/** The decoder of `decode.mjs`, in floats and quantised, and its caches: their names, and sizes of which the third one grows. */
export const DECODER = {
  names: ["distilgpt2", "distilgpt2_int8"],
  caches: {
    names: Array.from({ length: 6 }, (_, n) =>
      ["key", "value"].map((part) => `past_key_values.${n}.${part}`),
    ).flat(),
    dims: [1, 12, 0, 64],
  },
};

/**
 * Workloads that LiteRT.js runs too, from a twin of the same architecture that models/build_tflite.py makes: its inputs,
 * and the shape of its only output. The weights are other random ones, so there are no numbers to compare.
 */
export const LITERT = Object.fromEntries(
  ["mobilenet_v2", "efficientnet_lite0", "resnet50"]
    .flatMap((name) => [name, name + INT8])
    .map((name) => [name, { inputs: image("input", [1, 224, 224, 3]), output: "1x1000" }]),
);
