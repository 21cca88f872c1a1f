"""Memory, time and equivalence of training steps, measured or predicted. Imports only `memopt.ir`."""

from memopt.measure.compare import Comparison, compare
from memopt.measure.equivalence import Equivalence, check_equivalence
from memopt.measure.memory import StepFigures, measure_step
from memopt.measure.predict import PredictionError, predict_step
from memopt.measure.step import StepError
from memopt.measure.target import GPU, Target
from memopt.measure.tracker import StorageTracker

__all__ = [
    "GPU",
    "Comparison",
    "Equivalence",
    "PredictionError",
    "StepError",
    "StepFigures",
    "StorageTracker",
    "Target",
    "check_equivalence",
    "compare",
    "measure_step",
    "predict_step",
]
