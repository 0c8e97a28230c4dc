"""Whether a data set's file makes its samples of nothing but what our own readers note.

    assert doubt(b"import pandas") == "line 1: it imports pandas"

Judged by the text alone, and by what is known to be harmless: whatever else stands there is doubted. Nobody is kept
from anything by it: the samples of a file in doubt are made anew in each run, that is all. It is no sandbox: it looks
for what people write, and nobody gains from deceiving it.
"""

import ast
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from weakref import WeakKeyDictionary

STANDARD = (
    "__future__", "abc", "bisect", "collections", "collections.abc", "copy", "dataclasses", "difflib", "enum",
    "fractions", "functools", "hashlib", "heapq", "html", "itertools", "json", "logging", "math", "numbers", "operator",
    "random", "re", "statistics", "string", "textwrap", "types", "typing", "unicodedata",
)  # fmt: skip
"""Modules of the standard library that read nothing."""

OWN = (
    "llmrecipes.config.options", "llmrecipes.data.conversations", "llmrecipes.data.files", "llmrecipes.data.mixing",
    "llmrecipes.data.rows", "llmrecipes.data.templates", "llmrecipes.data.turns", "llmrecipes.errors",
    "llmrecipes.prompts",
)  # fmt: skip
"""Modules of ours that read nothing unnoted."""

LOGGING = ("getLogger", "Logger", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
"""What may be taken from `logging`: other logs are not told again when samples come from the cache."""

BANNED_NAMES = (
    "open", "exec", "eval", "compile", "__import__", "globals", "locals", "vars", "input", "print", "breakpoint",
    "getattr", "setattr", "delattr", "hash", "id",
)  # fmt: skip
"""Built-ins that read, change or say what nobody notes, or that differ from process to process."""

BANNED_MEMBERS = (
    "attrgetter", "methodcaller", "SystemRandom", "get_type_hints", "ForwardRef", "make_dataclass", "f_back",
    "f_builtins", "f_globals",
)  # fmt: skip
"""What comes to the same as a banned name."""

READING_MEMBERS = re.compile(r"(from|save|push)(_(?!iterable$)|$)")
"""Methods of tokenizers and the like that read or write files."""

DUNDERS = (
    "__all__", "__call__", "__class__", "__contains__", "__doc__", "__enter__", "__eq__", "__exit__", "__file__",
    "__future__", "__getitem__", "__hash__", "__init__", "__iter__", "__len__", "__main__", "__name__", "__next__",
    "__post_init__", "__repr__", "__slots__", "__str__",
)  # fmt: skip
"""Names between double underscores that lead nowhere."""

DECORATORS = ("abstractmethod", "classmethod", "dataclass", "final", "overload", "property", "staticmethod", "unique")

FIELDS = ("auto", "field", "option")
"""What makes a default anew for each object."""

CHANGEABLE_CALLS = ("dict", "list", "set", "split")

IMPORT_CALLS = (
    *DECORATORS, *FIELDS, *CHANGEABLE_CALLS, "NamedTuple", "NewType", "TypeVar", "compile", "dedent", "format",
    "frozenset", "getLogger", "join", "len", "namedtuple", "range", "strip", "tuple",
)  # fmt: skip
"""What may be called while the file is imported: no reader, so that all reading is done while it is noted."""


def doubt(source: bytes) -> str:
    """Returns the first thing that a file may read, change or say without its being noted; "" where there is none."""
    try:
        tree = ast.parse(source)
        judge = _Judge(tree)
        judge.visit(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "its file cannot be parsed"
    return next((f"line {line}: it {told}" for line, told in sorted(judge.doubts)), "")


_first_seen: WeakKeyDictionary[ModuleType, dict[str, str]] = WeakKeyDictionary()
"""Modules that were asked for, and what they held then."""


def is_as_first_seen(module: ModuleType) -> bool:
    """Returns whether a module holds what it did when this was first asked, before any call: no call may find what
    an earlier one has left, as that of another split, which the next run may not make."""
    held = {name: repr(value) for name, value in vars(module).items() if name[:2] != "__"}
    return _first_seen.setdefault(module, held) == held


class _Judge(ast.NodeVisitor):
    """Gathers what a file does beyond the known."""

    def __init__(self, tree: ast.Module) -> None:
        self.doubts: list[tuple[int, str]] = []
        self.importing = True
        """whether what is visited runs when the file is imported"""
        self.modules: dict[str, str] = {}
        """name in the file -> module"""
        self.defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):  # before all else: a function may use what is imported below it
            if isinstance(node, ast.Import):
                self.modules |= {alias.asname or alias.name: alias.name for alias in node.names}

    def _doubt(self, node: ast.expr | ast.stmt, told: str) -> None:
        self.doubts.append((node.lineno, told))

    # --- imports

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if not _is_known(alias.name) or ("." in alias.name and not alias.asname):
                self._doubt(node, f"imports {alias.name}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        name = "." * node.level + (node.module or "")
        if not _is_known(name):
            self._doubt(node, f"imports {name}")
            return
        for alias in node.names:
            self._member(node, name, alias.name)
            if alias.asname not in (None, alias.name) and alias.name in ("Random", "getLogger", "seed"):
                self._doubt(node, f"renames {alias.name}")

    def _member(self, node: ast.expr | ast.stmt, module: str, name: str) -> None:
        """Takes a name of a module: its own, and none that it has imported itself."""
        value = getattr(sys.modules.get(module), name, None)
        foreign = module in OWN and not str(getattr(value, "__module__", module)).startswith("llmrecipes")
        unknown = module == "logging" and name not in LOGGING
        if name == "*" or isinstance(value, ModuleType) or foreign or unknown or name.startswith("_"):
            self._doubt(node, f"takes {name} from {module}")
        if module in STANDARD:
            self._attribute(node, name)

    # --- names

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in BANNED_NAMES:
            self._doubt(node, f"uses {node.id}")
        if node.id in self.modules:
            self._doubt(node, f"hands on the module {node.id}")
        self._dunders(node, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        if name in self.modules:
            self._member(node, self.modules[name], node.attr)
        else:
            self.visit(node.value)
            self._attribute(node, node.attr)
        if not isinstance(node.ctx, ast.Load) and name != "self":
            self._doubt(node, f"changes {name or '...'}.{node.attr}")

    def _attribute(self, node: ast.expr | ast.stmt, name: str) -> None:
        if name in BANNED_MEMBERS or READING_MEMBERS.match(name):
            self._doubt(node, f"uses {name}")
        self._dunders(node, name)

    def _dunders(self, node: ast.expr | ast.stmt, text: str) -> None:
        for name in re.findall(r"__[a-z]\w*?__", text):
            if name not in DUNDERS:
                self._doubt(node, f"uses {name}")

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._dunders(node, node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring may say anything
            self.generic_visit(node)

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        for name in node.kwd_attrs:
            self._attribute(node.cls, name)
        self.generic_visit(node)

    def visit_Global(self, node: ast.Global) -> None:
        self._doubt(node, f"keeps {node.names[0]} from one call to the next")

    # --- calls

    def visit_Call(self, node: ast.Call) -> None:
        name = _called(node)
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if self.importing and (name not in IMPORT_CALLS or name in self.defined):
            self._doubt(node, f"calls {name or 'something'} while it is imported")
        if name in ("Random", "seed") and not node.args and not node.keywords:
            self._doubt(node, "draws by a seed of the machine's")
        if name == "getLogger" and first != "llmrecipes":
            self._doubt(node, "logs elsewhere than to llmrecipes")
        if isinstance(node.func, ast.Name) and name == "getattr" and len(node.args) > 1:
            wanted = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if isinstance(wanted, str):
                self._attribute(node, wanted)
                for given in (*node.args, *node.keywords):
                    self.visit(given)
                return
        self.generic_visit(node)

    # --- what runs when, and what may last

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._dunders(node, node.name)
        self._decorated(node)
        self._lasting(node, [*node.args.defaults, *node.args.kw_defaults])
        self.visit(node.args)
        if node.returns:
            self.visit(node.returns)
        self._called_later(node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._lasting(node, [*node.args.defaults, *node.args.kw_defaults])
        self.visit(node.args)
        self._called_later([node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._decorated(node)
        fields = [item for item in node.body if isinstance(item, ast.Assign | ast.AnnAssign)]
        self._lasting(node, [item.value for item in fields])
        for item in (*node.bases, *node.keywords, *node.body):
            self.visit(item)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        if self.importing:
            self._doubt(node, "makes a generator while it is imported, which lasts from one call to the next")
        self.generic_visit(node)

    def _called_later(self, nodes: Sequence[ast.AST]) -> None:
        importing, self.importing = self.importing, False
        for node in nodes:
            self.visit(node)
        self.importing = importing

    def _decorated(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            name = _called(decorator)
            if self.importing and (name not in DECORATORS or name in self.defined):
                self._doubt(decorator, f"calls {name or 'something'} while it is imported")
            self.visit(decorator)

    def _lasting(self, node: ast.expr | ast.stmt, values: Sequence[ast.expr | None]) -> None:
        """Takes values that functions and classes hold from one call to the next: they must not be changeable."""
        given = [value for value in values if value and not (isinstance(value, ast.Call) and _called(value) in FIELDS)]
        if self.importing and any(_is_changeable(item) for value in given for item in ast.walk(value)):
            self._doubt(node, "has a default that lasts from one call to the next")


def _is_changeable(node: ast.AST) -> bool:
    kinds = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    return isinstance(node, kinds) or (isinstance(node, ast.Call) and _called(node) in CHANGEABLE_CALLS)


def _called(node: ast.expr) -> str:
    """Returns the last name of what is called, without the dots before it."""
    function = node.func if isinstance(node, ast.Call) else node
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_known(module: str) -> bool:
    """Returns whether a module is one of ours, or the standard library's own and not a file of the same name."""
    if module not in STANDARD or module not in sys.modules:
        return module in OWN and module in sys.modules
    origin = getattr(sys.modules[module].__spec__, "origin", None) or ""
    folders = set(Path(origin).resolve().parents)
    library = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    return origin in ("built-in", "frozen") or bool(library & folders)
