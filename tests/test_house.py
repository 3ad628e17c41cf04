"""The house rules that ruff does not know: sizes, docstrings, annotations, states, the files."""

import ast
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import nextstep_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100

_PACKAGE = sorted((ROOT / "nextstep_jax").rglob("*.py"))
_PROGRAMS = sorted([*(ROOT / "launch").rglob("*.py"), *(ROOT / "configs").rglob("*.py")])
_TESTS = sorted((ROOT / "tests").rglob("*.py"))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BARE_ARRAYS = {"Array", "jax.Array", "jnp.ndarray", "np.ndarray", "numpy.ndarray"}
# Inside these the shapes differ from entry to entry: a tree of parameters, a dict of metrics.
_CONTAINERS = {
    "dict",
    "Mapping",
    "PyTree",
    "Callable",
    "Iterator",
    "Iterable",
    "Annotated",
    "Literal",
}
_SHAPED = re.compile(r"\b(Num|Inexact|Real|Shaped|Key|Bool|(B?Float|U?Int|Complex)\d*)\[")


def _where(path: pathlib.Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', '')}"


def _public(tree: ast.Module) -> Iterator[ast.AST]:
    """Public functions and classes of a module, and public methods of public classes."""
    for node in tree.body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, _FUNCTIONS) and m.name[0] != "_")


def _calls(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Public functions and methods, __call__ included, each with whether it is a method."""
    for node in tree.body:
        if isinstance(node, _FUNCTIONS) and not node.name.startswith("_"):
            yield node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                named = getattr(method, "name", "_")
                if isinstance(method, _FUNCTIONS) and (named == "__call__" or named[0] != "_"):
                    decorators = {ast.unparse(d) for d in method.decorator_list}
                    yield method, "staticmethod" not in decorators


def _bare_arrays(annotation: ast.AST | None) -> list[str]:
    """Arrays without a shape in an annotation; containers of unlike arrays are left alone."""
    if annotation is None:
        return []
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _bare_arrays(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Name | ast.Attribute):
        name = ast.unparse(annotation)
        return [name] if name in _BARE_ARRAYS else []
    if isinstance(annotation, ast.BinOp):
        return _bare_arrays(annotation.left) + _bare_arrays(annotation.right)
    if isinstance(annotation, ast.Subscript):
        head = ast.unparse(annotation.value).split(".")[-1]
        if head in _CONTAINERS or _SHAPED.match(f"{head}["):
            return []
        return _bare_arrays(annotation.slice)
    if isinstance(annotation, ast.Tuple):
        return [name for element in annotation.elts for name in _bare_arrays(element)]
    return []


def _annotation_faults(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Arguments and results of public calls without annotation, or arrays without a shape."""
    faults = []
    for function, is_method in _calls(tree):
        spec = function.args
        arguments = [*spec.posonlyargs, *spec.args][int(is_method) :] + spec.kwonlyargs
        arguments += [a for a in (spec.vararg, spec.kwarg) if a is not None]
        for argument in arguments:
            if argument.annotation is None:
                faults.append((function, f"({argument.arg}) has no annotation"))
            for bare in _bare_arrays(argument.annotation):
                faults.append((function, f"({argument.arg}: {bare}) has no shape"))
        if function.returns is None and function.name != "setup":
            faults.append((function, "-> has no annotation"))
        faults += [(function, f"-> {bare} has no shape") for bare in _bare_arrays(function.returns)]
    return faults


def _is_tree_node(node: ast.ClassDef) -> bool:
    """Whether jax rebuilds instances of the class through its constructor."""
    text = " ".join(ast.unparse(d) for d in [*node.decorator_list, *node.bases])
    return bool(re.search(r"struct\.dataclass|register_dataclass|register_pytree|PyTreeNode", text))


def _unguarded_states(tree: ast.Module) -> list[ast.ClassDef]:
    """Pytree classes with a shaped field but no typing.no_type_check; why: test_jaxtyping."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and _is_tree_node(node)
        and any(
            isinstance(f, ast.AnnAssign) and _SHAPED.search(ast.unparse(f.annotation))
            for f in node.body
        )
        and not any("no_type_check" in ast.unparse(d) for d in node.decorator_list)
    ]


@pytest.mark.parametrize("path", [*_PACKAGE, *_PROGRAMS, *_TESTS], ids=lambda p: p.name)
def test_sizes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    long = [
        _where(path, node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, _FUNCTIONS) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long


@pytest.mark.parametrize("path", [*_PACKAGE, *_PROGRAMS], ids=lambda p: p.name)
def test_docstrings(path):
    tree = ast.parse(path.read_text())
    missing = [_where(path, n) for n in [tree, *_public(tree)] if not ast.get_docstring(n)]
    assert not missing


@pytest.mark.parametrize("path", _PACKAGE, ids=lambda p: p.name)
def test_annotations(path):
    tree = ast.parse(path.read_text())
    faults = [f"{_where(path, node)}{fault}" for node, fault in _annotation_faults(tree)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", _PACKAGE, ids=lambda p: p.name)
def test_states_are_excepted_from_the_shape_check(path):
    unguarded = [_where(path, node) for node in _unguarded_states(ast.parse(path.read_text()))]
    assert not unguarded, f"put @typing.no_type_check on top of {unguarded}"


def test_the_checks_see_faults():
    """The rules above on a module that breaks them."""
    tree = ast.parse(
        "def f(x: Array, y, z: 'Float[Array, \" n\"]') -> tuple[jax.Array, dict[str, Array]]: ...\n"
        "def _g(x): ...\n"
        "class M:\n"
        "    def __call__(self, x: Float[Array, 'n'] | None, k: np.ndarray | None): ...\n"
        "    def __init__(self, x): ...\n"
        "@flax.struct.dataclass\n"
        "class S:\n"
        "    x: Float[Array, 'n']\n"
        "@no_type_check\n"
        "@flax.struct.dataclass\n"
        "class T:\n"
        "    x: Float[Array, 'n']\n"
    )
    assert [fault for _, fault in _annotation_faults(tree)] == [
        "(x: Array) has no shape",
        "(y) has no annotation",
        "-> jax.Array has no shape",
        "(k: np.ndarray) has no shape",
        "-> has no annotation",
    ]
    assert [node.name for node in _unguarded_states(tree)] == ["S"]
    assert [node.name for node in _public(tree)] == ["f", "M", "S", "T"]


def test_import_touches_no_device():
    """Importing every module initialises no backend, so that programs can still choose one."""
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in _PACKAGE
    ]
    program = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_changelog_names_the_version():
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) in (nextstep_jax.__version__, "Unreleased")


@pytest.mark.parametrize("name", ["launch/test.sh", "launch/quickstart.sh", ".ci/run"])
def test_commands_are_executable_and_parse(name):
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert path.read_text().splitlines()[0] == "#!/usr/bin/env bash"
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "arguments", [["--minutes=soon"], ["--minutes="], ["--workdir="], ["--epochs=3"], ["now"]]
)
def test_quickstart_refuses_bad_options(arguments):
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Usage:" in done.stderr
    assert done.stdout == ""


def test_devices(devices):
    """The fake devices and float32 products that other tests rely on."""
    import jax

    assert len(devices) == 8
    assert jax.config.jax_default_matmul_precision == "highest"
    assert jax.config.jax_threefry_partitionable
    assert not jax.config.jax_enable_x64
