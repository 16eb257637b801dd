"""T5Gemma 2 and T5Gemma against transformers: logits, gradients, an update, decoding, and files both ways."""

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import decoders

from sbs_jax.student import decoding, families
from sbs_jax.weights import hugging_face, names, opening
from sbs_jax.weights.arrays import LazyArray
from sbs_jax.weights.t5gemma_settings import text_only

pytestmark = [
    pytest.mark.parity,
    # torch's and transformers' own warnings, of which each release has others
    pytest.mark.filterwarnings("ignore"),
]
torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-parity` installs it")
pytest.importorskip("transformers", reason="transformers is not installed; `make test-parity` installs it")
transformers: Any = importlib.import_module("transformers")

LENGTH, BEAMS = 8, 3
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}


def config_of(kind: str) -> Any:
    """Returns the architecture of the tests; positions of layers that see all are scaled as in T5Gemma 2."""
    return decoders.config(kind, **({"rope_factor": 8.0} if kind == "t5gemma2" else {}))


def theirs(kind: str) -> Any:
    """Makes the architecture in transformers as its users do, every parameter random."""
    c = config_of(kind)
    stack = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.emb_dim,
        "intermediate_size": c.mlp_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "query_pre_attn_scalar": round(c.query_scale**-2),
        "sliding_window": c.window,
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logits_cap,
        "bos_token_id": c.decoder_start,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
    }
    if kind == "t5gemma2":
        full = {"rope_type": "linear", "factor": c.rope_factor, "rope_theta": c.rope_base}
        sliding = {"rope_type": "default", "rope_theta": c.local_rope_base}
        stack["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    encoder, decoder = (
        {**stack, "num_hidden_layers": count, "layer_types": layers[:count]} for count in c.stack_layers.values()
    )
    if kind == "t5gemma2":
        encoder = {"text_config": encoder, "vision_config": _VISION, "mm_tokens_per_image": 4}
        made = transformers.T5Gemma2Config(encoder=encoder, decoder=decoder)
        model = transformers.T5Gemma2ForConditionalGeneration._from_config(made, attn_implementation="eager")
    else:
        made = transformers.T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=c.vocab_size)
        model = transformers.T5GemmaForConditionalGeneration._from_config(made, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


@pytest.fixture(scope="module", params=decoders.ENCODER_DECODERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Their model, and what our reader finds where it was saved."""
    folder = tmp_path_factory.mktemp("theirs") / request.param
    model = theirs(request.param)
    model.save_pretrained(folder)
    return request.param, model, opening.open_any(folder)


def ours(opened: Any) -> tuple[Any, families.Parameters]:
    structure = families.abstract(opened.config)[0]
    return structure, {name: jnp.asarray(opened.arrays[name].whole()) for name in names.parameters(opened.config)}


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Sources of 9, 6, 3 and 9 tokens, and targets of 7, 7, 4 and 2."""
    random = np.random.default_rng(0)
    source, target = (random.integers(4, 40, size=(4, length)).astype(np.int32) for length in (9, 7))
    source[1, 6:], source[2, 3:], target[2, 4:], target[3, 2:] = 0, 0, 0, 0
    return source, target


def their_logits(model: Any, source: np.ndarray, target: np.ndarray) -> Any:
    started = np.concatenate([np.full_like(target[:, :1], model.config.bos_token_id), target[:, :-1]], axis=1)
    return model(
        input_ids=torch.from_numpy(source).long(),
        attention_mask=torch.from_numpy(source > 0).long(),
        decoder_input_ids=torch.from_numpy(started).long(),
    ).logits


def our_logits(structure: Any, parameters: families.Parameters, source: np.ndarray, target: np.ndarray) -> Any:
    inputs = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    return families.join(structure, parameters)(jnp.asarray(source), jnp.asarray(inputs))


def our_loss(logits: Any, target: np.ndarray) -> Any:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(target)[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * (target > 0)) / np.sum(target > 0)


def their_loss(logits: Any, target: np.ndarray) -> Any:
    labels = torch.from_numpy(target).long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)


def test_the_reader_finds_the_architecture(pair: Any) -> None:
    kind, _, opened = pair
    assert opened.config == config_of(kind)


def test_logits_are_those_of_transformers(pair: Any) -> None:
    _, model, opened = pair
    source, target = rows()
    structure, parameters = ours(opened)
    found = jax.jit(lambda p: our_logits(structure, p, source, target))(parameters)
    with torch.no_grad():
        expected = their_logits(model, source, target).numpy()
    is_target = target > 0
    np.testing.assert_allclose(found[is_target], expected[is_target], rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_gradients_and_an_update_are_those_of_pytorch(pair: Any) -> None:
    kind, _, opened = pair
    model = theirs(kind)
    source, target = rows()
    structure, parameters = ours(opened)

    def compute(parameters: families.Parameters) -> Any:
        return our_loss(our_logits(structure, parameters, source, target), target)

    loss, gradients = jax.jit(jax.value_and_grad(compute))(parameters)
    total = their_loss(their_logits(model, source, target), target)
    total.backward()
    np.testing.assert_allclose(loss, total.item(), rtol=1e-6)

    def found(of: Any) -> dict[str, np.ndarray]:
        """Their tensors under our names."""
        named = {name: value for name, parameter in model.named_parameters() if (value := of(parameter)) is not None}
        arrays, _ = text_only({name: LazyArray.of(x.numpy()) for name, x in named.items()})
        renamed, unknown = names.renamed(arrays, names.T5GEMMA)
        assert not unknown
        return {name: array.whole() for name, array in renamed.items()}

    expected = found(lambda parameter: parameter.grad)
    assert set(expected) == set(gradients)
    for name, values in gradients.items():
        bound = 3e-5 * np.abs(expected[name]).max()
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=max(bound, 1e-6), err_msg=name)
    torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.0).step()
    optimizer = optax.adamw(1e-3, eps=1e-4, weight_decay=0.0)
    updates: Any = optimizer.update(gradients, optimizer.init(parameters), parameters)[0]
    expected = found(lambda parameter: parameter.detach())
    for name, update in updates.items():
        error = np.linalg.norm(parameters[name] + update - expected[name]) / np.linalg.norm(update)
        assert error < 2e-4, name


@pytest.mark.parametrize("beams", [1, BEAMS])
def test_generation_is_that_of_transformers(pair: Any, beams: int) -> None:
    _, model, opened = pair
    source, _ = rows()
    student = families.join(*ours(opened))
    if beams == 1:
        found = jax.jit(lambda x: decoding.greedy(student, x, length=LENGTH)[0])(jnp.asarray(source))
    else:
        found = jax.jit(lambda x: decoding.beam_search(student, x, length=LENGTH, beams=beams)[0])(jnp.asarray(source))
    made = model.generate(
        torch.from_numpy(source).long(),
        attention_mask=torch.from_numpy(source > 0).long(),
        max_new_tokens=LENGTH,
        num_beams=beams,
        do_sample=False,
    ).numpy()[:, 1:]
    np.testing.assert_array_equal(found, np.pad(made, ((0, 0), (0, LENGTH - made.shape[1]))))


def test_an_export_is_the_same_there_and_comes_back(pair: Any, tmp_path: Path) -> None:
    _, model, opened = pair
    hugging_face.write(tmp_path / "ours", opened, dtype="float32")
    again, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        before, after = (their_logits(each, *rows()).numpy() for each in (model, again.eval()))
    np.testing.assert_array_equal(before, after)
    again.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = opening.open_any(tmp_path / folder)
        assert back.config == opened.config
        for name, array in opened.arrays.items():
            np.testing.assert_array_equal(back.arrays[name].whole(), array.whole())
