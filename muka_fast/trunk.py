"""A teacher under Monte-Carlo dropout: what lies below the first active site (trunk) once, the tail K times."""

import logging
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from muka_fast.errors import NOT_FINITE, UserError
from muka_fast.layered import LayeredEncoder
from muka_fast.memory import replica_budget_bytes
from muka_fast.ops.mc_head import mc_head
from muka_fast.ops.mc_statistics import mc_statistics
from muka_fast.packed import Packed, Replicas, Texts
from muka_fast.placement import input_device, is_split
from muka_fast.pooled import head_input, output_layer, pool
from muka_fast.postln import PostLayerNormEncoder
from muka_fast.preln import PreLayerNormModel
from muka_fast.probe import agree, padded_inputs
from muka_fast.sites import Masks, Site, active_probabilities, list_sites, understood
from muka_fast.split import ModelSplit
from muka_fast.teachers import Teacher

log = logging.getLogger("muka_fast")
FAST_FORMS = (PostLayerNormEncoder, PreLayerNormModel)


@dataclass(frozen=True)
class TeacherScores:
    """What one teacher says about B texts, float32: statistics over its own C classes, entropies in nats, and what its
    output layer reads in the deterministic pass (D = 0 where the head has no such layer)."""

    logits: Tensor  # [B, C] deterministic
    mean_probs: Tensor  # [B, C]
    var_probs: Tensor  # [B, C]
    predictive_entropy: Tensor  # [B]
    expected_entropy: Tensor  # [B]
    features: Tensor  # [B, D]


@dataclass(frozen=True)
class Trunk:
    """Hidden states of a batch that enter layer `layer` (layer = depth: that leave the last layer).

    hidden: [B, L, D]; packed [T, D] where the teacher has a fast form, and there only the read tokens' rows [B, D] of the last
    layer; None: nothing is deterministic, layer 0 and the embeddings belong to the tail.
    """

    layer: int
    hidden: Tensor | None
    texts: Texts
    packed: Packed | None = None


class StochasticTeacher:
    """A teacher with its active dropout sites: `launch` gives statistics of K passes and deterministic logits.

    mc_scope: "all", "last:M" (the last M layers and the head) or "head".
    mc_dropout_p: p in (0, 1), as config.py bounds it, at every site of the scope, None = the model's own.
    mc_samples: K >= 1. mc=False: no sampling, the statistics are those of the deterministic pass (K = 1).
    Raises UserError for an unknown scope, a scope without sites, or one whose sites all have p = 0.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        mc_scope: str = "last:1",
        mc_dropout_p: float | None = None,
        mc_samples: int = 16,
        mc: bool = True,
    ):
        self.teacher, self.model, self.name = teacher, teacher.model, teacher.name
        self.mc, self.mc_samples = mc, mc_samples
        with understood(self.model, f"teacher {self.name}"):
            self.all_sites = list_sites(self.model, f"teacher {self.name}")
            self.encoder = ModelSplit(self.model)
            ids, mask = padded_inputs(self.model)
            self.output_layer, plain = output_layer(self.model, ids, mask)
            if not plain.isfinite().all():
                raise UserError(f"teacher {self.name}: its logits are not finite; {NOT_FINITE}")
            self.mc_scope = self._checked_scope(mc_scope, ids, mask, plain)
            self.p_of_site = active_probabilities(self.all_sites, self.mc_scope, mc_dropout_p, f"teacher {self.name}") if mc else {}
            self.layer = self._first_stochastic_layer()
            self.reads = self._probe_read_row(ids, mask)
            # The fast forms read weights that a split teacher's modules get only when they are called.
            self.fast = None if is_split(self.model) else self._find_fast_form(ids, mask, plain)
            self.fused_head = None if is_split(self.model) else self._find_fused_head(ids, mask)

    @property
    def sites(self) -> list[dict]:
        """Every site of the model with its p, and `active_p`, the probability in use (0 = off): for the manifest."""
        return [site.record(self.p_of_site.get(site.index, 0.0)) for site in self.all_sites]

    @property
    def one_at_a_time(self) -> bool:
        """Whether samples cannot share a forward: a masked value is shared by all its texts."""
        return any(site.kind == "shared" and site.index in self.p_of_site for site in self.all_sites)

    def launch(self, input_ids: Tensor, attention_mask: Tensor, example_ids: Tensor | np.ndarray) -> TeacherScores:
        """Score B texts: input_ids, attention_mask int64 [B, L], padded on the right, on the host; example_ids int64 [B].

        A text's scores depend on nothing but the text, its example id and the teacher (to float rounding). Nothing waits for the
        device, which may still be at work when this returns: whether the scores are numbers is for the caller to see.
        """
        return self.finish(self.trunk(self.texts(input_ids, attention_mask, example_ids)))

    def texts(self, input_ids: Tensor, attention_mask: Tensor, example_ids: Tensor | np.ndarray) -> Texts:
        """The batch on the teacher's device.

        Heads that read the last token mean the last one that is not the padding token, which a text itself may end with.
        Causal: what follows that token changes nothing before it.
        """
        pad = self.model.config.get_text_config().pad_token_id if self.reads == "last" else None
        return Texts.of(input_ids, attention_mask, example_ids, input_device(self.model), pad)

    @torch.inference_mode()
    def trunk(self, texts: Texts, start: Trunk | None = None, stop: int | None = None) -> Trunk:
        """The deterministic part, up to layer `stop` (None: this teacher's first stochastic one).

        start: the trunk of a lower layer, of this teacher or of one with the same weights below it.
        """
        stop = self.layer if stop is None else stop
        packed = None if start is None else start.packed
        if packed is None and self.fast is not None:
            packed = texts.packed(self.fast.reads_last)
        if stop == 0:
            return Trunk(0, None, texts, packed)
        if start is None or start.hidden is None:
            start = Trunk(0, None, texts)
        if start.layer == stop:
            return start
        below = {"start": start.layer, "hidden": start.hidden, "stop": stop}
        if self.fast is not None:
            return Trunk(stop, self.fast.trunk(texts.input_ids, packed, **below), texts, packed)
        return Trunk(stop, self.encoder.run(texts.input_ids, texts.attention_mask, **below), texts)

    def finish(self, trunk: Trunk) -> TeacherScores:
        """The stochastic part on top of this teacher's trunk."""
        with torch.inference_mode():
            scores = self._finish(trunk)
        # Out of inference mode: such tensors could not be used where gradients are recorded.
        return TeacherScores(**{name: value.float().clone() for name, value in vars(scores).items()})

    def _finish(self, trunk: Trunk) -> TeacherScores:
        if self.mc and self.fused_head is not None:
            return self._fused_scores(trunk)
        count = self.mc_samples if self.mc else 0
        logits, features = self.passes(trunk, 0, count, plain=True)
        return scores_of_passes(logits[0], logits[1:] if self.mc else logits, features)

    def passes(self, trunk: Trunk, first: int, count: int, plain: bool = False) -> tuple[Tensor, Tensor | None]:
        """`sample_logits` [R, B, C] on this teacher's trunk, as many passes at once as the memory budget holds; with `plain` also
        what the output layer reads in the deterministic pass [B, D] (D = 0 where the head ends otherwise)."""
        ids, mask = trunk.texts.input_ids, trunk.texts.attention_mask
        chunk = min(count, self._samples_at_once(*ids.shape)) if count else 0
        with head_input(self.output_layer.layer if plain and self.output_layer else None) as seen:  # the plain replica comes first
            logits = [self.sample_logits(trunk, first, chunk, plain)]
        for start in range(first + chunk, first + count, chunk or 1):
            logits.append(self.sample_logits(trunk, start, min(chunk, first + count - start)))
        features = None
        if plain:
            features = pool(seen[0], mask, self.output_layer.reads) if seen else logits[0].new_empty(len(ids), 0)
        return torch.cat(logits), features

    @torch.inference_mode()
    def sample_logits(self, trunk: Trunk, first_sample: int, count: int, plain: bool = False) -> Tensor:
        """Logits [R, B, C] of `count` stochastic passes from sample `first_sample` on; plain: the deterministic pass before them.

        Samples may come in any number of calls.
        """
        if count > 1 and self.one_at_a_time:
            parts = [self.sample_logits(trunk, first_sample + k, 1, plain and k == 0) for k in range(count)]
            return torch.cat(parts)
        masks, texts = None, trunk.texts
        if count:
            masks = Masks(self.model, self.all_sites, self.p_of_site, self.teacher.seed, texts.ids, count, first_sample)
        if trunk.packed is not None and trunk.layer < self.encoder.depth:
            rows = self._fast_rows(trunk, first_sample, count, plain)
            hidden, stochastic = rows[:1] if plain else None, rows[int(plain) :]
            layer, inputs = self.encoder.depth, self._read_token(texts)
        else:
            layer, hidden, inputs = trunk.layer, trunk.hidden, (texts.input_ids, texts.attention_mask)
            if layer == self.encoder.depth and hidden is not None:
                hidden, *inputs = self._read_row(trunk)
            hidden = None if hidden is None else hidden[None]
            stochastic = None if hidden is None else hidden.expand(count, *hidden.shape[1:])
        out = [self._logits_from(layer, hidden, *inputs, 1)] if plain else []
        if count:
            out.append(self._logits_from(layer, stochastic, *inputs, count, masks))
        return torch.cat(out)

    def _fast_rows(self, trunk: Trunk, first_sample: int, count: int, plain: bool) -> Tensor:
        """The read tokens' last rows [R, B, 1, D]; as many texts at a time as fit, since what replicas share is per text."""
        packed, x, rows = trunk.packed, trunk.hidden, []
        if x is None:
            x = self.fast.embed(trunk.texts.input_ids, packed)
        replica_bytes = self._replica_bytes(packed.longest) * (count + int(plain))
        for tokens, part in packed.parts(max(1, self._budget() // replica_bytes)):
            replicas = Replicas(part, self.p_of_site, self.teacher.seed, count, first_sample, plain)
            hidden = x[tokens] if trunk.hidden is not None else self.fast.enter(x[tokens], replicas)
            rows.append(self.fast.tail(hidden, trunk.layer, replicas))
        return packed.unsort(torch.cat(rows, 1), 1)[:, :, None]

    def _logits_from(
        self, layer: int, hidden: Tensor | None, ids: Tensor, mask: Tensor, replicas: int, masks: Masks | None = None
    ) -> Tensor:
        """Logits [R, B, C] from the hidden states [R, B, L, D] that enter `layer` of R replicas of ids, mask [B, L]."""
        hidden = None if hidden is None else hidden.flatten(0, 1)
        out = self.encoder.run(ids.repeat(replicas, 1), mask.repeat(replicas, 1), start=layer, hidden=hidden, masks=masks)
        return out.float().view(replicas, len(ids), -1)

    def _fused_scores(self, trunk: Trunk) -> TeacherScores:
        """The scores of a tail that is `linear(dropout(features))`."""
        site, linear = self.fused_head
        hidden, *inputs = self._read_row(trunk)
        features, _ = self.encoder.site_input(*inputs, site, start=self.encoder.depth, hidden=hidden)
        p, seed, ids = self.p_of_site[site.index], self.teacher.seed, trunk.texts.ids
        head = mc_head(features, linear.weight, linear.bias, self.mc_samples, p, seed, site.index, ids)
        statistics = {field.name: getattr(head, field.name) for field in fields(TeacherScores)[:-1]}
        return TeacherScores(**statistics, features=features)

    def _samples_at_once(self, num_texts: int, num_tokens: int) -> int:
        """How many replicas of a batch (fast form: of one text, since it cuts the batch) fit into the memory budget."""
        texts = 1 if self.fast is not None else num_texts
        return max(1, min(self.mc_samples, self._budget() // (texts * self._replica_bytes(num_tokens)) - 1))

    def _replica_bytes(self, num_tokens: int) -> int:
        """Activations of one replica of one text, roughly."""
        config = self.model.config.get_text_config()
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * width
        heads = getattr(config, "num_attention_heads", 1)
        one_row = self.fast is not None and self.layer >= self.encoder.depth - 1
        rows = 1 if one_row else num_tokens
        return rows * (10 * width + 3 * inner + 3 * heads * num_tokens) * self.model.dtype.itemsize

    def _budget(self) -> int:
        return replica_budget_bytes(input_device(self.model))

    # Set-up: run once, at construction.

    def _checked_scope(self, scope: str, ids: Tensor, mask: Tensor, plain: Tensor) -> str:
        """Verify that our attention and the split compute what the model does; without a split only `all` is left."""
        architecture = type(self.model).__name__
        if not self._agree(self.encoder.run_eagerly(ids, mask), plain):
            raise UserError(f"teacher {self.name}: the attention of {architecture} is not one this version can mask")
        if self.encoder.depth and not self._splits_right(ids, mask, plain):
            self.encoder.leave_whole()
        if scope == "all" or not self.mc or self.encoder.depth:
            return scope
        told = "teacher %s: %s cannot be split into layers; --mc_scope %s is not available for it, all is used"
        log.warning(told, self.name, architecture, scope)
        return "all"

    def _splits_right(self, ids: Tensor, mask: Tensor, plain: Tensor) -> bool:
        """Cut at the first layer, at the last one and behind it, one cut after the other."""
        start, hidden = 0, None
        try:
            for layer in sorted({1, self.encoder.depth - 1, self.encoder.depth}):
                start, hidden = layer, self.encoder.run(ids, mask, start=start, hidden=hidden, stop=layer)
            return self._agree(self.encoder.run(ids, mask, start=start, hidden=hidden), plain)
        except Exception as error:  # whatever a layer does without those below it: T5's needs the position bias of the first
            log.debug("teacher %s: cannot be cut (%s)", self.name, error)
            return False

    def _first_stochastic_layer(self) -> int:
        """Where the trunk ends: 0 = there is none, depth = after the last layer."""
        layers = [site.layer for site in self.all_sites if site.index in self.p_of_site]
        if None in layers or self.encoder.depth == 0:
            return 0
        return min((layer for layer in layers if isinstance(layer, int)), default=self.encoder.depth)

    @torch.inference_mode()
    def _probe_read_row(self, ids: Tensor, mask: Tensor) -> str | None:
        """Which token's row of the last layer the head reads: "first", "last" (unpadded) or None for more than one.

        Found by disturbing all the other rows: the logits must not move.
        """
        if self.encoder.depth == 0:
            return None
        hidden = self.encoder.run(ids, mask, stop=self.encoder.depth)
        plain = self.encoder.run(ids, mask, start=self.encoder.depth, hidden=hidden)
        last = mask.sum(1) - 1
        for name, row in (("first", torch.zeros_like(last)), ("last", last)):
            keep = torch.arange(ids.shape[1], device=ids.device) == row[:, None]
            disturbed = torch.where(keep[..., None], hidden, hidden.flip(-1) * 3 + 1)
            if self._agree(self.encoder.run(ids, mask, start=self.encoder.depth, hidden=disturbed), plain):
                return name
        return None

    def _read_row(self, trunk: Trunk) -> tuple[Tensor, Tensor, Tensor]:
        """Only the row that the head reads, as a sequence of one token: [B, L, ...] -> [B, 1, ...]."""
        texts, mask = trunk.texts, trunk.texts.attention_mask
        if trunk.packed is not None:
            return trunk.packed.unsort(trunk.hidden, 0)[:, None], *self._read_token(texts)
        if not self._can_cut():
            return trunk.hidden, texts.input_ids, mask
        row = mask.sum(1) - 1 if self.reads == "last" else torch.zeros_like(mask[:, 0])
        pick = trunk.hidden[torch.arange(len(row), device=row.device), row]
        return pick[:, None], *self._read_token(texts)

    def _read_token(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, 1] of the token whose row the head reads."""
        ids, mask = texts.input_ids, texts.attention_mask
        if self.reads == "last":
            row = mask.sum(1, keepdim=True) - 1
            return ids.gather(1, row), mask.gather(1, row)
        return ids[:, :1], mask[:, :1]

    def _can_cut(self) -> bool:
        """Whether the head may be given one row: the elements of a mask over tokens would change with their positions."""
        return self.reads is not None and all(site.per_text for site in self.all_sites if site.layer == "head")

    @torch.inference_mode()
    def _find_fast_form(self, ids: Tensor, mask: Tensor, plain: Tensor) -> LayeredEncoder | None:
        """The layer-by-layer form, where the architecture has one and it computes what the model computes."""
        forms = [form.of(self.model, self.all_sites, self.reads == "last") for form in FAST_FORMS] if self._can_cut() else []
        texts = self.texts(ids, mask, np.arange(len(ids)))
        for fast in filter(None, forms):
            packed = texts.packed(fast.reads_last)
            rows = packed.unsort(fast.trunk(ids, packed, self.encoder.depth), 0)
            logits = self._logits_from(self.encoder.depth, rows[None, :, None], *self._read_token(texts), 1)[0]
            if self._agree(logits, plain):
                return fast
            log.warning("teacher %s: its fast form differs from the model and is not used", self.name)
        return None

    def _agree(self, a: Tensor, b: Tensor) -> bool:
        return agree(a, b, self.model.dtype)

    @torch.inference_mode()
    def _find_fused_head(self, ids: Tensor, mask: Tensor) -> tuple[Site, nn.Linear] | None:
        """The site and the layer of a tail that is exactly `linear(dropout(features))`; None for any other tail."""
        active = [site for site in self.all_sites if site.index in self.p_of_site]
        if len(active) != 1 or active[0].layer != "head" or not active[0].per_text or self.encoder.depth == 0:
            return None
        features, logits = self.encoder.site_input(ids, mask, active[0])
        layer = self.output_layer and self.output_layer.layer
        fits = layer is not None and tuple(layer.weight.shape) == (logits.shape[1], features.shape[1])
        return (active[0], layer) if fits and self._agree(layer(features), logits) else None


def scores_of_passes(logits: Tensor, samples: Tensor, features: Tensor) -> TeacherScores:
    """Statistics of stochastic logits [K, B, C] beside the deterministic ones [B, C]."""
    statistics = mc_statistics(samples, [0, logits.shape[1]])
    entropies = statistics.predictive_entropy[:, 0], statistics.expected_entropy[:, 0]
    return TeacherScores(logits, statistics.mean_probs, statistics.var_probs, *entropies, features)
