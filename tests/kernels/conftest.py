"""Where kernels that are launched by hand run: on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of this machine that kernels run on: nothing interprets them where there is a GPU."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU of this machine: it interprets nothing")
    return request.param
