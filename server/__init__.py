"""What runs the fleet: the command `midge`.

The rules, pure:

    events.py        what can happen, and what is to be done
    coordinator.py   a run, from its start to its last round
    round.py         an open round: who has a place in it, and what became of it
    orders.py        what an operator asks for
    attendance.py    which devices are here
    cohort.py        whom to invite
    measuring.py     whether a new model is good enough
    quotas.py        how much one device may take up
    aggregation/     from many updates to one model

The loop, and what it works with:

    service.py       receive, step, perform
    hearing.py       what a message says; desk.py: what an operator asks, and the answer
    mail.py          what is said to one device
    noticeboard.py   what lies on the broker for everyone
    lookout.py       what commands change meanwhile; members.py: who belongs to the fleet
    room.py          a full disk; rejects.py: what was dropped, and why
    ledger.py        what a run writes down; intake.py: the updates of a round
    lineage.py       its task and its models
    announcer.py     what is announced of a round; recall.py: of those that are over
    evaluation.py    a model, measured on the server's samples
    old_copy.py      whether the database is one that was put back
    store/           database, models, spool

The command:

    cli.py           `midge`; commands/, one by one
    config.py        the settings, of midge.toml; doctor.py: what is wrong here
    operator.py      the operator's side of the control topics
    screen.py        what a person sees
    fleet/           certificates, enrolment, the folder that `midge init` makes; cards and bundles
    tasks/           from a Keras model to a task; the only place with TensorFlow
    simulation/      `midge simulate`
    demo/            `midge demo`
"""
