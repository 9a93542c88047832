"""The project's own promises: versions in step, arrows one way, small modules, a policy in one file."""

import ast
import re
import statistics
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks import size

ROOT = Path(__file__).parents[1]


def pins(path: str) -> list[tuple[str, str]]:
    found = re.findall(r"^\s*-?\s*([\w.-]+)==([\w.]+)\s*$", (ROOT / path).read_text(encoding="utf-8"), re.M)
    return [(name.lower().replace("_", "-"), version) for name, version in found]


def test_environment_and_constraints_are_in_step():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"] + extras["lab"] + extras["longbench"]
    }
    conda, pip = dict(pins("environment.yml")), dict(pins("constraints.txt"))
    assert set(conda) == wanted
    assert {name: pip[name] for name in wanted} == conda
    assert {re.match(r"[\w.-]+", line)[0].lower() for line in extras["dev"]} <= set(pip)


@pytest.mark.parametrize("path", ["environment.yml", "constraints.txt"])
def test_nothing_is_pinned_twice(path):
    names = [name for name, _ in pins(path)]
    assert sorted(names) == sorted(set(names))


CORE_LINES, PACKAGE_LINES = 2_947, 9_170


# What each part may import of the others: arrows point one way, downwards in this table (docs/design.md).
GROUND = {"errors", "files", "growable", "native"}
CORE_PARTS = GROUND | {"timeline", "config", "evaluator", "tiers", "attention", "pipeline", "run"}
MAY = {
    "errors": set(),
    "files": {"errors"},
    "growable": set(),
    "native": set(),
    "timeline": {"files"},
    "config": {"errors", "files"},
    "assets": {"errors"},
    "gguf_file": {"errors"},
    "loading": {"assets", "errors", "gguf_file"},
    "attention": {"native"},
    "evaluator": {"growable", "native"},
    "pipeline": {"config", "errors"},
    "tiers": GROUND | {"attention", "timeline"},
    "run": GROUND | {"config", "evaluator", "pipeline", "tiers", "timeline"},
    "layer": CORE_PARTS,
    "heads": {"layer"},
    "models": {"attention", "errors", "evaluator", "layer", "timeline"},
    "cache": CORE_PARTS | {"heads", "layer", "models"},
    "documents": {"errors"},
    "fingerprint": {"errors"},
    "session_file": {"errors", "files", "native"},
    "prefix_store": {"cache", "config", "errors", "files", "fingerprint", "models", "session_file", "tiers"},
    "systems": CORE_PARTS | {"layer", "models", "cache", "prefix_store"},
    "speculative": {"cache", "errors", "evaluator"},
    "session": {"cache", "errors", "files", "fingerprint", "models", "prefix_store", "session_file", "systems"},
    "longbench": CORE_PARTS
    | {"assets", "cache", "heads", "loading", "models", "prefix_store", "speculative", "systems"},
    "whatif": CORE_PARTS | {"assets", "cache", "models", "systems"},
    "workbench": CORE_PARTS
    | {
        "assets",
        "cache",
        "documents",
        "longbench",
        "models",
        "prefix_store",
        "session",
        "speculative",
        "systems",
        "whatif",
    },
    "__init__": {"cache", "errors", "config", "evaluator", "loading", "models", "session", "speculative", "systems"}
    | {"workbench"},  # public names, each loaded on first use
    "__main__": {"commands"},
}
MAY["commands"] = MAY["workbench"] | {"loading", "workbench"}
WINGS = ("baselines", "hillinfer", "leoam", "lossless")  # of systems


def imports(path: Path) -> set[str]:
    """Modules of this package that a module imports, in whatever way."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "hillinfer"}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_arrows_point_one_way():
    counted = size.modules()
    assert {size.home(path) for path in counted} == set(MAY), "every root file has an arrow rule"
    for path in counted:
        part = size.home(path)
        used = {name.split(".")[1] for name in imports(size.PACKAGE / path) if name.startswith("hillinfer.")}
        assert used <= MAY[part] | {part}, path


def test_no_circle_of_modules():
    """Imports at a module's head; those inside a function happen when everything is there."""
    graph = {}
    for path in size.modules():
        name = ".".join(("hillinfer", *path.with_suffix("").parts)).removesuffix(".__init__")
        tree = ast.parse((size.PACKAGE / path).read_text(encoding="utf-8"))
        own = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[name] = {alias.name for node in own if isinstance(node, ast.Import) for alias in node.names}
        for node in own:
            if isinstance(node, ast.ImportFrom):
                graph[name] |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    graph = {
        name: [other for other in sorted(used) if other in graph and other != name] for name, used in graph.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_no_wing_imports_another():
    for wing in WINGS:
        for path in (size.PACKAGE / "systems" / wing).rglob("*.py"):
            used = {name.split(".")[2] for name in imports(path) if name.startswith("hillinfer.systems.")}
            assert used & set(WINGS) <= {wing}, path


def test_commands_stand_apart():
    """`app` assembles them, and no command uses another; `continuation` is the work of `run`."""
    for path in (size.PACKAGE / "commands").glob("*.py"):
        used = {name.split(".")[2] for name in imports(path) if name.startswith("hillinfer.commands.")}
        may = {"console", "options"} | ({"continuation"} if path.stem == "run" else set())
        assert path.stem == "app" or used <= may, path


def test_layer_names_no_store():
    names = {name for name in imports(size.PACKAGE / "layer.py") if name.startswith("hillinfer.tiers")}
    assert names == {"hillinfer.tiers.geometry", "hillinfer.tiers.store"}
    assert "isinstance(self.store" not in (size.PACKAGE / "layer.py").read_text(encoding="utf-8")


def test_each_paper_has_one_folder():
    """Beside its folder, a paper's classes are named in the registry only."""
    wings = {"LeoAM": "leoam", "ChunkTree": "leoam", "PackedStore": "leoam", "StreamedRun": "lossless"}
    wings |= {"TensorStore": "lossless", "ScoringStore": "hillinfer", "AttendingStore": "hillinfer"}
    wings |= dict.fromkeys(("Eviction", "H2O", "InfiniGen", "Quest", "SnapKV"), "baselines")
    for path in size.modules():
        text = strip_text(path)
        for word, wing in wings.items():
            if re.search(rf"\b{word}\b", text):
                assert path.parts[:2] in (("systems", wing), ("systems", "registry.py")), (path, word)


def strip_text(path: Path) -> str:
    """The code of a module: no docstrings, no comments."""
    return ast.unparse(_without_docstrings(ast.parse((size.PACKAGE / path).read_text(encoding="utf-8"))))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_modules_are_small():
    counted = size.modules()
    assert not {str(path): raw for path, (raw, _) in counted.items() if raw > 300}
    assert statistics.median(raw for raw, _ in counted.values()) <= 120


def test_the_package_only_shrinks():
    """Ratchets, in code lines: `make size`. Lower them whenever you can; raise them never."""
    counted = size.modules()
    assert size.total(counted, size.CORE)[1] <= CORE_LINES
    assert size.total(counted, set(MAY) - set(size.APART))[1] <= PACKAGE_LINES


def test_only_the_seam_knows_transformers_internals():
    for path in (ROOT / "hillinfer").rglob("*.py"):
        deep = {name for name in imports(path) if name.startswith("transformers.")} - {"transformers.utils"}
        assert not deep or path.name == "cache.py" or path.parent.name == "models", (path, deep)
    for path in size.modules():
        if size.home(path) in CORE_PARTS | {"layer"}:
            assert not any(name.startswith("transformers") for name in imports(size.PACKAGE / path)), path


def test_tracked_text_names_no_machine_paths():
    for path in [*ROOT.glob("*.md"), *(ROOT / "hillinfer").rglob("*.py"), *(ROOT / "data").glob("*.py")]:
        assert not re.search(r"/(root|home)/\w", path.read_text(encoding="utf-8")), path


TYPED = {"empty", "ones", "zeros", "rand", "randn"}  # torch's functions whose dtype is the process's default
PLACED = TYPED | {"arange", "as_tensor", "eye", "full", "linspace", "scalar_tensor", "tensor"}  # and whose device is


def test_no_tensor_takes_the_default_dtype_or_device():
    """A script that sets torch.set_default_dtype or set_default_device must not change what kernels are given."""
    found = set()
    for path in size.modules():
        for node in ast.walk(ast.parse((size.PACKAGE / path).read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")):
                continue
            name, said = node.func.attr, {keyword.arg for keyword in node.keywords}
            if (name in PLACED and "device" not in said) or (name in TYPED and "dtype" not in said):
                found.add((str(path), ast.unparse(node)))
    assert not found


def test_no_text_is_read_by_the_locale():
    for path in [*(ROOT / "hillinfer").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "read_text":
                assert node.args or any(keyword.arg == "encoding" for keyword in node.keywords), (path, node.lineno)
