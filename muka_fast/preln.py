"""Pre-LN models with rotary positions layer by layer: ModernBERT, Llama, Mistral, Qwen2 and Qwen3."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from muka_fast.intercept import layer_modules
from muka_fast.layered import Bias, LayeredEncoder, sited_layers
from muka_fast.packed import Packed, Replicas, text_attention
from muka_fast.sites import Site


@dataclass(frozen=True)
class PreLayer:
    """y + ffn(norm2(y)) with y = output(attention(norm1(x))) + x; a site index or None where something drops.

    project: (rows that ask, all rows) -> query, key, value before rotation. ffn_in: up to its dropout, ffn_out: from there on.
    """

    norm1: nn.Module
    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    output: nn.Module
    norm2: nn.Module
    ffn_in: Callable[[Tensor], Tensor]
    ffn_out: nn.Module
    attention_site: int
    output_site: int | None
    ffn_site: int | None


def _modernbert_layer(layer: nn.Module) -> tuple[tuple, tuple[str, ...]]:
    qkv, mlp = layer.attn.Wqkv, layer.mlp

    def project(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if rows is x:
            return qkv(x).chunk(3, -1)
        width = qkv.out_features // 3
        bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width:])
        query = nn.functional.linear(rows, qkv.weight[:width], bias[0])
        return query, *nn.functional.linear(x, qkv.weight[width:], bias[1]).chunk(2, -1)

    def ffn_in(y: Tensor) -> Tensor:
        value, gate = mlp.Wi(y).chunk(2, -1)
        return mlp.act(value) * gate

    parts = (layer.attn_norm, project, layer.attn.Wo, layer.mlp_norm, ffn_in, mlp.Wo)
    return parts, ("attn", "attn.out_drop", "mlp.drop")


def _decoder_layer(layer: nn.Module) -> tuple[tuple, tuple[str, ...]]:
    own, mlp = layer.self_attn, layer.mlp

    def normed(x: Tensor, norm: nn.Module | None) -> Tensor:  # Qwen3 normalises each head
        return x if norm is None else norm(x.unflatten(-1, (-1, own.head_dim))).flatten(-2)

    def project(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = own.q_proj(rows), own.k_proj(x)
        return normed(query, getattr(own, "q_norm", None)), normed(key, getattr(own, "k_norm", None)), own.v_proj(x)

    def ffn_in(y: Tensor) -> Tensor:
        return mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y)

    parts = (layer.input_layernorm, project, own.o_proj, layer.post_attention_layernorm, ffn_in, mlp.down_proj)
    return parts, ("self_attn", "", "")


# model_type -> parts of a layer in the order of PreLayer, and the paths of its three sites inside it ("" = no such site)
LAYERS = {"modernbert": _modernbert_layer, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _decoder_layer)}
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary tables that depend on the longest text of a batch


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[(R,) rows, H * d] by the angles of its rows [rows, d], in float32."""
    heads = x.unflatten(-1, (-1, cos.shape[-1])).float()
    left, right = heads.chunk(2, -1)
    return (heads * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]).flatten(-2).to(x.dtype)


class PreLayerNormModel(LayeredEncoder):
    """LayeredEncoder of the families in LAYERS."""

    layers: list[PreLayer]

    @classmethod
    def of(cls, model: PreTrainedModel, sites: list[Site], reads_last: bool) -> "PreLayerNormModel | None":
        """None for an architecture or a configuration that this file does not cover."""
        config, parts_of, modules = model.config, LAYERS.get(model.config.model_type), layer_modules(model)
        if parts_of is None or modules is None or any(name in str(config.rope_parameters) for name in LENGTH_DEPENDENT):
            return None
        if config.model_type == "modernbert" and not all(isinstance(m.attn.Wqkv, nn.Linear) for m in modules):
            return None
        layers, embeddings = sited_layers(model, modules, parts_of, sites, PreLayer), [s.index for s in sites if s.layer is None]
        if layers is None or len(embeddings) > 1:
            return None
        return cls(model, layers, embeddings[0] if embeddings else None, reads_last)

    def embeddings(self, input_ids: Tensor) -> Tensor:
        if self.config.model_type == "modernbert":
            return self.base.embeddings(input_ids=input_ids)  # in eval mode their own dropout is off
        return self.base.embed_tokens(input_ids)

    def layer_type(self, index: int) -> str:
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return types[index]
        window = self.config.model_type == "mistral" and self.config.sliding_window is not None  # Llama has no window
        return "sliding_attention" if window else "full_attention"

    def context(self, packed: Packed) -> dict[str, tuple[Tensor, Tensor, Bias]]:
        """Of each kind of layer: cosine and sine [longest, d] and the positions that a query does not see."""
        positions = torch.arange(packed.longest, device=packed.device)
        dummy = torch.empty(0, dtype=self.base.dtype, device=positions.device)
        found = {}
        for kind in {self.layer_type(index) for index in range(self.depth)}:
            by_kind = (kind,) if self.config.model_type == "modernbert" else ()
            cos, sin = self.base.rotary_emb(dummy, positions[None], *by_kind)
            found[kind] = cos[0].float(), sin[0].float(), self._bias(kind, positions)
        return found

    def _bias(self, kind: str, positions: Tensor) -> Bias:
        causal, farthest = self.config.model_type != "modernbert", len(positions) - 1
        # Transformers counts the window of a causal model with the query, that of ModernBERT without.
        reach = self.config.sliding_window - int(causal) if kind == "sliding_attention" else farthest
        if farthest <= (0 if causal else reach):  # all see all; by the lengths: to look at the table would wait for the device
            return lambda first, queries, length: None
        distance = positions[:, None] - positions  # query - key
        unseen = distance.abs() > reach
        if causal:
            unseen |= distance < 0
        table = torch.zeros(1, *unseen.shape, dtype=self.base.dtype, device=unseen.device)
        table.masked_fill_(unseen, torch.finfo(self.base.dtype).min)
        last_sees_all = kind != "sliding_attention"  # the last token of a text, be the model causal or not

        def bias(first: int, queries: int, length: int) -> Tensor | None:
            return None if last_sees_all and first + 1 == length else table[:, first : first + queries, :length]

        return bias

    def layer(self, index: int, x: Tensor, replicas: Replicas, context: dict, one_row: bool) -> Tensor:
        layer, tables = self.layers[index], replicas.packed.tables
        cos, sin, bias = context[self.layer_type(index)]
        normed = layer.norm1(x)
        rows, asking, positions = x, normed, tables["positions"]
        if one_row:
            rows, asking = (t.index_select(-2, tables["read_rows"]) for t in (x, normed))
            positions = tables["read_positions"]
        query, key, value = layer.project(asking, normed)
        query = _rotate(query, cos[positions], sin[positions])
        key = _rotate(key, cos[tables["positions"]], sin[tables["positions"]])
        attention = text_attention(
            query, key, value, self.head_dim, self.head_dim**-0.5, bias, replicas, layer.attention_site, one_row
        )
        y = rows + replicas.dropout(layer.output(attention), layer.output_site, one_row)
        return y + layer.ffn_out(replicas.dropout(layer.ffn_in(layer.norm2(y)), layer.ffn_site, one_row))
