"""The schema of conf/: what it refuses and in which words, what names a run, what a resumed run may change."""

import dataclasses
import os
import shutil
import typing
from collections import namedtuple

import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException

from lightsparse.config.compose import HANDED, compose_raw, conf_dir, explain, handed, handing
from lightsparse.config.parse import compose, parse
from lightsparse.config.run_identity import config_hash, differences
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data.files import FilesData
from lightsparse.data.prepare import prepare
from lightsparse.data.tokenizer import BPE
from lightsparse.kernels import compute_dtype
from lightsparse.models.transformer import Transformer
from lightsparse.training.preflight.check import check

CHOICES = [
    f"{group.name}={choice.stem}"
    for group in sorted(conf_dir().iterdir())
    if group.is_dir()
    for choice in sorted(group.glob("*.yaml"))
]
NEEDS = {
    "data=files": ["data.path=pyproject.toml"],
    "data=hub": ["data.name=some/text"],
    "data=prepared": ["data.path={made}"],
    "data=mixture": ["+data@data.sources.a=stdlib", "+data.weights={{a: 1}}"],
    "tokenizer=hf": ["tokenizer.path={made}"],
    "tokenizer=own": ["data=prepared", "data.path={made}"],
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder of prepared tokens with their tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "texts").mkdir()
    for i in range(4):
        (folder / "texts" / f"{i}.txt").write_text("text " * 9)
    data = FilesData(path=str(folder / "texts")).choose_tokenizer(BPE(vocab_size=300))
    prepare(data, folder / "out")
    return folder / "out"


def needs(choice, made):
    row = ["experiment=shootout_mqar"] if choice.startswith("shootout") else []  # the only recipe that has such rows
    return row + [word.format(made=made) for word in NEEDS.get(choice, [])]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_of_conf_composes_and_passes_the_check(choice, made):
    check(compose([choice, *needs(choice, made)]))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_of_conf_says_in_its_first_line_what_it_is_for(choice):
    group, name = choice.split("=")
    lines = (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert comment.startswith("# ") and comment.endswith(".")


def test_every_key_of_config_yaml_has_a_comment():
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    for line in text.split("\nname:")[1].split("\nhydra:")[0].splitlines()[1:]:
        if ":" in line and not line.endswith(":") and not line.startswith("#") and not line.startswith("allow_targets"):
            assert " # " in line, line


WRONG = {
    "atention=dense": "atention is not a key; did you mean attention?",
    "attention=nope": "attention is nope; conf/attention has ",
    "attention=densse": "; did you mean dense?",
    "+attention.windw=3": "attention.windw is not a key; did you mean attention.window?",
    "attention.windw=3": "attention.windw is not a key; did you mean attention.window?",
    "attention.topk=3": "attention.topk is not a key; did you mean attention.top_k? ",
    "attention.top_k=3": "attention.top_k is 3, which attention=sliding_window does not read; use attention=csa or ",
    "attention.xyzzy=3": "attention.xyzzy is not a key; attention has window, sinks, learned_sink, ",
    "trainr.max_steps=3": "trainr is not a key; did you mean trainer?",
    "model.rope.bse=3": "model.rope.bse is not a key; did you mean model.rope.base?",
    "optimizer.fused=true": "optimizer.fused is not a key; optimizer has lr, adamw_lr, ",
    "data.path=x": "data.path is x, which data=stdlib does not read; use data=files or prepared",
    "strategy.comm_hook=bf16": "strategy.comm_hook is bf16, which strategy=single does not read; use strategy=",
    "attention.window=abc": "attention.window is 'abc'; it must be an integer",
    "attention.window=0": "attention.window is 0;",
    "attention.window.deep=3": "attention.window is 1024, which has no keys; write attention.window=…",
    "attention.density=0": "attention.density is 0",
    "attention.density=1.5": "attention.density is 1.5;",
    "attention.density=0.0001": "density 0.0001 is out of reach",
    "attention.dropout=1": "attention.dropout is 1",
    "attention._target_=os.system": "attention._target_ is os.system; a config may name classes of",
    "attention._target_=torch.nn.Linear": "_target_ is torch.nn.Linear; it must be a subclass of AttentionCore",
    "attention=3": "Config group override must be a string or a list. Got int; write group=<name of a file",
    "model.heads=5": "model.embed_dim is 192 and model.heads 5; heads must divide embed_dim",
    "model.depth=0": "model.depth is 0;",
    "model.dpth=2": "model.dpth is not a key; did you mean model.depth?",
    "model.activation_checkpointing=disk": "is 'disk'; it must be true or false or offload",
    "model.activation_checkpointing=offload": "model.activation_checkpointing is offload and this run is on the CPU",
    "data.context=-1": "data.context is -1;",
    "data.batch_size=1.5": "data.batch_size is 1.5; it must be an integer",
    "trainer.max_steps=0": "trainer.max_steps is 0; it must be at least 1",
    "trainer.max_steps=many": "trainer.max_steps is 'many'; it must be an integer",
    "trainer.max_steps=true": "trainer.max_steps is true; it must be an integer",
    "trainer.grad_clip=0": "trainer.grad_clip is 0",
    "trainer.devices=2": "the job has 2 ranks (trainer.devices × trainer.num_nodes, or those of the launcher)",
    "trainer=3": "trainer is 3; it must be a group of keys: max_steps, max_time, accumulate",
    "optimizer.lr=fast": "optimizer.lr is 'fast'; it must be a number",
    "optimizer.lr=-1": "optimizer.lr is -1; it must be at least 0",
    "+optimizer.lrr=1": "optimizer.lrr is not a key; did you mean optimizer.lr?",
    "schedule.decay_share=2": "schedule.decay_share is 2",
    "strategy.kind=fsdp": "strategy.kind is not a key",
    "strategy=dpp": "strategy is dpp; conf/strategy has ",
    "precision=16": "precision is '16'; it must be one of 32, bf16-mixed, bf16-true",
    "seed=-1": "seed is -1;",
    "resume=yes": "resume is 'yes'; it must be one of auto, must, never",
    "mlm_ratio=1": "mlm_ratio is 1",
    "threads=0": "threads is 0;",
    "name=../elsewhere": "name is ../elsewhere; it names one directory",
    "eval.tokens=10": "eval.tokens is 10; it must hold one sample",
    "checkpoint.keep=0": "checkpoint.keep is 0;",
    "allow_targets=os": "allow_targets is 'os'; it must be a list",
    "+callbacks.x=3": "callbacks.x is 3; it must be a group of keys with a _target_",
    "+callbacks.x._target_=lightning.pytorch.os.system": "callbacks.x._target_ is lightning.pytorch.os.system;",
    "+callbacks.x={_target_:torch.nn.Linear}": "_target_ is torch.nn.Linear; it must be a subclass of Callback",
    "+logger.w={_target_:lightning.pytorch.loggers.CSVLogger,pefix:x}": "did you mean logger.w.prefix?",
    "~seed": "seed is missing from the config",
    "~attention": "attention is null; it must be a group of keys with a _target_",
    "name=${nowhere}": "name: Interpolation key 'nowhere' not found",
    "seed": "seed cannot be read as an override; write key=value",
    "attention.window=[1,2": "attention.window=[1,2 cannot be read as an override;",
    "seed=1,2": "seed=1,2 gives several values; add -m to run one after the other, or write 'seed=[1,2]'",
    "hydra.foo=1": "Could not override 'hydra.foo'",
    "optimizer.betas=[1]": "optimizer.betas is [1]; it must be a list of 2, each a number",
    "hydra/launcher=nope": "hydra/launcher is nope;",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_is_one_readable_sentence(override):
    base = ["attention=sliding_window"] if not override.lstrip("+~").startswith("attention=") else []
    with pytest.raises(ConfigError) as caught:
        check(compose([*base, override]))
    assert WRONG[override] in str(caught.value)
    assert "\n" not in str(caught.value) and "HYDRA_FULL_ERROR" not in str(caught.value)


def test_offload_is_accepted_on_a_gpu_and_refused_where_it_would_change_nothing_there(monkeypatch):
    words = ["attention=sliding_window", "precision=32", "model.activation_checkpointing=offload"]
    with pytest.raises(ConfigError, match=r"^compile is true and model\.activation_checkpointing is offload, "):
        compose([*words, "compile=true"])
    with pytest.raises(ConfigError, match=r"^model\.activation_checkpointing is offload and model\.depth is 1, "):
        compose([*words, "model.depth=1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(compose(words))


def test_a_missing_data_path_is_refused_with_its_name():
    with pytest.raises(ConfigError, match=r"^data.path is 'nowhere/at/all'"):
        compose(["data=files", "data.path=nowhere/at/all"])


def test_a_key_the_schema_knows_but_conf_lacks_is_refused_with_the_way_to_add_it():
    override = "callbacks.t={_target_:lightning.pytorch.callbacks.Timer}"
    with pytest.raises(ConfigError, match=r"^callbacks.t has no value in conf/ .* write \+callbacks.t=…"):
        compose([override])
    check(compose([f"+{override}"]))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("optimizer=adamw optimizer.fused=true", "optimizer.fused"),  # of a class of torch
        ("logger=wandb logger.wandb.tags=[a]", "logger.wandb.tags"),
        ("attention.pattern.strided={_target_:lightsparse.patterns.Strided,stride:4}", "attention.pattern.strided"),
        ("data=mixture +data@data.sources.a=stdlib +data.weights={a:1} data.sources.b=1", "data.sources.b"),
    ],
)
def test_what_conf_cannot_list_is_refused_with_the_way_to_add_it(words, key):
    with pytest.raises(ConfigError, match=rf"^{key} has no value in conf/ .*write \+{key}=…"):
        compose(words.split())


def lacking(cls, node, path=""):
    """Dotted keys of a dataclass and of those in it that the composed config does not list."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.metadata.get("key", True):
            continue
        if field.name not in node:
            yield f"{path}{field.name}"
        elif dataclasses.is_dataclass(kinds[field.name]) and "_target_" not in node[field.name]:
            yield from lacking(kinds[field.name], node[field.name], f"{path}{field.name}.")


def test_conf_lists_every_key_of_the_schema_so_that_what_it_does_not_list_is_none():
    assert list(lacking(Config, compose_raw([]))) == []


def test_the_second_of_two_unknown_keys_does_not_hide_the_first():
    with pytest.raises(ConfigError, match=r"^trainer.max_step is not a key; did you mean trainer.max_steps\?"):
        compose(["trainer.max_step=1", "modle=tiny"])


def test_a_run_whose_checkpoints_do_not_fit_on_the_disk_is_refused(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    words = ["name=run", "checkpoint.keep=3", "checkpoint.keep_best=false"]
    config = compose([f"runs_dir={tmp_path}/not/yet/there", *words])
    asked = []

    def disk_with(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(0, 0, free))

    disk_with(2**40)
    check(config)
    assert asked == [tmp_path]
    parameters = sum(p.numel() for p in Transformer(config.model, config.attention.build, vocab_size=256).parameters())
    one = 12 * parameters  # fp32 weights and two states
    disk_with(4 * one)
    check(config)
    disk_with(4 * one - 1)
    with pytest.raises(ConfigError, match=r"^runs_dir is .* GiB are free, .* checkpoint\.keep=3 take"):
        check(config)
    checkpoints = tmp_path / "not/yet/there/run/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-1.ckpt").touch()  # a resumed run: this much is on the disk already
    check(config)


def test_a_runs_dir_below_a_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"^runs_dir is .*, but .*notes\.txt is no folder; set runs_dir="):
        check(compose([f"runs_dir={tmp_path}/notes.txt"]))


def test_a_path_of_the_home_directory_is_one_without_a_shell_too(monkeypatch):
    words = ["runs_dir='~/runs'", "data.cache='~/text'"]
    monkeypatch.setenv("HOME", "/home/ada")
    config = compose(words)
    assert (config.runs_dir, config.data.cache) == ("/home/ada/runs", "/home/ada/text")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without one
    with pytest.raises(ConfigError, match=r"^data\.cache is ~/text, and this user has no home directory; "):
        compose(words)


def test_a_name_that_no_directory_can_have_is_refused():
    assert compose([f"name={'x' * 255}"]).name == "x" * 255
    with pytest.raises(ConfigError, match=r"^name has 256 bytes; a directory's name takes at most 255$"):
        compose([f"name='{'ä' * 128}'"])


def test_an_online_logger_without_a_key_is_refused_before_the_run(monkeypatch):
    words = ["logger=wandb", "logger.wandb.offline=false"]
    for has_key in (True, False):
        monkeypatch.setattr("wandb.login", lambda *, prompt, verify, has_key=has_key: has_key)
        if has_key:
            check(compose(words))
            continue
        with pytest.raises(ConfigError, match=r"^logger\.wandb is online, and wandb has no key of this user; run "):
            check(compose(words))
    check(compose(["logger=wandb"]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(compose(words))


def test_the_default_name_tells_attention_context_and_what_is_trained():
    plain = compose(["attention=dense", "data.context=512"])
    assert plain.name == f"dense-512-{config_hash(plain.composed)}"
    assert compose(["name=mine"]).name == "mine"


@pytest.mark.parametrize("faster", [False, True])
def test_a_precision_left_to_the_machine_is_what_it_multiplies_faster_and_the_run_keeps_it(monkeypatch, faster):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compute_dtype, "_multiplies_bf16_faster", lambda: faster)
    left, chosen, other = compose([]), *(("bf16-mixed", "32") if faster else ("32", "bf16-mixed"))
    assert left.precision == left.composed["precision"] == chosen
    given = compose([f"precision={chosen}"])
    assert differences(left.composed, given.composed) == [] and left.name == given.name
    assert compose([f"precision={other}"]).precision == other
    monkeypatch.setattr(compute_dtype, "_multiplies_bf16_faster", lambda: not faster)
    assert differences(left.composed, compose([]).composed) == [f"precision: {chosen} there, {other} here"]


SAME = [
    "trainer.max_steps=7",
    "trainer.progress=false",
    "trainer.log_every_n_steps=1",
    "resume=never",
    "name=x",
    "threads=1",
    "runs_dir=elsewhere",
    "checkpoint.every_n_steps=3",
    "checkpoint.keep=9",
    "eval.every_n_steps=3",
    "logger=wandb",
    "+callbacks.t={_target_:lightning.pytorch.callbacks.Timer}",
]
OTHER = [
    "seed=1",
    "precision=bf16-true",
    "attention=dense",
    "attention.density=0.5",
    "data.batch_size=2",
    "optimizer.lr=1",
    "schedule=cosine",
    "model=tiny",
    "trainer.accumulate_grad_batches=2",
    "eval.tokens=8192",
]


@pytest.mark.parametrize("override", SAME)
def test_how_long_and_how_watched_does_not_change_the_run(override):
    before, now = compose_raw([]), compose_raw([override])
    assert config_hash(before) == config_hash(now) and differences(before, now) == []
    assert before != now


@pytest.mark.parametrize("override", OTHER)
def test_what_is_trained_names_another_run(override):
    before, now = compose_raw([]), compose_raw([override])
    assert config_hash(before) != config_hash(now) and differences(before, now)


def test_differences_name_each_key_with_both_values(tmp_path):
    before = compose_raw(["attention=sliding_window", "attention.window=256"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before), encoding="utf-8")
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    now = compose_raw(["attention=sliding_window", "attention.window=128", "seed=3", "trainer.max_steps=9"])
    assert differences(stored, now) == ["attention.window: 256 there, 128 here", "seed: 0 there, 3 here"]
    del stored["data"]["pack"]
    assert "data.pack: absent there, concat here" in differences(stored, now)


def test_a_stored_config_parses_to_the_same_run():
    raw = compose_raw([])
    assert parse(yaml.safe_load(yaml.safe_dump(raw))) == parse(raw)


def test_a_config_keeps_what_it_was_made_from_beside_its_keys():
    raw = compose_raw(["seed=3", "precision=bf16-mixed"])
    assert parse(raw).composed == raw
    with pytest.raises(ConfigError, match=r"^composed is not a key"):
        parse(raw | {"composed": raw})


def test_sweeps_do_not_hide_a_misspelt_key():
    error = ConfigCompositionException("Could not override 'sed'.\nTo append to your config use +sed=1,2")
    assert explain(error, ["attention=dense,sliding_window", "sed=1,2"]) == "sed is not a key; did you mean seed?"


def test_a_handed_config_is_the_composed_one_once(monkeypatch):
    words = [
        "name=\\${x}",
        "+callbacks.a={_target_: b, steps: {0: 4}, rate: 1e-3, text: '1e3', yes: 'yes', none: null}",
    ]
    composed = compose_raw([*words, "seed=3", "attention=moba"])
    assert composed["name"] == "${x}" and composed["callbacks"]["a"]["steps"] == {0: 4}
    for name, text in handing(composed).items():
        monkeypatch.setenv(name, text)
    assert HANDED in os.environ and handed() == composed
    assert HANDED not in os.environ and handed() is None
    with pytest.raises(ConfigError, match="name files by a pattern"):
        handing({"paths": ["x" * 100] * 2000})
