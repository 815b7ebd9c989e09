"""Which word comes next? An embedding and a GRU, as on a phone's keyboard."""

import keras

from server.tasks.options import TaskOptions

options = TaskOptions(
    name="keyboard",
    description="The next of 1,000 words, after ten",
    licence="Data: Shakespeare's plays, public domain",
    batch_size=16,
    evaluation_batch_size=64,
    epochs=1,
    clip_norm=5.0,
)


def model() -> keras.Model:
    """Return the compiled network, always with the same initial weights."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((10,), dtype="int32", name="words"),
            keras.layers.Embedding(1000, 32),
            keras.layers.GRU(64),
            keras.layers.Dense(1000),
        ],
        name="keyboard",
    )
    network.compile(
        optimizer=keras.optimizers.SGD(0.5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")],
    )
    return network
