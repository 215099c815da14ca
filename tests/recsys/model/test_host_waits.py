"""No training step waits for a GPU: each backbone, recipe and part of a job, by `tests.host_waits`.

The branches that only GPUs take run here on CPU, and give the logits of those for CPUs.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import recsys
from benchmarks.settings import setting
from recsys.build import Job, build_job
from recsys.config import (
    Config,
    ModalitySettings,
    OptimizerSettings,
    content_settings,
    load_config,
)
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions
from recsys.data.parquet.rows import ParquetRows
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.evaluate import fill_bank, score
from tests.datasets import write_dataset
from tests.host_waits import HostWaits, audited_steps, gpu_branches
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import batches_of, ranks_of
from tests.recsys.ranking.backbone_runs import BACKBONES, backbone_config

STEPS, WARM_UP = 4, 2
RECIPES = Path(recsys.__file__).parent / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waits")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks("cpu") as ranks:
        yield ranks


def audit(
    config: Config, data: Path, ranks: Ranks, rows: int = 10, is_compiled: bool = False
) -> HostWaits:
    """The steps of a run; a column of weights or labels would be scaled among the ranks before."""
    job = build_job(config, str(data), ranks)
    if job.em3.content is not None and job.em3.content.bank is not None:
        fill_bank(job)
    return audited_steps(job, prepared(job, rows), WARM_UP, is_compiled)


def prepared(job: Job, rows: int) -> Iterator[Batch]:
    batches = iter(batches_of(job, STEPS, rows))
    return job.preparation(batches, UnknownIds(job.schema), 0, training=True)


@pytest.mark.parametrize("content", ["qformer", "none"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_backbone_waits_and_its_branches_for_gpus_compute_the_same(
    folder: Path, ranks: Ranks, backbone: str, content: Any
) -> None:
    config = backbone_config(folder, backbone, content, sharding="auto", kernels="torch")
    config.ranking.dropout = 0.0  # drawn otherwise on a GPU
    with gpu_branches():
        waits = audit(config, folder / "data", ranks)
    assert not waits.sites
    on_cpu = audit(config, folder / "data", ranks)
    torch.testing.assert_close(waits.logits, on_cpu.logits, rtol=1e-5, atol=1e-5)


def of_recipe(name: str, folder: Path) -> Config:
    """A recipe on the small dataset, with encoders drawn at random."""
    argv = ["--device", "cpu", "--kernels", "torch", "--cache", str(folder / "cache")]
    config = load_config(str(RECIPES / f"{name}.yaml"), argv)
    if config.neighbours is not None:
        config.neighbours.values = "history_liked"
    config.embedding.skip = []
    content = content_settings(config.content)
    if content is None:
        return config
    modalities = {}
    for key, modality in content.modalities.items():
        if modality.kind == "text":
            text = replace(modality, column="text", encoder="random:bert", max_length=16)
            modalities[key] = replace(text, lora=replace(modality.lora, top_layers=1, rank=2))
    if name == "movielens_multimodal":
        modalities["poster"] = ModalitySettings("feature", "clip")
    return replace(config, content=replace(content, modalities=modalities))


# Launches of a step of each recipe, whatever the number of rows, with compiled graphs as one; a GPU
# needs about 5 us for each. Uncompiled, movielens_sample has 1,083.
MAX_LAUNCHES = {
    "tiny": 200,
    "id_only": 200,
    "movielens_sample": 400,
    "movielens_multimodal": 400,
    "implicit_content": 200,
    "next_item": 800,  # its tower reads lengths, so that parts are compiled alone
}


@pytest.mark.parametrize("name", MAX_LAUNCHES)
def test_no_recipe_waits(folder: Path, ranks: Ranks, name: str) -> None:
    with gpu_branches():
        assert not audit(of_recipe(name, folder), folder / "data", ranks).sites


def one_and_long(names: Iterable[str], one: str) -> list[Any]:
    """Names of tests that compile for a minute: the default job has one of them."""
    return [pytest.param(name, marks=[] if name == one else pytest.mark.long) for name in names]


COMPILED_RECIPES = [name for name in MAX_LAUNCHES if name != "tiny"]  # a small movielens_sample


@pytest.mark.parametrize("name", one_and_long(COMPILED_RECIPES, "id_only"))
def test_a_compiled_recipe_has_few_launches(folder: Path, ranks: Ranks, name: str) -> None:
    with gpu_branches():
        waits = audit(of_recipe(name, folder), folder / "data", ranks, is_compiled=True)
    assert not waits.sites
    launches = waits.launches / (STEPS - WARM_UP)
    assert launches <= MAX_LAUNCHES[name], launches


@pytest.mark.parametrize(
    ("backbone", "max_launches"),
    [("hstu", 300), pytest.param("transformer", 310, marks=pytest.mark.long)],
)
def test_layers_are_compiled_where_lengths_are_read_and_compute_the_same(
    folder: Path, ranks: Ranks, backbone: str, max_launches: int
) -> None:
    """Logits of later steps are those of weights that the gradients of earlier ones changed."""
    config = backbone_config(folder, backbone, "none", sharding="auto", kernels="torch")
    config.ranking.dropout, config.ranking.sequence_layers = 0.0, 2  # type: ignore[attr-defined]
    with gpu_branches():
        plain, compiled = (
            audit(config, folder / "data", ranks, is_compiled=is_compiled)
            for is_compiled in (False, True)
        )
    assert not compiled.sites
    launches = [waits.launches / (STEPS - WARM_UP) for waits in (plain, compiled)]
    assert launches[1] <= max_launches < 0.8 * launches[0], launches
    torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["A", "B"])
def test_no_setting_of_the_benchmarks_waits(tmp_path: Path, ranks: Ranks, name: str) -> None:
    data, argv = (sized := setting(name, quick=True)).prepared(tmp_path)
    config = load_config(str(sized.recipe), [*argv, "--kernels", "torch"])
    with gpu_branches():
        waits = audit(config, Path(data), ranks, is_compiled=True)
    assert not waits.sites
    launches = waits.launches / (STEPS - WARM_UP)
    assert launches <= 200, launches


def changed(config: Config, **fields: Any) -> Config:
    content = content_settings(config.content)
    assert content is not None
    if "history" in fields:
        fields["history"] = replace(content.history, **fields["history"])
    return replace(config, content=replace(content, **fields))


@pytest.mark.parametrize(
    "keys",
    [{"history": {"mode": "full"}}, {"encoder_share": 0.5}, {"dedup": "global"}],
    ids=["encoded histories", "a share of items encoded", "items shared by ranks"],
)
def test_no_way_of_reading_content_waits(folder: Path, ranks: Ranks, keys: dict[str, Any]) -> None:
    config = changed(backbone_config(folder, "din_dcn", "concat", sharding="auto"), **keys)
    with gpu_branches():
        assert not audit(replace(config, kernels="torch"), folder / "data", ranks).sites


def waits_of_rank(rank: int, world_size: int, folder: Path) -> dict[str, int]:
    config = changed(
        backbone_config(folder, "din_dcn", "concat", sharding="auto"),
        encoder_share=0.5,
        history={"bank": "sharded"},
    )
    with gpu_branches():
        ranks = ranks_of(rank, world_size)
        return dict(audit(replace(config, kernels="torch"), folder / "data", ranks, rows=7).sites)


def test_no_rank_routes_outputs_of_encoders_in_a_step(folder: Path) -> None:
    for sites in run_on_ranks(waits_of_rank, 2, folder):
        mine = [site for site in sites if site.startswith(("recsys/content", "embeddings/mem"))]
        assert not mine, sites


def test_averages_clipping_accumulation_and_bfloat16_do_not_wait(
    folder: Path, ranks: Ranks
) -> None:
    optimizer = OptimizerSettings(ema_decay=0.9, ema_tables=True, clip_norm=1.0)
    settings: dict[str, Any] = {"sharding": "auto", "kernels": "torch", "precision": "bf16"}
    config = backbone_config(folder, "din_dcn", "qformer", optimizer=optimizer, **settings)
    with gpu_branches():
        assert not audit(replace(config, accumulate_steps=2), folder / "data", ranks).sites


@pytest.mark.parametrize("bounded", [False, True])
def test_a_search_by_vectors_of_the_bank_does_not_wait_and_finds_the_same(
    folder: Path, ranks: Ranks, bounded: bool
) -> None:
    """On a GPU the vectors arrive while a step runs, so that a batch goes on in the next call."""
    data = folder / "data"
    if bounded:
        schema = write_dataset(data := folder / "bounded") / "schema.yaml"
        rows = "num_embeddings: 30", "num_embeddings: 17, vocabulary: {kind: bounded}"
        schema.write_text(schema.read_text().replace(*rows))
    config = backbone_config(folder, "din_dcn", "concat", sharding="auto", kernels="torch")
    config.ranking.dropout = 0.0  # drawn otherwise on a GPU
    config = changed(config, history={"top_k": 2})
    with gpu_branches():
        waits = audit(config, data, ranks)
    assert not waits.sites
    torch.testing.assert_close(waits.logits, audit(config, data, ranks).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", ["din_dcn", "two_tower"])
def test_scores_of_a_gpu_are_copied_at_the_end_and_are_the_same(
    folder: Path, ranks: Ranks, backbone: str
) -> None:
    config = backbone_config(folder, backbone, "qformer", sharding="auto", kernels="torch")
    job = build_job(config, str(folder / "data"), ranks)
    rows = ParquetRows.of_split(job.root, "test", job.schema)
    scored = []
    for context in (nullcontext(), gpu_branches()):
        # Batches of 7: the last one has rows that only fill it.
        interactions = Interactions(rows, job.batch_builder(), 7)
        with context:
            scored.append(score(job, interactions, with_queries=True))
    assert scored[0].keys() == scored[1].keys()
    for name, column in scored[0].items():
        torch.testing.assert_close(scored[1][name], column, rtol=0, atol=1e-5, equal_nan=True)


def test_the_audit_sees_waits(folder: Path, ranks: Ranks) -> None:
    config = backbone_config(folder, "hstu", "none", sharding="auto", kernels="torch")
    waits = audit(config, folder / "data", ranks)  # the branches for CPU
    assert {(site.split(":")[0], site.split()[-1]) for site in waits.sites} == {
        ("embeddings/torchrec_internals.py", "tolist"),
        ("embeddings/torchrec_internals.py", "_local_scalar_dense"),
        ("recsys/data/jagged_history.py", "nonzero"),
    }
