"""Who may import whom: the layout of the package, read from its sources without running them."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "f3rm_verify"
COMPARATORS = "compare_* (but compare_runs)"


@dataclass(frozen=True)
class Import:
    """One imported name: `module` without the package's own name, `name` as imported from it, where it stands."""

    module: str
    name: str | None
    ours: bool
    in_function: bool
    for_types: bool


def sources() -> dict[str, Path]:
    """Every module of the package, by its name without the package's own."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path for path in paths}


def imports(path: Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text("utf8")), in_function=False, for_types=False))


def _imports(node: ast.AST, *, in_function: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (_import(alias.name, None, in_function, for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide who is imported"
            yield from (_import(child.module or "", alias.name, in_function, for_types) for alias in child.names)
        else:
            types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, in_function=in_function or function, for_types=for_types or types)


def _import(module: str, name: str | None, in_function: bool, for_types: bool) -> Import:
    top, _, rest = module.partition(".")
    ours = top == PACKAGE
    if ours and name is not None and (not rest or (ROOT / PACKAGE / rest / f"{name}.py").exists()):
        rest, name = f"{rest}.{name}".strip("."), None  # a module taken out of its package
    return Import(rest if ours else module, name, ours, in_function, for_types)


MODULES = sources()
IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    for pattern in patterns:
        if pattern == COMPARATORS:
            if module.startswith("compare_") and module != "compare_runs":
                return True
        elif fnmatch.fnmatchcase(module, pattern):
            return True
    return False


#: Which modules of ours a module may import, for those that stand below others. `__version__` may be had by all.
MAY_IMPORT: dict[tuple[str, ...], tuple[str, ...]] = {
    (
        "errors",
        "difference",
        "bits",
        "cause_evidence",
        "outside_reads",
        "presets",
        "seeding_plan",
        "processes",
        "training_log",
        "streams",
        "environment",
        "files",
        "launch_variables",
        "memory",
        "trace_format",
    ): (),
    ("seeding_audit",): ("seeding_plan",),
    ("seeding",): ("launch_variables", "seeding_audit", "seeding_plan"),
    ("causes",): ("cause_evidence",),
    ("gather_evidence",): ("cause_evidence", "difference"),
    ("options",): ("difference", "errors"),
    ("policy",): ("bits", "difference", "errors"),
    ("policy_file",): ("difference", "errors", "policy"),
    ("run_dir",): ("errors", "readers.*"),
    ("readers.*",): ("difference", "errors", "readers.*", "trace_format"),
    ("recorder",): ("files", "launch_variables", "memory", "run_dir"),
    ("trace_writer",): ("errors", "recorder", "run_dir", "trace_format"),
    ("picture_measures",): ("bits",),
    ("assets",): ("difference", "errors", "files", "readers.*"),
    ("picture_assets",): ("assets", "picture_measures", "readers.*", "render_store"),
    ("compare_baseline",): ("baseline", "difference", "policy", "readers.*", "recorded_run", "run_dir"),
    (COMPARATORS,): (
        "assets",
        "bits",
        "difference",
        "errors",
        "picture_assets",
        "picture_measures",
        "policy",
        "readers.*",
        "render_store",
        "run_dir",
        "trace_format",
    ),
    ("reporters", "reporters.*"): (
        "assets",
        "difference",
        "errors",
        "policy",
        "readers.events",
        "readers.json_file",
        "reporters",
        "reporters.*",
        "run_dir",
    ),
    ("ns_train",): ("errors", "launch_variables", "seeding_plan"),
    ("runner",): (
        "errors",
        "f3rm.lifeline",
        "launch_variables",
        "memory",
        "ns_train",
        "processes",
        "run_dir",
        "training_log",
    ),
    ("progress",): ("runner",),
    ("condensed_trace",): ("difference", "readers.*"),
    ("recorded_run",): ("compare_setup", "condensed_trace", "errors", "policy", "readers.*", "run_dir"),
    ("baseline",): (
        "errors",
        "files",
        "ns_train",
        "policy",
        "policy_file",
        "readers.*",
        "recorded_run",
        "run_dir",
        "scene",
    ),
    ("verification",): (
        "assets",
        "baseline",
        "compare_baseline",
        "compare_runs",
        "difference",
        "errors",
        "ns_train",
        "policy",
        "presets",
        "run_dir",
        "runner",
        "saved_config",
        "scene",
        "shared_data",
        "training_log",
    ),
    ("explain",): (
        "causes",
        "compare_runs",
        "difference",
        "errors",
        "gather_evidence",
        "ns_train",
        "readers.*",
        "run_dir",
        "run_facts",
        "runner",
    ),
    ("explain_plan",): ("difference", "errors", "ns_train", "run_dir", "run_facts"),
    ("explain_pair",): (
        "assets",
        "cause_evidence",
        "causes",
        "compare_runs",
        "difference",
        "errors",
        "explain",
        "explain_plan",
        "gather_evidence",
        "policy",
        "readers.*",
        "run_dir",
        "run_facts",
        "runner",
    ),
    ("cost",): ("errors", "ns_train", "run_dir", "runner"),
    ("saved_config",): ("errors", "readers.*"),
    ("dataset_view",): ("errors", "recorder"),
    ("shared_data",): ("dataset_view", "errors", "ns_train", "runner", "training_log"),
    ("f3rm.entry_point",): ("f3rm.f3rm_config",),
    ("f3rm",): (),
    ("f3rm.lifeline",): ("launch_variables",),
    ("f3rm.*",): (
        "dataset_view",
        "environment",
        "errors",
        "f3rm.*",
        "files",
        "launch_variables",
        "memory",
        "outside_reads",
        "readers.operators",
        "recorder",
        "render_store",
        "run_dir",
        "seeding",
        "seeding_audit",
        "seeding_plan",
        "trace_format",
        "trace_writer",
    ),
}


def test_the_rules_are_about_modules_that_exist() -> None:
    assert len(MODULES) > 20
    for patterns in MAY_IMPORT:
        for pattern in patterns:
            assert any(matches(name.removesuffix(".__init__"), (pattern,)) for name in MODULES), pattern


def rules(module: str) -> list[tuple[str, ...]]:
    """What a module may import, by the first rule for it; none for what stands above the others."""
    return [may for patterns, may in MAY_IMPORT.items() if matches(module.removesuffix(".__init__"), patterns)]


@pytest.mark.parametrize("module", [module for module in MODULES if rules(module)])
def test_imports_point_one_way(module: str) -> None:
    itself = ("", "__version__", module.removesuffix(".__init__"))
    found = {one.module for one in IMPORTS[module] if one.ours and one.module not in itself}
    assert not {other for other in found if not matches(other, rules(module)[0])}


def test_nobody_imports_the_command_line() -> None:
    assert not [module for module, found in IMPORTS.items() if any(one.ours and one.module == "cli" for one in found)]


def users(package: str) -> dict[str, list[Import]]:
    """Which modules import a package of others, and how."""
    found = {
        module: [one for one in found if not one.ours and one.module.split(".")[0] == package]
        for module, found in IMPORTS.items()
    }
    return {module: ones for module, ones in found.items() if ones}


def test_only_the_command_line_knows_typer() -> None:
    assert set(users("typer")) == {"cli", "options"}


def test_only_what_runs_in_a_training_imports_nerfstudio() -> None:
    assert users("nerfstudio")
    assert not [module for module in users("nerfstudio") if not module.startswith("f3rm.")]


def test_torch_is_imported_inside_functions_except_in_a_training() -> None:
    outside = {module: ones for module, ones in users("torch").items() if not module.startswith("f3rm.")}
    assert outside
    assert not [module for module, ones in outside.items() for one in ones if not (one.in_function or one.for_types)]


@pytest.mark.parametrize("package", ["torch", "torchvision", "torchmetrics", "nerfstudio"])
def test_comparing_and_reporting_need_no_training_extra(package: str) -> None:
    parts = (COMPARATORS, "compare_runs", "readers.*", "reporters*", "run_*", "bits", "difference", "policy*", "cli")
    assert not [module for module in users(package) if matches(module.removesuffix(".__init__"), parts)]


def test_reporters_take_only_names_from_the_run_directory() -> None:
    taken = [
        one.name
        for module, found in IMPORTS.items()
        if module.startswith("reporters")
        for one in found
        if one.ours and one.module == "run_dir"
    ]
    assert all(name is not None and name.isupper() for name in taken)


def test_the_entry_point_and_the_lifeline_import_nothing_heavy_on_their_own() -> None:
    for module in ("f3rm.__init__", "f3rm.entry_point", "f3rm.lifeline"):
        ours = [one for one in IMPORTS[module] if one.ours and not one.in_function]
        assert {one.module for one in ours} <= {"launch_variables"}, module
        assert not {one.module for one in IMPORTS[module]} & {"numpy", "torch", "rich"}


def test_no_module_is_part_of_a_circle() -> None:
    edges = {
        module.removesuffix(".__init__"): {
            one.module for one in found if one.ours and not one.in_function and not one.for_types
        }
        for module, found in IMPORTS.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in edges.get(module, set()) & edges.keys():
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())
    assert len(done) == len(edges)


#: Put together here, so that this file does not hold them itself.
MACHINE = re.compile("|".join([r"(?<![\w.~-])/work" + r"/", "/tmp" + "/lab", r"\.\./" + "shared"]))
INDEX_HOSTS = re.compile("|".join([r"pypi\." + "org", "python" + r"hosted\.org", r"download\." + r"pytorch\.org"]))
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".html", ".css", ".js", ".cfg", ".sh", ""}
PROJECT = (PACKAGE, "tests", "docs", "benchmarks", "requirements", ".ci")


def project_files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT and path.name != ".git")
    for folder in PROJECT:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


def test_no_file_names_a_machine_or_a_package_index() -> None:
    files = list(project_files())
    assert len(files) > 50
    found = {}
    for path in files:
        text = path.read_text("utf8", "replace")
        hits = [hit[0] for pattern in (MACHINE, INDEX_HOSTS) for hit in pattern.finditer(text)]
        if hits:
            found[str(path.relative_to(ROOT))] = hits[:3]
    assert found == {}
