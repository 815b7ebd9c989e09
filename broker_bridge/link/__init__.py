"""How it travels: sessions with a broker, and the broker of the demo and the tests.

The promise, and what keeps it over a network:

    base.py              what a link promises
    queued_link.py       its owner's half: queues and bounds
    paho_session.py      its network half: one connection, step by step
    paho_link.py         a thread that waits for one session; poller.py: for thousands
    memory_link.py       the same promise, kept in one process

What a session works with:

    session_settings.py  whom to call, as whom, how patiently
    attempts.py          what one connection teaches the next
    failures.py          why there is none, in sentences
    paho_client.py       paho, with bounds; plain_packet.py: the two packets that it never sees
    filters.py           MQTT's rules for topics and filters

The broker, and the way in:

    access.py            how one gets into a broker
    tls.py               certificates and host names, verified
    local_broker.py      a mosquitto of our own; broker_config.py: its settings
    inspection.py        a broker looked at from outside, for the doctors
"""
