"""What Keras offers and a device must be able to train: one block for each layer and form.

A block maps a tensor to a tensor. Blocks of one kind of input are trained side by side in
one model, each between a small layer before it (so that its input gradient counts) and a
head of its own, so that a difference is found under the block's name.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers as L  # noqa: N812
from keras import ops

__all__ = ["BLOCKS", "SHAPES", "STEPS", "groups", "side_by_side"]

Block = Callable[[Any], Any]

SHAPES: dict[str, tuple[int, ...]] = {
    "image": (8, 7, 4),
    "sequence": (6, 4),
    "vector": (6,),
    "tokens": (6,),
}
VOCABULARY = 11


@keras.saving.register_keras_serializable("midge-tests")
class Gate(keras.layers.Layer):  # type: ignore[misc]
    """A user's own layer: weights without names, ops of keras.ops, its own dropout."""

    def build(self, shape: Any) -> None:
        self.a = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.b = self.add_weight(shape=(shape[-1], shape[-1]))
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, x: Any, training: bool = False) -> Any:
        y = ops.sigmoid(ops.matmul(x * self.a, self.b)) * x
        return keras.random.dropout(y, 0.25, seed=self.seeds) if training else y


def _squeeze_excite(x: Any) -> Any:
    s = L.Dense(4, activation="sigmoid")(L.GlobalAveragePooling2D()(x))
    return L.Multiply()([x, L.Reshape((1, 1, 4))(s)])


def _residual(x: Any) -> Any:
    return L.Add()([x, L.Conv2D(4, 3, padding="same", activation="relu")(x)])


def _attention(x: Any) -> Any:
    y = L.LayerNormalization()(L.Add()([x, L.MultiHeadAttention(2, 3, dropout=0.1)(x, x)]))
    return L.Add()([y, L.Dense(4)(L.Dense(8, activation="relu")(y))])


def _frozen_batch_norm(x: Any) -> Any:
    layer = L.BatchNormalization()
    layer.trainable = False
    return layer(x)


def _frozen_dense(x: Any) -> Any:
    layer = L.Dense(5, activation="tanh")
    layer.trainable = False
    return layer(x)


def _branches(merge: Any) -> Block:
    return lambda x: merge([L.Dense(3)(x), L.Dense(3, activation="tanh")(x)])


_ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "elu", "selu", "silu", "softplus", "softsign", "tanh", "sigmoid",
    "hard_sigmoid", "softmax", "log_softmax", "exponential", "mish", "hard_silu", "linear", "gelu",
    "celu", "log_sigmoid", "tanh_shrink", "soft_shrink", "hard_shrink", "hard_tanh", "squareplus",
    "sparse_plus",
)  # fmt: skip

_VECTOR: dict[str, Block] = {
    f"activation {name}": (lambda n: lambda x: L.Activation(n)(x))(name) for name in _ACTIVATIONS
} | {
    "activation gelu, approximate": lambda x: ops.gelu(x, approximate=True),
    "PReLU": L.PReLU(alpha_initializer="ones"),
    "LeakyReLU": L.LeakyReLU(0.3),
    "ReLU, bounded": L.ReLU(max_value=1.0, negative_slope=0.1),
    "Dense, l1 and l2": L.Dense(
        5, kernel_regularizer=keras.regularizers.L1L2(0.01, 0.01), bias_regularizer="l2"
    ),
    "Dense, frozen": _frozen_dense,
    "EinsumDense": L.EinsumDense("ab,bc->ac", output_shape=5, bias_axes="c"),
    "BatchNormalization": L.BatchNormalization(),
    "BatchNormalization, frozen": _frozen_batch_norm,
    "LayerNormalization": L.LayerNormalization(),
    "UnitNormalization": L.UnitNormalization(),
    "GroupNormalization": L.GroupNormalization(2),
    "Dropout": L.Dropout(0.4),
    "AlphaDropout": L.AlphaDropout(0.2),
    "GaussianDropout": L.GaussianDropout(0.2),
    "GaussianNoise": L.GaussianNoise(0.2),
    "RepeatVector": L.RepeatVector(3),
    "Reshape and Permute": lambda x: L.Permute((2, 1))(L.Reshape((2, 3))(x)),
    "Rescaling": L.Rescaling(0.5, 1.0),
    "Normalization": L.Normalization(mean=0.5, variance=2.0),
    "Add": _branches(L.Add()),
    "Subtract": _branches(L.Subtract()),
    "Multiply": _branches(L.Multiply()),
    "Average": _branches(L.Average()),
    "Maximum": _branches(L.Maximum()),
    "Minimum": _branches(L.Minimum()),
    "Concatenate": _branches(L.Concatenate()),
    "Dot": _branches(L.Dot(axes=1)),
    "a layer of the user's own": Gate(),
}

_IMAGE: dict[str, Block] = {
    "Conv2D, valid": L.Conv2D(3, 3),
    "Conv2D, same": L.Conv2D(3, 3, padding="same"),
    "Conv2D, stride 2, same": L.Conv2D(3, 3, strides=2, padding="same"),
    "Conv2D, stride 2, valid": L.Conv2D(3, 3, strides=2),
    "Conv2D, stride 3, kernel 2": L.Conv2D(3, 2, strides=3),
    "Conv2D, stride (2, 1), kernel (3, 2)": L.Conv2D(3, (3, 2), strides=(2, 1), padding="same"),
    "Conv2D, dilation 2": L.Conv2D(3, 3, dilation_rate=2),
    "Conv2D, dilation 2, same": L.Conv2D(3, 3, dilation_rate=2, padding="same"),
    "Conv2D, 1 × 1": L.Conv2D(3, 1),
    "Conv2D, 1 × 1, stride 2": L.Conv2D(3, 1, strides=2),
    "Conv2D, groups 2": L.Conv2D(4, 3, groups=2),
    "Conv2DTranspose, stride 2, same": L.Conv2DTranspose(3, 3, strides=2, padding="same"),
    "Conv2DTranspose, stride 2, valid": L.Conv2DTranspose(3, 3, strides=2),
    "Conv2DTranspose, stride 1": L.Conv2DTranspose(3, 3),
    "DepthwiseConv2D": L.DepthwiseConv2D(3),
    "DepthwiseConv2D, stride 2, multiplier 2": L.DepthwiseConv2D(
        3, strides=2, depth_multiplier=2, padding="same"
    ),
    "DepthwiseConv2D, dilation 2": L.DepthwiseConv2D(3, dilation_rate=2, padding="same"),
    "SeparableConv2D": L.SeparableConv2D(3, 3, padding="same"),
    "SeparableConv2D, multiplier 2, stride 2": L.SeparableConv2D(
        3, 3, strides=2, depth_multiplier=2
    ),
    "MaxPooling2D": L.MaxPooling2D(2),
    "MaxPooling2D, overlapping": L.MaxPooling2D(3, strides=2),
    "MaxPooling2D, same": L.MaxPooling2D(3, strides=2, padding="same"),
    "AveragePooling2D": L.AveragePooling2D(2),
    "AveragePooling2D, overlapping": L.AveragePooling2D(3, strides=2),
    "AveragePooling2D, same": L.AveragePooling2D(3, strides=2, padding="same"),
    "GlobalAveragePooling2D": L.GlobalAveragePooling2D(),
    "GlobalMaxPooling2D": L.GlobalMaxPooling2D(),
    "UpSampling2D, nearest": L.UpSampling2D(2),
    "UpSampling2D, bilinear": L.UpSampling2D(2, interpolation="bilinear"),
    "Resizing": L.Resizing(5, 9),
    "ZeroPadding2D": L.ZeroPadding2D(((1, 0), (0, 2))),
    "Cropping2D": L.Cropping2D(((1, 2), (0, 1))),
    "SpatialDropout2D": L.SpatialDropout2D(0.3),
    "BatchNormalization, images": L.BatchNormalization(),
    "LayerNormalization, images": L.LayerNormalization(),
    "GroupNormalization, images": L.GroupNormalization(2),
    "squeeze and excite": _squeeze_excite,
    "residual": _residual,
}

_SEQUENCE: dict[str, Block] = {
    "Conv1D, valid": L.Conv1D(3, 3),
    "Conv1D, same, stride 2": L.Conv1D(3, 3, padding="same", strides=2),
    "Conv1D, causal, dilation 2": L.Conv1D(3, 3, padding="causal", dilation_rate=2),
    "Conv1D, groups 2": L.Conv1D(4, 3, groups=2),
    "Conv1DTranspose": L.Conv1DTranspose(3, 3, strides=2, padding="same"),
    "DepthwiseConv1D": L.DepthwiseConv1D(3, padding="same"),
    "SeparableConv1D": L.SeparableConv1D(3, 3),
    "MaxPooling1D": L.MaxPooling1D(2),
    "MaxPooling1D, overlapping, same": L.MaxPooling1D(3, strides=2, padding="same"),
    "AveragePooling1D": L.AveragePooling1D(2),
    "AveragePooling1D, overlapping, same": L.AveragePooling1D(3, strides=2, padding="same"),
    "GlobalAveragePooling1D": L.GlobalAveragePooling1D(),
    "GlobalMaxPooling1D": L.GlobalMaxPooling1D(),
    "UpSampling1D": L.UpSampling1D(2),
    "ZeroPadding1D": L.ZeroPadding1D((1, 2)),
    "Cropping1D": L.Cropping1D((1, 2)),
    "SpatialDropout1D": L.SpatialDropout1D(0.3),
    "BatchNormalization, sequences": L.BatchNormalization(),
    "LayerNormalization, sequences": L.LayerNormalization(),
    "TimeDistributed(Dense)": L.TimeDistributed(L.Dense(3)),
    "MultiHeadAttention block": _attention,
    "Attention": lambda x: L.Attention(use_scale=True)([x, x]),
    "SimpleRNN": L.SimpleRNN(3),
    "SimpleRNN, backwards": L.SimpleRNN(3, go_backwards=True),
    "GRU": L.GRU(3),
    "GRU, reset before": L.GRU(3, reset_after=False),
    "GRU, dropout": L.GRU(3, dropout=0.2, recurrent_dropout=0.2),
    "LSTM": L.LSTM(3),
    "LSTM, sequences": L.LSTM(3, return_sequences=True),
    "LSTM, two layers": lambda x: L.LSTM(3)(L.LSTM(4, return_sequences=True)(x)),
    "Bidirectional(GRU)": L.Bidirectional(L.GRU(3)),
    "Bidirectional(LSTM), sequences": L.Bidirectional(L.LSTM(3, return_sequences=True)),
    "Masking and LSTM": lambda x: L.LSTM(3)(L.Masking(0.0)(x)),
}

_TOKENS: dict[str, Block] = {
    "Embedding": L.Embedding(VOCABULARY, 4),
    "Embedding and GRU": lambda x: L.GRU(3)(L.Embedding(VOCABULARY, 4)(x)),
    "Embedding, masked, and LSTM": lambda x: L.LSTM(3)(
        L.Embedding(VOCABULARY, 4, mask_zero=True)(x)
    ),
    "Embedding, masked, and pooling": lambda x: L.GlobalAveragePooling1D()(
        L.Embedding(VOCABULARY, 4, mask_zero=True)(x)
    ),
}

BLOCKS: dict[str, dict[str, Block]] = {
    "vector": _VECTOR,
    "image": _IMAGE,
    "sequence": _SEQUENCE,
    "tokens": _TOKENS,
}


# Attention over random numbers is chaotic: rounding grows tenfold every five steps, in Keras too.
STEPS = {"MultiHeadAttention block": 5}


def groups(size: int = 6) -> list[tuple[str, list[str]]]:
    """Return (kind, block names) so that each block is in one group; restless ones are alone."""
    found = []
    for kind, blocks in BLOCKS.items():
        size = min(size, 4) if kind == "sequence" else size  # unrolled layers convert slowly
        calm = [name for name in blocks if name not in STEPS]
        found += [(kind, calm[i : i + size]) for i in range(0, len(calm), size)]
        found += [(kind, [name]) for name in blocks if name in STEPS]
    return found


def side_by_side(kind: str, names: list[str]) -> tuple[Any, Any, dict[str, str]]:
    """Return (input, summed logits, weight-name prefix for each block) of some blocks."""
    keras.utils.set_random_seed(7)
    dtype = "int32" if kind == "tokens" else "float32"
    inputs = keras.Input(SHAPES[kind], dtype=dtype, name="x")
    heads, prefixes = [], {}
    for place, name in enumerate(names):
        prefix = f"b{place}"
        x = inputs
        if kind == "vector":
            x = L.Dense(6, name=f"{prefix}_before")(x)
        elif kind in ("image", "sequence"):
            x = L.Dense(4, name=f"{prefix}_before")(x)
        block = BLOCKS[kind][name]
        if isinstance(block, keras.layers.Layer):
            block = type(block).from_config(block.get_config())  # a fresh one each time
        y = block(x)
        y = L.Flatten(name=f"{prefix}_flat")(y) if len(y.shape) != 2 else y
        heads.append(L.Dense(3, name=f"{prefix}_head")(y))
        prefixes[name] = prefix
    return inputs, L.Add()(heads) if len(heads) > 1 else heads[0], prefixes
