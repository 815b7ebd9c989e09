"""The newest model for this device's own programs: kept, and trained on from there.

A round does not fail for want of it, and comes first.
"""

import logging
from pathlib import Path

from broker_bridge.disk import REAL_DISK, Disk
from broker_bridge.errors import LocalError
from device_client import model as models
from device_client.workbench import Workbench

__all__ = ["OwnModels"]

log = logging.getLogger("midge.device")


class OwnModels:
    """What `device_client/model.py` finds."""

    def __init__(
        self,
        folder: Path,
        bench: Workbench,
        *,
        wanted: bool,
        personal_epochs: int,
        disk: Disk = REAL_DISK,
    ) -> None:
        """`personal_epochs`: how long a kept model is trained on local samples; 0: not at all."""
        self._folder = folder
        self._bench = bench
        self._wanted = wanted
        self._personal_epochs = personal_epochs
        self._disk = disk

    def version(self) -> int | None:
        """Of the model that is kept, 0 before the first; None where none is wanted."""
        if not self._wanted:
            return None
        return models.kept(self._folder, "global", disk=self._disk) or 0

    def keep(self, version: int, number: int, *, at_rest: bool) -> None:
        """Keep the model at hand, of round `number`; `at_rest`: there is time to train it on."""
        try:
            self._bench.keep(version=version, number=number)
        except LocalError as error:
            log.warning("model %d is not kept for local use: %s", version, error)
            return
        if self._personal_epochs and at_rest:
            self._bench.personalise(number, version, epochs=self._personal_epochs)
