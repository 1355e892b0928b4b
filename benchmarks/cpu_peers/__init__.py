"""Other programs that run a GPT-2 on a CPU, and gpt2rt, behind one interface; one file a family.

A family's module has ``REQUIRES`` (module to look for: name to install), a class ``Runner`` with
``generate(prompts, new_tokens) -> (tokens of each row, seconds from the start to each step's tokens)``, and, where it
reads files of its own format, ``convert(checkpoint, target, options)`` and ``CONVERT_REQUIRES``; ``OPTION_REQUIRES``
names what a peer with that option needs beyond these. Modules import nothing heavy at the top, since
the benchmark itself and every worker process import this package, in whatever environment they run.
"""

from .process import NotInstalledError, PeerFailedError, PeerProcess
from .registry import PEERS, Peer, family_module

__all__ = ["PEERS", "NotInstalledError", "Peer", "PeerFailedError", "PeerProcess", "family_module"]
