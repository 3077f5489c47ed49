"""The presets: config files by name (`python -m train gpt2`). The first line is the one in `--help`."""
