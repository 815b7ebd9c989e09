"""What each broker lacks, in one place: the table in docs/brokers.md is made from this.

`python -m tests.conformance.table` prints the table. Each row names the tests or the probe that
show it, and those run on every engine: a lack that is not there fails as well as one that is.
"""

from dataclasses import dataclass, field

from tests.conformance.brokers import ENGINES

__all__ = ["CAPABILITIES", "Capability", "lacks", "table"]

MOSQUITTO, MOSQUITTO_3, NATS, IOTCORE = ENGINES


@dataclass(frozen=True)
class Capability:
    """One row. `lacks`: by engine, what is not so there and what midge does then."""

    says: str
    shown_by: str
    lacks: dict[str, str] = field(default_factory=dict)


CAPABILITIES: dict[str, Capability] = {
    "rounds": Capability(
        "Rounds end with the same bits as over the in-memory link, in packets of 8 kB",
        "test_rounds_end_with_the_same_bits_and_a_late_device_is_served_by_the_broker_alone",
    ),
    "late": Capability(
        "A device that comes late gets announcement, task and model from the broker alone",
        "test_rounds_end_with_the_same_bits_and_a_late_device_is_served_by_the_broker_alone",
    ),
    "wills": Capability(
        "A device or server that vanishes is shown as lost",
        "test_a_server_that_vanishes_is_lost_and_one_that_comes_back_goes_on",
    ),
    "resume": Capability(
        "A device killed in mid-upload sends only what is missing",
        "test_a_device_killed_in_mid_upload_is_lost_and_sends_only_what_is_missing",
        {
            IOTCORE: "only once the announcement is repeated: a session it still knows is not sent "
            "what is retained, so the device sits this round out",
        },
    ),
    "killed": Capability(
        "A round goes on, and ends with the same bits, after the broker was killed in its middle",
        "test_a_broker_killed_in_mid_round_costs_nothing_but_time",
    ),
    "absent": Capability(
        "What is sent to a client that is away waits for it", "probe_messages_wait_for_the_absent"
    ),
    "again": Capability(
        "Subscribing again brings what is retained again",
        "probe_subscribing_again_brings_what_is_retained",
        {IOTCORE: "first time only; midge asks the server to publish it again"},
    ),
    "stopped": Capability(
        "What is retained, and sessions, outlast a restart in order",
        "probe_a_restart_in_order_keeps_everything",
        {IOTCORE: "nothing is on its disk; the server lays it out again"},
    ),
    "retained killed": Capability(
        "What is retained outlasts a SIGKILL",
        "probe_a_kill_keeps_what_is_retained",
        {
            MOSQUITTO: "back to its last `autosave_interval`; the server lays it out again",
            MOSQUITTO_3: "as with MQTT 5",
            IOTCORE: "the server lays it out again",
        },
    ),
    "v5": Capability(
        "Speaks MQTT 5 on the port that speaks 3.1.1",
        "probe_it_speaks_mqtt_5",
        {
            NATS: "3.1.1 only; midge tries 5 first and falls back",
            IOTCORE: "3.1.1 only, as midge starts it; midge falls back",
        },
    ),
    "says": Capability(
        "Says how large a packet and how many open publishes it takes",
        "probe_it_says_what_it_takes",
        {
            MOSQUITTO_3: "set `packet_bytes_max` if it takes less than 60 KiB",
            NATS: "set `packet_bytes_max` if `max_payload` is less than 60 KiB",
            IOTCORE: "midge starts it with 1 MiB",
        },
    ),
    "window": Capability(
        "Sends us no more unacknowledged messages than we asked for",
        "probe_it_keeps_to_our_window",
        {
            MOSQUITTO_3: "MQTT 3.1.1 cannot ask; its `max_inflight_messages` and our full queue do",
            NATS: "MQTT 3.1.1 cannot ask; its `max_ack_pending` and our full queue do",
            IOTCORE: "MQTT 3.1.1 cannot ask; our full queue does",
        },
    ),
    "certificates": Capability(
        "TLS; without a certificate of our CA nobody gets in",
        "probe_strangers_are_kept_out",
        {IOTCORE: "TLS, but client certificates are not checked: for demos only"},
    ),
    "rights": Capability(
        "A device can speak under its own name only",
        "probe_a_device_speaks_under_its_own_name_only",
        {IOTCORE: "no access rules at all; signatures and sealing remain"},
    ),
    "refusals": Capability(
        "A publish that is not allowed is told to whoever tried",
        "probe_a_refused_publish_is_told",
        {
            MOSQUITTO_3: "answered as a success, and dropped",
            NATS: "answered as a success, and dropped; it is in the broker's log",
            IOTCORE: "nothing is refused",
        },
    ),
}


def lacks(engine: str, capability: str) -> bool:
    """Whether the table says that `engine` lacks it. KeyError for one that is not in it."""
    return engine in CAPABILITIES[capability].lacks


def table() -> str:
    """The table of docs/brokers.md, in Markdown, its notes below it."""
    notes: list[str] = []
    lines = [
        "| | " + " | ".join(ENGINES) + " |",
        "|---|" + "---|" * len(ENGINES),
    ]
    for each in CAPABILITIES.values():
        cells = [_cell(each.lacks.get(engine), notes) for engine in ENGINES]
        lines.append(f"| {each.says} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def _cell(note: str | None, notes: list[str]) -> str:
    if note is None:
        return "yes"
    sentence = f"{note[0].upper()}{note[1:]}."
    if sentence not in notes:
        notes.append(sentence)
    return f"no ({notes.index(sentence) + 1})"
