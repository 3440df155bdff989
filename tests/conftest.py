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


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes in NumPy, which warns where a GPU silently makes inf or NaN. Tests of overflows and NaN
    # are to do that; and it warns of integers by other words ("in scalar add"), which are not ignored.
    config.addinivalue_line(
        "filterwarnings",
        r"ignore:(overflow|invalid value) encountered in (add|subtract|multiply|cast):RuntimeWarning:"
        r"triton\.runtime\.interpreter",
    )


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run here, or those of the backend that the test is parametrised with."""
    from latent_ops import device_for  # not before the interpreter is chosen

    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return device_for(parameters.get("backend"))


@pytest.fixture
def poisoned_memory():
    """PyTorch hands out memory full of NaN, so an element that nobody writes cannot pass for a result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
