"""Compression settings: their defaults, and which of them go together.

NNCF is not imported here: plans are made before anything is traced, and NNCF patches functions that torch traces.
"""

import re
from dataclasses import dataclass, fields

from transformers import LlamaConfig, MllamaConfig

from ov_mllama.runtime.devices import Cpu
from ov_mllama.runtime.errors import InputError

INT4, INT8 = ("int4_asym", "int4_sym"), ("int8_asym", "int8_sym")
GROUP_SIZES = (32, 64, 128, -1)
# Options for the vision encoder, and the suffix of the file name of each
VISION_OPTIONS = {"FP16": "", "INT8 quantization": "_int8", "INT8 weights compression": "_int8_wc"}
# On a CPU without VNNI 4-bit weights become f32 again for each token: symmetric ones, with fewer scales, soonest
# (docs/costs.md, "Defaults by CPU"); on other CPUs the defaults of `Settings`
WITHOUT_VNNI = ("int4_sym", 128)
# On all devices: the calibrated encoder takes 0.65 to 0.8 of the time, with up to ten times the error relative to 16
# bit (benchmarks/README.md, "Precision")
DEFAULT_VISION_OPTION = "INT8 weights compression"
# Of calibration samples: the hub's or, without network, those of `ov_mllama/export/samples.py`
DEFAULT_SOURCES = ("lmms-lab/flickr30k", "photographs of installed packages")
DATA_FREE_METRIC = "weight_quantization_error"
DATA_METRIC = "max_activation_variance"  # the default with data, as in the published notebook


def vision_options(cpu: Cpu | None = None) -> list[str]:
    """Return the VISION_OPTIONS to offer on a CPU: without VNNI the calibrated encoder is slower than 16 bit."""
    return [option for option in VISION_OPTIONS if (cpu or Cpu.here()).in_8_bit or option != "INT8 quantization"]


def own_name(form: str) -> str:
    """Return the file name of a language model in its checkpoint's own format, such as llm_q4_k_m.xml."""
    return f"llm_{form}.xml"


@dataclass(frozen=True)
class Settings:
    """Compression settings of the language model's weights.

    A new setting needs its default and documentation here, its place in `file_name` and `compress.nncf_arguments`, and
    perhaps a widget in `ov_mllama_compression.py`.

    Attributes:
        algo: "int4_asym", "int4_sym", "int8_asym" or "int8_sym" (or nncf.CompressWeightsMode's members).
        ratio: share of the weights in 4 bit, 0 to 1, by layers; the others, chosen by `sm`, get 8.
        sm: sensitivity metric (nncf.SensitivityMetric). Default with data DATA_METRIC, without DATA_FREE_METRIC.
        awq: activation-aware scaling; without data, from the weights alone. For the 11B it needs more than 16 GB.
        scale_estimation, lora, gptq: corrections that need data.
        group_size: weights that share a scale: 32, 64, 128, or -1 for a channel. INT8: -1, the default of `of`.
        all_layers: embedding and `lm_head` in 4 bit as well, else in 8.
        dataset_size: calibration samples; 0 for none.
        int8_layers: layers left in 8 bit, by the end of their names, such as "cross_attn.o_proj"; one or several.

    Raises:
        InputError: if `int8_layers` are not names of layers.
    """

    algo: str = "int4_asym"
    ratio: float = 1.0
    sm: str | None = None
    awq: bool = False
    scale_estimation: bool = False
    lora: bool = False
    gptq: bool = False
    group_size: int = 64
    all_layers: bool = False
    dataset_size: int = 0
    int8_layers: tuple[str, ...] = ()

    def __post_init__(self):
        names = self.int8_layers or ()
        names = (names,) if isinstance(names, str) else tuple(names)
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in names):
            raise InputError(f"int8_layers={names}: give names of layers, such as ('cross_attn.o_proj',).")
        object.__setattr__(self, "int8_layers", names)

    @classmethod
    def here(cls, cpu: Cpu | None = None) -> "Settings":
        """Return the default settings for a CPU, this machine's if none is given."""
        if (cpu or Cpu.here()).in_8_bit:
            return cls()
        algo, group_size = WITHOUT_VNNI
        return cls(algo, group_size=group_size)

    @classmethod
    def of(cls, **settings) -> "Settings":
        """Return settings with the given values, and defaults that go with them for the rest.

        Without `algo` and `group_size` these are the defaults for this machine's CPU.

        Raises:
            TypeError: for a setting that does not exist.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise TypeError(f"There is no setting {', '.join(unknown)}: there are {', '.join(known)}.")
        for name in ("algo", "sm"):
            settings[name] = getattr(settings.get(name), "value", settings.get(name))  # an NNCF enum's member, or text
        if not (settings["algo"] or settings.get("group_size")):
            settings |= {name: getattr(cls.here(), name) for name in ("algo", "group_size")}
        settings["algo"] = settings["algo"] or cls.algo
        settings["group_size"] = settings.get("group_size") or (64 if settings["algo"] in INT4 else -1)
        settings["sm"] = settings["sm"] or (DATA_METRIC if settings.get("dataset_size") else None)
        return cls(**settings)

    @property
    def is_int4(self) -> bool:
        """True if any layer may be in 4 bit."""
        return self.algo in INT4

    @property
    def file_name(self) -> str:
        """File name of the IR, such as llm_int4_asym_r10_gs64_max_activation_variance_awq_scale_all_layers.xml."""
        parts = ["llm", self.algo]
        if self.is_int4:
            parts += [f"r{self.ratio * 10:g}", f"gs{self.group_size}"]
        flags = {
            self.sm: self.sm,
            "awq": self.awq,
            "scale": self.scale_estimation,
            "lora": self.lora,
            "gptq": self.gptq,
            "all_layers": self.all_layers,
        }
        parts += [name for name, chosen in flags.items() if name and chosen]
        parts += [f"int8_{name}" for name in self.int8_layers]
        return "_".join(parts) + ".xml"

    def check(self, config: MllamaConfig | LlamaConfig) -> None:
        """Refuse settings that NNCF would refuse, some of them only after minutes.

        Raises:
            InputError: with the reason and the nearest settings that work.
        """
        with_data = [name for name in ("scale_estimation", "lora", "gptq") if getattr(self, name)]
        if self.sm not in (None, DATA_FREE_METRIC):
            with_data.append(f"sm='{self.sm}'")
        if self.algo not in INT4 + INT8:
            raise InputError(f"algo='{self.algo}' is none of {', '.join(INT4 + INT8)}.")
        if self.dataset_size < 0:
            raise InputError(f"dataset_size={self.dataset_size} is not a number of samples: use 0 for none, or 32.")
        if self.algo in INT8:
            only_int4 = with_data + [name for name in ("awq", "all_layers", "sm", "int8_layers") if getattr(self, name)]
            only_int4 += ["ratio"] * (self.ratio != 1) + ["group_size"] * (self.group_size != -1)
            only_int4 += ["dataset_size"] * (self.dataset_size > 0)
            if only_int4:
                raise InputError(
                    f"{self.algo} compresses every layer to 8 bit, one scale a channel, without data: leave out "
                    f"{', '.join(dict.fromkeys(only_int4))}, or choose algo='int4_asym'."
                )
            return
        if not 0 <= self.ratio <= 1:
            raise InputError(f"ratio={self.ratio} is a share of the layers: use 0 (none in 4 bit) to 1 (all).")
        if with_data and not self.dataset_size:
            raise InputError(
                f"{', '.join(with_data)} need calibration samples: set dataset_size=32, or leave them out (awq works "
                "without data too)."
            )
        if self.gptq and self.lora:
            raise InputError("gptq and lora exclude each other: set one of them to False.")
        text = getattr(config, "text_config", config)
        channels = (text.hidden_size, text.intermediate_size)
        if self.group_size != -1 and (self.group_size < 1 or any(channel % self.group_size for channel in channels)):
            fitting = [size for size in GROUP_SIZES if size == -1 or not any(c % size for c in channels)]
            raise InputError(
                f"group_size={self.group_size} does not divide this model's {channels[0]} and {channels[1]} channels: "
                f"use one of {', '.join(map(str, fitting))} (-1: one group a channel)."
            )
