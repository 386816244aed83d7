from __future__ import annotations

from mtl_export.checkpoint.model_outputs import answers_among


def test_boxes_are_answers_and_hidden_states_beside_logits_are_none() -> None:
    """A detector's outputs; a bare encoder's hidden states are all that it answers."""
    detector = ["logits", "pred_boxes", "last_hidden_state", "encoder_last_hidden_state"]
    assert answers_among(detector) == ("logits", "pred_boxes")
    assert answers_among(["last_hidden_state", "pooler_output"]) == (
        "last_hidden_state",
        "pooler_output",
    )
