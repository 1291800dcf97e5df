"""Metrics on outputs whose right values are known."""

import numpy as np
import pytest

from rewriter.accuracy.fidelity import per_sample
from rewriter.accuracy.metrics import Reference, choose_metric
from rewriter.accuracy.paired import join
from rewriter.accuracy.registry import METRICS
from rewriter.core.errors import DataError, OptionError


def vectors(n=80, width=128, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return {"embedding": rows / np.linalg.norm(rows, axis=1, keepdims=True)}


def logits(n=80, classes=5, seed=0):
    return {"logits": np.random.default_rng(seed).standard_normal((n, classes)).astype(np.float32) * 3}


LABELS = np.arange(80) % 5


@pytest.mark.parametrize("name", METRICS)
def test_a_model_compared_with_itself_loses_nothing(name):
    outputs = logits()
    metric = choose_metric(name, outputs, LABELS)
    paired = metric.paired(outputs, {key: value.copy() for key, value in outputs.items()}, LABELS)
    assert paired.losses == pytest.approx(np.zeros(80), abs=1e-9) and paired.drop == pytest.approx(0.0, abs=1e-9)
    assert paired.loss_range[1] == 1.0 and len(paired) == 80


@pytest.mark.parametrize("name", METRICS)
def test_more_noise_loses_more_within_the_range(name):
    outputs, rng = logits(200), np.random.default_rng(1)
    labels = outputs["logits"].argmax(1)
    metric = choose_metric(name, outputs, labels)
    noise = rng.standard_normal((200, 5))
    drops = [metric.paired(outputs, {"logits": outputs["logits"] + s * noise}, labels).drop for s in (0.1, 1.0, 10.0)]
    assert drops[0] <= drops[1] < drops[2] <= 1.0 and drops[0] < drops[2]


@pytest.mark.parametrize("name", METRICS)
def test_an_output_that_is_not_finite_is_the_worst(name):
    outputs = logits()
    broken = {"logits": outputs["logits"].copy()}
    broken["logits"][7] = np.nan
    labels = outputs["logits"].argmax(1)
    losses = choose_metric(name, outputs, labels).paired(outputs, broken, labels).losses
    assert losses[7] >= 0.5 and losses[np.arange(80) != 7] == pytest.approx(np.zeros(79), abs=1e-9)


def test_cosine_of_known_angles():
    original = {"embedding": np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])}
    new = {"embedding": np.array([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])}
    paired = choose_metric("cosine", original).paired(original, new)
    assert paired.new == pytest.approx([1.0, np.sqrt(0.5), 0.0]) and paired.baseline == 1.0


def test_divergence_of_known_distributions():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [1e-9, 1.0]])
    paired = choose_metric("kl", {"logits": np.log(p)}).paired({"logits": np.log(p) + 3.0}, {"logits": np.log(q)})
    assert paired.new == pytest.approx([0.5 * np.log(2.0) + 0.5 * np.log(2.0 / 3.0), 1.0])
    assert paired.losses == pytest.approx(paired.new)


def test_similarity_ignores_what_leaves_the_structure_alone():
    """Adding one vector to all embeddings moves cosines, but profiles only by a constant."""
    original = vectors(300)
    metric = choose_metric("similarity", original)
    scrambled = {"embedding": vectors(300, seed=5)["embedding"]}
    slightly = {"embedding": original["embedding"] + 0.01 * scrambled["embedding"]}
    assert metric.paired(original, slightly).drop < 1e-3
    assert metric.paired(original, scrambled).drop > 0.7


def test_nearest_neighbours_are_counted():
    original = vectors(40)
    metric = choose_metric("knn", original)
    assert metric.paired(original, {"embedding": -original["embedding"]}).best < 0.1
    assert metric.paired(original, {"embedding": 3.0 * original["embedding"]}).best == 1.0


def test_relative_error_is_over_all_outputs():
    original = {"a": np.array([[3.0, 0.0]]), "b": np.array([[0.0, 4.0]])}
    new = {"a": np.array([[3.0, 0.0]]), "b": np.array([[0.0, 3.0]])}
    assert choose_metric("relative_error", original).paired(original, new).new == pytest.approx([0.2])


def test_tokens_are_averaged_without_padding():
    rng = np.random.default_rng(0)
    original = {"logits": rng.standard_normal((6, 4, 9))}
    new = {"logits": original["logits"].copy()}
    new["logits"][:, 3] = rng.standard_normal((6, 9)) * 50
    mask = np.ones((6, 4), dtype=np.int64)
    mask[:, 3] = 0
    for name in ("kl", "agreement", "cosine", "relative_error"):
        metric = choose_metric(name, original)
        assert metric.paired(original, new, mask=mask).drop == pytest.approx(0.0, abs=1e-12)
        assert metric.paired(original, new).drop > 0.05
    assert per_sample(np.array([[1.0, 3.0], [5.0, 7.0]]), np.array([[1, 0], [0, 0]])).tolist() == [1.0, 0.0]


def test_accuracy_takes_columns_per_class_as_scores():
    outputs = logits()
    labels = outputs["logits"].argmax(1)
    labels[:8] = (labels[:8] + 1) % 5
    metric = choose_metric("accuracy", outputs, labels)
    paired = metric.paired(outputs, {"logits": np.roll(outputs["logits"], 1, axis=1)}, labels)
    assert metric.probe is None and paired.baseline == 0.9 and paired.best < 0.2 and paired.binary


def test_accuracy_believes_a_name_when_the_data_has_few_of_the_classes():
    rows = np.random.default_rng(0).standard_normal((80, 1000))
    assert choose_metric("accuracy", {"logits": rows}, LABELS).probe is None
    assert choose_metric("accuracy", {"pooled": rows}, LABELS).probe is not None


def test_accuracy_of_embeddings_is_that_of_a_probe():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 32))
    labels = np.arange(150) % 3
    outputs = {"embedding": centres[labels] + 0.3 * rng.standard_normal((150, 32))}
    some = np.where(np.arange(150) < 60, labels, -1)
    metric = choose_metric("accuracy", outputs, some)
    later = {"embedding": outputs["embedding"][60:]}
    assert metric.paired(later, later, labels[60:]).baseline > 0.95
    swapped = {"embedding": centres[(labels[60:] + 1) % 3]}
    assert metric.paired(later, swapped, labels[60:]).best < 0.05


def test_accuracy_needs_labels():
    with pytest.raises(OptionError, match="metric 'accuracy' needs labels"):
        choose_metric("accuracy", vectors(), np.full(80, -1))
    with pytest.raises(DataError, match="all of one class"):
        choose_metric("accuracy", vectors(), np.zeros(80, dtype=np.int64))
    metric = choose_metric("accuracy", logits(), LABELS)
    with pytest.raises(DataError, match="samples without labels"):
        metric.paired(logits(), logits(), np.full(80, -1))


def test_the_default_is_chosen_by_the_output_and_said():
    embedding = choose_metric(None, vectors())
    assert embedding.name == "cosine" and embedding.why == "chosen because output 'embedding' looks like vectors"
    assert choose_metric(None, logits()).name == "kl"
    tokens = {"lm_logits": np.zeros((4, 3, 5000), dtype=np.float32)}
    assert choose_metric(None, tokens).name == "kl"
    assert choose_metric(None, {"hidden": np.ones((4, 3, 64), dtype=np.float32)}).name == "cosine"
    assert choose_metric("knn", vectors()).why == "asked for"


def test_an_unknown_metric_is_answered_with_the_known():
    with pytest.raises(OptionError, match=r"unknown metric 'bleu'.*cosine, similarity, knn"):
        choose_metric("bleu", vectors())
    with pytest.raises(OptionError, match="no output has rows of floating-point numbers"):
        choose_metric(None, {"ids": np.zeros((3, 4), dtype=np.int64)})


def test_batches_score_like_the_whole():
    original, new = vectors(), vectors(seed=1)
    metric = METRICS["similarity"](Reference(original))
    cut = [[{"embedding": x["embedding"][i : i + 30]} for x in (original, new)] for i in (0, 30, 60)]
    joined = join([metric.paired(a, b) for a, b in cut])
    assert np.allclose(joined.losses, metric.paired(original, new).losses)
