import shutil
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(params=["blocked", "native", "per_query"])
def backend(request) -> str:
    """The backends that serve any layout (`per_query` in the form that kernel_cases.fitting gives it)."""
    return request.param


@pytest.fixture
def threads():
    """Sets PyTorch's thread count for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["g++", "clang++"])
def compiler(request) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def watched() -> Callable[[Callable[[], object]], tuple[int, list]]:
    """watched(function): entries of the largest memory behind any tensor that function() makes or views, the backward
    and the inside of our operators included, and the calls of our operators, as (operator, arguments).
    """

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.largest, self.ours = 0, []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "lightsparse":
                self.ours.append((function, args))
                with self:  # straight to the kernel, so that what it calls comes by here too
                    result = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
            else:
                result = function(*args, **(kwargs or {}))
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.largest = max([self.largest, *(x.untyped_storage().nbytes() // x.element_size() for x in leaves)])
            return result

    def measure(function: Callable[[], object]) -> tuple[int, list]:
        with Watch() as watch:
            function()
        return watch.largest, watch.ours

    return measure
