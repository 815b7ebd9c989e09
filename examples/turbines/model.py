"""The power a turbine should give in this wind: what it does not give is an alarm."""

import keras

from server.tasks.options import TaskOptions

options = TaskOptions(
    name="turbines",
    description="Power of a wind turbine, as a share of the rated power",
    licence="Data: ENGIE, La Haute Borne, Etalab Open Licence, as shipped by OpenOA 3.2",
    batch_size=32,
    evaluation_batch_size=256,
    epochs=1,
)


def model() -> keras.Model:
    """Return the compiled network, always with the same initial weights."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((4,), name="weather"),
            # Fixed, so that nobody has to tell their averages: m/s, degrees, degrees, °C.
            keras.layers.Normalization(mean=[7.0, 10.0, 0.0, 12.0], variance=[9, 900, 100, 60]),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(1),
        ],
        name="turbines",
    )
    network.compile(optimizer=keras.optimizers.Adam(0.003), loss="mae", metrics=["mae"])
    return network
