"""The reference of every public function and class, from their docstrings, as a folder of HTML: `make docs`.

    python docs/reference.py site

Whatever pdoc warns of is an error here, as is a link inside the result that leads nowhere.
"""

import argparse
import importlib
import importlib.util
import pkgutil
import shutil
import sys
import tempfile
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "trainer", "tools")
NEEDS = {"trainer.kernels.lrn_triton": "triton"}  # modules that cannot be imported without what not everybody has
LEFT_OUT = ("trainer.__main__",)


def main() -> None:
    parser = argparse.ArgumentParser(description="The reference from the docstrings, as HTML.")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "site", help="folder to write; replaced as a whole")
    out: Path = parser.parse_args().out
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        complaints = generate(Path(folder), PACKAGES)
        pages = sorted(Path(folder).rglob("*.html"))
        complaints += find_broken_links(Path(folder))
        if complaints:
            sys.exit("\n".join(["error: the reference was not written:", *complaints]))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)
    print(f"{out}/index.html: {len(pages)} pages")


def generate(folder: Path, packages: tuple[str, ...]) -> list[str]:
    """Write the pages of `packages` into `folder`. Returns what pdoc warned of."""
    try:
        import pdoc
    except ModuleNotFoundError:
        sys.exit("error: pdoc is not installed; pip install 'alexnet-dali[docs]', or make setup")

    for package in packages:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            setattr(module, name, getattr(module, name))  # resolved on first use otherwise, which pdoc does not try
    absent = [name for name, library in NEEDS.items() if importlib.util.find_spec(library) is None]
    below = [name for package in packages for name in list_unlisted(package) if name not in (*LEFT_OUT, *absent)]
    excluded = [f"!{name}" for name in (*LEFT_OUT, *absent) if name.startswith(tuple(f"{root}." for root in packages))]
    pdoc.render.configure(docformat="markdown", footer_text="alexnet-dali", search=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)  # pdoc's own; what libraries deprecate is not ours to say
        pdoc.pdoc(*packages, *below, *excluded, output_directory=folder)
    expected = (*(f"Couldn't import {name}:" for name in absent), "Cannot determine where")  # the latter: TypedDicts
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return [f"warning: {message}" for message in said if not message.startswith(expected)]


def list_unlisted(package: str) -> list[str]:
    """The modules of a package that has an `__all__`: pdoc takes that for the whole of it, and looks no further."""
    module = importlib.import_module(package)
    if not hasattr(module, "__all__"):
        return []
    return sorted(found.name for found in pkgutil.iter_modules(module.__path__, f"{package}."))


class _Links(HTMLParser):
    """The places that a page links to, and the names that it can be linked at."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def find_broken_links(folder: Path) -> list[str]:
    """Every link from a page in `folder` to a page or a name there that does not exist."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path.resolve()] = found = _Links()
        found.feed(path.read_text(encoding="utf-8"))
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = unquote(parts.fragment)
            if not target.exists() or (name and target in pages and name not in pages[target].names):
                broken.append(f"{path.relative_to(folder.resolve())}: link to {link}: not there")
    return broken


if __name__ == "__main__":
    main()
