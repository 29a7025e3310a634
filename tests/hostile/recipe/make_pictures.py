"""Makes the pictures of the hostile catalogue. Needs Pillow below 13: pip install 'pillow<13'.

Usage: python make_pictures.py FOLDER

`served_*` are unusual and right; `refused_*` are not. tests/tests/hostile.rs says what becomes of each.
"""

import io
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image


def scene(mode="RGB", size=(40, 28)):
    width, height = size
    image = Image.new("RGB", size)
    image.putdata([((x * 6) % 256, (y * 9) % 256, (x * y) % 256) for y in range(height) for x in range(width)])
    return image.convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *more):
    """A PNG of these rows, whatever the header says."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + data + chunk(b"IEND", b"")


def served():
    frames = [scene().point(lambda v, s=shade: (v + s) % 256) for shade in (0, 80, 160)]
    moving = dict(save_all=True, append_images=frames[1:], duration=100, loop=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = scene("RGBA")
    transparent.putalpha(scene("L"))
    rgb16 = b"".join(b"\0" + bytes((x * 7 + c * 5 + y) % 256 for x in range(20) for c in range(6)) for y in range(10))
    yield "1x1.png", encoded(Image.new("RGB", (1, 1), (200, 10, 30)), "PNG")
    yield "16_bit_gray.png", encoded(scene("L").convert("I;16"), "PNG")
    yield "16_bit_rgb.png", png(20, 10, 16, 2, rgb16)
    yield "1_bit.png", encoded(scene("1"), "PNG")
    yield "palette.png", encoded(scene().quantize(16), "PNG", transparency=3)
    yield "transparent.png", encoded(transparent, "PNG")
    yield "cmyk.jpg", encoded(scene("CMYK"), "JPEG")
    yield "progressive.jpg", encoded(scene(), "JPEG", progressive=True)
    yield "rotated.jpg", encoded(scene(), "JPEG", exif=exif)
    yield "still.webp", encoded(scene(), "WEBP")
    yield "still.gif", encoded(scene().quantize(16), "GIF")
    yield "still.bmp", encoded(scene(), "BMP")
    yield "still.tiff", encoded(scene(), "TIFF", compression="tiff_lzw")
    yield "animated.gif", encoded(frames[0], "GIF", **moving)
    yield "animated.webp", encoded(frames[0], "WEBP", lossless=True, **moving)
    yield "animated.png", encoded(frames[0], "PNG", **moving)


def refused():
    side = 65535
    bmp = bytearray(encoded(scene(), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    gif = bytearray(encoded(scene().quantize(16), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    jpg = bytearray(encoded(scene(), "JPEG"))
    frame = jpg.index(b"\xff\xc0")
    jpg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    webp = bytearray(encoded(scene(), "WEBP", lossless=True))
    # 14 bits each of width - 1 and height - 1, after the signature of the lossless stream.
    webp[21:25] = struct.pack("<I", 16383 | 16383 << 14)
    row = bytes(1 + 40 * 3)
    yield "65535x65535.png", png(side, side, 8, 2, row * 28)
    yield "65535x65535.bmp", bytes(bmp)
    yield "65535x65535.gif", bytes(gif)
    yield "65535x65535.jpg", bytes(jpg)
    yield "16384x16384.webp", bytes(webp)
    yield "0x0.png", png(0, 0, 8, 2, b"")
    yield "20000x10.png", encoded(Image.new("1", (20000, 10)), "PNG")
    # 400 million pixels in 49 KB, as said by the header.
    yield "bomb.png", png(20000, 20000, 1, 0, bytes(2501 * 20000))
    # 20 MB behind a header of 40 x 28.
    yield "hidden_bomb.png", png(40, 28, 8, 2, row * 14 + bytes(20_000_000))[:-40]
    yield "wrong_checksum.png", encoded(scene(), "PNG").replace(b"IDAT", b"IDAT", 1)[:-20] + bytes(20)
    yield "png_that_is_a_jpg.png", b"\x89PNG\r\n\x1a\n" + encoded(scene(), "JPEG")
    yield "text.png", b"This is a text in a file called a picture.\n"
    yield "script.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield "pdf.pdf", b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"


def main():
    folder = Path(sys.argv[1])
    for group in (served, refused):
        for name, data in group():
            (folder / f"{group.__name__}_{name}").write_bytes(data)


main()
