"""Operators are recorded with what went in and came out, and the first one that differs is found with its place."""

from __future__ import annotations

import itertools
import json
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from f3rm_verify.errors import UnreadableError
from f3rm_verify.f3rm.operators import recorded_operators
from f3rm_verify.readers.operators import OperatorDifference, first_operator_difference, read_operators


class Noisy(torch.autograd.Function):
    """Its backward is another one at every call: as a kernel's that adds in the order in which threads arrive."""

    calls = itertools.count()

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2  # the planted fault

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return racing_kernel(gradient)


@torch.library.custom_op("f3rm_verify_tests::racing", mutates_args=())
def racing_kernel(value: Tensor) -> Tensor:
    result = value.clone()
    # Past torch, as a kernel would.
    result.numpy()[0] *= 1 + next(Noisy.calls) * 2**-20
    return result


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, value: Tensor) -> Tensor:
        return Noisy.apply(self.linear(value)).exp()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), Block()

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(value).relu())
        return result


def record(folder: Path, step: Callable[[], object], modules: nn.Module | None = None, **options: Any) -> list[Path]:
    files = [folder / "one.jsonl", folder / "two.jsonl"]
    for file in files:
        with recorded_operators(file, modules or nn.Module(), **options):
            step()
    return files


def difference(folder: Path, step: Callable[[], object], modules: nn.Module | None = None) -> OperatorDifference | None:
    one, two = record(folder, step, modules)
    return first_operator_difference(one, two)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(linecache.getlines(__file__), 1) if text in line and "line_of" not in line)


def test_a_planted_race_in_the_backward_is_found_with_its_module_and_its_line(tmp_path: Path) -> None:
    net, value = Net(), torch.ones(4, 3)
    found = difference(tmp_path, lambda: net(value).sum().backward(), net)
    assert found is not None
    assert found.kind == "kernel"
    assert found.operator.name.startswith("f3rm_verify_tests::racing")
    assert found.operator.module == "second"
    assert found.operator.backward == "NoisyBackward"
    assert f"{Path(__file__).name}:{line_of('# the planted fault')} in forward" in found.operator.source
    assert [one.sizes for one in found.operator.outputs] == [(4, 3)]
    assert str(found.operator.outputs[0]) == "float32 cpu 4 x 3"


def test_a_deterministic_step_has_no_difference_and_none_of_its_operators_is_missing(tmp_path: Path) -> None:
    net, value = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(4, 3)
    optimizer = torch.optim.Adam(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        net(value).sum().backward()

    files = record(tmp_path, step, net)
    assert first_operator_difference(*files) is None
    names = [one.name.partition("::")[2] for one in read_operators(files[0])]
    assert {"addmm", "relu", "threshold_backward", "mm"} <= set(names)
    assert [one.number for one in read_operators(files[0])] == list(range(len(names)))
    backward = [one for one in read_operators(files[0]) if one.name == "aten::threshold_backward"]
    assert [(one.module, one.backward) for one in backward] == [("1", "ReluBackward0")]
    gradients = [one.module for one in read_operators(files[0]) if one.backward == "AccumulateGrad"]
    assert set(gradients) == {"0.weight", "0.bias"}


def test_every_flipped_bit_of_an_output_is_seen(tmp_path: Path) -> None:
    one, two = record(tmp_path, lambda: torch.ones(3) + 1)
    assert first_operator_difference(one, two) is None
    *before, line, end = two.read_text("utf8").splitlines()
    data = json.loads(line)
    for bit in range(128):
        changed = json.loads(line)
        changed[4][0][2] = f"{int(data[4][0][2], 16) ^ 1 << bit:032x}"
        two.write_text("\n".join([*before, json.dumps(changed), end, ""]), "utf8")
        found = first_operator_difference(one, two)
        assert found is not None
        assert (found.kind, found.operator.name) == ("kernel", "aten::add")


def test_digests_see_position_type_and_sizes(tmp_path: Path) -> None:
    values = iter([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])])
    assert difference(tmp_path, lambda: next(values) * 3) is not None
    values = iter([torch.zeros(2, 3), torch.zeros(3, 2)])
    assert difference(tmp_path, lambda: next(values).clone()) is not None
    values = iter([torch.zeros(2), torch.zeros(2, dtype=torch.int32)])
    assert difference(tmp_path, lambda: next(values).clone()) is not None


def test_what_is_changed_in_place_is_an_output_and_was_an_input_before(tmp_path: Path) -> None:
    def step() -> None:
        value = torch.ones(3)
        value.mul_(2)

    files = record(tmp_path, step)
    (operator,) = [one for one in read_operators(files[0]) if one.name == "aten::mul_"]
    assert len(operator.inputs) == len(operator.outputs) == 1
    assert operator.inputs[0].digest != operator.outputs[0].digest


def test_fresh_memory_and_views_of_it_are_no_difference_until_they_are_read(tmp_path: Path) -> None:
    fill = itertools.count(1)

    def fresh() -> Tensor:
        value = torch.empty(4)
        value.numpy()[:] = next(fill)  # whatever was there before
        return value

    assert difference(tmp_path, lambda: fresh().view(2, 2).zero_()) is None
    found = difference(tmp_path, lambda: fresh().view(2, 2) + 1)
    assert found is not None
    assert (found.kind, found.operator.name, found.input) == ("memory", "aten::add", 0)
    assert found.allocated is not None
    assert found.allocated.name.startswith("aten::empty")
    assert "in fresh" in found.allocated.source


def test_what_comes_from_outside_is_told_from_what_an_operator_did(tmp_path: Path) -> None:
    numbers = itertools.count()
    batches = [torch.zeros(3), torch.ones(3)]
    found = difference(tmp_path, lambda: batches[next(numbers) % 2] * 2)
    assert found is not None
    assert (found.kind, found.input) == ("outside", 0)
    found = difference(tmp_path, lambda: torch.ones(3) * (next(numbers) + 0.5))
    assert found is not None
    assert found.kind == "value"
    found = difference(tmp_path, lambda: torch.rand(3))
    assert found is not None
    assert found.kind == "draw"
    found = difference(tmp_path, lambda: torch.ones(3).sin() if next(numbers) % 2 else torch.ones(3).cos())
    assert found is not None
    assert found.kind == "sequence"


def test_a_sum_in_another_order_is_told_from_a_kernel_and_from_what_something_else_changed(tmp_path: Path) -> None:
    numbers = itertools.count()

    def terms() -> list[Tensor]:
        made = [torch.ones(3) * 0.1, torch.ones(3) * 0.7]
        return made[::-1] if next(numbers) % 2 else made

    found = difference(tmp_path, lambda: torch.sub(*terms()))
    assert found is not None
    assert (found.kind, found.operator.name) == ("order", "aten::sub")

    def changed() -> Tensor:
        value = torch.ones(3) * 0.1
        value.numpy()[0] = next(numbers)
        return value + 1

    found = difference(tmp_path, changed)
    assert found is not None
    assert (found.kind, found.operator.name) == ("unseen", "aten::add")


def test_a_recording_that_ends_early_is_never_equal(tmp_path: Path) -> None:
    one, two = record(tmp_path, lambda: (torch.ones(3) + 1) * 2, limit=2)
    with pytest.raises(UnreadableError, match="cut short after 2 operators"):
        first_operator_difference(one, two)
    one, two = record(tmp_path, lambda: torch.ones(3) + 1)
    for file in (one, two):
        file.write_text("".join(file.read_text("utf8").splitlines(keepends=True)[:-1]), "utf8")
    with pytest.raises(UnreadableError, match="cut short"):
        first_operator_difference(one, two)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[9, [], [], [], []]", "nonsense", '{"version": 2}', "7", "\x00"])
def test_a_broken_recording_is_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(text, "utf8")
    with pytest.raises(UnreadableError, match=r"broken\.jsonl: "):
        list(read_operators(file))


def test_recording_leaves_gradients_and_generators_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, value = nn.Sequential(nn.Linear(3, 3), nn.Dropout()), torch.ones(4, 3)

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        net.zero_grad()
        net(value).exp().sum().backward()
        return [one.grad.clone() for one in net.parameters() if one.grad is not None] + [torch.get_rng_state()]

    plain = gradients()
    with recorded_operators(tmp_path / "one.jsonl", net):
        recorded = gradients()
    assert all(map(torch.equal, plain, recorded))
    assert plain
