"""Put a model directory back together from the parts that ``train.py --export-parts`` wrote.

python benchmarks/base_model/join.py PARTS OUTPUT
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

PART_BYTES = 15 * 2**20
INDEX = "parts.json"


def split(directory: Path, parts: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write ``directory`` as numbered files of at most ``part_bytes`` and an index with their hashes."""
    parts.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    with tempfile.TemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(directory.iterdir()):
                tar.add(path, arcname=path.name)
        archive.seek(0)
        while block := archive.read(part_bytes):
            name = f"part-{len(written):02d}.bin"
            (parts / name).write_bytes(block)
            written[name] = hashlib.sha256(block).hexdigest()
    (parts / INDEX).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return [*(parts / name for name in written), parts / INDEX]


def join(parts: Path, output: Path) -> None:
    """The reverse of :func:`split`; ``output`` appears only when every part is whole."""
    if output.exists():
        raise SystemExit(f"'{output}' exists already")
    index = parts / INDEX
    if not index.is_file():
        raise SystemExit(f"there is no {INDEX} in '{parts}'")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as archive:
        for name, wanted in json.loads(index.read_text(encoding="utf-8")).items():
            path = parts / name
            if not path.is_file():
                raise SystemExit(f"'{path}' is missing")
            block = path.read_bytes()
            if hashlib.sha256(block).hexdigest() != wanted:
                raise SystemExit(f"'{path}' is damaged: its hash is not the one in {INDEX}")
            archive.write(block)
        archive.seek(0)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            with tarfile.open(fileobj=archive, mode="r") as tar:
                tar.extractall(temporary, filter="data")
            temporary.chmod(0o755)
            temporary.rename(output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args(argv)
    join(given.parts, given.output)


if __name__ == "__main__":
    main()
