"""`init_from`: a run that starts from the weights of a transformers model, with any attention.

The form of the model stays in the config, where it can be read without the folder: a run that resumes, and a run that
is looked at, need only their own directory.
"""

from __future__ import annotations

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.models.transformer import Transformer


def check_start(config: Config, vocab_size: int) -> None:
    """Raises ConfigError where the folder's weights do not fit config.model or the tokenizer of the data."""
    folder = config.init_from
    assert folder is not None
    try:
        from lightsparse import hf  # not at the top: transformers is an extra, and takes seconds
    except ImportError as error:
        raise ConfigError(f"init_from is {folder}, which needs {error.name}; pip install 'lightsparse[hf]'") from error
    source = hf.described(folder)
    words = hf.differences(config.model, source.model)
    if words:
        raise ConfigError(f"init_from is {folder}, whose model differs from `model`; add {' '.join(words)}")
    if source.vocab_size != vocab_size:
        raise ConfigError(
            f"init_from is {folder}, with embeddings of {source.vocab_size} tokens, and the data's tokenizer has "
            f"{vocab_size}; use the model's own, and "
            "tokenizer.vocab_size where the model has more rows than that has ids"
        )


def load_start(config: Config, model: Transformer) -> str:
    """Puts the folder's weights into a freshly drawn model; returns the line that says so. Raises ConfigError."""
    from lightsparse import hf

    folder = config.init_from
    assert folder is not None
    source, fresh = hf.described(folder), hf.load_weights(model, folder)
    parts = [f"weights  {folder}", source.architecture]
    if source.model.rope != config.model.rope:
        parts.append(f"positions stretched: {config.model.rope.scaling}, factor {config.model.rope.factor:g}")
    if fresh:
        parts.append(f"{len(fresh)} of the attention's own ({fresh[0].partition('.core.')[2]} …) start fresh")
    return " · ".join(parts)
