/**
 * Calls methods of the worker: ids, pending calls, progress, cancelling, and what happens when the worker dies.
 */
import type { Port, PortEvents, Spawn } from "./environment.js";
import { abortError, fromShape, toWeblaneError, WeblaneError } from "./errors.js";
import type { FromWorker, In, Method, Out, PoolSeat, Progress, Request, StopWords } from "./protocol.js";

/** How a call is made. */
export interface CallOptions<M extends Method> {
  /** Buffers that move instead of being copied. */
  readonly transfer?: readonly Transferable[];
  /** Asks for the call with this id without a message, if it can. */
  readonly ring?: ((id: number) => boolean) | undefined;
  /** Hears of progress until the call ends. */
  readonly onProgress?: ((progress: Progress<M>) => void) | undefined;
  /** Rejects the call with `aborted` and tells the worker to stop. */
  readonly signal?: AbortSignal | undefined;
  /** Milliseconds after which the call is rejected with `timeout` and the worker told to stop. */
  readonly timeout?: number | undefined;
}

interface Pending {
  readonly resolve: (result: never) => void;
  readonly reject: (error: WeblaneError) => void;
  readonly progress: ((progress: never) => void) | undefined;
}

/** The longest delay that timers take. */
const MAX_DELAY = 2 ** 31 - 1;

/** The page's end of one worker (and of its pool). */
export class Client {
  readonly #spawn: Spawn;
  readonly #worker: Port;
  readonly #pool = new Set<Port>();
  /** Pool workers that have no seat yet. */
  readonly #hired: Port[] = [];
  /** How many have one and do not sit. */
  #standing = 0;
  readonly #pending = new Map<number, Pending>();
  #nextId = 1;
  #closed: WeblaneError | undefined;
  #stopWords: StopWords | undefined;

  constructor(spawn: Spawn) {
    this.#spawn = spawn;
    this.#worker = this.#start({
      onMessage: (message) => this.#receive(message),
      onFailure: (text, code) => this.close(new WeblaneError(code, `the worker failed: ${text}`)),
    });
    this.#worker.keepAlive(false);
  }

  /** Why no calls can be made any more, once that is so. */
  get closed(): WeblaneError | undefined {
    return this.#closed;
  }

  /** From now on a cancelled run stops in the middle of a kernel too. */
  useStopWords(words: StopWords): void {
    this.#stopWords = words;
  }

  /** Gives the worker the build that the page has compiled, or word that it could not. */
  handOver(compiled: WebAssembly.Module | undefined): void {
    if (this.#closed) return;
    try {
      this.#worker.post({ compiled });
    } catch {
      // A module that may not be posted; the worker compiles its own.
      this.#worker.post({ compiled: undefined });
    }
  }

  #stopNow(): void {
    if (this.#stopWords === undefined) return;
    const { buffer, stop, running } = this.#stopWords;
    const words = new Int32Array(buffer);
    // Nothing that came to the worker before this may follow the nodes that are executed now, and what comes later
    // clears the word when it begins.
    if (Atomics.load(words, running / 4) === 1) Atomics.store(words, stop / 4, 1);
  }

  /** Calls a method. Never throws; every failure, of posting too, is a rejection with a WeblaneError. */
  call<M extends Method>(method: M, params: In<M>, options: CallOptions<M> = {}): Promise<Out<M>> {
    const { transfer, ring, onProgress, signal, timeout } = options;
    return new Promise<Out<M>>((resolve, reject) => {
      if (this.#closed) return reject(again(this.#closed));
      if (signal?.aborted) return reject(abortError(signal, method));
      const id = this.#nextId++;
      const stop = (error: WeblaneError) => {
        if (!this.#pending.has(id)) return;
        settle();
        this.#worker.post({ cancel: id });
        // The word stops whatever runs, so it is for the case that nothing else can be running.
        if (method === "run" && this.#pending.size === 0) this.#stopNow();
        reject(error);
      };
      const onAbort = () => stop(abortError(signal as AbortSignal, method));
      let timer: ReturnType<typeof setTimeout> | undefined;
      const settle = () => {
        this.#pending.delete(id);
        signal?.removeEventListener("abort", onAbort);
        clearTimeout(timer);
        if (this.#pending.size === 0) this.#worker.keepAlive(false);
      };
      this.#pending.set(id, {
        resolve: (result) => {
          settle();
          resolve(result);
        },
        reject: (error) => {
          settle();
          reject(error);
        },
        progress: onProgress,
      });
      this.#worker.keepAlive(true);
      try {
        if (!ring?.(id)) this.#worker.post({ id, method, params } as Request, transfer);
      } catch (error) {
        settle();
        return reject(toWeblaneError(error, "invalid_input", "the data cannot be sent to the worker: "));
      }
      signal?.addEventListener("abort", onAbort, { once: true });
      if (timeout !== undefined && timeout <= MAX_DELAY) {
        timer = setTimeout(
          () => stop(new WeblaneError("timeout", `${method} took longer than ${timeout} ms`)),
          Math.max(0, timeout),
        );
      }
    });
  }

  /** Ends the worker and its pool; their memory returns. Pending and later calls are rejected with `reason`. */
  close(reason: WeblaneError): void {
    if (this.#closed) return;
    this.#closed = reason;
    for (const port of [this.#worker, ...this.#pool]) port?.terminate();
    for (const call of [...this.#pending.values()]) call.reject(reason);
  }

  #start(events: PortEvents): Port {
    try {
      return this.#spawn(events);
    } catch (error) {
      throw toWeblaneError(error, "unsupported_platform", "a worker cannot be started: ");
    }
  }

  #receive(message: FromWorker): void {
    if (this.#closed) return;
    if ("hire" in message) {
      this.#hire(message.hire);
      return;
    }
    if ("spawn" in message) {
      this.#seatPool(message.spawn.seat, message.spawn.count);
      return;
    }
    if (!("id" in message)) return;
    const call = this.#pending.get(message.id);
    // A cancelled call is not pending any more, but the worker may have answered it already.
    if (call === undefined) return;
    if ("error" in message) call.reject(fromShape(message.error));
    else if ("result" in message) call.resolve(message.result as never);
    else call.progress?.(message.progress as never);
  }

  /** Starts pool workers before there are seats for them, until there are `count`; ends those that are too many. */
  #hire(count: number): void {
    for (const port of this.#hired.splice(count)) {
      this.#pool.delete(port);
      port.terminate();
    }
    try {
      while (this.#hired.length < count) this.#hired.push(this.#poolWorker());
    } catch {
      // Whoever gives out the seats will try again and hear why.
    }
  }

  /**
   * Gives seats to pool workers and tells the worker whether all of them could be started. Runs do not wait until they
   * sit: the pool does without until then.
   */
  #seatPool(seat: PoolSeat, count: number): void {
    this.#standing = count;
    let outcome: true | string = true;
    try {
      for (let i = 0; i < count; i++) (this.#hired.shift() ?? this.#poolWorker()).post({ seat });
    } catch (error) {
      outcome = toWeblaneError(error).message;
    }
    if (!this.#closed) this.#worker.post({ spawned: outcome });
  }

  /** Starts a pool worker. When it fails later, that ends the client, which tells everybody who waits. */
  #poolWorker(): Port {
    const port = this.#start({
      onMessage: (message) => {
        if ("crash" in message) this.close(fromShape(message.crash));
        else if ("sits" in message && --this.#standing === 0) this.#worker.post({ seated: true });
      },
      onFailure: (text, code) => this.close(new WeblaneError(code, `a pool worker failed: ${text}`)),
    });
    this.#pool.add(port);
    port.keepAlive(false);
    return port;
  }
}

/** The same failure with a trace of the call that met it. */
function again(error: WeblaneError): WeblaneError {
  return new WeblaneError(error.code, error.message, { ...error.toJSON(), cause: error });
}
