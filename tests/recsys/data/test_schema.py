"""What schema.yaml may say, and what it is told when it says something else."""

from pathlib import Path

import pytest
from torch import nn

from recsys.data.schema import Schema, load_schema
from recsys.data.schema_columns import MODULE_ATTRIBUTES
from recsys.storage.location import Location

VALID = """\
target_item: item
group: user
columns:
  user: {kind: id, num_embeddings: 10}
  item: {kind: id, num_embeddings: 30}
  history: {kind: sequence, shares: item, parallel: [history_liked]}
  liked: {kind: label}
"""


def load(folder: Path, text: str) -> Schema:
    (folder / "schema.yaml").write_text(text)
    return load_schema(Location.of(folder))


def test_an_empty_list_or_mapping_may_be_left_open(tmp_path: Path) -> None:
    text = VALID.replace("[history_liked]", "") + "items:\n  id: item\n  columns:\n"
    schema = load(tmp_path, text)
    assert schema.parallel == []
    assert schema.items is not None and schema.items.columns == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shares: item,", "num_embeddings: 30,", "'history'.*`shares: item`"),
        ("kind: id, num_embeddings: 30", "kind: id, shares: user", "'item' .*num_embeddings"),
        (
            "num_embeddings: 10",
            "num_embeddings: 10, vocabulary: {kind: hash, num_hashes: 65}",
            "column 'user': num_hashes is 65",
        ),
        ("num_embeddings: 10", "num_embeddings: 1, vocabulary: {kind: exact}", "'user'.* is 1"),
        ("shares: item,", "shares: item, vocabulary: {kind: hash},", "shares 'item' .*vocabulary"),
        ("num_embeddings: 10", "num_embeddings: 10, parallel: [x]", "'user': .*parallel lists"),
        ("[history_liked]", "[liked]", "'liked' of kind"),
        ("[history_liked]", "[gap, gap]", "parallel list 'gap'"),
        ("[history_liked]", "[__row_position]", "'__row_position'.*rename"),
        ("  user:", "  type: {kind: id, num_embeddings: 3}\n  user:", "'type'.*torch.*'type_id'"),
        ("  user:", "  a.b: {kind: ids, num_embeddings: 3}\n  user:", "'a.b'.*dot"),
        (VALID, "", "a mapping"),
        ("  liked:", "  no:", "line .: key no .*bool"),
        ("num_embeddings: 10", f"num_embeddings: {2**70}", f"'user': num_embeddings is {2**70}"),
    ],
)
def test_what_does_not_fit_is_named_with_the_file(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in VALID
    load(tmp_path, VALID)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, VALID.replace(old, new))
    assert str(raised.value).startswith(f"{tmp_path}/schema.yaml: ")


def test_all_public_attributes_of_the_module_that_keeps_tables_are_known() -> None:
    public = {name for name in dir(nn.ModuleDict()) if not name.startswith("_")}
    assert public - MODULE_ATTRIBUTES == set()
