"""`lightsparse generate` on a run directory with a model that was never trained: what it writes is a matter
of its weights, not of its quality."""

import pytest
import torch
from omegaconf import OmegaConf

from lightsparse.cli.generate import Options, main
from lightsparse.cli.words import options
from lightsparse.config.compose import compose_raw, conf_dir
from lightsparse.config.parse import parse as parse_config
from lightsparse.data import ByteTokenizer
from lightsparse.models import context_for
from lightsparse.training.module import language_model

TOKENIZER = ByteTokenizer()
VARIANTS = sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml"))


def saved(folder, *more):
    """A run directory with the checkpoints of steps 5 and 10, and the module of step 10."""
    window = ("attention=sliding_window", "attention.window=16", "attention.block=8")
    raw = compose_raw(
        [
            *(() if any(word.startswith("attention=") for word in more) else window),
            *("model=nano", "model.depth=1"),
            *("model.embed_dim=32", "model.heads=2", "model.head_dim=16", "data=stdlib", *more),
        ]
    )
    config = parse_config(raw)
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(raw, folder / "config.yaml")
    for step in (5, 10):
        torch.manual_seed(step)
        module = language_model(config, TOKENIZER).eval()
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.mul_(8 if parameter.dim() > 1 else 1)
            module.model.head_weight[128:] = 0  # text of ASCII characters
        torch.save({"state_dict": module.state_dict()}, folder / "checkpoints" / f"step-{step}.ckpt")
    return module


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run", saved(tmp_path / "run")


def said(capsys, *words) -> tuple[str, str]:
    assert main(words) == 0
    found = capsys.readouterr()
    return found.out, found.err


def test_greedy_text_is_the_likeliest_one_of_the_newest_checkpoint(run, capsys):
    folder, module = run
    out, about = said(capsys, f"run={folder}", "prompt=def main(", "temperature=0", "max_new_tokens=30")
    assert out.startswith("def main(") and out.endswith("\n") and "step 10 · sliding_window" in about
    tokens = torch.tensor([[TOKENIZER.bos, *TOKENIZER.encode(out[:-1])]])
    with torch.no_grad():
        likeliest = module.model.logits(module.model(tokens, context_for(tokens)).hidden)[0].argmax(-1)
    assert torch.equal(likeliest[9:-1], tokens[0, 10:]) and tokens.shape[1] == 1 + 9 + 30


@pytest.mark.parametrize("attention", VARIANTS)
def test_every_attention_writes_what_is_likeliest_after_all_before_it(attention, tmp_path, capsys):
    module = saved(tmp_path / "run", f"attention={attention}", "data.context=128")
    words = (f"run={tmp_path / 'run'}", "prompt=def main(", "temperature=0", "max_new_tokens=30")
    out, about = said(capsys, *words)
    assert f"step 10 · {attention}" in about
    tokens = torch.tensor([[TOKENIZER.bos, *TOKENIZER.encode(out[:-1])]])
    with torch.no_grad():
        likeliest = module.model.logits(module.model(tokens, context_for(tokens)).hidden)[0].argmax(-1)
    assert torch.equal(likeliest[9:-1], tokens[0, 10:]) and tokens.shape[1] == 1 + 9 + 30


def test_the_seed_and_the_step_decide_what_is_written(run, capsys):
    words = (f"run={run[0]}", "prompt=a", "max_new_tokens=40")
    first = said(capsys, *words, "seed=1")[0]
    assert first == said(capsys, *words, "seed=1")[0]
    assert first != said(capsys, *words, "seed=2")[0]
    older, about = said(capsys, *words, "seed=1", "step=5")
    assert older != first and "step 5" in about


def test_several_prompts_are_written_one_after_the_other_and_end_before_a_stop(run, capsys):
    words = ("temperature=0", "max_new_tokens=20")
    texts = [said(capsys, f"run={run[0]}", f"prompt={prompt}", *words)[0] for prompt in ("abc", "[x = 1]")]
    both = said(capsys, f"run={run[0]}", 'prompts=["abc", "[x = 1]"]', *words)[0]
    assert both == f"════ 1 ════\n{texts[0]}════ 2 ════\n{texts[1]}"
    stop = texts[0][6:8]
    assert said(capsys, f"run={run[0]}", "prompt=abc", f"stop={stop}", *words)[0] == (
        "abc" + texts[0][3:-1].partition(stop)[0] + "\n"
    )


def test_more_than_the_training_context_is_said_and_written(tmp_path, capsys):
    saved(tmp_path / "run", "data.context=64")
    out, about = said(capsys, f"run={tmp_path / 'run'}", "prompt=ab", "max_new_tokens=80")
    assert "83 tokens" in about and "data.context=64" in about and len(out) == 83


def test_a_prompt_is_taken_literally_and_other_values_are_yaml():
    asked = options(Options, ["run=a b", "prompt=[1] = ${x}\\n: 'y'", "top_k=null"])
    assert (asked.run, asked.prompt, asked.top_k) == ("a b", "[1] = ${x}\\n: 'y'", None)
    asked = options(Options, ["run=r", 'stop=["\\n\\n", "a, b"]', "top_p=1e-3"])
    assert asked == Options("r", stop=("\n\n", "a, b"), top_p=1e-3)
    assert options(Options, ["run=r", "stop= : "]).stop == (" : ",)


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["prompt=x"], "run is missing"),
        (["run=r", "hello"], "hello is not key=value"),
        (["run=r", "topk=3"], "did you mean top_k"),
        (["run=r", "top_k=many"], "top_k is 'many'"),
        (["run=r", "top_p=2"], "top_p is 2"),
        (["run=r", "temperature=-1"], "temperature is -1"),
        (["run=r", "max_new_tokens=0"], "max_new_tokens is 0"),
        (["run=r", "seed=-1"], "seed is -1"),
        (["run=r", "prompt=a", "prompts=[b]"], "both given"),
        (["run=r", "prompts=[b"], "cannot be read as YAML"),
        (["run=r", 'stop=[""]'], "empty string"),
        (["run=r", "prompt=caf\udce9 au lait"], "prompt is not UTF-8 text: '\\udce9' after 3 characters"),
        (["run=r", 'prompts=["\\ud800"]'], "prompts is not UTF-8 text: '\\ud800'"),
        (["run=r", "stop=\udcff"], "stop is not UTF-8 text: '\\udcff'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(words, about, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert about in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_run_that_cannot_write_is_refused(tmp_path, capsys):
    saved(tmp_path / "mlm", "objective=mlm")
    for words, about in (([f"run={tmp_path / 'mlm'}"], "objective=causal"), (["run=nowhere"], "no config.yaml")):
        assert main(words) == 2
        found = capsys.readouterr()
        assert about in found.err and found.err.count("\n") == 1 and found.out == ""


def test_help_names_every_option(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}=" in out for name in Options.__dataclass_fields__)
