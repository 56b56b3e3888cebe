from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from f3rm_verify.bits import ValueLimits, bit_equal, difference_summary, float_difference, outside

SCALARS = ["f2", "f4", "f8", "c8", "c16", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]


def pairs() -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Two arrays of one dtype and shape, with values that are often equal."""

    def arrays(dtype: str) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
        one = hnp.arrays(dtype, st.just((3, 2)), elements=hnp.from_dtype(np.dtype(dtype)), fill=st.nothing())
        return st.tuples(one, one)

    return st.sampled_from(SCALARS).flatmap(arrays)


@given(pairs())
def test_bit_equal_is_equality_of_bytes(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    assert bit_equal(a, b) == (a.tobytes() == b.tobytes())
    assert bit_equal(a, a.copy())


@given(pairs())
def test_measures_are_symmetric_and_find_something_exactly_where_the_bits_differ(pair: Any) -> None:
    a, b = pair
    measures = float_difference(a, b)
    assert measures == float_difference(b, a)
    assert (measures["n_different"] == 0) == bit_equal(a, b)
    assert (measures["at"] is None) == bit_equal(a, b)


@given(hnp.arrays("f8", 5), hnp.arrays("f8", 5))
def test_ulps_count_the_values_between(a: np.ndarray, b: np.ndarray) -> None:
    measured = float_difference(a, b)["max_ulp"]

    def ordered(value: float) -> int:
        bits = int(np.float64(value).view(np.int64))
        return bits if bits >= 0 else -(bits & (2**63 - 1))

    pairs_of_numbers = [(x, y) for x, y in zip(a, b, strict=True) if not math.isnan(x) and not math.isnan(y)]
    assert measured == max((abs(ordered(x) - ordered(y)) for x, y in pairs_of_numbers), default=0)


def test_neighbours_are_one_ulp_apart() -> None:
    for dtype in ("f2", "f4", "f8"):
        values = np.array([1.0, -1.0, 0.0, 1e-5], dtype)
        measures = float_difference(values, np.nextafter(values, np.array(np.inf, dtype)))
        assert measures["max_ulp"] == 1
        assert measures["n_different"] == 4


def test_bit_equal_tells_signed_zeros_nans_dtypes_and_shapes_apart() -> None:
    assert not bit_equal(np.array([0.0]), np.array([-0.0]))
    assert bit_equal(np.array([math.nan]), np.array([math.nan]))
    other_nan = (np.array([math.nan]).view("u8") + 1).view("f8")
    assert not bit_equal(np.array([math.nan]), other_nan)
    assert not bit_equal(np.zeros(2, "f4"), np.zeros(2, "f8"))
    assert not bit_equal(np.zeros(2, "f4"), np.zeros(2, "i4"))
    assert not bit_equal(np.zeros((2, 1)), np.zeros((1, 2)))
    assert bit_equal(np.zeros((0, 3)), np.zeros((0, 3)))


def test_nan_against_a_number_has_no_distance_but_is_counted() -> None:
    a, b = np.array([1.0, math.nan, 2.0, math.nan]), np.array([math.nan, 1.0, 2.5, math.nan])
    b[3:].view("u8")[0] ^= 1
    measures = float_difference(a, b)
    assert (measures["n_different"], measures["n_nan_mismatch"], measures["n_nan_payload"]) == (4, 2, 1)
    assert (measures["max_abs"], measures["mean_abs"], measures["at"]) == (0.5, 0.5, [2])


def test_signed_zeros_differ_by_nothing_but_are_counted() -> None:
    measures = float_difference(np.array([1.0, 0.0], "f4"), np.array([1.0, -0.0], "f4"))
    assert (measures["n_different"], measures["n_sign_of_zero"], measures["at"]) == (1, 1, [1])
    assert (measures["max_abs"], measures["max_rel"], measures["max_ulp"]) == (0.0, 0.0, 0)
    assert difference_summary(measures) == "1 of 2 values differs, first at [1], 1 zero of the other sign"


def test_infinities_and_overflow_are_infinitely_far() -> None:
    for a, b in ((math.inf, 1.0), (math.inf, -math.inf), (1.7e308, -1.7e308)):
        measures = float_difference(np.array([a, 3.0]), np.array([b, 3.0]))
        assert measures["max_abs"] == math.inf
        assert measures["at"] == [0]
        assert measures["max_rel"] in (math.inf, 2.0) or not math.isfinite(a)
    assert float_difference(np.array([math.inf]), np.array([math.inf]))["n_different"] == 0


def test_measures_and_summary_of_a_known_difference() -> None:
    a = np.ones((100, 2), "f4")
    b = a.copy()
    b[17, 1], b[3, 0] = 1.5, 1.25
    measures = float_difference(a, b)
    assert measures == {
        "n": 200,
        "n_different": 2,
        "max_abs": 0.5,
        "mean_abs": 0.75 / 200,
        "at": [17, 1],
        "max_rel": 0.5 / 1.5,
        "max_ulp": 2**22,
        "n_nan_mismatch": 0,
        "n_nan_payload": 0,
        "n_infinite": 0,
        "n_sign_of_zero": 0,
        "ulp_histogram": {"2097152": 1, "4194304": 1},
    }
    assert difference_summary(measures) == "2 of 200 values differ, largest 0.5 at [17, 1] (4,194,304 ulp)"


def test_integers_and_booleans_have_exact_distances_and_no_ulps() -> None:
    lowest, highest = np.iinfo("i8").min, np.iinfo("i8").max
    measures = float_difference(np.array([lowest, 3]), np.array([highest, 3]))
    assert (measures["max_abs"], measures["at"]) == (2**64 - 1, [0])
    assert "max_ulp" not in measures
    assert float_difference(np.array([0], "u8"), np.array([2**64 - 1], "u8"))["max_abs"] == 2**64 - 1
    assert float_difference(np.array([True]), np.array([False]))["max_abs"] == 1


def test_bfloat16_is_measured_as_floats_with_its_own_ulps() -> None:
    one, next_to_one, nan = 0x3F80, 0x3F81, 0x7FC0
    a, b = np.array([one, one], "<u2"), np.array([next_to_one, nan], "<u2")
    measures = float_difference(a, b, dtype_name="bfloat16")
    assert (measures["max_abs"], measures["max_ulp"], measures["n_nan_mismatch"]) == (2**-7, 1, 1)


def test_values_of_unknown_meaning_are_only_counted() -> None:
    measures = float_difference(np.array([1, 2], "u1"), np.array([1, 3], "u1"), dtype_name="float8_e5m2")
    assert measures == {"n": 2, "n_different": 1, "at": [1]}
    assert float_difference(np.array(["a", "b"]), np.array(["a", "c"])) == {"n": 2, "n_different": 1, "at": [1]}


def test_complex_parts_are_values_of_their_own() -> None:
    a = np.array([[1 + 2j], [3 + 4j]], "c8")
    b = np.array([[1 + 2j], [3 + 4.5j]], "c8")
    measures = float_difference(a, b)
    assert (measures["n"], measures["n_different"], measures["at"]) == (4, 1, [1, 0, 1])
    assert float_difference(a.T[:, ::-1], b.T[:, ::-1])["at"] == [0, 0, 1]


@pytest.mark.parametrize("size", [1, 2**14 - 1, 2**14, 2**14 + 1, 100_001])
def test_the_last_value_of_any_size_is_compared_and_located(size: int) -> None:
    a = np.zeros(size, "f4")
    b = a.copy()
    b[-1] = 1
    assert not bit_equal(a, b)
    assert float_difference(a, b)["at"] == [size - 1]


def test_strided_transposed_repeated_and_unaligned_arrays_are_compared_in_c_order() -> None:
    a = np.arange(700_000, dtype="f4").reshape(700, 1000)
    b = a.copy()
    b[601, 300] += 1
    for view in (lambda x: x.T, lambda x: x[::-2, ::3][:, ::-1], lambda x: np.asfortranarray(x), lambda x: x[:, 300]):
        at = np.argwhere(view(a) != view(b))
        assert float_difference(view(a), view(b))["at"] == at[0].tolist()
        assert not bit_equal(view(a), view(b))
        assert bit_equal(view(a), np.ascontiguousarray(view(a)))
    repeated = np.broadcast_to(np.float32(1), (3, 5))
    assert bit_equal(repeated, np.ones((3, 5), "f4"))
    unaligned = np.frombuffer(b"\0" + a.tobytes(), "u1")[1:].view("f4").reshape(a.shape)
    assert bit_equal(unaligned, a)
    assert float_difference(unaligned, b)["at"] == [601, 300]


def test_a_single_value_has_an_empty_index() -> None:
    measures = float_difference(np.array(1.0), np.array(2.0))
    assert measures["at"] == []
    assert difference_summary(measures) == "1 of 1 values differs, largest 1 (4,503,599,627,370,496 ulp)"


def test_other_byte_orders_are_measured() -> None:
    measures = float_difference(np.array([1, 2], ">f4"), np.array([1, 3], ">f4"))
    assert (measures["max_abs"], measures["max_ulp"]) == (1.0, 2**22)


def test_what_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="float32"):
        float_difference(np.zeros(2, "f4"), np.zeros(2, "f8"))
    with pytest.raises(TypeError):
        bit_equal(np.array([object()]), np.array([object()]))


def test_mapped_arrays_take_little_memory(tmp_path: Path) -> None:
    sides = []
    for name in ("a", "b"):
        side = np.memmap(tmp_path / name, "f4", "w+", shape=(2**23,))
        side[:] = 1 if name == "a" else 2
        sides.append(side)
    tracemalloc.start()
    assert not bit_equal(*sides)
    assert float_difference(*sides)["n_different"] == 2**23
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20, "a quarter of one side"


def test_the_histogram_of_ulps_has_every_distance_once() -> None:
    a = np.zeros(6, "f4")
    b = np.array([0.0, -0.0, *np.array([1, 2, 3, 4], np.uint32).view("f4")], "f4")
    assert float_difference(a, b)["ulp_histogram"] == {"0": 1, "1": 1, "2": 2, "4": 1}
    # 2**53 - 1 and 2**63 + ... ulps: where a float64 would round up to the next power of two
    far = np.array([0, 2**54 - 1], np.uint64).view("f8")
    assert float_difference(np.zeros(2), far)["ulp_histogram"] == {str(2**53): 1}


def test_infinities_are_counted_whatever_is_on_the_other_side() -> None:
    inf = np.inf
    measures = float_difference(np.array([inf, inf, 1.0, inf]), np.array([-inf, 1.0, -inf, inf]))
    assert (measures["n_different"], measures["n_infinite"], measures["n_nan_mismatch"]) == (3, 3, 0)
    assert "infinite on one side" in difference_summary(measures)


LIMITS = st.builds(
    ValueLimits,
    absolute=st.none() | st.floats(0, 1e300),
    relative=st.none() | st.floats(0, 1),
    ulps=st.none() | st.integers(0, 2**31),
)


@given(pairs(), LIMITS)
def test_limits_are_symmetric_agree_with_the_measures_and_never_hold_for_nan(pair: Any, limits: ValueLimits) -> None:
    a, b = pair
    measures = float_difference(a, b, limits=limits)
    swapped = float_difference(b, a, limits=limits)
    assert measures["n_outside"] == swapped["n_outside"]
    if a.dtype.kind != "c":
        assert measures["n_outside"] == np.count_nonzero(outside(a, b, limits))
    assert measures["n_outside"] <= measures["n_different"]
    assert measures["n_outside"] >= measures.get("n_nan_mismatch", 0) + measures.get("n_infinite", 0)
    if limits == ValueLimits():
        assert measures["n_outside"] == measures["n_different"]


@given(pairs(), LIMITS, st.floats(1, 10), st.integers(0, 100))
def test_looser_limits_never_have_more_outside(pair: Any, limits: ValueLimits, factor: float, more: int) -> None:
    looser = ValueLimits(
        absolute=None if limits.absolute is None else limits.absolute * factor,
        relative=None if limits.relative is None else limits.relative * factor,
        ulps=None if limits.ulps is None else limits.ulps + more,
    )
    strict, loose = (float_difference(*pair, limits=each)["n_outside"] for each in (limits, looser))
    assert loose <= strict


def test_a_limit_taken_from_the_report_holds() -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal(500).astype("f4")
    b = (a * (1 + generator.random(500) / 1000)).astype("f4")
    measures = float_difference(a, b)
    for limits in (
        ValueLimits(absolute=measures["max_abs"]),
        ValueLimits(relative=measures["max_rel"]),
        ValueLimits(ulps=measures["max_ulp"]),
    ):
        assert float_difference(a, b, limits=limits)["n_outside"] == 0
    for limits in (
        ValueLimits(absolute=measures["max_abs"] * 0.999),
        ValueLimits(relative=measures["max_rel"] * 0.999),
        ValueLimits(ulps=measures["max_ulp"] - 1),
    ):
        assert float_difference(a, b, limits=limits)["n_outside"] > 0


@pytest.mark.parametrize("limits", [ValueLimits(ulps=5), ValueLimits(absolute=1e300), ValueLimits(relative=0.9)])
def test_an_infinity_is_never_near_the_largest_number(limits: ValueLimits) -> None:
    a, b = np.array([np.finfo("f8").max]), np.array([np.inf])
    assert float_difference(a, b, limits=limits)["n_outside"] == 1


def test_integers_have_absolute_and_relative_limits_but_no_ulps() -> None:
    a, b = np.array([100, 2**62], "i8"), np.array([101, 2**62 + 1], "i8")
    assert float_difference(a, b, limits=ValueLimits(absolute=1))["n_outside"] == 0
    assert float_difference(a, b, limits=ValueLimits(absolute=0.9))["n_outside"] == 2
    assert float_difference(a, b, limits=ValueLimits(relative=0.001))["n_outside"] == 1
    assert float_difference(a, b, limits=ValueLimits(ulps=1000))["n_outside"] == 2


def test_what_has_no_distance_is_within_no_limits() -> None:
    a, b = np.array([1], "u1"), np.array([2], "u1")
    limits = ValueLimits(absolute=100, relative=0.9, ulps=100)
    assert float_difference(a, b, dtype_name="float8_e5m2", limits=limits)["n_outside"] == 1
