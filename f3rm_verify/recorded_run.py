"""What a baseline holds of a run: exact numbers where they are small, digests of everything else.

`record_run` turns a run directory into plain data, and `RecordedRun` stands for one that was: to whoever compares, it
is a run directory whose checkpoints and renders are digests. A candidate is recorded in the same way before it is
compared, so that equal evidence gives equal data.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from f3rm_verify.compare_setup import claims_of
from f3rm_verify.condensed_trace import condensed, decoded, decoded_steps, encoded, encoded_steps, steps_together
from f3rm_verify.errors import UnreadableError
from f3rm_verify.policy import Policy
from f3rm_verify.readers.checkpoint import Tensor, read_checkpoint
from f3rm_verify.readers.events import Blob, Events, Series
from f3rm_verify.readers.images import decode, read_file
from f3rm_verify.readers.trace import Trace
from f3rm_verify.run_dir import RunDir

Data = Mapping[str, Any]

#: The training loss is always kept exactly: it shows how many steps were done.
TRAIN_LOSS = "Train Loss"
#: Bytes of scalars that are kept exactly; of tags beyond, digests of so many blocks of steps.
EXACT_BYTES = 96 * 2**10
BLOCKS = 64
#: The one entry of a checkpoint that is not the last, or of which only a digest is kept.
WHOLE = "(everything)"
#: Files beside these say nothing more: the picture for people, and what is made of the features.
_DERIVED = {".half.npy": ".bands.npy", ".projection.npy": ".bands.npy", ".projection.png": ".bands.npy", ".png": ".npy"}
_DIGEST = "digest"


def record_run(run: RunDir, *, policy: Policy) -> dict[str, Any]:
    """The artefacts of `run` as plain data, without what the policy ignores.

    Raises UnreadableError where one is broken.
    """
    return {
        "seeding": _seeding(run),
        "trace": _trace(run),
        "curves": _curves(run, policy),
        "metrics": _metrics(run, policy),
        "checkpoints": record_checkpoints(run),
        "renders": record_renders(run),
        "ranks": {str(rank): record_run(other, policy=policy) for rank, other in run.ranks.items()},
    }


@dataclass(frozen=True)
class RecordedRun(RunDir):
    """A run in a baseline. `path` is its file and `document` what that holds; `artefacts` are those of this rank.

    Properties raise KeyError, TypeError or ValueError where the document is none of ours: see `check`.
    """

    document: Data
    artefacts: Data
    rank: int = 0

    def check(self) -> None:
        """Reads everything once, so that what is broken is known before anything is compared."""
        _ = (self.trace, self.events, self.metrics, self.seeding, self.manifest, self.config, self.recorded)
        for artefact in ("checkpoints", "renders"):
            if not all(type(text) is str for table in self.digests(artefact).values() for text in table.values()):
                raise TypeError("a digest is no text")
        if not all(re.fullmatch(r"step-\d{1,15}", name) for name in self.digests("checkpoints")):
            raise ValueError("a checkpoint has no step")
        for run in self.ranks.values():
            if isinstance(run, RecordedRun):
                run.check()

    def digests(self, artefact: str) -> Mapping[str, Mapping[str, str]]:
        """Digests of checkpoints or renders: by step or image, then by name."""
        return {name: table_of(table) for name, table in table_of(self.artefacts[artefact]).items()}

    @cached_property
    def manifest(self) -> Data | None:
        """What the manifest said of the run as a whole."""
        request, run = table_of(self.document["request"]), table_of(self.document["run"])
        return {
            **{key: run[key] for key in ("completion", "parameters", "implementation", "encodings")},
            "run_id": None if self.rank else run["run_id"],
            "method": request["method"],
            "seed": request["seed"],
            "rank": self.rank,
            "world_size": request["ranks"],
            "environment": {"threads": table_of(table_of(self.document["environment"])["threads"])},
        }

    @cached_property
    def seeding(self) -> Data | None:
        """The claims of the seeding log."""
        claims = table_of(self.artefacts["seeding"])
        names = ("observed", "verdict")
        return {"entries": [{"claim": name, **dict(zip(names, c, strict=True))} for name, c in claims.items()]}

    @cached_property
    def config(self) -> Data | None:
        """The few settings of config.yml by which a run is described."""
        settings = table_of(self.document["config"])
        return {
            "machine": {"device_type": settings.get("machine.device_type")},
            "logging": {"steps_per_log": settings.get("logging.steps_per_log")},
        }

    @cached_property
    def transforms(self) -> Data | None:
        """Not kept: they follow from the data."""
        return None

    @cached_property
    def trace(self) -> Trace | None:
        """One digest for each stage of a step, or of some steps together."""
        trace = self.artefacts["trace"]
        return None if trace is None else decoded(table_of(trace))

    @cached_property
    def events(self) -> Events:
        """The curves; a tag of which only digests are kept holds records of the kind "digest"."""
        curves = table_of(self.artefacts["curves"])
        entries = {tag: table_of(entry) for tag, entry in curves.items()}
        records = {tag: _decoded_records(entry) for tag, entry in entries.items()}
        return Events(
            scalars={tag: _decoded_series(entry) for tag, entry in entries.items() if "values" in entry},
            blobs={tag: found for tag, found in records.items() if found},
            problems={},
            identity=(),
        )

    @cached_property
    def event_files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    @cached_property
    def metrics(self) -> Data | None:
        """The metrics, by their bits."""
        metrics = self.artefacts["metrics"]
        if metrics is None:
            return None
        images = {name: _decoded_numbers(values) for name, values in table_of(metrics["images"]).items()}
        return {**table_of(metrics), "images": images, "mean": _decoded_numbers(metrics["mean"])}

    @cached_property
    def checkpoints(self) -> Mapping[int, Path]:
        """None: see `digests`."""
        return {}

    @cached_property
    def renders(self) -> Mapping[str, Path]:
        """None: see `digests`."""
        return {}

    @cached_property
    def ranks(self) -> Mapping[int, RunDir]:
        """The ranks above 0."""
        ranks = sorted((int(rank), table_of(data)) for rank, data in table_of(self.artefacts["ranks"]).items())
        return {rank: RecordedRun(self.path, self.document, data, rank) for rank, data in ranks}

    @cached_property
    def recorded(self) -> frozenset[str]:
        """The artefacts of which there is anything here."""
        names = ("seeding", "trace", "curves", "metrics", "checkpoints", "renders")
        return frozenset({"setup", *(name for name in names if self.artefacts[name])})


@dataclass(frozen=True)
class DigestedRun(RunDir):
    """A run directory whose trace and curves are read as `baseline` keeps them."""

    policy: Policy
    baseline: RecordedRun

    @cached_property
    def trace(self) -> Trace | None:
        """The trace, with what could not be read."""
        trace, kept = RunDir(self.path).trace, self.baseline.artefacts["trace"]
        return trace if trace is None or kept is None else condensed(trace, together=int(kept["together"]))

    @cached_property
    def events(self) -> Events:
        """The curves, with what could not be read."""
        exact = self.baseline.events.scalars.keys()
        return digested(RunDir(self.path).events, policy=self.policy, exact=exact)


def table_of(value: Any) -> Data:
    """`value`, which must be a table."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{str(value)[:40]!r} is no table")
    return value


def digest_array(kind: str, array: npt.NDArray[Any]) -> str:
    """xxh3_128 of what the array is (dtype and shape in words) and of its bytes."""
    state = xxhash.xxh3_128(kind.encode())
    if array.size:
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def digest_bytes(data: bytes) -> str:
    """xxh3_128 of bytes."""
    return xxhash.xxh3_128(data).hexdigest()


def _seeding(run: RunDir) -> dict[str, list[str]]:
    claims = {} if run.seeding is None else claims_of(run.seeding)
    return {name: [claim["observed"], claim["verdict"]] for name, claim in claims.items()}


def _trace(run: RunDir) -> dict[str, Any] | None:
    trace = run.trace
    if trace is None:
        return None
    if trace.problem is not None or not trace.complete:
        raise UnreadableError(trace.problem or "its trace has no end.")
    together = steps_together(trace)
    return encoded(condensed(trace, together=together), together=together)


def digested(events: Events, *, policy: Policy, exact: Collection[str] | None = None) -> Events:
    """The curves as a baseline keeps them: scalars that are not kept exactly, and all else, as records of digests."""
    scalars = {tag: s for tag, s in events.scalars.items() if policy.reason_to_ignore("curves", tag) is None}
    blobs = {tag: b for tag, b in events.blobs.items() if policy.reason_to_ignore("curves", tag) is None}
    kept = set(_that_fit(scalars) if exact is None else exact)
    records: dict[str, tuple[Blob, ...]] = {tag: tuple(map(_digested_record, found)) for tag, found in blobs.items()}
    for tag in scalars.keys() - kept:
        records[tag] = (*_blocks(scalars[tag]), *records.get(tag, ()))
    return dataclasses.replace(
        events, scalars={tag: series for tag, series in scalars.items() if tag in kept}, blobs=records
    )


def _curves(run: RunDir, policy: Policy) -> dict[str, Any]:
    if run.events.problems:
        raise UnreadableError(" ".join(run.events.problems.values()))
    events = digested(run.events, policy=policy)
    return {
        tag: {
            **(_encoded_series(events.scalars[tag]) if tag in events.scalars else {}),
            "records": [[step, kind, digest.decode("ascii")] for step, kind, digest in events.blobs.get(tag, ())],
        }
        for tag in sorted({*events.scalars, *events.blobs})
    }


def _that_fit(scalars: Mapping[str, Series]) -> Iterator[str]:
    """The training loss and its parts first, then the others by name, as long as there is room."""
    left = EXACT_BYTES
    for tag in sorted(scalars, key=lambda tag: (tag != TRAIN_LOSS, not tag.startswith(TRAIN_LOSS), tag)):
        left -= scalars[tag].values.nbytes
        if tag == TRAIN_LOSS or left >= 0:
            yield tag


def _encoded_series(series: Series) -> dict[str, Any]:
    return {
        "steps": encoded_steps(series.steps),
        "dtype": series.values.dtype.name,
        "values": base64.b64encode(series.values.astype(series.values.dtype.newbyteorder("<")).tobytes()).decode(),
    }


def _decoded_series(entry: Data) -> Series:
    name = entry["dtype"]
    if name not in ("float32", "float64"):
        raise ValueError(f"{str(name)[:20]!r} is no type of scalars")
    values = np.frombuffer(base64.b64decode(entry["values"], validate=True), np.dtype(name).newbyteorder("<"))
    steps = decoded_steps(entry["steps"], values.size)
    return Series(steps=steps, values=values.astype(name), wall_times=np.zeros(values.shape, np.float64))


def _blocks(series: Series) -> Iterator[Blob]:
    """Digests of steps and values of at most `BLOCKS` pieces, each with its first step."""
    size = math.ceil(series.steps.size / BLOCKS)
    for start in range(0, series.steps.size, size):
        steps, values = series.steps[start : start + size], series.values[start : start + size]
        digest = digest_array(digest_array("steps", steps) + values.dtype.name, values)
        yield int(steps[0]), _DIGEST, digest.encode("ascii")


def _digested_record(record: Blob) -> Blob:
    """An image by its pixels, so that another encoder makes no difference; all else by its bytes."""
    step, kind, payload = record
    if kind == "image":
        try:
            picture = decode(payload, ".jpg" if payload.startswith(b"\xff\xd8") else ".png")
            digest = digest_array(f"{picture.layout} {picture.values.shape}", picture.values)
            return step, _DIGEST, digest.encode("ascii")
        except UnreadableError:
            pass  # then by its bytes, too
    return step, _DIGEST, digest_bytes(f"{kind} ".encode() + payload).encode("ascii")


def _decoded_records(entry: Data) -> tuple[Blob, ...]:
    return tuple((int(step), str(kind), str(digest).encode("ascii")) for step, kind, digest in entry["records"])


def _metrics(run: RunDir, policy: Policy) -> dict[str, Any] | None:
    metrics = run.metrics
    if metrics is None:
        return None
    try:
        images = {name: _encoded_numbers(values, policy) for name, values in metrics.get("images", {}).items()}
        mean = _encoded_numbers(metrics.get("mean", {}), policy)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UnreadableError(f"the metrics hold what is no number ({error}).") from error
    return {
        "split": metrics.get("split"),
        "images": images,
        "mean": mean,
        "unavailable": metrics.get("unavailable", {}),
    }


def _encoded_numbers(values: Mapping[str, Any], policy: Policy) -> dict[str, str | None]:
    """Each metric in decimal and by the bits of its float64."""
    return {
        name: None if value is None else f"{float(value)!r} 0x{struct.pack('>d', value).hex()}"
        for name, value in values.items()
        if policy.reason_to_ignore("metrics", name) is None
    }


def _decoded_numbers(values: Any) -> dict[str, float | None]:
    return {name: None if text is None else _decoded_number(text) for name, text in table_of(values).items()}


def _decoded_number(text: Any) -> float:
    _, _, bits = str(text).partition(" 0x")
    data = bytes.fromhex(bits)
    if len(data) != 8:
        raise ValueError("a metric has no bits")
    return float(struct.unpack(">d", data)[0])


def record_checkpoints(run: RunDir) -> dict[str, dict[str, str]]:
    """By checkpoint, of the last one every tensor and scalar, of the others one digest each."""
    steps = run.checkpoints
    found = {}
    for step, path in steps.items():
        leaves = {name: _leaf(value) for name, value in read_checkpoint(path).leaves().items()}
        if step != max(steps):
            leaves = {WHOLE: f"{len(leaves)} values {digest_bytes(repr(leaves).encode())}"}
        found[f"step-{step:09d}"] = leaves
    return found


def _leaf(value: Any) -> str:
    """What a leaf of a checkpoint is, exactly, in words and as a digest."""
    if isinstance(value, Tensor):
        kind = f"{value.dtype} {list(value.shape)}"
        return f"{kind} {digest_array(kind, value.array)}"
    if isinstance(value, float):
        return f"float {value!r} 0x{struct.pack('>d', value).hex()}"
    text = f"{type(value).__name__} {sorted(value, key=repr) if isinstance(value, set) else value!r}"
    return text if len(text) <= 80 else f"{text[:40]}... {digest_bytes(text.encode('utf8', 'surrogatepass'))}"


def record_renders(run: RunDir) -> dict[str, dict[str, str]]:
    """By image, for each output the digest of its lossless values, or of its picture where there is nothing else."""
    files = run.renders
    found: dict[str, dict[str, str]] = {}
    for name, path in files.items():
        if any(name.endswith(end) and name.removesuffix(end) + better in files for end, better in _DERIVED.items()):
            continue
        run.file(str(path.relative_to(run.path)))  # refuses what a link on the way leads out of the run
        picture = decode(read_file(path), path.name)
        kind = f"{picture.layout} {picture.values.dtype} {list(picture.values.shape)}"
        image, _, output = name.rpartition("/")
        found.setdefault(image or ".", {})[output.removesuffix(".npy")] = f"{kind} {digest_array(kind, picture.values)}"
    return found
