"""Helpers of notebook cells: versions, the log, a plan, devices, ports, sizes and times of IRs, headless execution.

Figures are in `notebook_figures.py`.
"""

import ast
import base64
import copy
import importlib.metadata
import mimetypes
import platform
import re
from pathlib import Path

import ipywidgets
import openvino as ov
import psutil
import torch
from IPython.display import Markdown, display
from tqdm.auto import tqdm

from ov_mllama import cli
from ov_mllama.runtime.measure import PROMPT

GB = 1e9


def show_log() -> None:
    """Show the package's log in the cells that run, once however often it is called."""
    cli.show_log()


def show_versions(*packages: str) -> None:
    """Print the processor and the versions of Python and `packages`, for comparing figures later."""
    print(f"{ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}, {psutil.cpu_count(logical=False)} cores")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    print(", ".join([f"Python {platform.python_version()}", *versions]))


def follow(model, reference):
    """Make a model of transformers follow the reference of IRs, by hooks on its layers, and return it.

    Args:
        model: `MllamaForConditionalGeneration` of transformers 5.
        reference: `ov_mllama.runtime.reference.Reference`.
    Returns:
        the model.
    """

    def read_inputs(encoder, args, output):  # states by index are then what goes into each layer
        output.hidden_states = (args[0], *output.hidden_states)

    def leave_alone(layer, args, kwargs, output):  # tokens that see no image come out as they went in
        return torch.where(kwargs["full_text_row_masked_out_mask"][:, 0] > 0, output, args[0])

    text = model.model.language_model
    if reference.vision_layers == "inputs":
        model.model.vision_model.transformer.register_forward_hook(read_inputs)
    for index in text.config.cross_attention_layers if reference.row_mask == "on" else ():
        text.layers[index].register_forward_hook(leave_alone, with_kwargs=True)
    return model


def show_plan(plan) -> None:
    """Show free memory and disk, the time, memory and disk of each step, and shortfalls.

    Args:
        plan: `ov_mllama.export.plan.Plan`.
    """
    print(
        f"Free: {plan.machine.memory / GB:.0f} GB of memory, {plan.machine.disk / GB:.0f} GB of disk.", *plan.shortfalls
    )
    display(Markdown(str(plan)))


def device_widget(default: str = "CPU", exclude: tuple[str, ...] | list[str] = ()) -> ipywidgets.Dropdown:
    """Return a drop-down of this machine's OpenVINO devices; its `.value` is usable without a browser too.

    Args:
        default: the device chosen at first; "AUTO" where this machine lacks it.
        exclude: devices not to offer, such as "NPU".
    """
    devices = [name for name in [*ov.Core().available_devices, "AUTO"] if name not in exclude]
    return ipywidgets.Dropdown(options=devices, value=default if default in devices else "AUTO", description="Device:")


def ir_megabytes(ir_path: Path) -> float:
    """Return the size of an IR's two files; 0 if it does not exist."""
    return sum(path.stat().st_size for path in (ir_path, ir_path.with_suffix(".bin")) if path.is_file()) / 1e6


def show_ports(ir_path: Path) -> None:
    """Print an IR's inputs and outputs with element types and shapes (? is any length), and its size on disk."""
    model = ov.Core().read_model(ir_path)
    print(f"{ir_path.name}: {ir_megabytes(ir_path):.1f} MB, {len(model.get_variables())} states")
    for direction, ports in (("takes", model.inputs), ("gives", model.outputs)):
        for port in ports:
            shape = port.partial_shape.to_string()
            print(f"  {direction} {port.get_any_name():<32} {port.element_type.get_type_name()} {shape}")


def show_sizes(original: Path, smaller: Path) -> None:
    """Print the size on disk of two IRs; of the smaller one alone if the original was not written."""
    size, whole = ir_megabytes(smaller), ir_megabytes(original) if smaller != original else 0
    if whole:
        print(f"{whole:10.1f} MB: {original.name}")
    times = f", {whole / size:.1f} times smaller" * (whole > 1.05 * size)
    print(f"{size:10.1f} MB{times}: {smaller.name}")


def measured_seconds(model, processor, picture, rounds: int) -> dict[str, float]:
    """Return the fastest seconds of encoding a picture of one, two and four tiles, of a text prompt, and of a token.

    Args:
        model: `OVMLlamaForConditionalGeneration`; its caches are emptied.
        processor: that belongs to it.
        picture: PIL picture, resized to fill the tiles.
        rounds: measurements of each.
    """
    tile, times = processor.image_processor.size["height"], {}
    prompt = processor.tokenizer("word " * PROMPT, max_length=PROMPT, truncation=True, return_tensors="pt")
    for _ in range(rounds):
        for across, down in ((1, 1), (2, 1), (2, 2)):
            model.forget()
            resized = picture.resize((across * tile, down * tile))
            batch = processor(text="<|image|>", images=[resized], return_tensors="pt")
            pixels = (batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
            times.setdefault(f"{across * down}-tile picture", []).append(sum(model.encode_images(*pixels)))
        model.forget()
        model.generate(**prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        first, *rest = model.llm_infer_time
        times.setdefault(f"prompt, {PROMPT} tokens", []).append(first)
        times.setdefault("token", []).extend(rest)
    return {name: min(seconds) for name, seconds in times.items()}


def settings(source: str, given: dict) -> dict:
    """Return a notebook's parameters with the types of their defaults: "False" of a command line is False.

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
    """Execute a notebook headless and print its answers.

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
    import nbformat  # these take seconds to import, and no cell needs them
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

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
            html, _ = HTMLExporter().from_notebook_node(with_pictures(nb, notebook.parent))
            path.with_suffix(".html").write_text(html, encoding="utf-8")

    for cell in nb.cells:
        if "answer" in cell.metadata.get("tags", []):
            print("".join(output.text for output in cell.outputs if output.output_type == "stream").rstrip())
    print(f"\nThe executed notebook is {path} and, for any browser, {path.with_suffix('.html')}")
    return path


def with_pictures(nb, folder: Path):
    """Return a copy of a notebook with its text's pictures embedded. (HTMLExporter's own `embed_images` closes each
    <details> at its first line, so that nothing stays folded.)

    Args:
        folder: of the notebook.
    """

    def held(match) -> str:
        file = folder / match[2]
        data = base64.b64encode(file.read_bytes()).decode() if file.is_file() else ""
        return f"{match[1]}data:{mimetypes.guess_type(file)[0]};base64,{data})" if data else match[0]

    def filled(markdown: str) -> str:
        return re.sub(r"(!\[[^\]]*\]\()([^):]+)\)", held, markdown)

    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = filled(cell.source)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = filled(output.data["text/markdown"])
    return nb


def readable(output, picture: str | None = None):
    """Return an output without what only a live kernel can show: no bars and pages, a widget's picture or text instead.

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
