"""Stands in for `recsys train`: makes validations of the learning rate alone, in milliseconds.

`python fake_training.py train ... --out RUN --optimizer.learning_rate RATE` notes its start in
`RUN/starts.txt`, with its seed. It waits while a file `hold-TRIAL` lies beside the search's folder.
"""

import json
import sys
import time
from pathlib import Path


def option(name: str) -> str:
    """The value of an option: the last one, as the command line of `recsys train` has it."""
    return dict(zip(sys.argv, sys.argv[1:], strict=False))[name]


def main() -> int:
    run, rate = Path(option("--out")), float(option("--optimizer.learning_rate"))
    run.mkdir(parents=True, exist_ok=True)
    with (run / "starts.txt").open("a") as starts:
        starts.write(f"seed {option('--seed')}\n")
    while (run.parents[3] / f"hold-{int(run.parent.name)}").exists():
        time.sleep(0.01)
    if rate > 0.09:
        print("the loss is not finite")
        return 1
    scores = [1 - rate - 0.1 / (epoch + 1) for epoch in range(3)]
    with (run / "validations.jsonl").open("w") as lines:
        for epoch, score in enumerate(scores):
            line = {"step": 10 * (epoch + 1), "metrics": {"auc": score}}
            lines.write(f"{json.dumps(line)}\n")
    (run / "metrics.json").write_text(json.dumps({"valid": {"auc": max(scores)}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
