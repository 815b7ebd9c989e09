"""What is announced of a round, signed: how it begins, and how it ends. No disk, no network."""

from collections.abc import Callable

import msgspec

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire import blobs, messages
from broker_bridge.wire.envelope import SIGNATURE_BYTES
from broker_bridge.wire.lottery import EVERYONE
from broker_bridge.wire.messages import Announcement, Blob, Settings
from server import cohort
from server.config import ServerConfig
from server.events import OpenRound
from server.fleet.home import ServerKeys
from server.lineage import Lineage

__all__ = ["Announcer"]

_JITTER_DEVICES_PER_S = 200  # pace steering: joins are spread so that so many come in a second
_JITTER_BYTES_PER_S = 30e6  # and their updates no faster than two cores take them in


class Announcer:
    """Speaks for the rounds of a lineage."""

    packet_bytes = 60 * 1024  # what the broker takes; the service sets it from CONNACK

    def __init__(
        self,
        keys: ServerKeys,
        config: ServerConfig,
        line: Lineage,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
    ) -> None:
        self.keys = keys
        self._config = config
        self._line = line
        self._clock = clock
        self._random = random
        self._online = 0  # when the last round was opened
        self._epoch_said = 0  # the fleet key that was announced last

    def opening(self, effect: OpenRound, number: int, round_key: bytes) -> Announcement:
        """The announcement of a round that opens, with its public key."""
        assert self._line.task is not None  # noqa: S101 - a run has a task
        rounds = self._config.rounds
        self._online = effect.online
        jitter_s = max(self._jitter_s(effect), self._renewal_s())
        self._epoch_said = self.keys.fleet_epoch
        return Announcement(
            federation=self.keys.federation,
            round=number,
            state="open",
            task=self.task_blob(),
            task_name=self._line.task.plan.task.name,
            model=self.model_blob(),
            model_version=self._line.version,
            settings=self._settings(),
            delta_bound=rounds.delta_bound,
            weight_max=rounds.weight_max,
            fraction_bits=rounds.fraction_bits,
            round_key=round_key,
            fleet_epoch=self.keys.fleet_epoch,
            issued_at=self._clock(),
            deadline_s=effect.run.deadline_s,
            target=effect.target,
            quorum=effect.quorum,
            lottery_seed=self._random(32),
            lottery_threshold=cohort.threshold(effect.online, effect.target),
            jitter_s=jitter_s,
        )

    def ending(self, opened: Announcement) -> bytes:
        """The signed end of a round: it names the newest model, and the present fleet key."""
        jitter_s, self._epoch_said = self._renewal_s(), self.keys.fleet_epoch
        return self.sign(
            msgspec.structs.replace(
                opened, state="closed", model=self.model_blob(), model_version=self._line.version,
                fleet_epoch=self.keys.fleet_epoch, jitter_s=jitter_s,
            )
        )  # fmt: skip

    def again(self, signed: bytes) -> bytes:
        """An announcement of this server as its present keys say it.

        What is open stays what it is, under a new signature: its digest is the same. What has
        ended names the present fleet key, so that devices fetch it before they need it.
        """
        payload = self.payload(signed)
        announcement: Announcement = messages.decode(payload, Announcement)
        if announcement.state == "closed":
            return self.ending(announcement)
        return self.keys.sign.sign(f"round {self.keys.federation}", payload)

    def sign(self, announcement: Announcement) -> bytes:
        """The announcement as it is published."""
        return messages.signed(self.keys.sign, "round", self.keys.federation, announcement)

    def payload(self, signed: bytes) -> bytes:
        """What was signed by `sign`, under these keys or the server's keys before."""
        return signed[SIGNATURE_BYTES:]

    def task_blob(self) -> Blob:
        """How the task lies on the broker."""
        assert self._line.task is not None  # noqa: S101 - a run has a task
        return blobs.describe(self._line.task.plan_bytes, packet_bytes=self.packet_bytes)

    def model_blob(self) -> Blob:
        """How the model lies on the broker."""
        return blobs.describe(self._line.data, packet_bytes=self.packet_bytes)

    def check_size(self) -> None:
        """Raise LocalError if task or model would be cut into more chunks than there may be."""
        try:
            self.task_blob(), self.model_blob()
        except PeerError:
            raise LocalError(
                f"the broker takes packets of {self.packet_bytes} bytes, too small for a model of "
                f"{len(self._line.data)} bytes; raise max_packet_size in mosquitto.conf"
            ) from None

    def _jitter_s(self, effect: OpenRound) -> float:
        """Pace steering: how long to spread the joins of those who will be drawn."""
        drawn = effect.online * cohort.threshold(effect.online, effect.target) / EVERYONE
        in_bytes_s = drawn * len(self._line.data) / _JITTER_BYTES_PER_S
        return float(int(max(drawn / _JITTER_DEVICES_PER_S, in_bytes_s)))

    def _renewal_s(self) -> float:
        """How long to spread what everybody asks for when the fleet key is a new one."""
        is_new = self.keys.fleet_epoch != self._epoch_said
        return float(self._online // _JITTER_DEVICES_PER_S) if is_new else 0.0

    def _settings(self) -> Settings:
        assert self._line.task is not None  # noqa: S101 - a run has a task
        defaults = msgspec.structs.asdict(self._line.task.plan.task.defaults)
        given = msgspec.structs.asdict(self._config.training)
        chosen = defaults | {name: value for name, value in given.items() if value is not None}
        return Settings(**{name: chosen[name] for name in given})
