"""A simulated federation loses connections by the hundred, and says so each time."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
