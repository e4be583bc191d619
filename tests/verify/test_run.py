"""What `verify` runs and compares, and what it does when the reference itself is no good."""

import math
from typing import Any

import jax.numpy as jnp
import pytest

from jaxscale.config import ConfigError
from jaxscale.verify import run
from jaxscale.verify.cases import Options, make_plan
from jaxscale.verify.compare import Numbers
from tests.programs import tiny_config


def test_a_mesh_draws_its_own_parameters_and_a_variant_is_given_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = {"weight": jnp.ones(2)}
    calls: list[tuple[Any, bool]] = []

    def spy(assembly: Any, _: Any, params: Any = None) -> Numbers:
        calls.append((assembly, params is not None))
        return Numbers(tree, tree, tree, losses=[1.0], gradient_norms=[1.0], hashes=[1])

    monkeypatch.setattr(run, "run_steps", spy)
    plan = make_plan(tiny_config(), Options(steps=1, meshes=("data=8",)))
    rows = list(run.run_plan(plan))
    assert {row.verdict for row in rows} == {run.EQUAL}
    # The plainest program first: on one device, with the first choice of everything.
    assert calls[0] == (plan.reference, False)
    assert plan.reference.mesh.size == 1
    assert calls[1:] == [(case.assembly, bool(case.settings)) for case in plan.cases]
    assert [given for _, given in calls[:4]] == [False, False, False, True]


def test_a_reference_whose_loss_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [4.0, math.nan]
    bad = Numbers({}, {}, {}, losses=losses, gradient_norms=losses, hashes=[1, 2])
    monkeypatch.setattr(run, "run_steps", lambda *_: bad)
    plan = make_plan(tiny_config(), Options(steps=2, limit=1, only="meshes"))
    with pytest.raises(ConfigError, match="loss of step 2 is no finite number.*lower --steps"):
        next(run.run_plan(plan))
