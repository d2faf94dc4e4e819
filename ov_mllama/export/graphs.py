"""The graphs of the two IRs: Mllama as two `nn.Module`s around the checkpoint's own sub-modules, made to be traced.

    pixels of one image -> VisionEncoder -> cross-attention K/V
    tokens, those, the text KV cache -> LanguageModel -> logits, queries of the cross-attention, grown cache

`convert.py` has them traced; tests compare them with transformers.
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import apply_rotary_pos_emb, repeat_kv

from ov_mllama.runtime.reference import TRANSFORMERS, Reference
from ov_mllama.runtime.shapes import MASKED, MllamaShapes


class VisionEncoder(nn.Module):
    """The vision encoder: one image's tiles -> keys and values of every cross-attention layer.

    Mllama's tower masks only padding -> padding attention: real patches attend to padding tiles, as in training. Two
    exact transformations make that cheap:

    - With the real patches first, two attentions without a [rows, rows] mask equal one with it: real queries attend to
      every key, padding queries to the real keys.
    - Rows that start equal stay equal, since all padding queries attend to the same keys. If a checkpoint's padding
      tiles start equal (in Meta's they are zero), one of them is computed, and counts as a key for all: log(n) is added
      to the score of a key that stands for n. The rows that align a tile to a multiple of 8 are equal in every
      checkpoint.

    The projector reads, beside the tower's result, states of some layers (`intermediate_layers_indices`):

    - Meta's reference reads their inputs (llama-models 0.3.0, multimodal/model.py, `ImageTransformer.forward`).
    - transformers since 4.56 reads their outputs (5.23.0, modeling_mllama.py, `MllamaVisionEncoder.forward`).
    """

    def __init__(self, model: MllamaForConditionalGeneration, reference: Reference = TRANSFORMERS):
        super().__init__()
        self.shapes = MllamaShapes.from_config(model.config)
        self.reference = reference
        self.vision_model = model.model.vision_model
        self.projector = model.model.multi_modal_projector
        layers = model.model.language_model.layers
        self.cross_attentions = nn.ModuleList(layers[i].cross_attn for i in self.shapes.cross_layers)

    def forward(self, pixel_values, aspect_ratio_ids, real_tiles, tile_counts):
        """
        Args:
            pixel_values: f32 [tiles, channels, height, width] of one image: its real tiles, then padding, zeros.
            aspect_ratio_ids: i64 [1], 1-based index of the canvas in `supported_aspect_ratios`, 0 for "no image".
            real_tiles: i64 scalar, number of real tiles.
            tile_counts: i64 [tiles], number of tiles that each stands for: 1, or more for a padding tile.
        Returns:
            for each cross-attention layer, in order: key f32 [1, kv heads, head_dim, rows], normalised, transposed and
            scaled, and value f32 [1, kv heads, rows, head_dim], with rows = tiles * patches_per_tile. Keys are ready
            for a plain `query @ key`; heads are not repeated.
        """
        tower, patches = self.vision_model, self.shapes.patches_per_tile
        tiles = tile_counts.shape[0]
        # Meta pads each tile to a multiple of 8 rows, and those rows take part as padding: one here, until tiles differ
        alignment = -patches % 8
        real_rows = real_tiles * patches
        of_patches = tile_counts[:, None].expand(-1, patches).flatten()

        x = self.embed(pixel_values, aspect_ratio_ids, tiles).flatten(1, 2)  # [1, tiles * patches, channels]
        x = torch.cat([x, x.new_zeros(1, 1, x.shape[-1])], dim=1)  # real rows come first
        bias = self.key_bias(of_patches, tile_counts.sum()[None] * alignment)
        states = [x]
        for layer in _progress(tower.transformer.layers, "Tracing vision encoder"):
            x = self.encoder_layer(layer, x, real_rows, bias)
            states.append(x)

        embedding = self.tile_embedding(x, aspect_ratio_ids)[:, :tiles]  # [1, tiles, 1, channels]
        x = tower.layernorm_post(x)
        of_tiles = x[:, :-1] + embedding.expand(-1, -1, patches, -1).flatten(1, 2)
        aligning = x[:, -1:] + embedding[:, :, 0]  # [1, tiles, channels]: now each tile has an alignment row of its own
        x = torch.cat([of_tiles, aligning], dim=1)
        bias = self.key_bias(of_patches, tile_counts * alignment)
        for layer in tower.global_transformer.layers:
            x = self.encoder_layer(layer, x, real_rows, bias)

        rows = tiles * patches
        chosen = torch.stack([state[:, :rows] for state in self.read_by_projector(states)], dim=-1)
        features = torch.cat([x[:, :rows], chosen.flatten(2)], dim=-1)  # [1, rows, vision_output_dim]
        x = self.projector(features)  # [1, rows, hidden_size]
        return tuple(tensor for attention in self.cross_attentions for tensor in self.key_value(attention, x))

    def read_by_projector(self, states):
        """Return the states at `intermediate_layers_indices`, of the embedding and each layer's output in order.

        Index -1 of outputs is the embedding (after `layernorm_pre`), the input of layer 0.
        """
        outputs = self.reference.vision_layers == "outputs"
        indices = self.vision_model.intermediate_layers_indices
        return [states[index + 1 if outputs and index >= -1 else index] for index in indices]

    def embed(self, pixel_values, aspect_ratio_ids, tiles):
        """Return [1, tiles, patches, channels] for pixels, with class token and position embeddings."""
        tower, shapes = self.vision_model, self.shapes
        x = tower.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        nothing = x.new_zeros(1, shapes.max_num_tiles, 1, x.shape[-1])
        x = x + tower.pre_tile_positional_embedding(nothing, aspect_ratio_ids)[0, :tiles]
        x = tower.apply_class_embedding(x)[None]
        nothing = x.new_zeros(1, shapes.max_num_tiles, shapes.patches_per_tile, x.shape[-1])
        return tower.layernorm_pre(x + tower.gated_positional_embedding(nothing, aspect_ratio_ids)[:, :tiles])

    def tile_embedding(self, x, aspect_ratio_ids):
        """Return the embedding added to all rows of a tile after the local layers: [1, max_num_tiles, 1, channels]."""
        nothing = x.new_zeros(1, self.shapes.max_num_tiles, 1, x.shape[-1])
        return self.vision_model.post_tile_positional_embedding(nothing, aspect_ratio_ids)

    @staticmethod
    def key_bias(*counts):
        """Return f32 [1, 1, 1, rows], added to the scores of keys that stand for `counts`, i64 [rows] in parts."""
        return torch.cat(counts).float().log()[None, None, None]

    def encoder_layer(self, layer, x, real_rows, bias):
        attended = self.valid_first_attention(layer.self_attn, layer.input_layernorm(x), real_rows, bias)
        x = x + (layer.gate_attn.tanh() * attended if layer.is_gated else attended)
        mlp = layer.mlp(layer.post_attention_layernorm(x))
        return x + (layer.gate_ffn.tanh() * mlp if layer.is_gated else mlp)

    @staticmethod
    def valid_first_attention(attention, x, real_rows, bias):
        """Compute the tower's masked attention as two unmasked ones; the first `real_rows` rows of x are real."""

        def heads(projected):
            return projected.view(1, x.shape[1], attention.num_heads, attention.head_dim).transpose(1, 2)

        # each [1, heads, rows, head_dim]
        query, key, value = heads(attention.q_proj(x)), heads(attention.k_proj(x)), heads(attention.v_proj(x))
        real = F.scaled_dot_product_attention(query[:, :, :real_rows], key, value, attn_mask=bias)
        padding = F.scaled_dot_product_attention(
            query[:, :, real_rows:], key[:, :, :real_rows], value[:, :, :real_rows]
        )
        return attention.o_proj(torch.cat([real, padding], dim=2).transpose(1, 2).flatten(2))

    @staticmethod
    def key_value(attention, states):
        """Return a cross-attention layer's key and value, which depend on the image alone."""
        split = (1, states.shape[1], attention.num_key_value_heads, attention.head_dim)
        key = attention.k_norm(attention.k_proj(states).view(split)) * attention.scaling
        value = attention.v_proj(states).view(split)
        return key.permute(0, 2, 3, 1), value.transpose(1, 2)  # as `MllamaShapes.cross_kv_shape` says


class LanguageModel(nn.Module):
    """One step of the language model with its state as inputs and outputs; `make_stateful` hides the text KV cache.

    A Llama for text is one without cross-attention layers. To a token that sees no image these add

    - nothing in Meta's reference (llama-models 0.3.0, multimodal/model.py, `full_text_row_masked_out_mask` twice);
    - attention to all rows in transformers, without the MLP (5.23.0, modeling_mllama.py; transformers#39379).
    """

    def __init__(self, model: MllamaForConditionalGeneration | LlamaForCausalLM, reference: Reference = TRANSFORMERS):
        super().__init__()
        self.shapes = MllamaShapes.from_config(model.config)
        self.row_mask = reference.row_mask == "on"
        self.text_model = getattr(model.model, "language_model", model.model)
        self.lm_head = model.lm_head

    def forward(
        self,
        input_ids,
        attention_mask,
        position_ids,
        logits_to_keep,
        past_key_values,
        cross_attention_bias=None,
        sees_image=None,
        cross_attn_key_values=(),
    ):
        """
        Args:
            input_ids: i64 [batch, query].
            attention_mask: i64 [batch, past + query]; a 0 hides that position of the KV cache from every query.
            position_ids: i64 [batch, query], for the rotary embedding only: causality follows cache positions.
            logits_to_keep: i64 scalar, number of last positions that get logits.
            past_key_values: (key, value) for each self-attention layer, f32 [batch, kv heads, past, head_dim].
            cross_attention_bias: f32 [batch, 1, query, rows], added to the scores of text against image rows. Any axis
                may be 1: without any mask it is a single zero.
            sees_image: f32 [batch, query, 1], 0 for tokens that may see no image: their MLP in the cross-attention
                layers is switched off, and with Meta's row mask their attention too.
            cross_attn_key_values: (key, value) for each cross-attention layer, as the vision encoder wrote them.
        Returns:
            logits f32 [batch, logits_to_keep, vocab]; with cross-attention layers their queries for the same positions,
            f32 [batch, logits_to_keep, layers * heads * head_dim], normalised; then the grown key and value of each
            self-attention layer.
        """
        x = self.text_model.embed_tokens(input_ids)  # [batch, query, hidden_size]
        rotary = self.text_model.rotary_emb(x, position_ids)
        bias = self.causal_bias(input_ids, attention_mask)
        cross_kv, past, present, queries = iter(cross_attn_key_values), iter(past_key_values), [], []
        first = input_ids.shape[1] - logits_to_keep  # position with logits
        for index, layer in enumerate(_progress(self.text_model.layers, "Tracing language model")):
            if index in self.shapes.cross_layers:
                key, value = next(cross_kv)
                query = self.cross_attention_query(layer, x)
                queries.append(query[:, first:].flatten(2))
                x = self.cross_attention_layer(layer, x, query, key, value, cross_attention_bias, sees_image)
            else:
                x, key_value = self.self_attention_layer(layer, x, rotary, bias, *next(past))
                present.extend(key_value)
        logits = self.lm_head(self.text_model.norm(x[:, first:]))
        return (logits, torch.cat(queries, dim=-1), *present) if queries else (logits, *present)

    @staticmethod
    def causal_bias(input_ids, attention_mask):
        """Return f32 [batch, 1, query, past + query]: 0 where a query may attend, MASKED elsewhere."""
        columns = attention_mask.shape[1]
        queries = input_ids.shape[1]
        column = torch.arange(columns)
        query = torch.arange(queries) + (columns - queries)
        allowed = (column[None, :] <= query[:, None])[None, None] & attention_mask[:, None, None, :].bool()
        return torch.where(allowed, 0.0, MASKED)

    def self_attention_layer(self, layer, x, rotary, bias, past_key, past_value):
        attention = layer.self_attn
        batch, queries, _ = x.shape
        normed = layer.input_layernorm(x)

        def heads(projected):
            return projected.view(batch, queries, -1, attention.head_dim).transpose(1, 2)

        query, key = apply_rotary_pos_emb(heads(attention.q_proj(normed)), heads(attention.k_proj(normed)), *rotary)
        key = torch.cat([past_key, key], dim=2)  # [batch, kv heads, past + query, head_dim]
        value = torch.cat([past_value, heads(attention.v_proj(normed))], dim=2)
        groups = attention.num_key_value_groups
        attended = F.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=bias
        )
        x = x + attention.o_proj(attended.transpose(1, 2).reshape(batch, queries, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x, (key, value)

    def cross_attention_query(self, layer, x):
        """Return a cross-attention layer's normalised queries, [batch, query, heads, head_dim]."""
        query = layer.cross_attn.q_proj(layer.input_layernorm(x))
        return layer.cross_attn.q_norm(query.view(*x.shape[:2], self.shapes.num_heads, self.shapes.head_dim))

    def cross_attention_layer(self, layer, x, query, key, value, bias, sees_image):
        """Let text attend to image rows. Query heads that share a key fold into the query axis: [B, kv, G*Q, D]."""
        attention, shapes = layer.cross_attn, self.shapes
        batch, queries, _ = x.shape
        query = query.transpose(1, 2).reshape(batch, shapes.num_kv_heads, -1, shapes.head_dim)
        scores = query @ key  # [batch, kv heads, G * Q, rows]
        groups = shapes.num_heads // shapes.num_kv_heads
        scores = scores.view(batch, shapes.num_kv_heads, groups, queries, -1) + bias[:, :, None]
        weights = scores.softmax(dim=-1).view(batch, shapes.num_kv_heads, groups * queries, -1)
        attended = (weights @ value).view(batch, shapes.num_heads, queries, shapes.head_dim)
        attended = attention.o_proj(attended.transpose(1, 2).reshape(batch, queries, -1))
        attended = sees_image * attended if self.row_mask else attended
        x = x + layer.cross_attn_attn_gate.tanh() * attended
        mlp = layer.mlp(layer.post_attention_layernorm(x))
        return x + layer.cross_attn_mlp_gate.tanh() * (sees_image * mlp)


def _progress(layers, description):
    """Return a progress bar over a module's layers; tracing runs `forward` once."""
    return tqdm(layers, desc=description, unit="layer", leave=False)
