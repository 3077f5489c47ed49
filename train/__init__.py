"""The training system: commands, settings, data, the step, the loop, checkpoints and logs."""
