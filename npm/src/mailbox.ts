/**
 * Shared memory through which the tensors of small runs go, and a bell that spares the message.
 *
 * ```text
 * page                                          worker
 *   write inputs
 *   listening? ring the bell with the call's id   heard the bell: run, write outputs, answer by message
 *   else send a message with the id               got the message: the same
 *   read outputs                                  then listen a while if runs follow each other at once
 * ```
 *
 * For a model that takes 80 microseconds the messages are most of a run: five small buffers in two of them cost 50
 * microseconds in Chromium, and waking a sleeping worker up to 100. A mailbox serves one session and one run at a time;
 * runs that overlap go by message as they always may.
 */
import type { WireTensor } from "./protocol.js";
import type { TensorType } from "./tensor.js";

/** Bytes that the inputs of a run may have, and as many its outputs: beyond that the copies cost more than messages. */
export const MAILBOX_BYTES = 1 << 14;

/** How long the worker listens after a run, in milliseconds: a page that runs in a row takes less to ask again. */
export const LISTEN_MS = 0.2;

/** A tensor without its elements. */
export interface Described {
  readonly name: string;
  readonly type: TensorType;
  readonly dims: readonly number[];
  readonly byteLength: number;
}

/** What both sides know of a mailbox. */
export interface MailboxInit {
  readonly buffer: SharedArrayBuffer;
  readonly inputs: readonly Described[];
}

// The first bytes are words: the state of the bell, and the id of the call it was rung for.
const STATE = 0;
const ID = 1;
const HEADER_BYTES = 8;
const ASLEEP = 0;
const LISTENING = 1;
const RUNG = 2;
const MAX_ID = 2 ** 31 - 1;

/** What a mailbox for inputs like these holds; nothing when they are large, or strings, or no memory can be shared. */
export function describeInputs(inputs: readonly WireTensor[]): readonly Described[] | undefined {
  // Only a page that is isolated may send shared memory, and not every browser hides it from the others.
  if (typeof SharedArrayBuffer === "undefined" || globalThis.crossOriginIsolated === false) return undefined;
  const total = inputs.reduce(
    (sum, { data }) => sum + (data instanceof Uint8Array ? data.byteLength : Number.POSITIVE_INFINITY),
    0,
  );
  return total > MAILBOX_BYTES ? undefined : inputs.map(describe);
}

/** A tensor without its elements. */
export function describe({ name, type, dims, data }: WireTensor): Described {
  return { name, type, dims: [...dims], byteLength: data instanceof Uint8Array ? data.byteLength : 0 };
}

/** Whether inputs differ from what is described in their elements alone. */
export function areLike(inputs: readonly WireTensor[], places: readonly Described[]): boolean {
  return (
    inputs.length === places.length &&
    inputs.every(({ name, type, dims, data }, i) => {
      const place = places[i];
      return (
        place !== undefined &&
        data instanceof Uint8Array &&
        data.byteLength === place.byteLength &&
        name === place.name &&
        type === place.type &&
        dims.length === place.dims.length &&
        dims.every((size, axis) => size === place.dims[axis])
      );
    })
  );
}

/** Makes the shared memory for inputs that are described. */
export function openMailbox(inputs: readonly Described[]): Mailbox {
  const total = inputs.reduce((sum, { byteLength }) => sum + byteLength, 0);
  return new Mailbox({ buffer: new SharedArrayBuffer(HEADER_BYTES + total + MAILBOX_BYTES), inputs });
}

/** One side's view of a mailbox. */
export class Mailbox {
  readonly init: MailboxInit;
  readonly #words: Int32Array;
  readonly #inputs: readonly Uint8Array[];
  readonly #outputs: Uint8Array;

  constructor(init: MailboxInit) {
    this.init = init;
    this.#words = new Int32Array(init.buffer, 0, 2);
    let at = HEADER_BYTES;
    this.#inputs = init.inputs.map(({ byteLength }) => {
      const place = new Uint8Array(init.buffer, at, byteLength);
      at += byteLength;
      return place;
    });
    this.#outputs = new Uint8Array(init.buffer, at, MAILBOX_BYTES);
  }

  /** Whether inputs like these go into it. */
  fits(inputs: readonly WireTensor[]): boolean {
    return areLike(inputs, this.init.inputs);
  }

  /** Page: puts the elements of inputs that fit in their places. */
  writeInputs(inputs: readonly WireTensor[]): void {
    for (const [i, { data }] of inputs.entries()) this.#inputs[i]?.set(data as Uint8Array);
  }

  /** Worker: the inputs as they lie here. */
  inputs(): WireTensor[] {
    return this.init.inputs.map(({ name, type, dims }, i) => ({
      name,
      type,
      dims,
      data: this.#inputs[i] as Uint8Array,
    }));
  }

  /** Worker: puts outputs one after the other; false when they are too many bytes. */
  writeOutputs(outputs: readonly Uint8Array[]): boolean {
    const total = outputs.reduce((sum, { byteLength }) => sum + byteLength, 0);
    if (total > MAILBOX_BYTES) return false;
    let at = 0;
    for (const bytes of outputs) {
      this.#outputs.set(bytes, at);
      at += bytes.byteLength;
    }
    return true;
  }

  /** Page: copies of the outputs, which the last run that described its outputs described. */
  readOutputs(described: readonly Described[]): WireTensor[] {
    let at = 0;
    return described.map(({ name, type, dims, byteLength }) => {
      const data = this.#outputs.slice(at, at + byteLength);
      at += byteLength;
      return { name, type, dims, data };
    });
  }

  /** Page: asks for the call `id` if the worker listens; false when it takes a message. */
  ring(id: number): boolean {
    if (id > MAX_ID || Atomics.load(this.#words, STATE) !== LISTENING) return false;
    Atomics.store(this.#words, ID, id);
    return Atomics.compareExchange(this.#words, STATE, LISTENING, RUNG) === LISTENING;
  }

  /** Worker: waits for the bell for at most {@link LISTEN_MS}; the id of the call it was rung for. */
  listen(): number | undefined {
    const words = this.#words;
    Atomics.store(words, STATE, LISTENING);
    const end = performance.now() + LISTEN_MS;
    do {
      for (let i = 0; i < 100; i++) {
        if (Atomics.load(words, STATE) === RUNG) break;
      }
    } while (Atomics.load(words, STATE) !== RUNG && performance.now() < end);
    // Whoever came at the last moment has rung, and sends no message.
    return Atomics.exchange(words, STATE, ASLEEP) === RUNG ? Atomics.load(words, ID) : undefined;
  }
}
