"""Conversations about videos: the cases of tests/goldens/<checkpoint>_videos.json."""

BOUNDS = {"min_pixels": 784, "max_pixels": 8000}


def frames(count: int, step: int = 1, **how: object) -> dict:
    """Every `step`-th of the drawn frames, `count` of them."""
    return {"frames": [f"tests/videos/frames/{index * step:02}.png" for index in range(count)], **BOUNDS, **how}


def image(name: str, **bounds: int) -> dict:
    return {"image": f"tests/pictures/{name}.png", **bounds}


def user(*parts: dict | str) -> dict:
    return {"role": "user", "parts": [{"text": part} if isinstance(part, str) else part for part in parts]}


def assistant(value: str) -> dict:
    return {"role": "assistant", "parts": [{"text": value}]}


VIDEO_CASES = {
    "at_1_fps": [user(frames(10, rate=1.0), "What moves?")],
    "at_1.5_fps": [user(frames(10, rate=1.5), "What moves?")],
    "at_2_fps": [user(frames(10, rate=2.0), "Where does it go?")],
    "at_4_fps": [user(frames(10, rate=4.0), "How fast is it?")],
    "at_25_fps": [user(frames(20, rate=25.0), "How fast is it?")],
    "at_29.97_fps": [user(frames(20, rate=29.97), "Left or right?")],
    "odd_number_of_frames": [user("Look:", frames(5, step=4, rate=2.0), "What happens last?")],
    "one_frame": [user(frames(1, rate=2.0), "What is this?")],
    "at_given_times": [user(frames(6, timestamps_s=[0.5, 1.0, 2.25, 2.5, 4.0, 7.5]), "When does it turn?")],
    "transparent_frames": [
        user({"frames": ["tests/pictures/transparent_100x76.png"] * 2, "rate": 1.0, **BOUNDS}, "What is behind it?")
    ],
    "default_bounds": [user({"frames": frames(3)["frames"], "rate": 2.0}, "Describe it.")],
    "long_pause_before_text": [user(frames(4, step=5, rate=0.1), "How long was that?")],
    "picture_then_video": [user(image("scene_112x140"), frames(4, rate=2.0), "Which of them moves?")],
    "video_then_picture": [user(frames(6, rate=4.0), "and", image("gray_90x60"), "Compare them.")],
    "two_videos": [user("First:", frames(4, rate=1.0), "second:", frames(7, step=2, rate=25.0), "Which is faster?")],
    "videos_and_pictures_over_turns": [
        user(image("noise_56x56"), frames(4, rate=1.5), "What is this?"),
        assistant("A square that moves."),
        user("And this?", frames(5, step=3, rate=4.0), image("noise_33x29")),
        assistant("The same, faster."),
        user("Which came first?"),
    ],
    "h264": [user({"video": "tests/videos/reordered.mp4"}, "What moves?")],
}
