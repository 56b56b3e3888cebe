"""How blocks with and without a measure alternate, what is switched for them, and that it is switched back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from f3rm_verify.cost import summarise
from f3rm_verify.seeding_plan import CUBLAS_WORKSPACE_VARIABLE, SeedingPlan

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

PLAN = SeedingPlan(base_seed=42)


def known(plan: SeedingPlan = PLAN) -> list[Any]:
    from f3rm_verify.f3rm.cost_measures import Measure, known_measures

    grids = Measure(name="grids", on=nullcontext, inapplicable="off: --encoding stock")
    return known_measures(plan, device="cpu", grids=grids, recording=nullcontext)


class FakeTraining:
    """Steps that take a second of a clock of their own, twice as long while a measure is on."""

    def __init__(self) -> None:
        self.now, self.slow, self.steps = 0.0, 1.0, 0

    def step(self) -> None:
        self.steps += 1
        self.now += self.slow * (1 + 0.001 * self.steps)  # the machine gets slower and slower

    @contextmanager
    def twice(self) -> Iterator[None]:
        self.slow = 2.0
        try:
            yield
        finally:
            self.slow = 1.0

    def measured(self, rounds: int = 10) -> dict[str, Any]:
        from f3rm_verify.f3rm.cost import COUNTED, Timing, _row, compare, comparisons
        from f3rm_verify.f3rm.cost_measures import Measure

        measures = [
            Measure(name="slow", on=self.twice),
            Measure(name="free", on=nullcontext),
            Measure(name="on top", on=nullcontext, upon="slow"),
            Measure(name="absent", on=nullcontext, inapplicable="not here"),
        ]
        timing = Timing(self.step, clock=lambda: self.now, peaks=lambda: {"resident": self.steps})
        compared = comparisons(measures)
        pairs = compare(timing, compared, rounds)
        by_name = {measure.name: measure for measure in measures}
        rows = [_row(one.name, pairs, by_name.get(one.name)) for one in compared] + [
            _row("absent", pairs, measures[-1])
        ]
        result = summarise({"settings": {"counted_steps_per_block": COUNTED}, "comparisons": rows})
        return {row["measure"]: row for row in result["rows"]}


def test_a_planted_slowdown_is_found_and_nothing_else() -> None:
    rows = FakeTraining().measured()
    assert rows["slow"]["time_ratio"]["median"] == pytest.approx(2.0, rel=0.02)
    assert rows["everything"]["time_ratio"]["median"] == pytest.approx(2.0, rel=0.02)
    effects = {name: row["effect"] for name, row in rows.items()}
    assert effects == {
        "nothing (control)": "within noise",
        "slow": "slower",
        "free": "within noise",
        "on top": "within noise",
        "everything": "slower",
        "absent": None,
    }
    assert rows["absent"]["not_applicable"] == "not here"


def test_what_a_measure_is_upon_is_on_in_both_of_its_blocks() -> None:
    assert FakeTraining().measured(2)["on top"]["seconds_per_step"]["without"] > 2.0


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
def test_every_comparison_follows_every_other_equally_often(count: int) -> None:
    from f3rm_verify.f3rm.cost import order

    rounds = count if count % 2 == 0 else 2 * count
    turns = list(order(count, rounds))
    rows = [[number for number, _ in turns[i : i + count]] for i in range(0, len(turns), count)]
    assert all(sorted(row) == list(range(count)) for row in rows)
    followed = Counter(pair for row in rows for pair in pairwise(row))
    assert len(followed) == count * (count - 1)
    assert len(set(followed.values())) == 1
    firsts = Counter(number for number, within_first in turns if within_first)
    assert firsts == Counter(dict.fromkeys(range(count), rounds // 2))


def test_the_first_step_of_a_block_is_not_counted() -> None:
    from f3rm_verify.f3rm.cost import COUNTED, SETTLING, Timing

    clock, steps = iter([10.0, 14.0]), []
    timing = Timing(lambda: steps.append("step"), clock=lambda: next(clock), begin=lambda: steps.append("begin"))
    assert timing.block(()).seconds == 4.0
    assert steps == ["step"] * SETTLING + ["begin"] + ["step"] * COUNTED


def flags() -> tuple[Any, ...]:
    import torch

    cudnn = torch.backends.cudnn
    filling = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    return mode, filling, cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS_WORKSPACE_VARIABLE)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_flags_are_afterwards_as_they_were_also_when_a_step_fails(before: int) -> None:
    import torch

    from f3rm_verify.f3rm.cost_measures import nothing_on, switched_on

    algorithms, filling, *_ = known()
    torch.set_deterministic_debug_mode(before)
    first = flags()
    with pytest.raises(ValueError, match="a step"), nothing_on():
        assert flags()[:4] == (0, False, False, True)
        with switched_on([algorithms]):
            assert flags()[:4] == (2, False, True, False)
            with switched_on([filling]):
                assert flags()[:4] == (2, True, True, False)
            assert flags()[:4] == (2, False, True, False)
        assert flags()[:4] == (0, False, False, True)
        with switched_on([algorithms, filling]):
            raise ValueError("a step")
    assert flags() == first


def test_warn_only_warns() -> None:
    import torch

    with known(SeedingPlan(base_seed=42, warn_only=True))[0].on():
        assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, [None, None, "no CUDA device", None]),
        (
            {"deterministic_algorithms": False},
            [*["off: --seed-deterministic-algorithms False"] * 2, "no CUDA device", None],
        ),
        ({"enabled": False}, [*["off: --enable-comprehensive-seeding False"] * 2, "no CUDA device", None]),
    ],
)
def test_what_cannot_be_measured_here_says_why(changes: dict[str, Any], reasons: list[str | None]) -> None:
    found = known(SeedingPlan(base_seed=42, **changes))
    assert [measure.inapplicable for measure in found if measure.name != "grids"] == reasons


def test_the_peak_is_that_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from f3rm_verify.f3rm import memory_use

    memory = memory_use.PeakMemory(cuda=False)
    if not memory.how.startswith("the kernel's peak"):
        pytest.skip("this kernel lets nobody reset the peak")
    bytes(2**27).replace(b"\0", b"x")
    memory.begin()
    before = memory.peaks()["resident"]
    bytes(2**28).replace(b"\0", b"x")
    assert memory.peaks()["resident"] - before > 2**25


def test_without_a_peak_to_reset_memory_is_looked_at_after_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from f3rm_verify.f3rm import memory_use

    seen = iter([50, 70, 60])
    monkeypatch.setattr(memory_use, "reset_peak_rss", lambda: False)
    monkeypatch.setattr(memory_use, "rss_bytes", lambda: next(seen))
    memory = memory_use.PeakMemory(cuda=False)
    assert memory.how.startswith("the most after any step")
    memory.begin()
    memory.sample()
    memory.sample()
    assert memory.peaks() == {"resident": 70}


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from f3rm_verify.f3rm.cost import refuse_several_ranks

    refused: Callable[[Any], None] = refuse_several_ranks
    refused(SimpleNamespace(num_devices=2, num_machines=1))  # a training: not asked to measure
    monkeypatch.setenv("F3RM_VERIFY_COST", "60")
    refused(SimpleNamespace(num_devices=1, num_machines=1))
    with pytest.raises(SystemExit):
        refused(SimpleNamespace(num_devices=2, num_machines=1))
    assert "leave --machine.num-devices at 1" in capsys.readouterr().err


def test_only_what_is_asked_for_is_measured_besides_the_control(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from f3rm_verify.f3rm.cost import _wanted, comparisons

    possible = comparisons(known())
    assert _wanted(possible) == possible
    monkeypatch.setenv("F3RM_VERIFY_COST_ONLY", "everything,recorder")
    assert [one.name for one in _wanted(possible)] == ["nothing (control)", "recorder", "everything"]
    monkeypatch.setenv("F3RM_VERIFY_COST_ONLY", "recorder,grids")
    with pytest.raises(SystemExit):
        _wanted(possible)
    assert "Nothing called 'grids' can be measured here; there are nothing (control), " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [("deterministic", None), ("stock", "off: --encoding stock"), ("tcnn", "off: --encoding tcnn")],
)
def test_grids_are_measured_where_the_training_has_deterministic_ones(encoding: str, reason: str | None) -> None:
    from nerfstudio.field_components.encodings import HashEncoding
    from torch import nn

    from f3rm_verify.f3rm.cost import _grids
    from f3rm_verify.f3rm.encoding import describe_encodings, switch_encodings

    model = nn.Sequential(HashEncoding(num_levels=2, log2_hashmap_size=4, implementation="torch"))
    switch_encodings(model, deterministic=encoding == "deterministic")
    trainer = SimpleNamespace(config=SimpleNamespace(encoding=encoding), pipeline=SimpleNamespace(model=model))
    measure = _grids(trainer)
    assert measure.inapplicable == reason
    switch_encodings(model, deterministic=False)
    with pytest.raises(ValueError, match="a step"), measure.on():
        assert describe_encodings(model) == {"0": "deterministic"}
        raise ValueError("a step")
    assert describe_encodings(model) == {"0": "stock"}
