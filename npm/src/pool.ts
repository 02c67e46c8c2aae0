/**
 * Stands in for the page-side helper of wasm-bindgen-rayon. The original starts its workers from inside the worker by
 * the address of wasm-bindgen's module; here all of that is one file, and the page starts the workers, since only the
 * page can hear of a crash while the engine's own worker waits for the pool.
 */

/** The part of wasm-bindgen-rayon's `PoolBuilder` that is used. */
interface PoolBuilder {
  numThreads(): number;
  receiver(): number;
  build(): void;
}

/** Asks the page for pool workers; resolves when all of them sit. Set by the worker before it starts a build. */
type AskForWorkers = (
  module: WebAssembly.Module,
  memory: WebAssembly.Memory,
  receiver: number,
  count: number,
) => Promise<void>;

const asking: { ask: AskForWorkers | undefined } = { ask: undefined };

/** Says who is asked for pool workers in this worker. */
export function onPoolWanted(ask: AskForWorkers): void {
  asking.ask = ask;
}

/** Called by wasm-bindgen-rayon's `init_thread_pool`. */
export async function startWorkers(
  module: WebAssembly.Module,
  memory: WebAssembly.Memory,
  builder: PoolBuilder,
): Promise<void> {
  if (asking.ask === undefined) throw new Error("the thread pool was started outside of the engine's worker");
  await asking.ask(module, memory, builder.receiver(), builder.numThreads());
  // This waits for all threads in a way that nothing else happens meanwhile.
  builder.build();
}
