"""Who may import whom, read from the code: imports go one way only, and the bookkeeping never sees a tensor."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pagedkv

ROOT = Path(pagedkv.__file__).parent

BASE = {"errors", "plan", "checks"}
STORAGE = BASE | {"storage"}
CORE = BASE | {"core"}
MODELS = BASE | {"attention", "storage", "models"}
ABOVE = {"outputs", "prompts", "lengths", "namespaces", "intake", "responses", "pooling", "prompt_work", "seating", "outbox", "usage"}
ABOVE |= {"sizing", "poisoning", "engine_config", "engine", "keeper", "conversations", "streamers", "token_budget", "llm"}
TOP = {*MODELS, "core", "scheduling", "sampling", *ABOVE}
TOP |= {"generation"}

# A module or package, and what of the house it may import. Itself is always allowed.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "plan": set(),
    "checks": {"errors"},
    "core": BASE,
    "scheduling": CORE,
    "storage": BASE,
    "attention": STORAGE,
    "models": STORAGE | {"attention"},
    "sampling": BASE,
    "outputs": {"errors", "sampling.values"},
    "prompts": BASE | {"sampling"},
    "sizing": MODELS | {"core", "scheduling"},
    "generation": MODELS | {"core", "sizing"},
    "pooling": BASE | {"outputs", "sampling"},
    "responses": STORAGE | {"outputs", "pooling", "sampling", "scheduling"},
    "seating": STORAGE | {"core", "models", "responses", "sampling", "scheduling"},
    "prompt_work": STORAGE | {"models", "pooling", "responses", "sampling", "seating"},
    "poisoning": BASE | {"core", "storage"},
    "outbox": BASE | {"outputs", "prompt_work", "responses", "sampling", "scheduling", "seating"},
    "lengths": BASE | {"models"},
    "namespaces": {"prompts"},
    "intake": BASE | {"lengths", "models", "namespaces", "prompts", "sampling", "scheduling"},
    "usage": STORAGE | {"core", "scheduling"},
    "engine_config": CORE | {"scheduling"},
    "engine": TOP - {"engine", "keeper", "token_budget", "llm"},
    "keeper": {"checks", "engine", "engine_config", "errors", "models", "sizing"},
    "conversations": {"checks", "errors"},
    "streamers": BASE | {"outputs"},
    "token_budget": STORAGE | {"core", "lengths", "models", "scheduling"},
    "llm": TOP - {"llm"},
    "__init__": TOP,
    # Public helpers beside the house: whoever is tested may be imported, nobody of the house imports them.
    "testing": TOP,
    "observe": TOP - {"llm"},
    "simulate": TOP - {"llm"},
    "serving": TOP,
    "cli": TOP | {"observe", "serving", "simulate", "testing"},
    "__main__": {"cli"},
    "_build": set(),  # runs while the package is installed, when nothing that it needs may be there yet
}

# Third parties, each with the only places that may import it.
THIRD_PARTIES = {
    "torch": {
        "storage",
        "attention",
        "models",
        "generation",
        "sampling",
        "pooling",
        "seating",
        "sizing",
        "engine",
        "llm",
        "testing",
        "cli",
        "prompt_work",
        "responses",
        "streamers",
    },
    "transformers": {"models", "generation", "engine", "llm", "seating", "testing"},  # seating is the engine's, and names a tokenizer
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def place(path: Path) -> str:
    """The part of the house that a file belongs to."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions and under ``TYPE_CHECKING`` as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "pagedkv" else {node.module}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


def permitted(name: str, allowed: set[str]) -> bool:
    """Whether ``sampling.values.x`` is allowed by ``sampling`` or ``sampling.values``."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    here = place(path)
    assert here in ALLOWED, f"{here} is not in the table: say where it stands"
    inside = {name.removeprefix("pagedkv.") for name in imports(path) if name.startswith("pagedkv.")}
    wrong = {name for name in inside if not permitted(name, ALLOWED[here] | {here})}
    assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_third_parties_only_where_they_belong(path: Path) -> None:
    for third_party, places in THIRD_PARTIES.items():
        if place(path) not in places:
            wrong = {name for name in imports(path) if name.split(".")[0] == third_party}
            assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


def test_table_has_no_cycle() -> None:
    done: set[str] = set()
    left = {name: {part.split(".")[0] for part in allowed} - {name} for name, allowed in ALLOWED.items() if name != "__init__"}
    while left:
        free = {name for name, allowed in left.items() if allowed <= done}
        assert free, f"these import each other: {sorted(left)}"
        done |= free
        left = {name: allowed for name, allowed in left.items() if name not in free}


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("names", ["pagedkv", "pagedkv.core, pagedkv.scheduling", "pagedkv.errors, pagedkv.plan"])
def test_bookkeeping_is_imported_without_torch(names: str) -> None:
    run_python(f"import {names}, sys; assert not {{'torch', 'transformers'}} & set(sys.modules)")


def test_parameters_of_sampling_are_imported_without_torch() -> None:
    run_python("from pagedkv import SamplingParams; import sys; assert not {'torch', 'transformers'} & set(sys.modules)")


@pytest.mark.parametrize("name", ["core", "scheduling"])
def test_bookkeeping_imports_only_numpy_and_the_standard_library(name: str) -> None:
    outside = {each.split(".")[0] for path in (ROOT / name).rglob("*.py") for each in imports(path)}
    assert outside - set(sys.stdlib_module_names) == {"numpy", "pagedkv"}
