"""The adapters as attributes of their package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from meshrl import adapters


def test_each_face_is_an_attribute_after_importing_meshrl_alone() -> None:
    code = "import meshrl; print(meshrl.adapters.gymnasium.MeshEnv.__name__, meshrl.adapters.vector.make_vec.__name__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["MeshEnv", "make_vec"]


def test_a_face_whose_extra_is_missing_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['stable_baselines3'] = None; import meshrl; meshrl.adapters.sb3"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'meshrl[sb3]'" in told.stderr.splitlines()[-1]


def test_what_is_no_face_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'sb4'"):
        adapters.sb4  # noqa: B018
