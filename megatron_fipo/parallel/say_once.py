"""Prints an error once, whether one rank met it or all of them."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from megatron_fipo.config import without_secrets
from megatron_fipo.system.text_hygiene import clean_text

_PATIENCE = timedelta(seconds=10)


def say_once(message: str) -> None:
    """Print to standard error unless another rank speaks; whichever comes first speaks for all.

    Secrets from the environment are shown as references, and control codes escaped: part of the message may be what a
    verifier or a server wrote.

    torchrun ends every rank as soon as one has left. So none is appointed to speak (it might be ended before it could,
    or not have the error at all), and none returns from here before somebody has spoken. Where the launcher has no
    store of its own, every rank speaks.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _say(message)
        return
    key = f"megatron_fipo/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)
        if store.add(f"{key}/ranks", 1) == 1:
            _say(message)
            store.set(f"{key}/told", "")
        else:
            store.wait([f"{key}/told"], _PATIENCE)
    except DistError as error:  # better twice than never
        _say(f"{message} (said again, since rank {os.environ['RANK']} cannot tell who has said it: {error})")


def _say(message: str) -> None:
    print(clean_text(without_secrets(message)), file=sys.stderr, flush=True)
