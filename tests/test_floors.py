"""The floors of the house, the sizes of its rooms, and where mesh axes may be named.

`FLOORS` is DESIGN.md's table as data. Each check is a function from one parsed module to its
complaints; one test runs them over the package, another over code that each must refuse.
"""

import ast
import pathlib
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxscale"

# From the ground up. A floor holds groups of modules; a module imports from the floors below and,
# in its own group, from what stands before it.
FLOORS: dict[str, tuple[str, ...]] = {
    "F0 words": ("config config_source resolve hardware records runtime",),
    "F1 parallel": (
        "parallel.mesh parallel.sharding parallel.host_memory parallel.by_layer parallel.pipeline "
        "parallel.hlo parallel.program parallel.probes",
        "bundle.format bundle.programs bundle.sampling bundle.scheduler bundle.engine",
    ),
    "F2 model": (
        "model.contract model.attention.dense model.attention.chunked model.attention.flash "
        "model.attention.ring model.attention.all_to_all model.attention.attend model.cache "
        "model.layers model.remat model.decoder model.loss model.cost",
    ),
    "F3 services": (
        "data.workers child data.python_stdlib data.documents data.storage data.files "
        "data.tfds_source data.sources data.tokenizer data.bpe data.token_cache data.shards "
        "data.kept_shards data.local_copy data.prepare data.mixture data.corpus data.loader "
        "data.ngram data.profile data.profile_table",
        "workdir adafactor muon optimizer manifest checkpoint metrics goodput profiling console "
        "huggingface",
    ),
    "F4 programs": (
        "inference train.loss_scale train.state train.memory train.step train.evaluate "
        "train.preemption train.restore train.start train.log train.loop train.trained "
        "train.dry_run train.smoke train.step_speed",
    ),
    "F5 around": (
        "export",
        "plan.torus plan.at_hand plan.nvidia plan.shares plan.words plan.rows plan.published "
        "plan.score plan.space plan.part plan.memory plan.roofline plan.schedule plan.kernels "
        "plan.timeline plan.describe plan.child plan.compile plan.predict plan.rank plan.boundary "
        "plan.curve plan.run plan.table plan.backtest",
        "verify.compare verify.cases verify.run",
    ),
    "F6 products": (
        "serve.auth serve.telemetry serve.server serve.gateway serve.load_test",
        "sweep.rows sweep.techniques sweep.points sweep.measure sweep.child sweep.summary "
        "sweep.plots sweep.run sweep.table",
        "report",
        "launch",
        "doctor",
        "convert",
    ),
    "F7 door": ("verbs.common verbs.run verbs.study cli __main__",),
}

# What a program that serves a bundle must not need.
BUNDLE_FORBIDS = {"flax", "optax", "orbax"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6

MESH_AXES = {"stage", "fsdp", "sequence", "tensor"}  # "data" has other uses
NAMES_MESH_AXES = {"config", "parallel.mesh", "parallel.sharding", "parallel.pipeline"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Check = Callable[[str, ast.Module], Iterator[str]]


def floor_of(module: str) -> tuple[int, int, int] | None:
    """Return the module's (floor, group, place in the group)."""
    for floor, groups in enumerate(FLOORS.values()):
        for group, names in enumerate(groups):
            if module in names.split():
                return floor, group, names.split().index(module)
    return None


def imported_modules(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, full dotted name) of every import, those inside functions too."""
    known = {f"jaxscale.{name}" for groups in FLOORS.values() for g in groups for name in g.split()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = f"jaxscale.{module}".split(".")[: -node.level]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if base == "jaxscale" or full in known else base


def check_floors(module: str, tree: ast.Module) -> Iterator[str]:
    place = floor_of(module)
    if place is None:
        yield f"{module} stands on no floor; add it to FLOORS in tests/test_floors.py"
        return
    for line, name in imported_modules(module, tree):
        top, _, target = name.partition(".")
        if module.startswith("bundle.") and top in BUNDLE_FORBIDS:
            yield f"{module}:{line} imports {top}, which a bundle must not need"
        if top != "jaxscale" or target in ("", "__version__"):
            continue
        below = floor_of(target)
        if below is None:
            yield f"{module}:{line} imports jaxscale.{target}, which stands on no floor"
        elif below[0] >= place[0] and not (below[:2] == place[:2] and below[2] < place[2]):
            yield f"{module}:{line} imports jaxscale.{target}, which does not stand below it"


def functions(tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def check_function_lines(module: str, tree: ast.Module) -> Iterator[str]:
    for function in functions(tree):
        lines = typing.cast(int, function.end_lineno) - function.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{module}.{function.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


def check_parameters(module: str, tree: ast.Module) -> Iterator[str]:
    for function in functions(tree):
        arguments = function.args
        names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MAX_PARAMETERS:
            yield f"{module}.{function.name} has {count} parameters; at most {MAX_PARAMETERS}"


def check_mesh_axes(module: str, tree: ast.Module) -> Iterator[str]:
    if module in NAMES_MESH_AXES:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = MESH_AXES.intersection(part.strip() for part in node.value.split(","))
            if named:
                yield f"{module}:{node.lineno} names the mesh axis {', '.join(sorted(named))}"


CHECKS: tuple[Check, ...] = (
    check_floors,
    check_function_lines,
    check_parameters,
    check_mesh_axes,
)


def package_modules() -> dict[str, pathlib.Path]:
    """Return the file of every module by its name below jaxscale, such as "parallel.mesh"."""
    paths = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


@pytest.mark.parametrize("check", CHECKS)
def test_package_keeps_the_rules(check: Check) -> None:
    complaints = [
        complaint
        for module, path in sorted(package_modules().items())
        for complaint in check(module, ast.parse(path.read_text()))
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("check", "module", "source", "complaint"),
    [
        (check_floors, "no_such_room", "", "stands on no floor; add it"),
        (check_floors, "config", "import jaxscale.cli", "does not stand below"),
        (check_floors, "config", "import jaxscale.attic", "which stands on no floor"),
        (check_floors, "records", "from jaxscale import runtime", "jaxscale.runtime"),
        (check_floors, "parallel.mesh", "from jaxscale.parallel import sharding", ".sharding"),
        (
            check_floors,
            "parallel.mesh",
            "from jaxscale.parallel.sharding import Rules",
            ".sharding",
        ),
        (check_floors, "parallel.mesh", "from .sharding import Rules", ".sharding"),
        (check_floors, "parallel.mesh", "from ..model import loss", "model.loss"),
        (check_floors, "parallel.mesh", "def f():\n    import jaxscale.doctor", "mesh:2"),
        (check_floors, "doctor", "import jaxscale.sweep.run", "does not stand below"),
        (check_floors, "bundle.engine", "from flax import nnx", "must not need"),
        (check_function_lines, "config", "def f():\n" + "    x = 1\n" * 60, "has 61 lines"),
        (check_parameters, "config", "def f(a, b, *, c, d, e, f, g): ...", "has 7 parameters"),
        (check_mesh_axes, "model.layers", "P('data', 'fsdp')", "mesh axis fsdp"),
        (check_mesh_axes, "model.layers", "axes = 'data, tensor'", "mesh axis tensor"),
    ],
)
def test_each_rule_refuses_what_breaks_it(
    check: Check, module: str, source: str, complaint: str
) -> None:
    assert complaint in "\n".join(check(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (check_floors, "parallel.sharding", "from jaxscale.parallel.mesh import AXES"),
        (check_floors, "cli", "from jaxscale import __version__, doctor"),
        (check_floors, "bundle.engine", "import jax"),
        (check_function_lines, "config", "def f():\n" + "    x = 1\n" * 59),
        (check_parameters, "config", "def f(self, a, b, *, c, d, e, f): ..."),
        (check_mesh_axes, "model.layers", "'''Rows of a sequence.'''"),
        (check_mesh_axes, "parallel.mesh", "AXES = ('tensor',)"),
    ],
)
def test_each_rule_allows_what_keeps_it(check: Check, module: str, source: str) -> None:
    assert not list(check(module, ast.parse(source)))


def test_no_file_is_long() -> None:
    folders = (PACKAGE, ROOT / "configs", ROOT / "tests")
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    too_long = {name: count for name, count in lines.items() if count > MAX_FILE_LINES}
    assert not too_long, f"files of more than {MAX_FILE_LINES} lines: {too_long}"


def test_packages_hold_no_code() -> None:
    """An `__init__.py` with imports would run at each import below it, and hide the floors."""
    for path in PACKAGE.rglob("__init__.py"):
        statements = ast.parse(path.read_text()).body
        imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
        assert not imports, (
            f"{path.relative_to(ROOT)}:{imports[0].lineno} imports; import the module"
        )


@pytest.mark.smoke
@pytest.mark.parametrize("module", ["jaxscale", "jaxscale.config", "jaxscale.cli"])
def test_start_is_light(module: str) -> None:
    heavy = {
        "flax",
        "grain",
        "jax",
        "ml_collections",
        "numpy",
        "optax",
        "orbax",
        "tensorflow_datasets",
    }
    code = f"import {module}, sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not heavy.intersection(run.stdout.split())
