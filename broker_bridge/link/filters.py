"""MQTT's rules for topic names and topic filters. PURE.

MQTT 5.0, section 4.7. What a broker would hang up on is refused here, at the caller.
"""

__all__ = ["check_filter", "check_topic", "matches"]

_BYTES_MAX = 65_535


def check_topic(topic: str) -> None:
    """Raise ValueError for a topic no broker can take: that is the caller's bug."""
    if not _is_text(topic) or "+" in topic or "#" in topic:
        raise ValueError(f"{topic!r} is not a topic to publish on")


def check_filter(topic_filter: str) -> None:
    """Raise ValueError for a filter no broker can take: that is the caller's bug."""
    levels = topic_filter.split("/")
    misplaced = any(len(level) > 1 and ("+" in level or "#" in level) for level in levels)
    if not _is_text(topic_filter) or misplaced or "#" in levels[:-1]:
        raise ValueError(f"{topic_filter!r} is not a filter to subscribe to")


def matches(topic_filter: str, topic: str) -> bool:
    """Whether `topic` falls under `topic_filter`."""
    if topic.startswith("$") and topic_filter[:1] in ("+", "#"):
        return False
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(levels) or level not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)


def _is_text(name: str) -> bool:
    return 0 < len(name.encode()) <= _BYTES_MAX and "\0" not in name
