"""What measured blocks are said to cost, and the command that has them measured, with fake trainings."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_training import ROOT, program

from f3rm_verify import cli
from f3rm_verify.cost import effect, quartiles, summarise

SETTINGS = {
    "method": "nerfacto",
    "seed": 42,
    "rays": 4096,
    "threads": 2,
    "device": "cpu",
    "device_name": "a CPU",
    "torch": "2.15.0",
    "counted_steps_per_block": 4,
    "resident": "the kernel's peak, reset before each block",
}


def row(
    seconds: Sequence[tuple[float, float]] = (),
    *,
    name: str = "planted",
    upon: str | None = None,
    reason: str | None = None,
    peaks: tuple[int, int] = (100, 100),
) -> dict[str, Any]:
    """A comparison as it is measured, from pairs of seconds with and without."""
    pairs = [
        {
            side: {"seconds": taken, "peak_bytes": {"resident": peak}}
            for side, taken, peak in zip(("with", "without"), pair, peaks, strict=True)
        }
        for pair in seconds
    ]
    return {"measure": name, "upon": upon, "not_applicable": reason, "pairs": pairs}


def measured(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": 1, "settings": SETTINGS, "comparisons": list(rows)}


def summary(*rows: dict[str, Any]) -> dict[str, Any]:
    return summarise(measured(*rows))["rows"][0]


class TestStatistics:
    def test_quartiles_are_inside_of_what_was_measured(self) -> None:
        assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
        assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
        assert quartiles([1.5]) == (1.5, 1.5, 1.5)

    @pytest.mark.parametrize(
        ("low", "high", "said"),
        [
            (0.9, 1.1, "within noise"),
            (1.0, 1.1, "within noise"),
            (0.9, 1.0, "within noise"),
            (1.001, 1.1, "slower"),
            (0.9, 0.999, "faster"),
        ],
    )
    def test_what_the_middle_half_says(self, low: float, high: float, said: str) -> None:
        assert effect(low, high, 8) == said

    def test_few_pairs_say_nothing(self) -> None:
        assert effect(1.5, 1.6, 7) == "too few pairs"
        assert summary(row([(2.0, 1.0)] * 7))["effect"] == "too few pairs"

    def test_a_slowdown_is_found_however_much_the_machine_drifts(self) -> None:
        found = summary(row([(2.0 * drift, 1.0 * drift) for drift in (1.0, 5.0, 0.1, 30.0) * 2]))
        assert found["time_ratio"] == {"median": 2.0, "quartiles": [2.0, 2.0]}
        assert found["effect"] == "slower"
        assert found["pairs"] == 8

    def test_equal_blocks_are_within_noise(self) -> None:
        draw = random.Random(0)
        found = summary(row([(draw.gauss(1, 0.05), draw.gauss(1, 0.05)) for _ in range(40)]))
        assert found["effect"] == "within noise"
        low, high = found["time_ratio"]["quartiles"]
        assert 0.9 < low < found["time_ratio"]["median"] < high < 1.1

    def test_one_interruption_of_the_machine_moves_nothing(self) -> None:
        assert summary(row([(1.1, 1.0)] * 9 + [(50.0, 1.0)]))["time_ratio"]["median"] == pytest.approx(1.1)

    def test_seconds_are_those_of_one_step(self) -> None:
        assert summary(row([(8.0, 4.0)] * 2))["seconds_per_step"] == {"with": 2.0, "without": 1.0}

    def test_memory_is_the_peak_of_each_side_and_the_paired_difference(self) -> None:
        pairs = row([(1.0, 1.0)] * 3)
        for pair, (own, other) in zip(pairs["pairs"], ((110, 100), (220, 205), (330, 320)), strict=True):
            pair["with"]["peak_bytes"], pair["without"]["peak_bytes"] = {"cuda_reserved": own}, {"cuda_reserved": other}
        assert summary(pairs)["peak_bytes"] == {"cuda_reserved": {"with": 330, "without": 320, "more": 10}}

    def test_what_does_not_apply_has_a_reason_and_no_numbers(self) -> None:
        found = summary(row(reason="no CUDA device"))
        assert found["not_applicable"] == "no CUDA device"
        assert found["pairs"] == 0
        assert {found[name] for name in ("time_ratio", "effect", "seconds_per_step", "peak_bytes")} == {None}


#: What a process that measures leaves.
MEASURES = f"""
run = begin()
run.status("measuring", 99, 100)
run.write_json("verify/cost.json", {measured(row([(1.0, 1.0)] * 8, name="nothing (control)"), row([(2.0, 1.0)] * 8))!r})
run.manifest.update(completion={{"first_step": 0, "steps": 0}})
run.write_manifest()
run.status("done")
"""


class TestCommand:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("f3rm_verify.runner._POLL_SECONDS", 0.02)

    def cost(
        self,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        body: str,
        *options: str,
    ) -> tuple[int, str, str]:
        """Exit code, output and errors of `cost` of a fake ns-train, into folder/out."""
        (folder / "data").mkdir(exist_ok=True)
        words = ["f3rm-verify", "cost", "--ns-train", str(program(folder / "bin", body)), "--method", "nerfacto"]
        words += ["--data", str(folder / "data"), "--output-dir", str(folder / "out"), *options]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    @pytest.fixture
    def command(self, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Any:
        return lambda *words: self.cost(tmp_path, capsys, monkeypatch, *words)

    def test_it_has_one_process_measure_and_tells_what_that_found(self, tmp_path: Path, command: Any) -> None:
        only = ("--only", "memory filling", "--only", "everything")
        code, output, errors = command(
            MEASURES, "--steps", "17", "--seed", "7", *only, "--", "--mixed-precision", "False"
        )
        assert (code, errors) == (0, "")
        assert "nothing was trained" in output
        assert any("planted" in line and "2.000" in line and "slower" in line for line in output.splitlines())
        (call,) = tmp_path.glob("out/*/calls/*.json")
        called = json.loads(call.read_text())
        assert called["argv"][-2:] == ["--mixed-precision", "False"]
        assert called["env"]["F3RM_VERIFY_COST"] == "17"
        assert called["env"]["F3RM_VERIFY_COST_ONLY"] == "memory filling,everything"
        assert called["env"]["PYTHONHASHSEED"] == "7"
        assert "F3RM_VERIFY_RENDER_BUDGET" not in called["env"]
        (file,) = tmp_path.glob("out/*/result.json")
        result = json.loads(file.read_text())
        assert result["settings"] == SETTINGS
        assert result["trained"] is False
        assert [one["effect"] for one in result["rows"]] == ["within noise", "slower"]

    def test_the_result_goes_where_it_is_asked_to(self, tmp_path: Path, command: Any) -> None:
        assert command(MEASURES, "--json", str(tmp_path / "r.json"))[0] == 0
        assert json.loads((tmp_path / "r.json").read_text())["schema_version"] == 1

    def test_a_run_in_which_costs_were_measured_is_never_a_training(self, tmp_path: Path, command: Any) -> None:
        for seed in ("42", "42"):
            command(MEASURES, "--seed", seed)
        runs = sorted(map(str, tmp_path.glob("out/*/verify/nerfacto/cost")))
        assert len(runs) == 2
        script = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); from f3rm_verify import cli; cli.main()"
        done = subprocess.run([sys.executable, "-c", script, "diff", *runs], capture_output=True, text=True)
        assert done.returncode == 3, done.stdout
        assert done.stdout.startswith("INCONCLUSIVE")

    @pytest.mark.parametrize(
        ("body", "code", "said"),
        [
            ("run = begin(); raise ValueError('boom')", 2, "boom"),
            ("print('f3rm-verify: Nothing here can be measured.'); sys.exit(2)", 2, "Nothing here can be measured."),
            ("stock(); time.sleep(60)", 2, "does not run under f3rm-verify's trainer"),
            ("run = begin(); run.step(); run.finish()", 2, "install the same version there"),
            (MEASURES.replace("'schema_version': 1", "'schema_version': 2", 1), 2, "install the same version there"),
            ("os.kill(os.getppid(), 2); time.sleep(60)", 3, "stopped by SIGINT"),
        ],
    )
    def test_a_process_that_measured_nothing(self, command: Any, body: str, code: int, said: str) -> None:
        found, output, errors = command(body)
        assert found == code
        assert said in errors
        assert errors.count("f3rm-verify: ") == 1
        assert "compared" not in errors
        assert "COST" not in output

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--steps", "0"], "--steps"),
            (["--iters", "3"], "--iters"),
            (["--preset", "small"], "--preset"),
            (["--stall-timeout", "nan"], "--stall-timeout"),
            (["--", "--machine.seed", "1"], "--seed"),
        ],
    )
    def test_a_mistake_gives_one_sentence_and_starts_nothing(
        self, tmp_path: Path, command: Any, options: list[str], reason: str
    ) -> None:
        code, output, errors = command(MEASURES, *options)
        assert (code, output) == (2, "")
        assert reason in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "out").exists()
