"""CUDA source -> cubin by NVRTC, kept on disk.

The sources include nothing of CUDA's own headers, so that NVRTC alone compiles them. What a cubin is kept under is a
hash of all it is made of: source, headers, defines, architecture and the version of NVRTC. The folder belongs to the
user and to nobody else (mode 0700), because what lies in it is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
INSTALL = "pip install 'flash2-triton[cupy]' nvidia-cuda-nvrtc"


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled source: where it lies, and the seconds NVRTC took when it was made."""

    path: Path
    seconds: float


def cubin(source: str, defines: Mapping[str, int], arch: str) -> Cubin:
    """The file `source` of this folder compiled with `defines` for `arch` (sm_90a), from the cache where it is there.

    Raises RuntimeError with NVRTC's log, or with what is missing and how to install it.
    """
    version = nvrtc_version()
    flags = options(defines, arch)
    text = {name: (SOURCES / name).read_text() for name in (source, *headers(source))}
    whole = json.dumps([version, flags, text], sort_keys=True)
    stem = folder() / f"{Path(source).stem}-{arch}-{hashlib.sha256(whole.encode()).hexdigest()[:40]}"
    path, note = stem.with_suffix(".cubin"), stem.with_suffix(".json")
    if path.is_file() and note.is_file():
        return Cubin(path, json.loads(note.read_text())["seconds"])
    start = time.perf_counter()
    code = compiled(source, text, flags)
    seconds = time.perf_counter() - start
    about = {"seconds": round(seconds, 3), "nvrtc": version, "options": flags}
    _write(note, json.dumps(about).encode())
    _write(path, code)  # last: a cubin that is there is whole, and has its note
    return Cubin(path, seconds)


def options(defines: Mapping[str, int], arch: str) -> list[str]:
    """The compiler's options, which nvcc understands too. Only integers become text of a program."""
    for name, value in defines.items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or not isinstance(value, int):
            raise ValueError(f"define {name}={value!r}: a name in capitals and an integer are allowed")
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise ValueError(f"arch {arch!r} is not of the form sm_90a")
    return [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{k}={int(v)}" for k, v in sorted(defines.items()))]


def headers(source: str) -> list[str]:
    """The files of this folder that `source` includes, directly or not."""
    found: list[str] = []
    queue = [source]
    while queue:
        for name in re.findall(r'^\s*#include\s+"([\w.]+)"', (SOURCES / queue.pop()).read_text(), re.MULTILINE):
            if name not in found:
                found.append(name)
                queue.append(name)
    return sorted(found)


def compiled(source: str, text: Mapping[str, str], flags: list[str]) -> bytes:
    """The cubin of `text[source]`, the other texts being its headers; RuntimeError with NVRTC's log."""
    nvrtc = _nvrtc()
    included = [name for name in text if name != source]
    program = nvrtc.createProgram(
        text[source], source, [text[name].encode() for name in included], [name.encode() for name in included]
    )
    try:
        nvrtc.compileProgram(program, flags)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise RuntimeError(f"NVRTC cannot compile {source} with {' '.join(flags)}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def arch_name(capability: tuple[int, int]) -> str:
    """What to compile for on a device: sm_90a on Hopper, whose wgmma plain sm_90 lacks, else its own number, or
    where this NVRTC is too old for that, the newest older one of the same generation, whose code it runs."""
    major, minor = capability
    if capability == (9, 0):
        return "sm_90a"
    known = [n for n in _nvrtc().getSupportedArchs() if n // 10 == major and n <= major * 10 + minor]
    if not known:
        raise RuntimeError(f"NVRTC {nvrtc_version()} does not know sm_{major}{minor}; {INSTALL} --upgrade")
    return f"sm_{max(known)}"


def nvrtc_version() -> str:
    """NVRTC's version; RuntimeError that says what to install if there is none."""
    nvrtc = _nvrtc()
    try:
        return ".".join(map(str, nvrtc.getVersion()))
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"NVRTC, CUDA's run-time compiler, cannot be loaded ({reason}); {INSTALL}") from error


def _nvrtc():
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


def folder() -> Path:
    """The user's own folder for cubins, made with mode 0700; RuntimeError if others may write there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "flash2" / "cupy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(exist_ok=True, mode=0o700)
        about = path.stat()
    except OSError as error:
        raise RuntimeError(f"no folder for compiled kernels: {error}; set XDG_CACHE_HOME to one you own") from error
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise RuntimeError(
            f"{path} is open to other users (owner {about.st_uid}, mode {about.st_mode & 0o777:o}), and what lies there "
            "is run; chmod 700 it, or set XDG_CACHE_HOME to a folder you own"
        )
    return path


def _write(path: Path, content: bytes) -> None:
    # Several processes may make the same file at once: each writes its own, and the name changes hands whole.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:20], suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
