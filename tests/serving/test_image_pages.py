"""PDF pages and remarks on images in requests; what a client sends is never a path."""

import base64
import io

import pytest
from PIL import Image

from chat_page import path_of
from conftest import demo_samples
from openai_client import complete, encoded, photograph, refusal, text, user
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.messages import convert_message
from ov_mllama.serving.protocol import ApiError

COLOURS = ("red", "lime", "blue")


def several(form: str, count: int = 3) -> bytes:
    pages = [Image.new("RGB", (80, 40), COLOURS[i % 3]) for i in range(count)]
    file = io.BytesIO()
    pages[0].save(file, form, save_all=True, append_images=pages[1:])
    return file.getvalue()


PDF = several("PDF")
URI = f"data:application/pdf;base64,{base64.b64encode(PDF).decode()}"
FORMS = {
    "image_url": {"type": "image_url", "image_url": {"url": URI}},
    "file": {"type": "file", "file": {"filename": "a.pdf", "file_data": URI}},
    "input_file": {"type": "input_file", "filename": "a.pdf", "file_data": URI},
    "LangChain's": {"type": "file", "source_type": "base64", "data": base64.b64encode(PDF).decode()},
}


@pytest.mark.parametrize("form", FORMS)
def test_pdf_is_images_of_its_pages(form):
    images: list[ImageFile] = []
    message = convert_message({"role": "user", "content": [{**FORMS[form]}, "What?"]}, "messages[0]", images)
    assert message["content"] == [{"type": "image"}] * 3 + [{"type": "text", "text": "What?"}]
    assert len({image.key for image in images}) == 3
    for image, channel in zip(images, range(3), strict=True):
        shown = image.decode(112)
        assert shown.size == (image.width, image.height)
        assert max(range(3), key=shown.getpixel((20, 20)).__getitem__) == channel


def test_pages_beyond_the_limit_of_images_are_refused():
    part = {"type": "image", "data": base64.b64encode(several("PDF", 17)).decode()}
    with pytest.raises(ApiError, match="The PDF has 17 pages: give one of 1 to 16"):
        convert_message({"role": "user", "content": [part]}, "messages[0]", [])
    part = {"type": "image", "data": base64.b64encode(several("PDF", 9)).decode()}
    with pytest.raises(ApiError, match="at most 16 images"):
        convert_message({"role": "user", "content": [{**part}, {**part}]}, "messages[0]", [])


def test_pdf_is_answered_and_counts_once_in_the_queue(client):
    answer = complete(client, user({**FORMS["file"]}, text("?")), max_tokens=1)
    assert answer.choices[0].message.content is not None
    assert not answer.model_extra


@pytest.mark.parametrize("form", ["GIF", "TIFF"])
def test_remark_is_in_the_answer(client, form):
    messages = user(encoded(several(form)), text("?"))
    parts = "pages" if form == "TIFF" else "frames"
    remarks = [f"The image has several {parts}: the first one is used."]
    assert complete(client, messages, max_tokens=1).model_extra == {"remarks": remarks}
    *_, last = client.chat.completions.create(model="demo", messages=messages, max_tokens=1, stream=True)
    assert last.model_extra == {"remarks": remarks}


def test_answer_without_remarks_has_no_such_field(client):
    assert not complete(client, user(encoded(photograph(32, 32)), text("?")), max_tokens=1).model_extra


PATH = path_of(demo_samples()[0])


@pytest.mark.parametrize("path", [str(PATH), PATH.as_uri(), f'"{PATH}"', f" {PATH} ", "~/x.png", "/" + "a/" * 40 + "x"])
def test_path_is_never_opened(client, path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.open", lambda *_: pytest.fail("opened a path"))
    assert refusal(client, user({"type": "image_url", "image_url": {"url": path}}, text("?"))).status_code == 400
    for field in ("image", "url", "data", "file_data"):
        with pytest.raises(ApiError):
            convert_message({"role": "user", "content": [{"type": "image", field: path}]}, "messages[0]", [])
