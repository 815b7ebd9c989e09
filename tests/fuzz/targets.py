"""Every parser of bytes that come from outside, as a function that is fed any bytes at all.

`tests.fuzz.target` says what a target is; `make fuzz` and the default tests feed these.
"""

from broker_bridge.wire import messages
from tests.broker_bridge.wire.test_messages import BINARY, JSON
from tests.fuzz import answering, contents, files, hearing, serving, wire
from tests.fuzz.target import MIB, Target

__all__ = ["TARGETS"]

ALL = [
    Target("topics", wire.topics, wire.topic_seeds),
    Target("messages_binary", wire.messages_binary, wire.numbered(BINARY, messages.encode)),
    Target("messages_json", wire.messages_json, wire.numbered(JSON, messages.encode_json)),
    Target("signed", wire.signed, wire.signed_seeds),
    Target("batch", wire.batches, wire.batch_seeds),
    Target("chunks", wire.chunks, wire.chunk_seeds),
    Target("update", wire.update, wire.update_seeds),
    Target("enrolment", wire.enrol, wire.enrol_seeds),
    Target("renewal", wire.renew, wire.renew_seeds),
    Target("weights", contents.decode_weights, contents.weight_seeds),
    Target("task", contents.task, contents.task_seeds, base_bytes=2 * MIB),
    Target("frame", contents.frame, contents.frame_seeds),
    Target("bundle", files.bundle, lambda: [files.bundle_seed(), files.bundle_seed(files.LOGIN)]),
    # tomllib descends by calling itself, as deep as Python lets it: 1.7 MB of frames.
    Target("config", files.config, files.config_seeds, base_bytes=4 * MIB),
    Target("certificate", files.certificate, files.certificate_seeds),
    Target("outbox", files.outbox, lambda: [files.outbox_file()]),
    Target("journal", files.journal, files.journal_seeds),
    Target("server_files", files.server_files, files.server_file_seeds),
    Target(
        "backup", files.backup, lambda: [*files.backup_seeds()], base_bytes=4 * MIB, is_slow=True
    ),
    Target("mqtt", answering.mqtt, answering.mqtt_seeds, base_bytes=4 * MIB, is_slow=True),
    Target("ctl", serving.ctl, serving.ctl_seeds, base_bytes=32 * MIB, is_slow=True),
    Target("device", hearing.device, hearing.device_seeds, base_bytes=32 * MIB, is_slow=True),
    Target("service", serving.service, serving.service_seeds, base_bytes=32 * MIB, is_slow=True),
]
TARGETS = {target.name: target for target in ALL}
