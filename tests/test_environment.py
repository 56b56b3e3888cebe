"""What a manifest says about packages, hardware, threads, variables and code."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from f3rm_verify import environment as module
from f3rm_verify.environment import describe_environment


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """As much of a torch without a GPU as is asked here."""
    fake = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0),
        version=types.SimpleNamespace(cuda="12.8"),
        get_num_threads=lambda: 2,
        get_num_interop_threads=lambda: 1,
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


def test_it_is_plain_data(torch: object) -> None:
    described = describe_environment()
    assert json.loads(json.dumps(described)) == described
    assert described["threads"] == {"intra_op": 2, "inter_op": 1}
    assert described["hardware"]["gpus"] == []
    assert described["hardware"]["cuda"] is None
    assert described["hardware"]["cores"] >= 1
    assert described["packages"]["numpy"]
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))


def test_gpus_are_named(torch: types.SimpleNamespace) -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.get_device_name = lambda index: f"GPU {index}"
    hardware = describe_environment()["hardware"]
    assert hardware["gpus"] == ["GPU 0", "GPU 1"]
    assert hardware["cuda"] == "12.8"


def test_variables_that_change_numbers_are_recorded_and_no_others(
    torch: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    matters = ("OMP_NUM_THREADS", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "ATEN_CPU_CAPABILITY", "LD_PRELOAD")
    for name in (*matters, "SECRET_TOKEN", "HOME", "TORCH_HOME", "CUDA_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    variables = describe_environment()["variables"]
    assert variables["MKL_CBWR"] == "COMPATIBLE"
    assert {*matters} <= variables.keys()
    assert not {"SECRET_TOKEN", "HOME", "TORCH_HOME", "CUDA_HOME", "PATH"} & variables.keys()
    assert list(variables) == sorted(variables)


class TestPackages:
    def install(self, folder: Path, name: str, metadata: str | None) -> None:
        (folder / f"{name}.dist-info").mkdir(parents=True)
        if metadata is not None:
            (folder / f"{name}.dist-info" / "METADATA").write_text(metadata)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importlib.metadata's, for a missing name
    def test_the_one_that_is_imported_counts_and_broken_ones_are_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.install(tmp_path / "first", "thing-2.0", "Metadata-Version: 2.1\nName: thing\nVersion: 2.0\n")
        self.install(tmp_path / "second", "thing-1.0", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        self.install(tmp_path / "first", "leftover-1.0", None)
        self.install(tmp_path / "first", "nameless-1.0", "Metadata-Version: 2.1\nVersion: 1.0\n")
        self.install(tmp_path / "first", "versionless", "Metadata-Version: 2.1\nName: versionless\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
        assert module._packages() == {"thing": "2.0"}


class TestGit:
    def git(self, folder: Path, *arguments: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    def test_commit_and_dirtiness(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert module._git() is None
        self.git(tmp_path, "init", "-q")
        assert module._git() is None  # nothing is committed yet
        (tmp_path / "file").write_text("a")
        self.git(tmp_path, "add", "file")
        self.git(tmp_path, "commit", "-q", "-m", "x")
        commit = self.git(tmp_path, "rev-parse", "HEAD")
        (tmp_path / "untracked").write_text("a")
        assert module._git() == {"commit": commit, "dirty": False}
        (tmp_path / "file").write_text("b")
        assert module._git() == {"commit": commit, "dirty": True}

    def test_no_git_is_no_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert module._git() is None


@pytest.mark.parametrize(
    ("text", "cpu", "flags"),
    [
        (
            "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 sse4_1 avx fma\nmodel name\t: B\n",
            "A CPU",
            "avx avx2 fma sse4_1",
        ),
        ("processor : 0\nFeatures : fp asimd sve2\n", None, "asimd sve2"),
        ("processor : 0\n", None, ""),
    ],
)
def test_the_instruction_sets_that_kernels_are_chosen_by(
    torch: object, monkeypatch: pytest.MonkeyPatch, text: str, cpu: str | None, flags: str
) -> None:
    monkeypatch.setattr(module.Path, "read_text", lambda *_: text)
    hardware = describe_environment()["hardware"]
    assert hardware["cpu_flags"] == flags
    assert hardware["cpu"] == cpu if cpu else hardware["cpu"]
