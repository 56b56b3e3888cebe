"""A digest sees every bit, its place, and the dtype, shape and name of each tensor, on the CPU and off it."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from f3rm_verify.f3rm.digests import Digester, Fetched, Unfinished, algorithm, as_words, leaves  # noqa: E402

pytestmark = pytest.mark.train

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]


def on_cpu(*named: tuple[str, Any]) -> int:
    found = Digester().digest(named)
    assert isinstance(found, int)
    return found


def elsewhere(*named: tuple[str, Any]) -> tuple[Any, ...]:
    """What a device would make of the tensors: the heads as on the CPU, and the reduced sums."""
    digester = Digester()
    heads = [digester._head(name, tensor) for name, tensor in named]
    sums = [tuple(digester.reduce(as_words(tensor)).tolist()) for _, tensor in named]
    return (*heads, *sums)


WAYS: list[Callable[..., Any]] = [on_cpu, elsewhere]


def filled(dtype: Any, *shape: int) -> Any:
    content = torch.arange(int(np.prod(shape)) * 16, dtype=torch.uint8) * 37 % 251
    if dtype is torch.bool:
        return (content[: int(np.prod(shape))] % 2 == 0).reshape(shape)
    size = torch.empty(0, dtype=dtype).element_size()
    return content[: int(np.prod(shape)) * size].clone().view(dtype).reshape(shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(way: Any, dtype: Any) -> None:
    tensor = filled(dtype, 3, 5)
    seen = {way(("a", tensor))}
    raw = tensor.reshape(-1).view(torch.uint8)
    bits = 1 if dtype is torch.bool else 8
    for byte, bit in itertools.product(range(raw.numel()), range(bits)):
        raw[byte] ^= 1 << bit
        seen.add(way(("a", tensor)))
        raw[byte] ^= 1 << bit
    assert len(seen) == raw.numel() * bits + 1


@pytest.mark.parametrize("way", WAYS)
def test_every_swap_counts(way: Any) -> None:
    tensor = torch.arange(12, dtype=torch.float32)
    seen = {way(("a", tensor))}
    for i, j in itertools.combinations(range(12), 2):
        swapped = tensor.clone()
        swapped[i], swapped[j] = tensor[j], tensor[i]
        seen.add(way(("a", swapped)))
    assert len(seen) == 12 * 11 // 2 + 1


@pytest.mark.parametrize("way", WAYS)
def test_name_dtype_shape_order_and_number_count(way: Any) -> None:
    a, b = torch.zeros(6), torch.ones(6)
    cases = [
        (("a", a),),
        (("b", a),),
        (("a", a.reshape(2, 3)),),
        (("a", a.reshape(3, 2)),),
        (("a", a.view(torch.int32)),),
        (("a", a[:5]),),
        (("a", torch.zeros(0)),),
        (("a", torch.zeros(0, 3)),),
        (("a", torch.zeros(())),),
        (("a", a), ("b", b)),
        (("b", b), ("a", a)),
        (("a", b), ("b", a)),
        (("a", -a),),
        (),
    ]
    assert len({way(*case) for case in cases}) == len(cases)


@pytest.mark.parametrize("way", WAYS)
def test_how_a_tensor_lies_in_memory_does_not(way: Any) -> None:
    tensor = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    same = [tensor.clone(), tensor.t().contiguous().t(), torch.cat([tensor, tensor])[:4], tensor.requires_grad_()]
    assert len({way(("a", value)) for value in same}) == 1
    z = torch.complex(torch.ones(3), torch.arange(3.0))
    assert way(("a", z.conj().conj())) == way(("a", z))
    assert way(("a", z.conj())) == way(("a", z.conj().resolve_conj())) != way(("a", z))
    assert way(("a", torch._neg_view(tensor))) == way(("a", -tensor))


def test_an_expanded_tensor_counts_once() -> None:
    tensor = torch.arange(3.0)
    wide = tensor[:, None].expand(3, 1000)
    assert on_cpu(("a", wide)) == on_cpu(("a", tensor[:, None].expand(3, 1000)))
    assert on_cpu(("a", wide)) != on_cpu(("a", (tensor + 1)[:, None].expand(3, 1000)))
    assert on_cpu(("a", wide)) != on_cpu(("a", tensor[:, None].expand(3, 999)))


def test_sparse_tensors_arrays_and_plain_values() -> None:
    def sparse(value: float, row: int = 1) -> Any:
        return torch.sparse_coo_tensor([[row]], [value], (4,), check_invariants=False)

    cases: list[Any] = [sparse(1.0), sparse(2.0), sparse(1.0, 2), None, 1, 1.0, True, "1", np.ones(2), np.ones(2, "f4")]
    assert len({on_cpu(("a", case)) for case in cases}) == len(cases)
    assert on_cpu(("a", sparse(1.0))) == on_cpu(("a", sparse(1.0)))
    assert on_cpu(("a", torch.nn.Parameter(torch.ones(2)))) == on_cpu(("a", torch.ones(2)))


@pytest.mark.parametrize("words", [2**16, 2**16 + 1, 3 * 2**16 + 5, 2**22 + 2**16 + 1])
def test_large_tensors_are_reduced_block_by_block(words: int) -> None:
    tensor = torch.arange(words, dtype=torch.int32)
    whole = elsewhere(("a", tensor))
    places = {0, 2**16 - 1, words // 2, words - 1, min(2**16, words - 1)}
    seen = {whole}
    for place in places:
        tensor[place] ^= 1 << 31
        seen.add(elsewhere(("a", tensor)))
        tensor[place] ^= 1 << 31
    assert len(seen) == len(places) + 1
    tensor[0], tensor[words - 1] = words - 1, 0
    assert elsewhere(("a", tensor)) not in seen


def test_the_sums_do_not_depend_on_the_order_in_which_they_are_added() -> None:
    tensor = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    results = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.add(elsewhere(("a", tensor)))
    torch.set_num_threads(threads)
    assert len(results) == 1


def test_what_waits_on_a_device_is_fetched_at_once_and_finishes_alike() -> None:
    """The way of a device, with tensors of the CPU: as if each were elsewhere."""
    digester = Digester()
    small, large = torch.arange(10.0), torch.arange(2.0**20 + 8)

    def unfinished(*tensors: Any) -> Unfinished:
        return Unfinished(b"head", tuple(digester._reduce_all(tensors)))

    first, same, other = unfinished(small, large), unfinished(small.clone(), large), unfinished(large, small + 1)
    number = Unfinished(None, (digester._wait(torch.tensor([-2, -2])),), mask=2**32 - 1)
    fetched = digester.fetch()
    assert isinstance(fetched, Fetched)
    assert fetched.here
    assert fetched.finish(first) == fetched.finish(same) != fetched.finish(other)
    assert fetched.finish(number) == 2**32 - 2
    assert fetched.finish(5) == 5
    assert digester.fetch() is None


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (torch.tensor(1.0), 0x3F800000),
        (torch.tensor([-0.0]), 0x80000000),
        (torch.tensor(1.0, dtype=torch.float64), 0x3FF0000000000000),
        (torch.tensor(1.0, dtype=torch.float16), 0x3C00),
        (torch.tensor(1.0, dtype=torch.bfloat16), 0x3F80),
        (torch.tensor(1.0, requires_grad=True), 0x3F800000),
    ],
)
def test_the_bits_of_a_number(value: Any, bits: int) -> None:
    assert Digester().number(value) == bits


def test_tensors_are_found_in_what_holds_them() -> None:
    @dataclasses.dataclass
    class Rays:
        origins: Any
        metadata: Any

    value = {"rays": Rays(torch.ones(1), {"x": [torch.ones(2), None]}), "function": print, "n": 3}
    assert [name for name, _ in leaves(value)] == ["rays.origins", "rays.metadata.x.0", "rays.metadata.x.1", "n"]
    endless: list[Any] = []
    endless.append(endless)
    assert list(leaves(endless)) == []


def test_devices_with_other_digests_are_told_apart() -> None:
    assert algorithm("cpu") == "xxh3_64 v1"
    assert algorithm("cuda:1") == algorithm("cuda") != algorithm("cpu")


def replaced(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data + 1


LASTING: dict[str, Callable[[torch.Tensor], object]] = {
    "a value in place": lambda tensor: tensor.data.view(-1)[3].add_(1),
    "other memory": replaced,
    "another shape": lambda tensor: tensor.resize_(2, 12),
    "another order": lambda tensor: setattr(tensor, "data", tensor.data.t()),
    "another type": lambda tensor: setattr(tensor, "data", tensor.data.view(torch.int32)),
}


@pytest.mark.parametrize("change", LASTING)
def test_a_lasting_tensor_is_looked_at_as_it_is_now(change: str) -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6).clone()
    digester = Digester()
    for _ in range(2):
        assert digester.digest_lasting([("a", tensor)]) == on_cpu(("a", tensor))
        digester.forget_replaced()
    before = digester.digest_lasting([("a", tensor)])
    LASTING[change](tensor)
    assert digester.digest_lasting([("a", tensor)]) == on_cpu(("a", tensor)) != before
    digester.forget_replaced()
    assert digester.digest_lasting([("b", tensor)]) == on_cpu(("b", tensor))


def test_a_tensor_that_is_gone_is_let_go() -> None:
    digester, tensor = Digester(), torch.zeros(10)
    gone = weakref.ref(tensor)
    digester.digest_lasting([("a", tensor)])
    digester.forget_replaced()
    del tensor
    digester.forget_replaced()
    assert gone() is None
