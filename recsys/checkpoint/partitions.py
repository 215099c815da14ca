"""State of a continual run: which partitions are trained, and which one is begun.

RUN/continual.json           what is trained
RUN/metrics.jsonl            a line for each scored partition
RUN/scores/NAME.parquet      the scores of its rows, made before it was trained on
RUN/partitions/NAME          a run, warm-started from that of the partition before
RUN/tensorboard              losses and metrics of all partitions
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys.storage.files import atomic_write, read_json, write_json

STATE = "continual.json"
METRICS_LINES = "metrics.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class TrainedPartition:
    """Name, number of rows and fingerprint of a partition when it was read."""

    name: str  # its folder below `train/`, such as `date=2026-11-01`
    rows: int
    fingerprint: str  # hashes of the rows' order and content (`RowSource.fingerprint`)


@dataclass(frozen=True)
class RunState:
    """Progress of a continual run."""

    trained: tuple[TrainedPartition, ...] = ()  # in order
    begun: TrainedPartition | None = None  # the next one, if its scoring or training has begun
    warm_start: str | None = None  # the run that the first partition started from
    first: str | None = None  # first `--from`; earlier partitions are not part of the run

    @property
    def last(self) -> TrainedPartition | None:
        """The partition that was trained on last, which may be a late one."""
        return self.trained[-1] if self.trained else None


@dataclass(frozen=True)
class ContinualFolder:
    """Folder `RUN` of a continual run."""

    path: Path

    @property
    def partitions(self) -> Path:
        return self.path / "partitions"

    def run_of(self, name: str) -> Path:
        return self.partitions / file_name(name)

    def scores_of(self, name: str) -> Path:
        return self.path / "scores" / f"{file_name(name)}.parquet"

    def read(self) -> RunState:
        """Read the state, an empty one if there is none; a damaged file is a ValueError."""
        file = self.path / STATE
        if not file.exists():
            return RunState()
        stored = read_json(file)
        try:
            if stored["format"] != FORMAT:
                raise ValueError(f"format {stored['format']}, not {FORMAT}")
            trained = tuple(TrainedPartition(**partition) for partition in stored["trained"])
            begun = None if stored["begun"] is None else TrainedPartition(**stored["begun"])
            return RunState(trained, begun, stored["warm_start"], stored["first"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: damaged ({error!r}); bring it back") from error

    def write(self, state: RunState) -> None:
        write_json(self.path / STATE, {"format": FORMAT, **asdict(state)}, indent=1)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, one a scored partition; damage is a ValueError."""
        file = self.path / METRICS_LINES
        if not file.exists():
            return []
        try:
            return [json.loads(line) for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: damaged ({error}); bring it back") from error

    def add_metrics(self, line: dict[str, Any]) -> bool:
        """Add the line of a partition; return False if it has one already."""
        lines = self.metrics()
        if any(stored["partition"] == line["partition"] for stored in lines):
            return False
        text = "".join(json.dumps(metrics) + "\n" for metrics in [*lines, line])
        atomic_write(self.path / METRICS_LINES, text)
        return True


def file_name(name: str) -> str:
    """Return a partition's name as that of a file: levels are joined by commas."""
    return name.replace("/", ",")


def newest_run(run: Path) -> Path:
    """Return the run of a continual run's newest partition; any other run as it is."""
    if not (run / STATE).exists():
        return run
    folder = ContinualFolder(run)
    last = folder.read().last
    if last is None:
        raise ValueError(f"{run}: has trained on no partition yet; let `recsys continual` go on")
    return folder.run_of(last.name)


def learned_folders(run: Path, folder: str) -> list[str]:
    """Return the folders of a dataset whose rows a run has learned from, `folder` last.

    The run of a partition has also learned from earlier partitions of its continual run.
    """
    names = [f"train/{entry.name}" for entry in ContinualFolder(run.parent.parent).read().trained]
    return names[: names.index(folder) + 1] if folder in names else [folder]
