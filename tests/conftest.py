"""Without a CUDA device the Triton kernels run under Triton's interpreter, on the CPU."""

import os
import sys

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton looks at the variable when a kernel is defined, its own library included.
    assert "triton" not in sys.modules, "triton was imported before the tests could switch to its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
