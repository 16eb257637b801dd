"""The decode loop as libtpu compiles it: forbidden operations."""

import dataclasses
import re

import pytest

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed: pip install libtpu")

from benchmarks import tpu

SHAPE = {"emb_dim": 256, "num_heads": 4, "mlp_dim": 512, "num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.faults), 4])
def test_the_decode_loop_copies_no_cache_reads_no_float32_weights_and_sorts_nothing(beams):
    config = dataclasses.replace(tpu.BASE, **SHAPE)
    hlo = tpu.lowered(beams, config=config).compile().as_text() or ""
    name = max(re.findall(r" while\((?!.*known_trip_count).*body=%?([\w.\-]+)", hlo), key=len)
    body = hlo[hlo.index(f"\n%{name} ") :].split("\n}", 1)[0]
    assert tpu.cycles_per_token(hlo) > 10_000
    assert re.search(rf"bf16\[32,{64 * beams},256\]", body), "the cache of a chip's 32 rows"
    assert not re.search(rf"= bf16\[32,{64 * beams},256\]\S* (copy|transpose|gather)\(", body)
    assert not re.search(r"f32\[(256,256|256,512|512,256|256,32128)\]", body)
    assert not re.search(r" sort\(|TopK", body)
    # Rows stay on their chips: what all-reduce there is says whether all have ended, and is in the loop's condition.
    assert not re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)(-start)?\(", body)


def test_a_program_that_decodes_nothing_has_no_cycles_per_token():
    with pytest.raises(ValueError, match="nothing decodes"):
        tpu.cycles_per_token("ENTRY %main (p: f32[]) -> f32[] {\n}\n")
