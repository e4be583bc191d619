"""What a compiled step is kept by covers all the code that traces it."""

import ast

from jaxscale.plan.compile import CODE
from tests.test_floors import imported_modules, package_modules

# Knobs are hashed one by one; chips only say which compiler options there are, which are hashed
# too; the last only writes files.
ELSEWHERE = {"config", "hardware", "records"}


def test_every_module_that_traces_a_step_is_hashed() -> None:
    modules = package_modules()
    waiting, found = ["train.state", "train.step"], set[str]()
    while waiting:
        module = waiting.pop()
        found.add(module)
        imported = imported_modules(module, ast.parse(modules[module].read_text()))
        names = {name.removeprefix("jaxscale.") for _, name in imported}
        waiting += names & modules.keys() - found
    hashed = {name.removesuffix(".py").replace("/", ".") for name in CODE}
    left_out = {m for m in found if not any(m == h or m.startswith(f"{h}.") for h in hashed)}
    assert left_out == ELSEWHERE
    assert not {h for h in hashed if not any(m == h or m.startswith(f"{h}.") for m in found)}
