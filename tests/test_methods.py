"""Each method against NumPy and by hand, and what is particular to one method."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from conftest import save_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_start import started
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    FalconConfig,
    FalconMambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    Qwen3NextConfig,
)
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp
from transformers.models.layoutlmv3.configuration_layoutlmv3 import LayoutLMv3Config
from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter
from transformers.models.rwkv.configuration_rwkv import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvBlock

from pissa_cli.adapters.methods import METHODS
from pissa_cli.adapters.start import Layer, as_lora
from pissa_cli.base.attach import attach, lowrank_layers
from pissa_cli.base.bypassed import casts_to, is_bypassed
from pissa_cli.base.model import Linear, linear_layers, match_targets
from pissa_cli.base.peft_files import peft_targets, read_peft
from pissa_cli.base.plan import make_plan
from pissa_cli.errors import PissaError, UsageError
from pissa_cli.matrices import quant
from pissa_cli.merge import merge
from pissa_cli.quantize import quantize
from pissa_cli.run.rundir import Run
from pissa_cli.schema.recipe_file import load
from pissa_cli.train import train

Make = Callable[..., Any]


def numpy_top(weight: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(weight, full_matrices=False)
    return np.asarray((U[:, :rank] * S[:rank]) @ Vh[:rank])


def numpy_nf4(weight: np.ndarray) -> np.ndarray:
    """bitsandbytes' round trip."""
    packed = bitsandbytes.functional.quantize_4bit(torch.from_numpy(weight).contiguous(), quant_type="nf4")
    return np.asarray(bitsandbytes.functional.dequantize_4bit(*packed).numpy())


def nuclear(error: np.ndarray) -> float:
    return float(np.linalg.svd(error.astype(np.float64), compute_uv=False).sum())


def error_of(method: str, weight: Tensor, rank: int, absmax: Any = "largest", **options: Any) -> float:
    store = quant.Store(4, torch.float32, absmax=absmax)
    made = METHODS[method].start(weight, Layer("x", rank, 1.0, 0, store), {"svd": "exact", **options})
    return nuclear((weight - quant.read(made.frozen) - made.factors["B"] @ made.factors["A"]).numpy())


def published(method: str, W: np.ndarray, rank: int, passes: int) -> float:
    """The error of LoftQ's algorithm 1, or of PiSSA as its authors' code has it (appendix E)."""
    low_rank = np.zeros_like(W) if method == "loftq" else numpy_top(W, rank)
    for step in range(passes):
        stored = numpy_nf4(W - low_rank)
        if method == "loftq" or step + 1 < passes:
            low_rank = numpy_top(W - stored, rank)
    return nuclear(W - stored - low_rank)


@pytest.mark.parametrize("method", ["loftq", "pissa"])
@pytest.mark.parametrize("passes", [1, 5])
def test_loftq_and_qpissa_are_the_published_algorithms(
    method: str, passes: int, real_matrices: dict[str, Tensor]
) -> None:
    """By the last bits of an SVD a number rounds to another level, and the passes after it differ: by up to 0.1 % in
    some of the matrices, in the published algorithm itself as between it and ours."""
    chosen = [weight for weight in real_matrices.values() if min(weight.shape) >= 64][:9]
    assert len(chosen) == 9
    off = [
        abs(
            error_of(method, weight, 16, passes=passes, refit=False) / published(method, weight.numpy(), 16, passes) - 1
        )
        for weight in chosen
    ]
    assert max(off) <= (1e-4 if passes == 1 else 2e-3)
    assert sorted(off)[4] <= 1e-6


@pytest.mark.parametrize("svd", ["fast", "exact"])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_refit_step_by_step(passes: int, svd: str) -> None:
    """L <- U U^T (W - Q) with U = orth((W - Q) A^T), Q <- NF4(W - L - 0.8 (L - L_before)); last the best L for that Q.
    Passes that begin with a rough SVD find another Q."""
    source = np.random.default_rng(0)
    W = (source.standard_normal((96, 128)) * 0.97 ** np.arange(128)).astype(np.float32)
    L = ahead = numpy_top(W, 8)
    for _ in range(passes - 1):
        lost = W - numpy_nf4(W - ahead)
        U = np.linalg.qr(lost @ np.linalg.svd(L)[2][:8].T)[0]
        L, before = U @ (U.T @ lost), L
        ahead = L + 0.8 * (L - before)
    layer = Layer("x", 8, 1.0, 0, quant.Store(4, torch.float32))
    made = METHODS["pissa"].start(torch.from_numpy(W), layer, {"svd": svd, "passes": passes, "refit": True})
    frozen, found = quant.read(made.frozen).numpy(), (made.factors["B"] @ made.factors["A"]).numpy()
    if passes == 1 or svd == "exact":
        assert np.isclose(frozen, numpy_nf4(W - ahead), rtol=1e-3, atol=1e-5).mean() > 0.98
    best = numpy_top(W - frozen, 8)
    assert np.linalg.norm(found - best) < (1e-5 if svd == "exact" else 3e-3) * np.linalg.norm(best)


@pytest.mark.parametrize("rank", [16, 32])
def test_fitted_scales_and_the_refit_leave_eight_percent_less_than_the_paper(
    rank: int, real_matrices: dict[str, Tensor]
) -> None:
    shares = []
    for weight in real_matrices.values():
        if rank < min(weight.shape):
            paper = error_of("pissa", weight, rank, passes=5, refit=False)
            shares.append(error_of("pissa", weight, rank, "fitted", passes=5, refit=True) / paper)
    assert np.mean(shares) < 0.92 and max(shares) < 1


def test_a_fitted_block_is_the_best_of_its_grid_and_plain_nf4_to_any_reader() -> None:
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").numpy().astype(np.float64)
    W = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    W[0, :64] = 0
    fitted, plain = (quant.pack(quant.Store(4, torch.float32, absmax=kind), W) for kind in ("fitted", "largest"))  # type: ignore[arg-type]
    assert isinstance(fitted, quant.Packed) and isinstance(plain, quant.Packed)
    stock = bitsandbytes.functional.dequantize_4bit(fitted.data, fitted.state).view(-1, 64).double().numpy()
    blocks = W.view(-1, 64).double().numpy()
    before = ((quant.read(plain).view(-1, 64).double().numpy() - blocks) ** 2).sum(1)
    for block, found, largest in zip(blocks, stock, before, strict=True):
        best = 0.0
        for share in np.arange(14, 21) / 20 if block.any() else []:
            nearest = levels[np.abs(block[:, None] / (share * np.abs(block).max()) - levels).argmin(1)]
            error = float(((nearest @ block / (nearest @ nearest) * nearest - block) ** 2).sum())
            best = min(best or error, error)
        error = float(((found - block) ** 2).sum())
        assert 0.9 * best <= error <= 1.02 * best and error <= largest


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_each_method_by_hand() -> None:
    """W = diag(4, 1), rank 1: what each method makes of it, and what it does to x after its factors moved."""
    W, dense = numbers([[4.0, 0.0], [0.0, 1.0]]), quant.Store(32, torch.float32)

    def begin(method: str, scale: float = 1.0, store: quant.Store = dense, **options: Any) -> Any:
        return METHODS[method].start(W, Layer("x", 1, scale, 0, store), {"svd": "exact", "passes": 1, **options})

    made = begin("pissa", scale=0.25, refit=True)  # S / s = 16, its root 4
    assert torch.allclose(made.factors["A"].abs(), numbers([[4.0, 0.0]]), atol=1e-6)
    assert torch.allclose(made.factors["B"].abs(), numbers([[4.0], [0.0]]), atol=1e-6)
    assert torch.allclose(made.frozen, numbers([[0.0, 0.0], [0.0, 1.0]]), atol=1e-6)
    assert made.figures["energy"] == pytest.approx(16 / 17)
    moved = {"A": made.factors["A"], "B": 2 * made.factors["B"]}
    plain = METHODS["pissa"].on_plain_base(moved, made.factors)
    assert torch.allclose(0.25 * plain["B"] @ plain["A"], numbers([[4.0, 0.0], [0.0, 0.0]]), atol=1e-5)

    made = begin("svfit")
    assert torch.allclose(made.factors["d"], numbers([4.0]), atol=1e-6)
    assert torch.allclose(made.frozen, numbers([[0.0, 0.0], [0.0, 1.0]]), atol=1e-6)
    assert made.figures["energy"] == pytest.approx(16 / 17)
    plain = METHODS["svfit"].on_plain_base({**made.factors, "d": numbers([7.0])}, made.factors)
    assert torch.allclose(plain["B"] @ plain["A"], numbers([[3.0, 0.0], [0.0, 0.0]]), atol=1e-5)

    made = begin("loftq", store=quant.Store(4, torch.float32))
    level = 4 * 0.24611230194568634  # of NF4, the nearest to 1 / 4; what is lost is diag(0, 1 - level)
    assert torch.allclose(quant.read(made.frozen), numbers([[4.0, 0.0], [0.0, level]]), atol=1e-6)
    lost = numbers([[0.0, 0.0], [0.0, 1 - level]])
    assert torch.allclose(made.factors["B"] @ made.factors["A"], lost, atol=1e-6)

    made = begin("vera", d_initial=0.1)
    assert torch.equal(made.factors["d"], numbers([0.1])) and torch.equal(made.factors["b"], numbers([0.0, 0.0]))
    assert torch.equal(made.frozen, W) and as_lora(made.factors) == made.factors

    made = begin("lora", init="B", distribution="gaussian")
    assert not made.factors["A"].any() and made.factors["B"].all() and torch.equal(made.frozen, W)


def test_energy_is_a_share_of_numbers_whose_squares_vanish() -> None:
    layer = Layer("x", 1, 1.0, 0, quant.Store(32, torch.float32))
    for size, wanted in ((0.0, 0), (1e-25, 0), (1e-15, 16 / 17), (1e15, 16 / 17)):
        W = size * torch.diag(numbers([4.0, 1.0]))
        assert METHODS["svfit"].start(W, layer, {"svd": "exact"}).figures["energy"] == pytest.approx(wanted)


def test_what_16_bits_round_is_nothing_to_loftq() -> None:
    """A layer that cannot be in 4 bits starts as LoRA's, whether or not it loses bits."""
    layer = Layer("x", 2, 1.0, 0, quant.Store(16, torch.bfloat16))
    for size in (1, 1 / 3):
        made = METHODS["loftq"].start(size * torch.eye(8), layer, {"svd": "exact", "passes": 1})
        assert made.factors["A"].all() and not made.factors["B"].any()


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize(("distribution", "variance"), [("kaiming", 1 / 3), ("gaussian", 1.0)])
def test_variances_of_lora(init: str, distribution: str, variance: float, embedding: bool) -> None:
    layer = Layer("x", 16, 1.0, 0, quant.Store(32, torch.float32), embedding)
    made = METHODS["lora"].start(torch.zeros(600, 400), layer, {"init": init, "distribution": distribution})
    fan_in = {"A": 1 if embedding else 400, "B": 16}[init]
    assert float(made.factors[init].var()) == pytest.approx(variance / fan_in, rel=0.05)
    assert float(made.factors[init].mean()) == pytest.approx(0, abs=0.2 / math.sqrt(fan_in))
    if distribution == "kaiming":
        assert float(made.factors[init].abs().max()) <= 1 / math.sqrt(fan_in)


def test_parameter_counts_of_the_papers(tmp_path: Path) -> None:
    """LLaMA-7B's shapes, no weights: VeRA's 1.6 M and LoRA's 159.9 M (arXiv 2310.11454, table 4); 6.7 B in whole."""
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ).save_pretrained(tmp_path)
    for method, rank, wanted in (("vera", 1024, 1_589_248), ("lora", 64, 159_907_840), ("svfit", 256, 57_344)):
        flags = {("model", "name"): ("--model", str(tmp_path))}
        made = load(None, flags, [f"adapter.method={method}", f"adapter.rank={rank}"]).recipe
        assert make_plan(made, tmp_path).num_trainable(made) == wanted
    made = load(None, flags, ["adapter.method=full", "model.bits=32"]).recipe
    assert make_plan(made, tmp_path).num_trainable(made) == 6_738_415_616


def test_an_adapter_is_attached_once(models: Callable[[str], Path], recipe: Make) -> None:
    made = recipe(models("llama"), "model.bits=32", "adapter.rank=4")
    model = started(made)
    with pytest.raises(PissaError, match="has an adapter already"):
        attach(model, read_peft(Run(Path(made.output)).init)[1], METHODS["pissa"], plain=True)


def test_lora_plus_gives_b_its_own_rate(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    sets = [f"data.train={rows}", "train.steps=1", "train.lr=0.001", "train.warmup=0", "model.bits=32"]
    sets += ["adapter.method=lora", "adapter.rank=4", "adapter.lr_ratio=16"]
    for init, first, rate in (("A", "B", 0.016), ("B", "A", 0.001)):  # the factor that is zero moves in step 1, alone
        made = recipe(models("llama"), f"adapter.init={init}", f"output={rows.parent / init}", *sets)
        train(made)
        run = Run(Path(made.output))
        before, after = (read_peft(folder)[1].factors for folder in (run.init, run.adapter))
        moved = {key: max(float((after[n][key] - before[n][key]).abs().max()) for n in before) for key in "AB"}
        assert moved.pop(first) == pytest.approx(rate, rel=0.01) and set(moved.values()) == {0.0}


def test_patterns_set_rank_and_scale_by_layer(models: Callable[[str], Path], recipe: Make) -> None:
    made = recipe(
        models("llama"),
        "model.bits=32",
        "adapter.rank=4",
        "adapter.alpha=8",
        "adapter.rslora=true",
        "adapter.rank_pattern={'layers.0.*q_proj': 16, q_proj: 2}",
        "adapter.alpha_pattern={up_proj: 5}",
    )
    layers = lowrank_layers(started(made))
    expected = {"layers.0.self_attn.q_proj": (16, 2.0), "layers.1.self_attn.q_proj": (2, 8 / math.sqrt(2))}
    expected |= {"layers.1.mlp.up_proj": (4, 2.5), "layers.1.self_attn.k_proj": (4, 4.0)}
    for name, (rank, scale) in expected.items():
        layer = layers[f"model.{name}"]
        assert layer.A.shape[0] == rank and layer.scale == pytest.approx(scale)
    for wrong in ("adapter.rank_pattern={q_prj: 2}", "adapter.alpha_pattern={lm_head: 2}"):
        with pytest.raises(UsageError, match="matches no adapted layer"):
            started(recipe(models("llama"), "adapter.rank=4", wrong, f"output={made.output}x"))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["adapter.method=vera", "adapter.alpha=4"], "method vera has no such option"),
        (["adapter.method=pissa", "adapter.dropout=0.1"], "pissa needs dropout 0"),
        (["adapter.method=loftq"], "set model.bits to 4"),
        (["adapter.rslora=true"], "needs alpha"),
        (["adapter.rank_pattern={'(': 4}"], "not a regular expression"),
        (["adapter.rank_pattern={q_proj: 0}"], "must be above 0"),
        (["model.absmax=largest"], "needs model.bits 4"),
        (["adapter.refit=false"], "set model.bits to 4"),
    ],
)
def test_impossible_options_are_refused(sets: list[str], message: str, recipe: Make) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(Path("x"), *sets)


@pytest.mark.usefixtures("rendered")
def test_the_report_of_init(models: Callable[[str], Path], pissa: Callable[..., Any], tmp_path: Path) -> None:
    flags = ("--model", models("llama"), "--bits", "4", "--rank", "8", "--output", tmp_path / "out", "--report")
    shown = pissa("init", *flags)
    assert shown.code == 0 and "qpissa_paper" in shown.out and "energy kept by rank" in shown.out
    report = pissa("init", *flags, "--json").json["report"]
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000 and (tmp_path / "out" / "report.json").is_file()
    weights = load_file(models("llama") / "model.safetensors")
    for row in report["layers"]:
        W = weights[f"{row['name']}.weight"]
        squares = np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2
        for rank, share in row["energy"].items():
            assert share == pytest.approx(squares[: int(rank)].sum() / squares.sum(), rel=1e-4)
        assert row["errors"]["nf4"] == pytest.approx(
            nuclear((W - torch.from_numpy(numpy_nf4(W.numpy()))).numpy()), rel=1e-4
        )
        paper = error_of("pissa", W, 8, passes=5, refit=False)
        assert row["errors"]["qpissa_paper"] == pytest.approx(paper, rel=0.02)  # fast and exact SVD
        assert row["errors"]["qpissa"] < row["errors"]["qpissa_paper"] < row["errors"]["nf4"]


def test_modules_that_train_whole_have_their_own_rate(models: Callable[[str], Path], recipe: Make, rows: Path) -> None:
    sets = ["model.bits=32", "adapter.rank=4", "train.lr=0.001", "train.head_lr=0.016", "train.steps=1"]
    made = recipe(models("llama"), *sets, "train.warmup=0", f"data.train={rows}", "adapter.modules_to_save=[lm_head]")
    train(made)
    run = Run(Path(made.output))
    after = load_file(run.adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    before = load_file(models("llama") / "model.safetensors")["lm_head.weight"]
    assert float((after - before).abs().max()) == pytest.approx(0.016, rel=0.01)
    with pytest.raises(UsageError, match="modules_to_save, which is empty"):
        recipe(models("llama"), "train.head_lr=0.1", f"output={made.output}2")


@pytest.mark.parametrize("bits", [32, 4])
def test_a_zero_matrix_gets_a_factor_that_can_train(bits: int) -> None:
    layer = Layer("x", 4, 1.0, 0, quant.Store(bits, torch.float32, absmax="fitted"))
    for method in ("pissa", "loftq") if bits == 4 else ("pissa",):
        options = {"svd": "fast", "passes": 2 if bits == 4 else 1, "refit": True}
        made = METHODS[method].start(torch.zeros(64, 128), layer, options)
        assert made.factors["A"].any() or made.factors["B"].any(), method
        assert not (made.factors["B"] @ made.factors["A"]).any()


def test_falcon_has_linear_layers_of_its_own(recipe: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    config = FalconConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, bos_token_id=None, eos_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config)
    folder = save_model(model, tmp_path / "falcon")
    made = recipe(folder, f"data.train={rows}", "adapter.rank=4", "train.steps=2", "train.lr=0.01", "model.bits=32")
    train(made)
    peft_model = PeftModel.from_pretrained(model, Path(made.output) / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(merge(made)["path"])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(peft_model(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-4)
        with peft_model.disable_adapter():
            assert not torch.allclose(peft_model(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match="none of this model's layers can be stored in NF4"):
        make_plan(recipe(folder, "adapter.rank=4", "model.bits=4", f"output={tmp_path / 'four'}"), folder)
    with pytest.raises(UsageError, match="none of this model's layers can be stored in NF4"):
        quantize(made, folder, tmp_path / "packed")
    with pytest.raises(UsageError, match="fits compressed-tensors"):
        quantize(made, folder, tmp_path / "int4", form="compressed-tensors")


def test_4_bits_are_refused_where_transformers_makes_another_model_of_it(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "intermediate_size_mlp": 128}
    config = Llama4TextConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    folder = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "llama4")
    with pytest.raises(UsageError, match="in the place of Llama4TextExperts"):
        make_plan(recipe(folder, "adapter.rank=4", "model.bits=4"), folder)
    for form in ("nf4", "compressed-tensors"):
        with pytest.raises(UsageError, match="in the place of Llama4TextExperts"):
            quantize(recipe(folder), folder, tmp_path / form, form=form)


def test_what_kernels_read_gets_no_adapter_by_itself() -> None:
    """Mamba's kernels take the weights of these layers past them; attention has an out_proj, too."""
    config = FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    with torch.device("meta"):
        layers = linear_layers(AutoModelForCausalLM.from_config(config))
    assert {layer.kind for layer in match_targets(layers, "all-linear")} == {"in_proj"}
    with pytest.raises(UsageError, match="would train nothing"):
        match_targets(layers, ["in_proj", "out_proj"])
    config = Qwen3NextConfig(num_hidden_layers=2, num_experts=4, layer_types=["linear_attention", "full_attention"])
    with torch.device("meta"):
        layers = linear_layers(AutoModelForCausalLM.from_config(config))
    assert "model.layers.0.linear_attn.out_proj" in {layer.name for layer in match_targets(layers, "all-linear")}


def test_a_weight_that_is_read_past_its_layer_gets_no_adapter() -> None:
    """LongCat's router never calls its layer; Gemma 3n clamps two weights in training, RWKV divides two outside it;
    LayoutLMv3 looks numbers up in three."""
    with torch.device("meta"):
        encoder = LayoutLMv3Encoder(LayoutLMv3Config(num_hidden_layers=1))
        block = RwkvBlock(RwkvConfig(), 0)
        router = LongcatFlashTopkRouter(LongcatFlashConfig(num_local_experts=4))
        altup = Gemma3nTextAltUp(Gemma3nTextConfig())
        attention = LlamaAttention(LlamaConfig(), 0)
    assert is_bypassed(router, "classifier")
    assert all(is_bypassed(encoder, kind) for kind, part in encoder.named_children() if isinstance(part, nn.Linear))
    kinds = {"correction_coefs", "prediction_coefs", "modality_router"}
    assert {kind for kind in kinds if is_bypassed(altup, kind)} == kinds - {"modality_router"}
    assert not any(is_bypassed(attention, kind) for kind in ("q_proj", "o_proj"))
    assert [kind for kind in ("key", "value", "output") if is_bypassed(block.attention, kind)] == ["output"]
    assert [kind for kind in ("key", "value", "receptance") if is_bypassed(block.feed_forward, kind)] == ["value"]
    assert not Linear("dt_proj", "dt_proj.weight", 64, 64, False, bypassed=True).packable


def test_what_transformers_keeps_dense_is_not_packed() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))
    model._keep_in_fp32_modules = {"mlp.up_proj"}
    kept = [layer.kind for layer in linear_layers(model) if not (layer.packable or layer.embedding)]
    assert kept == ["up_proj"]


def test_peft_gets_full_names_where_a_short_one_is_of_another_module() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **sizes))
    model.model.layers[0].extra = torch.nn.ModuleList([torch.nn.Linear(16, 16)])
    layers = [layer for layer in linear_layers(model) if not layer.embedding]
    found = peft_targets([layer.name for layer in layers], layers, model, "LORA")
    adapted = get_peft_model(model, LoraConfig(r=2, **found))
    names = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert names == {layer.name for layer in layers} and "model.layers.0.extra.0" in names


def test_a_layer_to_whose_dtype_a_model_casts_stays_dense(
    recipe: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    """HY-V4 chooses the tokens to attend to by a layer's output for x in the dtype of its weight: in NF4 that was x in
    bytes, and `merge` found another model."""
    config = CONFIG_MAPPING["hy_v4"](
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        mlp_layer_types=["dense"],
        indexer_types=["full"],
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert casts_to(model.model.layers[0].self_attn.indexer, "weights_proj")
    assert not casts_to(model.model.layers[0].self_attn.indexer, "wk")
    folder = save_model(model, tmp_path / "base")
    made = recipe(
        folder, "model.bits=4", "train.precision=fp32", "adapter.rank=4", f"data.train={rows}", "train.steps=1"
    )
    train(made)
    merge(made)
