"""What things cost: bytes of memory and disk, from a checkpoint's config alone. Pure arithmetic, nothing is looked up.

Each formula is a sum of what was seen to be held at once, on random weights of the 11B's widths; benchmarks/README.md
has the measurements, tests/test_compression.py compares them.
"""

from transformers import MllamaConfig

from ov_mllama.shapes import MllamaShapes

LIBRARIES = 0.7e9  # OpenVINO, torch and NNCF, imported
CONVERSION_MEMORY = 1.2e9  # of a checkpoint of any size, whose weights stay on disk; the 11B's vision encoder: 0.7e9

# Of weight compression, bytes for each weight
SCALES = 1.02  # an 8-bit weight with its share of scales and zero points
SAVED_BY_INT4 = 0.47  # of that, by 4 bit with a scale for 64 weights
HEAD_IN_WORK = 10.5  # of the head while it is compressed: in float32, its integers, and what is between
AWQ_COPY = 4  # the two larger matrices of each MLP, scaled, in 16 bit
PACKED = 2.3  # of each layer where NNCF runs the uncompressed model: 16 bit, packed by the plugin

PIECE_LAYERS = 4  # of the vision encoder are quantised at a time, at most

# Of that, bytes
PIECE_IN_WORK = 11.6  # for each byte of a piece's 16-bit weights: copies in float32, and activations of one tile
QUANTIZED = 0.75  # for each byte of all layers' 16-bit weights: the pieces that are done, in 8 bit

# Of a prompt, bytes
MLP_ROW = 28  # for each token and intermediate channel
SCORES = 48  # for each pair of tokens: causal mask and attention of one layer
IMAGE_SCORES = 16  # for each token, head and image row


def compression_cost(settings, config: MllamaConfig) -> tuple[float, float]:
    """Bytes of disk that a compressed language model takes, and of memory (beside mapped files) while it is made.

    Args:
        settings: `ov_mllama.compress.Settings`.
    """
    text = config.text_config
    mlp = text.num_hidden_layers * text.intermediate_size * text.hidden_size  # weights in one of its three matrices
    heads = text.num_attention_heads
    attention = 2 * text.num_hidden_layers * text.hidden_size**2 * (heads + text.num_key_value_heads) // heads
    embedding = text.vocab_size * text.hidden_size  # as large as the head
    layers = 3 * mlp + attention
    in_4_bit = settings.ratio * (layers + 2 * embedding * settings.all_layers) if settings.is_int4 else 0
    disk = SCALES * (layers + 2 * embedding - SAVED_BY_INT4 * in_4_bit)
    memory = LIBRARIES + max(disk, HEAD_IN_WORK * embedding)
    if settings.awq:
        memory += AWQ_COPY * mlp
    if settings.dataset_size:
        memory = max(memory, LIBRARIES + PACKED * layers + 2 * embedding + vision_bytes(config))
    return disk, memory


def vision_bytes(config: MllamaConfig) -> float:
    """Size of the vision encoder's linear layers in 16 bit."""
    vision = config.vision_config
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return 2 * layer * (vision.num_hidden_layers + vision.num_global_layers)


def quantization_memory(config: MllamaConfig) -> float:
    """Bytes at the peak of quantising the vision encoder in pieces (`pieces.quantize_in_pieces`), with one tile of each
    picture: of the last pieces, beside which all others are held quantised."""
    vision, shapes = config.vision_config, MllamaShapes.from_config(config)
    layers = vision.num_hidden_layers + vision.num_global_layers
    longest = min(PIECE_LAYERS, max(vision.num_hidden_layers, vision.num_global_layers))
    key_value = 2 * len(shapes.cross_layers) * shapes.num_kv_heads * shapes.head_dim
    last = 2 * config.text_config.hidden_size * (vision.vision_output_dim + key_value)  # projector and K/V projections
    piece = max(vision_bytes(config) * longest / layers, last)
    return LIBRARIES + PIECE_IN_WORK * piece + QUANTIZED * vision_bytes(config)


def prompt_memory(config: MllamaConfig, batch: int, tokens: int, new: int, rows: int) -> float:
    """Bytes that a prompt takes while it is computed.

    Args:
        tokens: of the whole prompt; `new` of them are not in the KV cache yet.
        rows: K/V rows of its images.
    """
    text = getattr(config, "text_config", config)
    of_text = batch * new * (MLP_ROW * text.intermediate_size + SCORES * tokens)
    return of_text + new * IMAGE_SCORES * text.num_attention_heads * rows
