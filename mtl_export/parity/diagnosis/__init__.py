"""Where an error begins, and why."""
