"""Run every bash and python block of README.md, each by itself, in order, in one temporary copy of the repository.

A README line stays what a user types: SHORT says which arguments a long command gets at its end here.
A block is left out only by a comment on the line above it that gives the reason:

    <!-- ci: skip, it downloads a data set -->

    python .ci/readme_blocks.py [README.md]
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 600  # seconds per block

# Beginning of a command → what is appended to it. The last of two equal overrides or options wins.
SHORT = {
    "python train.py": "trainer.max_steps=2 eval.tokens=16384 eval.sample_tokens=8",
    "lightsparse train": "trainer.max_steps=2 eval.tokens=16384 eval.sample_tokens=8",
    "lightsparse bench kernels": "--seq 512 --block 64 --repeats 1 --backends native,blocked",
    "lightsparse bench memory": "--seq 512 1024 --block 64 --window 128",
    "lightsparse bench train": "--context 256 --block 64 --repeats 1",
    "pip install": "--dry-run --no-deps --quiet",
    "pytest": "--collect-only",
}

FENCE = re.compile(r"^```(\w*)\s*$")
SKIP = re.compile(r"^<!-- ci: skip, (\S.*\S) -->$")
LEFT_OUT = (".git", ".venv", "runs", "outputs", "multirun", "__pycache__", ".*_cache", "*.egg-info")  # of the copy


@dataclass(frozen=True)
class Block:
    line: int  # of its first line in the file, from 1
    language: str
    text: str
    skip: str | None  # the reason


def blocks(readme: str) -> list[Block]:
    """The bash and python blocks in order. Raises ValueError for a `ci:` comment in any other form than SKIP's."""
    found: list[Block] = []
    lines = readme.splitlines()
    start = language = reason = None
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line.strip())
        if start is None and fence:
            start, language = number, fence[1]
        elif start is not None and line.strip() == "```":
            if language in ("bash", "python"):
                found.append(Block(start + 1, language, "\n".join(lines[start : number - 1]) + "\n", reason))
            start = language = reason = None
        elif start is None and line.startswith("<!-- ci:"):
            comment = SKIP.match(line)
            if comment is None or number == len(lines) or not FENCE.match(lines[number].strip()):
                raise ValueError(f"line {number} is {line!r}; <!-- ci: skip, REASON --> stands right above a block")
            reason = comment[1]
    return found


def bash_script(text: str) -> str:
    """The block's commands one by one, each printed before it runs, stopping at the first that fails."""
    commands, pending = [], ""
    for line in text.splitlines():
        pending += line + "\n"
        parsed = subprocess.run(["bash", "-n"], input=pending, text=True, capture_output=True, check=False)
        if parsed.returncode == 0 and not line.endswith("\\"):  # a whole command, however many lines it has
            commands.append(pending.strip())
            pending = ""
    # eval, because `set -e` overlooks a failure on the left of &&.
    runs = [f"echo {shlex.quote('$ ' + each)}\neval {shlex.quote(each)}\n" for each in [*commands, pending] if each]
    return "set -euo pipefail\n" + shortened() + "".join(runs)


def shortened() -> str:
    """Bash functions that stand before the commands of SHORT and append their arguments."""
    cases: dict[str, list[str]] = {}
    for command, extra in SHORT.items():
        word, _, rest = command.partition(" ")
        pattern = f'"{rest}"*' if rest else "*"
        cases.setdefault(word, []).append(f'{pattern}) command {word} "$@" {extra};;')
    functions = ((word, " ".join(lines)) for word, lines in cases.items())
    return "".join(f'{word}() {{ case "$*" in {lines} *) command {word} "$@";; esac; }}\n' for word, lines in functions)


def run(block: Block, folder: Path) -> int:
    """The exit status of the block in `folder`; 124 when it ran past TIME_LIMIT."""
    if block.language == "python":
        command, text = [sys.executable, "-"], block.text
    else:
        command, text = ["bash", "-s"], bash_script(block.text)
    try:
        return subprocess.run(command, input=text, text=True, cwd=folder, timeout=TIME_LIMIT, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def main() -> int:
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "README.md")
    found = blocks(readme.read_text(encoding="utf-8"))
    failed = ran = 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(ROOT, Path(temporary) / "copy", ignore=shutil.ignore_patterns(*LEFT_OUT)))
        for block in found:
            where = f"{readme.name}:{block.line} ({block.language})"
            if block.skip:
                say(f"--- {where}: skipped, {block.skip}")
                continue
            say(f"--- {where}")
            started = time.monotonic()
            status = run(block, copy)
            ran += 1
            failed += status != 0
            result = "ok" if status == 0 else f"FAILED with {status}"
            say(f"--- {where}: {result} in {time.monotonic() - started:.0f} s\n")
    say(f"{ran} README blocks ran, {failed} failed, {len(found) - ran} skipped")
    return 1 if failed or not found else 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
