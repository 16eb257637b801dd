"""Answers of PyTorch and Hugging Face's transformers to the cases of parity_cases.py. Needs both."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import parity_cases as cases

from sbs_jax.weights import hugging_face

# Not `import torch`: the type checks run where it is not installed.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")


def load(folder: str | Path) -> Any:
    """Loads a model of a directory, float32, for inference."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    if model.config.model_type == "umt5":
        # transformers 5 takes every UMT5 for tied and scales its logits; the published ones are not tied.
        model.config.tie_word_embeddings = False
    return model


def exported(case: str, folder: Path) -> Any:
    """Loads the case's model through our export."""
    hugging_face.write(folder, cases.opened(cases.config(case)), dtype="float32")
    return load(folder)


def answers(model: Any) -> dict[str, np.ndarray]:
    """Computes logits of given targets, and what greedy and beam search generate (0 after the end)."""
    source = torch.from_numpy(cases.source()).long()
    mask = (source != 0).long()
    with torch.no_grad():
        inputs = torch.from_numpy(cases.shifted(cases.target())).long()
        logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs).logits.numpy()
    found = {"logits": logits}
    asked = {"greedy": (cases.source(), 1), "beam": (cases.source(), cases.BEAMS)}
    asked["more_beam"] = (cases.more_sources(), cases.BEAMS)
    for name, (tokens, beams) in asked.items():
        source = torch.from_numpy(tokens).long()
        made = model.generate(
            input_ids=source,
            attention_mask=(source != 0).long(),
            max_new_tokens=cases.LENGTH,
            num_beams=beams,
            do_sample=False,
        )
        found[name] = _ended(made.numpy()[:, 1:])
    return found


def _ended(sequences: np.ndarray) -> np.ndarray:
    """Zeros after the first EOS, where transformers leaves zeros or, in a beam, further EOS."""
    after = np.cumsum(sequences == 1, axis=1) - (sequences == 1) > 0
    return cases.fitted(np.where(after, 0, sequences)).astype(np.int32)


def training(model: Any) -> dict[str, np.ndarray]:
    """Makes ten updates: losses, and the weights after the first and the last, by their names there."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cases.PEAK_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / cases.STEPS)
    losses, found = [], {}
    for step in range(1, cases.STEPS + 1):
        mean = {}
        for task, (source, target) in cases.training_rows().items():
            ids, labels = torch.from_numpy(source).long(), torch.from_numpy(target).long()
            labels = labels.masked_fill(labels == 0, -100)
            mean[task] = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        loss = cases.ALPHA * mean["label"] + (1 - cases.ALPHA) * mean["rationale"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step in (1, cases.STEPS):
            for name, weights in model.named_parameters():
                found[f"weights_{step}/{name}"] = weights.detach().numpy().copy()
    model.eval()
    return found | {"losses": np.array(losses, np.float64)}
