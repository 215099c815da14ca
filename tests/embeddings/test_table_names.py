"""Names that no table can have are known without torch."""

import pytest
from torch import nn

from embeddings.table_names import ATTRIBUTES, name_problem


def test_all_public_attributes_of_the_module_that_keeps_tables_are_known() -> None:
    public = {name for name in dir(nn.ModuleDict()) if not name.startswith("_")}
    assert public - ATTRIBUTES == set()


@pytest.mark.parametrize("name", ["type", "items", "a.b", ""])
def test_a_name_that_no_table_can_have_is_told(name: str) -> None:
    assert f"'{name}'" in (name_problem(name) or "")
    assert name_problem("city") is None
