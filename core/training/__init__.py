"""A small language model trained on any backend: from TFLOP/s to step time to the loss curve.

options, runs, session    what is asked, what came of it, the parent's side; no torch
corpus, gpt, checkpoint   the text, the model, what survives a crash
trainer                   the loop; in a process of its own for each backend
"""
