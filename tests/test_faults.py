"""What goes wrong on real machines: a clear message, exit code 1, nothing half-written, and the same command continues."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, save_model

from addlang import cli
from addlang.errors import AddlangError
from addlang.models import Checkpoint, resolve
from addlang.run import execute
from addlang.train import checkpoint, loop
from addlang.verify import verify_run
from tinyrun import World, dying_at, same, text_rows, write_rows

pytestmark = pytest.mark.usefixtures("offline")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def run_command(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Write a recipe with changes and carry it out through the command line: exit code and stderr."""

    def call(output_dir: Path | None = None, **changes: Any) -> tuple[int, str]:
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(world.data(output_dir or tmp_path / "out", **changes)))
        monkeypatch.setattr(sys, "argv", ["addlang", "run", str(file)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, error

    return call


Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def whole(world: World, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDLANG_CACHE", str(shared_cache))
        return execute(world.recipe(tmp_path_factory.mktemp("whole") / "out"))


def nothing_half_written(directory: Path) -> None:
    """No temporary file, and every file that stands there is whole."""
    assert not list(directory.rglob("*.tmp*"))
    for file in directory.rglob("*.safetensors"):
        load_file(file)
    for file in directory.rglob("*.json"):
        json.loads(file.read_text())
    for file in directory.rglob("*.jsonl"):
        [json.loads(line) for line in file.read_text().splitlines()]


# ---- text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corrupt.jsonl", b'{"text": "one"}\n{"text": "two"\n', "corrupt.jsonl, row 2: not valid JSON"),
        ("number.jsonl", b'{"text": "one"}\n{"text": 2}\n', "number.jsonl, row 2: column 'text' must be text, it is int"),
        ("column.jsonl", b'{"txt": "one"}\n', "column.jsonl, row 1: there is no column 'text'"),
        ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
        ("blank.jsonl", b'{"text": " "}\n', "every one of its 1 rows is empty"),
        ("latin.txt", "déjà\n\nvu".encode("latin-1"), "latin.txt, row 1: not UTF-8"),
        ("wide.txt", "text".encode("utf-16"), "wide.txt, row 1: the text is UTF-16"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "one two three"}\n' * 50)[:-9], "cut.jsonl.gz: the compressed data is truncated"),
        ("text.docx", b"PK", "text.docx: files of this type are not supported"),
        ("short.jsonl", b'{"text": "only one document"}\n', "too little target data"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v and ":" not in v and "," not in v else "",
)  # fmt: skip
def test_bad_text_is_named_with_file_and_row_and_a_remedy(
    name: str, content: bytes, message: str, run_command: Run, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    code, error = run_command(datasets=[{"path": name}])
    assert code == 1
    assert message in error
    assert "fix:" in error
    nothing_half_written(tmp_path / "out")


def test_a_corrupt_row_deep_in_a_file_leaves_no_cache_behind(
    run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDLANG_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "deep.jsonl", text_rows(300, 5))
    with (tmp_path / "deep.jsonl").open("a") as f:
        f.write("{broken\n")
    code, error = run_command(datasets=[{"path": "deep.jsonl"}])
    assert code == 1
    assert "deep.jsonl, row 301: not valid JSON" in error
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_text_without_permission_is_named(run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind root, under whom tests often run, so that open() is made to refuse."""
    file = tmp_path / "secret.jsonl"
    write_rows(file, text_rows(5, 1))
    original = Path.open

    def refuse(self: Path, *args: Any, **kw: Any) -> Any:
        if self == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return original(self, *args, **kw)

    monkeypatch.setattr(Path, "open", refuse)
    code, error = run_command(datasets=[{"path": "secret.jsonl"}])
    assert code == 1
    assert f"{file}: no permission to read the file" in error


def test_bad_calibration_data_are_named_before_anything_is_measured(run_command: Run, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    code, error = run_command(calibration={"datasets": [{"path": "chat.jsonl"}]})
    assert code == 1
    assert "chat.jsonl, row 1" in error
    assert not (tmp_path / "out" / "results.jsonl").exists()


# ---- where results go


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody may write to."""
    place = tmp_path / "read-only"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True).returncode
    ):
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_an_output_directory_that_cannot_be_written_is_said_at_once(run_command: Run, read_only: Path) -> None:
    code, error = run_command(output_dir=read_only / "out")
    assert code == 1
    assert "cannot be used (Read-only file system)" in error
    assert "choose another --output_dir" in error


def test_an_output_directory_without_permission_is_said_at_once(
    run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.mkdir

    def refuse(self: Path, *args: Any, **kw: Any) -> None:
        if self == tmp_path / "out":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        original(self, *args, **kw)

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, error = run_command()
    assert code == 1
    assert "is not writable (Permission denied)" in error


# ---- a full disk


@pytest.mark.parametrize("call", [1, 2, 5, 9, 14, 20, 26, 30])
def test_a_disk_that_is_full_at_any_rename_is_said_and_the_rerun_completes(
    call: int, run_command: Run, whole: Path, tmp_path: Path
) -> None:
    """Everything is put in its place by a rename; each one in turn fails as on a full disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying_at(call, os.replace, FULL))
        code, error = run_command()
    assert code == 1
    assert "No space left on device" in error
    nothing_half_written(tmp_path / "out")
    code, error = run_command()
    assert code == 0, error
    assert same(tmp_path / "out", whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many KiB, to be filled for real."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(kib: int) -> Path:
        how = ["remount,", ""][not os.path.ismount(place)] + f"size={kib}k"
        if (
            os.geteuid() != 0
            or subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)], capture_output=True).returncode
        ):
            pytest.skip("mounting is not permitted here")
        return place

    yield size
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("kib", [8, 24, 100, 300, 500, 700])
def test_a_disk_that_is_really_full_is_said_and_more_space_lets_the_run_continue(
    kib: int, run_command: Run, whole: Path, small_disk: Callable[[int], Path]
) -> None:
    out = small_disk(kib) / "out"
    code, error = run_command(output_dir=out)
    assert code == 1, error
    assert "No space left on device" in error
    nothing_half_written(out)
    small_disk(8192)
    code, error = run_command(output_dir=out)
    assert code == 0, error
    assert same(out, whole)


def test_a_full_cache_is_said_and_leaves_nothing_torn(
    run_command: Run, whole: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = small_disk(12)
    monkeypatch.setenv("ADDLANG_CACHE", str(cache))
    code, error = run_command()
    assert code == 1
    assert "No space left on device" in error
    assert [p for p in cache.rglob("*") if ".tmp" in p.name] == []
    small_disk(4096)
    code, error = run_command()
    assert code == 0, error
    assert same(tmp_path / "out", whole)


# ---- numbers


def test_a_loss_that_becomes_nan_stops_the_run_and_names_the_rows(
    run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.token_loss
    calls = 0

    def poisoned(*args: Any, **kw: Any) -> Any:
        nonlocal calls
        calls += 1
        total, count = original(*args, **kw)
        return (total * float("nan") if calls == 7 else total), count

    monkeypatch.setattr(loop, "token_loss", poisoned)
    code, error = run_command()
    assert code == 1
    assert "became NaN or infinite at step 7 of phase 'adapt'" in error
    bad = json.loads((tmp_path / "out" / "bad_batch.json").read_text())
    assert bad["step"] == 7
    assert {row["source"] for row in bad["rows"]} == {
        json.loads((tmp_path / "recipe.yaml").read_text())["datasets"][0]["path"]
    }
    assert all(row["text"] for row in bad["rows"])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    nothing_half_written(tmp_path / "out")


def test_memory_that_runs_out_in_training_is_explained_with_settings_that_fit(
    run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", dying_at(3, loop.token_loss, full))
        code, error = run_command()
    assert code == 1
    assert "memory ran out in phase 'adapt': training needs about" in error
    assert error.partition("fix: one of:")[2].count("GiB)") == 3
    nothing_half_written(tmp_path / "out")
    assert run_command()[0] == 0


@pytest.mark.parametrize(
    "function",
    ["addlang.evaluate.suite.cached_evaluate", "addlang.strategies.ssu.SSU.plan"],
    ids=["evaluation", "scoring"],
)
def test_memory_that_runs_out_elsewhere_is_said_with_the_setting_to_lower(
    function: str, run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(function, full)
        code, error = run_command()
    assert code == 1
    assert "memory ran out: CUDA out of memory" in error
    assert "fix: lower evaluation.batch_size or calibration.batch_size" in error
    nothing_half_written(tmp_path / "out")
    assert run_command()[0] == 0


def test_a_model_with_nan_weights_is_refused(run_command: Run, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, error = run_command(model_name_or_path=str(model))
    assert code == 1
    assert "NaN" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ---- models


def sharded(directory: Path) -> Path:
    from tiny import make_model

    make_model("llama").to(torch.bfloat16).save_pretrained(directory, max_shard_size="20KB")
    make_tokenizer().save_pretrained(directory)
    return directory


def test_a_missing_shard_is_named_before_the_text_is_read(run_command: Run, tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    shard = Checkpoint(model).files[1]
    (model / shard).unlink()
    code, error = run_command(model_name_or_path=str(model), datasets=[{"path": str(tmp_path)}])
    assert code == 1
    assert f"weight file {model / shard} is missing" in error


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, name: t.update({name + "_scale": t[name]}), "stores '{}_scale', which is no parameter of the model"),
        (lambda t, name: t.pop(name), "parameter '{}' is not stored in"),
    ],
    ids=["one-more", "one-less"],
)  # fmt: skip
def test_stored_tensors_that_are_not_the_models_parameters_are_named_before_the_text_is_read(
    damage: Callable[[dict[str, torch.Tensor], str], object], message: str, run_command: Run, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    tensors, name = load_file(model / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    damage(tensors, name)
    save_file({n: t.clone() for n, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    code, error = run_command(model_name_or_path=str(model), datasets=[{"path": str(tmp_path)}])
    assert code == 1
    assert message.format(name) in error


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-100], "model.safetensors is torn: "),
        (lambda b: b[:20], "model.safetensors is torn or no safetensors file"),
        (lambda b: b"", "model.safetensors is torn or no safetensors file"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\n" * 3, "model.safetensors is torn or no safetensors file"),
    ],
    ids=["cut", "header-cut", "empty", "lfs-pointer"],
)  # fmt: skip
def test_torn_weights_are_named(
    damage: Callable[[bytes], bytes], message: str, run_command: Run, tmp_path: Path
) -> None:
    file = save_model(tmp_path / "model") / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    code, error = run_command(model_name_or_path=str(file.parent))
    assert code == 1
    assert message in error
    nothing_half_written(tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "has no tensor '{}'"),
        (lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), "'{}' of .* is of type I8"),
    ],
    ids=["missing", "integers"],
)
def test_a_weight_that_the_checkpoint_lacks_is_named_and_never_drawn_at_random(
    damage: Callable[[dict[str, torch.Tensor], str], object], message: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from addlang.models import load_model

    file = save_model(tmp_path / "model") / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.self_attn.q_proj.weight"
    load_model(file.parent)
    damage(tensors, name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AddlangError, match=message.format(name)):
        load_model(file.parent)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{torn", "not a valid JSON"),
        ("config.json", '{"model_type": "llama", "vocab_size": 300}', "does not say how long the model's context is"),
        ("config.json", '{"model_type": "unheard_of", "max_position_embeddings": 256}', "unheard_of"),
        ("tokenizer.json", "{torn", "no usable tokenizer"),
    ],
)  # fmt: skip
def test_torn_configurations_are_named(file: str, content: str, message: str, run_command: Run, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / file).write_text(content)
    code, error = run_command(model_name_or_path=str(model))
    assert code == 1
    assert message in error
    assert str(model) in error


def test_a_torn_weight_index_is_named(run_command: Run, tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    (model / "model.safetensors.index.json").write_text("{")
    code, error = run_command(model_name_or_path=str(model))
    assert code == 1
    assert "model.safetensors.index.json is torn or no weight index" in error


def test_a_directory_that_is_no_model_and_a_path_that_is_none(tmp_path: Path, world: World) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AddlangError, match=r"is a directory without config\.json"):
        resolve(str(tmp_path / "empty"))
    with pytest.raises(AddlangError, match=r"does not exist\n  fix: Did you mean 'source'"):
        resolve(str(world.root / "sourse"))
    with pytest.raises(AddlangError, match="is a file, not a model directory"):
        resolve(world.text)


def test_a_hub_id_that_is_not_cached_is_an_error_that_says_the_hub_is_switched_off(
    tmp_path: Path, run_command: Run
) -> None:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    code = "from addlang.models import resolve\nresolve('nobody/no-such-model-here')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "is not in the local cache and the hub is switched off (HF_HUB_OFFLINE)" in done.stderr
    assert "or use 'lab' for the embedded model" in done.stderr


def test_a_hub_data_set_offline_says_so(run_command: Run) -> None:
    code, error = run_command(datasets=[{"path": "nobody/no-such-data-here"}])
    assert code == 1
    assert "'nobody/no-such-data-here' is no local file, and HF_HUB_OFFLINE forbids to look for it on the hub" in error


# ---- checkpoints of our own


def test_a_torn_training_checkpoint_is_skipped_and_the_run_ends_with_the_same_bits(
    run_command: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", dying_at(12, loop.token_loss, KeyboardInterrupt()))
        assert run_command()[0] == 130
    newest = checkpoint.newest(tmp_path / "out")
    assert newest is not None
    for file in newest.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    code, error = run_command()
    assert code == 0
    assert f"warning: {newest.name} is torn" in error
    assert same(tmp_path / "out", whole)
    assert verify_run(tmp_path / "out")["ok"]
