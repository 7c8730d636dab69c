"""What accelerate launch starts several times in a test."""

import mixlens as ml

try:
    ml.evaluate(ml.load("demo", verbose=False), "demo", settings=ml.evals.EvalSettings(progress=False))
except ml.BadInput as error:
    print(f"BadInput: {error.argument} {error.value}", flush=True)
