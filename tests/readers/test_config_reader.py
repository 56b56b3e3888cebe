from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.config import MAX_BYTES, flatten, read_config

# What nerfstudio's yaml.dump writes, in small: objects, names, aliases of names, tuples, enumerations and paths.
CONFIG = """\
!!python/object:nerfstudio.engine.trainer.TrainerConfig
_target: &id001 !!python/name:nerfstudio.engine.trainer.Trainer ''
data: !!python/object/apply:pathlib.PosixPath
- /
- some
- data
gradient_accumulation_steps: {}
logging: !!python/object:nerfstudio.configs.base_config.LoggingConfig
  relative_log_dir: !!python/object/apply:pathlib.PosixPath []
  stats_to_track: !!python/tuple
  - !!python/object/apply:nerfstudio.utils.writer.EventName
    - Train Iter (time)
machine: !!python/object:nerfstudio.configs.base_config.MachineConfig
  seed: 42
mixed_precision: true
optimizers:
  fields:
    optimizer:
      _target: *id001
      eps: 1.0e-15
      max_norm: null
timestamp: 2024-01-01
"""
EXPECTED = {
    "!": "python/object:nerfstudio.engine.trainer.TrainerConfig",
    "_target": {"!": "python/name:nerfstudio.engine.trainer.Trainer"},
    "data": "/some/data",
    "gradient_accumulation_steps": {},
    "logging": {
        "!": "python/object:nerfstudio.configs.base_config.LoggingConfig",
        "relative_log_dir": ".",
        "stats_to_track": [
            {"!": "python/object/apply:nerfstudio.utils.writer.EventName", "args": ["Train Iter (time)"]}
        ],
    },
    "machine": {"!": "python/object:nerfstudio.configs.base_config.MachineConfig", "seed": 42},
    "mixed_precision": True,
    "optimizers": {
        "fields": {
            "optimizer": {
                "_target": {"!": "python/name:nerfstudio.engine.trainer.Trainer"},
                "eps": 1e-15,
                "max_norm": None,
            }
        }
    },
    "timestamp": "2024-01-01",
}


def read(tmp_path: Path, text: str | bytes) -> Any:
    path = tmp_path / "config.yml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_config(path)


def test_a_config_of_nerfstudio(tmp_path: Path) -> None:
    assert read(tmp_path, CONFIG) == EXPECTED


def test_nothing_is_constructed(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    attacks = [
        f"!!python/object/apply:pathlib.Path.touch [{planted}]",
        f"!!python/object/apply:os.system ['touch {planted}']",
        f"!!python/object/new:os.system ['touch {planted}']",
        "!!python/module:antigravity ''",
    ]
    for attack in attacks:
        data = read(tmp_path, f"a: {attack}")
        assert data["a"]["!"] == attack.split()[0].removeprefix("!!")
    assert not planted.exists()


def test_other_tags_keep_their_name_and_text(tmp_path: Path) -> None:
    data = read(
        tmp_path, "a: !!binary aGk=\nb: !mine [1]\nc: !!set {x}\nd: !!python/complex 1j\ne: !!python/tuple [1]\n"
    )
    assert data == {
        "a": {"!": "binary", "value": "aGk="},
        "b": {"!": "!mine", "args": [1]},
        "c": {"!": "set", "x": None},
        "d": {"!": "python/complex", "value": "1j"},
        "e": [1],
    }


def test_keys_that_are_no_strings(tmp_path: Path) -> None:
    data = read(tmp_path, "1: a\n'1': b\nnull: c\n? !!python/tuple [1, x]\n: d\n")
    assert data == {"!1": "a", "1": "b", "!null": "c", '![1, "x"]': "d"}


def test_an_empty_file_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, "") is None


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1, 2", "not readable as YAML"),
        ("a: *nowhere", "not readable as YAML (found undefined alias"),
        ("a: 1\n---\nb: 2\n", "not readable as YAML (expected a single document"),
        ("&a [*a]", "an alias in it refers to what contains it"),
        ("&a {k: {k: *a}}", "an alias in it refers to what contains it"),
        (BOMB, "its aliases expand to more than"),
        ("[" * 5000, "nested deeper than"),
        ("[" * 80 + "&a " + "[" * 5 + "]" * 5 + "]" * 80 + "\n", None),
        ("- " * 3000 + "x", "nested deeper than"),
        ("a: 1\na: 2\n", "the key 'a' twice"),
        ("'!': python/name:os.system", "a key that begins with '!'"),
        ("a: " + "1" * 1001, "a number of 1001 characters"),
        ("a: " + "1:" * 400 + "1.5", "not readable as YAML"),
        ("a: \x00", "not readable as YAML"),
        (b"a: \xff\xfe", "not UTF-8 text (invalid start byte at byte 3)"),
        ("x" * (MAX_BYTES + 1), f"more than the {MAX_BYTES} that are read"),
        ("[" + "x," * 50_001 + "]", "more than 50000 values"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_config(tmp_path: Path, text: str | bytes, reason: str | None) -> None:
    if reason is None:
        assert read(tmp_path, text) is not None
        return
    with pytest.raises(UnreadableError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith("config.yml: ")
    assert reason in message
    assert "\n" not in message


def test_a_directory_or_nothing_is_no_config(tmp_path: Path) -> None:
    for name, why in (("", "not a regular file"), ("absent.yml", "No such file")):
        with pytest.raises(UnreadableError, match=why):
            read_config(tmp_path / name)


def test_every_truncation_is_read_or_refused(tmp_path: Path) -> None:
    for size in range(0, len(CONFIG), 7):
        try:
            data = read(tmp_path, CONFIG[:size])
        except UnreadableError as error:
            assert str(error).startswith("config.yml: ")
        else:
            assert data != EXPECTED


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda items: (
        st.lists(items, max_size=4) | st.dictionaries(st.text().filter(lambda key: key[:1] != "!"), items, max_size=4)
    ),
    max_leaves=15,
)


@given(PLAIN)
def test_plain_data_survives(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    text = yaml.safe_dump(data, allow_unicode=False)
    assert repr(read(tmp_path_factory.mktemp("config"), text)) == repr(yaml.safe_load(text))


def test_flatten() -> None:
    data = {"a": {"b": [1, {"c": None}], "e": [], "f": {}}, "x.y": 2, "p[0]": 3, "": 4, "n": math.nan}
    flat = flatten(data)
    assert math.isnan(flat.pop("n"))
    assert flat == {
        "a.b[0]": 1,
        "a.b[1].c": None,
        "a.e[]": None,
        "a.f{}": None,
        r"x\.y": 2,
        r"p\[0\]": 3,
        "\\": 4,
    }
    assert flatten(5) == {"": 5}
    assert flatten(EXPECTED)["optimizers.fields.optimizer._target.!"] == "python/name:nerfstudio.engine.trainer.Trainer"


NESTED = st.recursive(
    st.sampled_from([None, 1, "x", "[]", "{}"]),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text("ab.[]0\\{}", max_size=3), items, max_size=3),
    max_leaves=6,
)


@given(NESTED, NESTED)
def test_different_data_flatten_differently(a: Any, b: Any) -> None:
    assert (flatten(a) == flatten(b)) == (a == b)


def test_flatten_is_bounded() -> None:
    shared: Any = ["x"]
    for _ in range(40):
        shared = [shared] * 10
    with pytest.raises(UnreadableError, match="more than 50000 values"):
        flatten(shared)
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UnreadableError, match="nested deeper than 100 levels"):
        flatten(deep)
