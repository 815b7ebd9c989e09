"""Altitude in a minute, from the last minute: a small GRU on an aircraft's telemetry."""

import keras

from server.tasks.options import TaskOptions

options = TaskOptions(
    name="aircraft",
    description="Change of altitude in the next minute, in 1,000 ft",
    licence="Data: OpenSky Network, in the package traffic 2.13 (MIT); not shipped",
    batch_size=16,
    evaluation_batch_size=256,
    epochs=2,
    clip_norm=1.0,
)


def model() -> keras.Model:
    """Return the compiled network, always with the same initial weights."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((7, 4), name="telemetry"),
            keras.layers.GRU(24),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(1),
        ],
        name="aircraft",
    )
    network.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.Huber(0.2),
        metrics=["mae", "mse"],
    )
    return network
