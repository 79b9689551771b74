"""The compose stack under test: a project of its own on a port of its own, and the engine it runs on."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import docker  # type: ignore[import-untyped]
import requests
import yaml
from testcontainers.compose import DockerCompose

# A docker.DockerClient; the package has no types.
Engine: TypeAlias = Any

ROOT = Path(__file__).parents[2]
BUILD_S = 600.0
COMMAND_S = 120.0
LOG_S = 20.0
# What compose puts on everything that it makes.
PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"


class Unavailable(Exception):
    """Containers cannot be run here; the text says why."""


def run(*command: str, env: dict[str, str] | None = None, timeout_s: float = COMMAND_S) -> str:
    """Run a command in the repository's root; gives what it printed.

    Raises:
        AssertionError: it failed, or took longer; with all that it printed.
    """
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        printed = exc.stdout.decode(errors="replace") if isinstance(exc.stdout, bytes) else exc.stdout
        raise AssertionError(f"{' '.join(command)} took over {timeout_s:g} s:\n{printed}") from None
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@cache
def compose_command() -> tuple[str, ...]:
    """Today's ``docker compose`` where it is installed, else docker-compose 1.29 and later.

    Raises:
        Unavailable: there is neither.
    """
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]) is not None:
            answer = subprocess.run([*command, "version"], capture_output=True, check=False, timeout=COMMAND_S)
            if answer.returncode == 0:
                return command
    raise Unavailable("neither `docker compose` nor docker-compose is installed")


def base_images() -> list[str]:
    """The images that compose.yml starts from, as compose reads it."""
    services = yaml.safe_load(run(*compose_command(), "config"))["services"]
    return [services["nats"]["image"], services["env"]["build"]["args"]["PYTHON_IMAGE"]]


def connect_engine() -> Engine:
    """A client of the engine, after the images that everything starts from are there.

    Raises:
        Unavailable: no engine answers, compose is missing, or an image is neither here nor to be had.
    """
    try:
        engine = docker.from_env(timeout=int(COMMAND_S))
    except docker.errors.DockerException as exc:
        raise Unavailable(f"no Docker engine answers: {exc}") from exc
    try:
        for image in base_images():
            try:
                engine.images.get(image)
            except docker.errors.ImageNotFound:
                engine.images.pull(image)
    except (docker.errors.APIError, requests.RequestException) as exc:
        engine.close()
        raise Unavailable(f"image {image} is not here and cannot be pulled: {exc}") from exc
    except BaseException:
        engine.close()
        raise
    return engine


def free_port() -> int:
    """A port of the loopback that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


class Stack(DockerCompose):
    """compose.yml brought up as a project of its own; with either command, and with a deadline for everything.

    Attributes:
        project: compose's name for it, unlike any other's.
        url: where its NATS is.

    Args:
        engine: what it runs on.
        port: of NATS on the loopback; None is compose.yml's own.
        namespace: of the mesh.
    """

    def __init__(self, engine: Engine, port: int | None = None, namespace: str = "default") -> None:
        # testcontainers would wait by `up --wait`, which docker-compose 1.29 does not have.
        super().__init__(context=ROOT, build=True, wait=False)
        self.engine = engine
        self.project = f"meshrl-test-{secrets.token_hex(4)}"
        self.url = f"nats://127.0.0.1:{port or 4222}"
        # Empty counts as not said.
        self._env = {"MESHRL_PORT": str(port or ""), "MESHRL_NAMESPACE": namespace}
        if os.environ.get("DOCKER_BUILDKIT") == "0":
            # The legacy builder needs no entitlement for it, and is used where there is no other way out.
            self._env["MESHRL_BUILD_NETWORK"] = os.environ.get("MESHRL_BUILD_NETWORK", "host")

    @cached_property
    def compose_command_property(self) -> list[str]:
        """How compose is called, for everything that testcontainers does."""
        return [*compose_command(), "--project-name", self.project]

    def _run_command(
        self,
        cmd: str | list[str],
        context: str | None = None,  # testcontainers' signature
    ) -> subprocess.CompletedProcess[bytes]:
        parts = cmd.split() if isinstance(cmd, str) else cmd
        printed = run(*parts, env=self._env, timeout_s=BUILD_S if "--build" in parts else COMMAND_S)
        return subprocess.CompletedProcess(parts, 0, printed.encode(), b"")

    def __enter__(self) -> Self:
        return super().__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Take everything away.

        Raises:
            AssertionError: compose left something; it is removed all the same.
        """
        try:
            if exc_val is not None:
                print(self.logs())  # noqa: T201  # pytest shows it with the failure
            super().__exit__(exc_type, exc_val, exc_tb)
        finally:
            left = self.leftovers()
            for leftover in left:
                if isinstance(leftover, docker.models.containers.Container):
                    leftover.remove(force=True, v=True)
                else:
                    leftover.remove()
        assert not left, f"compose down left {left}"

    def compose(self, *arguments: str) -> str:
        """Run a compose command on the project."""
        return self._run_command([*self.compose_command_property, *arguments]).stdout.decode()

    def scale(self, workers: int) -> None:
        """Have that many env workers, those that run among them."""
        # Another stack may have built the image anew meanwhile; that is no reason to replace what runs.
        self.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", f"env={workers}")

    def containers(self, service: str) -> list[Any]:
        """The running containers of a service."""
        labels = [f"{PROJECT_LABEL}={self.project}", f"{SERVICE_LABEL}={service}"]
        return list(self.engine.containers.list(filters={"label": labels}))

    def container_of(self, worker: str) -> Any:
        """The container in which a worker of that id runs: it says so in its log, a moment after it is advertised."""
        deadline = time.monotonic() + LOG_S
        while time.monotonic() < deadline:
            for container in self.containers("env") + self.containers("agent"):
                if f"worker {worker}".encode() in container.logs():
                    return container
            time.sleep(0.05)
        raise LookupError(f"no container says that it is worker {worker}:\n{self.logs()}")

    def leftovers(self) -> list[Any]:
        """Whatever of the project exists: containers (stopped ones too), networks, volumes; in order of removal."""
        mine = {"label": f"{PROJECT_LABEL}={self.project}"}
        return [
            *self.engine.containers.list(all=True, filters=mine),
            *self.engine.networks.list(filters=mine),
            *self.engine.volumes.list(filters=mine),
        ]

    def logs(self) -> str:
        """What every container of the project printed, stopped ones too."""
        mine = {"label": f"{PROJECT_LABEL}={self.project}"}
        parts = []
        for container in self.engine.containers.list(all=True, filters=mine):
            text = container.logs(tail=200).decode(errors="replace")
            parts.append(f"--- {container.name} ({container.status})\n{text}")
        return "\n".join(parts)
