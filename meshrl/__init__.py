"""RL environments and policies as services on a NATS bus.

::

    async with Mesh() as m:
        env = await m.env("cartpole")
        obs, info = await env.reset(seed=1)
        obs, reward, terminated, truncated, info = await env.step(0)
"""

from meshrl import errors
from meshrl.adapters.gymnasium import make
from meshrl.adapters.vector import make_vec
from meshrl.bus.login import Credentials
from meshrl.client.agent import RemoteAgent
from meshrl.client.env import RemoteEnv
from meshrl.client.mesh import Mesh
from meshrl.client.pool import RemotePool
from meshrl.client.ready import PoolBatch
from meshrl.client.vector import RemoteVectorEnv
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.factories import Factory

__version__ = "0.1.0"

__all__ = [
    "AgentWorker",
    "Credentials",
    "EnvWorker",
    "Factory",
    "Mesh",
    "PoolBatch",
    "RemoteAgent",
    "RemoteEnv",
    "RemotePool",
    "RemoteVectorEnv",
    "__version__",
    "errors",
    "make",
    "make_vec",
]
