"""Steps of one commit, on demand: the process that `benchmarking.commits` starts in the commit's own files, with their code.

It reads requests from stdin as JSON, one a line, and answers each with one line: the loss and CPU seconds of a step, or the counts
of one. Only what every commit with this harness has is used of it: `parse` and `prepare` of benchmarking/__main__.py, and
`make_unet`, `in_memory` and `with_master_weights` of benchmarking/variants.py.
"""

import contextlib
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path


def main(arguments: list) -> None:
    """Prepares the steps, then answers requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code prints must not be among the answers
    spec = importlib.util.spec_from_file_location("benchmark", Path("benchmarking/__main__.py").resolve())
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    harness.run.quiet_libraries()
    from benchmarking.variants import in_memory, make_unet, with_master_weights
    from sushi_research.planning import op_counts

    parsed = harness.parse(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, contextlib.ExitStack() as finish:
        bench = harness.prepare(parsed, parsed.model[0], Path(folder), finish)
        unet = make_unet(bench)
        step = with_master_weights(bench, unet, in_memory(bench))
        found = {"device": str(bench.device), "precision": bench.job.precision}
        gc.collect()
        gc.freeze()
        print(json.dumps(found), file=answers, flush=True)
        for line in iter(sys.stdin.readline, ""):
            request = json.loads(line)
            if "step" in request:
                loss = step(request["step"]).item()  # waits for the device
                found = {"loss": loss, "cpu": time.process_time()}
            else:
                found = asdict(op_counts.count(lambda: step(request["count"]), unet.parameters()))  # noqa: B023
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
