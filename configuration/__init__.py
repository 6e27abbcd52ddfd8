"""The configuration of the GPT and the layout of its vocabulary."""
