"""Decoder-only students against transformers: logits, gradients, greedy and beam search."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import decoders

from sbs_jax.student import decoding, families

pytestmark = [
    pytest.mark.parity,
    # torch's and transformers' own warnings, of which each release has others
    pytest.mark.filterwarnings("ignore"),
]
torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-parity` installs it")
pytest.importorskip("transformers", reason="transformers is not installed; `make test-parity` installs it")
transformers: Any = importlib.import_module("transformers")

# Ours in a layer: theirs. Kernels are transposed there.
MODULES = {
    **{f"self_attention/{ours}": f"self_attn.{ours[0]}_proj" for ours in ("query", "key", "value")},
    "self_attention/out": "self_attn.o_proj",
    "self_attention/query_norm": "self_attn.q_norm",
    "self_attention/key_norm": "self_attn.k_norm",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
    "pre_self_attention_layer_norm": "input_layernorm",
}
NORMS = {"pre_mlp_layer_norm": "post_attention_layernorm"}
SANDWICH = {
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
}
LENGTH, BEAMS = 8, 3


def theirs(config):
    """Makes the same architecture in transformers, without weights of ours."""
    c = config
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.emb_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.layer_norm_epsilon,
        "tie_word_embeddings": c.logits_via_embedding,
        "attention_dropout": 0.0,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": c.eos_id,
        "max_position_embeddings": 64,
    }
    if c.window is not None:
        full, sliding = ({"rope_type": "default", "rope_theta": base} for base in (c.rope_base, c.local_rope_base))
        if c.rope_factor != 1.0:
            full = {**full, "rope_type": "linear", "factor": c.rope_factor}
        layers = ["full_attention" if c.is_global(i) else "sliding_attention" for i in range(c.num_layers)]
        return transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **sizes,
                sliding_window=c.window,
                layer_types=layers,
                query_pre_attn_scalar=round(c.query_scale**-2),
                rope_parameters={"full_attention": full, "sliding_attention": sliding},
            )
        )
    kind = "Qwen3" if c.qk_norm else "Llama"
    made = getattr(transformers, f"{kind}Config")(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": c.rope_base}
    )
    return getattr(transformers, f"{kind}ForCausalLM")(made)


def name_of(ours, config):
    """Returns their name of a parameter, and whether it is transposed there."""
    if ours == "logits_dense/kernel":
        return "lm_head.weight", True
    if ours == "token_embedder/embedding":
        return "model.embed_tokens.weight", False
    if ours == "decoder/decoder_norm/scale":
        return "model.norm.weight", False
    _, _, number, module, kind = *ours.split("/", 3)[:3], *ours.split("/", 3)[3].rsplit("/", 1)
    modules = {**MODULES, **(SANDWICH if config.post_norms else NORMS)}
    return f"model.layers.{number}.{modules[module]}.weight", kind == "kernel"


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def pair(request):
    config = decoders.config(request.param)
    parameters = decoders.parameters(config)
    model = theirs(config).eval()
    state = {}
    for ours, values in parameters.items():
        name, transposed = name_of(ours, config)
        state[name] = torch.from_numpy(np.array(values.T if transposed else values))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return config, parameters, model


def rows():
    random = np.random.default_rng(0)
    source, target = (random.integers(4, 40, size=(4, length)).astype(np.int32) for length in (7, 5))
    source[1, 5:], source[2, 3:] = 0, 0
    return source, target


def prompts(config, source):
    """Yields each row without padding, with the first decoder input after it."""
    for row in source:
        yield torch.tensor([[*row[row > 0].tolist(), config.decoder_start]])


def test_logits_and_gradients_are_those_of_transformers(pair):
    config, parameters, model = pair
    source, target = rows()
    structure = families.abstract(config)[0]
    decoder_inputs = np.pad(target, ((0, 0), (1, 0)))[:, :-1]

    def loss_of(parameters):
        logits = families.join(structure, parameters)(jnp.asarray(source), jnp.asarray(decoder_inputs))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)
        return -jnp.mean(chosen), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(parameters)
    losses = []
    for row, wanted, prompt in zip(logits, target, prompts(config, source), strict=True):
        ids = torch.cat([prompt, torch.from_numpy(wanted[None, :-1]).long()], dim=1)
        found = model(input_ids=ids).logits[0, prompt.shape[1] - 1 :]
        np.testing.assert_allclose(row, found.detach().numpy(), rtol=0, atol=1e-5)
        losses.append(torch.nn.functional.cross_entropy(found, torch.from_numpy(wanted).long()))
    total = torch.stack(losses).mean()
    total.backward()
    np.testing.assert_allclose(loss, total.item(), rtol=1e-6)
    named = dict(model.named_parameters())
    for ours, values in gradients.items():
        name, transposed = name_of(ours, config)
        theirs_ = named[name].grad.numpy()
        np.testing.assert_allclose(values.T if transposed else values, theirs_, rtol=0, atol=1e-5, err_msg=ours)


@pytest.mark.parametrize("beams", [1, BEAMS])
def test_generation_is_that_of_transformers(pair, beams):
    config, parameters, model = pair
    source, _ = rows()
    student = families.join(families.abstract(config)[0], parameters)
    if beams == 1:
        found = jax.jit(lambda x: decoding.greedy(student, x, length=LENGTH)[0])(jnp.asarray(source))
    else:
        found = jax.jit(lambda x: decoding.beam_search(student, x, length=LENGTH, beams=beams)[0])(jnp.asarray(source))
    for row, prompt in zip(np.asarray(found), prompts(config, source), strict=True):
        made = model.generate(prompt, max_new_tokens=LENGTH, num_beams=beams, do_sample=False)
        want = made[0, prompt.shape[1] :].tolist()
        np.testing.assert_array_equal(row, want + [0] * (LENGTH - len(want)))
