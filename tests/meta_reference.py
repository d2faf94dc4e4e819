"""Meta's reference code (PyPI `llama-models`, for development only) on a CPU, with the weights of a tiny checkpoint.

Its modules are run as they are. fairscale, which shares a model between processes, is replaced by the plain layers that
its own are in a single one; the two functions that gather results of processes become the identity.
"""

import sys
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import MllamaForConditionalGeneration

INSTALLED = util.find_spec("llama_models") is not None


class Linear(nn.Linear):
    """Column- and row-parallel layers of one process."""

    def __init__(self, inputs, outputs, bias=True, **kwargs):
        super().__init__(inputs, outputs, bias)


class Embedding(nn.Embedding):
    """A vocabulary-parallel embedding of one process."""

    def __init__(self, rows, width, **kwargs):
        super().__init__(rows, width)


@cache
def package(name: str) -> ModuleType:
    """A module of llama_models.llama3."""
    initialize, layers = ModuleType("initialize"), ModuleType("layers")
    initialize.get_model_parallel_world_size = lambda: 1
    layers.ColumnParallelLinear = layers.RowParallelLinear = Linear
    layers.VocabParallelEmbedding = Embedding
    parent = "fairscale.nn.model_parallel"
    parents = {name: ModuleType(name) for name in ("fairscale", "fairscale.nn", parent)}
    stand_ins = {**parents, f"{parent}.initialize": initialize, f"{parent}.layers": layers}
    parents[parent].initialize = initialize
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        module = import_module(f"llama_models.llama3.{name}")
    finally:
        for name, old in before.items():
            sys.modules.pop(name) if old is None else sys.modules.update({name: old})
    for function in ("reduce_from_tensor_model_parallel_region", "gather_from_tensor_model_parallel_region"):
        if hasattr(module, function):
            setattr(module, function, lambda tensor: tensor)
    return module


def unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key projection of transformers, whose rotary embedding pairs halves, as Meta's, which pairs
    neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class MetaReference:
    """Vision encoder, projector and language model of Meta's code with a checkpoint's weights, in f32.

    Args:
        checkpoint: folder of `tiny_mllama.make_checkpoint(..., meta=True)`.
        max_tokens: the KV cache holds.
    """

    def __init__(self, checkpoint: Path, max_tokens: int = 256):
        self.model = package("multimodal.model")
        hf = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self.vision, self.text, self.config = hf.config.vision_config, hf.config.text_config, hf.config
        weights = hf.state_dict()
        self.encoder = self._encoder(weights)
        self.projector = hf.model.multi_modal_projector
        self.language = self._language(weights, max_tokens)

    # ---- Weights ----

    def _encoder(self, weights):
        vision = self.vision
        encoder = self.model.VisionEncoder(
            max_num_tiles=vision.max_num_tiles,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.hidden_size,
            layers=vision.num_hidden_layers,
            heads=vision.attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            n_global_layers=vision.num_global_layers,
            global_model=True,
            return_intermediate=list(vision.intermediate_layers_indices),
        )
        of_layers = {
            **{f"self_attn.{name}_proj": f"attn.w{name}" for name in "qkvo"},
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
        }
        names = {
            **{f".{name}.": f".{meta}." for name, meta in of_layers.items()},
            "transformer.layers": "transformer.resblocks",
            "layernorm_p": "ln_p",
            "gated_positional_embedding.gate": "gated_positional_embedding_gate",
            "gated_positional_embedding.tile_embedding.weight": "gated_positional_embedding",
            "gated_positional_embedding.embedding": "positional_embedding",
            "_tile_positional_embedding.embedding.weight": "_tile_pos_embed.embedding",
            "_tile_positional_embedding": "_tile_pos_embed",
            "patch_embedding": "conv1._linear",
        }
        prefix, mapped = "model.vision_model.", {}
        for name, weight in weights.items():
            if name.startswith(prefix):
                meta = name.removeprefix(prefix)
                for old, new in names.items():
                    meta = meta.replace(old, new)
                if name.endswith("embedding.weight") and "tile" in name:
                    weight = self._grid(weight)
                mapped[meta] = weight.flatten(1) if meta == "conv1._linear.weight" else weight
        # not load_state_dict: its hooks interpolate tables of another size, and thereby round
        return filled(encoder, mapped)

    def _grid(self, table):
        """The grid of tiles of which each canvas's table is a corner, [high, wide, rows, channels]."""
        tiles = self.vision.max_num_tiles
        grid = torch.zeros(tiles, tiles, table.shape[1] // tiles)
        for ratio, (high, wide) in enumerate(self.vision.supported_aspect_ratios, 1):
            grid[:high, :wide] = table[ratio].view(tiles, -1)[: high * wide].view(high, wide, -1)
        return grid.view(tiles, tiles, -1, self.vision.hidden_size)

    def _language(self, weights, max_tokens):
        text = self.text
        cross = list(text.cross_attention_layers)
        own = [index for index in range(text.num_hidden_layers) if index not in cross]
        before = [index - number for number, index in enumerate(cross)]  # a cross-attention layer goes before this one
        base = self.model.CrossAttentionTransformerText
        scaled = text.rope_parameters["rope_type"] == "llama3"
        args = package("args").ModelArgs(
            dim=text.hidden_size,
            n_layers=len(own),
            n_heads=text.num_attention_heads,
            n_kv_heads=text.num_key_value_heads,
            vocab_size=text.vocab_size,
            multiple_of=text.intermediate_size,  # rounded up to it
            ffn_dim_multiplier=0.1,
            norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_parameters["rope_theta"],
            use_scaled_rope=scaled,
            max_batch_size=1,
            max_seq_len=max_tokens,
            vision_num_cross_attention_layers=len(cross),
        )
        language = type("Text", (base,), {"_init_fusion_schedule": lambda self, count: before})(args)
        names = {
            "cross_attn_attn_gate": "gate_attn",
            "cross_attn_mlp_gate": "gate_ffwd",
            **{f"{part}.{name}_proj": f"attention.w{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"},
            "cross_attn.": "attention.",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.down_proj": "feed_forward.w2",
            "mlp.up_proj": "feed_forward.w3",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
        }
        embedding = weights["model.language_model.embed_tokens.weight"]
        mapped = {
            "tok_embeddings.weight": embedding[: text.vocab_size],
            "learnable_embedding.weight": embedding[text.vocab_size :],
            "norm.weight": weights["model.language_model.norm.weight"],
            "output.weight": weights["lm_head.weight"],
        }
        for name, weight in weights.items():
            if not name.startswith("model.language_model.layers."):
                continue
            index, rest = name.removeprefix("model.language_model.layers.").split(".", 1)
            if rest in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                weight = unpermuted(weight, weight.shape[0] // (text.hidden_size // text.num_attention_heads))
            for old, new in names.items():
                rest = rest.replace(old, new)
            index, layers = int(index), cross if int(index) in cross else own
            kind = "cross_attention_layers" if layers is cross else "layers"
            mapped[f"{kind}.{layers.index(index)}.{rest}"] = weight
        language = filled(language, mapped)
        language.setup_cache(1, torch.device("cpu"), torch.float32)
        return language

    # ---- Running ----

    @torch.no_grad()
    def features(self, pixel_values, ratios) -> torch.Tensor:
        """The projector's input, f32 [images, tiles, patches, channels].

        Args:
            pixel_values: f32 [images, tiles, channels, height, width]; ratios: (high, wide) of each image.
        """
        return self.encoder(pixel_values[None], torch.tensor(ratios)[None])[0]

    @torch.no_grad()
    def key_values(self, pixel_values, ratios) -> torch.Tensor:
        """f32 [cross-attention layers, 2, 1, heads, rows, head_dim]."""
        tokens = self.projector(self.features(pixel_values, ratios)).flatten(0, 2)[None]
        return torch.stack([layer.compute_xattn_kv_cache(tokens) for layer in self.language.cross_attention_layers])

    @torch.no_grad()
    def logits(self, tokens: list[int], pixel_values=None, ratios=(), prompt: int | None = None) -> torch.Tensor:
        """f32 [tokens, vocab] of the prompt, then of one token after the other.

        Args:
            prompt: how many of the tokens are it, default all.
        """
        length = len(tokens)
        prompt = prompt or length
        if ratios:
            chat_format = package("chat_format")
            spans = chat_format.create_vision_mask(tokens[:prompt], self.config.image_token_index)
            tiles = [high * wide for high, wide in ratios]
            masks = self.model._pad_masks([spans], [tiles], length, self.vision.max_num_tiles)
            vision_tokens = torch.zeros(1, *pixel_values.shape[:2], self.patches, 1)
            mask, sees = self.language._get_xattn_mask(length, "cpu", torch.float32, vision_tokens, masks)
            caches = self.key_values(pixel_values, ratios)
        else:
            mask = sees = torch.zeros(1, 1, length, 1)
            caches = [None] * len(self.language.cross_attention_layers)
        ids, parts = torch.tensor([tokens]), []
        for position in [torch.arange(prompt), *torch.arange(prompt, length)[:, None]]:
            parts.append(
                self.language(
                    position_ids=position,
                    h=self.language.get_partially_trainable_embedding(ids[:, position]),
                    xattn_mask=mask[:, :, position],
                    full_text_row_masked_out_mask=sees[:, :, position],
                    xattn_caches=caches,
                    text_only_inference=not ratios,
                )[0]
            )
        return torch.cat(parts)

    @property
    def patches(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2 + 1


def filled(module: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A module with all of its parameters set, and nothing left over."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, (name, parameter.shape, weights[name].shape)
            parameter.copy_(weights[name])
    return module.eval()
