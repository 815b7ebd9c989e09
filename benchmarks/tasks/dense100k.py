"""A model of exactly 100,000 parameters that trains in about a millisecond.

What is measured with it is everything but training. One dense layer, 999 inputs and 100
classes: 99,900 weights and 100 biases, 400,000 bytes of float32.
"""

import keras

from server.tasks.options import TaskOptions

options = TaskOptions(
    name="dense100k",
    description="100,000 parameters in one layer: for measuring everything but training",
    batch_size=1,
    evaluation_batch_size=1,
)


def model() -> keras.Model:
    """Return the compiled network. It starts at zero: a small file in the repository."""
    network = keras.Sequential(
        [keras.Input((999,), name="x"), keras.layers.Dense(100, kernel_initializer="zeros")],
        name="dense100k",
    )
    network.compile(
        optimizer=keras.optimizers.SGD(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return network
