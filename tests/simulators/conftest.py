"""Without Box2D and MuJoCo, ALE and OpenCV, or PyAV, the tests that need them are not collected."""

from __future__ import annotations

from importlib.util import find_spec

NEEDS = {
    "test_resume.py": ("Box2D", "mujoco"),
    "test_atari.py": ("ale_py", "cv2"),
    "test_videos.py": ("av",),
    "test_recordings.py": ("Box2D", "mujoco", "ale_py", "cv2"),
}
collect_ignore_glob = [file for file, modules in NEEDS.items() if not all(map(find_spec, modules))]
