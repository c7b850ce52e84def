"""Samples in, resumable batches out. Stands alone: nothing here knows models, attention or training.

A source is a frozen DataConfig (source.py) that makes two sets of samples. Those of text (`stdlib`, `files`, `hub`)
are TextConfigs: they yield Documents, `encoding` cuts them into pieces and tokenizes those (`tokens`, `subwords`,
`tokenizer`), in memory or into `shards`, `corpus` splits them, `packing` and `packing_plan` make samples of the two
streams. `prepared` begins at the shards, `mixture` mixes the samples of others. `sampler` orders the samples,
`module` hands batches to Lightning.
A new source is one file here and one YAML in conf/data/ whose `_target_` names its DataConfig.
"""

from lightsparse.data.documents import Document
from lightsparse.data.source import DataConfig, DataError
from lightsparse.data.text import TextConfig
from lightsparse.data.tokenizer import TokenizerConfig
from lightsparse.data.tokens import ByteTokenizer, Tokenizer

__all__ = ["ByteTokenizer", "DataConfig", "DataError", "Document", "TextConfig", "Tokenizer", "TokenizerConfig"]
