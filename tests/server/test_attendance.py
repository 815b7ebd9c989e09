"""Who is here, against the plain definition: look at everybody's last word."""

from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.wire.messages import Presence
from server.attendance import Attendance

DEVICES = st.sampled_from(["ann", "ben", "cat"])
SAID = st.builds(
    Presence,
    state=st.sampled_from(["ready", "training", "sleeping", "lost"]),
    role=st.sampled_from(["train", "evaluate"]),
    boot=st.just(1),
)
HAPPENED = st.one_of(
    st.tuples(st.just("seen"), DEVICES, SAID),
    st.tuples(st.just("forget"), DEVICES),
    st.tuples(st.just("clear")),
)


@given(st.lists(HAPPENED, max_size=30))
def test_who_is_here_is_whoever_said_so_last(happened):
    attendance, last = Attendance(), {}
    for name, *given_ in happened:
        getattr(attendance, name)(*given_)
        match name, *given_:
            case "seen", device, presence:
                last[device] = presence
            case "forget", device:
                last.pop(device, None)
            case ("clear",):
                last.clear()
        for role in ("train", "evaluate"):
            here = {
                device
                for device, presence in last.items()
                if presence.role == role and presence.state not in ("lost", "sleeping")
            }
            assert set(attendance.online(role)) == here
            assert attendance.count(role) == len(here)
    assert sum(attendance.states().values()) == len(last)
    assert all(attendance.knows(device) for device in last)
