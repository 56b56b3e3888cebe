"""A coverage-guided fuzzer (atheris) of one reader: `fuzz_readers.py READER [options of libFuzzer]`.

Seeds are written by the code that tests use. A reader may only raise UnreadableError; anything else is a finding.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["f3rm_verify"]):
    from f3rm_verify.errors import UnreadableError
    from f3rm_verify.readers.checkpoint import read_checkpoint
    from f3rm_verify.readers.config import read_config
    from f3rm_verify.readers.events import read_events
    from f3rm_verify.readers.images import read_array
    from f3rm_verify.readers.trace import read_trace
    from f3rm_verify.trace_format import CHECKSUM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_runs import FakeRun  # noqa: E402
from hostile.cases import EVENTS, RGB, record  # noqa: E402

from f3rm_verify.run_dir import CONFIG, TRACE, TRACE_RECORDS  # noqa: E402


def _events(folder: Path, data: bytes) -> None:
    """One half of the inputs as a file, the other as the content of a record with good checksums."""
    path = folder / EVENTS
    path.write_bytes(record(data[1:]) if data[:1] > b"\x7f" else data[1:])
    read_events([path])


def _trace(folder: Path, data: bytes) -> None:
    """A line of JSON, then the records, of which every second input gets a good checksum."""
    head, _, records = data.partition(b"\n")
    try:
        table = json.loads(head)
    except (ValueError, RecursionError):
        return
    body = records[1 + CHECKSUM.size :]
    path = folder / "trace.bin"
    path.write_bytes(CHECKSUM.pack(zlib.crc32(body)) + body if records[:1] > b"\x7f" else records[1:])
    if isinstance(table, dict):
        read_trace(table, path)


def _checkpoint(folder: Path, data: bytes) -> None:
    path = folder / "step-000000009.ckpt"
    path.write_bytes(data)
    for leaf in read_checkpoint(path).leaves().values():
        getattr(leaf, "array", None)


def _named(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], None]:
    def run(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        read(folder / name)

    return run


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "events": _events,
    "trace": _trace,
    "checkpoint": _checkpoint,
    "config": _named(CONFIG, read_config),
    "png": _named("x.png", read_array),
    "npy": _named("x.npy", read_array),
}


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """What a good run holds, for each reader."""
    run = FakeRun().write(folder / "run")
    events = run.event_files[0].read_bytes()
    head, records = json.dumps(json.loads((run.path / TRACE).read_bytes())), (run.path / TRACE_RECORDS).read_bytes()
    return {
        "events": [b"\0" + events, b"\0" + events[:200], b"\xff" + events[12:60]],
        "trace": [head.encode() + b"\n\0" + records, head.encode() + b"\n\xff" + records[: len(records) // 10]],
        "checkpoint": [path.read_bytes() for path in run.checkpoints.values()],
        "config": [(run.path / CONFIG).read_bytes()],
        "png": [(run.path / f"{RGB}.png").read_bytes()],
        "npy": [(run.path / f"{RGB}.npy").read_bytes()],
    }


def main() -> None:
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        folder, corpus = Path(work, "files"), Path(work, "corpus")
        folder.mkdir()
        corpus.mkdir()
        for number, seed in enumerate(seeds(Path(work))[name]):
            (corpus / str(number)).write_bytes(seed)

        def one_input(data: bytes) -> None:
            try:
                READERS[name](folder, data)
            except UnreadableError:
                pass

        atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
