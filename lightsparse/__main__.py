"""`python -m lightsparse`: all commands, one line each."""

from __future__ import annotations

from rich.console import Console

COMMANDS = {
    "python train.py": "train a model; also lightsparse-train",
    "python -m lightsparse.evaluate": "a trained run on tasks, and by position",
    "python -m lightsparse.prepare": "tokenize a text once, for many runs",
    "python -m lightsparse.generate": "let a trained run write",
    "python -m lightsparse.show": "draw an attention pattern as PNG",
    "python -m lightsparse.export": "a trained run for transformers",
    "python -m lightsparse.analysis": "how far back an attention reaches",
    "python -m lightsparse.report": "a sweep or runs side by side",
    "python -m lightsparse.replay": "take the step again that ended a run",
    "python -m lightsparse.bench kernels": "speed of sparse attention against dense",
    "python -m lightsparse.bench memory": "peak memory as the sequence grows",
    "python -m lightsparse.bench train": "tokens per second of training steps",
    "python -m lightsparse.bench checkpoint": "what saving costs a training step",
    "python -m lightsparse.bench table": "saved measurements as Markdown",
}


def main() -> None:
    console = Console(soft_wrap=True)
    for command, purpose in COMMANDS.items():
        console.print(f"{command:<40}{purpose}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
