"""`midge simulate`: a fleet of thousands on one machine, over a real broker.

Enrols made-up devices in bulk, starts a few processes of `device_client.simulation` with
them, and runs rounds as any operator would. Broker and server are those of the fleet if
they run, else they are started for the time being. What is measured is what the machine
says of the processes, and what the server says of its rounds.

    members.py     the devices, and the file that says who they are
    processes.py   the processes that hold them, and what each costs
    fleet.py       the fleet under load
"""
