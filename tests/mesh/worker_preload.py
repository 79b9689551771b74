"""What worker processes of the tests need, imported once for all of them."""

import gymnasium.envs.classic_control
import gymnasium.envs.toy_text
import uvloop

import meshrl.worker.running
import tests.mesh.worker_process

__all__ = ["gymnasium", "meshrl", "tests", "uvloop"]
