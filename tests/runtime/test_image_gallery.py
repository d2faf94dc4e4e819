"""Each kind of image as people have it: the right pixels, against a second decoder if there is one, or a sentence."""

import base64
import gzip
import importlib
import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
import torch
import torchvision.io
from PIL import Image, ImageCms, ImageDraw

from conftest import ROOT
from ov_mllama.runtime import image_files, image_modes
from ov_mllama.runtime.file_kinds import SIGNATURES
from ov_mllama.runtime.images import load_image, load_pages, open_picture
from ov_mllama.serving.images import ImageFile

importlib.import_module("pillow_heif").register_heif_opener()  # to write HEIC
WIDTH, HEIGHT = 32, 32
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # torchvision
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:256:8, 0:256:8], 99), -1).astype(np.uint8)
PICTURE = Image.fromarray(SMOOTH)


def contents(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(*arguments, **options) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)  # of numpy, on casts
        return np.asarray(load_image(*arguments, **options)).astype(int)


def remark(source, **options) -> str:
    with pytest.warns(UserWarning, match="[Tt]he "):
        return load_image(source, **options).info["remark"]


# ---- Formats ----


def by_torchvision(data: bytes) -> np.ndarray:
    image = torchvision.io.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")
    return (image[0] if image.ndim == 4 else image).permute(1, 2, 0).numpy()


def by_tifffile(data: bytes) -> np.ndarray:
    return tifffile.imread(io.BytesIO(data))


def as_made(data: bytes) -> np.ndarray:
    return SMOOTH


# options of the writer, second decoder, largest difference from it
FORMATS = {
    "PNG": ({}, by_torchvision, 0),
    "JPEG": ({"quality": 95, "subsampling": 0}, by_torchvision, 1),
    "MPO": ({"quality": 95, "subsampling": 0, "save_all": True}, by_torchvision, 1),
    "WEBP": ({"lossless": True}, by_torchvision, 0),
    "GIF": ({}, by_torchvision, 0),
    "TIFF": ({"compression": "tiff_adobe_deflate"}, by_tifffile, 0),
    "BMP": ({}, as_made, 0),
    "TGA": ({}, as_made, 0),
    "ICO": ({"sizes": [(WIDTH, HEIGHT)]}, as_made, 0),
    "JPEG2000": ({"irreversible": False}, as_made, 0),
    "PPM": ({}, as_made, 0),
    "AVIF": ({"quality": 100, "subsampling": "4:4:4"}, as_made, 12),
    "HEIF": ({"quality": 100, "chroma": 444}, as_made, 12),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["picture", "picture.jfif"])
def test_format_is_read_by_content(form, name, tmp_path):
    options, decoder, tolerance = FORMATS[form]
    data = contents(PICTURE, form, **options)
    name = f"{name.partition('.')[0]}.tga" if form == "TGA" else name  # the one format without a signature
    (tmp_path / name).write_bytes(data)
    for source in (data, tmp_path / name):
        assert np.abs(pixels(source) - decoder(data)).max() <= tolerance


def test_old_name_is_the_same_function():
    assert open_picture is load_image


# ---- Size and memory ----


@pytest.fixture
def small_limits(monkeypatch):
    """As if an image of more than 500 pixels were a large one."""
    monkeypatch.setattr(image_files, "MAX_FULL_PIXELS", 500)
    monkeypatch.setattr(image_files, "MIN_REDUCED_PIXELS", 200)
    monkeypatch.setattr(image_modes, "STRIP_PIXELS", 130)


def averaged(array: np.ndarray, factor: int = 2) -> np.ndarray:
    height, width = array.shape[:2]
    return array.reshape(height // factor, factor, width // factor, factor, -1).astype(float).mean((1, 3))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "JPEG2000"])
def test_large_image_is_made_smaller(form, small_limits):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    data = contents(PICTURE, form, **options)
    shown, tolerance = pixels(data), {"JPEG": 3, "JPEG2000": 5}.get(form, 1)
    assert shown.shape == (16, 16, 3)
    assert np.abs(shown - averaged(SMOOTH))[1:-1, 1:-1].max() <= tolerance
    image = ImageFile.from_bytes(data)
    assert (image.width, image.height) == (16, 16)


def test_very_large_image_is_made_a_quarter(small_limits, monkeypatch):
    monkeypatch.setattr(image_files, "MIN_REDUCED_PIXELS", 64)
    for form in ("PNG", "JPEG"):
        assert pixels(contents(PICTURE, form)).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_large_image_of_any_mode_is_the_small_one(mode, small_limits):
    if mode == "I;16":
        image = Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(SMOOTH[..., 0] / np.float32(255))
    else:
        image = PICTURE.convert(mode)
    large = pixels(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "MAX_FULL_PIXELS", 10_000)
        assert np.abs(large - averaged(pixels(image))).max() <= 1


def test_large_image_is_upright_and_so_is_its_header(small_limits):
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "PNG", "WEBP"):
        data = contents(PICTURE.crop((0, 0, 32, 20)), form, exif=exif)
        header = ImageFile.from_bytes(data)
        assert pixels(data).shape == (16, 10, 3)
        assert (header.width, header.height) == (10, 16)


def test_large_array_is_made_smaller(small_limits):
    for array in (SMOOTH, torch.tensor(SMOOTH).permute(2, 0, 1), SMOOTH / 255, SMOOTH.astype(np.uint16) * 257):
        assert np.abs(pixels(array) - averaged(SMOOTH)).max() <= 1


def test_tiff_of_one_strip_is_accepted_up_to_the_limit_of_pixels(monkeypatch):
    """Pillow has its own limit for what it decodes at once."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert pixels(contents(PICTURE, "TIFF", compression="tiff_lzw")).shape == SMOOTH.shape


def jpeg_of(width: int, height: int, **options) -> bytes:
    """A JPEG whose header promises so many pixels."""
    data = contents(PICTURE, "JPEG", **options)
    start = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize("size", [(8160, 6144), (9248, 6936), (12_000, 9000), (16_320, 12_240)])
def test_photograph_of_phone_is_accepted_within_memory(size):
    data = jpeg_of(*size)
    image = ImageFile.from_bytes(data)
    assert 5e6 < image.width * image.height <= 20e6
    with image_files.open_image(io.BytesIO(data), "p.jpg") as opened:
        assert image_files.decode_bytes(opened) == 0


def test_limits_of_memory_and_pixels_have_their_numbers():
    with pytest.raises(
        ValueError, match=r"16320 × 12240 pixels: make it smaller|16321 × 12255 pixels: make it smaller"
    ):
        load_image(jpeg_of(16_321, 12_255))
    with pytest.raises(ValueError, match="GB to decode as JPEG, more than 0.5 GB: save it"):
        load_image(jpeg_of(16_000, 12_000, progressive=True, subsampling=0))
    with pytest.raises(ValueError, match="16000 × 12000 pixels, which take 0.9 GB to decode as PNG, more than 0.5 GB"):
        load_image(with_png_size(contents(PICTURE, "PNG"), 16_000, 12_000))


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    """A PNG, or a file that holds one, whose header promises so many pixels."""
    start = data.index(b"IHDR")
    header = b"IHDR" + struct.pack(">II", width, height) + data[start + 12 : start + 17]
    return data[:start] + header + struct.pack(">I", zlib.crc32(header)) + data[start + 21 :]


def test_icon_with_a_huge_image_within_is_refused():
    data = contents(PICTURE, "ICO", sizes=[(WIDTH, HEIGHT)])
    with pytest.raises(ValueError, match="holds an image of too many pixels"):
        load_image(with_png_size(data, 3000, 3000))


def test_pillows_own_limit_is_as_before():
    limit = Image.MAX_IMAGE_PIXELS
    load_image(contents(PICTURE, "PNG"))
    with pytest.raises(ValueError, match="is not an image"):
        load_image(b"nothing")
    assert limit == Image.MAX_IMAGE_PIXELS


PEAK = """
import resource, sys, warnings
from ov_mllama.runtime.images import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = load_image(sys.argv[1])
print(image.width, image.height, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.torture
def test_200_million_pixels_take_less_than_half_a_gigabyte(tmp_path, request):
    if not request.config.getoption("--torture"):
        pytest.skip("takes ten seconds")
    Image.new("RGB", (16_320, 12_240), "red").save(tmp_path / "p.jpg")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "p.jpg")]
    width, height, peak = subprocess.run(  # noqa: S603
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert (width, height) == ("4080", "3060")
    assert int(peak) * 1024 < 5e8


# ---- Transparency ----


def written(colour, ground=(0, 0, 0, 0)) -> Image.Image:
    image = Image.new("RGBA", (80, 20), ground)
    ImageDraw.Draw(image).text((4, 4), "MANGO 42", colour)
    return image


def test_white_writing_on_nothing_is_on_black():
    image = written("white")
    for source in (
        image,
        contents(image, "PNG"),
        contents(image, "WEBP", lossless=True, exact=True),
        np.asarray(image),
    ):
        assert np.array_equal(pixels(source), np.asarray(written("white", "black").convert("RGB")))
        assert "shown on black" in remark(source)


@pytest.mark.parametrize("colour", ["black", "blue", "red", "#666"])
def test_dark_writing_on_nothing_is_on_white(colour):
    image = written(colour)
    assert np.array_equal(pixels(contents(image, "PNG")), np.asarray(written(colour, "white").convert("RGB")))
    assert "remark" not in load_image(image).info


def test_light_image_with_dark_parts_or_without_transparency_is_on_white():
    both = written("white")
    ImageDraw.Draw(both).rectangle((76, 0, 79, 19), fill="black")
    opaque = Image.new("RGBA", (80, 20), "white")
    opaque.putpixel((0, 0), (255, 255, 255, 0))
    for image in (both, opaque):
        assert pixels(image)[0, 0].tolist() == [255, 255, 255]


# ---- More than 8 bits, floats ----

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "array"])
def test_deep_image_is_scaled_by_its_own_range(bits, form):
    values = np.round(RAMP * (2**bits - 1)).astype(np.uint16)
    source = values if form == "array" else contents(Image.fromarray(values), form)
    assert np.abs(pixels(source)[..., 1] - np.round(values * (255 / (2**bits - 1)))).max() == 0
    name = "The array" if form == "array" else "The image"
    if bits < 16:
        assert remark(source) == f"{name} has values up to {2**bits - 1}: it is read as an image of {bits} bits."
    else:
        assert load_image(source).info == {}


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_tiff_in_which_zero_is_white_is_inverted(kind):
    values, file = (RAMP * {"u1": 255, "u2": 65535, "f4": 1}[kind]).astype(kind), io.BytesIO()
    tifffile.imwrite(file, values, photometric="miniswhite")
    assert np.abs(pixels(file.getvalue())[..., 0] - (1 - RAMP) * 255).max() <= 1


@pytest.mark.parametrize(("low", "high"), [(-1024, 3071), (0, 10), (0, 1e6), (-1, 1)])
def test_float_image_is_scaled_by_its_own_range(low, high):
    values = (low + RAMP * (high - low)).astype(np.float32)
    data = contents(Image.fromarray(values), "TIFF")
    assert np.abs(pixels(data)[..., 0] - np.round(255 * RAMP)).max() <= 1
    assert f"from {low:g} to {high:g}: the lowest is shown black" in remark(data)


@pytest.mark.parametrize("high", [1, 255])
def test_float_image_of_a_usual_range_is_as_it_is(high):
    values = (RAMP * high).astype(np.float32)
    image = load_image(contents(Image.fromarray(values), "TIFF"))
    assert np.array_equal(np.asarray(image)[..., 0], np.round(values * (255 // high)))
    assert image.info == {}


def test_values_that_are_not_finite_are_black():
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    for source in (contents(Image.fromarray(values), "TIFF"), values):
        assert pixels(source)[0, :3].max() == 0
        assert pixels(source)[7, 7].tolist() == [255, 255, 255]
        assert "has 3 values that are not finite" in remark(source)
    with pytest.raises(ValueError, match="no finite value"):
        load_image(contents(Image.fromarray(values * np.nan), "TIFF"))


# ---- Pages and frames ----


def several(form: str, **options) -> bytes:
    pages = [Image.new("RGB", (75, 30), colour) for colour in ("red", "lime", "blue")]
    return contents(pages[0], form, save_all=True, append_images=pages[1:], **options)


@pytest.mark.parametrize("form", ["TIFF", "GIF", "PNG", "WEBP", "PDF"])
def test_page_is_chosen_by_its_number_from_1(form):
    data, options = several(form, **({"resolution": 150} if form == "PDF" else {})), {"PDF": 12, "WEBP": 4}
    for page, colour in enumerate(([255, 0, 0], [0, 255, 0], [0, 0, 255]), 1):
        assert np.abs(pixels(data, page=page)[15, 30] - colour).max() <= options.get(form, 0)
    assert np.array_equal(pixels(data), pixels(data, page=1))
    assert "the first one is used" in remark(data)
    assert "remark" not in load_image(data, page=1).info
    for page in (0, 4, -1):
        with pytest.raises(ValueError, match=f"has 3 pages: page={page} is none of them"):
            load_image(data, page=page)


def test_pages_of_an_address_are_downloaded_once(monkeypatch):
    fetched: list[str] = []
    data = several("TIFF")
    monkeypatch.setattr("ov_mllama.runtime.image_sources.download", lambda url: fetched.append(url) or data)
    assert len(load_pages("https://example.org/scan.tif")) == 3
    assert fetched == ["https://example.org/scan.tif"]


@pytest.mark.parametrize("form", ["TIFF", "GIF", "PDF"])
def test_pages_up_to_a_limit(form):
    data = several(form)
    assert [np.asarray(page)[9, 9].argmax() for page in load_pages(data)] == [0, 1, 2]
    with pytest.warns(UserWarning, match="has 3 pages: the first 2 are used"):
        assert len(load_pages(data, limit=2)) == 2
    with pytest.raises(ValueError, match="limit=0 loads no page"):
        load_pages(data, limit=0)


def test_pdf_is_drawn_at_150_dpi_from_any_source(tmp_path):
    (tmp_path / "scan").write_bytes(contents(PICTURE, "PDF", resolution=75, quality=95))
    for source in (tmp_path / "scan", str(tmp_path / "scan"), (tmp_path / "scan").read_bytes()):
        shown = pixels(source)
        assert shown.shape == (64, 64, 3)
        assert np.abs(averaged(shown) - SMOOTH).max() <= 16
    large = contents(PICTURE, "PDF", resolution=0.1)  # of 10 inches by 32 meters
    assert 4.9e6 < load_image(large).width ** 2 < 5.1e6


def test_page_of_a_pdf_that_is_a_hairline_is_not_drawn_large():
    data = contents(PICTURE, "PDF").replace(b"/MediaBox [", b"/MediaBox [ 0 0 10000000 .1 ] /Unused [")
    assert load_image(data).size == (5_000_000, 1)


def test_pdf_that_cannot_be_read_says_why(monkeypatch):
    data = contents(PICTURE, "PDF")
    fields = b"/Filter /Standard /V 1 /R 2 /P -4 /O (%b) /U (%b)" % (b"o" * 32, b"u" * 32)
    locked = data.replace(b"trailer\n<<", b"trailer\n<< /ID [<00><00>] /Encrypt << %b >>" % fields)
    assert locked != data
    with pytest.raises(ValueError, match="is encrypted: save it without a password"):
        load_image(locked)
    with pytest.raises(ValueError, match="is a broken PDF: save it anew"):
        load_image(b"%PDF-1.4 nothing more")
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ValueError, match=r'pip install "\.\[pdf\]"'):
        load_image(data)


# ---- Colour profiles ----


def profile_of(gamma: float) -> bytes:
    """sRGB's profile with another curve, written into its tags."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack(">I", data[128:132])[0]):
        place = 132 + 12 * index
        tag, offset, size = struct.unpack(">4sII", data[place : place + 12])
        end = offset + size
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset:end] = struct.pack(">4sIHHi", b"para", 0, 0, 0, int(gamma * 65536)).ljust(size, b"\0")
        if tag == b"desc":
            data[offset:end] = data[offset:end].replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    return bytes(data)


def in_srgb(values: np.ndarray, gamma: float) -> np.ndarray:
    linear = (values / 255) ** gamma
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profile_is_followed(mode):
    image = PICTURE.convert(mode)
    data = contents(image, "PNG", icc_profile=profile_of(1.0))
    assert np.abs(pixels(data) - in_srgb(np.asarray(image.convert("RGB")), 1.0)).max() <= 2


def test_transparency_outlives_a_colour_profile():
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert pixels(contents(image, "PNG", icc_profile=profile_of(1.0))).min() == 255


@pytest.mark.parametrize("profile", ["sRGB", "broken", "another's"])
def test_useless_colour_profile_changes_nothing(profile):
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB" if profile == "another's" else "sRGB")).tobytes()
    data = b"no profile" if profile == "broken" else data
    assert np.array_equal(pixels(contents(PICTURE, "PNG", icc_profile=data)), SMOOTH)


# ---- Sources ----


def test_path_as_people_write_it(tmp_path, monkeypatch):
    path = tmp_path / "my photo.png"
    PICTURE.save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    as_written = [str(path), path, f'"{path}"', f"'{path}'", f"  {path} \n", "~/my photo.png", '"~/my photo.png" ']
    as_written += [path.as_uri(), f"file://{path}", f"file:{path}", path.with_name("my photo.png ")]
    for source in as_written:
        assert np.array_equal(pixels(source), SMOOTH), source
    PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "my photo.png ", "PNG")
    assert np.array_equal(pixels(f"{path} "), SMOOTH[::-1])  # a name that exists is taken as it is


def test_data_uri_and_base64():
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    data = contents(Image.fromarray(noise), "PNG")
    encoded, urlsafe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode().rstrip("=")
    assert set("-_") <= {*urlsafe}
    sources = [f"data:image/png;base64,{each}" for each in (encoded, urlsafe)] + [f" data:;base64,{encoded}\n"]
    sources += [encoded, base64.encodebytes(data).decode(), bytearray(data), memoryview(data)]
    sources += ["data:image/png," + "".join(f"%{byte:02x}" for byte in data)]
    for source in sources:
        assert np.array_equal(pixels(source), noise)
    with pytest.raises(ValueError, match="not valid base64"):
        load_image("data:image/png;base64,§§§")


# ---- Refused with what it is and what to do ----

TIFF_OF_CAMERA = {"DNG": {50706: b"\1\4\0\0"}, "NEF": {254: 1, 330: 8}}


@pytest.mark.parametrize("kind", TIFF_OF_CAMERA)
def test_raw_data_of_camera_in_tiff_is_named(kind):
    with pytest.raises(ValueError, match="is the raw data of a camera: develop it"):
        load_image(contents(PICTURE, "TIFF", tiffinfo=TIFF_OF_CAMERA[kind]))


@pytest.mark.parametrize(("offset", "signature", "kind"), SIGNATURES, ids=lambda value: repr(value)[:20])
def test_foreign_file_is_named_with_advice(offset, signature, kind, tmp_path):
    (tmp_path / "x.png").write_bytes(b"." * offset + signature + b"\0" * 200)
    with pytest.raises(ValueError, match="^x.png is ") as error:
        load_image(tmp_path / "x.png")
    assert str(error.value) == f"x.png is {kind[0]}, no image that can be read: {kind[1]}."


SENTENCES = {
    b"": "is empty",
    b"\0" * 500: "is empty",
    b"\xef\xbb\xbf\n<!DOCTYPE HTML>": "is a web page.*save the image itself",
    b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg xmlns="x">': "is a drawing in SVG.*export it as PNG",
    gzip.compress(b"<svg></svg>", mtime=0): "is a drawing in SVG",
    b"\x1f\x8bnothing": "is not an image that can be read: use an intact PNG",
    b"II*\0\x10\0\0\0CR\2\0": "raw data of a camera",
}


@pytest.mark.parametrize("data", SENTENCES, ids=lambda data: repr(data)[:24])
def test_text_or_empty_file_is_named(data):
    with pytest.raises(ValueError, match=SENTENCES[data]):
        load_image(data)


def test_heic_without_its_package_is_named(monkeypatch):
    monkeypatch.setattr(image_files, "readable_formats", lambda: image_files.FORMATS)
    with pytest.raises(ValueError, match="is HEIC: pip install pillow-heif"):
        load_image(contents(PICTURE, "HEIF"))
