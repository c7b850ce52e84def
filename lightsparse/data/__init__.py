"""Text in, packed and resumable batches out. Stands alone: nothing here knows models, attention or training.

A source (`stdlib`, `files`, `hub`) is a frozen DataConfig that yields Documents. `corpus` tokenizes and splits them,
`packing` cuts the token streams into samples, `sampler` orders the samples, `module` hands batches to Lightning.
A new source is one file here and one YAML in conf/data/ whose `_target_` names its DataConfig.
"""

from lightsparse.data.documents import DataConfig, DataError, Document
from lightsparse.data.tokens import ByteTokenizer

__all__ = ["ByteTokenizer", "DataConfig", "DataError", "Document"]
