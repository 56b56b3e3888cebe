from __future__ import annotations

import io
import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from f3rm_verify.assets import Assets, asset_names
from f3rm_verify.compare_curves import all_nan_losses, compare_curves, first_divergent_curve, observed_steps
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.policy import IGNORED_TAGS, Limit, Policy
from f3rm_verify.run_dir import RunDir

Values = Sequence[tuple[int, Any]]
FILE = "events.out.tfevents.1700000000.host.1.0"


def value_of(tag: str, value: Any) -> Summary.Value:
    if isinstance(value, bytes):
        return Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=value))
    if isinstance(value, str):
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(dtype=7, string_val=[value.encode()]))
    if isinstance(value, np.float64):
        return Summary.Value(tag=tag, tensor=TensorProto(dtype=2, double_val=[value]))
    return Summary.Value(tag=tag, simple_value=value)


def write_events(path: Path, tags: Mapping[str, Values], *, start: float = 1.7e9) -> None:
    events = [event_pb2.Event(wall_time=start, file_version="brain.Event:2")]
    rows = sorted((step, index, tag, value) for tag, rows in tags.items() for index, (step, value) in enumerate(rows))
    for step, _, tag, value in rows:
        events.append(event_pb2.Event(wall_time=start + 1, step=step, summary=Summary(value=[value_of(tag, value)])))
    with path.open("wb") as stream:
        writer = RecordWriter(stream)
        for event in events:
            writer.write(event.SerializeToString())
        writer.flush()


Make = Callable[..., RunDir]


@pytest.fixture
def run(tmp_path: Path) -> Make:
    """Makes run directories out of the values of each tag."""
    count = 0

    def make(tags: Mapping[str, Values], **options: Any) -> RunDir:
        nonlocal count
        count += 1
        path = tmp_path / str(count)
        path.mkdir()
        write_events(path / FILE, tags, **options)
        return RunDir(path)

    return make


def compare(reference: RunDir, candidate: RunDir, policy: Policy | None = None) -> Difference:
    """The comparison, after a check that it gives the same verdicts with the sides swapped."""
    policy = policy or Policy()
    node = compare_curves(reference, candidate, policy=policy)
    swapped = compare_curves(candidate, reference, policy=policy)
    assert node.verdict is swapped.verdict
    if not any(child.verdict in (Verdict.UNREADABLE, Verdict.MISSING) for child in node.children):
        assert {path: n.verdict for path, n in node.walk()} == {path: n.verdict for path, n in swapped.walk()}
    assert Difference.from_dict(node.to_dict()).to_dict() == node.to_dict()
    return node


def children(node: Difference) -> dict[str, Difference]:
    assert len({child.name for child in node.children}) == len(node.children)
    return {child.name: child for child in node.children}


def verdicts(node: Difference) -> dict[str, str]:
    return {name: child.verdict.value for name, child in children(node).items()}


def png(pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


PIXELS = (np.arange(4 * 6 * 3) % 256).astype(np.uint8).reshape(4, 6, 3)
LOSSES = [(step, float(np.float32(1 / (step + 1)))) for step in range(40)]
TAGS: Mapping[str, Values] = {
    "Train Loss": LOSSES,
    "Train Loss Dict/rgb_loss": LOSSES,
    "Train Metrics Dict/psnr": [(step, 10.0 + step) for step in range(40)],
    "Eval Images/img": [(step, png(PIXELS)) for step in (0, 20)],
    "notes/text_summary": [(0, "seeded")],
}
IDENTICAL = dict.fromkeys(sorted(TAGS), "identical")


def changed(tag: str, step: int, value: Any) -> dict[str, Values]:
    """The tags with another value at one step of one."""
    return {**TAGS, tag: [(s, value if s == step else old) for s, old in TAGS[tag]]}


def test_a_run_is_identical_to_itself_and_to_its_twin(run: Make) -> None:
    reference, candidate = run(TAGS), run(TAGS, start=1.8e9)
    for other in (reference, candidate):
        node = compare(reference, other)
        assert (node.name, node.artefact, node.verdict) == ("curves", "curves", Verdict.IDENTICAL)
        assert verdicts(node) == IDENTICAL
    assert children(node)["Train Loss"].measures == {"kind": "scalar", "n": 40, "last_equal_step": 39}
    assert first_divergent_curve(node) is None
    assert reference.events is reference.events


def test_one_ulp_in_one_scalar_is_different_there_and_nowhere_else(run: Make) -> None:
    value = float(np.float32(1 / 13))
    other = float(np.nextafter(np.float32(value), np.float32(1)))
    node = compare(run(TAGS), run(changed("Train Loss", 12, other)))
    assert verdicts(node) == {**IDENTICAL, "Train Loss": "different"}
    leaf = children(node)["Train Loss"]
    expected = {
        "kind": "scalar",
        "first_step": 12,
        "last_equal_step": 11,
        "n": 40,
        "n_different": 1,
        "max_abs": other - value,
        "max_ulp": 1,
        "at_step": 12,
        "reference_value": "0.07692308",
        "candidate_value": "0.07692309",
        "reference_bits": "0x3d9d89d9",
        "candidate_bits": "0x3d9d89da",
        "n_nan_mismatch": 0,
        "n_sign_of_zero": 0,
    }
    assert {key: leaf.measures[key] for key in expected} == expected
    assert leaf.measures["max_rel"] == pytest.approx((other - value) / other)
    assert leaf.summary.startswith("differs first at step 12: 0.07692308 against 0.07692309; 1 of 40 values differs")
    assert first_divergent_curve(node) == (12, "Train Loss")


def test_the_greatest_difference_is_named_by_its_step(run: Make) -> None:
    worse = [(step, 8.0 + (step > 30) + 2.0 * (step == 36)) for step, _ in LOSSES]
    leaf = children(
        compare(run({**TAGS, "Train Loss": [(s, 8.0) for s, _ in LOSSES]}), run({**TAGS, "Train Loss": worse}))
    )["Train Loss"]
    assert (leaf.measures["first_step"], leaf.measures["n_different"], leaf.measures["at_step"]) == (31, 9, 36)


@pytest.mark.parametrize(
    ("reference", "candidate", "key"),
    [(0.0, -0.0, "n_sign_of_zero"), (math.nan, 1.0, "n_nan_mismatch"), (math.nan, math.inf, "n_nan_mismatch")],
)
def test_zeros_by_sign_and_nan_against_numbers_differ(run: Make, reference: float, candidate: float, key: str) -> None:
    node = compare(run({"x": [(0, 1.0), (1, reference)]}), run({"x": [(0, 1.0), (1, candidate)]}))
    leaf = children(node)["x"]
    assert leaf.verdict is Verdict.DIFFERENT
    assert (leaf.measures["first_step"], leaf.measures[key]) == (1, 1)


def test_nan_is_identical_to_the_same_nan_and_different_from_another(run: Make) -> None:
    reference, same, other = (run({"x": [(0, 1.0)]}) for _ in range(3))
    for side, bits in ((reference, 0x7FC00000), (same, 0x7FC00000), (other, 0xFFC00000)):
        event = event_pb2.Event(wall_time=1.0, summary=Summary(value=[value_of("x", 1.0)])).SerializeToString()
        with (side.path / FILE).open("wb") as stream:
            RecordWriter(stream).write(event.replace(struct.pack("<f", 1.0), struct.pack("<I", bits)))
    assert verdicts(compare(reference, same)) == {"x": "identical"}
    assert verdicts(compare(reference, other)) == {"x": "different"}


def test_a_killed_run_is_a_prefix(run: Make) -> None:
    long = [(step, step / 7) for step in range(1000)]
    node = compare_curves(run({"Train Loss": long}), run({"Train Loss": long[:512]}), policy=Policy())
    (leaf,) = node.children
    assert leaf.verdict is Verdict.MISSING
    assert leaf.summary == "equal for 512 common steps, then only the reference goes on to 999"
    assert leaf.measures == {"kind": "scalar", "n": 512, "last_equal_step": 511, "n_only_reference": 488}
    assert first_divergent_curve(node) is None


def test_steps_missing_in_the_middle_or_on_both_sides(run: Make) -> None:
    node = compare(run({"x": [(0, 1.0), (1, 1.0), (2, 1.0)]}), run({"x": [(0, 1.0), (2, 1.0), (3, 1.0)]}))
    (leaf,) = node.children
    assert leaf.verdict is Verdict.MISSING
    extra = "only the reference has 1 more, from step 1 to 1 and only the candidate goes on to 3"
    assert leaf.summary == f"equal for 2 common steps, then {extra}"
    assert verdicts(compare(run({"x": [(0, 1.0)]}), run({"x": [(1, 1.0)]}))) == {"x": "missing"}


def test_a_difference_wins_over_missing_steps(run: Make) -> None:
    node = compare(run({"x": LOSSES}), run({"x": [(0, 5.0), *LOSSES[1:9]]}))
    (leaf,) = node.children
    assert leaf.verdict is Verdict.DIFFERENT
    assert (leaf.measures["last_equal_step"], leaf.measures["n_only_reference"]) == (None, 31)


def test_a_repeated_step_is_compared_occurrence_by_occurrence(run: Make) -> None:
    first = [(0, 1.0), (1, 1.0), (2, 1.0), (1, 3.0), (2, 4.0)]
    second = [(0, 1.0), (1, 1.0), (2, 1.0), (1, 3.0), (2, 5.0)]
    assert verdicts(compare(run({"x": first}), run({"x": first}))) == {"x": "identical"}
    (leaf,) = compare(run({"x": first}), run({"x": second})).children
    assert leaf.verdict is Verdict.DIFFERENT
    assert (leaf.measures["first_step"], leaf.measures["last_equal_step"]) == (2, 1)
    assert verdicts(compare(run({"x": first}), run({"x": first[:3]}))) == {"x": "missing"}


@given(st.data())
def test_alignment_is_that_of_a_plain_loop(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = st.lists(st.tuples(st.integers(-2, 3), st.sampled_from([0.0, 1.0, math.nan])), min_size=1, max_size=8)
    sides = [data.draw(rows), data.draw(rows)]
    keyed = []
    for side in sides:
        keys: dict[tuple[int, int], bytes] = {}
        for step, value in sorted(side, key=lambda row: row[0]):
            keys[step, sum(s == step for s, _ in keys)] = struct.pack("<f", value)
        keyed.append(keys)
    common = sorted(keyed[0].keys() & keyed[1].keys())
    differing = [key[0] for key in common if keyed[0][key] != keyed[1][key]]
    complete = keyed[0].keys() == keyed[1].keys()
    runs = []
    for side in sides:
        path = tmp_path_factory.mktemp("run")
        write_events(path / FILE, {"x": side})
        runs.append(RunDir(path))
    (leaf,) = compare(*runs).children
    assert leaf.verdict.value == ("different" if differing else "identical" if complete else "missing")
    assert leaf.measures.get("first_step") == (differing[0] if differing else None)
    assert leaf.measures.get("n_different", 0) == len(differing)


@pytest.mark.parametrize("tag", ["Train Iter (time)", "Train Rays / Sec", "config/text_summary"])
def test_what_differs_by_nature_is_ignored_with_its_reason(run: Make, tag: str) -> None:
    sides = run({**TAGS, tag: [(0, "a")]}), run({**TAGS, tag: [(0, "b")]})
    leaf = children(compare(*sides))[tag]
    assert leaf.verdict is Verdict.IGNORED
    assert leaf.summary in IGNORED_TAGS.values()
    assert compare(*sides).verdict is Verdict.IDENTICAL
    assert compare(*sides, Policy(ignored={})).verdict is Verdict.DIFFERENT


def test_an_ignored_tag_of_one_side_says_so(run: Make) -> None:
    node = compare(run({**TAGS, "ETA (time)": [(0, 1.0)]}), run(TAGS))
    leaf = children(node)["ETA (time)"]
    assert (leaf.verdict, leaf.summary) == (Verdict.IGNORED, "a duration; only the reference has it")


def test_ignoring_everything_is_no_verdict(run: Make) -> None:
    assert compare(run(TAGS), run(TAGS), Policy(ignored={"curves": {"*": "on request"}})).verdict is Verdict.UNREADABLE


def test_a_tag_of_one_side_is_missing(run: Make) -> None:
    node = compare(run(TAGS), run({**TAGS, "Eval Loss": [(5, 1.0), (9, 1.0)], "Eval Images/acc": [(3, png(PIXELS))]}))
    assert verdicts(node) == {**IDENTICAL, "Eval Loss": "missing", "Eval Images/acc": "missing"}
    leaf = children(node)["Eval Loss"]
    assert leaf.summary == "only the candidate has it (2 records, steps 5 to 9)"
    assert leaf.measures["missing_in"] == "reference"


def test_a_tag_that_is_a_scalar_here_and_an_image_there(run: Make) -> None:
    node = compare(run({"x": [(0, 1.0)]}), run({"x": [(0, png(PIXELS))]}))
    assert verdicts(children(node)["x"]) == {"scalars": "missing", "records": "missing"}


def test_scalars_of_another_type_are_different(run: Make) -> None:
    node = compare(run({"x": [(0, 0.5)]}), run({"x": [(0, np.float64(0.5))]}))
    (leaf,) = node.children
    assert leaf.verdict is Verdict.DIFFERENT
    assert leaf.summary == "written as float32 in the reference, float64 in the candidate"
    assert first_divergent_curve(node) is None


def test_an_image_that_is_only_encoded_otherwise_is_identical(run: Make) -> None:
    sides = run(TAGS), run(changed("Eval Images/img", 20, png(PIXELS, compress_level=0)))
    leaf = children(compare(*sides))["Eval Images/img"]
    assert leaf.verdict is Verdict.IDENTICAL
    assert leaf.summary == "2 equal records (1 with the same pixels, only encoded otherwise)"


def test_one_level_in_one_pixel_is_different(run: Make) -> None:
    pixels = PIXELS.copy()
    pixels[2, 3, 1] += 1
    node = compare(run(TAGS), run(changed("Eval Images/img", 20, png(pixels))))
    assert verdicts(node) == {**IDENTICAL, "Eval Images/img": "different"}
    leaf = children(node)["Eval Images/img"]
    expected = {"kind": "image", "first_step": 20, "last_equal_step": 0, "n": 2, "n_different": 1}
    expected |= {"n_pixels": 24, "n_different_pixels": 1, "max_abs": 1}
    assert {key: leaf.measures[key] for key in expected} == expected
    assert leaf.summary == "differs first at step 20: 1 of 24 pixels; 1 of 2 records differ"
    assert first_divergent_curve(node) is None


def test_the_first_image_that_differs_is_kept_for_the_reports(run: Make, tmp_path: Path) -> None:
    sides = run(TAGS), run(changed("Eval Images/img", 20, png(PIXELS ^ 1)))
    assets = Assets(tmp_path / "r.assets")
    node = compare_curves(*sides, policy=Policy(), assets=assets)
    assert {name: {*asset_names(child)} for name, child in children(node).items() if asset_names(child)} == {
        "Eval Images/img": {"reference", "candidate", "heat", "thumbnail"},
        **{name: {"series"} for name in TAGS if name == "Train Loss" or "psnr" in name.lower()},
    }
    names = asset_names(children(node)["Eval Images/img"])
    assert [assets.read(names[side]) for side in ("reference", "candidate")] == [png(PIXELS), png(PIXELS ^ 1)]


def test_images_within_limits(run: Make) -> None:
    pixels = PIXELS.copy()
    pixels[2, 3, 1] += 1
    sides = run(TAGS), run(changed("Eval Images/img", 20, png(pixels)))
    for numbers, verdict in (
        ({"absolute": 1}, Verdict.WITHIN_TOLERANCE),
        ({"pixels": 1 / 24}, Verdict.WITHIN_TOLERANCE),
        ({"psnr": 40}, Verdict.WITHIN_TOLERANCE),
        ({"absolute": 0.5}, Verdict.DIFFERENT),
        ({"pixels": 0.04}, Verdict.DIFFERENT),
        ({"psnr": 90}, Verdict.DIFFERENT),
    ):
        limit = Limit(pattern="Eval Images/*", **numbers)
        leaf = children(compare(*sides, Policy(limits={"curves": (limit,)})))["Eval Images/img"]
        assert leaf.verdict is verdict
        assert f"the limits of {limit}" in leaf.summary


def test_texts_have_no_limits(run: Make) -> None:
    policy = Policy(limits={"curves": (Limit(pattern="*", absolute=1e9, pixels=0.9),)})
    node = compare(run(TAGS), run(changed("notes/text_summary", 0, "not seeded")), policy)
    assert children(node)["notes/text_summary"].verdict is Verdict.DIFFERENT


def test_images_of_other_shape_or_kind_are_different(run: Make) -> None:
    for other in (png(PIXELS[:2]), png(PIXELS[:, :, 0]), "a text"):
        node = compare(run(TAGS), run(changed("Eval Images/img", 0, other)))
        assert verdicts(node) == {**IDENTICAL, "Eval Images/img": "different"}


def test_an_image_that_cannot_be_decoded_is_unreadable_unless_another_differs(run: Make) -> None:
    broken = changed("Eval Images/img", 0, png(PIXELS)[:-20])
    leaf = children(compare(run(TAGS), run(broken)))["Eval Images/img"]
    assert leaf.verdict is Verdict.UNREADABLE
    assert leaf.summary.startswith("the images at step 0 differ, and one cannot be decoded: step-0.png: ")
    worse = {**broken, "Eval Images/img": [broken["Eval Images/img"][0], (20, png(255 - PIXELS))]}
    leaf = children(compare(run(TAGS), run(worse)))["Eval Images/img"]
    assert (leaf.verdict, leaf.measures["first_step"]) == (Verdict.DIFFERENT, 20)
    assert leaf.measures["last_equal_step"] is None


def test_texts_are_compared_by_content(run: Make) -> None:
    node = compare(run(TAGS), run(changed("notes/text_summary", 0, "not seeded")))
    assert verdicts(node) == {**IDENTICAL, "notes/text_summary": "different"}
    leaf = children(node)["notes/text_summary"]
    assert leaf.summary == "differs first at step 0: text of 6 bytes against 10; 1 of 1 records differ"


def test_a_truncated_file_is_unreadable_and_the_rest_is_compared(run: Make) -> None:
    reference, candidate = run(TAGS), run(TAGS)
    data = (candidate.path / FILE).read_bytes()
    for lost in (1, 30, 57, len(data) // 2, len(data) - 3, len(data)):
        (candidate.path / FILE).write_bytes(data[: len(data) - lost])
        node = compare(reference, RunDir(candidate.path))
        found = verdicts(node)
        problem = found.pop(f"candidate {FILE}", None)
        assert problem == (None if lost == len(data) else "unreadable")
        assert set(found.values()) <= {"identical", "missing"}
        assert node.verdict in (Verdict.UNREADABLE, Verdict.MISSING)


def test_a_difference_before_the_damage_is_still_found(run: Make) -> None:
    candidate = run(changed("Train Loss", 1, 9.0))
    path = candidate.path / FILE
    path.write_bytes(path.read_bytes()[:-9])
    node = compare(run(TAGS), candidate)
    assert node.verdict is Verdict.DIFFERENT
    assert first_divergent_curve(node) == (1, "Train Loss")
    assert verdicts(node)[f"candidate {FILE}"] == "unreadable"


def test_a_flipped_bit_is_never_identical(run: Make) -> None:
    tags = {"Train Loss": LOSSES[:3], "ETA (time)": [(1, 1.0)]}
    reference, candidate = run(tags), run(tags)
    data = (candidate.path / FILE).read_bytes()
    for position in range(len(data)):
        (candidate.path / FILE).write_bytes(
            data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
        )
        node = compare_curves(reference, RunDir(candidate.path), policy=Policy())
        assert node.verdict is Verdict.UNREADABLE
        assert verdicts(node)[f"candidate {FILE}"] == "unreadable"


def test_a_side_without_events_is_missing(run: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = RunDir(tmp_path / "empty")
    node = compare(run(TAGS), empty)
    assert verdicts(node) == {"candidate events": "missing", **dict.fromkeys(sorted(TAGS), "missing")}
    assert verdicts(compare(empty, empty)) == {"reference events": "missing", "candidate events": "missing"}
    assert (all_nan_losses(empty), observed_steps(empty)) == (None, None)


def test_a_link_out_of_the_run_directory_is_unreadable(run: Make, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    linked, other = RunDir(tmp_path / "linked"), run(TAGS)
    (linked.path / FILE).symlink_to(other.path / FILE)
    assert verdicts(compare(other, linked)) == {"candidate event files": "unreadable"}
    assert (all_nan_losses(linked), observed_steps(linked)) == (None, None)


def test_several_files_of_one_run_are_one_curve(run: Make) -> None:
    whole = run({"x": LOSSES})
    parts = run({"x": LOSSES[:10]})
    write_events(parts.path / "events.out.tfevents.1700000001.host.1.0", {"x": LOSSES[10:]})
    assert verdicts(compare(whole, parts)) == {"x": "identical"}


def test_a_copied_run_has_the_identity_of_the_original(run: Make, tmp_path: Path) -> None:
    original, twin = run(TAGS), run(TAGS, start=1.7e9 + 1e-3)
    shutil.copytree(original.path, tmp_path / "copy")
    assert RunDir(tmp_path / "copy").events.identity == original.events.identity != twin.events.identity


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([math.nan, math.nan], True), ([math.nan, 1.0], False), ([math.inf], False), ([1.0], False)],
)
def test_all_nan_losses(run: Make, losses: list[float], expected: bool) -> None:
    side = run({"Train Loss": list(enumerate(losses))})
    assert all_nan_losses(side) is expected
    assert verdicts(compare(side, side)) == {"Train Loss": "identical"}


def test_without_a_training_loss_nothing_is_known_of_it(run: Make) -> None:
    side = run({"Eval Loss": [(1, math.nan)]})
    assert (all_nan_losses(side), observed_steps(side)) == (None, None)


def test_observed_steps(run: Make) -> None:
    assert observed_steps(run({"Train Loss": [(3, 1.0), (10, 1.0), (7, 1.0)]})) == (3, 10)


def test_the_first_divergent_curve_prefers_the_earliest_step_then_losses(run: Make) -> None:
    names = ("A metric/psnr", "Eval Loss", "Train Loss Dict/a_loss", "Train Loss")
    same = {name: [(0, 1.0), (5, 1.0)] for name in names}
    other = {name: [(0, 1.0), (5, 2.0)] for name in names}
    for index in range(4):
        node = compare(run(same), run({**same, **{name: other[name] for name in names[: index + 1]}}))
        assert first_divergent_curve(node) == (5, names[index])
    node = compare(run(same), run({**other, "A metric/psnr": [(0, 2.0), (5, 1.0)]}))
    assert first_divergent_curve(node) == (0, "A metric/psnr")
    assert first_divergent_curve(Difference.from_dict(node.to_dict())) == (0, "A metric/psnr")


def test_files_of_tensorboards_own_writer(tmp_path: Path) -> None:
    for name, last in (("a", 0.5), ("b", 0.25)):
        writer = EventFileWriter(str(tmp_path / name))
        for step, value in ((0, 1.0), (1, last)):
            writer.add_event(event_pb2.Event(step=step, wall_time=1.7e9, summary=Summary(value=[value_of("x", value)])))
        writer.close()
    node = compare(RunDir(tmp_path / "a"), RunDir(tmp_path / "b"))
    assert verdicts(node) == {"x": "different"}
    assert first_divergent_curve(node) == (1, "x")


def test_steps_that_only_one_side_wrote_again_are_named_as_such(run: Make) -> None:
    once = [(step, float(step)) for step in range(4)]
    sides = run({"Train Loss": [*once, (2, 2.0), (3, 3.0)]}), run({"Train Loss": once})
    leaf = children(compare(*sides))["Train Loss"]
    assert leaf.verdict is Verdict.MISSING
    assert "steps that it wrote again after a restart" in leaf.summary
