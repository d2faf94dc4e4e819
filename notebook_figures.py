"""Figures of the notebook, each with alternative text: predictions, answers, tiles, weights, what variants lose."""

import base64
import io
import json
import textwrap
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure
from scipy.stats import binomtest


def show_picture(picture, alt: str) -> None:
    """Show a picture with alternative text.

    Args:
        picture: PIL picture or matplotlib figure, which is closed.
        alt: what is to be seen.
    """
    file = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(file, format="png", bbox_inches="tight")
        plt.close(picture)
    else:
        picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    source = f"data:image/png;base64,{data}"
    display(HTML(f'<img alt="{escape(alt)}" src="{source}" style="max-width: 100%; height: auto">'))


RESULTS = Path(__file__).resolve().parent / "benchmarks/results"
CPUS = {  # files of `benchmarks.predictions` in RESULTS
    "native": "Zen 5, AVX-512",
    "avx2_vnni": "AVX2 with VNNI,\nsimulated",
    "avx2": "AVX2 alone,\nsimulated",
}
PREDICTED = {  # parts of its figures: format, number of tiles or tokens
    "picture of 1 tile, INT8": ("vision", {"format": "int8_asym"}, 1),
    "prompt of 128 tokens, INT4": ("language", {"format": "int4_asym", "group_size": "64"}, 128),
    "a token, INT4": ("language", {"format": "int4_asym", "group_size": "64"}, 1),
}


def show_predictions(results: Path = RESULTS) -> None:
    """Draw predicted and measured times of a slice of the 11B on three CPUs."""
    figures = {name: json.loads(Path(results, f"predictions-{file}.json").read_text()) for file, name in CPUS.items()}
    figure, axes = plt.subplots(1, len(PREDICTED), figsize=(11, 2.6), layout="constrained", sharey=True)
    places, words = np.arange(len(CPUS)), []
    for axis, (title, part) in zip(axes, PREDICTED.items(), strict=True):
        found = [
            next(f for f in cpu["figures"] if (f["part"], f["stamp"], f["count"]) == part) for cpu in figures.values()
        ]
        for offset, kind, colour in ((-0.2, "predicted", "0.7"), (0.2, "measured", "tab:blue")):
            times = [1000 * row[f"{kind}_s"] for row in found]
            bars = axis.barh(places + offset, times, 0.38, color=colour, label=kind)
            axis.bar_label(bars, [f"{time:.0f}" for time in times], padding=2, fontsize=8)
            words.append(f"{title}, {kind}: {', '.join(f'{time:.0f}' for time in times)} ms")
        axis.set(title=title, xlabel="ms", yticks=places, yticklabels=list(CPUS.values()))
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False, fontsize=8)
    show_picture(figure, f"{'; '.join(name.replace(chr(10), ' ') for name in CPUS.values())}. {'. '.join(words)}")


def show_answers(samples, answers: list[str]) -> None:
    """Show each sample's picture with its question and the model's answer, a long one shortened; if the right ones are
    known, right ones in green, others in red, and the count.

    Args:
        samples: of columns "image", "question" and, if it is known, "answer" (the right one).
    """
    columns = 5 if max(map(len, answers)) < 120 else 2
    rows, letters = -(-len(answers) // columns), 170 // columns  # in a line under a picture
    figure, axes = plt.subplots(rows, columns, figsize=(15, (3.2 if columns == 5 else 5) * rows), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, sample, answer in zip(axes.flat, samples, answers, strict=False):
        expected = sample.get("answer", answer)
        right = answer == expected
        width, height = sample["image"].size
        axis.imshow(sample["image"])
        axis.set_title(f"{width} × {height}\n" + textwrap.fill(sample["question"], letters), fontsize=9)
        shown = textwrap.shorten(answer, 6 * letters, placeholder=" …") + f" (right: {expected})" * (not right)
        axis.text(
            0.5,
            -0.04,
            textwrap.fill(shown, letters),
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color=("green" if right else "red") if "answer" in sample else "black",
        )
    show_picture(figure, " ".join(f"{sample['question']} {a}" for sample, a in zip(samples, answers, strict=True)))
    if all("answer" in sample for sample in samples):
        right = sum(answer == sample["answer"] for answer, sample in zip(answers, samples, strict=True))
        print(f"{right} of {len(answers)} answers are right")


def show_tiles(image, inputs, processor, padding_alike: bool) -> None:
    """Draw a picture as the model receives it: the original, its tiles, the empty ones.

    Args:
        image: PIL picture.
        inputs: what the processor made of it.
        padding_alike: one of the empty tiles is computed for all (`OVImageEncoder.padding_alike`), else each.
    """
    settings = processor.image_processor
    mean, std = (np.array(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
    tiles = (inputs["pixel_values"][0, 0].numpy() * std + mean).clip(0, 1).transpose(0, 2, 3, 1)
    real, count = int(inputs["aspect_ratio_mask"][0, 0].sum()), len(tiles)
    figure, axes = plt.subplots(1, 1 + count, figsize=(2.4 * (1 + count), 2.9), layout="constrained")
    axes[0].imshow(image)
    axes[0].set_title(f"the picture, {image.width} × {image.height}", fontsize=10)
    for number, axis in enumerate(axes[1:]):
        if number < real:
            axis.imshow(tiles[number])
            axis.set_title(f"tile {number + 1}", fontsize=10)
            continue
        computed = number == real or not padding_alike
        axis.imshow(np.full((1, 1, 3), 0.75 if computed else 0.95))
        stands_for = f", stands for {count - real}" if padding_alike else ""
        axis.set_title(f"empty{stands_for}" if computed else "empty, not computed", fontsize=10)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    empty = f", and {count - real} empty ones" * (count > real)
    show_picture(figure, f"A picture of {image.width} by {image.height} pixels, its {real} tiles{empty}")


def show_attention(image, words: list[str], maps: list[np.ndarray]) -> None:
    """Draw where each word of an answer looks: heat maps over the picture, from 0 to each one's peak.

    Args:
        image: PIL picture.
        maps: f32 [height, width], as `ov_mllama.runtime.attention_maps.image_attention` returns them.
    """
    if not words:
        return
    columns = min(len(words), 5)
    rows = -(-len(words) // columns)
    size = (2.4 * columns, rows * (2.4 * image.height / image.width + 0.35))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    places, extent = [], (0, image.width, image.height, 0)
    for axis in axes.flat:
        axis.axis("off")
    for axis, word, heat in zip(axes.flat, words, maps, strict=False):
        axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255, extent=extent)
        axis.imshow(heat, cmap="inferno", alpha=0.65, vmin=0, extent=extent)
        axis.set_title(word, fontsize=10)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        places.append(f"{word} {100 * x // heat.shape[1]} % from the left, {100 * y // heat.shape[0]} % from the top")
    show_picture(figure, f"Heat maps of the cross-attention, with their peaks: {'; '.join(places)}")


def show_weights(before: np.ndarray, after: np.ndarray, group_size: int, name: str) -> None:
    """Draw a layer's weights before and after compression: all of them, two groups of a row, and the groups' scales.

    Args:
        before, after: f32 [rows, channels], as the layer multiplies with them; of many rows the first ones are drawn.
        group_size: weights of a row that share a scale, -1 for all.
    """
    before, after = before[:256], after[:256]
    size = group_size if group_size > 0 else before.shape[1]
    figure, (every, groups, scales) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    bins = np.linspace(before.min(), before.max(), 120)
    every.hist(before.ravel(), bins, color="tab:blue", label="before")
    every.hist(after.ravel(), bins, histtype="step", color="tab:orange", label="after")
    every.set(title=f"{before.size:,} weights", xlabel="value", ylabel="weights", yscale="log")
    every.legend(frameon=False)
    for start in range(0, min(2 * size, before.shape[1]), size):
        columns = np.arange(start, start + size)
        groups.hlines(np.unique(after[0, columns]), start, start + size - 1, color="0.85", linewidth=0.8)
        groups.plot(columns, before[0, columns], ".", color="tab:blue", markersize=4)
        groups.plot(columns, after[0, columns], "_", color="tab:orange", markersize=6)
    groups.set(title=f"groups of {size}: each has its levels", xlabel="channel of the first row")
    gaps = np.diff(np.sort(after.reshape(-1, size)))
    steps = np.where(gaps > 1e-6 * np.abs(after).max(), gaps, np.inf).min(-1)
    scales.hist(steps, 60, color="tab:green")
    scales.set(title=f"{len(steps):,} groups, a scale each", xlabel="from one level to the next", ylabel="groups")
    alt = f"{name}: histograms of its weights before and after, two groups of them with their levels, and all scales"
    show_picture(figure, alt)


def show_price_list(rows: list[dict]) -> None:
    """Show what each variant costs: a table, a plot of what it loses with intervals of two standard errors, and which
    differences are significant, if right answers are known.

    Args:
        rows: as `ov_mllama.export.quality.price_list` returns them.
    """
    table = pd.DataFrame(rows).set_index("variant")
    known = "all" in table
    if known:
        error = 200 * np.sqrt(table["all"] / 100 * (1 - table["all"] / 100) / table["questions"])  # binomial
        right = [f"{share:.1f} ± {interval:.1f}" for share, interval in zip(table["all"], error, strict=True)]
        shown = table[["size_mb", "first_token_ms", "next_token_ms", "lost", "won"]].round(1)
        shown.insert(3, "right, %", right)
        pairs = zip(1e5 * table["kl"], 2e5 * table["kl_error"], strict=True)
        shown["kl × 10⁵"] = [f"{kl:.1f} ± {interval:.1f}" for kl, interval in pairs]
        display(shown)
    else:
        display(table.round({name: 4 if name.startswith("kl") else 1 for name in table}))
    shape = {"figsize": (11 if known else 7, 1.2 + 0.3 * len(table)), "layout": "constrained", "sharey": True}
    figure, axes = plt.subplots(1, 1 + known, squeeze=False, **shape)
    axes[0, -1].errorbar(table["kl"], table.index, xerr=2 * table["kl_error"], fmt="o", capsize=3)
    axes[0, -1].set(xlabel="kl: divergence from the original, nats a token")
    if known:
        axes[0, 0].errorbar(table["all"], table.index, xerr=error, fmt="o", capsize=3)
        axes[0, 0].set(xlabel=f"right answers of {table['questions'].iloc[0]}, %")
    axes[0, -1].ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
    axes[0, 0].invert_yaxis()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    show_picture(figure, "For each variant: what it loses, with intervals of two standard errors; numbers in the table")
    if known:
        print(textwrap.fill(conclusion(table), 110))


def conclusion(table: pd.DataFrame) -> str:
    """Return a sentence on which variants differ significantly from the first row, by a sign test on `lost` and `won`
    (answers right in both or wrong in both carry no information), with Bonferroni's correction for their number."""
    others = table.iloc[1:]
    rare = 0.05 / len(others)
    counts = zip(others.index, others["lost"].tolist(), others["won"].tolist(), strict=True)
    apart = [name for name, lost, won in counts if lost + won and binomtest(lost, lost + won).pvalue < rare]
    words = f"Of {table['questions'].iloc[0]} questions, the variants answer up to {others['lost'].max()} wrong that "
    words += f"{table.index[0]} has right, and up to {others['won'].max()} the other way round. "
    if apart:
        return words + f"More than chance makes of {len(others)} variants: {', '.join(apart)}."
    return words + f"Chance alone may well make that of {len(others)} variants as good as it."


def show_references(layers: int, indices: list[int], reads: str) -> None:
    """Draw which states of the vision encoder's layers the projector reads, in each version of the code.

    Args:
        layers: of the local encoder.
        indices: `intermediate_layers_indices` of the checkpoint.
        reads: what this model's projector reads, the layers' "inputs" or their "outputs".
    """
    inputs, outputs = set(indices), {index + 1 for index in indices}
    rows = {
        "Meta's code; transformers to 4.54": inputs,
        "transformers 4.55.0 to 4.55.2": {layers},
        "transformers since 4.56": outputs,
        "this model": inputs if reads == "inputs" else outputs,
    }
    figure, axis = plt.subplots(figsize=(min(4 + 0.6 * layers, 13), 2.6), layout="constrained")
    for height, (name, read) in enumerate(reversed(rows.items())):
        for layer in range(layers):
            axis.add_patch(plt.Rectangle((layer + 0.2, height - 0.25), 0.6, 0.5, color="0.88"))
            if layers < 12 or layer in inputs:
                axis.text(layer + 0.5, height, str(layer), ha="center", va="center", fontsize=8, color="0.4")
        colour = "tab:green" if name == "this model" else "tab:blue"
        axis.plot(range(layers + 1), [height] * (layers + 1), ".", color="0.6", markersize=3)
        axis.plot(sorted(read), [height] * len(read), "o", color=colour, markersize=9 if layers < 12 else 6)
    axis.set(xlim=(-0.4, layers + 0.4), ylim=(-0.6, len(rows) - 0.4), xticks=[0, layers], yticks=range(len(rows)))
    axis.set_xticklabels(["embedding", "last state"])
    axis.set_yticklabels(reversed(rows))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    read = "; ".join(f"{name}: {', '.join(map(str, sorted(states)))}" for name, states in rows.items())
    show_picture(figure, f"States of {layers} vision layers that the projector reads, the embedding being 0. {read}")
