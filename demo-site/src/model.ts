/** Page three: any model. */
import "./style.css";
import { type Profile, Session, type SessionInfo, Tensor, type TensorType, type ValueInfo } from "weblane";
import {
  byId,
  element,
  megabytes,
  milliseconds,
  onProgress,
  showError,
  showProgress,
  showReady,
} from "./status.ts";

const RUNS = 10;
/** Elements of one random input; a larger one is more likely a slip of the keyboard than a wish. */
const MAX_ELEMENTS = 1 << 26;

const drop = byId<HTMLLabelElement>("drop");
const file = byId<HTMLInputElement>("file");
const report = byId("report");
let session: Session | undefined;

function table(head: string[], rows: (string | Node)[][], numbers: number[] = []): HTMLElement {
  const cell = (tag: "th" | "td") => (content: string | Node, i: number) =>
    element(tag, { className: numbers.includes(i) ? "number" : "" }, content);
  return element(
    "div",
    { className: "scroll" },
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...head.map(cell("th")))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell("td"))))),
    ),
  );
}

const code = (text: string) => element("code", { textContent: text });
const shape = (value: ValueInfo) => `[${value.dims.join(", ")}]`;

/** The names of dimensions that a run may choose, with a first guess for each. */
function openDimensions(inputs: readonly ValueInfo[]): Map<string, number> {
  const found = new Map<string, number>();
  for (const input of inputs) {
    for (const [axis, dim] of input.dims.entries()) {
      if (typeof dim !== "string") continue;
      const name = dim === "?" ? `${input.name}[${axis}]` : dim;
      const batch = axis === 0 || /batch|^n$/i.test(name);
      const image = input.dims.length === 4 && axis >= 2;
      if (!found.has(name)) found.set(name, batch ? 1 : image ? 224 : 16);
    }
  }
  return found;
}

function randomTensor(input: ValueInfo, sizes: ReadonlyMap<string, number>): Tensor {
  const dims = input.dims.map((dim, axis) =>
    typeof dim === "number" ? dim : (sizes.get(dim === "?" ? `${input.name}[${axis}]` : dim) ?? 1),
  );
  const count = dims.reduce((a, b) => a * b, 1);
  if (count > MAX_ELEMENTS)
    throw new Error(`${input.name} would have ${count} elements; choose smaller sizes`);
  return new Tensor(input.type, values(input.type, count), dims);
}

/** Uniform in 0..1 for floating point; 0 or 1 for integers, which is valid for ids, masks and flags alike. */
function values(type: TensorType, count: number): number[] | bigint[] | string[] {
  if (type === "string") return Array.from({ length: count }, () => "weblane");
  if (type === "int64" || type === "uint64")
    return Array.from({ length: count }, () => BigInt(Math.random() < 0.5));
  const float = type.startsWith("float") || type === "bfloat16";
  return Array.from({ length: count }, () => (float ? Math.random() : Math.round(Math.random())));
}

function describe(info: SessionInfo, name: string, size: number): HTMLElement[] {
  const operators = Object.entries(info.operators).sort((a, b) => b[1] - a[1]);
  const values = (list: readonly ValueInfo[]) =>
    table(
      ["name", "type", "shape"],
      list.map((v) => [code(v.name), v.type, code(shape(v))]),
    );
  return [
    element("h2", { textContent: name }),
    element("p", {
      className: "lead",
      textContent: `${megabytes(size)}, opset ${info.opset}${info.producer ? `, written by ${info.producer}` : ""}`,
    }),
    element("h2", { textContent: "Inputs" }),
    values(info.inputs),
    element("h2", { textContent: "Outputs" }),
    values(info.outputs),
    element("h2", { textContent: `Operators (${operators.reduce((n, [, c]) => n + c, 0)} nodes)` }),
    table(
      ["operator", "nodes"],
      operators.map(([op, n]) => [op, String(n)]),
      [1],
    ),
  ];
}

function results(profile: Profile, times: number[]): HTMLElement[] {
  const sorted = [...times].sort((a, b) => a - b);
  const median = sorted[Math.floor(sorted.length / 2)] ?? 0;
  const byOp = new Map<string, { ms: number; nodes: number }>();
  for (const node of profile.nodes) {
    const entry = byOp.get(node.op) ?? { ms: 0, nodes: 0 };
    byOp.set(node.op, { ms: entry.ms + node.ms, nodes: entry.nodes + 1 });
  }
  const total = profile.nodes.reduce((sum, node) => sum + node.ms, 0) || 1;
  const rows = [...byOp].sort((a, b) => b[1].ms - a[1].ms);
  return [
    element("h2", { textContent: `Median of ${times.length} runs: ${milliseconds(median)}` }),
    element("p", {
      className: "lead",
      textContent: `fastest ${milliseconds(sorted[0] ?? 0)}, slowest ${milliseconds(sorted.at(-1) ?? 0)}`,
    }),
    element("h2", { textContent: "Outputs of the last run" }),
    table(
      ["name", "type", "shape", "first values"],
      Object.entries(profile.outputs).map(([name, t]) => [
        code(name),
        t.type,
        code(`[${t.dims.join(", ")}]`),
        code(Array.from({ length: Math.min(4, t.size) }, (_, i) => short(t.data[i])).join(", ")),
      ]),
    ),
    element("h2", { textContent: "Where the time goes" }),
    table(
      ["operator", "nodes", "time", "share"],
      rows.map(([op, { ms, nodes }]) => [
        op,
        String(nodes),
        milliseconds(ms),
        `${((ms / total) * 100).toFixed(1)}%`,
      ]),
      [1, 2, 3],
    ),
  ];
}

function short(value: unknown): string {
  return typeof value === "number" ? String(Number(value.toPrecision(5))) : String(value);
}

async function open(chosen: File): Promise<void> {
  report.hidden = true;
  await session?.dispose();
  session = undefined;
  showProgress(`Loading ${chosen.name} …`);
  let loaded: Session;
  try {
    loaded = await Session.load(chosen, { onProgress });
  } catch (error) {
    return showError(`${chosen.name} could not be loaded.`, error);
  }
  session = loaded;
  const info = await loaded.info();
  const sizes = openDimensions(info.inputs);
  const fields = [...sizes].map(([name, size]) => {
    const input = Object.assign(element("input"), { type: "number", min: "0", value: String(size) });
    input.addEventListener("input", () => sizes.set(name, Math.max(0, Math.floor(input.valueAsNumber) || 0)));
    return element("label", { className: "field" }, code(name), input);
  });
  const button = element("button", { className: "primary", textContent: "Run on random input" });
  const output = element("section", { className: "results-of-run" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const feeds = Object.fromEntries(info.inputs.map((input) => [input.name, randomTensor(input, sizes)]));
      await loaded.run(feeds);
      const times: number[] = [];
      for (let i = 0; i < RUNS; i++) {
        showProgress("Running …", i, RUNS);
        const start = performance.now();
        await loaded.run(feeds);
        times.push(performance.now() - start);
      }
      output.replaceChildren(...results(await loaded.profile(feeds), times));
      await showReady(loaded);
    } catch (error) {
      showError("The model could not run on this input.", error);
    }
    button.disabled = false;
  });
  report.replaceChildren(
    ...describe(info, chosen.name, chosen.size),
    element("h2", { textContent: "Run" }),
    ...fields,
    button,
    output,
  );
  report.hidden = false;
  await showReady(loaded);
}

let queue = Promise.resolve();
/** One file after the other: a second drop waits until the first is loaded or refused. */
function enqueue(chosen: File | undefined | null): void {
  if (chosen)
    queue = queue
      .then(() => open(chosen))
      .catch((error) => showError("The file could not be opened.", error));
}

file.addEventListener("change", () => {
  enqueue(file.files?.[0]);
  file.value = "";
});
for (const type of ["dragenter", "dragover"] as const) {
  window.addEventListener(type, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
window.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
window.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  enqueue(event.dataTransfer?.files[0]);
});
