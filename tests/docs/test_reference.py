"""docs/reference.py: what pdoc warns of and links that lead nowhere are found, and nothing half made is left."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "reference.py"

pytest.importorskip("pdoc", reason="pdoc is not installed")


def generate(folder: Path, package: str, out: Path) -> subprocess.CompletedProcess[str]:
    """The script's work on one package that lies in `folder`."""
    program = (
        f"import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}]; sys.argv = ['reference.py', {str(out)!r}]\n"
        f"import reference; reference.PACKAGES = ({package!r},)\n"
        f"reference.ROOT = type(reference.ROOT)({str(folder)!r})\n"
        "reference.main()"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)


def make_package(folder: Path, text: str) -> None:
    (folder / "small").mkdir(parents=True)
    (folder / "small" / "__init__.py").write_text(text)


def test_a_package_in_order_becomes_pages(tmp_path):
    make_package(tmp_path, '"""A package."""\n\ndef f() -> int:\n    """One."""\n    return 1\n')
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "old.html").write_text("old")
    done = generate(tmp_path, "small", tmp_path / "site")
    assert (done.returncode, done.stderr) == (0, "")
    assert "One." in (tmp_path / "site" / "small.html").read_text()
    assert not (tmp_path / "site" / "old.html").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("__all__ = ['f', 'g']\ndef f() -> None: ...\n", "has no attribute 'g'"),
        ('def f() -> None:\n    """See [there](no-such-page.html)."""\n', "no-such-page.html: not there"),
        ('def f() -> None:\n    """See [there](#no_such_name)."""\n', "#no_such_name: not there"),
        ("def f(x: 'Nothing') -> None: ...\n", "Nothing"),
    ],
)
def test_what_is_wrong_is_an_error_and_the_pages_that_were_there_stay(tmp_path, text, complaint):
    make_package(tmp_path, text)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "old.html").write_text("old")
    done = generate(tmp_path, "small", tmp_path / "site")
    assert done.returncode == 1 and complaint in done.stderr
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["old.html"]


@pytest.mark.slow
def test_the_loaders_own_package_is_documented_without_a_complaint(tmp_path):
    done = generate(ROOT, "pipeline", tmp_path / "site")
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "site" / "pipeline.html").read_text()
    for name in ("TrainLoader", "EvalLoader", "ShardSet", "ColorStats", "Transform", "LoaderOptions"):
        assert f'id="{name}"' in page
    sources = {path.relative_to(ROOT / "pipeline").with_suffix("") for path in (ROOT / "pipeline").rglob("*.py")}
    modules = {path.parent if path.name == "__init__" else path for path in sources} - {Path()}
    pages = tmp_path / "site" / "pipeline"
    assert {path.relative_to(pages).with_suffix("") for path in pages.rglob("*.html")} == modules
