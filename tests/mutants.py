"""Mutation check of the decisions: each small defect put into one of their functions must fail a test.

    python -m tests.mutants                 # all of them; exits 1 where one survives that is not excused
    python -m tests.mutants weigh 3 17      # the mutants 3 and 17 of one module

A mutant is one change of the syntax tree: a comparison turned or made strict, `and` for `or`, an operand left out, a
condition negated or dropped, a number one larger, `+` for `-`, the branches of a conditional expression exchanged, a
statement left out. The tests are collected once. Each mutant gets a forked process, in which its code takes the place
of the function's; that runs the module's tests up to the first that fails, examples before properties. The properties
are always tried with the same examples. What no test could tell from the original is listed in EQUIVALENT.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import inspect
import mmap
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import pytest

ROOT = Path(__file__).parents[1]
PURE = ("test_resolve.py", "test_plan.py")
TESTS = {
    "weigh": PURE,
    "resolve": PURE,
    "plan": PURE,
    "culprits": ("test_culprits.py",),
    "bisect": ("test_bisect_search.py",),
    "recheck": ("test_recheck_plan.py",),
    "intake": ("test_intake.py",),
    "ledger.scope": ("test_intake.py",),
}
"""The test files that must notice a defect, by module. Those of the ledger run on SQLite."""
EXAMPLES = 30
"""What each property is tried with: a defect that it takes more to find deserves an example of its own."""
SECONDS = 60
"""CPU time after which a mutant is taken to loop, and is killed by that."""
MEMORY = 4 << 30
"""Bytes of address space that a mutant may take before it is killed by that."""
ASKED = "_hypothesis_internal_use_settings"
"""Where hypothesis keeps the settings of a property. It has no public way to change them."""
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
OPPOSITE: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
EQUIVALENT: dict[str, str] = {
    "weigh: len(confirmed) < len(said) -> len(confirmed) <= len(said)": "where all is confirmed both verdicts are one",
    "weigh: 6 -> 7": "the weekday follows from the date",
    "resolve: key in before and before[key].status == 'withdrawn' -> key in before": "a live one is chosen already, or "
    "contradicts a fixed one",
    "plan: not current and known and (want.request.digest in known) -> not current and want.request.digest in known": (
        "spares the digest where nothing is known"
    ),
    "bisect: bool | None -> bool & None": "an annotation",
    "bisect: index > self.good -> index >= self.good": "the good one does not answer wrong",
    "recheck: stage * math.log(self.factor) >= math.log(self.longest / self.first) -> "
    "stage * math.log(self.factor) > math.log(self.longest / self.first)": "where they are equal both give the longest",
    "plan: count - limit > 1e-06 -> count - limit >= 1e-06": "counts and shares do not differ by just the tolerance",
}
"""Mutants that nothing can tell from the original, by module and change, with the reason."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: where, what it was, what it is, and the code of the function with it."""

    module: str
    number: int
    function: str
    line: int
    before: str
    after: str
    code: CodeType

    @property
    def name(self) -> str:
        """Stable while the changed piece says the same."""
        return f"{self.module}: {self.before} -> {self.after}"

    def take_effect(self) -> None:
        """Put the code in the place of the function's, in this process."""
        found: object = importlib.import_module(f"kbsync.{self.module}")
        for name in self.function.split("."):
            found = inspect.getattr_static(found, name)
        found = found.fget if isinstance(found, property) else found
        assert isinstance(found, FunctionType), self.function
        found.__code__ = self.code


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in TURNED[type(node.ops[0])]:
            yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for at in range(len(node.values)):
            left = [*node.values[:at], *node.values[at + 1 :]]
            yield ast.BoolOp(node.op, left) if len(left) > 1 else left[0]
    elif isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
        yield ast.BinOp(node.left, OPPOSITE[type(node.op)](), node.right)
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
    elif isinstance(node, (ast.AugAssign, ast.Delete)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


def places(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of every node in a function's body, annotations and raised errors left out."""
    yield from ((function, "body", at) for at in range(len(function.body)))
    for statement in function.body:
        for parent in ast.walk(statement):
            yield from _children(parent)


def _children(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns") or isinstance(parent, ast.Raise):
            continue
        if isinstance(value, list):
            yield from ((parent, field, at) for at, item in enumerate(value) if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST):
            yield parent, field, None


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module and the methods of its classes, by qualified name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{one.name}", one) for one in node.body if isinstance(one, ast.FunctionDef))


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module, function by function."""
    path = ROOT / "kbsync" / f"{module.replace('.', '/')}.py"
    found: list[Mutant] = []
    for name, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
        for parent, field, at in list(places(function)):
            old = getattr(parent, field) if at is None else getattr(parent, field)[at]
            for new in changes(old):
                before, after = (_text(one) for one in (old, new))
                line = getattr(old, "lineno", getattr(parent, "lineno", function.lineno))
                _put(parent, field, at, new)
                found.append(Mutant(module, len(found), name, line, before, after, _compiled(function, path)))
                _put(parent, field, at, old)
    return found


def _text(node: ast.AST) -> str:
    return f"if {ast.unparse(node.test)}" if isinstance(node, ast.If) else ast.unparse(node).strip()


def _put(parent: ast.AST, field: str, at: int | None, node: ast.AST) -> None:
    if at is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[at] = node


def _compiled(function: ast.FunctionDef, path: Path) -> CodeType:
    tree = ast.fix_missing_locations(ast.Module([function], []))
    code = compile(tree, str(path), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    return next(one for one in code.co_consts if isinstance(one, CodeType) and one.co_name == function.name)


class Check:
    """A pytest plugin that, in the place of running the tests once, runs them against each mutant."""

    def __init__(self, chosen: list[Mutant]) -> None:
        self.chosen = chosen
        self.made: Counter[str] = Counter(one.module for one in chosen)
        self.excused: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """The same examples each time; one that fails is enough and is not made smaller."""
        from hypothesis import Phase, settings  # not before pytest has seen to its plugin

        few = {"max_examples": EXAMPLES, "derandomize": True, "database": None}
        settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), **few)
        settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Every mutant against the tests of its module."""
        items = {module: _ordered(session.items, files) for module, files in TESTS.items()}
        for module in self.made:
            if _fails(session, items[module], None):
                raise pytest.UsageError(f"the tests of {module} fail without any mutant")
        for done, mutant in enumerate(self.chosen):
            _progress(f"{done} of {len(self.chosen)}  {mutant.module} #{mutant.number}")
            if not _fails(session, items[mutant.module], mutant):
                self._lives(mutant)
        _progress("")
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Few examples for the properties that ask for many."""
        from hypothesis import settings

        for item in items:
            function, machine = getattr(item, "obj", None), getattr(item, "cls", None)
            for owner, name in ((function, ASKED), (machine, "settings")):
                if asked := getattr(owner, name, None):
                    setattr(owner, name, settings(asked, max_examples=EXAMPLES))

    def _lives(self, mutant: Mutant) -> None:
        excuse = EQUIVALENT.get(mutant.name)
        (self.survived if excuse is None else self.excused)[mutant.module] += 1
        if excuse is None:
            where = f"{mutant.module} #{mutant.number} line {mutant.line}, {mutant.function}"
            _say(f"SURVIVES {where}: {mutant.before}  ->  {mutant.after}")


def _ordered(items: Iterable[pytest.Item], files: tuple[str, ...]) -> list[pytest.Item]:
    """The tests of some files, properties last: those that hypothesis runs, or that draw examples within."""
    mine = [item for item in items if item.path.name in files]
    return sorted(mine, key=lambda item: "hypothesis" in item.keywords or "may_have_changed" in item.name)


def _fails(session: pytest.Session, items: list[pytest.Item], mutant: Mutant | None) -> bool:
    """Whether a test fails with the mutant (None: the original). That test is tried first with the next one."""
    running = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        if mutant is not None:
            mutant.take_effect()
        os._exit(_run(session, items, running))
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    if failed:
        items.insert(0, items.pop(int.from_bytes(running[:8], "little")))
    return failed


def _run(session: pytest.Session, items: list[pytest.Item], running: mmap.mmap) -> int:
    with suppress(BaseException):  # a child must never get into the parent's loop
        for at, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
            running[:8] = at.to_bytes(8, "little")
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return 1
        return 0
    return 1


def main(arguments: list[str]) -> int:
    """Print the survivors, and for each module how many mutants were made, killed and excused."""
    os.chdir(ROOT)
    modules = [module for module in TESTS if module in (arguments[:1] or TESTS)]
    chosen = [one for module in modules for one in mutants(module)]
    if numbers := {int(text) for text in arguments[1:]}:
        chosen = [one for one in chosen if one.number in numbers]
    files = sorted({f"tests/{name}" for module in modules for name in TESTS[module]})
    check, start = Check(chosen), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plugins = [f"-pno:{name}" for name in ("cacheprovider", "xdist", "terminal", "faulthandler")]
        options = ["-s", f"--basetemp={folder}/tests", "-oaddopts=", "-otimeout=0", "--import-mode=importlib"]
        code = pytest.main([*plugins, *options, "-k", "not postgresql", *files], plugins=[check])
    if code:
        return int(code)
    for module, made in check.made.items():
        excused, survived = check.excused[module], check.survived[module]
        killed = made - excused - survived
        _say(f"{module}: {made} mutants, {killed} killed, {excused} equivalent, {survived} survive")
    _say(f"{time.monotonic() - start:.0f} s")
    return 1 if check.survived else 0


def _say(line: str) -> None:
    _progress("")
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
