/**
 * Runs cases one by one, in a page or in Node. It knows nothing of where it runs: it is given the package under
 * test, a way to import case files, and a base address from which it fetches models and goldens.
 *
 * A case file exports by default a list of cases, or a function of the context that returns one (or a promise of it):
 *
 *     export default (ctx) => [{ name: "what it shows", timeout: 60, run: async (ctx) => { ctx.equal(1, 1) } }]
 */

/** Thrown by `ctx.skip`. */
class Skip extends Error {}

/** What a case is given. */
class Context {
  /** Values that cases of one page share, such as a runtime. Dropped when the page is loaded anew. */
  shared = new Map();
  #base;

  constructor(packages, config) {
    /** The package's main entry. */
    this.weblane = packages.weblane;
    /** The entry `weblane/ort`. */
    this.ort = packages.ort;
    /** The entry `weblane/quantize`. */
    this.quantizing = packages.quantizing;
    /** "chromium", "firefox", "webkit" or "node". */
    this.engine = config.engine;
    /** Whether shared memory is to be had here: WebKitGTK calls a page isolated and has none. */
    this.isolated = (globalThis.crossOriginIsolated ?? true) && typeof SharedArrayBuffer !== "undefined";
    /** Whether the server sends the isolation headers. */
    this.mode = config.mode;
    this.#base = config.base;
  }

  /** Absolute address of a file the server offers, such as "/target/models-test/index.json". */
  url(path) {
    return new URL(path, this.#base).href;
  }

  async fetchBytes(path) {
    const response = await fetch(this.url(path));
    if (!response.ok) throw new Error(`${path}: HTTP ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
  }

  async fetchJson(path) {
    const response = await fetch(this.url(path));
    if (!response.ok) throw new Error(`${path}: HTTP ${response.status}`);
    return response.json();
  }

  /** Ends the case as skipped. */
  skip(reason) {
    throw new Skip(reason);
  }

  assert(condition, message) {
    if (!condition) throw new Error(message);
  }

  equal(got, want, what = "value") {
    const [a, b] = [got, want].map((value) =>
      JSON.stringify(value, (_, v) => (typeof v === "bigint" ? `${v}n` : v)),
    );
    if (a !== b) throw new Error(`${what}: got ${a}, wanted ${b}`);
  }

  /** The promise must reject with a WeblaneError of this code; returns the error. */
  async rejects(promise, code) {
    try {
      await promise;
    } catch (error) {
      if (!(error instanceof this.weblane.WeblaneError)) throw error;
      this.equal(error.code, code, `code of "${error.message}"`);
      return error;
    }
    throw new Error(`nothing was thrown, wanted a WeblaneError with code ${code}`);
  }
}

export class Harness {
  #cases = [];
  #context;

  /** Imports the case files that the configuration names. */
  static async load(packages, importCases, config) {
    const harness = new Harness();
    harness.#context = new Context(packages, config);
    for (const file of config.files) {
      const exported = (await importCases(file)).default;
      const cases = typeof exported === "function" ? await exported(harness.#context) : exported;
      harness.#cases.push(...cases.map((one) => ({ ...one, name: `${file}/${one.name}` })));
    }
    return harness;
  }

  /** Name and time limit, in seconds, of every case. */
  list() {
    return this.#cases.map(({ name, timeout = 120 }) => ({ name, timeout }));
  }

  /** Runs one case: `{ status: "pass" | "fail" | "skip", message, ms }`. */
  async run(index) {
    const start = performance.now();
    const done = (status, message) => ({ status, message, ms: performance.now() - start });
    try {
      const note = await this.#cases[index].run(this.#context);
      return done("pass", typeof note === "string" ? note : "");
    } catch (error) {
      if (error instanceof Skip) return done("skip", error.message);
      const code = error?.code ? ` [${error.code}]` : "";
      const stack = error instanceof this.#context.weblane.WeblaneError ? "" : `\n${error?.stack ?? ""}`;
      return done("fail", `${error?.name ?? "error"}${code}: ${error?.message ?? error}${stack}`);
    }
  }
}
