"""Options of `python -m ov_mllama`."""

import io
import sys
import warnings
from pathlib import Path

import gradio as gr
import pytest

from gradio_helper import ChatPage
from ov_mllama.__main__ import argument_parser, image_store_mb, main, users_from
from ov_mllama.cli import IMAGE_STORE_MB, configure_console
from ov_mllama.export.prepare import default_folder
from ov_mllama.serving.app import parse_arguments


def test_users_are_read_from_a_file(tmp_path, capsys):
    file = tmp_path / "users"
    file.write_bytes("\ufeffalice:one:two\r\n\r\nböb: three \r\n".encode())
    assert users_from(None, file) == [("alice", "one:two"), ("böb", "three")]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "\n", "alice", "alice:", ":word", "alice:one\nbob"])
def test_file_without_users_is_refused(tmp_path, text):
    file = tmp_path / "users"
    file.write_text(text)
    with pytest.raises(ValueError, match="lines NAME:PASSWORD"):  # an open page is not what was asked for
        users_from(None, file)


def test_password_on_the_command_line_is_warned_of(capsys):
    assert users_from(["alice", "one"], None) == [("alice", "one")]
    assert "--auth-file" in capsys.readouterr().out
    assert users_from(None, None) == []


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("chat", "gradio", "chat"),
        ("serve", "fastapi", "serve"),
        ("caption demo_model/samples --workers 2", "ray", "serve"),
    ],
)
def test_missing_extra_is_named_in_one_sentence(command, package, extra, monkeypatch):
    for module in ("chat.layout", "serving.app", "serving.caption"):
        monkeypatch.delitem(sys.modules, f"ov_mllama.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr(sys, "argv", ["ov-mllama", *command.split()])
    monkeypatch.setattr("ov_mllama.__main__.bypass_proxy_for_loopback", lambda: None)
    monkeypatch.setattr("ov_mllama.cli.configure_console", lambda verbose: None)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == f'❌ {package} is not installed: pip install ".[{extra}]" in the project\'s folder'


@pytest.fixture
def formatwarning(monkeypatch):
    """Restored afterwards."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


def test_characters_that_the_console_lacks_are_replaced(monkeypatch, formatwarning):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n"))
    configure_console()
    print("✅ „ä“ – 1 → 2", flush=True)
    assert sys.stdout.buffer.getvalue() == "? „ä“ – 1 ? 2\n".encode("cp1252")
    print("✅", file=sys.stderr, flush=True)


def test_warnings_take_one_line(formatwarning):
    configure_console()
    assert warnings.formatwarning("Use this.", UserWarning, "a.py", 3, "a = 1") == "UserWarning: Use this.\n"


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, None, "127.0.0.1"),
        (None, "", "127.0.0.1"),
        (None, "0.0.0.0", "0.0.0.0"),  # noqa: S104
        ("127.0.0.1", "0.0.0.0", "127.0.0.1"),  # noqa: S104
        ("::", None, "[::]"),
        ("[::1]", None, "[::1]"),
    ],
)
def test_host_is_the_option_else_the_environment_else_loopback(given, environment, expected, monkeypatch, recwarn):
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: options)
    monkeypatch.setattr(ChatPage, "app_kwargs", lambda self: {})
    monkeypatch.setattr("ov_mllama.chat.layout.bypass_proxy_for_loopback", lambda host: None)
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    if environment is not None:
        monkeypatch.setenv("GRADIO_SERVER_NAME", environment)
    assert ChatPage().launch(server_name=given)["server_name"] == expected
    assert any("--auth-file" in str(each.message) for each in recwarn) == (expected in ("0.0.0.0", "[::]"))  # noqa: S104


def test_models_go_to_the_users_cache_if_the_current_folder_is_read_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "user"))
    assert default_folder("a/new") == Path("models/new")
    assert not [*tmp_path.iterdir()]
    Path("models/old").mkdir(parents=True)

    def fail(path, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    assert default_folder("a/old") == Path("models/old")
    assert default_folder("a/new") == tmp_path / "user/ov-mllama/models/new"


def test_chat_stores_encoded_images_unless_several_users_share_it():
    assert [image_store_mb(None, users) for users in (0, 1, 2)] == [IMAGE_STORE_MB, IMAGE_STORE_MB, 0]
    assert image_store_mb(0, 0) == 0
    assert image_store_mb(5, 2) == 5
    parser = argument_parser()
    assert parser.parse_args(["chat", "--image-store-mb", "0"]).image_store_mb == 0
    assert parse_arguments([]).image_store_mb == IMAGE_STORE_MB
    with pytest.raises(SystemExit):
        parser.parse_args(["chat", "--image-store-mb", "-1"])
