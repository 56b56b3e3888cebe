"""Real processes and process groups, with fake ns-train programs in place of nerfstudio's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_training import GOOD, ROOT, program

from f3rm_verify.errors import TrainingError, UsageError
from f3rm_verify.ns_train import TrainingRequest, find_ns_train, option_is_off, refuse_owned_options
from f3rm_verify.processes import group_lives
from f3rm_verify.runner import Training, Trainings, run_trainings
from f3rm_verify.training_log import last_lines, told_reason

SIDES = {"reference": 42, "candidate": 42}
#: Ends a fake that a test expects to be ended long before.
FOREVER = "time.sleep(60)"


def make_request(folder: Path, body: str, **changes: Any) -> TrainingRequest:
    values: dict[str, Any] = {
        "seed": 42,
        "iters": 3,
        "data": folder,
        "method": "nerfacto",
        "output": folder / "out",
        "ns_train": program(folder / "bin", body),
    }
    return TrainingRequest(**{**values, **changes})


def train(
    folder: Path,
    body: str,
    sides: Mapping[str, int] = SIDES,
    watch: Callable[[Sequence[Training]], None] = lambda _: None,
    **changes: Any,
) -> Trainings:
    return run_trainings(make_request(folder, body, **changes), sides, watch=watch)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes need milliseconds."""
    monkeypatch.setattr("f3rm_verify.runner._POLL_SECONDS", 0.02)


def calls(folder: Path) -> dict[str, dict[str, Any]]:
    """What each fake saw of the world, by side."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "out" / "calls").glob("*.json"))}


def assert_nothing_left(folder: Path) -> None:
    groups = [call["ids"]["group"] for call in calls(folder).values()]
    assert groups
    assert os.getpgrp() not in groups
    assert not [group for group in groups if group_lives(group)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NERFSTUDIO_METHOD_CONFIGS", "mine=my.module:config")
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setenv("F3RM_VERIFY_NONCE", "stale")
        ended = train(folder, GOOD, {**SIDES, "control": 43}, jobs=3, ns_train_args=("--mixed-precision", "False"))
    assert ended.failed is None
    assert ended.interruption is None
    return folder


class TestEqualSides:
    def test_one_seed_reaches_command_line_and_environment_of_both(self, good: Path) -> None:
        for side, call in calls(good).items():
            seed = "43" if side == "control" else "42"
            assert call["argv"][call["argv"].index("--machine.seed") + 1] == seed
            assert call["env"]["PYTHONHASHSEED"] == call["env"]["TCNN_SEED"] == seed
            assert call["env"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    def test_the_sides_differ_only_in_their_names_and_places(self, good: Path) -> None:
        reference, candidate = calls(good)["reference"], calls(good)["candidate"]
        differing = {name for name in reference["env"] if reference["env"][name] != candidate["env"].get(name)}
        assert differing == {"F3RM_VERIFY_NONCE"}
        assert reference["env"].keys() == candidate["env"].keys()
        pairs = zip(reference["argv"], candidate["argv"], strict=True)
        assert [pair for pair in pairs if pair[0] != pair[1]] == [("reference", "candidate")]
        assert "stale" not in (reference["env"]["F3RM_VERIFY_NONCE"], candidate["env"]["F3RM_VERIFY_NONCE"])

    def test_waiting_threads_do_not_spin_and_their_number_is_left_alone(self, good: Path) -> None:
        for call in calls(good).values():
            assert call["env"]["OMP_WAIT_POLICY"] == "PASSIVE"
            assert call["env"]["GOMP_SPINCOUNT"] == "0"
            assert "OMP_NUM_THREADS" not in call["env"]

    def test_the_users_methods_come_before_ours(self, good: Path) -> None:
        value = calls(good)["reference"]["env"]["NERFSTUDIO_METHOD_CONFIGS"]
        assert value == "mine=my.module:config,nerfacto=f3rm_verify.f3rm.wrapped_method:wrapped_method"

    def test_the_command_line_is_a_verification(self, good: Path) -> None:
        words = calls(good)["reference"]["argv"][1:]
        assert words[0] == "nerfacto"
        options = dict(zip(words[1::2], words[2::2], strict=True))
        assert options["--vis"] == "tensorboard"
        assert options["--logging.steps-per-log"] == "1"
        assert options["--max-num-iterations"] == "3"
        assert options["--timestamp"] == "reference"
        assert words[-2:] == ["--mixed-precision", "False"]

    def test_each_training_leads_a_group_of_its_own(self, good: Path) -> None:
        ids = [call["ids"] for call in calls(good).values()]
        assert all(one["pid"] == one["group"] == one["session"] for one in ids)
        assert len({one["group"] for one in ids}) == 3
        assert_nothing_left(good)

    def test_the_log_can_show_every_character(self, good: Path) -> None:
        assert calls(good)["reference"]["env"]["PYTHONIOENCODING"] == "utf-8:backslashreplace"


@pytest.mark.parametrize(
    ("given", "name", "kept"),
    [
        ({"PYTHONHASHSEED": "7"}, "PYTHONHASHSEED", "7"),
        ({"PYTHONHASHSEED": ""}, "PYTHONHASHSEED", "42"),
        ({"OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS", "3"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY", "ACTIVE"),
        ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, "CUBLAS_WORKSPACE_CONFIG", ":16:8"),
    ],
)
def test_what_the_user_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], name: str, kept: str
) -> None:
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    train(tmp_path, GOOD, {"reference": 42})
    assert calls(tmp_path)["reference"]["env"][name] == kept


@pytest.mark.parametrize(
    "spelling", [("--enable_comprehensive-seeding=False",), ("--enable-comprehensive-seeding", "False")]
)
def test_seeding_that_is_off_sets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: tuple[str, ...]
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    train(tmp_path, GOOD, {"reference": 42}, ns_train_args=spelling)
    assert not {"PYTHONHASHSEED", "TCNN_SEED", "CUBLAS_WORKSPACE_CONFIG"} & calls(tmp_path)["reference"]["env"].keys()


@pytest.mark.parametrize(
    ("arguments", "off"),
    [
        ((), False),
        (("--seed-warn-only", "False"), False),
        (("--x", "True", "--x", "False"), True),
        (("--x", "False", "--x=True"), False),
        (("--x",), False),
    ],
)
def test_the_last_spelling_of_an_option_counts(arguments: tuple[str, ...], off: bool) -> None:
    assert option_is_off(arguments, "--x") is off


class TestJobs:
    #: Notes when it begins and ends, and lasts long enough for two to meet.
    TIMED = "began = time.monotonic(); run = begin(); run.steps(); time.sleep(0.5); run.finish();" + (
        "run.write_json('times.json', [began, time.monotonic()])"
    )

    def spans(self, folder: Path) -> list[list[float]]:
        return sorted(json.loads(path.read_text()) for path in (folder / "out").rglob("times.json"))

    def test_one_at_a_time_never_meets(self, tmp_path: Path) -> None:
        running = []

        def watch(trainings: Sequence[Training]) -> None:
            running.append(sum(training.process is not None and not training.ended for training in trainings))

        assert train(tmp_path, self.TIMED, watch=watch, jobs=1).failed is None
        (_, end), (begin, _) = self.spans(tmp_path)
        assert end < begin
        assert max(running) == 1

    def test_two_run_side_by_side_and_a_third_waits(self, tmp_path: Path) -> None:
        assert train(tmp_path, self.TIMED, {**SIDES, "candidate-2": 42}, jobs=2).failed is None
        (_, first_end), (second_begin, second_end), (third_begin, _) = self.spans(tmp_path)
        assert second_begin < first_end
        assert third_begin > min(first_end, second_end)


@pytest.mark.parametrize(
    "argument",
    [
        "--machine.seed",
        "--machine.seed=1",
        "--max_num_iterations",
        "--max_num-iterations=5",
        "--logging.steps_per_log",
        "--output-dir",
        "--vis=viewer",
        "--load-config",
        "--pipeline.datamanager.data",
        "--relative-model-dir",
        "--timestamp",
        "--experiment-name",
    ],
)
@pytest.mark.parametrize("before", [(), ("nerfstudio-data", "--downscale-factor", "2")])
def test_what_run_sets_itself_is_refused(argument: str, before: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_owned_options([*before, argument, "1"])
    assert argument.split("=")[0].replace("_", "-") in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "ours"),
    [
        ("--machine.seed", "--seed"),
        ("--max-num-iterations", "--iters"),
        ("--data", "--data"),
        ("--output-dir", "--output-dir"),
    ],
)
def test_a_refusal_names_our_option(argument: str, ours: str) -> None:
    with pytest.raises(UsageError, match=f"use f3rm-verify's own {ours} before the --"):
        refuse_owned_options([argument])


def test_other_options_pass() -> None:
    refuse_owned_options(["--machine.num-devices", "1", "--pipeline.model.seed", "3", "nerfstudio-data", "--dataset=x"])


@pytest.mark.parametrize("body", ["stock(); " + FOREVER, f"begin(nonce='another'); {FOREVER}", "stock()"])
def test_a_silent_fallback_stops_everything(tmp_path: Path, body: str) -> None:
    with pytest.raises(TrainingError, match="does not run under f3rm-verify's trainer") as caught:
        train(tmp_path, body)
    assert_nothing_left(tmp_path)
    if "stock" in body:
        # nerfstudio says why before it prints its configuration, far above the end of the log.
        assert "Could not load methods" in str(caught.value)


def test_a_fallback_of_one_side_stops_the_other(tmp_path: Path) -> None:
    body = f"run = stock() if 'candidate' in sys.argv else begin()\n{FOREVER}"
    with pytest.raises(TrainingError, match="The candidate training does not run under"):
        train(tmp_path, body)
    assert_nothing_left(tmp_path)


class TestFailures:
    def test_an_unknown_method_shows_what_ns_train_said(self, tmp_path: Path) -> None:
        body = "print('\\x1b[31m\\u256d Parsing error \\u256e\\x1b[0m\\nUnrecognized: no-such'); sys.exit(2)"
        with pytest.raises(TrainingError) as caught:
            train(tmp_path, body, method="no-such")
        message = str(caught.value)
        assert "ended before it began (exit code 2)" in message
        assert "  ╭ Parsing error ╮\n  Unrecognized: no-such" in message

    def test_a_crash_at_a_step_ends_the_other_and_shows_the_traceback(self, tmp_path: Path) -> None:
        body = f"""
run = begin()
run.step(); run.step()
if run.side == 'candidate':
    run.wait_for('reference', 1)
    raise ValueError('lost it\\x07')
spawn_worker(stubborn=True)
{FOREVER}
"""
        ended = train(tmp_path, body)
        assert ended.failed is not None
        assert ended.failed.failure == "The candidate training failed after step 1 (exit code 1)."
        assert last_lines(ended.failed.log).endswith("ValueError: lost it")
        assert [training.step for training in ended.trainings] == [1, 1]
        assert_nothing_left(tmp_path)

    def test_a_full_disk_is_a_crash(self, tmp_path: Path) -> None:
        body = "begin().step(); raise OSError(28, 'No space left on device')"
        ended = train(tmp_path, body)
        assert ended.failed is not None
        assert "failed after step 0 (exit code 1)" in str(ended.failed.failure)
        assert "No space left on device" in last_lines(ended.failed.log)

    def test_a_crash_before_anything(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="ended before it began .ended by signal SIGSEGV"):
            train(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")

    def test_a_crash_in_setup_is_a_failure_of_a_training_that_began(self, tmp_path: Path) -> None:
        ended = train(tmp_path, "begin(); raise KeyError('no transforms.json')")
        assert ended.failed is not None
        assert "failed while setting up" in str(ended.failed.failure)

    def test_exit_code_0_without_a_completion_record_is_a_failure(self, tmp_path: Path) -> None:
        ended = train(tmp_path, "run = begin(); run.steps(); run.finish(completion=False)")
        assert ended.failed is not None
        assert "without completing" in str(ended.failed.failure)

    @pytest.mark.parametrize("stubborn", [False, True])
    def test_a_side_that_stalls_is_stopped_with_its_stubborn_workers(self, tmp_path: Path, stubborn: bool) -> None:
        body = f"""
run = begin(); run.step()
if run.side == 'reference':
    spawn_worker(stubborn={stubborn}); {FOREVER}
while True:
    run.step(); time.sleep(0.05)
"""
        started = time.monotonic()
        ended = train(tmp_path, body, stall_timeout=1.0, iters=10**6)
        assert time.monotonic() - started < 10
        assert ended.failed is not None
        failure = str(ended.failed.failure)
        assert failure.startswith("The reference training made no step for 1 s (after step 0)")
        assert "--stall-timeout" in failure
        assert_nothing_left(tmp_path)

    def test_a_stall_before_the_first_step_counts_too(self, tmp_path: Path) -> None:
        ended = train(tmp_path, FOREVER, stall_timeout=0.5)
        assert ended.failed is not None
        assert "made no step for 0.5 s (while starting)" in str(ended.failed.failure)

    def test_steps_keep_a_slow_training_alive(self, tmp_path: Path) -> None:
        body = "run = begin()\nfor _ in range(6): time.sleep(0.3); run.step()\nrun.finish()"
        assert train(tmp_path, body, {"reference": 42}, stall_timeout=1.5, iters=6).failed is None

    def test_workers_that_outlive_a_good_training_are_ended(self, tmp_path: Path) -> None:
        ended = train(tmp_path, f"spawn_worker(stubborn=True); {GOOD}")
        assert ended.failed is None
        assert_nothing_left(tmp_path)

    def test_a_leader_that_ignores_everything_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("f3rm_verify.processes._GRACE_SECONDS", 0.3)
        body = f"ignore_signals(); run = begin(); spawn_worker(stubborn=True); {FOREVER}"
        assert train(tmp_path, body, stall_timeout=0.5).failed is not None
        assert_nothing_left(tmp_path)

    def test_a_program_that_cannot_be_started(self, tmp_path: Path) -> None:
        broken = tmp_path / "ns-train"
        broken.write_bytes(b"\x00not a program")
        broken.chmod(0o755)
        with pytest.raises(TrainingError, match="The reference training cannot be started.*Exec format error"):
            train(tmp_path, GOOD, ns_train=broken)

    def test_garbage_instead_of_evidence_raises_nothing_else(self, tmp_path: Path) -> None:
        body = "run = begin(); run.write('verify/status.json', b'\\xff{'); run.steps(); run.finish()"
        assert train(tmp_path, body).failed is None
        body = f"run = begin(); run.write('verify/manifest.json', '[]'); {FOREVER}"
        with pytest.raises(TrainingError, match="does not run under"):
            train(tmp_path / "other", body)

    def test_what_the_display_raises_ends_the_trainings(self, tmp_path: Path) -> None:
        def watch(trainings: Sequence[Training]) -> None:
            if all(training.step == 0 for training in trainings):
                raise RuntimeError("display")

        with pytest.raises(RuntimeError, match="display"):
            train(tmp_path, f"begin().step(); {FOREVER}", watch=watch)
        assert_nothing_left(tmp_path)

    def test_nothing_is_trained_over_another_run(self, tmp_path: Path) -> None:
        train(tmp_path, GOOD)
        with pytest.raises(FileExistsError):
            train(tmp_path, GOOD)


LAUNCHER = """
import json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from f3rm_verify.ns_train import TrainingRequest
from f3rm_verify.runner import run_trainings
request = json.loads(sys.argv[1])
paths = {{name: Path(request[name]) for name in ("data", "output", "ns_train")}}
ended = run_trainings(TrainingRequest(**(request | paths)), {sides!r}, watch=lambda _: None)
print(json.dumps([ended.interruption, [(t.phase, t.step, t.failure) for t in ended.trainings]]))
"""


class TestSignals:
    def launch(self, folder: Path, body: str, **changes: Any) -> subprocess.Popen[str]:
        """A launcher in a process of its own, as far as both sides having made two steps."""
        request = make_request(folder, body, iters=10**6)
        script = LAUNCHER.format(root=str(ROOT.parent), sides=SIDES)
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(request).items()}
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", script, json.dumps(values)], stdout=subprocess.PIPE, text=True, **changes
        )
        deadline = time.monotonic() + 20
        while not all(self.step_of(folder, side) >= 1 for side in SIDES):
            if time.monotonic() > deadline:
                process.terminate()
                raise AssertionError(f"no steps: {process.communicate(timeout=20)}")
            time.sleep(0.02)
        return process

    def step_of(self, folder: Path, side: str) -> int:
        try:
            status = (folder / "out/verify/nerfacto" / side / "verify/status.json").read_text()
        except OSError:
            return -1
        return json.loads(status)["step"] or 0

    STEPPING = "run = begin()\nspawn_worker(stubborn=True)\nwhile True: run.step(); time.sleep(0.1)"

    @pytest.mark.parametrize(
        ("number", "name"),
        [(signal.SIGINT, "SIGINT (Ctrl-C)"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
    )
    def test_a_stopped_launcher_ends_everything_and_reports(
        self, tmp_path: Path, number: signal.Signals, name: str
    ) -> None:
        # Under nohup, the tests themselves ignore SIGHUP, and so does whoever inherits that.
        with self.launch(tmp_path, self.STEPPING, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:
            process.send_signal(number)
            process.send_signal(number)  # an impatient second one changes nothing
            output, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        interruption, ends = json.loads(output)
        steps = [step for _, step, _ in ends]
        assert min(steps) >= 1
        assert interruption == (
            f"The trainings were stopped by {name}: the reference after step {steps[0]}, "
            f"the candidate after step {steps[1]}."
        )
        assert [failure for _, _, failure in ends] == [None, None]
        assert_nothing_left(tmp_path)

    def test_a_killed_launcher_takes_its_trainings_along(self, tmp_path: Path) -> None:
        body = "from f3rm_verify.f3rm.lifeline import watch_launcher\nwatch_launcher()\n" + self.STEPPING
        with self.launch(tmp_path, body) as process:
            process.kill()
            process.communicate(timeout=20)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(
            group_lives(call["ids"]["group"]) for call in calls(tmp_path).values()
        ):
            time.sleep(0.02)
        assert_nothing_left(tmp_path)

    def test_a_signal_that_is_ignored_stays_ignored(self, tmp_path: Path) -> None:
        def nohup() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        with self.launch(tmp_path, self.STEPPING, preexec_fn=nohup) as process:
            process.send_signal(signal.SIGHUP)
            step = self.step_of(tmp_path, "reference")
            deadline = time.monotonic() + 10
            while self.step_of(tmp_path, "reference") < step + 3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=20)
        assert "SIGTERM" in json.loads(output)[0]
        assert_nothing_left(tmp_path)

    def test_both_trainings_interrupted_did_not_complete(self, tmp_path: Path) -> None:
        body = """
run = begin()
try:
    while True: run.step(); time.sleep(0.05)
except KeyboardInterrupt:
    pass  # as nerfstudio does: exit code 0
"""
        with self.launch(tmp_path, body) as process:
            for call in calls(tmp_path).values():
                os.kill(call["ids"]["pid"], signal.SIGINT)
            output, _ = process.communicate(timeout=20)
        interruption, ends = json.loads(output)
        assert interruption is None
        assert "without completing" in str([failure for _, _, failure in ends if failure])

    def test_handlers_are_put_back(self, tmp_path: Path) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        train(tmp_path, GOOD, {"reference": 42})
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


class TestLifeline:
    CHILD = """
import os, sys, threading
sys.path.insert(0, {root!r})
from f3rm_verify.f3rm import lifeline
lifeline.watch_launcher(); lifeline.watch_launcher()
print([name for name in sys.modules if name.startswith(("nerfstudio", "torch", "numpy"))], threading.active_count())
"""

    def watchers(self, value: str, **options: Any) -> str:
        return subprocess.run(
            [sys.executable, "-S", "-c", self.CHILD.format(root=str(ROOT.parent))],
            env={**os.environ, "F3RM_VERIFY_LIFELINE": value},
            capture_output=True,
            text=True,
            check=True,
            **options,
        ).stdout.strip()

    def test_only_the_leader_of_a_group_with_our_pipe_watches_and_only_once(self) -> None:
        read_end, write_end = os.pipe()
        inode = os.fstat(read_end).st_ino
        try:
            leader = {"start_new_session": True, "pass_fds": (read_end,)}
            assert self.watchers(f"{read_end}:{inode}", **leader) == "[] 2"
            assert self.watchers(f"{read_end}:{inode}", pass_fds=(read_end,)) == "[] 1"
            assert self.watchers(f"0:{inode}", stdin=subprocess.DEVNULL, **leader) == "[] 1"
            assert self.watchers(f"{read_end}:{inode}", start_new_session=True) == "[] 1"
        finally:
            os.close(read_end)
            os.close(write_end)

    @pytest.mark.parametrize("value", ["", "x", "3", "1:2:3", "-1:5", "99999999999999999999:1"])
    def test_nonsense_in_the_variable_does_nothing(self, value: str) -> None:
        assert self.watchers(value, start_new_session=True) == "[] 1"


class TestNsTrain:
    def test_a_given_program_is_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program(tmp_path, "")
        monkeypatch.chdir(tmp_path)
        assert find_ns_train(Path("ns-train")) == tmp_path / "ns-train"

    def test_a_given_program_that_is_none_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("x")
        for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
            with pytest.raises(UsageError, match="is not a program that can be run"):
                find_ns_train(path)

    def test_that_of_this_environment_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        beside, on_path = program(tmp_path / "env", ""), program(tmp_path / "path", "")
        monkeypatch.setattr(sys, "executable", str(beside.parent / "python"))
        monkeypatch.setenv("PATH", str(on_path.parent))
        assert find_ns_train() == beside
        beside.unlink()
        assert find_ns_train() == on_path
        on_path.unlink()
        with pytest.raises(UsageError, match=r"f3rm-verify\[train\]"):
            find_ns_train()


class TestLog:
    def show(self, folder: Path, content: bytes, **options: Any) -> str:
        (folder / "log").write_bytes(content)
        return last_lines(folder / "log", **options)

    def test_only_the_last_lines(self, tmp_path: Path) -> None:
        shown = self.show(tmp_path, b"".join(b"line %d\n" % i for i in range(100)))
        assert shown.split() == " ".join(f"line {i}" for i in range(85, 100)).split()

    def test_no_terminal_escapes_and_no_control_characters(self, tmp_path: Path) -> None:
        content = (
            b"\x1b[1;31mred\x1b[0m\x1b]0;title\x07\x1b[2K\ta\x00b\x07\n10%\r20%\r\n\xe2\x80\xaeevil\n\xff\x9b31m\n"
        )
        assert self.show(tmp_path, content).splitlines() == [
            "  red a  b".replace("a  b", "ab"),
            "  10%",
            "  20%",
            "  evil",
            "  \ufffd\ufffd31m",
        ]

    def test_a_line_without_end_is_cut(self, tmp_path: Path) -> None:
        shown = self.show(tmp_path, b"x" * 10**6)
        assert len(shown) == 302
        assert shown.endswith("x...")

    def test_up_to_a_line(self, tmp_path: Path) -> None:
        content = b"first\nwhy: marker\nmore\nmarker again\n" + b"noise\n" * 10**5
        assert self.show(tmp_path, content, until="marker").splitlines()[-1] == "  marker again"
        assert self.show(tmp_path, content, until="absent").splitlines()[-1] == "  noise"

    def test_nothing_to_show(self, tmp_path: Path) -> None:
        assert self.show(tmp_path, b" \n\n") == "  (the log is empty)"
        assert "cannot be read" in last_lines(tmp_path / "absent")


class TestReasons:
    """Why a training ended: in its own words where our code ended it."""

    @pytest.mark.parametrize(
        ("log", "told"),
        [
            ("Traceback\nf3rm_verify.errors.TrainingError: no memory.\n\n", "no memory."),
            ("f3rm-verify: no such method\n", "no such method"),
            ("\x1b[31mf3rm-verify: in red\x1b[0m\n", "in red"),
            ("f3rm-verify: a remark\nTraceback\nValueError: boom\n", None),
            ("other: f3rm-verify: x\n", None),
            ("", None),
        ],
    )
    def test_only_the_last_line_is_one(self, tmp_path: Path, log: str, told: str | None) -> None:
        (tmp_path / "log").write_text(log)
        assert told_reason(tmp_path / "log") == told
        assert told_reason(tmp_path / "absent") is None

    def test_one_that_could_not_begin(self, tmp_path: Path) -> None:
        body = "print('f3rm-verify: no such method.', file=sys.stderr); sys.exit(2)"
        with pytest.raises(TrainingError, match=r"^The reference training cannot begin: no such method\.$"):
            train(tmp_path, body, {"reference": 42})

    def test_one_that_failed(self, tmp_path: Path) -> None:
        body = "run = begin(); run.step(); print('f3rm-verify: no memory.'); sys.exit(1)"
        failed = train(tmp_path, body, {"reference": 42}).failed
        assert failed is not None
        assert failed.failure == "The reference training failed after step 0 (exit code 1). no memory."

    def test_one_that_the_system_killed_had_too_little_memory(self, tmp_path: Path) -> None:
        body = """
run = begin()
status = {"phase": "training", "step": 0, "steps": 3, "loss": None, "peak_rss_bytes": 3 * 2**29}
run.write_json("verify/status.json", status)
os.kill(os.getpid(), signal.SIGKILL)
"""
        failed = train(tmp_path, body, {"reference": 42}).failed
        assert failed is not None and failed.failure is not None
        assert "(ended by signal SIGKILL). The system kills like this where memory runs out" in failed.failure
        assert "its peak so far was 1.50 GiB" in failed.failure
        assert "--pipeline.datamanager.train-num-rays-per-batch" in failed.failure


def test_a_stall_names_the_last_step_of_each_rank(tmp_path: Path) -> None:
    body = """
run = begin()
run.step()
run.step()
for rank, step in ((2, 0), (1, 1)):
    status = {"phase": "training", "step": step, "steps": run.iters, "loss": None}
    run.write_json(f"verify/ranks/{rank}/verify/status.json", status)
time.sleep(60)
"""
    failed = train(tmp_path, body, {"reference": 42}, stall_timeout=1.0, iters=10).failed
    assert failed is not None and failed.failure is not None
    assert "(rank 0 after step 1, rank 1 after step 1, rank 2 after step 0)" in failed.failure


#: What torch says in the end of a rank that failed, and of one that was killed.
ENDS = {
    "raised": "ProcessRaisedException: \n\n-- Process 1 terminated with the following error:\nTraceback ...",
    "killed": "torch.multiprocessing.spawn.ProcessExitedException: process 1 terminated with signal SIGKILL",
}


@pytest.mark.parametrize(("end", "who"), [("raised", "in rank 1 "), ("killed", "in rank 1 "), ("unknown", "")])
def test_a_rank_that_fails_is_named_with_the_last_step_of_each(tmp_path: Path, end: str, who: str) -> None:
    body = f"""
run = begin()
run.step()
status = {{"phase": "training", "step": 3, "steps": run.iters, "loss": None}}
run.write_json("verify/ranks/1/verify/status.json", status)
print({ENDS.get(end, "something else")!r}, flush=True)
sys.exit(1)
"""
    failed = train(tmp_path, body, {"reference": 42}, iters=10).failed
    assert failed is not None and failed.failure is not None
    expected = f"The reference training failed {who}(rank 0 after step 0, rank 1 after step 3; exit code 1)."
    assert failed.failure.startswith(expected)


def test_a_process_of_another_kind_is_no_rank(tmp_path: Path) -> None:
    body = f"begin().step()\nprint({ENDS['killed']!r}, flush=True)\nsys.exit(1)"
    failed = train(tmp_path, body, {"reference": 42}, iters=10).failed
    assert failed is not None and failed.failure is not None
    assert failed.failure.startswith("The reference training failed after step 0 (exit code 1).")


def test_a_rank_that_gets_on_is_no_stall(tmp_path: Path) -> None:
    body = """
run = begin()
run.step()
for step in range(12):
    time.sleep(0.2)
    status = {"phase": "training", "step": step, "steps": run.iters, "loss": None}
    run.write_json("verify/ranks/1/verify/status.json", status)
run.steps()
run.finish()
"""
    assert train(tmp_path, body, {"reference": 42}, stall_timeout=1.5).failed is None
