"""The engine: batches of cells, the step that is taken on them, schedules, epochs, early stopping, interruption."""

from .plan import SCHEDULES, Plan, Progress
from .trainer import Trainer

__all__ = ["SCHEDULES", "Plan", "Progress", "Trainer"]
