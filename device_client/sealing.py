"""What was trained, sealed for the server: its commit, and the chunks that it commits to."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from broker_bridge.wire import weights
from broker_bridge.wire.envelope import KEY_BYTES, KemKey
from broker_bridge.wire.messages import Init
from broker_bridge.wire.update import Binding, SealedUpdate, seal_update
from device_client.events import Seal
from device_client.identity import Identity
from device_client.trainer import Trained

__all__ = ["sealed"]


def sealed(
    identity: Identity,
    wanted: Seal,
    trained: Trained,
    delta: Mapping[str, NDArray[np.float32]],
    *,
    random: Callable[[int], bytes],
) -> tuple[Init, SealedUpdate]:
    """Seal `delta`, the difference from the announced model, as the server's `go` lets it in.

    Each call draws a new key from `random`: nothing is sealed twice under one.
    """
    announcement, go = wanted.announcement, wanted.go
    message = weights.encode(delta)
    update = seal_update(
        message,
        Binding(identity.federation, identity.device, wanted.digest, go.upload),
        round_key=announcement.round_key,
        sender=identity.keys.kem,
        psk=identity.psk,
        ephemeral=KemKey.from_seed(random(KEY_BYTES)),
        packet_bytes=go.packet_bytes,
    )
    init = Init(
        round=announcement.round,
        announcement=wanted.digest,
        upload=go.upload,
        enc=update.enc,
        total_bytes=len(message),
        body_bytes=update.layout.body_bytes,
        tags=update.tags,
        examples=min(trained.examples, announcement.weight_max),
        train_s=trained.seconds,
        metrics=_finite({"loss": trained.loss} | trained.metrics),
    )
    return init, update


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """What is no number cannot be averaged, and is left out."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
