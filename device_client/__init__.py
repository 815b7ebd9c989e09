"""What runs on the Raspberry Pi: the command `midge-device`.

The rules, pure:

    events.py        what can happen, and what is to be done
    participant.py   which duty this device has
    duties/          a round, a model to measure, a model to keep
    renewing.py      when to ask for newer keys
    eligibility.py   the owner's rules

The loop, and what it works with:

    agent.py         receive, step, perform
    hearing.py       what the server says, verified
    collecting.py    task and model on their way
    workbench.py     task and model at hand; background.py: work beside the loop
    sealing.py       what was trained, sealed
    outbox.py        what is sealed, on disk
    papers.py        keys and certificate, kept new; renewal.py: in which words
    permission.py    what the owner's rules say now; readings.py: what the machine says
    nameplate.py     what others may read of this device

Training:

    data.py          where samples come from; sample_store.py: a store for a sensor's
    trainer.py       epochs, batches, progress
    sandbox/         the same in a locked process
    trial.py         the same without a server
    personal.py      a model of this device's own

The command, and what is on disk:

    cli.py           `midge-device`; doctor.py: what is wrong here; options.py: --dir
    config.py        the settings, of device.toml; access.py: how it gets into its broker
    identity.py      keys and certificate; enrolment.py: how they come here
    journal.py       rounds seen, and how often it started
    model.py         the newest model; prediction.py, inference.py: for other programs

    simulation/      thousands of devices in one process
"""
