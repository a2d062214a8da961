"""Our backends inside transformers: randomly initialised Llama, Qwen3 and Mistral against transformers' own attention."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5", reason='transformers 5 is not installed: pip install "flash2-triton[transformers]"'
)

from transformers import LlamaConfig, MistralConfig, Qwen3Config
from transformers import LlamaForCausalLM as Llama
from transformers import MistralForCausalLM as Mistral
from transformers import Qwen3ForCausalLM as Qwen3

from flash2.integrations.transformers import register

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = 7
MODELS = {
    "llama": lambda: Llama(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3(Qwen3Config(**SIZES)),
    "qwen3-sliding": lambda: Qwen3(
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "mistral": lambda: Mistral(MistralConfig(**SIZES, sliding_window=WINDOW)),
}
BACKENDS = ("naive", "numba")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    assert "flash2-triton" in register()


def build(name: str, implementation: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(implementation)
    return model


def tokens(batch: int = 2, seq: int = 21) -> torch.Tensor:
    return torch.randint(3, 64, (batch, seq), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model, ids, mask=None):
    logits = model(ids, attention_mask=mask).logits
    seen = logits if mask is None else logits[mask.bool()]
    seen.square().sum().backward()
    return seen.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_is_the_same_as_with_sdpa_and_eager(name, backend):
    ours, gradients = logits_and_gradients(build(name, f"flash2-{backend}"), tokens())
    for theirs in ("sdpa", "eager"):
        want, wanted = logits_and_gradients(build(name, theirs), tokens())
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=2e-6)
        assert gradients.keys() == wanted.keys()
        for weight, gradient in wanted.items():
            torch.testing.assert_close(gradients[weight], gradient, rtol=1e-4, atol=2e-5, msg=weight)


@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_in_bf16(name, pytestconfig):
    """With --device cuda: the Triton kernels inside a model, no farther from fp32 than torch's own."""
    device = pytestconfig.getoption("--device")
    if not device.startswith("cuda"):
        pytest.skip("needs --device cuda")
    ids, errors = tokens().to(device), {}
    with torch.no_grad():
        want = build(name, "eager").to(device)(ids).logits
        for implementation in ("flash2-triton", "sdpa"):
            got = build(name, implementation).to(device, torch.bfloat16)(ids).logits
            errors[implementation] = (got.float() - want).square().mean().sqrt().item()
    assert errors["flash2-triton"] < 1.5 * errors["sdpa"]


def test_the_window_is_in_force():
    """A model that saw further back would differ: the comparison above can fail."""
    model = build("mistral", "flash2-numba")
    near, far = model(tokens()).logits, tokens()
    far[:, 0] = (far[:, 0] + 1) % 61 + 3
    reach = 2 * (WINDOW - 1)  # of two layers
    changed = (model(far).logits != near).any(-1)[0]
    assert changed[: reach + 1].any() and not changed[reach + 1 :].any()


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[0, :5] = mask[2, :13] = 0
    mask = mask if side == "left" else mask.flip(1)
    ours, gradients = logits_and_gradients(build(name, "flash2-numba"), tokens(3), mask)
    want, wanted = logits_and_gradients(build(name, "sdpa"), tokens(3), mask)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=2e-6)
    for weight, gradient in wanted.items():
        torch.testing.assert_close(gradients[weight], gradient, rtol=1e-4, atol=2e-5, msg=weight)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(name):
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ours = build(name, "flash2-numba").generate(tokens(), **options)
    assert ours.tolist() == build(name, "sdpa").generate(tokens(), **options).tolist()
    assert ours.shape == (2, 33)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output_attentions": True}, "attention weights"),
        ({"attention_mask": torch.ones(2, 1, 21, 21)}, "not a mask of each query and key"),
        ({"position_ids": torch.arange(21).remainder(7).expand(2, -1), "use_cache": False}, "packed sequences"),
        ({"attention_mask": torch.tensor([[1, 0] + [1] * 19] * 2)}, "not within it"),
        ({"cu_seq_lens_q": torch.tensor([0, 21])}, "cu_seq_lens_q"),
    ],
    ids=["weights", "4d", "packed", "holes", "varlen"],
)
def test_what_cannot_be_is_refused_in_words(options, says):
    model = build("llama", "flash2-naive")
    with pytest.raises(NotImplementedError, match=says):
        model(tokens(), **options)


def test_dropout_is_refused_in_words():
    model = Llama(LlamaConfig(**SIZES, attention_dropout=0.1)).train()
    model.set_attn_implementation("flash2-naive")
    with pytest.raises(NotImplementedError, match="attention_dropout=0"):
        model(tokens())


def test_a_static_cache_is_refused_in_words():
    model = build("llama", "flash2-naive")
    with pytest.raises(NotImplementedError, match="static cache"):
        model.generate(tokens(), max_new_tokens=3, cache_implementation="static", do_sample=False)


def test_an_unavailable_backend_says_so():
    model = build("llama", "flash2-sdpa-cudnn")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"sdpa-cudnn.*unavailable"):
            model(tokens())
