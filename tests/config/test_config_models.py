from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightsparse.models import ModelConfig, RopeConfig

CONF = Path(__file__).parents[2] / "conf"


def composed(name: str) -> dict:
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_container(compose(f"model/{name}").model)


@pytest.mark.parametrize(("name", "depth"), [("pico", 3), ("nano", 4), ("tiny", 6), ("small", 12), ("base", 24)])
def test_each_size_names_every_field_and_only_the_depth_sets_its_widths(name, depth):
    node = composed(name)
    assert list(node) == [field.name for field in fields(ModelConfig)]
    assert list(node["rope"]) == [field.name for field in fields(RopeConfig)]
    config = ModelConfig(**(node | {"rope": RopeConfig(**node["rope"])}))
    assert config.depth == depth
    assert config.widths == ModelConfig(depth=depth).widths
    assert (CONF / "model" / f"{name}.yaml").read_text().startswith("# ")
