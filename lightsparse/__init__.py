"""lightsparse: train long-context transformers with exact sparse attention."""

__version__ = "0.1.0"
