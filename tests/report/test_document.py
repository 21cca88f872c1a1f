import json
import math
from dataclasses import replace

import torch

from memopt.measure import Comparison, StepFigures
from memopt.report import comparison_document

FIGURES = {
    "source",
    "activation_peak_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "saved_bytes",
    "retained_bytes",
    "step_seconds",
    "timed_steps",
    "out_of_memory",
}


def test_schema_1(comparison: Comparison) -> None:
    document = json.loads(json.dumps(comparison_document(comparison, "model.py:Net"), allow_nan=False))
    assert {key: document[key] for key in ("schema", "target", "device", "input_shape", "dtype", "amp")} == {
        "schema": 1,
        "target": "model.py:Net",
        "device": "cpu",
        "input_shape": [64, 3, 32, 32],
        "dtype": "float32",
        "amp": None,
    }
    assert (document["chains"]["found"], document["chains"]["rewritten"]) == (15, 10)
    assert len(document["chains"]["rejected"]) == 5
    assert document["chains"]["rejected"][0].items() >= {"node": "cat_2_5"}.items()
    assert document["chains"]["rejected"][0]["reason"].startswith("the concatenated tensor")
    predicted = document["predicted"]
    for figures in (document["before"], document["after"], predicted["before"], predicted["after"]):
        assert figures.keys() == FIGURES
    assert predicted["target"] == "GPU"
    assert predicted["peak_by_category"] == {"before": None, "after": None}
    assert document["before"]["activation_peak_bytes"] == 2239201280
    assert document["after"]["step_seconds"] == 0.7312
    assert document["after"]["timed_steps"] == 2
    assert document["predicted"]["after"]["retained_bytes"] == 2**20
    assert document["equivalence"] == {
        "numerics": "exact",
        "outputs_equal": True,
        "gradients_equal": True,
        "buffers_equal": True,
        "max_gradient_error": 0.0,
        "passed": True,
        "skipped": [],
        "steps": 3,
        "differing": [],
    }
    assert document["notes"][0] == "One note about the model."


def test_says_what_is_measured_and_what_predicted(comparison: Comparison) -> None:
    document = comparison_document(comparison)
    assert (document["before"]["source"], document["after"]["source"]) == ("measured", "measured")
    assert document["predicted"]["before"]["source"] == "predicted"
    assert document["predicted"]["target"] == "GPU"


def test_where_memopt_does_not_pay_the_document_warns(comparison: Comparison) -> None:
    (warning,) = comparison_document(comparison)["warnings"]
    assert warning.startswith("Predicted for a GPU, memopt does not pay")
    assert comparison_document(replace(comparison, predicted_after=None))["warnings"] == []


def test_what_was_not_measured_is_null(comparison: Comparison) -> None:
    document = comparison_document(replace(comparison, before=None, after=StepFigures(out_of_memory=True)))
    assert {document["before"][key] for key in FIGURES - {"out_of_memory"}} == {None}
    assert document["after"]["source"] == "measured"
    assert document["after"]["out_of_memory"] is True
    assert document["after"]["activation_peak_bytes"] is None


def test_an_infinite_error_is_null_and_autocast_is_named(comparison: Comparison) -> None:
    unequal = replace(comparison.equivalence, max_gradient_error=math.inf)
    document = comparison_document(replace(comparison, equivalence=unequal, amp=torch.bfloat16))
    assert document["equivalence"]["max_gradient_error"] is None
    assert document["amp"] == "bfloat16"
    json.dumps(document, allow_nan=False)


def test_several_inputs_or_none(comparison: Comparison) -> None:
    document = comparison_document(replace(comparison, input_shapes=((2, 3), (4,))))
    assert (document["input_shape"], document["input_shapes"]) == ([2, 3], [[2, 3], [4]])
    assert comparison_document(replace(comparison, input_shapes=()))["input_shape"] is None
