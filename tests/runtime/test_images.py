"""Pictures as they come: each is opened as what it shows, or refused with a sentence; none crashes, hangs or eats
memory."""

import contextlib
import errno
import io
import random
import resource
import shutil
import ssl
import subprocess
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.PngImagePlugin
import pytest
import torch
from PIL import Image

from conftest import DEMO
from ov_mllama.runtime import downloads, image_files
from ov_mllama.runtime.images import PictureError, load_image

pytestmark = pytest.mark.torture
SAMPLE = DEMO / "samples" / "02-describe-224x112.png"
RED = (255, 0, 0)


def contents(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def flat(mode: str, colour, **options) -> bytes:
    return contents(Image.new(mode, (6, 4), colour), **options)


def palette(colour, **options) -> bytes:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, *colour])
    return contents(image, **options)


# ---- Accepted ----

FILES = {  # contents, and the colour that must come out
    "RGB": (flat("RGB", RED), RED),
    "RGBA, opaque": (flat("RGBA", (*RED, 255)), RED),
    "RGBA, half transparent": (flat("RGBA", (*RED, 128)), (255, 127, 127)),
    "RGBA, transparent black": (flat("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
    "grey with alpha": (flat("LA", (0, 0)), (255, 255, 255)),
    "palette": (palette(RED), RED),
    "palette with a transparent colour": (palette(RED, transparency=1), (255, 255, 255)),
    "palette with alphas": (palette(RED, transparency=b"\xff\x80"), (255, 127, 127)),
    "RGB with a transparent colour": (flat("RGB", RED, transparency=RED), (255, 255, 255)),
    "grey": (flat("L", 77), (77, 77, 77)),
    "1 bit": (flat("1", 1), (255, 255, 255)),
    "16 bit grey": (contents(Image.fromarray(np.full((4, 6), 128 * 257, np.uint16))), (128, 128, 128)),
    "16 bit grey, TIFF": (contents(Image.fromarray(np.full((4, 6), 128 * 257, np.uint16)), "TIFF"), (128, 128, 128)),
    "32 bit grey, TIFF": (flat("I", 77, form="TIFF"), (77, 77, 77)),
    "float grey, TIFF": (flat("F", 0.5, form="TIFF"), (128, 128, 128)),
    "CMYK JPEG": (flat("CMYK", (0, 255, 255, 0), form="JPEG", quality=100), (254, 0, 0)),
    "CMYK TIFF": (flat("CMYK", (0, 255, 255, 0), form="TIFF"), RED),
    "YCbCr JPEG": (flat("RGB", RED, form="JPEG", quality=100), (254, 0, 0)),
    "LAB TIFF": (flat("LAB", (0, 128, 128), form="TIFF"), (0, 0, 0)),
    "GIF": (flat("RGB", RED, form="GIF"), RED),
    "WebP": (flat("RGB", RED, form="WEBP", lossless=True), RED),
    "WebP with alpha": (flat("RGBA", (*RED, 0), form="WEBP", lossless=True, exact=True), (255, 255, 255)),
    "BMP": (flat("RGB", RED, form="BMP"), RED),
    "PPM": (flat("RGB", RED, form="PPM"), RED),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_opened(kind, tmp_path, tally):
    data, colour = FILES[kind]
    (tmp_path / "picture.txt").write_bytes(data)  # the name says nothing
    for source in (data, tmp_path / "picture.txt", str(tmp_path / "picture.txt"), Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (6, 4))
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 1
    tally("kinds of pictures", 4)


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("L", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes().replace(b"Exif\0\0", b"Exif\0\0?"))
    assert load_image(tmp_path / "broken.jpg").size == (40, 20)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = contents(frames[0], form, save_all=True, append_images=frames[1:])
    parts = "pages" if form == "TIFF" else "frames"
    with pytest.warns(UserWarning, match=f"several {parts}"):
        image = load_image(data)
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 2
    assert f"several {parts}" in image.info["remark"]


def test_a_photograph_with_its_preview_is_one_picture():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = contents(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).info == {}


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 10_000)])
def test_extreme_shapes_reach_the_model(pair, size):
    image = load_image(Image.new("RGB", size, "red"))
    inputs = pair.processor(text="<|image|>what", images=[image], return_tensors="pt")
    assert torch.isfinite(pair.ov(**inputs, logits_to_keep=1).logits).all()


def array(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


RGB = array(5, 7, 3)
ARRAYS = {
    "height, width, 3": RGB,
    "3, height, width": RGB.transpose(2, 0, 1),
    "1, height, width, 3": RGB[None],
    "1, 1, 3, height, width": RGB.transpose(2, 0, 1)[None, None],
    "floats to 1": (RGB / 255).astype(np.float32),
    "doubles to 1": RGB / 255,
    "half floats to 255": RGB.astype(np.float16),
    "int64": RGB.astype(np.int64),
    "uint16": RGB.astype(np.uint16) * 257,
    "opaque": np.concatenate([RGB, np.full((5, 7, 1), 255, np.uint8)], -1),
    "not contiguous": np.asfortranarray(RGB),
    "tensor 3, height, width": torch.tensor(RGB).permute(2, 0, 1),
    "tensor of floats": torch.tensor(RGB).permute(2, 0, 1) / 255,
    "tensor with a gradient": (torch.tensor(RGB).permute(2, 0, 1) / 255).requires_grad_(),
    "tensor height, width, 3": torch.tensor(RGB),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_opened(kind, tally):
    assert np.array_equal(np.asarray(load_image(ARRAYS[kind])), RGB)
    tally("kinds of pictures", 1)


def test_grey_arrays():
    grey = array(5, 7)
    for source in (grey, grey[..., None], grey[None], torch.tensor(grey), torch.tensor(grey)[None].to(torch.bfloat16)):
        assert np.array_equal(np.asarray(load_image(source))[..., 0], grey)
    assert np.asarray(load_image(np.eye(3, dtype=bool)))[..., 1].tolist() == (255 * np.eye(3)).tolist()


def test_where_both_could_be_meant_channels_are_last_in_arrays_and_first_in_tensors():
    both = array(3, 5, 3)
    assert np.array_equal(np.asarray(load_image(both)), both)
    assert np.array_equal(np.asarray(load_image(torch.tensor(both))), both.transpose(1, 2, 0))


# ---- Refused ----

PNG = SAMPLE.read_bytes()
REFUSED = {
    "no bytes": (b"", "is empty"),
    "half a PNG": (PNG[: len(PNG) // 2], "not an image that can be read"),
    "half a JPEG": (contents(Image.open(SAMPLE).convert("RGB"), "JPEG")[:500], "not an image that can be read"),
    "a page": (b"<!DOCTYPE html><html></html>", "is a web page, no image that can be read"),
    "a drawing in text": (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "is a drawing in SVG, no image",
    ),
    "PostScript, which would be run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript, no image"),
    "a zip": (b"PK\x03\x04" + bytes(100), "is a ZIP archive or an Office document, no image"),
    "20000 x 20000": (contents(Image.new("1", (20_000, 20_000))), "20000 × 20000 pixels: make it smaller"),
    "an array of NaN": (np.full((4, 4, 3), np.nan), "no finite value"),
    "an array of infinity": (np.full((4, 4, 3), np.inf), "no finite value"),
    "normalised pixels": (np.linspace(-1.8, 2.1, 48).reshape(3, 4, 4), "pixel_values are for the model"),
    "an array of five channels": (array(6, 6, 5), r"shape \[6, 6, 5\] is no image"),
    "an array of two pictures": (array(2, 4, 4, 3), r"shape \[2, 4, 4, 3\] is no image"),
    "an array of nothing": (np.zeros((0, 4, 3)), "is no image"),
    "a number": (np.array(3), "is no image"),
    "complex numbers": (np.zeros((4, 4), complex), "complex128 is no image"),
    "an array too large": (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "pixels: make it smaller"),
    "nothing": (None, "NoneType is no image"),
    "a dict": ({"path": "x.png"}, "dict is no image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_sentence(kind, tmp_path, tally):
    source, sentence = REFUSED[kind]
    with pytest.raises(PictureError, match=sentence):
        load_image(source)
    if isinstance(source, bytes):
        (tmp_path / "picture.png").write_bytes(source)
        with pytest.raises(PictureError, match="picture.png.*" + sentence):
            load_image(tmp_path / "picture.png")
    tally("kinds of pictures", 1)


def test_paths_that_lead_nowhere(tmp_path):
    for path, sentence in [
        (tmp_path, "is a folder"),
        (tmp_path / "gone.png", "gone.png is missing"),
        ("a\0b", "not an image"),
        ("x" * 5000, "not an image"),
        ("file:///etc/passwd", "passwd is not an image"),
        ("ftp://example.org/x.png", "no URL of an image"),
        ("data://x", "no URL of an image"),
    ]:
        with pytest.raises(PictureError, match=sentence):
            load_image(path)


# ---- From the network ----


class Server(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def start(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    ended = []  # paths of the answers that were sent to their end

    def do_GET(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other side had enough
            getattr(self, self.path.strip("/").split(".")[0])()
            self.ended.append(self.path.strip("/"))

    def picture(self):
        self.start(content_type="image/png")
        self.wfile.write(PNG)

    def unnamed(self):
        self.start()
        self.wfile.write(PNG)

    def page(self):
        self.start(content_type="text/html; charset=utf-8")
        self.wfile.write(b"<html>")

    def page_named_png(self):
        self.start(content_type="image/png")
        self.wfile.write(b"<html>")

    def gone(self):
        self.start(404)

    def broken(self):
        self.start(500)

    def elsewhere(self):
        self.start(302, location="/picture.png")

    def loop(self):
        self.start(302, location="/loop")

    def to_file(self):
        self.start(302, location="file:///etc/passwd")

    def short(self):
        self.start(content_type="image/png", content_length=str(len(PNG)))
        self.wfile.write(PNG[:100])

    def endless(self):
        self.start(content_type="image/png")
        while True:
            self.wfile.write(bytes(1 << 20))

    def drip(self):
        self.start(content_type="image/png")
        for byte in PNG:
            self.wfile.write(bytes([byte]))
            time.sleep(0.3)

    def silent(self):
        time.sleep(60)

    def slow_headers(self):
        for _ in range(200):
            self.wfile.write(b"H")
            time.sleep(0.3)


def serve(context: ssl.SSLContext | None = None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def address():
    server = serve()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("path", ["picture.png", "unnamed", "elsewhere"])
def test_an_address(address, path):
    assert np.array_equal(np.asarray(load_image(f"{address}/{path}")), np.asarray(load_image(SAMPLE)))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("page", "is a page"),
        ("page_named_png", "not an image that can be read"),
        ("gone", "could not be fetched.*404"),
        ("broken", "could not be fetched.*500"),
        ("loop", "could not be fetched"),
        ("to_file", "could not be fetched"),
        ("short", "could not be fetched"),
        ("endless", "more than 1 MB"),
        ("drip", "did not arrive within 1 second"),
        ("silent", "did not arrive within 1 second"),
        ("slow_headers", "did not arrive within 1 second"),
    ],
)
def test_addresses_that_give_no_picture(address, path, sentence, monkeypatch, tally):
    monkeypatch.setattr(downloads, "SECONDS", 1)
    monkeypatch.setattr(downloads, "MAX_BYTES", 1_000_000)
    with pytest.raises(PictureError, match=sentence):
        load_image(f"{address}/{path}")
    assert "1 second" not in sentence or path not in Server.ended
    tally("addresses", 1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.png", "http://", "http://[", "https://\ud800/", "http://a b/"])
def test_addresses_that_are_none(url):
    with pytest.raises(PictureError, match="could not be fetched"):
        load_image(url)


def test_a_certificate_that_nobody_vouches_for(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make one")
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    subprocess.run([*made.split(), *files], check=True, capture_output=True)  # noqa: S603
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = serve(context)
    with pytest.raises(PictureError, match="could not be fetched.*certificate"):
        load_image(f"https://localhost:{server.server_port}/picture.png")
    server.shutdown()


def test_in_a_running_loop(address):
    """As in Jupyter, whose own thread runs one."""
    import asyncio

    async def cell():
        return load_image(f"{address}/picture.png")

    assert asyncio.run(cell()).mode == "RGB"


# ---- Broken in every way ----


def broken(data: bytes, rng: random.Random) -> bytes:
    """Cut off, with bytes changed, with a piece repeated or left out, or with another's end."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(data) or 1), rng.randint(1, 40)
        way = rng.randrange(5)
        if way == 0:
            data = data[:place]
        elif way == 1:
            data[place : place + 1] = rng.randbytes(1)
        elif way == 2:
            data[place : place + length] = b""
        elif way == 3:
            data[place:place] = data[place : place + length]
        else:
            data[place : place + length] = rng.choice([b"\xff" * length, bytes(length), rng.randbytes(length)])
    return bytes(data)


def test_broken_files(times, tally):
    rng, wrong = random.Random(0), []  # noqa: S311
    picture = Image.open(SAMPLE).convert("RGB").resize((48, 32))
    frames = dict(save_all=True, append_images=[picture.rotate(90)])
    seeds = [contents(picture, form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    seeds += [contents(picture, form, **frames) for form in ("GIF", "WEBP", "PNG", "TIFF", "MPO")]
    seeds += [data for data, _ in FILES.values()]
    count = times(1000, 20_000)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        data = broken(rng.choice(seeds), rng)
        started = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = load_image(data)
            right = image.mode == "RGB" and image.width * image.height <= image_files.MAX_PIXELS
        except PictureError:
            right = True
        except Exception as error:
            right = print(number, repr(error))
        if not right or time.process_time() - started > 10:
            wrong.append(number)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    assert grown < 2e9, "a broken picture ate the memory"
    tally("broken pictures", count, wrong)


# ---- The machine's faults are not the picture's ----

FAILURES = {
    "no memory": (MemoryError(), MemoryError, "memory"),
    "decoder without memory": (OSError("out of memory error when reading image file"), MemoryError, "memory"),
    "no memory to map": (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError, "memory"),
    "disk": (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
    "network disk": (OSError(errno.ESTALE, "Stale file handle"), OSError, "Stale file handle"),
    "files": (OSError(errno.EMFILE, "Too many open files"), OSError, "Too many open files"),
    "permission": (PermissionError(errno.EACCES, "Permission denied"), PermissionError, "Permission denied"),
    "truncated": (OSError("image file is truncated (3 bytes not processed)"), PictureError, "use an intact"),
    "unknown": (PIL.UnidentifiedImageError("cannot identify image file"), PictureError, "use an intact"),
    "before its start": (OSError(errno.EINVAL, "Invalid argument"), PictureError, "use an intact"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file or directory"), PictureError, "is missing"),
    "below a file": (NotADirectoryError(errno.ENOTDIR, "Not a directory"), PictureError, "is missing"),
    "long name": (OSError(errno.ENAMETOOLONG, "File name too long"), PictureError, "use an intact"),
}


@pytest.mark.parametrize("place", ["open", "load"])
@pytest.mark.parametrize("case", FAILURES)
def test_failures_of_the_machine_are_not_the_pictures(case, place, monkeypatch):
    """open: of the file; load: while it is decoded."""
    raised, kind, said = FAILURES[case]

    def failing(*arguments, **options):
        raise raised

    if place == "open":
        monkeypatch.setattr(image_files.Image, "open", failing)
    else:
        monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", failing)
    with pytest.raises(kind, match=said) as error:
        load_image(SAMPLE)
    assert isinstance(error.value, PictureError) == (kind is PictureError)
    if isinstance(raised, OSError) and kind is OSError:
        assert error.value.errno == raised.errno


def test_picture_without_permission_or_file_handles_is_reported_as_that(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(SAMPLE.open("rb"))
        with pytest.raises(OSError, match="Too many open files"):
            load_image(SAMPLE)
    finally:
        for file in opened:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert load_image(SAMPLE).size == (224, 112)
