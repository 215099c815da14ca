"""A file with one line per validation of a running training; a search reads it to prune trials."""

import json
from pathlib import Path
from typing import Any

TRACKER = "recsys.search.validations:ValidationLines"
FILE = "validations.jsonl"
PREFIX = "valid/"


class ValidationLines:
    """A tracker that writes each validation's metrics and step to `RUN/validations.jsonl`."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        lines = [line for line in read_lines(run) if line["step"] <= first_step]
        path = run / FILE
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        self._file = path.open("a")

    def log(self, values: dict[str, float], step: int) -> None:
        """Write `values` if they are a validation's metrics over all labels."""
        metrics = {name.removeprefix(PREFIX): value for name, value in values.items()}
        # A remaining slash in a name marks one label or another split.
        if metrics and not any("/" in name for name in metrics):
            self._file.write(f"{json.dumps({'step': step, 'metrics': metrics})}\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the validations so far, one per step: a resumed run may repeat its last one."""
    path = run / FILE
    text = path.read_text() if path.exists() else ""
    ended = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return list({line["step"]: line for line in ended}.values())
