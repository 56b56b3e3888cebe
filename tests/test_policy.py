from __future__ import annotations

import dataclasses
import json

import pytest

from f3rm_verify.difference import ARTEFACTS, Difference, Verdict
from f3rm_verify.errors import UsageError
from f3rm_verify.policy import (
    DIFF_POLICY,
    IGNORED_METRICS,
    IGNORED_TAGS,
    RUN_POLICY,
    Limit,
    Policy,
    informational,
    judge,
    reason_to_ignore,
    without_ignored,
)


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("Train Iter (time)", "a duration"),
        ("ETA (time)", "a duration"),
        ("Train Rays / Sec", "a speed"),
        ("Eval Images Metrics/num_rays_per_sec", "a speed"),
        ("Eval Images Metrics/fps", "a speed"),
        ("GPU Memory (MB)", "memory use"),
        ("config/text_summary", "the configuration as text; setup compares it as data"),
        ("Train Loss", None),
        ("Train Loss Dict/rgb_loss", None),
        ("Train Metrics Dict/psnr", None),
        ("learning_rate/fields", None),
        ("Eval Images/img", None),
        ("train iter (TIME)", None),
    ],
)
def test_tags_that_differ_by_nature(tag: str, reason: str | None) -> None:
    assert reason_to_ignore(tag, IGNORED_TAGS) == reason


@pytest.mark.parametrize(
    ("metric", "reason"),
    [("fps", "a speed"), ("fps_std", "a speed"), ("num_rays_per_sec_std", "a speed"), ("psnr", None), ("lpips", None)],
)
def test_metrics_that_differ_by_nature(metric: str, reason: str | None) -> None:
    assert reason_to_ignore(metric, IGNORED_METRICS) == reason


def test_what_the_commands_require() -> None:
    assert RUN_POLICY.required == ARTEFACTS
    assert RUN_POLICY.without("trace").required == tuple(name for name in ARTEFACTS if name != "trace")
    assert DIFF_POLICY.without("trace") == DIFF_POLICY
    assert DIFF_POLICY.required is None
    for policy in (RUN_POLICY, DIFF_POLICY):
        policy.check()
        assert json.loads(json.dumps(policy.to_dict())) == policy.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"required": ()}, "requires nothing that a training puts out"),
        ({"required": ("setup", "seeding")}, "requires nothing that a training puts out"),
        ({"required": ("curves", "colours")}, "requires colours; there are only setup, seeding"),
        ({"ignored": {"curves": {"*": "why not"}}}, r"ignores everything, by the pattern '\*'"),
        ({"ignored": {"metrics": {"psnr": "a reason", "**": "why not"}}}, r"ignores everything, by the pattern '\*\*'"),
    ],
)
def test_a_policy_that_nothing_could_fail_is_wrong_usage(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(RUN_POLICY, **changes).check()


def test_policies_share_no_table() -> None:
    assert Policy() == Policy()
    assert Policy().ignored["curves"] is not Policy().ignored["curves"]


LIMITED_BY = Limit(pattern="*", absolute=1.0)


@pytest.mark.parametrize(
    ("numbers", "outside", "psnr", "accepted"),
    [
        ({"absolute": 1.0}, 0.0, None, True),
        ({"absolute": 1.0}, 1e-9, None, False),
        ({"absolute": 1.0, "pixels": 0.1}, 0.1, None, True),
        ({"absolute": 1.0, "pixels": 0.1}, 0.11, None, False),
        ({"pixels": 0.1}, 0.1, None, True),
        ({"psnr": 40.0}, 1.0, 40.0, True),
        ({"psnr": 40.0}, 1.0, 39.9, False),
        ({"psnr": 40.0}, 0.0, None, False),
        ({"psnr": 40.0, "pixels": 0.1}, 0.2, 50.0, False),
        ({"psnr": 40.0, "pixels": 0.1}, 0.1, 50.0, True),
        ({"absolute": 1.0}, float("nan"), None, False),
        ({"psnr": 40.0}, 0.0, float("nan"), False),
    ],
)
def test_every_limit_that_is_given_must_hold(
    numbers: dict[str, float], outside: float, psnr: float | None, accepted: bool
) -> None:
    limit = Limit(pattern="*", **numbers)  # type: ignore[arg-type]
    assert limit.accepts(outside=outside, psnr=psnr) is accepted
    verdict, note = judge(limit, outside=outside, psnr=psnr)
    assert verdict is (Verdict.WITHIN_TOLERANCE if accepted else Verdict.DIFFERENT)
    assert note.startswith("; within the limits of *: " if accepted else "; beyond the limits of *: ")


def test_without_a_limit_a_difference_is_one() -> None:
    assert judge(None, outside=0.0) == (Verdict.DIFFERENT, "")


def test_the_first_pattern_that_matches_counts() -> None:
    policy = Policy(limits={"curves": (Limit(pattern="a*", ulps=1), LIMITED_BY)})
    assert policy.limit("curves", "ab") == Limit(pattern="a*", ulps=1)
    assert policy.limit("curves", "b") is LIMITED_BY
    assert policy.limit("curves", "b", "ab") == Limit(pattern="a*", ulps=1)
    assert policy.limit("metrics", "b") is None


def leaf(name: str, verdict: Verdict = Verdict.DIFFERENT) -> Difference:
    return Difference(name=name, artefact="renders", verdict=verdict, summary=f"of {name}")


def group(name: str, *children: Difference) -> Difference:
    return Difference.group(name=name, artefact="renders", children=children)


def test_ignored_leaves_and_groups_keep_what_was_found() -> None:
    tree = group("renders", group("a", leaf("rgb"), leaf("depth", Verdict.IDENTICAL)), group("b", leaf("rgb")))
    found = without_ignored(tree, {"a/rgb": "noise", "b/*": "other"})
    assert [(path[1:], node.verdict.value, node.summary) for path, node in found.leaves()] == [
        (("a", "rgb"), "ignored", "noise; of rgb"),
        (("a", "depth"), "identical", "of depth"),
        (("b",), "ignored", "other; 1 different"),
    ]
    assert found.verdict is Verdict.IDENTICAL
    assert [node.measures["reason"] for _, node in found.leaves() if node.verdict is Verdict.IGNORED] == [
        "noise",
        "other",
    ]
    assert without_ignored(tree, {"c": "nothing"}) is tree


def test_ignoring_all_that_there_is_compares_nothing() -> None:
    tree = group("renders", group("a", leaf("rgb")))
    assert without_ignored(tree, {"a*": "everything in the end"}).verdict is Verdict.UNREADABLE


def test_information_is_shown_and_does_not_decide_but_what_is_missing_does() -> None:
    tree = group("trace", leaf("x", Verdict.IDENTICAL), leaf("y"))
    found = informational(tree, "why")
    assert [node.verdict for _, node in found.walk()] == [Verdict.IGNORED, Verdict.IDENTICAL, Verdict.IGNORED]
    assert informational(group("trace", leaf("y"), leaf("z", Verdict.MISSING)), "why").verdict is Verdict.MISSING
    assert informational(leaf("x", Verdict.UNREADABLE), "why").verdict is Verdict.UNREADABLE


def test_flip_without_its_package_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = dataclasses.replace(DIFF_POLICY, flip=True)
    policy.check()
    monkeypatch.setattr("f3rm_verify.policy.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r'FLIP needs a package .* pip install "f3rm-verify\[flip\]"'):
        policy.check()
    DIFF_POLICY.check()
