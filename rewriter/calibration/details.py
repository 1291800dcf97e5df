"""Statistics of one attention that only some passes ask for: each is a sum over batches of bounded size."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewriter.calibration.statistics import HeadGramAccumulator, centred
from rewriter.core.site import AttentionSite
from rewriter.core.statistics import SINKS, Array64, Detail

MIXED_TOKENS = 4096  # the Grams of every head's mixture of all values are costly: this many queries are enough for them


@dataclass(frozen=True, eq=False)
class Inner:
    """The operands of an attention on one batch, heads apart, and which tokens count."""

    query_BSHD: Tensor
    key_BTGD: Tensor
    value_BTGD: Tensor
    bias: Tensor | None
    queries_BS: Tensor
    keys_BT: Tensor


class Details:
    """Takes batches, gives the wanted fields of `AttentionStatistics`."""

    def __init__(self, site: AttentionSite, wanted: Collection[Detail]) -> None:
        self.site, self.wanted = site, frozenset(wanted)
        self._queries, self._keys, self._joint = (HeadGramAccumulator() for _ in range(3))
        self._products = torch.zeros(site.heads, site.qk_dim, site.qk_dim, dtype=torch.float64)
        values = site.value.heads * site.v_dim
        self._mixed = torch.zeros(site.heads, values, values, dtype=torch.float64) if "mixed" in wanted else None
        self._mixed_tokens = 0
        self._mass = torch.zeros(site.heads, 0, dtype=torch.float64)
        self._mass_tokens = 0

    def add(self, inner: Inner) -> None:
        """One more batch."""
        key = centred(inner.key_BTGD, inner.keys_BT)
        if "heads" in self.wanted:
            self._queries.add(inner.query_BSHD[inner.queries_BS])
            self._keys.add(key[inner.keys_BT])
        if "joint_keys" in self.wanted:
            self._joint.add(key[inner.keys_BT].flatten(1)[:, None])
        if "products" in self.wanted:
            self._add_products(inner, key)
        if self.wanted & {"mixed", "distance"}:
            for sequence in range(inner.query_BSHD.shape[0]):
                self._add_probabilities(inner, sequence)

    def fields(self) -> dict[str, Array64]:
        """The fields by name; query and key Grams have no entries where they were not wanted."""
        heads, groups = self.site.heads, self.site.key.heads
        found: dict[str, Array64] = {
            "query_HDD": self._queries.result() if "heads" in self.wanted else np.zeros((heads, 0, 0)),
            "key_GDD": self._keys.result() if "heads" in self.wanted else np.zeros((groups, 0, 0)),
        }
        if "joint_keys" in self.wanted:
            found["joint_key"] = self._joint.result()[0]
        if "products" in self.wanted:
            found["products_HDD"] = self._products.numpy()
        if self._mixed is not None:
            found["mixed_HKK"] = self._mixed.numpy()
        if "distance" in self.wanted:
            found["distance_HT"] = (self._mass / max(self._mass_tokens, 1)).numpy()
        return found

    def _add_products(self, inner: Inner, key_BTGD: Tensor) -> None:
        """Per sequence, because a query meets the keys of its own sequence only."""
        query = inner.query_BSHD * inner.queries_BS[:, :, None, None]
        key = key_BTGD * inner.keys_BT[:, :, None, None]
        gram_q = torch.einsum("bshd,bshe->bhde", query, query).double()
        gram_k = torch.einsum("btgd,btge->bgde", key, key).double()[:, list(self.site.key.head_of)]
        self._products += (gram_q * gram_k).sum(dim=0)

    def _add_probabilities(self, inner: Inner, sequence: int) -> None:
        picked = inner.queries_BS[sequence]
        if not bool(picked.any()):
            return
        weights_HST = probabilities(self.site, inner, sequence)[:, picked]
        if "distance" in self.wanted:
            self._add_mass(weights_HST, torch.nonzero(picked)[:, 0])
        if self._mixed is not None and self._mixed_tokens < MIXED_TOKENS:
            mixed_HSK = weights_HST @ inner.value_BTGD[sequence].flatten(1)
            self._mixed += (mixed_HSK.transpose(1, 2) @ mixed_HSK).double()
            self._mixed_tokens += int(picked.sum())

    def _add_mass(self, weights_HST: Tensor, positions_S: Tensor) -> None:
        heads, _, tokens = weights_HST.shape
        if self._mass.shape[1] < tokens:
            self._mass = torch.nn.functional.pad(self._mass, (0, tokens - self._mass.shape[1]))
        apart_ST = (positions_S[:, None] - torch.arange(tokens)[None]).abs()
        beyond = weights_HST[:, :, SINKS:].double().reshape(heads, -1)
        self._mass.scatter_add_(1, apart_ST[:, SINKS:].reshape(1, -1).expand(heads, -1), beyond)
        self._mass_tokens += len(positions_S)


def probabilities(site: AttentionSite, inner: Inner, sequence: int) -> Tensor:
    """The attention of one sequence, (H, S, T)."""
    query_HSD = inner.query_BSHD[sequence].transpose(0, 1)
    key_HTD = inner.key_BTGD[sequence].transpose(0, 1)[list(site.key.head_of)]
    logits = query_HSD @ key_HTD.transpose(1, 2) * site.scale
    if site.softcap:
        logits = site.softcap * torch.tanh(logits / site.softcap)
    if inner.bias is not None:
        wide = inner.bias.reshape((1,) * (4 - inner.bias.ndim) + tuple(inner.bias.shape))
        own = wide[sequence if wide.shape[0] > 1 else 0]
        logits = logits.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else logits + own.to(logits.dtype)
    if site.sink_H is None:
        return torch.nan_to_num(torch.softmax(logits, dim=-1))
    sink_HS1 = torch.from_numpy(site.sink_H).to(logits.dtype)[:, None, None].expand(*logits.shape[:2], 1)
    return torch.softmax(torch.cat([logits, sink_HS1], dim=-1), dim=-1)[..., :-1]
