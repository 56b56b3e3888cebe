"""What nerfstudio finds under the name f3rm, whatever else is installed; with a nerfstudio of a few lines, or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = "f3rm-verify-f3rm"
WRAPPED = "f3rm_verify.f3rm.wrapped_method:wrapped_method"
ORDERS = ("sorted", "reversed")
#: A method's configuration, as far as anybody here looks into it.
TYPES = """
import dataclasses, types

@dataclasses.dataclass
class MethodSpecification:
    config: object
    description: str = ""

def made(name, origin):
    machine = dataclasses.make_dataclass("Machine", [("device_type", str, "cuda")])()
    return MethodSpecification(types.SimpleNamespace(method_name=name, origin=origin, machine=machine), origin)
"""
#: How nerfstudio 1.1.5 collects methods. It iterates a set of names, so ORDER stands for what a hash seed does.
REGISTRY = """
import importlib, os
from importlib import metadata
from nerfstudio.plugins.types import MethodSpecification

def discover():
    methods = {}
    points = metadata.entry_points(group="nerfstudio.method_configs")
    for name in sorted(points.names, reverse=os.environ.get("ORDER") == "reversed"):
        specification = points[name].load()
        if isinstance(specification, MethodSpecification):
            methods[specification.config.method_name] = specification.config
    for definition in filter(None, os.environ.get("NERFSTUDIO_METHOD_CONFIGS", "").split(",")):
        name, path = definition.split("=")
        module, attribute = path.split(":")
        value = getattr(importlib.import_module(module), attribute)
        methods[name] = (value() if callable(value) else value).config
    return methods
"""
METHOD_CONFIGS = """
from nerfstudio.plugins.types import made
from nerfstudio.plugins.registry import discover
method_configs = {"nerfacto": made("nerfacto", "stock").config}
descriptions = {}
found = discover()
"""
#: Stands for our own model, which needs the real nerfstudio.
OUR_MODEL = """
from nerfstudio.plugins.types import made
model = types.ModuleType("f3rm_verify.f3rm.f3rm_config")
model.f3rm_method = made("f3rm", "ours")
sys.modules[model.__name__] = model
"""
#: Stands for what wraps a method, which needs torch and the real nerfstudio: marks what it wraps.
OUR_TRAINER = """
import os
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_available=lambda: os.environ.get("GPU") == "1")
trainer = types.ModuleType("f3rm_verify.f3rm.wrap")
trainer.wrap_config = lambda config: types.SimpleNamespace(**{**vars(config), "origin": "wrapped " + config.origin})
sys.modules.update({"torch": torch, trainer.__name__: trainer})
"""
FIND = """
from nerfstudio.configs.method_configs import found
print(json.dumps({name: [config.origin, config.machine.device_type] for name, config in found.items()}))
"""


def provider(name: str, origin: str) -> str:
    return f"from nerfstudio.plugins.types import made\nmethod = made({name!r}, {origin!r})\n"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf8")


def install(folder: Path, distribution: str, entries: dict[str, str], module: str | None = None) -> None:
    """A distribution with entry points for nerfstudio, and the module of its name that they lead to."""
    listed = "".join(f"{name} = {place}\n" for name, place in entries.items())
    info = f"{distribution}-1.0.dist-info"
    write(
        folder,
        {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n",
            f"{info}/entry_points.txt": f"[nerfstudio.method_configs]\n{listed}",
        },
    )
    if module is not None:
        write(folder, {f"{distribution}.py": module})


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages: ours, and a nerfstudio of a few lines."""
    modules = {"plugins/types": TYPES, "plugins/registry": REGISTRY, "configs/method_configs": METHOD_CONFIGS}
    packages = {f"nerfstudio/{name}__init__.py": "" for name in ("", "plugins/", "configs/")}
    write(tmp_path, {**packages, **{f"nerfstudio/{name}.py": content for name, content in modules.items()}})
    install(tmp_path, "ours", {OURS: "f3rm_verify.f3rm.entry_point:method"})
    return tmp_path


def python(site: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` in an interpreter that has the folder's packages and this one, and no others."""
    paths = f"[{str(site)!r}, {str(ROOT)!r}, *(path for path in sys.path if 'site-packages' not in path)]"
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import json, sys, types\nsys.path = {paths}\n{script}"],
        env={"PATH": os.environ.get("PATH", ""), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def methods(site: Path, **variables: str) -> Any:
    """The origins of what nerfstudio finds, by method name."""
    done = python(site, OUR_MODEL + FIND, **variables)
    assert done.returncode == 0, done.stderr
    return {name: origin for name, (origin, _) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("order", ORDERS)
def test_ours_alone(site: Path, order: str) -> None:
    assert methods(site, ORDER=order) == {"f3rm": "ours"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["f3rm", "a-first", "z-last"])
def test_another_provider_wins_under_any_name_and_in_any_order(site: Path, name: str, order: str) -> None:
    install(site, "upstream", {name: "upstream:method"}, provider("f3rm", "theirs"))
    assert methods(site, ORDER=order) == {"f3rm": "theirs"}


@pytest.mark.parametrize("order", ORDERS)
def test_providers_of_other_methods_are_left_alone(site: Path, order: str) -> None:
    # An entry point named f3rm that gives another method is no provider of f3rm.
    install(site, "other", {"f3rm": "other:method"}, provider("lerf", "theirs"))
    install(site, "words", {"words": "words:method"}, "method = 'no specification'")
    assert methods(site, ORDER=order) == {"f3rm": "ours", "lerf": "theirs"}


@pytest.mark.parametrize(
    "content", ["raise ImportError('no tinycudann')", "raise SystemExit(1)", "x = 1", "import absent_module"]
)
def test_a_provider_that_breaks_breaks_nothing_of_ours(site: Path, content: str) -> None:
    install(site, "broken", {"f3rm": "broken:method"}, content)
    done = python(site, f"{OUR_MODEL}from f3rm_verify.f3rm.entry_point import method\nprint(method.description)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ours\n", "")


def test_without_the_training_extra_there_is_no_method_and_one_line_says_so(tmp_path: Path) -> None:
    done = python(tmp_path, "from f3rm_verify.f3rm.entry_point import method\nprint(method)")
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert done.stderr.count("\n") == 1
    assert "its method f3rm is not available here (ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("state", ["sys.stderr.close()", "sys.stderr = None", "sys.stdout = sys.stderr = None"])
def test_nowhere_to_say_it_is_no_failure(tmp_path: Path, state: str) -> None:
    script = f"{state}\nfrom f3rm_verify.f3rm.entry_point import method\nsys.exit(3 if method is None else 4)"
    assert python(tmp_path, script).returncode == 3


def test_a_foreign_nerfstudio_is_no_failure(site: Path) -> None:
    # Our model imports much that this one lacks.
    done = python(site, FIND)
    assert (done.returncode, done.stdout) == (0, "{}\n")


class TestWrappedMethod:
    def wrapped(self, site: Path, name: str, configs: str = "", **variables: str) -> Any:
        """Origin and device of the method of that name, wrapped by ours after the user's own `configs`."""
        done = python(
            site,
            OUR_MODEL + OUR_TRAINER + FIND,
            F3RM_VERIFY_METHOD=name,
            NERFSTUDIO_METHOD_CONFIGS=f"{configs},{name}={WRAPPED}",
            **variables,
        )
        return json.loads(done.stdout)[name] if done.returncode == 0 else done.stderr

    def test_ours_on_what_there_is(self, site: Path) -> None:
        assert self.wrapped(site, "f3rm") == ["wrapped ours", "cpu"]
        assert self.wrapped(site, "f3rm", GPU="1") == ["wrapped ours", "cuda"]

    def test_that_of_another_provider(self, site: Path) -> None:
        install(site, "upstream", {"x": "upstream:method"}, provider("f3rm", "theirs"))
        assert self.wrapped(site, "f3rm") == ["wrapped theirs", "cpu"]

    def test_a_stock_method(self, site: Path) -> None:
        assert self.wrapped(site, "nerfacto") == ["wrapped stock", "cpu"]

    def test_an_entry_point_goes_by_its_configuration_and_wins_over_stock(self, site: Path) -> None:
        install(site, "big", {"anything": "big:method"}, provider("lerf-big", "theirs"))
        install(site, "mine", {"other": "mine:method"}, provider("nerfacto", "theirs"))
        assert self.wrapped(site, "lerf-big") == ["wrapped theirs", "cpu"]
        assert self.wrapped(site, "nerfacto") == ["wrapped theirs", "cpu"]

    @pytest.mark.parametrize("attribute", ["method", "make"])
    def test_a_method_of_the_users_own_variable_wins_over_all(self, site: Path, attribute: str) -> None:
        write(site, {"mine.py": provider("whatever", "users") + "def make(): return method"})
        assert self.wrapped(site, "mine", f"mine=mine:{attribute}") == ["wrapped users", "cpu"]
        assert self.wrapped(site, "f3rm", f"x=mine:method,f3rm=mine:{attribute}") == ["wrapped users", "cpu"]

    def test_an_unknown_method_is_named(self, site: Path) -> None:
        assert "nerfstudio knows no method 'absent'" in self.wrapped(site, "absent")

    def test_what_is_no_method_is_named(self, site: Path) -> None:
        write(site, {"mine.py": "def method(): return 3"})
        # nerfstudio's own loop stops there before it comes to ours; a version that went on would ask ours.
        script = f"{OUR_MODEL}{OUR_TRAINER}from f3rm_verify.f3rm import wrapped_method\nwrapped_method._find('x')"
        done = python(site, script, NERFSTUDIO_METHOD_CONFIGS="x=mine:method")
        assert done.stderr.splitlines()[-1].endswith("gives 3 for x, which is no MethodSpecification")
