"""The pytest fixture `assert_reproducible`. Loaded by every pytest of the environment, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from f3rm_verify.assets import Assets
    from f3rm_verify.difference import Result
    from f3rm_verify.ns_train import TrainingRequest
    from f3rm_verify.verification import Trained

#: What to do with a test that could not be decided.
INCONCLUSIVE = ("fail", "skip")
_WIDTH = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds where trainings are kept, and what becomes of a test that could not be decided."""
    group = parser.getgroup("f3rm-verify")
    group.addoption(
        "--f3rm-verify-output",
        metavar="DIR",
        type=Path,
        help="Keep trainings and results in here, a folder for each test; without it, in pytest's temporary directory.",
    )
    group.addoption(
        "--f3rm-verify-inconclusive",
        choices=INCONCLUSIVE,
        default="fail",
        help="What becomes of a test whose runs cannot be compared; fail by default.",
    )


@pytest.fixture
def assert_reproducible(request: pytest.FixtureRequest, tmp_path: Path) -> AssertReproducible:
    """Fails the test where a training is not reproducible, with the report and the place of the result file."""
    folder = request.config.getoption("--f3rm-verify-output")
    name = "".join(char if char.isalnum() or char in "-_." else "_" for char in request.node.nodeid)
    output = tmp_path / "f3rm-verify" if folder is None else Path(folder) / name[-150:]
    return AssertReproducible(output, request.config.getoption("--f3rm-verify-inconclusive"))


class AssertReproducible:
    """What the fixture gives; call it once or more."""

    def __init__(self, output: Path, inconclusive: str) -> None:
        self._output = output
        self._inconclusive = inconclusive

    def __call__(
        self,
        *runs: str | Path,
        args: Sequence[str] = (),
        baseline: str | Path | None = None,
        policy: str | Path | None = None,
        repeat: int = 2,
        control: bool = False,
        only: Sequence[str] = (),
        inconclusive: str | None = None,
        **options: Any,
    ) -> Result:
        """The result, where it is reproducible or within the policy's limits; else the test fails.

        `runs` are two run directories to compare, or one to compare with a `baseline`. Without any, trains `repeat`
        times, or once for a `baseline`: `args` go to ns-train, and `options` are seed, iters, data, method, preset,
        load_config, ns_train, stall_timeout and jobs, as of `f3rm-verify run`. `control` adds a run with another seed,
        which must differ. `only` names the artefacts of two directories to compare. `inconclusive` is what becomes of
        the test if nothing can be said: "fail" or "skip".
        """
        from f3rm_verify.errors import VerifyError

        inconclusive = self._inconclusive if inconclusive is None else inconclusive
        try:
            if inconclusive not in INCONCLUSIVE:
                raise _wrong(f"inconclusive is {inconclusive!r}; it must be one of {', '.join(INCONCLUSIVE)}.")
            if runs and (options or args or control or repeat != 2):
                raise _wrong("Run directories are compared as they are; options of a training do not belong to them.")
            found = [Path(run) for run in runs]
            if baseline is not None:
                if policy is not None or only or control or repeat != 2:
                    raise _wrong("A baseline has its own policy; give none, no only, no control and no repeat.")
                result, file = self._with_baseline(Path(baseline), found, options, args)
            elif found:
                result, file = self._directories(found, policy, only)
            else:
                if only:
                    raise _wrong("only belongs to two run directories.")
                result, file = self._trainings(args, policy, repeat, control, options)
        except VerifyError as error:
            problem = str(error)
        else:
            return _judged(result, file, inconclusive)
        pytest.fail(f"f3rm-verify: {problem}", pytrace=False)

    def _directories(self, runs: Sequence[Path], policy: str | Path | None, only: Sequence[str]) -> tuple[Result, Path]:
        from f3rm_verify.compare_runs import compare_runs
        from f3rm_verify.policy import DIFF_POLICY
        from f3rm_verify.policy_file import find_policy
        from f3rm_verify.run_dir import RunDir

        if len(runs) != 2:
            raise _wrong(f"There are {len(runs)} run directories; give two, or one and a baseline.")
        reference, candidate = map(RunDir.open, runs)
        judged_by = find_policy(DIFF_POLICY, None if policy is None else Path(policy))
        file = self._file()
        sides = reference, {"candidate": candidate}
        return compare_runs(*sides, policy=judged_by, only=only, assets=_assets(file)), file

    def _trainings(
        self, args: Sequence[str], policy: str | Path | None, repeat: int, control: bool, options: dict[str, Any]
    ) -> tuple[Result, Path]:
        from f3rm_verify.policy import RUN_POLICY
        from f3rm_verify.policy_file import find_policy
        from f3rm_verify.verification import compare_trained, sides_of, training_request

        if repeat < 2:
            raise _wrong(f"repeat is {repeat}; one run alone cannot differ.")
        judged_by = find_policy(RUN_POLICY, None if policy is None else Path(policy))
        request = training_request(tuple(args), output_dir=self._output, **{"jobs": 2, **_options(options)})
        trained = _train(request, sides_of(request.seed, runs=repeat, control=control))
        file = request.output / "result.json"
        return compare_trained(trained, policy=judged_by, assets=_assets(file)), file

    def _with_baseline(
        self, file: Path, runs: Sequence[Path], options: dict[str, Any], args: Sequence[str]
    ) -> tuple[Result, Path]:
        from f3rm_verify.baseline import read_baseline
        from f3rm_verify.run_dir import RunDir
        from f3rm_verify.verification import baseline_request, compare_with_baseline

        baseline = read_baseline(file)
        if len(runs) > 1:
            raise _wrong(f"There are {len(runs)} run directories; a baseline is compared with one.")
        if runs:
            place = self._file()
            return compare_with_baseline(baseline, RunDir.open(runs[0]), assets=_assets(place)), place
        allowed = {"data", "load_config", "ns_train", "stall_timeout"}
        if args or options.keys() - allowed:
            raise _wrong(f"A baseline says itself what to train; besides, give only {', '.join(sorted(allowed))}.")
        request = baseline_request(baseline, output_dir=self._output, **_options(options))
        trained = _train(request, {"candidate": request.seed})
        place = request.output / "result.json"
        candidate = trained.runs["candidate"]
        return compare_with_baseline(baseline, candidate, trouble=trained.trouble, assets=_assets(place)), place

    def _file(self) -> Path:
        """A name for the result that no earlier call in the same test has."""
        names = (self._output / f"result{number}.json" for number in ("", *range(2, 10_000)))
        return next(name for name in names if not name.exists())


def _assets(file: Path) -> Assets:
    from f3rm_verify.assets import Assets, assets_folder

    return Assets(assets_folder(file))


def _options(options: dict[str, Any]) -> dict[str, Any]:
    paths = ("data", "load_config", "ns_train")
    known = {*paths, "seed", "iters", "method", "preset", "stall_timeout", "jobs"}
    unknown = options.keys() - known
    if unknown:
        raise _wrong(f"There is no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}.")
    return {name: Path(value) if name in paths and value is not None else value for name, value in options.items()}


def _train(request: TrainingRequest, sides: dict[str, int]) -> Trained:
    from f3rm_verify.errors import TrainingError
    from f3rm_verify.verification import train

    trained = train(request, sides, watch=lambda _: None)
    if trained.interrupted:
        raise KeyboardInterrupt
    if trained.told is not None:
        print(trained.told)  # pytest shows it with a failure
    if trained.nothing_to_compare is not None:
        raise TrainingError(trained.nothing_to_compare)
    return trained


def _judged(result: Result, file: Path, inconclusive: str) -> Result:
    """Writes the result, and returns it or ends the test."""
    from f3rm_verify.difference import Outcome
    from f3rm_verify.reporters.json_report import write_json

    write_json(result, file)
    if not result.outcome.exit_code:
        return result
    report = _report(result, file)
    if result.outcome is Outcome.INCONCLUSIVE and inconclusive == "skip":
        pytest.skip(f"f3rm-verify: inconclusive: {'; '.join(result.reasons)} ({file})")
    pytest.fail(report, pytrace=False)


def _report(result: Result, file: Path) -> str:
    """What a terminal would show, in plain characters."""
    import io

    from rich.console import Console

    from f3rm_verify.reporters.terminal import render_terminal

    text = io.StringIO()
    render_terminal(result, Console(file=text, width=_WIDTH, highlight=False), details=20, output=file)
    return f"f3rm-verify: {text.getvalue().rstrip()}"


def _wrong(sentence: str) -> Exception:
    from f3rm_verify.errors import UsageError

    return UsageError(f"assert_reproducible: {sentence}")
