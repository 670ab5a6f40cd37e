"""How the operators are compiled: once, kept where nobody else can write, and never in the way where that cannot be."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import operators
from pipeline.common.errors import UserError
from pipeline.operators import compile as building
from pipeline.operators.compile import BuildError, Headers, build_plugin

ROOT = Path(__file__).resolve().parents[3]
HEADERS = Headers("2.4.0", "/nowhere/include", ["-DX=1"], ["-L/nowhere"])
LIBRARY = b"a library"
LOAD = """
import sys
from pipeline.operators import load_operators
print(load_operators(), load_operators())
"""
COMPILE = """
import sys
from pathlib import Path
from pipeline.operators.compile import Headers, build_plugin
Path(sys.argv[1]).touch()
with build_plugin(Headers("2.4.0", "/nowhere", [], [])) as path:
    print(path)
"""


class Compiler:
    """A compiler that writes down how it is called and gives a library that is there already."""

    def __init__(self, folder: Path, library: bytes, before: str = "") -> None:
        self.path, self._log = folder / "compiler", folder / "compiler.log"
        (folder / "library").write_bytes(library)
        self.path.write_text(
            f"""#!/bin/sh
case "$*" in *--version*) echo fake 1.0; exit 0 ;; esac
echo "$*" >> {self._log}
{before}
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
cp {folder}/library "$out"
"""
        )
        self.path.chmod(0o755)

    @property
    def num_builds(self) -> int:
        return sum("plugin.cc" in line for line in self._log.read_text().splitlines()) if self._log.exists() else 0


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Compiler:
    """Which is the one that is found."""
    made = Compiler(tmp_path, LIBRARY)
    monkeypatch.setenv("CXX", str(made.path))
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where compiled libraries are kept, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/alexnet-dali/operators"


def build(headers=HEADERS) -> Path:
    with build_plugin(headers) as path:
        assert path.read_bytes().startswith(LIBRARY)
    return path


def test_the_operators_are_compiled_once_and_kept_for_the_user_alone(compiler, cache, capsys):
    path = build()
    assert path.parent == cache and build() == path and compiler.num_builds == 1
    assert path.read_bytes() == LIBRARY + hashlib.sha256(LIBRARY).digest()
    assert [stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (path, cache, cache.parent)] == [0, 0, 0]
    assert sorted(p.name for p in cache.iterdir()) == sorted([path.name, "lock"])
    assert capsys.readouterr().err.count("compiling the CPU operators for this machine, once") == 1


@pytest.mark.parametrize("what", ["source", "header", "compiler", "flags", "DALI", "processor"])
def test_they_are_compiled_anew_when_anything_they_depend_on_changes(compiler, cache, monkeypatch, tmp_path, what):
    monkeypatch.setattr(building, "SOURCES", Path(shutil.copytree(building.SOURCES, tmp_path / "sources")))
    monkeypatch.setattr(building, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name: x\nflags\t: sse2 avx2\ncpu MHz: 1\n\nflags\t: sse2\n")
    first, headers = build(), HEADERS
    (tmp_path / "cpuinfo").write_text("model name: x\nflags\t: sse2 avx2\ncpu MHz: 2\n\nflags\t: avx\n")
    assert build() == first
    match what:
        case "source":
            with (building.SOURCES / "finish.c").open("a") as file:
                file.write("\n")
        case "header":
            with (building.SOURCES / "cuda/cuda.h").open("a") as file:
                file.write("\n")
        case "compiler":
            compiler.path.write_text(compiler.path.read_text().replace("fake 1.0", "fake 1.1"))
        case "flags":
            monkeypatch.setattr(building, "_CXX_FLAGS", ("-O1",))
        case "DALI":
            headers = HEADERS._replace(version="2.5.0")
        case "processor":
            (tmp_path / "cpuinfo").write_text("flags\t: sse2 avx2 avx512f\n")
    assert build(headers) != first and compiler.num_builds == 2


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "empty", "gone", "writable by others", "a link", "of another user"]
)
def test_a_kept_library_that_is_damaged_or_may_be_anothers_is_compiled_anew(
    compiler, cache, monkeypatch, tmp_path, damage
):
    path = build()
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[:-1])
        case "changed":
            path.write_bytes(b"A" + data[1:])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "writable by others":
            path.chmod(0o622)
        case "a link":
            path.replace(tmp_path / "elsewhere.so")
            path.symlink_to(tmp_path / "elsewhere.so")
        case "of another user":
            try:
                os.chown(path, os.geteuid() + 1, -1)
            except PermissionError:
                pytest.skip("only root can give a file away")
    assert build() == path and compiler.num_builds == 2
    assert path.read_bytes() == data and not path.is_symlink() and path.stat().st_uid == os.geteuid()
    assert build() == path and compiler.num_builds == 2


@pytest.mark.parametrize("trouble", ["writable by others", "of another user", "a file", "a link", "no home", "full"])
def test_without_a_folder_of_the_users_own_they_are_compiled_for_this_process(
    compiler, cache, monkeypatch, tmp_path, trouble
):
    match trouble:
        case "writable by others":
            cache.mkdir(parents=True)
            cache.chmod(0o777)
        case "of another user":
            cache.mkdir(parents=True, mode=0o700)
            uid = os.geteuid()
            monkeypatch.setattr(building.os, "geteuid", lambda: uid + 1)
        case "a file":
            cache.parent.parent.write_text("")
        case "a link":
            cache.parent.mkdir(parents=True, mode=0o700)
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            cache.symlink_to(tmp_path / "elsewhere")
        case "no home":
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(building.os.path, "expanduser", lambda path: path)
        case "full":
            monkeypatch.setattr(building.os, "fsync", fail_as_full)
    path = build()
    assert cache not in path.parents and not path.exists()
    assert not cache.is_dir() or [p.name for p in cache.iterdir()] in ([], ["lock"])
    build()
    assert compiler.num_builds == 2


def fail_as_full(_file: int) -> None:
    raise OSError(28, "No space left on device")


def test_the_cache_is_in_the_home_folder_unless_the_user_says_where(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert build().parent == tmp_path / ".cache/alexnet-dali/operators"


def test_a_compiler_that_fails_is_told_by_its_first_error(compiler, cache):
    compiler.path.write_text(
        "#!/bin/sh\necho 'In file included from x:1:\nx.c:2: fatal error: jpeglib.h: No such file' >&2\nexit 1\n"
    )
    with pytest.raises(BuildError, match=r"^compiler failed: x\.c:2: fatal error: jpeglib\.h: No such file$"):
        build()
    assert list(cache.parent.glob("operators/*.so")) == []


def test_the_compiler_is_cxx_or_else_found_by_its_usual_names(compiler, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CXX", f"{compiler.path} --fast")
    assert building._find_compiler() == [str(compiler.path), "--fast"]
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler /nowhere/g\+\+; install"):
        building._find_compiler()
    monkeypatch.delenv("CXX")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler; install g\+\+ and libjpeg-turbo's headers"):
        building._find_compiler()
    for name in ("g++", "c++"):
        shutil.copy(compiler.path, tmp_path / "bin" / name)
        assert building._find_compiler() == [str(tmp_path / "bin" / name)]


def test_processes_that_begin_at_once_compile_once(tmp_path):
    starts = [tmp_path / f"started-{n}" for n in range(3)]
    waiting = " || ".join(f"[ ! -e {path} ]" for path in starts)
    compiler = Compiler(tmp_path, LIBRARY, before=f"while {waiting}; do :; done")
    environment = {**os.environ, "CXX": str(compiler.path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    running = [
        subprocess.Popen([sys.executable, "-c", COMPILE, str(path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for path in starts
    ]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1 and compiler.num_builds == 1


def load(**environment: str) -> tuple[list[str], list[str]]:
    """What `load_operators` says in a process of its own, asked twice, and its lines on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split(), done.stderr.splitlines()


def test_without_a_compiler_dalis_operators_are_used_without_a_word(tmp_path):
    assert load(PATH=str(tmp_path), CXX="") == (["False", "False"], [])  # alexnet-prep doctor tells it


def test_a_user_may_ask_for_dalis_operators(tmp_path, monkeypatch):
    assert load(ALEXNET_OPERATORS="stock", XDG_CACHE_HOME=str(tmp_path)) == (["False", "False"], [])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("ALEXNET_OPERATORS", "stok")
    with pytest.raises(UserError, match="ALEXNET_OPERATORS is 'stok', expected stock, or nothing"):
        operators.load_operators()


@pytest.fixture(scope="module")
def real_library() -> bytes:
    """The operators, compiled by this machine's compiler."""
    try:
        with build_plugin(operators.find_headers()) as path:
            return path.read_bytes()
    except BuildError as error:
        pytest.skip(str(error))


def test_a_damaged_library_is_never_loaded(tmp_path, real_library):
    compiler = Compiler(tmp_path, real_library)
    environment = {"CXX": str(compiler.path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said, notes = load(**environment)
    assert said == ["True", "True"] and len(notes) == 1 and "compiling the CPU operators" in notes[0]
    (kept,) = (tmp_path / "cache").rglob("*.so")
    os.truncate(kept, 100_000)  # to load it would end the process
    said, notes = load(**environment)
    assert said == ["True", "True"] and len(notes) == 1 and compiler.num_builds == 2
    assert load(**environment) == (["True", "True"], []) and compiler.num_builds == 2


def test_a_library_that_dali_refuses_is_told_and_dalis_operators_are_used(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int of_another_dali(void);\nint call(void) { return of_another_dali(); }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(library)], check=True)
    fake = Compiler(tmp_path, library.read_bytes())
    environment = {"CXX": str(fake.path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said, notes = load(**environment)
    assert said == ["False", "False"] and len(notes) == 2
    assert "DALI's stock operators" in notes[1] and "of_another_dali" in notes[1]
    said, notes = load(**environment)
    assert said == ["False", "False"] and len(notes) == 1 and fake.num_builds == 1
