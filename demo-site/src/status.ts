/** The line at the end of each page: loading progress, what was chosen, and errors. */
import { type LoadProgress, type Session, WeblaneError } from "weblane";

const PHASES: Record<LoadProgress["phase"], string> = {
  download: "Downloading the model",
  compile: "Compiling the engine",
  parse: "Reading the model",
  optimize: "Optimising the model",
};

/** An element with text and children, the one way this site makes any. */
export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  properties: { className?: string; textContent?: string } = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** The element with this id, which the page's HTML has. */
export function byId<T extends HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found as T;
}

/** Fills the status line, or the error box; the other one is emptied. */
function show(where: "status" | "error", ...children: Node[]): void {
  byId("status").replaceChildren();
  byId("error").replaceChildren();
  byId(where).replaceChildren(...children);
}

/** A sentence with a progress bar; without a total the bar shows activity only. */
export function showProgress(text: string, done = 0, total = 0): void {
  const bar = element("progress");
  if (total > 0) Object.assign(bar, { max: total, value: done });
  show("status", element("p", { textContent: text }), bar);
}

/** For `Session.load`. Compiling happens beside the download; the download is what people wait for. */
export function onProgress({ phase, loaded, total }: LoadProgress): void {
  if (phase === "compile") return;
  if (phase !== "download") {
    showProgress(`${PHASES[phase]} …`);
    return;
  }
  const size = total ? ` of ${megabytes(total)}` : "";
  showProgress(`${PHASES[phase]}: ${megabytes(loaded)}${size}`, loaded, total);
}

/** Bytes for people. */
export function megabytes(bytes: number): string {
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Milliseconds for people. */
export function milliseconds(ms: number): string {
  return `${ms < 10 ? ms.toFixed(2) : ms < 100 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
}

/** What runs, and why. */
export async function showReady(session: Session, extra = ""): Promise<void> {
  const info = await session.info();
  const threads = `${info.threads} thread${info.threads === 1 ? "" : "s"}`;
  const first = element(
    "p",
    {},
    element("strong", { textContent: `${info.variant}, ${threads}` }),
    extra && ` · ${extra}`,
  );
  const why = element("p", {
    textContent: `${sentence(info.variantReason)} ${sentence(info.threadsReason)}`,
  });
  show("status", first, why);
}

function sentence(text: string): string {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (trimmed.endsWith(".") ? "" : ".");
}

const ADVICE: Partial<Record<WeblaneError["code"], string>> = {
  not_onnx: "Choose a file that ends in .onnx; other formats have to be converted first.",
  truncated_model: "The file seems to be cut off. Download it again and compare its size.",
  unsupported_operator: "The model is fine, but weblane does not have these operators yet.",
  external_data: "The weights of this model are in other files. Put them into one file with onnx.save.",
  out_of_memory: "Close other tabs, or try a smaller model.",
  network: "Check the connection and load the page again.",
};

/** An error as a person would want it: what happened, where, and what to do. */
export function showError(what: string, error: unknown): void {
  const lines = [element("p", {}, element("strong", { textContent: what }))];
  lines.push(element("p", { textContent: error instanceof Error ? error.message : String(error) }));
  if (error instanceof WeblaneError) {
    const advice = ADVICE[error.code];
    if (advice) lines.push(element("p", { textContent: advice }));
    const place = error.op ? `, in ${error.op}${error.node ? ` “${error.node}”` : ""}` : "";
    lines.push(element("p", {}, element("code", { textContent: `${error.code}${place}` })));
  } else {
    console.error(error);
  }
  show("error", ...lines);
}
