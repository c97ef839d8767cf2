"""Who is compared: our implementations and, where they are installed, everybody else's.

Importing this imports none of them. Each entry says whether it is there (``missing``), and prepares its call of a
problem outside of what is timed; preparing raises ``Unsupported`` where it does not do that problem. Results are gated
before they are timed, whoever computed them.
"""

from __future__ import annotations

from benchmarks.rivals.registry import IMPLEMENTATIONS as IMPLEMENTATIONS
from benchmarks.rivals.registry import Implementation as Implementation
from benchmarks.rivals.registry import Prepared as Prepared
from benchmarks.rivals.registry import installed as installed

# isort: split
# Registering happens on import.
from benchmarks.rivals import fa4 as fa4
from benchmarks.rivals import flashinfer as flashinfer
from benchmarks.rivals import flashprefill as flashprefill
from benchmarks.rivals import native as native
from benchmarks.rivals import ours as ours
