"""The small things that notebook cells need: versions, resources, a device list, evidence, and a run without a screen.

It knows files, OpenVINO devices and notebooks, nothing of what the model computes.
"""

import importlib.metadata
import platform
import shutil
from pathlib import Path

import ipywidgets
import nbformat
import openvino as ov
import psutil
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from tqdm.auto import tqdm

GB = 1e9


def show_versions(*packages: str) -> None:
    """Prints the processor and the versions of Python and `packages`: whoever compares figures later needs them."""
    print(f"{ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}, {psutil.cpu_count(logical=False)} cores")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    print(", ".join([f"Python {platform.python_version()}", *versions]))


def show_resources(model_id: str | Path, model_dir: Path) -> None:
    """Prints the size of a local checkpoint, free disk where `model_dir` will be, and free memory."""
    weights = [path.stat().st_size for path in Path(model_id).glob("*.safetensors")]
    size = f"{sum(weights) / GB:.3g} GB of weights" if weights else "not on this disk yet"
    existing = next(folder for folder in [model_dir, *model_dir.resolve().parents] if folder.is_dir())
    disk, memory = shutil.disk_usage(existing).free, psutil.virtual_memory().available
    print(f"{model_id}: {size}; free: {disk / GB:.0f} GB of disk, {memory / GB:.0f} GB of memory")


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


def execute(notebook: str | Path, out_dir: str | Path, **parameters) -> Path:
    """Runs a notebook from top to bottom without a screen and prints its answers.

    Args:
        notebook: the .ipynb, run in its own folder and left as it is.
        out_dir: folder for the executed copy, as .ipynb and .html.
        parameters: values that replace those of the cell tagged "parameters".
    Returns:
        path of the executed .ipynb.
    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the copy holds all that ran, with the error.
    """
    notebook, out_dir = Path(notebook), Path(out_dir)
    nb = nbformat.read(notebook, as_version=4)
    if parameters:
        index = next(i for i, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", []))
        source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        nb.cells.insert(index + 1, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]}))

    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / notebook.name
    with tqdm(total=len(nb.cells), desc=f"Running {notebook.name}", unit="cell") as bar:
        client = NotebookClient(
            nb,
            timeout=None,
            record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": str(notebook.parent)}},
            on_cell_complete=lambda **_: bar.update(),
        )
        try:
            client.execute()
        finally:
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
    """An output without what only a live kernel can show: widgets become their text, progress bars nothing."""
    widget = output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return None if widget and "%|" in output["data"].get("text/plain", "") else output
