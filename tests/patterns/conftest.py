from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture
def largest_tensor() -> Callable[[Callable[[], object]], int]:
    """largest_tensor(function): entries of the largest memory behind any tensor that function() makes or views."""

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            made = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in leaves]
            self.largest = max([self.largest, *made])
            return result

    def measure(function: Callable[[], object]) -> int:
        with Watch() as watch:
            function()
        return watch.largest

    return measure
