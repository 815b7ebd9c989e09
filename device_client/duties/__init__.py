"""What a federation may ask of a device, one duty at a time: the rules, and nothing but the rules.

    round.py       train, and send an update: one open round, from its announcement to the receipt
    measuring.py   measure a model on data that is held out
    keeping.py     fetch a model for this device's own programs

Each is a `Duty`; `device_client.participant` says which begins, and hands the events to it. What
outlives a duty is in `standing.py`. What duties share: `fetching.py` and, for what gets no
answer, `asking.py`.
"""
