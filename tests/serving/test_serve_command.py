"""Options and port of the command `serve`."""

import socket

import pytest

from ov_mllama.serving.app import DEPRECATED_OPTIONS, parse_arguments
from ov_mllama.serving.loading import bind_socket


def test_deprecated_options_set_the_current_ones_with_a_warning(capsys):
    options = parse_arguments(["--line", "5", "--addresses", "--origins", "http://a", "http://b"])
    assert (options.max_queue, options.allow_image_urls, options.cors_origins) == (5, True, ["http://a", "http://b"])
    assert parse_arguments(["--line=7"]).max_queue == 7
    warnings = capsys.readouterr().err.splitlines()
    expected = [("--line", "--max-queue"), ("--addresses", "--allow-image-urls"), ("--origins", "--cors-origins")]
    assert warnings[:3] == [f"❗ {old} is deprecated: use {new}." for old, new in expected]


def test_help_shows_current_options_only(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert all(new in shown and f"{old} " not in shown for old, new in DEPRECATED_OPTIONS.items())


def test_port_is_bound_exclusively_on_windows(monkeypatch):
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)  # Linux lacks it
    with bind_socket("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
