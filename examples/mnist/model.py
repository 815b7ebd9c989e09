"""The two networks of McMahan et al. 2017: `model`, their 2NN, and `cnn`.

midge task build examples/mnist/model.py -o mnist.task
midge task build examples/mnist/model.py --function cnn --name mnist-cnn -o mnist_cnn.task
"""

import keras

from server.tasks.options import TaskOptions

options = TaskOptions(
    name="mnist",
    description="Handwritten digits of 28 × 28 pixels; McMahan et al. 2017",
    licence="Data: MNIST, Y. LeCun and C. Cortes, CC BY-SA 3.0",
    batch_size=10,
    evaluation_batch_size=100,
    epochs=1,
    label_names=tuple("0123456789"),
)


def model() -> keras.Model:
    """Return the 2NN: 199,210 parameters."""
    keras.utils.set_random_seed(1)
    return _compiled(
        [
            keras.layers.Dense(200, activation="relu", kernel_initializer="he_normal"),
            keras.layers.Dense(200, activation="relu", kernel_initializer="he_normal"),
            keras.layers.Dense(10),
        ],
        "mnist",
    )


def cnn() -> keras.Model:
    """Return the CNN: 1,663,370 parameters."""
    keras.utils.set_random_seed(1)
    return _compiled(
        [
            keras.layers.Reshape((28, 28, 1)),
            keras.layers.Conv2D(32, 5, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(64, 5, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(512, activation="relu"),
            keras.layers.Dense(10),
        ],
        "mnist-cnn",
    )


def _compiled(layers: list[keras.layers.Layer], name: str) -> keras.Model:
    network = keras.Sequential([keras.Input((784,), name="image"), *layers], name=name)
    network.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return network
