"""`python -m bench.scale`: what several devices would make of a training step.

model.py predicts from a step and links.py's bandwidths; check.py holds it to ranks.py's ranks on this machine.
"""
