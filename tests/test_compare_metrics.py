from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from f3rm_verify.compare_metrics import compare_metrics
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.policy import Policy
from f3rm_verify.run_dir import METRICS, RunDir

METRICS_DATA: dict[str, Any] = {
    "split": "test",
    "images": {
        "frame_00001.png": {"psnr": 21.5, "ssim": 0.71, "num_rays_per_sec": 1e5},
        "frame_00002.png": {"psnr": 19.25, "ssim": 0.62, "num_rays_per_sec": 2e5},
    },
    "mean": {"psnr": 20.375, "ssim": 0.665, "fps": 1.5},
    "unavailable": {"lpips": "the weights of AlexNet are not here"},
}
LEAVES = {
    "metrics/split": "identical",
    "metrics/images/frame_00001.png/num_rays_per_sec": "ignored",
    "metrics/images/frame_00001.png/psnr": "identical",
    "metrics/images/frame_00001.png/ssim": "identical",
    "metrics/images/frame_00002.png/num_rays_per_sec": "ignored",
    "metrics/images/frame_00002.png/psnr": "identical",
    "metrics/images/frame_00002.png/ssim": "identical",
    "metrics/mean/fps": "ignored",
    "metrics/mean/lpips": "ignored",
    "metrics/mean/psnr": "identical",
    "metrics/mean/ssim": "identical",
}

Make = Callable[[Any], RunDir]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes run directories out of metrics, or out of the text of the file."""

    def make(data: Any) -> RunDir:
        path = tmp_path_factory.mktemp("run")
        if data is not None:
            (path / METRICS).parent.mkdir()
            (path / METRICS).write_text(data if isinstance(data, str) else json.dumps(data), "utf8")
        return RunDir(path)

    return make


def edited(*path: str, value: Any = None) -> dict[str, Any]:
    """The metrics with the item at `path` replaced, or removed where `value` is None."""
    data = copy.deepcopy(METRICS_DATA)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


def compare(reference: RunDir, candidate: RunDir, policy: Policy | None = None) -> Difference:
    """The comparison, after a check that it gives the same verdicts with the sides swapped."""
    node = compare_metrics(reference, candidate, policy=policy or Policy())
    swapped = compare_metrics(candidate, reference, policy=policy or Policy())
    assert sorted(n.verdict for _, n in node.walk()) == sorted(n.verdict for _, n in swapped.walk())
    assert Difference.from_dict(node.to_dict()).to_dict() == node.to_dict()
    return node


def leaves(node: Difference) -> dict[str, Difference]:
    return {"/".join(path): leaf for path, leaf in node.leaves()}


def verdicts(node: Difference) -> dict[str, str]:
    return {path: leaf.verdict.value for path, leaf in leaves(node).items()}


def test_equal_metrics_are_identical(run: Make) -> None:
    reference = run(METRICS_DATA)
    for candidate in (reference, run(METRICS_DATA)):
        node = compare(reference, candidate)
        assert (node.name, node.artefact, node.verdict) == ("metrics", "metrics", Verdict.IDENTICAL)
        assert verdicts(node) == LEAVES
    assert leaves(node)["metrics/mean/lpips"].summary == "the weights of AlexNet are not here"
    assert leaves(node)["metrics/mean/psnr"].measures == {"value": 20.375}


@pytest.mark.parametrize(
    ("path", "n_ulp"),
    [(("images", "frame_00002.png", "ssim"), 1), (("images", "frame_00001.png", "psnr"), 3), (("mean", "psnr"), 1)],
)
def test_one_ulp_is_different_there_and_nowhere_else(run: Make, path: tuple[str, ...], n_ulp: int) -> None:
    old: Any = METRICS_DATA
    for key in path:
        old = old[key]
    new = old + n_ulp * float(np.spacing(old))
    node = compare(run(METRICS_DATA), run(edited(*path, value=new)))
    place = "/".join(("metrics", *path))
    assert verdicts(node) == {**LEAVES, place: "different"}
    measures = leaves(node)[place].measures
    assert (measures["max_ulp"], measures["max_abs"], measures["n_different"]) == (n_ulp, new - old, 1)
    assert (measures["reference_value"], measures["candidate_value"]) == (repr(old), repr(new))


@pytest.mark.parametrize(
    ("reference", "candidate", "verdict"),
    [
        (math.nan, math.nan, "identical"),
        (math.inf, math.inf, "identical"),
        (30, 30.0, "identical"),
        (math.nan, 1.0, "different"),
        (0.0, -0.0, "different"),
        (math.inf, -math.inf, "different"),
        (True, True, "unreadable"),
        ("1.0", "1.0", "unreadable"),
        ([1.0], 1.0, "unreadable"),
        ({}, {}, "unreadable"),
        (2**53 + 1, 2**53, "unreadable"),
        (10**400, 10**400, "unreadable"),
    ],
)
def test_values(run: Make, reference: Any, candidate: Any, verdict: str) -> None:
    sides = run(edited("mean", "psnr", value=reference)), run(edited("mean", "psnr", value=candidate))
    assert verdicts(compare(*sides)) == {**LEAVES, "metrics/mean/psnr": verdict}


def test_a_null_is_no_value(run: Make) -> None:
    null = run(json.dumps(edited("mean", "psnr", value="NULL")).replace('"NULL"', "null"))
    for other in (null, run(METRICS_DATA)):
        assert verdicts(compare(null, other)) == {**LEAVES, "metrics/mean/psnr": "missing"}


def test_a_metric_of_one_side_is_missing(run: Make) -> None:
    node = compare(run(METRICS_DATA), run(edited("images", "frame_00001.png", "psnr")))
    assert verdicts(node) == {**LEAVES, "metrics/images/frame_00001.png/psnr": "missing"}


def test_an_image_of_one_side_is_missing(run: Make) -> None:
    node = compare(run(METRICS_DATA), run(edited("images", "frame_00002.png")))
    found = verdicts(node)
    assert found.pop("metrics/images/frame_00002.png") == "missing"
    assert found == {path: verdict for path, verdict in LEAVES.items() if "00002" not in path}
    assert leaves(node)["metrics/images/frame_00002.png"].summary == "only the reference has metrics of this image"


def test_another_split_is_different(run: Make) -> None:
    node = compare(run(METRICS_DATA), run(edited("split", value="train")))
    assert verdicts(node) == {**LEAVES, "metrics/split": "different"}


def test_unavailable_on_one_side_is_missing_with_the_reason(run: Make) -> None:
    node = compare(run(METRICS_DATA), run(edited("mean", value={**METRICS_DATA["mean"], "lpips": 0.5})))
    assert verdicts(node) == {**LEAVES, "metrics/mean/lpips": "missing"}
    text = "the reference has no value: the weights of AlexNet are not here"
    assert leaves(node)["metrics/mean/lpips"].summary == text


def test_unavailable_for_other_reasons_is_missing(run: Make) -> None:
    for other in (edited("unavailable", "lpips", value="switched off"), edited("unavailable", "lpips")):
        node = compare(run(METRICS_DATA), run(other))
        assert verdicts(node) == {**LEAVES, "metrics/mean/lpips": "missing"}


def test_values_win_over_the_claim_that_there_are_none(run: Make) -> None:
    data = [edited("mean", value={**METRICS_DATA["mean"], "lpips": value}) for value in (0.5, 0.25)]
    assert verdicts(compare(run(data[0]), run(data[1]))) == {**LEAVES, "metrics/mean/lpips": "different"}


def test_an_ignored_metric_of_one_side_says_so(run: Make) -> None:
    node = compare(run(METRICS_DATA), run(edited("mean", "fps")))
    assert verdicts(node) == LEAVES
    assert leaves(node)["metrics/mean/fps"].summary == "a speed; the candidate has none"


def test_ignoring_everything_is_no_verdict(run: Make) -> None:
    node = compare(run(METRICS_DATA), run(METRICS_DATA), Policy(ignored={"metrics": {"*": "on request"}}))
    assert node.verdict is Verdict.UNREADABLE


def test_no_metrics_on_a_side(run: Make) -> None:
    node = compare(run(METRICS_DATA), run(None))
    assert verdicts(node) == {"metrics/candidate": "missing"}
    node = compare(run(None), run(None))
    assert (node.verdict, node.children) == (Verdict.UNREADABLE, ())


def test_a_file_without_a_metric_is_no_evidence(run: Make) -> None:
    empty = run({"split": "test", "images": {}, "mean": {}, "unavailable": {}})
    node = compare(empty, empty)
    assert verdicts(node) == {"metrics/split": "identical", "metrics/mean": "unreadable"}
    assert node.verdict is Verdict.UNREADABLE


def test_what_ns_eval_wrote_is_compared_by_means(tmp_path: Path) -> None:
    for name, psnr in (("a", 20.0), ("b", 21.0)):
        (tmp_path / name).mkdir()
        results = {"psnr": psnr, "psnr_std": math.nan, "fps": psnr}
        (tmp_path / name / "eval.json").write_text(json.dumps({"results": results}))
    node = compare(RunDir(tmp_path / "a"), RunDir(tmp_path / "b"))
    assert verdicts(node) == {
        "metrics/split": "identical",
        "metrics/mean/fps": "ignored",
        "metrics/mean/psnr": "different",
        "metrics/mean/psnr_std": "identical",
    }


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"split": "test", "mean": {"psnr": 1', "[" * 100_000])
def test_a_broken_file_is_unreadable(run: Make, text: str) -> None:
    broken = run(text)
    assert verdicts(compare(run(METRICS_DATA), broken)) == {"metrics/candidate": "unreadable"}
    both = {"metrics/reference": "unreadable", "metrics/candidate": "unreadable"}
    assert verdicts(compare(broken, broken)) == both


@pytest.mark.parametrize("key", ["split", "images", "mean", "unavailable"])
@pytest.mark.parametrize("value", [None, [], 3, {"x": []}, {"x": {"psnr": []}}])
def test_other_types_are_unreadable_and_the_rest_is_compared(run: Make, key: str, value: Any) -> None:
    data = {**METRICS_DATA, key: value}
    assert "unreadable" in verdicts(compare(run(data), run(data))).values()
    for reference in (data, METRICS_DATA):
        found = verdicts(compare(run(reference), run(data)))
        assert {"unreadable", "missing"} & set(found.values())
        elsewhere = {path for path in LEAVES if not path.startswith(f"metrics/{key}") and not path.endswith("lpips")}
        assert {path: found[path] for path in elsewhere} == {path: LEAVES[path] for path in elsewhere}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["test", "psnr"]),
    lambda items: st.lists(items, max_size=2) | st.dictionaries(st.sampled_from(["psnr", "ssim", "a.png"]), items),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["split", "images", "mean", "unavailable", "other"]), JSON))
def test_any_json_gives_a_tree(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("run")
    (path / METRICS).parent.mkdir()
    (path / METRICS).write_text(json.dumps(data))
    node = compare(RunDir(path), RunDir(path))
    assert node.verdict in (Verdict.IDENTICAL, Verdict.UNREADABLE, Verdict.MISSING)
    numbers = [leaf for name, leaf in leaves(node).items() if leaf.verdict is Verdict.IDENTICAL and "split" not in name]
    assert numbers or node.verdict is not Verdict.IDENTICAL
