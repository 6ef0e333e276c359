"""Image quality in numbers: the metrics of the paper's tables, for folders of images and for models."""

from flexclear.common.metrics import METRICS, Metric
from flexclear.evaluation.evaluate import Evaluation, evaluate
from flexclear.evaluation.judge import Judge, Score
from flexclear.evaluation.networks import DEFAULTS, NetworkMissing, Networks
from flexclear.evaluation.pictures import read_captions, read_folder
from flexclear.evaluation.store import Store
from flexclear.evaluation.views import score_tensors

__all__ = [
    "DEFAULTS",
    "Evaluation",
    "Judge",
    "METRICS",
    "Metric",
    "NetworkMissing",
    "Networks",
    "Score",
    "Store",
    "evaluate",
    "read_captions",
    "read_folder",
    "score_tensors",
]
