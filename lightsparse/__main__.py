"""`lightsparse <verb> …`, also `python -m lightsparse <verb> …`: one command line for everything."""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = {  # verb → the module whose `main` runs it, and what it does
    "train": ("cli.train", "train a model; also python train.py"),
    "evaluate": ("cli.evaluate", "a trained run on tasks, and by position"),
    "generate": ("cli.generate", "let a trained run write"),
    "export": ("cli.export", "a trained run for transformers"),
    "prepare": ("cli.prepare", "tokenize a text once, for many runs"),
    "show": ("cli.show", "draw an attention pattern as PNG"),
    "reach": ("cli.reach", "how far back an attention reaches"),
    "report": ("cli.report", "a sweep or runs side by side"),
    "replay": ("cli.replay", "take the step again that ended a run"),
    "bench": ("bench.__main__", "speed and memory, measured: kernels, train, memory, …"),
}


def main() -> int | None:
    """Run the verb; returns its exit code."""
    verb, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if verb not in VERBS:
        wrong = verb not in ("-h", "--help")
        out = sys.stderr if wrong else sys.stdout
        if wrong:
            out.write(f"{verb} is not a command; lightsparse has {', '.join(VERBS)}\n")
        else:
            out.write("lightsparse <command> key=value …\n\n")
            out.writelines(f"  {name:<10}{purpose}\n" for name, (_, purpose) in VERBS.items())
        return 2 if wrong else 0
    sys.argv = [f"{sys.argv[0]}", *words]
    return import_module(f"lightsparse.{VERBS[verb][0]}").main()


if __name__ == "__main__":
    sys.exit(main())
