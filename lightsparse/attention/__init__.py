"""What a model plugs in: one module per variant, one file each."""

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape, SequenceContext

__all__ = ["AttentionConfig", "AttentionCore", "AttentionResult", "AttentionShape", "SequenceContext"]
