"""Measured speeds of a CPU: what is measured, and their cache. No test depends on how fast this machine is."""

import dataclasses
import json

import openvino as ov
import pytest

from ov_mllama.runtime import devices, measure
from ov_mllama.runtime.devices import Cpu, choose, quota
from ov_mllama.runtime.measure import FORMATS, Speed, cache_file, speed_here

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
    monkeypatch.setattr(measure, "WIDTHS", ((256, 128), (128, 256)))
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 16)
    here = measure.measure()
    assert measure.is_valid(dataclasses.asdict(here))
    assert 1 <= here.threads <= devices.cores()


@pytest.mark.parametrize("form", FORMATS)
def test_weights_stay_compressed(form):
    """As of an IR, OpenVINO fuses their decompression into the product."""
    compiled = ov.Core().compile_model(measure.mlp(form), "CPU", choose("language", FORMATS[form]).properties)
    layers = {node.get_rt_info()["layerType"].value for node in compiled.get_runtime_model().get_ops()}
    assert layers - {"Input", "Output", "Const", "Reorder"} == {"FullyConnected"}


def test_quota_slows_every_figure_down(monkeypatch):
    monkeypatch.setattr(measure, "fastest", lambda compiled, values: 1.0)
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 16)
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


def test_what_was_measured_while_others_computed_is_measured_anew_once_they_do_not(
    measured, speed, tmp_path, monkeypatch
):
    file, busy = tmp_path / "speed.json", True
    monkeypatch.setattr(measure, "is_busy", lambda: busy)
    monkeypatch.setattr(measure, "measure", lambda cpu: measured.append(cpu) or Speed(2, 1e9, speed.products, busy))
    assert speed_here(ZEN, file).busy
    speed_here(ZEN, file)
    assert len(measured) == 1
    busy = False
    assert not speed_here(ZEN, file).busy
    speed_here(ZEN, file)
    assert len(measured) == 2


def test_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_file() == tmp_path / "cache/ov-mllama/speed.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache/ov-mllama/speed.json"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_file() == tmp_path / "local/ov-mllama/speed.json"
