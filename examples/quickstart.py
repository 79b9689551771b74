"""The first lines: one episode of CartPole, on a mesh that ``Mesh()`` finds, or starts if there is none.

::

    python examples/quickstart.py
"""

import asyncio

from meshrl import Mesh


async def main() -> None:
    async with Mesh() as m:
        env = await m.env("cartpole")
        obs, _info = await env.reset(seed=1)
        episode_return, terminated, truncated = 0.0, False, False
        while not (terminated or truncated):
            action = int(obs[2] + obs[3] > 0)  # push to where the pole leans and falls
            obs, reward, terminated, truncated, _info = await env.step(action)
            episode_return += reward
        await env.close()
        print(f"{env.name} at worker {env.worker}: return {episode_return:g}")


if __name__ == "__main__":
    asyncio.run(main())
