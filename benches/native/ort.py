"""Native onnxruntime for `benches/native/run.mjs`: answers every line of standard input with a time.

Arguments: the model, and its inputs as in benches/peers/workloads.mjs in JSON. Prints its version when the model is
loaded; then, for a line with a number of milliseconds, runs for at least that long and prints the median time of a run.
"""

import json
import statistics
import sys
import time

import numpy as np
import onnxruntime


def main():
    model, inputs = sys.argv[1], json.loads(sys.argv[2])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    feeds = {
        i["name"]: random.random(i["dims"]).astype(i["type"])
        if i["kind"] == "uniform"
        else np.full(i["dims"], int(i["kind"]), i["type"])
        for i in inputs
    }
    print(onnxruntime.__version__, flush=True)
    for line in sys.stdin:
        times, end = [], time.perf_counter() + float(line) / 1e3
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            session.run(None, feeds)
            times.append((time.perf_counter() - start) * 1e3)
        print(statistics.median(times), flush=True)


if __name__ == "__main__":
    main()
