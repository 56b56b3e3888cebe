from __future__ import annotations

import collections
import gc
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers import checkpoint as checkpoint_module
from f3rm_verify.readers import torch_zip
from f3rm_verify.readers.checkpoint import Checkpoint, Named, Tensor, read_checkpoint

torch = pytest.importorskip("torch")

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
DTYPES += ["uint16", "uint32", "uint64", "bool", "complex64", "complex128"]
DTYPES += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def write_zip(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        zipped.writestr("archive/data.pkl", pickled)
        zipped.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            zipped.writestr(f"archive/data/{key}", data)
    return path


def assert_same(ours: Any, theirs: Any) -> None:
    """Ours, as read here, holds exactly what torch.load returned."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach()
        assert isinstance(ours, Tensor)
        assert ours.dtype == str(theirs.dtype).removeprefix("torch.")
        assert ours.shape == tuple(theirs.shape) == ours.array.shape
        assert ours.array.tobytes() == theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert ours.crc_ok
    elif isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is (list if isinstance(theirs, list) else tuple)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert type(ours) is type(theirs)
        assert repr(ours) == repr(theirs)


def check(path: Path, value: Any, **options: Any) -> Checkpoint:
    save(path, value, **options)
    read = read_checkpoint(path)
    assert_same(read.values, torch.load(path, weights_only=options.get("pickle_protocol", 2) == 2))
    return read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "step-000000009.ckpt"


def refused(path: Path, match: str | None = None) -> None:
    """Reading ends in one sentence that names the file."""
    with pytest.raises(UnreadableError, match=match) as caught:
        read_checkpoint(path).leaves()
    assert str(caught.value).startswith(f"{path.name}: ")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_what_torch_loads(path: Path, name: str) -> None:
    values = torch.tensor([0.0, 1.0, 0.5, 7.0, 3.0, 2.0]).to(getattr(torch, name)).reshape(2, 3)
    read = check(path, {"a": values, "b": values[1], "scalar": values[0, 1], "empty": values[:, :0]})
    assert read.values["a"].dtype == name


def test_dtypes_that_numpy_lacks_are_their_bits(path: Path) -> None:
    read = check(path, {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(1).to(torch.float8_e5m2)})
    assert read.values["a"].array.tolist() == [0x3F80, 0x3F80]
    assert read.values["b"].array.tolist() == [0x3C]


def test_views_are_what_torch_loads(path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "offset": base[1, 1:],
        "every other": base[..., ::2],
        "expanded": torch.ones(1).expand(3, 5),
        "expanded again": base[:, :1].expand(2, 7, 4),
        "diagonal": base[0].diagonal(),
        "odd strides": torch.empty_strided((1, 3), (977, 1)).zero_(),
        "permuted": base.permute(2, 0, 1)[:, 1:, :],
    }
    read = check(path, views)
    assert not any(tensor.array.flags.writeable for tensor in read.values.values())


def test_parameters_modules_and_attributes_are_what_torch_loads(path: Path) -> None:
    tied = torch.nn.Parameter(torch.randn(3))
    marked = torch.nn.Parameter(torch.randn(3))
    marked.label = "a Python attribute"
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    read = check(path, {"tied": [tied, tied], "pipeline": module.state_dict(), "step": 3})
    assert "pipeline/0.weight" in read.leaves()
    save(path, {"marked": marked})
    assert_same(read_checkpoint(path).values, {"marked": marked})


def test_the_state_of_a_training_is_what_torch_loads(path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    value = {
        "step": 2,
        "pipeline": model.state_dict(),
        "optimizers": {"fields": optimizer.state_dict()},
        "schedulers": {"fields": scheduler.state_dict()},
        "scalers": scaler.state_dict(),
    }
    for protocol in (2, 4, 5):
        leaves = check(path, value, pickle_protocol=protocol).leaves()
    assert leaves["step"] == 2
    assert leaves["pipeline/weight"].shape == (2, 3)
    assert leaves["optimizers/fields/state/0/exp_avg"].array.any()
    assert leaves["optimizers/fields/param_groups/[0]/betas/(1)"] == 0.999
    assert leaves["schedulers/fields/last_epoch"] == 3
    assert leaves["schedulers/fields/lr_lambdas/[0]"] is None
    assert leaves["scalers/growth_interval"] == 2000


def test_other_plain_values_are_read(path: Path) -> None:
    value = {
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
        "bytes": b"\xff/",
        "no bytes": b"",
        "array": bytearray(b"ab"),
        "complex": complex(1, -0.0),
        "set": {1, "a"},
        "frozen": frozenset([2]),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, {1: [2]}),
        "numpy": np.float64(0.1),
        "integer": np.int32(-5),
        "truth": np.bool_(True),
        "large": -(2**100),
        "none": None,
        "empty": {"dict": {}, "list": [], "tuple": ()},
    }
    for protocol in (2, 3, 4, 5):
        leaves = read_checkpoint(save(path, value, pickle_protocol=protocol)).leaves()
        assert leaves["size/(1)"] == 3
        assert leaves["device"] == Named("device", "cuda:1")
        assert leaves["dtype"] == Named("dtype", "float16")
        assert (leaves["bytes"], leaves["no bytes"], leaves["array"]) == (b"\xff/", b"", b"ab")
        assert repr(leaves["complex"]) == "(1-0j)"
        assert (leaves["set"], leaves["frozen"]) == ({1, "a"}, {2})
        assert (leaves["counter/a"], leaves["default/1/[0]"], leaves["large"], leaves["none"]) == (
            2,
            2,
            -(2**100),
            None,
        )
        assert [leaves[name].dtype for name in ("numpy", "integer", "truth")] == [
            "numpy.float64",
            "numpy.int32",
            "numpy.bool",
        ]
        assert [leaves[name].array.item() for name in ("numpy", "integer", "truth")] == [0.1, -5, True]
        assert leaves["empty/dict"] == Named("empty", "dict")


KEYS = st.one_of(
    st.text(max_size=4), st.integers(-2, 2), st.sampled_from(["True", "nan", "[0]", "(0)", "0", "a/b", '"0"'])
)
TENSORS = st.builds(
    lambda shape, dtype, seed, transpose: (lambda t: t.T if transpose and t.ndim == 2 else t)(
        (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    st.integers(0, 9),
    st.booleans(),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5))


def nested(leaf: st.SearchStrategy[Any], *, ordered: bool = True) -> st.SearchStrategy[Any]:
    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            st.dictionaries(KEYS, inner, max_size=3),
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            *([st.dictionaries(KEYS, inner, max_size=2).map(collections.OrderedDict)] if ordered else []),
        )

    return st.recursive(leaf, containers, max_leaves=8)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=st.dictionaries(KEYS, nested(TENSORS | SCALARS), min_size=1, max_size=4), protocol=st.sampled_from([2, 4]))
def test_any_structure_is_what_torch_loads(path: Path, value: Any, protocol: int) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    path.write_bytes(buffer.getvalue())
    assert_same(read_checkpoint(path).values, torch.load(path, weights_only=False))


def canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return "dict", frozenset((type(key).__name__, repr(key), canonical(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value).__name__, tuple(canonical(item) for item in value)
    return repr(value)


SMALL = st.dictionaries(KEYS, nested(st.integers(0, 1), ordered=False), max_size=2)


@settings(max_examples=200, deadline=None)
@given(SMALL, SMALL)
def test_two_structures_flatten_alike_only_if_they_are_alike(a: dict[Any, Any], b: dict[Any, Any]) -> None:
    flat = [{k: repr(v) for k, v in Checkpoint("x", side).leaves().items()} for side in (a, b)]
    assert (flat[0] == flat[1]) == (canonical(a) == canonical(b))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a/b": 1}, {"a": {"b": 1}}),
        ({0: 1}, {"0": 1}),
        ({"a": [1]}, {"a": {0: 1}}),
        ({"a": [1]}, {"a": (1,)}),
        ({"a": [1]}, {"a": {"[0]": 1}}),
        ({None: 1}, {"None": 1}),
        ({True: 1}, {"True": 1}),
        ({'"0"': 1}, {"0": 1}),
        ({"a\\u002fb": 1}, {"a/b": 1}),
        ({b"a": 1}, {"b'a'": 1}),
        ({"a": {}}, {"a": []}),
    ],
)
def test_keys_that_look_alike_have_paths_of_their_own(path: Path, one: Any, other: Any) -> None:
    flat = [read_checkpoint(save(path, side)).leaves() for side in (one, other)]
    assert flat[0] != flat[1]
    assert [len(leaves) for leaves in flat] == [1, 1]


class Attack:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_calls_are_refused_and_not_made(path: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    attacks = {
        f"{os.system.__module__}.system": Attack(os.system, f"touch {marker}"),
        "__builtin__.eval": Attack(eval, f"open({str(marker)!r}, 'w')"),
        "__builtin__.getattr": Attack(getattr, "a", "upper"),
        "torch.serialization.load": Attack(torch.load, str(marker)),
        "torch._utils._rebuild_qtensor": Attack(torch._utils._rebuild_qtensor, 1),
        "numpy.load": Attack(np.load, str(marker)),
        "pathlib": path,
        f"{__name__}": Attack,
    }
    for name, attack in attacks.items():
        refused(save(path, {"a": attack}), f"it asks for '{name}")
    assert not marker.exists()


def test_a_refused_name_is_not_imported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f3rm_verify_planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(write_zip(path, b"\x80\x02cf3rm_verify_planted\nrun\n."), "f3rm_verify_planted.run")
    named = b"\x80\x04\x8c\x13f3rm_verify_planted\x8c\x03run\x93."
    refused(write_zip(path, named), "f3rm_verify_planted.run")
    assert "f3rm_verify_planted" not in sys.modules


GLOBAL = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02" + GLOBAL + b"}X\x01\x00\x00\x00aK\x01sb.", "sets attributes of Global"),
        (b"\x80\x02]}b.", "sets attributes of list"),
        (b"\x80\x02c__builtin__\nlist\n)R.", "which nothing may"),
        (b"\x80\x02]K\x01R.", "which nothing may"),
        (b"\x80\x02" + GLOBAL + b")\x81.", "NEWOBJ"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02" + GLOBAL + b")R.", "TypeError"),
        (b"\x80\x02" + GLOBAL + b".", "no dict"),
        (b"\x80\x02}.", "no dict with anything in it"),
        (b"\x80\x02}(K\x01" + GLOBAL + b"u.", "which is no value"),
        (b"\x80\x02}((K\x01tK\x01u.", "tuple where"),
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02}K\x01X\xff\xff\xff\xff", "damaged"),
        (b"\x80\x02}(K\x01\x8a\xff" + b"\x01" * 255 + b"u.", "integer of 2033 bits"),
        (b"\x80\x02}q\x00(K\x01h\x00u.", "nested"),
        (b"\x80\x02}(K\x01" + b"]" * 100_000 + b"a" * 99_999 + b"u.", "nested"),
        (b"\x80\x02}(K\x01)" + b"\x85" * 100_000 + b"u.", "nested"),
        (b"\x80\x02}()" + b"\x85" * 100_000 + b"K\x01u.", "tuple where"),
        (b"\x80\x02}(X\xd0\x07\x00\x00" + b"a" * 2000 + b"K\x01u.", "names are longer"),
    ],
)
def test_hostile_pickles_are_refused_at_once(path: Path, pickled: bytes, reason: str) -> None:
    refused(write_zip(path, pickled), reason)


def test_a_huge_memo_index_takes_no_memory(path: Path) -> None:
    write_zip(path, b"\x80\x02}(K\x01K\x02r\xf0\xff\xff\xffu.")
    assert read_checkpoint(path).values == {1: 2}


def test_shared_lists_that_multiply_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_LEAVES", 1000)
    laughs: list[Any] = ["ha"]
    for _ in range(30):
        laughs = [laughs, laughs]
    refused(save(path, {"a": laughs}), "more than 1,000 values")


class Reference:
    """What torch's pickler writes for a storage."""

    def __init__(self, kind: Any, key: Any, count: Any) -> None:
        self.reference = ("storage", kind, key, "cpu", count)


def crafted(path: Path, call: Any, storages: dict[str, bytes], **options: Any) -> Path:
    """A checkpoint of {"a": call}, with References as torch writes storages."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.reference if isinstance(value, Reference) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"a": call})
    return write_zip(path, buffer.getvalue(), storages, **options)


def view(offset: Any, shape: Any, strides: Any, *, key: Any = "0", count: Any = 6, rest: Any = ()) -> Attack:
    storage = Reference(torch.FloatStorage, key, count)
    hooks: Any = collections.OrderedDict()
    return Attack(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, hooks, *rest)


SIX = {"0": np.arange(6, dtype="<f4").tobytes()}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (view(0, (7,), (1,)), "outside of its storage"),
        (view(1, (6,), (1,)), "outside of its storage"),
        (view(6, (), ()), "outside of its storage"),
        (view(0, (2, 3), (4, 1)), "outside of its storage"),
        (view(2**62, (2,), (2**62,)), "outside of its storage"),
        (view(-1, (2,), (1,)), "negative"),
        (view(5, (2,), (-1,)), "negative"),
        (view(0, (-2,), (1,)), "negative"),
        (view(0, (2, 3), (1,)), "damaged"),
        (view(0, (2.0,), (1,)), "float where int"),
        (view(True, (2,), (1,)), "bool where int"),
        (view(0, "ab", (1, 1)), "str where"),
        (view(0, (2**40,), (0,)), "far more than the file"),
        (view(0, (2**20, 2**20, 2**20), (0, 0, 0)), "far more than the file"),
        (view(0, (1,) * 33, (1,) * 33), "more than 32 dimensions"),
        (view(0, (6,), (1,), count=5), "has 24 bytes, not 5 values"),
        (view(0, (6,), (1,), count=7), "has 24 bytes, not 7 values"),
        (view(0, (6,), (1,), key="1"), "'data/1' is missing"),
        (view(0, (6,), (1,), key="../data.pkl"), "is missing"),
        (view(0, (6,), (1,), key=0), "int where str"),
        (view(0, (6,), (1,), rest=({"conj": True},)), "lazily conjugated"),
        (Reference(torch.FloatStorage, "0", 6), "which is no value"),
        (Reference("FloatStorage", "0", 6), "str where Global"),
    ],
)
def test_tensors_never_reach_outside_of_their_storage(path: Path, call: Any, reason: str) -> None:
    refused(crafted(path, call, SIX), reason)


def test_crafted_tensors_inside_their_storage_are_read(path: Path) -> None:
    for call, expected in [
        (view(1, (2, 2), (2, 1)), [[1, 2], [3, 4]]),
        (view(5, (), ()), 5),
        (view(2, (3,), (0,)), [2, 2, 2]),
        (view(0, (0, 9), (1, 1)), []),
    ]:
        assert read_checkpoint(crafted(path, call, SIX)).values["a"].array.tolist() == expected


def test_compressed_storages_are_read_up_to_a_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crafted(path, view(0, (6,), (1,)), SIX, compression=zipfile.ZIP_DEFLATED)
    assert read_checkpoint(path).values["a"].array.tolist() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(torch_zip, "MAX_INFLATED_BYTES", 2**20)
    crafted(path, view(0, (6,), (1,), count=2**20), {"0": bytes(2**22)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**14
    refused(path, "unpacks to more than 1,048,576 bytes")
    crafted(path, view(0, (6,), (1,)), SIX, compression=zipfile.ZIP_BZIP2)
    refused(path, "not supported")


def test_a_compressed_storage_that_lies_about_its_size_is_refused(path: Path) -> None:
    crafted(path, view(0, (6,), (1,)), {"0": bytes(10_000)}, compression=zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", 10_000), struct.pack("<L", 24)))
    refused(path, "not the size")


def test_limits_on_pickle_and_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, {"a": torch.ones(2)})
    monkeypatch.setattr(torch_zip, "MAX_PICKLE_BYTES", 10)
    refused(path, "data.pkl has .* bytes, more")
    monkeypatch.setattr(torch_zip, "MAX_DIRECTORY_BYTES", 100)
    refused(path, "directory has .* bytes, more")


def test_other_files_are_refused_with_their_reason(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_bytes(b"no checkpoint at all" * 9)
    refused(path, "does not begin like")
    save(path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    refused(path, "before 1.6")
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a.txt", "text")
    refused(path, "no data.pkl")
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("archive/data.pkl", b"\x80\x02}.")
        zipped.writestr("archive/byteorder", "big")
    refused(path, "big-endian")
    with zipfile.ZipFile(path, "w") as zipped, pytest.warns(UserWarning, match="Duplicate"):
        zipped.writestr("archive/data.pkl", b"\x80\x02}.")
        zipped.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(path, "one name")
    refused(tmp_path, "not a regular file")
    refused(tmp_path / "none.ckpt", "No such file")
    save(path, torch.ones(2))
    refused(path, "no dict")
    save(path, {"a": torch.ones(3).to_sparse()})
    refused(path, "sparse")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_refused_without_waiting(path: Path) -> None:
    os.mkfifo(path)
    refused(path, "not a regular file")


def test_truncated_files_are_refused(path: Path) -> None:
    whole = save(path, {"a": torch.arange(300.0), "b": torch.ones(3)}).read_bytes()
    for length in range(1, len(whole), 37):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "truncated")


def test_no_damage_escapes_as_another_error(path: Path) -> None:
    whole = save(path, {"a": torch.arange(3.0), "b": [1, {"c": "text"}], "d": np.float64(1)}).read_bytes()
    with zipfile.ZipFile(path) as zipped:
        names = [name for name in zipped.namelist() if name.endswith("data.pkl")]
        pickled = zipped.read(names[0])
    draw = random.Random(0)
    read = 0
    for round_ in range(400):
        if round_ % 2:
            damaged = bytearray(pickled)
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            write_zip(path, bytes(damaged), {"0": bytes(12)})
        else:
            damaged = bytearray(whole)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
        try:
            read_checkpoint(path).leaves()
            read += 1
        except UnreadableError as error:
            assert str(error).startswith(path.name)
    assert 0 < read < 400


def flip(path: Path, needle: bytes, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    assert raw.count(needle) == 1
    raw[raw.index(needle)] ^= 1 << bit
    path.write_bytes(raw)


def test_a_flipped_bit_in_a_storage_is_read_and_its_checksum_reported(path: Path) -> None:
    save(path, {"a": torch.arange(9.0), "b": torch.full((4,), 3.5), "c": torch.ones(2)})
    flip(path, np.full(4, 3.5, "<f4").tobytes())
    values = read_checkpoint(path).values
    assert [values[name].crc_ok for name in "abc"] == [True, False, True]
    assert values["b"].array[0] == np.nextafter(np.float32(3.5), np.float32(4))


def test_a_flipped_bit_in_the_structure_is_unreadable(path: Path) -> None:
    save(path, {"a": torch.ones(2), "needle": 1})
    flip(path, b"needle")
    refused(path, "data.pkl does not match its checksum")


def test_a_file_without_checksums_is_read(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        read = check(path, {"a": torch.ones(2)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read.values["a"].crc_ok


def test_the_file_is_closed_with_its_last_tensor(path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")

    def is_open() -> bool:
        return str(path) in {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}

    tensor = read_checkpoint(save(path, {"a": torch.ones(2)})).values["a"]
    assert is_open()
    del tensor
    gc.collect()
    assert not is_open()


def test_reading_needs_no_torch(path: Path) -> None:
    save(path, {"a": torch.ones(2)})
    program = (
        "import sys, pathlib\n"
        "from f3rm_verify.readers.checkpoint import read_checkpoint\n"
        "import f3rm_verify.compare_checkpoints\n"
        f"assert read_checkpoint(pathlib.Path({str(path)!r})).values['a'].array.tolist() == [1, 1]\n"
        "assert not {'torch', 'nerfstudio'} & set(sys.modules)\n"
    )
    root = Path(checkpoint_module.__file__).parents[2]
    finished = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
