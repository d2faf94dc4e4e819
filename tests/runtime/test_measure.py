"""Measured speeds of a CPU: what is measured, and their cache. No test depends on how fast this machine is."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest

from ov_mllama.runtime import devices, measure
from ov_mllama.runtime.devices import Cpu, quota
from ov_mllama.runtime.measure import FORMATS, cache_file, speed_here

# Instead of the real matrices: measured in a moment
SMALL = {
    "WIDTHS": {"vision": ((256, 128), (128, 256)), "language": ((256, 128),)},
    "READ_BYTES": 1 << 16,
    "TOKEN_BYTES": 1 << 15,
    "LEAST_S": 0,
    "BUSY_S": 0.01,
}
ZEN = Cpu(bf16=True, vnni=True, amd=True)


@pytest.fixture
def measured(speed, monkeypatch):
    """The CPUs that were measured, each in place of a measurement."""
    cpus = []

    def note(cpu):
        cpus.append(cpu)
        return speed

    monkeypatch.setattr(measure, "measure", note)
    return cpus


def test_every_product_is_measured_with_openvinos_threads(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(measure, name, value)
    for busy in (True, False):
        monkeypatch.setattr(measure, "is_busy", lambda busy=busy: busy)
        here = measure.measure()
        assert measure.is_valid(dataclasses.asdict(here))
        assert 1 <= here.threads <= devices.cores()


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_multiplied_as_they_are_stored(form):
    """OpenVINO folds equal numbers, and then measures something else."""
    matrix = ov.Model([measure.weights((128, 256), FORMATS[form])], [])
    kinds = {"16 bit": "bf16", "int8": "u8", "int4_asym, groups of 64": "u4", "int4_sym, groups of 128": "i4"}
    kinds |= {"q4_k_m": "u4", "q8_0": "i8"}
    constants = [node for node in matrix.get_ops() if node.get_type_name() == "Constant"]
    assert kinds[form] in {node.get_element_type().get_type_name() for node in constants}
    request = ov.Core().compile_model(matrix, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    (values,) = request.infer().values()
    assert values.shape == (128, 256)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) > 10


def test_quota_slows_every_figure_down(monkeypatch):
    monkeypatch.setattr(measure, "seconds_of", lambda compiled, values, busy: 1.0)
    for name, value in SMALL.items():
        monkeypatch.setattr(measure, name, value)
    figures = {}
    for limit in (float("inf"), 0.5):
        monkeypatch.setattr(measure, "quota", lambda limit=limit: limit)
        figures[limit] = measure.measure()
    free, limited = figures.values()
    share = 0.5 / free.threads
    assert limited.read == share * free.read
    assert limited.products == {name: share * rate for name, rate in free.products.items()}


def test_quota_is_the_tightest_of_all_control_groups(tmp_path):
    top, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    assert quota(top, own) == float("inf")
    for folder, text in (("", "max 100000"), ("outer", "150000 100000"), ("outer/inner", "max 100000")):
        (top / folder).mkdir(parents=True, exist_ok=True)
        (top / folder / "cpu.max").write_text(f"{text}\n")
    assert quota(top, own) == 1.5


def test_machine_is_measured_once(measured, speed, tmp_path):
    file = tmp_path / "not/there/yet/speed.json"
    assert speed_here(ZEN, file) == speed_here(ZEN, file) == speed
    assert measured == [ZEN]
    speed_here(Cpu(), file)  # simulated, or another machine with the same home
    speed_here(ZEN, file)
    assert measured == [ZEN, Cpu()]


def test_other_versions_are_measured_anew(measured, tmp_path, monkeypatch):
    file = tmp_path / "speed.json"
    speed_here(ZEN, file)
    for name, value in (("METHOD", 99), ("quota", lambda: 1.0), ("cores", lambda: 64)):
        monkeypatch.setattr(measure, name, value)
        speed_here(ZEN, file)
    monkeypatch.setattr(measure.ov, "__version__", "2030.1")
    speed_here(ZEN, file)
    assert len(measured) == 5


def corrupt(file, change):
    entries = json.loads(file.read_text())
    for entry in entries.values():
        change(entry)
    file.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"\xff{"),
        lambda file: file.write_text(""),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text('{"a": 1}'),
        lambda file: corrupt(file, lambda entry: entry.update(read=0)),
        lambda file: corrupt(file, lambda entry: entry.update(read="fast")),
        lambda file: corrupt(file, lambda entry: entry.update(read=float("nan"))),
        lambda file: corrupt(file, lambda entry: entry.update(other=1)),
        lambda file: corrupt(file, lambda entry: entry.pop("threads")),
        lambda file: corrupt(file, lambda entry: entry["products"].popitem()),
        lambda file: corrupt(file, lambda entry: entry.update(products=[])),
        lambda file: file.unlink(),
    ],
)
def test_damaged_cache_is_measured_anew(measured, speed, tmp_path, damage):
    file = tmp_path / "speed.json"
    speed_here(ZEN, file)
    damage(file)
    assert speed_here(ZEN, file) == speed
    assert len(measured) == 2
    speed_here(ZEN, file)
    assert len(measured) == 2  # written whole again


def test_cache_that_cannot_be_written_is_none(measured, speed, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file/below", tmp_path / "file"):
        assert speed_here(ZEN, folder / "speed.json") == speed
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_on_a_busy_machine_cpu_time_counts(monkeypatch):
    ticks = {"perf_counter": itertools.count(step=3.0), "process_time": itertools.count(step=2.0)}
    for name, tick in ticks.items():
        monkeypatch.setattr(measure.time, name, tick.__next__)
    compiled = SimpleNamespace(
        get_property=lambda name: 4, create_infer_request=lambda: SimpleNamespace(infer=lambda *args, **kwargs: None)
    )
    assert measure.seconds_of(compiled, np.ones(1), busy=False) == 3.0
    monkeypatch.setattr(measure.sys, "platform", "linux")
    assert measure.seconds_of(compiled, np.ones(1), busy=True) == 2.0 / 4
    monkeypatch.setattr(measure.sys, "platform", "win32")  # whose clock of CPU time is too coarse
    assert measure.seconds_of(compiled, np.ones(1), busy=True) == 3.0


def test_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_file() == tmp_path / "cache/ov-mllama/speed.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache/ov-mllama/speed.json"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_file() == tmp_path / "local/ov-mllama/speed.json"
