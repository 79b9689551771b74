"""Without Box2D and MuJoCo none of these tests is collected."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("Box2D") and find_spec("mujoco") else ["test_*.py"]
