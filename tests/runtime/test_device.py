"""State that stays on a device: its arithmetic, and its runner on the CPU provider in fp16."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export.build import Proof, build
from export.pictures import generated
from export.random_weights import from_config
from runtime.engine import Engine
from runtime.errors import EngineFolderError
from runtime.execution import loader
from runtime.execution.base import Candidates, leading
from runtime.execution.buckets import bucket, buckets
from runtime.execution.device import DeviceRunner
from runtime.execution.device_buffer import DeviceBuffer
from runtime.execution.host import HostRunner, _shared, _Step
from runtime.execution.launch import Launch
from runtime.execution.loader import Prepared
from runtime.execution.stream import HostStream
from runtime.model import manifest as manifests
from runtime.model.manifest import UNFORCED
from runtime.model.tokenizer import CaptionTokenizer
from runtime.planning.config import EngineConfig
from runtime.planning.machine import Machine
from runtime.planning.plan import Plan, default
from tests.support.checkpoints import SHAPES, shaken
from tests.support.fakes import drained

FUSED, PLAIN = "fp16-fused/fp16/float16", "fp16/fp16/float16"


class OnHost(HostRunner):
    """Runs the device graphs with their state in host memory; finds candidates with numpy."""

    def _inputs(self, rows, candidates):
        inputs = super()._inputs(rows, candidates)
        del inputs["candidates"]
        return inputs

    def _bind(self, rows, candidates):
        binding = self._decoder.io_binding()
        [shape] = (o.shape[1:] for o in self._decoder.get_outputs() if o.name == "logits")
        self.logits = np.zeros((rows, *shape), np.float16)
        binding.bind_ortvalue_output("logits", _shared(self.logits))
        for name, array in self._inputs(rows, candidates).items():
            binding.bind_ortvalue_input(name, _shared(array))
            if name.startswith("past_key_values"):
                present = name.replace("past_key_values", "present")
                binding.bind_ortvalue_output(present, _shared(array))
        return _Step(binding, None)

    def encode(self, pixels, slots):
        whole = self._encoder.encode

        def encode(pixels, put):
            heads = self.sizes.heads
            whole(pixels, lambda n, image: put(n, [
                each if len(each) == heads else each.swapaxes(0, 1) for each in image
            ]))  # fmt: skip

        self._encoder.encode = encode
        try:
            super().encode(pixels, slots)
        finally:
            self._encoder.encode = whole

    def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
        super().decode(tokens, fed, forced, candidates)
        logits = self.logits.reshape(len(tokens), -1).astype(np.float32)
        largest = logits.max(axis=-1, keepdims=True)
        normaliser = np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, :candidates]
        logprobs = np.take_along_axis(logits - largest - normaliser, ids, axis=-1)
        return Candidates(ids[None], logprobs[None], largest.T)


def caches(it):
    """K/V of all slots, the sink and the blank slot: `[arrays, slots + 2, heads, C, D]`."""
    values = it.runner.arena._buffer.fetch()
    return values.reshape(-1, it.slots + 2, *values.shape[1:])


def put_caches(it, values):
    buffer = it.runner.arena._buffer
    buffer.upload(values.reshape(buffer.shape), it.runner._stream)


def engine(folder, kind, combination, slots=6, **config):
    settings = EngineConfig(patience=0, **config)
    manifest = manifests.load(folder)
    text = settings.text_positions(manifest.sizes.text)
    plan = Plan(combination, "cpu", "cpu", encode_batch=4, slots=slots, text_tokens=text)
    runner = kind(folder, manifest, plan)
    runner.warm_up()
    return Engine(manifest, CaptionTokenizer(folder, manifest), runner, settings)


def captions(it, folder):
    """Captions of uneven lengths and prompts, so that slots are freed, refilled and moved."""
    rng = np.random.default_rng(6)
    sizes = it.manifest.sizes
    waiting = [
        it.request(
            generated(rng, sizes),
            " ".join(["w7"] * (n % 3)),
            max_new_tokens=2 + n % 7,
            ignore_eos=True,
            **([{}] * 4 + [{"num_beams": 3}, {"n": 2, "temperature": 2.0, "seed": 5}])[n % 6],
        )
        for n in range(20)
    ]
    for request in waiting:
        it.submit(request)
    said, bursts = {}, set()
    while not it.idle:
        before = {s: s.fed for s in it.scheduler.running}
        said |= {output.id: output.token_ids for output in it.step()}
        bursts |= {s.fed - fed for s, fed in before.items()}
    return [said[request.id] for request in waiting], bursts


@pytest.mark.parametrize("combination", [FUSED, PLAIN])
def test_state_on_a_device_says_the_same_as_state_in_host_memory(half, combination):
    expected, single = captions(engine(half, OnHost, combination), half)
    said, bursts = captions(engine(half, DeviceRunner, combination), half)
    assert said == expected
    assert len(set(said)) > 15, "a test on one caption proves nothing"
    assert single == {1}
    assert max(bursts) > 1, "no steps followed one another on the device"


def test_a_prompt_is_forced_within_a_burst(half):
    """One row's prompt must not cost the others their bursts."""
    it, prompt = engine(half, DeviceRunner, FUSED), "w7 w8 w9"
    images = [generated(np.random.default_rng(n), it.manifest.sizes) for n in range(2)]
    alone = [
        it.generate([i], [p], max_new_tokens=5, ignore_eos=True)
        for i, p in zip(images, (prompt, None), strict=True)
    ]
    requests = [
        it.request(i, p, max_new_tokens=5, ignore_eos=True)
        for i, p in zip(images, (prompt, None), strict=True)
    ]
    for request in requests:
        it.submit(request)
    for _ in range(3):  # queues the images, then a burst, then takes what it found
        it.step()
    both = it.scheduler.running
    assert [s.fed for s in both] == [4, 4]  # four forced tokens, and four predicted ones
    texts = [s.decoding.completions()[0].token_ids for s in both]
    assert list(map(len, texts)) == [1, 4]
    drained(it)
    texts = [s.decoding.completions()[0].token_ids for s in both]
    assert texts == [caption.token_ids for [caption] in alone]


def test_graphs_that_cant_be_captured_are_done_without_and_it_is_said(half, monkeypatch, caplog):
    run, opened, left = Launch.run, [], []

    class Watched(DeviceRunner):
        def __init__(self, *args):
            left.append(sum(runner() is not None for runner in opened))
            opened.append(weakref.ref(self))
            super().__init__(*args)

    def failing(self, graph=False):
        if graph:
            raise RuntimeError("CUDA error 900: operation not permitted when stream is capturing")
        run(self)

    monkeypatch.setattr(Launch, "run", failing)
    monkeypatch.setattr(loader, "DeviceRunner", Watched)
    manifest, config = manifests.load(half), EngineConfig(encode_batch=4, patience=0)
    text = config.text_positions(manifest.sizes.text)
    plan = Plan(FUSED, "cpu", "cpu", encode_batch=4, slots=6, text_tokens=text)
    gc.disable()
    try:
        it = Engine.start(Prepared(half, manifest, config, (plan,)))
    finally:
        gc.enable()
    assert left == [0, 0], "the first runner holds its memory while the second is opened"
    assert "without CUDA graphs" in it.runs_on
    assert not it.runner.graphs
    assert "error 900" in caplog.text
    [caption] = it.generate([generated(np.random.default_rng(0), manifest.sizes)])
    assert caption.token_ids


def test_fp16_says_what_fp32_says(half):
    """Random weights sway easily; fp16 has to follow them nearly always."""
    exact, _ = captions(engine(half, HostRunner, "fp32/fp32/float32"), half)
    for combination in (FUSED, PLAIN):
        said, _ = captions(engine(half, DeviceRunner, combination), half)
        assert sum(a == b for a, b in zip(said, exact, strict=True)) >= 17


def test_the_graph_for_cuda_has_its_attention_in_one_node(half):
    fused = onnx.load(half / "encoder.fp16-fused.onnx", load_external_data=False).graph
    plain = onnx.load(half / "encoder.fp16.onnx", load_external_data=False).graph
    assert sum(n.op_type == "MultiHeadAttention" for n in fused.node) == 3  # 2 vision, 1 decoder
    assert not any(n.op_type == "Softmax" for n in fused.node)
    assert {n.domain for n in plain.node} <= {"", "ai.onnx"}  # all that TensorRT takes


def test_squares_that_would_leave_the_range_of_fp16_are_computed_in_fp32(tmp_path):
    checkpoint = from_config("warm", SHAPES["base"], seed=1)
    warm = checkpoint.model.git.image_encoder.vision_model.encoder.layers[1].mlp.fc2
    warm.bias.data[0] = 2_000.0
    build(checkpoint, tmp_path / "engine", Proof(images=1, new_tokens=3, target="cuda"))
    kept = manifests.load(tmp_path / "engine").verification["fp32_nodes"]
    assert kept["encoder.fp16-fused.onnx"] == ["/vision/layers.1/SkipLayerNormalization_1"]


def test_what_leaves_the_range_of_fp16_stays_in_fp32(tmp_path):
    checkpoint = from_config("hot", SHAPES["base"], seed=1)
    hot = checkpoint.model.git.image_encoder.vision_model.encoder.layers[1].mlp.fc2
    hot.bias.data[0] = 50_000.0
    folder = tmp_path / "engine"
    build(checkpoint, folder, Proof(images=1, new_tokens=3, target="tensorrt"))
    kept = manifests.load(folder).verification["fp32_nodes"]
    assert kept["decoder.fp16.onnx"] == []
    for name, hottest in (
        ("encoder.fp16.onnx", "layers.1/mlp/fc2/Add"),
        ("encoder.fp16-fused.onnx", "layers.1/SkipLayerNormalization"),
    ):
        assert any(hottest in node for node in kept[name])
        assert not any("layers.0" in node for node in kept[name])
    graph = onnx.load(folder / "encoder.fp16.onnx", load_external_data=False).graph
    types = {i.name: i.data_type for i in graph.initializer}
    tower = "git.image_encoder.vision_model"
    assert types[f"{tower}.encoder.layers.1.mlp.fc2.bias"] == TensorProto.FLOAT
    assert types[f"{tower}.embeddings.patch_embedding.weight"] == TensorProto.FLOAT16
    exact, _ = captions(engine(folder, HostRunner, "fp32/fp32/float32"), folder)
    said, _ = captions(engine(folder, DeviceRunner, PLAIN), folder)
    assert sum(a == b for a, b in zip(said, exact, strict=True)) >= 15


def test_buckets_hold_every_number_of_rows():
    assert buckets(1) == (1,)
    assert buckets(16) == (1, 2, 4, 8, 16)
    assert buckets(20) == (1, 2, 4, 8, 16, 20)
    assert [bucket(rows, buckets(20)) for rows in (1, 3, 9, 17, 20)] == [1, 4, 16, 20, 20]


def test_addresses_never_change(half):
    """A captured graph reads and writes where it did when it was captured."""
    it = engine(half, DeviceRunner, FUSED)
    captions(it, half)
    bound, first = dict(it.runner._steps), dict(it.runner._encodes)
    captions(it, half)
    assert it.runner._steps == bound
    assert it.runner._encodes == first
    assert {rows for rows, _ in bound} == {1, 2, 4, 6}
    assert {step for _, step in bound} == {0, 1, 2, 3}


def test_a_slot_whose_numbers_broke_down_is_emptied(half):
    it = engine(half, DeviceRunner, FUSED)
    sizes, rng = it.manifest.sizes, np.random.default_rng(0)
    runner, slots = it.runner, [0, 1]
    runner.encode([generated(rng, sizes) for _ in slots], leading(2))
    values = caches(it)
    values[-1, 1] = np.nan
    put_caches(it, values)
    found = runner.decode([it.manifest.tokens.bos] * 2, [0, 0], [[UNFORCED] * 2] * 3).wait()
    assert not np.isnan(found.logprobs[:, 0]).any()
    assert np.isnan(found.logprobs[:, 1]).any()
    for left in caches(it):
        assert not left[1].any()
        assert left[0].any()


def test_a_slot_that_is_filled_while_a_burst_runs_loses_what_broke_down_and_not_its_image(half):
    it = engine(half, DeviceRunner, FUSED)
    [one, other], runner = [generated(np.random.default_rng(0), it.manifest.sizes)] * 2, it.runner
    runner.encode([one], [[0]])
    prefix = it.manifest.sizes.prefix
    values = caches(it)
    expected = values[:, 0, :, :prefix].copy()
    values[:, 1] = np.nan
    put_caches(it, values)
    burst = runner.decode([it.manifest.tokens.bos] * 2, [0, 0])
    runner.encode([other], [[1]])
    assert np.isnan(burst.wait().logprobs[:, 1]).any()
    left = caches(it)[:, 1]
    np.testing.assert_array_equal(left[:, :, :prefix], expected)
    assert not left[:, :, prefix:].any()


def test_a_slot_that_was_left_before_its_first_step_is_emptied_of_what_broke_down(half):
    it = engine(half, DeviceRunner, FUSED)
    runner = it.runner
    runner.encode([generated(np.random.default_rng(0), it.manifest.sizes)], [[0]])
    values = caches(it)
    values[:, 1 : it.slots + 1] = np.nan  # all but the blank one
    put_caches(it, values)
    runner.decode([it.manifest.tokens.bos] * 3, [0] * 3).wait()  # rows 0 to 3, in a bucket
    assert not np.isnan(caches(it)[:, :4]).any()


def test_the_host_waits_before_it_overwrites_pixels_and_reads_results(half):
    it = engine(half, DeviceRunner, FUSED)
    runner, waits = it.runner, []

    class Mark:
        def __init__(self, name):
            self.name = name

        def set(self):
            waits.append(f"set {self.name}")

        def wait(self):
            waits.append(f"wait {self.name}")
            staged.append(runner._pixels._staging[0].copy())

    runner._pixels._staged, runner._pixels._taken = Mark("staged"), Mark("taken")
    runner._encoded = Mark("encoded")
    runner._last._ended = runner._before._ended = Mark("decoded")
    images = [generated(np.random.default_rng(n), it.manifest.sizes) for n in range(2)]
    staged = []
    for slot, image in enumerate(images):
        runner.encode([image], [[slot]])
    np.testing.assert_array_equal(staged[3], images[0])  # as the second call begins
    runner.wait_encoded()
    burst = runner.decode([it.manifest.tokens.bos] * 2, [0, 0])
    burst.wait()
    upload = ["wait staged", "wait taken", "set staged"]
    encode = [*upload, "wait staged", "set taken", "set encoded"]
    assert waits == [*encode, *encode, "wait encoded", "set decoded", "wait decoded"]


def test_a_slot_with_room_for_less_than_a_burst_is_warmed_up(half):
    it = engine(half, DeviceRunner, FUSED, text_tokens=2)
    image = generated(np.random.default_rng(0), it.manifest.sizes)
    [caption] = it.generate([image], max_new_tokens=2, ignore_eos=True)
    assert len(caption.token_ids) == 2


def test_a_device_buffer_binds_any_run_of_its_rows():
    buffer = DeviceBuffer("cpu", (4, 6), np.float32)
    buffer.upload(np.arange(24, dtype=np.float32).reshape(4, 6), HostStream())
    view = buffer.rows(2, first=1)
    assert view.shape == (2, 6)
    assert view.pointer - buffer.rows(4).pointer == 24
    assert view.shaped(2, -1, 3).shape == (2, 2, 3)
    words = view.shaped(-1, 2, dtype=np.int64)
    assert (words.shape, words.pointer) == ((3, 2), view.pointer)
    assert buffer.nbytes == 96
    assert buffer.fetch()[1, 0] == 6


def test_fp16_is_for_gpus_alone_unless_it_is_asked_for(half):
    manifest = manifests.load(half)
    machine = Machine("some", 8, ("avx512_vnni",))
    config = EngineConfig()
    on = {name: default(manifest, config, name, machine) for name in ("cpu", "cuda", "tensorrt")}
    assert "float16" not in on["cpu"].combination
    assert (on["cuda"].combination, on["cuda"].decoder_provider) == (FUSED, "cuda")
    assert (on["tensorrt"].combination, on["tensorrt"].decoder_provider) == (PLAIN, "cuda")
    old = Machine("old", 8, ())
    assert default(manifest, config, "cuda", old).combination == FUSED
    assert default(manifest, config, "cpu", old).combination == "fp32/fp32/float32"
    exact = EngineConfig(precision="fp32/fp32/float32")
    assert default(manifest, exact, "cuda", machine).decoder_provider == "cpu"


def test_an_engine_of_an_earlier_export_is_told_to_be_exported_again(half, tmp_path):
    manifest = manifests.load(half)
    older = tuple(v for v in manifest.variants if v.graph != "search")
    replace(manifest, variants=older).save(tmp_path)
    with pytest.raises(EngineFolderError, match=r"export it again .*has no graph 'search'"):
        manifests.read(tmp_path)


def test_the_vocabulary_is_widened_by_tokens_that_are_never_chosen(half):
    it = engine(half, DeviceRunner, FUSED)
    size = it.manifest.sizes.vocabulary
    [shape] = (o.shape for o in it.runner._decoder.get_outputs() if o.name == "logits")
    assert shape[-1] % 8 == 0 and 0 < shape[-1] - size < 8
    image = generated(np.random.default_rng(0), it.manifest.sizes)
    drawn = {"temperature": 100.0, "top_k": 64, "ignore_eos": True, "max_new_tokens": 12}
    for seed in range(20):
        [caption] = it.generate([image], seed=seed, **drawn)
        assert max(caption.token_ids) < size


def test_an_embedding_that_is_the_head_s_weights_too_keeps_them(tmp_path):
    shape = deepcopy(SHAPES["base"])
    shape.tie_word_embeddings = True
    checkpoint = shaken(from_config("tied", shape, seed=2))
    build(checkpoint, tmp_path / "tied", Proof(images=2, new_tokens=8, target="cuda"))
    said, _ = captions(engine(tmp_path / "tied", DeviceRunner, FUSED), tmp_path / "tied")
    expected, _ = captions(engine(tmp_path / "tied", OnHost, FUSED), tmp_path / "tied")
    assert sum(a == b for a, b in zip(said, expected, strict=True)) >= 18


def test_only_what_a_target_takes_is_built(tmp_path):
    folder = tmp_path / "engine"
    checkpoint = from_config("base", SHAPES["base"], seed=1)
    build(checkpoint, folder, Proof(images=1, new_tokens=3, target="cuda"))
    names = {c.name for c in manifests.load(folder).combinations}
    assert FUSED in names
    assert PLAIN not in names
    assert not list(folder.glob("encoder.fused*"))
    assert not list(folder.glob("encoder.fp16.*"))
