"""Rules of the architecture (docs/decisions/0001-architecture.md), each as a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import addlang
from addlang.strategies import available

SOURCES = Path(addlang.__file__).parent
MODULES = sorted(SOURCES.rglob("*.py"))
LONGEST = 600


def name(path: Path) -> str:
    return path.relative_to(SOURCES).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Top-level package of every import in a module, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def code_strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, value) of every string that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


@pytest.mark.parametrize("module", ["addlang", "addlang.cli", "addlang.errors", "addlang.progress", "addlang.report"])
def test_importing_it_loads_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, {module}; print(*({{'torch', 'transformers', 'datasets', 'lm_eval'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_importing_the_recipe_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, addlang.recipe; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", [p for p in MODULES if "report" in name(p)], ids=name)
def test_the_report_never_imports_torch_or_loads_a_model(path: Path) -> None:
    assert not {"torch", "transformers", "safetensors"} & set(imports(path))


def test_one_module_imports_the_harness() -> None:
    assert [name(p) for p in MODULES if "lm_eval" in imports(p)] == ["evaluate/lm_eval.py"]


def test_keys_of_the_harness_stand_in_its_adapter_only() -> None:
    users = [name(p) for p in MODULES if any(",none" in s or ",strict" in s for _, s in code_strings(p))]
    assert set(users) <= {"evaluate/lm_eval.py", "evaluate/harness_results.py"}


def test_no_strategy_is_named_outside_its_file_and_the_defaults() -> None:
    """A part that asks for a strategy's name knows too much about it: it should ask the strategy."""
    # the default of ``addlang adapt``; a placeholder; the arms of the lab's grid
    allowed = {"cli.py", "adapt.py", "evaluation.py", "report/lab.py"}
    names = set(available())
    found = [
        f"{name(p)}:{line} '{value}'"
        for p in MODULES
        if not name(p).startswith(("strategies/", "lab/", "commands/")) and name(p) not in allowed
        for line, value in code_strings(p)
        if value in names and value != p.stem
    ]
    assert found == []


def test_one_module_renders_chat_templates() -> None:
    """It fixes the date; what renders one past it depends on the day."""
    renderers = {"apply_chat_template", "render_jinja_template"}
    users = [
        name(path)
        for path in MODULES
        if any(renderer in path.read_text(encoding="utf-8") for renderer in renderers)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.alias)
        and renderers & {getattr(node, "attr", ""), getattr(node, "name", "")}
    ]
    assert set(users) == {"data/chat.py"}


def test_no_pickle_and_no_unsafe_yaml_is_read() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not {"pickle", "marshal", "shelve", "joblib", "dill"} & set(imports(path)), name(path)
        for call in ("torch.load(", "yaml.load(", "yaml.unsafe_load", "allow_pickle=True", "trust_remote_code=True"):
            assert call not in text, f"{name(path)}: {call}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_module_is_longer_than_can_be_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_only_the_command_line_and_its_helpers_print() -> None:
    """Results go to stdout from the commands, progress to stderr through addlang.progress."""
    printers = {"cli.py", "doctor.py", "planning.py", "progress.py", "report/table.py"}
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if name(path).startswith("commands/"):
                continue
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(name(path))
    assert set(found) <= printers


def test_the_tests_mirror_the_source() -> None:
    tests = Path(__file__).parent
    for package in (p for p in SOURCES.iterdir() if (p / "__init__.py").is_file() and p.name != "commands"):
        assert list((tests / package.name).glob("test_*.py")), f"no tests of {package.name}/"
