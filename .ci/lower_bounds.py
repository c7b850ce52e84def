"""The lowest versions that pyproject.toml declares still work: a smoke run, and the tests that lean on them.

They are installed into a folder that comes before this environment's packages, all but PyTorch, which is the
environment's. Lightning goes in without its dependencies, one of which is PyTorch.

    python .ci/lower_bounds.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
AS_INSTALLED, ALONE = {"torch"}, {"lightning"}
TESTS = (
    *("tests/config/test_config_parse.py", "tests/config/test_config_build.py"),  # Hydra
    *("tests/utils", "tests/training/metrics"),  # filelock, Lightning, psutil, rich, wandb
    *("tests/data/test_data_files.py", "tests/analysis"),  # datasets, matplotlib, numpy
)
VERSIONS = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"


def lowest() -> dict[str, str]:
    """Each dependency to be installed, and the version behind its >=."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = {}
    for line in map(Requirement, declared):
        if line.name not in AS_INSTALLED:
            (found[line.name],) = (each.version for each in line.specifier if each.operator == ">=")
    return found


def main() -> int:
    versions = lowest()
    pins = {name: f"{name}=={version}" for name, version in versions.items()}
    python = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder:
        install = [*python, "pip", "install", "--quiet", "--disable-pip-version-check", "--target", f"{folder}/first"]
        subprocess.run([*install, *(pin for name, pin in pins.items() if name not in ALONE)], check=True)
        subprocess.run([*install, "--no-deps", *(pins[name] for name in ALONE)], check=True)
        paths = (f"{folder}/first", str(ROOT), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        used = subprocess.check_output([sys.executable, "-c", VERSIONS, *pins], env=environment, text=True).split()
        assert list(map(Version, used)) == list(map(Version, versions.values())), used
        commands = (
            [sys.executable, "train.py", "experiment=smoke", f"runs_dir={folder}/runs"],
            [*python, "pytest", *TESTS],
        )
        for command in commands:
            sys.stdout.write(f"\n$ {' '.join(command)}\n")
            sys.stdout.flush()
            if code := subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
