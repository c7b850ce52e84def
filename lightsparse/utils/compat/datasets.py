"""datasets (5): undocumented names that we touch."""

from __future__ import annotations

READERS_LOGGER = "datasets.packaged_modules"  # of all readers of files: at ERROR they say what they raise, too


def is_offline() -> bool:
    """Whether `load_dataset` keeps off the network, by either of its variables; huggingface_hub knows one of them."""
    import datasets.config

    return datasets.config.HF_HUB_OFFLINE
