"""Who this device is for the federation, kept up to date: identity, keys, certificate.

Whatever is new is on the disk before it is used. When to ask for it: `renewing.py`; in which
words: `renewal.py`.
"""

import logging
from collections.abc import Callable

from broker_bridge.wire.messages import Refused, Renewal
from device_client import events as ev
from device_client import hearing
from device_client import identity as identities
from device_client.identity import Identity
from device_client.journal import Journal
from device_client.outbox import Outbox
from device_client.renewal import Renewer, is_meant

__all__ = ["Papers"]

log = logging.getLogger("midge.device")


class Papers:
    """The identity, and what becomes of it."""

    def __init__(
        self,
        identity: Identity,
        journal: Journal,
        outbox: Outbox,
        *,
        random: Callable[[int], bytes],
        software: str,
    ) -> None:
        """`outbox`: what old keys sealed is not left there beside new ones."""
        self.identity = identity
        self.has_other_certificate = False  # than the one that the link was made with
        self._journal = journal
        self._outbox = outbox
        self._renewer = Renewer(journal.folder, disk=journal.disk, random=random, software=software)

    @property
    def are_unsettled(self) -> bool:
        """Whether new keys were offered, and the server did not say that they hold."""
        return self._renewer.offered(self.identity) is not None

    def question(self, *, keys: bool, attempt: int) -> bytes:
        """The signed question for what is newer; with `keys`, new ones are offered."""
        return self._renewer.question(self.identity, keys=keys, attempt=attempt)

    def hear_server(self, signed: bytes) -> bool:
        """The server's keys, as the root signed them: newer ones take the place of ours.

        Returns whether they did. Raises PeerError.
        """
        new = identities.with_server(self.identity, signed)
        if new is self.identity:
            return False
        self._adopt(new)
        log.info("the server has new keys, number %d", new.server_sequence)
        return True

    def hear(self, signed: bytes) -> list[ev.Event]:
        """What the server says of ours: renew, a refusal, or what is newer. Raises PeerError."""
        match hearing.configuration(self.identity, signed):
            case Refused(reason=reason):
                log.warning("the server refuses: %s", reason)
                return [ev.RenewalRefused(reason)]
            case Renewal() as asked:
                meant = is_meant(self.identity, asked)
                return [ev.RenewalAsked(asked.keys, asked.spread_s)] if meant else []
            case welcome:
                return [self._renewed(self._renewer.answer(self.identity, welcome))]

    def _renewed(self, new: Identity) -> ev.Renewed:
        before = self.identity
        has_new_keys = new.keys != before.keys
        if has_new_keys:
            # First: what is sealed under old keys must not be found beside new ones.
            self._outbox.discard()
        self._adopt(new)
        if new.certificate_pem != before.certificate_pem:
            self.has_other_certificate = True
        log.info(
            "renewed: fleet key %d, certificate %d%s",
            new.fleet_epoch, new.certified_until, ", new keys" if has_new_keys else "",
        )  # fmt: skip
        return ev.Renewed(frozenset(new.fleet_keys), keys=has_new_keys)

    def _adopt(self, new: Identity) -> None:
        """When this returns, it survives."""
        identities.save(self._journal.folder, new, disk=self._journal.disk)
        self.identity = new
