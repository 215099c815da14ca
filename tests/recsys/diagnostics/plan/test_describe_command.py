"""`recsys describe` as a command, and what it says of settings and of what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.device_figures import DeviceFigures
from embeddings.simulated_cluster import Cluster
from recsys.build import build_job
from recsys.cli import main
from recsys.config import (
    Config,
    EmbeddingSettings,
    ModalitySettings,
    SamplingSettings,
    TableSettings,
    content_settings,
    ranking_settings,
)
from recsys.content.cache.distinct import DistinctRows
from recsys.data.filesystem import Location
from recsys.data.schema import load_schema
from recsys.diagnostics.cost.counted import WorkCounter
from recsys.diagnostics.plan.command import parse_rows
from recsys.diagnostics.plan.description import Description, describe
from recsys.diagnostics.plan.item_sample import sample_items
from recsys.diagnostics.plan.report import format_description, in_bytes
from recsys.distributed.ranks import joined_ranks
from recsys.ranking import RANKING_MODELS
from recsys.training.train import training_interactions
from tests.datasets import write_dataset, write_parquet
from tests.recsys.command_runs import TINY
from tests.recsys.em3_runs import all_texts_run, em3_config

CPU = DeviceFigures("cpu", "cpu", 2**33, 1e10, 1e11, 1e11, 1e10, 1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("describe")
    write_dataset(place / "data", {"train": 320, "valid": 24, "test": 20}, num_items=100)
    return place


def described(folder: Path, config: Config, ranks: int = 1, **rows: int) -> Description:
    return describe(config, str(folder / "data"), Cluster(1, ranks, CPU), rows)


def command(folder: Path, *words: str) -> int:
    data = str(folder / "data")
    return main(["describe", "--config", str(TINY), "--data", data, *words])


def test_a_laptop_plans_four_billion_rows_over_64_gpus(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = ["--nodes", "8", "--gpus-per-node", "8", "--device", "h100"]
    sizes = ["--rows", "item=4_000_000_000", "--embedding.dim", "128"]
    out = folder / "numbers" / "plan.json"
    assert command(folder, *cluster, *sizes, "--json", str(out)) == 0

    found = json.loads(out.read_text())
    assert found["world_size"] == 64 and not found["problems"]
    (item,) = [part for part in found["parts"] if part["name"] == "table item"]
    assert item["parameters"] == 4_000_000_000 * 128
    assert item["weight_bytes"] == 62_500_000 * 128 * 4
    assert item["state_bytes"] == 62_500_000 * 4
    # The bank: a content vector, a mean token of the one modality, and its age, per row.
    assert found["memory"]["bank"] == 62_500_000 * (16 + 16 + 1) * 4
    printed = capsys.readouterr().out
    assert "64 ranks (8 x 8) on h100" in printed
    assert "row_wise on 64 ranks" in printed and "\nfits: " in printed


def test_host_memory_and_copies_of_tables_are_planned(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = ["--nodes", "8", "--gpus-per-node", "8", "--device", "h100"]
    sizes = ["--rows", "item=4_000_000_000", "--embedding.dim", "128"]
    item = "{item: {kernel: uvm_caching, cache_load_factor: 0.1}}"
    assert command(folder, *cluster, *sizes, "--embedding.tables", item) == 0
    printed = capsys.readouterr().out
    assert "ranks, in host" in printed and "fused_uvm_caching" in printed
    assert "\ntables in host" in printed and "\nfits: " in printed
    assert "not counted: time of reads" in printed

    out = folder / "numbers" / "copies.json"
    copies = ["--embedding.parallel.copies", "8", "--rows", "item=1_000_000_000"]
    assert command(folder, *cluster, *copies, "--json", str(out)) == 0
    found = json.loads(out.read_text())
    assert len(found["table_bytes"]) == 8  # ranks that share a copy
    (mean,) = [kind for kind in found["sent"] if kind["name"] == "mean of copies"]
    held = fmean(found["table_bytes"])
    assert mean["backward"] == pytest.approx(2 * 7 / 8 * held, rel=1e-6)
    assert "mean of copies" in capsys.readouterr().out

    on_host = EmbeddingSettings(16, tables={"item": TableSettings(kernel="uvm")})
    with pytest.raises(ValueError, match=r"embedding\.tables\.item\.kernel is uvm, .* cpu"):
        described(folder, em3_config(folder, embedding=on_host))


def test_what_does_not_fit_is_said_by_table_with_what_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = ["--device", "a100", "--figures.memory_bytes", "1e9"]
    assert command(folder, *memory, "--rows", "item=50000000", "--content", "none") == 0

    printed = capsys.readouterr().out
    assert "\n  table 'item' (50,000,000 x 16, rowwise_adagrad, auto) " in printed
    assert ": 5 ranks" in printed
    assert ": num_embeddings 12," in printed


def test_what_else_does_not_fit_is_named(folder: Path) -> None:
    config = em3_config(folder)
    small = replace(CPU, memory_bytes=2**24)
    found = describe(config, str(folder / "data"), Cluster(1, 1, small), {"item": 100_000})

    assert found.memory.bank == 100_000 * (3 * 16 + 1) * 4
    assert "memory bank" in format_description(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h1000"], "device 'h1000' is unknown"),
        (["--device", "cuda"], "device is cuda"),
        (["--device", "h100", "--nodes", "0"], "nodes is 0"),
        (["--device", "h100", "--nodes", "1000000000"], "nodes is 1000000000"),
        (["--device", "h100", "--rows", "shoes=5"], "rows: 'shoes'"),
        (["--device", "h100", "--rows", "item"], "rows: 'item' is not TABLE=NUMBER"),
        (["--device", "h100", "--figures.fp32_flops", "0"], "figures.fp32_flops is 0"),
        (
            ["--device", "h100", "--content.modalities.text.column", "nothing"],
            "item column 'nothing'",
        ),
    ],
)
def test_mistakes_are_named(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("a GPU is usable")
    assert command(folder, *words) == 1
    assert message in capsys.readouterr().err


def test_this_machine_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--device", "cpu", "--gpus-per-node", "2") == 0
    printed = capsys.readouterr().out
    assert "2 ranks (1 x 2) on cpu" in printed
    assert "320 of 320 training rows" in printed


def test_sampled_items_and_short_histories_count_as_they_will_be(folder: Path) -> None:
    config = em3_config(folder, batch_size=64)
    content = content_settings(config)
    assert content is not None
    whole = described(folder, config)
    history = replace(content.history, top_k=1)
    less = replace(content, sampling=SamplingSettings(0.5, 0.25), history=history)
    found = described(folder, replace(config, content=less))

    assert found.counts.encoded == pytest.approx(whole.counts.encoded / 2, abs=0.5)
    assert found.counts.with_gradient == pytest.approx(whole.counts.encoded / 4, abs=1)
    assert found.counts.stored == pytest.approx(whole.counts.encoded / 2, abs=0.5)
    assert found.counts.history < found.counts.rows < whole.counts.history


def test_shared_items_are_encoded_once_in_all(folder: Path) -> None:
    config = em3_config(folder, batch_size=64)
    content = content_settings(config)
    assert content is not None
    alone = described(folder, config, ranks=4)
    shared = described(folder, replace(config, content=replace(content, dedup="global")), ranks=4)

    assert shared.counts.encoded == pytest.approx(100 / 4, abs=3)  # of 100 items nearly all occur
    assert shared.counts.exchanged == alone.counts.encoded
    assert "content vectors" in [kind.name for kind in shared.sent]


def test_an_encoder_that_is_cached_leaves_the_run_and_lies_on_disk(folder: Path) -> None:
    config = em3_config(folder)
    content = content_settings(config)
    assert content is not None
    modality = replace(content.modalities["text"], cache_frozen_layers=False)
    modalities = {**content.modalities, "text": modality}
    kept = described(folder, replace(config, content=replace(content, modalities=modalities)))
    cached = described(folder, config)

    def parameters(found: Description) -> int:
        return sum(part.parameters for part in found.parts)

    assert parameters(kept) == parameters(cached) + cached.frozen_layers["text"]
    with joined_ranks("cpu") as ranks:
        job = build_job(config, str(folder / "data"), ranks)
    assert job.store is not None and job.em3.content is not None
    report: Any = job.em3.content.encoders["text"].cache_report
    values = sum(path.stat().st_size for path in report.folder.glob("values*"))
    lengths, distinct = job.store.arrays["text"].lengths, DistinctRows.of(job.store.hashes["text"])
    shared = lengths.sum() / lengths[distinct.first].sum()  # items of equal text share their output
    assert shared > 1 and cached.cached_bytes["text"] == pytest.approx(values * shared, rel=0.01)

    tokens = replace(content.modalities["text"], training="frozen", pooling="none")
    modalities = {**content.modalities, "text": tokens}
    halved = described(folder, replace(config, content=replace(content, modalities=modalities)))
    assert halved.cached_bytes["text"] == cached.cached_bytes["text"] / 2  # all tokens, in float16


@pytest.mark.parametrize("name", sorted(RANKING_MODELS))
def test_flops_of_any_ranking_model_are_counted(folder: Path, name: str) -> None:
    ranking = ranking_settings(name, mlp_units=[16], dropout=0.0)
    config = em3_config(folder, ranking=ranking, batch_size=64, kernels="torch")
    found = described(folder, config)
    with joined_ranks("cpu") as ranks:
        job = build_job(config, str(folder / "data"), ranks)
        batches = [batch for batch, _ in zip(training_interactions(job), range(5))]
        measured = []
        for batch in batches:
            with WorkCounter() as forward, all_texts_run():
                job.model(batch)
            measured.append(forward.work().products / batch.batch_size)
        with WorkCounter() as shared:
            job.model(batch)
    expected = sum(part.forward.products for part in found.costs) / found.counts.rows
    assert expected == pytest.approx(fmean(measured), rel=0.02)
    assert shared.work().products / batch.batch_size < measured[-1]  # equal texts run once


def test_twins_without_content_and_frozen_tables_are_described(folder: Path) -> None:
    tables = EmbeddingSettings(dim=16, skip=["user"])
    config = em3_config(folder, content="none", embedding=tables)
    config.contrastive.weight = 0.0
    found = described(folder, config)

    assert found.memory.bank == 0 and not found.cached_bytes
    assert {part.name.split()[0] for part in found.parts} == {"table", "ranking"}


def test_numbers_and_words() -> None:
    assert parse_rows(["item=4e9", "user=1_000"]) == {"item": 4_000_000_000, "user": 1000}
    assert [in_bytes(number) for number in (12, 1536, 79 * 2**30)] == ["12 B", "1.5 KiB", "79 GiB"]


def test_features_in_a_file_and_several_images_are_looked_at(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    np.save(data / "audio.npy", np.ones((30, 3, 5), np.float32))
    schema = (data / "schema.yaml").read_text()
    (data / "schema.yaml").write_text(
        schema + "    audio: {kind: feature, file: audio.npy}\n    frames: {kind: image}\n"
    )
    (file,) = (data / "items").glob("*.parquet")
    items = pq.read_table(file)
    frames = pa.array([[b"a", b"b"], None, [], [b"a"] * 9, *[[b"a"]] * 26], pa.list_(pa.binary()))
    write_parquet(file, items.append_column("frames", frames))
    modalities = {
        "audio": ModalitySettings("feature", "audio"),
        "frames": ModalitySettings("image", "frames", encoder="random:vit", max_images=4),
    }
    found = sample_items(Location.of(data), load_schema(Location.of(data)), modalities)

    assert found.feature_widths == {"audio": 5} and found.looked_at == found.num_items == 30
    assert found.lengths["audio"].tolist() == [3] * 30
    assert found.lengths["frames"].tolist() == [2, 0, 0, 4, *[1] * 26]
