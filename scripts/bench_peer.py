"""The peer's side of scripts/bench.py: Hugging Face's PyTorch T5, trained as the method's official code trains it.

Per step one forward pass for each task, padded to its own longest example, the two losses weighted by alpha, one
backward pass, the gradient clipped, AdamW. Imports neither JAX nor TensorFlow, so the peak memory is PyTorch's.

On a GPU every block is compiled (`torch.compile`, by blocks as PyTorch advises for models of many alike), in bfloat16
(`autocast`: parameters and the optimiser's state are float32, as ours), and each task's batches have one shape, the
longest of them all.
"""

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

from sbs_jax import bench

LABEL, RATIONALE = 1, 2  # ids of the tasks
IGNORED = -100  # as a target: padding, which the loss leaves out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, help="CPUs to keep to")
    parser.add_argument("--work", required=True)
    parser.add_argument("--peft", action="store_true", help="train PEFT's LoRA alone, like that of the work")
    parser.add_argument("--platform", default="cpu", choices=("cpu", "cuda"), help="cuda: bfloat16, torch.compile")
    parser.add_argument("--attention", default="sdpa", choices=("eager", "sdpa"), help="of transformers, with cuda")
    arguments = parser.parse_args()
    stream = bench.protocol()
    if arguments.threads:
        bench.use_threads(arguments.threads)
    # Not `import torch`: the lint and type checks run where it is not installed.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    work = json.loads(Path(arguments.work).read_text("utf-8"))
    shape = work["model"]
    config = transformers.T5Config(
        vocab_size=shape["vocab_size"],
        d_model=shape["emb_dim"],
        d_kv=shape["head_dim"],
        d_ff=shape["mlp_dim"],
        num_heads=shape["num_heads"],
        num_layers=shape["num_encoder_layers"],
        num_decoder_layers=shape["num_decoder_layers"],
        dropout_rate=shape["dropout_rate"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=shape["logits_via_embedding"],
        decoder_start_token_id=0,
        use_cache=False,  # what only generation needs
    )
    # transformers 5 ties all tables of every T5, and takes the argument for the scaling of logits alone. So they are
    # untied here, and those of encoder and decoder tied again.
    config.tie_word_embeddings = shape["logits_via_embedding"]
    if arguments.platform == "cuda":
        config._attn_implementation = arguments.attention
    model = transformers.T5ForConditionalGeneration(config).train()
    model.set_input_embeddings(model.shared)
    parameters = sum(x.numel() for x in model.parameters())
    if parameters != work["parameters"]:
        raise ValueError(f"The peer has {parameters:,} parameters and ours {work['parameters']:,}; expected as many.")
    if arguments.peft:
        model = with_lora(model, work["lora"])
    device = torch.device(arguments.platform)
    model = model.to(device)
    trained = [x for x in model.parameters() if x.requires_grad]
    # Fused is the fastest on CPU, and what Hugging Face's trainer takes today.
    optimizer = torch.optim.AdamW(trained, lr=work["learning_rate"], weight_decay=0.0, fused=True)

    def tensors(examples: list[bench.Example], *, least: tuple[int, int]) -> dict[str, Any]:
        inputs = torch.tensor(bench.padded([inputs for inputs, _, _ in examples], padding=0, least=least[0]))
        targets = torch.tensor(bench.padded([targets for _, targets, _ in examples], padding=IGNORED, least=least[1]))
        tensors = {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": targets}
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def longest(task: int) -> tuple[int, int]:
        """Of all batches, in eights: for one compiled program, whose tensor cores take eights."""
        lengths = [(len(i), len(t)) for batch in work["batches"] for i, t, its_task in batch if its_task == task]
        sources, targets = (-(-max(side) // 8) * 8 for side in zip(*lengths, strict=True))
        return sources, targets

    compiled = arguments.platform == "cuda"
    least = {task: longest(task) if compiled else (0, 0) for task in (LABEL, RATIONALE)}
    batches, tokens = [], []
    for examples in work["batches"]:
        of = {task: [e for e in examples if e[2] == task] for task in (LABEL, RATIONALE)}
        batches.append({task: tensors(found, least=least[task]) for task, found in of.items()})
        tokens.append(sum(len(inputs) + len(targets) for inputs, targets, _ in examples))

    if compiled:
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # programs of one block: encoder and decoder, first and later, tasks
        for block in (*model.encoder.block, *model.decoder.block):
            block.compile()

    def step(index: int) -> int:
        batch = batches[index % len(batches)]
        with torch.autocast(arguments.platform, dtype=torch.bfloat16, enabled=compiled):
            label_loss = model(**batch[LABEL]).loss
            rationale_loss = model(**batch[RATIONALE]).loss
        loss = work["alpha"] * label_loss + (1 - work["alpha"]) * rationale_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, work["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if compiled:
            torch.cuda.synchronize()
        return tokens[index % len(tokens)]

    start = time.perf_counter()
    for index in range(2 if compiled else 1):
        step(index)
    first = time.perf_counter() - start
    ready = {
        "parameters": parameters,
        "trained": sum(x.numel() for x in trained),
        "examples per step": statistics.mean(map(len, work["batches"])),
        "tokens per step": statistics.mean(tokens),
        "threads": torch.get_num_threads(),
        "seconds of the first steps": round(first, 1),
    }
    if compiled:
        ready |= {"padded to": least, "attention": model.config._attn_implementation}
    peak = torch.cuda.max_memory_allocated if compiled else bench.peak_memory
    bench.serve(step, ready=ready, stream=stream, peak_memory=peak)


NAMES = {"query": "q", "key": "k", "value": "v", "out": "o"}  # of kernels there; others are called as here


def with_lora(model: Any, lora: dict[str, Any]) -> Any:
    """The model with PEFT's LoRA beside the same kernels; all else is frozen."""
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


if __name__ == "__main__":
    main()
