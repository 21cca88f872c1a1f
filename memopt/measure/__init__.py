"""Memory, time and equivalence of training steps, measured or predicted. Imports only `memopt.ir`."""

from memopt.measure.compare import Comparison, compare
from memopt.measure.equivalence import Equivalence, check_equivalence
from memopt.measure.memory import StepFigures, measure_step
from memopt.measure.predict import PredictionError, predict_step
from memopt.measure.step import StepError
from memopt.measure.target import GPU, Target
from memopt.measure.timeline import CATEGORIES, Holding, Timeline
from memopt.measure.tracker import StorageTracker

__all__ = [
    "CATEGORIES",
    "GPU",
    "Comparison",
    "Equivalence",
    "Holding",
    "PredictionError",
    "StepError",
    "StepFigures",
    "StorageTracker",
    "Target",
    "Timeline",
    "check_equivalence",
    "compare",
    "measure_step",
    "predict_step",
]
