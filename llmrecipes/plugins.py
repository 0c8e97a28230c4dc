"""Names in a config to functions: an entry of a table, or `FILE.py:FUNCTION` of anybody's file.

A plug-in is a program: it can do all that you can do. Read it as you would read a script before running it.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from llmrecipes.errors import LlmRecipesError, PluginError, did_you_mean

Function = Callable[..., Any]

MODULE_PREFIX = "llmrecipes_plugin_"
"""What the module of a plug-in's file is called in `sys.modules`, before its file name and the path's hash."""

TOLD_CHARACTERS = 300
"""Characters of somebody's exception that still fit into one line of ours."""


@dataclass(frozen=True)
class Plugin:
    """A function of somebody's file. Calling it lets no exception of theirs look like one of ours."""

    path: Path
    name: str
    function: Function

    def __call__(self, *arguments: Any) -> Any:
        """Returns what the function returns; raises `PluginError` with the author's own file and line."""
        with blamed(f"in {self.name}", self.path):
            return self.function(*arguments)

    def each(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Yields rows that the function made; where they are made one by one, its code runs here."""
        with blamed(f"in the rows of {self.name}", self.path):
            yield from rows

    @property
    def module(self) -> ModuleType | None:
        """The file as a module; None where the function was not loaded from a file."""
        return sys.modules.get(_module_name(self.path))

    @property
    def source(self) -> bytes | None:
        """What the file held when it was run, whatever it holds now."""
        loader = getattr(self.module, "__loader__", None)
        return loader.source if isinstance(loader, _SourceLoader) else None

    def sibling(self, name: str) -> "Plugin | None":
        """Returns another function of the same file, or None where there is none."""
        function = getattr(self.module, name, None)
        return Plugin(self.path, name, function) if callable(function) else None


@contextmanager
def blamed(where: str, path: Path | None = None) -> Iterator[None]:
    """Turns whatever somebody's code raises within into a `PluginError` with the author's own file and line."""
    try:
        yield
    except LlmRecipesError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(_told(error, where, path)) from error


def resolve_function(
    reference: str, flag: str, table: Mapping[str, Function], folders: Sequence[Path] = ()
) -> Function:
    """Returns the function that a name of `table` or a `FILE.py:FUNCTION` stands for; raises `PluginError`."""
    if reference in table:
        return table[reference]
    if ".py" not in reference:
        guess = did_you_mean(reference, table)
        raise PluginError(f"--{flag} {reference}: not one of {', '.join(table)}, and not FILE.py:FUNCTION{guess}")
    return load_plugin(reference, flag, default_name="", folders=folders)


def load_plugin(reference: str, flag: str, default_name: str, folders: Sequence[Path]) -> Plugin:
    """Returns the function that `FILE.py[:FUNCTION]` names; the file is looked for in each of `folders`.

    Raises `PluginError` naming `flag` where there is no such file or function, or the file does not import.
    """
    return plugin_of(reference, f"--{flag} {reference}", default_name, folders)


def plugin_of(reference: str, said: str, default_name: str, folders: Sequence[Path]) -> Plugin:
    """Returns the same as `load_plugin`; messages open with `said`, what the user wrote."""
    file_name, name = split_reference(reference)
    name = name or default_name
    if not file_name.endswith(".py"):
        raise PluginError(f"{said}: expected a Python file and a function of it, FILE.py:FUNCTION")
    if not name:
        raise PluginError(f"{said}: name a function behind the file, {file_name}:FUNCTION")
    if not name.isidentifier():
        raise PluginError(f"{said}: {name!r} cannot be a function's name; write FILE.py:FUNCTION")
    if name.startswith("_"):
        raise PluginError(f"{said}: {name} is private to its file (it begins with _); name a public function")
    path = _found(Path(file_name).expanduser(), said, folders)
    module = _module(path)
    function = getattr(module, name, None)
    if not callable(function):
        own = _own_functions(module)
        held = ", ".join(own) or "none"
        raise PluginError(f"{said}: {path} has no function {name}, only {held}{did_you_mean(name, own)}")
    return Plugin(path, name, function)


def split_reference(reference: str) -> tuple[str, str]:
    """Returns (file, function or empty): split at the last colon behind `.py`, so that `C:\\\\a.py:f` survives."""
    file_name, colon, name = reference.rpartition(":")
    return (file_name, name) if colon and file_name.endswith(".py") else (reference, "")


def plugin_folders(config_path: str | None) -> list[Path]:
    """Returns where a plug-in's relative path is looked for: beside the config file, here, the shipped data sets."""
    beside = [Path(config_path).expanduser().resolve().parent] if config_path else []
    return [*beside, Path.cwd(), shipped_folder("custom_datasets")]


def shipped_folder(name: str) -> Path:
    """Returns `custom_datasets`, `configs` or `recipes`: at the checkout's root, or inside an installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "shipped" / name
    return installed if installed.is_dir() else package.parent / name


def _found(path: Path, said: str, folders: Sequence[Path]) -> Path:
    candidates = [path] if path.is_absolute() else [folder / path for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    looked = list(dict.fromkeys(candidate.parent for candidate in candidates))
    nearby = [item.name for folder in looked if folder.is_dir() for item in folder.glob("*.py")]
    raise PluginError(
        f"{said}: no such file in {', '.join(str(folder) for folder in looked)}{did_you_mean(path.name, nearby)}"
    )


def _own_functions(module: ModuleType) -> list[str]:
    """Returns the names of the public functions that a plug-in's file defines, imported ones left out."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


class _SourceLoader(SourceFileLoader):
    """Runs a file as it stands, not a compiled copy that may be older, and remembers what it ran."""

    source = b""

    def get_code(self, fullname: str) -> CodeType:
        self.source = self.get_data(self.path)
        return self.source_to_code(self.source, self.path)


def _module(path: Path) -> ModuleType:
    """Returns the file as a module, executed once a process; its own folder is importable."""
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_SourceLoader(name, str(path)))
    if spec is None or spec.loader is None:
        raise PluginError(f"{path}: Python cannot import this file")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        with blamed("while importing it", path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    return f"{MODULE_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _told(error: BaseException, where: str, path: Path | None) -> str:
    """Returns one line: the author's own file and line, the place, the exception, the code that raised it.

    Own are the frames of files beside a plug-in, helpers that it imports included.
    """
    kind, text = type(error).__name__, " ".join(str(error).split())[:TOLD_CHARACTERS]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg}"
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(MODULE_PREFIX)]
    folders = {Path(module.__file__ or "").parent for module in modules}
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent in folders]
    if not own and path is not None:
        return f"{path}: {where}: {kind}: {text}"
    last = (own or list(frames))[-1]
    code = f" ({last.line[:TOLD_CHARACTERS]})" if last.line else ""
    return f"{last.filename}:{last.lineno}: {where}: {kind}: {text}{code}"
