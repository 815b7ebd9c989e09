"""Which exercise is a smartwatch's wearer doing? A small Conv1D network on 2 s of motion."""

import keras

from server.tasks.options import TaskOptions

options = TaskOptions(
    name="wearables",
    description="Seven shoulder exercises from a smartwatch: 2 s of acceleration and rotation",
    licence="Data: seglearn, BSD-3-Clause; D. Burns et al., arXiv 1802.01489",
    batch_size=32,
    evaluation_batch_size=64,
    epochs=2,
    label_names=("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"),
)


def model() -> keras.Model:
    """Return the compiled network, always with the same initial weights."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((50, 6), name="motion"),
            keras.layers.Conv1D(48, 7, strides=2, padding="same", activation="relu"),
            keras.layers.Conv1D(48, 5, strides=2, padding="same", activation="relu"),
            keras.layers.Conv1D(64, 3, activation="relu"),
            keras.layers.GlobalMaxPooling1D(),
            keras.layers.Dropout(0.4),
            keras.layers.Dense(7),
        ],
        name="wearables",
    )
    network.compile(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return network
