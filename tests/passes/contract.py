"""What every pass is held to, whatever it does: one class, inherited by the test file of each pass."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, output_weights
from rewriter.core.site import AttentionSite, FeedForwardSite, LinearSite, Site, State
from rewriter.core.statistics import Statistics
from rewriter.core.target import Target
from tests.passes.reference import (
    TARGET,
    Case,
    attention_case,
    features,
    feed_forward_case,
    hostile,
    output,
    relative_error,
    statistics,
)

HEADINGS = ("What it does", "When it applies", "Exact or calibrated", "What it costs", "Before and after", "Source")


def digest(site: Site) -> str:
    """A hash over every array and every plain field of a site."""
    found = hashlib.sha256()
    for path, leaf in leaves(site, ""):
        found.update(path.encode())
        found.update(np.ascontiguousarray(leaf).tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode())
    return found.hexdigest()


def leaves(thing: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every field that is no dataclass, with its path."""
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}.{field.name}")
        else:
            yield f"{path}.{field.name}", value


class Contract:
    """Subclasses name the pass, cases it applies to, and sites it must refuse."""

    name: str
    target: Target = TARGET

    def cases(self) -> list[Case]:
        """Cases the pass applies to."""
        raise AssertionError("a contract needs cases")

    def refused(self) -> dict[str, Site]:
        """Refusal code -> a site that earns it."""
        raise AssertionError("a contract needs refusals")

    @property
    def subject(self) -> Pass:
        return discover()[self.name]

    def facts(self, case: Case) -> Statistics | None:
        """What `apply` is given."""
        return statistics(case.site, case) if self.subject.kind == "calibrated" else None

    def test_documented(self) -> None:
        text = type(self.subject).__doc__ or ""
        assert [heading for heading in HEADINGS if f"    {heading}\n" in text] == list(HEADINGS)

    def test_legal(self) -> None:
        for case in self.cases():
            facts = self.facts(case)
            offered = self.subject.options(case.site, self.target)
            assert offered
            for option in offered:
                assert_legal(self.subject.apply(case.site, option, facts), case)

    def test_input_is_untouched(self) -> None:
        for case in self.cases():
            before = digest(case.site)
            self.subject.apply(case.site, self.subject.options(case.site, self.target)[-1], self.facts(case))
            assert digest(case.site) == before

    def test_options_print_and_parse(self) -> None:
        for case in self.cases():
            for option in self.subject.options(case.site, self.target):
                assert Option.parse(str(option)) == option
                assert option.site == case.site.id and option.name == self.name

    def test_refusals_have_reasons(self) -> None:
        for code, site in self.refused().items():
            refusal = self.subject.refuse(site)
            assert isinstance(refusal, Refusal) and refusal.code == code and len(refusal.why) > 10
            assert self.subject.options(site, self.target) == ()

    def test_refused_site_cannot_be_rewritten(self) -> None:
        for site in self.refused().values():
            option = self.subject.options(self.cases()[0].site, self.target)[-1]
            with pytest.raises(OptionError):
                self.subject.apply(site, option, None)

    def test_every_pass_refuses_the_other_kind_of_block_and_unproven_sites(self) -> None:
        other: Site = feed_forward_case(0).site
        own = self.cases()[0].site
        if isinstance(own, FeedForwardSite):
            other = attention_case(0).site
        assert self.subject.refuse(other) is not None
        assert self.subject.refuse(dataclasses.replace(own, state=State.MAPPED)) is not None
        assert self.subject.refuse(dataclasses.replace(own, escapes=("inner",))) is not None

    def test_second_application_finds_nothing(self) -> None:
        for case in self.cases():
            facts = self.facts(case)
            for option in self.subject.options(case.site, self.target):
                once = self.subject.apply(case.site, option, facts)
                if self.subject.refuse(once) is not None:
                    continue
                own = Case(once, case.values, case.valid_BS)
                twice = self.subject.apply(once, option, self.facts(own))
                assert relative_error(twice, own) < 1e-12, str(option)

    def test_names_and_dtypes_stay(self) -> None:
        for site, case in zip(self.rewritten(), self.cases(), strict=True):
            assert site.id == case.site.id and site.state is case.site.state and site.order == case.site.order
            for before, after in zip(result(case.site), result(site), strict=True):
                assert before == after

    def test_same_in_another_process(self) -> None:
        here = [digest(site) for site in self.rewritten()]
        script = (
            f"from {type(self).__module__} import {type(self).__name__} as T\n"
            "from tests.passes.contract import digest\n"
            "print('\\n'.join(digest(site) for site in T().rewritten()))"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        there = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
        assert there.stdout.decode().split() == here

    def rewritten(self) -> list[Site]:
        """The strongest option on every case."""
        return [
            self.subject.apply(case.site, self.subject.options(case.site, self.target)[-1], self.facts(case))
            for case in self.cases()
        ]


class ExactContract(Contract):
    """For exact passes: the same function on hostile masks and two shapes; what is refused would change it."""

    def test_same_function_on_hostile_masks_and_two_shapes(self) -> None:
        for case in self.cases():
            option = self.subject.options(case.site, self.target)[0]
            after = self.subject.apply(case.site, option, None)
            for tokens in (5, 11):
                for values in hostile(case, tokens):
                    found, wanted = output(after, values), output(case.site, values)
                    close = 1e-9 if output_weights(case.site).dtype == result(case.site)[-1] else 1e-5
                    np.testing.assert_allclose(found, wanted, rtol=close, atol=close, equal_nan=True)


class CalibratedContract(Contract):
    """For calibrated passes: full size is exact, errors grow with the cut, the naive version is beaten."""

    def full(self, case: Case) -> Option:
        """The option that cuts nothing."""
        raise AssertionError("a contract needs the full size")

    def naive(self, case: Case, option: Option) -> Site:
        """The data-free way to the same size."""
        raise AssertionError("a contract needs a naive version")

    def test_full_size_is_exact(self) -> None:
        for case in self.cases():
            same = self.subject.apply(case.site, self.full(case), self.facts(case))
            assert relative_error(same, case) < 1e-18

    def test_error_grows_with_the_cut(self) -> None:
        for case in self.cases():
            for errors in self.errors(case).values():
                assert all(a <= b * 1.05 + 1e-9 for a, b in itertools.pairwise(errors)), errors
                assert errors[-1] > 1e-5

    def test_beats_the_naive_version(self) -> None:
        for case in self.cases():
            facts = self.facts(case)
            for option in self.subject.options(case.site, self.target):
                ours = relative_error(self.subject.apply(case.site, option, facts), case)
                theirs = relative_error(self.naive(case, option), case)
                assert ours <= theirs + 1e-12, (str(option), ours, theirs)

    def test_needs_statistics(self) -> None:
        case = self.cases()[0]
        with pytest.raises(OptionError):
            self.subject.apply(case.site, self.subject.options(case.site, self.target)[0], None)

    def test_rejects_levels_the_site_does_not_have(self) -> None:
        case = self.cases()[0]
        key = self.full(case).parameters[0][0]
        for level in (0, 10_000):
            self.assert_rejected(case, Option.of(self.name, case.site.id, **{key: level}))

    def assert_rejected(self, case: Case, option: Option) -> None:
        """An option that does not fit is the user's mistake, told as such."""
        with pytest.raises(OptionError):
            self.subject.apply(case.site, option, self.facts(case))

    def test_feature_map_is_the_truth(self) -> None:
        for case in self.cases():
            facts = self.facts(case)
            assert facts is not None
            option = self.subject.options(case.site, self.target)[-1]
            mapping = self.subject.feature_map(case.site, option, facts)
            if mapping is None:
                continue
            after = features(self.subject.apply(case.site, option, facts), case.values)
            before = features(case.site, case.values)
            mapped = before[..., mapping] if mapping.ndim == 1 else before @ mapping
            np.testing.assert_allclose(after, mapped, rtol=1e-9, atol=1e-9)

    def test_losses_are_the_truth(self) -> None:
        for case in self.cases():
            facts = self.facts(case)
            assert facts is not None
            spread = facts.regression.spread
            for option, loss in self.subject.losses(case.site, facts).items():
                if option in self.subject.options(case.site, self.target):
                    real = relative_error(self.subject.apply(case.site, option, facts), case)
                    assert real - 1e-9 <= loss / spread <= 1.5 * real + 2e-2, (str(option), loss / spread, real)

    def errors(self, case: Case) -> dict[tuple[str, ...], list[float]]:
        """Errors of all options, mildest first, apart for options with different parameters."""
        facts = self.facts(case)
        found: dict[tuple[str, ...], list[float]] = {}
        for option in self.subject.options(case.site, self.target):
            error = relative_error(self.subject.apply(case.site, option, facts), case)
            found.setdefault(tuple(key for key, _ in option.parameters), []).append(error)
        return found


def result(site: Site) -> tuple[object, ...]:
    """What the graph sees of a site: the result's name, its layout, its dtype."""
    if isinstance(site, FeedForwardSite):
        return site.output, site.rank, site.down_FC.dtype, site.source
    assert site.output is not None
    return site.output.value, site.output.rank, site.output.time_first, site.output.weight_HDC.dtype


def assert_legal(site: Site, case: Case) -> None:
    """Shapes fit together, dtypes are kept, everything is finite, and the site still runs."""
    old, new = output(case.site, case.values), output(site, case.values)
    assert new.shape == old.shape and np.isfinite(new[case.valid_BS]).all()
    assert np.isfinite(output_weights(site)).all()
    if isinstance(site, FeedForwardSite):
        assert isinstance(case.site, FeedForwardSite) and site.down_FC.dtype == case.site.down_FC.dtype
        assert site.up_CF.dtype == case.site.up_CF.dtype
        return
    assert isinstance(case.site, AttentionSite) and site.output is not None and case.site.output is not None
    if isinstance(site, LinearSite):
        assert site.output.weight_HDC.dtype == case.site.output.weight_HDC.dtype
        assert site.id == case.site.id and site.output.value == case.site.output.value
        return
    assert site.output.weight_HDC.dtype == case.site.output.weight_HDC.dtype
    assert site.output.weight_HDC.shape[:2] == (site.heads, site.v_dim)
    assert site.query.dim == site.key.dim
    for part in (site.query, site.key, site.value):
        assert part.weight_CGD is not None and part.weight_CGD.dtype == case.site.output.weight_HDC.dtype
        assert len(part.head_of) == site.heads and max(part.head_of) < part.heads
