"""Checks the size budgets of CONTRIBUTING.md: functions, files, classes, parameters, settings. Exit 1 with a list.

Python is parsed; C++ is measured by its braces, which is exact enough for a limit on length.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 600
MAX_CLASS_LINES = 400
MAX_PUBLIC_METHODS = 20
MAX_PARAMETERS = 8
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc"}
PYTHON_ROOTS = ("src", "tests", "tools", "benchmarks", "examples")
CPP_SUFFIXES = {".cpp", ".h", ".hpp", ".cc", ".inc"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    problems = [problem for path in _python_files(root) for problem in check_python(path)]
    problems += [problem for path in _cpp_files(root) for problem in check_cpp(path)]
    problems += check_settings(root)
    for problem in problems:
        print(problem.replace(f"{root}/", ""))
    print(f"size budgets: {len(problems)} over" if problems else "size budgets: kept")
    return 1 if problems else 0


def check_python(path: Path) -> list[str]:
    """Everything in one Python file that is over a budget, as path:line: what."""
    source = path.read_text(encoding="utf-8")
    problems = _check_file(path, source)
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, Function):
            problems += _check_function(path, node)
        elif isinstance(node, ast.ClassDef):
            problems += _check_class(path, node)
    return problems


def check_cpp(path: Path) -> list[str]:
    """Everything in one C++ file that is over a budget."""
    source = path.read_text(encoding="utf-8")
    problems = _check_file(path, source)
    for line, name, length in cpp_functions(source):
        if length > MAX_FUNCTION_LINES:
            problems.append(f"{path}:{line}: function {name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return problems


def check_settings(root: Path) -> list[str]:
    """The number of settings, counted without importing the package: this runs before anything is built."""
    path = root / "src/penstock/config/settings.py"
    if not path.exists():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    limit, count = 0, 0
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            count = sum(isinstance(statement, ast.AnnAssign) for statement in node.body)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "MAX_SETTINGS":
            assert isinstance(node.value, ast.Constant)
            limit = int(str(node.value.value))
    return [f"{path}:1: {count} settings, more than {limit}"] if count > limit else []


def cpp_functions(source: str) -> Iterator[tuple[int, str, int]]:
    """(first line, name, number of lines) of the outermost brace blocks that are neither namespaces nor types."""
    text = _blank_cpp_text(source)
    depth, outer, start, header, name = 0, 0, 0, "", ""
    for number, line in enumerate(text.splitlines(), 1):
        for char in line:
            if char == "{":
                if not start:
                    if re.search(r"\b(namespace|struct|class|enum|union|extern)\b[^()]*$", header):
                        outer += 1
                    elif ")" in header:
                        start, name = number, _cpp_name(header)
                depth, header = depth + 1, ""
            elif char == "}":
                depth, header = depth - 1, ""
                if start and depth == outer:
                    yield start, name, number - start + 1
                    start = 0
                outer = min(outer, depth)
            elif char == ";" and not start:
                header = ""
            else:
                header += char
        header += " "


def _cpp_name(header: str) -> str:
    match = re.search(r"(\w+)\s*\(", header)
    return match[1] if match else "?"


def _blank_cpp_text(source: str) -> str:
    """`source` without comments, string contents and preprocessor lines; line numbers stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#(?:[^\n\\]|\\\n|\\.)*'
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n"), source, flags=re.DOTALL | re.MULTILINE)


def _check_file(path: Path, source: str) -> list[str]:
    problems = []
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        problems.append(f"{path}:1: file has {lines} lines, more than {MAX_FILE_LINES}")
    if path.stem in FORBIDDEN_STEMS:
        problems.append(f"{path}:1: name it after what it owns, not {path.stem}")
    return problems


def _check_function(path: Path, node: Function) -> list[str]:
    problems = []
    length = _num_lines(node)
    if length > MAX_FUNCTION_LINES:
        problems.append(
            f"{path}:{node.lineno}: function {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"
        )
    arguments = node.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    count = len(names) - (names[:1] in (["self"], ["cls"]))
    # A GPU kernel is one flat function: it takes pointers, sizes and strides, and no structures.
    is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    if count > MAX_PARAMETERS and not is_kernel:
        problems.append(
            f"{path}:{node.lineno}: function {node.name} has {count} parameters, more than {MAX_PARAMETERS}"
        )
    return problems


def _check_class(path: Path, node: ast.ClassDef) -> list[str]:
    problems = []
    length = _num_lines(node)
    if length > MAX_CLASS_LINES:
        problems.append(f"{path}:{node.lineno}: class {node.name} has {length} lines, more than {MAX_CLASS_LINES}")
    methods = [item for item in node.body if isinstance(item, Function) and not item.name.startswith("_")]
    is_test = node.name.startswith("Test") or any(item.name.startswith("test") for item in methods)
    if len(methods) > MAX_PUBLIC_METHODS and not is_test:
        problems.append(
            f"{path}:{node.lineno}: class {node.name} has {len(methods)} public methods, more than {MAX_PUBLIC_METHODS}"
        )
    return problems


def _num_lines(node: Function | ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _python_files(root: Path) -> Iterator[Path]:
    for name in PYTHON_ROOTS:
        yield from sorted((root / name).rglob("*.py"))


def _cpp_files(root: Path) -> Iterator[Path]:
    yield from sorted(path for path in (root / "csrc").rglob("*") if path.suffix in CPP_SUFFIXES)


if __name__ == "__main__":
    sys.exit(main())
