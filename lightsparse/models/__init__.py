"""The transformer: layers, rotary positions, losses in chunks, and generation from a cache."""

from lightsparse.models.cache import KVCache
from lightsparse.models.generation import generate
from lightsparse.models.rope import RopeConfig
from lightsparse.models.transformer import ModelConfig, ModelOutput, Transformer, context_for

__all__ = ["KVCache", "ModelConfig", "ModelOutput", "RopeConfig", "Transformer", "context_for", "generate"]
