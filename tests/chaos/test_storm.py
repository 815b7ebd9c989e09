"""Processes that die at random times, at least twenty of them, and a model that does not notice."""

import pytest

from broker_bridge.link.local_broker import find_mosquitto
from tests.chaos.storm import Storm

KILLS = 24


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
@pytest.mark.parametrize("seed", [1])
def test_the_model_is_bit_for_bit_that_of_an_undisturbed_run(tmp_path, seed):
    storm = Storm(tmp_path, seed)
    try:
        storm.begin()
        storm.rage(kills=KILLS)
        rounds = storm.calm()
    finally:
        storm.end()
    print(f"seed {seed}: {dict(storm.kills)} killed over {rounds} rounds")
    assert set(storm.kills) == {"server", "device", "broker"}
    storm.check(rounds)
