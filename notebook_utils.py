"""The small things that notebook cells need: versions, resources, a device list, evidence, and a run without a screen.

It knows files, OpenVINO devices and notebooks, nothing of what the model computes.
"""

import ast
import importlib.metadata
import platform
import re
import textwrap
from pathlib import Path

import httpx
import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import openvino as ov
import pandas as pd
import psutil
from IPython.display import Markdown, display
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


def show_ports(ir_path: Path) -> None:
    """Prints what an IR takes and gives: names, element types and shapes (? is any length), and its size on disk."""
    model = ov.Core().read_model(ir_path)
    size = sum(path.stat().st_size for path in (ir_path, ir_path.with_suffix(".bin")))
    print(f"{ir_path.name}: {size / 1e6:.1f} MB, {len(model.get_variables())} states")
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
    plt.show()
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
    plt.show()


def show_sizes(original: Path, smaller: Path) -> None:
    """Prints the size on disk of two IRs; of the smaller one alone where the original was never written."""
    size, whole = (path.with_suffix(".bin").stat().st_size if path.is_file() else 0 for path in (smaller, original))
    if whole and smaller != original:
        print(f"{whole / 1e6:10.1f} MB: {original.name}")
    times = f", {whole / size:.1f} times smaller" * (whole > size)
    print(f"{size / 1e6:10.1f} MB{times}: {smaller.name}")


def show_price_list(rows: list[dict]) -> None:
    """Shows what each variant costs: a table, and a plot over size on disk of what it loses: exact match where that is
    known, else divergence, with two standard errors.

    Args:
        rows: as `ov_mllama.quality.price_list` returns them.
    """
    table = pd.DataFrame(rows).set_index("variant")
    display(table.round({name: 4 if name.startswith("kl") else 1 for name in table}))
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    known = "all" in table
    size, lost = ("size_mb", "all") if known else ("size_gb", "kl")
    for name, row in table.iterrows():
        error = None if known else 2 * row["kl_error"]
        axis.errorbar(row[size], row[lost], yerr=error, fmt="o", capsize=3, label=name)
    axis.set(
        xlabel=f"size on disk, {'MB' if known else 'GB'}",
        ylabel="exact match, %" if known else "divergence, nats a token",
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    plt.show()


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
                    cell.outputs = [output for output in map(readable, cell.outputs) if output]
            nbformat.write(nb, path)
            path.with_suffix(".html").write_text(HTMLExporter().from_notebook_node(nb)[0], encoding="utf-8")

    for cell in nb.cells:
        if "answer" in cell.metadata.get("tags", []):
            print("".join(output.text for output in cell.outputs if output.output_type == "stream").rstrip())
    print(f"\nThe executed notebook is {path} and, for any browser, {path.with_suffix('.html')}")
    return path


def readable(output):
    """An output without what only a live kernel can show: a widget becomes its text, bars and pages nothing."""
    data = output.get("data", {})
    widget, text = data.pop("application/vnd.jupyter.widget-view+json", None), data.get("text/plain")
    is_tqdm = widget and not re.match(r"\w+\(", text)  # other widgets print as Name(...)
    is_rich = text in ("", "Output()")  # NNCF's bars: a widget to draw in, and an empty last frame
    is_page = "<iframe" in "".join(data.get("text/html", ""))  # the chat, whose server ends with the kernel
    return None if is_tqdm or is_rich or is_page else output
