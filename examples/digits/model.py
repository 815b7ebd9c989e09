"""Which digit is it? A small convolutional network on 8 × 8 pixels."""

import keras

from server.tasks.options import TaskOptions

options = TaskOptions(
    name="digits",
    description="Handwritten digits of 8 × 8 pixels",
    licence="Data: UCI optdigits, CC BY 4.0, as shipped by scikit-learn (BSD-3-Clause)",
    batch_size=10,
    evaluation_batch_size=60,
    epochs=2,
    label_names=tuple("0123456789"),
)


def model() -> keras.Model:
    """Return the compiled network, always with the same initial weights."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ],
        name="digits",
    )
    network.compile(
        optimizer=keras.optimizers.SGD(0.05),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return network
