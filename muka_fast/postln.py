"""Post-LN encoders layer by layer: BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT, MPNet and ALBERT."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from muka_fast.intercept import layer_modules
from muka_fast.layered import Bias, LayeredEncoder, sited_layers
from muka_fast.packed import Packed, Replicas, text_attention
from muka_fast.sites import Site


@dataclass(frozen=True)
class PostLayer:
    """norm2(ffn(y) + y) with y = norm1(o(attention(q, k, v)) + x).

    Attention, o and ffn end in a dropout: its module (Identity where there is none), and its site index once sites are known.
    attends: the module that the masks of attention are asked for.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    norm1: nn.LayerNorm
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    down: nn.Module
    norm2: nn.LayerNorm
    attention_dropout: nn.Dropout
    output_dropout: nn.Module
    ffn_dropout: nn.Module
    attends: nn.Module
    attention_site: int | None = None
    output_site: int | None = None
    ffn_site: int | None = None


def _bert_layer(layer: nn.Module) -> tuple[tuple, tuple[str, ...]]:
    own, out = layer.attention.self, layer.attention.output
    up, act = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
    parts = (own.query, own.key, own.value, out.dense, out.LayerNorm, up, act, layer.output.dense, layer.output.LayerNorm)
    return (*parts, own.dropout), ("attention.self", "attention.output.dropout", "output.dropout")


def _distilbert_layer(layer: nn.Module) -> tuple[tuple, tuple[str, ...]]:
    own, ffn = layer.attention, layer.ffn
    attention = (own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.sa_layer_norm)
    parts = (*attention, ffn.lin1, ffn.activation, ffn.lin2, layer.output_layer_norm)
    return (*parts, own.dropout), ("attention", "", "ffn.dropout")


def _mpnet_layer(layer: nn.Module) -> tuple[tuple, tuple[str, ...]]:
    own, up = layer.attention.attn, layer.intermediate
    attention = (own.q, own.k, own.v, own.o, layer.attention.LayerNorm)
    parts = (*attention, up.dense, up.intermediate_act_fn, layer.output.dense, layer.output.LayerNorm)
    return (*parts, own.dropout), ("attention.attn.dropout", "attention.dropout", "output.dropout")


def _albert_layer(group: nn.Module) -> tuple[tuple, tuple[str, ...]]:
    (layer,) = group.albert_layers
    own = layer.attention
    attention = (own.query, own.key, own.value, own.dense, own.LayerNorm)
    parts = (*attention, layer.ffn, layer.activation, layer.ffn_output, layer.full_layer_layer_norm)
    return (*parts, own.attention_dropout), ("albert_layers.0.attention", "albert_layers.0.attention.output_dropout", "")


# model_type -> parts of a layer in the order of PostLayer, its attention's dropout the last of them, and the paths of its three sites
# inside it ("" = no such site; attention's is always there)
LAYERS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _bert_layer),
    "distilbert": _distilbert_layer,
    "mpnet": _mpnet_layer,
    "albert": _albert_layer,
}


def layer_calls(model: PreTrainedModel) -> list[nn.Module] | None:
    """The module behind every layer call in order: ALBERT calls one several times. None for a model that this file does not cover."""
    config, modules = model.config, None
    if config.model_type in LAYERS and getattr(config, "inner_group_num", 1) == 1 and not getattr(config, "is_decoder", False):
        modules = layer_modules(model)
    if modules is None:
        return None
    depth = config.num_hidden_layers
    return [modules[int(index / (depth / len(modules)))] for index in range(depth)]  # ALBERT: groups of equal layers


def layer_parts(model: PreTrainedModel, module: nn.Module) -> tuple[tuple, tuple[str, ...]]:
    """Of one of `layer_calls`: the modules of its PostLayer, and the paths of its sites inside it."""
    parts, paths = LAYERS[model.config.model_type](module)
    dropouts = (module.get_submodule(path) if path else nn.Identity() for path in paths[1:])
    return (*parts, *dropouts, module.get_submodule(paths[0])), paths


class PostLayerNormEncoder(LayeredEncoder):
    """LayeredEncoder of the families in LAYERS."""

    layers: list[PostLayer]

    @classmethod
    def of(cls, model: PreTrainedModel, sites: list[Site], reads_last: bool) -> "PostLayerNormEncoder | None":
        """None for an architecture or a configuration that this file does not cover."""
        calls = layer_calls(model)
        if calls is None:
            return None
        layers = sited_layers(model, calls, partial(layer_parts, model), sites, PostLayer)
        embeddings = [s.index for s in sites if s.layer is None]
        return None if layers is None or len(embeddings) != 1 else cls(model, layers, embeddings[0], reads_last)

    def embeddings(self, input_ids: Tensor) -> Tensor:
        return self.base.embeddings(input_ids=input_ids)  # in eval mode their own dropout is off

    def project(self, x: Tensor) -> Tensor:
        if self.config.model_type == "albert":
            return self.base.encoder.embedding_hidden_mapping_in(x)
        narrow = getattr(self.base, "embeddings_project", None)  # ELECTRA
        return x if narrow is None else narrow(x)

    def context(self, packed: Packed) -> Bias:
        """MPNet's position biases."""
        if self.config.model_type != "mpnet":
            return lambda first, queries, length: None
        table = self.base.encoder.compute_position_bias(torch.empty(1, packed.longest, 0, device=packed.device))[0]  # [H, L, L]
        return lambda first, queries, length: table[:, first : first + queries, :length]

    def layer(self, index: int, x: Tensor, replicas: Replicas, context: Bias, one_row: bool) -> Tensor:
        layer = self.layers[index]
        rows = x.index_select(-2, replicas.packed.tables["read_rows"]) if one_row else x
        attention = text_attention(
            layer.query(rows), layer.key(x), layer.value(x), self.head_dim, self.head_dim**-0.5, context, replicas,
            layer.attention_site, one_row,
        )  # fmt: skip
        y = replicas.add_norm(layer.output(attention), rows, layer.norm1, layer.output_site, one_row)
        inner = layer.down(layer.activation(layer.up(y)))
        return replicas.add_norm(inner, y, layer.norm2, layer.ffn_site, one_row)
