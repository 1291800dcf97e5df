"""A smaller key/value cache: fewer heads, fewer dims per head, or one latent for all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from rewriter.core.basis import apart, recombined
from rewriter.core.cache_forms import parts_of, with_key_parts, with_value_latent
from rewriter.core.cached_keys import KeyParts, split_of
from rewriter.core.errors import OptionError
from rewriter.core.head_merging import merged, merging_refusal, pair_errors, too_large, turn_of
from rewriter.core.memo import IdentityMemo
from rewriter.core.merging import equal_groups
from rewriter.core.option import Option, Value
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import (
    Pass,
    attention_input,
    attention_refusal,
    out_of_range,
    with_output_weights,
)
from rewriter.core.site import Array, AttentionSite, Projection, Site
from rewriter.core.statistics import Array64, AttentionStatistics, Detail, Statistics
from rewriter.core.target import Target
from rewriter.core.value_bases import ValueBases, value_bases

_LATENT_SHARES = (3, 2, 1)  # quarters of what all heads cache together


@dataclass(frozen=True, eq=False)
class _Facts:
    """What one site and its statistics give for all levels, found as it is asked for."""

    keys: dict[bool, list[KeyParts]] = field(default_factory=dict)
    values: list[ValueBases] = field(default_factory=list)
    pairs: list[Array64] = field(default_factory=list)


@dataclass(frozen=True)
class LowRankCache(Pass):
    """Cache less per token: the keys and values of a decoder in fewer heads, fewer dims, or a latent of low rank.

    What it does
        ``heads``: key/value heads are merged as by kv_merge. ``key``, ``value``: every cached head keeps that many
        dims, the best for what queries make of keys and the output projection of values. ``key_latent``,
        ``value_latent``: one latent of that many numbers stands for all heads; what makes keys or values of it is
        absorbed into the query and the output projection, so attention runs on the latent itself. Under a rotary
        embedding keys are cached rotated, and parts of keys are whole frequency pairs: within a head they stay or
        leave, across heads those of one frequency are mixed by complex numbers, which commute with the rotation.
        Keys are centred per sequence first, because softmax ignores what is equal for all keys.
    When it applies
        A cache of its own layer (B, heads, T, dim) goes in or out of the model as it is, ``--allow-cache-change`` was
        given, and the operand is a bare projection, but for a rotation of keys like that of queries. Not for caches of
        fixed length, quantised or cut ones, those of another length or source (cross-attention), soft-caps or sinks.
    Exact or calibrated
        Calibrated; exact at full size, or where what is left out was never used.
    What it costs
        Milliseconds per layer for ``key`` and ``value``; seconds for merged heads and latents of values.
        Latents make queries and results as wide as the latent: they pay where reading the cache is what takes time.
    Before and after
        8 heads x 64 -> ``low_rank_cache{key=32,value=32}``: caches (B, 8, T, 32), half the bytes per token.
    Source
        Latents with absorbed projections: DeepSeek-AI 2024; whitened by data as in Palu (Chang et al. 2024), where the
        maps stay apart; here with components per frequency across heads, so rotary keys need no second cache.
    """

    allowed: bool = False

    name: ClassVar[str] = "low_rank_cache"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 35
    requires: ClassVar[frozenset[Detail]] = frozenset({"heads", "joint_keys", "mixed"})
    combines: ClassVar[bool] = False
    changes_cache: ClassVar[bool] = True

    _memo: ClassVar[IdentityMemo[_Facts]] = IdentityMemo()

    def permitted(self) -> LowRankCache:
        """See `Pass.permitted`."""
        return replace(self, allowed=True)

    def needs(self, option: Option) -> frozenset[Detail]:
        """See `Pass.needs`: what all values make together is only collected for merged heads and latents."""
        asked = {key for key, _ in option.parameters}
        found: set[Detail] = set()
        if asked & {"heads", "key", "key_latent"}:
            found |= {"heads"}
        if asked & {"heads", "key_latent"}:
            found |= {"joint_keys"}
        if asked & {"heads", "value_latent"}:
            found |= {"mixed"}
        return frozenset(found)

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`."""
        refusal = attention_refusal(site, cached=True)
        if refusal is not None or not isinstance(site, AttentionSite):
            return refusal
        if not site.cached:
            return Refusal("no-cache", "no key/value cache is part of the model's inputs or outputs here")
        if site.cross:
            return Refusal("cross-cache", "it attends to another sequence, whose keys and values are computed once")
        problem = next((one for one in site.problems if one.code.startswith("cache-")), None)
        if problem is not None:
            return problem
        if site.key.places or site.value.places:
            return Refusal("shared-buffer", "tokens are written to places of a cache of fixed length")
        if not self.allowed:
            why = "the sizes of the cache are part of the model's signature: --allow-cache-change permits new ones"
            return Refusal("cache-change-not-allowed", why)
        return _key_refusal(site) if _value_refusal(site) else None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """Halves of the heads, ranks in steps of 8 (of the vector width in large heads), latents in quarters."""
        if self.refuse(site) is not None or not isinstance(site, AttentionSite):
            return ()
        offered = [
            *([] if merging_refusal(site) or _key_refusal(site) else _merges(site)),
            *_ranks(site, target),
            *_latents(site),
        ]
        made = [Option.of(self.name, site.id, **one) for one in offered]
        return tuple(sorted(made, key=lambda one: -_numbers(site, dict(one.parameters))))

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        _check(own, option)
        if "heads" in dict(option.parameters):
            return self._merged(own, facts, option)
        changed = self._with_values(own, facts, option)
        return self._with_keys(own, changed, facts, option)

    def feature_map(self, site: Site, option: Option, statistics: Statistics) -> Array | None:
        """See `Pass.feature_map`: block-diagonal where only dims of values leave."""
        own, facts = attention_input(self.refuse(site), site, option, statistics)
        if {key for key, _ in option.parameters} != {"value"}:
            return None
        return self._bases(own, facts).blocks(own, option.integer("value"))

    def _merged(self, site: AttentionSite, facts: AttentionStatistics, option: Option) -> AttentionSite:
        count = option.integer("heads")
        if count == site.key.heads:
            return site
        if facts.joint_key is None or facts.mixed_HKK is None:
            raise _unknown(option)
        known = self._memo.get((site, facts), _Facts)
        if not known.pairs:
            known.pairs.append(pair_errors(site, facts))
        return merged(site, facts, equal_groups(known.pairs[0], count))

    def _with_values(self, site: AttentionSite, facts: AttentionStatistics, option: Option) -> AttentionSite:
        asked = dict(option.parameters)
        if "value" in asked:
            bases, rank = self._bases(site, facts), option.integer("value")
            value = recombined(site.value, apart(bases.map_GDD[:, :, :rank]), site.value.head_of)
            found = with_output_weights(replace(site, value=value), bases.refit(site, facts, rank))
            assert isinstance(found, AttentionSite)
            return found
        if "value_latent" in asked:
            if facts.mixed_HKK is None:
                raise _unknown(option)
            return with_value_latent(site, facts.mixed_HKK, option.integer("value_latent"))
        return site

    def _with_keys(
        self, site: AttentionSite, changed: AttentionSite, facts: AttentionStatistics, option: Option
    ) -> AttentionSite:
        asked = dict(option.parameters)
        if not {"key", "key_latent"} & set(asked):
            return changed
        shared = "key_latent" in asked
        rank = option.integer("key_latent" if shared else "key")
        if shared and facts.joint_key is None:
            raise _unknown(option)
        known = self._memo.get((site, facts), _Facts)
        parts = known.keys.setdefault(shared, []) or known.keys[shared]
        if not parts:
            parts += parts_of(site, facts, shared)
        split = split_of(parts, rank)
        if split is None:
            raise OptionError(f"{option} is no sum of whole frequency pairs", "Choose an even rank of two or more")
        query, key = with_key_parts(site, parts, split, shared)
        return replace(changed, query=query, key=key)

    def _bases(self, site: AttentionSite, facts: AttentionStatistics) -> ValueBases:
        known = self._memo.get((site, facts), _Facts)
        if not known.values:
            known.values.append(value_bases(site, facts))
        return known.values[0]


def _key_refusal(site: AttentionSite) -> Refusal | None:
    """Why keys must stay as they are."""
    for operand, name in ((site.query, "queries"), (site.key, "keys")):
        if operand.norm is not None:
            return Refusal("head-norm", f"{name} pass a norm per head, which a change of basis would alter")
    if turn_of(site.query) != turn_of(site.key):
        return Refusal("rotated-apart", "queries and keys are rotated in different ways, so pairs do not match")
    if site.softcap:
        return Refusal("soft-cap", "a soft-cap on the scores sees what softmax ignores, such as the mean key")
    if site.sink_H is not None or site.bias.kept[1]:
        return Refusal("sink", "scores that do not move with the keys see what softmax ignores elsewhere")
    if site.query.heads != site.heads or sorted(site.query.head_of) != list(range(site.heads)):
        return Refusal("shared-query-heads", "query heads are shared, so they cannot follow their keys")
    if not (site.key.past or site.key.present):
        return Refusal("no-cache", "the keys are not cached")
    return None


def _value_refusal(site: AttentionSite) -> Refusal | None:
    """Why values must stay as they are."""
    if site.value.norm is not None or site.value.rotary is not None:
        return Refusal("value-not-plain", "values pass a norm or a rotation after their projection")
    if not (site.value.past or site.value.present):
        return Refusal("no-cache", "the values are not cached")
    return None


def _merges(site: AttentionSite) -> list[dict[str, Value]]:
    count = site.key.heads
    return [{"heads": groups} for groups in range(count // 2, 0, -1) if count % groups == 0]


def _ranks(site: AttentionSite, target: Target) -> list[dict[str, Value]]:
    keys, values = _key_refusal(site) is None, _value_refusal(site) is None
    found: list[dict[str, Value]] = []
    for operand, wanted in (("key", keys), ("value", values)):
        dim = site.qk_dim if operand == "key" else site.v_dim
        step = 8 if dim <= 64 else max(8, target.vector_floats)
        levels = range((dim - 1) // step * step, 1, -step) if wanted else ()
        found += [{operand: rank} for rank in levels]
        if operand == "key" and values and site.qk_dim == site.v_dim:
            found += [{"key": rank, "value": rank} for rank in levels]
    return found


def _latents(site: AttentionSite) -> list[dict[str, Value]]:
    """Of keys and values at once, or of those that can be changed."""
    widths = {}
    if _key_refusal(site) is None and site.key.heads > 1 and _one_table(site.key):
        widths["key_latent"] = site.key.heads * site.qk_dim
    if _value_refusal(site) is None and site.value.heads > 1 and too_large(site) is None:
        widths["value_latent"] = site.value.heads * site.v_dim
    shares = [{name: max(width * share // 32 * 8, 2) for name, width in widths.items()} for share in _LATENT_SHARES]
    fitting = [one for one in shares if one and all(size < widths[name] for name, size in one.items())]
    return [dict(one) for index, one in enumerate(fitting) if one not in fitting[:index]]


def _numbers(site: AttentionSite, asked: Mapping[str, Value]) -> int:
    """How many numbers are cached per token."""
    sizes = []
    for operand, name in ((site.key, "key"), (site.value, "value")):
        heads = int(asked.get("heads", operand.heads))
        sizes.append(int(asked.get(f"{name}_latent", heads * int(asked.get(name, operand.dim)))))
    return sum(sizes)


def _check(site: AttentionSite, option: Option) -> None:
    """Raises `OptionError` for sizes the site does not have."""
    asked = {key for key, _ in option.parameters}
    limits = {
        "heads": site.key.heads,
        "key": site.qk_dim,
        "value": site.v_dim,
        "key_latent": site.key.heads * site.qk_dim,
        "value_latent": site.value.heads * site.v_dim,
    }
    clashing = (
        (len(asked) > 1 and "heads" in asked) or {"key", "key_latent"} <= asked or {"value", "value_latent"} <= asked
    )
    if not asked or asked - set(limits) or clashing:
        raise OptionError(
            f"{option} names no way to make a cache smaller", "Give heads, or key, value and their latents"
        )
    for name in sorted(asked):
        if not 1 <= option.integer(name) <= limits[name]:
            raise out_of_range(option, name, 1, limits[name])
    refusal = None
    if asked & {"key", "key_latent", "heads"}:
        refusal = _key_refusal(site)
    if asked & {"value", "value_latent", "heads"}:
        refusal = refusal or _value_refusal(site)
    if "heads" in asked and option.integer("heads") < site.key.heads:
        refusal = refusal or merging_refusal(site)
        if site.key.heads % option.integer("heads"):
            raise out_of_range(option, "heads", 1, site.key.heads)
    if "value_latent" in asked:
        refusal = refusal or too_large(site)
    if "key_latent" in asked and not _one_table(site.key):
        refusal = refusal or Refusal("pairs-dropped", "heads have kept different frequencies, which cannot be added")
    if refusal is not None:
        raise OptionError(f"{option} does not apply: {refusal.why}", "Leave the option out of the plan")


def _unknown(option: Option) -> OptionError:
    return OptionError(f"{option} needs statistics of all heads together", "Give calibration data with --data")


def _one_table(operand: Projection) -> bool:
    return operand.rotary is None or len(set(operand.rotary.keep)) <= 1
