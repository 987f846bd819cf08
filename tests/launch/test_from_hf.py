"""Starting from a Hugging Face folder: the same tensors and logits, for experts as they are and for upcycled ones."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from configs.loader import load_run_config
from launch import export, from_hf, train
from launch._cli import run_command
from launch._corpus import open_corpus
from launch._initial_weights import load_initial_weights
from launch._tensors import TensorFolder
from moe.model import MoEDecoder
from tests.harness import losses, run_trainings
from tests.launch.hf_folders import ARCHITECTURES, STEP, write_run
from tests.launch.test_export import close, some_tokens
from tests.moe.test_parity import randomize
from trainer.data.config import DataConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.model_weights import whole_weights

transformers = pytest.importorskip("transformers")

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def convert(folder: Path, out: Path, *options: str) -> None:
    assert run_command(from_hf.main, [str(folder), "--out", str(out), *options]) == 0


def initial_model(folder: Path) -> MoEDecoder:
    config = load_run_config(folder / "config.yaml", world_size=None)
    assert config.init_from == str(folder)
    rows = TensorFolder(folder).shape("embedding.weight")[0]
    model = MoEDecoder(config.model, vocab_size=rows)
    load_initial_weights(model, config)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_for_bit(
    architecture: str, dtype: torch.dtype, tmp_path: Path, data_config: DataConfig
) -> None:
    section = ARCHITECTURES[architecture] | {"tie_embeddings": architecture == "glm4_moe"}
    run_dir, config, model = write_run(
        tmp_path, data_config, biased=architecture != "qwen3_moe", dtype=dtype, model=section
    )
    assert run_command(export.main, [str(run_dir), "--out", str(tmp_path / "hf"), "--shard-size", "20K"]) == 0
    convert(tmp_path / "hf", tmp_path / "back")
    before, after = whole_weights(model), safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert load_run_config(tmp_path / "back" / "config.yaml").model == config.model
    tokens_BT = some_tokens(model.embedding.num_embeddings)
    with torch.no_grad():
        assert torch.equal(initial_model(tmp_path / "back")(tokens_BT), model.float()(tokens_BT))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Glm4Moe", {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": True}),
        ("Qwen3Moe", {"num_experts": 8, "mlp_only_layers": [0], "attention_bias": False, "head_dim": 16}),
        ("Qwen3Moe", {"num_experts": 8, "decoder_sparse_step": 2, "head_dim": 16, "tie_word_embeddings": True}),
        ("DeepseekV3", {"n_routed_experts": 8, "num_key_value_heads": 4, "q_lora_rank": None, "n_group": 2,
                        "topk_group": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                        "v_head_dim": 8, "rope_interleave": False, "first_k_dense_replace": 1}),
    ],
)  # fmt: skip
def test_folders_of_transformers(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    settings = {**SMALL, **EXPERTS, **settings}
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "initial")
    tokens_BT = some_tokens(VOCAB)
    with torch.no_grad():
        assert close(initial_model(tmp_path / "initial")(tokens_BT), theirs(tokens_BT).logits)


def test_a_model_of_one_expert_a_token_is_read_but_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SMALL, **EXPERTS, "num_experts": 8, "head_dim": 16, "num_experts_per_tok": 1}
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "initial")
    assert "model.top_k: 1 with normalize_gates" in capsys.readouterr().out
    tokens_BT = some_tokens(VOCAB)
    with torch.no_grad():
        assert close(initial_model(tmp_path / "initial")(tokens_BT), theirs(tokens_BT).logits)
    with pytest.raises(
        ConfigError, match=r"config.yaml: model.top_k: 1 with normalize_gates .* set normalize_gates to"
    ):
        load_run_config(tmp_path / "initial" / "config.yaml")
    load_run_config(tmp_path / "initial" / "config.yaml", ["model.normalize_gates=false"])


def test_rows_without_a_token_are_left_out_and_shards_are_read(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SMALL, **EXPERTS, "num_experts": 8, "head_dim": 16, "vocab_size": 328}
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    shutil.copy(Path(data_config.path) / "tokenizer.json", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "initial", "--shard-size", "50K")
    assert "8 rows of the embedding belong to no token" in capsys.readouterr().out
    assert len(list((tmp_path / "initial").glob("model-*-of-*.safetensors"))) > 2
    tokens_BT = some_tokens(320)
    with torch.no_grad():
        assert close(initial_model(tmp_path / "initial")(tokens_BT), theirs(tokens_BT).logits[..., :320])

    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(described | {"vocab_size": 300}))
    assert run_command(from_hf.main, [str(tmp_path / "hf"), "--out", str(tmp_path / "other")]) == 2
    assert "has 320 tokens, the model's embedding only 300 rows" in capsys.readouterr().err


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**SMALL, **EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 1}
    theirs = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "hf")
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    described |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(described))
    convert(tmp_path / "hf", tmp_path / "initial")
    assert "multi-token prediction are left out" in capsys.readouterr().out
    assert len(initial_model(tmp_path / "initial").blocks) == 2


@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Qwen2", "Mistral"])
@pytest.mark.parametrize(
    "options",
    [
        ["--experts", "8"],
        ["--experts", "4", "--top-k", "2", "--router", "softmax", "--dense-layers", "1"],
        ["--experts", "12", "--granularity", "3", "--top-k", "6", "--router-std", "0.1", "--seed", "5"],
        ["--experts", "8", "--granularity", "2", "--top-k", "2", "--router", "softmax"],
    ],
)
def test_an_upcycled_model_is_the_dense_one(name: str, options: list[str], tmp_path: Path) -> None:
    theirs = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SMALL, sliding_window=None, head_dim=16)
    ).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "initial", *options)
    model = initial_model(tmp_path / "initial")
    tokens_BT = some_tokens(VOCAB)
    with torch.no_grad():
        assert close(model(tokens_BT), theirs(tokens_BT).logits)
    layers = model.moe_layers()
    assert len(layers) == 3 - ("--dense-layers" in options)
    assert all(layer.num_experts == int(options[1]) for layer in layers)
    used = torch.stack(model.take_counts("eval"))
    assert ((used > 0).sum(dim=1) > layers[0].top_k).all(), "tokens do go to different experts"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model_type": "gpt2"}, [], "model_type: gpt2 cannot be read"),
        ({}, [], "--experts: the model is dense"),
        ({}, ["--experts", "6", "--granularity", "4", "--top-k", "4"], "--experts: 6 is not a multiple"),
        ({}, ["--experts", "8", "--granularity", "5"], "--granularity: 5 does not divide the dense width (48)"),
        ({}, ["--experts", "8", "--granularity", "4", "--top-k", "6"], "--top-k: 6 is not a multiple"),
        ({}, ["--experts", "24", "--granularity", "12", "--top-k", "12"], "expert_intermediate_size: 4 must be"),
        ({}, ["--experts", "8", "--dense-layers", "3"], "--dense-layers: 3 must be in [0, 3)"),
        ({"hidden_act": "gelu"}, ["--experts", "8"], "hidden_act: 'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["--experts", "8"], "rope_type yarn is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, ["--experts", "8"], "quantization_config"),
        ({"hidden_size": None}, ["--experts", "8"], "hidden_size: is missing"),
        ({"hidden_size": "x"}, ["--experts", "8"], "config.json: hidden_size: 'x' is not a whole number"),
        ({"num_hidden_layers": 3.5}, ["--experts", "8"], "num_hidden_layers: 3.5 is not a whole number"),
        ({"rms_norm_eps": "a"}, ["--experts", "8"], "rms_norm_eps: 'a' is not a number"),
        ({"rope_parameters": {"rope_theta": [1]}}, ["--experts", "8"], "rope_theta: [1] is not a number"),
        ({"rope_scaling": "yarn"}, ["--experts", "8"], "rope_scaling: 'yarn' is not a table"),
        ({"rope_theta": True}, ["--experts", "8"], "rope_theta: True is not a number"),
        ({"intermediate_size": 40}, ["--experts", "8"], "mlp.experts.gate_up: has shape (8, 64, 96), config.json"),
        ({"vocab_size": 97}, ["--experts", "8"], "embedding.weight: has shape (96, 64), config.json makes it (97, 64)"),
        ({"num_hidden_layers": 2}, ["--experts", "8"], "model.layers.2.input_layernorm.weight: our model has no place"),
        ({"num_hidden_layers": 4}, ["--experts", "8"], "has no tensor model.layers.3"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(
    changes: dict[str, object], options: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "hf"
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=16)).save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | changes))
    capsys.readouterr()  # a progress bar of transformers
    code = run_command(from_hf.main, [str(folder), "--out", str(tmp_path / "out"), *options])
    lines = capsys.readouterr().err.splitlines()
    assert code in (2, 3)
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=16)).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert run_command(from_hf.main, [str(folder), "--out", str(tmp_path / "out"), "--experts", "8"]) == 2
    assert "pytorch_model.bin is a pickle, which could run code" in capsys.readouterr().err


def test_an_index_stays_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=16)).save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run_command(from_hf.main, [str(folder), "--out", str(tmp_path / "out"), "--experts", "8"]) == 3
    assert "names files outside its folder" in capsys.readouterr().err


@pytest.fixture
def initial(tmp_path: Path, data_config: DataConfig) -> Path:
    """Initial weights made from a run's export, with the tokenizer of the test corpus."""
    run_dir, _, _ = write_run(tmp_path / "origin", data_config, model=ARCHITECTURES["glm4_moe"])
    assert run_command(export.main, [str(run_dir), "--out", str(tmp_path / "hf")]) == 0
    convert(tmp_path / "hf", tmp_path / "initial")
    return tmp_path / "initial"


def training_config(initial: Path, data: DataConfig, **sections: object) -> Path:
    tree = {
        "include": [str(initial / "config.yaml")],
        "run_dir": str(initial.parent / "run"),
        "data": {
            "path": data.path, "source": data.source, "vocab_size": data.vocab_size, "tokenizer": data.tokenizer,
            "heldout_fraction": data.heldout_fraction,
        },
        "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 32},
        "schedule": {"warmup_steps": 1},
        "engine": {"precision": "fp32", "zero_stage": 1, "collective_timeout_s": 60.0},
        "evaluation": {"every": 0},
        "wandb": {"mode": "disabled"},
        "hooks": {"expert_bias": {"rule": "sign", "rate": 0.01}},
        **sections,
    }  # fmt: skip
    path = initial.parent / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_training_starts_from_the_weights_and_resumes_without_them(initial: Path, data_config: DataConfig) -> None:
    config, run_dir, sharded = training_config(initial, data_config), initial.parent / "run", initial.parent / "sharded"
    run_trainings(
        [
            (config, []),
            (config, [f"run_dir={sharded}", "engine.expert_parallel_size=2"]),
            (config, ["train.steps=3", "init_from=/nowhere"]),
        ],
        ranks=2,
    )
    # The loss of the first step is that of the weights, on the rows the step saw.
    loaded = load_run_config(config)
    batch = open_corpus(loaded).train_batch(np.arange(4))
    model = initial_model(initial)
    with torch.no_grad():
        expected = model(batch.tokens_ST, batch.labels_ST).sum() / (batch.labels_ST != -100).sum()
    assert losses(run_dir)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses(sharded) == pytest.approx(losses(run_dir)[:2], rel=1e-5)
    log = (run_dir / "log.txt").read_text()
    assert log.count(f"initial weights from {initial}") == 1
    assert "resumed from step 2" in log
    assert len(losses(run_dir)) == 3


def test_weights_that_do_not_fit_the_run_are_one_line(
    initial: Path, data_config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(training_config(initial, data_config))

    def fails(code: int, message: str, *overrides: str) -> None:
        assert run_command(train.main, [config, *overrides]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
        assert not (tmp_path / "run").exists()

    fails(2, "init_from: blocks.0.mlp.down.weight is (32, 48) in", "model.dense_intermediate_size=64")
    fails(2, "init_from: blocks.0.attention.key.bias is (16,) in", "model.attention_bias=false")
    fails(3, "MANIFEST.json is missing", f"init_from={tmp_path}")
    manifest = json.loads((initial / "MANIFEST.json").read_text())
    (initial / "MANIFEST.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    fails(2, "was prepared with another tokenizer than the weights")
    (initial / "MANIFEST.json").write_text("{")
    fails(3, "MANIFEST.json is unreadable")


def test_damaged_weights_are_not_loaded(initial: Path, data_config: DataConfig) -> None:
    config = load_run_config(training_config(initial, data_config))
    weights = initial / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    model = MoEDecoder(config.model, vocab_size=320)
    before = {name: tensor.clone() for name, tensor in whole_weights(model).items()}
    with pytest.raises(CheckpointError, match=r"model.safetensors does not have the size and hash in the manifest"):
        load_initial_weights(model, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole_weights(model).items())


def test_a_checkpoint_is_initial_weights_too(tmp_path: Path, data_config: DataConfig) -> None:
    run_dir, config, model = write_run(tmp_path, data_config)
    checkpoint = run_dir / "checkpoints" / f"step-{STEP:08d}"
    again = MoEDecoder(config.model, vocab_size=model.embedding.num_embeddings)
    load_initial_weights(again, dataclasses.replace(config, init_from=str(checkpoint)))
    for name, tensor in whole_weights(again).items():
        assert torch.equal(tensor, whole_weights(model)[name])
