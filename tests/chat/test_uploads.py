"""Files that a page or a program names: uploads are taken, stored anew and served to their owner; nothing else is."""

import io
import re
import secrets
from pathlib import Path

import httpx
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from chat_client import META, SECRET, SETTINGS, VERIFY, Client, pixels_of, png, stored
from chat_page import wait_until
from conftest import demo_samples

SAMPLE = demo_samples()[0]


@pytest.mark.parametrize("index", [0, "0", -1, 10**9, [0], None, True, 0.5, {"path": "x"}, [[0]], ""], ids=repr)
def test_example_event_never_names_a_file(demo, url, folder, secret, says, index):
    says.text = "Yes."
    client, before = Client(demo, url).open(), stored(folder)
    for files in ([str(secret)], [{"path": str(secret)}], [{"path": str(secret), "meta": META}]):
        client.call("example", *SETTINGS, event={"index": index, "value": {"text": "hi", "files": files}})
    new = [path for path in stored(folder) if path not in before]
    assert SECRET.tobytes() not in pixels_of(new)
    if type(index) is int and index == 0:  # the question's own picture, whatever the event says
        assert pixels_of(new) == [SAMPLE["image"].convert("RGB").tobytes()]
        assert '"hi"' not in client.shown()
    else:
        assert not new


def forged(kind: str, secret: Path, client: Client) -> object:
    """A file of a text box that is no upload."""
    uploads = Path(get_upload_folder())
    if "link" in kind:
        link = uploads / f"{secrets.token_hex(4)}.png"
        link.symlink_to(secret.parent if "folder" in kind else secret)
        name = str(link / secret.name if "folder" in kind else link)
    elif "another" in kind:
        victim = Client(client.demo, str(client.http.base_url)).open()
        victim.ask("Mine?", victim.upload("secret.png", png(SECRET)))
        (name,) = victim.pictures()
    else:
        name = {
            "string": str(secret),
            "dots": f"{uploads}{'/..' * 20}{secret}",
            "null": f"{secret}\0.png",
            "file url": f"file://{secret}",
            "folder": str(secret.parent),
            "relative": "secret.png",
            "empty": "",
        }.get(kind.removeprefix("no meta ").removeprefix("meta "), str(secret))
    if kind.startswith("string") or kind in ("null", "dots", "link", "another's"):
        return name
    entry = {"path": name, "orig_name": "a.png", "mime_type": "image/png", "url": f"file://{secret}", "size": 1}
    return {**entry, **({} if kind.startswith("no meta") else {"meta": META})}


FORGED = ["string", "dots", "null", "link", "another's", "meta path", "no meta path", "meta dots", "meta link"]
FORGED += ["meta folder link", "meta another's", "meta file url", "meta folder", "meta relative", "meta empty"]


@pytest.mark.parametrize("endpoint", ["ask", "on_typing", "api_chat"])
@pytest.mark.parametrize("kind", FORGED)
def test_question_takes_uploads_only(demo, url, folder, slow_demo, secret, says, kind, endpoint):
    slow_demo.as_new()
    says.text = "Yes."
    client = Client(demo, url).open()
    file = forged(kind, secret, client)
    before = stored(folder)
    looks = len(slow_demo.looks)
    wishes = ["high"] if endpoint == "on_typing" else SETTINGS
    outputs = client.call(endpoint, {"text": "hi", "files": [file]}, *wishes)
    assert not outputs
    assert stored(folder) == before
    assert len(slow_demo.looks) == looks
    assert not client.pictures()


def test_question_taken_back_is_asked_again_with_its_picture(demo, url, says, folder):
    says.text = "Yes."
    client = Client(demo, url).open()
    client.call("ask", {"text": "What?", "files": [{"path": client.upload("a.png", png()), "meta": META}]}, *SETTINGS)
    wait_until(lambda: "Yes." in client.shown())
    (picture,) = client.pictures()
    ((box),) = client.call("undo", {"text": "", "files": []})
    assert box["text"] == "What?"
    client.call("ask", {"text": "Again?", "files": box["files"]}, *SETTINGS)
    wait_until(lambda: "Again?" in client.shown())
    assert client.pictures() == [picture]


@pytest.mark.parametrize(
    "name", ["evil.html", "evil.svg", "evil.xml", "evil.xhtml", "evil.png", "evil.HTM", "evil", "evil.pdf", "evil.js"]
)
def test_upload_is_served_as_an_image_or_a_download(demo, url, name):
    client = Client(demo, url)
    response = client.file(
        client.upload(name, b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    )
    kind = response.headers.get("content-type", "")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert kind == "image/png" or response.headers["content-disposition"].startswith("attachment")
    assert not re.search("html|svg|xml|javascript|pdf", kind)


def test_stored_picture_is_a_png_without_metadata_for_its_owner_alone(demo, url, folder, says, tmp_path):
    says.text = "Yes."
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera of somebody", 6
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.0)
    file = io.BytesIO()
    Image.effect_noise((60, 40), 50).convert("RGB").save(file, "JPEG", exif=exif, comment=b"a comment")
    owner, other = Client(demo, url).open(), Client(demo, url).open()
    before = stored(folder)
    upload = owner.upload("../my photo<b>.jpg", file.getvalue())
    owner.call("ask", {"text": "What?", "files": [{"path": upload, "meta": META}]}, *SETTINGS)
    wait_until(lambda: "Yes." in owner.shown())
    (picture,) = owner.pictures()
    assert [str(path) for path in stored(folder) if path not in before] == [picture]
    response = owner.file(picture)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.headers["x-content-type-options"] == "nosniff"
    for trace in (b"Camera", b"Exif", b"eXIf", b"comment"):
        assert trace not in response.content
    shown = Image.open(io.BytesIO(response.content))
    assert (shown.format, shown.size) == ("PNG", (40, 60))  # the right way up
    anybody = httpx.Client(verify=VERIFY, base_url=url)
    for who in (other.http, anybody, httpx.Client(verify=VERIFY, base_url=url, cookies={"ov_mllama": "user:alice"})):
        for address in (f"gradio_api/file={picture}", f"gradio_api/file/{picture}"):
            assert who.get(address).status_code == 404, who
    for path in (folder / "chat.sqlite3", Path(picture).parent, f"{folder}/examples/../chat.sqlite3", "/etc/hostname"):
        assert owner.file(path).status_code == 404
    for address in ("http://127.0.0.1:1/", "https://example.org/a.png", ""):
        assert owner.file(address).status_code in (403, 404)
