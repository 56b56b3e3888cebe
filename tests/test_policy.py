from __future__ import annotations

import dataclasses
import json

import pytest

from f3rm_verify.difference import ARTEFACTS
from f3rm_verify.errors import UsageError
from f3rm_verify.policy import DIFF_POLICY, IGNORED_METRICS, IGNORED_TAGS, RUN_POLICY, Policy, reason_to_ignore


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
    assert RUN_POLICY.required == tuple(name for name in ARTEFACTS if name != "trace")
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
        ({"ignored_tags": {"*": "why not"}}, r"ignores everything, by the pattern '\*'"),
        ({"ignored_metrics": {"psnr": "a reason", "**": "why not"}}, r"ignores everything, by the pattern '\*\*'"),
    ],
)
def test_a_policy_that_nothing_could_fail_is_wrong_usage(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(RUN_POLICY, **changes).check()


def test_policies_share_no_table() -> None:
    assert Policy() == Policy()
    assert Policy().ignored_tags is not Policy().ignored_tags
