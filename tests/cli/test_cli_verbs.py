"""`lightsparse <verb>`: what is listed can be run."""

import importlib
import sys

import pytest

from lightsparse.__main__ import VERBS, main


def test_every_verb_has_a_module_with_a_main():
    for module, purpose in VERBS.values():
        assert callable(importlib.import_module(f"lightsparse.{module}").main) and purpose


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--help"], 0), (["xyzzy"], 2)])
def test_the_verbs_are_listed(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightsparse", *words])
    assert main() == code
    shown = "".join(capsys.readouterr())
    assert all(verb in shown for verb in VERBS)
