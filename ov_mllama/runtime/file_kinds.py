"""Kinds of files by their content: what is no readable image, with what to do about it."""

import gzip
import zlib

HEAD_BYTES = 2048  # of a file, by which its kind is told
PNG_ADVICE = "export it as PNG or JPEG"
RAW = ("the raw data of a camera", "develop it, or use the JPEG that the camera saved beside it")
VIDEO = ("a video", "give one of its frames, as with `ffmpeg -i in.mp4 -frames:v 1 out.png`")
JXL = ("JPEG XL", "convert it, as with `djxl in.jxl out.png`")
SVG = ("a drawing in SVG", "export it as PNG, at about 1120 pixels")
PAGE = ("a web page", "save the image itself, not the page that shows it")
ARCHIVE = ("a ZIP archive or an Office document", "extract an image, or save its pages as PDF")

# Offset, first bytes there, what the file is, what to do
SIGNATURES: tuple[tuple[int, bytes, tuple[str, str]], ...] = (
    (0, b"%!PS", ("PostScript", PNG_ADVICE)),
    (0, b"\xc5\xd0\xd3\xc6", ("PostScript", PNG_ADVICE)),
    (0, b"8BPS", ("a Photoshop document", PNG_ADVICE)),
    (0, b"8BPB", ("a Photoshop document", PNG_ADVICE)),
    (0, b"gimp xcf", ("a GIMP document", PNG_ADVICE)),
    (0, b"SIMPLE  =", ("a FITS file", PNG_ADVICE)),
    (0, b"v/1\x01", ("OpenEXR", PNG_ADVICE)),
    (0, b"#?RADIANCE", ("Radiance HDR", PNG_ADVICE)),
    (0, b"\xd7\xcd\xc6\x9a", ("a Windows metafile", PNG_ADVICE)),
    (128, b"DICM", ("DICOM", "export it as PNG or TIFF of 16 bits")),
    (0, b"\xff\x0a", JXL),
    (0, b"\0\0\0\x0cJXL ", JXL),
    (0, b"FUJIFILMCCD-RAW", RAW),
    (0, b"IIRO", RAW),
    (0, b"IIRS", RAW),
    (0, b"MMOR", RAW),
    (0, b"IIU\0", RAW),
    (0, b"FOVb", RAW),
    (8, b"CR\x02", RAW),
    (4, b"ftypcrx ", RAW),
    (4, b"ftypqt", VIDEO),
    (4, b"ftypisom", VIDEO),
    (4, b"ftypiso", VIDEO),
    (4, b"ftypmp4", VIDEO),
    (4, b"ftypM4V", VIDEO),
    (4, b"ftypavc1", VIDEO),
    (4, b"ftypMSNV", VIDEO),
    (4, b"ftyp3g", VIDEO),
    (4, b"moov", VIDEO),
    (8, b"AVI LIST", VIDEO),
    (0, b"\x1a\x45\xdf\xa3", VIDEO),
    (0, b"FLV\x01", VIDEO),
    (0, b"\0\0\x01\xba", VIDEO),
    (0, b"\0\0\x01\xb3", VIDEO),
    (0, b"0&\xb2u\x8ef\xcf\x11", VIDEO),
    (0, b"PK\x03\x04", ARCHIVE),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ("an Office document", "save its pages as PDF")),
    (0, b"7z\xbc\xaf\x27\x1c", ("an archive", "extract an image")),
    (0, b"Rar!", ("an archive", "extract an image")),
    (0, b"version https://git-lfs", ("a pointer of Git LFS", "get the file itself by `git lfs pull`")),
)
TGA_TYPES, TGA_BITS, TGA_SUFFIXES = (1, 2, 3, 9, 10, 11), (8, 15, 16, 24, 32), ("", ".tga", ".icb", ".vda", ".vst")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def describe(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that is no readable image, and what to do about it; None if that is unknown."""
    if not head.strip(b"\0"):
        return ("empty", "save or download it again")
    for offset, signature, kind in SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    text = head
    if head.startswith(b"\x1f\x8b"):
        try:
            text = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except (zlib.error, gzip.BadGzipFile):
            text = b""
    text = text.removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").lstrip().lower()
    if b"<svg" in text and text.startswith(b"<"):
        return SVG
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return PAGE
    return None


def is_heic(head: bytes) -> bool:
    """Return whether a file is HEIC, the format of iPhones' photographs."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def is_icon(head: bytes) -> bool:
    """Return whether a file is ICO."""
    return head.startswith(b"\0\0\1\0")


def is_tga(head: bytes, suffix: str) -> bool:
    """Return whether a file may be a TGA image. Its format has no signature at its beginning, only plausible fields."""
    plausible = (
        len(head) > 18 and head[1] in (0, 1) and head[2] in (1, 2, 3, 9, 10, 11) and head[16] in (8, 15, 16, 24, 32)
    )
    return plausible and suffix in ("", ".tga", ".icb", ".vda", ".vst")
