"""Synthetic long-range tasks as data: recall, copying, needles, tracking, counting, in symbols or in text.

`task` is what they share, `draws` their randomness, `symbols` their vocabulary. Each other file is one task (or one
family): a frozen TaskConfig whose `example` is a pure function of its draws.
A new task is one file here and one YAML in conf/data/ whose `_target_` names its TaskConfig.
"""

from lightsparse.data.tasks.task import Example, TaskConfig, TaskSamples

__all__ = ["Example", "TaskConfig", "TaskSamples"]
