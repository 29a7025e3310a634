"""Makes the videos of the hostile catalogue: other codecs, no pictures at all, and headers that lie.

pip install imageio-ffmpeg==0.8.1
python make_videos.py FOLDER

`tests/videos/main_bt709.mp4` is the one whose headers are made to lie.
"""

import struct
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg

VIDEOS = Path(__file__).resolve().parents[2] / "videos"


def encoded(*options: str, source: str = "testsrc=size=64x48:rate=5:duration=0.8") -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", "-f", "lavfi", "-i", source]
    file = Path("/tmp") / f"hostile.{options[-1]}"
    subprocess.run([*command, "-fflags", "+bitexact", "-flags", "+bitexact", *options[:-1], str(file)], check=True)
    return file.read_bytes()


def patched(box: bytes, offset: int, *words: int, size: str = ">I") -> bytes:
    """The good video with words written `offset` bytes after the name of a box."""
    file = bytearray((VIDEOS / "main_bt709.mp4").read_bytes())
    at = file.index(box) + 4 + offset
    for i, word in enumerate(words):
        struct.pack_into(size, file, at + i * struct.calcsize(size), word)
    return bytes(file)


def refused():
    yield "audio_only.mp4", encoded("-c:a", "aac", "-b:a", "16k", "mp4", source="sine=duration=0.5:sample_rate=8000")
    yield "hevc.mp4", encoded("-c:v", "libx265", "-x265-params", "log-level=error:info=0", "-tag:v", "hvc1", "mp4")
    yield "vp9.mp4", encoded("-c:v", "libvpx-vp9", "mp4")
    yield "av1.mp4", encoded("-c:v", "libsvtav1", "-svtav1-params", "lp=1", "mp4")
    yield "vp8.webm", encoded("-c:v", "libvpx", "webm")
    yield "mjpeg.avi", encoded("-c:v", "mjpeg", "avi")
    # Counts: stsz has version and flags, a size for all samples, the number of samples.
    yield "no_samples.mp4", patched(b"stsz", 8, 0)
    yield "endless_samples.mp4", patched(b"stsz", 8, 0xFFFFFFFF)
    yield "huge_samples.mp4", patched(b"stsz", 4, 0xFFFFFFFF)
    # Times: stts has version and flags, the number of entries, and of each a count and a duration.
    yield "endless_times.mp4", patched(b"stts", 4, 0xFFFFFFFF)
    yield "slow.mp4", patched(b"stts", 12, 0x7FFFFFFF)
    yield "no_timescale.mp4", patched(b"mdhd", 12, 0)
    # Places: stco has version and flags, the number of entries, and of each where it lies.
    yield "beyond_the_end.mp4", patched(b"stco", 8, 0xFFFFFFF0)
    # Boxes: the size of the box that holds all others.
    yield "huge_box.mp4", patched(b"moov", -8, 0x7FFFFFFF)
    yield "tiny_box.mp4", patched(b"trak", -8, 1)


def main():
    folder = Path(sys.argv[1])
    for name, data in refused():
        (folder / f"refused_video_{name}").write_bytes(data)


main()
