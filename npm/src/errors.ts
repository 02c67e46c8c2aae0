/**
 * Every failure of weblane is a {@link WeblaneError} with a stable code.
 */

/** What each error code means. The codes never change their meaning; {@link ErrorCode} lists them as a type. */
export const ERROR_CODES = {
  empty_model: "The model file has no bytes.",
  not_onnx: "The bytes are not an ONNX model.",
  truncated_model: "The bytes end in the middle of a model.",
  invalid_model: "The model contradicts itself or the ONNX specification.",
  unsupported_operator: "The model uses operators that are not implemented; the message names all of them.",
  unsupported_attribute: "An attribute, or an attribute's value, is not implemented.",
  unsupported_dtype: "An element type is not implemented here.",
  shape_mismatch: "Shapes do not fit the operator or the declared input.",
  type_mismatch: "An element type differs from the wanted one.",
  missing_input: "An input of the model was not given.",
  unknown_input: "A name is not an input or output of the model.",
  invalid_input: "A value is outside of what is accepted.",
  invalid_option: "An option has an unknown name or value.",
  limit_exceeded: "A size is above the limits.",
  out_of_memory: "Memory could not be had.",
  external_data: "A file of external data is missing or has the wrong size.",
  aborted: "The caller stopped the work through an AbortSignal.",
  timeout: "The run took longer than its timeout.",
  disposed: "The session or runtime was disposed of.",
  network: "A file could not be fetched or read.",
  unsupported_platform: "The browser or runtime lacks something weblane needs.",
  internal: "A defect of weblane itself. Please report it.",
} as const;

/** A stable code that says what kind of failure it was; {@link ERROR_CODES} explains each. */
export type ErrorCode = keyof typeof ERROR_CODES;

/** A failure as it crosses the worker boundary. */
export interface ErrorShape {
  readonly code: ErrorCode;
  readonly message: string;
  readonly node?: string | undefined;
  readonly op?: string | undefined;
}

/** Where an error happened and what caused it. */
export interface WeblaneErrorOptions {
  /** Name of the node in the model. */
  readonly node?: string | undefined;
  /** Operator of that node, such as `Conv`. */
  readonly op?: string | undefined;
  /** The underlying error. */
  readonly cause?: unknown;
}

/** The only error type that weblane's promises reject with. */
export class WeblaneError extends Error {
  override readonly name = "WeblaneError";
  /** What kind of failure it was. */
  readonly code: ErrorCode;
  /** Name of the node where it happened, when it belongs to one. */
  readonly node?: string;
  /** Operator of that node. */
  readonly op?: string;

  constructor(code: ErrorCode, message: string, options: WeblaneErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    if (options.node !== undefined) this.node = options.node;
    if (options.op !== undefined) this.op = options.op;
  }

  /** The plain object that a message can carry. */
  toJSON(): ErrorShape {
    return { code: this.code, message: this.message, node: this.node, op: this.op };
  }
}

/** Whether `code` is one of {@link ERROR_CODES}. */
export function isErrorCode(code: unknown): code is ErrorCode {
  return typeof code === "string" && Object.hasOwn(ERROR_CODES, code);
}

/** The error that a message or the WebAssembly module described. */
export function fromShape(shape: ErrorShape): WeblaneError {
  const code = isErrorCode(shape.code) ? shape.code : "internal";
  return new WeblaneError(code, shape.message, { node: shape.node, op: shape.op });
}

/** Any thrown value as a WeblaneError; `code` is used for what is none yet. */
export function toWeblaneError(error: unknown, code: ErrorCode = "internal", context = ""): WeblaneError {
  if (error instanceof WeblaneError) return error;
  if (typeof error === "object" && error !== null && "code" in error && isErrorCode(error.code)) {
    return fromShape(error as ErrorShape);
  }
  const text = error instanceof Error ? error.message : String(error);
  return new WeblaneError(code, context + text, { cause: error });
}

/**
 * The error of an aborted operation; the signal's reason (an `AbortError` unless the caller gave one) is its cause.
 * A signal of `AbortSignal.timeout` gives `timeout`.
 */
export function abortError(signal: AbortSignal, what: string): WeblaneError {
  if (signal.reason instanceof Error && signal.reason.name === "TimeoutError") {
    return new WeblaneError("timeout", `${what} took longer than its signal allows`, {
      cause: signal.reason,
    });
  }
  return new WeblaneError("aborted", `${what} was aborted`, { cause: signal.reason });
}
