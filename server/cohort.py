"""Whom to invite to a round: how many, and which share of the fleet.

Pure. The draw itself is broker_bridge.wire.lottery, which the devices know too. The
number drawn is even in expectation, not exact; the coordinator answers *busy* to
those who come when `invitations` have been handed out.
"""

import math

from broker_bridge.wire.lottery import EVERYONE

__all__ = ["OVER_SELECTION", "invitations", "threshold"]

OVER_SELECTION = 1.3
"""Invite so many times the target: 6–10 % drop out in the field (Bonawitz et al. 2019, §7)."""


def invitations(target: int, over_selection: float = OVER_SELECTION) -> int:
    """How many devices to invite so that `target` of them report; never fewer than `target`."""
    # Rounded first, so that 10 × 1.3 does not become 14 through a last bit.
    return max(target, math.ceil(round(target * over_selection, 6)))


def threshold(online: int, target: int, over_selection: float = OVER_SELECTION) -> int:
    """The lottery threshold, 0 … 2**32, that draws `invitations(target)` of `online` devices.

    With fewer devices than invitations, everyone is drawn.
    """
    invited = invitations(target, over_selection)
    if target < 1:
        return 0
    # The draw is even only in expectation, and places are handed out one by one: drawing
    # three standard deviations more costs some a *busy*, drawing too few costs a deadline.
    invited += math.ceil(3 * math.sqrt(invited))
    if invited >= online:
        return EVERYONE
    return -(-invited * EVERYONE // online)  # rounded up: a share that is never too small
