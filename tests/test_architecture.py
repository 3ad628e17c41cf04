"""The arrows between the rooms of the house, read from the import statements.

The two tables are the documentation of the architecture: what a room may import of the package,
and what of other people's libraries. An import inside a function or under TYPE_CHECKING counts
like any other. An entry is a room (all of it) or a module of a room (that module alone).
"""

import ast
import pathlib
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "nextstep_jax"

# Room -> what it may import of the package, besides itself.
ARROWS: dict[str, set[str]] = {
    # Parameters and forward passes. Know nothing of the rest.
    "models": set(),
    # Mathematics on plain arrays; knows not even the models.
    "flow": set(),
    # Meshes and sharding rules of any tree of parameters.
    "parallel": set(),
    # Needs shapes and special tokens, hence the config, and no network.
    "data": {"models.config"},
    # A prompt is tokenised and laid out, and a given image cropped, as in training.
    "sampling": {
        *("models", "flow", "parallel"),
        *("data.text_tokenizer", "data.layout", "data.buckets", "data.images"),
    },
    # Sample grids and scores are callbacks that the program hands in.
    "training": {"models", "flow", "parallel", "data"},
    # On top.
    "interop": {"models", "parallel", "data", "training"},
    "evaluation": {"models", "flow", "parallel", "data", "training", "sampling", "interop"},
    # What chooses training data. A program of its own, so that no run imports it.
    "curation": {"models", "data", "interop"},
    # Whole runs, one module above all rooms: what the programs in launch/ start.
    "runs": {"models", "data", "training", "sampling", "interop", "evaluation"},
}

# Module -> what it alone, and not the rest of its room, may import besides.
EXCEPTIONS: dict[str, set[str]] = {
    # What users hold has to read what is on disk; the import stands inside `from_pretrained`.
    "sampling.pipeline": {"interop.pretrained"},
}

_NUMERIC = {"jax", "numpy", "jaxtyping"}
# Room -> libraries it may import; rooms that are absent may import every requirement.
LIBRARIES: dict[str, set[str]] = {
    "models": _NUMERIC | {"flax"},
    "flow": _NUMERIC,
    "parallel": _NUMERIC | {"flax"},
}

# Import name -> requirement, where they differ.
_REQUIREMENT_NAMES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "jaxlib": "jax",
    "orbax": "orbax-checkpoint",
    "skimage": "scikit-image",
}


def _module_name(path: pathlib.Path) -> str:
    """The dotted name of a module file below the root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names a module imports, relative ones resolved.

    `from a.b import c` counts as `a.b.c`: whether c is a module or a name in a.b, the longest
    prefix that a table knows decides.
    """
    found = set()
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = base[: len(base) - node.level + 1]
                origin = ".".join([*above, origin] if origin else above)
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def _allowed(imported: str, module: str) -> bool:
    """Whether a module may import `imported`; both are dotted names, the package first."""
    inside = imported.split(".")[1:]
    if not inside:
        return True
    if inside[0] not in ARROWS:
        # A name in the package itself, such as __version__, or a module that is in no room.
        return inside[0].startswith("__")
    room = module.split(".")[1]
    permitted = ARROWS[room] | {room} | EXCEPTIONS.get(module.removeprefix(f"{PACKAGE}."), set())
    return inside[0] in permitted or ".".join(inside[:2]) in permitted


def _violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The forbidden imports of one module of a room, of both kinds."""
    room = module.split(".")[1]
    wrong = []
    for imported in sorted(_imports(source, module, is_package)):
        library = imported.split(".")[0]
        if library == PACKAGE:
            if not _allowed(imported, module):
                wrong.append(f"{module} imports {imported}")
        elif library in ("launch", "configs", "tests"):
            wrong.append(f"{module} imports {imported}: programs import the package")
        elif library not in LIBRARIES.get(room, {library}) | sys.stdlib_module_names:
            wrong.append(f"{module} imports {library}: not for {room}")
    return wrong


def _modules() -> list[pathlib.Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def _setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py passes to setuptools.setup."""
    seen: dict = {}
    fake = types.SimpleNamespace(setup=lambda **kw: seen.update(kw), find_packages=lambda **kw: [])
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    path = ROOT / "setup.py"
    exec(compile(path.read_text(), str(path), "exec"), {"__file__": str(path)})
    return seen


def test_rooms_are_those_of_the_table():
    rooms = {p.name for p in (ROOT / PACKAGE).iterdir() if p.is_dir() and p.name[0] not in "._"}
    modules = {p.stem for p in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    assert modules == {"runs"}
    assert rooms | modules == set(ARROWS)


def test_table_has_no_cycle():
    arrows = {room: {name.split(".")[0] for name in names} for room, names in ARROWS.items()}
    while arrows:
        leaves = {room for room, names in arrows.items() if not names & set(arrows)}
        assert leaves, f"cycle among {sorted(arrows)}"
        arrows = {room: names for room, names in arrows.items() if room not in leaves}


def test_imports_follow_the_arrows():
    wrong = []
    for path in _modules():
        module = _module_name(path)
        if module == PACKAGE:
            assert not _imports(path.read_text(), module, True), (
                "the package itself imports nothing"
            )
            continue
        wrong += _violations(path.read_text(), module, path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("nextstep_jax.flow.path", "from nextstep_jax.models import layers", 1),
        ("nextstep_jax.flow.path", "from ..models.layers import dense", 1),
        ("nextstep_jax.flow.path", "def f():\n    import nextstep_jax.data", 1),
        ("nextstep_jax.flow.path", "from . import solvers\nimport math\nimport numpy as np", 0),
        ("nextstep_jax.flow.path", "import flax.linen as nn\nimport optax", 2),
        ("nextstep_jax.data.layout", "from nextstep_jax.models import config", 0),
        ("nextstep_jax.data.layout", "from nextstep_jax.models.config import SIZES", 0),
        ("nextstep_jax.data.layout", "from nextstep_jax.models import decoder", 1),
        ("nextstep_jax.data.layout", "import nextstep_jax.models", 1),
        ("nextstep_jax.sampling.text", "from nextstep_jax.data import layout, packing", 1),
        ("nextstep_jax.training.loop", "from nextstep_jax.sampling import generate", 1),
        ("nextstep_jax.sampling.pipeline", "from nextstep_jax.interop import pretrained", 0),
        ("nextstep_jax.sampling.generate", "from nextstep_jax.interop import model_directory", 1),
        ("nextstep_jax.sampling.pipeline", "from nextstep_jax.interop import convert", 1),
        ("nextstep_jax.training.loop", "from launch import train", 1),
        ("nextstep_jax.curation.scorers", "from nextstep_jax.data import images, schema", 0),
        ("nextstep_jax.curation.scorers", "from nextstep_jax.training import logs", 1),
        ("nextstep_jax.data.sources", "from nextstep_jax.curation import scorers", 1),
        ("nextstep_jax.runs", "from nextstep_jax.curation import scorers", 1),
        ("nextstep_jax.training.loop", "from nextstep_jax import __version__, utils", 1),
    ],
)
def test_the_test_sees_violations(module, source, count):
    assert len(_violations(source, module)) == count


def test_imports_are_requirements(monkeypatch):
    """At import time the package needs its core requirements and no extra."""
    setup = _setup_arguments(monkeypatch)

    def name(requirement: str) -> str:
        return requirement.replace("[", "<").split("<")[0].split(">")[0].split("=")[0].lower()

    core = {name(r) for r in setup["install_requires"]} | {"setuptools"}
    extras = {name(r) for rs in setup["extras_require"].values() for r in rs}
    wrong = []
    for path in [*_modules(), *sorted((ROOT / "launch").glob("*.py"))]:
        tree = ast.parse(path.read_text())
        top_level = ast.Module(
            [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        for part, allowed in ((top_level, core), (tree, core | extras)):
            for imported in _imports(ast.unparse(part), _module_name(path), True):
                library = imported.split(".")[0]
                if library in sys.stdlib_module_names or library in (PACKAGE, "configs", "launch"):
                    continue
                if _REQUIREMENT_NAMES.get(library, library).lower() not in allowed:
                    wrong.append(f"{_module_name(path)}: {library}")
    assert not wrong, sorted(set(wrong))
