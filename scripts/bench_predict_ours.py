"""Our side of scripts/bench_predict.py: the `Predictor` of `sbs predict`, texts in and texts out."""

import argparse
import json
import os
import time
from pathlib import Path

from sbs_jax import bench

BATCHES = (64, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    stream = bench.protocol()
    bench.use_threads(arguments.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.prediction.engine import Predictor, Question, Settings

    inputs = json.loads((Path(arguments.work) / "work.json").read_text("utf-8"))["inputs"]
    asked = [Question(id=str(number), input=text) for number, text in enumerate(inputs)]
    first, tried, predictors = {}, {}, {}
    for batch in BATCHES:
        settings = Settings(weights=arguments.weights, batch_size=batch)
        predictors[batch] = Predictor.load(arguments.model, settings=settings)
        for seconds in (first, tried):  # the first time compiles
            start = time.perf_counter()
            found = predictors[batch].answer(asked)
            seconds[batch] = round(time.perf_counter() - start, 2)
    best = min(tried, key=lambda batch: tried[batch])
    predictor = predictors[best]

    def step(index: int) -> int:
        del index
        return len(predictor.answer(asked))

    ready = {
        "weights": arguments.weights,
        "batch": best,
        "seconds by batch": tried,
        "first time, seconds": first,
        "answers": [answer.prediction for answer in found],
    }
    bench.serve(step, ready=ready, stream=stream)


if __name__ == "__main__":
    main()
