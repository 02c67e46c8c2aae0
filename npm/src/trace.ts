/**
 * Profiles as traces that browsers and Perfetto show on a time line.
 */
import type { NodeTiming } from "./protocol.js";

/** One event of Chrome's trace format: a node of the run, or the name of the row that the nodes stand in. */
export interface TraceEvent {
  readonly name: string;
  readonly cat?: string;
  /** `X` for a node, `M` for metadata. */
  readonly ph: "X" | "M";
  readonly pid: number;
  readonly tid: number;
  /** Microseconds from the beginning of the run. */
  readonly ts?: number;
  /** Microseconds. */
  readonly dur?: number;
  readonly args: Readonly<Record<string, string | number>>;
}

/** What `JSON.stringify` turns into a file for chrome://tracing and ui.perfetto.dev. */
export interface Trace {
  readonly displayTimeUnit: "ms";
  readonly traceEvents: readonly TraceEvent[];
}

/**
 * The trace of a profile. The format is Chrome's "JSON Object Format" with complete events.
 *
 * ```ts
 * const profile = await session.run(feeds, { profile: true });
 * const file = new Blob([JSON.stringify(chromeTrace(profile))], { type: "application/json" });
 * ```
 */
export function chromeTrace(profile: { readonly nodes: readonly NodeTiming[] }): Trace {
  const row = { pid: 1, tid: 1 };
  const event = (node: NodeTiming): TraceEvent => ({
    name: node.op,
    cat: "node",
    ph: "X",
    ...row,
    ts: node.startMs * 1e3,
    dur: node.ms * 1e3,
    args: {
      node: node.node,
      kernel: node.kernel,
      flops: node.flops,
      gflops: gflops(node),
      readBytes: node.readBytes,
      writtenBytes: node.writtenBytes,
    },
  });
  return {
    displayTimeUnit: "ms",
    traceEvents: [
      { name: "process_name", ph: "M", ...row, args: { name: "weblane" } },
      { name: "thread_name", ph: "M", ...row, args: { name: "run" } },
      ...profile.nodes.map(event),
    ],
  };
}

/** Multiplications and additions per nanosecond; 0 where nobody counts them. */
function gflops({ flops, ms }: NodeTiming): number {
  return flops > 0 && ms > 0 ? flops / ms / 1e6 : 0;
}
