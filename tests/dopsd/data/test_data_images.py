import functools
import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_helpers import BLUE, GREEN, RED, WHITE, YELLOW, as_picture, assert_names, error_of, write_pictures
from dopsd.data.checking import check_pictures
from dopsd.data.images import read_image, to_rgb
from dopsd.data.pictures import Picture


def gradient(mode, *pixels):
    """An image with one row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    for index, pixel in enumerate(pixels):
        image.putpixel((index, 0), pixel)
    return image


def palette(color_mode, *colors):
    image = gradient("P", *range(len(colors)))
    image.putpalette([value for color in colors for value in color], color_mode)
    return image


def with_transparency(image, value):
    image.info["transparency"] = value
    return image


def sizes_of(pictures, resolution=64):
    return [one.size for one in check_pictures(pictures, resolution=resolution, disable_progress=True)]


def pixels_of(image):
    return [tuple(map(int, pixel)) for pixel in np.asarray(image).reshape(-1, 3)]


HALF = (255, 127, 127)  # red with alpha 128 on white


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (gradient("1", 0, 255), "png", [(0, 0, 0), WHITE]),
        (gradient("L", 0, 77, 255), "png", [(0, 0, 0), (77, 77, 77), WHITE]),
        (gradient("LA", (77, 255), (0, 0), (0, 128)), "png", [(77,) * 3, WHITE, (127,) * 3]),
        (palette("RGB", RED, GREEN), "png", [RED, GREEN]),
        (palette("RGB", RED, GREEN), "gif", [RED, GREEN]),
        (with_transparency(palette("RGB", RED, GREEN), b"\x80\xff"), "png", [HALF, GREEN]),
        (with_transparency(palette("RGB", RED, GREEN), 1), "gif", [RED, WHITE]),
        (gradient("RGB", RED, (1, 2, 3)), "png", [RED, (1, 2, 3)]),
        (with_transparency(gradient("RGB", RED, GREEN), GREEN), "png", [RED, WHITE]),
        (with_transparency(gradient("L", 7, 9), 7), "png", [WHITE, (9, 9, 9)]),
        (with_transparency(gradient("1", 255, 0), 0), "png", [WHITE, WHITE]),
        (gradient("RGBA", (*RED, 255), (*RED, 0), (*RED, 128)), "png", [RED, WHITE, HALF]),
        (gradient("RGBA", (*RED, 255), (*RED, 0), (*RED, 128)), "tiff", [RED, WHITE, HALF]),
        (gradient("CMYK", (0, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255)), "tiff", [RED, WHITE, (0, 0, 0)]),
        (gradient("I;16", 0, 1000, 32896, 65535), "png", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
        (gradient("I;16", 0, 1000, 32896, 65535), "tiff", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
        (gradient("I;16B", 0, 1000, 32896, 65535), "tiff", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
        (gradient("I", 0, 1000, 32896, 65535), "tiff", [(0,) * 3, (4,) * 3, (128,) * 3, WHITE]),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "mode", ""),
)
def test_every_mode_becomes_rgb(tmp_path, image, suffix, expected):
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    read = read_image(as_picture(path))
    assert read.mode == "RGB" and pixels_of(read) == expected


def test_files_keep_the_mode_that_they_are_saved_in(tmp_path):
    """Otherwise the test above would not test these modes."""
    for mode, suffix in [("I;16", "png"), ("I;16B", "tiff"), ("I", "tiff"), ("CMYK", "tiff"), ("LAB", "tiff")]:
        Image.new(mode, (1, 1)).save(tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as image:
            assert image.mode == mode


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (gradient("PA", (0, 255), (0, 0)), [(0, 0, 0), WHITE]),
        (gradient("RGBa", (*RED, 255), (128, 0, 0, 128), (0, 0, 0, 0)), [RED, HALF, WHITE]),
        (gradient("La", (77, 255), (0, 128), (0, 0)), [(77,) * 3, (127,) * 3, WHITE]),
        (palette("RGBA", (*RED, 255), (*RED, 0)), [RED, WHITE]),
        (gradient("YCbCr", (0, 128, 128), (255, 128, 128)), [(0, 0, 0), WHITE]),
        (gradient("HSV", (0, 255, 255), (0, 0, 255)), [RED, WHITE]),
        (gradient("RGBX", (*RED, 0)), [RED]),
        (gradient("I;16L", 1000, 65535), [(4,) * 3, WHITE]),
        (gradient("I;16N", 1000, 65535), [(4,) * 3, WHITE]),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_rare_modes(image, expected):
    assert pixels_of(to_rgb(image)) == expected


def test_premultiplied_grey_tiff(tmp_path):
    gradient("LA", (0, 128), (77, 255)).save(tmp_path / "a.tiff")
    straight, premultiplied = (struct.pack("<HHIHH", 338, 3, 1, value, 0) for value in (2, 1))  # tag ExtraSamples
    data = (tmp_path / "a.tiff").read_bytes()
    assert data.count(straight) == 1
    (tmp_path / "a.tiff").write_bytes(data.replace(straight, premultiplied))
    with Image.open(tmp_path / "a.tiff") as image:
        assert image.mode == "La"
    assert pixels_of(read_image(as_picture(tmp_path / "a.tiff"))) == [(127,) * 3, (77,) * 3]


def test_transparent_16_bit_grey(tmp_path):
    rows = [struct.pack(">3H", 1000, 1001, 65535)]
    (tmp_path / "a.png").write_bytes(png(3, 1, 16, 0, rows, transparency=struct.pack(">H", 1000)))
    assert pixels_of(read_image(as_picture(tmp_path / "a.png"))) == [WHITE, (4,) * 3, WHITE]


def test_16_bit_pgm(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 32896, 65535))
    assert pixels_of(read_image(as_picture(tmp_path / "a.pgm"))) == [(128,) * 3, WHITE]


def test_lab_tiff(tmp_path):
    gradient("LAB", (0, 128, 128), (255, 128, 128), (138, 209, 198)).save(tmp_path / "a.tiff")
    read = np.asarray(read_image(as_picture(tmp_path / "a.tiff")), dtype=int)
    assert abs(read - [[(0, 0, 0), WHITE, RED]]).max() <= 6  # LAB has 8 bits


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB", "YCbCr"])
def test_jpegs(tmp_path, mode):
    """CMYK JPEGs with Adobe's marker are stored inverted."""
    Image.new("RGB", (16, 16), (200, 60, 60)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    expected = Image.new("RGB", (16, 16), (200, 60, 60)).convert(mode).convert("RGB").getpixel((8, 8))
    read = read_image(as_picture(tmp_path / "a.jpg")).getpixel((8, 8))
    assert max(abs(a - b) for a, b in zip(read, expected, strict=True)) <= 4
    assert mode != "CMYK" or b"Adobe" in (tmp_path / "a.jpg").read_bytes()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_several(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    lossless = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **lossless)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 2
    assert read_image(as_picture(tmp_path / f"a.{suffix}")).getpixel((4, 4)) == RED


# By EXIF orientation: the corners, clockwise from the top left, of a picture stored as red, green, blue, yellow.
UPRIGHT_CORNERS = {
    1: [RED, GREEN, BLUE, YELLOW],
    2: [GREEN, RED, YELLOW, BLUE],
    3: [BLUE, YELLOW, RED, GREEN],
    4: [YELLOW, BLUE, GREEN, RED],
    5: [RED, YELLOW, BLUE, GREEN],
    6: [YELLOW, RED, GREEN, BLUE],
    7: [BLUE, GREEN, RED, YELLOW],
    8: [GREEN, BLUE, YELLOW, RED],
}


def corners(image):
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (right, bottom), (0, bottom))]


def stored_corners():
    image = Image.new("RGB", (24, 16), WHITE)
    for place, color in zip(((0, 0), (23, 0), (23, 15), (0, 15)), (RED, GREEN, BLUE, YELLOW), strict=True):
        image.putpixel(place, color)
    return image


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT_CORNERS)
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    stored_corners().save(tmp_path / f"a.{suffix}", exif=exif, **lossless)
    picture = as_picture(tmp_path / f"a.{suffix}")
    assert corners(read_image(picture)) == UPRIGHT_CORNERS[orientation]
    upright = (24, 16) if orientation >= 5 else (16, 24)  # (height, width)
    assert sizes_of([picture]) == [upright]


def test_jpeg_with_orientation_and_a_tag_that_cannot_be_written_again(tmp_path):
    """exif_transpose alone raises an error for this file."""
    entries = [(0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, struct.pack("<HH", 6, 0))]  # width as text
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)
    Image.new("RGB", (24, 16), RED).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(as_picture(tmp_path / "a.jpg")).size == (16, 24)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color_type, rows, transparency=None):
    """An encoded PNG, for kinds that Pillow reads but does not write. `rows`: the bytes of each row."""
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    )
    if transparency is not None:
        data += png_chunk(b"tRNS", transparency)
    return data + png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + png_chunk(b"IEND", b"")


def encoded(image, file_format, **settings):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


@functools.cache
def damaged_files():
    """Together they raise all of `PILLOW_ERRORS` except struct.error."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole_png, whole_jpeg, whole_avif = (encoded(noise, file_format) for file_format in ("PNG", "JPEG", "AVIF"))
    small_avif, tiff = (encoded(Image.new("RGB", (16, 16)), file_format) for file_format in ("AVIF", "TIFF"))
    return {
        "empty.png": b"",
        "text.jpg": b"<html>not found</html>",
        "cut.png": whole_png[: len(whole_png) // 2],
        "cut.jpg": whole_jpeg[: len(whole_jpeg) // 2],
        "cut.avif": whole_avif[: len(whole_avif) // 2],
        "bad_end.avif": small_avif[:-3] + bytes([small_avif[-3] ^ 255]) + small_avif[-2:],
        "bad_exif.webp": encoded(noise, "WEBP", exif=b"Exif\0\0IM*\0\x08\0\0\0"),
        "bad_tag.tiff": tiff.replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 2)),  # an offset as text
        "bad_profile.png": whole_png[:-12] + png_chunk(b"iCCP", b"") + whole_png[-12:],
        "bad_checksum.png": whole_png[:60] + bytes([whole_png[60] ^ 255]) + whole_png[61:],
        "bad_number.ppm": b"P6 x 1 255\n" + bytes(3),
        "bomb.png": png(20000, 20000, 8, 0, []),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_pictures_are_errors_that_name_them(tmp_path, name):
    (tmp_path / name).write_bytes(damaged_files()[name])
    message = error_of(check_pictures, [as_picture(tmp_path / name)], resolution=64, disable_progress=True)
    assert_names(message, name, "cannot be read", "shrink it" if name == "bomb.png" else "JPEG or PNG")
    assert "0x" not in message


def png_with(*chunks):
    whole = encoded(Image.new("RGB", (4, 4)), "PNG")
    return whole[:33] + b"".join(png_chunk(kind, data) for kind, data in chunks) + whole[33:]  # after IHDR


def zipped(num_bytes):
    return zlib.compress(bytes(num_bytes))


@pytest.mark.parametrize(
    "data",
    [
        png_with((b"zTXt", b"prompt\0\0" + zipped(3 * 2**20))),
        png_with((b"iTXt", b"prompt\0\1\0\0\0" + zipped(3 * 2**20))),
        png_with((b"iCCP", b"profile\0\0" + zipped(3 * 2**20))),
        png_with(*[(b"zTXt", b"prompt\0\0" + zipped(2**20))] * 65),
    ],
    ids=["zTXt", "iTXt", "iCCP", "many"],
)
def test_pictures_with_too_much_text_are_told_to_drop_it(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    message = error_of(read_image, as_picture(tmp_path / "a.png"))
    assert_names(message, "a.png", "metadata", "save it again without them")
    assert "PNG" not in message


def test_pictures_with_more_pixels_than_pillow_reads_are_told_to_shrink(tmp_path):
    (tmp_path / "a.png").write_bytes(png(14000, 13000, 8, 0, []))  # 182 megapixels
    message = error_of(read_image, as_picture(tmp_path / "a.png"))
    assert_names(message, "a.png", "more than 179 megapixels", "shrink it")
    assert "PNG" not in message and "JPEG" not in message


def test_the_first_frame_of_an_mpo(tmp_path):
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second], quality=100)
    with Image.open(tmp_path / "a.mpo") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    red, green, blue = read_image(as_picture(tmp_path / "a.mpo")).getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5


def test_a_picture_deleted_after_the_folder_was_read(tmp_path):
    assert_names(error_of(read_image, as_picture(tmp_path / "a.png")), "a.png", "No such file")


@pytest.mark.parametrize(("mode", "pixel"), [("F", 0.5), ("I", 65536), ("I", -1)])
def test_pixels_of_unknown_range_are_errors(tmp_path, mode, pixel):
    gradient(mode, pixel).save(tmp_path / "a.tiff")
    assert_names(error_of(read_image, as_picture(tmp_path / "a.tiff")), "a.tiff", "convert it")


def test_digests_are_of_the_encoded_picture(tmp_path):
    write_pictures(tmp_path, "a.png", "b.bmp")
    pictures = [as_picture(tmp_path / "a.png"), as_picture(tmp_path / "b.bmp"), Picture("line 3", ("a dog",), None)]
    digests = [one.digest for one in check_pictures(pictures, resolution=64, disable_progress=True)]
    assert digests[0] == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert digests[0] != digests[1]  # the same pixels
    assert digests[2] == ""


def test_captions_without_a_picture_have_the_size_of_the_resolution(tmp_path):
    write_pictures(tmp_path, "a.png", size=(20, 10))
    pictures = [Picture("line 1", ("a dog",), None), as_picture(tmp_path / "a.png")]
    assert sizes_of(pictures, resolution=96) == [(96, 96), (10, 20)]
