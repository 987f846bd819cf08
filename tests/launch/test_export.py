"""An exported folder is what transformers makes of it: the same logits, and text."""

import json
import resource
from pathlib import Path

import pytest
import torch
import yaml

from launch import export
from launch._cli import run_command
from launch._trained import load_trained_model
from tests.launch.hf_folders import ARCHITECTURES, STEP, write_run, write_weights
from trainer.data.config import DataConfig
from trainer.errors import CheckpointError

transformers = pytest.importorskip("transformers")


def logits_of(folder: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(tokens_BT).logits


def some_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (3, 30), generator=torch.Generator().manual_seed(2))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    assert expected.std() > 0.1, "logits that say something"
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
def test_the_same_logits_and_text(
    architecture: str, changes: dict[str, object], tmp_path: Path, data_config: DataConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model_section = ARCHITECTURES[architecture] | changes
    run, _, model = write_run(tmp_path, data_config, biased=architecture != "qwen3_moe", model=model_section)
    out = tmp_path / "out"
    assert run_command(export.main, [str(run), "--out", str(out), "--shard-size", "20K"]) == 0, capsys.readouterr().err
    assert export.CLASSES[architecture] in capsys.readouterr().out
    shards = list(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert {path.stat().st_mode for path in shards} == {(out / "config.json").stat().st_mode}, "as readable as the rest"

    tokens_BT = some_tokens(model.embedding.num_embeddings)
    with torch.no_grad():
        expected = model(tokens_BT)
    assert close(logits_of(out, tokens_BT), expected)

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "for number in range(10):\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer(text, return_tensors="pt")
    made = theirs.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + 8
    # With a cache of its own, and ours without: the same greedy choice of the first new token.
    with torch.no_grad():
        last_V = model(inputs["input_ids"])[0, -1]
    last_V[tokenizer.eos_token_id] = -torch.inf  # min_new_tokens forbids it
    assert made[0, inputs["input_ids"].shape[1]] == last_V.argmax()


def test_shapes_that_need_care(tmp_path: Path, data_config: DataConfig) -> None:
    """No shared experts in an architecture that always has some, an odd rotated share, biases without norms."""
    for number, (architecture, changes) in enumerate(
        [
            ("glm4_moe", {"num_shared_experts": 0, "partial_rotary": 0.3, "head_dim": 24}),
            ("glm4_moe", {"num_dense_layers": 3}),
            ("glm4_moe", {"layer_experts": [0, 0, 8], "num_dense_layers": 0, "normalize_gates": False}),
            ("qwen3_moe", ARCHITECTURES["qwen3_moe"] | {"attention_bias": True, "normalize_gates": False}),
            ("deepseek_v3", ARCHITECTURES["deepseek_v3"] | {"num_groups": 2, "mtp_weight": 0.3}),
        ]
    ):
        folder = tmp_path / str(number)
        # Runs of more ranks than we are, where there are experts to spread.
        engine = {"expert_parallel_size": 1 if changes.get("num_dense_layers") == 3 else 4, "zero_stage": 1}
        run, _, model = write_run(folder, data_config, biased=architecture != "qwen3_moe", model=changes, engine=engine)
        assert run_command(export.main, [str(run), "--out", str(folder / "out")]) == 0
        assert json.loads((folder / "out" / "config.json").read_text())["model_type"] == architecture
        tokens_BT = some_tokens(model.embedding.num_embeddings)
        with torch.no_grad():
            assert close(logits_of(folder / "out", tokens_BT), model(tokens_BT)), changes


def test_bf16(tmp_path: Path, data_config: DataConfig) -> None:
    """A run in bf16 stays so, biases in float32; its export in fp32 has the logits of its weights."""
    run, _, model = write_run(tmp_path, data_config, dtype=torch.bfloat16, model=ARCHITECTURES["glm4_moe"])
    assert run_command(export.main, [str(run), "--out", str(tmp_path / "low")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert theirs.dtype == torch.bfloat16
    gate = theirs.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, model.blocks[1].mlp.router.expert_bias_E)
    assert run_command(export.main, [str(run), "--out", str(tmp_path / "high"), "--dtype", "fp32"]) == 0
    tokens_BT = some_tokens(model.embedding.num_embeddings)
    with torch.no_grad():
        assert close(logits_of(tmp_path / "high", tokens_BT), model.float()(tokens_BT))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"router_score": "sqrtsoftplus"}, [], "model.router_score: GLM-4-MoE has no place for 'sqrtsoftplus'"),
        ({"capacity_factor": 1.5}, [], "model.capacity_factor: GLM-4-MoE has no place for 1.5"),
        ({"uniform_routing": True}, [], "model.uniform_routing"),
        ({"layer_experts": [0, 4, 8]}, [], "model.layer_experts: GLM-4-MoE has the same number of experts"),
        ({"layer_experts": [0, 8, 0]}, [], "model.layer_experts: dense layers of GLM-4-MoE come first"),
        (ARCHITECTURES["qwen3_moe"] | {"num_shared_experts": 1}, [], "model.num_shared_experts: Qwen3-MoE"),
        (ARCHITECTURES["qwen3_moe"] | {"qk_norm": False}, [], "model.qk_norm: Qwen3-MoE has no place for False"),
        (ARCHITECTURES["qwen3_moe"], [], "hooks.expert_bias: Qwen3MoeForCausalLM selects without a bias"),
        ({}, ["--architecture", "deepseek_v3"], "model.attention: DeepSeek-V3 has no place for 'gqa'"),
        ({}, ["--shard-size", "big"], "--shard-size: 'big' is no size"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_one_line_and_exit_2(
    changes: dict[str, object], arguments: list[str], message: str, tmp_path: Path, data_config: DataConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, _, _ = write_run(tmp_path, data_config, model=changes)
    assert run_command(export.main, [str(run), "--out", str(tmp_path / "out"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "config.yaml"}, "nothing is written"


def test_a_multiplicative_bias_has_no_place_unless_it_never_moved(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks = {"expert_bias": {"rule": "multiplicative", "rate": 0.01}}
    run, _, model = write_run(tmp_path, data_config, hooks=hooks)
    assert run_command(export.main, [str(run), "--out", str(tmp_path / "out")]) == 2
    assert "hooks.expert_bias.rule: multiplicative" in capsys.readouterr().err
    for layer in model.moe_layers():
        layer.router.multiplies = True
    loaded = load_trained_model(run, torch.device("cpu"))[2].eval()
    tokens_BT = some_tokens(model.embedding.num_embeddings)
    with torch.no_grad():
        assert torch.equal(loaded(tokens_BT), model(tokens_BT)), "an evaluation multiplies too"

    for layer in model.moe_layers():
        layer.router.expert_bias_E.fill_(1.0)
    checkpoint = run / "checkpoints" / f"step-{STEP:08d}"
    identity = json.loads((checkpoint / "MANIFEST.json").read_text())["identity"]
    write_weights(checkpoint, model, identity, rule="multiplicative")
    assert run_command(export.main, [str(run), "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        assert close(logits_of(tmp_path / "out", tokens_BT), model(tokens_BT))


def test_wrong_folders(tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, _ = write_run(tmp_path, data_config)
    checkpoint = run / "checkpoints" / f"step-{STEP:08d}"

    def fails(code: int, message: str, *arguments: str) -> None:
        assert run_command(export.main, [*arguments]) == code
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1], lines
        assert sum(line.startswith("error") for line in lines) == 1, lines

    out = str(tmp_path / "out")
    fails(2, "no such config file", str(tmp_path / "none"), "--out", out)
    fails(3, f"has no checkpoint of step 7, only of [{STEP}]", str(run), "--out", out, "--step", "7")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("mine")
    fails(2, "exists and is not empty", str(run), "--out", str(taken))
    assert (taken / "precious").read_text() == "mine"

    resolved = yaml.safe_load((run / "config.yaml").read_text())
    moved = resolved | {"data": resolved["data"] | {"path": str(tmp_path / "gone")}}
    (run / "config.yaml").write_text(yaml.safe_dump(moved))
    fails(2, "holds no prepared corpus, so no tokenizer", str(run), "--out", out)

    other = resolved | {"model": resolved["model"] | {"routed_scale": 8.0}}
    (run / "config.yaml").write_text(yaml.safe_dump(other))
    fails(3, "run folder (model.routed_scale: 1.0 -> 8.0); restore those settings", str(run), "--out", out)
    with pytest.raises(CheckpointError, match=r"model\.routed_scale: 1\.0 -> 8\.0"):
        load_trained_model(run, torch.device("cpu"))  # what evaluate and domain_weights read
    (run / "config.yaml").write_text(yaml.safe_dump(resolved))

    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    fails(3, "model.safetensors does not have the size and hash", str(run), "--out", out, "--step", str(STEP))
    fails(3, "no intact checkpoint", str(run), "--out", out)
    assert not (tmp_path / "out").exists()


def test_no_space_left_is_exit_6_and_leaves_nothing(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = write_run(tmp_path, data_config)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = run_command(export.main, [str(run), "--out", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 6
    assert "cannot be written" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "config.yaml"}
