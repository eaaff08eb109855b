"""Reading rows as public data sets publish them: which column is the prompt, which the reference.

A form gives prompt and reference of a row (a mapping of columns); a source names it as its `schema`. The prompt still
goes through the source's prompt_template: only dapo_math's prompts carry their instruction with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class RowForm:
    """One published form.

    Attributes:
        columns: names that its columns go by, one tuple for each column; the first name that a file has counts.
        optional: columns that a file may lack.
        read: (row with the first name of each column as its key) -> (prompt, reference).
    """

    columns: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    read: Callable[[Row], tuple[Any, Any]]


def select_columns(form: RowForm, existing: Sequence[str], place: str) -> dict[str, str]:
    """The name in the file of each column, by its name in the form.

    Raises:
        ValueError: if the file lacks a column that is not optional.
    """
    found = {}
    for names in form.columns:
        present = [name for name in names if name in existing]
        if present:
            found[names[0]] = present[0]
        elif names[0] not in form.optional:
            raise ValueError(
                f"{place} has no column {' or '.join(map(repr, names))}; it has {', '.join(existing) or 'none'}. Set "
                "the data source's schema to the file's, or schema=columns with prompt_field and answer_field."
            )
    return found


def _dapo_math(row: Row) -> tuple[Any, Any]:
    reward_model = row["reward_model"]
    if isinstance(reward_model, str):  # a table whose cells hold text only
        reward_model = _parsed(reward_model, "reward_model", dict)
    return row["prompt"], reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None


def _parsed(text: str, column: str, kind: type) -> Any:
    """A structure that is given as JSON text.

    Raises:
        ValueError: if the text is not the JSON of such a structure; the caller adds the place.
    """
    try:
        structure = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"column {column!r} holds text that is no JSON: {text!r:.100}. Write the structure itself, or its JSON"
        ) from error
    if not isinstance(structure, kind):
        raise ValueError(f"column {column!r} holds {text!r:.100}; the JSON of a {kind.__name__} was expected")
    return structure


def _problem_and_answer(row: Row) -> tuple[Any, Any]:
    return row["problem"], row["answer"]


def _gsm8k(row: Row) -> tuple[Any, Any]:
    """The answer column holds a worked solution that ends in "#### 18", or the number alone."""
    answer = row["answer"]
    return row["question"], str(answer).rpartition("####")[2].strip() if answer is not None else None


def _humaneval(row: Row) -> tuple[Any, Any]:
    """The prompt is the beginning of a module, which the response completes or writes anew."""
    reference = {"prompt": row["prompt"], "tests": row["test"], "entry_point": row["entry_point"]}
    return row["prompt"], reference


def _mbpp(row: Row) -> tuple[Any, Any]:
    """The tests belong to the question: they alone say what the function is called."""
    tests = row["test_list"]
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        # Run as it stands, a list of texts would test nothing, and every program would pass.
        tests = _parsed(tests, "test_list", list)
    source = tests if isinstance(tests, str) else "\n".join(tests or ())
    setup = row.get("test_setup_code") or ""
    setup = setup if isinstance(setup, str) else "\n".join(setup)
    if not source.strip():
        return row["text"], None
    return f"{row['text']}\n\nYour code should pass these tests:\n{source}", {"tests": f"{setup}\n{source}"}


ROW_FORMS: dict[str, RowForm] = {
    "dapo_math": RowForm((("prompt",), ("reward_model",)), (), _dapo_math),
    "aime": RowForm(
        (("problem", "Problem", "question"), ("answer", "Answer", "expected_answer")), (), _problem_and_answer
    ),
    "gsm8k": RowForm((("question",), ("answer",)), (), _gsm8k),
    "humaneval": RowForm((("prompt",), ("test",), ("entry_point",)), (), _humaneval),
    "mbpp": RowForm(
        (("text", "prompt"), ("test_list", "test"), ("test_setup_code", "test_imports")), ("test_setup_code",), _mbpp
    ),
}
"""Published forms by name: DAPO-Math-17k and DAPO's AIME-2024; AIME 2024 and 2025 in other repositories; GSM8K;
HumanEval; MBPP, full and sanitized."""
