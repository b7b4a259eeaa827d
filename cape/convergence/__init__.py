"""T*: how many optimizer updates until the loss of the probe batch falls to ε·L_0 (Eq. 3)."""

from cape.convergence.batched import measure_many
from cape.convergence.single import Trajectory, measure
from cape.convergence.stack import Subject
from cape.convergence.stopping import TrajectoryScan
from cape.convergence.training import Outcome

__all__ = ["Outcome", "Subject", "Trajectory", "TrajectoryScan", "measure", "measure_many"]
