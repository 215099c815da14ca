"""Nothing that comes with data, items or encoders is run: no pickle, no code, no interpreter."""

import ast
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from recsys.config import load_config
from recsys.content.encoders.pretrained import PretrainedEncoder, tiny_model, tiny_tokenizer
from recsys.data.items.images import decode_image
from recsys.data.items.ragged_array import RaggedArray, RaggedWriter
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[2]


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that exists once something was run."""
    trace = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()
    trace.unlink()
    return trace


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    tiny_model("random:bert", "").save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_pickled_weights_are_refused(encoder: Path, trace: Path) -> None:
    torch.save({"weight": Payload(trace)}, encoder / "pytorch_model.bin")
    PretrainedEncoder(str(encoder), None, "text").load_model()  # safetensors lie beside it
    (encoder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors only"):
        PretrainedEncoder(str(encoder), None, "text").load_model()
    assert not trace.exists()


def test_pickled_adapters_are_refused(encoder: Path, trace: Path) -> None:
    torch.save({"weight": Payload(trace)}, encoder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(encoder)}
    (encoder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="peft adapter"):
        PretrainedEncoder(str(encoder), None, "text").load_model()
    assert not trace.exists()


@pytest.mark.parametrize("file", ["model", "tokenizer"])
def test_code_of_an_encoder_is_not_run_even_by_someone_who_would_agree(
    encoder: Path, trace: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (encoder / "code.py").write_text(f"open({str(trace)!r}, 'w')\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    change(encoder / "config.json", model_type="own", auto_map=auto_map)
    with pytest.raises(ValueError, match="its repository"):
        pretrained = PretrainedEncoder(str(encoder), None, "text")
        pretrained.load_model() if file == "model" else pretrained.tokenizer
    assert not trace.exists()


def test_a_kernel_that_an_encoder_names_is_not_loaded(encoder: Path) -> None:
    change(encoder / "config.json", attn_implementation="someone/kernel")
    model: Any = PretrainedEncoder(str(encoder), None, "text").load_model()
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_with_pickled_objects_is_refused(tmp_path: Path, trace: Path) -> None:
    with closing(RaggedWriter(tmp_path, (), "int64")) as writer:
        writer.add(np.array([1]), np.array([7]))
    objects = np.array([Payload(trace)])
    for name in ("offsets.npy", "values.npy"):
        good = (tmp_path / name).read_bytes()
        np.save(tmp_path / name, objects, allow_pickle=True)
        with pytest.raises(ValueError, match=f"{tmp_path}: damaged"):
            RaggedArray(tmp_path)
        (tmp_path / name).write_bytes(good)
    assert RaggedArray(tmp_path).lengths.tolist() == [1]
    assert not trace.exists()


def test_a_schema_with_python_objects_is_refused(tmp_path: Path, trace: Path) -> None:
    text = f"!!python/object/apply:os.mkdir [{trace}]"
    yaml.unsafe_load(text)
    trace.rmdir()  # it would have run
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(ValueError, match="the tag"):
        load_schema(Location.of(tmp_path))
    assert not trace.exists()


def test_a_class_that_a_schema_or_a_configuration_names_is_not_imported(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_of_a_stranger.py").write_text(f"open({str(trace)!r}, 'w')\n")
    data = write_dataset(tmp_path / "data", {})
    schema = data / "schema.yaml"
    text = "{class_path: module_of_a_stranger.Column}"
    schema.write_text(schema.read_text().replace("{kind: dense}", text))
    with pytest.raises(ValueError, match="'class_path' "):
        load_schema(Location.of(data))
    (tmp_path / "config.yaml").write_text(f"embedding: {text}")
    with pytest.raises(ValueError, match="'class_path' "):
        load_config(tmp_path / "config.yaml")
    assert not trace.exists()


def test_a_python_type_in_a_parquet_file_is_not_unpickled(tmp_path: Path, trace: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": 4})
    file = data / "train" / "part-1.parquet"
    rows = pq.read_table(file)
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(trace)),
    }
    fields = [
        field.with_metadata(extension) if field.name == "user" else field for field in rows.schema
    ]
    pq.write_table(pa.Table.from_arrays(rows.columns, schema=pa.schema(fields)), file)
    root = Location.of(data)
    split = ParquetRows.of_split(root, "train", load_schema(root))
    assert sum(table.num_rows for table in split.read(0, 4)) == 4
    assert not trace.exists()


def test_an_image_in_postscript_is_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    interpreter: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", interpreter.append)
    with pytest.raises(ValueError, match="known format"):
        decode_image(program, 8)
    assert not interpreter


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """File, function and constant keyword arguments of every call in the product."""
    for folder in ("embeddings", "recsys", "launch"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    arguments = {
                        keyword.arg: keyword.value.value
                        for keyword in node.keywords
                        if keyword.arg is not None and isinstance(keyword.value, ast.Constant)
                    }
                    yield str(file.relative_to(ROOT)), ast.unparse(node.func), arguments


def test_every_loader_in_the_code_is_a_restricted_one() -> None:
    required = {
        "torch.load": {"weights_only": True},
        "AutoConfig.from_pretrained": {"trust_remote_code": False},
        "AutoTokenizer.from_pretrained": {"trust_remote_code": False},
        "loader.from_pretrained": {"trust_remote_code": False, "use_safetensors": True},
    }
    forbidden = ("pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load", "os.system")
    kinds = set()
    for file, function, arguments in calls():
        assert function not in forbidden, file
        assert not arguments.get("allow_pickle"), file
        assert not arguments.get("shell"), file
        if function in required:
            assert required[function].items() <= arguments.items(), (file, function)
            kinds.add(function)
    assert kinds == required.keys()
