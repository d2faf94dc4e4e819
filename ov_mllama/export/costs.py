"""Costs of each step in bytes and seconds, computed from a checkpoint's config.

Memory is the sum of what a measured step holds at once. Seconds of making IRs are proportional to weights, as measured
on random weights of the 11B's widths, on two cores of a virtual Intel Xeon with AVX-512 VNNI, without AMX
(benchmarks/README.md). Seconds of answering follow from this machine's `Speed`: multiply-adds over the measured
products per second, and bytes over the memory's speed; `python -m benchmarks.predictions` compares them with
measurements.
"""

from typing import NamedTuple

from transformers import LlamaConfig, MllamaConfig

from ov_mllama.export.settings import Settings
from ov_mllama.runtime.measure import FORMATS, IMAGE, PROMPT, TOKEN, Speed
from ov_mllama.runtime.memory import picture_memory
from ov_mllama.runtime.shapes import MllamaShapes

# ---- Bytes ----

LIBRARIES_BYTES = 0.7e9  # OpenVINO, torch and NNCF, imported
CONVERSION_MEMORY_BYTES = 1.2e9  # of any checkpoint, whose weights stay on disk; the 11B's vision encoder takes 0.7e9
CACHE_BYTES = 1.5e9  # encoded images and sessions, as `OVMLlamaForConditionalGeneration` caches them

TAKING_OVER_MEMORY_BYTES = 2.5e9  # of one matrix at a time, the largest of which is the head

# Compression of the language model's weights, bytes per weight
INT8_BYTES_PER_WEIGHT = 1.02  # with its share of scales and zero points
INT4_SAVING = 0.47  # share of the INT8 size that INT4 with a scale per 64 weights saves
LM_HEAD_BYTES_PER_WEIGHT = 10.9  # peak while the head is compressed: float32, integers, and intermediate results
AWQ_BYTES_PER_WEIGHT = 4  # of the scaled 16-bit copies of the two larger matrices of each MLP, per weight of one matrix
PACKED_BYTES_PER_WEIGHT = 2.3  # of layers while NNCF runs the uncompressed model: 16 bit, repacked by the plugin

# Quantisation of the vision encoder
PIECE_LAYERS = 4  # layers quantised at a time, at most
PIECE_BYTES_PER_BYTE = 11.6  # peak per byte of a piece's 16-bit weights: float32 copies, activations of one tile
QUANTIZED_BYTES_PER_BYTE = 0.75  # of finished pieces in 8 bit, per byte of all layers' 16-bit weights


# ---- Seconds of making IRs, on two cores ----

STEP_OVERHEAD_S = 5  # of each step that makes an IR, of any size
TAKING_OVER_S_PER_BYTE = 2e-8  # of decoding quantised weights, and writing them twice, per byte of the IR
WRITE_S_PER_BYTE = 4.2e-9  # of writing an IR in 16 bit
INT4_S_PER_WEIGHT, INT8_S_PER_WEIGHT = 12e-9, 2e-8  # of compressing without data
AWQ_TIME_FACTOR = 3.5  # of compression with AWQ, relative to without
SAMPLE_S_PER_WEIGHT = 11e-9  # of compressing with data, per weight and sample; with scale estimation twice
QUANTIZE_S_PER_WEIGHT = 14e-8  # of quantising the vision encoder, per weight of the tower and image
LOAD_S_PER_BYTE = 5.2e-9  # of reading weights and having the plugin repack them

# ---- Seconds of answering: shares of the measured speed, fitted with `benchmarks.predictions` (docs/costs.md) ----

ATTENTION_EFFICIENCY = 0.85  # of 16-bit products, in the vision encoder's attention; its matrices reach all
PROMPT_EFFICIENCY = 0.95  # of products, at a step of PROMPT tokens
READ_EFFICIENCY = 0.9  # of memory's speed, at a token in 16 bit; in 8 and 4 bits all of the measured products
PREDICTION_ERROR = 0.3  # relative, of the seconds of answering


class Cost(NamedTuple):
    """The cost of one step.

    Attributes:
        disk: bytes written.
        memory: bytes at the peak, without mapped files, which the system can drop.
        seconds: on two cores.
    """

    disk: float = 0
    memory: float = 0
    seconds: float = 0


# ---- Sizes ----------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Numbers of a model's weights by part.

    Attributes:
        mlp: one of the three matrices of each MLP of the language model.
        attention: of the language model.
        embedding: of tokens.
        head: 0 if tied to the embedding.
        tower: layers of the vision tower.
        projections: the projector, and the K/V projections of the cross-attention layers.
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
    """Count the weights of a Mllama or a Llama for text, without norms and other small tensors."""
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


def taking_over_cost(size: float) -> Cost:
    """Return the cost of writing a language model in its checkpoint's own format, of `size` bytes."""
    return Cost(size, TAKING_OVER_MEMORY_BYTES, STEP_OVERHEAD_S + TAKING_OVER_S_PER_BYTE * size)


def conversion_cost(config: MllamaConfig, vision_encoder: bool = True, language_model: bool = True) -> Cost:
    """Return the cost of `convert_mllama` for the parts that it has to write."""
    size = weights(config)
    disk = 2 * (size.vision * vision_encoder + size.language * language_model)
    return Cost(disk, CONVERSION_MEMORY_BYTES, conversion_seconds(disk)) if disk else Cost()


def conversion_seconds(size: float) -> float:
    """Return the seconds of writing an IR of so many bytes in 16 bit."""
    return STEP_OVERHEAD_S + WRITE_S_PER_BYTE * size


def compression_cost(settings: Settings, config: MllamaConfig | LlamaConfig) -> Cost:
    """Return the cost of compressing the language model's weights."""
    size = weights(config)
    in_4_bit = size.language if settings.all_layers else size.layers
    in_4_bit *= settings.ratio * settings.is_int4
    disk = INT8_BYTES_PER_WEIGHT * (size.language - INT4_SAVING * in_4_bit)
    memory = LIBRARIES_BYTES + max(disk, LM_HEAD_BYTES_PER_WEIGHT * size.embedding)
    seconds = STEP_OVERHEAD_S + INT4_S_PER_WEIGHT * size.language * (AWQ_TIME_FACTOR if settings.awq else 1)
    if settings.awq:
        memory += AWQ_BYTES_PER_WEIGHT * size.mlp
    if settings.dataset_size:
        shapes = MllamaShapes.from_config(config)
        encoder = 2 * size.tower + picture_memory(shapes, shapes.max_num_tiles)  # encodes the samples' images
        memory = max(
            memory, LIBRARIES_BYTES + PACKED_BYTES_PER_WEIGHT * size.layers + size.embedding + size.head + encoder
        )
        seconds += SAMPLE_S_PER_WEIGHT * size.language * settings.dataset_size * (1 + settings.scale_estimation)
    return Cost(disk, memory, seconds)


def vision_cost(option: str, config: MllamaConfig, images: int = 0) -> Cost:
    """Return the cost of making the vision encoder smaller.

    Args:
        option: of `ov_mllama.export.settings.VISION_OPTIONS`.
        images: number to calibrate "INT8 quantization" with.
    """
    size = weights(config)
    if option == "FP16":
        return Cost()
    disk = INT8_BYTES_PER_WEIGHT * size.vision
    if option == "INT8 quantization":
        seconds = STEP_OVERHEAD_S + QUANTIZE_S_PER_WEIGHT * size.tower * images
        return Cost(disk, quantization_memory(config), seconds)
    return Cost(disk, LIBRARIES_BYTES + 2 * size.tower, STEP_OVERHEAD_S + INT8_S_PER_WEIGHT * size.vision)


def quantization_memory(config: MllamaConfig) -> float:
    """Return the peak bytes of `piecewise.quantize_in_pieces` with one tile per image: at the last pieces, when all
    others are held quantised."""
    vision, size = config.vision_config, weights(config)
    layers = vision.num_hidden_layers + vision.num_global_layers
    longest = min(PIECE_LAYERS, max(vision.num_hidden_layers, vision.num_global_layers))
    piece = 2 * max(size.tower * longest / layers, size.projections)
    return LIBRARIES_BYTES + PIECE_BYTES_PER_BYTE * piece + QUANTIZED_BYTES_PER_BYTE * 2 * size.tower


def answering_memory(config: MllamaConfig, weight_bytes: float) -> float:
    """Return the bytes of answering questions about images with all tiles.

    Args:
        weight_bytes: of all IRs; the plugin's repacked copy in memory is about as large.
    """
    shapes = MllamaShapes.from_config(config)
    largest = picture_memory(shapes, shapes.max_num_tiles)
    cached = min(CACHE_BYTES, 4 * shapes.cross_kv_bytes(shapes.max_num_tiles * shapes.patches_per_tile))
    return LIBRARIES_BYTES + weight_bytes + largest + cached


# ---- Answers ---------------------------------------------------------------------------------------------------------


def measured_format(settings: Settings, own_form: str = "") -> str:
    """Return the format of `measure.FORMATS` nearest to settings: groups of 64 for other 4-bit formats.

    Args:
        own_form: of a language model that is taken over, which settings do not change.
    """
    if own_form in FORMATS:
        return own_form
    name = f"{settings.algo}, groups of {settings.group_size}"
    return (name if name in FORMATS else "int4_asym, groups of 64") if settings.is_int4 else "int8"


def image_seconds(config: MllamaConfig, speed: Speed, tiles: int, form: str = "int8") -> float:
    """Return the seconds of encoding an image.

    Args:
        tiles: of the image; of empty ones a single one is computed.
        form: of the encoder's weights, "16 bit" or "int8"; attention has none.
    """
    vision, size = config.vision_config, weights(config)
    rows = min(tiles + 1, vision.max_num_tiles) * MllamaShapes.from_config(config).patches_per_tile
    layers = vision.num_hidden_layers + vision.num_global_layers
    matrices = rows * size.vision / speed.rate("vision", form, IMAGE)
    attention = 2 * rows**2 * vision.hidden_size * layers / speed.rate("vision", "16 bit", IMAGE)
    return matrices + attention / ATTENTION_EFFICIENCY


def prompt_seconds(config: MllamaConfig | LlamaConfig, speed: Speed, form: str) -> float:
    """Return the seconds of reading a prompt of PROMPT tokens.

    Args:
        form: of the layers' weights, of `measure.FORMATS`.
    """
    products = PROMPT * weights(config).layers / speed.rate("language", form, PROMPT)
    return products / PROMPT_EFFICIENCY + head_seconds(config, speed, form)


def token_seconds(config: MllamaConfig | LlamaConfig, speed: Speed, form: str) -> float:
    """Return the seconds of computing a token behind a short prompt.

    Args:
        form: as for `prompt_seconds`.
    """
    return step_seconds(weights(config).layers, speed, form) + head_seconds(config, speed, form)


def head_seconds(config: MllamaConfig | LlamaConfig, speed: Speed, form: str) -> float:
    """Return the seconds of one token's logits; a head of layers that NNCF has put in 4 bit is in 8 bit."""
    size = weights(config)
    return step_seconds(size.head or size.embedding, speed, "int8" if form.startswith("int") else form)


def step_seconds(count: float, speed: Speed, form: str) -> float:
    """Return the seconds of multiplying one token by so many weights, read from memory."""
    if form == "16 bit":
        return count * 2 / speed.read / READ_EFFICIENCY
    return count / speed.rate("language", form, TOKEN)


# ---- Text -----------------------------------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    """Return bytes as text for people."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Return seconds as text for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else "10 ms or less"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
