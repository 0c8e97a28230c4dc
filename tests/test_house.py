"""How the house is built (floors, sizes, what may stand where), read from the source; each rule is shown to bite."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llmrecipes"

FLOORS = (
    ("errors", "environment", "__init__"),
    ("config", "plugins", "batch", "prompts", "prompt_contract", "precision"),
    ("data", "models", "kernels", "training", "generation", "reports"),
    ("run",),
    ("command", "finetuning", "inference", "evaluation", "merging", "plan", "verify", "__main__", "data.__main__"),
)
STRANGERS = FLOORS[2]
"""None of them knows another."""

MODULE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 7
HEAVY = {"torch", "transformers", "numpy", "peft", "bitsandbytes", "datasets", "accelerate", "pyarrow", "rich"}
LIGHT = (
    "command", "finetuning", "inference", "evaluation", "merging", "plan", "verify", "__main__", "data.__main__",
    "config.rules",
)  # fmt: skip
"""What a wrong flag is told by, in under a second: imports nothing of `HEAVY`, itself or through others."""

UNIX_ONLY = {"fcntl", "resource", "termios"}
"""Modules of the standard library that are not everywhere, and so are imported where they are used."""

ENVIRONMENT_READER = "environment"
IMPORTERS = ("command", "plugins")
"""The modules that import by name: a command's run once its flags are accepted, and a user's file."""

BANNED_CALLS = {
    "torch.load", "torch.save", "torch.hub.load", "np.load", "numpy.load", "eval", "exec", "yaml.load", "os.system",
    "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, str]:
    """Returns every module of the package as {name below llmrecipes: source}; a package is named by its folder."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "shipped" not in path.parts:
            modules[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return modules


def floor(module: str) -> tuple[int, str]:
    """Returns (floor, room) of a module: `data.files` is in the room `data` of floor 2."""
    for number, rooms in reversed(list(enumerate(FLOORS))):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return number, room
    raise LookupError(f"{module} has no floor; give it one in {Path(__file__).name}")


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields (module, line) of every import within; of `from a import b` both `a` and `a.b`."""
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            yield from ((alias.name, item.lineno) for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            module = "." * item.level + (item.module or "")
            yield module, item.lineno
            yield from ((f"{module}.{alias.name}", item.lineno) for alias in item.names)


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def is_kernel(function: Function) -> bool:
    """A Triton program: it takes pointers, strides and constants, none of which is a Python type."""
    return any(dotted(decorator) == "jit" for decorator in function.decorator_list)


def rooms_known(module: str, tree: ast.AST) -> Iterator[str]:
    """A module knows only what is on floors below, or in its own room; on floor 2 rooms are strangers."""
    own_floor, own_room = floor(module)
    for name, line in imports(tree):
        if name.startswith("."):
            yield f"line {line}: a relative import; write the whole name"
        if not name.startswith("llmrecipes."):
            continue
        try:
            there, room = floor(name.removeprefix("llmrecipes."))
        except LookupError:  # `from llmrecipes import __version__`
            continue
        if there > own_floor:
            yield f"line {line}: {name} is upstairs"
        elif there == own_floor and room != own_room and room in STRANGERS:
            yield f"line {line}: {name} is a stranger on the same floor"


def imports_in_functions(module: str, tree: ast.AST) -> Iterator[str]:
    """A function imports nothing but optional or heavy packages of others; nothing is imported by name."""
    for function in functions(tree):
        for name, line in imports(function):
            if name.split(".")[0] in {"llmrecipes", "", *sys.stdlib_module_names} - UNIX_ONLY:
                yield f"line {line}: {name} is imported inside {function.name}; import it at the top"
    for node in ast.walk(tree):
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        if called in ("importlib.import_module", "import_module", "__import__") and module not in IMPORTERS:
            yield f"line {node.lineno}: {called}"


def sizes(module: str, tree: ast.AST) -> Iterator[str]:
    """Modules, functions and signatures stay small enough to be read at once."""
    lines = max((node.end_lineno or 0 for node in ast.walk(tree) if isinstance(node, ast.stmt)), default=0)
    if lines > MODULE_LINES:
        yield f"{lines} lines"
    for function in functions(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length >= FUNCTION_LINES:
            yield f"line {function.lineno}: {function.name} has {length} lines"
        given = function.args
        taken = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        if sum(item.arg not in ("self", "cls") for item in taken) > PARAMETERS and not is_kernel(function):
            yield f"line {function.lineno}: {function.name} has more than {PARAMETERS} parameters"


def no_hidden_state(module: str, tree: ast.AST) -> Iterator[str]:
    """No `global`, and the environment is read in one place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"
        reads = isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv", "os.putenv")
        if reads and module != ENVIRONMENT_READER:
            yield f"line {node.lineno}: {dotted(node)}; only {ENVIRONMENT_READER} reads the environment"
    if module != ENVIRONMENT_READER:
        yield from (f"line {line}: {name}" for name, line in imports(tree) if name in ("os.environ", "os.getenv"))


def nothing_dangerous(module: str, tree: ast.AST) -> Iterator[str]:
    """Nothing that runs what a file or a string says: no pickles, no `eval`, no shell, no YAML objects."""
    for name, line in imports(tree):
        if name.split(".")[0] in BANNED_MODULES:
            yield f"line {line}: {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            switches = {item.arg: getattr(item.value, "value", None) for item in node.keywords}
            if dotted(node.func) in BANNED_CALLS:
                yield f"line {node.lineno}: {dotted(node.func)}"
            yield from (
                f"line {node.lineno}: {name}={switches[name]}"
                for name, allowed in (("shell", False), ("allow_pickle", False), ("weights_only", True))
                if name in switches and switches[name] is not allowed
            )


def everything_told(module: str, tree: ast.AST) -> Iterator[str]:
    """A file opens with what it is for; what is public says what it does, and its types."""
    assert isinstance(tree, ast.Module)
    if not ast.get_docstring(tree):
        yield "opens with no docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for holder in (tree, *classes):
        if isinstance(holder, ast.ClassDef) and not ast.get_docstring(holder):
            yield f"line {holder.lineno}: {holder.name} has no docstring"
        for function in (node for node in holder.body if isinstance(node, Function)):
            given = function.args
            taken = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            untyped = [item.arg for item in taken if item and item.arg not in ("self", "cls") and not item.annotation]
            if (untyped or function.returns is None) and not is_kernel(function):
                yield f"line {function.lineno}: {function.name} is not annotated throughout"
            if not function.name.startswith("_") and not ast.get_docstring(function):
                yield f"line {function.lineno}: {function.name} has no docstring"


def dotted(node: ast.AST) -> str:
    """Returns `a.b.c` of a name or an attribute, or an empty text."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def heavy_imports(module: str, modules: dict[str, str]) -> set[str]:
    """Returns the heavy packages that importing a module imports, through whatever of ours."""
    heavy: set[str] = set()
    waiting, seen = [module], set()
    while waiting:
        here = waiting.pop()
        if here in seen or here not in modules:
            continue
        seen.add(here)
        tree = ast.parse(modules[here])
        inside = {line for function in functions(tree) for _, line in imports(function)}
        names = {name for name, line in imports(tree) if line not in inside}
        heavy |= {name.split(".")[0] for name in names} & HEAVY
        ours = {name.removeprefix("llmrecipes.") for name in names if name.startswith("llmrecipes.")}
        waiting += [found for name in ours for found in (name, f"{name}.__init__", f"{name.split('.')[0]}.__init__")]
    return heavy


RULES: tuple[Callable[[str, ast.AST], Iterator[str]], ...] = (
    rooms_known, imports_in_functions, sizes, no_hidden_state, nothing_dangerous, everything_told,
)  # fmt: skip
MODULES = sources()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Callable[[str, ast.AST], Iterator[str]]) -> None:
    broken = [f"{name}: {told}" for name, source in MODULES.items() for told in rule(name, ast.parse(source))]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("module", LIGHT)
def test_a_wrong_flag_is_told_without_a_heavy_import(module: str) -> None:
    assert module in MODULES
    assert heavy_imports(module, MODULES) == set()


def test_every_module_has_a_floor() -> None:
    for module in MODULES:
        floor(module)
    with pytest.raises(LookupError, match="utils.strings has no floor"):
        floor("utils.strings")


LONG_FUNCTION = '"""D."""\ndef f() -> None:\n    """D."""\n' + "    f()\n" * FUNCTION_LINES
LONG_MODULE = '"""D."""\n' + "a = 1\n" * MODULE_LINES
MUTANTS: list[tuple[Callable[[str, ast.AST], Iterator[str]], str, str]] = [
    (rooms_known, "config.x", "import llmrecipes.data.files"),
    (rooms_known, "config.x", "from llmrecipes.data import files"),
    (rooms_known, "config.x", "from llmrecipes import run"),
    (rooms_known, "errors", "from llmrecipes.config import files"),
    (rooms_known, "run.x", "from llmrecipes.command import launch"),
    (rooms_known, "data.x", "from llmrecipes.models.loading import load_model"),
    (rooms_known, "data.x", "from llmrecipes.data.__main__ import main"),
    (rooms_known, "kernels.x", "import llmrecipes.training.loss"),
    (rooms_known, "data.x", "from ..models import loading"),
    (imports_in_functions, "run.x", "def f():\n    from llmrecipes.data import files"),
    (imports_in_functions, "run.x", "def f():\n    import json"),
    (imports_in_functions, "run.x", "class A:\n    def f(self):\n        from .b import c"),
    (imports_in_functions, "run.x", "import importlib\nimportlib.import_module('llmrecipes.data')"),
    (sizes, "run.x", LONG_FUNCTION),
    (sizes, "run.x", LONG_MODULE),
    (sizes, "run.x", "def f(a, b, c, d, e, f, g, h): ..."),
    (sizes, "run.x", "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ..."),
    (no_hidden_state, "run.x", "def f():\n    global a\n    a = 1"),
    (no_hidden_state, "run.x", "import os\nos.environ['A'] = '1'"),
    (no_hidden_state, "run.x", "import os\nos.getenv('A')"),
    (no_hidden_state, "run.x", "from os import environ"),
    (nothing_dangerous, "run.x", "import pickle"),
    (nothing_dangerous, "run.x", "from pickle import loads"),
    (nothing_dangerous, "run.x", "torch.load(path)"),
    (nothing_dangerous, "run.x", "torch.save(model, path)"),
    (nothing_dangerous, "run.x", "eval(text)"),
    (nothing_dangerous, "run.x", "yaml.load(text, Loader=yaml.Loader)"),
    (nothing_dangerous, "run.x", "subprocess.run(text, shell=True)"),
    (nothing_dangerous, "run.x", "f(path, allow_pickle=True)"),
    (nothing_dangerous, "run.x", "f(path, weights_only=False)"),
    (everything_told, "run.x", "a = 1"),
    (everything_told, "run.x", '"""D."""\ndef f() -> None: ...'),
    (everything_told, "run.x", '"""D."""\ndef f(a) -> None:\n    """D."""'),
    (everything_told, "run.x", '"""D."""\ndef f(*a) -> None:\n    """D."""'),
    (everything_told, "run.x", '"""D."""\ndef f(a: int):\n    """D."""'),
    (everything_told, "run.x", '"""D."""\nclass A:\n    """D."""\n    def f(self) -> None: ...'),
    (everything_told, "run.x", '"""D."""\nclass A:\n    a: int'),
]


@pytest.mark.parametrize(("rule", "module", "source"), MUTANTS)
def test_a_rule_bites(rule: Callable[[str, ast.AST], Iterator[str]], module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (rooms_known, "run.x", "from llmrecipes.data import files\nfrom llmrecipes.models.loading import load_model"),
        (rooms_known, "data.x", "from llmrecipes.data.files import text\nfrom llmrecipes import __version__"),
        (rooms_known, "batch", "from llmrecipes.prompts import IGNORED_LABEL"),
        (imports_in_functions, "run.x", "def f():\n    import wandb"),
        (imports_in_functions, "command", "importlib.import_module('llmrecipes.run')"),
        (sizes, "run.x", "class A:\n    def f(self, a, b, c, d, e, f, g): ..."),
        (sizes, "kernels.x", "@jit\ndef f(a, b, c, d, e, f, g, h): ..."),
        (no_hidden_state, "environment", "import os\nos.environ['A']"),
        (nothing_dangerous, "run.x", "model.eval()\nre.compile('a')\nyaml.safe_load(text)\nf(weights_only=True)"),
        (everything_told, "run.x", '"""D."""\ndef _f() -> None: ...'),
        (everything_told, "kernels.x", '"""D."""\n@jit\ndef f(a):\n    """D."""'),
    ],
)
def test_a_rule_lets_through_what_is_allowed(
    rule: Callable[[str, ast.AST], Iterator[str]], module: str, source: str
) -> None:
    assert not list(rule(module, ast.parse(source)))


def test_heavy_imports_are_found_through_others_and_not_in_functions() -> None:
    chain = {
        "command": "from llmrecipes.config import loading",
        "config.loading": "from llmrecipes.batch import Sample",
        "batch": "import torch.nn\ndef f():\n    import peft",
        "config.__init__": "import numpy",
    }
    assert heavy_imports("command", chain) == {"torch", "numpy"}
