"""The evidence: protocols, metrics, tables, figures and the HTML report."""

from cape.evaluation.report import report
from cape.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate", "report"]
