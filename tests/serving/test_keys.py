"""Keys: where they come from, and what is let in."""

import pytest

from openai_client import HTTP, KEY, is_openai_error
from ov_mllama.serving import guards


@pytest.mark.parametrize(
    "given", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER {KEY}", f"Bearer   {KEY}", f"bEaReR {KEY}"]
)
def test_bearer_is_taken_in_any_case(server, given):
    assert HTTP.get(f"{server}/v1/models", headers={"Authorization": given}).is_success


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "X-API-Key"])
def test_key_is_taken_from_the_headers_of_other_apis(server, name):
    assert HTTP.get(f"{server}/v1/models", headers={name: KEY}).is_success
    assert HTTP.get(f"{server}/v1/models", headers={name: "wrong"}).status_code == 401
    assert HTTP.get(f"{server}/v1/models", headers={name: KEY, "Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize(
    "given",
    [None, KEY, "", "Bearer", f"Basic {KEY}", f"Bearer{KEY}", f"Bearer Bearer {KEY}", f"Token {KEY}"],
)
def test_key_without_its_scheme_is_refused(server, given):
    answer = HTTP.get(f"{server}/v1/models", headers={} if given is None else {"Authorization": given})
    assert answer.status_code == 401
    assert is_openai_error(answer)


def test_empty_key_matches_nothing():
    assert not guards.keys_match("", "")
    for header in ("", "Bearer", "Bearer "):
        with pytest.raises(guards.ApiError):
            guards.check_key(header, "")
    guards.check_key("", None)


def test_key_beyond_ascii():
    guards.check_key(f"Bearer {'schlüssel'.encode().decode('latin-1')}", "schlüssel")


def test_key_is_read_from_option_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("OV_MLLAMA_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("from file\n", encoding="utf-8")
    assert guards.key_from(None, None) is None
    monkeypatch.setenv("OV_MLLAMA_KEY", "from environment")
    assert guards.key_from(None, None) == "from environment"
    assert guards.key_from(None, file) == "from file"
    assert guards.key_from("from option", None) == "from option"
    monkeypatch.setenv("OV_MLLAMA_KEY", " ")
    for key, path in ((None, None), ("", None), (None, tmp_path / "empty"), (None, tmp_path / "lines")):
        (tmp_path / "empty").write_text("\n", encoding="utf-8")
        (tmp_path / "lines").write_text("a\nb\n", encoding="utf-8")
        with pytest.raises(ValueError, match="no key"):
            guards.key_from(key, path)
    with pytest.raises(OSError, match="gone"):
        guards.key_from(None, tmp_path / "gone")
