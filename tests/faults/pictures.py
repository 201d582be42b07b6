"""Pictures that are damaged, odd, or no pictures."""

import io
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

from PIL import Image, ImageCms

from .cases import Case, kind
from .damage import block, damaged
from .lab import Scene


FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": "TIFF",
    "ppm": "PPM",
    "ico": "ICO",
    "tga": "TGA",
    "jp2": "JPEG2000",
    "pcx": "PCX",
    "avif": "AVIF",
}


def case(scene: Scene, what: str, **rest) -> Case:
    """A run on the scene's `photos`."""
    subject = scene.subject(with_captions=False)
    return Case(what, subject, {"instance_data_dir": scene.folder / "photos"}, **rest)


def sample(rng: random.Random, mode: str = "RGB", size: tuple[int, int] = (96, 80)) -> Image.Image:
    return Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).convert(mode)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@kind
def damaged_bytes(scene: Scene) -> Case:
    extension = scene.rng.choice(list(FORMATS))
    data, what = damaged(scene.rng, encoded(sample(scene.rng), FORMATS[extension]))
    (scene.photos() / f"3.{extension}").write_bytes(data)
    return case(scene, f"3.{extension}: {what}")


@kind
def wrong_extension(scene: Scene) -> Case:
    content = {
        "a JPEG": encoded(sample(scene.rng), "JPEG"),
        "text": b"not a picture\n",
        "a PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
        "a script": b"#!/bin/sh\nexit 1\n",
        "a PostScript file": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n",
        "a HEIC header": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    }
    what = scene.rng.choice(list(content))
    extension = scene.rng.choice(
        ["jpg", "png", "webp", "heic", "svg", "eps", "psd", "nef", "PNG", "pdf", "mpo", "wmf"]
    )
    (scene.photos() / f"3.{extension}").write_bytes(content[what])
    return case(scene, f"{what} as .{extension}")


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(*chunks: bytes, size: tuple[int, int] = (64, 64), pixels: bytes | None = None) -> bytes:
    """A gray PNG with chunks between its header and its pixels."""
    if pixels is None:
        pixels = zlib.compress(bytes(65 * 64))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


@kind
def huge_dimensions(scene: Scene) -> Case:
    side = scene.rng.choice([0, 1, 9000, 13500, 30_000, 65_535, 2**31 - 1])
    other = scene.rng.choice([0, 1, 64, side])
    files = {
        "png": lambda: png_with(size=(side, other)),
        "pgm": lambda: f"P5 {side} {other} 255\n".encode() + bytes(100),
        "bmp": lambda: (
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, side, other, 1, 24, *[0] * 6) + bytes(100)
        ),
        "gif": lambda: b"GIF89a" + struct.pack("<HHBBB", side % 65536, other % 65536, 0, 0, 0) + b";",
        "pfm": lambda: f"PF\n{side} {other}\n-1.0\n".encode() + bytes(100),
    }
    extension = scene.rng.choice(list(files))
    (scene.photos() / f"3.{extension}").write_bytes(files[extension]())
    return case(scene, f"a {extension} of {side} x {other} pixels in its header")


@kind
def odd_size(scene: Scene) -> Case:
    width, height = scene.rng.choice(
        [(1, 1), (1, 64), (2000, 1), (5, 3000), (13_000, 13_000), (13_400, 13_400), (8, 8)]
    )
    mode = "1" if width > 5000 else "RGB"
    Image.new(mode, (width, height)).save(scene.photos() / "3.png")
    buckets = {"use_aspect_ratio_buckets": True} if scene.rng.random() < 0.5 else {}
    flags = {"instance_data_dir": scene.folder / "photos", **buckets}
    return Case(f"{width} x {height} pixels, buckets {bool(buckets)}", scene.subject(with_captions=False), flags)


@kind
def odd_mode(scene: Scene) -> Case:
    mode, extension = scene.rng.choice(
        [("P", "png"), ("LA", "png"), ("PA", "tiff"), ("I;16", "png"), ("I", "tiff"), ("F", "tiff"), ("CMYK", "jpg")]
        + [
            ("CMYK", "tiff"),
            ("1", "png"),
            ("RGBA", "png"),
            ("LAB", "tiff"),
            ("YCbCr", "tiff"),
            ("L", "jpg"),
            ("1", "tiff"),
        ]
    )
    image = sample(scene.rng)
    if mode in ("PA", "LAB"):
        image = (
            image.convert("LA").convert("PA") if mode == "PA" else Image.frombytes("LAB", image.size, image.tobytes())
        )
    else:
        image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    path = scene.photos() / f"3.{extension}"
    options = {"transparency": 3} if mode == "P" and scene.rng.random() < 0.5 else {}
    try:
        image.save(path, **options)
    except OSError:  # this version of Pillow does not write it
        image.convert("RGBA").save(path.with_suffix(".png"))
    return case(scene, f"mode {mode} as {extension} {options or ''}")


@kind
def broken_exif(scene: Scene) -> Case:
    rng = scene.rng
    exif = Image.Exif()
    exif[0x0112] = rng.choice([0, 6, 9, 255, 65535])
    exif[0x010E] = "x" * rng.choice([0, 10, 60_000])
    data, what = damaged(rng, exif.tobytes())
    if rng.random() < 0.3:
        data, what = exif.tobytes(), f"orientation {exif[0x0112]}"
    extension = rng.choice(["jpg", "png", "webp"])
    (scene.photos() / f"3.{extension}").write_bytes(encoded(sample(rng), FORMATS[extension], exif=data[:65_000]))
    return case(scene, f"EXIF in 3.{extension}: {what}")


@kind
def broken_profile(scene: Scene) -> Case:
    rng = scene.rng
    mode = rng.choice(["RGB", "L", "CMYK"])
    name = rng.choice(["sRGB", "LAB", "XYZ"])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()
    data, what = (profile, "whole") if rng.random() < 0.3 else damaged(rng, profile)
    extension = "tiff" if mode == "CMYK" else rng.choice(["jpg", "png", "tiff"])
    (scene.photos() / f"3.{extension}").write_bytes(encoded(sample(rng, mode), FORMATS[extension], icc_profile=data))
    return case(scene, f"{name} profile in a {mode} {extension}: {what}")


@kind
def animated(scene: Scene) -> Case:
    extension = scene.rng.choice(["gif", "png", "webp", "tiff"])
    frames = [sample(scene.rng) for _ in range(3)]
    data = encoded(frames[0], FORMATS[extension], save_all=True, append_images=frames[1:])
    what = "whole"
    if scene.rng.random() < 0.7:
        data, what = damaged(scene.rng, data)
    (scene.photos() / f"3.{extension}").write_bytes(data)
    return case(scene, f"animated {extension}: {what}")


@kind
def odd_name(scene: Scene) -> Case:
    name = scene.rng.choice(
        [
            " .png",
            "a\nb.png",
            "\x1b[31m.png",
            "é.png",
            "e\u0301.png",
            "😀.png",
            "\u202egnp.png",
            "-x.png",
            "--rank.png",
        ]
        + [
            "'\".png",
            "*.png",
            "%s.png",
            "a\\b.png",
            "~.png",
            "$(x).png",
            "x" * 240 + ".png",
            ".png",
            "__x.png",
            "x.png ",
        ]
        + ["\udcff.png", "a\tb.png", "{0}.png", "CON.png", "x.PNG", "x..png", "\u2028.png", "a\rb.png"]
    )
    path = scene.photos() / name
    is_good = scene.rng.random() < 0.5
    path.write_bytes(encoded(sample(scene.rng), "PNG") if is_good else b"no picture")
    return case(scene, f"a {'good' if is_good else 'bad'} picture named {name!r}")


@kind
def special_file(scene: Scene) -> Case:
    return case(scene, block(scene.rng, scene.photos() / scene.rng.choice(["0.png", "3.jpg"])))


@kind
def linked_folders(scene: Scene) -> Case:
    photos = scene.photos()
    outside = scene.folder / "outside"
    outside.mkdir()
    (outside / "3.png").write_bytes((photos / "0.png").read_bytes())
    kinds = {
        "a link to a folder outside": lambda: (photos / "sub").symlink_to(outside),
        "a link to its parent": lambda: (photos / "sub").symlink_to(".."),
        "two links that loop": lambda: ((photos / "a").symlink_to("b"), (photos / "b").symlink_to("a")),
        "a link to a picture outside": lambda: (photos / "3.png").symlink_to(outside / "3.png"),
        "a link to itself from outside": lambda: (
            (photos / "sub").symlink_to(outside),
            (outside / "x").symlink_to(photos),
        ),
        "folders 60 deep": lambda: deep_folder(photos, 60),
        "folders 400 deep": lambda: deep_folder(photos, 400),
    }
    what = scene.rng.choice(list(kinds))
    kinds[what]()
    return case(scene, what)


def deep_folder(folder: Path, depth: int) -> None:
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    with os.fdopen(os.open("3.png", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
        file.write((folder / "0.png").read_bytes())
    os.close(here)


@kind
def archive(scene: Scene) -> Case:
    photos = scene.photos()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.write(photos / "0.png", "../../0.png")
    name = scene.rng.choice(["photos.zip", "3.png", "x.txt", "metadata.zip"])
    with zipfile.ZipFile(photos / name, "w") as file:
        file.writestr("inner.zip", inner.getvalue())
    if scene.rng.random() < 0.3:
        for path in photos.glob("[0-9].png"):
            path.unlink()
    return case(scene, f"a nested zip named {name} among {len(list(photos.iterdir()))} files")


@kind
def odd_chunks(scene: Scene) -> Case:
    bomb = zlib.compress(bytes(80_000_000))
    files = {
        "3 MB of text": lambda: png_with(png_chunk(b"tEXt", b"key\0" + b"x" * 3_000_000)),
        "text that inflates to 80 MB": lambda: png_with(png_chunk(b"zTXt", b"key\0\0" + bomb)),
        "a profile that inflates to 80 MB": lambda: png_with(png_chunk(b"iCCP", b"x\0\0" + bomb)),
        "pixels that inflate to 80 MB": lambda: png_with(pixels=bomb),
        "too few pixels": lambda: png_with(pixels=zlib.compress(b"x")),
        "a wrong checksum": lambda: png_with(b"\0\0\0\1tEXtx1234"),
        "two headers": lambda: png_with(png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))),
        "a palette for gray": lambda: png_with(png_chunk(b"PLTE", bytes(768)), png_chunk(b"tRNS", bytes(300))),
        "an unknown critical chunk": lambda: png_with(png_chunk(b"ABCD", b"x")),
        "a chunk with a negative length": lambda: png_with(b"\xff\xff\xff\xfftEXt"),
        "bad iTXt": lambda: png_with(png_chunk(b"iTXt", b"\0\1\1")),
        "bad pHYs and gAMA": lambda: png_with(
            png_chunk(b"pHYs", b"\0"), png_chunk(b"gAMA", b"\0"), png_chunk(b"acTL", b"")
        ),
    }
    what = scene.rng.choice(list(files))
    (scene.photos() / "3.png").write_bytes(files[what]())
    return case(scene, f"a PNG with {what}")
