"""Small ICC profiles, written by hand: matrix and gray profiles with a curve, and a CMYK profile with a table."""

import itertools
import struct


D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def xyz(values):
    return b"XYZ \0\0\0\0" + fixed(*values)


def gamma_curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))


SRGB_CURVE = b"para\0\0\0\0" + struct.pack(">Hxx", 3) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(space, tags, connection=b"XYZ ", kind=b"mntr"):
    """An encoded profile of version 2.4."""
    tags = {b"wtpt": xyz(D50), b"cprt": b"text\0\0\0\0none\0"} | tags
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4x4s4s4s4s12x4s", size, b"\x02\x40\0\0", kind, space, connection, b"acsp")
    return (header + bytes(28) + fixed(*D50)).ljust(128, b"\0") + table + body


def rgb_profile(primaries, curve=SRGB_CURVE):
    colorants = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=True))
    return profile(b"RGB ", colorants | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def gray_profile(gamma):
    return profile(b"GRAY", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile(lab_of_cyan):
    """Cyan ink has this color, other inks take lightness alone, and all is linear in between.

    Args:
        lab_of_cyan: L from 0 to 100, a and b from -128 to 127.
    """
    nodes = []
    for cyan, magenta, yellow, black in itertools.product((0, 1), repeat=4):
        lightness, a, b = lab_of_cyan if cyan else (100, 0, 0)
        lightness = 0 if black else max(0, lightness - 40 * (magenta + yellow))
        nodes += [round(lightness * 2.55), a + 128, b + 128]
    identity = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += 4 * identity + bytes(nodes) + 3 * identity
    return profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, connection=b"Lab ", kind=b"prtr")
