"""One cell of the table of torch models: a way of writing attention in one form; run as a module, all of them."""

from __future__ import annotations

import sys

import torch

from rewriter.core.site import State
from rewriter.torch_graphs.sites import TorchSites, read
from rewriter.torch_graphs.splice import splice
from tests.torch_graphs.blocks import FAMILIES, FORMS, in_form


def check(name: str, form: str) -> None:
    """Assert the state of every site, where it came from, and that writing it anew in fx is the identity."""
    model, example = in_form(name, form)
    found = read(model, **example)
    family = FAMILIES[name]
    attention = found.recognition.attention
    assert not found.recognition.unrecognised
    assert len(attention) == len(found.recognition.feed_forward) == family.attentions
    assert {site.state for site in found} == {State.LOWERABLE}, [site.problems for site in found]
    assert all((site.heads, site.qk_dim, site.v_dim) == (4, 6, 6) for site in attention)
    _knows_where_it_came_from(found)
    _is_the_identity_in_fx(found)


def _knows_where_it_came_from(found: TorchSites) -> None:
    """Every site has fx nodes of the graph that is rewritten, no two share one, and every weight a parameter."""
    names = {node.name for node in found.bridge.host.graph.nodes}
    known = {*dict(found.bridge.host.named_parameters(remove_duplicate=False))}
    seen: set[str] = set()
    for site in found.recognition.attention:
        nodes = set(found.fx_nodes(site))
        assert nodes and nodes <= names and not nodes & seen
        seen |= nodes
        parameters = found.parameters(site)
        assert set(parameters) >= {"query.weight", "key.weight", "value.weight", "output.weight"}
        assert {name for origin in parameters.values() for name in origin} <= known


def _is_the_identity_in_fx(found: TorchSites) -> None:
    """All sites written anew, with nothing rewritten: the same numbers, from other nodes."""
    sites = {site.id: site for site in found}
    made = splice(found.matches, sites, sites)
    assert not made.refused
    args, kwargs = found.bridge.example
    with torch.no_grad():
        expected, actual = found.bridge.host(*args, **kwargs), made.module(*args, **kwargs)
    # of its scale: float32 itself is that far from float64 in the deepest of these
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    left = {node.name for node in made.module.graph.nodes}
    cores = [name for site in found.recognition.attention for name in found.fx_nodes(site)]
    assert not {name for name in cores if "softmax" in name or "bmm" in name} & left


def main() -> int:
    """Print the whole table; returns how many cells failed."""
    failed = 0
    for name in FAMILIES:
        row = []
        for form in FORMS:
            try:
                check(name, form)
                row.append("ok")
            except AssertionError as problem:
                failed += 1
                row.append(f"FAILED {str(problem).splitlines()[:1]}")
        print(f"{name:<8}", *(f"{form}: {cell:<4}" for form, cell in zip(FORMS, row, strict=True)), flush=True)
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
