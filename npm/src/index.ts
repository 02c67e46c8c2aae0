/**
 * weblane runs ONNX models in the browser tab, on the CPU.
 *
 * @packageDocumentation
 */
export { ERROR_CODES, type ErrorCode, WeblaneError, type WeblaneErrorOptions } from "./errors.js";
export type { Feed, FeedObject, Feeds } from "./feeds.js";
export { decodeFloat16, encodeFloat16, type HalfArray } from "./half.js";
export type { LoadProgress, ModelInfo, NodeTiming, RunProgress, RuntimeInfo, ValueInfo } from "./protocol.js";
export { Runtime, type RuntimeCreateOptions, type RuntimeOptions, type WasmPaths } from "./runtime.js";
export {
  type ExternalData,
  type LoadOptions,
  type Profile,
  type RunOptions,
  Session,
  type SessionInfo,
} from "./session.js";
export type { ModelSource } from "./source.js";
export {
  type PlainValues,
  Tensor,
  type TensorDataMap,
  type TensorType,
  type TypedArray,
} from "./tensor.js";
export { chromeTrace, type Trace, type TraceEvent } from "./trace.js";
export { detectPlatform, type Platform, type Variant } from "./variant.js";
