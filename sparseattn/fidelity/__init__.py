"""How good is a mask? What sparse attention loses against dense attention on the same queries and keys.

``recall`` and ``lse_deficit`` give every query's share of attention mass, ``head_fidelity`` what there is to know of
each head, ``recall_bounds`` what random blocks and the best ones would keep at the same density.
"""

from sparseattn.fidelity.bounds import RecallBounds as RecallBounds
from sparseattn.fidelity.bounds import recall_bounds as recall_bounds
from sparseattn.fidelity.heads import HeadFidelity as HeadFidelity
from sparseattn.fidelity.heads import head_fidelity as head_fidelity
from sparseattn.fidelity.heads import head_statistics as head_statistics
from sparseattn.fidelity.mass import MassStatistics as MassStatistics
from sparseattn.fidelity.mass import deficit_from_lse as deficit_from_lse
from sparseattn.fidelity.mass import lse_deficit as lse_deficit
from sparseattn.fidelity.mass import mass_statistics as mass_statistics
from sparseattn.fidelity.mass import output_error as output_error
from sparseattn.fidelity.mass import recall as recall
from sparseattn.fidelity.mass import relative_error as relative_error
