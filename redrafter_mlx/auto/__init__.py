"""How much drafting pays on this machine: measured costs (`table`, `timing`) and the policy that follows them."""

from .learned import Learned as Learned
from .policy import Auto as Auto
from .table import CostTable as CostTable
from .timing import cost_table as cost_table
