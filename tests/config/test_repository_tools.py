"""The checks of `make check` that are ours: they find what they are for, and the repository passes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import check_budgets
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_generated_docs_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/generate_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("a.py", "def f():\n" + "    x = 1\n" * 70, "71 lines"),
        ("a.py", "x = 1\n" * 601, "601 lines"),
        ("a.py", "def f(a, b, c, d, e, f, g, h, i): pass\n", "9 parameters"),
        ("a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, *, h, i): pass\n", "9 parameters"),
        ("a.py", "class A:\n" + "    x = 1\n" * 400, "401 lines"),
        ("a.py", "class A:\n" + "".join(f"    def f{i}(self): pass\n" for i in range(21)), "21 public"),
        ("utils.py", "x = 1\n", "name it after"),
        ("a.cpp", "namespace a {\nstruct B {\nvoid f(int x) {\n" + "x;\n" * 69 + "}\n};\n}\n", "71 lines"),
        ("a.cpp", "// x\n" * 601, "601 lines"),
    ],
)
def test_what_is_over_budget_is_found(tmp_path: Path, name: str, source: str, problem: str) -> None:
    path = tmp_path / name
    path.write_text(source)
    check = check_budgets.check_python if name.endswith(".py") else check_budgets.check_cpp
    found = check(path)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.py", "def f():\n" + "    x = 1\n" * 69),
        ("a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): pass\n"),
        ("a.cpp", 'void f() {\n  g("}}}{{{");  // {{{\n}\n' + "int x;\n" * 100 + "void h() {\n}\n"),
        ("a.cpp", "#define M(x) \\\n  { \\\n    x\nvoid f() {\n}\n" + "int y;\n" * 80 + "void g() {\n}\n"),
    ],
)
def test_what_is_within_budget_passes(tmp_path: Path, name: str, source: str) -> None:
    path = tmp_path / name
    path.write_text(source)
    assert (check_budgets.check_python if name.endswith(".py") else check_budgets.check_cpp)(path) == []


def test_settings_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "src/penstock/config/settings.py"
    path.parent.mkdir(parents=True)
    path.write_text("MAX_SETTINGS: Final = 2\nclass Settings:\n    a: int = 1\n    b: int = 1\n")
    assert check_budgets.check_settings(tmp_path) == []
    path.write_text("MAX_SETTINGS: Final = 2\nclass Settings:\n    a: int = 1\n    b: int = 1\n    c: int = 1\n")
    assert "3 settings" in check_budgets.check_settings(tmp_path)[0]
