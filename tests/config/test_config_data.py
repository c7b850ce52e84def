"""conf/data/*.yaml against the dataclasses they are the schema of."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from lightsparse.data.tasks import TaskConfig

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_yaml_lists_every_field_but_the_tokenizer_and_says_what_it_is_for(path):
    node = OmegaConf.load(path)
    node.pop("defaults", None)
    config = OmegaConf.to_container(node)
    schema = get_class(config.pop("_target_"))
    defaults = {field.name: {} if field.default is MISSING else field.default for field in fields(schema)}
    defaults.pop("tokenizer", None)  # chosen beside the data
    assert config.keys() == defaults.keys()
    if not issubclass(schema, TaskConfig):  # several tasks share a class
        assert config == defaults
    assert path.read_text().startswith("# ")
