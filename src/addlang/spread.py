"""A run of a sweep on several processes of this machine: what ``addlang sweep --processes N`` starts for each of its runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from addlang.errors import AddlangError, PreemptedError, first_line
from addlang.export import write_json

GRACE = 60.0  # seconds for saving, after which a process of a sweep that is no more ends


def run_spread(data: dict[str, Any], where: str, base_dir: Path | None = None, *, processes: int) -> str:
    """As :func:`addlang.sweep.run_one`, by torchrun on ``processes`` processes, each with one of the GPUs that are visible here.

    Raises:
        AddlangError: what ended the run, as one process would say it; or the launcher's last words.
    """
    from addlang.recipe import Recipe
    from addlang.rundir import holds_finished

    recipe = Recipe.parse(data, where=where, base_dir=base_dir)
    path = Path(recipe.output_dir)
    if holds_finished(path, recipe, base_dir):
        return str(path)
    with tempfile.TemporaryDirectory() as folder:
        job, told = Path(folder, "job.json"), Path(folder, "error.json")
        about = {"data": data, "where": where, "base_dir": None if base_dir is None else str(base_dir)}
        job.write_text(json.dumps({**about, "owner": os.getpid(), "told": str(told)}), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*launcher, "-m", "addlang.spread", str(job)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        if told.is_file():
            error = json.loads(told.read_text(encoding="utf-8"))
            raise (PreemptedError if error["preempted"] else AddlangError)(error["message"], error["fix"])
        if done.returncode:
            sys.stderr.write(done.stdout)
            raise AddlangError(f"torchrun ended with {done.returncode}", "see what it printed, above")
    return str(path)


def end_without(owner: int) -> None:
    """Save and end when the sweep that started this process is no more: the run can be continued."""
    while _lives(owner):
        time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(PreemptedError.exit_code)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(job: Path) -> int:
    """One of the run's processes; what an error was is written down by the first, one that is no AddlangError by any."""
    from addlang.progress import quiet_libraries, set_quiet
    from addlang.sweep import run_one

    given = json.loads(job.read_text(encoding="utf-8"))
    threading.Thread(target=end_without, args=(given["owner"],), daemon=True).start()
    set_quiet(True)
    quiet_libraries()
    try:
        run_one(given["data"], given["where"], None if given["base_dir"] is None else Path(given["base_dir"]))
    except AddlangError as error:
        if os.environ.get("RANK", "0") == "0":
            _tell(Path(given["told"]), error)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        _tell(Path(given["told"]), AddlangError(f"{type(error).__name__}: {first_line(error)}"))
        return 1
    return 0


def _tell(told: Path, error: AddlangError) -> None:
    about = {"message": error.message, "fix": error.fix, "preempted": isinstance(error, PreemptedError)}
    write_json(told, about)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
