"""Parameter-efficient tuning: LoRA, bottlenecks, prompts, prefixes, IA3, BitFit, and quantized frozen weights.

A `Tuning` (bound by gin; gin_configs/adapters/) may combine several of them. Patterns select kernels: a regular
expression that matches the whole name of a module (`encoder/layers/0/attention/query`) or its end after a slash
(`query`, `attention/(query|value)`).

    X positions of a prompt or prefix   R rank of a LoRA   W width of a bottleneck; other letters as in t5.py
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sbs_jax import checks
from sbs_jax.student import families, layers, quantized, stacking, stacks
from sbs_jax.student.partitioning import gather

BASES = ("float32", "bfloat16", *quantized.FORMS)
_ATTENTIONS = ("attention", "self_attention", "encoder_decoder_attention")
ALL = (".*",)  # kernels of the layers: query, key, value, out, wi or wi_0 and wi_1, wo
# Prompts and prefixes start as random words from the 5,000 most frequent vocabulary pieces (Lester et al., 2021),
# which follow padding, end and unknown.
_WORD_IDS = range(3, 5003)


# ------------------------------------------------------------------------------------ kinds of tuning


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank update, `W + alpha / rank * A B` (Hu et al., 2021).

    A [I, R] starts uniform as in PEFT, B [R, O] as zeros. `dropout` applies to the input of A. `modules` are patterns
    of kernels.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    modules: Sequence[str] = ("query", "value")

    def __post_init__(self) -> None:
        checks.whole_number("LoRA.rank", self.rank, least=1)
        checks.number("LoRA.alpha", self.alpha, above=0.0)
        checks.number("LoRA.dropout", self.dropout, least=0.0, below=1.0)
        _check_patterns(self, "modules")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """Bottleneck after every sub-layer, before the residual sum: `y + up(act(down(y)))` (Houlsby et al., 2019).

    `up` [W, D] starts as zeros. Both matrices have no bias, like every matrix of a student.
    """

    width: int
    activation: str = "gelu"

    def __post_init__(self) -> None:
        checks.whole_number("Bottleneck.width", self.width, least=1)
        checks.choice("Bottleneck.activation", self.activation, layers.ACTIVATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt of `length` vectors [X, D], initially words, before the embedded source (Lester et al., 2021)."""

    length: int

    def __post_init__(self) -> None:
        checks.whole_number("Prompt.length", self.length, least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Prefix of `length` keys and values [X, J] for every attention (prefix tuning, Li and Liang, 2021).

    They start as the keys and values of words, and are trained directly (the paper trains a network that generates
    them). `attentions` are patterns: attention, self_attention, encoder_decoder_attention.
    """

    length: int
    attentions: Sequence[str] = _ATTENTIONS

    def __post_init__(self) -> None:
        checks.whole_number("Prefix.length", self.length, least=0)
        _check_patterns(self, "attentions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3:
    """Factors on each column of `key` and `value` and each row of `wo`, initially 1 (IA3, Liu et al., 2022)."""

    outputs: Sequence[str] = ("key", "value")
    inputs: Sequence[str] = ("wo",)

    def __post_init__(self) -> None:
        _check_patterns(self, "outputs", "inputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biases:
    """Bias [O] for each kernel, initially zeros (BitFit, Zaken et al., 2021, for a model without biases).

    To train T5's relative position biases, set `Tuning.trained = (".*relpos_bias.*",)`.
    """

    modules: Sequence[str] = ALL

    def __post_init__(self) -> None:
        _check_patterns(self, "modules")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Choice of the trained parameters and of the frozen ones' precision. Parts that are None are not used.

    `trained` are patterns of the base's own parameters (".*layer_norm/scale"). `last_layers` trains that many layers at
    the end of both stacks, with the final norms. All other parameters of the base are frozen, in the precision `base`:
    "float32"; "bfloat16"; or "int8" or "nf4" for kernels of the layers that match `quantized`, with all other matrices
    in bfloat16.
    """

    base: str = "float32"
    quantized: Sequence[str] = ALL
    trained: Sequence[str] = ()
    last_layers: int = 0
    lora: LoRA | None = None
    bottleneck: Bottleneck | None = None
    prompt: Prompt | None = None
    prefix: Prefix | None = None
    ia3: IA3 | None = None
    biases: Biases | None = None

    def __post_init__(self) -> None:
        checks.choice("Tuning.base", self.base, BASES)
        checks.whole_number("Tuning.last_layers", self.last_layers, least=0)
        _check_patterns(self, "quantized", "trained")
        if not any((self.trained, self.last_layers, *(getattr(self, name) is not None for name in PARTS))):
            raise ValueError(
                "Tuning trains nothing; give it one of trained, last_layers, lora, bottleneck, prompt, prefix, ia3 and "
                "biases (gin_configs/adapters/), or leave it out to train everything."
            )

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> "Tuning | None":
        """Inverts `dataclasses.asdict`, also after a JSON round trip."""
        if saved is None:
            return None
        parts = {name: None if saved[name] is None else part(**saved[name]) for name, part in PARTS.items()}
        return cls(**{**saved, **parts})


PARTS = {"lora": LoRA, "bottleneck": Bottleneck, "prompt": Prompt, "prefix": Prefix, "ia3": IA3, "biases": Biases}


def _check_patterns(owner: Any, *names: str) -> None:
    """Turns patterns into a tuple (gin and JSON give lists) and checks that each compiles."""
    for name in names:
        patterns = getattr(owner, name)
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"{type(owner).__name__}.{name} is {patterns!r}; expected patterns: ['query', 'value'].")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{type(owner).__name__}.{name}: {pattern!r} is not a regular expression ({error})."
                ) from error
        object.__setattr__(owner, name, tuple(patterns))


# ------------------------------------------------------------------------------------ modules


class LoRAModule(nnx.Module):
    """Branch `x A B * alpha / rank` beside a dense layer."""

    def __init__(self, dense: layers.Dense, shape: tuple[int, int], *, lora: LoRA) -> None:
        self.axes = ((dense.axes[0], "adapter"), ("adapter", dense.axes[1]))
        self.a = nnx.Param(jnp.zeros((shape[0], lora.rank), jnp.float32), axes=self.axes[0])
        self.b = nnx.Param(jnp.zeros((lora.rank, shape[1]), jnp.float32), axes=self.axes[1])
        self.scaling = lora.alpha / lora.rank
        self.rate = lora.dropout

    def __call__(
        self, x: Float[Array, "... I"], *, dtype: str, dropout: layers.Dropout | None
    ) -> Float[Array, "... O"]:
        if dropout is not None:
            x = dropout.at_rate(self.rate, x)
        a, b = (gather(each[...].astype(dtype), axes) for each, axes in zip((self.a, self.b), self.axes, strict=True))
        return layers.matmul(layers.matmul(x, a), b) * self.scaling

    def matrix(self, in_scale: nnx.Param | None) -> Float[Array, "I O"]:
        """Returns the branch as one matrix, its rows scaled by IA3's factors on inputs."""
        a = self.a[...] if in_scale is None else self.a[...] * in_scale[...][:, None]
        return jnp.matmul(a, self.b[...], precision=jax.lax.Precision.HIGHEST) * self.scaling


_DOWN, _UP = ("embed", "adapter"), ("adapter", "embed")


class BottleneckModule(nnx.Module):
    """Bottleneck `y + up(act(down(y)))` after a sub-layer."""

    def __init__(self, config: families.ModelConfig, *, bottleneck: Bottleneck) -> None:
        width, narrow = config.emb_dim, bottleneck.width
        self.down = nnx.Param(jnp.zeros((width, narrow), jnp.float32), axes=_DOWN)
        self.up = nnx.Param(jnp.zeros((narrow, width), jnp.float32), axes=_UP)
        self.activation = bottleneck.activation

    def __call__(self, y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        down = gather(self.down[...].astype(y_BTD.dtype), _DOWN)
        up = gather(self.up[...].astype(y_BTD.dtype), _UP)
        return y_BTD + layers.matmul(layers.ACTIVATIONS[self.activation](layers.matmul(y_BTD, down)), up)


class PromptModule(nnx.Module):
    """Trained vectors before the embedded source."""

    def __init__(self, config: families.ModelConfig, *, prompt: Prompt) -> None:
        self.embedding = nnx.Param(jnp.zeros((prompt.length, config.emb_dim), jnp.float32), axes=("adapter", "embed"))
        self.length = prompt.length

    def prepend_to(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B P D"]:
        return stacks.prepend(self.embedding[...], x_BSD)


class PrefixModule(nnx.Module):
    """Trained keys and values that precede an attention's own."""

    def __init__(self, config: families.ModelConfig, *, prefix: Prefix) -> None:
        shape = (prefix.length, config.num_kv_heads * config.head_dim)
        self.key = nnx.Param(jnp.zeros(shape, jnp.float32), axes=("adapter", "joined_kv"))
        self.value = nnx.Param(jnp.zeros(shape, jnp.float32), axes=("adapter", "joined_kv"))

    def prepend_to(
        self, k_BSHK: Float[Array, "B S H K"], v_BSHK: Float[Array, "B S H K"]
    ) -> tuple[Float[Array, "B P H K"], Float[Array, "B P H K"]]:
        def one(prefix: nnx.Param, x_BSHK: Array) -> Array:
            return stacks.prepend(prefix[...].reshape(-1, *x_BSHK.shape[2:]), x_BSHK)

        return one(self.key, k_BSHK), one(self.value, v_BSHK)


# ------------------------------------------------------------------------------------ attaching


def attach(model: families.Model, tuning: Tuning) -> None:
    """Adds the tuning's modules to a model and replaces kernels by quantized ones. `init` computes their values.

    ValueError if a pattern matches nothing, a rank exceeds a kernel's dimensions, or a kernel cannot be quantized.
    """
    kernels, attentions = _layer_modules(model, layers.Dense), _layer_modules(model, layers.Attention)
    if tuning.base in quantized.FORMS:
        _quantize(model, kernels, tuning)
    if tuning.lora is not None:
        for name in matching(tuning.lora.modules, kernels, what="LoRA.modules"):
            shape = _shape(kernels[name])
            if tuning.lora.rank > min(shape):
                raise ValueError(
                    f"LoRA.rank is {tuning.lora.rank}, above the smaller dimension of {name} {list(shape)}; expected "
                    f"far less than {min(shape)}, such as 8."
                )
            kernels[name].lora = LoRAModule(kernels[name], shape, lora=tuning.lora)
    if tuning.ia3 is not None:
        for patterns, side, attribute in ((tuning.ia3.outputs, 1, "out_scale"), (tuning.ia3.inputs, 0, "in_scale")):
            for name in matching(patterns, kernels, what=f"IA3.{'outputs' if side else 'inputs'}"):
                ones = jnp.ones((_shape(kernels[name])[side],), jnp.float32)
                setattr(kernels[name], attribute, nnx.Param(ones, axes=(kernels[name].axes[side],)))
    if tuning.biases is not None:
        for name in matching(tuning.biases.modules, kernels, what="Biases.modules"):
            zeros = jnp.zeros((_shape(kernels[name])[1],), jnp.float32)
            kernels[name].bias = nnx.Param(zeros, axes=(kernels[name].axes[1],))
    if tuning.bottleneck is not None:
        for layer in (layer for stack in model.stacks.values() for layer in stack.layers):
            for attribute in ("attention", "self_attention", "encoder_decoder_attention", "mlp"):
                if hasattr(layer, attribute):
                    module = BottleneckModule(model.config, bottleneck=tuning.bottleneck)
                    setattr(layer, f"{attribute}_adapter", module)
    if tuning.prefix is not None:
        chosen = tuning.prefix.attentions
        # A decoder-only student has but one of the three kinds.
        names = attentions if chosen == _ATTENTIONS else matching(chosen, attentions, what="Prefix.attentions")
        for name in names:
            if tuning.prefix.length:
                attentions[name].prefix = PrefixModule(model.config, prefix=tuning.prefix)
    if tuning.prompt is not None and tuning.prompt.length:
        model.prompt = PromptModule(model.config, prompt=tuning.prompt)


def _quantize(model: families.Model, kernels: Mapping[str, layers.Dense], tuning: Tuning) -> None:
    table = "token_embedder"
    own = [
        pattern
        for pattern in tuning.quantized
        if _matches(pattern, table) and not any(_matches(pattern, name) for name in kernels)
    ]
    if own:
        tied = ", also the matrix of the logits" if model.config.logits_via_embedding else ""
        raise ValueError(
            f"Tuning.quantized has {own[0]!r}, the embedding table{tied}, which is not quantized but stored in "
            f"bfloat16. Expected kernels of the layers: {', '.join(_short_names(kernels))}."
        )
    for name in matching(tuning.quantized, kernels, what="Tuning.quantized"):
        if _is_trained(tuning, f"{name}/kernel", model.config):
            continue
        dense, shape = kernels[name], _shape(kernels[name])
        if tuning.base == quantized.NF4 and shape[0] % quantized.BLOCK:
            raise ValueError(
                f"{name} {list(shape)} cannot be stored in nf4: {shape[0]} rows do not divide into blocks of "
                f"{quantized.BLOCK}. Use int8, or leave it out of Tuning.quantized."
            )
        kernel = quantized.Kernel(shape, form=tuning.base, axes=dense.axes)
        delattr(dense, "kernel")
        dense.kernel = kernel


def _shape(dense: layers.Dense) -> tuple[int, int]:
    if isinstance(dense.kernel, quantized.Kernel):
        return dense.kernel.shape
    rows, columns = dense.kernel.shape
    return rows, columns


def _layer_modules(model: families.Model, kind: type[nnx.Module]) -> dict[str, Any]:
    """Returns the modules of this class in the layers of both stacks, by name."""
    modules = ((path, module) for path, module in nnx.iter_modules(model) if isinstance(module, kind))
    return {"/".join(map(str, path)): module for path, module in modules if "layers" in path}


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*/)?(?:{pattern})", name) is not None


def matching(patterns: Iterable[str], names: Collection[str], *, what: str) -> list[str]:
    """Returns the names that match any of the patterns, in order. ValueError if a pattern matches none."""
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            short = _short_names(names)
            raise ValueError(
                f"{what} has {pattern!r}, which matches nothing.{checks.nearest(pattern, [*short, *names])} Expected "
                f"one of {', '.join(short)}, or a full name such as {next(iter(names), 'none')}."
            )
    return [name for name in names if any(_matches(pattern, name) for pattern in patterns)]


def _short_names(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition("/")[2] for name in names})


# ------------------------------------------------------------------------------------ trained and frozen


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Student with its tuning: structure, shapes and logical axes of all parameters, and names of the trained ones."""

    structure: families.Structure
    shapes: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str, ...]]
    trained: frozenset[str]

    def split(self, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits a dictionary with the parameters' names into (trained, frozen)."""
        trained = {name: value for name, value in parameters.items() if name in self.trained}
        return trained, {name: value for name, value in parameters.items() if name not in self.trained}


def abstract(
    config: families.ModelConfig, tuning: Tuning | None, *, execution: stacks.Execution = stacks.UNROLLED
) -> Adapted:
    """Describes the student like `families.abstract`, with the tuning attached; without one everything is trained."""
    adapted = _abstract(config, tuning, execution)  # cached: building a model of shapes takes a second
    return dataclasses.replace(adapted, shapes=dict(adapted.shapes), axes=dict(adapted.axes))


@functools.lru_cache(maxsize=64)
def _abstract(config: families.ModelConfig, tuning: Tuning | None, execution: stacks.Execution) -> Adapted:
    if tuning is None:
        structure, shapes, axes = families.abstract(config, execution=execution)
        return Adapted(structure, shapes, axes, frozenset(shapes))
    _, base, _ = families.abstract(config)
    if tuning.last_layers > min(config.stack_layers.values()):
        raise ValueError(
            f"Tuning.last_layers is {tuning.last_layers}; expected at most the layers of each stack, "
            f"{' and '.join(map(str, config.stack_layers.values()))}."
        )
    matching(tuning.trained, base, what="Tuning.trained")
    change = functools.partial(attach, tuning=tuning)
    _, unrolled, _ = families.abstract(config, change=change)
    trained = {name for name in unrolled if _is_new(name, base) or _is_trained(tuning, name, config)}
    if execution.layers == "scanned":
        trained = _trained_stacks(unrolled, trained)
    structure, shapes, axes = families.abstract(config, execution=execution, change=change)
    for name, leaf in shapes.items():
        if name not in trained:
            shapes[name] = jax.ShapeDtypeStruct(leaf.shape, _frozen_dtype(name, leaf, tuning))
    return Adapted(structure, shapes, axes, frozenset(trained))


def _frozen_dtype(name: str, leaf: jax.ShapeDtypeStruct, tuning: Tuning) -> Any:
    """Returns the dtype of a frozen parameter; small ones (not matrices) stay in float32."""
    is_matrix = leaf.ndim - stacking.is_stacked(name) >= 2 and not name.endswith("rel_embedding")
    rounds = tuning.base != "float32" and is_matrix and leaf.dtype == jnp.float32
    return jnp.dtype(jnp.bfloat16) if rounds else leaf.dtype


def _is_new(name: str, base: Collection[str]) -> bool:
    # The parts of a quantized kernel, `../query/kernel/codes`, belong to the base like `../query/kernel`.
    return name not in base and name.rpartition("/")[0] not in base


def _is_trained(tuning: Tuning, name: str, config: families.ModelConfig) -> bool:
    """Returns True if this parameter of the base is trained."""
    if any(_matches(pattern, name) for pattern in tuning.trained):
        return True
    if not tuning.last_layers:
        return False
    side, _, rest = name.partition("/")
    layers = config.stack_layers.get(side, 0)
    match = re.match(r"layers/(\d+)/", rest)
    return rest == f"{side}_norm/scale" or (match is not None and int(match[1]) >= layers - tuning.last_layers)


def _trained_stacks(unrolled: Mapping[str, Any], trained: Collection[str]) -> set[str]:
    """Returns the trained names of stacked layers. ValueError if a stack's layers are tuned differently."""
    groups = stacking.stacks(unrolled)
    layers: dict[str, int] = {}
    for name, of in groups.items():
        side = name.partition("/")[0]
        layers[side] = max(layers.get(side, 0), len(of))
    found = set()
    for name, of in groups.items():
        alike = not stacking.is_stacked(name) or len(of) == layers[name.partition("/")[0]]
        if not alike or len({each in trained for each in of}) > 1 or len({unrolled[each].shape for each in of}) > 1:
            raise ValueError(
                f"Tuning treats the layers of a stack differently ({of[0]}), but scanned layers are one array. "
                'Set LAYERS = "unrolled", or choose modules of all layers.'
            )
        if of[0] in trained:
            found.add(name)
    return found


# ------------------------------------------------------------------------------------ values


def init(
    config: families.ModelConfig,
    tuning: Tuning,
    base: Mapping[str, jax.Array],
    *,
    structure: families.Structure,
    seed: int,
) -> dict[str, jax.Array]:
    """Initializes all attached parameters, by name; `base` holds the others by unrolled names. Traceable."""
    shapes = abstract(config, tuning).shapes
    new = {name: leaf for name, leaf in shapes.items() if name not in base}
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in new.items()}
    model = families.join(structure, {**base, **zeros})
    length = max((each.length for each in (tuning.prompt, tuning.prefix) if each is not None), default=0)
    words_XD = jnp.take(model.token_embedder.embedding[...], _random_words(length, config, seed=seed), axis=0)
    words_XD = words_XD if config.embedding_scale == 1.0 else words_XD * config.embedding_scale
    values = {name: _initial_value(name, leaf, seed=seed) for name, leaf in new.items()}
    if tuning.prompt is not None and tuning.prompt.length:
        values["prompt/embedding"] = words_XD[: tuning.prompt.length].astype(jnp.float32)
    if tuning.prefix is not None and tuning.prefix.length:
        for name, attention in _layer_modules(model, layers.Attention).items():
            if attention.prefix is not None:
                normed_BXD = _norm_before(model, name)(words_XD[None, : tuning.prefix.length])
                for side, kernel in (("key", attention.key), ("value", attention.value)):
                    found_BXJ = jnp.matmul(normed_BXD.astype(jnp.float32), kernel.matrix().astype(jnp.float32))
                    values[f"{name}/prefix/{side}"] = found_BXJ[0]
    return values


def _initial_value(name: str, leaf: jax.ShapeDtypeStruct, *, seed: int) -> jax.Array:
    """Initializes one parameter, with a key from its name, so that its values do not depend on other parameters."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    end = name.rpartition("/")[2]
    if end == "a":  # like PEFT, which uses PyTorch's default for a linear layer
        bound = leaf.shape[0] ** -0.5
        return jax.random.uniform(key, leaf.shape, jnp.float32, -bound, bound)
    if end == "down":
        return jax.random.normal(key, leaf.shape, jnp.float32) * leaf.shape[0] ** -0.5
    return jnp.ones(leaf.shape, leaf.dtype) if end in ("in_scale", "out_scale") else jnp.zeros(leaf.shape, leaf.dtype)


def _random_words(count: int, config: families.ModelConfig, *, seed: int) -> np.ndarray:
    pieces = np.arange(_WORD_IDS.start, min(_WORD_IDS.stop, config.vocab_size))
    return np.random.default_rng(seed).choice(pieces, count, replace=count > len(pieces))


def _norm_before(model: families.Model, attention: str) -> Any:
    """Returns the norm whose output feeds an attention's keys and values."""
    side, _, index, kind = attention.split("/")
    if kind == "encoder_decoder_attention":
        return getattr(model.stacks["encoder"], "encoder_norm")  # noqa: B009  (one family's stack has no such norm)
    return getattr(model.stacks[side].layers[int(index)], f"pre_{kind}_layer_norm")


def freeze(
    name: str, value: jax.Array, *, shapes: Mapping[str, jax.ShapeDtypeStruct], form: str
) -> dict[str, jax.Array]:
    """Converts a parameter of the base to its stored form: cast, or the parts of a quantized kernel. Traceable."""
    if name in shapes:
        return {name: value.astype(shapes[name].dtype)}
    return {f"{name}/{part}": array for part, array in quantized.quantize(value, form=form).items()}


@functools.cache
def base_names(config: families.ModelConfig) -> tuple[str, ...]:
    """Returns the names of a student's parameters without any tuning."""
    return tuple(families.abstract(config)[1])


# ------------------------------------------------------------------------------------ descriptions


def title(tuning: Tuning) -> str:
    """Describes a tuning in a few words: "LoRA of rank 8 (.*); base in nf4"."""
    lora, bottleneck, prompt, prefix = tuning.lora, tuning.bottleneck, tuning.prompt, tuning.prefix
    parts = [
        lora and f"LoRA of rank {lora.rank} ({', '.join(lora.modules)})",
        bottleneck and f"bottlenecks of width {bottleneck.width}",
        prompt and f"a prompt of {prompt.length}",
        prefix and f"prefixes of {prefix.length}",
        tuning.ia3 and "IA3",
        tuning.biases and "biases",
        tuning.last_layers and f"the last {tuning.last_layers} layers of both stacks",
        *tuning.trained,
    ]
    return f"{', '.join(part for part in parts if part)}; base in {tuning.base}"


def summary(config: families.ModelConfig, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    """Formats the line that a run logs at its start: counts and bytes of trained and frozen parameters."""
    own = families.abstract(config)[1]
    total = sum(math.prod(leaf.shape) for leaf in own.values())

    def size(tree: Mapping[str, Any]) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.values())

    count = sum(math.prod(leaf.shape) for leaf in trained.values())
    others = sum(math.prod(leaf.shape) for name, leaf in own.items() if name not in trained)
    # Weights, their gradients and two moments of Adam, all float32.
    now, full = 4 * size(trained) + size(frozen), 16 * total
    return (
        f"Trained: {count:,} parameters ({count / total:.2%} of the base's), {_megabytes(size(trained))}; frozen: "
        f"{others:,}, {_megabytes(size(frozen))}. With gradients and two moments {_megabytes(now)}, where training all "
        f"takes {_megabytes(full)}: {1 - now / full:.0%} less."
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
