"""Many devices in one process, each with the code that runs on a device: for `midge simulate`.

Everything is real but the training, the disk's patience and the number of threads: each
device has its own keys, certificate, connection, agent, journal and outbox.

    members.py    who there is: identities that the server's side made in bulk
    fate.py       what happens to whom, by a seed: who trains slowly, who loses power when
    pretence.py   training that costs nothing
    swarm.py      the devices, and the loop that turns them
    __main__.py   the process: `python -m device_client.simulation`
"""
