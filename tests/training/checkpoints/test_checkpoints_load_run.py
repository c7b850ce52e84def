"""A run opened again is the model that was saved."""

import pytest
import torch
from omegaconf import OmegaConf

from lightsparse.config.targets import ConfigError
from lightsparse.data import ByteTokenizer
from lightsparse.models import context_for
from lightsparse.training.checkpoints.load_run import load_run, stored_config
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.module import language_model

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tiny, tmp_path):
    """A run directory with checkpoints of steps 5 and 10, and the logits that each step's model gives for TOKENS."""
    config = tiny("attention=adaptive", "attention.block=16")
    directory, logits = RunDirectory(tmp_path / "run"), {}
    directory.checkpoints.mkdir(parents=True)
    OmegaConf.save(config.composed, directory.config)
    for step in (5, 10):
        torch.manual_seed(step)
        module = language_model(config, ByteTokenizer()).eval()
        torch.save({"state_dict": module.state_dict()}, directory.checkpoints / f"step-{step}.ckpt")
        with torch.no_grad():
            logits[step] = module.model.logits(module.model(TOKENS, context_for(TOKENS)).hidden)
    return directory, logits


@pytest.mark.parametrize("step", [None, 5])
def test_a_loaded_run_computes_what_the_saved_model_computed(saved, step):
    directory, logits = saved
    run = load_run(directory.path, step)
    assert run.step == (step or 10) and not run.model.training
    with torch.no_grad():
        found = run.model.logits(run.model(TOKENS, context_for(TOKENS)).hidden)
    assert torch.equal(found, logits[run.step])
    assert run.tokenizer.decode(run.tokenizer.encode("né")) == "né"


def test_a_damaged_newest_checkpoint_is_passed_over_but_not_one_that_was_asked_for(saved):
    directory, _ = saved
    file = directory.checkpoints / "step-10.ckpt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert load_run(directory.path).step == 5
    with pytest.raises(ConfigError, match=r"step is 10, but .* is damaged"):
        load_run(directory.path, 10)


def test_what_is_missing_is_named(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(ConfigError, match="there is no config"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"step is 7; .* steps 5, 10"):
        load_run(directory.path, 7)
    for file in directory.checkpoints.iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        load_run(str(directory.path))


def test_the_config_is_the_one_that_was_trained(saved, tiny):
    config = tiny("attention=adaptive", "attention.block=16")
    assert stored_config(saved[0].path) == config
