"""Measures a training step of T5 v1.1 small against Hugging Face's PyTorch T5.

    python scripts/bench.py train                        # part of `make bench`
    python scripts/bench.py train --rounds 3 --steps 2   # shorter

Both sides train on the same batches: 16 examples of SVAMP for each of the two tasks, in the same order. Weights are
random, dropout is 0.1, activations are float32. Ours is the step that `sbs train` runs, on packed rows; the peer does
the work of the method's official code. Results and method: docs/speed.md.

The suites tuning, gpu and families compare the same two sides, with other options and models.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, svamp

PEER_NEEDS = ("torch", "transformers")
EXAMPLES = 16  # of each task
# Rows that hold 32 examples of SVAMP with little padding; other shapes: docs/speed.md.
ROWS, LENGTHS = 6, {"inputs": 256, "targets": 160}
DIFFERENT_BATCHES = 8
LEARNING_RATE = 5e-5
LABEL, RATIONALE = 1, 2  # ids of the tasks
IGNORED = -100  # a target that is padding, which PyTorch's loss leaves out

# The tokens of one example, inputs and targets (EOS included, no padding), and the id of its task.
Example = tuple[list[int], list[int], int]


def add_options(parser: argparse.ArgumentParser, *, steps: int = 4) -> None:
    harness.add_turns(parser, rounds=5, steps=steps)
    parser.add_argument("--model", default="t5_1_1_small", help="file of gin_configs/models")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    mine, other = compared(arguments, model=arguments.model)
    speeds, memory = (mine.per_second, getattr(other, "per_second", None)), getattr(other, "peak_gib", None)
    versions = harness.versions("jax", "flax", "optax", *PEER_NEEDS)
    yield harness.Row("train_tokens_per_s_vs_pytorch", "non-padding tokens/s", *speeds, ">= 1.5", versions)
    yield harness.Row("train_peak_memory_vs_pytorch", "GiB", mine.peak_gib, memory, "< 1", versions)


def compared(
    arguments: argparse.Namespace, *, model: str, extra: Sequence[str] = ()
) -> tuple[harness.Result, harness.Result | None]:
    """Lets both sides train a model of gin_configs/models in turns; the peer's result is None if it is missing."""
    with tempfile.TemporaryDirectory() as folder, harness.Sides() as sides:
        options = {"threads": arguments.threads, "work": f"{folder}/work.json"}
        sides.start("ours", ours, model=model, extra=extra, **options)  # writes the work that the peer reads
        if harness.installed("peer", *PEER_NEEDS):
            sides.start("peer", peer, **options)
        found = sides.compare(rounds=arguments.rounds, steps=arguments.steps)
    return found["ours"], found.get("peer")


# ----------------------------------------------------------------------------------------------- our side


def bindings(folder: Path | str, *, vocabulary: str, examples: int = EXAMPLES, **changes: Any) -> list[str]:
    """Returns the gin bindings of a run on packed rows, with `examples` examples of each task per update."""
    values = {
        "DATASET": "svamp",
        "RECORDS_DIR": str(folder),
        "MODEL_DIR": str(folder),
        "VOCABULARY": vocabulary,
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "EXAMPLES": examples,
        "PACK": True,
        "BATCH_SIZE": ROWS * examples // EXAMPLES,
        "TRAIN_STEPS": 1_000_000,
        "LEARNING_RATE": LEARNING_RATE,
        **changes,
    }
    return [f"{name}={value!r}" for name, value in values.items()]


def ours(
    *,
    model: str,
    work: str,
    threads: int | None = None,
    tuning: str | None = None,
    platform: str = "cpu",
    examples: int = EXAMPLES,
    batches: str | None = None,
    extra: Sequence[str] = (),
    only_write: bool = False,
) -> harness.Worker | dict[str, Any]:
    """Trains with the step of `sbs train`. On `cuda` activations are bfloat16.

    Writes the model's `config.json` and the examples of every batch to the file `work`, from which the peer does the
    same work.

    Args:
      model: a file of gin_configs/models; `tuning`: one of gin_configs/adapters; only its parameters are trained.
      batches: a file of packed batches, which is made if it does not exist.
      extra: more gin bindings.
      only_write: make both files.
    """
    if threads:
        harness.use_threads(threads)
    os.environ["JAX_PLATFORMS"] = "cpu" if only_write else platform
    import jax

    from sbs_jax.data.batches import count_tokens
    from sbs_jax.student import families
    from sbs_jax.training import gin_files
    from sbs_jax.training.state import initial_state
    from sbs_jax.training.step import prepare
    from sbs_jax.weights import hugging_face

    files = ["runs/train", f"models/{model}", "methods/step_by_step", *([f"adapters/{tuning}"] if tuning else [])]
    with tempfile.TemporaryDirectory() as folder:
        dtype = "float32" if platform == "cpu" else "bfloat16"
        given = bindings(folder, vocabulary=svamp.vocabulary(), examples=examples, DTYPE=dtype)
        config, _ = gin_files.configure(
            "train.TrainConfig", gin_files=[f"gin_configs/{file}.gin" for file in files], bindings=[*given, *extra]
        )
        if batches and Path(batches).exists():
            source, packed = read_batches(Path(batches))
        else:
            source, packed = make_batches(config, Path(folder), examples=examples)
            if batches:
                write_batches(Path(batches), source, packed)
    tokens = [count_tokens(batch) for batch in packed]
    parameters = sum(math.prod(leaf.shape) for leaf in families.abstract(config.model)[1].values())
    if only_write or not Path(work).exists():  # the peer may be reading one that exists
        lora = config.tuning.lora if config.tuning else None
        job = {
            "model": hugging_face.config_json(config.model, dtype="float32"),
            "parameters": parameters,
            "alpha": config.alpha,
            "clip_norm": config.clip_norm,
            "learning_rate": LEARNING_RATE,
            "lora": dataclasses.asdict(lora) if lora else None,
            "batches": [unpacked(batch) for batch in packed],
        }
        Path(work).write_text(json.dumps(job), "utf-8")
    if only_write:
        return {"data": source}
    compiles: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    trainer = prepare(config)
    state = jax.block_until_ready((initial_state if platform == "cpu" else drawn_by_array)(config, trainer))
    trained = sum(x.size for x in state.parameters.values())
    compiles.clear()

    def step(index: int) -> int:
        nonlocal state
        batch = trainer.partitioner.put_batch(packed[index % len(packed)])
        state, _ = jax.block_until_ready(trainer.step(state, batch))
        assert len(compiles) == 1, f"After step {index} the number of compilations is {len(compiles)}; expected 1."
        return tokens[index % len(packed)]

    def finish() -> dict[str, Any]:
        if platform == "cpu":
            return {"peak_memory": harness.peak_memory()}
        return {"peak_memory": jax.devices()[0].memory_stats()["peak_bytes_in_use"]}

    step(0)
    ready = {
        "data": source,
        "parameters": parameters,
        "trained": trained,
        "examples per step": 2 * examples,
        "tokens per step": statistics.mean(tokens),
        "rows": f"{config.batch_size} of {LENGTHS}",
        "compile seconds": round(compiles[0], 1),
    }
    return harness.Worker(step, ready, finish)


def drawn_by_array(config: Any, trainer: Any) -> Any:
    """Draws a model's initial state on one device, array by array, since few arrays differ in shape.

    XLA takes longer to compile all of them together than to compile the step of scanned layers.
    """
    import jax
    import jax.numpy as jnp

    from sbs_jax.student import families
    from sbs_jax.training.step import TrainState, root_key

    _, parameters = families.init(config.model, seed=config.seed)
    optimizer = config.optimizer(learning_rate=config.learning_rate).init(parameters)
    state = TrainState(jnp.int32(0), parameters, optimizer, jnp.int32(0), root_key(config.seed))
    return trainer.stacked(jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, trainer.saved)))


def write_batches(path: Path, source: str, packed: Sequence[Mapping[str, Any]]) -> None:
    """Writes batches of arrays as one .npz file."""
    import numpy as np

    arrays = {f"{number} {name}": array for number, batch in enumerate(packed) for name, array in batch.items()}
    with path.open("wb") as file:  # a path would get another suffix
        np.savez(file, source=source, **arrays)


def read_batches(path: Path) -> tuple[str, list[Any]]:
    """Reads what `write_batches` wrote."""
    import numpy as np

    with np.load(path) as archive:
        arrays = dict(archive)
    source = str(arrays.pop("source"))
    packed: list[dict[str, Any]] = []
    for key, array in arrays.items():
        number, _, name = key.partition(" ")
        if int(number) == len(packed):
            packed.append({})
        packed[-1][name] = array
    return source, packed


def make_batches(config: Any, folder: Path, *, examples: int) -> tuple[str, list[Any]]:
    """Returns the source of the examples, and the first batches with exactly `examples` of each task.

    A packed batch may hold a few more or less.
    """
    from sbs_jax.data import batches, registry, selection

    rows, source = svamp.read()
    svamp.write(folder, train=rows)
    registry.configure(config.data)
    stream = batches.train_dataset(
        config.mixture_or_task_name,
        lengths=config.task_feature_lengths,
        split=selection.TRAIN,
        batch_size=config.batch_size,
        pack=config.pack,
        seed=config.seed,
        skip_batches=0,
    )
    found: list[Any] = []
    for batch in stream:
        of_tasks = [task for _, _, task in unpacked(batch)]
        if of_tasks.count(LABEL) == of_tasks.count(RATIONALE) == examples:
            found.append(batch)
            if len(found) == DIFFERENT_BATCHES:
                break
    return source, found


def unpacked(batch: Mapping[str, Any]) -> list[Example]:
    """Returns the examples of a packed batch (`data.batches.train_dataset`), row by row.

    One row of two: encoder_segment_ids [1, 1, 2, 0] over [7, 1, 9, 0], decoder_segment_ids [1, 2, 2, 0] over
    [5, 6, 1, 0] and decoder_task_ids [1, 2, 2, 0] give ([7, 1], [5], 1) and ([9], [6, 1], 2).
    """
    examples: list[Example] = []
    names = (
        *("encoder_segment_ids", "encoder_input_tokens"),
        *("decoder_segment_ids", "decoder_target_tokens", "decoder_task_ids"),
    )
    for row in zip(*(batch[name].tolist() for name in names), strict=True):
        source_segments, source, target_segments, target, task_ids = row
        for segment in range(1, max(source_segments) + 1):
            places = [i for i, mine in enumerate(target_segments) if mine == segment]
            inputs = [token for token, mine in zip(source, source_segments, strict=True) if mine == segment]
            examples.append((inputs, [target[i] for i in places], task_ids[places[0]]))
    return examples


# ------------------------------------------------------------------------------------------ the peer's side


def peer(
    *, work: str, threads: int | None = None, peft: bool = False, platform: str = "cpu", attention: str = "sdpa"
) -> harness.Worker:
    """Trains Hugging Face's PyTorch model as the method's official code does; with `peft`, PEFT's LoRA alone.

    Per step one forward pass for each task, padded to its own longest example, the two losses weighted by alpha, one
    backward pass, the gradient clipped, AdamW. Imports neither JAX nor TensorFlow, so the peak memory is PyTorch's.

    On a GPU every block of a T5 is compiled (`torch.compile`, by blocks as PyTorch advises for models of many equal
    blocks), in bfloat16 (`autocast`: parameters and the optimizer's state are float32, as ours), and each task's
    batches have one shape, the longest of them all. `attention` is transformers' implementation.
    """
    if threads:
        harness.use_threads(threads)
    # Not `import torch`: the lint and type checks run where it is not installed.
    torch: Any = importlib.import_module("torch")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    job = json.loads(Path(work).read_text("utf-8"))
    compiled = platform == "cuda"
    network = peer_model(job["model"], attention=attention)
    parameters = sum(x.numel() for x in network.parameters() if x.requires_grad)
    if parameters != job["parameters"]:
        raise ValueError(f"The peer has {parameters:,} parameters and ours {job['parameters']:,}; expected as many.")
    if peft:
        network = with_lora(network, job["lora"])
    device = torch.device(platform)
    network = network.to(device)
    trained = [x for x in network.parameters() if x.requires_grad]
    # Fused is the fastest on CPU, and the default of Hugging Face's trainer today.
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)

    def tensors(examples: list[Example], *, least: tuple[int, int]) -> dict[str, Any]:
        if network.config.is_encoder_decoder:
            made = encoder_decoder_batch(examples, least=least)
        else:
            made = decoder_only_batch(examples, start=network.config.decoder_start_token_id)
        return {
            name: torch.tensor(rows, device=device) if isinstance(rows, list) else rows for name, rows in made.items()
        }

    def longest(task: int) -> tuple[int, int]:
        """Returns a task's longest input and target in multiples of 8, for tensor cores: one shape, one program."""
        lengths = [(len(i), len(t)) for batch in job["batches"] for i, t, its_task in batch if its_task == task]
        sources, targets = (-(-max(side) // 8) * 8 for side in zip(*lengths, strict=True))
        return sources, targets

    least = {task: longest(task) if compiled else (0, 0) for task in (LABEL, RATIONALE)}
    batches, tokens = [], []
    for examples in job["batches"]:
        of = {task: [e for e in examples if e[2] == task] for task in (LABEL, RATIONALE)}
        batches.append({task: tensors(found, least=least[task]) for task, found in of.items()})
        tokens.append(sum(len(inputs) + len(targets) for inputs, targets, _ in examples))
    if compiled:
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # programs of one block: encoder and decoder, first and later, tasks
        for block in (*network.encoder.block, *network.decoder.block):
            block.compile()

    def step(index: int) -> int:
        batch = batches[index % len(batches)]
        with torch.autocast(platform, dtype=torch.bfloat16, enabled=compiled):
            label_loss = network(**batch[LABEL]).loss
            rationale_loss = network(**batch[RATIONALE]).loss
        loss = job["alpha"] * label_loss + (1 - job["alpha"]) * rationale_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if compiled:
            torch.cuda.synchronize()
        return tokens[index % len(tokens)]

    def finish() -> dict[str, Any]:
        return {"peak_memory": torch.cuda.max_memory_allocated() if compiled else harness.peak_memory()}

    start = time.perf_counter()
    for index in range(2 if compiled else 1):
        step(index)
    ready = {
        "parameters": parameters,
        "trained": sum(x.numel() for x in trained),
        "examples per step": statistics.mean(map(len, job["batches"])),
        "tokens per step": statistics.mean(tokens),
        "threads": torch.get_num_threads(),
        "attention": network.config._attn_implementation,
        "seconds of the first steps": round(time.perf_counter() - start, 1),
    }
    if compiled:
        ready |= {"padded to": least}
    return harness.Worker(step, ready, finish)


def encoder_decoder_batch(examples: Sequence[Example], *, least: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Returns the arguments of transformers' encoder-decoders; `least` are the least lengths of inputs and targets."""
    inputs = [inputs for inputs, _, _ in examples]
    return {
        "input_ids": harness.padded(inputs, padding=0, least=least[0]),
        "attention_mask": harness.padded([[1] * len(row) for row in inputs], padding=0, least=least[0]),
        "labels": harness.padded([targets for _, targets, _ in examples], padding=IGNORED, least=least[1]),
    }


def decoder_only_batch(examples: Sequence[Example], *, start: int) -> dict[str, Any]:
    """Returns the arguments of transformers' decoders: input, start and target in one row, labels on the target.

    Logits are computed from the end of the shortest input on, since no label is before; `labels` begin there too.
    """
    first = min(len(inputs) for inputs, _, _ in examples)
    rows = harness.padded([[*inputs, start, *targets] for inputs, targets, _ in examples], padding=0)
    labels = [[*[IGNORED] * (len(inputs) + 1 - first), *targets] for inputs, targets, _ in examples]
    return {
        "input_ids": rows,
        "attention_mask": harness.padded([[1] * (len(i) + 1 + len(t)) for i, t, _ in examples], padding=0),
        "labels": harness.padded(labels, padding=IGNORED),
        "logits_to_keep": len(rows[0]) - first,
    }


def peer_model(settings: dict[str, Any], *, attention: str) -> Any:
    """Returns transformers' model of a `config.json`, with random weights; what only images need is frozen."""
    transformers: Any = importlib.import_module("transformers")
    # Only generation needs a cache.
    config = transformers.AutoConfig.for_model(**{**settings, "use_cache": False})
    # transformers 5 ties all tables of every T5, and uses the argument only for the scaling of logits. So they are
    # untied here, and those of encoder and decoder tied again.
    config.tie_word_embeddings = settings["tie_word_embeddings"]
    kind = getattr(transformers, settings["architectures"][0])
    model = kind._from_config(config, attn_implementation=attention).train()
    if settings["model_type"] == "t5":
        model.set_input_embeddings(model.shared)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in OF_IMAGES))
    return model


OF_IMAGES = ("vision_tower", "multi_modal_projector", "eoi_embedding")
NAMES = {"query": "q", "key": "k", "value": "v", "out": "o"}  # of kernels in transformers; others are called as here


def with_lora(model: Any, lora: dict[str, Any]) -> Any:
    """Adds PEFT's LoRA beside the same kernels as ours; all else is frozen."""
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=[NAMES.get(name, name) for name in lora["modules"]],
        bias="none",
        task_type=peft.TaskType.SEQ_2_SEQ_LM,
    )
    return peft.get_peft_model(model, config).train()
