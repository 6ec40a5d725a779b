"""``addlang merge`` as a user tries it: every method, merge files, output as JSON, exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import save_model

from addlang import cli, progress
from addlang.models import Checkpoint

A, B, C = "a", "b", "c"
SPELLINGS: dict[str, list[object]] = {
    "linear": [A, B, "--weight", 1, "--weight", 3],
    "slerp": [A, B, "--t", "[0, 0.5, 1]"],
    "task-arithmetic": [A, B, "--base", C, "--weight", 0.5, "--lambda", 0.9],
    "ties": [A, B, "--base", C, "--density", 0.4, "--density", 0.2],
    "dare-linear": [A, "--base", C, "--density", 0.5, "--rescale", "l1"],
    "dare_ties": [A, B, "--base", C, "--density", 0.5, "--seed", 3],
    "chat-vector": [A, "--chat", B, "--base", C, "--ratio", 0.5],
    "layer-swap": ["--task", A, "--language", B, "--base", C, "--auto", "--transition", 0],
    "revert": [A, "--source", C, "--scale", 0.8, "--module", "up_proj=0.5", "--layer", "0=0", "--density", 0.9],
    "special-tokens": [A, "--source", C],
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Addlang = Callable[..., Outcome]


@pytest.fixture
def addlang(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Addlang:
    """Run a command in this process."""
    import warnings

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["addlang", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            finally:
                progress.set_quiet(False)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate((A, B, C)):
        save_model(root / name, seed=seed)
    return root


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three models."""
    for name in (A, B, C):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", SPELLINGS)
def test_every_method_writes_a_model_that_verifies_and_repeats(method: str, here: Path, addlang: Addlang) -> None:
    done = addlang("merge", method, *SPELLINGS[method], "--output_dir", "out", "--json")
    assert done.code == 0, done.err
    assert done.json["output_dir"] == "out"
    assert Checkpoint(here / "out").hash == done.json["hash"]
    assert done.json["hash"] not in {m["hash"] for m in done.json["models"]}
    assert addlang("verify", "out").code == 0
    again = addlang("merge", "out/merge.yaml", "--output_dir", "again", "--json")
    assert again.json["hash"] == done.json["hash"]


def test_a_file_of_mergekit_is_carried_out(here: Path, addlang: Addlang) -> None:
    spec = {
        "merge_method": "ties", "base_model": C, "models": [{"model": A, "parameters": {"weight": 1, "density": 0.5}}],
    }  # fmt: skip
    (here / "merge.yml").write_text(yaml.safe_dump(spec))
    done = addlang("merge", "merge.yml", "--output_dir", "out")
    assert done.code == 0
    assert "TIES" in done.out
    command = addlang("merge", "ties", A, "--base", C, "--weight", 1, "--density", 0.5, "--output_dir", "own", "--json")
    assert command.json["hash"] == Checkpoint(here / "out").hash
    other = addlang("merge", "merge.yml", "--restore_special_tokens", C, "--output_dir", "restored", "--json")
    assert other.json["restored_rows"] == 6
    again = addlang("merge", "merge.yml", "--restore_special_tokens", C, "--output_dir", "restored", "--overwrite")
    assert "6 rows of special tokens were restored" in again.out


def test_a_tampered_merge_fails_to_verify_with_code_4(here: Path, addlang: Addlang) -> None:
    addlang("merge", "linear", A, B, "--output_dir", "out")
    tensors = load_file(here / "out" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, here / "out" / "model.safetensors", metadata={"format": "pt"})
    done = addlang("verify", "out")
    assert done.code == 4
    assert "model.norm.weight" in done.err
    assert addlang("verify", "out", "--json").json["exit_code"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tise", A, "--base", C, "--output_dir", "out"], "No such command"),
        (["dare-ties", A, "--base", C, "--output_dir", "out"], "density: missing"),
        (["linear", A, B, C, "--weight", 1, "--weight", 2, "--output_dir", "out"], "3 models but 2 values of --weight"),
        (["linear", A, "nosuch/model/x", "--output_dir", "out"], "does not exist"),
        (["revert", A, "--output_dir", "out"], "name it with --source"),
        (["revert", A, "--source", C, "--module", "up_proj", "--output_dir", "out"], "is not NAME=FACTOR"),
        (["revert", A, "--source", C, "--module", "upproj=0", "--output_dir", "out"], "Did you mean 'up_proj'"),
        (["nosuch.yaml", "--output_dir", "out"], "merge file 'nosuch.yaml' does not exist"),
        (["linear", A, B, "--config_from", C, "--output_dir", "out"], "none of the models"),
        (["revert-to-budget", A, "--keep", 0.9], "name it with --source"),
    ],
)
def test_mistakes_are_explained(here: Path, addlang: Addlang, arguments: list[object], message: str) -> None:
    done = addlang("merge", *arguments)
    assert done.code in (1, 2)
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (here / "out").exists()


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    code = "import sys; sys.argv = ['addlang', 'merge', 'ties', '--help']\nfrom addlang import cli\ntry: cli.main()\nexcept SystemExit: pass\nprint({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--density" in done.stdout
    assert done.stderr.strip() == "set()"
