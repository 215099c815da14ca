"""The request of a warm start, the checkpoints that it reads, and differences of the new run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from recsys.build import Job
from recsys.checkpoint import files
from recsys.checkpoint.compatibility import differing, differing_settings
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.reader import SafeFileSystemReader, StoredTensor
from recsys.checkpoint.run_folder import encoder_identities
from recsys.checkpoint.run_schema import FILE, changes, described_columns, load_run_schema
from recsys.checkpoint.state import frozen_digest
from recsys.config import Config, ModalitySettings, config_of_plain, content_settings
from recsys.config.parser import short
from recsys.content.encoders.identity import check_identities
from recsys.data.schema import Schema, load_schema, load_vocabularies
from recsys.data.schema_columns import IdType
from recsys.data.transforms.chain import set_chain
from recsys.distributed.ranks import Ranks
from recsys.storage.location import Location

MAX_FAULTS = 12  # in one message


@dataclass(frozen=True)
class WarmStart:
    """A run to start from, and which of its state is taken over.

    Args:
        run: folder of the run.
        checkpoint: its best model or its last checkpoint.
        only: load only parameters that match these patterns, such as `content.*`; empty: all.
        skip: reinitialise parameters that match these patterns, with their optimizer state and, of
            a table, the vocabulary.
        optimizer: also take the state of the optimizers.
    """

    run: Path
    checkpoint: Literal["best", "last"] = "best"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    optimizer: bool = True

    def takes(self, name: str) -> bool:
        is_included = not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)
        return is_included and not any(fnmatchcase(name, pattern) for pattern in self.skip)

    def unmatched(self, names: list[str]) -> list[str]:
        return [
            pattern
            for pattern in dict.fromkeys([*self.only, *self.skip])
            if not any(fnmatchcase(name, pattern) for name in names)
        ]


class Difference(NamedTuple):
    """A difference between the runs that does not prevent a warm start."""

    part: str
    what: str
    rule: str  # what the new run has


@dataclass
class Differences:
    """Differences that a rule reconciles, and faults: differences that no rule reconciles."""

    reconciled: list[Difference] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, subject: str, change: str, rule: str) -> None:
        self.reconciled.append(Difference(subject, change, rule))

    def refuse(self, subject: str, change: str, fix: str) -> None:
        self.faults.append(f"{subject}: {change}; {fix}")

    def check(self, folder: object) -> None:
        """Raise a ValueError that lists the faults, if there are any."""
        if self.faults:
            shown = self.faults[:MAX_FAULTS]
            if num_unlisted := len(self.faults) - len(shown):
                shown.append(f"and {num_unlisted} more")
            raise ValueError(f"{folder}: this model cannot start from it: {'. '.join(shown)}")

    def __str__(self) -> str:
        if not self.reconciled:
            return "nothing differs"
        rows = [("part", "difference", "in this run"), *self.reconciled]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(
            f"{name:<{widths[0]}}  {change:<{widths[1]}}  {rule}" for name, change, rule in rows
        )


@dataclass(frozen=True, eq=False)
class StoredState:
    """A checkpoint whose files are complete and unchanged."""

    folder: Path
    manifest: dict[str, Any]
    reader: SafeFileSystemReader

    @classmethod
    def open(cls, folder: Path, ranks: Ranks) -> Self:
        """Check the files of a checkpoint and read what it has. A collective."""
        manifest = files.checked_manifest(folder, ranks)
        ranks.on_first(files.check_run_files, folder, manifest)
        with ranks.raise_on_all_ranks():
            return cls(folder, manifest, SafeFileSystemReader(folder))

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def entries(self) -> Mapping[str, Any]:
        return self.reader.entries

    @property
    def progress(self) -> Progress:
        return Progress.from_json(self.manifest["progress"])

    def tensor(self, name: str) -> StoredTensor:
        return StoredTensor(self.reader, name)


@dataclass(frozen=True)
class Source:
    """The opened run that a warm start takes over from."""

    request: WarmStart
    model: StoredState
    optimizer: StoredState | None  # with the optimizers' state; None if not taken, or not kept
    schema: Schema  # with the run's maps of raw ids
    config: Config
    differences: Differences = field(default_factory=Differences)  # of the new run


def open_source(request: WarmStart, out: Path | None, ranks: Ranks) -> Source:
    """Open the checkpoint of a run, for a new run in the folder `out`, if any. A collective.

    The best model takes optimizer state from the checkpoint of its step, or else the last one.
    A checkpoint that is missing or damaged, or a run that is `out`, is a ValueError on every rank.
    """
    with ranks.raise_on_all_ranks():
        if out is not None and request.run.resolve() == out.resolve():
            raise ValueError(f"--warm-start: {request.run} is --out, too; choose another --out")
    checkpoints = request.run / "checkpoints"
    best, steps = checkpoints / files.BEST, files.folders_by_age(checkpoints)
    best, steps = ranks.gather((best if best.is_dir() else None, steps))[0]
    folder = best if request.checkpoint == "best" else next(iter(steps), None)
    if folder is None:
        other = "best" if best else "last" if steps else None
        fix = f"--warm-start-checkpoint {other}" if other else "the folder of a trained run"
        raise ValueError(f"{request.run}: has no {request.checkpoint} checkpoint; give {fix}")
    model = StoredState.open(folder, ranks)
    optimizer: StoredState | None = model
    if not request.optimizer or not steps:
        optimizer = None
    elif folder not in steps:
        same_step = [path for path in steps if files.step_of_folder(path) == model.step]
        optimizer = StoredState.open((same_step or steps)[0], ranks)
    with ranks.raise_on_all_ranks():
        schema = load_run_schema(request.run)
        config = config_of_plain(model.manifest["config"])
    return Source(request, model, optimizer, schema, config)


# Attributes that concern the rows of a table alone; `rows.row_map` compares these.
_ROW_ATTRIBUTES = ("num_embeddings", "vocabulary.kind", "vocabulary.num_hashes", "vocabulary.seed")
# Attributes that change how the model is trained or measured, but not what its weights mean.
_FREE_ATTRIBUTES = ("vocabulary.admit_after", "vocabulary.half_life", "loss", "nullable")


def reconciled_schema(source: Source, root: Location, with_vocabularies: bool = True) -> Schema:
    """Load a dataset's schema with the run's fits and order of columns; new columns come last."""
    trained, differences = source.schema, source.differences
    data = load_schema(root, with_vocabularies=False)
    for name, chain in data.transforms.items():
        fitted = trained.transforms.get(name)
        if fitted is None or not fitted.is_fit_of(chain.without_fit) or fitted == chain:
            continue
        if chain.unfitted is None:
            differences.add(f"column '{name}'", "its transform was fitted anew", "fit of the run")
        data.transforms[name] = fitted
        set_chain(data.columns[name], fitted)
    _compare_columns(trained, data, differences)
    names = dict.fromkeys([*trained.columns, *data.columns])
    data.columns = {name: data.columns[name] for name in names if name in data.columns}
    for name, column in data.columns.items():
        first = trained.columns[name].parallel if name in trained.columns else []
        ordered = dict.fromkeys([*first, *column.parallel])
        column.parallel = [parallel for parallel in ordered if parallel in column.parallel]
    path = str(source.request.run / FILE)
    for table, id_type in trained.id_types.items():
        is_read_as_rows = table in data.columns and data.vocabulary_of(table) is None
        if not is_read_as_rows:  # also a column that a transform hashes or joins
            data.id_types[table] = IdType(id_type.name, path)
    differences.check(source.model.folder)
    if with_vocabularies:
        load_vocabularies(data, root)
    return data


def _compare_columns(trained: Schema, data: Schema, differences: Differences) -> None:
    if trained.target_item != data.target_item:
        targets = f"'{trained.target_item}' in the run, '{data.target_item}' in the data"
        differences.refuse("target_item", targets, "name the run's column, or train anew")
    for change in changes("group", {"": trained.group}, {"": data.group}):
        differences.add("group", change, "measured by the data's")
    stored, current = described_columns(trained), described_columns(data)
    for name in dict.fromkeys([*stored, *current]):
        if name not in current:
            differences.add(name, "not in the data", "dropped")
            continue
        if name not in stored:
            differences.add(name, "not in the run", "added")
            continue
        for attribute, old_value, new_value in differing(stored[name], current[name]):
            if attribute in _ROW_ATTRIBUTES:
                continue
            change = f"{attribute} was {short(old_value)}, is {short(new_value)}"
            if attribute in _FREE_ATTRIBUTES or attribute.split(".")[0] == "fill":
                differences.add(name, change, "as in the data")
            else:
                differences.refuse(name, change, "set it back, or give the column another name")


def compare_settings(source: Source, config: Config) -> None:
    """List the settings that differ and change more than length and speed of training."""
    lacks_content = None in map(content_settings, (source.config.content, config.content))
    for name, stored, current in differing_settings(source.config, config):
        if name.startswith("content.") and lacks_content:
            continue
        change = f"was {short(stored)}, is {short(current)}"
        if name == "ranking.name" and source.request.takes("ranking."):
            source.differences.refuse(name, change, "set it back, or --warm-start-skip 'ranking.*'")
        else:
            source.differences.add(f"setting {name}", change, short(current))


def compare_encoders(source: Source, job: Job, takes: Callable[[str], bool]) -> bool:
    """Return whether items are encoded as in the run; refuse used encoders that differ."""
    stored, current = content_settings(source.config.content), content_settings(job.config.content)
    if stored is None or current is None:
        return False
    settings = [name for name, *_ in differing_settings(source.config, job.config)]
    is_same = not any(name.startswith("content.") for name in settings)
    identities = encoder_identities(job)
    for name in stored.modalities.keys() & current.modalities.keys():
        try:
            _check_terms(stored.modalities[name], current.modalities[name])
            if name in identities:
                check_identities({name: identities[name]}, source.request.run)
        except ValueError as error:
            is_same = False
            prefixes = f"content.encoders.{name}.", f"content.projections.{name}."
            if any(takes(key) for key in job.model.state_dict() if key.startswith(prefixes)):
                fix = f"or --warm-start-skip 'content.*.{name}.*'"
                source.differences.refuse(f"content.modalities.{name}", str(error), fix)
    if is_same and source.model.manifest["frozen_weights"] != frozen_digest(job):
        problem = "they are others, though encoders and settings are the same"
        fix = "bring the run's encoders back, or train anew"
        source.differences.refuse("frozen weights", problem, fix)
    return is_same


def _check_terms(stored: ModalitySettings, current: ModalitySettings) -> None:
    """Raise a ValueError if terms have other embeddings, which the run's projection cannot read."""
    sizes = stored.num_embeddings, current.num_embeddings
    if stored.kind == current.kind == "terms" and sizes[0] != sizes[1]:
        raise ValueError(
            f"num_embeddings was {sizes[0]}, is {sizes[1]}, which gives each term another "
            "embedding; set it back"
        )
