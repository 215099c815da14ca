"""Run steps of one variant in its own clone; started as a file with `PYTHONPATH=CLONE`.

Answers each line of standard input in JSON: `run N` with the seconds of N steps, `peak` with the
bytes of peak resident memory.
"""

import json
import os
import sys
from pathlib import Path

os.dup2(2, 1)  # what libraries print does not mix with the answers
sys.path.remove(str(Path(__file__).parent))

import torch  # noqa: E402

from benchmarks.timing.ranks import RankSteps, silence_advice_to_library_developers  # noqa: E402
from benchmarks.timing.steps import Variant  # noqa: E402
from recsys.distributed.ranks import joined_ranks  # noqa: E402


def serve(descriptor: int, variant: Variant, threads: int) -> None:
    """Build the variant and answer on the file `descriptor` until the input ends."""
    silence_advice_to_library_developers()
    torch.set_num_threads(threads)
    with joined_ranks("cpu") as ranks, os.fdopen(descriptor, "w") as responses:
        steps = RankSteps(variant, ranks)
        for line in sys.stdin:
            request, *count = line.split()
            response = steps.run(int(count[0])) if request == "run" else steps.report().peak_bytes
            print(json.dumps(response), file=responses, flush=True)


if __name__ == "__main__":
    fields = json.loads(sys.argv[2])
    fields["overrides"] = tuple(fields["overrides"])
    serve(int(sys.argv[1]), Variant(**fields), int(sys.argv[3]))
