"""What tests of native kernels share."""

from collections.abc import Iterator

import pytest
import torch

from recsys.kernels import has_native


@pytest.fixture
def native_kernels() -> Iterator[None]:
    """Skip where no C++ compiler is; afterwards the number of threads is as before."""
    if not has_native(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    old_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(old_threads)
