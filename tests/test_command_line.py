"""Options of `python -m ov_mllama`."""

import pytest

from ov_mllama.__main__ import users_from


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
