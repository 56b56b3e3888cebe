"""Policies as files: what they say reaches the policy, and every mistake in one is told in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from f3rm_verify.errors import UsageError
from f3rm_verify.policy import DIFF_POLICY, IGNORED, RUN_POLICY, Limit, Policy
from f3rm_verify.policy_file import POLICY_FILE, PYPROJECT, find_policy

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "policy.md"
GOOD = """
required = ["curves", "renders"]
[ignore.curves]
"Eval*" = "the evaluation draws images at random"
[limits.curves]
"Train Loss" = { relative = 1e-5, absolute = 1e-8 }
"*" = { ulps = 2 }
[limits.renders."*/rgb"]
pixels = 0.01
psnr = 50
"""


def write(folder: Path, text: str, name: str = POLICY_FILE) -> Path:
    (folder / name).write_text(text, "utf8")
    return folder / name


def test_what_a_file_says_is_the_policy(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    policy = find_policy(RUN_POLICY, path)
    assert policy.required == ("curves", "renders")
    assert policy.ignored["curves"] == {**IGNORED["curves"], "Eval*": "the evaluation draws images at random"}
    assert policy.ignored["metrics"] == IGNORED["metrics"]
    assert policy.limit("curves", "Train Loss") == Limit(pattern="Train Loss", relative=1e-5, absolute=1e-8)
    assert policy.limit("curves", "Train Loss Dict/rgb_loss") == Limit(pattern="*", ulps=2)
    assert policy.limit("renders", "eval_0000/rgb") == Limit(pattern="*/rgb", pixels=0.01, psnr=50)
    assert policy.limit("renders", "eval_0000/depth") is policy.limit("metrics", "psnr") is None
    data = policy.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["source"] == str(path)
    assert data["limits"]["renders"] == {"*/rgb": {"pixels": 0.01, "psnr": 50}}


def test_without_a_file_the_default_is_identity(tmp_path: Path) -> None:
    assert find_policy(RUN_POLICY, folder=tmp_path) is RUN_POLICY
    assert RUN_POLICY.limits == {}
    assert RUN_POLICY.to_dict()["source"] == "default: identical bit by bit"


def test_an_empty_file_is_the_default_by_another_source(tmp_path: Path) -> None:
    write(tmp_path, "")
    policy = find_policy(DIFF_POLICY, folder=tmp_path)
    assert {**policy.to_dict(), "source": None} == {**DIFF_POLICY.to_dict(), "source": None}
    assert policy.source == str(tmp_path / POLICY_FILE)


def test_where_a_policy_is_looked_for(tmp_path: Path) -> None:
    write(tmp_path, "[project]\nname = 'x'\n", PYPROJECT)
    assert find_policy(DIFF_POLICY, folder=tmp_path) is DIFF_POLICY
    project = write(tmp_path, "[tool.f3rm-verify]\nrequired = ['curves']\n", PYPROJECT)
    assert find_policy(DIFF_POLICY, folder=tmp_path).required == ("curves",)
    assert find_policy(DIFF_POLICY, folder=tmp_path).source == f"{project} [tool.f3rm-verify]"
    write(tmp_path, "required = ['renders']")
    assert find_policy(DIFF_POLICY, folder=tmp_path).required == ("renders",)
    assert find_policy(DIFF_POLICY, project).required == ("curves",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("required = [", "cannot be read"),
        ("requird = ['curves']", "the policy has no 'requird'; did you mean required?"),
        ("verdict = 1", "the policy has no 'verdict'; there are required, flip, ignore, limits."),
        ("required = 'curves'", 'required is no list of artefacts; write for example required = ["curves", '),
        ("required = [1]", "required is no list of artefacts"),
        ("required = ['curve']", "required has no 'curve'; did you mean curves?"),
        ("required = []", "requires nothing that a training puts out"),
        ("required = ['setup', 'seeding']", "requires nothing that a training puts out"),
        ("flip = 1", "flip is 1; write true or false"),
        ("ignore = 1", "ignore is int, and not a table"),
        ("[ignore.curvs]", "ignore has no 'curvs'; did you mean curves?"),
        ("[ignore.seeding]\nx = 'y'", "ignore.seeding cannot be set: its claims hold or do not"),
        ("[ignore.trace]\nx = 'y'", "ignore.trace cannot be set: leave it out with `required`"),
        ("[ignore.curves]\n'a' = true", "ignore.curves has no reason for 'a'"),
        ("[ignore.curves]\n'a' = ''", "ignore.curves has no reason for 'a'"),
        ("[ignore.curves]\n'a' = ' - '", "ignore.curves has no reason for 'a'"),
        ("[ignore.curves]\n'*' = 'all'", "ignores everything, by the pattern '*'"),
        ("[ignore.renders]\n'*/*' = 'all'", "ignores everything, by the pattern '*/*'"),
        ("[ignore.checkpoints]\n'?*' = 'all'", "ignores everything, by the pattern '?*'"),
        ("[ignore.checkpoints]\n'' = 'all'", "ignores everything, by the pattern ''"),
        ("[limits.setup]\n'a' = {absolute = 1}", "limits.setup cannot be set: it holds the conditions of the runs"),
        ("[limits.seeding]\n'a' = {absolute = 1}", "limits.seeding cannot be set: its claims hold or do not"),
        ("[limits.trace]\n'a' = {absolute = 1}", "limits.trace cannot be set: its digests know only equal"),
        ("[limits.render]", "limits has no 'render'; did you mean renders?"),
        (
            "[limits.curves]\nabsolute = 1",
            """limits.curves has absolute without a pattern; write [limits.curves."*"]""",
        ),
        ("[limits.curves]\n'a' = 1", "limits.curves.'a' is int, and not a table"),
        ("[limits.curves]\n'a' = {}", "sets no limit for 'a'"),
        ("[limits.curves]\n'a' = {abs = 1}", "limits.curves.'a' has no 'abs'; there are absolute, relative, ulps"),
        ("[limits.curves]\n'a' = {absolut = 1}", "limits.curves.'a' has no 'absolut'; did you mean absolute?"),
        ("[limits.metrics]\n'a' = {psnr = 1}", "limits.metrics.'a' has no 'psnr'"),
        ("[limits.checkpoints]\n'a' = {pixels = 0.1}", "limits.checkpoints.'a' has no 'pixels'"),
        ("[limits.curves]\n'a' = {absolute = '1'}", "limits.curves.'a': absolute is '1', and not a number"),
        ("[limits.curves]\n'a' = {absolute = true}", "limits.curves.'a': absolute is True, and not a number"),
        ("[limits.curves]\n'a' = {ulps = 1.5}", "limits.curves.'a': ulps is 1.5, and not a whole number"),
        ("[limits.curves]\n'a' = {absolute = -1}", "limit absolute of 'a' is -1; give a number from 0 on"),
        ("[limits.curves]\n'a' = {absolute = nan}", "limit absolute of 'a' is nan; give a number from 0 on"),
        ("[limits.curves]\n'a' = {absolute = inf}", "limit absolute of 'a' is inf; give a number from 0 on"),
        ("[limits.curves]\n'a' = {ulps = -1}", "limit ulps of 'a' is -1; give a number from 0 on"),
        (f"[limits.curves]\n'a' = {{ulps = {10**30}}}", "ulps is larger than any limit that makes sense"),
        ("[limits.curves]\n'a' = {ulps = 2147483648}", "accepts any float32"),
        ("[limits.curves]\n'a' = {relative = 1}", "accepts values of any size; give less than 1"),
        ("[limits.renders]\n'a' = {pixels = 1.0}", "accepts any picture of the same size; give less than 1"),
        ("[limits.renders]\n'a' = {psnr = 0}", "is 0 dB, which accepts noise; give more"),
        ("[limits.renders]\n'a' = {psnr = nan}", "limit psnr of 'a' is nan"),
    ],
)
@pytest.mark.parametrize("name", [POLICY_FILE, PYPROJECT])
def test_every_mistake_is_told_in_one_sentence(tmp_path: Path, text: str, message: str, name: str) -> None:
    if name == PYPROJECT:
        text = text.replace("[limits", "[tool.f3rm-verify.limits").replace("[ignore", "[tool.f3rm-verify.ignore")
        text = text if text.startswith("[tool") else f"[tool.f3rm-verify]\n{text}"
    path = write(tmp_path, text, name)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        find_policy(RUN_POLICY, folder=tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_named_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.toml cannot be read \(No such file or directory\)"):
        find_policy(RUN_POLICY, tmp_path / "no.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        find_policy(RUN_POLICY, tmp_path)
    with pytest.raises(UsageError, match=r"has no table \[tool\.f3rm-verify\]"):
        find_policy(RUN_POLICY, write(tmp_path, "", PYPROJECT))
    (tmp_path / "large.toml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UsageError, match="larger than"):
        find_policy(RUN_POLICY, tmp_path / "large.toml")


def test_the_documents_example_is_a_policy(tmp_path: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text("utf8"), re.DOTALL)
    assert examples
    policies = [find_policy(DIFF_POLICY, write(tmp_path, text, f"{i}.toml")) for i, text in enumerate(examples)]
    assert {artefact for policy in policies for artefact in policy.limits} == {
        "curves",
        "metrics",
        "checkpoints",
        "renders",
    }
    numbers = {
        key for policy in policies for limits in policy.limits.values() for one in limits for key in one.numbers()
    }
    assert numbers == {"absolute", "relative", "ulps", "pixels", "psnr"}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda children: (
            st.lists(children)
            | st.dictionaries(
                st.sampled_from(["required", "ignore", "limits", "curves", "renders", "absolute", "ulps", "psnr", "*"])
                | st.text(),
                children,
            )
        ),
    )
)
def test_any_data_is_a_policy_or_one_sentence(data: object) -> None:
    from f3rm_verify.policy_file import read_policy

    try:
        policy = read_policy(data, default=DIFF_POLICY, source="x.toml")
    except UsageError as error:
        assert str(error).startswith("x.toml: ")
    else:
        assert isinstance(policy, Policy)
        policy.check()
