"""Adapters in the form of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`, LoRA or IA3.

Both sides have the same numbers under other names. `encoder/layers/0/attention/query`, [I, O], is PEFT's
`base_model.model.encoder.block.0.layer.0.SelfAttention.q`:

    query/lora/a [I, R]     ..q.lora_A.weight [R, I]
    query/lora/b [R, O]     ..q.lora_B.weight [O, R]
    query/out_scale [O]     ..q.ia3_l [O, 1]
    query/in_scale [I]      ..q.ia3_l [1, I]     where q is among `feedforward_modules`
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.checks import nearest
from sbs_jax.run import manifest
from sbs_jax.storage import atomic, hub, places
from sbs_jax.storage.json_files import brief, part, read_json
from sbs_jax.student import adapters, quantized, t5
from sbs_jax.weights import hugging_face, identity, merging, names, tensor_files
from sbs_jax.weights.arrays import LazyArray, Opened

CONFIG, WEIGHTS, TORCH_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Identity and precision of the base. PEFT has no place for them and ignores the file.
BASE = "sbs_base.json"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.{1,200})\.(lora_A\.weight|lora_B\.weight|ia3_l)")
# Settings that do not change what saved adapters compute. Any other must be empty.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "inference_mode", "fan_in_fan_out"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config"),
    *("init_ia3_weights", "ensure_weight_tying", "runtime_config"),
    *("loftq_config", "corda_config", "lora_ga_config"),  # initializations, chosen by init_lora_weights
}
_READ = {"LORA": ("r", "lora_alpha", "lora_dropout", "init_lora_weights"), "IA3": ("feedforward_modules",)}
# Initializations that leave the base unchanged.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_TASK = "SEQ_2_SEQ_LM"


def is_directory(path: str | Path) -> bool:
    """Detects a PEFT directory that does not also hold a whole model."""
    path = Path(path)
    return (path / CONFIG).is_file() and not (path / hugging_face.CONFIG).is_file()


# ------------------------------------------------------------------------------------ writing


def write(path: str | Path, opened: Opened, *, base: str | None) -> None:
    """Writes a directory that `PeftModel.from_pretrained` loads, in float32; `base` is the base's path stored in it.

    ValueError names what PEFT cannot hold. The directory appears when it is complete.
    """
    settings, arrays = contents(opened, owner=str(path))
    tuning = opened.tuning
    assert tuning is not None
    kept = adapters.abstract(opened.config, tuning).shapes
    quantized_modules = [ours for ours in _modules(opened.t5("PEFT's form")).values() if f"{ours}/kernel" not in kept]
    with atomic.new_folder(places.of(path)) as folder:
        name = None if base is None else hub.parse(base)
        said = {"base_model_name_or_path": base} if name is None else _of_hub(name)
        hugging_face.write_json(folder / CONFIG, {**said, **settings})
        tensor_files.write_safetensors(folder / WEIGHTS, arrays, dtype=np.dtype(np.float32))
        stored = {"base": opened.base, "held": tuning.base, "quantized": quantized_modules}
        hugging_face.write_json(folder / BASE, stored)
        if opened.origin is not None:
            hugging_face.write_json(folder / hugging_face.ORIGIN, manifest.without_paths(opened.origin))


def _of_hub(name: hub.Name) -> dict[str, Any]:
    return {"base_model_name_or_path": name.repository, "revision": name.revision}


def contents(opened: Opened, *, owner: str) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """Converts a run's adapters to PEFT's settings and arrays. ValueError for those that PEFT cannot hold."""
    tuning = opened.tuning
    if tuning is None:
        raise ValueError(f"{owner} has no adapters: everything was trained. Convert it --to hf.")
    own = adapters.base_names(opened.config)
    whole = sorted(name for name in opened.arrays if name in own)
    extra = merging.without_place(opened)
    if whole or extra:
        what = [f"trained parameters of the base ({whole[0]})"] if whole else []
        what += [f"{merging.kinds(extra)} ({extra[0]})"] if extra else []
        raise ValueError(
            f"{owner} has {' and '.join(what)}, for which PEFT's LoRA and IA3 have no place."
            f"{'' if extra else ' sbs convert --to hf writes base and adapters as one student.'}"
        )
    if tuning.lora is not None and tuning.ia3 is not None:
        raise ValueError(f"{owner} has both LoRA and IA3; a PEFT directory holds one kind.")
    theirs = {ours: module for module, ours in _modules(opened.t5("PEFT's form")).items()}
    ends: dict[str, set[str]] = {}
    arrays: dict[str, LazyArray] = {}
    for name, array in opened.arrays.items():
        module, end = next((name.removesuffix(f"/{end}"), end) for end in merging.OF_KERNEL if name.endswith(end))
        ends.setdefault(theirs[module], set()).add(end)
        ending, shaped = _exported(end, array)
        arrays[f"{_PREFIX}{theirs[module]}.{ending}"] = shaped
    both = [module for module, found in ends.items() if {"in_scale", "out_scale"} <= found]
    if both:
        raise ValueError(f"{both[0]} has factors on both sides; PEFT's IA3 has one for each module.")
    common = {"task_type": _TASK, "inference_mode": True, "fan_in_fan_out": False, "modules_to_save": None}
    targets = _shortest(list(ends), theirs.values())
    if tuning.lora is not None:
        alpha = tuning.lora.alpha
        return {
            "peft_type": "LORA",
            "r": tuning.lora.rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": tuning.lora.dropout,
            "target_modules": targets,
            "bias": "none",
            "init_lora_weights": True,
            **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), False),
            **common,
        }, arrays
    inner = [module for module, found in ends.items() if "in_scale" in found]
    feedforward = _shortest(inner, theirs.values())
    if not set(feedforward) <= set(targets):  # PEFT requires the same names in both lists
        targets, feedforward = list(ends), inner
    settings = {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": feedforward}
    return {**settings, "init_ia3_weights": True, **common}, arrays


def _exported(end: str, array: LazyArray) -> tuple[str, LazyArray]:
    if end.startswith("lora/"):
        return f"lora_{end[-1].upper()}.weight", array.transposed()
    shape = (1, -1) if end == "in_scale" else (-1, 1)
    return "ia3_l", LazyArray.of(array.whole().reshape(shape))


def _modules(config: t5.T5Config) -> dict[str, str]:
    """Maps PEFT's names of modules with kernels to ours."""
    table = names.of([name for name in names.parameters(config) if name.endswith("/kernel")])
    return {name.hugging_face.removesuffix(".weight"): name.ours.removesuffix("/kernel") for name in table}


def _shortest(modules: Collection[str], all_modules: Collection[str]) -> list[str]:
    """Lists ends of names if they select exactly these modules, full names otherwise."""
    ends = sorted({module.rpartition(".")[2] for module in modules})
    return ends if set(_selected(ends, all_modules)) == set(modules) else sorted(modules)


def _selected(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Selects modules by PEFT's rule: a full name, or the end of one after a dot."""
    listed = [str(each) for each in targets]
    return [module for module in modules if module in listed or module.endswith(tuple(f".{end}" for end in listed))]


# ------------------------------------------------------------------------------------ reading


def open_directory(path: str | Path, *, base: Opened, base_identity: Mapping[str, Any]) -> Opened:
    """Opens a directory as the adapters of a run over `base`, of that identity.

    ValueError for settings that are not supported (by name), arrays that do not fit the base, and an export of ours
    made from another base.
    """
    path = Path(path)
    settings = hugging_face.read_object(path / CONFIG)
    _check_settings(path, settings)
    known = _known_base(path)
    if known is not None:
        identity.check(base_identity, known, owner=str(path))
    modules = _modules(base.t5("PEFT's form"))
    arrays: dict[str, LazyArray] = {}
    found: dict[str, set[str]] = {}
    for key, array in _stored(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path}: {brief(key)} is not part of LoRA or IA3 on a kernel of a T5; expected names such as "
                f"{_PREFIX}{next(iter(modules))}.lora_A.weight."
            )
        module = modules.get(match[1], "")
        if not module.startswith(names.STACKS):
            raise ValueError(
                f"{path}: {part(match[1])} is not a kernel of {base_identity['path']}'s layers; give the base of these "
                f"adapters.{nearest(match[1], modules)}"
            )
        end, arranged = _imported(path, match[1], match[2], array, settings)
        arrays[f"{module}/{end}"] = arranged
        found.setdefault(end, set()).add(match[1])
    _check_complete(path, settings, found, modules)
    ours = {end: {modules[each] for each in of} for end, of in found.items()}
    kernels = [module for module in modules.values() if module.startswith(names.STACKS)]
    tuning = _tuning(path, settings, ours, kernels=kernels, known=known)
    shapes = adapters.abstract(base.config, tuning).shapes
    for name, array in arrays.items():
        if array.shape != shapes[name].shape:
            raise ValueError(
                f"{path} does not fit {base_identity['path']}: {name} is {list(array.shape)}; expected "
                f"{list(shapes[name].shape)}. Give the base that the adapters were trained on."
            )
    origin = hugging_face.origin_beside(path) or base.origin
    # The base's vocabulary, never a path from the directory: it would be copied.
    return Opened(
        *(base.config, arrays), vocabulary=base.vocabulary, origin=origin, tuning=tuning, base=dict(base_identity)
    )


def said_base(path: str | Path) -> str | None:
    """Returns the base that the settings name; None if they name none."""
    said = hugging_face.read_object(Path(path) / CONFIG).get("base_model_name_or_path")
    return part(said) if isinstance(said, str) else None


def _stored(path: Path) -> dict[str, LazyArray]:
    if (path / WEIGHTS).is_file():
        return tensor_files.read_safetensors(path / WEIGHTS)
    if (path / TORCH_WEIGHTS).is_file():
        return tensor_files.read_torch(path / TORCH_WEIGHTS)
    raise FileNotFoundError(f"{path} has no weights: expected {WEIGHTS} or {TORCH_WEIGHTS}.")


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(f"{path / CONFIG}: peft_type is {brief(kind)}; expected one of {', '.join(_READ)}.")
    if task not in (None, _TASK):
        raise ValueError(f"{path / CONFIG}: task_type is {brief(task)}; expected {_TASK}, the kind of a T5.")
    read = {"peft_type", "task_type", "target_modules", *_READ[kind]}
    for name, value in settings.items():
        if name not in _IDLE | read and value not in (None, False, "none", {}, []):
            raise ValueError(
                f"{path / CONFIG}: {part(repr(name))} is {brief(value)}, which is not read here. Merge the adapters "
                "with PEFT (merge_and_unload, save_pretrained), and convert that model."
            )
    beginning = settings.get("init_lora_weights")
    if kind == "LORA" and not any(beginning is each or beginning == each for each in _BEGINNINGS):
        raise ValueError(
            f"{path / CONFIG}: 'init_lora_weights' is {brief(beginning)}, which changes the base before training. Save "
            "with PEFT's path_initial_model_for_weight_conversion, or merge with PEFT and convert that model."
        )


def _known_base(path: Path) -> dict[str, Any] | None:
    """Reads our export's record of the base; None for a directory that PEFT saved."""
    if not (path / BASE).is_file():
        return None
    value = read_json(path / BASE)
    try:
        known = {"seed": None, **value["base"], "held": value["held"], "quantized": value["quantized"]}
        texts = [known["fingerprint"], known["held"], *known["quantized"], known["path"] or ""]
        if all(isinstance(text, str) for text in texts):
            return known
    except (KeyError, TypeError):
        pass
    raise ValueError(f"{path / BASE}: got {brief(value)}; expected what sbs convert --to peft writes. Remove it.")


def _imported(
    path: Path, module: str, ending: str, array: LazyArray, settings: Mapping[str, Any]
) -> tuple[str, LazyArray]:
    """Converts one array: (end of our name, the array in our shape)."""
    where = f"{path}: {part(module)}.{ending}"
    of = "LORA" if ending.startswith("lora") else "IA3"
    if of != settings["peft_type"]:
        raise ValueError(f"{where} is {of}'s, and {CONFIG} says peft_type {settings['peft_type']}.")
    if len(array.shape) != 2:
        raise ValueError(f"{where} has the shape {array.shape}; expected two dimensions.")
    if of == "LORA":
        rank, is_a = settings.get("r"), ending == "lora_A.weight"
        stored = array.shape[0 if is_a else 1]
        if stored != rank:
            raise ValueError(f"{where} {list(array.shape)} is of rank {stored}, and {CONFIG} says r {brief(rank)}.")
        return ("lora/a" if is_a else "lora/b"), array.transposed()
    listed = settings.get("feedforward_modules")
    inner = array.shape[0] == 1
    denied = isinstance(listed, list) and inner != bool(_selected(listed, [module]))
    if 1 not in array.shape or denied:
        raise ValueError(
            f"{where} has the shape {list(array.shape)}, and feedforward_modules are {brief(listed)}; expected "
            "[1, rows] for those and [columns, 1] for others."
        )
    return ("in_scale" if inner else "out_scale"), LazyArray.of(array.whole().reshape(-1))


def _targets(path: Path, settings: Mapping[str, Any]) -> list[str] | None:
    """Reads the names of modules; None for a pattern. Patterns come from outside and could run forever."""
    value = settings.get("target_modules")
    if isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{path / CONFIG}: target_modules is {brief(value)}; expected names of modules, or a pattern.")
    return value


def _check_complete(
    path: Path, settings: Mapping[str, Any], found: Mapping[str, set[str]], modules: Collection[str]
) -> None:
    """Requires both halves of every LoRA, and weights for every module that the settings select."""
    halves = found.get("lora/a", set()) ^ found.get("lora/b", set())
    if halves:
        raise ValueError(f"{path}: {sorted(halves)[0]} has one of lora_A and lora_B; expected both.")
    every = set().union(*found.values())
    if not every:
        raise ValueError(f"{path} holds no adapters.")
    if any(settings.get(name) for name in ("exclude_modules", "layers_to_transform")):
        return
    targets = _targets(path, settings)
    missing = set() if targets is None else set(_selected(targets, modules)) - every
    if missing:
        raise ValueError(
            f"{path}: target_modules is {brief(targets)}, and {len(missing)} modules that it selects have no weights, "
            f"such as {sorted(missing)[0]}. The file is incomplete, or the base is another one."
        )


def _tuning(
    path: Path,
    settings: Mapping[str, Any],
    found: Mapping[str, set[str]],
    *,
    kernels: Collection[str],
    known: Mapping[str, Any] | None,
) -> adapters.Tuning:
    """Builds the `Tuning` of exactly these adapters; `known` is our export's record of the base, if there is one."""

    def patterns(chosen: Collection[str]) -> tuple[str, ...]:
        """Names ends of names if they select exactly the chosen kernels, full names otherwise."""
        ends = sorted({module.rpartition("/")[2] for module in chosen})
        short = {module for module in kernels if module.rpartition("/")[2] in ends}
        return tuple(ends if short == set(chosen) else sorted(chosen))

    known = known or {"held": "float32", "quantized": []}
    fields: dict[str, Any] = {"base": known["held"]}
    if known["held"] in quantized.FORMS:
        foreign = sorted(set(known["quantized"]) - set(kernels))
        if foreign:
            raise ValueError(
                f"{path / BASE}: {part(foreign[0])} is not a kernel of the base's layers. Remove the file."
            )
        fields["quantized"] = patterns(known["quantized"])
    try:
        if settings["peft_type"] == "IA3":
            outputs, inputs = (patterns(found.get(end, set())) for end in ("out_scale", "in_scale"))
            return adapters.Tuning(**fields, ia3=adapters.IA3(outputs=outputs, inputs=inputs))
        alpha, dropout = settings.get("lora_alpha", 8), settings.get("lora_dropout", 0.0)
        for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
            if type(value) not in (int, float) or not -(2**31) < value < 2**31:
                raise ValueError(f"{name} is {brief(value)}; expected a number.")
        modules = patterns(found["lora/a"])
        lora = adapters.LoRA(rank=settings["r"], alpha=float(alpha), dropout=float(dropout), modules=modules)
        return adapters.Tuning(**fields, lora=lora)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
