"""Every bound in one place. Whatever a stranger makes us hold is limited here first."""

from dataclasses import dataclass

__all__ = ["LIMITS", "Limits"]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Limits:
    """The bounds that the code checks. Units are the last word of each name."""

    # What one MQTT packet may weigh, topic and headers included. AWS IoT Core allows
    # 128 KiB; throughput is flat from 64 KiB on (docs/protocol.md, "Chunks").
    packet_bytes_max: int = 60 * KIB
    packet_bytes_min: int = 1 * KIB  # below this a broker is of no use to us
    packet_overhead_bytes: int = 256  # MQTT headers, topic and properties
    control_bytes_max: int = 64 * KIB  # any message but a chunk

    # Unacknowledged publishes of a device, and of whoever speaks to a broker that does not say how
    # many it takes; and of the server, which answers all devices, where CONNACK allows it.
    inflight_max: int = 20
    server_inflight_max: int = 200
    send_queue_messages_max: int = 4096  # publishes waiting for the network
    receive_queue_messages_max: int = 1024  # messages waiting for the loop

    name_chars_max: int = 40  # a level of a topic: federation, device, kind
    chunks_max: int = 65_536  # chunks in one transfer
    model_bytes_max: int = 1024 * MIB  # one set of weights
    plan_bytes_max: int = 256 * MIB  # one task, without its weights
    weights_header_bytes_max: int = 1 * MIB
    tensor_rank_max: int = 8
    task_header_bytes_max: int = 4 * MIB

    examples_max: int = 1_000_000_000  # examples a device may claim, before the weight cap
    open_uploads_per_device_max: int = 1
    unread_events_max: int = 256  # events a core may put out in one step


LIMITS = Limits()
