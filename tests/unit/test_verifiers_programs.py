"""Programs that other judges accept are accepted, and a program can neither read its tests nor forge its verdict."""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest

from megatron_fipo.verifiers import sandbox
from megatron_fipo.verifiers.code import verify
from megatron_fipo.verifiers.code_blocks import extract_program
from megatron_fipo.verifiers.code_output import same_output, same_result
from megatron_fipo.verifiers.code_reference import check_reference, read_reference
from megatron_fipo.verifiers.cpu_limit import CpuLimitError, cpu_limit
from megatron_fipo.verifiers.sandbox import Limits, Outcome, run_python
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob

FENCE = "```"
LIMITS = Limits(wall_s=60.0)
SUM_OF_LINE = {"inputs": ["3\n1 2 3\n"], "outputs": ["6\n"]}
SQUARE = {"tests": "assert f(2) == 4\nassert f(3) == 9"}
RIGHT_SUM = "n = int(input())\nprint(sum(map(int, input().split())))"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
        reason="programs are judged on Linux, x86_64 and aarch64, only",
    ),
]


def block(code: str, language: str = "python", fence: str = FENCE) -> str:
    return f"{fence}{language}\n{code}\n{fence}\n"


def judge(response: str, reference: Any) -> Verdict:
    verdict = verify.judge(VerifierJob("code", response, reference), 75.0)
    assert not verdict.error
    return verdict


def run(program: str, **settings: Any) -> Outcome:
    return run_python(program, limits=settings.pop("limits", LIMITS), **settings)


# ------------------------------------------------------------------------------------------ which block is the program

DOCSTRING = """def f(x):
    '''Squares.

    ```
    f(2)
    ```
    ```python
    f(3)
    ```
    '''
    return x * x"""


@pytest.mark.parametrize(
    ("response", "program"),
    [
        *[
            (block("a = f(1)") + "So:\n" + block(text, language), "a = f(1)")
            for text, language in (
                ("6", ""),
                ("O(n log n)", ""),
                ("x = 1\ny = 2", ""),
                ("YES\nNO", ""),
                ("The sum is 6.", ""),
                ("python solution.py < in.txt", "bash"),
                ("$ python3 solution.py", ""),
                ("int main() { return 0; }", "cpp"),
                ("x = f(2)", "text"),
                ("# Heading", "markdown"),
                ("[1, 2]", "output"),
                ('{"a": 1}', "json"),
            )
        ],
        *[
            (block("old()", "python") + block("a = 1", language), "a = 1")
            for language in (
                "py",
                "Python",
                "python3",
                "PYTHON",
                "Python 3",
                "python3.11",
                "pypy3",
                "{.python}",
                "py:x.py",
            )
        ],
        (block("old()") + block("print(2)", ""), "print(2)"),  # no language, but it does more than name a value
        (block("old()") + block("import sys\nprint(2)", ""), "import sys\nprint(2)"),
        (block("a = 1", "python", "````"), "a = 1"),
        (block("a = 1", "python", "~~~"), "a = 1"),
        (block("a = '''\n```\n'''", "python", "````"), "a = '''\n```\n'''"),
        (block("a = 1").replace("\n", "\r\n"), "a = 1"),
        (block(DOCSTRING) + "It squares.", DOCSTRING),
        (block(DOCSTRING) + block("4", ""), DOCSTRING),
        (block("def f(:\n  ```", "python") + "no Python", "def f(:"),
        ("Here it is: ```python\na = 1\n```\n", "a = 1"),
        ("```cpp\nint a;\n```", "int a;"),  # the only block
        ("```\n6\n```", "6"),
        (block("a = 1") + "```python\nb = 2", "a = 1"),
        ("```python\nb = 2", "b = 2"),
        ("```python\nb = 2```\nThat is it.", "b = 2"),
        ("```python\nb = '''```\n'''", "b = '''```\n'''"),
        ("> So:\n> ```python\n> if a:\n>     b = 2\n> ```\n> Done", "if a:\n    b = 2"),
        ("\ufeffb = 2", "b = 2"),
        ("<think>\nhm\n</think>\n<answer>\nb = 2\n</answer>", "b = 2"),
        ("[BEGIN]\nb = 2\n[DONE]\nmore", "b = 2"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_block_of_python(response: str, program: str) -> None:
    assert extract_program(response) == program


@pytest.mark.parametrize(
    "text",
    [
        "~" * 200_000 + "`",
        "`" * 200_000,
        "a" * 200_000,
        "a```" * 50_000,
        " " * 200_000,
        "```python\n)\n" * 15_000,
        "```python\n" * 20_000,
        "```\n~~~\n" * 25_000,
        "```python\n" + "x = (\n```\n" * 20_000,
        ("```python\n" + "x = [1, 2, 3]\n" * 3500 + ")\n```\n") * 4,
        "```python\n" + "(" * 100_000,
    ],
)
def test_a_hostile_response_does_not_keep_the_judge_busy(text: str) -> None:
    """Searches in quadratic time would take minutes for these."""
    with cpu_limit(10.0):
        extract_program(text, ["f"])
        extract_program(text + "\n", reads_input=True)


def test_what_keeps_the_judge_busy_is_noticed() -> None:
    """Negative control of the test above."""

    def search_for_ever() -> None:
        with cpu_limit(0.1):
            while True:
                pass

    with pytest.raises(CpuLimitError):
        search_for_ever()


def test_of_several_blocks_the_one_that_serves_the_problem_is_taken() -> None:
    defines, example = "def f(x):\n    return x * x", "print(f(3))\nassert f(2) == 4"
    assert extract_program(block(defines) + block(example), ["f"]) == defines
    assert extract_program(block(defines) + block(example)) == example  # control: without a name, the last block
    corrected = "f = lambda x: x ** 2"
    assert extract_program(block(defines) + block(corrected) + block(example), ["f"]) == corrected
    method = "class Solution:\n    def f(self, x):\n        return x"
    assert extract_program(block(method) + block("Solution().f(3)"), ["f"]) == method
    snippet = "best = max(best, total)"
    assert extract_program(block(RIGHT_SUM) + block(snippet), reads_input=True) == RIGHT_SUM
    assert extract_program(block("print(5)") + block(snippet), reads_input=True) == "print(5)"
    assert extract_program(block(snippet) + block("x = 2"), reads_input=True) == "x = 2"
    body = "    return x * x"
    assert extract_program(block(body, "") + block("4", ""), prompt="def f(x):\n") == body
    assert judge(block(defines) + block(example), SQUARE).correct
    assert judge(block("def f(x): return x") + block(defines), SQUARE).correct
    assert not judge(block(defines) + block("def f(x): return x"), SQUARE).correct
    assert judge(block(defines) + block("from solution import f\nassert f(2) == 4"), SQUARE).correct
    assert extract_program(block("from math import gcd") + block("print(1)"), ["gcd"]) == "from math import gcd"


# ------------------------------------------------------------------------------------------------------ as plain Python

PRINTS_6 = [
    "import resource\nhard = resource.getrlimit(resource.RLIMIT_STACK)[1]\n"
    "resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))\nprint(6)",
    "def f(n): return n and f(n - 1)\nf(40000)\nprint(6)",
    *[
        f"{RIGHT_SUM}\n{end}"
        for end in ("exit()", "quit()", "exit(0)", "import sys; sys.exit()", "raise SystemExit", "quit(None)")
    ],
    "if int(input()) == 3:\n    print(6)\n    exit()\nprint(7)",
    "def main():\n    print(6)\n    exit()\nif __name__ == '__main__':\n    main()",
    *[
        f"import asyncio, sys, os, fileinput, io, pathlib\ntext = {text}\nprint(sum(map(int, text.split()[1:])))"
        for text in (
            "open('/dev/stdin').read()",
            "open('/proc/self/fd/0').read()",
            "open('/dev/fd/0', 'rb').read()",
            "pathlib.Path('/dev/stdin').read_text()",
            "open(0).read()",
            "os.read(0, os.fstat(0).st_size)",
            "io.BytesIO(os.read(0, os.fstat(0).st_size)).read()",
            "sys.stdin.buffer.read()",
            "''.join(fileinput.input())",
            "''.join(iter(sys.stdin.readline, ''))",
            "__import__('mmap').mmap(0, 0, prot=1).read()",
        )
    ],
    "open('/dev/null', 'w').write('x')\nprint(6)",
    "import os\nos.write(os.open(os.devnull, os.O_WRONLY), b'x')\nassert open(os.devnull).read() == ''\nprint(6)",
    "import os, sys\n"
    "sys.stderr = open(os.devnull, 'w')\n"
    "print('x', file=sys.stderr)\n"
    "open('/dev/stdout', 'w').write('6')",
    "print('debug', file=open('/dev/stderr', 'w'))\nopen('/proc/self/fd/1', 'w').write('6')",
    "import asyncio\nasync def main(): print(6)\nasyncio.run(main())",
    "import asyncio\nasync def main(): return 6\nprint(asyncio.new_event_loop().run_until_complete(main()))",
    "import asyncio\nasync def f(n):\n    await asyncio.sleep(0.001)\n    return n\n"
    "async def main(): print(sum(await asyncio.gather(f(1), f(2), asyncio.to_thread(int, 3))))\n"
    "asyncio.run(main())",
    "import socket\na, b = socket.socketpair()\na.sendall(b'6')\nprint(b.recv(9).decode())",
    "import os\nr, w = os.pipe()\nos.write(w, b'6')\nprint(os.read(r, 9).decode())",
    "from concurrent.futures import ThreadPoolExecutor\nprint(sum(ThreadPoolExecutor(64).map(int, ['1'] * 6)))",
    "import threading\nthreads = [threading.Thread(target=print, args=(6,)) for _ in range(1)]\n"
    "many = [threading.Thread(target=threading.Event().wait, args=(0.01,)) for _ in range(100)]\n"
    "[t.start() for t in many + threads]\n[t.join() for t in many]",
    "from dataclasses import dataclass, field\n@dataclass(order=True)\nclass P:\n    x: int\n"
    "    y: list = field(default_factory=list)\nprint(max(P(6), P(5)).x)",
    "import pickle, copy\nclass A:\n    x = 6\nprint(pickle.loads(pickle.dumps(copy.deepcopy(A()))).x)",
    "def g(a: int): pass\nassert g.__annotations__ == {'a': int}\nprint(6)",
    "from __future__ import annotations\ndef g(a: int): pass\nassert g.__annotations__ == {'a': 'int'}\nprint(6)",
    "import typing\nclass A(typing.NamedTuple):\n    x: int\nassert typing.get_type_hints(A) == {'x': int}\nprint(6)",
    "import inspect\ndef g():\n    return 1\nassert 'return 1' in inspect.getsource(g)\nprint(6)",
    "import enum\nclass E(enum.Enum):\n    A = 6\nprint(E.A.value, __file__[:0])",
    "x: int = 6\nassert __annotations__ == {'x': int}\nprint(x)",
    "a = List[int] if True else 0\nq = deque([gcd(12, 18)])\nheapify(h := [6])\nprint(min(q[0], heappop(h), inf))",
    "import sys\nassert sys.modules['__main__'].x == 6 if 'x' in globals() else True\nx = 6\nprint(x)",
]


@pytest.mark.parametrize("program", PRINTS_6)
def test_programs_run_as_in_plain_python(program: str) -> None:
    assert judge(program, SUM_OF_LINE).correct


@pytest.mark.parametrize(
    "end", ["exit(1)", "import sys; sys.exit('text')", "raise SystemExit(2)", "quit(True)", "1 / 0"]
)
def test_an_exit_code_is_a_failure_as_for_judges(end: str) -> None:
    assert not judge(f"{RIGHT_SUM}\n{end}", SUM_OF_LINE).correct


def test_an_unknown_name_stays_unknown() -> None:
    assert not judge("print(gdc(12, 18))", SUM_OF_LINE).correct
    assert not judge("def f(x): return gcd(x, x) * x", SQUARE).correct  # HumanEval and MBPP provide no imports


def test_the_output_limit_follows_the_reference() -> None:
    lines = "\n".join(map(str, range(180_000)))
    program = "print('\\n'.join(map(str, range(180_000))))"
    assert judge(program, {"inputs": ["1"], "outputs": [lines]}).correct
    assert not judge(program, {"inputs": ["1"], "outputs": ["1"]}).correct
    assert judge("print('a' * 1_200_000)", {"inputs": ["1"], "outputs": ["a" * 1_200_000]}).correct
    assert judge(
        "def f(n): return list(range(n))",
        {"fn_name": "f", "inputs": ["300000"], "outputs": [json.dumps([*range(300_000)])]},
    ).correct


# ------------------------------------------------------------------------------------------- references and calls

ADD = "def add(a, b):\n    return a + b"
METHOD = "class Solution:\n    def add(self, a: int, b: int) -> Optional[int]:\n        return a + b"


@pytest.mark.parametrize(
    ("program", "reference", "correct"),
    [
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}, True),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}, True),
        (ADD, {"fn_name": "add", "inputs": ["1\n2", "3\n4\n"], "outputs": ["3", "7"]}, True),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [8]]}, False),
        (ADD, {"fn_name": "sub", "inputs": [[1, 2]], "outputs": [[3]]}, False),
        (ADD, {"fn_name": "add", "inputs": [[[1], [2]], [[], [3]]], "outputs": [[1, 2], [3]]}, True),
        (ADD, {"fn_name": "add", "inputs": [["a", "b"]], "outputs": [["ab"]]}, True),
        (ADD, {"fn_name": "add", "inputs": ['"a"\n"b"'], "outputs": ['"ab"']}, True),
        (ADD, {"fn_name": "add", "inputs": ["[1]\n[2]"], "outputs": ["[1, 2]"]}, True),
        ("def add(a, b): return 3", {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["[3]"]}, False),
        (METHOD, {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}, True),
        (METHOD, {"fn_name": "Solution.add", "inputs": [[1, 2]], "outputs": [3]}, True),
        (
            "class Solution:\n    def __init__(self): self.seen = []\n"
            "    def f(self, x):\n        self.seen.append(x)\n        return self.seen",
            {"fn_name": "f", "inputs": ["1", "2"], "outputs": ["[1]", "[2]"]},
            True,
        ),
        ("def f(x): return (x, (x,))", {"fn_name": "f", "inputs": ["1"], "outputs": ["[1, [1]]"]}, True),
        ("def f(x): return {x: 2}", {"fn_name": "f", "inputs": ["1"], "outputs": ['{"1": 2}']}, True),
        ("def f(x): return {x}", {"fn_name": "f", "inputs": ["1"], "outputs": ["[1]"]}, False),
        ("async def f(x): return x", {"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}, True),
        ("def f(x): return x + 0.1", {"fn_name": "f", "inputs": ["0.2"], "outputs": ["0.3"]}, False),
        ("def f(x): return x + 0.1", {"fn_name": "f", "inputs": ["0.2"], "outputs": ["0.3"], "tolerance": 1e-9}, True),
        ("def f(x):\n    print('x')\n    return x", {"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}, True),
        (ADD, {"cases": [{"input": "1\n" "2", "output": "3", "testtype": "functional"}], "fn_name": "add"}, True),
        (ADD, {"public_test_cases": '[{"input": "1\\n2", "output": "3", "testtype": "functional"}]',
               "metadata": '{"func_name": "add"}'}, True),
        (RIGHT_SUM, [{"input": "3\n1 2 3\n", "output": "6\n", "testtype": "stdin"}], True),
        (RIGHT_SUM, [{"input": "3\n1 2 3\n", "output": "7\n", "testtype": "stdin"}], False),
        (RIGHT_SUM, {"input_output": json.dumps(SUM_OF_LINE)}, True),
        (RIGHT_SUM, {"inputs": [["3", "1 2 3"]], "outputs": [["6"]], "fn_name": None}, True),
        ("print(0.1 + 0.2)", {"inputs": [""], "outputs": ["0.3"], "tolerance": 1e-6}, True),
        ("print(0.1 + 0.2)", {"inputs": [""], "outputs": ["0.3"]}, False),
    ],
)  # fmt: skip
def test_references_as_data_sets_have_them(program: str, reference: Any, correct: bool) -> None:
    assert judge(block(program), reference).correct is correct
    check_reference(reference)
    assert read_reference(json.dumps(reference)) == read_reference(reference)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ({"fn_name": "f", "inputs": [7], "outputs": [1]}, r"input 1 .* is the list of the call's arguments.*\[7\]"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}, r"input 1 .* JSON, got 'x'"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["x"]}, "output 1 .* JSON"),
        ({"fn_name": "f(x)", "inputs": [[1]], "outputs": [1]}, "fn_name .* name of a function"),
        ({"inputs": [[1, 2]], "outputs": ["3"]}, "input 1 .* text or a list of lines.*fn_name"),
        ({"inputs": ["1"], "outputs": [[["6"]]]}, "output 1 .* text or a list of lines"),
        ({"inputs": ["1", "2"], "outputs": ["3"]}, "got 2 and 1"),
        ({"inputs": ["1"], "outputs": ["1"], "func_name": "f"}, "no key 'func_name'. Did you mean 'fn_name'"),
        ({"inputs": ["1"], "outputs": ["1"], "timeout": 3}, "no key 'timeout'"),
        ({"tests": "assert f()", "fn_name": "f"}, "no use for 'fn_name'"),
        ({"tests": "assert f(", "prompt": ""}, "are no Python"),
        ({"tests": "assert f()", "entry_point": "f"}, r"define check\(candidate\)"),
        ({"tests": [1]}, "text or a list of texts"),
        ([{"input": "1", "output": "2", "testtype": "functional"}], "need the function's name"),
        ([{"input": "1"}], "case 1 .* has input, output"),
        ({"cases": [{"input": "1", "output": "2", "testtype": "x"}]}, "stdin or functional"),
        ({"cases": [{"input": "1", "output": "2"}], "inputs": ["1"], "outputs": ["1"]}, "not both"),
        ({"private_test_cases": "eJxr"}, "compressed pickle"),
        ({"inputs": ["1"], "outputs": ["1"], "tolerance": -1}, "tolerance"),
        ({"inputs": ["1"], "outputs": ["1"], "tolerance": float("nan")}, "tolerance"),
        ("[" * 100_000, "is JSON"),
    ],
)
def test_references_that_nothing_can_pass_are_refused_with_a_remedy(reference: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_reference(reference)


def test_keys_that_are_null_count_as_absent() -> None:
    """In a table, every row has every column as a key."""
    rows = {"tests": None, "fn_name": None, "inputs": ["1"], "outputs": ["1"], "comment": None}
    assert read_reference(rows).outputs == ("1",)


@pytest.mark.parametrize(
    ("actual", "expected", "equal"),
    [
        ("3\n\n", "3", True), ("1 2 \n3", "1 2\n3\n", True), ("1\n2", "1 2", False), ("1  2", "1 2", True),
        ("2.0", "2", True), ("1e-09", "0.000000001", True), ("0.30000000000000004", "0.3", False), ("+1", "1", True),
        ("0101", "101", False), ("Case #1: 2.50", "Case #1: 2.5", True), ("YES", "yes", False), (".5", "0.5", True),
        (" *\n***", "*\n***", True), ("***\n *", "***\n*", False), ("# .", "#  .", False), ("a  b", "a b", True),
        ("nan", "nan", True), ("inf", "1", False), ("1_0", "10", False), ("1e999999", "1", False), ("", "0", False),
        ("٣", "3", False), ("-0", "0", True), ("1.", "1", True), (".", "0", False),
    ],
)  # fmt: skip
def test_equal_outputs(actual: str, expected: str, equal: bool) -> None:
    assert same_output(actual, expected) is equal


def test_tolerances() -> None:
    assert same_output("3.1415927", "3.14159265", 1e-6)
    assert not same_output("3.15", "3.14159265", 1e-6)
    assert same_output("1000000.5", "1000000", 1e-6)  # relative to the larger
    assert not same_output("1.5", "1", 1e-6)
    assert same_output("1e-999999", "0", 1e-6)
    assert not same_output("1e999999", "1e999998", 1e-6)
    assert same_result([1.0, {"a": 2.0000001}], [1, {"a": 2}], 1e-6)
    assert not same_result([1.0, {"a": 2.0000001}], [1, {"a": 2}])
    assert not same_result(float("inf"), 1, 1.0)


# ----------------------------------------------------------------------------------- tests that run beside the program

HONEST = {
    "what a decorator takes over": (
        "import functools\ndef f(g):\n    @functools.wraps(g)\n    def twice(*a): return 2 * g(*a)\n    return twice",
        "@f\ndef g(x):\n    'of g'\n    return x\nassert g(3) == 6 and (g.__name__, g.__doc__) == ('g', 'of g')",
    ),
    "a function's text": (
        "def f(a: int):\n    'squares'",
        "assert f.__doc__ == 'squares' and f.__annotations__ == {'a': int}",
    ),
    "generators that are awaited": (
        "async def f(n):\n    for i in range(n): yield i\nclass A:\n    async def __aenter__(self): return 5\n"
        "    async def __aexit__(self, *error): return error[0] is KeyError",
        "import asyncio\nasync def main():\n    g = f(9)\n    first = await g.__anext__()\n"
        "    async with A() as five: raise KeyError\n"
        "    return [first, five, await anext(g)] + [x async for x in f(2)]\n"
        "assert asyncio.run(main()) == [0, 5, 1, 0, 1]",
    ),
    "a with statement that takes an error": (
        "class A:\n    def __enter__(self): pass\n    def __exit__(self, kind, error, _): return error.args == (3,)",
        "with A(): raise ValueError(3)\ntry:\n    with A(): raise ValueError(4)\n"
        "except ValueError: pass\nelse: assert False",
    ),
    "one object, looked up or made once": (
        "import enum\nclass C(enum.Enum):\n    R = 1\nclass S:\n    it = None\n    def __new__(cls):\n"
        "        cls.it = cls.it or super().__new__(cls)\n        return cls.it",
        "assert C(1) is C.R\na = S()\nassert a is S() and isinstance(a, S)",
    ),
    "operators in place": (
        "class L:\n    def __init__(self): self.a = []\n    def __iadd__(self, x):\n        self.a.append(x)\n"
        "        return self",
        "a = b = L()\na += 5\nassert a is b and a.a == [5]",
    ),
    "a class that tests mean as one": (
        "class V:\n    def __init__(self, *x): self.x = x\n"
        "    def __mul__(self, n): return V(*(n * x for x in self.x))\n"
        "    def __eq__(self, o): return self.x == getattr(o, 'x', o)\n"
        "    def __add__(self, o): return V(*self.x, *o.x)",
        "assert V(1) + V(2) == V(1, 2)\nassert V(1) * 2 == V(2) and V(3) == (3,)",
    ),
    "texts": ("def f(x): return x[::-1]", "assert f('abc') == 'cba' and isinstance(f('a'), str)"),
    "plain values": (
        "def f(x): return x",
        "import collections, datetime, decimal, fractions\n"
        "for x in (1, -2**70, 0.1, True, None, '\\udc80é', b'\\xff', bytearray(b'a'), 1j, (1, (2,)), [[], [1]],\n"
        "          {1, 2},\n"
        "          frozenset({(1, 2)}), {'a': [1], 2: {3}}, range(1, 9, 2), ..., float('inf'), {}, (), set(),\n"
        "          collections.deque([1], 3), collections.Counter('aab'), collections.OrderedDict(a=1),\n"
        "          decimal.Decimal('1.10'), fractions.Fraction(1, 3), datetime.datetime(2020, 1, 2, 3),\n"
        "          datetime.date(2020, 1, 2),\n"
        "          datetime.timedelta(days=1, seconds=2), [None, True, 1.5, 'a'], int, len):\n"
        "    y = f(x)\n"
        "    assert y == x and type(y) is type(x), x\n"
        "assert f(float('nan')) != f(float('nan'))",
    ),
    "a list that is changed": (
        "def f(x):\n    x.sort()\n    x[0].append(9)",
        "a = [[2], [1]]\nb = a[1]\nassert f(a) is None\nassert a == [[1, 9], [2]] and b == [1, 9]",
    ),
    "the same list": ("def f(x): return [x, x]", "a = []\nb = f(a)\nassert b[0] is b[1] is a"),
    "a list that holds itself": ("def f():\n    a = []\n    a.append(a)\n    return a", "a = f()\nassert a[0] is a"),
    "exceptions": (
        "class Bad(ValueError):\n"
        "    def __init__(self, code):\n"
        "        super().__init__('bad', code)\n"
        "        self.code = code\n"
        "def f(x):\n    if x < 0: raise Bad(3)\n    return {}[x]",
        "try:\n"
        "    f(-1)\n"
        "    raise SystemError\n"
        "except Bad as e:\n"
        "    assert e.code == 3 and e.args == ('bad', 3)\n"
        "try:\n    f(-1)\n    raise SystemError\nexcept ValueError:\n    pass\n"
        "try:\n    f(5)\n    raise SystemError\nexcept KeyError as e:\n    assert e.args == (5,)",
    ),
    "unittest": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x * x",
        "import unittest\n"
        "class T(unittest.TestCase):\n"
        "    def test(self):\n"
        "        self.assertEqual(f(2), 4)\n"
        "        with self.assertRaisesRegex(ValueError, 'neg'): f(-1)\n"
        "if __name__ == '__main__':\n    unittest.main()",
    ),
    "a class": (
        "class Stack:\n"
        "    size = 0\n"
        "    def __init__(self, *items): self.items = list(items)\n"
        "    def push(self, x):\n"
        "        self.items.append(x)\n"
        "        return self\n"
        "    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)\n"
        "    def __eq__(self, o): return self.items == o.items\n"
        "    def __contains__(self, x): return x in self.items\n"
        "    def __iter__(self): return iter(self.items)\n"
        "    def __getitem__(self, i): return self.items[i]\n"
        "    def __repr__(self): return f'Stack{self.items}'\n"
        "    def __add__(self, x): return Stack(*self.items, x)\n"
        "    @classmethod\n"
        "    def make(cls): return cls(1, 2)\n",
        "s = Stack(1)\n"
        "s.push(2).push(3)\n"
        "assert len(s) == 3 and 2 in s and s.pop() == 3 and list(s) == [1, 2] and s[0] == 1 and s[-1:] == [2]\n"
        "assert s == Stack(1, 2) and s != Stack() and repr(s) == 'Stack[1, 2]'\n"
        "assert s.items == [1, 2] and isinstance(s, Stack)\n"
        "assert list(s + 5) == [1, 2, 5] and Stack.make() == s and Stack.size == 0 and type(s) is Stack\n"
        "s.items = [7]\n"
        "assert s.pop() == 7\n"
        "try:\n"
        "    s.pop()\n"
        "    raise SystemError\n"
        "except IndexError:\n"
        "    pass",
    ),
    "a dataclass": (
        "from dataclasses import dataclass\n"
        "@dataclass(order=True, frozen=True)\n"
        "class P:\n"
        "    x: int\n"
        "def f(x): return P(x)",
        "assert f(1) == P(1) and f(1) != P(2) and f(1) < f(2)\n"
        "assert sorted([f(2), f(1)])[0].x == 1 and len({f(1), P(1)}) == 1\n"
        "assert str(f(3)) == 'P(x=3)' and isinstance(f(1), P)",
    ),
    "subclasses of plain types": (
        "import collections, enum\n"
        "Point = collections.namedtuple('Point', 'x y')\n"
        "class Color(enum.IntEnum):\n"
        "    RED = 1\n"
        "class Kind(enum.Enum):\n"
        "    A = 'a'\n"
        "class L(list): pass\n"
        "def f(): return Point(1, 2)\n"
        "def g(): return Color.RED\n"
        "def h(): return Kind.A\n"
        "def k(): return L([1, 2])",
        "assert f() == (1, 2) and f().x == 1 and f()[1] == 2\n"
        "assert isinstance(f(), Point) and g() == 1 and g() == Color.RED and g().name == 'RED'\n"
        "assert h() is Kind.A and h() == Kind.A and h().value == 'a'\n"
        "assert [c.name for c in Kind] == ['A'] and k() == [1, 2] and len(k()) == 2",
    ),
    "generators": (
        "def f(n):\n    for i in range(n): yield i",
        "assert list(f(3)) == [0, 1, 2] and next(f(2)) == 0 and sum(f(4)) == 6",
    ),
    "views and iterators": (
        "def f(d): return d.keys()\ndef g(d): return map(str, d)",
        "assert f({1: 2}) == {1} and list(g([1])) == ['1']",
    ),
    "functions as arguments": (
        "def f(g, xs): return [g(x) for x in xs]",
        "assert f(lambda x: x + 1, [1, 2]) == [2, 3] and f(str, [1]) == ['1']",
    ),
    "a function that is returned": ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5 and callable(f)"),
    "coroutines": (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x * x",
        "import asyncio\nassert asyncio.run(f(3)) == 9",
    ),
    "global names": (
        "import math\nfrom typing import List\nLIMIT = 5\nbig = list(range(10))\ndef f(): return math.pi",
        "assert LIMIT == 5 and big[9] == 9 and math.isclose(f(), math.pi) and List",
    ),
    "names of the module": (
        "def f(): return __name__",
        "assert f() == 'solution'\nimport solution\nfrom solution import f as g\nassert g() == solution.f()",
    ),
    "what is printed": (
        "def f(): print('hello')",
        "import io, contextlib\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out): f()\n"
        "assert out.getvalue() == 'hello\\n'",
    ),
    "copies": (
        "class A:\n    def __init__(s): s.x = [1]",
        "import copy\na = A()\nb = copy.deepcopy(a)\nb.x = [2]\nassert a.x == [1]",
    ),
    "caches and attributes": (
        "import functools\n@functools.lru_cache\ndef f(x): return x",
        "f(1), f(1)\nassert f.cache_info().hits == 1 and f.__name__ == 'f'",
    ),
    "a tree": (
        "class Node:\n    def __init__(self, x): self.x, self.left, self.right = x, None, None\n"
        "def f(n): return 0 if n is None else 1 + max(f(n.left), f(n.right))",
        "root = Node(1)\n"
        "root.left = Node(2)\n"
        "root.left.right = Node(3)\n"
        "assert f(root) == 3 and f(root.left) == 2 and root.left.right.x == 3",
    ),
    "sets in their order": (
        "def f(s): return list(s)",
        "for s in ({12, 13, 14, 15, 16}, {40, 8, 1, 33, 17}, {'a', 'b', 'zz'}): assert f(s) == list(s)",
    ),
    "many values": (
        "def f(n): return [[i] * 3 for i in range(n)]",
        "a = f(20000)\nassert len(a) == 20000 and a[-1] == [19999] * 3",
    ),
    "deep values": (
        "def f(n):\n    a = ()\n    for _ in range(n): a = [a]\n    return a",
        "a = f(5000)\nfor _ in range(4999):\n    (a,) = a\nassert a == [()]",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_tests_see_the_program_as_if_it_were_theirs(name: str) -> None:
    program, tests = HONEST[name]
    outcome = run(program, tests=tests)
    assert outcome.passed, outcome.problem
    # Negative control: the same tests fail with another program.
    assert not run("def f(*_): return 'another'", tests=tests).passed


def test_helpers_of_the_prompt_are_the_prompt_s() -> None:
    prompt = "def encode(s):\n    return s[::-1]\n\ndef decode(s):\n    '''Undo encode.'''\n"
    reference = {
        "prompt": prompt,
        "entry_point": "decode",
        "tests": "def check(f):\n    assert f(encode('abc')) == 'abc'",
    }
    assert judge(block("def decode(s):\n    return s[::-1]"), reference).correct
    assert judge("    return s[::-1]", reference).correct
    assert not judge(block("def encode(s): return s\ndef decode(s): return s"), reference).correct
    assert judge(block("from __future__ import annotations\ndef decode(s: str): return s[::-1]"), reference).correct


def test_methods_of_nodes_as_leetcode_s_data_sets_have_them() -> None:
    prompt = (
        "from typing import *\nclass ListNode:\n    def __init__(self, val=0, next=None):\n        self.val = val\n"
        "        self.next = next\ndef listed(values):\n    head = None\n    for value in reversed(values):\n"
        "        head = ListNode(value, head)\n    return head\n"
    )
    tests = (
        "def values(node):\n    return [node.val, *values(node.next)] if node else []\n"
        "def check(candidate):\n    assert values(candidate(head=listed([1, 2, 3]))) == [3, 2, 1]"
    )
    reference = {"prompt": prompt, "entry_point": "Solution().reverse", "tests": tests}
    right = (
        "class Solution:\n    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        last = None\n"
        "        while head: head.next, last, head = last, head, head.next\n        return last"
    )
    assert judge(block(right), reference).correct
    assert not judge(block(right.replace("return last", "return head")), reference).correct


# ------------------------------------------------------------------------------------------------------------ cheating

ADD_TESTS = "assert add(1, 2) == 3\nassert abs(add(0.5, 0.25) - 0.75) < 1e-6"
WALK_DESCRIPTORS = """
import os
for fd in range(3, 1024):
    try:
        os.lseek(fd, 0, 0)
        text = os.read(fd, 10**5)
    except OSError:
        continue
    for other in range(3, 1024):
        try: os.write(other, {what})
        except OSError: pass
os._exit(0)
"""
OWN_OBJECT = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __gt__(self, other): return True
    def __sub__(self, other): return 0.0
    def __rsub__(self, other): return 0.0
    def __abs__(self): return 0.0
    def __float__(self): return 0.0
    def __bool__(self): return True
    def __hash__(self): return hash(3)
    def __instancecheck__(self, other): return True
"""
EQUAL_EVERYTHING = (
    "\n    def __eq__(self, other): return True\n    __hash__ = None\n    def __sub__(self, other): return 0\n"
)
CHEATS = {
    "the token out of a file": WALK_DESCRIPTORS.format(what="text[-40:]"),
    "the word that means passed": WALK_DESCRIPTORS.format(what="b'passed'"),
    "the word, without looking": "import os\n"
    "for fd in range(3, 1024):\n"
    "    try: os.write(fd, b'passed')\n"
    "    except OSError: pass\n"
    "os._exit(0)",
    "exec": "import builtins\nbuiltins.exec = lambda *a, **k: None\ndef add(a, b): return 0",
    "compile": "import builtins\n"
    "old = compile\n"
    "builtins.compile = lambda s, *a, **k: old('pass', 'x', 'exec')\n"
    "def add(a, b): return 0",
    "equal to everything": OWN_OBJECT + "def add(a, b): return Yes()",
    "an equal class": OWN_OBJECT + "class Meta(type):\n"
    "    __eq__ = lambda s, o: True\n"
    "class add(metaclass=Meta):\n"
    "    def __init__(self, *a): pass",
    "an object in the place of a number": f"class add:\n    def __init__(self, *a): pass{EQUAL_EVERYTHING}"
    "    def __abs__(self): return 0",
    "a list in the place of a number": f"class add(list):\n    def __init__(self, *a): pass{EQUAL_EVERYTHING}"
    "    def __abs__(self): return 0",
    "an equal number": f"class N(int):{EQUAL_EVERYTHING}def add(a, b): return N(7)",
    "an equal tuple": f"class N(tuple):{EQUAL_EVERYTHING}def add(a, b): return N()",
    "an equal list": f"class N(list):{EQUAL_EVERYTHING}def add(a, b): return N()",
    "mapped files": "import mmap\n"
    "for fd in range(3, 1024):\n"
    "    try: m = mmap.mmap(fd, 0)\n"
    "    except (OSError, ValueError): continue\n"
    "    m[:] = b' ' * len(m)\n"
    "def add(a, b): return 0",
    "memory of the tests' process": "import os\n"
    "for name in ('mem', 'environ', 'maps', 'fd/3', 'fd/5', 'fd/6', 'fd/7'):\n"
    "    try: os.open(f'/proc/{os.getppid()}/{name}', os.O_RDONLY); os.write(1, name.encode())\n"
    "    except OSError: pass\n"
    "def add(a, b): return 0",
    "frames": "import sys, gc\n"
    "wanted = ['assert', 'add(']\n"
    "found = [o for o in gc.get_objects() if ' '.join(wanted) in str(o)[:10**4]]\n"
    "frame = sys._getframe()\n"
    "while frame:\n"
    "    found += [v for v in frame.f_locals.values() if ' '.join(wanted) in str(v)]\n"
    "    frame = frame.f_back\n"
    "assert found, 'nothing to read'\ndef add(a, b): return 3 if a == 1 else 0.75",
    "AssertionError that is none": "import builtins\n"
    "builtins.AssertionError = type('A', (Exception,), {})\n"
    "def add(a, b): return 0",
    "exit in a function": "def add(a, b): raise SystemExit(0)",
    "os._exit in a function": "import os\ndef add(a, b): os._exit(0)",
    "its own answers": "import os, json\n"
    "reply = json.dumps({'value': 3, 'table': [], 'changed': [], 'printed': ''}).encode()\n"
    "for fd in range(3, 1024):\n"
    "    try: [os.write(fd, len(reply).to_bytes(8, 'big') + reply) for _ in range(9)]\n"
    "    except OSError: pass\n"
    "def add(a, b): return 0",
    "a reply that is none": "import os\n"
    "for fd in range(3, 1024):\n"
    "    try: os.write(fd, b'\\0\\0\\0\\0\\0\\0\\0\\2[]')\n"
    "    except OSError: pass\n"
    "def add(a, b): return 3",
    "a function of the judge's side": "import unittest.mock\nadd = unittest.mock.ANY",
    "a mock": "import unittest.mock\ndef add(a, b): return unittest.mock.ANY",
    "a changed argument": "def add(a, b):\n    import sys\n    sys.modules['tests'] = None\n    return 0",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(name: str) -> None:
    outcome = run(CHEATS[name], tests=ADD_TESTS)
    assert not outcome.passed
    assert outcome.stdout == b""


def test_the_same_cheats_succeed_where_tests_share_the_process() -> None:
    """Negative control: with same_process, the cheats work, which is why it is not the default."""
    for name in ("the word, without looking", "exec", "equal to everything", "an equal number"):
        assert run(CHEATS[name], tests=ADD_TESTS, same_process=True).passed, name
    assert not run("def add(a, b): return 0", tests=ADD_TESTS, same_process=True).passed
    subclass = {"tests": "class B(A):\n    pass\nassert B().x == 1", "same_process": True}
    assert judge("class A:\n    x = 1", subclass).correct
    assert not judge("class A:\n    x = 2", subclass).correct


def test_an_object_of_a_class_that_tests_name_is_not_asked_about_their_values() -> None:
    solution = (
        OWN_OBJECT + "class Solution(Yes):\n    def add(self, a, b): return self\n    def make(self): return Solution()"
    )
    assert not run(solution, tests="assert Solution().add(1, 2) == 3").passed
    assert not run(solution, tests="s = Solution()\nassert s.add(1, 2) == 3").passed
    assert not run(solution, tests="assert Solution().make() - 4 < 1").passed
    assert not run(solution, tests="assert Solution().add(1, 2) in [3, 4]").passed
    assert not run(solution, tests="assert [Solution().add(1, 2)] == [3]").passed
    # An object that the tests make by calling a class is asked; in the place of a function's result, it is not.
    asked = "assert Solution() == 3 and Solution() - 4 < 1"
    assert run(solution, tests=f"{asked}\nassert isinstance(Solution(), Solution)").passed
    assert not run(solution, tests=asked).passed


def test_calls_are_compared_out_of_the_program_s_reach() -> None:
    reference = {"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [3, 4]}
    for cheat in (
        OWN_OBJECT + "def add(a, b): return Yes()",
        f"class N(int):{EQUAL_EVERYTHING}def add(a, b): return N(7)",
        "import json\njson.dumps = lambda value: '{\"value\": 3}'\ndef add(a, b): return 0",
        "import os\n"
        "for fd in range(3, 1024):\n"
        "    try: os.write(fd, b'{\"value\": 3}\\n' * 2)\n"
        "    except OSError: pass\n"
        "os._exit(0)",
        "import os\nos._exit(0)",
        "import os\ndef add(a, b): os._exit(0)",
        "def add(a, b): return [a] if a else add",
        "def add(a, b):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    ):
        assert not judge(block(cheat), reference).correct, cheat
    right = (
        "import os\n"
        "for fd in range(3, 1024):\n"
        '    try: os.write(fd, b\'{"value": 3}\\n{"value": 4}\\n\')\n'
        "    except OSError: pass\n"
        "os._exit(0)"
    )
    assert judge(block(right), reference).correct  # control: it can write a result to the pipe


@pytest.mark.parametrize("reference", [SUM_OF_LINE, SQUARE, {"fn_name": "f", "inputs": ["2"], "outputs": ["4"]}])
@pytest.mark.parametrize("code", [0, 1])
def test_a_program_cannot_void_its_verdict(reference: Any, code: int) -> None:
    program = (
        "import os\n"
        "for fd in (*range(3, 1024), 1):\n"
        "    try: os.write(fd, b'unprotected: set verifier=code_unprotected\\n')\n"
        f"    except OSError: pass\nos._exit({code})\ndef f(x): pass"
    )
    assert judge(program, reference) == Verdict(0.0, program)


def test_what_cannot_be_protected_is_said_by_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: the error is still reported where it is true."""
    monkeypatch.setattr(sandbox, "syscall_filter", lambda: b"\0" * 8)
    for reference in (SUM_OF_LINE, SQUARE, {"fn_name": "f", "inputs": ["2"], "outputs": ["4"]}):
        with pytest.raises(sandbox.SandboxUnavailableError, match="seccomp"):
            judge("print(6)", reference)


# ------------------------------------------------------------------------------------------------ sockets and threads

NO_REACH = {
    "a pair of datagram sockets": "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)",
    "another family": "import socket\nsocket.socketpair(socket.AF_INET)",
    "a message to an address": "import socket\na, b = socket.socketpair()\na.sendto(b'x', '/dev/log')",
    "connecting one of a pair": "import socket\na, b = socket.socketpair()\na.connect('/dev/log')",
    "listening": "import socket\na, b = socket.socketpair()\na.bind('x')",
    "descriptors through a socket": "import socket, array\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])",
    "signals by input": "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)",
    "a server of asyncio": "import asyncio\n"
    "async def main(): assert (await asyncio.start_server(print, '127.0.0.1', 0)).sockets\n"
    "asyncio.run(main())",
    "a process of asyncio": "import asyncio\n"
    "async def main(): await asyncio.create_subprocess_exec('true')\n"
    "asyncio.run(main())",
    "a pool of processes": "import multiprocessing\nmultiprocessing.Pool(1)",
    "writing to a file": "open('x', 'w')",
    "writing to memory": "import os\nos.memfd_create('x')",
    "writing to another device": "open('/dev/zero', 'w')",
    "the null device's neighbour": "open('/dev/null/../x', 'w')",
}


@pytest.mark.parametrize("name", NO_REACH)
def test_what_asyncio_needs_reaches_nothing(name: str) -> None:
    outcome = run(NO_REACH[name] + "\nprint('reached')")
    assert not outcome.passed
    assert b"reached" not in outcome.stdout


THREADS = """
import threading, time
started = 0
try:
    while started < 600:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
print(started, flush=True)
import os
os._exit(0)
"""


def test_threads_are_limited() -> None:
    small = "import threading\nthreading.stack_size(65536)\n" + THREADS
    few = run(small, limits=Limits(wall_s=60.0, num_threads=20))
    if few.passed:
        assert int(few.stdout) < 20
    else:  # as a user who is not root and may not create a user namespace
        assert few.problem == "it had more than 20 threads"
    many = run(small, limits=Limits(wall_s=60.0, num_threads=1000))
    assert int(many.stdout) == 600  # control: nothing else limits them


def test_threads_are_limited_where_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    small = "import threading\nthreading.stack_size(65536)\n" + THREADS.replace("os._exit(0)", "time.sleep(1000)")
    outcome = run(small, limits=Limits(wall_s=60.0, num_threads=50), protected=False)  # its user has other threads, too
    assert outcome.problem == "it had more than 50 threads"
