"""Another language: a client in JavaScript against a real server and a real worker process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from meshrl.bus.embedded import EmbeddedServer
from tests.contract.reading import asyncapi

JS = Path(__file__).parent / "js"
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed"),
]

WORKER = """
import asyncio
import os
from meshrl.worker.env_worker import EnvWorker

async def main():
    async with EnvWorker({"cartpole": "CartPole-v1"}, url=os.environ["MESHRL_URL"]) as worker:
        print("serving", flush=True)
        await worker.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def installed() -> Path:
    """The directory of the packages that the lock file pins, installed if they are not yet."""
    modules, lock = JS / "node_modules", JS / "package-lock.json"
    done = modules / ".package-lock.json"
    if not done.is_file() or done.stat().st_mtime < lock.stat().st_mtime:
        assert NPM is not None
        command = [NPM, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        made = subprocess.run(command, cwd=JS, capture_output=True, text=True, timeout=90, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
    return modules


@pytest.fixture
def mesh_url() -> Iterator[str]:
    """A server, and a worker process that serves cartpole there."""
    with EmbeddedServer.start() as server:
        environment = {**os.environ, "MESHRL_URL": server.url}
        command = [sys.executable, "-c", WORKER]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
            try:
                assert worker.stdout is not None
                assert worker.stdout.readline().strip() == "serving"
                yield server.url
            finally:
                worker.terminate()


@pytest.mark.usefixtures("installed")
def test_a_client_in_javascript_discovers_opens_steps_an_episode_and_closes(mesh_url: str) -> None:
    assert NODE is not None
    command = [NODE, "--test", "--test-reporter=tap", "client.test.mjs"]
    environment = {**os.environ, "MESHRL_URL": mesh_url}
    ran = subprocess.run(command, cwd=JS, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "# pass 7" in ran.stdout
    assert "# fail 0" in ran.stdout


def test_the_asyncapi_document_is_valid_by_the_specification(installed: Path) -> None:
    specification = json.loads((installed / "@asyncapi" / "specs" / "schemas" / "3.0.0.json").read_text("utf-8"))
    faults = [
        f"{error.json_path}: {error.message[:200]}" for error in Draft7Validator(specification).iter_errors(asyncapi())
    ]
    assert faults == []


def test_the_lock_file_names_no_registry_but_the_public_one() -> None:
    packages = json.loads((JS / "package-lock.json").read_text("utf-8"))["packages"]
    hosts = {package["resolved"].split("/")[2] for package in packages.values() if "resolved" in package}
    assert hosts <= {"registry.npmjs.org"}
    assert all("integrity" in package for name, package in packages.items() if name)
