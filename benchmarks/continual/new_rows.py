"""First values of new items' rows, random, mean and made of content: which ranks new items best.

    python -m benchmarks.continual.new_rows --out runs/bench

The MovieLens log lies in partitions in the order of time. By two protocols each rule of
`embedding.tables.item.new_rows` ranks rows of a partition before it has seen them: a continual run,
which gives new rows their values at the start of each partition and trains on from them, and models
trained from scratch on all partitions before one (rolling windows), whose items without training
have these values in validation and test. Metrics are pooled over the partitions, of all items, of
cold ones (fewer than 5 training rows) and of unseen ones; differences from `random` have the
intervals of a paired bootstrap of users. Finished runs in `--out` are read, not trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.continual.log import view_before, write_log
from benchmarks.continual.ways import scores_of_walk, walk
from benchmarks.quality.runs import Training, finish
from benchmarks.results import RESULTS, Result, require_own_folder, write_result
from recsys.evaluation.bootstrap import paired_difference, pooled_metric
from recsys.evaluation.scores import SplitScores, read_scores, scores_file

RECIPE = Path(__file__).parents[1] / "settings" / "continual.yaml"
RULES = ("random", "mean", "content")
TABLES = "{{user: {{embedding_dim: 8, id_dropout: 0.3}}, item: {{new_rows: {rule}}}}}"
METRICS = [(metric, part) for part in ("all", "cold", "unseen") for metric in ("auc", "gauc")]
QUICK = ("--content.modalities", '{text: {kind: text, column: text, encoder: "random:bert"}}')
QUICK_ROWS, QUICK_PARTITIONS = 4000, 4


@dataclass(frozen=True)
class Protocol:
    """Scores of the same rows by each rule.

    name: of the protocol.
    scores: by rule, of each partition.
    """

    name: str
    scores: dict[str, list[SplitScores]]


def words_of(rule: str, words: Sequence[str]) -> tuple[str, ...]:
    """Return the settings of a rule on the command line, besides others."""
    return (*words, "--embedding.tables", TABLES.format(rule=rule))


def walked(out: Path, names: list[str], words: Sequence[str], jobs: int) -> Protocol:
    """Walk all partitions by each rule, `jobs` side by side."""
    with ThreadPoolExecutor(jobs) as pool:
        done = {
            rule: pool.submit(walk, RECIPE, out, f"rows_{rule}", *words_of(rule, words))
            for rule in RULES
        }
    scores = {rule: scores_of_walk(each.result(), names) for rule, each in done.items()}
    return Protocol("continual", {rule: list(of.values()) for rule, of in scores.items()})


def windows(
    out: Path, names: list[str], count: int, words: Sequence[str], epochs: int, jobs: int
) -> Protocol:
    """Train from scratch on all before each of the last `count` partitions, by each rule."""
    trainings: dict[str, list[Training]] = {rule: [] for rule in RULES}
    for number in range(len(names) - count, len(names)):
        data = str(view_before(out, names, number))
        for rule, of_rule in trainings.items():
            run = out / "runs" / f"rows_{rule}-{names[number]}"
            asked = (*words_of(rule, words), "--epochs", str(epochs))
            title = f"{rule}, {names[number]}"
            of_rule.append(Training(run, data, RECIPE, 0, asked, title, ("scores_test.parquet",)))
    finish([training for of_rule in trainings.values() for training in of_rule], jobs, None)
    return Protocol(
        "rolling windows",
        {
            rule: [read_scores(scores_file(training.folder, "test")) for training in of_rule]
            for rule, of_rule in trainings.items()
        },
    )


def new_rows(
    out: Path,
    partitions: int = 10,
    rolling: int = 3,
    epochs: int = 1,
    source: Path | None = None,
    jobs: int = 2,
    quick: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measure both protocols and write the page.

    Args:
        out: folder for datasets and runs.
        partitions: number of partitions of the log.
        rolling: last partitions before which models are trained from scratch.
        epochs: epochs of these models.
        source: MovieLens; default: the bundled sample.
        jobs: trainings side by side, one thread each.
        quick: try small sizes.
        results: folder for the figures.
    """
    require_own_folder(quick, results)
    folder, words = out / "new_rows", QUICK if quick else ()
    partitions = QUICK_PARTITIONS if quick else partitions
    names = write_log(folder, partitions, source, QUICK_ROWS if quick else None)
    protocols = [
        walked(folder, names, words, jobs),
        windows(folder, names, 1 if quick else rolling, words, epochs, jobs),
    ]
    write_result(_result(protocols), results)


def _record(protocol: Protocol, rule: str) -> dict[str, Any]:
    """Return metrics of a rule, with their differences from `random`."""
    scores, baseline = protocol.scores[rule], protocol.scores["random"]
    record: dict[str, Any] = {"benchmark": "new_rows", "protocol": protocol.name, "rule": rule}
    record["configuration"] = {"embedding.tables": TABLES.format(rule=rule)}
    record["rows"] = {
        part: sum(int(mask_of(each, part)) for each in scores) for part in ("all", "cold", "unseen")
    }
    for metric, part in METRICS:
        interval = None
        if rule != "random":
            interval = paired_difference([baseline], [scores], metric, part)
        ends = None if interval is None else [interval.value, interval.low, interval.high]
        record[f"{metric} {part}"] = pooled_metric(scores, metric, part)
        record[f"{metric} {part}, difference"] = ends
    return record


def mask_of(scores: SplitScores, part: str) -> int:
    """Return the number of rows of a part."""
    counts = scores.counts
    return int({"all": counts >= 0, "cold": counts < 5, "unseen": counts == 0}[part].sum())


def _result(protocols: list[Protocol]) -> Result:
    records = [_record(protocol, rule) for protocol in protocols for rule in RULES]

    def cell(record: dict[str, Any], name: str) -> str:
        value, ends = record[name], record[f"{name}, difference"]
        if value is None:
            return "-"
        words = "" if ends is None else " ({:+.4f} [{:+.4f}, {:+.4f}])".format(*ends)
        return f"{value:.4f}{words}"

    def draw(figure: Figure) -> None:
        for place, part in enumerate(("cold", "unseen")):
            axes = figure.add_subplot(1, 2, place + 1)
            for number, record in enumerate(records):
                ends = record[f"gauc {part}, difference"]
                if ends is not None:
                    value, low, high = ends
                    axes.errorbar(value, number, xerr=[[value - low], [high - value]], fmt="o")
            axes.axvline(0, color="gray")
            titles = [f"{record['rule']}, {record['protocol']}" for record in records]
            axes.set_yticks(range(len(records)), titles if place == 0 else [""] * len(records))
            axes.set_xlabel(f"GAUC of {part} items, difference from random")

    names = [f"{metric} {part}" for metric, part in METRICS]
    rows = [
        [f"{record['protocol']}, {record['rule']}", *(cell(record, name) for name in names)]
        for record in records
    ]
    counted = "; ".join(
        f"{record['protocol']}: "
        + ", ".join(f"{count:,} rows of {part} items" for part, count in record["rows"].items())
        for record in records
        if record["rule"] == "random"
    )
    reading = [f"{counted}. In brackets: 95 % intervals of the difference from random."]
    columns = ["protocol, rule", *(name.replace("auc", "AUC").replace("g", "G") for name in names)]
    return Result("new_rows", "First rows of new items", records, columns, rows, draw, reading)


if __name__ == "__main__":
    auto_cli(new_rows, as_positional=False)
