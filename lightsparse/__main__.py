"""`lightsparse <verb> …`, also `python -m lightsparse <verb> …`: one command line for everything."""

from __future__ import annotations

import sys
from importlib import import_module

from lightsparse.config.targets import did_you_mean
from lightsparse.distributed.environment import ignore_stray_ranks
from lightsparse.utils.screen import survive_the_screen

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
    "bench": ("bench.command", "speed and memory, measured: kernels, train, memory, …"),
}


def main() -> int | None:
    """Run the verb; returns its exit code."""
    survive_the_screen()
    program, *words = sys.argv
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        sys.stdout.write("lightsparse <command> …; lightsparse <command> --help says what one takes\n\n")
        sys.stdout.writelines(f"  {name:<10}{purpose}\n" for name, (_, purpose) in VERBS.items())
        return 0
    if verb not in VERBS:
        near = did_you_mean(verb, list(VERBS)) or f"; lightsparse has {', '.join(VERBS)}"
        sys.stderr.write(f"{verb} is not a command{near}\n")
        return 2
    sys.argv = [program, *words[1:]]
    sys.stderr.writelines(f"{line}\n" for line in ignore_stray_ranks())  # first: Lightning reads them as it is imported
    return import_module(f"lightsparse.{VERBS[verb][0]}").main()


if __name__ == "__main__":
    sys.exit(main())
