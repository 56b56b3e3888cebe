"""Options, wiring, printing and exit codes. Nothing else knows typer; heavy imports wait until a command needs them."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from f3rm_verify import __version__
from f3rm_verify.errors import UsageError, VerifyError
from f3rm_verify.options import (
    ArtefactName,
    BaselineFile,
    FromOption,
    ItersOption,
    JobsOption,
    JsonOption,
    PolicyOption,
    Reports,
    Setting,
    Subject,
    TraceMode,
    refuse_unwritable,
    takes_options,
)
from f3rm_verify.streams import unfailing

if TYPE_CHECKING:
    from rich.console import Console

    from f3rm_verify.assets import Assets
    from f3rm_verify.difference import Result
    from f3rm_verify.ns_train import TrainingRequest
    from f3rm_verify.verification import Trained

PROGRAM = "f3rm-verify"
#: Wrong usage, or a failure of this program: nothing was decided.
FAILED = 2
#: Stopped by Ctrl-C before there was a verdict: inconclusive.
STOPPED = 3
#: Where a command keeps what stands after `--`.
_REST = f"{__name__}.rest"

app = typer.Typer(
    name=PROGRAM,
    help="Does the same seed really give the same training, and if not, what broke?",
    epilog=f"{PROGRAM} COMMAND --help tells more.",
    add_completion=False,
    # The program shows its own help: with an option of its own, typer imports pydantic for every command's help.
    add_help_option=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _KeepsTheRest(TyperCommand):
    """A command that keeps what stands after `--`; anything that is no option before it is a mistake."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses what stands before `--`."""
        own = args[: args.index("--")] if "--" in args else args
        ctx.meta[_REST] = tuple(args[len(own) + 1 :])
        return super().parse_args(ctx, list(own))


def _trains(group: typer.Typer, condition: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of the group that hands what stands after `--` to ns-train."""
    return group.command(
        cls=_KeepsTheRest,
        options_metavar="[OPTIONS] [-- NS_TRAIN_OPTIONS]",
        epilog=f"Options after -- go to ns-train unchanged{condition}.",
    )


def _request(context: typer.Context, subject: Subject, setting: Setting, **options: Any) -> TrainingRequest:
    """The training that the options of a command ask for."""
    from f3rm_verify.verification import training_request

    return training_request(context.meta[_REST], **vars(subject), **vars(setting), **options)


@_trains(app)
@takes_options
def run(
    context: typer.Context,
    *,
    subject: Subject,
    iters: ItersOption = None,
    setting: Setting,
    runs: Annotated[int, typer.Option(help="How many runs; all are compared with the first.", min=2)] = 2,
    control: Annotated[bool, typer.Option("--control", help="Also train with seed + 1, which must differ.")] = False,
    jobs: JobsOption = 2,
    fresh_features: Annotated[
        bool, typer.Option("--fresh-features", help="Both runs extract their features, instead of sharing a cache.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop where a claim of the seeding does not hold.")] = False,
    trace: Annotated[
        TraceMode, typer.Option(help="What to record of every step: nothing, groups, or every tensor.")
    ] = TraceMode.STEPS,
    render_budget: Annotated[
        float, typer.Option(help="GiB that the renders of one run may take.", min=0.001, max=2.0**20)
    ] = 4.0,
    policy: PolicyOption = None,
    snapshot_every: Annotated[
        int | None,
        typer.Option(help="Keep snapshots, of every so many steps, from which explain can start.", min=1),
    ] = None,
    reports: Reports,
) -> None:
    """Train twice with one seed, compare everything, name the first difference."""
    from f3rm_verify.policy import RUN_POLICY
    from f3rm_verify.policy_file import find_policy
    from f3rm_verify.verification import compare_trained, sides_of

    reports.refuse_unwritable()
    judged_by = find_policy(RUN_POLICY, policy)
    request = _request(
        context,
        subject,
        setting,
        iters=iters,
        own_arguments=("--seed-strict", "True") if strict else (),
        trace=trace.value,
        snapshot_every=snapshot_every,
        render_budget=render_budget,
        jobs=jobs,
    )
    sides = sides_of(request.seed, runs=runs, control=control)
    trained = _train(request, sides, fresh=fresh_features)
    judged_by = judged_by.without("trace") if trace is TraceMode.OFF else judged_by
    reports = _kept(reports, request)
    assets = _assets_of(reports)
    result = compare_trained(trained, policy=judged_by, reproduce=_command_line(), assets=assets)
    _report(result, reports, assets)


def _train(request: TrainingRequest, sides: Mapping[str, int], *, fresh: bool = False) -> Trained:
    """Trains, shows how it goes and what went wrong; exits where nothing is left to compare."""
    from f3rm_verify.progress import progress_display
    from f3rm_verify.verification import train

    times = "once" if len(sides) == 1 else f"{len(sides)} times"
    typer.echo(f"Training {request.method} {times}, {request.iters} steps each, in {request.output}")
    with progress_display(_console()) as watch:
        trained = train(request, sides, watch=watch, fresh=fresh)
    if trained.told is not None:
        _say(trained.told)
    if trained.nothing_to_compare is not None:
        _say(trained.nothing_to_compare)
        raise typer.Exit(STOPPED)
    return trained


def _kept(reports: Reports, request: TrainingRequest) -> Reports:
    """The reports of a training, whose result file lies beside it where nobody names another place."""
    return dataclasses.replace(reports, json=reports.json or request.output / "result.json")


@app.command()
@takes_options
def diff(
    reference: Annotated[Path, typer.Argument(help="Run directory of nerfstudio.")],
    candidate: Annotated[Path, typer.Argument(help="Another run directory.")],
    *,
    only: Annotated[
        list[ArtefactName] | None, typer.Option(help="Compare this artefact; may be given several times.")
    ] = None,
    policy: PolicyOption = None,
    reports: Reports,
) -> None:
    """Compare two existing run directories, also plain ones of ns-train."""
    from f3rm_verify.compare_runs import compare_runs
    from f3rm_verify.policy import DIFF_POLICY
    from f3rm_verify.policy_file import find_policy
    from f3rm_verify.run_dir import RunDir

    reports.refuse_unwritable()
    assets = _assets_of(reports)
    result = compare_runs(
        RunDir.open(reference),
        {"candidate": RunDir.open(candidate)},
        policy=find_policy(DIFF_POLICY, policy),
        only=[name.value for name in only or ()],
        reproduce=_command_line(),
        assets=assets,
    )
    _report(result, reports, assets)


@_trains(app)
@takes_options
def cost(
    context: typer.Context,
    *,
    steps: Annotated[int, typer.Option(help="Steps to time with and without each measure, at least.", min=1)] = 60,
    only: Annotated[
        list[str] | None, typer.Option(help="Time this measure, beside the control; may be given several times.")
    ] = None,
    subject: Subject,
    setting: Setting,
    json_file: JsonOption = None,
) -> None:
    """Measure what each measure for determinism costs this training in time and memory. Trains nothing."""
    from f3rm_verify.cost import SIDE, measure_cost, read_cost
    from f3rm_verify.progress import progress_display
    from f3rm_verify.reporters.cost_report import render_cost
    from f3rm_verify.shared_data import shared_data
    from f3rm_verify.verification import what_went_wrong

    refuse_unwritable(json_file)
    request = _request(context, subject, setting, cost_steps=steps, cost_only=tuple(only or ()))
    console = _console()
    typer.echo(f"Measuring what determinism costs {request.method}, in {request.output}")
    with (
        progress_display(console) as watch,
        shared_data(request, {SIDE: request.seed}, foreign=request.foreign, fresh=False, watch=watch) as (request, _),
    ):
        ended = measure_cost(request, watch=watch)
    if ended.interruption is not None:
        _say(f"{ended.interruption} Nothing was measured.")
        raise typer.Exit(STOPPED)
    _, told = what_went_wrong(ended)
    if told is not None:
        _say(told)
        raise typer.Exit(FAILED)
    result, file = read_cost(ended.trainings[0]), json_file or request.output / "result.json"
    render_cost(result, console, output=file)
    _write_log(file, result)


@_trains(app, "; with --self only, as do --seed, --data, --method and --preset")
@takes_options
def explain(
    context: typer.Context,
    *,
    reference: Annotated[Path | None, typer.Argument(help="A run of f3rm-verify run.", show_default=False)] = None,
    candidate: Annotated[Path | None, typer.Argument(help="One that diverged from it.", show_default=False)] = None,
    itself: Annotated[
        bool, typer.Option("--self", help="Is a training step deterministic at all? One process repeats one.")
    ] = False,
    tries: Annotated[int | None, typer.Option(help="How often to try.", min=2, show_default="3, of --self 8")] = None,
    step: Annotated[int, typer.Option(help="The step that --self repeats.", min=0)] = 6,
    subject: Subject,
    setting: Setting,
    reports: Reports,
) -> None:
    """Execute steps again, around the first divergence of two runs, down to the first operator that differs."""
    reports.refuse_unwritable()
    if itself:
        if reference is not None:
            raise UsageError("--self takes no run directories; it repeats a step of the training that the options say.")
        _explain_self(_request(context, subject, setting, iters=step + 1), step, tries or 8, reports)
    if reference is None or candidate is None:
        raise UsageError("Give the two run directories that differ, or --self.")
    if context.meta[_REST] or setting.data is not None or any(one is not None for one in vars(subject).values()):
        raise UsageError("How two runs were trained stands in them; options for a training go with --self.")
    from f3rm_verify.difference import Outcome
    from f3rm_verify.explain_pair import compared_pair, explain_pair
    from f3rm_verify.explain_plan import plan_pair
    from f3rm_verify.ns_train import find_ns_train, method_provider
    from f3rm_verify.progress import progress_display
    from f3rm_verify.run_dir import RunDir
    from f3rm_verify.verification import fresh_directory

    runs = {"reference": RunDir.open(reference), "candidate": RunDir.open(candidate)}
    assets = _assets_of(reports)
    result = compared_pair(*runs.values(), reproduce=_command_line(), assets=assets)
    if result.outcome is not Outcome.DIVERGED:
        typer.echo("These runs did not diverge, so there is nothing to execute again.")
        _report(result, reports, assets)
    program = find_ns_train(setting.ns_train)
    output = fresh_directory(setting.output_dir).resolve()
    plan = plan_pair(
        runs,
        result,
        output=output,
        ns_train=program,
        load_config=None if setting.load_config is None else setting.load_config.resolve(),
        stall_timeout=setting.stall_timeout,
        foreign=lambda name: method_provider(program, name) is not None,
    )
    tries = tries or 3
    typer.echo(
        f"Executing steps {plan.start} to {plan.until} again, in two processes and then one: {plan.estimate(tries)}, "
        f"in {output}"
    )
    with progress_display(_console()) as watch:
        result = explain_pair(runs, result, plan, tries=tries, watch=watch, reproduce=_command_line())
    _report(result, dataclasses.replace(reports, json=reports.json or output / "result.json"), assets)


def _explain_self(request: TrainingRequest, step: int, tries: int, reports: Reports) -> NoReturn:
    """Repeats a step in one process, and reports whether it gives the same every time."""
    from f3rm_verify.explain import SIDE, explain_self
    from f3rm_verify.progress import progress_display
    from f3rm_verify.shared_data import shared_data

    typer.echo(f"Repeating step {step} of {request.method}, in {request.output}")
    sides = {SIDE: request.seed}
    with (
        progress_display(_console()) as watch,
        shared_data(request, sides, foreign=request.foreign, fresh=False, watch=watch) as (viewed, _),
    ):
        result = explain_self(viewed, step=step, tries=tries, watch=watch, reproduce=_command_line())
    _report(result, _kept(reports, request))


baseline = typer.Typer(
    help="Digests of a training for git, and whether it still gives the same.",
    add_help_option=False,
    add_completion=False,
)
app.add_typer(baseline, name="baseline")


@_trains(baseline)
@takes_options
def record(
    context: typer.Context,
    file: BaselineFile,
    *,
    from_run: FromOption = None,
    subject: Subject,
    iters: ItersOption = None,
    setting: Setting,
    jobs: JobsOption = 2,
    policy: PolicyOption = None,
    reports: Reports,
) -> None:
    """Train twice and, where that was reproducible, write down what came out."""
    from f3rm_verify.baseline import make_baseline, write_baseline
    from f3rm_verify.policy import DIFF_POLICY, RUN_POLICY
    from f3rm_verify.policy_file import find_policy
    from f3rm_verify.run_dir import RunDir
    from f3rm_verify.run_facts import facts_of
    from f3rm_verify.verification import compare_trained, sides_of

    reports.refuse_unwritable()
    refuse_unwritable(file, "The baseline")
    judged_by = find_policy(RUN_POLICY if from_run is None else DIFF_POLICY, policy)
    if from_run is not None:
        run = RunDir.open(from_run)
        facts = facts_of(run)
        for why in (facts.incomplete, facts.untrained):
            if why is not None:
                _say(f"{run.path} is not recorded: it {why}.")
                raise typer.Exit(STOPPED)
        write_baseline(file, make_baseline(run, file, policy=judged_by, runs=1, data=setting.data))
        typer.echo(f"{file} holds what {run.path} put out. Nothing shows yet that training it again gives the same.")
        return
    request = _request(context, subject, setting, iters=iters, jobs=jobs)
    trained = _train(request, sides_of(request.seed))
    reports = _kept(reports, request)
    assets = _assets_of(reports)
    result = compare_trained(trained, policy=judged_by, reproduce=_command_line(), assets=assets)
    if result.outcome.exit_code:
        _say(f"{file} is not written: the runs are {result.outcome.value}, so there is nothing that holds.")
    else:
        recorded = trained.runs["reference"]
        write_baseline(file, make_baseline(recorded, file, policy=judged_by, runs=2, data=request.data))
        typer.echo(f"{file} holds what both runs put out.")
    _report(result, reports, assets)


@baseline.command()
@takes_options
def check(
    file: BaselineFile,
    *,
    from_run: FromOption = None,
    setting: Setting,
    reports: Reports,
) -> None:
    """Train once as recorded and compare: 0 the same, 1 not the same, 3 not comparable here."""
    from f3rm_verify.baseline import read_baseline
    from f3rm_verify.run_dir import RunDir
    from f3rm_verify.verification import baseline_request, compare_with_baseline

    reports.refuse_unwritable()
    found = read_baseline(file)
    trouble: tuple[str, ...] = ()
    if from_run is not None:
        run = RunDir.open(from_run)
    else:
        request = baseline_request(found, **vars(setting))
        trained = _train(request, {"candidate": request.seed})
        run, trouble = trained.runs["candidate"], trained.trouble
        reports = _kept(reports, request)
    if found.runs == 1:
        _say(f"{file} was recorded from one run: a difference need not come from a change since then.")
    assets = _assets_of(reports)
    result = compare_with_baseline(found, run, reproduce=_command_line(), trouble=trouble, assets=assets)
    _report(result, reports, assets)


@app.command()
def seeding(
    seed: Annotated[int, typer.Option(help="The seed that a training would have.", min=0, max=2**32 - 1)] = 42,
    json_file: JsonOption = None,
) -> None:
    """Seed this interpreter as a training would be, and check every claim about it: 0 all hold, 1 one does not."""
    from f3rm_verify.reporters.seeding_report import render_seeding
    from f3rm_verify.seeding import apply_seeding
    from f3rm_verify.seeding_plan import SeedingPlan

    if find_spec("torch") is None:
        raise UsageError('There is no torch in this environment to seed; install it: pip install "f3rm-verify[train]".')
    log = apply_seeding(SeedingPlan(base_seed=seed, print_info=False), say=typer.echo)
    code = int(bool(log.failing))
    render_seeding(log.to_dict(), _console())
    if json_file is not None:
        head = {"schema_version": 1, "tool": {"name": PROGRAM, "version": __version__}}
        verdict = {"verdict": "fails" if code else "holds", "exit_code": code}
        _write_log(json_file, {**head, **verdict, **log.to_dict()})
    raise typer.Exit(code)


def _write_log(file: Path, data: dict[str, Any]) -> None:
    from f3rm_verify.recorder import write_json

    try:
        write_json(file, data)
    except OSError as error:
        raise UsageError(f"--json {file} cannot be written ({error.strerror or error}); name another file.") from error


@app.command()
@takes_options
def report(
    result: Annotated[Path, typer.Argument(help="A file that --json wrote.")],
    reports: Reports,
) -> None:
    """Show a result again and make any report of it; exits like its verdict."""
    from f3rm_verify.assets import Assets, assets_folder
    from f3rm_verify.reporters.json_report import read_json

    reports.refuse_unwritable()
    _report(read_json(result), reports, Assets(assets_folder(result)))


@app.command(name="annotations")
def print_annotations(result: Annotated[Path, typer.Argument(help="A file that --json wrote.")]) -> None:
    """Print a result as annotations of GitHub Actions. Ends with 0 whatever the verdict was."""
    from f3rm_verify.reporters.annotations import github_annotations
    from f3rm_verify.reporters.json_report import read_json

    for line in github_annotations(read_json(result)):
        typer.echo(line)


@app.command(name="schema")
def print_schema() -> None:
    """Print the JSON Schema of the files that --json of run, diff, explain, baseline and report writes."""
    from f3rm_verify.reporters.json_report import schema_text

    typer.echo(schema_text(), nl=False)


@app.command()
def scene(directory: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Write the built-in scene."""
    from f3rm_verify.scene import write_scene

    typer.echo(write_scene(directory))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _assets_of(reports: Reports) -> Assets:
    """Where curves and pictures are kept: beside the result file, else in the page's directory.

    Else only until the command ends, where somebody looks at them before, or nowhere.
    """
    from f3rm_verify.assets import Assets, assets_folder

    if reports.json is not None:
        return Assets(assets_folder(reports.json))
    if reports.html is None and (reports.tensorboard is not None or _console().is_terminal):
        folder = tempfile.mkdtemp(prefix=f"{PROGRAM}-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Assets(Path(folder))
    return Assets(None if reports.html is None else reports.html / "assets")


def _report(result: Result, reports: Reports, assets: Assets | None = None) -> NoReturn:
    """Shows the result and exits like it. A file that cannot be written hides no verdict, and is never a success.

    Curves and pictures that cannot be kept are told, and reports show placeholders for them.
    """
    from f3rm_verify.reporters.terminal import render_terminal

    assets = assets or _assets_of(Reports())
    problems = _write_reports(result, vars(reports), assets)
    console = _console()
    shown = None if "json" in problems else reports.json
    render_terminal(result, console, details=8 if console.is_terminal else 20, output=shown, assets=assets)
    for problem in problems.values():
        _say(problem)
    if assets.problem is not None and not problems:  # they have the same reason
        _say(assets.problem)
    raise typer.Exit(result.outcome.exit_code or (FAILED if problems else 0))


def _write_reports(result: Result, places: Mapping[str, Path | None], assets: Assets) -> dict[str, str]:
    """Writes every report that has a place; why one could not be written, by its kind."""
    from f3rm_verify.assets import assets_folder, settle

    problems = {}
    for kind, place in places.items():
        if place is not None:
            try:
                _writer(kind, assets)(result, place)
                if kind == "json":
                    assets.problem = settle(result.root, assets_folder(place), assets).problem or assets.problem
            except UsageError as error:
                problems[kind] = str(error)
    return problems


def _writer(kind: str, assets: Assets) -> Callable[[Result, Path], None]:
    from f3rm_verify.reporters.html import write_html
    from f3rm_verify.reporters.json_report import write_json
    from f3rm_verify.reporters.junit import write_junit
    from f3rm_verify.reporters.markdown import write_markdown
    from f3rm_verify.reporters.tensorboard_log import write_tensorboard

    writers: dict[str, Callable[[Result, Path], None]] = {
        "json": write_json,
        "html": functools.partial(write_html, assets=assets),
        "junit": write_junit,
        "markdown": write_markdown,
        "tensorboard": functools.partial(write_tensorboard, assets=assets),
    }
    return writers[kind]


def _console() -> Console:
    """Standard output for a person: colour and width of a terminal, plain and wide where it is piped."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _say(message: str) -> None:
    typer.echo(f"{PROGRAM}: {message}", err=True)


def _command_line() -> str:
    return shlex.join([PROGRAM, *sys.argv[1:]])


def main() -> None:
    """The console script."""
    output, _ = unfailing("stdout"), unfailing("stderr")
    code = _guarded(sys.argv[1:])
    if output is not None:
        sys.stdout.flush()
        # A reader that closed the pipe, as head does, has seen enough; a full disk has lost what should be kept.
        if output.failure is not None and not isinstance(output.failure, BrokenPipeError):
            _say(f"Standard output cannot be written ({output.failure.strerror}).")
            code = code or FAILED
    sys.exit(code)


def _guarded(arguments: list[str]) -> int:
    """Runs a command; whatever goes wrong becomes one message and an exit code that no verdict has.

    Python's own exit code for a traceback, and typer's for a Ctrl-C, is 1, which would say "diverged".
    """
    if not arguments or arguments[0] == "--help":
        _show_help()
        # A call without arguments, maybe of a script whose variable is empty, is no success: nothing was verified.
        return 0 if arguments else FAILED
    try:
        code = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except VerifyError as error:
        _say(str(error))
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except OSError as error:
        _say(f"{error}.")
        return FAILED
    except (Exception, SystemExit) as error:
        # typer brings its own copy of click or uses click, by version: known by what it can do.
        if hasattr(error, "format_message"):
            return _wrong_usage(error)
        return _bug(error)
    if code == 130:
        return _stopped()
    return int(code or 0)


def _show_help() -> None:
    command = typer.main.get_command(app)
    typer.echo(command.get_help(typer.Context(command, info_name=PROGRAM)))


def _stopped() -> int:
    _say("Stopped by Ctrl-C; there is no verdict.")
    return STOPPED


def _wrong_usage(error: Any) -> int:
    sentence = " ".join(str(error.format_message()).split()).rstrip(".")
    command = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
    _say(f"{sentence}. See {command} --help.")
    return FAILED


def _bug(error: BaseException) -> int:
    import tempfile
    import traceback

    text = f"{_command_line()}\n{PROGRAM} {__version__}, Python {sys.version}\n\n{traceback.format_exc()}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"{PROGRAM}-bug-", suffix=".txt", delete=False, encoding="utf8", errors="backslashreplace"
        ) as file:
            file.write(text)
        where = f"the traceback is in {file.name}"
    except OSError:
        where = f"the traceback:\n{text}"
    lines = str(error).splitlines() or [""]
    _say(f"This is a bug in {PROGRAM}, and there is no verdict ({type(error).__name__}: {lines[0]}); {where}")
    return FAILED
