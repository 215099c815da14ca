"""Commands that write, change and serve packages and item vectors of finished runs."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from recsys.commands.options import require_finished
from recsys.config.server import ServerSettings
from recsys.doctor import require_working_installation, without_garbage_collection

logger = logging.getLogger(__name__)
TOKEN = "RECSYS_TOKEN"
NUM_LEVELS, NUM_CODES = 3, 256


def export(
    run: Path,
    out: Path,
    tables: Literal["fp32", "fp16", "int8", "int4"] = "fp32",
    data: str | None = None,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["run", "bf16"] = "run",
) -> None:
    """Write a run as a package that answers requests on its own.

    Args:
        run: folder of a finished run
        out: package: a folder to make
        tables: type of the ID tables; content vectors are in fp32 with fp32, else in fp16
        data: dataset; default: the run's own
        compile: compile the graph for this kind of processor; auto: if there is a C++ compiler
        precision: run: that of the run; bf16: attention and ensembles multiply in bfloat16
    """
    run = require_finished(run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.serving.export import export_run

    with joined_ranks("cpu") as ranks:
        manifest = export_run(run, out, tables, ranks, data, compile, precision)
    size = sum(entry["bytes"] for entry in manifest.files.values())
    logger.info("%s: %s files, %.1f MB", out, len(manifest.files), size / 1e6)


def serve(package: Path, /, settings: ServerSettings) -> None:
    """Serve a package over HTTP and gRPC until the process is asked to end.

    Args:
        package: package that `recsys export` wrote, or a link to one
        settings: addresses, workers and limits.
    """
    with without_garbage_collection():
        from recsys.serving.server.start import require_installation
        from recsys.serving.server.start import serve as start_server

        require_installation()
        require_working_installation(imports_torchrec=False)
        threads = len(os.sched_getaffinity(0)) // settings.workers  # all workers use all cores
        settings = replace(
            settings,
            package=str(package),
            name=settings.name or package.absolute().name,
            threads=settings.threads or max(1, threads),
            token=os.environ.get(TOKEN) if settings.token is None else settings.token,
        )
        start_server(settings)


def package_add_items(package: str, /, items: str) -> None:
    """Put new or changed items into a package.

    Args:
        package: folder that `recsys export` wrote, or the URL of a server with --encoders
        items: Parquet file with the columns of the items: content, which is encoded, and features
    """
    if package.startswith(("http://", "https://")):
        from recsys.serving.new_items.send import send_items

        logger.info("%s: %s", package, send_items(package, items, os.environ.get(TOKEN)))
        return
    with without_garbage_collection():
        require_working_installation(imports_torchrec=False)
        from recsys.serving.new_items.add import add_items

        logger.info("%s: %s", package, add_items(Path(package), items))


def package_features(package: Path, /, data: str, out: Path) -> None:
    """Write a package with the last known features of a dataset.

    Args:
        package: folder that `recsys export` wrote
        data: dataset of `recsys prepare events`
        out: folder of the newer package
    """
    from recsys.serving.features.package_features import refresh_features

    manifest = refresh_features(package, data, out)
    logger.info("%s: features of %s, %s files", out, data, len(manifest.files))


def package_verify(package: Path, /) -> None:
    """Compare all files of a package with their hashes.

    Args:
        package: folder that `recsys export` wrote
    """
    from recsys.serving.package import read_manifest

    logger.info("%s: %s files are whole", package, len(read_manifest(package).files))


def package_delta(base: Path, new: Path, /, out: Path) -> None:
    """Write what differs between two packages into one file.

    Args:
        base: the older package, which the receiver has
        new: the newer package
        out: file to write
    """
    from recsys.serving.delta import write_delta
    from recsys.storage.location import Location
    from recsys.storage.output_file import check_output

    check_output(out, [Location.of(folder) for folder in (base, new)])
    logger.info("%s: %s", out, write_delta(base, new, out))


def package_apply(package: Path, /, delta: Path, out: Path) -> None:
    """Make the newer package from the older package and a delta.

    Args:
        package: the older package
        delta: file that `package delta` wrote
        out: folder of the newer package
    """
    from recsys.serving.delta import apply_delta

    logger.info("%s: %s files are whole", out, len(apply_delta(package, delta, out).files))


def export_vectors(
    run: Path,
    out: Path,
    vectors: Literal["content", "item_tower", "codes"] | None = None,
    index: Literal["flat", "ivf", "hnsw"] | None = None,
    data: str | None = None,
    blend: bool = False,
) -> None:
    """Write item vectors of a run, with an index.

    Args:
        run: folder of a finished run
        out: a folder to make
        vectors: content: of any model with content; item_tower: of two_tower, with its user tower;
            codes: of generative, with its decoder, searched without an index; default: that of the
            model
        index: also build a FAISS index: flat (exact), ivf or hnsw; needs the extra `retrieve`
        data: dataset; default: the run's own
        blend: of two_tower: blend the towers with the baselines of `recsys baselines`, by weights
            that validation chooses
    """
    run = require_finished(run)
    require_working_installation()
    from recsys.distributed.ranks import joined_ranks
    from recsys.serving.retrieval.item_vectors import export_vectors as write_vectors

    with joined_ranks("cpu") as ranks:
        manifest = write_vectors(run, out, vectors, index, ranks, data, blend)
    size = f"{manifest.num_items:,} x {manifest.dim}"
    kind = "no index" if manifest.index is None else f"index {manifest.index}"
    logger.info("%s: %s vectors %s, %s", out, manifest.vectors, size, kind)


def retrieve(
    package: Path,
    input: list[str],
    out: Path | None = None,
    top_k: PositiveInt = 100,
    new_items: Path | None = None,
) -> None:
    """Write the best items of each request, by an index of vectors.

    Args:
        package: folder of export-vectors, with an index or codes
        input: Parquet files with a request in each row, or folders of them; or .json files
        out: Parquet file to write; default: a JSON line per request
        top_k: items of each request
        new_items: folder of semantic-ids, whose items are retrieved, too, by a generative model
    """
    from recsys.serving.retrieval import Retriever
    from recsys.serving.retrieval.retriever import retrieve_files

    retriever = Retriever.load(package)
    if new_items is not None:
        logger.info("%s: %s new items", new_items, f"{retriever.add_items(new_items):,}")
    total = retrieve_files(retriever, input, top_k, out)
    if out is not None:
        logger.info("%s: items of %s requests", out, f"{total:,}")


def baselines(run: Path, data: str | None = None) -> None:
    """Compare a retrieval model on test with popularity, item-CF, content neighbours and blends.

    Args:
        run: folder of a finished run of two_tower
        data: dataset; default: the run's own
    """
    run = require_finished(run)
    require_working_installation()
    from recsys.distributed.log import print_table
    from recsys.distributed.ranks import joined_ranks
    from recsys.serving.retrieval.baselines import compare_with_baselines, format_baselines
    from recsys.storage.files import write_json

    with joined_ranks("cpu") as ranks:
        reports, _ = compare_with_baselines(run, data, ranks)
    print_table(format_baselines(reports))
    write_json(run / "baselines_test.json", reports, indent=2)


def semantic_ids(
    run: Path,
    out: Path,
    levels: PositiveInt | None = None,
    codes: PositiveInt | None = None,
    codebooks: Path | None = None,
    dataset: Path | None = None,
    data: str | None = None,
    balanced: bool = False,
    vectors: Literal["content", "item_tower"] | None = None,
) -> None:
    """Write codes that similar items share, and print the collision report.

    Args:
        run: finished run with content, or of two_tower
        out: a folder to make
        levels: codes of each item; default: 3
        codes: codes of each level; default: 256
        codebooks: earlier folder of the same run: its items keep their ids, others get theirs by
            its codebooks
        dataset: also write the dataset with a column semantic_ids to this folder
        data: dataset; default: the run's own
        balanced: use the codes of a level alike, as a generative model needs
        vectors: content, the default, or item_tower of two_tower, whose nearest items also have
            the same users, so that a generative model finds more
    """
    if codebooks is not None and (levels or codes or balanced or vectors):
        raise ValueError(
            f"--levels, --codes, --balanced and --vectors are those of --codebooks {codebooks}; "
            "leave them out, or leave --codebooks out for new ids"
        )
    run = require_finished(run)
    require_working_installation()
    from recsys.distributed.log import print_table
    from recsys.distributed.ranks import joined_ranks
    from recsys.serving.retrieval.semantic_ids import export_semantic_ids, format_collisions

    levels, codes, vectors = levels or NUM_LEVELS, codes or NUM_CODES, vectors or "content"
    with joined_ranks("cpu") as ranks:
        collisions = export_semantic_ids(
            run, out, levels, codes, ranks, data, codebooks, dataset, balanced, vectors
        )
    print_table(format_collisions(collisions))
    logger.info("written to %s", out)
