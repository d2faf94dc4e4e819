"""The small things that notebook cells need: versions, resources, a device list, evidence, and a run without a screen.

It knows files, OpenVINO devices and notebooks, nothing of what the model computes.
"""

import ast
import base64
import importlib.metadata
import io
import platform
import re
import textwrap
from html import escape
from pathlib import Path

import httpx
import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import openvino as ov
import pandas as pd
import psutil
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from tqdm.auto import tqdm

GB = 1e9


def show_versions(*packages: str) -> None:
    """Prints the processor and the versions of Python and `packages`: whoever compares figures later needs them."""
    print(f"{ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}, {psutil.cpu_count(logical=False)} cores")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    print(", ".join([f"Python {platform.python_version()}", *versions]))


def show_plan(plan) -> None:
    """Shows what is free here, each step with its time, memory and disk, and what there is too little of.

    Args:
        plan: `ov_mllama.plan.Plan`.
    """
    print(f"Free: {plan.machine.memory / GB:.0f} GB of memory, {plan.machine.disk / GB:.0f} GB of disk.", *plan.lacking)
    display(Markdown(str(plan)))


def download_file(url: str, filename: str | Path | None = None, directory: str | Path = ".") -> Path:
    """Fetches a file over http(s), its certificate checked, whole or not at all; one that is there already is kept.

    Args:
        filename: default the last part of the address.
    Returns:
        its path.
    Raises:
        httpx.HTTPError: it could not be fetched.
    """
    path = Path(directory) / (filename or Path(httpx.URL(url).path).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with httpx.stream("GET", url, follow_redirects=True, timeout=30) as response:
            response.raise_for_status()
            part = path.with_name(f".{path.name}.part")
            with part.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
        part.replace(path)
    return path


def device_widget(default: str = "CPU", exclude: tuple[str, ...] | list[str] = ()) -> ipywidgets.Dropdown:
    """A drop-down of this machine's OpenVINO devices; its `.value` is usable without a browser too.

    Args:
        default: the device chosen at first; "AUTO" where this machine lacks it.
        exclude: devices not to offer, such as "NPU".
    """
    devices = [name for name in [*ov.Core().available_devices, "AUTO"] if name not in exclude]
    return ipywidgets.Dropdown(options=devices, value=default if default in devices else "AUTO", description="Device:")


def show_picture(picture, alt: str) -> None:
    """Shows a picture, with words for those who cannot see it.

    Args:
        picture: PIL picture or matplotlib figure, which is closed.
        alt: what is to be seen.
    """
    file = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(file, format="png")
        plt.close(picture)
    else:
        picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    source = f"data:image/png;base64,{data}"
    display(HTML(f'<img alt="{escape(alt)}" src="{source}" style="max-width: 100%; height: auto">'))


def ir_megabytes(ir_path: Path) -> float:
    """Of both its files on disk; 0 where it was never written."""
    return sum(path.stat().st_size for path in (ir_path, ir_path.with_suffix(".bin")) if path.is_file()) / 1e6


def show_ports(ir_path: Path) -> None:
    """Prints what an IR takes and gives: names, element types and shapes (? is any length), and its size on disk."""
    model = ov.Core().read_model(ir_path)
    print(f"{ir_path.name}: {ir_megabytes(ir_path):.1f} MB, {len(model.get_variables())} states")
    for direction, ports in (("takes", model.inputs), ("gives", model.outputs)):
        for port in ports:
            shape = port.partial_shape.to_string()
            print(f"  {direction} {port.get_any_name():<32} {port.element_type.get_type_name()} {shape}")


def show_answers(samples, answers: list[str]) -> None:
    """Shows each sample's picture with its question and the model's answer, a long one shortened; where the right ones
    are known, green if it is that, else red, and their count.

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
    """Draws how the model gets a picture: whole, then its tiles, then the empty ones.

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


def show_sizes(original: Path, smaller: Path) -> None:
    """Prints the size on disk of two IRs; of the smaller one alone where the original was never written."""
    size, whole = ir_megabytes(smaller), ir_megabytes(original) if smaller != original else 0
    if whole:
        print(f"{whole:10.1f} MB: {original.name}")
    times = f", {whole / size:.1f} times smaller" * (whole > 1.05 * size)
    print(f"{size:10.1f} MB{times}: {smaller.name}")


def show_weights(before: np.ndarray, after: np.ndarray, group_size: int, name: str) -> None:
    """Draws a layer's weights before and after compression: all of them, two groups of a row, and the groups' scales.

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
    """Shows what each variant costs: a table, a plot of what it loses with intervals of two standard errors, and where
    right answers are known, what so many questions can tell.

    Args:
        rows: as `ov_mllama.quality.price_list` returns them.
    """
    table = pd.DataFrame(rows).set_index("variant")
    known = "all" in table
    if known:
        error = 200 * np.sqrt(table["all"] / 100 * (1 - table["all"] / 100) / table["questions"])  # binomial
        right = [f"{share:.1f} ± {interval:.1f}" for share, interval in zip(table["all"], error, strict=True)]
        kept = table[["size_mb", "first_token_ms", "next_token_ms", "lost", "won", "kl", "kl_error"]]
        kept.insert(3, "right_%", right)
        display(kept.round({name: 5 if name.startswith("kl") else 1 for name in kept}))
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
        print(conclusion(table))


def conclusion(table: pd.DataFrame) -> str:
    """What can be said of variants that were asked the same questions: an answer that is right in both or wrong in both
    tells nothing, so that the difference of `won` and `lost` has a standard error of the root of their sum."""
    others = table.iloc[1:]
    difference, noise = others["won"] - others["lost"], 2 * np.sqrt(others["won"] + others["lost"])
    apart = others.index[(difference.abs() > noise)]
    words = f"Of {table['questions'].iloc[0]} questions, the variants answer up to {others['lost'].max()} wrong that "
    words += f"{table.index[0]} has right, and up to {others['won'].max()} the other way round. "
    if len(apart):
        return words + f"More than chance tells (two standard errors): {', '.join(apart)}."
    return words + "No difference is larger than chance makes it (two standard errors)."


def settings(source: str, given: dict) -> dict:
    """What is given for a notebook's parameters, with the types of their defaults: "False" of a command line is False.

    Args:
        source: of the cell with the defaults, one `NAME = value` a line.
    Raises:
        ValueError: a name that is none of theirs, a value of another type.
    """
    defaults = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}
    values = {}
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"'{name}' is none of the notebook's settings: {', '.join(defaults)}.")
        kind = type(defaults[name])
        try:
            values[name] = ast.literal_eval(value) if isinstance(value, str) and kind is not str else value
        except (ValueError, SyntaxError):
            values[name] = None
        if not isinstance(values[name], kind):
            raise ValueError(f"{name}={value} must be like {defaults[name]!r}.")
    return values


def execute(notebook: str | Path, out_dir: str | Path, timed: bool = False, **parameters) -> Path:
    """Runs a notebook from top to bottom without a screen and prints its answers.

    Args:
        notebook: the .ipynb, run in its own folder and left as it is.
        out_dir: folder for the executed copy, as .ipynb and .html.
        timed: leave in each cell's metadata when it ran.
        parameters: values that replace those of the cell tagged "parameters", as `settings` takes them.
    Returns:
        path of the executed .ipynb.
    Raises:
        ValueError: as `settings`.
        nbclient.exceptions.CellExecutionError: a cell failed; the copy holds all that ran, with the error.
    """
    notebook, out_dir = Path(notebook), Path(out_dir)
    nb = nbformat.read(notebook, as_version=4)
    if parameters:
        index = next(i for i, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", []))
        values = settings(nb.cells[index].source, parameters)
        source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        nb.cells.insert(index + 1, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]}))

    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / notebook.name
    with tqdm(
        total=sum(cell.cell_type == "code" for cell in nb.cells), desc=f"Running {notebook.name}", unit="cell"
    ) as bar:
        client = NotebookClient(
            nb,
            timeout=None,
            coalesce_streams=True,
            record_timing=timed,
            resources={"metadata": {"path": str(notebook.parent)}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            on_cell_executed=lambda **_: bar.update(),
        )
        try:
            client.execute()
        finally:
            nb.metadata.pop("widgets", None)
            for cell in nb.cells:
                if cell.cell_type == "code":
                    shown = (readable(output, cell.metadata.get("picture")) for output in cell.outputs)
                    cell.outputs = [output for output in shown if output]
            nbformat.write(nb, path)
            where = {"metadata": {"path": str(notebook.parent)}}  # of the pictures that its text shows
            html, _ = HTMLExporter(embed_images=True).from_notebook_node(nb, where)
            path.with_suffix(".html").write_text(html, encoding="utf-8")

    for cell in nb.cells:
        if "answer" in cell.metadata.get("tags", []):
            print("".join(output.text for output in cell.outputs if output.output_type == "stream").rstrip())
    print(f"\nThe executed notebook is {path} and, for any browser, {path.with_suffix('.html')}")
    return path


def readable(output, picture: str | None = None):
    """An output without what only a live kernel can show: bars and pages become nothing, a widget its picture or text.

    Args:
        picture: of the cell's widget, in Markdown, `![words](docs/....png)`.
    """
    data = output.get("data", {})
    widget, text = data.pop("application/vnd.jupyter.widget-view+json", None), data.get("text/plain")
    is_tqdm = widget and not re.match(r"\w+\(", text)  # other widgets print as Name(...)
    is_rich = text in ("", "Output()")  # NNCF's bars: a widget to draw in, and an empty last frame
    is_page = "<iframe" in "".join(data.get("text/html", ""))  # the chat, whose server ends with the kernel
    if is_tqdm or is_rich or is_page:
        return None
    if widget and picture:
        data["text/markdown"] = picture
    return output
