"""What the command line does, as functions: one file per verb, and what verbs share."""
