"""docs/models.md lists what the tests train: a row for each, and no others."""

import importlib.metadata
import re
from pathlib import Path

import keras
import tensorflow as tf

from tests.server.tasks.catalogue import BLOCKS, STEPS
from tests.server.tasks.matrix import INTRODUCTION
from tests.server.tasks.test_objectives import LOSSES
from tests.server.tasks.test_optimisers import OPTIMISERS

PAGE = Path("docs/models.md").read_text(encoding="utf-8")


def test_each_model_that_the_tests_train_has_its_row_on_the_page() -> None:
    wanted = [(name, STEPS.get(name, 20)) for blocks in BLOCKS.values() for name in blocks]
    wanted += [(name, 20) for name in LOSSES]
    wanted += [(name, steps) for name, (_, steps, _) in OPTIMISERS.items()]
    rows = re.findall(r"^\| (.+) \| (\d+) \| \S+ \| \S+ \|$", PAGE, re.MULTILINE)
    assert [(name, int(steps)) for name, steps in rows] == wanted


def test_the_page_opens_as_its_generator_writes_it() -> None:
    runtimes = ("tflite-runtime", "ai-edge-litert")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in runtimes)
    opening = INTRODUCTION.format(
        tensorflow=tf.__version__, keras=keras.__version__, runtimes=versions
    )
    assert PAGE.startswith(opening)


def test_no_figure_on_the_page_is_above_the_bound_of_the_tests() -> None:
    figures = [float(text) for text in re.findall(r"\d+e-\d+(?= \|)", PAGE)]
    assert len(figures) > 200
    assert max(figures) <= 2e-6
