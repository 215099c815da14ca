"""Commands that send runs and packages to a repository of the Hugging Face Hub, and fetch them."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recsys.commands.options import require_finished
from recsys.config.plain_yaml import load_plain_yaml
from recsys.storage.files import atomic_folder, read_json

logger = logging.getLogger(__name__)
DISTRIBUTION = "recsys-em3"
CARD = "README.md"
HUB_FILES = (CARD, ".gitattributes", ".cache")  # in a repository, but not in a run or package
LOCAL_FILES = (".job.json", ".lock")  # files that only the machine that wrote the folder needs
COMPILED = "compiled.pt2"
ITEMS = ("warm", "cold", "unseen")


def push(folder: Path, repository: str, /, private: bool = True, revision: str = "main") -> None:
    """Send a finished run or a package to a repository of the Hugging Face Hub, as one commit.

    Files that the repository had before, such as older checkpoints, are removed from the branch.

    Args:
        folder: finished run, or package that `recsys export` wrote
        repository: OWNER/NAME; it is made if it does not exist
        private: make a new repository private; raw ids of users are among the files
        revision: branch
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = folder if _is_package(folder) else require_finished(folder)
    _require_complete(folder)
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in LOCAL_FILES and ".partial" not in path.name
    ]
    files = [CommitOperationAdd(name, folder / name) for name in names if name != CARD]
    card = CommitOperationAdd(CARD, model_card(folder, repository).encode())
    message = f"recsys push, version {version(DISTRIBUTION)}"
    with _explained(repository):
        HfApi().create_repo(repository, private=private, exist_ok=True)
        earlier = HfApi().list_repo_files(repository, revision=revision)
        outdated = [
            CommitOperationDelete(name)
            for name in sorted({*earlier} - {*names, CARD, ".gitattributes"})
        ]
        commit = HfApi().create_commit(
            repository, [card, *files, *outdated], commit_message=message, revision=revision
        )
    logger.info("%s: %s files sent to %s", folder, len(files), commit.commit_url)


def pull(repository: str, /, out: Path, revision: str = "main", compiled: bool = False) -> None:
    """Fetch a run or a package from the Hugging Face Hub; it appears whole or not at all.

    Args:
        repository: OWNER/NAME
        out: folder to make
        revision: branch, tag or commit
        compiled: fetch packages with machine code, which runs when they are loaded
    """
    from huggingface_hub import HfApi

    if out.exists():
        raise ValueError(f"{out}: exists; name another folder, or remove it")
    with atomic_folder(out) as partial:
        with _explained(repository):
            names = HfApi().list_repo_files(repository, revision=revision)
            if COMPILED in names and not compiled:
                raise ValueError(
                    f"{repository}: has {COMPILED}, machine code that runs when it is loaded; give "
                    "--compiled true if you trust its author"
                )
            HfApi().snapshot_download(repository, revision=revision, local_dir=partial)
        for name in HUB_FILES:
            path = partial / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _require_complete(partial)
    logger.info("%s, revision %s: %s files fetched into %s", repository, revision, len(names), out)


def model_card(folder: Path, repository: str) -> str:
    """Return a run's or package's model card: metrics, commands and settings, as Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name=DISTRIBUTION, tags=["recommender", "ranking", "torchrec"])
    if _is_package(folder):
        kind, path = "package", f"packages/{folder.name}"
        use, sections = f"recsys serve {path}", ""
    else:
        kind, path = "run", f"runs/{folder.name}"
        use = f"recsys predict --run {path} --input DATA/test --out predictions.parquet"
        settings = (folder / "config.yaml").read_text()
        sections = (
            f"## Test metrics\n\n{_metrics_table(read_json(folder / 'metrics.json'))}\n\n"
            f"## Model\n\n{_description(load_plain_yaml(settings.encode()))}\n\n"
            f"<details><summary>All settings</summary>\n\n```yaml\n{settings}```\n\n</details>\n"
        )
    text = (
        f"---\n{data.to_yaml()}\n---\n# {repository.rpartition('/')[2]}\n\n"
        f"A {kind} of {DISTRIBUTION} {version(DISTRIBUTION)}. "
        "Load it only if you trust its author.\n\n"
        f"```bash\nrecsys pull {repository} --out {path}\n{use}\n```\n\n{sections}"
    )
    return str(ModelCard(text))


def _metrics_table(metrics: dict[str, Any]) -> str:
    split = metrics.get("test") or metrics["valid"]
    rows = {"all": split, **{name: split[name] for name in ITEMS if name in split}}
    names = [name for name, value in split.items() if isinstance(value, float)] + ["num_samples"]
    lines = [["items", *names], ["---", *("---:" for _ in names)]]
    lines += [
        [items, *(_number(values.get(name)) for name in names)] for items, values in rows.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else f"{value:,}"


def _description(config: dict[str, Any]) -> str:
    modalities = (config.get("content") or {}).get("modalities") or {}
    texts = [
        f"{name} ({settings['kind']}, {settings.get('encoder') or 'stored'})"
        for name, settings in modalities.items()
    ]
    content = f"reads {', '.join(texts)}" if texts else "reads no content"
    return f"The ranking model `{config['ranking']['name']}` {content}."


def _is_package(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _require_complete(folder: Path) -> None:
    """Raise for a package with a file that differs from its hash, or a folder of another kind."""
    if _is_package(folder):
        from recsys.serving.package import read_manifest

        read_manifest(folder)
    elif not all((folder / name).is_file() for name in ("config.yaml", "metrics.json")):
        raise ValueError(f"{folder}: holds neither a finished run nor a package")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn an error of the Hub or the network into a ValueError with the repository and a fix."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{repository}: {reason}; compare the name and revision, log in by `hf auth login`, or "
            "set HF_ENDPOINT"
        ) from error
