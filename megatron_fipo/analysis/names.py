"""What the values of an analysis are called, and what they say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """What a value is called.

    Attributes:
        title: a heading.
        caption: what it says, in a sentence or two.
    """

    title: str
    caption: str


_KINDS = {
    "doubt": ("Doubts", "stops at what it has just written (“wait”, “hmm”, “is that right?”)"),
    "check": ("Checks", "looks again at what it wrote or tests an answer (“let me double-check”, 12-5=8?7)"),
    "correction": ("Corrections", "says that something it wrote is wrong (“I made a mistake”, “that's not right”)"),
    "restart": ("Restarts", "begins anew or takes another way (“let's start over”, “another approach”)"),
}

_LENGTHS = {
    "length/tokens": Name("Tokens", "Mean number of tokens of a response."),
    "length/tokens_right": Name("Tokens, right", "Mean number of tokens of right responses."),
    "length/tokens_wrong": Name("Tokens, wrong", "Mean number of tokens of wrong responses."),
    "length/characters": Name("Characters", "Mean number of characters of a response."),
    "length/thinking_characters": Name(
        "Characters of thinking",
        "Characters before the answer: in <think>…</think>, or before the line of the last \\boxed, “Answer:” or "
        "“####”. A response that marks neither is all thinking.",
    ),
    "length/answer_characters": Name("Characters of answer", "Characters of what follows the thinking, without code."),
    "length/code_characters": Name("Characters of code", "Characters of the blocks between ``` marks."),
    "length/thinking_share": Name("Share of thinking", "Share of all characters that are thinking."),
    "length/thinking_tokens": Name("Tokens of thinking", "Tokens before the answer, where a trace tells them."),
    "length/answer_tokens": Name("Tokens of answer", "Tokens of the answer, where a trace tells them."),
    "length/code_tokens": Name("Tokens of code", "Tokens of blocks of code, where a trace tells them."),
    "length/chain_steps": Name("Steps of a chain", "Steps of the quick-start's chains, such as 3+9=12;."),
    "length/paragraphs": Name("Paragraphs", "Paragraphs of a response, separated by empty lines."),
}

_RECHECKS = {
    "recheck/per_response": Name(
        "Re-checks per response",
        "How many times a response looks again at what it wrote: doubts, checks and corrections, where several close "
        "together are one; in the quick-start's chains each “?”.",
    ),
    "recheck/share": Name("Responses with a re-check", "Share of responses that look again at least once."),
    "recheck/per_1000_tokens": Name("Re-checks per 1,000 tokens", "Re-checks by length: more of them, or only longer?"),
    "recheck/told_share": Name(
        "Re-checks that can be told",
        "Share of re-checks with a value before and after that can be compared: the answers that the response names, "
        "the same left side of an equation, or the results of a chain's step.",
    ),
    "recheck/changed_share": Name("Re-checks that changed the value", "Share of those that can be told."),
    "recheck/for_better_share": Name("Re-checks from wrong to right", "Share of those that can be told."),
    "recheck/for_worse_share": Name("Re-checks from right to wrong", "Share of those that can be told."),
    "recheck/for_better_per_response": Name("Wrong to right per response", "Re-checks that mended a value."),
    "recheck/for_worse_per_response": Name("Right to wrong per response", "Re-checks that spoiled a value."),
    "right/with_recheck": Name("Right, with re-check", "Share of right ones among responses that look again."),
    "right/without_recheck": Name("Right, without", "Share of right ones among responses that do not look again."),
}

_REPETITION = {
    "repetition/compressible_share": Name(
        "Compressible share",
        "How much smaller zlib makes a response than ordinary text of its length; of responses of 200 bytes or more.",
    ),
    "repetition/word4_share": Name("Repeated 4-grams", "Share of runs of 4 words that came before in the response."),
    "repetition/word10_share": Name("Repeated 10-grams", "Share of runs of 10 words that came before in the response."),
    "repetition/character10_share": Name(
        "Repeated 10-grams of characters", "Share of runs of 10 characters that came before; of text without spaces."
    ),
    "repetition/loop_share": Name(
        "Ends in a loop",
        "Share of responses whose end repeats one stretch, three times or more, over 60 characters.",
    ),
    "repetition/loop_characters": Name("Characters of loops", "Mean length of such an end."),
    "truncated/share": Name("Truncated", "Share of responses that were cut at the length limit."),
    "language/switches_per_response": Name(
        "Changes of script",
        "How many times a response changes its script, such as Latin to Chinese, outside of code and mathematics.",
    ),
    "language/switched_share": Name("Responses that change script", "Share of responses with such a change."),
    "language/other_script_share": Name("Other scripts", "Mean share of letters that are not in the main script."),
}

_ENDS = {
    "right": ("Right", "that the verifier accepted in full"),
    "partly_right": ("Partly right", "with a score between 0 and 1"),
    "wrong_answer": ("Wrong answer", "whose answer was found, and wrong"),
    "no_answer": ("No answer", "that ended without an answer that the verifier found"),
    "cut_without_answer": ("Cut without answer", "that were cut at the length limit before an answer"),
    "not_judged": ("Not judged", "that could not be judged"),
}

_ERRORS = {
    "time_out": "because the verifier or a service took too long",
    "process_ended": "because the verifier's process ended",
    "raised": "because the verifier raised an exception",
    "unreachable": "because a reward model did not answer as it should",
    "no_verdict": "because the verifier returned no verdict",
    "generation_aborted": "because generation was aborted",
    "other": "for another reason",
}


def _of_kinds() -> dict[str, Name]:
    found = {}
    for kind, (title, meaning) in _KINDS.items():
        found[f"{kind}/per_response"] = Name(f"{title} per response", f"How many times a response {meaning}.")
        found[f"{kind}/share"] = Name(f"Responses with {title.lower()}", f"Share of responses with one that {meaning}.")
    return found


NAMES: dict[str, Name] = {
    **_LENGTHS,
    **_RECHECKS,
    **_of_kinds(),
    **_REPETITION,
    **{f"end/{end}": Name(title, f"Share of responses {meaning}.") for end, (title, meaning) in _ENDS.items()},
    **{
        f"error/{kind}": Name(f"Not judged: {kind.replace('_', ' ')}", f"Share of responses not judged {meaning}.")
        for kind, meaning in _ERRORS.items()
    },
}
"""By name, in the order in which they are shown."""
