"""Other people's checkpoints: what is wrong with one is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import load
from export.errors import ExportError
from tests.support.paths import ROOT


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    saved = tmp_path / "saved"
    shutil.copytree(ROOT / "demo" / "model", saved)
    weights = load_file(saved / "model.safetensors")
    del weights[next(name for name in weights if "visual_projection" in name)]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="lacks 1 of GIT's weights"):
        load(str(saved))


def _no_tokenizer(folder, weights):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def _other_shape(folder, weights):
    name = next(name for name in weights if "visual_projection" in name and "weight" in name)
    weights[name] = torch.zeros(3, *weights[name].shape[1:])


def _not_a_number(folder, weights):
    name = next(name for name in weights if "visual_projection" in name)
    weights[name] = weights[name] * float("nan")


def _small_vocabulary(folder, weights):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"more{n}": len(vocabulary) + n for n in range(5000)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _own_code(folder, weights):
    code = folder / "custom_generate" / "generate.py"
    code.parent.mkdir()
    code.write_text("raise SystemExit('the code was run')")


def _more_layers(folder, weights):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


def _own_attention(folder, weights):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["_attn_implementation"] = "somebody/kernel"
    (folder / "config.json").write_text(json.dumps(config))


def _with(file="config.json", **changes):
    def change(folder, weights):
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return change


def _named_vocabulary(folder, weights):
    _no_tokenizer(folder, weights)
    _with("tokenizer_config.json", tokenizer_class="BertTokenizer", vocab_file=__file__)(folder, {})


def _linked_vocabulary(folder, weights):
    _no_tokenizer(folder, weights)
    _with("tokenizer_config.json", tokenizer_class="BertTokenizer")(folder, {})
    (folder / "vocab.txt").symlink_to(__file__)


def _shard_elsewhere(folder, weights):
    shards = {"weight_map": dict.fromkeys(weights, "../model.safetensors")}
    _with("model.safetensors.index.json", **shards)(folder, weights)


def _own_tokenizer(folder, weights):
    _no_tokenizer(folder, weights)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text("raise SystemExit('the code was run')")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_tokenizer, "has no tokenizer that can be read: put tokenizer.json"),
        (_other_shape, "visual_projection.* has another shape than config.json"),
        (_not_a_number, "visual_projection.* are no numbers"),
        (_small_vocabulary, "its tokenizer knows .* tokens, and the model"),
        (_own_code, "custom_generate is code, which an export does not run"),
        (_own_attention, "attention by somebody/kernel"),
        (_own_tokenizer, "has no tokenizer that can be read"),
        (
            _with("tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
            "has no tokenizer that can be read",
        ),
        (_more_layers, "weights of layers that config.json does not ask for"),
        (_with(hidden_act="none such"), "can't be loaded as a checkpoint: .*none such"),
        (_with(hidden_act=["gelu"]), r"hidden_act in config.json is \['gelu'\]"),
        (_with(layer_norm_eps=float("nan")), "layer_norm_eps in config.json is nan"),
        (_with(num_image_with_embedding=-1), "num_image_with_embedding in config.json is -1"),
        (_with(num_image_with_embedding=10**6), "is 1000000: it must be null, or a number of im"),
        (_with(num_labels=10**9), "num_labels is 1000000000: GIT has none"),
        (_with(num_hidden_layers=10**6), "config.json asks for 1000000 layers"),
        (_with(vocab_size=10**9), r"asks for \d{3},\d{3},\d{3},\d{3} parameters, and the files"),
        (_with(quantization_config={"quant_method": "gptq", "bits": 4}), "has quantised weights"),
        (_with(transformers_weights="../x.safetensors"), "config.json names weights outside"),
        (_shard_elsewhere, "index.json names a shard outside the checkpoint"),
        (_named_vocabulary, "vocab_file in tokenizer_config.json names a file"),
        (_with("tokenizer_config.json", init_inputs=[__file__]), "init_inputs in tokenizer_conf"),
        (_linked_vocabulary, "vocab.txt is a link to .*test_checkpoint.py"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(change, message, tmp_path):
    saved = tmp_path / "saved"
    shutil.copytree(ROOT / "demo" / "model", saved)
    weights = load_file(saved / "model.safetensors")
    change(saved, weights)
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=message):
        load(str(saved))


def test_a_snapshot_in_the_hub_s_cache_links_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(ROOT / "demo" / "model", blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    _with("tokenizer_config.json", special_tokens_map_file=__file__)(blobs, {})
    switches = {"torchscript": True, "chunk_size_feed_forward": 2, "is_encoder_decoder": True}
    _with(**switches)(blobs, {})
    config = load(str(snapshot)).model.config
    assert not any(getattr(config, name) for name in switches)


def test_generation_parameters_of_a_checkpoint_are_told_and_left_to_requests(tmp_path, capsys):
    saved = tmp_path / "saved"
    shutil.copytree(ROOT / "demo" / "model", saved)
    path = saved / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.2}))
    checkpoint = load(str(saved))
    assert "left out: repetition_penalty of 1.2" in capsys.readouterr().out
    assert checkpoint.model.generation_config.repetition_penalty in (None, 1.0)
    assert checkpoint.model.generation_config.eos_token_id == checkpoint.tokens.eos


def test_a_folder_that_is_not_there_is_no_name_on_the_hub():
    with pytest.raises(ExportError, match=r"/no/such/folder does not exist"):
        load("/no/such/folder")


def test_processors_that_the_runtime_cannot_repeat_are_refused(tmp_path):
    source = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "demo" / "model", source)
    path = source / "preprocessor_config.json"
    good = json.loads(path.read_text())
    for change in (
        {"do_normalize": False},
        {"size": {"height": 128, "width": 128}},
        {"crop_size": {"height": 96, "width": 96}},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ExportError, match="not supported"):
            load(str(source))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"resample": 9}, "resample .* is 9: Pillow has"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, r"image_std \(\[0, 0, 0\]\), none"),
        ("preprocessor_config.json", {"image_mean": [1e39, 0, 0]}, "none above 1e"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "three for image_mean"),
        ("preprocessor_config.json", {"image_mean": ["a", 0, 0]}, "three for image_mean"),
        ("preprocessor_config.json", {"rescale_factor": "x"}, "a number for rescale_factor"),
        ("preprocessor_config.json", {"size": 1.5}, "size in preprocessor_config.json is 1.5"),
        (
            "preprocessor_config.json",
            {"crop_size": "96"},
            "crop_size in .* is '96': it must",
        ),
        ("preprocessor_config.json", {"image_processor": 5}, "is 5: it must be an object"),
        ("config.json", {"eos_token_id": [3, 7]}, r"eos_token_id in config.json is \[3, 7\]"),
        ("config.json", {"bos_token_id": 10**6}, "bos_token_id .* must be one token, from 0 to"),
        ("generation_config.json", {"eos_token_id": 7}, "eos_token_id is .*, and 7 in generation"),
    ],
)
def test_numbers_that_no_engine_can_have_are_named(file, change, message, tmp_path):
    source = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "demo" / "model", source)
    path = source / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=message):
        load(str(source))


def test_no_network_is_told_apart_from_an_unknown_model(monkeypatch):
    import export.checkpoint as module

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub") from ConnectionError("refused")

    monkeypatch.setattr(module.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ExportError, match=r"can't be reached .* check the network"):
        load("microsoft/git-base-textcaps")


def test_an_unknown_model_is_named(monkeypatch):
    import export.checkpoint as module

    def unknown(*_, **__):
        raise OSError("nobody/x is not a local folder and is not a valid model identifier")

    monkeypatch.setattr(module.AutoConfig, "from_pretrained", unknown)
    with pytest.raises(ExportError, match="neither a folder nor a model on the hub: check the sp"):
        load("nobody/x")
