"""`sbs plan`: reading the compiler's text, counting operations, tables of chips, and the command itself."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import toy
from builders import decoders

from sbs_jax import chips
from sbs_jax.cli import main
from sbs_jax.plan import command, compiler, hlo, table, worker
from sbs_jax.student import families, flops

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed: pip install libtpu")

ROOT = Path(__file__).resolve().parents[1]

MODULE = (Path(__file__).parent / "goldens" / "scheduled.hlo").read_text("utf-8")


def test_cycles_are_summed_with_loops_as_often_as_they_run():
    program = hlo.read(MODULE)
    # Insides of fusions, conditions of loops and the compiler's "unknown" are not added.
    assert program.cycles == 3 * (5 * 10 + 100) + 1000 + 20000 + 300000
    assert [(loop.body, loop.trips, loop.cycles) for loop in program.loops] == [
        *(("decode", None, 1000), ("body", 3, 150), ("inner_body", 5, 10))
    ]


def test_what_has_no_estimate_is_listed():
    assert hlo.read(MODULE).without_estimate == {"custom-call tpu_custom_call": 1, "rng-bit-generator": 1}


def test_collectives_by_kind_bytes_and_group():
    found = hlo.read(MODULE).collectives
    seen = [(c.kind, c.count, c.bytes, c.group, c.moved, c.overlapped, c.loop) for c in found]
    assert seen == [
        ("all-reduce", 1, 4096, 2, 4096.0, False, None),  # 2 x 1/2 of it
        ("reduce-scatter", 1, 4096, 4, 3 * 4096.0, False, None),  # three pieces are sent on
        ("all-gather", 1, 4096, 4, 3072.0, True, None),  # beside computation, and found in two fusions
        ("collective-permute", 1, 4096, 1, 4096.0, True, None),
        ("all-gather", 3, 16384, 4, 12288.0, False, "body"),
    ]
    assert found[-1].arrays == ("f32[32,128]",)
    assert found[-1].op_name == "jit(step)/while/body/dot"
    assert hlo.read(MODULE).by_kind()["all-gather"] == {"count": 4, "bytes": 53248, "moved": 39936.0}


def test_exchanges_between_slices_are_told_apart():
    text = """ENTRY %main (p0: f32[8,128]) -> f32[] {
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%p0), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %recv = (f32[8,128]{1,0}, u32[], token[]) recv(%t), channel_id=1
}
"""
    (one,) = hlo.read(text, slices=4).collectives
    assert (one.kind, one.across_slices, one.group, one.bytes, one.moved) == ("all-reduce", True, 4, 4096, 6144.0)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}", 8),
        ("replica_groups=mesh['data'=2,'fsdp'=8] {'data','fsdp'}", 16),
        ("replica_groups=mesh['all'=16] {'all':(2)4}", 4),
        ("dimensions={0}", 1),
    ],
)
def test_sizes_of_groups(groups, size):
    text = f"ENTRY %main (p0: f32[8]) -> f32[8] {{\n  ROOT %a = f32[8]{{0}} all-reduce(%p0), {groups}\n}}\n"
    (one,) = hlo.read(text).collectives
    assert one.group == size


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("constant(9)", "constant(9)", 5),  # 0, 2, 4, 6, 8
        ("constant(9)", "constant(8)", 4),
        ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(3)", 3),
        ('direction=LT, backend_config={"estimated_cycles":"999"}\n}\n\n%inner', "direction=GT\n}\n\n%inner", None),
        ("add(%i, %two)", "multiply(%i, %two)", None),
        ("tuple(%start, %gather)", "tuple(%gather, %gather)", None),
    ],
)
def test_trips_of_a_loop_follow_from_its_condition(old, new, trips):
    assert old in MODULE
    loops = {loop.body: loop.trips for loop in hlo.read(MODULE.replace(old, new)).loops}
    assert loops == {"inner_body": trips, "body": 3, "decode": None}


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="without an ENTRY"):
        hlo.read("HloModule nothing\n")


def test_model_flops_by_hand():
    config = dataclasses.replace(
        toy.MODEL, vocab_size=100, emb_dim=8, num_heads=2, head_dim=3, mlp_dim=5, num_encoder_layers=2
    )
    # Per layer: projections of 8 x 6 = 48; the MLP's three matrices of 40.
    encoder, decoder, cross = 4 * 48 + 120, 4 * 48 + 2 * 48 + 120, 2 * 48
    source, target = 7 * 11, 7 * 13
    matrices = 6 * (2 * encoder * source + cross * source + decoder * target + 8 * 100 * target)
    attention = 12 * 7 * 6 * (2 * 11 * 11 + 13 * 13 + 13 * 11)
    assert flops.training_flops(config, rows=7, inputs=11, targets=13) == matrices + attention
    # v1.0 has one branch in its MLP.
    plain = dataclasses.replace(config, mlp_activations=("relu",))
    less = flops.training_flops(config, rows=7, inputs=11, targets=13)
    less -= flops.training_flops(plain, rows=7, inputs=11, targets=13)
    assert less == 6 * 40 * (2 * source + target)


@pytest.mark.parametrize("kind", ["t5", *decoders.ALL])
def test_model_flops_are_those_of_the_matrices_in_the_model(kind):
    """Compares with three times XLA's count of a forward pass, which includes norms, softmax and activations."""
    wide = {"emb_dim": 256, "mlp_dim": 512, "dropout_rate": 0.0}
    config = dataclasses.replace(toy.MODEL, **wide) if kind == "t5" else decoders.config(kind, **wide, head_dim=64)
    structure, shapes, _ = families.abstract(config)
    tokens = [jax.ShapeDtypeStruct((4, n), "int32") for n in (64, 48)]
    lowered = jax.jit(lambda p, s, t: families.join(structure, p)(s, t)).lower(shapes, *tokens)
    counted = (lowered.cost_analysis() or {})["flops"]
    mine = flops.training_flops(config, rows=4, inputs=64, targets=48) / 3
    assert mine < counted < 1.12 * mine


def test_the_table_of_chips_is_whole():
    known = chips.known()
    assert set(known) >= {"v4", "v5e", "v5p", "v6e", "tpu7x"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", chips.table()["date"])
    assert "memory" in chips.table()["sources"]["prices"]
    for chip in known.values():
        assert 0.4e9 < chip.clock < 2.5e9
        assert 0.9 * chip.memory_gib < chip.available_gib * chip.devices < 1.02 * chip.memory_gib
        assert 0 < chip.three_years < chip.on_demand
        assert chip.network < chip.links


@pytest.mark.parametrize("name", [f"{c}:{s}" for c, chip in chips.known().items() for s in chip.shapes[:5]])
def test_libtpu_knows_every_topology_of_the_table(name):
    topology = chips.topology(name)
    assert len(topology.describe()) == topology.chips * topology.chip.devices


def test_slices():
    topology = chips.topology("v5e:2x2", slices=3)
    assert (topology.chips, topology.title) == (12, "3 x v5e:2x2")
    assert {device.slice_index for device in topology.describe()} == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:44", r"Did you mean 'v5e:4x4'"),
        ("v5e-8x8", r"Did you mean 'v5e:8x8'"),
        ("v5litepod:4x4", r"v5e: 1x1 2x2 2x4"),
        ("", "Unknown topology ''"),
        ("v5p:4x4", "expected 3 sizes"),
        ("v5e:0x4", "at least 1"),  # libtpu itself ends the process with a division by zero
    ],
)
def test_unknown_topologies_are_explained(name, message):
    with pytest.raises(ValueError, match=message):
        chips.topology(name)


def test_a_shape_that_libtpu_refuses_lists_those_on_offer():
    with pytest.raises(ValueError, match=r"not divisible by .*Shapes of v5e: 1x1, 2x2"):
        chips.topology("v5e:3x3").describe()


def test_reading_agrees_with_a_real_compilation():
    """Cycles of a scan of 7 products, added up by hand from the lines of its text."""
    devices = chips.topology("v5e:1x1").describe()
    place = jax.sharding.SingleDeviceSharding(devices[0])

    def products(x):
        return jax.lax.scan(lambda carry, _: (jax.numpy.sin(carry @ x), None), x, None, length=7)[0] @ x

    x = jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=place)
    text = jax.jit(products).lower(x).compile().as_text() or ""
    program = hlo.read(text)
    bodies = re.findall(r"^(?:ENTRY )?%([\w.\-]+) .*?\n(.*?)^}", text, flags=re.MULTILINE | re.DOTALL)
    cycles = {name: sum(map(int, re.findall(r'"estimated_cycles":"(\d{1,18})"', body))) for name, body in bodies}
    (loop,) = program.loops
    (entry,) = re.findall(r"^ENTRY %([\w.\-]+)", text, flags=re.MULTILINE)
    assert loop.trips == 7
    assert 0 < loop.cycles == cycles[loop.body]
    assert program.cycles == cycles[entry] + 7 * loop.cycles


FSDP = {"slice": 1, "data": 1, "fsdp": -1, "tensor": 1}


def candidate(**changes):
    defaults = {"topology": "v5e:2x2", "slices": 1, "mesh": FSDP, "batch_size": 8, "micro_batches": 1}
    return worker.Candidate(**{**defaults, "steps": worker.STEPS, **changes})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return toy.config(Path("none"), toy.write_records(tmp_path_factory.mktemp("records")))


TINY = (
    "--gin_file=gin_configs/experiments/svamp/cpu.gin",
    "--gin_file=gin_configs/meshes/fsdp.gin",
    *(f"--gin.t5.T5Config.{name}={getattr(toy.MODEL, name)}" for name in ("vocab_size", "emb_dim", "num_heads")),
    *(f"--gin.t5.T5Config.{name}={getattr(toy.MODEL, name)}" for name in ("head_dim", "mlp_dim")),
    *(f"--gin.t5.T5Config.num_{stack}_layers=1" for stack in ("encoder", "decoder")),
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 20, 'targets': 16}",
    "--gin.MAX_DECODE_LENGTH=8",
)


@pytest.fixture(scope="module")
def planned(starter, tmp_path_factory):
    """Runs the command with JSON output from an empty folder, in a process that starts another to compile."""
    folder, empty = tmp_path_factory.mktemp("plan"), tmp_path_factory.mktemp("empty")
    command = ["plan", *TINY, "--topology=v5e:2x2", "--examples=720", "--json"]
    as_users_have_it = dict.fromkeys(("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR"))
    done = starter.run(folder, command, cwd=empty, environment=as_users_have_it)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "compiling for v5e:2x2, mesh fsdp=all, 1 micro-batch ..\n"
    assert list(empty.iterdir()) == []
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_command_needs_no_paths_and_prints_json_alone(planned):
    (one,) = planned["candidates"]
    assert one["fits"] is True
    assert set(one["steps"]) == set(worker.STEPS)
    # 2 x 720 examples; 4 to a row (the experiment's macro), 8 rows to an update.
    assert planned["epoch"]["updates"] == one["epoch"]["updates"] == 45
    assert one["run"]["updates"] == 500
    assert planned["suggestion"] == {"smallest": 0, "cheapest": 0, "fastest": 0}
    text = table.text(planned)
    assert "v5e:2x2, 4 chips of 1 host, mesh fsdp=4, 1 micro-batch" in text


@pytest.mark.slow
def test_memory_is_told_apart_by_what_it_holds(planned):
    (one,) = planned["candidates"]
    assert (one["chips"], one["hosts"], one["mesh"]["fsdp"]) == (4, 1, 4)
    training = one["steps"]["train"]
    memory = training["memory"]
    shapes, axes = families.abstract(toy.MODEL)[1:]
    assert planned["configuration"]["parameters"] == sum(leaf.size for leaf in shapes.values())
    cut = sum(leaf.size * 4 // (4 if "embed" in axes[name] else 1) for name, leaf in shapes.items())
    assert memory["parameters"] == cut
    # On one host, of the whole: parameters, and two of each for AdamW.
    whole = 4 * 3 * planned["configuration"]["parameters"]
    assert whole <= one["checkpoint_bytes"] <= whole + 16
    assert "Checkpoint: 0.0 GB, 0.0 GB a host. To be saved within a notice of 30 s, each host must write 0 MB/s." in (
        table.text(planned)
    )
    # AdamW: two of each, and three counts.
    assert 2 * cut <= memory["optimizer"] <= 2 * cut + 16
    # 2 of 8 rows: two features of 20 and 16 tokens, and of the packed rows four more.
    assert memory["batch"] == 4 * 2 * (3 * 20 + 6 * 16)
    assert training["needs"] == sum(memory[part] for part in ("arguments", "temporaries", "outputs", "program"))
    assert training["fits"]
    assert training["cycles"] > 0
    assert training["collectives"]["all-gather"]["bytes"] > 0
    assert training["communication_seconds"] >= training["exposed_seconds"] > 0
    assert training["rematerializations"] == 0


@pytest.mark.slow
def test_generation_is_told_by_the_token(planned):
    steps = planned["candidates"][0]["steps"]
    evaluation, generation = steps["evaluation"], steps["generation"]
    assert 0 < evaluation["token"]["cycles"] < evaluation["cycles"]
    assert steps["train"]["token"] is None
    # 8 tokens of an answer, 16 of a rationale.
    for step, length in ((evaluation, 8), (generation, 16)):
        assert (length - 1) * step["seconds_per_token"] < step["seconds"] < (length + 9) * step["seconds_per_token"]
    # Evaluation happens beside the optimizer's state, generation does not.
    assert evaluation["memory"]["optimizer"] == steps["train"]["memory"]["optimizer"]
    assert "optimizer" not in generation["memory"]


def test_what_does_not_fit_says_by_how_much(config):
    rows = 2**22
    found = worker.measure(config, candidate(batch_size=rows, topology="v5e:1x1", steps=("train",)))
    training = found["steps"]["train"]
    assert training["fits"] is False
    assert training["available"] == 15.75 * 2**30
    assert training["needs"] > training["available"]
    assert "refused" not in training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, "batch_size 6 does not divide over 4 .* 4 or 8"),
        ({"mesh": FSDP | {"data": 3}}, "nearest that does: .*'data': 2, 'fsdp': 2"),
        ({"mesh": FSDP | {"tensor": 4}}, "2 attention heads"),
        ({"topology": "v5e:3x3"}, "libtpu refuses v5e:3x3"),
    ],
)
def test_what_cannot_be_is_an_outcome(config, changes, message):
    found = worker.measure(config, candidate(**changes))
    assert re.search(message, found["refused"])
    assert found["steps"] == {}


BREAKS = """
import json, os, sys, time
for line in sys.stdin:
    rows = json.loads(line)["batch_size"]
    if rows == 1:
        print("E0000 unexpected worker hostname", file=sys.stderr)
        print("F1121 10:00 shape.cc] Check failed: rank == 2 (3 vs. 2)", file=sys.stderr, flush=True)
        os.abort()
    if rows == 2:
        time.sleep(60)
    print(json.dumps({"rows": rows, "pid": os.getpid()}), flush=True)
"""


def test_a_compiler_that_aborts_or_hangs_loses_no_other_candidate():
    with compiler.Compiler([sys.executable, "-c", BREAKS], time_limit=2.0) as machine:
        first = machine.measure(candidate(batch_size=8))
        aborted = machine.measure(candidate(batch_size=1))
        second = machine.measure(candidate(batch_size=8))
        hung = machine.measure(candidate(batch_size=2))
        third = machine.measure(candidate(batch_size=16))
    assert (first["rows"], third["rows"]) == (8, 16)
    assert len({one["pid"] for one in (first, second, third)}) == 3
    assert aborted["broke"]
    assert aborted["refused"] == (
        "the compiler's process ended with signal 6: F1121 10:00 shape.cc] Check failed: rank == 2 (3 vs. 2)"
    )
    assert hung["broke"]
    assert "2 s (--time_limit)" in hung["refused"]


def test_two_processes_compile_at_once():
    """libtpu locks a file against a second process, unless a variable says that it only compiles."""
    code = (
        "import sys, time; from sbs_jax import chips; chips.topology('v5e:2x2').describe();"
        "print('ready', flush=True); sys.stdin.read()"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=-3, text=True
        )
        for _ in range(2)
    ]
    said = [process.stdout.readline() for process in started if process.stdout is not None]
    for process in started:
        process.communicate("")
    assert said == ["ready\n"] * 2


def test_without_the_compiler_the_command_to_install_it_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sbs-jax\[plan\]'"):
        chips.check_compiler()


class Recorded(compiler.Compiler):
    """Stands in for the compiler: figures from a rule, without compiling."""

    def __init__(self, rule):
        super().__init__([], time_limit=1.0)
        self.asked, self._rule = [], rule

    def measure(self, candidate):
        self.asked.append(candidate)
        return self._rule(candidate)


def compiled(*, cycles=1e6, needs=2**30, fits=True):
    step = {"fits": fits, "needs": needs, "available": 15.75 * 2**30, "memory": {"parameters": 2**20}}
    if not fits:
        return {"steps": {"train": step | {"compile_seconds": 1.0}}}
    costs = {"cycles": cycles, "communication_seconds": 2e-3, "exposed_seconds": 1e-3, "token": None}
    rest = {"loops_counted_once": 1, "without_estimate": {"sort": 2}, "collectives": {}, "rematerializations": 3}
    return {"steps": {"train": step | costs | rest | {"compile_seconds": 1.0}}}


def options(*names, **changes):
    defaults = {
        "topologies": tuple(chips.topology(name) for name in names),
        "steps": ("train",),
        "search": False,
        "max_compiles": 16,
        "batch_size": None,
        "price": "on_demand",
        "examples": None,
        "examples_per_row": None,
    }
    return command.Options(**{**defaults, **changes})


def test_a_program_that_jax_cannot_read_has_its_memory_and_no_time(config, monkeypatch):
    """As libtpu 0.0.51 compiled SmolLM2's training step for v6e and JAX 0.10.2 read it."""

    def unreadable(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Compiled, "as_text", unreadable)
        (step,) = worker.measure(config, candidate(steps=("generation",)))["steps"].values()
    assert step["fits"] is True
    assert step["needs"] > step["memory"]["parameters"] > 0
    rule = Recorded(lambda c: {"steps": {"train": step}})
    found = command.plan(config, options("v5e:2x2", search=True), machine=rule, report=print)
    assert found["suggestion"]["fastest"] is None
    assert "cannot read its cycles: INTERNAL: async-update instruction should have 1 operands\n" in table.text(found)


def test_times_utilisation_and_costs_by_hand(config):
    rule = Recorded(lambda c: compiled(cycles=6e6))
    found = command.plan(config, options("v5e:2x2", price="2.5"), machine=rule, report=print)
    (one,) = found["candidates"]
    clock = 197e12 / 131072
    seconds = 6e6 / clock + 1e-3  # exchanges beside no computing are added
    assert one["step_seconds"] == pytest.approx(seconds)
    assert found["configuration"]["model_flops"] == flops.training_flops(config.model, rows=8, inputs=20, targets=16)
    assert one["utilisation"] == pytest.approx(found["configuration"]["model_flops"] / seconds / (4 * 197e12))
    assert one["utilisation_computing"] == pytest.approx(one["utilisation"] * seconds / (6e6 / clock))
    assert one["tokens_per_second_per_chip"] == pytest.approx(8 * 36 / seconds / 4)
    # 48 rows of two tasks, 8 to an update; 6 updates in the run.
    assert found["epoch"]["updates"] == one["epoch"]["updates"] == 12
    assert one["run"] == pytest.approx(
        {"updates": 6, "hours": 6 * seconds / 3600, "chip_hours": 24 * seconds / 3600, "usd": 60 * seconds / 3600}
    )
    quick = command.plan(config, options("v5e:2x2"), machine=Recorded(lambda c: compiled(cycles=1e3)), report=print)
    assert quick["candidates"][0]["step_seconds"] == 2e-3  # never shorter than all exchanges
    assert quick["candidates"][0]["usd_per_chip_hour"] == 1.2


def test_the_steps_of_a_run_stand_beside_the_estimates(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    settings = {"batch_size": config.batch_size, "pack": config.pack, "tuning": None}
    lengths = dict(config.task_feature_lengths)
    manifest = {
        "settings": settings,
        "run": {"task_feature_lengths": lengths},
        "devices": ["TPU_0", "TPU_1"],
        "data": {},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    lines = [
        {"kind": "train", "step": step, "seconds_per_step": seconds, "utilisation": 0.4, "goodput": goodput}
        for step, seconds, goodput in ((2, 9.0, 0.2), (4, 0.004, 0.5), (6, 0.002, 0.7), (8, 0.003, 0.8))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rule = Recorded(lambda c: compiled(cycles=1e3))  # 2 ms, all of them exchanges
    found = command.plan(config, options("v5e:2x2", run=str(run)), machine=rule, report=print)
    assert found["measured"]["seconds_per_step"] == 0.003  # the median, without the line that compiled
    text = table.text(found)
    assert f"Measured in {run}, 2 devices: 3.00 ms per update, MFU 40.0%, goodput 80.0%." in text
    assert "1.50 times the 2.00 ms estimated for v5e:2x2." in text
    other = dataclasses.replace(config, batch_size=config.batch_size * 2)
    with pytest.raises(
        ValueError, match=r"its batch_size is 8, here it is 16. Plan its own configuration: --gin_file="
    ):
        command.plan(other, options("v5e:2x2", run=str(run)), machine=rule, report=print)
    (run / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="has measured no step yet"):
        command.plan(config, options("v5e:2x2", run=str(run)), machine=rule, report=print)


def test_an_epoch_is_counted_given_or_unknown(config):
    rule = Recorded(lambda c: compiled())
    nowhere = dataclasses.replace(config, data=dataclasses.replace(config.data, records_dir="none"))

    def epoch(config, **changes):
        return command.plan(config, options("v5e:2x2", **changes), machine=rule, report=print)["epoch"]

    assert epoch(config)["examples"] == 96
    assert epoch(nowhere)["updates"] is None
    assert "sbs records" in epoch(nowhere)["source"]
    assert epoch(nowhere, examples=100)["updates"] == 25
    packed = dataclasses.replace(nowhere, pack=True)
    assert "--examples_per_row" in epoch(packed, examples=100)["source"]
    assert epoch(packed, examples=100, examples_per_row=5.0)["updates"] == 5


def test_search_tries_meshes_and_more_micro_batches_where_memory_wants_them(config):
    def rule(candidate):
        cycles = {2: 3e6, 1: 5e6}.get(candidate.mesh["tensor"], 9e6)
        return compiled(cycles=cycles + 1e5 * candidate.micro_batches, fits=candidate.micro_batches >= 2)

    machine = Recorded(rule)
    found = command.plan(config, options("v5e:2x2", search=True), machine=machine, report=print)
    tried = [(c.mesh["data"], c.mesh["fsdp"], c.mesh["tensor"], c.micro_batches) for c in machine.asked]
    assert tried == [
        *(
            (4, 1, 1, 1),
            (4, 1, 1, 2),
            (1, 4, 1, 1),
            (1, 4, 1, 2),
            (1, 2, 2, 1),
            (1, 2, 2, 2),
            (1, 1, 4, 1),
            (1, 1, 4, 2),
        ),
        (1, 2, 2, 4),  # the fastest, cut further; which brings nothing
    ]
    assert found["suggestion"] == {"smallest": 5, "cheapest": 5, "fastest": 5}
    machine = Recorded(rule)
    few = options("v5e:2x2", "v5e:2x4", search=True, max_compiles=6)
    found = command.plan(config, few, machine=machine, report=print)
    assert [c.topology for c in machine.asked] == ["v5e:2x2"] * 3 + ["v5e:2x4"] * 3
    assert found["compiles"] == 6


def test_the_smallest_the_cheapest_and_the_fastest(config):
    cycles = {"v5e:2x2": 9e6, "v5e:4x4": 2e6, "v5p:2x2x2": 1e6}
    rule = Recorded(lambda c: compiled(cycles=cycles.get(c.topology, 1.0), fits=c.topology != "v5e:1x1"))
    found = command.plan(config, options("v5e:1x1", *cycles), machine=rule, report=print)
    assert found["suggestion"] == {"smallest": 1, "cheapest": 1, "fastest": 3}
    nothing = command.plan(config, options("v5e:1x1"), machine=rule, report=print)
    assert nothing["suggestion"] == {"smallest": None, "cheapest": None, "fastest": None}
    assert "none of these fits" in table.text(nothing)


def test_the_text_names_units_doubts_and_reasons(config):
    def rule(candidate):
        if candidate.topology == "v5e:1x1":
            return compiled(fits=False, needs=20 * 2**30)
        if candidate.topology == "v5e:2x4":
            return {"refused": "batch_size 6 does not divide", "steps": {}}
        return compiled()

    names = ("v5e:1x1", "v5e:2x2", "v5e:2x4")
    text = table.text(command.plan(config, options(*names), machine=Recorded(rule), report=print))
    for words in (
        "nothing ran",
        "20.00 of 15.75, 4.25 too many",
        "batch_size 6 does not divide",
        "2 operations without an estimate, not in the cycles: 2 sort",
        "1 loops of unknown length",
        "copies 3 arrays to every device",
        "written from memory on 2026",
        "smallest, cheapest, fastest: v5e:2x2",
        "12 updates, 96 examples",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) < 160


@pytest.mark.parametrize("changes", [{"price": "cheap"}, {"price": "-1"}, {"steps": ("train", "sleep")}, {"steps": ()}])
def test_wrong_options_are_explained(changes):
    with pytest.raises(ValueError, match="expected"):
        options("v5e:2x2", **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "--topology=v9:2x2"], "Unknown topology 'v9:2x2'"),
        (["--topology=v5e:2x2"], "no --gin_file"),
        ([*TINY, "--topology=v5e:2x2", "--gin.APLHA=1"], "Did you mean 'ALPHA'"),
        ([*TINY, "--topology=v5e:2x2", "--slices=0"], "0 slices"),
        ([*TINY, "--topology=v5e:2x2", "--steps=trian"], "expected some of train, evaluation, generation"),
    ],
)
def test_mistakes_of_the_command_are_one_message(arguments, message, capsys):
    assert main.main(["plan", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sbs plan: ")
    assert message in said.err
