"""The shape of the package: which floor may use which, what it may import, what it declares."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

import nuwa_jax

ROOT = Path(nuwa_jax.__file__).parents[1]
PACKAGE = ROOT / "nuwa_jax"

# Floor -> floors it may import besides itself; what is not a floor (demo.py, ...) stands on top.
MAY_IMPORT = {
    "errors": set(),
    "tensor_files": {"errors"},
    "presets": {"errors"},
    "motion": {"errors"},
    "data": {"errors", "motion"},
    "models": {"errors"},
    "diffusion": set(),
    "leaving": set(),
    "watching": {"errors", "leaving"},
    "parallel": {"errors", "leaving", "data", "models"},
    "training": {
        *("errors", "leaving", "motion", "data", "models", "diffusion", "parallel", "watching"),
    },
    "generation": {
        *("errors", "motion", "data", "models", "diffusion", "parallel", "training"),
        "tensor_files",
    },
    "evaluation": {"errors", "motion", "data", "models", "diffusion", "training", "generation"},
    "estimation": {"errors", "tensor_files", "motion", "data", "models"},
    "convert": {"errors", "tensor_files", "presets", "models", "generation"},
    "golden": {"errors", "tensor_files", "motion", "models", "diffusion", "convert"},
}
# The program that compiles the others, beside the mesh that it compiles them for.
COMPILES = {
    f"parallel/{name}.py"
    for name in ("advice", "aot", "census", "padding", "programs", "report", "topology")
}
# Programs that look up by name what stands above them, and import it only then.
LOOKS_UP = {"data/shards.py": {"estimation"}}
# The host's side of the package: these must work, and start fast, in processes without JAX.
WITHOUT_JAX = ("data", "motion", "estimation")
JAX_ALLOWED = {
    *("data/device.py", "data/soak.py", "motion/raster.py"),
    *("estimation/gmflow.py", "estimation/tapir.py"),
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Reads the files of another framework, where that is installed; is measured against in its own
# interpreter.
OTHER_ALLOWED = {"convert/torch_file.py", "data/bench_torch.py"}
OTHER_FRAMEWORKS = {"torch", "torchvision", "tensorflow", "keras", "diffusers", "transformers"}

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by full name, not relatively"
            # `from nuwa_jax import motion` names the floor only after `import`.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def floor(module: str) -> str:
    return module.partition("/")[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str):
    own = floor(module)
    if own not in MAY_IMPORT:
        assert "/" not in module, f"{own} is a new floor: say in MAY_IMPORT what it stands on"
        return
    used = {
        name.split(".")[1]
        for name in imports(PACKAGE / module)
        if name.startswith("nuwa_jax.") and not name.startswith("nuwa_jax.__")
    }
    above = {"watching", "training", "generation"} if module in COMPILES else set()
    assert used <= MAY_IMPORT[own] | {own} | above | LOOKS_UP.get(module, set())


def test_nothing_stands_on_the_program_that_compiles_the_others():
    names = {f"nuwa_jax.{module[:-3].replace('/', '.')}" for module in COMPILES}
    for module in set(MODULES) - COMPILES:
        assert not imports(PACKAGE / module) & names, module


@pytest.mark.parametrize(
    "module", [m for m in MODULES if floor(m) in WITHOUT_JAX and m not in JAX_ALLOWED]
)
def test_the_hosts_side_does_without_jax(module: str):
    assert not tops(imports(PACKAGE / module)) & JAX


@pytest.mark.parametrize("module", [m for m in MODULES if m not in OTHER_ALLOWED])
def test_no_other_framework_is_imported(module: str):
    assert not tops(imports(PACKAGE / module)) & OTHER_FRAMEWORKS


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """REQUIREMENTS and EXTRAS as setup.py has them."""
    values = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIREMENTS", "EXTRAS"):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    return values["REQUIREMENTS"], values["EXTRAS"]


def distribution(requirement: str) -> str:
    return canonical(re.match(r"[\w.-]+", requirement).group())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_imported_is_declared():
    runtime, extras = requirements()
    declared = {"jaxlib"} | {distribution(r) for r in runtime}  # jaxlib: the other half of jax
    declared |= {distribution(r) for name in ("prepare", "app", "torch") for r in extras[name]}
    providers = importlib.metadata.packages_distributions()
    paths = [PACKAGE / m for m in MODULES] + [ROOT / "train.py", ROOT / "sample.py"]
    paths += sorted((ROOT / "configs").glob("*.py"))
    undeclared = {}
    for path in paths:
        for top in tops(imports(path)) - {"nuwa_jax", "configs"}:
            # By its own name too: the package of an extra need not be installed here.
            names = {canonical(name) for name in providers.get(top, [])} | {canonical(top)}
            if top not in sys.stdlib_module_names and not names & declared:
                undeclared.setdefault(top, []).append(path.name)
    assert not undeclared


def test_requirements_are_ranges():
    runtime, extras = requirements()
    assert set(extras) == {"tpu", "cuda12", "prepare", "gcs", "app", "torch", "test"}
    for requirement in runtime + [r for extra in extras.values() for r in extra]:
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+,<[\d.]+", requirement), requirement


def test_the_core_names_no_accelerator_and_no_framework():
    runtime, _ = requirements()
    assert not {distribution(r) for r in runtime} & (
        OTHER_FRAMEWORKS | {"tensorflow-cpu", "libtpu", "jax-cuda12-plugin", "apache-beam"}
    )
