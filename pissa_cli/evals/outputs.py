"""Outputs of a model, kept as they come, so that an interrupted evaluation goes on; and outputs made elsewhere."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from pissa_cli.data.rows import Row, read_rows
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.evals.bench import Bench


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PissaError(
            f"{path}: cannot write ({error})", "the outputs so far are kept; run the command again"
        ) from None


def _hash(content: object) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Kept:
    """Outputs in a file, for what is `asked` by one `identity` (of model and settings), by number.

    Answers to other questions of the same identity (of an evaluation of more rows, that was interrupted) stay there.
    """

    def __init__(self, path: Path, identity: object, asked: Sequence[object]) -> None:
        self._path = path
        self._identity = _hash(identity)
        seen: Counter[str] = Counter()
        self._keys = []
        for key in map(_hash, asked):
            self._keys.append(f"{key}-{seen[key]}")
            seen[key] += 1
        self.outputs: dict[int, str] = {}
        self._others = False

    def __enter__(self) -> Kept:
        """Read what an earlier evaluation left, up to a line that was cut off; what has another identity is dropped."""
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        good, numbers = 0, {key: number for number, key in enumerate(self._keys)}
        if lines and lines[0].decode(errors="replace").strip() == self._identity:
            good = len(lines[0])
            for line in lines[1:]:
                try:
                    row = json.loads(line)
                    key, output = row["key"], row["output"]
                except (ValueError, KeyError, TypeError):
                    break
                if key in numbers:
                    self.outputs[numbers[key]] = output
                else:
                    self._others = True
                good += len(line)
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("r+b" if good else "wb")
            self._file.seek(good)
            self._file.truncate()
            if not good:
                self._file.write(f"{self._identity}\n".encode())
                self._file.flush()
        return self

    def add(self, number: int, output: str) -> None:
        """Keep one more."""
        self.outputs[number] = output
        with _writing(self._path):
            self._file.write(json.dumps({"key": self._keys[number], "output": output}).encode() + b"\n")
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def remove(self) -> None:
        """Once the results are written; not what an evaluation of other rows goes on from."""
        if not self._others:
            self._path.unlink(missing_ok=True)


def read_samples(source: str, bench: Bench, rows: Sequence[Row]) -> list[str]:
    """The output for each row, from jsonl with `output` and `task_id` (the row's own) or `id` (its number from 0).

    Raises UsageError for a row of `source` that is neither, names no row or one that has an output, and for rows
    without an output.
    """
    numbers = {bench.identity(row): number for number, row in enumerate(rows) if bench.identity(row) is not None}
    found: dict[int, str] = {}
    for line, sample in read_rows(source):
        if isinstance(sample, str) or not isinstance(sample.get("output"), str):
            raise UsageError(
                f"{source}: line {line} has no text 'output'", "one JSON object a line, with output and id or task_id"
            )
        if "task_id" in sample:
            number = numbers.get(str(sample["task_id"]))
        else:
            number = sample["id"] if isinstance(sample.get("id"), int) and 0 <= sample["id"] < len(rows) else None
        if number is None or number in found:
            name = sample.get("task_id", sample.get("id"))
            reason = "has an output already" if number in found else "is no question of this data"
            raise UsageError(f"{source}: line {line}: {name!r} {reason}", "score the same data, and the same --limit")
        found[number] = sample["output"]
    missing = _first([number for number in range(len(rows)) if number not in found])
    if missing:
        raise UsageError(
            f"{source}: no output for questions {missing}", "every question needs one, if but an empty one"
        )
    return [found[number] for number in range(len(rows))]


def _first(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f", ... ({len(numbers)} in all)" if len(numbers) > 5 else "")
