"""C and C++ files, compiled on this machine for its processor: small libraries each time, the DALI plugin once."""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.common.console import note
from pipeline.common.files import user_cache, write_atomic

SOURCES = Path(__file__).parent
_C_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC")
_CXX_FLAGS = ("-std=c++20", "-O2", "-w", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
_LINK_FLAGS = ("-shared", "-ljpeg", "-Wl,-z,now")  # now: a missing symbol is an error on loading, not a crash later
_DIGEST_BYTES = 32
_CPUINFO = Path("/proc/cpuinfo")


class BuildError(Exception):
    """Why there is no plugin, in a few words."""


class NoCompiler(BuildError):
    """There is no C++ compiler: nothing to worry about, `alexnet-prep doctor` tells it."""


class Headers(NamedTuple):
    """What a DALI needs of a plugin: its version, its headers' folder, flags for the compiler and for the linker."""

    version: str
    include: str
    compile_flags: Sequence[str]
    link_flags: Sequence[str]


def compile_library(source: Path, *flags: str, libraries: tuple[str, ...] = ("-lm",)) -> ctypes.CDLL | None:
    """A C file as a library of this process, or None. With -fopenmp its threads are those of the OpenMP that is already
    loaded, torch's: two of them in one process would fight for the cores."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="alexnet-kernel-") as folder:
        compiled, library = str(Path(folder, "kernel.o")), str(Path(folder, "kernel.so"))
        try:
            for command in (
                [compiler, *_C_FLAGS, *flags, "-c", str(source), "-o", compiled],
                [compiler, "-shared", compiled, "-o", library, *libraries],
            ):
                subprocess.run(command, check=True, capture_output=True)
            return ctypes.CDLL(library)
        except (OSError, subprocess.SubprocessError):  # a compiler without headers, a folder mounted noexec, ...
            return None


@contextlib.contextmanager
def build_plugin(headers: Headers) -> Iterator[Path]:
    """The compiled plugin, for as long as it takes to load it: from the user's cache, or compiled now and kept there.

    Raises BuildError. Processes that begin at once compile it once.
    """
    compiler = _find_compiler()
    name = f"{_fingerprint(compiler, headers)}.so"
    cache = _open_cache()
    with tempfile.TemporaryDirectory(prefix="alexnet-operators-") as scratch:
        if cache is None:
            yield _compile(compiler, headers, Path(scratch))
            return
        kept = cache / name
        with _lock(cache / "lock"):
            if not _is_sound(kept):
                compiled = _compile(compiler, headers, Path(scratch))
                data = compiled.read_bytes()
                try:  # the SHA-256 stands behind the last byte, where the loader does not look
                    write_atomic(kept, data + hashlib.sha256(data).digest())
                    kept.chmod(0o600)  # whatever the umask: see _is_sound
                except OSError:  # a full disk
                    kept = compiled
        yield kept


def _find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, c++ or g++."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["c++"], ["g++"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise NoCompiler(f"no C++ compiler{f' {given[0]}' if given else ''}; install g++ and libjpeg-turbo's headers")


def _fingerprint(compiler: Sequence[str], headers: Headers) -> str:
    """A hash of all that the compiled plugin depends on."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    for path in sorted(path for pattern in ("*.c", "*.cc", "*.h", "cuda/*.h") for path in SOURCES.glob(pattern)):
        add(path.name, path.read_bytes())
    add(_C_FLAGS, _CXX_FLAGS, _LINK_FLAGS, *headers)
    add(list(compiler), os.path.realpath(compiler[0]), _run([*compiler, "--version"]))
    processor = _CPUINFO.read_text(errors="replace").split("\n\n")[0] if _CPUINFO.exists() else ""
    wanted = ("vendor_id", "cpu family", "model\t", "flags")
    add([line for line in processor.splitlines() if line.startswith(wanted)])
    return digest.hexdigest()[:32]


def _compile(compiler: Sequence[str], headers: Headers, folder: Path) -> Path:
    """Compile the plugin into `folder`. Raises BuildError."""
    note("compiling the CPU operators for this machine, once: about ten seconds")
    compiled, library = folder / "decode.o", folder / "operators.so"
    as_c = [*_C_FLAGS, "-fvisibility=hidden", "-x", "c", "-c", str(SOURCES / "decode.c"), "-o", str(compiled)]
    _run([*compiler, *as_c])
    include = ["-isystem", headers.include, "-isystem", str(SOURCES / "cuda")]
    what = [str(SOURCES / "plugin.cc"), str(compiled), "-o", str(library)]
    _run([*compiler, *_CXX_FLAGS, *headers.compile_flags, *include, *what, *headers.link_flags, *_LINK_FLAGS])
    return library


def _run(command: Sequence[str]) -> str:
    """What a compiler says on stdout. Raises BuildError with the first error it names."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        named = [line for line in lines if "error" in line or "cannot find" in line]
        raise BuildError(f"{Path(command[0]).name} failed: {(named or lines)[0].strip()}")
    return done.stdout


def _open_cache() -> Path | None:
    """The user's folder for compiled plugins, which nobody else can write to; None if there cannot be one."""
    ours = user_cache()
    if ours is None:
        return None
    folder = ours / "operators"
    try:
        ours.parent.mkdir(parents=True, exist_ok=True)
        for part in (ours, folder):
            part.mkdir(mode=0o700, exist_ok=True)
            if not _is_ours(part.lstat(), stat.S_ISDIR):
                return None
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _is_ours(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    return is_kind(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file's lock; where the file system has none, go on without: files are renamed into place anyway."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_sound(path: Path) -> bool:
    """Whether a kept library is whole, and nobody else could have written it."""
    try:
        if not _is_ours(path.lstat(), stat.S_ISREG):
            return False
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-_DIGEST_BYTES]).digest() == data[-_DIGEST_BYTES:]
