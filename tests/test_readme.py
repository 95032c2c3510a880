"""The README's commands and code are the ones that CI runs and the package has."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_second_command_is_what_ci_runs() -> None:
    command = next(line for line in README.splitlines() if line.endswith("-m pytest -n 2"))
    steps = [step.strip() for step in command.split("&&")]
    assert len(steps) == 4
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in script if line in steps] == steps


def test_readme_names_are_exported() -> None:
    for module, names in re.findall(r"^from (pagedkv[.\w]*) import ([\w, ]+)$", README, flags=re.MULTILINE):
        imported = __import__(module, fromlist=["__all__"])
        assert set(names.split(", ")) <= set(imported.__all__)


def test_readme_python_blocks_compile() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        compile(block, "README.md", "exec")
