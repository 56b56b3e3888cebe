from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from f3rm_verify.readers.events import Events, decode_scalar, read_events

STEPS = st.integers(0, 2**63 - 1)
TAGS = st.text(min_size=1, max_size=300)
FLOATS = st.floats(width=32, allow_nan=False)


def scalar(tag: str, step: int, value: float, wall_time: float = 1.5e9) -> event_pb2.Event:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    return event_pb2.Event(wall_time=wall_time, step=step, summary=summary)


def tensor_scalar(tag: str, step: int, value: float, *, double: bool = False) -> event_pb2.Event:
    """As `SummaryWriter.add_scalar(..., new_style=True)` makes it."""
    tensor = TensorProto(dtype="DT_DOUBLE", double_val=[value]) if double else TensorProto(dtype=1, float_val=[value])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    return event(step, Summary.Value(tag=tag, tensor=tensor, metadata=metadata))


def event(step: int, *values: Summary.Value, wall_time: float = 1.5e9) -> event_pb2.Event:
    return event_pb2.Event(wall_time=wall_time, step=step, summary=Summary(value=values))


def write_records(path: Path, records: Iterable[bytes]) -> Path:
    with path.open("wb") as stream:
        writer = RecordWriter(stream)
        for data in records:
            writer.write(data)
        writer.flush()
    return path


def write(path: Path, events: Iterable[event_pb2.Event], *, start: float = 1.5e9) -> Path:
    version = event_pb2.Event(wall_time=start, file_version="brain.Event:2")
    return write_records(path, [item.SerializeToString() for item in (version, *events)])


def plain(events: Events) -> dict[str, list[tuple[int, float]]]:
    return {tag: list(zip(s.steps.tolist(), s.values.tolist(), strict=True)) for tag, s in events.scalars.items()}


def test_what_tensorboards_own_writer_wrote(tmp_path: Path) -> None:
    writer = EventFileWriter(str(tmp_path))
    expected = [(step, np.float32(step * 0.1)) for step in range(50)]
    for step, value in expected:
        writer.add_event(scalar("Train Loss", step, value, wall_time=1.5e9 + step))
    writer.close()
    events = read_events(sorted(tmp_path.iterdir()))
    assert plain(events) == {"Train Loss": expected}
    assert events.scalars["Train Loss"].values.dtype == np.float32
    assert events.scalars["Train Loss"].wall_times.tolist() == [1.5e9 + step for step, _ in expected]
    assert events.problems == {}
    assert len(events.identity) == 2


def test_what_torchs_writer_wrote(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("old", 0.1, 7)
    writer.add_scalar("new", 0.1, 8, new_style=True)
    writer.add_scalar("double", 0.1, 9, new_style=True, double_precision=True)
    writer.add_text("config", "seed: 42")
    writer.add_image("img", np.zeros((2, 3, 3), np.uint8), 4, dataformats="HWC")
    writer.add_histogram("weights", np.arange(10.0), 5)
    writer.close()
    events = read_events(sorted(tmp_path.iterdir()))
    third = float(np.float32(0.1))
    assert plain(events) == {"old": [(7, third)], "new": [(8, third)], "double": [(9, 0.1)]}
    assert {tag: blobs[0][:2] for tag, blobs in events.blobs.items()} == {
        "config/text_summary": (0, "text"),
        "img": (4, "image"),
        "weights": (5, "histogram"),
    }
    assert events.blobs["config/text_summary"][0][2] == b"seed: 42"
    assert events.blobs["img"][0][2].startswith(b"\x89PNG")


@given(TAGS, STEPS, st.floats(allow_nan=False), FLOATS)
def test_the_fast_path_reads_what_protobuf_reads(tag: str, step: int, wall_time: float, value: float) -> None:
    data = scalar(tag, step, value, wall_time).SerializeToString()
    assert decode_scalar(data) == (tag, step, struct.pack("<f", value), struct.pack("<d", wall_time)) or wall_time == 0


@given(TAGS, STEPS, st.floats(allow_nan=False), st.booleans())
def test_the_fast_path_reads_new_style_scalars(tag: str, step: int, value: float, double: bool) -> None:
    value = value if double else float(np.float32(np.clip(value, -3e38, 3e38)))
    decoded = decode_scalar(tensor_scalar(tag, step, value, double=double).SerializeToString())
    assert decoded is not None
    assert decoded[:3] == (tag, step, struct.pack("<d" if double else "<f", value))


BYTES = st.one_of(st.just(b""), st.binary(min_size=1, max_size=3), st.sampled_from([b"\x15", b"\x2a\x07", b"\x0a\x80"]))


@settings(max_examples=400)
@given(st.data())
def test_where_the_fast_path_answers_protobuf_agrees(data: st.DataObject) -> None:
    """Bytes of an event are replaced, inserted and removed; what it accepts must be what protobuf reads."""
    make = data.draw(st.sampled_from([scalar, tensor_scalar]))
    raw = make(data.draw(st.text(max_size=4)), data.draw(st.integers(0, 300)), 1.25).SerializeToString()
    start = data.draw(st.integers(0, len(raw)))
    raw = raw[:start] + data.draw(BYTES) + raw[start + data.draw(st.integers(0, 3)) :]
    decoded = decode_scalar(raw)
    if decoded is None:
        return
    tag, step, bits, wall_time = decoded
    parsed = event_pb2.Event.FromString(raw)
    (value,) = parsed.summary.value
    assert (value.tag, parsed.step) == (tag, step)
    number = (
        value.simple_value if value.HasField("simple_value") else (*value.tensor.float_val, *value.tensor.double_val)[0]
    )
    np.testing.assert_equal(struct.unpack("<f" if len(bits) == 4 else "<d", bits)[0], number)
    np.testing.assert_equal(struct.unpack("<d", wall_time)[0], parsed.wall_time)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", ""]), st.integers(-(2**63), 2**63 - 1), FLOATS), max_size=8))
def test_several_values_in_one_event_and_negative_steps(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, float]]
) -> None:
    events = [event(step, *[Summary.Value(tag=tag, simple_value=value)] * 2) for tag, step, value in rows]
    read = read_events([write(tmp_path_factory.mktemp("events") / "events", events)])
    expected: dict[str, list[tuple[int, float]]] = {}
    for tag, step, value in rows:
        expected.setdefault(tag, []).extend([(step, value)] * 2)
    assert plain(read) == expected


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FC12345, 0x80000000, 0x7F800000, 0x00000001])
@pytest.mark.parametrize("make", [scalar, tensor_scalar])
def test_bits_are_kept(tmp_path: Path, bits: int, make: Any) -> None:
    raw = make("loss", 3, 1.0).SerializeToString().replace(struct.pack("<f", 1.0), struct.pack("<I", bits))
    events = read_events([write_records(tmp_path / "events", [raw])])
    assert events.scalars["loss"].values.view(np.uint32).tolist() == [bits]


def test_a_tensor_in_other_layouts_is_a_scalar_only_without_dimensions(tmp_path: Path) -> None:
    content = TensorProto(dtype=1, tensor_content=struct.pack("<f", 0.5), tensor_shape=TensorShapeProto())
    vector = TensorProto(dtype=1, float_val=[1, 2], tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=2)]))
    half = TensorProto(dtype=19, half_val=[1])
    tensors = {"content": content, "vector": vector, "half": half}
    values = [Summary.Value(tag=tag, tensor=tensor) for tag, tensor in tensors.items()]
    events = read_events([write(tmp_path / "events", [event(1, *values)])])
    assert plain(events) == {"content": [(1, 0.5)]}
    assert events.blobs == {
        "half": ((1, "tensor", half.SerializeToString()),),
        "vector": ((1, "tensor", vector.SerializeToString()),),
    }


def test_one_tag_written_as_both_float_types(tmp_path: Path) -> None:
    events = read_events([write(tmp_path / "e", [scalar("x", 1, 0.5), tensor_scalar("x", 2, 0.1, double=True)])])
    assert events.scalars["x"].values.dtype == np.float64
    assert plain(events) == {"x": [(1, 0.5), (2, 0.1)]}


def test_other_records(tmp_path: Path) -> None:
    histogram = HistogramProto(min=0, max=1, num=2, bucket_limit=[1], bucket=[2])
    values = [
        Summary.Value(tag="histogram", histo=histogram),
        Summary.Value(tag="audio", audio=Summary.Audio(encoded_audio_string=b"RIFF")),
        Summary.Value(tag="nothing"),
    ]
    events = read_events([write(tmp_path / "events", [event(5, *values)])])
    assert events.blobs == {
        "audio": ((5, "audio", b"RIFF"),),
        "histogram": ((5, "histogram", histogram.SerializeToString()),),
    }
    assert isinstance(events.blobs["audio"][0][2], bytes)


def test_steps_that_a_restart_repeats_are_all_kept_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "events.1", [scalar("loss", step, step) for step in (0, 1, 2, 3)])
    second = write(tmp_path / "events.2", [scalar("loss", step, -step) for step in (2, 3, 4)])
    expected = [(0, 0), (1, 1), (2, 2), (3, 3), (2, -2), (3, -3), (4, -4)]
    assert plain(read_events([first, second])) == {"loss": expected}


def small_file(path: Path) -> tuple[bytes, list[int]]:
    """The bytes of a file of four scalars and the ends of its records."""
    write(path, [scalar("loss", step, step / 3, wall_time=1.5e9 + step) for step in range(4)])
    data, ends, position = path.read_bytes(), [], 0
    while position < len(data):
        position += 16 + struct.unpack_from("<Q", data, position)[0]
        ends.append(position)
    return data, ends


def test_a_file_cut_off_anywhere_gives_the_records_before(tmp_path: Path) -> None:
    path = tmp_path / "events"
    data, ends = small_file(path)
    full = plain(read_events([path]))["loss"]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        events = read_events([path])
        n_records = sum(end <= size for end in ends)
        assert plain(events).get("loss", []) == full[: max(n_records - 1, 0)]
        assert set(events.problems) == (set() if size in (0, *ends) else {"events"})
    path.write_bytes(data[:-3])
    problem = "events: ends in the middle of record 5, as a killed run leaves it; the 4 before it were read."
    assert read_events([path]).problems == {"events": problem}


def test_every_flipped_bit_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "events"
    data, ends = small_file(path)
    full = plain(read_events([path]))["loss"]
    for position in range(len(data)):
        for bit in range(0, 8, 3):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            events = read_events([path])
            n_records = sum(end <= position for end in ends)
            assert plain(events).get("loss", []) == full[: max(n_records - 1, 0)]
            assert f"record {n_records + 1} at byte" in events.problems["events"]


@given(st.binary(max_size=200))
def test_garbage_is_a_problem(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "events"
    path.write_bytes(data)
    events = read_events([path])
    assert (events.scalars, events.blobs, events.identity) == ({}, {}, ())
    assert set(events.problems) == ({"events"} if data else set())


@given(st.binary(min_size=1, max_size=60))
def test_records_that_hold_no_event_are_a_problem(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = write_records(tmp_path_factory.mktemp("records") / "events", [data])
    try:
        event_pb2.Event.FromString(data)
    except (DecodeError, UnicodeDecodeError):
        assert "record 1 is no TensorBoard event" in read_events([path]).problems["events"]
    else:
        assert read_events([path]).problems == {}


def test_a_record_longer_than_the_file_is_not_allocated(tmp_path: Path) -> None:
    path = write_records(tmp_path / "events", [b""])
    header = struct.pack("<Q", 2**62)
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    path.write_bytes(path.read_bytes() + header + struct.pack("<I", masked_crc32c(header)) + b"x" * 100)
    assert "ends in the middle of record 2" in read_events([path]).problems["events"]


def test_one_bad_file_does_not_hide_the_others(tmp_path: Path) -> None:
    good = write(tmp_path / "events.2", [scalar("loss", 1, 0.5)])
    (tmp_path / "events.1").mkdir()
    events = read_events([tmp_path / "events.1", good, tmp_path / "events.3"])
    assert plain(events) == {"loss": [(1, 0.5)]}
    assert events.problems == {
        "events.1": "events.1: not a regular file.",
        "events.3": "events.3: not readable (No such file or directory).",
    }


def run(path: Path, start: float, values: list[float]) -> Path:
    losses = [scalar("loss", step, value, wall_time=start + 0.25 + step) for step, value in enumerate(values)]
    return write(path, losses, start=start)


def test_a_copy_has_the_same_identity_and_another_run_has_not(tmp_path: Path) -> None:
    original = run(tmp_path / "a", 1.7e9, [1, 2, 3])
    edited = run(tmp_path / "b", 1.7e9, [1, 2, 4])
    cut = tmp_path / "c"
    cut.write_bytes(original.read_bytes()[:-10])
    resumed = run(tmp_path / "0", 1.7e9 + 100, [9])
    other = run(tmp_path / "d", 1.7e9 + 2**-22, [1, 2, 3])
    identity = read_events([original]).identity
    assert read_events([edited]).identity == identity
    assert read_events([cut]).identity == identity
    assert read_events([resumed, original]).identity == identity
    assert read_events([other]).identity != identity


def test_a_log_without_a_clock_has_no_identity(tmp_path: Path) -> None:
    path = write(tmp_path / "events", [scalar("loss", 0, 1, wall_time=0)], start=0)
    assert read_events([path]).identity == ()
    assert plain(read_events([path])) == {"loss": [(0, 1)]}


def test_a_new_style_scalar_with_a_description_is_left_to_protobuf(tmp_path: Path) -> None:
    value = Summary.Value(tag="x", simple_value=2, metadata=summary_pb2.SummaryMetadata(summary_description="about x"))
    assert decode_scalar(event(1, value).SerializeToString()) is None
    assert plain(read_events([write(tmp_path / "events", [event(1, value)])])) == {"x": [(1, 2)]}


def test_reading_is_not_slow(tmp_path: Path) -> None:
    """20,000 scalars; with protobuf alone they take a quarter of a second, and here a tenth of the bound."""
    path = write(tmp_path / "events", [])
    record = write_records(tmp_path / "one", [scalar("Train Loss", 1, 0.5).SerializeToString()]).read_bytes()
    path.write_bytes(path.read_bytes() + record * 20_000)
    start = time.process_time()
    assert read_events([path]).scalars["Train Loss"].steps.size == 20_000
    assert time.process_time() - start < 1
