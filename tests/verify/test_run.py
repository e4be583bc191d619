"""What `verify` does when the reference itself is no good."""

import math

import pytest

from jaxscale.config import ConfigError
from jaxscale.verify import run
from jaxscale.verify.cases import Options, make_plan
from jaxscale.verify.compare import Numbers
from tests.programs import tiny_config


def test_a_reference_whose_loss_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [4.0, math.nan]
    bad = Numbers({}, {}, {}, losses=losses, gradient_norms=losses, hashes=[1, 2])
    monkeypatch.setattr(run, "run_steps", lambda *_: bad)
    plan = make_plan(tiny_config(), Options(steps=2, limit=1, only="meshes"))
    with pytest.raises(ConfigError, match="loss of step 2 is no finite number.*lower --steps"):
        next(run.run_plan(plan))
