"""Judges of responses. `verifier: judges:verify` in the configuration names a function of this file."""

from megatron_fipo.verifiers.verdict import Verdict


def verify(response_text: str, reference: object, finish_reason: str) -> Verdict:
    """Judge a response as right if the text after its last "#" is the row's answer.

    Args:
        response_text: what the model wrote, such as "3+9=12;12-5=7;#7".
        reference: what the row has in answer_field, here "7".
        finish_reason: "stop", or "length" where the response was cut.
    """
    _, mark, answer = response_text.rpartition("#")
    right = bool(mark) and answer.strip() == str(reference)
    return Verdict(score=1.0 if right else 0.0, answer=answer.strip() if mark else "")
