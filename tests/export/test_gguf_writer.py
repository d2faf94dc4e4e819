"""The tests' own GGUF writer: `gguf` reads back what it packs, and its files hold every tensor of the checkpoint."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_files import (
    Q4_K,
    Q6_K,
    Q8_0,
    expected_tensors,
    make_wide_checkpoint,
    pack_q4_k,
    pack_q6_k,
    q4_k_blocks,
    q6_k_blocks,
    state_of,
    write_generation_1,
    write_generation_2,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_wide_checkpoint(tmp_path_factory.mktemp("wide"))


def test_blocks_are_packed_as_gguf_unpacks_them():
    random, blocks = np.random.default_rng(0), 50
    d, dmin = random.uniform(-1, 1, (2, blocks, 1)).astype(np.float16)
    scales, mins = random.integers(0, 64, (2, blocks, 8))
    weights = random.integers(0, 16, (blocks, 8, 32))
    expected = d.astype(np.float32)[..., None] * scales[..., None] * weights
    expected -= dmin.astype(np.float32)[..., None] * mins[..., None]
    np.testing.assert_allclose(
        dequantize(q4_k_blocks(d, dmin, scales, mins, weights), Q4_K),
        expected.reshape(blocks, -1),
        rtol=1e-5,
        atol=1e-5,
    )
    scales, weights = random.integers(-128, 128, (blocks, 16)), random.integers(-32, 32, (blocks, 16, 16))
    expected = d.astype(np.float32)[..., None] * scales[..., None] * weights
    np.testing.assert_allclose(
        dequantize(q6_k_blocks(d, scales, weights), Q6_K), expected.reshape(blocks, -1), rtol=1e-5
    )


@pytest.mark.parametrize(("pack", "kind", "error"), [(pack_q4_k, Q4_K, 0.08), (pack_q6_k, Q6_K, 0.02)])
def test_quantised_rows_are_near_the_originals(pack, kind, error):
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    weight[0] = 0
    weight[1] = abs(weight[1])
    read = dequantize(pack(weight), kind)
    assert np.linalg.norm(read - weight) < error * np.linalg.norm(weight)
    assert not read[0].any()


@pytest.mark.parametrize(("types", "kinds"), [("q4_K_M", {Q4_K, Q6_K}), ("q8_0", {Q8_0}), ("f16", set())])
@pytest.mark.parametrize("generation", [1, 2])
def test_files_hold_every_tensor(checkpoint, tmp_path, generation, types, kinds):
    if generation == 1:
        paths = write_generation_1(checkpoint, tmp_path / "text.gguf", tmp_path / "projector.gguf", types=types)
    else:
        paths = [write_generation_2(checkpoint, tmp_path / "model.gguf", types=types)]
    read, (_, state) = expected_tensors(checkpoint, *paths), state_of(checkpoint)
    found = {tensor.tensor_type for path in paths for tensor in GGUFReader(path).tensors}
    assert found == {GGMLQuantizationType.F32, GGMLQuantizationType.F16} | kinds
    assert {*read} == {*state}
    for name, tensor in state.items():
        assert (read[name] - tensor.float()).norm() < 0.1 * tensor.float().norm(), name
        assert tensor.count_nonzero() or "embed" in name, name
