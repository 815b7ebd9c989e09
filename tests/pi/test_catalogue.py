"""Every layer, loss and optimiser that `docs/models.md` lists trains on a Pi as it does here.

The same models as in `tests/server/tasks`, which are compared with Keras there; here the two
Raspberry Pi runtimes on aarch64 are compared with this machine's. TensorFlow builds the tasks.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from broker_bridge.wire import weights as wire
from server.tasks.checks import Result
from tests.pi.comparing import Job, job, train
from tests.pi.machine import BOOKWORM, TRIXIE, Kind, here, prepare

pytestmark = pytest.mark.pi

# Relative to a tensor's largest value (at least 1), as in docs/models.md; four steps. A
# wrong kernel is off by 1e-2 and more.
TOLERANCE = 1e-5
STEPS = 4


def models() -> dict[str, Any]:
    # Not above: TensorFlow is slow to import, and these tests are seldom run.
    from tests.server.tasks.catalogue import groups, side_by_side
    from tests.server.tasks.compare import classifier
    from tests.server.tasks.test_objectives import LOSSES, small
    from tests.server.tasks.test_optimisers import OPTIMISERS, network

    found = {}
    for kind, names in groups():
        inputs, outputs, _ = side_by_side(kind, names)
        found[f"{kind}: {', '.join(names)}"] = classifier(inputs, outputs)
    found |= {f"loss {name}": small(*LOSSES[name]) for name in LOSSES}
    makers: dict[str, Any] = {name: make for name, (make, *_) in OPTIMISERS.items()}
    found |= {f"optimiser {name}": network(make()) for name, make in makers.items()}
    return found


@cache
def jobs() -> dict[str, Job]:
    from server.tasks.exporter import export
    from server.tasks.options import TaskOptions

    options = TaskOptions(name="pi", batch_size=4, evaluation_batch_size=4)
    found = {}
    for name, model in models().items():
        built = export(model, options)
        found[name] = job(built.plan, wire.decode(built.weights), steps=STEPS)
    return found


@pytest.fixture(scope="module")
def trained_here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return train(here(), jobs(), tmp_path_factory.mktemp("here"))


@pytest.mark.parametrize("kind", [BOOKWORM, TRIXIE], ids=lambda kind: kind.suite)
def test_every_layer_loss_and_optimiser_trains_alike_on_a_pi(
    kind: Kind, trained_here: dict[str, Result], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trained = train(prepare(kind), jobs(), tmp_path_factory.mktemp(kind.suite))
    gaps = {
        f"{name}: {array}": float(np.abs(value - wanted).max() / max(1, np.abs(wanted).max()))
        for name, result in trained_here.items()
        for array, wanted in result.arrays.items()
        for value in (trained[name].arrays[array],)
    }
    print(f"{len(trained)} models, {len(gaps)} arrays, worst {max(gaps.values()):.1e}")
    wrong = {name: gap for name, gap in gaps.items() if not gap <= TOLERANCE}
    assert not wrong
