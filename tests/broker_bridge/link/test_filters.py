"""Topic names and filters by the book."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.link.filters import check_filter, check_topic, matches


@pytest.mark.parametrize(
    ("wanted", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/+", "a", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("+/+", "/a", True),
        ("+", "/a", False),
        ("/+", "/a", True),
        ("a/+/c", "a//c", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a", "ab", False),
        ("a/#", "ab", False),
    ],
)
def test_filters_match_as_the_standard_says(wanted, topic, expected):
    assert matches(wanted, topic) == expected


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), st.data())
def test_a_filter_made_by_widening_a_topic_matches_it(levels, data):
    keep = data.draw(st.integers(0, len(levels)))
    wide = [data.draw(st.sampled_from([level, "+"])) for level in levels[:keep]]
    wanted = [*wide, "#"] if keep < len(levels) else wide
    assert matches("/".join(wanted), "/".join(levels))


@given(st.text(alphabet="ab+#/$", min_size=1, max_size=8))
def test_a_topic_without_wildcards_is_a_filter_that_matches_itself(text):
    try:
        check_topic(text)
    except ValueError:
        assert "+" in text or "#" in text
    else:
        check_filter(text)
        assert matches(text, text)


def test_a_name_longer_than_the_wire_allows_is_refused():
    with pytest.raises(ValueError, match="not a topic"):
        check_topic("a" * 65_536)
    with pytest.raises(ValueError, match="not a filter"):
        check_filter("ä" * 40_000)
