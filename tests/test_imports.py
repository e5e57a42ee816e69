"""How the package hangs together: imports run downwards, extras stay out, pickles are never read."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagoda

SOURCE = Path(pagoda.__file__).parent
LEVELS = {
    "version": 0,
    "errors": 0,
    "process": 0,
    "files": 1,
    "images": 2,
    "video": 3,
    "diffusion": 3,
    "networks": 4,
    "data": 5,
    "training": 5,
    "evaluation": 5,
    "acceleration": 6,
    "pretraining": 6,
    "steering": 6,
    "text": 6,
    "understanding": 6,
    "stages": 7,
    "pipelines": 8,
    "edit_pipeline": 8,
    "api": 8,
    "export": 9,
    "app": 10,
    "cli": 11,
    "__main__": 12,
}
"""A module imports from lower levels, or from its own room."""
OPTIONAL = {
    "av",
    "datasets",
    "fastapi",
    "gradio",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tensorboard",
    "timm",
    "tokenizers",
    "transformers",
    "uvicorn",
}
ROOMS = (
    "acceleration",
    "app",
    "data",
    "diffusion",
    "evaluation",
    "export",
    "networks",
    "pretraining",
    "steering",
    "text",
    "training",
    "understanding",
)


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of all modules that are imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            if node.module == "pagoda":
                yield from (f"pagoda.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_module_has_its_level() -> None:
    assert {room_of(path) for path, _ in modules()} - {"__init__"} == set(LEVELS)


def test_imports_run_downwards_only() -> None:
    wrong = []
    for path, tree in modules():
        room = room_of(path)
        if room == "__init__":
            continue
        for name in imported(tree):
            parts = name.split(".")
            if parts[0] != "pagoda" or len(parts) == 1 or parts[1] == room:
                continue
            if not LEVELS[parts[1]] < LEVELS[room]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong


def test_no_room_imports_the_package_itself() -> None:
    """`import pagoda` inside of it would be a way around the levels."""
    assert not [
        path.name
        for path, tree in modules()
        if room_of(path) != "__init__"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and any(alias.name == "pagoda" for alias in node.names)
    ]


def public_names(tree: ast.Module) -> set[str]:
    """Public names that an `__init__` imports."""
    nodes = (node for node in tree.body if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pagoda."))
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def kind_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2, name)


@pytest.mark.parametrize("room", ROOMS)
def test_all_is_sorted_complete_and_true(room: str) -> None:
    module = importlib.import_module(f"pagoda.{room}")
    tree = ast.parse((SOURCE / room / "__init__.py").read_text(encoding="utf-8"))
    assert list(module.__all__) == sorted(module.__all__, key=kind_order)
    assert set(module.__all__) == public_names(tree)
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_package_offers_every_name_of_its_all() -> None:
    assert set(pagoda.__all__) <= set(dir(pagoda))
    assert all(getattr(pagoda, name) is not None for name in pagoda.__all__)
    with pytest.raises(AttributeError, match="no attribute `destil`"):
        pagoda.destil  # noqa: B018


def test_every_module_and_public_definition_is_documented() -> None:
    bare = []
    for path, tree in modules():
        if ast.get_docstring(tree) is None:
            bare.append(str(path.relative_to(SOURCE)))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                bare.append(f"{path.relative_to(SOURCE)}: {node.name}")
    assert not bare


def test_extras_are_imported_only_where_they_are_used() -> None:
    """Never by an import statement, but by `import_extra`, which says what to install."""
    assert not [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path, tree in modules()
        for name in imported(tree)
        if name.split(".")[0] in OPTIONAL or "tensorboard" in name
    ]


def test_no_module_of_the_package_brings_an_extra_with_it() -> None:
    """diffusers itself imports transformers where that is installed; the others have no other way in."""
    names = [".".join(("pagoda", *path.relative_to(SOURCE).with_suffix("").parts)) for path, _ in modules()]
    names = [name.removesuffix(".__init__") for name in names]
    check = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print([n for n in ('datasets', 'tensorboard', 'torchvision') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_torchvision_is_used_nowhere() -> None:
    assert not [path.name for path, tree in modules() if any(n.split(".")[0] == "torchvision" for n in imported(tree))]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_pickles_are_read_nowhere() -> None:
    found = []
    for path, tree in modules():
        found += [f"{path.name} imports {n}" for n in imported(tree) if n.split(".")[0] in ("pickle", "dill", "joblib")]
        for name, call in calls(tree):
            options = {option.arg: option.value for option in call.keywords}
            pickled = options.get("allow_pickle")
            if name in ("torch.load", "pickle.load", "pickle.loads", "torch.hub.load"):
                found.append(f"{path.name} calls {name}")
            if pickled is not None and not (isinstance(pickled, ast.Constant) and pickled.value is False):
                found.append(f"{path.name} allows pickles in {name}")
            if name.endswith(("np.load", "numpy.load")) and pickled is None:
                found.append(f"{path.name} leaves open whether {name} reads pickles")
            # The edit pipeline reads run folders only, by loaders that are looked at here.
            ours = "super()" in name or name == "PagodaEditPipeline.from_pretrained"
            if name.endswith(".from_pretrained") and not ours:
                safe = options.get("use_safetensors")
                if not (isinstance(safe, ast.Constant) and safe.value is True):
                    found.append(f"{path.name} lets {name} read pickles")
    assert not found
