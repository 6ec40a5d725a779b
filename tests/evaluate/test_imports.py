from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import addlang

SOURCES = Path(addlang.__file__).parent


def test_one_module_knows_the_harness() -> None:
    users = [p for p in SOURCES.rglob("*.py") if re.search(r"^\s*(from|import) lm_eval\b", p.read_text(), re.MULTILINE)]
    assert [p.relative_to(SOURCES).as_posix() for p in users] == ["evaluate/lm_eval.py"]


def test_importing_evaluation_loads_no_torch() -> None:
    code = (
        "import sys, addlang.evaluate.suite, addlang.evaluate.compare, addlang.evaluate.lm_eval\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'py3langid'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
