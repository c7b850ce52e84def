"""Activation of newer flash kernels, with a stand-in for the package, the GPU and PyTorch's list of kernels."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import _registry, register_flash_attention_impl

from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.kernels import block_sparse_attention, flash, sdpa
from lightsparse.patterns import LocalWindow
from lightsparse.training.run import set_machine


class Handle:
    removed = False

    def remove(self) -> None:
        self.removed = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Handle]]]:
    """A GPU of some compute capability with some flash packages installed; returns what PyTorch activates, by name."""
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", dict(_registry._FLASH_ATTENTION_IMPLS))

    def install(major: int, *modules: str, broken: tuple[str, ...] = ()) -> dict[str, Handle]:
        handles: dict[str, Handle] = {}

        def register(name: str) -> Callable[[], Handle]:
            def activate() -> Handle:
                if name in broken:
                    raise ImportError(f"libcudart of {name} is missing\nand more lines")
                handles[name] = Handle()
                return handles[name]

            return activate

        for kernel in flash.KERNELS.values():
            register_flash_attention_impl(kernel.name, register_fn=register(kernel.name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        monkeypatch.setattr(flash, "_is_installed", lambda module: module in modules)
        return handles

    yield install
    flash.activate("none")


FA3, FA4 = flash.KERNELS["fa3"].module, flash.KERNELS["fa4"].module


@pytest.mark.parametrize(
    ("major", "modules", "expected", "why"),
    [
        (9, [FA3, FA4], "FA3", "chosen by kernels.flash=auto"),
        (9, [FA4], "FA4", "chosen by kernels.flash=auto"),
        (10, [FA3, FA4], "FA4", "chosen by kernels.flash=auto"),
        (9, [], None, f"FA3 needs the Python module {FA3}, which is not installed"),
        (8, [FA3, FA4], None, "FA3 needs a GPU of compute capability 9.x and this one has 8.0"),
    ],
)
def test_auto_takes_the_first_kernel_that_gpu_and_packages_allow_and_says_why(gpu, major, modules, expected, why):
    handles = gpu(major, *modules)
    line = flash.activate("auto")
    assert torch.nn.attention.current_flash_attention_impl() == expected
    assert list(handles) == ([expected] if expected else [])
    assert line == flash.describe() and why in line and (expected or "those of PyTorch") in line


def test_a_package_that_does_not_load_is_passed_over_by_auto_and_an_error_by_name(gpu):
    gpu(9, FA3, FA4, broken=("FA3",))
    assert flash.activate("auto").startswith("flash kernels: FA4")
    with pytest.raises(
        ValueError, match=r"^kernels\.flash is fa3; FA3 is installed and does not load: libcudart of FA3"
    ):
        flash.activate("fa3")


def test_none_gives_pytorch_its_own_kernels_back(gpu):
    handles = gpu(9, FA3)
    flash.activate("fa3")
    assert flash.activate("none") == "flash kernels: those of PyTorch (chosen by kernels.flash=none)"
    assert handles["FA3"].removed and torch.nn.attention.current_flash_attention_impl() is None


def test_a_kernel_that_pytorch_does_not_list_is_refused(gpu):
    gpu(9, FA3)
    del _registry._FLASH_ATTENTION_IMPLS["FA3"]
    with pytest.raises(
        ValueError, match=r"PyTorch \S+ does not list FA3 \(it lists FA4\); use kernels\.flash=auto or none"
    ):
        flash.activate("fa3")


def test_pytorch_lists_the_kernels_that_the_config_names():
    assert {kernel.name for kernel in flash.KERNELS.values()} <= set(torch.nn.attention.list_flash_attention_impls())


def test_the_choice_is_one_line_of_the_log(gpu, caplog):
    gpu(9, FA3)
    with caplog.at_level(logging.INFO, logger="lightsparse"):
        flash.activate("auto")
    assert [record.getMessage() for record in caplog.records] == ["flash kernels: FA3 (chosen by kernels.flash=auto)"]


def test_without_cuda_auto_has_nothing_to_do_and_a_name_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="lightsparse"):
        assert flash.activate("auto") == "flash kernels: those of PyTorch (FA3 and FA4 need CUDA)"
    assert not caplog.records
    with pytest.raises(
        ConfigError, match=r"^kernels\.flash is fa4; FA4 runs on CUDA only and there is no CUDA device here"
    ):
        set_machine(compose(["kernels.flash=fa4", "threads=1", "matmul_precision=highest"]))


def test_a_name_the_config_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"kernels\.flash is 'fa2'; choose auto, fa3, fa4, none"):
        flash.activate("fa2")


def test_modules_are_found_without_being_imported():
    assert flash._is_installed("torch.nn.attention")
    assert not flash._is_installed("no_such_package.inside.it")


def test_a_layout_is_looked_at_once_to_know_whether_it_is_dense(monkeypatch):
    layout = LocalWindow(64).layout(64, block=16)
    seen = []
    monkeypatch.setattr(sdpa, "_is_dense", lambda layout: seen.append(layout) or True)
    q = torch.randn(1, 2, 64, 8)
    for _ in range(3):
        block_sparse_attention(q, q, q, layout)
    assert seen == [layout]
