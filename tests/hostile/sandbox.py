"""Compares run directories in children of its own, each watched, and says what each did.

A script: reads one request per line (JSON), answers with one line. What the comparison needs is imported once, and each
comparison is then a fork, so that a case costs no start-up. The child has a limit of memory and a limit of time, and an
audit hook that notes whatever a reader of untrusted files has no business to do.
"""

from __future__ import annotations

import io
import json
import os
import resource
import select
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from f3rm_verify.assets import Assets
from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import Result
from f3rm_verify.errors import VerifyError
from f3rm_verify.policy import DIFF_POLICY
from f3rm_verify.reporters.annotations import github_annotations
from f3rm_verify.reporters.html import write_html
from f3rm_verify.reporters.json_report import write_json
from f3rm_verify.reporters.junit import write_junit
from f3rm_verify.reporters.markdown import write_markdown
from f3rm_verify.reporters.tensorboard_log import write_tensorboard
from f3rm_verify.reporters.terminal import render_terminal
from f3rm_verify.run_dir import RunDir

#: Address space that a comparison may take beyond what the imports have.
MEMORY_BYTES = 3 * 2**30
#: What no comparison ever does, by the name of its audit event.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "ctypes.",
    "pickle.find_class",
    "webbrowser.open",
    "urllib.Request",
)
#: What only the import of a module may do, which lies where `SOURCES` says.
CODE = ("exec", "compile", "marshal.loads")
#: Where Python, its packages and this project's own sources lie: modules are read from there, also late.
SOURCES = tuple(
    {
        *(str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())),
        str(Path(__file__).resolve().parents[2] / "f3rm_verify"),
    }
)
#: The page is laid out by a template, which is compiled anew each time; nothing else may become code.
TEMPLATES = str(Path(__file__).resolve().parents[2] / "f3rm_verify" / "reporters" / "templates")
#: What NumPy and Python themselves look at.
HARMLESS = ("/proc/self/", "/proc/cpuinfo", "/sys/", "/usr/share/zoneinfo", "/etc/localtime", "/usr/lib", "/dev/null")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """The audit hook: what is done that must not be, and what happens to a file when it is opened."""

    def __init__(self, roots: list[str], outputs: str, change: dict[str, str] | None) -> None:
        self.roots = roots
        self.outputs = outputs
        self.change = change
        self.found: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Notes what is forbidden. A hook cannot be removed, so it must not fail either."""
        if event == "open":
            self._opened(*arguments[:3])
        elif event in ("os.listdir", "os.scandir"):
            self._opened(arguments[0], "r", 0)
        elif event.startswith(FORBIDDEN) or (event in CODE and not _is_template(*arguments) and not _while_importing()):
            self.found.append(f"{event} {str(arguments)[:200]}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(path, (str, bytes)):
            return
        name = os.path.abspath(os.fsdecode(path))
        if self.change is not None and name == self.change["path"]:
            change, self.change, found = self.change, None, self.found
            self.found = []  # what the change does is ours
            CHANGES[change["how"]](Path(name))
            self.found = found
        real = os.path.realpath(name)
        if isinstance(flags, int) and flags & os.O_NOFOLLOW:
            real = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        inside = any(real == root or real.startswith(root + "/") for root in self.roots)
        if isinstance(flags, int) and flags & WRITES:
            if not real.startswith(self.outputs) and real != "/dev/null":
                self.found.append(f"wrote {real!r}")
        elif not inside and not real.startswith((self.outputs, *SOURCES, *HARMLESS)):
            self.found.append(f"read {real!r}")


def _is_template(*arguments: Any) -> bool:
    """Whether this is of one of our templates, by the file that it says it is from."""
    name = getattr(arguments[0], "co_filename", None) or (arguments[1] if len(arguments) > 1 else None)
    return isinstance(name, str) and name.startswith(TEMPLATES + os.sep)


def _while_importing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


#: What can happen to a file between the look at it and its reading.
CHANGES: dict[str, Callable[[Path], Any]] = {
    "vanishes": Path.unlink,
    "is truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "is emptied": lambda path: os.truncate(path, 0),
    "becomes a pipe": _replace(os.mkfifo),
    "becomes a link out": _replace(lambda path: path.symlink_to("/etc/passwd")),
    "becomes a folder": _replace(Path.mkdir),
}


def _compare(request: dict[str, Any], outputs: str) -> dict[str, Any]:
    """What the command line does, and what it would show."""
    if request.get("user"):
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    first, second = Path(request["reference"]), Path(request["candidate"])
    roots = [os.path.realpath(first), os.path.realpath(second)]
    watch = Watch(roots, os.path.realpath(outputs), request.get("change"))
    if request.get("late"):  # truncated after the reader looked at it: what a memory map does not survive
        _change_late(Path(request["late"]))
    sys.addaudithook(watch)
    file = Path(outputs, f"{os.getpid()}.json")
    assets = Assets(file.with_suffix(".assets"))
    try:
        result = compare_runs(
            RunDir.open(first),
            {"candidate": RunDir.open(second)},
            policy=DIFF_POLICY,
            only=request.get("only", ()),
            assets=assets,
        )
    except VerifyError as error:
        return {"usage": str(error), "found": watch.found}
    reports = _write_reports(result, file, assets)
    plain, colour = io.StringIO(), io.StringIO()
    render_terminal(result, Console(file=plain, width=100, color_system=None), output=file)
    terminal = Console(file=colour, width=100, force_terminal=True, color_system="truecolor")
    render_terminal(result, terminal, assets=assets)
    return {
        **_summary(result),
        "found": watch.found,
        "round_trip": Result.from_dict(json.loads(file.read_bytes())).to_dict() == result.to_dict(),
        "assets_problem": assets.problem,
        **reports,
        "annotations": list(github_annotations(result)),
        "plain": plain.getvalue(),
        "colour": colour.getvalue(),
    }


def _write_reports(result: Result, file: Path, assets: Assets) -> dict[str, str]:
    """Writes a report of every kind beside the result file; those that are text, by kind."""
    page, junit, summary = file.with_suffix(".html"), file.with_suffix(".xml"), file.with_suffix(".md")
    write_json(result, file)
    write_html(result, page, assets=assets)
    write_junit(result, junit)
    write_markdown(result, summary)
    write_tensorboard(result, file.with_suffix(".log"), assets=assets)
    texts = {"html": page / "index.html", "junit": junit, "markdown": summary}
    return {kind: path.read_text("utf8") for kind, path in texts.items()}


def _change_late(path: Path) -> None:
    from f3rm_verify.readers import checkpoint

    interpret = checkpoint.interpret

    def interpret_then_cut(*arguments: Any) -> Any:
        value = interpret(*arguments)
        os.truncate(path, 64)
        return value

    checkpoint.interpret = interpret_then_cut


def _summary(result: Result) -> dict[str, Any]:
    leaves = [("/".join(path[1:]), node) for path, node in result.root.leaves()]
    return {
        "outcome": result.outcome.value,
        "exit_code": result.outcome.exit_code,
        "reasons": list(result.reasons),
        "artefacts": {node.name: node.verdict.value for node in result.root.children},
        "leaves": [(path, node.verdict.value, node.summary) for path, node in leaves],
    }


def _child(request: dict[str, Any], outputs: str, pipe: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = _compare(request, outputs)
    except BaseException:
        answer = {"traceback": traceback.format_exc()[-3000:]}
    with os.fdopen(pipe, "w") as stream:
        json.dump(answer, stream)


def _fork(request: dict[str, Any], outputs: str) -> dict[str, Any]:
    read, write = os.pipe()
    before, started = _resident(), time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _child(request, outputs, write)
        finally:
            os._exit(0)
    os.close(write)
    data, seconds = _read_until(read, child, started + request.get("seconds", 60)), time.monotonic() - started
    _, status, usage = os.wait4(child, 0)
    peak = max(0, usage.ru_maxrss * 1024 - before)
    answer = json.loads(data) if data else {"died": f"exit status {status}"}
    return {**answer, "seconds": seconds, "peak_bytes": peak}


def _read_until(pipe: int, child: int, deadline: float) -> bytes:
    """All that the child says; b"" for one that takes too long, which is killed."""
    parts: list[bytes] = []
    with os.fdopen(pipe, "rb", buffering=0) as stream:
        while select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = stream.read(2**16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    os.kill(child, signal.SIGKILL)
    return json.dumps({"died": "it hangs"}).encode()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Answers requests until there are no more. The first one warms up: it is compared in this process."""
    with tempfile.TemporaryDirectory() as outputs:
        os.chmod(outputs, 0o777)
        warm = False
        for line in sys.stdin:
            request = json.loads(line)
            if not warm:
                warm = True
                runs = [RunDir.open(Path(request[side])) for side in ("reference", "candidate")]
                assets = Assets(Path(outputs, "warm.assets"))
                result = compare_runs(runs[0], {"candidate": runs[1]}, policy=DIFF_POLICY, assets=assets)
                _write_reports(result, Path(outputs, "warm.json"), assets)
            print(json.dumps(_fork(request, outputs)), flush=True)


if __name__ == "__main__":
    main()
