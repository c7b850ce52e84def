"""The transformer: layers, rotary positions, losses in chunks, and generation from a cache."""

from lightsparse.models.cache import KVCache
from lightsparse.models.generation import Generation, generate
from lightsparse.models.rope import RopeConfig
from lightsparse.models.sampling import Sampling
from lightsparse.models.transformer import ModelConfig, ModelOutput, Transformer, context_for

__all__ = [
    "Generation",
    "KVCache",
    "ModelConfig",
    "ModelOutput",
    "RopeConfig",
    "Sampling",
    "Transformer",
    "context_for",
    "generate",
]
