"""Other programs that answer many requests at once on a CPU, and gpt2rt's engine, behind one interface.

A family's module has ``REQUIRES`` (module to look for: name to install) and a class ``Runner`` with
``serve(prompts, new_tokens) -> (tokens, seconds)``: all prompts are there at once, each with the number of tokens that
it is to get, greedily and whatever they are; answered are the tokens of each, and the seconds from the start to each
moment at which some of them came (of each; none where all come at the end). Models are converted by the families of
``cpu_peers``. Modules import nothing heavy at the top: every worker process imports this package, in whatever
environment it runs.
"""

from .process import ServerProcess
from .registry import SERVERS, Server, family_module

__all__ = ["SERVERS", "Server", "ServerProcess", "family_module"]
