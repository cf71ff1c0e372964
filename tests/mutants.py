"""Mutation check of the decisions: each small defect put into weigh, resolve or plan must fail a pure test.

    python -m tests.mutants                 # all of them, two at a time; exits 1 where one survives that is not excused
    python -m tests.mutants weigh 3 17      # the mutants 3 and 17 of one module

A mutant is one change of the syntax tree: a comparison turned or made strict, `and` for `or`, a condition negated or
dropped, a number one larger, the branches of a conditional expression exchanged, a statement left out. It runs in a
forked process, first against the examples of tests/test_resolve.py and tests/test_plan.py, then, if it survives these,
against their properties. What changes nothing that a test could see is listed in EQUIVALENT, with the reason.
"""

from __future__ import annotations

import ast
import copy
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
MODULES = ("weigh", "resolve", "plan")
TESTS = ["tests/test_resolve.py", "tests/test_plan.py"]
PROPERTIES = "any_claims or any_history or order_of_claims or every_new_live or kept_apart or ruling_never"
SECONDS = 120
"""A mutant that runs for longer loops, and is killed by that."""
TURNED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
EQUIVALENT: dict[str, str] = {
    "weigh: len(confirmed) < len(said) -> len(confirmed) <= len(said)": "where all is confirmed both verdicts are one",
}
"""Mutants that nothing can tell from the original, by module and changed line, with the reason."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: where, what it was, what it is."""

    module: str
    number: int
    line: int
    before: str
    after: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Stable while the line says the same."""
        return f"{self.module}: {self.before} -> {self.after}"


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of a node; None: nothing."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in TURNED[type(node.ops[0])]:
            yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        yield from (ast.BoolOp(node.op, [*node.values[:at], *node.values[at + 1 :]]) for at in range(len(node.values)))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield ast.comprehension(node.target, node.iter, [], node.is_async)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield None


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of every node inside a function's body, annotations left out."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for statement in function.body:
            for parent in ast.walk(statement):
                yield from _children(parent)
        yield from ((function, "body", at) for at in range(len(function.body)))


def _children(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns") or isinstance(parent, ast.Raise):
            continue
        if isinstance(value, list):
            yield from ((parent, field, at) for at, item in enumerate(value) if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST):
            yield parent, field, None


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    source = ast.parse((ROOT / "kbsync" / f"{module}.py").read_text(encoding="utf-8"))
    count = len(list(places(source)))
    found: list[Mutant] = []
    for index in range(count):
        parent, field, at = list(places(source))[index]
        node = getattr(parent, field) if at is None else getattr(parent, field)[at]
        for choice in range(len(list(changes(node)))):
            tree = copy.deepcopy(source)
            parent, field, at = list(places(tree))[index]
            old = getattr(parent, field) if at is None else getattr(parent, field)[at]
            new = list(changes(old))[choice] or ast.Pass()
            before, after = ast.unparse(old), ast.unparse(new)
            if isinstance(old, ast.If):
                before, after = (f"if {ast.unparse(one.test)}" for one in (old, new) if isinstance(one, ast.If))
            if at is None:
                setattr(parent, field, new)
            else:
                getattr(parent, field)[at] = new
            line = getattr(old, "lineno", getattr(parent, "lineno", 0))
            found.append(Mutant(module, len(found), line, before, after, ast.fix_missing_locations(tree)))
    return found


def survives(mutant: Mutant | None, which: str) -> bool:
    """Whether the tests pass with the mutant (None: the original) in the place of its module."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os._exit(_run(mutant, which))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _run(mutant: Mutant | None, which: str) -> int:
    import pytest

    if mutant is not None:
        name = f"kbsync.{mutant.module}"
        module = ModuleType(name)
        module.__file__ = str(ROOT / "kbsync" / f"{mutant.module}.py")
        sys.modules[name] = module
        setattr(importlib.import_module("kbsync"), mutant.module, module)
        try:
            exec(compile(mutant.tree, module.__file__, "exec"), module.__dict__)  # noqa: S102 - our own source, changed
        except Exception:
            return 1
    options = ["-x", "-q", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*options, "-k", which, *TESTS]))


def judged(mutant: Mutant) -> bool:
    """Whether a mutant survives examples and properties."""
    return survives(mutant, f"not ({PROPERTIES})") and survives(mutant, PROPERTIES)


def main(arguments: list[str]) -> int:
    """Print the survivors and the counts."""
    os.chdir(ROOT)
    for name in ("pydantic", "kbsync.facts", "kbsync.policy"):
        importlib.import_module(name)
    if not survives(None, f"not ({PROPERTIES})"):
        sys.stderr.write("the tests fail without any mutant\n")
        return 1
    chosen = [one for module in MODULES if module in (arguments[:1] or MODULES) for one in mutants(module)]
    if numbers := {int(text) for text in arguments[1:]}:
        chosen = [one for one in chosen if one.number in numbers]
    start = time.monotonic()
    survivors = excused = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, lives in zip(chosen, pool.map(judged, chosen), strict=True):
            if lives:
                survivors += 1
                excused += mutant.name in EQUIVALENT
                _say(f"{mutant.module}.py:{mutant.line} #{mutant.number}: {mutant.before}  ->  {mutant.after}")
                _say(f"    {EQUIVALENT.get(mutant.name, 'SURVIVES')}")
    seconds = time.monotonic() - start
    _say(f"{len(chosen)} mutants, {len(chosen) - survivors} killed, {excused} equivalent, {seconds:.0f} s")
    return 0 if excused == survivors else 1


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
