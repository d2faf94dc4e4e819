"""What things cost in bytes and seconds: arithmetic over a checkpoint's config, nothing is looked up.

Each formula for memory is a sum of what was seen to be held at once, each for seconds a measurement in proportion to
weights: of random ones of the 11B's widths, on two cores of a virtual Intel Xeon with AVX-512 VNNI, without AMX.
benchmarks/README.md has the measurements, tests/export/test_plan.py compares them.
"""

from typing import NamedTuple

from transformers import LlamaConfig, MllamaConfig

from ov_mllama.export.settings import Settings
from ov_mllama.runtime.memory import picture_memory
from ov_mllama.runtime.shapes import MllamaShapes

# ---- Bytes ----

LIBRARIES = 0.7e9  # OpenVINO, torch and NNCF, imported
CONVERSION_MEMORY = 1.2e9  # of a checkpoint of any size, whose weights stay on disk; the 11B's vision encoder: 0.7e9

# Of weight compression, bytes for each weight
SCALES = 1.02  # an 8-bit weight with its share of scales and zero points
INT4_SAVING = 0.47  # of that, by 4 bit with a scale for 64 weights
LM_HEAD_BYTES_PER_WEIGHT = 10.9  # of the head while it is compressed: in float32, its integers, and what is between
AWQ_COPY = 4  # the two larger matrices of each MLP, scaled, in 16 bit
PACKED = 2.3  # of each layer where NNCF runs the uncompressed model: 16 bit, packed by the plugin

PIECE_LAYERS = 4  # of the vision encoder are quantised at a time, at most

# Of that, bytes
PIECE_BYTES_PER_BYTE = 11.6  # for each byte of a piece's 16-bit weights: copies in float32, and activations of one tile
QUANTIZED = 0.75  # for each byte of all layers' 16-bit weights: the pieces that are done, in 8 bit

CACHE_BYTES = 1.5e9  # room for encoded pictures and for conversations, as `OVMLlamaForConditionalGeneration` has it


# ---- Seconds, on two cores; of a vision encoder with compressed weights ----

STEP_OVERHEAD_S = 5  # of each step that makes an IR, whatever the size
WRITE_S_PER_BYTE = 4.2e-9  # for each byte that is written in 16 bit
INT4_S_PER_WEIGHT, INT8_S_PER_WEIGHT = 12e-9, 2e-8
AWQ_TIME_FACTOR = 3.5  # as long as without
SAMPLE_S_PER_WEIGHT = 11e-9  # for each weight and sample, with data; scale estimation takes twice that
QUANTIZE_S_PER_WEIGHT = 14e-8  # for each weight of the tower and picture
REPACKED = 5.2e-9  # for each byte of weights, read and repacked by the plugin
READ = 5.9e-11  # for each byte of weights that a token reads
ONE_TILE, FOUR_TILES = 1.22e-11, 5.12e-11  # of a picture, for each weight of the tower and row of a tile


class Cost(NamedTuple):
    """What one step takes.

    Attributes:
        disk: bytes that it writes.
        memory: bytes at its peak, beside mapped files, which the system can drop.
        seconds: on two cores.
    """

    disk: float = 0
    memory: float = 0
    seconds: float = 0


# ---- Sizes ----------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """How many weights a model has: in one of the three matrices of all MLPs of the language model; in its attention;
    in its embedding; in its head, none where that is the embedding once more; in the layers of the vision tower; and
    behind these, in the projector and the K/V projections of the cross-attention layers.
    """

    mlp: float
    attention: float
    embedding: float
    head: float
    tower: float
    projections: float

    @property
    def layers(self) -> float:
        return 3 * self.mlp + self.attention

    @property
    def language(self) -> float:
        return self.layers + self.embedding + self.head

    @property
    def vision(self) -> float:
        return self.tower + self.projections


def weights(config: MllamaConfig | LlamaConfig) -> Weights:
    """Of a checkpoint, norms and other small things left out; of a Llama for text too."""
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", None)
    heads, hidden = text.num_attention_heads, text.hidden_size
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size if vision else 0
    key_value = hidden * hidden * text.num_key_value_heads // heads
    cross = len(MllamaShapes.from_config(config).cross_layers)
    return Weights(
        mlp=text.num_hidden_layers * text.intermediate_size * hidden,
        attention=2 * text.num_hidden_layers * hidden**2 + 2 * (text.num_hidden_layers - cross) * key_value,
        embedding=text.vocab_size * hidden,
        head=0 if text.tie_word_embeddings else text.vocab_size * hidden,
        tower=layer * (vision.num_hidden_layers + vision.num_global_layers) if vision else 0,
        projections=hidden * vision.vision_output_dim + 2 * cross * key_value if vision else 0,
    )


# ---- Costs ----------------------------------------------------------------------------------------------------------


def conversion_cost(config: MllamaConfig, vision_encoder: bool = True, language_model: bool = True) -> Cost:
    """Of `convert_mllama`, of the parts that it has to write."""
    size = weights(config)
    disk = 2 * (size.vision * vision_encoder + size.language * language_model)
    return Cost(disk, CONVERSION_MEMORY, conversion_seconds(disk)) if disk else Cost()


def conversion_seconds(size: float) -> float:
    """Of writing an IR of so many bytes in 16 bit."""
    return STEP_OVERHEAD_S + WRITE_S_PER_BYTE * size


def compression_cost(settings: Settings, config: MllamaConfig | LlamaConfig) -> Cost:
    """Of compressing the language model's weights."""
    size = weights(config)
    in_4_bit = size.language if settings.all_layers else size.layers
    in_4_bit *= settings.ratio * settings.is_int4
    disk = SCALES * (size.language - INT4_SAVING * in_4_bit)
    memory = LIBRARIES + max(disk, LM_HEAD_BYTES_PER_WEIGHT * size.embedding)
    seconds = STEP_OVERHEAD_S + INT4_S_PER_WEIGHT * size.language * (AWQ_TIME_FACTOR if settings.awq else 1)
    if settings.awq:
        memory += AWQ_COPY * size.mlp
    if settings.dataset_size:
        shapes = MllamaShapes.from_config(config)
        encoder = 2 * size.tower + picture_memory(shapes, shapes.max_num_tiles)  # which encodes the samples' pictures
        memory = max(memory, LIBRARIES + PACKED * size.layers + size.embedding + size.head + encoder)
        seconds += SAMPLE_S_PER_WEIGHT * size.language * settings.dataset_size * (1 + settings.scale_estimation)
    return Cost(disk, memory, seconds)


def vision_cost(option: str, config: MllamaConfig, pictures: int = 0) -> Cost:
    """Of making the vision encoder smaller.

    Args:
        option: of `ov_mllama.export.settings.VISION_OPTIONS`.
        pictures: to calibrate "INT8 quantization" with.
    """
    size = weights(config)
    if option == "FP16":
        return Cost()
    if option == "INT8 quantization":
        return Cost(
            SCALES * size.vision,
            quantization_memory(config),
            STEP_OVERHEAD_S + QUANTIZE_S_PER_WEIGHT * size.tower * pictures,
        )
    return Cost(SCALES * size.vision, LIBRARIES + 2 * size.tower, STEP_OVERHEAD_S + INT8_S_PER_WEIGHT * size.vision)


def quantization_memory(config: MllamaConfig) -> float:
    """Bytes at the peak of quantising the vision encoder in pieces (`piecewise.quantize_in_pieces`), with one tile of
    each picture: of the last pieces, beside which all others are held quantised."""
    vision, size = config.vision_config, weights(config)
    layers = vision.num_hidden_layers + vision.num_global_layers
    longest = min(PIECE_LAYERS, max(vision.num_hidden_layers, vision.num_global_layers))
    piece = 2 * max(size.tower * longest / layers, size.projections)
    return LIBRARIES + PIECE_BYTES_PER_BYTE * piece + QUANTIZED * 2 * size.tower


def answering_memory(config: MllamaConfig, weight_bytes: float) -> float:
    """Bytes while pictures of all tiles are asked about.

    Args:
        weight_bytes: of all IRs. The plugin's repacked copy of them is about as large, and in memory.
    """
    shapes = MllamaShapes.from_config(config)
    largest = picture_memory(shapes, shapes.max_num_tiles)
    kept = min(CACHE_BYTES, 4 * shapes.cross_kv_bytes(shapes.max_num_tiles * shapes.patches_per_tile))
    return LIBRARIES + weight_bytes + largest + kept


# ---- Words ----------------------------------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else "10 ms or less"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
