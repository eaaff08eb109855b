"""Chain arithmetic: "3+9-5=" is worked out term by term, with re-checks, and ends in the result.

    3+9=12;12-5=7?7;#7

A step "value operator operand = result" ends in ";". After a result, "?" may announce a second look at the same step,
whose result counts from then on. "#" announces the answer. A model that was taught from solutions with mistakes in
them makes mistakes, and can learn by reinforcement to avoid them and to look twice where it pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_fipo.data.held_out import is_held_out

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-=;?#"
VOCABULARY = (PAD_TOKEN, EOS_TOKEN, *CHARACTERS, UNK_TOKEN)
"""Tokens by id: padding 0, end of sequence 1, the task's characters 2 … 17, unknown 18."""

MAX_VALUE = 99
"""Running values lie in 0 … 99."""

_SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)
"""The errors of a wrong result: miscounting by a few, or a lost or extra carry."""


@dataclass(frozen=True)
class ChainProblem:
    """A chain of additions and subtractions.

    Attributes:
        operands: num_terms numbers from 1 to 9.
        operators: num_terms - 1 characters, "+" or "-".
    """

    operands: tuple[int, ...]
    operators: str

    @property
    def prompt(self) -> str:
        """The question, such as "3+9-5="."""
        rest = zip(self.operators, self.operands[1:], strict=True)
        return str(self.operands[0]) + "".join(f"{operator}{operand}" for operator, operand in rest) + "="

    @property
    def answer(self) -> str:
        """The result in decimal."""
        return str(self.running_values()[-1])

    def running_values(self) -> list[int]:
        """Value after each operand, num_terms of them."""
        values = [self.operands[0]]
        for operator, operand in zip(self.operators, self.operands[1:], strict=True):
            values.append(values[-1] + operand if operator == "+" else values[-1] - operand)
        return values


@dataclass(frozen=True)
class ChainArithmetic:
    """The task at one length, or at several.

    Attributes:
        num_terms: operands in a problem, at least 2; with min_terms, in the longest one.
        min_terms: operands in the shortest problem, at least 2; all lengths up to num_terms are equally likely. None:
            all problems have num_terms.

    Raises:
        ValueError: for fewer than 2 terms, or a shortest problem longer than the longest.
    """

    num_terms: int = 7
    min_terms: int | None = None

    def __post_init__(self) -> None:
        if self.num_terms < 2:
            raise ValueError(f"chain_arithmetic needs num_terms of at least 2, got {self.num_terms}")
        if self.min_terms is not None and not 2 <= self.min_terms <= self.num_terms:
            raise ValueError(
                f"chain_arithmetic needs min_terms from 2 to num_terms={self.num_terms}, got {self.min_terms}"
            )

    def draw(self, rng: Random) -> ChainProblem:
        """Draw a length, then uniformly from its problems whose running values all lie in 0 … 99, held out or not."""
        num_terms = self.num_terms if self.min_terms is None else rng.randint(self.min_terms, self.num_terms)
        while True:
            operands = tuple(rng.randint(1, 9) for _ in range(num_terms))
            operators = "".join(rng.choice("+-") for _ in range(num_terms - 1))
            problem = ChainProblem(operands, operators)
            if all(0 <= value <= MAX_VALUE for value in problem.running_values()):
                return problem

    def draw_training(self, rng: Random) -> ChainProblem:
        """Draw a problem outside the held-out share; what a supervised warm start may see."""
        while is_held_out((problem := self.draw(rng)).prompt):
            pass
        return problem


@dataclass(frozen=True)
class WorkedSolutionNoise:
    """How often a worked solution goes wrong and looks twice.

    Attributes:
        error_rate: probability that a step's first result is wrong, before the factors below.
        carry_factor: factor on error_rate for steps that change the tens.
        plain_factor: factor on error_rate for all other steps.
        check_rate: probability that a step is followed by a re-check.
        check_error_rate: probability that a re-check's result is wrong.
    """

    error_rate: float = 0.25
    carry_factor: float = 1.6
    plain_factor: float = 0.6
    check_rate: float = 0.25
    check_error_rate: float = 0.03


def worked_solution(problem: ChainProblem, rng: Random, noise: WorkedSolutionNoise) -> str:
    """Work a problem out with mistakes; the answer is wrong where a mistake survives.

    Each step continues from the solution's own, perhaps wrong, value. Results stay within 0 … 99: after a mistake, a
    step that would leave that range stops at its end.
    """
    value = problem.operands[0]
    solution = ""
    for operator, operand in zip(problem.operators, problem.operands[1:], strict=True):
        true_result = min(max(value + operand if operator == "+" else value - operand, 0), MAX_VALUE)
        carries = value // 10 != true_result // 10
        error_rate = noise.error_rate * (noise.carry_factor if carries else noise.plain_factor)
        result = _noisy(true_result, error_rate, rng)
        solution += f"{value}{operator}{operand}={result}"
        if rng.random() < noise.check_rate:
            result = _noisy(true_result, noise.check_error_rate, rng)
            solution += f"?{result}"
        solution += ";"
        value = result
    return f"{solution}#{value}"


def _noisy(value: int, error_rate: float, rng: Random) -> int:
    """The value, or with the given probability another one near it."""
    if rng.random() >= error_rate:
        return value
    return rng.choice([value + slip for slip in _SLIPS if 0 <= value + slip <= MAX_VALUE])
