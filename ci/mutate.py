"""Mutations: `python3 ci/mutate.py` breaks one line at a time and reports which breaks no test notices.

`ci/mutations.txt` is the list: a mutation is a file, the line as it is, the line as it is broken, and the
tests that must fail. `--sample N` runs N of them (others each day; `--seed` repeats one), `--file TEXT` those of
files with this in their path, `--propose FILE...` prints candidates for the list. Exit status 1: one survived that the
list does not explain, or the list no longer fits the code. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from environment import CannotBuild, environment
from jobs import ROOT, jobs

LIST = ROOT / "ci" / "mutations.txt"
_SECONDS = 300


@dataclass(frozen=True)
class Mutation:
    """One line broken.

    Attributes:
        job: in whose environment its tests run.
        tests: arguments of pytest.
        file: relative to the repository.
        old: the line as it is, without indentation; it occurs once, or `number` says which is meant.
        new: the line as it is broken.
        number: which of several equal lines, from 1.
        survives: why no test can notice it (empty: one must).
    """

    job: str
    tests: str
    file: str
    old: str
    new: str
    number: int = 1
    survives: str = ""

    def applied(self, source: str) -> str:
        """Return the file's text with the line broken.

        Raises:
            ValueError: the line is not there.
        """
        lines = source.splitlines(keepends=True)
        places = [i for i, line in enumerate(lines) if line.strip() == self.old]
        if len(places) < self.number:
            raise ValueError(f"{self.file} no longer has the line {self.old!r}")
        i = places[self.number - 1]
        lines[i] = lines[i].replace(self.old, self.new)
        return "".join(lines)

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} as {self.new!r}"


def read(text: str) -> Iterator[Mutation]:
    """Yield the mutations of a list: `@ job | tests`, then `file`, `< old`, `> new`, `#2` (which), `? explanation`."""
    job = tests = file = old = new = survives = ""
    number = 1
    for line in [*text.splitlines(), "@ end"]:
        mark, rest = line[:2], line[2:].strip()
        if (mark in ("< ", "@ ", "= ")) and new:
            yield Mutation(job, tests, file, old, new, number, survives)
            new, survives, number = "", "", 1
        if mark == "@ ":
            job, _, tests = (part.strip() for part in rest.partition("|"))
        elif mark == "= ":
            file = rest
        elif mark == "< ":
            old = rest
        elif mark == "> ":
            new = rest
        elif mark == "? ":
            survives = rest
        elif mark.startswith("#") and line[1:].strip().isdecimal():
            number = int(line[1:])


def copy_of_the_tree(folder: Path) -> None:
    """Copy what git tracks, and what it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def run_tests(python: Path, tests: str, tree: Path) -> tuple[int, str]:
    """Run tests of a copy of the tree; return pytest's exit status and the end of its output."""
    paths = [tree, *sorted(path for path in (tree / "platforms").iterdir() if path.is_dir())]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CONFORMANCE_SEED": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tree / ".hypothesis"),
    }
    command = f'"{python}" -m pytest -q -x -p no:cacheprovider --no-header --tb=line {tests}'
    try:
        done = subprocess.run(
            command, shell=True, cwd=tree, env=environ, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no end within {_SECONDS} s"
    return done.returncode, (done.stdout + done.stderr)[-1500:]


def judge(mutation: Mutation, python: Path, tree: Path) -> str:
    """Return "killed", "SURVIVED", "survived, as explained" or what is wrong with the list."""
    file = tree / mutation.file
    source = file.read_text(encoding="utf-8")
    try:
        broken = mutation.applied(source)
        ast.parse(broken)
    except (ValueError, SyntaxError) as error:
        return f"STALE: {error}"
    file.write_text(broken, encoding="utf-8")
    try:
        code, output = run_tests(python, mutation.tests, tree)
    finally:
        file.write_text(source, encoding="utf-8")
    if code == 5:
        return f"STALE: no tests were found: {output[-200:]}"
    if code:
        return "killed"
    return "survived, as explained" if mutation.survives else "SURVIVED"


def chosen(options: argparse.Namespace) -> list[Mutation]:
    """Return which mutations are run."""
    mutations = [m for m in read(LIST.read_text(encoding="utf-8")) if not options.file or options.file in m.file]
    mutations = [m for m in mutations if not options.job or m.job in options.job]
    if options.sample:
        seed = options.seed or int(datetime.date.today().strftime("%Y%m%d"))
        print(f"a sample of {options.sample} of {len(mutations)}: --seed {seed}")
        candidates = [m for m in mutations if not m.survives]
        mutations = random.Random(seed).sample(candidates, min(options.sample, len(candidates)))
    return mutations


def main() -> int:
    """Run the mutations and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many, drawn by --seed")
    parser.add_argument("--seed", type=int, help="of the sample (today's date)")
    parser.add_argument("--file", help="only files with this in their path")
    parser.add_argument("--job", action="append", help="only tests of this job (repeatable)")
    parser.add_argument("--workers", type=int, default=2, help="mutations at a time")
    parser.add_argument("--propose", nargs="*", metavar="FILE", help="print candidates for the list")
    options = parser.parse_args()
    if options.propose is not None:
        for name in options.propose:
            print("\n".join(propose(name)))
        return 0
    mutations = chosen(options)
    pythons = {}
    try:
        for job in jobs():
            if any(m.job == job.name for m in mutations):
                pythons[job.name] = environment(job, lambda text: print(text, file=sys.stderr)).absolute()
    except CannotBuild as error:
        print(error)
        return 1
    shares = [mutations[i :: options.workers] for i in range(options.workers)]
    with ThreadPoolExecutor(options.workers) as pool:
        results = [pair for share in pool.map(lambda share: _run(share, pythons), shares) for pair in share]
    states = [state.partition(":")[0] for _, state in results]
    for state in sorted(set(states)):
        print(f"{states.count(state)} {state}")
    return 1 if any(state in ("SURVIVED", "STALE") for state in states) else 0


def _run(mutations: list[Mutation], pythons: dict[str, Path]) -> list[tuple[Mutation, str]]:
    """Run some mutations one after the other in a copy of the tree of their own."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_tree(Path(folder))
        sound: dict[str, str] = {}
        for mutation in mutations:
            if mutation.tests not in sound:
                code, output = run_tests(pythons[mutation.job], mutation.tests, Path(folder))
                sound[mutation.tests] = "" if code == 0 else f"STALE: its tests fail unbroken: {output[-600:]}"
            state = sound[mutation.tests] or judge(mutation, pythons[mutation.job], Path(folder))
            print(f"{state}: {mutation}", flush=True)
            results.append((mutation, state))
    return results


_SWAPS: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "//", ast.And: "or", ast.Or: "and",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
_TOKENS: dict[type[ast.AST], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.And: "and", ast.Or: "or",
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not",
}  # fmt: skip


def propose(name: str) -> Iterator[str]:
    """Yield candidates of a file, in the list's own form: one operator swapped, or one condition turned round."""
    source = (ROOT / name).read_text(encoding="utf-8")
    lines = source.splitlines()
    yield f"= {name}"
    seen = set()
    for node in ast.walk(ast.parse(source)):
        pairs: list[tuple[ast.AST, ast.expr, ast.expr]] = []
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            pairs = [(node.ops[0], node.left, node.comparators[0])]
        elif isinstance(node, ast.BinOp):
            pairs = [(node.op, node.left, node.right)]
        elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
            pairs = [(node.op, node.values[0], node.values[1])]
        for operator, left, right in pairs:
            if type(operator) not in _SWAPS or left.end_lineno != right.lineno or left.end_col_offset is None:
                continue
            line, at = lines[right.lineno - 1], left.lineno
            if left.lineno != right.lineno:
                continue
            middle = line[left.end_col_offset : right.col_offset]
            token, other = _TOKENS[type(operator)], _SWAPS[type(operator)]
            if token not in middle or not line.isascii() or (at, left.end_col_offset) in seen:
                continue
            seen.add((at, left.end_col_offset))
            broken = line[: left.end_col_offset] + middle.replace(token, other) + line[right.col_offset :]
            number = sum(other_line.strip() == line.strip() for other_line in lines[:at])
            yield f"< {line.strip()}"
            yield f"> {broken.strip()}"
            if number > 1:
                yield f"#{number}"


if __name__ == "__main__":
    sys.exit(main())
