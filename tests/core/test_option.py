from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.core.errors import OptionError
from rewriter.core.option import Option, Plan, parse_options

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True)
VALUES = st.one_of(
    st.integers(-1000, 1000), st.floats(0.001, 100.0), st.from_regex(r"[a-z]{1,6}", fullmatch=True)
).filter(lambda value: value not in ("nan", "inf", "infinity"))
OPTIONS = st.builds(
    lambda name, parameters, site: Option(name, tuple(sorted(parameters.items())), site),
    NAMES,
    st.dictionaries(NAMES, VALUES, max_size=3),
    st.sampled_from(["", "layers.3.attention", "layers.11.feed_forward"]),
)


@given(OPTIONS)
def test_text_round_trip(option: Option) -> None:
    assert Option.parse(str(option)) == option


@given(st.lists(OPTIONS, max_size=5))
def test_plan_round_trip(options: list[Option]) -> None:
    plan = Plan.of(options)
    assert Plan.parse(str(plan)) == plan and hash(Plan.parse(str(plan))) == hash(plan)
    assert plan.empty == (not options)
    for site, chosen in plan.choices.items():
        assert plan.at(site) == chosen == tuple(o for o in options if o.site == site)


def test_parameters_in_any_order_are_equal() -> None:
    assert Option.parse("a{x=1,y=2}@s") == Option.parse(" a{y=2, x=1}@s") == Option.of("a", "s", y=2, x=1)


def test_lists_split_outside_braces() -> None:
    assert parse_options("a,b{x=1,y=2},c") == (Option.of("a"), Option.of("b", x=1, y=2), Option.of("c"))


@pytest.mark.parametrize("text", ["", "A", "a{", "a{x}", "a@b c", "a{x=1}b", "1a"])
def test_nonsense_is_an_error(text: str) -> None:
    with pytest.raises(OptionError):
        Option.parse(text)


def test_whole_numbers_are_checked() -> None:
    with pytest.raises(OptionError, match="whole number keep"):
        Option.parse("head_pruning{keep=many}").integer("keep")
    with pytest.raises(OptionError):
        Option.parse("head_pruning").integer("keep")
