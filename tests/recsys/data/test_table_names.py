"""Names that no table can have are known without torch."""

import pytest
from torch import nn

from recsys.data.schema_columns import MODULE_ATTRIBUTES, table_name_problem


def test_all_public_attributes_of_the_module_that_keeps_tables_are_known() -> None:
    public = {name for name in dir(nn.ModuleDict()) if not name.startswith("_")}
    assert public - MODULE_ATTRIBUTES == set()


@pytest.mark.parametrize("name", ["type", "items", "a.b", ""])
def test_a_name_that_no_table_can_have_is_told(name: str) -> None:
    assert table_name_problem(name) is not None
    assert table_name_problem("city") is None
