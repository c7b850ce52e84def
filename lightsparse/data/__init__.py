"""Samples in, resumable batches out. Stands alone: nothing here knows models, attention or training.

A source is a frozen DataConfig (source.py) that makes two sets of samples. Those of text (`stdlib`, `files`, `hub`) are
TextConfigs: they yield Documents, `corpus` tokenizes and splits them, `packing` cuts the token streams into samples.
`sampler` orders the samples, `module` hands batches to Lightning.
A new source is one file here and one YAML in conf/data/ whose `_target_` names its DataConfig.
"""

from lightsparse.data.documents import Document
from lightsparse.data.source import DataConfig, DataError
from lightsparse.data.text import TextConfig
from lightsparse.data.tokenizer import TokenizerConfig
from lightsparse.data.tokens import ByteTokenizer, Tokenizer

__all__ = ["ByteTokenizer", "DataConfig", "DataError", "Document", "TextConfig", "Tokenizer", "TokenizerConfig"]
