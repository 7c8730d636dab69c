"""What accelerate launch starts several times in a test."""

import os

import mixlens as ml

try:
    ml.evaluate(ml.load("demo", verbose=False), "demo", settings=ml.evals.EvalSettings(progress=False))
except ml.BadInput as error:
    # one write, so that two processes that share a pipe do not mix their lines
    os.write(1, f"BadInput: {error.argument} {error.value}\n".encode())
