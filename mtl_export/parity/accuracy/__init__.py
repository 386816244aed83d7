"""The accuracy gate: scores on labelled rows."""
