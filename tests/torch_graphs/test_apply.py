"""Plans applied to torch models: the result is torch, computes what the ONNX path does, and can be trained further."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import passes
import rewriter
from rewriter.assembly.assemble import assemble
from rewriter.attention.lower import lower
from rewriter.core.errors import DataError, OptionError
from rewriter.core.option import Plan
from rewriter.core.passes_registry import discover
from rewriter.graph.interpreter import Interpreter
from rewriter.torch_graphs.apply import Rewritten
from rewriter.torch_graphs.sites import TorchSites
from tests.attention import exported
from tests.torch_graphs.blocks import AUTO, WIDTH, built, in_form

PRUNED = "head_pruning{keep=2}@layers.0.attention\nffn_pruning{width=24}@layers.0.feed_forward"


@cache
def _sites(name: str, form: str) -> TorchSites:
    model, example = in_form(name, form)
    return rewriter.sites(model, **example)


def _data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 11, WIDTH, generator=generator) for _ in range(6)]


@cache
def _pruned() -> Rewritten:
    return rewriter.apply(_sites("sdpa", "module"), PRUNED, _data())


def _targets(module: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes]


def test_an_exact_plan_changes_nothing() -> None:
    made = rewriter.apply(_sites("sdpa", "module"), "exact_cleanup@layers.0.attention")
    x, module = _data()[0].double(), built("sdpa").double()
    torch.testing.assert_close(copy.deepcopy(made.module).double()(x), module(x), rtol=0, atol=1e-6)
    assert "key.bias" in made.removed
    assert made.names["query.weight"] == ("query.weight",)


def test_the_result_is_the_fx_graph_with_its_regions_replaced() -> None:
    made, host = _pruned().module, _sites("sdpa", "module").bridge.host
    assert type(made).__mro__[1] is torch.fx.GraphModule
    assert functional.linear in _targets(made) and functional.scaled_dot_product_attention in _targets(made)
    kept = {node.name for node in made.graph.nodes} & {node.name for node in host.graph.nodes}
    assert {"x", "add", "layer_norm", "add_1"} <= kept
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert shapes["query.weight"] == (12, WIDTH) and shapes["output.weight"] == (WIDTH, 12)
    assert set(shapes) == {name for name, _ in built("sdpa").named_parameters()}


def test_a_pruned_module_is_what_the_onnx_path_makes() -> None:
    sites, made = _sites("sdpa", "module"), _pruned()
    feeds = [sites.bridge.feeds_of(batch) for batch in _data()]
    assembled = assemble(sites.graph, list(sites), Plan.parse(PRUNED), discover(), feeds)
    lowered = Interpreter(lower(sites.graph, list(assembled.sites.values())))
    for batch, feed in zip(_data()[:2], feeds, strict=False):
        (expected,) = lowered.run(feed).values()
        torch.testing.assert_close(made.module(batch), expected, rtol=1e-4, atol=1e-5)
    assert made.sites["layers.0.attention"].state.value == "lowerable"


def test_shapes_stay_dynamic_and_the_module_is_exported_and_recognised_again() -> None:
    made = _pruned().module
    for shape in ((1, 3), (5, 17)):
        assert made(torch.ones(*shape, WIDTH)).shape == (*shape, WIDTH)
    program = torch.export.export(made, (torch.ones(2, 7, WIDTH),), dynamic_shapes=({0: AUTO, 1: AUTO},))
    again = rewriter.sites(program)
    assert [(site.state.value) for site in again] == ["lowerable"] * 2
    assert again.recognition.attention[0].heads == 2
    assert again.recognition.feed_forward[0].width == 24


def test_it_learns_and_leaves_the_original_alone() -> None:
    module = built("sdpa")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    made = rewriter.apply(_sites("sdpa", "module"), PRUNED, _data()).module
    made.train()
    assert made.training
    optimiser = torch.optim.Adam(made.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = functional.mse_loss(made(_data()[1]), module(_data()[1]).detach())
        optimiser.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in made.named_parameters() if n != "key.bias"
        )
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert not made.eval().training
    host = dict(_sites("sdpa", "module").bridge.host.named_parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in host.items())


def test_a_traced_graph_keeps_its_modules_outside_the_regions() -> None:
    made = rewriter.apply(_sites("eager", "symbolic_trace"), {"layers.0.attention": passes.ExactCleanup.option()})
    calls = [str(node.target) for node in made.module.graph.nodes if node.op == "call_module"]
    assert calls == ["norm", "up", "down"]
    assert isinstance(made.module.get_submodule("up"), nn.Linear)


def test_shared_weights_are_changed_at_one_site_only() -> None:
    option = passes.HeadPruning.option(keep=3)
    made = rewriter.apply(_sites("shared", "exported"), {"layers.1.attention": option}, _data())
    shapes = {name: tuple(p.shape) for name, p in made.module.named_parameters()}
    assert shapes["query.weight"] == (WIDTH, WIDTH)
    assert shapes["rewritten.query.weight"] == (18, WIDTH)
    assert made.names["rewritten.query.weight"] == ("query.weight",)


def test_a_pass_of_ones_own() -> None:
    class Halved(passes.ExactCleanup):  # type: ignore[misc, name-defined]
        name = "halved"

    made = rewriter.apply(_sites("sdpa", "module"), [Halved.option("layers.0.attention")], passes=[Halved()])
    assert "layers.0.attention" in made.sites


def test_what_cannot_be_done_is_said() -> None:
    sites = _sites("sdpa", "module")
    with pytest.raises(OptionError, match=r"layers\.7"):
        rewriter.apply(sites, "exact_cleanup@layers.7.attention")
    with pytest.raises(DataError, match="calibrat"):
        rewriter.apply(sites, PRUNED)
    with pytest.raises(DataError, match="structure"):
        rewriter.apply(sites, PRUNED, [(torch.ones(1, 2, WIDTH), torch.ones(1))])
    with pytest.raises(OptionError, match="number formats"):
        rewriter.apply(sites, "precision{dtype=int8}@layers.0.attention", _data())


def test_a_hugging_face_model_with_keyword_inputs() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**exported.COMMON, num_labels=3, attn_implementation="sdpa")
    model = exported.randomise(transformers.BertForSequenceClassification(config)).eval()
    ids, mask = exported.tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, -2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    sites = rewriter.sites(model, kwargs=batch, dynamic_shapes={key: {0: AUTO, 1: AUTO} for key in batch})
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert sites.parameters(sites["layers.0.attention"])["query.weight"] == (name,)
    made = rewriter.apply(sites, {"layers.0.attention": passes.HeadPruning.option(keep=3)}, [batch] * 4)
    result = made.module(**batch)
    assert result.logits.shape == model(**batch).logits.shape
    assert made.module.get_parameter(name).shape == (18, 24)
    assert made.names[name] == (name,)
