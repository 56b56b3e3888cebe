"""Which package provides a method in the environment of an ns-train, found without importing anything of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from f3rm_verify.ns_train import TrainingRequest, command, extra_arguments, method_provider

EXPLODES = "raise SystemExit('a provider was imported')"


def install(folder: Path, name: str, entries: str) -> None:
    """A distribution with entry points for nerfstudio; importing its module would be noticed."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[nerfstudio.method_configs]\n{entries}\n")
    (folder / f"{name}.py").write_text(EXPLODES)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.delenv("NERFSTUDIO_METHOD_CONFIGS", raising=False)
    install(tmp_path / "site", "nerfstudio", "nerfacto = nerfstudio.configs:method")
    install(tmp_path / "site", "f3rm_verify", "f3rm = f3rm_verify.f3rm.entry_point:method")
    return tmp_path / "site"


def script(folder: Path, head: str) -> Path:
    """A console script with that beginning."""
    folder.mkdir(exist_ok=True)
    path = folder / "ns-train"
    path.write_text(f"{head}\nraise SystemExit('ns-train was started')\n")
    return path


@pytest.fixture
def ns_train(tmp_path: Path) -> Path:
    return script(tmp_path / "bin", f"#!{sys.executable}")


def test_nerfstudios_own_and_ours_have_no_provider(site: Path, ns_train: Path) -> None:
    assert method_provider(ns_train, "nerfacto") is None
    assert method_provider(ns_train, "f3rm") is None
    assert method_provider(ns_train, "unknown") is None


def test_another_package_is_named(site: Path, ns_train: Path) -> None:
    install(site, "theirs", "f3rm = theirs.f3rm_config:f3rm_method\nlerf = theirs.lerf:method")
    assert method_provider(ns_train, "f3rm") == "theirs"
    assert method_provider(ns_train, "lerf") == "theirs"
    assert method_provider(ns_train, "nerfacto") is None


def test_entry_points_of_another_group_do_not_count(site: Path, ns_train: Path) -> None:
    install(site, "theirs", "x = theirs:x\n[console_scripts]\nf3rm = theirs:main")
    assert method_provider(ns_train, "f3rm") is None


def test_what_a_broken_installation_left_behind_hides_nothing(site: Path, ns_train: Path) -> None:
    (site / "aaa-1.0.dist-info").mkdir()
    install(site, "theirs", "f3rm = theirs.f3rm_config:f3rm_method")
    assert method_provider(ns_train, "f3rm") == "theirs"


def test_what_lies_in_the_working_directory_is_not_installed(
    site: Path, ns_train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "here", "theirs", "f3rm = theirs.f3rm_config:f3rm_method")
    monkeypatch.chdir(tmp_path / "here")
    assert method_provider(ns_train, "f3rm") is None


def test_the_users_own_variable_wins(site: Path, ns_train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "theirs", "f3rm = theirs.f3rm_config:f3rm_method")
    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", "x=y:z,f3rm=mine:method,nerfacto=nerfstudio.configs:method")
    assert method_provider(ns_train, "f3rm") == "mine"
    assert method_provider(ns_train, "x") == "y"
    assert method_provider(ns_train, "nerfacto") is None


@pytest.mark.parametrize(
    "head",
    [
        f"#! {sys.executable} -s",
        f"#!/bin/sh\n'''exec' {sys.executable} \"$0\" \"$@\"\n' '''",
        f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''",
    ],
)
def test_console_scripts_name_their_interpreter_in_several_ways(site: Path, tmp_path: Path, head: str) -> None:
    install(site, "theirs", "f3rm = theirs.f3rm_config:f3rm_method")
    assert method_provider(script(tmp_path / "bin", head), "f3rm") == "theirs"


@pytest.mark.parametrize("head", ["#!/usr/bin/env python3", "#!/bin/sh", ""])
def test_or_lie_beside_it(site: Path, tmp_path: Path, head: str) -> None:
    install(site, "theirs", "f3rm = theirs.f3rm_config:f3rm_method")
    program = script(tmp_path / "bin", head)
    assert method_provider(program, "f3rm") is None  # there is no interpreter to ask
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "elsewhere").symlink_to(program)
    assert method_provider(tmp_path / "elsewhere", "f3rm") == "theirs"


def test_what_the_user_added_to_a_command_is_found_again(tmp_path: Path) -> None:
    added = ("--a", "1", "--b=2", "--flag", "nerfstudio-data", "--downscale-factor", "2")
    request = TrainingRequest(
        seed=3, iters=5, data=tmp_path, method="m", output=tmp_path, ns_train=tmp_path / "ns-train", ns_train_args=added
    )
    words = command(request, side="candidate", seed=3)
    assert extra_arguments(words) == added
    assert extra_arguments([*words[:2], "--max_num_iterations=4", "--data=x", *added]) == added
    assert extra_arguments([]) == ()
