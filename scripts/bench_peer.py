"""The peer's side of scripts/bench.py: Hugging Face's PyTorch T5, trained as the method's official code trains it.

Per step one forward pass for each task, padded to its own longest example, the two losses weighted by alpha, one
backward pass, the gradient clipped, AdamW. Imports neither JAX nor TensorFlow, so the peak memory is PyTorch's.
"""

import argparse
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

from sbs_jax import bench

LABEL, RATIONALE = 1, 2  # ids of the tasks
IGNORED = -100  # as a target: padding, which the loss leaves out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--peft", action="store_true", help="train PEFT's LoRA alone, like that of the work")
    arguments = parser.parse_args()
    stream = bench.protocol()
    bench.use_threads(arguments.threads)
    # Not `import torch`: the lint and type checks run where it is not installed.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
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
    )
    # transformers 5 ties all tables of every T5, and takes the argument for the scaling of logits alone. So they are
    # untied here, and those of encoder and decoder tied again.
    config.tie_word_embeddings = shape["logits_via_embedding"]
    model = transformers.T5ForConditionalGeneration(config).train()
    model.set_input_embeddings(model.shared)
    parameters = sum(x.numel() for x in model.parameters())
    if parameters != work["parameters"]:
        raise ValueError(f"The peer has {parameters:,} parameters and ours {work['parameters']:,}; expected as many.")
    if arguments.peft:
        model = with_lora(model, work["lora"])
    trained = [x for x in model.parameters() if x.requires_grad]
    # Fused is the fastest on CPU, and what Hugging Face's trainer takes today.
    optimizer = torch.optim.AdamW(trained, lr=work["learning_rate"], weight_decay=0.0, fused=True)

    def tensors(examples: list[bench.Example]) -> dict[str, Any]:
        inputs = torch.tensor(bench.padded([inputs for inputs, _, _ in examples], padding=0))
        targets = torch.tensor(bench.padded([targets for _, targets, _ in examples], padding=IGNORED))
        return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": targets}

    batches, tokens = [], []
    for examples in work["batches"]:
        batches.append({task: tensors([e for e in examples if e[2] == task]) for task in (LABEL, RATIONALE)})
        tokens.append(sum(len(inputs) + len(targets) for inputs, targets, _ in examples))

    def step(index: int) -> int:
        batch = batches[index % len(batches)]
        label_loss = model(**batch[LABEL]).loss
        rationale_loss = model(**batch[RATIONALE]).loss
        loss = work["alpha"] * label_loss + (1 - work["alpha"]) * rationale_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, work["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return tokens[index % len(tokens)]

    step(0)
    ready = {
        "parameters": parameters,
        "trained": sum(x.numel() for x in trained),
        "examples per step": statistics.mean(map(len, work["batches"])),
        "tokens per step": statistics.mean(tokens),
        "threads": torch.get_num_threads(),
    }
    bench.serve(step, ready=ready, stream=stream)


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
